/* snip_ilp.h - exact solver for the multiple-choice knapsack problem with covering targets. C99 or C++11 and later; only libc and libm.
   #define SNIP_ILP_IMPLEMENTATION (or SNIP_IMPLEMENTATION) before including it in one source file; elsewhere include it plainly.

   THE PROBLEM. Group i has options j with cost c_ij >= 0 and gain g_ij >= 0. Choose one option x_i of each group:

       minimise   sum_i c_i,x_i
       such that  sum over the groups of stage s of g_i,x_i >= stage_target[s]     for every stage s
                  sum_i g_i,x_i >= total_target

   A target counts as met within 1e-12 of the sum of its groups' largest gains. In SNIP a group is a layer or a GEMM, an option its
   precision, cost the loss of quality, gain the work or time saved, a stage a pipeline stage.

       snip_ilp_option q[2] = {{0.0, 0.0}, {0.3, 1.0}}, k[2] = {{0.0, 0.0}, {0.1, 1.0}};
       snip_ilp_group groups[2] = {{q, 2, 0}, {k, 2, 0}};
       snip_ilp_problem problem = {2, groups, 0, NULL, 1.0};
       int choice[2];
       if (snip_ilp_solve(&problem, NULL, choice, NULL) == SNIP_ILP_OPTIMAL) ...    // choice is {0, 1}

   FAST: costs and gains not tied to one another. 560 groups of 2 to 27 options take about a millisecond, with or without stages and a
   total, 100,000 groups of 8 a tenth of a second. Reading, the LP bound and a first choice take linear time and are always completed;
   then the time limit is looked at every few thousand states.
   HARD (the problem is NP-hard): cost = gain + constant with large integers or very many groups (10,000 strongly correlated groups), and
   cost = gain in real numbers (subset sum). There the search ends at the memory limit, after seconds, FEASIBLE with a gap of 1e-7 to
   1e-10 of the cost. Set time_limit.
   DETERMINISTIC: same input, same choice, on one machine and compiler, unless a time limit strikes. Thread-safe; no globals, no recursion.
   The clock is CLOCK_MONOTONIC or C11's timespec_get where the language mode declares them, else clock(), which counts all threads of the
   process and makes limits come early; SNIP_ILP_CLOCK() overrides it.
   MEMORY comes from SNIP_ILP_MALLOC/SNIP_ILP_FREE (define both), never exceeds max_memory and is all freed. When it runs out, what has
   been found is returned; without any, the largest gains are. Costs below 1e-300 of the largest count as zero. */
#ifndef SNIP_ILP_H
#define SNIP_ILP_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// Sections: >>api >>run >>check >>numbers >>sack >>lp >>greedy >>core >>curve >>states >>single >>join >>solve

// >>api
typedef struct { double cost, gain; } snip_ilp_option;            // cost >= 0 is minimised; gain >= 0 counts toward the targets
typedef struct { const snip_ilp_option *options; int n_options; int stage; } snip_ilp_group;   // exactly one option is chosen
typedef struct {
    int n_groups;
    const snip_ilp_group *groups;
    int n_stages;                 // 0 is as good as 1: every group then has stage 0
    const double *stage_target;   // (n_stages) sum of gains in stage s >= stage_target[s]; <= 0: none for that stage; NULL: none at all
    double total_target;          // sum of all gains >= this; <= 0: none
} snip_ilp_problem;

typedef struct {                  // zeroes are the defaults
    double time_limit;            // seconds; 0: none
    double rel_gap;               // stop when cost - bound <= rel_gap * (cost above the sum of the cheapest options); 0: prove optimality
    size_t max_memory;            // bytes; 0: 512 MiB
} snip_ilp_params;

typedef struct { double cost, bound, gain, seconds; int64_t nodes; } snip_ilp_result;     // no choice costs less than bound

typedef enum {
    SNIP_ILP_OPTIMAL = 0,         // proven to within 1e-12 of the cost above the sum of the cheapest options
    SNIP_ILP_FEASIBLE,            // stopped early; the least cost lies between bound and cost
    SNIP_ILP_INFEASIBLE,          // some target cannot be met: see snip_ilp_shortfall(); choice untouched, result zero but for seconds
    SNIP_ILP_BAD_ARGUMENT,        // nothing written. NaN, infinity, a negative cost or gain, a group without options, a stage out of range, ...
    SNIP_ILP_OUT_OF_MEMORY        // not returned at present: the last resort needs no memory, and is FEASIBLE
} snip_ilp_status;

// Chooses an option of each group: choice[i] in 0 .. n_options-1. params and result may be NULL.
snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params, int *choice /* [n_groups] */,
                               snip_ilp_result *result);

// Which target cannot be met by any choice, and by how much: the first stage s whose target is out of reach, else n_stages if the total
// is; -1 if all are in reach (to within their tolerance), -2 for a bad argument. *shortfall (may be NULL) becomes the target minus the
// sum of the largest gains, or 0 if all are in reach. Linear time, no memory.
int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall);

#ifdef __cplusplus
}
#endif
#endif // SNIP_ILP_H

/* ---------------------------------------- the API ends here; the rest is the implementation ---------------------------------------- */

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

// >>run: what a call carries along: memory, clock, tolerances
#define SNIPI_ILP_TOLERANCE 1e-12             // of a target, relative to the sum of the largest gains
#define SNIPI_ILP_PROOF 5e-13                 // of the optimum; half of what is promised, the rest is for rounding
#define SNIPI_ILP_HUGE (DBL_MAX / 4)          // stands for infinity, which -Ofast does not know

typedef struct snipi_ilp_block { struct snipi_ilp_block *older, *newer; size_t bytes, unused; } snipi_ilp_block;
typedef struct {
    snipi_ilp_block *newest;
    size_t used, limit;
    double start, deadline;                   // seconds; deadline 0: none
    double rel_gap, cost_step;                // cost_step: different costs differ by at least this; 0: not known
    int64_t nodes;
    int late;
} snipi_ilp_run;
static double snipi_ilp_clock(void) {
#if defined(SNIP_ILP_CLOCK)
    return SNIP_ILP_CLOCK();
#elif defined(CLOCK_MONOTONIC) || defined(TIME_UTC)
    struct timespec t;
#if defined(CLOCK_MONOTONIC)
    clock_gettime(CLOCK_MONOTONIC, &t);
#else
    timespec_get(&t, TIME_UTC);
#endif
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}
static int snipi_ilp_late(snipi_ilp_run *run) {
    if (!run->late && run->deadline > 0 && snipi_ilp_clock() >= run->deadline) run->late = 1;
    return run->late;
}

// NULL when the limit or the heap is exhausted. Blocks are chained, so that whole stretches of work can be freed at once.
static void *snipi_ilp_take(snipi_ilp_run *run, size_t count, size_t size) {
    snipi_ilp_block *b;
    if (count > (SIZE_MAX - sizeof *b) / size || count * size + sizeof *b > run->limit - run->used) return NULL;
    b = (snipi_ilp_block *)SNIP_ILP_MALLOC(count * size + sizeof *b);
    if (!b) return NULL;
    b->bytes = count * size + sizeof *b;
    b->older = run->newest;
    b->newer = NULL;
    if (run->newest) run->newest->newer = b;
    run->newest = b;
    run->used += b->bytes;
    return b + 1;
}
#define SNIPI_ILP_TAKE(run, type, count) ((type *)snipi_ilp_take(run, (size_t)(count), sizeof(type)))
static void snipi_ilp_give(snipi_ilp_run *run, void *pointer) {
    snipi_ilp_block *b;
    if (!pointer) return;
    b = (snipi_ilp_block *)pointer - 1;
    if (b->newer) b->newer->older = b->older; else run->newest = b->older;
    if (b->older) b->older->newer = b->newer;
    run->used -= b->bytes;
    SNIP_ILP_FREE(b);
}
static void snipi_ilp_give_since(snipi_ilp_run *run, const snipi_ilp_block *mark) {
    while (run->newest != mark) snipi_ilp_give(run, run->newest + 1);
}

// >>check: the arguments, and whether the largest gains meet the targets; needs no memory
static int snipi_ilp_finite(double x) {       // by bits: -Ofast takes it for granted
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ((bits >> 52) & 0x7ff) != 0x7ff;
}
static int snipi_ilp_problem_ok(const snip_ilp_problem *p) {
    int i, j;
    if (!p || p->n_groups < 0 || p->n_stages < 0 || (p->n_groups > 0 && !p->groups) || !snipi_ilp_finite(p->total_target)) return 0;
    for (i = 0; p->stage_target && i < p->n_stages; i++)
        if (!snipi_ilp_finite(p->stage_target[i])) return 0;
    for (i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *g = &p->groups[i];
        if (!g->options || g->n_options < 1 || g->stage < 0 || g->stage >= (p->n_stages > 1 ? p->n_stages : 1)) return 0;
        for (j = 0; j < g->n_options; j++) {
            const snip_ilp_option *o = &g->options[j];
            if (!snipi_ilp_finite(o->cost) || !snipi_ilp_finite(o->gain) || o->cost < 0 || o->gain < 0) return 0;
        }
    }
    return 1;
}
static double snipi_ilp_cheapest(const snip_ilp_group *g) {
    double least = g->options[0].cost;
    int j;
    for (j = 1; j < g->n_options; j++)
        if (g->options[j].cost < least) least = g->options[j].cost;
    return least;
}
static int snipi_ilp_largest(const snip_ilp_group *g) {        // the option of largest gain, of equals the cheapest
    int j, best = 0;
    for (j = 1; j < g->n_options; j++) {
        const snip_ilp_option *o = &g->options[j], *b = &g->options[best];
        if (o->gain > b->gain || (o->gain >= b->gain && o->cost < b->cost)) best = j;
    }
    return best;
}
// Without stage targets all is one stage.
static int snipi_ilp_stages(const snip_ilp_problem *p) { return p->stage_target && p->n_stages > 1 ? p->n_stages : 1; }
static int snipi_ilp_stage(const snip_ilp_problem *p, int group) { return p->stage_target ? p->groups[group].stage : 0; }
static double snipi_ilp_stage_target(const snip_ilp_problem *p, int stage) {
    return p->stage_target && stage < p->n_stages && p->stage_target[stage] > 0 ? p->stage_target[stage] : 0;
}

// As snip_ilp_shortfall(). Stages are summed a chunk at a time, so that their sums fit on the stack.
static int snipi_ilp_unreachable(const snip_ilp_problem *p, double *shortfall) {
    enum { CHUNK = 128 };
    long double sum[CHUNK], all = 0, lack;
    int i, s, first, stages = snipi_ilp_stages(p);
    for (first = 0; first < stages; first += CHUNK) {
        for (s = 0; s < CHUNK; s++) sum[s] = 0;
        for (i = 0; i < p->n_groups; i++) {
            s = snipi_ilp_stage(p, i) - first;
            if (s >= 0 && s < CHUNK) sum[s] += p->groups[i].options[snipi_ilp_largest(&p->groups[i])].gain;
        }
        for (s = 0; s < CHUNK && s < stages - first; s++) {
            lack = snipi_ilp_stage_target(p, first + s) - sum[s];
            if (lack > SNIPI_ILP_TOLERANCE * sum[s]) { *shortfall = (double)lack; return first + s; }
            all += sum[s];
        }
        if (stages - first <= CHUNK) break;   // first must not overflow
    }
    lack = p->total_target - all;
    *shortfall = lack > SNIPI_ILP_TOLERANCE * all ? (double)lack : 0;
    return lack > SNIPI_ILP_TOLERANCE * all ? p->n_stages : -1;
}

// >>numbers: gains become integers, so that sums of gains are exact and equal sums are equal
// The power of two that brings values up to `most` near 1, or as near as a double holds: no sum overflows, none is lost to underflow.
static int snipi_ilp_exponent(double most) {
    int e = 0;
    if (most > 0) (void)frexp(most, &e);
    return e > 1000 ? -1000 : e < -1000 ? 1000 : -e;
}
static double snipi_ilp_off_lattice(double q) { return fabs(q - floor(q + 0.5)); }

// The unit of which all values are multiples, or 0, by Euclid's algorithm on rounded numbers. It is snapped to a fraction of the largest
// value at every step, which keeps it from drifting. *error is the sum of the distances to the lattice, in units.
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
typedef struct {                  // integer = round(gain * 2^exponent * per_unit)
    int exponent, lattice, bits;  // off a lattice, integer = round(gain * 2^bits)
    double per_unit, most;        // most: sum of the groups' largest gains, in units
    double rounding;              // how far the integer sum of a choice may be off
} snipi_ilp_unit;
static double snipi_ilp_units(const snipi_ilp_unit *u, double gain) { return ldexp(gain, u->exponent) * u->per_unit; }

// The least integer sum sure to be within the tolerance of the target, but none that keeps out a choice that truly meets it.
static int64_t snipi_ilp_need(const snipi_ilp_unit *u, double target, int64_t most) {
    double tolerance = SNIPI_ILP_TOLERANCE * u->most - u->rounding, need = 0;
    if (tolerance < u->rounding) tolerance = u->rounding;
    if (target > 0) need = ceil(snipi_ilp_units(u, target) - tolerance);
    return need < 0 ? 0 : need > (double)most ? most : (int64_t)need;         // at most `most`: it was found reachable
}

// >>sack: one knapsack: min sum(cost - mu * gain) over the choices with sum(gain) >= need
typedef struct { int64_t gain; double cost; int option; } snipi_ilp_item;
typedef struct { double slope; int64_t gain; int group, item; } snipi_ilp_segment;       // of a lower convex hull, ending at item
typedef struct {
    int n;                        // groups
    size_t *first;                // (n + 1) group i owns items first[i] .. first[i+1]-1
    snipi_ilp_item *items;        // gain and cost strictly increase within a group, from cost 0
    int64_t need;
    double mu;                    // reward for a unit of gain: 0 but in the coupled problem
    double spent;                 // cost above the cheapest options that is not in the items
    // found by snipi_ilp_relax():
    int *base;                    // (n) the LP's choice, rounded down
    int64_t lack;                 // need minus the gain of base
    double theta, base_cost;      // the LP's multiplier, >= mu
} snipi_ilp_sack;
static snipi_ilp_item *snipi_ilp_items(const snipi_ilp_sack *k, int group) { return k->items + k->first[group]; }
static int snipi_ilp_count(const snipi_ilp_sack *k, int group) { return (int)(k->first[group + 1] - k->first[group]); }
static int snipi_ilp_item_before(const snipi_ilp_item *x, const snipi_ilp_item *y) {
    return x->gain != y->gain ? x->gain < y->gain : x->cost < y->cost || (x->cost <= y->cost && x->option < y->option);
}

// Drops the items that another beats or equals in both gain and cost; sorts the rest. Returns how many stay.
static int snipi_ilp_undominated(snipi_ilp_item *o, int n) {
    double least = SNIPI_ILP_HUGE;
    int i, j, gap, kept = n;
    for (gap = n > 40 ? n / 2 : 1; gap > 0; gap = gap > 2 ? (int)(gap * 5L / 11) : gap / 2)   // Shell sort: no recursion, and the same order everywhere
        for (i = gap; i < n; i++) {
            snipi_ilp_item x = o[i];
            for (j = i; j >= gap && snipi_ilp_item_before(&x, &o[j - gap]); j -= gap) o[j] = o[j - gap];
            o[j] = x;
        }
    for (i = n - 1; i >= 0; i--) {            // from the largest gain down costs must fall; survivors gather at the end
        if (!(o[i].cost < least)) continue;
        least = o[i].cost;
        if (kept < n && o[kept].gain == o[i].gain) kept++;
        o[--kept] = o[i];
    }
    memmove(o, o + kept, (size_t)(n - kept) * sizeof *o);
    return n - kept;
}

// >>lp: the linear relaxation. The lower convex hull of each group is cut into segments; taken by slope until need is met they solve the
// LP (Sinha & Zoltners 1979). The one that meets it is found in linear time by weighted quickselect (Dyer 1984, Zemel 1984).
static size_t snipi_ilp_segments(const snipi_ilp_sack *k, snipi_ilp_segment *s) {
    size_t m = 0;
    int i, j;
    for (i = 0; i < k->n; i++) {
        const snipi_ilp_item *o = snipi_ilp_items(k, i);
        int count = snipi_ilp_count(k, i);
        size_t start = m;
        for (j = 1; j < count; j++) {
            int from;
            double slope;
            for (;; m--) {
                from = m > start ? s[m - 1].item : 0;
                slope = (o[j].cost - o[from].cost) / (double)(o[j].gain - o[from].gain);
                if (m == start || s[m - 1].slope < slope) break;
            }
            s[m].slope = slope, s[m].gain = o[j].gain - o[from].gain, s[m].group = i, s[m].item = j;
            m++;
        }
    }
    return m;
}
static void snipi_ilp_swap(snipi_ilp_segment *a, snipi_ilp_segment *b) {
    snipi_ilp_segment t = *a;
    *a = *b;
    *b = t;
}
static double snipi_ilp_key(const char *p) {
    double key;
    memcpy(&key, p, sizeof key);
    return key;
}
// Shell sort of structs that start with a double, by that.
static void snipi_ilp_sort(void *array, size_t n, size_t size) {
    char *a = (char *)array, held[64];
    size_t gap, i, j;
    for (gap = n > 40 ? n / 2 : 1; gap > 0; gap = gap > 2 ? gap * 5 / 11 : gap / 2)
        for (i = gap; i < n; i++) {
            memcpy(held, a + i * size, size);
            for (j = i; j >= gap && snipi_ilp_key(held) < snipi_ilp_key(a + (j - gap) * size); j -= gap) memcpy(a + j * size, a + (j - gap) * size, size);
            memcpy(a + j * size, held, size);
        }
}

// Reorders the segments so that the first p, all of least slope, gain less than need, and reach it with the next; returns p.
static size_t snipi_ilp_select(snipi_ilp_segment *s, size_t n, int64_t need) {
    size_t low = 0, high = n, i;
    if (need <= 0) return 0;
    while (high - low > 24) {
        double a = s[low + (high - low) / 4].slope, b = s[low + (high - low) / 2].slope, c = s[low + (high - low) / 4 * 3].slope;
        double pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        size_t less = low, more = high;
        int64_t below = 0, equal = 0;
        for (i = low; i < more;) {
            if (s[i].slope < pivot) { below += s[i].gain; snipi_ilp_swap(&s[less++], &s[i++]); }
            else if (s[i].slope > pivot) snipi_ilp_swap(&s[--more], &s[i]);
            else equal += s[i++].gain;
        }
        if (below >= need) { high = less; continue; }
        need -= below;
        low = less;
        if (equal >= need) { high = more; break; }            // all of one slope: any order will do
        need -= equal;
        low = more;
    }
    if (high - low <= 24) snipi_ilp_sort(s + low, high - low, sizeof *s);
    for (i = low; i < high && s[i].gain < need; i++) need -= s[i].gain;
    return i;
}

// Finds base, lack and theta; need must be in reach. Returns 0 when memory is short.
static int snipi_ilp_relax(snipi_ilp_run *run, snipi_ilp_sack *k) {
    snipi_ilp_segment *s = SNIPI_ILP_TAKE(run, snipi_ilp_segment, k->first[k->n] - (size_t)k->n + 1);
    long double cost = 0;
    size_t i, m, taken = 0;
    int g;
    if (!s) return 0;
    m = snipi_ilp_segments(k, s);
    k->lack = k->need;
    k->theta = k->mu;
    for (g = 0; g < k->n; g++) k->base[g] = 0, k->lack -= snipi_ilp_items(k, g)->gain;
    for (i = 0; i < m && k->mu > 0; i++)      // these pay for themselves
        if (s[i].slope < k->mu) { k->lack -= s[i].gain; snipi_ilp_swap(&s[taken++], &s[i]); }
    if (k->lack > 0 && m > taken) {
        taken += snipi_ilp_select(s + taken, m - taken, k->lack);
        k->theta = s[taken < m ? taken : m - 1].slope;
    }
    for (i = 0; i < taken; i++)
        if (k->base[s[i].group] < s[i].item) k->base[s[i].group] = s[i].item;
    snipi_ilp_give(run, s);
    for (g = 0, k->lack = k->need; g < k->n; g++) {
        const snipi_ilp_item *b = snipi_ilp_items(k, g) + k->base[g];
        k->lack -= b->gain;
        cost += b->cost;
    }
    k->base_cost = (double)cost;
    return 1;
}

// From here on a choice is valued by its excess over the LP bound, a sum of small numbers that are not negative, so that little is lost
// to rounding: the reduced costs of its items, plus (theta - mu) for each unit of gain beyond need.
static double snipi_ilp_reduced(const snipi_ilp_sack *k, const snipi_ilp_item *o, const snipi_ilp_item *base) {
    double r = (o->cost - base->cost) - k->theta * (double)(o->gain - base->gain);
    return r > 0 ? r : 0;
}
static double snipi_ilp_lp_cost(const snipi_ilp_sack *k) { return k->spent + k->base_cost + (k->lack > 0 ? k->theta * (double)k->lack : 0); }

// How much cheaper a choice must be to count as better than one of this cost. With mu it is not the cost alone that counts, and no step.
static double snipi_ilp_exact_margin(const snipi_ilp_run *run, double cost, double mu) {
    return mu <= 0 && SNIPI_ILP_PROOF * cost < 0.99 * run->cost_step ? 0.99 * run->cost_step : SNIPI_ILP_PROOF * cost;
}
static double snipi_ilp_margin(const snipi_ilp_run *run, double cost, double mu) {
    double exact = snipi_ilp_exact_margin(run, cost, mu);
    return exact < run->rel_gap * cost ? run->rel_gap * cost : exact;
}
// The lower bound of the excess when all that would be better has been looked for.
static double snipi_ilp_settled(const snipi_ilp_run *run, double cost, double mu, double excess) {
    double margin = snipi_ilp_margin(run, cost, mu);
    return margin <= snipi_ilp_exact_margin(run, cost, mu) ? excess : excess > margin ? excess - margin : 0;
}

// >>greedy: a first choice: base and the cheapest single upgrade that meets need; the break segment is one. In the coupled problem also
// all that is worth exactly mu, which meets the total. Returns its excess.
static double snipi_ilp_greedy(const snipi_ilp_sack *k, int *pick) {
    int64_t surplus = -k->lack;
    double least = SNIPI_ILP_HUGE, excess = 0;
    int i, j, group = -1, item = 0, ties = k->mu > 0 && k->theta <= k->mu;
    for (i = 0; i < k->n; i++) {
        const snipi_ilp_item *o = snipi_ilp_items(k, i), *b = o + k->base[i];
        pick[i] = k->base[i];
        for (j = snipi_ilp_count(k, i) - 1; j > k->base[i]; j--) {
            double cost = (o[j].cost - b->cost) - k->mu * (double)(o[j].gain - b->gain), reduced = snipi_ilp_reduced(k, &o[j], b);
            if (ties && reduced <= 1e-14 * (o[j].cost - b->cost)) {
                pick[i] = j, surplus += o[j].gain - b->gain, excess += reduced;
                break;
            }
            if (o[j].gain - b->gain >= k->lack && cost < least) least = cost, group = i, item = j;
        }
    }
    if (surplus < 0 && group >= 0) {
        const snipi_ilp_item *o = snipi_ilp_items(k, group);
        surplus += o[item].gain - o[pick[group]].gain;
        excess += snipi_ilp_reduced(k, &o[item], &o[k->base[group]]) - snipi_ilp_reduced(k, &o[pick[group]], &o[k->base[group]]);
        pick[group] = item;
    }
    return excess + (k->theta - k->mu) * (double)surplus;
}

// >>core: the groups that have another item than base of reduced cost below a limit, the most ambiguous first (Pisinger 1995). Choices
// of excess below the limit differ from base only there.
typedef struct { int64_t gain; double cost, reduced; int item; } snipi_ilp_move;         // all relative to base
typedef struct { double key; int group, count, base; size_t first; } snipi_ilp_row;      // moves from first on, by gain; base is one of them
typedef struct {
    int rows;
    snipi_ilp_row *row;
    snipi_ilp_move *move;
    size_t segments[2];           // up, for a lack of gain, and down, for a surplus:
    snipi_ilp_segment *side[2];   // hulls of reduced cost over gain won or given up, by slope; group is the row, item the move
} snipi_ilp_core;
static void snipi_ilp_core_hull(snipi_ilp_core *c, int row, int down) {
    const snipi_ilp_row *r = &c->row[row];
    const snipi_ilp_move *o = c->move + r->first;
    snipi_ilp_segment *s = c->side[down];
    size_t m = c->segments[down], start = m;
    int j, step = down ? -1 : 1;
    for (j = r->base + step; j >= 0 && j < r->count; j += step) {
        int64_t gain;
        double slope;
        for (;; m--) {
            const snipi_ilp_move *from = &o[m > start ? s[m - 1].item : r->base];
            gain = (o[j].gain - from->gain) * step;
            slope = (o[j].reduced - from->reduced) / (double)gain;
            if (m == start || s[m - 1].slope < slope) break;
        }
        s[m].slope = slope, s[m].gain = gain, s[m].group = row, s[m].item = j;
        m++;
    }
    c->segments[down] = m;
}

// Returns 0 when memory is short; what was taken stays for snipi_ilp_give_since().
static int snipi_ilp_core_make(snipi_ilp_run *run, const snipi_ilp_sack *k, double limit, snipi_ilp_core *c) {
    int i, j, pass, down;
    memset(c, 0, sizeof *c);
    for (pass = 0; pass < 2; pass++) {        // count, then fill
        size_t m = 0;
        for (i = c->rows = 0; i < k->n; i++) {
            const snipi_ilp_item *o = snipi_ilp_items(k, i), *b = o + k->base[i];
            snipi_ilp_row r;
            r.key = SNIPI_ILP_HUGE, r.group = i, r.count = r.base = 0, r.first = m;
            for (j = 0; j < snipi_ilp_count(k, i); j++) {
                double reduced = snipi_ilp_reduced(k, &o[j], b);
                if (j == k->base[i]) r.base = r.count;
                else if (reduced >= limit) continue;
                else if (reduced < r.key) r.key = reduced;
                if (pass) {
                    snipi_ilp_move *move = &c->move[m + (size_t)r.count];
                    move->gain = o[j].gain - b->gain, move->cost = o[j].cost - b->cost, move->reduced = reduced, move->item = j;
                }
                r.count++;
            }
            if (r.count == 1) continue;
            if (pass) c->row[c->rows] = r;
            m += (size_t)r.count;
            c->rows++;
        }
        if (pass) break;
        c->row = SNIPI_ILP_TAKE(run, snipi_ilp_row, c->rows + 1);
        c->move = SNIPI_ILP_TAKE(run, snipi_ilp_move, m + 1);
        for (down = 0; down < 2; down++) c->side[down] = SNIPI_ILP_TAKE(run, snipi_ilp_segment, m + 1);
        if (!c->row || !c->move || !c->side[0] || !c->side[1]) return 0;
    }
    snipi_ilp_sort(c->row, (size_t)c->rows, sizeof *c->row);
    for (down = 0; down < 2; down++) {
        for (i = 0; i < c->rows; i++) snipi_ilp_core_hull(c, i, down);
        snipi_ilp_sort(c->side[down], c->segments[down], sizeof **c->side);
    }
    return 1;
}

// A first guess of the gap: the reduced cost of the 16th most ambiguous group.
static double snipi_ilp_guess(const snipi_ilp_sack *k) {
    enum { RANK = 16 };
    double key[RANK];
    int i, j, found = 0;
    for (i = 0; i < k->n; i++) {
        const snipi_ilp_item *o = snipi_ilp_items(k, i), *b = o + k->base[i];
        double least = SNIPI_ILP_HUGE;
        for (j = 0; j < snipi_ilp_count(k, i); j++)
            if (j != k->base[i] && snipi_ilp_reduced(k, &o[j], b) < least) least = snipi_ilp_reduced(k, &o[j], b);
        if (snipi_ilp_count(k, i) == 1 || (found == RANK && least >= key[RANK - 1])) continue;
        if (found < RANK) found++;
        for (j = found - 1; j > 0 && key[j - 1] > least; j--) key[j] = key[j - 1];
        key[j] = least;
    }
    return found ? key[found - 1] : 0;
}

// >>curve: the LP bound of the rows not yet decided, as a function of the gain still lacking (negative: a surplus)
typedef struct { int64_t gain; double value, slope; } snipi_ilp_point;       // sums up to and including a segment, and its slope
typedef struct {
    double price;                     // theta - mu, for each unit of gain beyond need
    snipi_ilp_point *side[2];
    size_t points[2], at[2];          // at: the point of the last question; questions come with rising lack
} snipi_ilp_curve;
// For rows from row on, and lacks up to reach[0] and surpluses up to reach[1].
static void snipi_ilp_curve_make(const snipi_ilp_core *c, int row, const int64_t *reach, snipi_ilp_curve *v) {
    int down;
    for (down = 0; down < 2; down++) {
        const snipi_ilp_segment *s = c->side[down], *end = s + c->segments[down];
        int64_t gain = 0;
        double value = 0;
        size_t n = 0;
        for (; s < end && gain <= reach[down] && !(down && s->slope >= v->price); s++) {
            if (s->group < row) continue;
            gain += s->gain;
            value += s->slope * (double)s->gain;
            v->side[down][n].gain = gain, v->side[down][n].value = value, v->side[down][n].slope = s->slope;
            n++;
        }
        v->points[down] = n;
    }
}

// The bound; in *rounded the excess of the LP's choice, rounded to meet need, which takes *taken segments. HUGE if need is out of reach.
static double snipi_ilp_curve_ask(snipi_ilp_curve *v, int64_t lack, double *rounded, size_t *taken) {
    static const snipi_ilp_point origin = {0, 0, 0};
    int down = lack <= 0;
    const snipi_ilp_point *s = v->side[down], *before;
    size_t n = v->points[down], at = v->at[down];
    if (down) {
        while (at > 0 && s[at - 1].gain > -lack) at--;
        v->at[1] = *taken = at;
        before = at ? &s[at - 1] : &origin;
        *rounded = before->value + v->price * (double)(-lack - before->gain);
        return before->value + (at < n ? s[at].slope : v->price) * (double)(-lack - before->gain);
    }
    while (at < n && s[at].gain < lack) at++;
    v->at[0] = at;
    *taken = at + 1;
    if (at == n) return *rounded = SNIPI_ILP_HUGE;
    before = at ? &s[at - 1] : &origin;
    *rounded = s[at].value + v->price * (double)(s[at].gain - lack);
    return before->value + s[at].slope * (double)(lack - before->gain);
}

// Takes so many segments of the rows beyond row into pick.
static void snipi_ilp_complete(const snipi_ilp_core *c, int row, int down, size_t segments, int *pick) {
    const snipi_ilp_segment *s = c->side[down];
    for (; segments > 0; s++)
        if (s->group > row) {
            pick[c->row[s->group].group] = c->move[c->row[s->group].first + (size_t)s->item].item;
            segments--;
        }
}

// >>states: dynamic programming over the rows. A state is a gain and a cost relative to base; lists are sorted by falling gain. States are
// pruned by the bound before the dominance merge, which spares most of the merging; each one's rounded LP choice is a candidate.
typedef struct { int64_t gain; double cost; int parent, move; } snipi_ilp_state;
typedef struct { int parent, move; } snipi_ilp_step;      // parent: the step of the row before
typedef struct {
    snipi_ilp_state *state;           // of the last row
    int states;
    snipi_ilp_step *step;             // of all rows; those of the last row start at last
    size_t steps, room, last;
} snipi_ilp_table;
typedef struct { double excess; int found, row, parent, move, down; size_t segments; } snipi_ilp_best;   // a state, and its completion
static int snipi_ilp_remember(snipi_ilp_run *run, snipi_ilp_table *t) {
    int i;
    if (t->steps + (size_t)t->states > t->room) {
        size_t room = (t->steps + (size_t)t->states) * 3 / 2 + 256;
        snipi_ilp_step *step = room < INT_MAX ? SNIPI_ILP_TAKE(run, snipi_ilp_step, room) : NULL;
        if (!step) return 0;
        if (t->steps) memcpy(step, t->step, t->steps * sizeof *step);
        snipi_ilp_give(run, t->step);
        t->step = step;
        t->room = room;
    }
    t->last = t->steps;
    for (i = 0; i < t->states; i++, t->steps++) t->step[t->steps].parent = t->state[i].parent, t->step[t->steps].move = t->state[i].move;
    return 1;
}

// Merges two lists, keeping of no higher gain only what is cheaper.
static int snipi_ilp_merge(const snipi_ilp_state *a, int na, const snipi_ilp_state *b, int nb, snipi_ilp_state *out) {
    double least = SNIPI_ILP_HUGE;
    int i = 0, j = 0, n = 0;
    while (i < na || j < nb) {
        const snipi_ilp_state *s = j == nb || (i < na && (a[i].gain > b[j].gain || (a[i].gain == b[j].gain && a[i].cost <= b[j].cost))) ? &a[i++] : &b[j++];
        if (s->cost < least) least = s->cost, out[n++] = *s;
    }
    return n;
}

// Looks at all choices of excess below limit. With best, for one of excess below best->excess; without, t->state becomes the undominated
// ones that meet need. Returns 0 when time or memory is short. Memory taken is left to the caller's snipi_ilp_give_since().
static int snipi_ilp_states(snipi_ilp_run *run, const snipi_ilp_sack *k, const snipi_ilp_core *c, double limit, snipi_ilp_best *best,
                            snipi_ilp_table *t) {
    snipi_ilp_curve v;
    int row, i, j, n;
    memset(t, 0, sizeof *t);
    v.price = k->theta - k->mu;
    t->state = SNIPI_ILP_TAKE(run, snipi_ilp_state, 1);
    for (j = 0; j < 2; j++) v.side[j] = SNIPI_ILP_TAKE(run, snipi_ilp_point, c->segments[j] + 1);
    if (!t->state || !v.side[0] || !v.side[1]) return 0;
    t->state->gain = 0, t->state->cost = 0, t->state->parent = t->state->move = 0;
    t->states = c->rows > 0 || k->lack <= 0;
    for (row = 0; row < c->rows && t->states; row++) {
        const snipi_ilp_move *move = c->move + c->row[row].first;
        int64_t reach[2];
        snipi_ilp_state *shifted = SNIPI_ILP_TAKE(run, snipi_ilp_state, t->states), *all = NULL, *merged;
        int alls = 0;
        if (!shifted) return 0;
        reach[0] = k->lack - (t->state[t->states - 1].gain + move[0].gain);
        reach[1] = t->state[0].gain + move[c->row[row].count - 1].gain - k->lack;
        snipi_ilp_curve_make(c, row + 1, reach, &v);
        for (j = 0; j < c->row[row].count; j++) {
            if (move[j].reduced > limit) continue;
            v.at[0] = 0, v.at[1] = v.points[1];
            for (i = n = 0; i < t->states; i++) {
                int64_t gain = t->state[i].gain + move[j].gain;
                double cost = t->state[i].cost + move[j].cost, reduced = cost - k->theta * (double)gain, rounded;
                size_t taken;
                double bound = reduced + snipi_ilp_curve_ask(&v, k->lack - gain, &rounded, &taken);
                if (bound >= SNIPI_ILP_HUGE / 2) break;       // out of reach, as are all of less gain
                if ((i & 4095) == 4095 && snipi_ilp_late(run)) return 0;
                if (best && rounded + reduced < best->excess) {
                    double cut = rounded + reduced - snipi_ilp_margin(run, snipi_ilp_lp_cost(k) + rounded + reduced, k->mu);
                    best->excess = rounded + reduced, best->found = 1, best->row = row, best->parent = (int)t->last + i, best->move = j;
                    best->down = gain >= k->lack, best->segments = taken;
                    if (cut < limit) limit = cut;
                }
                if (bound >= limit) continue;
                shifted[n].gain = gain, shifted[n].cost = cost, shifted[n].parent = (int)t->last + i, shifted[n].move = j;
                n++;
            }
            run->nodes += i;
            if (!n) continue;
            merged = alls < INT_MAX - n ? SNIPI_ILP_TAKE(run, snipi_ilp_state, alls + n) : NULL;
            if (!merged) return 0;
            alls = snipi_ilp_merge(all, alls, shifted, n, merged);
            snipi_ilp_give(run, all);
            all = merged;
        }
        snipi_ilp_give(run, shifted);
        snipi_ilp_give(run, t->state);
        t->state = all;
        t->states = alls;
        if (!snipi_ilp_remember(run, t)) return 0;
        if (snipi_ilp_late(run)) return 0;
    }
    return 1;
}

// The choice that a state of the given row stands for: base, its own move, and those of the steps from parent back.
static void snipi_ilp_trace(const snipi_ilp_sack *k, const snipi_ilp_core *c, const snipi_ilp_table *t, int row, int parent, int move, int *pick) {
    memcpy(pick, k->base, (size_t)k->n * sizeof *pick);
    for (; row >= 0; row--) {
        pick[c->row[row].group] = c->move[c->row[row].first + (size_t)move].item;
        if (row) move = t->step[parent].move, parent = t->step[parent].parent;
    }
}

// >>single: one knapsack by itself
// Improves pick[] (by item) until proven; *proven is a lower bound of any choice's excess. The gap is guessed: a round looks at all choices
// below the guess and either finds the best or raises the bound to the guess; a core as wide as the first choice's gap may be far too wide.
static void snipi_ilp_refine(snipi_ilp_run *run, const snipi_ilp_sack *k, int *pick, double *excess, double *proven) {
    const snipi_ilp_block *mark = run->newest;
    double guess = snipi_ilp_guess(k);
    *proven = 0;
    if (guess < *excess / 1024) guess = *excess / 1024;
    for (;; guess *= 3) {
        snipi_ilp_core core;
        snipi_ilp_table table;
        snipi_ilp_best best;
        double cut = *excess - snipi_ilp_margin(run, snipi_ilp_lp_cost(k) + *excess, k->mu), limit = guess < cut ? guess : cut;
        int done = 0;
        if (*proven >= cut) { *proven = snipi_ilp_settled(run, snipi_ilp_lp_cost(k) + *excess, k->mu, *excess); return; }
        if (snipi_ilp_late(run)) return;
        memset(&best, 0, sizeof best);
        best.excess = *excess;
        if (snipi_ilp_core_make(run, k, limit, &core)) {
            done = snipi_ilp_states(run, k, &core, limit, &best, &table);
            if (best.found) {
                *excess = best.excess;
                snipi_ilp_trace(k, &core, &table, best.row, best.parent, best.move, pick);
                snipi_ilp_complete(&core, best.row, best.down, best.segments, pick);
            }
        }
        snipi_ilp_give_since(run, mark);
        if (!done) return;
        *proven = limit;
    }
}

// Returns 0, nothing changed, when memory is short for the LP.
static int snipi_ilp_single(snipi_ilp_run *run, snipi_ilp_sack *k, int *pick, double *excess, double *proven) {
    if (!snipi_ilp_relax(run, k)) return 0;
    *excess = snipi_ilp_greedy(k, pick);
    snipi_ilp_refine(run, k, pick, excess, proven);
    return 1;
}

// >>join: parts with targets of their own and a target over all. A multiplier mu on the latter separates the parts (Lagrange); each part's
// choices within the gap are listed, and one of each list is chosen by a small knapsack of the same kind.
typedef struct { snipi_ilp_core core; snipi_ilp_table table; } snipi_ilp_list;
typedef struct {
    int parts;
    snipi_ilp_sack *part;
    int **pick;                       // (parts) the best choice so far
    int *shift;                       // (parts) a unit of the total's gain is 2^shift of the part's
    int64_t need;                     // of the total
    double mu;
} snipi_ilp_union;
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
static int64_t snipi_ilp_union_surplus(const snipi_ilp_union *u) {
    int64_t gain = -u->need;
    int p;
    for (p = 0; p < u->parts; p++) gain += snipi_ilp_gain(&u->part[p], u->pick[p]) >> u->shift[p];
    return gain;
}
static double snipi_ilp_union_cost(const snipi_ilp_union *u) {
    double cost = 0;
    int p;
    for (p = 0; p < u->parts; p++) cost += snipi_ilp_cost(&u->part[p], u->pick[p]);
    return cost;
}

// The LP of parts within a total: each part takes what it needs, then all take the cheapest segments that are left; mu is the slope of the
// last. Any mu gives a valid bound. Returns 0 when memory is short.
static int snipi_ilp_union_relax(snipi_ilp_run *run, snipi_ilp_union *u) {
    size_t room = 1, n = 0, i, m;
    int64_t missing = u->need;
    snipi_ilp_segment *s;
    int p;
    u->mu = 0;
    for (p = 0; p < u->parts; p++) {
        snipi_ilp_sack *k = &u->part[p];
        if (!snipi_ilp_relax(run, k)) return 0;
        missing -= (k->lack > 0 ? k->need : k->need - k->lack) >> u->shift[p];
        room += k->first[k->n] - (size_t)k->n + 1;
    }
    if (missing <= 0) return 1;
    s = SNIPI_ILP_TAKE(run, snipi_ilp_segment, room);
    if (!s) return 0;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        int64_t rest = k->lack > 0 ? -k->lack : 0;            // what its last segments give beyond its need
        double per_unit = ldexp(1.0, u->shift[p]);
        for (i = n, m = n + snipi_ilp_segments(k, s + n); i < m; i++) {
            if (s[i].item <= k->base[s[i].group]) continue;
            if (s[i].slope <= k->theta) { rest += s[i].gain; continue; }
            s[n] = s[i];
            s[n].slope *= per_unit;
            s[n++].gain >>= u->shift[p];
        }
        if (rest > 0) s[n].slope = k->theta * per_unit, s[n].gain = rest >> u->shift[p], s[n].group = -1 - p, s[n].item = 0, n++;
    }
    if (n) {
        i = snipi_ilp_select(s, n, missing);
        u->mu = s[i < n ? i : n - 1].slope;
    }
    snipi_ilp_give(run, s);
    for (p = 0; p < u->parts; p++) {
        u->part[p].mu = ldexp(u->mu, -u->shift[p]);
        if (!snipi_ilp_relax(run, &u->part[p])) return 0;
    }
    return 1;
}

// Takes cheaper items, group after group, as far as the surplus allows; returns the change of the cost, which is that of the excess.
static double snipi_ilp_union_spend(const snipi_ilp_union *u) {
    int64_t surplus = snipi_ilp_union_surplus(u);
    double change = 0;
    int p, i, j;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        int64_t gain = snipi_ilp_gain(k, u->pick[p]), others = surplus - (gain >> u->shift[p]);
        for (i = 0; i < k->n; i++) {
            const snipi_ilp_item *o = snipi_ilp_items(k, i), *b = o + u->pick[p][i];
            for (j = 0; j < u->pick[p][i]; j++) {
                int64_t left = gain - b->gain + o[j].gain;
                if (left < k->need || others + (left >> u->shift[p]) < 0) continue;
                change += o[j].cost - b->cost;
                gain = left;
                u->pick[p][i] = j;
                break;
            }
        }
        surplus = others + (gain >> u->shift[p]);
    }
    return change;
}
// Chooses a state of each list; takes it into u->pick if that is better. Returns 0 when time or memory is short.
static int snipi_ilp_union_choose(snipi_ilp_run *run, snipi_ilp_union *u, const snipi_ilp_list *list, double *excess) {
    snipi_ilp_sack top;
    size_t items = 0;
    int64_t surplus = -u->need;
    int p, i, ok, *pick;
    double found, over, proven;
    memset(&top, 0, sizeof top);
    for (p = 0; p < u->parts; p++) items += (size_t)list[p].table.states;
    top.n = u->parts;
    top.need = u->need;
    top.first = SNIPI_ILP_TAKE(run, size_t, (size_t)u->parts + 1), top.items = SNIPI_ILP_TAKE(run, snipi_ilp_item, items);
    top.base = SNIPI_ILP_TAKE(run, int, u->parts), pick = SNIPI_ILP_TAKE(run, int, u->parts);
    if (!top.first || !top.items || !top.base || !pick) return 0;
    for (p = 0, items = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        const snipi_ilp_table *t = &list[p].table;
        snipi_ilp_item *o = top.items + items;
        double cheapest = t->state[t->states - 1].cost;
        for (i = 0; i < t->states; i++)
            o[i].gain = (k->need - k->lack + t->state[i].gain) >> u->shift[p], o[i].cost = t->state[i].cost - cheapest, o[i].option = i;
        i = snipi_ilp_undominated(o, t->states);
        surplus += o[i - 1].gain;
        top.first[p] = items;
        top.spent += k->base_cost + cheapest;
        items += (size_t)i;
    }
    top.first[u->parts] = items;
    if (surplus < 0) return 1;                // the lists are too short yet
    if (!snipi_ilp_single(run, &top, pick, &over, &proven)) return 0;
    ok = over - proven <= 1.000001 * snipi_ilp_margin(run, snipi_ilp_lp_cost(&top) + over, 0);     // was it finished?
    found = *excess - snipi_ilp_union_cost(u) + top.spent;
    for (p = 0; p < u->parts; p++) found += snipi_ilp_items(&top, p)[pick[p]].cost;
    if (found >= *excess) return ok;
    *excess = found;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_state *s = &list[p].table.state[snipi_ilp_items(&top, p)[pick[p]].option];
        snipi_ilp_trace(&u->part[p], &list[p].core, &list[p].table, list[p].core.rows - 1, s->parent, s->move, u->pick[p]);
    }
    return ok;
}

// As snipi_ilp_single(); u->pick is the choice.
static int snipi_ilp_union_solve(snipi_ilp_run *run, snipi_ilp_union *u, double *excess, double *proven) {
    const snipi_ilp_block *mark;
    snipi_ilp_list *list = SNIPI_ILP_TAKE(run, snipi_ilp_list, u->parts);
    double *least = SNIPI_ILP_TAKE(run, double, u->parts), sum = 0, window = 0;
    int64_t surplus;
    int p, i, widest = 0, *trial, stopped = 0;
    for (p = 0; p < u->parts; p++) widest = u->part[p].n > widest ? u->part[p].n : widest;
    trial = SNIPI_ILP_TAKE(run, int, widest);
    if (!list || !least || !trial || !snipi_ilp_union_relax(run, u)) return 0;
    for (p = 0, *excess = 0; p < u->parts; p++) *excess += snipi_ilp_greedy(&u->part[p], u->pick[p]);
    surplus = snipi_ilp_union_surplus(u);
    if (surplus < 0) {                        // costs 1e300 apart, slopes with no digits left: all at the largest gain
        for (p = 0; p < u->parts; p++)
            for (i = 0; i < u->part[p].n; i++) u->pick[p][i] = snipi_ilp_count(&u->part[p], i) - 1;
        return 0;
    }
    *excess += u->mu * (double)surplus + snipi_ilp_union_spend(u);
    for (p = 0; p < u->parts; p++) {          // each part's integer bound at mu, by itself
        double over = snipi_ilp_greedy(&u->part[p], trial);
        snipi_ilp_refine(run, &u->part[p], trial, &over, &least[p]);
        sum += least[p];
        window += snipi_ilp_guess(&u->part[p]) * 0.25 / u->parts;
    }
    *proven = sum;
    if (window < (*excess - sum) / 1024) window = (*excess - sum) / 1024;
    for (mark = run->newest;; window *= 4) {
        double cost = snipi_ilp_union_cost(u), cut = *excess - snipi_ilp_margin(run, cost, 0), limit = cut - sum < window ? cut - sum : window;
        if (*proven >= cut) { *proven = snipi_ilp_settled(run, cost, 0, *excess); return 1; }
        if (stopped || snipi_ilp_late(run)) return 1;
        for (p = 0; p < u->parts; p++) {
            double room = least[p] + limit + 0.01 * SNIPI_ILP_PROOF * cost;
            stopped = !snipi_ilp_core_make(run, &u->part[p], room, &list[p].core) ||
                      !snipi_ilp_states(run, &u->part[p], &list[p].core, room, NULL, &list[p].table);
            if (stopped || !list[p].table.states) break;      // the latter: nothing of this part is within the window
        }
        if (p == u->parts) stopped = !snipi_ilp_union_choose(run, u, list, excess);
        if (!stopped) *proven = window < cut - sum ? sum + limit : cut;
        snipi_ilp_give_since(run, mark);
    }
}

// >>solve: from the caller's problem to knapsacks and back
// Writes the options' costs above their group's least, or gains, group after group and times 2^*exponent, near 1; returns the sum of the
// groups' largest.
static double snipi_ilp_flatten(const snip_ilp_problem *p, const int *list, int n, int costs, double *x, int *exponent) {
    double most = 0, sum = 0, factor;
    size_t m = 0, at = 0;
    int i, j;
    for (i = 0; i < n; i++) {
        const snip_ilp_group *g = &p->groups[list[i]];
        double least = snipi_ilp_cheapest(g);
        for (j = 0; j < g->n_options; j++, m++) {
            x[m] = costs ? g->options[j].cost - least : g->options[j].gain;
            if (x[m] > most) most = x[m];
        }
    }
    *exponent = snipi_ilp_exponent(most);
    factor = ldexp(1.0, *exponent);
    for (i = 0; i < n; i++, sum += most)
        for (j = 0, most = 0; j < p->groups[list[i]].n_options; j++, at++) {
            x[at] *= factor;
            if (x[at] > most) most = x[at];
        }
    return sum;
}

// Steps of a lattice if their rounding is small beside the tolerance of the target; else 2^60 <= most < 2^61.
static snipi_ilp_unit snipi_ilp_unit_of(double sum, int exponent, int n, double lattice, double error) {
    snipi_ilp_unit u;
    int e = 0;
    (void)frexp(sum, &e);
    u.exponent = exponent;
    u.lattice = lattice > 0 && sum / lattice < 1e9 && error <= 0.05 * SNIPI_ILP_TOLERANCE * (sum / lattice);
    u.per_unit = u.lattice ? 1 / lattice : ldexp(1.0, 61 - e);
    u.bits = sum > 0 ? exponent + 61 - e : INT_MAX / 2;       // with nothing to count any unit will do
    u.rounding = u.lattice ? error : 0.5 * n;
    u.most = sum * u.per_unit;
    return u;
}

// Fills k's items from flat costs and gains, and pick with the largest gains; returns their sum.
static int64_t snipi_ilp_read(const snip_ilp_problem *p, const int *list, const double *cost, const double *gain, double per_unit,
                              snipi_ilp_sack *k, int *pick) {
    int64_t most = 0;
    size_t m = 0;
    int i, j;
    k->first[0] = 0;
    for (i = 0; i < k->n; i++) {
        snipi_ilp_item *o = k->items + k->first[i];
        for (j = 0; j < p->groups[list[i]].n_options; j++, m++)
            o[j].gain = (int64_t)(gain[m] * per_unit + 0.5), o[j].cost = cost[m], o[j].option = j;
        pick[i] = snipi_ilp_undominated(o, j) - 1;
        k->first[i + 1] = k->first[i] + (size_t)pick[i] + 1;
        most += o[pick[i]].gain;
    }
    return most;
}

// Fills choice, *gap left between its cost and the bound, *proven. Returns 0, choice untouched, when memory is short for a start.
static int snipi_ilp_search(snipi_ilp_run *run, const snip_ilp_problem *p, int *choice, double *gap, int *proven) {
    int stages = snipi_ilp_stages(p), n = p->n_groups, i, q, bits, coupled, cost_exponent, exponent, targets = 0;
    int *order = SNIPI_ILP_TAKE(run, int, n), *start = SNIPI_ILP_TAKE(run, int, (size_t)stages + 1);
    int *pick = SNIPI_ILP_TAKE(run, int, n), *base = SNIPI_ILP_TAKE(run, int, n);
    size_t *first = SNIPI_ILP_TAKE(run, size_t, (size_t)n + (size_t)stages), options = 0, read = 0, kept = 0;
    double *cost, *gain, lattice = 0, error = 0, total, left = 0, excess, bound;
    long double sum = 0;
    int64_t most = 0;
    snipi_ilp_item *items;
    snipi_ilp_unit all, unit;
    snipi_ilp_union u;
    for (i = 0; i < n; i++) options += (size_t)p->groups[i].n_options;
    items = SNIPI_ILP_TAKE(run, snipi_ilp_item, options), u.part = SNIPI_ILP_TAKE(run, snipi_ilp_sack, stages);
    u.pick = SNIPI_ILP_TAKE(run, int *, stages), u.shift = SNIPI_ILP_TAKE(run, int, stages);
    cost = SNIPI_ILP_TAKE(run, double, options), gain = SNIPI_ILP_TAKE(run, double, options);
    if (!order || !start || !pick || !base || !first || !items || !u.part || !u.pick || !u.shift || !cost || !gain) return 0;
    for (q = 0; q < stages; q++) sum += snipi_ilp_stage_target(p, q), targets += snipi_ilp_stage_target(p, q) > 0;
    coupled = p->total_target > sum && stages > 1 && targets; // else the stages imply the total, or it is all there is
    u.parts = targets ? stages : 1;
    memset(start, 0, ((size_t)stages + 1) * sizeof *start);
    for (i = 0; i < n; i++) start[targets ? snipi_ilp_stage(p, i) : 0]++;
    for (q = 1; q <= u.parts; q++) start[q] += start[q - 1];
    for (i = n - 1; i >= 0; i--) order[--start[targets ? snipi_ilp_stage(p, i) : 0]] = i;
    (void)snipi_ilp_flatten(p, order, n, 1, cost, &cost_exponent);
    run->cost_step = snipi_ilp_common_unit(cost, options, &error);
    if (error > 1e-13) run->cost_step = 0;    // the proof's relative precision, of one step
    total = snipi_ilp_flatten(p, order, n, 0, gain, &exponent);
    if (coupled) lattice = snipi_ilp_common_unit(gain, options, &error);
    for (q = 0; q < u.parts && coupled; q++) {                // a total needs one lattice, fine enough for every part
        double reach = snipi_ilp_flatten(p, order + start[q], start[q + 1] - start[q], 0, gain, &i);
        if (!snipi_ilp_unit_of(ldexp(reach, exponent - i), exponent, n, lattice, error).lattice && reach > 0) lattice = 0;
    }
    all = snipi_ilp_unit_of(total, exponent, n, lattice, error);
    if (!all.lattice) lattice = 0;
    bits = all.bits;
    for (q = 0; q < u.parts; q++) {
        snipi_ilp_sack *k = &u.part[q];
        double reach, target = snipi_ilp_stage_target(p, q);
        if (u.parts == 1 && p->total_target > target) target = p->total_target;
        memset(k, 0, sizeof *k);
        k->n = start[q + 1] - start[q];
        k->items = items + kept;
        k->first = first + start[q] + q;
        k->base = base + start[q];
        u.pick[q] = pick + start[q];
        for (i = 0, options = 0; i < k->n; i++) options += (size_t)p->groups[order[start[q] + i]].n_options;
        reach = snipi_ilp_flatten(p, order + start[q], k->n, 0, gain, &exponent);
        if (!coupled) lattice = snipi_ilp_common_unit(gain, options, &error);
        unit = snipi_ilp_unit_of(reach, exponent, k->n, coupled ? ldexp(lattice, exponent - all.exponent) : lattice, error);
        most = snipi_ilp_read(p, order + start[q], cost + read, gain, unit.per_unit, k, u.pick[q]);
        k->need = snipi_ilp_need(&unit, target, most);
        u.shift[q] = unit.bits;
        if (unit.bits < bits) bits = unit.bits;
        read += options;
        kept += k->first[k->n];
    }
    snipi_ilp_give(run, gain);
    snipi_ilp_give(run, cost);
    *proven = 1;
    if (coupled) {
        for (q = 0, most = 0; q < u.parts; q++) {             // the total is counted in the coarsest unit, parts rounded down to it
            u.shift[q] = all.lattice ? 0 : u.shift[q] - bits < 62 ? u.shift[q] - bits : 62;
            most += snipi_ilp_gain(&u.part[q], u.pick[q]) >> u.shift[q];
        }
        if (!all.lattice) all.per_unit *= ldexp(1.0, bits - all.bits), all.most *= ldexp(1.0, bits - all.bits), all.rounding += u.parts;
        u.need = snipi_ilp_need(&all, p->total_target, most);
        if (!snipi_ilp_union_solve(run, &u, &excess, &bound)) excess = snipi_ilp_union_cost(&u), bound = 0;
        *proven = bound >= excess;
        left = excess - bound;
    } else for (q = 0; q < u.parts; q++) {
        if (!snipi_ilp_single(run, &u.part[q], u.pick[q], &excess, &bound)) excess = snipi_ilp_cost(&u.part[q], u.pick[q]), bound = 0;
        if (bound < excess) *proven = 0;
        left += excess - bound;
    }
    *gap = ldexp(left, -cost_exponent);
    for (q = 0; q < u.parts; q++)
        for (i = start[q]; i < start[q + 1]; i++) choice[order[i]] = snipi_ilp_items(&u.part[q], i - start[q])[pick[i]].option;
    return 1;
}

snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params, int *choice, snip_ilp_result *result) {
    snip_ilp_params use = {0, 0, 0};
    snipi_ilp_run run;
    long double cost = 0, gain = 0, least = 0;
    double gap = 0, shortfall;
    int i, proven = 1;
    if (params) use = *params;
    if (!snipi_ilp_problem_ok(problem) || (problem->n_groups > 0 && !choice) || !snipi_ilp_finite(use.time_limit) || use.time_limit < 0 ||
        !snipi_ilp_finite(use.rel_gap) || use.rel_gap < 0) return SNIP_ILP_BAD_ARGUMENT;
    memset(&run, 0, sizeof run);
    run.limit = use.max_memory ? use.max_memory : (size_t)512 << 20;
    run.start = snipi_ilp_clock();
    run.deadline = use.time_limit > 0 ? run.start + use.time_limit : 0;
    run.rel_gap = use.rel_gap;
    if (snipi_ilp_unreachable(problem, &shortfall) >= 0) {
        if (result) memset(result, 0, sizeof *result), result->seconds = snipi_ilp_clock() - run.start;
        return SNIP_ILP_INFEASIBLE;
    }
    if (problem->n_groups > 0 && !snipi_ilp_search(&run, problem, choice, &gap, &proven)) {
        for (i = 0; i < problem->n_groups; i++) choice[i] = snipi_ilp_largest(&problem->groups[i]);
        gap = SNIPI_ILP_HUGE, proven = 0;
    }
    snipi_ilp_give_since(&run, NULL);
    for (i = 0; i < problem->n_groups; i++) {
        const snip_ilp_group *g = &problem->groups[i];
        cost += g->options[choice[i]].cost, gain += g->options[choice[i]].gain, least += snipi_ilp_cheapest(g);
    }
    if (result) {
        result->cost = (double)cost;
        result->gain = (double)gain;
        result->bound = (double)least;
        if (result->cost * (1 - 1e-14) - gap > result->bound) result->bound = result->cost * (1 - 1e-14) - gap;     // rounding
        if (proven || result->bound > result->cost) result->bound = result->cost;
        result->nodes = run.nodes;
        result->seconds = snipi_ilp_clock() - run.start;
    }
    return proven ? SNIP_ILP_OPTIMAL : SNIP_ILP_FEASIBLE;
}

int snip_ilp_shortfall(const snip_ilp_problem *problem, double *shortfall) {
    double amount;
    int target;
    if (!snipi_ilp_problem_ok(problem)) return -2;
    target = snipi_ilp_unreachable(problem, &amount);
    if (shortfall) *shortfall = amount;
    return target;
}

#ifdef __cplusplus
}
#endif
#endif // SNIP_ILP_IMPLEMENTATION
