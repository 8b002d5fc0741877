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
// the backward GEMMs' update errors divided by a horizon of 100.
//
// --ages LIST instead: costs measured that many steps before the checkpoint; "phase", setting, budget, age, correlation
// of the costs with those of age 0, gap_own, gap_high, half_width_95, fp4_share of adjoint-gemm.
//
//   cc -O2 -fopenmp bench/quality.c -o quality -lm
//   ./quality --data FILE [--steps N] [--seeds N] [--budgets LIST] [--settings LIST] [--makers LIST] [--warm N]
//             [--from-scratch] [--every N] [--svg FILE] [--plans N] [--ages LIST] [trainer's options]
// Defaults: about 4 minutes on one core of 2.5 GHz; each further setting 4, each further budget 2, in proportion to
// steps and seeds.
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#    define _POSIX_C_SOURCE 200809L
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"
#include "norms.h"
#include "stats.h"
#include "run.h"

// >>makers -----------------------------------------------------------------------------------------
enum {
    MEASUREMENTS = 3,           // measuring steps whose mean a maker goes by
    VALIDATION_TOKENS = 12288,  // at least
    ORACLE_BATCHES = 2,
    DRAWS = 2,  // random plans a seed
    MAX_SEEDS = 64,
    MAX_BUDGETS = 32,
    MAX_AGES = 16
};

enum { MEASURE_SEED = 500, TRAIN_SEED = 1000 };  // added to --seed: batches that no other part sees

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

static int is_uniform(int who) { return who <= MAKER_FP4; }

typedef struct {
    const char *name, *recipes;
    double rate;  // factor on the learning rate
    int outliers;
} setting;

enum { SETTINGS = 8 };

// clang-format off
static const setting all_settings[SETTINGS] = {
    { "default",   "default",   1, 0 },
    { "rne",       "rne",       1, 0 },
    { "tensor",    "tensor",    1, 0 },
    { "tensor-sr", "tensor-sr", 1, 0 },
    { "mxfp4",     "mxfp4",     1, 0 },
    { "nvfp4",     "nvfp4",     1, 0 },
    { "outliers",  "default",   1, 1 },
    { "hot",       "default",   4, 0 },
};

// clang-format on

typedef struct {
    double cost[MAKERS][SNIP_GEMMS], update[SNIP_GEMMS];
} layer_costs;  // of FP4 beyond FP8

typedef unsigned char layer_plan;  // bit per GEMM: FP4

enum { ALL_FP4 = 7 };

typedef struct {
    double own, high, training, share, seconds;
} outcome;

typedef struct {
    const char *setting;
    int maker;
    double budget, own, high, half_width, share, seconds;
} row;

// What the command line asks for.
typedef struct {
    tr_options options;
    tr_data data;
    const char *settings, *makers, *svg;
    double budgets[MAX_BUDGETS], ages[MAX_AGES];
    int n_budgets, n_ages, seeds, plans;
    int64_t warm;
} request;

typedef struct {
    float *params, *m, *v;
} checkpoint;

// A setting.
typedef struct {
    const request *asked;
    const setting *how;
    tr_training training, measuring;
    void *fresh;  // a session's state before its first step
    double lr;
    checkpoint from;     // after the warm-up
    layer_costs *costs;  // [layers] of that checkpoint; order too
    int *order;          // [layers] in which the oracle takes them
    double begun;
} bench;

// >>training ---------------------------------------------------------------------------------------
static double uniform(uint64_t seed, uint32_t stream, int i) {
    snip_rng_key key = { seed, stream, 0x706C616Eu };  // "plan"
    uint32_t random[4];
    snip_philox(key, (uint64_t)i, random);
    return random[0] / 4294967296.0;
}

static double validate(const tr_training *t, snip_mode mode) {
    const tr_data *d = t->data;
    int64_t seq = t->model->config.seq, batches = (VALIDATION_TOKENS - 1) / (t->batch * seq) + 1;
    int64_t n = batches * t->batch, room = d->n - d->n_train - seq - 1;
    int64_t *at = (int64_t *)tr_alloc((size_t)n * sizeof *at);
    double loss;
    for (int64_t i = 0; i < n; i++) at[i] = d->n_train + room * i / n;
    check(tr_evaluate(t, mode, at, n, &loss), t->session, "validating");
    free(at);
    return loss;
}

static void copy_weights(const checkpoint *to, const checkpoint *from, const llama *g) {
    size_t bytes = (size_t)g->n_params * sizeof(float);
    memcpy(to->params, from->params, bytes);
    memcpy(to->m, from->m, bytes);
    memcpy(to->v, from->v, bytes);
}

static checkpoint weights_of(const llama *g) {
    checkpoint c = { g->params, g->m, g->v };
    return c;
}

// Puts a model and its session where a run begins.
static void restart(const bench *b, const tr_training *t, const checkpoint *from) {
    checkpoint to = weights_of(t->model);
    copy_weights(&to, from, t->model);
    check(snip_state_load(t->session, b->fresh, snip_state_size(t->session)), t->session, "state");
}

// Two channels of the block in the middle, before the layers that read the residual stream.
static void add_outliers(llama *g) {
    const llama_block *b = &g->block[g->config.blocks / 2];
    for (int i = 0; i < 2; i++) {
        int64_t channel = (2 * i + 1) * g->config.dim / 4;
        g->params[g->tensors[b->norm1].offset + channel] *= 16;
        g->params[g->tensors[b->norm2].offset + channel] *= 16;
    }
}

// >>costs ------------------------------------------------------------------------------------------
static snip_layer_info layer_of(const snip *s, int l) {
    snip_layer_info info;
    memset(&info, 0, sizeof info);
    snip_layer(s, l, &info);
    return info;
}

static double size_of(const snip_layer_info *info) { return (double)(info->out_features * info->in_features); }

static void add_measurement(const snip *s, layer_costs *costs) {
    int n = snip_layers(s);
    double loss_sum = 0, weight_sum = 0;
    for (int l = 0; l < n; l++) {
        loss_sum += norms_loss(&norms[l], NORMS_FP4);
        for (int k = 0; k < SNIP_GEMMS; k++) weight_sum += norms_weight(&norms[l], NORMS_FP4, k);
    }
    double scale = loss_sum / weight_sum;  // the paper's two terms weigh the same
    for (int l = 0; l < n; l++) {
        const norms_layer *norm = &norms[l];
        snip_layer_info info = layer_of(s, l);
        for (int k = 0; k < SNIP_GEMMS; k++) {
            double(*cost)[SNIP_GEMMS] = costs[l].cost;
            costs[l].update[k] += (info.fp4.update[k] - info.fp8.update[k]) / MEASUREMENTS;
            cost[MAKER_ABS][k] += norms_operands(norm, NORMS_FP4, k, 0) - norms_operands(norm, NORMS_FP8, k, 0);
            cost[MAKER_REL][k] += norms_operands(norm, NORMS_FP4, k, 1) - norms_operands(norm, NORMS_FP8, k, 1);
            cost[MAKER_SNIP][k] += scale * (norms_weight(norm, NORMS_FP4, k) - norms_weight(norm, NORMS_FP8, k)) +
                                   (k == SNIP_FWD ? norms_loss(norm, NORMS_FP4) - norms_loss(norm, NORMS_FP8) : 0);
        }
    }
}

// Costs of every maker from the mean of a few measuring steps at the weights and moments of `from`. step: of the
// optimizer.
static void measure(const bench *b, const checkpoint *from, double lr, int64_t step, layer_costs *costs) {
    const tr_training *t = &b->measuring;
    const snip *s = t->session;
    const checkpoint here = weights_of(t->model);
    int n = snip_layers(s), last_block = 0;
    memset(costs, 0, (size_t)n * sizeof *costs);
    restart(b, t, from);
    for (int i = 0; i <= MEASUREMENTS; i++) {  // a session's first step is an ordinary one
        copy_weights(&here, from, t->model);
        run_step(t, (uint64_t)b->asked->options.seed + MEASURE_SEED, i + 1, lr, step);
        if (i > 0) add_measurement(s, costs);
    }
    for (int l = 0; l < n; l++) {
        int block = atoi(layer_of(s, l).name);
        if (block > last_block) last_block = block;
    }
    for (int l = 0; l < n; l++) {
        snip_layer_info info = layer_of(s, l);
        int edge = atoi(info.name) == 0 || atoi(info.name) == last_block;
        int type = strstr(info.name, "mlp.down") || strstr(info.name, "attn.v");
        for (int k = 0; k < SNIP_GEMMS; k++) {
            double(*cost)[SNIP_GEMMS] = costs[l].cost;
            cost[MAKER_ADJOINT][k] = cost[MAKER_GEMM][k] = info.fp4.cost[k] - info.fp8.cost[k];
            cost[MAKER_TYPE][k] = size_of(&info) * (type ? 100 : 1);
            cost[MAKER_ID][k] = size_of(&info) * (edge ? 100 : 1);
        }
    }
}

// >>plans ------------------------------------------------------------------------------------------
static void put_plan(snip *s, const layer_plan *plan) {
    for (int l = 0; l < snip_layers(s); l++)
        for (int k = 0; k < SNIP_GEMMS; k++)
            check(snip_set_format(s, l, (snip_gemm_kind)k, plan[l] >> k & 1 ? SNIP_E2M1 : SNIP_E4M3), s, "plan");
}

// The cheapest plan that meets the budget.
static void solve(const snip *s, const layer_costs *costs, maker who, double budget, uint64_t seed, layer_plan *plan) {
    enum { OPTIONS = 8 };  // each of three GEMMs in FP8 or FP4

    int n = snip_layers(s), by_gemm = who == MAKER_GEMM;
    snip_ilp_option *options = (snip_ilp_option *)tr_alloc((size_t)n * OPTIONS * sizeof *options);
    snip_ilp_group *groups = (snip_ilp_group *)tr_alloc((size_t)n * sizeof *groups);
    int *choice = (int *)tr_alloc((size_t)n * sizeof *choice);
    snip_ilp_problem problem = { n, groups, 1, NULL, 0 };
    for (int l = 0; l < n; l++) {
        snip_layer_info info = layer_of(s, l);
        double size = size_of(&info), least = 0;
        snip_ilp_option *list = options + OPTIONS * l;
        groups[l].options = list;
        groups[l].n_options = by_gemm ? OPTIONS : 2;
        for (int i = 0; i < groups[l].n_options; i++) {
            int fp4 = by_gemm ? i : i * ALL_FP4;
            for (int k = 0; k < SNIP_GEMMS; k++) {
                if (!(fp4 >> k & 1)) continue;
                list[i].cost += who == MAKER_RANDOM ? size * uniform(seed, 0, l) : costs[l].cost[who][k];
                list[i].gain += size;
            }
            if (list[i].cost < least) least = list[i].cost;
        }
        for (int i = 0; i < groups[l].n_options; i++) list[i].cost -= least;  // the solver's costs are not negative
        problem.total_target += 3 * size * budget;
    }
    if (snip_ilp_solve(&problem, NULL, choice, NULL) > SNIP_ILP_FEASIBLE)
        tr_stop("no plan of %s meets budget %g", maker_name[who], budget);
    for (int l = 0; l < n; l++) plan[l] = (layer_plan)(by_gemm ? choice[l] : choice[l] * ALL_FP4);
    free(options);
    free(groups);
    free(choice);
}

static double loss_under(const tr_training *t, const layer_plan *plan, uint64_t batches) {
    double loss = 0;
    put_plan(t->session, plan);
    for (int i = 0; i < ORACLE_BATCHES; i++) {
        tr_load_batch(t, batches, i + 1);
        loss += run_loss(t) / ORACLE_BATCHES;
    }
    return loss;
}

// Layers in the order in which a greedy choice by the measured loss puts them into FP4.
static void oracle_order(const bench *b, int *order) {
    const tr_training *t = &b->training;
    const uint64_t batches = (uint64_t)b->asked->options.seed + MEASURE_SEED;
    int n = snip_layers(t->session);
    layer_plan *plan = (layer_plan *)tr_alloc((size_t)n);
    snip_set_mode(t->session, SNIP_EVAL);
    for (int i = 0; i < n; i++) {
        double least = 0, before = loss_under(t, plan, batches);
        order[i] = -1;
        for (int l = 0; l < n; l++) {
            snip_layer_info info = layer_of(t->session, l);
            if (plan[l]) continue;
            plan[l] = ALL_FP4;
            double loss = (loss_under(t, plan, batches) - before) / size_of(&info);
            plan[l] = 0;
            if (order[i] >= 0 && loss >= least) continue;
            order[i] = l;
            least = loss;
        }
        plan[order[i]] = ALL_FP4;
    }
    snip_set_mode(t->session, SNIP_TRAIN);
    free(plan);
}

static void take_oracle(const snip *s, const int *order, double budget, layer_plan *plan) {
    double total = 0, taken = 0;
    for (int l = 0; l < snip_layers(s); l++) {
        snip_layer_info info = layer_of(s, l);
        total += size_of(&info);
        plan[l] = 0;
    }
    for (int i = 0; i < snip_layers(s) && taken < budget * total; i++) {
        snip_layer_info info = layer_of(s, order[i]);
        taken += size_of(&info);
        plan[order[i]] = ALL_FP4;
    }
}

// Makes and sets who's plan from the costs or the order.
static void use_maker(const bench *b, int who, const layer_costs *costs, const int *order, double budget,
                      uint64_t seed) {
    static const snip_format one[] = { SNIP_BF16, SNIP_F32, SNIP_E4M3, SNIP_E4M3, SNIP_E4M3, SNIP_E2M1 };
    snip *s = b->training.session;
    if (is_uniform(who)) {
        check(snip_set_format(s, -1, SNIP_GEMMS, one[who]), s, "plan");
        for (int k = 0; k < SNIP_GEMMS; k++)
            if (who == (k == SNIP_FWD ? MAKER_FORWARD : MAKER_BACKWARD))
                check(snip_set_format(s, -1, (snip_gemm_kind)k, SNIP_E2M1), s, "plan");
        return;
    }
    layer_plan *plan = (layer_plan *)tr_alloc((size_t)snip_layers(s));
    if (who == MAKER_ORACLE)
        take_oracle(s, order, budget, plan);
    else
        solve(s, costs, (maker)who, budget, seed, plan);
    put_plan(s, plan);
    free(plan);
}

// >>runs -------------------------------------------------------------------------------------------
// Makes who's plan anew at the weights of the training.
static void renew_plan(const bench *b, int who, double budget, double lr, int64_t step) {
    size_t n = (size_t)snip_layers(b->training.session);
    layer_costs *costs = (layer_costs *)tr_alloc(n * sizeof *costs);
    int *order = (int *)tr_alloc(n * sizeof *order);
    const checkpoint here = weights_of(b->training.model);
    measure(b, &here, lr, step, costs);
    if (who == MAKER_ORACLE) oracle_order(b, order);
    use_maker(b, who, costs, order, budget, 0);
    free(costs);
    free(order);
}

// The rest of the training under the session's plan; who and budget matter where plans are made anew.
static outcome train_on(const bench *b, int who, double budget, int seed) {
    const tr_training *t = &b->training;
    const tr_options *o = &b->asked->options;
    const uint64_t batches = (uint64_t)o->seed + TRAIN_SEED + (uint64_t)seed;
    double *seconds = (double *)tr_alloc((size_t)o->steps * sizeof *seconds);
    outcome out = { 0, 0, 0, snip_share(t->session, SNIP_E2M1), 0 };
    for (int64_t i = 1; i <= o->steps; i++) {
        double lr = b->lr * (1 - (double)(i - 1) / (double)o->steps);
        if (o->every && i > 1 && (i - 1) % o->every == 0 && who > MAKER_RANDOM)
            renew_plan(b, who, budget, lr, b->asked->warm + i);
        double start = stats_seconds(1);
        out.training += run_step(t, batches, i, lr, b->asked->warm + i) / (double)o->steps;
        seconds[i - 1] = stats_seconds(1) - start;
    }
    out.seconds = stats_median(seconds, (int)o->steps);
    free(seconds);
    out.own = validate(t, SNIP_EVAL);
    out.high = validate(t, SNIP_EVAL_HIGH);
    return out;
}

static void begin_run(const bench *b) { restart(b, &b->training, &b->from); }

// Random plans of every share, each kind of GEMM with one of its own: does a maker's cost order them as training does?
static void compare_objectives(const bench *b, const outcome *twin) {
    enum { OBJECTIVES = 6, AVERAGED = 4, REPEATING, GAPS = 3 };

    static const int makers[OBJECTIVES] = { MAKER_ABS, MAKER_REL, MAKER_SNIP, MAKER_GEMM, MAKER_GEMM, MAKER_GEMM };
    static const char *const name[OBJECTIVES] = { "min-abs-err", "min-rel-err", "snip",
                                                  "adjoint",     "averaged",    "repeating" };
    const int n = snip_layers(b->training.session), plans = b->asked->plans, seeds = b->asked->seeds;
    const uint64_t seed_of_plans = (uint64_t)b->asked->options.seed;
    double *gap = (double *)tr_alloc((size_t)plans * (GAPS + OBJECTIVES) * sizeof *gap), *cost = gap + GAPS * plans;
    layer_plan *plan = (layer_plan *)tr_alloc((size_t)n);
    for (int i = 0; i < plans; i++) {
        const uint32_t stream = 1 + (uint32_t)i;
        memset(plan, 0, (size_t)n);
        for (int j = 0; j < n * SNIP_GEMMS; j++) {
            const int l = j / SNIP_GEMMS, k = j % SNIP_GEMMS;
            if (uniform(seed_of_plans, stream, j) >= uniform(seed_of_plans, stream, n * SNIP_GEMMS + k)) continue;
            plan[l] |= (layer_plan)(1 << k);
            for (int of = 0; of < OBJECTIVES; of++)
                cost[of * plans + i] += of >= AVERAGED && k != SNIP_FWD
                                            ? b->costs[l].update[k] / (of == AVERAGED ? 100 : 1)
                                            : b->costs[l].cost[makers[of]][k];
        }
        for (int seed = 0; seed < seeds; seed++) {
            begin_run(b);
            put_plan(b->training.session, plan);
            outcome out = train_on(b, MAKER_BF16, 0, seed);
            gap[i] += (out.own - twin[seed].own) / seeds;
            gap[plans + i] += (out.high - twin[seed].high) / seeds;
            gap[2 * plans + i] += (out.training - twin[seed].training) / seeds;
        }
        fprintf(stderr, "plan %d of %d: gap %.4f, cost %.3g\n", i + 1, plans, gap[i], cost[3 * plans + i]);
    }
    for (int of = 0; of < OBJECTIVES; of++) {
        const double *x = cost + of * plans;
        printf("objective\t%s\t%s\t%.3f\t%.3f\t%.3f\n", b->how->name, name[of], stats_spearman(x, gap, plans),
               stats_spearman(x, gap + plans, plans), stats_spearman(x, gap + 2 * plans, plans));
    }
    free(gap);
    free(plan);
}

// How good are costs that were measured `age` steps before the checkpoint?
static void compare_age(const bench *b, const outcome *twin, const layer_costs *aged, double age) {
    const int n = 3 * snip_layers(b->training.session), seeds = b->asked->seeds;
    double own[MAX_SEEDS], high = 0, share = 0, *now = (double *)tr_alloc((size_t)n * 2 * sizeof *now), *then = now + n;
    for (int j = 0; j < n; j++) {
        now[j] = b->costs[j / 3].cost[MAKER_GEMM][j % 3];
        then[j] = aged[j / 3].cost[MAKER_GEMM][j % 3];
    }
    for (int seed = 0; seed < seeds; seed++) {
        begin_run(b);
        use_maker(b, MAKER_GEMM, aged, NULL, b->asked->budgets[0], 0);
        outcome out = train_on(b, MAKER_BF16, 0, seed);
        own[seed] = out.own - twin[seed].own;
        high += (out.high - twin[seed].high) / seeds;
        share = out.share;
    }
    printf("phase\t%s\t%g\t%g\t%.3f\t%.5f\t%.5f\t%.5f\t%.3f\n", b->how->name, b->asked->budgets[0], age,
           stats_spearman(now, then, n), stats_mean(own, seeds), high, stats_half_width(own, seeds), share);
    fflush(stdout);
    free(now);
}

typedef struct {  // of a maker, by seed: gaps to the twin
    double own[MAX_SEEDS], high[MAX_SEEDS], training[MAX_SEEDS];
    double share, seconds;  // means; seconds: the twin's being 1
} gaps;

static void train_maker(const bench *b, int who, double budget, const outcome *twin, gaps *g) {
    const int draws = who == MAKER_RANDOM ? DRAWS : 1, seeds = b->asked->seeds;
    memset(g, 0, sizeof *g);
    for (int run = 0; run < seeds * draws; run++) {
        const int seed = run / draws, draw = run % draws;
        outcome out = twin[seed];
        if (who != MAKER_BF16) {
            begin_run(b);
            use_maker(b, who, b->costs, b->order, budget,
                      (uint64_t)((b->asked->options.seed * 1000 + seed) * DRAWS + draw));
            out = train_on(b, who, budget, seed);
        }
        g->own[seed] += (out.own - twin[seed].own) / draws;
        g->high[seed] += (out.high - twin[seed].high) / draws;
        g->training[seed] += (out.training - twin[seed].training) / draws;
        g->share += out.share / draws / seeds;
        g->seconds += out.seconds / twin[seed].seconds / draws / seeds;
        if (!b->asked->options.quiet)
            fprintf(stderr, "\r%s %g %s: run %d of %d  %.0f s        ", b->how->name, budget, maker_name[who], run + 1,
                    seeds * draws, tr_now() - b->begun);
    }
}

// against: of adjoint-gemm, or NULL.
static row print_maker(const bench *b, int who, double budget, const gaps *g, const gaps *against) {
    const int seeds = b->asked->seeds;
    double less[MAX_SEEDS] = { 0 };
    for (int seed = 0; seed < seeds && against; seed++) less[seed] = g->own[seed] - against->own[seed];
    row line = { b->how->name,
                 who,
                 is_uniform(who) ? floor(g->share * 1000 + 0.5) / 1000 : budget,
                 stats_mean(g->own, seeds),
                 stats_mean(g->high, seeds),
                 stats_half_width(g->own, seeds),
                 g->share,
                 g->seconds };
    printf("quality\t%s\t%g\t%s\t%.5f\t%.5f\t%.5f\t%.3f\n", line.setting, line.budget, maker_name[who], line.own,
           line.high, line.half_width, line.share);
    printf("detail\t%s\t%g\t%s\t%.5f\t%.5f\t%.5f\t%.5f\t%.5f\t%.3f\n", line.setting, line.budget, maker_name[who],
           stats_half_width(g->high, seeds), stats_mean(g->training, seeds), stats_half_width(g->training, seeds),
           stats_mean(less, seeds), stats_half_width(less, seeds), g->seconds);
    fflush(stdout);
    return line;
}

// >>lists ------------------------------------------------------------------------------------------
static const char *next_item(const char *at) {
    const char *comma = strchr(at, ',');
    return comma ? comma + 1 : NULL;
}

static int listed(const char *list, const char *name) {  // list NULL: everything is
    size_t n = strlen(name);
    for (const char *at = list; at; at = next_item(at))
        if (!strncmp(at, name, n) && (at[n] == ',' || !at[n])) return 1;
    return !list;
}

static int numbers(const char *list, double *out, int most, double low, double high, const char *what) {
    int n = 0;
    for (const char *at = list; at; at = next_item(at)) {
        char *end;
        double x = strtod(at, &end);
        if (end == at || (*end && *end != ',') || !(x >= low && x <= high) || n == most)
            tr_die("%s needs a list of at most %d numbers between %g and %g, not '%s'", what, most, low, high, list);
        out[n++] = x;
    }
    return n;
}

// Every item of the list must be one of the n names, `stride` bytes apart.
static void check_names(const char *list, const char *const *names, size_t stride, int n, const char *what) {
    for (const char *at = list; at; at = next_item(at)) {
        int length = (int)strcspn(at, ","), i = 0;
        for (; i < n; i++) {
            const char *name = *(const char *const *)(const void *)((const char *)names + (size_t)i * stride);
            if ((int)strlen(name) == length && !strncmp(name, at, (size_t)length)) break;
        }
        if (i == n) tr_die("%s does not know '%.*s' (--help lists them)", what, length, at);
    }
}

// >>settings ---------------------------------------------------------------------------------------
static void train_warm(bench *b, layer_costs *aged) {
    const request *asked = b->asked;
    const int64_t warm = asked->warm;
    const checkpoint here = weights_of(b->training.model);
    const int layers = snip_layers(b->training.session);
    if (b->how->outliers) add_outliers(b->training.model);
    for (int64_t step = 1; step <= warm; step++) {
        double lr = b->lr * (step < 50 ? (double)step / 50 : 1);
        run_step(&b->training, (uint64_t)asked->options.seed, step, lr, step);
        for (int i = 0; i < asked->n_ages; i++)
            if (step == warm - (int64_t)asked->ages[i]) measure(b, &here, b->lr, step + 1, aged + i * layers);
        if (step % 20 == 0 && !asked->options.quiet)
            fprintf(stderr, "\r%s: step %lld of %lld  %.0f s ", b->how->name, (long long)step, (long long)warm,
                    tr_now() - b->begun);
    }
    copy_weights(&b->from, &here, b->training.model);
}

static bench begin_setting(const request *asked, const setting *how, const checkpoint *from) {
    bench b;
    snip_desc desc;
    memset(&b, 0, sizeof b);
    memset(&desc, 0, sizeof desc);
    b.asked = asked;
    b.how = how;
    b.lr = asked->options.lr * how->rate;
    b.from = *from;
    b.begun = tr_now();
    norms_recipes(&desc, how->recipes);
    desc.seed = (uint64_t)asked->options.seed;
    desc.every = -1;
    b.training = run_begin(&asked->options, &asked->data, &desc);
    desc.every = 1;
    b.measuring = run_begin(&asked->options, &asked->data, &desc);
    norms_watch(b.measuring.model);
    b.fresh = tr_alloc(snip_state_size(b.training.session));
    check(snip_state_save(b.training.session, b.fresh), b.training.session, "state");
    const size_t n = (size_t)snip_layers(b.training.session);
    b.costs = (layer_costs *)tr_alloc(n * sizeof *b.costs);
    b.order = (int *)tr_alloc(n * sizeof *b.order);
    if (b.from.params) return b;
    const size_t floats = (size_t)b.training.model->n_params;
    b.from.params = (float *)tr_alloc(3 * floats * sizeof(float));
    b.from.m = b.from.params + floats;
    b.from.v = b.from.m + floats;
    return b;
}

static void end_setting(bench *b) {
    run_close(&b->training);
    run_close(&b->measuring);
    free(b->costs);
    free(b->order);
    free(b->fresh);
}

// Trains all makers' plans; returns the rows printed.
static int compare_makers(const bench *b, const outcome *twin, row *rows) {
    static gaps all[MAKERS];
    const char *makers = b->asked->makers;
    const gaps *against = listed(makers, maker_name[MAKER_GEMM]) ? &all[MAKER_GEMM] : NULL;
    int n = 0;
    if (listed(makers, maker_name[MAKER_ORACLE])) oracle_order(b, b->order);
    for (int budget = 0; budget < b->asked->n_budgets; budget++)
        for (int turn = 0; turn < MAKERS; turn++) {
            int who = (turn + MAKER_GEMM) % MAKERS;  // adjoint-gemm first: the others are held against it
            if (!listed(makers, maker_name[who]) || (budget && is_uniform(who))) continue;  // uniform: once
            train_maker(b, who, b->asked->budgets[budget], twin, &all[who]);
            if (!b->asked->options.quiet) fprintf(stderr, "\r%60s\r", "");
            rows[n++] = print_maker(b, who, b->asked->budgets[budget], &all[who], against);
        }
    return n;
}

// trained: the setting that `from` has been trained under, or NULL. Returns the rows printed.
static int run_setting(const request *asked, const setting *how, checkpoint *from, const setting **trained, row *rows) {
    bench b = begin_setting(asked, how, from);
    outcome twin[MAX_SEEDS];
    const int layers = snip_layers(b.training.session);
    layer_costs *aged = (layer_costs *)tr_alloc((size_t)((asked->n_ages + 1) * layers) * sizeof *aged);
    int n = 0;
    *from = b.from;
    if (!*trained || (*trained)->rate != how->rate || (*trained)->outliers != how->outliers || asked->n_ages) {
        train_warm(&b, aged);
        *trained = how;
    }
    measure(&b, &b.from, b.lr, asked->warm + 1, b.costs);
    for (int seed = 0; seed < asked->seeds; seed++) {
        begin_run(&b);
        twin[seed] = train_on(&b, MAKER_BF16, 0, seed);
    }
    if (!asked->options.quiet)
        fprintf(stderr, "\r%s: bf16 %.4f after %lld steps, %.0f s\n", how->name, twin[0].own,
                (long long)(asked->warm + asked->options.steps), tr_now() - b.begun);
    begin_run(&b);
    if (asked->plans) compare_objectives(&b, twin);
    for (int i = 0; i < asked->n_ages; i++) compare_age(&b, twin, aged + i * layers, asked->ages[i]);
    if (!asked->plans && !asked->n_ages) n = compare_makers(&b, twin, rows);
    free(aged);
    end_setting(&b);
    return n;
}

// >>picture ----------------------------------------------------------------------------------------
// gap_own against the share of FP4 and against the time of a step, a row of two panels a setting.
enum {
    WIDE = 380,  // of a panel
    TALL = 260,
    LEFT = 90,  // of the first panel
    TOP = 64,
    GAP_X = 70,  // between panels
    GAP_Y = 96,
    LEGEND = 150
};

static const char *const colour[MAKERS] = { "#000000", "#9a9a9a", "#e0a100", "#c2410c", "#0f766e",
                                            "#1d4ed8", "#b8b8b8", "#d9a441", "#a0722a", "#7fb069",
                                            "#3f7d4e", "#8e6bbf", "#d1495b", "#5aa9e6", "#1d4ed8" };

typedef struct {
    int by_time;  // or by share
    double left, top;
    double x0, x1, low, high;  // what lies at the edges
} panel;

static double panel_x(const panel *p, double v) { return p->left + (v - p->x0) / (p->x1 - p->x0) * WIDE; }

static double panel_y(const panel *p, double v) { return p->top + (p->high - v) / (p->high - p->low) * TALL; }

static double nice(double range) {
    double power = pow(10, floor(log10(range / 6))), m = range / 6 / power;
    return power * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}

static void draw_axes(FILE *f, const panel *p, const char *name) {
    fprintf(f,
            "<text x=\"%g\" y=\"%g\" font-weight=\"600\">%s</text>\n"
            "<text x=\"%g\" y=\"%g\" text-anchor=\"middle\">%s</text>\n",
            p->left, p->top - 10, p->by_time ? "" : name, p->left + WIDE / 2.0, p->top + TALL + 42,
            p->by_time ? "processor time of a step, bfloat16 = 1" : "share of the linear layers' FLOPs in FP4");
    double step = nice(p->x1 - p->x0);
    for (double v = ceil(p->x0 / step) * step; v <= p->x1; v += step)
        fprintf(f,
                "<path d=\"M%.1f %gv5\" stroke=\"#888\"/>"
                "<text x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%g</text>\n",
                panel_x(p, v), p->top + TALL, panel_x(p, v), p->top + TALL + 20, fabs(v) < step / 2 ? 0 : v);
    step = nice(p->high - p->low);
    for (double v = ceil(p->low / step) * step; v <= p->high; v += step) {
        double shown = fabs(v) < step / 2 ? 0 : v;
        fprintf(f,
                "<path d=\"M%g %.1fh%d\" stroke=\"%s\"/>"
                "<text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                p->left, panel_y(p, v), WIDE, shown == 0 ? "#888" : "#e4e4e4", p->left - 8, panel_y(p, v) + 4, shown);
    }
    fprintf(f, "<path d=\"M%g %gv%dh%d\" fill=\"none\" stroke=\"#888\"/>\n", p->left, p->top, TALL, WIDE);
}

static void draw_maker(FILE *f, const panel *p, const row *rows, int n, int who) {
    const int strong = who >= MAKER_ADJOINT, hollow = is_uniform(who);
    // Makers under one budget stand beside each other.
    const double dodge = p->by_time || hollow ? 0 : 0.011 * (who - (MAKER_FP4 + MAKERS) / 2) * WIDE;
    double last_x = 0, last_y = 0;
    int points = 0;
    for (int i = 0; i < n; i++) {
        const row *r = &rows[i];
        if (r->maker != who) continue;
        double x = panel_x(p, p->by_time ? r->seconds : r->share) + dodge, y = panel_y(p, r->own);
        double up = panel_y(p, fmin(p->high, r->own + r->half_width));
        double down = panel_y(p, fmax(p->low, r->own - r->half_width));
        if (points++ && !hollow && !p->by_time)
            fprintf(f, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"%s\" stroke-width=\"%g\"/>\n", last_x, last_y, x, y,
                    colour[who], strong ? 2.2 : 1.2);
        fprintf(f,
                "<path d=\"M%.1f %.1fV%.1f\" stroke=\"%s\" opacity=\".6\"/>"
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\" stroke=\"%s\" stroke-width=\"1.6\">"
                "<title>%s, budget %g: %.4f ± %.4f</title></circle>\n",
                x, up, down, colour[who], x, y, strong ? 4.5 : 3.5, hollow ? "#fff" : colour[who], colour[who],
                maker_name[who], r->budget, r->own, r->half_width);
        last_x = x;
        last_y = y;
    }
}

// The two panels of a setting's n rows.
static void draw_setting(FILE *f, const row *rows, int n, int top) {
    double low = 0, high = 1e-6, fastest = 1e30, slowest = -1e30;
    for (int i = 0; i < n; i++) {
        low = fmin(low, rows[i].own);
        high = fmax(high, rows[i].own);
        fastest = fmin(fastest, rows[i].seconds);
        slowest = fmax(slowest, rows[i].seconds);
    }
    low -= 0.12 * (high - low);
    high += 0.12 * (high - low);
    for (int by_time = 0; by_time < 2; by_time++) {
        double first = by_time ? fastest : 0, last = by_time ? slowest : 1, margin = 0.06 * (last - first) + 1e-3;
        const panel p = { by_time, LEFT + by_time * (WIDE + GAP_X), top, first - margin, last + margin, low, high };
        draw_axes(f, &p, rows[0].setting);
        for (int who = MAKER_F32; who < MAKERS; who++) draw_maker(f, &p, rows, n, who);
    }
}

static void draw_legend(FILE *f, const row *rows, int n, int x) {
    for (int who = MAKER_F32, y = TOP; who < MAKERS; who++) {
        int shown = 0;
        for (int i = 0; i < n; i++) shown |= rows[i].maker == who;
        if (!shown) continue;
        fprintf(f,
                "<circle cx=\"%d\" cy=\"%d\" r=\"4.5\" fill=\"%s\" stroke=\"%s\" stroke-width=\"1.6\"/>"
                "<text x=\"%d\" y=\"%d\">%s</text>\n",
                x, y, is_uniform(who) ? "#fff" : colour[who], colour[who], x + 14, y + 5, maker_name[who]);
        y += 22;
    }
}

static void draw(const char *path, const row *rows, int n) {
    int settings = 0;
    for (int i = 0; i < n; i++) settings += i == 0 || rows[i].setting != rows[i - 1].setting;
    int width = LEFT + 2 * WIDE + GAP_X + 24 + LEGEND, height = TOP + settings * (TALL + GAP_Y) - 20;
    if (height < TOP + 22 * MAKERS) height = TOP + 22 * MAKERS;
    FILE *f = tr_begin(path);
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
            "font-family=\"system-ui,sans-serif\" font-size=\"13\" fill=\"#333\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n"
            "<text x=\"%d\" y=\"30\" font-size=\"17\" font-weight=\"600\">"
            "Validation loss beyond bfloat16's under each plan, 95%% intervals</text>\n",
            width, height, width, height, width, height, LEFT);
    for (int at = 0, top = TOP, end; at < n; at = end, top += TALL + GAP_Y) {
        for (end = at; end < n && rows[end].setting == rows[at].setting;) end++;
        draw_setting(f, rows + at, end - at, top);
    }
    draw_legend(f, rows, n, width - LEGEND);
    fputs("</svg>\n", f);
    tr_commit(f, path, 0);
}

// >>main -------------------------------------------------------------------------------------------
static void help(void) {
    printf("Plans of several makers trained beside each other and a bfloat16 twin. About 6 minutes on one core by\n"
           "default; each further setting as long, each further budget 4, in proportion to --steps and --seeds. Of\n"
           "the trainer's options those of the model and the data count; --steps is 80, --dim and --seq 64, --lr\n"
           "0.002 here.\n"
           "  --seeds N          runs of each plan, on other batches; the interval needs 2, and is 0 with 1 (3)\n"
           "  --budgets LIST     shares of the FLOPs in FP4 (0.75)\n"
           "  --makers LIST      (all)");
    for (int i = 0; i < MAKERS; i++) printf(" %s", maker_name[i]);
    printf("\n  --settings LIST    (default)");
    for (int i = 0; i < SETTINGS; i++) printf(" %s", all_settings[i].name);
    printf("\n  --warm N           bfloat16 steps before (1000; from scratch 50)\n"
           "  --from-scratch     plans from step --warm on, made anew every --every steps (100)\n"
           "  --plans N          instead: N random plans; do the costs order them?\n"
           "  --ages LIST        instead: how good are costs measured so many steps before?\n"
           "  --svg FILE         draw gap against share and time\n");
}

static void read_request(request *r, int argc, char **argv) {
    static const char *const defaults[] = { "--steps=80", "--batch=8", "--seq=64", "--dim=64",
                                            "--lr=2e-3",  "--every=0", NULL };
    const char *seeds = "3", *budgets = "0.75", *warm = NULL, *plans = NULL, *ages = NULL;
    int scratch = 0;
    const run_option own[] = {
        {"--seeds",         &seeds,       NULL    },
        { "--budgets",      &budgets,     NULL    },
        { "--settings",     &r->settings, NULL    },
        { "--makers",       &r->makers,   NULL    },
        { "--warm",         &warm,        NULL    },
        { "--svg",          &r->svg,      NULL    },
        { "--plans",        &plans,       NULL    },
        { "--ages",         &ages,        NULL    },
        { "--from-scratch", NULL,         &scratch}
    };
    r->settings = "default";
    run_parse(&r->options, argc, argv, defaults, own, sizeof own / sizeof own[0], help);
    check_names(r->settings, &all_settings[0].name, sizeof *all_settings, SETTINGS, "--settings");
    check_names(r->makers, maker_name, sizeof *maker_name, MAKERS, "--makers");
    if (scratch && !r->options.every) r->options.every = 100;
    r->warm = warm ? run_whole(warm, 1, 1000000000, "--warm") : scratch ? 50 : 1000;
    r->seeds = run_whole(seeds, 1, MAX_SEEDS, "--seeds");
    if (plans) r->plans = run_whole(plans, 2, 100000, "--plans");
    r->n_budgets = numbers(budgets, r->budgets, MAX_BUDGETS, 0, 1, "--budgets");
    qsort(r->budgets, (size_t)r->n_budgets, sizeof *r->budgets, stats_by_value);
    if (ages) r->n_ages = numbers(ages, r->ages, MAX_AGES, 0, (double)r->warm - 1, "--ages");
    if (r->svg && (r->plans || r->n_ages)) tr_die("--svg draws neither --plans nor --ages");
    if (r->options.blocks * LLAMA_LINEARS > NORMS_LAYERS) tr_die("at most %d blocks", NORMS_LAYERS / LLAMA_LINEARS);
    tr_load_data(&r->data, &r->options);
    tr_config(&r->options, r->data.vocab);
    if (r->svg) tr_try(r->svg);
}

int main(int argc, char **argv) {
    static request asked;
    static row rows[SETTINGS * MAKERS * MAX_BUDGETS];
    checkpoint from = { NULL, NULL, NULL };
    const setting *trained = NULL;
    int n = 0;
    tr_program = "quality";
    read_request(&asked, argc, argv);
    for (const setting *how = all_settings; how < all_settings + SETTINGS; how++)
        if (listed(asked.settings, how->name)) n += run_setting(&asked, how, &from, &trained, rows + n);
    if (asked.svg) draw(asked.svg, rows, n);
    free(from.params);
    run_end();
    return 0;
}
