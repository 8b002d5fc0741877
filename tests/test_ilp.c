/* Tests of snip_ilp.h. Stand-alone; prints "N passed, N failed" last and exits non-zero on a failure.

   test_ilp [--instances N] [--seed N]     how many random instances are solved by brute force (default 150000) */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// Every allocation of the solver goes through here: counted, measured, and failed on demand.
static long allocations, fail_at;
static size_t live, peak;

static void *test_malloc(size_t size) {
    size_t *p;
    if (++allocations == fail_at) return NULL;
    p = (size_t *)malloc(size + 16);
    if (!p) return NULL;
    *p = size;
    live += size;
    if (live > peak) peak = live;
    memset(p + 2, 0xa5, size);                // whatever is read before it is written shows
    return p + 2;
}
static void test_free(void *pointer) {
    size_t *p = (size_t *)pointer - 2;
    live -= *p;
    free(p);
}
#define SNIP_ILP_MALLOC(size) test_malloc(size)
#define SNIP_ILP_FREE(pointer) test_free(pointer)
#define SNIP_ILP_IMPLEMENTATION
#include "../snip_ilp.h"
#include "../snip_ilp.h"

static long passed, failed;
static const char *what = "";
static uint64_t instance_seed;

static void check(int ok, const char *text, int line) {
    if (ok) { passed++; return; }
    if (failed++ < 20) printf("FAILED line %d: %s   [%s, seed %llu]\n", line, text, what, (unsigned long long)instance_seed);
}
#define CHECK(x) check((x) != 0, #x, __LINE__)

// ---------------------------------------------------------------------------------------------------------------- random instances

static uint64_t rng_state;
static uint64_t rng(void) {                   // splitmix64
    uint64_t z = rng_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static double uniform(void) { return (double)(rng() >> 11) * (1.0 / 9007199254740992.0); }
static int below(int n) { return (int)(rng() % (uint64_t)n); }

typedef struct {
    snip_ilp_problem p;
    snip_ilp_group *group;
    snip_ilp_option *option;
    double *target;
} instance;

static instance instance_new(int n, int options, int stages) {
    instance x;
    memset(&x, 0, sizeof x);
    x.group = (snip_ilp_group *)calloc((size_t)n + 1, sizeof *x.group);
    x.option = (snip_ilp_option *)calloc((size_t)options + 1, sizeof *x.option);
    x.target = (double *)calloc((size_t)stages + 1, sizeof *x.target);
    x.p.n_groups = n;
    x.p.groups = x.group;
    x.p.n_stages = stages;
    x.p.stage_target = x.target;
    return x;
}
static void instance_free(instance *x) {
    free(x->group);
    free(x->option);
    free(x->target);
}

static double next_up(double x) {             // the next double: by bits, so that no mode of the compiler matters
    uint64_t bits;
    if (!(x > 0)) return DBL_MIN;             // -Ofast takes the denormals for zeros
    memcpy(&bits, &x, sizeof bits);
    bits++;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

// One number of a kind. Kinds are drawn for costs and gains apart.
static double number(int kind) {
    switch (kind) {
    case 0: return below(4);                                  // ties and zeros
    case 1: return below(100);
    case 2: return uniform();
    case 3: return below(50) * 0.1;                           // a lattice that doubles do not hold
    case 4: return uniform() * 1e300;
    case 5: return uniform() * 1e-300;
    case 6: return pow(10, 24 * uniform() - 12);              // 1e24 ranges
    case 7: return below(3) ? uniform() : 0;
    case 8: return 1;                                         // all equal
    case 9: return 1 + below(3) * 1e-9 + below(3) * 1e-6;     // nearly equal
    case 10: return below(1000000);
    case 11: return ldexp(1, below(40) - 20);
    default: return 1e6 + below(10);                          // a large offset
    }
}
enum { KINDS = 13 };

static double group_max(const snip_ilp_group *g) {
    double most = 0;
    int j;
    for (j = 0; j < g->n_options; j++)
        if (g->options[j].gain > most) most = g->options[j].gain;
    return most;
}

// A target for some groups, the largest gains of which sum to most, those of a random choice to some.
static double random_target(double most, double some) {
    switch (below(9)) {
    case 0: return 0;
    case 1: return most;
    case 2: return next_up(most);
    case 3: return most * (1 + 1e-6);
    case 4: return some;
    case 5: return next_up(some);
    case 6: return -1;
    case 7: return most * uniform();
    default: return most * (0.7 + 0.3 * uniform());
    }
}

static instance random_instance(int max_groups, int max_options, int max_stages) {
    int n = 1 + below(max_groups), stages = 1 + below(max_stages), cost_kind = below(KINDS), gain_kind = below(KINDS), i, j, s, at = 0;
    int relation = below(6);
    instance x = instance_new(n, n * max_options, stages);
    double *most = (double *)calloc((size_t)stages + 1, sizeof *most), *some = (double *)calloc((size_t)stages + 1, sizeof *some);
    double all = 0, any = 0;
    for (i = 0; i < n; i++) {
        int count = below(5) ? 1 + below(max_options) : 1;
        x.group[i].options = x.option + at;
        x.group[i].n_options = count;
        x.group[i].stage = below(stages);
        for (j = 0; j < count; j++, at++) {
            x.option[at].gain = number(gain_kind);
            x.option[at].cost = number(cost_kind);
            if (relation == 0) x.option[at].cost = x.option[at].gain;                                 // subset sum
            if (relation == 1) x.option[at].cost = x.option[at].gain > 0 ? x.option[at].gain + 10 : 0;   // strongly correlated
        }
        most[x.group[i].stage] += group_max(&x.group[i]);
        some[x.group[i].stage] += x.option[at - 1 - below(count)].gain;
    }
    for (s = 0; s < stages; s++) {
        all += most[s];
        any += some[s];
        x.target[s] = below(4) ? random_target(most[s], some[s]) : 0;
        if (below(4) && x.target[s] > most[s]) x.target[s] = some[s];        // more feasible ones
    }
    x.p.total_target = below(2) ? random_target(all, any) : 0;
    if (!below(8)) x.p.stage_target = NULL;
    free(most);
    free(some);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------- what an answer must be

typedef struct { long double cost, least, gain; int meets; } verdict;         // meets: every target to within 1e-12

static verdict judge(const snip_ilp_problem *p, const int *choice) {
    verdict v;
    int s, i, j, stages = p->n_stages > 1 ? p->n_stages : 1;
    long double *sum = (long double *)calloc((size_t)stages, sizeof *sum), *most = (long double *)calloc((size_t)stages, sizeof *most), all = 0;
    memset(&v, 0, sizeof v);
    v.meets = 1;
    for (i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *g = &p->groups[i];
        double cheapest = g->options[0].cost;
        if (choice[i] < 0 || choice[i] >= g->n_options) { v.meets = 0; break; }
        for (j = 1; j < g->n_options; j++)
            if (g->options[j].cost < cheapest) cheapest = g->options[j].cost;
        v.cost += g->options[choice[i]].cost;
        v.least += cheapest;
        v.gain += g->options[choice[i]].gain;
        sum[g->stage] += g->options[choice[i]].gain;
        most[g->stage] += group_max(g);
        all += group_max(g);
    }
    for (s = 0; s < stages; s++)
        if (p->stage_target && s < p->n_stages && sum[s] < p->stage_target[s] - 1.000001e-12L * most[s]) v.meets = 0;
    if (v.gain < p->total_target - 1.000001e-12L * all && p->total_target > 0) v.meets = 0;
    free(sum);
    free(most);
    return v;
}

// The least cost of choices that meet every target exactly, and of those that meet them to within the tolerance; -1: there is none.
typedef struct { long double exact, loose; } optimum;

static optimum brute_force(const snip_ilp_problem *p) {
    enum { MOST = 16 };
    int n = p->n_groups, i, j, s, stages = p->n_stages > 1 ? p->n_stages : 1, choice[MOST] = {0};
    long double most[MOST] = {0}, all = 0;
    optimum best = {-1, -1};
    for (i = 0; i < n; i++) {
        most[p->groups[i].stage] += group_max(&p->groups[i]);
        all += group_max(&p->groups[i]);
    }
    for (;;) {
        long double sum[MOST] = {0}, gain = 0, cost = 0;
        int exact = 1, loose = 1;
        for (i = 0; i < n; i++) {
            const snip_ilp_option *o = &p->groups[i].options[choice[i]];
            sum[p->groups[i].stage] += o->gain;
            gain += o->gain;
            cost += o->cost;
        }
        for (s = 0; s < stages; s++) {
            double target = p->stage_target ? p->stage_target[s] : 0;
            if (sum[s] < target) exact = 0;
            if (sum[s] < target - 1e-12L * most[s]) loose = 0;
        }
        if (p->total_target > 0 && gain < p->total_target) exact = 0;
        if (p->total_target > 0 && gain < p->total_target - 1e-12L * all) loose = 0;
        if (exact && (best.exact < 0 || cost < best.exact)) best.exact = cost;
        if (loose && (best.loose < 0 || cost < best.loose)) best.loose = cost;
        for (j = 0; j < n && ++choice[j] == p->groups[j].n_options; j++) choice[j] = 0;
        if (j == n) return best;
    }
}

// What any answer must satisfy, whatever the optimum.
static verdict check_answer(const snip_ilp_problem *p, snip_ilp_status status, const int *choice, const snip_ilp_result *r) {
    verdict v = judge(p, choice);
    long double ulps = 4e-16L * v.cost;
    CHECK(status == SNIP_ILP_OPTIMAL || status == SNIP_ILP_FEASIBLE);
    CHECK(v.meets);
    CHECK(fabsl(r->cost - v.cost) <= ulps);
    CHECK(fabsl(r->gain - v.gain) <= 4e-16L * v.gain);
    CHECK(r->bound <= r->cost);
    CHECK(r->bound >= v.least - ulps);
    CHECK(r->seconds >= 0 && r->nodes >= 0);
    if (status == SNIP_ILP_OPTIMAL) CHECK(r->cost - r->bound <= 1e-12L * (v.cost - v.least) + ulps);
    return v;
}

static void check_exact(const snip_ilp_problem *p) {
    int choice[16];
    snip_ilp_result r;
    optimum best = brute_force(p);
    snip_ilp_status status = snip_ilp_solve(p, NULL, choice, &r);
    if (best.exact >= 0) CHECK(status == SNIP_ILP_OPTIMAL);
    if (best.loose < 0) CHECK(status == SNIP_ILP_INFEASIBLE);
    CHECK(status == SNIP_ILP_OPTIMAL || status == SNIP_ILP_INFEASIBLE);
    CHECK((snip_ilp_shortfall(p, NULL) >= 0) == (status == SNIP_ILP_INFEASIBLE));
    if (status == SNIP_ILP_OPTIMAL) {
        verdict v = check_answer(p, status, choice, &r);
        long double slack = 1e-12L * (v.cost - v.least) + 2e-16L * v.cost;
        if (best.exact >= 0) CHECK(v.cost <= best.exact + slack);
        CHECK(v.cost >= best.loose - slack);
    }
    CHECK(live == 0);
}

static void dump(const snip_ilp_problem *p) {
    int i, j;
    printf("total %.17g\n", p->total_target);
    for (i = 0; i < p->n_stages && p->stage_target; i++) printf("stage %d target %.17g\n", i, p->stage_target[i]);
    for (i = 0; i < p->n_groups; i++) {
        printf("group %d stage %d:", i, p->groups[i].stage);
        for (j = 0; j < p->groups[i].n_options; j++) printf(" (%.17g, %.17g)", p->groups[i].options[j].cost, p->groups[i].options[j].gain);
        printf("\n");
    }
}

static void test_brute_force(long instances, uint64_t seed) {
    long i, optimal = 0;
    what = "brute force";
    for (i = 0; i < instances; i++) {
        instance x;
        rng_state = instance_seed = seed + (uint64_t)i;
        x = below(4) ? random_instance(6, 4, 3) : random_instance(9, 3, 4);
        if (getenv("DUMP")) dump(&x.p);
        check_exact(&x.p);
        optimal += snip_ilp_shortfall(&x.p, NULL) < 0;
        instance_free(&x);
    }
    printf("brute force: %ld instances, %ld feasible\n", instances, optimal);
}

int main(int argc, char **argv) {
    long instances = 150000;
    uint64_t seed = 1;
    int i;
    for (i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--instances")) instances = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--seed")) seed = (uint64_t)strtoull(argv[i + 1], NULL, 10) << 32;
    }
    test_brute_force(instances, seed);
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}
