// Digests of what must not change when the library's insides do: one line for an instruction set and a subject.
//
//     cc -O2 -I FOLDER tests/digest.c -o digest -lm && ./digest [--values] [codecs] [noise] [quantize] [gemm] [train]
//
// FOLDER has the snip.h under test; tests/digest.sh compares two of them. Public names alone are used, none younger
// than the first version that had them all. A subject that ends in "*" covers results that a fixed fault may change.
// --values prints every cost and loss of the training runs too, to see how far apart two versions are. Named parts
// are made alone.
#define SNIP_IMPLEMENTATION
#include "snip.h"

// ---- hashing and data ----

static uint64_t digest;
static int values;

static void digest_start(void) { digest = 14695981039346656037u; }

static void digest_bytes(const void *data, size_t size) {  // FNV-1a by words of eight bytes, the last one's rest zero
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, bytes + i, size - i < 8 ? size - i : 8);
        digest = (digest ^ word) * 1099511628211u;
        digest ^= digest >> 29;
    }
}

static void digest_int(int64_t number) { digest_bytes(&number, sizeof number); }

static void digest_floats(const float *x, int64_t count) { digest_bytes(x, (size_t)count * sizeof *x); }

static void digest_double(double number) { digest_bytes(&number, sizeof number); }

static void digest_stats(const snip_quant_stats *stats) {
    digest_double(stats->sum_sq);
    digest_double(stats->err_sq);
    digest_double(stats->dot);
    digest_floats(&stats->amax, 1);
    digest_int(stats->nonfinite);
    digest_int(stats->saturated);
}

static void digest_print(snip_isa isa, const char *subject) {
    printf("%-12s %-32s %016llx\n", snip_isa_name(isa), subject, (unsigned long long)digest);
    fflush(stdout);
}

static uint64_t random_state = 1;

static uint32_t random_word(void) {  // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float uniform(void) { return (float)(random_word() >> 8) * (1.0f / 8388608.0f) - 1.0f; }

static void *room(size_t size) {
    void *memory = calloc(size ? size : 1, 1);
    if (!memory) {
        printf("out of memory\n");
        exit(2);
    }
    return memory;
}

static float *room_of_floats(int64_t count) { return (float *)room((size_t)count * sizeof(float)); }

// Kinds of data. Exponents end at 2^60: near the largest float and under a zero NVFP4 scale results may change.
typedef enum { PLAIN, WIDE, SUBNORMALS, SPECIAL, TIES, DATA_KINDS } data_kind;

static void fill(float *x, int64_t rows, int64_t cols, int64_t ld, data_kind kind) {
    static const uint32_t lowest[DATA_KINDS] = { 122, 67, 0, 60, 124 };
    static const uint32_t span[DATA_KINDS] = { 8, 120, 2, 125, 6 };
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < ld; c++) {
            uint32_t exponent = lowest[kind] + random_word() % span[kind];
            uint32_t mantissa = random_word() & (kind == TIES ? 0x80780000u : 0x807FFFFFu);
            x[r * ld + c] = float_of(exponent << 23 | mantissa);
            if (c >= cols) x[r * ld + c] = float_of(0x7FC00000u);  // between the rows
            if (kind != SPECIAL || c >= cols) continue;
            switch (random_word() % 32) {
                case 0: x[r * ld + c] = float_of(0x7FC00001u); break;  // NaN
                case 1: x[r * ld + c] = float_of(0x7F800000u); break;  // infinity
                case 2: x[r * ld + c] = float_of(0xFF800000u); break;
                case 3: x[r * ld + c] = float_of(0x80000000u); break;  // -0
                case 4: x[r * ld + c] = 0; break;
                default: break;
            }
        }
    if (kind == SPECIAL)  // a stretch of zeros: whole tiles of some sizes
        for (int64_t r = 0; r < rows && r < 40; r++)
            for (int64_t c = 0; c < cols && c < 70; c++) x[r * ld + c] = 0;
}

// ---- quantizer ----

typedef struct {
    int64_t rows, cols, ld;
} shape;

static const shape shapes[] = {
    {1,    1,    1   },
    { 3,   5,    7   },
    { 17,  33,   33  },
    { 64,  128,  128 },
    { 66,  150,  161 },
    { 33,  257,  257 },
    { 1,   1000, 1000},
    { 150, 3,    4   },
    { 5,   640,  640 },
    { 40,  272,  300 },
    { 0,   4,    4   },
    { 33,  1,    1   }
};

enum { SHAPES = (int)(sizeof shapes / sizeof shapes[0]) };

static const int32_t tile_shapes[][2] = {
    {1,    128},
    { 128, 128},
    { 1,   32 },
    { 1,   16 },
    { 0,   0  },
    { 1,   0  },
    { 16,  16 },
    { 3,   7  },
    { 1,   1  },
    { 32,  1  },
    { 64,  256}
};

enum { TILE_SHAPES = (int)(sizeof tile_shapes / sizeof tile_shapes[0]) };

// Every output of one job: both orientations, dequantized values, statistics.
static void digest_job(const snip_quantize_job *template_job, int both) {
    snip_quantize_job job = *template_job;
    snip_quant_stats stats, stats_t;
    size_t codes = snip_codes_bound(job.recipe, job.rows, job.cols);
    size_t scales = snip_scales_bound(job.recipe, job.rows, job.cols);
    size_t codes_t = snip_codes_bound(job.recipe, job.cols, job.rows);
    size_t scales_t = snip_scales_bound(job.recipe, job.cols, job.rows);
    size_t element = job.out_format == SNIP_BF16 ? 2 : 4;
    memset(&stats, 0, sizeof stats);
    memset(&stats_t, 0, sizeof stats_t);
    job.codes = room(codes);
    job.scales = room(scales);
    job.out = room((size_t)(job.rows * job.ld) * element);
    job.ld_out = job.ld;
    if (both) {
        job.recipe_t = job.recipe;
        job.codes_t = room(codes_t);
        job.scales_t = room(scales_t);
    }
    digest_int((int64_t)snip_quantize_with(&job, &stats, both ? &stats_t : NULL));
    digest_bytes(job.codes, codes);
    digest_bytes(job.scales, scales);
    for (int64_t r = 0; r < job.rows; r++)
        digest_bytes((const char *)job.out + (size_t)(r * job.ld) * element, (size_t)job.cols * element);
    digest_stats(&stats);
    if (both) {
        digest_bytes(job.codes_t, codes_t);
        digest_bytes(job.scales_t, scales_t);
        digest_stats(&stats_t);
        free(job.codes_t);
        free(job.scales_t);
    }
    free(job.codes);
    free(job.scales);
    free(job.out);
}

static int wanted(const snip_recipe *recipe, data_kind kind) {
    if (recipe->scale != SNIP_SCALE_UE4M3) return 1;
    // a tile that holds nothing, or next to nothing beside another, would have a scale of zero
    int elements = recipe->tile_rows * recipe->tile_cols;
    return (kind == PLAIN || kind == TIES) && (elements == 0 || elements >= 16);
}

static void digest_quantizer(snip_isa isa, const snip_recipe *base) {
    for (int s = 0; s < SHAPES; s++)
        for (int t = 0; t < TILE_SHAPES; t++)
            for (int kind = 0; kind < DATA_KINDS; kind++) {
                int64_t rows = shapes[s].rows, cols = shapes[s].cols, ld = shapes[s].ld;
                snip_recipe recipe = *base;
                recipe.tile_rows = tile_shapes[t][0];
                recipe.tile_cols = tile_shapes[t][1];
                random_state = (uint64_t)(s * 1000 + t * 10 + kind);
                if (!wanted(&recipe, (data_kind)kind)) continue;
                if ((s + t + kind) % 3) continue;                                       // a third of all combinations
                if (recipe.tile_cols == 1 && recipe.tile_rows == 1 && s % 2) continue;  // the slowest
                float *x = room_of_floats(rows * ld), *weight = room_of_floats(rows * ld);
                uint16_t *narrow = (uint16_t *)room((size_t)(rows * ld) * sizeof *narrow);
                fill(x, rows, cols, ld, (data_kind)kind);
                fill(weight, rows, cols, ld, PLAIN);
                for (int64_t i = 0; i < rows * ld; i++) narrow[i] = snip_bf16_from_f32(x[i]);
                snip_quantize_job job;
                memset(&job, 0, sizeof job);
                job.x = x;
                job.rows = rows;
                job.cols = cols;
                job.ld = ld;
                job.recipe = &recipe;
                job.isa = isa;
                job.key.seed = 5;
                job.key.step = (uint32_t)t;
                job.key.tensor = (uint32_t)s;
                digest_job(&job, 1);
                job.weight = weight;
                digest_job(&job, 0);
                job.weight = NULL;
                job.x = narrow;
                job.x_format = SNIP_BF16;
                job.out_format = SNIP_BF16;
                digest_job(&job, kind % 2);
                free(x);
                free(weight);
                free(narrow);
            }
}

static void digest_formats(snip_isa isa) {
    if (isa != SNIP_ISA_SCALAR && isa != SNIP_ISA_AVX2 && isa != SNIP_ISA_AVX512 && isa != SNIP_ISA_NEON) return;
    static const char *const scale_names[] = { "none", "f32", "pow2", "ue8m0", "ue4m3", "ue8m0up" };
    for (int format = SNIP_F32; format <= SNIP_E3M2; format++)
        for (int scale = SNIP_SCALE_NONE; scale <= SNIP_SCALE_UE8M0_UP; scale++)
            for (int rounding = 0; rounding < 2; rounding++) {
                snip_recipe recipe = { (snip_format)format, 0, 0, (snip_scale)scale, (snip_rounding)rounding };
                char subject[64];
                if (!snip_codes_bound(&recipe, 2, 2)) continue;
                snprintf(subject, sizeof subject, "quantize.%s.%s.%s", snip_format_name((snip_format)format),
                         scale_names[scale], rounding ? "sr" : "rne");
                digest_start();
                digest_quantizer(isa, &recipe);
                digest_print(isa, subject);
            }
}

// The plain entry points, which choose the instruction set themselves.
static void digest_entries(void) {
    static const snip_recipe recipes[] = { SNIP_RECIPE_BF16,        SNIP_RECIPE_FP8_TILE,  SNIP_RECIPE_FP8_BLOCK,
                                           SNIP_RECIPE_FP4_TILE_SR, SNIP_RECIPE_FP4_BLOCK, SNIP_RECIPE_MXFP8,
                                           SNIP_RECIPE_MXFP4,       SNIP_RECIPE_NVFP4 };
    snip_rng_key key = { 9, 3, 2 };
    digest_start();
    for (int i = 0; i < (int)(sizeof recipes / sizeof recipes[0]); i++)
        for (int s = 0; s < SHAPES; s++) {
            int64_t rows = shapes[s].rows, cols = shapes[s].cols, ld = shapes[s].ld;
            const snip_recipe *recipe = &recipes[i];
            size_t codes = snip_codes_bound(recipe, rows, cols), scales = snip_scales_bound(recipe, rows, cols);
            size_t codes_t = snip_codes_bound(recipe, cols, rows), scales_t = snip_scales_bound(recipe, cols, rows);
            float *x = room_of_floats(rows * ld), *weight = room_of_floats(rows * ld), *out = room_of_floats(rows * ld);
            void *c = room(codes), *sc = room(scales), *ct = room(codes_t), *sct = room(scales_t);
            uint16_t *narrow = (uint16_t *)room((size_t)(rows * ld) * sizeof *narrow);
            snip_quant_stats stats;
            random_state = (uint64_t)s;
            fill(x, rows, cols, ld, PLAIN);
            fill(weight, rows, cols, ld, TIES);
            memset(&stats, 0, sizeof stats);
            digest_int(snip_quantize(recipe, x, rows, cols, ld, c, sc, key, weight, &stats));
            digest_bytes(c, codes);
            digest_bytes(sc, scales);
            digest_stats(&stats);
            digest_int(snip_dequantize(recipe, c, sc, rows, cols, out, ld));
            for (int64_t r = 0; r < rows; r++) digest_floats(out + r * ld, cols);
            digest_int(snip_dequantize_bf16(recipe, c, sc, rows, cols, narrow, ld));
            for (int64_t r = 0; r < rows; r++) digest_bytes(narrow + r * ld, (size_t)cols * sizeof *narrow);
            digest_int(snip_quantize_transposed(recipe, x, rows, cols, ld, ct, sct, key, weight, &stats));
            digest_bytes(ct, codes_t);
            digest_bytes(sct, scales_t);
            digest_stats(&stats);
            digest_int(snip_quantize_both(recipe, recipe, x, rows, cols, ld, c, sc, ct, sct, key, &stats));
            digest_bytes(c, codes);
            digest_bytes(sc, scales);
            digest_bytes(ct, codes_t);
            digest_bytes(sct, scales_t);
            digest_stats(&stats);
            digest_int(snip_fake_quantize(recipe, x, rows, cols, ld, out, ld, key, weight, &stats));
            for (int64_t r = 0; r < rows; r++) digest_floats(out + r * ld, cols);
            digest_stats(&stats);
            free(x);
            free(weight);
            free(out);
            free(c);
            free(sc);
            free(ct);
            free(sct);
            free(narrow);
        }
    digest_print(SNIP_ISA_BEST, "quantize.entries");
}

// ---- codecs and noise ----

static void digest_codecs(void) {
    digest_start();
    for (uint32_t upper = 0; upper < 65536; upper++)
        for (uint32_t lower = 0; lower < 3; lower++) {
            float x = float_of(upper << 16 | lower * 0x7FFFu);
            uint8_t codes[11];
            codes[0] = snip_e4m3_from_f32(x);
            codes[1] = snip_e5m2_from_f32(x);
            codes[2] = snip_e2m1_from_f32(x);
            codes[3] = snip_e2m3_from_f32(x);
            codes[4] = snip_e3m2_from_f32(x);
            codes[5] = snip_ue8m0_from_f32(x);
            codes[6] = snip_ue8m0_from_f32_floor(x);
            codes[7] = snip_ue4m3_from_f32(x);
            codes[8] = snip_e4m3_from_f32_nosat(x);
            codes[9] = snip_e5m2_from_f32_nosat(x);
            codes[10] = (uint8_t)(snip_bf16_from_f32(x) * 37u >> 4);
            digest_bytes(codes, sizeof codes);
        }
    for (int code = 0; code < 256; code++) {
        float x[8];
        x[0] = snip_e4m3_to_f32((uint8_t)code);
        x[1] = snip_e5m2_to_f32((uint8_t)code);
        x[2] = snip_e2m1_to_f32((uint8_t)code);
        x[3] = snip_e2m3_to_f32((uint8_t)code);
        x[4] = snip_e3m2_to_f32((uint8_t)code);
        x[5] = snip_ue8m0_to_f32((uint8_t)code);
        x[6] = snip_ue4m3_to_f32((uint8_t)code);
        x[7] = snip_bf16_to_f32((uint16_t)(code * 255));
        digest_floats(x, 8);
    }
    digest_print(SNIP_ISA_BEST, "codecs");
}

static void digest_noise(void) {
    enum { MOST_ELEMENTS = 5003 };

    static const int64_t counts[] = { 0, 1, 7, 64, 255, 1000, MOST_ELEMENTS };
    float *x = room_of_floats(MOST_ELEMENTS), *shape_of = room_of_floats(MOST_ELEMENTS);
    float *out = room_of_floats(MOST_ELEMENTS);
    snip_rng_key key = { 0x123456789u, 7, 11 };
    random_state = 3;
    fill(x, 1, MOST_ELEMENTS, MOST_ELEMENTS, PLAIN);
    fill(shape_of, 1, MOST_ELEMENTS, MOST_ELEMENTS, TIES);

    digest_start();
    for (uint64_t index = 0; index < 1000; index++) {
        uint32_t words[4];
        snip_philox(key, index * 0x9E3779B97F4A7C15u, words);
        digest_bytes(words, sizeof words);
    }
    digest_print(SNIP_ISA_BEST, "philox");

    digest_start();
    for (int i = 0; i < (int)(sizeof counts / sizeof counts[0]); i++) {
        double dot = 0;
        digest_int(snip_noise_add(out, x, counts[i], 0.37f, NULL, key));
        digest_floats(out, counts[i]);
        digest_int(snip_noise_add(out, x, counts[i], 0.37f, shape_of, key));
        digest_floats(out, counts[i]);
        digest_int(snip_noise_dot(x, counts[i], key, &dot));
        digest_double(dot);
    }
    digest_print(SNIP_ISA_BEST, "noise");

    digest_start();
    for (uint64_t index = 0; index < 1000; index++) {
        float normal[4];
        snip_gauss(key, index, normal);
        digest_floats(normal, 4);
    }
    for (int i = 0; i < (int)(sizeof counts / sizeof counts[0]); i++) {
        double dot = 0;
        digest_int(snip_gauss_add(out, x, counts[i], 0.37f, NULL, key));
        digest_floats(out, counts[i]);
        digest_int(snip_gauss_add(out, x, counts[i], 0.37f, shape_of, key));
        digest_floats(out, counts[i]);
        digest_int(snip_gauss_dot(x, counts[i], key, &dot));
        digest_double(dot);
    }
    digest_print(SNIP_ISA_BEST, "gauss");

    digest_start();
    for (int block = 16; block <= 128; block *= 2) {
        memcpy(out, x, MOST_ELEMENTS * sizeof *x);
        digest_int(snip_hadamard(out, 9, 384, 500, block, key));
        digest_floats(out, MOST_ELEMENTS);
    }
    digest_print(SNIP_ISA_BEST, "hadamard");
    free(x);
    free(shape_of);
    free(out);
}

// ---- GEMM ----

typedef struct {
    const char *name;
    snip_recipe recipe;
    int transposed, round_bf16;
    int64_t extra;  // added to ld
} operand_kind;

#define NEAREST SNIP_ROUND_NEAREST_EVEN
static const operand_kind operand_kinds[] = {
    {"f32",           SNIP_RECIPE_F32,                                 0, 0, 0},
    { "f32.t",        SNIP_RECIPE_F32,                                 1, 0, 3},
    { "f32.bf16",     SNIP_RECIPE_F32,                                 0, 1, 5},
    { "bf16",         SNIP_RECIPE_BF16,                                0, 0, 0},
    { "bf16.t",       SNIP_RECIPE_BF16,                                1, 0, 1},
    { "fp8.tile",     SNIP_RECIPE_FP8_TILE,                            0, 0, 0},
    { "fp8.block",    SNIP_RECIPE_FP8_BLOCK,                           0, 0, 0},
    { "e5m2.tile",    { SNIP_E5M2, 1, 128, SNIP_SCALE_POW2, NEAREST }, 0, 0, 0},
    { "e2m3.mx",      { SNIP_E2M3, 1, 32, SNIP_SCALE_UE8M0, NEAREST }, 0, 0, 0},
    { "e3m2.row",     { SNIP_E3M2, 1, 0, SNIP_SCALE_F32, NEAREST },    0, 0, 0},
    { "mxfp8",        SNIP_RECIPE_MXFP8,                               0, 0, 0},
    { "fp4.tile",     SNIP_RECIPE_FP4_TILE,                            0, 0, 0},
    { "fp4.block",    SNIP_RECIPE_FP4_BLOCK,                           0, 0, 0},
    { "mxfp4",        SNIP_RECIPE_MXFP4,                               0, 0, 0},
    { "nvfp4",        SNIP_RECIPE_NVFP4,                               0, 0, 0},
    { "fp4.row",      { SNIP_E2M1, 1, 0, SNIP_SCALE_F32, NEAREST },    0, 0, 0},
    { "fp4.1x48",     { SNIP_E2M1, 1, 48, SNIP_SCALE_F32, NEAREST },   0, 0, 0},
    { "fp4.unscaled", { SNIP_E2M1, 0, 0, SNIP_SCALE_NONE, NEAREST },   0, 0, 0},
};

enum { OPERAND_KINDS = (int)(sizeof operand_kinds / sizeof operand_kinds[0]) };

typedef struct {
    void *codes, *scales;
    snip_operand operand;
} operand_data;

static operand_data operand_make(const operand_kind *kind, int64_t rows, int64_t k) {
    operand_data made;
    const snip_recipe *recipe = &kind->recipe;
    int64_t lines = kind->transposed ? k : rows, across = kind->transposed ? rows : k, ld = across + kind->extra;
    snip_rng_key key = { 77, 1, 2 };
    memset(&made, 0, sizeof made);
    made.operand.recipe = recipe;
    float *x = room_of_floats(lines * ld);
    for (int64_t i = 0; i < lines * ld; i++) x[i] = uniform() * (float)(1 + random_word() % 16);
    if (recipe->format == SNIP_F32 || recipe->format == SNIP_BF16) {
        made.operand.ld = kind->extra ? ld : 0;
        made.operand.transposed = kind->transposed;
        made.operand.round_bf16 = kind->round_bf16;
        made.codes = x;
        if (recipe->format == SNIP_BF16) {
            uint16_t *narrow = (uint16_t *)room((size_t)(lines * ld) * sizeof *narrow);
            for (int64_t i = 0; i < lines * ld; i++) narrow[i] = snip_bf16_from_f32(x[i]);
            free(x);
            made.codes = narrow;
        }
    } else {
        made.codes = room(snip_codes_bound(recipe, rows, k));
        made.scales = room(snip_scales_bound(recipe, rows, k));
        digest_int(snip_quantize(recipe, x, rows, k, k, made.codes, made.scales, key, NULL, NULL));
        free(x);
    }
    made.operand.codes = made.codes;
    made.operand.scales = made.scales;
    return made;
}

static void digest_product(snip_isa isa, const operand_kind *kind_a, const operand_kind *kind_b, const int64_t size[3],
                           int accumulate, int with_bias) {
    int64_t m = size[0], n = size[1], k = size[2], ldc = n + 3;
    operand_data a = operand_make(kind_a, m, k), b = operand_make(kind_b, n, k);
    float *c = room_of_floats(m * ldc), *bias = room_of_floats(n);
    void *scratch = room(snip_gemm_scratch(m, n, k));
    for (int64_t i = 0; i < m * ldc; i++) c[i] = uniform();
    for (int64_t i = 0; i < n; i++) bias[i] = uniform();
    digest_int(snip_gemm(m, n, k, &a.operand, &b.operand, c, ldc, accumulate, with_bias ? bias : NULL, scratch, isa));
    digest_floats(c, m * ldc);
    free(a.codes);
    free(a.scales);
    free(b.codes);
    free(b.scales);
    free(c);
    free(bias);
    free(scratch);
}

static void digest_gemm(snip_isa isa) {
    static const int64_t sizes[][3] = {
        {1,    1,   1  },
        { 5,   7,   33 },
        { 48,  64,  256},
        { 33,  65,  300},
        { 130, 40,  17 },
        { 70,  129, 513}
    };
    for (int a = 0; a < OPERAND_KINDS; a++) {
        const operand_kind *kind_a = &operand_kinds[a];
        for (int fp4 = 0; fp4 < 2; fp4++) {
            char subject[64];
            int cases = 0;
            digest_start();
            for (int b = 0; b < OPERAND_KINDS; b++) {
                const operand_kind *kind_b = &operand_kinds[b];
                if ((kind_a->recipe.format == SNIP_E2M1 && kind_b->recipe.format == SNIP_E2M1) != fp4) continue;
                for (int i = 0; i < (int)(sizeof sizes / sizeof sizes[0]); i++) {
                    random_state = (uint64_t)(a * 1000 + b * 10 + i);
                    digest_product(isa, kind_a, kind_b, sizes[i], (a + b + i) % 2, (a + b + i) % 3 == 0);
                    cases++;
                }
            }
            if (!cases) continue;
            snprintf(subject, sizeof subject, "gemm.%s.by_%s", kind_a->name, fp4 ? "fp4" : "others");
            digest_print(isa, subject);
        }
    }
}

// ---- training ----

// L = mean (Y - T)^2 / 2 of a network of tanh layers. Its widths are no multiples of the tiles'.
enum { LAYERS = 4, ROWS = 48, STEPS = 60, EVERY = 10, WIDEST = 160 };

static const int widths[LAYERS + 1] = { 64, WIDEST, 96, 136, 32 };
static const char *const layer_names[LAYERS] = { "0.mlp.up", "0.mlp.down", "1.mlp.up", "1.mlp.down" };

typedef struct {
    float *weight, *gradient, *m, *v, *bias, *dbias;
    float *output, *doutput;  // [rows][out], before tanh
} network_layer;

typedef struct {
    network_layer layers[LAYERS];
    float *input[LAYERS];  // [rows][in]
    float *dinput, *target;
} network;

typedef struct {
    const char *name;
    int bias, micros, halfway_restart;
    void (*describe)(snip_desc *);
} training;

static int64_t layer_weights(int l) { return (int64_t)widths[l] * widths[l + 1]; }

static network network_make(void) {
    network net;
    random_state = 42;
    for (int l = 0; l < LAYERS; l++) {
        network_layer *layer = &net.layers[l];
        layer->weight = room_of_floats(layer_weights(l));
        layer->gradient = room_of_floats(layer_weights(l));
        layer->m = room_of_floats(layer_weights(l));
        layer->v = room_of_floats(layer_weights(l));
        layer->bias = room_of_floats(widths[l + 1]);
        layer->dbias = room_of_floats(widths[l + 1]);
        layer->output = room_of_floats((int64_t)ROWS * widths[l + 1]);
        layer->doutput = room_of_floats((int64_t)ROWS * widths[l + 1]);
        net.input[l] = room_of_floats((int64_t)ROWS * widths[l]);
        for (int64_t i = 0; i < layer_weights(l); i++) layer->weight[i] = uniform() * 2 / sqrtf((float)widths[l]);
    }
    net.dinput = room_of_floats((int64_t)ROWS * WIDEST);
    net.target = room_of_floats((int64_t)ROWS * widths[LAYERS]);
    return net;
}

static void network_free(network *net) {
    for (int l = 0; l < LAYERS; l++) {
        network_layer *layer = &net->layers[l];
        free(layer->weight);
        free(layer->gradient);
        free(layer->m);
        free(layer->v);
        free(layer->bias);
        free(layer->dbias);
        free(layer->output);
        free(layer->doutput);
        free(net->input[l]);
    }
    free(net->dinput);
    free(net->target);
}

static void network_batch(network *net, int step) {
    random_state = (uint64_t)step * 1000003u;
    for (int i = 0; i < ROWS * widths[0]; i++) net->input[0][i] = uniform();
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < widths[LAYERS]; c++) {
            const float *x = net->input[0] + r * widths[0] + c;
            net->target[r * widths[LAYERS] + c] = fabsf(x[0] + x[1]) - x[2] * x[3];
        }
}

// Forward and backward of rows first .. first + rows - 1, gradients added; the sum of their losses.
static double network_rows(network *net, snip *s, int bias, int first, int rows) {
    double loss = 0;
    for (int l = 0; l < LAYERS; l++) {
        network_layer *layer = &net->layers[l];
        const float *x = net->input[l] + first * widths[l];
        float *y = layer->output + first * widths[l + 1];
        digest_int(snip_linear_forward(s, l, y, x, layer->weight, bias ? layer->bias : NULL, rows));
        for (int i = 0; l + 1 < LAYERS && i < rows * widths[l + 1]; i++)
            net->input[l + 1][first * widths[l + 1] + i] = tanhf(y[i]);
    }
    for (int i = first * widths[LAYERS]; i < (first + rows) * widths[LAYERS]; i++) {
        float error = net->layers[LAYERS - 1].output[i] - net->target[i];
        loss += 0.5 * (double)error * (double)error;
        net->layers[LAYERS - 1].doutput[i] = error / (float)(ROWS * widths[LAYERS]);
    }
    for (int l = LAYERS - 1; l >= 0; l--) {
        network_layer *layer = &net->layers[l];
        const float *x = net->input[l] + first * widths[l];
        memset(net->dinput, 0, sizeof(float) * ROWS * WIDEST);
        digest_int(snip_linear_backward(s, l, net->dinput, layer->gradient, bias ? layer->dbias : NULL,
                                        layer->doutput + first * widths[l + 1], x, layer->weight, rows));
        for (int i = 0; l > 0 && i < rows * widths[l]; i++)
            net->layers[l - 1].doutput[first * widths[l] + i] = net->dinput[i] * (1 - x[i] * x[i]);
    }
    return loss;
}

static double network_pass(network *net, snip *s, const training *run) {
    double loss = 0;
    for (int l = 0; l < LAYERS; l++) {
        memset(net->layers[l].gradient, 0, (size_t)layer_weights(l) * sizeof(float));
        memset(net->layers[l].dbias, 0, (size_t)widths[l + 1] * sizeof(float));
    }
    for (int micro = 0; micro < run->micros; micro++)
        loss += network_rows(net, s, run->bias, ROWS / run->micros * micro, ROWS / run->micros);
    return loss / (ROWS * widths[LAYERS]);
}

static void network_update(network *net, snip_optimizer optimizer, const snip_adamw *o, int bias) {
    float lr = (float)o->lr, b1 = (float)o->beta1, b2 = (float)o->beta2, eps = (float)o->eps;
    float c1 = 1 / (1 - powf(b1, (float)o->step)), c2 = 1 / (1 - powf(b2, (float)o->step));
    for (int l = 0; l < LAYERS; l++) {
        network_layer *layer = &net->layers[l];
        for (int64_t i = 0; i < layer_weights(l); i++) {
            float g = layer->gradient[i], *m = &layer->m[i], *v = &layer->v[i], u;
            if (optimizer == SNIP_SGD_MOMENTUM)
                u = *m = b1 * *m + g;
            else if (optimizer == SNIP_LION) {
                u = b1 * *m + (1 - b1) * g;
                u = u > 0 ? 1.0f : u < 0 ? -1.0f : 0.0f;
                *m = b2 * *m + (1 - b2) * g;
            } else {
                *m = b1 * *m + (1 - b1) * g;
                *v = b2 * *v + (1 - b2) * g * g;
                u = *m * c1 / (sqrtf(*v * c2) + eps);
            }
            layer->weight[i] -= lr * u;
        }
        for (int i = 0; bias && i < widths[l + 1]; i++) layer->bias[i] -= lr * layer->dbias[i];
    }
}

static void describe_default(snip_desc *d) { (void)d; }

static void describe_mx(snip_desc *d) {
    static const snip_recipe mxfp8 = SNIP_RECIPE_MXFP8, mxfp4 = SNIP_RECIPE_MXFP4;
    d->fp8.activation = d->fp8.weight = d->fp8.gradient = mxfp8;
    d->fp4.activation = d->fp4.weight = d->fp4.gradient = mxfp4;
    d->fp4.gradient.rounding = SNIP_ROUND_STOCHASTIC;
    d->measure = SNIP_BF16;
    d->per_layer = 1;
    d->optimizer = SNIP_SGD_MOMENTUM;
}

static void describe_nv(snip_desc *d) {
    static const snip_recipe nvfp4 = SNIP_RECIPE_NVFP4;
    d->fp4.activation = d->fp4.weight = d->fp4.gradient = nvfp4;
    d->n_stages = 2;
    d->high = SNIP_F32;
    d->optimizer = SNIP_LION;
    d->horizon = 20;
    d->sample = 1;
}

static double slopes(void *user, int layer, float *d) {
    (void)user;
    for (int64_t i = 0; d && i < layer_weights(layer); i++) d[i] = 1.0f / (float)(1 + i % 7);
    return 2.5 * (layer + 1);
}

static void describe_seconds(snip_desc *d) {
    d->budget = 0;
    d->speedup = 1.8;
    d->optimizer = SNIP_CUSTOM;
    d->sensitivity = slopes;
    d->drift = -1;
    d->margin = -1;
}

static void describe_loss_alone(snip_desc *d) {
    d->update_weight = -1;
    d->spike = -1;
}

static const training trainings[] = {
    {"default",     0, 1, 0, describe_default   },
    { "restart",    0, 1, 1, describe_default   },
    { "mx",         0, 1, 0, describe_mx        },
    { "nv",         0, 1, 0, describe_nv        },
    { "seconds",    0, 1, 0, describe_seconds   },
    { "loss_alone", 0, 1, 0, describe_loss_alone},
    { "micros*",    0, 3, 0, describe_default   }, // the probe's noise and the first micro-batch
    { "bias*",      1, 1, 0, describe_default   }, // how dbias is summed
};

static snip *session_make(const snip_desc *d, network *net) {
    snip *s = snip_create(d);
    if (!s) {
        printf("no session\n");
        exit(2);
    }
    for (int l = 0; l < LAYERS; l++) {
        snip_add_linear(s, layer_names[l], widths[l + 1], widths[l], d->n_stages > 1 ? l * d->n_stages / LAYERS : 0);
        if (d->optimizer == SNIP_ADAMW)
            snip_bind_adamw(s, l, net->layers[l].m, net->layers[l].v);
        else if (d->optimizer != SNIP_CUSTOM)
            snip_bind_momentum(s, l, net->layers[l].m);
        for (int gemm = 0; d->speedup > 0 && gemm < SNIP_GEMMS; gemm++) {
            double flops = (double)layer_weights(l) * ROWS, seconds[3] = { flops, 0.6 * flops, 0.4 * flops };
            snip_set_seconds(s, l, (snip_gemm_kind)gemm, seconds);
        }
    }
    return s;
}

static snip *session_restarted(snip *s, const snip_desc *d, network *net) {
    size_t size = snip_state_size(s);
    void *state = room(size);
    digest_int(snip_state_save(s, state));
    snip_destroy(s);
    s = session_make(d, net);
    digest_int(snip_state_load(s, state, size));
    free(state);
    return s;
}

static void digest_estimate(const snip_estimate *e) {
    double all[2 + 3 * SNIP_GEMMS];
    int count = 0;
    all[count++] = e->loss_first;
    all[count++] = e->loss_second;
    for (int gemm = 0; gemm < SNIP_GEMMS; gemm++) {
        all[count++] = e->update[gemm];
        all[count++] = e->cost[gemm];
        all[count++] = e->error[gemm];
    }
    for (int i = 0; i < count; i++) {
        digest_double(all[i]);
        if (values) printf(" %.9g", all[i]);
    }
}

static void digest_costs(const snip *s) {
    for (int l = 0; l < LAYERS; l++) {
        snip_layer_info info;
        snip_layer(s, l, &info);
        if (values) printf("#   %s:", info.name);
        digest_estimate(&info.fp8);
        digest_estimate(&info.fp4);
        digest_double(info.measurements);
        digest_int(info.saturated);
        digest_int(info.nonfinite);
        if (values) printf("\n");
    }
}

static void digest_plan(const snip *s) {
    for (int l = 0; l < LAYERS; l++) {
        snip_layer_info info;
        snip_layer(s, l, &info);
        for (int gemm = 0; gemm < SNIP_GEMMS; gemm++) digest_int((int64_t)info.format[gemm]);
    }
    digest_int(snip_plans(s));
    digest_double(snip_share(s, SNIP_E2M1));
    digest_double(snip_plan_seconds(s));
}

static void digest_print_part(snip_isa isa, const training *run, const char *part) {
    char subject[64];
    int listed = strchr(run->name, '*') != NULL;
    snprintf(subject, sizeof subject, "train.%.*s.%s%s", (int)strcspn(run->name, "*"), run->name, part,
             listed ? "*" : "");
    digest_print(isa, subject);
}

static void digest_training(snip_isa isa, const training *run) {
    network net = network_make();
    snip_desc d;
    uint64_t plans = 0, costs = 0;
    memset(&d, 0, sizeof d);
    d.budget = 0.75;
    d.every = EVERY;
    d.seed = 7;
    d.isa = isa;
    run->describe(&d);
    snip *s = session_make(&d, &net);
    digest_start();
    plans = costs = digest;
    for (int step = 1; step <= STEPS; step++) {
        snip_adamw o = { d.optimizer == SNIP_LION ? 3e-4 : 2e-3, 0.9, 0.99, 1e-8, step, 1 };
        double loss;
        int passes = 0;
        if (run->halfway_restart && step == STEPS / 2 + 3) s = session_restarted(s, &d, &net);
        network_batch(&net, step);
        do {
            loss = network_pass(&net, s, run);
            passes++;
        } while (snip_next_pass(s, loss));
        network_update(&net, d.optimizer, &o, run->bias);
        digest_int(snip_end_step(s, &o));
        digest_int(passes);
        digest_double(loss);
        if (values && passes > 1) printf("# %s %s step %d loss %.9g\n", snip_isa_name(isa), run->name, step, loss);
        uint64_t weights = digest;
        digest = plans;
        digest_plan(s);
        plans = digest;
        digest = costs;
        if (passes > 1) digest_costs(s);
        costs = digest;
        digest = weights;
    }
    for (int l = 0; l < LAYERS; l++) digest_floats(net.layers[l].weight, layer_weights(l));
    digest_print_part(isa, run, "weights");
    digest = plans;
    digest_print_part(isa, run, "plans");
    digest = costs;
    digest_print_part(isa, run, "costs");
    snip_destroy(s);
    network_free(&net);
}

static int part_wanted(int argc, char **argv, const char *part) {
    int named = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], part)) return 1;
        named += strcmp(argv[i], "--values") != 0;
    }
    return !named;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) values = values || !strcmp(argv[i], "--values");
    if (part_wanted(argc, argv, "codecs")) digest_codecs();
    if (part_wanted(argc, argv, "noise")) digest_noise();
    if (part_wanted(argc, argv, "quantize")) digest_entries();
    for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
        if (!snip_isa_available((snip_isa)isa)) continue;
        if (part_wanted(argc, argv, "quantize")) digest_formats((snip_isa)isa);
        if (part_wanted(argc, argv, "gemm")) digest_gemm((snip_isa)isa);
        for (int i = 0; i < (int)(sizeof trainings / sizeof trainings[0]); i++)
            if (part_wanted(argc, argv, "train")) digest_training((snip_isa)isa, &trainings[i]);
    }
    return 0;
}
