// bench_train - what plans are worth in time: whole training steps under several plans, in turn within one process.
//
// Trains a small Llama in bfloat16 (--steps, at least one more than will be timed), measures once, times every layer's
// GEMMs (snip_measure_gains, the least of REPEATS), and solves
//   flops         the budget's share of FLOPs in FP4 (--budget, 0.75), the rest in FP8, at the least harm
//   time, harm    the least time of the linear GEMMs, in BF16, FP8 or FP4, at no more harm than `flops`
//   time, speed   the least harm in no more time than `flops` takes
// and takes ordinary steps, optimizer included, under these and under bf16, fp8 and fp4 alone. The options are the
// trainer's and
// --rounds N, steps of each plan (12). With --threads 1 processor time counts, which other work on the machine disturbs
// less.
//
//   cc -O2 -fopenmp bench/bench_train.c -o bench_train -lm && ./bench_train --data FILE [--dim 512 --blocks 8 --seq 512
//   --batch 2]
//
// Prints, tab-separated: train, plan, share of FLOPs in FP4, in BF16, harm, seconds of the linear GEMMs as timed,
// tokens/s in the best step, speed to bf16 and to flops with half the width of its 95% interval (the median and mean of
// rounds).
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#    define _POSIX_C_SOURCE 200809L
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "stats.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"

enum { REPEATS = 4, MAX_ROUNDS = 1000, STATES = 3, PLANS = 6, FLOPS = 3 };

static const snip_format state_format[STATES] = { SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };
static const char *const plan_name[PLANS] = { "bf16", "fp8", "fp4", "flops", "time, harm", "time, speed" };

static double harm_of(const snip_layer_info *l, int state, int g) {
    return state ? (state == 2 ? &l->fp4 : &l->fp8)->cost[g] : 0;
}

// The states of n GEMMs with the least sum of `cost`, where that of `other` is at most `most`; least: the first state
// allowed.
static void solve(int n, double (*cost)[STATES], double (*other)[STATES], double most, int least, int *choice) {
    snip_ilp_option(*options)[STATES] = (snip_ilp_option(*)[STATES])tr_alloc((size_t)n * sizeof *options);
    snip_ilp_group *groups = (snip_ilp_group *)tr_alloc((size_t)n * sizeof *groups);
    snip_ilp_problem problem = { n, groups, 0, NULL, -most };
    for (int i = 0; i < n; i++) {
        double worst = other[i][least], best = cost[i][least];  // a harm may be negative, the solver's numbers may not
        for (int k = least; k < STATES; k++) {
            worst = fmax(worst, other[i][k]);
            best = fmin(best, cost[i][k]);
        }
        for (int k = least; k < STATES; k++) {
            options[i][k].cost = cost[i][k] - best;
            options[i][k].gain = worst - other[i][k];
        }
        problem.total_target += worst;
        groups[i].options = options[i] + least;
        groups[i].n_options = STATES - least;
        groups[i].stage = 0;
    }
    if (snip_ilp_solve(&problem, NULL, choice, NULL) != SNIP_ILP_OPTIMAL) tr_stop("no such plan");
    for (int i = 0; i < n; i++) choice[i] += least;
    free(options);
    free(groups);
}

static double sum_of(int n, double (*value)[STATES], const int *choice) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += value[i][choice[i]];
    return sum;
}

static void check(snip_status status, const snip *s) {
    if (status) tr_stop("%s", snip_message(s)[0] ? snip_message(s) : snip_status_text(status));
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Ratio of the times of two plans, its median or half the width of its interval.
static double ratio_of(const double *a, const double *b, int n, int width) {
    static double r[MAX_ROUNDS];
    for (int i = 0; i < n; i++) r[i] = a[i] / b[i];
    if (width) return stats_half_width(r, n);
    qsort(r, (size_t)n, sizeof *r, by_value);
    return 0.5 * (r[n / 2] + r[(n - 1) / 2]);
}

int main(int argc, char **argv) {
    tr_program = "bench_train";
    static tr_options o;
    static char steps_default[] = "--steps=40";
    char *args[64];
    int n_args = 0, rounds = 12;
    args[n_args++] = argv[0];
    args[n_args++] = steps_default;
    if (argc > 60) tr_die("too many options");
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            puts(
                "Training steps under plans by FLOPs and by time, in turn.\n  --rounds N         steps of each plan (12)");
            tr_usage();
            return fflush(stdout) ? 2 : 0;
        }
        if (strcmp(argv[i], "--rounds")) {
            args[n_args++] = argv[i];
            continue;
        }
        rounds = i + 1 < argc ? atoi(argv[++i]) : 0;
        if (rounds < 1 || rounds > MAX_ROUNDS) tr_die("--rounds needs a number from 1 to %d", (int)MAX_ROUNDS);
    }
    tr_parse(&o, n_args, args);
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
    snip_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.every = (int)o.steps > rounds * PLANS ? (int)o.steps
                                               : rounds * PLANS + 1;  // no measurement among the steps that are timed
    desc.seed = (uint64_t)o.seed;
    desc.spike = -1;
    desc.drift = -1;
    snip *s = snip_create(&desc);
    llama *g = s ? llama_create(&config, (int)o.batch, s) : NULL;
    if (!g) tr_stop("out of memory");
    const int layers = snip_layers(s), n = layers * SNIP_GEMMS;
    const size_t tokens_n = (size_t)(o.batch * o.seq);
    int32_t *tokens = (int32_t *)tr_alloc(tokens_n * sizeof *tokens),
            *targets = (int32_t *)tr_alloc(tokens_n * sizeof *targets);
    double(*harm)[STATES] = (double(*)[STATES])tr_alloc((size_t)n * sizeof *harm),
    (*seconds)[STATES] = (double(*)[STATES])tr_alloc((size_t)n * sizeof *seconds);
    double(*flops)[STATES] = (double(*)[STATES])tr_alloc((size_t)n * sizeof *flops), all = 0;
    int *plans = (int *)tr_alloc((size_t)(n * PLANS) * sizeof *plans);
    static double took[PLANS][MAX_ROUNDS];
    for (int64_t step = 1, end = desc.every + 1 + rounds * PLANS; step <= end; step++) {
        const int timed = (int)(step - desc.every - 2), plan = timed % PLANS;
        double t = 0, sum = 0;
        if (timed == 0) {
            snip_layer_info info;
            for (int repeat = 0; repeat < REPEATS; repeat++) {
                check(snip_measure_gains(s, o.batch * o.seq), s);
                for (int i = 0; i < n; i++) {
                    snip_layer(s, i / SNIP_GEMMS, &info);
                    for (int k = 0; k < STATES; k++) {
                        const double now = info.seconds[k][i % SNIP_GEMMS];
                        seconds[i][k] = repeat && seconds[i][k] < now ? seconds[i][k] : now;
                        harm[i][k] = harm_of(&info, k, i % SNIP_GEMMS);
                        flops[i][k] = k == 2 ? 0 : (double)info.out_features * (double)info.in_features;  // not in FP4
                    }
                    all += repeat ? 0 : flops[i][0];
                }
            }
            for (int i = 0; i < FLOPS * n; i++) plans[i] = i / n;
            int *by_flops = plans + FLOPS * n;
            solve(n, harm, flops, (1 - o.budget) * all, 1, by_flops);
            solve(n, seconds, harm, sum_of(n, harm, by_flops), 0, by_flops + n);
            solve(n, harm, seconds, sum_of(n, seconds, by_flops), 0, by_flops + 2 * n);
        }
        if (timed >= 0)
            for (int i = 0; i < n; i++)
                check(snip_set_format(s, i / SNIP_GEMMS, (snip_gemm_kind)(i % SNIP_GEMMS),
                                      state_format[plans[plan * n + i]]),
                      s);
        for (int64_t j = 0; j < o.batch; j++)
            tr_train_sequence(&d, (uint64_t)o.seed, step, j, o.seq, tokens + j * o.seq, targets + j * o.seq);
        t = o.threads == 1 ? (double)clock() / CLOCKS_PER_SEC : tr_now();
        do {
            llama_zero_grad(g);
            check(llama_forward(g, s, tokens, targets, (int)o.batch, (float)(1 / (double)tokens_n), &sum), s);
            check(llama_backward(g, s, tokens, (int)o.batch), s);
        } while (snip_next_pass(s, sum / (double)tokens_n));
        const double norm = llama_grad_norm(g), scale = norm > 1 ? 1 / norm : 1,
                     lr = o.lr * fmin(1, (double)step / (double)(o.warmup + 1));
        snip_adamw update = { lr, 0.9, 0.95, 1e-8, step, scale };
        llama_adamw(g, lr, 0.9, 0.95, 1e-8, 0.1, step, scale);
        check(snip_end_step(s, &update), s);
        t = (o.threads == 1 ? (double)clock() / CLOCKS_PER_SEC : tr_now()) - t;
        if (timed >= 0) took[plan][timed / PLANS] = t;
        if (!o.quiet && (step % 10 == 0 || step == end))
            fprintf(stderr, "\rstep %lld of %lld  loss %.4f ", (long long)step, (long long)end, sum / (double)tokens_n);
    }
    if (!o.quiet) fputc('\n', stderr);
    for (int plan = 0; plan < PLANS; plan++) {
        const int *choice = plans + plan * n;
        double high = 0, best = took[plan][0];
        int differ = 0;
        for (int i = 0; i < n; i++) {
            high += choice[i] ? 0 : flops[i][0];
            differ += choice[i] != plans[FLOPS * n + i];
        }
        for (int i = 1; i < rounds; i++) best = fmin(best, took[plan][i]);
        printf("train\t%s\t%.3f\t%.3f\t%.3e\t%.4f\t%.0f\t%.3f +- %.3f\t%.3f +- %.3f\n", plan_name[plan],
               1 - sum_of(n, flops, choice) / all, high / all, sum_of(n, harm, choice), sum_of(n, seconds, choice),
               (double)tokens_n / best, ratio_of(took[0], took[plan], rounds, 0),
               ratio_of(took[0], took[plan], rounds, 1), ratio_of(took[FLOPS], took[plan], rounds, 0),
               ratio_of(took[FLOPS], took[plan], rounds, 1));
        if (plan > FLOPS && !o.quiet) printf("# %s: %d of %d GEMMs differ from flops\n", plan_name[plan], differ, n);
    }
    llama_destroy(g);
    snip_destroy(s);
    return 0;
}
