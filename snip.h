// snip.h - adaptive FP4/FP8 mixed-precision training for hand-written trainers.
// Version 0.2.0. MIT licence (see LICENSE). C99 and later, C++11 and later; libc and libm only.
//
// WHAT IT IS
//   A training session. It measures, for every linear layer of a model in training, how much FP8 or FP4 would hurt the
//   loss and the next optimizer update. It picks a precision for each of the layer's three GEMMs (forward, dgrad,
//   wgrad) at the least total harm that meets a budget of FP4 FLOPs or of time. The layers run under that plan until
//   the next measurement. The idea is SNIP (Pan, Yang, Yang, Mahlke; arXiv 2602.01410); the estimators are this
//   library's own, see >>sums and >>costs.
//   Below the session lie its parts, each usable alone: element codecs, scaled quantization, GEMMs on quantized
//   operands, keyed noise.
//
// QUICK START
//   In ONE source file:            #define SNIP_IMPLEMENTATION
//                                  #include "snip.h"        (snip_ilp.h must lie beside it)
//   Elsewhere:                     #include "snip.h"
//   Link with -lm; add -fopenmp to use all cores.
//
// STEP BY STEP (examples/minimal.c is this, complete)
//     snip *s = snip_create(&(snip_desc){ .budget = 0.75, .every = 500, .seed = 1 });
//     int l = snip_add_linear(s, "0.attn.q", out_features, in_features, 0);   // every linear layer
//     snip_bind_adamw(s, l, m, v);                       // its optimizer state, [out, in] each
//     for (step = 1; ; step++) {
//         do {                                           // once; three times on a measuring step
//             zero_grad();
//             ... snip_linear_forward (s, l, out, inp, weight, bias, rows);
//             ... snip_linear_backward(s, l, dinp, dweight, dbias, dout, inp, weight, rows);
//         } while (snip_next_pass(s, loss));
//         if (snip_step_status(s)) puts(snip_message(s));                     // NaN, say: skip the optimizer
//         else optimizer_step();
//         snip_end_step(s, &(snip_adamw){ lr, beta1, beta2, eps, step, grad_scale });
//     }                                // grad_scale: the factor that clipping has put on the gradients
//   Validation and sampling run between snip_set_mode(s, SNIP_EVAL) and snip_set_mode(s, SNIP_TRAIN), between steps.
//
// WHAT STAYS YOURS
//   The optimizer, master weights, data, attention, norms, communication between ranks.
//   All passes of a step must see the same batch, the same dropout masks and the same weights. What counts batches
//   (moving averages, batch norm) is for the last pass alone; snip_current_pass tells.
//   dout belongs to the loss that snip_next_pass is told: with loss scale S tell it S * loss.
//   In a measuring pass every layer has as many backward as forward calls, one each per micro-batch, in any order: a
//   backward call is matched with its forward call by the content of its input. A weight that is used twice is two
//   layers. A forward that is run again before its backward (gradient checkpointing) is snip_linear_recompute.
//   If the optimizer skipped this batch (overflow, empty batch), end the step with snip_end_step(s, NULL).
//   A frozen layer (dweight NULL in every call) needs no optimizer state, and its wgrad counts toward nothing.
//   Mixture of experts: keep the first pass's routing in all passes of a step. Where an expert's rows change from pass
//   to pass all the same, its response to errors is taken from the other layers (>>costs).
//
// SEVERAL RANKS
//   Tell snip_next_pass the loss averaged over ranks, set desc.drift < 0 (inputs differ between ranks), and after
//   snip_end_step of a measuring step load one rank's snip_state_save in all of them: they then pass, measure
//   and plan alike.
//
// WHEN IT MEASURES, AND WHEN A PLAN CHANGES
//   Every desc.every steps. Under a plan also when the loss spikes, or inputs and gradients drift, though not within
//   every / 10 steps of the last time. A measurement that fails is made anew after 1, 2, 4, ... steps.
//   Costs are averages over measurements with standard errors; a GEMM changes its format only where that saves more
//   than 2 of them. From a spike to its measurement no GEMM is below FP8. snip_reason() says in a line what was done
//   and why. With every < 0 nothing ever changes by itself.
//
// ERRORS
//   Functions that can fail return snip_status, in every build. A refused argument leaves the outputs untouched.
//   NaN and infinity in a tensor are counted: by quantizers in snip_quant_stats.nonfinite, with status SNIP_OK; by a
//   session in snip_layer_info.nonfinite, with status SNIP_NONFINITE after the work.
//   A session keeps the first error of a step: snip_step_status returns it before the optimizer runs, snip_end_step at
//   the end. snip_message names function, layer and cause; snip_failed_layer the layer.
//
// DETERMINISM
//   Codes, scales and stochastic rounding depend on the input and the key alone: not on threads, tiling or instruction
//   set, nor on -Ofast. Codes, scales, dequantized values and statistics are rounded to nearest in whatever mode the
//   host has set; noise and GEMMs round in the host's mode. GEMMs are deterministic for any number of threads; between
//   instruction sets FP4 GEMMs are equal bit for bit (exact integer sums, one fused multiply-add per scale block; the
//   operands' tiles along k must nest and be multiples of 16), the others within rounding.
//
// THREADS
//   One call chain at a time on a session; different sessions are independent, and all other functions may be called
//   from any thread. A thread of 64 KB of stack is enough. GCC's OpenMP does not survive fork(): where the parent has
//   used snip, the child calls omp_set_num_threads(1) before its first call, or the program has another pool.
//
// CONFIGURATION (define before the implementation)
//   SNIP_STATIC            all functions static to the including file
//   SNIP_MALLOC(size), SNIP_FREE(ptr)   defaults of snip_desc.alloc, and the solver's; define both
//   SNIP_PARALLEL_FOR(fn, arg, n)       another thread pool than OpenMP's: calls fn(arg, i), of type
//                          void (void *, int64_t), once for every i in [0, n), in any order, on any threads, and
//                          returns when all calls have; never nested
//   SNIP_NO_SIMD           the scalar specification only
//   SNIP_NO_AMX            no AMX, AVX512-BF16 and AVX-VNNI: for assemblers older than binutils 2.36
//
// INDEX (search for the tag)
//   API:             >>status >>format >>codec >>quantize >>noise >>gemm >>session
//   Implementation:  >>codec-impl >>random-impl >>quantize-impl >>gemm-impl
//                    >>session-impl >>passes >>sums >>costs >>plan >>policy >>files
//   Instruction sets, behind a second stop line: >>simd, and >>vector, which is written once for all of them
#ifndef SNIP_H
#define SNIP_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

// Major * 10000 + minor * 100 + patch. CHANGELOG.md has what a version changes.
#define SNIP_VERSION 200

#if defined(SNIP_STATIC) && (defined(__GNUC__) || defined(__clang__))
#    define SNIP_API static __attribute__((unused))
#elif defined(SNIP_STATIC)
#    define SNIP_API static
#else
#    define SNIP_API extern
#endif

#ifdef __cplusplus
extern "C" {
#endif

// >>status -----------------------------------------------------------------------------------------
#define SNIP_STATUS_LIST(X)                                              \
    X(SNIP_OK, "ok")                                                     \
    X(SNIP_BAD_ARGUMENT, "an argument is out of range")                  \
    X(SNIP_OUT_OF_MEMORY, "out of memory")                               \
    X(SNIP_UNSUPPORTED, "this combination is not supported")             \
    X(SNIP_NONFINITE, "a tensor holds NaN or infinity")                  \
    X(SNIP_INFEASIBLE, "no plan meets the budget")                       \
    X(SNIP_NOT_BOUND, "a layer has no optimizer state bound to it")      \
    X(SNIP_IO, "a file cannot be read or written")                       \
    X(SNIP_CORRUPT, "the data is damaged, cut short or of another kind") \
    X(SNIP_MISMATCH, "the data belongs to a different model or session") \
    X(SNIP_DEVICE, "a call of the CUDA runtime failed")

typedef enum {

#define SNIP_X(code, text) code,
    SNIP_STATUS_LIST(SNIP_X)
#undef SNIP_X
        SNIP_STATUS_COUNT
} snip_status;

// The text of a status; "unknown status" for a value that is none.
SNIP_API const char *snip_status_text(snip_status);

// >>format -----------------------------------------------------------------------------------------
// Element formats. Numbers begin at 1, so that a zeroed recipe or descriptor is recognized as not set.
typedef enum {
    SNIP_F32 = 1,
    SNIP_BF16,
    SNIP_E4M3,   // FP8, largest 448, no infinity, NaN 0x7F
    SNIP_E5M2,   // FP8, largest 57344
    SNIP_E2M1,   // FP4 {0, .5, 1, 1.5, 2, 3, 4, 6}; no NaN, no infinity; two to a byte, even index low
    SNIP_E2M3,   // FP6, largest 7.5; one to a byte
    SNIP_E3M2,   // FP6, largest 28; one to a byte
    SNIP_UE8M0,  // scale only: 2^(code - 127), 0xFF is NaN
    SNIP_UE4M3   // scale only: E4M3 without a sign
} snip_format;

// How a tile's scale follows from amax, its largest finite magnitude.
typedef enum {
    SNIP_SCALE_NONE,     // no scale (F32 and BF16 always; the others: a plain saturating cast)
    SNIP_SCALE_F32,      // amax / largest, in float32
    SNIP_SCALE_POW2,     // the smallest power of two with amax / scale <= largest; stored as float32
    SNIP_SCALE_UE8M0,    // OCP MX: 2^(floor(log2 amax) - emax), one byte
    SNIP_SCALE_UE4M3,    // NVFP4: one E4M3 byte per tile times one float32 per tensor
    SNIP_SCALE_UE8M0_UP  // MX with the scale rounded up (RCEIL): the smallest power of two with amax / scale <= largest
} snip_scale;

typedef enum { SNIP_ROUND_NEAREST_EVEN, SNIP_ROUND_STOCHASTIC } snip_rounding;

// How a matrix is quantized.
typedef struct {
    snip_format format;
    int32_t tile_rows, tile_cols;  // elements sharing one scale; 0: the whole dimension
    snip_scale scale;
    snip_rounding rounding;
} snip_recipe;

// Ready-made recipes, as initializers: snip_recipe r = SNIP_RECIPE_FP8_TILE;
#define SNIP_RECIPE_F32 \
    { SNIP_F32, 0, 0, SNIP_SCALE_NONE, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_BF16 \
    { SNIP_BF16, 0, 0, SNIP_SCALE_NONE, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP8_TILE \
    { SNIP_E4M3, 1, 128, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP8_BLOCK \
    { SNIP_E4M3, 128, 128, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP4_TILE \
    { SNIP_E2M1, 1, 128, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP4_TILE_SR \
    { SNIP_E2M1, 1, 128, SNIP_SCALE_F32, SNIP_ROUND_STOCHASTIC }
#define SNIP_RECIPE_FP4_BLOCK \
    { SNIP_E2M1, 128, 128, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_MXFP8 \
    { SNIP_E4M3, 1, 32, SNIP_SCALE_UE8M0, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_MXFP4 \
    { SNIP_E2M1, 1, 32, SNIP_SCALE_UE8M0, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_NVFP4 \
    { SNIP_E2M1, 1, 16, SNIP_SCALE_UE4M3, SNIP_ROUND_NEAREST_EVEN }

// Instruction sets with code of their own; GEMMs use all of them but SSE2, under which they are plain C;
// the rest only knows SSE2, AVX2, AVX-512 and NEON.
// AMX is on Linux only: the first call that looks for it asks the kernel's permission for the process, after which
// signal stacks (sigaltstack) need 8 KiB more, for the tiles. Where it is refused, the next best is used.
typedef enum {
    SNIP_ISA_BEST,
    SNIP_ISA_SCALAR,
    SNIP_ISA_SSE2,
    SNIP_ISA_AVX2,
    SNIP_ISA_AVX_VNNI,
    SNIP_ISA_AVX512,
    SNIP_ISA_AVX512_VNNI,
    SNIP_ISA_AVX512_BF16,
    SNIP_ISA_AMX,
    SNIP_ISA_NEON,
    SNIP_ISA_NEON_DOT,
    SNIP_ISA_COUNT
} snip_isa;

// 1 if this machine has the instruction set and this build has code for it, else 0.
SNIP_API int snip_isa_available(snip_isa);

// "best", "scalar", "avx2", ...; "?" for a value that is none.
SNIP_API const char *snip_isa_name(snip_isa);

// "f32", "bf16", "fp8" (E4M3), "fp4" (E2M1), "e5m2", ...; "?" for a value that is none.
SNIP_API const char *snip_format_name(snip_format);

// Largest finite value; 0 for F32, BF16 and UE8M0.
SNIP_API float snip_format_max(snip_format);

// Stored bits per element: 4, 8, 16 or 32; 0 for a value that is none.
SNIP_API int snip_format_bits(snip_format);

// >>codec ------------------------------------------------------------------------------------------
// Single elements. Round to nearest, ties to even. Finite values beyond the largest and infinities saturate (NVIDIA's
// SATFINITE). NaN becomes the format's NaN, or the largest positive value where there is none.
SNIP_API uint8_t snip_e4m3_from_f32(float);
SNIP_API float snip_e4m3_to_f32(uint8_t);
SNIP_API uint8_t snip_e5m2_from_f32(float);
SNIP_API float snip_e5m2_to_f32(uint8_t);

// The code lies in the low 4 (E2M1) or 6 bits (E2M3, E3M2); higher bits are ignored.
SNIP_API uint8_t snip_e2m1_from_f32(float);
SNIP_API float snip_e2m1_to_f32(uint8_t);
SNIP_API uint8_t snip_e2m3_from_f32(float);
SNIP_API float snip_e2m3_to_f32(uint8_t);
SNIP_API uint8_t snip_e3m2_from_f32(float);
SNIP_API float snip_e3m2_to_f32(uint8_t);

// Scales. UE8M0 rounds up, or down in _floor, and takes a negative value as its magnitude. UE4M3 takes a negative
// value as 0.
SNIP_API uint8_t snip_ue8m0_from_f32(float);
SNIP_API uint8_t snip_ue8m0_from_f32_floor(float);
SNIP_API float snip_ue8m0_to_f32(uint8_t);
SNIP_API uint8_t snip_ue4m3_from_f32(float);
SNIP_API float snip_ue4m3_to_f32(uint8_t);

// BF16 keeps NaN and infinity; beyond the largest finite value it becomes infinity.
SNIP_API uint16_t snip_bf16_from_f32(float);
SNIP_API float snip_bf16_to_f32(uint16_t);

// Without saturation: beyond the largest, E4M3 becomes NaN (464 still rounds to 448) and E5M2 infinity.
SNIP_API uint8_t snip_e4m3_from_f32_nosat(float);
SNIP_API uint8_t snip_e5m2_from_f32_nosat(float);

// >>quantize ---------------------------------------------------------------------------------------
// Matrices are row-major; ld counts elements from row to row, at least cols. A tile is tile_rows x tile_cols, short at
// the right and lower edges.
// Codes: [rows][cols] without padding; for E2M1 a row takes (cols + 1) / 2 bytes.
// Scales: [ceil(rows / tile_rows)][ceil(cols / tile_cols)], dequantizing (x ~ scale * code): float for F32 and POW2, a
// byte for UE8M0 and UE4M3. UE4M3 is followed, at the next multiple of 4 bytes, by the tensor's float scale.
// amax is over finite elements. A tile of zeros has scale 1 (F32, POW2), 2^-127 (UE8M0, byte 0) or 0 (UE4M3, byte 0).
// No other scale is below 2^-126 (POW2, F32), 2^-127 (UE8M0) or 0 (UE4M3); under a scale of 0 finite elements are
// stored as zeros. The code of x is that of x * (largest / amax), each rounded to float32. Codes, scales and out must
// not overlap x, but for `out`, which may be x itself where a function says so.

// Random numbers: a key and the element's index r * cols + c in the quantized matrix.
typedef struct {
    uint64_t seed;
    uint32_t step, tensor;
} snip_rng_key;

// What quantization did to a matrix, over its finite elements. d = Q(x) - x is exact to 2e-7 |x|.
typedef struct {
    double sum_sq;      // |x|^2
    double err_sq;      // |d|^2
    double dot;         // <weight, d>; 0 without a weight
    float amax;         // largest magnitude
    int64_t nonfinite;  // NaN and infinity
    int64_t saturated;  // elements that rounding alone puts beyond the largest, or whose value is infinite
} snip_quant_stats;

// Bytes for the codes, and for the scales, of a [rows][cols] matrix; 0 for arguments that snip_quantize refuses.
SNIP_API size_t snip_codes_bound(const snip_recipe *, int64_t rows, int64_t cols);
SNIP_API size_t snip_scales_bound(const snip_recipe *, int64_t rows, int64_t cols);

// Quantizes x [rows][cols].
// codes, scales: as many bytes as the bounds say; scales may be NULL where the bound is 0. Codes of F32 and BF16 and
// float scales are aligned to their elements.
// weight: [rows][cols] with x's ld, for stats.dot; or NULL.
// stats: overwritten; or NULL.
// SNIP_BAD_ARGUMENT: a shape, pointer or recipe out of range.
SNIP_API snip_status snip_quantize(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, snip_rng_key, const float *weight, snip_quant_stats *);

// The same bytes as snip_quantize of the transposed matrix: codes and scales of a [cols][rows] matrix. x and weight
// are given as they lie.
SNIP_API snip_status snip_quantize_transposed(const snip_recipe *, const float *x, int64_t rows, int64_t cols,
                                              int64_t ld, void *codes, void *scales, snip_rng_key, const float *weight,
                                              snip_quant_stats *);

// Both of the above from one read of x; stats are the untransposed one's.
SNIP_API snip_status snip_quantize_both(const snip_recipe *, const snip_recipe *transposed, const float *x,
                                        int64_t rows, int64_t cols, int64_t ld, void *codes, void *scales,
                                        void *codes_t, void *scales_t, snip_rng_key, snip_quant_stats *);

// x [rows][cols], or its BF16, from codes and scales.
SNIP_API snip_status snip_dequantize(const snip_recipe *, const void *codes, const void *scales, int64_t rows,
                                     int64_t cols, float *x, int64_t ld);
SNIP_API snip_status snip_dequantize_bf16(const snip_recipe *, const void *codes, const void *scales, int64_t rows,
                                          int64_t cols, uint16_t *x, int64_t ld);

// Quantizes and dequantizes at once. out [rows][cols]: may be x if ld_out is ld; NULL for statistics alone.
SNIP_API snip_status snip_fake_quantize(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                        float *out, int64_t ld_out, snip_rng_key, const float *weight,
                                        snip_quant_stats *);

// All of it, for BF16 data and forced instruction sets. Zero members are absent or the default.
typedef struct {
    const void *x;                     // [rows][cols]
    snip_format x_format, out_format;  // SNIP_F32 (default) or SNIP_BF16
    int64_t rows, cols, ld;
    const float *weight;                   // [rows][cols], ld
    const snip_recipe *recipe, *recipe_t;  // of x and of x transposed; at least one
    void *codes, *scales, *codes_t, *scales_t;
    void *out;  // dequantized under recipe; may be x, in the same format and with the same ld
    int64_t ld_out;
    snip_rng_key key;
    snip_isa isa;
} snip_quantize_job;

// SNIP_UNSUPPORTED: the instruction set is not available.
SNIP_API snip_status snip_quantize_with(const snip_quantize_job *, snip_quant_stats *, snip_quant_stats *transposed);

// >>noise ------------------------------------------------------------------------------------------
// Philox4x32-10 (Salmon et al., SC 2011): four words for counter (index, step, tensor) and key seed.
SNIP_API void snip_philox(snip_rng_key, uint64_t index, uint32_t out[4]);

// White noise of unit variance: +1 or -1 (Rademacher), element i's sign from (key, i) alone.
// out[i] = x[i] + scale * noise[i] * (shape ? shape[i] : 1), i < n. out may be x.
SNIP_API snip_status snip_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                    snip_rng_key);

// *dot = sum of noise[i] * x[i] over i < n.
SNIP_API snip_status snip_noise_dot(const float *x, int64_t n, snip_rng_key, double *dot);

// The same with Gaussian noise: elements 4i .. 4i + 3 come from counter i, equal bits on every machine.
SNIP_API void snip_gauss(snip_rng_key, uint64_t index, float out[4]);
SNIP_API snip_status snip_gauss_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                    snip_rng_key);
SNIP_API snip_status snip_gauss_dot(const float *x, int64_t n, snip_rng_key, double *dot);

// Random Hadamard transform of x [rows][cols], in place, which spreads outliers before quantization.
//   every `block` elements of a row:  v <- D H D v / sqrt(block)
// H is Hadamard's matrix, D a diagonal of signs that (key, column) give. It is its own inverse up to rounding. A B^T
// keeps its value when the rows of both are transformed under one key. block: 16, 32, 64 or 128; cols: whole blocks.
SNIP_API snip_status snip_hadamard(float *x, int64_t rows, int64_t cols, int64_t ld, int block, snip_rng_key);

// >>gemm -------------------------------------------------------------------------------------------
// C[m][n] (+)= A[m][k] * B[n][k]^T + bias[n], operands quantized along k (k contiguous).
// E2M1 * E2M1 whose scale tiles along k nest: exact integer sums inside a scale block, then c = fmaf(sa * sb, sum, c)
// block after block. The integers are doubled and the scales halved for it, so that float scales below 2^-125 lose a
// bit. Everything else: float32 sums of the dequantized operands.
// AVX512_BF16 and AMX multiply what bfloat16 holds exactly (all but F32 operands that are not to be rounded) as
// bfloat16: FP8, FP6 and FP4 codes unscaled, with float32 sums, then as above. These units round to nearest even and
// know no subnormals: BF16 operands below 2^-126 count as zero, and sums of BF16 operands that fall below it become
// zero. Unscaled codes and their sums never come near.
typedef struct {
    const snip_recipe *recipe;
    const void *codes, *scales;
    int64_t ld;      // F32 and BF16: elements from row to row; 0: contiguous. Other formats: 0
    int transposed;  // F32 and BF16 only: stored [k][rows]
    int round_bf16;  // F32 only: elements are rounded to BF16 on the way in
} snip_operand;

// Bytes of scratch for a product of these sizes; 0 for shapes that are refused.
SNIP_API size_t snip_gemm_scratch(int64_t m, int64_t n, int64_t k);

// c: [m][n], ldc >= n; accumulate: 1 adds to what c holds.
// bias: [n] or NULL; it is added also to what is accumulated.
// scratch: snip_gemm_scratch bytes, any alignment (64 is fastest).
// c, the scratch and the operands must not overlap.
// SNIP_BAD_ARGUMENT: shapes, NULL operands or a recipe out of range. SNIP_UNSUPPORTED: no such instruction set here.
SNIP_API snip_status snip_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b, float *c,
                               int64_t ldc, int accumulate, const float *bias, void *scratch, snip_isa);

// >>session ----------------------------------------------------------------------------------------
// Linear layer: Y = X W^T + bias, X [rows][in], W [out][in], Y [rows][out].
//   fwd Y = X W^T    dgrad dX = dY W    wgrad dW = dY^T X
typedef struct snip snip;

typedef enum { SNIP_FWD, SNIP_DGRAD, SNIP_WGRAD, SNIP_GEMMS } snip_gemm_kind;

// The operands' recipes in the GEMMs of one precision. A member whose format is 0 is the default's.
typedef struct {
    snip_recipe activation, weight, gradient;
} snip_recipes;

// The optimizer whose next update is looked at. SNIP_ADAMW serves Adam too: decay is no part of D, the slope of an
// update in its gradient. SNIP_CUSTOM: D by callback.
// Muon has no D per weight, as its slope mixes all elements of a matrix, and needs an SVD. White errors it multiplies
// by D on average, with s_i the momentum's singular values:
//   D^2 = (sum over i != j of 2 / (s_i + s_j)^2 + |out - in| * sum of 1 / s_i^2) / (out * in)
// A callback can fill that in.
typedef enum { SNIP_ADAMW, SNIP_SGD_MOMENTUM, SNIP_LION, SNIP_CUSTOM } snip_optimizer;

// Fills d [out][in] with the slope of each weight's next update in its gradient, and returns |u|^2 of the layer's last
// update, both at learning rate 1. d NULL: |u|^2 alone is wanted. Called on measuring steps, several times a layer.
typedef double (*snip_sensitivity_fn)(void *user, int layer, float *d);

// Memory of a session. Both functions or neither; free_fn is never given NULL.
typedef struct {
    void *(*alloc_fn)(size_t, void *user);
    void (*free_fn)(void *, void *user);
    void *user;
} snip_alloc;

// What a session is to do. Zero means the default, but for budget and seed, where zero is zero.
typedef struct {
    // Least share of the linear layers' FLOPs in FP4, per pipeline stage, 0 to 1. GEMMs that never run (dinp or dweight
    // NULL) do not count.
    double budget;
    // Positive: instead of budget, each stage's linear GEMMs run this many times as fast as in `high`, 0.001 to 1e6, by
    // the times of snip_measure_gains. Such plans may leave GEMMs in `high`.
    double speedup;
    // Positive: instead of budget, each stage's linear GEMMs take at most this many seconds for the rows measured.
    double seconds;
    // Steps before the first measurement and from one to the next. 0: 500. Negative: never, and the plan is frozen.
    int every;
    uint64_t seed;
    // Pipeline stages. 0: 1.
    int n_stages;
    // 1: one precision for a layer's three GEMMs.
    int per_layer;
    // Precision until the first plan: SNIP_BF16 (default) or SNIP_F32.
    snip_format high;
    // Precision of the measuring passes: SNIP_F32 (default) or SNIP_BF16.
    snip_format measure;
    // Weight of the loss divergence in the cost. 0: 1. Negative: none.
    double loss_weight;
    // Weight of the update divergence in the cost. 0: 1. Negative: none, which saves its probe pass.
    double update_weight;
    // Steps over which rounding noise of the backward GEMMs averages out. 0: 100.
    double horizon;
    // Share of the output features on which wgrad's error is measured, to 1. 0: 0.125.
    double sample;
    // Whose updates the update divergence is about: SNIP_ADAMW (default).
    snip_optimizer optimizer;
    // Of SNIP_CUSTOM, and its first argument.
    snip_sensitivity_fn sensitivity;
    void *sensitivity_user;
    // A GEMM changes its format where that saves more than this many standard errors of its costs. 0: 2. Negative:
    // where it saves anything.
    double margin;
    // A loss this many deviations above its running mean is a spike. 0: 6. Negative: none is.
    double spike;
    // Least format from a spike to the next measurement: SNIP_E4M3 (default), SNIP_BF16 or SNIP_F32. SNIP_E2M1: the
    // plan stays.
    snip_format fallback;
    // Measure early when the rms of inputs and gradients has changed by more than a factor of 2^drift since the last
    // measurement. 0: 1 (a factor of two). Negative: never.
    double drift;
    // Recipes of the two low precisions. Default: FP8_TILE, FP8_BLOCK, FP8_TILE; FP4_TILE, FP4_BLOCK, FP4_TILE_SR.
    snip_recipes fp8, fp4;
    snip_isa isa;
    snip_alloc alloc;
} snip_desc;

// The optimizer step just taken.
//   AdamW  update = lr * mhat / (sqrt(vhat) + eps)
//   SGD    update = lr * m, m = beta1 m + g
//   Lion   update = lr * sign(beta1 m + (1 - beta1) g), m = beta2 m + (1 - beta2) g
typedef struct {
    double lr, beta1, beta2, eps;
    int64_t step;       // 1 for the first
    double grad_scale;  // factor on the gradients before the optimizer, such as min(1, clip / norm); 0: 1
} snip_adamw;

// What one precision would do to one layer (>>costs has the formulas).
typedef struct {
    double loss_first, loss_second;  // of the last measurement: first-order and curvature part of the loss change
    double update[SNIP_GEMMS];       // relative squared error of the model's next update, by GEMM
    double cost[SNIP_GEMMS];         // what the solver was given: averaged over measurements
    double error[SNIP_GEMMS];        // its standard error
} snip_estimate;

typedef struct {
    const char *name;  // the session's copy, valid until snip_destroy
    int64_t out_features, in_features;
    int stage;
    snip_format format[SNIP_GEMMS];  // the plan
    int runs[SNIP_GEMMS];            // 0: the GEMM was left out (dinp or dweight NULL) in the last pass
    snip_estimate fp8, fp4;
    int64_t nonfinite, saturated;   // operand elements of the current step so far
    double seconds[3][SNIP_GEMMS];  // in `high`, FP8, FP4: measured or set; 0: not yet
    double measurements;            // that the costs rest on, old ones counting less: at most 5
} snip_layer_info;

typedef enum { SNIP_PASS_ORDINARY, SNIP_PASS_LOSS_PROBE, SNIP_PASS_UPDATE_PROBE, SNIP_PASS_CLEAN } snip_pass;

typedef enum {
    SNIP_TRAIN,
    SNIP_EVAL,      // forward under the plan, outside any pass
    SNIP_EVAL_HIGH  // forward in desc.high
} snip_mode;

// What is wrong with a descriptor, by the field's name and its range: "budget is a share, 0 to 1". NULL: nothing.
SNIP_API const char *snip_desc_error(const snip_desc *);

// The same as a status: SNIP_BAD_ARGUMENT, or SNIP_UNSUPPORTED for an instruction set that is not available.
SNIP_API snip_status snip_desc_check(const snip_desc *);

// A new session, to be destroyed with snip_destroy. The descriptor is copied.
// NULL: out of memory, or snip_desc_error says why.
SNIP_API snip *snip_create(const snip_desc *);
SNIP_API void snip_destroy(snip *);

// The descriptor in force, defaults filled in; NULL for NULL.
SNIP_API const snip_desc *snip_settings(const snip *);

// Adds a layer; all before the first step.
// name: "block.part.kind", 1 to 255 bytes without blanks or control characters; copied.
// stage: pipeline stage, 0 to desc.n_stages - 1.
// Returns the index of the new layer (0, 1, 2, ...), or minus a snip_status.
SNIP_API int snip_add_linear(snip *, const char *name, int64_t out_features, int64_t in_features, int stage);

// The optimizer's state of a layer, m and v [out][in] each: read on measuring steps, so they must live as long as the
// session is used. Wanted by the end of the first step, but for frozen layers.
SNIP_API snip_status snip_bind_adamw(snip *, int layer, const float *m, const float *v);

// The same of SGD with momentum and Lion.
SNIP_API snip_status snip_bind_momentum(snip *, int layer, const float *m);

// Formats a plan may use for a layer's GEMM, one of them at least.
// layer -1: every layer so far; gemm SNIP_GEMMS: all three. What must stay in `high` is left out of the session.
SNIP_API snip_status snip_allow(snip *, int layer, snip_gemm_kind gemm, int fp8, int fp4);

// Times each layer's GEMMs in `high`, FP8 and FP4 on this machine, quantization included, with `rows` rows of made-up
// operands; layers of one shape are timed once. desc.speedup and desc.seconds need these times.
SNIP_API snip_status snip_measure_gains(snip *, int64_t rows);

// The same by hand: seconds in `high`, FP8 and FP4, positive and at most 1e9. layer -1 and SNIP_GEMMS as in snip_allow.
SNIP_API snip_status snip_set_seconds(snip *, int layer, snip_gemm_kind gemm, const double seconds[3]);

// Seconds of all layers' GEMMs that run, under the plan; 0 if not measured.
SNIP_API double snip_plan_seconds(const snip *);

// Puts a GEMM in a format by hand (F32, BF16, E4M3 or E2M1), until the next plan. layer and gemm as in snip_allow.
SNIP_API snip_status snip_set_format(snip *, int layer, snip_gemm_kind gemm, snip_format);

// Refused between a pass's first linear layer and its snip_next_pass.
SNIP_API snip_status snip_set_mode(snip *, snip_mode);

// out [rows][out] = inp [rows][in] * weight^T [out][in] + bias [out].
// out is overwritten; bias may be NULL; out must not overlap the others. rows 0: nothing is done or counted.
// Memory is allocated when rows grows, for the first micro-batches of a format (the weight's codes, both ways round)
// and in the first measuring step.
SNIP_API snip_status snip_linear_forward(snip *, int layer, float *out, const float *inp, const float *weight,
                                         const float *bias, int64_t rows);

// dinp [rows][in], dweight [out][in] and dbias [out] accumulate; each may be NULL. dout: [rows][out].
// The update probe, whose gradients are of no use, leaves dweight as it is.
// inp: the forward call's input, at the same place or copied, with the same bits.
// Outside SNIP_TRAIN it is refused, and the refusal is kept as the step's error.
SNIP_API snip_status snip_linear_backward(snip *, int layer, float *dinp, float *dweight, float *dbias,
                                          const float *dout, const float *inp, const float *weight, int64_t rows);

// Gradient checkpointing: a forward call of this pass run again, between it and its backward call. The micro-batch is
// found by the content of inp; out receives the same bits. It counts as no call and adds to no sum.
SNIP_API snip_status snip_linear_recompute(snip *, int layer, float *out, const float *inp, const float *weight,
                                           const float *bias, int64_t rows);

// After all forward and backward calls of a pass, on every step, with the batch's mean loss.
// Returns 1: zero the gradients and run forward and backward on the same batch again.
// Returns 0: go on to the optimizer; linear layers are refused until snip_end_step.
SNIP_API int snip_next_pass(snip *, double loss);

// The step's first error so far, SNIP_OK if none. Ask before the optimizer runs: a NaN then never reaches m and v.
SNIP_API snip_status snip_step_status(const snip *);

// Once per step, after the optimizer. On a measuring step it turns the sums into costs, solves, and switches the plan.
// NULL: the optimizer made no step (a skipped batch); a measurement is then discarded and made anew.
// Returns the first error of the step; the step is over either way. One exception: called while snip_next_pass still
// returns 1, it returns SNIP_BAD_ARGUMENT and the step is not over.
// The first step says what no plan could do without: SNIP_NOT_BOUND, SNIP_BAD_ARGUMENT where desc.speedup or
// desc.seconds lack times, SNIP_INFEASIBLE where snip_allow makes the budget impossible.
// SNIP_INFEASIBLE leaves the old plan in force; snip_message names the stage and the most that can be had.
SNIP_API snip_status snip_end_step(snip *, const snip_adamw *);

SNIP_API snip_pass snip_current_pass(const snip *);            // kind of the pass under way, or about to begin
SNIP_API int64_t snip_step(const snip *);                      // steps ended
SNIP_API int snip_plans(const snip *);                         // plans solved so far
SNIP_API double snip_solve_seconds(const snip *);              // time of the last solve
SNIP_API int snip_layers(const snip *);                        // layers added
SNIP_API int snip_find_layer(const snip *, const char *name);  // its index, or -1
SNIP_API snip_status snip_layer(const snip *, int layer, snip_layer_info *);

// Share of the FLOPs of the linear layers' GEMMs that run which is planned in a format, 0 to 1.
SNIP_API double snip_share(const snip *, snip_format);

// |u|^2 of the optimizer's last update, summed over layers relative to their weights, at learning rate 1:
// U^2 = sum_j |u_j|^2 / |W_j|^2, with |W_j|^2 of the last measuring step; frozen layers are left out.
SNIP_API double snip_update_sq(const snip *, const snip_adamw *);

// d [out][in] = D, the slope of each weight's next update in its gradient at learning rate 1, from the optimizer's
// state and the constants that snip_end_step was last told.
SNIP_API snip_status snip_layer_sensitivity(snip *, int layer, float *d);

// One line on the last call of this session that returned an error, "" if none; valid until the next one.
SNIP_API const char *snip_message(const snip *);

// The layer that snip_message is about; -1: none.
SNIP_API int snip_failed_layer(const snip *);

// "step N: ..." on the last plan, kept plan, spike, drift or discarded measurement and why; "" before the first.
SNIP_API const char *snip_reason(const snip *);

// A table of blocks x kinds, one mark per GEMM.
SNIP_API snip_status snip_plan_print(const snip *, FILE *);

// The formats in force, a fallback's too, as text (version 1). The file is written aside, then renamed; a device, pipe
// or link is written as it is. POSIX: elsewhere rename() may refuse to replace a file.
SNIP_API snip_status snip_plan_save(snip *, const char *path);

// Refused whole unless every layer matches. Carriage returns and a byte-order mark, as editors add them, are ignored.
SNIP_API snip_status snip_plan_load(snip *, const char *path);

// Plan, counters and averages, of snip_state_size bytes (version 3; version 2 is read too). With the same batches a
// restored session goes on bit for bit. Refused within a step. Load after all layers have been added; desc, bindings,
// mode and snip_allow are not in it.
SNIP_API size_t snip_state_size(const snip *);
SNIP_API snip_status snip_state_save(const snip *, void *state);
SNIP_API snip_status snip_state_load(snip *, const void *state, size_t size);

#ifdef __cplusplus
}
#endif
#endif  // SNIP_H

// ================= END OF THE API. You need not read further to use the library. =====================
#if defined(SNIP_IMPLEMENTATION) && !defined(SNIP_IMPLEMENTATION_DONE)
#define SNIP_IMPLEMENTATION_DONE

#include <errno.h>
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#    include <sched.h>
#    include <sys/stat.h>
#endif
#ifndef SNIP_MALLOC
#    define SNIP_MALLOC(size) malloc(size)
#    define SNIP_FREE(ptr) free(ptr)
#endif
#ifndef SNIP_ILP_MALLOC
#    define SNIP_ILP_MALLOC(size) SNIP_MALLOC(size)
#    define SNIP_ILP_FREE(ptr) SNIP_FREE(ptr)
#endif
#include "snip_ilp.h"

#ifndef SNIP_PARALLEL_FOR
#    define SNIP_PARALLEL_FOR(fn, arg, n) snipi_parallel_for(fn, arg, n)

// GCC's OpenMP does not survive fork(): where the parent has used it before, the child's first parallel loop waits for
// ever. Such a child calls omp_set_num_threads(1) first, or the program defines SNIP_PARALLEL_FOR.
static void snipi_parallel_for(void (*fn)(void *, int64_t), void *arg, int64_t n) {
#    ifdef _OPENMP
#        pragma omp parallel for schedule(dynamic) if (n > 1)
#    endif
    for (int64_t i = 0; i < n; i++) fn(arg, i);
}
#endif
#ifndef SNIPI_WORTH
#    define SNIPI_WORTH 32768  // elements, some 20 us: less would not pay for waking other threads
#endif

// fn(arg, i) for every i in [0, n): in parallel, if they are about SNIPI_WORTH elements or more.
static void snipi_share(void (*fn)(void *, int64_t), void *arg, int64_t n, int64_t elements) {
    if (elements >= SNIPI_WORTH) {
        SNIP_PARALLEL_FOR(fn, arg, n);
        return;
    }
    for (int64_t i = 0; i < n; i++) fn(arg, i);
}

// Phases: no call of one begins before all calls of the one before it have returned.
typedef struct {
    void (*fn)(void *arg, int64_t i);
    void *arg;
    int64_t calls;  // in each turn
} snipi_phase;

#ifndef SNIPI_ATOMIC  // whether counters can be shared among threads
#    if defined(__GCC_ATOMIC_POINTER_LOCK_FREE) && __GCC_ATOMIC_POINTER_LOCK_FREE == 2
#        define SNIPI_ATOMIC 1  // GCC and Clang
#    else
#        define SNIPI_ATOMIC 0
#    endif
#endif
#if SNIPI_ATOMIC
#    if defined(__unix__) || defined(__APPLE__)
#        define snipi_yield() ((void)sched_yield())
#    else
#        define snipi_yield() ((void)0)
#    endif

enum { SNIPI_SPINS = 2000 };  // looks at a counter, some 2 us, before a waiting thread gives its core to others

typedef struct {
    const snipi_phase *phases;
    int64_t turn_calls;    // of all phases in one turn
    intptr_t begun, done;  // calls, of all turns
} snipi_schedule;

// Calls are taken in their order, whatever `index` is, so that those which this one waits for are always under way.
static void snipi_schedule_call(void *arg, int64_t index) {
    snipi_schedule *schedule = (snipi_schedule *)arg;
    const snipi_phase *phase = schedule->phases;
    const int64_t call = __atomic_fetch_add(&schedule->begun, 1, __ATOMIC_RELAXED);
    const int64_t turn = call / schedule->turn_calls;
    int64_t before = turn * schedule->turn_calls;  // calls before the phase's first
    (void)index;
    for (; call - before >= phase->calls; phase++) before += phase->calls;
    for (int spins = 0; __atomic_load_n(&schedule->done, __ATOMIC_ACQUIRE) < before; spins++)
        if (spins >= SNIPI_SPINS) snipi_yield();
    phase->fn(phase->arg, turn * phase->calls + call - before);
    __atomic_fetch_add(&schedule->done, 1, __ATOMIC_RELEASE);
}
#endif

typedef struct {
    const snipi_phase *phase;
    int64_t first;
} snipi_phase_part;

static void snipi_phase_call(void *arg, int64_t i) {
    const snipi_phase_part *part = (const snipi_phase_part *)arg;
    part->phase->fn(part->phase->arg, part->first + i);
}

// All phases in order, `turns` times: fn(arg, i) for every i in [0, turns * calls). One parallel loop where counters
// can be shared. The end of a loop waits for every thread of the pool, even for one that came too late to do anything:
// on a busy machine, for milliseconds.
static void snipi_share_phases(const snipi_phase *phases, int count, int64_t turns, int64_t elements) {
#if SNIPI_ATOMIC
    if (elements >= SNIPI_WORTH) {
        snipi_schedule schedule = { phases, 0, 0, 0 };
        for (int p = 0; p < count; p++) schedule.turn_calls += phases[p].calls;
        SNIP_PARALLEL_FOR(snipi_schedule_call, &schedule, turns * schedule.turn_calls);
        return;
    }
#endif
    for (int64_t turn = 0; turn < turns; turn++)
        for (int p = 0; p < count; p++) {
            snipi_phase_part part = { &phases[p], turn * phases[p].calls };
            snipi_share(snipi_phase_call, &part, phases[p].calls, elements);
        }
}

#if defined(__GNUC__) || defined(__clang__)
#    define SNIPI_INLINE static inline __attribute__((always_inline))
#else
#    define SNIPI_INLINE static inline
#endif
#if defined(__GNUC__) || defined(__clang__)
#    define SNIPI_NOINLINE __attribute__((noinline))
#else
#    define SNIPI_NOINLINE
#endif
#if defined(__CUDACC__)  // functions that snip_cuda.cuh's kernels share
#    define SNIPI_HD __host__ __device__
#else
#    define SNIPI_HD
#endif
#if defined(__clang__)
#    define SNIPI_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#    define SNIPI_UNROLL _Pragma("GCC unroll 16")
#else
#    define SNIPI_UNROLL
#endif
#if !defined(SNIP_NO_SIMD) && defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#    define SNIPI_X86 1
#    include <immintrin.h>
#    if !defined(SNIP_NO_AMX) && (defined(__clang__) ? __clang_major__ >= 13 : __GNUC__ >= 12)
#        define SNIPI_X86_LATE 1  // AVX-VNNI, AVX512-BF16, AMX
#    endif
#endif
#if !defined(SNIP_NO_SIMD) && defined(__aarch64__) && defined(__ARM_NEON) && \
    (defined(__GNUC__) || defined(__clang__)) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#    define SNIPI_NEON 1
#    include <arm_neon.h>
#    ifdef __linux__
#        include <sys/auxv.h>
#    endif
#endif

// Between a product's store and its use: keeps the compiler from fusing the two into one multiply-add.
#if defined(__GNUC__) || defined(__clang__)
#    define SNIPI_ROUNDED(array) __asm__ volatile("" : : "r"(array) : "memory")
#else
#    define SNIPI_ROUNDED(array) ((void)(array))
#endif
// The compiler cannot see where this double comes from. Device code divides doubles as IEEE says under any flags.
#if defined(__CUDA_ARCH__)
#    define SNIPI_HIDDEN(x) ((void)0)
#elif defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#    define SNIPI_HIDDEN(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#    define SNIPI_HIDDEN(x) __asm__("" : "+w"(x))
#else
#    define SNIPI_HIDDEN(x)               \
        do {                              \
            volatile double hidden = (x); \
            (x) = hidden;                 \
        } while (0)
#endif
#ifdef SNIPI_X86
#    define snipi_stream_end() _mm_sfence()  // orders streaming stores before whatever tells another thread of them
#else
#    define snipi_stream_end() ((void)0)
#endif

// A reduction's partial results are kept per chunk and added in order, so that the number of threads
// cannot show in a sum. What is done element by element is shared out in as many chunks: chunk c of n is [n c / 64, n
// (c + 1) / 64).
enum { SNIPI_CHUNKS = 64 };

typedef struct {
    const void *of;
    const float *x;
    int64_t n;
    double part[SNIPI_CHUNKS];
} snipi_sum;

static double snipi_sum_up(snipi_sum *sum, void (*part)(void *, int64_t)) {
    double total = 0;
    int c;
    snipi_share(part, sum, SNIPI_CHUNKS, sum->n);
    for (c = 0; c < SNIPI_CHUNKS; c++) total += sum->part[c];
    return total;
}

SNIPI_HD static int64_t snipi_min(int64_t a, int64_t b) { return a < b ? a : b; }

SNIPI_HD static int64_t snipi_max(int64_t a, int64_t b) { return a > b ? a : b; }

SNIPI_HD static int64_t snipi_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

static int64_t snipi_round_up(int64_t a, int64_t b) { return snipi_ceil_div(a, b) * b; }

// rows * cols * 4 must fit in ptrdiff_t, and ld reach over a row.
static int snipi_shape_ok(int64_t rows, int64_t cols, int64_t ld) {
    return rows >= 0 && cols >= 0 && ld >= cols && (cols == 0 || rows <= PTRDIFF_MAX / 8 / snipi_max(1, ld));
}

SNIPI_HD SNIPI_INLINE uint32_t snipi_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

SNIPI_HD SNIPI_INLINE float snipi_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// -Ofast folds isnan() to 0, so finiteness is read off the bits.
SNIPI_HD SNIPI_INLINE int snipi_nonfinite(float x) { return (snipi_bits(x) & 0x7F800000u) == 0x7F800000u; }

SNIPI_HD static int snipi_nonfinite_f64(double x) {
    uint64_t u;
    memcpy(&u, &x, 8);
    return (u & 0x7FF0000000000000u) == 0x7FF0000000000000u;
}

SNIP_API const char *snip_status_text(snip_status status) {
    switch (status) {
#define SNIP_X(code, text) \
    case code: return text;
        SNIP_STATUS_LIST(SNIP_X)
#undef SNIP_X
        case SNIP_STATUS_COUNT: break;
    }
    return "unknown status";
}

// >>codec-impl -------------------------------------------------------------------------------------
// An element format is a binary float of `mantissa` bits with subnormals below 2^(1 - bias).
typedef struct {
    int mantissa, bias;
    int sign;          // the sign's bit
    uint32_t largest;  // code of the largest magnitude
    uint32_t nan;      // code of NaN, or of the largest magnitude where there is none
    float max;         // value of the largest
    int emax;          // its exponent
} snipi_element;

SNIPI_HD SNIPI_INLINE snipi_element snipi_element_of(snip_format format) {
    snipi_element e4m3 = { 3, 7, 7, 0x7E, 0x7F, 448.0f, 8 }, e5m2 = { 2, 15, 7, 0x7B, 0x7F, 57344.0f, 15 };
    snipi_element e2m1 = { 1, 1, 3, 7, 7, 6.0f, 2 }, e2m3 = { 3, 1, 5, 31, 31, 7.5f, 2 };
    snipi_element e3m2 = { 2, 3, 5, 31, 31, 28.0f, 4 }, none = { 0, 0, 0, 0, 0, 0.0f, 0 };
    switch (format) {
        case SNIP_E4M3:
        case SNIP_UE4M3: return e4m3;
        case SNIP_E5M2: return e5m2;
        case SNIP_E2M1: return e2m1;
        case SNIP_E2M3: return e2m3;
        case SNIP_E3M2: return e3m2;
        case SNIP_F32:
        case SNIP_BF16:
        case SNIP_UE8M0: break;
    }
    return none;
}

// Magnitude code before saturation of a finite |x| given as bits. Above the subnormals the exponent and
// mantissa fields are rounded as one integer; below, adding 2^(24 - bias - mantissa) makes the float
// adder round at the subnormal step. The sum's operand comes from bits, so it cannot fuse with a product.
SNIPI_HD SNIPI_INLINE uint32_t snipi_encode_nearest(uint32_t a, int mantissa, int bias) {
    int shift = 23 - mantissa;
    uint32_t magic = (uint32_t)(127 + 24 - bias - mantissa) << 23;
    uint32_t tiny = snipi_bits(snipi_float(a) + snipi_float(magic)) - magic;
    uint32_t big = ((a + ((1u << (shift - 1)) - 1u) + ((a >> shift) & 1u)) >> shift) -
                   ((uint32_t)(127 - bias) << mantissa);
    return a < (uint32_t)(128 - bias) << 23 ? tiny : big;
}

// Stochastic: add uniform bits below the last kept place, then cut. Subnormals first become fixed-point
// numbers with the same place values; what lies below 2^-23 of the smallest normal number is dropped.
SNIPI_HD SNIPI_INLINE uint32_t snipi_encode_stochastic(uint32_t a, uint32_t random, int mantissa, int bias) {
    int shift = 23 - mantissa;
    uint32_t smallest = (uint32_t)(128 - bias) << 23, r = random >> (32 - shift);
    float fixed = snipi_float(a < smallest ? a : 0) * snipi_float((uint32_t)(127 + 22 + bias) << 23);
    uint32_t tiny = ((uint32_t)(int32_t)fixed + r) >> shift;
    uint32_t big = ((a + r) >> shift) - ((uint32_t)(127 - bias) << mantissa);
    return a < smallest ? tiny : big;
}

// As snipi_encode_nearest, in integers alone: the host may have set another rounding mode.
SNIPI_HD static uint32_t snipi_encode_integer(uint32_t a, int mantissa, int bias) {
    const int exponent = (int)(a >> 23), last = 128 - bias - mantissa;  // exponent of the code's last place
    uint32_t significand = a, shift = (uint32_t)(23 - mantissa);
    if (exponent < 128 - bias) {
        if (exponent < last - 1) return 0;  // less than half of it
        significand = (a & 0x007FFFFFu) | 0x00800000u;
        shift = (uint32_t)(23 + last - exponent);
    }
    significand = (significand + (1u << (shift - 1)) - 1u + (significand >> shift & 1u)) >> shift;
    return exponent < 128 - bias ? significand : significand - ((uint32_t)(127 - bias) << mantissa);
}

// beyond: what every code above the largest becomes; 0: the largest.
SNIPI_HD static uint8_t snipi_encode(float x, snip_format format, uint32_t beyond) {
    snipi_element e = snipi_element_of(format);
    uint32_t u = snipi_bits(x), a = u & 0x7FFFFFFFu, code;
    if (a > 0x7F800000u) return (uint8_t)e.nan;
    code = snipi_encode_integer(a, e.mantissa, e.bias);
    if (code > e.largest) code = beyond ? beyond : e.largest;
    return (uint8_t)(code | (u >> 31) << e.sign);
}

SNIPI_HD static float snipi_decode(uint32_t code, snip_format format) {
    snipi_element e = snipi_element_of(format);
    uint32_t a = code & ((1u << e.sign) - 1u), negative = code >> e.sign & 1u, bits, step;
    if (e.sign == 7 && a > e.largest)
        bits = format == SNIP_E5M2 && a == 0x7C ? 0x7F800000u : 0x7FC00000u;
    else if (a >> e.mantissa)
        bits = (a + ((uint32_t)(127 - e.bias) << e.mantissa)) << (23 - e.mantissa);
    else {
        step = (uint32_t)(128 - e.bias - e.mantissa) << 23;
        bits = snipi_bits((float)(int32_t)a * snipi_float(step));
    }
    return snipi_float(bits | negative << 31);
}

SNIP_API uint8_t snip_e4m3_from_f32(float x) { return snipi_encode(x, SNIP_E4M3, 0); }

SNIP_API uint8_t snip_e5m2_from_f32(float x) { return snipi_encode(x, SNIP_E5M2, 0); }

SNIP_API uint8_t snip_e2m1_from_f32(float x) { return snipi_encode(x, SNIP_E2M1, 0); }

SNIP_API uint8_t snip_e2m3_from_f32(float x) { return snipi_encode(x, SNIP_E2M3, 0); }

SNIP_API uint8_t snip_e3m2_from_f32(float x) { return snipi_encode(x, SNIP_E3M2, 0); }

SNIP_API uint8_t snip_e4m3_from_f32_nosat(float x) { return snipi_encode(x, SNIP_E4M3, 0x7F); }

SNIP_API uint8_t snip_e5m2_from_f32_nosat(float x) { return snipi_encode(x, SNIP_E5M2, 0x7C); }

SNIP_API float snip_e4m3_to_f32(uint8_t c) { return snipi_decode(c, SNIP_E4M3); }

SNIP_API float snip_e5m2_to_f32(uint8_t c) { return snipi_decode(c, SNIP_E5M2); }

SNIP_API float snip_e2m1_to_f32(uint8_t c) { return snipi_decode(c & 15u, SNIP_E2M1); }

SNIP_API float snip_e2m3_to_f32(uint8_t c) { return snipi_decode(c & 63u, SNIP_E2M3); }

SNIP_API float snip_e3m2_to_f32(uint8_t c) { return snipi_decode(c & 63u, SNIP_E3M2); }

SNIPI_HD static uint8_t snipi_ue4m3_encode(float x) {
    uint8_t code = snipi_encode(x, SNIP_E4M3, 0);
    return (code & 0x80) ? 0 : code;
}

SNIP_API uint8_t snip_ue4m3_from_f32(float x) { return snipi_ue4m3_encode(x); }

SNIP_API float snip_ue4m3_to_f32(uint8_t c) { return snipi_decode(c & 127u, SNIP_E4M3); }

// Rounds up (cvt.rp): anything above a power of two takes the next; 2^-127 is a float32 subnormal.
SNIP_API uint8_t snip_ue8m0_from_f32(float x) {
    uint32_t a = snipi_bits(x) & 0x7FFFFFFFu, e = a >> 23;
    if (a > 0x7F800000u) return 0xFF;
    if (e == 0) return a > 0x00400000u;
    e += (a & 0x007FFFFFu) != 0;
    return (uint8_t)(e < 0xFE ? e : 0xFE);
}

SNIP_API uint8_t snip_ue8m0_from_f32_floor(float x) {
    uint32_t a = snipi_bits(x) & 0x7FFFFFFFu, e = a >> 23;
    return (uint8_t)(a > 0x7F800000u ? 0xFF : e < 0xFE ? e : 0xFE);
}

SNIPI_HD static float snipi_ue8m0_decode(uint8_t c) {
    return snipi_float(c == 0xFF ? 0x7FC00000u : c == 0 ? 0x00400000u : (uint32_t)c << 23);
}

SNIP_API float snip_ue8m0_to_f32(uint8_t c) { return snipi_ue8m0_decode(c); }

SNIPI_HD SNIPI_INLINE uint32_t snipi_bf16_round(uint32_t u) {
    uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
    return (u & 0x7FFFFFFFu) > 0x7F800000u ? u >> 16 | 0x40u : rounded;
}

SNIP_API uint16_t snip_bf16_from_f32(float x) { return (uint16_t)snipi_bf16_round(snipi_bits(x)); }

SNIP_API float snip_bf16_to_f32(uint16_t c) { return snipi_float((uint32_t)c << 16); }

SNIP_API const char *snip_format_name(snip_format format) {
    switch (format) {
        case SNIP_F32: return "f32";
        case SNIP_BF16: return "bf16";
        case SNIP_E4M3: return "fp8";
        case SNIP_E5M2: return "e5m2";
        case SNIP_E2M1: return "fp4";
        case SNIP_E2M3: return "e2m3";
        case SNIP_E3M2: return "e3m2";
        case SNIP_UE8M0: return "ue8m0";
        case SNIP_UE4M3: return "ue4m3";
    }
    return "?";
}

SNIP_API float snip_format_max(snip_format format) { return snipi_element_of(format).max; }

SNIP_API int snip_format_bits(snip_format format) {
    switch (format) {
        case SNIP_F32: return 32;
        case SNIP_BF16: return 16;
        case SNIP_E2M1: return 4;
        case SNIP_E4M3:
        case SNIP_E5M2:
        case SNIP_E2M3:
        case SNIP_E3M2:
        case SNIP_UE8M0:
        case SNIP_UE4M3: return 8;
    }
    return 0;
}

// >>random-impl ------------------------------------------------------------------------------------
SNIPI_HD static void snipi_philox(snip_rng_key key, uint64_t index, uint32_t out[4]) {
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = key.step, c3 = key.tensor;
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

SNIP_API void snip_philox(snip_rng_key key, uint64_t index, uint32_t out[4]) { snipi_philox(key, index, out); }

// Element i's sign is bit i % 32 of word i / 32 % 4 of counter i / 128.
enum { SNIPI_SIGNS = 128 };

SNIPI_INLINE float snipi_signed(float x, const uint32_t signs[4], int j) {  // -x where bit j is set
    return snipi_float(snipi_bits(x) ^ (signs[j >> 5] >> (j & 31) & 1u) << 31);
}

static void snipi_flip_scalar(const uint32_t signs[4], float x[SNIPI_SIGNS]) {
    int j;
    for (j = 0; j < SNIPI_SIGNS; j++) x[j] = snipi_signed(x[j], signs, j);
}

typedef void (*snipi_flip)(const uint32_t signs[4], float x[SNIPI_SIGNS]);
static snipi_flip snipi_flip_of(snip_isa isa);
// Adam's step: a m / (sqrt(b v) + eps) where v > 0, else 0; m may be NULL: 1.
typedef void (*snipi_adam)(const float *m, const float *v, float a, float b, float eps, int64_t n, float *out);

SNIPI_HD SNIPI_INLINE float snipi_adam_at(float top, float v, float b, float eps) {
    return v > 0 ? top / (sqrtf(v * b) + eps) : 0.0f;
}

static void snipi_adam_scalar(const float *m, const float *v, float a, float b, float eps, int64_t n, float *out) {
    int64_t i;
    for (i = 0; i < n; i++) out[i] = snipi_adam_at(m ? m[i] * a : a, v[i], b, eps);
}

static snipi_adam snipi_adam_of(snip_isa isa);

enum {
    SNIPI_GROUP = 16,
    SNIPI_GROUP_SIGNS = SNIPI_GROUP * SNIPI_SIGNS
};  // blocks whose signs are made at once: what snipi_vector.philox fills

static void snipi_group_signs(snip_rng_key key, uint64_t first, uint32_t words[4 * SNIPI_GROUP]);

// out = factor * x (factor where x is NULL) times a block's signs for its elements [j0, j1), zeros elsewhere. x[0] is
// element j0.
SNIPI_INLINE void snipi_sign_block(snipi_flip flip, const uint32_t signs[4], const float *x, float factor, int j0,
                                   int j1, float out[SNIPI_SIGNS]) {
    int j;
    if (x && j0 == 0 && j1 == SNIPI_SIGNS)
        for (j = 0; j < SNIPI_SIGNS; j++) out[j] = factor * x[j];
    else
        for (j = 0; j < SNIPI_SIGNS; j++) out[j] = j >= j0 && j < j1 ? (x ? factor * x[j - j0] : factor) : 0.0f;
    flip(signs, out);
}

typedef struct {
    float *out;
    const float *x, *shape;
    int64_t n;
    float scale;
    snip_rng_key key;
    snipi_flip flip;
} snipi_noise;

static void snipi_noise_add_chunk(void *arg, int64_t c) {
    const snipi_noise *job = (const snipi_noise *)arg;
    int64_t g, i0, groups = snipi_ceil_div(job->n, SNIPI_GROUP_SIGNS), end = groups * (c + 1) / SNIPI_CHUNKS;
    for (g = groups * c / SNIPI_CHUNKS; g < end; g++) {
        uint32_t words[4 * SNIPI_GROUP];
        float noise[SNIPI_SIGNS];
        int b, j;
        snipi_group_signs(job->key, (uint64_t)g * SNIPI_GROUP, words);
        for (b = 0, i0 = g * SNIPI_GROUP_SIGNS; b < SNIPI_GROUP && i0 < job->n; b++, i0 += SNIPI_SIGNS) {
            int m = (int)snipi_min(SNIPI_SIGNS, job->n - i0);
            snipi_sign_block(job->flip, words + 4 * b, job->shape ? job->shape + i0 : NULL, job->scale, 0, m, noise);
            for (j = 0; j < m; j++) job->out[i0 + j] = job->x[i0 + j] + noise[j];
        }
    }
}

static snipi_noise snipi_noise_of(float *out, const float *x, int64_t n, float scale, const float *shape,
                                  snip_rng_key key) {
    snipi_noise job;
    job.out = out;
    job.x = x;
    job.shape = shape;
    job.n = n;
    job.scale = scale;
    job.key = key;
    job.flip = snipi_flip_of(SNIP_ISA_BEST);
    return job;
}

SNIP_API snip_status snip_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                    snip_rng_key key) {
    snipi_noise job = snipi_noise_of(out, x, n, scale, shape, key);
    if (n < 0 || (n > 0 && (!out || !x))) return SNIP_BAD_ARGUMENT;
    snipi_share(snipi_noise_add_chunk, &job, SNIPI_CHUNKS, n);
    return SNIP_OK;
}

static void snipi_noise_dot_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const snipi_noise *job = (const snipi_noise *)sum->of;
    int64_t g, i0, groups = snipi_ceil_div(job->n, SNIPI_GROUP_SIGNS), end = groups * (c + 1) / SNIPI_CHUNKS;
    double part = 0;
    for (g = groups * c / SNIPI_CHUNKS; g < end; g++) {
        uint32_t words[4 * SNIPI_GROUP];
        float terms[SNIPI_SIGNS], lanes[16];
        int b, i, j;
        snipi_group_signs(job->key, (uint64_t)g * SNIPI_GROUP, words);
        for (b = 0, i0 = g * SNIPI_GROUP_SIGNS; b < SNIPI_GROUP && i0 < job->n; b++, i0 += SNIPI_SIGNS) {
            int m = (int)snipi_min(SNIPI_SIGNS, job->n - i0);
            snipi_sign_block(job->flip, words + 4 * b, job->x + i0, 1.0f, 0, m, terms);
            for (j = 0; job->out && j < m; j++) job->out[i0 + j] += job->x[i0 + j];
            memcpy(lanes, terms, sizeof lanes);
            for (i = 1; i < SNIPI_SIGNS / 16; i++)
                for (j = 0; j < 16; j++) lanes[j] += terms[16 * i + j];
            for (j = 0; j < 16; j++) part += (double)lanes[j];
        }
    }
    sum->part[c] = part;
}

// <xi, x>; x is added to `to` as well, which may be NULL.
static double snipi_noise_dot(const float *x, int64_t n, snip_rng_key key, float *to) {
    snipi_noise job = snipi_noise_of(to, x, n, 1, NULL, key);
    snipi_sum sum;
    sum.of = &job;
    sum.n = n;
    return snipi_sum_up(&sum, snipi_noise_dot_chunk);
}

SNIP_API snip_status snip_noise_dot(const float *x, int64_t n, snip_rng_key key, double *dot) {
    if (n < 0 || !dot || (n > 0 && !x)) return SNIP_BAD_ARGUMENT;
    *dot = snipi_noise_dot(x, n, key, NULL);
    return SNIP_OK;
}

// a * b + c with the product rounded, whatever the compiler may fuse.
SNIPI_HD SNIPI_INLINE double snipi_mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
    return __dadd_rn(__dmul_rn(a, b), c);
#else
    double p = a * b;
    SNIPI_HIDDEN(p);
    return p + c;
#endif
}

// -2 log((w + 1/2) / 2^32): the argument is m * 2^e, m near 1; log m = 2 atanh((m - 1) / (m + 1)).
SNIPI_HD static double snipi_minus_2_log(uint32_t w) {
    const double terms[] = { 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0 };
    double m = (double)w + 0.5, t, t2, sum = 1.0 / 15, above;
    uint64_t u;
    int e, i;
    memcpy(&u, &m, 8);
    e = (int)(u >> 52) - 1023 - 32;
    u = (u & 0xFFFFFFFFFFFFFu) | (uint64_t)1023 << 52;
    memcpy(&m, &u, 8);
    if (m >= 1.4142135623730951) {
        m *= 0.5;
        e++;
    }
    above = m + 1;
    SNIPI_HIDDEN(above);
    t = (m - 1) / above;
    t2 = t * t;
    SNIPI_HIDDEN(t2);
    SNIPI_UNROLL
    for (i = 0; i < 7; i++) sum = snipi_mul_add(sum, t2, terms[i]);
    t *= -4 * sum;
    SNIPI_HIDDEN(t);
    return snipi_mul_add(-2 * 0.69314718055994531, e, t);
}

// cos and sin of 2 pi w / 2^32: Taylor series in the nearest eighth of a turn.
SNIPI_HD static void snipi_turn(uint32_t w, double *cosine, double *sine) {
    const double c[] = { -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24, -1.0 / 2, 1.0 };
    const double s[] = { -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6, 1.0 };
    uint32_t quarter = (w + 0x20000000u) >> 30;  // 0 .. 3; w 2^29 short of a turn is quarter 0 again
    double r = (double)(int32_t)(w - (quarter << 30)) * 1.4629180792671596e-9, r2 = r * r, x = 1.0 / 479001600,
           y = 1.0 / 6227020800.0;
    int i;
    SNIPI_HIDDEN(r2);
    SNIPI_UNROLL
    for (i = 0; i < 6; i++) {
        x = snipi_mul_add(x, r2, c[i]);
        y = snipi_mul_add(y, r2, s[i]);
    }
    y *= r;
    *cosine = quarter == 0 ? x : quarter == 1 ? -y : quarter == 2 ? -x : y;
    *sine = quarter == 0 ? y : quarter == 1 ? x : quarter == 2 ? -y : -x;
}

SNIPI_HD static void snipi_gauss(snip_rng_key key, uint64_t index, float out[4]) {  // Box and Muller
    uint32_t w[4];
    int i;
    snipi_philox(key, index, w);
    for (i = 0; i < 4; i += 2) {
        double radius = sqrt(snipi_minus_2_log(w[i])), x, y;
        snipi_turn(w[i + 1], &x, &y);
        out[i] = (float)(radius * x);
        out[i + 1] = (float)(radius * y);
    }
}

SNIP_API void snip_gauss(snip_rng_key key, uint64_t index, float out[4]) { snipi_gauss(key, index, out); }

static void snipi_gauss_add_chunk(void *arg, int64_t c) {
    const snipi_noise *job = (const snipi_noise *)arg;
    int64_t b, blocks = snipi_ceil_div(job->n, 4), end = blocks * (c + 1) / SNIPI_CHUNKS;
    for (b = blocks * c / SNIPI_CHUNKS; b < end; b++) {
        float noise[4];
        int j, m = (int)snipi_min(4, job->n - 4 * b);
        snip_gauss(job->key, (uint64_t)b, noise);
        for (j = 0; j < m; j++) noise[j] *= job->shape ? job->scale * job->shape[4 * b + j] : job->scale;
        SNIPI_ROUNDED(noise);
        for (j = 0; j < m; j++) job->out[4 * b + j] = job->x[4 * b + j] + noise[j];
    }
}

SNIP_API snip_status snip_gauss_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                    snip_rng_key key) {
    snipi_noise job = snipi_noise_of(out, x, n, scale, shape, key);
    if (n < 0 || (n > 0 && (!out || !x))) return SNIP_BAD_ARGUMENT;
    snipi_share(snipi_gauss_add_chunk, &job, SNIPI_CHUNKS, n);
    return SNIP_OK;
}

static void snipi_gauss_dot_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const snipi_noise *job = (const snipi_noise *)sum->of;
    int64_t b, blocks = snipi_ceil_div(job->n, 4), end = blocks * (c + 1) / SNIPI_CHUNKS;
    double part = 0;
    for (b = blocks * c / SNIPI_CHUNKS; b < end; b++) {
        float noise[4];
        int j, m = (int)snipi_min(4, job->n - 4 * b);
        snip_gauss(job->key, (uint64_t)b, noise);
        for (j = 0; j < m; j++) part += (double)job->x[4 * b + j] * (double)noise[j];
    }
    sum->part[c] = part;
}

SNIP_API snip_status snip_gauss_dot(const float *x, int64_t n, snip_rng_key key, double *dot) {
    snipi_noise job = snipi_noise_of(NULL, x, n, 1, NULL, key);
    snipi_sum sum;
    if (n < 0 || !dot || (n > 0 && !x)) return SNIP_BAD_ARGUMENT;
    sum.of = &job;
    sum.n = n;
    *dot = snipi_sum_up(&sum, snipi_gauss_dot_chunk);
    return SNIP_OK;
}

typedef struct {
    float *x;
    int64_t rows, cols, ld;
    int block;
    float scale;
    snip_rng_key key;
} snipi_hadamard;

static void snipi_hadamard_chunk(void *arg, int64_t chunk) {
    const snipi_hadamard *job = (const snipi_hadamard *)arg;
    const int block = job->block;
    int64_t r, c, end = job->rows * (chunk + 1) / SNIPI_CHUNKS;
    for (r = job->rows * chunk / SNIPI_CHUNKS; r < end; r++) {
        uint32_t signs[4] = { 0, 0, 0, 0 };
        for (c = 0; c < job->cols; c += block) {
            float v[2][SNIPI_SIGNS];
            float *from = v[0], *to = v[1], *row = job->x + r * job->ld + c, *swap;
            int first = (int)(c % SNIPI_SIGNS), half = block / 2, stage, j;
            if (first == 0) snip_philox(job->key, (uint64_t)(c / SNIPI_SIGNS), signs);
            for (j = 0; j < block; j++) from[j] = snipi_signed(row[j], signs, first + j);
            for (stage = 1; stage < block; stage *= 2) {  // pairs half a block apart go side by side: H's rows in order
                for (j = 0; j < half; j++) {
                    to[2 * j] = from[j] + from[j + half];
                    to[2 * j + 1] = from[j] - from[j + half];
                }
                swap = from;
                from = to;
                to = swap;
            }
            for (j = 0; j < block; j++) row[j] = snipi_signed(from[j] * job->scale, signs, first + j);
        }
    }
}

SNIP_API snip_status snip_hadamard(float *x, int64_t rows, int64_t cols, int64_t ld, int block, snip_rng_key key) {
    snipi_hadamard job;
    if (block != 16 && block != 32 && block != 64 && block != 128) return SNIP_BAD_ARGUMENT;
    if (!snipi_shape_ok(rows, cols, ld) || cols % block || (rows > 0 && cols > 0 && !x)) return SNIP_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return SNIP_OK;
    job.x = x;
    job.rows = rows;
    job.cols = cols;
    job.ld = ld;
    job.block = block;
    job.key = key;
    job.scale = block == 16 ? 0.25f : block == 32 ? 0.17677669529663689f : block == 64 ? 0.125f : 0.088388347648318441f;
    snipi_share(snipi_hadamard_chunk, &job, SNIPI_CHUNKS, rows * cols);
    return SNIP_OK;
}

// >>quantize-impl ----------------------------------------------------------------------------------
// One engine serves quantize, its transpose, both at once and fake quantize. It sees a logical [rows][cols] matrix,
// whose source may be BF16 or lie transposed. Tiles are taken in batches: first the largest magnitude of each tile,
// then the scales, which are stored, then the codes, so that one tile's divisions do not hold up the next tile's codes.
//
// Codes are made in runs of at most SNIPI_RUN elements of a row of a tile. What a run does is written down in
// snipi_run_scalar; >>simd has the same, bit for bit, for finite runs of ordinary size. A strip is many runs, side by
// side and one below the other, for instruction sets that gain by it.
//
// Statistics are the same bits for every instruction set and number of threads, because their order is specified: sums
// of a run are taken in units of its scale, in float, element i in lane i % 16. Lanes i and i + 8 are then added in
// double and times scale^2 to lane i of the chunk's tally. Lanes are added up in order, chunk after chunk.
enum {
    SNIPI_RUN = 128,  // elements: the default tile's width
    SNIPI_LANES = 8   // doubles in which a chunk sums: two vectors of four
};

// How a matrix is walked. What lies in sequence here are rows of the matrix; a transposed source has them a column
// apart and is read through panels, each a few rows in sequence.
enum {
    SNIPI_PANEL_LINE = 16,          // floats of a cache line
    SNIPI_PANEL_ROWS = 16,          // a cache line of each row of the source
    SNIPI_PANEL_LD = 128 + 16,      // floats from row to row: 576 bytes, so that rows share no sets of the caches
    SNIPI_ORDER_ROWS = 64,          // rows of a transposed source that are summed before the next column of tiles is
    SNIPI_STRIP = 2048,             // elements of a batch that is a strip: 8 KiB, which stay in the nearest cache
    SNIPI_BATCH_TILES = 2048 / 16,  // of a batch, at most: as many as the narrowest tiles of a strip
    SNIPI_BATCH_ELEMENTS = 4096,    // of a batch that is none: 16 KiB, half of the nearest cache
    SNIPI_BATCH = 16,               // tiles of a batch that is none: more hide no more of the divisions
    SNIPI_STRIP_ROWS = 8,      // of a block to a strip: rows may share sets of the nearest cache, of 8 ways or more
    SNIPI_BAND = 2 * 128,      // rows that blocks go down before they go on to the right
    SNIPI_AHEAD_STRIP = 8192,  // bytes from a long strip to what is fetched meanwhile: the next strip
    SNIPI_STREAM = 1 << 23     // elements from which codes and values go past the caches: 32 MiB of floats
};

// Magnitudes, as bits of floats, between which sums in units of the scale neither overflow nor lose digits.
enum {
    SNIPI_UNITS_LEAST = (127 - 64) << 23,     // 2^-64: below, x * (1 / scale) would lose subnormal x
    SNIPI_UNSCALED_LEAST = (127 - 40) << 23,  // 2^-40: below, squares of elements without a scale lose digits,
    SNIPI_UNSCALED_MOST = (127 + 40) << 23,   // 2^40: above, they may overflow
    SNIPI_BF16_BEYOND = 0x7F7F8000            // the least that rounds to infinity in BF16
};

// Sums of a chunk; nonfinite and saturated as in snip_quant_stats.
typedef struct {
    double sum_sq[SNIPI_LANES], err_sq[SNIPI_LANES], dot[SNIPI_LANES];
    uint32_t amax;  // bits of the largest finite magnitude
    int64_t nonfinite, saturated;
} snipi_tally;

// A run. What all runs of a matrix have in common stands once, in snipi_matrix.run.
typedef struct {
    snip_format format;
    snipi_element e;
    const float *lut;  // [256], the value of each code

    // What >>simd derives from the format: bits of floats, and shifts.
    struct {
        int32_t least;         // smallest normal number
        int32_t cap;           // to which magnitudes are cut before they are rounded
        int32_t beyond;        // largest that still rounds to the format's largest
        int32_t magic;         // with the exponent: the power of two that rounds at the last place when it is added
        int32_t unit;          // 2^mantissa, as a step of exponents
        int32_t shift;         // from a float's mantissa to a code's
        int32_t sign_shift;    // from a float's sign to a code's
        int32_t sign;          // the code's sign
        int32_t random_shift;  // from a random word to the bits below the last place
        int32_t power[32];     // that power of two, by the exponent's lower five bits
    } k;

    const float *x;
    const float *weight;  // or NULL
    int n;
    float scale, inverse;
    int low;                 // x is taken as x * 2^64, the inverse as 2^-64 of itself
    int exact;               // sums in double, of x itself
    int overflows;           // values of the largest codes are infinite, and count as saturated
    const uint32_t *random;  // a word per element, or NULL: to nearest
    uint8_t *codes;          // or NULL
    int packed;              // codes: two to a byte
    int stream;              // codes and values go past the caches, where alignment allows
    float *values;           // or NULL
    snipi_tally *tally;
    int want_sums, stochastic;
} snipi_run;

// A strip: `pieces` rows of `length` elements (a multiple of 64). Every `width` of them (16, 32, 64 or 128; the last of
// a row may be 64) are a run; runs have a scale each, or all of them one.
typedef struct {
    const float *x;       // [pieces][stride]
    const float *weight;  // [pieces][stride] or NULL
    int64_t stride, length;
    int pieces;
    int width, log2_width;
    int runs;                      // to a piece, of a scale each; 0: all have one scale
    int capped;                    // some may lie beyond the largest
    const float *scale, *inverse;  // [pieces][runs to a piece], or one
    uint8_t *codes;                // or NULL
    float *values;                 // or NULL
    int64_t code_stride, value_stride;
    snipi_tally *tally;
    const uint32_t *random;            // [pieces][length], a word per element
    const char *ahead;                 // what is read next: `pieces` rows of `length` elements
    int64_t ahead_size, ahead_stride;  // bytes of an element, from row to row
    int fetched;                       // quarters of it that are fetched with the peaks
} snipi_strip;

// Of an instruction set, from >>simd. The last six may be NULL; run then does the work:
//   peaks    largest magnitude of each run, as bits, in amax[runs], rounded up to a multiple of 16; returns the largest
//   scales   of `tiles` tiles, as snipi_scale_of has them, and whether some may lie beyond the format's largest;
//            returns 0 where a magnitude is zero, tiny, huge or not finite
//   strip    codes and values of a strip of finite elements
//   words    random words [rows][cols], cols a multiple of 64: first counters `step` apart, with one upper half
//   turn     16 columns of x[rows][ld] as rows of a panel, rows a multiple of 16
//   largest  magnitude of x[rows][ld], as bits, NaN and infinity included
typedef struct {
    uint32_t (*amax)(const float *x, int n, int64_t *nonfinite);              // bits of the largest finite magnitude
    void (*philox)(snip_rng_key, uint64_t first, int blocks, uint32_t *out);  // may fill up to a multiple of 16 blocks
    void (*run)(const snipi_run *);
    void (*transpose)(const float *x, int64_t ld, int rows, int cols, float *out, int64_t ld_out);  // out[cols][rows]
    void (*widen)(const uint16_t *x, int n, float *out);                                            // from BF16
    void (*narrow)(const float *x, int n, uint16_t *out);                                           // to BF16
    void (*decode)(snip_format, const float *lut, const uint8_t *codes, int n, float scale, float *out, int stream);
    void (*sums)(const float *x, const float *values, const float *weight, int n,
                 snipi_tally *);  // snipi_sums_exact of finite x
    uint32_t (*peaks)(const snipi_strip *, uint32_t *amax);
    int (*scales)(snip_scale, const snipi_run *, float tensor_scale, float tensor_inverse, const uint32_t *amax,
                  int tiles, float *scale, float *inverse, uint8_t *bytes, int *capped);
    void (*strip)(const snipi_run *, const snipi_strip *);  // of finite elements
    void (*words)(snip_rng_key, uint64_t first, uint64_t step, int rows, int cols, uint32_t *out);
    void (*turn)(const void *x, int bf16, int64_t ld, int rows, float *panel);
    uint32_t (*largest)(const void *x, int bf16, int64_t ld, int64_t rows, int64_t cols);
} snipi_vector;

static const snipi_vector *snipi_vector_of(snip_isa isa);

typedef struct {
    snip_recipe recipe;
    const void *x;
    const float *weight;  // or NULL
    int x_bf16, out_bf16;
    int transposed;  // logical (r, c) lies at x[c * ld + r]
    int64_t rows, cols, ld;
    int64_t tile_rows, tile_cols, tiles_down, tiles_across;
    int strips;                  // tiles are such as strips are made of
    int log2_cols;               // of tile_cols then
    void *codes, *scales, *out;  // each may be NULL; out: dequantized values
    size_t row_bytes;            // of codes
    int64_t ld_out;
    float tensor_scale, tensor_inverse;  // NVFP4's 1/S and S
    snip_rng_key key;
    int want_sums;
    int blocks;  // the matrix is taken block by block
    float lut[256];
    snipi_run run;  // what all runs have in common
    const snipi_vector *vector;
} snipi_matrix;

// Float to double and back through integers where the float is subnormal: hardware may be set to flush those
// (-Ofast does). Of finite x >= 0; narrowing rounds to nearest even and stops at the largest float.
SNIPI_HD static double snipi_widen(float x) {
    const uint32_t u = snipi_bits(x);
    return u >= 0x00800000u ? (double)x : (double)(int32_t)u * 1.40129846432481707e-45;  // 2^-149
}

SNIPI_HD static float snipi_narrow(double x) {
    const double sum = x + 6.3108872417680944e-30;  // 2^-97: the last place of the sum is 2^-149
    uint64_t u;
    memcpy(&u, &sum, 8);
    if (x < 1.1754943508222875e-38) return snipi_float((uint32_t)u);
    return x > 3.4028234663852886e38 ? 3.4028234663852886e38f : (float)x;
}

// Division that -Ofast (reciprocals) cannot touch: the divisor is hidden from it. Rounding the double quotient of
// two floats to float is the correctly rounded float quotient (53 >= 2*24 + 2).
SNIPI_HD static float snipi_divide(float a, float b) {
    double divisor = snipi_widen(b);
    SNIPI_HIDDEN(divisor);
    return snipi_narrow(snipi_widen(a) / divisor);
}

SNIPI_HD static float snipi_multiply(float a, float b) { return snipi_narrow(snipi_widen(a) * snipi_widen(b)); }

// scale * element. From 2^-100 on the product is a normal number, as no element is smaller than 2^-16.
SNIPI_HD SNIPI_INLINE float snipi_value(float scale, float element) {
    const uint32_t u = snipi_bits(element);
    if (snipi_bits(scale) >= (127u - 100u) << 23 || snipi_nonfinite(element)) return scale * element;
    return snipi_float(snipi_bits(snipi_multiply(scale, snipi_float(u & 0x7FFFFFFFu))) | (u & 0x80000000u));
}

typedef struct {
    float scale, inverse;
    int byte;  // the stored code, if any
} snipi_tile_scale;

// F32: amax / largest. Below largest * 2^-126 that would be subnormal: 2^-126.
SNIPI_HD SNIPI_INLINE snipi_tile_scale snipi_scale_f32(snipi_element e, uint32_t amax_bits) {
    const float amax = snipi_float(amax_bits);
    snipi_tile_scale t = { 1.0f, 1.0f, 0 };
    if (amax_bits == 0) return t;
    if (amax_bits >= snipi_bits(e.max) - (126u << 23)) {
        t.scale = snipi_divide(amax, e.max);
        t.inverse = snipi_divide(e.max, amax);
    } else {
        t.scale = snipi_float(0x00800000u);
        t.inverse = snipi_float((126u + 127u) << 23);
    }
    return t;
}

// NVFP4: E4M3 of amax * (S * (1/6)), in that order. Under a scale of zero finite elements become zeros.
SNIPI_HD SNIPI_INLINE snipi_tile_scale snipi_scale_ue4m3(uint32_t amax_bits, float tensor_scale, float tensor_inverse) {
    const float sixth = snipi_float(0x3E2AAAABu);  // 1/6 in float32
    snipi_tile_scale t;
    t.byte = snipi_ue4m3_encode(snipi_multiply(snipi_float(amax_bits), tensor_inverse * sixth));
    t.scale = snipi_multiply(snipi_decode((uint32_t)t.byte, SNIP_E4M3), tensor_scale);
    t.inverse = snipi_bits(t.scale) == 0 ? 0.0f : snipi_divide(1.0f, t.scale);
    return t;
}

// tensor_scale, tensor_inverse: NVFP4's 1/S and S.
SNIPI_HD static snipi_tile_scale snipi_scale_of(snip_scale kind, snipi_element e, uint32_t amax_bits,
                                                float tensor_scale, float tensor_inverse) {
    const uint32_t fraction = 0x007FFFFFu;
    snipi_tile_scale t = { 1.0f, 1.0f, 0 };
    // The exponent of amax / 2^emax; one more if amax's fraction exceeds max's: the least k with amax <= max * 2^k.
    // Subnormal amax are below every least exponent.
    int k = amax_bits < 0x00800000u ? -200 : (int)(amax_bits >> 23) - 127 - e.emax;
    const int up = (amax_bits & fraction) > (snipi_bits(e.max) & fraction);
    switch (kind) {
        case SNIP_SCALE_NONE: break;
        case SNIP_SCALE_F32: return snipi_scale_f32(e, amax_bits);
        case SNIP_SCALE_POW2:
            if (amax_bits == 0) break;
            k = (int)snipi_max(k + up, -126);
            t.scale = snipi_float((uint32_t)(127 + k) << 23);
            t.inverse = snipi_float((uint32_t)(127 - k) << 23);
            break;
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE8M0_UP:
            k = (int)snipi_max(kind == SNIP_SCALE_UE8M0 ? k : k + up, -127);
            t.byte = k + 127;
            t.scale = snipi_ue8m0_decode((uint8_t)t.byte);
            t.inverse = snipi_float((uint32_t)(127 - k) << 23);
            break;
        case SNIP_SCALE_UE4M3: return snipi_scale_ue4m3(amax_bits, tensor_scale, tensor_inverse);
    }
    return t;
}

// Whether values of the largest codes become infinite: amax near FLT_MAX, and the scale or the code rounded up.
SNIPI_HD SNIPI_INLINE int snipi_overflows(snipi_element e, float scale) { return snipi_nonfinite(scale * e.max); }

// x * 2^64, at most FLT_MAX, in integers: for tiles near or below the smallest normal float.
SNIPI_HD static float snipi_raise(float x) {
    const uint32_t u = snipi_bits(x), sign = u & 0x80000000u;
    uint32_t a = u & 0x7FFFFFFFu, shift = 0;
    if (a == 0 || a >= 0x7F800000u) return x;
    while (a < 0x00800000u) {
        a <<= 1;
        shift++;
    }
    a += (64u - shift) << 23;
    return snipi_float(sign | (a < 0x7F7FFFFFu ? a : 0x7F7FFFFFu));
}

// Codes of a run, one to a byte; the number of saturated elements is returned.
SNIPI_INLINE int snipi_encode_run(const float *x, int n, float inverse, const uint32_t *random, snipi_element e,
                                  uint8_t *codes) {
    int over = 0;
    for (int i = 0; i < n; i++) {
        const uint32_t u = snipi_bits(x[i] * inverse), a = u & 0x7FFFFFFFu;
        const uint32_t finite = (snipi_bits(x[i]) & 0x7F800000u) != 0x7F800000u;
        uint32_t code = random ? snipi_encode_stochastic(a, random[i], e.mantissa, e.bias)
                               : snipi_encode_nearest(a, e.mantissa, e.bias);
        over += (int)(finite & (code > e.largest));
        code = (code < e.largest ? code : e.largest) | (u >> 31) << e.sign;
        codes[i] = (uint8_t)(a > 0x7F800000u ? e.nan : code);
    }
    return over;
}

// E4M3 and E2M1 as constants, so that each loop is compiled for its own.
static int snipi_encode_run_any(const snipi_run *run, const float *x, uint8_t *codes) {
    const snipi_element e4m3 = snipi_element_of(SNIP_E4M3), e2m1 = snipi_element_of(SNIP_E2M1);
    const uint32_t *random = run->random;
    const float inverse = run->inverse;
    const int n = run->n;
    if (run->format == SNIP_E4M3)
        return random ? snipi_encode_run(x, n, inverse, random, e4m3, codes)
                      : snipi_encode_run(x, n, inverse, NULL, e4m3, codes);
    if (run->format == SNIP_E2M1)
        return random ? snipi_encode_run(x, n, inverse, random, e2m1, codes)
                      : snipi_encode_run(x, n, inverse, NULL, e2m1, codes);
    return snipi_encode_run(x, n, inverse, random, run->e, codes);
}

static void snipi_store_codes(uint8_t *row, int packed, int64_t col, const uint8_t *codes, int n) {
    int i = 0;
    if (!packed) {
        memcpy(row + col, codes, (size_t)n);
        return;
    }
    if (col & 1) {
        row[col >> 1] = (uint8_t)((row[col >> 1] & 15) | codes[0] << 4);
        i = 1;
    }
    for (; i + 1 < n; i += 2) row[(col + i) >> 1] = (uint8_t)(codes[i] | codes[i + 1] << 4);
    if (i < n) row[(col + i) >> 1] = codes[i];
}

// |x|^2, |Q(x) - x|^2 and <w, Q(x) - x> of x itself, in double; values = Q(x).
static void snipi_sums_exact(const float *x, const float *values, const float *weight, int n, snipi_tally *tally) {
    for (int i = 0; i < n; i++) {
        const int finite = !snipi_nonfinite(x[i]), lane = i % SNIPI_LANES;
        const double v = finite ? (double)x[i] : 0, d = finite ? (double)(values[i] - x[i]) : 0;
        tally->sum_sq[lane] += v * v;
        tally->err_sq[lane] += d * d;
        if (weight) tally->dot[lane] += (double)weight[i] * d;
    }
}

// The same in units of the scale: y = x / scale, values = Q(x) / scale. Each product is rounded before it is added.
static void snipi_sums_scaled(const snipi_run *run, const float *y, const float *values) {
    enum { SNIPI_HALF_SUMS = SNIPI_LANES, SNIPI_FLOAT_SUMS = 2 * SNIPI_LANES };

    const double scale = (double)run->scale, square = scale * scale;
    float y_sq[SNIPI_RUN], d_sq[SNIPI_RUN], sum_sq[SNIPI_FLOAT_SUMS] = { 0 }, err_sq[SNIPI_FLOAT_SUMS] = { 0 };
    double dot[SNIPI_LANES] = { 0 }, scaled[3][SNIPI_LANES];
    for (int i = 0; i < run->n; i++) {
        const float d = values[i] - y[i];
        y_sq[i] = y[i] * y[i];
        d_sq[i] = d * d;
        if (run->weight) dot[i % SNIPI_LANES] += (double)run->weight[i] * (double)d;
    }
    SNIPI_ROUNDED(y_sq);
    SNIPI_ROUNDED(d_sq);
    for (int i = 0; i < run->n; i++) {
        sum_sq[i % SNIPI_FLOAT_SUMS] += y_sq[i];
        err_sq[i % SNIPI_FLOAT_SUMS] += d_sq[i];
    }
    for (int i = 0; i < SNIPI_LANES; i++) {
        scaled[0][i] = ((double)sum_sq[i] + (double)sum_sq[i + SNIPI_HALF_SUMS]) * square;
        scaled[1][i] = ((double)err_sq[i] + (double)err_sq[i + SNIPI_HALF_SUMS]) * square;
        scaled[2][i] = dot[i] * scale;
    }
    SNIPI_ROUNDED(scaled);
    for (int i = 0; i < SNIPI_LANES; i++) {
        run->tally->sum_sq[i] += scaled[0][i];
        run->tally->err_sq[i] += scaled[1][i];
        run->tally->dot[i] += scaled[2][i];
    }
}

// Finite elements whose values are infinite; among them are all that lie beyond the largest.
static int snipi_count_overflows(const snipi_run *run, const uint8_t *codes) {
    int count = 0;
    for (int i = 0; i < run->n; i++)
        count += !snipi_nonfinite(run->x[i]) && snipi_nonfinite(run->scale * run->lut[codes[i]]);
    return count;
}

// The specification of a run.
static void snipi_run_scalar(const snipi_run *run) {
    float values[SNIPI_RUN], other[SNIPI_RUN];
    const float *x = run->x;
    uint8_t codes[SNIPI_RUN];
    const int n = run->n;
    if (run->low) {
        for (int i = 0; i < n; i++) other[i] = snipi_raise(run->x[i]);
        x = other;
    }
    int saturated = snipi_encode_run_any(run, x, codes);
    if (run->overflows) saturated = snipi_count_overflows(run, codes);
    run->tally->saturated += saturated;
    if (run->codes) snipi_store_codes(run->codes, run->packed, 0, codes, n);
    if (run->want_sums && !run->exact) {
        for (int i = 0; i < n; i++) {
            other[i] = run->x[i] * run->inverse;
            values[i] = run->lut[codes[i]];
        }
        SNIPI_ROUNDED(other);
        snipi_sums_scaled(run, other, values);
    }
    if (!run->values && !(run->want_sums && run->exact)) return;
    for (int i = 0; i < n; i++) values[i] = snipi_value(run->scale, run->lut[codes[i]]);
    SNIPI_ROUNDED(values);
    if (run->want_sums && run->exact) snipi_sums_exact(run->x, values, run->weight, n, run->tally);
    if (run->values) memcpy(run->values, values, (size_t)n * sizeof(float));
}

static uint32_t snipi_amax_scalar(const float *x, int n, int64_t *nonfinite) {
    uint32_t largest = 0;
    int bad = 0;
    for (int i = 0; i < n; i++) {
        const uint32_t a = snipi_bits(x[i]) & 0x7FFFFFFFu, finite = a < 0x7F800000u ? a : 0;
        bad += a >= 0x7F800000u;
        largest = largest > finite ? largest : finite;
    }
    *nonfinite += bad;
    return largest;
}

static void snipi_philox_scalar(snip_rng_key key, uint64_t first, int blocks, uint32_t *out) {
    for (int i = 0; i < blocks; i++) snip_philox(key, first + (uint64_t)i, out + 4 * i);
}

// Whether counters [first, first + blocks) have the same upper half, also when the last 16 are filled up.
static int snipi_one_upper(uint64_t first, int64_t blocks) {
    return (uint32_t)first + (uint64_t)blocks + 16 <= 0xFFFFFFFFu;
}

static void snipi_transpose_scalar(const float *x, int64_t ld, int rows, int cols, float *out, int64_t ld_out) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) out[c * ld_out + r] = x[r * ld + c];
}

static void snipi_widen_scalar(const uint16_t *x, int n, float *out) {
    for (int i = 0; i < n; i++) out[i] = snipi_float((uint32_t)x[i] << 16);
}

static void snipi_narrow_scalar(const float *x, int n, uint16_t *out) {
    for (int i = 0; i < n; i++) out[i] = (uint16_t)snipi_bf16_round(snipi_bits(x[i]));
}

static void snipi_decode_scalar(snip_format format, const float *lut, const uint8_t *codes, int n, float scale,
                                float *out, int stream) {
    const int packed = format == SNIP_E2M1;
    (void)stream;
    for (int i = 0; i < n; i++) {
        const int code = packed ? codes[i >> 1] >> (i & 1) * 4 & 15 : codes[i];
        out[i] = snipi_value(scale, lut[code]);
    }
}

SNIPI_HD static int snipi_byte_scale(snip_scale s) {
    return s == SNIP_SCALE_UE8M0 || s == SNIP_SCALE_UE8M0_UP || s == SNIP_SCALE_UE4M3;
}

static size_t snipi_row_bytes(snip_format format, int64_t cols) {
    if (format == SNIP_E2M1) return (size_t)(cols / 2 + (cols & 1));
    return (size_t)cols * (size_t)(snip_format_bits(format) / 8);
}

static uint8_t *snipi_codes_at(const snipi_matrix *matrix, int64_t r, int64_t c) {
    if (!matrix->codes) return NULL;
    return (uint8_t *)matrix->codes + (size_t)r * matrix->row_bytes + (size_t)(matrix->run.packed ? c >> 1 : c);
}

// Elements of the source as floats, and their weights.
typedef struct {
    const float *x;       // [rows][stride]
    const float *weight;  // [rows][stride] or NULL
    int64_t stride;
} snipi_floats;

// Rows [row, row + SNIPI_PANEL_ROWS) x columns [col, col + cols) of a transposed source; with a weight half as many
// rows, and their weights in the other half. Or the `cols` elements of a BF16 source from (row, col), in sequence.
typedef struct {
    int64_t row, col;  // row -1: empty
    int cols;
    float *at;  // [SNIPI_PANEL_ROWS][SNIPI_PANEL_LD], from the first cache line of `memory` on
    float memory[(int)SNIPI_PANEL_ROWS * (int)SNIPI_PANEL_LD + (int)SNIPI_PANEL_LINE];
} snipi_panel;

static void snipi_panel_begin(snipi_panel *panel) {
    const size_t line = SNIPI_PANEL_LINE * sizeof(float);
    panel->row = -1;
    panel->at = panel->memory + (line - (uintptr_t)panel->memory % line) / sizeof(float);
}

static int snipi_matrix_panel_rows(const snipi_matrix *matrix) {
    return matrix->weight ? SNIPI_PANEL_ROWS / 2 : SNIPI_PANEL_ROWS;
}

// A transposed source of `cols` rows, from x: `rows` elements of each.
static void snipi_fill_turned(const snipi_matrix *matrix, const void *x, int rows, int cols, float *to) {
    enum { SNIPI_WIDE_ROWS = 16 };

    const snipi_vector *vector = matrix->vector;
    const int64_t ld = matrix->ld;
    if (vector->turn && rows == SNIPI_PANEL_ROWS && cols % 16 == 0)
        vector->turn(x, matrix->x_bf16, ld, cols, to);
    else if (!matrix->x_bf16)
        vector->transpose((const float *)x, ld, cols, rows, to, SNIPI_PANEL_LD);
    else
        for (int c = 0; c < cols; c += SNIPI_WIDE_ROWS) {
            float wide[SNIPI_WIDE_ROWS][SNIPI_PANEL_ROWS];
            const int n = (int)snipi_min(SNIPI_WIDE_ROWS, cols - c);
            for (int i = 0; i < n; i++) vector->widen((const uint16_t *)x + (c + i) * ld, rows, wide[i]);
            vector->transpose(wide[0], SNIPI_PANEL_ROWS, n, rows, to + c, SNIPI_PANEL_LD);
        }
}

static void snipi_fill_panel(const snipi_matrix *matrix, snipi_panel *panel, int64_t row, int64_t col, int cols) {
    const int64_t at = matrix->transposed ? col * matrix->ld + row : row * matrix->ld + col;
    const void *x = (const char *)matrix->x + at * (matrix->x_bf16 ? 2 : 4);
    panel->row = row;
    panel->col = col;
    panel->cols = cols;
    if (!matrix->transposed) {
        matrix->vector->widen((const uint16_t *)x, cols, panel->at);
        return;
    }
    const int rows = (int)snipi_min(snipi_matrix_panel_rows(matrix), matrix->rows - row);
    snipi_fill_turned(matrix, x, rows, cols, panel->at);
    if (matrix->weight)
        matrix->vector->transpose(matrix->weight + at, matrix->ld, cols, rows,
                                  panel->at + SNIPI_PANEL_ROWS / 2 * SNIPI_PANEL_LD, SNIPI_PANEL_LD);
}

// Elements [col, col + cols) of a row, at most SNIPI_STRIP of them, SNIPI_RUN of a transposed source. The panel is kept
// until another one is asked for.
SNIPI_INLINE snipi_floats snipi_fetch(const snipi_matrix *matrix, snipi_panel *panel, int64_t row, int64_t col,
                                      int cols) {
    snipi_floats floats;
    floats.weight = matrix->weight ? matrix->weight + row * matrix->ld + col : NULL;
    floats.stride = matrix->ld;
    if (!matrix->transposed && !matrix->x_bf16) {
        floats.x = (const float *)matrix->x + row * matrix->ld + col;
        return floats;
    }
    const int64_t top = matrix->transposed ? row - row % snipi_matrix_panel_rows(matrix) : row;
    if (panel->row != top || col < panel->col || col + cols > panel->col + panel->cols)
        snipi_fill_panel(matrix, panel, top, col, cols);
    floats.x = panel->at + (row - top) * SNIPI_PANEL_LD + (col - panel->col);
    if (matrix->transposed) {
        floats.stride = SNIPI_PANEL_LD;
        if (matrix->weight) floats.weight = floats.x + SNIPI_PANEL_ROWS / 2 * SNIPI_PANEL_LD;
    }
    return floats;
}

// Largest finite magnitude of `lines` rows of the source from element `at`, of `length` elements each.
static uint32_t snipi_source_peak(const snipi_matrix *matrix, int64_t at, int64_t lines, int64_t length,
                                  int64_t *nonfinite) {
    const char *x = (const char *)matrix->x + at * (matrix->x_bf16 ? 2 : 4);
    float wide[SNIPI_RUN];
    uint32_t most = 0;
    if (matrix->vector->largest) {
        most = matrix->vector->largest(x, matrix->x_bf16, matrix->ld, lines, length);
        if (most < 0x7F800000u) return most;
        most = 0;
    }
    for (int64_t r = 0; r < lines; r++)
        for (int64_t i = 0; i < length; i += SNIPI_RUN) {
            const int n = (int)snipi_min(SNIPI_RUN, length - i);
            const float *run = (const float *)(const void *)x + r * matrix->ld + i;
            if (matrix->x_bf16) {
                matrix->vector->widen((const uint16_t *)(const void *)x + r * matrix->ld + i, n, wide);
                run = wide;
            }
            const uint32_t amax = matrix->vector->amax(run, n, nonfinite);
            most = amax > most ? amax : most;
        }
    return most;
}

// Tiles that are quantized together: `down` x `across` of them, tile i in row i / across. All scales of a batch with
// one tile that is not regular are found and its codes made the slow way.
typedef struct {
    int64_t tile_row, tile_col;  // of the first tile
    int64_t rows, cols;          // elements, ending with the matrix
    int down, across;
    int strips;  // they may be taken as a strip
    int regular,
        capped;  // regular: all finite, with sums in units of the scale; capped: some may lie beyond the largest
    int64_t nonfinite;
    uint32_t most;  // largest of amax
    uint32_t amax[SNIPI_BATCH_TILES];
    float scale[SNIPI_BATCH_TILES], inverse[SNIPI_BATCH_TILES];
    uint8_t byte[SNIPI_BATCH_TILES];
} snipi_batch;

typedef struct {
    int64_t r0, r1, c0, c1;
} snipi_area;  // elements [r0, r1) x [c0, c1)

static snipi_area snipi_area_of(const snipi_matrix *matrix, int64_t tile_row, int64_t tile_col) {
    snipi_area area;
    area.r0 = tile_row * matrix->tile_rows;
    area.c0 = tile_col * matrix->tile_cols;
    area.r1 = snipi_min(matrix->rows, area.r0 + matrix->tile_rows);
    area.c1 = snipi_min(matrix->cols, area.c0 + matrix->tile_cols);
    return area;
}

static uint32_t snipi_tile_peak(const snipi_matrix *matrix, snipi_panel *panel, const snipi_area *area,
                                int64_t *nonfinite) {
    const int64_t rows = area->r1 - area->r0, cols = area->c1 - area->c0;
    uint32_t most = 0;
    if (rows == 1 && cols <= SNIPI_RUN)
        return matrix->vector->amax(snipi_fetch(matrix, panel, area->r0, area->c0, (int)cols).x, (int)cols, nonfinite);
    if (matrix->transposed && rows < SNIPI_PANEL_ROWS) {
        for (int64_t c = area->c0; c < area->c1; c += SNIPI_RUN)
            for (int64_t r = area->r0; r < area->r1; r++) {
                const int n = (int)snipi_min(SNIPI_RUN, area->c1 - c);
                const uint32_t amax = matrix->vector->amax(snipi_fetch(matrix, panel, r, c, n).x, n, nonfinite);
                most = amax > most ? amax : most;
            }
        return most;
    }
    if (matrix->transposed) return snipi_source_peak(matrix, area->c0 * matrix->ld + area->r0, cols, rows, nonfinite);
    return snipi_source_peak(matrix, area->r0 * matrix->ld + area->c0, rows, cols, nonfinite);
}

// Largest magnitudes of finite elements. strip: where the batch lies, if it is one.
static void snipi_batch_peaks(const snipi_matrix *matrix, snipi_panel *panel, const snipi_strip *strip,
                              snipi_batch *batch) {
    batch->nonfinite = 0;
    if (batch->strips) {
        batch->most = matrix->vector->peaks(strip, batch->amax);
        if (batch->most < 0x7F800000u) return;
    }
    batch->most = 0;
    for (int d = 0; d < batch->down; d++)
        for (int a = 0; a < batch->across; a++) {
            const snipi_area area = snipi_area_of(matrix, batch->tile_row + d, batch->tile_col + a);
            const uint32_t amax = snipi_tile_peak(matrix, panel, &area, &batch->nonfinite);
            batch->amax[d * batch->across + a] = amax;
            batch->most = amax > batch->most ? amax : batch->most;
        }
}

static int snipi_has_sums_in_units(const snipi_matrix *matrix, uint32_t amax, float scale) {
    if (amax == 0) return 1;
    if (matrix->recipe.scale == SNIP_SCALE_NONE) return amax >= SNIPI_UNSCALED_LEAST && amax <= SNIPI_UNSCALED_MOST;
    return amax >= SNIPI_UNITS_LEAST && snipi_bits(scale) != 0;
}

// The last magnitude, as bits, that is not saturated.
static uint32_t snipi_last_in_range(const snipi_run *run) {
    return run->stochastic ? snipi_bits(run->e.max) : (uint32_t)run->k.beyond;
}

static void snipi_batch_scales(const snipi_matrix *matrix, snipi_batch *batch) {
    const snip_scale kind = matrix->recipe.scale;
    const int tiles = batch->down * batch->across;
    const uint32_t last = snipi_last_in_range(&matrix->run);
    batch->regular = batch->nonfinite == 0;
    if (kind != SNIP_SCALE_NONE && matrix->vector->scales &&
        matrix->vector->scales(kind, &matrix->run, matrix->tensor_scale, matrix->tensor_inverse, batch->amax, tiles,
                               batch->scale, batch->inverse, batch->byte, &batch->capped))
        return;
    batch->capped = 0;
    for (int i = 0; i < tiles; i++) {
        const snipi_tile_scale t = snipi_scale_of(kind, matrix->run.e, batch->amax[i], matrix->tensor_scale,
                                                  matrix->tensor_inverse);
        batch->scale[i] = t.scale;
        batch->inverse[i] = t.inverse;
        batch->byte[i] = (uint8_t)t.byte;
        batch->regular &= snipi_has_sums_in_units(matrix, batch->amax[i], t.scale);
        batch->regular &= !snipi_overflows(matrix->run.e, t.scale);
        batch->capped |= snipi_bits(snipi_float(batch->amax[i]) * t.inverse) > last;
    }
}

static void snipi_batch_store(const snipi_matrix *matrix, const snipi_batch *batch) {
    const int64_t first = batch->tile_row * matrix->tiles_across + batch->tile_col;
    const int across = batch->across;
    if (!matrix->scales || matrix->recipe.scale == SNIP_SCALE_NONE) return;
    uint8_t *bytes = (uint8_t *)matrix->scales + first;
    float *floats = (float *)matrix->scales + first;
    for (int i = 0; i < batch->down * across;
         i += across, bytes += matrix->tiles_across, floats += matrix->tiles_across)
        if (snipi_byte_scale(matrix->recipe.scale) && across == 1)
            *bytes = batch->byte[i];
        else if (snipi_byte_scale(matrix->recipe.scale))
            memcpy(bytes, batch->byte + i, (size_t)across);
        else if (across == 1)
            *floats = batch->scale[i];
        else
            memcpy(floats, batch->scale + i, (size_t)across * sizeof(float));
}

// The random words of elements [c, c + n) of row r; `random` has room for n of them, rounded up to 64, and 64 more.
static const uint32_t *snipi_random_run(const snipi_matrix *matrix, int64_t r, int64_t c, int64_t n, uint32_t *random) {
    const uint64_t element = (uint64_t)r * (uint64_t)matrix->cols + (uint64_t)c, first = element >> 2;
    matrix->vector->philox(matrix->key, first, (int)(((element + (uint64_t)n + 3) >> 2) - first), random);
    return random + (element & 3);
}

// The strip of `rows` rows from (row, col), but for its scales and what is fetched ahead.
static void snipi_strip_at(const snipi_matrix *matrix, const snipi_floats *floats, int64_t row, int64_t col, int rows,
                           int64_t cols, snipi_tally *tally, snipi_strip *strip) {
    strip->x = floats->x;
    strip->weight = floats->weight;
    strip->stride = floats->stride;
    strip->length = cols;
    strip->pieces = rows;
    strip->codes = snipi_codes_at(matrix, row, col);
    strip->values = matrix->out ? (float *)matrix->out + row * matrix->ld_out + col : NULL;
    strip->code_stride = (int64_t)matrix->row_bytes;
    strip->value_stride = matrix->ld_out;
    strip->tally = tally;
    strip->random = NULL;
    strip->ahead_size = matrix->x_bf16 ? 2 : 4;
    strip->ahead_stride = matrix->ld * strip->ahead_size;
    strip->fetched = 0;
}

// Where the source lies that is read after rows [row, row + rows) of its columns from col.
static const char *snipi_ahead(const snipi_matrix *matrix, int64_t row, int64_t col, int64_t rows) {
    int64_t next = row + rows;
    if (matrix->blocks && next % SNIPI_BAND == 0) {
        next = row - row % SNIPI_BAND;
        col += SNIPI_RUN;
    }
    return (const char *)matrix->x + (next * matrix->ld + col) * (matrix->x_bf16 ? 2 : 4);
}

// The same of a panel of SNIPI_PANEL_ROWS rows from (row, col) of a transposed matrix: as many rows of the next block.
static const char *snipi_ahead_turned(const snipi_matrix *matrix, int64_t row, int64_t col) {
    const int64_t in_block = row % SNIPI_RUN, part = col % SNIPI_RUN;
    const char *next = snipi_ahead(matrix, col - part, row - in_block, SNIPI_RUN);
    return next + (in_block * matrix->ld + part) * (matrix->x_bf16 ? 2 : 4);
}

// Random words of `rows` rows of `cols` elements from (row, col), and their first word; *stride from row to row.
static const uint32_t *snipi_strip_words(const snipi_matrix *matrix, int64_t row, int64_t col, int rows, int64_t cols,
                                         uint32_t *words) {
    const uint64_t step = (uint64_t)matrix->cols >> 2;
    const uint64_t first = ((uint64_t)row * (uint64_t)matrix->cols + (uint64_t)col) >> 2;
    if (rows == 1) return snipi_random_run(matrix, row, col, cols, words);
    if (snipi_one_upper(first, (int64_t)step * rows + cols)) {
        matrix->vector->words(matrix->key, first, step, rows, (int)cols, words);
        return words;
    }
    for (int i = 0; i < rows; i++)
        snipi_philox_scalar(matrix->key, first + (uint64_t)i * step, (int)(cols / 4), words + i * cols);
    return words;
}

// Codes of a strip; stochastic ones in parts for whose random words there is room.
static void snipi_encode_strip(const snipi_matrix *matrix, const snipi_strip *strip, int64_t row, int64_t col) {
    const int at_once = matrix->cols % 4 == 0 && col % 4 == 0 ? (int)(SNIPI_STRIP / strip->length) : 1;
    uint32_t words[SNIPI_STRIP + 64];
    if (!matrix->run.stochastic) {
        matrix->vector->strip(&matrix->run, strip);
        return;
    }
    for (int p = 0; p < strip->pieces; p += at_once) {
        snipi_strip part = *strip;
        part.pieces = (int)snipi_min(at_once, strip->pieces - p);
        part.random = snipi_strip_words(matrix, row + p, col, part.pieces, part.length, words);
        part.x += p * strip->stride;
        part.scale += p * strip->runs;
        part.inverse += p * strip->runs;
        part.ahead += p * strip->ahead_stride;
        if (part.codes) part.codes += p * strip->code_stride;
        if (part.weight) part.weight += p * strip->stride;
        if (part.values) part.values += p * strip->value_stride;
        matrix->vector->strip(&matrix->run, &part);
    }
}

// One run, of `n` elements. nonfinite: there may be some.
static void snipi_encode_one_run(const snipi_matrix *matrix, snipi_panel *panel, int64_t r, int64_t c, int n,
                                 int nonfinite, int exact, snipi_run *run) {
    const int e2m1 = matrix->recipe.format == SNIP_E2M1, aside = e2m1 && (c & 1);  // aside: begins within a byte
    const snipi_floats floats = snipi_fetch(matrix, panel, r, c, n);
    float values[SNIPI_RUN];
    uint8_t codes[SNIPI_RUN];
    uint32_t random[SNIPI_RUN + 64];
    int64_t bad = 0;
    run->x = floats.x;
    run->weight = floats.weight;
    run->n = n;
    if (run->stochastic) run->random = snipi_random_run(matrix, r, c, n, random);
    run->packed = e2m1 && !aside;
    run->codes = matrix->codes && aside ? codes : snipi_codes_at(matrix, r, c);
    run->values = NULL;
    if (matrix->out) run->values = matrix->out_bf16 ? values : (float *)matrix->out + r * matrix->ld_out + c;
    if (nonfinite) (void)matrix->vector->amax(run->x, n, &bad);
    run->exact = exact || bad;
    if (run->exact || run->overflows)
        snipi_run_scalar(run);
    else
        matrix->vector->run(run);
    if (aside && matrix->codes) snipi_store_codes(snipi_codes_at(matrix, r, 0), 1, c, codes, n);
    if (matrix->out && matrix->out_bf16)
        matrix->vector->narrow(values, n, (uint16_t *)matrix->out + r * matrix->ld_out + c);
}

// A tile of a batch, and what its runs share.
typedef struct {
    snipi_area area;
    int exact, strips, capped;
    int nonfinite;
    float inverse;
    snipi_run *run;
} snipi_tile_job;

// Rows [r, r + rows) x columns [c, c + n) of a tile: a strip of one scale, or run by run.
static void snipi_encode_part(const snipi_matrix *matrix, snipi_panel *panel, const snipi_tile_job *tile, int64_t r,
                              int rows, int64_t c, int n) {
    if (tile->strips && n % SNIPI_RUN == 0) {
        const snipi_floats floats = snipi_fetch(matrix, panel, r, c, n);
        snipi_strip strip;
        snipi_strip_at(matrix, &floats, r, c, rows, n, tile->run->tally, &strip);
        strip.width = SNIPI_RUN;
        strip.log2_width = 7;
        strip.runs = 0;
        strip.capped = tile->capped;
        strip.scale = &tile->run->scale;
        strip.inverse = &tile->inverse;
        strip.ahead = (const char *)strip.x + SNIPI_AHEAD_STRIP;
        if (matrix->transposed) strip.ahead = snipi_ahead_turned(matrix, r, c);
        snipi_encode_strip(matrix, &strip, r, c);
        return;
    }
    for (int i = 0; i < rows; i++)
        snipi_encode_one_run(matrix, panel, r + i, c, n, tile->nonfinite, tile->exact, tile->run);
}

// Parts of a tile in the order in which its sums are specified. Of a transposed source: what a panel holds.
static void snipi_encode_parts(const snipi_matrix *matrix, snipi_panel *panel, const snipi_tile_job *tile) {
    const snipi_area *area = &tile->area;
    const int64_t width = area->c1 - area->c0;
    if (matrix->transposed) {
        const int height = snipi_matrix_panel_rows(matrix);
        for (int64_t top = area->r0; top < area->r1; top += SNIPI_ORDER_ROWS)
            for (int64_t c = area->c0; c < area->c1; c += SNIPI_RUN) {
                const int64_t end = snipi_min(top + SNIPI_ORDER_ROWS, area->r1);
                for (int64_t r = top; r < end; r += height - r % height)
                    snipi_encode_part(matrix, panel, tile, r, (int)snipi_min(end - r, height - r % height), c,
                                      (int)snipi_min(SNIPI_RUN, area->c1 - c));
            }
        return;
    }
    const int whole_rows = tile->strips && width % SNIPI_RUN == 0 && width <= SNIPI_STRIP && !matrix->x_bf16;
    for (int64_t r = area->r0, rows; r < area->r1; r += rows) {
        rows = whole_rows ? snipi_min(area->r1 - r, SNIPI_RUN) : 1;
        for (int64_t c = area->c0, n; c < area->c1; c += n) {
            n = snipi_min(SNIPI_RUN, area->c1 - c);
            if (tile->strips) n = snipi_max(n, snipi_min(SNIPI_STRIP, (area->c1 - c) / SNIPI_RUN * SNIPI_RUN));
            snipi_encode_part(matrix, panel, tile, r, (int)rows, c, (int)n);
        }
    }
}

// Codes of a batch's tile; `run` is a copy of matrix->run.
static void snipi_encode_tile(const snipi_matrix *matrix, snipi_panel *panel, const snipi_batch *batch, int down,
                              int across, snipi_run *run) {
    const int i = down * batch->across + across;
    snipi_tile_job tile;
    tile.area = snipi_area_of(matrix, batch->tile_row + down, batch->tile_col + across);
    tile.exact = !snipi_has_sums_in_units(matrix, batch->amax[i], batch->scale[i]);
    tile.nonfinite = batch->nonfinite != 0;
    tile.capped = batch->capped;
    tile.inverse = batch->inverse[i];
    run->scale = batch->scale[i];
    run->overflows = snipi_overflows(run->e, run->scale);
    tile.strips = matrix->vector->strip && !tile.exact && !run->overflows && !tile.nonfinite &&
                  !(matrix->out && matrix->out_bf16) && !(matrix->run.packed && (tile.area.c0 & 1));
    tile.run = run;
    // Here a subnormal x could still matter to the code, and x * inverse would lose it.
    run->low = matrix->recipe.scale != SNIP_SCALE_NONE && tile.exact;
    run->inverse = run->low ? tile.inverse * snipi_float((127u - 64u) << 23) : tile.inverse;
    if (matrix->tile_rows == 1 && tile.area.c1 - tile.area.c0 <= SNIPI_RUN)
        snipi_encode_one_run(matrix, panel, tile.area.r0, tile.area.c0, (int)(tile.area.c1 - tile.area.c0),
                             tile.nonfinite, tile.exact, run);
    else
        snipi_encode_parts(matrix, panel, &tile);
}

// Peaks, scales, codes.
static void snipi_quantize_batch(const snipi_matrix *matrix, snipi_panel *panel, snipi_batch *batch,
                                 snipi_tally *tally) {
    const int64_t row = batch->tile_row * matrix->tile_rows, col = batch->tile_col * matrix->tile_cols;
    snipi_strip strip;
    if (batch->strips) {
        const snipi_floats floats = snipi_fetch(matrix, panel, row, col, (int)batch->cols);
        snipi_strip_at(matrix, &floats, row, col, (int)batch->rows, batch->cols, tally, &strip);
        strip.width = (int)matrix->tile_cols;
        strip.log2_width = matrix->log2_cols;
        strip.runs = batch->across;
        strip.scale = batch->scale;
        strip.inverse = batch->inverse;
        if (matrix->transposed)
            strip.ahead = snipi_ahead_turned(matrix, row, col);
        else if (batch->down > 1)
            strip.ahead = snipi_ahead(matrix, row, col, batch->rows);
        else {
            strip.ahead = snipi_ahead(matrix, row, col, 0) + SNIPI_AHEAD_STRIP;
            strip.fetched = 1;
        }
    }
    snipi_batch_peaks(matrix, panel, &strip, batch);
    tally->nonfinite += batch->nonfinite;
    tally->amax = batch->most > tally->amax ? batch->most : tally->amax;
    snipi_batch_scales(matrix, batch);
    snipi_batch_store(matrix, batch);
    if (batch->strips && batch->regular) {
        strip.capped = batch->capped;
        snipi_encode_strip(matrix, &strip, row, col);
        return;
    }
    snipi_run run = matrix->run;
    run.tally = tally;
    for (int d = 0; d < batch->down; d++)
        for (int a = 0; a < batch->across; a++) snipi_encode_tile(matrix, panel, batch, d, a, &run);
}

// Tiles to a batch that are no strips, of `left`.
static int snipi_batch_tiles(const snipi_matrix *matrix, int64_t left) {
    const int64_t fit = snipi_max(1, SNIPI_BATCH_ELEMENTS / matrix->tile_rows / matrix->tile_cols);
    return (int)snipi_min(left, snipi_min(SNIPI_BATCH, fit));
}

// Elements of a row that a strip takes, of `left`: whole tiles and a multiple of 64, or all to the end. 0: none.
static int64_t snipi_strip_length(const snipi_matrix *matrix, int64_t left) {
    const int64_t unit = snipi_max(64, matrix->tile_cols);  // a power of two
    if (!matrix->strips) return 0;
    if (left <= SNIPI_STRIP && left % 64 == 0) return left;
    return snipi_min(SNIPI_STRIP, left) & -unit;
}

// Tiles [tr0, tr1) x [tc0, tc1) of a source that lies as it is quantized, row by row. Short rows are taken together.
static void snipi_quantize_straight(const snipi_matrix *matrix, snipi_panel *panel, int64_t tr0, int64_t tr1,
                                    int64_t tc0, int64_t tc1, snipi_tally *tally) {
    const int64_t end = snipi_min(tc1 * matrix->tile_cols, matrix->cols);
    const int row_by_row = matrix->x_bf16 || (matrix->run.stochastic && matrix->cols % 4 != 0);
    snipi_batch batch;
    for (batch.tile_row = tr0; batch.tile_row < tr1; batch.tile_row += batch.down) {
        const int64_t rows_left = matrix->rows - batch.tile_row * matrix->tile_rows;
        batch.down = 1;
        for (batch.tile_col = tc0; batch.tile_col < tc1; batch.tile_col += batch.across) {
            const int64_t left = end - batch.tile_col * matrix->tile_cols, length = snipi_strip_length(matrix, left);
            batch.strips = length > 0;
            if (batch.strips) {
                batch.cols = length;
                batch.across = (int)((length + matrix->tile_cols - 1) >> matrix->log2_cols);
                if (length == end - tc0 * matrix->tile_cols && !row_by_row)
                    batch.down = (int)snipi_min(matrix->blocks ? (int64_t)SNIPI_STRIP_ROWS : SNIPI_STRIP / length,
                                                tr1 - batch.tile_row);
            } else {
                batch.across = snipi_batch_tiles(matrix, tc1 - batch.tile_col);
                batch.cols = snipi_min(left, batch.across * matrix->tile_cols);
            }
            batch.rows = snipi_min(rows_left, batch.down * matrix->tile_rows);
            snipi_quantize_batch(matrix, panel, &batch, tally);
        }
    }
}

// The same of a transposed source: groups of SNIPI_ORDER_ROWS rows, each column of tiles from top to bottom. Strips are
// what a panel holds; where no sums are wanted, of several columns of tiles.
static void snipi_quantize_turned(const snipi_matrix *matrix, snipi_panel *panel, int64_t tr0, int64_t tr1, int64_t tc0,
                                  int64_t tc1, snipi_tally *tally) {
    const int64_t group = snipi_max(1, SNIPI_ORDER_ROWS / matrix->tile_rows);
    const int64_t end = snipi_min(tc1 * matrix->tile_cols, matrix->cols);
    const int height = snipi_matrix_panel_rows(matrix);
    snipi_batch batch;
    for (int64_t top = tr0; top < tr1; top += group)
        for (batch.tile_col = tc0; batch.tile_col < tc1; batch.tile_col += batch.across) {
            const int64_t bottom = snipi_min(tr1, top + group), left = end - batch.tile_col * matrix->tile_cols;
            batch.cols = snipi_min(left, matrix->want_sums ? matrix->tile_cols : (int64_t)SNIPI_RUN);
            batch.strips = matrix->strips && batch.cols % 64 == 0;
            if (!batch.strips) batch.cols = snipi_min(left, matrix->tile_cols);
            batch.across = (int)snipi_ceil_div(batch.cols, matrix->tile_cols);
            for (batch.tile_row = top; batch.tile_row < bottom; batch.tile_row += batch.down) {
                if (batch.strips)
                    batch.down = (int)snipi_min(bottom - batch.tile_row, height - batch.tile_row % height);
                else
                    batch.down = snipi_batch_tiles(matrix, bottom - batch.tile_row);
                batch.rows = snipi_min(matrix->rows - batch.tile_row * matrix->tile_rows,
                                       batch.down * matrix->tile_rows);
                snipi_quantize_batch(matrix, panel, &batch, tally);
            }
        }
}

static void snipi_quantize_region(const snipi_matrix *matrix, snipi_panel *panel, int64_t tr0, int64_t tr1, int64_t tc0,
                                  int64_t tc1, snipi_tally *tally) {
    if (matrix->transposed)
        snipi_quantize_turned(matrix, panel, tr0, tr1, tc0, tc1, tally);
    else
        snipi_quantize_straight(matrix, panel, tr0, tr1, tc0, tc1, tally);
}

// A run of F32 or BF16: no scale, no tiles.
static void snipi_quantize_plain_run(const snipi_matrix *matrix, snipi_panel *panel, int64_t r, int64_t c, int n,
                                     snipi_tally *tally) {
    const snipi_vector *vector = matrix->vector;
    const int64_t at = r * matrix->cols + c, at_out = r * matrix->ld_out + c;
    const snipi_floats floats = snipi_fetch(matrix, panel, r, c, n);
    const float *values = floats.x;
    float wide[SNIPI_RUN];
    uint16_t narrow[SNIPI_RUN];
    int64_t bad = 0;
    const uint32_t amax = vector->amax(floats.x, n, &bad);
    tally->nonfinite += bad;
    if (amax > tally->amax) tally->amax = amax;
    if (matrix->recipe.format == SNIP_BF16 && amax >= SNIPI_BF16_BEYOND)
        for (int i = 0; i < n; i++) {
            const uint32_t a = snipi_bits(floats.x[i]) & 0x7FFFFFFFu;
            tally->saturated += a >= SNIPI_BF16_BEYOND && a < 0x7F800000u;
        }
    if (matrix->recipe.format == SNIP_BF16) {
        const int in_place = matrix->codes && ((uintptr_t)matrix->codes & 1) == 0;
        uint16_t *to = in_place ? (uint16_t *)matrix->codes + at : narrow;
        vector->narrow(floats.x, n, to);
        if (matrix->want_sums || matrix->out) {
            vector->widen(to, n, wide);
            values = wide;
        }
        if (matrix->codes && !in_place) memcpy((uint8_t *)matrix->codes + 2 * at, narrow, (size_t)n * sizeof(uint16_t));
    } else if (matrix->codes)
        memcpy((uint8_t *)matrix->codes + 4 * at, floats.x, (size_t)n * sizeof(float));
    if (matrix->want_sums) (bad ? snipi_sums_exact : vector->sums)(floats.x, values, floats.weight, n, tally);
    if (!matrix->out) return;
    if (matrix->out_bf16)
        vector->narrow(values, n, (uint16_t *)matrix->out + at_out);
    else
        memmove((float *)matrix->out + at_out, values, (size_t)n * sizeof(float));
}

SNIPI_HD static int snipi_plain(snip_format f) { return f == SNIP_F32 || f == SNIP_BF16; }

static int snipi_recipe_ok(const snip_recipe *r) {
    if (!r || r->tile_rows < 0 || r->tile_cols < 0) return 0;
    if (r->format < SNIP_F32 || r->format > SNIP_E3M2) return 0;
    if ((int)r->scale < SNIP_SCALE_NONE || r->scale > SNIP_SCALE_UE8M0_UP) return 0;
    if (r->rounding != SNIP_ROUND_NEAREST_EVEN && r->rounding != SNIP_ROUND_STOCHASTIC) return 0;
    if (snipi_plain(r->format)) return r->scale == SNIP_SCALE_NONE && r->rounding == SNIP_ROUND_NEAREST_EVEN;
    return r->scale != SNIP_SCALE_UE4M3 || r->format == SNIP_E2M1;
}

SNIPI_HD static int64_t snipi_tile(int32_t tile, int64_t dimension) { return tile ? tile : snipi_max(1, dimension); }

static int64_t snipi_tiles(const snip_recipe *r, int64_t rows, int64_t cols) {
    return snipi_ceil_div(rows, snipi_tile(r->tile_rows, rows)) * snipi_ceil_div(cols, snipi_tile(r->tile_cols, cols));
}

SNIP_API size_t snip_codes_bound(const snip_recipe *r, int64_t rows, int64_t cols) {
    if (!snipi_recipe_ok(r) || !snipi_shape_ok(rows, cols, cols)) return 0;
    return (size_t)rows * snipi_row_bytes(r->format, cols);
}

SNIP_API size_t snip_scales_bound(const snip_recipe *r, int64_t rows, int64_t cols) {
    if (!snipi_recipe_ok(r) || !snipi_shape_ok(rows, cols, cols)) return 0;
    const size_t tiles = (size_t)snipi_tiles(r, rows, cols);
    switch (r->scale) {
        case SNIP_SCALE_NONE: return 0;
        case SNIP_SCALE_F32:
        case SNIP_SCALE_POW2: return tiles * sizeof(float);
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE8M0_UP: return tiles;
        case SNIP_SCALE_UE4M3: return (tiles + 3) / 4 * 4 + sizeof(float);
    }
    return 0;
}

static void *snipi_tensor_scale_at(const snip_recipe *r, const void *scales, int64_t rows, int64_t cols) {
    return (char *)(uintptr_t)scales + snip_scales_bound(r, rows, cols) - sizeof(float);
}

// Codes and values are rounded to nearest whatever mode the host has set, in the thread that called and in all others.
static int snipi_round_to_nearest(void) {
    const int mode = fegetround();
    if (mode != FE_TONEAREST) (void)fesetround(FE_TONEAREST);
    return mode;
}

static void snipi_round_as_before(int mode) {
    if (mode != FE_TONEAREST) (void)fesetround(mode);
}

typedef struct {
    void (*chunk)(void *, int64_t);
    void *arg;
} snipi_rounded;

static void snipi_rounded_chunk(void *arg, int64_t c) {
    const snipi_rounded *rounded = (const snipi_rounded *)arg;
    const int mode = snipi_round_to_nearest();
    rounded->chunk(rounded->arg, c);
    snipi_round_as_before(mode);
}

static void snipi_share_rounded(void (*chunk)(void *, int64_t), void *arg, int64_t chunks, int64_t elements) {
    const int mode = snipi_round_to_nearest();
    snipi_rounded rounded;
    rounded.chunk = chunk;
    rounded.arg = arg;
    if (elements < SNIPI_WORTH)  // in this thread alone
        snipi_share(chunk, arg, chunks, elements);
    else
        snipi_share(snipi_rounded_chunk, &rounded, chunks, elements);
    snipi_round_as_before(mode);
}

typedef struct {
    const snipi_matrix *matrix;
    uint32_t part[SNIPI_CHUNKS];
} snipi_peak;

static void snipi_peak_chunk(void *arg, int64_t c) {
    snipi_peak *peak = (snipi_peak *)arg;
    const snipi_matrix *matrix = peak->matrix;
    const int64_t lines = matrix->transposed ? matrix->cols : matrix->rows;
    const int64_t length = matrix->transposed ? matrix->rows : matrix->cols;
    const int64_t end = lines * (c + 1) / SNIPI_CHUNKS;
    const int64_t first = lines * c / SNIPI_CHUNKS;
    int64_t ignored = 0;
    peak->part[c] = snipi_source_peak(matrix, first * matrix->ld, end - first, length, &ignored);
}

// NVFP4: S = 448 * 6 / amax of the tensor (1 for zeros), at most FLT_MAX; stored as 1/S.
static void snipi_tensor_scale(snipi_matrix *matrix) {
    snipi_peak peak;
    uint32_t amax = 0;
    peak.matrix = matrix;
    snipi_share(snipi_peak_chunk, &peak, SNIPI_CHUNKS, matrix->rows * matrix->cols);
    for (int c = 0; c < SNIPI_CHUNKS; c++) amax = peak.part[c] > amax ? peak.part[c] : amax;
    const int mode = snipi_round_to_nearest();
    matrix->tensor_inverse = amax ? snipi_divide(448.0f * 6.0f, snipi_float(amax)) : 1.0f;
    matrix->tensor_scale = snipi_divide(1.0f, matrix->tensor_inverse);
    snipi_round_as_before(mode);
    if (matrix->scales) {
        const size_t tiles = (size_t)(matrix->tiles_down * matrix->tiles_across);
        memset((uint8_t *)matrix->scales + tiles, 0, (4 - tiles % 4) % 4);
        memcpy(snipi_tensor_scale_at(&matrix->recipe, matrix->scales, matrix->rows, matrix->cols),
               &matrix->tensor_scale, sizeof(float));
    }
}

static void snipi_run_begin(snipi_run *run, snip_format format, int stochastic) {
    const snipi_element e = snipi_element_of(format);
    const int32_t max_bits = (int32_t)snipi_bits(e.max), shift = 23 - e.mantissa;
    run->format = format;
    run->e = e;
    run->packed = format == SNIP_E2M1;
    run->stochastic = stochastic;
    run->k.least = (128 - e.bias) << 23;
    run->k.cap = max_bits + (stochastic ? 1 << 23 : 0);
    run->k.beyond = max_bits + (1 << (shift - 1)) - (int32_t)(e.largest & 1u);  // a tie goes to an even largest
    run->k.magic = (shift << 23) - (run->k.least >> shift);
    run->k.unit = e.mantissa << 23;
    run->k.shift = shift;
    run->k.sign_shift = 31 - e.sign;
    run->k.sign = 1 << e.sign;
    run->k.random_shift = 32 - shift;
    memset(run->k.power, 0, sizeof run->k.power);
    for (int32_t i = run->k.least >> 23; i <= run->k.cap >> 23; i++)
        run->k.power[i & 31] = (i << 23) + run->k.magic + ((i << 23) >> shift);
}

static void snipi_matrix_begin(snipi_matrix *matrix) {
    const snip_recipe *recipe = &matrix->recipe;
    const int plain = snipi_plain(recipe->format), sign = 1 << snipi_element_of(recipe->format).sign;
    matrix->tile_rows = plain ? 1 : snipi_tile(recipe->tile_rows, matrix->rows);
    matrix->tile_cols = snipi_tile(recipe->tile_cols, matrix->cols);
    matrix->tiles_down = snipi_ceil_div(matrix->rows, matrix->tile_rows);
    matrix->tiles_across = snipi_ceil_div(matrix->cols, matrix->tile_cols);
    matrix->row_bytes = snipi_row_bytes(recipe->format, matrix->cols);
    const int64_t width = matrix->tile_cols;
    matrix->strips = matrix->vector->strip && matrix->tile_rows == 1 &&
                     (width == 16 || width == 32 || width == 64 || width == SNIPI_RUN) &&
                     !(matrix->out && matrix->out_bf16);
    while (matrix->strips && 1 << matrix->log2_cols < width) matrix->log2_cols++;
    snipi_run_begin(&matrix->run, recipe->format, recipe->rounding == SNIP_ROUND_STOCHASTIC);
    matrix->run.lut = matrix->lut;
    matrix->run.want_sums = matrix->want_sums;
    matrix->run.stream = matrix->x != matrix->out && matrix->rows * matrix->cols >= SNIPI_STREAM;
    for (int c = 0; c < sign && !plain; c++) {
        matrix->lut[c] = snipi_decode((uint32_t)c, recipe->format);
        matrix->lut[c | sign] = snipi_float(snipi_bits(matrix->lut[c]) | 0x80000000u);
    }
    if (recipe->scale == SNIP_SCALE_UE4M3) snipi_tensor_scale(matrix);
}

// What is shared out in chunks: bands of one matrix, or blocks of one or two.
typedef struct {
    const snipi_matrix *matrix[2];  // the second may be NULL
    int64_t rows, cols;             // of the source, for blocks
    int64_t first;                  // chunk that part[0] belongs to
    snipi_tally *part[2];           // of each chunk, or NULL
} snipi_quantize_task;

// Rows of tiles, from left to right. A transposed source is read a cache line of columns at a time: rows are taken in
// groups.
static void snipi_quantize_bands_chunk(void *arg, int64_t c) {
    snipi_quantize_task *task = (snipi_quantize_task *)arg;
    const snipi_matrix *matrix = task->matrix[0];
    const int64_t group = matrix->transposed ? snipi_max(1, SNIPI_ORDER_ROWS / matrix->tile_rows) : 1;
    const int64_t groups = snipi_ceil_div(matrix->tiles_down, group);
    const int64_t first = groups * c / SNIPI_CHUNKS * group;
    const int64_t end = snipi_min(matrix->tiles_down, groups * (c + 1) / SNIPI_CHUNKS * group);
    snipi_tally tally;
    snipi_panel panel;
    memset(&tally, 0, sizeof tally);
    snipi_panel_begin(&panel);
    if (!snipi_plain(matrix->recipe.format))
        snipi_quantize_region(matrix, &panel, first, end, 0, matrix->tiles_across, &tally);
    else
        for (int64_t r = first; r < end; r++)
            for (int64_t col = 0; col < matrix->cols; col += SNIPI_RUN)
                snipi_quantize_plain_run(matrix, &panel, r, col, (int)snipi_min(SNIPI_RUN, matrix->cols - col), &tally);
    if (matrix->run.stream) snipi_stream_end();
    if (task->part[0]) task->part[0][c] = tally;
}

static int snipi_fits_blocks(const snipi_matrix *matrix) {
    return !snipi_plain(matrix->recipe.format) && SNIPI_RUN % matrix->tile_rows == 0 &&
           SNIPI_RUN % matrix->tile_cols == 0;
}

// The tiles of a matrix in the block at (r0, c0) of the source.
static void snipi_quantize_block(const snipi_matrix *matrix, snipi_panel *panel, int64_t r0, int64_t c0,
                                 snipi_tally *tally) {
    const int64_t row = matrix->transposed ? c0 : r0, col = matrix->transposed ? r0 : c0;
    const int64_t last_row = snipi_min(matrix->tiles_down, (row + SNIPI_RUN) / matrix->tile_rows);
    const int64_t last_col = snipi_min(matrix->tiles_across, (col + SNIPI_RUN) / matrix->tile_cols);
    panel->row = -1;
    snipi_quantize_region(matrix, panel, row / matrix->tile_rows, last_row, col / matrix->tile_cols, last_col, tally);
}

// One read of the source for one or two matrices, in blocks of SNIPI_RUN x SNIPI_RUN, which the second-level cache
// holds. Two blocks are taken one below the other, so that pages of the transposed codes are met half as often.
static void snipi_quantize_blocks_chunk(void *arg, int64_t c) {
    snipi_quantize_task *task = (snipi_quantize_task *)arg;
    const int64_t across = snipi_ceil_div(task->cols, SNIPI_RUN), down = snipi_ceil_div(task->rows, SNIPI_RUN);
    const int64_t chunk = task->first + c, end = across * down * (chunk + 1) / SNIPI_CHUNKS;
    snipi_tally tally[2];
    snipi_panel panel;
    memset(tally, 0, sizeof tally);
    snipi_panel_begin(&panel);
    for (int64_t b = across * down * chunk / SNIPI_CHUNKS; b < end; b++) {
        const int64_t band = b / (2 * across), in_band = b % (2 * across), high = snipi_min(2, down - 2 * band);
        const int64_t r0 = (2 * band + in_band % high) * SNIPI_RUN, c0 = in_band / high * SNIPI_RUN;
        for (int i = 0; i < 2; i++)
            if (task->matrix[i]) snipi_quantize_block(task->matrix[i], &panel, r0, c0, &tally[i]);
    }
    if (task->matrix[0]->run.stream) snipi_stream_end();
    for (int i = 0; i < 2; i++)
        if (task->part[i]) task->part[i][c] = tally[i];
}

// Adds up lanes and chunks in order.
static void snipi_add_tallies(const snipi_tally *part, int chunks, snip_quant_stats *stats) {
    for (int c = 0; c < chunks; c++) {
        for (int i = 0; i < SNIPI_LANES; i++) {
            stats->sum_sq += part[c].sum_sq[i];
            stats->err_sq += part[c].err_sq[i];
            stats->dot += part[c].dot[i];
        }
        if (part[c].amax > snipi_bits(stats->amax)) stats->amax = snipi_float(part[c].amax);
        stats->nonfinite += part[c].nonfinite;
        stats->saturated += part[c].saturated;
    }
}

// The statistics of two matrices take turns of half the chunks, so that the tallies of one matrix fit on the stack.
SNIPI_NOINLINE static void snipi_quantize_shared(snipi_quantize_task *task, void (*chunk)(void *, int64_t),
                                                 snip_quant_stats *const stats[2]) {
    snipi_tally part[SNIPI_CHUNKS];
    const int chunks = stats[0] && stats[1] ? SNIPI_CHUNKS / 2 : SNIPI_CHUNKS;
    task->part[0] = stats[0] ? part : NULL;
    task->part[1] = stats[1] ? part + SNIPI_CHUNKS - chunks : NULL;
    const int mode = snipi_round_to_nearest();
    for (task->first = 0; task->first < SNIPI_CHUNKS; task->first += chunks) {
        snipi_share_rounded(chunk, task, chunks, task->matrix[0]->rows * task->matrix[0]->cols);
        for (int i = 0; i < 2; i++)
            if (stats[i]) snipi_add_tallies(task->part[i], chunks, stats[i]);
    }
    snipi_round_as_before(mode);
}

static int snipi_element_size(snip_format f) { return f == 0 || f == SNIP_F32 ? 4 : f == SNIP_BF16 ? 2 : 0; }

// The job's matrix, transposed or not. sums: not the counts and amax alone.
static void snipi_matrix_of(const snip_quantize_job *job, int transposed, int sums, snipi_matrix *matrix) {
    memset(matrix, 0, sizeof *matrix);
    matrix->recipe = transposed ? *job->recipe_t : *job->recipe;
    matrix->x = job->x;
    matrix->weight = job->weight;
    matrix->x_bf16 = job->x_format == SNIP_BF16;
    matrix->transposed = transposed;
    matrix->rows = transposed ? job->cols : job->rows;
    matrix->cols = transposed ? job->rows : job->cols;
    matrix->ld = job->ld;
    matrix->codes = transposed ? job->codes_t : job->codes;
    matrix->scales = transposed ? job->scales_t : job->scales;
    matrix->out = transposed ? NULL : job->out;
    matrix->out_bf16 = job->out_format == SNIP_BF16;
    matrix->ld_out = job->ld_out;
    matrix->key = job->key;
    matrix->want_sums = sums;
    matrix->vector = snipi_vector_of(job->isa);
    snipi_matrix_begin(matrix);
}

static void snipi_quantize_one(snipi_matrix *matrix, snip_quant_stats *stats, const snip_quantize_job *job) {
    snip_quant_stats *const both[2] = { stats, NULL };
    snipi_quantize_task task;
    memset(&task, 0, sizeof task);
    task.matrix[0] = matrix;
    task.rows = job->rows;
    task.cols = job->cols;
    matrix->blocks = matrix->transposed && snipi_fits_blocks(matrix);
    snipi_quantize_shared(&task, matrix->blocks ? snipi_quantize_blocks_chunk : snipi_quantize_bands_chunk, both);
}

// Either orientation, or both; sums: not the counts and amax alone.
static void snipi_quantize_job(const snip_quantize_job *job, int sums, snip_quant_stats *stats,
                               snip_quant_stats *stats_t) {
    snip_quant_stats *const both[2] = { stats, stats_t };
    snipi_matrix straight, turned;
    if (stats) memset(stats, 0, sizeof *stats);
    if (stats_t) memset(stats_t, 0, sizeof *stats_t);
    if (job->rows == 0 || job->cols == 0) return;
    if (job->recipe) snipi_matrix_of(job, 0, sums && stats, &straight);
    if (job->recipe_t) snipi_matrix_of(job, 1, sums && stats_t, &turned);
    if (job->recipe && job->recipe_t && job->x != job->out && snipi_fits_blocks(&straight) &&
        snipi_fits_blocks(&turned)) {
        snipi_quantize_task task;
        memset(&task, 0, sizeof task);
        task.matrix[0] = &straight;
        task.matrix[1] = &turned;
        task.rows = job->rows;
        task.cols = job->cols;
        straight.blocks = turned.blocks = 1;
        snipi_quantize_shared(&task, snipi_quantize_blocks_chunk, both);
        return;
    }
    if (job->recipe_t) snipi_quantize_one(&turned, stats_t, job);  // first, as out may be x
    if (job->recipe) snipi_quantize_one(&straight, stats, job);
}

static snip_status snipi_job_check(const snip_quantize_job *job) {
    int i;
    if (!job || (!job->recipe && !job->recipe_t) || !snipi_shape_ok(job->rows, job->cols, job->ld))
        return SNIP_BAD_ARGUMENT;
    if ((int)job->isa < 0 || job->isa >= SNIP_ISA_COUNT) return SNIP_BAD_ARGUMENT;
    if (!snipi_element_size(job->x_format) || !snipi_element_size(job->out_format)) return SNIP_BAD_ARGUMENT;
    if (job->out && (!job->recipe || !snipi_shape_ok(job->rows, job->cols, job->ld_out))) return SNIP_BAD_ARGUMENT;
    if (job->out && job->out == job->x &&
        (job->ld_out != job->ld || (job->x_format == SNIP_BF16) != (job->out_format == SNIP_BF16)))
        return SNIP_BAD_ARGUMENT;
    for (i = 0; i < 2; i++) {
        const snip_recipe *recipe = i ? job->recipe_t : job->recipe;
        const void *codes = i ? job->codes_t : job->codes, *scales = i ? job->scales_t : job->scales;
        if (!recipe && (codes || scales)) return SNIP_BAD_ARGUMENT;
        if (recipe && !snipi_recipe_ok(recipe)) return SNIP_BAD_ARGUMENT;
        if (recipe && codes && !scales && recipe->scale != SNIP_SCALE_NONE && job->rows && job->cols)
            return SNIP_BAD_ARGUMENT;
    }
    if (!job->x && job->rows > 0 && job->cols > 0) return SNIP_BAD_ARGUMENT;
    return SNIP_OK;
}

SNIP_API snip_status snip_quantize_with(const snip_quantize_job *job, snip_quant_stats *stats,
                                        snip_quant_stats *stats_t) {
    snip_status status = snipi_job_check(job);
    if (status) return status;
    if (!snip_isa_available(job->isa)) return SNIP_UNSUPPORTED;
    snipi_quantize_job(job, 1, stats, stats_t);
    return SNIP_OK;
}

static snip_quantize_job snipi_job(const float *x, int64_t rows, int64_t cols, int64_t ld, snip_rng_key key,
                                   const float *weight) {
    snip_quantize_job job;
    memset(&job, 0, sizeof job);
    job.x = x;
    job.weight = weight;
    job.rows = rows;
    job.cols = cols;
    job.ld = ld;
    job.key = key;
    return job;
}

SNIP_API snip_status snip_quantize(const snip_recipe *recipe, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, snip_rng_key key, const float *weight,
                                   snip_quant_stats *stats) {
    snip_quantize_job job = snipi_job(x, rows, cols, ld, key, weight);
    if (!codes && rows > 0 && cols > 0) return SNIP_BAD_ARGUMENT;
    job.recipe = recipe;
    job.codes = codes;
    job.scales = scales;
    return snip_quantize_with(&job, stats, NULL);
}

SNIP_API snip_status snip_quantize_transposed(const snip_recipe *recipe, const float *x, int64_t rows, int64_t cols,
                                              int64_t ld, void *codes, void *scales, snip_rng_key key,
                                              const float *weight, snip_quant_stats *stats) {
    snip_quantize_job job = snipi_job(x, rows, cols, ld, key, weight);
    if (!codes && rows > 0 && cols > 0) return SNIP_BAD_ARGUMENT;
    job.recipe_t = recipe;
    job.codes_t = codes;
    job.scales_t = scales;
    return snip_quantize_with(&job, NULL, stats);
}

SNIP_API snip_status snip_quantize_both(const snip_recipe *recipe, const snip_recipe *recipe_t, const float *x,
                                        int64_t rows, int64_t cols, int64_t ld, void *codes, void *scales,
                                        void *codes_t, void *scales_t, snip_rng_key key, snip_quant_stats *stats) {
    snip_quantize_job job = snipi_job(x, rows, cols, ld, key, NULL);
    if (!recipe || !recipe_t || ((!codes || !codes_t) && rows > 0 && cols > 0)) return SNIP_BAD_ARGUMENT;
    job.recipe = recipe;
    job.codes = codes;
    job.scales = scales;
    job.recipe_t = recipe_t;
    job.codes_t = codes_t;
    job.scales_t = scales_t;
    return snip_quantize_with(&job, stats, NULL);
}

// For the session: codes of a logical [rows][cols] matrix with a row and a column stride, one of them 1.
static snip_status snipi_quantize_to_codes(const snip_recipe *recipe, const float *x, int64_t rows, int64_t cols,
                                           int64_t row_stride, int64_t col_stride, void *codes, void *scales,
                                           snip_rng_key key, const float *weight, snip_quant_stats *stats,
                                           int want_sums) {
    int turned = col_stride != 1;
    snip_quantize_job job = snipi_job(x, turned ? cols : rows, turned ? rows : cols, turned ? col_stride : row_stride,
                                      key, weight);
    if (rows > 0 && cols > 0 && (!codes || (!scales && recipe->scale != SNIP_SCALE_NONE))) return SNIP_BAD_ARGUMENT;
    *(turned ? &job.recipe_t : &job.recipe) = recipe;
    *(turned ? &job.codes_t : &job.codes) = codes;
    *(turned ? &job.scales_t : &job.scales) = scales;
    snipi_quantize_job(&job, want_sums, turned ? NULL : stats, turned ? stats : NULL);
    return SNIP_OK;
}

SNIP_API snip_status snip_fake_quantize(const snip_recipe *recipe, const float *x, int64_t rows, int64_t cols,
                                        int64_t ld, float *out, int64_t ld_out, snip_rng_key key, const float *weight,
                                        snip_quant_stats *stats) {
    snip_quantize_job job = snipi_job(x, rows, cols, ld, key, weight);
    if (!recipe) return SNIP_BAD_ARGUMENT;
    job.recipe = recipe;
    job.out = out;
    job.ld_out = ld_out;
    return snip_quantize_with(&job, stats, NULL);
}

// Reads scales and codes of a quantized [rows][cols] matrix.
typedef struct {
    const snip_recipe *recipe;
    const uint8_t *codes;
    const void *scales;
    size_t row_bytes;
    int64_t tile_rows, tile_cols, tiles_across;
    float tensor_scale, lut[256];
    const snipi_vector *vector;
    int stream;  // the output, past the caches
} snipi_reader;

static void snipi_reader_init(snipi_reader *reader, const snip_recipe *recipe, const void *codes, const void *scales,
                              int64_t rows, int64_t cols) {
    int c;
    reader->recipe = recipe;
    reader->codes = (const uint8_t *)codes;
    reader->scales = scales;
    reader->row_bytes = snipi_row_bytes(recipe->format, cols);
    reader->tile_rows = snipi_tile(recipe->tile_rows, rows);
    reader->tile_cols = snipi_tile(recipe->tile_cols, cols);
    reader->tiles_across = snipi_ceil_div(cols, reader->tile_cols);
    reader->tensor_scale = 1.0f;
    reader->stream = 0;
    reader->vector = snipi_vector_of(SNIP_ISA_BEST);
    if (recipe->scale == SNIP_SCALE_UE4M3)
        memcpy(&reader->tensor_scale, snipi_tensor_scale_at(recipe, scales, rows, cols), sizeof(float));
    if (!snipi_plain(recipe->format))
        for (c = 0; c < (recipe->format == SNIP_E2M1 ? 16 : 256); c++)
            reader->lut[c] = snipi_decode((uint32_t)c, recipe->format);
}

static float snipi_reader_scale(const snipi_reader *reader, int64_t row, int64_t tile_col) {
    int64_t i = (reader->tile_rows == 1 ? row : row / reader->tile_rows) * reader->tiles_across + tile_col;
    switch (reader->recipe->scale) {
        case SNIP_SCALE_NONE: break;
        case SNIP_SCALE_F32:
        case SNIP_SCALE_POW2: return ((const float *)reader->scales)[i];
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE8M0_UP: return snip_ue8m0_to_f32(((const uint8_t *)reader->scales)[i]);
        case SNIP_SCALE_UE4M3:
            return snipi_multiply(snip_ue4m3_to_f32(((const uint8_t *)reader->scales)[i]), reader->tensor_scale);
    }
    return 1.0f;
}

// Elements [c0, c0 + n) of a row to out, `stride` apart.
static void snipi_reader_row(const snipi_reader *reader, int64_t row, int64_t c0, int64_t n, float *out,
                             int64_t stride) {
    const uint8_t *codes = reader->codes + (size_t)row * reader->row_bytes;
    int64_t c = c0, end = c0 + n;
    if (reader->recipe->format == SNIP_BF16 && stride == 1)
        for (; c < end; c += SNIPI_RUN, out += SNIPI_RUN)
            reader->vector->widen((const uint16_t *)(const void *)codes + c, (int)snipi_min(SNIPI_RUN, end - c), out);
    if (reader->recipe->format == SNIP_F32) {
        for (; c < end; c++, out += stride) *out = ((const float *)(const void *)codes)[c];
        return;
    }
    if (reader->recipe->format == SNIP_BF16) {
        for (; c < end; c++, out += stride) *out = snip_bf16_to_f32(((const uint16_t *)(const void *)codes)[c]);
        return;
    }
    while (c < end) {
        int64_t tile = c / reader->tile_cols, stop = snipi_min(end, (tile + 1) * reader->tile_cols);
        float scale = snipi_reader_scale(reader, row, tile);
        int packed = reader->recipe->format == SNIP_E2M1;
        if (stride == 1 && !(packed && (c & 1))) {
            int part = (int)snipi_min(stop - c, 1 << 20);
            reader->vector->decode(reader->recipe->format, reader->lut, codes + (packed ? c >> 1 : c), part, scale, out,
                                   reader->stream);
            c += part;
            out += part;
        } else if (packed)
            for (; c < stop; c++, out += stride)
                *out = snipi_value(scale, reader->lut[codes[c >> 1] >> (c & 1) * 4 & 15]);
        else
            for (; c < stop; c++, out += stride) *out = snipi_value(scale, reader->lut[codes[c]]);
    }
}

typedef struct {
    snipi_reader reader;
    int64_t rows, cols, ld;
    float *x;
    uint16_t *x16;
} snipi_dequantize;  // x or x16

static void snipi_dequantize_chunk(void *arg, int64_t chunk) {
    const snipi_dequantize *task = (const snipi_dequantize *)arg;
    int64_t r, c, end = task->rows * (chunk + 1) / SNIPI_CHUNKS;
    float buffer[SNIPI_RUN];
    for (r = task->rows * chunk / SNIPI_CHUNKS; r < end; r++)
        if (task->x)
            snipi_reader_row(&task->reader, r, 0, task->cols, task->x + r * task->ld, 1);
        else
            for (c = 0; c < task->cols; c += SNIPI_RUN) {
                int n = (int)snipi_min(SNIPI_RUN, task->cols - c);
                snipi_reader_row(&task->reader, r, c, n, buffer, 1);
                task->reader.vector->narrow(buffer, n, task->x16 + r * task->ld + c);
            }
    snipi_stream_end();
}

static snip_status snipi_dequantize_to(const snip_recipe *recipe, const void *codes, const void *scales, int64_t rows,
                                       int64_t cols, float *x, uint16_t *x16, int64_t ld) {
    snipi_dequantize task;
    if (!snipi_recipe_ok(recipe) || !snipi_shape_ok(rows, cols, ld)) return SNIP_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return SNIP_OK;
    if (!codes || (!x && !x16) || (!scales && recipe->scale != SNIP_SCALE_NONE)) return SNIP_BAD_ARGUMENT;
    snipi_reader_init(&task.reader, recipe, codes, scales, rows, cols);
    task.reader.stream = x && rows * cols >= SNIPI_STREAM;
    task.rows = rows;
    task.cols = cols;
    task.ld = ld;
    task.x = x;
    task.x16 = x16;
    snipi_share_rounded(snipi_dequantize_chunk, &task, SNIPI_CHUNKS, rows * cols);
    return SNIP_OK;
}

SNIP_API snip_status snip_dequantize(const snip_recipe *recipe, const void *codes, const void *scales, int64_t rows,
                                     int64_t cols, float *x, int64_t ld) {
    return snipi_dequantize_to(recipe, codes, scales, rows, cols, x, NULL, ld);
}

SNIP_API snip_status snip_dequantize_bf16(const snip_recipe *recipe, const void *codes, const void *scales,
                                          int64_t rows, int64_t cols, uint16_t *x, int64_t ld) {
    return snipi_dequantize_to(recipe, codes, scales, rows, cols, NULL, x, ld);
}

// >>gemm-impl --------------------------------------------------------------------------------------
// The rows of both operands are packed into panels, one pass along k after the other, and a kernel makes the tile of C
// of one panel of A and one of B. There are three kinds of panels:
//
//   F32    dequantized floats, [k][rows].
//   S8     of two E2M1 operands: twice their values, integers of at most 12, and a scale for each row and block of k.
//          A's are stored plus 12: the byte products of AVX and NEON take them unsigned. `start` takes the 12s back:
//          the sums of a tile begin with start[j] = -12 * (sum of B's row j in the block).
//   BF16   of operands that bfloat16 holds exactly: their values, those of codes without the scales, which stand
//          beside as S8's do.
//
// S8 and BF16 panels are [step][rows], a step being four bytes of k: a lane of a vector. AMX multiplies signed bytes
// and reads A by rows. Its panels of A are [rows][step] without the 12s, and its blocks are padded with zeros to whole
// pieces (snipi_piece).
//
// Times below are bench_gemm's on a processor with 2 MiB of second-level cache.
enum {
    SNIPI_KC_F32 = 1024,      // k of a pass: 512 is 9% slower for FP8 codes
    SNIPI_KC_PLAIN = 512,     // k of a pass where both operands are F32 or BF16: 1024 is 2 to 6% slower
    SNIPI_KC_S8 = 2048,       // k of a pass: on AMX 1024 is 7%, 512 16% slower, and 4096 up to 7% on all sets
    SNIPI_KC_BF16 = 1024,     // k of a pass: on AMX 512 is up to 11% slower, 2048 no faster
    SNIPI_SUM_F32 = 256,      // k of one sum of floats: shorter sums are closer ones
    SNIPI_BLOCK_BF16 = 256,   // k of one sum of floats, for the same reason
    SNIPI_MIN_BLOCK = 16,     // k of a scale block, at least, where there are several: four steps
    SNIPI_S8_MOST = 1 << 23,  // k for S8, at most: its sums, up to 144 k, stay below 2^31
    SNIPI_MAX_ROWS = 32,      // rows of a panel, at most
    SNIPI_CHUNK_MOST = 8,     // panels of A, and of B, in a task, at most: of B's they fill a fourth of that cache
    SNIPI_CHUNK_LEAST = 2,    // the same for one of them, where a pass would have too few tasks
    SNIPI_TASKS = 128,        // too few: 64 threads should get two each
    SNIPI_PACK_K = 64,        // k that is packed at a time, of all rows of a panel: 8 KB of floats
    SNIPI_PAIRS = SNIPI_PACK_K / 2 * SNIPI_MAX_ROWS  // pairs of bfloat16 in so much
};

// The tile c[rows of a][rows of b], with `from` as each of its rows before the product, or with c itself where `from`
// is NULL. F32 panels: c += a[k][rows]^T * b[k][rows].
typedef void (*snipi_unscaled_kernel)(int64_t k, const float *a, const float *b, const float *from, float *c,
                                      int64_t ldc);

// Scaled panels of k bytes in blocks of `block` bytes: c[i][j] = fmaf(sa[i] * sb[j], sum[i][j], c[i][j]), block after
// block, with sa and sb [blocks][rows]. start [blocks][rows of b]: of S8, but for AMX.
typedef void (*snipi_scaled_kernel)(int64_t k, int64_t block, const uint8_t *a, const int8_t *b, const float *sa,
                                    const float *sb, const int32_t *start, const float *from, float *c, int64_t ldc);

typedef struct {
    int a, b;
} snipi_panel_rows;  // of A's panels and of B's

typedef struct {
    snipi_panel_rows f32_rows, s8_rows, bf16_rows;
    snipi_unscaled_kernel f32;
    snipi_scaled_kernel s8, bf16;  // bf16 may be NULL: no such units

    // Packing of S8. `steps` times two bytes of E2M1 codes of each row, row_bytes apart, to out[steps][panel_rows][4],
    // plus `offset`.
    void (*spread)(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps, int offset, uint8_t *out,
                   int panel_rows);
    void (*start)(const int8_t *b, int64_t steps, int panel_rows, int32_t *start);

    void (*round_floats)(float *x, int n);  // to bfloat16, in place: packing of F32 to be rounded

    // Packing of BF16, with bf16, n <= 64 elements at a time. round: floats. look_up: the values of codes; `table` has
    // those of the first 32. pair: elements of two rows, F32 or BF16, side by side; the second may be NULL for zeros.
    void (*round)(const float *x, int n, uint16_t *out);
    void (*look_up)(snip_format, const uint16_t *table, const float *lut, const uint8_t *codes, int n, uint16_t *out);
    void (*pair)(const void *first, const void *second, int bf16, int n, float *out);

    // AMX, else NULL. spread_rows: as spread, to out[rows][stride]. begin and end: before and after scaled kernels, in
    // the thread that runs them.
    void (*spread_rows)(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps, uint8_t *out, int64_t stride);
    void (*begin)(int64_t piece);
    void (*end)(void);
} snipi_kernels;

// From >>simd.
static snip_isa snipi_best_isa(void);
static snipi_kernels snipi_kernels_of(snip_isa isa);

// ---- the scalar kernels
enum { SNIPI_SCALAR_A = 4, SNIPI_SCALAR_B = 16 };  // rows of panels

static void snipi_kernel_f32_scalar(int64_t k, const float *a, const float *b, const float *from, float *c,
                                    int64_t ldc) {
    float sum[SNIPI_SCALAR_A][SNIPI_SCALAR_B];
    memset(sum, 0, sizeof sum);
    for (; k > 0; k--, a += SNIPI_SCALAR_A, b += SNIPI_SCALAR_B)
        for (int i = 0; i < SNIPI_SCALAR_A; i++)
            for (int j = 0; j < SNIPI_SCALAR_B; j++) sum[i][j] += a[i] * b[j];
    for (int i = 0; i < SNIPI_SCALAR_A; i++, c += ldc)
        for (int j = 0; j < SNIPI_SCALAR_B; j++) c[j] = (from ? from[j] : c[j]) + sum[i][j];
}

static void snipi_kernel_s8_scalar(int64_t k, int64_t block, const uint8_t *a, const int8_t *b, const float *sa,
                                   const float *sb, const int32_t *start, const float *from, float *c, int64_t ldc) {
    for (; k > 0; k -= block, from = NULL) {
        int32_t sum[SNIPI_SCALAR_A][SNIPI_SCALAR_B];
        for (int i = 0; i < SNIPI_SCALAR_A; i++) memcpy(sum[i], start, sizeof sum[i]);
        for (int64_t step = 0; step < snipi_min(block, k); step += 4, a += 4 * SNIPI_SCALAR_A, b += 4 * SNIPI_SCALAR_B)
            for (int i = 0; i < SNIPI_SCALAR_A; i++)
                for (int j = 0; j < SNIPI_SCALAR_B; j++)
                    for (int t = 0; t < 4; t++) sum[i][j] += (int32_t)a[4 * i + t] * b[4 * j + t];
        for (int i = 0; i < SNIPI_SCALAR_A; i++)
            for (int j = 0; j < SNIPI_SCALAR_B; j++) {
                float *to = c + i * ldc + j;
                *to = fmaf(sa[i] * sb[j], (float)sum[i][j], from ? from[j] : *to);
            }
        sa += SNIPI_SCALAR_A;
        sb += SNIPI_SCALAR_B;
        start += SNIPI_SCALAR_B;
    }
}

static const int8_t snipi_twice[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };  // of E2M1 codes

static void snipi_spread_scalar(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps, int offset,
                                uint8_t *out, int panel_rows) {
    for (int i = 0; i < rows; i++, codes += row_bytes, out += 4)
        for (int64_t t = 0; t < steps; t++)
            for (int j = 0; j < 4; j++) {
                const int code = codes[2 * t + j / 2] >> j % 2 * 4 & 15;
                out[4 * t * panel_rows + j] = (uint8_t)(snipi_twice[code] + offset);
            }
}

static void snipi_start_scalar(const int8_t *b, int64_t steps, int panel_rows, int32_t *start) {
    for (int i = 0; i < panel_rows; i++) {
        int32_t sum = 0;
        for (int64_t t = 0; t < steps; t++)
            for (int j = 0; j < 4; j++) sum += b[4 * (t * panel_rows + i) + j];
        start[i] = -12 * sum;
    }
}

static void snipi_round_floats_scalar(float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = snipi_float(snipi_bf16_round(snipi_bits(x[i])) << 16);
}

// ---- packing
// The next cache line: a buffer of n bytes takes n + 64.
static void *snipi_next_line(void *at) { return (char *)at + (64 - (uintptr_t)at % 64) % 64; }

typedef struct {  // an operand
    const snip_operand *operand;
    snipi_reader reader;
    int64_t rows, k, ld;
    int plain, bf16;  // F32 or BF16, read where the caller has it; BF16
} snipi_side;

static void snipi_side_init(snipi_side *side, const snip_operand *operand, int64_t rows, int64_t k) {
    side->operand = operand;
    side->rows = rows;
    side->k = k;
    side->ld = operand->ld ? operand->ld : operand->transposed ? rows : k;
    side->plain = snipi_plain(operand->recipe->format);
    side->bf16 = operand->recipe->format == SNIP_BF16;
    snipi_reader_init(&side->reader, operand->recipe, operand->codes, operand->scales, rows, k);
}

// Element `at` of an F32 or BF16 operand.
static const char *snipi_side_at(const snipi_side *side, int64_t at) {
    return (const char *)side->operand->codes + at * (side->bf16 ? 2 : 4);
}

// Elements [k0, k0 + n) of a row that lie together, as floats.
static void snipi_side_row(const snipi_side *side, int64_t row, int64_t k0, int n, float *out) {
    const int64_t at = row * side->ld + k0;
    if (!side->plain)
        snipi_reader_row(&side->reader, row, k0, n, out, 1);
    else if (side->bf16)
        side->reader.vector->widen((const uint16_t *)(const void *)snipi_side_at(side, at), n, out);
    else
        memcpy(out, snipi_side_at(side, at), (size_t)n * sizeof(float));
}

// A panel to be filled: rows [row0, row0 + used) of an operand, and zeros up to `rows`.
typedef struct {
    const snipi_side *side;
    int64_t row0;
    int used, rows;
    int element;                          // bytes: 1 S8, 2 BF16, 0 an F32 panel
    int offset;                           // of S8
    int by_rows;                          // scaled: [rows][step], for AMX; else [step][rows]
    int64_t step_distance, row_distance;  // so step t of row i lies at t * step_distance + i * row_distance
    int count;                            // whether F32 elements that are not finite are counted,
    int64_t nonfinite;                    // here
} snipi_gemm_panel;

// Counts what is not finite of x[n], which has just been read.
static void snipi_gemm_count(snipi_gemm_panel *panel, const float *x, int n) {
    panel->side->reader.vector->amax(x, n, &panel->nonfinite);
}

// Elements [k0, k0 + n), n <= SNIPI_PACK_K, of an operand that is stored [k][rows], to out[n][rows].
static void snipi_pack_f32_columns(const snipi_gemm_panel *panel, int64_t k0, int n, float *out) {
    const snipi_side *side = panel->side;
    const int used = panel->used, rows = panel->rows;
    for (int i = 0; i < n; i++, out += rows) {
        const void *x = snipi_side_at(side, panel->row0 + (k0 + i) * side->ld);
        int j = 0;
        if (side->bf16) {
            side->reader.vector->widen((const uint16_t *)x, used, out);
            j = used;
        }
        for (; j + 4 <= used; j += 4) memcpy(out + j, (const float *)x + j, 4 * sizeof(float));
        for (; j < used; j++) out[j] = ((const float *)x)[j];
        for (; j < rows; j++) out[j] = 0.0f;
    }
}

// The same of one that is stored [rows][k].
static void snipi_pack_f32_rows(const snipi_gemm_panel *panel, int64_t k0, int n, float *out) {
    const snipi_side *side = panel->side;
    const snipi_vector *vector = side->reader.vector;
    float memory[SNIPI_MAX_ROWS * SNIPI_PACK_K + 16], *part = (float *)snipi_next_line(memory);  // [rows][SNIPI_PACK_K]
    if (side->plain && !side->bf16 && panel->used == panel->rows) {
        const float *x = (const float *)(const void *)snipi_side_at(side, panel->row0 * side->ld + k0);
        vector->transpose(x, side->ld, panel->rows, n, out, panel->rows);
        return;
    }
    for (int i = 0; i < panel->rows; i++, part += SNIPI_PACK_K)
        if (i < panel->used)
            snipi_side_row(side, panel->row0 + i, k0, n, part);
        else
            memset(part, 0, SNIPI_PACK_K * sizeof(float));
    vector->transpose(part - SNIPI_PACK_K * panel->rows, SNIPI_PACK_K, panel->rows, n, out, panel->rows);
}

// Elements [k0, k0 + length) into an F32 panel.
static void snipi_pack_f32(const snipi_kernels *kernels, snipi_gemm_panel *panel, int64_t k0, int64_t length,
                           float *out) {
    const snip_operand *operand = panel->side->operand;
    for (int64_t k = 0; k < length; k += SNIPI_PACK_K, out += SNIPI_PACK_K * panel->rows) {
        const int n = (int)snipi_min(SNIPI_PACK_K, length - k);
        if (operand->transposed)
            snipi_pack_f32_columns(panel, k0 + k, n, out);
        else
            snipi_pack_f32_rows(panel, k0 + k, n, out);
        if (panel->count && operand->recipe->format == SNIP_F32) snipi_gemm_count(panel, out, n * panel->rows);
        if (operand->round_bf16) kernels->round_floats(out, n * panel->rows);
    }
}

// Elements [k0, k0 + length) of E2M1 rows into `steps` steps of an S8 panel.
static void snipi_pack_s8(const snipi_kernels *kernels, const snipi_gemm_panel *panel, int64_t k0, int64_t length,
                          int64_t steps, uint8_t *out) {
    const size_t row_bytes = panel->side->reader.row_bytes;
    const uint8_t *codes = panel->side->reader.codes + (size_t)panel->row0 * row_bytes + k0 / 2;
    const int64_t whole = length / 4;
    if (panel->by_rows)
        kernels->spread_rows(codes, row_bytes, panel->used, whole, out, panel->row_distance);
    else
        kernels->spread(codes, row_bytes, panel->used, whole, panel->offset, out, panel->rows);

    for (int64_t t = panel->used < panel->rows ? 0 : whole; t < steps; t++)  // zeros for what there is not
        for (int i = t < whole ? panel->used : 0; i < panel->rows; i++)
            memset(out + t * panel->step_distance + i * panel->row_distance, panel->offset, 4);

    for (int i = 0; i < panel->used; i++, codes += row_bytes)  // the last elements, fewer than a step's
        for (int64_t t = 4 * whole; t < length; t++) {
            const int twice = snipi_twice[codes[t >> 1] >> (t & 1) * 4 & 15];
            uint8_t *to = out + whole * panel->step_distance + i * panel->row_distance + t % 4;
            *to = (uint8_t)(twice + panel->offset);
        }
}

// Elements [k0, k0 + there) of an operand stored [k][rows], and zeros up to n (even, at most SNIPI_PACK_K), into a BF16
// panel.
static void snipi_pack_bf16_columns(const snipi_kernels *kernels, snipi_gemm_panel *panel, int64_t k0, int there, int n,
                                    uint8_t *out) {
    float memory[SNIPI_PAIRS + 16], *pairs = (float *)snipi_next_line(memory);  // [n / 2][rows] pairs of bfloat16
    const snipi_side *side = panel->side;
    const int used = panel->used, rows = panel->rows, bf16 = side->bf16, count = panel->count && !bf16;
    const int by_rows = panel->by_rows, in_place = !by_rows && used == rows;
    const int64_t line = side->ld * (bf16 ? 2 : 4);
    const char *from = snipi_side_at(side, panel->row0 + k0 * side->ld);
    float *to = in_place ? (float *)(void *)out : pairs;
    if (used < rows || there < n) memset(pairs, 0, SNIPI_PAIRS * sizeof(float));
    for (int i = 0; i < there; i += 2, from += 2 * line, to += rows) {
        const char *second = i + 1 < there ? from + line : NULL;
        kernels->pair(from, second, bf16, used, to);
        if (count) snipi_gemm_count(panel, (const float *)(const void *)from, used);
        if (count && second) snipi_gemm_count(panel, (const float *)(const void *)second, used);
    }
    if (by_rows)
        side->reader.vector->transpose(pairs, rows, n / 2, rows, (float *)(void *)out, panel->row_distance / 4);
    else if (!in_place)
        memcpy(out, pairs, (size_t)(n / 2 * rows) * sizeof(float));
    else
        memset(to, 0, (size_t)((n - there) / 2 * rows) * sizeof(float));
}

// The same of an operand stored [rows][k]. table: of its first 32 codes, if it has codes.
static void snipi_pack_bf16_rows(const snipi_kernels *kernels, snipi_gemm_panel *panel, const uint16_t *table,
                                 int64_t k0, int there, int n, uint8_t *out) {
    float memory[SNIPI_PAIRS + 16], *pairs = (float *)snipi_next_line(memory);  // [rows][SNIPI_PACK_K / 2] of bfloat16
    const snipi_side *side = panel->side;
    const snipi_reader *reader = &side->reader;
    const snip_format format = reader->recipe->format;
    const int used = there ? panel->used : 0, rows = panel->rows, by_rows = panel->by_rows;
    const int64_t to_line = by_rows ? panel->row_distance : SNIPI_PACK_K * (int64_t)sizeof(uint16_t);
    const int64_t line = side->plain ? side->ld * (side->bf16 ? 2 : 4) : (int64_t)reader->row_bytes;
    const int64_t column = side->bf16 ? 2 * k0 : side->plain ? 4 * k0 : format == SNIP_E2M1 ? k0 / 2 : k0;
    const uint8_t *from = reader->codes + panel->row0 * line + column;
    uint8_t *to = by_rows ? out : (uint8_t *)pairs;
    for (int i = 0; i < rows; i++, from += line, to += to_line) {
        if (i >= used || there < n) memset(to, 0, (size_t)n * 2);
        if (i >= used) continue;
        if (format == SNIP_BF16 && there == SNIPI_PACK_K)
            memcpy(to, from, SNIPI_PACK_K * 2);  // of a constant length the compiler makes moves
        else if (format == SNIP_BF16)
            memcpy(to, from, (size_t)there * 2);
        else if (format == SNIP_F32) {
            kernels->round((const float *)(const void *)from, there, (uint16_t *)(void *)to);
            if (panel->count) snipi_gemm_count(panel, (const float *)(const void *)from, there);
        } else
            kernels->look_up(format, table, reader->lut, from, there, (uint16_t *)(void *)to);
    }
    if (!by_rows) reader->vector->transpose(pairs, SNIPI_PACK_K / 2, rows, n / 2, (float *)(void *)out, rows);
}

// Elements [k0, k0 + length) into `steps` steps of a BF16 panel.
static void snipi_pack_bf16(const snipi_kernels *kernels, snipi_gemm_panel *panel, int64_t k0, int64_t length,
                            int64_t steps, uint8_t *out) {
    const int values = panel->side->operand->recipe->format == SNIP_E2M1 ? 16 : 32;
    uint16_t table[32] = { 0 };
    if (!panel->side->plain) kernels->round(panel->side->reader.lut, values, table);
    for (int64_t k = 0; k < 2 * steps; k += SNIPI_PACK_K, out += SNIPI_PACK_K / 2 * panel->step_distance) {
        const int n = (int)snipi_min(SNIPI_PACK_K, 2 * steps - k);
        const int there = (int)snipi_max(0, snipi_min(n, length - k));
        if (panel->side->operand->transposed)
            snipi_pack_bf16_columns(kernels, panel, k0 + k, there, n, out);
        else
            snipi_pack_bf16_rows(kernels, panel, table, k0 + k, there, n, out);
    }
}

// A panel's scales in the tiles of column tile_col.
static void snipi_pack_scales(const snipi_gemm_panel *panel, int64_t tile_col, float *scales) {
    const snipi_reader *reader = &panel->side->reader;
    const float unit = panel->element == 1 ? 0.5f : 1.0f;  // S8 has doubled values
    int i = 0;
    while (i < panel->used) {
        const int64_t row = panel->row0 + i, tile_rows = reader->tile_rows;
        const int64_t tile_end = tile_rows == 1 ? row + 1 : (row / tile_rows + 1) * tile_rows;
        const float scale = unit * snipi_reader_scale(reader, row, tile_col);
        for (; i < panel->used && panel->row0 + i < tile_end; i++) scales[i] = scale;
    }
    for (; i < panel->rows; i++) scales[i] = 0.0f;
}

// Bytes of k in an AMX tile: a block in equal pieces of at most 64.
static int64_t snipi_piece(int64_t block) {
    return snipi_round_up(snipi_ceil_div(block, snipi_ceil_div(block, 64)), 4);
}

// k bytes in blocks, each of them padded to pieces.
static int64_t snipi_padded(int64_t k, int64_t block, int64_t piece) {
    return k / block * snipi_round_up(block, piece) + snipi_round_up(k % block, piece);
}

// Elements [k0, k0 + length) into a scaled panel. block: in elements, piece: in bytes. scales, start: [blocks][rows];
// start may be NULL.
static void snipi_pack_scaled(const snipi_kernels *kernels, snipi_gemm_panel *panel, int64_t k0, int64_t length,
                              int64_t block, int64_t piece, uint8_t *out, float *scales, int32_t *start) {
    for (int64_t k = 0; k < length; k += block) {
        const int64_t part = snipi_min(block, length - k);
        const int64_t steps = snipi_round_up(part * panel->element, piece) / 4;
        if (panel->element == 1)
            snipi_pack_s8(kernels, panel, k0 + k, part, steps, out);
        else
            snipi_pack_bf16(kernels, panel, k0 + k, part, steps, out);
        snipi_pack_scales(panel, (k0 + k) / panel->side->reader.tile_cols, scales);
        scales += panel->rows;
        if (start) {
            kernels->start((const int8_t *)out, steps, panel->rows, start);
            start += panel->rows;
        }
        out += steps * panel->step_distance;
    }
}

// ---- which panels
// Length of the common scale block along k of two operands, 0 if their tiles do not nest.
static int64_t snipi_scale_block(const snip_operand *a, const snip_operand *b, int64_t k) {
    const int64_t tile_a = snipi_min(k, snipi_tile(a->recipe->tile_cols, k));
    const int64_t tile_b = snipi_min(k, snipi_tile(b->recipe->tile_cols, k));
    const int64_t shorter = snipi_min(tile_a, tile_b), longer = snipi_max(tile_a, tile_b);
    if (k == 0 || (longer % shorter && longer < k)) return 0;
    return shorter >= k || shorter % SNIPI_MIN_BLOCK == 0 ? shorter : 0;
}

// The scale block of a product by S8, 0 if it is none.
static int64_t snipi_s8_block(const snip_operand *a, const snip_operand *b, int64_t k) {
    if (a->recipe->format != SNIP_E2M1 || b->recipe->format != SNIP_E2M1 || k > SNIPI_S8_MOST) return 0;
    return snipi_scale_block(a, b, k);
}

static int snipi_fits_bf16(const snip_operand *o) { return o->recipe->format != SNIP_F32 || o->round_bf16; }

// The same for BF16 units. Float sums may end anywhere in a tile: a block of more than SNIPI_BLOCK_BF16 is halved, if
// its halves are still multiples of SNIPI_MIN_BLOCK, or cut where it is all of k.
static int64_t snipi_bf16_block(const snip_operand *a, const snip_operand *b, int64_t k) {
    int64_t block = snipi_fits_bf16(a) && snipi_fits_bf16(b) ? snipi_scale_block(a, b, k) : 0;
    if (block >= k) return snipi_min(block, SNIPI_BLOCK_BF16);
    while (block > SNIPI_BLOCK_BF16 && block % (2 * SNIPI_MIN_BLOCK) == 0) block /= 2;
    return block <= SNIPI_BLOCK_BF16 ? block : 0;
}

// ---- a product
typedef struct {  // A or B
    snipi_side side;
    int rows;  // in a panel
    int64_t panels;
    char *memory;  // of a pass, or of all: panels, [panels][blocks][rows] of scales, and as many of `start`
    int64_t scales_at, start_at, bytes;  // of a pass: where scales and `start` lie, and the whole
    int kept;                            // each pass has memory of its own, and panels stay there for other products
    int packed;                          // they are there
    int late;            // packed by the task that alone uses them, when it needs them: they are then in its cache
    int64_t *nonfinite;  // [panels] or NULL: how many elements are not finite
} snipi_gemm_side;

typedef struct {
    snipi_gemm_side a, b;
    snipi_kernels kernels;
    int element;  // bytes in scaled panels: 1 S8, 2 BF16; 0: F32 panels
    int64_t m, n, k;
    int64_t block, piece;        // of scaled panels: elements of k; bytes
    int64_t pass;                // k of a pass
    int64_t row_bytes, blocks;   // of a row in a panel of such a pass
    int64_t chunk_a, chunk_b;    // panels of a task
    int64_t chunks_a, chunks_b;  // so the tasks of a pass
    float *c;                    // [m][ldc]
    int64_t ldc;
    int accumulate;
    const float *bias;  // [n] or NULL
} snipi_gemm_job;

typedef struct {
    int64_t index, k0, length;  // k range [k0, k0 + length)
    int64_t row_bytes, blocks;  // of a row in a panel
} snipi_gemm_pass;

static snipi_gemm_pass snipi_gemm_pass_of(const snipi_gemm_job *job, int64_t index) {
    const int64_t element = job->element;
    snipi_gemm_pass pass = { index, index * job->pass, 0, job->row_bytes, job->blocks };
    pass.length = snipi_min(job->pass, job->k - pass.k0);
    if (pass.length == job->pass) return pass;
    pass.row_bytes = element ? snipi_padded(pass.length * element, job->block * element, job->piece)
                             : pass.length * (int64_t)sizeof(float);
    pass.blocks = element ? snipi_ceil_div(pass.length, job->block) : 0;
    return pass;
}

static char *snipi_gemm_memory(const snipi_gemm_side *side, const snipi_gemm_pass *pass) {
    return side->memory + (side->kept ? pass->index * side->bytes : 0);
}

static uint8_t *snipi_gemm_panel_at(const snipi_gemm_side *side, const snipi_gemm_pass *pass, int64_t p) {
    return (uint8_t *)snipi_gemm_memory(side, pass) + p * side->rows * pass->row_bytes;
}

static float *snipi_gemm_scales_at(const snipi_gemm_side *side, const snipi_gemm_pass *pass, int64_t p) {
    return (float *)(void *)(snipi_gemm_memory(side, pass) + side->scales_at) + p * side->rows * pass->blocks;
}

static int32_t *snipi_gemm_start_at(const snipi_gemm_side *side, const snipi_gemm_pass *pass, int64_t p) {
    return (int32_t *)(void *)(snipi_gemm_memory(side, pass) + side->start_at) + p * side->rows * pass->blocks;
}

static void snipi_gemm_pack(const snipi_gemm_job *job, const snipi_gemm_side *from, const snipi_gemm_pass *pass,
                            int64_t p) {
    const int is_a = from == &job->a, signed_a = job->kernels.begin != NULL;  // AMX
    uint8_t *out = snipi_gemm_panel_at(from, pass, p);
    snipi_gemm_panel panel;
    panel.side = &from->side;
    panel.row0 = p * from->rows;
    panel.used = (int)snipi_min(from->rows, from->side.rows - panel.row0);
    panel.rows = from->rows;
    panel.element = job->element;
    panel.offset = is_a && !signed_a ? 12 : 0;
    panel.by_rows = is_a && signed_a;
    panel.step_distance = panel.by_rows ? 4 : 4 * from->rows;
    panel.row_distance = panel.by_rows ? pass->row_bytes : 4;
    panel.count = from->nonfinite != NULL;
    panel.nonfinite = 0;
    if (job->element == 0)
        snipi_pack_f32(&job->kernels, &panel, pass->k0, pass->length, (float *)(void *)out);
    else
        snipi_pack_scaled(&job->kernels, &panel, pass->k0, pass->length, job->block, job->piece, out,
                          snipi_gemm_scales_at(from, pass, p),
                          is_a || signed_a || job->element == 2 ? NULL : snipi_gemm_start_at(from, pass, p));
    if (from->nonfinite) from->nonfinite[p] += panel.nonfinite;
}

// The product of panels ip and jp, onto `from` or, where that is NULL, onto c.
static void snipi_gemm_multiply(const snipi_gemm_job *job, const snipi_gemm_pass *pass, int64_t ip, int64_t jp,
                                const float *from, float *c, int64_t ldc) {
    const int64_t element = job->element;
    const uint8_t *a = snipi_gemm_panel_at(&job->a, pass, ip), *b = snipi_gemm_panel_at(&job->b, pass, jp);
    if (element) {
        const snipi_scaled_kernel kernel = element == 1 ? job->kernels.s8 : job->kernels.bf16;
        kernel(pass->length * element, job->block * element, a, (const int8_t *)b,
               snipi_gemm_scales_at(&job->a, pass, ip), snipi_gemm_scales_at(&job->b, pass, jp),
               snipi_gemm_start_at(&job->b, pass, jp), from, c, ldc);
        return;
    }
    for (int64_t k = 0; k < pass->length; k += SNIPI_SUM_F32, from = NULL)
        job->kernels.f32(snipi_min(SNIPI_SUM_F32, pass->length - k), (const float *)(const void *)a + k * job->a.rows,
                         (const float *)(const void *)b + k * job->b.rows, from, c, ldc);
}

// The tile of C of panels ip and jp. One that C's edge cuts is made aside.
static void snipi_gemm_tile(const snipi_gemm_job *job, const snipi_gemm_pass *pass, int64_t ip, int64_t jp) {
    static const float zeros[SNIPI_MAX_ROWS] = { 0 };
    const int rows = (int)snipi_min(job->a.rows, job->m - ip * job->a.rows);
    const int cols = (int)snipi_min(job->b.rows, job->n - jp * job->b.rows), width = job->b.rows;
    const float *bias = job->bias ? job->bias + jp * width : NULL;
    const float *from = pass->index || job->accumulate ? NULL : bias ? bias : zeros;
    float *c = job->c + ip * job->a.rows * job->ldc + jp * width;
    if (rows == job->a.rows && cols == width)
        snipi_gemm_multiply(job, pass, ip, jp, from, c, job->ldc);
    else {
        float aside[SNIPI_MAX_ROWS * SNIPI_MAX_ROWS];
        const size_t line = (size_t)cols * sizeof(float);
        memset(aside, 0, sizeof aside);
        for (int i = 0; i < rows; i++) memcpy(aside + i * width, from ? from : c + i * job->ldc, line);
        snipi_gemm_multiply(job, pass, ip, jp, NULL, aside, width);
        for (int i = 0; i < rows; i++) memcpy(c + i * job->ldc, aside + i * width, line);
    }
    if (job->accumulate && bias && pass->k0 + pass->length == job->k)
        for (int i = 0; i < rows; i++, c += job->ldc)
            for (int j = 0; j < cols; j++) c[j] += bias[j];
}

// Panels that are packed before the tasks that use them.
static int64_t snipi_gemm_early(const snipi_gemm_side *side) { return side->late || side->packed ? 0 : side->panels; }

static void snipi_gemm_pack_call(void *arg, int64_t i) {
    const snipi_gemm_job *job = (const snipi_gemm_job *)arg;
    const int64_t early_a = snipi_gemm_early(&job->a), early = early_a + snipi_gemm_early(&job->b), p = i % early;
    const snipi_gemm_pass pass = snipi_gemm_pass_of(job, i / early);
    if (p < early_a)
        snipi_gemm_pack(job, &job->a, &pass, p);
    else
        snipi_gemm_pack(job, &job->b, &pass, p - early_a);
}

// The tiles of a chunk of A's panels with a chunk of B's.
static void snipi_gemm_tiles_call(void *arg, int64_t i) {
    const snipi_gemm_job *job = (const snipi_gemm_job *)arg;
    const int64_t tasks = job->chunks_a * job->chunks_b, task = i % tasks;
    const int64_t ip0 = task % job->chunks_a * job->chunk_a, ip1 = snipi_min(job->a.panels, ip0 + job->chunk_a);
    const int64_t jp0 = task / job->chunks_a * job->chunk_b, jp1 = snipi_min(job->b.panels, jp0 + job->chunk_b);
    const snipi_gemm_pass pass = snipi_gemm_pass_of(job, i / tasks);
    if (job->element && job->kernels.begin) job->kernels.begin(job->piece);
    for (int64_t jp = jp0; jp < jp1; jp++) {
        if (job->b.late) snipi_gemm_pack(job, &job->b, &pass, jp);
        for (int64_t ip = ip0; ip < ip1; ip++) snipi_gemm_tile(job, &pass, ip, jp);
    }
    if (job->element && job->kernels.end) job->kernels.end();
}

// Row i of C where k is 0.
static void snipi_gemm_empty_call(void *arg, int64_t i) {
    const snipi_gemm_job *job = (const snipi_gemm_job *)arg;
    float *c = job->c + i * job->ldc;
    for (int64_t j = 0; j < job->n; j++) {
        const float bias = job->bias ? job->bias[j] : 0.0f;
        if (!job->accumulate)
            c[j] = bias;
        else if (job->bias)
            c[j] += bias;
    }
}

static void snipi_gemm_side_begin(const snipi_gemm_job *job, snipi_gemm_side *side, int rows_of_panel, int64_t rows) {
    side->rows = rows_of_panel;
    side->panels = snipi_ceil_div(rows, side->rows);
    const int64_t padded = side->panels * side->rows;
    const int64_t scale_bytes = snipi_round_up(padded * job->blocks * (int64_t)sizeof(float), 64);
    side->scales_at = snipi_round_up(padded * job->row_bytes, 64);
    side->start_at = side->scales_at + scale_bytes;
    side->bytes = side->start_at + (side == &job->b ? scale_bytes : 0);
}

// Cuts a pass into tasks. Where few panels of A leave them all in one chunk, B's chunks are made smaller, else A's: a
// panel of B is best used for several of A while it is in the nearest caches.
static void snipi_gemm_cut(snipi_gemm_job *job) {
    int64_t *smaller = job->a.panels <= SNIPI_CHUNK_MOST ? &job->chunk_b : &job->chunk_a;
    job->chunk_a = job->chunk_b = SNIPI_CHUNK_MOST;
    for (;; *smaller /= 2) {
        job->chunks_a = snipi_ceil_div(job->a.panels, job->chunk_a);
        job->chunks_b = snipi_ceil_div(job->b.panels, job->chunk_b);
        if (*smaller <= SNIPI_CHUNK_LEAST || job->chunks_a * job->chunks_b >= SNIPI_TASKS) return;
    }
}

// All but the operands and where panels lie.
static void snipi_gemm_begin(snipi_gemm_job *job, int64_t m, int64_t n, int64_t k, const snip_operand *a,
                             const snip_operand *b, snip_isa isa) {
    const int64_t s8_block = snipi_s8_block(a, b, k);
    snipi_panel_rows rows;
    memset(job, 0, sizeof *job);
    job->kernels = snipi_kernels_of(isa == SNIP_ISA_BEST ? snipi_best_isa() : isa);
    const int64_t bf16_block = job->kernels.bf16 ? snipi_bf16_block(a, b, k) : 0;
    job->m = m;
    job->n = n;
    job->k = k;
    job->block = s8_block ? s8_block : bf16_block;
    job->element = s8_block ? 1 : bf16_block ? 2 : 0;
    job->pass = snipi_plain(a->recipe->format) && snipi_plain(b->recipe->format) ? SNIPI_KC_PLAIN : SNIPI_KC_F32;
    rows = s8_block ? job->kernels.s8_rows : bf16_block ? job->kernels.bf16_rows : job->kernels.f32_rows;
    if (job->element) {
        job->pass = job->element == 1 ? SNIPI_KC_S8 : SNIPI_KC_BF16;
        job->piece = job->kernels.begin ? snipi_piece(job->block * job->element) : 4;
        job->pass = job->block >= job->pass ? job->block : job->pass / job->block * job->block;
    }
    job->pass = snipi_min(job->pass, k);
    job->row_bytes = job->element ? snipi_padded(job->pass * job->element, job->block * job->element, job->piece)
                                  : job->pass * (int64_t)sizeof(float);
    job->blocks = job->element ? snipi_ceil_div(job->pass, job->block) : 0;
    snipi_gemm_side_begin(job, &job->a, rows.a, m);
    snipi_gemm_side_begin(job, &job->b, rows.b, n);
    snipi_gemm_cut(job);
}

// Bytes of all of B's panels, as snipi_gemm_with keeps them.
static size_t snipi_gemm_held(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                              snip_isa isa) {
    snipi_gemm_job job;
    snipi_gemm_begin(&job, m, n, k, a, b, isa);
    return k ? (size_t)(snipi_ceil_div(k, job.pass) * job.b.bytes) + 64 : 1;
}

// snip_gemm, its arguments checked. held: NULL, or snipi_gemm_held bytes for B's panels, which are packed if `pack` and
// else found there: b's codes and scales are then not read. nonfinite: NULL, or to be filled with how many elements of
// A and of B are not finite, of those which are F32 and packed.
static snip_status snipi_gemm_with(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                                   float *c, int64_t ldc, int accumulate, const float *bias, void *scratch,
                                   snip_isa isa, void *held, int pack, int64_t nonfinite[2]) {
    const int64_t work = m * n < 1 << 20 ? m * n * k / 32 : m * n;  // 32 products take as long as an element elsewhere
    snipi_gemm_job job;
    snipi_gemm_begin(&job, m, n, k, a, b, isa);
    job.c = c;
    job.ldc = ldc;
    job.accumulate = accumulate;
    job.bias = bias;
    if (nonfinite) nonfinite[0] = nonfinite[1] = 0;
    if (k == 0) {
        snipi_share(snipi_gemm_empty_call, &job, m, m * n);
        return SNIP_OK;
    }

    job.b.packed = held && !pack;
    job.b.kept = held != NULL;
    job.b.late = job.chunks_a == 1 && !job.b.packed;
    job.a.memory = (char *)snipi_next_line(scratch);
    job.b.memory = held ? (char *)snipi_next_line(held) : job.a.memory + job.a.bytes;
    snipi_side_init(&job.a.side, a, m, k);
    if (!job.b.packed) snipi_side_init(&job.b.side, b, n, k);
    if (nonfinite) {
        job.a.nonfinite = (int64_t *)(void *)(job.a.memory + job.a.bytes + (held ? 0 : job.b.bytes));
        job.b.nonfinite = job.a.nonfinite + job.a.panels;
        memset(job.a.nonfinite, 0, (size_t)(job.a.panels + job.b.panels) * sizeof(int64_t));
    }

    const snipi_phase pack_panels = { snipi_gemm_pack_call, &job, snipi_gemm_early(&job.a) + snipi_gemm_early(&job.b) };
    const snipi_phase make_tiles = { snipi_gemm_tiles_call, &job, job.chunks_a * job.chunks_b };
    const snipi_phase phases[2] = { pack_panels, make_tiles };
    snipi_share_phases(phases, 2, snipi_ceil_div(k, job.pass), work);
    for (int64_t p = 0; p < job.a.panels && nonfinite; p++) nonfinite[0] += job.a.nonfinite[p];
    for (int64_t p = 0; p < job.b.panels && nonfinite; p++) nonfinite[1] += job.b.nonfinite[p];
    return SNIP_OK;
}

// Bytes for both operands' panels of a pass with their scales and `start`, and for the counts of what is not finite.
// block: of S8, 0 for other panels.
static size_t snipi_gemm_scratch(int64_t m, int64_t n, int64_t k, int64_t block) {
    const int64_t s8_block = snipi_max(1, block), blocks = snipi_min(SNIPI_KC_S8, k) / SNIPI_MIN_BLOCK + 1;
    const int64_t f32_bytes = snipi_min(SNIPI_KC_F32, k) * (int64_t)sizeof(float);
    // S8 and BF16 have the same bytes in a pass; padded to pieces, they are at most an eighth more.
    const int64_t scaled_bytes = snipi_min(SNIPI_KC_S8, 2 * k) * 9 / 8 + 64;
    const int64_t long_bytes = snipi_padded(block, s8_block, snipi_piece(s8_block));  // a block longer than a pass
    const int64_t panel_bytes = snipi_max(f32_bytes, snipi_max(scaled_bytes, long_bytes));
    const size_t row_bytes = (size_t)panel_bytes + (size_t)blocks * (sizeof(float) + sizeof(int32_t));
    const size_t rows = (size_t)(m + n + 2 * SNIPI_MAX_ROWS);
    return rows * row_bytes + (rows / SNIPI_SCALAR_A + 2) * sizeof(int64_t) + 8 * 64;
}

SNIP_API size_t snip_gemm_scratch(int64_t m, int64_t n, int64_t k) {
    const int64_t most = (int64_t)1 << 40;
    if (m < 0 || n < 0 || k < 0 || m > most || n > most || k > most) return 0;
    return snipi_gemm_scratch(m, n, k, k <= SNIPI_S8_MOST ? k : 0);
}

static int snipi_operand_ok(const snip_operand *o, int64_t rows, int64_t k) {
    if (!o || !o->recipe || !snipi_recipe_ok(o->recipe) || (o->round_bf16 && o->recipe->format != SNIP_F32)) return 0;
    if (!snipi_plain(o->recipe->format)) {
        if (o->ld || o->transposed || !snipi_shape_ok(rows, k, k)) return 0;
        return rows == 0 || k == 0 || (o->codes && (o->scales || o->recipe->scale == SNIP_SCALE_NONE));
    }
    const int64_t least = o->transposed ? rows : k, ld = o->ld ? o->ld : least;
    return snipi_shape_ok(o->transposed ? k : rows, least, ld) && (rows == 0 || k == 0 || o->codes);
}

SNIP_API snip_status snip_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b, float *c,
                               int64_t ldc, int accumulate, const float *bias, void *scratch, snip_isa isa) {
    if (m < 0 || n < 0 || k < 0 || !snipi_shape_ok(m, n, ldc)) return SNIP_BAD_ARGUMENT;
    if (!snipi_operand_ok(a, m, k) || !snipi_operand_ok(b, n, k)) return SNIP_BAD_ARGUMENT;
    if ((int)isa < 0 || isa >= SNIP_ISA_COUNT) return SNIP_BAD_ARGUMENT;
    if (!snip_isa_available(isa)) return SNIP_UNSUPPORTED;
    if (m == 0 || n == 0) return SNIP_OK;
    if (!c || (k > 0 && !scratch)) return SNIP_BAD_ARGUMENT;
    return snipi_gemm_with(m, n, k, a, b, c, ldc, accumulate, bias, scratch, isa, NULL, 0, NULL);
}

// >>session-impl -----------------------------------------------------------------------------------
// A session is data that flows one way:
//
//   passes   what a layer's calls run, in an ordinary step and in the three passes of a measuring step
//   sums     what the passes measure: one record of sums per layer, which add over micro-batches
//   costs    a function of the sums: what each precision would harm, averaged over measurements
//   plan     a function of the costs: the formats that harm least within the budget
//   policy   what has memory: when to measure, when a spike or a drift is news, when a plan may change
//
// docs/estimators.md derives the formulas; they stand on top of the section that computes them.
//
// A measuring step runs the batch three times, all in desc.measure precision:
//
//   loss probe     Noise on the operands X and W of every layer at once. How the gradients change says how curved the
//                  loss is in each operand.
//   update probe   Weights moved along a random direction that the optimizer's sensitivity scales. How inputs and
//                  gradients change says how an error at a layer reaches every weight's next update.
//   clean          Statistics; its gradients are the ones the optimizer uses.
//
// In all of it X is [rows][k], W [n][k] and dY [rows][n]: k is a layer's input features, n its output features.
enum {
    SNIPI_CANDIDATES = 2,       // precisions a plan chooses from below `high`: FP8, FP4
    SNIPI_STATES = 3,           // of a GEMM: 0 is `high`, then the candidates
    SNIPI_SKETCH = 4096,        // buckets of a sketch: 2.2% deviation of a squared norm, 16 KiB
    SNIPI_PROJECTED = 32,       // columns that W's are mixed into before a product is sketched
    SNIPI_MIXED = 128,          // rows that a tensor's are mixed into before it is sketched; 128 * 32 fill a sketch
    SNIPI_BLOCKS = 64,          // sums of <dX, X>, which blocks of rows take in turn
    SNIPI_BLOCK_ROWS = 32,      // rows to a block: with all rows in one, the square would have one degree of freedom
    SNIPI_OBSERVED_RUNS = 64,   // runs of a tensor that are looked at in every step ...
    SNIPI_OBSERVED_LENGTH = 16  // ... and their elements: 1,024 in all, 3% deviation of an rms
};

static const snip_format snipi_candidates[SNIPI_CANDIDATES] = { SNIP_E4M3, SNIP_E2M1 };

// What a random number is for: no two uses share a key.
enum {
    SNIPI_ROLE_X,
    SNIPI_ROLE_W,
    SNIPI_ROLE_DY,
    SNIPI_ROLE_W_T,
    SNIPI_ROLE_DY_T,
    SNIPI_ROLE_X_T,
    SNIPI_ROLE_NOISE_X,
    SNIPI_ROLE_NOISE_W,
    SNIPI_ROLE_PROBE,
    SNIPI_ROLE_PROJECT,
    SNIPI_ROLE_SKETCH,  // and one for each sketch
    SNIPI_ROLES = 16
};

// Sketches of X, dY, X W^T, dY W and dW: update probe less clean pass.
enum { SNIPI_SKETCH_X, SNIPI_SKETCH_DY, SNIPI_SKETCH_XW, SNIPI_SKETCH_DYW, SNIPI_SKETCH_DW, SNIPI_SKETCHES };

// Scratch of a session, shared by its layers.
enum {
    SNIPI_SLOT_A,
    SNIPI_SLOT_A_SCALES,
    SNIPI_SLOT_B,
    SNIPI_SLOT_B_SCALES,
    SNIPI_SLOT_GEMM,
    SNIPI_SLOT_X,           // X with noise, or as a candidate rounds it
    SNIPI_SLOT_W,           // W with noise, or D
    SNIPI_SLOT_OUT,         // a layer's own dX or dW
    SNIPI_SLOT_SAMPLE,      // dY's sampled or mixed features
    SNIPI_SLOT_SAMPLE_OUT,  // a product of those
    SNIPI_SLOT_PROJECT,     // W's columns or rows, mixed
    SNIPI_SLOT_MIXED,       // a tensor's rows, mixed
    SNIPI_SLOT_SKETCH,      // a sketch's parts
    SNIPI_SLOTS
};

// Sums over rows and micro-batches of a measuring step, of one layer in one candidate. e_A = Q(A) - A.
typedef struct {
    double err_x, err_w, err_dy;  // |e_X|^2, |e_W|^2, |e_dY|^2
    double dot_x, dot_w;          // <dX, e_X>, <dW, e_W>
    double self_x, self_w;        // <X, e_X>, <W, e_W>
    double dx_sq, along_x;        // sums over rows of |dX_r|^2, <dX_r, e_r>^2
    double both_x, scale_x;       // sums over rows of <dX_r, e_r> <dX_r, X_r>, <dX_r, X_r>^2
    double wgrad_err;             // |D * (dW's error)|^2
} snipi_candidate_sums;

// The record of a layer's measurement. All of it adds over micro-batches, but for what is W's or the optimizer's.
typedef struct {
    double weight_sq, sensitivity_sq, moment_sq, update_sq;  // |W|^2, |D|^2, |m|^2, |u|^2
    double sigma_x, sigma_w;                                 // the loss probe's noise
    double noisy_x, noisy_w, clean_x, clean_w;               // <xi, dA> in the loss probe and in the clean pass
    double input_sq, gradient_sq;                            // |X|^2, |dY|^2 of the clean pass
    double elements_x, elements_y;                           // rows * k, rows * n of the clean pass
    double scaling[SNIPI_BLOCKS];                            // <dX, X> by blocks of rows: update probe less clean
    double sketched_sq[SNIPI_SKETCHES];                      // |sketch|^2
    snipi_candidate_sums candidate[SNIPI_CANDIDATES];
} snipi_sums;

// A layer's record and sketches, made at its first call of a measuring step.
typedef struct {
    snipi_sums sums;
    int64_t step;                   // that the sums are of
    float (*sketch)[SNIPI_SKETCH];  // [SNIPI_SKETCHES]: behind this, or NULL where a device keeps them
} snipi_measurement;

// Terms of a cost that are averaged over measurements, each with its variance.
enum { SNIPI_FIRST, SNIPI_SECOND, SNIPI_UPDATE, SNIPI_TERMS = SNIPI_UPDATE + SNIP_GEMMS };

typedef struct {
    double mean[SNIPI_TERMS], variance[SNIPI_TERMS];
} snipi_average;

// What a state file keeps of a layer. Words of 8 bytes; a new version adds some at the end, and zeros stand for what an
// older file lacks.
typedef struct {
    int64_t format[SNIP_GEMMS];
    snipi_average average[SNIPI_CANDIDATES];
    snip_estimate estimate[SNIPI_CANDIDATES];
    double seconds[SNIPI_STATES][SNIP_GEMMS];
    double level[2], reference[2];  // log2 of the rms of X and dY: running mean, and as it was at the last measurement
    int64_t ran;                    // bit g: GEMM g ran in the last pass; 0: not known
    double input_size;              // rms of X as last seen in a step of several micro-batches; 0: that had one
} snipi_kept_layer;

// What a state file keeps of the session.
typedef struct {
    uint64_t layers, model;                // their number, and a hash of names, shapes and seed
    int64_t step, plans;                   // ended; solved
    snip_adamw adamw;                      // of the last step
    double measurements, squared_weights;  // averaged over; sum of the squares of their weights
    double loss_mean, loss_deviation;      // running
    int64_t losses, levels;                // steps that loss_mean, snipi_kept_layer.level rest on
    int64_t measured;                      // step of the last measuring step
    int64_t due, fallen;                   // 1: a measurement is wanted early; a spike has put GEMMs into `fallback`
    double last_loss;
    int64_t outliers, spiking;  // losses in a row far from the mean; 1: a spike has not ended
    int64_t failures;           // measurements in a row that were discarded
} snipi_kept;

// A micro-batch of a layer in the pass under way.
typedef struct {
    const float *inp;      // as the forward call was given it
    uint64_t content;      // a hash of a sample of it
    int64_t rows, before;  // rows, and the rows of the micro-batches before it
    int done;              // its backward call has come
} snipi_micro;

// A weight packed for a GEMM, in the pass's first micro-batch.
typedef struct {
    void *panels;
    size_t size;
    int64_t nonfinite, saturated;
    const float *held;
    snip_format format;
} snipi_cached;

typedef struct {
    char *name;
    int64_t n, k;  // output and input features
    int stage;
    const float *m, *v;
    unsigned char allow[SNIP_GEMMS];  // SNIPI_ALLOW_FP8, SNIPI_ALLOW_FP4
    snipi_kept_layer kept;
    snipi_measurement *measurement;  // NULL before the first

    // Of this step.
    int64_t nonfinite, saturated;
    double seen_sq[2], seen[2];  // squares and number of the elements of X and dY that were looked at
    int64_t seen_calls;          // forward calls among those

    // Of this pass.
    int64_t calls_forward, calls_backward;
    int64_t rows_forward, rows_backward;
    unsigned running;  // bit g: GEMM g has run
    snipi_micro *micro;
    int64_t micro_capacity;

    // Of the passes before.
    int64_t calls_before;  // forward calls of the last one
    int64_t rows_of[4];    // by snip_pass, of this measuring step
    int frozen;            // wgrad did not run in the loss probe

    snipi_cached weight[2];  // W's panels for fwd and dgrad, where micro-batches share them
} snipi_layer;

enum { SNIPI_ALLOW_FP8 = 1, SNIPI_ALLOW_FP4 = 2 };

struct snip {
    snip_desc desc;
    snipi_layer *layers;
    int n_layers, capacity;
    snipi_kept kept;
    void *slot[SNIPI_SLOTS];
    size_t slot_size[SNIPI_SLOTS];
    snip_mode mode;
    snip_pass pass;
    int calls;             // linear calls of the pass under way
    int told;              // 1: the step's last pass is over, and `loss` its loss
    int measuring;         // 1: this is a measuring step
    int checked;           // 1: the first step has been looked through for what a plan could not do without
    double tau, loss;      // step of the update probe along its direction; loss of the step
    double solve_seconds;  // of the last plan
    snip_status pending;   // the step's first error
    char pending_message[256];
    int pending_layer;
    char message[256], reason[256];
    int failed_layer;
};

static void *snipi_default_alloc(size_t size, void *user) {
    (void)user;
    return SNIP_MALLOC(size);
}

static void snipi_default_free(void *ptr, void *user) {
    (void)user;
    SNIP_FREE(ptr);
}

static void *snipi_alloc(const snip *s, size_t size) {
    void *p = s->desc.alloc.alloc_fn(size ? size : 1, s->desc.alloc.user);
    if (p) memset(p, 0, size);
    return p;
}

static void snipi_free(const snip *s, void *p) {
    if (p) s->desc.alloc.free_fn(p, s->desc.alloc.user);
}

// Scratch that only ever grows.
static void *snipi_reserve(snip *s, int slot, size_t size) {
    if (size > s->slot_size[slot] || !s->slot[slot]) {
        snipi_free(s, s->slot[slot]);
        s->slot_size[slot] = 0;
        s->slot[slot] = s->desc.alloc.alloc_fn(size ? size : 1, s->desc.alloc.user);
        if (s->slot[slot]) s->slot_size[slot] = size;
    }
    return s->slot[slot];
}

static snipi_layer *snipi_layer_at(const snip *s, int layer) {
    return s && layer >= 0 && layer < s->n_layers ? &s->layers[layer] : NULL;
}

static int snipi_index_of(const snip *s, const snipi_layer *l) { return (int)(l - s->layers); }

static snip_format snipi_format(const snipi_layer *l, int gemm) { return (snip_format)l->kept.format[gemm]; }

// 1 if GEMM g runs, as far as is known: a GEMM that dinp or dweight NULL leaves out counts toward nothing.
static int snipi_runs(const snipi_layer *l, int gemm) { return l->kept.ran == 0 || (l->kept.ran >> gemm & 1); }

static double snipi_ratio(double a, double b) { return b > 0 ? a / b : 0; }

// ---- messages

// The message is the session's to change also where a call takes it as const.
static snip_status snipi_fail_at(const snip *s, snip_status status, int layer, const char *where, const char *why) {
    snip *own = (snip *)(uintptr_t)s;
    if (!s) return status;
    snprintf(own->message, sizeof own->message, "%.110s: %.140s", where, why);
    own->failed_layer = layer;
    return status;
}

static snip_status snipi_fail(const snip *s, snip_status status, const char *where, const char *why) {
    return snipi_fail_at(s, status, -1, where, why);
}

static snip_status snipi_bad(const snip *s, const char *function, const char *why) {
    return snipi_fail(s, SNIP_BAD_ARGUMENT, function, why);
}

static snip_status snipi_no_memory(const snip *s, const char *function) {
    return snipi_fail(s, SNIP_OUT_OF_MEMORY, function, snip_status_text(SNIP_OUT_OF_MEMORY));
}

// Of a layer, by name.
static snip_status snipi_fail_layer(const snip *s, snip_status status, const snipi_layer *l, const char *why) {
    char where[112];
    snprintf(where, sizeof where, "layer %.100s", l->name);
    return snipi_fail_at(s, status, snipi_index_of(s, l), where, why);
}

// A training step's first error is kept for snip_step_status and snip_end_step, with its message.
static snip_status snipi_keep(snip *s, snip_status status) {
    if (s->pending || !status) return status;
    s->pending = status;
    s->pending_layer = s->failed_layer;
    memcpy(s->pending_message, s->message, sizeof s->pending_message);
    return status;
}

// ---- descriptor

static int snipi_in_range(double x, double low, double high) {
    return !snipi_nonfinite_f64(x) && x >= low && x <= high;
}

static int snipi_recipes_ok(const snip_recipes *r) {
    const snip_recipe *all[3];
    all[0] = &r->activation;
    all[1] = &r->weight;
    all[2] = &r->gradient;
    for (int i = 0; i < 3; i++)
        if (all[i]->format != (snip_format)0 && (!snipi_recipe_ok(all[i]) || snipi_plain(all[i]->format))) return 0;
    return 1;
}

static int snipi_zero_or_plain(snip_format format) { return (int)format == 0 || snipi_plain(format); }

SNIP_API const char *snip_desc_error(const snip_desc *d) {
    if (!d) return "the descriptor is NULL";
    if (!snipi_in_range(d->budget, 0, 1)) return "budget is a share, 0 to 1";
    if (d->speedup != 0 && !snipi_in_range(d->speedup, 1e-3, 1e6)) return "speedup is a factor, 0.001 to 1e6, or 0";
    if (!snipi_in_range(d->seconds, 0, 1e9)) return "seconds is a time, 0 to 1e9";
    if (d->n_stages < 0) return "n_stages is a number of pipeline stages, not negative";
    if (!snipi_zero_or_plain(d->high)) return "high is SNIP_BF16, SNIP_F32 or 0";
    if (!snipi_zero_or_plain(d->measure)) return "measure is SNIP_F32, SNIP_BF16 or 0";
    if (snipi_nonfinite_f64(d->loss_weight)) return "loss_weight is a finite number";
    if (snipi_nonfinite_f64(d->update_weight)) return "update_weight is a finite number";
    if (!snipi_in_range(d->horizon, 0, 1e12)) return "horizon is a number of steps, 0 to 1e12";
    if (!snipi_in_range(d->sample, 0, 1)) return "sample is a share, 0 to 1";
    if ((int)d->optimizer < 0 || d->optimizer > SNIP_CUSTOM) return "optimizer is one of snip_optimizer";
    if (d->optimizer == SNIP_CUSTOM && !d->sensitivity) return "sensitivity is NULL, which SNIP_CUSTOM calls";
    if (snipi_nonfinite_f64(d->margin)) return "margin is a finite number of standard errors";
    if (snipi_nonfinite_f64(d->spike)) return "spike is a finite number of deviations";
    if (snipi_nonfinite_f64(d->drift)) return "drift is a finite number of binary orders";
    if (!snipi_zero_or_plain(d->fallback) && d->fallback != SNIP_E4M3 && d->fallback != SNIP_E2M1)
        return "fallback is SNIP_E4M3, SNIP_BF16, SNIP_F32, SNIP_E2M1 or 0";
    if (!snipi_recipes_ok(&d->fp8)) return "fp8 holds a recipe that cannot be quantized with";
    if (!snipi_recipes_ok(&d->fp4)) return "fp4 holds a recipe that cannot be quantized with";
    if ((int)d->isa < 0 || d->isa >= SNIP_ISA_COUNT) return "isa is one of snip_isa";
    if (!d->alloc.alloc_fn != !d->alloc.free_fn) return "alloc has one of alloc_fn and free_fn, and not the other";
    if (!snip_isa_available(d->isa)) return "isa is an instruction set that is not available here";
    return NULL;
}

SNIP_API snip_status snip_desc_check(const snip_desc *d) {
    if (!snip_desc_error(d)) return SNIP_OK;
    return d && (int)d->isa >= 0 && d->isa < SNIP_ISA_COUNT && !snip_isa_available(d->isa) ? SNIP_UNSUPPORTED
                                                                                           : SNIP_BAD_ARGUMENT;
}

static void snipi_default_recipes(snip_recipes *r, snip_recipe tile, snip_recipe block, snip_recipe gradient) {
    if ((int)r->activation.format == 0) r->activation = tile;
    if ((int)r->weight.format == 0) r->weight = block;
    if ((int)r->gradient.format == 0) r->gradient = gradient;
}

static snip_desc snipi_fill_in(snip_desc d) {
    const snip_recipe fp8_tile = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK;
    const snip_recipe fp4_tile = SNIP_RECIPE_FP4_TILE, fp4_block = SNIP_RECIPE_FP4_BLOCK;
    const snip_recipe fp4_stochastic = SNIP_RECIPE_FP4_TILE_SR;
    if (d.every == 0) d.every = 500;
    if (d.n_stages == 0) d.n_stages = 1;
    if ((int)d.high == 0) d.high = SNIP_BF16;
    if ((int)d.measure == 0) d.measure = SNIP_F32;
    if (d.loss_weight == 0) d.loss_weight = 1;
    if (d.update_weight == 0) d.update_weight = 1;
    if (d.horizon == 0) d.horizon = 100;
    if (d.sample == 0) d.sample = 0.125;
    if (d.margin == 0) d.margin = 2;
    if (d.spike == 0) d.spike = 6;
    if ((int)d.fallback == 0) d.fallback = SNIP_E4M3;
    if (d.drift == 0) d.drift = 1;
    snipi_default_recipes(&d.fp8, fp8_tile, fp8_block, fp8_tile);
    snipi_default_recipes(&d.fp4, fp4_tile, fp4_block, fp4_stochastic);
    if (!d.alloc.alloc_fn) {
        d.alloc.alloc_fn = snipi_default_alloc;
        d.alloc.free_fn = snipi_default_free;
    }
    return d;
}

// ---- session and layers

SNIP_API snip *snip_create(const snip_desc *desc) {
    if (snip_desc_check(desc)) return NULL;
    const snip_desc d = snipi_fill_in(*desc);
    snip *s = (snip *)d.alloc.alloc_fn(sizeof *s, d.alloc.user);
    if (!s) return NULL;
    memset(s, 0, sizeof *s);
    s->desc = d;
    s->failed_layer = s->pending_layer = -1;
    return s;
}

SNIP_API void snip_destroy(snip *s) {
    if (!s) return;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        snipi_free(s, l->name);
        snipi_free(s, l->measurement);
        snipi_free(s, l->micro);
        for (int t = 0; t < 2; t++) snipi_free(s, l->weight[t].panels);
    }
    snipi_free(s, s->layers);
    for (int i = 0; i < SNIPI_SLOTS; i++) snipi_free(s, s->slot[i]);
    s->desc.alloc.free_fn(s, s->desc.alloc.user);
}

SNIP_API const snip_desc *snip_settings(const snip *s) { return s ? &s->desc : NULL; }

// What is wrong with a layer to be added, or NULL.
static const char *snipi_layer_error(const snip *s, const char *name, int64_t n, int64_t k, int stage) {
    size_t length = 0;
    if (!name) return "the name is NULL";
    for (; name[length]; length++)  // names go into plan files, one word each
        if ((unsigned char)name[length] <= ' ') return "the name holds a blank or a control character";
    if (length == 0 || length > 255) return "the name is 1 to 255 bytes long";
    if (n < 1 || k < 1 || !snipi_shape_ok(n, k, k)) return "out_features and in_features are out of range";
    if (stage < 0 || stage >= s->desc.n_stages) return "the stage is not one of desc.n_stages";
    if (s->kept.step > 0) return "layers are added before the first step";
    return NULL;
}

static int snipi_grow_layers(snip *s) {
    const int capacity = s->capacity ? 2 * s->capacity : 64;
    snipi_layer *grown = (snipi_layer *)snipi_alloc(s, (size_t)capacity * sizeof *grown);
    if (!grown) return 0;
    if (s->n_layers) memcpy(grown, s->layers, (size_t)s->n_layers * sizeof *grown);
    snipi_free(s, s->layers);
    s->layers = grown;
    s->capacity = capacity;
    return 1;
}

SNIP_API int snip_add_linear(snip *s, const char *name, int64_t out_features, int64_t in_features, int stage) {
    const char *why = s ? snipi_layer_error(s, name, out_features, in_features, stage) : "";
    if (why) return -(int)snipi_bad(s, "snip_add_linear", why);
    if (s->n_layers == s->capacity && !snipi_grow_layers(s)) return -(int)snipi_no_memory(s, "snip_add_linear");
    const size_t length = strlen(name) + 1;
    char *copy = (char *)snipi_alloc(s, length);
    if (!copy) return -(int)snipi_no_memory(s, "snip_add_linear");
    memcpy(copy, name, length);
    snipi_layer *l = &s->layers[s->n_layers];
    memset(l, 0, sizeof *l);
    l->name = copy;
    l->n = out_features;
    l->k = in_features;
    l->stage = stage;
    for (int g = 0; g < SNIP_GEMMS; g++) {
        l->kept.format[g] = s->desc.high;
        l->allow[g] = SNIPI_ALLOW_FP8 | SNIPI_ALLOW_FP4;
    }
    return s->n_layers++;
}

SNIP_API snip_status snip_bind_adamw(snip *s, int layer, const float *m, const float *v) {
    snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !m || !v) return snipi_bad(s, "snip_bind_adamw", "no such layer, or m or v is NULL");
    if (s->desc.optimizer != SNIP_ADAMW) return snipi_bad(s, "snip_bind_adamw", "desc.optimizer is not SNIP_ADAMW");
    l->m = m;
    l->v = v;
    return SNIP_OK;
}

SNIP_API snip_status snip_bind_momentum(snip *s, int layer, const float *m) {
    snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !m) return snipi_bad(s, "snip_bind_momentum", "no such layer, or m is NULL");
    if (s->desc.optimizer != SNIP_SGD_MOMENTUM && s->desc.optimizer != SNIP_LION)
        return snipi_bad(s, "snip_bind_momentum", "desc.optimizer is neither SNIP_SGD_MOMENTUM nor SNIP_LION");
    l->m = m;
    return SNIP_OK;
}

// Layers [first, last) and GEMMs [first, last) that `layer` and `gemm` stand for.
typedef struct {
    int layer, layer_end, gemm, gemm_end;
} snipi_selection;

static int snipi_select(const snip *s, int layer, snip_gemm_kind gemm, snipi_selection *which) {
    if (!s || (layer != -1 && !snipi_layer_at(s, layer)) || (int)gemm < 0 || gemm > SNIP_GEMMS) return 0;
    which->layer = layer < 0 ? 0 : layer;
    which->layer_end = layer < 0 ? s->n_layers : layer + 1;
    which->gemm = gemm == SNIP_GEMMS ? 0 : (int)gemm;
    which->gemm_end = gemm == SNIP_GEMMS ? SNIP_GEMMS : (int)gemm + 1;
    return 1;
}

static const char snipi_no_selection[] = "no such layer or GEMM";

SNIP_API snip_status snip_allow(snip *s, int layer, snip_gemm_kind gemm, int fp8, int fp4) {
    snipi_selection which;
    if (!snipi_select(s, layer, gemm, &which)) return snipi_bad(s, "snip_allow", snipi_no_selection);
    if (!fp8 && !fp4) return snipi_bad(s, "snip_allow", "neither FP8 nor FP4 is allowed");
    for (int l = which.layer; l < which.layer_end; l++)
        for (int g = which.gemm; g < which.gemm_end; g++)
            s->layers[l].allow[g] = (unsigned char)((fp8 ? SNIPI_ALLOW_FP8 : 0) | (fp4 ? SNIPI_ALLOW_FP4 : 0));
    s->checked = 0;
    return SNIP_OK;
}

SNIP_API snip_status snip_set_format(snip *s, int layer, snip_gemm_kind gemm, snip_format format) {
    snipi_selection which;
    if (!snipi_select(s, layer, gemm, &which)) return snipi_bad(s, "snip_set_format", snipi_no_selection);
    if (!snipi_plain(format) && format != SNIP_E4M3 && format != SNIP_E2M1)
        return snipi_bad(s, "snip_set_format", "a GEMM runs in F32, BF16, E4M3 or E2M1");
    for (int l = which.layer; l < which.layer_end; l++)
        for (int g = which.gemm; g < which.gemm_end; g++) s->layers[l].kept.format[g] = format;
    return SNIP_OK;
}

SNIP_API snip_status snip_set_seconds(snip *s, int layer, snip_gemm_kind gemm, const double seconds[3]) {
    snipi_selection which;
    if (!snipi_select(s, layer, gemm, &which)) return snipi_bad(s, "snip_set_seconds", snipi_no_selection);
    for (int state = 0; state < SNIPI_STATES; state++)
        if (!seconds || !(seconds[state] > 0) || !snipi_in_range(seconds[state], 0, 1e9))
            return snipi_bad(s, "snip_set_seconds", "a time is positive and at most 1e9 seconds");
    for (int l = which.layer; l < which.layer_end; l++)
        for (int g = which.gemm; g < which.gemm_end; g++)
            for (int state = 0; state < SNIPI_STATES; state++) s->layers[l].kept.seconds[state][g] = seconds[state];
    s->checked = 0;
    return SNIP_OK;
}

SNIP_API snip_pass snip_current_pass(const snip *s) { return s ? s->pass : SNIP_PASS_ORDINARY; }

SNIP_API int64_t snip_step(const snip *s) { return s ? s->kept.step : 0; }

SNIP_API int snip_plans(const snip *s) { return s ? (int)s->kept.plans : 0; }

SNIP_API double snip_solve_seconds(const snip *s) { return s ? s->solve_seconds : 0; }

SNIP_API int snip_layers(const snip *s) { return s ? s->n_layers : 0; }

SNIP_API const char *snip_message(const snip *s) { return s ? s->message : ""; }

SNIP_API const char *snip_reason(const snip *s) { return s ? s->reason : ""; }

SNIP_API int snip_failed_layer(const snip *s) { return s && s->message[0] ? s->failed_layer : -1; }

SNIP_API snip_status snip_step_status(const snip *s) { return s ? s->pending : SNIP_BAD_ARGUMENT; }

SNIP_API int snip_find_layer(const snip *s, const char *name) {
    for (int l = 0; name && l < snip_layers(s); l++)
        if (strcmp(s->layers[l].name, name) == 0) return l;
    return -1;
}

SNIP_API snip_status snip_layer(const snip *s, int layer, snip_layer_info *info) {
    const snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !info) return snipi_bad(s, "snip_layer", "no such layer, or info is NULL");
    info->name = l->name;
    info->out_features = l->n;
    info->in_features = l->k;
    info->stage = l->stage;
    for (int g = 0; g < SNIP_GEMMS; g++) {
        info->format[g] = snipi_format(l, g);
        info->runs[g] = snipi_runs(l, g);
    }
    info->fp8 = l->kept.estimate[0];
    info->fp4 = l->kept.estimate[1];
    info->nonfinite = l->nonfinite;
    info->saturated = l->saturated;
    memcpy(info->seconds, l->kept.seconds, sizeof info->seconds);
    info->measurements = s->kept.measurements > 0 ? 1 / s->kept.squared_weights : 0;
    return SNIP_OK;
}

SNIP_API double snip_share(const snip *s, snip_format format) {
    double in_format = 0, all = 0;
    for (int l = 0; l < snip_layers(s); l++)
        for (int g = 0; g < SNIP_GEMMS; g++) {
            const double flops = (double)s->layers[l].n * (double)s->layers[l].k;
            if (!snipi_runs(&s->layers[l], g)) continue;
            all += flops;
            if (snipi_format(&s->layers[l], g) == format) in_format += flops;
        }
    return all > 0 ? in_format / all : 0;
}

// >>passes -----------------------------------------------------------------------------------------
// What a layer's calls run. The logic stands here once; what it does with tensors is a table of operations, one for the
// CPU (>>sums) and one for CUDA (snip_cuda.cuh), which add to the same record.

typedef struct snipi_operations snipi_operations;

// A call of a linear layer, of one micro-batch.
typedef struct {
    snip *s;
    snipi_layer *l;
    const snipi_operations *run;
    void *device, *stream;          // the operations' own
    snipi_sums *sums;               // may be device memory: only the operations read and write it
    float (*sketch)[SNIPI_SKETCH];  // [SNIPI_SKETCHES]; as sums
    int64_t rows, micro, before;    // rows, index of the micro-batch, rows of those before it
} snipi_call;

// All add to the counts of NaN, infinity and saturated elements of the layer what their operands hold.
// Pointers to sums and tensors may be device memory; work may be queued on call->stream.
struct snipi_operations {
    // y [rows][n] = x w^T + bias. dx [rows][k] (+)= dy w. dw [features][k] (+)= dy^T x, dy [rows][features].
    snip_status (*fwd)(const snipi_call *, snip_format, float *y, const float *x, const float *w, const float *bias);
    snip_status (*dgrad)(const snipi_call *, snip_format, float *dx, int accumulate, const float *dy, const float *w);
    snip_status (*wgrad)(const snipi_call *, snip_format, float *dw, int accumulate, const float *dy, int64_t features,
                         const float *x);
    // dgrad and wgrad of an ordinary pass, in the plan's formats; dinp and dweight may be NULL.
    snip_status (*gradients)(const snipi_call *, float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight);
    // dbias [n] += the sum of dout's rows.
    snip_status (*bias_gradient)(const snipi_call *, float *dbias, const float *dout);
    snip_status (*count_nonfinite)(const snipi_call *, const float *x, int64_t n);
    // A hash of a sample of x [n]; 0 where only its address can tell it.
    uint64_t (*content)(const snipi_call *, const float *x, int64_t n);
    // Adds a sample of x [n] to the squares that are watched for drift: of X (which 0), of dY (1).
    snip_status (*observe)(const snipi_call *, int which, const float *x, int64_t n);

    // The rest is for measuring passes.
    // Sets call->sums and call->sketch to the layer's record, zeroed at the measuring step's first call.
    snip_status (*record)(snipi_call *);
    float *(*scratch)(const snipi_call *, int slot, int64_t floats);  // NULL: out of memory
    // weight_sq = |W|^2; sigma_x and sigma_w, the loss probe's noise.
    snip_status (*size_noise)(const snipi_call *, const float *inp, const float *weight);
    // out = x + sigma_x * noise; out = w + sigma_w * noise, or w moved by the update probe.
    snip_status (*noisy_input)(const snipi_call *, float *out, const float *x);
    snip_status (*noisy_weight)(const snipi_call *, float *out, const float *w);
    // *to += <noise, x>; x is added to add_to as well, which may be NULL.
    snip_status (*noise_dot)(const snipi_call *, const float *x, int64_t n, snip_rng_key, double *to, float *add_to);
    // Rows of x [rows][cols], `before` rows after the first, with random signs added up into mixed [targets][cols].
    snip_status (*mix_rows)(const snipi_call *, snip_rng_key, const float *x, int64_t rows, int64_t cols,
                            int64_t before, int targets, float *mixed);
    // The same of columns: mixed [rows][SNIPI_PROJECTED].
    snip_status (*mix_columns)(const snipi_call *, snip_rng_key, const float *x, int64_t rows, int64_t cols,
                               float *mixed);
    // Adds factor times x [n] to a sketch, hashed; or bucket by bucket where x is [SNIPI_SKETCH] already.
    snip_status (*sketch_add)(const snipi_call *, int which, const float *x, int64_t n, float factor);
    snip_status (*sketch_sum)(const snipi_call *, int which, const float *x, float factor);
    // c [m][n] = a [m][k] * b, b [k][n], or [n][k] where turned; in float32.
    snip_status (*product)(const snipi_call *, int64_t m, int64_t n, int64_t k, const float *a, const float *b,
                           int turned, float *c);
    // scaling[block] += factor * <dX, X> of blocks of rows; dX is added to add_to as well, which may be NULL.
    snip_status (*scaling)(const snipi_call *, const float *x, const float *dx, double factor, float *add_to);
    // Rounding errors of X beside dX, of dY, of W beside dW, and of dW itself, in candidate f.
    snip_status (*input_errors)(const snipi_call *, int f, const float *x, const float *dx);
    snip_status (*gradient_errors)(const snipi_call *, int f, const float *dy);
    snip_status (*weight_errors)(const snipi_call *, int f, const float *w, const float *dw, int first);
    snip_status (*wgrad_errors)(const snipi_call *, const float *dy, const float *x, const float *dw);
    // sensitivity_sq = |D|^2; m and v that are not finite are SNIP_NONFINITE.
    snip_status (*sensitivity)(const snipi_call *);
    // tau, from all layers' records: the weights move by 1% in rms over the layers.
    snip_status (*step_size)(const snipi_call *);
};

// tensor = (micro * layers + layer) * 16 + role: no two draws of a step share a key.
static snip_rng_key snipi_key(const snip *s, const snipi_layer *l, int64_t micro, int role) {
    snip_rng_key key;
    key.seed = s->desc.seed;
    key.step = (uint32_t)s->kept.step;
    key.tensor = (uint32_t)((micro * s->n_layers + snipi_index_of(s, l)) * SNIPI_ROLES + role);
    return key;
}

static int snipi_probes_updates(const snip *s) { return s->desc.update_weight > 0; }

// ---- calls and micro-batches

// A backward call belongs to a forward call of the pass whose input it is given again, at the same place or copied.
// The first such forward call that is still waiting; -1: none.
static int64_t snipi_find_micro(const snipi_call *call, const float *inp, uint64_t content) {
    const snipi_layer *l = call->l;
    int64_t copied = -1;
    for (int64_t i = 0; i < l->calls_forward; i++) {
        const snipi_micro *m = &l->micro[i];
        if (m->done || m->rows != call->rows || m->content != content) continue;
        if (m->inp == inp) return i;
        if (copied < 0) copied = i;
    }
    return copied;
}

static snip_status snipi_open_micro(snipi_call *call, const float *inp) {
    snipi_layer *l = call->l;
    if (l->calls_forward == l->micro_capacity) {
        const int64_t capacity = l->micro_capacity ? 2 * l->micro_capacity : 1;
        snipi_micro *grown = (snipi_micro *)snipi_alloc(call->s, (size_t)capacity * sizeof *grown);
        if (!grown) return SNIP_OUT_OF_MEMORY;
        if (l->micro_capacity) memcpy(grown, l->micro, (size_t)l->micro_capacity * sizeof *grown);
        snipi_free(call->s, l->micro);
        l->micro = grown;
        l->micro_capacity = capacity;
    }
    call->micro = l->calls_forward++;
    call->before = l->rows_forward;
    snipi_micro *m = &l->micro[call->micro];
    m->inp = inp;
    m->content = call->run->content(call, inp, call->rows * l->k);
    m->rows = call->rows;
    m->before = call->before;
    m->done = 0;
    l->rows_forward += call->rows;
    l->running |= 1u << SNIP_FWD;
    return SNIP_OK;
}

// Finds the call's micro-batch. An ordinary pass needs no match: its n-th backward call may be given any input.
static int snipi_match_micro(snipi_call *call, const float *inp) {
    snipi_layer *l = call->l;
    const int64_t i = snipi_find_micro(call, inp, call->run->content(call, inp, call->rows * l->k));
    call->micro = i >= 0 ? i : l->calls_backward;
    call->before = i >= 0 ? l->micro[i].before : l->rows_backward;
    return i >= 0 || call->s->pass == SNIP_PASS_ORDINARY;
}

static void snipi_close_micro(snipi_call *call) {
    snipi_layer *l = call->l;
    if (call->micro < l->calls_forward) l->micro[call->micro].done = 1;
    l->calls_backward++;
    l->rows_backward += call->rows;
}

// Begins a call and checks what every linear call is given; a, b and c are its tensors that may not be NULL.
static int snipi_begin_call(snipi_call *call, snip *s, int layer, const void *a, const void *b, const void *c,
                            int64_t rows, const snipi_operations *run, void *device, void *stream) {
    snipi_layer *l = snipi_layer_at(s, layer);
    memset(call, 0, sizeof *call);
    call->s = s;
    call->l = l;
    call->rows = rows;
    call->run = run;
    call->device = device;
    call->stream = stream;
    if (!l || rows < 0 || !snipi_shape_ok(rows, snipi_max(l->n, l->k), snipi_max(l->n, l->k))) return 0;
    return rows == 0 || (a && b && c);
}

static snip_status snipi_refuse_call(snip *s, const char *function, int layer) {
    char where[64];
    snprintf(where, sizeof where, "%s, layer %d", function, layer);
    snipi_fail_at(s, SNIP_BAD_ARGUMENT, snipi_layer_at(s, layer) ? layer : -1, where,
                  snip_status_text(SNIP_BAD_ARGUMENT));
    return s && s->mode == SNIP_TRAIN ? snipi_keep(s, SNIP_BAD_ARGUMENT) : SNIP_BAD_ARGUMENT;
}

static snip_status snipi_refuse_for(const snipi_call *call, const char *why) {
    return snipi_keep(call->s, snipi_fail_layer(call->s, SNIP_BAD_ARGUMENT, call->l, why));
}

// A call is over: its status, or SNIP_NONFINITE where it has met NaN or infinity. A refusal has said why.
static snip_status snipi_finish_call(const snipi_call *call, int64_t nonfinite_before, snip_status status) {
    if (!status && call->l->nonfinite != nonfinite_before) status = SNIP_NONFINITE;
    if (!status || status == SNIP_BAD_ARGUMENT) return status;
    snipi_fail_layer(call->s, status, call->l, snip_status_text(status));
    return call->s->mode == SNIP_TRAIN ? snipi_keep(call->s, status) : status;
}

static const char snipi_step_is_over[] =
    "called after the step's last pass: snip_end_step is missing, or snip_set_mode(s, SNIP_EVAL) before a validation";

// ---- a layer in the passes of a measurement

// +1 in the update probe, -1 in the clean pass: sketches and sums of the change between them.
static float snipi_probe_sign(const snip *s) { return s->pass == SNIP_PASS_CLEAN ? -1.0f : 1.0f; }

// The operands that a measuring pass runs on: the caller's, or with noise.
static snip_status snipi_probe_operands(const snipi_call *call, const float **x, const float **w) {
    const snipi_layer *l = call->l;
    snip_status status = SNIP_OK;
    if (call->s->pass == SNIP_PASS_LOSS_PROBE) {
        float *noisy = call->run->scratch(call, SNIPI_SLOT_X, call->rows * l->k);
        if (!noisy) return SNIP_OUT_OF_MEMORY;
        status = call->run->noisy_input(call, noisy, *x);
        *x = noisy;
    }
    if (call->s->pass != SNIP_PASS_CLEAN && !status) {
        float *noisy = call->run->scratch(call, SNIPI_SLOT_W, l->n * l->k);
        if (!noisy) return SNIP_OUT_OF_MEMORY;
        status = call->run->noisy_weight(call, noisy, *w);
        *w = noisy;
    }
    return status;
}

// Sketches X and X W^T, or dY and dY W, of x's mixed rows. The products are projected: x (A R), A the weights as x
// meets them, R mixing A's columns into 32, so that |x A R|^2 is |x A|^2 in expectation. weight: the caller's, without
// noise.
static snip_status snipi_sketch_tensor(const snipi_call *call, int which, const float *x, const float *weight) {
    const snipi_operations *run = call->run;
    const snip *s = call->s;
    const snipi_layer *l = call->l;
    const int by_x = which == SNIPI_SKETCH_X, behind = by_x ? SNIPI_SKETCH_XW : SNIPI_SKETCH_DYW;
    const int64_t in = by_x ? l->k : l->n;
    const float sign = snipi_probe_sign(s);
    const snip_rng_key project = snipi_key(s, l, 0, SNIPI_ROLE_PROJECT);
    float *seen = run->scratch(call, SNIPI_SLOT_PROJECT, in * SNIPI_PROJECTED);
    float *mixed = run->scratch(call, SNIPI_SLOT_MIXED, SNIPI_MIXED * in);
    float *result = run->scratch(call, SNIPI_SLOT_SAMPLE_OUT, SNIPI_SKETCH);
    if (!seen || !mixed || !result) return SNIP_OUT_OF_MEMORY;
    snip_status status = run->mix_rows(call, snipi_key(s, l, 0, SNIPI_ROLE_SKETCH + behind), x, call->rows, in,
                                       call->before, SNIPI_MIXED, mixed);
    if (!status) status = run->sketch_add(call, which, mixed, SNIPI_MIXED * in, sign);
    if (!status && by_x) status = run->mix_rows(call, project, weight, l->n, l->k, 0, SNIPI_PROJECTED, seen);
    if (!status && !by_x) status = run->mix_columns(call, project, weight, l->n, l->k, seen);
    if (!status) status = run->product(call, SNIPI_MIXED, SNIPI_PROJECTED, in, mixed, seen, by_x, result);
    return status ? status : run->sketch_sum(call, behind, result, sign);
}

static snip_status snipi_measure_forward(snipi_call *call, float *out, const float *inp, const float *weight,
                                         const float *bias) {
    const snip *s = call->s;
    const float *x = inp, *w = weight;
    snip_status status = call->run->record(call);
    if (!status && s->pass == SNIP_PASS_LOSS_PROBE && call->micro == 0)
        status = call->run->size_noise(call, inp, weight);
    if (!status) status = snipi_probe_operands(call, &x, &w);
    if (!status && s->pass != SNIP_PASS_LOSS_PROBE && snipi_probes_updates(s))
        status = snipi_sketch_tensor(call, SNIPI_SKETCH_X, inp, weight);
    return status ? status : call->run->fwd(call, s->desc.measure, out, x, w, bias);
}

// The update probe's dW is met only with its rows mixed: dY's columns are mixed before the product.
static snip_status snipi_probe_wgrad(const snipi_call *call, float *own, const float *dout, const float *x) {
    const snipi_operations *run = call->run;
    const snip *s = call->s;
    const snipi_layer *l = call->l;
    float *mixed = run->scratch(call, SNIPI_SLOT_SAMPLE, call->rows * SNIPI_PROJECTED);
    if (!mixed) return SNIP_OUT_OF_MEMORY;
    snip_status status = run->mix_columns(call, snipi_key(s, l, 0, SNIPI_ROLE_PROJECT), dout, call->rows, l->n, mixed);
    if (!status) status = run->wgrad(call, s->desc.measure, own, 0, mixed, SNIPI_PROJECTED, x);
    return status ? status : run->sketch_add(call, SNIPI_SKETCH_DW, own, SNIPI_PROJECTED * l->k, 1.0f);
}

// What W and dW of a loss probe or clean pass are measured for; own is the layer's dW.
static snip_status snipi_measure_weight(const snipi_call *call, float *own, float *dweight, const float *dout,
                                        const float *inp, const float *weight, int sketched) {
    const snipi_operations *run = call->run;
    const snip *s = call->s;
    const snipi_layer *l = call->l;
    const int clean = s->pass == SNIP_PASS_CLEAN;
    snip_status status = run->noise_dot(call, own, l->n * l->k, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_W),
                                        clean ? &call->sums->clean_w : &call->sums->noisy_w, dweight);
    if (!status && sketched) {
        float *mixed = run->scratch(call, SNIPI_SLOT_MIXED, SNIPI_PROJECTED * l->k);
        if (!mixed) return SNIP_OUT_OF_MEMORY;
        status = run->mix_rows(call, snipi_key(s, l, 0, SNIPI_ROLE_PROJECT), own, l->n, l->k, 0, SNIPI_PROJECTED,
                               mixed);
        if (!status) status = run->sketch_add(call, SNIPI_SKETCH_DW, mixed, SNIPI_PROJECTED * l->k, -1.0f);
    }
    for (int f = 0; clean && f < SNIPI_CANDIDATES && !status; f++)
        status = run->weight_errors(call, f, weight, own, l->calls_backward == 0);
    if (!status && sketched && dweight && !l->frozen) status = run->wgrad_errors(call, dout, inp, own);
    return status;
}

// The layer's own dX and dW of a measuring pass, beside the sums the caller keeps.
static snip_status snipi_measure_backward(snipi_call *call, float *dinp, float *dweight, const float *dout,
                                          const float *inp, const float *weight) {
    const snipi_operations *run = call->run;
    const snip *s = call->s;
    const snipi_layer *l = call->l;
    const int clean = s->pass == SNIP_PASS_CLEAN, loss_probe = s->pass == SNIP_PASS_LOSS_PROBE;
    const int sketched = !loss_probe && snipi_probes_updates(s);
    const int64_t most = snipi_max(call->rows, snipi_max(l->n, SNIPI_PROJECTED));
    const float *x = inp, *w = weight;
    snip_status status = run->record(call);
    if (!status) status = snipi_probe_operands(call, &x, &w);
    float *own = run->scratch(call, SNIPI_SLOT_OUT, most * l->k);
    if (!own) return SNIP_OUT_OF_MEMORY;

    if (!status && sketched) status = snipi_sketch_tensor(call, SNIPI_SKETCH_DY, dout, weight);
    if (!status) status = run->dgrad(call, s->desc.measure, own, 0, dout, w);
    if (!status && sketched) status = run->scaling(call, inp, own, snipi_probe_sign(s), clean ? NULL : dinp);
    if (!status && (clean || loss_probe))
        status = run->noise_dot(call, own, call->rows * l->k, snipi_key(s, l, call->micro, SNIPI_ROLE_NOISE_X),
                                clean ? &call->sums->clean_x : &call->sums->noisy_x, dinp);
    for (int f = 0; clean && f < SNIPI_CANDIDATES && !status; f++) {
        status = run->input_errors(call, f, inp, own);
        if (!status) status = run->gradient_errors(call, f, dout);
    }
    if (status) return status;

    if (!clean && !loss_probe) return snipi_probe_wgrad(call, own, dout, x);
    status = run->wgrad(call, s->desc.measure, own, 0, dout, l->n, x);
    return status ? status : snipi_measure_weight(call, own, dweight, dout, inp, weight, sketched);
}

// ---- a layer's calls in any pass

static snip_status snipi_forward(snipi_call *call, float *out, const float *inp, const float *weight,
                                 const float *bias) {
    const snipi_operations *run = call->run;
    snip *s = call->s;
    snipi_layer *l = call->l;
    if (s->mode != SNIP_TRAIN)
        return run->fwd(call, s->mode == SNIP_EVAL ? snipi_format(l, SNIP_FWD) : s->desc.high, out, inp, weight, bias);
    if (s->told) return snipi_refuse_for(call, snipi_step_is_over);
    snip_status status = snipi_open_micro(call, inp);
    s->calls = 1;
    if (bias && !status) status = run->count_nonfinite(call, bias, l->n);
    if (status) return status;
    if (s->pass != SNIP_PASS_ORDINARY) return snipi_measure_forward(call, out, inp, weight, bias);
    status = run->observe(call, 0, inp, call->rows * l->k);
    return status ? status : run->fwd(call, snipi_format(l, SNIP_FWD), out, inp, weight, bias);
}

static snip_status snipi_backward(snipi_call *call, float *dinp, float *dweight, float *dbias, const float *dout,
                                  const float *inp, const float *weight) {
    const snipi_operations *run = call->run;
    snip *s = call->s;
    snipi_layer *l = call->l;
    snip_status status;
    if (s->mode != SNIP_TRAIN) return snipi_refuse_for(call, "a backward call outside SNIP_TRAIN");
    if (s->told) return snipi_refuse_for(call, snipi_step_is_over);
    if (!snipi_match_micro(call, inp))
        return snipi_refuse_for(call, "a backward call whose input no forward call of this pass was given");
    s->calls = 1;
    l->running |= (dinp ? 1u << SNIP_DGRAD : 0) | (dweight ? 1u << SNIP_WGRAD : 0);
    if (s->pass == SNIP_PASS_ORDINARY) {
        status = run->observe(call, 1, dout, call->rows * l->n);
        if (!status) status = run->gradients(call, dinp, dweight, dout, inp, weight);
    } else
        status = snipi_measure_backward(call, dinp, dweight, dout, inp, weight);
    snipi_close_micro(call);
    if (dbias && !status) status = run->bias_gradient(call, dbias, dout);
    return status;
}

// A forward call again: the same keys and operands, and none of its sums.
static snip_status snipi_recompute(snipi_call *call, float *out, const float *inp, const float *weight,
                                   const float *bias) {
    const snip *s = call->s;
    const float *x = inp, *w = weight;
    if (s->mode != SNIP_TRAIN) return snipi_refuse_for(call, "snip_linear_recompute outside SNIP_TRAIN");
    if (s->told) return snipi_refuse_for(call, snipi_step_is_over);
    if (snipi_find_micro(call, inp, call->run->content(call, inp, call->rows * call->l->k)) < 0)
        return snipi_refuse_for(call, "snip_linear_recompute of an input that no waiting forward call was given");
    snipi_match_micro(call, inp);
    if (s->pass == SNIP_PASS_ORDINARY)
        return call->run->fwd(call, snipi_format(call->l, SNIP_FWD), out, inp, weight, bias);
    snip_status status = call->run->record(call);
    if (!status) status = snipi_probe_operands(call, &x, &w);
    return status ? status : call->run->fwd(call, s->desc.measure, out, x, w, bias);
}

static const snipi_operations *snipi_host(void);

SNIP_API snip_status snip_linear_forward(snip *s, int layer, float *out, const float *inp, const float *weight,
                                         const float *bias, int64_t rows) {
    snipi_call call;
    if (!snipi_begin_call(&call, s, layer, out, inp, weight, rows, snipi_host(), NULL, NULL))
        return snipi_refuse_call(s, "snip_linear_forward", layer);
    if (rows == 0) return SNIP_OK;
    const int64_t nonfinite = call.l->nonfinite;
    return snipi_finish_call(&call, nonfinite, snipi_forward(&call, out, inp, weight, bias));
}

SNIP_API snip_status snip_linear_backward(snip *s, int layer, float *dinp, float *dweight, float *dbias,
                                          const float *dout, const float *inp, const float *weight, int64_t rows) {
    snipi_call call;
    if (!snipi_begin_call(&call, s, layer, dout, inp, weight, rows, snipi_host(), NULL, NULL))
        return snipi_refuse_call(s, "snip_linear_backward", layer);
    if (rows == 0) return SNIP_OK;
    const int64_t nonfinite = call.l->nonfinite;
    return snipi_finish_call(&call, nonfinite, snipi_backward(&call, dinp, dweight, dbias, dout, inp, weight));
}

SNIP_API snip_status snip_linear_recompute(snip *s, int layer, float *out, const float *inp, const float *weight,
                                           const float *bias, int64_t rows) {
    snipi_call call;
    if (!snipi_begin_call(&call, s, layer, out, inp, weight, rows, snipi_host(), NULL, NULL))
        return snipi_refuse_call(s, "snip_linear_recompute", layer);
    if (rows == 0) return SNIP_OK;
    const int64_t nonfinite = call.l->nonfinite, saturated = call.l->saturated;
    const snip_status status = snipi_recompute(&call, out, inp, weight, bias);
    call.l->nonfinite = nonfinite;  // counted by the forward call
    call.l->saturated = saturated;
    return snipi_finish_call(&call, nonfinite, status);
}

SNIP_API snip_status snip_set_mode(snip *s, snip_mode mode) {
    if (!s || (int)mode < SNIP_TRAIN || mode > SNIP_EVAL_HIGH) return snipi_bad(s, "snip_set_mode", "no such mode");
    if (s->calls && mode != s->mode)
        return snipi_keep(s, snipi_bad(s, "snip_set_mode", "within a pass: the mode changes between steps"));
    s->mode = mode;
    return SNIP_OK;
}

// ---- from pass to pass

static void snipi_begin_pass(snip *s, snip_pass pass) {
    s->pass = pass;
    s->calls = 0;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        l->weight[0].held = l->weight[1].held = NULL;
        l->calls_forward = l->calls_backward = l->rows_forward = l->rows_backward = 0;
        l->running = 0;
    }
}

// The pass under way is over: what it ran is noted. In a measurement, each layer has as many backward as forward calls.
static void snipi_end_pass(snip *s) {
    s->calls = 0;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        l->calls_before = l->calls_forward;
        l->rows_of[s->pass] = l->rows_forward;
        if (l->calls_backward) l->kept.ran = l->running | 1u << SNIP_FWD;
        if (s->pass == SNIP_PASS_LOSS_PROBE && l->calls_backward) l->frozen = !(l->running >> SNIP_WGRAD & 1u);
        if (s->pass == SNIP_PASS_ORDINARY || l->calls_forward == l->calls_backward) continue;
        char why[160];
        snprintf(why, sizeof why,
                 "%lld forward and %lld backward calls in a pass of a measurement: a validation needs "
                 "snip_set_mode(s, SNIP_EVAL)",
                 (long long)l->calls_forward, (long long)l->calls_backward);
        snipi_keep(s, snipi_fail_layer(s, SNIP_BAD_ARGUMENT, l, why));
    }
}

static const char *snipi_bind_function(const snip *s) {
    return s->desc.optimizer == SNIP_ADAMW ? "snip_bind_adamw" : "snip_bind_momentum";
}

static snip_status snipi_not_bound(const snip *s, const snipi_layer *l) {
    char why[80];
    snprintf(why, sizeof why, "it has no optimizer state: call %s", snipi_bind_function(s));
    return snipi_fail_layer(s, SNIP_NOT_BOUND, l, why);
}

static int snipi_bound(const snip *s, const snipi_layer *l) { return l->m || s->desc.optimizer == SNIP_CUSTOM; }

// Between the two probes: how sensitive each layer's update is, and how far the weights move. call: of no layer.
static snip_status snipi_prepare_update_probe(snipi_call *call) {
    snip *s = call->s;
    for (int i = 0; i < s->n_layers; i++) {
        call->l = &s->layers[i];
        if (call->l->frozen || !call->l->rows_of[SNIP_PASS_LOSS_PROBE]) continue;
        if (!snipi_bound(s, call->l)) return snipi_not_bound(s, call->l);
        snip_status status = call->run->record(call);
        if (!status) status = call->run->sensitivity(call);
        if (status)
            return snipi_fail_layer(s, status, call->l,
                                    status == SNIP_NONFINITE ? "the optimizer's state is not finite"
                                                             : snip_status_text(status));
    }
    call->l = NULL;
    return call->run->step_size(call);
}

static int snipi_in_probe(const snip *s) {
    return s->pass == SNIP_PASS_LOSS_PROBE || s->pass == SNIP_PASS_UPDATE_PROBE;
}

// After a probe pass: the next one. Where the update probe cannot be made, the batch is run as in an ordinary step.
static void snipi_advance(snipi_call *call) {
    snip *s = call->s;
    if (s->pass == SNIP_PASS_LOSS_PROBE && snipi_probes_updates(s)) {
        const snip_status status = snipi_keep(s, snipi_prepare_update_probe(call));
        snipi_begin_pass(s, status ? SNIP_PASS_ORDINARY : SNIP_PASS_UPDATE_PROBE);
    } else
        snipi_begin_pass(s, SNIP_PASS_CLEAN);
}

SNIP_API int snip_next_pass(snip *s, double loss) {
    snipi_call call;
    if (!s) return 0;
    if (s->told) {
        snipi_keep(s, snipi_bad(s, "snip_next_pass", "called after the step's last pass: snip_end_step is missing"));
        return 0;
    }
    snipi_end_pass(s);
    if (!snipi_in_probe(s)) {
        s->loss = loss;
        s->told = 1;
        return 0;
    }
    snipi_begin_call(&call, s, 0, NULL, NULL, NULL, 0, snipi_host(), NULL, NULL);
    snipi_advance(&call);
    return 1;
}

// >>sums -------------------------------------------------------------------------------------------
// The operations of the passes on the CPU, and what they add to a layer's record:
//
//   curvature   <xi, dA(noisy)> in the loss probe and <xi, dA(clean)> in the clean pass, for A = X and W. Their
//               difference over sigma estimates h_A = tr d2L/dA2 (Hutchinson; cross terms vanish in expectation, as the
//               noises xi are independent).
//   answers     X' = (X(tau) - X) / tau and dY' alike, from count-sketches of update probe less clean pass. They are
//   the
//               model's Jacobian transposed times the direction z, and say how an error at the layer's outputs reaches
//               every weight's next update. dY' W and X' W^T are sketched with W's columns, as they are met, mixed into
//               32; dY'^T X + dY^T X', the change of dW, with its rows mixed into 32.
//   errors      of each candidate: |e_A|^2, <dA, e_A>, <A, e_A>, and by rows <dX_r, e_r>^2 and its like.
//   wgrad       |D * (dW's error)|^2, by running the GEMM on a sample of the output features.

enum {
    SNIPI_SKETCH_CHUNKS = 16,  // chunks of a sketch to a part: fewer would not pay for a sketch of its own
    SNIPI_MIX_PARTS = 16,      // parts that mixing is shared out in
    SNIPI_MIX_CHUNKS = 32,     // chunks whose signs are made at once
    SNIPI_MIX_WIDTH = 64,      // elements of a loop of constant length, which compilers vectorize
    SNIPI_SLOPES = 512,        // elements of D that are made at once
    SNIPI_BIAS_COLUMNS = 64,   // columns of dY that are summed at once, in 512 bytes of doubles
    SNIPI_LEAST_SAMPLE = 16    // output features that wgrad's error is measured on at least
};

// Noise of the loss probe in units of a tensor's rms. 2% keeps third-order terms below 1% of the second.
static const double SNIPI_NOISE = 0.02;

// Relative length of the update probe's step, rms over the layers. 0.1% and 10% gave the same ranks.
static const double SNIPI_STEP = 0.01;

// ---- one GEMM of a layer in one format

typedef enum { SNIPI_ACTIVATION, SNIPI_WEIGHT, SNIPI_GRADIENT } snipi_kind;

// An operand as the caller has it: [rows][cols], used as it lies or transposed.
typedef struct {
    const float *x;
    int64_t rows, cols;
    int transposed;
    snipi_kind kind;
    int role;
} snipi_tensor;

static snipi_tensor snipi_tensor_of(const float *x, int64_t rows, int64_t cols, int transposed, snipi_kind kind,
                                    int role) {
    snipi_tensor t;
    t.x = x;
    t.rows = rows;
    t.cols = cols;
    t.transposed = transposed;
    t.kind = kind;
    t.role = role;
    return t;
}

static snip_recipe snipi_recipe_of(const snip *s, snip_format format, snipi_kind kind) {
    const snip_recipes *set = format == SNIP_E4M3 ? &s->desc.fp8 : &s->desc.fp4;
    const snip_recipe f32 = SNIP_RECIPE_F32;
    if (snipi_plain(format)) return f32;
    return kind == SNIPI_ACTIVATION ? set->activation : kind == SNIPI_WEIGHT ? set->weight : set->gradient;
}

static void snipi_nonfinite_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const float *x = sum->x;
    const int64_t end = sum->n * (c + 1) / SNIPI_CHUNKS;
    int64_t i = sum->n * c / SNIPI_CHUNKS, bad = 0;
    for (; i + SNIPI_RUN <= end; i += SNIPI_RUN) {
        int run = 0;  // a constant trip count: vectorized even at -O2
        for (int j = 0; j < SNIPI_RUN; j++) run += snipi_nonfinite(x[i + j]);
        bad += run;
    }
    for (; i < end; i++) bad += snipi_nonfinite(x[i]);
    sum->part[c] = (double)bad;
}

static int64_t snipi_count_nonfinite(const float *x, int64_t n) {
    snipi_sum sum;
    sum.x = x;
    sum.n = n;
    return (int64_t)snipi_sum_up(&sum, snipi_nonfinite_chunk);
}

// Quantizes a tensor into the scratch of operand `slot`. F32 and BF16 are read where they are, and their elements that
// are not finite are counted as they are packed.
static snip_status snipi_operand(const snipi_call *call, snip_format format, const snipi_tensor *t, int slot,
                                 snip_recipe *recipe, snip_operand *out) {
    snip *s = call->s;
    const int64_t rows = t->transposed ? t->cols : t->rows, cols = t->transposed ? t->rows : t->cols;
    *recipe = snipi_recipe_of(s, format, t->kind);
    memset(out, 0, sizeof *out);
    out->recipe = recipe;
    if (snipi_plain(format)) {
        out->codes = t->x;
        out->transposed = t->transposed;
        out->round_bf16 = format == SNIP_BF16;
        return SNIP_OK;
    }
    void *codes = snipi_reserve(s, slot, snip_codes_bound(recipe, rows, cols));
    void *scales = snipi_reserve(s, slot + 1, snip_scales_bound(recipe, rows, cols));
    if (!codes || !scales) return SNIP_OUT_OF_MEMORY;
    out->codes = codes;
    out->scales = scales;
    snip_quant_stats counts;
    const snip_status status = snipi_quantize_to_codes(recipe, t->x, rows, cols, t->transposed ? 1 : t->cols,
                                                       t->transposed ? t->cols : 1, codes, scales,
                                                       snipi_key(s, call->l, call->micro, t->role), NULL, &counts, 0);
    call->l->nonfinite += counts.nonfinite;
    call->l->saturated += counts.saturated;
    return status;
}

// The weight is the same for all micro-batches of a pass: where there were several, it is quantized and packed for the
// first. NULL: it is not.
static snipi_cached *snipi_shared_weight(const snipi_call *call, snip_format format, const snipi_tensor *t) {
    snipi_cached *w = &call->l->weight[t->transposed];
    if (t->kind != SNIPI_WEIGHT || call->l->calls_before < 2) return NULL;
    if (call->s->pass != SNIP_PASS_ORDINARY || call->s->mode != SNIP_TRAIN) return NULL;
    if (snipi_recipe_of(call->s, format, SNIPI_WEIGHT).rounding != SNIP_ROUND_NEAREST_EVEN) return NULL;
    if (call->micro == 0 || w->format != format || w->held != t->x) w->held = NULL;
    return w;
}

static int snipi_reserve_panels(const snip *s, snipi_cached *w, size_t size) {
    if (size <= w->size) return 1;
    snipi_free(s, w->panels);
    w->panels = s->desc.alloc.alloc_fn(size, s->desc.alloc.user);
    w->size = w->panels ? size : 0;
    return w->panels != NULL;
}

// c[m][n] (+)= a * b^T in `format`, contiguous.
static snip_status snipi_layer_gemm(const snipi_call *call, snip_format format, const snipi_tensor *a,
                                    const snipi_tensor *b, float *c, int accumulate, const float *bias) {
    snip *s = call->s;
    snipi_layer *l = call->l;
    const int64_t m = a->transposed ? a->cols : a->rows, n = b->transposed ? b->cols : b->rows;
    const int64_t k = a->transposed ? a->rows : a->cols;
    snip_recipe recipe_a, recipe_b = snipi_recipe_of(s, format, b->kind);
    snip_operand operand_a, operand_b;
    snip_status status = snipi_operand(call, format, a, SNIPI_SLOT_A, &recipe_a, &operand_a);
    snipi_cached *shared = snipi_shared_weight(call, format, b);
    const int pack = !shared || !shared->held;
    const int64_t nonfinite = l->nonfinite, saturated = l->saturated;
    int64_t packed[2];  // elements of a and b that are not finite
    if (status) return status;
    if (pack)
        status = snipi_operand(call, format, b, SNIPI_SLOT_B, &recipe_b, &operand_b);
    else {
        memset(&operand_b, 0, sizeof operand_b);
        operand_b.recipe = &recipe_b;
        operand_b.round_bf16 = format == SNIP_BF16;
        l->nonfinite += shared->nonfinite;
        l->saturated += shared->saturated;
    }
    if (status) return status;
    void *scratch = snipi_reserve(s, SNIPI_SLOT_GEMM,
                                  snipi_gemm_scratch(m, n, k, snipi_s8_block(&operand_a, &operand_b, k)));
    if (!scratch) return SNIP_OUT_OF_MEMORY;
    if (shared && pack) {
        if (!snipi_reserve_panels(s, shared, snipi_gemm_held(m, n, k, &operand_a, &operand_b, s->desc.isa)))
            return SNIP_OUT_OF_MEMORY;
    }
    status = snipi_gemm_with(m, n, k, &operand_a, &operand_b, c, n, accumulate, bias, scratch, s->desc.isa,
                             shared ? shared->panels : NULL, pack, packed);
    if (status) return status;
    l->nonfinite += packed[0] + packed[1];
    if (shared && pack) {
        shared->nonfinite = l->nonfinite - packed[0] - nonfinite;
        shared->saturated = l->saturated - saturated;
        shared->held = b->x;
        shared->format = format;
    }
    return SNIP_OK;
}

static snip_status snipi_host_fwd(const snipi_call *call, snip_format format, float *y, const float *x, const float *w,
                                  const float *bias) {
    const snipi_layer *l = call->l;
    const snipi_tensor a = snipi_tensor_of(x, call->rows, l->k, 0, SNIPI_ACTIVATION, SNIPI_ROLE_X);
    const snipi_tensor b = snipi_tensor_of(w, l->n, l->k, 0, SNIPI_WEIGHT, SNIPI_ROLE_W);
    return snipi_layer_gemm(call, format, &a, &b, y, 0, bias);
}

static snip_status snipi_host_dgrad(const snipi_call *call, snip_format format, float *dx, int accumulate,
                                    const float *dy, const float *w) {
    const snipi_layer *l = call->l;
    const snipi_tensor a = snipi_tensor_of(dy, call->rows, l->n, 0, SNIPI_GRADIENT, SNIPI_ROLE_DY);
    const snipi_tensor b = snipi_tensor_of(w, l->n, l->k, 1, SNIPI_WEIGHT, SNIPI_ROLE_W_T);
    return snipi_layer_gemm(call, format, &a, &b, dx, accumulate, NULL);
}

static snip_status snipi_host_wgrad(const snipi_call *call, snip_format format, float *dw, int accumulate,
                                    const float *dy, int64_t features, const float *x) {
    const snipi_layer *l = call->l;
    const snipi_tensor a = snipi_tensor_of(dy, call->rows, features, 1, SNIPI_GRADIENT, SNIPI_ROLE_DY_T);
    const snipi_tensor b = snipi_tensor_of(x, call->rows, l->k, 1, SNIPI_ACTIVATION, SNIPI_ROLE_X_T);
    return snipi_layer_gemm(call, format, &a, &b, dw, accumulate, NULL);
}

static snip_status snipi_host_gradients(const snipi_call *call, float *dinp, float *dweight, const float *dout,
                                        const float *inp, const float *weight) {
    const snipi_layer *l = call->l;
    snip_status status = SNIP_OK;
    if (dinp) status = snipi_host_dgrad(call, snipi_format(l, SNIP_DGRAD), dinp, 1, dout, weight);
    if (dweight && !status) status = snipi_host_wgrad(call, snipi_format(l, SNIP_WGRAD), dweight, 1, dout, l->n, inp);
    return status;
}

// Columns are shared out and summed in double: the sum over a million rows is right to the last place of a float.
typedef struct {
    float *dbias;
    const float *dout;
    int64_t rows, n;
} snipi_bias;

static void snipi_bias_columns(void *arg, int64_t part) {
    const snipi_bias *q = (const snipi_bias *)arg;
    const int64_t begin = part * SNIPI_BIAS_COLUMNS, width = snipi_min(SNIPI_BIAS_COLUMNS, q->n - begin);
    double sum[SNIPI_BIAS_COLUMNS] = { 0 };
    for (int64_t r = 0; r < q->rows; r++) {
        const float *row = q->dout + r * q->n + begin;
        for (int64_t i = 0; i < width; i++) sum[i] += (double)row[i];
    }
    for (int64_t i = 0; i < width; i++) q->dbias[begin + i] = (float)((double)q->dbias[begin + i] + sum[i]);
}

static snip_status snipi_host_bias_gradient(const snipi_call *call, float *dbias, const float *dout) {
    snipi_bias q;
    q.dbias = dbias;
    q.dout = dout;
    q.rows = call->rows;
    q.n = call->l->n;
    snipi_share(snipi_bias_columns, &q, snipi_ceil_div(q.n, SNIPI_BIAS_COLUMNS), q.rows * q.n);
    return SNIP_OK;
}

static snip_status snipi_host_count_nonfinite(const snipi_call *call, const float *x, int64_t n) {
    call->l->nonfinite += snipi_count_nonfinite(x, n);
    return SNIP_OK;
}

// ---- a sample of a tensor

// Run r of a sample of n elements: [*begin, end). Runs are spread by the golden ratio, so that they meet all channels.
SNIPI_HD static int64_t snipi_observed_run(uint32_t r, int64_t n, int64_t *begin) {
    *begin = (int64_t)((double)(r * 0x9E3779B9u) / 4294967296.0 * (double)n);
    return snipi_min(*begin + SNIPI_OBSERVED_LENGTH, n);
}

static snip_status snipi_host_observe(const snipi_call *call, int which, const float *x, int64_t n) {
    snipi_layer *l = call->l;
    l->seen_calls += which == 0;
    for (uint32_t r = 0; r < SNIPI_OBSERVED_RUNS; r++) {
        int64_t i;
        const int64_t end = snipi_observed_run(r, n, &i);
        l->seen[which] += (double)(end - i);
        for (; i < end; i++) l->seen_sq[which] += (double)x[i] * (double)x[i];
    }
    return SNIP_OK;
}

static uint64_t snipi_hash(uint64_t hash, const void *data, size_t size) {  // FNV-1a
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ p[i]) * 0x100000001B3u;
    return hash;
}

#define SNIPI_HASH_START 0xCBF29CE484222325u

static uint64_t snipi_host_content(const snipi_call *call, const float *x, int64_t n) {
    uint64_t hash = SNIPI_HASH_START;
    (void)call;
    for (uint32_t r = 0; r < SNIPI_OBSERVED_RUNS; r++) {
        int64_t i;
        const int64_t end = snipi_observed_run(r, n, &i);
        for (; i < end; i++) hash = (hash ^ snipi_bits(x[i])) * 0x100000001B3u;
    }
    return hash;
}

// ---- records, norms and noise

// The layer's measurement, with so many bytes of sketches behind it; *begins: this is its first call of the measuring
// step. NULL: out of memory.
static snipi_measurement *snipi_measurement_of(const snipi_call *call, size_t sketches, int *begins) {
    snipi_layer *l = call->l;
    if (!l->measurement) {
        l->measurement = (snipi_measurement *)snipi_alloc(call->s, sizeof *l->measurement + sketches);
        if (!l->measurement) return NULL;
        l->measurement->step = -1;
        if (sketches) l->measurement->sketch = (float(*)[SNIPI_SKETCH])(void *)(l->measurement + 1);
    }
    *begins = l->measurement->step != call->s->kept.step;
    l->measurement->step = call->s->kept.step;
    return l->measurement;
}

static snip_status snipi_host_record(snipi_call *call) {
    const size_t sketches = SNIPI_SKETCHES * sizeof *call->sketch;
    int begins;
    snipi_measurement *m = snipi_measurement_of(call, sketches, &begins);
    if (!m) return SNIP_OUT_OF_MEMORY;
    call->sums = &m->sums;
    call->sketch = m->sketch;
    if (!begins) return SNIP_OK;
    memset(call->sums, 0, sizeof *call->sums);
    memset(call->sketch, 0, sketches);
    return SNIP_OK;
}

static float *snipi_host_scratch(const snipi_call *call, int slot, int64_t floats) {
    return (float *)snipi_reserve(call->s, slot, (size_t)floats * sizeof(float));
}

static double snipi_run_sq(const float *x, int64_t n) {
    enum { SNIPI_SQUARES = 32 };

    double lane[SNIPI_SQUARES] = { 0 };
    int64_t i = 0;
    for (; i + SNIPI_SQUARES <= n; i += SNIPI_SQUARES)
        for (int j = 0; j < SNIPI_SQUARES; j++) lane[j] += (double)x[i + j] * (double)x[i + j];
    for (int j = 0; i < n; i++, j++) lane[j] += (double)x[i] * (double)x[i];
    for (int half = SNIPI_SQUARES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

static void snipi_sum_sq_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const int64_t begin = sum->n * c / SNIPI_CHUNKS, end = sum->n * (c + 1) / SNIPI_CHUNKS;
    sum->part[c] = snipi_run_sq(sum->x + begin, end - begin);
}

static double snipi_sum_sq(const float *x, int64_t n) {
    snipi_sum sum;
    sum.x = x;
    sum.n = n;
    return snipi_sum_up(&sum, snipi_sum_sq_chunk);
}

// Micro-batches of a step share one sigma, whatever their order: it is of the rms of all of X in the step before. Where
// that was a single micro-batch, this one's own is the better known.
SNIPI_HD static double snipi_input_size(double before, double own) { return before > 0 ? before : own; }

// The rms of X that a step leaves for the next one's sigma; `before` where it was not looked at.
SNIPI_HD static double snipi_next_input_size(double before, double seen_sq, double seen, int64_t calls) {
    if (!(seen > 0)) return before;
    return calls > 1 && !snipi_nonfinite_f64(seen_sq) ? sqrt(seen_sq / seen) : 0;
}

static snip_status snipi_host_size_noise(const snipi_call *call, const float *inp, const float *weight) {
    const snipi_layer *l = call->l;
    const int64_t in_x = call->rows * l->k, in_w = l->n * l->k;
    snipi_sums *sums = call->sums;
    sums->weight_sq = snipi_sum_sq(weight, in_w);
    sums->sigma_w = SNIPI_NOISE * sqrt(sums->weight_sq / (double)in_w);
    sums->sigma_x = SNIPI_NOISE * snipi_input_size(l->kept.input_size, sqrt(snipi_sum_sq(inp, in_x) / (double)in_x));
    return SNIP_OK;
}

static snip_status snipi_host_noisy_input(const snipi_call *call, float *out, const float *x) {
    return snip_noise_add(out, x, call->rows * call->l->k, (float)call->sums->sigma_x, NULL,
                          snipi_key(call->s, call->l, call->micro, SNIPI_ROLE_NOISE_X));
}

static snip_status snipi_host_noise_dot(const snipi_call *call, const float *x, int64_t n, snip_rng_key key, double *to,
                                        float *add_to) {
    (void)call;
    *to += snipi_noise_dot(x, n, key, add_to);
    return SNIP_OK;
}

// ---- count-sketches (Charikar, Chen, Farach-Colton 2002)

// A sketch, added with a factor: element i of chunk c = i / 4096 goes to bucket (i + h(c)) % 4096 with a random sign.
// |sketch|^2 then estimates |x|^2 with relative deviation sqrt(2 / 4096), and the sketch of a difference is the
// difference of sketches. Chunks are shared out to parts whose number depends on n alone, each with a sketch of its
// own: the sums do not depend on the number of threads.
typedef struct {
    float *own;  // [parts][SNIPI_SKETCH]
    const float *x;
    int64_t n, chunks, parts;
    float factor;
    snip_rng_key key;
    snipi_flip flip;
} snipi_sketching;

static void snipi_sketch_chunk(const snipi_sketching *q, int64_t chunk, float *to) {
    uint32_t hash[4], words[4 * SNIPI_GROUP];
    snip_philox(q->key, (uint64_t)chunk | (uint64_t)1 << 63, hash);
    for (int b = 0; b < (int)SNIPI_SKETCH / (int)SNIPI_SIGNS; b++) {
        float terms[SNIPI_SIGNS];
        const int64_t from = chunk * SNIPI_SKETCH + b * SNIPI_SIGNS;
        const int bucket = (int)((hash[0] + (uint32_t)(b * SNIPI_SIGNS)) % SNIPI_SKETCH);
        const int end = (int)snipi_min(SNIPI_SIGNS, snipi_max(0, q->n - from));
        if (b % SNIPI_GROUP == 0) snipi_group_signs(q->key, (uint64_t)from / SNIPI_SIGNS, words);
        if (end == 0) continue;
        snipi_sign_block(q->flip, words + b % SNIPI_GROUP * 4, q->x + from, q->factor, 0, end, terms);
        if (bucket + SNIPI_SIGNS <= SNIPI_SKETCH)
            for (int i = 0; i < SNIPI_SIGNS; i++) to[bucket + i] += terms[i];
        else
            for (int i = 0; i < SNIPI_SIGNS; i++) to[(bucket + i) % SNIPI_SKETCH] += terms[i];
    }
}

static void snipi_sketch_part(void *arg, int64_t p) {
    const snipi_sketching *q = (const snipi_sketching *)arg;
    float *to = q->own + p * SNIPI_SKETCH;
    memset(to, 0, SNIPI_SKETCH * sizeof(float));
    for (int64_t chunk = q->chunks * p / q->parts; chunk < q->chunks * (p + 1) / q->parts; chunk++)
        snipi_sketch_chunk(q, chunk, to);
}

static int64_t snipi_sketch_parts(int64_t chunks) {
    return snipi_max(1, snipi_min(SNIPI_CHUNKS, chunks / SNIPI_SKETCH_CHUNKS));
}

static snip_status snipi_host_sketch_add(const snipi_call *call, int which, const float *x, int64_t n, float factor) {
    float *sketch = call->sketch[which];
    snipi_sketching q;
    q.x = x;
    q.n = n;
    q.chunks = snipi_ceil_div(n, SNIPI_SKETCH);
    q.parts = snipi_sketch_parts(q.chunks);
    q.own = snipi_host_scratch(call, SNIPI_SLOT_SKETCH, q.parts * SNIPI_SKETCH);
    q.factor = factor;
    q.key = snipi_key(call->s, call->l, 0, SNIPI_ROLE_SKETCH + which);
    q.flip = snipi_flip_of(SNIP_ISA_BEST);
    if (!q.own) return SNIP_OUT_OF_MEMORY;
    snipi_share(snipi_sketch_part, &q, q.parts, n);
    for (int64_t p = 0; p < q.parts; p++)
        for (int64_t j = 0; j < SNIPI_SKETCH; j++) sketch[j] += q.own[p * SNIPI_SKETCH + j];
    return SNIP_OK;
}

static snip_status snipi_host_sketch_sum(const snipi_call *call, int which, const float *x, float factor) {
    for (int i = 0; i < SNIPI_SKETCH; i++) call->sketch[which][i] += factor * x[i];
    return SNIP_OK;
}

static snip_status snipi_host_product(const snipi_call *call, int64_t m, int64_t n, int64_t k, const float *a,
                                      const float *b, int turned, float *c) {
    snip_recipe recipe = SNIP_RECIPE_F32;
    snip_operand operand_a, operand_b;
    void *scratch = snipi_reserve(call->s, SNIPI_SLOT_GEMM, snip_gemm_scratch(m, n, k));
    if (!scratch) return SNIP_OUT_OF_MEMORY;
    memset(&operand_a, 0, sizeof operand_a);
    memset(&operand_b, 0, sizeof operand_b);
    operand_a.recipe = operand_b.recipe = &recipe;
    operand_a.codes = a;
    operand_b.codes = b;
    operand_b.transposed = !turned;
    return snip_gemm(m, n, k, &operand_a, &operand_b, c, n, 0, NULL, scratch, call->s->desc.isa);
}

// ---- mixing of rows and columns

// The sum over rows of x [rows][cols] into `targets` rows, 128 or 32, each with a random sign: row r of chunk
// c = r / targets goes to row (r + h(c)) % targets, so that |mixed|^2 is |x|^2 in expectation, also behind a matrix.
// Targets are shared out; the chunks' rows are added in order.
typedef struct {
    snip_rng_key key;
    const float *x;
    int64_t rows, cols, before;  // before: rows ahead of x
    int targets;
    float *mixed;
} snipi_mixing;

SNIPI_HD SNIPI_INLINE void snipi_mix_hash(snip_rng_key key, int64_t chunk, uint32_t signs[4], uint32_t hash[4]) {
    snipi_philox(key, (uint64_t)chunk, signs);
    snipi_philox(key, (uint64_t)chunk | (uint64_t)1 << 63, hash);
}

static void snipi_add_signed(float *sum, float sign, const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + SNIPI_MIX_WIDTH <= n; i += SNIPI_MIX_WIDTH)
        for (int j = 0; j < SNIPI_MIX_WIDTH; j++) sum[i + j] += sign * x[i + j];
    for (; i < n; i++) sum[i] += sign * x[i];
}

static void snipi_mix_part(void *arg, int64_t part) {
    const snipi_mixing *q = (const snipi_mixing *)arg;
    const int64_t cols = q->cols, first = q->before / q->targets;
    const int64_t chunks = snipi_ceil_div(q->before + q->rows, q->targets) - first;
    const uint32_t targets = (uint32_t)q->targets, share = targets / SNIPI_MIX_PARTS, begin = (uint32_t)part * share;
    uint32_t signs[SNIPI_MIX_CHUNKS][4], hash[SNIPI_MIX_CHUNKS][4];
    memset(q->mixed + begin * cols, 0, (size_t)(share * cols) * sizeof(float));
    for (int64_t group = 0; group < chunks; group += SNIPI_MIX_CHUNKS) {
        const int64_t n = snipi_min(SNIPI_MIX_CHUNKS, chunks - group);
        for (int64_t c = 0; c < n; c++) snipi_mix_hash(q->key, first + group + c, signs[c], hash[c]);
        for (uint32_t to = begin; to < begin + share; to++)
            for (int64_t c = 0; c < n; c++) {
                const uint32_t at = (to - hash[c][0]) % targets;  // 2^32 is a multiple of it
                const int64_t row = (first + group + c) * targets + at - q->before;
                const float sign = signs[c][at / 32] >> at % 32 & 1u ? 1.0f : -1.0f;
                if (row < 0 || row >= q->rows) continue;
                snipi_add_signed(q->mixed + to * cols, sign, q->x + row * cols, cols);
            }
    }
}

static snip_status snipi_host_mix_rows(const snipi_call *call, snip_rng_key key, const float *x, int64_t rows,
                                       int64_t cols, int64_t before, int targets, float *mixed) {
    snipi_mixing q;
    (void)call;
    q.key = key;
    q.x = x;
    q.rows = rows;
    q.cols = cols;
    q.before = before;
    q.targets = targets;
    q.mixed = mixed;
    snipi_share(snipi_mix_part, &q, SNIPI_MIX_PARTS, rows * cols);
    return SNIP_OK;
}

// The same of the columns: x R [rows][32], R^T the matrix that mixing of rows multiplies by.
static void snipi_mix_columns_part(void *arg, int64_t part) {
    enum { SNIPI_TO = SNIPI_PROJECTED };

    const snipi_mixing *q = (const snipi_mixing *)arg;
    const int64_t begin = q->rows * part / SNIPI_MIX_PARTS, end = q->rows * (part + 1) / SNIPI_MIX_PARTS;
    const int64_t chunks = snipi_ceil_div(q->cols, SNIPI_TO);
    float sign[SNIPI_MIX_CHUNKS][SNIPI_TO];
    uint32_t shift[SNIPI_MIX_CHUNKS];
    memset(q->mixed + begin * SNIPI_TO, 0, (size_t)((end - begin) * SNIPI_TO) * sizeof(float));
    for (int64_t group = 0; group < chunks; group += SNIPI_MIX_CHUNKS) {
        const int64_t n = snipi_min(SNIPI_MIX_CHUNKS, chunks - group);
        for (int64_t c = 0; c < n; c++) {
            uint32_t signs[4], hash[4];
            snipi_mix_hash(q->key, group + c, signs, hash);
            shift[c] = hash[0] % SNIPI_TO;
            for (int j = 0; j < SNIPI_TO; j++) sign[c][j] = signs[0] >> j & 1u ? 1.0f : -1.0f;
        }
        for (int64_t r = begin; r < end; r++) {
            float sum[2 * SNIPI_TO] = { 0 }, *out = q->mixed + r * SNIPI_TO;  // what goes round the end stays apart
            for (int64_t c = 0; c < n; c++) {
                const int width = (int)snipi_min(SNIPI_TO, q->cols - (group + c) * SNIPI_TO);
                const float *x = q->x + r * q->cols + (group + c) * SNIPI_TO;
                float *to = sum + shift[c];
                if (width == SNIPI_TO)
                    for (int j = 0; j < SNIPI_TO; j++) to[j] += sign[c][j] * x[j];
                else
                    for (int j = 0; j < width; j++) to[j] += sign[c][j] * x[j];
            }
            for (int j = 0; j < SNIPI_TO; j++) out[j] += sum[j] + sum[j + SNIPI_TO];
        }
    }
}

static snip_status snipi_host_mix_columns(const snipi_call *call, snip_rng_key key, const float *x, int64_t rows,
                                          int64_t cols, float *mixed) {
    snipi_mixing q;
    (void)call;
    q.key = key;
    q.x = x;
    q.rows = rows;
    q.cols = cols;
    q.before = 0;
    q.targets = SNIPI_PROJECTED;
    q.mixed = mixed;
    snipi_share(snipi_mix_columns_part, &q, SNIPI_MIX_PARTS, rows * cols);
    return SNIP_OK;
}

// ---- the optimizer's sensitivity

// D = du/dg at learning rate 1, from the optimizer's state alone.
//   AdamW    (1 - beta1) / (1 - beta1^t) / (sqrt(vhat) + eps). Where v is 0 no gradient has ever arrived and none is
//            expected: D = 0.
//   SGD      1
//   Lion     Its sign has no slope; the mean update's has, the mean over gradients of a mini-batch's noise,
//            N(0, noise^2): 2 (1 - beta1) times the density of N(beta1 m, ((1 - beta1) noise)^2) at 0. m is nearly all
//            noise, of variance noise^2 (1 - beta2) / (1 + beta2).
//   custom   as the callback has filled it in
typedef struct {
    snip_optimizer kind;
    const float *state;
    float numerator, scale, eps;
} snipi_sensitivity;

static const double SNIPI_DENSITY = 0.7978845608028654;  // 2 / sqrt(2 pi)

static snipi_sensitivity snipi_sensitivity_of(const snip *s, const snipi_layer *l, const float *custom) {
    const snip_adamw *o = &s->kept.adamw;
    snipi_sensitivity d;
    d.kind = s->desc.optimizer;
    d.state = d.kind == SNIP_CUSTOM ? custom : d.kind == SNIP_ADAMW ? l->v : l->m;
    d.numerator = 1;
    d.scale = 0;
    d.eps = (float)o->eps;
    if (d.kind == SNIP_ADAMW) {
        d.numerator = (float)((1 - o->beta1) / (1 - pow(o->beta1, (double)(o->step + 1))));
        d.scale = (float)(1 / (1 - pow(o->beta2, (double)o->step)));
    } else if (d.kind == SNIP_LION) {
        const double n = (double)(l->n * l->k), moment_sq = snipi_sum_sq(l->m, l->n * l->k);
        const double noise = sqrt(moment_sq / n * (1 + o->beta2) / (1 - o->beta2));
        d.numerator = noise > 0 ? (float)(SNIPI_DENSITY / noise) : 0;
        d.scale = noise > 0 ? (float)(o->beta1 / ((1 - o->beta1) * noise)) : 0;
    }
    return d;
}

SNIPI_HD SNIPI_INLINE float snipi_sensitivity_at(const snipi_sensitivity *d, int64_t i) {
    const float x = d->state[i];
    if (d->kind == SNIP_ADAMW) return snipi_adam_at(d->numerator, x, d->scale, d->eps);
    if (d->kind == SNIP_CUSTOM) return x;
    if (d->kind == SNIP_LION) return d->numerator * expf(-0.5f * (x * d->scale) * (x * d->scale));
    return d->numerator;
}

static void snipi_sensitivity_run(const snipi_sensitivity *d, int64_t i, int64_t n, float *out) {
    if (d->kind == SNIP_ADAMW)
        snipi_adam_of(SNIP_ISA_BEST)(NULL, d->state + i, d->numerator, d->scale, d->eps, n, out);
    else
        for (int64_t j = 0; j < n; j++) out[j] = snipi_sensitivity_at(d, i + j);
}

typedef struct {
    snipi_sensitivity d;
    float *out;
    int64_t n;
} snipi_sensitivity_task;

static void snipi_sensitivity_chunk(void *arg, int64_t c) {
    const snipi_sensitivity_task *q = (const snipi_sensitivity_task *)arg;
    const int64_t i = q->n * c / SNIPI_CHUNKS;
    snipi_sensitivity_run(&q->d, i, q->n * (c + 1) / SNIPI_CHUNKS - i, q->out + i);
}

// out [n][k] = D; zeros for a frozen layer, which no update moves.
static void snipi_sensitivities(const snip *s, const snipi_layer *l, float *out) {
    snipi_sensitivity_task q;
    q.out = out;
    q.n = l->n * l->k;
    if (l->frozen) {
        memset(out, 0, (size_t)q.n * sizeof(float));
        return;
    }
    q.d = snipi_sensitivity_of(s, l, out);
    if (q.d.kind == SNIP_CUSTOM)
        s->desc.sensitivity(s->desc.sensitivity_user, snipi_index_of(s, l), out);
    else
        snipi_share(snipi_sensitivity_chunk, &q, SNIPI_CHUNKS, q.n);
}

static snip_status snipi_host_noisy_weight(const snipi_call *call, float *out, const float *w) {
    const snip *s = call->s;
    const snipi_layer *l = call->l;
    const snipi_sums *sums = call->sums;
    const int64_t n = l->n * l->k;
    if (s->pass == SNIP_PASS_LOSS_PROBE)
        return snip_noise_add(out, w, n, (float)sums->sigma_w, NULL, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_W));
    snipi_sensitivities(s, l, out);
    const float step = sums->weight_sq > 0 ? (float)(s->tau / sqrt(sums->weight_sq)) : 0.0f;
    return snip_noise_add(out, w, n, step, out, snipi_key(s, l, 0, SNIPI_ROLE_PROBE));
}

static snip_status snipi_host_sensitivity(const snipi_call *call) {
    const snipi_layer *l = call->l;
    const int64_t n = l->n * l->k;
    float *d = snipi_host_scratch(call, SNIPI_SLOT_W, n);
    if (!d) return SNIP_OUT_OF_MEMORY;
    if ((l->m && snipi_count_nonfinite(l->m, n)) || (l->v && snipi_count_nonfinite(l->v, n))) return SNIP_NONFINITE;
    snipi_sensitivities(call->s, l, d);
    call->sums->sensitivity_sq = snipi_sum_sq(d, n);
    return SNIP_OK;
}

static snip_status snipi_host_step_size(const snipi_call *call) {
    snip *s = call->s;
    double sum = 0;
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_measurement *m = s->layers[i].measurement;
        if (m && m->sums.weight_sq > 0) sum += m->sums.sensitivity_sq / (m->sums.weight_sq * m->sums.weight_sq);
    }
    s->tau = sum > 0 ? SNIPI_STEP / sqrt(sum / s->n_layers) : 0;
    return SNIP_OK;
}

SNIP_API snip_status snip_layer_sensitivity(snip *s, int layer, float *d) {
    const snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !d) return snipi_bad(s, "snip_layer_sensitivity", "no such layer, or d is NULL");
    if (!l->frozen && !snipi_bound(s, l)) return snipi_not_bound(s, l);
    if (s->kept.adamw.step < 1) return snipi_bad(s, "snip_layer_sensitivity", "the optimizer has made no step yet");
    snipi_sensitivities(s, l, d);
    return SNIP_OK;
}

// |u|^2 of the optimizer's last update of a layer, at learning rate 1.
typedef struct {
    snip_optimizer kind;
    const float *m, *v;
    int64_t n;
    float m_scale, v_scale, eps;
} snipi_update;

static void snipi_update_sq_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const snipi_update *q = (const snipi_update *)sum->of;
    const int64_t end = q->n * (c + 1) / SNIPI_CHUNKS;
    int64_t i = q->n * c / SNIPI_CHUNKS;
    float u[SNIPI_SLOPES];
    sum->part[c] = 0;
    if (q->kind == SNIP_SGD_MOMENTUM) sum->part[c] = snipi_run_sq(q->m + i, end - i);
    if (q->kind == SNIP_LION) sum->part[c] = (double)(end - i);  // all are -1 or 1
    for (; q->kind == SNIP_ADAMW && i < end; i += SNIPI_SLOPES) {
        const int64_t n = snipi_min(SNIPI_SLOPES, end - i);
        snipi_adam_of(SNIP_ISA_BEST)(q->m + i, q->v + i, q->m_scale, q->v_scale, q->eps, n, u);
        sum->part[c] += snipi_run_sq(u, n);
    }
}

static double snipi_layer_update_sq(const snip *s, const snipi_layer *l, const snip_adamw *o) {
    snipi_update q;
    snipi_sum sum;
    if (s->desc.optimizer == SNIP_CUSTOM)
        return s->desc.sensitivity(s->desc.sensitivity_user, snipi_index_of(s, l), NULL);
    q.kind = s->desc.optimizer;
    q.m = l->m;
    q.v = l->v;
    q.n = l->n * l->k;
    q.m_scale = (float)(1 / (1 - pow(o->beta1, (double)o->step)));
    q.v_scale = (float)(1 / (1 - pow(o->beta2, (double)o->step)));
    q.eps = (float)o->eps;
    sum.of = &q;
    sum.n = q.n;
    return snipi_sum_up(&sum, snipi_update_sq_chunk);
}

static int snipi_adamw_ok(const snip_adamw *o) {
    return o->step >= 1 && snipi_in_range(o->beta1, 0, 1) && snipi_in_range(o->beta2, 0, 1) && o->beta1 < 1 &&
           o->beta2 < 1 && snipi_in_range(o->eps, 0, 1) && snipi_in_range(o->grad_scale, 0, 1e30) &&
           !snipi_nonfinite_f64(o->lr);
}

SNIP_API double snip_update_sq(const snip *s, const snip_adamw *o) {
    double total = 0;
    if (!s || !o || !snipi_adamw_ok(o)) return 0;
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_layer *l = &s->layers[i];
        if (!l->measurement || l->frozen || !snipi_bound(s, l)) continue;
        const double u_sq = snipi_layer_update_sq(s, l, o), weight_sq = l->measurement->sums.weight_sq;
        if (weight_sq > 0) total += u_sq / weight_sq;
    }
    return total;
}

// ---- rounding errors

// <dX, X> of the pass's block i of 32 rows goes to bucket i % 64, with a factor; dX is added to add_to as well, which
// may be NULL.
typedef struct {
    const float *x, *dx;
    int64_t rows, k, before;
    float *add_to;
    double factor, *buckets;
} snipi_scaling;

static void snipi_scaling_bucket(void *arg, int64_t bucket) {
    enum { SNIPI_LANES_16 = 16 };

    const snipi_scaling *q = (const snipi_scaling *)arg;
    const int64_t first = q->before / SNIPI_BLOCK_ROWS, end = q->before + q->rows, k = q->k;
    int64_t block = first + (bucket + SNIPI_BLOCKS - first % SNIPI_BLOCKS) % SNIPI_BLOCKS;
    for (; block * SNIPI_BLOCK_ROWS < end; block += SNIPI_BLOCKS) {
        const int64_t last = snipi_min((block + 1) * SNIPI_BLOCK_ROWS, end);
        for (int64_t r = snipi_max(block * SNIPI_BLOCK_ROWS, q->before); r < last; r++) {
            const float *x = q->x + (r - q->before) * k, *d = q->dx + (r - q->before) * k;
            float *to = q->add_to ? q->add_to + (r - q->before) * k : NULL, lanes[SNIPI_LANES_16] = { 0 };
            int64_t i = 0;
            for (; i + SNIPI_LANES_16 <= k; i += SNIPI_LANES_16)
                for (int j = 0; j < SNIPI_LANES_16; j++) lanes[j] += d[i + j] * x[i + j];
            for (int j = 0; i < k; i++, j++) lanes[j] += d[i] * x[i];
            for (int j = 0; j < SNIPI_LANES_16; j++) q->buckets[bucket] += q->factor * (double)lanes[j];
            for (i = 0; to && i < k; i++) to[i] += d[i];
        }
    }
}

static snip_status snipi_host_scaling(const snipi_call *call, const float *x, const float *dx, double factor,
                                      float *add_to) {
    snipi_scaling q;
    q.x = x;
    q.dx = dx;
    q.rows = call->rows;
    q.k = call->l->k;
    q.before = call->before;
    q.add_to = add_to;
    q.factor = factor;
    q.buckets = call->sums->scaling;
    snipi_share(snipi_scaling_bucket, &q, SNIPI_BLOCKS, q.rows * q.k);
    return SNIP_OK;
}

// Sums over rows of X's rounding errors beside dX.
enum { SNIPI_DOT, SNIPI_DX_SQ, SNIPI_ALONG, SNIPI_BOTH, SNIPI_SCALE, SNIPI_ROW_SUMS };

typedef struct {
    const float *x, *rounded, *dx;
    int64_t rows, k;
    double sum[SNIPI_CHUNKS][SNIPI_ROW_SUMS];
} snipi_input_errors;

static void snipi_input_errors_chunk(void *arg, int64_t c) {
    enum { SNIPI_LANES_16 = 16 };

    snipi_input_errors *q = (snipi_input_errors *)arg;
    const int64_t k = q->k, end = q->rows * (c + 1) / SNIPI_CHUNKS;
    double sum[SNIPI_ROW_SUMS] = { 0 };
    for (int64_t r = q->rows * c / SNIPI_CHUNKS; r < end; r++) {
        const float *a = q->x + r * k, *b = q->rounded + r * k, *d = q->dx + r * k;
        float lanes[3][SNIPI_LANES_16] = { { 0 } };
        double row[3] = { 0, 0, 0 };  // <d, e>, |d|^2, <d, x>
        int64_t i = 0;
        for (; i + SNIPI_LANES_16 <= k; i += SNIPI_LANES_16)
            for (int j = 0; j < SNIPI_LANES_16; j++) {
                lanes[0][j] += d[i + j] * (b[i + j] - a[i + j]);
                lanes[1][j] += d[i + j] * d[i + j];
                lanes[2][j] += d[i + j] * a[i + j];
            }
        for (int j = 0; i < k; i++, j++) {
            lanes[0][j] += d[i] * (b[i] - a[i]);
            lanes[1][j] += d[i] * d[i];
            lanes[2][j] += d[i] * a[i];
        }
        for (int t = 0; t < 3; t++)
            for (int j = 0; j < SNIPI_LANES_16; j++) row[t] += (double)lanes[t][j];
        sum[SNIPI_DOT] += row[0];
        sum[SNIPI_DX_SQ] += row[1];
        sum[SNIPI_ALONG] += row[0] * row[0];
        sum[SNIPI_BOTH] += row[0] * row[2];
        sum[SNIPI_SCALE] += row[2] * row[2];
    }
    memcpy(q->sum[c], sum, sizeof sum);
}

static snip_status snipi_host_input_errors(const snipi_call *call, int f, const float *x, const float *dx) {
    const snip_recipe recipe = snipi_recipe_of(call->s, snipi_candidates[f], SNIPI_ACTIVATION);
    const int64_t rows = call->rows, k = call->l->k;
    snipi_candidate_sums *to = &call->sums->candidate[f];
    float *rounded = snipi_host_scratch(call, SNIPI_SLOT_X, rows * k);
    snipi_input_errors q;
    snip_quant_stats stats;
    if (!rounded) return SNIP_OUT_OF_MEMORY;
    snip_fake_quantize(&recipe, x, rows, k, k, rounded, k, snipi_key(call->s, call->l, call->micro, SNIPI_ROLE_X), x,
                       &stats);
    q.x = x;
    q.rounded = rounded;
    q.dx = dx;
    q.rows = rows;
    q.k = k;
    snipi_share(snipi_input_errors_chunk, &q, SNIPI_CHUNKS, rows * k);
    for (int c = 0; c < SNIPI_CHUNKS; c++) {
        to->dot_x += q.sum[c][SNIPI_DOT];
        to->dx_sq += q.sum[c][SNIPI_DX_SQ];
        to->along_x += q.sum[c][SNIPI_ALONG];
        to->both_x += q.sum[c][SNIPI_BOTH];
        to->scale_x += q.sum[c][SNIPI_SCALE];
    }
    to->self_x += stats.dot;
    to->err_x += stats.err_sq;
    if (f == 0) call->sums->input_sq += stats.sum_sq;
    return SNIP_OK;
}

static snip_status snipi_host_gradient_errors(const snipi_call *call, int f, const float *dy) {
    const snip_recipe recipe = snipi_recipe_of(call->s, snipi_candidates[f], SNIPI_GRADIENT);
    const int64_t n = call->l->n;
    snip_quant_stats stats;
    snip_fake_quantize(&recipe, dy, call->rows, n, n, NULL, 0, snipi_key(call->s, call->l, call->micro, SNIPI_ROLE_DY),
                       NULL, &stats);
    call->sums->candidate[f].err_dy += stats.err_sq;
    if (f == 0) call->sums->gradient_sq += stats.sum_sq;
    return SNIP_OK;
}

// first: W is met for the first time in this pass. A layer that the loss probe did not call has no |W|^2 yet.
static snip_status snipi_host_weight_errors(const snipi_call *call, int f, const float *w, const float *dw, int first) {
    const snip_recipe recipe = snipi_recipe_of(call->s, snipi_candidates[f], SNIPI_WEIGHT);
    const snipi_layer *l = call->l;
    const snip_rng_key key = snipi_key(call->s, l, 0, SNIPI_ROLE_W);
    snipi_candidate_sums *to = &call->sums->candidate[f];
    snip_quant_stats stats;
    snip_fake_quantize(&recipe, w, l->n, l->k, l->k, NULL, 0, key, dw, &stats);
    to->dot_w += stats.dot;
    if (!first) return SNIP_OK;
    to->err_w = stats.err_sq;
    if (!(call->sums->weight_sq > 0)) call->sums->weight_sq = stats.sum_sq;
    if (!snipi_probes_updates(call->s)) return SNIP_OK;
    snip_fake_quantize(&recipe, w, l->n, l->k, l->k, NULL, 0, key, w, &stats);
    to->self_w = stats.dot;
    return SNIP_OK;
}

// ---- wgrad's error, on output features at equal distances

static int64_t snipi_samples(const snip *s, const snipi_layer *l) {
    return snipi_min(l->n, snipi_max(SNIPI_LEAST_SAMPLE, (int64_t)ceil((double)l->n * s->desc.sample)));
}

// Feature i * n / samples of each row, without a division an element.
static void snipi_pick_features(const float *dy, int64_t rows, int64_t n, int64_t samples, float *picked) {
    for (int64_t r = 0; r < rows; r++) {
        const float *from = dy + r * n;
        int64_t rest = 0;
        for (int64_t i = 0; i < samples; i++) {
            picked[r * samples + i] = *from;
            from += n / samples;
            rest += n % samples;
            if (rest >= samples) {
                rest -= samples;
                from++;
            }
        }
    }
}

// |D * (result - exact)|^2 of sampled feature i; result is overwritten.
static double snipi_feature_error(const snipi_sensitivity *d, float *result, const float *exact, int64_t at,
                                  int64_t k) {
    float slope[SNIPI_SLOPES];
    for (int64_t j = 0; j < k; j++) {
        if (j % SNIPI_SLOPES == 0) snipi_sensitivity_run(d, at + j, snipi_min(SNIPI_SLOPES, k - j), slope);
        result[j] = (result[j] - exact[at + j]) * slope[j % SNIPI_SLOPES];
    }
    return snipi_run_sq(result, k);
}

// Scaled up to all features.
static snip_status snipi_host_wgrad_errors(const snipi_call *call, const float *dy, const float *x, const float *dw) {
    snip *s = call->s;
    snipi_layer *l = call->l;
    const int64_t samples = snipi_samples(s, l), nonfinite = l->nonfinite, saturated = l->saturated;
    const int custom = s->desc.optimizer == SNIP_CUSTOM;
    float *picked = snipi_host_scratch(call, SNIPI_SLOT_SAMPLE, call->rows * samples);
    float *result = snipi_host_scratch(call, SNIPI_SLOT_SAMPLE_OUT, samples * l->k);
    float *slopes = custom ? snipi_host_scratch(call, SNIPI_SLOT_W, l->n * l->k) : NULL;
    if (!picked || !result || (custom && !slopes)) return SNIP_OUT_OF_MEMORY;
    const snipi_sensitivity d = snipi_sensitivity_of(s, l, slopes);
    if (custom) snipi_sensitivities(s, l, slopes);
    snipi_pick_features(dy, call->rows, l->n, samples, picked);
    snip_status status = SNIP_OK;
    for (int f = 0; f < SNIPI_CANDIDATES && !status; f++) {
        double sum = 0;
        status = snipi_host_wgrad(call, snipi_candidates[f], result, 0, picked, samples, x);
        for (int64_t i = 0; i < samples && !status; i++)
            sum += snipi_feature_error(&d, result + i * l->k, dw, i * l->n / samples * l->k, l->k);
        call->sums->candidate[f].wgrad_err += sum * ((double)l->n / (double)samples);
    }
    l->nonfinite = nonfinite;  // counted by the layer's own GEMMs
    l->saturated = saturated;
    return status;
}

static const snipi_operations *snipi_host(void) {
    static const snipi_operations host = {
        snipi_host_fwd,           snipi_host_dgrad,           snipi_host_wgrad,         snipi_host_gradients,
        snipi_host_bias_gradient, snipi_host_count_nonfinite, snipi_host_content,       snipi_host_observe,
        snipi_host_record,        snipi_host_scratch,         snipi_host_size_noise,    snipi_host_noisy_input,
        snipi_host_noisy_weight,  snipi_host_noise_dot,       snipi_host_mix_rows,      snipi_host_mix_columns,
        snipi_host_sketch_add,    snipi_host_sketch_sum,      snipi_host_product,       snipi_host_scaling,
        snipi_host_input_errors,  snipi_host_gradient_errors, snipi_host_weight_errors, snipi_host_wgrad_errors,
        snipi_host_sensitivity,   snipi_host_step_size,
    };
    return &host;
}

// The record is complete once the optimizer has run.
static void snipi_host_finish(snip *s, const snip_adamw *adamw) {
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        if (!l->measurement) continue;
        snipi_sums *sums = &l->measurement->sums;
        const int updated = snipi_probes_updates(s) && !l->frozen && snipi_bound(s, l);
        sums->update_sq = updated ? snipi_layer_update_sq(s, l, adamw) : 0;
        for (int t = 0; t < SNIPI_SKETCHES && l->rows_of[SNIP_PASS_CLEAN]; t++)
            sums->sketched_sq[t] = snipi_sum_sq(l->measurement->sketch[t], SNIPI_SKETCH);
    }
}

// >>costs ------------------------------------------------------------------------------------------
// A function of the sums. With h_A = <xi, dA(noisy) - dA(clean)> / sigma_A, the loss changes if a layer's forward GEMM
// runs in format f by
//
//   first  = <dX, e_X> + <dW, e_W>
//   second = (a h_X |e_X|^2 / n_X + h_W |e_W|^2 / n_W) / 2
//
// and the relative squared error of the next update of all layers, U^2 = sum_j |u_j|^2 / |W_j|^2, is
//
//   fwd    (a |r_X|^2 / n_X * |dY' W|^2 + |r_W|^2 / n_W * |dY'^T X|^2 + (c_X + c_W)^2 <dY', Y>^2) / U^2
//   dgrad  (|e_dY|^2 / n_Y * |X' W^T|^2 + |e_W|^2 / n_W * |dY^T X'|^2) / U^2
//   wgrad  |D * (dW's error)|^2 / |W|^2 / U^2
//
//   a      n_X sum over rows <dX_r, e_r>^2 / (|dX|^2 |e_X|^2): 1 where e_X is white inside a row. |e_X|^2 cancels.
//   c_A    -<A, e_A> / |A|^2, the part of the error that shrinks A; r_A = e_A + c_A A is the rest.
//   <dY', Y> = <dY' W, X> is the change of <dX, X> from pass to pass, in blocks of 32 rows whose squares are added.
// dY'^T X and dY^T X' are uncorrelated and share the square of their sum as |dY'|^2 |X|^2 : |X'|^2 |dY|^2.
// The learning rate cancels, so D and u are taken at rate 1. Both errors are scaled by the gradients' grad_scale.
//
// A layer whose rows changed between the passes (a mixture's expert, whose tokens noise has moved) has no differences
// between passes. Its answer to a GEMM's relative error, per row, is the median answer of the layers whose rows stayed.
//
//   cost[fwd]   = loss_weight * (shrunk first + second) / L + update_weight * update
//   cost[other] = update_weight * update * (r + (1 - r) / horizon)
//
// The forward's errors repeat with the slowly moving weights. The backward GEMMs' are noise, which averages out over
// steps, but for the share r of dY's squared error that lies along dY: 0 where rounding is stochastic, |e|^2 / |dY|^2
// to nearest, where a code is about the mean of what it stands for.

// What the estimates of all layers have in common.
typedef struct {
    double update_sq;  // U^2
    double probe;      // (grad_scale / tau)^2 / U^2
    double grad_scale;
} snipi_units;

static snipi_units snipi_units_of(const snip *s, double grad_scale) {
    snipi_units u;
    u.update_sq = 0;
    u.grad_scale = grad_scale;
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_layer *l = &s->layers[i];
        if (l->measurement && l->measurement->sums.weight_sq > 0)
            u.update_sq += l->measurement->sums.update_sq / l->measurement->sums.weight_sq;
    }
    u.probe = s->tau > 0 && u.update_sq > 0 ? grad_scale * grad_scale / (s->tau * s->tau * u.update_sq) : 0;
    return u;
}

static snip_estimate snipi_estimate_of(const snipi_sums *m, int f, double n_w, const snipi_units *u) {
    const snipi_candidate_sums *q = &m->candidate[f];
    const double h_x = snipi_ratio(m->noisy_x - m->clean_x, m->sigma_x);
    const double h_w = snipi_ratio(m->noisy_w - m->clean_w, m->sigma_w);

    // The square of dW's change, shared between forward and dgrad.
    const double fwd_sq = m->sketched_sq[SNIPI_SKETCH_DY] * m->input_sq;
    const double dgrad_sq = m->sketched_sq[SNIPI_SKETCH_X] * m->gradient_sq;
    const double dw_sq = m->sketched_sq[SNIPI_SKETCH_DW], by_fwd = dw_sq * snipi_ratio(fwd_sq, fwd_sq + dgrad_sq);

    // What shrinks X and W, and the rest of their errors.
    const double mean_w = q->err_w / n_w;
    const double shrink_x = -snipi_ratio(q->self_x, m->input_sq), shrink_w = -snipi_ratio(q->self_w, m->weight_sq);
    const double rest_x = q->along_x + shrink_x * (2 * q->both_x + shrink_x * q->scale_x);
    const double rest_w = mean_w - shrink_w * shrink_w * m->weight_sq / n_w;
    double scaling_sq = 0;
    for (int i = 0; i < SNIPI_BLOCKS; i++) scaling_sq += m->scaling[i] * m->scaling[i];

    snip_estimate e;
    memset(&e, 0, sizeof e);
    e.loss_first = q->dot_x + q->dot_w;
    e.loss_second = 0.5 * (h_x * snipi_ratio(q->along_x, q->dx_sq) + h_w * mean_w);
    e.update[SNIP_FWD] = (snipi_ratio(rest_x, q->dx_sq) * m->sketched_sq[SNIPI_SKETCH_DYW] + rest_w * by_fwd +
                          (shrink_x + shrink_w) * (shrink_x + shrink_w) * scaling_sq) *
                         u->probe;
    e.update[SNIP_DGRAD] = (snipi_ratio(q->err_dy, m->elements_y) * m->sketched_sq[SNIPI_SKETCH_XW] +
                            mean_w * (dw_sq - by_fwd)) *
                           u->probe;
    e.update[SNIP_WGRAD] = snipi_ratio(q->wgrad_err, m->weight_sq) *
                           snipi_ratio(u->grad_scale * u->grad_scale, u->update_sq);
    return e;
}

static int snipi_estimate_finite(const snip_estimate *e) {
    return !snipi_nonfinite_f64(e->loss_first + e->loss_second + e->update[SNIP_FWD] + e->update[SNIP_DGRAD] +
                                e->update[SNIP_WGRAD]);
}

// ---- layers whose rows moved

// A probe that changes more of X than this share of |X|^2 has met other rows, though as many: a step of 1% in the
// weights changes 0.01% to 1% of it.
static const double SNIPI_OTHER_ROWS = 0.25;

// Called in the clean pass of the measurement.
static int snipi_met(const snipi_layer *l) { return l->rows_of[SNIP_PASS_CLEAN] > 0; }

static int snipi_moved_in(const snip *s, const snipi_layer *l, snip_pass probe) {
    const snipi_sums *m = &l->measurement->sums;
    if (probe == SNIP_PASS_UPDATE_PROBE && !snipi_probes_updates(s)) return 0;
    if (l->rows_of[probe] != l->rows_of[SNIP_PASS_CLEAN]) return 1;
    return probe == SNIP_PASS_UPDATE_PROBE && m->sketched_sq[SNIPI_SKETCH_X] > SNIPI_OTHER_ROWS * m->input_sq;
}

static int snipi_moved(const snip *s, const snipi_layer *l) {
    return snipi_moved_in(s, l, SNIP_PASS_LOSS_PROBE) || snipi_moved_in(s, l, SNIP_PASS_UPDATE_PROBE);
}

// What needs a difference between passes: the curvature part of the loss change, and updates by forward and dgrad.
enum { SNIPI_ANSWER_LOSS, SNIPI_ANSWER_FWD, SNIPI_ANSWER_DGRAD, SNIPI_ANSWERS };

static double *snipi_answer_of(snip_estimate *e, int which) {
    if (which == SNIPI_ANSWER_LOSS) return &e->loss_second;
    return &e->update[which == SNIPI_ANSWER_FWD ? SNIP_FWD : SNIP_DGRAD];
}

// Relative squared error of the GEMM's output, by its operands' errors, times the rows that have it.
static double snipi_answer_unit(const snipi_layer *l, int f, int which) {
    const snipi_sums *m = &l->measurement->sums;
    const snipi_candidate_sums *q = &m->candidate[f];
    const int dgrad = which == SNIPI_ANSWER_DGRAD;
    const double first = dgrad ? snipi_ratio(q->err_dy, m->gradient_sq) : snipi_ratio(q->err_x, m->input_sq);
    return (first + snipi_ratio(q->err_w, m->weight_sq)) * (double)l->rows_of[SNIP_PASS_CLEAN];
}

static int snipi_ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The median answer of the layers whose rows stayed and that have one; values has room for one a layer.
static double snipi_median_answer(const snip *s, int f, int which, double *values) {
    int count = 0;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        if (!snipi_met(l) || snipi_moved(s, l)) continue;
        const double unit = snipi_answer_unit(l, f, which), answer = *snipi_answer_of(&l->kept.estimate[f], which);
        if (unit > 0 && answer > 0) values[count++] = answer / unit;
    }
    if (count == 0) return 0;
    qsort(values, (size_t)count, sizeof *values, snipi_ascending);
    return values[count / 2];
}

static void snipi_estimate_moved(const snip *s, snipi_layer *l, int f, const double answer[SNIPI_ANSWERS]) {
    for (int which = 0; which < SNIPI_ANSWERS; which++) {
        const snip_pass probe = which == SNIPI_ANSWER_LOSS ? SNIP_PASS_LOSS_PROBE : SNIP_PASS_UPDATE_PROBE;
        if (snipi_moved_in(s, l, probe))
            *snipi_answer_of(&l->kept.estimate[f], which) = answer[which] * snipi_answer_unit(l, f, which);
    }
}

// Where no layer has an answer to an error of dgrad, that to one of forward stands for it.
static snip_status snipi_estimate_all_moved(snip *s) {
    int moved = 0;
    for (int i = 0; i < s->n_layers; i++) moved += snipi_met(&s->layers[i]) && snipi_moved(s, &s->layers[i]);
    if (!moved) return SNIP_OK;
    double *values = (double *)snipi_alloc(s, (size_t)s->n_layers * sizeof *values);
    if (!values) return snipi_no_memory(s, "a measurement");
    for (int f = 0; f < SNIPI_CANDIDATES; f++) {
        double answer[SNIPI_ANSWERS];
        for (int which = 0; which < SNIPI_ANSWERS; which++) answer[which] = snipi_median_answer(s, f, which, values);
        if (!(answer[SNIPI_ANSWER_DGRAD] > 0)) answer[SNIPI_ANSWER_DGRAD] = answer[SNIPI_ANSWER_FWD];
        for (int i = 0; i < s->n_layers; i++)
            if (snipi_met(&s->layers[i]) && snipi_moved(s, &s->layers[i]))
                snipi_estimate_moved(s, &s->layers[i], f, answer);
    }
    snipi_free(s, values);
    return SNIP_OK;
}

// ---- averages over measurements

enum {
    SNIPI_AVERAGED = 3  // a measurement weighs 1 / 3 from the third on: the mean rests on 5 at most
};

// Degrees of freedom that the variance expected of a term's size counts as.
static const double SNIPI_FREEDOM = 4;

// Mean and variance over measurements x, by exponential weights (Finch, Incremental calculation of weighted mean and
// variance, 2009):
//   r = max(1 / n, 1 / 3),  d = x - mean,  mean += r d,  S = (1 - r) (S + r d^2),  q = (1 - r)^2 q + r^2
// q is the sum of the squared weights. One measurement deviates by var = S / (1 - q) on average, the mean by
// sqrt(q var); it rests on 1 / q measurements.
static void snipi_average_term(snipi_average *a, int term, double x, double rate) {
    const double d = x - a->mean[term];
    a->mean[term] += rate * d;
    a->variance[term] = (1 - rate) * (a->variance[term] + rate * d * d);
}

static double snipi_variance(const snip *s, const snipi_average *a, int term) {
    return s->kept.squared_weights < 1 ? a->variance[term] / (1 - s->kept.squared_weights) : 0;
}

// Squared standard error of a mean. Few measurements tell little of their variance: it is moderated towards the one
// expected of the mean's size from all layers, `relative` (Smyth 2004, empirical Bayes). Of a single measurement the
// error is taken to be as large as its value.
static double snipi_error_sq(const snip *s, const snipi_average *a, int term, double relative) {
    const double own = snipi_variance(s, a, term), mean_sq = a->mean[term] * a->mean[term];
    const double weights = s->kept.squared_weights, freedom = 1 / weights - 1;
    if (!(weights < 1)) return mean_sq;
    return weights * (SNIPI_FREEDOM * relative * (mean_sq + own) + freedom * own) / (SNIPI_FREEDOM + freedom);
}

static int snipi_has_averages(const snipi_layer *l) {
    int any = 0;
    for (int t = 0; t < SNIPI_TERMS; t++) any |= l->kept.average[0].mean[t] != 0 || l->kept.average[1].mean[t] != 0;
    return any;
}

// What was not called in a measurement keeps its averages and costs.
static void snipi_average_measurement(snip *s) {
    snipi_kept *kept = &s->kept;
    kept->measurements += 1;
    const double session_rate = kept->measurements < (double)SNIPI_AVERAGED ? 1 / kept->measurements
                                                                            : 1.0 / (double)SNIPI_AVERAGED;
    kept->squared_weights = (1 - session_rate) * (1 - session_rate) * kept->squared_weights +
                            session_rate * session_rate;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        if (!snipi_met(l)) continue;
        const double rate = snipi_has_averages(l) ? session_rate : 1;
        for (int f = 0; f < SNIPI_CANDIDATES; f++) {
            const snip_estimate *e = &l->kept.estimate[f];
            snipi_average *a = &l->kept.average[f];
            snipi_average_term(a, SNIPI_FIRST, e->loss_first, rate);
            snipi_average_term(a, SNIPI_SECOND, e->loss_second, rate);
            for (int g = 0; g < SNIP_GEMMS; g++) snipi_average_term(a, SNIPI_UPDATE + g, e->update[g], rate);
        }
        memcpy(l->kept.reference, l->kept.level, sizeof l->kept.reference);
    }
}

// ---- costs

// Share r of the backward GEMMs' errors that repeats.
static double snipi_repeating(const snip *s, const snipi_layer *l, int f) {
    const snipi_sums *m = &l->measurement->sums;
    const double r = snipi_ratio(m->candidate[f].err_dy, m->gradient_sq);
    if (snipi_recipe_of(s, snipi_candidates[f], SNIPI_GRADIENT).rounding == SNIP_ROUND_STOCHASTIC) return 0;
    return r < 1 ? r : 1;
}

// Variance of a term relative to its square, over all layers.
static double snipi_relative_variance(const snip *s, int f, int term) {
    double deviation = 0, size = 0;
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_average *a = &s->layers[i].kept.average[f];
        const double variance = snipi_variance(s, a, term);
        deviation += variance;
        size += a->mean[term] * a->mean[term] + variance;
    }
    return snipi_ratio(deviation, size);
}

static const double SNIPI_DEVIATION = 1.2533;  // of a normal variable, in mean absolute deviations: sqrt(pi / 2)

// What a change of the loss is compared with: the loss. A loss near 0 (a policy's) says nothing of its own size; then
// its deviation from step to step, or all changes that are predicted of it, if larger.
static double snipi_loss_scale(const snip *s) {
    double scale = fabs(s->loss), predicted = 0;
    const double deviation = SNIPI_DEVIATION * s->kept.loss_deviation;
    for (int i = 0; i < s->n_layers; i++) {
        double most = 0;
        for (int f = 0; f < SNIPI_CANDIDATES; f++) {
            const double second = s->layers[i].kept.average[f].mean[SNIPI_SECOND];
            if (second > most) most = second;
        }
        predicted += most;
    }
    if (deviation > scale) scale = deviation;
    return predicted > scale ? predicted : scale;
}

// Costs and their errors from the averages. The first-order term, whose sign moves with the batch and which is 0 in
// expectation where rounding is unbiased, is shrunk to its posterior mean under a prior N(0, first^2) (Efron and Morris
// 1973): by the factor first^2 / (first^2 + error^2).
static void snipi_layer_costs(const snip *s, snipi_layer *l, int f, double loss_weight, const double *relative) {
    const snipi_average *a = &l->kept.average[f];
    snip_estimate *e = &l->kept.estimate[f];
    const double update_weight = s->desc.update_weight > 0 ? s->desc.update_weight : 0;
    const double first_sq = a->mean[SNIPI_FIRST] * a->mean[SNIPI_FIRST];
    const double first_error_sq = snipi_error_sq(s, a, SNIPI_FIRST, relative[SNIPI_FIRST]);
    const double second_error_sq = snipi_error_sq(s, a, SNIPI_SECOND, relative[SNIPI_SECOND]);
    const double keep = snipi_ratio(first_sq, first_sq + first_error_sq);
    for (int g = 0; g < SNIP_GEMMS; g++) {
        const int t = SNIPI_UPDATE + g, forward = g == SNIP_FWD;
        const double r = forward ? 1 : snipi_repeating(s, l, f);
        const double weight = update_weight * (r + (1 - r) / s->desc.horizon);
        const double loss = forward ? loss_weight * (keep * a->mean[SNIPI_FIRST] + a->mean[SNIPI_SECOND]) : 0;
        const double loss_error_sq = forward ? keep * first_error_sq + second_error_sq : 0;
        e->cost[g] = weight * a->mean[t] + loss;
        e->error[g] = sqrt(weight * weight * snipi_error_sq(s, a, t, relative[t]) +
                           loss_weight * loss_weight * loss_error_sq);
    }
}

static void snipi_costs(snip *s) {
    const double loss_weight = s->desc.loss_weight > 0 ? snipi_ratio(s->desc.loss_weight, snipi_loss_scale(s)) : 0;
    for (int f = 0; f < SNIPI_CANDIDATES; f++) {
        double relative[SNIPI_TERMS];
        for (int t = 0; t < SNIPI_TERMS; t++) relative[t] = snipi_relative_variance(s, f, t);
        for (int i = 0; i < s->n_layers; i++)
            if (snipi_met(&s->layers[i])) snipi_layer_costs(s, &s->layers[i], f, loss_weight, relative);
    }
}

// From the records of a measurement to averaged costs. An error discards the measurement: nothing has changed.
static snip_status snipi_take_measurement(snip *s, double grad_scale) {
    int met = 0, moved = 0;
    if (snipi_nonfinite_f64(s->loss))
        return snipi_fail(s, SNIP_NONFINITE, "the measuring step", "its loss is not finite: measurement discarded");
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        if (!snipi_met(l)) continue;
        met++;
        moved += snipi_moved(s, l);
        l->measurement->sums.elements_x = (double)(l->rows_of[SNIP_PASS_CLEAN] * l->k);
        l->measurement->sums.elements_y = (double)(l->rows_of[SNIP_PASS_CLEAN] * l->n);
    }
    if (!met) return snipi_bad(s, "the measuring step", "it called no linear layer: measurement discarded");
    if (met == moved) return snipi_bad(s, "the measuring step", "its passes ran different rows: measurement discarded");

    const snipi_units units = snipi_units_of(s, grad_scale);
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_layer *l = &s->layers[i];
        for (int f = 0; f < SNIPI_CANDIDATES && snipi_met(l); f++) {
            const snip_estimate e = snipi_estimate_of(&l->measurement->sums, f, (double)(l->n * l->k), &units);
            if (!snipi_estimate_finite(&e))
                return snipi_fail_layer(s, SNIP_NONFINITE, l, "its measurement is not finite and was discarded");
        }
    }
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        for (int f = 0; f < SNIPI_CANDIDATES && snipi_met(l); f++)
            l->kept.estimate[f] = snipi_estimate_of(&l->measurement->sums, f, (double)(l->n * l->k), &units);
    }
    const snip_status status = snipi_estimate_all_moved(s);
    if (status) return status;
    snipi_average_measurement(s);
    snipi_costs(s);
    return SNIP_OK;
}

// >>plan -------------------------------------------------------------------------------------------
// A function of the costs: a multiple-choice knapsack, solved to a proven optimum by snip_ilp.h. A layer is a group,
// its options the states of its GEMMs that may be chosen, each with its harm and its gain toward the stage's target:
// products in * out in FP4, whole numbers, so that targets are met exactly; or seconds saved against the slowest state.
// Where a stage asks for nothing, GEMMs of equal harm keep the higher precision.

enum { SNIPI_OPTIONS = 27 };  // three states of three GEMMs: three digits to the base 3

static int snipi_by_seconds(const snip *s) { return s->desc.speedup > 0 || s->desc.seconds > 0; }

static int snipi_state_of(const snip *s, snip_format format) {
    if (format == s->desc.high || snipi_plain(format)) return 0;
    return format == SNIP_E4M3 ? 1 : 2;
}

static snip_format snipi_format_of(const snip *s, int state) {
    return state ? snipi_candidates[state - 1] : s->desc.high;
}

static int snipi_option_state(int option, int g) { return option / (g == 0 ? 1 : g == 1 ? 3 : 9) % 3; }

static int snipi_planned_state(const snip *s, const snipi_layer *l, int g) {
    return snipi_state_of(s, snipi_format(l, g));
}

// A plan by FLOPs leaves nothing in `high`, which is more precise than a budget asks for; a plan by seconds may.
static int snipi_state_allowed(const snip *s, const snipi_layer *l, int g, int state) {
    if (state == 0) return snipi_by_seconds(s) && (l->allow[g] & SNIPI_ALLOW_FP8);
    return (l->allow[g] & (state == 1 ? SNIPI_ALLOW_FP8 : SNIPI_ALLOW_FP4)) != 0;
}

// The state that a GEMM takes when its layer is planned as `state`: itself where allowed, else the nearest that is.
static int snipi_uniform_state(const snip *s, const snipi_layer *l, int g, int state) {
    if (snipi_state_allowed(s, l, g, state)) return state;
    return state == 2 ? 1 : 2;
}

static int snipi_is_uniform(const snip *s, const snipi_layer *l, int option, int state) {
    for (int g = 0; g < SNIP_GEMMS; g++)
        if (snipi_runs(l, g) && snipi_option_state(option, g) != snipi_uniform_state(s, l, g, state)) return 0;
    return 1;
}

// A GEMM that never runs keeps its state.
static int snipi_option_allowed(const snip *s, const snipi_layer *l, int option) {
    for (int g = 0; g < SNIP_GEMMS; g++) {
        const int state = snipi_option_state(option, g);
        if (!(snipi_runs(l, g) ? snipi_state_allowed(s, l, g, state) : state == snipi_planned_state(s, l, g))) return 0;
    }
    if (!s->desc.per_layer) return 1;
    for (int state = snipi_by_seconds(s) ? 0 : 1; state < SNIPI_STATES; state++)
        if (snipi_is_uniform(s, l, option, state)) return 1;
    return 0;
}

static double snipi_harm(const snipi_layer *l, int state, int g) {
    return state ? l->kept.estimate[state - 1].cost[g] : 0;
}

static int snipi_is_candidate(snip_format format) {
    return format == snipi_candidates[0] || format == snipi_candidates[1];
}

// What a GEMM's change of format adds to its cost: the standard error of the difference of its two costs, `margin`
// times. Errors are added, not their squares: a new plan is chosen because its errors happen to be low.
static double snipi_switch_cost(const snip *s, const snipi_layer *l, int g, int to) {
    const int from = snipi_planned_state(s, l, g);
    const int planned = snipi_is_candidate(snipi_format(l, g)) || snipi_by_seconds(s);
    if (!(s->desc.margin > 0) || s->kept.plans == 0 || s->kept.fallen || !planned || from == to) return 0;
    const double a = from ? l->kept.estimate[from - 1].error[g] : 0, b = to ? l->kept.estimate[to - 1].error[g] : 0;
    return s->desc.margin * sqrt(a * a + b * b);
}

static double snipi_slowest(const snipi_layer *l, int g) {
    double slowest = 0;
    for (int state = 0; state < SNIPI_STATES; state++)
        if (l->kept.seconds[state][g] > slowest) slowest = l->kept.seconds[state][g];
    return slowest;
}

// A layer that no measurement has met yet, as it was not called, stays as it is, and out of the targets.
static int snipi_measured_once(const snipi_layer *l) { return snipi_met(l) || snipi_has_averages(l); }

// A knapsack and its memory.
typedef struct {
    snip_ilp_problem problem;
    snip_ilp_option *options;  // [layers][SNIPI_OPTIONS]
    snip_ilp_group *groups;    // [layers]
    double *target;            // [stages]
    int *choice, *ids;         // [layers]: chosen; [layers][SNIPI_OPTIONS]: which option a group's entry is
    char *memory;
} snipi_knapsack;

static int snipi_knapsack_alloc(const snip *s, snipi_knapsack *p) {
    const size_t layers = (size_t)s->n_layers, stages = (size_t)s->desc.n_stages;
    const size_t options = layers * SNIPI_OPTIONS * sizeof *p->options, groups = layers * sizeof *p->groups;
    memset(p, 0, sizeof *p);
    p->memory = (char *)snipi_alloc(s, options + groups + stages * sizeof *p->target +
                                           layers * (1 + SNIPI_OPTIONS) * sizeof *p->ids);
    if (!p->memory) return 0;
    p->options = (snip_ilp_option *)(void *)p->memory;
    p->target = (double *)(void *)(p->memory + options);
    p->groups = (snip_ilp_group *)(void *)(p->target + stages);
    p->choice = (int *)(void *)(p->groups + layers);
    p->ids = p->choice + layers;
    p->problem.n_groups = s->n_layers;
    p->problem.groups = p->groups;
    p->problem.n_stages = s->desc.n_stages;
    p->problem.stage_target = p->target;
    return 1;
}

static snip_ilp_option snipi_option(const snip *s, const snipi_layer *l, int id, int costs) {
    snip_ilp_option option = { 0, 0 };
    for (int g = 0; g < SNIP_GEMMS; g++) {
        const int state = snipi_option_state(id, g);
        if (!snipi_runs(l, g)) continue;
        if (costs) option.cost += snipi_harm(l, state, g) + snipi_switch_cost(s, l, g, state);
        if (snipi_by_seconds(s))
            option.gain += snipi_slowest(l, g) - l->kept.seconds[state][g];
        else
            option.gain += state == 2 ? (double)l->n * (double)l->k : 0;
    }
    return option;
}

// A layer's options; without costs, to see what can be had. A constant per layer changes no choice, and costs may not
// be negative.
static void snipi_add_options(const snip *s, snipi_knapsack *p, int i, int costs) {
    const snipi_layer *l = &s->layers[i];
    snip_ilp_option *list = p->options + SNIPI_OPTIONS * i;
    int count = 0;
    double least = 0;
    for (int id = 0; id < SNIPI_OPTIONS; id++) {
        if (!snipi_option_allowed(s, l, id)) continue;
        p->ids[SNIPI_OPTIONS * i + count] = id;
        list[count] = snipi_option(s, l, id, costs);
        if (count == 0 || list[count].cost < least) least = list[count].cost;
        count++;
    }
    for (int o = 0; o < count; o++) list[o].cost -= least;
    p->groups[i].n_options = count;
}

// What the layer's stage has to gain on its account.
static double snipi_layer_target(const snip *s, const snipi_layer *l) {
    double target = 0;
    for (int g = 0; g < SNIP_GEMMS; g++) {
        if (!snipi_runs(l, g)) continue;
        if (snipi_by_seconds(s)) {
            target += snipi_slowest(l, g);
            if (s->desc.speedup > 0) target -= l->kept.seconds[0][g] / s->desc.speedup;
        } else
            target += s->desc.budget * ((double)l->n * (double)l->k);
    }
    return target;
}

static snip_status snipi_check_seconds(const snip *s, const snipi_layer *l) {
    for (int g = 0; g < SNIP_GEMMS; g++)
        if (snipi_runs(l, g) && !(l->kept.seconds[0][g] > 0))
            return snipi_fail_layer(s, SNIP_BAD_ARGUMENT, l,
                                    "a plan by seconds needs snip_measure_gains or snip_set_seconds first");
    return SNIP_OK;
}

// The knapsack of all layers that were measured; without costs, of all that were called in this step.
static snip_status snipi_build(const snip *s, snipi_knapsack *p, int costs) {
    if (!snipi_knapsack_alloc(s, p)) return snipi_no_memory(s, "a plan");
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_layer *l = &s->layers[i];
        p->groups[i].options = p->options + SNIPI_OPTIONS * i;
        p->groups[i].n_options = 1;  // no gain at no cost
        p->groups[i].stage = l->stage;
        if (costs ? !snipi_measured_once(l) : !l->kept.ran) continue;
        if (snipi_by_seconds(s) && snipi_check_seconds(s, l)) return SNIP_BAD_ARGUMENT;
        snipi_add_options(s, p, i, costs);
        p->target[l->stage] += snipi_layer_target(s, l);
    }
    for (int stage = 0; stage < s->desc.n_stages; stage++) {
        if (snipi_by_seconds(s) && !(s->desc.speedup > 0)) p->target[stage] -= s->desc.seconds;
        if (p->target[stage] < 0) p->target[stage] = 0;
    }
    return SNIP_OK;
}

static snip_status snipi_infeasible(const snip *s, const snipi_knapsack *p) {
    double lacking = 0;
    char where[32], why[140];
    const int stage = snip_ilp_shortfall(&p->problem, &lacking);
    if (stage < 0 || stage >= s->desc.n_stages)
        return snipi_fail(s, SNIP_INFEASIBLE, "a plan", snip_status_text(SNIP_INFEASIBLE));
    snprintf(where, sizeof where, "stage %d", stage);
    if (snipi_by_seconds(s))
        snprintf(why, sizeof why, "cannot be as fast as asked: %.3g seconds are lacking", lacking);
    else
        snprintf(why, sizeof why, "can put at most %.2f%% of its FLOPs in fp4, %.2f%% short of the budget of %.2f%%",
                 100 * s->desc.budget * (1 - lacking / p->target[stage]),
                 100 * s->desc.budget * lacking / p->target[stage], 100 * s->desc.budget);
    return snipi_fail(s, SNIP_INFEASIBLE, where, why);
}

// A stage without a target takes nothing that it need not: of options with the chosen cost, the one with the least
// gain.
static void snipi_prefer_precision(const snip *s, snipi_knapsack *p) {
    for (int i = 0; i < s->n_layers; i++) {
        const snip_ilp_group *group = &p->groups[i];
        const double cost = group->options[p->choice[i]].cost;
        if (p->target[group->stage] > 0) continue;
        for (int o = 0; o < group->n_options; o++)
            if (group->options[o].cost <= cost && group->options[o].gain < group->options[p->choice[i]].gain)
                p->choice[i] = o;
    }
}

// What a new plan changes, for the reason.
typedef struct {
    int changed;
    double before, after, margin;
} snipi_change;

static snipi_change snipi_adopt(snip *s, const snipi_knapsack *p) {
    snipi_change c = { 0, 0, 0, 0 };
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        for (int g = 0; g < SNIP_GEMMS && snipi_measured_once(l); g++) {
            if (!snipi_runs(l, g)) continue;
            const int state = snipi_option_state(p->ids[SNIPI_OPTIONS * i + p->choice[i]], g);
            const snip_format format = snipi_format_of(s, state);
            c.before += snipi_harm(l, snipi_planned_state(s, l, g), g);
            c.after += snipi_harm(l, state, g);
            c.margin += snipi_switch_cost(s, l, g, state);
            c.changed += snipi_format(l, g) != format;
            l->kept.format[g] = format;
        }
    }
    return c;
}

static void snipi_explain(snip *s, const snipi_change *c) {
    char text[128];
    const double margin = s->desc.margin > 0 ? s->desc.margin : 0;
    if (s->kept.fallen)
        snprintf(text, sizeof text, "a new plan after the fall back: predicted harm %.4g", c->after);
    else if (s->kept.plans == 0)
        snprintf(text, sizeof text, "the first plan: predicted harm %.4g", c->after);
    else if (!c->changed)
        snprintf(text, sizeof text, "the plan stays: no change saves more than %g standard errors", margin);
    else if (c->before > c->after + c->margin)
        snprintf(text, sizeof text, "%d GEMMs change: predicted harm %.4g -> %.4g, margin %.2g", c->changed, c->before,
                 c->after, c->margin);
    else
        snprintf(text, sizeof text,
                 "%d GEMMs change, as the plan no longer met its targets: predicted harm %.4g -> %.4g", c->changed,
                 c->before, c->after);
    snprintf(s->reason, sizeof s->reason, "step %lld: %s", (long long)s->kept.step, text);
}

// A plan from the costs, in force at once; without one, the old plan stays.
static snip_status snipi_solve(snip *s) {
    snipi_knapsack p;
    snip_ilp_result result;
    snip_status status = snipi_build(s, &p, 1);
    if (!status) {
        switch (snip_ilp_solve(&p.problem, NULL, p.choice, &result)) {
            case SNIP_ILP_OPTIMAL:
            case SNIP_ILP_FEASIBLE: break;
            case SNIP_ILP_INFEASIBLE: status = snipi_infeasible(s, &p); break;
            case SNIP_ILP_OUT_OF_MEMORY: status = snipi_no_memory(s, "a plan"); break;
            case SNIP_ILP_BAD_ARGUMENT:
                status = snipi_fail(s, SNIP_NONFINITE, "a plan", "a measured cost is not finite");
                break;
        }
    }
    if (!status) {
        snipi_prefer_precision(s, &p);
        const snipi_change change = snipi_adopt(s, &p);
        snipi_explain(s, &change);
        s->kept.fallen = 0;
        s->kept.plans++;
        s->solve_seconds = result.seconds;
    }
    snipi_free(s, p.memory);
    return status;
}

// Whether any plan can meet the targets: a solve without costs, of the layers that the first step has called.
static snip_status snipi_check_feasible(const snip *s) {
    snipi_knapsack p;
    double lacking = 0;
    snip_status status = snipi_build(s, &p, 0);
    if (!status && snip_ilp_shortfall(&p.problem, &lacking) >= 0 && lacking > 0) status = snipi_infeasible(s, &p);
    snipi_free(s, p.memory);
    return status;
}

SNIP_API double snip_plan_seconds(const snip *s) {
    double sum = 0;
    for (int i = 0; i < snip_layers(s); i++)
        for (int g = 0; g < SNIP_GEMMS; g++) {
            const snipi_layer *l = &s->layers[i];
            if (snipi_runs(l, g)) sum += l->kept.seconds[snipi_planned_state(s, l, g)][g];
        }
    return sum;
}

// ---- seconds of GEMMs on this machine

enum { SNIPI_TIMES = 5 };  // measured, after one that warms up; the least counts

static snip_status snipi_time_gemm(const snipi_call *call, int g, snip_format format, const float *x, const float *w,
                                   const float *dy, float *out) {
    if (g == SNIP_FWD) return call->run->fwd(call, format, out, x, w, NULL);
    if (g == SNIP_DGRAD) return call->run->dgrad(call, format, out, 0, dy, w);
    return call->run->wgrad(call, format, out, 0, dy, call->l->n, x);
}

static snip_status snipi_time_layer(const snipi_call *call) {
    snip *s = call->s;
    snipi_layer *l = call->l;
    const int64_t n = l->n, k = l->k, rows = call->rows, given = rows * (n + k) + n * k;
    const int64_t nonfinite = l->nonfinite, saturated = l->saturated;
    float *x = (float *)snipi_alloc(s, (size_t)(given + snipi_max(rows * snipi_max(n, k), n * k)) * sizeof(float));
    snip_status status = SNIP_OK;
    if (!x) return SNIP_OUT_OF_MEMORY;
    float *dy = x + rows * k, *w = dy + rows * n, *out = w + n * k;
    snip_noise_add(x, x, given, 1.0f, NULL, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_X));
    for (int g = 0; g < SNIP_GEMMS; g++)
        for (int state = 0; state < SNIPI_STATES && !status; state++) {
            double best = 0;
            for (int i = 0; i < 1 + SNIPI_TIMES && !status; i++) {
                double t = snipi_ilp_clock();
                status = snipi_time_gemm(call, g, snipi_format_of(s, state), x, w, dy, out);
                t = snipi_ilp_clock() - t;
                if (i == 1 || (i > 1 && t < best)) best = t;
            }
            l->kept.seconds[state][g] = best > 1e-9 ? best : 1e-9;
        }
    snipi_free(s, x);
    l->nonfinite = nonfinite;
    l->saturated = saturated;
    return status;
}

SNIP_API snip_status snip_measure_gains(snip *s, int64_t rows) {
    snipi_call call;
    if (!s || rows < 1 || rows > INT32_MAX) return snipi_bad(s, "snip_measure_gains", "rows is 1 to 2^31 - 1");
    for (int i = 0; i < s->n_layers; i++)
        if (!snipi_begin_call(&call, s, i, NULL, NULL, NULL, 0, snipi_host(), NULL, NULL) ||
            !snipi_shape_ok(rows, snipi_max(call.l->n, call.l->k), snipi_max(call.l->n, call.l->k)))
            return snipi_bad(s, "snip_measure_gains", "rows times a layer's features is out of range");
    for (int i = 0; i < s->n_layers; i++) {
        int same = 0;
        snipi_begin_call(&call, s, i, NULL, NULL, NULL, 0, snipi_host(), NULL, NULL);
        call.rows = rows;
        while (s->layers[same].n != call.l->n || s->layers[same].k != call.l->k) same++;
        if (same < i) {
            memcpy(call.l->kept.seconds, s->layers[same].kept.seconds, sizeof call.l->kept.seconds);
            continue;
        }
        const snip_status status = snipi_time_layer(&call);
        if (status) return snipi_fail_at(s, status, i, "snip_measure_gains", snip_status_text(status));
    }
    s->checked = 0;
    return SNIP_OK;
}

// >>policy -----------------------------------------------------------------------------------------
// What has memory from step to step: when to measure, and what is news.
//
// A measuring step comes every `every` steps and, under a plan, when the loss spikes or the statistics drift, but not
// within every / 10 steps of the last one. A measurement that was discarded is made anew after 1, 2, 4, ... steps. A
// spike puts all of the plan's GEMMs below `fallback` into that format until the measurement; the plan is then made
// afresh, without a margin for the old one.

enum {
    SNIPI_LOSSES = 32,    // steps that the running mean of the losses rests on; before as many, nothing is a spike
    SNIPI_OUTLIERS = 16,  // far losses in a row that are no outliers any more, but another level
    SNIPI_LEVELS = 16,    // steps that the running rms of X and dY rests on
    SNIPI_EARLY = 10      // an early measurement keeps every / 10 steps away from the last one
};

// A loss counts as at most 3 deviations off in the running mean (Huber).
static const double SNIPI_CLIP = 3;

// Least deviation that is assumed, as a share of the mean: losses of a converged run are equal to some digits.
static const double SNIPI_LEAST_DEVIATION = 0.005;

static double snipi_loss_deviation(const snipi_kept *k) {
    const double deviation = SNIPI_DEVIATION * k->loss_deviation, least = SNIPI_LEAST_DEVIATION * fabs(k->loss_mean);
    return deviation > least ? deviation : least;
}

// Whether the step's loss begins a spike; a spike ends when a loss is no longer one. In a measuring step, which needs
// no other measurement, none begins. A loss equal to the one before (a policy's 0, a coarse format's) tells nothing of
// the deviation. Losses that stay away are a new level, learned anew.
static int snipi_loss_spikes(snip *s, int measuring) {
    snipi_kept *k = &s->kept;
    const double deviation = snipi_loss_deviation(k), clip = SNIPI_CLIP * deviation;
    const int known = k->losses >= SNIPI_LOSSES, nonfinite = snipi_nonfinite_f64(s->loss);
    double off = nonfinite ? 0 : s->loss - k->loss_mean;
    const int far_above = nonfinite || off > s->desc.spike * deviation;
    const int begins = s->desc.spike > 0 && known && far_above && !k->spiking && !measuring;
    k->spiking = far_above && (k->spiking || begins);
    if (nonfinite) return begins;
    const int repeated = k->losses > 0 && s->loss == k->last_loss, outlier = known && fabs(off) > clip;
    k->last_loss = s->loss;
    k->losses++;
    k->outliers = outlier ? k->outliers + 1 : 0;
    if (k->outliers >= SNIPI_OUTLIERS) {
        k->losses = 1;
        k->loss_mean = s->loss;
        k->loss_deviation = 0;
        k->outliers = k->spiking = 0;
        return begins;
    }
    const double rate = k->losses < SNIPI_LOSSES ? 1 / (double)k->losses : 1.0 / (double)SNIPI_LOSSES;
    if (outlier) off = off > 0 ? clip : -clip;
    k->loss_mean += rate * off;
    if (!repeated) k->loss_deviation += rate * ((k->losses > 1 ? fabs(off) : 0) - k->loss_deviation);
    return begins;
}

// Root mean square, over the layers' X and dY, of log2(rms now / rms at the last measurement), now being a mean of
// about 16 steps.
static double snipi_drift(snip *s) {
    const int64_t levels = ++s->kept.levels;
    const double rate = levels < SNIPI_LEVELS ? 1 / (double)levels : 1.0 / (double)SNIPI_LEVELS;
    double sum = 0, count = 0;
    for (int i = 0; i < s->n_layers; i++)
        for (int w = 0; w < 2; w++) {
            const snipi_layer *l = &s->layers[i];
            double *level = &s->layers[i].kept.level[w];
            if (!(l->seen_sq[w] > 0) || snipi_nonfinite_f64(l->seen_sq[w])) continue;
            *level += rate * (0.5 * log2(l->seen_sq[w] / l->seen[w]) - *level);
            sum += (*level - l->kept.reference[w]) * (*level - l->kept.reference[w]);
            count++;
        }
    return sqrt(snipi_ratio(sum, count));
}

static int snipi_under_plan(const snip *s) {
    for (int i = 0; i < s->n_layers; i++)
        for (int g = 0; g < SNIP_GEMMS; g++)
            if (snipi_is_candidate(snipi_format(&s->layers[i], g))) return 1;
    return 0;
}

// Puts the plan's GEMMs below `fallback` into it; their number is returned.
static int snipi_fall_back(snip *s) {
    int count = 0;
    for (int i = 0; i < s->n_layers && s->desc.fallback != SNIP_E2M1; i++)
        for (int g = 0; g < SNIP_GEMMS; g++) {
            const snip_format format = snipi_format(&s->layers[i], g);
            if (!snipi_is_candidate(format) || format == s->desc.fallback) continue;
            s->layers[i].kept.format[g] = s->desc.fallback;
            count++;
        }
    return count;
}

static void snipi_explain_spike(snip *s, int fallen) {
    char then[64] = "measuring";
    if (fallen)
        snprintf(then, sizeof then, "%d GEMMs in %s until the next measurement", fallen,
                 snip_format_name(s->desc.fallback));
    snprintf(s->reason, sizeof s->reason, "step %lld: the loss spikes: %.4g, mean %.4g, deviation %.2g; %s",
             (long long)s->kept.step, s->loss, s->kept.loss_mean, SNIPI_DEVIATION * s->kept.loss_deviation, then);
}

// After an ordinary step: is a measurement due before its time? A frozen plan is left alone.
static void snipi_watch(snip *s, int spikes) {
    const double drift = snipi_drift(s);
    if (s->desc.every < 0 || !snipi_under_plan(s)) return;
    if (spikes) {
        const int fallen = snipi_fall_back(s);
        s->kept.due = 1;
        if (fallen) s->kept.fallen = 1;
        snipi_explain_spike(s, fallen);
    } else if (!s->kept.due && s->kept.measurements > 0 && s->desc.drift > 0 && drift > s->desc.drift) {
        s->kept.due = 1;
        snprintf(s->reason, sizeof s->reason,
                 "step %lld: inputs and gradients have drifted by a factor of %.2g: measuring", (long long)s->kept.step,
                 exp2(drift));
    }
}

// Steps between the last measuring step and an early one.
static int64_t snipi_wait(const snip *s) {
    const int64_t most = snipi_max(1, s->desc.every / SNIPI_EARLY), failures = s->kept.failures;
    if (failures == 0) return s->desc.every / SNIPI_EARLY;
    return failures > 30 ? most : snipi_min(most, (int64_t)1 << (failures - 1));
}

static int snipi_measures_now(const snip *s) {
    if (s->desc.every < 0 || s->kept.step == 0) return 0;
    return s->kept.step % s->desc.every == 0 || (s->kept.due && s->kept.step >= s->kept.measured + snipi_wait(s));
}

// What was looked at of a layer in the step leaves its mark.
static void snipi_end_watch(snipi_layer *l) {
    l->kept.input_size = snipi_next_input_size(l->kept.input_size, l->seen_sq[0], l->seen[0], l->seen_calls);
    l->seen_sq[0] = l->seen_sq[1] = l->seen[0] = l->seen[1] = 0;
    l->seen_calls = 0;
}

static void snipi_begin_step(snip *s, int measure) {
    s->told = 0;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        snipi_end_watch(l);
        l->nonfinite = l->saturated = 0;
        if (measure) memset(l->rows_of, 0, sizeof l->rows_of);
    }
    s->pending = SNIP_OK;
    s->pending_layer = -1;
    s->pending_message[0] = 0;
    s->measuring = measure;
    snipi_begin_pass(s, measure ? SNIP_PASS_LOSS_PROBE : SNIP_PASS_ORDINARY);
}

// A measuring step without a measurement: `status` says why, or the optimizer was left out.
static void snipi_discard_measurement(snip *s, snip_status status) {
    s->kept.due = 1;
    s->kept.failures++;
    snprintf(s->reason, sizeof s->reason, "step %lld: no measurement, to be made anew after %lld steps: %.170s",
             (long long)s->kept.step, (long long)snipi_wait(s), status ? s->message : "the optimizer made no step");
}

// The records of a measuring step are complete: costs, then a plan.
static snip_status snipi_decide(snip *s, double grad_scale) {
    const snip_status status = snipi_take_measurement(s, grad_scale);
    if (status) {
        snipi_discard_measurement(s, status);
        return status;
    }
    s->kept.due = s->kept.failures = 0;
    return snipi_solve(s);
}

// What no plan could do without, said at the end of the first step that ends well.
static snip_status snipi_check_first_step(snip *s, const snip_adamw *adamw) {
    int called = 0;
    if (s->checked || !adamw || s->desc.every < 0) return SNIP_OK;
    s->checked = 1;
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_layer *l = &s->layers[i];
        called |= l->kept.ran != 0;
        if (!snipi_probes_updates(s) || !(l->kept.ran >> SNIP_WGRAD & 1) || snipi_bound(s, l)) continue;
        return snipi_not_bound(s, l);
    }
    return called ? snipi_check_feasible(s) : SNIP_OK;
}

// The message becomes that of the step's first error.
static void snipi_show_pending(snip *s) {
    if (!s->pending_message[0]) return;
    memcpy(s->message, s->pending_message, sizeof s->message);
    s->failed_layer = s->pending_layer;
}

// *adamw becomes NULL where its constants are out of range. function: the one that ends the step.
static void snipi_check_end_step(snip *s, const char *function, const snip_adamw **adamw) {
    if (*adamw && !snipi_adamw_ok(*adamw)) {
        *adamw = NULL;
        snipi_keep(s, snipi_bad(s, function, "the optimizer's constants are out of range"));
    } else if (*adamw && s->pass == SNIP_PASS_CLEAN && !s->told)
        snipi_keep(
            s, snipi_bad(s, function, "snip_next_pass has not been told the loss of the measuring step's last pass"));
    snipi_show_pending(s);
}

static snip_status snipi_still_probing(snip *s, const char *function) {
    return snipi_bad(s, function, "in a probe pass: run the batch again while snip_next_pass returns 1");
}

SNIP_API snip_status snip_end_step(snip *s, const snip_adamw *adamw) {
    if (!s) return SNIP_BAD_ARGUMENT;
    if (snipi_in_probe(s)) return snipi_still_probing(s, "snip_end_step");
    snipi_check_end_step(s, "snip_end_step", &adamw);
    snip_status status = s->pending;
    if (adamw) s->kept.adamw = *adamw;
    s->kept.step++;
    const int spikes = s->told && snipi_loss_spikes(s, s->measuring);
    if (s->pass == SNIP_PASS_ORDINARY) snipi_watch(s, spikes);
    if (s->measuring && s->n_layers) {
        s->kept.measured = s->kept.step;
        if (!adamw || status)
            snipi_discard_measurement(s, status);
        else {
            snipi_host_finish(s, adamw);
            status = snipi_decide(s, adamw->grad_scale > 0 ? adamw->grad_scale : 1);
        }
    }
    if (!status) status = snipi_check_first_step(s, adamw);
    snipi_begin_step(s, snipi_measures_now(s));
    return status;
}

// >>files ------------------------------------------------------------------------------------------
// The printed plan, the plan as a text file, the state as bytes.

// ---- the printed plan

// Names are "block.part.kind": a table of blocks x kinds. A column is what follows the block, "part.kind", and is
// headed by the kind alone where no other column has it. What has no place in the table gets a line below it.
enum { SNIPI_COLUMNS = 32 };  // most columns of the table

static int snipi_block_length(const char *name) {
    const char *dot = strchr(name, '.');
    return dot ? (int)(dot - name) : 0;
}

static const char *snipi_column_of(const char *name) {
    const char *dot = strchr(name, '.');
    return dot ? dot + 1 : name;
}

static const char *snipi_kind_of(const char *column) {
    const char *dot = strrchr(column, '.');
    return dot ? dot + 1 : column;
}

static int snipi_same_block(const char *a, const char *b) {
    const int n = snipi_block_length(a);
    return n == snipi_block_length(b) && strncmp(a, b, (size_t)n) == 0;
}

static char snipi_mark(const snipi_layer *l, int g) {
    const snip_format f = snipi_format(l, g);
    if (!snipi_runs(l, g)) return '-';
    return f == SNIP_E2M1 ? '4' : f == SNIP_E4M3 ? '8' : f == SNIP_BF16 ? 'b' : 'f';
}

typedef struct {
    const char *column[SNIPI_COLUMNS];
    int columns;
} snipi_table;

static int snipi_find_column(const snipi_table *t, const char *name) {
    const char *column = snipi_column_of(name);
    for (int c = 0; c < t->columns; c++)
        if (strcmp(t->column[c], column) == 0) return c;
    return -1;
}

static const char *snipi_heading(const snipi_table *t, int column) {
    const char *kind = snipi_kind_of(t->column[column]);
    for (int c = 0; c < t->columns; c++)
        if (c != column && strcmp(snipi_kind_of(t->column[c]), kind) == 0) return t->column[column];
    return kind;
}

static void snipi_print_marks(FILE *file, const snipi_layer *l, int width) {
    fprintf(file, " %c%c%c%*s", snipi_mark(l, 0), snipi_mark(l, 1), snipi_mark(l, 2), width > 3 ? width - 3 : 0, "");
}

// A layer's place in the printed plan: blocks stand in the order of their first layers.
typedef struct {
    const snipi_layer *layer;
    int index, first;  // of the layer, and of its block's first
} snipi_place;

static int snipi_by_block(const void *a, const void *b) {
    const snipi_place *x = (const snipi_place *)a, *y = (const snipi_place *)b;
    const int n = snipi_block_length(x->layer->name), m = snipi_block_length(y->layer->name);
    const int order = strncmp(x->layer->name, y->layer->name, (size_t)(n < m ? n : m));
    if (order) return order;
    return n != m ? n - m : x->index - y->index;
}

static int snipi_by_first(const void *a, const void *b) {
    const snipi_place *x = (const snipi_place *)a, *y = (const snipi_place *)b;
    return x->first != y->first ? x->first - y->first : x->index - y->index;
}

// The end of the block that begins at place `begin`.
static int snipi_block_end(const snipi_place *places, int begin, int count) {
    int end = begin + 1;
    while (end < count && snipi_same_block(places[begin].layer->name, places[end].layer->name)) end++;
    return end;
}

static void snipi_sort_places(const snip *s, snipi_place *places) {
    const int count = s->n_layers;
    for (int i = 0; i < count; i++) {
        places[i].layer = &s->layers[i];
        places[i].index = i;
    }
    qsort(places, (size_t)count, sizeof *places, snipi_by_block);
    for (int begin = 0, end; begin < count; begin = end) {
        end = snipi_block_end(places, begin, count);
        for (int i = begin; i < end; i++) places[i].first = places[begin].index;
    }
    qsort(places, (size_t)count, sizeof *places, snipi_by_first);
}

// One row: a block's layers [begin, end), each in its column, the first where a column has two.
static void snipi_print_block(FILE *file, const snipi_table *t, const snipi_place *places, int begin, int end) {
    const snipi_layer *cell[SNIPI_COLUMNS] = { NULL };
    const char *name = places[begin].layer->name;
    for (int i = end - 1; i >= begin; i--) {
        const int c = snipi_find_column(t, places[i].layer->name);
        if (c >= 0) cell[c] = places[i].layer;
    }
    fprintf(file, "  %-8.*s", snipi_block_length(name), name);
    for (int c = 0; c < t->columns; c++) {
        const int width = (int)snipi_max(6, (int64_t)strlen(snipi_heading(t, c)));
        if (cell[c])
            snipi_print_marks(file, cell[c], width);
        else
            fprintf(file, " %-*s", width, "");
    }
    fprintf(file, "\n");
    for (int i = begin; i < end; i++) {
        const snipi_layer *l = places[i].layer;
        const int c = snipi_find_column(t, l->name);
        if (c >= 0 && cell[c] == l) continue;
        fprintf(file, "    %s", l->name);
        snipi_print_marks(file, l, 3);
        fprintf(file, "\n");
    }
}

SNIP_API snip_status snip_plan_print(const snip *s, FILE *file) {
    snipi_table t;
    if (!s || !file) return snipi_bad(s, "snip_plan_print", "the session or the file is NULL");
    snipi_place *places = (snipi_place *)snipi_alloc(s, (size_t)s->n_layers * sizeof *places);
    if (!places) return snipi_no_memory(s, "snip_plan_print");
    t.columns = 0;
    for (int i = 0; i < s->n_layers && t.columns < SNIPI_COLUMNS; i++)
        if (snipi_find_column(&t, s->layers[i].name) < 0) t.column[t.columns++] = snipi_column_of(s->layers[i].name);
    fprintf(file, "plan after step %lld: fp4 %.1f%%, fp8 %.1f%% of the linear layers' FLOPs\n", (long long)s->kept.step,
            100 * snip_share(s, SNIP_E2M1), 100 * snip_share(s, SNIP_E4M3));
    fprintf(file, "  fwd dgrad wgrad: 4 fp4, 8 fp8, b bf16, f f32, - not run\n  %-8s", "block");
    for (int c = 0; c < t.columns; c++) fprintf(file, " %-6s", snipi_heading(&t, c));
    fprintf(file, "\n");
    snipi_sort_places(s, places);
    for (int begin = 0, end; begin < s->n_layers; begin = end) {
        end = snipi_block_end(places, begin, s->n_layers);
        snipi_print_block(file, &t, places, begin, end);
    }
    snipi_free(s, places);
    return ferror(file) ? snipi_fail(s, SNIP_IO, "snip_plan_print", snip_status_text(SNIP_IO)) : SNIP_OK;
}

// ---- the plan as a file: a header, one line a layer, and a hash of all lines before it

static int snipi_plan_line(const snip *s, int line, char *text, size_t size) {
    if (line == 0)
        return snprintf(text, size, "snip-plan 1 layers %d step %lld budget %.6f fp4 %.6f%s%s\n", s->n_layers,
                        (long long)s->kept.step, s->desc.budget, snip_share(s, SNIP_E2M1), s->reason[0] ? "; " : "",
                        s->reason);
    const snipi_layer *l = &s->layers[line - 1];
    return snprintf(text, size, "%s %lld %lld %s %s %s\n", l->name, (long long)l->n, (long long)l->k,
                    snip_format_name(snipi_format(l, 0)), snip_format_name(snipi_format(l, 1)),
                    snip_format_name(snipi_format(l, 2)));
}

// A device, a pipe or a link is written as it is: renaming would put a file in its place. Strict C sees what a link
// points to.
static int snipi_replaceable(const char *path) {
#if defined(__unix__) || defined(__APPLE__)
    struct stat info;
#    if defined(__APPLE__) || (defined(_POSIX_C_SOURCE) && _POSIX_C_SOURCE >= 200112L)
    return lstat(path, &info) != 0 || S_ISREG(info.st_mode);
#    else
    return stat(path, &info) != 0 || S_ISREG(info.st_mode);
#    endif
#else
    (void)path;
    return 1;
#endif
}

// 0, or errno.
static int snipi_write_plan(const snip *s, const char *path) {
    char text[512];
    uint64_t hash = SNIPI_HASH_START;
    FILE *file = fopen(path, "wb");
    int ok = file != NULL, reason;
    for (int line = 0; ok && line <= s->n_layers; line++) {
        const int n = snipi_plan_line(s, line, text, sizeof text);
        hash = snipi_hash(hash, text, (size_t)n);
        ok = fwrite(text, 1, (size_t)n, file) == (size_t)n;
    }
    if (ok) ok = fprintf(file, "end %016llx\n", (unsigned long long)hash) > 0;
    reason = ok ? 0 : errno ? errno : EIO;
    if (file && fclose(file) && ok) reason = errno ? errno : EIO;
    return reason;
}

SNIP_API snip_status snip_plan_save(snip *s, const char *path) {
    if (!s || !path) return snipi_bad(s, "snip_plan_save", "the session or the path is NULL");
    const size_t length = strlen(path) + 5;
    char *aside = (char *)snipi_alloc(s, length);
    if (!aside) return snipi_no_memory(s, "snip_plan_save");
    const int renamed = snipi_replaceable(path);
    snprintf(aside, length, renamed ? "%s.tmp" : "%s", path);
    int reason = snipi_write_plan(s, aside);
    if (!reason && renamed && rename(aside, path)) reason = errno ? errno : EIO;
    if (reason && renamed) remove(aside);
    snipi_free(s, aside);
    if (!reason) return SNIP_OK;
    snprintf(s->message, sizeof s->message, "%.150s: cannot be written: %.80s", path, strerror(reason));
    s->failed_layer = -1;
    return SNIP_IO;
}

// A line without its carriage return or the byte-order mark before the first; NULL at the end of the file.
static char *snipi_read_line(FILE *file, int first, char *text, int size) {
    if (!fgets(text, size, file)) return NULL;
    size_t length = strlen(text);
    if (length >= 2 && strcmp(text + length - 2, "\r\n") == 0) {
        text[length - 2] = '\n';
        text[--length] = 0;
    }
    if (first && strncmp(text, "\xEF\xBB\xBF", 3) == 0) memmove(text, text + 3, length - 2);
    return text;
}

// A layer's line; NULL, or what is wrong.
static const char *snipi_parse_layer(const char *text, const snipi_layer *l, unsigned char formats[SNIP_GEMMS],
                                     snip_status *status) {
    static const snip_format known[] = { SNIP_F32, SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };

    enum { SNIPI_KNOWN = sizeof known / sizeof *known };

    char name[256], format[SNIP_GEMMS][8];
    long long n, k;
    *status = SNIP_CORRUPT;
    if (sscanf(text, "%255s %lld %lld %7s %7s %7s", name, &n, &k, format[0], format[1], format[2]) != 6)
        return "has a damaged line";
    if (strcmp(name, l->name) || n != l->n || k != l->k) {
        *status = SNIP_MISMATCH;
        return "is for a model with other layers";
    }
    for (int g = 0; g < SNIP_GEMMS; g++) {
        int i = 0;
        while (i < SNIPI_KNOWN && strcmp(format[g], snip_format_name(known[i]))) i++;
        if (i == SNIPI_KNOWN) return "names an unknown precision";
        formats[g] = (unsigned char)known[i];
    }
    return NULL;
}

static const char *snipi_parse_header(const snip *s, const char *text, snip_status *status) {
    int version = 0, layers = 0;
    *status = SNIP_CORRUPT;
    if (sscanf(text, "snip-plan %d layers %d", &version, &layers) != 2) return "is not a snip plan";
    *status = SNIP_UNSUPPORTED;
    if (version != 1) return "is a plan of another version of snip; this one reads version 1";
    *status = SNIP_MISMATCH;
    if (layers != s->n_layers) return "is for a model with another number of layers";
    return NULL;
}

// formats: [layers][SNIP_GEMMS]. NULL, or what is wrong with the file.
static const char *snipi_parse_plan(const snip *s, FILE *file, unsigned char *formats, snip_status *status) {
    char text[512];
    uint64_t hash = SNIPI_HASH_START;
    unsigned long long stored = 0;
    int tail = 0;
    for (int line = 0; line <= s->n_layers; line++) {
        const char *why;
        *status = SNIP_CORRUPT;
        if (!snipi_read_line(file, line == 0, text, sizeof text)) {
            *status = ferror(file) ? SNIP_IO : SNIP_CORRUPT;
            return ferror(file) ? strerror(errno) : "ends too early";
        }
        hash = snipi_hash(hash, text, strlen(text));
        why = line == 0 ? snipi_parse_header(s, text, status)
                        : snipi_parse_layer(text, &s->layers[line - 1], formats + (line - 1) * SNIP_GEMMS, status);
        if (why) return why;
    }
    *status = SNIP_CORRUPT;
    if (!snipi_read_line(file, 0, text, sizeof text) || sscanf(text, "end %16llx%n", &stored, &tail) != 1 ||
        tail != 20 || strcmp(text + tail, "\n"))
        return "ends too early";
    return stored == hash && fgetc(file) == EOF ? NULL : "does not match its checksum";
}

SNIP_API snip_status snip_plan_load(snip *s, const char *path) {
    if (!s || !path) return snipi_bad(s, "snip_plan_load", "the session or the path is NULL");
    unsigned char *formats = (unsigned char *)snipi_alloc(s, (size_t)s->n_layers * SNIP_GEMMS);
    if (!formats) return snipi_no_memory(s, "snip_plan_load");
    snip_status status = SNIP_IO;
    FILE *file = fopen(path, "rb");
    const char *why = file ? snipi_parse_plan(s, file, formats, &status) : strerror(errno);
    if (why) {
        snprintf(s->message, sizeof s->message, "%.150s: %.100s", path, why);
        s->failed_layer = -1;
    }
    if (file) fclose(file);
    for (int i = 0; i < s->n_layers && !why; i++)
        for (int g = 0; g < SNIP_GEMMS; g++) s->layers[i].kept.format[g] = formats[i * SNIP_GEMMS + g];
    snipi_free(s, formats);
    return why ? status : SNIP_OK;
}

// ---- the state as bytes

// "SNIPST" and a version, the last reason, from version 3 on the sizes of the two records, then words of 8 bytes,
// little-endian on every machine: the session's record, one a layer, a hash. A version adds members to the records'
// ends, so that an older state is one whose records are shorter.
enum {
    SNIPI_STATE_MAGIC = 8,
    SNIPI_STATE_REASON = 256,
    SNIPI_STATE_SIZES = 16,
    SNIPI_STATE_2_SESSION = offsetof(snipi_kept, last_loss),  // version 2's records end there
    SNIPI_STATE_2_LAYER = offsetof(snipi_kept_layer, ran)
};

static const char snipi_state_magic[] = "SNIPST3";

typedef struct {
    size_t start, session, layer;  // where the session's record begins; bytes of the records
} snipi_state_layout;

static snipi_state_layout snipi_this_layout(void) {
    snipi_state_layout layout;
    layout.start = SNIPI_STATE_MAGIC + SNIPI_STATE_REASON + SNIPI_STATE_SIZES;
    layout.session = sizeof(snipi_kept);
    layout.layer = sizeof(snipi_kept_layer);
    return layout;
}

// Words of 8 bytes from the machine's order to little-endian, or back.
static void snipi_little_endian(void *words, size_t size) {
    unsigned char *p = (unsigned char *)words;
    for (size_t i = 0; i + 8 <= size; i += 8) {
        uint64_t word;
        unsigned char bytes[8];
        memcpy(&word, p + i, 8);
        for (int j = 0; j < 8; j++) bytes[j] = (unsigned char)(word >> 8 * j);
        memcpy(p + i, bytes, 8);
    }
}

static uint64_t snipi_model_hash(const snip *s) {
    uint64_t hash = SNIPI_HASH_START, seed = s->desc.seed;
    for (int i = 0; i < s->n_layers; i++) {
        const snipi_layer *l = &s->layers[i];
        int64_t dims[3];
        dims[0] = l->n;
        dims[1] = l->k;
        dims[2] = l->stage;
        snipi_little_endian(dims, sizeof dims);
        hash = snipi_hash(hash, l->name, strlen(l->name) + 1);
        hash = snipi_hash(hash, dims, sizeof dims);
    }
    snipi_little_endian(&seed, sizeof seed);
    return snipi_hash(hash, &seed, sizeof seed);
}

static size_t snipi_state_bytes(const snip *s, snipi_state_layout layout) {
    return layout.start + layout.session + (size_t)s->n_layers * layout.layer + sizeof(uint64_t);
}

SNIP_API size_t snip_state_size(const snip *s) { return s ? snipi_state_bytes(s, snipi_this_layout()) : 0; }

static int snipi_within_step(const snip *s) {
    return s->calls || s->told || s->pass == SNIP_PASS_UPDATE_PROBE || s->pass == SNIP_PASS_CLEAN ||
           (s->measuring && s->pass == SNIP_PASS_ORDINARY);
}

SNIP_API snip_status snip_state_save(const snip *s, void *state) {
    if (!s || !state) return snipi_bad(s, "snip_state_save", "the session or the state is NULL");
    if (snipi_within_step(s))
        return snipi_bad(s, "snip_state_save", "a state is saved between steps: snip_end_step is missing");
    const snipi_state_layout layout = snipi_this_layout();
    unsigned char *bytes = (unsigned char *)state, *at = bytes + layout.start;
    uint64_t sizes[2];
    sizes[0] = layout.session;
    sizes[1] = layout.layer;
    memcpy(bytes, snipi_state_magic, SNIPI_STATE_MAGIC);
    memcpy(bytes + SNIPI_STATE_MAGIC, s->reason, SNIPI_STATE_REASON);
    memcpy(at - sizeof sizes, sizes, sizeof sizes);
    snipi_kept kept = s->kept;
    kept.layers = (uint64_t)s->n_layers;
    kept.model = snipi_model_hash(s);
    memcpy(at, &kept, sizeof kept);
    at += sizeof kept;
    for (int i = 0; i < s->n_layers; i++, at += sizeof(snipi_kept_layer))
        memcpy(at, &s->layers[i].kept, sizeof(snipi_kept_layer));
    snipi_little_endian(bytes + layout.start - sizeof sizes, (size_t)(at - bytes) - layout.start + sizeof sizes);
    uint64_t hash = snipi_hash(SNIPI_HASH_START, bytes, (size_t)(at - bytes));
    snipi_little_endian(&hash, sizeof hash);
    memcpy(at, &hash, sizeof hash);
    return SNIP_OK;
}

// A record of `size` bytes into one of `room`; what the file lacks is zero.
static void snipi_read_record(void *record, size_t room, const unsigned char *at, size_t size) {
    memset(record, 0, room);
    memcpy(record, at, size);
    snipi_little_endian(record, room);
}

static int snipi_kept_ok(const snipi_kept *k) {
    const int64_t most = INT64_C(1) << 62;
    const int64_t counts[] = { k->step, k->losses, k->levels, k->measured, k->adamw.step, k->outliers, k->failures };
    const double values[] = { k->adamw.lr,         k->adamw.beta1,  k->adamw.beta2,     k->adamw.eps,
                              k->adamw.grad_scale, k->measurements, k->squared_weights, k->loss_mean,
                              k->loss_deviation,   k->last_loss };
    const int64_t flags[] = { k->due, k->fallen, k->spiking };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i] < 0 || counts[i] > most) return 0;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (snipi_nonfinite_f64(values[i])) return 0;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (flags[i] != 0 && flags[i] != 1) return 0;
    return k->plans >= 0 && k->plans <= INT32_MAX;
}

static int snipi_kept_layer_ok(const snipi_kept_layer *k) {
    const size_t first = offsetof(snipi_kept_layer, average), end = offsetof(snipi_kept_layer, ran);
    for (int g = 0; g < SNIP_GEMMS; g++) {
        const int64_t f = k->format[g];
        if (f != SNIP_F32 && f != SNIP_BF16 && f != SNIP_E4M3 && f != SNIP_E2M1) return 0;
    }
    for (size_t i = first; i < end; i += sizeof(double)) {  // all of it doubles
        double value;
        memcpy(&value, (const unsigned char *)k + i, sizeof value);
        if (snipi_nonfinite_f64(value)) return 0;
    }
    return k->ran >= 0 && k->ran < 1 << SNIP_GEMMS && !snipi_nonfinite_f64(k->input_size);
}

// The layout of a state whose hash is right; NULL, or what is wrong.
static const char *snipi_layout_of(const unsigned char *bytes, size_t size, snipi_state_layout *layout,
                                   snip_status *status) {
    const snipi_state_layout this_one = snipi_this_layout();
    uint64_t sizes[2];
    *layout = this_one;
    *status = SNIP_UNSUPPORTED;
    if (memcmp(bytes, "SNIPST2", SNIPI_STATE_MAGIC) == 0) {
        layout->start = SNIPI_STATE_MAGIC + SNIPI_STATE_REASON;
        layout->session = SNIPI_STATE_2_SESSION;
        layout->layer = SNIPI_STATE_2_LAYER;
    } else if (memcmp(bytes, snipi_state_magic, SNIPI_STATE_MAGIC) == 0 && size >= this_one.start) {
        memcpy(sizes, bytes + this_one.start - sizeof sizes, sizeof sizes);
        snipi_little_endian(sizes, sizeof sizes);
        *status = SNIP_CORRUPT;
        if (sizes[0] != this_one.session || sizes[1] != this_one.layer) return "holds values out of range";
    } else
        return "of another version of snip; this one reads versions 2 and 3";
    return NULL;
}

static snip_status snipi_not_a_state(const snip *s, snip_status status, const char *why) {
    return snipi_fail(s, status, "session state", why);
}

SNIP_API snip_status snip_state_load(snip *s, const void *state, size_t size) {
    const unsigned char *bytes = (const unsigned char *)state;
    snipi_state_layout layout;
    snipi_kept kept;
    snipi_kept_layer layer;
    uint64_t hash;
    if (!s || !state) return snipi_bad(s, "snip_state_load", "the session or the state is NULL");
    if (snipi_within_step(s))
        return snipi_bad(s, "snip_state_load", "a state is loaded between steps: snip_end_step is missing");
    if (size < SNIPI_STATE_MAGIC + sizeof hash) return snipi_not_a_state(s, SNIP_CORRUPT, "cut short");
    if (memcmp(bytes, snipi_state_magic, 6)) return snipi_not_a_state(s, SNIP_CORRUPT, "not one, but something else");
    memcpy(&hash, bytes + size - sizeof hash, sizeof hash);
    snipi_little_endian(&hash, sizeof hash);
    if (hash != snipi_hash(SNIPI_HASH_START, bytes, size - sizeof hash))
        return snipi_not_a_state(s, SNIP_CORRUPT, "does not match its checksum");
    snip_status status;
    const char *why = snipi_layout_of(bytes, size, &layout, &status);
    if (why) return snipi_not_a_state(s, status, why);
    if (size < layout.start + layout.session + sizeof hash) return snipi_not_a_state(s, SNIP_CORRUPT, "cut short");

    const unsigned char *at = bytes + layout.start;
    snipi_read_record(&kept, sizeof kept, at, layout.session);
    if (kept.layers != (uint64_t)s->n_layers || kept.model != snipi_model_hash(s) ||
        size != snipi_state_bytes(s, layout))
        return snipi_not_a_state(s, SNIP_MISMATCH, "belongs to another model or seed");
    int ok = snipi_kept_ok(&kept);
    at += layout.session;
    for (int i = 0; i < s->n_layers && ok; i++) {
        snipi_read_record(&layer, sizeof layer, at + (size_t)i * layout.layer, layout.layer);
        ok = snipi_kept_layer_ok(&layer);
    }
    if (!ok) return snipi_not_a_state(s, SNIP_CORRUPT, "holds values out of range");

    for (int i = 0; i < s->n_layers; i++)
        snipi_read_record(&s->layers[i].kept, sizeof layer, at + (size_t)i * layout.layer, layout.layer);
    s->kept = kept;
    memcpy(s->reason, bytes + SNIPI_STATE_MAGIC, sizeof s->reason);
    s->reason[sizeof s->reason - 1] = 0;
    snipi_begin_step(s, snipi_measures_now(s));
    return SNIP_OK;
}

// ================= END OF THE PORTABLE CODE. Below are instruction sets, behind the tables above. ====

// >>simd -------------------------------------------------------------------------------------------
// Instruction sets, behind the tables that the functions at the end choose: snipi_vector_of, snipi_flip_of,
// snipi_adam_of and snipi_kernels_of.
#define SNIPI_NO_STRIPS NULL, NULL, NULL, NULL, NULL, NULL  // a table's peaks, scales, strip, words, turn and largest

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own _mm512_undefined_ps in C++ (PR 105593)
#    pragma GCC diagnostic push
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#ifdef SNIPI_X86
#    define SNIPI_TARGET_AVX2 __attribute__((target("avx2,fma")))
#    define SNIPI_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#    define SNIPI_TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#    define SNIPI_TARGET_AVX_VNNI __attribute__((target("avx2,fma,avxvnni")))
#    define SNIPI_TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#    define SNIPI_TARGET_AMX \
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,amx-bf16,fma")))
#endif

// Vector code that the width does not decide is written once, in the vector types of GCC and Clang, behind the end of
// the implementation (>>vector). This file includes itself there once for each instruction set, after defining these
// macros, which say what the types cannot; >>vector undefines them.
//
//   SNIPI_WIDTH                          lanes of 32 bits in a vector: 4, 8 or 16
//   SNIPI_V(name)                        the instruction set's own name
//   SNIPI_TARGET                         the attribute of its functions
//   SNIPI_MIN(a, b), SNIPI_MAX(a, b)     of signed lanes
//   SNIPI_MOST(v)                        the largest lane, where none is negative
//   SNIPI_ANY(mask)                      whether a comparison held in any lane
//   SNIPI_COUNT(n)                       n as the count of a shift of all lanes:
//   SNIPI_RIGHT(v, count)                v >> n, without the sign
//   SNIPI_FLOATS(v), SNIPI_INTS(v)       conversions; to integers towards zero
//   SNIPI_SQRT(v)
//   SNIPI_LOW_DOUBLES(v)                 the lower half of the floats of v, in double
//   SNIPI_HIGH_DOUBLES(v)                the upper half
//   SNIPI_DOUBLES_AT(p)                  WIDTH / 2 floats from p
//   SNIPI_EVEN_PRODUCTS(a, b)            products of 64 bits, of one half of the lanes
//   SNIPI_ODD_PRODUCTS(a, b)             of the other half
//   SNIPI_LOWER_WORDS(even, odd)         lower halves of these products, in the order of the lanes
//   SNIPI_UPPER_WORDS(even, odd)         upper halves
//   SNIPI_ZIP_LOW(a, b)                  lanes of a and b in turn, from the lower half of each 128 bits
//   SNIPI_ZIP_HIGH(a, b)                 from the upper half
//   SNIPI_COUNTERS                       counters in the order that zipping twice puts in sequence
//   SNIPI_WORDS_AT_8(p)                  WIDTH numbers of 8 bits from p
//   SNIPI_WORDS_AT_16(p)                 of 16 bits
//   SNIPI_STORE_16(p, v)                 the lower 16 bits of each lane
//   SNIPI_BYTES(v)                       v[16 / WIDTH], vectors of codes, as 16 bytes
//   SNIPI_NIBBLES(bytes)                 these, two to a byte, in the lower 8
//   SNIPI_STREAM(p, v)                   a store past the caches
//   SNIPI_FOUR_COLUMNS(p, ld)            v[WIDTH]: 4 floats from p, 4 from 4 rows further and so on; a row is ld floats
#if defined(SNIPI_X86) || defined(SNIPI_NEON)
#    if defined(__FILE_NAME__)
#        define SNIPI_THIS_FILE __FILE_NAME__  // not __FILE__: a path is looked up from this file's folder again
#    else
#        define SNIPI_THIS_FILE "snip.h"  // GCC before 12 has no macro for the name alone
#    endif

// Bytes from where a maximum is made to where memory is asked for: the hardware's own prefetching stops at pages.
enum { SNIPI_AHEAD = 3072 };

typedef uint8_t snipi_bytes __attribute__((vector_size(16)));
typedef uint8_t snipi_bytes_at __attribute__((vector_size(16), aligned(1), may_alias));

// `n` words of 16, and zeros.
static const void *snipi_last_words(uint32_t to[16], const void *from, int n) {
    memset(to, 0, 16 * sizeof(uint32_t));
    memcpy(to, from, (size_t)n * sizeof(uint32_t));
    return to;
}

// Philox 4x32 (Salmon et al. 2011): the factors of its products and what is added to its two keys after each round.
#    define SNIPI_FACTOR0 0xD2511F53u
#    define SNIPI_FACTOR1 0xCD9E8D57u
#    define SNIPI_KEY_STEP0 0x9E3779B9u
#    define SNIPI_KEY_STEP1 0xBB67AE85u

// Philox over counters with the same upper half: the first two rounds as far as they are the same for all of these,
// and the keys of the other eight.
typedef struct {
    uint32_t first, second[3], key[8][2];
} snipi_rounds;

static snipi_rounds snipi_rounds_of(snip_rng_key key, uint32_t upper) {
    const uint32_t key0 = (uint32_t)key.seed, key1 = (uint32_t)(key.seed >> 32);
    const uint64_t product1 = (uint64_t)key.step * SNIPI_FACTOR1;
    const uint64_t product0 = (uint64_t)((uint32_t)(product1 >> 32) ^ upper ^ key0) * SNIPI_FACTOR0;
    snipi_rounds s;
    s.first = key.tensor ^ key1;
    s.second[0] = (uint32_t)product1 ^ (key0 + SNIPI_KEY_STEP0);
    s.second[1] = (uint32_t)(product0 >> 32) ^ (key1 + SNIPI_KEY_STEP1);
    s.second[2] = (uint32_t)product0;
    for (uint32_t round = 2; round < 10; round++) {
        s.key[round - 2][0] = key0 + round * SNIPI_KEY_STEP0;
        s.key[round - 2][1] = key1 + round * SNIPI_KEY_STEP1;
    }
    return s;
}
#endif

// SNIPI_KEPT stops the compiler from undoing a rounding (-Ofast), fusing a product with what follows or changing the
// order of a sum.
#ifdef SNIPI_X86
#    define SNIPI_KEPT(v) __asm__("" : "+v"(v))
#    define SNIPI_KEPT512(v) SNIPI_KEPT(v)
#    define SNIPI_LOW(v) _mm512_maskz_cvtps_pd(0xFF, _mm512_castps512_ps256(v))
#    define SNIPI_HIGH(v) _mm512_maskz_cvtps_pd(0xFF, _mm512_extractf32x8_ps(v, 1))
#    define SNIPI_STREAM_BYTES(p, v) _mm_stream_si128((__m128i *)(void *)(p), (__m128i)(v))

// SSE2, which every x86-64 has: no minima of 32-bit lanes, no blends, no widening loads.
SNIPI_INLINE __m128i snipi_select_sse2(__m128i mask, __m128i a, __m128i b) {
    return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
}

SNIPI_INLINE uint32_t snipi_most_sse2(__m128i v) {
    uint32_t lanes[4], most = 0;
    _mm_storeu_si128((__m128i *)(void *)lanes, v);
    for (int i = 0; i < 4; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

SNIPI_INLINE __m128i snipi_words_at_8_sse2(const uint8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    const __m128i zero = _mm_setzero_si128();
    return _mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero);
}

SNIPI_INLINE void snipi_store_16_sse2(uint16_t *p, __m128i v) {
    v = _mm_srai_epi32(_mm_slli_epi32(v, 16), 16);  // the sign extended, so that packing saturates none
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi32(v, v));
}

SNIPI_INLINE __m128i snipi_nibbles_sse2(__m128i bytes) {
    const __m128i pairs = _mm_and_si128(_mm_or_si128(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi16(0xFF));
    return _mm_packus_epi16(pairs, pairs);
}

#    define SNIPI_WIDTH 4
#    define SNIPI_V(name) snipi_##name##_sse2
#    define SNIPI_TARGET
#    define SNIPI_MIN(a, b) ((snipi_ints)snipi_select_sse2((__m128i)((a) < (b)), (__m128i)(a), (__m128i)(b)))
#    define SNIPI_MAX(a, b) ((snipi_ints)snipi_select_sse2((__m128i)((a) > (b)), (__m128i)(a), (__m128i)(b)))
#    define SNIPI_MOST(v) snipi_most_sse2((__m128i)(v))
#    define SNIPI_ANY(mask) _mm_movemask_epi8((__m128i)(mask))
#    define SNIPI_COUNT(n) ((snipi_words)_mm_cvtsi32_si128(n))
#    define SNIPI_RIGHT(v, count) ((snipi_words)_mm_srl_epi32((__m128i)(v), (__m128i)(count)))
#    define SNIPI_FLOATS(v) ((snipi_floats)_mm_cvtepi32_ps((__m128i)(v)))
#    define SNIPI_INTS(v) ((snipi_ints)_mm_cvttps_epi32((__m128)(v)))
#    define SNIPI_SQRT(v) ((snipi_floats)_mm_sqrt_ps((__m128)(v)))
#    define SNIPI_LOW_DOUBLES(v) ((snipi_doubles)_mm_cvtps_pd((__m128)(v)))
#    define SNIPI_HIGH_DOUBLES(v) ((snipi_doubles)_mm_cvtps_pd(_mm_movehl_ps((__m128)(v), (__m128)(v))))
#    define SNIPI_DOUBLES_AT(p) \
        ((snipi_doubles)_mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)(p)))))
#    define SNIPI_EVEN_PRODUCTS(a, b) ((snipi_words)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#    define SNIPI_ODD_PRODUCTS(a, b) ((snipi_words)_mm_mul_epu32(_mm_srli_epi64((__m128i)(a), 32), (__m128i)(b)))
#    define SNIPI_LOWER_WORDS(even, odd)                                           \
        ((snipi_words)_mm_unpacklo_epi32(_mm_shuffle_epi32((__m128i)(even), 0x08), \
                                         _mm_shuffle_epi32((__m128i)(odd), 0x08)))
#    define SNIPI_UPPER_WORDS(even, odd)                                           \
        ((snipi_words)_mm_unpacklo_epi32(_mm_shuffle_epi32((__m128i)(even), 0x0D), \
                                         _mm_shuffle_epi32((__m128i)(odd), 0x0D)))
#    define SNIPI_ZIP_LOW(a, b) ((snipi_words)_mm_unpacklo_epi32((__m128i)(a), (__m128i)(b)))
#    define SNIPI_ZIP_HIGH(a, b) ((snipi_words)_mm_unpackhi_epi32((__m128i)(a), (__m128i)(b)))
#    define SNIPI_COUNTERS 0, 1, 2, 3
#    define SNIPI_WORDS_AT_16(p) \
        ((snipi_words)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i *)(const void *)(p)), _mm_setzero_si128()))
#    define SNIPI_WORDS_AT_8(p) ((snipi_words)snipi_words_at_8_sse2(p))
#    define SNIPI_STORE_16(p, v) snipi_store_16_sse2(p, (__m128i)(v))
#    define SNIPI_BYTES(v)                                                                \
        ((snipi_bytes)_mm_packus_epi16(_mm_packs_epi32((__m128i)(v)[0], (__m128i)(v)[1]), \
                                       _mm_packs_epi32((__m128i)(v)[2], (__m128i)(v)[3])))
#    define SNIPI_NIBBLES(bytes) ((snipi_bytes)snipi_nibbles_sse2((__m128i)(bytes)))
#    define SNIPI_STREAM(p, v) _mm_stream_ps(p, (__m128)(v))
#    define SNIPI_FOUR_COLUMNS(p, ld) ((snipi_words)_mm_loadu_ps(p))
#    include SNIPI_THIS_FILE

SNIPI_TARGET_AVX2 SNIPI_INLINE uint32_t snipi_most_avx2(__m256i v) {
    return snipi_most_sse2(_mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

SNIPI_TARGET_AVX2 SNIPI_INLINE void snipi_store_16_avx2(uint16_t *p, __m256i v) {
    v = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0xD8);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(v));
}

SNIPI_TARGET_AVX2 SNIPI_INLINE __m128i snipi_bytes_avx2(__m256i a, __m256i b) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

SNIPI_TARGET_AVX2 SNIPI_INLINE __m128i snipi_nibbles_avx2(__m128i bytes) {
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));  // low + 16 * high
    return _mm_packus_epi16(pairs, pairs);
}

#    define SNIPI_WIDTH 8
#    define SNIPI_V(name) snipi_##name##_avx2
#    define SNIPI_TARGET SNIPI_TARGET_AVX2
#    define SNIPI_MIN(a, b) ((snipi_ints)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#    define SNIPI_MAX(a, b) ((snipi_ints)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#    define SNIPI_MOST(v) snipi_most_avx2((__m256i)(v))
#    define SNIPI_ANY(mask) _mm256_movemask_epi8((__m256i)(mask))
#    define SNIPI_COUNT(n) ((snipi_words)_mm256_set1_epi32(n))
#    define SNIPI_RIGHT(v, count) ((snipi_words)_mm256_srlv_epi32((__m256i)(v), (__m256i)(count)))
#    define SNIPI_FLOATS(v) ((snipi_floats)_mm256_cvtepi32_ps((__m256i)(v)))
#    define SNIPI_INTS(v) ((snipi_ints)_mm256_cvttps_epi32((__m256)(v)))
#    define SNIPI_SQRT(v) ((snipi_floats)_mm256_sqrt_ps((__m256)(v)))
#    define SNIPI_LOW_DOUBLES(v) ((snipi_doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)(v))))
#    define SNIPI_HIGH_DOUBLES(v) ((snipi_doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)(v), 1)))
#    define SNIPI_DOUBLES_AT(p) ((snipi_doubles)_mm256_cvtps_pd(_mm_loadu_ps(p)))
#    define SNIPI_EVEN_PRODUCTS(a, b) ((snipi_words)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#    define SNIPI_ODD_PRODUCTS(a, b) \
        ((snipi_words)_mm256_mul_epu32(_mm256_shuffle_epi32((__m256i)(a), 0xF5), (__m256i)(b)))
#    define SNIPI_LOWER_WORDS(even, odd) \
        ((snipi_words)_mm256_blend_epi32((__m256i)(even), _mm256_shuffle_epi32((__m256i)(odd), 0xA0), 0xAA))
#    define SNIPI_UPPER_WORDS(even, odd) \
        ((snipi_words)_mm256_blend_epi32(_mm256_shuffle_epi32((__m256i)(even), 0xF5), (__m256i)(odd), 0xAA))
#    define SNIPI_ZIP_LOW(a, b) ((snipi_words)_mm256_unpacklo_epi32((__m256i)(a), (__m256i)(b)))
#    define SNIPI_ZIP_HIGH(a, b) ((snipi_words)_mm256_unpackhi_epi32((__m256i)(a), (__m256i)(b)))
#    define SNIPI_COUNTERS 0, 2, 4, 6, 1, 3, 5, 7
#    define SNIPI_WORDS_AT_16(p) \
        ((snipi_words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))))
#    define SNIPI_WORDS_AT_8(p) ((snipi_words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p))))
#    define SNIPI_STORE_16(p, v) snipi_store_16_avx2(p, (__m256i)(v))
#    define SNIPI_BYTES(v) ((snipi_bytes)snipi_bytes_avx2((__m256i)(v)[0], (__m256i)(v)[1]))
#    define SNIPI_NIBBLES(bytes) ((snipi_bytes)snipi_nibbles_avx2((__m128i)(bytes)))
#    define SNIPI_STREAM(p, v) _mm256_stream_ps(p, (__m256)(v))
#    define SNIPI_FOUR_COLUMNS(p, ld) \
        ((snipi_words)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps((p) + 4 * (ld)), 1))
#    include SNIPI_THIS_FILE

// AVX-512 makes random numbers in its own way, with a word of a counter in each 64 bits, of which the lower 32 count
// until the end: strips are 4% faster than with the words put together after each product. The order of the counters is
// the one in which the words come out in sequence. `blocks` is 16 or 32.
#    define SNIPI_UPPER_8(a) _mm512_shuffle_epi32(a, _MM_PERM_DDBB)  // the shift's port is the product's
#    define SNIPI_XOR3_8(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)

SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_swapped_avx512(__m512i product, __m512i lower, uint32_t key) {
    const __m512i swapped = _mm512_shuffle_epi32(product, _MM_PERM_CDAB);
    return _mm512_mask_ternarylogic_epi32(swapped, 0x5555, lower, _mm512_set1_epi32((int)key), 0x96);
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_random_words_avx512(const snipi_rounds *s, uint32_t first, const int blocks,
                                                                uint32_t *out) {
    const __m512i by0 = _mm512_set1_epi64(SNIPI_FACTOR0), by1 = _mm512_set1_epi64(SNIPI_FACTOR1);
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i c[4][4];
    SNIPI_UNROLL
    for (int v = 0; v < blocks / 8; v++) {
        const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64((int64_t)(first + (uint32_t)(8 * v))), order);
        const __m512i p0 = _mm512_mul_epu32(counter, by0);
        const __m512i c0 = _mm512_xor_si512(SNIPI_UPPER_8(p0), _mm512_set1_epi32((int)s->first));
        const __m512i p1 = _mm512_mul_epu32(c0, by1);
        c[v][0] = _mm512_xor_si512(SNIPI_UPPER_8(p1), _mm512_set1_epi32((int)s->second[0]));
        c[v][1] = p1;
        c[v][2] = _mm512_xor_si512(p0, _mm512_set1_epi32((int)s->second[1]));
        c[v][3] = _mm512_set1_epi32((int)s->second[2]);
    }
    for (int round = 0; round < 7; round++) {
        const __m512i key0 = _mm512_set1_epi32((int)s->key[round][0]), key1 = _mm512_set1_epi32((int)s->key[round][1]);
        SNIPI_UNROLL
        for (int v = 0; v < blocks / 8; v++) {
            const __m512i p0 = _mm512_mul_epu32(c[v][0], by0), p1 = _mm512_mul_epu32(c[v][2], by1);
            c[v][0] = SNIPI_XOR3_8(SNIPI_UPPER_8(p1), c[v][1], key0);
            c[v][1] = p1;
            c[v][2] = SNIPI_XOR3_8(SNIPI_UPPER_8(p0), c[v][3], key1);
            c[v][3] = p0;
        }
    }
    SNIPI_UNROLL
    for (int v = 0; v < blocks / 8; v++) {
        const __m512i low = snipi_swapped_avx512(_mm512_mul_epu32(c[v][2], by1), c[v][1], s->key[7][0]);
        const __m512i high = snipi_swapped_avx512(_mm512_mul_epu32(c[v][0], by0), c[v][3], s->key[7][1]);
        _mm512_storeu_si512(out + 32 * v, _mm512_unpacklo_epi64(low, high));
        _mm512_storeu_si512(out + 32 * v + 16, _mm512_unpackhi_epi64(low, high));
    }
}

#    define SNIPI_WIDTH 16
#    define SNIPI_V(name) snipi_##name##_avx512
#    define SNIPI_TARGET SNIPI_TARGET_AVX512
#    define SNIPI_MIN(a, b) ((snipi_ints)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#    define SNIPI_MAX(a, b) ((snipi_ints)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#    define SNIPI_MOST(v) ((uint32_t)_mm512_reduce_max_epi32((__m512i)(v)))
#    define SNIPI_ANY(mask) _mm512_test_epi32_mask((__m512i)(mask), (__m512i)(mask))
#    define SNIPI_COUNT(n) ((snipi_words)_mm512_set1_epi32(n))
#    define SNIPI_RIGHT(v, count) ((snipi_words)_mm512_maskz_srlv_epi32(0xFFFF, (__m512i)(v), (__m512i)(count)))
#    define SNIPI_FLOATS(v) ((snipi_floats)_mm512_maskz_cvtepi32_ps(0xFFFF, (__m512i)(v)))
#    define SNIPI_INTS(v) ((snipi_ints)_mm512_maskz_cvttps_epi32(0xFFFF, (__m512)(v)))
#    define SNIPI_LOW_DOUBLES(v) ((snipi_doubles)SNIPI_LOW((__m512)(v)))
#    define SNIPI_HIGH_DOUBLES(v) ((snipi_doubles)SNIPI_HIGH((__m512)(v)))
#    define SNIPI_DOUBLES_AT(p) ((snipi_doubles)_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p)))
#    define SNIPI_BYTES(v) ((snipi_bytes)_mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)(v)[0]))
#    define SNIPI_NIBBLES(bytes) ((snipi_bytes)snipi_nibbles_avx2((__m128i)(bytes)))
#    define SNIPI_STREAM(p, v) _mm512_stream_ps(p, (__m512)(v))
#    include SNIPI_THIS_FILE
#endif  // SNIPI_X86

#ifdef SNIPI_NEON
#    define SNIPI_KEPT(v) __asm__("" : "+w"(v))
#    define SNIPI_STREAM_BYTES(p, v) vst1q_u8(p, (uint8x16_t)(v))

SNIPI_INLINE uint16x8_t snipi_words_at_8_neon(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vmovl_u8(vcreate_u8(four));
}

SNIPI_INLINE uint8x16_t snipi_nibbles_neon(uint16x8_t pairs) {
    const uint8x8_t bytes = vmovn_u16(vsraq_n_u16(pairs, pairs, 4));  // low + 16 * high
    return vcombine_u8(bytes, bytes);
}

#    define SNIPI_WIDTH 4
#    define SNIPI_V(name) snipi_##name##_neon
#    define SNIPI_TARGET
#    define SNIPI_MIN(a, b) ((snipi_ints)vminq_s32((int32x4_t)(a), (int32x4_t)(b)))
#    define SNIPI_MAX(a, b) ((snipi_ints)vmaxq_s32((int32x4_t)(a), (int32x4_t)(b)))
#    define SNIPI_MOST(v) vmaxvq_u32((uint32x4_t)(v))
#    define SNIPI_ANY(mask) vmaxvq_u32((uint32x4_t)(mask))
#    define SNIPI_COUNT(n) ((snipi_words)vdupq_n_s32(-(n)))
#    define SNIPI_RIGHT(v, count) ((snipi_words)vshlq_u32((uint32x4_t)(v), (int32x4_t)(count)))
#    define SNIPI_FLOATS(v) ((snipi_floats)vcvtq_f32_s32((int32x4_t)(v)))
#    define SNIPI_INTS(v) ((snipi_ints)vcvtq_s32_f32((float32x4_t)(v)))
#    define SNIPI_SQRT(v) ((snipi_floats)vsqrtq_f32((float32x4_t)(v)))
#    define SNIPI_LOW_DOUBLES(v) ((snipi_doubles)vcvt_f64_f32(vget_low_f32((float32x4_t)(v))))
#    define SNIPI_HIGH_DOUBLES(v) ((snipi_doubles)vcvt_high_f64_f32((float32x4_t)(v)))
#    define SNIPI_DOUBLES_AT(p) ((snipi_doubles)vcvt_f64_f32(vld1_f32(p)))
#    define SNIPI_EVEN_PRODUCTS(a, b) \
        ((snipi_words)vmull_u32(vget_low_u32((uint32x4_t)(a)), vget_low_u32((uint32x4_t)(b))))
#    define SNIPI_ODD_PRODUCTS(a, b) ((snipi_words)vmull_high_u32((uint32x4_t)(a), (uint32x4_t)(b)))
#    define SNIPI_LOWER_WORDS(even, odd) ((snipi_words)vuzp1q_u32((uint32x4_t)(even), (uint32x4_t)(odd)))
#    define SNIPI_UPPER_WORDS(even, odd) ((snipi_words)vuzp2q_u32((uint32x4_t)(even), (uint32x4_t)(odd)))
#    define SNIPI_ZIP_LOW(a, b) ((snipi_words)vzip1q_u32((uint32x4_t)(a), (uint32x4_t)(b)))
#    define SNIPI_ZIP_HIGH(a, b) ((snipi_words)vzip2q_u32((uint32x4_t)(a), (uint32x4_t)(b)))
#    define SNIPI_COUNTERS 0, 1, 2, 3
#    define SNIPI_WORDS_AT_16(p) ((snipi_words)vmovl_u16(vld1_u16(p)))
#    define SNIPI_WORDS_AT_8(p) ((snipi_words)vmovl_u16(vget_low_u16(snipi_words_at_8_neon(p))))
#    define SNIPI_STORE_16(p, v) vst1_u16(p, vmovn_u32((uint32x4_t)(v)))
#    define SNIPI_BYTES(v)                                                                      \
        ((snipi_bytes)vuzp1q_u8((uint8x16_t)vuzp1q_u16((uint16x8_t)(v)[0], (uint16x8_t)(v)[1]), \
                                (uint8x16_t)vuzp1q_u16((uint16x8_t)(v)[2], (uint16x8_t)(v)[3])))
#    define SNIPI_NIBBLES(bytes) ((snipi_bytes)snipi_nibbles_neon((uint16x8_t)(bytes)))
#    define SNIPI_STREAM(p, v) vst1q_f32(p, (float32x4_t)(v))
#    define SNIPI_FOUR_COLUMNS(p, ld) ((snipi_words)vld1q_f32(p))
#    include SNIPI_THIS_FILE
#endif  // SNIPI_NEON

#ifdef SNIPI_X86
// ---- GEMM kernels
// Rows of panels. Loops over them are unrolled, so that sums stay in registers.
enum {
    SNIPI_AVX2_A = 6,     // of 16 registers 12 hold sums, two B's elements, one A's and one a product
    SNIPI_AVX2_B = 16,    // two vectors
    SNIPI_AVX512_A = 12,  // of 32 registers 24 hold sums
    SNIPI_AVX512_B = 32,  // two vectors
    SNIPI_AMX_A = 32,     // two tiles
    SNIPI_AMX_B = 32      // two tiles
};

// Steps of k that panels are fetched ahead. They lie in the second cache, from where hardware's prefetching is late:
// without this F32 is 5% slower; 12 and 48 steps are as good.
enum { SNIPI_AHEAD_PANEL = 24 };

SNIPI_INLINE void snipi_fetch_panels(const void *a, int a_bytes, const void *b, int b_bytes) {
    _mm_prefetch((const char *)a + SNIPI_AHEAD_PANEL * a_bytes, _MM_HINT_T0);
    _mm_prefetch((const char *)b + SNIPI_AHEAD_PANEL * b_bytes, _MM_HINT_T0);
    if (b_bytes > 64) _mm_prefetch((const char *)b + SNIPI_AHEAD_PANEL * b_bytes + 64, _MM_HINT_T0);
}

// A tile of C, which is on its way while its sums are made.
SNIPI_INLINE void snipi_fetch_c(const float *c, int64_t ldc, int rows, int cols) {
    for (int i = 0; i < rows; i++, c += ldc) {
        _mm_prefetch((const char *)c, _MM_HINT_T0);
        _mm_prefetch((const char *)(c + cols - 1), _MM_HINT_T0);
    }
}

SNIPI_TARGET_AVX2 static void snipi_kernel_f32_avx2(int64_t k, const float *a, const float *b, const float *from,
                                                    float *c, int64_t ldc) {
    __m256 sum[SNIPI_AVX2_A][2];
    snipi_fetch_c(c, ldc, SNIPI_AVX2_A, SNIPI_AVX2_B);
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_AVX2_A; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (; k > 0; k--, a += SNIPI_AVX2_A, b += SNIPI_AVX2_B) {
        const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
        snipi_fetch_panels(a, 4 * SNIPI_AVX2_A, b, 4 * SNIPI_AVX2_B);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX2_A; i++) {
            const __m256 ai = _mm256_broadcast_ss(a + i);
            sum[i][0] = _mm256_fmadd_ps(ai, b0, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(ai, b1, sum[i][1]);
        }
    }
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_AVX2_A; i++, c += ldc) {
        const float *old = from ? from : c;
        _mm256_storeu_ps(c, _mm256_add_ps(_mm256_loadu_ps(old), sum[i][0]));
        _mm256_storeu_ps(c + 8, _mm256_add_ps(_mm256_loadu_ps(old + 8), sum[i][1]));
    }
}

SNIPI_TARGET_AVX512 static void snipi_kernel_f32_avx512(int64_t k, const float *a, const float *b, const float *from,
                                                        float *c, int64_t ldc) {
    __m512 sum[SNIPI_AVX512_A][2];
    snipi_fetch_c(c, ldc, SNIPI_AVX512_A, SNIPI_AVX512_B);
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_AVX512_A; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (; k > 0; k--, a += SNIPI_AVX512_A, b += SNIPI_AVX512_B) {
        const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
        snipi_fetch_panels(a, 4 * SNIPI_AVX512_A, b, 4 * SNIPI_AVX512_B);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX512_A; i++) {
            const __m512 ai = _mm512_set1_ps(a[i]);
            sum[i][0] = _mm512_fmadd_ps(ai, b0, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(ai, b1, sum[i][1]);
        }
    }
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_AVX512_A; i++, c += ldc) {
        const float *old = from ? from : c;
        _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(old), sum[i][0]));
        _mm512_storeu_ps(c + 16, _mm512_add_ps(_mm512_loadu_ps(old + 16), sum[i][1]));
    }
}

// Scaled kernels: at each step of a block sum[i][j] += a[4i + t] * b[4j + t], t from 0 to 3, and at its end
// c = fmaf(sa[i] * sb[j], sum[i][j], c). The tile stands in a buffer until its last block: C is far, and its rows may
// share a set of the nearest cache.
typedef enum {
    SNIPI_BY_PAIRS,  // byte products are added as pairs in 16 bits, at most 2 * 24 * 12 a step, and then in 32
    SNIPI_BY_VNNI,   // in 32 bits at once
    SNIPI_BY_BF16    // a[2i + t] * b[2j + t], t from 1 to 0, of bfloat16 in float
} snipi_product;

enum { SNIPI_PAIR_STEPS = 32 };  // in 16 bits: 32 * 576 < 2^15

SNIPI_INLINE int32_t snipi_four(const uint8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

// Instructions that compilers do not know or use badly. Of byte products they make all of a step before they add them,
// and lack registers for the sums; they copy the sums of vpdpbusd about. The others' are what tests/emulate_x86.h
// replaces.
#    define SNIPI_ADD_PAIRS(sum, x, y, pairs, constraint)                              \
        __asm__("vpmaddubsw {%3, %2, %1|%1, %2, %3}\n\tvpaddw {%1, %0, %0|%0, %0, %1}" \
                : "+" constraint(sum), "=&" constraint(pairs)                          \
                : constraint(x), constraint(y))
#    define SNIPI_DPBUSD(sum, x, y) __asm__("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(x), "v"(y))
#    if defined(SNIPI_X86_LATE) && !defined(SNIPI_EMULATED)
#        define SNIPI_DPBUSD256(sum, x, y) \
            __asm__("%{vex%} vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+x"(sum) : "x"(x), "x"(y))
#        define SNIPI_DPBF16(sum, x, y) __asm__("vdpbf16ps {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(x), "v"(y))
#    endif

// The sums of a block, 16 by 16 bits.
SNIPI_TARGET_AVX2 SNIPI_INLINE void snipi_sum_pairs_avx2(int64_t steps, const uint8_t *a, const int8_t *b,
                                                         __m256i sum[SNIPI_AVX2_A][2]) {
    while (steps > 0) {
        const int64_t stop = snipi_max(0, steps - SNIPI_PAIR_STEPS);
        __m256i part[SNIPI_AVX2_A][2];
        __m256i pairs __attribute__((unused));  // a register that the instructions overwrite
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX2_A; i++) part[i][0] = part[i][1] = _mm256_setzero_si256();
        for (; steps > stop; steps--, a += 4 * SNIPI_AVX2_A, b += 4 * SNIPI_AVX2_B) {
            const __m256i b0 = _mm256_loadu_si256((const __m256i *)(const void *)b);
            const __m256i b1 = _mm256_loadu_si256((const __m256i *)(const void *)(b + 32));
            snipi_fetch_panels(a, 4 * SNIPI_AVX2_A, b, 4 * SNIPI_AVX2_B);
            SNIPI_UNROLL
            for (int i = 0; i < SNIPI_AVX2_A; i++) {
                const __m256i ai = _mm256_set1_epi32(snipi_four(a + 4 * i));
                SNIPI_ADD_PAIRS(part[i][0], ai, b0, pairs, "x");
                SNIPI_ADD_PAIRS(part[i][1], ai, b1, pairs, "x");
            }
        }
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX2_A; i++) {
            sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(part[i][0], _mm256_set1_epi16(1)));
            sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(part[i][1], _mm256_set1_epi16(1)));
        }
    }
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_sum_pairs_avx512(int64_t steps, const uint8_t *a, const int8_t *b,
                                                             __m512i sum[SNIPI_AVX512_A][2]) {
    while (steps > 0) {
        const int64_t stop = snipi_max(0, steps - SNIPI_PAIR_STEPS);
        __m512i part[SNIPI_AVX512_A][2];
        __m512i pairs __attribute__((unused));  // a register that the instructions overwrite
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX512_A; i++) part[i][0] = part[i][1] = _mm512_setzero_si512();
        for (; steps > stop; steps--, a += 4 * SNIPI_AVX512_A, b += 4 * SNIPI_AVX512_B) {
            const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
            snipi_fetch_panels(a, 4 * SNIPI_AVX512_A, b, 4 * SNIPI_AVX512_B);
            SNIPI_UNROLL
            for (int i = 0; i < SNIPI_AVX512_A; i++) {
                const __m512i ai = _mm512_set1_epi32(snipi_four(a + 4 * i));
                SNIPI_ADD_PAIRS(part[i][0], ai, b0, pairs, "v");
                SNIPI_ADD_PAIRS(part[i][1], ai, b1, pairs, "v");
            }
        }
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX512_A; i++) {
            sum[i][0] = _mm512_add_epi32(sum[i][0], _mm512_madd_epi16(part[i][0], _mm512_set1_epi16(1)));
            sum[i][1] = _mm512_add_epi32(sum[i][1], _mm512_madd_epi16(part[i][1], _mm512_set1_epi16(1)));
        }
    }
}

// The sums of a block by an instruction that adds all products of a step.
#    ifdef SNIPI_X86_LATE
SNIPI_TARGET_AVX2 SNIPI_INLINE void snipi_sum_steps_avx2(int64_t steps, const uint8_t *a, const int8_t *b,
                                                         __m256i sum[SNIPI_AVX2_A][2]) {
    for (; steps > 0; steps--, a += 4 * SNIPI_AVX2_A, b += 4 * SNIPI_AVX2_B) {
        const __m256i b0 = _mm256_loadu_si256((const __m256i *)(const void *)b);
        const __m256i b1 = _mm256_loadu_si256((const __m256i *)(const void *)(b + 32));
        snipi_fetch_panels(a, 4 * SNIPI_AVX2_A, b, 4 * SNIPI_AVX2_B);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX2_A; i++) {
            const __m256i ai = _mm256_set1_epi32(snipi_four(a + 4 * i));
            SNIPI_DPBUSD256(sum[i][0], ai, b0);
            SNIPI_DPBUSD256(sum[i][1], ai, b1);
        }
    }
}
#    endif

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_sum_steps_avx512(snipi_product product, int64_t steps, const uint8_t *a,
                                                             const int8_t *b, __m512i sum[SNIPI_AVX512_A][2]) {
    for (; steps > 0; steps--, a += 4 * SNIPI_AVX512_A, b += 4 * SNIPI_AVX512_B) {
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
        snipi_fetch_panels(a, 4 * SNIPI_AVX512_A, b, 4 * SNIPI_AVX512_B);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX512_A; i++) {
            const __m512i ai = _mm512_set1_epi32(snipi_four(a + 4 * i));
            if (product == SNIPI_BY_VNNI) {
                SNIPI_DPBUSD(sum[i][0], ai, b0);
                SNIPI_DPBUSD(sum[i][1], ai, b1);
            }
#    ifdef SNIPI_X86_LATE
            if (product == SNIPI_BY_BF16) {
                SNIPI_DPBF16(sum[i][0], ai, b0);
                SNIPI_DPBF16(sum[i][1], ai, b1);
            }
#    endif
        }
    }
}

// A row of a tile: c[j] = fmaf(sa * sb[j], sum[j], old[j])
SNIPI_TARGET_AVX2 SNIPI_INLINE void snipi_scale_avx2(float sa, const float *sb, const __m256i sum[2], const float *old,
                                                     float *c) {
    const __m256 s = _mm256_set1_ps(sa), s0 = _mm256_mul_ps(s, _mm256_loadu_ps(sb)),
                 s1 = _mm256_mul_ps(s, _mm256_loadu_ps(sb + 8));
    _mm256_storeu_ps(c, _mm256_fmadd_ps(s0, _mm256_cvtepi32_ps(sum[0]), _mm256_loadu_ps(old)));
    _mm256_storeu_ps(c + 8, _mm256_fmadd_ps(s1, _mm256_cvtepi32_ps(sum[1]), _mm256_loadu_ps(old + 8)));
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_scale_avx512(float sa, __m512 sb0, __m512 sb1, __m512 sum0, __m512 sum1,
                                                         const float *old, float *c) {
    const __m512 s = _mm512_set1_ps(sa);
    _mm512_storeu_ps(c, _mm512_fmadd_ps(_mm512_mul_ps(s, sb0), sum0, _mm512_loadu_ps(old)));
    _mm512_storeu_ps(c + 16, _mm512_fmadd_ps(_mm512_mul_ps(s, sb1), sum1, _mm512_loadu_ps(old + 16)));
}

// Sums as floats: of S8 they are integers, of BF16 the bits of floats. (_mm512_cvtepi32_ps warns in GCC 12.)
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_sums_avx512(snipi_product product, __m512i sum) {
    return product == SNIPI_BY_BF16 ? _mm512_castsi512_ps(sum) : _mm512_maskz_cvtepi32_ps(0xFFFF, sum);
}

SNIPI_TARGET_AVX2 SNIPI_INLINE void snipi_scaled_avx2(snipi_product product, int64_t k, int64_t block, const uint8_t *a,
                                                      const int8_t *b, const float *sa, const float *sb,
                                                      const int32_t *start, const float *from, float *c, int64_t ldc) {
    float tile[SNIPI_AVX2_A * SNIPI_AVX2_B];
    const float *old = from ? from : c;
    int64_t old_ld = from ? 0 : ldc;
    snipi_fetch_c(c, ldc, SNIPI_AVX2_A, SNIPI_AVX2_B);
    for (; k > 0; k -= block, old = tile, old_ld = SNIPI_AVX2_B) {
        const int64_t steps = (snipi_min(block, k) + 3) / 4, to_ld = k > block ? (int64_t)SNIPI_AVX2_B : ldc;
        float *to = k > block ? tile : c;
        __m256i sum[SNIPI_AVX2_A][2];
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX2_A; i++) {
            sum[i][0] = _mm256_loadu_si256((const __m256i *)(const void *)start);
            sum[i][1] = _mm256_loadu_si256((const __m256i *)(const void *)(start + 8));
        }
        if (product == SNIPI_BY_PAIRS) snipi_sum_pairs_avx2(steps, a, b, sum);
#    ifdef SNIPI_X86_LATE
        if (product == SNIPI_BY_VNNI) snipi_sum_steps_avx2(steps, a, b, sum);
#    endif
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX2_A; i++) snipi_scale_avx2(sa[i], sb, sum[i], old + i * old_ld, to + i * to_ld);
        a += 4 * SNIPI_AVX2_A * steps;
        b += 4 * SNIPI_AVX2_B * steps;
        sa += SNIPI_AVX2_A;
        sb += SNIPI_AVX2_B;
        start += SNIPI_AVX2_B;
    }
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_scaled_avx512(snipi_product product, int64_t k, int64_t block,
                                                          const uint8_t *a, const int8_t *b, const float *sa,
                                                          const float *sb, const int32_t *start, const float *from,
                                                          float *c, int64_t ldc) {
    float tile[SNIPI_AVX512_A * SNIPI_AVX512_B];
    const float *old = from ? from : c;
    int64_t old_ld = from ? 0 : ldc;
    snipi_fetch_c(c, ldc, SNIPI_AVX512_A, SNIPI_AVX512_B);
    for (; k > 0; k -= block, old = tile, old_ld = SNIPI_AVX512_B) {
        const int64_t steps = (snipi_min(block, k) + 3) / 4, to_ld = k > block ? (int64_t)SNIPI_AVX512_B : ldc;
        float *to = k > block ? tile : c;
        __m512i sum[SNIPI_AVX512_A][2];
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX512_A; i++) {
            sum[i][0] = product == SNIPI_BY_BF16 ? _mm512_setzero_si512() : _mm512_loadu_si512(start);
            sum[i][1] = product == SNIPI_BY_BF16 ? _mm512_setzero_si512() : _mm512_loadu_si512(start + 16);
        }
        if (product == SNIPI_BY_PAIRS)
            snipi_sum_pairs_avx512(steps, a, b, sum);
        else
            snipi_sum_steps_avx512(product, steps, a, b, sum);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_AVX512_A; i++)
            snipi_scale_avx512(sa[i], _mm512_loadu_ps(sb), _mm512_loadu_ps(sb + 16),
                               snipi_sums_avx512(product, sum[i][0]), snipi_sums_avx512(product, sum[i][1]),
                               old + i * old_ld, to + i * to_ld);
        a += 4 * SNIPI_AVX512_A * steps;
        b += 4 * SNIPI_AVX512_B * steps;
        sa += SNIPI_AVX512_A;
        sb += SNIPI_AVX512_B;
        start += SNIPI_AVX512_B;
    }
}

#    define SNIPI_SCALED_KERNEL(name, target, scaled, product)                                                     \
        target static void name(int64_t k, int64_t block, const uint8_t *a, const int8_t *b, const float *sa,      \
                                const float *sb, const int32_t *start, const float *from, float *c, int64_t ldc) { \
            scaled(product, k, block, a, b, sa, sb, start, from, c, ldc);                                          \
        }
SNIPI_SCALED_KERNEL(snipi_kernel_s8_avx2, SNIPI_TARGET_AVX2, snipi_scaled_avx2, SNIPI_BY_PAIRS)
SNIPI_SCALED_KERNEL(snipi_kernel_s8_avx512, SNIPI_TARGET_AVX512, snipi_scaled_avx512, SNIPI_BY_PAIRS)
SNIPI_SCALED_KERNEL(snipi_kernel_s8_vnni, SNIPI_TARGET_VNNI, snipi_scaled_avx512, SNIPI_BY_VNNI)

#    ifdef SNIPI_X86_LATE
SNIPI_SCALED_KERNEL(snipi_kernel_s8_avx_vnni, SNIPI_TARGET_AVX_VNNI, snipi_scaled_avx2, SNIPI_BY_VNNI)
SNIPI_SCALED_KERNEL(snipi_kernel_bf16_avx512, SNIPI_TARGET_BF16, snipi_scaled_avx512, SNIPI_BY_BF16)

// AMX. Tiles 0 to 3 are 2 x 2 tiles of 16 x 16 sums, 4 and 5 sixteen rows of A by one piece of k, 6 and 7 that piece by
// sixteen columns of B. Sums leave the tiles through memory and are scaled onto C there. What limits, by Intel's
// figures, in an S8 block of 128 and 32 x 32 of C: 8 products of 16 cycles, 128; stores of 64 bytes, one a cycle, 64 of
// sums and 64 of C, 128; loads, two a cycle, 128 rows of tiles, 64 of sums, 64 of C and 32 scales, 144. All three go on
// at once because the rows of one block are scaled between the products of the next: at best nine tenths of the unit's
// rate (BF16: all of it), and much less where blocks are shorter. Shapes and tiles belong to the thread: begin loads
// the shapes, and end releases them, so that no tile state is left to be saved at context switches.
#        ifndef SNIPI_EMULATED
#            define SNIPI_TILE_SHAPES(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#            define SNIPI_TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#            define SNIPI_TILE_ZERO(t) __asm__ volatile("tilezero {%%tmm" #            t "|tmm" #            t "}" : :)
#            define SNIPI_TILE_LOAD(t, p, stride)                                          \
                __asm__ volatile("tileloadd {(%0,%1,1), %%tmm" #t "|tmm" #t ", [%0+%1*1]}" \
                                 :                                                         \
                                 : "r"(p), "r"(stride)                                     \
                                 : "memory")
#            define SNIPI_TILE_STORE(t, p, stride)                                          \
                __asm__ volatile("tilestored {%%tmm" #t ", (%0,%1,1)|[%0+%1*1], tmm" #t "}" \
                                 :                                                          \
                                 : "r"(p), "r"(stride)                                      \
                                 : "memory")
#            define SNIPI_TILE_DPBSSD(t, a, b) \
                __asm__ volatile("tdpbssd {%%tmm" #b ", %%tmm" #a ", %%tmm" #t "|tmm" #t ", tmm" #a ", tmm" #b "}" : :)
#            define SNIPI_TILE_DPBF16(t, a, b)                                                                       \
                __asm__ volatile("tdpbf16ps {%%tmm" #b ", %%tmm" #a ", %%tmm" #t "|tmm" #t ", tmm" #a ", tmm" #b "}" \
                                 :                                                                                   \
                                 :)
#        endif
#        define SNIPI_TILE_PRODUCT(product, t, a, b) \
            do {                                     \
                if (product == SNIPI_BY_BF16)        \
                    SNIPI_TILE_DPBF16(t, a, b);      \
                else                                 \
                    SNIPI_TILE_DPBSSD(t, a, b);      \
            } while (0)

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} snipi_tile_shapes;

SNIPI_TARGET_AMX static void snipi_tiles_begin(int64_t piece) {
    snipi_tile_shapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int t = 0; t < 8; t++) {
        shapes.row_bytes[t] = (uint16_t)(t == 4 || t == 5 ? piece : 64);
        shapes.rows[t] = (uint8_t)(t >= 6 ? piece / 4 : 16);
    }
    SNIPI_TILE_SHAPES(&shapes);
}

SNIPI_TARGET_AMX static void snipi_tiles_end(void) { SNIPI_TILE_RELEASE(); }

// Rows of a block's sums that are still to be scaled: [row, SNIPI_AMX_A).
typedef struct {
    int64_t row;
    const float *sums;  // [SNIPI_AMX_A][SNIPI_AMX_B]; of S8, the bits of int32_t
    const float *sa, *sb, *old;
    int64_t old_ld;
    float *to;
    int64_t to_ld;
} snipi_amx_rows;

SNIPI_TARGET_AMX SNIPI_INLINE void snipi_scale_amx(snipi_product product, snipi_amx_rows *rows, int64_t count) {
    const __m512 sb0 = _mm512_loadu_ps(rows->sb), sb1 = _mm512_loadu_ps(rows->sb + 16);
    const int64_t stop = snipi_min(rows->row + count, SNIPI_AMX_A);
    for (; rows->row < stop; rows->row++) {
        const float *sums = rows->sums + SNIPI_AMX_B * rows->row;
        snipi_scale_avx512(rows->sa[rows->row], sb0, sb1, snipi_sums_avx512(product, _mm512_load_si512(sums)),
                           snipi_sums_avx512(product, _mm512_load_si512(sums + 16)),
                           rows->old + rows->row * rows->old_ld, rows->to + rows->row * rows->to_ld);
    }
}

SNIPI_TARGET_AMX SNIPI_INLINE void snipi_scaled_amx(snipi_product product, int64_t k, int64_t block, const uint8_t *a,
                                                    const int8_t *b, const float *sa, const float *sb,
                                                    const int32_t *start, const float *from, float *c, int64_t ldc) {
    __attribute__((aligned(64))) float sums[SNIPI_AMX_A * SNIPI_AMX_B];
    float tile[SNIPI_AMX_A * SNIPI_AMX_B];
    const int64_t piece = snipi_piece(block), row_bytes = snipi_padded(k, block, piece), line = 4 * SNIPI_AMX_B;
    snipi_amx_rows rows = { SNIPI_AMX_A, sums, sa, sb, from ? from : c, from ? 0 : ldc, tile, SNIPI_AMX_B };
    int first = 1;
    (void)start;
    snipi_fetch_c(c, ldc, SNIPI_AMX_A, SNIPI_AMX_B);
    for (; k > 0; k -= block, first = 0) {
        // Rows of the last block after each product, so many that all of them are done before the sums are stored anew.
        const int64_t pieces = snipi_ceil_div(snipi_min(block, k), piece), share = snipi_ceil_div(8, pieces);
        SNIPI_TILE_ZERO(0);
        SNIPI_TILE_ZERO(1);
        SNIPI_TILE_ZERO(2);
        SNIPI_TILE_ZERO(3);
        for (int64_t p = 0; p < pieces; p++, a += piece, b += SNIPI_AMX_B * piece) {
            SNIPI_UNROLL
            for (int quarter = 0; quarter < 4; quarter++) {
                if (quarter == 0) {
                    SNIPI_TILE_LOAD(4, a, row_bytes);
                    SNIPI_TILE_LOAD(6, b, line);
                    SNIPI_TILE_PRODUCT(product, 0, 4, 6);
                } else if (quarter == 1) {
                    SNIPI_TILE_LOAD(7, b + 64, line);
                    SNIPI_TILE_PRODUCT(product, 1, 4, 7);
                } else if (quarter == 2) {
                    SNIPI_TILE_LOAD(5, a + 16 * row_bytes, row_bytes);
                    SNIPI_TILE_PRODUCT(product, 2, 5, 6);
                } else
                    SNIPI_TILE_PRODUCT(product, 3, 5, 7);
                snipi_scale_amx(product, &rows, share);
            }
        }
        SNIPI_TILE_STORE(0, sums, line);
        SNIPI_TILE_STORE(1, sums + 16, line);
        SNIPI_TILE_STORE(2, sums + 16 * SNIPI_AMX_B, line);
        SNIPI_TILE_STORE(3, sums + 16 * SNIPI_AMX_B + 16, line);
        if (!first) {
            rows.sa += SNIPI_AMX_A;
            rows.sb += SNIPI_AMX_B;
            rows.old = tile;
            rows.old_ld = SNIPI_AMX_B;
        }
        rows.row = 0;
    }
    rows.to = c;
    rows.to_ld = ldc;
    snipi_scale_amx(product, &rows, SNIPI_AMX_A);
}

SNIPI_SCALED_KERNEL(snipi_kernel_s8_amx, SNIPI_TARGET_AMX, snipi_scaled_amx, SNIPI_BY_VNNI)
SNIPI_SCALED_KERNEL(snipi_kernel_bf16_amx, SNIPI_TARGET_AMX, snipi_scaled_amx, SNIPI_BY_BF16)
#    endif  // SNIPI_X86_LATE

// ---- packing for GEMMs
SNIPI_INLINE uint32_t snipi_lowest(int n) { return n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1u; }  // bits

SNIPI_TARGET_AVX2 static void snipi_spread_avx2(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps,
                                                int offset, uint8_t *out, int panel_rows) {
    const __m128i twice = _mm_loadu_si128((const __m128i *)(const void *)snipi_twice);
    const __m128i table = _mm_add_epi8(twice, _mm_set1_epi8((char)offset)), low = _mm_set1_epi8(15);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int r = 0; r < rows; r += 8, codes += 8 * row_bytes, out += 32) {
        const int used = rows - r < 8 ? rows - r : 8;
        const __m256i live = _mm256_cmpgt_epi32(_mm256_set1_epi32(used), lane);
        int64_t t = 0;
        for (; t + 8 <= steps; t += 8) {  // 8 rows x 32 codes, as 8 x 8 dwords
            __m256i a[8], b[8];
            for (int i = 0; i < 8; i++) {
                const uint8_t *from = codes + (size_t)i * row_bytes + 2 * t;
                const __m128i x = i < used ? _mm_loadu_si128((const __m128i *)(const void *)from) : low;
                const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(x, low));
                const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(x, 4), low));
                a[i] = _mm256_insertf128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)),
                                               _mm_unpackhi_epi8(even, odd), 1);
            }
            SNIPI_UNROLL
            for (int i = 0; i < 4; i++) {
                b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            SNIPI_UNROLL
            for (int i = 0; i < 2; i++) {
                a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
                a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
            }
            for (int i = 0; i < 8; i++) {
                int *to = (int *)(void *)(out + 4 * (t + i) * panel_rows);
                const __m256i x = a[i & 3], y = a[4 + (i & 3)];
                const __m256i v = i < 4 ? _mm256_permute2x128_si256(x, y, 0x20) : _mm256_permute2x128_si256(x, y, 0x31);
                if (used == 8)
                    _mm256_storeu_si256((__m256i *)(void *)to, v);
                else
                    _mm256_maskstore_epi32(to, live, v);
            }
        }
        snipi_spread_scalar(codes + 2 * t, row_bytes, used, steps - t, offset, out + 4 * t * panel_rows, panel_rows);
    }
}

#    define SNIPI_CODES_16(row) \
        (live >> (row)&1 ? _mm_maskz_loadu_epi8(there, from + (size_t)(row)*row_bytes) : _mm_setzero_si128())

// Eight steps of 16 rows: dwords of codes are transposed and then spread, half the bytes of each, its nibbles to bytes
// of their own.
SNIPI_TARGET_AVX512 static void snipi_spread_avx512(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps,
                                                    int offset, uint8_t *out, int panel_rows) {
    const __m128i twice = _mm_loadu_si128((const __m128i *)(const void *)snipi_twice);
    const __m512i table = _mm512_broadcast_i32x4(_mm_add_epi8(twice, _mm_set1_epi8((char)offset)));
    const __m512i low = _mm512_set1_epi8(15), odd = _mm512_set1_epi16((short)0xFF00);
    const __m512i bytes[2] = {
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13)),
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15))
    };
    for (int r = 0; r < rows; r += 16, codes += 16 * row_bytes, out += 64) {
        const __mmask16 live = (__mmask16)snipi_lowest(rows - r < 16 ? rows - r : 16);
        for (int64_t t = 0; t < steps; t += 8) {
            const int some = (int)snipi_min(8, steps - t);
            const __mmask16 there = (__mmask16)snipi_lowest(2 * some);
            const uint8_t *from = codes + 2 * t;
            __m512i a[4], b[4];
            SNIPI_UNROLL
            for (int i = 0; i < 4; i++) {  // rows i, i + 4, i + 8, i + 12 side by side
                const __m256i front = _mm256_inserti128_si256(_mm256_castsi128_si256(SNIPI_CODES_16(i)),
                                                              SNIPI_CODES_16(i + 4), 1);
                const __m256i back = _mm256_inserti128_si256(_mm256_castsi128_si256(SNIPI_CODES_16(i + 8)),
                                                             SNIPI_CODES_16(i + 12), 1);
                a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(front), back, 1);
            }
            b[0] = _mm512_unpacklo_epi32(a[0], a[1]);
            b[1] = _mm512_unpacklo_epi32(a[2], a[3]);
            b[2] = _mm512_unpackhi_epi32(a[0], a[1]);
            b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
            a[0] = _mm512_unpacklo_epi64(b[0], b[1]);
            a[1] = _mm512_unpackhi_epi64(b[0], b[1]);
            a[2] = _mm512_unpacklo_epi64(b[2], b[3]);
            a[3] = _mm512_unpackhi_epi64(b[2], b[3]);
            SNIPI_UNROLL
            for (int i = 0; i < 8; i++) {
                const __m512i x = _mm512_shuffle_epi8(a[i / 2], bytes[i % 2]);
                const __m512i shifted = _mm512_srli_epi16(x, 4);
                const __m512i nibbles = _mm512_ternarylogic_epi32(odd, shifted, x, 0xCA);  // odd ? shifted : x
                if (i < some)
                    _mm512_mask_storeu_epi32(out + 4 * (t + i) * panel_rows, live,
                                             _mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, low)));
            }
        }
    }
}

SNIPI_TARGET_AVX2 static void snipi_start_avx2(const int8_t *b, int64_t steps, int panel_rows, int32_t *start) {
    const __m256i ones = _mm256_set1_epi8(1), factor = _mm256_set1_epi16(-12);
    for (int i = 0; i < panel_rows; i += 8) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t t = 0; t < steps; t++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(b + 4 * (t * panel_rows + i)));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, x), factor));
        }
        _mm256_storeu_si256((__m256i *)(void *)(start + i), sum);
    }
}

SNIPI_TARGET_AVX2 static void snipi_round_floats_avx2(float *x, int n) {
    const __m256i half = _mm256_set1_epi32(0x7FFF), one = _mm256_set1_epi32(1), quiet = _mm256_set1_epi32(0x400000);
    const __m256i sign = _mm256_set1_epi32((int)0x80000000u), infinity = _mm256_set1_epi32(0x7F800000);
    int i = 0;
    for (; i + 8 <= n; i += 8) {  // as snipi_bf16_round
        __m256i *at = (__m256i *)(void *)(x + i);
        const __m256i v = _mm256_loadu_si256(at), odd = _mm256_and_si256(_mm256_srli_epi32(v, 16), one);
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(v, half), odd);
        const __m256i nan = _mm256_cmpgt_epi32(_mm256_andnot_si256(sign, v), infinity);
        const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(v, quiet), nan);
        _mm256_storeu_si256(at, _mm256_and_si256(kept, _mm256_set1_epi32((int)0xFFFF0000u)));
    }
    snipi_round_floats_scalar(x + i, n - i);
}

#    ifdef SNIPI_X86_LATE
SNIPI_TARGET_AVX2 static void snipi_spread_rows_avx2(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps,
                                                     uint8_t *out, int64_t stride) {
    const __m128i twice = _mm_loadu_si128((const __m128i *)(const void *)snipi_twice);
    const __m256i table = _mm256_broadcastsi128_si256(twice), low = _mm256_set1_epi8(15);
    for (int r = 0; r < rows; r++, codes += row_bytes, out += stride) {
        int64_t t = 0;
        for (; t + 8 <= steps; t += 8) {  // bytes in words: the low nibble stays, the high one moves to the next byte
            __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(codes + 2 * t)));
            x = _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), low);
            _mm256_storeu_si256((__m256i *)(void *)(out + 4 * t), _mm256_shuffle_epi8(table, x));
        }
        snipi_spread_scalar(codes + 2 * t, row_bytes, 1, steps - t, 0, out + 4 * t, 1);
    }
}

// x rounded as by snipi_bf16_round, in the high halves; the low ones are noise.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_rounded512(__m512i x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7FFFFFFF));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    return _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
}

SNIPI_TARGET_AVX512 static void snipi_round_avx512(const float *x, int n, uint16_t *out) {
    for (; n > 0; x += 16, out += 16, n -= 16) {
        const __mmask16 live = (__mmask16)snipi_lowest(n);
        const __m512i rounded = snipi_rounded512(_mm512_maskz_loadu_epi32(live, x));
        _mm256_mask_storeu_epi16(out, live, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}

// A code's fields are moved into a bfloat16's, as snipi_decode_avx2 does it; subnormals and all of E2M1 come from the
// table.
SNIPI_TARGET_AVX512 static void snipi_look_up_avx512(snip_format format, const uint16_t *table, const float *lut,
                                                     const uint8_t *codes, int n, uint16_t *out) {
    const snipi_element e = snipi_element_of(format);
    const __m512i values = _mm512_loadu_si512(table), magnitude = _mm512_set1_epi16((short)((1 << e.sign) - 1)),
                  base = _mm512_set1_epi16((short)((127 - e.bias) << 7)), sign = _mm512_set1_epi16((short)0x8000),
                  largest = _mm512_set1_epi16((short)e.largest), normal = _mm512_set1_epi16((short)(1 << e.mantissa));
    const __m128i shift = _mm_cvtsi32_si128(7 - e.mantissa), sign_shift = _mm_cvtsi32_si128(15 - e.sign);
    for (; n > 0; codes += format == SNIP_E2M1 ? 16 : 32, out += 32, n -= 32) {
        const __mmask32 live = snipi_lowest(n);
        __m512i v;
        if (format == SNIP_E2M1) {  // two codes a byte: bytes to words, nibbles to bytes, and those to words
            const __mmask16 bytes = (__mmask16)snipi_lowest((n + 1) / 2);
            __m256i c = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(bytes, codes));
            c = _mm256_and_si256(_mm256_or_si256(c, _mm256_slli_epi16(c, 4)), _mm256_set1_epi8(15));
            v = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(c), values);
        } else {
            const __m512i c = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(live, codes));
            const __m512i m = _mm512_and_si512(c, magnitude);
            if (_mm512_cmpgt_epi16_mask(m, largest)) {  // NaN or infinity among them
                for (int i = 0; i < n && i < 32; i++) {
                    const uint16_t one = (uint16_t)snipi_bf16_round(snipi_bits(lut[codes[i]]));
                    memcpy(out + i, &one, 2);
                }
                continue;
            }
            v = _mm512_add_epi16(_mm512_sll_epi16(m, shift), base);
            v = _mm512_mask_permutexvar_epi16(v, _mm512_cmplt_epi16_mask(m, normal), m, values);
            v = _mm512_or_si512(v, _mm512_and_si512(_mm512_sll_epi16(c, sign_shift), sign));
        }
        _mm512_mask_storeu_epi16(out, live, v);
    }
}

SNIPI_TARGET_AVX512 static void snipi_pair_avx512(const void *first, const void *second, int bf16, int n, float *out) {
    const void *other = second ? second : first;
    for (int i = 0; i < n; i += 16) {
        const __mmask16 live = (__mmask16)snipi_lowest(n - i), also = (__mmask16)(second ? live : 0);
        __m512i low, high;  // halves of the pairs
        if (bf16) {
            low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, (const uint16_t *)first + i));
            high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(also, (const uint16_t *)other + i));
            high = _mm512_slli_epi32(high, 16);
        } else {
            low = snipi_rounded512(_mm512_maskz_loadu_epi32(live, (const float *)first + i));
            high = snipi_rounded512(_mm512_maskz_loadu_epi32(also, (const float *)other + i));
            low = _mm512_srli_epi32(low, 16);
            high = _mm512_and_si512(high, _mm512_set1_epi32((int)0xFFFF0000u));
        }
        _mm512_mask_storeu_epi32(out + i, live, _mm512_or_si512(low, high));
    }
}
#    endif  // SNIPI_X86_LATE

// Strips, AVX-512: exact for finite runs of ordinary size, as snipi_run_scalar.
//
// To nearest: adding the right power of two rounds y at the code's last place. That power depends on the exponent
// alone: a table of 32. The sum keeps the sign of y in its top bit; rotated left by one, it has the code and then the
// sign in its low bits.
//
// Stochastic: below the smallest normal number adding that number, truncated, puts |y| into the same fixed point.
typedef struct {
    __m512i magnitude, sign_bit, least, beyond, cap, power[2];
    __m512i top, keep, code_normal, code_below, shift, random_shift;
    __m512i sign, sign_shift, kept;  // of codes as bytes
} snipi_codec512;

SNIPI_TARGET_AVX512 SNIPI_INLINE snipi_codec512 snipi_codec512_of(const snipi_run *run) {
    snipi_codec512 codec;
    codec.magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    codec.sign_bit = _mm512_set1_epi32((int)0x80000000u);
    codec.least = _mm512_set1_epi32(run->k.least);
    codec.beyond = _mm512_set1_epi32(run->k.beyond);
    codec.cap = _mm512_set1_epi32(run->k.cap);
    codec.power[0] = _mm512_loadu_si512(run->k.power);
    codec.power[1] = _mm512_loadu_si512(run->k.power + 16);
    codec.top = _mm512_set1_epi32((int32_t)snipi_bits(run->e.max) + (1 << run->k.shift) - 1);
    codec.keep = _mm512_set1_epi32(-(1 << run->k.shift));
    codec.code_normal = _mm512_set1_epi32(run->k.least - (1 << 23));
    codec.code_below = codec.least;
    codec.shift = _mm512_set1_epi32(run->k.shift);
    codec.random_shift = _mm512_set1_epi32(run->k.random_shift);
    codec.sign = _mm512_set1_epi8((char)run->k.sign);
    codec.sign_shift = _mm512_set1_epi16((short)run->e.sign);
    codec.kept = _mm512_set1_epi8((char)(2 * run->k.sign - 1));
    return codec;
}

// magnitude with the sign of y
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_signed512(const snipi_codec512 *codec, __m512i magnitude, __m512 y) {
    return _mm512_ternarylogic_epi32(magnitude, _mm512_castps_si512(y), codec->sign_bit, 0xF8);
}
#    if defined(__GNUC__) && !defined(__clang__)  // GCC's own macros for the rounding mode and vrangeps, at -O0
#        pragma GCC diagnostic push
#        pragma GCC diagnostic ignored "-Wsign-conversion"
#    endif
// The value of y's code; in `word` the code, below the bits of no meaning and the sign.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_nearest512(const snipi_codec512 *codec, __m512 y, int capped,
                                                         __m512i *over, __m512i *word) {
    const __m512 least = _mm512_castsi512_ps(codec->least);
    __m512 power, sum;
    if (capped) {
        const __m512i a = _mm512_and_si512(_mm512_castps_si512(y), codec->magnitude);
        const __mmask16 beyond = _mm512_cmpgt_epi32_mask(a, codec->beyond);
        *over = _mm512_mask_add_epi32(*over, beyond, *over, _mm512_set1_epi32(1));
        y = _mm512_castsi512_ps(snipi_signed512(codec, _mm512_min_epi32(a, codec->cap), y));
    }
    power = _mm512_maskz_range_ps(0xFFFF, y, least, 3);  // the larger magnitude, with y's sign
    power = _mm512_castsi512_ps(
        _mm512_permutex2var_epi32(codec->power[0], _mm512_srli_epi32(_mm512_castps_si512(power), 23), codec->power[1]));
    power = _mm512_castsi512_ps(snipi_signed512(codec, _mm512_castps_si512(power), y));
    sum = _mm512_add_ps(y, power);
    SNIPI_KEPT512(sum);
    *word = _mm512_castps_si512(sum);
    return _mm512_sub_ps(sum, power);
}

SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_stochastic512(const snipi_codec512 *codec, __m512 y, __m512i random,
                                                            int capped, __m512i *over, __m512i *word) {
    const __m512i a = _mm512_and_si512(_mm512_castps_si512(y), codec->magnitude);
    const __mmask16 below = _mm512_cmplt_epi32_mask(a, codec->least);
    const __m512 fixed = _mm512_castsi512_ps(a), least = _mm512_castsi512_ps(codec->least);
    __m512i t = _mm512_castps_si512(
        _mm512_mask_add_round_ps(fixed, below, fixed, least, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    __m512 value;
    t = _mm512_add_epi32(t, _mm512_srlv_epi32(random, codec->random_shift));
    if (capped) {
        const __mmask16 beyond = _mm512_cmpgt_epi32_mask(t, codec->top);
        *over = _mm512_mask_add_epi32(*over, beyond, *over, _mm512_set1_epi32(1));
        t = _mm512_min_epi32(t, codec->top);
    }
    value = _mm512_castsi512_ps(_mm512_and_si512(t, codec->keep));
    value = _mm512_mask_sub_ps(value, below, value, least);
    t = _mm512_sub_epi32(t, _mm512_mask_mov_epi32(codec->code_normal, below, codec->code_below));
    *word = snipi_signed512(codec, _mm512_srlv_epi32(t, codec->shift), y);
    return _mm512_castsi512_ps(snipi_signed512(codec, _mm512_castps_si512(value), y));
}
#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic pop
#    endif
// The word of vector g of four, rotated so that its code lands in byte g, the sign above it.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_to_byte512(__m512i word, int g) {
    switch (g) {
        case 0: return _mm512_rol_epi32(word, 1);
        case 1: return _mm512_rol_epi32(word, 9);
        case 2: return _mm512_rol_epi32(word, 17);
        default: return _mm512_rol_epi32(word, 25);
    }
}

// Codes of 64 elements in sequence, a byte each, from four such words.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_codes512(const snipi_codec512 *codec, const __m512i word[4]) {
    const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x000000FF), word[0], word[1], 0xCA);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00FF0000), word[2], word[3], 0xCA);
    // Byte g of dword j is the code of element 16 g + j, moved up by one, the sign lowest.
    __m512i c = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x0000FFFF), low, high, 0xCA);
    c = _mm512_permutexvar_epi32(dwords, _mm512_shuffle_epi8(c, bytes));
    c = _mm512_ternarylogic_epi32(codec->sign, _mm512_sllv_epi16(c, codec->sign_shift), _mm512_srli_epi16(c, 1), 0xCA);
    return _mm512_and_si512(c, codec->kept);
}

// How codes are stored. Past the caches they go a line of 64 bytes at a time: packed ones in two halves.
enum { SNIPI_BYTES, SNIPI_BYTES_PAST, SNIPI_NIBBLES, SNIPI_NIBBLES_PAST };

// Codes of elements [i, i + 64), a byte each in c. half: packed codes of a line whose other half is yet to come.
SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_store_codes512(uint8_t *codes, __m512i c, int64_t i, int form,
                                                           __m256i *half) {
    __m256i pairs;
    if (form == SNIPI_BYTES) {
        _mm512_storeu_si512(codes + i, c);
        return;
    }
    if (form == SNIPI_BYTES_PAST) {
        _mm512_stream_si512((__m512i *)(void *)(codes + i), c);
        return;
    }
    pairs = _mm512_maskz_cvtepi16_epi8(0xFFFFFFFF, _mm512_or_si512(c, _mm512_srli_epi16(c, 4)));
    if (form == SNIPI_NIBBLES)
        _mm256_storeu_si256((__m256i *)(void *)(codes + i / 2), pairs);
    else if (i % 128 == 0)
        *half = pairs;
    else
        _mm512_stream_si512((__m512i *)(void *)(codes + i / 2 - 32),
                            _mm512_inserti64x4(_mm512_castsi256_si512(*half), pairs, 1));
}

// Sums of a chunk, and of the run under way.
typedef struct {
    __m512d sum_sq, err_sq, dot, run_dot;
    __m512 run_sq, run_err;
} snipi_sums512;

SNIPI_TARGET_AVX512 SNIPI_INLINE snipi_sums512 snipi_sums512_of(const snipi_tally *tally) {
    snipi_sums512 sums;
    sums.sum_sq = _mm512_loadu_pd(tally->sum_sq);
    sums.err_sq = _mm512_loadu_pd(tally->err_sq);
    sums.dot = _mm512_loadu_pd(tally->dot);
    sums.run_dot = _mm512_setzero_pd();
    sums.run_sq = sums.run_err = _mm512_setzero_ps();
    return sums;
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_sums512_store(const snipi_sums512 *sums, snipi_tally *tally) {
    _mm512_storeu_pd(tally->sum_sq, sums->sum_sq);
    _mm512_storeu_pd(tally->err_sq, sums->err_sq);
    _mm512_storeu_pd(tally->dot, sums->dot);
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_add512(snipi_sums512 *sums, __m512 y, __m512 d, const float *weight) {
    __m512 y_sq = _mm512_mul_ps(y, y), d_sq = _mm512_mul_ps(d, d);
    SNIPI_KEPT512(y_sq);
    SNIPI_KEPT512(d_sq);
    sums->run_sq = _mm512_add_ps(sums->run_sq, y_sq);
    sums->run_err = _mm512_add_ps(sums->run_err, d_sq);
    if (!weight) return;
    const __m512 w = _mm512_loadu_ps(weight);
    sums->run_dot = _mm512_fmadd_pd(SNIPI_LOW(w), SNIPI_LOW(d), sums->run_dot);
    sums->run_dot = _mm512_fmadd_pd(SNIPI_HIGH(w), SNIPI_HIGH(d), sums->run_dot);
}

// total + (lane + lane 8 further) * scale^2
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512d snipi_fold512(__m512d total, __m512 lanes, __m512d square) {
    __m512d v = _mm512_mul_pd(_mm512_add_pd(SNIPI_LOW(lanes), SNIPI_HIGH(lanes)), square);
    SNIPI_KEPT512(v);
    return _mm512_add_pd(total, v);
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_end_run512(snipi_sums512 *sums, float scale, int weighted) {
    const __m512d one = _mm512_set1_pd((double)scale), square = _mm512_mul_pd(one, one);
    sums->sum_sq = snipi_fold512(sums->sum_sq, sums->run_sq, square);
    sums->err_sq = snipi_fold512(sums->err_sq, sums->run_err, square);
    sums->run_sq = sums->run_err = _mm512_setzero_ps();
    if (!weighted) return;
    __m512d w = _mm512_mul_pd(sums->run_dot, one);
    SNIPI_KEPT512(w);
    sums->dot = _mm512_add_pd(sums->dot, w);
    sums->run_dot = _mm512_setzero_pd();
}

#    define SNIPI_FETCH_LINES(p, n, hint)               \
        do {                                            \
            _mm_prefetch((p), hint);                    \
            _mm_prefetch((p) + 64, hint);               \
            _mm_prefetch((p) + 128, hint);              \
            if ((n) > 3) _mm_prefetch((p) + 192, hint); \
        } while (0)

// plain: codes alone, none beyond the largest. narrow: runs of less than 64 elements.
SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_strip_avx512_as(const snipi_run *run, const snipi_strip *strip,
                                                            const int stochastic, const int want_sums, const int plain,
                                                            const int narrow) {
    const snipi_codec512 codec = snipi_codec512_of(run);
    const int capped = plain ? 0 : strip->capped, width = strip->width, log2_width = strip->log2_width;
    const int past = run->stream && ((uintptr_t)strip->values & 63) == 0 && (strip->value_stride & 15) == 0;
    const int codes_past = run->stream && ((uintptr_t)strip->codes & 63) == 0 && (strip->code_stride & 63) == 0 &&
                           strip->length % 128 == 0;
    const int distant = run->stream || strip->pieces > 1;
    const int form = (run->packed ? SNIPI_NIBBLES : SNIPI_BYTES) + codes_past;
    const int64_t length = strip->length, step = narrow ? 64 >> log2_width : strip->runs > 0;
    const int64_t fetched = strip->fetched * length * strip->ahead_size / 4;  // with the peaks
    const int64_t fetch = (4 - strip->fetched) * 16 * strip->ahead_size;      // bytes for 64 elements
    const float *scale = strip->scale, *inverse = strip->inverse;
    snipi_sums512 sums = snipi_sums512_of(strip->tally);
    __m512i over = _mm512_setzero_si512();
    __m256i half = _mm256_setzero_si256();
    for (int piece = 0; piece < strip->pieces; piece++) {
        const float *x = strip->x + piece * strip->stride;
        const float *weight = !plain && strip->weight ? strip->weight + piece * strip->stride : NULL;
        float *values = !plain && strip->values ? strip->values + piece * strip->value_stride : NULL;
        uint8_t *codes = plain || strip->codes ? strip->codes + piece * strip->code_stride : NULL;
        const uint32_t *random = stochastic ? strip->random + piece * length : NULL;
        const char *ahead = strip->ahead + piece * strip->ahead_stride + fetched;
        for (int64_t i = 0, end; i < length; i = end, scale += step, inverse += step) {
            end = narrow ? i + 64 : snipi_min(i + width, length);
            for (int64_t first = i; first < end; first += 64, ahead += fetch) {
                __m512i word[4];
                if (distant)
                    SNIPI_FETCH_LINES(ahead, 4, _MM_HINT_T1);
                else
                    SNIPI_FETCH_LINES(ahead, 3, _MM_HINT_T0);
                SNIPI_UNROLL
                for (int g = 0; g < 4; g++) {
                    const int64_t at = first + 16 * g, one = narrow ? 16 * g >> log2_width : 0;
                    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + at), _mm512_set1_ps(inverse[one])), value;
                    SNIPI_KEPT512(y);
                    if (stochastic)
                        value = snipi_stochastic512(&codec, y, _mm512_loadu_si512(random + at), capped, &over,
                                                    &word[g]);
                    else
                        value = snipi_nearest512(&codec, y, capped, &over, &word[g]);
                    if (want_sums) snipi_add512(&sums, y, _mm512_sub_ps(value, y), weight ? weight + at : NULL);
                    if (want_sums && narrow && ((at + 16) & (width - 1)) == 0)
                        snipi_end_run512(&sums, scale[one], weight != NULL);
                    if (values) {
                        value = _mm512_castsi512_ps(snipi_signed512(&codec, _mm512_castps_si512(value), y));
                        value = _mm512_mul_ps(value, _mm512_set1_ps(scale[one]));
                        if (past)
                            _mm512_stream_ps(values + at, value);
                        else
                            _mm512_storeu_ps(values + at, value);
                    }
                    word[g] = snipi_to_byte512(word[g], g);
                }
                if (plain || codes) snipi_store_codes512(codes, snipi_codes512(&codec, word), first, form, &half);
            }
            if (want_sums && !narrow) snipi_end_run512(&sums, *scale, weight != NULL);
        }
    }
    if (_mm512_test_epi32_mask(over, over)) strip->tally->saturated += _mm512_reduce_add_epi32(over);
    if (want_sums) snipi_sums512_store(&sums, strip->tally);
}

#    define SNIPI_STRIP_AS(name, stochastic, want_sums, plain, narrow)                         \
        SNIPI_TARGET_AVX512 static void name(const snipi_run *run, const snipi_strip *strip) { \
            snipi_strip_avx512_as(run, strip, stochastic, want_sums, plain, narrow);           \
        }
SNIPI_STRIP_AS(snipi_strip_plain_avx512, 0, 0, 1, 0)
SNIPI_STRIP_AS(snipi_strip_plain_sums_avx512, 0, 1, 1, 0)
SNIPI_STRIP_AS(snipi_strip_wide_avx512, 0, run->want_sums, 0, 0)
SNIPI_STRIP_AS(snipi_strip_narrow_avx512, 0, run->want_sums, 0, 1)
SNIPI_STRIP_AS(snipi_strip_random_wide_avx512, 1, run->want_sums, 0, 0)
SNIPI_STRIP_AS(snipi_strip_random_narrow_avx512, 1, run->want_sums, 0, 1)

static void snipi_strip_avx512(const snipi_run *run, const snipi_strip *strip) {
    const int narrow = strip->width < 64;
    const int plain = strip->codes && !strip->values && !strip->weight && !strip->capped && !narrow;
    if (run->stochastic && narrow)
        snipi_strip_random_narrow_avx512(run, strip);
    else if (run->stochastic)
        snipi_strip_random_wide_avx512(run, strip);
    else if (narrow)
        snipi_strip_narrow_avx512(run, strip);
    else if (!plain)
        snipi_strip_wide_avx512(run, strip);
    else if (run->want_sums)
        snipi_strip_plain_sums_avx512(run, strip);
    else
        snipi_strip_plain_avx512(run, strip);
}

// Random words of `rows` rows of `cols` elements (a multiple of 64), whose first counters are `step` apart and whose
// upper halves are the same.
SNIPI_TARGET_AVX512 static void snipi_tile_words_avx512(snip_rng_key key, uint64_t first, uint64_t step, int rows,
                                                        int cols, uint32_t *out) {
    const snipi_rounds rounds = snipi_rounds_of(key, (uint32_t)(first >> 32));
    for (int r = 0; r < rows; r++, out += cols) {
        const uint32_t counter = (uint32_t)(first + (uint64_t)r * step);
        int c = 0;
        for (; c + 128 <= cols; c += 128) snipi_random_words_avx512(&rounds, counter + (uint32_t)(c / 4), 32, out + c);
        if (c < cols) snipi_random_words_avx512(&rounds, counter + (uint32_t)(c / 4), 16, out + c);
    }
}

// Sixteen reductions at once: halves of two vectors side by side, their maximum, and so on.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_reduce512(__m512i most[16]) {
    SNIPI_UNROLL
    for (int i = 0; i < 8; i++)
        most[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(most[2 * i], most[2 * i + 1]),
                                   _mm512_unpackhi_epi32(most[2 * i], most[2 * i + 1]));
    SNIPI_UNROLL
    for (int i = 0; i < 4; i++)
        most[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(most[2 * i], most[2 * i + 1]),
                                   _mm512_unpackhi_epi64(most[2 * i], most[2 * i + 1]));
    SNIPI_UNROLL
    for (int i = 0; i < 2; i++)
        most[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(most[2 * i], most[2 * i + 1], 0x88),
                                   _mm512_shuffle_i32x4(most[2 * i], most[2 * i + 1], 0xDD));
    return _mm512_max_epu32(_mm512_shuffle_i32x4(most[0], most[1], 0x88), _mm512_shuffle_i32x4(most[0], most[1], 0xDD));
}

// Maxima of |x| as bits, by lane, of `vectors` vectors: 1, 2, 4 or 8.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_peak512(const float *x, int vectors) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most = _mm512_and_si512(magnitude, _mm512_loadu_si512(x)), other = most;
    if (vectors == 8) {
        SNIPI_UNROLL
        for (int v = 1; v < 8; v += 2) {
            other = _mm512_max_epu32(other, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + 16 * v)));
            if (v == 7) continue;
            most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + 16 * v + 16)));
        }
        return _mm512_max_epu32(most, other);
    }
    for (int v = 1; v < vectors; v++)
        most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + 16 * v)));
    return most;
}

SNIPI_TARGET_AVX512 static uint32_t snipi_peaks_avx512(const snipi_strip *strip, uint32_t *amax) {
    const int whole = strip->width / 16, fetch = strip->fetched;
    const int tiles = strip->pieces * strip->runs;
    const float *x = strip->x;
    __m512i largest = _mm512_setzero_si512();
    int64_t along = 0;
    for (int first = 0; first < tiles; first += 16) {
        __m512i most[16];
        for (int i = 0; i < 16; i++) {
            const int vectors = strip->length - along < strip->width ? 4 : whole;
            most[i] = _mm512_setzero_si512();
            if (first + i >= tiles) continue;
            const char *ahead = strip->ahead + along * strip->ahead_size / 4;  // a line of four
            if (fetch && along % 64 == 0) _mm_prefetch(ahead, _MM_HINT_T0);
            if (fetch && vectors == 8) _mm_prefetch(ahead + 16 * strip->ahead_size, _MM_HINT_T0);
            most[i] = snipi_peak512(x + along, vectors);
            along += 16 * vectors;
            if (along == strip->length) {
                x += strip->stride;
                along = 0;
            }
        }
        most[0] = snipi_reduce512(most);
        largest = _mm512_max_epu32(largest, most[0]);
        _mm512_storeu_si512(amax + first, most[0]);
    }
    return (uint32_t)_mm512_reduce_max_epu32(largest);
}

// Scales of 16 tiles, as snipi_scale_of has them. 0: some may not be ordinary.
typedef struct {
    __m512 scale, inverse;
    __m512i byte;
} snipi_scales512;

// a / b, rounded from the quotient in double.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_quotient512(__m512 a, __m512 b) {
    __m512d low = SNIPI_LOW(b), high = SNIPI_HIGH(b);
    SNIPI_KEPT512(low);
    SNIPI_KEPT512(high);
    low = _mm512_div_pd(SNIPI_LOW(a), low);
    high = _mm512_div_pd(SNIPI_HIGH(a), high);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_maskz_cvtpd_ps(0xFF, low)),
                              _mm512_maskz_cvtpd_ps(0xFF, high), 1);
}

// The least power of two with amax <= max * scale; UE8M0 rounds it down.
SNIPI_TARGET_AVX512 SNIPI_INLINE snipi_scales512 snipi_scale_pow2_512(snip_scale kind, snipi_element e, __m512i amax) {
    const __m512i fraction = _mm512_set1_epi32(0x007FFFFF), bias = _mm512_set1_epi32(127);
    const __m512i max_bits = _mm512_set1_epi32((int)snipi_bits(e.max));
    const __mmask16 up = _mm512_cmpgt_epi32_mask(_mm512_and_si512(amax, fraction),
                                                 _mm512_and_si512(max_bits, fraction));
    __m512i k = _mm512_sub_epi32(_mm512_srli_epi32(amax, 23), _mm512_set1_epi32(127 + e.emax));
    snipi_scales512 s;
    if (kind != SNIP_SCALE_UE8M0) k = _mm512_mask_add_epi32(k, up, k, _mm512_set1_epi32(1));
    s.byte = _mm512_add_epi32(bias, k);
    s.scale = _mm512_castsi512_ps(_mm512_slli_epi32(s.byte, 23));
    s.inverse = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(bias, k), 23));
    return s;
}

// E4M3 of amax * (S / 6), by adding a power of two as runs do. *ordinary: no scale can be 0, or far from 1.
SNIPI_TARGET_AVX512 SNIPI_INLINE snipi_scales512 snipi_scale_ue4m3_512(__m512i amax, float tensor_scale,
                                                                       float tensor_inverse, __mmask16 live,
                                                                       int *ordinary) {
    const float sixth = tensor_inverse * snipi_float(0x3E2AAAABu);
    const __m512i largest = _mm512_set1_epi32((int)snipi_bits(448.0f)), least = _mm512_set1_epi32((127 - 6) << 23);
    __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(amax), _mm512_set1_ps(sixth)), power, sum;
    __m512i exponent;
    snipi_scales512 s;
    SNIPI_KEPT512(y);
    *ordinary = !_mm512_mask_cmplt_epu32_mask(live, _mm512_castps_si512(y), _mm512_set1_epi32((127 - 10) << 23));
    y = _mm512_castsi512_ps(_mm512_min_epi32(_mm512_castps_si512(y), largest));
    exponent = _mm512_andnot_si512(_mm512_set1_epi32(0x007FFFFF), _mm512_castps_si512(y));
    exponent = _mm512_max_epi32(exponent, least);
    power = _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(20 << 23)));
    sum = _mm512_add_ps(y, power);
    SNIPI_KEPT512(sum);
    y = _mm512_sub_ps(sum, power);
    SNIPI_KEPT512(y);
    exponent = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_sub_epi32(exponent, least), 23), 3);
    s.byte = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(sum), exponent), _mm512_set1_epi32(0x7F));
    s.scale = _mm512_mul_ps(y, _mm512_set1_ps(tensor_scale));
    s.inverse = snipi_quotient512(_mm512_set1_ps(1.0f), s.scale);
    *ordinary &= !_mm512_mask_cmpgt_epu32_mask(
        live, _mm512_sub_epi32(_mm512_castps_si512(s.scale), _mm512_set1_epi32((127 - 100) << 23)),
        _mm512_set1_epi32(200 << 23));
    return s;
}

SNIPI_TARGET_AVX512 static int snipi_scales_avx512(snip_scale kind, const snipi_run *run, float tensor_scale,
                                                   float tensor_inverse, const uint32_t *amax, int tiles, float *scale,
                                                   float *inverse, uint8_t *bytes, int *capped) {
    const __m512i least = _mm512_set1_epi32(SNIPI_UNSCALED_LEAST),
                  max_bits = _mm512_set1_epi32((int)snipi_bits(run->e.max));
    const __m512i range = _mm512_set1_epi32((int)SNIPI_UNSCALED_MOST - (int)SNIPI_UNSCALED_LEAST);
    const __m512i last = _mm512_set1_epi32((int)snipi_last_in_range(run));
    __mmask16 beyond = 0;
    for (int i = 0; i < tiles; i += 16) {
        const __mmask16 live = (__mmask16)(tiles - i >= 16 ? 0xFFFF : (1 << (tiles - i)) - 1);
        __m512i a = _mm512_loadu_si512(amax + i);
        snipi_scales512 s;
        int ordinary = !_mm512_mask_cmpgt_epu32_mask(live, _mm512_sub_epi32(a, least), range);
        a = _mm512_mask_mov_epi32(least, live, a);
        if (kind == SNIP_SCALE_F32) {
            s.scale = snipi_quotient512(_mm512_castsi512_ps(a), _mm512_castsi512_ps(max_bits));
            s.inverse = snipi_quotient512(_mm512_castsi512_ps(max_bits), _mm512_castsi512_ps(a));
            s.byte = _mm512_setzero_si512();
        } else if (kind == SNIP_SCALE_UE4M3) {
            int scales_ordinary;
            s = snipi_scale_ue4m3_512(a, tensor_scale, tensor_inverse, live, &scales_ordinary);
            ordinary &= scales_ordinary;
        } else
            s = snipi_scale_pow2_512(kind, run->e, a);
        if (!ordinary) return 0;
        const __m512i y = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(a), s.inverse));
        beyond |= _mm512_mask_cmpgt_epi32_mask(live, y, last);
        _mm512_storeu_ps(scale + i, s.scale);
        _mm512_storeu_ps(inverse + i, s.inverse);
        _mm512_mask_cvtepi32_storeu_epi8(bytes + i, live, s.byte);
    }
    *capped = beyond != 0;
    return 1;
}

// Eight elements from p and eight from p + below, as floats side by side.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512i snipi_two_rows512(const char *p, int64_t below, int bf16) {
    const __m256i *high = (const __m256i *)(const void *)(p + below);
    if (bf16) {
        const __m256i top = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
        const __m256i both = _mm256_inserti128_si256(top, _mm_loadu_si128((const __m128i *)(const void *)high), 1);
        return _mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xFFFF, both), 16);
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)p)),
                              _mm256_loadu_si256(high), 1);
}

// A panel: 16 columns of `rows` rows of x. Halves of rows 8 apart are loaded side by side, so that shuffles of two
// halves are left; halves of one row one after the other, as rows may share sets of the nearest cache.
SNIPI_TARGET_AVX512 static void snipi_turn_avx512(const void *x, int bf16, int64_t ld, int rows, float *panel) {
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                  odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    const int64_t size = bf16 ? 2 : 4;
    for (int r = 0; r < rows; r += 16) {
        const char *from = (const char *)x + r * ld * size;
        __m512i v[2][8], w[8];
        SNIPI_UNROLL
        for (int i = 0; i < 8; i++) {
            v[0][i] = snipi_two_rows512(from + i * ld * size, 8 * ld * size, bf16);
            v[1][i] = snipi_two_rows512(from + (i * ld + 8) * size, 8 * ld * size, bf16);
        }
        SNIPI_UNROLL
        for (int half = 0; half < 2; half++) {
            const __m512i *row = v[half];
            float *to = panel + 8 * half * SNIPI_PANEL_LD + r;
            SNIPI_UNROLL
            for (int i = 0; i < 8; i += 4) {  // 4 x 4 elements of rows i .. i + 3
                const __m512i low = _mm512_unpacklo_epi32(row[i], row[i + 1]);
                const __m512i high = _mm512_unpackhi_epi32(row[i], row[i + 1]);
                const __m512i low2 = _mm512_unpacklo_epi32(row[i + 2], row[i + 3]);
                const __m512i high2 = _mm512_unpackhi_epi32(row[i + 2], row[i + 3]);
                w[i] = _mm512_unpacklo_epi64(low, low2);
                w[i + 1] = _mm512_unpackhi_epi64(low, low2);
                w[i + 2] = _mm512_unpacklo_epi64(high, high2);
                w[i + 3] = _mm512_unpackhi_epi64(high, high2);
            }
            SNIPI_UNROLL
            for (int i = 0; i < 4; i++) {  // 128 bits of four rows each: those of w[i], then those of w[i + 4]
                _mm512_storeu_si512(to + i * SNIPI_PANEL_LD, _mm512_permutex2var_epi64(w[i], even, w[i + 4]));
                _mm512_storeu_si512(to + (i + 4) * SNIPI_PANEL_LD, _mm512_permutex2var_epi64(w[i], odd, w[i + 4]));
            }
        }
    }
}

// Largest magnitude of rows x cols elements, NaN and infinity included.
SNIPI_TARGET_AVX512 static uint32_t snipi_largest_avx512(const void *x, int bf16, int64_t ld, int64_t rows,
                                                         int64_t cols) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c += 16) {
            const __mmask16 there = (__mmask16)(cols - c >= 16 ? 0xFFFF : (1 << (cols - c)) - 1);
            const int64_t at = r * ld + c;
            __m512i u;
            if (bf16)
                u = _mm512_slli_epi32(
                    _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(there, (const uint16_t *)x + at)), 16);
            else
                u = _mm512_maskz_loadu_epi32(there, (const float *)x + at);
            most = _mm512_max_epu32(most, _mm512_and_si512(u, _mm512_set1_epi32(0x7FFFFFFF)));
        }
    return (uint32_t)_mm512_reduce_max_epu32(most);
}

// Signs are masks here: under clang 1.4 times as fast as AVX2's.
SNIPI_TARGET_AVX512 static void snipi_flip_avx512(const uint32_t signs[4], float x[SNIPI_SIGNS]) {
    const __m512i top = _mm512_set1_epi32((int)0x80000000u);
    for (int j = 0; j < SNIPI_SIGNS; j += 16) {
        const __m512i v = _mm512_loadu_si512(x + j);
        _mm512_storeu_si512(x + j, _mm512_mask_xor_epi32(v, (__mmask16)(signs[j / 32] >> j % 32), v, top));
    }
}

// Through float16, whose exponents reach beyond those of all formats of 8 bits; E2M1 by a table.
SNIPI_TARGET_AVX512 static void snipi_decode_avx512(snip_format format, const float *lut, const uint8_t *codes, int n,
                                                    float scale, float *out, int stream) {
    const snipi_element e = snipi_element_of(format);
    const int packed = format == SNIP_E2M1, past = stream && ((uintptr_t)out & 63) == 0;
    int i = 0, g;
    if (snipi_bits(scale) < (127u - 100u) << 23 || snipi_bits(scale) > (127u + 100u) << 23) {
        snipi_decode_avx2(format, lut, codes, n, scale, out, stream);
        return;
    }
    if (packed) {
        const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(lut), _mm512_set1_ps(scale));
        const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        for (; i + 16 <= n; i += 16) {
            int32_t half[2];
            __m512i c;
            __m512 v;
            memcpy(half, codes + i / 2, 8);
            c = _mm512_srlv_epi32(_mm512_mask_set1_epi32(_mm512_set1_epi32(half[0]), 0xFF00, half[1]), places);
            v = _mm512_permutexvar_ps(c, table);
            if (past)
                _mm512_stream_ps(out + i, v);
            else
                _mm512_storeu_ps(out + i, v);
        }
    } else {
        const __m512i magnitude = _mm512_set1_epi16((short)((1 << e.sign) - 1)),
                      largest = _mm512_set1_epi16((short)e.largest), sign = _mm512_set1_epi16((short)-32768);
        const __m512i shift = _mm512_set1_epi16((short)(10 - e.mantissa)),
                      sign_shift = _mm512_set1_epi16((short)(15 - e.sign));
        const __m512 s = _mm512_set1_ps(scale * snipi_float((uint32_t)(127 + 15 - e.bias) << 23));
        for (; i + 32 <= n; i += 32) {
            __m512i c = _mm512_maskz_cvtepu8_epi16(0xFFFFFFFF,
                                                   _mm256_loadu_si256((const __m256i *)(const void *)(codes + i))),
                    m = _mm512_and_si512(c, magnitude);
            if (_mm512_cmpgt_epi16_mask(m, largest)) {  // NaN or infinity among them
                snipi_decode_scalar(format, lut, codes + i, 32, scale, out + i, 0);
                continue;
            }
            m = _mm512_ternarylogic_epi32(sign, _mm512_sllv_epi16(c, sign_shift), _mm512_sllv_epi16(m, shift), 0xCA);
            SNIPI_UNROLL
            for (g = 0; g < 2; g++) {
                const __m256i half = g ? _mm512_maskz_extracti64x4_epi64(0xFF, m, 1) : _mm512_castsi512_si256(m);
                const __m512 v = _mm512_mul_ps(s, _mm512_maskz_cvtph_ps(0xFFFF, half));
                if (past)
                    _mm512_stream_ps(out + i + 16 * g, v);
                else
                    _mm512_storeu_ps(out + i + 16 * g, v);
            }
        }
    }
    if (i < n) snipi_decode_avx2(format, lut, codes + (packed ? i / 2 : i), n - i, scale, out + i, 0);
}

#endif  // SNIPI_X86
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic pop
#endif
#ifdef SNIPI_NEON
// Vectors of 4 floats, 16 elements a turn, so that element i stays in lane i % 16. Right shifts by a variable are left
// shifts by its negative. Tiles divide SNIPI_MAX_MR and SNIPI_MAX_NR. Intrinsics are plain arithmetic to the compiler:
// SNIPI_KEPT also holds sums in their order under -Ofast.
#    ifdef __clang__
#        define SNIPI_TARGET_DOT __attribute__((target("dotprod")))
#    else
#        define SNIPI_TARGET_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#    endif

// ---- GEMM kernels
// Rows of panels: with two sums a row, what 32 registers hold beside the operands; and where byte products are added as
// pairs in 16 bits, in four more registers a row.
enum { SNIPI_NEON_A = 12, SNIPI_NEON_B = 8, SNIPI_NEON_PAIRS_A = 4 };

#    define SNIPI_NEON_ROW(r)                                      \
        sum[i + r][0] = vfmaq_laneq_f32(sum[i + r][0], b0, ai, r); \
        sum[i + r][1] = vfmaq_laneq_f32(sum[i + r][1], b1, ai, r);

static void snipi_kernel_f32_neon(int64_t k, const float *a, const float *b, const float *from, float *c, int64_t ldc) {
    float32x4_t sum[SNIPI_NEON_A][2];
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_NEON_A; i++) sum[i][0] = sum[i][1] = vdupq_n_f32(0.0f);
    for (; k > 0; k--, a += SNIPI_NEON_A, b += SNIPI_NEON_B) {
        const float32x4_t b0 = vld1q_f32(b), b1 = vld1q_f32(b + 4);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_NEON_A; i += 4) {  // from a vector of A's: of scalars GCC makes too many registers
            const float32x4_t ai = vld1q_f32(a + i);
            SNIPI_NEON_ROW(0) SNIPI_NEON_ROW(1) SNIPI_NEON_ROW(2) SNIPI_NEON_ROW(3)
        }
    }
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_NEON_A; i++, c += ldc) {
        const float *old = from ? from : c;
        vst1q_f32(c, vaddq_f32(vld1q_f32(old), sum[i][0]));
        vst1q_f32(c + 4, vaddq_f32(vld1q_f32(old + 4), sum[i][1]));
    }
}

// A row of a tile: c[j] = fmaf(sa * sb[j], sum[j], from ? from[j] : c[j])
SNIPI_INLINE void snipi_scale_neon(float sa, const float *sb, int32x4_t sum0, int32x4_t sum1, const float *from,
                                   float *c) {
    const float *old = from ? from : c;
    vst1q_f32(c, vfmaq_f32(vld1q_f32(old), vmulq_n_f32(vld1q_f32(sb), sa), vcvtq_f32_s32(sum0)));
    vst1q_f32(c + 4, vfmaq_f32(vld1q_f32(old + 4), vmulq_n_f32(vld1q_f32(sb + 4), sa), vcvtq_f32_s32(sum1)));
}

enum { SNIPI_NEON_STEPS = 113 };  // of byte products in 16 bits: 113 * 24 * 12 < 2^15

// sum[i][j] += a[4i + t] * b[4j + t] over at most SNIPI_NEON_STEPS steps
SNIPI_INLINE void snipi_sum_pairs_neon(int64_t steps, const uint8_t *a, const int8_t *b,
                                       int32x4_t sum[SNIPI_NEON_PAIRS_A][2]) {
    int16x8_t part[SNIPI_NEON_PAIRS_A][4];
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_NEON_PAIRS_A; i++) part[i][0] = part[i][1] = part[i][2] = part[i][3] = vdupq_n_s16(0);
    for (; steps > 0; steps--, a += 4 * SNIPI_NEON_PAIRS_A, b += 4 * SNIPI_NEON_B) {
        const int8x16_t b0 = vld1q_s8(b), b1 = vld1q_s8(b + 16);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_NEON_PAIRS_A; i++) {  // part[i][j / 2][4 (j % 2) + t] += a[4i + t] * b[4j + t]
            int32_t four;
            memcpy(&four, a + 4 * i, 4);
            const int8x16_t ai = vreinterpretq_s8_s32(vdupq_n_s32(four));
            part[i][0] = vmlal_s8(part[i][0], vget_low_s8(ai), vget_low_s8(b0));
            part[i][1] = vmlal_high_s8(part[i][1], ai, b0);
            part[i][2] = vmlal_s8(part[i][2], vget_low_s8(ai), vget_low_s8(b1));
            part[i][3] = vmlal_high_s8(part[i][3], ai, b1);
        }
    }
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_NEON_PAIRS_A; i++) {
        sum[i][0] = vaddq_s32(sum[i][0], vpaddq_s32(vpaddlq_s16(part[i][0]), vpaddlq_s16(part[i][1])));
        sum[i][1] = vaddq_s32(sum[i][1], vpaddq_s32(vpaddlq_s16(part[i][2]), vpaddlq_s16(part[i][3])));
    }
}

static void snipi_kernel_s8_neon(int64_t k, int64_t block, const uint8_t *a, const int8_t *b, const float *sa,
                                 const float *sb, const int32_t *start, const float *from, float *c, int64_t ldc) {
    for (; k > 0; k -= block, from = NULL) {
        int64_t steps = (snipi_min(block, k) + 3) / 4;
        int32x4_t sum[SNIPI_NEON_PAIRS_A][2];
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_NEON_PAIRS_A; i++) {
            sum[i][0] = vld1q_s32(start);
            sum[i][1] = vld1q_s32(start + 4);
        }
        while (steps > 0) {
            const int64_t some = snipi_min(steps, SNIPI_NEON_STEPS);
            snipi_sum_pairs_neon(some, a, b, sum);
            a += 4 * SNIPI_NEON_PAIRS_A * some;
            b += 4 * SNIPI_NEON_B * some;
            steps -= some;
        }
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_NEON_PAIRS_A; i++)
            snipi_scale_neon(sa[i], sb, sum[i][0], sum[i][1], from, c + i * ldc);
        sa += SNIPI_NEON_PAIRS_A;
        sb += SNIPI_NEON_B;
        start += SNIPI_NEON_B;
    }
}

// The instruction by name, because clang before 16 has the intrinsic under -march alone, and no other intrinsic,
// because GCC inlines none from an -march this target does not contain.
typedef int8_t snipi_vec16 __attribute__((vector_size(16), aligned(1), may_alias));
#    define SNIPI_DOT(v, y, lane)                                                          \
        {                                                                                  \
            snipi_vec16 dot = v;                                                           \
            __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(dot) : "w"(y), "w"(ai)); \
            v = dot;                                                                       \
        }
#    define SNIPI_DOT_ROW(r) SNIPI_DOT(acc[i + r][0], b0, r) SNIPI_DOT(acc[i + r][1], b1, r)

// sum[i][j] = start[j] + a[4i + t] * b[4j + t] over `steps` steps
SNIPI_TARGET_DOT static void snipi_dot_neon(int64_t steps, const uint8_t *a, const int8_t *b, const int32_t *start,
                                            int32_t *sum) {
    snipi_vec16 acc[SNIPI_NEON_A][2], b0 = *(const snipi_vec16 *)(const void *)start,
                                      b1 = *(const snipi_vec16 *)(const void *)(start + 4);
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_NEON_A; i++) {
        acc[i][0] = b0;
        acc[i][1] = b1;
    }
    for (; steps > 0; steps--, a += 4 * SNIPI_NEON_A, b += 4 * SNIPI_NEON_B) {
        b0 = *(const snipi_vec16 *)(const void *)b;
        b1 = *(const snipi_vec16 *)(const void *)(b + 16);
        SNIPI_UNROLL
        for (int i = 0; i < SNIPI_NEON_A; i += 4) {
            const snipi_vec16 ai = *(const snipi_vec16 *)(const void *)(a + 4 * i);
            SNIPI_DOT_ROW(0) SNIPI_DOT_ROW(1) SNIPI_DOT_ROW(2) SNIPI_DOT_ROW(3)
        }
    }
    SNIPI_UNROLL
    for (int i = 0; i < SNIPI_NEON_A; i++) {
        *(snipi_vec16 *)(void *)(sum + SNIPI_NEON_B * i) = acc[i][0];
        *(snipi_vec16 *)(void *)(sum + SNIPI_NEON_B * i + 4) = acc[i][1];
    }
}

static void snipi_kernel_s8_neon_dot(int64_t k, int64_t block, const uint8_t *a, const int8_t *b, const float *sa,
                                     const float *sb, const int32_t *start, const float *from, float *c, int64_t ldc) {
    for (; k > 0; k -= block, from = NULL) {
        const int64_t steps = (snipi_min(block, k) + 3) / 4;
        int32_t sum[SNIPI_NEON_A * SNIPI_NEON_B];
        snipi_dot_neon(steps, a, b, start, sum);
        for (int i = 0; i < SNIPI_NEON_A; i++) {
            const int32_t *row = sum + SNIPI_NEON_B * i;
            snipi_scale_neon(sa[i], sb, vld1q_s32(row), vld1q_s32(row + 4), from, c + i * ldc);
        }
        a += 4 * SNIPI_NEON_A * steps;
        b += 4 * SNIPI_NEON_B * steps;
        sa += SNIPI_NEON_A;
        sb += SNIPI_NEON_B;
        start += SNIPI_NEON_B;
    }
}

// ---- packing for GEMMs
static void snipi_spread_neon(const uint8_t *codes, size_t row_bytes, int rows, int64_t steps, int offset, uint8_t *out,
                              int panel_rows) {
    const uint8x16_t table = vaddq_u8(vreinterpretq_u8_s8(vld1q_s8(snipi_twice)), vdupq_n_u8((uint8_t)offset));
    for (int i = 0; i < rows; i++, codes += row_bytes, out += 4) {
        int64_t t = 0;
        for (; t + 4 <= steps; t += 4) {
            const uint8x8_t bytes = vld1_u8(codes + 2 * t), low = vand_u8(bytes, vdup_n_u8(15));
            const uint8x8_t high = vshr_n_u8(bytes, 4);
            uint8_t four[16];
            vst1q_u8(four, vqtbl1q_u8(table, vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high))));
            for (int j = 0; j < 4; j++) memcpy(out + 4 * (t + j) * panel_rows, four + 4 * j, 4);
        }
        snipi_spread_scalar(codes + 2 * t, row_bytes, 1, steps - t, offset, out + 4 * t * panel_rows, panel_rows);
    }
}

static void snipi_start_neon(const int8_t *b, int64_t steps, int panel_rows, int32_t *start) {
    for (int i = 0; i < panel_rows; i += 4) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int64_t t = 0; t < steps; t++) sum = vpadalq_s16(sum, vpaddlq_s8(vld1q_s8(b + 4 * (t * panel_rows + i))));
        vst1q_s32(start + i, vmulq_n_s32(sum, -12));
    }
}

static void snipi_round_floats_neon(float *x, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {  // as snipi_bf16_round
        const uint32x4_t v = vreinterpretq_u32_f32(vld1q_f32(x + i));
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(v, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(v, vdupq_n_u32(0x7FFF)), odd);
        const uint32x4_t nan = vcgtq_u32(vandq_u32(v, vdupq_n_u32(0x7FFFFFFF)), vdupq_n_u32(0x7F800000));
        const uint32x4_t kept = vbslq_u32(nan, vorrq_u32(v, vdupq_n_u32(0x400000)), rounded);
        vst1q_f32(x + i, vreinterpretq_f32_u32(vandq_u32(kept, vdupq_n_u32(0xFFFF0000u))));
    }
    snipi_round_floats_scalar(x + i, n - i);
}

#endif  // SNIPI_NEON

#ifdef SNIPI_X86_LATE
enum { SNIPI_HAS_AVX_VNNI = 1, SNIPI_HAS_BF16 = 2, SNIPI_HAS_AMX = 4, SNIPI_HAS_ASKED = 8 };
#    ifdef SNIPI_EMULATED
static int snipi_x86_late(void) { return SNIPI_HAS_AVX_VNNI | SNIPI_HAS_BF16 | SNIPI_HAS_AMX; }
#    else
static void snipi_cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4]) {
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "0"(leaf), "2"(sub));
}

// AMX's tiles must be in the state that the system saves (XCR0 bits 17 and 18), of the usual size, and permitted to
// this process: system call arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), which an older kernel or a small
// signal stack refuses.
static int snipi_amx_usable(void) {
#        ifdef __linux__
    uint32_t r[4], saved;
    long result;
    snipi_cpuid(0x1D, 1, r);
    __asm__ volatile("xgetbv" : "=a"(saved) : "c"(0) : "rdx");
    if (r[0] != (1024u << 16 | 8192u) || r[1] != (8u << 16 | 64u) || (saved >> 17 & 3) != 3) return 0;
    __asm__ volatile("syscall" : "=a"(result) : "0"(158L), "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return result == 0;
#        else
    return 0;
#        endif
}

static int snipi_x86_late(void) {
    static int answer;  // the machine's, so the same for all who ask
    int has = __atomic_load_n(&answer, __ATOMIC_RELAXED);
    uint32_t r[4], d;
    if (has) return has;
    has = SNIPI_HAS_ASKED;
    if (__builtin_cpu_supports("avx2")) {
        snipi_cpuid(7, 0, r);
        d = r[3];
        if (r[0] >= 1) {
            snipi_cpuid(7, 1, r);
            has |= (r[0] >> 4 & 1 ? SNIPI_HAS_AVX_VNNI : 0) | (r[0] >> 5 & 1 ? SNIPI_HAS_BF16 : 0);
        }
        if ((d >> 22 & 1) && (d >> 24 & 3) == 3 && snipi_amx_usable()) has |= SNIPI_HAS_AMX;  // BF16, tiles and INT8
    }
    __atomic_store_n(&answer, has, __ATOMIC_RELAXED);
    return has;
}
#    endif
#endif  // SNIPI_X86_LATE

SNIP_API int snip_isa_available(snip_isa isa) {
#ifdef SNIPI_X86
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (isa == SNIP_ISA_SSE2) return 1;
    if (isa == SNIP_ISA_AVX2) return avx2;
    if (isa == SNIP_ISA_AVX512) return avx512;
    if (isa == SNIP_ISA_AVX512_VNNI) return vnni;
#endif
#ifdef SNIPI_X86_LATE
    if (isa == SNIP_ISA_AVX_VNNI) return avx2 && snipi_x86_late() & SNIPI_HAS_AVX_VNNI;
    if (isa == SNIP_ISA_AVX512_BF16) return vnni && snipi_x86_late() & SNIPI_HAS_BF16;
    if (isa == SNIP_ISA_AMX) return avx512 && snipi_x86_late() & SNIPI_HAS_AMX;
#endif
#ifdef SNIPI_NEON
    if (isa == SNIP_ISA_NEON) return 1;
#    if defined(__ARM_FEATURE_DOTPROD)
    if (isa == SNIP_ISA_NEON_DOT) return 1;
#    elif defined(__linux__)
    if (isa == SNIP_ISA_NEON_DOT) return (int)(getauxval(AT_HWCAP) >> 20 & 1);  // HWCAP_ASIMDDP
#    endif
#endif
    return isa == SNIP_ISA_BEST || isa == SNIP_ISA_SCALAR;
}

SNIP_API const char *snip_isa_name(snip_isa isa) {
    switch (isa) {
        case SNIP_ISA_BEST: return "best";
        case SNIP_ISA_SCALAR: return "scalar";
        case SNIP_ISA_SSE2: return "sse2";
        case SNIP_ISA_AVX2: return "avx2";
        case SNIP_ISA_AVX_VNNI: return "avx-vnni";
        case SNIP_ISA_AVX512: return "avx512";
        case SNIP_ISA_AVX512_VNNI: return "avx512-vnni";
        case SNIP_ISA_AVX512_BF16: return "avx512-bf16";
        case SNIP_ISA_AMX: return "amx";
        case SNIP_ISA_NEON: return "neon";
        case SNIP_ISA_NEON_DOT: return "neon-dot";
        case SNIP_ISA_COUNT: break;
    }
    return "?";
}

static snip_isa snipi_best_isa(void) {
    int isa;
    for (isa = SNIP_ISA_COUNT - 1; isa > SNIP_ISA_SCALAR; isa--)
        if (snip_isa_available((snip_isa)isa)) break;
    return (snip_isa)isa;
}

// clang-format off
static const snipi_vector *snipi_vector_of(snip_isa isa) {
    static const snipi_vector scalar = {
        snipi_amax_scalar,
        snipi_philox_scalar,
        snipi_run_scalar,
        snipi_transpose_scalar,
        snipi_widen_scalar,
        snipi_narrow_scalar,
        snipi_decode_scalar,
        snipi_sums_exact,
        SNIPI_NO_STRIPS
    };
#ifdef SNIPI_X86
    static const snipi_vector avx512 = {
        snipi_amax_avx512,
        snipi_philox_avx512,
        snipi_run_avx512,
        snipi_transpose_avx2,
        snipi_widen_avx2,
        snipi_narrow_avx2,
        snipi_decode_avx512,
        snipi_sums_avx2,
        snipi_peaks_avx512,
        snipi_scales_avx512,
        snipi_strip_avx512,
        snipi_tile_words_avx512,
        snipi_turn_avx512,
        snipi_largest_avx512
    };
    // clang-format on
    if (isa == SNIP_ISA_BEST) isa = snipi_best_isa();
    if (isa >= SNIP_ISA_AVX512) return &avx512;
    if (isa >= SNIP_ISA_AVX2) return &snipi_vector_avx2;
    if (isa == SNIP_ISA_SSE2) return &snipi_vector_sse2;
#elif defined(SNIPI_NEON)
    if (isa != SNIP_ISA_SCALAR) return &snipi_vector_neon;
#else
    (void)isa;
#endif
    return &scalar;
}

static snipi_adam snipi_adam_of(snip_isa isa) {
#ifdef SNIPI_X86
    if (isa == SNIP_ISA_BEST) isa = snipi_best_isa();
    if (isa >= SNIP_ISA_AVX2) return snipi_adam_avx2;
    if (isa == SNIP_ISA_SSE2) return snipi_adam_sse2;
#elif defined(SNIPI_NEON)
    if (isa != SNIP_ISA_SCALAR) return snipi_adam_neon;
#else
    (void)isa;
#endif
    return snipi_adam_scalar;
}

static snipi_flip snipi_flip_of(snip_isa isa) {
#ifdef SNIPI_X86
    if (isa == SNIP_ISA_BEST) isa = snipi_best_isa();
    if (isa >= SNIP_ISA_AVX512) return snipi_flip_avx512;
    if (isa >= SNIP_ISA_AVX2) return snipi_flip_avx2;
    if (isa == SNIP_ISA_SSE2) return snipi_flip_sse2;
#elif defined(SNIPI_NEON)
    if (isa != SNIP_ISA_SCALAR) return snipi_flip_neon;
#else
    (void)isa;
#endif
    return snipi_flip_scalar;
}

static void snipi_group_signs(snip_rng_key key, uint64_t first, uint32_t words[4 * SNIPI_GROUP]) {
    snipi_vector_of(SNIP_ISA_BEST)->philox(key, first, SNIPI_GROUP, words);
}

static snipi_kernels snipi_kernels_of(snip_isa isa) {
    const snipi_panel_rows scalar_rows = { SNIPI_SCALAR_A, SNIPI_SCALAR_B };
    snipi_kernels kernels;
    memset(&kernels, 0, sizeof kernels);
    kernels.f32_rows = scalar_rows;
    kernels.f32 = snipi_kernel_f32_scalar;
    kernels.s8_rows = scalar_rows;
    kernels.s8 = snipi_kernel_s8_scalar;
    kernels.spread = snipi_spread_scalar;
    kernels.start = snipi_start_scalar;
    kernels.round_floats = snipi_round_floats_scalar;
#ifdef SNIPI_X86
    if (isa == SNIP_ISA_AVX2 || isa == SNIP_ISA_AVX_VNNI) {
        const snipi_panel_rows rows = { SNIPI_AVX2_A, SNIPI_AVX2_B };
        kernels.f32_rows = rows;
        kernels.f32 = snipi_kernel_f32_avx2;
        kernels.s8_rows = rows;
        kernels.s8 = snipi_kernel_s8_avx2;
        kernels.spread = snipi_spread_avx2;
        kernels.start = snipi_start_avx2;
        kernels.round_floats = snipi_round_floats_avx2;
    }
    if (isa >= SNIP_ISA_AVX512) {
        const snipi_panel_rows rows = { SNIPI_AVX512_A, SNIPI_AVX512_B };
        kernels.f32_rows = rows;
        kernels.f32 = snipi_kernel_f32_avx512;
        kernels.s8_rows = rows;
        kernels.s8 = isa == SNIP_ISA_AVX512 ? snipi_kernel_s8_avx512 : snipi_kernel_s8_vnni;
        kernels.spread = snipi_spread_avx512;
        kernels.start = snipi_start_avx2;
        kernels.round_floats = snipi_round_floats_avx2;
    }
#    ifdef SNIPI_X86_LATE
    if (isa == SNIP_ISA_AVX_VNNI) kernels.s8 = snipi_kernel_s8_avx_vnni;
    if (isa >= SNIP_ISA_AVX512_BF16) {
        kernels.bf16_rows = kernels.f32_rows;
        kernels.bf16 = snipi_kernel_bf16_avx512;
        kernels.round = snipi_round_avx512;
        kernels.look_up = snipi_look_up_avx512;
        kernels.pair = snipi_pair_avx512;
    }
    if (isa == SNIP_ISA_AMX) {
        const snipi_panel_rows rows = { SNIPI_AMX_A, SNIPI_AMX_B };
        kernels.s8_rows = rows;
        kernels.s8 = snipi_kernel_s8_amx;
        kernels.bf16_rows = rows;
        kernels.bf16 = snipi_kernel_bf16_amx;
        kernels.spread_rows = snipi_spread_rows_avx2;
        kernels.begin = snipi_tiles_begin;
        kernels.end = snipi_tiles_end;
    }
#    endif
#elif defined(SNIPI_NEON)
    if (isa == SNIP_ISA_NEON || isa == SNIP_ISA_NEON_DOT) {
        const snipi_panel_rows rows = { SNIPI_NEON_A, SNIPI_NEON_B };
        kernels.f32_rows = rows;
        kernels.f32 = snipi_kernel_f32_neon;
        kernels.s8_rows = rows;
        kernels.s8 = snipi_kernel_s8_neon_dot;
        kernels.spread = snipi_spread_neon;
        kernels.start = snipi_start_neon;
        kernels.round_floats = snipi_round_floats_neon;
    }
    if (isa == SNIP_ISA_NEON) {
        kernels.s8_rows.a = SNIPI_NEON_PAIRS_A;
        kernels.s8 = snipi_kernel_s8_neon;
    }
#else
    (void)isa;
#endif
    return kernels;
}

#endif  // SNIP_IMPLEMENTATION

// >>vector -----------------------------------------------------------------------------------------
// Vector code of any width, which >>simd includes once for each instruction set. The scalar functions of the same names
// say what it does, bit for bit. In memory, vectors need not be aligned: they are read and written as types "_at".
#ifdef SNIPI_WIDTH
#define snipi_floats SNIPI_V(floats)
#define snipi_ints SNIPI_V(ints)
#define snipi_words SNIPI_V(words)
#define snipi_doubles SNIPI_V(doubles)
#define snipi_floats_at SNIPI_V(floats_at)
#define snipi_ints_at SNIPI_V(ints_at)
#define snipi_words_at SNIPI_V(words_at)
#define snipi_doubles_at SNIPI_V(doubles_at)
#define snipi_codec SNIPI_V(codec)
#define snipi_partial SNIPI_V(partial)
#define SNIPI_VECTOR_BYTES (4 * SNIPI_WIDTH)

typedef float snipi_floats __attribute__((vector_size(SNIPI_VECTOR_BYTES)));
typedef int32_t snipi_ints __attribute__((vector_size(SNIPI_VECTOR_BYTES)));
typedef uint32_t snipi_words __attribute__((vector_size(SNIPI_VECTOR_BYTES)));
typedef double snipi_doubles __attribute__((vector_size(SNIPI_VECTOR_BYTES)));
typedef float snipi_floats_at __attribute__((vector_size(SNIPI_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t snipi_ints_at __attribute__((vector_size(SNIPI_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t snipi_words_at __attribute__((vector_size(SNIPI_VECTOR_BYTES), aligned(4), may_alias));
typedef double snipi_doubles_at __attribute__((vector_size(SNIPI_VECTOR_BYTES), aligned(8), may_alias));

// x in every lane
SNIPI_TARGET SNIPI_INLINE snipi_words SNIPI_V(all)(uint32_t x) {
    const snipi_words zero = { 0 };
    return zero + x;
}

SNIPI_TARGET SNIPI_INLINE snipi_floats SNIPI_V(all_floats)(float x) {
    return (snipi_floats)SNIPI_V(all)(snipi_bits(x));
}

// ---- maxima ----
SNIPI_TARGET static uint32_t SNIPI_V(amax)(const float *x, int n, int64_t *nonfinite) {
    enum { vectors = SNIPI_WIDTH == 4 ? 4 : 2, turn = vectors * SNIPI_WIDTH };

    snipi_ints most[vectors];
    int i = 0;
    if (n < SNIPI_WIDTH) return snipi_amax_scalar(x, n, nonfinite);
    SNIPI_UNROLL
    for (int v = 0; v < vectors; v++) most[v] = (snipi_ints)SNIPI_V(all)(0);

    for (; i + turn <= n; i += turn) {  // most = max(most, |x|), of bits
        SNIPI_UNROLL
        for (int line = 0; line < turn; line += 16) __builtin_prefetch((const char *)(x + i + line) + SNIPI_AHEAD);
        SNIPI_UNROLL
        for (int v = 0; v < vectors; v++)
            most[v] = SNIPI_MAX(most[v], *(const snipi_ints_at *)(x + i + SNIPI_WIDTH * v) & 0x7FFFFFFF);
    }
    for (; i + SNIPI_WIDTH < n; i += SNIPI_WIDTH)
        most[0] = SNIPI_MAX(most[0], *(const snipi_ints_at *)(x + i) & 0x7FFFFFFF);
    if (i < n)  // the last ones, perhaps with some that have been seen
        most[0] = SNIPI_MAX(most[0], *(const snipi_ints_at *)(x + n - SNIPI_WIDTH) & 0x7FFFFFFF);
    SNIPI_UNROLL
    for (int v = 1; v < vectors; v++) most[0] = SNIPI_MAX(most[0], most[v]);
    const uint32_t largest = SNIPI_MOST(most[0]);
    return largest < 0x7F800000u ? largest : snipi_amax_scalar(x, n, nonfinite);
}

// ---- random numbers ----
#if SNIPI_WIDTH < 16
// [4][4] blocks, one in each 128 bits, are transposed.
SNIPI_TARGET SNIPI_INLINE void SNIPI_V(turn)(snipi_words v[4]) {
    const snipi_words low02 = SNIPI_ZIP_LOW(v[0], v[2]), high02 = SNIPI_ZIP_HIGH(v[0], v[2]);
    const snipi_words low13 = SNIPI_ZIP_LOW(v[1], v[3]), high13 = SNIPI_ZIP_HIGH(v[1], v[3]);
    v[0] = SNIPI_ZIP_LOW(low02, low13);
    v[1] = SNIPI_ZIP_HIGH(low02, low13);
    v[2] = SNIPI_ZIP_LOW(high02, high13);
    v[3] = SNIPI_ZIP_HIGH(high02, high13);
}

// *upper: *lower = a * factor
SNIPI_TARGET SNIPI_INLINE void SNIPI_V(multiply)(snipi_words a, uint32_t factor, snipi_words *lower,
                                                 snipi_words *upper) {
    const snipi_words by = SNIPI_V(all)(factor);
    const snipi_words even = SNIPI_EVEN_PRODUCTS(a, by), odd = SNIPI_ODD_PRODUCTS(a, by);
    *lower = SNIPI_LOWER_WORDS(even, odd);
    *upper = SNIPI_UPPER_WORDS(even, odd);
}

// As snip_philox, of `blocks` counters from `first`, all in flight at once because a product's latency is long.
SNIPI_TARGET SNIPI_INLINE void SNIPI_V(random_words)(const snipi_rounds *s, uint32_t first, const int blocks,
                                                     uint32_t *out) {
    const snipi_words order = { SNIPI_COUNTERS };
    snipi_words c[2][4], lower0, upper0, lower1, upper1;
    SNIPI_UNROLL
    for (int v = 0; v < blocks / SNIPI_WIDTH; v++) {
        SNIPI_V(multiply)(order + (first + (uint32_t)(SNIPI_WIDTH * v)), SNIPI_FACTOR0, &lower0, &upper0);
        SNIPI_V(multiply)(upper0 ^ s->first, SNIPI_FACTOR1, &lower1, &upper1);
        c[v][0] = upper1 ^ s->second[0];
        c[v][1] = lower1;
        c[v][2] = lower0 ^ s->second[1];
        c[v][3] = SNIPI_V(all)(s->second[2]);
    }
    for (int round = 0; round < 8; round++) {
        const uint32_t key0 = s->key[round][0], key1 = s->key[round][1];
        SNIPI_UNROLL
        for (int v = 0; v < blocks / SNIPI_WIDTH; v++) {
            SNIPI_V(multiply)(c[v][0], SNIPI_FACTOR0, &lower0, &upper0);
            SNIPI_V(multiply)(c[v][2], SNIPI_FACTOR1, &lower1, &upper1);
            c[v][0] = upper1 ^ c[v][1] ^ key0;
            c[v][1] = lower1;
            c[v][2] = upper0 ^ c[v][3] ^ key1;
            c[v][3] = lower0;
        }
    }
    SNIPI_UNROLL
    for (int v = 0; v < blocks / SNIPI_WIDTH; v++) {
        SNIPI_V(turn)(c[v]);
        SNIPI_UNROLL
        for (int i = 0; i < 4; i++) *(snipi_words_at *)(out + SNIPI_WIDTH * (4 * v + i)) = c[v][i];
    }
}
#endif

SNIPI_TARGET static void SNIPI_V(philox)(snip_rng_key key, uint64_t first, int blocks, uint32_t *out) {
    enum { turn = 2 * SNIPI_WIDTH, last = turn > 16 ? 16 : 0 };  // `out` may be filled to a multiple of 16 blocks

    const snipi_rounds s = snipi_rounds_of(key, (uint32_t)(first >> 32));
    const uint32_t start = (uint32_t)first;
    int b = 0;
    if (!snipi_one_upper(first, blocks)) {
        snipi_philox_scalar(key, first, blocks, out);
        return;
    }
    for (; b + last < blocks; b += turn) SNIPI_V(random_words)(&s, start + (uint32_t)b, turn, out + 4 * b);
    if (last > 0 && b < blocks) SNIPI_V(random_words)(&s, start + (uint32_t)b, last, out + 4 * b);
}

// ---- runs ----
// With e = max(exponent of |y|, that of the smallest normal number) and k = |y| in units of 2^(e - mantissa), rounded,
// the code is k + (e - smallest) * 2^mantissa. To nearest: |y| + power, where power is 2^(e + 23 - mantissa) plus that
// second term in its last places, rounds |y| and has the code in its low bits; the term is even, so that ties stay ties
// to even. Less power, the sum is the value.
typedef struct {
    snipi_ints least, cap, beyond, largest, max, low, magic,
        unit;  // as in snipi_run, in every lane; low: a code's bits
    snipi_words shift, random_shift, sign_shift;
} snipi_codec;

SNIPI_TARGET SNIPI_INLINE snipi_codec SNIPI_V(codec_of)(const snipi_run *run) {
    snipi_codec k;
    k.least = (snipi_ints)SNIPI_V(all)((uint32_t)run->k.least);
    k.cap = (snipi_ints)SNIPI_V(all)((uint32_t)run->k.cap);
    k.beyond = (snipi_ints)SNIPI_V(all)((uint32_t)run->k.beyond);
    k.largest = (snipi_ints)SNIPI_V(all)(run->e.largest);
    k.max = (snipi_ints)SNIPI_V(all)(snipi_bits(run->e.max));
    k.low = (snipi_ints)SNIPI_V(all)((uint32_t)run->k.sign - 1u);
    k.magic = (snipi_ints)SNIPI_V(all)((uint32_t)run->k.magic);
    k.unit = (snipi_ints)SNIPI_V(all)((uint32_t)run->k.unit);
    k.shift = SNIPI_COUNT(run->k.shift);
    k.random_shift = SNIPI_COUNT(run->k.random_shift);
    k.sign_shift = SNIPI_COUNT(run->k.sign_shift);
    return k;
}

// The code of |y|, whose bits `a` are, and its value.
SNIPI_TARGET SNIPI_INLINE snipi_ints SNIPI_V(nearest)(const snipi_codec *k, snipi_ints a, snipi_ints *over,
                                                      snipi_floats *value) {
    const snipi_ints capped = SNIPI_MIN(a, k->cap), e = SNIPI_MAX(capped & 0x7F800000, k->least);
    const snipi_floats power = (snipi_floats)(e + k->magic + (snipi_ints)SNIPI_RIGHT(e, k->shift));
    snipi_floats sum = (snipi_floats)capped + power;
    SNIPI_KEPT(sum);
    *value = sum - power;
    *over -= a > k->beyond;
    return (snipi_ints)sum & k->low;
}

// As `nearest`, with k = (|y| * 2^(23 - e) + random) >> shift. The power's exponent is 23 + 127 less e's, both of them
// stored 127 too large.
SNIPI_TARGET SNIPI_INLINE snipi_ints SNIPI_V(stochastic)(const snipi_codec *k, snipi_ints a, snipi_words random,
                                                         snipi_ints *over, snipi_floats *value) {
    const snipi_ints capped = SNIPI_MIN(a, k->cap), e = SNIPI_MAX(capped & 0x7F800000, k->least);
    const snipi_floats fixed = (snipi_floats)capped * (snipi_floats)(((127u + 23u + 127u) << 23) - (snipi_words)e);
    const snipi_words sum = (snipi_words)SNIPI_INTS(fixed) + SNIPI_RIGHT(random, k->random_shift);
    snipi_ints code = (snipi_ints)SNIPI_RIGHT(sum, k->shift);
    *value = SNIPI_FLOATS(code) * (snipi_floats)(e - k->unit);
    *value = (snipi_floats)SNIPI_MIN((snipi_ints)*value, k->max);
    code += (snipi_ints)SNIPI_RIGHT(e - k->least, k->shift);
    *over -= code > k->largest;
    return SNIPI_MIN(code, k->largest);
}

SNIPI_TARGET SNIPI_INLINE void SNIPI_V(store_codes)(const snipi_run *run, int at, const snipi_ints *code) {
    const int left = run->n - at;
    uint8_t *to = run->codes + (run->packed ? at / 2 : at);
    snipi_bytes bytes = SNIPI_BYTES(code);
    if (run->packed) bytes = SNIPI_NIBBLES(bytes);
    if (left < 16) {
        uint8_t last[16];
        *(snipi_bytes_at *)last = bytes;
        memcpy(to, last, (size_t)(run->packed ? (left + 1) / 2 : left));
    } else if (run->packed)
        memcpy(to, &bytes, 8);
    else if (run->stream && (uintptr_t)to % 16 == 0)
        SNIPI_STREAM_BYTES(to, bytes);
    else
        *(snipi_bytes_at *)to = bytes;
}

// Half `half` of the vectors v, in double.
SNIPI_TARGET SNIPI_INLINE snipi_doubles SNIPI_V(half)(const snipi_floats *v, int half) {
    return half % 2 ? SNIPI_HIGH_DOUBLES(v[half / 2]) : SNIPI_LOW_DOUBLES(v[half / 2]);
}

// Sums of a run: element i in lane i % 16 of the squares and in lane i % 8 of the dot product.
typedef struct {
    snipi_floats sum_sq[16 / SNIPI_WIDTH], err_sq[16 / SNIPI_WIDTH];
    snipi_doubles dot[16 / SNIPI_WIDTH];
} snipi_partial;

// Vector v of 16 elements: |y|, whose bits `a` are, its value and its sign, which is the value's too.
SNIPI_TARGET SNIPI_INLINE void SNIPI_V(sum)(snipi_partial *to, int v, snipi_ints a, snipi_floats value, snipi_ints sign,
                                            const float *weight) {
    const snipi_floats error = value - (snipi_floats)a;
    snipi_floats a2 = (snipi_floats)a * (snipi_floats)a, error2 = error * error;
    SNIPI_KEPT(a2);
    SNIPI_KEPT(error2);
    to->sum_sq[v] += a2;
    to->err_sq[v] += error2;
    SNIPI_KEPT(to->sum_sq[v]);
    SNIPI_KEPT(to->err_sq[v]);
    if (!weight) return;
    const snipi_floats with_sign = (snipi_floats)((snipi_ints)error ^ sign);
    const int low = 2 * v % (16 / SNIPI_WIDTH), high = (2 * v + 1) % (16 / SNIPI_WIDTH);
    to->dot[low] += SNIPI_DOUBLES_AT(weight) * SNIPI_LOW_DOUBLES(with_sign);  // exact, so that fused ones are the same
    SNIPI_KEPT(to->dot[low]);
    to->dot[high] += SNIPI_DOUBLES_AT(weight + SNIPI_WIDTH / 2) * SNIPI_HIGH_DOUBLES(with_sign);
    SNIPI_KEPT(to->dot[high]);
}

// tally += (lane + lane 8 further) * scale^2
SNIPI_TARGET SNIPI_INLINE void SNIPI_V(tally)(const snipi_partial *sums, double scale, snipi_tally *to) {
    enum { vectors = 16 / SNIPI_WIDTH };

    const double square = scale * scale;
    SNIPI_UNROLL
    for (int h = 0; h < vectors; h++) {
        const int lane = SNIPI_WIDTH / 2 * h;
        snipi_doubles sum_sq = (SNIPI_V(half)(sums->sum_sq, h) + SNIPI_V(half)(sums->sum_sq, h + vectors)) * square;
        snipi_doubles err_sq = (SNIPI_V(half)(sums->err_sq, h) + SNIPI_V(half)(sums->err_sq, h + vectors)) * square;
        snipi_doubles dot = sums->dot[h] * scale;
        SNIPI_KEPT(sum_sq);
        SNIPI_KEPT(err_sq);
        SNIPI_KEPT(dot);
        *(snipi_doubles_at *)(to->sum_sq + lane) += sum_sq;
        *(snipi_doubles_at *)(to->err_sq + lane) += err_sq;
        *(snipi_doubles_at *)(to->dot + lane) += dot;
    }
}

// Sixteen elements a turn, the last ones filled up with zeros.
SNIPI_TARGET static void SNIPI_V(run)(const snipi_run *run) {
    enum { vectors = 16 / SNIPI_WIDTH };

    const snipi_codec k = SNIPI_V(codec_of)(run);
    const snipi_floats inverse = SNIPI_V(all_floats)(run->inverse), scale = SNIPI_V(all_floats)(run->scale);
    const int want_sums = run->want_sums, past = run->stream && (uintptr_t)run->values % SNIPI_VECTOR_BYTES == 0;
    snipi_ints over = (snipi_ints)SNIPI_V(all)(0);
    snipi_partial sums;
    SNIPI_UNROLL
    for (int v = 0; v < vectors; v++) {
        sums.sum_sq[v] = sums.err_sq[v] = SNIPI_V(all_floats)(0.0f);
        sums.dot[v] = (snipi_doubles)SNIPI_V(all)(0);
    }

    for (int i = 0; i < run->n; i += 16) {
        const int left = run->n - i;
        const float *x = run->x + i, *weight = run->weight ? run->weight + i : NULL;
        const uint32_t *random = run->random ? run->random + i : NULL;
        float *values = run->values ? run->values + i : NULL, last_values[16];
        uint32_t last_x[16], last_weight[16], last_random[16];
        snipi_ints code[vectors];
        if (left < 16) {
            x = (const float *)snipi_last_words(last_x, x, left);
            if (weight) weight = (const float *)snipi_last_words(last_weight, weight, left);
            if (random) random = (const uint32_t *)snipi_last_words(last_random, random, left);
            if (values) values = last_values;
        }

        SNIPI_UNROLL
        for (int v = 0; v < vectors; v++) {
            const int at = SNIPI_WIDTH * v;
            const snipi_ints y = (snipi_ints)(*(const snipi_floats_at *)(x + at) * inverse);
            const snipi_ints a = y & 0x7FFFFFFF, sign = y ^ a;
            snipi_floats value;
            if (random)
                code[v] = SNIPI_V(stochastic)(&k, a, *(const snipi_words_at *)(random + at), &over, &value);
            else
                code[v] = SNIPI_V(nearest)(&k, a, &over, &value);
            code[v] |= (snipi_ints)SNIPI_RIGHT(sign, k.sign_shift);
            SNIPI_KEPT(value);
            if (want_sums) SNIPI_V(sum)(&sums, v, a, value, sign, weight ? weight + at : NULL);
            if (values) {
                value = (snipi_floats)((snipi_ints)value | sign) * scale;
                if (past && left >= 16)
                    SNIPI_STREAM(values + at, value);
                else
                    *(snipi_floats_at *)(values + at) = value;
            }
        }
        if (left < 16 && values) memcpy(run->values + i, last_values, (size_t)left * sizeof(float));
        if (run->codes) SNIPI_V(store_codes)(run, i, code);
    }

    if (SNIPI_ANY(over > 0))
        for (int lane = 0; lane < SNIPI_WIDTH; lane++) run->tally->saturated += over[lane];
    if (want_sums) SNIPI_V(tally)(&sums, (double)run->scale, run->tally);
}

// ---- what AVX-512 has of its own or takes from AVX2, since instructions of 512 bits slow those beside them ----
#if SNIPI_WIDTH < 16
SNIPI_TARGET static void SNIPI_V(widen)(const uint16_t *x, int n, float *out) {
    int i = 0;
    for (; i + SNIPI_WIDTH <= n; i += SNIPI_WIDTH) *(snipi_words_at *)(out + i) = SNIPI_WORDS_AT_16(x + i) << 16;
    snipi_widen_scalar(x + i, n - i, out + i);
}

SNIPI_TARGET static void SNIPI_V(narrow)(const float *x, int n, uint16_t *out) {
    int i = 0;
    for (; i + SNIPI_WIDTH <= n; i += SNIPI_WIDTH) {  // as snipi_bf16_round
        const snipi_words u = *(const snipi_words_at *)(x + i), upper = u >> 16;
        const snipi_words rounded = (u + 0x7FFFu + (upper & 1u)) >> 16;
        const snipi_words is_nan = (snipi_words)((snipi_ints)(u & 0x7FFFFFFFu) > 0x7F800000);
        SNIPI_STORE_16(out + i, (is_nan & (upper | 0x40u)) | (~is_nan & rounded));
    }
    snipi_narrow_scalar(x + i, n - i, out + i);
}

SNIPI_TARGET static void SNIPI_V(transpose)(const float *x, int64_t ld, int rows, int cols, float *out,
                                            int64_t ld_out) {
    int r = 0;
    for (; r + SNIPI_WIDTH <= rows; r += SNIPI_WIDTH) {
        int c = 0;
        for (; c + 4 <= cols; c += 4) {
            snipi_words v[4];
            SNIPI_UNROLL
            for (int i = 0; i < 4; i++) v[i] = SNIPI_FOUR_COLUMNS(x + (r + i) * ld + c, ld);
            SNIPI_V(turn)(v);
            SNIPI_UNROLL
            for (int i = 0; i < 4; i++) *(snipi_words_at *)(out + (c + i) * ld_out + r) = v[i];
        }
        if (c < cols) snipi_transpose_scalar(x + r * ld + c, ld, SNIPI_WIDTH, cols - c, out + c * ld_out + r, ld_out);
    }
#    if SNIPI_WIDTH == 8
    snipi_transpose_sse2(x + r * ld, ld, rows - r, cols, out + r, ld_out);
#    else
    snipi_transpose_scalar(x + r * ld, ld, rows - r, cols, out + r, ld_out);
#    endif
}

// A code's fields are moved into a float's. A subnormal code is a multiple of the smallest.
SNIPI_TARGET static void SNIPI_V(decode)(snip_format format, const float *lut, const uint8_t *codes, int n, float scale,
                                         float *out, int stream) {
    static const uint32_t nibble[8] = { 0, 4, 8, 12, 16, 20, 24, 28 };  // where a code lies in 32 bits
    const snipi_words places = *(const snipi_words_at *)nibble;
    const snipi_element e = snipi_element_of(format);
    const int packed = format == SNIP_E2M1, past = stream && (uintptr_t)out % SNIPI_VECTOR_BYTES == 0;
    const int shift = 23 - e.mantissa, sign_shift = 31 - e.sign;
    const int32_t magnitude = (1 << e.sign) - 1, base = (127 - e.bias) << 23, last_tiny = (1 << e.mantissa) - 1;
    snipi_ints beyond = (snipi_ints)SNIPI_V(all)(0);
    int i = 0;
    for (; i + SNIPI_WIDTH <= n; i += SNIPI_WIDTH) {
        snipi_words c;
        if (packed) {
            uint32_t nibbles = 0;
            memcpy(&nibbles, codes + i / 2, SNIPI_WIDTH / 2);
            c = (SNIPI_V(all)(nibbles) >> places) & 15u;
        } else
            c = SNIPI_WORDS_AT_8(codes + i);
        const snipi_ints m = (snipi_ints)c & magnitude, is_tiny = m <= last_tiny;
        const snipi_ints normal = (m << shift) + base, tiny = (snipi_ints)(SNIPI_FLOATS(m) * lut[1]);
        const snipi_ints sign = (snipi_ints)(c << sign_shift & 0x80000000u);
        const snipi_floats value = (snipi_floats)((is_tiny & tiny) | (~is_tiny & normal) | sign) * scale;
        beyond |= m > (int32_t)e.largest;
        if (past)
            SNIPI_STREAM(out + i, value);
        else
            *(snipi_floats_at *)(out + i) = value;
    }
    // All of it again where there are infinities or NaN, or where products may be subnormal, at a scale below 2^-100.
    if (SNIPI_ANY(beyond) || snipi_bits(scale) < (127u - 100u) << 23) i = 0;
    if (i < n) snipi_decode_scalar(format, lut, codes + (packed ? i / 2 : i), n - i, scale, out + i, 0);
}

SNIPI_TARGET static void SNIPI_V(sums)(const float *x, const float *values, const float *weight, int n,
                                       snipi_tally *tally) {
    enum { half_width = SNIPI_WIDTH / 2, halves = SNIPI_LANES / half_width };

    snipi_doubles sum_sq[halves], err_sq[halves], dot[halves];
    int i = 0;
    SNIPI_UNROLL
    for (int h = 0; h < halves; h++) {
        sum_sq[h] = *(const snipi_doubles_at *)(tally->sum_sq + half_width * h);
        err_sq[h] = *(const snipi_doubles_at *)(tally->err_sq + half_width * h);
        dot[h] = *(const snipi_doubles_at *)(tally->dot + half_width * h);
    }
    for (; i + SNIPI_LANES <= n; i += SNIPI_LANES) {
        snipi_floats difference[halves / 2];
        SNIPI_UNROLL
        for (int v = 0; v < halves / 2; v++) {
            const int at = i + SNIPI_WIDTH * v;
            difference[v] = *(const snipi_floats_at *)(values + at) - *(const snipi_floats_at *)(x + at);
        }
        SNIPI_UNROLL
        for (int h = 0; h < halves; h++) {  // the products are exact, so that fused ones are the same
            const int at = i + half_width * h;
            const snipi_doubles v = SNIPI_DOUBLES_AT(x + at), d = SNIPI_V(half)(difference, h);
            sum_sq[h] += v * v;
            err_sq[h] += d * d;
            if (weight) dot[h] += SNIPI_DOUBLES_AT(weight + at) * d;
        }
    }
    SNIPI_UNROLL
    for (int h = 0; h < halves; h++) {
        *(snipi_doubles_at *)(tally->sum_sq + half_width * h) = sum_sq[h];
        *(snipi_doubles_at *)(tally->err_sq + half_width * h) = err_sq[h];
        *(snipi_doubles_at *)(tally->dot + half_width * h) = dot[h];
    }
    snipi_sums_exact(x + i, values + i, weight ? weight + i : NULL, n - i, tally);
}

SNIPI_TARGET static void SNIPI_V(adam)(const float *m, const float *v, float a, float b, float eps, int64_t n,
                                       float *out) {
    int64_t i = 0;
    for (; i + SNIPI_WIDTH <= n; i += SNIPI_WIDTH) {
        const snipi_floats second = *(const snipi_floats_at *)(v + i);
        snipi_floats top = SNIPI_V(all_floats)(a);
        if (m) top *= *(const snipi_floats_at *)(m + i);
        *(snipi_ints_at *)(out + i) = (snipi_ints)(top / (SNIPI_SQRT(second * b) + eps)) & (second > 0.0f);
    }
    snipi_adam_scalar(m ? m + i : NULL, v + i, a, b, eps, n - i, out + i);
}

SNIPI_TARGET static void SNIPI_V(flip)(const uint32_t signs[4], float x[SNIPI_SIGNS]) {
    static const uint32_t powers[8] = { 128, 64, 32, 16, 8, 4, 2, 1 };
    const snipi_words places = *(const snipi_words_at *)(powers + 8 - SNIPI_WIDTH);
    for (int w = 0; w < 4; w++) {
        snipi_words bits = signs[w] * places;  // the last bits of the word in the lanes' sign places, the others below
        SNIPI_UNROLL
        for (int j = 32 - SNIPI_WIDTH; j >= 0; j -= SNIPI_WIDTH) {
            *(snipi_words_at *)(x + 32 * w + j) = *(const snipi_words_at *)(x + 32 * w + j) ^ (bits & 0x80000000u);
            bits <<= SNIPI_WIDTH;
        }
    }
}

// clang-format off
static const snipi_vector SNIPI_V(vector) = {
    SNIPI_V(amax),
    SNIPI_V(philox),
    SNIPI_V(run),
    SNIPI_V(transpose),
    SNIPI_V(widen),
    SNIPI_V(narrow),
    SNIPI_V(decode),
    SNIPI_V(sums),
    SNIPI_NO_STRIPS
};
// clang-format on
#endif
#undef SNIPI_WIDTH
#undef SNIPI_V
#undef SNIPI_TARGET
#undef SNIPI_MIN
#undef SNIPI_MAX
#undef SNIPI_MOST
#undef SNIPI_ANY
#undef SNIPI_COUNT
#undef SNIPI_RIGHT
#undef SNIPI_FLOATS
#undef SNIPI_INTS
#undef SNIPI_SQRT
#undef SNIPI_LOW_DOUBLES
#undef SNIPI_HIGH_DOUBLES
#undef SNIPI_DOUBLES_AT
#undef SNIPI_EVEN_PRODUCTS
#undef SNIPI_ODD_PRODUCTS
#undef SNIPI_LOWER_WORDS
#undef SNIPI_UPPER_WORDS
#undef SNIPI_ZIP_LOW
#undef SNIPI_ZIP_HIGH
#undef SNIPI_COUNTERS
#undef SNIPI_WORDS_AT_16
#undef SNIPI_WORDS_AT_8
#undef SNIPI_STORE_16
#undef SNIPI_BYTES
#undef SNIPI_NIBBLES
#undef SNIPI_STREAM
#undef SNIPI_FOUR_COLUMNS
#undef snipi_floats
#undef snipi_ints
#undef snipi_words
#undef snipi_doubles
#undef snipi_floats_at
#undef snipi_ints_at
#undef snipi_words_at
#undef snipi_doubles_at
#undef snipi_codec
#undef snipi_partial
#undef SNIPI_VECTOR_BYTES
#endif  // SNIPI_WIDTH
