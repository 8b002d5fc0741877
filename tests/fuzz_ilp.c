/* Fuzzes snip_ilp.h: bytes become a problem, its answer is checked for what any answer must satisfy, small ones by
   brute force.

   With libFuzzer:    clang -g -O1 -fsanitize=fuzzer,address,undefined -DSNIP_FUZZER tests/fuzz_ilp.c -lm
   Over files alone:  cc -g -O1 -fsanitize=address,undefined tests/fuzz_ilp.c -lm, then list the files as arguments */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define SNIP_ILP_IMPLEMENTATION
#include "../snip_ilp.h"

enum { GROUPS = 12, OPTIONS = 6, STAGES = 4 };

typedef struct {
    const uint8_t *at, *end;
} input;

static unsigned byte(input *in) { return in->at < in->end ? *in->at++ : 0; }

static double number(input *in) {
    unsigned kind = byte(in);
    uint64_t bits = 0;
    double x;
    int i;
    switch (kind & 7) {
        case 0: return byte(in);
        case 1: return byte(in) * 0.1;
        case 2: return ldexp(1 + byte(in) / 256.0, (int)byte(in) - 128);
        case 3: return byte(in) * 256 + byte(in);
        case 4: return byte(in) / 255.0;
        case 5:
            for (i = 0; i < 8; i++) bits = bits << 8 | byte(in);
            memcpy(&x, &bits, sizeof x);
            return x;
        default: return kind >> 3;
    }
}

static void require(int ok, const char *text) {
    if (ok) return;
    fprintf(stderr, "violated: %s\n", text);
    abort();
}

#define REQUIRE(x) require((x) != 0, #x)

static int meets(const snip_ilp_problem *p, const int *choice, long double slack) {
    long double sum[STAGES + 1] = { 0 }, most[STAGES + 1] = { 0 }, gain = 0, all = 0;
    int i, j, s;
    for (i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *g = &p->groups[i];
        double largest = 0;
        for (j = 0; j < g->n_options; j++)
            if (g->options[j].gain > largest) largest = g->options[j].gain;
        sum[g->stage] += g->options[choice[i]].gain, most[g->stage] += largest;
        gain += g->options[choice[i]].gain, all += largest;
    }
    for (s = 0; p->stage_target && s < p->n_stages; s++)
        if (p->stage_target[s] > 0 && sum[s] < p->stage_target[s] - slack * most[s]) return 0;
    return !(p->total_target > 0) || gain >= p->total_target - slack * all;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in;
    snip_ilp_problem p;
    snip_ilp_group group[GROUPS];
    snip_ilp_option option[GROUPS * OPTIONS];
    double target[STAGES + 1], shortfall = -1;
    snip_ilp_params params = { 0, 0, 0 };
    snip_ilp_result r = { -7, -7, -7, -7, -7 };
    snip_ilp_status status;
    int choice[GROUPS], i, j, s, n, at = 0, missing;
    unsigned flags;
    long combinations = 1;
    in.at = data, in.end = data + size;
    flags = byte(&in);
    n = (int)(byte(&in) % (GROUPS + 1));
    p.n_groups = n, p.groups = group, p.n_stages = (int)(byte(&in) % (STAGES + 1)),
    p.stage_target = flags & 1 ? target : NULL;
    p.total_target = flags & 2 ? number(&in) : 0;
    for (s = 0; s < p.n_stages; s++) target[s] = number(&in);
    for (i = 0; i < n; i++) {
        unsigned shape = byte(&in);
        group[i].options = option + at;
        group[i].n_options = (int)(shape % (OPTIONS + 1));
        group[i].stage = (int)(shape / 8 % STAGES);
        if (!(flags & 4)) {  // mostly valid problems
            if (group[i].n_options == 0) group[i].n_options = 1;
            group[i].stage %= p.n_stages > 1 ? p.n_stages : 1;
        }
        for (j = 0; j < group[i].n_options; j++, at++) option[at].cost = number(&in), option[at].gain = number(&in);
        combinations *= combinations < 5000 && group[i].n_options ? group[i].n_options : 1;
        choice[i] = -7;
    }
    if (flags & 8) {  // a target at or near what a choice reaches
        double gain = 0;
        for (i = 0; i < n; i++) gain += group[i].n_options ? group[i].options[group[i].n_options - 1].gain : 0;
        p.total_target = gain;
    }
    if (flags & 16) params.max_memory = 64 * byte(&in) + 1;
    if (flags & 32) params.rel_gap = byte(&in) / 256.0;
    if (flags & 64) params.time_limit = 1e-6;
    status = snip_ilp_solve(&p, flags & 128 ? NULL : &params, choice, &r);
    missing = snip_ilp_shortfall(&p, &shortfall);
    REQUIRE((missing == -2) == (status == SNIP_ILP_BAD_ARGUMENT));
    REQUIRE((missing >= 0) == (status == SNIP_ILP_INFEASIBLE));
    if (missing >= 0) REQUIRE(shortfall > 0 && missing <= p.n_stages);
    if (status == SNIP_ILP_BAD_ARGUMENT) REQUIRE(r.cost < -6 && r.seconds < -6);
    if (status != SNIP_ILP_OPTIMAL && status != SNIP_ILP_FEASIBLE) {
        for (i = 0; i < n; i++) REQUIRE(choice[i] == -7);
        return 0;
    }
    {
        long double cost = 0, least = 0, best = -1, slack, largest = 0;
        int all[GROUPS] = { 0 };
        for (i = 0; i < n; i++) {
            double cheapest = group[i].options[0].cost;
            REQUIRE(choice[i] >= 0 && choice[i] < group[i].n_options);
            for (j = 1; j < group[i].n_options; j++)
                if (group[i].options[j].cost < cheapest) cheapest = group[i].options[j].cost;
            for (j = 0; j < group[i].n_options; j++)
                if (group[i].options[j].cost > largest) largest = group[i].options[j].cost;
            cost += group[i].options[choice[i]].cost;
            least += cheapest;
        }
        REQUIRE(meets(&p, choice, 1.000001e-12L));
        if (cost < 1e300L) {
            REQUIRE(r.bound <= r.cost && r.bound >= least * (1 - 1e-15L));
            REQUIRE(r.cost >= cost * (1 - 1e-15L) && r.cost <= cost * (1 + 1e-15L));
            if (combinations < 5000) {
                for (;;) {
                    long double sum = 0;
                    for (i = 0; i < n; i++) sum += group[i].options[all[i]].cost;
                    if ((best < 0 || sum < best) && meets(&p, all, 0)) best = sum;
                    for (j = 0; j < n && ++all[j] == group[j].n_options; j++) all[j] = 0;
                    if (j == n) break;
                }
                slack = 1e-12L * (cost - least) + 1e-15L * cost +
                        1e-300L * largest;  // beside the largest, such costs are nothing
                if (best >= 0) REQUIRE(r.bound <= best + slack);
                if (best >= 0 && status == SNIP_ILP_OPTIMAL) REQUIRE(cost <= best + slack);
            }
        }
    }
    return 0;
}

#ifndef SNIP_FUZZER
int main(int argc, char **argv) {
    int i;
    for (i = 1; i < argc; i++) {
        static uint8_t data[1 << 16];
        FILE *f = fopen(argv[i], "rb");
        size_t size;
        if (!f) {
            fprintf(stderr, "cannot read %s\n", argv[i]);
            return 2;
        }
        size = fread(data, 1, sizeof data, f);
        fclose(f);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d inputs passed\n", argc - 1);
    return 0;
}
#endif
