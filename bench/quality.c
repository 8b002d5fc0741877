// quality - plans of several makers, trained beside each other.
//
// Trains a small Llama in bfloat16 for --warm steps. From that checkpoint every plan trains --steps steps more on the
// same batches as a bfloat16 twin, once per seed (batches, rounding and random plans differ); no plan is changed on the
// way. The learning rate falls linearly to 0 over those steps, for the twin as well: gaps then scatter over the seeds
// less than half as widely as at a constant rate. --from-scratch: from step 50 on, plans made anew every --every steps
// (100).
//
// Prints, tab-separated: quality, setting, budget, maker, gap_own, gap_high, half_width_95, fp4_share. The gap is that
// of the validation loss to the twin's in nats a token, under the plan's precision (own) and with the trained weights
// in bfloat16 (high), mean over the seeds; half_width_95 is that of gap_own by Student's t over the paired differences.
// Lines "detail", after setting, budget and maker: half width of gap_high; gap of the training loss, mean over the
// steps, and its half width; gap_own less that of adjoint-gemm, paired, and its half width; processor time of a step,
// that of the twin being 1.
//
// Makers. Uniform: bf16 (the twin), f32 (how far rounding alone drives runs apart), fp8, fp4; fp4-fwd, fp4-bwd (FP4 in
// the forward or the backward GEMMs alone, FP8 elsewhere). One precision a layer:
//   random                     mean over DRAWS plans a seed
//   min-abs-err, min-rel-err   least squared error of the operands
//   layer-type                 mlp.down and attn.v last of all, as llama.cpp's Q4_K_M keeps them in more bits
//   layer-id                   first and last block last of all
//   oracle                     greedy: the next layer is the one that raises the measured training loss least, per FLOP
//   snip                       the paper's norms (norms.h)
//   adjoint                    this library's costs
// One precision a GEMM: adjoint-gemm, this library's costs.
//
// Settings: the recipes of norms.h; outliers: two channels of one block's inputs start 16 times as large; hot: learning
// rate x 4.
//
// --plans N instead: N random plans of every kind and share; "objective", setting, maker, Spearman's correlation of the
// plan's cost with gap_own, gap_high and the training loss's gap; averaged, repeating: adjoint's with all or none of
// the backward GEMMs' update errors divided by a horizon of 100. --ages LIST instead: costs measured that many steps
// before the checkpoint; "phase", setting, budget, age, correlation of the costs with those of age 0, gap_own,
// gap_high, half_width_95, fp4_share of adjoint-gemm.
//
//   cc -O2 -fopenmp bench/quality.c -o quality -lm
//   ./quality --data FILE [--steps N] [--seeds N] [--budgets LIST] [--settings LIST] [--makers LIST] [--warm N]
//   [--from-scratch]
//             [--every N] [--svg FILE] [--plans N] [--ages LIST] [trainer's options]
// Defaults: about 4 minutes on one core of 2.5 GHz; each further setting 4, each further budget 2, in proportion to
// steps and seeds.
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#    define _POSIX_C_SOURCE 200809L
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "norms.h"
#include "stats.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"
#include "run.h"

enum {
    MEASUREMENTS = 3,
    VALIDATION_TOKENS = 12288,
    ORACLE_BATCHES = 2,
    DRAWS = 2,
    MAX_SEEDS = 64,
    MAX_BUDGETS = 32,
    MAX_AGES = 16
};

typedef enum {
    MAKER_BF16,
    MAKER_F32,
    MAKER_FP8,
    MAKER_FORWARD,
    MAKER_BACKWARD,
    MAKER_FP4,
    MAKER_RANDOM,
    MAKER_ABS,
    MAKER_REL,
    MAKER_TYPE,
    MAKER_ID,
    MAKER_ORACLE,
    MAKER_SNIP,
    MAKER_ADJOINT,
    MAKER_GEMM,
    MAKERS
} maker;

static const char *const maker_name[MAKERS] = { "bf16",     "f32",    "fp8",         "fp4-fwd",     "fp4-bwd",
                                                "fp4",      "random", "min-abs-err", "min-rel-err", "layer-type",
                                                "layer-id", "oracle", "snip",        "adjoint",     "adjoint-gemm" };

typedef struct {
    const char *name, *recipes;
    double rate;
    int outliers;
} setting;

enum { SETTINGS = 8 };

static const setting all_settings[SETTINGS] = {
    {"default",    "default",   1, 0},
    { "rne",       "rne",       1, 0},
    { "tensor",    "tensor",    1, 0},
    { "tensor-sr", "tensor-sr", 1, 0},
    { "mxfp4",     "mxfp4",     1, 0},
    { "nvfp4",     "nvfp4",     1, 0},
    { "outliers",  "default",   1, 1},
    { "hot",       "default",   4, 0}
};

typedef struct {
    double cost[MAKERS][SNIP_GEMMS], update[SNIP_GEMMS];
} layer_costs;  // of FP4 beyond FP8

typedef unsigned char layer_plan;  // bit per GEMM: FP4

typedef struct {
    double own, high, training, share, seconds;
} outcome;

typedef struct {
    const char *setting;
    int maker;
    double budget, own, high, half_width, share, seconds;
} row;

static int listed(const char *list, const char *name) {
    size_t n = strlen(name);
    if (!list) return 1;
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, name, n) && (at[n] == ',' || !at[n])) return 1;
    return 0;
}

static int numbers(const char *list, double *out, int most, double low, double high, const char *what) {
    int n = 0;
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        char *end;
        double x = strtod(at, &end);
        if (end == at || (*end && *end != ',') || !(x >= low && x <= high) || n == most)
            tr_die("%s needs a list of at most %d numbers between %g and %g, not '%s'", what, most, low, high, list);
        out[n++] = x;
    }
    return n;
}

static int whole(const char *text, int low, int high, const char *what) {
    char *end;
    long n = strtol(text, &end, 10);
    if (end == text || *end || n < low || n > high)
        tr_die("%s needs a whole number between %d and %d, not '%s'", what, low, high, text);
    return (int)n;
}

// Every item of the list must be one of the n names, `stride` bytes apart.
static void check_names(const char *list, const char *const *names, size_t stride, int n, const char *what) {
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        int length = (int)strcspn(at, ","), i = 0;
        for (; i < n; i++) {
            const char *name = *(const char *const *)(const void *)((const char *)names + (size_t)i * stride);
            if ((int)strlen(name) == length && !strncmp(name, at, (size_t)length)) break;
        }
        if (i == n) tr_die("%s does not know '%.*s' (--help lists them)", what, length, at);
    }
}

static double uniform(uint64_t seed, uint32_t stream, int i) {
    snip_rng_key key = { seed, stream, 0x706C616Eu };
    uint32_t random[4];
    snip_philox(key, (uint64_t)i, random);
    return random[0] / 4294967296.0;
}

// ---- training
typedef struct {
    float *params, *m, *v;
} checkpoint;

static double validate(const run *r, snip_mode mode) {
    double sum = 0;
    int64_t batches = (VALIDATION_TOKENS - 1) / (r->o->batch * r->o->seq) + 1, count = batches * r->o->batch,
            room = r->d->n - r->d->n_train - r->o->seq - 1;
    snip_set_mode(r->s, mode);
    for (int64_t b = 0; b < batches; b++) {
        for (int64_t j = 0; j < r->o->batch; j++)
            tr_sequence(r->d, r->d->n_train + room * (b * r->o->batch + j) / count, r->o->seq,
                        r->tokens + j * r->o->seq, r->targets + j * r->o->seq);
        sum += pass(r, 0) / (double)batches;
    }
    snip_set_mode(r->s, SNIP_TRAIN);
    return sum;
}

static void put_weights(const run *r, const checkpoint *from) {
    size_t bytes = (size_t)r->g->n_params * sizeof(float);
    memcpy(r->g->params, from->params, bytes);
    memcpy(r->g->m, from->m, bytes);
    memcpy(r->g->v, from->v, bytes);
}

static void restart(const run *r) { check(snip_state_load(r->s, r->fresh, snip_state_size(r->s)), r->s, "state"); }

// Two channels of the block in the middle, before the layers that read the residual stream.
static void add_outliers(llama *g) {
    const llama_block *b = &g->block[g->config.blocks / 2];
    for (int i = 0; i < 2; i++) {
        int64_t channel = (2 * i + 1) * g->config.dim / 4;
        g->params[g->tensors[b->norm1].offset + channel] *= 16;
        g->params[g->tensors[b->norm2].offset + channel] *= 16;
    }
}

// ---- costs and plans
// Costs of every maker from the mean of a few measuring steps at the weights and moments of `from`.
static void measure(const run *r, const checkpoint *from, double lr, int64_t step, layer_costs *costs) {
    int n = snip_layers(r->s), last_block = 0;
    memset(costs, 0, (size_t)n * sizeof *costs);
    restart(r);
    for (int i = 0; i <= MEASUREMENTS; i++) {  // a session's first step is an ordinary one
        double loss_sum = 0, weight_sum = 0;
        put_weights(r, from);
        train_step(r, (uint64_t)r->o->seed + 500, i + 1, lr, step);
        if (i == 0) continue;
        for (int l = 0; l < n; l++) {
            const norms_layer *q = &norms[l];
            loss_sum += norms_loss(q, 1);
            for (int k = 0; k < SNIP_GEMMS; k++) weight_sum += norms_weight(q, 1, k);
        }
        double scale = loss_sum / weight_sum;  // the paper's two terms weigh the same
        for (int l = 0; l < n; l++) {
            const norms_layer *q = &norms[l];
            snip_layer_info info;
            snip_layer(r->s, l, &info);
            for (int k = 0; k < SNIP_GEMMS; k++) {
                costs[l].update[k] += (info.fp4.update[k] - info.fp8.update[k]) / MEASUREMENTS;
                costs[l].cost[MAKER_ABS][k] += norms_operands(q, 1, k, 0) - norms_operands(q, 0, k, 0);
                costs[l].cost[MAKER_REL][k] += norms_operands(q, 1, k, 1) - norms_operands(q, 0, k, 1);
                costs[l].cost[MAKER_SNIP][k] += scale * (norms_weight(q, 1, k) - norms_weight(q, 0, k)) +
                                                (k == SNIP_FWD ? norms_loss(q, 1) - norms_loss(q, 0) : 0);
            }
        }
    }
    for (int l = 0; l < n; l++) {
        snip_layer_info info;
        snip_layer(r->s, l, &info);
        if (atoi(info.name) > last_block) last_block = atoi(info.name);
    }
    for (int l = 0; l < n; l++) {
        snip_layer_info info;
        snip_layer(r->s, l, &info);
        double size = (double)(info.out_features * info.in_features);
        int end = atoi(info.name) == 0 || atoi(info.name) == last_block,
            type = strstr(info.name, "mlp.down") || strstr(info.name, "attn.v");
        for (int k = 0; k < SNIP_GEMMS; k++) {
            costs[l].cost[MAKER_ADJOINT][k] = costs[l].cost[MAKER_GEMM][k] = info.fp4.cost[k] - info.fp8.cost[k];
            costs[l].cost[MAKER_TYPE][k] = size * (type ? 100 : 1);
            costs[l].cost[MAKER_ID][k] = size * (end ? 100 : 1);
        }
    }
}

static void put_plan(snip *s, const layer_plan *plan) {
    for (int l = 0; l < snip_layers(s); l++)
        for (int k = 0; k < SNIP_GEMMS; k++)
            check(snip_set_format(s, l, (snip_gemm_kind)k, plan[l] >> k & 1 ? SNIP_E2M1 : SNIP_E4M3), s, "plan");
}

// The cheapest plan that meets the budget.
static void solve(const snip *s, const layer_costs *costs, maker who, double budget, uint64_t seed, layer_plan *plan) {
    int n = snip_layers(s);
    snip_ilp_option *options = (snip_ilp_option *)tr_alloc((size_t)n * 8 * sizeof *options);
    snip_ilp_group *groups = (snip_ilp_group *)tr_alloc((size_t)n * sizeof *groups);
    int *choice = (int *)tr_alloc((size_t)n * sizeof *choice);
    snip_ilp_problem problem;
    memset(&problem, 0, sizeof problem);
    for (int l = 0; l < n; l++) {
        snip_layer_info info;
        snip_layer(s, l, &info);
        double size = (double)(info.out_features * info.in_features), least = 0;
        snip_ilp_option *list = options + 8 * l;
        groups[l].options = list;
        groups[l].n_options = who == MAKER_GEMM ? 8 : 2;
        for (int i = 0; i < groups[l].n_options; i++) {
            unsigned fp4 = who == MAKER_GEMM ? (unsigned)i : i ? 7u : 0u;
            for (int k = 0; k < SNIP_GEMMS; k++) {
                if (!(fp4 >> k & 1u)) continue;
                list[i].cost += who == MAKER_RANDOM ? size * uniform(seed, 0, l) : costs[l].cost[who][k];
                list[i].gain += size;
            }
            if (list[i].cost < least) least = list[i].cost;
        }
        for (int i = 0; i < groups[l].n_options; i++) list[i].cost -= least;
        problem.total_target += 3 * size * budget;
    }
    problem.n_groups = n;
    problem.groups = groups;
    problem.n_stages = 1;
    if (snip_ilp_solve(&problem, NULL, choice, NULL) > SNIP_ILP_FEASIBLE)
        tr_stop("no plan of %s meets budget %g", maker_name[who], budget);
    for (int l = 0; l < n; l++) plan[l] = (layer_plan)(who == MAKER_GEMM ? choice[l] : choice[l] * 7);
    free(options);
    free(groups);
    free(choice);
}

// Layers in the order in which a greedy choice by the measured loss puts them into FP4.
static void oracle_order(const run *r, int *order) {
    int n = snip_layers(r->s);
    layer_plan *plan = (layer_plan *)tr_alloc((size_t)n);
    snip_set_mode(r->s, SNIP_EVAL);
    for (int i = 0; i < n; i++) {
        double least = 0, before = 0;
        order[i] = -1;
        for (int l = -1; l < n; l++) {
            snip_layer_info info;
            double loss = 0;
            if (l >= 0 && plan[l]) continue;
            if (l >= 0) plan[l] = 7;
            put_plan(r->s, plan);
            for (int b = 0; b < ORACLE_BATCHES; b++) {
                load_batch(r, (uint64_t)r->o->seed + 500, b + 1);
                loss += pass(r, 0) / ORACLE_BATCHES;
            }
            if (l < 0) {
                before = loss;
                continue;
            }
            plan[l] = 0;
            snip_layer(r->s, l, &info);
            loss = (loss - before) / (double)(info.out_features * info.in_features);
            if (order[i] < 0 || loss < least) {
                order[i] = l;
                least = loss;
            }
        }
        plan[order[i]] = 7;
    }
    snip_set_mode(r->s, SNIP_TRAIN);
    free(plan);
}

static void take_oracle(const snip *s, const int *order, double budget, layer_plan *plan) {
    double total = 0, taken = 0;
    snip_layer_info info;
    for (int l = 0; l < snip_layers(s); l++) {
        snip_layer(s, l, &info);
        total += (double)(info.out_features * info.in_features);
        plan[l] = 0;
    }
    for (int i = 0; i < snip_layers(s) && taken < budget * total; i++) {
        snip_layer(s, order[i], &info);
        taken += (double)(info.out_features * info.in_features);
        plan[order[i]] = 7;
    }
}

// ---- a setting
typedef struct {
    run r, m;
    const setting *how;
    double lr;
    int64_t warm, every;
    layer_costs *costs;
    int *order;
} bench;  // m measures

// Makes and sets who's plan at the weights of `from`; costs and order belong to them.
static void use_maker(const bench *b, int who, double budget, uint64_t seed) {
    static const snip_format one[] = { SNIP_BF16, SNIP_F32, SNIP_E4M3, SNIP_E4M3, SNIP_E4M3, SNIP_E2M1 };
    layer_plan *plan = (layer_plan *)tr_alloc((size_t)snip_layers(b->r.s));
    if (who <= MAKER_FP4) {
        check(snip_set_format(b->r.s, -1, SNIP_GEMMS, one[who]), b->r.s, "plan");
        for (int k = 0; k < SNIP_GEMMS; k++)
            if (who == (k == SNIP_FWD ? MAKER_FORWARD : MAKER_BACKWARD))
                check(snip_set_format(b->r.s, -1, (snip_gemm_kind)k, SNIP_E2M1), b->r.s, "plan");
    } else {
        if (who == MAKER_ORACLE)
            take_oracle(b->r.s, b->order, budget, plan);
        else
            solve(b->r.s, b->costs, (maker)who, budget, seed, plan);
        put_plan(b->r.s, plan);
    }
    free(plan);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The rest of the training under the session's plan; who and budget matter where plans are made anew.
static outcome train_on(const bench *b, int who, double budget, int seed) {
    const run *r = &b->r;
    int64_t steps = r->o->steps;
    size_t n = (size_t)snip_layers(r->s);
    double *seconds = (double *)tr_alloc((size_t)steps * sizeof *seconds);
    bench now = *b;
    outcome out;
    now.costs = (layer_costs *)tr_alloc(n * sizeof *now.costs);
    now.order = (int *)tr_alloc(n * sizeof *now.order);
    memset(&out, 0, sizeof out);
    out.share = snip_share(r->s, SNIP_E2M1);
    for (int64_t i = 1; i <= steps; i++) {
        double lr = b->lr * (1 - (double)(i - 1) / (double)steps);
        if (b->every && i > 1 && (i - 1) % b->every == 0 && who > MAKER_RANDOM) {
            checkpoint here = { r->g->params, r->g->m, r->g->v };
            measure(&b->m, &here, lr, b->warm + i, now.costs);
            if (who == MAKER_ORACLE) oracle_order(r, now.order);
            use_maker(&now, who, budget, 0);
        }
        clock_t start = clock();
        out.training += train_step(r, (uint64_t)r->o->seed + 1000 + (uint64_t)seed, i, lr, b->warm + i) / (double)steps;
        seconds[i - 1] = (double)(clock() - start) / CLOCKS_PER_SEC;
    }
    qsort(seconds, (size_t)steps, sizeof *seconds, by_value);
    out.seconds = seconds[steps / 2];
    free(seconds);
    free(now.costs);
    free(now.order);
    out.own = validate(r, SNIP_EVAL);
    out.high = validate(r, SNIP_EVAL_HIGH);
    return out;
}

static void begin_run(const bench *b, const checkpoint *from) {
    put_weights(&b->r, from);
    restart(&b->r);
}

// Random plans of every share, each kind of GEMM with one of its own: does a maker's cost order them as training does?
static void compare_objectives(const bench *b, const checkpoint *from, const outcome *twin, int seeds, int plans) {
    enum { OBJECTIVES = 6, AVERAGED = 4, REPEATING };

    static const int makers[OBJECTIVES] = { MAKER_ABS, MAKER_REL, MAKER_SNIP, MAKER_GEMM, MAKER_GEMM, MAKER_GEMM };
    static const char *const name[OBJECTIVES] = { "min-abs-err", "min-rel-err", "snip",
                                                  "adjoint",     "averaged",    "repeating" };
    int n = snip_layers(b->r.s);
    double *gap = (double *)tr_alloc((size_t)plans * (3 + OBJECTIVES) * sizeof *gap), *cost = gap + 3 * plans;
    layer_plan *plan = (layer_plan *)tr_alloc((size_t)n);
    for (int i = 0; i < plans; i++) {
        for (int l = 0; l < n; l++) {
            plan[l] = 0;
            for (int k = 0; k < SNIP_GEMMS; k++) {
                if (uniform((uint64_t)b->r.o->seed, 1 + (uint32_t)i, l * SNIP_GEMMS + k) >=
                    uniform((uint64_t)b->r.o->seed, 1 + (uint32_t)i, n * SNIP_GEMMS + k))
                    continue;
                plan[l] |= (layer_plan)(1 << k);
                for (int j = 0; j < OBJECTIVES; j++)
                    cost[j * plans + i] += j >= AVERAGED && k != SNIP_FWD
                                               ? b->costs[l].update[k] / (j == AVERAGED ? 100 : 1)
                                               : b->costs[l].cost[makers[j]][k];
            }
        }
        for (int seed = 0; seed < seeds; seed++) {
            begin_run(b, from);
            put_plan(b->r.s, plan);
            outcome out = train_on(b, MAKER_BF16, 0, seed);
            gap[i] += (out.own - twin[seed].own) / seeds;
            gap[plans + i] += (out.high - twin[seed].high) / seeds;
            gap[2 * plans + i] += (out.training - twin[seed].training) / seeds;
        }
        fprintf(stderr, "plan %d of %d: gap %.4f, cost %.3g\n", i + 1, plans, gap[i], cost[3 * plans + i]);
    }
    for (int j = 0; j < OBJECTIVES; j++)
        printf("objective\t%s\t%s\t%.3f\t%.3f\t%.3f\n", b->how->name, name[j],
               stats_spearman(cost + j * plans, gap, plans), stats_spearman(cost + j * plans, gap + plans, plans),
               stats_spearman(cost + j * plans, gap + 2 * plans, plans));
    free(gap);
    free(plan);
}

// ---- the drawing: gap_own against the share of FP4 and against the time of a step, a row of two panels a setting
static double nice(double range) {
    double power = pow(10, floor(log10(range / 6))), m = range / 6 / power;
    return power * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}

static void draw(const char *path, const row *rows, int n) {
    static const char *const colour[MAKERS] = { "#000000", "#9a9a9a", "#e0a100", "#c2410c", "#0f766e",
                                                "#1d4ed8", "#b8b8b8", "#d9a441", "#a0722a", "#7fb069",
                                                "#3f7d4e", "#8e6bbf", "#d1495b", "#5aa9e6", "#1d4ed8" };

    enum { WIDE = 380, TALL = 260, LEFT = 90, TOP = 64, GAP_X = 70, GAP_Y = 96, LEGEND = 150 };

    int settings = 0;
    FILE *f = tr_begin(path);
    for (int i = 0; i < n; i++) settings += i == 0 || rows[i].setting != rows[i - 1].setting;
    int width = LEFT + 2 * WIDE + GAP_X + 24 + LEGEND, height = TOP + settings * (TALL + GAP_Y) - 20, at = 0;
    if (height < TOP + 22 * MAKERS) height = TOP + 22 * MAKERS;
    fprintf(
        f,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" font-family=\"system-ui,sans-serif\" font-size=\"13\" fill=\"#333\">\n"
        "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n<text x=\"%d\" y=\"30\" font-size=\"17\" font-weight=\"600\">Validation loss beyond bfloat16's under each plan, 95%% intervals</text>\n",
        width, height, width, height, width, height, LEFT);
    for (int panel = 0; panel < settings; panel++) {
        int first = at, top = TOP + panel * (TALL + GAP_Y);
        double low = 0, high = 1e-6, x_low[2] = { 0, 1e30 }, x_high[2] = { 1, -1e30 };
        for (; at < n && rows[at].setting == rows[first].setting; at++) {
            if (rows[at].own < low) low = rows[at].own;
            if (rows[at].own > high) high = rows[at].own;
            if (rows[at].seconds < x_low[1]) x_low[1] = rows[at].seconds;
            if (rows[at].seconds > x_high[1]) x_high[1] = rows[at].seconds;
        }
        low -= 0.12 * (high - low);
        high += 0.12 * (high - low);
        for (int by_time = 0; by_time < 2; by_time++) {
            double left = LEFT + by_time * (WIDE + GAP_X), margin = 0.06 * (x_high[by_time] - x_low[by_time]) + 1e-3,
                   x0 = x_low[by_time] - margin, x1 = x_high[by_time] + margin;
            fprintf(
                f,
                "<text x=\"%g\" y=\"%d\" font-weight=\"600\">%s</text>\n<text x=\"%g\" y=\"%d\" text-anchor=\"middle\">%s</text>\n",
                left, top - 10, by_time ? "" : rows[first].setting, left + WIDE / 2.0, top + TALL + 42,
                by_time ? "processor time of a step, bfloat16 = 1" : "share of the linear layers' FLOPs in FP4");
            for (int axis = 0; axis < 2; axis++) {
                double a0 = axis ? low : x0, a1 = axis ? high : x1, step = nice(a1 - a0);
                for (double v = ceil(a0 / step) * step; v <= a1; v += step) {
                    double x = left + (v - x0) / (x1 - x0) * WIDE, y = top + (high - v) / (high - low) * TALL,
                           shown = fabs(v) < step / 2 ? 0 : v;
                    if (axis)
                        fprintf(
                            f,
                            "<path d=\"M%g %.1fh%d\" stroke=\"%s\"/><text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                            left, y, WIDE, shown == 0 ? "#888" : "#e4e4e4", left - 8, y + 4, shown);
                    else
                        fprintf(
                            f,
                            "<path d=\"M%.1f %dv5\" stroke=\"#888\"/><text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%g</text>\n",
                            x, top + TALL, x, top + TALL + 20, shown);
                }
            }
            fprintf(f, "<path d=\"M%g %dv%dh%d\" fill=\"none\" stroke=\"#888\"/>\n", left, top, TALL, WIDE);
            for (int who = MAKER_F32; who < MAKERS; who++) {
                double last_x = 0, last_y = 0;
                int points = 0, strong = who >= MAKER_ADJOINT, hollow = who <= MAKER_FP4;
                for (int i = first; i < at; i++) {
                    if (rows[i].maker != who) continue;
                    double dodge = by_time || hollow ? 0
                                                     : 0.011 * (who - (MAKER_FP4 + MAKERS) / 2) *
                                                           WIDE;  // makers under one budget: beside each other
                    double x = left + ((by_time ? rows[i].seconds : rows[i].share) - x0) / (x1 - x0) * WIDE + dodge,
                           y = top + (high - rows[i].own) / (high - low) * TALL;
                    double up = top + (high - fmin(high, rows[i].own + rows[i].half_width)) / (high - low) * TALL,
                           down = top + (high - fmax(low, rows[i].own - rows[i].half_width)) / (high - low) * TALL;
                    if (points++ && !hollow && !by_time)
                        fprintf(f, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"%s\" stroke-width=\"%g\"/>\n", last_x,
                                last_y, x, y, colour[who], strong ? 2.2 : 1.2);
                    fprintf(
                        f,
                        "<path d=\"M%.1f %.1fV%.1f\" stroke=\"%s\" opacity=\".6\"/><circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\" stroke=\"%s\" stroke-width=\"1.6\"><title>%s, budget %g: %.4f ± %.4f</title></circle>\n",
                        x, up, down, colour[who], x, y, strong ? 4.5 : 3.5, hollow ? "#fff" : colour[who], colour[who],
                        maker_name[who], rows[i].budget, rows[i].own, rows[i].half_width);
                    last_x = x;
                    last_y = y;
                }
            }
        }
    }
    for (int who = MAKER_F32, line = 0; who < MAKERS; who++) {
        int shown = 0;
        for (int i = 0; i < n; i++) shown |= rows[i].maker == who;
        if (!shown) continue;
        fprintf(
            f,
            "<circle cx=\"%d\" cy=\"%d\" r=\"4.5\" fill=\"%s\" stroke=\"%s\" stroke-width=\"1.6\"/><text x=\"%d\" y=\"%d\">%s</text>\n",
            width - LEGEND, TOP + 22 * line, who <= MAKER_FP4 ? "#fff" : colour[who], colour[who], width - LEGEND + 14,
            TOP + 22 * line + 5, maker_name[who]);
        line++;
    }
    fputs("</svg>\n", f);
    tr_commit(f, path, 0);
}

int main(int argc, char **argv) {
    static tr_options o;
    static tr_data d;
    static char defaults[6][16] = { "--steps=80", "--batch=8", "--seq=64", "--dim=64", "--lr=2e-3", "--every=0" };
    static row rows[SETTINGS * MAKERS * MAX_BUDGETS];
    static outcome twin[MAX_SEEDS];
    char *args[72];
    const char *budget_list = "0.75", *settings = "default", *makers = NULL, *svg = NULL, *age_list = NULL;
    double budgets[MAX_BUDGETS], ages[MAX_AGES];
    int n_args = 0, seeds = 3, n_rows = 0, plans = 0, scratch = 0, n_ages = 0;
    int64_t warm = -1;
    tr_program = "quality";
    args[n_args++] = argv[0];
    for (int i = 0; i < 6; i++) args[n_args++] = defaults[i];
    for (int i = 1; i < argc; i++) {  // ours; the rest are the trainer's
        static const char *const own[] = { "--seeds", "--budgets", "--settings", "--makers",
                                           "--warm",  "--svg",     "--plans",    "--ages" };

        enum { OWN = sizeof own / sizeof own[0] };

        const char *eq = strchr(argv[i], '='), *value;
        size_t length = eq ? (size_t)(eq - argv[i]) : strlen(argv[i]);
        int k = 0;
        while (k < OWN && (strlen(own[k]) != length || strncmp(own[k], argv[i], length))) k++;
        if (!strcmp(argv[i], "--from-scratch")) {
            scratch = 1;
            continue;
        }
        if (!strcmp(argv[i], "--help")) {
            printf(
                "Plans of several makers trained beside each other and a bfloat16 twin. About 6 minutes on one core by default; each further\n"
                "setting as long, each further budget 4, in proportion to --steps and --seeds. Of the trainer's options those of the model and\n"
                "the data count; --steps is 80, --dim and --seq 64, --lr 0.002 here.\n"
                "  --seeds N          runs of each plan, on other batches; the interval needs 2, and is 0 with 1 (3)\n"
                "  --budgets LIST     shares of the FLOPs in FP4 (0.75)\n"
                "  --makers LIST      (all)");
            for (int j = 0; j < MAKERS; j++) printf(" %s", maker_name[j]);
            printf("\n  --settings LIST    (default)");
            for (int j = 0; j < SETTINGS; j++) printf(" %s", all_settings[j].name);
            printf("\n  --warm N           bfloat16 steps before (1000; from scratch 50)\n"
                   "  --from-scratch     plans from step --warm on, made anew every --every steps (100)\n"
                   "  --plans N          instead: N random plans; do the costs order them?\n"
                   "  --ages LIST        instead: how good are costs measured so many steps before?\n"
                   "  --svg FILE         draw gap against share and time\n");
            tr_usage();
            return fflush(stdout) ? 2 : 0;
        }
        if (k == OWN) {
            if (n_args > 70) tr_die("too many options");
            args[n_args++] = argv[i];
            continue;
        }
        if (!eq && i + 1 == argc) tr_die("%s needs a value", own[k]);
        value = eq ? eq + 1 : argv[++i];
        if (k == 0) seeds = whole(value, 1, MAX_SEEDS, own[k]);
        if (k == 1) budget_list = value;
        if (k == 2) settings = value;
        if (k == 3) makers = value;
        if (k == 4) warm = whole(value, 1, 1000000000, own[k]);
        if (k == 5) svg = value;
        if (k == 6) plans = whole(value, 2, 100000, own[k]);
        if (k == 7) age_list = value;
    }
    tr_parse(&o, n_args, args);
    check_names(settings, &all_settings[0].name, sizeof *all_settings, SETTINGS, "--settings");
    check_names(makers, maker_name, sizeof *maker_name, MAKERS, "--makers");
    if (scratch && !o.every) o.every = 100;
    if (warm == -1) warm = scratch ? 50 : 1000;
    int n_budgets = numbers(budget_list, budgets, MAX_BUDGETS, 0, 1, "--budgets");
    qsort(budgets, (size_t)n_budgets, sizeof *budgets, by_value);
    if (age_list) n_ages = numbers(age_list, ages, MAX_AGES, 0, (double)warm - 1, "--ages");
#ifdef _OPENMP
    if (o.threads) omp_set_num_threads((int)o.threads);
#endif
    tr_load_data(&d, &o);
    if (svg && (plans || n_ages)) tr_die("--svg draws neither --plans nor --ages");
    llama_config config = { d.vocab,         (int)o.dim,      (int)o.blocks,
                            (int)o.heads,    (int)o.kv_heads, (int)o.ffn,
                            (int)o.seq,      (int)o.tied,     0,
                            (uint64_t)o.seed };
    if (llama_config_check(&config)) tr_die("%s", llama_config_check(&config));
    if (o.blocks * LLAMA_LINEARS > NORMS_LAYERS) tr_die("at most %d blocks", NORMS_LAYERS / LLAMA_LINEARS);
    if (svg) tr_try(svg);
    size_t tokens_n = (size_t)(o.batch * o.seq);
    int32_t *tokens = (int32_t *)tr_alloc(tokens_n * sizeof *tokens),
            *targets = (int32_t *)tr_alloc(tokens_n * sizeof *targets);
    checkpoint from = { NULL, NULL, NULL };
    const setting *trained = NULL;
    for (const setting *how = all_settings; how < all_settings + SETTINGS; how++) {
        if (!listed(settings, how->name)) continue;
        double start = tr_now();
        snip_desc desc, measuring;
        memset(&desc, 0, sizeof desc);
        norms_recipes(&desc, how->recipes);
        desc.seed = (uint64_t)o.seed;
        measuring = desc;
        desc.every = -1;
        measuring.every = 1;
        bench b = {
            {NULL,  snip_create(&desc),      tokens, targets, &d, &o, NULL},
            { NULL, snip_create(&measuring), tokens, targets, &d, &o, NULL},
            how,
            o.lr * how->rate,
            warm,
            o.every,
            NULL,
            NULL
        };
        if (!b.r.s || !b.m.s || !(b.r.g = llama_create(&config, (int)o.batch, b.r.s)) ||
            !(b.m.g = llama_create(&config, (int)o.batch, b.m.s)))
            tr_stop("out of memory");
        size_t floats = (size_t)b.r.g->n_params, bytes = floats * sizeof(float), n = (size_t)snip_layers(b.r.s);
        void *fresh = tr_alloc(snip_state_size(b.r.s));
        check(snip_state_save(b.r.s, fresh), b.r.s, "state");
        b.r.fresh = b.m.fresh = fresh;
        b.costs = (layer_costs *)tr_alloc(n * sizeof *b.costs);
        b.order = (int *)tr_alloc(n * sizeof *b.order);
        layer_costs *aged = (layer_costs *)tr_alloc((size_t)(n_ages + 1) * n * sizeof *aged);
        if (!from.params) {
            from.params = (float *)tr_alloc(3 * bytes);
            from.m = from.params + floats;
            from.v = from.m + floats;
        }
        if (!trained || trained->rate != how->rate || trained->outliers != how->outliers || n_ages) {
            checkpoint here = { b.r.g->params, b.r.g->m, b.r.g->v };
            if (how->outliers) add_outliers(b.r.g);
            for (int64_t step = 1; step <= warm; step++) {
                train_step(&b.r, (uint64_t)o.seed, step, b.lr * (step < 50 ? (double)step / 50 : 1), step);
                for (int i = 0; i < n_ages; i++)
                    if (step == warm - (int64_t)ages[i]) measure(&b.m, &here, b.lr, step + 1, aged + (size_t)i * n);
                if (step % 20 == 0 && !o.quiet)
                    fprintf(stderr, "\r%s: step %lld of %lld  %.0f s ", how->name, (long long)step, (long long)warm,
                            tr_now() - start);
            }
            memcpy(from.params, b.r.g->params, bytes);
            memcpy(from.m, b.r.g->m, bytes);
            memcpy(from.v, b.r.g->v, bytes);
            trained = how;
        }
        measure(&b.m, &from, b.lr, warm + 1, b.costs);
        begin_run(&b, &from);
        if (!plans && !n_ages && listed(makers, maker_name[MAKER_ORACLE])) oracle_order(&b.r, b.order);
        for (int seed = 0; seed < seeds; seed++) {
            begin_run(&b, &from);
            twin[seed] = train_on(&b, MAKER_BF16, 0, seed);
        }
        if (!o.quiet)
            fprintf(stderr, "\r%s: bf16 %.4f after %lld steps, %.0f s\n", how->name, twin[0].own,
                    (long long)(warm + o.steps), tr_now() - start);
        if (plans) compare_objectives(&b, &from, twin, seeds, plans);
        for (int i = 0; i < n_ages; i++) {
            double own[MAX_SEEDS], high = 0, mean = 0, share = 0, *now = (double *)tr_alloc(n * 6 * sizeof *now),
                                   *then = now + 3 * n;
            for (size_t j = 0; j < 3 * n; j++) {
                now[j] = b.costs[j / 3].cost[MAKER_GEMM][j % 3];
                then[j] = aged[(size_t)i * n + j / 3].cost[MAKER_GEMM][j % 3];
            }
            bench old = b;
            old.costs = aged + (size_t)i * n;
            for (int seed = 0; seed < seeds; seed++) {
                begin_run(&b, &from);
                use_maker(&old, MAKER_GEMM, budgets[0], 0);
                outcome out = train_on(&b, MAKER_BF16, 0, seed);
                own[seed] = out.own - twin[seed].own;
                mean += own[seed] / seeds;
                high += (out.high - twin[seed].high) / seeds;
                share = out.share;
            }
            printf("phase\t%s\t%g\t%g\t%.3f\t%.5f\t%.5f\t%.5f\t%.3f\n", how->name, budgets[0], ages[i],
                   stats_spearman(now, then, (int)(3 * n)), mean, high, stats_half_width(own, seeds), share);
            fflush(stdout);
            free(now);
        }
        for (int budget = 0; budget < n_budgets && !plans && !n_ages; budget++) {
            static double own[MAKERS][MAX_SEEDS], high[MAX_SEEDS], training[MAX_SEEDS], against[MAX_SEEDS];
            for (int turn = 0; turn < MAKERS; turn++) {
                int who = (turn + MAKER_GEMM) % MAKERS;  // adjoint-gemm first: the others are held against it
                double mean[3] = { 0, 0, 0 }, share = 0, seconds = 0, shown = budgets[budget];
                int draws = who == MAKER_RANDOM ? DRAWS : 1, done = 0, ours = listed(makers, maker_name[MAKER_GEMM]);
                if (!listed(makers, maker_name[who]) || (budget && who <= MAKER_FP4)) continue;  // uniform: once
                for (int seed = 0; seed < seeds; seed++) {
                    own[who][seed] = high[seed] = training[seed] = 0;
                    for (int draw = 0; draw < draws; draw++) {
                        outcome out = twin[seed];
                        if (who != MAKER_BF16) {
                            begin_run(&b, &from);
                            use_maker(&b, who, budgets[budget], (uint64_t)((o.seed * 1000 + seed) * DRAWS + draw));
                            out = train_on(&b, who, budgets[budget], seed);
                        }
                        own[who][seed] += (out.own - twin[seed].own) / draws;
                        high[seed] += (out.high - twin[seed].high) / draws;
                        training[seed] += (out.training - twin[seed].training) / draws;
                        share += out.share / draws / seeds;
                        seconds += out.seconds / twin[seed].seconds / draws / seeds;
                        if (!o.quiet)
                            fprintf(stderr, "\r%s %g %s: run %d of %d  %.0f s        ", how->name, budgets[budget],
                                    maker_name[who], ++done, seeds * draws, tr_now() - start);
                    }
                    against[seed] = own[who][seed] - own[MAKER_GEMM][seed];
                    mean[0] += own[who][seed] / seeds;
                    mean[1] += high[seed] / seeds;
                    mean[2] += training[seed] / seeds;
                }
                if (who <= MAKER_FP4) shown = floor(share * 1000 + 0.5) / 1000;
                if (!o.quiet) fprintf(stderr, "\r%60s\r", "");
                row q = { how->name, who, shown, mean[0], mean[1], stats_half_width(own[who], seeds), share, seconds };
                rows[n_rows++] = q;
                printf("quality\t%s\t%g\t%s\t%.5f\t%.5f\t%.5f\t%.3f\n", q.setting, q.budget, maker_name[who], q.own,
                       q.high, q.half_width, q.share);
                double difference = 0;
                for (int seed = 0; seed < seeds; seed++) difference += against[seed] / seeds;
                printf("detail\t%s\t%g\t%s\t%.5f\t%.5f\t%.5f\t%.5f\t%.5f\t%.3f\n", q.setting, q.budget, maker_name[who],
                       stats_half_width(high, seeds), mean[2], stats_half_width(training, seeds), ours ? difference : 0,
                       ours ? stats_half_width(against, seeds) : 0, seconds);
                fflush(stdout);
            }
        }
        llama_destroy(b.r.g);
        llama_destroy(b.m.g);
        snip_destroy(b.r.s);
        snip_destroy(b.m.s);
        free(b.costs);
        free(b.order);
        free(aged);
        free(fresh);
    }
    if (svg) draw(svg, rows, n_rows);
    free(from.params);
    free(tokens);
    free(targets);
    if (fflush(stdout) || ferror(stdout)) tr_die("cannot write to standard output: %s", strerror(errno ? errno : EIO));
    return 0;
}
