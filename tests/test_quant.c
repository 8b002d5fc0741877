// Quantization against a plain reference written here (scales by frexp, codes through the element codecs, which
// test_codec.c checks), for every format, scale, rounding, granularity and instruction set: codes, scales, values
// and statistics. With "--hash" prints a digest of many outputs instead, for test_compilers.sh to compare.
// SNIP_TEST_FEW=n in the environment: one case in n, for emulators.
#define _DEFAULT_SOURCE
#include "test.h"
#define SNIPI_WORTH 0  // threads for however little
#define SNIP_STATIC    // what is not called is not compiled
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#if defined(__unix__)
#    include <sys/mman.h>
#endif

static void check(int ok, const char *what) { CHECK_THAT(ok, "%s", what); }

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static int finite_bits(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

static uint64_t state = 88172645463325252u;

static uint32_t rnd(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static double uniform(void) { return (rnd() + 0.5) / 4294967296.0; }

static double gauss(void) { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }

// ---- data ----
enum { GAUSS, BITS, SUBNORMAL, ZEROS, EQUAL, OUTLIER, HUGE_VALUES, TINY, SPECIAL, TIES, GRADIENT, LOW, KINDS };

static void fill(float *x, int64_t n, int kind) {
    int64_t i;
    for (i = 0; i < n; i++) {
        double g = gauss();
        switch (kind) {
            case GAUSS: x[i] = (float)g; break;
            case BITS:
                do x[i] = float_of(rnd());
                while (!finite_bits(x[i]));
                break;
            case SUBNORMAL: x[i] = float_of(rnd() & 0x807FFFFFu); break;
            case ZEROS: x[i] = float_of(rnd() & 0x80000000u); break;
            case EQUAL: x[i] = -0.7f; break;
            case OUTLIER: x[i] = i == n / 2 ? 1e6f : (float)g; break;
            case HUGE_VALUES: x[i] = (float)(g * 5e37); break;
            case TINY: x[i] = (float)(g * 1e-36); break;
            case SPECIAL:
                x[i] = rnd() % 40 ? (float)g
                                  : float_of(rnd() % 3 == 0 ? 0x7FC00000u
                                             : rnd() % 2    ? 0x7F800000u
                                                            : 0xFF800000u);
                break;
            case TIES: x[i] = (float)((int)(rnd() % 65) - 32) * 0.25f; break;
            case GRADIENT: x[i] = (float)(g * exp(3 * gauss()) * 1e-7); break;
            case LOW: x[i] = (float)(g * exp(8 * gauss()) * 1e-21); break;
        }
    }
}

// Inputs for --hash: integers alone make them, so that they are the same under every compiler flag.
static void fill_bits(float *x, int64_t n, int kind) {
    static const int exponents[KINDS][2] = {
        {121,  8  },
        { 0,   255},
        { 0,   1  },
        { 0,   12 },
        { 127, 1  },
        { 100, 60 },
        { 246, 9  },
        { 8,   12 },
        { 0,   256},
        { 126, 4  },
        { 95,  30 },
        { 40,  40 }
    };
    int64_t i;
    for (i = 0; i < n; i++) {
        uint32_t u = rnd(), e = (uint32_t)exponents[kind][0] + rnd() % (uint32_t)exponents[kind][1];
        x[i] = float_of((u & (kind == TIES ? 0x80780000u : 0x807FFFFFu)) | e << 23);
    }
}

// ---- reference ----
static uint8_t encode(snip_format f, float x) {
    switch (f) {
        case SNIP_E4M3: return snip_e4m3_from_f32(x);
        case SNIP_E5M2: return snip_e5m2_from_f32(x);
        case SNIP_E2M1: return snip_e2m1_from_f32(x);
        case SNIP_E2M3: return snip_e2m3_from_f32(x);
        default: return snip_e3m2_from_f32(x);
    }
}

static float decode(snip_format f, uint8_t c) {
    switch (f) {
        case SNIP_E4M3: return snip_e4m3_to_f32(c);
        case SNIP_E5M2: return snip_e5m2_to_f32(c);
        case SNIP_E2M1: return snip_e2m1_to_f32(c);
        case SNIP_E2M3: return snip_e2m3_to_f32(c);
        default: return snip_e3m2_to_f32(c);
    }
}

static const struct {
    snip_format f;
    int mantissa, least, sign;
} kinds[] = {
  // least: exponent of the smallest normal number
    {SNIP_E4M3,  3, -6,  0x80},
    { SNIP_E5M2, 2, -14, 0x80},
    { SNIP_E2M1, 1, 0,   8   },
    { SNIP_E2M3, 3, 0,   32  },
    { SNIP_E3M2, 2, -2,  32  }
};

// |y| rounded up where the random word's share of a unit in the last place reaches; y's own bits below 2^-23 of its
// binade are dropped. The word's upper bits count.
static uint8_t encode_stochastic(snip_format f, float y, uint32_t word, int *over) {
    double a = fabs((double)y), k;
    int i = 0, e, m;
    uint8_t sign;
    while (kinds[i].f != f) i++;
    m = kinds[i].mantissa;
    sign = (uint8_t)(bits_of(y) >> 31 ? kinds[i].sign : 0);
    *over = 0;
    if (a > snip_format_max(f) * 1.999) {
        *over = 1;
        return encode(f, y);
    }
    (void)frexp(a, &e);
    e = a > 0 && e - 1 > kinds[i].least ? e - 1 : kinds[i].least;
    k = floor((floor(ldexp(a, 23 - e)) + (word >> (9 + m))) * ldexp(1, m - 23));
    a = ldexp(k, e - m);
    *over = a > snip_format_max(f);
    return (uint8_t)(encode(f, (float)a) | sign);
}

typedef struct {
    uint8_t *codes;
    unsigned char *scales;
    float *values;
    snip_quant_stats stats;
} result;

static float clip(double x) { return x > 3.4028234663852886e38 ? 3.4028234663852886e38f : (float)x; }

static void reference(const snip_recipe *r, const float *x, int64_t rows, int64_t cols, int64_t ld, snip_rng_key key,
                      const float *w, result *out) {
    int64_t th = r->tile_rows ? r->tile_rows : rows, tw = r->tile_cols ? r->tile_cols : cols, i, j, ti, tj;
    int64_t across = tw ? (cols + tw - 1) / tw : 0, tile = 0, tiles;
    float S = 1, tensor_scale = 1, max = snip_format_max(r->format), tensor = 0;
    memset(&out->stats, 0, sizeof out->stats);
    memset(out->codes, 0, snip_codes_bound(r, rows, cols));
    if (rows == 0 || cols == 0) return;
    tiles = across * ((rows + th - 1) / th);
    for (i = 0; i < rows; i++)
        for (j = 0; j < cols; j++)
            if (finite_bits(x[i * ld + j]) && fabsf(x[i * ld + j]) > tensor) tensor = fabsf(x[i * ld + j]);
    out->stats.amax = tensor;
    if (r->scale == SNIP_SCALE_UE4M3) {
        if (tensor > 0) S = clip(2688.0 / (double)tensor);
        tensor_scale = (float)(1.0 / (double)S);
        memset(out->scales + tiles, 0, (size_t)(4 - tiles % 4) % 4);
        memcpy(out->scales + (tiles + 3) / 4 * 4, &tensor_scale, 4);
    }
    for (ti = 0; ti < rows; ti += th)
        for (tj = 0; tj < cols; tj += tw, tile++) {
            int64_t ei = ti + th < rows ? ti + th : rows, ej = tj + tw < cols ? tj + tw : cols;
            float amax = 0, scale = 1, inverse = 1;
            int e, byte = 0, k;
            for (i = ti; i < ei; i++)
                for (j = tj; j < ej; j++)
                    if (finite_bits(x[i * ld + j]) && fabsf(x[i * ld + j]) > amax) amax = fabsf(x[i * ld + j]);
            switch (r->scale) {
                case SNIP_SCALE_NONE: break;
                case SNIP_SCALE_F32:
                    if (amax == 0) break;
                    scale = (float)((double)amax / (double)max);
                    inverse = clip((double)max / (double)amax);
                    if ((double)amax < (double)max * ldexp(1, -126)) {
                        scale = (float)ldexp(1, -126);
                        inverse = (float)ldexp(1, 126);
                    }
                    break;
                case SNIP_SCALE_POW2:
                case SNIP_SCALE_UE8M0_UP: {
                    int floor_k = r->scale == SNIP_SCALE_POW2 ? -126 : -127;
                    if (amax == 0) {
                        byte = 0;
                        if (r->scale == SNIP_SCALE_POW2) break;
                    }
                    (void)frexp((double)amax, &e);
                    for (k = amax == 0 || e - 20 < floor_k ? floor_k : e - 20; ldexp((double)max, k) < (double)amax;
                         k++) {
                    }
                    byte = k + 127;
                    scale = (float)ldexp(1, k);
                    inverse = (float)ldexp(1, -k);
                    break;
                }
                case SNIP_SCALE_UE8M0:
                    (void)frexp((double)max, &k);
                    (void)frexp((double)amax, &e);
                    k = amax == 0 || e - k < -127 ? -127 : e - k;
                    byte = k + 127;
                    scale = (float)ldexp(1, k);
                    inverse = (float)ldexp(1, -k);
                    break;
                case SNIP_SCALE_UE4M3:
                    byte = snip_e4m3_from_f32((float)((double)amax * (double)(S * (float)(1.0 / 6.0))));
                    scale = (float)((double)snip_e4m3_to_f32((uint8_t)byte) * (double)tensor_scale);
                    inverse = scale == 0 ? 0.0f : clip(1.0 / (double)scale);
                    break;
            }
            if (r->scale == SNIP_SCALE_F32 || r->scale == SNIP_SCALE_POW2)
                memcpy(out->scales + 4 * tile, &scale, 4);
            else if (r->scale != SNIP_SCALE_NONE)
                out->scales[tile] = (unsigned char)byte;
            for (i = ti; i < ei; i++)
                for (j = tj; j < ej; j++) {
                    float v = x[i * ld + j], y = clip(fabs((double)v * (double)inverse)), value;
                    uint8_t c;
                    int over = 0;
                    if (!finite_bits(v))
                        y = scale == 0 ? float_of(0x7FC00000u) : v;
                    else if (bits_of(v) >> 31)
                        y = -y;
                    if (r->rounding == SNIP_ROUND_STOCHASTIC && finite_bits(v)) {
                        uint32_t four[4];
                        uint64_t element = (uint64_t)(i * cols + j);
                        snip_philox(key, element / 4, four);
                        c = encode_stochastic(r->format, y, four[element % 4], &over);
                    } else {
                        int q = 0, m;
                        while (kinds[q].f != r->format) q++;
                        (void)frexp(
                            (double)max,
                            &m);  // saturated: at or beyond half a unit above the largest (which is odd or even)
                        {
                            double unit = ldexp(1, m - 1 - kinds[q].mantissa), half = (double)max + unit / 2;
                            int odd = (int)((double)max / unit) & 1;
                            over = finite_bits(v) && (odd ? fabs((double)y) >= half : fabs((double)y) > half);
                        }
                        c = encode(r->format, y);
                    }
                    value = finite_bits(decode(r->format, c)) ? (float)((double)scale * (double)decode(r->format, c))
                                                              : scale * decode(r->format, c);
                    if (r->format == SNIP_E2M1)
                        out->codes[i * ((cols + 1) / 2) + j / 2] |= (uint8_t)(c << (j & 1) * 4);
                    else
                        out->codes[i * cols + j] = c;
                    out->values[i * cols + j] = value;
                    out->stats.saturated += over || (finite_bits(v) && !finite_bits(value));
                    if (!finite_bits(v)) {
                        out->stats.nonfinite++;
                        continue;
                    }
                    out->stats.sum_sq += (double)v * (double)v;
                    out->stats.err_sq += (double)(value - v) * (double)(value - v);
                    if (w) out->stats.dot += (double)w[i * ld + j] * (double)(value - v);
                }
        }
}

static int same_floats(const float *a, const float *b, int64_t n) {  // bit for bit, any NaN for any NaN
    int64_t i;
    for (i = 0; i < n; i++)
        if (bits_of(a[i]) != bits_of(b[i]) &&
            ((bits_of(a[i]) & 0x7FFFFFFFu) <= 0x7F800000u || (bits_of(b[i]) & 0x7FFFFFFFu) <= 0x7F800000u))
            return 0;
    return 1;
}

static int near(double a, double b, double size) { return a == b || fabs(a - b) <= 1e-6 * size; }

// y = x / scale is rounded to a float: d = Q(x) - x is off by up to 2e-7 |x|, and the sums accordingly. Where rounding
// a power-of-two scale up sends the reference's own Q(x) to infinity, its sums say nothing.
static int same_stats(const snip_quant_stats *a, const snip_quant_stats *b, double dot_size) {
    double slack = 4e-7 * sqrt(b->err_sq * b->sum_sq) + 1e-13 * b->sum_sq + 1e-80;
    if (bits_of(a->amax) != bits_of(b->amax) || a->nonfinite != b->nonfinite || a->saturated != b->saturated) return 0;
    if (!(b->err_sq < 1e300)) return 1;
    return near(a->sum_sq, b->sum_sq, b->sum_sq) && fabs(a->err_sq - b->err_sq) <= 1e-6 * b->err_sq + slack &&
           near(a->dot, b->dot, dot_size);
}

enum { ROWS = 260, COLS = 300, LD = 311, CELLS = 300 * 300 };

static float x[ROWS * LD], weight[ROWS * LD], xt[COLS * ROWS], fake[CELLS], values[CELLS], weight_t[COLS * ROWS];
static uint8_t codes_ref[CELLS], codes[CELLS + 64], scales[4 * CELLS + 64];
static unsigned char scales_ref[4 * CELLS + 64];
static float values_ref[CELLS];

static const int shapes[][2] = {
    {1,    1  },
    { 0,   5  },
    { 5,   0  },
    { 1,   130},
    { 3,   31 },
    { 17,  33 },
    { 33,  129},
    { 128, 128},
    { 129, 255},
    { 200, 300},
    { 16,  300},
    { 260, 17 },
    { 40,  64 },
    { 19,  192},
    { 37,  256},
    { 21,  64 }
};  // short rows, some ending in half a tile
static const int tiles[][2] = {
    {0,    0  },
    { 1,   0  },
    { 1,   128},
    { 128, 128},
    { 1,   32 },
    { 1,   16 },
    { 16,  16 },
    { 3,   7  },
    { 1,   5  },
    { 128, 1  },
    { 2,   200},
    { 32,  64 }
};

enum { N_SHAPES = sizeof shapes / sizeof shapes[0], N_TILES = sizeof tiles / sizeof tiles[0] };

static uint64_t digest[SNIP_ISA_COUNT];

static int quantizes_as_another(int isa) {
    return isa == SNIP_ISA_AVX_VNNI || (isa >= SNIP_ISA_AVX512_VNNI && isa <= SNIP_ISA_AMX) || isa == SNIP_ISA_NEON_DOT;
}

static void absorb(int isa, const void *p, size_t n) {
    const unsigned char *c = (const unsigned char *)p;
    while (n--) digest[isa] = (digest[isa] ^ *c++) * 1099511628211u;
}

static void absorb_number(int isa, uint64_t v, int bytes) {  // the least first, whatever the machine's order
    for (; bytes--; v >>= 8) digest[isa] = (digest[isa] ^ (v & 255)) * 1099511628211u;
}

static void absorb_floats(int isa, const void *p, size_t n) {
    const unsigned char *c = (const unsigned char *)p;
    float v;
    for (; n--; c += sizeof v) {
        memcpy(&v, c, sizeof v);
        absorb_number(isa, bits_of(v), 4);
    }
}

static void absorb_scales(int isa, const snip_recipe *r, const void *p, size_t bytes) {
    size_t whole = r->scale == SNIP_SCALE_UE4M3 && bytes                       ? 1
                   : r->scale == SNIP_SCALE_F32 || r->scale == SNIP_SCALE_POW2 ? bytes / 4
                                                                               : 0;
    absorb(isa, p, bytes - 4 * whole);
    absorb_floats(isa, (const unsigned char *)p + (bytes - 4 * whole), whole);
}

// One recipe on one matrix by every instruction set and entry; returns the number of disagreements.
static int named;  // differences printed so far

static int differs(int yes, const char *what) {
    if (yes && named++ < 20) printf("  differ: %s\n", what);
    return yes;
}

static int compare(const snip_recipe *r, int rows, int cols, int ld, int hash_only) {
    snip_rng_key key = { 0x123456789ABCDEFu, 7, 3 };
    size_t nc = snip_codes_bound(r, rows, cols), ns = snip_scales_bound(r, rows, cols);
    result ref;
    int isa, wrong = 0, i, j;
    double dot_size = 0;
    snip_quant_stats first;
    ref.codes = codes_ref;
    ref.scales = scales_ref;
    ref.values = values_ref;
    if (!hash_only) reference(r, x, rows, cols, ld, key, weight, &ref);
    for (i = 0; i < rows; i++)
        for (j = 0; j < cols; j++) {
            xt[j * rows + i] = x[i * ld + j];
            weight_t[j * rows + i] = weight[i * ld + j];
            if (finite_bits(x[i * ld + j]))
                dot_size += fabs((double)weight[i * ld + j]) * (1 + fabs((double)x[i * ld + j]));
        }
    for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
        snip_quantize_job job;
        snip_quant_stats stats, stats_t;
        if (!snip_isa_available((snip_isa)isa) || quantizes_as_another(isa)) continue;
        memset(&job, 0, sizeof job);
        memset(codes, 0xAA, nc + 1);
        memset(scales, 0, sizeof scales > ns + 8 ? ns + 8 : ns);
        memset(fake, 0, sizeof fake);
        job.x = x;
        job.rows = rows;
        job.cols = cols;
        job.ld = ld;
        job.weight = weight;
        job.recipe = r;
        job.codes = codes;
        job.scales = scales;
        job.out = fake;
        job.ld_out = cols;
        job.key = key;
        job.isa = (snip_isa)isa;
        if (snip_quantize_with(&job, &stats, NULL) != SNIP_OK) return 1000;
        if (hash_only) {
            absorb(isa, codes, nc);
            absorb_scales(isa, r, scales, ns);
            for (i = 0; i < rows * cols; i++)
                if (finite_bits(fake[i])) absorb_floats(isa, &fake[i], 1);
            absorb_floats(isa, &stats.amax, 1);
            absorb_number(isa, (uint64_t)stats.nonfinite, 8);
            absorb_number(isa, (uint64_t)stats.saturated, 8);
        } else {
            wrong += differs(memcmp(codes, codes_ref, nc) != 0 || codes[nc] != 0xAA, "codes");
            wrong += differs(rows && cols && memcmp(scales, scales_ref, ns) != 0, "scales");
            wrong += differs(!same_floats(fake, values_ref, (int64_t)rows * cols), "values");
            wrong += differs(!same_stats(&stats, &ref.stats, dot_size), "statistics");
            if (isa == SNIP_ISA_SCALAR) first = stats;
            wrong += differs(memcmp(&first, &stats, sizeof stats) != 0,
                             "statistics between instruction sets");  // the same sums to the last bit
            memset(values, 0, sizeof values);
            if (snip_dequantize(r, codes, scales, rows, cols, values, cols) != SNIP_OK) return 1000;
            wrong += differs(!same_floats(values, fake, (int64_t)rows * cols), "dequantized values");
        }
        // transposed source: the same as the quantized copy
        memset(codes, 0xAA, nc + 1);
        memset(scales, 0, ns + 8);
        memset(&job, 0, sizeof job);
        job.x = xt;
        job.rows = cols;
        job.cols = rows;
        job.ld = rows;
        job.weight = weight_t;
        job.recipe_t = r;
        job.codes_t = codes;
        job.scales_t = scales;
        job.key = key;
        job.isa = (snip_isa)isa;
        if (snip_quantize_with(&job, NULL, &stats_t) != SNIP_OK) return 1000;
        if (hash_only) {
            absorb(isa, codes, nc);
            absorb_scales(isa, r, scales, ns);
            continue;
        }
        wrong += differs(memcmp(codes, codes_ref, nc) != 0 || codes[nc] != 0xAA, "codes");
        wrong += differs(rows && cols && memcmp(scales, scales_ref, ns) != 0, "scales");
        wrong += differs(!same_stats(&stats_t, &ref.stats, dot_size), "transposed statistics");
    }
    return wrong;
}

static void test_everything(int hash_only) {
    int f, s, t, rounding, d, n = 0;
    char text[160];
    for (f = SNIP_E4M3; f <= SNIP_E3M2; f++)
        for (s = SNIP_SCALE_NONE; s <= SNIP_SCALE_UE8M0_UP; s++)
            for (rounding = 0; rounding < 2; rounding++) {
                int wrong = 0, tries = 0;
                if (s == SNIP_SCALE_UE4M3 && f != SNIP_E2M1) continue;
                for (t = 0; t < N_TILES; t++)
                    for (d = 0; d < KINDS; d++, n++) {
                        const int *shape = shapes[(n * 5 + t) % N_SHAPES];
                        int rows = test.few > 1 && shape[0] * shape[1] > 128 * 128 ? 33 : shape[0], got;
                        snip_recipe r;
                        r.format = (snip_format)f;
                        r.tile_rows = tiles[t][0];
                        r.tile_cols = tiles[t][1];
                        r.scale = (snip_scale)s;
                        r.rounding = (snip_rounding)rounding;
                        if (!hash_only) {
                            if (((n + t + f) & 1) || n / 2 % test.few)
                                continue;  // half of them, every kind of data with half of the tiles
                            fill(x, (int64_t)rows * LD, d);
                            fill(weight, (int64_t)rows * LD, GAUSS);
                        }
                        if (hash_only) {
                            if (n % (13 * test.few)) continue;
                            fill_bits(x, (int64_t)rows * LD, d);
                            fill_bits(weight, (int64_t)rows * LD, GAUSS);
                        }
                        got = compare(&r, rows, shape[1], n % 2 ? LD : shape[1], hash_only);
                        if (got && !hash_only && named < 20)
                            printf("  format %d scale %d rounding %d tile %dx%d shape %dx%d data %d: %d\n", f, s,
                                   rounding, tiles[t][0], tiles[t][1], rows, shape[1], d, got);
                        wrong += got;
                        tries++;
                    }
                snprintf(text, sizeof text, "%s, scale %d, rounding %d: %d matrices as the reference, %d differences",
                         snip_format_name((snip_format)f), s, rounding, tries, wrong);
                if (!hash_only) check(wrong == 0, text);
            }
}

static void test_plain_formats(void) {
    int d, wrong = 0, isa, i;
    snip_recipe f32 = SNIP_RECIPE_F32, bf16 = SNIP_RECIPE_BF16;
    snip_rng_key key = { 0, 0, 0 };
    for (d = 0; d < KINDS; d++) {
        static uint16_t half[65 * 131], turned[65 * 131];
        static float out[65 * 131];
        snip_quant_stats a;
        fill(x, 65 * 131, d);
        if (d == SPECIAL)
            for (i = 0; i < 65 * 131; i += 9) x[i] = float_of(rnd() | 0x7F800001u);  // NaNs of all payloads
        wrong += snip_quantize(&bf16, x, 65, 131, 131, half, NULL, key, NULL, &a) != SNIP_OK;
        wrong += snip_quantize_transposed(&bf16, x, 65, 131, 131, turned, NULL, key, NULL, NULL) != SNIP_OK;
        for (i = 0; i < 65 * 131; i++) {
            wrong += half[i] != snip_bf16_from_f32(x[i]);
            wrong += turned[i % 131 * 65 + i / 131] != half[i];
        }
        wrong += snip_fake_quantize(&f32, x, 65, 131, 131, out, 131, key, NULL, &a) != SNIP_OK ||
                 memcmp(out, x, sizeof out) != 0 || a.err_sq != 0;
        // BF16 in and out, by every instruction set
        for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
            static const snip_recipe recipes[] = { SNIP_RECIPE_FP8_TILE, SNIP_RECIPE_FP4_TILE_SR, SNIP_RECIPE_NVFP4,
                                                   SNIP_RECIPE_FP4_BLOCK };
            static uint8_t c1[65 * 131], c2[65 * 131], s1[65 * 131 * 4], s2[65 * 131 * 4];
            static float wide[65 * 131], value[65 * 131];
            static uint16_t out16[65 * 131], back[65 * 131];
            size_t k;
            if (!snip_isa_available((snip_isa)isa)) continue;
            for (i = 0; i < 65 * 131; i++) wide[i] = snip_bf16_to_f32(half[i]);
            for (k = 0; k < sizeof recipes / sizeof recipes[0]; k++) {
                const snip_recipe *r = &recipes[k];
                snip_quantize_job job;
                int t;
                for (t = 0; t < 2; t++) {
                    int64_t qr = t ? 131 : 65, qc = t ? 65 : 131;
                    memset(&job, 0, sizeof job);
                    job.x = half;
                    job.x_format = SNIP_BF16;
                    job.rows = 65;
                    job.cols = 131;
                    job.ld = 131;
                    job.isa = (snip_isa)isa;
                    if (t) {
                        job.recipe_t = r;
                        job.codes_t = c1;
                        job.scales_t = s1;
                    } else {
                        job.recipe = r;
                        job.codes = c1;
                        job.scales = s1;
                        job.out = out16;
                        job.out_format = SNIP_BF16;
                        job.ld_out = 131;
                    }
                    wrong += snip_quantize_with(&job, NULL, NULL) != SNIP_OK;
                    wrong += (t ? snip_quantize_transposed : snip_quantize)(r, wide, 65, 131, 131, c2, s2, key, NULL,
                                                                            NULL) != SNIP_OK;
                    wrong += memcmp(c1, c2, snip_codes_bound(r, qr, qc)) != 0 ||
                             memcmp(s1, s2, snip_scales_bound(r, qr, qc)) != 0;
                    if (t) continue;
                    wrong += snip_dequantize(r, c1, s1, 65, 131, value, 131) != SNIP_OK ||
                             snip_dequantize_bf16(r, c1, s1, 65, 131, back, 131) != SNIP_OK;
                    for (i = 0; i < 65 * 131; i++)
                        wrong += out16[i] != snip_bf16_from_f32(value[i]) || back[i] != out16[i];
                }
            }
        }
    }
    check(wrong == 0, "F32, BF16, BF16 source and BF16 output");
}

// Both orientations at once equal each alone, for pairs of recipes with and without a common block.
static void test_both(void) {
    static const snip_recipe recipes[] = {
        SNIP_RECIPE_FP8_TILE,
        SNIP_RECIPE_FP4_TILE,
        SNIP_RECIPE_FP4_TILE_SR,
        SNIP_RECIPE_FP8_BLOCK,
        SNIP_RECIPE_NVFP4,
        SNIP_RECIPE_MXFP4,
        SNIP_RECIPE_BF16,
        {SNIP_E2M1,  3, 7, SNIP_SCALE_F32,  SNIP_ROUND_STOCHASTIC  },
        { SNIP_E5M2, 0, 0, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN}
    };

    enum { N = sizeof recipes / sizeof recipes[0], BIG = 260 * 300 * 4 };

    static uint8_t c1[BIG], c2[BIG], c3[BIG], s1[BIG], s2[BIG], s3[BIG];
    snip_rng_key key = { 99, 1, 2 };
    int a, b, k, wrong = 0;
    for (a = 0; a < N; a++)
        for (b = 0; b < N; b++)
            for (k = 0; k < 3 && (a * N + b) % test.few == 0; k++) {
                int rows = k ? k == 1 ? 129 : 260 : 31, cols = k == 1 ? 300 : 257;
                snip_quant_stats both, one;
                fill(x, (int64_t)rows * LD, k == 2 ? SPECIAL : GAUSS);
                wrong += snip_quantize_both(&recipes[a], &recipes[b], x, rows, cols, LD, c1, s1, c2, s2, key, &both) !=
                         SNIP_OK;
                wrong += snip_quantize(&recipes[a], x, rows, cols, LD, c3, s3, key, NULL, &one) != SNIP_OK;
                wrong += memcmp(c1, c3, snip_codes_bound(&recipes[a], rows, cols)) != 0 ||
                         memcmp(s1, s3, snip_scales_bound(&recipes[a], rows, cols)) != 0;
                wrong += !same_stats(&both, &one, 1);
                wrong += snip_quantize_transposed(&recipes[b], x, rows, cols, LD, c3, s3, key, NULL, NULL) != SNIP_OK;
                wrong += memcmp(c2, c3, snip_codes_bound(&recipes[b], cols, rows)) != 0 ||
                         memcmp(s2, s3, snip_scales_bound(&recipes[b], cols, rows)) != 0;
            }
    check(wrong == 0, "both orientations at once as each alone");
}

// Whole blocks without a weight, both orientations, with statistics and without: every instruction set as the scalar
// one.
static void test_blocks(void) {
    static const int sizes[][2] = {
        {128,  128 },
        { 256, 144 },
        { 260, 48  },
        { 384, 272 },
        { 130, 2112}
    };
    static const int widths[][2] = {
        {1,    128},
        { 1,   64 },
        { 1,   32 },
        { 1,   16 },
        { 16,  16 },
        { 128, 128},
        { 32,  128}
    };

    enum { MOST = 384 * 2112 };

    static float data[MOST], value[2][MOST];
    static uint8_t c[2][2 * MOST], s[2][8 * MOST];
    static uint16_t half[MOST];
    snip_rng_key key = { 0xABCDEF0123456789u, 11, 13 };
    int f, kind, rounding, w, z, d, isa, pass, wrong = 0, tried = 0, i, number = 0;
    if (snipi_best_isa() == SNIP_ISA_SCALAR) {
        test_skip("no instruction sets to compare");
        return;
    }
    for (f = SNIP_E4M3; f <= SNIP_E3M2; f++)
        for (kind = SNIP_SCALE_NONE; kind <= SNIP_SCALE_UE8M0_UP; kind++)
            for (rounding = 0; rounding < 2; rounding++)
                for (w = 0; w < 7; w++) {
                    snip_recipe r;
                    snip_quant_stats st[2][2];
                    int64_t rows, cols;
                    if ((kind == SNIP_SCALE_UE4M3 && f != SNIP_E2M1) || (f + kind + w + rounding) % 3 ||
                        number++ % test.few)
                        continue;
                    z = (f + kind + w + 3 * rounding) % 5;
                    d = (f * 7 + kind * 3 + w) % KINDS;
                    rows = sizes[z][0];
                    cols = sizes[z][1];
                    r.format = (snip_format)f;
                    r.tile_rows = widths[w][0];
                    r.tile_cols = widths[w][1];
                    r.scale = (snip_scale)kind;
                    r.rounding = (snip_rounding)rounding;
                    fill(data, rows * cols, d);
                    for (i = 0; i < rows * cols; i++) half[i] = snip_bf16_from_f32(data[i]);
                    for (pass = 0; pass < 8; pass++)  // bit 0: statistics; then the first, the second, both; BF16
                        for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
                            int at = isa != SNIP_ISA_SCALAR;
                            snip_quantize_job job;
                            size_t nc = snip_codes_bound(&r, rows, cols), ns = snip_scales_bound(&r, rows, cols),
                                   nt = snip_codes_bound(&r, cols, rows), nst = snip_scales_bound(&r, cols, rows);
                            if (!snip_isa_available((snip_isa)isa) || quantizes_as_another(isa)) continue;
                            memset(&job, 0, sizeof job);
                            memset(c[at], 0, nc + nt);
                            memset(s[at], 0, ns + nst + 8);
                            memset(st[at], 0, sizeof st[at]);
                            job.x = pass >= 6 ? (void *)half : (void *)data;
                            if (pass >= 6) job.x_format = SNIP_BF16;
                            job.rows = rows;
                            job.cols = cols;
                            job.ld = cols;
                            job.key = key;
                            job.isa = (snip_isa)isa;
                            if (pass / 2 != 1) {
                                job.recipe = &r;
                                job.codes = c[at];
                                job.scales = s[at];
                                job.out = pass / 2 == 0 ? value[at] : NULL;
                                job.ld_out = cols;
                            }
                            if (pass / 2 != 0) {
                                job.recipe_t = &r;
                                job.codes_t = c[at] + nc;
                                job.scales_t = s[at] + (ns + 7) / 8 * 8;
                            }
                            if (snip_quantize_with(&job, pass & 1 ? &st[at][0] : NULL, pass & 1 ? &st[at][1] : NULL) !=
                                SNIP_OK)
                                wrong++;
                            if (!at) continue;
                            wrong += differs(memcmp(c[0], c[1], nc + nt) != 0, "codes of blocks") +
                                     differs(memcmp(s[0], s[1], ns + nst) != 0, "scales of blocks");
                            wrong +=
                                differs(job.out && !same_floats(value[0], value[1], rows * cols), "values of blocks") +
                                differs((pass & 1) && memcmp(st[0], st[1], sizeof st[0]) != 0, "statistics of blocks");
                            tried++;
                        }
                }
    check(wrong == 0 && tried, "whole blocks as the scalar specification");
}

static void test_in_place_and_threads(void) {
    snip_recipe r = SNIP_RECIPE_FP4_TILE_SR, nv = SNIP_RECIPE_NVFP4;
    static float a[200 * 300], b[200 * 300];
    static uint8_t c[200 * 300], c1[200 * 300], s[200 * 300], s1[200 * 300];
    snip_rng_key key = { 5, 6, 7 };
    snip_quant_stats s0, st;
    int ok = 1;
    fill(a, 200 * 300, GRADIENT);
    memcpy(b, a, sizeof a);
    snip_fake_quantize(&r, a, 200, 300, 300, fake, 300, key, NULL, NULL);
    snip_fake_quantize(&r, b, 200, 300, 300, b, 300, key, NULL, NULL);
    check(memcmp(fake, b, sizeof b) == 0, "fake quantization in place");
    snip_quantize(&nv, a, 200, 300, 300, c, s, key, a, &s0);
#ifdef _OPENMP
    {
        int threads, before = omp_get_max_threads();
        for (threads = 1; threads <= 7; threads += 2) {
            omp_set_num_threads(threads);
            snip_quantize(&nv, a, 200, 300, 300, c1, s1, key, a, &st);
            ok = ok && memcmp(c, c1, snip_codes_bound(&nv, 200, 300)) == 0 &&
                 memcmp(s, s1, snip_scales_bound(&nv, 200, 300)) == 0 && memcmp(&st, &s0, sizeof st) == 0;
        }
        omp_set_num_threads(before);
        check(ok, "the same bits, statistics too, for 1 to 7 threads");
    }
#else
    (void)c1;
    (void)s1;
    (void)st;
    (void)ok;
    test_skip("threads: no OpenMP");
#endif
}

// Stochastic rounding between neighbouring codes c and c + 1 (every pair of the FP4 and FP6 formats, every third of
// FP8), signs alternating, p the place of v between them: over 10^7 draws each, the mean error, its mean square against
// p (1-p) step^2, and the scatter of the rows' means (draws are independent). Some 450 z-scores: with |z| < 6.5, keys
// drawn at random would fail a right rounding once in 10^7 runs. Such a sample sees a bias of 10^-3 of a step. Smaller
// ones: v on a code must stay there in every draw (sees 2^-20), and over all values of the random bits exactly the
// share p goes up.
#if defined(__has_feature)
#    if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#        define SLOW_BUILD 1
#    endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || (defined(__GNUC__) && !defined(__OPTIMIZE__))
#    define SLOW_BUILD 1
#endif
enum { DRAW_COLS = 1024 };

#define DRAW_ROWS (test.few > 1 ? 64 : 1024)
#define DRAWS (DRAW_ROWS * DRAW_COLS)

typedef struct {
    double up, other, scatter, err_sq;
} draws;  // draws that gave c + 1, neither; sum of (row's ups - mean)^2; the library's own sum

static void draw(const snip_recipe *r, int c, float v, double p, uint32_t step, float *in, uint8_t *out, draws *d) {
    snip_rng_key key = { 1234, 0, 0 };
    snip_quant_stats stats;
    int i, j, fp4 = r->format == SNIP_E2M1, sign = 1 << (fp4 ? 3 : r->format < SNIP_E2M1 ? 7 : 5);
    key.step = step;
    key.tensor = (uint32_t)r->format << 8 | (uint32_t)c;
    if (step == 0)
        for (i = 0; i < DRAWS; i++) in[i] = i & 1 ? -v : v;
    if (snip_quantize(r, in, DRAW_ROWS, DRAW_COLS, DRAW_COLS, out, NULL, key, NULL, &stats) != SNIP_OK) {
        d->other++;
        return;
    }
    d->err_sq += stats.err_sq;
    for (i = 0; i < DRAW_ROWS; i++) {
        int up = 0, other = 0;  // k (k - 1) is 0 for 0 and 1 alone
        if (fp4)
            for (j = 0; j < DRAW_COLS / 2; j++) {
                int b = *out++, k = (b & 15) - c, m = (b >> 4) - 8 - c;
                up += k + m;
                other += k * (k - 1) + m * (m - 1);
            }
        else
            for (j = 0; j < DRAW_COLS / 2; j++, out += 2) {
                int k = out[0] - c, m = out[1] - sign - c;
                up += k + m;
                other += k * (k - 1) + m * (m - 1);
            }
        d->up += up;
        d->other += other;
        d->scatter += (up - DRAW_COLS * p) * (up - DRAW_COLS * p);
    }
}

static void test_stochastic(void) {
#ifdef SLOW_BUILD
    enum { CALLS = 1 };
#else
    enum { CALLS = 10 };
#endif
    int k, c, i, intervals = 0, biased = 0, spread = 0, clumped = 0, moved = 0, uneven = 0,
                 slow = CALLS == 1 || !snip_isa_available(SNIP_ISA_AVX2);
    double worst = 0, worst_sq = 0, worst_scatter = 0;
    float *in = (float *)malloc((size_t)DRAWS * sizeof(float));
    uint8_t *out = (uint8_t *)malloc((size_t)DRAWS);
    if (!in || !out) {
        check(0, "memory");
        free(in);
        free(out);
        return;
    }
    for (k = 0; k < 5; k++) {
        snip_recipe r = { SNIP_E2M1, 0, 0, SNIP_SCALE_NONE, SNIP_ROUND_STOCHASTIC };
        snipi_element e = snipi_element_of(kinds[k].f);
        r.format = kinds[k].f;
        for (c = 0; c<(int)e.largest; c += test.few> 1 ? 40 : k == 2 ? 1 : slow ? 13 : k < 2 ? 3 : 1, intervals++) {
            int calls = test.few > 1 || (slow && k != 2) ? 1 : CALLS, ups = 0, bits = 23 - e.mantissa,
                share = (int)((0.04 + 0.92 * uniform()) * (1 << bits)) | 1;
            double lo = decode(r.format, (uint8_t)c), h = decode(r.format, (uint8_t)(c + 1)) - lo,
                   p = ldexp(share, -bits), q = 1 - p;
            double n = (double)calls * DRAWS, rows = n / DRAW_COLS, pq = p * q, z, z_sq, z_scatter, sq;
            float v = (float)(lo + p * h);  // exact
            draws d = { 0, 0, 0, 0 }, still = { 0, 0, 0, 0 };
            for (i = 0; i < calls; i++) draw(&r, c, v, p, (uint32_t)i, in, out, &d);
            z = (d.up - n * p) / sqrt(n * pq);
            sq = d.up * q * q + (n - d.up) * p * p;  // squared errors in steps; theirs: mean pq, variance pq (1-2p)^2
            z_sq = fabs(1 - 2 * p) < 1e-3 ? 0 : (sq - n * pq) / sqrt(n * pq * (1 - 2 * p) * (1 - 2 * p));
            z_scatter = (d.scatter / (DRAW_COLS * pq) - rows) / sqrt(rows * (2 + (1 - 6 * pq) / (DRAW_COLS * pq)));
            biased += d.other != 0 || !(fabs(z) < 6.5);
            spread += !(fabs(z_sq) < 6.5) || !(fabs(d.err_sq / (sq * h * h) - 1) < 1e-5);
            clumped += !(fabs(z_scatter) < 6.5);
            for (i = 0; i < (k == 2 ? calls : 1); i++) draw(&r, c, (float)lo, 0, (uint32_t)i, in, out, &still);
            moved += still.up != 0 || still.other != 0 || still.err_sq != 0;
            for (i = 0; i < 1 << bits && (test.few == 1 || c == 0); i++)
                ups += (int)snipi_encode_stochastic(bits_of(v), (uint32_t)i << (32 - bits), e.mantissa, e.bias) - c;
            uneven += ups != share && (test.few == 1 || c == 0);
            if (fabs(z) > worst) worst = fabs(z);
            if (fabs(z_sq) > worst_sq) worst_sq = fabs(z_sq);
            if (fabs(z_scatter) > worst_scatter) worst_scatter = fabs(z_scatter);
        }
    }
    free(in);
    free(out);
    check(biased == 0 && intervals > (test.few > 1 ? 8 : 30), "stochastic rounding is unbiased");
    check(spread == 0, "stochastic rounding has the variance p(1-p)h^2");
    check(clumped == 0, "stochastic rounding draws independently");
    check(moved == 0, "stochastic rounding leaves every code where it is");
    check(uneven == 0, "of all random values the share p rounds up");
    printf("  stochastic rounding: %d intervals of %d draws%s; largest |z| of the mean %.2f, of the square %.2f, "
           "of the rows' scatter %.2f\n",
           intervals, CALLS * DRAWS, slow ? " or fewer" : "", worst, worst_sq, worst_scatter);
}

static void test_philox(void) {  // known answers of Random123's philox4x32-10
    uint32_t out[4];
    snip_rng_key zero = { 0, 0, 0 }, ones, pi = { 0x299f31d0a4093822u, 0x13198a2e, 0x03707344 };
    ones.seed = ~(uint64_t)0;
    ones.step = ones.tensor = 0xFFFFFFFFu;
    snip_philox(zero, 0, out);
    check(out[0] == 0x6627e8d5 && out[1] == 0xe169c58d && out[2] == 0xbc57ac4c && out[3] == 0x9b00dbd8,
          "Philox of zeros");
    snip_philox(ones, ~(uint64_t)0, out);
    check(out[0] == 0x408f276d && out[1] == 0x41c83b0e && out[2] == 0xa20bc7c6 && out[3] == 0x6d5451fd,
          "Philox of ones");
    snip_philox(pi, 0x85a308d3243f6a88u, out);
    check(out[0] == 0xd16cfe09 && out[1] == 0x94fdcceb && out[2] == 0x5001e420 && out[3] == 0x24126ea1, "Philox of pi");
    {
        int isa, wrong = 0, i;
        uint64_t firsts[] = { 0, 5, 0xFFFFFFF0u, 0xFFFFFFFFFFu, 0x1FFFFFFFEu, 0x1234567800000009u };
        for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++)
            for (i = 0; i < 6 && snip_isa_available((snip_isa)isa); i++) {
                uint32_t a[4 * 48], b[4 * 33];
                snipi_vector_of((snip_isa)isa)->philox(pi, firsts[i], 33, a);
                snipi_philox_scalar(pi, firsts[i], 33, b);
                wrong += memcmp(a, b, sizeof b) != 0;
            }
        check(wrong == 0, "Philox by every instruction set, across 2^32");
        for (isa = SNIP_ISA_SCALAR, wrong = 0; isa < SNIP_ISA_COUNT; isa++) {
            float a[SNIPI_SIGNS], b[SNIPI_SIGNS];
            if (!snip_isa_available((snip_isa)isa)) continue;
            for (i = 0; i < SNIPI_SIGNS; i++) a[i] = b[i] = i % 3 ? (float)i : -0.0f;
            snipi_flip_of((snip_isa)isa)(out, a);
            snipi_flip_scalar(out, b);
            wrong += memcmp(a, b, sizeof a) != 0;
        }
        check(wrong == 0, "signs flipped by every instruction set");
    }
}

static void test_gauss(void) {
    enum { N = 400000 };

    snip_rng_key key = { 11, 22, 33 };
    double sum = 0, sq = 0, cube = 0, fourth = 0, dot, naive = 0, biggest = 0;
    float *noise = (float *)calloc(N, sizeof(float)), *shape = (float *)malloc(N * sizeof(float)),
          *out = (float *)malloc(N * sizeof(float));
    int64_t i, wrong = 0, bins[40];
    int b;
    if (!noise || !shape || !out) {
        check(0, "memory");
        free(noise);
        free(shape);
        free(out);
        return;
    }
    memset(bins, 0, sizeof bins);
    check(snip_gauss_add(noise, noise, N - 1, 1, NULL, key) == SNIP_OK && noise[N - 1] == 0,
          "Gaussian noise stops at n");
    for (i = 0; i < N - 1; i++) {
        double v = noise[i], p = 0.5 * erfc(-v / sqrt(2.0));
        uint32_t w[4];
        double radius, angle;
        sum += v;
        sq += v * v;
        cube += v * v * v;
        fourth += v * v * v * v;
        bins[(int)(p * 39.9999)]++;
        if (i < 4000) {  // against libm in full
            snip_philox(key, (uint64_t)i / 4, w);
            radius = sqrt(-2 * log((w[i % 4 & 2] + 0.5) / 4294967296.0));
            angle = 6.2831853071795864769 * w[(i % 4 & 2) + 1] / 4294967296.0;
            if (fabs(v - radius * (i & 1 ? sin(angle) : cos(angle))) > 3e-7 * (radius + 1)) wrong++;
        }
        if (fabs(v) > biggest) biggest = fabs(v);
    }
    check(wrong == 0, "Gaussian noise is Box and Muller's");
    check(fabs(sum) / sqrt((double)N) < 5 && fabs(sq - N) / sqrt(2.0 * N) < 5 && fabs(cube) / sqrt(15.0 * N) < 5 &&
              fabs(fourth - 3.0 * N) / sqrt(96.0 * N) < 5 && biggest < 6.8,
          "its four moments");
    for (b = 0, sum = 0; b < 40; b++) sum += ((double)bins[b] - N / 40.0) * ((double)bins[b] - N / 40.0) / (N / 40.0);
    check(sum < 90, "its distribution (chi squared, 39 degrees of freedom)");
    fill(shape, N, GAUSS);
    snip_gauss_add(out, shape, 1001, 0.5f, shape, key);
    for (i = wrong = 0; i < 1001; i++) {
        float add = noise[i] * (0.5f * shape[i]);
        if (fabsf(out[i] - (shape[i] + add)) > 1e-6f) wrong++;
        naive += (double)shape[i] * (double)noise[i];
    }
    snip_gauss_dot(shape, 1001, key, &dot);
    check(wrong == 0 && fabs(dot - naive) < 1e-9, "Gaussian noise with a shape, and its inner product");
    free(noise);
    free(shape);
    free(out);
}

static void test_hadamard(void) {
    static float a[5 * 256], b[5 * 256], c[5 * 256];
    snip_rng_key key = { 4, 5, 6 };
    int block, i, j, ok = 1;
    for (block = 16; block <= 128; block *= 2) {
        double before = 0, after = 0, dot = 0, dot_h = 0, worst = 0;
        fill(a, 5 * 256, GAUSS);
        fill(c, 256, GAUSS);
        a[300] = 1000;
        memcpy(b, a, sizeof a);
        ok = ok && snip_hadamard(b, 5, 256 - 256 % block, 256, block, key) == SNIP_OK;
        for (i = 0; i < 5 * 256; i++) {
            before += (double)a[i] * a[i];
            after += (double)b[i] * b[i];
        }
        for (i = 256; i < 512; i++)
            if (fabs((double)b[i]) > worst) worst = fabs((double)b[i]);
        ok = ok && fabs(after / before - 1) < 1e-6 && worst < 1000 / sqrt((double)block) + 6;
        for (j = 0; j < 256; j++) dot += (double)a[j] * c[j];
        snip_hadamard(c, 1, 256, 256, block, key);
        for (j = 0; j < 256; j++) dot_h += (double)b[j] * c[j];
        ok = ok && fabs(dot - dot_h) < 1e-3;
        for (i = 0; i < block; i++) {  // every entry has magnitude 1 / sqrt((double)block)
            memset(c, 0, sizeof c);
            c[i] = 1;
            snip_hadamard(c, 1, block, block, block, key);
            for (j = 0; j < block; j++) ok = ok && fabs(fabs((double)c[j]) * sqrt((double)block) - 1) < 1e-6;
        }
        snip_hadamard(b, 5, 256, 256, block, key);
        for (i = 0; i < 5 * 256; i++) ok = ok && fabsf(a[i] - b[i]) < 4e-4f;
    }
    check(ok, "Hadamard: orthogonal, spreads an outlier, keeps inner products, is its own inverse");
    check(snip_hadamard(a, 1, 100, 100, 16, key) == SNIP_BAD_ARGUMENT &&
              snip_hadamard(a, 1, 24, 24, 24, key) == SNIP_BAD_ARGUMENT &&
              snip_hadamard(NULL, 1, 16, 16, 16, key) == SNIP_BAD_ARGUMENT &&
              snip_hadamard(a, 1, 32, 16, 16, key) == SNIP_BAD_ARGUMENT,
          "Hadamard refuses");
    check(snip_hadamard(a, INT64_MAX / 8, 16, INT64_MAX / 2, 16, key) == SNIP_BAD_ARGUMENT &&
              snip_hadamard(NULL, INT64_MAX, 0, 16, 16, key) == SNIP_OK,
          "Hadamard: shapes that overflow, and none at all");
}

// NVFP4's block scale is amax * (S * (1/6)) in float32: here S = 1 and 114 * 0x1.555556p-3 is a tie, rounded up to 20.
static void test_nvfp4_order(void) {
    snip_recipe r = SNIP_RECIPE_NVFP4;
    snip_rng_key key = { 0, 0, 0 };
    uint8_t c[16], s[8];
    float v[32];
    memset(v, 0, sizeof v);
    v[3] = 2688;
    v[20] = -114;
    check(snip_quantize(&r, v, 1, 32, 32, c, s, key, NULL, NULL) == SNIP_OK && s[0] == 0x7E &&
              snip_ue4m3_to_f32(s[1]) == 20,
          "NVFP4's order of products");
}

// Any byte as a code of any format, vectors against the codecs.
static void test_decode_bytes(void) {
    int f, i, wrong = 0;
    static uint8_t all[256];
    static float out[512], scale = 0.75f;
    for (i = 0; i < 256; i++) all[i] = (uint8_t)(i * 37);
    for (f = SNIP_E4M3; f <= SNIP_E3M2; f++) {
        snip_recipe r = { SNIP_E4M3, 0, 0, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN };
        int n = f == SNIP_E2M1 ? 512 : 256;
        r.format = (snip_format)f;
        wrong += snip_dequantize(&r, all, &scale, 1, n, out, n) != SNIP_OK;
        for (i = 0; i < n; i++) {
            float expected = 0.75f * decode(r.format, (uint8_t)(f == SNIP_E2M1 ? all[i / 2] >> (i & 1) * 4 : all[i]));
            wrong += !same_floats(&out[i], &expected, 1);
        }
    }
    check(wrong == 0, "every byte dequantizes as its format says");
    {
        static const float by[] = { 0.75f, 1e-33f, 3e30f, 1e38f };

        static union {
            float f[512 + 16];
            double aligned;
        } a, b;

        int isa, s, n, stream;
        for (isa = SNIP_ISA_SCALAR, wrong = 0; isa < SNIP_ISA_COUNT; isa++)
            for (f = SNIP_E4M3; f <= SNIP_E3M2 && snip_isa_available((snip_isa)isa); f++) {
                float lut[256];
                for (i = 0; i < 256; i++) lut[i] = snipi_decode((uint32_t)i, (snip_format)f);
                for (s = 0; s < 4; s++)
                    for (n = 0; n <= 256; n += 1 + (n > 70) * 31)
                        for (stream = 0; stream < 2; stream++) {
                            float *at = a.f + (64 - (uintptr_t)a.f % 64) % 64 / 4;  // where streaming may begin
                            for (i = 0; i < n + 3; i++) at[i] = b.f[i] = 1234.0f;
                            snipi_vector_of((snip_isa)isa)->decode((snip_format)f, lut, all, n, by[s], at, stream);
                            snipi_stream_end();
                            snipi_decode_scalar((snip_format)f, lut, all, n, by[s], b.f, 0);
                            wrong += !same_floats(at, b.f, n + 3);
                        }
            }
        check(wrong == 0, "every byte dequantizes the same by every instruction set");
    }
}

// Sums of finite numbers in double.
static void test_sums(void) {
    float from[160], to[160], by[160];
    int isa, n, i, by_weight, wrong = 0;
    for (i = 0; i < 160; i++) {
        from[i] = (float)(i % 13 - 6) * (i % 7 ? 1.1f : 1e30f) * (i % 5 ? 1.0f : 1e-40f);
        to[i] = snip_bf16_to_f32(snip_bf16_from_f32(from[i]));
        by[i] = (float)(i % 11) - 4.7f;
    }
    for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++)
        for (n = 0; n <= 160 && snip_isa_available((snip_isa)isa); n++)
            for (by_weight = 0; by_weight < 2; by_weight++) {
                snipi_tally a, b;
                memset(&a, 0, sizeof a);
                a.sum_sq[3] = 1.5;
                a.err_sq[7] = 1e-7;
                a.dot[4] = -3.25;
                b = a;
                snipi_vector_of((snip_isa)isa)->sums(from, to, by_weight ? by : NULL, n, &a);
                snipi_sums_exact(from, to, by_weight ? by : NULL, n, &b);
                wrong += memcmp(&a, &b, sizeof a.sum_sq + sizeof a.err_sq + sizeof a.dot) != 0;
            }
    check(wrong == 0, "sums in double by every instruction set");
}

static void test_refusals(void) {
    snip_recipe good = SNIP_RECIPE_FP4_TILE, bad;
    snip_rng_key key = { 0, 0, 0 };
    uint8_t c[64], s[64], c0[64], s0[64];
    float v[64], v0[64];
    snip_recipe fp4 = SNIP_RECIPE_FP4_TILE;
    snip_quant_stats stats, stats0;
    snip_quantize_job job;
    int refused = 0, i, out_of_range = 99;
    memset(c, 1, sizeof c);
    memset(s, 2, sizeof s);
    memset(v, 3, sizeof v);
    memset(&stats, 4, sizeof stats);
    memcpy(c0, c, sizeof c);
    memcpy(s0, s, sizeof s);
    memcpy(v0, v, sizeof v);
    memcpy(&stats0, &stats, sizeof stats);
    fill(x, 64, GAUSS);
#define REFUSED(call)                       \
    refused += (call) == SNIP_BAD_ARGUMENT; \
    i++
    i = 0;
    REFUSED(snip_quantize(NULL, x, 2, 8, 8, c, s, key, NULL, &stats));
    REFUSED(snip_quantize(&good, NULL, 2, 8, 8, c, s, key, NULL, &stats));
    REFUSED(snip_quantize(&good, x, -1, 8, 8, c, s, key, NULL, &stats));
    REFUSED(snip_quantize(&good, x, 2, -8, 8, c, s, key, NULL, &stats));
    REFUSED(snip_quantize(&good, x, 2, 8, 7, c, s, key, NULL, &stats));
    REFUSED(snip_quantize(&good, x, 2, 8, 8, NULL, s, key, NULL, &stats));
    REFUSED(snip_quantize(&good, x, 2, 8, 8, c, NULL, key, NULL, &stats));
    REFUSED(snip_quantize(&good, x, INT64_MAX / 4, INT64_MAX / 4, INT64_MAX / 4, c, s, key, NULL, &stats));
    check(snip_codes_bound(&fp4, 65544, 131072) / 524288 == (sizeof(size_t) < 8 ? 0u : 8193u),
          "4 GiB of codes: no size_t of 32 bits says less");
    REFUSED(snip_quantize_transposed(&good, x, 2, 8, 7, c, s, key, NULL, &stats));
    REFUSED(snip_quantize_transposed(&good, x, 2, 8, 8, NULL, s, key, NULL, &stats));
    REFUSED(snip_quantize_both(&good, NULL, x, 2, 8, 8, c, s, c, s, key, &stats));
    REFUSED(snip_quantize_both(&good, &good, x, 2, 8, 8, c, s, NULL, s, key, &stats));
    REFUSED(snip_fake_quantize(NULL, x, 2, 8, 8, v, 8, key, NULL, &stats));
    REFUSED(snip_fake_quantize(&good, x, 2, 8, 8, v, 7, key, NULL, &stats));
    REFUSED(snip_fake_quantize(&good, v, 1, 7, 7, v, 8, key, NULL,
                               &stats));  // in place: rows where they are, elements as wide
    memset(&job, 0, sizeof job);
    job.x = job.out = v;
    job.rows = 2;
    job.cols = job.ld = job.ld_out = 8;
    job.recipe = &good;
    job.out_format = SNIP_BF16;
    REFUSED(snip_quantize_with(&job, &stats, NULL));
    REFUSED(snip_dequantize(&good, NULL, s, 2, 8, v, 8));
    REFUSED(snip_dequantize(&good, c, NULL, 2, 8, v, 8));
    REFUSED(snip_dequantize(&good, c, s, 2, 8, NULL, 8));
    REFUSED(snip_dequantize(&good, c, s, 2, 8, v, 7));
    bad = good;
    bad.format = SNIP_UE8M0;
    REFUSED(snip_quantize(&bad, x, 2, 8, 8, c, s, key, NULL, &stats));
    bad = good;
    bad.format = (snip_format)0;
    REFUSED(snip_quantize(&bad, x, 2, 8, 8, c, s, key, NULL, &stats));
    bad = good;
    bad.tile_cols = -1;
    REFUSED(snip_quantize(&bad, x, 2, 8, 8, c, s, key, NULL, &stats));
    bad = good;
    bad.scale = (snip_scale)out_of_range;
    REFUSED(snip_quantize(&bad, x, 2, 8, 8, c, s, key, NULL, &stats));
    bad = good;
    bad.rounding = (snip_rounding)out_of_range;
    REFUSED(snip_quantize(&bad, x, 2, 8, 8, c, s, key, NULL, &stats));
    bad = good;
    bad.format = SNIP_E4M3;
    bad.scale = SNIP_SCALE_UE4M3;
    REFUSED(snip_quantize(&bad, x, 2, 8, 8, c, s, key, NULL, &stats));
    memset(&job, 0, sizeof job);
    REFUSED(snip_quantize_with(NULL, &stats, NULL));
    REFUSED(snip_quantize_with(&job, &stats, NULL));
    job.recipe = &good;
    job.x = x;
    job.rows = 2;
    job.cols = 8;
    job.ld = 8;
    job.codes = c;
    job.scales = s;
    job.x_format = SNIP_E4M3;
    REFUSED(snip_quantize_with(&job, &stats, NULL));
    job.x_format = SNIP_F32;
    job.isa = (snip_isa)out_of_range;
    REFUSED(snip_quantize_with(&job, &stats, NULL));
    job.isa = SNIP_ISA_BEST;
    job.codes_t = c;
    REFUSED(snip_quantize_with(&job, &stats, NULL));
    check(refused == i, "bad arguments are refused");
    check(!memcmp(c, c0, sizeof c) && !memcmp(s, s0, sizeof s) && !memcmp(v, v0, sizeof v) &&
              !memcmp(&stats, &stats0, sizeof stats),
          "a refused call touches nothing");
    check(snip_codes_bound(&bad, 2, 8) == 0 && snip_scales_bound(&bad, 2, 8) == 0 &&
              snip_codes_bound(&good, 3, 7) == 12 && snip_scales_bound(&good, 3, 129) == 24,
          "bounds");
}

// More than 2^31 elements: a sparse mapping whose few touched pages lie at both ends of 2^32 + 256 bytes of floats.
static void test_huge(void) {
#if defined(__unix__) && UINTPTR_MAX > 0xFFFFFFFFu
    int64_t rows = 3, ld = ((int64_t)1 << 31) + 64, cols = 200, r, c;  // element offsets up to 2^32
    size_t bytes = (size_t)((rows - 1) * ld + cols) * sizeof(float);
    float *big = (float *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    static float small[3 * 200];
    static uint8_t c1[600], c2[600], s1[2400], s2[2400];
    snip_recipe recipes[] = { SNIP_RECIPE_FP8_TILE, SNIP_RECIPE_FP4_TILE_SR, SNIP_RECIPE_NVFP4 };
    snip_rng_key key = { 3, 2, 1 };
    int k, ok = 1;
    if (big == MAP_FAILED) {
        test_skip("rows 2^31 elements apart: no such mapping");
        return;
    }
    fill(small, 600, GAUSS);
    for (r = 0; r < rows; r++)
        for (c = 0; c < cols; c++) big[r * ld + c] = small[r * cols + c];
    for (k = 0; k < 3; k++) {
        ok = ok && snip_quantize(&recipes[k], big, rows, cols, ld, c1, s1, key, NULL, NULL) == SNIP_OK;
        ok = ok && snip_quantize(&recipes[k], small, rows, cols, cols, c2, s2, key, NULL, NULL) == SNIP_OK;
        ok = ok && !memcmp(c1, c2, snip_codes_bound(&recipes[k], rows, cols)) &&
             !memcmp(s1, s2, snip_scales_bound(&recipes[k], rows, cols));
        ok = ok && snip_quantize_transposed(&recipes[k], big, rows, cols, ld, c1, s1, key, NULL, NULL) == SNIP_OK;
        ok = ok && snip_quantize_transposed(&recipes[k], small, rows, cols, cols, c2, s2, key, NULL, NULL) == SNIP_OK;
        ok = ok && !memcmp(c1, c2, snip_codes_bound(&recipes[k], cols, rows)) &&
             !memcmp(s1, s2, snip_scales_bound(&recipes[k], cols, rows));
    }
    munmap(big, bytes);
    check(ok, "rows 2^31 elements apart");
    {  // 2^31 + 2^20 elements of BF16 zeros, all mapped to one page of memory each by the kernel's zero page: FP4, per
       // row
        snip_recipe fp4 = { SNIP_E2M1, 1, 0, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN };
        int64_t wide = ((int64_t)1 << 31) + (1 << 20);
        size_t in = (size_t)wide * 2, out = (size_t)wide / 2;
        uint16_t *source = (uint16_t *)mmap(NULL, in, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        uint8_t *target = (uint8_t *)mmap(NULL, out, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        snip_quantize_job job;
        snip_quant_stats stats;
        float scale = 0;
        if (source == MAP_FAILED || target == MAP_FAILED || !getenv("SNIP_TEST_HUGE"))
            test_skip("a row of more than 2^31 elements: SNIP_TEST_HUGE is not set, or there is no such mapping");
        else {
            source[0] = snip_bf16_from_f32(1.5f);
            source[wide - 1] = snip_bf16_from_f32(-6.0f);
            source[wide - (1 << 20) + 7] = snip_bf16_from_f32(3.0f);
            memset(&job, 0, sizeof job);
            job.x = source;
            job.x_format = SNIP_BF16;
            job.rows = 1;
            job.cols = wide;
            job.ld = wide;
            job.recipe = &fp4;
            job.codes = target;
            job.scales = &scale;
            ok = snip_quantize_with(&job, &stats, NULL) == SNIP_OK;
            check(ok && scale == 1 && target[0] == 3 && target[out - 1] == 0xF0 &&
                      target[(wide - (1 << 20) + 7) / 2] == 0x50 && stats.sum_sq == 1.5 * 1.5 + 36 + 9,
                  "one row of more than 2^31 elements");
        }
        if (source != MAP_FAILED) munmap(source, in);
        if (target != MAP_FAILED) munmap(target, out);
    }
#else
    test_skip("rows 2^31 elements apart: 64-bit Unix alone");
#endif
}

static void test_every_format(void) { test_everything(0); }

// Near the largest float a scale or a code that is rounded up makes a finite element infinite: it counts as saturated,
// once, and codes and scales stay what they are.
static void test_infinite_values(void) {
    static const snip_scale scales_of[] = { SNIP_SCALE_F32, SNIP_SCALE_POW2, SNIP_SCALE_UE8M0, SNIP_SCALE_UE8M0_UP,
                                            SNIP_SCALE_UE4M3 };

    enum { N = 256 };

    static float v[2][N], out[2][N];
    static uint8_t c[2 * N], sc[4 * N];
    snip_rng_key key = { 5, 6, 7 };
    int64_t most = 0;
    for (int i = 0; i < N; i++) {
        v[0][i] = float_of(0x7F7FFFFFu - (uint32_t)i * 0x9000u) * (i % 3 ? 1.0f : -1.0f);
        v[1][i] = 1.0f;
    }
    v[0][7] = float_of(0x7F800000u);
    for (int f = SNIP_E4M3; f <= SNIP_E3M2; f++)
        for (int s = 0; s < 5; s++)
            for (int rounding = 0; rounding < 2; rounding++)
                for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
                    snip_recipe r = { SNIP_E4M3, 1, 32, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN };
                    snip_quantize_job job;
                    snip_quant_stats st;
                    int64_t infinite = 0, beyond = 0;
                    r.format = (snip_format)f;
                    r.scale = scales_of[s];
                    r.rounding = (snip_rounding)rounding;
                    if ((r.scale == SNIP_SCALE_UE4M3 && f != SNIP_E2M1) || !snip_isa_available((snip_isa)isa)) continue;
                    memset(&job, 0, sizeof job);
                    job.x = v[0];
                    job.rows = 2;
                    job.cols = job.ld = job.ld_out = N;
                    job.recipe = &r;
                    job.codes = c;
                    job.scales = sc;
                    job.out = out[0];
                    job.key = key;
                    job.isa = (snip_isa)isa;
                    CHECK(snip_quantize_with(&job, &st, NULL) == SNIP_OK);
                    for (int i = 0; i < N; i++) infinite += finite_bits(v[0][i]) && !finite_bits(out[0][i]);
                    {
                        result expected;
                        expected.codes = codes_ref;
                        expected.scales = scales_ref;
                        expected.values = values_ref;
                        reference(&r, v[0], 2, N, N, key, NULL, &expected);
                        beyond = expected.stats.saturated;
                    }
                    test_about("format %d, scale %d, rounding %d, isa %d: %d infinite, %d counted", f, r.scale,
                               rounding, isa, (int)infinite, (int)st.saturated);
                    CHECK(st.saturated >= infinite && st.saturated == beyond && st.nonfinite == 1);
                    most = infinite > most ? infinite : most;
                }
    CHECK(most > 10);  // else the test shows nothing
    {                  // BF16 rounds the largest floats up to infinity
        snip_recipe bf16 = SNIP_RECIPE_BF16;
        snip_quant_stats st;
        float four[4] = { float_of(0x7F7F7FFFu), float_of(0x7F7F8000u), float_of(0xFF7FFFFFu), float_of(0x7F800000u) };
        uint16_t h[4];
        CHECK(snip_quantize(&bf16, four, 1, 4, 4, h, NULL, key, NULL, &st) == SNIP_OK && h[0] == 0x7F7F &&
              h[1] == 0x7F80);
        CHECK(st.saturated == 2 && st.nonfinite == 1);
    }
}

// NVFP4: elements of a tile whose stored scale is zero are stored as zeros and are not saturated.
static void test_zero_scale(void) {
    enum { ROWS_HERE = 130, N = 64 };

    static float v[ROWS_HERE * N];
    static uint8_t c[ROWS_HERE * N], sc[ROWS_HERE * N];
    snip_recipe r = SNIP_RECIPE_NVFP4;
    snip_rng_key key = { 1, 2, 3 };
    for (int rounding = 0; rounding < 2; rounding++)
        for (int turned = 0; turned < 2; turned++)
            for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
                const int64_t rows = turned ? N : ROWS_HERE, cols = turned ? ROWS_HERE : N, across = (cols + 15) / 16;
                snip_quantize_job job;
                snip_quant_stats st;
                int64_t wrong = 0, seen = 0;
                if (!snip_isa_available((snip_isa)isa)) continue;
                for (int i = 0; i < ROWS_HERE * N; i++) v[i] = (i & 1 ? -1e-8f : 1e-8f) * (float)(1 + i % 5);
                v[0] = 1;
                r.rounding = (snip_rounding)rounding;
                memset(&job, 0, sizeof job);
                job.x = v;
                job.rows = ROWS_HERE;
                job.cols = job.ld = N;
                *(turned ? &job.recipe_t : &job.recipe) = &r;
                *(turned ? &job.codes_t : &job.codes) = c;
                *(turned ? &job.scales_t : &job.scales) = sc;
                job.key = key;
                job.isa = (snip_isa)isa;
                CHECK(snip_quantize_with(&job, turned ? NULL : &st, turned ? &st : NULL) == SNIP_OK);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < cols; j++) {
                        const int code = c[i * ((cols + 1) / 2) + j / 2] >> (j & 1) * 4 & 7;
                        if (sc[i * across + j / 16]) continue;
                        wrong += code != 0;
                        seen += j % 16 == 0;
                    }
                test_about("rounding %d, transposed %d, isa %d: %d wrong, %d saturated", rounding, turned, isa,
                           (int)wrong, (int)st.saturated);
                CHECK(seen == rows * across - 1 && wrong == 0 && st.saturated == 0);
            }
}

static void set_mode_of_all_threads(int mode) {
    fesetround(mode);
#ifdef _OPENMP
#    pragma omp parallel
    fesetround(mode);
#endif
}

// Codes, scales, values and statistics are the same in any rounding mode, which is the host's again afterwards.
static void test_rounding_modes(void) {
#if defined(FE_UPWARD) && defined(FE_DOWNWARD) && defined(FE_TOWARDZERO)
    static const int modes[] = { FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO };
    static const snip_recipe recipes[] = { SNIP_RECIPE_FP8_TILE, SNIP_RECIPE_FP4_TILE, SNIP_RECIPE_FP4_TILE_SR,
                                           SNIP_RECIPE_NVFP4, SNIP_RECIPE_MXFP4 };

    enum { R = 150, N = 260, RECIPES = sizeof recipes / sizeof recipes[0] };

    static float v[R * N], out[2][R * N];
    static uint8_t c[2][R * N], ct[2][R * N], sc[2][4 * R * N], st[2][4 * R * N];
    snip_rng_key key = { 1, 2, 3 };
    fill(v, R * N, GAUSS);
    for (int k = 0; k < RECIPES; k++)
        for (int m = 0; m < 3; m++)
            for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
                snip_quant_stats stats[2];
                if (!snip_isa_available((snip_isa)isa)) continue;
                for (int other = 0; other < 2; other++) {
                    snip_quantize_job job;
                    memset(&job, 0, sizeof job);
                    job.x = v;
                    job.rows = R;
                    job.cols = job.ld = N;
                    job.recipe = job.recipe_t = &recipes[k];
                    job.codes = c[other];
                    job.scales = sc[other];
                    job.codes_t = ct[other];
                    job.scales_t = st[other];
                    job.key = key;
                    job.isa = (snip_isa)isa;
                    if (other) set_mode_of_all_threads(modes[m]);
                    CHECK(snip_quantize_with(&job, &stats[other], NULL) == SNIP_OK);
                    CHECK(snip_dequantize(&recipes[k], c[other], sc[other], R, N, out[other], N) == SNIP_OK);
                    CHECK(fegetround() == (other ? modes[m] : FE_TONEAREST));
                    set_mode_of_all_threads(FE_TONEAREST);
                }
                test_about("recipe %d, mode %d, isa %d", k, m, isa);
                CHECK(!memcmp(c[0], c[1], sizeof c[0]) && !memcmp(sc[0], sc[1], sizeof sc[0]));
                CHECK(!memcmp(ct[0], ct[1], sizeof ct[0]) && !memcmp(st[0], st[1], sizeof st[0]));
                CHECK(!memcmp(out[0], out[1], sizeof out[0]) && !memcmp(&stats[0], &stats[1], sizeof stats[0]));
            }
    uint8_t (*volatile encoder)(snip_format, float) = encode;  // called each time, in the mode of the time
    for (int m = 0; m < 3; m++)
        for (uint32_t u = 0; u < 0x90000000u - 70001u; u += 70001u)
            for (int f = SNIP_E4M3; f <= SNIP_E3M2; f++) {
                const uint8_t expected = encoder((snip_format)f, float_of(u));
                fesetround(modes[m]);
                const uint8_t got = encoder((snip_format)f, float_of(u));
                fesetround(FE_TONEAREST);
                if (got != expected) {
                    test_about("format %d, %08x, mode %d", f, (unsigned)u, m);
                    CHECK(got == expected);
                }
            }
#else
    test_skip("no other rounding modes");
#endif
}

int main(int argc, char **argv) {
    const int hash = argc > 1 && !strcmp(argv[1], "--hash");
    test_start(hash ? 1 : argc, argv);
    if (hash) {
        int isa, same = 1;
        test_everything(1);
        for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++)
            same = same && (!digest[isa] || digest[isa] == digest[SNIP_ISA_SCALAR]);
        printf("%016llx%s\n", (unsigned long long)digest[SNIP_ISA_SCALAR], same ? "" : " instruction sets differ");
        return !same;
    }
    RUN(test_philox);
    RUN(test_every_format);
    RUN(test_plain_formats);
    RUN(test_both);
    RUN(test_blocks);
    RUN(test_in_place_and_threads);
    RUN(test_stochastic);
    RUN(test_gauss);
    RUN(test_hadamard);
    RUN(test_nvfp4_order);
    RUN(test_decode_bytes);
    RUN(test_sums);
    RUN(test_refusals);
    RUN(test_huge);
    RUN(test_infinite_values);
    RUN(test_zero_scale);
    RUN(test_rounding_modes);
    return test_end();
}
