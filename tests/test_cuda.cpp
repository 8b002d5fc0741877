// Tests of snip_cuda.cuh against snip.h. One source for two machines: with a C++ compiler the kernels run on the CPU
// under cuda_shim.h, in three orders of their threads; with nvcc (-x cu) on a GPU.
//     test_cuda [--stop] [PART OF A TEST'S NAME]...          --stop: at the first failure
//     test_cuda quantize noise gemm session codec oracle     all, in groups
// codec: the encoders on all 2^32 inputs (on the CPU, a sample). oracle: GEMMs beside cuBLASLt's (with
// -DSNIP_CUBLASLT).
#include "test.h"
#ifndef __CUDACC__
#    define SNIP_CUBLASLT
#    include "cuda_shim.h"
#endif
#define SNIP_IMPLEMENTATION
#include "../snip_cuda.cuh"
#include <math.h>
#include <vector>
#include "codec_tables.h"
#ifdef __CUDACC__
#    include <thread>
#    ifdef SNIP_CUBLASLT
#        include "cublaslt.h"
#    endif
#endif

static bool stop_at_failure;

#undef CHECK
#define CHECK(condition) check((condition) != 0, #condition, __LINE__)

static void check(bool ok, const char *condition, int line) {
    if (!test_check(ok, condition, __FILE__, line) && stop_at_failure) exit(1);
}

// One case in SNIP_TEST_FEW.
static bool wanted() {
    static long cases;
    return cases++ % test.few == 0;
}

static uint32_t rng() { return (uint32_t)(random_bits() >> 32); }

static float uniform() { return (float)(rng() >> 8) / 8388608.0f - 1.0f; }

// ---- memory that both sides see, ending on its last byte or on a guard ----
#if defined(SHIM_ASAN)
enum { GUARD = 0 };
#else
enum { GUARD = 64 };
#endif
struct buffer {
    unsigned char *at;
    size_t size;

    explicit buffer(size_t bytes) : size(bytes) {
#ifdef __CUDACC__
        if (cudaMallocManaged(&at, bytes + GUARD + 1) != cudaSuccess) {
            printf("out of memory\n");
            exit(2);
        }
#else
        at = (unsigned char *)malloc(bytes + GUARD);
#endif
        memset(at, 0xC5, bytes + GUARD);
    }

    ~buffer() {
        int beyond = 0;
        for (int i = 0; i < GUARD; i++) beyond += at[size + (size_t)i] != 0xC5;
        CHECK(beyond == 0);
#ifdef __CUDACC__
        cudaFree(at);
#else
        free(at);
#endif
    }

    buffer(const buffer &) = delete;

    void *aligned(size_t bytes) const { return (void *)(((uintptr_t)at + bytes - 1) / bytes * bytes); }

    // That a refused call has not written here.
    void check_untouched() const {
        size_t written = 0;
        for (size_t i = 0; i < size; i++) written += at[i] != 0xC5;
        CHECK(written == 0);
    }

    operator void *() const { return at; }

    float *floats() const { return (float *)(void *)at; }
};

static bool same(const buffer &a, const buffer &b) { return memcmp(a.at, b.at, a.size) == 0; }
#ifdef __CUDACC__
static int shim_order;

enum { SHIM_ORDERS = 1 };

static void finish() { CHECK(cudaDeviceSynchronize() == cudaSuccess); }
#else
static void finish() {}
#endif

enum { GAUSS, BITS, ZEROS, TIES, SPECIAL, TINY, HUGE_VALUES, SUBNORMAL, MIXED, KINDS };

static float element(int kind) {
    uint32_t u = rng();
    float g = (uniform() + uniform() + uniform()) * 1.7f;
    switch (kind) {
        case BITS: return snipi_float((u & 0x7F800000u) == 0x7F800000u ? u ^ 0x40000000u : u);
        case ZEROS: return snipi_float(u & 0x80000000u);
        case TIES: return (float)((int)(u % 65) - 32) * 0.25f;
        case SPECIAL:
            return u % 40 ? g : snipi_float(u % 3 == 0 ? 0xFFC00001u : u % 3 == 1 ? 0x7F800000u : 0xFF800000u);
        case TINY: return g * 1e-36f;
        case HUGE_VALUES: return g * 3e37f;
        case SUBNORMAL: return snipi_float(u & 0x807FFFFFu);
        case MIXED: return element((int)(rng() >> 8) % MIXED);
        default: return g;
    }
}

static void fill(void *x, int64_t n, snip_format format, int kind) {
    for (int64_t i = 0; i < n; i++) {
        float v = element(kind);
        if (format == SNIP_BF16)
            ((uint16_t *)x)[i] = snip_bf16_from_f32(v);
        else
            ((float *)x)[i] = v;
    }
}

#define NEAREST SNIP_ROUND_NEAREST_EVEN
static const snip_recipe recipes[] = {
    SNIP_RECIPE_FP8_TILE,
    SNIP_RECIPE_FP8_BLOCK,
    SNIP_RECIPE_FP4_TILE,
    SNIP_RECIPE_FP4_BLOCK,
    SNIP_RECIPE_MXFP8,
    SNIP_RECIPE_MXFP4,
    SNIP_RECIPE_NVFP4,
    {SNIP_E5M2,  1,   128, SNIP_SCALE_F32,      NEAREST},
    { SNIP_E4M3, 1,   64,  SNIP_SCALE_UE8M0_UP, NEAREST},
    { SNIP_E5M2, 128, 128, SNIP_SCALE_POW2,     NEAREST},
    { SNIP_E4M3, 0,   0,   SNIP_SCALE_NONE,     NEAREST},
    { SNIP_E2M1, 0,   0,   SNIP_SCALE_NONE,     NEAREST},
    { SNIP_E4M3, 1,   16,  SNIP_SCALE_F32,      NEAREST}
};

enum { RECIPES = sizeof recipes / sizeof recipes[0] };

static const int64_t shapes[][2] = {
    {1,    1  },
    { 1,   127},
    { 3,   5  },
    { 128, 128},
    { 129, 130},
    { 127, 257},
    { 256, 256},
    { 132, 16 },
    { 17,  300},
    { 144, 160},
    { 0,   7  },
    { 7,   0  }
};

enum { SHAPES = sizeof shapes / sizeof shapes[0] };

// An E2M1 code as a byte, through its value.
static uint8_t byte_of(uint8_t code, snip_cuda_codes as) {
    if (as == SNIP_CUDA_S8_BYTES) return (uint8_t)(int8_t)(2 * snip_e2m1_to_f32(code));
    return code == 8 ? 0x80 : snip_e4m3_from_f32(snip_e2m1_to_f32(code));
}

static int64_t row_of_bytes(int64_t cols, snip_cuda_codes as) {
    return as == SNIP_CUDA_S8_BYTES ? (cols + 15) / 16 * 16 : cols;
}

// Bytes of packed E2M1 codes; what pads the rows is left.
static void widen_codes(const uint8_t *packed, int64_t rows, int64_t cols, snip_cuda_codes as, uint8_t *wide) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            wide[r * row_of_bytes(cols, as) + c] = byte_of(packed[r * ((cols + 1) / 2) + c / 2] >> c % 2 * 4 & 15, as);
}

static bool same_bytes(const buffer &wide, const buffer &packed, int64_t rows, int64_t cols, snip_cuda_codes as) {
    buffer expected(wide.size);
    memcpy(expected.at, wide.at, wide.size);
    widen_codes(packed.at, rows, cols, as, expected.at);
    return same(wide, expected);
}

static bool near_to(double a, double b, double size) { return fabs(a - b) <= 1e-6 * size; }

static void check_stats(const snip_quant_stats &ours, const snip_quant_stats &theirs) {
    double size = sqrt(theirs.sum_sq);
    CHECK(near_to(ours.sum_sq, theirs.sum_sq, theirs.sum_sq));
    if (!snipi_nonfinite_f64(theirs.err_sq)) {  // infinite where a rounded element passes the largest float
        CHECK(near_to(sqrt(ours.err_sq), sqrt(theirs.err_sq), size));
        CHECK(near_to(ours.dot, theirs.dot, 30 * size + fabs(theirs.dot)));
    }
    CHECK(snipi_bits(ours.amax) == snipi_bits(theirs.amax) && ours.nonfinite == theirs.nonfinite &&
          ours.saturated == theirs.saturated);
}

// One job on both sides. flags: 1 straight, 2 turned, 4 statistics and values; E2M1 as 8 E4M3 bytes, 16 INT8 bytes.
static void quantize_one(const snip_recipe *recipe, int64_t rows, int64_t cols, int64_t ld, snip_format x_format,
                         int kind, int flags) {
    snip_quantize_job job = {}, cpu;
    snip_recipe turned = *recipe;
    const int straight = flags & 1, transposed = flags >> 1 & 1, measure = flags >> 2 & 1,
              wide = recipe->format == SNIP_E2M1 && flags & 24;
    const snip_cuda_codes as = !wide ? SNIP_CUDA_PACKED : flags & 8 ? SNIP_CUDA_E4M3_BYTES : SNIP_CUDA_S8_BYTES;
    const size_t unit = x_format == SNIP_BF16 ? 2 : 4, weights = measure ? 4 : 0;
    const int64_t ld_out = cols + 3;
    if (straight && transposed && recipe->tile_rows == 1) turned.tile_cols = 16 << rng() % 4;
    if (straight && transposed && !wide && rng() % 8 == 0) turned = recipes[rng() % RECIPES];
    size_t codes_size = snip_codes_bound(recipe, rows, cols), codes_t_size = snip_codes_bound(&turned, cols, rows);
    size_t n = (size_t)(rows * ld), wide_size = (size_t)(rows * row_of_bytes(cols, as)),
           wide_size_t = (size_t)(cols * row_of_bytes(rows, as));
    test_about("%s %dx%d scale %d %s, %d x %d ld %d, %s kind %d flags %d order %d", snip_format_name(recipe->format),
               recipe->tile_rows, recipe->tile_cols, recipe->scale, recipe->rounding ? "stochastic" : "nearest",
               (int)rows, (int)cols, (int)ld, snip_format_name(x_format), kind, flags, shim_order);
    buffer x(n * unit), weight(n * weights), codes(wide ? wide_size : codes_size),
        codes_t(wide ? wide_size_t : codes_t_size), codes2(codes_size), codes2_t(codes_t_size);
    buffer scales(snip_scales_bound(recipe, rows, cols)), scales_t(snip_scales_bound(&turned, cols, rows)),
        scales2(scales.size), scales2_t(scales_t.size);
    buffer out((size_t)(rows * ld_out) * unit), out2(out.size), scratch(snip_cuda_quantize_scratch(rows, cols));
    buffer stats(2 * sizeof(snip_quant_stats));
    snip_quant_stats stats2[2] = {}, *device_stats = (snip_quant_stats *)stats.operator void *();
    fill(x, (int64_t)n, x_format, kind);
    fill(weight, (int64_t)(weight.size / 4), SNIP_F32, GAUSS);
    job.x = x;
    job.x_format = job.out_format = x_format;
    job.rows = rows;
    job.cols = cols;
    job.ld = ld;
    job.key.seed = 0x123456789ABCu;
    job.key.step = 7;
    job.key.tensor = 3;
    if (measure) job.weight = weight.floats();
    if (straight) {
        job.recipe = recipe;
        job.codes = codes;
        job.scales = scales;
    }
    if (straight && measure) {
        job.out = out;
        job.ld_out = ld_out;
    }
    if (transposed) {
        job.recipe_t = &turned;
        job.codes_t = codes_t;
        job.scales_t = scales_t;
    }
    cpu = job;
    if (straight) {
        cpu.codes = codes2;
        cpu.scales = scales2;
    }
    if (straight && measure) cpu.out = out2;
    if (transposed) {
        cpu.codes_t = codes2_t;
        cpu.scales_t = scales2_t;
    }
    CHECK(snip_quantize_with(&cpu, &stats2[0], &stats2[1]) == SNIP_OK);
    int needs_scratch = measure || recipe->scale == SNIP_SCALE_UE4M3 || turned.scale == SNIP_SCALE_UE4M3;
    CHECK(snip_cuda_quantize(&job, as, measure && straight ? device_stats : NULL,
                             measure && transposed ? device_stats + 1 : NULL,
                             needs_scratch ? scratch.operator void *() : NULL, 0) == SNIP_OK);
    finish();
    if (wide) {
        if (straight) CHECK(same_bytes(codes, codes2, rows, cols, as));
        if (transposed) CHECK(same_bytes(codes_t, codes2_t, cols, rows, as));
    } else {
        if (straight) CHECK(same(codes, codes2));
        if (transposed) CHECK(same(codes_t, codes2_t));
    }
    if (straight) CHECK(same(scales, scales2));
    if (transposed) CHECK(same(scales_t, scales2_t));
    if (straight && measure) CHECK(same(out, out2));
    if (measure && straight) check_stats(device_stats[0], stats2[0]);
    if (measure && transposed) check_stats(device_stats[1], stats2[1]);
}

static void quantize_recipes() {
    for (int i = 0; i < SHAPES; i++)
        for (int k = 0; k < RECIPES; k++)
            for (int side = 1; side <= 3; side++) {
                snip_recipe recipe = recipes[k];
                uint32_t pick = rng();
                int64_t rows = shapes[i][0], cols = shapes[i][1], ld = cols + (pick & 1) * 4 + (pick >> 1 & 1);
                if (pick >> 2 & 1) recipe.rounding = SNIP_ROUND_STOCHASTIC;
                shim_order = (int)(pick >> 8) % SHIM_ORDERS;
                if (wanted())
                    quantize_one(&recipe, rows, cols, ld, pick >> 3 & 1 ? SNIP_BF16 : SNIP_F32,
                                 (int)(pick >> 16) % KINDS, side | (int)(pick >> 4 & 7) << 2);
            }
}

// Blocks that are held in registers, with every recipe in every order. MIXED has a low tile among others.
static void quantize_held_blocks() {
    for (int k = 0; k < RECIPES; k++)
        for (shim_order = 0; shim_order < SHIM_ORDERS; shim_order++)
            for (int flags = 0; flags < 6; flags++)
                if ((flags < 2 || recipes[k].format == SNIP_E2M1) && wanted())
                    quantize_one(&recipes[k], 128, 256, 256, flags % 2 ? SNIP_BF16 : SNIP_F32, k % 2 ? MIXED : GAUSS,
                                 3 | flags / 2 << 3);
}

// The counts that a session keeps are snip_quant_stats's, also where blocks held in registers do not look for
// saturation.
static void quantize_counts() {
    static const int64_t sizes[][2] = {
        {256,  128},
        { 131, 200}
    };
    for (int k = 0; k < RECIPES + 2; k++)
        for (int kind = 0; kind < KINDS; kind++)
            for (int side = 1; side <= 3; side++) {
                if (!wanted()) continue;
                const int64_t rows = sizes[(k + side) % 2][0], cols = sizes[(k + side) % 2][1];
                snip_recipe recipe = k < RECIPES ? recipes[k] : recipes[2 + (k - RECIPES) * 2];
                snip_quantize_job job = {};
                if (k >= RECIPES) {
                    recipe.rounding = SNIP_ROUND_STOCHASTIC;
                    recipe.scale = SNIP_SCALE_UE8M0;
                }
                buffer x((size_t)(rows * cols) * 4), codes(snip_codes_bound(&recipe, rows, cols)),
                    codes_t(snip_codes_bound(&recipe, cols, rows));
                buffer scales(snip_scales_bound(&recipe, rows, cols)), scales_t(snip_scales_bound(&recipe, cols, rows)),
                    scratch(snip_cuda_quantize_scratch(rows, cols)), counts(6 * 8);
                unsigned long long *n = (unsigned long long *)counts.operator void *();
                snip_quant_stats stats[2] = {};
                fill(x, rows * cols, SNIP_F32, kind);
                memset(n, 0, 32);
                n[4] = 5;
                n[5] = 7;
                job.x = x;
                job.rows = rows;
                job.cols = job.ld = cols;
                if (side & 1) {
                    job.recipe = &recipe;
                    job.codes = codes;
                    job.scales = scales;
                }
                if (side & 2) {
                    job.recipe_t = &recipe;
                    job.codes_t = codes_t;
                    job.scales_t = scales_t;
                }
                snipi_cuda_options options = { job.key.tensor, NULL, n, n + 2, n + 4, 0 };
                test_about("counts, recipe %d, kind %d, sides %d", k, kind, side);
                shim_order = (k + kind) % SHIM_ORDERS;
                CHECK(snip_quantize_with(&job, side & 1 ? &stats[0] : NULL, side & 2 ? &stats[1] : NULL) == SNIP_OK);
                CHECK(snipi_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, scratch, options, 0) == SNIP_OK);
                finish();
                n[side & 1 ? 0 : 2] -= 5;
                n[side & 1 ? 1 : 3] -= 7;
                for (int i = 0; i < 2; i++)
                    CHECK((int64_t)n[2 * i] == stats[i].nonfinite && (int64_t)n[2 * i + 1] == stats[i].saturated);
            }
}

// Statistics are the same bits in every order of the threads.
static void quantize_statistics_in_any_order() {
    const int64_t rows = 300, cols = 200;
    snip_recipe recipe = SNIP_RECIPE_FP4_TILE_SR;
    buffer x((size_t)(rows * cols) * 4), scratch(snip_cuda_quantize_scratch(rows, cols)),
        stats(SHIM_ORDERS * sizeof(snip_quant_stats));
    snip_quantize_job job = {};
    fill(x, rows * cols, SNIP_F32, GAUSS);
    job.x = x;
    job.rows = rows;
    job.cols = job.ld = cols;
    job.recipe = &recipe;
    job.weight = x.floats();
    for (shim_order = 0; shim_order < SHIM_ORDERS; shim_order++) {
        snip_quant_stats *at = (snip_quant_stats *)stats.operator void *() + shim_order;
        CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, at, NULL, scratch, 0) == SNIP_OK);
        finish();
        CHECK(memcmp(stats.at, at, 3 * sizeof(double)) == 0);
    }
}

// out may be x, also where x is wanted transposed too.
static void quantize_in_place() {
    const int64_t rows = 200, cols = 140;
    snip_recipe fp8 = SNIP_RECIPE_FP8_TILE;
    for (shim_order = 0; shim_order < SHIM_ORDERS; shim_order++) {
        buffer x((size_t)(rows * cols) * 4), x2(x.size), codes((size_t)(rows * cols)), codes2(codes.size),
            scales(snip_scales_bound(&fp8, cols, rows)), scales2(scales.size);
        snip_quantize_job job = {}, cpu;
        fill(x, rows * cols, SNIP_F32, GAUSS);
        memcpy(x2.at, x.at, x.size);
        job.rows = rows;
        job.cols = job.ld = job.ld_out = cols;
        job.recipe = job.recipe_t = &fp8;
        cpu = job;
        job.x = job.out = x;
        job.codes_t = codes;
        job.scales_t = scales;
        cpu.x = cpu.out = x2;
        cpu.codes_t = codes2;
        cpu.scales_t = scales2;
        test_about("in place, order %d", shim_order);
        CHECK(snip_quantize_with(&cpu, NULL, NULL) == SNIP_OK);
        CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_OK);
        finish();
        CHECK(same(x, x2) && same(codes, codes2) && same(scales, scales2));
    }
}

static void quantize_refusals() {
    snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp6 = { SNIP_E2M3, 1, 128, SNIP_SCALE_F32, NEAREST },
                odd = { SNIP_E4M3, 1, 48, SNIP_SCALE_F32, NEAREST };
    snip_recipe nvfp4 = SNIP_RECIPE_NVFP4;
    buffer x(16 * 16 * 4), codes(256), scales(256);
    snip_quantize_job job = {};
    test_about("refusals");
    CHECK(snip_cuda_quantize(NULL, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_BAD_ARGUMENT);
    job.x = x;
    job.rows = job.cols = job.ld = 16;
    job.codes = codes;
    job.scales = scales;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_BAD_ARGUMENT);
    job.recipe = &fp6;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_UNSUPPORTED);
    job.recipe = &odd;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_UNSUPPORTED);
    job.recipe = &nvfp4;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_BAD_ARGUMENT);
    job.recipe = &fp8;
    job.codes_t = codes;
    job.scales_t = scales;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_BAD_ARGUMENT);
    job.recipe = &nvfp4;  // wants scratch, and is quantized after the transposed matrix, of another format
    job.recipe_t = &fp8;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_BAD_ARGUMENT);
    job.recipe = &fp8;
    job.recipe_t = NULL;
    job.codes_t = job.scales_t = NULL;
    job.ld = 15;
    CHECK(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_dequantize(&fp8, codes, NULL, 16, 16, x, SNIP_F32, 16, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_noise_add(NULL, x.floats(), 5, 1, NULL, job.key, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_noise_dot(x.floats(), -1, job.key, (double *)codes.operator void *(), scales, 0) ==
          SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_gauss_add(NULL, x.floats(), 5, 1, NULL, job.key, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_gauss_dot(x.floats(), 5, job.key, NULL, scales, 0) == SNIP_BAD_ARGUMENT);
    codes.check_untouched();
    scales.check_untouched();
}

static void dequantize_recipes() {
    static const snip_recipe more[] = {
        SNIP_RECIPE_F32,
        SNIP_RECIPE_BF16,
        {SNIP_E2M3,  3, 7, SNIP_SCALE_F32,  NEAREST},
        { SNIP_E3M2, 0, 0, SNIP_SCALE_POW2, NEAREST},
        { SNIP_E2M1, 1, 5, SNIP_SCALE_F32,  NEAREST}
    };
    for (int i = 0; i < SHAPES; i++)
        for (int k = 0; k < RECIPES + 5; k++) {
            if (!wanted()) continue;
            const snip_recipe *r = k < RECIPES ? &recipes[k] : &more[k - RECIPES];
            int64_t rows = shapes[i][0], cols = shapes[i][1], ld = cols + k % 3;
            snip_format format = (i + k) % 2 ? SNIP_BF16 : SNIP_F32;
            buffer x((size_t)(rows * cols) * 4), codes(snip_codes_bound(r, rows, cols)),
                scales(snip_scales_bound(r, rows, cols));
            buffer out((size_t)(rows * ld) * (format == SNIP_BF16 ? 2 : 4)), out2(out.size);
            fill(x, rows * cols, SNIP_F32, (i + 3 * k) % KINDS);
            test_about("dequantize recipe %d, %d x %d", k, (int)rows, (int)cols);
            shim_order = (i + k) % SHIM_ORDERS;
            CHECK(snip_quantize(r, x.floats(), rows, cols, cols, codes, scales, {}, NULL, NULL) == SNIP_OK);
            if (format == SNIP_BF16)
                CHECK(snip_dequantize_bf16(r, codes, scales, rows, cols, (uint16_t *)out2.operator void *(), ld) ==
                      SNIP_OK);
            else
                CHECK(snip_dequantize(r, codes, scales, rows, cols, out2.floats(), ld) == SNIP_OK);
            CHECK(snip_cuda_dequantize(r, codes, scales, rows, cols, out, format, ld, 0) == SNIP_OK);
            finish();
            CHECK(same(out, out2));
        }
}

static void noise_bytes_and_sums() {
    static const int64_t sizes[] = { 0, 1, 3, 127, 128, 129, 4096, 5000, 40000 };
    snip_rng_key key = { 99, 5, 6 };
    for (int64_t n : sizes)
        for (int shaped = 0; shaped < 2; shaped++) {
            buffer x((size_t)n * 4), shape((size_t)n * 4), out(x.size), out2(x.size), scratch(SNIP_CUDA_NOISE_SCRATCH),
                dots(SHIM_ORDERS * sizeof(double));
            double *dot = (double *)dots.operator void *(), dot2, size = 0;
            test_about("noise n %d shaped %d", (int)n, shaped);
            fill(x, n, SNIP_F32, GAUSS);
            fill(shape, n, SNIP_F32, GAUSS);
            for (int64_t i = 0; i < n; i++) size += (double)x.floats()[i] * (double)x.floats()[i];
            CHECK(snip_noise_add(out2.floats(), x.floats(), n, 0.3f, shaped ? shape.floats() : NULL, key) == SNIP_OK);
            CHECK(snip_noise_dot(x.floats(), n, key, &dot2) == SNIP_OK);
            for (shim_order = 0; shim_order < SHIM_ORDERS; shim_order++) {
                memset(out.at, 0xC5, out.size);
                CHECK(snip_cuda_noise_add(out.floats(), x.floats(), n, 0.3f, shaped ? shape.floats() : NULL, key, 0) ==
                      SNIP_OK);
                if (!shaped) CHECK(snip_cuda_noise_dot(x.floats(), n, key, dot + shim_order, scratch, 0) == SNIP_OK);
                finish();
                CHECK(same(out, out2));
                if (!shaped) CHECK(near_to(dot[shim_order], dot2, sqrt((double)n * size)) && dot[shim_order] == dot[0]);
            }
            CHECK(snip_gauss_add(out2.floats(), x.floats(), n, 0.3f, shaped ? shape.floats() : NULL, key) == SNIP_OK);
            CHECK(snip_gauss_dot(x.floats(), n, key, &dot2) == SNIP_OK);
            CHECK(snip_cuda_gauss_add(out.floats(), x.floats(), n, 0.3f, shaped ? shape.floats() : NULL, key, 0) ==
                  SNIP_OK);
            CHECK(snip_cuda_gauss_dot(x.floats(), n, key, dot, scratch, 0) == SNIP_OK);
            finish();
            CHECK(same(out, out2) && near_to(dot[0], dot2, sqrt((double)n * size)));
        }
}

// ---- GEMMs ----
struct matrix {  // quantized on the CPU
    buffer codes, scales, bytes;
    snip_operand operand, s8;  // s8: E2M1 as INT8 bytes

    matrix(const snip_recipe *r, int64_t rows, int64_t k, int kind, int transposed = 0)
        : codes(snip_codes_bound(r, rows, k)), scales(snip_scales_bound(r, rows, k)),
          bytes(r->format == SNIP_E2M1 ? (size_t)(rows * row_of_bytes(k, SNIP_CUDA_S8_BYTES)) : 0), operand(), s8() {
        buffer x((size_t)(rows * k) * 4);
        fill(x, rows * k, SNIP_F32, kind);
        if (transposed)
            CHECK(snip_quantize(r, x.floats(), k, rows, rows, codes, scales, {}, NULL, NULL) == SNIP_OK);
        else
            CHECK(snip_quantize(r, x.floats(), rows, k, k, codes, scales, {}, NULL, NULL) == SNIP_OK);
        operand.recipe = r;
        operand.codes = codes;
        operand.scales = scales;
        operand.transposed = transposed;
        if (bytes.size) widen_codes(codes.at, rows, k, SNIP_CUDA_S8_BYTES, bytes.at);
        s8 = operand;
        s8.codes = bytes;
    }
};

enum { GEMM, GEMM_REFERENCE, GEMM_S8 };

// flags: 1 accumulate, 2 bias. exact: the same bits as the CPU's.
static void gemm_one(int64_t m, int64_t n, int64_t k, const matrix &a, const matrix &b, int flags, int call,
                     int exact) {
    const int64_t ldc = n + 3;
    buffer c((size_t)(m * ldc) * 4), c2(c.size), bias((size_t)n * 4), scratch(snip_gemm_scratch(m, n, k));
    double error = 0, norm = 0;
    int alike = 1;  // beyond the edge, infinity and NaN
    fill(c, m * ldc, SNIP_F32, GAUSS);
    fill(bias, n, SNIP_F32, GAUSS);
    memcpy(c2.at, c.at, c.size);
    const float *bias_or_not = flags & 2 ? bias.floats() : NULL;
    CHECK(snip_gemm(m, n, k, &a.operand, &b.operand, c2.floats(), ldc, flags & 1, bias_or_not, scratch,
                    SNIP_ISA_BEST) == SNIP_OK);
    if (call == GEMM_S8)
        CHECK(snip_cuda_gemm_s8(m, n, k, &a.s8, &b.s8, c.floats(), ldc, flags & 1, bias_or_not, 0) == SNIP_OK);
    else
        CHECK((call ? snip_cuda_gemm_reference : snip_cuda_gemm)(m, n, k, &a.operand, &b.operand, c.floats(), ldc,
                                                                 flags & 1, bias_or_not, 0) == SNIP_OK);
    finish();
    if (exact) {
        CHECK(same(c, c2));
        return;
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double x = c.floats()[i * ldc + j], y = c2.floats()[i * ldc + j];
            if (j >= n || snipi_nonfinite_f64(x) || snipi_nonfinite_f64(y)) {
                alike &= snipi_bits((float)x) == snipi_bits((float)y) || (x != x && y != y);
                continue;
            }
            error += (x - y) * (x - y);
            norm += y * y;
        }
#ifdef __CUDACC__
    const double most = 1e-6;  // FP8 tensor cores keep about 14 bits of a sum
#else
    const double most = 4e-12;
#endif
    CHECK(alike && error <= most * norm);
}

static const int64_t gemms[][3] = {
    {1,    1,   1  },
    { 3,   5,   7  },
    { 16,  8,   32 },
    { 128, 128, 128},
    { 129, 130, 131},
    { 65,  299, 256},
    { 130, 127, 193},
    { 140, 136, 288},
    { 5,   4,   0  },
    { 260, 100, 400}
};

enum { GEMM_SHAPES = sizeof gemms / sizeof gemms[0] };

static void gemm_reference() {
    static const snip_recipe kinds[] = {
        SNIP_RECIPE_F32,
        SNIP_RECIPE_BF16,
        SNIP_RECIPE_FP8_TILE,
        SNIP_RECIPE_FP8_BLOCK,
        SNIP_RECIPE_MXFP8,
        {SNIP_E2M3,  1, 32, SNIP_SCALE_UE8M0, NEAREST},
        SNIP_RECIPE_FP4_TILE,
        SNIP_RECIPE_FP4_BLOCK,
        SNIP_RECIPE_MXFP4,
        SNIP_RECIPE_NVFP4,
        { SNIP_E2M1, 3, 7,  SNIP_SCALE_F32,   NEAREST},
        { SNIP_E2M1, 1, 0,  SNIP_SCALE_F32,   NEAREST}
    };
    for (int i = 0; i < GEMM_SHAPES - 1; i++)
        for (int ka = 0; ka < 12; ka++)
            for (int kb = ka % 3; kb < 12; kb += 3) {
                if (!wanted()) continue;
                int64_t m = gemms[i][0] / 6 + 1, n = gemms[i][1] / 6 + 1, k = gemms[i][2];
                matrix a(&kinds[ka], m, k, GAUSS, ka < 2 && i % 2), b(&kinds[kb], n, k, GAUSS, kb < 2 && i % 3 == 0);
                if (ka == 0) a.operand.round_bf16 = kb & 1;
                test_about("reference gemm %d x %d x %d, kinds %d %d", (int)m, (int)n, (int)k, ka, kb);
                shim_order = (i + ka + kb) % SHIM_ORDERS;
                gemm_one(m, n, k, a, b, (i + ka + kb / 3) & 3, GEMM_REFERENCE,
                         k == 0 || snipi_s8_block(&a.operand, &b.operand, k) > 0);
            }
}

// Which kernels the GPU has: all; no tcgen05; nor wgmma; nor FP8; none.
#ifdef __CUDACC__
enum { GPUS = 1 };

static void play_gpu(int) {}
#else
enum { GPUS = 4 };

template <int A, int B> static void absent(int gpu) {
    shim_absent.push_back((const void *)snipi_tcgen05_kernel<A, B>);
    if (gpu > 1) shim_absent.push_back((const void *)snipi_wgmma_kernel<A, B>);
    if (gpu > 2) shim_absent.push_back((const void *)snipi_mma_kernel<SNIPI_MMA_FP8, A, B>);
    if (gpu > 3) shim_absent.push_back((const void *)snipi_mma_kernel<SNIPI_MMA_F16, A, B>);
}

static void play_gpu(int gpu) {
    shim_absent.clear();
    if (gpu > 0) shim_absent.push_back((const void *)snipi_tcgen05_kernel<SNIP_E2M1, SNIP_E2M1>);
    if (gpu > 1) shim_absent.push_back((const void *)snipi_wgmma_kernel<SNIP_E2M1, SNIP_E2M1>);
    if (gpu > 0) {
        absent<SNIP_E4M3, SNIP_E4M3>(gpu);
        absent<SNIP_E4M3, SNIP_E5M2>(gpu);
        absent<SNIP_E5M2, SNIP_E4M3>(gpu);
        absent<SNIP_E5M2, SNIP_E5M2>(gpu);
    }
    if (gpu > 3) shim_absent.push_back((const void *)snipi_mma_kernel<SNIPI_MMA_S8, SNIP_E2M1, SNIP_E2M1>);
}
#endif
// F32 and BF16 operands, either way round.
static void gemm_plain() {
    static const snip_recipe kinds[] = { SNIP_RECIPE_F32, SNIP_RECIPE_BF16 };
    for (int i = 0; i < GEMM_SHAPES; i++)
        for (int way = 0; way < 4; way++) {
            if (!wanted()) continue;
            int64_t m = gemms[i][0], n = gemms[i][1], k = gemms[i][2];
            matrix a(&kinds[i % 3 == 1], m, k, GAUSS, way & 1),
                b(&kinds[i % 3 == 1], n, k, way == 3 && i == 3 ? SPECIAL : GAUSS, way >> 1);
            if (i % 3 == 2) a.operand.round_bf16 = b.operand.round_bf16 = 1;
            shim_order = (i + way) % SHIM_ORDERS;
            test_about("plain gemm %d x %d x %d, way %d, order %d", (int)m, (int)n, (int)k, way, shim_order);
            gemm_one(m, n, k, a, b, (i + way) & 3, GEMM, 0);
        }
}

static const snip_recipe fp4[] = {
    SNIP_RECIPE_FP4_TILE, SNIP_RECIPE_FP4_BLOCK, {SNIP_E2M1, 0, 128, SNIP_SCALE_POW2, NEAREST}
};

static const snip_recipe fp8[] = {
    SNIP_RECIPE_FP8_TILE,
    SNIP_RECIPE_FP8_BLOCK,
    {SNIP_E5M2,  1,   128, SNIP_SCALE_F32,  NEAREST},
    { SNIP_E5M2, 128, 128, SNIP_SCALE_POW2, NEAREST}
};

static void gemm_e2m1() {
    for (int i = 0; i < GEMM_SHAPES; i++)
        for (int which = 0; which < 3; which++) {
            if (!wanted()) continue;
            const int64_t m = gemms[i][0], n = gemms[i][1], k = gemms[i][2];
            matrix a(&fp4[which], m, k, GAUSS), b(&fp4[(which + i) % 3], n, k, GAUSS);
            shim_order = (i + 2 * which) % SHIM_ORDERS;
            test_about("%d x %d x %d, recipes %d, order %d", (int)m, (int)n, (int)k, which, shim_order);
            gemm_one(m, n, k, a, b, (i + which) & 3, GEMM, 1);
        }
}

// By each GPU's kernel.
static void gemm_fp8() {
    for (int i = 0; i < GEMM_SHAPES; i++)
        for (int which = 0; which < 4; which++) {
            if (!wanted()) continue;
            const int64_t m = gemms[i][0], n = gemms[i][1], k = gemms[i][2];
            matrix a(&fp8[which], m, k, which == 0 && i == 3 ? SPECIAL : GAUSS);
            matrix b(&fp8[(which + 3 + i / 2 * 3) % 4], n, k, GAUSS);
            for (int gpu = 0; gpu < GPUS; gpu++) {
                play_gpu(gpu);
                shim_order = (i + 2 * which + gpu) % SHIM_ORDERS;
                test_about("%d x %d x %d, recipes %d, gpu %d, order %d", (int)m, (int)n, (int)k, which, gpu,
                           shim_order);
                gemm_one(m, n, k, a, b, (i + which + 3) & 3, GEMM, 0);
            }
            play_gpu(0);
        }
}

static void gemm_refusals() {
    const snip_recipe mx = SNIP_RECIPE_MXFP8;
    matrix a(&fp8[0], 8, 128, GAUSS), b(&mx, 8, 128, GAUSS), d(&fp4[0], 8, 128, GAUSS);
    buffer c(8 * 8 * 4);
    CHECK(snip_cuda_gemm(8, 8, 128, &a.operand, &b.operand, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    CHECK(snip_cuda_gemm(8, 8, 128, &a.operand, &d.operand, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    CHECK(snip_cuda_gemm(8, 8, 128, &a.operand, &a.operand, NULL, 8, 0, NULL, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_gemm(8, 8, 128, &a.operand, &a.operand, c.floats(), 7, 0, NULL, 0) == SNIP_BAD_ARGUMENT);
#ifndef __CUDACC__
    play_gpu(4);
    CHECK(snip_cuda_gemm(8, 8, 128, &a.operand, &a.operand, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    CHECK(snip_cuda_gemm(8, 8, 128, &d.operand, &d.operand, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    play_gpu(0);
#endif
    c.check_untouched();
}

static void gemm_s8_refusals() {
    matrix small(&fp4[0], 8, 128, GAUSS), other(&fp8[0], 8, 128, GAUSS);
    buffer c(8 * 8 * 4);
    snip_operand odd = small.s8;
    odd.codes = (const uint8_t *)odd.codes + 8;
    CHECK(snip_cuda_gemm_s8(8, 8, 128, &small.s8, &other.operand, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    CHECK(snip_cuda_gemm_s8(8, 8, 112, &small.s8, &odd, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    CHECK(snip_cuda_gemm_s8(8, 8, 128, &small.s8, NULL, c.floats(), 8, 0, NULL, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_gemm_s8(8, 8, 128, &small.s8, &small.s8, c.floats(), 7, 0, NULL, 0) == SNIP_BAD_ARGUMENT);
#ifndef __CUDACC__
    play_gpu(2);
    CHECK(snip_cuda_gemm_s8(8, 8, 128, &small.s8, &small.s8, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED);
    play_gpu(0);
#endif
    c.check_untouched();
}

// E2M1 as INT8 bytes, on every shape in every order. SUBNORMAL: scales are too.
static void gemm_s8_bytes() {
#ifdef __CUDACC__
    matrix small(&fp4[0], 8, 128, GAUSS);
    buffer c(8 * 8 * 4);
    if (snip_cuda_gemm_s8(8, 8, 128, &small.s8, &small.s8, c.floats(), 8, 0, NULL, 0) == SNIP_UNSUPPORTED) {
        test_skip("E2M1 as INT8 bytes: not a GPU of compute capability 9.0 or 10.0, or no code for sm_90a or sm_100a");
        return;
    }
    finish();
#endif
    for (int i = 0; i < GEMM_SHAPES; i++)
        for (int which = 0; which < 3; which++) {
            int64_t m = gemms[i][0], n = gemms[i][1], k = gemms[i][2];
            if (!wanted()) continue;
            matrix a(&fp4[which], m, k, (i + which) % 5 ? GAUSS : SUBNORMAL), b(&fp4[(which + i) % 3], n, k, GAUSS);
            for (int gpu = 0; gpu < snipi_min(2, GPUS); gpu++)
                for (shim_order = 0; shim_order < SHIM_ORDERS; shim_order++) {
                    play_gpu(gpu);
                    test_about("gemm of INT8 bytes %d x %d x %d, recipes %d, gpu %d, order %d", (int)m, (int)n, (int)k,
                               which, gpu, shim_order);
                    gemm_one(m, n, k, a, b, (i + which + shim_order) & 3, GEMM_S8, 1);
                }
            play_gpu(0);
        }
}

// By a cuBLASLt played on the CPU.
#ifdef __CUDACC__
static void gemm_by_cublaslt() {}

static void gemm_by_cublaslt_refusals() {}
#else
static void gemm_by_cublaslt() {
    static const int64_t sizes[][3] = {
        {16,   8,   32 },
        { 129, 132, 400},
        { 300, 260, 128},
        { 5,   4,   656}
    };
    shim_cublaslt lt = { CUBLAS_STATUS_SUCCESS, false, 0 };
    for (const int64_t *size : sizes)
        for (int kind = 0; kind < 9; kind++) {
            if (!wanted()) continue;
            const int64_t m = size[0], n = size[1], k = size[2], ldc = n + 4;
            const size_t bytes = snip_cuda_cublaslt_scratch(m, n, k) + (size_t)kind;
            const int accumulate = kind & 1;
            matrix a(&fp8[kind / 3], m, k, GAUSS), b(&fp8[kind % 3], n, k, GAUSS);
            buffer c((size_t)(m * ldc) * 4), c2(c.size), gemm_scratch(snip_gemm_scratch(m, n, k));
            buffer scratch(bytes + 256);
            double error = 0, norm = 0;
            int untouched = 1;
            lt.workspace = (size_t)kind;
            fill(c, m * ldc, SNIP_F32, GAUSS);
            memcpy(c2.at, c.at, c.size);
            test_about("%d x %d x %d, kinds %d", (int)m, (int)n, (int)k, kind);
            CHECK(snip_gemm(m, n, k, &a.operand, &b.operand, c2.floats(), ldc, accumulate, NULL, gemm_scratch,
                            SNIP_ISA_BEST) == SNIP_OK);
            CHECK(snip_cuda_gemm_cublaslt(&lt, m, n, k, &a.operand, &b.operand, c.floats(), ldc, accumulate,
                                          scratch.aligned(256), bytes, 0) == SNIP_OK);
            for (int64_t i = 0; i < m * ldc; i++) {
                const double x = c.floats()[i], y = c2.floats()[i];
                if (i % ldc >= n) {
                    untouched &= x == y;
                    continue;
                }
                error += (x - y) * (x - y);
                norm += y * y;
            }
            CHECK(untouched && error <= 4e-12 * norm);
        }
}

static void gemm_by_cublaslt_refusals() {
    const snip_recipe mx = SNIP_RECIPE_MXFP8, tall = { SNIP_E4M3, 64, 128, SNIP_SCALE_F32, NEAREST };
    matrix a(&fp8[0], 8, 128, GAUSS), b(&mx, 8, 128, GAUSS), d(&fp4[0], 8, 128, GAUSS), e(&tall, 8, 128, GAUSS);
    const size_t least = snip_cuda_cublaslt_scratch(8, 8, 128);
    buffer c(8 * 8 * 4), memory(least + 512);
    char *at = (char *)memory.aligned(256);
    shim_cublaslt lt = { CUBLAS_STATUS_SUCCESS, false, 0 };
    auto gemm = [&](const snip_operand &y, float *to, int64_t ldc, void *scratch, size_t bytes, int64_t k = 128) {
        return snip_cuda_gemm_cublaslt(&lt, 8, 8, k, &a.operand, &y, to, ldc, 0, scratch, bytes, 0);
    };
    snip_operand odd = a.operand, without = a.operand;
    odd.codes = a.codes.at + 1;
    without.scales = NULL;

    for (const snip_operand *o : { &b.operand, &d.operand, &e.operand, &odd })
        CHECK(gemm(*o, c.floats(), 8, at, least) == SNIP_UNSUPPORTED);
    CHECK(gemm(a.operand, c.floats() + 1, 8, at, least) == SNIP_UNSUPPORTED);
    CHECK(gemm(a.operand, c.floats(), 9, at, least) == SNIP_UNSUPPORTED);
    CHECK(gemm(a.operand, c.floats(), 8, at, least, 0) == SNIP_UNSUPPORTED);
    CHECK(gemm(a.operand, NULL, 8, at, least) == SNIP_BAD_ARGUMENT);
    CHECK(gemm(a.operand, c.floats(), 7, at, least) == SNIP_BAD_ARGUMENT);
    CHECK(gemm(without, c.floats(), 8, at, least) == SNIP_BAD_ARGUMENT);
    CHECK(gemm(a.operand, c.floats(), 8, NULL, least) == SNIP_BAD_ARGUMENT);
    CHECK(gemm(a.operand, c.floats(), 8, at + 16, least) == SNIP_BAD_ARGUMENT);
    CHECK(gemm(a.operand, c.floats(), 8, at, least - 1) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_gemm_cublaslt(NULL, 8, 8, 128, &a.operand, &a.operand, c.floats(), 8, 0, at, least, 0) ==
          SNIP_BAD_ARGUMENT);
    lt.workspace = 1;  // more than it was given
    CHECK(gemm(a.operand, c.floats(), 8, at, least) == SNIP_UNSUPPORTED);
    lt = { CUBLAS_STATUS_NOT_SUPPORTED, false, 0 };
    CHECK(gemm(a.operand, c.floats(), 8, at, least) == SNIP_UNSUPPORTED);
    c.check_untouched();
    lt = { CUBLAS_STATUS_SUCCESS, true, 0 };
    CHECK(gemm(a.operand, c.floats(), 8, at, least) == SNIP_DEVICE);
}
#endif

// ---- the encoders, on every float: hardware's where the kernels use it ----
#ifdef __CUDACC__
static const uint32_t CODEC_STRIDE = 1;

template <class F> static void codec_workers(int n, F f) {
    std::vector<std::thread> pool;
    for (int w = 0; w < n; w++) pool.emplace_back(f, w);
    for (std::thread &t : pool) t.join();
}

static int codec_cores() { return (int)snipi_max(1, snipi_min(64, (int64_t)std::thread::hardware_concurrency())); }
#else
static const uint32_t CODEC_STRIDE = 65521;

template <class F> static void codec_workers(int n, F f) {
    for (int w = 0; w < n; w++) f(w);
}

static int codec_cores() { return 1; }
#endif
SNIPI_HD static uint32_t codec_random(uint32_t u) { return (u ^ u >> 15) * 0x2C1B3C6Du; }

template <int FORMAT>
static __global__ void codec_kernel(uint8_t *code, uint64_t first, int64_t n, uint32_t stride, int stochastic) {
    for (int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x); i < n;
         i += 4 * (int64_t)gridDim.x * blockDim.x) {
        float x[4];
        uint32_t c[4], word;
        int over;
        for (int j = 0; j < 4; j++) {
            uint32_t u = (uint32_t)(first + (uint64_t)(i + j)) * stride;
            x[j] = snipi_float(u);
            c[j] = snipi_cuda_encode<FORMAT>(x[j], stochastic, codec_random(u), &over);
        }
        word = stochastic ? snipi_cuda_pack<FORMAT>(c) : snipi_cuda_nearest4<FORMAT>(x, 1.0f);
        if (FORMAT == SNIP_E2M1)
            *(uint16_t *)(code + i / 2) = (uint16_t)word;
        else
            *(uint32_t *)(code + i) = word;
    }
}

// Nearest: NVIDIA's tables. Stochastic: snip.h's function.
static uint8_t codec_expected(int format, uint32_t u, int stochastic, const codec_run *runs, int n_runs, int *run) {
    while (*run + 1 < n_runs && runs[*run + 1].first <= u) ++*run;
    while (runs[*run].first > u) --*run;
    if (!stochastic) return runs[*run].code;
    snipi_element e = snipi_element_of((snip_format)format);
    uint32_t a = u & 0x7FFFFFFFu, c = snipi_encode_stochastic(a, codec_random(u), e.mantissa, e.bias);
    return (uint8_t)(a > 0x7F800000u ? e.nan : (c < e.largest ? c : e.largest) | (u >> 31) << e.sign);
}

template <int FORMAT> static void codec_one(const char *name, int stochastic, const codec_run *runs, int n_runs) {
    const int64_t all = (int64_t)(4294967296 / CODEC_STRIDE), chunk = snipi_min(all / 4 * 4, (int64_t)1 << 28);
    const int workers = codec_cores();
    uint8_t *code, *host;
    int64_t wrong = 0;
    test_about("codec %s, %s", name, stochastic ? "stochastic" : "nearest");
    if (cudaMalloc(&code, (size_t)chunk) != cudaSuccess ||
        cudaMallocHost((void **)&host, (size_t)chunk) != cudaSuccess) {
        CHECK(!"memory");
        return;
    }
    for (int64_t first = 0; first < all / 4 * 4; first += chunk) {
        const int64_t n = snipi_min(chunk, all / 4 * 4 - first);
        std::vector<int64_t> bad((size_t)workers, 0), example((size_t)workers, -1);
        CHECK(snipi_cuda_launch(codec_kernel<FORMAT>, snipi_min(4096, snipi_ceil_div(n, 4 * 256)), 256, 0, 0, code,
                                (uint64_t)first, n, CODEC_STRIDE, stochastic) == SNIP_OK);
        CHECK(cudaMemcpy(host, code, (size_t)(FORMAT == SNIP_E2M1 ? n / 2 : n), cudaMemcpyDeviceToHost) == cudaSuccess);
        codec_workers(workers, [&](int w) {
            int run = 0;
            for (int64_t i = n * w / workers; i < n * (w + 1) / workers; i++) {
                uint32_t u = (uint32_t)(first + i) * CODEC_STRIDE,
                         got = FORMAT == SNIP_E2M1 ? host[i / 2] >> i % 2 * 4 & 15u : host[i];
                uint32_t expected = codec_expected(snipi_cuda_format<FORMAT>(), u, stochastic, runs, n_runs, &run);
                if (FORMAT >= SNIPI_E2M1_WIDE)
                    expected = byte_of((uint8_t)expected,
                                       FORMAT == SNIPI_E2M1_S8 ? SNIP_CUDA_S8_BYTES : SNIP_CUDA_E4M3_BYTES);
                if (got != expected && !bad[(size_t)w]++) example[(size_t)w] = first + i;
            }
        });
        for (int w = 0; w < workers; w++) {
            if (bad[(size_t)w] && !wrong)
                printf("%s: input 0x%08X\n", test.about, (uint32_t)example[(size_t)w] * CODEC_STRIDE);
            wrong += bad[(size_t)w];
        }
    }
    CHECK(wrong == 0);
    cudaFree(code);
    cudaFreeHost(host);
}

static void codec_every_float() {
    for (int stochastic = 0; stochastic < 2; stochastic++) {
#define CODEC(format, table) codec_one<format>(#format, stochastic, table, (int)(sizeof table / sizeof table[0]))
        CODEC(SNIP_E4M3, runs_e4m3);
        CODEC(SNIP_E5M2, runs_e5m2);
        CODEC(SNIP_E2M1, runs_e2m1);
        CODEC(SNIPI_E2M1_WIDE, runs_e2m1);
        CODEC(SNIPI_E2M1_S8, runs_e2m1);
    }
}

// ---- cuBLASLt as the oracle, on plain device memory ----
#if defined(__CUDACC__) && defined(SNIP_CUBLASLT)
struct device_matrix {
    void *codes = NULL, *scales = NULL;
    snip_operand operand = {};

    device_matrix(const snip_recipe *r, int64_t rows, int64_t k) {
        std::vector<float> x((size_t)(rows * k));
        std::vector<uint8_t> c(snip_codes_bound(r, rows, k)), s(snip_scales_bound(r, rows, k));
        fill(x.data(), rows * k, SNIP_F32, GAUSS);
        CHECK(snip_quantize(r, x.data(), rows, k, k, c.data(), s.data(), {}, NULL, NULL) == SNIP_OK);
        put(&codes, c.data(), c.size());
        put(&scales, s.data(), s.size());
        operand.recipe = r;
        operand.codes = codes;
        operand.scales = scales;
    }

    static void put(void **to, const void *from, size_t size) {
        CHECK(cudaMalloc(to, size + 1) == cudaSuccess &&
              cudaMemcpy(*to, from, size, cudaMemcpyHostToDevice) == cudaSuccess);
    }

    ~device_matrix() {
        cudaFree(codes);
        cudaFree(scales);
    }

    device_matrix(const device_matrix &) = delete;
};

static __global__ void twice_kernel(int8_t *to, const uint8_t *packed, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        to[i] = (int8_t)(2.0f * snipi_decode(packed[i / 2] >> i % 2 * 4 & 15u, SNIP_E2M1));
}

static void oracle_products() {
    static const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK,
                             e5m2 = { SNIP_E5M2, 1, 128, SNIP_SCALE_F32, NEAREST }, bf16 = SNIP_RECIPE_BF16;
    static const snip_recipe fp4 = { SNIP_E2M1, 1, 128, SNIP_SCALE_F32, NEAREST };
    static const snip_recipe *const pairs[][2] = {
        {&fp8,        &fp8_block},
        { &fp8,       &fp8      },
        { &fp8_block, &fp8      },
        { &e5m2,      &fp8_block},
        { &e5m2,      &fp8      },
        { &fp8,       &e5m2     },
        { &bf16,      &bf16     },
        { &fp4,       &fp4      }
    };
    static const int64_t sizes[][3] = {
        {256,   384,  512 },
        { 1024, 512,  2048},
        { 144,  272,  400 },
        { 128,  7168, 4096}
    };
    for (auto &pair : pairs)
        for (const int64_t *size : sizes) {
            const int64_t m = size[0], n = size[1], k = size[2];
            const snip_recipe *ra = pair[0], *rb = pair[1];
            const bool integers = ra->format == SNIP_E2M1;
            lt_gemm lt({ ra->format, m, ra->tile_rows }, { rb->format, n, rb->tile_rows }, k);
            test_about("cuBLASLt's product of %s %dx%d and %s %dx%d, %d x %d x %d", snip_format_name(ra->format),
                       ra->tile_rows, ra->tile_cols, snip_format_name(rb->format), rb->tile_rows, rb->tile_cols, (int)m,
                       (int)n, (int)k);
            if (!lt.exists()) {
                test_skip("%s", test.about);
                continue;
            }
            device_matrix a(ra, m, k), b(rb, n, k);
            std::vector<float> ours((size_t)(m * n)), theirs((size_t)(m * n));
            float *c, *c2;
            int8_t *ia = NULL, *ib = NULL;
            double error = 0, norm = 0;
            CHECK(cudaMalloc(&c, ours.size() * 4) == cudaSuccess && cudaMalloc(&c2, ours.size() * 4) == cudaSuccess);
            CHECK(cudaMemset(c, 0xC5, ours.size() * 4) == cudaSuccess &&
                  cudaMemset(c2, 0xC5, ours.size() * 4) == cudaSuccess);
            if (integers) {  // with scales of 1
                std::vector<float> ones((size_t)((m > n ? m : n) * ((k + 127) / 128)), 1.0f);
                CHECK(cudaMalloc(&ia, (size_t)(m * k)) == cudaSuccess &&
                      cudaMalloc(&ib, (size_t)(n * k)) == cudaSuccess);
                twice_kernel<<<256, 256>>>(ia, (const uint8_t *)a.codes, m * k);
                twice_kernel<<<256, 256>>>(ib, (const uint8_t *)b.codes, n * k);
                CHECK(cudaMemcpy(a.scales, ones.data(), (size_t)(m * ((k + 127) / 128)) * 4, cudaMemcpyHostToDevice) ==
                      cudaSuccess);
                CHECK(cudaMemcpy(b.scales, ones.data(), (size_t)(n * ((k + 127) / 128)) * 4, cudaMemcpyHostToDevice) ==
                      cudaSuccess);
            }
            CHECK(snip_cuda_gemm(m, n, k, &a.operand, &b.operand, c, n, 0, NULL, 0) == SNIP_OK);
            if (integers) {  // the same bits from INT8 bytes, where there is such a kernel
                std::vector<float> packed((size_t)(m * n)), bytes((size_t)(m * n));
                CHECK(cudaMemcpy(packed.data(), c, packed.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess);
                a.operand.codes = ia;
                b.operand.codes = ib;
                const snip_status status = snip_cuda_gemm_s8(m, n, k, &a.operand, &b.operand, c, n, 0, NULL, 0);
                CHECK(cudaMemcpy(bytes.data(), c, bytes.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess);
                CHECK(status == SNIP_UNSUPPORTED ||
                      (status == SNIP_OK && !memcmp(packed.data(), bytes.data(), packed.size() * 4)));
            }
            if (integers || ra->format == SNIP_BF16)
                CHECK(lt.run(integers ? (void *)ia : a.codes, integers ? (void *)ib : b.codes, c2, 0));
            else {  // added to zeros
                const size_t room = snip_cuda_cublaslt_scratch(m, n, k) + (32 << 20);
                void *scratch;
                CHECK(cudaMalloc(&scratch, room) == cudaSuccess && cudaMemset(c2, 0, ours.size() * 4) == cudaSuccess);
                CHECK(snip_cuda_gemm_cublaslt(lt.handle, m, n, k, &a.operand, &b.operand, c2, n, size == sizes[0],
                                              scratch, room, 0) == SNIP_OK);
                cudaFree(scratch);
            }
            CHECK(cudaMemcpy(ours.data(), c, ours.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess &&
                  cudaMemcpy(theirs.data(), c2, ours.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess);
            for (size_t i = 0; i < ours.size(); i++) {
                double x = ours[i], y = theirs[i];
                if (integers) y = (double)(int32_t)snipi_bits(theirs[i]) * 0.25;
                error += (x - y) * (x - y);
                norm += y * y;
            }
            const double most = integers ? 0 : ra->format == SNIP_BF16 ? 1e-5 : 1e-3;
            if (!(error <= most * most * norm && norm > 0))
                printf("%s: relative difference %.2e\n", test.about, sqrt(error / norm));
            CHECK(error <= most * most * norm && norm > 0);
            for (void *p : { (void *)c, (void *)c2, (void *)ia, (void *)ib }) cudaFree(p);
        }
}
#elif defined(__CUDACC__)
static void oracle_products() {
    test_skip("cuBLASLt is not linked: FP8, INT8 and BF16 products have no oracle but snip.h's");
}
#else
static void oracle_products() {}
#endif

// ---- the session ----

// Layers side by side, each with tensors of its own, so that the same numbers reach both machines' calls.
enum { LAYERS = 2, MICROS = 2, ROWS = 40 };

static const int64_t dims[LAYERS][2] = {
    {24,   136},
    { 150, 33 }
};  // out, in

struct layer_data {
    buffer x, w, bias, dy, m, v, out, again, dx, dw, db;
    int64_t n, k;

    layer_data(int64_t n_, int64_t k_)
        : x((size_t)(MICROS * ROWS * k_) * 4), w((size_t)(n_ * k_) * 4), bias((size_t)n_ * 4),
          dy((size_t)(MICROS * ROWS * n_) * 4), m(w.size), v(w.size), out(dy.size), again(dy.size), dx(x.size),
          dw(w.size), db(bias.size), n(n_), k(k_) {
        fill(x, MICROS * ROWS * k, SNIP_F32, GAUSS);
        fill(w, n * k, SNIP_F32, GAUSS);
        fill(bias, n, SNIP_F32, GAUSS);
        fill(dy, MICROS * ROWS * n, SNIP_F32, GAUSS);
        fill(m, n * k, SNIP_F32, GAUSS);
        fill(v, n * k, SNIP_F32, GAUSS);
        for (int64_t i = 0; i < n * k; i++) {
            m.floats()[i] *= 1e-3f;
            v.floats()[i] = i % 17 ? v.floats()[i] * v.floats()[i] * 1e-5f : 0.0f;
        }
        clear();
    }

    void clear() {
        for (const buffer *b : { &out, &again, &dx, &dw, &db }) memset(b->at, 0, b->size);
    }
};

struct model {  // what lies above a layer answers the update probe: shift
    layer_data *l[LAYERS];

    model() {
        uint64_t was = random_state;
        random_state = 77;
        for (int i = 0; i < LAYERS; i++) l[i] = new layer_data(dims[i][0], dims[i][1]);
        random_state = was;
    }

    ~model() {
        for (layer_data *p : l) delete p;
    }

    void clear() {
        for (layer_data *p : l) p->clear();
    }

    void shift(float by) {
        for (layer_data *p : l) {
            for (int64_t i = 0; i < (int64_t)(p->x.size / 4); i++) p->x.floats()[i] += by * (float)(i % 7 - 3);
            for (int64_t i = 0; i < (int64_t)(p->dy.size / 4); i++) p->dy.floats()[i] += by * (float)(i % 5 - 2);
        }
    }
};

// How a training calls its layers.
struct manner {
    const char *name;
    int micros;
    bool reversed;    // all forward calls, then the backward calls from the last micro-batch to the first
    bool recomputes;  // every forward call twice
    bool frozen;      // layer 1 has no weight gradient and no optimizer state
    bool expert;      // layer 0 meets other rows from pass to pass, or none
    bool small;       // the first micro-batch is tiny
};

static const manner plainly = { "", 1, false, false, false, false, false };

static snip *session_of(const snip_desc &desc, const model &t, const manner &how) {
    snip *s = snip_create(&desc);
    char name[16];
    for (int i = 0; i < LAYERS; i++) {
        snprintf(name, sizeof name, "%d.lin", i);
        snip_add_linear(s, name, dims[i][0], dims[i][1], 0);
        if (how.frozen && i == 1) continue;
        if (desc.optimizer == SNIP_ADAMW)
            snip_bind_adamw(s, i, t.l[i]->m.floats(), t.l[i]->v.floats());
        else
            snip_bind_momentum(s, i, t.l[i]->m.floats());
    }
    return s;
}

static snip_adamw adamw_of(int64_t step) {
    snip_adamw o = { 1e-3, 0.9, 0.95, 1e-8, step, 0.5 };
    return o;
}

// A session on the CPU, or in device memory.
struct machine {
    model t;
    manner how;
    snip *s;
    snip_cuda *c = NULL;  // NULL: on the CPU
    cudaStream_t stream = 0;
    buffer loss{ 2 * sizeof(float) };
    buffer memory;

    explicit machine(const snip_desc &desc, const manner &how_ = plainly, int lag = -1)
        : how(how_), s(session_of(desc, t, how)), memory(lag < 0 ? 16 : snip_cuda_memory(s, ROWS)) {
        cudaStreamCreate(&stream);
        if (lag >= 0) c = snip_cuda_create(s, ROWS, lag, memory, stream);
        CHECK(lag < 0 || c);
        loss.floats()[1] = 0.5f;
        for (layer_data *l : t.l)
            for (int64_t i = 0; how.small && i < ROWS * l->k; i++) l->x.floats()[i] *= 1e-4f;
    }

    ~machine() {
        snip_cuda_destroy(c);
        snip_destroy(s);
        finish();
        cudaStreamDestroy(stream);
    }

    snip_status forward(int i, float *out, const float *x, const float *w, const float *bias, int64_t rows = ROWS) {
        return c ? snip_cuda_linear_forward(c, i, out, x, w, bias, rows, stream)
                 : snip_linear_forward(s, i, out, x, w, bias, rows);
    }

    snip_status recompute(int i, float *out, const float *x, const float *w, const float *bias, int64_t rows = ROWS) {
        return c ? snip_cuda_linear_recompute(c, i, out, x, w, bias, rows, stream)
                 : snip_linear_recompute(s, i, out, x, w, bias, rows);
    }

    snip_status backward(int i, float *dx, float *dw, float *db, const float *dy, const float *x, const float *w,
                         int64_t rows = ROWS) {
        return c ? snip_cuda_linear_backward(c, i, dx, dw, db, dy, x, w, rows, stream)
                 : snip_linear_backward(s, i, dx, dw, db, dy, x, w, rows);
    }

    int next_pass(double value) {
        finish();
        loss.floats()[0] = (float)value;
        return c ? snip_cuda_next_pass(c, loss.floats(), stream) : snip_next_pass(s, value);
    }

    // scaled: the gradients' scale lies in device memory; it is adamw_of's.
    snip_status end_step(const snip_adamw *o, bool scaled = false) {
        return c ? snip_cuda_end_step(c, o, scaled ? loss.floats() + 1 : NULL, stream) : snip_end_step(s, o);
    }

    int64_t rows_of(int i) const {
        if (!how.expert || i) return ROWS;
        const int64_t measurement = s->kept.step / 2;
        if (s->pass == SNIP_PASS_ORDINARY || measurement % 3 == 2) return 31;
        return measurement % 3 == 0 || s->pass == SNIP_PASS_LOSS_PROBE ? 0 : s->pass == SNIP_PASS_CLEAN ? 31 : 25;
    }

    // The first error of a pass over all layers.
    snip_status pass() {
        snip_status first = SNIP_OK;
        auto keep = [&](snip_status status) {
            if (!first) first = status;
        };
        auto backward_of = [&](int i, int a) {
            layer_data *l = t.l[i];
            const float *x = l->x.floats() + a * ROWS * l->k, *dy = l->dy.floats() + a * ROWS * l->n;
            const float *w = l->w.floats(), *bias = i ? l->bias.floats() : NULL;
            if (how.recomputes) keep(recompute(i, l->again.floats() + a * ROWS * l->n, x, w, bias, rows_of(i)));
            keep(backward(i, i ? l->dx.floats() + a * ROWS * l->k : NULL, how.frozen && i ? NULL : l->dw.floats(),
                          i ? l->db.floats() : NULL, dy, x, w, rows_of(i)));
        };
        for (int i = 0; i < LAYERS; i++) {
            layer_data *l = t.l[i];
            for (int a = 0; a < how.micros; a++) {
                keep(forward(i, l->out.floats() + a * ROWS * l->n, l->x.floats() + a * ROWS * l->k, l->w.floats(),
                             i ? l->bias.floats() : NULL, rows_of(i)));
                if (!how.reversed) backward_of(i, a);
            }
            for (int a = how.micros - 1; how.reversed && a >= 0; a--) backward_of(i, a);
        }
        return first;
    }

    // A step on the same tensors, whatever passes it has; the status of its end.
    snip_status step(double value = 2.5) {
        const snip_adamw o = adamw_of(s->kept.step + 1);
        do {
            t.clear();
            if (s->pass == SNIP_PASS_UPDATE_PROBE) t.shift(0.125f);
            pass();
            finish();
            if (s->pass == SNIP_PASS_UPDATE_PROBE) t.shift(-0.125f);
        } while (next_pass(value));
        return end_step(&o);
    }
};

static bool alike(const buffer &a, const buffer &b, double most) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < a.size / 4; i++) {
        double d = (double)a.floats()[i] - b.floats()[i];
        error += d * d;
        norm += (double)b.floats()[i] * b.floats()[i];
    }
    return error <= most * most * norm;
}

static const double CLOSE = 1e-4;  // sums in another order; tensor cores cut theirs

static bool close_to(double a, double b, double size) { return fabs(a - b) <= CLOSE * fabs(size); }

static void check_estimates(const snip *ours, const snip *theirs, const manner &how) {
    for (int i = 0; i < LAYERS; i++) {
        snip_layer_info a, b;
        snip_layer(ours, i, &a);
        snip_layer(theirs, i, &b);
        for (int f = 0; f < 2; f++) {
            const snip_estimate &x = f ? a.fp4 : a.fp8, &y = f ? b.fp4 : b.fp8;
            for (int g = 0; g < SNIP_GEMMS; g++) {
                const bool none = theirs->desc.update_weight < 0 || (how.frozen && i == 1 && g == SNIP_WGRAD) ||
                                  (how.expert && i == 0);
                CHECK(close_to(x.update[g], y.update[g], y.update[g]) && (y.update[g] != 0 || none));
                CHECK(close_to(x.cost[g], y.cost[g], 10 * y.cost[g]) &&
                      close_to(x.error[g], y.error[g], 10 * y.error[g]));
            }
            CHECK(close_to(x.loss_first, y.loss_first, y.loss_first) &&
                  close_to(x.loss_second, y.loss_second, 10 * y.loss_second));
        }
        CHECK(memcmp(a.format, b.format, sizeof a.format) == 0 && memcmp(a.runs, b.runs, sizeof a.runs) == 0);
    }
}

// A pass on both machines: the same results.
static bool both_pass(machine *ours, machine *cpu, bool exact[LAYERS], double loss) {
    const bool probe = cpu->s->pass == SNIP_PASS_UPDATE_PROBE;
    const double most = cpu->s->desc.measure == SNIP_BF16 ? 1e-4 : 3e-6;  // a noisy operand may round to the other side
    shim_order = (int)(cpu->s->kept.step + cpu->s->pass) % SHIM_ORDERS;
    CHECK(snip_current_pass(ours->s) == snip_current_pass(cpu->s));
    for (machine *m : { ours, cpu }) {
        m->t.clear();
        if (probe) m->t.shift(0.125f);
        CHECK(m->pass() == SNIP_OK);
        finish();
        if (probe) m->t.shift(-0.125f);
    }
    for (int i = 0; i < LAYERS; i++) {
        const layer_data *a = ours->t.l[i], *b = cpu->t.l[i];
        CHECK(alike(a->out, b->out, most) && alike(a->dx, b->dx, most) && alike(a->dw, b->dw, most) &&
              alike(a->db, b->db, most));
        if (exact[i] && cpu->s->pass == SNIP_PASS_ORDINARY) CHECK(same(a->out, b->out));
        if (ours->how.recomputes) CHECK(same(a->again, a->out) && same(b->again, b->out));
    }
    const int again = ours->next_pass(loss);
    CHECK(cpu->next_pass(loss) == again);
    return again != 0;
}

// Both machines step by step: the same results, estimates, plans.
static void test_session_one(const snip_desc &desc, const manner &how, int lag, int steps, double loss = 2.5) {
    machine ours(desc, how, lag), cpu(desc, how);
    snip_format old[LAYERS][SNIP_GEMMS];
    auto formats = [](const snip *s, int i) { return s->layers[i].kept.format; };
    for (int64_t step = 0; step < steps; step++) {
        const snip_adamw o = adamw_of(step + 1);
        const int plans = snip_plans(cpu.s);
        bool exact[LAYERS];
        test_about("session%s, optimizer %d, %d micro-batches, lag %d, step %d", how.name, desc.optimizer, how.micros,
                   lag, (int)step);
        for (int i = 0; i < LAYERS; i++) {
            for (int g = 0; g < SNIP_GEMMS; g++) old[i][g] = snipi_format(&ours.s->layers[i], g);
            exact[i] = !lag && old[i][SNIP_FWD] == SNIP_E2M1;
        }
        while (both_pass(&ours, &cpu, exact, loss)) continue;
        CHECK(ours.end_step(&o, how.micros > 1) == cpu.end_step(&o));
        if (!lag) {
            CHECK(snip_plans(ours.s) == snip_plans(cpu.s));
            for (int i = 0; i < LAYERS; i++)
                for (int w = 0; w < 2; w++)
                    CHECK(close_to(ours.s->layers[i].kept.level[w], cpu.s->layers[i].kept.level[w], 1));
            if (snip_plans(cpu.s) > plans) check_estimates(ours.s, cpu.s, how);
        } else if (snip_plans(cpu.s) > plans)  // theirs takes effect later
            for (int i = 0; i < LAYERS; i++)
                for (int g = 0; g < SNIP_GEMMS; g++) {
                    CHECK(snip_plans(ours.s) == plans && formats(ours.s, i)[g] == old[i][g]);
                    formats(cpu.s, i)[g] = old[i][g];
                }
        if (lag && step % desc.every == lag && step > desc.every) {
            CHECK(snip_plans(ours.s) == snip_plans(cpu.s));
            for (int i = 0; i < LAYERS; i++)
                memcpy(formats(cpu.s, i), formats(ours.s, i), sizeof ours.s->layers[i].kept.format);
        }
        for (int i = 0; i < LAYERS; i++)  // weights move alike
            for (int64_t j = 0; j < dims[i][0] * dims[i][1]; j++) {
                float *w = cpu.t.l[i]->w.floats();
                ours.t.l[i]->w.floats()[j] = w[j] -= cpu.t.l[i]->m.floats()[j];
            }
    }
    CHECK(snip_cuda_finish(ours.c) == SNIP_OK && snip_plans(ours.s) == (steps - 1) / desc.every &&
          snip_share(ours.s, SNIP_E2M1) >= desc.budget);
}

static snip_desc session_desc(int every) {
    snip_desc desc = {};
    desc.budget = 0.6;
    desc.every = every;
    desc.seed = 9;
    return desc;
}

// A captured pass, replayed: the bytes of the same steps without a graph, stochastic rounding included; and what the
// device sees of X in a replay sizes the next measurement's noise.
static void session_in_a_graph() {
    const manner how = { " in a graph", MICROS, false, false, false, false, true };
    const snip_desc desc = session_desc(3);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    machine a(desc, how, 1), b(desc, how, 0);
    snip_set_format(a.s, -1, SNIP_GEMMS, SNIP_E2M1);
    snip_set_format(b.s, -1, SNIP_GEMMS, SNIP_E2M1);
    CHECK(cudaStreamBeginCapture(a.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    CHECK(a.pass() == SNIP_OK);
    CHECK(cudaStreamEndCapture(a.stream, &graph) == cudaSuccess &&
          cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    for (int64_t step = 0; step < 3; step++) {
        snip_adamw o = adamw_of(step + 1);
        buffer before(a.t.l[1]->dw.size);
        memcpy(before.at, a.t.l[1]->dw.at, before.size);
        test_about("session in a graph, step %d", (int)step);
        CHECK(cudaGraphLaunch(exec, a.stream) == cudaSuccess);
        CHECK(snip_cuda_next_pass(a.c, NULL, a.stream) == 0 && a.end_step(&o) == SNIP_OK);
        CHECK(b.pass() == SNIP_OK && snip_cuda_next_pass(b.c, NULL, b.stream) == 0 && b.end_step(&o) == SNIP_OK);
        finish();
        for (int i = 0; i < LAYERS; i++)
            CHECK(same(a.t.l[i]->out, b.t.l[i]->out) && same(a.t.l[i]->dx, b.t.l[i]->dx) &&
                  same(a.t.l[i]->dw, b.t.l[i]->dw));
        CHECK(!same(before, a.t.l[1]->dw));
    }
    CHECK(a.step() == SNIP_OK && b.step() == SNIP_OK && snip_cuda_finish(a.c) == SNIP_OK && snip_plans(a.s) == 1);
    for (int i = 0; i < LAYERS; i++)
        CHECK(memcmp(a.s->layers[i].kept.estimate, b.s->layers[i].kept.estimate, sizeof a.s->layers[i].kept.estimate) ==
              0);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
}

// A call of the session's own.
static snipi_call call_of(const machine &m, int layer, int64_t micro = 0) {
    snipi_call call;
    CHECK(snipi_begin_call(&call, m.s, layer, m.s, m.s, m.s, ROWS, snipi_cuda_operations(), m.c, m.stream));
    call.micro = micro;
    return call;
}

// A weight is quantized once a step, for all micro-batches and for fwd and dgrad, and anew in the next step and in a
// capture. A recomputed forward finds it, too.
static void session_held_weights() {
    const snip_format formats[][2] = {
        {SNIP_E4M3,  SNIP_E4M3},
        { SNIP_E4M3, SNIP_E2M1},
        { SNIP_E2M1, SNIP_E2M1},
        { SNIP_BF16, SNIP_E4M3}
    };
    for (const snip_format *format : formats) {
        machine d(session_desc(-1), plainly, 0);
        layer_data *l = d.t.l[1];
        const int64_t nx = ROWS * l->k, ny = ROWS * l->n, nw = l->n * l->k;
        buffer w(l->w.size), saved(l->w.size), out(l->out.size / MICROS), dx(l->dx.size / MICROS);
        cudaGraph_t graph;
        auto forward = [&](int micro) {
            CHECK(d.forward(1, l->out.floats() + micro * ny, l->x.floats(), w.floats(), NULL) == SNIP_OK);
        };
        auto backward = [&](int micro) {
            CHECK(d.backward(1, l->dx.floats() + micro * nx, NULL, NULL, l->dy.floats(), l->x.floats(), w.floats()) ==
                  SNIP_OK);
        };
        auto expect = [&]() {  // of w, not held
            finish();
            memset(dx.at, 0, dx.size);
            const snipi_call call = call_of(d, 1, SNIPI_ALONE);
            CHECK(snipi_cuda_fwd(&call, format[0], out.floats(), l->x.floats(), w.floats(), NULL) == SNIP_OK);
            CHECK(snipi_cuda_dgrad(&call, format[1], dx.floats(), 1, l->dy.floats(), w.floats()) == SNIP_OK);
            finish();
        };
        snip_set_format(d.s, 1, SNIP_FWD, format[0]);
        snip_set_format(d.s, 1, SNIP_DGRAD, format[1]);
        for (int64_t step = 1; step <= 3; step++) {
            snip_adamw o = adamw_of(step);
            const int held[2] = { format[0] != SNIP_BF16, 1 };
            test_about("session, held weights, formats %s %s, step %d", snip_format_name(format[0]),
                       snip_format_name(format[1]), (int)step);
            fill(w, nw, SNIP_F32, GAUSS);
            l->clear();
            if (step == 3) {  // captured and never run: must not count as quantized
                CHECK(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
                forward(0);
                backward(0);
                CHECK(cudaStreamEndCapture(d.stream, &graph) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
                snipi_begin_pass(d.s, SNIP_PASS_ORDINARY);
            }
            expect();
            forward(0);
            finish();
            memcpy(saved.at, w.at, w.size);
            if (held[0]) memset(w.at, 0, w.size);
            CHECK(d.recompute(1, l->again.floats(), l->x.floats(), w.floats(), NULL) == SNIP_OK);
            finish();
            CHECK(memcmp(l->again.at, out.at, out.size) == 0);
            memcpy(w.at, saved.at, w.size);
            backward(0);
            finish();
            CHECK(memcmp(l->out.at, out.at, out.size) == 0);
            if (format[1] != SNIP_E2M1)
                CHECK(memcmp(l->dx.at, dx.at, dx.size) == 0);  // else stochastic, by micro-batch
            memset(w.at, 0, w.size);                           // the second micro-batch does not look at it
            forward(1);
            backward(1);
            finish();
            for (int g = 0; g < 2; g++) {
                const float *y = g ? l->dx.floats() + nx : l->out.floats() + ny;
                double sum = 0;
                for (int64_t i = 0; i < (g ? nx : ny); i++) sum += fabs((double)y[i]);
                CHECK((sum > 0) == held[g]);
            }
            if (held[0]) CHECK(memcmp(l->out.at + out.size, out.at, out.size) == 0);
            CHECK(d.end_step(&o) == SNIP_OK);
            finish();
        }
    }
}

// Saturated elements, NaN and infinity of a step: the CPU's counts, whatever is held or recomputed.
static void session_counts() {
    for (int format = 0; format < 3; format++)
        for (int micros = 1; micros <= MICROS; micros++) {
            snip_desc desc = session_desc(-1);
            desc.fp8.activation = desc.fp8.gradient = { format == 2 ? SNIP_E5M2 : SNIP_E4M3, 1, 128, SNIP_SCALE_UE8M0,
                                                        NEAREST };
            desc.fp8.weight = { SNIP_E4M3, 128, 128, SNIP_SCALE_UE8M0, NEAREST };
            desc.fp4.activation = { SNIP_E2M1, 1, 128, SNIP_SCALE_UE8M0, NEAREST };
            desc.fp4.gradient = { SNIP_E2M1, 1, 128, SNIP_SCALE_UE8M0, SNIP_ROUND_STOCHASTIC };
            desc.fp4.weight = { SNIP_E2M1, 128, 128, SNIP_SCALE_UE8M0, NEAREST };
            const manner how = { "", micros, false, format == 1, false, false, false };
            machine ours(desc, how, 0), cpu(desc, how);
            for (int64_t step = 1; step <= 3; step++) {
                snip_adamw o = adamw_of(step);
                test_about("session counts, formats %d, %d micro-batches, step %d", format, micros, (int)step);
                shim_order = (int)step % SHIM_ORDERS;
                for (machine *m : { &ours, &cpu }) {
                    snip_set_format(m->s, -1, SNIP_GEMMS, format == 1 ? SNIP_E2M1 : SNIP_E4M3);
                    snip_set_format(m->s, 1, SNIP_FWD, SNIP_E2M1);
                    m->t.clear();
                    layer_data *const *l = m->t.l;
                    if (step == 3) {
                        l[0]->x.floats()[7] = l[0]->w.floats()[3] = snipi_float(0x7FC00000u);
                        l[1]->dy.floats()[9] = l[1]->bias.floats()[2] = snipi_float(0x7FC00000u);
                        l[1]->w.floats()[4] = snipi_float(0xFF800000u);
                    }
                    m->pass();
                }
                snip_layer_info info[LAYERS], own;
                for (int i = 0; i < LAYERS; i++) snip_layer(cpu.s, i, &info[i]);
                CHECK(ours.end_step(&o) == cpu.end_step(&o) && snip_failed_layer(ours.s) == snip_failed_layer(cpu.s));
                finish();
                for (int i = 0; i < LAYERS; i++) {
                    snip_layer(ours.s, i, &own);
                    CHECK(own.nonfinite == info[i].nonfinite && own.saturated == info[i].saturated);
                    CHECK(own.saturated > 0 && (own.nonfinite > 0) == (step == 3));
                }
            }
        }
}

// A spike's fallback and its measurement come after the lag; no measurement begins while another is on its way.
static void session_watches_losses() {
    machine d(session_desc(9), plainly, 2);
    char passes[64] = "";
    for (int64_t step = 0; step < 47; step++) {
        snip_adamw o = adamw_of(step + 1);
        test_about("session watches, step %d", (int)step);
        passes[step] = d.s->pass == SNIP_PASS_ORDINARY ? '.' : 'm';
        const double loss = step == 40 || step == 41 ? 100 : 2.5 + 0.01 * (double)(step % 3);
        if (step == 40) snip_set_format(d.s, -1, SNIP_GEMMS, SNIP_E2M1);
        do
            if (d.s->pass != SNIP_PASS_ORDINARY) d.pass();
        while (d.next_pass(loss));
        CHECK(d.end_step(&o) == SNIP_OK);
        finish();
        if (step == 41) CHECK(snip_share(d.s, SNIP_E2M1) == 1);
        if (step == 42) CHECK(snip_share(d.s, SNIP_E2M1) == 0 && strstr(snip_reason(d.s), "the loss spikes: 100"));
    }
    CHECK(!strcmp(passes, ".........m........m........m........m......m..."));
    CHECK(snip_plans(d.s) == 5 && snip_share(d.s, SNIP_E2M1) >= d.s->desc.budget);
}

// NaN and infinity are told of after the lag, whatever the format.
static void session_tells_of_nan() {
    static const snip_format formats[] = { SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };
    for (snip_format format : formats)
        for (int where = 0; where < 4; where++) {
            machine d(session_desc(-1), plainly, 1);
            layer_data *l = d.t.l[1];
            const snip_adamw o = adamw_of(1), next = adamw_of(2);
            float *bad = (where == 0 ? l->x : where == 1 ? l->w : where == 2 ? l->dy : l->bias).floats() + 5;
            const float was = *bad;
            test_about("session, NaN in tensor %d, %s", where, snip_format_name(format));
            snip_set_format(d.s, -1, SNIP_GEMMS, format);
            *bad = snipi_float(where == 1 ? 0xFF800000u : 0x7FC00000u);
            CHECK(d.pass() == SNIP_OK && d.end_step(&o) == SNIP_OK);
            finish();
            *bad = was;
            d.t.clear();
            CHECK(d.pass() == SNIP_OK && d.end_step(&next) == SNIP_NONFINITE);
            CHECK(strstr(snip_message(d.s), "1.lin") && snip_failed_layer(d.s) == 1);
            CHECK(snip_cuda_finish(d.c) == SNIP_OK);
        }
    // An error of this step goes before that of the step read, and keeps its message.
    machine d(session_desc(-1), plainly, 1);
    layer_data *l = d.t.l[0];
    float *bad = d.t.l[1]->x.floats() + 5, was = *bad;
    test_about("session, an error beside a late one");
    *bad = snipi_float(0x7FC00000u);
    CHECK(d.step() == SNIP_OK);
    finish();
    *bad = was;
    const snip_adamw o = adamw_of(2);
    CHECK(d.forward(0, l->out.floats(), l->x.floats(), l->w.floats(), NULL, ROWS + 1) == SNIP_BAD_ARGUMENT);
    CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && strstr(snip_message(d.s), "more rows") && snip_failed_layer(d.s) == 0);
}

// What makes a measurement fail is told of by layer and cause, after the lag, and the measurement made anew.
static void session_failures() {
    enum { STATE_M, STATE_V, LOSS, NO_OPTIMIZER, PROBE, FAILURES };

    for (int failure = 0; failure < FAILURES; failure++)
        for (int lag = 0; lag < 2; lag++) {
            if (lag && !wanted()) continue;
            machine d(session_desc(4), plainly, lag);
            layer_data *l = d.t.l[1];
            const bool state = failure == STATE_M || failure == STATE_V;
            float *bad = (failure == STATE_M ? l->m : failure == STATE_V ? l->v : l->dy).floats() + 7, was = *bad;
            snip_status status = SNIP_OK;
            test_about("session, failure %d, lag %d", failure, lag);
            for (int step = 0; step < 4; step++) CHECK(d.step() == SNIP_OK && d.s->kept.failures == 0);
            if (failure != LOSS && failure != NO_OPTIMIZER) *bad = snipi_float(0x7FC00000u);
            if (failure == NO_OPTIMIZER) {
                do CHECK(d.pass() == SNIP_OK);
                while (d.next_pass(2.5));
                status = d.end_step(NULL);
                CHECK(status == SNIP_OK && d.s->kept.failures == 1);
            } else
                status = d.step(failure == LOSS ? (double)snipi_float(0x7FC00000u) : 2.5);
            finish();
            *bad = was;
            if (lag && failure != NO_OPTIMIZER) {
                CHECK(status == SNIP_OK && d.s->pass == SNIP_PASS_ORDINARY);
                status = d.step();
            }
            CHECK(status == (failure == NO_OPTIMIZER ? SNIP_OK : SNIP_NONFINITE) && snip_plans(d.s) == 0);
            CHECK(d.s->kept.failures == 1 && strstr(snip_reason(d.s), "no measurement"));
            CHECK((strstr(snip_message(d.s), "optimizer's state is not finite") != NULL) == state);
            if (state || failure == PROBE) CHECK(strstr(snip_message(d.s), "1.lin") && snip_failed_layer(d.s) == 1);
            if (failure == LOSS) CHECK(strstr(snip_message(d.s), "its loss is not finite"));
            if (d.s->pass == SNIP_PASS_ORDINARY) CHECK(d.step() == SNIP_OK);
            CHECK(d.s->pass == SNIP_PASS_LOSS_PROBE && d.step() == SNIP_OK);
            CHECK(snip_cuda_finish(d.c) == SNIP_OK && snip_plans(d.s) == 1 && d.s->kept.failures == 0);
        }
    // Between steps, finish finds out that the next one is to measure.
    machine d(session_desc(4), plainly, 2);
    test_about("session, a failure that finish reads");
    for (int step = 0; step < 6; step++) CHECK(d.step(step == 4 ? (double)snipi_float(0x7FC00000u) : 2.5) == SNIP_OK);
    CHECK(d.s->pass == SNIP_PASS_ORDINARY && snip_cuda_finish(d.c) == SNIP_NONFINITE);
    CHECK(d.s->pass == SNIP_PASS_LOSS_PROBE);
}

// Refused calls are told of at once and kept, by function, layer and cause.
static void session_refusals() {
    machine d(session_desc(-1), plainly, 0);
    const snip_adamw o = adamw_of(1), wrong = adamw_of(0);
    layer_data *l = d.t.l[0];
    float *out = l->out.floats(), *x = l->x.floats(), *w = l->w.floats(), *dy = l->dy.floats();
    auto says = [&](const char *text) { return strstr(snip_message(d.s), text) != NULL; };
    test_about("session, refusals");
    CHECK(snip_cuda_supported());
    CHECK(snip_cuda_memory(NULL, 5) == 0 && snip_cuda_memory(d.s, 0) == 0);
    CHECK(!snip_cuda_create(NULL, 5, 0, d.memory, 0) && !snip_cuda_create(d.s, 0, 0, d.memory, 0) && says("rows"));
    CHECK(!snip_cuda_create(d.s, ROWS, -1, d.memory, 0) && says("snip_cuda_create: lag"));
    CHECK(!snip_cuda_create(d.s, ROWS, 0, NULL, 0) && says("memory"));
    CHECK(!snip_cuda_create(d.s, ROWS, 0, d.memory.at + 8, 0) && says("memory"));
    CHECK(snip_cuda_linear_forward(NULL, 0, out, x, w, NULL, ROWS, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_linear_backward(NULL, 0, NULL, NULL, NULL, dy, x, w, ROWS, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_linear_recompute(NULL, 0, out, x, w, NULL, ROWS, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_next_pass(NULL, NULL, 0) == 0 && snip_cuda_finish(NULL) == SNIP_BAD_ARGUMENT);
    CHECK(d.forward(0, out, x, w, NULL, ROWS + 1) == SNIP_BAD_ARGUMENT && says("0.lin") && says("more rows"));
    CHECK(snip_failed_layer(d.s) == 0 && snip_step_status(d.s) == SNIP_BAD_ARGUMENT);
    CHECK(d.forward(LAYERS, out, x, w, NULL) == SNIP_BAD_ARGUMENT && says("snip_cuda_linear_forward, layer 2"));
    CHECK(d.backward(0, NULL, NULL, NULL, NULL, x, w) == SNIP_BAD_ARGUMENT &&
          says("snip_cuda_linear_backward, layer 0"));
    CHECK(d.recompute(0, out, NULL, w, NULL) == SNIP_BAD_ARGUMENT && says("snip_cuda_linear_recompute, layer 0"));
    CHECK(snip_cuda_measure_gains(d.c, ROWS + 1, 0) == SNIP_BAD_ARGUMENT && says("snip_cuda_measure_gains: rows"));
    CHECK(snip_plan_seconds(d.s) == 0 && snip_cuda_measure_gains(d.c, 8, 0) == SNIP_OK);
    CHECK(snip_plan_seconds(d.s) > 0 && snip_cuda_end_step(NULL, &o, NULL, 0) == SNIP_BAD_ARGUMENT);
    CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && says("more rows"));  // the step's first error, told of once
    CHECK(d.end_step(&o) == SNIP_OK);
    CHECK(d.end_step(&wrong) == SNIP_BAD_ARGUMENT && says("snip_cuda_end_step") && says("out of range"));
    CHECK(d.end_step(NULL) == SNIP_OK);

    // After the last pass, with and without a loss; a backward call in an evaluation; a forward call that none was.
    for (int told = 0; told < 2; told++) {
        if (told)
            d.next_pass(1);
        else
            snip_cuda_next_pass(d.c, NULL, d.stream);
        CHECK(d.forward(1, out, x, w, NULL) == SNIP_BAD_ARGUMENT && says("1.lin") && says("snip_end_step is missing"));
        CHECK(d.backward(1, NULL, NULL, NULL, dy, x, w) == SNIP_BAD_ARGUMENT);
        CHECK(d.recompute(1, out, x, w, NULL) == SNIP_BAD_ARGUMENT);
        CHECK(d.next_pass(1) == 0 && says("snip_cuda_next_pass") && says("snip_cuda_end_step is missing"));
        CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && says("1.lin"));
    }
    snip_set_mode(d.s, SNIP_EVAL);
    CHECK(d.forward(0, out, x, w, NULL) == SNIP_OK && d.forward(0, out, x, NULL, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_step_status(d.s) == SNIP_OK);
    CHECK(d.backward(0, NULL, NULL, NULL, dy, x, w) == SNIP_BAD_ARGUMENT && says("outside SNIP_TRAIN"));
    snip_set_mode(d.s, SNIP_TRAIN);
    CHECK(d.recompute(0, out, x, w, NULL) == SNIP_BAD_ARGUMENT && says("no waiting forward call"));
    CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && says("outside SNIP_TRAIN"));

    snip_desc desc = session_desc(-1);
    desc.fp4.activation = { SNIP_E2M1, 1, 32, SNIP_SCALE_UE8M0, NEAREST };
    snip *mx = session_of(desc, d.t, plainly);
    CHECK(!snip_cuda_create(mx, ROWS, 0, d.memory, 0) && strstr(snip_message(mx), "no GEMM kernels"));
    snip_destroy(mx);
#ifndef __CUDACC__
    play_gpu(4);
    CHECK(!snip_cuda_supported() && !snip_cuda_create(d.s, ROWS, 0, d.memory, 0) && says("not compiled for this GPU"));
    play_gpu(0);
#endif
}

// Of a measuring step: a batch that is not run again, no loss, an ending in a probe pass.
static void session_protocol() {
    machine d(session_desc(2), plainly, 0);
    const snip_adamw o = adamw_of(1);
    auto says = [&](const char *text) { return strstr(snip_message(d.s), text) != NULL; };
    test_about("session, protocol of a measuring step");
    CHECK(d.step() == SNIP_OK && d.step() == SNIP_OK && d.s->pass == SNIP_PASS_LOSS_PROBE);
    CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && says("snip_cuda_end_step: in a probe pass"));
    do CHECK(d.pass() == SNIP_OK);
    while (snip_cuda_next_pass(d.c, NULL, d.stream));
    CHECK(snip_step_status(d.s) == SNIP_BAD_ARGUMENT && says("needs its loss"));
    CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && d.s->kept.failures == 1 && d.step() == SNIP_OK);
    do
        CHECK(d.pass() == SNIP_OK &&
              d.forward(1, d.t.l[1]->out.floats(), d.t.l[1]->x.floats(), d.t.l[1]->w.floats(), NULL) == SNIP_OK);
    while (d.next_pass(1));
    CHECK(d.end_step(&o) == SNIP_BAD_ARGUMENT && says("2 forward and 1 backward calls") && snip_failed_layer(d.s) == 1);

    machine other(session_desc(2), plainly, 0);  // of another step
    std::vector<char> state(snip_state_size(d.s));
    CHECK(snip_state_save(d.s, state.data()) == SNIP_OK &&
          snip_state_load(other.s, state.data(), state.size()) == SNIP_OK);
    CHECK(other.pass() == SNIP_BAD_ARGUMENT && strstr(snip_message(other.s), "step was changed"));
    CHECK(other.end_step(&o) == SNIP_BAD_ARGUMENT &&
          strstr(snip_message(other.s), "snip_cuda_end_step: the session's"));
}

// What no plan could do without is said at the end of the first step.
static void session_first_step() {
    for (int lacks = 0; lacks < 4; lacks++) {
        snip_desc desc = session_desc(3);
        const manner how = { "", 1, false, false, lacks == 0 || lacks == 3, false, false };
        desc.speedup = lacks == 1 ? 1.5 : 0;
        machine d(desc, how, 2);
        d.how.frozen = lacks == 3;
        if (lacks == 2) snip_allow(d.s, 0, SNIP_GEMMS, 1, 0), snip_allow(d.s, 1, SNIP_FWD, 1, 0);
        const snip_status status = d.step();
        test_about("session, first step lacks %d", lacks);
        CHECK(status == (lacks == 0   ? SNIP_NOT_BOUND
                         : lacks == 1 ? SNIP_BAD_ARGUMENT
                         : lacks == 2 ? SNIP_INFEASIBLE
                                      : SNIP_OK));
        if (lacks == 0) CHECK(strstr(snip_message(d.s), "1.lin") && strstr(snip_message(d.s), "snip_bind_adamw"));
        const double seconds[3] = { 4, 2, 1 };
        if (lacks == 1) CHECK(snip_set_seconds(d.s, -1, SNIP_GEMMS, seconds) == SNIP_OK);
        CHECK(d.step() == SNIP_OK);
    }
}

// A state saved before a measuring step: the restored session goes on as this one does.
static void session_resumes() {
    const manner how = { " resumed", MICROS, false, false, false, false, true };
    for (int lag = -1; lag < 2; lag++) {
        machine a(session_desc(3), how, lag);
        test_about("session, resumed, lag %d", lag);
        for (int step = 0; step < 3; step++) CHECK(a.step() == SNIP_OK);
        CHECK(lag < 0 || snip_cuda_finish(a.c) == SNIP_OK);
        std::vector<char> state(snip_state_size(a.s)), ours(state.size()), theirs(state.size());
        CHECK(snip_state_save(a.s, state.data()) == SNIP_OK);
        machine b(session_desc(3), how);
        CHECK(snip_state_load(b.s, state.data(), state.size()) == SNIP_OK);
        buffer memory(lag < 0 ? 16 : snip_cuda_memory(b.s, ROWS));
        if (lag >= 0) b.c = snip_cuda_create(b.s, ROWS, lag, memory, b.stream);
        CHECK(lag < 0 || b.c);
        for (machine *m : { &a, &b }) {
            CHECK(m->step() == SNIP_OK && (lag < 0 || snip_cuda_finish(m->c) == SNIP_OK) && snip_plans(m->s) == 1);
            CHECK(snip_state_save(m->s, (m == &a ? ours : theirs).data()) == SNIP_OK);
        }
        CHECK(ours == theirs);
        snip_cuda_destroy(b.c);
        b.c = NULL;
    }
}

// dbias of many rows: the CPU's to the last place, which sums in float would miss.
static void session_bias_gradients() {
    const int64_t rows = 100000, n = dims[0][0];
    machine d(session_desc(-1), plainly, 0);
    buffer dy((size_t)(rows * n) * 4), ours((size_t)n * 4), theirs((size_t)n * 4);
    test_about("bias of %d rows", (int)rows);
    for (int64_t i = 0; i < rows * n; i++) dy.floats()[i] = 1.0f + 0.001f * uniform();
    for (int64_t i = 0; i < n; i++) ours.floats()[i] = theirs.floats()[i] = uniform();
    snipi_call call = call_of(d, 0);
    call.rows = rows;
    CHECK(snipi_cuda_bias_gradient(&call, ours.floats(), dy.floats()) == SNIP_OK);
    CHECK(snipi_host_bias_gradient(&call, theirs.floats(), dy.floats()) == SNIP_OK);
    finish();
    CHECK(same(ours, theirs));
}

// Sketches and mixed rows and columns have the CPU's bits.
static void session_sketches() {
    static const int64_t sizes[] = { 1, 4096, 5000, 100000, 200000 }, before[] = { 0, 777, 12345 };
    machine d(session_desc(2), plainly, 0);
    snipi_call call = call_of(d, 1);
    buffer sketch(SNIPI_SKETCHES * sizeof *call.sketch), expected(sketch.size);
    memset(sketch.at, 0, sketch.size);
    memset(expected.at, 0, sketch.size);
    for (int64_t n : sizes)
        for (float sign : { 1.0f, -1.0f }) {
            buffer x((size_t)n * 4);
            fill(x, n, SNIP_F32, GAUSS);
            test_about("sketch of %d", (int)n);
            shim_order = (int)n % SHIM_ORDERS;
            call.sketch = (float(*)[SNIPI_SKETCH])(void *)expected.at;
            CHECK(snipi_host_sketch_add(&call, SNIPI_SKETCH_DY, x.floats(), n, sign) == SNIP_OK);
            call.sketch = (float(*)[SNIPI_SKETCH])(void *)sketch.at;
            CHECK(snipi_cuda_sketch_add(&call, SNIPI_SKETCH_DY, x.floats(), n, sign) == SNIP_OK);
            finish();
            CHECK(same(sketch, expected));
        }
    for (int i = 0; i < 3; i++)
        for (int targets : { (int)SNIPI_MIXED, (int)SNIPI_PROJECTED }) {
            const int64_t cols = 70, rows = sizes[2 * i] / cols + 1;
            buffer x((size_t)(rows * cols) * 4), ours((size_t)(targets * cols) * 4), theirs(ours.size);
            fill(x, rows * cols, SNIP_F32, GAUSS);
            test_about("%d mixed rows at %d", (int)rows, (int)before[i]);
            const snip_rng_key key = { 3, 4, 5 };
            CHECK(snipi_host_mix_rows(&call, key, x.floats(), rows, cols, before[i], targets, theirs.floats()) ==
                  SNIP_OK);
            CHECK(snipi_cuda_mix_rows(&call, key, x.floats(), rows, cols, before[i], targets, ours.floats()) ==
                  SNIP_OK);
            finish();
            CHECK(same(ours, theirs));
        }
    for (int64_t cols : { 5, 70, 1100, 2500 }) {
        buffer x((size_t)(ROWS * cols) * 4), ours((size_t)(ROWS * SNIPI_PROJECTED) * 4), theirs(ours.size);
        fill(x, ROWS * cols, SNIP_F32, GAUSS);
        test_about("%d mixed columns", (int)cols);
        const snip_rng_key key = { 3, 4, 6 };
        CHECK(snipi_host_mix_columns(&call, key, x.floats(), ROWS, cols, theirs.floats()) == SNIP_OK);
        CHECK(snipi_cuda_mix_columns(&call, key, x.floats(), ROWS, cols, ours.floats()) == SNIP_OK);
        finish();
        CHECK(same(ours, theirs));
    }
}

// The first layer's FP8 products by the cuBLASLt played on the CPU, which has none of the second's sizes.
#ifdef __CUDACC__
static void session_by_cublaslt() {}
#else
static void session_by_cublaslt() {
    machine d(session_desc(-1), plainly, 0);
    layer_data *l = d.t.l[0];
    shim_cublaslt lt = { CUBLAS_STATUS_SUCCESS, false, 0 };
    const size_t room = snip_cuda_cublaslt_memory(d.c);
    buffer scratch(room + 512), own(l->out.size + l->dx.size + l->dw.size);
    char *at = (char *)(((uintptr_t)scratch.at + 255) / 256 * 256);
    auto both = [&](int layer) {
        layer_data *x = d.t.l[layer];
        const snip_status status = d.forward(layer, x->out.floats(), x->x.floats(), x->w.floats(), x->bias.floats());
        return status ? status
                      : d.backward(layer, x->dx.floats(), x->dw.floats(), NULL, x->dy.floats(), x->x.floats(),
                                   x->w.floats());
    };
    auto compare = [&]() {  // the squared error beside our own products
        double error = 0, norm = 0;
        const float *y = own.floats();
        for (const buffer *b : { &l->out, &l->dx, &l->dw })
            for (size_t i = 0; i < b->size / 4; i++, y++) {
                error += ((double)b->floats()[i] - *y) * ((double)b->floats()[i] - *y);
                norm += (double)*y * *y;
            }
        return error / norm;
    };
    test_about("session by cuBLASLt");
    snip_set_format(d.s, -1, SNIP_GEMMS, SNIP_E4M3);
    CHECK(snip_cuda_use_cublaslt(NULL, &lt, at, room) == SNIP_BAD_ARGUMENT &&
          snip_cuda_use_cublaslt(d.c, &lt, at, room - 1) == SNIP_BAD_ARGUMENT);
    CHECK(snip_cuda_use_cublaslt(d.c, &lt, at + 16, room) == SNIP_BAD_ARGUMENT &&
          snip_cuda_use_cublaslt(d.c, &lt, NULL, room) == SNIP_BAD_ARGUMENT &&
          strstr(snip_message(d.s), "snip_cuda_use_cublaslt"));
    CHECK(both(0) == SNIP_OK && both(1) == SNIP_OK);
    memcpy(own.at, l->out.at, l->out.size);
    memcpy(own.at + l->out.size, l->dx.at, l->dx.size);
    memcpy(own.at + l->out.size + l->dx.size, l->dw.at, l->dw.size);
    CHECK(snip_cuda_use_cublaslt(d.c, &lt, at, room) == SNIP_OK);
    l->clear();
    CHECK(both(0) == SNIP_OK && compare() > 0 && compare() < 4e-12);
    CHECK(both(1) == SNIP_UNSUPPORTED);
    lt.fails = true;
    CHECK(both(0) == SNIP_DEVICE);
    snip_set_format(d.s, 0, SNIP_GEMMS, SNIP_E2M1);
    snip_set_format(d.s, 0, SNIP_FWD, SNIP_BF16);
    CHECK(both(0) == SNIP_OK);  // not FP8
    snip_set_format(d.s, 0, SNIP_GEMMS, SNIP_E4M3);
    CHECK(snip_cuda_use_cublaslt(d.c, NULL, NULL, 0) == SNIP_OK);
    l->clear();
    CHECK(both(0) == SNIP_OK && compare() == 0);
}
#endif

static void session_beside_cpu() {
    test_session_one(session_desc(2), { "", MICROS, false, false, false, false, false }, 0, 5);
}

static void session_micro_batches_in_reverse() {
    test_session_one(session_desc(2),
                     { ", a small micro-batch first, backward in reverse", MICROS, true, true, false, false, true }, 0,
                     3);
}

static void session_frozen_layer() {
    test_session_one(session_desc(2), { ", a frozen layer, a loss of 0", 1, false, false, true, false, false }, 0, 3,
                     0);
}

static void session_expert() {
    test_session_one(session_desc(2), { ", an expert", 1, false, false, false, true, false }, 0, 9);
}

static void session_with_lag() {
    if (test.few == 1) test_session_one(session_desc(3), plainly, 2, 7);
}

static void session_with_packed_codes() {
    play_gpu(2);
    test_session_one(session_desc(3), plainly, 2, 7);
    play_gpu(0);
}

static void session_of_lion_measured_in_bf16() {
    snip_desc desc = session_desc(3);
    desc.measure = SNIP_BF16;
    desc.optimizer = SNIP_LION;
    test_session_one(desc, plainly, 0, 4);
}

static void session_of_momentum_without_update_probe() {
    snip_desc desc = session_desc(3);
    desc.measure = SNIP_BF16;
    desc.optimizer = SNIP_SGD_MOMENTUM;
    desc.update_weight = -1;
    if (test.few == 1) test_session_one(desc, plainly, 1, 5);
}

// Whether there is a GPU on which these tests can run, or a CPU that plays one.
static bool have_gpu(bool *managed) {
    *managed = true;
#ifdef __CUDACC__
    int devices = 0, value = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
        test_skip("no GPU (%s)", cudaGetErrorString(error));
        return false;
    }
    *managed = cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, 0) == cudaSuccess && value;
    if (!*managed) test_skip("the host cannot use managed memory while the GPU does: codec and oracle alone");
#endif
    return true;
}

static void run_on_managed_memory() {
    RUN(quantize_refusals);
    RUN(quantize_recipes);
    RUN(quantize_held_blocks);
    RUN(quantize_in_place);
    RUN(quantize_counts);
    RUN(quantize_statistics_in_any_order);
    RUN(dequantize_recipes);

    RUN(noise_bytes_and_sums);

    RUN(gemm_plain);
    RUN(gemm_e2m1);
    RUN(gemm_fp8);
    RUN(gemm_refusals);
    RUN(gemm_reference);
    RUN(gemm_s8_bytes);
    RUN(gemm_s8_refusals);
    RUN(gemm_by_cublaslt);
    RUN(gemm_by_cublaslt_refusals);

    RUN(session_sketches);
    RUN(session_bias_gradients);
    RUN(session_beside_cpu);
    RUN(session_micro_batches_in_reverse);
    RUN(session_frozen_layer);
    RUN(session_expert);
    RUN(session_with_lag);
    RUN(session_with_packed_codes);
    RUN(session_of_lion_measured_in_bf16);
    RUN(session_of_momentum_without_update_probe);
    RUN(session_in_a_graph);
    RUN(session_held_weights);
    RUN(session_counts);
    RUN(session_watches_losses);
    RUN(session_tells_of_nan);
    RUN(session_failures);
    RUN(session_refusals);
    RUN(session_protocol);
    RUN(session_first_step);
    RUN(session_resumes);
    RUN(session_by_cublaslt);
}

int main(int argc, char **argv) {
    bool managed;
    if (argc > 1 && !strcmp(argv[1], "--stop")) {
        stop_at_failure = true;
        argc--;
        argv++;
    }
    test_start(argc, argv);
    if (have_gpu(&managed)) {
        if (managed) run_on_managed_memory();
        RUN(codec_every_float);
        RUN(oracle_products);
    }
    return test_end() && (test.failed || !test.skipped);  // all skipped is no failure, nothing run is one
}
