// snip_ilp.h - exact solver for the multiple-choice knapsack problem with covering targets.
// MIT licence (see LICENSE). C99 and later, C++11 and later; libc and libm only. Stands alone.
//
// WHAT IT IS
//   Group i has options j, each with a cost c_ij >= 0 and a gain g_ij >= 0. Choose one option x_i of every group:
//
//     minimise   sum over i of c_i,x_i
//     such that  sum over the groups i of stage s of g_i,x_i >= stage_target[s]     for every stage s
//                sum over all groups i            of g_i,x_i >= total_target
//
//   In snip a group is a linear layer, an option is a precision for each of its GEMMs, the cost is the harm that it
//   is expected to do, the gain is the work or time that it saves, and a stage is a pipeline stage.
//
// QUICK START
//   In ONE source file:            #define SNIP_ILP_IMPLEMENTATION      (SNIP_IMPLEMENTATION does it too)
//                                  #include "snip_ilp.h"
//   Elsewhere:                     #include "snip_ilp.h"
//   Link with -lm.
//
//     snip_ilp_option q[2] = { { 0.0, 0.0 }, { 0.3, 1.0 } }, k[2] = { { 0.0, 0.0 }, { 0.1, 1.0 } };
//     snip_ilp_group groups[2] = { { q, 2, 0 }, { k, 2, 0 } };
//     snip_ilp_problem problem = { 2, groups, 0, NULL, 1.0 };     // a total gain of at least 1
//     int choice[2];
//     if (snip_ilp_solve(&problem, NULL, choice, NULL) == SNIP_ILP_OPTIMAL) ...    // choice is { 0, 1 }
//
// WHEN IS A TARGET MET
//   When it is missed by no more than 1e-12 of the sum of its groups' largest gains.
//
// WHAT IS FAST AND WHAT IS HARD
//   Fast: costs and gains that are not tied to one another. 560 groups of 2 to 27 options take about a millisecond,
//   with or without stages and a total; 100,000 groups of 8 options take a tenth of a second.
//   Hard (the problem is NP-hard): cost = gain + constant with large integers or with 10,000 groups, and cost = gain
//   in real numbers (subset sum). There the search ends at the memory limit, after seconds. The answer is FEASIBLE,
//   with a gap of 1e-7 to 1e-10 of the cost. Set time_limit.
//   Reading the problem, its LP bound and a first choice take linear time and are always completed. After that the
//   time limit is looked at every few thousand states.
//
// DETERMINISM
//   The same input gives the same choice, on one machine and compiler, unless a time limit strikes.
//   Thread-safe: there are no globals. There is no recursion, and no stack frame is above 4 KiB.
//
// MEMORY
//   Never exceeds max_memory, and all of it is freed before the call returns. When it runs out, the best choice found
//   so far is returned; if none has been found yet, the options of largest gain, which meet every target that can be
//   met.
//
// VERY SMALL NUMBERS
//   Costs below 1e-300 of the largest count as zero. Gains and targets below 2.3e-308, the least normal double, may be
//   taken for one another.
//
// CONFIGURATION (define before the implementation)
//   SNIP_ILP_STATIC        all functions static to the including file; SNIP_STATIC does it too
//   SNIP_ILP_MALLOC(size), SNIP_ILP_FREE(pointer)      define both, or neither
//   SNIP_ILP_CLOCK()       seconds as a double, from any start. Default: CLOCK_MONOTONIC, or C11's timespec_get, where
//                          the language mode declares them; else clock(), which adds up all threads of the process, so
//                          that time limits strike early
//
// INDEX (search for the tag)
//   API:             >>ilp-api
//   Implementation:  >>ilp-run >>ilp-check >>ilp-numbers >>ilp-knapsack >>ilp-lp >>ilp-greedy >>ilp-core >>ilp-curve
//                    >>ilp-states >>ilp-single >>ilp-join >>ilp-solve
#ifndef SNIP_ILP_H
#define SNIP_ILP_H

#include <stddef.h>
#include <stdint.h>

#define SNIP_ILP_VERSION 200  // 0.2.0: 10000 * major + 100 * minor + patch

#if (defined(SNIP_STATIC) || defined(SNIP_ILP_STATIC)) && (defined(__GNUC__) || defined(__clang__))
#    define SNIP_ILP_API static __attribute__((unused))
#elif defined(SNIP_STATIC) || defined(SNIP_ILP_STATIC)
#    define SNIP_ILP_API static
#else
#    define SNIP_ILP_API extern
#endif

#ifdef __cplusplus
extern "C" {
#endif

// >>ilp-api ----------------------------------------------------------------------------------------
typedef struct {
    double cost;  // >= 0; minimised
    double gain;  // >= 0; counts toward the targets
} snip_ilp_option;

// Exactly one option of a group is chosen.
typedef struct {
    const snip_ilp_option *options;  // [n_options]
    int n_options;                   // at least 1
    int stage;                       // 0 .. n_stages - 1
} snip_ilp_group;

// The solver only reads these arrays. Targets of 0 or less ask for nothing.
typedef struct {
    int n_groups;
    const snip_ilp_group *groups;  // [n_groups]
    int n_stages;                  // 0 is the same as 1: every group then has stage 0
    const double *stage_target;    // [n_stages] least sum of gains in each stage; NULL: no stage has a target
    double total_target;           // least sum of all gains
} snip_ilp_problem;

// Zeroes are the defaults.
typedef struct {
    double time_limit;  // seconds; 0: none
    double rel_gap;     // stop when cost - bound <= rel_gap * (cost - sum of the cheapest options); 0: prove optimality
    size_t max_memory;  // bytes; 0: 512 MiB
} snip_ilp_params;

typedef struct {
    double cost;     // of the choice
    double bound;    // no choice that meets the targets costs less
    double gain;     // of the choice, over all groups
    double seconds;  // that the call took
    int64_t nodes;   // states that the search has looked at
} snip_ilp_result;

typedef enum {
    SNIP_ILP_OPTIMAL = 0,   // proven to within 1e-12 of the cost above the sum of the cheapest options
    SNIP_ILP_FEASIBLE,      // stopped early; the least cost lies between bound and cost
    SNIP_ILP_INFEASIBLE,    // a target cannot be met (snip_ilp_shortfall says which); choice is untouched, and the
                            // result is zero but for seconds
    SNIP_ILP_BAD_ARGUMENT,  // NaN, infinity, a negative number, a group without options, a stage out of range, a NULL
                            // pointer; nothing is written
    SNIP_ILP_OUT_OF_MEMORY  // never returned at present: the last resort needs no memory, and is FEASIBLE
} snip_ilp_status;

// Chooses an option of every group: choice[i] is 0 .. n_options - 1 of group i.
// params NULL: the defaults. result NULL: not wanted. choice may be NULL where there are no groups.
SNIP_ILP_API snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params,
                                            int *choice /* [n_groups] */, snip_ilp_result *result);

// Says which target no choice can meet: the first such stage, or n_stages if it is the total. Returns -1 if every
// target can be met, to within its tolerance, and -2 for a bad argument. *shortfall becomes the target minus the sum
// of the largest gains, or 0 if every target can be met; it may be NULL, and is untouched by a bad argument.
// Takes linear time and no memory.
SNIP_ILP_API int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall);

#ifdef __cplusplus
}
#endif
#endif  // SNIP_ILP_H

// ================= END OF THE API. You need not read further to use the library. =====================
#if (defined(SNIP_ILP_IMPLEMENTATION) || defined(SNIP_IMPLEMENTATION)) && !defined(SNIPI_ILP_IMPLEMENTED)
#define SNIPI_ILP_IMPLEMENTED

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef SNIP_ILP_MALLOC
#    define SNIP_ILP_MALLOC(size) malloc(size)
#    define SNIP_ILP_FREE(pointer) free(pointer)
#endif

// HOW IT WORKS
//   Gains become integers (>>ilp-numbers). Without a total over stages each stage is a knapsack of its own.
//   Its linear relaxation gives a bound and a multiplier theta, the price of a unit of gain (>>ilp-lp), and rounding it
//   up gives a first choice (>>ilp-greedy). Most groups keep the LP's item in every choice that is better: only the few
//   whose other items are nearly as good at that price, the core, need a search (>>ilp-core). It goes through them one
//   by one and keeps a list of undominated partial choices (>>ilp-states), pruned by the LP bound of the groups that
//   are still open (>>ilp-curve), for guesses of the gap that widen until the guess is proven (>>ilp-single).
//   A total over stages is relaxed with a multiplier of its own, and the stages' lists are joined (>>ilp-join).

// >>ilp-run ----------------------------------------------------------------------------------------
// What a call carries along: memory, clock, tolerances.
#define SNIPI_ILP_TOLERANCE 1e-12     // of a target, relative to the sum of the largest gains
#define SNIPI_ILP_PROOF 5e-13         // of the optimum: half of what is promised, the rest is for rounding
#define SNIPI_ILP_HUGE (DBL_MAX / 4)  // stands for infinity, which -Ofast does not know
#define SNIPI_ILP_DEFAULT_MEMORY ((size_t)512 << 20)  // bytes

typedef struct snipi_ilp_block {
    struct snipi_ilp_block *older;
    size_t bytes;
} snipi_ilp_block;

typedef struct {
    snipi_ilp_block *newest;  // of a chain of all blocks, so that whole stretches of work can be freed at once
    size_t used_bytes, max_bytes;
    double start, deadline;  // seconds; deadline 0: none
    double rel_gap;          // as in snip_ilp_params
    double cost_step;        // different costs differ by at least this; 0: not known
    int64_t nodes;
    int late;
} snipi_ilp_run;

static double snipi_ilp_clock(void) {
#if defined(SNIP_ILP_CLOCK)
    return SNIP_ILP_CLOCK();
#elif defined(CLOCK_MONOTONIC) || defined(TIME_UTC)
    struct timespec t;
#    if defined(CLOCK_MONOTONIC)
    clock_gettime(CLOCK_MONOTONIC, &t);
#    else
    timespec_get(&t, TIME_UTC);
#    endif
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

// Never below 0: -Ofast may round the two readings apart.
static double snipi_ilp_seconds(const snipi_ilp_run *run) {
    const double seconds = snipi_ilp_clock() - run->start;
    return seconds > 0 ? seconds : 0;
}

static int snipi_ilp_late(snipi_ilp_run *run) {
    run->late = run->late || (run->deadline > 0 && snipi_ilp_clock() >= run->deadline);
    return run->late;
}

// NULL when the limit or the heap is exhausted.
static void *snipi_ilp_alloc(snipi_ilp_run *run, size_t count, size_t size) {
    const size_t header = sizeof(snipi_ilp_block);
    if (count > (SIZE_MAX - header) / size || count * size + header > run->max_bytes - run->used_bytes) return NULL;

    const size_t bytes = count * size + header;
    snipi_ilp_block *block = (snipi_ilp_block *)SNIP_ILP_MALLOC(bytes);
    if (!block) return NULL;
    block->bytes = bytes;
    block->older = run->newest;
    run->newest = block;
    run->used_bytes += bytes;
    return block + 1;
}

#define SNIPI_ILP_ALLOC(run, type, count) ((type *)snipi_ilp_alloc(run, (size_t)(count), sizeof(type)))

// The block is looked for from the newest on: what is freed by itself is among the newest.
static void snipi_ilp_free(snipi_ilp_run *run, void *pointer) {
    snipi_ilp_block *block = (snipi_ilp_block *)pointer - 1, **link = &run->newest;
    while (*link != block) link = &(*link)->older;
    *link = block->older;
    run->used_bytes -= block->bytes;
    SNIP_ILP_FREE(block);
}

static void snipi_ilp_free_since(snipi_ilp_run *run, const snipi_ilp_block *mark) {
    while (run->newest != mark) snipi_ilp_free(run, run->newest + 1);
}

// >>ilp-check --------------------------------------------------------------------------------------
// The arguments, and whether the largest gains meet the targets. Needs no memory.

// By bits: -Ofast takes finiteness for granted.
static int snipi_ilp_finite(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ((bits >> 52) & 0x7ff) != 0x7ff;
}

static int snipi_ilp_not_negative(double x) { return snipi_ilp_finite(x) && x >= 0; }

static int snipi_ilp_group_ok(const snip_ilp_group *group, int n_stages) {
    if (!group->options || group->n_options < 1) return 0;
    if (group->stage < 0 || group->stage >= (n_stages > 1 ? n_stages : 1)) return 0;
    for (int j = 0; j < group->n_options; j++)
        if (!snipi_ilp_not_negative(group->options[j].cost) || !snipi_ilp_not_negative(group->options[j].gain))
            return 0;
    return 1;
}

static int snipi_ilp_problem_ok(const snip_ilp_problem *problem) {
    if (!problem || problem->n_groups < 0 || problem->n_stages < 0) return 0;
    if (problem->n_groups > 0 && !problem->groups) return 0;
    if (!snipi_ilp_finite(problem->total_target)) return 0;
    for (int s = 0; problem->stage_target && s < problem->n_stages; s++)
        if (!snipi_ilp_finite(problem->stage_target[s])) return 0;
    for (int i = 0; i < problem->n_groups; i++)
        if (!snipi_ilp_group_ok(&problem->groups[i], problem->n_stages)) return 0;
    return 1;
}

// The option of largest gain, of equals the cheapest. *least: the least cost of the group.
static int snipi_ilp_largest(const snip_ilp_group *group, double *least) {
    int best = 0;
    *least = group->options[0].cost;
    for (int j = 0; j < group->n_options; j++) {
        const snip_ilp_option *option = &group->options[j], *so_far = &group->options[best];
        if (option->gain > so_far->gain || (option->gain >= so_far->gain && option->cost < so_far->cost)) best = j;
        if (option->cost < *least) *least = option->cost;
    }
    return best;
}

// Without stage targets all groups are one stage.
static int snipi_ilp_stages(const snip_ilp_problem *problem) {
    return problem->stage_target && problem->n_stages > 1 ? problem->n_stages : 1;
}

static int snipi_ilp_stage(const snip_ilp_problem *problem, int group) {
    return problem->stage_target ? problem->groups[group].stage : 0;
}

static double snipi_ilp_stage_target(const snip_ilp_problem *problem, int stage) {
    const int has = problem->stage_target && stage < problem->n_stages && problem->stage_target[stage] > 0;
    return has ? problem->stage_target[stage] : 0;
}

enum { SNIPI_ILP_STAGES_AT_ONCE = 128 };  // whose sums fit on the stack: 2 KiB

// As snip_ilp_shortfall, of a problem that is in order.
static int snipi_ilp_unreachable(const snip_ilp_problem *problem, double *shortfall) {
    const int stages = snipi_ilp_stages(problem);
    long double sum[SNIPI_ILP_STAGES_AT_ONCE], all = 0, lack;
    for (int first = 0; first < stages; first += SNIPI_ILP_STAGES_AT_ONCE) {
        for (int s = 0; s < SNIPI_ILP_STAGES_AT_ONCE; s++) sum[s] = 0;
        for (int i = 0; i < problem->n_groups; i++) {
            const snip_ilp_group *group = &problem->groups[i];
            const int s = snipi_ilp_stage(problem, i) - first;
            double least;
            if (s < 0 || s >= SNIPI_ILP_STAGES_AT_ONCE) continue;
            sum[s] += group->options[snipi_ilp_largest(group, &least)].gain;
        }

        for (int s = 0; s < SNIPI_ILP_STAGES_AT_ONCE && s < stages - first; s++) {
            lack = snipi_ilp_stage_target(problem, first + s) - sum[s];
            if (lack > SNIPI_ILP_TOLERANCE * sum[s]) {
                *shortfall = (double)lack;
                return first + s;
            }
            all += sum[s];
        }
    }

    lack = problem->total_target - all;
    if (lack > SNIPI_ILP_TOLERANCE * all) {
        *shortfall = (double)lack;
        return problem->n_stages;
    }
    *shortfall = 0;
    return -1;
}

// >>ilp-numbers ------------------------------------------------------------------------------------
// Gains become integers, so that sums of gains are exact and equal sums are equal.

static double snipi_ilp_off_lattice(double x) { return fabs(x - floor(x + 0.5)); }

#define SNIPI_ILP_LATTICE 1e-9     // a value this close to a multiple of the unit, relatively, is one
#define SNIPI_ILP_LEAST_UNIT 1e-7  // of the largest value: below it a unit is not told from rounding
#define SNIPI_ILP_REMAINDER 1e-8   // of the largest value: below it a remainder of Euclid's algorithm is 0

// The unit of which all values are multiples, or 0 if there is none, by Euclid's algorithm on rounded numbers. It is
// snapped to a fraction of the largest value at every step, which keeps it from drifting. *error becomes the sum of the
// distances to the lattice, in units.
static double snipi_ilp_common_unit(const double *x, size_t n, double *error) {
    double largest = 0;
    for (size_t i = 0; i < n; i++)
        if (x[i] > largest) largest = x[i];

    double unit = largest;
    for (size_t i = 0; i < n; i++) {
        const double multiple = unit > 0 ? x[i] / unit : 0;
        if (x[i] > 0 && x[i] < largest * SNIPI_ILP_LEAST_UNIT) return 0;
        if (snipi_ilp_off_lattice(multiple) <= SNIPI_ILP_LATTICE * (multiple > 1 ? multiple : 1) &&
            (multiple > 0.5 || x[i] <= 0))
            continue;

        double a = x[i] > unit ? x[i] : unit, b = x[i] > unit ? unit : x[i];
        while (b > largest * SNIPI_ILP_REMAINDER) {
            const double remainder = fabs(a - floor(a / b + 0.5) * b);
            a = b;
            b = remainder;
        }
        if (a < largest * SNIPI_ILP_LEAST_UNIT) return 0;
        unit = largest / floor(largest / a + 0.5);
    }

    *error = 0;
    for (size_t i = 0; i < n && unit > 0; i++) *error += snipi_ilp_off_lattice(x[i] / unit);
    return unit;
}

// integer = round(gain * 2^exponent * per_unit); off a lattice that is round(gain * 2^bits).
typedef struct {
    int exponent, bits;
    double step;      // of the lattice, times 2^exponent; 0: none
    double per_unit;  // 1 / step, or a power of two
    double most;      // sum of the groups' largest gains, in units
    double rounding;  // how far the integer sum of a choice may be off, in units
} snipi_ilp_unit;

// The least integer sum that is sure to be within the tolerance of the target, but none that keeps out a choice that
// truly meets it. most: the sum of the largest gains, which was found to meet the target.
static int64_t snipi_ilp_need(const snipi_ilp_unit *unit, double target, int64_t most) {
    double tolerance = SNIPI_ILP_TOLERANCE * unit->most - unit->rounding, need = 0;
    if (tolerance < unit->rounding) tolerance = unit->rounding;
    if (target > 0) need = ceil(ldexp(target, unit->exponent) * unit->per_unit - tolerance);
    if (need < 0) return 0;
    return need > (double)most ? most : (int64_t)need;
}

// >>ilp-knapsack -----------------------------------------------------------------------------------
// One knapsack: minimise sum(cost - mu * gain) over the choices with sum(gain) >= need.
typedef struct {
    int64_t gain;
    double cost;
    int option;
} snipi_ilp_item;

typedef struct {
    int n_groups;
    size_t *first;          // [n_groups + 1] group i owns items[first[i]] .. items[first[i + 1] - 1]
    snipi_ilp_item *items;  // gain and cost strictly increase within a group, from cost 0
    int64_t need;
    double mu;      // reward of a unit of gain: 0 but in the coupled problem
    int shift;      // in the coupled problem a unit of the total's gain is 2^shift of this one's
    double spent;   // cost above the cheapest options that is not in the items
    int *pick;      // [n_groups] the best choice so far, by item
    double excess;  // of pick above the LP bound
    double proven;  // no choice has a lower excess

    // Found by snipi_ilp_relax():
    int *base;         // [n_groups] the LP's choice, rounded down
    double base_cost;  // of base
    int64_t lack;      // need minus the gain of base
    double theta;      // the LP's multiplier, >= mu: the price of a unit of gain
} snipi_ilp_knapsack;

static snipi_ilp_item *snipi_ilp_items(const snipi_ilp_knapsack *sack, int group) {
    return sack->items + sack->first[group];
}

static int snipi_ilp_count(const snipi_ilp_knapsack *sack, int group) {
    return (int)(sack->first[group + 1] - sack->first[group]);
}

static int64_t snipi_ilp_gain(const snipi_ilp_knapsack *sack, const int *pick) {
    int64_t gain = 0;
    for (int i = 0; i < sack->n_groups; i++) gain += snipi_ilp_items(sack, i)[pick[i]].gain;
    return gain;
}

static double snipi_ilp_cost(const snipi_ilp_knapsack *sack, const int *pick) {
    long double cost = 0;
    for (int i = 0; i < sack->n_groups; i++) cost += snipi_ilp_items(sack, i)[pick[i]].cost;
    return (double)cost;
}

// Defines a Shell sort, with steps that shrink by 5/11 (Gonnet & Baeza-Yates 1991): no recursion, and the same order
// everywhere, which qsort does not promise.
#define SNIPI_ILP_SORT(name, type, x_before_y)                                                 \
    static void name(type *a, size_t n) {                                                      \
        for (size_t gap = n > 40 ? n / 2 : 1; gap > 0; gap = gap > 2 ? gap * 5 / 11 : gap / 2) \
            for (size_t i = gap; i < n; i++) {                                                 \
                type x = a[i], y;                                                              \
                size_t j = i;                                                                  \
                for (; j >= gap && (y = a[j - gap], x_before_y); j -= gap) a[j] = y;           \
                a[j] = x;                                                                      \
            }                                                                                  \
    }
SNIPI_ILP_SORT(snipi_ilp_sort_items, snipi_ilp_item, x.gain < y.gain || (x.gain == y.gain && x.cost > y.cost))

// Drops the items that another beats or equals in both gain and cost, and sorts the rest. Returns how many stay.
static int snipi_ilp_undominated(snipi_ilp_item *items, int n) {
    double least = SNIPI_ILP_HUGE;
    int kept = n;
    snipi_ilp_sort_items(items, (size_t)n);
    for (int i = n - 1; i >= 0; i--)  // from the largest gain down costs must fall; what stays gathers at the end
        if (items[i].cost < least) {
            least = items[i].cost;
            items[--kept] = items[i];
        }
    memmove(items, items + kept, (size_t)(n - kept) * sizeof *items);
    return n - kept;
}

// >>ilp-lp -----------------------------------------------------------------------------------------
// The linear relaxation. The lower convex hull of each group, cost over gain, is cut into segments. Taken by rising
// slope until need is met they solve the LP (Sinha & Zoltners 1979). The one that meets it is found in linear time by
// weighted quickselect (Dyer 1984, Zemel 1984).
typedef struct {
    double slope;
    int64_t gain;
    int group, item;  // it ends at item
} snipi_ilp_segment;

SNIPI_ILP_SORT(snipi_ilp_sort_segments, snipi_ilp_segment, x.slope < y.slope)

// What an item costs more than base, less theta for each unit that it gains more. Not negative but for rounding, if
// base is the LP's.
static double snipi_ilp_reduced(const snipi_ilp_item *item, const snipi_ilp_item *base, double theta) {
    const double reduced = (item->cost - base->cost) - theta * (double)(item->gain - base->gain);
    return reduced > 0 ? reduced : 0;
}

// Writes the hull of a group's reduced costs below limit, over the gain won from base upward (step 1) or given up
// downward (step -1). Returns its end.
static snipi_ilp_segment *snipi_ilp_hull(const snipi_ilp_item *items, int count, int base, int step, double theta,
                                         double limit, int group, snipi_ilp_segment *hull) {
    snipi_ilp_segment *end = hull;
    for (int j = base + step; j >= 0 && j < count; j += step) {
        const double reduced = snipi_ilp_reduced(&items[j], &items[base], theta);
        if (reduced >= limit) continue;
        for (;; end--) {  // segments that the new one would pass below are taken back
            const snipi_ilp_item *from = &items[end > hull ? end[-1].item : base];
            end->gain = (items[j].gain - from->gain) * step;
            end->slope = (reduced - snipi_ilp_reduced(from, &items[base], theta)) / (double)end->gain;
            if (end == hull || end[-1].slope < end->slope) break;
        }
        end->group = group;
        end->item = j;
        end++;
    }
    return end;
}

static size_t snipi_ilp_segments(const snipi_ilp_knapsack *sack, snipi_ilp_segment *segments) {
    snipi_ilp_segment *end = segments;
    for (int i = 0; i < sack->n_groups; i++)
        end = snipi_ilp_hull(snipi_ilp_items(sack, i), snipi_ilp_count(sack, i), 0, 1, 0, SNIPI_ILP_HUGE, i, end);
    return (size_t)(end - segments);
}

static size_t snipi_ilp_most_segments(const snipi_ilp_knapsack *sack) {
    return sack->first[sack->n_groups] - sack->first[0] - (size_t)sack->n_groups + 1;
}

static void snipi_ilp_swap(snipi_ilp_segment *a, snipi_ilp_segment *b) {
    const snipi_ilp_segment t = *a;
    *a = *b;
    *b = t;
}

// The median of the slopes at a quarter, half and three quarters of the way.
static double snipi_ilp_pivot(const snipi_ilp_segment *segments, size_t low, size_t high) {
    const double a = segments[low + (high - low) / 4].slope;
    const double b = segments[low + (high - low) / 2].slope;
    const double c = segments[low + (high - low) / 4 * 3].slope;
    if (a < b) return b < c ? b : a < c ? c : a;
    return a < c ? a : b < c ? c : b;
}

enum { SNIPI_ILP_SORTED_AT_ONCE = 24 };  // segments: fewer are sorted, not partitioned further

// Reorders the segments so that the first p, all of least slope, gain less than need, and reach it with the next.
// Returns p.
static size_t snipi_ilp_select(snipi_ilp_segment *segments, size_t n, int64_t need) {
    size_t low = 0, high = n;
    if (need <= 0) return 0;
    while (high - low > SNIPI_ILP_SORTED_AT_ONCE) {
        const double pivot = snipi_ilp_pivot(segments, low, high);
        size_t less = low, more = high;
        int64_t below = 0, equal = 0;
        for (size_t i = low; i < more;) {
            if (segments[i].slope < pivot) {
                below += segments[i].gain;
                snipi_ilp_swap(&segments[less++], &segments[i++]);
            } else if (segments[i].slope > pivot)
                snipi_ilp_swap(&segments[--more], &segments[i]);
            else
                equal += segments[i++].gain;
        }

        if (below >= need) {
            high = less;
            continue;
        }
        need -= below;
        low = less;
        if (equal >= need) {  // all of one slope: any order will do
            high = more;
            break;
        }
        need -= equal;
        low = more;
    }

    if (high - low <= SNIPI_ILP_SORTED_AT_ONCE) snipi_ilp_sort_segments(segments + low, high - low);
    while (low < high && segments[low].gain < need) need -= segments[low++].gain;
    return low;
}

// Finds base, base_cost, lack and theta. need must be in reach. Returns 0 when memory is short.
static int snipi_ilp_relax(snipi_ilp_run *run, snipi_ilp_knapsack *sack) {
    snipi_ilp_segment *segments = SNIPI_ILP_ALLOC(run, snipi_ilp_segment, snipi_ilp_most_segments(sack));
    if (!segments) return 0;
    const size_t n = snipi_ilp_segments(sack, segments);
    size_t taken = 0;
    memset(sack->base, 0, (size_t)sack->n_groups * sizeof *sack->base);
    sack->lack = sack->need - snipi_ilp_gain(sack, sack->base);
    sack->theta = sack->mu;

    for (size_t i = 0; i < n && sack->mu > 0; i++)  // these pay for themselves
        if (segments[i].slope < sack->mu) {
            sack->lack -= segments[i].gain;
            snipi_ilp_swap(&segments[taken++], &segments[i]);
        }
    if (sack->lack > 0 && n > taken) {
        taken += snipi_ilp_select(segments + taken, n - taken, sack->lack);
        sack->theta = segments[taken < n ? taken : n - 1].slope;
    }
    for (size_t i = 0; i < taken; i++)
        if (sack->base[segments[i].group] < segments[i].item) sack->base[segments[i].group] = segments[i].item;

    snipi_ilp_free(run, segments);
    sack->lack = sack->need - snipi_ilp_gain(sack, sack->base);
    sack->base_cost = snipi_ilp_cost(sack, sack->base);
    return 1;
}

// From here on a choice is valued by its excess over the LP bound: the reduced costs of its items, plus (theta - mu)
// for each unit of gain beyond need. That is a sum of small numbers that are not negative, so little is lost to
// rounding.

// The cost of a choice of this excess.
static double snipi_ilp_cost_of(const snipi_ilp_knapsack *sack, double excess) {
    return sack->spent + sack->base_cost + (sack->lack > 0 ? sack->theta * (double)sack->lack : 0) + excess;
}

// How much cheaper a choice must be to count as better than one of this cost. With mu it is not the cost alone that
// counts, so the step of costs says nothing.
static double snipi_ilp_margin(const snipi_ilp_run *run, double cost, double mu, double rel_gap) {
    double margin = SNIPI_ILP_PROOF * cost;
    if (mu <= 0 && margin < 0.99 * run->cost_step) margin = 0.99 * run->cost_step;
    return margin < rel_gap * cost ? rel_gap * cost : margin;
}

// Whether all that would count as better than the knapsack's pick, which is of this cost, has been looked for.
// *cut: the excess that it would have to be below.
static int snipi_ilp_settled(const snipi_ilp_run *run, snipi_ilp_knapsack *sack, double cost, double *cut) {
    const double margin = snipi_ilp_margin(run, cost, sack->mu, run->rel_gap);
    *cut = sack->excess - margin;
    if (sack->proven < *cut) return 0;
    if (margin <= snipi_ilp_margin(run, cost, sack->mu, 0))
        sack->proven = sack->excess;
    else
        sack->proven = *cut > 0 ? *cut : 0;
    return 1;
}

// >>ilp-greedy -------------------------------------------------------------------------------------
// A first choice: base and the cheapest single upgrade that meets need; the LP's broken segment is one, so there always
// is an upgrade. In the coupled problem all that is worth exactly mu is taken too, which meets the total.
static void snipi_ilp_greedy(snipi_ilp_knapsack *sack) {
    const int ties = sack->mu > 0 && sack->theta <= sack->mu;
    int64_t surplus = -sack->lack;
    double least = SNIPI_ILP_HUGE;
    int upgraded = -1, upgrade = 0;  // group and item
    sack->excess = 0;
    for (int i = 0; i < sack->n_groups; i++) {
        const snipi_ilp_item *items = snipi_ilp_items(sack, i), *base = items + sack->base[i];
        sack->pick[i] = sack->base[i];
        for (int j = snipi_ilp_count(sack, i) - 1; j > sack->base[i]; j--) {
            const double dearer = items[j].cost - base->cost;
            const int64_t gained = items[j].gain - base->gain;
            const double cost = dearer - sack->mu * (double)gained;
            const double reduced = snipi_ilp_reduced(&items[j], base, sack->theta);
            if (ties && reduced <= 1e-14 * dearer) {  // equal but for the rounding of a slope
                sack->pick[i] = j;
                sack->excess += reduced;
                surplus += gained;
                break;
            }
            if (gained >= sack->lack && cost < least) {
                least = cost;
                upgraded = i;
                upgrade = j;
            }
        }
    }

    if (surplus < 0 && upgraded >= 0) {
        const snipi_ilp_item *items = snipi_ilp_items(sack, upgraded);
        const snipi_ilp_item *base = items + sack->base[upgraded], *old = items + sack->pick[upgraded];
        surplus += items[upgrade].gain - old->gain;
        sack->excess += snipi_ilp_reduced(&items[upgrade], base, sack->theta) -
                        snipi_ilp_reduced(old, base, sack->theta);
        sack->pick[upgraded] = upgrade;
    }
    sack->excess += (sack->theta - sack->mu) * (double)surplus;
}

// >>ilp-core ---------------------------------------------------------------------------------------
// The core: the groups that have another item than base of reduced cost below a limit, the most ambiguous first
// (Pisinger 1995). Choices of excess below the limit differ from base only there. A group of the core is a row;
// dynamic programming goes through the rows one after the other (>>ilp-states).
enum { SNIPI_ILP_UP, SNIPI_ILP_DOWN, SNIPI_ILP_SIDES };  // gain won for a lack, gain given up for a surplus

typedef struct {  // from base to an item; base itself is a move
    int64_t gain;
    double cost, reduced;
    int item;
} snipi_ilp_move;

typedef struct {
    double key;  // least reduced cost but base's
    int group, n_moves;
    snipi_ilp_move *moves;  // [n_moves] by rising gain
} snipi_ilp_row;

typedef struct {
    int parent;  // a state of the row before
    int move;
} snipi_ilp_step;

typedef struct {  // a partial choice, of the rows so far
    int64_t gain;
    double cost;  // both relative to base
    snipi_ilp_step step;
} snipi_ilp_state;

typedef struct {
    int n_rows;
    snipi_ilp_row *rows;                       // [n_rows]
    snipi_ilp_segment *side[SNIPI_ILP_SIDES];  // hulls of the rows' reduced costs over the gain won or given up,
    snipi_ilp_segment *end[SNIPI_ILP_SIDES];   // by rising slope; a segment's group is its row
    snipi_ilp_step **steps;                    // [n_rows] of each row's states
    snipi_ilp_state *states;                   // [n_states] of the last row
    int n_states;
} snipi_ilp_core;

SNIPI_ILP_SORT(snipi_ilp_sort_rows, snipi_ilp_row, x.key < y.key)

// The least reduced cost of a group's items other than base. *count: base and the items below limit.
static double snipi_ilp_ambiguity(const snipi_ilp_knapsack *sack, int group, double limit, int *count) {
    const snipi_ilp_item *item = snipi_ilp_items(sack, group), *end = item + snipi_ilp_count(sack, group);
    const snipi_ilp_item *base = item + sack->base[group];
    double least = SNIPI_ILP_HUGE;
    *count = 1;
    for (; item < end; item++) {
        const double reduced = item == base ? SNIPI_ILP_HUGE : snipi_ilp_reduced(item, base, sack->theta);
        if (reduced < least) least = reduced;
        *count += reduced < limit;
    }
    return least;
}

// Fills in a row's moves; returns their end.
static snipi_ilp_move *snipi_ilp_moves(const snipi_ilp_knapsack *sack, int group, double limit, snipi_ilp_move *move) {
    const snipi_ilp_item *items = snipi_ilp_items(sack, group);
    const int count = snipi_ilp_count(sack, group), base = sack->base[group];
    for (int j = 0; j < count; j++) {
        const double reduced = snipi_ilp_reduced(&items[j], &items[base], sack->theta);
        if (reduced >= limit && j != base) continue;
        move->gain = items[j].gain - items[base].gain;
        move->cost = items[j].cost - items[base].cost;
        move->reduced = reduced;
        move->item = j;
        move++;
    }
    return move;
}

// Returns 0 when memory is short. What was allocated stays, for snipi_ilp_free_since().
static int snipi_ilp_core_make(snipi_ilp_run *run, const snipi_ilp_knapsack *sack, double limit, snipi_ilp_core *core) {
    memset(core, 0, sizeof *core);
    core->rows = SNIPI_ILP_ALLOC(run, snipi_ilp_row, sack->n_groups);
    if (!core->rows) return 0;
    size_t n_moves = 0;
    for (int i = 0; i < sack->n_groups; i++) {
        snipi_ilp_row *row = &core->rows[core->n_rows];
        row->group = i;
        row->key = snipi_ilp_ambiguity(sack, i, limit, &row->n_moves);
        if (row->n_moves == 1) continue;
        n_moves += (size_t)row->n_moves;
        core->n_rows++;
    }
    snipi_ilp_sort_rows(core->rows, (size_t)core->n_rows);

    core->steps = SNIPI_ILP_ALLOC(run, snipi_ilp_step *, core->n_rows);
    for (int side = 0; side < SNIPI_ILP_SIDES; side++)
        core->end[side] = core->side[side] = SNIPI_ILP_ALLOC(run, snipi_ilp_segment, n_moves + 1);
    snipi_ilp_move *move = SNIPI_ILP_ALLOC(run, snipi_ilp_move, n_moves);
    if (!move || !core->steps || !core->side[SNIPI_ILP_UP] || !core->side[SNIPI_ILP_DOWN]) return 0;

    for (int i = 0; i < core->n_rows; i++) {
        const int group = core->rows[i].group, count = snipi_ilp_count(sack, group);
        const snipi_ilp_item *items = snipi_ilp_items(sack, group);
        core->rows[i].moves = move;
        move = snipi_ilp_moves(sack, group, limit, move);
        for (int side = 0; side < SNIPI_ILP_SIDES; side++)
            core->end[side] = snipi_ilp_hull(items, count, sack->base[group], side == SNIPI_ILP_UP ? 1 : -1,
                                             sack->theta, limit, i, core->end[side]);
    }
    for (int side = 0; side < SNIPI_ILP_SIDES; side++)
        snipi_ilp_sort_segments(core->side[side], (size_t)(core->end[side] - core->side[side]));
    return 1;
}

enum { SNIPI_ILP_GUESS_RANK = 16 };  // the first core has about as many rows: microseconds of search

// A first guess of the gap: the reduced cost of the 16th most ambiguous group.
static double snipi_ilp_guess(const snipi_ilp_knapsack *sack) {
    double key[SNIPI_ILP_GUESS_RANK];  // the least so far, sorted
    int found = 0;
    for (int i = 0; i < sack->n_groups; i++) {
        int unused, at;
        const double least = snipi_ilp_ambiguity(sack, i, 0, &unused);
        if (snipi_ilp_count(sack, i) == 1) continue;
        if (found == SNIPI_ILP_GUESS_RANK && least >= key[SNIPI_ILP_GUESS_RANK - 1]) continue;
        if (found < SNIPI_ILP_GUESS_RANK) found++;
        for (at = found - 1; at > 0 && key[at - 1] > least; at--) key[at] = key[at - 1];
        key[at] = least;
    }
    return found ? key[found - 1] : 0;
}

// >>ilp-curve --------------------------------------------------------------------------------------
// The LP bound of the rows not yet decided, as a function of the gain still lacking. A lack below 0 is a surplus.
typedef struct {
    int64_t gain;
    double value;  // sums to the end of a segment,
    double slope;  // and its slope; point 0 is the origin
} snipi_ilp_point;

typedef struct {
    double price;  // theta - mu, of each unit of gain beyond need
    snipi_ilp_point *points[SNIPI_ILP_SIDES];
    size_t n_points[SNIPI_ILP_SIDES];
    size_t at[SNIPI_ILP_SIDES];  // the point of the last question: questions come with rising lack
} snipi_ilp_curve;

// For the rows from `row` on, and no larger lack or surplus.
static void snipi_ilp_curve_make(const snipi_ilp_core *core, int row, int64_t lack, int64_t surplus,
                                 snipi_ilp_curve *curve) {
    for (int side = 0; side < SNIPI_ILP_SIDES; side++) {
        const int64_t most = side == SNIPI_ILP_DOWN ? surplus : lack;
        snipi_ilp_point sum = { 0, 0, 0 };
        curve->n_points[side] = 0;
        curve->points[side][0] = sum;
        for (const snipi_ilp_segment *segment = core->side[side]; segment < core->end[side]; segment++) {
            if (sum.gain > most || (side == SNIPI_ILP_DOWN && segment->slope >= curve->price)) break;
            if (segment->group < row) continue;
            sum.gain += segment->gain;
            sum.value += segment->slope * (double)segment->gain;
            sum.slope = segment->slope;
            curve->points[side][++curve->n_points[side]] = sum;
        }
    }
}

// The bound. *rounded: the excess of the LP's choice, rounded to meet need, which takes *taken segments; HUGE if need
// is out of reach.
static double snipi_ilp_curve_ask(snipi_ilp_curve *curve, int64_t lack, double *rounded, size_t *taken) {
    const int side = lack <= 0 ? SNIPI_ILP_DOWN : SNIPI_ILP_UP;
    const snipi_ilp_point *points = curve->points[side];
    const size_t n = curve->n_points[side];
    size_t at = curve->at[side];  // the segment asked for ends at points[at + 1]

    if (side == SNIPI_ILP_DOWN) {
        while (at > 0 && points[at].gain > -lack) at--;
        curve->at[SNIPI_ILP_DOWN] = *taken = at;
        const double rest = (double)(-lack - points[at].gain);
        *rounded = points[at].value + curve->price * rest;
        return points[at].value + (at < n ? points[at + 1].slope : curve->price) * rest;
    }

    while (at < n && points[at + 1].gain < lack) at++;
    curve->at[SNIPI_ILP_UP] = at;
    *taken = at + 1;
    if (at == n) return *rounded = SNIPI_ILP_HUGE;
    *rounded = points[at + 1].value + curve->price * (double)(points[at + 1].gain - lack);
    return points[at].value + points[at + 1].slope * (double)(lack - points[at].gain);
}

// >>ilp-states -------------------------------------------------------------------------------------
// Dynamic programming over the rows, by lists of undominated states sorted by falling gain (Nemhauser & Ullmann 1969).
// States are pruned by the bound before the lists are merged, which spares most of the merging. Each state's rounded LP
// choice is a candidate for the best.
typedef struct {  // a state, and its completion by the LP
    double excess;
    int row, side;
    snipi_ilp_step step;
    size_t segments;
} snipi_ilp_best;

typedef struct {
    const snipi_ilp_knapsack *sack;
    snipi_ilp_core *core;
    snipi_ilp_curve curve;
    double limit;          // states of a bound from here on are dropped
    snipi_ilp_best *best;  // NULL: none is looked for
} snipi_ilp_sweep;

// Merges two lists, keeping of no higher gain only what is cheaper. Returns the length of out.
static int snipi_ilp_merge(const snipi_ilp_state *a, int n_a, const snipi_ilp_state *b, int n_b, snipi_ilp_state *out) {
    double least = SNIPI_ILP_HUGE;
    int i = 0, j = 0, n = 0;
    while (i < n_a || j < n_b) {
        const int first = j == n_b ||
                          (i < n_a && (a[i].gain > b[j].gain || (a[i].gain == b[j].gain && a[i].cost <= b[j].cost)));
        const snipi_ilp_state *state = first ? &a[i++] : &b[j++];
        if (state->cost < least) {
            least = state->cost;
            out[n++] = *state;
        }
    }
    return n;
}

enum { SNIPI_ILP_LATE_MASK = 4095 };  // the clock is read once per 4096 states

// Takes one move of a row from every state of the row before, and writes what is worth keeping to shifted, by falling
// gain. Returns how many, or -1 when time is short.
static int snipi_ilp_shift(snipi_ilp_run *run, snipi_ilp_sweep *sweep, int row, int move_index,
                           snipi_ilp_state *shifted) {
    const snipi_ilp_knapsack *sack = sweep->sack;
    const snipi_ilp_state *states = sweep->core->states;
    const snipi_ilp_move *move = &sweep->core->rows[row].moves[move_index];
    const int n_states = sweep->core->n_states;
    snipi_ilp_curve *curve = &sweep->curve;
    snipi_ilp_best *best = sweep->best;
    double limit = sweep->limit;
    int i, kept = 0;
    curve->at[SNIPI_ILP_UP] = 0;
    curve->at[SNIPI_ILP_DOWN] = curve->n_points[SNIPI_ILP_DOWN];

    for (i = 0; i < n_states; i++) {
        const int64_t gain = states[i].gain + move->gain;
        const double cost = states[i].cost + move->cost, reduced = cost - sack->theta * (double)gain;
        double rounded;
        size_t taken;
        const double bound = reduced + snipi_ilp_curve_ask(curve, sack->lack - gain, &rounded, &taken);
        if (bound >= SNIPI_ILP_HUGE / 2) break;  // out of reach, as are all of less gain
        if ((i & SNIPI_ILP_LATE_MASK) == SNIPI_ILP_LATE_MASK && snipi_ilp_late(run)) return -1;

        if (best && rounded + reduced < best->excess) {
            const double excess = rounded + reduced;
            const double margin = snipi_ilp_margin(run, snipi_ilp_cost_of(sack, excess), sack->mu, run->rel_gap);
            best->excess = excess;
            best->row = row;
            best->side = gain >= sack->lack ? SNIPI_ILP_DOWN : SNIPI_ILP_UP;
            best->step.parent = i;
            best->step.move = move_index;
            best->segments = taken;
            if (excess - margin < limit) limit = excess - margin;
        }
        if (bound >= limit) continue;

        shifted[kept].gain = gain;
        shifted[kept].cost = cost;
        shifted[kept].step.parent = i;
        shifted[kept].step.move = move_index;
        kept++;
    }
    run->nodes += i;
    sweep->limit = limit;
    return kept;
}

// Replaces the states of the row before by those of this row. Returns 0 when time or memory is short.
static int snipi_ilp_next_row(snipi_ilp_run *run, snipi_ilp_sweep *sweep, int row) {
    snipi_ilp_core *core = sweep->core;
    const snipi_ilp_move *moves = core->rows[row].moves;
    const int64_t most = core->states[0].gain + moves[core->rows[row].n_moves - 1].gain;
    const int64_t least = core->states[core->n_states - 1].gain + moves[0].gain;
    snipi_ilp_state *shifted = SNIPI_ILP_ALLOC(run, snipi_ilp_state, core->n_states), *all = NULL;
    int n_all = 0;
    if (!shifted) return 0;
    snipi_ilp_curve_make(core, row + 1, sweep->sack->lack - least, most - sweep->sack->lack, &sweep->curve);

    for (int j = 0; j < core->rows[row].n_moves; j++) {
        if (moves[j].reduced > sweep->limit) continue;
        const int n = snipi_ilp_shift(run, sweep, row, j, shifted);
        if (n < 0) return 0;
        if (n == 0) continue;
        snipi_ilp_state *merged = n_all < INT_MAX - n ? SNIPI_ILP_ALLOC(run, snipi_ilp_state, n_all + n) : NULL;
        if (!merged) return 0;
        n_all = snipi_ilp_merge(all, n_all, shifted, n, merged);
        if (all) snipi_ilp_free(run, all);
        all = merged;
    }

    snipi_ilp_free(run, shifted);
    snipi_ilp_free(run, core->states);
    core->states = all;
    core->n_states = n_all;
    core->steps[row] = SNIPI_ILP_ALLOC(run, snipi_ilp_step, n_all);
    if (!core->steps[row] || snipi_ilp_late(run)) return 0;
    for (int i = 0; i < n_all; i++) core->steps[row][i] = all[i].step;
    return 1;
}

// Makes the core and looks at all choices of excess below limit. With best, for one of excess below best->excess;
// without, core->states becomes the undominated ones that meet need. Returns 0 when time or memory is short. What was
// allocated stays, for snipi_ilp_free_since().
static int snipi_ilp_states(snipi_ilp_run *run, const snipi_ilp_knapsack *sack, double limit, snipi_ilp_best *best,
                            snipi_ilp_core *core) {
    snipi_ilp_sweep sweep;
    if (!snipi_ilp_core_make(run, sack, limit, core)) return 0;
    sweep.sack = sack;
    sweep.core = core;
    sweep.curve.price = sack->theta - sack->mu;
    sweep.limit = limit;
    sweep.best = best;
    core->states = SNIPI_ILP_ALLOC(run, snipi_ilp_state, 1);
    for (int side = 0; side < SNIPI_ILP_SIDES; side++)
        sweep.curve.points[side] = SNIPI_ILP_ALLOC(run, snipi_ilp_point, core->end[side] - core->side[side] + 1);
    if (!core->states || !sweep.curve.points[SNIPI_ILP_UP] || !sweep.curve.points[SNIPI_ILP_DOWN]) return 0;

    memset(core->states, 0, sizeof *core->states);
    core->n_states = core->n_rows > 0 || sack->lack <= 0;
    for (int row = 0; row < core->n_rows && core->n_states; row++)
        if (!snipi_ilp_next_row(run, &sweep, row)) return 0;
    return 1;
}

// Picks what a state stands for: base, its own move, those of the steps from its parent back, and the segments of the
// rows beyond it.
static void snipi_ilp_trace(const snipi_ilp_knapsack *sack, const snipi_ilp_core *core, const snipi_ilp_best *best) {
    snipi_ilp_step step = best->step;
    memcpy(sack->pick, sack->base, (size_t)sack->n_groups * sizeof *sack->pick);
    for (int row = best->row; row >= 0; row--) {
        sack->pick[core->rows[row].group] = core->rows[row].moves[step.move].item;
        if (row) step = core->steps[row - 1][step.parent];
    }

    size_t left = best->segments;
    for (const snipi_ilp_segment *segment = core->side[best->side]; left > 0; segment++)
        if (segment->group > best->row) {
            sack->pick[core->rows[segment->group].group] = segment->item;
            left--;
        }
}

// >>ilp-single -------------------------------------------------------------------------------------
// One knapsack by itself.

// Improves pick until it is proven. The gap is guessed: a round looks at all choices below the guess and either finds
// the best or raises the bound to the guess. A core as wide as the first choice's gap may be far too wide. Returns 0
// when time or memory is short.
static int snipi_ilp_refine(snipi_ilp_run *run, snipi_ilp_knapsack *sack) {
    const snipi_ilp_block *mark = run->newest;
    double guess = snipi_ilp_guess(sack), cut;
    if (guess < sack->excess / 1024) guess = sack->excess / 1024;  // 8 rounds at most to the first choice's gap
    sack->proven = 0;
    for (; !snipi_ilp_settled(run, sack, snipi_ilp_cost_of(sack, sack->excess), &cut); guess *= 3) {
        const double limit = guess < cut ? guess : cut;
        snipi_ilp_core core;
        snipi_ilp_best best;
        if (snipi_ilp_late(run)) return 0;
        memset(&best, 0, sizeof best);
        best.excess = sack->excess;
        const int done = snipi_ilp_states(run, sack, limit, &best, &core);
        if (best.excess < sack->excess) snipi_ilp_trace(sack, &core, &best);
        sack->excess = best.excess;
        snipi_ilp_free_since(run, mark);
        if (!done) return 0;
        sack->proven = limit;
    }
    return 1;
}

// When memory is short for the LP, pick stays as it is, at the largest gains. Returns 0 when time or memory is short.
static int snipi_ilp_single(snipi_ilp_run *run, snipi_ilp_knapsack *sack) {
    sack->excess = snipi_ilp_cost(sack, sack->pick);
    sack->proven = 0;
    if (!snipi_ilp_relax(run, sack)) return 0;
    snipi_ilp_greedy(sack);
    return snipi_ilp_refine(run, sack);
}

// >>ilp-join ---------------------------------------------------------------------------------------
// The coupled problem: parts with targets of their own, and a target over all. A multiplier mu on the latter separates
// the parts (Lagrange). Each part's choices within the gap are listed, and one of each list is chosen by a small
// knapsack of the same kind. `whole` has the groups of all parts, and the total's need.

// Writes the segments of a part that its own need does not take, in units of the total; returns their end. What the
// last segment that it does take gives beyond the need is one of them, of group -1.
static size_t snipi_ilp_left_over(const snipi_ilp_knapsack *part, snipi_ilp_segment *segments, size_t n) {
    const double per_unit = ldexp(1.0, part->shift);
    const size_t end = n + snipi_ilp_segments(part, segments + n);
    int64_t rest = part->lack > 0 ? -part->lack : 0;
    for (size_t i = n; i < end; i++) {
        const snipi_ilp_segment segment = segments[i];
        if (segment.item <= part->base[segment.group]) continue;
        if (segment.slope <= part->theta) {
            rest += segment.gain;
            continue;
        }
        segments[n] = segment;
        segments[n].slope *= per_unit;
        segments[n++].gain >>= part->shift;
    }
    if (rest > 0) {
        segments[n].slope = part->theta * per_unit;
        segments[n].gain = rest >> part->shift;
        segments[n].group = -1;
        segments[n++].item = 0;
    }
    return n;
}

// The LP of parts within a total: each part takes what it needs, then all take the cheapest segments that are left.
// mu, which is whole's theta, is the slope of the last of them. Any mu gives a valid bound. Returns 0 when memory is
// short.
static int snipi_ilp_join_relax(snipi_ilp_run *run, snipi_ilp_knapsack *whole, snipi_ilp_knapsack *parts, int n_parts) {
    const size_t most = snipi_ilp_most_segments(whole) + 2 * (size_t)n_parts;
    snipi_ilp_segment *segments = SNIPI_ILP_ALLOC(run, snipi_ilp_segment, most);
    int64_t missing = whole->need;
    size_t n = 0;
    if (!segments) return 0;
    for (int p = 0; p < n_parts; p++) {
        if (!snipi_ilp_relax(run, &parts[p])) return 0;
        const int64_t taken = parts[p].lack > 0 ? parts[p].need : parts[p].need - parts[p].lack;
        missing -= taken >> parts[p].shift;
        n = snipi_ilp_left_over(&parts[p], segments, n);
    }

    whole->theta = 0;
    if (missing > 0 && n) {
        const size_t last = snipi_ilp_select(segments, n, missing);
        whole->theta = segments[last < n ? last : n - 1].slope;
    }
    snipi_ilp_free(run, segments);
    for (int p = 0; p < n_parts && missing > 0; p++) {
        parts[p].mu = ldexp(whole->theta, -parts[p].shift);
        if (!snipi_ilp_relax(run, &parts[p])) return 0;
    }
    return 1;
}

// Takes cheaper items, group after group, as far as the surplus allows. Returns the change of the cost, which is that
// of the excess.
static double snipi_ilp_join_spend(const snipi_ilp_knapsack *parts, int n_parts, int64_t surplus) {
    double change = 0;
    for (int p = 0; p < n_parts; p++) {
        const snipi_ilp_knapsack *sack = &parts[p];
        int64_t gain = snipi_ilp_gain(sack, sack->pick);
        for (int i = 0; i < sack->n_groups; i++) {
            const snipi_ilp_item *items = snipi_ilp_items(sack, i), *old = items + sack->pick[i];
            for (int j = 0; j < sack->pick[i]; j++) {
                const int64_t left = gain - old->gain + items[j].gain;
                const int64_t rest = surplus + (left >> sack->shift) - (gain >> sack->shift);
                if (left < sack->need || rest < 0) continue;
                change += items[j].cost - old->cost;
                gain = left;
                surplus = rest;
                sack->pick[i] = j;
                break;
            }
        }
    }
    return change;
}

// Writes a part's list of states as a group of the knapsack over lists, and returns its cheapest state's cost.
static double snipi_ilp_join_group(snipi_ilp_knapsack *top, int p, const snipi_ilp_knapsack *part,
                                   const snipi_ilp_core *list) {
    const double cheapest = list->states[list->n_states - 1].cost;
    snipi_ilp_item *items = snipi_ilp_items(top, p);
    for (int i = 0; i < list->n_states; i++) {
        items[i].gain = (part->need - part->lack + list->states[i].gain) >> part->shift;
        items[i].cost = list->states[i].cost - cheapest;
        items[i].option = i;
    }
    top->pick[p] = snipi_ilp_undominated(items, list->n_states) - 1;
    top->first[p + 1] = top->first[p] + (size_t)top->pick[p] + 1;
    return cheapest;
}

// Chooses a state of each part's list, and takes it into whole's pick if that is better. Returns 0 when time or memory
// is short.
static int snipi_ilp_join_choose(snipi_ilp_run *run, snipi_ilp_knapsack *whole, const snipi_ilp_knapsack *parts,
                                 int n_parts, const snipi_ilp_core *lists) {
    snipi_ilp_knapsack top;
    size_t n_items = 0;
    int64_t surplus = -whole->need;
    for (int p = 0; p < n_parts; p++) n_items += (size_t)lists[p].n_states;
    memset(&top, 0, sizeof top);
    top.n_groups = n_parts;
    top.need = whole->need;
    top.first = SNIPI_ILP_ALLOC(run, size_t, (size_t)n_parts + 1);
    top.items = SNIPI_ILP_ALLOC(run, snipi_ilp_item, n_items);
    top.base = SNIPI_ILP_ALLOC(run, int, n_parts);
    top.pick = SNIPI_ILP_ALLOC(run, int, n_parts);
    if (!top.first || !top.items || !top.base || !top.pick) return 0;

    top.first[0] = 0;
    for (int p = 0; p < n_parts; p++) {
        top.spent += parts[p].base_cost + snipi_ilp_join_group(&top, p, &parts[p], &lists[p]);
        surplus += snipi_ilp_items(&top, p)[top.pick[p]].gain;
    }
    if (surplus < 0) return 1;  // the lists are too short yet
    const int done = snipi_ilp_single(run, &top);
    const double found = whole->excess - snipi_ilp_cost(whole, whole->pick) + top.spent +
                         snipi_ilp_cost(&top, top.pick);
    if (found >= whole->excess) return done;

    whole->excess = found;
    for (int p = 0; p < n_parts; p++) {
        const int state = snipi_ilp_items(&top, p)[top.pick[p]].option;
        const snipi_ilp_best best = { found, lists[p].n_rows - 1, SNIPI_ILP_UP, lists[p].states[state].step, 0 };
        snipi_ilp_trace(&parts[p], &lists[p], &best);
    }
    return done;
}

// A first choice at mu. Returns 0 where none was found: costs 1e300 apart leave slopes no digits, and pick goes back to
// the largest gains.
static int snipi_ilp_join_greedy(snipi_ilp_knapsack *whole, snipi_ilp_knapsack *parts, int n_parts) {
    int64_t surplus = -whole->need;
    for (int p = 0; p < n_parts; p++) {
        snipi_ilp_greedy(&parts[p]);
        surplus += snipi_ilp_gain(&parts[p], parts[p].pick) >> parts[p].shift;
    }
    if (surplus < 0) {
        for (int i = 0; i < whole->n_groups; i++) whole->pick[i] = snipi_ilp_count(whole, i) - 1;
        return 0;
    }
    whole->excess = whole->theta * (double)surplus + snipi_ilp_join_spend(parts, n_parts, surplus);
    return 1;
}

// Each part's integer bound at mu, by itself. Sets the parts' proven, whole's excess and proven, and returns a first
// window: how far above their bounds the parts' lists reach.
static double snipi_ilp_join_bounds(snipi_ilp_run *run, snipi_ilp_knapsack *whole, snipi_ilp_knapsack *parts,
                                    int n_parts, int *trial) {
    double sum = 0, window = 0;
    for (int p = 0; p < n_parts; p++) {
        snipi_ilp_knapsack alone = parts[p];
        alone.pick = trial;
        snipi_ilp_greedy(&alone);
        whole->excess += alone.excess;
        (void)snipi_ilp_refine(run, &alone);
        parts[p].proven = alone.proven;
        sum += alone.proven;
        window += snipi_ilp_guess(&parts[p]) * 0.25 / n_parts;
    }
    whole->proven = sum;
    return window < (whole->excess - sum) / 1024 ? (whole->excess - sum) / 1024 : window;
}

// Improves whole's pick, which is at the largest gains, until it is proven or time or memory is short.
static void snipi_ilp_join(snipi_ilp_run *run, snipi_ilp_knapsack *whole, snipi_ilp_knapsack *parts, int n_parts) {
    snipi_ilp_core *lists = SNIPI_ILP_ALLOC(run, snipi_ilp_core, n_parts);
    int *trial = SNIPI_ILP_ALLOC(run, int, whole->n_groups), stopped = 0;
    whole->excess = snipi_ilp_cost(whole, whole->pick);
    whole->proven = 0;
    if (!lists || !trial || !snipi_ilp_join_relax(run, whole, parts, n_parts)) return;
    if (!snipi_ilp_join_greedy(whole, parts, n_parts)) return;

    double window = snipi_ilp_join_bounds(run, whole, parts, n_parts, trial);
    const double sum = whole->proven;
    const snipi_ilp_block *mark = run->newest;
    for (;; window *= 4) {
        const double cost = snipi_ilp_cost(whole, whole->pick);
        double cut;
        if (snipi_ilp_settled(run, whole, cost, &cut) || stopped || snipi_ilp_late(run)) return;

        const double limit = cut - sum < window ? cut - sum : window;
        int p;
        for (p = 0; p < n_parts; p++) {
            const double reach = parts[p].proven + limit + 0.01 * SNIPI_ILP_PROOF * cost;
            stopped = !snipi_ilp_states(run, &parts[p], reach, NULL, &lists[p]);
            if (stopped || !lists[p].n_states) break;  // the latter: nothing of this part is within the window
        }
        if (p == n_parts) stopped = !snipi_ilp_join_choose(run, whole, parts, n_parts, lists);
        if (!stopped) whole->proven = window < cut - sum ? sum + limit : cut;
        snipi_ilp_free_since(run, mark);
    }
}

// >>ilp-solve --------------------------------------------------------------------------------------
// From the caller's problem to knapsacks, and back.
typedef struct {
    const snip_ilp_problem *problem;
    int n_parts;   // one for each stage if any stage has a target, else 1
    int coupled;   // parts with targets of their own, and a total beyond their sum
    int *order;    // [n_groups] the caller's groups, part after part
    int *start;    // [n_parts + 1] where each part begins in it
    int *base;     // [n_groups]
    double *cost;  // of all options in that order, above their group's least, times 2^cost_exponent
    double *gain;  // of the options of a part
    int cost_exponent;
    snipi_ilp_unit total;  // in the coupled problem, of the total's gains
    snipi_ilp_knapsack whole, *parts;
} snipi_ilp_model;

enum { SNIPI_ILP_COSTS, SNIPI_ILP_GAINS };

// Writes the options' costs above their group's least, or gains, group after group and times 2^*exponent: near 1, or as
// near as a double holds, so that no sum overflows and none is lost to underflow. Returns the sum of the groups'
// largest.
static double snipi_ilp_flatten(const snip_ilp_problem *problem, const int *list, int n, int what, double *x,
                                size_t *count, int *exponent) {
    double most = 0, sum = 0, least = 0, *end = x;
    for (int i = 0; i < n; i++) {
        const snip_ilp_group *group = &problem->groups[list[i]];
        if (what == SNIPI_ILP_COSTS) (void)snipi_ilp_largest(group, &least);
        for (int j = 0; j < group->n_options; j++, end++) {
            *end = what == SNIPI_ILP_COSTS ? group->options[j].cost - least : group->options[j].gain;
            if (*end > most) most = *end;
        }
    }
    *count = (size_t)(end - x);

    int e;
    (void)frexp(most, &e);
    *exponent = e > 1000 ? -1000 : e < -1000 ? 1000 : -e;
    const double factor = ldexp(1.0, *exponent);
    for (int i = 0; i < n; i++) {
        most = 0;
        for (int j = 0; j < problem->groups[list[i]].n_options; j++, x++) {
            *x *= factor;
            if (*x > most) most = *x;
        }
        sum += most;
    }
    return sum;
}

#define SNIPI_ILP_MOST_UNITS 1e9  // on a lattice: above it the sum of a lattice's rounding is not to be trusted

// Flattens the gains of some groups and finds their unit: the step of a lattice (that of the total, if it is given), if
// its rounding is small beside the tolerance of the target; else a power of two, so that 2^60 <= most < 2^61.
static snipi_ilp_unit snipi_ilp_unit_of(const snip_ilp_problem *problem, const int *list, int n,
                                        const snipi_ilp_unit *total, double *gain) {
    snipi_ilp_unit unit;
    size_t n_gains;
    int e = 0;
    const double sum = snipi_ilp_flatten(problem, list, n, SNIPI_ILP_GAINS, gain, &n_gains, &unit.exponent);
    (void)frexp(sum, &e);
    if (total) {
        unit.step = ldexp(total->step, unit.exponent - total->exponent);
        unit.rounding = total->rounding;
    } else
        unit.step = snipi_ilp_common_unit(gain, n_gains, &unit.rounding);

    const int lattice = unit.step > 0 && sum / unit.step < SNIPI_ILP_MOST_UNITS &&
                        unit.rounding <= 0.05 * SNIPI_ILP_TOLERANCE * (sum / unit.step);
    if (!lattice) {
        unit.step = 0;
        unit.rounding = 0.5 * n;
    }
    unit.per_unit = lattice ? 1 / unit.step : ldexp(1.0, 61 - e);
    unit.bits = sum > 0 ? unit.exponent + 61 - e : INT_MAX / 2;  // with nothing to count any unit will do
    unit.most = sum * unit.per_unit;
    return unit;
}

// Fills a part's items from flat costs and gains, and its pick with the largest gains. Returns how many costs it took.
static size_t snipi_ilp_read(const snip_ilp_problem *problem, const int *list, const double *cost, const double *gain,
                             double per_unit, snipi_ilp_knapsack *part) {
    size_t at = 0;
    for (int i = 0; i < part->n_groups; i++) {
        snipi_ilp_item *items = snipi_ilp_items(part, i);
        const int n_options = problem->groups[list[i]].n_options;
        for (int j = 0; j < n_options; j++, at++) {
            items[j].gain = (int64_t)(gain[at] * per_unit + 0.5);
            items[j].cost = cost[at];
            items[j].option = j;
        }
        part->pick[i] = snipi_ilp_undominated(items, n_options) - 1;
        part->first[i + 1] = part->first[i] + (size_t)part->pick[i] + 1;
    }
    return at;
}

// Returns 0 when memory is short.
static int snipi_ilp_model_alloc(snipi_ilp_run *run, snipi_ilp_model *model) {
    const snip_ilp_problem *problem = model->problem;
    const int n = problem->n_groups, stages = snipi_ilp_stages(problem);
    snipi_ilp_knapsack *whole = &model->whole;
    size_t n_options = 0;
    for (int i = 0; i < n; i++) n_options += (size_t)problem->groups[i].n_options;
    model->order = SNIPI_ILP_ALLOC(run, int, n);
    model->start = SNIPI_ILP_ALLOC(run, int, (size_t)stages + 1);
    model->base = SNIPI_ILP_ALLOC(run, int, n);
    model->parts = SNIPI_ILP_ALLOC(run, snipi_ilp_knapsack, stages);
    whole->n_groups = n;
    whole->first = SNIPI_ILP_ALLOC(run, size_t, (size_t)n + 1);
    whole->pick = SNIPI_ILP_ALLOC(run, int, n);
    whole->items = SNIPI_ILP_ALLOC(run, snipi_ilp_item, n_options);
    model->cost = SNIPI_ILP_ALLOC(run, double, n_options);
    model->gain = SNIPI_ILP_ALLOC(run, double, n_options);
    return model->order && model->start && model->base && model->parts && whole->first && whole->pick && whole->items &&
           model->cost && model->gain;
}

// Sorts the groups by parts, and finds whether the total binds beyond the stages.
static void snipi_ilp_model_order(snipi_ilp_model *model) {
    const snip_ilp_problem *problem = model->problem;
    const int stages = snipi_ilp_stages(problem);
    long double sum = 0;
    int targets = 0;
    for (int s = 0; s < stages; s++) {
        const double target = snipi_ilp_stage_target(problem, s);
        sum += target;
        targets += target > 0;
    }
    model->n_parts = targets ? stages : 1;
    model->coupled = problem->total_target > sum && stages > 1 && targets;

    int *start = model->start;  // a counting sort that leaves each part's groups in their order
    memset(start, 0, ((size_t)stages + 1) * sizeof *start);
    for (int i = 0; i < problem->n_groups; i++) start[targets ? snipi_ilp_stage(problem, i) : 0]++;
    for (int p = 1; p <= model->n_parts; p++) start[p] += start[p - 1];
    for (int i = problem->n_groups - 1; i >= 0; i--)
        model->order[--start[targets ? snipi_ilp_stage(problem, i) : 0]] = i;
}

// The unit of the total's gains. A total needs one lattice, fine enough for every part, or none.
static void snipi_ilp_model_total(snipi_ilp_model *model) {
    const snip_ilp_problem *problem = model->problem;
    const int *order = model->order, *start = model->start;
    model->total = snipi_ilp_unit_of(problem, order, problem->n_groups, NULL, model->gain);
    for (int p = 0; p < model->n_parts && model->total.step > 0; p++) {
        const snipi_ilp_unit unit = snipi_ilp_unit_of(problem, order + start[p], start[p + 1] - start[p], &model->total,
                                                      model->gain);
        if (unit.step > 0 || unit.most <= 0) continue;
        model->total.step = 0;
        model->total = snipi_ilp_unit_of(problem, order, problem->n_groups, &model->total, model->gain);
    }
}

// Makes the parts' knapsacks. Returns the bits of the coarsest unit among them.
static int snipi_ilp_model_read(snipi_ilp_model *model) {
    const snip_ilp_problem *problem = model->problem;
    size_t read = 0;
    int bits = INT_MAX;
    model->whole.first[0] = 0;
    for (int p = 0; p < model->n_parts; p++) {
        const int begin = model->start[p], *list = model->order + begin;
        snipi_ilp_knapsack *part = &model->parts[p];
        double target = snipi_ilp_stage_target(problem, p);
        if (model->n_parts == 1 && problem->total_target > target) target = problem->total_target;
        *part = model->whole;
        part->n_groups = model->start[p + 1] - begin;
        part->first += begin;
        part->pick += begin;
        part->base = model->base + begin;

        const snipi_ilp_unit unit = snipi_ilp_unit_of(problem, list, part->n_groups,
                                                      model->coupled ? &model->total : NULL, model->gain);
        read += snipi_ilp_read(problem, list, model->cost + read, model->gain, unit.per_unit, part);
        part->need = snipi_ilp_need(&unit, target, snipi_ilp_gain(part, part->pick));
        part->shift = unit.bits;
        if (unit.bits < bits) bits = unit.bits;
    }
    return bits;
}

// The coupled problem's total is counted in the coarsest unit, of `bits`; parts are rounded down to it.
static void snipi_ilp_model_couple(snipi_ilp_model *model, int bits) {
    snipi_ilp_unit *total = &model->total;
    int64_t most = 0;
    if (total->bits < bits) bits = total->bits;
    for (int p = 0; p < model->n_parts; p++) {
        snipi_ilp_knapsack *part = &model->parts[p];
        if (total->step > 0)
            part->shift = 0;
        else
            part->shift = part->shift - bits < 62 ? part->shift - bits : 62;
        most += snipi_ilp_gain(part, part->pick) >> part->shift;
    }
    if (total->step <= 0) {
        const double finer = ldexp(1.0, bits - total->bits);
        total->per_unit *= finer;
        total->most *= finer;
        total->rounding += model->n_parts;
    }
    model->whole.need = snipi_ilp_need(total, model->problem->total_target, most);
}

// Fills choice. *gap: what is left between its cost and the bound. *proven: whether it is optimal. Returns 0, with
// choice untouched, when memory is short for a start.
static int snipi_ilp_search(snipi_ilp_run *run, const snip_ilp_problem *problem, int *choice, double *gap,
                            int *proven) {
    snipi_ilp_model model;
    snipi_ilp_knapsack *whole = &model.whole;
    size_t n_costs = 0;
    double error = 0, left = 0;
    memset(&model, 0, sizeof model);
    model.problem = problem;
    if (!snipi_ilp_model_alloc(run, &model)) return 0;
    snipi_ilp_model_order(&model);
    (void)snipi_ilp_flatten(problem, model.order, problem->n_groups, SNIPI_ILP_COSTS, model.cost, &n_costs,
                            &model.cost_exponent);
    run->cost_step = snipi_ilp_common_unit(model.cost, n_costs, &error);
    if (error > 1e-13) run->cost_step = 0;  // the proof's relative precision, of one step
    if (model.coupled) snipi_ilp_model_total(&model);
    const int bits = snipi_ilp_model_read(&model);
    snipi_ilp_free(run, model.gain);
    snipi_ilp_free(run, model.cost);

    if (model.coupled) {
        snipi_ilp_model_couple(&model, bits);
        snipi_ilp_join(run, whole, model.parts, model.n_parts);
        *proven = whole->proven >= whole->excess;
        left = whole->excess - whole->proven;
    }
    for (int p = 0; p < model.n_parts && !model.coupled; p++) {
        snipi_ilp_knapsack *part = &model.parts[p];
        (void)snipi_ilp_single(run, part);
        if (part->proven < part->excess) *proven = 0;
        left += part->excess - part->proven;
    }
    *gap = ldexp(left, -model.cost_exponent);
    for (int i = 0; i < problem->n_groups; i++)
        choice[model.order[i]] = snipi_ilp_items(whole, i)[whole->pick[i]].option;
    return 1;
}

// Sums in the caller's numbers, and the bound that the gap leaves.
static void snipi_ilp_report(const snipi_ilp_run *run, const snip_ilp_problem *problem, const int *choice, double gap,
                             int proven, snip_ilp_result *result) {
    const double rounding = 1e-14;  // of the sums that the gap comes from, relative to the cost
    long double cost = 0, gain = 0, least = 0;
    for (int i = 0; i < problem->n_groups; i++) {
        const snip_ilp_group *group = &problem->groups[i];
        double cheapest;
        (void)snipi_ilp_largest(group, &cheapest);
        cost += group->options[choice[i]].cost;
        gain += group->options[choice[i]].gain;
        least += cheapest;
    }
    result->cost = (double)cost;
    result->gain = (double)gain;
    result->bound = (double)least;
    if (result->cost * (1 - rounding) - gap > result->bound) result->bound = result->cost * (1 - rounding) - gap;
    if (proven || result->bound > result->cost) result->bound = result->cost;
    result->nodes = run->nodes;
    result->seconds = snipi_ilp_seconds(run);
}

SNIP_ILP_API snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params, int *choice,
                                            snip_ilp_result *result) {
    snip_ilp_params use = { 0, 0, 0 };
    if (params) use = *params;
    if (!snipi_ilp_problem_ok(problem) || (problem->n_groups > 0 && !choice)) return SNIP_ILP_BAD_ARGUMENT;
    if (!snipi_ilp_not_negative(use.time_limit) || !snipi_ilp_not_negative(use.rel_gap)) return SNIP_ILP_BAD_ARGUMENT;

    snipi_ilp_run run;
    memset(&run, 0, sizeof run);
    run.max_bytes = use.max_memory ? use.max_memory : SNIPI_ILP_DEFAULT_MEMORY;
    run.start = snipi_ilp_clock();
    run.deadline = use.time_limit > 0 ? run.start + use.time_limit : 0;
    run.rel_gap = use.rel_gap;

    double shortfall;
    if (snipi_ilp_unreachable(problem, &shortfall) >= 0) {
        if (result) {
            memset(result, 0, sizeof *result);
            result->seconds = snipi_ilp_seconds(&run);
        }
        return SNIP_ILP_INFEASIBLE;
    }

    double gap = 0;
    int proven = 1;
    if (problem->n_groups > 0 && !snipi_ilp_search(&run, problem, choice, &gap, &proven)) {
        double cheapest;
        for (int i = 0; i < problem->n_groups; i++) choice[i] = snipi_ilp_largest(&problem->groups[i], &cheapest);
        gap = SNIPI_ILP_HUGE;
        proven = 0;
    }
    snipi_ilp_free_since(&run, NULL);
    if (result) snipi_ilp_report(&run, problem, choice, gap, proven, result);
    return proven ? SNIP_ILP_OPTIMAL : SNIP_ILP_FEASIBLE;
}

SNIP_ILP_API int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall) {
    if (!snipi_ilp_problem_ok(problem)) return -2;
    double amount;
    const int target = snipi_ilp_unreachable(problem, &amount);
    if (shortfall) *shortfall = amount;
    return target;
}

#endif  // SNIP_ILP_IMPLEMENTATION
