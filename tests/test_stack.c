// Every function of the library on a thread of 64 KB: quantizers and products on every instruction set, a session that
// measures, plans, prints and saves. Each part in a process of its own, so that an overflow is a failure and no crash
// of the test. Public names alone.
#include "session.h"
#include <pthread.h>
#include <sys/wait.h>

enum { STACK_BYTES = 64 * 1024 };

#if defined(__SANITIZE_ADDRESS__)
#    define STACKS_ARE_LARGER 1  // sanitizers keep zones around every array
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define STACKS_ARE_LARGER 1
#    endif
#endif

// ---- on the thread: memory is allocated by the thread that starts it ----

enum { ROWS = 130, COLS = 400, ELEMENTS = ROWS * COLS };

static struct {
    float *x, *out, *bias;
    uint8_t *codes[2], *scales[2];
    void *scratch, *state;
    model n;
    snip *s;
    const char *plan;
    int statuses;  // other than SNIP_OK
} data;

static void *quantizers(void *unused) {
    static const snip_recipe recipes[] = { SNIP_RECIPE_BF16,     SNIP_RECIPE_FP8_TILE,    SNIP_RECIPE_FP8_BLOCK,
                                           SNIP_RECIPE_FP4_TILE, SNIP_RECIPE_FP4_TILE_SR, SNIP_RECIPE_FP4_BLOCK,
                                           SNIP_RECIPE_MXFP8,    SNIP_RECIPE_MXFP4,       SNIP_RECIPE_NVFP4 };
    for (int isa = 0; isa < SNIP_ISA_COUNT; isa++)
        for (size_t i = 0; i < sizeof recipes / sizeof recipes[0] && snip_isa_available((snip_isa)isa); i++)
            for (int bf16 = 0; bf16 < 2; bf16++) {
                snip_quantize_job job;
                snip_quant_stats stats, stats_t;
                memset(&job, 0, sizeof job);
                job.x = data.x;
                job.x_format = bf16 ? SNIP_BF16 : SNIP_F32;
                job.rows = ROWS;
                job.cols = COLS;
                job.ld = COLS;
                job.recipe = job.recipe_t = &recipes[i];
                job.codes = data.codes[0];
                job.scales = data.scales[0];
                job.codes_t = data.codes[1];
                job.scales_t = data.scales[1];
                job.isa = (snip_isa)isa;
                data.statuses += snip_quantize_with(&job, &stats, &stats_t) != SNIP_OK;
                data.statuses += snip_dequantize(&recipes[i], data.codes[0], data.scales[0], ROWS, COLS, data.out,
                                                 COLS) != SNIP_OK;
            }
    return unused;
}

static void *noise(void *unused) {
    snip_rng_key key = { 1, 2, 3 };
    double dot;
    data.statuses += snip_noise_add(data.out, data.x, ELEMENTS, 0.5f, NULL, key) != SNIP_OK;
    data.statuses += snip_noise_dot(data.x, ELEMENTS, key, &dot) != SNIP_OK;
    data.statuses += snip_gauss_add(data.out, data.x, ELEMENTS, 0.5f, NULL, key) != SNIP_OK;
    data.statuses += snip_gauss_dot(data.x, ELEMENTS, key, &dot) != SNIP_OK;
    data.statuses += snip_hadamard(data.out, ROWS, COLS / 128 * 128, COLS, 128, key) != SNIP_OK;
    return unused;
}

static void *products(void *unused) {
    enum { M = 70, N = 60, K = 400 };

    static const snip_recipe recipes[] = { SNIP_RECIPE_F32, SNIP_RECIPE_FP8_TILE, SNIP_RECIPE_FP4_TILE,
                                           SNIP_RECIPE_NVFP4 };
    snip_rng_key key = { 1, 2, 3 };
    for (int isa = 0; isa < SNIP_ISA_COUNT; isa++)
        for (size_t i = 0; i < 4 && snip_isa_available((snip_isa)isa); i++)
            for (int round_bf16 = 0; round_bf16 < 2; round_bf16++) {
                snip_operand a = { &recipes[i], data.codes[0], data.scales[0], 0, 0, i == 0 && round_bf16 };
                if (i == 0)
                    a.codes = data.x;
                else
                    data.statuses += snip_quantize(&recipes[i], data.x, M, K, K, data.codes[0], data.scales[0], key,
                                                   NULL, NULL) != SNIP_OK;
                snip_operand b = a;  // the first N rows
                data.statuses += snip_gemm(M, N, K, &a, &b, data.out, N, 0, data.bias, data.scratch, (snip_isa)isa) !=
                                 SNIP_OK;
            }
    return unused;
}

static void *training(void *unused) {
    data.statuses += snip_measure_gains(data.s, 40) != SNIP_OK;
    for (int step = 1; step <= 3; step++) data.statuses += model_step(&data.n, data.s, step) != SNIP_OK;
    data.statuses += snip_plans(data.s) != 1;
    data.statuses += snip_plan_save(data.s, data.plan) != SNIP_OK || snip_plan_load(data.s, data.plan) != SNIP_OK;
    data.statuses += snip_plan_print(data.s, stderr) != SNIP_OK;
    data.statuses += snip_state_save(data.s, data.state) != SNIP_OK;
    data.statuses += snip_state_load(data.s, data.state, snip_state_size(data.s)) != SNIP_OK;
    return unused;
}

static void *overflow(void *unused) {  // the test can fail
    volatile char frame[STACK_BYTES];
    for (size_t i = 0; i < sizeof frame; i += 512) frame[i] = 1;
    data.statuses = frame[512] != 1;
    return unused;
}

// ---- the thread, in a process of its own: its exit status, or -1 for a signal ----

static int on_a_small_stack(void *(*part)(void *)) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        if (pthread_attr_setstacksize(&attributes, STACK_BYTES)) _exit(3);
        if (!freopen("/dev/null", "w", stderr)) _exit(3);
        if (pthread_create(&thread, &attributes, part, NULL)) _exit(3);
        pthread_join(thread, NULL);
        _exit(data.statuses != 0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) return 4;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void make_data(void) {
    data.x = randoms(ELEMENTS, 1);
    data.out = floats(ELEMENTS);
    data.bias = floats(COLS);
    for (int i = 0; i < 2; i++) {
        data.codes[i] = (uint8_t *)room(4 * ELEMENTS);
        data.scales[i] = (uint8_t *)room(4 * ELEMENTS);
    }
    data.scratch = room(snip_gemm_scratch(ROWS, COLS, COLS));
    data.statuses = 0;
}

static void check_part(void *(*part)(void *)) {
#ifdef STACKS_ARE_LARGER
    (void)part;
    (void)on_a_small_stack;
    test_skip("small stacks: under sanitizers frames are larger");
#else
    make_data();
    CHECK(on_a_small_stack(part) == 0);
#endif
}

static void quantizers_run_in_64_kb(void) { check_part(quantizers); }

static void noise_runs_in_64_kb(void) { check_part(noise); }

static void products_run_in_64_kb(void) { check_part(products); }

static void training_runs_in_64_kb(void) {
    snip_desc d = description();
    d.every = 2;
    d.budget = 0.5;
    data.n = model_new(3, 150, 140, 200, 130);
    data.s = model_session(&data.n, &d);
    data.state = room(snip_state_size(data.s));
    data.plan = test_path("plan");
    check_part(training);
}

static void an_overflow_is_noticed(void) {
#ifndef STACKS_ARE_LARGER
    make_data();
    CHECK(on_a_small_stack(overflow) == -1);
#else
    (void)overflow;
#endif
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(an_overflow_is_noticed);
    RUN(quantizers_run_in_64_kb);
    RUN(noise_runs_in_64_kb);
    RUN(products_run_in_64_kb);
    RUN(training_runs_in_64_kb);
    return test_end();
}
