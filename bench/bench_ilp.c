// Times snip_ilp.h on families of problems.
//
//   bench_ilp [--case SUBSTRING | --exact CASE] [--time-limit S] [--repeat N] [--seed N] [--hard]
//   bench_ilp --dump CASE       writes the problem as text, for other solvers (bench_ilp.py drives them)
//
// Text: "mckp 1 groups stages total", the stage targets, then per group: stage, options, and the (cost, gain) pairs.
// Lines: bench, case, ours (ms), unit, peer_name, peer, ratio; then, of ours: status, relative gap, nodes, peak KiB.
#define _DEFAULT_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "stats.h"

// >>memory -----------------------------------------------------------------------------------------
static size_t live, peak;  // bytes that the solver holds, and the most so far

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

// >>problems ---------------------------------------------------------------------------------------
static uint64_t rng_state;

static uint64_t rng(void) {  // splitmix64
    uint64_t z = rng_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double uniform(void) { return (double)(rng() >> 11) * (1.0 / 9007199254740992.0); }

static double normal(void) { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }

typedef enum {
    SNIP,          // a model's layers, by FLOPs
    MEASURED,      // the same by measured times
    UNCORRELATED,  // these and those below: Pisinger 1995
    WEAK,
    STRONG,
    SUBSET,
    REAL_SUBSET,
    ZIG
} family;

typedef struct {
    const char *name;
    family kind;
    int groups, options, stages, coupled;
    double range;  // of the integer families
    int hard, repeat;
} bench_case;

// clang-format off
static const bench_case cases[] = {
    // name                    family        groups  opts stages coupled range hard repeat
    { "snip_560x2",              SNIP,            560,   2,  1, 0,    0, 0, 101 },
    { "snip_560x8",              SNIP,            560,   8,  1, 0,    0, 0, 101 },
    { "snip_560x8_8stages",      SNIP,            560,   8,  8, 0,    0, 0, 101 },
    { "snip_560x27_8stages",     SNIP,            560,  27,  8, 0,    0, 0,  51 },
    { "measured_560x8",          MEASURED,        560,   8,  1, 0,    0, 0,  51 },
    { "measured_560x27_8stages", MEASURED,        560,  27,  8, 0,    0, 0,  51 },
    { "coupled_snip_560x8",      SNIP,            560,   8,  8, 1,    0, 0,  51 },
    { "coupled_measured_560x8",  MEASURED,        560,   8,  8, 1,    0, 0,  51 },
    { "coupled_measured_560x27", MEASURED,        560,  27,  8, 1,    0, 0,  51 },
    { "snip_100000x8",           SNIP,         100000,   8,  1, 0,    0, 0,   7 },
    { "measured_100000x8",       MEASURED,     100000,   8,  8, 0,    0, 0,   7 },
    { "uncorrelated_1000x10",    UNCORRELATED,   1000,  10,  1, 0, 1000, 0,  21 },
    { "weak_1000x10",            WEAK,           1000,  10,  1, 0, 1000, 0,  21 },
    { "weak_1000x10_1e6",        WEAK,           1000,  10,  1, 0,  1e6, 0,  11 },
    { "strong_100x10",           STRONG,          100,  10,  1, 0, 1000, 0,  11 },
    { "strong_1000x10",          STRONG,         1000,  10,  1, 0, 1000, 0,   5 },
    { "subset_1000x10",          SUBSET,         1000,  10,  1, 0, 1000, 0,  11 },
    { "zig_1000x10",             ZIG,            1000,  10,  1, 0, 1000, 0,  11 },
    { "strong_10000x10",         STRONG,        10000,  10,  1, 0, 1000, 1,   1 },
    { "strong_1000x10_1e6",      STRONG,         1000,  10,  1, 0,  1e6, 1,   1 },
    { "weak_10000x10_1e6",       WEAK,          10000,  10,  1, 0,  1e6, 1,   1 },
    { "real_subset_40x4",        REAL_SUBSET,      40,   4,  1, 0,    0, 1,   1 },
    { "real_subset_560x8",       REAL_SUBSET,     560,   8,  1, 0,    0, 1,   1 },
};

// clang-format on

enum { CASES = sizeof cases / sizeof cases[0] };

// What one group's options are made from.
typedef struct {
    double size, worth;  // FLOPs, and harm of one GEMM in FP8
    double jitter[9];
} layer;

static layer make_layer(const bench_case *c, int i) {
    static const double shape[4] = { 1.0, 1.0, 2.6875, 2.6875 };  // q, o and up, down of a Llama block
    layer l;
    l.size = c->range > 0 ? 0 : exp(normal());
    l.worth = 1e-4 * exp(1.5 * normal());
    if (c->kind == SNIP) l.size = shape[i & 3];
    for (int j = 0; j < 9; j++) l.jitter[j] = exp(0.15 * normal());
    return l;
}

// Three GEMMs of a layer, each in BF16, FP8 or FP4 (27 options), or in FP8 or FP4 (8), or all of one (2).
static snip_ilp_option make_precision(const bench_case *c, const layer *l, int j) {
    static const double hurt_of_3[3] = { 0, 1, 30 }, save_of_3[3] = { 0, 0.5, 0.75 };
    static const double hurt_of_2[2] = { 1, 30 }, save_of_2[2] = { 0, 1 };
    const int three = c->options == 27;
    const double *hurt = three ? hurt_of_3 : hurt_of_2, *save = three ? save_of_3 : save_of_2, *jitter = l->jitter;
    int f = j & 1, d = f, w = f;  // of fwd, dgrad, wgrad
    if (three) {
        f = j % 3;
        d = j / 3 % 3;
        w = j / 9;
    } else if (c->options == 8) {
        d = j >> 1 & 1;
        w = j >> 2 & 1;
    }
    snip_ilp_option o;
    o.cost = l->worth * (hurt[f] * jitter[0] + hurt[d] * jitter[1] + hurt[w] * jitter[2]);
    o.gain = l->size * (save[f] + save[d] + save[w]);
    if (c->kind == MEASURED) {
        o.gain = l->size * (save[f] * jitter[3] + save[d] * jitter[4] + save[w] * jitter[5]) * (1 + 0.01 * normal());
        o.cost *= exp(0.05 * normal());
        if (o.gain < 0) o.gain = 0;
    }
    return o;
}

// before: the option before, or zeros.
static snip_ilp_option make_number(const bench_case *c, int j, snip_ilp_option before) {
    snip_ilp_option o;
    if (c->kind == REAL_SUBSET) {
        o.gain = o.cost = uniform();
        return o;
    }
    o.gain = o.cost = floor(1 + c->range * uniform());
    switch (c->kind) {
        case UNCORRELATED: o.cost = floor(1 + c->range * uniform()); break;
        case WEAK:
            o.cost = o.gain + floor(c->range / 5 * uniform() - c->range / 10);
            if (o.cost < 1) o.cost = 1;
            break;
        case STRONG:  // sums of numbers with value 10 more, sorted
            o.cost += before.cost + 10;
            o.gain += before.gain;
            break;
        case ZIG: o.cost = o.gain + (j & 1 ? 10 : 0); break;
        default: break;
    }
    return o;
}

static snip_ilp_problem make(const bench_case *c, uint64_t seed) {
    const snip_ilp_option none = { 0, 0 };
    snip_ilp_group *groups = (snip_ilp_group *)calloc((size_t)c->groups, sizeof *groups);
    snip_ilp_option *at = (snip_ilp_option *)calloc((size_t)c->groups * (size_t)c->options, sizeof *at);
    double *target = (double *)calloc((size_t)c->stages, sizeof *target), all = 0;
    rng_state = seed;
    for (int i = 0; i < c->groups; i++, at += c->options) {
        double most = 0, least = 1e300;
        const layer l = make_layer(c, i);
        groups[i].options = at;
        groups[i].n_options = c->options;
        groups[i].stage = (int)((int64_t)i * c->stages / c->groups);
        for (int j = 0; j < c->options; j++) {
            at[j] = c->kind <= MEASURED ? make_precision(c, &l, j) : make_number(c, j, j ? at[j - 1] : none);
            most = fmax(most, at[j].gain);
            least = fmin(least, at[j].gain);
        }
        double share = c->kind > MEASURED ? 0.5 * (least + most) : 0.75 * most;
        target[groups[i].stage] += c->coupled ? 0.75 * share : share;
        all += share;
    }
    for (int i = 0; i < c->stages && c->range > 0; i++) target[i] = floor(target[i]);
    snip_ilp_problem p = { c->groups, groups, c->stages, target, c->coupled ? all : 0 };
    return p;
}

static void discard(snip_ilp_problem *p) {
    free((void *)p->groups[0].options);
    free((void *)p->groups);
    free((void *)p->stage_target);
}

static void dump(const snip_ilp_problem *p) {
    printf("mckp 1 %d %d %.17g\n", p->n_groups, p->n_stages, p->total_target);
    for (int i = 0; i < p->n_stages; i++) printf("%.17g\n", p->stage_target[i]);
    for (int i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *group = &p->groups[i];
        printf("%d %d", group->stage, group->n_options);
        for (int j = 0; j < group->n_options; j++)
            printf(" %.17g %.17g", group->options[j].cost, group->options[j].gain);
        printf("\n");
    }
}

// >>main -------------------------------------------------------------------------------------------
typedef struct {
    const char *part, *exact, *dumped;  // of a case's name; NULL: not given
    snip_ilp_params params;
    int repeat, hard;
    uint64_t seed;
} request;

static int wanted(const request *r, const bench_case *c) {
    if (r->dumped) return !strcmp(r->dumped, c->name);
    if (r->exact) return !strcmp(r->exact, c->name);
    if (r->part) return strstr(c->name, r->part) != NULL;
    return !c->hard || r->hard;
}

static void bench(const request *asked, const bench_case *c) {
    static const char *const names[] = { "optimal", "feasible", "infeasible", "bad_argument", "out_of_memory" };
    const int runs = asked->repeat ? asked->repeat : c->repeat;
    snip_ilp_problem p = make(c, asked->seed);
    snip_ilp_result result = { 0, 0, 0, 0, 0 };
    snip_ilp_status status = SNIP_ILP_OPTIMAL;
    double *ms = (double *)calloc((size_t)runs, sizeof *ms);
    int *choice = (int *)calloc((size_t)c->groups, sizeof *choice);
    peak = 0;
    for (int i = 0; i < runs; i++) {
        status = snip_ilp_solve(&p, &asked->params, choice, &result);
        ms[i] = 1e3 * result.seconds;
    }
    printf("bench\tilp_%s\t%.4f\tms\t-\t-\t-\t%s\tgap=%.3g\tnodes=%lld\tpeak_kib=%.0f\tcost=%.12g\n", c->name,
           stats_median(ms, runs), names[status], (result.cost - result.bound) / (result.cost > 0 ? result.cost : 1),
           (long long)result.nodes, (double)peak / 1024, result.cost);
    fflush(stdout);
    free(ms);
    free(choice);
    discard(&p);
}

static void usage(FILE *f) {
    fputs(
        "bench_ilp [--case SUBSTRING | --exact CASE] [--time-limit S] [--repeat N] [--seed N] [--hard] [--dump CASE]\n",
        f);
}

static request read_request(int argc, char **argv) {
    request r = {
        NULL, NULL, NULL, {0, 0, 0},
           0, 0, 1
    };
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "-h") || !strcmp(name, "--help")) {
            usage(stdout);
            exit(0);
        }
        if (!strcmp(name, "--hard")) {
            r.hard = 1;
            continue;
        }
        i++;
        if (!strcmp(name, "--case"))
            r.part = value;
        else if (!strcmp(name, "--exact"))
            r.exact = value;
        else if (!strcmp(name, "--time-limit"))
            r.params.time_limit = atof(value);
        else if (!strcmp(name, "--repeat"))
            r.repeat = atoi(value);
        else if (!strcmp(name, "--seed"))
            r.seed = (uint64_t)strtoull(value, NULL, 10);
        else if (!strcmp(name, "--dump"))
            r.dumped = value;
        else {
            fprintf(stderr, "bench_ilp: unknown option %s\n", name);
            usage(stderr);
            exit(2);
        }
    }
    return r;
}

int main(int argc, char **argv) {
    const request asked = read_request(argc, argv);
    for (int i = 0; i < CASES; i++) {
        if (!wanted(&asked, &cases[i])) continue;
        if (!asked.dumped) {
            bench(&asked, &cases[i]);
            continue;
        }
        snip_ilp_problem p = make(&cases[i], asked.seed);
        dump(&p);
        discard(&p);
        break;
    }
    return 0;
}
