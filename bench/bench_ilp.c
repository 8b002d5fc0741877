/* Times snip_ilp.h on families of problems.

   bench_ilp [--case SUBSTRING | --exact CASE] [--time-limit S] [--repeat N] [--seed N] [--hard]
   bench_ilp --dump CASE       writes the problem as text, for other solvers (bench_ilp.py drives them)

   Text: "mckp 1 groups stages total", the stage targets, then per group: stage, options, and the (cost, gain) pairs.
   Lines: bench, case, ours (ms), unit, peer_name, peer, ratio; then, of ours: status, relative gap, nodes, peak KiB. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t live, peak;

static void *bench_malloc(size_t size) {
    size_t *p = (size_t *)malloc(size + 16);
    if (!p) return NULL;
    *p = size;
    live += size;
    if (live > peak) peak = live;
    return p + 2;
}

static void bench_free(void *pointer) {
    live -= ((size_t *)pointer)[-2];
    free((size_t *)pointer - 2);
}

#define SNIP_ILP_MALLOC(size) bench_malloc(size)
#define SNIP_ILP_FREE(pointer) bench_free(pointer)
#define SNIP_ILP_IMPLEMENTATION
#include "../snip_ilp.h"

static uint64_t rng_state;

static uint64_t rng(void) {  // splitmix64
    uint64_t z = rng_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double uniform(void) { return (double)(rng() >> 11) * (1.0 / 9007199254740992.0); }

static double normal(void) { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }

typedef enum { SNIP, MEASURED, UNCORRELATED, WEAK, STRONG, SUBSET, REAL_SUBSET, ZIG } family;

typedef struct {
    const char *name;
    family kind;
    int groups, options, stages, coupled;
    double range;  // of the integer families
    int hard, repeat;
} bench_case;

static const bench_case cases[] = {
    {"snip_560x2",               SNIP,         560,    2,  1, 0, 0,    0, 101},
    { "snip_560x8",              SNIP,         560,    8,  1, 0, 0,    0, 101},
    { "snip_560x8_8stages",      SNIP,         560,    8,  8, 0, 0,    0, 101},
    { "snip_560x27_8stages",     SNIP,         560,    27, 8, 0, 0,    0, 51 },
    { "measured_560x8",          MEASURED,     560,    8,  1, 0, 0,    0, 51 },
    { "measured_560x27_8stages", MEASURED,     560,    27, 8, 0, 0,    0, 51 },
    { "coupled_snip_560x8",      SNIP,         560,    8,  8, 1, 0,    0, 51 },
    { "coupled_measured_560x8",  MEASURED,     560,    8,  8, 1, 0,    0, 51 },
    { "coupled_measured_560x27", MEASURED,     560,    27, 8, 1, 0,    0, 51 },
    { "snip_100000x8",           SNIP,         100000, 8,  1, 0, 0,    0, 7  },
    { "measured_100000x8",       MEASURED,     100000, 8,  8, 0, 0,    0, 7  },
    { "uncorrelated_1000x10",    UNCORRELATED, 1000,   10, 1, 0, 1000, 0, 21 },
    { "weak_1000x10",            WEAK,         1000,   10, 1, 0, 1000, 0, 21 },
    { "weak_1000x10_1e6",        WEAK,         1000,   10, 1, 0, 1e6,  0, 11 },
    { "strong_100x10",           STRONG,       100,    10, 1, 0, 1000, 0, 11 },
    { "strong_1000x10",          STRONG,       1000,   10, 1, 0, 1000, 0, 5  },
    { "subset_1000x10",          SUBSET,       1000,   10, 1, 0, 1000, 0, 11 },
    { "zig_1000x10",             ZIG,          1000,   10, 1, 0, 1000, 0, 11 },
    { "strong_10000x10",         STRONG,       10000,  10, 1, 0, 1000, 1, 1  },
    { "strong_1000x10_1e6",      STRONG,       1000,   10, 1, 0, 1e6,  1, 1  },
    { "weak_10000x10_1e6",       WEAK,         10000,  10, 1, 0, 1e6,  1, 1  },
    { "real_subset_40x4",        REAL_SUBSET,  40,     4,  1, 0, 0,    1, 1  },
    { "real_subset_560x8",       REAL_SUBSET,  560,    8,  1, 0, 0,    1, 1  },
};

enum { CASES = sizeof cases / sizeof cases[0] };

static snip_ilp_problem make(const bench_case *c, uint64_t seed) {
    snip_ilp_problem p;
    snip_ilp_group *g = (snip_ilp_group *)calloc((size_t)c->groups, sizeof *g);
    snip_ilp_option *o = (snip_ilp_option *)calloc((size_t)c->groups * (size_t)c->options, sizeof *o), *at = o;
    double *target = (double *)calloc((size_t)c->stages, sizeof *target), all = 0;
    int i, j, k = c->options;
    rng_state = seed;
    for (i = 0; i < c->groups; i++, at += k) {
        double most = 0, least = 1e300, size = c->range > 0 ? 0 : exp(normal()), worth = 1e-4 * exp(1.5 * normal()),
               jitter[9];
        static const double shape[4] = { 1.0, 1.0, 2.6875, 2.6875 };  // q, o and up, down of a Llama block
        g[i].options = at;
        g[i].n_options = k;
        g[i].stage = (int)((int64_t)i * c->stages / c->groups);
        if (c->kind == SNIP) size = shape[i & 3];
        for (j = 0; j < 9; j++) jitter[j] = exp(0.15 * normal());
        for (j = 0; j < k; j++) {
            // three GEMMs of a layer, each in BF16, FP8 or FP4 (27 options), or in FP8 or FP4 (8), or all of one (2)
            int a = k == 27 ? j % 3 : j & 1,
                b = k == 27  ? j / 3 % 3
                    : k == 2 ? j & 1
                             : j >> 1 & 1,
                d = k == 27  ? j / 9
                    : k == 2 ? j & 1
                             : j >> 2 & 1;
            static const double hurt3[3] = { 0, 1, 30 }, hurt2[2] = { 1, 30 }, save3[3] = { 0, 0.5, 0.75 },
                                save2[2] = { 0, 1 };
            const double *hurt = k == 27 ? hurt3 : hurt2, *save = k == 27 ? save3 : save2;
            switch (c->kind) {
                case SNIP:
                case MEASURED:
                    at[j].cost = worth * (hurt[a] * jitter[0] + hurt[b] * jitter[1] + hurt[d] * jitter[2]);
                    at[j].gain = size * (save[a] + save[b] + save[d]);
                    if (c->kind == MEASURED) {
                        at[j].gain = size * (save[a] * jitter[3] + save[b] * jitter[4] + save[d] * jitter[5]) *
                                     (1 + 0.01 * normal());
                        at[j].cost *= exp(0.05 * normal());
                        if (at[j].gain < 0) at[j].gain = 0;
                    }
                    break;
                case UNCORRELATED:
                    at[j].gain = floor(1 + c->range * uniform()), at[j].cost = floor(1 + c->range * uniform());
                    break;
                case WEAK:
                    at[j].gain = floor(1 + c->range * uniform());
                    at[j].cost = at[j].gain + floor(c->range / 5 * uniform() - c->range / 10);
                    if (at[j].cost < 1) at[j].cost = 1;
                    break;
                case STRONG: {  // sums of numbers w with value w + 10, sorted (Pisinger 1995)
                    double w = floor(1 + c->range * uniform());
                    at[j].gain = (j ? at[j - 1].gain : 0) + w;
                    at[j].cost = (j ? at[j - 1].cost : 0) + w + 10;
                    break;
                }
                case SUBSET: at[j].gain = at[j].cost = floor(1 + c->range * uniform()); break;
                case REAL_SUBSET: at[j].gain = at[j].cost = uniform(); break;
                case ZIG:
                    at[j].gain = floor(1 + c->range * uniform()), at[j].cost = at[j].gain + (j & 1 ? 10 : 0);
                    break;
            }
            if (at[j].gain > most) most = at[j].gain;
            if (at[j].gain < least) least = at[j].gain;
        }
        {
            double share = c->range > 0 || c->kind == REAL_SUBSET ? 0.5 * (least + most) : 0.75 * most;
            target[g[i].stage] += c->coupled ? 0.75 * share : share;
            all += share;
        }
    }
    p.n_groups = c->groups, p.groups = g, p.n_stages = c->stages, p.stage_target = target,
    p.total_target = c->coupled ? all : 0;
    if (c->range > 0)
        for (i = 0; i < c->stages; i++) target[i] = floor(target[i]);
    return p;
}

static void discard(snip_ilp_problem *p) {
    free((void *)p->groups[0].options);
    free((void *)p->groups);
    free((void *)p->stage_target);
}

static void dump(const snip_ilp_problem *p) {
    int i, j;
    printf("mckp 1 %d %d %.17g\n", p->n_groups, p->n_stages, p->total_target);
    for (i = 0; i < p->n_stages; i++) printf("%.17g\n", p->stage_target[i]);
    for (i = 0; i < p->n_groups; i++) {
        printf("%d %d", p->groups[i].stage, p->groups[i].n_options);
        for (j = 0; j < p->groups[i].n_options; j++)
            printf(" %.17g %.17g", p->groups[i].options[j].cost, p->groups[i].options[j].gain);
        printf("\n");
    }
}

static int compare(const void *a, const void *b) {
    return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}

int main(int argc, char **argv) {
    const char *only = "", *exact = NULL, *dumped = NULL;
    snip_ilp_params params = { 0, 0, 0 };
    int i, r, repeat = 0, hard = 0;
    uint64_t seed = 1;
    for (i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--case"))
            only = value, i++;
        else if (!strcmp(argv[i], "--exact"))
            exact = value, i++;
        else if (!strcmp(argv[i], "--time-limit"))
            params.time_limit = atof(value), i++;
        else if (!strcmp(argv[i], "--repeat"))
            repeat = atoi(value), i++;
        else if (!strcmp(argv[i], "--seed"))
            seed = (uint64_t)strtoull(value, NULL, 10), i++;
        else if (!strcmp(argv[i], "--hard"))
            hard = 1;
        else if (!strcmp(argv[i], "--dump"))
            dumped = value, i++;
        else {
            int help = !strcmp(argv[i], "-h") || !strcmp(argv[i], "--help");
            if (!help) fprintf(stderr, "bench_ilp: unknown option %s\n", argv[i]);
            fprintf(
                help ? stdout : stderr,
                "bench_ilp [--case SUBSTRING | --exact CASE] [--time-limit S] [--repeat N] [--seed N] [--hard] [--dump CASE]\n");
            return help ? 0 : 2;
        }
    }
    for (i = 0; i < CASES; i++) {
        const bench_case *c = &cases[i];
        static const char *const names[] = { "optimal", "feasible", "infeasible", "bad_argument", "out_of_memory" };
        snip_ilp_problem p;
        snip_ilp_result result = { 0, 0, 0, 0, 0 };
        snip_ilp_status status = SNIP_ILP_OPTIMAL;
        double *ms;
        int *choice, runs = repeat ? repeat : c->repeat;
        if (dumped || exact ? strcmp(dumped ? dumped : exact, c->name) != 0
                            : !strstr(c->name, only) || (c->hard && !hard && !*only))
            continue;
        p = make(c, seed);
        if (dumped) {
            dump(&p);
            discard(&p);
            return 0;
        }
        ms = (double *)calloc((size_t)runs, sizeof *ms);
        choice = (int *)calloc((size_t)c->groups, sizeof *choice);
        peak = 0;
        for (r = 0; r < runs; r++) {
            status = snip_ilp_solve(&p, &params, choice, &result);
            ms[r] = 1e3 * result.seconds;
        }
        qsort(ms, (size_t)runs, sizeof *ms, compare);
        printf("bench\tilp_%s\t%.4f\tms\t-\t-\t-\t%s\tgap=%.3g\tnodes=%lld\tpeak_kib=%.0f\tcost=%.12g\n", c->name,
               ms[runs / 2], names[status], (result.cost - result.bound) / (result.cost > 0 ? result.cost : 1),
               (long long)result.nodes, (double)peak / 1024, result.cost);
        fflush(stdout);
        free(ms);
        free(choice);
        discard(&p);
    }
    return 0;
}
