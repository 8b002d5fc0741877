// bench_train - what plans are worth in time: whole training steps under several plans, in turn within one process.
//
// Trains a small Llama in bfloat16 (--steps, at least one more than will be timed), measures once, times every layer's
// GEMMs (snip_measure_gains, the least of REPEATS), and solves
//   flops         the budget's share of FLOPs in FP4 (--budget, 0.75), the rest in FP8, at the least harm
//   time, harm    the least time of the linear GEMMs, in BF16, FP8 or FP4, at no more harm than `flops`
//   time, speed   the least harm in no more time than `flops` takes
// and takes ordinary steps, optimizer included, under these and under bf16, fp8 and fp4 alone. The options are the
// trainer's and --rounds N, steps of each plan (12). With --threads 1 processor time counts, which other work on the
// machine disturbs less.
//
//   cc -O2 -fopenmp bench/bench_train.c -o bench_train -lm
//   ./bench_train --data FILE [--dim 512 --blocks 8 --seq 512 --batch 2]
//
// Prints, tab-separated: train, plan, share of FLOPs in FP4, in BF16, harm, seconds of the linear GEMMs as timed,
// tokens/s in the best step, speed to bf16 and to flops with half the width of its 95% interval (the median and mean of
// rounds).
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#    define _POSIX_C_SOURCE 200809L
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"
#include "stats.h"
#include "run.h"

enum { REPEATS = 4, MAX_ROUNDS = 1000 };

enum { BF16, FP8, FP4, STATES };  // of a GEMM; also the plans that put every GEMM in one

enum { FLOPS = STATES, TIME_HARM, TIME_SPEED, PLANS };

static const snip_format state_format[STATES] = { SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };
static const char *const plan_name[PLANS] = { "bf16", "fp8", "fp4", "flops", "time, harm", "time, speed" };

typedef double (*by_state)[STATES];  // [GEMMs][STATES]

typedef struct {
    tr_options options;
    tr_data data;
    tr_training training;
    int rounds, gemms;
    by_state harm, seconds, flops;  // flops: that are not in FP4
    int *plan[PLANS];               // [GEMMs] the state of each
    double took[PLANS][MAX_ROUNDS];
} bench;

static double sum_of(const bench *b, by_state value, const int *plan) {
    double sum = 0;
    for (int i = 0; i < b->gemms; i++) sum += value[i][plan[i]];
    return sum;
}

// The states with the least sum of `cost`, where that of `other` is at most `most`; least: the first state allowed.
static void solve(const bench *b, by_state cost, by_state other, double most, int least, int *plan) {
    int n = b->gemms;
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
    if (snip_ilp_solve(&problem, NULL, plan, NULL) != SNIP_ILP_OPTIMAL) tr_stop("no such plan");
    for (int i = 0; i < n; i++) plan[i] += least;
    free(options);
    free(groups);
}

// Harm, FLOPs and the least of REPEATS timings of every GEMM.
static void measure(bench *b) {
    snip *s = b->training.session;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        check(snip_measure_gains(s, b->options.batch * b->options.seq), s, "timing");
        for (int i = 0; i < b->gemms; i++) {
            const int g = i % SNIP_GEMMS;
            snip_layer_info info;
            snip_layer(s, i / SNIP_GEMMS, &info);
            for (int k = 0; k < STATES; k++) {
                const double now = info.seconds[k][g];
                b->seconds[i][k] = repeat && b->seconds[i][k] < now ? b->seconds[i][k] : now;
                b->flops[i][k] = k == FP4 ? 0 : (double)info.out_features * (double)info.in_features;
            }
            b->harm[i][BF16] = 0;
            b->harm[i][FP8] = info.fp8.cost[g];
            b->harm[i][FP4] = info.fp4.cost[g];
        }
    }
}

static void make_plans(bench *b) {
    for (int plan = 0; plan < STATES; plan++)
        for (int i = 0; i < b->gemms; i++) b->plan[plan][i] = plan;
    const double all = sum_of(b, b->flops, b->plan[BF16]);
    solve(b, b->harm, b->flops, (1 - b->options.budget) * all, FP8, b->plan[FLOPS]);
    const double harm = sum_of(b, b->harm, b->plan[FLOPS]), seconds = sum_of(b, b->seconds, b->plan[FLOPS]);
    solve(b, b->seconds, b->harm, harm, BF16, b->plan[TIME_HARM]);
    solve(b, b->harm, b->seconds, seconds, BF16, b->plan[TIME_SPEED]);
}

static void use_plan(const bench *b, const int *plan) {
    snip *s = b->training.session;
    for (int i = 0; i < b->gemms; i++)
        check(snip_set_format(s, i / SNIP_GEMMS, (snip_gemm_kind)(i % SNIP_GEMMS), state_format[plan[i]]), s, "plan");
}

// Ratio of the times of two plans: its median, or half the width of its interval.
static double ratio_of(const bench *b, int plan, int other, int width) {
    static double ratio[MAX_ROUNDS];
    for (int i = 0; i < b->rounds; i++) ratio[i] = b->took[plan][i] / b->took[other][i];
    return width ? stats_half_width(ratio, b->rounds) : stats_median(ratio, b->rounds);
}

static void print_plan(const bench *b, int plan) {
    const int *choice = b->plan[plan];
    const double all = sum_of(b, b->flops, b->plan[BF16]), tokens = (double)(b->options.batch * b->options.seq);
    double high = 0, best = b->took[plan][0];
    int differ = 0;
    for (int i = 0; i < b->gemms; i++) {
        high += choice[i] == BF16 ? b->flops[i][BF16] : 0;
        differ += choice[i] != b->plan[FLOPS][i];
    }
    for (int i = 1; i < b->rounds; i++) best = fmin(best, b->took[plan][i]);
    printf("train\t%s\t%.3f\t%.3f\t%.3e\t%.4f\t%.0f\t%.3f +- %.3f\t%.3f +- %.3f\n", plan_name[plan],
           1 - sum_of(b, b->flops, choice) / all, high / all, sum_of(b, b->harm, choice), sum_of(b, b->seconds, choice),
           tokens / best, ratio_of(b, BF16, plan, 0), ratio_of(b, BF16, plan, 1), ratio_of(b, FLOPS, plan, 0),
           ratio_of(b, FLOPS, plan, 1));
    if (plan > FLOPS && !b->options.quiet)
        printf("# %s: %d of %d GEMMs differ from flops\n", plan_name[plan], differ, b->gemms);
}

static void help(void) {
    puts("Training steps under plans by FLOPs and by time, in turn.\n"
         "  --rounds N         steps of each plan (12)");
}

// Returns the steps from one measurement to the next: none is among the steps that are timed.
static int begin(bench *b, int argc, char **argv) {
    static const char *const defaults[] = { "--steps=40", NULL };
    const char *rounds = "12";
    const run_option own[] = {
        {"--rounds", &rounds, NULL}
    };
    snip_desc desc;
    run_parse(&b->options, argc, argv, defaults, own, 1, help);
    b->rounds = run_whole(rounds, 1, MAX_ROUNDS, "--rounds");
    tr_load_data(&b->data, &b->options);
    memset(&desc, 0, sizeof desc);
    desc.every = b->rounds * PLANS + 1;
    if (b->options.steps > desc.every) desc.every = (int)b->options.steps;
    desc.seed = (uint64_t)b->options.seed;
    desc.spike = -1;
    desc.drift = -1;
    b->training = run_begin(&b->options, &b->data, &desc);
    b->gemms = snip_layers(b->training.session) * SNIP_GEMMS;
    const size_t n = (size_t)b->gemms;
    b->harm = (by_state)tr_alloc(n * sizeof *b->harm);
    b->seconds = (by_state)tr_alloc(n * sizeof *b->seconds);
    b->flops = (by_state)tr_alloc(n * sizeof *b->flops);
    for (int i = 0; i < PLANS; i++) b->plan[i] = (int *)tr_alloc(n * sizeof **b->plan);
    return desc.every;
}

int main(int argc, char **argv) {
    static bench b;
    tr_program = "bench_train";
    const int64_t every = begin(&b, argc, argv), end = every + 1 + b.rounds * PLANS;
    const tr_options *o = &b.options;
    const tr_training *t = &b.training;
    const int threads = o->threads == 1 ? 1 : 2;
    for (int64_t step = 1; step <= end; step++) {
        const int timed = (int)(step - every - 2), plan = timed % PLANS;
        tr_step taken;
        if (timed == 0) {
            measure(&b);
            make_plans(&b);
        }
        if (timed >= 0) use_plan(&b, b.plan[plan]);
        tr_load_batch(t, (uint64_t)o->seed, step);
        const double lr = o->lr * fmin(1, (double)step / (double)(o->warmup + 1)), start = stats_seconds(threads);
        check(tr_take_step(t, tr_optimizer_named("adamw"), lr, step, &taken), t->session, "training");
        if (timed >= 0) b.took[plan][timed / PLANS] = stats_seconds(threads) - start;
        if (!o->quiet && (step % 10 == 0 || step == end))
            fprintf(stderr, "\rstep %lld of %lld  loss %.4f ", (long long)step, (long long)end, taken.loss);
    }
    if (!o->quiet) fputc('\n', stderr);
    for (int plan = 0; plan < PLANS; plan++) print_plan(&b, plan);
    run_close(&b.training);
    run_end();
    return 0;
}
