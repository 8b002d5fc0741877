/* snip_ilp.h - an exact solver for the multiple-choice knapsack with covering targets. One file, C99 or C++11, needs libc and libm only.

   #define SNIP_ILP_IMPLEMENTATION   in one source file before including it; include it plainly elsewhere.
*/
#ifndef SNIP_ILP_H
#define SNIP_ILP_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// >>api

typedef struct { double cost, gain; } snip_ilp_option;            // cost >= 0 is minimised; gain >= 0 counts toward the targets
typedef struct { const snip_ilp_option *options; int n_options; int stage; } snip_ilp_group;   // exactly one option is chosen
typedef struct {
    int n_groups;
    const snip_ilp_group *groups;
    int n_stages;
    const double *stage_target;   // sum of gains in stage s >= stage_target[s]; NULL: none; <= 0: none for that stage
    double total_target;          // sum of all gains >= this; <= 0: none
} snip_ilp_problem;

typedef struct {
    double time_limit;            // seconds; 0: none
    double rel_gap;               // stop when cost - bound <= rel_gap * (cost above the sum of the cheapest options); 0: prove optimality
    size_t max_memory;            // bytes; 0: 512 MiB
} snip_ilp_params;

typedef struct { double cost, bound, gain, seconds; int64_t nodes; } snip_ilp_result;

typedef enum {
    SNIP_ILP_OPTIMAL = 0,         // proven to within 1e-12 of the cost above the sum of the cheapest options
    SNIP_ILP_FEASIBLE,            // stopped early: the optimum lies between bound and cost
    SNIP_ILP_INFEASIBLE,          // some target cannot be met: snip_ilp_shortfall() says which
    SNIP_ILP_BAD_ARGUMENT,        // nothing was written
    SNIP_ILP_OUT_OF_MEMORY
} snip_ilp_status;

// Chooses one option per group: choice[i] in 0 .. n_options-1. params and result may be NULL.
snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params, int *choice, snip_ilp_result *result);

// The first target that no choice can meet: s for stage_target[s], n_stages for total_target, -1 when all can be met,
// -2 for a bad argument. *shortfall (may be NULL) is what the largest gains lack of that target, 0 when all can be met.
int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall);

#ifdef __cplusplus
}
#endif
#endif // SNIP_ILP_H

/* ------------------------------------------------ stop reading here: the rest is the implementation ------------------------------------------------ */

#if (defined(SNIP_ILP_IMPLEMENTATION) || defined(SNIP_IMPLEMENTATION)) && !defined(SNIPI_ILP_IMPLEMENTED)
#define SNIPI_ILP_IMPLEMENTED
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifndef SNIP_ILP_MALLOC
#define SNIP_ILP_MALLOC(size) malloc(size)
#define SNIP_ILP_FREE(pointer) free(pointer)
#endif
#ifdef __cplusplus
extern "C" {
#endif

// >>run: what one call carries around: its memory, its clock, its tolerances

#define SNIPI_ILP_TOLERANCE 1e-12             // of a target, relative to the sum of the largest gains
#define SNIPI_ILP_PROOF 5e-13                 // of the optimum; the contract promises 1e-12
#define SNIPI_ILP_HUGE (DBL_MAX / 4)          // stands for infinity, which -Ofast does not have

typedef struct {
    size_t used, limit;                       // bytes
    double start, deadline;                   // seconds; deadline <= 0: none
    double rel_gap;
    double cost_step;                         // every cost is a multiple of this, or 0
    int64_t nodes;
    int late;
} snipi_ilp_run;

// Wall clock where the language mode shows one; clock() counts all threads of the process, so a limit may then come early.
static double snipi_ilp_clock(void) {
#if defined(SNIP_ILP_CLOCK)
    return SNIP_ILP_CLOCK();
#elif defined(CLOCK_MONOTONIC)
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#elif defined(TIME_UTC)
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

static int snipi_ilp_late(snipi_ilp_run *run) {
    if (!run->late && run->deadline > 0 && snipi_ilp_clock() >= run->deadline) run->late = 1;
    return run->late;
}

// Every block carries its size in front, so that the cap is on all memory and not on one array.
static void *snipi_ilp_take(snipi_ilp_run *run, size_t count, size_t size) {
    const size_t header = 16;
    size_t bytes;
    char *block;
    if (count > (SIZE_MAX - header) / size) return NULL;
    bytes = count * size + header;
    if (bytes > run->limit - run->used) return NULL;
    block = (char *)SNIP_ILP_MALLOC(bytes);
    if (!block) return NULL;
    memcpy(block, &bytes, sizeof bytes);
    run->used += bytes;
    return block + header;
}

static void snipi_ilp_give(snipi_ilp_run *run, void *pointer) {
    const size_t header = 16;
    size_t bytes;
    if (!pointer) return;
    memcpy(&bytes, (char *)pointer - header, sizeof bytes);
    run->used -= bytes;
    SNIP_ILP_FREE((char *)pointer - header);
}

// Sum with its rounding error carried along. volatile keeps -Ofast from simplifying the error to zero.
typedef struct { double high, low; } snipi_ilp_sum;

static void snipi_ilp_add(snipi_ilp_sum *sum, double x) {
    volatile double total = sum->high + x;
    volatile double part = total - sum->high;
    volatile double rest = total - part;
    volatile double lost = sum->high - rest;
    volatile double kept = x - part;
    sum->low += lost + kept;
    sum->high = total;
}
static double snipi_ilp_total(const snipi_ilp_sum *sum) { return sum->high + sum->low; }

// >>check: arguments, and whether the largest gains meet the targets; needs no memory

static int snipi_ilp_finite(double x) {       // by bits: -Ofast assumes that there is nothing else
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ((bits >> 52) & 0x7ff) != 0x7ff;
}
static int snipi_ilp_valid(double x) { return snipi_ilp_finite(x) && x >= 0; }

static int snipi_ilp_problem_ok(const snip_ilp_problem *p) {
    int i, j, stages;
    if (!p || p->n_groups < 0 || p->n_stages < 0 || (p->n_groups > 0 && !p->groups) || !snipi_ilp_finite(p->total_target)) return 0;
    stages = p->n_stages > 1 ? p->n_stages : 1;
    if (p->stage_target)
        for (i = 0; i < p->n_stages; i++)
            if (!snipi_ilp_finite(p->stage_target[i])) return 0;
    for (i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *g = &p->groups[i];
        if (!g->options || g->n_options < 1 || g->stage < 0 || g->stage >= stages) return 0;
        for (j = 0; j < g->n_options; j++)
            if (!snipi_ilp_valid(g->options[j].cost) || !snipi_ilp_valid(g->options[j].gain)) return 0;
    }
    return 1;
}

static int snipi_ilp_largest(const snip_ilp_group *g) {        // the largest gain, the cheapest of equals
    int j, best = 0;
    for (j = 1; j < g->n_options; j++)
        if (g->options[j].gain > g->options[best].gain ||
            (g->options[j].gain >= g->options[best].gain && g->options[j].cost < g->options[best].cost)) best = j;
    return best;
}

static double snipi_ilp_stage_target(const snip_ilp_problem *p, int stage) {
    return p->stage_target && stage < p->n_stages && p->stage_target[stage] > 0 ? p->stage_target[stage] : 0;
}

// As snip_ilp_shortfall(). Stages are summed a chunk at a time, so that their sums fit on the stack.
static int snipi_ilp_unreachable(const snip_ilp_problem *p, double *shortfall) {
    enum { CHUNK = 128 };
    snipi_ilp_sum sum[CHUNK], all = {0, 0};
    double scale = 1, most = 0, lack;
    int i, s, first, stages = p->n_stages > 1 ? p->n_stages : 1;
    *shortfall = 0;
    for (i = 0; i < p->n_groups; i++) {
        double gain = p->groups[i].options[snipi_ilp_largest(&p->groups[i])].gain;
        if (gain > most) most = gain;
    }
    if (most > 1e280) scale = 1.0 / 18446744073709551616.0;    // 2^-64: sums of 2^31 such gains stay finite
    for (first = 0; first < stages; first += CHUNK) {
        int last = stages - first > CHUNK ? first + CHUNK : stages;
        memset(sum, 0, sizeof sum);
        for (i = 0; i < p->n_groups; i++) {
            const snip_ilp_group *g = &p->groups[i];
            if (g->stage < first || g->stage >= last) continue;
            snipi_ilp_add(&sum[g->stage - first], g->options[snipi_ilp_largest(g)].gain * scale);
        }
        for (s = first; s < last; s++) {
            double reach = snipi_ilp_total(&sum[s - first]);
            snipi_ilp_add(&all, reach);
            lack = snipi_ilp_stage_target(p, s) * scale - reach;
            if (lack > SNIPI_ILP_TOLERANCE * reach) { *shortfall = lack / scale; return s; }
        }
    }
    lack = p->total_target * scale - snipi_ilp_total(&all);
    if (lack > SNIPI_ILP_TOLERANCE * snipi_ilp_total(&all)) { *shortfall = lack / scale; return p->n_stages; }
    return -1;
}

// >>numbers: gains become integers, so that sums of gains are exact and equal sums compare equal

typedef struct {
    double unit;      // gain = unit * integer, to within the rounding below
    int exponent;     // unit = 2^-exponent when no lattice was found
    int lattice;
    double most;      // sum of the groups' largest gains
    double rounding;  // worst sum of rounding errors of any choice
} snipi_ilp_scale;

static double snipi_ilp_value(const snip_ilp_option *o, int of_cost) { return of_cost ? o->cost : o->gain; }

// Euclid's algorithm on rounded numbers over all values of the listed groups; 0 when they have no common unit. The unit is snapped to
// a fraction of the largest value at every step, which keeps it from drifting.
static double snipi_ilp_common_unit(const snip_ilp_problem *p, const int *list, int n, int of_cost, double largest) {
    double unit = largest;
    int i, j;
    for (i = 0; i < n; i++) {
        const snip_ilp_group *g = &p->groups[list[i]];
        for (j = 0; j < g->n_options; j++) {
            double x = snipi_ilp_value(&g->options[j], of_cost), a, b, q;
            if (!(x > 0)) continue;
            q = x / unit;
            if (fabs(q - floor(q + 0.5)) <= 1e-9 * (q > 1 ? q : 1)) continue;
            a = x > unit ? x : unit;
            b = x > unit ? unit : x;
            while (b > largest * 1e-8) {
                double r = fabs(a - floor(a / b + 0.5) * b);
                a = b;
                b = r;
            }
            if (a < largest * 1e-7) return 0;
            unit = largest / floor(largest / a + 0.5);
        }
    }
    return unit;
}

// The largest sum of distances to the lattice that a choice can have, in units.
static double snipi_ilp_lattice_error(const snip_ilp_problem *p, const int *list, int n, int of_cost, double unit) {
    double sum = 0;
    int i, j;
    for (i = 0; i < n; i++) {
        const snip_ilp_group *g = &p->groups[list[i]];
        double worst = 0;
        for (j = 0; j < g->n_options; j++) {
            double q = snipi_ilp_value(&g->options[j], of_cost) / unit, r = fabs(q - floor(q + 0.5));
            if (r > worst) worst = r;
        }
        sum += worst;
    }
    return sum;
}

static void snipi_ilp_largest_of(const snip_ilp_problem *p, const int *list, int n, int of_cost, double *largest, double *sum) {
    int i, j;
    *largest = *sum = 0;
    for (i = 0; i < n; i++) {
        const snip_ilp_group *g = &p->groups[list[i]];
        double most = 0;
        for (j = 0; j < g->n_options; j++) {
            double x = snipi_ilp_value(&g->options[j], of_cost);
            if (x > most) most = x;
        }
        if (most > *largest) *largest = most;
        *sum += most * 0x1p-40;               // of gains up to DBL_MAX, too
    }
}

#endif
