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

// As snip_ilp_shortfall(). Stages are summed a chunk at a time, so that their sums fit on the stack; sums of gains near DBL_MAX are
// scaled down, each by itself.
static int snipi_ilp_unreachable(const snip_ilp_problem *p, double *shortfall) {
    enum { CHUNK = 128 };
    const double small = 1.0 / 18446744073709551616.0;         // 2^-64
    snipi_ilp_sum sum[CHUNK], all = {0, 0};
    double most[CHUNK], largest = 0, lack, scale;
    int i, s, first, stages = p->n_stages > 1 ? p->n_stages : 1;
    *shortfall = 0;
    for (i = 0; i < p->n_groups; i++) {
        double gain = p->groups[i].options[snipi_ilp_largest(&p->groups[i])].gain;
        if (gain > largest) largest = gain;
    }
    for (first = 0; first < stages; first += CHUNK) {
        int last = stages - first > CHUNK ? first + CHUNK : stages, pass;
        for (s = 0; s < CHUNK; s++) sum[s].high = sum[s].low = most[s] = 0;
        for (pass = 0; pass < 2; pass++)
            for (i = 0; i < p->n_groups; i++) {
                const snip_ilp_group *g = &p->groups[i];
                double gain;
                if (g->stage < first || g->stage >= last) continue;
                s = g->stage - first;
                gain = g->options[snipi_ilp_largest(g)].gain;
                if (pass) snipi_ilp_add(&sum[s], most[s] > 1e280 ? gain * small : gain);
                else if (gain > most[s]) most[s] = gain;
            }
        for (s = first; s < last; s++) {
            double reach = snipi_ilp_total(&sum[s - first]);
            scale = most[s - first] > 1e280 ? small : 1;
            snipi_ilp_add(&all, largest > 1e280 && scale >= 1 ? reach * small : reach);
            lack = snipi_ilp_stage_target(p, s) * scale - reach;
            if (lack > SNIPI_ILP_TOLERANCE * reach) { *shortfall = lack / scale; return s; }
        }
    }
    scale = largest > 1e280 ? small : 1;
    lack = p->total_target * scale - snipi_ilp_total(&all);
    if (lack > SNIPI_ILP_TOLERANCE * snipi_ilp_total(&all)) { *shortfall = lack / scale; return p->n_stages; }
    return -1;
}

// >>numbers: gains become integers, so that sums of gains are exact and equal sums compare equal

// x * 2^exponent; factor is that power where a double holds it, else 0
typedef struct { double factor; int exponent; } snipi_ilp_power;

static snipi_ilp_power snipi_ilp_power_of(int exponent) {
    snipi_ilp_power p;
    p.exponent = exponent;
    p.factor = exponent > -1000 && exponent < 1000 ? ldexp(1.0, exponent) : 0;
    return p;
}
static double snipi_ilp_times(double x, snipi_ilp_power p) { return p.factor > 0 ? x * p.factor : ldexp(x, p.exponent); }

// The values of some groups, scaled by a power of two into 0 .. 1: no sum of them overflows, and no small one is lost.
typedef struct { const snip_ilp_problem *problem; const int *list; int n; int of_cost; snipi_ilp_power scale; } snipi_ilp_values;

static double snipi_ilp_value(const snipi_ilp_values *v, const snip_ilp_option *o) {
    return snipi_ilp_times(v->of_cost ? o->cost : o->gain, v->scale);
}

static double snipi_ilp_largest_value(const snipi_ilp_values *v, const snip_ilp_group *g) {
    double most = 0;
    int j;
    for (j = 0; j < g->n_options; j++) {
        double x = v->of_cost ? g->options[j].cost : g->options[j].gain;
        if (x > most) most = x;
    }
    return most;
}

static snipi_ilp_values snipi_ilp_values_of(const snip_ilp_problem *p, const int *list, int n, int of_cost) {
    snipi_ilp_values v;
    double most = 0;
    int i, exponent = 0;
    v.problem = p, v.list = list, v.n = n, v.of_cost = of_cost;
    for (i = 0; i < n; i++) {
        double x = snipi_ilp_largest_value(&v, &p->groups[list[i]]);
        if (x > most) most = x;
    }
    if (most > 0) (void)frexp(most, &exponent);
    v.scale = snipi_ilp_power_of(-exponent);
    return v;
}

static double snipi_ilp_off_lattice(double q) { return fabs(q - floor(q + 0.5)); }

// Euclid's algorithm on rounded numbers; 0 when the values have no common unit. The unit is snapped to a fraction of the largest
// value at every step, which keeps it from drifting.
static double snipi_ilp_common_unit(const snipi_ilp_values *v) {
    double largest = 0, unit;
    int i, j;
    for (i = 0; i < v->n; i++) {
        double x = snipi_ilp_times(snipi_ilp_largest_value(v, &v->problem->groups[v->list[i]]), v->scale);
        if (x > largest) largest = x;
    }
    unit = largest;
    for (i = 0; i < v->n; i++) {
        const snip_ilp_group *g = &v->problem->groups[v->list[i]];
        for (j = 0; j < g->n_options; j++) {
            double x = snipi_ilp_value(v, &g->options[j]), a, b, q;
            if (!(x > 0)) continue;
            q = x / unit;
            if (snipi_ilp_off_lattice(q) <= 1e-9 * (q > 1 ? q : 1)) continue;
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

// The largest sum of distances to the lattice that a choice can have, and the largest sum of values, both in units.
static void snipi_ilp_lattice_error(const snipi_ilp_values *v, double unit, double *error, double *sum) {
    int i, j;
    *error = *sum = 0;
    for (i = 0; i < v->n; i++) {
        const snip_ilp_group *g = &v->problem->groups[v->list[i]];
        double worst = 0;
        for (j = 0; j < g->n_options; j++) {
            double r = snipi_ilp_off_lattice(snipi_ilp_value(v, &g->options[j]) / unit);
            if (r > worst) worst = r;
        }
        *error += worst;
        *sum += snipi_ilp_times(snipi_ilp_largest_value(v, g), v->scale) / unit;
    }
}

// integer = round(gain * scale * per_unit)
typedef struct {
    snipi_ilp_power scale;
    double per_unit;
    int lattice, bits;    // off a lattice, integer = round(gain * 2^bits)
    double most;          // the sum of the groups' largest gains, and
    double rounding;      // how far a choice's integer sum can be from its true one, both in units
} snipi_ilp_unit;

// Counts in the given step (of values scaled as those in like) if the rounding is small beside the tolerance of the target; else in
// a power of two, with 2^60 <= most < 2^61. step 0: the latter at once.
static snipi_ilp_unit snipi_ilp_unit_of(const snip_ilp_problem *p, const int *list, int n, double step, const snipi_ilp_values *like) {
    snipi_ilp_values v = snipi_ilp_values_of(p, list, n, 0);
    snipi_ilp_power own = v.scale;
    snipi_ilp_unit u;
    int i, exponent = 0;
    memset(&u, 0, sizeof u);
    if (step > 0) {
        u.scale = v.scale = like->scale;
        snipi_ilp_lattice_error(&v, step, &u.rounding, &u.most);
        u.per_unit = 1 / step;
        u.lattice = u.most < 1e9 && u.rounding <= 0.05 * SNIPI_ILP_TOLERANCE * u.most;
        if (u.lattice) return u;
    }
    u.scale = v.scale = own;
    u.most = 0;
    for (i = 0; i < n; i++) u.most += snipi_ilp_times(snipi_ilp_largest_value(&v, &p->groups[list[i]]), v.scale);
    (void)frexp(u.most, &exponent);
    u.per_unit = ldexp(1.0, 61 - exponent);
    u.bits = u.most > 0 ? v.scale.exponent + 61 - exponent : INT_MAX / 2;     // nothing to count: any unit will do
    u.most *= u.per_unit;
    u.rounding = 0.5 * n;
    return u;
}

// To a unit of 2^-bits, in which the sums of so many parts have been rounded down.
static void snipi_ilp_coarsen(snipi_ilp_unit *u, int bits, int parts) {
    double factor = ldexp(1.0, bits - u->bits);
    u->per_unit *= factor;
    u->most *= factor;
    u->rounding += parts;
    u->bits = bits;
}

static int64_t snipi_ilp_integer(const snipi_ilp_unit *u, double gain) {
    return (int64_t)(snipi_ilp_times(gain, u->scale) * u->per_unit + 0.5);
}

// The least integer sum that is certain to be within the tolerance of the target; all choices that truly meet it reach it.
static int64_t snipi_ilp_need(const snipi_ilp_unit *u, double target) {
    double tolerance = SNIPI_ILP_TOLERANCE * u->most - u->rounding;
    if (tolerance < u->rounding) tolerance = u->rounding;
    return target > 0 ? (int64_t)ceil(snipi_ilp_times(target, u->scale) * u->per_unit - tolerance) : 0;
}

// Different costs of choices differ by at least this (in scaled costs); 0 when costs lie on no lattice.
static double snipi_ilp_cost_step(const snipi_ilp_values *costs) {
    double step = snipi_ilp_common_unit(costs), error, sum;
    if (!(step > 0)) return 0;
    snipi_ilp_lattice_error(costs, step, &error, &sum);
    return sum < 1e9 && error <= 1e-13 ? step : 0;
}

// >>sack: one knapsack, min sum(cost - mu * gain) over choices with sum(gain) >= need

typedef struct { int64_t gain; double cost; int option; } snipi_ilp_item;
typedef struct { double slope; int64_t gain; int group, item; } snipi_ilp_segment;   // of a lower convex hull, ending at item

typedef struct {
    int n;                        // groups
    size_t *first;                // (n + 1) group i owns items first[i] .. first[i+1]-1
    snipi_ilp_item *items;        // within a group gain and cost strictly increase; the first has cost 0
    int64_t need;
    double mu;                    // reward for a unit of gain: 0 but in the coupled problem
    double spent;                 // cost above the cheapest options that is not in the items
    // found by snipi_ilp_relax()
    int *base;                    // (n) the LP's choice, rounded down
    double theta;                 // the LP's multiplier, >= mu
    int64_t lack;                 // need - gain of base
    double base_cost;
} snipi_ilp_sack;

static int snipi_ilp_item_before(const snipi_ilp_item *a, const snipi_ilp_item *b) {
    if (a->gain != b->gain) return a->gain < b->gain;
    if (a->cost < b->cost || b->cost < a->cost) return a->cost < b->cost;
    return a->option < b->option;
}
static int snipi_ilp_compare_items(const void *a, const void *b) {
    return snipi_ilp_item_before((const snipi_ilp_item *)a, (const snipi_ilp_item *)b) ? -1 : 1;
}

// Sorts by gain and drops dominated items: those that another beats or equals in both gain and cost. Returns how many stay.
static int snipi_ilp_undominated(snipi_ilp_item *items, int n) {
    double least = SNIPI_ILP_HUGE;
    int i, j, kept = n;
    if (n <= 40) {
        for (i = 1; i < n; i++) {
            snipi_ilp_item x = items[i];
            for (j = i; j > 0 && snipi_ilp_item_before(&x, &items[j - 1]); j--) items[j] = items[j - 1];
            items[j] = x;
        }
    } else qsort(items, (size_t)n, sizeof *items, snipi_ilp_compare_items);
    for (i = n - 1; i >= 0; i--) {            // from the largest gain down, costs must fall; survivors gather at the end
        if (items[i].cost < least) {
            least = items[i].cost;
            if (kept < n && items[kept].gain == items[i].gain) kept++;
            items[--kept] = items[i];
        }
    }
    memmove(items, items + kept, (size_t)(n - kept) * sizeof *items);
    return n - kept;
}

// >>lp: the linear relaxation. Each group's lower convex hull is cut into segments; taken in order of slope until need is met, they
// solve the LP (Sinha & Zoltners 1979). The break segment is found by weighted quickselect in linear time (Dyer 1984, Zemel 1984).

static size_t snipi_ilp_segments(const snipi_ilp_sack *k, snipi_ilp_segment *segments) {
    size_t m = 0;
    int i, j;
    for (i = 0; i < k->n; i++) {
        const snipi_ilp_item *o = k->items + k->first[i];
        int count = (int)(k->first[i + 1] - k->first[i]);
        size_t start = m;
        for (j = 1; j < count; j++) {
            for (;;) {
                int from = m > start ? segments[m - 1].item : 0;
                double slope = (o[j].cost - o[from].cost) / (double)(o[j].gain - o[from].gain);
                if (m > start && segments[m - 1].slope >= slope) { m--; continue; }
                segments[m].slope = slope;
                segments[m].gain = o[j].gain - o[from].gain;
                segments[m].group = i;
                segments[m].item = j;
                m++;
                break;
            }
        }
    }
    return m;
}

static void snipi_ilp_swap(snipi_ilp_segment *a, snipi_ilp_segment *b) {
    snipi_ilp_segment t = *a;
    *a = *b;
    *b = t;
}
static int snipi_ilp_segment_before(const snipi_ilp_segment *a, const snipi_ilp_segment *b) {
    if (a->slope < b->slope || b->slope < a->slope) return a->slope < b->slope;
    if (a->group != b->group) return a->group < b->group;
    return a->item < b->item;
}

// Reorders the segments so that the first p, all of least slope, gain less than need and with the next one reach it; returns p.
// p == n when all together do not reach it.
static size_t snipi_ilp_select(snipi_ilp_segment *s, size_t n, int64_t need) {
    size_t low = 0, high = n, i, j;
    if (need <= 0) return 0;
    while (high - low > 24) {
        double a = s[low + (high - low) / 4].slope, b = s[low + (high - low) / 2].slope, c = s[low + (high - low) / 4 * 3].slope;
        double pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
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
        if (equal >= need) { high = more; break; }
        need -= equal;
        low = more;
    }
    if (high > low && !(s[low].slope < s[high - 1].slope) && high - low > 24) {    // all of one slope: any order will do
        for (i = low; i < high && s[i].gain < need; i++) need -= s[i].gain;
        return i;
    }
    for (i = low + 1; i < high; i++) {
        snipi_ilp_segment x = s[i];
        for (j = i; j > low && snipi_ilp_segment_before(&x, &s[j - 1]); j--) s[j] = s[j - 1];
        s[j] = x;
    }
    for (i = low; i < high && s[i].gain < need; i++) need -= s[i].gain;
    return i;
}

// Solves the LP: base, theta, lack. Returns 0 when memory is short. Needs sum of largest gains >= need.
static int snipi_ilp_relax(snipi_ilp_run *run, snipi_ilp_sack *k) {
    snipi_ilp_segment *s = (snipi_ilp_segment *)snipi_ilp_take(run, k->first[k->n] - (size_t)k->n + 1, sizeof *s);
    size_t i, m, taken = 0;
    int64_t gain = 0;
    snipi_ilp_sum cost = {0, 0};
    int g;
    if (!s) return 0;
    m = snipi_ilp_segments(k, s);
    memset(k->base, 0, (size_t)k->n * sizeof *k->base);
    for (g = 0; g < k->n; g++) gain += k->items[k->first[g]].gain;
    if (k->mu > 0)
        for (i = 0; i < m; i++)
            if (s[i].slope < k->mu) { gain += s[i].gain; snipi_ilp_swap(&s[taken++], &s[i]); }
    k->theta = k->mu;
    if (gain < k->need) {
        taken += snipi_ilp_select(s + taken, m - taken, k->need - gain);
        k->theta = s[taken < m ? taken : m - 1].slope;
    }
    for (i = 0; i < taken; i++)
        if (k->base[s[i].group] < s[i].item) k->base[s[i].group] = s[i].item;
    snipi_ilp_give(run, s);
    k->lack = k->need;
    for (g = 0; g < k->n; g++) {
        const snipi_ilp_item *o = &k->items[k->first[g] + (size_t)k->base[g]];
        k->lack -= o->gain;
        snipi_ilp_add(&cost, o->cost);
    }
    k->base_cost = snipi_ilp_total(&cost);
    return 1;
}

// From here on a choice x is valued by its excess over the LP bound,
//     sum of reduced costs (cost_j - cost_base) - theta * (gain_j - gain_base) >= 0, plus (theta - mu) * (gain(x) - need) >= 0,
// a sum of small numbers, so that little is lost to rounding.
static double snipi_ilp_reduced(const snipi_ilp_sack *k, const snipi_ilp_item *o, const snipi_ilp_item *base) {
    double r = (o->cost - base->cost) - k->theta * (double)(o->gain - base->gain);
    return r > 0 ? r : 0;
}

// >>greedy: a first choice: base, the cheapest single upgrade that meets need, then the best single downgrade that the surplus allows

static double snipi_ilp_greedy(const snipi_ilp_sack *k, int *pick) {
    int64_t surplus = -k->lack;
    double excess = 0, least = SNIPI_ILP_HUGE, most = 0;
    int i, j, group = -1, item = 0;
    memcpy(pick, k->base, (size_t)k->n * sizeof *pick);
    if (k->lack > 0) {
        for (i = 0; i < k->n; i++) {
            const snipi_ilp_item *o = k->items + k->first[i], *b = o + k->base[i];
            int count = (int)(k->first[i + 1] - k->first[i]);
            if (o[count - 1].gain - b->gain < k->lack) continue;
            for (j = k->base[i] + 1; o[j].gain - b->gain < k->lack; j++) {}
            for (; j < count; j++) {
                double cost = (o[j].cost - b->cost) - k->mu * (double)(o[j].gain - b->gain);
                if (cost < least) { least = cost; group = i; item = j; }
            }
        }
        if (group < 0) return SNIPI_ILP_HUGE;     // cannot be: the break segment is one
        {
            const snipi_ilp_item *o = k->items + k->first[group];
            excess = snipi_ilp_reduced(k, &o[item], &o[k->base[group]]);
            surplus += o[item].gain - o[k->base[group]].gain;
            pick[group] = item;
        }
    }
    item = -1;
    for (i = 0; i < k->n; i++) {
        const snipi_ilp_item *o = k->items + k->first[i], *b = o + pick[i];
        for (j = 0; j < pick[i]; j++) {
            double saved = (b->cost - o[j].cost) - k->mu * (double)(b->gain - o[j].gain);
            if (b->gain - o[j].gain <= surplus && saved > most) { most = saved; group = i; item = j; }
        }
    }
    if (item >= 0) {
        const snipi_ilp_item *o = k->items + k->first[group], *b = o + k->base[group];
        excess += snipi_ilp_reduced(k, &o[item], b) - snipi_ilp_reduced(k, &o[pick[group]], b);
        surplus -= o[pick[group]].gain - o[item].gain;
        pick[group] = item;
    }
    return excess + (k->theta - k->mu) * (double)surplus;
}

// >>core: the groups that have an item of reduced cost below the limit besides their base, most ambiguous first (Pisinger 1995)

typedef struct { int64_t gain; double cost, reduced; int item; } snipi_ilp_move;     // relative to the base
typedef struct { double key; int group, count; size_t first; } snipi_ilp_row;        // moves first .. first+count-1, gain increasing
typedef struct {
    int rows;
    snipi_ilp_row *row;
    snipi_ilp_move *move;
    size_t ups, downs;
    snipi_ilp_segment *up, *down;     // hulls of reduced cost over gain won or lost; slope increasing, group is the row
} snipi_ilp_core;

static int snipi_ilp_compare_rows(const void *a, const void *b) {
    const snipi_ilp_row *x = (const snipi_ilp_row *)a, *y = (const snipi_ilp_row *)b;
    if (x->key < y->key || y->key < x->key) return x->key < y->key ? -1 : 1;
    return x->group < y->group ? -1 : 1;
}
static int snipi_ilp_compare_segments(const void *a, const void *b) {
    return snipi_ilp_segment_before((const snipi_ilp_segment *)a, (const snipi_ilp_segment *)b) ? -1 : 1;
}

static void snipi_ilp_core_free(snipi_ilp_run *run, snipi_ilp_core *c) {
    snipi_ilp_give(run, c->row);
    snipi_ilp_give(run, c->move);
    snipi_ilp_give(run, c->up);
    snipi_ilp_give(run, c->down);
    memset(c, 0, sizeof *c);
}

// One side of a row's hull, from the base outward: step is +1 or -1, m the number of segments so far.
static size_t snipi_ilp_side(const snipi_ilp_move *o, int base, int end, int step, int row, snipi_ilp_segment *s, size_t m) {
    size_t start = m;
    int j;
    for (j = base + step; j != end; j += step) {
        for (;;) {
            const snipi_ilp_move *from = &o[m > start ? s[m - 1].item : base];
            int64_t gain = step > 0 ? o[j].gain - from->gain : from->gain - o[j].gain;
            double slope = (o[j].reduced - from->reduced) / (double)gain;
            if (m > start && s[m - 1].slope >= slope) { m--; continue; }
            s[m].slope = slope;
            s[m].gain = gain;
            s[m].group = row;
            s[m].item = j;
            m++;
            break;
        }
    }
    return m;
}

static int snipi_ilp_core_make(snipi_ilp_run *run, const snipi_ilp_sack *k, double limit, snipi_ilp_core *c) {
    size_t moves = 0;
    int i, j, rows = 0, pass;
    memset(c, 0, sizeof *c);
    for (pass = 0; pass < 2; pass++) {        // count, then fill
        size_t m = 0;
        int r = 0;
        for (i = 0; i < k->n; i++) {
            const snipi_ilp_item *o = k->items + k->first[i], *b = o + k->base[i];
            int count = (int)(k->first[i + 1] - k->first[i]);
            size_t start = m;
            double key = SNIPI_ILP_HUGE;
            for (j = 0; j < count; j++) {
                double reduced = snipi_ilp_reduced(k, &o[j], b);
                if (j != k->base[i]) {
                    if (reduced >= limit) continue;
                    if (reduced < key) key = reduced;
                }
                if (pass) {
                    c->move[m].gain = o[j].gain - b->gain;
                    c->move[m].cost = o[j].cost - b->cost;
                    c->move[m].reduced = reduced;
                    c->move[m].item = j;
                }
                m++;
            }
            if (m == start + 1) { m = start; continue; }
            if (pass) {
                c->row[r].key = key;
                c->row[r].group = i;
                c->row[r].first = start;
                c->row[r].count = (int)(m - start);
            }
            r++;
        }
        if (pass) break;
        rows = r;
        moves = m;
        c->row = (snipi_ilp_row *)snipi_ilp_take(run, (size_t)rows + 1, sizeof *c->row);
        c->move = (snipi_ilp_move *)snipi_ilp_take(run, moves + 1, sizeof *c->move);
        c->up = (snipi_ilp_segment *)snipi_ilp_take(run, moves + 1, sizeof *c->up);
        c->down = (snipi_ilp_segment *)snipi_ilp_take(run, moves + 1, sizeof *c->down);
        if (!c->row || !c->move || !c->up || !c->down) { snipi_ilp_core_free(run, c); return 0; }
    }
    c->rows = rows;
    qsort(c->row, (size_t)rows, sizeof *c->row, snipi_ilp_compare_rows);
    for (i = 0; i < rows; i++) {
        const snipi_ilp_move *o = c->move + c->row[i].first;
        int base = 0;
        while (o[base].item != k->base[c->row[i].group]) base++;
        c->ups = snipi_ilp_side(o, base, c->row[i].count, 1, i, c->up, c->ups);
        c->downs = snipi_ilp_side(o, base, -1, -1, i, c->down, c->downs);
    }
    qsort(c->up, c->ups, sizeof *c->up, snipi_ilp_compare_segments);
    qsort(c->down, c->downs, sizeof *c->down, snipi_ilp_compare_segments);
    return 1;
}

// The reduced cost of the 16th most ambiguous group: a first guess of the gap.
static double snipi_ilp_guess(const snipi_ilp_sack *k) {
    enum { AMBIGUOUS = 16 };
    double best[AMBIGUOUS];
    int i, j, found = 0;
    for (i = 0; i < k->n; i++) {
        const snipi_ilp_item *o = k->items + k->first[i], *b = o + k->base[i];
        int count = (int)(k->first[i + 1] - k->first[i]);
        double key = SNIPI_ILP_HUGE;
        for (j = 0; j < count; j++)
            if (j != k->base[i]) {
                double r = snipi_ilp_reduced(k, &o[j], b);
                if (r < key) key = r;
            }
        if (count == 1 || (found == AMBIGUOUS && key >= best[found - 1])) continue;
        if (found < AMBIGUOUS) found++;
        for (j = found - 1; j > 0 && best[j - 1] > key; j--) best[j] = best[j - 1];
        best[j] = key;
    }
    return found ? best[found - 1] : 0;
}

// >>curve: the LP bound of the rows not yet decided, as a function of the gain still lacking

typedef struct { int64_t gain; double value, slope; } snipi_ilp_point;       // sums up to and including a segment, its slope

typedef struct {
    double surplus_price;             // theta - mu, paid for each unit of gain beyond need
    size_t ups, downs;
    snipi_ilp_point *up, *down;       // for a lack, and for a surplus
    size_t at_up, at_down;            // where the last question was: they come with rising lack
} snipi_ilp_curve;

static void snipi_ilp_curve_make(const snipi_ilp_core *c, int row, int64_t least_lack, int64_t most_lack, snipi_ilp_curve *v) {
    int64_t gain = 0;
    double value = 0;
    size_t i;
    v->ups = v->downs = 0;
    for (i = 0; i < c->ups && gain < most_lack; i++) {
        if (c->up[i].group < row) continue;
        gain += c->up[i].gain;
        value += c->up[i].slope * (double)c->up[i].gain;
        v->up[v->ups].gain = gain, v->up[v->ups].value = value, v->up[v->ups].slope = c->up[i].slope;
        v->ups++;
    }
    gain = 0, value = 0;
    for (i = 0; i < c->downs && gain <= -least_lack && c->down[i].slope < v->surplus_price; i++) {
        if (c->down[i].group < row) continue;
        gain += c->down[i].gain;
        value += c->down[i].slope * (double)c->down[i].gain;
        v->down[v->downs].gain = gain, v->down[v->downs].value = value, v->down[v->downs].slope = c->down[i].slope;
        v->downs++;
    }
    v->at_up = 0, v->at_down = v->downs;
}

// The bound, and in *rounded the value of the LP's choice rounded to a feasible one. HUGE when the lack cannot be met.
static double snipi_ilp_ask(snipi_ilp_curve *v, int64_t lack, double *rounded) {
    if (lack > 0) {
        int64_t gain = 0;
        double value = 0;
        while (v->at_up < v->ups && v->up[v->at_up].gain < lack) v->at_up++;
        if (v->at_up == v->ups) return *rounded = SNIPI_ILP_HUGE;
        if (v->at_up) gain = v->up[v->at_up - 1].gain, value = v->up[v->at_up - 1].value;
        *rounded = v->up[v->at_up].value + v->surplus_price * (double)(v->up[v->at_up].gain - lack);
        return value + v->up[v->at_up].slope * (double)(lack - gain);
    } else {
        int64_t rest = -lack;
        double value = 0;
        while (v->at_down > 0 && v->down[v->at_down - 1].gain > -lack) v->at_down--;
        if (v->at_down) rest -= v->down[v->at_down - 1].gain, value = v->down[v->at_down - 1].value;
        *rounded = value + v->surplus_price * (double)rest;
        return value + (v->at_down < v->downs ? v->down[v->at_down].slope : v->surplus_price) * (double)rest;
    }
}

// >>states: dynamic programming over the core. A state is a gain and a cost, relative to the base; lists are sorted by falling gain.
// States are pruned by the bound before the dominance merge, which spares most of the merging.

typedef struct { int64_t gain; double cost; int parent, move; } snipi_ilp_state;
typedef struct { int parent, move; } snipi_ilp_step;      // parent: index of the step before, -1 at the root

typedef struct {                      // what the search found
    double excess;                    // of the best choice over the LP bound
    int row, parent, move;            // the state it came from: moves of row and of the steps from parent
    size_t segments;                  // and the first so many segments beyond row, up or down
    int down, found;
} snipi_ilp_best;

typedef struct {
    snipi_ilp_state *state;           // the last row's
    int states;
    snipi_ilp_step *step;             // of all rows; the last row's begin at last
    size_t steps, room, last;
} snipi_ilp_table;

enum { SNIPI_ILP_DONE, SNIPI_ILP_LATE, SNIPI_ILP_FULL };

static void snipi_ilp_table_free(snipi_ilp_run *run, snipi_ilp_table *t) {
    snipi_ilp_give(run, t->state);
    snipi_ilp_give(run, t->step);
    memset(t, 0, sizeof *t);
}

static int snipi_ilp_remember(snipi_ilp_run *run, snipi_ilp_table *t) {
    int i;
    if (t->steps + (size_t)t->states > t->room) {
        size_t room = (t->steps + (size_t)t->states) * 3 / 2 + 256;
        snipi_ilp_step *step = room < INT_MAX ? (snipi_ilp_step *)snipi_ilp_take(run, room, sizeof *step) : NULL;
        if (!step) return 0;
        if (t->steps) memcpy(step, t->step, t->steps * sizeof *step);
        snipi_ilp_give(run, t->step);
        t->step = step;
        t->room = room;
    }
    t->last = t->steps;
    for (i = 0; i < t->states; i++) {
        t->step[t->steps].parent = t->state[i].parent;
        t->step[t->steps++].move = t->state[i].move;
    }
    return 1;
}

// What a choice must be cheaper by to be better than one of this cost, within what has to be proven.
static double snipi_ilp_margin(const snipi_ilp_run *run, double cost) {
    double margin = (run->rel_gap > SNIPI_ILP_PROOF ? run->rel_gap : SNIPI_ILP_PROOF) * cost;
    return margin < 0.99 * run->cost_step ? 0.99 * run->cost_step : margin;
}
static double snipi_ilp_lp_cost(const snipi_ilp_sack *k) { return k->spent + k->base_cost + (k->lack > 0 ? k->theta * (double)k->lack : 0); }

// Merges two lists by falling gain, keeping of equal or lower gain only what is cheaper.
static int snipi_ilp_merge(const snipi_ilp_state *a, int na, const snipi_ilp_state *b, int nb, snipi_ilp_state *out) {
    double least = SNIPI_ILP_HUGE;
    int i = 0, j = 0, n = 0;
    while (i < na || j < nb) {
        const snipi_ilp_state *s;
        if (j >= nb || (i < na && (a[i].gain > b[j].gain || (a[i].gain == b[j].gain && a[i].cost <= b[j].cost)))) s = &a[i++];
        else s = &b[j++];
        if (s->cost < least) { least = s->cost; out[n++] = *s; }
    }
    return n;
}

// Searches all choices of excess below limit. With best: for the least excess; without: the table's states become all undominated
// choices within the limit, need met.
static int snipi_ilp_states(snipi_ilp_run *run, const snipi_ilp_sack *k, const snipi_ilp_core *c, double limit, snipi_ilp_best *best,
                            snipi_ilp_table *t) {
    snipi_ilp_curve v;
    snipi_ilp_state *shifted = NULL, *merged = NULL;
    int status = SNIPI_ILP_FULL, row, i, j, n;
    memset(t, 0, sizeof *t);
    v.surplus_price = k->theta - k->mu;
    v.up = (snipi_ilp_point *)snipi_ilp_take(run, c->ups + 1, sizeof *v.up);
    v.down = (snipi_ilp_point *)snipi_ilp_take(run, c->downs + 1, sizeof *v.down);
    t->state = (snipi_ilp_state *)snipi_ilp_take(run, 1, sizeof *t->state);
    if (!v.up || !v.down || !t->state) goto done;
    t->states = c->rows > 0 || k->lack <= 0;  // with nothing to decide, the base stays, if it will do
    t->state[0].gain = 0, t->state[0].cost = 0, t->state[0].parent = -1, t->state[0].move = -1;
    for (row = 0; row < c->rows && t->states; row++) {
        const snipi_ilp_move *move = c->move + c->row[row].first;
        int64_t highest = t->state[0].gain + move[c->row[row].count - 1].gain;
        int64_t lowest = t->state[t->states - 1].gain + move[0].gain;
        snipi_ilp_state *all = NULL;
        int alls = 0, fits = 1;
        snipi_ilp_curve_make(c, row + 1, k->lack - highest, k->lack - lowest, &v);
        shifted = (snipi_ilp_state *)snipi_ilp_take(run, (size_t)t->states, sizeof *shifted);
        if (!shifted) goto done;
        for (j = 0; j < c->row[row].count && fits; j++) {
            if (move[j].reduced > limit) continue;
            v.at_up = 0, v.at_down = v.downs;
            for (i = n = 0; i < t->states; i++) {
                int64_t gain = t->state[i].gain + move[j].gain;
                double cost = t->state[i].cost + move[j].cost, reduced = cost - k->theta * (double)gain, rounded;
                double bound = snipi_ilp_ask(&v, k->lack - gain, &rounded) + reduced;
                if (bound >= SNIPI_ILP_HUGE / 2) break;       // the lack only grows from here
                if (best && rounded + reduced < best->excess) {
                    double cut;
                    best->excess = rounded + reduced;
                    cut = best->excess - snipi_ilp_margin(run, snipi_ilp_lp_cost(k) + best->excess);
                    best->found = 1, best->row = row, best->parent = row ? (int)t->last + i : -1, best->move = j;
                    best->down = k->lack - gain <= 0;
                    best->segments = best->down ? v.at_down : v.at_up + 1;
                    if (cut < limit) limit = cut;
                }
                if (bound >= limit) continue;
                shifted[n].gain = gain, shifted[n].cost = cost, shifted[n].move = j;
                shifted[n++].parent = row ? (int)t->last + i : -1;
                if ((i & 0xffff) == 0xffff && snipi_ilp_late(run)) break;
            }
            run->nodes += t->states;
            if (!n) continue;
            merged = alls < INT_MAX - n ? (snipi_ilp_state *)snipi_ilp_take(run, (size_t)(alls + n), sizeof *merged) : NULL;
            fits = merged != NULL;
            if (!fits) break;
            alls = snipi_ilp_merge(all, alls, shifted, n, merged);
            snipi_ilp_give(run, all);
            all = merged;
        }
        snipi_ilp_give(run, shifted);
        snipi_ilp_give(run, t->state);
        t->state = all;
        t->states = alls;
        if (!fits || !snipi_ilp_remember(run, t)) goto done;
        if (snipi_ilp_late(run)) { status = SNIPI_ILP_LATE; goto done; }
    }
    status = SNIPI_ILP_DONE;
done:
    snipi_ilp_give(run, v.up);
    snipi_ilp_give(run, v.down);
    return status;
}

// Writes the choice of a state into pick: the base, the moves of rows 0 .. row by way of the steps.
static void snipi_ilp_trace(const snipi_ilp_sack *k, const snipi_ilp_core *c, const snipi_ilp_table *t, int row, int parent, int move, int *pick) {
    memcpy(pick, k->base, (size_t)k->n * sizeof *pick);
    for (; row >= 0; row--) {
        pick[c->row[row].group] = c->move[c->row[row].first + (size_t)move].item;
        if (row) move = t->step[parent].move, parent = t->step[parent].parent;
    }
}

static void snipi_ilp_trace_best(const snipi_ilp_sack *k, const snipi_ilp_core *c, const snipi_ilp_table *t, const snipi_ilp_best *best, int *pick) {
    const snipi_ilp_segment *s = best->down ? c->down : c->up;
    size_t i, left = best->segments;
    snipi_ilp_trace(k, c, t, best->row, best->parent, best->move, pick);
    for (i = 0; left > 0; i++)
        if (s[i].group > best->row) {
            const snipi_ilp_row *r = &c->row[s[i].group];
            pick[r->group] = c->move[r->first + (size_t)s[i].item].item;
            left--;
        }
}

// >>single: one knapsack by itself

// Improves pick[] (by item) until it is proven; *proven is a lower bound of any choice's excess over the LP bound. Guesses the gap
// instead of trusting the first choice: every round finds all that is better than the guess, or raises the bound to it.
static void snipi_ilp_refine(snipi_ilp_run *run, const snipi_ilp_sack *k, int *pick, double *excess, double *proven) {
    double guess = snipi_ilp_guess(k);
    *proven = 0;
    if (guess < *excess / 1024) guess = *excess / 1024;
    for (;;) {
        snipi_ilp_core core;
        snipi_ilp_table table;
        snipi_ilp_best best;
        double cut = *excess - snipi_ilp_margin(run, snipi_ilp_lp_cost(k) + *excess), limit = guess < cut ? guess : cut;
        int status;
        if (*proven >= cut || cut <= 0) {
            if (!(run->rel_gap > SNIPI_ILP_PROOF)) *proven = *excess;
            return;
        }
        if (snipi_ilp_late(run) || !snipi_ilp_core_make(run, k, limit, &core)) return;
        memset(&best, 0, sizeof best);
        best.excess = *excess;
        status = snipi_ilp_states(run, k, &core, limit, &best, &table);
        if (best.found) {
            *excess = best.excess;
            snipi_ilp_trace_best(k, &core, &table, &best, pick);
        }
        snipi_ilp_table_free(run, &table);
        snipi_ilp_core_free(run, &core);
        if (status != SNIPI_ILP_DONE) return;
        *proven = limit;
        guess *= 3;
    }
}

// Returns 0 when memory is short for the LP.
static int snipi_ilp_single(snipi_ilp_run *run, snipi_ilp_sack *k, int *pick, double *excess, double *proven) {
    if (!snipi_ilp_relax(run, k)) return 0;
    *excess = snipi_ilp_greedy(k, pick);
    snipi_ilp_refine(run, k, pick, excess, proven);
    return 1;
}

// >>join: parts with targets of their own, and a target over all. A multiplier mu on the latter separates the parts; the choices of
// each part within the gap are listed, and one of each list is chosen by a small knapsack of the same kind.

typedef struct {
    int parts;
    snipi_ilp_sack *part;
    int **pick;                   // (parts) the best choice so far
    int *shift;                   // (parts) a unit of the total's gain is 2^shift of the part's
    int64_t need;                 // of the total
    double mu;
} snipi_ilp_union;

typedef struct { snipi_ilp_core core; snipi_ilp_table table; } snipi_ilp_list;

static int64_t snipi_ilp_gain(const snipi_ilp_sack *k, const int *pick) {
    int64_t gain = 0;
    int i;
    for (i = 0; i < k->n; i++) gain += k->items[k->first[i] + (size_t)pick[i]].gain;
    return gain;
}

static double snipi_ilp_cost(const snipi_ilp_sack *k, const int *pick) {
    snipi_ilp_sum cost = {0, 0};
    int i;
    for (i = 0; i < k->n; i++) snipi_ilp_add(&cost, k->items[k->first[i] + (size_t)pick[i]].cost);
    return snipi_ilp_total(&cost);
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

static double snipi_ilp_union_excess(const snipi_ilp_union *u) {
    double excess = u->mu * (double)snipi_ilp_union_surplus(u);
    int p, i;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        excess += (k->theta - k->mu) * (double)(snipi_ilp_gain(k, u->pick[p]) - k->need);
        for (i = 0; i < k->n; i++) {
            const snipi_ilp_item *o = k->items + k->first[i];
            excess += snipi_ilp_reduced(k, &o[u->pick[p][i]], &o[k->base[i]]);
        }
    }
    return excess;
}

// The LP of parts nested in a total: what each part takes for itself, then the cheapest of the other segments, whose last slope is mu.
// Returns 0 when memory is short.
static int snipi_ilp_union_relax(snipi_ilp_run *run, snipi_ilp_union *u) {
    size_t room = 1, n = 0, i;
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
    s = (snipi_ilp_segment *)snipi_ilp_take(run, room, sizeof *s);
    if (!s) return 0;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        int64_t rest = k->lack > 0 ? -k->lack : 0;        // what its last segments give beyond its need
        double per_unit = ldexp(1.0, u->shift[p]);
        size_t m = n + snipi_ilp_segments(k, s + n);
        for (i = n; i < m; i++) {
            if (s[i].item <= k->base[s[i].group]) continue;
            if (s[i].slope <= k->theta) { rest += s[i].gain; continue; }
            s[n] = s[i];
            s[n].slope *= per_unit;
            s[n++].gain >>= u->shift[p];
        }
        if (rest > 0) {
            s[n].slope = k->theta * per_unit, s[n].gain = rest >> u->shift[p], s[n].group = -1 - p, s[n].item = 0;
            n++;
        }
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

// Makes pick meet the total by upgrades, the cheapest that suffices or else the largest, then takes the best single downgrades while
// the surplus allows any.
static void snipi_ilp_union_polish(snipi_ilp_union *u) {
    int64_t surplus = snipi_ilp_union_surplus(u);
    int p, i, j, pass, moved = 1;
    for (pass = 0; surplus < 0; pass++) {
        int part = 0, group = 0, item = 0;
        int64_t largest = 0;
        double least = SNIPI_ILP_HUGE;
        for (p = 0; p < u->parts; p++) {
            const snipi_ilp_sack *k = &u->part[p];
            int64_t gain = snipi_ilp_gain(k, u->pick[p]), others = surplus - (gain >> u->shift[p]);
            for (i = 0; i < k->n; i++) {
                const snipi_ilp_item *o = k->items + k->first[i], *b = o + u->pick[p][i];
                int last = (int)(k->first[i + 1] - k->first[i]) - 1;
                if (pass == 8) { u->pick[p][i] = last; continue; }
                for (j = u->pick[p][i] + 1; j <= last; j++) {
                    int64_t more = (gain + (o[j].gain - b->gain)) >> u->shift[p];
                    double cost = o[j].cost - b->cost;
                    if (others + more >= 0 ? cost < least : least >= SNIPI_ILP_HUGE && others + more - surplus > largest) {
                        if (others + more >= 0) least = cost;
                        largest = others + more - surplus, part = p, group = i, item = j;
                    }
                }
            }
        }
        if (pass < 8 && largest > 0) u->pick[part][group] = item;
        surplus = snipi_ilp_union_surplus(u);
    }
    for (pass = 0; pass < 8 && moved; pass++) {
        moved = 0;
        for (p = 0; p < u->parts; p++) {
            const snipi_ilp_sack *k = &u->part[p];
            int64_t gain = snipi_ilp_gain(k, u->pick[p]), others = surplus - (gain >> u->shift[p]);
            int group = -1, item = 0;
            double most = 0;
            for (i = 0; i < k->n; i++) {
                const snipi_ilp_item *o = k->items + k->first[i], *b = o + u->pick[p][i];
                for (j = 0; j < u->pick[p][i]; j++) {
                    int64_t left = gain - (b->gain - o[j].gain);
                    if (left < k->need || others + (left >> u->shift[p]) < 0) continue;
                    if (b->cost - o[j].cost > most) { most = b->cost - o[j].cost; group = i; item = j; }
                }
            }
            if (group < 0) continue;
            u->pick[p][group] = item;
            surplus = others + (snipi_ilp_gain(k, u->pick[p]) >> u->shift[p]);
            moved = 1;
        }
    }
}

// Chooses a state of each list; takes it into u->pick when that is better. Returns 0 when time or memory is short.
static int snipi_ilp_union_choose(snipi_ilp_run *run, snipi_ilp_union *u, const snipi_ilp_list *list, double *excess) {
    snipi_ilp_sack top;
    size_t items = 0;
    int64_t surplus = -u->need;
    int p, i, ok = 0, *pick;
    double found = 0, over, proven;
    memset(&top, 0, sizeof top);
    for (p = 0; p < u->parts; p++) items += (size_t)list[p].table.states;
    top.n = u->parts;
    top.need = u->need;
    top.first = (size_t *)snipi_ilp_take(run, (size_t)u->parts + 1, sizeof *top.first);
    top.items = (snipi_ilp_item *)snipi_ilp_take(run, items, sizeof *top.items);
    top.base = (int *)snipi_ilp_take(run, (size_t)u->parts, sizeof *top.base);
    pick = (int *)snipi_ilp_take(run, (size_t)u->parts, sizeof *pick);
    if (!top.first || !top.items || !top.base || !pick) goto done;
    items = 0;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        const snipi_ilp_table *t = &list[p].table;
        snipi_ilp_item *o = top.items + items;
        double cheapest = t->state[t->states - 1].cost;
        for (i = 0; i < t->states; i++) {
            o[i].gain = (k->need - k->lack + t->state[i].gain) >> u->shift[p];
            o[i].cost = t->state[i].cost - cheapest;
            o[i].option = i;
        }
        i = snipi_ilp_undominated(o, t->states);
        surplus += o[i - 1].gain;
        top.first[p] = items;
        top.spent += k->base_cost + cheapest;
        items += (size_t)i;
    }
    top.first[u->parts] = items;
    ok = 1;
    if (surplus < 0) goto done;               // the lists are too short yet
    ok = snipi_ilp_single(run, &top, pick, &over, &proven) && (proven >= over || run->rel_gap > SNIPI_ILP_PROOF);
    if (over >= SNIPI_ILP_HUGE / 2) goto done;
    surplus = -u->need;
    for (p = 0; p < u->parts; p++) {
        const snipi_ilp_sack *k = &u->part[p];
        const snipi_ilp_item *o = &top.items[top.first[p] + (size_t)pick[p]];
        const snipi_ilp_state *s = &list[p].table.state[o->option];
        found += (s->cost - k->theta * (double)s->gain) + (k->theta - k->mu) * (double)(s->gain - k->lack);
        surplus += o->gain;
    }
    found += u->mu * (double)surplus;
    if (found < *excess) {
        *excess = found;
        for (p = 0; p < u->parts; p++) {
            const snipi_ilp_state *s = &list[p].table.state[top.items[top.first[p] + (size_t)pick[p]].option];
            snipi_ilp_trace(&u->part[p], &list[p].core, &list[p].table, list[p].core.rows - 1, s->parent, s->move, u->pick[p]);
        }
    }
done:
    snipi_ilp_give(run, top.first);
    snipi_ilp_give(run, top.items);
    snipi_ilp_give(run, top.base);
    snipi_ilp_give(run, pick);
    return ok;
}

// As snipi_ilp_single(), for the union; u->pick holds a choice that meets the targets. Returns 0 when memory is short for the LP.
static int snipi_ilp_union_solve(snipi_ilp_run *run, snipi_ilp_union *u, double *excess, double *proven) {
    snipi_ilp_list *list;
    double *least, sum = 0, window = 0;
    int p, widest = 0, *trial, stopped = 0;
    if (!snipi_ilp_union_relax(run, u)) return 0;
    for (p = 0; p < u->parts; p++) {
        (void)snipi_ilp_greedy(&u->part[p], u->pick[p]);
        if (u->part[p].n > widest) widest = u->part[p].n;
    }
    snipi_ilp_union_polish(u);
    *excess = snipi_ilp_union_excess(u);
    *proven = 0;
    least = (double *)snipi_ilp_take(run, (size_t)u->parts, sizeof *least);
    list = (snipi_ilp_list *)snipi_ilp_take(run, (size_t)u->parts, sizeof *list);
    trial = (int *)snipi_ilp_take(run, (size_t)widest, sizeof *trial);
    if (!least || !list || !trial) goto done;
    memset(list, 0, (size_t)u->parts * sizeof *list);
    for (p = 0; p < u->parts; p++) {          // each part's own integer bound at mu
        double over = snipi_ilp_greedy(&u->part[p], trial);
        snipi_ilp_refine(run, &u->part[p], trial, &over, &least[p]);
        sum += least[p];
        window += snipi_ilp_guess(&u->part[p]) * 0.25 / u->parts;
    }
    *proven = sum;
    if (window < (*excess - sum) / 1024) window = (*excess - sum) / 1024;
    for (;;) {
        double margin = snipi_ilp_margin(run, snipi_ilp_union_cost(u)), cut = *excess - margin;
        double limit = cut - sum < window ? cut - sum : window;
        if (*proven >= cut) {
            if (!(run->rel_gap > SNIPI_ILP_PROOF)) *proven = *excess;
            break;
        }
        if (stopped || snipi_ilp_late(run)) break;
        for (p = 0; p < u->parts; p++) {
            const snipi_ilp_sack *k = &u->part[p];
            double room = least[p] + limit + 0.01 * SNIPI_ILP_PROOF * snipi_ilp_cost(k, u->pick[p]);
            stopped = !snipi_ilp_core_make(run, k, room, &list[p].core) ||
                      snipi_ilp_states(run, k, &list[p].core, room, NULL, &list[p].table) != SNIPI_ILP_DONE;
            if (stopped || !list[p].table.states) break;      // the latter: nothing of this part is within the window
        }
        if (!stopped && p == u->parts) stopped = !snipi_ilp_union_choose(run, u, list, excess);
        for (p = 0; p < u->parts; p++) {
            snipi_ilp_table_free(run, &list[p].table);
            snipi_ilp_core_free(run, &list[p].core);
        }
        if (!stopped) *proven = window < cut - sum ? sum + limit : cut;
        window *= 4;
    }
done:
    snipi_ilp_give(run, least);
    snipi_ilp_give(run, list);
    snipi_ilp_give(run, trial);
    return 1;
}

// >>solve: from the caller's problem to knapsacks and back

typedef struct {                  // the groups sorted into parts that share no target but the total
    int parts, coupled;
    int *order;                   // (n) groups, part after part
    int *start;                   // (parts + 1)
    double *target;               // (parts)
} snipi_ilp_split;

static void snipi_ilp_split_free(snipi_ilp_run *run, snipi_ilp_split *s) {
    snipi_ilp_give(run, s->order);
    snipi_ilp_give(run, s->start);
    snipi_ilp_give(run, s->target);
}

static int snipi_ilp_split_make(snipi_ilp_run *run, const snip_ilp_problem *p, snipi_ilp_split *s) {
    int stages = p->n_stages > 1 ? p->n_stages : 1, i, without = -1;
    int *part = (int *)snipi_ilp_take(run, (size_t)stages, sizeof *part);
    snipi_ilp_sum sum = {0, 0};
    memset(s, 0, sizeof *s);
    s->order = (int *)snipi_ilp_take(run, (size_t)p->n_groups, sizeof *s->order);
    s->start = (int *)snipi_ilp_take(run, (size_t)stages + 1, sizeof *s->start);
    s->target = (double *)snipi_ilp_take(run, (size_t)stages, sizeof *s->target);
    if (!part || !s->order || !s->start || !s->target) {
        snipi_ilp_give(run, part);
        return 0;
    }
    for (i = 0; i < stages; i++) {            // all stages without a target are one part
        double target = snipi_ilp_stage_target(p, i);
        snipi_ilp_add(&sum, target);
        if (!(target > 0) && without >= 0) { part[i] = without; continue; }
        if (!(target > 0)) without = s->parts;
        part[i] = s->parts;
        s->target[s->parts++] = target;
    }
    memset(s->start, 0, ((size_t)s->parts + 1) * sizeof *s->start);
    for (i = 0; i < p->n_groups; i++) s->start[part[p->groups[i].stage]]++;
    for (i = 1; i <= s->parts; i++) s->start[i] += s->start[i - 1];
    for (i = p->n_groups - 1; i >= 0; i--) s->order[--s->start[part[p->groups[i].stage]]] = i;
    s->coupled = p->total_target > snipi_ilp_total(&sum);     // else the stage targets imply it
    if (s->coupled && s->parts == 1) {
        s->target[0] = p->total_target;
        s->coupled = 0;
    }
    snipi_ilp_give(run, part);
    return 1;
}

static void snipi_ilp_read(const snip_ilp_problem *p, const int *list, const snipi_ilp_unit *unit, snipi_ilp_power cost_scale, double target,
                           snipi_ilp_sack *k) {
    int64_t most = 0;
    size_t m = 0;
    int i, j;
    for (i = 0; i < k->n; i++) {
        const snip_ilp_group *g = &p->groups[list[i]];
        snipi_ilp_item *o = k->items + m;
        double least = g->options[0].cost;
        for (j = 1; j < g->n_options; j++)
            if (g->options[j].cost < least) least = g->options[j].cost;
        for (j = 0; j < g->n_options; j++) {
            o[j].gain = snipi_ilp_integer(unit, g->options[j].gain);
            o[j].cost = snipi_ilp_times(g->options[j].cost - least, cost_scale);
            o[j].option = j;
        }
        k->first[i] = m;
        m += (size_t)snipi_ilp_undominated(o, g->n_options);
        most += k->items[m - 1].gain;
    }
    k->first[k->n] = m;
    k->need = snipi_ilp_need(unit, target);
    if (k->need < 0) k->need = 0;
    if (k->need > most) k->need = most;       // it was found reachable
}

// Fills choice, *gap left between its cost and the bound, *proven. Returns 0, choice untouched, when memory is short for a start.
static int snipi_ilp_search(snipi_ilp_run *run, const snip_ilp_problem *p, int *choice, double *gap, int *proven) {
    snipi_ilp_split split;
    snipi_ilp_union u;
    snipi_ilp_values costs, gains;
    snipi_ilp_unit all, unit;
    snipi_ilp_item *items = NULL;
    size_t *first = NULL, options = 0;
    int *base = NULL, *pick = NULL, i, q, done = 0, bits;
    double left = 0, excess, bound, step;
    int64_t most = 0;
    memset(&u, 0, sizeof u);
    if (!snipi_ilp_split_make(run, p, &split)) goto done;
    for (i = 0; i < p->n_groups; i++) options += (size_t)p->groups[i].n_options;
    u.parts = split.parts;
    u.part = (snipi_ilp_sack *)snipi_ilp_take(run, (size_t)u.parts, sizeof *u.part);
    u.pick = (int **)snipi_ilp_take(run, (size_t)u.parts, sizeof *u.pick);
    u.shift = (int *)snipi_ilp_take(run, (size_t)u.parts, sizeof *u.shift);
    items = (snipi_ilp_item *)snipi_ilp_take(run, options, sizeof *items);
    first = (size_t *)snipi_ilp_take(run, (size_t)p->n_groups + (size_t)u.parts, sizeof *first);
    base = (int *)snipi_ilp_take(run, (size_t)p->n_groups, sizeof *base);
    pick = (int *)snipi_ilp_take(run, (size_t)p->n_groups, sizeof *pick);
    if (!u.part || !u.pick || !u.shift || !items || !first || !base || !pick) goto done;
    costs = snipi_ilp_values_of(p, split.order, p->n_groups, 1);
    run->cost_step = snipi_ilp_cost_step(&costs);
    gains = snipi_ilp_values_of(p, split.order, p->n_groups, 0);
    step = split.coupled ? snipi_ilp_common_unit(&gains) : 0;
    for (q = 0; q < u.parts && step > 0; q++)                 // a total needs one unit for all parts
        if (!snipi_ilp_unit_of(p, split.order + split.start[q], split.start[q + 1] - split.start[q], step, &gains).lattice) step = 0;
    all = snipi_ilp_unit_of(p, split.order, p->n_groups, step, &gains);
    if (!all.lattice) step = 0;
    bits = all.bits;
    options = 0;
    for (q = 0; q < u.parts; q++) {
        int from = split.start[q], n = split.start[q + 1] - from;
        snipi_ilp_sack *k = &u.part[q];
        memset(k, 0, sizeof *k);
        k->n = n;
        k->items = items + options;
        k->first = first + from + q;
        k->base = base + from;
        u.pick[q] = pick + from;
        if (!split.coupled) {
            gains = snipi_ilp_values_of(p, split.order + from, n, 0);
            step = snipi_ilp_common_unit(&gains);
        }
        unit = snipi_ilp_unit_of(p, split.order + from, n, step, &gains);
        snipi_ilp_read(p, split.order + from, &unit, costs.scale, split.target[q], k);
        u.shift[q] = unit.bits;
        if (unit.bits < bits) bits = unit.bits;
        options += k->first[n];
        for (i = 0; i < n; i++) pick[from + i] = (int)(k->first[i + 1] - k->first[i]) - 1;
    }
    *proven = 1;
    if (split.coupled) {
        for (q = 0; q < u.parts; q++) {       // the total is counted in the coarsest unit
            u.shift[q] = all.lattice ? 0 : u.shift[q] - bits < 62 ? u.shift[q] - bits : 62;
            most += snipi_ilp_gain(&u.part[q], u.pick[q]) >> u.shift[q];
        }
        if (!all.lattice) snipi_ilp_coarsen(&all, bits, u.parts);
        u.need = snipi_ilp_need(&all, p->total_target);
        if (u.need > most) u.need = most;
        if (!snipi_ilp_union_solve(run, &u, &excess, &bound)) excess = snipi_ilp_union_cost(&u), bound = 0;
        *proven = bound >= excess;
        left = excess - bound;
    } else {
        for (q = 0; q < u.parts; q++) {
            if (!snipi_ilp_single(run, &u.part[q], u.pick[q], &excess, &bound)) excess = snipi_ilp_cost(&u.part[q], u.pick[q]), bound = 0;
            if (bound < excess) *proven = 0;
            left += excess - bound;
        }
    }
    *gap = ldexp(left, -costs.scale.exponent);
    for (q = 0; q < u.parts; q++)
        for (i = 0; i < u.part[q].n; i++)
            choice[split.order[split.start[q] + i]] = u.part[q].items[u.part[q].first[i] + (size_t)u.pick[q][i]].option;
    done = 1;
done:
    snipi_ilp_split_free(run, &split);
    snipi_ilp_give(run, u.part);
    snipi_ilp_give(run, u.pick);
    snipi_ilp_give(run, u.shift);
    snipi_ilp_give(run, items);
    snipi_ilp_give(run, first);
    snipi_ilp_give(run, base);
    snipi_ilp_give(run, pick);
    return done;
}

snip_ilp_status snip_ilp_solve(const snip_ilp_problem *problem, const snip_ilp_params *params, int *choice, snip_ilp_result *result) {
    snipi_ilp_run run;
    snipi_ilp_sum cost = {0, 0}, gain = {0, 0}, least = {0, 0};
    double gap = 0, shortfall;
    int i, j, proven = 0;
    if (!snipi_ilp_problem_ok(problem) || (problem->n_groups > 0 && !choice)) return SNIP_ILP_BAD_ARGUMENT;
    if (params && (!snipi_ilp_valid(params->time_limit) || !snipi_ilp_valid(params->rel_gap))) return SNIP_ILP_BAD_ARGUMENT;
    memset(&run, 0, sizeof run);
    run.limit = params && params->max_memory ? params->max_memory : (size_t)512 << 20;
    run.start = snipi_ilp_clock();
    run.deadline = params && params->time_limit > 0 ? run.start + params->time_limit : 0;
    run.rel_gap = params ? params->rel_gap : 0;
    if (snipi_ilp_unreachable(problem, &shortfall) >= 0) {
        if (result) {
            memset(result, 0, sizeof *result);
            result->seconds = snipi_ilp_clock() - run.start;
        }
        return SNIP_ILP_INFEASIBLE;
    }
    if (problem->n_groups == 0) proven = 1;
    else if (!snipi_ilp_search(&run, problem, choice, &gap, &proven)) {
        gap = -1;
        for (i = 0; i < problem->n_groups; i++) choice[i] = snipi_ilp_largest(&problem->groups[i]);
    }
    for (i = 0; i < problem->n_groups; i++) {
        const snip_ilp_group *g = &problem->groups[i];
        double cheapest = g->options[0].cost;
        for (j = 1; j < g->n_options; j++)
            if (g->options[j].cost < cheapest) cheapest = g->options[j].cost;
        snipi_ilp_add(&cost, g->options[choice[i]].cost);
        snipi_ilp_add(&gain, g->options[choice[i]].gain);
        snipi_ilp_add(&least, cheapest);
    }
    if (result) {
        result->cost = snipi_ilp_total(&cost);
        result->gain = snipi_ilp_total(&gain);
        result->bound = snipi_ilp_total(&least);
        if (gap >= 0 && result->cost - gap > result->bound) result->bound = result->cost - gap;
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
