// The solver: answers against brute force and against dynamic programming over a lattice, limits of time and memory,
// refused arguments. Public names alone.
//     test_ilp [--instances N] [--lattices N] [--slow FACTOR] [--seed N]
// instances: random ones, checked by brute force (200000); lattices: by dynamic programming (1000)
#include "test.h"
#include <float.h>
#include <math.h>
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
    memset(p + 2, 0xa5, size);  // whatever is read before it is written shows
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

// ---- random instances ----

static void start(uint64_t seed) {  // an instance that can be drawn again
    random_state = seed;
    test_about("seed %llu", (unsigned long long)seed);
}

static double uniform(void) { return (double)(random_bits() >> 11) * (1.0 / 9007199254740992.0); }

static int below(int n) { return (int)(random_bits() % (uint64_t)n); }

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

static double next_up(double x) {  // the next double: by bits, so that no mode of the compiler matters
    uint64_t bits;
    if (!(x > 0)) return DBL_MIN;  // -Ofast takes the denormals for zeros
    memcpy(&bits, &x, sizeof bits);
    bits++;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

// One number of a kind. Kinds are drawn for costs and gains apart.
static double number(int kind) {
    switch (kind) {
        case 0: return below(4);  // ties and zeros
        case 1: return below(100);
        case 2: return uniform();
        case 3: return below(50) * 0.1;  // a lattice that doubles do not hold
        case 4: return uniform() * 1e300;
        case 5: return uniform() * 1e-300;
        case 6: return pow(10, 24 * uniform() - 12);  // 1e24 ranges
        case 7: return below(3) ? uniform() : 0;
        case 8: return 1;                                      // all equal
        case 9: return 1 + below(3) * 1e-9 + below(3) * 1e-6;  // nearly equal
        case 10: return below(1000000);
        case 11: return ldexp(1, below(40) - 20);
        default: return 1e6 + below(10);  // a large offset
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
    int n = 1 + below(max_groups), stages = 1 + below(max_stages), cost_kind = below(KINDS), gain_kind = below(KINDS),
        i, j, s, at = 0;
    int relation = below(6);
    instance x = instance_new(n, n * max_options, stages);
    double *most = (double *)calloc((size_t)stages + 1, sizeof *most),
           *some = (double *)calloc((size_t)stages + 1, sizeof *some);
    double all = 0, any = 0;
    for (i = 0; i < n; i++) {
        int count = below(5) ? 1 + below(max_options) : 1;
        x.group[i].options = x.option + at;
        x.group[i].n_options = count;
        x.group[i].stage = below(stages);
        for (j = 0; j < count; j++, at++) {
            x.option[at].gain = number(gain_kind);
            x.option[at].cost = number(cost_kind);
            if (relation == 0) x.option[at].cost = x.option[at].gain;  // subset sum
            if (relation == 1)
                x.option[at].cost = x.option[at].gain > 0 ? x.option[at].gain + 10 : 0;  // strongly correlated
        }
        most[x.group[i].stage] += group_max(&x.group[i]);
        some[x.group[i].stage] += x.option[at - 1 - below(count)].gain;
    }
    for (s = 0; s < stages; s++) {
        all += most[s];
        any += some[s];
        x.target[s] = below(4) ? random_target(most[s], some[s]) : 0;
        if (below(4) && x.target[s] > most[s]) x.target[s] = some[s];  // more feasible ones
    }
    x.p.total_target = below(2) ? random_target(all, any) : 0;
    if (!below(8)) x.p.stage_target = NULL;
    free(most);
    free(some);
    return x;
}

// ---- what an answer must be ----

typedef struct {
    long double cost, least, gain;
    int meets;
} verdict;  // meets: every target to within 1e-12

static verdict judge(const snip_ilp_problem *p, const int *choice) {
    verdict v;
    int s, i, j, stages = p->n_stages > 1 ? p->n_stages : 1;
    long double *sum = (long double *)calloc((size_t)stages, sizeof *sum),
                *most = (long double *)calloc((size_t)stages, sizeof *most), all = 0;
    memset(&v, 0, sizeof v);
    v.meets = 1;
    for (i = 0; i < p->n_groups; i++) {
        const snip_ilp_group *g = &p->groups[i];
        double cheapest = g->options[0].cost;
        if (choice[i] < 0 || choice[i] >= g->n_options) {
            v.meets = 0;
            break;
        }
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

// The least cost of choices that meet every target exactly, and of those that meet them to within the tolerance; -1:
// there is none.
typedef struct {
    long double exact, loose;
} optimum;

static optimum brute_force(const snip_ilp_problem *p) {
    enum { MOST = 16 };

    int n = p->n_groups, i, j, s, stages = p->n_stages > 1 ? p->n_stages : 1, choice[MOST] = { 0 };
    long double most[MOST] = { 0 }, all = 0;
    optimum best = { -1, -1 };
    for (i = 0; i < n; i++) {
        most[p->groups[i].stage] += group_max(&p->groups[i]);
        all += group_max(&p->groups[i]);
    }
    for (;;) {
        long double sum[MOST] = { 0 }, gain = 0, cost = 0;
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
static verdict check_answer(const snip_ilp_problem *p, snip_ilp_status status, const int *choice,
                            const snip_ilp_result *r) {
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
    if (best.exact >= 0) {  // stopped by a gap or by memory: the bound still holds
        snip_ilp_params params = { 0, 0, 0 };
        int kind = below(3);
        if (kind != 1) params.rel_gap = uniform() * uniform();
        if (kind != 0) params.max_memory = 1000 + (size_t)below(8000);
        status = snip_ilp_solve(p, &params, choice, &r);
        check_answer(p, status, choice, &r);
        CHECK(r.bound <= best.exact + 1e-12L * (best.exact - judge(p, choice).least) + 1e-15L * best.exact);
        if (kind == 0)
            CHECK(r.cost - r.bound <=
                  params.rel_gap * (r.cost - (double)judge(p, choice).least) * (1 + 1e-9) + 3e-14 * r.cost);
    }
    CHECK(live == 0);
}

static void dump(const snip_ilp_problem *p) {
    int i, j;
    printf("total %.17g\n", p->total_target);
    for (i = 0; i < p->n_stages && p->stage_target; i++) printf("stage %d target %.17g\n", i, p->stage_target[i]);
    for (i = 0; i < p->n_groups; i++) {
        printf("group %d stage %d:", i, p->groups[i].stage);
        for (j = 0; j < p->groups[i].n_options; j++)
            printf(" (%.17g, %.17g)", p->groups[i].options[j].cost, p->groups[i].options[j].gain);
        printf("\n");
    }
}

static long n_instances = 200000, n_lattices;
static uint64_t first_seed = 1;

static void answers_are_those_of_brute_force(void) {
    long feasible = 0;
    for (long i = 0; i < n_instances; i++) {
        start(first_seed + (uint64_t)i);
        instance x = below(4) ? random_instance(6, 4, 3) : random_instance(9, 3, 4);
        if (getenv("DUMP")) dump(&x.p);
        check_exact(&x.p);
        feasible += snip_ilp_shortfall(&x.p, NULL) < 0;
        instance_free(&x);
    }
    CHECK(feasible > n_instances / 4 && feasible < n_instances);
}

// ---- larger, by lattice ----

// Integer gains: the least cost for each sum of gains of a stage, capped at its need; then the same over the stages for
// the total.
static double lattice_dp(const snip_ilp_problem *p) {
    enum { MOST = 4000 };

    int stages = p->n_stages, s, i, j, w, v, total = p->total_target > 0 ? (int)p->total_target : 0;
    double *all = (double *)malloc((MOST + 1) * sizeof *all), *one = (double *)malloc((MOST + 1) * sizeof *one);
    double *next = (double *)malloc((MOST + 1) * sizeof *next), best;
    for (w = 0; w <= MOST; w++) all[w] = w ? DBL_MAX : 0;
    for (s = 0; s < stages; s++) {
        for (w = 0; w <= MOST; w++) one[w] = w ? DBL_MAX : 0;
        for (i = 0; i < p->n_groups; i++) {
            const snip_ilp_group *g = &p->groups[i];
            if (g->stage != s) continue;
            for (w = 0; w <= MOST; w++) next[w] = DBL_MAX;
            for (w = 0; w <= MOST; w++)
                for (j = 0; j < g->n_options && one[w] < DBL_MAX; j++) {
                    v = w + (int)g->options[j].gain;
                    if (v > MOST) v = MOST;
                    if (one[w] + g->options[j].cost < next[v]) next[v] = one[w] + g->options[j].cost;
                }
            memcpy(one, next, (MOST + 1) * sizeof *one);
        }
        for (w = 0; w <= MOST; w++) next[w] = DBL_MAX;
        for (w = 0; w <= MOST; w++)
            for (v = (int)p->stage_target[s]; v <= MOST && all[w] < DBL_MAX; v++)
                if (one[v] < DBL_MAX && all[w] + one[v] < next[w + v < MOST ? w + v : MOST])
                    next[w + v < MOST ? w + v : MOST] = all[w] + one[v];
        memcpy(all, next, (MOST + 1) * sizeof *all);
    }
    for (w = total, best = DBL_MAX; w <= MOST; w++)
        if (all[w] < best) best = all[w];
    free(all);
    free(one);
    free(next);
    return best;
}

// Up to 120 groups and 60 options with integer gains and costs of several kinds; sums of gains stay below 4000.
static instance lattice_instance(void) {
    int n = 20 + below(101), k = below(4) ? 2 + below(7) : 40 + below(21), stages = 1 + below(4), kind = below(5), i, j,
        s;
    instance x = instance_new(n, n * k, stages);
    double most[4] = { 0 }, all = 0;
    for (i = 0; i < n; i++) {
        x.group[i].options = x.option + i * k;
        x.group[i].n_options = k;
        x.group[i].stage = below(stages);
        for (j = 0; j < k; j++) {
            snip_ilp_option *o = &x.option[i * k + j];
            o->gain = below(32);
            o->cost = kind == 0   ? below(100)
                      : kind == 1 ? uniform()
                      : kind == 2 ? o->gain + 10 * (o->gain > 0)
                      : kind == 3 ? o->gain
                                  : o->gain * (1 + 0.1 * uniform());
        }
        most[x.group[i].stage] += group_max(&x.group[i]);
    }
    for (s = 0; s < stages; s++) {
        x.target[s] = below(3) ? floor(most[s] * uniform()) : 0;
        all += most[s];
    }
    if (below(2)) x.p.total_target = floor(all * (0.3 + 0.7 * uniform()));
    return x;
}

static void answers_are_those_of_dynamic_programming(void) {
    int i, choice[128];
    for (i = 0; i < (int)n_lattices; i++) {
        instance x;
        double best;
        snip_ilp_result r;
        snip_ilp_status status;
        start(1000 + (uint64_t)i);
        x = lattice_instance();
        best = lattice_dp(&x.p);
        status = snip_ilp_solve(&x.p, NULL, choice, &r);
        CHECK(status == SNIP_ILP_OPTIMAL);
        check_answer(&x.p, status, choice, &r);
        CHECK(fabs(r.cost - best) <= 1e-11 * best);
        instance_free(&x);
    }
}

// ---- limits ----

// SNIP-like: n groups of k options, stages with targets, a total beyond them, real numbers; subset: cost = gain, which
// is hard.
static instance real_instance(int n, int k, int stages, int subset) {
    instance x = instance_new(n, n * k, stages);
    int i, j;
    for (i = 0; i < n; i++) {
        double size = exp(2 * uniform()), worth = exp(6 * uniform());
        x.group[i].options = x.option + (size_t)i * (size_t)k;
        x.group[i].n_options = k;
        x.group[i].stage = (int)((int64_t)i * stages / n);
        for (j = 0; j < k; j++) {
            snip_ilp_option *o = &x.option[(size_t)i * (size_t)k + (size_t)j];
            o->gain = subset ? uniform() : size * j * (1 + 0.1 * uniform());
            o->cost = subset ? o->gain : worth * j * j * (1 + 0.1 * uniform());
        }
        x.target[x.group[i].stage] += 0.6 * group_max(&x.group[i]);
        x.p.total_target += 0.7 * group_max(&x.group[i]);
    }
    return x;
}

// Fails each allocation in turn: always an answer that holds, nothing leaked.
static void failing_allocations_leave_a_valid_answer(void) {
    int kind, choice[128];
    for (kind = 0; kind < 4; kind++) {
        instance x;
        snip_ilp_result best, r;
        long n, count;
        start(77);
        x = real_instance(60, 4, kind & 1 ? 3 : 1, 0);
        if (kind & 2) x.p.total_target = 0;
        allocations = fail_at = 0;
        CHECK(snip_ilp_solve(&x.p, NULL, choice, &best) == SNIP_ILP_OPTIMAL);
        count = allocations;
        CHECK(count > 20);
        for (n = 1; n <= count; n++) {
            snip_ilp_status status;
            allocations = 0, fail_at = n;
            status = snip_ilp_solve(&x.p, NULL, choice, &r);
            CHECK(live == 0);
            if (status == SNIP_ILP_OUT_OF_MEMORY) continue;
            check_answer(&x.p, status, choice, &r);
            CHECK(r.bound <= best.cost * (1 + 1e-12) && r.cost >= best.cost * (1 - 1e-12));
        }
        fail_at = 0;
        instance_free(&x);
    }
}

enum { MANY_GROUPS = 100000 };

static int many_choices[MANY_GROUPS];

static void memory_limits_hold_and_leave_a_valid_answer(void) {
    const size_t enough = (size_t)4 << 20;
    snip_ilp_params params = { 0, 0, 0 };
    snip_ilp_result best, r;
    start(5);
    instance x = real_instance(560, 8, 8, 0);
    peak = 0;
    CHECK(snip_ilp_solve(&x.p, NULL, many_choices, &best) == SNIP_ILP_OPTIMAL);
    CHECK(peak <= enough);
    for (size_t limit = 1; limit < enough; limit = limit * 5 / 4 + 1) {
        params.max_memory = limit;
        peak = 0;
        snip_ilp_status status = snip_ilp_solve(&x.p, &params, many_choices, &r);
        CHECK(peak <= limit && live == 0);
        check_answer(&x.p, status, many_choices, &r);
        CHECK(r.bound <= best.cost * (1 + 1e-12));
    }
    instance_free(&x);
}

static void memory_is_bounded_for_hard_and_large_problems(void) {
    snip_ilp_params params = { 0, 0, 0 };
    snip_ilp_result r;
    start(6);
    instance hard = real_instance(560, 8, 1, 1), large = real_instance(MANY_GROUPS, 8, 1, 0);
    params.max_memory = (size_t)2 << 20;
    peak = 0;
    check_answer(&hard.p, snip_ilp_solve(&hard.p, &params, many_choices, &r), many_choices, &r);
    CHECK(peak <= params.max_memory);
    params.max_memory = 0;  // 64 MiB
    peak = 0;
    check_answer(&large.p, snip_ilp_solve(&large.p, &params, many_choices, &r), many_choices, &r);
    CHECK(peak <= (size_t)64 << 20);
    instance_free(&hard);
    instance_free(&large);
}

static double slow = 1;  // times slower than a machine of today: emulators

// Answers of one problem under limits of time and gap; subset: a hard one, whose optimum is not looked for.
static void check_limits(const snip_ilp_problem *p, int subset) {
    static const double limits[] = { 1e-9, 1e-4, 1e-3, 1e-2 };
    snip_ilp_params params = { 0, 0, 0 };
    snip_ilp_result best = { 0, 0, 0, 0, 0 }, r;
    if (!subset) CHECK(snip_ilp_solve(p, NULL, many_choices, &best) == SNIP_ILP_OPTIMAL);
    for (int i = 0; i < 4; i++) {
        clock_t began = clock();  // the processor's: neighbours do not count
        params.time_limit = limits[i];
        snip_ilp_status status = snip_ilp_solve(p, &params, many_choices, &r);
        double used = (double)(clock() - began) / CLOCKS_PER_SEC;
        check_answer(p, status, many_choices, &r);
        CHECK(used < limits[i] + slow * (0.01 + 8e-6 * p->n_groups));  // the linear part is always done
        if (!subset) CHECK(r.bound <= best.cost * (1 + 1e-12) && r.cost >= best.cost * (1 - 1e-12));
        CHECK(r.cost - r.bound < 0.05 * r.cost);
    }
    params.time_limit = 0;
    params.rel_gap = 0.01;
    check_answer(p, snip_ilp_solve(p, &params, many_choices, &r), many_choices, &r);
    CHECK(r.cost - r.bound <= 0.01 * r.cost);
    if (!subset) CHECK(r.bound <= best.cost * (1 + 1e-12));
}

static void time_limits_and_gaps_hold(void) {
    static const int groups[] = { 40, 560, 560, 20000 };
    for (int kind = 0; kind < 8; kind++) {
        const snip_ilp_params hurried = { 1e-9, 0, 0 };
        start(9 + (uint64_t)kind);
        instance x = real_instance(groups[kind & 3], 6, kind & 1 ? 4 : 1, kind & 4);
        check_limits(&x.p, kind & 4);
        x.p.total_target *= 2;  // out of reach
        CHECK(snip_ilp_solve(&x.p, &hurried, many_choices, NULL) == SNIP_ILP_INFEASIBLE);
        instance_free(&x);
    }
}

// ---- arguments ----

static double double_of_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void refuse(const snip_ilp_problem *p, const snip_ilp_params *params) {
    int choice[4] = { -7, -7, -7, -7 };
    snip_ilp_result r = { -7, -7, -7, -7, -7 };
    CHECK(snip_ilp_solve(p, params, choice, &r) == SNIP_ILP_BAD_ARGUMENT);
    CHECK(choice[0] == -7 && choice[1] == -7 && r.cost < -6 && r.bound < -6 && r.seconds < -6 && r.nodes == -7);
    if (!params) CHECK(snip_ilp_shortfall(p, NULL) == -2);
}

// Two groups of two options, in a stage each.
typedef struct {
    snip_ilp_option options[4];
    snip_ilp_group groups[2];
    double target[2];
    snip_ilp_problem p;
} small_problem;

static void small_problem_make(small_problem *s) {
    const snip_ilp_option options[4] = {
        {0,  0},
        { 1, 1},
        { 0, 0},
        { 2, 3}
    };
    memcpy(s->options, options, sizeof options);
    for (int i = 0; i < 2; i++) {
        s->groups[i].options = s->options + 2 * i;
        s->groups[i].n_options = 2;
        s->groups[i].stage = i;
        s->target[i] = 1;
    }
    s->p.n_groups = 2;
    s->p.groups = s->groups;
    s->p.n_stages = 2;
    s->p.stage_target = s->target;
    s->p.total_target = 2;
}

static void bad_arguments_are_refused(void) {
    const double nan = double_of_bits(0x7ff8000000000000u), inf = double_of_bits(0x7ff0000000000000u);
    const double minus_inf = double_of_bits(0xfff0000000000000u);
    small_problem s;
#define REFUSE(assignment)             \
    do {                               \
        small_problem_make(&s);        \
        assignment;                    \
        test_about("%s", #assignment); \
        refuse(&s.p, NULL);            \
    } while (0)
    REFUSE(s.options[1].cost = nan);
    REFUSE(s.options[1].cost = inf);
    REFUSE(s.options[1].cost = -1);
    REFUSE(s.options[3].gain = nan);
    REFUSE(s.options[3].gain = inf);
    REFUSE(s.options[3].gain = minus_inf);
    REFUSE(s.options[3].gain = -1e-300);
    REFUSE(s.groups[1].n_options = 0);
    REFUSE(s.groups[1].n_options = -1);
    REFUSE(s.groups[1].options = NULL);
    REFUSE(s.groups[1].stage = 2);
    REFUSE(s.groups[1].stage = -1);
    REFUSE(s.p.n_stages = 1);
    REFUSE(s.p.n_stages = 0);
    REFUSE(s.p.n_stages = -1);
    REFUSE(s.p.n_groups = -1);
    REFUSE(s.p.groups = NULL);
    REFUSE(s.p.total_target = nan);
    REFUSE(s.p.total_target = inf);
    REFUSE(s.p.total_target = minus_inf);
    REFUSE(s.target[0] = nan);
    REFUSE(s.target[0] = inf);
#undef REFUSE
    refuse(NULL, NULL);
}

static void bad_parameters_are_refused(void) {
    const double bad[] = { double_of_bits(0x7ff8000000000000u), double_of_bits(0x7ff0000000000000u), -1 };
    small_problem s;
    small_problem_make(&s);
    for (int i = 0; i < 3; i++) {
        snip_ilp_params limit = { 0, 0, 0 }, gap = { 0, 0, 0 };
        limit.time_limit = bad[i];
        gap.rel_gap = bad[i];
        refuse(&s.p, &limit);
        refuse(&s.p, &gap);
    }
    CHECK(snip_ilp_solve(&s.p, NULL, NULL, NULL) == SNIP_ILP_BAD_ARGUMENT);
}

static void the_target_that_fails_is_named(void) {
    small_problem s;
    snip_ilp_result r;
    int choice[2];
    double shortfall = -1;
    small_problem_make(&s);
    CHECK(snip_ilp_solve(&s.p, NULL, choice, &r) == SNIP_ILP_OPTIMAL && choice[0] == 1 && choice[1] == 1);
    CHECK(r.cost > 2.99 && r.cost < 3.01 && r.gain > 3.99 && r.gain < 4.01);
    CHECK(snip_ilp_solve(&s.p, NULL, choice, NULL) == SNIP_ILP_OPTIMAL);
    CHECK(snip_ilp_shortfall(&s.p, &shortfall) == -1 && shortfall >= 0 && shortfall <= 0);
    s.target[1] = 3.5;
    CHECK(snip_ilp_shortfall(&s.p, &shortfall) == 1 && fabs(shortfall - 0.5) < 1e-15);
    CHECK(snip_ilp_solve(&s.p, NULL, choice, NULL) == SNIP_ILP_INFEASIBLE);
    s.target[1] = 3;
    s.p.total_target = 4.25;
    CHECK(snip_ilp_shortfall(&s.p, &shortfall) == 2 && fabs(shortfall - 0.25) < 1e-15);
    s.target[1] = -1e300;
    s.p.total_target = -5;  // no targets
    CHECK(snip_ilp_solve(&s.p, NULL, choice, &r) == SNIP_ILP_OPTIMAL && choice[1] == 0);
}

static void without_groups_nothing_can_be_asked_for(void) {
    double target = 0, shortfall = -1;
    snip_ilp_problem p;
    snip_ilp_result r;
    memset(&p, 0, sizeof p);
    p.n_stages = 1;
    p.stage_target = &target;
    CHECK(snip_ilp_solve(&p, NULL, NULL, &r) == SNIP_ILP_OPTIMAL);
    CHECK(r.cost >= 0 && r.cost <= 0 && r.bound >= 0 && r.bound <= 0);
    p.total_target = 1;
    CHECK(snip_ilp_solve(&p, NULL, NULL, &r) == SNIP_ILP_INFEASIBLE);
    CHECK(snip_ilp_shortfall(&p, &shortfall) == 1 && shortfall >= 1 && shortfall <= 1);
}

// The quick start on top of the header, word for word.
static void the_quick_start_has_the_answer_it_says(void) {
    snip_ilp_option q[2] = { { 0.0, 0.0 }, { 0.3, 1.0 } }, k[2] = { { 0.0, 0.0 }, { 0.1, 1.0 } };
    snip_ilp_group groups[2] = { { q, 2, 0 }, { k, 2, 0 } };
    snip_ilp_problem problem = { 2, groups, 0, NULL, 1.0 };
    int choice[2];
    CHECK(snip_ilp_solve(&problem, NULL, choice, NULL) == SNIP_ILP_OPTIMAL);
    CHECK(choice[0] == 0 && choice[1] == 1);
}

static void answers_are_the_same_each_time(void) {
    int a[560], b[560];
    for (int i = 0; i < 20; i++) {
        snip_ilp_result r, again;
        start(300 + (uint64_t)i);
        instance x = real_instance(560, 5, 1 + i % 4, 0);
        CHECK(snip_ilp_solve(&x.p, NULL, a, &r) == SNIP_ILP_OPTIMAL);
        CHECK(snip_ilp_solve(&x.p, NULL, b, &again) == SNIP_ILP_OPTIMAL);
        CHECK(memcmp(a, b, sizeof a) == 0 && r.nodes == again.nodes);
        CHECK(memcmp(&r.cost, &again.cost, sizeof r.cost) == 0 && memcmp(&r.bound, &again.bound, sizeof r.bound) == 0);
        instance_free(&x);
    }
}

int main(int argc, char **argv) {
    test_start(1, argv);
    n_instances /= test.few;
    n_lattices = n_instances / 200;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--instances"))
            n_instances = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--lattices"))
            n_lattices = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--slow"))
            slow = atof(argv[i + 1]);
        else if (!strcmp(argv[i], "--seed"))
            first_seed = (uint64_t)strtoull(argv[i + 1], NULL, 10) << 32;
    }
    RUN(the_quick_start_has_the_answer_it_says);
    RUN(bad_arguments_are_refused);
    RUN(bad_parameters_are_refused);
    RUN(the_target_that_fails_is_named);
    RUN(without_groups_nothing_can_be_asked_for);
    RUN(failing_allocations_leave_a_valid_answer);
    RUN(memory_limits_hold_and_leave_a_valid_answer);
    RUN(memory_is_bounded_for_hard_and_large_problems);
    RUN(time_limits_and_gaps_hold);
    RUN(answers_are_the_same_each_time);
    RUN(answers_are_those_of_dynamic_programming);
    RUN(answers_are_those_of_brute_force);
    return test_end();
}
