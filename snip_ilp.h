/* snip_ilp.h - exact solver for the multiple-choice knapsack problem with covering targets. C99 or C++11 and later;
   only libc and libm. #define SNIP_ILP_IMPLEMENTATION (or SNIP_IMPLEMENTATION) before including it in one source file;
   elsewhere include it plainly. With SNIP_ILP_STATIC (or SNIP_STATIC) its functions are static to that file.

   THE PROBLEM. Group i has options j with cost c_ij >= 0 and gain g_ij >= 0. Choose one option x_i of each group:

       minimise   sum_i c_i,x_i
       such that  sum over the groups of stage s of g_i,x_i >= stage_target[s]     for every stage s
                  sum_i g_i,x_i >= total_target

   A target counts as met within 1e-12 of the sum of its groups' largest gains. In SNIP a group is a layer or a GEMM, an
   option its precision, cost the loss of quality, gain the work or time saved, a stage a pipeline stage.

       snip_ilp_option q[2] = {{0.0, 0.0}, {0.3, 1.0}}, k[2] = {{0.0, 0.0}, {0.1, 1.0}};
       snip_ilp_group groups[2] = {{q, 2, 0}, {k, 2, 0}};
       snip_ilp_problem problem = {2, groups, 0, NULL, 1.0};
       int choice[2];
       if (snip_ilp_solve(&problem, NULL, choice, NULL) == SNIP_ILP_OPTIMAL) ...    // choice is {0, 1}

   FAST: costs and gains not tied to one another. 560 groups of 2 to 27 options take about a millisecond, with or
   without stages and a total, 100,000 groups of 8 a tenth of a second. Reading, the LP bound and a first choice take
   linear time and are always completed; then the time limit is looked at every few thousand states. HARD (the problem
   is NP-hard): cost = gain + constant with large integers or 10,000 groups, and cost = gain in real numbers (subset
   sum). There the search ends at the memory limit, after seconds, FEASIBLE with a gap of 1e-7 to 1e-10 of the cost. Set
   time_limit. DETERMINISTIC: same input, same choice, on one machine and compiler, unless a time limit strikes.
   Thread-safe; no globals, no recursion. The clock is CLOCK_MONOTONIC or C11's timespec_get where the language mode
   declares them, else clock(), which counts all threads of the process and makes limits come early; SNIP_ILP_CLOCK()
   overrides it. MEMORY comes from SNIP_ILP_MALLOC/SNIP_ILP_FREE (define both), never exceeds max_memory and is all
   freed. When it runs out, what has been found is returned; without any, the largest gains are. Costs below 1e-300 of
   the largest count as zero; gains and targets below 2.3e-308, the least normal double, may be taken for one another.
 */
#ifndef SNIP_ILP_H
#define SNIP_ILP_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// Sections: >>api >>run >>check >>numbers >>sack >>lp >>greedy >>core >>curve >>states >>single >>join >>solve

// >>api
#if (defined(SNIP_STATIC) || defined(SNIP_ILP_STATIC)) && (defined(__GNUC__) || defined(__clang__))
#    define SNIP_ILP_API static __attribute__((unused))
#elif defined(SNIP_STATIC) || defined(SNIP_ILP_STATIC)
#    define SNIP_ILP_API static
#else
#    define SNIP_ILP_API extern
#endif
typedef struct {
    double cost, gain;
} snip_ilp_option;  // cost >= 0 is minimised; gain >= 0 counts toward the targets

typedef struct {
    const snip_ilp_option *options;
    int n_options;
    int stage;
} snip_ilp_group;  // exactly one option is chosen

typedef struct {
    int n_groups;
    const snip_ilp_group *groups;
    int n_stages;                // 0 is as good as 1: every group then has stage 0
    const double *stage_target;  // (n_stages) sum of gains in stage s >= stage_target[s]; <= 0: none for that stage;
                                 // NULL: none at all
    double total_target;         // sum of all gains >= this; <= 0: none
} snip_ilp_problem;

typedef struct {        // zeroes are the defaults
    double time_limit;  // seconds; 0: none
    double rel_gap;     // stop when cost - bound <= rel_gap * (cost above the sum of the cheapest options); 0: prove
                        // optimality
    size_t max_memory;  // bytes; 0: 512 MiB
} snip_ilp_params;

typedef struct {
    double cost, bound, gain, seconds;
    int64_t nodes;
} snip_ilp_result;  // no choice costs less than bound

typedef enum {
    SNIP_ILP_OPTIMAL = 0,  // proven to within 1e-12 of the cost above the sum of the cheapest options
    SNIP_ILP_FEASIBLE,     // stopped early; the least cost lies between bound and cost
    SNIP_ILP_INFEASIBLE,   // some target cannot be met: see snip_ilp_shortfall(); choice untouched, result zero but for
                           // seconds
    SNIP_ILP_BAD_ARGUMENT,  // nothing written. NaN, infinity, a negative cost, a group without options, a stage out of
                            // range, ...
    SNIP_ILP_OUT_OF_MEMORY  // not returned at present: the last resort needs no memory, and is FEASIBLE
} snip_ilp_status;

// Chooses an option of each group: choice[i] in 0 .. n_options-1. params and result may be NULL.
SNIP_ILP_API snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params,
                                            int *choice /* [n_groups] */, snip_ilp_result *result);

// Which target cannot be met by any choice, and by how much: the first stage s whose target is out of reach, else
// n_stages if the total is; -1 if all are in reach (to within their tolerance), -2 for a bad argument. *shortfall (may
// be NULL) becomes the target minus the sum of the largest gains, or 0 if all are in reach. Linear time, no memory.
SNIP_ILP_API int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall);

#ifdef __cplusplus
}
#endif
#endif  // SNIP_ILP_H

/* ---------------------------------------- the API ends here; the rest is the implementation
 * ---------------------------------------- */

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

// >>run: what a call carries along: memory, clock, tolerances
#define SNIPI_ILP_TOLERANCE 1e-12     // of a target, relative to the sum of the largest gains
#define SNIPI_ILP_PROOF 5e-13         // of the optimum; half of what is promised, the rest is for rounding
#define SNIPI_ILP_HUGE (DBL_MAX / 4)  // stands for infinity, which -Ofast does not know

typedef struct snipi_ilp_block {
    struct snipi_ilp_block *older;
    size_t bytes;
} snipi_ilp_block;

typedef struct {
    snipi_ilp_block *newest;
    size_t used, limit;
    double start, deadline;     // seconds; deadline 0: none
    double rel_gap, cost_step;  // cost_step: different costs differ by at least this; 0: not known
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

static double snipi_ilp_seconds(
    const snipi_ilp_run *run) {  // not an ulp below 0, where -Ofast rounds the two readings apart
    double seconds = snipi_ilp_clock() - run->start;
    return seconds > 0 ? seconds : 0;
}

static int snipi_ilp_late(snipi_ilp_run *run) {
    return run->late = run->late || (run->deadline > 0 && snipi_ilp_clock() >= run->deadline);
}

// NULL when the limit or the heap is exhausted. Blocks are chained, so that whole stretches of work can be freed at
// once.
static void *snipi_ilp_take(snipi_ilp_run *run, size_t count, size_t size) {
    snipi_ilp_block *b;
    if (count > (SIZE_MAX - sizeof *b) / size || count * size + sizeof *b > run->limit - run->used) return NULL;
    b = (snipi_ilp_block *)SNIP_ILP_MALLOC(count * size + sizeof *b);
    if (!b) return NULL;
    b->bytes = count * size + sizeof *b;
    b->older = run->newest;
    run->newest = b;
    run->used += b->bytes;
    return b + 1;
}

#define SNIPI_ILP_TAKE(run, type, count) ((type *)snipi_ilp_take(run, (size_t)(count), sizeof(type)))

static void snipi_ilp_give(snipi_ilp_run *run, void *pointer) {  // it is among the newest
    snipi_ilp_block **link = &run->newest, *b = (snipi_ilp_block *)pointer - 1;
    while (*link != b) link = &(*link)->older;
    *link = b->older;
    run->used -= b->bytes;
    SNIP_ILP_FREE(b);
}

static void snipi_ilp_give_since(snipi_ilp_run *run, const snipi_ilp_block *mark) {
    while (run->newest != mark) snipi_ilp_give(run, run->newest + 1);
}

// >>check: the arguments, and whether the largest gains meet the targets; needs no memory
static int snipi_ilp_finite(double x) {  // by bits: -Ofast takes it for granted
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ((bits >> 52) & 0x7ff) != 0x7ff;
}

static int snipi_ilp_problem_ok(const snip_ilp_problem *p) {
    int i, j;
    if (!p || p->n_groups < 0 || p->n_stages < 0 || (p->n_groups > 0 && !p->groups) ||
        !snipi_ilp_finite(p->total_target))
        return 0;
    for (i = 0; p->stage_target && i < p->n_stages; i++)
        if (!snipi_ilp_finite(p->stage_target[i])) return 0;
    for (i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *g = &p->groups[i];
        if (!g->options || g->n_options < 1 || g->stage < 0 || g->stage >= (p->n_stages > 1 ? p->n_stages : 1))
            return 0;
        for (j = 0; j < g->n_options; j++) {
            const snip_ilp_option *o = &g->options[j];
            if (!snipi_ilp_finite(o->cost) || !snipi_ilp_finite(o->gain) || o->cost < 0 || o->gain < 0) return 0;
        }
    }
    return 1;
}

// The option of largest gain, of equals the cheapest; *least: the least cost.
static int snipi_ilp_largest(const snip_ilp_group *g, double *least) {
    int j, best = 0;
    for (j = 0, *least = g->options[0].cost; j < g->n_options; j++) {
        const snip_ilp_option *o = &g->options[j], *b = &g->options[best];
        if (o->gain > b->gain || (o->gain >= b->gain && o->cost < b->cost)) best = j;
        if (o->cost < *least) *least = o->cost;
    }
    return best;
}

// Without stage targets all is one stage.
static int snipi_ilp_stages(const snip_ilp_problem *p) { return p->stage_target && p->n_stages > 1 ? p->n_stages : 1; }

static int snipi_ilp_stage(const snip_ilp_problem *p, int group) {
    return p->stage_target ? p->groups[group].stage : 0;
}

static double snipi_ilp_stage_target(const snip_ilp_problem *p, int stage) {
    return p->stage_target && stage < p->n_stages && p->stage_target[stage] > 0 ? p->stage_target[stage] : 0;
}

// As snip_ilp_shortfall(). Stages are summed a chunk at a time, so that their sums fit on the stack.
static int snipi_ilp_unreachable(const snip_ilp_problem *p, double *shortfall) {
    enum { CHUNK = 128 };

    long double sum[CHUNK], all = 0, lack;
    double least;
    int i, s, stages = snipi_ilp_stages(p), left;
    for (left = stages; left > 0; left -= CHUNK) {
        int first = stages - left;
        for (s = 0; s < CHUNK; s++) sum[s] = 0;
        for (i = 0; i < p->n_groups; i++) {
            s = snipi_ilp_stage(p, i) - first;
            if (s >= 0 && s < CHUNK) sum[s] += p->groups[i].options[snipi_ilp_largest(&p->groups[i], &least)].gain;
        }
        for (s = 0; s < CHUNK && s < left; s++) {
            lack = snipi_ilp_stage_target(p, first + s) - sum[s];
            if (lack > SNIPI_ILP_TOLERANCE * sum[s]) {
                *shortfall = (double)lack;
                return first + s;
            }
            all += sum[s];
        }
    }
    lack = p->total_target - all;
    *shortfall = lack > SNIPI_ILP_TOLERANCE * all ? (double)lack : 0;
    return lack > SNIPI_ILP_TOLERANCE * all ? p->n_stages : -1;
}

// >>numbers: gains become integers, so that sums of gains are exact and equal sums are equal
static double snipi_ilp_off_lattice(double q) { return fabs(q - floor(q + 0.5)); }

// The unit of which all values are multiples, or 0, by Euclid's algorithm on rounded numbers. It is snapped to a
// fraction of the largest value at every step, which keeps it from drifting. *error is the sum of the distances to the
// lattice, in units.
static double snipi_ilp_common_unit(const double *x, size_t n, double *error) {
    double largest = 0, unit;
    size_t i;
    for (i = 0; i < n; i++)
        if (x[i] > largest) largest = x[i];
    unit = largest;
    for (i = 0; i < n; i++) {
        double q = unit > 0 ? x[i] / unit : 0, a = x[i] > unit ? x[i] : unit, b = x[i] > unit ? unit : x[i];
        if (x[i] > 0 && x[i] < largest * 1e-7) return 0;
        if (snipi_ilp_off_lattice(q) <= 1e-9 * (q > 1 ? q : 1) && (q > 0.5 || x[i] <= 0)) continue;
        while (b > largest * 1e-8) {
            double r = fabs(a - floor(a / b + 0.5) * b);
            a = b;
            b = r;
        }
        if (a < largest * 1e-7) return 0;
        unit = largest / floor(largest / a + 0.5);
    }
    for (i = 0, *error = 0; i < n && unit > 0; i++) *error += snipi_ilp_off_lattice(x[i] / unit);
    return unit;
}

typedef struct {            // integer = round(gain * 2^exponent * per_unit)
    int exponent, bits;     // off a lattice, integer = round(gain * 2^bits)
    double step;            // of the lattice, times 2^exponent; 0: none
    double per_unit, most;  // most: sum of the groups' largest gains, in units
    double rounding;        // how far the integer sum of a choice may be off
} snipi_ilp_unit;

// The least integer sum sure to be within the tolerance of the target, but none that keeps out a choice that truly
// meets it.
static int64_t snipi_ilp_need(const snipi_ilp_unit *u, double target, int64_t most) {
    double tolerance = SNIPI_ILP_TOLERANCE * u->most - u->rounding, need = 0;
    if (tolerance < u->rounding) tolerance = u->rounding;
    if (target > 0) need = ceil(ldexp(target, u->exponent) * u->per_unit - tolerance);
    return need < 0 ? 0 : need > (double)most ? most : (int64_t)need;  // at most `most`: it was found reachable
}

// >>sack: one knapsack: min sum(cost - mu * gain) over the choices with sum(gain) >= need
typedef struct {
    int64_t gain;
    double cost;
    int option;
} snipi_ilp_item;

typedef struct {
    int n;                  // groups
    size_t *first;          // (n + 1) group i owns items first[i] .. first[i+1]-1
    snipi_ilp_item *items;  // gain and cost strictly increase within a group, from cost 0
    int64_t need;
    double mu;              // reward for a unit of gain: 0 but in the coupled problem
    int shift;              // in the coupled problem: a unit of the total's gain is 2^shift of this one's
    double spent;           // cost above the cheapest options that is not in the items
    int *pick;              // (n) the best choice so far, by item
    double excess, proven;  // of pick above the LP bound; a lower bound of any choice's
    // found by snipi_ilp_relax():
    int *base;                // (n) the LP's choice, rounded down
    int64_t lack;             // need minus the gain of base
    double theta, base_cost;  // the LP's multiplier, >= mu
} snipi_ilp_sack;

static snipi_ilp_item *snipi_ilp_items(const snipi_ilp_sack *k, int group) { return k->items + k->first[group]; }

static int snipi_ilp_count(const snipi_ilp_sack *k, int group) { return (int)(k->first[group + 1] - k->first[group]); }

static int64_t snipi_ilp_gain(const snipi_ilp_sack *k, const int *pick) {
    int64_t gain = 0;
    int i;
    for (i = 0; i < k->n; i++) gain += snipi_ilp_items(k, i)[pick[i]].gain;
    return gain;
}

static double snipi_ilp_cost(const snipi_ilp_sack *k, const int *pick) {
    long double cost = 0;
    int i;
    for (i = 0; i < k->n; i++) cost += snipi_ilp_items(k, i)[pick[i]].cost;
    return (double)cost;
}

// Defines a Shell sort: no recursion, and the same order everywhere.
#define SNIPI_ILP_SORT(name, type, x_before_y)                                            \
    static void name(type *a, size_t n) {                                                 \
        size_t gap, i, j;                                                                 \
        for (gap = n > 40 ? n / 2 : 1; gap > 0; gap = gap > 2 ? gap * 5 / 11 : gap / 2)   \
            for (i = gap; i < n; i++) {                                                   \
                type x = a[i], y;                                                         \
                for (j = i; j >= gap && (y = a[j - gap], x_before_y); j -= gap) a[j] = y; \
                a[j] = x;                                                                 \
            }                                                                             \
    }
SNIPI_ILP_SORT(snipi_ilp_sort_items, snipi_ilp_item, x.gain < y.gain || (x.gain == y.gain && x.cost > y.cost))

// Drops the items that another beats or equals in both gain and cost; sorts the rest. Returns how many stay.
static int snipi_ilp_undominated(snipi_ilp_item *o, int n) {
    double least = SNIPI_ILP_HUGE;
    int i, kept = n;
    snipi_ilp_sort_items(o, (size_t)n);
    for (i = n - 1; i >= 0; i--)  // from the largest gain down costs must fall; survivors gather at the end
        if (o[i].cost < least) least = o[i].cost, o[--kept] = o[i];
    memmove(o, o + kept, (size_t)(n - kept) * sizeof *o);
    return n - kept;
}

// >>lp: the linear relaxation. The lower convex hull of each group is cut into segments; taken by slope until need is
// met they solve the LP (Sinha & Zoltners 1979). The one that meets it is found in linear time by weighted quickselect
// (Dyer 1984, Zemel 1984).
typedef struct {
    double slope;
    int64_t gain;
    int group, item;
} snipi_ilp_segment;  // of a hull, ending at item
SNIPI_ILP_SORT(snipi_ilp_sort_segments, snipi_ilp_segment, x.slope < y.slope)

// What an item costs more than base, less theta for each unit it gains more: not negative but for rounding, if base is
// the LP's.
static double snipi_ilp_reduced(const snipi_ilp_item *o, const snipi_ilp_item *base, double theta) {
    double r = (o->cost - base->cost) - theta * (double)(o->gain - base->gain);
    return r > 0 ? r : 0;
}

// Writes the hull of reduced cost below limit over gain won from base upward (step 1) or given up downward (-1);
// returns its end.
static snipi_ilp_segment *snipi_ilp_hull(const snipi_ilp_item *o, int count, int base, int step, double theta,
                                         double limit, int group, snipi_ilp_segment *hull) {
    snipi_ilp_segment *s = hull;
    int j;
    for (j = base + step; j >= 0 && j < count; j += step) {
        double reduced = snipi_ilp_reduced(&o[j], &o[base], theta);
        if (reduced >= limit) continue;
        for (;; s--) {
            const snipi_ilp_item *from = &o[s > hull ? s[-1].item : base];
            s->gain = (o[j].gain - from->gain) * step;
            s->slope = (reduced - snipi_ilp_reduced(from, &o[base], theta)) / (double)s->gain;
            if (s == hull || s[-1].slope < s->slope) break;
        }
        s->group = group, s->item = j;
        s++;
    }
    return s;
}

static size_t snipi_ilp_segments(const snipi_ilp_sack *k, snipi_ilp_segment *s) {
    snipi_ilp_segment *end = s;
    int i;
    for (i = 0; i < k->n; i++)
        end = snipi_ilp_hull(snipi_ilp_items(k, i), snipi_ilp_count(k, i), 0, 1, 0, SNIPI_ILP_HUGE, i, end);
    return (size_t)(end - s);
}

static size_t snipi_ilp_most_segments(const snipi_ilp_sack *k) {
    return k->first[k->n] - k->first[0] - (size_t)k->n + 1;
}

static void snipi_ilp_swap(snipi_ilp_segment *a, snipi_ilp_segment *b) {
    snipi_ilp_segment t = *a;
    *a = *b;
    *b = t;
}

// Reorders the segments so that the first p, all of least slope, gain less than need, and reach it with the next;
// returns p.
static size_t snipi_ilp_select(snipi_ilp_segment *s, size_t n, int64_t need) {
    size_t low = 0, high = n, i;
    if (need <= 0) return 0;
    while (high - low > 24) {
        double a = s[low + (high - low) / 4].slope, b = s[low + (high - low) / 2].slope,
               c = s[low + (high - low) / 4 * 3].slope;
        double pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        size_t less = low, more = high;
        int64_t below = 0, equal = 0;
        for (i = low; i < more;) {
            if (s[i].slope < pivot) {
                below += s[i].gain;
                snipi_ilp_swap(&s[less++], &s[i++]);
            } else if (s[i].slope > pivot)
                snipi_ilp_swap(&s[--more], &s[i]);
            else
                equal += s[i++].gain;
        }
        if (below >= need) {
            high = less;
            continue;
        }
        need -= below;
        low = less;
        if (equal >= need) {
            high = more;
            break;
        }  // all of one slope: any order will do
        need -= equal;
        low = more;
    }
    if (high - low <= 24) snipi_ilp_sort_segments(s + low, high - low);
    for (i = low; i < high && s[i].gain < need; i++) need -= s[i].gain;
    return i;
}

// Finds base, lack and theta; need must be in reach. Returns 0 when memory is short.
static int snipi_ilp_relax(snipi_ilp_run *run, snipi_ilp_sack *k) {
    snipi_ilp_segment *s = SNIPI_ILP_TAKE(run, snipi_ilp_segment, snipi_ilp_most_segments(k));
    size_t i, m, taken = 0;
    if (!s) return 0;
    m = snipi_ilp_segments(k, s);
    memset(k->base, 0, (size_t)k->n * sizeof *k->base);
    k->lack = k->need - snipi_ilp_gain(k, k->base);
    k->theta = k->mu;
    for (i = 0; i < m && k->mu > 0; i++)  // these pay for themselves
        if (s[i].slope < k->mu) {
            k->lack -= s[i].gain;
            snipi_ilp_swap(&s[taken++], &s[i]);
        }
    if (k->lack > 0 && m > taken) {
        taken += snipi_ilp_select(s + taken, m - taken, k->lack);
        k->theta = s[taken < m ? taken : m - 1].slope;
    }
    for (i = 0; i < taken; i++)
        if (k->base[s[i].group] < s[i].item) k->base[s[i].group] = s[i].item;
    snipi_ilp_give(run, s);
    k->lack = k->need - snipi_ilp_gain(k, k->base);
    k->base_cost = snipi_ilp_cost(k, k->base);
    return 1;
}

// From here on a choice is valued by its excess over the LP bound, a sum of small numbers that are not negative, so
// that little is lost to rounding: the reduced costs of its items, plus (theta - mu) for each unit of gain beyond need.
// This is its cost:
static double snipi_ilp_cost_of(const snipi_ilp_sack *k, double excess) {
    return k->spent + k->base_cost + (k->lack > 0 ? k->theta * (double)k->lack : 0) + excess;
}

// How much cheaper a choice must be to count as better than one of this cost. With mu it is not the cost alone that
// counts, and no step.
static double snipi_ilp_margin(const snipi_ilp_run *run, double cost, double mu, double rel_gap) {
    double margin = SNIPI_ILP_PROOF * cost;
    if (mu <= 0 && margin < 0.99 * run->cost_step) margin = 0.99 * run->cost_step;
    return margin < rel_gap * cost ? rel_gap * cost : margin;
}

// Whether all that would count as better than k's pick, of this cost, has been looked for. Else *cut is the excess that
// it is below.
static int snipi_ilp_settled(const snipi_ilp_run *run, snipi_ilp_sack *k, double cost, double *cut) {
    double margin = snipi_ilp_margin(run, cost, k->mu, run->rel_gap);
    *cut = k->excess - margin;
    if (k->proven < *cut) return 0;
    k->proven = margin <= snipi_ilp_margin(run, cost, k->mu, 0) ? k->excess : *cut > 0 ? *cut : 0;
    return 1;
}

// >>greedy: a first choice: base and the cheapest single upgrade that meets need; the break segment is one. In the
// coupled problem also all that is worth exactly mu, which meets the total.
static void snipi_ilp_greedy(snipi_ilp_sack *k) {
    int64_t surplus = -k->lack;
    double least = SNIPI_ILP_HUGE;
    int i, j, group = -1, item = 0, ties = k->mu > 0 && k->theta <= k->mu;
    for (i = 0, k->excess = 0; i < k->n; i++) {
        const snipi_ilp_item *o = snipi_ilp_items(k, i), *b = o + k->base[i];
        k->pick[i] = k->base[i];
        for (j = snipi_ilp_count(k, i) - 1; j > k->base[i]; j--) {
            double cost = (o[j].cost - b->cost) - k->mu * (double)(o[j].gain - b->gain),
                   reduced = snipi_ilp_reduced(&o[j], b, k->theta);
            if (ties && reduced <= 1e-14 * (o[j].cost - b->cost)) {
                k->pick[i] = j, surplus += o[j].gain - b->gain, k->excess += reduced;
                break;
            }
            if (o[j].gain - b->gain >= k->lack && cost < least) least = cost, group = i, item = j;
        }
    }
    if (surplus < 0 && group >= 0) {
        const snipi_ilp_item *o = snipi_ilp_items(k, group), *b = o + k->base[group], *old = o + k->pick[group];
        surplus += o[item].gain - old->gain;
        k->excess += snipi_ilp_reduced(&o[item], b, k->theta) - snipi_ilp_reduced(old, b, k->theta);
        k->pick[group] = item;
    }
    k->excess += (k->theta - k->mu) * (double)surplus;
}

// >>core: the groups that have another item than base of reduced cost below a limit, the most ambiguous first (Pisinger
// 1995). Choices of excess below the limit differ from base only there. Dynamic programming goes through them row by
// row (>>states).
typedef struct {
    int64_t gain;
    double cost, reduced;
    int item;
} snipi_ilp_move;  // all relative to base, which is one of them

typedef struct {
    double key;
    int group, count;
    snipi_ilp_move *move;
} snipi_ilp_row;  // (count) by gain

typedef struct {
    int parent, move;
} snipi_ilp_step;  // parent: a state of the row before

typedef struct {
    int64_t gain;
    double cost;
    snipi_ilp_step step;
} snipi_ilp_state;  // gain and cost relative to base

typedef struct {
    int rows;
    snipi_ilp_row *row;
    snipi_ilp_segment
        *side[2];  // up, for a lack of gain, and down, for a surplus: hulls of reduced cost over gain won or given up,
    snipi_ilp_segment *end[2];  // by slope; group is the row
    snipi_ilp_step **step;      // (rows) of each row's states
    snipi_ilp_state *state;     // of the last row
    int states;
} snipi_ilp_core;
SNIPI_ILP_SORT(snipi_ilp_sort_rows, snipi_ilp_row, x.key < y.key)

// The least reduced cost of a group's items other than base; *count: base and those below limit.
static double snipi_ilp_ambiguity(const snipi_ilp_sack *k, int group, double limit, int *count) {
    const snipi_ilp_item *o = snipi_ilp_items(k, group), *b = o + k->base[group], *end = o + snipi_ilp_count(k, group);
    double least = SNIPI_ILP_HUGE;
    for (*count = 1; o < end; o++) {
        double reduced = o == b ? SNIPI_ILP_HUGE : snipi_ilp_reduced(o, b, k->theta);
        if (reduced < least) least = reduced;
        *count += reduced < limit;
    }
    return least;
}

// Returns 0 when memory is short; what was taken stays for snipi_ilp_give_since().
static int snipi_ilp_core_make(snipi_ilp_run *run, const snipi_ilp_sack *k, double limit, snipi_ilp_core *c) {
    snipi_ilp_row *r = SNIPI_ILP_TAKE(run, snipi_ilp_row, k->n);
    snipi_ilp_move *move;
    size_t m = 0;
    int i, j, down;
    memset(c, 0, sizeof *c);
    if (!r) return 0;
    for (i = 0, c->row = r; i < k->n; i++) {
        r->group = i;
        r->key = snipi_ilp_ambiguity(k, i, limit, &r->count);
        if (r->count > 1) m += (size_t)r->count, r++;
    }
    c->rows = (int)(r - c->row);
    snipi_ilp_sort_rows(c->row, (size_t)c->rows);
    c->step = SNIPI_ILP_TAKE(run, snipi_ilp_step *, c->rows);
    for (down = 0; down < 2; down++) c->end[down] = c->side[down] = SNIPI_ILP_TAKE(run, snipi_ilp_segment, m + 1);
    move = SNIPI_ILP_TAKE(run, snipi_ilp_move, m);
    if (!move || !c->step || !c->side[0] || !c->side[1]) return 0;
    for (i = 0; i < c->rows; i++) {
        int group = c->row[i].group, count = snipi_ilp_count(k, group), base = k->base[group];
        const snipi_ilp_item *o = snipi_ilp_items(k, group), *b = o + base;
        for (j = 0, c->row[i].move = move; j < count; j++) {
            double reduced = snipi_ilp_reduced(&o[j], b, k->theta);
            if (reduced >= limit && j != base) continue;
            move->gain = o[j].gain - b->gain, move->cost = o[j].cost - b->cost, move->reduced = reduced, move->item = j;
            move++;
        }
        for (down = 0; down < 2; down++)
            c->end[down] = snipi_ilp_hull(o, count, base, down ? -1 : 1, k->theta, limit, i, c->end[down]);
    }
    for (down = 0; down < 2; down++) snipi_ilp_sort_segments(c->side[down], (size_t)(c->end[down] - c->side[down]));
    return 1;
}

// A first guess of the gap: the reduced cost of the 16th most ambiguous group.
static double snipi_ilp_guess(const snipi_ilp_sack *k) {
    enum { RANK = 16 };

    double key[RANK];
    int i, j, found = 0;
    for (i = 0; i < k->n; i++) {
        double least = snipi_ilp_ambiguity(k, i, 0, &j);
        if (snipi_ilp_count(k, i) == 1 || (found == RANK && least >= key[RANK - 1])) continue;
        if (found < RANK) found++;
        for (j = found - 1; j > 0 && key[j - 1] > least; j--) key[j] = key[j - 1];
        key[j] = least;
    }
    return found ? key[found - 1] : 0;
}

// >>curve: the LP bound of the rows not yet decided, as a function of the gain still lacking (negative: a surplus)
typedef struct {
    int64_t gain;
    double value, slope;
} snipi_ilp_point;  // sums to the end of a segment, and its slope; point 0: the origin

typedef struct {
    double price;  // theta - mu, for each unit of gain beyond need
    snipi_ilp_point *side[2];
    size_t points[2], at[2];  // at: the point of the last question; questions come with rising lack
} snipi_ilp_curve;

// For rows from row on, and no larger lack or surplus.
static void snipi_ilp_curve_make(const snipi_ilp_core *c, int row, int64_t lack, int64_t surplus, snipi_ilp_curve *v) {
    int down;
    for (down = 0; down < 2; down++) {
        const snipi_ilp_segment *s = c->side[down], *end = c->end[down];
        snipi_ilp_point sum = { 0, 0, 0 };
        v->points[down] = 0;
        for (v->side[down][0] = sum; s < end && sum.gain <= (down ? surplus : lack) && !(down && s->slope >= v->price);
             s++) {
            if (s->group < row) continue;
            sum.gain += s->gain, sum.value += s->slope * (double)s->gain, sum.slope = s->slope;
            v->side[down][++v->points[down]] = sum;
        }
    }
}

// The bound; in *rounded the excess of the LP's choice, rounded to meet need, which takes *taken segments. HUGE if need
// is out of reach.
static double snipi_ilp_curve_ask(snipi_ilp_curve *v, int64_t lack, double *rounded, size_t *taken) {
    int down = lack <= 0;
    const snipi_ilp_point *s = v->side[down];
    size_t n = v->points[down], at = v->at[down];  // the segment asked for ends at s[at + 1]
    if (down) {
        while (at > 0 && s[at].gain > -lack) at--;
        v->at[1] = *taken = at;
        *rounded = s[at].value + v->price * (double)(-lack - s[at].gain);
        return s[at].value + (at < n ? s[at + 1].slope : v->price) * (double)(-lack - s[at].gain);
    }
    while (at < n && s[at + 1].gain < lack) at++;
    v->at[0] = at;
    *taken = at + 1;
    if (at == n) return *rounded = SNIPI_ILP_HUGE;
    *rounded = s[at + 1].value + v->price * (double)(s[at + 1].gain - lack);
    return s[at].value + s[at + 1].slope * (double)(lack - s[at].gain);
}

// >>states: dynamic programming over the rows by lists of undominated states (Nemhauser & Ullmann 1969), sorted by
// falling gain. States are pruned by the bound before the dominance merge, which spares most of the merging; each one's
// rounded LP choice is a candidate.
typedef struct {
    double excess;
    int row, down;
    snipi_ilp_step step;
    size_t segments;
} snipi_ilp_best;  // a state, and its completion

// Merges two lists, keeping of no higher gain only what is cheaper.
static int snipi_ilp_merge(const snipi_ilp_state *a, int na, const snipi_ilp_state *b, int nb, snipi_ilp_state *out) {
    double least = SNIPI_ILP_HUGE;
    int i = 0, j = 0, n = 0;
    while (i < na || j < nb) {
        int first = j == nb ||
                    (i < na && (a[i].gain > b[j].gain || (a[i].gain == b[j].gain && a[i].cost <= b[j].cost)));
        const snipi_ilp_state *s = first ? &a[i++] : &b[j++];
        if (s->cost < least) least = s->cost, out[n++] = *s;
    }
    return n;
}

// Makes the core and looks at all choices of excess below limit. With best, for one of excess below best->excess;
// without, c->state becomes the undominated ones that meet need. Returns 0 when time or memory is short; what was taken
// stays for snipi_ilp_give_since().
static int snipi_ilp_states(snipi_ilp_run *run, const snipi_ilp_sack *k, double limit, snipi_ilp_best *best,
                            snipi_ilp_core *c) {
    snipi_ilp_curve v;
    int row, i, j, n;
    if (!snipi_ilp_core_make(run, k, limit, c)) return 0;
    v.price = k->theta - k->mu;
    c->state = SNIPI_ILP_TAKE(run, snipi_ilp_state, 1);
    for (j = 0; j < 2; j++) v.side[j] = SNIPI_ILP_TAKE(run, snipi_ilp_point, c->end[j] - c->side[j] + 1);
    if (!c->state || !v.side[0] || !v.side[1]) return 0;
    memset(c->state, 0, sizeof *c->state);
    c->states = c->rows > 0 || k->lack <= 0;
    for (row = 0; row < c->rows && c->states; row++) {
        const snipi_ilp_move *move = c->row[row].move;
        const int64_t most = c->state[0].gain + move[c->row[row].count - 1].gain,
                      least = c->state[c->states - 1].gain + move[0].gain;
        snipi_ilp_state *shifted = SNIPI_ILP_TAKE(run, snipi_ilp_state, c->states), *all = NULL, *merged;
        int alls = 0;
        if (!shifted) return 0;
        snipi_ilp_curve_make(c, row + 1, k->lack - least, most - k->lack, &v);
        for (j = 0; j < c->row[row].count; j++) {
            if (move[j].reduced > limit) continue;
            v.at[0] = 0, v.at[1] = v.points[1];
            for (i = n = 0; i < c->states; i++) {
                int64_t gain = c->state[i].gain + move[j].gain;
                double cost = c->state[i].cost + move[j].cost, reduced = cost - k->theta * (double)gain, rounded;
                size_t taken;
                double bound = reduced + snipi_ilp_curve_ask(&v, k->lack - gain, &rounded, &taken);
                if (bound >= SNIPI_ILP_HUGE / 2) break;  // out of reach, as are all of less gain
                if ((i & 4095) == 4095 && snipi_ilp_late(run)) return 0;
                if (best && rounded + reduced < best->excess) {
                    double cut = rounded + reduced -
                                 snipi_ilp_margin(run, snipi_ilp_cost_of(k, rounded + reduced), k->mu, run->rel_gap);
                    best->excess = rounded + reduced, best->row = row, best->step.parent = i, best->step.move = j;
                    best->down = gain >= k->lack, best->segments = taken;
                    if (cut < limit) limit = cut;
                }
                if (bound >= limit) continue;
                shifted[n].gain = gain, shifted[n].cost = cost, shifted[n].step.parent = i, shifted[n].step.move = j;
                n++;
            }
            run->nodes += i;
            if (!n) continue;
            merged = alls < INT_MAX - n ? SNIPI_ILP_TAKE(run, snipi_ilp_state, alls + n) : NULL;
            if (!merged) return 0;
            alls = snipi_ilp_merge(all, alls, shifted, n, merged);
            if (all) snipi_ilp_give(run, all);
            all = merged;
        }
        snipi_ilp_give(run, shifted);
        snipi_ilp_give(run, c->state);
        c->state = all, c->states = alls;
        c->step[row] = SNIPI_ILP_TAKE(run, snipi_ilp_step, alls);
        if (!c->step[row] || snipi_ilp_late(run)) return 0;
        for (i = 0; i < alls; i++) c->step[row][i] = all[i].step;
    }
    return 1;
}

// Picks what a state stands for: base, its own move, those of the steps from its parent back, and the segments of the
// rows beyond it.
static void snipi_ilp_trace(const snipi_ilp_sack *k, const snipi_ilp_core *c, const snipi_ilp_best *best) {
    const snipi_ilp_segment *s = c->side[best->down];
    snipi_ilp_step step = best->step;
    size_t left = best->segments;
    int row;
    memcpy(k->pick, k->base, (size_t)k->n * sizeof *k->pick);
    for (row = best->row; row >= 0; row--) {
        k->pick[c->row[row].group] = c->row[row].move[step.move].item;
        if (row) step = c->step[row - 1][step.parent];
    }
    for (; left > 0; s++)
        if (s->group > best->row) k->pick[c->row[s->group].group] = s->item, left--;
}

// >>single: one knapsack by itself
// Improves pick until proven. The gap is guessed: a round looks at all choices below the guess and either finds the
// best or raises the bound to the guess; a core as wide as the first choice's gap may be far too wide. Returns 0 when
// time or memory is short.
static int snipi_ilp_refine(snipi_ilp_run *run, snipi_ilp_sack *k) {
    const snipi_ilp_block *mark = run->newest;
    double guess = snipi_ilp_guess(k), cut;
    if (guess < k->excess / 1024) guess = k->excess / 1024;
    for (k->proven = 0; !snipi_ilp_settled(run, k, snipi_ilp_cost_of(k, k->excess), &cut); guess *= 3) {
        double limit = guess < cut ? guess : cut;
        snipi_ilp_core core;
        snipi_ilp_best best = {
            k->excess, 0, 0, {0, 0},
               0
        };
        int done;
        if (snipi_ilp_late(run)) return 0;
        done = snipi_ilp_states(run, k, limit, &best, &core);
        if (best.excess < k->excess) snipi_ilp_trace(k, &core, &best);
        k->excess = best.excess;
        snipi_ilp_give_since(run, mark);
        if (!done) return 0;
        k->proven = limit;
    }
    return 1;
}

// Takes pick as it is, at the largest gains, when memory is short for the LP. Returns 0 when time or memory is short.
static int snipi_ilp_single(snipi_ilp_run *run, snipi_ilp_sack *k) {
    k->excess = snipi_ilp_cost(k, k->pick), k->proven = 0;
    if (!snipi_ilp_relax(run, k)) return 0;
    snipi_ilp_greedy(k);
    return snipi_ilp_refine(run, k);
}

// >>join: parts with targets of their own and a target over all. A multiplier mu on the latter separates the parts
// (Lagrange); each part's choices within the gap are listed, and one of each list is chosen by a small knapsack of the
// same kind. `whole` has the groups of all parts and the total's need. The LP of parts within a total: each part takes
// what it needs, then all take the cheapest segments that are left; mu, whole's theta, is the slope of the last. Any mu
// gives a valid bound. Returns 0 when memory is short.
static int snipi_ilp_join_relax(snipi_ilp_run *run, snipi_ilp_sack *whole, snipi_ilp_sack *part, int parts) {
    size_t n = 0, i, m;
    int64_t missing = whole->need;
    snipi_ilp_segment *s = SNIPI_ILP_TAKE(run, snipi_ilp_segment, snipi_ilp_most_segments(whole) + 2 * (size_t)parts);
    int p;
    if (!s) return 0;
    for (p = 0; p < parts; p++) {
        snipi_ilp_sack *k = &part[p];
        int64_t rest;  // what its last segments give beyond its need
        double per_unit = ldexp(1.0, k->shift);
        if (!snipi_ilp_relax(run, k)) return 0;
        rest = k->lack > 0 ? -k->lack : 0;
        missing -= (k->lack > 0 ? k->need : k->need - k->lack) >> k->shift;
        for (i = n, m = n + snipi_ilp_segments(k, s + n); i < m; i++) {
            if (s[i].item <= k->base[s[i].group]) continue;
            if (s[i].slope <= k->theta) {
                rest += s[i].gain;
                continue;
            }
            s[n] = s[i];
            s[n].slope *= per_unit;
            s[n++].gain >>= k->shift;
        }
        if (rest > 0)
            s[n].slope = k->theta * per_unit, s[n].gain = rest >> k->shift, s[n].group = -1 - p, s[n].item = 0, n++;
    }
    whole->theta = 0;
    if (missing > 0 && n) {
        i = snipi_ilp_select(s, n, missing);
        whole->theta = s[i < n ? i : n - 1].slope;
    }
    snipi_ilp_give(run, s);
    for (p = 0; p < parts && missing > 0; p++) {
        part[p].mu = ldexp(whole->theta, -part[p].shift);
        if (!snipi_ilp_relax(run, &part[p])) return 0;
    }
    return 1;
}

// Takes cheaper items, group after group, as far as the surplus allows; returns the change of the cost, which is that
// of the excess.
static double snipi_ilp_join_spend(const snipi_ilp_sack *part, int parts, int64_t surplus) {
    double change = 0;
    int p, i, j;
    for (p = 0; p < parts; p++) {
        const snipi_ilp_sack *k = &part[p];
        int64_t gain = snipi_ilp_gain(k, k->pick);
        for (i = 0; i < k->n; i++) {
            const snipi_ilp_item *o = snipi_ilp_items(k, i), *b = o + k->pick[i];
            for (j = 0; j < k->pick[i]; j++) {
                int64_t left = gain - b->gain + o[j].gain, rest = surplus + (left >> k->shift) - (gain >> k->shift);
                if (left < k->need || rest < 0) continue;
                change += o[j].cost - b->cost;
                gain = left, surplus = rest;
                k->pick[i] = j;
                break;
            }
        }
    }
    return change;
}

// Chooses a state of each part's list; takes it into whole's pick if that is better. Returns 0 when time or memory is
// short.
static int snipi_ilp_join_choose(snipi_ilp_run *run, snipi_ilp_sack *whole, const snipi_ilp_sack *part, int parts,
                                 const snipi_ilp_core *list) {
    snipi_ilp_sack top;
    size_t items = 0;
    int64_t surplus = -whole->need;
    int p, i, done;
    double found;
    memset(&top, 0, sizeof top);
    for (p = 0; p < parts; p++) items += (size_t)list[p].states;
    top.n = parts, top.need = whole->need;
    top.first = SNIPI_ILP_TAKE(run, size_t, (size_t)parts + 1), top.items = SNIPI_ILP_TAKE(run, snipi_ilp_item, items);
    top.base = SNIPI_ILP_TAKE(run, int, parts), top.pick = SNIPI_ILP_TAKE(run, int, parts);
    if (!top.first || !top.items || !top.base || !top.pick) return 0;
    for (p = 0, top.first[0] = 0; p < parts; p++) {
        const snipi_ilp_sack *k = &part[p];
        const snipi_ilp_state *s = list[p].state;
        snipi_ilp_item *o = snipi_ilp_items(&top, p);
        double cheapest = s[list[p].states - 1].cost;
        for (i = 0; i < list[p].states; i++)
            o[i].gain = (k->need - k->lack + s[i].gain) >> k->shift, o[i].cost = s[i].cost - cheapest, o[i].option = i;
        top.pick[p] = snipi_ilp_undominated(o, i) - 1;
        surplus += o[top.pick[p]].gain;
        top.first[p + 1] = top.first[p] + (size_t)top.pick[p] + 1;
        top.spent += k->base_cost + cheapest;
    }
    if (surplus < 0) return 1;  // the lists are too short yet
    done = snipi_ilp_single(run, &top);
    found = whole->excess - snipi_ilp_cost(whole, whole->pick) + top.spent + snipi_ilp_cost(&top, top.pick);
    if (found >= whole->excess) return done;
    whole->excess = found;
    for (p = 0; p < parts; p++) {
        const snipi_ilp_state *s = &list[p].state[snipi_ilp_items(&top, p)[top.pick[p]].option];
        const snipi_ilp_best best = { found, list[p].rows - 1, 0, s->step, 0 };
        snipi_ilp_trace(&part[p], &list[p], &best);
    }
    return done;
}

// Improves whole's pick, which is at the largest gains, until proven or time or memory is short.
static void snipi_ilp_join(snipi_ilp_run *run, snipi_ilp_sack *whole, snipi_ilp_sack *part, int parts) {
    const snipi_ilp_block *mark;
    snipi_ilp_core *list = SNIPI_ILP_TAKE(run, snipi_ilp_core, parts);
    double sum = 0, window = 0, cut;
    int64_t surplus = -whole->need;
    int p, *trial = SNIPI_ILP_TAKE(run, int, whole->n), stopped = 0;
    whole->excess = snipi_ilp_cost(whole, whole->pick), whole->proven = 0;
    if (!list || !trial || !snipi_ilp_join_relax(run, whole, part, parts)) return;
    for (p = 0; p < parts; p++) {
        snipi_ilp_greedy(&part[p]);
        surplus += snipi_ilp_gain(&part[p], part[p].pick) >> part[p].shift;
    }
    if (surplus < 0) {  // costs 1e300 apart, slopes with no digits left: back to the largest gains
        for (p = 0; p < whole->n; p++) whole->pick[p] = snipi_ilp_count(whole, p) - 1;
        return;
    }
    whole->excess = whole->theta * (double)surplus + snipi_ilp_join_spend(part, parts, surplus);
    for (p = 0; p < parts; p++) {  // each part's integer bound at mu, by itself
        snipi_ilp_sack alone = part[p];
        alone.pick = trial;
        snipi_ilp_greedy(&alone);
        whole->excess += alone.excess;
        (void)snipi_ilp_refine(run, &alone);
        sum += part[p].proven = alone.proven;
        window += snipi_ilp_guess(&part[p]) * 0.25 / parts;
    }
    whole->proven = sum;
    if (window < (whole->excess - sum) / 1024) window = (whole->excess - sum) / 1024;
    for (mark = run->newest;; window *= 4) {
        double cost = snipi_ilp_cost(whole, whole->pick), limit;
        if (snipi_ilp_settled(run, whole, cost, &cut) || stopped || snipi_ilp_late(run)) return;
        limit = cut - sum < window ? cut - sum : window;
        for (p = 0; p < parts; p++) {
            stopped = !snipi_ilp_states(run, &part[p], part[p].proven + limit + 0.01 * SNIPI_ILP_PROOF * cost, NULL,
                                        &list[p]);
            if (stopped || !list[p].states) break;  // the latter: nothing of this part is within the window
        }
        if (p == parts) stopped = !snipi_ilp_join_choose(run, whole, part, parts, list);
        if (!stopped) whole->proven = window < cut - sum ? sum + limit : cut;
        snipi_ilp_give_since(run, mark);
    }
}

// >>solve: from the caller's problem to knapsacks and back
// Writes the options' costs above their group's least, or gains, group after group and times 2^*exponent, near 1 or as
// near as a double holds: no sum overflows, none is lost to underflow. Returns the sum of the groups' largest.
static double snipi_ilp_flatten(const snip_ilp_problem *p, const int *list, int n, int costs, double *x, size_t *count,
                                int *exponent) {
    double most = 0, sum = 0, factor, least = 0, *end = x;
    int i, j, e;
    for (i = 0; i < n; i++) {
        const snip_ilp_group *g = &p->groups[list[i]];
        if (costs) (void)snipi_ilp_largest(g, &least);
        for (j = 0; j < g->n_options; j++, end++) {
            *end = costs ? g->options[j].cost - least : g->options[j].gain;
            if (*end > most) most = *end;
        }
    }
    (void)frexp(most, &e);
    *exponent = e > 1000 ? -1000 : e < -1000 ? 1000 : -e;
    *count = (size_t)(end - x);
    factor = ldexp(1.0, *exponent);
    for (i = 0; i < n; i++, sum += most)
        for (j = 0, most = 0; j < p->groups[list[i]].n_options; j++, x++) {
            *x *= factor;
            if (*x > most) most = *x;
        }
    return sum;
}

// Flattens the gains of some groups and finds their unit: the step of a lattice (that of all, if given) if its rounding
// is small beside the tolerance of the target; else 2^60 <= most < 2^61.
static snipi_ilp_unit snipi_ilp_unit_of(const snip_ilp_problem *p, const int *list, int n, const snipi_ilp_unit *all,
                                        double *gain) {
    snipi_ilp_unit u;
    size_t m;
    double sum = snipi_ilp_flatten(p, list, n, 0, gain, &m, &u.exponent);
    int e = 0;
    (void)frexp(sum, &e);
    u.step = all ? ldexp(all->step, u.exponent - all->exponent) : snipi_ilp_common_unit(gain, m, &u.rounding);
    if (all) u.rounding = all->rounding;
    if (!(u.step > 0 && sum / u.step < 1e9 && u.rounding <= 0.05 * SNIPI_ILP_TOLERANCE * (sum / u.step)))
        u.step = 0, u.rounding = 0.5 * n;
    u.per_unit = u.step > 0 ? 1 / u.step : ldexp(1.0, 61 - e);
    u.bits = sum > 0 ? u.exponent + 61 - e : INT_MAX / 2;  // with nothing to count any unit will do
    u.most = sum * u.per_unit;
    return u;
}

// Fills k's items from flat costs and gains, and pick with the largest gains; returns how many costs it took.
static size_t snipi_ilp_read(const snip_ilp_problem *p, const int *list, const double *cost, const double *gain,
                             double per_unit, snipi_ilp_sack *k) {
    size_t m = 0;
    int i, j;
    for (i = 0; i < k->n; i++) {
        snipi_ilp_item *o = snipi_ilp_items(k, i);
        for (j = 0; j < p->groups[list[i]].n_options; j++, m++)
            o[j].gain = (int64_t)(gain[m] * per_unit + 0.5), o[j].cost = cost[m], o[j].option = j;
        k->pick[i] = snipi_ilp_undominated(o, j) - 1;
        k->first[i + 1] = k->first[i] + (size_t)k->pick[i] + 1;
    }
    return m;
}

// Fills choice, *gap left between its cost and the bound, *proven. Returns 0, choice untouched, when memory is short
// for a start.
static int snipi_ilp_search(snipi_ilp_run *run, const snip_ilp_problem *p, int *choice, double *gap, int *proven) {
    int stages = snipi_ilp_stages(p), n = p->n_groups, i, q, bits, coupled, cost_exponent, targets = 0, parts;
    int *order = SNIPI_ILP_TAKE(run, int, n), *start = SNIPI_ILP_TAKE(run, int, (size_t)stages + 1),
        *base = SNIPI_ILP_TAKE(run, int, n);
    size_t options = 0, read = 0;
    double *cost, *gain, error = 0, left = 0;
    long double sum = 0;
    int64_t most = 0;
    snipi_ilp_unit all = { 0, 0, 0, 0, 0, 0 }, unit;
    snipi_ilp_sack whole, *part = SNIPI_ILP_TAKE(run, snipi_ilp_sack, stages);
    memset(&whole, 0, sizeof whole);
    for (i = 0; i < n; i++) options += (size_t)p->groups[i].n_options;
    whole.n = n, whole.first = SNIPI_ILP_TAKE(run, size_t, (size_t)n + 1), whole.pick = SNIPI_ILP_TAKE(run, int, n);
    whole.items = SNIPI_ILP_TAKE(run, snipi_ilp_item, options);
    cost = SNIPI_ILP_TAKE(run, double, options), gain = SNIPI_ILP_TAKE(run, double, options);
    if (!order || !start || !base || !part || !whole.first || !whole.pick || !whole.items || !cost || !gain) return 0;
    for (q = 0; q < stages; q++) sum += snipi_ilp_stage_target(p, q), targets += snipi_ilp_stage_target(p, q) > 0;
    coupled = p->total_target > sum && stages > 1 && targets;  // else the stages imply the total, or it is all there is
    parts = targets ? stages : 1;
    memset(start, 0, ((size_t)stages + 1) * sizeof *start);  // order: the groups, stage after stage
    for (i = 0; i < n; i++) start[targets ? snipi_ilp_stage(p, i) : 0]++;
    for (q = 1; q <= parts; q++) start[q] += start[q - 1];
    for (i = n - 1; i >= 0; i--) order[--start[targets ? snipi_ilp_stage(p, i) : 0]] = i;
    (void)snipi_ilp_flatten(p, order, n, 1, cost, &options, &cost_exponent);
    run->cost_step = snipi_ilp_common_unit(cost, options, &error);
    if (error > 1e-13) run->cost_step = 0;  // the proof's relative precision, of one step
    if (coupled) all = snipi_ilp_unit_of(p, order, n, NULL, gain);
    for (q = 0; q < parts && all.step > 0; q++) {  // a total needs one lattice, fine enough for every part
        unit = snipi_ilp_unit_of(p, order + start[q], start[q + 1] - start[q], &all, gain);
        if (unit.step <= 0 && unit.most > 0) all.step = 0, all = snipi_ilp_unit_of(p, order, n, &all, gain);
    }
    for (q = 0, bits = INT_MAX, whole.first[0] = 0; q < parts; q++) {
        snipi_ilp_sack *k = &part[q];
        const int *list = order + start[q];
        double target = snipi_ilp_stage_target(p, q);
        if (parts == 1 && p->total_target > target) target = p->total_target;
        *k = whole;
        k->n = start[q + 1] - start[q], k->first += start[q], k->pick += start[q], k->base = base + start[q];
        unit = snipi_ilp_unit_of(p, list, k->n, coupled ? &all : NULL, gain);
        read += snipi_ilp_read(p, list, cost + read, gain, unit.per_unit, k);
        k->need = snipi_ilp_need(&unit, target, snipi_ilp_gain(k, k->pick));
        k->shift = unit.bits;
        if (unit.bits < bits) bits = unit.bits;
    }
    snipi_ilp_give(run, gain);
    snipi_ilp_give(run, cost);
    for (q = 0; q < parts && !coupled; q++) {
        (void)snipi_ilp_single(run, &part[q]);
        if (part[q].proven < part[q].excess) *proven = 0;
        left += part[q].excess - part[q].proven;
    }
    if (coupled) {  // the total is counted in the coarsest unit, parts rounded down to it
        if (all.bits < bits) bits = all.bits;
        for (q = 0; q < parts; q++) {
            part[q].shift = all.step > 0 ? 0 : part[q].shift - bits < 62 ? part[q].shift - bits : 62;
            most += snipi_ilp_gain(&part[q], part[q].pick) >> part[q].shift;
        }
        if (all.step <= 0)
            all.per_unit *= ldexp(1.0, bits - all.bits), all.most *= ldexp(1.0, bits - all.bits), all.rounding += parts;
        whole.need = snipi_ilp_need(&all, p->total_target, most);
        snipi_ilp_join(run, &whole, part, parts);
        *proven = whole.proven >= whole.excess;
        left = whole.excess - whole.proven;
    }
    *gap = ldexp(left, -cost_exponent);
    for (i = 0; i < n; i++) choice[order[i]] = snipi_ilp_items(&whole, i)[whole.pick[i]].option;
    return 1;
}

SNIP_ILP_API snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params, int *choice,
                                            snip_ilp_result *result) {
    snip_ilp_params use = { 0, 0, 0 };
    snipi_ilp_run run;
    long double cost = 0, gain = 0, least = 0;
    double gap = 0, shortfall, cheapest;
    int i, proven = 1;
    if (params) use = *params;
    if (!snipi_ilp_problem_ok(problem) || (problem->n_groups > 0 && !choice) || !snipi_ilp_finite(use.time_limit) ||
        use.time_limit < 0 || !snipi_ilp_finite(use.rel_gap) || use.rel_gap < 0)
        return SNIP_ILP_BAD_ARGUMENT;
    memset(&run, 0, sizeof run);
    run.limit = use.max_memory ? use.max_memory : (size_t)512 << 20;
    run.start = snipi_ilp_clock();
    run.deadline = use.time_limit > 0 ? run.start + use.time_limit : 0;
    run.rel_gap = use.rel_gap;
    if (snipi_ilp_unreachable(problem, &shortfall) >= 0) {
        if (result) memset(result, 0, sizeof *result), result->seconds = snipi_ilp_seconds(&run);
        return SNIP_ILP_INFEASIBLE;
    }
    if (problem->n_groups > 0 && !snipi_ilp_search(&run, problem, choice, &gap, &proven)) {
        for (i = 0; i < problem->n_groups; i++) choice[i] = snipi_ilp_largest(&problem->groups[i], &cheapest);
        gap = SNIPI_ILP_HUGE, proven = 0;
    }
    snipi_ilp_give_since(&run, NULL);
    for (i = 0; i < problem->n_groups; i++) {
        const snip_ilp_group *g = &problem->groups[i];
        (void)snipi_ilp_largest(g, &cheapest);
        cost += g->options[choice[i]].cost, gain += g->options[choice[i]].gain, least += cheapest;
    }
    if (result) {
        result->cost = (double)cost, result->gain = (double)gain, result->bound = (double)least;
        if (result->cost * (1 - 1e-14) - gap > result->bound)
            result->bound = result->cost * (1 - 1e-14) - gap;  // rounding
        if (proven || result->bound > result->cost) result->bound = result->cost;
        result->nodes = run.nodes;
        result->seconds = snipi_ilp_seconds(&run);
    }
    return proven ? SNIP_ILP_OPTIMAL : SNIP_ILP_FEASIBLE;
}

SNIP_ILP_API int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall) {
    double amount;
    int target;
    if (!snipi_ilp_problem_ok(problem)) return -2;
    target = snipi_ilp_unreachable(problem, &amount);
    if (shortfall) *shortfall = amount;
    return target;
}

#endif  // SNIP_ILP_IMPLEMENTATION
