// Quantization at the speed of memory: 256 MiB of floats (and 4 MiB, in cache), one core, beside memcpy of the same
// machine for the bytes that each must move.
//
// Prints bench<TAB>case<TAB>ours<TAB>unit<TAB>peer<TAB>theirs<TAB>ratio; ours and the peer are measured in turn, the
// medians of the pairs are given. Processor time, so that a shared machine disturbs less. First argument: MiB.
#define _DEFAULT_SOURCE
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "stats.h"

enum { PAIRS = 7, COLS = 4096 };

typedef struct {
    char *memory;
    float *x;    // [rows][COLS]
    float *out;  // [rows][COLS]
    uint8_t *codes, *codes_t;
    void *scales, *scales_t;
    int64_t rows;
    int stats;  // statistics are wanted
} work;

typedef enum { QUANTIZE, FAKE, BOTH, TRANSPOSED, DEQUANTIZE, OPERATIONS } operation;

static const char *const operation_name[OPERATIONS] = { "quantize", "fake", "both", "transposed", "dequantize" };

static const struct {
    const char *name;
    snip_recipe recipe;
    int all;  // every operation, and without statistics; or quantizing alone
} cases[] = {
    {"fp8 1x128",             SNIP_RECIPE_FP8_TILE,                                          1},
    { "fp4 1x128",            SNIP_RECIPE_FP4_TILE,                                          1},
    { "fp4 1x128 stochastic", SNIP_RECIPE_FP4_TILE_SR,                                       1},
    { "fp8 1x128 stochastic", { SNIP_E4M3, 1, 128, SNIP_SCALE_POW2, SNIP_ROUND_STOCHASTIC }, 1},
    { "fp8 128x128",          SNIP_RECIPE_FP8_BLOCK,                                         0},
    { "mxfp4",                SNIP_RECIPE_MXFP4,                                             0},
    { "nvfp4",                SNIP_RECIPE_NVFP4,                                             0},
    { "bf16",                 SNIP_RECIPE_BF16,                                              0},
};

enum { CASES = sizeof cases / sizeof cases[0] };

static void run(const work *w, const snip_recipe *r, operation op) {
    snip_rng_key key = { 1, 2, 3 };
    snip_quant_stats stats, *s = w->stats ? &stats : NULL;
    switch (op) {
        case QUANTIZE: snip_quantize(r, w->x, w->rows, COLS, COLS, w->codes, w->scales, key, NULL, s); break;
        case FAKE: snip_fake_quantize(r, w->x, w->rows, COLS, COLS, w->out, COLS, key, NULL, s); break;
        case BOTH:
            snip_quantize_both(r, r, w->x, w->rows, COLS, COLS, w->codes, w->scales, w->codes_t, w->scales_t, key, s);
            break;
        case TRANSPOSED:
            snip_quantize_transposed(r, w->x, w->rows, COLS, COLS, w->codes, w->scales, key, NULL, s);
            break;
        case DEQUANTIZE: snip_dequantize(r, w->codes, w->scales, w->rows, COLS, w->out, COLS); break;
        case OPERATIONS: break;
    }
}

// Bytes that an operation reads and writes.
static double bytes_of(const work *w, const snip_recipe *r, operation op) {
    double elements = (double)w->rows * COLS, code = snip_format_bits(r->format) / 8.0;
    double scale = (double)snip_scales_bound(r, w->rows, COLS) / elements, one_way = code + scale;
    return elements * (op == FAKE ? 4 + 4 : op == BOTH ? 4 + 2 * one_way : 4 + one_way);
}

static void bench(const work *w, const char *name, const snip_recipe *r, operation op, int64_t mib) {
    const int times = mib < 32 ? 16 : 1;
    const size_t size = (size_t)w->rows * COLS * sizeof(float);
    double ours[PAIRS], copies[PAIRS];
    run(w, r, op);
    for (int i = 0; i < PAIRS; i++) {
        double start = stats_seconds(1);
        for (int j = 0; j < times; j++) run(w, r, op);
        ours[i] = (stats_seconds(1) - start) / times;
        start = stats_seconds(1);
        for (int j = 0; j < times; j++) memcpy(w->out, w->x, size);
        copies[i] = (stats_seconds(1) - start) / times;
    }
    const double speed = bytes_of(w, r, op) / stats_median(ours, PAIRS) * 1e-9;
    const double copy = 2.0 * (double)size / stats_median(copies, PAIRS) * 1e-9;
    printf("bench\t%s %s%s, %lld MiB\t%.2f\tGB/s\tmemcpy\t%.2f\t%.2f\n", operation_name[op], name,
           w->stats ? "" : " without statistics", (long long)mib, speed, copy, speed / copy);
    fflush(stdout);
}

static work make_work(int64_t mib) {
    const int64_t n = mib << 18;
    const size_t bytes = (size_t)n * 4 + 64;
    uint32_t seed = 1;
    work w;
    w.memory = (char *)malloc(5 * bytes);
    if (!w.memory) {
        puts("out of memory");
        exit(1);
    }
    memset(w.memory, 1, 5 * bytes);
    w.x = (float *)(void *)(w.memory + (64 - (uintptr_t)w.memory % 64));
    for (int64_t i = 0; i < n; i++) {  // a rough bell curve
        int sum = 0;
        for (int t = 0; t < 4; t++) {
            seed = seed * 1664525u + 1013904223u;
            sum += (int)(seed >> 16) - 32768;
        }
        w.x[i] = (float)sum * (1.0f / 40000.0f);
    }
    w.rows = n / COLS;
    w.stats = 1;
    w.out = w.x + n;
    w.codes = (uint8_t *)(w.x + 2 * n);
    w.codes_t = w.codes + n;
    w.scales = w.x + 3 * n;
    w.scales_t = w.x + 3 * n + n / 2;
    return w;
}

static void bench_size(int64_t mib) {
    work w = make_work(mib);
    for (int i = 0; i < CASES; i++)
        for (int op = QUANTIZE; op < (cases[i].all ? OPERATIONS : FAKE); op++)
            bench(&w, cases[i].name, &cases[i].recipe, (operation)op, mib);
    w.stats = 0;
    for (int i = 0; i < CASES; i++)
        if (cases[i].all) bench(&w, cases[i].name, &cases[i].recipe, QUANTIZE, mib);
    free(w.memory);
}

int main(int argc, char **argv) {
    if (argc == 1) {
        bench_size(256);
        bench_size(4);
        return 0;
    }
    const int help = !strcmp(argv[1], "-h") || !strcmp(argv[1], "--help");
    const int64_t mib = atoll(argv[1]);
    if (help || argc > 2 || mib < 1 || mib > 4096) {
        fputs("bench_quant [MIB]: the speed of quantization of MIB (1 to 4096) of floats; by default of 256 and of 4\n",
              help ? stdout : stderr);
        return help ? 0 : 2;
    }
    bench_size(mib);
    return 0;
}
