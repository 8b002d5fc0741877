// snip_gemm against references written here, on every instruction set: exactly where the header promises it, closely
// elsewhere; sizes around every block and panel, threads, guards around what is written, refused arguments.
//     test_gemm [seed]     the products of all pairs of formats are taken at sizes drawn from the seed
#include "test.h"
#include <math.h>
#define SNIPI_WORTH 0  // threads for however little
#define SNIP_STATIC    // what is not called is not compiled
#define SNIP_IMPLEMENTATION
#include "../snip.h"

static float uniform(void) { return (float)(random_bits() >> 40) * (1.0f / 8388608.0f) - 1.0f; }

static int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }

#ifdef _OPENMP
enum { THREAD_COUNTS = 4 };
#else
enum { THREAD_COUNTS = 1 };
#endif
static const int thread_count[4] = { 1, 3, 2, 7 };

// ------------------------------------------------------------------------------------------ memory with guards on both
// sides

enum { GUARD = 256 };

typedef struct {
    unsigned char *base, *at;
    size_t size;
} guarded;

static guarded guarded_new(size_t size, size_t misalign) {  // `at` is misaligned by that much from a multiple of 64
    guarded g;
    size_t i, total = size + 2 * GUARD + 128;
    g.base = (unsigned char *)malloc(total);
    if (!g.base) {
        printf("out of memory\n");
        exit(2);
    }
    for (i = 0; i < total; i++) g.base[i] = 0xC5;
    g.at = g.base + GUARD + (64 - ((uintptr_t)g.base + GUARD) % 64) + misalign;
    g.size = size;
    return g;
}

static int guarded_intact(const guarded *g) {
    const unsigned char *p;
    for (p = g->base; p < g->at; p++)
        if (*p != 0xC5) return 0;
    for (p = g->at + g->size; p < g->at + g->size + GUARD / 2; p++)
        if (*p != 0xC5) return 0;
    return 1;
}

static void guarded_free(guarded *g) {
    free(g->base);
    g->base = NULL;
}

static void *exact(size_t size) {  // no byte to spare, so that a sanitizer sees an overrun
    void *p = calloc(1, size ? size : 1);
    if (!p) {
        printf("out of memory\n");
        exit(2);
    }
    return p;
}

// ------------------------------------------------------------------------------------------ operands

typedef struct {
    const char *name;
    snip_recipe recipe;
    int transposed, round_bf16, ld_extra;
} kind;

#define NEAREST SNIP_ROUND_NEAREST_EVEN
static const kind kinds[] = {
    {"f32",               SNIP_RECIPE_F32,                                 0, 0, 0},
    { "f32 ld",           SNIP_RECIPE_F32,                                 0, 0, 5},
    { "f32 T",            SNIP_RECIPE_F32,                                 1, 0, 0},
    { "f32 T ld",         SNIP_RECIPE_F32,                                 1, 0, 3},
    { "f32 as bf16",      SNIP_RECIPE_F32,                                 0, 1, 0},
    { "f32 as bf16 T ld", SNIP_RECIPE_F32,                                 1, 1, 2},
    { "bf16",             SNIP_RECIPE_BF16,                                0, 0, 0},
    { "bf16 ld",          SNIP_RECIPE_BF16,                                0, 0, 7},
    { "bf16 T ld",        SNIP_RECIPE_BF16,                                1, 0, 1},
    { "fp8 tile",         SNIP_RECIPE_FP8_TILE,                            0, 0, 0},
    { "fp8 block",        SNIP_RECIPE_FP8_BLOCK,                           0, 0, 0},
    { "fp8 per tensor",   { SNIP_E4M3, 0, 0, SNIP_SCALE_F32, NEAREST },    0, 0, 0},
    { "e5m2 tile",        { SNIP_E5M2, 1, 128, SNIP_SCALE_POW2, NEAREST }, 0, 0, 0},
    { "e2m3 mx",          { SNIP_E2M3, 1, 32, SNIP_SCALE_UE8M0, NEAREST }, 0, 0, 0},
    { "e3m2 per row",     { SNIP_E3M2, 1, 0, SNIP_SCALE_F32, NEAREST },    0, 0, 0},
    { "mxfp8",            SNIP_RECIPE_MXFP8,                               0, 0, 0},
    { "fp4 tile",         SNIP_RECIPE_FP4_TILE,                            0, 0, 0},
    { "fp4 block",        SNIP_RECIPE_FP4_BLOCK,                           0, 0, 0},
    { "fp4 tile sr",      SNIP_RECIPE_FP4_TILE_SR,                         0, 0, 0},
    { "mxfp4",            SNIP_RECIPE_MXFP4,                               0, 0, 0},
    { "nvfp4",            SNIP_RECIPE_NVFP4,                               0, 0, 0},
    { "fp4 per row",      { SNIP_E2M1, 1, 0, SNIP_SCALE_F32, NEAREST },    0, 0, 0},
    { "fp4 per tensor",   { SNIP_E2M1, 0, 0, SNIP_SCALE_POW2, NEAREST },   0, 0, 0},
    { "fp4 unscaled",     { SNIP_E2M1, 0, 0, SNIP_SCALE_NONE, NEAREST },   0, 0, 0},
    { "fp4 1x48",         { SNIP_E2M1, 1, 48, SNIP_SCALE_F32, NEAREST },   0, 0, 0},
    { "fp4 3x7",          { SNIP_E2M1, 3, 7, SNIP_SCALE_F32, NEAREST },    0, 0, 0},
    { "fp4 1x256",        { SNIP_E2M1, 1, 256, SNIP_SCALE_POW2, NEAREST }, 0, 0, 0},
    { "fp4 5x528",        { SNIP_E2M1, 5, 528, SNIP_SCALE_F32, NEAREST },  0, 0, 0}
};

enum { KINDS = (int)(sizeof kinds / sizeof kinds[0]) };

typedef struct {
    const kind *kind;
    int64_t rows, k;
    void *codes, *scales;
    double *value;  // [rows][k]: what the operand stands for
    snip_operand operand;
} operand;

static float bf16_of(float x) {  // round to nearest even, written anew
    uint32_t u, rest;
    memcpy(&u, &x, 4);
    rest = u & 0xFFFFu;
    u &= 0xFFFF0000u;
    if (rest > 0x8000u || (rest == 0x8000u && (u & 0x10000u))) u += 0x10000u;
    memcpy(&x, &u, 4);
    return x;
}

static operand operand_new(const kind *kd, int64_t rows, int64_t k, uint32_t tensor) {
    operand o;
    const snip_recipe *r = &kd->recipe;
    int64_t i, j, count = rows * k;
    float *x = (float *)exact((size_t)count * sizeof(float));
    memset(&o, 0, sizeof o);
    o.kind = kd;
    o.rows = rows;
    o.k = k;
    o.value = (double *)exact((size_t)count * sizeof(double));
    for (i = 0; i < rows; i++) {
        float size = ldexpf(1.0f, (int)below(9) - 4);  // rows and elements of different magnitude
        for (j = 0; j < k; j++) x[i * k + j] = uniform() * uniform() * size;
    }
    o.operand.recipe = r;
    if (r->format == SNIP_F32 || r->format == SNIP_BF16) {
        int64_t across = (kd->transposed ? rows : k), ld = across + kd->ld_extra, lines = kd->transposed ? k : rows;
        size_t element = r->format == SNIP_F32 ? sizeof(float) : sizeof(uint16_t);
        size_t size = lines && across ? (size_t)((lines - 1) * ld + across) * element
                                      : 0;  // the last row without its padding
        o.codes = exact(size);
        memset(o.codes, 0xFF, size);  // NaN between the rows
        for (i = 0; i < rows; i++)
            for (j = 0; j < k; j++) {
                int64_t at = kd->transposed ? j * ld + i : i * ld + j;
                float v = x[i * k + j];
                if (r->format == SNIP_F32)
                    ((float *)o.codes)[at] = v;
                else {
                    uint32_t u;
                    v = bf16_of(v);
                    memcpy(&u, &v, 4);
                    ((uint16_t *)o.codes)[at] = (uint16_t)(u >> 16);
                }
                o.value[i * k + j] = kd->round_bf16 ? bf16_of(v) : v;
            }
        o.operand.ld = kd->ld_extra ? ld : 0;
        o.operand.transposed = kd->transposed;
        o.operand.round_bf16 = kd->round_bf16;
    } else {
        snip_rng_key key;
        key.seed = 77;
        key.step = 1;
        key.tensor = tensor;
        o.codes = exact(snip_codes_bound(r, rows, k));
        o.scales = exact(snip_scales_bound(r, rows, k));
        CHECK(snip_quantize(r, x, rows, k, k, o.codes, o.scales, key, NULL, NULL) == SNIP_OK);
        CHECK(snip_dequantize(r, o.codes, o.scales, rows, k, x, k) == SNIP_OK);
        if (r->format == SNIP_E2M1 && k % 2)  // the padding nibble is nobody's business
            for (i = 0; i < rows; i++) ((unsigned char *)o.codes)[(i + 1) * ((k + 1) / 2) - 1] |= 0x70;
        for (i = 0; i < count; i++) o.value[i] = (double)x[i];
    }
    o.operand.codes = o.codes;
    o.operand.scales = o.scales;
    free(x);
    return o;
}

static void operand_free(operand *o) {
    free(o->codes);
    free(o->scales);
    free(o->value);
}

// ------------------------------------------------------------------------------------------ references

static const int twice_e2m1[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

static float scale_at(const operand *o, int64_t row, int64_t col) {  // read by the documented layout alone
    const snip_recipe *r = &o->kind->recipe;
    int64_t tr = r->tile_rows ? r->tile_rows : o->rows, tc = r->tile_cols ? r->tile_cols : o->k;
    int64_t across = (o->k + tc - 1) / tc, tiles = across * ((o->rows + tr - 1) / tr), i = row / tr * across + col / tc;
    const unsigned char *bytes = (const unsigned char *)o->scales;
    float tensor;
    switch (r->scale) {
        case SNIP_SCALE_F32:
        case SNIP_SCALE_POW2: return ((const float *)o->scales)[i];
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE8M0_UP: return ldexpf(1.0f, (int)bytes[i] - 127);
        case SNIP_SCALE_UE4M3:
            memcpy(&tensor, bytes + (tiles + 3) / 4 * 4, 4);
            return (bytes[i] < 8 ? ldexpf((float)bytes[i], -9)
                                 : ldexpf((float)(8 + (bytes[i] & 7)), (bytes[i] >> 3) - 10)) *
                   tensor;
        case SNIP_SCALE_NONE: break;
    }
    return 1.0f;
}

static int64_t block_of(const operand *o) {
    int32_t t = o->kind->recipe.tile_cols;
    if (o->kind->recipe.scale == SNIP_SCALE_NONE && t == 0) return o->k;
    return t == 0 || t > o->k ? o->k : t;
}

static int is_fp4(const operand *o) { return o->kind->recipe.format == SNIP_E2M1; }

// The scale block of two E2M1 operands whose product is exact by contract, or 0.
static int64_t exact_block(const operand *a, const operand *b) {
    int64_t ta = block_of(a), tb = block_of(b), small = ta < tb ? ta : tb, large = ta < tb ? tb : ta;
    if (!is_fp4(a) || !is_fp4(b) || a->k == 0) return 0;
    if (large % small && large < a->k) return 0;
    return small == a->k || small % 16 == 0 ? small : 0;
}

static void reference_exact(const operand *a, const operand *b, int64_t block, float *c, int64_t ldc, int accumulate,
                            const float *bias) {
    int64_t i, j, k, end;
    for (i = 0; i < a->rows; i++)
        for (j = 0; j < b->rows; j++) {
            const unsigned char *x = (const unsigned char *)a->codes + i * ((a->k + 1) / 2),
                                *y = (const unsigned char *)b->codes + j * ((a->k + 1) / 2);
            float v = accumulate ? c[i * ldc + j] : bias ? bias[j] : 0.0f;
            for (k = 0; k < a->k; k = end) {
                int64_t sum = 0, from = k;
                float sa, sb, s;
                for (end = from + block < a->k ? from + block : a->k; k < end; k++)
                    sum += twice_e2m1[x[k / 2] >> 4 * (k & 1) & 15] * twice_e2m1[y[k / 2] >> 4 * (k & 1) & 15];
                sa = 0.5f * scale_at(a, i, from);
                sb = 0.5f * scale_at(b, j, from);
                s = sa * sb;
                v = fmaf(s, (float)sum, v);
            }
            if (accumulate && bias) v += bias[j];
            c[i * ldc + j] = v;
        }
}

// Relative Frobenius distance of c from the double product; c0 is what c held before. The norm is no smaller than
// what terms of random sign give, so that a single element that cancels to nothing does not count as an error.
static double distance(const operand *a, const operand *b, const float *c, const float *c0, int64_t ldc, int accumulate,
                       const float *bias) {
    double err = 0, all = 0, usual = 0;
    int64_t i, j, k;
    for (i = 0; i < a->rows; i++)
        for (j = 0; j < b->rows; j++) {
            double v = (accumulate ? (double)c0[i * ldc + j] : 0) + (bias ? (double)bias[j] : 0), e;
            for (k = 0; k < a->k; k++) {
                double term = a->value[i * a->k + k] * b->value[j * a->k + k];
                v += term;
                usual += term * term;
            }
            e = (double)c[i * ldc + j] - v;
            err += e * e;
            all += v * v;
        }
    if (err == 0) return 0;
    if (usual > all) all = usual;
    return all > 0 ? sqrt(err / all) : 1e30;
}

// ------------------------------------------------------------------------------------------ one product, every
// instruction set

static long exact_cases, close_cases;
static double worst_f32, worst_other;

static void multiply(const kind *ka, const kind *kb, int64_t m, int64_t n, int64_t k, int accumulate, int with_bias,
                     int64_t ldc_extra, int threads) {
    operand a = operand_new(ka, m, k, 1), b = operand_new(kb, n, k, 2);
    int64_t ldc = n + ldc_extra, block = exact_block(&a, &b), i, j;
    size_t count = m ? (size_t)((m - 1) * ldc + n) : 0, size = count * sizeof(float);
    float *c0 = (float *)exact(size), *expected = (float *)exact(size), *first = (float *)exact(size), *bias = NULL;
    int plain = (ka->recipe.format == SNIP_F32 || ka->recipe.format == SNIP_BF16) &&
                (kb->recipe.format == SNIP_F32 || kb->recipe.format == SNIP_BF16);
    int isa, t;
    for (i = 0; i < (int64_t)count; i++) c0[i] = uniform();
    if (with_bias) {
        bias = (float *)exact((size_t)n * sizeof(float));
        for (j = 0; j < n; j++) bias[j] = uniform();
    }
    memcpy(expected, c0, size);
    if (block) reference_exact(&a, &b, block, expected, ldc, accumulate, bias);
    for (isa = SNIP_ISA_BEST; isa < SNIP_ISA_COUNT; isa++) {
        if (!snip_isa_available((snip_isa)isa) || (isa == SNIP_ISA_BEST && below(4)))
            continue;  // the best is one of the others
        for (t = 0; t < threads && t < THREAD_COUNTS; t++) {
            guarded c = guarded_new(size, 4 * (size_t)below(16)),
                    scratch = guarded_new(snip_gemm_scratch(m, n, k), (size_t)below(64));
            float *out = (float *)(void *)c.at;
            int gap = 1;
            test_about("%s * %s, m %lld n %lld k %lld, accumulate %d bias %d ldc +%lld, %s, %d threads", ka->name,
                       kb->name, (long long)m, (long long)n, (long long)k, accumulate, with_bias, (long long)ldc_extra,
                       snip_isa_name((snip_isa)isa), thread_count[t]);
            set_threads(thread_count[t]);
            if (size) memcpy(out, c0, size);
            CHECK(snip_gemm(m, n, k, &a.operand, &b.operand, out, ldc, accumulate, bias, scratch.at, (snip_isa)isa) ==
                  SNIP_OK);
            CHECK(guarded_intact(&c));
            CHECK(guarded_intact(&scratch));
            for (i = 0; i + 1 < m; i++)
                for (j = n; j < ldc; j++) gap &= memcmp(&out[i * ldc + j], &c0[i * ldc + j], sizeof(float)) == 0;
            CHECK(gap);
            if (block) {
                CHECK(memcmp(out, expected, size) == 0);
                exact_cases++;
            } else if (t == 0) {
                double d = distance(&a, &b, out, c0, ldc, accumulate, bias);
                CHECK(d < (plain ? 1e-6 : 2e-6));
                if (plain && d > worst_f32) worst_f32 = d;
                if (!plain && d > worst_other) worst_other = d;
                close_cases++;
            }
            if (t == 0)
                memcpy(first, out, size);
            else
                CHECK(memcmp(first, out, size) == 0);
            guarded_free(&c);
            guarded_free(&scratch);
        }
    }
    set_threads(1);
    free(c0);
    free(expected);
    free(first);
    free(bias);
    operand_free(&a);
    operand_free(&b);
}

static void test_all_pairs(void) {
    static const int64_t ks[] = { 1,  2,  3,  4,   5,   15,  16,  17,  31,  32,  33, 47,
                                  48, 49, 96, 127, 128, 129, 200, 255, 256, 257, 300 };
    int a, b;
    for (a = 0; a < KINDS; a++)
        for (b = 0; b < KINDS; b++) {
            int64_t m = 1 + below(40), n = 1 + below(40), k = ks[below((int64_t)(sizeof ks / sizeof ks[0]))];
            if ((a + b) % test.few == 0)
                multiply(&kinds[a], &kinds[b], m, n, k, (int)below(2), (int)below(2), below(3) ? below(9) : 0, 2);
        }
}

// Panels, chunks of panels and k-blocks: sizes to either side of each.
static void test_edges(void) {
    static const struct {
        int64_t m, n, k;
    } sizes[] = {
        {127,  129, 128 },
        { 128, 128, 513 },
        { 129, 127, 640 },
        { 257, 33,  129 },
        { 13,  257, 512 },
        { 97,  260, 100 },
        { 12,  32,  511 },
        { 24,  64,  1030},
        { 1,   1,   2049},
        { 3,   5,   1057},
        { 49,  17,  768 },
        { 6,   16,  256 }
    };

    static const int pairs[][2] = {
        {0,   0 },
        { 3,  2 },
        { 6,  8 },
        { 4,  5 },
        { 9,  10},
        { 12, 9 },
        { 15, 15},
        { 16, 17},
        { 18, 16},
        { 19, 19},
        { 20, 20},
        { 21, 22},
        { 22, 16},
        { 23, 19},
        { 24, 24},
        { 24, 16},
        { 25, 21},
        { 26, 16},
        { 27, 22},
        { 27, 27},
        { 20, 27},
        { 0,  16},
        { 11, 14}
    };
    int s, p, all = (int)(sizeof sizes / sizeof sizes[0]);
    for (p = 0; p < (int)(sizeof pairs / sizeof pairs[0]); p++)
        for (s = test.few > 1 ? p % all : p % 3; s<all; s += test.few> 1 ? all : 3) {
            int64_t m = test.few > 1 && sizes[s].m > 96 ? sizes[s].m - 96 : sizes[s].m;
            multiply(&kinds[pairs[p][0]], &kinds[pairs[p][1]], m, sizes[s].n, sizes[s].k, (int)below(2), (int)below(2),
                     below(5), s % 2 ? 4 : 2);
        }
}

// Every m and n from 1 to 40 at least once.
static void test_small(void) {
    int64_t i;
    for (i = 1; i <= 40; i++) {
        multiply(&kinds[16], &kinds[17], i, 41 - i, 1 + below(40), 0, 0, 0, 1);
        multiply(&kinds[20], &kinds[19], 41 - i, i, i, 1, 1, 1, 1);
        multiply(&kinds[0], &kinds[2], i, 1 + below(40), i, 0, 1, 2, 1);
        multiply(&kinds[9], &kinds[10], 1 + below(40), i, 1 + below(160), 1, 0, 0, 1);
    }
}

// Operands drawn at random: every format and scale, tiles of any width along k, transposition, padding, threads. The
// widths that a block of BF16 cannot be cut to (272, 304, 528, ...) are among them, with k beyond a tile.
static kind random_kind(void) {
    static const snip_format formats[] = { SNIP_F32, SNIP_BF16, SNIP_E4M3, SNIP_E5M2, SNIP_E2M1, SNIP_E2M3, SNIP_E3M2 };
    static const snip_scale scales[] = { SNIP_SCALE_NONE,  SNIP_SCALE_F32,      SNIP_SCALE_POW2,
                                         SNIP_SCALE_UE8M0, SNIP_SCALE_UE8M0_UP, SNIP_SCALE_UE4M3 };
    kind random;
    memset(&random, 0, sizeof random);
    random.name = "random";
    random.recipe.format = formats[below(7)];
    if (random.recipe.format == SNIP_F32 || random.recipe.format == SNIP_BF16) {
        static const snip_recipe f32 = SNIP_RECIPE_F32, bf16 = SNIP_RECIPE_BF16;
        random.round_bf16 = random.recipe.format == SNIP_F32 && below(2);
        random.recipe = random.recipe.format == SNIP_F32 ? f32 : bf16;
        random.transposed = (int)below(2);
        random.ld_extra = below(2) ? (int)below(9) : 0;
        return random;
    }
    random.recipe.scale = scales[below(random.recipe.format == SNIP_E2M1 ? 6 : 5)];
    random.recipe.rounding = NEAREST;
    random.recipe.tile_rows = below(2) ? 1 : (int32_t)below(40);
    switch (below(4)) {
        case 0: random.recipe.tile_cols = 0; break;
        case 1: random.recipe.tile_cols = (int32_t)(1 + below(40)); break;
        case 2: random.recipe.tile_cols = (int32_t)(16 * (1 + below(40))); break;
        default: random.recipe.tile_cols = (int32_t)(16 * (17 + below(17))); break;
    }
    return random;
}

static void test_random(void) {
    const int cases = 400 / test.few;
    for (int i = 0; i < cases; i++) {
        kind a = random_kind(), b = random_kind();
        if (below(2) && b.recipe.scale != SNIP_SCALE_NONE) b.recipe.tile_cols = a.recipe.tile_cols;
        const uint64_t state = random_state;
        const int64_t k = 1 + below(below(4) ? 700 : 1700), m = 1 + below(40), n = 1 + below(70);
        const long failed_before = test.failed;
        multiply(&a, &b, m, n, k, (int)below(2), (int)below(2), below(3) ? below(9) : 0, 2);
        if (test.failed > failed_before)
            printf("random case %d, state %llu: formats %d, %d; tiles %dx%d, %dx%d; scales %d, %d; transposed %d, %d\n",
                   i, (unsigned long long)state, (int)a.recipe.format, (int)b.recipe.format, (int)a.recipe.tile_rows,
                   (int)a.recipe.tile_cols, (int)b.recipe.tile_rows, (int)b.recipe.tile_cols, (int)a.recipe.scale,
                   (int)b.recipe.scale, a.transposed, b.transposed);
    }
}

// B's panels, packed once and then found, are those that snip_gemm packs, also where a pass is cut short.
static void test_held(void) {
    for (int i = 0; i < 60 / test.few; i++) {
        const kind ka = random_kind(), kb = random_kind();
        const int64_t m = 1 + below(40), n = 1 + below(70), k = 1 + below(2600);
        operand a = operand_new(&ka, m, k, 1), b = operand_new(&kb, n, k, 2);
        for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
            if (!snip_isa_available((snip_isa)isa)) continue;
            test_about("held, case %d, formats %d, %d, m %lld n %lld k %lld, %s", i, (int)ka.recipe.format,
                       (int)kb.recipe.format, (long long)m, (long long)n, (long long)k, snip_isa_name((snip_isa)isa));
            const size_t bytes = snipi_gemm_held(m, n, k, &a.operand, &b.operand, (snip_isa)isa);
            const size_t size = (size_t)(m * n) * sizeof(float);
            guarded held = guarded_new(bytes, (size_t)below(64));
            guarded scratch = guarded_new(snip_gemm_scratch(m, n, k), (size_t)below(64));
            float *once = (float *)exact(size), *again = (float *)exact(size), *plain = (float *)exact(size);
            snip_operand bare;
            memset(&bare, 0, sizeof bare);
            bare.recipe = b.operand.recipe;
            bare.round_bf16 = b.operand.round_bf16;
            CHECK(snip_gemm(m, n, k, &a.operand, &b.operand, plain, n, 0, NULL, scratch.at, (snip_isa)isa) == SNIP_OK);
            CHECK(snipi_gemm_with(m, n, k, &a.operand, &b.operand, once, n, 0, NULL, scratch.at, (snip_isa)isa, held.at,
                                  1, NULL) == SNIP_OK);
            CHECK(snipi_gemm_with(m, n, k, &a.operand, &bare, again, n, 0, NULL, scratch.at, (snip_isa)isa, held.at, 0,
                                  NULL) == SNIP_OK);
            CHECK(!memcmp(once, plain, size) && !memcmp(again, plain, size));
            CHECK(guarded_intact(&held) && guarded_intact(&scratch));
            guarded_free(&held);
            guarded_free(&scratch);
            free(once);
            free(again);
            free(plain);
        }
        operand_free(&a);
        operand_free(&b);
    }
}

// Elements that are not finite are counted once each, whatever the panels, the passes and the threads.
static void test_counts(void) {
    static const snip_recipe f32 = SNIP_RECIPE_F32;
    for (int i = 0; i < 40 / test.few + 4; i++) {
        const int64_t m = 1 + below(300), n = 1 + below(70), k = 1 + below(2300);
        float *x = (float *)exact((size_t)(m * k) * sizeof(float)),
              *w = (float *)exact((size_t)(n * k) * sizeof(float));
        float *c = (float *)exact((size_t)(m * n) * sizeof(float));
        int64_t bad[2] = { 0, 0 };
        snip_operand a, b;
        memset(&a, 0, sizeof a);
        a.recipe = &f32;
        a.codes = x;
        a.transposed = (int)below(2);
        a.round_bf16 = (int)below(2);
        b = a;
        b.codes = w;
        b.transposed = (int)below(2);
        for (int64_t j = 0; j < m * k; j++) x[j] = below(500) ? 3.4e38f : below(2) ? INFINITY : NAN;
        for (int64_t j = 0; j < n * k; j++) w[j] = below(500) ? uniform() : -INFINITY;
        for (int64_t j = 0; j < m * k; j++) bad[0] += snipi_nonfinite(x[j]);
        for (int64_t j = 0; j < n * k; j++) bad[1] += snipi_nonfinite(w[j]);
        for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++)
            for (int t = 0; t < 2 && t < THREAD_COUNTS && snip_isa_available((snip_isa)isa); t++) {
                guarded scratch = guarded_new(snip_gemm_scratch(m, n, k), (size_t)below(64));
                int64_t counts[2] = { -1, -1 };
                test_about("counts, m %lld n %lld k %lld, transposed %d %d, rounded %d, %s, %d threads", (long long)m,
                           (long long)n, (long long)k, a.transposed, b.transposed, a.round_bf16,
                           snip_isa_name((snip_isa)isa), thread_count[t]);
                set_threads(thread_count[t]);
                CHECK(snipi_gemm_with(m, n, k, &a, &b, c, n, 0, NULL, scratch.at, (snip_isa)isa, NULL, 0, counts) ==
                      SNIP_OK);
                CHECK(counts[0] == bad[0] && counts[1] == bad[1]);
                CHECK(guarded_intact(&scratch));
                guarded_free(&scratch);
            }
        set_threads(1);
        free(x);
        free(w);
        free(c);
    }
}

static void test_empty(void) {
    int p, accumulate, bias;
    static const int pairs[][2] = {
        {0,   0 },
        { 2,  8 },
        { 9,  10},
        { 16, 17},
        { 20, 20},
        { 22, 25}
    };
    for (p = 0; p < (int)(sizeof pairs / sizeof pairs[0]); p++)
        for (accumulate = 0; accumulate < 2; accumulate++)
            for (bias = 0; bias < 2; bias++) {
                const kind *a = &kinds[pairs[p][0]], *b = &kinds[pairs[p][1]];
                multiply(a, b, 5, 7, 0, accumulate, bias, 2, 2);
                multiply(a, b, 0, 7, 9, accumulate, bias, 0, 1);
                multiply(a, b, 5, 0, 9, accumulate, bias, 3, 1);
                multiply(a, b, 0, 0, 0, accumulate, bias, 0, 1);
            }
    {  // k = 0 needs neither codes nor scratch
        snip_recipe r = SNIP_RECIPE_F32;
        snip_operand o;
        float c[2] = { 3, 4 }, bias2[2] = { 1, 2 };
        memset(&o, 0, sizeof o);
        o.recipe = &r;
        test_about("k = 0");
        CHECK(snip_gemm(1, 2, 0, &o, &o, c, 2, 1, NULL, NULL, SNIP_ISA_BEST) == SNIP_OK && c[0] == 3 && c[1] == 4);
        CHECK(snip_gemm(1, 2, 0, &o, &o, c, 2, 0, bias2, NULL, SNIP_ISA_BEST) == SNIP_OK && c[0] == 1 && c[1] == 2);
        CHECK(snip_gemm(1, 2, 0, &o, &o, c, 2, 0, NULL, NULL, SNIP_ISA_BEST) == SNIP_OK && c[0] == 0 && c[1] == 0);
    }
}

// The largest products, all of one sign: sums that would leave 16 bits.
static void test_largest(void) {
    enum { M = 5, N = 9, K = 2300 };

    static unsigned char a[M * K / 2], b[N * K / 2];
    static float c[M * N], one = 1;
    snip_recipe r = { SNIP_E2M1, 0, 0, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN };
    snip_operand oa, ob;
    unsigned char *scratch = (unsigned char *)exact(snip_gemm_scratch(M, N, K));
    int isa, i, sign;
    memset(&oa, 0, sizeof oa);
    memset(&ob, 0, sizeof ob);
    oa.recipe = ob.recipe = &r;
    oa.codes = a;
    ob.codes = b;
    oa.scales = ob.scales = &one;
    for (isa = 0; isa < SNIP_ISA_COUNT; isa++)
        for (sign = 0; sign < 4 && snip_isa_available((snip_isa)isa); sign++) {
            int ok = 1;
            test_about("largest products, %s", snip_isa_name((snip_isa)isa));
            memset(a, sign & 1 ? 0xFF : 0x77, sizeof a);
            memset(b, sign & 2 ? 0xFF : 0x77, sizeof b);
            CHECK(snip_gemm(M, N, K, &oa, &ob, c, N, 0, NULL, scratch, (snip_isa)isa) == SNIP_OK);
            for (i = 0; i < M * N; i++) ok &= c[i] == (sign == 1 || sign == 2 ? -36.0f : 36.0f) * K;
            CHECK(ok);
        }
    free(scratch);
}

// A row of NaN or infinity stays in its row.
static void test_nonfinite(void) {
    enum { M = 29, N = 37, K = 65 };

    static const snip_recipe recipes[3] = {
        SNIP_RECIPE_F32, SNIP_RECIPE_BF16, {SNIP_E5M2, 0, 0, SNIP_SCALE_NONE, SNIP_ROUND_NEAREST_EVEN}
    };
    static float a[M * K], b[N * K], c[M * N];
    static uint16_t a16[M * K], b16[N * K];
    static uint8_t a8[M * K], b8[N * K];
    snip_operand oa, ob;
    unsigned char *scratch = (unsigned char *)exact(snip_gemm_scratch(M, N, K));
    int isa, f, i, j, bad_a = 13, bad_b = 33;
    memset(&oa, 0, sizeof oa);
    memset(&ob, 0, sizeof ob);
    for (i = 0; i < M * K; i++) {
        a[i] = uniform();
        a16[i] = snip_bf16_from_f32(a[i]);
        a8[i] = snip_e5m2_from_f32(a[i]);
    }
    for (i = 0; i < N * K; i++) {
        b[i] = uniform();
        b16[i] = snip_bf16_from_f32(b[i]);
        b8[i] = snip_e5m2_from_f32(b[i]);
    }
    a[bad_a * K + 64] = INFINITY;
    a16[bad_a * K + 64] = 0x7F80;
    a8[bad_a * K + 64] = 0x7C;
    b[bad_b * K + 3] = NAN;
    b16[bad_b * K + 3] = 0x7FC0;
    b8[bad_b * K + 3] = 0x7E;
    for (f = 0; f < 3; f++)
        for (isa = 0; isa < SNIP_ISA_COUNT; isa++) {
            int ok = 1;
            if (!snip_isa_available((snip_isa)isa)) continue;
            oa.recipe = ob.recipe = &recipes[f];
            oa.codes = f == 0 ? (void *)a : f == 1 ? (void *)a16 : (void *)a8;
            ob.codes = f == 0 ? (void *)b : f == 1 ? (void *)b16 : (void *)b8;
            test_about("not finite, %s, %s", snip_format_name(recipes[f].format), snip_isa_name((snip_isa)isa));
            CHECK(snip_gemm(M, N, K, &oa, &ob, c, N, 0, NULL, scratch, (snip_isa)isa) == SNIP_OK);
            for (i = 0; i < M; i++)
                for (j = 0; j < N; j++) ok &= snipi_nonfinite(c[i * N + j]) == (i == bad_a || j == bad_b);
            CHECK(ok);
        }
    free(scratch);
}

// FP8 whose values are subnormal floats beside large ones is as exact as any. BF16 below 2^-126 is zero to BF16 units
// alone.
static void test_tiny(void) {
    enum { M = 35, N = 34, K = 200, TILES = 2 };

    static const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, bf16 = SNIP_RECIPE_BF16;
    static uint8_t a8[M * K], b8[N * K];
    static uint16_t a16[M * K], b16[N * K];
    static float sa[M * TILES], sb[N * TILES], c[M * N];
    snip_operand oa, ob;
    unsigned char *scratch = (unsigned char *)exact(snip_gemm_scratch(M, N, K));
    int isa, f, i, j, k;
    memset(&oa, 0, sizeof oa);
    memset(&ob, 0, sizeof ob);
    for (i = 0; i < M * K; i++) {
        a8[i] = (uint8_t)(random_bits() % 127 | random_bits() % 2 << 7);
        a16[i] = (uint16_t)(random_bits() % 0x80 | random_bits() % 2 << 15);
    }
    for (i = 0; i < N * K; i++) {
        b8[i] = (uint8_t)(random_bits() % 127 | random_bits() % 2 << 7);
        b16[i] = (uint16_t)((127 + 80) << 7 | random_bits() % 0x80);
    }
    for (i = 0; i < M * TILES; i++) sa[i] = ldexpf(1.0f, -120 - (int)below(7));
    for (i = 0; i < N * TILES; i++) sb[i] = ldexpf(1.0f, 60 + (int)below(7));
    for (f = 0; f < 2; f++)
        for (isa = 0; isa < SNIP_ISA_COUNT; isa++) {
            double err = 0, all = 0;
            int flushes = f == 1 && (isa == SNIP_ISA_AMX || isa == SNIP_ISA_AVX512_BF16 ||
                                     (isa == SNIP_ISA_BEST && snipi_kernels_of(snipi_best_isa()).bf16)),
                zero = 1;
            if (!snip_isa_available((snip_isa)isa)) continue;
            oa.recipe = ob.recipe = f ? &bf16 : &fp8;
            oa.codes = f ? (void *)a16 : (void *)a8;
            oa.scales = f ? NULL : sa;
            ob.codes = f ? (void *)b16 : (void *)b8;
            ob.scales = f ? NULL : sb;
            test_about("tiny %s, %s", f ? "bf16" : "fp8", snip_isa_name((snip_isa)isa));
            CHECK(snip_gemm(M, N, K, &oa, &ob, c, N, 0, NULL, scratch, (snip_isa)isa) == SNIP_OK);
            for (i = 0; i < M; i++)
                for (j = 0; j < N; j++) {
                    double sum = 0, e;
                    for (k = 0; k < K; k++)
                        sum += f ? (double)snip_bf16_to_f32(a16[i * K + k]) * (double)snip_bf16_to_f32(b16[j * K + k])
                                 : (double)snip_e4m3_to_f32(a8[i * K + k]) * (double)sa[i * TILES + k / 128] *
                                       (double)snip_e4m3_to_f32(b8[j * K + k]) * (double)sb[j * TILES + k / 128];
                    e = (double)c[i * N + j] - sum;
                    err += e * e;
                    all += sum * sum;
                    zero &= c[i * N + j] == 0;
                }
            CHECK(flushes ? zero : err < 2e-6 * 2e-6 * all);
        }
    free(scratch);
}

// ------------------------------------------------------------------------------------------ refused arguments

static void refuse(const char *name, snip_status expected, int64_t m, int64_t n, int64_t k, const snip_operand *a,
                   const snip_operand *b, int64_t ldc, int with_scratch, int isa) {
    static float c[64];
    static double scratch[16384];
    int i, same = 1;
    test_about("refused: %s", name);
    for (i = 0; i < 64; i++) c[i] = (float)i;
    CHECK(snip_gemm_scratch(4, 4, 8) <= sizeof scratch);
    CHECK(snip_gemm(m, n, k, a, b, c, ldc, 0, NULL, with_scratch ? scratch : NULL, (snip_isa)isa) == expected);
    for (i = 0; i < 64; i++) same &= c[i] == (float)i;
    CHECK(same);
}

static void test_refused(void) {
    static const float x[64] = { 1 };
    static const unsigned char codes[64] = { 1 }, byte_scales[64] = { 127 };
    static const float scales[16] = { 1 };
    snip_recipe f32 = SNIP_RECIPE_F32, fp4 = SNIP_RECIPE_FP4_TILE, bad;
    snip_operand f, q, o;
    snip_status bad_arg = SNIP_BAD_ARGUMENT;
    int isa, i;
    memset(&f, 0, sizeof f);
    memset(&q, 0, sizeof q);
    f.recipe = &f32;
    f.codes = x;
    q.recipe = &fp4;
    q.codes = codes;
    q.scales = scales;
    refuse("m < 0", bad_arg, -1, 4, 8, &f, &f, 4, 1, 0);
    refuse("n < 0", bad_arg, 4, -1, 8, &f, &f, 4, 1, 0);
    refuse("k < 0", bad_arg, 4, 4, -1, &f, &f, 4, 1, 0);
    refuse("ldc < n", bad_arg, 4, 4, 8, &f, &f, 3, 1, 0);
    refuse("ldc < 0", bad_arg, 4, 4, 8, &f, &f, -4, 1, 0);
    refuse("m * ldc overflows", bad_arg, (int64_t)1 << 40, 4, 8, &f, &f, (int64_t)1 << 40, 1, 0);
    refuse("a NULL", bad_arg, 4, 4, 8, NULL, &f, 4, 1, 0);
    refuse("b NULL", bad_arg, 4, 4, 8, &f, NULL, 4, 1, 0);
    refuse("scratch NULL", bad_arg, 4, 4, 8, &f, &f, 4, 0, 0);
    refuse("isa < 0", bad_arg, 4, 4, 8, &f, &f, 4, 1, -1);
    refuse("isa too large", bad_arg, 4, 4, 8, &f, &f, 4, 1, SNIP_ISA_COUNT);
    for (isa = 0; isa < SNIP_ISA_COUNT; isa++)
        if (!snip_isa_available((snip_isa)isa)) refuse("isa not here", SNIP_UNSUPPORTED, 4, 4, 8, &f, &f, 4, 1, isa);
    o = f;
    o.recipe = NULL;
    refuse("recipe NULL", bad_arg, 4, 4, 8, &o, &f, 4, 1, 0);
    o = f;
    o.codes = NULL;
    refuse("codes NULL", bad_arg, 4, 4, 8, &f, &o, 4, 1, 0);
    o = f;
    o.ld = 7;
    refuse("ld < k", bad_arg, 4, 4, 8, &o, &f, 4, 1, 0);
    o = f;
    o.ld = -8;
    refuse("ld < 0", bad_arg, 4, 4, 8, &f, &o, 4, 1, 0);
    o = f;
    o.ld = 3;
    o.transposed = 1;
    refuse("ld < rows", bad_arg, 4, 4, 8, &o, &f, 4, 1, 0);
    o = q;
    o.codes = NULL;
    refuse("fp4 codes NULL", bad_arg, 4, 4, 8, &o, &q, 4, 1, 0);
    o = q;
    o.scales = NULL;
    refuse("fp4 scales NULL", bad_arg, 4, 4, 8, &q, &o, 4, 1, 0);
    o = q;
    o.ld = 8;
    refuse("fp4 with ld", bad_arg, 4, 4, 8, &o, &q, 4, 1, 0);
    o = q;
    o.transposed = 1;
    refuse("fp4 transposed", bad_arg, 4, 4, 8, &o, &q, 4, 1, 0);
    o = q;
    o.round_bf16 = 1;
    refuse("fp4 rounded to bf16", bad_arg, 4, 4, 8, &q, &o, 4, 1, 0);
    for (i = 0; i < 10; i++) {
        bad = fp4;
        switch (i) {
            case 0: bad.format = (snip_format)0; break;
            case 1: bad.format = SNIP_UE8M0; break;
            case 2: bad.format = (snip_format)99; break;
            case 3: bad.tile_rows = -1; break;
            case 4: bad.tile_cols = -128; break;
            case 5: bad.scale = (snip_scale)9; break;
            case 6: bad.rounding = (snip_rounding)2; break;
            case 7:
                bad.format = SNIP_E4M3;
                bad.scale = SNIP_SCALE_UE4M3;
                break;
            case 8: bad.format = SNIP_F32; break;
            default:
                bad = f32;
                bad.rounding = SNIP_ROUND_STOCHASTIC;
                break;
        }
        o = q;
        o.recipe = &bad;
        o.scales = byte_scales;
        refuse("recipe", bad_arg, 4, 4, 8, &o, &q, 4, 1, 0);
        refuse("recipe", bad_arg, 4, 4, 8, &q, &o, 4, 1, 0);
    }
    test_about("c NULL");
    {
        static double scratch[16384];
        CHECK(snip_gemm(4, 4, 8, &f, &f, NULL, 4, 0, NULL, scratch, SNIP_ISA_BEST) == SNIP_BAD_ARGUMENT);
        CHECK(snip_gemm(0, 4, 8, &f, &f, NULL, 4, 0, NULL, NULL, SNIP_ISA_BEST) == SNIP_OK);
    }
    test_about("scratch size");
    CHECK(snip_gemm_scratch(-1, 1, 1) == 0 && snip_gemm_scratch(1, -1, 1) == 0 && snip_gemm_scratch(1, 1, -1) == 0);
    CHECK(snip_gemm_scratch(1, 1, 1) > 0);
    test_about("isa names");
    for (isa = 0; isa < SNIP_ISA_COUNT; isa++) CHECK(strcmp(snip_isa_name((snip_isa)isa), "?") != 0);
    CHECK(strcmp(snip_isa_name(SNIP_ISA_COUNT), "?") == 0);
    CHECK(snip_isa_available(SNIP_ISA_BEST) && snip_isa_available(SNIP_ISA_SCALAR) &&
          !snip_isa_available(SNIP_ISA_COUNT) && !snip_isa_available((snip_isa)-1));
}

#ifdef SNIPI_EMULATED
// Which units a pair of operands runs on, and that nothing would have faulted.
static void test_emulation(void) {
    static const struct {
        int a, b;
        int64_t k;
        int units;
    } cases[] = {
  // of `kinds`; units: 0 FMA, 1 BF16, 2 INT8
        {6,   8,  1057, 1},
        { 4,  5,  513,  1},
        { 9,  10, 300,  1},
        { 12, 9,  129,  1},
        { 15, 13, 200,  1},
        { 9,  16, 300,  1},
        { 17, 6,  300,  1},
        { 11, 14, 700,  1},
        { 26, 9,  512,  1},
        { 0,  6,  64,   0},
        { 0,  9,  128,  0},
        { 25, 9,  256,  0},
        { 16, 17, 300,  2},
        { 20, 19, 100,  2},
        { 21, 22, 2049, 2}
    };

    static const snip_isa isas[2] = { SNIP_ISA_AVX512_BF16, SNIP_ISA_AMX };
    size_t i;
    int j;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (j = 0; j < 2 && snip_isa_available(isas[j]); j++) {
            operand a = operand_new(&kinds[cases[i].a], 3, cases[i].k, 1),
                    b = operand_new(&kinds[cases[i].b], 5, cases[i].k, 2);
            void *scratch = exact(snip_gemm_scratch(3, 5, cases[i].k));
            float c[15];
            long bf16 = emulated_products[j ? 3 : 1], s8 = emulated_products[2];
            test_about("units of %s * %s, %s", kinds[cases[i].a].name, kinds[cases[i].b].name, snip_isa_name(isas[j]));
            CHECK(snip_gemm(3, 5, cases[i].k, &a.operand, &b.operand, c, 5, 0, NULL, scratch, isas[j]) == SNIP_OK);
            CHECK((emulated_products[j ? 3 : 1] > bf16) == (cases[i].units == 1));
            CHECK((emulated_products[2] > s8) == (cases[i].units == 2 && j == 1));
            free(scratch);
            operand_free(&a);
            operand_free(&b);
        }
    test_about("emulation");
    CHECK(emulated_faults == 0 && !emulated_tiles.shaped);
    CHECK(emulated_products[0] > 0 || !snip_isa_available(SNIP_ISA_AVX_VNNI));
    printf("emulated: %ld vpdpbusd, %ld vdpbf16ps, %ld tdpbssd, %ld tdpbf16ps\n", emulated_products[0],
           emulated_products[1], emulated_products[2], emulated_products[3]);
}
#endif

int main(int argc, char **argv) {
    int isa;
    test_start(1, argv);
    if (argc > 1) random_state = strtoull(argv[1], NULL, 10);
    printf("seed %llu\n", (unsigned long long)random_state);
    fflush(stdout);  // a case that never ends has said it too
    for (isa = 0; isa < SNIP_ISA_COUNT; isa++)
        if (!snip_isa_available((snip_isa)isa))
            printf("not on this machine or in this build: %s\n", snip_isa_name((snip_isa)isa));
    test_refused();
    test_empty();
    test_small();
    test_all_pairs();
    test_edges();
    test_random();
    test_held();
    test_counts();
    test_largest();
    test_nonfinite();
    test_tiny();
    test_about("coverage");
    CHECK(test.few > 1 || (exact_cases > 200 && close_cases > 500));
    printf("%ld exact products, %ld close ones: relative error at most %.2g (f32, bf16) and %.2g\n", exact_cases,
           close_cases, worst_f32, worst_other);
#ifdef SNIPI_EMULATED
    test_emulation();
#endif
    return test_end();
}
