// Quantization at the speed of memory: 256 MiB of floats (and 4 MiB, in cache), one core, beside memcpy of the same
// machine for the bytes that each must move. Prints bench<TAB>case<TAB>ours<TAB>unit<TAB>peer<TAB>theirs<TAB>ratio;
// ours and the peer are measured in turn, the medians of the pairs are given. Processor time, so that a shared
// machine disturbs less. First argument: MiB.
#define _DEFAULT_SOURCE
#define SNIP_IMPLEMENTATION
#include "../snip.h"

enum { PAIRS = 7, COLS = 4096 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, by_value);
    return v[n / 2];
}

typedef struct {
    const float *x;
    float *out;
    uint8_t *codes, *codes_t;
    void *scales, *scales_t;
    int64_t rows;
    int stats;
} work;

typedef enum { QUANTIZE, FAKE, BOTH, TRANSPOSED, DEQUANTIZE } operation;

static const char *const names[] = { "quantize", "fake", "both", "transposed", "dequantize" };

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
    }
}

static void bench(const work *w, const char *name, const snip_recipe *r, operation op, int64_t mib) {
    double ours[PAIRS], copies[PAIRS], elements = (double)w->rows * COLS, code = snip_format_bits(r->format) / 8.0;
    double scale = (double)snip_scales_bound(r, w->rows, COLS) / elements;
    double bytes = elements * (op == FAKE ? 8 : op == BOTH ? 4 + 2 * (code + scale) : 4 + code + scale), gb, copy;
    int i, times = mib < 32 ? 16 : 1, j;
    size_t half = (size_t)w->rows * COLS * 4;
    run(w, r, op);
    for (i = 0; i < PAIRS; i++) {
        double t = now();
        for (j = 0; j < times; j++) run(w, r, op);
        ours[i] = (now() - t) / times;
        t = now();
        for (j = 0; j < times; j++) memcpy(w->out, w->x, half);
        copies[i] = (now() - t) / times;
    }
    gb = bytes / median(ours, PAIRS) * 1e-9;
    copy = 2.0 * (double)half / median(copies, PAIRS) * 1e-9;
    printf("bench\t%s %s%s, %lld MiB\t%.2f\tGB/s\tmemcpy\t%.2f\t%.2f\n", names[op], name,
           w->stats ? "" : " without statistics", (long long)mib, gb, copy, gb / copy);
    fflush(stdout);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        snip_recipe r;
    } recipes[] = {
        {"fp8 1x128",             SNIP_RECIPE_FP8_TILE                                         },
        { "fp4 1x128",            SNIP_RECIPE_FP4_TILE                                         },
        { "fp4 1x128 stochastic", SNIP_RECIPE_FP4_TILE_SR                                      },
        { "fp8 1x128 stochastic", { SNIP_E4M3, 1, 128, SNIP_SCALE_POW2, SNIP_ROUND_STOCHASTIC }},
        { "fp8 128x128",          SNIP_RECIPE_FP8_BLOCK                                        },
        { "mxfp4",                SNIP_RECIPE_MXFP4                                            },
        { "nvfp4",                SNIP_RECIPE_NVFP4                                            },
        { "bf16",                 SNIP_RECIPE_BF16                                             }
    };

    int64_t sizes[2] = { 256, 4 };
    int s, only = argc > 1;
    if (only) {
        int help = !strcmp(argv[1], "-h") || !strcmp(argv[1], "--help");
        sizes[0] = atoll(argv[1]);
        if (help || argc > 2 || sizes[0] < 1 || sizes[0] > 4096) {
            fprintf(
                help ? stdout : stderr,
                "bench_quant [MIB]: the speed of quantization of MIB (1 to 4096) of floats; by default of 256 and of 4\n");
            return help ? 0 : 2;
        }
    }
    for (s = 0; s < (only ? 1 : 2); s++) {
        int64_t n = sizes[s] << 18, i;
        size_t k, bytes = (size_t)n * 4 + 64;
        char *memory = (char *)malloc(5 * bytes);
        uint32_t seed = 1;
        float *x;
        work w;
        if (!memory) {
            puts("out of memory");
            return 1;
        }
        memset(memory, 1, 5 * bytes);
        x = (float *)(void *)(memory + (64 - (uintptr_t)memory % 64));
        for (i = 0; i < n; i++) {  // a rough bell curve
            int t, sum = 0;
            for (t = 0; t < 4; t++) {
                seed = seed * 1664525u + 1013904223u;
                sum += (int)(seed >> 16) - 32768;
            }
            x[i] = (float)sum * (1.0f / 40000.0f);
        }
        w.x = x;
        w.rows = n / COLS;
        w.stats = 1;
        w.out = x + n;
        w.codes = (uint8_t *)(x + 2 * n);
        w.codes_t = w.codes + n;
        w.scales = x + 3 * n;
        w.scales_t = x + 3 * n + n / 2;
        for (k = 0; k < sizeof recipes / sizeof recipes[0]; k++) {
            int op, last = k < 4 ? DEQUANTIZE : QUANTIZE;
            for (op = QUANTIZE; op <= last; op++) bench(&w, recipes[k].name, &recipes[k].r, (operation)op, sizes[s]);
        }
        w.stats = 0;
        for (k = 0; k < 4; k++) bench(&w, recipes[k].name, &recipes[k].r, QUANTIZE, sizes[s]);
        free(memory);
    }
    return 0;
}
