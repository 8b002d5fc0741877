// SNIP_PARALLEL_FOR: everything that snip.h shares out goes through a pool of threads of our own, with the same bytes
// for any number of them.
#include "test.h"
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_THREADS = 5 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    void (*fn)(void *, int64_t);
    void *arg;
    int64_t n, next, left;
    int64_t calls[MOST_THREADS];  // by thread
    int threads, stop;
    int set_mode, mode;  // the other threads' rounding mode
} pool = { PTHREAD_MUTEX_INITIALIZER,
           PTHREAD_COND_INITIALIZER,
           PTHREAD_COND_INITIALIZER,
           NULL,
           NULL,
           0,
           0,
           0,
           { 0 },
           1,
           0,
           0,
           0 };

// Calls as long as there are any; the lock is held on entry and on return. The last is left to the other threads, so
// that they get one.
static void pool_take(int thread) {
    while (pool.next < pool.n - (thread == 0 && pool.threads > 1 && pool.n > 1)) {
        int64_t i = pool.next++;
        pool.calls[thread]++;
        pthread_mutex_unlock(&pool.lock);
        if (thread > 0 && pool.set_mode) fesetround(pool.mode);
        pool.fn(pool.arg, i);
        pthread_mutex_lock(&pool.lock);
        if (--pool.left == 0) pthread_cond_signal(&pool.done);
    }
}

static void *pool_thread(void *arg) {
    pthread_mutex_lock(&pool.lock);
    while (!pool.stop) {
        pool_take((int)(intptr_t)arg);
        if (!pool.stop) pthread_cond_wait(&pool.work, &pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

static void pool_for(void (*fn)(void *, int64_t), void *arg, int64_t n) {
    if (pool.threads == 0) {  // the last index first
        pool.calls[0] += n;
        while (n > 0) fn(arg, --n);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    pool.fn = fn;
    pool.arg = arg;
    pool.n = pool.left = n;
    pool.next = 0;
    if (pool.threads > 1) pthread_cond_broadcast(&pool.work);
    pool_take(0);
    while (pool.left) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

#define SNIP_PARALLEL_FOR(fn, arg, n) pool_for(fn, arg, n)
#define SNIPI_WORTH 0  // threads for however little
#define SNIP_IMPLEMENTATION
#include "../snip.h"

static void *(*volatile allocate)(size_t,
                                  size_t) = calloc;  // sizes that GCC knows make it warn of chunks before the first

static void *memory(size_t size) {
    void *p = allocate(size + 64, 1);
    if (!p) {
        puts("out of memory");
        exit(2);
    }
    return p;
}

static float *floats(int64_t n, uint32_t seed) {
    float *x = (float *)memory((size_t)n * sizeof(float));
    int64_t i;
    for (i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
    }
    return x;
}

static uint64_t digest;

static void add(const void *data, size_t size) { digest = test_hash(digest, data, size); }

static void quantizers(void) {
    enum { ROWS = 300, COLS = 320 };

    snip_recipe stochastic = SNIP_RECIPE_FP4_TILE_SR, block = SNIP_RECIPE_FP8_BLOCK, nvfp4 = SNIP_RECIPE_NVFP4;
    snip_rng_key key = { 7, 8, 9 };
    float *x = floats(ROWS * COLS, 1), *y = floats(ROWS * COLS, 2);
    unsigned char *codes = (unsigned char *)memory(ROWS * COLS), *turned = (unsigned char *)memory(2 * ROWS * COLS),
                  *scales = (unsigned char *)memory(ROWS * COLS), *turned_scales = (unsigned char *)memory(ROWS * COLS);
    snip_quant_stats stats;
    double dot;
    CHECK(!snip_quantize_both(&stochastic, &stochastic, x, ROWS, COLS, COLS, codes, scales, turned, turned_scales, key,
                              &stats));
    add(codes, ROWS * COLS);
    add(scales, ROWS * COLS);
    add(turned, ROWS * COLS);
    add(turned_scales, ROWS * COLS);
    add(&stats.err_sq, sizeof stats.err_sq);
    CHECK(!snip_quantize(&nvfp4, x, ROWS, COLS, COLS, codes, scales, key, NULL, &stats));
    add(codes, ROWS * COLS);
    add(scales, ROWS * COLS);
    add(&stats.err_sq, sizeof stats.err_sq);
    CHECK(!snip_dequantize_bf16(&nvfp4, codes, scales, ROWS, COLS, (uint16_t *)(void *)turned, COLS));
    add(turned, 2 * ROWS * COLS);
    CHECK(!snip_fake_quantize(&block, x, ROWS, COLS, COLS, y, COLS, key, NULL, NULL));
    add(y, ROWS * COLS * sizeof(float));
    CHECK(!snip_quantize(&block, x, ROWS, COLS, COLS, codes, scales, key, NULL, NULL) &&
          !snip_dequantize(&block, codes, scales, ROWS, COLS, y, COLS));
    add(y, ROWS * COLS * sizeof(float));
    CHECK(!snip_noise_add(y, x, ROWS * COLS - 3, 0.5f, NULL, key) &&
          !snip_gauss_add(y, y, ROWS * COLS - 3, 0.5f, x, key) && !snip_hadamard(y, ROWS, COLS, COLS, 64, key));
    add(y, ROWS * COLS * sizeof(float));
    CHECK(!snip_noise_dot(y, ROWS * COLS - 3, key, &dot));
    add(&dot, sizeof dot);
    CHECK(!snip_gauss_dot(y, ROWS * COLS - 3, key, &dot));
    add(&dot, sizeof dot);
    free(x);
    free(y);
    free(codes);
    free(turned);
    free(scales);
    free(turned_scales);
}

static void products(void) {
    enum { M = 150, N = 330, K = 2200 };

    snip_recipe fp4 = SNIP_RECIPE_FP4_TILE, block = SNIP_RECIPE_FP4_BLOCK, f32 = SNIP_RECIPE_F32;
    snip_rng_key key = { 7, 8, 9 };
    float *x = floats(M * K, 1), *w = floats(N * K, 2), *c = floats(M * N, 3), *bias = floats(N, 4);
    void *codes_x = memory(M * K), *scales_x = memory(M * K), *codes_w = memory(N * K), *scales_w = memory(N * K),
         *scratch = memory(snip_gemm_scratch(M, N, K));
    snip_operand a = { &fp4, codes_x, scales_x, 0, 0, 0 }, b = { &block, codes_w, scales_w, 0, 0, 0 },
                 fa = { &f32, x, NULL, 0, 0, 1 }, fb = { &f32, w, NULL, 0, 0, 1 };
    CHECK(!snip_quantize(&fp4, x, M, K, K, codes_x, scales_x, key, NULL, NULL) &&
          !snip_quantize(&block, w, N, K, K, codes_w, scales_w, key, NULL, NULL));
    CHECK(!snip_gemm(M, N, K, &a, &b, c, N, 1, bias, scratch, SNIP_ISA_BEST));
    CHECK(!snip_gemm(M, N, K, &fa, &fb, c, N, 1, NULL, scratch, SNIP_ISA_BEST));
    add(c, M * N * sizeof(float));
    CHECK(!snip_gemm(M, N, 0, &fa, &fb, c, N, 0, bias, scratch, SNIP_ISA_BEST));
    add(c, M * N * sizeof(float));
    free(x);
    free(w);
    free(c);
    free(bias);
    free(codes_x);
    free(scales_x);
    free(codes_w);
    free(scales_w);
    free(scratch);
}

// Every call of every phase runs once, and none before all calls of the phase before it.
enum { PHASES = 3, TURNS = 40, MOST_CALLS = 7 };

static const int64_t phase_calls[PHASES] = { 5, 0, MOST_CALLS };

static struct { long done[PHASES * TURNS], seen[PHASES * TURNS][MOST_CALLS], early; } phases_run;

static void phase_call(int phase, int64_t i) {
    const int64_t turn = i / phase_calls[phase], at = turn * PHASES + phase;
    pthread_mutex_lock(&pool.lock);
    for (int64_t before = 0; before < at; before++)
        phases_run.early += phases_run.done[before] < phase_calls[before % PHASES];
    phases_run.seen[at][i % phase_calls[phase]]++;
    pthread_mutex_unlock(&pool.lock);
    sched_yield();
    pthread_mutex_lock(&pool.lock);
    phases_run.done[at]++;
    pthread_mutex_unlock(&pool.lock);
}

static void first_phase(void *arg, int64_t i) {
    (void)arg;
    phase_call(0, i);
}

static void last_phase(void *arg, int64_t i) {
    (void)arg;
    phase_call(2, i);
}

static void phases_in_turn(void) {
    const snipi_phase phases[PHASES] = {
        {first_phase, NULL, phase_calls[0]},
        { NULL,       NULL, phase_calls[1]},
        { last_phase, NULL, phase_calls[2]}
    };
    long other = 0;
    memset(&phases_run, 0, sizeof phases_run);
    snipi_share_phases(phases, PHASES, TURNS, 1);
    for (int at = 0; at < PHASES * TURNS; at++)
        for (int64_t i = 0; i < MOST_CALLS; i++) other += phases_run.seen[at][i] != (i < phase_calls[at % PHASES]);
    CHECK(phases_run.early == 0);
    CHECK(other == 0);
}

// Two micro-batches a step, a measurement and a plan at the second.
static void session(void) {
    enum { ROWS = 130, OUT = 96, IN = 160, STEPS = 5 };

    snip_desc desc = { 0 };
    float *x = floats(2 * ROWS * IN, 1), *w = floats(OUT * IN, 2), *dy = floats(2 * ROWS * OUT, 3),
          *m = floats(OUT * IN, 4), *v = floats(OUT * IN, 5);
    float *y = floats(ROWS * OUT, 6), *dx = floats(ROWS * IN, 7), *dw = floats(OUT * IN, 8);
    void *state;
    snip *s;
    int64_t i, step, micro;
    desc.every = 2;
    desc.seed = 5;
    desc.budget = 0.7;
    s = snip_create(&desc);
    for (i = 0; i < OUT * IN; i++) v[i] *= v[i];
    CHECK(s && snip_add_linear(s, "0.a", OUT, IN, 0) == 0 && snip_bind_adamw(s, 0, m, v) == SNIP_OK);
    for (step = 1; step <= STEPS; step++) {
        snip_adamw o = { 1e-3, 0.9, 0.99, 1e-8, 0, 1 };
        o.step = step;
        do {
            memset(dw, 0, OUT * IN * sizeof(float));
            for (micro = 0; micro < 2; micro++)
                CHECK(!snip_linear_forward(s, 0, y, x + micro * ROWS * IN, w, NULL, ROWS));
            add(y, ROWS * OUT * sizeof(float));
            for (micro = 0; micro < 2; micro++)
                CHECK(
                    !snip_linear_backward(s, 0, dx, dw, NULL, dy + micro * ROWS * OUT, x + micro * ROWS * IN, w, ROWS));
        } while (snip_next_pass(s, 2.0));
        CHECK(!snip_end_step(s, &o));
        add(dx, ROWS * IN * sizeof(float));
        add(dw, OUT * IN * sizeof(float));
        for (i = 0; i < OUT * IN; i++) w[i] -= 1e-3f * dw[i];
    }
    CHECK(snip_plans(s) == 2);
    state = memory(snip_state_size(s));
    CHECK(!snip_state_save(s, state));
    add(state, snip_state_size(s));
    snip_destroy(s);
    free(x);
    free(w);
    free(dy);
    free(m);
    free(v);
    free(y);
    free(dx);
    free(dw);
    free(state);
}

// Threads of the pool round as the host likes: codes, scales and values are the same.
static void rounding_modes(void) {
#ifdef FE_UPWARD
    enum { ROWS = 150, COLS = 260 };

    static uint8_t codes[2][ROWS * COLS], turned[2][ROWS * COLS];
    static float scales[2][ROWS * COLS], turned_scales[2][ROWS * COLS], back[2][ROWS * COLS];
    const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp4 = SNIP_RECIPE_FP4_TILE;
    snip_rng_key key = { 7, 8, 9 };
    float *x = floats(ROWS * COLS, 3);
    for (int other = 0; other < 2; other++) {
        pool.mode = other ? FE_UPWARD : FE_TONEAREST;
        pool.set_mode = 1;
        CHECK(!snip_quantize_both(&fp4, &fp8, x, ROWS, COLS, COLS, codes[other], scales[other], turned[other],
                                  turned_scales[other], key, NULL));
        CHECK(!snip_dequantize(&fp4, codes[other], scales[other], ROWS, COLS, back[other], COLS));
    }
    CHECK(!memcmp(back[0], back[1], sizeof back[0]));
    pool.mode = FE_TONEAREST;
    CHECK(!memcmp(codes[0], codes[1], sizeof codes[0]) && !memcmp(turned[0], turned[1], sizeof turned[0]));
    CHECK(!memcmp(scales[0], scales[1], sizeof scales[0]));
    CHECK(!memcmp(turned_scales[0], turned_scales[1], sizeof turned_scales[0]));
    free(x);
#endif
}

int main(void) {
    static const int counts[] = { 1, 0, 2, MOST_THREADS };  // 0: this thread alone, in reverse order
    pthread_t threads[MOST_THREADS];
    uint64_t first = 0;
    int i, t;
    for (i = 0; i < 4; i++) {
        int64_t others = 0;
        pool.threads = counts[i];
        pool.stop = 0;
        pool.n = pool.next = 0;
        memset(pool.calls, 0, sizeof pool.calls);
        for (t = 1; t < counts[i]; t++)
            if (pthread_create(&threads[t], NULL, pool_thread, (void *)(intptr_t)t)) {
                puts("no thread");
                return 2;
            }
        digest = TEST_HASH_START;
        quantizers();
        products();
        session();
        rounding_modes();
        phases_in_turn();
        pthread_mutex_lock(&pool.lock);
        pool.stop = 1;
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.lock);
        for (t = 1; t < counts[i]; t++) {
            pthread_join(threads[t], NULL);
            others += pool.calls[t];
        }
        pool.set_mode = 0;
        if (i == 0) first = digest;
        CHECK(digest == first);
        CHECK(pool.calls[0] + others > 1000 && (others > 0) == (counts[i] > 1));
    }
    return test_end();
}
