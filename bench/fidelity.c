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
// "adjoint" is the library's estimator, "snip" the paper's kind, from norms alone (norms.h). "additive" is the sum of
// the single layers' truths against the truth of whole random plans. The options are the trainer's and those below;
// recipes are norms.h's.
//
//   cc -O2 -fopenmp bench/fidelity.c -o fidelity -lm
//   ./fidelity --data FILE [--steps N] [--seed N] [--batches N] [--apart N] [--recipe
//   default|rne|tensor|tensor-sr|mxfp4|nvfp4]
// 560 passes of training and 1,200 of measuring: 7 minutes with --batch 4 --steps 500, one core of a busy machine.
//
// Prints, tab-separated: fidelity, loss|weight, estimator, format, fwd|dgrad|wgrad|all, Spearman, Kendall, median of
// estimate / truth, standard deviation of its log10 (both over the layers where estimate and truth are positive).
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

enum { MAX_BATCHES = 16, FORMATS = 2, TRUTHS = SNIP_GEMMS + 1, ALL = SNIP_GEMMS, PLANS = 50 };

static int batches = 5, apart = 15;
static const snip_format formats[FORMATS] = { SNIP_E4M3, SNIP_E2M1 };

enum { ADJOINT, SNIP, ESTIMATORS };

static const char *const estimator_name[ESTIMATORS] = { "adjoint", "snip" };

typedef struct {
    double truth, estimate[ESTIMATORS], batch[MAX_BATCHES];
} pair;  // means; the truth of each batch

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const char *what, const char *estimator, const char *format, const char *gemm, const pair *p, int n,
                   int column) {
    double *x = (double *)tr_alloc((size_t)n * 3 * sizeof *x), *y = x + n, *ratio = y + n, mean = 0, spread = 0;
    int positive = 0;
    for (int i = 0; i < n; i++) {
        x[i] = p[i].estimate[column];
        y[i] = p[i].truth;
    }
    for (int i = 0; i < n; i++)
        if (x[i] > 0 && y[i] > 0) ratio[positive++] = x[i] / y[i];
    qsort(ratio, (size_t)positive, sizeof *ratio, by_value);
    for (int i = 0; i < positive; i++) mean += log10(ratio[i]) / positive;
    for (int i = 0; i < positive; i++) spread += (log10(ratio[i]) - mean) * (log10(ratio[i]) - mean) / positive;
    printf("fidelity\t%s\t%s\t%s\t%s\t%.3f\t%.3f\t%.3f\t%.3f\n", what, estimator, format, gemm, stats_spearman(x, y, n),
           stats_kendall(x, y, n), positive ? ratio[positive / 2] : 0, sqrt(spread));
    free(x);
}

// How far the truth itself repeats: Spearman of one batch's truth to the other batches', mean over the batches.
static double repeats(const pair *p, int n) {
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

// Relative squared difference of the next update under gradients `a` and `b`, over the linear layers.
static double update_difference(const llama *g, const float *a, const float *b, int64_t step) {
    double c1 = 1 / (1 - pow(BETA1, (double)step)), c2 = 1 / (1 - pow(BETA2, (double)step)), difference = 0, size = 0;
    for (int t = 0; t < g->n_tensors; t++) {
        const llama_tensor *q = &g->tensors[t];
        double d_sq = 0, u_sq = 0, w_sq = 0;
        if (q->layer < 0) continue;
        for (int64_t i = q->offset; i < q->offset + q->rows * q->cols; i++) {
            double ua = (BETA1 * g->m[i] + (1 - BETA1) * a[i]) * c1 /
                        (sqrt((BETA2 * g->v[i] + (1 - BETA2) * a[i] * a[i]) * c2) + EPS);
            double ub = (BETA1 * g->m[i] + (1 - BETA1) * b[i]) * c1 /
                        (sqrt((BETA2 * g->v[i] + (1 - BETA2) * b[i] * b[i]) * c2) + EPS);
            d_sq += (ua - ub) * (ua - ub);
            u_sq += ua * ua;
            w_sq += (double)g->params[i] * g->params[i];
        }
        difference += d_sq / w_sq;
        size += u_sq / w_sq;
    }
    return difference / size;
}

// Whether argv[*i] is that option; its value then, argv ending with NULL.
static int own_number(char **argv, int *i, const char *name, int low, int high, int *out) {
    size_t n = strlen(name);
    const char *value = argv[*i] + n;
    char *end;
    if (strncmp(argv[*i], name, n) || (*value && *value != '=')) return 0;
    value = *value ? value + 1 : argv[*i + 1] ? argv[++*i] : "";
    long x = strtol(value, &end, 10);
    if (end == value || *end || x < low || x > high)
        tr_die("%s needs a whole number between %d and %d, not '%s'", name, low, high, value);
    *out = (int)x;
    return 1;
}

int main(int argc, char **argv) {
    static const char *const gemm_name[TRUTHS] = { "fwd", "dgrad", "wgrad", "all" };
    tr_program = "fidelity";
    static tr_options o;
    char *args[64];
    int n_args = 0;
    args[n_args++] = argv[0];
    static char steps_default[] = "--steps=400", lr_default[] = "--lr=1e-3";
    args[n_args++] = steps_default;
    args[n_args++] = lr_default;
    const char *recipes = "default";
    if (argc > 60) tr_die("too many options");
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            printf(
                "Estimates of rounding's harm beside the truth, layer by layer. 460 steps, then 1200 passes of a batch: 7 minutes\n"
                "with --batch 4 --steps 500 on one core, in proportion to --batch, --seq and the model's size. Of the trainer's options those of the\n"
                "model, the data and AdamW's rate count; --steps is 400 and --lr 0.001 here.\n"
                "  --batches N        batches whose means are compared, 2 to 16 (5, as many as the library averages over)\n"
                "  --apart N          training steps between one and the next, up to 1000 (15); 0: all at the same weights\n"
                "  --recipe R         default, rne, tensor, tensor-sr, mxfp4 or nvfp4: scales and rounding of both formats (default)\n");
            tr_usage();
            return fflush(stdout) ? 2 : 0;
        }
        if (own_number(argv, &i, "--batches", 2, MAX_BATCHES, &batches) ||
            own_number(argv, &i, "--apart", 0, 1000, &apart))
            continue;
        if (strncmp(argv[i], "--recipe", 8) || (argv[i][8] && argv[i][8] != '=')) {
            args[n_args++] = argv[i];
            continue;
        }
        if (!argv[i][8] && i + 1 == argc) tr_die("--recipe needs a value");
        recipes = argv[i][8] ? argv[i] + 9 : argv[++i];
    }
    tr_parse(&o, n_args, args);
    if (strcmp(o.optimizer, "adamw")) tr_die("--optimizer %s: the truth here is AdamW's update", o.optimizer);
#ifdef _OPENMP
    if (o.threads) omp_set_num_threads((int)o.threads);
#endif
    static tr_data d;
    tr_load_data(&d, &o);
    llama_config config = { d.vocab,         (int)o.dim,      (int)o.blocks,
                            (int)o.heads,    (int)o.kv_heads, (int)o.ffn,
                            (int)o.seq,      (int)o.tied,     0,
                            (uint64_t)o.seed };
    if (llama_config_check(&config)) tr_die("%s", llama_config_check(&config));
    if (o.blocks * LLAMA_LINEARS > NORMS_LAYERS) tr_die("at most %d blocks", NORMS_LAYERS / LLAMA_LINEARS);
    snip_desc desc, truth_desc;
    memset(&desc, 0, sizeof desc);
    if (!norms_recipes(&desc, recipes))
        tr_die("--recipe is default, rne, tensor, tensor-sr, mxfp4 or nvfp4, not '%s'", recipes);
    desc.seed = (uint64_t)o.seed;
    truth_desc = desc;
    desc.every = 1;
    truth_desc.every = -1;
    truth_desc.high = SNIP_F32;
    snip *s = snip_create(&desc), *t = snip_create(&truth_desc);
    llama *g = llama_create(&config, (int)o.batch, s), *h = llama_create(&config, (int)o.batch, t);
    if (!s || !t || !g || !h) tr_stop("out of memory");
    int n = snip_layers(s);
    size_t tokens_n = (size_t)(o.batch * o.seq), bytes = (size_t)g->n_params * sizeof(float);
    int32_t *tokens = (int32_t *)tr_alloc(tokens_n * sizeof *tokens),
            *targets = (int32_t *)tr_alloc(tokens_n * sizeof *targets);
    run training = { h, t, tokens, targets, &d, &o, NULL }, measuring = { g, s, tokens, targets, &d, &o, NULL };
    float *clean = (float *)tr_alloc(bytes);
    double before = tr_now(), loss = 0, ordinary_s = 0, measuring_s = 0;
    int64_t step = 0;
    pair *loss_pair = (pair *)tr_alloc(sizeof(pair) * (size_t)(n * FORMATS)),
         *weight_pair = (pair *)tr_alloc(sizeof(pair) * (size_t)(n * FORMATS * TRUTHS));
    static pair plan_loss[PLANS], plan_weight[PLANS];
    memset(loss_pair, 0, sizeof(pair) * (size_t)(n * FORMATS));
    memset(weight_pair, 0, sizeof(pair) * (size_t)(n * FORMATS * TRUTHS));
    for (int batch = 0; batch < batches; batch++) {
        check(snip_set_format(t, -1, SNIP_GEMMS, SNIP_BF16), t, "training");
        double t0 = tr_now();
        for (int64_t end = o.steps + (int64_t)batch * apart; step < end;) {
            step++;
            loss = train_step(&training, (uint64_t)o.seed, step,
                              o.lr * (step < o.warmup ? (double)step / (double)o.warmup : 1), step);
            if (!o.quiet && step < o.steps && step % 10 == 0)
                fprintf(stderr, "\rstep %lld of %lld  loss %.4f  %.0f s ", (long long)step, (long long)o.steps, loss,
                        tr_now() - before);
        }
        ordinary_s += tr_now() - t0;
        check(snip_set_format(t, -1, SNIP_GEMMS, SNIP_F32), t, "truth");
        memcpy(g->params, h->params, bytes);
        memcpy(g->m, h->m, bytes);
        memcpy(g->v, h->v, bytes);
        load_batch(&measuring, (uint64_t)o.seed + 77, batch + 1);
        snip_adamw update = { o.lr, BETA1, BETA2, EPS, step, 1 };
        if (batch == 0) {  // a session's first step is an ordinary one; the optimizer has made it already
            snip_next_pass(s, pass(&measuring, 1));
            check(snip_end_step(s, &update), s, "measuring");
        }
        t0 = tr_now();
        do loss = pass(&measuring, 1);
        while (snip_next_pass(s, loss));
        llama_adamw(g, o.lr, BETA1, BETA2, EPS, 0, step + 1, 1);
        update.step = step + 1;
        double update_sq = snipi_update_sq(s, &update);
        check(snip_end_step(s, &update), s, "measuring");
        measuring_s += tr_now() - t0;
        double base = pass(&training, 1);
        memcpy(clean, h->grads, bytes);
        for (int l = 0; l < n; l++) {
            snip_layer_info info;
            snip_layer(s, l, &info);
            for (int f = 0; f < FORMATS; f++) {
                const snip_estimate *e = f ? &info.fp4 : &info.fp8;
                loss_pair[f * n + l].estimate[ADJOINT] += (e->loss_first + e->loss_second) / batches;
                loss_pair[f * n + l].estimate[SNIP] += norms_loss(&norms[l], f) / batches;
                for (int k = 0; k < TRUTHS; k++) {
                    pair *p = &weight_pair[(f * TRUTHS + k) * n + l];
                    for (int i = k < ALL ? k : 0; i <= (k < ALL ? k : ALL - 1); i++) {
                        p->estimate[ADJOINT] += e->update[i] / batches;
                        p->estimate[SNIP] += norms_weight(&norms[l], f, i) / update_sq / batches;
                    }
                    snip_set_format(t, l, (snip_gemm_kind)k, formats[f]);
                    double changed = pass(&training, 1);
                    snip_set_format(t, l, SNIP_GEMMS, SNIP_F32);
                    p->batch[batch] = update_difference(h, h->grads, clean, step + 1);
                    p->truth += p->batch[batch] / batches;
                    if (k != SNIP_FWD) continue;
                    loss_pair[f * n + l].batch[batch] = changed - base;
                    loss_pair[f * n + l].truth += (changed - base) / batches;
                }
            }
            if (!o.quiet)
                fprintf(stderr, "\rbatch %d of %d, layer %d of %d  %.0f s        ", batch + 1, batches, l + 1, n,
                        tr_now() - before);
        }
        for (int i = 0; batch == 0 && i < PLANS; i++) {  // of every share of FP4, against this batch's single layers
            snip_rng_key key = { (uint64_t)o.seed, (uint32_t)i, 0x706C616Eu };
            for (int l = 0; l < n; l++)
                for (int k = 0; k < SNIP_GEMMS; k++) {
                    uint32_t random[4];
                    snip_philox(key, (uint64_t)(l * SNIP_GEMMS + k), random);
                    int f = random[0] / 4294967296.0 < (i + 0.5) / PLANS;
                    snip_set_format(t, l, (snip_gemm_kind)k, formats[f]);
                    plan_weight[i].estimate[0] += weight_pair[(f * TRUTHS + k) * n + l].truth * batches;
                    if (k == SNIP_FWD) plan_loss[i].estimate[0] += loss_pair[f * n + l].truth * batches;
                }
            plan_loss[i].truth = pass(&training, 1) - base;
            plan_weight[i].truth = update_difference(h, h->grads, clean, step + 1);
        }
        snip_next_pass(t, base);
        check(snip_end_step(t, NULL), t, "truth");
    }
    if (!o.quiet) fprintf(stderr, "\n");
    for (int l = 0; l < n && !o.quiet; l++) {
        snip_layer_info info;
        snip_layer(s, l, &info);
        printf("%-12s", info.name);
        for (int f = 0; f < FORMATS; f++) {
            printf("  %s loss %+.2e est %+.2e  update", snip_format_name(formats[f]), loss_pair[f * n + l].truth,
                   loss_pair[f * n + l].estimate[ADJOINT]);
            for (int k = 0; k < TRUTHS; k++)
                printf(" %s %.2e/%.2e", gemm_name[k], weight_pair[(f * TRUTHS + k) * n + l].truth,
                       weight_pair[(f * TRUTHS + k) * n + l].estimate[ADJOINT]);
        }
        printf("\n");
    }
    printf(
        "%d layers, %lld steps, loss %.3f; an ordinary bf16 step %.1f ms, a measuring step %.1f ms (%.2f times); solve %.3f ms\n",
        n, (long long)step, loss, 1e3 * ordinary_s / (double)step, 1e3 * measuring_s / batches,
        measuring_s / batches / (ordinary_s / (double)step), 1e3 * snip_solve_seconds(s));
    printf("Spearman of one batch's truth to the other %d batches':", batches - 1);
    for (int f = 0; f < FORMATS; f++) {
        printf(" %s loss %.3f, weight", snip_format_name(formats[f]), repeats(loss_pair + f * n, n));
        for (int k = 0; k < TRUTHS; k++)
            printf(" %s %.3f", gemm_name[k], repeats(weight_pair + (f * TRUTHS + k) * n, n));
        printf(f + 1 < FORMATS ? ";" : "\n");
    }
    for (int i = 0; i < ESTIMATORS; i++)
        for (int f = 0; f < FORMATS; f++) {
            report("loss", estimator_name[i], snip_format_name(formats[f]), "fwd", loss_pair + f * n, n, i);
            for (int k = 0; k < TRUTHS; k++)
                report("weight", estimator_name[i], snip_format_name(formats[f]), gemm_name[k],
                       weight_pair + (f * TRUTHS + k) * n, n, i);
        }
    report("loss", "additive", "mixed", "fwd", plan_loss, PLANS, 0);
    report("weight", "additive", "mixed", "all", plan_weight, PLANS, 0);
    llama_destroy(g);
    llama_destroy(h);
    snip_destroy(s);
    snip_destroy(t);
    if (fflush(stdout) || ferror(stdout)) tr_die("cannot write to standard output: %s", strerror(errno ? errno : EIO));
    return 0;
}
