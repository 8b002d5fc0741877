// fidelity - snip's estimates beside the truth.
//
// Trains a small Llama in bfloat16, stops, and on fresh batches, --apart steps of training apart, compares what one
// measuring step says of every linear layer with what quantizing that layer really does, from the same weights, batch
// and optimizer state:
//   loss     L' - L when the layer's forward GEMM alone runs in the format
//   weight   sum_j |u'_j - u_j|^2 / |W_j|^2 over all layers j, relative to sum_j |u_j|^2 / |W_j|^2, when one or all
//            three of the layer's GEMMs run in the format; u is the AdamW update
// Both are means over the batches. Within some 15 steps most weights round otherwise, and the truth ranks the layers
// otherwise; where all batches meet the same weights (--apart 0), the chance of one rounding stays in the truth.
//
// "adjoint" is the library's estimator, "snip" the paper's kind, from norms alone (norms.h). "additive" is the sum of
// the single layers' truths against the truth of whole random plans. The options are the trainer's and those below;
// recipes are norms.h's.
//
//   cc -O2 -fopenmp bench/fidelity.c -o fidelity -lm
//   ./fidelity --data FILE [--steps N] [--seed N] [--batches N] [--apart N] [--recipe NAME]
// 560 passes of training and 1,200 of measuring: 7 minutes with --batch 4 --steps 500, one core of a busy machine.
//
// Prints, tab-separated: fidelity, loss|weight, estimator, format, fwd|dgrad|wgrad|all, Spearman, Kendall, median of
// estimate / truth, standard deviation of its log10 (both over the layers where estimate and truth are positive).
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

enum {
    MAX_BATCHES = 16,
    FORMATS = 2,
    TRUTHS = SNIP_GEMMS + 1,  // of each GEMM, and of all three
    ALL = SNIP_GEMMS,
    PLANS = 50,
    BATCH_SEED = 77  // added to --seed: batches that training does not see
};

enum { ADJOINT, SNIP, ESTIMATORS };

static const snip_format formats[FORMATS] = { SNIP_E4M3, SNIP_E2M1 };
static const char *const estimator_name[ESTIMATORS] = { "adjoint", "snip" };
static const char *const gemm_name[TRUTHS] = { "fwd", "dgrad", "wgrad", "all" };

typedef struct {
    double truth, estimate[ESTIMATORS];  // means over the batches
    double batch[MAX_BATCHES];           // the truth of each
} pair;

typedef struct {
    tr_options options;
    tr_data data;
    int batches, apart;
    tr_training training;   // also makes the truth
    tr_training measuring;  // from the same weights and moments
    int layers;
    float *clean;     // [n_params] gradients without any rounding
    int64_t step;     // steps trained
    double loss;      // of the last pass
    pair *of_loss;    // [FORMATS][layers]
    pair *of_weight;  // [FORMATS][TRUTHS][layers]
    pair plan_loss[PLANS], plan_weight[PLANS];
    double begun, training_seconds, measuring_seconds;
} bench;

static pair *loss_pairs(const bench *b, int format) { return b->of_loss + format * b->layers; }

static pair *weight_pairs(const bench *b, int format, int truth) {
    return b->of_weight + (format * TRUTHS + truth) * b->layers;
}

// >>figures ----------------------------------------------------------------------------------------
static void report(const char *what, const char *estimator, const char *format, const char *gemm, const pair *p, int n,
                   int column) {
    double *x = (double *)tr_alloc((size_t)n * 3 * sizeof *x), *y = x + n, *ratio = y + n, mean = 0, spread = 0;
    int positive = 0;
    for (int i = 0; i < n; i++) {
        x[i] = p[i].estimate[column];
        y[i] = p[i].truth;
        if (x[i] > 0 && y[i] > 0) ratio[positive++] = x[i] / y[i];
    }
    double median = positive ? stats_median(ratio, positive) : 0;
    for (int i = 0; i < positive; i++) mean += log10(ratio[i]) / positive;
    for (int i = 0; i < positive; i++) spread += (log10(ratio[i]) - mean) * (log10(ratio[i]) - mean) / positive;
    printf("fidelity\t%s\t%s\t%s\t%s\t%.3f\t%.3f\t%.3f\t%.3f\n", what, estimator, format, gemm, stats_spearman(x, y, n),
           stats_kendall(x, y, n), median, sqrt(spread));
    free(x);
}

// How far the truth itself repeats: Spearman of one batch's truth to the other batches', mean over the batches.
static double repeats(const pair *p, int n, int batches) {
    double *x = (double *)tr_alloc((size_t)n * 2 * sizeof *x), *y = x + n, mean = 0;
    for (int b = 0; b < batches; b++) {
        for (int i = 0; i < n; i++) {
            x[i] = p[i].batch[b];
            y[i] = p[i].truth * batches - x[i];
        }
        mean += stats_spearman(x, y, n) / batches;
    }
    free(x);
    return mean;
}

static void print_layers(const bench *b) {
    for (int l = 0; l < b->layers; l++) {
        snip_layer_info info;
        snip_layer(b->measuring.session, l, &info);
        printf("%-12s", info.name);
        for (int f = 0; f < FORMATS; f++) {
            const pair *p = &loss_pairs(b, f)[l];
            printf("  %s loss %+.2e est %+.2e  update", snip_format_name(formats[f]), p->truth, p->estimate[ADJOINT]);
            for (int k = 0; k < TRUTHS; k++) {
                p = &weight_pairs(b, f, k)[l];
                printf(" %s %.2e/%.2e", gemm_name[k], p->truth, p->estimate[ADJOINT]);
            }
        }
        printf("\n");
    }
}

static void print_figures(const bench *b) {
    const int n = b->layers, batches = b->batches;
    const double ordinary = b->training_seconds / (double)b->step, measuring = b->measuring_seconds / batches;
    printf("%d layers, %lld steps, loss %.3f; an ordinary bf16 step %.1f ms, a measuring step %.1f ms (%.2f times); "
           "solve %.3f ms\n",
           n, (long long)b->step, b->loss, 1e3 * ordinary, 1e3 * measuring, measuring / ordinary,
           1e3 * snip_solve_seconds(b->measuring.session));
    printf("Spearman of one batch's truth to the other %d batches':", batches - 1);
    for (int f = 0; f < FORMATS; f++) {
        printf(" %s loss %.3f, weight", snip_format_name(formats[f]), repeats(loss_pairs(b, f), n, batches));
        for (int k = 0; k < TRUTHS; k++) printf(" %s %.3f", gemm_name[k], repeats(weight_pairs(b, f, k), n, batches));
        printf(f + 1 < FORMATS ? ";" : "\n");
    }
    for (int i = 0; i < ESTIMATORS; i++)
        for (int f = 0; f < FORMATS; f++) {
            const char *format = snip_format_name(formats[f]);
            report("loss", estimator_name[i], format, "fwd", loss_pairs(b, f), n, i);
            for (int k = 0; k < TRUTHS; k++)
                report("weight", estimator_name[i], format, gemm_name[k], weight_pairs(b, f, k), n, i);
        }
    report("loss", "additive", "mixed", "fwd", b->plan_loss, PLANS, 0);
    report("weight", "additive", "mixed", "all", b->plan_weight, PLANS, 0);
}

// >>truth ------------------------------------------------------------------------------------------
// Relative squared difference of the next update under gradients `a` and `b`, over the linear layers.
static double update_difference(const llama *g, const float *a, const float *b, int64_t step) {
    const tr_optimizer *o = tr_optimizer_named("adamw");
    const double b1 = o->beta1, b2 = o->beta2;
    const double m_scale = 1 / (1 - pow(b1, (double)step)), v_scale = 1 / (1 - pow(b2, (double)step));
    double difference = 0, size = 0;
    for (int t = 0; t < g->n_tensors; t++) {
        const llama_tensor *tensor = &g->tensors[t];
        double d_sq = 0, u_sq = 0, w_sq = 0;
        if (tensor->layer < 0) continue;
        for (int64_t i = tensor->offset; i < tensor->offset + tensor->rows * tensor->cols; i++) {
            double ua = (b1 * g->m[i] + (1 - b1) * a[i]) * m_scale /
                        (sqrt((b2 * g->v[i] + (1 - b2) * a[i] * a[i]) * v_scale) + TR_EPS);
            double ub = (b1 * g->m[i] + (1 - b1) * b[i]) * m_scale /
                        (sqrt((b2 * g->v[i] + (1 - b2) * b[i] * b[i]) * v_scale) + TR_EPS);
            d_sq += (ua - ub) * (ua - ub);
            u_sq += ua * ua;
            w_sq += (double)g->params[i] * g->params[i];
        }
        difference += d_sq / w_sq;
        size += u_sq / w_sq;
    }
    return difference / size;
}

// What layer l really does to loss and update when it alone runs in a format. base: the loss without rounding.
static void take_truths(bench *b, int batch, int l, double base) {
    const tr_training *t = &b->training;
    for (int f = 0; f < FORMATS; f++)
        for (int k = 0; k < TRUTHS; k++) {
            pair *of_weight = &weight_pairs(b, f, k)[l], *of_loss = &loss_pairs(b, f)[l];
            snip_set_format(t->session, l, (snip_gemm_kind)k, formats[f]);
            double changed = run_pass(t) - base;
            snip_set_format(t->session, l, SNIP_GEMMS, SNIP_F32);
            of_weight->batch[batch] = update_difference(t->model, t->model->grads, b->clean, b->step + 1);
            of_weight->truth += of_weight->batch[batch] / b->batches;
            if (k != SNIP_FWD) continue;
            of_loss->batch[batch] = changed;
            of_loss->truth += changed / b->batches;
        }
}

// Random plans of every share of FP4, against the sum of the first batch's single layers.
static void take_plans(bench *b, double base) {
    const tr_training *t = &b->training;
    for (int i = 0; i < PLANS; i++) {
        snip_rng_key key = { (uint64_t)b->options.seed, (uint32_t)i, 0x706C616Eu };  // "plan"
        for (int l = 0; l < b->layers; l++)
            for (int k = 0; k < SNIP_GEMMS; k++) {
                uint32_t random[4];
                snip_philox(key, (uint64_t)(l * SNIP_GEMMS + k), random);
                int f = random[0] / 4294967296.0 < (i + 0.5) / PLANS;
                snip_set_format(t->session, l, (snip_gemm_kind)k, formats[f]);
                b->plan_weight[i].estimate[0] += weight_pairs(b, f, k)[l].truth * b->batches;
                if (k == SNIP_FWD) b->plan_loss[i].estimate[0] += loss_pairs(b, f)[l].truth * b->batches;
            }
        b->plan_loss[i].truth = run_pass(t) - base;
        b->plan_weight[i].truth = update_difference(t->model, t->model->grads, b->clean, b->step + 1);
    }
}

// >>estimates --------------------------------------------------------------------------------------
// A measuring step at the weights and moments of the training one. Returns U^2 of the update.
static double measure(bench *b, int batch) {
    const tr_training *t = &b->measuring;
    const tr_optimizer *o = tr_optimizer_named("adamw");
    const llama *from = b->training.model;
    const size_t bytes = (size_t)from->n_params * sizeof(float);
    memcpy(t->model->params, from->params, bytes);
    memcpy(t->model->m, from->m, bytes);
    memcpy(t->model->v, from->v, bytes);
    snip_adamw update = { b->options.lr, o->beta1, o->beta2, TR_EPS, b->step, 1 };
    if (batch == 0) {  // a session's first step is an ordinary one; the optimizer has made it already
        snip_next_pass(t->session, run_pass(t));
        check(snip_end_step(t->session, &update), t->session, "measuring");
    }

    double start = tr_now();
    do b->loss = run_pass(t);
    while (snip_next_pass(t->session, b->loss));
    update.step = b->step + 1;
    llama_update(t->model, SNIP_ADAMW, &update, 0);
    double update_sq = snip_update_sq(t->session, &update);
    check(snip_end_step(t->session, &update), t->session, "measuring");
    b->measuring_seconds += tr_now() - start;
    return update_sq;
}

static void take_estimates(bench *b, int l, double update_sq) {
    snip_layer_info info;
    snip_layer(b->measuring.session, l, &info);
    for (int f = 0; f < FORMATS; f++) {
        const snip_estimate *e = f == NORMS_FP4 ? &info.fp4 : &info.fp8;
        loss_pairs(b, f)[l].estimate[ADJOINT] += (e->loss_first + e->loss_second) / b->batches;
        loss_pairs(b, f)[l].estimate[SNIP] += norms_loss(&norms[l], f) / b->batches;
        for (int k = 0; k < TRUTHS; k++) {
            pair *p = &weight_pairs(b, f, k)[l];
            for (int i = k < ALL ? k : 0; i <= (k < ALL ? k : ALL - 1); i++) {
                p->estimate[ADJOINT] += e->update[i] / b->batches;
                p->estimate[SNIP] += norms_weight(&norms[l], f, i) / update_sq / b->batches;
            }
        }
    }
}

// >>main -------------------------------------------------------------------------------------------
static void train_until(bench *b, int64_t end) {
    const tr_options *o = &b->options;
    const double start = tr_now();
    check(snip_set_format(b->training.session, -1, SNIP_GEMMS, SNIP_BF16), b->training.session, "training");
    while (b->step < end) {
        int64_t step = ++b->step;
        double lr = o->lr * (step < o->warmup ? (double)step / (double)o->warmup : 1);
        b->loss = run_step(&b->training, (uint64_t)o->seed, step, lr, step);
        if (!o->quiet && step < o->steps && step % 10 == 0)
            fprintf(stderr, "\rstep %lld of %lld  loss %.4f  %.0f s ", (long long)step, (long long)o->steps, b->loss,
                    tr_now() - b->begun);
    }
    b->training_seconds += tr_now() - start;
    check(snip_set_format(b->training.session, -1, SNIP_GEMMS, SNIP_F32), b->training.session, "truth");
}

static void take_batch(bench *b, int batch) {
    const tr_training *t = &b->training;
    const uint64_t seed = (uint64_t)b->options.seed + BATCH_SEED;
    tr_load_batch(t, seed, batch + 1);
    tr_load_batch(&b->measuring, seed, batch + 1);
    double update_sq = measure(b, batch), base = run_pass(t);
    memcpy(b->clean, t->model->grads, (size_t)t->model->n_params * sizeof(float));
    for (int l = 0; l < b->layers; l++) {
        take_estimates(b, l, update_sq);
        take_truths(b, batch, l, base);
        if (!b->options.quiet)
            fprintf(stderr, "\rbatch %d of %d, layer %d of %d  %.0f s        ", batch + 1, b->batches, l + 1, b->layers,
                    tr_now() - b->begun);
    }
    if (batch == 0) take_plans(b, base);
    snip_next_pass(t->session, base);
    check(snip_end_step(t->session, NULL), t->session, "truth");
}

static void help(void) {
    puts("Estimates of rounding's harm beside the truth, layer by layer. 460 steps, then 1200 passes of a batch:\n"
         "7 minutes with --batch 4 --steps 500 on one core, in proportion to --batch, --seq and the model's size.\n"
         "Of the trainer's options those of the model, the data and AdamW's rate count; --steps is 400 and\n"
         "--lr 0.001 here.\n"
         "  --batches N        batches whose means are compared, 2 to 16 (5, as many as the library averages over)\n"
         "  --apart N          training steps between one and the next, up to 1000 (15); 0: all at the same weights\n"
         "  --recipe R         " NORMS_RECIPES ":\n"
         "                     scales and rounding of both formats (default)");
}

static void begin(bench *b, int argc, char **argv) {
    static const char *const defaults[] = { "--steps=400", "--lr=1e-3", NULL };
    const char *batches = "5", *apart = "15", *recipes = "default";
    const run_option own[] = {
        {"--batches", &batches, NULL},
        { "--apart",  &apart,   NULL},
        { "--recipe", &recipes, NULL}
    };
    const tr_options *o = &b->options;
    snip_desc desc, truth;
    run_parse(&b->options, argc, argv, defaults, own, 3, help);
    b->batches = run_whole(batches, 2, MAX_BATCHES, "--batches");
    b->apart = run_whole(apart, 0, 1000, "--apart");
    memset(&desc, 0, sizeof desc);
    if (!norms_recipes(&desc, recipes)) tr_die("--recipe is " NORMS_RECIPES ", not '%s'", recipes);
    if (strcmp(o->optimizer, "adamw")) tr_die("--optimizer %s: the truth here is AdamW's update", o->optimizer);
    if (o->blocks * LLAMA_LINEARS > NORMS_LAYERS) tr_die("at most %d blocks", NORMS_LAYERS / LLAMA_LINEARS);
    tr_load_data(&b->data, o);

    desc.seed = (uint64_t)o->seed;
    truth = desc;
    desc.every = 1;
    truth.every = -1;
    truth.high = SNIP_F32;
    b->measuring = run_begin(o, &b->data, &desc);
    b->training = run_begin(o, &b->data, &truth);
    norms_watch(b->measuring.model);
    b->layers = snip_layers(b->measuring.session);
    b->clean = (float *)tr_alloc((size_t)b->training.model->n_params * sizeof *b->clean);
    b->of_loss = (pair *)tr_alloc((size_t)(b->layers * FORMATS) * sizeof *b->of_loss);
    b->of_weight = (pair *)tr_alloc((size_t)(b->layers * FORMATS * TRUTHS) * sizeof *b->of_weight);
    b->begun = tr_now();
}

int main(int argc, char **argv) {
    static bench b;
    tr_program = "fidelity";
    begin(&b, argc, argv);
    for (int batch = 0; batch < b.batches; batch++) {
        train_until(&b, b.options.steps + (int64_t)batch * b.apart);
        take_batch(&b, batch);
    }
    if (!b.options.quiet) fputc('\n', stderr);
    if (!b.options.quiet) print_layers(&b);
    print_figures(&b);
    run_close(&b.training);
    run_close(&b.measuring);
    run_end();
    return 0;
}
