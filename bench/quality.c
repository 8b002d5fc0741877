// quality - plans of several makers, trained beside each other.
//
// Trains a small Llama in bfloat16 for --warm steps. From that checkpoint every plan trains --steps steps more on the same
// batches as a bfloat16 twin, once per seed (batches, rounding and random plans differ); no plan is changed on the way.
// Prints, tab-separated: quality, setting, budget, maker, gap_own, gap_high, half_width_95, fp4_share. The gap is that of
// the validation loss to the twin's in nats a token, under the plan's precision (own) and with the trained weights in
// bfloat16 (high), mean over the seeds; half_width_95 is that of gap_own by Student's t over the paired differences.
//
// Makers, one precision a layer: random; min-abs-err, min-rel-err: least squared operand error; ends: first and last block
// last of all; snip: the paper's norms (norms.h); adjoint: this library's costs. adjoint-gemm: those, one precision a GEMM.
// Settings: default; rne: gradients rounded to nearest; tensor: one scale a tensor, to nearest; hot: learning rate x 4.
//
//   cc -O2 -fopenmp bench/quality.c -o quality -lm
//   ./quality --data FILE [--steps N] [--seeds N] [--budgets LIST] [--settings LIST] [--makers LIST] [--warm N] [trainer's options]
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#  define _POSIX_C_SOURCE 200809L
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "norms.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"

enum { MEASUREMENTS = 3, EVAL_BATCHES = 16, MAX_SEEDS = 64 };
static const double BETA1 = 0.9, BETA2 = 0.95, EPS = 1e-8, DECAY = 0.1;

typedef enum { MAKER_FP8, MAKER_FP4, MAKER_RANDOM, MAKER_ABS, MAKER_REL, MAKER_ENDS, MAKER_SNIP, MAKER_ADJOINT, MAKER_GEMM, MAKERS } maker;
static const char *const maker_name[MAKERS] = { "fp8", "fp4", "random", "min-abs-err", "min-rel-err", "ends", "snip", "adjoint", "adjoint-gemm" };
enum { SETTINGS = 4 };
static const char *const setting_name[SETTINGS] = { "default", "rne", "tensor", "hot" };

typedef struct { double cost[MAKERS][SNIP_GEMMS]; } layer_costs;        // of FP4 beyond FP8

static void check(snip_status status, const snip *s, const char *where) {
    if (status) tr_stop("%s: %s", where, snip_message(s)[0] ? snip_message(s) : snip_status_text(status));
}
static int listed(const char *list, const char *name) {
    size_t n = strlen(name);
    if (!list) return 1;
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, name, n) && (at[n] == ',' || !at[n])) return 1;
    return 0;
}
// Two-sided 95% quantile of Student's t.
static double student(int freedom) {
    static const double t[] = { 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228 };
    return freedom < 1 ? 0 : freedom <= 10 ? t[freedom] : 1.96 + 2.5 / freedom;
}

typedef struct { llama *g; snip *s; int32_t *tokens, *targets; const tr_data *d; const tr_options *o; } run;

static double pass(const run *r, int backward) {
    double sum = 0, n = (double)r->o->batch * r->g->config.seq;
    if (backward) llama_zero_grad(r->g);
    check(llama_forward(r->g, r->s, r->tokens, r->targets, (int)r->o->batch, backward ? (float)(1 / n) : 0.0f, &sum), r->s, "forward");
    if (backward) check(llama_backward(r->g, r->s, r->tokens, (int)r->o->batch), r->s, "backward");
    return sum / n;
}
static void train_step(const run *r, uint64_t batches, int64_t step, double lr, int64_t optimizer_step) {
    double loss, norm;
    for (int64_t j = 0; j < r->o->batch; j++)
        tr_train_sequence(r->d, batches, step, j, r->o->seq, r->tokens + j * r->o->seq, r->targets + j * r->o->seq);
    do loss = pass(r, 1); while (snip_next_pass(r->s, loss));
    norm = llama_grad_norm(r->g);
    snip_adamw update = { lr, BETA1, BETA2, EPS, optimizer_step, norm > 1 ? 1 / norm : 1 };
    llama_adamw(r->g, lr, BETA1, BETA2, EPS, DECAY, optimizer_step, update.grad_scale);
    check(snip_end_step(r->s, &update), r->s, "training");
}
static double validate(const run *r, snip_mode mode) {
    double sum = 0;
    int64_t count = EVAL_BATCHES * r->o->batch, room = r->d->n - r->d->n_train - r->o->seq - 1;
    snip_set_mode(r->s, mode);
    for (int b = 0; b < EVAL_BATCHES; b++) {
        for (int64_t j = 0; j < r->o->batch; j++)
            tr_sequence(r->d, r->d->n_train + room * (b * r->o->batch + j) / count, r->o->seq, r->tokens + j * r->o->seq, r->targets + j * r->o->seq);
        sum += pass(r, 0) / EVAL_BATCHES;
    }
    snip_set_mode(r->s, SNIP_TRAIN);
    return sum;
}

static snip_desc describe(int setting, uint64_t seed) {
    static const snip_recipe fp8[3] = { SNIP_RECIPE_FP8_TILE, SNIP_RECIPE_FP8_BLOCK, SNIP_RECIPE_FP8_TILE };
    static const snip_recipe fp4[3] = { SNIP_RECIPE_FP4_TILE, SNIP_RECIPE_FP4_BLOCK, SNIP_RECIPE_FP4_TILE_SR };
    snip_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.every = -1;
    desc.seed = seed;
    desc.fp8.activation = fp8[0]; desc.fp8.weight = fp8[1]; desc.fp8.gradient = fp8[2];
    desc.fp4.activation = fp4[0]; desc.fp4.weight = fp4[1]; desc.fp4.gradient = fp4[2];
    if (setting == 1 || setting == 2) desc.fp4.gradient.rounding = SNIP_ROUND_NEAREST_EVEN;
    if (setting == 2) {
        snip_recipe *all[6] = { &desc.fp8.activation, &desc.fp8.weight, &desc.fp8.gradient, &desc.fp4.activation, &desc.fp4.weight, &desc.fp4.gradient };
        for (int i = 0; i < 6; i++) all[i]->tile_rows = all[i]->tile_cols = 0;
    }
    return desc;
}

// Costs of every maker, from the mean of a few measuring steps at the checkpoint. r's state is left as it was found, its session is not.
static void measure(const run *r, double lr, int64_t step, layer_costs *costs) {
    llama *g = r->g;
    size_t bytes = (size_t)g->n_params * sizeof(float);
    float *kept = (float *)tr_alloc(3 * bytes);
    int n = snip_layers(r->s), last_block = 0;
    memcpy(kept, g->params, bytes); memcpy(kept + g->n_params, g->m, bytes); memcpy(kept + 2 * g->n_params, g->v, bytes);
    memset(costs, 0, (size_t)n * sizeof *costs);
    for (int i = 0; i <= MEASUREMENTS; i++) {           // a session's first step is an ordinary one
        double loss_sum = 0, weight_sum = 0;
        train_step(r, (uint64_t)r->o->seed + 500, i + 1, lr, step);
        memcpy(g->params, kept, bytes); memcpy(g->m, kept + g->n_params, bytes); memcpy(g->v, kept + 2 * g->n_params, bytes);
        if (i == 0) continue;
        for (int l = 0; l < n; l++) {
            const norms_layer *q = &norms[l];
            loss_sum += norms_loss(q, 1);
            for (int k = 0; k < SNIP_GEMMS; k++) weight_sum += norms_weight(q, 1, k);
        }
        double scale = loss_sum / weight_sum;           // the paper's two terms weigh the same
        for (int l = 0; l < n; l++) {
            const norms_layer *q = &norms[l];
            for (int k = 0; k < SNIP_GEMMS; k++) {
                costs[l].cost[MAKER_ABS][k] += norms_operands(q, 1, k, 0) - norms_operands(q, 0, k, 0);
                costs[l].cost[MAKER_REL][k] += norms_operands(q, 1, k, 1) - norms_operands(q, 0, k, 1);
                costs[l].cost[MAKER_SNIP][k] += scale * (norms_weight(q, 1, k) - norms_weight(q, 0, k)) + (k == SNIP_FWD ? norms_loss(q, 1) - norms_loss(q, 0) : 0);
            }
        }
    }
    for (int l = 0; l < n; l++) {
        snip_layer_info info;
        snip_layer(r->s, l, &info);
        for (int k = 0; k < SNIP_GEMMS; k++) costs[l].cost[MAKER_ADJOINT][k] = costs[l].cost[MAKER_GEMM][k] = info.fp4.cost[k] - info.fp8.cost[k];
        if (atoi(info.name) > last_block) last_block = atoi(info.name);
    }
    for (int l = 0; l < n; l++) {
        snip_layer_info info;
        snip_layer(r->s, l, &info);
        int end = atoi(info.name) == 0 || atoi(info.name) == last_block;
        for (int k = 0; k < SNIP_GEMMS; k++) costs[l].cost[MAKER_ENDS][k] = (double)(info.out_features * info.in_features) * (end ? 100 : 1);
    }
    free(kept);
}

// Puts the cheapest plan that meets the budget into the session.
static void make_plan(snip *s, const layer_costs *costs, maker who, double budget, uint64_t seed) {
    int n = snip_layers(s);
    snip_ilp_option *options = (snip_ilp_option *)tr_alloc((size_t)n * 8 * sizeof *options);
    snip_ilp_group *groups = (snip_ilp_group *)tr_alloc((size_t)n * sizeof *groups);
    int *choice = (int *)tr_alloc((size_t)n * sizeof *choice);
    double target = 0;
    if (who == MAKER_FP8 || who == MAKER_FP4) {
        check(snip_set_format(s, -1, SNIP_GEMMS, who == MAKER_FP8 ? SNIP_E4M3 : SNIP_E2M1), s, "plan");
        free(options); free(groups); free(choice);
        return;
    }
    for (int l = 0; l < n; l++) {
        snip_layer_info info;
        snip_layer(s, l, &info);
        double size = (double)(info.out_features * info.in_features), least = 0;
        snip_ilp_option *list = options + 8 * l;
        uint32_t random[4];
        snip_rng_key key = { seed, 0, 0x706C616Eu };
        snip_philox(key, (uint64_t)l, random);
        groups[l].options = list;
        groups[l].n_options = who == MAKER_GEMM ? 8 : 2;
        for (int i = 0; i < groups[l].n_options; i++) {
            unsigned fp4 = who == MAKER_GEMM ? (unsigned)i : i ? 7u : 0u;
            for (int k = 0; k < SNIP_GEMMS; k++) {
                if (!(fp4 >> k & 1u)) continue;
                list[i].cost += who == MAKER_RANDOM ? size * random[0] / 4294967296.0 : costs[l].cost[who][k];
                list[i].gain += size;
            }
            if (list[i].cost < least) least = list[i].cost;
        }
        for (int i = 0; i < groups[l].n_options; i++) list[i].cost -= least;
        target += 3 * size * budget;
    }
    snip_ilp_problem problem;
    memset(&problem, 0, sizeof problem);
    problem.n_groups = n;
    problem.groups = groups;
    problem.n_stages = 1;
    problem.total_target = target;
    if (snip_ilp_solve(&problem, NULL, choice, NULL) > SNIP_ILP_FEASIBLE) tr_stop("no plan of %s meets budget %g", maker_name[who], budget);
    for (int l = 0; l < n; l++)
        for (int k = 0; k < SNIP_GEMMS; k++) {
            int fp4 = who == MAKER_GEMM ? choice[l] >> k & 1 : choice[l];
            check(snip_set_format(s, l, (snip_gemm_kind)k, fp4 ? SNIP_E2M1 : SNIP_E4M3), s, "plan");
        }
    free(options); free(groups); free(choice);
}

typedef struct { double own, high, share; } outcome;
typedef struct { float *params, *m, *v; } checkpoint;

static void restore(const run *r, const checkpoint *from, const void *fresh) {
    size_t bytes = (size_t)r->g->n_params * sizeof(float);
    memcpy(r->g->params, from->params, bytes);
    memcpy(r->g->m, from->m, bytes);
    memcpy(r->g->v, from->v, bytes);
    check(snip_state_load(r->s, fresh, snip_state_size(r->s)), r->s, "state");
}
// The rest of the training under the session's plan.
static outcome train_on(const run *r, int64_t warm, int seed, double lr) {
    outcome out;
    out.share = snip_share(r->s, SNIP_E2M1);
    for (int64_t i = 1; i <= r->o->steps; i++) train_step(r, (uint64_t)r->o->seed + 1000 + (uint64_t)seed, i, lr, warm + i);
    out.own = validate(r, SNIP_EVAL);
    out.high = validate(r, SNIP_EVAL_HIGH);
    return out;
}

int main(int argc, char **argv) {
    static tr_options o;
    static tr_data d;
    char *args[64];
    const char *budgets = "0.75", *settings = "default,tensor", *makers = NULL;
    int n_args = 0, seeds = 3, trained_hot = -1;
    int64_t warm = 300;
    static char steps_default[] = "--steps=60", batch_default[] = "--batch=4", lr_default[] = "--lr=1e-3";
    tr_program = "quality";
    args[n_args++] = argv[0];
    args[n_args++] = steps_default; args[n_args++] = batch_default; args[n_args++] = lr_default;
    for (int i = 1; i < argc; i++) {                    // ours; the rest are the trainer's
        static const char *const own[5] = { "--seeds", "--budgets", "--settings", "--makers", "--warm" };
        const char *eq = strchr(argv[i], '='), *value;
        size_t length = eq ? (size_t)(eq - argv[i]) : strlen(argv[i]);
        int k = 0;
        while (k < 5 && (strlen(own[k]) != length || strncmp(own[k], argv[i], length))) k++;
        if (k == 5) {
            if (n_args > 60) tr_die("too many options");
            args[n_args++] = argv[i];
            continue;
        }
        if (!eq && i + 1 == argc) tr_die("%s needs a value", own[k]);
        value = eq ? eq + 1 : argv[++i];
        if (k == 0) seeds = atoi(value);
        if (k == 1) budgets = value;
        if (k == 2) settings = value;
        if (k == 3) makers = value;
        if (k == 4) warm = atoi(value);
    }
    tr_parse(&o, n_args, args);
    if (seeds < 1 || seeds > MAX_SEEDS) tr_die("--seeds must be between 1 and %d", MAX_SEEDS);
    if (warm < 1) tr_die("--warm must be at least 1");
#ifdef _OPENMP
    if (o.threads) omp_set_num_threads((int)o.threads);
#endif
    tr_load_data(&d, &o);
    llama_config config = { d.vocab, (int)o.dim, (int)o.blocks, (int)o.heads, (int)o.kv_heads, (int)o.ffn, (int)o.seq, (int)o.tied, 0, (uint64_t)o.seed };
    if (llama_config_check(&config)) tr_die("%s", llama_config_check(&config));
    if (o.blocks * 7 > NORMS_LAYERS) tr_die("at most %d blocks", NORMS_LAYERS / 7);
    int32_t *tokens = (int32_t *)tr_alloc((size_t)(o.batch * o.seq) * sizeof *tokens), *targets = (int32_t *)tr_alloc((size_t)(o.batch * o.seq) * sizeof *targets);
    checkpoint from = { NULL, NULL, NULL };
    for (int setting = 0; setting < SETTINGS; setting++) {
        if (!listed(settings, setting_name[setting])) continue;
        int hot = setting == 3;
        double lr = o.lr * (hot ? 4 : 1), start = tr_now();
        snip_desc desc = describe(setting, (uint64_t)o.seed), measuring = desc;
        measuring.every = 1;
        run r = { NULL, snip_create(&desc), tokens, targets, &d, &o }, m = { NULL, snip_create(&measuring), tokens, targets, &d, &o };
        if (!r.s || !m.s || !(r.g = llama_create(&config, (int)o.batch, r.s)) || !(m.g = llama_create(&config, (int)o.batch, m.s))) tr_stop("out of memory");
        size_t floats = (size_t)r.g->n_params, bytes = floats * sizeof(float);
        int n = snip_layers(r.s);
        void *fresh = tr_alloc(snip_state_size(r.s));
        check(snip_state_save(r.s, fresh), r.s, "state");
        if (!from.params) { from.params = (float *)tr_alloc(3 * bytes); from.m = from.params + floats; from.v = from.m + floats; }
        if (trained_hot != hot) {
            for (int64_t step = 1; step <= warm; step++) train_step(&r, (uint64_t)o.seed, step, lr * (step < 50 ? (double)step / 50 : 1), step);
            memcpy(from.params, r.g->params, bytes); memcpy(from.m, r.g->m, bytes); memcpy(from.v, r.g->v, bytes);
            trained_hot = hot;
        }
        memcpy(m.g->params, from.params, bytes); memcpy(m.g->m, from.m, bytes); memcpy(m.g->v, from.v, bytes);
        layer_costs *costs = (layer_costs *)tr_alloc((size_t)n * sizeof *costs);
        measure(&m, lr, warm + 1, costs);
        outcome twin[MAX_SEEDS];
        for (int seed = 0; seed < seeds; seed++) {
            restore(&r, &from, fresh);
            twin[seed] = train_on(&r, warm, seed, lr);
        }
        fprintf(stderr, "%s: bf16 %.4f after %lld steps, %.0f s\n", setting_name[setting], twin[0].own, (long long)(warm + o.steps), tr_now() - start);
        for (const char *at = budgets; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
            double budget = atof(at);
            if (!(budget >= 0 && budget <= 1)) tr_die("a budget must be between 0 and 1");
            for (int who = 0; who < MAKERS; who++) {
                double own = 0, high = 0, spread = 0, share = 0, gap[MAX_SEEDS];
                if (!listed(makers, maker_name[who]) || (at != budgets && who <= MAKER_FP4)) continue;     // uniform: once
                for (int seed = 0; seed < seeds; seed++) {
                    restore(&r, &from, fresh);
                    make_plan(r.s, costs, (maker)who, budget, (uint64_t)(o.seed * 1000 + seed));
                    outcome out = train_on(&r, warm, seed, lr);
                    gap[seed] = out.own - twin[seed].own;
                    own += gap[seed] / seeds;
                    high += (out.high - twin[seed].high) / seeds;
                    share += out.share / seeds;
                }
                for (int seed = 0; seed < seeds; seed++) spread += (gap[seed] - own) * (gap[seed] - own);
                printf("quality\t%s\t%g\t%s\t%.5f\t%.5f\t%.5f\t%.3f\n", setting_name[setting], who == MAKER_FP8 ? 0 : who == MAKER_FP4 ? 1 : budget, maker_name[who], own, high,
                       seeds > 1 ? student(seeds - 1) * sqrt(spread / (seeds - 1) / seeds) : 0, share);
                fflush(stdout);
            }
        }
        llama_destroy(r.g); llama_destroy(m.g);
        snip_destroy(r.s); snip_destroy(m.s);
        free(costs); free(fresh);
    }
    free(from.params); free(tokens); free(targets);
    return 0;
}
