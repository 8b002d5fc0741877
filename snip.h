// snip.h - adaptive FP4/FP8 mixed-precision training for hand-written trainers.
// MIT licence (see LICENSE). C99 and later, C++11 and later; libc and libm only.
//
// WHAT IT IS
//   A training session that measures, for every linear layer of a model in training, how much
//   FP8 or FP4 would hurt the loss and the next optimizer update, picks a precision for each of the
//   layer's three GEMMs (forward, dgrad, wgrad) at the least total harm that meets a budget of FP4
//   FLOPs, and runs the layers under that plan until the next measurement. The idea is SNIP (Pan,
//   Yang, Yang, Mahlke; arXiv 2602.01410); the estimators are this library's own, see >>session.
//   Below the session lie its parts, each usable alone: element codecs, scaled quantization, GEMMs
//   on quantized operands, keyed noise.
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
//         optimizer_step();
//         if (snip_end_step(s, &(snip_adamw){ lr, beta1, beta2, eps, step, grad_scale })) puts(snip_message(s));
//     }                                                  // grad_scale: the factor that clipping has put on the
//     gradients
//   Validation and sampling run between snip_set_mode(s, SNIP_EVAL) and snip_set_mode(s, SNIP_TRAIN).
//
// WHAT STAYS YOURS
//   The optimizer, master weights, data, attention, norms, communication between ranks. All passes of a
//   step must see the same batch, the same dropout masks and the same weights; what counts batches (moving
//   averages, batch norm) is for the last pass alone. dout belongs to the loss that snip_next_pass is told:
//   with loss scale S tell it S * loss. In a measuring pass every layer has as many backward as forward calls,
//   one each per micro-batch: a weight that is used twice is two layers, and activations are not recomputed
//   through snip (snip_current_pass tells). A step without an optimizer's ends with snip_end_step(s, NULL).
//
// SEVERAL RANKS
//   Tell snip_next_pass the loss averaged over ranks, set desc.drift < 0 (inputs differ between ranks), and after
//   snip_end_step of a measuring step load one rank's snip_state_save in all of them: they then pass, measure
//   and plan alike.
//
// WHEN IT MEASURES, AND WHEN A PLAN CHANGES
//   Every desc.every steps; under a plan also when the loss spikes, or inputs and gradients drift, though not
//   within every / 10 steps of the last time. Costs are averages over measurements with standard errors; a GEMM
//   changes its format only where that saves more than 2 of them. From a spike to its measurement no GEMM is below
//   FP8. snip_reason() says in a line what was done and why. With every < 0 nothing ever changes by itself.
//
// ERRORS
//   Functions that can fail return snip_status, in every build. A refused argument leaves the outputs
//   untouched. NaN and infinity in a tensor are counted: by quantizers in snip_quant_stats.nonfinite, with
//   status SNIP_OK; by a session in snip_layer_info.nonfinite, with status SNIP_NONFINITE after the work.
//
// DETERMINISM
//   Codes, scales and stochastic rounding depend on the input and the key alone: not on threads,
//   tiling or instruction set, nor on -Ofast. GEMMs are deterministic for any number of threads;
//   between instruction sets FP4 GEMMs are equal bit for bit (exact integer sums, one fused multiply-add
//   per scale block; the operands' tiles along k must nest and be multiples of 16), the others within rounding.
//
// CONFIGURATION (define before the implementation)
//   SNIP_STATIC            all functions static to the including file
//   SNIP_MALLOC(size), SNIP_FREE(ptr)   defaults of snip_desc.alloc, and the solver's; define both
//   SNIP_PARALLEL_FOR(fn, arg, n)       another thread pool than OpenMP's: calls fn(arg, i), of type void (void *,
//   int64_t), once for
//                          every i in [0, n), in any order, on any threads, and returns when all calls have; never
//                          nested
//   SNIP_NO_SIMD           the scalar specification only
//   SNIP_NO_AMX            no AMX, AVX512-BF16 and AVX-VNNI: for assemblers older than binutils 2.36
//
// INDEX (search for the tag)
//   API:             >>status >>format >>codec >>quantize >>noise >>gemm >>session
//   Implementation:  >>codec-impl >>random-impl >>quantize-impl >>gemm-impl >>session-impl >>simd
// clang-format off
#ifndef SNIP_H
#define SNIP_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#if defined(SNIP_STATIC) && (defined(__GNUC__) || defined(__clang__))
#  define SNIP_API static __attribute__((unused))
#elif defined(SNIP_STATIC)
#  define SNIP_API static
#else
#  define SNIP_API extern
#endif

#ifdef __cplusplus
extern "C" {
#endif

// >>status -----------------------------------------------------------------------------------------
#define SNIP_STATUS_LIST(X) \
    X(SNIP_OK,            "ok") \
    X(SNIP_BAD_ARGUMENT,  "an argument is out of range") \
    X(SNIP_OUT_OF_MEMORY, "out of memory") \
    X(SNIP_UNSUPPORTED,   "this combination is not supported") \
    X(SNIP_NONFINITE,     "a tensor holds NaN or infinity") \
    X(SNIP_INFEASIBLE,    "no plan meets the budget") \
    X(SNIP_NOT_BOUND,     "a layer has no optimizer state bound to it") \
    X(SNIP_IO,            "a file cannot be read or written") \
    X(SNIP_CORRUPT,       "the data is damaged, cut short or of another kind") \
    X(SNIP_MISMATCH,      "the data belongs to a different model or session") \
    X(SNIP_DEVICE,        "a call of the CUDA runtime failed")
typedef enum {
#define SNIP_X(code, text) code,
    SNIP_STATUS_LIST(SNIP_X)
#undef SNIP_X
    SNIP_STATUS_COUNT
} snip_status;
SNIP_API const char *snip_status_text(snip_status);

// >>format -----------------------------------------------------------------------------------------
typedef enum {
    SNIP_F32 = 1, SNIP_BF16,
    SNIP_E4M3,      // FP8, largest 448, no infinity, NaN 0x7F
    SNIP_E5M2,      // FP8, largest 57344
    SNIP_E2M1,      // FP4 {0, .5, 1, 1.5, 2, 3, 4, 6}; no NaN, no infinity; two to a byte, even index low
    SNIP_E2M3,      // FP6, largest 7.5; one to a byte
    SNIP_E3M2,      // FP6, largest 28; one to a byte
    SNIP_UE8M0,     // scale only: 2^(code - 127), 0xFF is NaN
    SNIP_UE4M3      // scale only: E4M3 without a sign
} snip_format;
typedef enum {
    SNIP_SCALE_NONE,    // no scale (F32 and BF16 always; the others: a plain saturating cast)
    SNIP_SCALE_F32,     // amax / largest, in float32
    SNIP_SCALE_POW2,    // the smallest power of two with amax / scale <= largest; stored as float32
    SNIP_SCALE_UE8M0,   // OCP MX: 2^(floor(log2 amax) - emax), one byte
    SNIP_SCALE_UE4M3,   // NVFP4: one E4M3 byte per tile times one float32 per tensor
    SNIP_SCALE_UE8M0_UP // MX with the scale rounded up (RCEIL): the smallest power of two with amax / scale <= largest, one byte
} snip_scale;
typedef enum { SNIP_ROUND_NEAREST_EVEN, SNIP_ROUND_STOCHASTIC } snip_rounding;

typedef struct {                        // how a matrix is quantized
    snip_format format;
    int32_t tile_rows, tile_cols;       // elements sharing one scale; 0: the whole dimension
    snip_scale scale;
    snip_rounding rounding;
} snip_recipe;
#define SNIP_RECIPE_F32         { SNIP_F32,  0, 0, SNIP_SCALE_NONE, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_BF16        { SNIP_BF16, 0, 0, SNIP_SCALE_NONE, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP8_TILE    { SNIP_E4M3, 1, 128, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP8_BLOCK   { SNIP_E4M3, 128, 128, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP4_TILE    { SNIP_E2M1, 1, 128, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_FP4_TILE_SR { SNIP_E2M1, 1, 128, SNIP_SCALE_F32, SNIP_ROUND_STOCHASTIC }
#define SNIP_RECIPE_FP4_BLOCK   { SNIP_E2M1, 128, 128, SNIP_SCALE_F32, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_MXFP8       { SNIP_E4M3, 1, 32, SNIP_SCALE_UE8M0, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_MXFP4       { SNIP_E2M1, 1, 32, SNIP_SCALE_UE8M0, SNIP_ROUND_NEAREST_EVEN }
#define SNIP_RECIPE_NVFP4       { SNIP_E2M1, 1, 16, SNIP_SCALE_UE4M3, SNIP_ROUND_NEAREST_EVEN }

// Instruction sets with code of their own; GEMMs use all of them, the rest only knows AVX2, AVX-512 and NEON. AVX_VNNI,
// AVX512_BF16 and AMX (INT8 and BF16) have run only with the new instructions emulated, not yet on such a machine.
// AMX is on Linux only: the first call that looks for it asks the kernel's permission for the process, after which signal
// stacks (sigaltstack) need 8 KiB more, for the tiles. Where it is refused, the next best is used.
typedef enum {
    SNIP_ISA_BEST, SNIP_ISA_SCALAR,
    SNIP_ISA_AVX2, SNIP_ISA_AVX_VNNI,
    SNIP_ISA_AVX512, SNIP_ISA_AVX512_VNNI, SNIP_ISA_AVX512_BF16, SNIP_ISA_AMX,
    SNIP_ISA_NEON, SNIP_ISA_NEON_DOT,
    SNIP_ISA_COUNT
} snip_isa;
SNIP_API int         snip_isa_available(snip_isa);      // on this machine and in this build
SNIP_API const char *snip_isa_name(snip_isa);

// "f32", "bf16", "fp8" (E4M3), "fp4" (E2M1), "e5m2", ...; "?" for anything else.
SNIP_API const char *snip_format_name(snip_format);
SNIP_API float       snip_format_max(snip_format);      // largest finite value; 0 for F32, BF16 and UE8M0
SNIP_API int         snip_format_bits(snip_format);     // stored bits per element: 4, 8, 16, 32

// >>codec ------------------------------------------------------------------------------------------
// Round to nearest, ties to even; finite values beyond the largest and infinities saturate (NVIDIA's
// SATFINITE). NaN becomes the format's NaN, or the largest positive value where there is none.
SNIP_API uint8_t  snip_e4m3_from_f32(float);   SNIP_API float snip_e4m3_to_f32(uint8_t);
SNIP_API uint8_t  snip_e5m2_from_f32(float);   SNIP_API float snip_e5m2_to_f32(uint8_t);
SNIP_API uint8_t  snip_e2m1_from_f32(float);   SNIP_API float snip_e2m1_to_f32(uint8_t);   // code in the low nibble
SNIP_API uint8_t  snip_e2m3_from_f32(float);   SNIP_API float snip_e2m3_to_f32(uint8_t);   // code in the low 6 bits
SNIP_API uint8_t  snip_e3m2_from_f32(float);   SNIP_API float snip_e3m2_to_f32(uint8_t);
SNIP_API uint8_t  snip_ue8m0_from_f32(float);  SNIP_API float snip_ue8m0_to_f32(uint8_t);  // rounds up; negative as its magnitude
SNIP_API uint8_t  snip_ue8m0_from_f32_floor(float);                                        // rounds down
SNIP_API uint8_t  snip_ue4m3_from_f32(float);  SNIP_API float snip_ue4m3_to_f32(uint8_t);  // negative becomes 0
SNIP_API uint16_t snip_bf16_from_f32(float);   SNIP_API float snip_bf16_to_f32(uint16_t);  // keeps NaN and infinity; beyond the largest: infinity

// The same without saturation: beyond the largest E4M3 becomes NaN (464 still rounds to 448), E5M2 infinity.
SNIP_API uint8_t  snip_e4m3_from_f32_nosat(float);
SNIP_API uint8_t  snip_e5m2_from_f32_nosat(float);

// >>quantize ---------------------------------------------------------------------------------------
// Matrices are row-major; ld counts elements from row to row. A tile is tile_rows x tile_cols, short
// at the right and lower edges. Codes: [rows][cols] without padding; for E2M1 a row takes (cols+1)/2
// bytes. Scales: [ceil(rows/tile_rows)][ceil(cols/tile_cols)], dequantizing (x ~ scale * code): float
// for F32 and POW2, a byte for UE8M0 and UE4M3; UE4M3 is followed, at the next multiple of 4 bytes, by
// the tensor's float scale. amax is over finite elements; a tile of zeros has scale 1 and none a smaller
// one than 2^-126 (POW2, F32), 2^-127 (UE8M0) or 0 (UE4M3). The code of x is that of x * (largest/amax), each rounded to float32.
//
// Random numbers: (seed, step, tensor) and the element's index r * cols + c in the quantized matrix.
typedef struct { uint64_t seed; uint32_t step, tensor; } snip_rng_key;
typedef struct {
    double sum_sq, err_sq, dot;         // |x|^2, |Q(x) - x|^2, <weight, Q(x) - x>, over finite elements; d = Q(x) - x to 2e-7 |x|
    float amax;                         // of finite elements
    int64_t nonfinite, saturated;       // NaN and infinity; elements that rounding alone puts beyond the largest
} snip_quant_stats;

// Bytes for codes and scales; 0 for arguments that snip_quantize would refuse.
SNIP_API size_t snip_codes_bound (const snip_recipe *, int64_t rows, int64_t cols);
SNIP_API size_t snip_scales_bound(const snip_recipe *, int64_t rows, int64_t cols);
// x: [rows][cols]; weight: same shape and ld as x, or NULL; stats or NULL (overwritten).
// scales may be NULL where snip_scales_bound is 0. Codes of F32 and BF16 and float scales are aligned to their elements.
SNIP_API snip_status snip_quantize(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, snip_rng_key, const float *weight, snip_quant_stats *);
// The same bytes as snip_quantize of the transposed matrix: codes and scales of a [cols][rows] matrix.
SNIP_API snip_status snip_quantize_transposed(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, snip_rng_key, const float *weight, snip_quant_stats *);
// Both of the above from one read of x. stats of the untransposed one.
SNIP_API snip_status snip_quantize_both(const snip_recipe *, const snip_recipe *transposed, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, void *codes_t, void *scales_t, snip_rng_key, snip_quant_stats *);
SNIP_API snip_status snip_dequantize(const snip_recipe *, const void *codes, const void *scales, int64_t rows, int64_t cols,
                                   float *x, int64_t ld);
SNIP_API snip_status snip_dequantize_bf16(const snip_recipe *, const void *codes, const void *scales, int64_t rows, int64_t cols,
                                   uint16_t *x, int64_t ld);
// Quantize and dequantize at once. out may be x if ld_out is ld, or NULL for statistics alone.
SNIP_API snip_status snip_fake_quantize(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   float *out, int64_t ld_out, snip_rng_key, const float *weight, snip_quant_stats *);
// All of it, for BF16 data and forced instruction sets; zero members are absent or the default.
typedef struct {
    const void *x;                                  // [rows][cols]
    snip_format x_format, out_format;               // SNIP_F32 (default) or SNIP_BF16
    int64_t rows, cols, ld;
    const float *weight;                            // [rows][cols], ld
    const snip_recipe *recipe, *recipe_t;           // of x and of x transposed; at least one
    void *codes, *scales, *codes_t, *scales_t;
    void *out;                                      // dequantized under recipe; may be x, in the same format and with the same ld
    int64_t ld_out;
    snip_rng_key key;
    snip_isa isa;
} snip_quantize_job;
SNIP_API snip_status snip_quantize_with(const snip_quantize_job *, snip_quant_stats *, snip_quant_stats *transposed);

// >>noise ------------------------------------------------------------------------------------------
// White noise of unit variance: +1 or -1 (Rademacher), element i's sign from (key, i) alone.
// Philox4x32-10 (Salmon et al., SC 2011): four words for counter (index, step, tensor), key seed.
SNIP_API void snip_philox(snip_rng_key, uint64_t index, uint32_t out[4]);
// out[i] = x[i] + scale * noise[i] * (shape ? shape[i] : 1). out may be x.
SNIP_API snip_status snip_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape, snip_rng_key);
// *dot = sum noise[i] * x[i]
SNIP_API snip_status snip_noise_dot(const float *x, int64_t n, snip_rng_key, double *dot);
// The same with Gaussian noise: elements 4i .. 4i + 3 from counter i, equal bits on every machine.
SNIP_API void snip_gauss(snip_rng_key, uint64_t index, float out[4]);
SNIP_API snip_status snip_gauss_add(float *out, const float *x, int64_t n, float scale, const float *shape, snip_rng_key);
SNIP_API snip_status snip_gauss_dot(const float *x, int64_t n, snip_rng_key, double *dot);
// Random Hadamard transform, against outliers, before quantization: every `block` (16, 32, 64 or 128) elements of a row
// become D H D x / sqrt(block), H Hadamard's matrix, D the signs that (key, column) give. Its own inverse (up to
// rounding), and A B^T keeps its value when both rows are transformed under one key. cols: whole blocks. In place.
SNIP_API snip_status snip_hadamard(float *x, int64_t rows, int64_t cols, int64_t ld, int block, snip_rng_key);

// >>gemm -------------------------------------------------------------------------------------------
// C[m][n] (+)= A[m][k] * B[n][k]^T + bias[n], operands quantized along k (k contiguous).
// E2M1 * E2M1 whose scale tiles along k nest: exact integer sums inside a scale block, then
// c = fmaf(sa * sb, sum, c) block after block; the integers are doubled and the scales halved for it, so
// that float scales below 2^-125 lose a bit. Everything else: float32 sums of the dequantized operands.
// F32 and BF16 operands may be stored transposed, [k][rows].
// AVX512_BF16 and AMX multiply what bfloat16 holds exactly (all but F32 operands that are not to be
// rounded) as bfloat16: FP8, FP6 and FP4 codes unscaled, with float32 sums, then as above. These units
// round to nearest even and know no subnormals: BF16 operands below 2^-126 count as zero, and sums
// of BF16 operands that fall below it become zero. Unscaled codes and their sums never come near.
typedef struct {
    const snip_recipe *recipe;
    const void *codes, *scales;
    int64_t ld;             // F32 and BF16: elements from row to row; 0: contiguous. Other formats: 0
    int transposed;         // F32 and BF16 only: stored [k][rows]
    int round_bf16;         // F32 only: elements are rounded to BF16 on the way in
} snip_operand;
// bias [n] or NULL; it is added also to what is accumulated. ldc >= n. scratch: snip_gemm_scratch bytes, any alignment (64 is
// fastest), 0 for shapes that are refused. SNIP_BAD_ARGUMENT: shapes, NULL operands or a recipe out of range.
SNIP_API size_t snip_gemm_scratch(int64_t m, int64_t n, int64_t k);
SNIP_API snip_status snip_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                               float *c, int64_t ldc, int accumulate, const float *bias, void *scratch, snip_isa);

// >>session ----------------------------------------------------------------------------------------
// Linear layer: Y = X W^T + bias, X [rows][in], W [out][in], Y [rows][out].
//   fwd Y = X W^T    dgrad dX = dY W    wgrad dW = dY^T X
// One call chain at a time on a session; different sessions are independent.
typedef struct snip snip;
typedef enum { SNIP_FWD, SNIP_DGRAD, SNIP_WGRAD, SNIP_GEMMS } snip_gemm_kind;
typedef struct { snip_recipe activation, weight, gradient; } snip_recipes;     // of the GEMMs in one precision
// SNIP_ADAMW serves Adam too: decay is no part of D, an update's slope in its gradient. SNIP_CUSTOM: D by callback.
// Muon has no D per weight, as its slope mixes all elements of a matrix, and needs an SVD. White errors it multiplies by D on average,
// D^2 = (sum over i != j of 2 / (s_i + s_j)^2 + |out - in| * sum of 1 / s_i^2) / (out * in), s_i the momentum's singular values: a callback can fill that in.
typedef enum { SNIP_ADAMW, SNIP_SGD_MOMENTUM, SNIP_LION, SNIP_CUSTOM } snip_optimizer;
// Fills d [out][in] with the slope of each weight's next update in its gradient, and returns |u|^2 of the layer's last update,
// both at learning rate 1. d NULL: |u|^2 alone is wanted. Called on measuring steps, several times a layer.
typedef double (*snip_sensitivity_fn)(void *user, int layer, float *d);
typedef struct { void *(*alloc_fn)(size_t, void *user); void (*free_fn)(void *, void *user); void *user; } snip_alloc;

typedef struct {                // zero means the default
    double budget;              // least share of the linear layers' FLOPs in FP4, per pipeline stage, in [0, 1]; GEMMs that dinp or dweight NULL leaves out count too
    double speedup;             // positive: instead of budget, each stage's linear GEMMs this many times as fast as in `high`,
    double seconds;             // or at most this many seconds for the rows measured: by snip_measure_gains' times, with GEMMs in `high` too
    int every;                  // steps before the first measurement and from one to the next; 0: 500; negative: never, and the plan is frozen
    uint64_t seed;
    int n_stages;               // pipeline stages; 0: 1
    int per_layer;              // 1: one precision for a layer's three GEMMs, as in the paper
    snip_format high;           // precision until the first plan: SNIP_BF16 (default) or SNIP_F32
    snip_format measure;        // precision of the measuring passes: SNIP_F32 (default) or SNIP_BF16
    double loss_weight;         // of the loss divergence in the cost; 0: 1; negative: off
    double update_weight;       // of the weight divergence; 0: 1; negative: off (saves its probe pass)
    double horizon;             // steps over which rounding noise of the backward GEMMs averages out; 0: 100
    double sample;              // share of the output features on which wgrad's error is measured; 0: 0.125
    snip_optimizer optimizer;   // whose updates the weight divergence is about: SNIP_ADAMW (default)
    snip_sensitivity_fn sensitivity;        // of SNIP_CUSTOM, and its first argument
    void *sensitivity_user;
    double margin;              // a GEMM changes its format where that saves more than this many standard errors of its costs; 0: 2; negative: any saving
    double spike;               // a loss this many deviations above its running mean is a spike; 0: 6; negative: none is
    snip_format fallback;       // least format from a spike to the next measurement: SNIP_E4M3 (default), SNIP_BF16, SNIP_F32; SNIP_E2M1: the plan stays
    double drift;               // binary orders by which inputs and gradients drift until they are measured anew; 0: 1; negative: any number
    snip_recipes fp8, fp4;      // zero format: FP8_TILE, FP8_BLOCK, FP8_TILE; FP4_TILE, FP4_BLOCK, FP4_TILE_SR
    snip_isa isa;
    snip_alloc alloc;
} snip_desc;

typedef struct {                // of the step just taken: update = lr * mhat / (sqrt(vhat) + eps)
    double lr, beta1, beta2, eps;   // SGD: update = lr * m, m = beta1 m + g. Lion: lr * sign(beta1 m + (1 - beta1) g), m = beta2 m + (1 - beta2) g
    int64_t step;               // 1 for the first
    double grad_scale;          // factor on the gradients before the optimizer, such as min(1, clip / norm); 0: 1
} snip_adamw;

typedef struct {                // what one precision would do to one layer (>>session-impl has the formulas)
    double loss_first, loss_second;         // of the last measurement: first-order and curvature part of the loss change
    double update[SNIP_GEMMS];              // relative squared error of the model's next update, by GEMM
    double cost[SNIP_GEMMS], error[SNIP_GEMMS];     // what the solver was given: averaged over measurements; its standard error
} snip_estimate;
typedef struct {
    const char *name;
    int64_t out_features, in_features;
    int stage;
    snip_format format[SNIP_GEMMS];         // the plan
    snip_estimate fp8, fp4;
    int64_t nonfinite, saturated;           // operand elements of the current step so far
    double seconds[3][SNIP_GEMMS];          // in `high`, FP8, FP4: measured or set; 0: not yet
    double measurements;                    // that the costs rest on, old ones counting less: at most 5
} snip_layer_info;
typedef enum { SNIP_PASS_ORDINARY, SNIP_PASS_LOSS_PROBE, SNIP_PASS_UPDATE_PROBE, SNIP_PASS_CLEAN } snip_pass;
typedef enum { SNIP_TRAIN, SNIP_EVAL /* forward under the plan, outside any pass */, SNIP_EVAL_HIGH /* in desc.high */ } snip_mode;

SNIP_API snip_status snip_desc_check(const snip_desc *);
SNIP_API snip *snip_create(const snip_desc *);          // NULL: out of memory, or snip_desc_check says why
SNIP_API void  snip_destroy(snip *);
// Index of the new layer (0, 1, 2, ...), or minus a snip_status. name: "block.part.kind"; copied. All before the first step.
SNIP_API int   snip_add_linear(snip *, const char *name, int64_t out_features, int64_t in_features, int stage);
// The optimizer's state, wanted from the first measurement on.
SNIP_API snip_status snip_bind_adamw(snip *, int layer, const float *m, const float *v);     // [out][in] each
SNIP_API snip_status snip_bind_momentum(snip *, int layer, const float *m);                  // SGD with momentum, Lion
// Formats a plan may use for a layer's GEMM, one of them at least; layer -1: every layer so far; gemm SNIP_GEMMS: all three.
// What must stay in `high` is left out of the session.
SNIP_API snip_status snip_allow(snip *, int layer, snip_gemm_kind gemm, int fp8, int fp4);
// Time each layer's GEMMs in `high`, FP8 and FP4 on this machine, quantization included, with `rows` rows of made-up operands;
// layers of one shape are timed once. Plans are solved by these seconds where desc.speedup or desc.seconds asks for it; they may leave GEMMs in
// `high`.
SNIP_API snip_status snip_measure_gains(snip *, int64_t rows);
SNIP_API snip_status snip_set_seconds(snip *, int layer, snip_gemm_kind, const double seconds[3]);     // the same by hand
SNIP_API double      snip_plan_seconds(const snip *);   // of all layers' GEMMs under the plan; 0 if not measured
// Put a GEMM in a format by hand (F32, BF16, E4M3 or E2M1), until the next plan. layer and gemm as above.
SNIP_API snip_status snip_set_format(snip *, int layer, snip_gemm_kind gemm, snip_format);
SNIP_API snip_status snip_set_mode(snip *, snip_mode);

// out [rows][out] is overwritten. bias [out] or NULL. Memory is allocated when rows grows, for the first micro-batches of a format (the
// weight's codes, both ways round) and in the first measuring step.
SNIP_API snip_status snip_linear_forward(snip *, int layer, float *out, const float *inp, const float *weight, const float *bias, int64_t rows);
// dinp [rows][in], dweight [out][in] and dbias [out] accumulate; each may be NULL. The update probe, whose gradients are of no use, leaves
// dweight as it is. Micro-batches: a layer's n-th backward call of a pass belongs to its n-th forward call.
SNIP_API snip_status snip_linear_backward(snip *, int layer, float *dinp, float *dweight, float *dbias, const float *dout,
                                          const float *inp, const float *weight, int64_t rows);
// After all forward and backward calls of a pass, with the batch's mean loss, on every step. 1: run the same batch once more from zeroed
// gradients. 0: the pass was the step's last; linear layers are refused until snip_end_step.
SNIP_API int snip_next_pass(snip *, double loss);
// After the optimizer, once snip_next_pass has returned 0. On a measuring step: turns the measurements into costs, solves, switches the plan.
// NULL: the optimizer made no step (a skipped batch); a measurement is then discarded and made anew.
// Returns the step's first error, also one that snip_linear_forward or _backward has returned before. But for a call in a probe pass
// the step ends in any case. SNIP_INFEASIBLE leaves the old plan in force; snip_message() names the target and the shortfall.
SNIP_API snip_status snip_end_step(snip *, const snip_adamw *);

SNIP_API snip_pass   snip_current_pass(const snip *);   // kind of the pass under way, or about to begin
SNIP_API int64_t     snip_step(const snip *);           // steps ended
SNIP_API int         snip_plans(const snip *);          // plans solved so far
SNIP_API double      snip_solve_seconds(const snip *);  // time of the last solve
SNIP_API int         snip_layers(const snip *);
SNIP_API snip_status snip_layer(const snip *, int layer, snip_layer_info *);
SNIP_API double      snip_share(const snip *, snip_format);     // share of the linear layers' FLOPs planned in a format
SNIP_API const char *snip_message(const snip *);        // one line on the last call of this session that returned an error, "" if none
SNIP_API const char *snip_reason(const snip *);         // "step N: ..." on the last plan, kept plan, spike or drift and why; "" before the first

SNIP_API snip_status snip_plan_print(const snip *, FILE *);     // table: blocks x kinds, one mark per GEMM
SNIP_API snip_status snip_plan_save(snip *, const char *path);  // the formats in force, a fall back's too; text, a file written aside, then renamed; a device, pipe or link as it is
SNIP_API snip_status snip_plan_load(snip *, const char *path);  // refused whole unless every layer matches
// Plan, counters and averages: with the same batches a restored session goes on bit for bit. Refused within a step. Load after all layers
// have been added; desc, bindings, mode and snip_allow are not in it.
SNIP_API size_t      snip_state_size(const snip *);
SNIP_API snip_status snip_state_save(const snip *, void *state);
SNIP_API snip_status snip_state_load(snip *, const void *state, size_t size);

#ifdef __cplusplus
}
#endif
#endif // SNIP_H

// ================= END OF THE API. You need not read further to use the library. =====================
#if defined(SNIP_IMPLEMENTATION) && !defined(SNIP_IMPLEMENTATION_DONE)
#define SNIP_IMPLEMENTATION_DONE

// clang-format on
#include <errno.h>
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

static int snipi_nonfinite_f64(double x) {
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
    int mantissa, bias, sign;
    uint32_t largest, nan;
    float max;
    int emax;
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

// beyond: what every code above the largest becomes; 0: the largest.
SNIPI_HD static uint8_t snipi_encode(float x, snip_format format, uint32_t beyond) {
    snipi_element e = snipi_element_of(format);
    uint32_t u = snipi_bits(x), a = u & 0x7FFFFFFFu, code;
    if (a > 0x7F800000u) return (uint8_t)e.nan;
    code = snipi_encode_nearest(a, e.mantissa, e.bias);
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
    const snipi_noise *q = (const snipi_noise *)arg;
    int64_t g, i0, groups = snipi_ceil_div(q->n, SNIPI_GROUP_SIGNS), end = groups * (c + 1) / SNIPI_CHUNKS;
    for (g = groups * c / SNIPI_CHUNKS; g < end; g++) {
        uint32_t words[4 * SNIPI_GROUP];
        float noise[SNIPI_SIGNS];
        int b, j;
        snipi_group_signs(q->key, (uint64_t)g * SNIPI_GROUP, words);
        for (b = 0, i0 = g * SNIPI_GROUP_SIGNS; b < SNIPI_GROUP && i0 < q->n; b++, i0 += SNIPI_SIGNS) {
            int m = (int)snipi_min(SNIPI_SIGNS, q->n - i0);
            snipi_sign_block(q->flip, words + 4 * b, q->shape ? q->shape + i0 : NULL, q->scale, 0, m, noise);
            for (j = 0; j < m; j++) q->out[i0 + j] = q->x[i0 + j] + noise[j];
        }
    }
}

static snipi_noise snipi_noise_of(float *out, const float *x, int64_t n, float scale, const float *shape,
                                  snip_rng_key key) {
    snipi_noise q;
    q.out = out;
    q.x = x;
    q.shape = shape;
    q.n = n;
    q.scale = scale;
    q.key = key;
    q.flip = snipi_flip_of(SNIP_ISA_BEST);
    return q;
}

SNIP_API snip_status snip_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                    snip_rng_key key) {
    snipi_noise q = snipi_noise_of(out, x, n, scale, shape, key);
    if (n < 0 || (n > 0 && (!out || !x))) return SNIP_BAD_ARGUMENT;
    snipi_share(snipi_noise_add_chunk, &q, SNIPI_CHUNKS, n);
    return SNIP_OK;
}

static void snipi_noise_dot_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const snipi_noise *q = (const snipi_noise *)sum->of;
    int64_t g, i0, groups = snipi_ceil_div(q->n, SNIPI_GROUP_SIGNS), end = groups * (c + 1) / SNIPI_CHUNKS;
    double part = 0;
    for (g = groups * c / SNIPI_CHUNKS; g < end; g++) {
        uint32_t words[4 * SNIPI_GROUP];
        float terms[SNIPI_SIGNS], lanes[16];
        int b, i, j;
        snipi_group_signs(q->key, (uint64_t)g * SNIPI_GROUP, words);
        for (b = 0, i0 = g * SNIPI_GROUP_SIGNS; b < SNIPI_GROUP && i0 < q->n; b++, i0 += SNIPI_SIGNS) {
            int m = (int)snipi_min(SNIPI_SIGNS, q->n - i0);
            snipi_sign_block(q->flip, words + 4 * b, q->x + i0, 1.0f, 0, m, terms);
            for (j = 0; q->out && j < m; j++) q->out[i0 + j] += q->x[i0 + j];
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
    snipi_noise q = snipi_noise_of(to, x, n, 1, NULL, key);
    snipi_sum sum;
    sum.of = &q;
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
    const snipi_noise *q = (const snipi_noise *)arg;
    int64_t b, blocks = snipi_ceil_div(q->n, 4), end = blocks * (c + 1) / SNIPI_CHUNKS;
    for (b = blocks * c / SNIPI_CHUNKS; b < end; b++) {
        float noise[4];
        int j, m = (int)snipi_min(4, q->n - 4 * b);
        snip_gauss(q->key, (uint64_t)b, noise);
        for (j = 0; j < m; j++) noise[j] *= q->shape ? q->scale * q->shape[4 * b + j] : q->scale;
        SNIPI_ROUNDED(noise);
        for (j = 0; j < m; j++) q->out[4 * b + j] = q->x[4 * b + j] + noise[j];
    }
}

SNIP_API snip_status snip_gauss_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                    snip_rng_key key) {
    snipi_noise q = snipi_noise_of(out, x, n, scale, shape, key);
    if (n < 0 || (n > 0 && (!out || !x))) return SNIP_BAD_ARGUMENT;
    snipi_share(snipi_gauss_add_chunk, &q, SNIPI_CHUNKS, n);
    return SNIP_OK;
}

static void snipi_gauss_dot_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const snipi_noise *q = (const snipi_noise *)sum->of;
    int64_t b, blocks = snipi_ceil_div(q->n, 4), end = blocks * (c + 1) / SNIPI_CHUNKS;
    double part = 0;
    for (b = blocks * c / SNIPI_CHUNKS; b < end; b++) {
        float noise[4];
        int j, m = (int)snipi_min(4, q->n - 4 * b);
        snip_gauss(q->key, (uint64_t)b, noise);
        for (j = 0; j < m; j++) part += (double)q->x[4 * b + j] * (double)noise[j];
    }
    sum->part[c] = part;
}

SNIP_API snip_status snip_gauss_dot(const float *x, int64_t n, snip_rng_key key, double *dot) {
    snipi_noise q = snipi_noise_of(NULL, x, n, 1, NULL, key);
    snipi_sum sum;
    if (n < 0 || !dot || (n > 0 && !x)) return SNIP_BAD_ARGUMENT;
    sum.of = &q;
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
    const snipi_hadamard *q = (const snipi_hadamard *)arg;
    const int block = q->block;
    int64_t r, c, end = q->rows * (chunk + 1) / SNIPI_CHUNKS;
    for (r = q->rows * chunk / SNIPI_CHUNKS; r < end; r++) {
        uint32_t signs[4] = { 0, 0, 0, 0 };
        for (c = 0; c < q->cols; c += block) {
            float v[2][SNIPI_SIGNS];
            float *from = v[0], *to = v[1], *row = q->x + r * q->ld + c, *swap;
            int first = (int)(c % SNIPI_SIGNS), half = block / 2, stage, j;
            if (first == 0) snip_philox(q->key, (uint64_t)(c / SNIPI_SIGNS), signs);
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
            for (j = 0; j < block; j++) row[j] = snipi_signed(from[j] * q->scale, signs, first + j);
        }
    }
}

SNIP_API snip_status snip_hadamard(float *x, int64_t rows, int64_t cols, int64_t ld, int block, snip_rng_key key) {
    snipi_hadamard q;
    if (block != 16 && block != 32 && block != 64 && block != 128) return SNIP_BAD_ARGUMENT;
    if (!snipi_shape_ok(rows, cols, ld) || cols % block || (rows > 0 && cols > 0 && !x)) return SNIP_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return SNIP_OK;
    q.x = x;
    q.rows = rows;
    q.cols = cols;
    q.ld = ld;
    q.block = block;
    q.key = key;
    q.scale = block == 16 ? 0.25f : block == 32 ? 0.17677669529663689f : block == 64 ? 0.125f : 0.088388347648318441f;
    snipi_share(snipi_hadamard_chunk, &q, SNIPI_CHUNKS, rows * cols);
    return SNIP_OK;
}

// >>quantize-impl ----------------------------------------------------------------------------------
// One driver serves quantize, its transpose and fake quantize: a logical [rows][cols] matrix over a source that
// may be transposed or BF16, walked tile by tile: amax, scale, then runs of at most SNIPI_RUN elements. What a
// run does is written down in snipi_run_scalar; >>simd has the same, bit for bit, for finite runs of ordinary size.
enum {
    SNIPI_RUN = 128,
    SNIPI_PANEL_ROWS = 64,
    SNIPI_PANEL_LD = SNIPI_RUN + 16,
    SNIPI_BATCH = 16,
    SNIPI_LANES = 8,
    SNIPI_STREAM = 1 << 23
};

enum {
    SNIPI_BAND = 2 * SNIPI_RUN,
    SNIPI_AHEAD_STRIP = 8192,
    SNIPI_AHEAD_ROWS = 48
};  // bytes and rows of a block that load while others are coded

// Sums over a run are taken in units of its scale, in float, element i in lane i % 16; then in double, by lane
// modulo 8. The order is part of the specification: sums are the same bits for every instruction set.
typedef struct {
    double sum_sq[SNIPI_LANES], err_sq[SNIPI_LANES], dot[SNIPI_LANES];
    uint32_t amax;
    int64_t nonfinite, saturated;
} snipi_tally;

typedef struct {
    snip_format format;
    snipi_element e;
    const float *lut;  // value of each code

    struct {
        int32_t least, cap, beyond, magic, unit, shift, sign_shift, sign, random_shift, power[32];
    } k;  // for >>simd, bits of floats

    const float *x, *weight;  // weight may be NULL
    int n;
    float scale, inverse;
    int low;                 // take x as x * 2^64
    int exact;               // the sums in double, of x itself: where units of the scale could overflow
    const uint32_t *random;  // a word per element, or NULL: to nearest
    uint8_t *codes;          // may be NULL; `packed`: two to a byte
    int packed, stream;      // stream: past the caches, where alignment allows
    float *values;           // may be NULL
    snipi_tally *tally;
    int want_sums, stochastic;
} snipi_run;

// Runs side by side: `pieces` times `length` elements (a multiple of 64), a fold of the sums every `width` of them (16,
// 32, 64 or 128; a piece's last may be 64), all of one scale or each of its own.
enum { SNIPI_STRIP = 2048, SNIPI_STRIP_TILES = SNIPI_STRIP / 16 };

typedef struct {
    const float *x, *weight;  // and the rest as in snipi_run, which has what all have in common
    const uint32_t *random;
    uint8_t *codes;
    float *values;
    snipi_tally *tally;
    int64_t length, x_stride, code_stride, value_stride, random_stride;
    int pieces, width, one_scale, capped;  // capped: some may lie beyond the largest
    const float *scale, *inverse;
    const char
        *ahead;  // what is read next, `length` elements of `ahead_size` bytes, `ahead_stride` bytes from piece to piece
    int64_t ahead_size, ahead_stride;
    snip_rng_key key;  // stochastic, if random is NULL: x[0] is element 4 * first, pieces are 4 * step apart
    uint64_t first, step;
} snipi_strip;

// A block of SNIPI_RUN x `cols` floats (a multiple of 16), quantized by columns: logical row c is column c.
typedef struct {
    const float *x;                // [SNIPI_RUN][SNIPI_PANEL_LD]
    int cols, height, capped;      // height: rows to a tile, 16, 32, 64 or 128
    const float *scale, *inverse;  // [SNIPI_RUN / height][SNIPI_RUN]
    uint8_t *codes;
    int64_t code_stride;
    snipi_tally *tally;
    snip_rng_key key;  // stochastic: 4 * (first + c * step + r / 4) is the element's index
    uint64_t first, step;
    const char *ahead;  // what is read next: SNIPI_RUN rows of 512 bytes
    int64_t ahead_stride;
    int ahead_rows;  // as many of them as the caches can hold
} snipi_columns;

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
    // The rest may be NULL; where they do not apply, run does the work. All elements finite.
    void (*peaks)(const snipi_strip *,
                  uint32_t *amax);  // largest magnitude's bits of each tile; fills up to a multiple of 16
    int (*scales)(snip_scale, const snipi_run *, float tensor_scale, float tensor_inverse, const uint32_t *amax,
                  int tiles, float *scale, float *inverse, uint8_t *bytes);
    void (*strip)(const snipi_run *, const snipi_strip *);
    // SNIPI_BATCH rows of a block from r0, a multiple of 16 columns, from x[at]; amax[i][c]: of rows [i * height, (i +
    // 1) * height) of column c.
    void (*copy)(const void *x, int bf16, int64_t at, int64_t ld, int r0, int cols, int height, float *block,
                 uint32_t *amax);
    void (*columns)(const snipi_run *, const snipi_columns *);
} snipi_vector;

static const snipi_vector *snipi_vector_of(snip_isa isa);

typedef struct {
    snip_recipe recipe;
    const void *x;
    const float *weight;
    int x_bf16, out_bf16, transposed;  // transposed: logical (r, c) lies at x[c * ld + r]
    int64_t rows, cols, ld;
    int64_t tile_rows, tile_cols, tiles_down, tiles_across;
    int tile_shift;              // tile_cols is 1 << tile_shift, if a power of two
    void *codes, *scales, *out;  // each may be NULL; out: dequantized values
    int64_t ld_out;
    float tensor_scale, tensor_inverse;  // NVFP4's 1/S and S
    snip_rng_key key;
    int want_sums;
    float lut[256];
    snipi_run run;  // what all runs have in common
    const snipi_vector *vector;
} snipi_quantizer;

// Float to double and back through integers where the float is subnormal: hardware may be set to flush those
// (-Ofast does). Of finite x >= 0; narrowing rounds to nearest even and stops at the largest float.
SNIPI_HD static double snipi_widen(float x) {
    uint32_t u = snipi_bits(x);
    return u >= 0x00800000u ? (double)x : (double)(int32_t)u * 1.40129846432481707e-45;
}

SNIPI_HD static float snipi_narrow(double x) {
    double sum = x + 6.3108872417680944e-30;  // 2^-97: the last place of the sum is 2^-149
    uint64_t u;
    memcpy(&u, &sum, 8);
    if (x < 1.1754943508222875e-38) return snipi_float((uint32_t)u);
    return x > 3.4028234663852886e38 ? 3.4028234663852886e38f : (float)x;
}

// Division that -Ofast (reciprocals) cannot touch: the divisor is hidden from it. Rounding the double quotient of
// two floats to float is the correctly rounded float quotient (53 >= 2*24 + 2).
SNIPI_HD static float snipi_divide(float a, float b) {
    double y = snipi_widen(b);
    SNIPI_HIDDEN(y);
    return snipi_narrow(snipi_widen(a) / y);
}

SNIPI_HD static float snipi_multiply(float a, float b) { return snipi_narrow(snipi_widen(a) * snipi_widen(b)); }

// scale * element: no element is smaller than 2^-16.
SNIPI_HD SNIPI_INLINE float snipi_value(float scale, float element) {
    uint32_t u = snipi_bits(element);
    if (snipi_bits(scale) >= (127u - 100u) << 23 || snipi_nonfinite(element)) return scale * element;
    return snipi_float(snipi_bits(snipi_multiply(scale, snipi_float(u & 0x7FFFFFFFu))) | (u & 0x80000000u));
}

typedef struct {
    float scale, inverse;
    int byte;
} snipi_tile_scale;  // byte: the stored code, if any

// tensor_scale, tensor_inverse: NVFP4's 1/S and S.
SNIPI_HD static snipi_tile_scale snipi_scale_of(snip_scale kind, snipi_element e, uint32_t amax_bits,
                                                float tensor_scale, float tensor_inverse) {
    const float smallest = snipi_float(0x00800000u);  // 2^-126
    float amax = snipi_float(amax_bits);
    snipi_tile_scale t = { 1.0f, 1.0f, 0 };
    uint32_t a = amax_bits, max_bits = snipi_bits(e.max);
    // exponent(amax) - emax, one more if amax's mantissa exceeds max's: the least k with amax <= max * 2^k
    int k = a < 0x00800000u ? -200 : (int)(a >> 23) - 127 - e.emax, up = (a & 0x7FFFFFu) > (max_bits & 0x7FFFFFu);
    switch (kind) {
        case SNIP_SCALE_NONE: break;
        case SNIP_SCALE_F32:
            if (a == 0) break;
            if (a >= max_bits - (126u << 23)) {  // amax >= max * 2^-126: a normal scale
                t.scale = snipi_divide(amax, e.max);
                t.inverse = snipi_divide(e.max, amax);
            } else {
                t.scale = smallest;
                t.inverse = snipi_float((126u + 127u) << 23);
            }
            break;
        case SNIP_SCALE_POW2:
            if (a == 0) break;
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
        case SNIP_SCALE_UE4M3: {
            float sixth = snipi_float(0x3E2AAAABu);  // 1/6 in float32
            t.byte = snipi_ue4m3_encode(snipi_multiply(amax, tensor_inverse * sixth));
            t.scale = snipi_multiply(snipi_decode((uint32_t)t.byte, SNIP_E4M3), tensor_scale);
            t.inverse = snipi_bits(t.scale) == 0 ? 3.4028234663852886e38f : snipi_divide(1.0f, t.scale);
            break;
        }
    }
    return t;
}

// x * 2^64, at most FLT_MAX, in integers: for tiles near or below the smallest normal float.
SNIPI_HD static float snipi_raise(float x) {
    uint32_t u = snipi_bits(x), sign = u & 0x80000000u, a = u & 0x7FFFFFFFu, shift = 0;
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
                                  uint8_t *code) {
    int i, over = 0;
    for (i = 0; i < n; i++) {
        uint32_t u = snipi_bits(x[i] * inverse), a = u & 0x7FFFFFFFu,
                 finite = (snipi_bits(x[i]) & 0x7F800000u) != 0x7F800000u;
        uint32_t c = random ? snipi_encode_stochastic(a, random[i], e.mantissa, e.bias)
                            : snipi_encode_nearest(a, e.mantissa, e.bias);
        over += (int)(finite & (c > e.largest));
        c = (c < e.largest ? c : e.largest) | (u >> 31) << e.sign;
        code[i] = (uint8_t)(a > 0x7F800000u ? e.nan : c);
    }
    return over;
}

static int snipi_encode_run_any(const snipi_run *q, const float *x, int n, const uint32_t *random, uint8_t *code) {
    switch (q->format) {  // constant formats, so that each loop is compiled for its own
        case SNIP_E4M3:
            return random ? snipi_encode_run(x, n, q->inverse, random, snipi_element_of(SNIP_E4M3), code)
                          : snipi_encode_run(x, n, q->inverse, NULL, snipi_element_of(SNIP_E4M3), code);
        case SNIP_E2M1:
            return random ? snipi_encode_run(x, n, q->inverse, random, snipi_element_of(SNIP_E2M1), code)
                          : snipi_encode_run(x, n, q->inverse, NULL, snipi_element_of(SNIP_E2M1), code);
        case SNIP_E5M2:
        case SNIP_E2M3:
        case SNIP_E3M2: return snipi_encode_run(x, n, q->inverse, random, q->e, code);
        case SNIP_F32:
        case SNIP_BF16:
        case SNIP_UE8M0:
        case SNIP_UE4M3: break;
    }
    return 0;
}

static void snipi_store_codes(uint8_t *row, int packed, int64_t col, const uint8_t *code, int n) {
    int i = 0;
    if (!packed) {
        memcpy(row + col, code, (size_t)n);
        return;
    }
    if (col & 1) {
        row[col >> 1] = (uint8_t)((row[col >> 1] & 15) | code[0] << 4);
        i = 1;
    }
    for (; i + 1 < n; i += 2) row[(col + i) >> 1] = (uint8_t)(code[i] | code[i + 1] << 4);
    if (i < n) row[(col + i) >> 1] = code[i];
}

// |x|^2, |Q(x) - x|^2 and <w, Q(x) - x> of x itself, in double; values = Q(x).
static void snipi_sums_exact(const float *x, const float *values, const float *weight, int n, snipi_tally *t) {
    int i;
    for (i = 0; i < n; i++) {
        int finite = !snipi_nonfinite(x[i]), lane = i % SNIPI_LANES;
        double v = finite ? (double)x[i] : 0, d = finite ? (double)(values[i] - x[i]) : 0;
        t->sum_sq[lane] += v * v;
        t->err_sq[lane] += d * d;
        if (weight) t->dot[lane] += (double)weight[i] * d;
    }
}

// The same in units of the scale: y = x / scale, q = Q(x) / scale. Each product is rounded before it is added.
static void snipi_sums_scaled(const snipi_run *r, const float *y, const float *q) {
    float v2[SNIPI_RUN], d2[SNIPI_RUN], sum_sq[2 * SNIPI_LANES] = { 0 }, err_sq[2 * SNIPI_LANES] = { 0 };
    double dot[SNIPI_LANES] = { 0 }, scaled[3][SNIPI_LANES], square = (double)r->scale * (double)r->scale;
    int i;
    for (i = 0; i < r->n; i++) {
        float d = q[i] - y[i];
        v2[i] = y[i] * y[i];
        d2[i] = d * d;
        if (r->weight) dot[i % SNIPI_LANES] += (double)r->weight[i] * (double)d;
    }
    SNIPI_ROUNDED(v2);
    SNIPI_ROUNDED(d2);
    for (i = 0; i < r->n; i++) {
        sum_sq[i % (2 * SNIPI_LANES)] += v2[i];
        err_sq[i % (2 * SNIPI_LANES)] += d2[i];
    }
    for (i = 0; i < SNIPI_LANES; i++) {
        scaled[0][i] = ((double)sum_sq[i] + (double)sum_sq[i + SNIPI_LANES]) * square;
        scaled[1][i] = ((double)err_sq[i] + (double)err_sq[i + SNIPI_LANES]) * square;
        scaled[2][i] = dot[i] * (double)r->scale;
    }
    SNIPI_ROUNDED(scaled);
    for (i = 0; i < SNIPI_LANES; i++) {
        r->tally->sum_sq[i] += scaled[0][i];
        r->tally->err_sq[i] += scaled[1][i];
        r->tally->dot[i] += scaled[2][i];
    }
}

// The specification of a run.
static void snipi_run_scalar(const snipi_run *q) {
    float values[SNIPI_RUN], other[SNIPI_RUN];
    const float *x = q->x;
    uint8_t code[SNIPI_RUN];
    int i, n = q->n;
    if (q->low) {
        for (i = 0; i < n; i++) other[i] = snipi_raise(q->x[i]);
        x = other;
    }
    q->tally->saturated += snipi_encode_run_any(q, x, n, q->random, code);
    if (q->codes) snipi_store_codes(q->codes, q->packed, 0, code, n);
    if (q->want_sums && !q->exact) {
        for (i = 0; i < n; i++) {
            other[i] = q->x[i] * q->inverse;
            values[i] = q->lut[code[i]];
        }
        SNIPI_ROUNDED(other);
        snipi_sums_scaled(q, other, values);
    }
    if (!q->values && !(q->want_sums && q->exact)) return;
    for (i = 0; i < n; i++) values[i] = snipi_value(q->scale, q->lut[code[i]]);
    SNIPI_ROUNDED(values);
    if (q->want_sums && q->exact) snipi_sums_exact(q->x, values, q->weight, n, q->tally);
    if (q->values) memcpy(q->values, values, (size_t)n * sizeof(float));
}

static uint32_t snipi_amax_scalar(const float *x, int n, int64_t *nonfinite) {
    int i, bad = 0;
    uint32_t largest = 0;
    for (i = 0; i < n; i++) {
        uint32_t a = snipi_bits(x[i]) & 0x7FFFFFFFu, finite = a < 0x7F800000u ? a : 0;
        bad += a >= 0x7F800000u;
        largest = largest > finite ? largest : finite;
    }
    *nonfinite += bad;
    return largest;
}

static void snipi_philox_scalar(snip_rng_key key, uint64_t first, int blocks, uint32_t *out) {
    int i;
    for (i = 0; i < blocks; i++) snip_philox(key, first + (uint64_t)i, out + 4 * i);
}

static int snipi_one_upper(uint64_t first, int64_t blocks) {  // the counters' upper half is the same
    return (uint32_t)first + (uint64_t)blocks + 16 <= 0xFFFFFFFFu;
}

static void snipi_transpose_scalar(const float *x, int64_t ld, int rows, int cols, float *out, int64_t ld_out) {
    int r, c;
    for (r = 0; r < rows; r++)
        for (c = 0; c < cols; c++) out[c * ld_out + r] = x[r * ld + c];
}

static void snipi_widen_scalar(const uint16_t *x, int n, float *out) {
    int i;
    for (i = 0; i < n; i++) out[i] = snipi_float((uint32_t)x[i] << 16);
}

static void snipi_narrow_scalar(const float *x, int n, uint16_t *out) {
    int i;
    for (i = 0; i < n; i++) out[i] = (uint16_t)snipi_bf16_round(snipi_bits(x[i]));
}

static void snipi_decode_scalar(snip_format format, const float *lut, const uint8_t *codes, int n, float scale,
                                float *out, int stream) {
    int i, packed = format == SNIP_E2M1;
    (void)stream;
    for (i = 0; i < n; i++) out[i] = snipi_value(scale, lut[packed ? codes[i >> 1] >> (i & 1) * 4 & 15 : codes[i]]);
}

// Elements of a source or weight as contiguous floats: where they lie, widened, or out of a transposed panel,
// which is kept until another one is asked for.
typedef struct {
    int64_t row, col;
    int n;
    float at[SNIPI_PANEL_ROWS][SNIPI_PANEL_LD];
} snipi_panel;

static const float *snipi_fetch_panel(const snipi_quantizer *q, snipi_panel *p, const void *x, int bf16, int64_t r,
                                      int64_t c, int n) {
    int64_t row = q->transposed ? r - r % SNIPI_PANEL_ROWS : r;
    if (p->row != row || p->col != c || p->n != n) {
        int i, width = (int)snipi_min(SNIPI_PANEL_ROWS, q->rows - row);
        p->row = row;
        p->col = c;
        p->n = n;
        if (!q->transposed)
            q->vector->widen((const uint16_t *)x + r * q->ld + c, n, p->at[0]);
        else if (bf16)
            for (i = 0; i < n; i += 8) {
                float wide[8][SNIPI_PANEL_ROWS];
                int j, m = (int)snipi_min(8, n - i);
                for (j = 0; j < m; j++)
                    q->vector->widen((const uint16_t *)x + (c + i + j) * q->ld + row, width, wide[j]);
                q->vector->transpose(wide[0], SNIPI_PANEL_ROWS, m, width, p->at[0] + i, SNIPI_PANEL_LD);
            }
        else
            q->vector->transpose((const float *)x + c * q->ld + row, q->ld, n, width, p->at[0], SNIPI_PANEL_LD);
    }
    return p->at[r - row];
}

SNIPI_INLINE const float *snipi_fetch(const snipi_quantizer *q, snipi_panel *p, const void *x, int bf16, int64_t r,
                                      int64_t c, int n) {
    return q->transposed || bf16 ? snipi_fetch_panel(q, p, x, bf16, r, c, n) : (const float *)x + r * q->ld + c;
}

typedef struct {
    snipi_panel x, weight;
} snipi_panels;

SNIPI_HD static int snipi_byte_scale(snip_scale s) {
    return s == SNIP_SCALE_UE8M0 || s == SNIP_SCALE_UE8M0_UP || s == SNIP_SCALE_UE4M3;
}

static size_t snipi_row_bytes(snip_format format, int64_t cols) {
    return format == SNIP_E2M1 ? (size_t)(cols / 2 + (cols & 1))
                               : (size_t)cols * (size_t)(snip_format_bits(format) / 8);
}

static int snipi_has_sums_in_units(const snipi_quantizer *q, uint32_t amax, const snipi_tile_scale *t) {
    if (q->recipe.scale == SNIP_SCALE_NONE)
        return amax == 0 || (amax >= (127u - 40u) << 23 && amax <= (127u + 40u) << 23);
    return amax == 0 || (amax >= (127u - 64u) << 23 && snipi_bits(t->scale) != 0);
}

// The words of elements [c, c + n) of row r; `random` has room for n + 64.
static const uint32_t *snipi_random_run(const snipi_quantizer *q, int64_t r, int64_t c, int64_t n, uint32_t *random) {
    uint64_t element = (uint64_t)r * (uint64_t)q->cols + (uint64_t)c, first = element >> 2;
    q->vector->philox(q->key, first, (int)(((element + (uint64_t)n + 3) >> 2) - first), random);
    return random + (element & 3);
}

static uint8_t *snipi_codes_at(const snipi_quantizer *q, int64_t r, int64_t c) {
    if (!q->codes) return NULL;
    return (uint8_t *)q->codes + (size_t)r * snipi_row_bytes(q->recipe.format, q->cols) +
           (q->recipe.format == SNIP_E2M1 ? c >> 1 : c);
}

static void snipi_store_scale(const snipi_quantizer *q, int64_t at, const snipi_tile_scale *t) {
    if (!q->scales || q->recipe.scale == SNIP_SCALE_NONE) return;
    if (snipi_byte_scale(q->recipe.scale))
        ((uint8_t *)q->scales)[at] = (uint8_t)t->byte;
    else
        ((float *)q->scales)[at] = t->scale;
}

// Codes of a tile whose scale is known; `run` is a copy of q->run.
static void snipi_encode_tile(const snipi_quantizer *q, snipi_panels *p, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                              uint32_t amax, int64_t bad, const snipi_tile_scale *t, snipi_run *run) {
    int e2m1 = q->recipe.format == SNIP_E2M1, stochastic = q->recipe.rounding == SNIP_ROUND_STOCHASTIC,
        exact = !snipi_has_sums_in_units(q, amax, t);
    int strips = q->vector->strip && !q->transposed && !exact && !bad && !(q->out && q->out_bf16) &&
                 !(e2m1 && (c0 & 1));
    float buffer[SNIPI_RUN];
    uint8_t loose[SNIPI_RUN];
    uint32_t random[SNIPI_STRIP + 64];
    int64_t r, c, n;
    if (q->transposed && c1 - c0 > SNIPI_RUN) {  // by what a panel holds, each transposed once
        for (r = r0; r < r1; r += SNIPI_PANEL_ROWS)
            for (c = c0; c < c1; c += SNIPI_RUN)
                snipi_encode_tile(q, p, r, snipi_min(r1, r + SNIPI_PANEL_ROWS), c, snipi_min(c1, c + SNIPI_RUN), amax,
                                  bad, t, run);
        return;
    }
    run->scale = t->scale;
    // Here a subnormal x could still matter to the code, and x * inverse would lose it.
    run->low = q->recipe.scale != SNIP_SCALE_NONE && exact;
    run->inverse = run->low ? t->inverse * snipi_float((127u - 64u) << 23) : t->inverse;
    for (r = r0; r < r1; r++)
        for (c = c0; c < c1; c += n) {
            int aside = e2m1 && (c & 1);  // does not begin on a byte
            int64_t bad_here = 0;
            n = strips && c1 - c >= SNIPI_RUN ? snipi_min(SNIPI_STRIP, (c1 - c) / SNIPI_RUN * SNIPI_RUN)
                                              : snipi_min(SNIPI_RUN, c1 - c);
            run->x = snipi_fetch(q, &p->x, q->x, q->x_bf16, r, c, (int)n);
            if (q->weight) run->weight = snipi_fetch(q, &p->weight, q->weight, 0, r, c, (int)n);
            run->n = (int)n;
            if (stochastic) run->random = snipi_random_run(q, r, c, n, random);
            run->packed = e2m1 && !aside;
            run->codes = q->codes && aside ? loose : snipi_codes_at(q, r, c);
            run->values = !q->out ? NULL : q->out_bf16 ? buffer : (float *)q->out + r * q->ld_out + c;
            if (strips && n % SNIPI_RUN == 0) {
                snipi_strip strip;
                memset(&strip, 0, sizeof strip);
                strip.x = run->x;
                strip.weight = run->weight;
                strip.random = run->random;
                strip.codes = run->codes;
                strip.values = run->values;
                strip.tally = run->tally;
                strip.pieces = stochastic || q->x_bf16 || n < c1 - c0 ? 1 : (int)snipi_min(r1 - r, SNIPI_RUN);
                strip.length = n;
                strip.width = SNIPI_RUN;
                strip.x_stride = q->ld;
                strip.code_stride = (int64_t)snipi_row_bytes(q->recipe.format, q->cols);
                strip.value_stride = q->ld_out;
                strip.one_scale = strip.capped = 1;
                strip.scale = &t->scale;
                strip.inverse = &t->inverse;
                strip.ahead = (const char *)run->x + SNIPI_AHEAD_STRIP;
                strip.ahead_size = 4;
                strip.ahead_stride = 4 * q->ld;
                q->vector->strip(run, &strip);
                r += strip.pieces - 1;
                continue;
            }
            if (bad) (void)q->vector->amax(run->x, (int)n, &bad_here);
            run->exact = exact || bad_here;
            if (run->exact)
                snipi_run_scalar(run);
            else
                q->vector->run(run);
            if (aside && q->codes)
                snipi_store_codes((uint8_t *)q->codes + (size_t)r * snipi_row_bytes(q->recipe.format, q->cols), 1, c,
                                  loose, (int)n);
            if (q->out_bf16 && q->out) q->vector->narrow(buffer, (int)n, (uint16_t *)q->out + r * q->ld_out + c);
        }
}

// `count` tiles, at most SNIPI_BATCH, from (tr, tc) rightward or downward. All largest magnitudes come before all
// scales before all codes, so that one tile's divisions do not hold up the next.
static void snipi_quantize_tiles(const snipi_quantizer *q, snipi_panels *p, int64_t tr, int64_t tc, int count, int down,
                                 snipi_tally *tally) {
    struct {
        int64_t r0, r1, c0, c1, bad;
        uint32_t amax;
        snipi_tile_scale scale;
    } tile[SNIPI_BATCH], *t;

    snipi_run run = q->run;
    int i;
    run.tally = tally;
    for (i = 0, t = tile; i < count; i++, t++) {
        int64_t r, c, top, deep = q->transposed ? SNIPI_PANEL_ROWS : 1;
        t->r0 = (tr + (down ? i : 0)) * q->tile_rows;
        t->c0 = (tc + (down ? 0 : i)) * q->tile_cols;
        t->r1 = snipi_min(q->rows, t->r0 + q->tile_rows);
        t->c1 = snipi_min(q->cols, t->c0 + q->tile_cols);
        t->bad = 0;
        t->amax = 0;
        for (top = t->r0; top < t->r1; top += deep)
            for (c = t->c0; c < t->c1; c += SNIPI_RUN)
                for (r = top; r < snipi_min(t->r1, top + deep); r++) {
                    int n = (int)snipi_min(SNIPI_RUN, t->c1 - c);
                    uint32_t a = q->vector->amax(snipi_fetch(q, &p->x, q->x, q->x_bf16, r, c, n), n, &t->bad);
                    t->amax = a > t->amax ? a : t->amax;
                }
        tally->nonfinite += t->bad;
        if (t->amax > tally->amax) tally->amax = t->amax;
    }
    for (i = 0, t = tile; i < count; i++, t++) {
        t->scale = snipi_scale_of(q->recipe.scale, q->run.e, t->amax, q->tensor_scale, q->tensor_inverse);
        snipi_store_scale(q, (tr + (down ? i : 0)) * q->tiles_across + tc + (down ? 0 : i), &t->scale);
    }
    for (i = 0, t = tile; i < count; i++, t++)
        snipi_encode_tile(q, p, t->r0, t->r1, t->c0, t->c1, t->amax, t->bad, &t->scale, &run);
}

static int snipi_beyond(const snipi_quantizer *q, uint32_t amax, float inverse) {
    return snipi_bits(snipi_float(amax) * inverse) >
           (q->recipe.rounding == SNIP_ROUND_STOCHASTIC ? snipi_bits(q->run.e.max) : (uint32_t)q->run.k.beyond);
}

// Whether a tile's largest element may come out beyond the largest of the format.
static int snipi_may_pass(const snipi_quantizer *q) {
    switch (q->recipe.scale) {
        case SNIP_SCALE_POW2:
        case SNIP_SCALE_UE8M0_UP: return 0;
        case SNIP_SCALE_F32: return q->recipe.rounding == SNIP_ROUND_STOCHASTIC;  // by a rounding of x * inverse
        case SNIP_SCALE_NONE:
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE4M3: break;
    }
    return 1;
}

// Where the source lies that is read after rows [r, r + rows) of a block's columns from c.
static const char *snipi_ahead(const snipi_quantizer *q, int64_t r, int64_t c, int64_t rows) {
    int64_t next = (r + rows) % SNIPI_BAND ? r + rows : r - r % SNIPI_BAND;
    return (const char *)q->x + (next * q->ld + c + (next > r ? 0 : SNIPI_RUN)) * (q->x_bf16 ? 2 : 4);
}

// Tiles side by side, from (r, c): `pieces` rows of x of `length` elements; `ahead` is read next. 0: not such as strips
// are for.
static int snipi_quantize_strip(const snipi_quantizer *q, const float *x, int64_t x_stride, int64_t r, int64_t c,
                                int pieces, int64_t length, const char *ahead, snipi_tally *tally) {
    uint32_t amax[SNIPI_STRIP_TILES], random[SNIPI_STRIP + 64 * SNIPI_BATCH], most = 0;
    float scale[SNIPI_STRIP_TILES], inverse[SNIPI_STRIP_TILES];
    uint8_t byte[SNIPI_STRIP_TILES];
    int across = (int)snipi_ceil_div(length, q->tile_cols), tiles = pieces * across, i;
    snipi_strip strip;
    if (q->run.stochastic && pieces > 1 && (q->cols & 3)) return 0;  // the pieces' first words lie differently
    memset(&strip, 0, sizeof strip);
    strip.pieces = pieces;
    strip.length = length;
    strip.width = (int)q->tile_cols;
    strip.x_stride = x_stride;
    strip.code_stride = (int64_t)snipi_row_bytes(q->recipe.format, q->cols);
    strip.value_stride = q->ld_out;
    strip.scale = scale;
    strip.inverse = inverse;
    strip.ahead_size = q->x_bf16 ? 2 : 4;
    strip.ahead_stride = q->ld * strip.ahead_size;
    strip.ahead = ahead;
    strip.x = x;
    q->vector->peaks(&strip, amax);
    for (i = 0; i < tiles; i++) most = amax[i] > most ? amax[i] : most;
    if (most >= 0x7F800000u) return 0;
    if (q->recipe.scale == SNIP_SCALE_NONE || !q->vector->scales(q->recipe.scale, &q->run, q->tensor_scale,
                                                                 q->tensor_inverse, amax, tiles, scale, inverse, byte))
        for (i = 0; i < tiles; i++) {
            snipi_tile_scale t = snipi_scale_of(q->recipe.scale, q->run.e, amax[i], q->tensor_scale, q->tensor_inverse);
            if (!snipi_has_sums_in_units(q, amax[i], &t)) return 0;
            scale[i] = t.scale;
            inverse[i] = t.inverse;
            byte[i] = (uint8_t)t.byte;
        }
    if (snipi_may_pass(q))
        for (i = 0; i < tiles; i++) strip.capped |= snipi_beyond(q, amax[i], inverse[i]);
    if (q->scales && q->recipe.scale != SNIP_SCALE_NONE)
        for (i = 0; i < pieces; i++) {
            int64_t at = (r + i) * q->tiles_across + (c >> q->tile_shift);
            if (snipi_byte_scale(q->recipe.scale))
                memcpy((uint8_t *)q->scales + at, byte + i * across, (size_t)across);
            else
                memcpy((float *)q->scales + at, scale + i * across, (size_t)across * sizeof(float));
        }
    if (most > tally->amax) tally->amax = most;
    strip.tally = tally;
    strip.weight = q->weight ? q->weight + r * q->ld + c : NULL;
    strip.codes = snipi_codes_at(q, r, c);
    strip.values = q->out ? (float *)q->out + r * q->ld_out + c : NULL;
    strip.key = q->key;
    strip.first = ((uint64_t)r * (uint64_t)q->cols + (uint64_t)c) >> 2;
    strip.step = (uint64_t)q->cols >> 2;
    if (q->run.stochastic && (((uint64_t)r * (uint64_t)q->cols + (uint64_t)c) & 3 ||
                              !snipi_one_upper(strip.first, (int64_t)strip.step * pieces + length))) {
        strip.random_stride = length + 64;
        for (i = pieces - 1; i >= 0; i--)
            strip.random = snipi_random_run(q, r + i, c, length, random + i * strip.random_stride);
    }
    q->vector->strip(&q->run, &strip);
    return 1;
}

static int snipi_takes_strips(const snipi_quantizer *q) {
    int64_t w = q->tile_cols;
    return q->vector->strip && q->tile_rows == 1 && (w == 16 || w == 32 || w == 64 || w == SNIPI_RUN) &&
           !(q->out && q->out_bf16);
}

// Tiles [tr0, tr1) x [tc0, tc1), in batches that stay in the nearest cache: along rows, or down a transposed panel.
static void snipi_quantize_region(const snipi_quantizer *q, snipi_panels *p, int64_t tr0, int64_t tr1, int64_t tc0,
                                  int64_t tc1, snipi_tally *tally) {
    int64_t fit = snipi_min(SNIPI_BATCH, snipi_max(1, 4096 / q->tile_rows / q->tile_cols)), tr, tc, g, down;
    int64_t panel = snipi_max(1, SNIPI_PANEL_ROWS / q->tile_rows);
    if (!q->transposed) {
        int strips = snipi_takes_strips(q);
        for (tr = tr0; tr < tr1; tr += down)
            for (tc = tc0, down = 1; tc < tc1; tc += fit) {
                int64_t c = tc * q->tile_cols, left = snipi_min(tc1 * q->tile_cols, q->cols) - c,
                        n = snipi_min(SNIPI_STRIP, left) &
                            -(left <= SNIPI_STRIP && left % 64 == 0 ? 64 : snipi_max(64, q->tile_cols));
                int64_t pieces = strips && n == left && tc == tc0 && !q->x_bf16
                                     ? snipi_min(snipi_min(SNIPI_STRIP / n, SNIPI_BATCH), tr1 - tr)
                                     : 1;
                const char *x = (const char *)q->x + (tr * q->ld + c) * (q->x_bf16 ? 2 : 4);
                if (pieces > 1 && snipi_quantize_strip(q, (const float *)(const void *)x, q->ld, tr, c, (int)pieces, n,
                                                       x + pieces * q->ld * 4, tally)) {
                    down = pieces;  // short rows
                    break;
                }
                if (strips && n > 0 &&
                    snipi_quantize_strip(q, snipi_fetch(q, &p->x, q->x, q->x_bf16, tr, c, (int)n), 0, tr, c, 1, n,
                                         x + SNIPI_AHEAD_STRIP, tally))
                    tc += snipi_ceil_div(n, q->tile_cols) - fit;
                else
                    snipi_quantize_tiles(q, p, tr, tc, (int)snipi_min(fit, tc1 - tc), 0, tally);
            }
        return;
    }
    for (g = tr0; g < tr1; g += panel)
        for (tc = tc0; tc < tc1; tc++)
            for (tr = g; tr < snipi_min(tr1, g + panel); tr += fit)
                snipi_quantize_tiles(q, p, tr, tc, (int)snipi_min(snipi_min(fit, g + panel - tr), tr1 - tr), 1, tally);
}

// F32 and BF16: no scale, no tiles.
static void snipi_quantize_plain_row(const snipi_quantizer *q, snipi_panels *p, int64_t r, snipi_tally *tally) {
    float buffer[SNIPI_RUN];
    uint16_t code[SNIPI_RUN];
    int64_t c;
    for (c = 0; c < q->cols; c += SNIPI_RUN) {
        int n = (int)snipi_min(SNIPI_RUN, q->cols - c), bf16 = q->recipe.format == SNIP_BF16;
        const float *x = snipi_fetch(q, &p->x, q->x, q->x_bf16, r, c, n), *values = x;
        int64_t bad = 0;
        uint32_t amax = q->vector->amax(x, n, &bad);
        tally->nonfinite += bad;
        if (amax > tally->amax) tally->amax = amax;
        if (bf16) {
            int direct = q->codes && ((uintptr_t)q->codes & 1) == 0;
            uint16_t *to = direct ? (uint16_t *)q->codes + r * q->cols + c : code;
            q->vector->narrow(x, n, to);
            if (q->want_sums || q->out) {
                q->vector->widen(to, n, buffer);
                values = buffer;
            }
            if (q->codes && !direct)
                memcpy((uint8_t *)q->codes + 2 * (r * q->cols + c), code, (size_t)n * sizeof(uint16_t));
        } else if (q->codes)
            memcpy((uint8_t *)q->codes + 4 * (r * q->cols + c), x, (size_t)n * sizeof(float));
        if (q->want_sums)
            (bad ? snipi_sums_exact : q->vector->sums)(
                x, values, q->weight ? snipi_fetch(q, &p->weight, q->weight, 0, r, c, n) : NULL, n, tally);
        if (q->out && q->out_bf16)
            q->vector->narrow(values, n, (uint16_t *)q->out + r * q->ld_out + c);
        else if (q->out)
            memmove((float *)q->out + r * q->ld_out + c, values, (size_t)n * sizeof(float));
    }
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
    size_t tiles;
    if (!snipi_recipe_ok(r) || !snipi_shape_ok(rows, cols, cols)) return 0;
    tiles = (size_t)snipi_tiles(r, rows, cols);
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

typedef struct {
    const snipi_quantizer *q;
    uint32_t part[SNIPI_CHUNKS];
} snipi_peak;

static void snipi_peak_chunk(void *arg, int64_t c) {
    snipi_peak *peak = (snipi_peak *)arg;
    const snipi_quantizer *q = peak->q;
    int64_t rows = q->transposed ? q->cols : q->rows, cols = q->transposed ? q->rows : q->cols, r, i, ignored = 0,
            end = rows * (c + 1) / SNIPI_CHUNKS;
    float wide[SNIPI_RUN];
    uint32_t most = 0;
    for (r = rows * c / SNIPI_CHUNKS; r < end; r++)
        for (i = 0; i < cols; i += SNIPI_RUN) {
            int n = (int)snipi_min(SNIPI_RUN, cols - i);
            const float *x = (const float *)q->x + (q->x_bf16 ? 0 : r * q->ld + i);
            uint32_t a;
            if (q->x_bf16) {
                q->vector->widen((const uint16_t *)q->x + r * q->ld + i, n, wide);
                x = wide;
            }
            a = q->vector->amax(x, n, &ignored);
            most = a > most ? a : most;
        }
    peak->part[c] = most;
}

// NVFP4: S = 448 * 6 / amax of the tensor (1 for zeros), at most FLT_MAX; stored as 1/S.
static void snipi_tensor_scale(snipi_quantizer *q) {
    snipi_peak peak;
    uint32_t amax = 0;
    int c;
    peak.q = q;
    snipi_share(snipi_peak_chunk, &peak, SNIPI_CHUNKS, q->rows * q->cols);
    for (c = 0; c < SNIPI_CHUNKS; c++) amax = peak.part[c] > amax ? peak.part[c] : amax;
    q->tensor_inverse = amax ? snipi_divide(448.0f * 6.0f, snipi_float(amax)) : 1.0f;
    q->tensor_scale = snipi_divide(1.0f, q->tensor_inverse);
    if (q->scales) {
        size_t tiles = (size_t)(q->tiles_down * q->tiles_across);
        memset((uint8_t *)q->scales + tiles, 0, (4 - tiles % 4) % 4);
        memcpy(snipi_tensor_scale_at(&q->recipe, q->scales, q->rows, q->cols), &q->tensor_scale, sizeof(float));
    }
}

static void snipi_run_begin(snipi_run *run, snip_format format, int stochastic) {
    snipi_element e = snipi_element_of(format);
    int32_t max_bits = (int32_t)snipi_bits(e.max), shift = 23 - e.mantissa, i;
    run->format = format;
    run->e = e;
    run->stochastic = stochastic;
    run->k.least = (128 - e.bias) << 23;
    run->k.cap = max_bits + (stochastic ? 1 << 23 : 0);
    run->k.beyond = max_bits + (1 << (shift - 1)) -
                    (int32_t)(e.largest & 1u);  // the last that still rounds to the largest
    run->k.magic = (shift << 23) - (run->k.least >> shift);
    run->k.unit = e.mantissa << 23;
    run->k.shift = shift;
    run->k.sign_shift = 31 - e.sign;
    run->k.sign = 1 << e.sign;
    run->k.random_shift = 32 - shift;
    memset(run->k.power, 0, sizeof run->k.power);
    for (i = run->k.least >> 23; i <= run->k.cap >> 23; i++)
        run->k.power[i & 31] = (i << 23) + run->k.magic + ((i << 23) >> shift);
}

static void snipi_quantizer_begin(snipi_quantizer *q) {
    int c, plain = snipi_plain(q->recipe.format);
    q->tile_rows = plain ? 1 : snipi_tile(q->recipe.tile_rows, q->rows);
    q->tile_cols = snipi_tile(q->recipe.tile_cols, q->cols);
    q->tiles_down = snipi_ceil_div(q->rows, q->tile_rows);
    q->tiles_across = snipi_ceil_div(q->cols, q->tile_cols);
    while (((int64_t)1 << q->tile_shift) < q->tile_cols && q->tile_shift < 62) q->tile_shift++;
    snipi_run_begin(&q->run, q->recipe.format, q->recipe.rounding == SNIP_ROUND_STOCHASTIC);
    q->run.packed = q->recipe.format == SNIP_E2M1;
    q->run.lut = q->lut;
    q->run.want_sums = q->want_sums;
    q->run.stream = q->x != q->out && q->rows * q->cols >= SNIPI_STREAM;
    for (c = 0; c < 1 << q->run.e.sign && !plain; c++) {
        q->lut[c] = snipi_decode((uint32_t)c, q->recipe.format);
        q->lut[c | 1 << q->run.e.sign] = snipi_float(snipi_bits(q->lut[c]) | 0x80000000u);
    }
    if (q->recipe.scale == SNIP_SCALE_UE4M3) snipi_tensor_scale(q);
}

static void snipi_tally_end(const snipi_tally *part, snip_quant_stats *stats) {
    int c, i;
    memset(stats, 0, sizeof *stats);
    for (c = 0; c < SNIPI_CHUNKS; c++) {
        for (i = 0; i < SNIPI_LANES; i++) {
            stats->sum_sq += part[c].sum_sq[i];
            stats->err_sq += part[c].err_sq[i];
            stats->dot += part[c].dot[i];
        }
        if (part[c].amax > snipi_bits(stats->amax)) stats->amax = snipi_float(part[c].amax);
        stats->nonfinite += part[c].nonfinite;
        stats->saturated += part[c].saturated;
    }
}

static void snipi_panels_clear(snipi_panels *p) { p->x.row = p->weight.row = -1; }

// What is shared out in chunks: bands, or blocks of one or two quantizers; the tallies of each.
typedef struct {
    const snipi_quantizer *q, *q2;
    int64_t rows, cols;
    snipi_tally part[SNIPI_CHUNKS], part2[SNIPI_CHUNKS];
} snipi_quantize_task;

// Band after band of tiles. A transposed source is read a cache line of columns at a time: bands are taken in groups.
static void snipi_quantize_bands_chunk(void *arg, int64_t c) {
    snipi_quantize_task *task = (snipi_quantize_task *)arg;
    const snipi_quantizer *q = task->q;
    int64_t group = q->transposed ? snipi_max(1, SNIPI_PANEL_ROWS / q->tile_rows) : 1,
            groups = snipi_ceil_div(q->tiles_down, group);
    int64_t g, tr, end = groups * (c + 1) / SNIPI_CHUNKS;
    snipi_tally local;
    snipi_panels panels;
    memset(&local, 0, sizeof local);
    snipi_panels_clear(&panels);
    for (g = groups * c / SNIPI_CHUNKS; g < end; g++) {
        int64_t first = g * group, last = snipi_min(q->tiles_down, first + group);
        if (snipi_plain(q->recipe.format))
            for (tr = first; tr < last; tr++) snipi_quantize_plain_row(q, &panels, tr, &local);
        else if (q->transposed)
            snipi_quantize_region(q, &panels, first, last, 0, q->tiles_across, &local);
        else {
            snipi_quantize_region(q, &panels, g, end, 0, q->tiles_across, &local);
            break;
        }
    }
    if (q->run.stream) snipi_stream_end();
    task->part[c] = local;
}

static void snipi_quantize_bands(const snipi_quantizer *q, snip_quant_stats *stats) {
    snipi_quantize_task task;
    task.q = q;
    snipi_share(snipi_quantize_bands_chunk, &task, SNIPI_CHUNKS, q->rows * q->cols);
    if (stats) snipi_tally_end(task.part, stats);
}

static int snipi_fits_blocks(const snipi_quantizer *q) {
    return !snipi_plain(q->recipe.format) && SNIPI_RUN % q->tile_rows == 0 && SNIPI_RUN % q->tile_cols == 0;
}

static int snipi_takes_columns(const snipi_quantizer *q) {
    if (!q->transposed || !q->vector->columns || q->weight || q->tile_cols < 16) return 0;
    return (!q->want_sums || (q->tile_cols == SNIPI_RUN && q->tile_rows <= SNIPI_RUN)) &&
           (q->recipe.rounding == SNIP_ROUND_NEAREST_EVEN || q->cols % 4 == 0);
}

// A whole block of the source by its columns. amax: of each tile's columns, [SNIPI_RUN / tile_cols][SNIPI_RUN]; 0: not
// such as columns are for.
static int snipi_quantize_columns(const snipi_quantizer *q, const float *block, const uint32_t *amax, int64_t r0,
                                  int64_t c0, int cols, snipi_tally *tally) {
    float scale[SNIPI_RUN / 16 * SNIPI_RUN], inverse[SNIPI_RUN / 16 * SNIPI_RUN];
    uint32_t peak[SNIPI_RUN], most = 0;
    uint8_t byte[SNIPI_RUN];
    int tile_rows = (int)q->tile_rows, tiles = (int)(SNIPI_RUN / q->tile_cols), t, c, i;
    snipi_columns columns;
    if (cols % tile_rows != 0) return 0;
    memset(&columns, 0, sizeof columns);
    for (t = 0; t < tiles; t++) {
        float *s = scale + t * SNIPI_RUN, *v = inverse + t * SNIPI_RUN;
        int64_t at = c0 / tile_rows * q->tiles_across + r0 / q->tile_cols + t;
        memcpy(peak, amax + t * SNIPI_RUN, sizeof peak);
        if (tile_rows > 1)
            for (c = 0; c < cols; c += tile_rows) {
                for (i = 1; i < tile_rows; i++) peak[c] = peak[c + i] > peak[c] ? peak[c + i] : peak[c];
                for (i = 1; i < tile_rows; i++) peak[c + i] = peak[c];
            }
        for (c = 0; c < cols; c++) most = peak[c] > most ? peak[c] : most;
        if (most >= 0x7F800000u) return 0;
        if (q->recipe.scale == SNIP_SCALE_NONE ||
            !q->vector->scales(q->recipe.scale, &q->run, q->tensor_scale, q->tensor_inverse, peak, cols, s, v, byte))
            for (c = 0; c < cols; c++) {
                snipi_tile_scale one = snipi_scale_of(q->recipe.scale, q->run.e, peak[c], q->tensor_scale,
                                                      q->tensor_inverse);
                if (!snipi_has_sums_in_units(q, peak[c], &one)) return 0;
                s[c] = one.scale;
                v[c] = one.inverse;
                byte[c] = (uint8_t)one.byte;
            }
        if (snipi_may_pass(q))
            for (c = 0; c < cols; c++) columns.capped |= snipi_beyond(q, peak[c], v[c]);
        if (q->scales && snipi_byte_scale(q->recipe.scale))
            for (c = 0; c < cols; c += tile_rows, at += q->tiles_across) ((uint8_t *)q->scales)[at] = byte[c];
        else if (q->scales && q->recipe.scale != SNIP_SCALE_NONE)
            for (c = 0; c < cols; c += tile_rows, at += q->tiles_across) ((float *)q->scales)[at] = s[c];
    }
    if (most > tally->amax) tally->amax = most;
    columns.x = block;
    columns.cols = cols;
    columns.height = (int)q->tile_cols;
    columns.scale = scale;
    columns.inverse = inverse;
    columns.code_stride = (int64_t)snipi_row_bytes(q->recipe.format, q->cols);
    columns.key = q->key;
    columns.step = (uint64_t)q->cols >> 2;
    columns.first = (uint64_t)c0 * columns.step + ((uint64_t)r0 >> 2);
    columns.ahead_stride = q->ld * (q->x_bf16 ? 2 : 4);
    columns.ahead = snipi_ahead(q, r0, c0, SNIPI_RUN);
    columns.ahead_rows = SNIPI_AHEAD_ROWS;
    columns.tally = tally;
    columns.codes = snipi_codes_at(q, c0, r0);
    if (columns.codes || q->want_sums) q->vector->columns(&q->run, &columns);
    return 1;
}

// The tiles of q in block (r0, c0) of the source, 128 x 128; the first r rows of it are done.
static void snipi_quantize_block(const snipi_quantizer *q, snipi_panels *panels, int64_t r0, int64_t c0, int64_t r,
                                 snipi_tally *tally) {
    int64_t lr = q->transposed ? c0 : r0, lc = q->transposed ? r0 : c0;
    snipi_panels_clear(panels);
    snipi_quantize_region(q, panels, (lr + r) / q->tile_rows, snipi_min(q->tiles_down, (lr + SNIPI_RUN) / q->tile_rows),
                          lc / q->tile_cols, snipi_min(q->tiles_across, (lc + SNIPI_RUN) / q->tile_cols), tally);
}

// One read of the source for one or two quantizers (the second may be NULL), block by block. A whole block is copied
// first: its rows may share few sets of the caches. Rows are coded as soon as they are there, while the next ones are
// fetched; columns at the end. Two blocks are taken one below the other, so that pages of the transposed codes are met
// half as often.
static void snipi_quantize_blocks_chunk(void *arg, int64_t c) {
    snipi_quantize_task *task = (snipi_quantize_task *)arg;
    const snipi_quantizer *q = task->q, *q2 = task->q2;
    const snipi_quantizer *by_columns = snipi_takes_columns(q) ? q : q2 && snipi_takes_columns(q2) ? q2 : NULL;
    const snipi_quantizer *by_rows = by_columns && q2 && snipi_takes_strips(by_columns == q ? q2 : q)
                                         ? (by_columns == q ? q2 : q)
                                         : NULL;
    int64_t rows = task->rows, cols = task->cols, across = snipi_ceil_div(cols, SNIPI_RUN),
            blocks = snipi_ceil_div(rows, SNIPI_RUN) * across;
    int64_t b, end = blocks * (c + 1) / SNIPI_CHUNKS;
    snipi_tally local, local2;
    snipi_panels panels;
    float copy[SNIPI_RUN][SNIPI_PANEL_LD];
    uint32_t amax[SNIPI_RUN / 16 * SNIPI_RUN];
    memset(&local, 0, sizeof local);
    memset(&local2, 0, sizeof local2);
    for (b = blocks * c / SNIPI_CHUNKS; b < end; b++) {
        int64_t band = b / (2 * across), in_band = b % (2 * across), high = snipi_min(2, blocks / across - 2 * band);
        int64_t r0 = (2 * band + in_band % high) * SNIPI_RUN, c0 = in_band / high * SNIPI_RUN;
        int width = (int)snipi_min(SNIPI_RUN, cols - c0), columns_done = 0, strips = by_rows && width == SNIPI_RUN, r,
            rows_done = 0;
        if (by_columns && rows - r0 >= SNIPI_RUN && width % 16 == 0) {
            for (r = 0; r < SNIPI_RUN; r += SNIPI_BATCH) {
                q->vector->copy(q->x, q->x_bf16, r0 * q->ld + c0, q->ld, r, width, (int)by_columns->tile_cols, copy[0],
                                amax);
                strips = strips &&
                         snipi_quantize_strip(by_rows, copy[r], SNIPI_PANEL_LD, r0 + r, c0, SNIPI_BATCH, SNIPI_RUN,
                                              snipi_ahead(q, r0 + r, c0, SNIPI_BATCH), by_rows == q ? &local : &local2);
                if (strips) rows_done += SNIPI_BATCH;
            }
            columns_done = snipi_quantize_columns(by_columns, copy[0], amax, r0, c0, width,
                                                  by_columns == q ? &local : &local2);
        }
        if (!(q == by_columns ? columns_done : q == by_rows && rows_done == SNIPI_RUN))
            snipi_quantize_block(q, &panels, r0, c0, q == by_rows ? rows_done : 0, &local);
        if (q2 && !(q2 == by_columns ? columns_done : q2 == by_rows && rows_done == SNIPI_RUN))
            snipi_quantize_block(q2, &panels, r0, c0, q2 == by_rows ? rows_done : 0, &local2);
    }
    if (q->run.stream) snipi_stream_end();
    task->part[c] = local;
    task->part2[c] = local2;
}

static void snipi_quantize_blocks(const snipi_quantizer *q, const snipi_quantizer *q2, int64_t rows, int64_t cols,
                                  snip_quant_stats *stats, snip_quant_stats *stats2) {
    snipi_quantize_task task;
    task.q = q;
    task.q2 = q2;
    task.rows = rows;
    task.cols = cols;
    snipi_share(snipi_quantize_blocks_chunk, &task, SNIPI_CHUNKS, rows * cols);
    if (stats) snipi_tally_end(task.part, stats);
    if (stats2) snipi_tally_end(task.part2, stats2);
}

static int snipi_element_size(snip_format f) { return f == 0 || f == SNIP_F32 ? 4 : f == SNIP_BF16 ? 2 : 0; }

// Either orientation, or both; sums: not the counts and amax alone.
static void snipi_quantize_job(const snip_quantize_job *job, int sums, snip_quant_stats *stats,
                               snip_quant_stats *stats_t) {
    snipi_quantizer q[2];
    snip_quant_stats *s[2];
    int i, n = 0;
    s[0] = stats;
    s[1] = stats_t;
    for (i = 0; i < 2; i++) {
        const snip_recipe *recipe = i ? job->recipe_t : job->recipe;
        if (s[i]) memset(s[i], 0, sizeof *s[i]);
        if (!recipe || job->rows == 0 || job->cols == 0) continue;
        memset(&q[n], 0, sizeof q[n]);
        q[n].recipe = *recipe;
        q[n].x = job->x;
        q[n].weight = job->weight;
        q[n].x_bf16 = job->x_format == SNIP_BF16;
        q[n].transposed = i;
        q[n].rows = i ? job->cols : job->rows;
        q[n].cols = i ? job->rows : job->cols;
        q[n].ld = job->ld;
        q[n].codes = i ? job->codes_t : job->codes;
        q[n].scales = i ? job->scales_t : job->scales;
        q[n].out = i ? NULL : job->out;
        q[n].out_bf16 = job->out_format == SNIP_BF16;
        q[n].ld_out = job->ld_out;
        q[n].key = job->key;
        q[n].want_sums = sums && s[i];
        q[n].vector = snipi_vector_of(job->isa);
        s[n] = s[i];
        snipi_quantizer_begin(&q[n]);
        n++;
    }
    if (n == 2 && snipi_fits_blocks(&q[0]) && snipi_fits_blocks(&q[1]) && job->x != job->out) {
        snipi_quantize_blocks(&q[0], &q[1], job->rows, job->cols, s[0], s[1]);
        return;
    }
    for (i = n - 1; i >= 0; i--)  // out may be x: the transposed one reads first
        if (q[i].transposed && snipi_fits_blocks(&q[i]))
            snipi_quantize_blocks(&q[i], NULL, job->rows, job->cols, s[i], NULL);
        else
            snipi_quantize_bands(&q[i], s[i]);
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

static void snipi_reader_init(snipi_reader *q, const snip_recipe *recipe, const void *codes, const void *scales,
                              int64_t rows, int64_t cols) {
    int c;
    q->recipe = recipe;
    q->codes = (const uint8_t *)codes;
    q->scales = scales;
    q->row_bytes = snipi_row_bytes(recipe->format, cols);
    q->tile_rows = snipi_tile(recipe->tile_rows, rows);
    q->tile_cols = snipi_tile(recipe->tile_cols, cols);
    q->tiles_across = snipi_ceil_div(cols, q->tile_cols);
    q->tensor_scale = 1.0f;
    q->stream = 0;
    q->vector = snipi_vector_of(SNIP_ISA_BEST);
    if (recipe->scale == SNIP_SCALE_UE4M3)
        memcpy(&q->tensor_scale, snipi_tensor_scale_at(recipe, scales, rows, cols), sizeof(float));
    if (!snipi_plain(recipe->format))
        for (c = 0; c < (recipe->format == SNIP_E2M1 ? 16 : 256); c++)
            q->lut[c] = snipi_decode((uint32_t)c, recipe->format);
}

static float snipi_reader_scale(const snipi_reader *q, int64_t row, int64_t tile_col) {
    int64_t i = (q->tile_rows == 1 ? row : row / q->tile_rows) * q->tiles_across + tile_col;
    switch (q->recipe->scale) {
        case SNIP_SCALE_NONE: break;
        case SNIP_SCALE_F32:
        case SNIP_SCALE_POW2: return ((const float *)q->scales)[i];
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE8M0_UP: return snip_ue8m0_to_f32(((const uint8_t *)q->scales)[i]);
        case SNIP_SCALE_UE4M3:
            return snipi_multiply(snip_ue4m3_to_f32(((const uint8_t *)q->scales)[i]), q->tensor_scale);
    }
    return 1.0f;
}

// Elements [c0, c0 + n) of a row to out, `stride` apart.
static void snipi_reader_row(const snipi_reader *q, int64_t row, int64_t c0, int64_t n, float *out, int64_t stride) {
    const uint8_t *codes = q->codes + (size_t)row * q->row_bytes;
    int64_t c = c0, end = c0 + n;
    if (q->recipe->format == SNIP_BF16 && stride == 1)
        for (; c < end; c += SNIPI_RUN, out += SNIPI_RUN)
            q->vector->widen((const uint16_t *)(const void *)codes + c, (int)snipi_min(SNIPI_RUN, end - c), out);
    if (q->recipe->format == SNIP_F32) {
        for (; c < end; c++, out += stride) *out = ((const float *)(const void *)codes)[c];
        return;
    }
    if (q->recipe->format == SNIP_BF16) {
        for (; c < end; c++, out += stride) *out = snip_bf16_to_f32(((const uint16_t *)(const void *)codes)[c]);
        return;
    }
    while (c < end) {
        int64_t tile = c / q->tile_cols, stop = snipi_min(end, (tile + 1) * q->tile_cols);
        float scale = snipi_reader_scale(q, row, tile);
        int packed = q->recipe->format == SNIP_E2M1;
        if (stride == 1 && !(packed && (c & 1))) {
            int part = (int)snipi_min(stop - c, 1 << 20);
            q->vector->decode(q->recipe->format, q->lut, codes + (packed ? c >> 1 : c), part, scale, out, q->stream);
            c += part;
            out += part;
        } else if (packed)
            for (; c < stop; c++, out += stride) *out = snipi_value(scale, q->lut[codes[c >> 1] >> (c & 1) * 4 & 15]);
        else
            for (; c < stop; c++, out += stride) *out = snipi_value(scale, q->lut[codes[c]]);
    }
}

typedef struct {
    snipi_reader reader;
    int64_t rows, cols, ld;
    float *x;
    uint16_t *x16;
} snipi_dequantize;  // x or x16

static void snipi_dequantize_chunk(void *arg, int64_t chunk) {
    const snipi_dequantize *q = (const snipi_dequantize *)arg;
    int64_t r, c, end = q->rows * (chunk + 1) / SNIPI_CHUNKS;
    float buffer[SNIPI_RUN];
    for (r = q->rows * chunk / SNIPI_CHUNKS; r < end; r++)
        if (q->x)
            snipi_reader_row(&q->reader, r, 0, q->cols, q->x + r * q->ld, 1);
        else
            for (c = 0; c < q->cols; c += SNIPI_RUN) {
                int n = (int)snipi_min(SNIPI_RUN, q->cols - c);
                snipi_reader_row(&q->reader, r, c, n, buffer, 1);
                q->reader.vector->narrow(buffer, n, q->x16 + r * q->ld + c);
            }
    snipi_stream_end();
}

static snip_status snipi_dequantize_to(const snip_recipe *recipe, const void *codes, const void *scales, int64_t rows,
                                       int64_t cols, float *x, uint16_t *x16, int64_t ld) {
    snipi_dequantize q;
    if (!snipi_recipe_ok(recipe) || !snipi_shape_ok(rows, cols, ld)) return SNIP_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return SNIP_OK;
    if (!codes || (!x && !x16) || (!scales && recipe->scale != SNIP_SCALE_NONE)) return SNIP_BAD_ARGUMENT;
    snipi_reader_init(&q.reader, recipe, codes, scales, rows, cols);
    q.reader.stream = x && rows * cols >= SNIPI_STREAM;
    q.rows = rows;
    q.cols = cols;
    q.ld = ld;
    q.x = x;
    q.x16 = x16;
    snipi_share(snipi_dequantize_chunk, &q, SNIPI_CHUNKS, rows * cols);
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
typedef void (*snipi_f32_kernel)(int64_t k, const float *a, const float *b, const float *from, float *c, int64_t ldc);

// Scaled panels of k bytes in blocks of `block` bytes: c[i][j] = fmaf(sa[i] * sb[j], sum[i][j], c[i][j]), block after
// block, with sa and sb [blocks][rows]. start [blocks][rows of b]: of S8, but for AMX.
typedef void (*snipi_scaled_kernel)(int64_t k, int64_t block, const uint8_t *a, const int8_t *b, const float *sa,
                                    const float *sb, const int32_t *start, const float *from, float *c, int64_t ldc);

typedef struct {
    int a, b;
} snipi_panel_rows;  // of A's panels and of B's

typedef struct {
    snipi_panel_rows f32_rows, s8_rows, bf16_rows;
    snipi_f32_kernel f32;
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
// A measuring step runs the batch three times (snip_next_pass), all in desc.measure precision:
//
//   loss probe     noise sigma * xi on the operands X and W of every layer at once, sigma = 2% of their rms.
//                  <xi, dA(noisy) - dA(clean)> / sigma estimates h_A = tr d2L/dA2 for each operand A by
//                  itself (Hutchinson; cross terms vanish in expectation because the xi are independent).
//   update probe   weights W + tau z, z = D xi / |W|, D the optimizer's sensitivity du/dg. X' = (X(tau) - X) / tau
//                  and dY' of each layer are the model's Jacobian transposed times z, which says how an error
//                  at the layer's outputs reaches every weight's next update. Kept as count-sketches.
//   clean          statistics; its gradients are the ones the optimizer uses.
//
// Loss change if layer l's forward GEMM runs in format f, e_A = Q_f(A) - A:
//   first  = <dX, e_X> + <dW, e_W>             second = (a h_X |e_X|^2 / n_X + h_W |e_W|^2 / n_W) / 2
// Relative squared error of the next update of all layers, U^2 = sum_j |u_j|^2 / |W_j|^2:
//   fwd    (a |r_X|^2 / n_X * |dY' W|^2  +  |r_W|^2 / n_W * |dY'^T X|^2  +  (c_X + c_W)^2 <dY', Y>^2) / U^2
//   dgrad  (|e_dY|^2 / n_Y * |X' W^T|^2  +  |e_W|^2 / n_W * |dY^T X'|^2) / U^2
//   wgrad  |D * dW_err|^2 / |W|^2 / U^2, dW_err the GEMM's error in format f, on a sample of the output features
// The errors are white in the operands, not in the GEMM's output: e_X W^T lies along W, as dY' does, and X e_W^T
// repeats with X from token to token. Taking dY_err for white (mean(dY_err^2) |dY'|^2) loses half of the forward's true
// value. Even e_X is not white inside a row: where X is sparse or has large channels, it points where the model is
// sensitive. That is seen in the clean pass: a = n_X sum over rows r <dX_r, e_r>^2 / (|dX|^2 |e_X|^2), 1 for white
// errors, 0.5 to 6 in fact (in the update, of r_X, below); curvature (Fisher's, sum dX_r^T dX_r) and answer are taken
// to have dX's directions and sizes, row by row. Nor is it independent of X: what saturates or is flushed to 0 shrinks
// X, and all of Y with it, e_A = -c_A A + r_A, c_A = -<A, e_A> / |A|^2: 0.02 to 0.05 in MXFP4, 3 to 12% of |e_A|^2 and
// up to half of its effect, since all rows move together and W's shrinking adds to X's. The answer <dY', Y> = <dY' W,
// X> is the change of <dX, X> from pass to pass; X's own change in it is small. One probe's square of it would be
// chi-square with a single degree of freedom: it is taken over blocks of 32 rows, and the blocks' squares are added.
// dY' W and X' W^T are sketched with W's columns, as they are met, mixed into 32. dY'^T X + dY^T X' is the change of
// dW, sketched with its rows mixed into 32: the update probe forms no more of its dW than that. The two parts are
// uncorrelated and share the square as |dY'|^2 |X|^2 : |X'|^2 |dY|^2. The learning rate cancels in the ratio, so D and
// u are taken at rate 1.
//
// Cost: fwd = loss_weight * (shrunk first + second) / L + update_weight * update; backward GEMMs =
// update_weight * update * (r + (1 - r) / horizon). The forward's errors repeat with the slowly moving weights; the
// backward GEMMs' are noise, which averages out over steps, but for the share r of dY's squared error that lies along
// dY and so returns with it. r = 0 where rounding is stochastic. To nearest a code is about the mean of what it stands
// for: <Q(x), e> = 0, so <x, e> = -|e|^2 and r = <x, e>^2 / (|x|^2 |e|^2) = |e|^2 / |x|^2: 0.02 in FP4 tiles, 0.03 to
// 0.27 where one scale a tensor flushes small gradients to 0. Each term is a mean over measurements (snipi_costs).
//
// A GEMM's change of format counts `margin` standard errors on top of its cost: a plan changes only where that pays,
// and noise does not move it. Errors are added, not their squares: a new plan is chosen because its errors happen to be
// low.
//
// A measuring step comes every `every` steps and, under a plan, when the loss spikes or the statistics drift, but not
// within every / 10 steps of the last one. A spike puts all of the plan's GEMMs below `fallback` into that format until
// the measurement; the plan is then made afresh, without a margin for the old one.
//
// Cost: two passes more than an ordinary step (one without update_weight) and the work above; in all 3.2 to 3.5
// ordinary BF16 steps, measured on one core. Memory that stays: 5 sketches of 16 KiB a layer, one a tensor, and scratch
// for one layer.
enum {
    SNIPI_SKETCH = 4096,
    SNIPI_PROJECTED = 32,
    SNIPI_MIXED = 128,
    SNIPI_CANDIDATES = 2,
    SNIPI_ROLES = 16,
    SNIPI_BLOCKS = 64,
    SNIPI_BLOCK_ROWS = 32
};

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
    SNIPI_ROLE_SKETCH
};

enum {
    SNIPI_SKETCH_X,
    SNIPI_SKETCH_DY,
    SNIPI_SKETCH_XW,
    SNIPI_SKETCH_DYW,
    SNIPI_SKETCH_DW,
    SNIPI_SKETCHES
};  // of X, dY, X W^T, dY W, dW

enum {
    SNIPI_SLOT_A,
    SNIPI_SLOT_A_SCALES,
    SNIPI_SLOT_B,
    SNIPI_SLOT_B_SCALES,
    SNIPI_SLOT_GEMM,
    SNIPI_SLOT_X,
    SNIPI_SLOT_W,
    SNIPI_SLOT_OUT,
    SNIPI_SLOT_SAMPLE,
    SNIPI_SLOT_SAMPLE_OUT,
    SNIPI_SLOT_PROJECT,
    SNIPI_SLOT_MIXED,
    SNIPI_SLOT_SKETCH,
    SNIPI_SLOTS
};

enum { SNIPI_ALLOW_FP8 = 1, SNIPI_ALLOW_FP4 = 2 };

typedef struct {  // of one candidate format, over the step's micro-batches
    double err_w, err_dy, dot_x, dot_w;
    double self_x, self_w;                   // <X, e_X>, <W, e_W>
    double dx_sq, along_x, both_x, scale_x;  // sums over rows of |dX|^2, <dX, e_X>^2, <dX, e_X> <dX, X>, <dX, X>^2
    double wgrad_err;                        // |D * dW_err|^2
} snipi_measured;

enum { SNIPI_FIRST, SNIPI_SECOND, SNIPI_UPDATE, SNIPI_TERMS = SNIPI_UPDATE + SNIP_GEMMS };

typedef struct {
    double mean[SNIPI_TERMS], variance[SNIPI_TERMS];
} snipi_average;  // over measurements

typedef struct {
    void *panels;
    size_t size;
    int64_t nonfinite, saturated;
    const float *held;
    snip_format format;
} snipi_cached;  // held: the weight packed in this pass

typedef struct {
    char *name;
    int64_t n, k;
    int stage;
    const float *m, *v;
    snip_format format[SNIP_GEMMS];
    unsigned char allow[SNIP_GEMMS];
    int64_t nonfinite, saturated;
    int64_t calls_forward, calls_backward;  // of this pass: tells micro-batches apart
    double weight_sq, sensitivity_sq, sigma_x, sigma_w;
    double noisy_x, noisy_w, clean_x, clean_w;  // <xi, dA> of the two passes
    int64_t elements_x, elements_y;             // seen by this pass; rows by the one before
    int64_t rows;
    double input_sq, gradient_sq;        // |X|^2, |dY|^2 of the clean pass
    double scaling[SNIPI_BLOCKS];        // <dX, X> by blocks of rows: update probe less clean
    float *sketch;                       // [SNIPI_SKETCHES][SNIPI_SKETCH]: update probe less clean
    double sketched_sq[SNIPI_SKETCHES];  // |sketch|^2
    snipi_measured measured[SNIPI_CANDIDATES];
    snipi_average average[SNIPI_CANDIDATES];
    snip_estimate estimate[SNIPI_CANDIDATES];
    double seconds[1 + SNIPI_CANDIDATES][SNIP_GEMMS];  // in desc.high, then in each candidate
    double seen_sq[2], seen[2];                        // of a sample of X and dY, in this step
    double level[2], reference[2];  // log2 of their rms: running mean, and as it was at the last measurement
    int64_t micros;                 // forward calls of the last pass
    snipi_cached weight[2];         // W's panels for fwd and dgrad, where micro-batches share them
} snipi_layer;

struct snip {
    snip_desc desc;
    snipi_layer *layers;
    int n_layers, capacity;
    void *slot[SNIPI_SLOTS];
    size_t slot_size[SNIPI_SLOTS];
    snip_mode mode;
    snip_pass pass;
    snip_status pending;  // the step's first error
    int64_t step;
    int plans;
    double tau, loss, solve_seconds;
    snip_adamw adamw;                      // of the last step
    double measurements, squared_weights;  // averaged over; sum of the squares of their weights
    double loss_mean, loss_deviation;      // running, of `losses` steps; `levels` steps of snipi_layer.level
    int64_t losses, levels, measured;      // step of the last measurement
    int64_t due, fallen;  // a measurement is wanted before its time; a spike has put GEMMs into `fallback`
    int told;             // the loss of this step
    char message[256], held[256], reason[256];  // held: `pending`'s message
};

static void *snipi_default_alloc(size_t size, void *user) {
    (void)user;
    return SNIP_MALLOC(size);
}

static void snipi_default_free(void *ptr, void *user) {
    (void)user;
    SNIP_FREE(ptr);
}

static void *snipi_alloc(snip *s, size_t size) {
    void *p = s->desc.alloc.alloc_fn(size ? size : 1, s->desc.alloc.user);
    if (p) memset(p, 0, size);
    return p;
}

static void snipi_free(snip *s, void *p) {
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

static float *snipi_reserve_floats(snip *s, int slot, int64_t n) {
    return (float *)snipi_reserve(s, slot, (size_t)n * sizeof(float));
}

// The message is the session's to change also where a call takes it as const.
static snip_status snipi_fail(const snip *s, snip_status status, const char *message) {
    if (s) snprintf(((snip *)(uintptr_t)s)->message, sizeof s->message, "%s", message);
    return status;
}

static snip_status snipi_fail_in(const snip *s, snip_status status, const char *where, const char *why) {
    char message[256];
    snprintf(message, sizeof message, "%.100s: %.152s", where, why);
    return snipi_fail(s, status, message);
}

static snip_status snipi_bad(const snip *s, const char *function) {
    return snipi_fail_in(s, SNIP_BAD_ARGUMENT, function, snip_status_text(SNIP_BAD_ARGUMENT));
}

static snip_status snipi_no_memory(const snip *s, const char *function) {
    return snipi_fail_in(s, SNIP_OUT_OF_MEMORY, function, snip_status_text(SNIP_OUT_OF_MEMORY));
}

static int snipi_in_range(double x, double low, double high) {
    return !snipi_nonfinite_f64(x) && x >= low && x <= high;
}

static int snipi_recipes_ok(const snip_recipes *r) {
    const snip_recipe *all[3];
    int i;
    all[0] = &r->activation;
    all[1] = &r->weight;
    all[2] = &r->gradient;
    for (i = 0; i < 3; i++)
        if (all[i]->format != (snip_format)0 && (!snipi_recipe_ok(all[i]) || snipi_plain(all[i]->format))) return 0;
    return 1;
}

SNIP_API snip_status snip_desc_check(const snip_desc *d) {
    if (!d || !snipi_in_range(d->budget, 0, 1) || d->n_stages < 0) return SNIP_BAD_ARGUMENT;
    if ((int)d->high != 0 && !snipi_plain(d->high)) return SNIP_BAD_ARGUMENT;
    if ((int)d->measure != 0 && !snipi_plain(d->measure)) return SNIP_BAD_ARGUMENT;
    if (snipi_nonfinite_f64(d->speedup) || (d->speedup != 0 && !snipi_in_range(d->speedup, 1e-3, 1e6)) ||
        !snipi_in_range(d->seconds, 0, 1e9))
        return SNIP_BAD_ARGUMENT;
    if (snipi_nonfinite_f64(d->loss_weight) || snipi_nonfinite_f64(d->update_weight)) return SNIP_BAD_ARGUMENT;
    if (!snipi_in_range(d->horizon, 0, 1e12) || !snipi_in_range(d->sample, 0, 1)) return SNIP_BAD_ARGUMENT;
    if (!snipi_recipes_ok(&d->fp8) || !snipi_recipes_ok(&d->fp4)) return SNIP_BAD_ARGUMENT;
    if ((int)d->isa < 0 || d->isa >= SNIP_ISA_COUNT) return SNIP_BAD_ARGUMENT;
    if ((int)d->optimizer < 0 || d->optimizer > SNIP_CUSTOM || (d->optimizer == SNIP_CUSTOM && !d->sensitivity))
        return SNIP_BAD_ARGUMENT;
    if (snipi_nonfinite_f64(d->margin) || snipi_nonfinite_f64(d->spike) || snipi_nonfinite_f64(d->drift))
        return SNIP_BAD_ARGUMENT;
    if ((int)d->fallback != 0 && !snipi_plain(d->fallback) && d->fallback != SNIP_E4M3 && d->fallback != SNIP_E2M1)
        return SNIP_BAD_ARGUMENT;
    if (!d->alloc.alloc_fn != !d->alloc.free_fn) return SNIP_BAD_ARGUMENT;
    return snip_isa_available(d->isa) ? SNIP_OK : SNIP_UNSUPPORTED;
}

static void snipi_begin_pass(snip *s, snip_pass pass) {
    int l;
    s->pass = pass;
    for (l = 0; l < s->n_layers; l++) {
        snipi_layer *layer = &s->layers[l];
        layer->micros = layer->calls_forward;
        layer->rows = layer->elements_x / layer->k;
        layer->weight[0].held = layer->weight[1].held = NULL;
        layer->calls_forward = layer->calls_backward = layer->elements_x = layer->elements_y = 0;
    }
}

static int snipi_probes_updates(const snip *s) { return s->desc.update_weight > 0; }

static void snipi_begin_step(snip *s) {
    int l, measure = s->desc.every > 0 && s->step > 0 &&
                     (s->step % s->desc.every == 0 || (s->due && s->step >= s->measured + s->desc.every / 10));
    s->told = 0;
    for (l = 0; l < s->n_layers; l++) {
        snipi_layer *layer = &s->layers[l];
        layer->nonfinite = layer->saturated = 0;
        layer->seen_sq[0] = layer->seen_sq[1] = layer->seen[0] = layer->seen[1] = 0;
        if (!measure) continue;
        memset(layer->measured, 0, sizeof layer->measured);
        memset(layer->sketch, 0, SNIPI_SKETCHES * SNIPI_SKETCH * sizeof(float));
        memset(layer->scaling, 0, sizeof layer->scaling);
        layer->noisy_x = layer->noisy_w = layer->clean_x = layer->clean_w = layer->input_sq = layer->gradient_sq = 0;
    }
    s->pending = SNIP_OK;
    s->held[0] = 0;
    snipi_begin_pass(s, measure ? SNIP_PASS_LOSS_PROBE : SNIP_PASS_ORDINARY);
}

SNIP_API snip *snip_create(const snip_desc *desc) {
    snip_recipe fp8_tile = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK, fp4_tile = SNIP_RECIPE_FP4_TILE;
    snip_recipe fp4_block = SNIP_RECIPE_FP4_BLOCK, fp4_stochastic = SNIP_RECIPE_FP4_TILE_SR;
    snip_desc d;
    snip *s;
    if (snip_desc_check(desc)) return NULL;
    d = *desc;
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
    if ((int)d.fp8.activation.format == 0) d.fp8.activation = fp8_tile;
    if ((int)d.fp8.weight.format == 0) d.fp8.weight = fp8_block;
    if ((int)d.fp8.gradient.format == 0) d.fp8.gradient = fp8_tile;
    if ((int)d.fp4.activation.format == 0) d.fp4.activation = fp4_tile;
    if ((int)d.fp4.weight.format == 0) d.fp4.weight = fp4_block;
    if ((int)d.fp4.gradient.format == 0) d.fp4.gradient = fp4_stochastic;
    if (!d.alloc.alloc_fn) {
        d.alloc.alloc_fn = snipi_default_alloc;
        d.alloc.free_fn = snipi_default_free;
    }
    s = (snip *)d.alloc.alloc_fn(sizeof *s, d.alloc.user);
    if (!s) return NULL;
    memset(s, 0, sizeof *s);
    s->desc = d;
    return s;
}

static void snipi_drop(snip *s, snipi_layer *l) {
    int i;
    for (i = 0; i < 2; i++) snipi_free(s, l->weight[i].panels);
    memset(l->weight, 0, sizeof l->weight);
}

SNIP_API void snip_destroy(snip *s) {
    int i;
    if (!s) return;
    for (i = 0; i < s->n_layers; i++) {
        snipi_free(s, s->layers[i].name);
        snipi_free(s, s->layers[i].sketch);
        snipi_drop(s, &s->layers[i]);
    }
    snipi_free(s, s->layers);
    for (i = 0; i < SNIPI_SLOTS; i++) snipi_free(s, s->slot[i]);
    s->desc.alloc.free_fn(s, s->desc.alloc.user);
}

SNIP_API int snip_add_linear(snip *s, const char *name, int64_t out_features, int64_t in_features, int stage) {
    snipi_layer *layer;
    size_t length;
    int g;
    if (!s || !name || out_features < 1 || in_features < 1 || stage < 0 || stage >= s->desc.n_stages)
        return -(int)snipi_bad(s, "snip_add_linear");
    if (!snipi_shape_ok(out_features, in_features, in_features) || s->step > 0)
        return -(int)snipi_bad(s, "snip_add_linear");
    for (g = 0; name[g]; g++)  // names go into plan files, one word each
        if ((unsigned char)name[g] <= ' ') return -(int)snipi_bad(s, "snip_add_linear");
    if (g == 0 || g > 255) return -(int)snipi_bad(s, "snip_add_linear");
    if (s->n_layers == s->capacity) {
        int capacity = s->capacity ? 2 * s->capacity : 64;
        snipi_layer *grown = (snipi_layer *)snipi_alloc(s, (size_t)capacity * sizeof *grown);
        if (!grown) return -(int)snipi_no_memory(s, "snip_add_linear");
        if (s->n_layers) memcpy(grown, s->layers, (size_t)s->n_layers * sizeof *grown);
        snipi_free(s, s->layers);
        s->layers = grown;
        s->capacity = capacity;
    }
    layer = &s->layers[s->n_layers];
    memset(layer, 0, sizeof *layer);
    length = (size_t)g + 1;
    layer->name = (char *)snipi_alloc(s, length);
    layer->sketch = (float *)snipi_alloc(s, SNIPI_SKETCHES * SNIPI_SKETCH * sizeof(float));
    if (!layer->name || !layer->sketch) {
        snipi_free(s, layer->name);
        snipi_free(s, layer->sketch);
        return -(int)snipi_no_memory(s, "snip_add_linear");
    }
    memcpy(layer->name, name, length);
    layer->n = out_features;
    layer->k = in_features;
    layer->stage = stage;
    for (g = 0; g < SNIP_GEMMS; g++) {
        layer->format[g] = s->desc.high;
        layer->allow[g] = SNIPI_ALLOW_FP8 | SNIPI_ALLOW_FP4;
    }
    return s->n_layers++;
}

static snipi_layer *snipi_layer_at(const snip *s, int layer) {
    return s && layer >= 0 && layer < s->n_layers ? &s->layers[layer] : NULL;
}

SNIP_API snip_status snip_bind_adamw(snip *s, int layer, const float *m, const float *v) {
    snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !m || !v || s->desc.optimizer != SNIP_ADAMW) return snipi_bad(s, "snip_bind_adamw");
    l->m = m;
    l->v = v;
    return SNIP_OK;
}

SNIP_API snip_status snip_bind_momentum(snip *s, int layer, const float *m) {
    snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !m || (s->desc.optimizer != SNIP_SGD_MOMENTUM && s->desc.optimizer != SNIP_LION))
        return snipi_bad(s, "snip_bind_momentum");
    l->m = m;
    return SNIP_OK;
}

static int snipi_gemm_range(snip_gemm_kind gemm, int *first, int *last) {
    if ((int)gemm < 0 || gemm > SNIP_GEMMS) return 0;
    *first = gemm == SNIP_GEMMS ? 0 : (int)gemm;
    *last = gemm == SNIP_GEMMS ? SNIP_GEMMS - 1 : (int)gemm;
    return 1;
}

SNIP_API snip_status snip_allow(snip *s, int layer, snip_gemm_kind gemm, int fp8, int fp4) {
    int first, last, l, g;
    if (!s || (layer != -1 && !snipi_layer_at(s, layer)) || !snipi_gemm_range(gemm, &first, &last) || (!fp8 && !fp4))
        return snipi_bad(s, "snip_allow");
    for (l = layer < 0 ? 0 : layer; l < (layer < 0 ? s->n_layers : layer + 1); l++)
        for (g = first; g <= last; g++)
            s->layers[l].allow[g] = (unsigned char)((fp8 ? SNIPI_ALLOW_FP8 : 0) | (fp4 ? SNIPI_ALLOW_FP4 : 0));
    return SNIP_OK;
}

SNIP_API snip_status snip_set_format(snip *s, int layer, snip_gemm_kind gemm, snip_format format) {
    int first, last, l, g;
    if (!s || (layer != -1 && !snipi_layer_at(s, layer)) || !snipi_gemm_range(gemm, &first, &last))
        return snipi_bad(s, "snip_set_format");
    if (!snipi_plain(format) && format != SNIP_E4M3 && format != SNIP_E2M1) return snipi_bad(s, "snip_set_format");
    for (l = layer < 0 ? 0 : layer; l < (layer < 0 ? s->n_layers : layer + 1); l++)
        for (g = first; g <= last; g++) s->layers[l].format[g] = format;
    return SNIP_OK;
}

SNIP_API snip_status snip_set_mode(snip *s, snip_mode mode) {
    if (!s || (int)mode < SNIP_TRAIN || mode > SNIP_EVAL_HIGH) return snipi_bad(s, "snip_set_mode");
    s->mode = mode;
    return SNIP_OK;
}

// ---- one GEMM of a layer in one format
static snip_rng_key snipi_key(const snip *s, const snipi_layer *l, int64_t micro, int role) {
    snip_rng_key key;
    key.seed = s->desc.seed;
    key.step = (uint32_t)s->step;
    key.tensor = (uint32_t)((micro * s->n_layers + (l - s->layers)) * SNIPI_ROLES + role);
    return key;
}

typedef enum { SNIPI_ACTIVATION, SNIPI_WEIGHT, SNIPI_GRADIENT } snipi_kind;

typedef struct {
    const float *x;
    int64_t rows, cols;
    int transposed;
    snipi_kind kind;
    int role;
} snipi_tensor;

static snip_recipe snipi_recipe_of(const snip *s, snip_format format, snipi_kind kind) {
    const snip_recipes *set = format == SNIP_E4M3 ? &s->desc.fp8 : &s->desc.fp4;
    snip_recipe f32 = SNIP_RECIPE_F32;
    if (snipi_plain(format)) return f32;
    return kind == SNIPI_ACTIVATION ? set->activation : kind == SNIPI_WEIGHT ? set->weight : set->gradient;
}

static void snipi_nonfinite_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const float *x = sum->x;
    int64_t i, end = sum->n * (c + 1) / SNIPI_CHUNKS, bad = 0;
    for (i = sum->n * c / SNIPI_CHUNKS; i + SNIPI_RUN <= end; i += SNIPI_RUN) {
        int j, run = 0;  // a constant trip count: vectorized even at -O2
        for (j = 0; j < SNIPI_RUN; j++) run += snipi_nonfinite(x[i + j]);
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

static const snip_format snipi_candidates[SNIPI_CANDIDATES] = { SNIP_E4M3, SNIP_E2M1 };

// Quantize a tensor into the scratch of operand `slot`. F32 and BF16 are read where they are.
static snip_status snipi_operand(snip *s, snipi_layer *l, int64_t micro, snip_format format, const snipi_tensor *t,
                                 int slot, snip_recipe *recipe, snip_operand *out) {
    int64_t rows = t->transposed ? t->cols : t->rows, cols = t->transposed ? t->rows : t->cols;
    snip_quant_stats counts;
    snip_status status;
    void *codes, *scales;
    *recipe = snipi_recipe_of(s, format, t->kind);
    memset(out, 0, sizeof *out);
    out->recipe = recipe;
    if (snipi_plain(format)) {
        out->codes = t->x;
        out->transposed = t->transposed;
        out->round_bf16 = format == SNIP_BF16;
        l->nonfinite += snipi_count_nonfinite(t->x, t->rows * t->cols);
        return SNIP_OK;
    }
    codes = snipi_reserve(s, slot, snip_codes_bound(recipe, rows, cols));
    scales = snipi_reserve(s, slot + 1, snip_scales_bound(recipe, rows, cols));
    if (!codes || !scales) return SNIP_OUT_OF_MEMORY;
    out->codes = codes;
    out->scales = scales;
    status = snipi_quantize_to_codes(recipe, t->x, rows, cols, t->transposed ? 1 : t->cols, t->transposed ? t->cols : 1,
                                     codes, scales, snipi_key(s, l, micro, t->role), NULL, &counts, 0);
    l->nonfinite += counts.nonfinite;
    l->saturated += counts.saturated;
    return status;
}

// The weight is the same for all micro-batches of a pass: where there were several, it is quantized and packed for the
// first.
static snipi_cached *snipi_shared_weight(const snip *s, snipi_layer *l, int64_t micro, snip_format format,
                                         const snipi_tensor *t) {
    snipi_cached *w = &l->weight[t->transposed];
    if (t->kind != SNIPI_WEIGHT || l->micros < 2 || s->pass != SNIP_PASS_ORDINARY || s->mode != SNIP_TRAIN) return NULL;
    if (snipi_recipe_of(s, format, SNIPI_WEIGHT).rounding != SNIP_ROUND_NEAREST_EVEN) return NULL;
    if (micro == 0 || w->format != format || w->held != t->x) w->held = NULL;
    return w;
}

// c[m][n] (+)= a * b^T in `format`, contiguous.
static snip_status snipi_layer_gemm(snip *s, snipi_layer *l, int64_t micro, snip_format format, const snipi_tensor *a,
                                    const snipi_tensor *b, float *c, int accumulate, const float *bias) {
    int64_t m = a->transposed ? a->cols : a->rows, n = b->transposed ? b->cols : b->rows,
            k = a->transposed ? a->rows : a->cols;
    snip_recipe recipe_a, recipe_b = snipi_recipe_of(s, format, b->kind);
    snip_operand oa, ob;
    snip_status status = snipi_operand(s, l, micro, format, a, SNIPI_SLOT_A, &recipe_a, &oa);
    snipi_cached *shared = snipi_shared_weight(s, l, micro, format, b);
    int pack = !shared || !shared->held;
    int64_t nonfinite = l->nonfinite, saturated = l->saturated;
    void *scratch;
    if (status) return status;
    if (pack)
        status = snipi_operand(s, l, micro, format, b, SNIPI_SLOT_B, &recipe_b, &ob);
    else {
        memset(&ob, 0, sizeof ob);
        ob.recipe = &recipe_b;
        ob.round_bf16 = format == SNIP_BF16;
        l->nonfinite += shared->nonfinite;
        l->saturated += shared->saturated;
    }
    if (status) return status;
    scratch = snipi_reserve(s, SNIPI_SLOT_GEMM, snipi_gemm_scratch(m, n, k, snipi_s8_block(&oa, &ob, k)));
    if (!scratch) return SNIP_OUT_OF_MEMORY;
    if (shared && pack) {
        size_t size = snipi_gemm_held(m, n, k, &oa, &ob, s->desc.isa);
        if (size > shared->size) {
            snipi_free(s, shared->panels);
            shared->panels = s->desc.alloc.alloc_fn(size, s->desc.alloc.user);
            shared->size = shared->panels ? size : 0;
            if (!shared->panels) return SNIP_OUT_OF_MEMORY;
        }
        shared->nonfinite = l->nonfinite - nonfinite;
        shared->saturated = l->saturated - saturated;
        shared->held = b->x;
        shared->format = format;
    }
    return snipi_gemm_with(m, n, k, &oa, &ob, c, n, accumulate, bias, scratch, s->desc.isa,
                           shared ? shared->panels : NULL, pack, NULL);
}

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

static snip_status snipi_fwd(snip *s, snipi_layer *l, int64_t micro, snip_format format, float *out, const float *x,
                             const float *w, const float *bias, int64_t rows) {
    snipi_tensor a = snipi_tensor_of(x, rows, l->k, 0, SNIPI_ACTIVATION, SNIPI_ROLE_X),
                 b = snipi_tensor_of(w, l->n, l->k, 0, SNIPI_WEIGHT, SNIPI_ROLE_W);
    return snipi_layer_gemm(s, l, micro, format, &a, &b, out, 0, bias);
}

static snip_status snipi_dgrad(snip *s, snipi_layer *l, int64_t micro, snip_format format, float *dx, int accumulate,
                               const float *dy, const float *w, int64_t rows) {
    snipi_tensor a = snipi_tensor_of(dy, rows, l->n, 0, SNIPI_GRADIENT, SNIPI_ROLE_DY),
                 b = snipi_tensor_of(w, l->n, l->k, 1, SNIPI_WEIGHT, SNIPI_ROLE_W_T);
    return snipi_layer_gemm(s, l, micro, format, &a, &b, dx, accumulate, NULL);
}

// dy may hold a selection of the output features, [rows][features].
static snip_status snipi_wgrad(snip *s, snipi_layer *l, int64_t micro, snip_format format, float *dw, int accumulate,
                               const float *dy, int64_t features, const float *x, int64_t rows) {
    snipi_tensor a = snipi_tensor_of(dy, rows, features, 1, SNIPI_GRADIENT, SNIPI_ROLE_DY_T),
                 b = snipi_tensor_of(x, rows, l->k, 1, SNIPI_ACTIVATION, SNIPI_ROLE_X_T);
    return snipi_layer_gemm(s, l, micro, format, &a, &b, dw, accumulate, NULL);
}

// ---- measuring
static double snipi_run_sq(const float *x, int64_t n) {
    enum { LANES = 32 };

    double lane[LANES] = { 0 };
    int64_t i;
    int j, half;
    for (i = 0; i + LANES <= n; i += LANES)
        for (j = 0; j < LANES; j++) lane[j] += (double)x[i + j] * (double)x[i + j];
    for (j = 0; i < n; i++, j++) lane[j] += (double)x[i] * (double)x[i];
    for (half = LANES / 2; half; half /= 2)
        for (j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

static void snipi_sum_sq_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    sum->part[c] = snipi_run_sq(sum->x + sum->n * c / SNIPI_CHUNKS,
                                sum->n * (c + 1) / SNIPI_CHUNKS - sum->n * c / SNIPI_CHUNKS);
}

static double snipi_sum_sq(const float *x, int64_t n) {
    snipi_sum sum;
    sum.x = x;
    sum.n = n;
    return snipi_sum_up(&sum, snipi_sum_sq_chunk);
}

// Count-sketch (Charikar, Chen, Farach-Colton 2002), added with a factor: element i of chunk c = i / 4096 goes to
// bucket (i + h(c)) % 4096 with a random sign, so |sketch|^2 estimates |x|^2 with relative deviation sqrt(2 / 4096),
// and the sketch of a difference is the difference of sketches. Chunks are shared out to parts whose number depends on
// n alone, each with a sketch of its own: the sums do not depend on the number of threads.
typedef struct {
    float *own;
    const float *x;
    int64_t n, offset, first, chunks, parts;
    float factor;
    snip_rng_key key;
    snipi_flip flip;
} snipi_sketch;

static void snipi_sketch_part(void *arg, int64_t p) {
    const snipi_sketch *q = (const snipi_sketch *)arg;
    float *to = q->own + p * SNIPI_SKETCH;
    int64_t chunk, end = q->first + q->chunks * (p + 1) / q->parts;
    memset(to, 0, SNIPI_SKETCH * sizeof(float));
    for (chunk = q->first + q->chunks * p / q->parts; chunk < end; chunk++) {
        uint32_t hash[4], words[4 * SNIPI_GROUP];
        int b;
        snip_philox(q->key, (uint64_t)chunk | (uint64_t)1 << 63, hash);
        for (b = 0; b < SNIPI_SKETCH / SNIPI_SIGNS; b++) {
            float terms[SNIPI_SIGNS];
            int64_t from = chunk * SNIPI_SKETCH + b * SNIPI_SIGNS;
            int i, bucket = (int)((hash[0] + (uint32_t)(b * SNIPI_SIGNS)) % SNIPI_SKETCH);
            int j0 = (int)snipi_min(SNIPI_SIGNS, snipi_max(0, q->offset - from)),
                j1 = (int)snipi_min(SNIPI_SIGNS, snipi_max(0, q->offset + q->n - from));
            if (b % SNIPI_GROUP == 0) snipi_group_signs(q->key, (uint64_t)from / SNIPI_SIGNS, words);
            if (j0 >= j1) continue;
            snipi_sign_block(q->flip, words + b % SNIPI_GROUP * 4, q->x + (from + j0 - q->offset), q->factor, j0, j1,
                             terms);
            if (bucket + SNIPI_SIGNS <= SNIPI_SKETCH)
                for (i = 0; i < SNIPI_SIGNS; i++) to[bucket + i] += terms[i];
            else
                for (i = 0; i < SNIPI_SIGNS; i++) to[(bucket + i) % SNIPI_SKETCH] += terms[i];
        }
    }
}

static snip_status snipi_sketch_add(snip *s, snipi_layer *l, int which, const float *x, int64_t n, int64_t offset) {
    float *sketch = l->sketch + which * SNIPI_SKETCH;
    int64_t p, j;
    snipi_sketch q;
    q.x = x;
    q.n = n;
    q.offset = offset;
    q.first = offset / SNIPI_SKETCH;
    q.chunks = snipi_ceil_div(offset + n, SNIPI_SKETCH) - q.first;
    q.parts = snipi_max(1, snipi_min(SNIPI_CHUNKS, q.chunks / 16));
    q.own = snipi_reserve_floats(s, SNIPI_SLOT_SKETCH, q.parts * SNIPI_SKETCH);
    q.factor = s->pass == SNIP_PASS_CLEAN ? -1.0f : 1.0f;
    q.key = snipi_key(s, l, 0, SNIPI_ROLE_SKETCH + which);
    q.flip = snipi_flip_of(SNIP_ISA_BEST);
    if (!q.own) return SNIP_OUT_OF_MEMORY;
    snipi_share(snipi_sketch_part, &q, q.parts, n);
    for (p = 0; p < q.parts; p++)
        for (j = 0; j < SNIPI_SKETCH; j++) sketch[j] += q.own[p * SNIPI_SKETCH + j];
    return SNIP_OK;
}

static snip_status snipi_f32_gemm(snip *s, int64_t m, int64_t n, int64_t k, const float *a, int a_transposed,
                                  const float *b, int b_transposed, float *c) {
    snip_recipe recipe = SNIP_RECIPE_F32;
    snip_operand oa, ob;
    void *scratch = snipi_reserve(s, SNIPI_SLOT_GEMM, snip_gemm_scratch(m, n, k));
    if (!scratch) return SNIP_OUT_OF_MEMORY;
    memset(&oa, 0, sizeof oa);
    memset(&ob, 0, sizeof ob);
    oa.recipe = ob.recipe = &recipe;
    oa.codes = a;
    oa.transposed = a_transposed;
    ob.codes = b;
    ob.transposed = b_transposed;
    return snip_gemm(m, n, k, &oa, &ob, c, n, 0, NULL, scratch, s->desc.isa);
}

// The sum over rows of x [rows][cols] into `targets` rows, 128 or 32, each with a random sign: row r of chunk c = r /
// targets goes to row (r + h(c)) % targets, so that |mixed|^2 is |x|^2 in expectation, also behind a matrix. offset:
// rows before x. Targets are shared out; the chunks' rows are added in order.
enum { SNIPI_MIX_PARTS = 16, SNIPI_MIX_CHUNKS = 32, SNIPI_MIX_WIDTH = 64 };

typedef struct {
    snip_rng_key key;
    const float *x;
    int64_t rows, cols, offset;
    int targets;
    float *mixed;
} snipi_mixing;

SNIPI_HD SNIPI_INLINE void snipi_mix_hash(snip_rng_key key, int64_t chunk, uint32_t signs[4], uint32_t hash[4]) {
    snipi_philox(key, (uint64_t)chunk, signs);
    snipi_philox(key, (uint64_t)chunk | (uint64_t)1 << 63, hash);
}

static void snipi_mix_part(void *arg, int64_t part) {
    const snipi_mixing *q = (const snipi_mixing *)arg;
    const int64_t cols = q->cols, first = q->offset / q->targets,
                  chunks = snipi_ceil_div(q->offset + q->rows, q->targets) - first;
    const uint32_t targets = (uint32_t)q->targets, share = targets / SNIPI_MIX_PARTS, begin = (uint32_t)part * share;
    uint32_t to, signs[SNIPI_MIX_CHUNKS][4], hash[SNIPI_MIX_CHUNKS][4];
    int64_t group, c, i;
    int j;
    memset(q->mixed + begin * cols, 0, (size_t)(share * cols) * sizeof(float));
    for (group = 0; group < chunks; group += SNIPI_MIX_CHUNKS) {
        const int64_t n = snipi_min(SNIPI_MIX_CHUNKS, chunks - group);
        for (c = 0; c < n; c++) snipi_mix_hash(q->key, first + group + c, signs[c], hash[c]);
        for (to = begin; to < begin + share; to++)
            for (c = 0; c < n; c++) {
                const uint32_t at = (to - hash[c][0]) % targets;  // 2^32 is a multiple of it
                const int64_t row = (first + group + c) * targets + at - q->offset;
                const float sign = signs[c][at / 32] >> at % 32 & 1u ? 1.0f : -1.0f, *x = q->x + row * cols;
                float *sum = q->mixed + to * cols;
                if (row < 0 || row >= q->rows) continue;
                for (i = 0; i + SNIPI_MIX_WIDTH <= cols; i += SNIPI_MIX_WIDTH)
                    for (j = 0; j < SNIPI_MIX_WIDTH; j++) sum[i + j] += sign * x[i + j];
                for (; i < cols; i++) sum[i] += sign * x[i];
            }
    }
}

static void snipi_mix_rows(snip_rng_key key, const float *x, int64_t rows, int64_t cols, int64_t offset, int targets,
                           float *mixed) {
    snipi_mixing q;
    q.key = key;
    q.x = x;
    q.rows = rows;
    q.cols = cols;
    q.offset = offset;
    q.targets = targets;
    q.mixed = mixed;
    snipi_share(snipi_mix_part, &q, SNIPI_MIX_PARTS, rows * cols);
}

// The same of the columns, into SNIPI_PROJECTED: x R [rows][32], R^T the matrix that snipi_mix_rows multiplies by.
static void snipi_mix_columns_part(void *arg, int64_t part) {
    enum { TO = SNIPI_PROJECTED };

    const snipi_mixing *q = (const snipi_mixing *)arg;
    const int64_t begin = q->rows * part / SNIPI_MIX_PARTS, end = q->rows * (part + 1) / SNIPI_MIX_PARTS,
                  chunks = snipi_ceil_div(q->cols, TO);
    float sign[SNIPI_MIX_CHUNKS][TO];
    uint32_t shift[SNIPI_MIX_CHUNKS];
    int64_t group, c, r;
    int j;
    memset(q->mixed + begin * TO, 0, (size_t)((end - begin) * TO) * sizeof(float));
    for (group = 0; group < chunks; group += SNIPI_MIX_CHUNKS) {
        const int64_t n = snipi_min(SNIPI_MIX_CHUNKS, chunks - group);
        for (c = 0; c < n; c++) {
            uint32_t signs[4], hash[4];
            snipi_mix_hash(q->key, group + c, signs, hash);
            shift[c] = hash[0] % TO;
            for (j = 0; j < TO; j++) sign[c][j] = signs[0] >> j & 1u ? 1.0f : -1.0f;
        }
        for (r = begin; r < end; r++) {
            float sum[2 * TO] = { 0 }, *out = q->mixed + r * TO;  // what goes round the end stays apart till the last
            for (c = 0; c < n; c++) {
                const int width = (int)snipi_min(TO, q->cols - (group + c) * TO);
                const float *x = q->x + r * q->cols + (group + c) * TO;
                float *to = sum + shift[c];
                if (width == TO)
                    for (j = 0; j < TO; j++) to[j] += sign[c][j] * x[j];
                else
                    for (j = 0; j < width; j++) to[j] += sign[c][j] * x[j];
            }
            for (j = 0; j < TO; j++) out[j] += sum[j] + sum[j + TO];
        }
    }
}

static void snipi_mix_columns(snip_rng_key key, const float *x, int64_t rows, int64_t cols, float *mixed) {
    snipi_mixing q;
    q.key = key;
    q.x = x;
    q.rows = rows;
    q.cols = cols;
    q.offset = 0;
    q.targets = SNIPI_PROJECTED;
    q.mixed = mixed;
    snipi_share(snipi_mix_columns_part, &q, SNIPI_MIX_PARTS, rows * cols);
}

// Sketches X (which SNIPI_SKETCH_X) and X W^T, or dY and dY W, of x's mixed rows; the products projected: x (A R), A
// the weights as x meets them, R mixing A's columns into 32, so that |x A R|^2 is |x A|^2 in expectation. weight: the
// caller's, without the probe's noise.
static snip_status snipi_sketch_tensor(snip *s, snipi_layer *l, int which, const float *x, int64_t rows,
                                       const float *weight, int64_t offset) {
    int by_x = which == SNIPI_SKETCH_X, behind = by_x ? SNIPI_SKETCH_XW : SNIPI_SKETCH_DYW;
    int64_t in = by_x ? l->k : l->n, i;
    float *seen = snipi_reserve_floats(s, SNIPI_SLOT_PROJECT, in * SNIPI_PROJECTED);
    float *mixed = snipi_reserve_floats(s, SNIPI_SLOT_MIXED, SNIPI_MIXED * in),
          *result = snipi_reserve_floats(s, SNIPI_SLOT_SAMPLE_OUT, SNIPI_SKETCH);
    float *sketch = l->sketch + behind * SNIPI_SKETCH, factor = s->pass == SNIP_PASS_CLEAN ? -1.0f : 1.0f;
    snip_rng_key project = snipi_key(s, l, 0, SNIPI_ROLE_PROJECT);
    snip_status status;
    if (!seen || !mixed || !result) return SNIP_OUT_OF_MEMORY;
    snipi_mix_rows(snipi_key(s, l, 0, SNIPI_ROLE_SKETCH + behind), x, rows, in, offset, SNIPI_MIXED, mixed);
    status = snipi_sketch_add(s, l, which, mixed, SNIPI_MIXED * in, 0);
    if (by_x)
        snipi_mix_rows(project, weight, l->n, l->k, 0, SNIPI_PROJECTED, seen);
    else
        snipi_mix_columns(project, weight, l->n, l->k, seen);
    if (!status) status = snipi_f32_gemm(s, SNIPI_MIXED, SNIPI_PROJECTED, in, mixed, 0, seen, !by_x, result);
    for (i = 0; i < SNIPI_SKETCH && !status; i++) sketch[i] += factor * result[i];
    return status;
}

// D = du/dg at learning rate 1, from the optimizer's state alone.
// AdamW: (1 - beta1) / (1 - beta1^t) / (sqrt(vhat) + eps). Where v is 0 no gradient has ever arrived and none is
// expected: D = 0. SGD: 1. Lion's sign has no slope; the mean update's has, the mean over gradients of a mini-batch's
// noise, N(0, noise^2): 2 (1 - beta1) times the density of N(beta1 m, ((1 - beta1) noise)^2) at 0. m is nearly all
// noise, of variance noise^2 (1 - beta2) / (1 + beta2). SNIP_CUSTOM: `custom`, as the callback has filled it in.
typedef struct {
    snip_optimizer kind;
    const float *state;
    float numerator, scale, eps;
} snipi_sensitivity;

static snipi_sensitivity snipi_sensitivity_of(const snip *s, const snipi_layer *l, const float *custom) {
    const snip_adamw *o = &s->adamw;
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
        double noise = sqrt(snipi_sum_sq(l->m, l->n * l->k) / (double)(l->n * l->k) * (1 + o->beta2) / (1 - o->beta2));
        d.numerator = noise > 0 ? (float)(0.7978845608028654 / noise) : 0;  // 2 / sqrt(2 pi)
        d.scale = noise > 0 ? (float)(o->beta1 / ((1 - o->beta1) * noise)) : 0;
    }
    return d;
}

SNIPI_HD SNIPI_INLINE float snipi_sensitivity_at(const snipi_sensitivity *d, int64_t i) {
    float x = d->state[i];
    if (d->kind == SNIP_ADAMW) return snipi_adam_at(d->numerator, x, d->scale, d->eps);
    if (d->kind == SNIP_CUSTOM) return x;
    return d->kind == SNIP_LION ? d->numerator * expf(-0.5f * (x * d->scale) * (x * d->scale)) : d->numerator;
}

static void snipi_sensitivity_run(const snipi_sensitivity *d, int64_t i, int64_t n, float *out) {
    int64_t j;
    if (d->kind == SNIP_ADAMW)
        snipi_adam_of(SNIP_ISA_BEST)(NULL, d->state + i, d->numerator, d->scale, d->eps, n, out);
    else
        for (j = 0; j < n; j++) out[j] = snipi_sensitivity_at(d, i + j);
}

typedef struct {
    snipi_sensitivity d;
    float *out;
    int64_t n;
} snipi_sensitivity_task;

static void snipi_sensitivity_chunk(void *arg, int64_t c) {
    const snipi_sensitivity_task *q = (const snipi_sensitivity_task *)arg;
    int64_t i = q->n * c / SNIPI_CHUNKS;
    snipi_sensitivity_run(&q->d, i, q->n * (c + 1) / SNIPI_CHUNKS - i, q->out + i);
}

static void snipi_sensitivities(const snip *s, const snipi_layer *l, float *out) {
    snipi_sensitivity_task q;
    q.d = snipi_sensitivity_of(s, l, out);
    q.out = out;
    q.n = l->n * l->k;
    if (q.d.kind == SNIP_CUSTOM)
        s->desc.sensitivity(s->desc.sensitivity_user, (int)(l - s->layers), out);
    else
        snipi_share(snipi_sensitivity_chunk, &q, SNIPI_CHUNKS, q.n);
}

// The weights a probe pass runs on: the caller's plus noise.
static const float *snipi_probe_weight(snip *s, snipi_layer *l, const float *w) {
    int64_t n = l->n * l->k;
    float *noisy = snipi_reserve_floats(s, SNIPI_SLOT_W, n);
    if (!noisy) return NULL;
    if (s->pass == SNIP_PASS_LOSS_PROBE)
        snip_noise_add(noisy, w, n, (float)l->sigma_w, NULL, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_W));
    else {
        snipi_sensitivities(s, l, noisy);
        snip_noise_add(noisy, w, n, l->weight_sq > 0 ? (float)(s->tau / sqrt(l->weight_sq)) : 0.0f, noisy,
                       snipi_key(s, l, 0, SNIPI_ROLE_PROBE));
    }
    return noisy;
}

static const float *snipi_probe_input(snip *s, snipi_layer *l, int64_t micro, const float *x, int64_t n) {
    float *noisy = snipi_reserve_floats(s, SNIPI_SLOT_X, n);
    if (noisy) snip_noise_add(noisy, x, n, (float)l->sigma_x, NULL, snipi_key(s, l, micro, SNIPI_ROLE_NOISE_X));
    return noisy;
}

static int64_t snipi_samples(const snip *s, const snipi_layer *l) {
    return snipi_min(l->n, snipi_max(16, (int64_t)ceil((double)l->n * s->desc.sample)));
}

// |D * dW_err|^2 on output features at equal distances, scaled up to all of them.
static snip_status snipi_measure_wgrad(snip *s, snipi_layer *l, int64_t micro, const float *dy, const float *x,
                                       int64_t rows, const float *exact) {
    int64_t samples = snipi_samples(s, l), i, j, r, nonfinite = l->nonfinite, saturated = l->saturated;
    float *picked = snipi_reserve_floats(s, SNIPI_SLOT_SAMPLE, rows * samples),
          *result = snipi_reserve_floats(s, SNIPI_SLOT_SAMPLE_OUT, samples * l->k);
    float *custom = s->desc.optimizer == SNIP_CUSTOM ? snipi_reserve_floats(s, SNIPI_SLOT_W, l->n * l->k) : NULL;
    snipi_sensitivity d = snipi_sensitivity_of(s, l, custom);
    snip_status status = SNIP_OK;
    int f;
    if (!picked || !result || (s->desc.optimizer == SNIP_CUSTOM && !custom)) return SNIP_OUT_OF_MEMORY;
    if (custom) snipi_sensitivities(s, l, custom);
    for (r = 0; r < rows; r++) {
        const float *from = dy + r * l->n;
        int64_t rest = 0;  // feature i * n / samples, without a division an element
        for (i = 0; i < samples; i++) {
            picked[r * samples + i] = *from;
            from += l->n / samples;
            rest += l->n % samples;
            if (rest >= samples) {
                rest -= samples;
                from++;
            }
        }
    }
    for (f = 0; f < SNIPI_CANDIDATES && !status; f++) {
        double sum = 0;
        status = snipi_wgrad(s, l, micro, snipi_candidates[f], result, 0, picked, samples, x, rows);
        for (i = 0; i < samples && !status; i++) {
            int64_t at = i * l->n / samples * l->k;
            float *e = result + i * l->k, slope[512];
            for (j = 0; j < l->k; j++) {
                if (j % 512 == 0) snipi_sensitivity_run(&d, at + j, snipi_min(512, l->k - j), slope);
                e[j] = (e[j] - exact[at + j]) * slope[j % 512];
            }
            sum += snipi_run_sq(e, l->k);
        }
        l->measured[f].wgrad_err += sum * ((double)l->n / (double)samples);
    }
    l->nonfinite = nonfinite;
    l->saturated = saturated;
    return status;
}

// A training step's first error is kept for snip_end_step, with its message, so that a caller who does not look at
// every call learns of it.
static void snipi_keep(snip *s, snip_status status) {
    if (s->pending) return;
    s->pending = status;
    memcpy(s->held, s->message, sizeof s->held);
}

static snip_status snipi_hold(snip *s, snip_status status, const char *where, const char *why) {
    snipi_fail_in(s, status, where, why);
    if (s) snipi_keep(s, status);
    return status;
}

// The error of a linear layer's call.
static snip_status snipi_hold_call(snip *s, snip_status status, const char *where) {
    return s && s->mode == SNIP_TRAIN ? snipi_hold(s, status, where, snip_status_text(status))
                                      : snipi_fail_in(s, status, where, snip_status_text(status));
}

static snip_status snipi_finish_call(snip *s, const snipi_layer *l, int64_t nonfinite_before, snip_status status) {
    char where[108] = "a linear layer's call";
    if (!status && l && l->nonfinite != nonfinite_before) status = SNIP_NONFINITE;
    if (l) snprintf(where, sizeof where, "layer %.100s", l->name);
    return status ? snipi_hold_call(s, status, where) : status;
}

static snip_status snipi_refuse(snip *s, const char *function, int layer) {
    char where[64];
    snprintf(where, sizeof where, "%s, layer %d", function, layer);
    return snipi_hold_call(s, SNIP_BAD_ARGUMENT, where);
}

static int snipi_linear_args(const snipi_layer *l, const void *a, const void *b, const void *c, int64_t rows) {
    return l && rows >= 0 && snipi_shape_ok(rows, snipi_max(l->n, l->k), snipi_max(l->n, l->k)) &&
           (rows == 0 || (a && b && c));
}

// A sample of X (which 0) and dY (1), for the watch over drift: 64 runs of 16 elements, spread by the golden ratio so
// that they meet all channels.
static void snipi_observe(snipi_layer *l, int which, const float *x, int64_t n) {
    uint32_t r;
    for (r = 0; r < 64; r++) {
        int64_t i = (int64_t)((double)(r * 0x9E3779B9u) / 4294967296.0 * (double)n), end = snipi_min(i + 16, n);
        l->seen[which] += (double)(end - i);
        for (; i < end; i++) l->seen_sq[which] += (double)x[i] * (double)x[i];
    }
}

SNIP_API snip_status snip_linear_forward(snip *s, int layer, float *out, const float *inp, const float *weight,
                                         const float *bias, int64_t rows) {
    snipi_layer *l = snipi_layer_at(s, layer);
    const float *x = inp, *w = weight;
    snip_status status;
    int64_t micro, nonfinite;
    if (!snipi_linear_args(l, out, inp, weight, rows)) return snipi_refuse(s, "snip_linear_forward", layer);
    if (rows == 0) return SNIP_OK;
    nonfinite = l->nonfinite;
    if (s->mode != SNIP_TRAIN)
        return snipi_finish_call(
            s, l, nonfinite,
            snipi_fwd(s, l, 0, s->mode == SNIP_EVAL ? l->format[SNIP_FWD] : s->desc.high, out, x, w, bias, rows));
    if (s->told)
        return snipi_hold(s, SNIP_BAD_ARGUMENT, l->name, "called after the step's last pass: snip_end_step is missing");
    micro = l->calls_forward++;
    if (bias) l->nonfinite += snipi_count_nonfinite(bias, l->n);
    if (s->pass == SNIP_PASS_ORDINARY) {
        snipi_observe(l, 0, inp, rows * l->k);
        return snipi_finish_call(s, l, nonfinite, snipi_fwd(s, l, micro, l->format[SNIP_FWD], out, x, w, bias, rows));
    }
    if (s->pass == SNIP_PASS_LOSS_PROBE) {
        if (micro == 0) {
            l->weight_sq = snipi_sum_sq(weight, l->n * l->k);
            l->sigma_w = 0.02 * sqrt(l->weight_sq / (double)(l->n * l->k));
            l->sigma_x = 0.02 * sqrt(snipi_sum_sq(inp, rows * l->k) / (double)(rows * l->k));
        }
        x = snipi_probe_input(s, l, micro, inp, rows * l->k);
    }
    if (s->pass != SNIP_PASS_CLEAN) w = snipi_probe_weight(s, l, weight);
    status = x && w ? SNIP_OK : SNIP_OUT_OF_MEMORY;
    if (!status && s->pass != SNIP_PASS_LOSS_PROBE && snipi_probes_updates(s)) {
        status = snipi_sketch_tensor(s, l, SNIPI_SKETCH_X, inp, rows, weight, l->elements_x / l->k);
    }
    l->elements_x += rows * l->k;
    if (!status) status = snipi_fwd(s, l, micro, s->desc.measure, out, x, w, bias, rows);
    return snipi_finish_call(s, l, nonfinite, status);
}

// <dX, X> of the pass's block i of 32 rows goes to bucket i % 64, with a factor; dX is added to `to` as well, which may
// be NULL.
typedef struct {
    const float *x, *dx;
    int64_t rows, k, offset;
    float *to;
    double factor, *buckets;
} snipi_scaling;

static void snipi_scaling_bucket(void *arg, int64_t bucket) {
    enum { LANES = 16 };

    const snipi_scaling *q = (const snipi_scaling *)arg;
    const int64_t first = q->offset / SNIPI_BLOCK_ROWS, end = q->offset + q->rows, k = q->k;
    int64_t block = first + (bucket + SNIPI_BLOCKS - first % SNIPI_BLOCKS) % SNIPI_BLOCKS, r;
    for (; block * SNIPI_BLOCK_ROWS < end; block += SNIPI_BLOCKS)
        for (r = snipi_max(block * SNIPI_BLOCK_ROWS, q->offset); r < snipi_min((block + 1) * SNIPI_BLOCK_ROWS, end);
             r++) {
            const float *x = q->x + (r - q->offset) * k, *d = q->dx + (r - q->offset) * k;
            float *to = q->to ? q->to + (r - q->offset) * k : NULL, lanes[LANES] = { 0 };
            int64_t i;
            int j;
            for (i = 0; i + LANES <= k; i += LANES)
                for (j = 0; j < LANES; j++) lanes[j] += d[i + j] * x[i + j];
            for (j = 0; i < k; i++, j++) lanes[j] += d[i] * x[i];
            for (j = 0; j < LANES; j++) q->buckets[bucket] += q->factor * (double)lanes[j];
            for (i = 0; to && i < k; i++) to[i] += d[i];
        }
}

static void snipi_measure_scaling(const snip *s, snipi_layer *l, const float *x, int64_t rows, int64_t offset,
                                  const float *dx, float *to) {
    snipi_scaling q;
    q.x = x;
    q.dx = dx;
    q.rows = rows;
    q.k = l->k;
    q.offset = offset;
    q.to = to;
    q.factor = s->pass == SNIP_PASS_CLEAN ? -1 : 1;
    q.buckets = l->scaling;
    snipi_share(snipi_scaling_bucket, &q, SNIPI_BLOCKS, rows * l->k);
}

// X's rounding errors e in a candidate, beside dX, row by row.
typedef struct {
    const float *x, *rounded, *dx;
    int64_t rows, k;
    double sum[SNIPI_CHUNKS][5];
} snipi_input_errors;

static void snipi_input_errors_chunk(void *arg, int64_t c) {
    enum { LANES = 16 };

    snipi_input_errors *q = (snipi_input_errors *)arg;
    int64_t r, k = q->k, end = q->rows * (c + 1) / SNIPI_CHUNKS;
    double sum[5] = { 0 };
    for (r = q->rows * c / SNIPI_CHUNKS; r < end; r++) {
        const float *a = q->x + r * k, *b = q->rounded + r * k, *d = q->dx + r * k;
        float lanes[3][LANES] = { { 0 } };
        double row[3] = { 0, 0, 0 };  // <d, e>, |d|^2, <d, x>
        int64_t i;
        int j;
        for (i = 0; i + LANES <= k; i += LANES)
            for (j = 0; j < LANES; j++) {
                lanes[0][j] += d[i + j] * (b[i + j] - a[i + j]);
                lanes[1][j] += d[i + j] * d[i + j];
                lanes[2][j] += d[i + j] * a[i + j];
            }
        for (j = 0; i < k; i++, j++) {
            lanes[0][j] += d[i] * (b[i] - a[i]);
            lanes[1][j] += d[i] * d[i];
            lanes[2][j] += d[i] * a[i];
        }
        for (i = 0; i < 3; i++)
            for (j = 0; j < LANES; j++) row[i] += (double)lanes[i][j];
        sum[0] += row[0];
        sum[1] += row[1];
        sum[2] += row[0] * row[0];
        sum[3] += row[0] * row[2];
        sum[4] += row[2] * row[2];
    }
    memcpy(q->sum[c], sum, sizeof sum);
}

static snip_status snipi_measure_input(snip *s, snipi_layer *l, int64_t micro, int f, const float *x, int64_t rows,
                                       const float *dx, snipi_measured *to) {
    snip_recipe recipe = snipi_recipe_of(s, snipi_candidates[f], SNIPI_ACTIVATION);
    float *rounded = snipi_reserve_floats(s, SNIPI_SLOT_X, rows * l->k);
    snipi_input_errors q;
    snip_quant_stats stats;
    int c;
    if (!rounded) return SNIP_OUT_OF_MEMORY;
    snip_fake_quantize(&recipe, x, rows, l->k, l->k, rounded, l->k, snipi_key(s, l, micro, SNIPI_ROLE_X), x, &stats);
    q.x = x;
    q.rounded = rounded;
    q.dx = dx;
    q.rows = rows;
    q.k = l->k;
    snipi_share(snipi_input_errors_chunk, &q, SNIPI_CHUNKS, q.rows * q.k);
    for (c = 0; c < SNIPI_CHUNKS; c++) {
        to->dot_x += q.sum[c][0];
        to->dx_sq += q.sum[c][1];
        to->along_x += q.sum[c][2];
        to->both_x += q.sum[c][3];
        to->scale_x += q.sum[c][4];
    }
    to->self_x += stats.dot;
    if (f == 0) l->input_sq += stats.sum_sq;
    return SNIP_OK;
}

// The layer's own dX and dW of a measuring pass, beside the sums the caller keeps.
static snip_status snipi_measure_backward(snip *s, snipi_layer *l, int64_t micro, float *dinp, float *dweight,
                                          const float *dout, const float *inp, const float *weight, int64_t rows) {
    int64_t nx = rows * l->k, nw = l->n * l->k;
    const float *x = inp, *w = weight;
    float *own;
    snip_status status;
    int clean = s->pass == SNIP_PASS_CLEAN, loss_probe = s->pass == SNIP_PASS_LOSS_PROBE,
        sketched = !loss_probe && snipi_probes_updates(s), f;
    if (loss_probe) x = snipi_probe_input(s, l, micro, inp, nx);
    if (!clean) w = snipi_probe_weight(s, l, weight);
    own = snipi_reserve_floats(s, SNIPI_SLOT_OUT, snipi_max(nx, snipi_max(l->n, SNIPI_PROJECTED) * l->k));
    if (!x || !w || !own) return SNIP_OUT_OF_MEMORY;
    if (sketched) {
        status = snipi_sketch_tensor(s, l, SNIPI_SKETCH_DY, dout, rows, weight, l->elements_y / l->n);
        if (status) return status;
    }
    status = snipi_dgrad(s, l, micro, s->desc.measure, own, 0, dout, w, rows);
    if (status) return status;
    if (sketched) snipi_measure_scaling(s, l, inp, rows, l->elements_y / l->n, own, clean ? NULL : dinp);
    l->elements_y += rows * l->n;
    if (clean || loss_probe)
        *(clean ? &l->clean_x : &l->noisy_x) += snipi_noise_dot(own, nx, snipi_key(s, l, micro, SNIPI_ROLE_NOISE_X),
                                                                dinp);
    if (clean) {
        for (f = 0; f < SNIPI_CANDIDATES; f++) {
            snip_recipe gradient = snipi_recipe_of(s, snipi_candidates[f], SNIPI_GRADIENT);
            snip_quant_stats stats;
            status = snipi_measure_input(s, l, micro, f, inp, rows, own, &l->measured[f]);
            if (status) return status;
            if (!sketched) continue;
            snip_fake_quantize(&gradient, dout, rows, l->n, l->n, NULL, 0, snipi_key(s, l, micro, SNIPI_ROLE_DY), NULL,
                               &stats);
            l->measured[f].err_dy += stats.err_sq;
            if (f == 0) l->gradient_sq += stats.sum_sq;
        }
    }

    if (s->pass == SNIP_PASS_UPDATE_PROBE) {
        float *mixed = snipi_reserve_floats(s, SNIPI_SLOT_SAMPLE, rows * SNIPI_PROJECTED);
        if (!mixed) return SNIP_OUT_OF_MEMORY;
        snipi_mix_columns(snipi_key(s, l, 0, SNIPI_ROLE_PROJECT), dout, rows, l->n, mixed);
        status = snipi_wgrad(s, l, micro, s->desc.measure, own, 0, mixed, SNIPI_PROJECTED, x, rows);
        return status ? status : snipi_sketch_add(s, l, SNIPI_SKETCH_DW, own, SNIPI_PROJECTED * l->k, 0);
    }
    status = snipi_wgrad(s, l, micro, s->desc.measure, own, 0, dout, l->n, x, rows);
    if (status) return status;
    *(clean ? &l->clean_w : &l->noisy_w) += snipi_noise_dot(own, nw, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_W), dweight);
    if (sketched) {
        float *mixed = snipi_reserve_floats(s, SNIPI_SLOT_MIXED, SNIPI_PROJECTED * l->k);
        if (!mixed) return SNIP_OUT_OF_MEMORY;
        snipi_mix_rows(snipi_key(s, l, 0, SNIPI_ROLE_PROJECT), own, l->n, l->k, 0, SNIPI_PROJECTED, mixed);
        if ((status = snipi_sketch_add(s, l, SNIPI_SKETCH_DW, mixed, SNIPI_PROJECTED * l->k, 0)) != SNIP_OK)
            return status;
    }
    if (clean) {
        for (f = 0; f < SNIPI_CANDIDATES; f++) {
            snip_recipe recipe = snipi_recipe_of(s, snipi_candidates[f], SNIPI_WEIGHT);
            snip_quant_stats stats;
            snip_fake_quantize(&recipe, weight, l->n, l->k, l->k, NULL, 0, snipi_key(s, l, 0, SNIPI_ROLE_W), own,
                               &stats);
            l->measured[f].err_w = stats.err_sq;
            l->measured[f].dot_w += stats.dot;
            if (micro || !sketched) continue;
            snip_fake_quantize(&recipe, weight, l->n, l->k, l->k, NULL, 0, snipi_key(s, l, 0, SNIPI_ROLE_W), weight,
                               &stats);
            l->measured[f].self_w = stats.dot;
        }
        if (snipi_probes_updates(s)) status = snipi_measure_wgrad(s, l, micro, dout, inp, rows, own);
    }
    return status;
}

SNIP_API snip_status snip_linear_backward(snip *s, int layer, float *dinp, float *dweight, float *dbias,
                                          const float *dout, const float *inp, const float *weight, int64_t rows) {
    snipi_layer *l = snipi_layer_at(s, layer);
    snip_status status = SNIP_OK;
    int64_t micro, nonfinite, i, j;
    if (!snipi_linear_args(l, dout, inp, weight, rows)) return snipi_refuse(s, "snip_linear_backward", layer);
    if (s->mode != SNIP_TRAIN) return snipi_hold(s, SNIP_BAD_ARGUMENT, l->name, "a backward call outside SNIP_TRAIN");
    if (rows == 0) return SNIP_OK;
    if (s->told)
        return snipi_hold(s, SNIP_BAD_ARGUMENT, l->name, "called after the step's last pass: snip_end_step is missing");
    nonfinite = l->nonfinite;
    micro = l->calls_backward++;
    if (s->pass == SNIP_PASS_ORDINARY) {
        snipi_observe(l, 1, dout, rows * l->n);
        if (dinp) status = snipi_dgrad(s, l, micro, l->format[SNIP_DGRAD], dinp, 1, dout, weight, rows);
        if (dweight && !status)
            status = snipi_wgrad(s, l, micro, l->format[SNIP_WGRAD], dweight, 1, dout, l->n, inp, rows);
    } else
        status = snipi_measure_backward(s, l, micro, dinp, dweight, dout, inp, weight, rows);
    if (dbias && !status)
        for (j = 0; j < rows; j++)
            for (i = 0; i < l->n; i++) dbias[i] += dout[j * l->n + i];
    return snipi_finish_call(s, l, nonfinite, status);
}

// ---- passes, costs, the plan
static snip_status snipi_all_bound(snip *s) {
    char message[160];
    int l;
    for (l = 0; l < s->n_layers; l++) {
        if (s->layers[l].m || s->desc.optimizer == SNIP_CUSTOM) continue;
        snprintf(message, sizeof message, "layer %.100s has no optimizer state: call %s", s->layers[l].name,
                 s->desc.optimizer == SNIP_ADAMW ? "snip_bind_adamw" : "snip_bind_momentum");
        return snipi_fail(s, SNIP_NOT_BOUND, message);
    }
    return SNIP_OK;
}

// Before the update probe: |D|^2 of each layer and the step tau that moves the weights by 1% in rms over the layers.
static snip_status snipi_prepare_update_probe(snip *s) {
    double sum = 0;
    int l;
    if (snipi_all_bound(s)) return SNIP_NOT_BOUND;
    for (l = 0; l < s->n_layers; l++) {
        snipi_layer *layer = &s->layers[l];
        int64_t n = layer->n * layer->k;
        float *d = snipi_reserve_floats(s, SNIPI_SLOT_W, n);
        if (!d) return snipi_fail(s, SNIP_OUT_OF_MEMORY, snip_status_text(SNIP_OUT_OF_MEMORY));
        if ((layer->m && snipi_count_nonfinite(layer->m, n)) || (layer->v && snipi_count_nonfinite(layer->v, n))) {
            char message[160];
            snprintf(message, sizeof message, "layer %.100s: the optimizer's state is not finite", layer->name);
            return snipi_fail(s, SNIP_NONFINITE, message);
        }
        snipi_sensitivities(s, layer, d);
        layer->sensitivity_sq = snipi_sum_sq(d, n);
        if (layer->weight_sq > 0) sum += layer->sensitivity_sq / (layer->weight_sq * layer->weight_sq);
    }
    s->tau = sum > 0 ? 0.01 / sqrt(sum / s->n_layers) : 0;
    return SNIP_OK;
}

// A measurement compares its passes: in each a layer has as many backward as forward calls and rows, and as many as in
// the pass before.
static void snipi_check_calls(snip *s) {
    int l;
    for (l = 0; l < s->n_layers && s->pass != SNIP_PASS_ORDINARY; l++) {
        const snipi_layer *layer = &s->layers[l];
        int64_t rows = layer->elements_x / layer->k, rows_back = layer->elements_y / layer->n;
        char why[160];
        if (layer->calls_forward == layer->calls_backward && rows == rows_back &&
            (s->pass == SNIP_PASS_LOSS_PROBE || (layer->calls_forward == layer->micros && rows == layer->rows)))
            continue;
        snprintf(
            why, sizeof why,
            "%lld forward and %lld backward calls, of %lld and %lld rows, in a pass of a measurement; %lld of %lld rows in the pass before",
            (long long)layer->calls_forward, (long long)layer->calls_backward, (long long)rows, (long long)rows_back,
            (long long)layer->micros, (long long)layer->rows);
        snipi_hold(s, SNIP_BAD_ARGUMENT, layer->name, why);
    }
}

SNIP_API int snip_next_pass(snip *s, double loss) {
    int again = 0;
    if (!s) return 0;
    if (s->told)
        snipi_hold(s, SNIP_BAD_ARGUMENT, "snip_next_pass",
                   "called after the step's last pass: snip_end_step is missing");
    else
        snipi_check_calls(s);
    switch (s->pass) {
        case SNIP_PASS_LOSS_PROBE:
            if (snipi_probes_updates(s)) {
                snip_status status = snipi_prepare_update_probe(s);
                if (status) snipi_keep(s, status);
                snipi_begin_pass(s, status ? SNIP_PASS_ORDINARY : SNIP_PASS_UPDATE_PROBE);
            } else
                snipi_begin_pass(s, SNIP_PASS_CLEAN);
            again = 1;
            break;
        case SNIP_PASS_UPDATE_PROBE:
            snipi_begin_pass(s, SNIP_PASS_CLEAN);
            again = 1;
            break;
        case SNIP_PASS_ORDINARY:
        case SNIP_PASS_CLEAN:
            s->loss = loss;
            s->told = 1;
            break;
    }
    return again;
}

typedef struct {
    snip_optimizer kind;
    const float *m, *v;
    int64_t n;
    float m_scale, v_scale, eps;
} snipi_update;

static void snipi_update_sq_chunk(void *arg, int64_t c) {
    snipi_sum *sum = (snipi_sum *)arg;
    const snipi_update *q = (const snipi_update *)sum->of;
    int64_t i = q->n * c / SNIPI_CHUNKS, end = q->n * (c + 1) / SNIPI_CHUNKS;
    float u[512];
    sum->part[c] = q->kind == SNIP_SGD_MOMENTUM ? snipi_run_sq(q->m + i, end - i)
                                                : (double)(end - i);  // Lion's are all -1 or 1
    if (q->kind != SNIP_ADAMW) return;
    for (sum->part[c] = 0; i < end; i += 512) {
        const int64_t n = snipi_min(512, end - i);
        snipi_adam_of(SNIP_ISA_BEST)(q->m + i, q->v + i, q->m_scale, q->v_scale, q->eps, n, u);
        sum->part[c] += snipi_run_sq(u, n);
    }
}

// sum_j |u_j|^2 / |W_j|^2 of the update just made, at learning rate 1.
static double snipi_update_sq(const snip *s, const snip_adamw *o) {
    snipi_update q;
    snipi_sum sum;
    double total = 0;
    int l;
    sum.of = &q;
    q.kind = s->desc.optimizer;
    q.m_scale = (float)(1 / (1 - pow(o->beta1, (double)o->step)));
    q.v_scale = (float)(1 / (1 - pow(o->beta2, (double)o->step)));
    q.eps = (float)o->eps;
    for (l = 0; l < s->n_layers; l++) {
        const snipi_layer *layer = &s->layers[l];
        double u_sq;
        q.m = layer->m;
        q.v = layer->v;
        q.n = sum.n = layer->n * layer->k;
        u_sq = q.kind == SNIP_CUSTOM ? s->desc.sensitivity(s->desc.sensitivity_user, l, NULL)
                                     : snipi_sum_up(&sum, snipi_update_sq_chunk);
        if (layer->weight_sq > 0) total += u_sq / layer->weight_sq;
    }
    return total;
}

static double snipi_ratio(double a, double b) { return b > 0 ? a / b : 0; }

static snip_estimate snipi_estimate_of(const snip *s, const snipi_layer *l, int f, double update_sq,
                                       double grad_scale) {
    const snipi_measured *q = &l->measured[f];
    double n_w = (double)(l->n * l->k), h_x = snipi_ratio(l->noisy_x - l->clean_x, l->sigma_x),
           h_w = snipi_ratio(l->noisy_w - l->clean_w, l->sigma_w);
    double fwd_sq = l->sketched_sq[SNIPI_SKETCH_DY] * l->input_sq,
           dgrad_sq = l->sketched_sq[SNIPI_SKETCH_X] * l->gradient_sq;
    double dw_sq = l->sketched_sq[SNIPI_SKETCH_DW], by_fwd = dw_sq * snipi_ratio(fwd_sq, fwd_sq + dgrad_sq);
    double probe = s->tau > 0 && update_sq > 0 ? grad_scale * grad_scale / (s->tau * s->tau * update_sq) : 0;
    double mean_w = q->err_w / n_w, shrink_x = -snipi_ratio(q->self_x, l->input_sq),
           shrink_w = -snipi_ratio(q->self_w, l->weight_sq), scaling_sq = 0;
    double rest_x = q->along_x + shrink_x * (2 * q->both_x + shrink_x * q->scale_x),
           rest_w = mean_w - shrink_w * shrink_w * l->weight_sq / n_w;
    snip_estimate e;
    int i;
    for (i = 0; i < SNIPI_BLOCKS; i++) scaling_sq += l->scaling[i] * l->scaling[i];
    memset(&e, 0, sizeof e);
    e.loss_first = q->dot_x + q->dot_w;
    e.loss_second = 0.5 * (h_x * snipi_ratio(q->along_x, q->dx_sq) + h_w * mean_w);
    e.update[SNIP_FWD] = (snipi_ratio(rest_x, q->dx_sq) * l->sketched_sq[SNIPI_SKETCH_DYW] + rest_w * by_fwd +
                          (shrink_x + shrink_w) * (shrink_x + shrink_w) * scaling_sq) *
                         probe;
    e.update[SNIP_DGRAD] = (snipi_ratio(q->err_dy, (double)l->elements_y) * l->sketched_sq[SNIPI_SKETCH_XW] +
                            mean_w * (dw_sq - by_fwd)) *
                           probe;
    e.update[SNIP_WGRAD] = snipi_ratio(q->wgrad_err, l->weight_sq) * snipi_ratio(grad_scale * grad_scale, update_sq);
    return e;
}

static int snipi_estimate_finite(const snip_estimate *e) {
    return !snipi_nonfinite_f64(e->loss_first + e->loss_second + e->update[0] + e->update[1] + e->update[2]);
}

// Mean and variance over measurements x, by exponential weights (Finch, Incremental calculation of weighted mean and
// variance, 2009):
//   r = max(1 / n, 1/3),  d = x - mean,  mean += r d,  S = (1 - r) (S + r d^2),  q = (1 - r)^2 q + r^2, the sum of the
//   squared weights.
// One measurement deviates by var = S / (1 - q) on average, the mean by sqrt(q var); it rests on 1/q measurements, at
// most 5.
static void snipi_average_term(snipi_average *a, int term, double x, double rate) {
    double d = x - a->mean[term];
    a->mean[term] += rate * d;
    a->variance[term] = (1 - rate) * (a->variance[term] + rate * d * d);
}

static double snipi_variance(const snip *s, const snipi_average *a, int term) {
    return s->squared_weights < 1 ? a->variance[term] / (1 - s->squared_weights) : 0;
}

// Squared standard error of a mean. Few measurements tell little of their variance: it is moderated towards the one
// expected of the mean's size from all layers, `relative`, which counts as 4 degrees of freedom (Smyth 2004, empirical
// Bayes). Of a single measurement the error is taken to be as large as its value.
static double snipi_error_sq(const snip *s, const snipi_average *a, int term, double relative) {
    double own = snipi_variance(s, a, term), mean_sq = a->mean[term] * a->mean[term],
           freedom = 1 / s->squared_weights - 1;
    return s->squared_weights < 1
               ? s->squared_weights * (4 * relative * (mean_sq + own) + freedom * own) / (4 + freedom)
               : mean_sq;
}

// Share r of the backward GEMMs' errors that repeats.
static double snipi_repeating(const snip *s, const snipi_layer *l, int f) {
    double r = snipi_ratio(l->measured[f].err_dy, l->gradient_sq);
    return snipi_recipe_of(s, snipi_candidates[f], SNIPI_GRADIENT).rounding == SNIP_ROUND_STOCHASTIC ? 0
           : r < 1                                                                                   ? r
                                                                                                     : 1;
}

// Costs and their errors from the averages. The first-order term, whose sign moves with the batch and which is 0 in
// expectation where rounding is unbiased, is shrunk to its posterior mean under a prior N(0, first^2) (Efron and Morris
// 1973): factor first^2 / (first^2 + error^2).
static void snipi_costs(snip *s) {
    double loss_weight = s->desc.loss_weight > 0 ? snipi_ratio(s->desc.loss_weight, fabs(s->loss)) : 0,
           update_weight = s->desc.update_weight > 0 ? s->desc.update_weight : 0;
    int f, l, g, t;
    for (f = 0; f < SNIPI_CANDIDATES; f++) {
        double relative[SNIPI_TERMS];
        for (t = 0; t < SNIPI_TERMS; t++) {
            double deviation = 0, size = 0;
            for (l = 0; l < s->n_layers; l++) {
                const snipi_average *a = &s->layers[l].average[f];
                deviation += snipi_variance(s, a, t);
                size += a->mean[t] * a->mean[t] + snipi_variance(s, a, t);
            }
            relative[t] = snipi_ratio(deviation, size);
        }
        for (l = 0; l < s->n_layers; l++) {
            const snipi_average *a = &s->layers[l].average[f];
            snip_estimate *e = &s->layers[l].estimate[f];
            double first_sq = a->mean[SNIPI_FIRST] * a->mean[SNIPI_FIRST],
                   error_sq = snipi_error_sq(s, a, SNIPI_FIRST, relative[SNIPI_FIRST]);
            double keep = snipi_ratio(first_sq, first_sq + error_sq);
            if (!s->layers[l].elements_x) continue;
            for (g = 0; g < SNIP_GEMMS; g++) {
                double r = g == SNIP_FWD ? 1 : snipi_repeating(s, &s->layers[l], f),
                       weight = update_weight * (r + (1 - r) / s->desc.horizon);
                double loss_error_sq =
                    g == SNIP_FWD ? keep * error_sq + snipi_error_sq(s, a, SNIPI_SECOND, relative[SNIPI_SECOND]) : 0;
                e->cost[g] = weight * a->mean[SNIPI_UPDATE + g] +
                             (g == SNIP_FWD ? loss_weight * (keep * a->mean[SNIPI_FIRST] + a->mean[SNIPI_SECOND]) : 0);
                e->error[g] = sqrt(weight * weight *
                                       snipi_error_sq(s, a, SNIPI_UPDATE + g, relative[SNIPI_UPDATE + g]) +
                                   loss_weight * loss_weight * loss_error_sq);
            }
        }
    }
}

static int snipi_has_averages(const snipi_layer *l) {
    int t, any = 0;
    for (t = 0; t < SNIPI_TERMS; t++) any |= l->average[0].mean[t] != 0 || l->average[1].mean[t] != 0;
    return any;
}

// What was not called in a measurement keeps its averages and costs.
static void snipi_average_measurement(snip *s) {
    double rate, session_rate;
    int l, f, g;
    s->measurements += 1;
    session_rate = s->measurements < 3 ? 1 / s->measurements : 1.0 / 3;
    s->squared_weights = (1 - session_rate) * (1 - session_rate) * s->squared_weights + session_rate * session_rate;
    for (l = 0; l < s->n_layers; l++) {
        if (!s->layers[l].elements_x) continue;
        rate = snipi_has_averages(&s->layers[l]) ? session_rate : 1;
        for (f = 0; f < SNIPI_CANDIDATES; f++) {
            const snip_estimate *e = &s->layers[l].estimate[f];
            snipi_average *a = &s->layers[l].average[f];
            snipi_average_term(a, SNIPI_FIRST, e->loss_first, rate);
            snipi_average_term(a, SNIPI_SECOND, e->loss_second, rate);
            for (g = 0; g < SNIP_GEMMS; g++) snipi_average_term(a, SNIPI_UPDATE + g, e->update[g], rate);
        }
        memcpy(s->layers[l].reference, s->layers[l].level, sizeof s->layers[l].reference);
    }
    snipi_costs(s);
}

// ---- watching
static int snipi_is_candidate(snip_format format) {
    return format == snipi_candidates[0] || format == snipi_candidates[1];
}

static int snipi_under_plan(const snip *s) {
    int l, g;
    for (l = 0; l < s->n_layers; l++)
        for (g = 0; g < SNIP_GEMMS; g++)
            if (snipi_is_candidate(s->layers[l].format[g])) return 1;
    return 0;
}

// A running mean of the losses and of their absolute deviation, both over about 32 steps; a loss counts as at most 3
// deviations off, so that a spike hardly moves them (Huber). A normal variable's standard deviation is 1.2533 times the
// mean absolute one; at least 0.5% of the loss is assumed.
static int snipi_loss_spikes(snip *s) {
    double off = s->loss - s->loss_mean, deviation = 1.2533 * s->loss_deviation, least = 0.005 * fabs(s->loss_mean),
           rate;
    int spike = s->desc.spike > 0 && s->losses >= 32 &&
                (snipi_nonfinite_f64(s->loss) || off > s->desc.spike * (deviation > least ? deviation : least));
    if (snipi_nonfinite_f64(s->loss)) return spike;
    s->losses++;
    rate = s->losses < 32 ? 1 / (double)s->losses : 1.0 / 32;
    if (s->losses > 32 && fabs(off) > 3 * deviation) off = off > 0 ? 3 * deviation : -3 * deviation;
    s->loss_mean += rate * off;
    s->loss_deviation += rate * ((s->losses > 1 ? fabs(off) : 0) - s->loss_deviation);
    return spike;
}

// Root mean square, over the layers' X and dY, of log2(rms now / rms at the last measurement), now being a mean of
// about 16 steps.
static double snipi_drift(snip *s) {
    double sum = 0, count = 0, rate = ++s->levels < 16 ? 1 / (double)s->levels : 1.0 / 16;
    int l, w;
    for (l = 0; l < s->n_layers; l++)
        for (w = 0; w < 2; w++) {
            snipi_layer *layer = &s->layers[l];
            double level;
            if (!(layer->seen_sq[w] > 0) || snipi_nonfinite_f64(layer->seen_sq[w])) continue;
            level = 0.5 * log2(layer->seen_sq[w] / layer->seen[w]);
            layer->level[w] += rate * (level - layer->level[w]);
            sum += (layer->level[w] - layer->reference[w]) * (layer->level[w] - layer->reference[w]);
            count++;
        }
    return sqrt(snipi_ratio(sum, count));
}

// After an ordinary step: is a measurement due before its time? A frozen plan is left alone.
static void snipi_watch(snip *s, int spikes) {
    double drift = snipi_drift(s);
    int under_plan = s->desc.every > 0 && snipi_under_plan(s), l, g, count = 0;
    if (under_plan && spikes) {
        s->due = 1;
        for (l = 0; l < s->n_layers && s->desc.fallback != SNIP_E2M1; l++)
            for (g = 0; g < SNIP_GEMMS; g++)
                if (snipi_is_candidate(s->layers[l].format[g]) && s->layers[l].format[g] != s->desc.fallback) {
                    s->layers[l].format[g] = s->desc.fallback;
                    count++;
                }
        if (count) s->fallen = 1;
        l = snprintf(s->reason, sizeof s->reason, "step %lld: the loss spikes: %.4g, mean %.4g, deviation %.2g",
                     (long long)s->step, s->loss, s->loss_mean, 1.2533 * s->loss_deviation);
        snprintf(s->reason + l, sizeof s->reason - (size_t)l,
                 count ? "; %d GEMMs in %s until the next measurement" : "; measuring", count,
                 snip_format_name(s->desc.fallback));
    } else if (under_plan && !s->due && s->measurements > 0 && s->desc.drift > 0 && drift > s->desc.drift) {
        s->due = 1;
        snprintf(s->reason, sizeof s->reason,
                 "step %lld: inputs and gradients have drifted by a factor of %.2g: measuring", (long long)s->step,
                 exp2(drift));
    }
}

// ---- planning
static int snipi_by_seconds(const snip *s) { return s->desc.speedup > 0 || s->desc.seconds > 0; }

SNIP_API snip_status snip_set_seconds(snip *s, int layer, snip_gemm_kind gemm, const double seconds[3]) {
    int i;
    if (!s || layer < 0 || layer >= s->n_layers || (int)gemm < 0 || gemm >= SNIP_GEMMS || !seconds)
        return snipi_bad(s, "snip_set_seconds");
    for (i = 0; i < 3; i++)
        if (!(seconds[i] > 0) || !snipi_in_range(seconds[i], 0, 1e9)) return snipi_bad(s, "snip_set_seconds");
    for (i = 0; i < 3; i++) s->layers[layer].seconds[i][gemm] = seconds[i];
    return SNIP_OK;
}

SNIP_API snip_status snip_measure_gains(snip *s, int64_t rows) {
    enum { TIMES = 5 };

    int l, same, g, i, f;
    if (!s || rows < 1 || rows > INT32_MAX) return snipi_bad(s, "snip_measure_gains");
    for (l = 0; l < s->n_layers; l++)
        if (!snipi_shape_ok(rows, snipi_max(s->layers[l].n, s->layers[l].k), snipi_max(s->layers[l].n, s->layers[l].k)))
            return snipi_bad(s, "snip_measure_gains");
    for (l = 0; l < s->n_layers; l++) {
        snipi_layer *layer = &s->layers[l];
        int64_t n = layer->n, k = layer->k, nonfinite = layer->nonfinite, saturated = layer->saturated;
        snip_status status = SNIP_OK;
        float *x, *w, *dy, *out;
        for (same = 0; same < l && (s->layers[same].n != n || s->layers[same].k != k); same++) {
        }
        if (same < l) {
            memcpy(layer->seconds, s->layers[same].seconds, sizeof layer->seconds);
            continue;
        }
        x = (float *)snipi_alloc(s, (size_t)(rows * (n + k) + n * k + snipi_max(rows * snipi_max(n, k), n * k)) *
                                        sizeof(float));
        if (!x) return snipi_no_memory(s, "snip_measure_gains");
        dy = x + rows * k;
        w = dy + rows * n;
        out = w + n * k;
        snip_noise_add(x, x, rows * (n + k) + n * k, 1.0f, NULL, snipi_key(s, layer, 0, SNIPI_ROLE_NOISE_X));
        for (g = 0; g < SNIP_GEMMS; g++)
            for (f = 0; f < 1 + SNIPI_CANDIDATES && !status; f++) {
                snip_format format = f ? snipi_candidates[f - 1] : s->desc.high;
                double best = 0;
                for (i = 0; i < 1 + TIMES && !status; i++) {  // the first warms up
                    double t = snipi_ilp_clock();
                    status = g == SNIP_FWD     ? snipi_fwd(s, layer, 0, format, out, x, w, NULL, rows)
                             : g == SNIP_DGRAD ? snipi_dgrad(s, layer, 0, format, out, 0, dy, w, rows)
                                               : snipi_wgrad(s, layer, 0, format, out, 0, dy, n, x, rows);
                    t = snipi_ilp_clock() - t;
                    if (i == 1 || (i > 1 && t < best)) best = t;
                }
                layer->seconds[f][g] = best > 1e-9 ? best : 1e-9;
            }
        snipi_free(s, x);
        layer->nonfinite = nonfinite;
        layer->saturated = saturated;
        if (status) return snipi_fail_in(s, status, "snip_measure_gains", snip_status_text(status));
    }
    return SNIP_OK;
}

static int snipi_state_of(const snip *s, snip_format format) {
    return format == s->desc.high || snipi_plain(format) ? 0 : format == SNIP_E4M3 ? 1 : 2;
}

SNIP_API double snip_plan_seconds(const snip *s) {
    double sum = 0;
    int l, g;
    for (l = 0; s && l < s->n_layers; l++)
        for (g = 0; g < SNIP_GEMMS; g++) sum += s->layers[l].seconds[snipi_state_of(s, s->layers[l].format[g])][g];
    return sum;
}

// States of a GEMM: 0 in desc.high, which plans by seconds alone choose, 1 FP8, 2 FP4. A layer's option: three digits
// to the base 3.
enum { SNIPI_OPTIONS = 27 };

static int snipi_option_state(int option, int g) { return option / (g == 0 ? 1 : g == 1 ? 3 : 9) % 3; }

// FP4 and no FP8 allows `high` no more. Per layer: one state wherever it is allowed.
static int snipi_option_allowed(const snip *s, const snipi_layer *l, int option) {
    const int least = snipi_by_seconds(s) ? 0 : 1;
    int g, same = SNIP_GEMMS, state;
    for (g = 0; g < SNIP_GEMMS; g++) {
        state = snipi_option_state(option, g);
        if (state < least || !(l->allow[g] & (state == 2 ? SNIPI_ALLOW_FP4 : SNIPI_ALLOW_FP8))) return 0;
    }
    for (state = least; s->desc.per_layer && state <= 2; state++) {
        for (same = 0, g = 0; g < SNIP_GEMMS; g++)
            same += snipi_option_state(option, g) == (state == 2 ? (l->allow[g] & SNIPI_ALLOW_FP4 ? 2 : 1)
                                                      : l->allow[g] & SNIPI_ALLOW_FP8 ? state
                                                                                      : 2);
        if (same == SNIP_GEMMS) break;
    }
    return same == SNIP_GEMMS;
}

static snip_format snipi_format_of(const snip *s, int state) {
    return state ? snipi_candidates[state - 1] : s->desc.high;
}

static double snipi_harm(const snipi_layer *l, int state, int g) { return state ? l->estimate[state - 1].cost[g] : 0; }

// What a GEMM's change of format adds to its cost: the standard error of the difference of its two costs, `margin`
// times.
static double snipi_switch_cost(const snip *s, const snipi_layer *l, int g, int to) {
    const int from = snipi_state_of(s, l->format[g]), planned = snipi_is_candidate(l->format[g]) || snipi_by_seconds(s);
    double a = from ? l->estimate[from - 1].error[g] : 0, b = to ? l->estimate[to - 1].error[g] : 0;
    return s->desc.margin > 0 && s->plans > 0 && !s->fallen && planned && from != to
               ? s->desc.margin * sqrt(a * a + b * b)
               : 0;
}

static void snipi_explain(snip *s, int changed, double before, double after, double margin) {
    char text[128];
    if (s->fallen)
        snprintf(text, sizeof text, "a new plan after the fall back: predicted harm %.4g", after);
    else if (s->plans == 0)
        snprintf(text, sizeof text, "the first plan: predicted harm %.4g", after);
    else if (!changed)
        snprintf(text, sizeof text, "the plan stays: no change saves more than %g standard errors",
                 s->desc.margin > 0 ? s->desc.margin : 0);
    else if (before > after + margin)
        snprintf(text, sizeof text, "%d GEMMs change: predicted harm %.4g -> %.4g, margin %.2g", changed, before, after,
                 margin);
    else
        snprintf(text, sizeof text,
                 "%d GEMMs change, as the plan no longer met its targets: predicted harm %.4g -> %.4g", changed, before,
                 after);
    snprintf(s->reason, sizeof s->reason, "step %lld: %s", (long long)s->step, text);
}

// A layer that no measurement has met yet, as it was not called: it stays as it is, and out of the targets.
static int snipi_measured_once(const snipi_layer *l) { return l->elements_x > 0 || snipi_has_averages(l); }

static double snipi_slowest(const snipi_layer *l, int g) {
    double slowest = 0;
    int f;
    for (f = 0; f < 1 + SNIPI_CANDIDATES; f++) slowest = l->seconds[f][g] > slowest ? l->seconds[f][g] : slowest;
    return slowest;
}

// Gains are counts of in * out features in FP4, whole numbers, so that targets are met exactly; or seconds saved
// against the slowest state.
static snip_status snipi_solve(snip *s) {
    int n = s->n_layers, l, g, o, changed = 0;
    double before = 0, after = 0, margin = 0;
    size_t options_size = (size_t)n * SNIPI_OPTIONS * sizeof(snip_ilp_option),
           groups_size = (size_t)n * sizeof(snip_ilp_group);
    size_t stages_size = (size_t)s->desc.n_stages * sizeof(double),
           size = options_size + groups_size + stages_size + (size_t)n * sizeof(int) * (1 + SNIPI_OPTIONS);
    char *memory = (char *)snipi_alloc(s, size);
    snip_ilp_option *options = (snip_ilp_option *)(void *)memory;
    snip_ilp_group *groups;
    double *target;
    int *choice, *ids;
    snip_ilp_problem problem;
    snip_ilp_result result;
    snip_ilp_status solved;
    if (!memory) return snipi_no_memory(s, "a plan");
    target = (double *)(void *)(memory + options_size);
    groups = (snip_ilp_group *)(void *)(target + s->desc.n_stages);
    choice = (int *)(void *)(groups + n);
    ids = choice + n;
    for (l = 0; l < n; l++) {
        snipi_layer *layer = &s->layers[l];
        snip_ilp_option *list = options + SNIPI_OPTIONS * l;
        double least = 0;
        int count = 0, i;
        groups[l].options = list;
        groups[l].n_options = 1;  // no gain at no cost
        groups[l].stage = layer->stage;
        if (!snipi_measured_once(layer)) continue;
        for (o = 0; o < SNIPI_OPTIONS; o++) {
            snip_ilp_option option = { 0, 0 };
            if (!snipi_option_allowed(s, layer, o)) continue;
            for (g = 0; g < SNIP_GEMMS; g++) {
                const int state = snipi_option_state(o, g);
                option.cost += snipi_harm(layer, state, g) + snipi_switch_cost(s, layer, g, state);
                if (snipi_by_seconds(s))
                    option.gain += snipi_slowest(layer, g) - layer->seconds[state][g];
                else
                    option.gain += state == 2 ? (double)layer->n * (double)layer->k : 0;
            }
            ids[SNIPI_OPTIONS * l + count] = o;
            list[count++] = option;
        }
        for (i = 0; i < count; i++) least = i == 0 || list[i].cost < least ? list[i].cost : least;
        for (i = 0; i < count; i++)
            list[i].cost -= least;  // a constant per layer changes no choice; costs may not be negative
        groups[l].n_options = count;
        if (!snipi_by_seconds(s)) target[layer->stage] += s->desc.budget * 3 * (double)layer->n * (double)layer->k;
        for (g = 0; g < SNIP_GEMMS && snipi_by_seconds(s); g++) {
            target[layer->stage] += snipi_slowest(layer, g);
            if (s->desc.speedup > 0) target[layer->stage] -= layer->seconds[0][g] / s->desc.speedup;
            if (!(layer->seconds[0][g] > 0)) {
                snipi_free(s, memory);
                return snipi_fail(s, SNIP_BAD_ARGUMENT,
                                  "a plan by seconds needs snip_measure_gains or snip_set_seconds first");
            }
        }
    }
    for (l = 0; l < s->desc.n_stages; l++) {
        if (snipi_by_seconds(s) && !(s->desc.speedup > 0)) target[l] -= s->desc.seconds;
        if (target[l] < 0) target[l] = 0;
    }
    memset(&problem, 0, sizeof problem);
    problem.n_groups = n;
    problem.groups = groups;
    problem.n_stages = s->desc.n_stages;
    problem.stage_target = target;
    solved = snip_ilp_solve(&problem, NULL, choice, &result);
    if (solved == SNIP_ILP_OPTIMAL || solved == SNIP_ILP_FEASIBLE) {
        for (l = 0; l < n; l++)
            for (g = 0; g < SNIP_GEMMS && snipi_measured_once(&s->layers[l]); g++) {
                snipi_layer *layer = &s->layers[l];
                const int state = snipi_option_state(ids[SNIPI_OPTIONS * l + choice[l]], g);
                const snip_format format = snipi_format_of(s, state);
                before += snipi_harm(layer, snipi_state_of(s, layer->format[g]), g);
                after += snipi_harm(layer, state, g);
                margin += snipi_switch_cost(s, layer, g, state);
                changed += layer->format[g] != format;
                layer->format[g] = format;
            }
        snipi_explain(s, changed, before, after, margin);
        s->fallen = 0;
        s->plans++;
        s->solve_seconds = result.seconds;
        snipi_free(s, memory);
        return SNIP_OK;
    }
    if (solved == SNIP_ILP_INFEASIBLE) {
        double lacking = 0;
        int stage = snip_ilp_shortfall(&problem, &lacking);
        snipi_fail(s, SNIP_INFEASIBLE, snip_status_text(SNIP_INFEASIBLE));
        if (snipi_by_seconds(s))
            snprintf(s->message, sizeof s->message, "stage %d cannot be as fast as asked: %.3g seconds are lacking",
                     stage, lacking);
        else if (stage >= 0 && stage < s->desc.n_stages)
            snprintf(s->message, sizeof s->message,
                     "stage %d can put at most %.2f%% of its FLOPs in fp4, %.2f%% short of the budget of %.2f%%", stage,
                     100 * s->desc.budget * (1 - lacking / target[stage]),
                     100 * s->desc.budget * lacking / target[stage], 100 * s->desc.budget);
    }
    snipi_free(s, memory);
    return solved == SNIP_ILP_INFEASIBLE      ? SNIP_INFEASIBLE
           : solved == SNIP_ILP_OUT_OF_MEMORY ? snipi_no_memory(s, "a plan")
                                              : snipi_fail(s, SNIP_NONFINITE, "a measured cost is not finite");
}

// Costs from the measurement that the layers hold, and a plan from the costs.
static snip_status snipi_decide(snip *s, double update_sq, double grad_scale) {
    char message[200];
    int l, f;
    if (snipi_nonfinite_f64(s->loss))
        return snipi_fail(s, SNIP_NONFINITE, "the loss of a measuring step is not finite: measurement discarded");
    if (s->desc.loss_weight > 0 && s->loss == 0)
        return snipi_fail(s, SNIP_BAD_ARGUMENT,
                          "the loss of a measuring step is 0, and harm is relative to it: measurement discarded");
    for (l = 0; l < s->n_layers; l++) {
        const snipi_layer *layer = &s->layers[l];
        for (f = 0; f < SNIPI_CANDIDATES; f++) {
            snip_estimate e = snipi_estimate_of(s, layer, f, update_sq, grad_scale);
            if (snipi_estimate_finite(&e)) continue;
            snprintf(message, sizeof message, "layer %.100s: its measurement is not finite and was discarded",
                     layer->name);
            return snipi_fail(s, SNIP_NONFINITE, message);
        }
    }
    for (l = 0; l < s->n_layers; l++)
        for (f = 0; f < SNIPI_CANDIDATES && s->layers[l].elements_x; f++)
            s->layers[l].estimate[f] = snipi_estimate_of(s, &s->layers[l], f, update_sq, grad_scale);
    snipi_average_measurement(s);
    s->due = 0;
    return snipi_solve(s);
}

static int snipi_adamw_ok(const snip_adamw *o) {
    return o->step >= 1 && snipi_in_range(o->beta1, 0, 1) && snipi_in_range(o->beta2, 0, 1) && o->beta1 < 1 &&
           o->beta2 < 1 && snipi_in_range(o->eps, 0, 1) && snipi_in_range(o->grad_scale, 0, 1e30) &&
           !snipi_nonfinite_f64(o->lr);
}

// *adamw becomes NULL where its constants are out of range.
static void snipi_end_step_check(snip *s, const snip_adamw **adamw) {
    if (*adamw && !snipi_adamw_ok(*adamw)) {
        *adamw = NULL;
        snipi_hold(s, SNIP_BAD_ARGUMENT, "snip_end_step", "the optimizer's constants are out of range");
    } else if (*adamw && s->pass == SNIP_PASS_CLEAN && !s->told)
        snipi_hold(s, SNIP_BAD_ARGUMENT, "snip_end_step",
                   "snip_next_pass has not been told the loss of the measuring step's last pass");
    if (s->held[0]) snipi_fail(s, s->pending, s->held);  // of the error that snip_end_step returns
}

static int snipi_in_probe(snip *s) {
    if (s->pass == SNIP_PASS_ORDINARY || s->pass == SNIP_PASS_CLEAN) return 0;
    snipi_fail(s, SNIP_BAD_ARGUMENT,
               "snip_end_step in a probe pass: run the batch again while snip_next_pass returns 1");
    return 1;
}

SNIP_API snip_status snip_end_step(snip *s, const snip_adamw *adamw) {
    snip_status status;
    int l, i, spikes;
    if (!s) return SNIP_BAD_ARGUMENT;
    if (snipi_in_probe(s)) return SNIP_BAD_ARGUMENT;
    snipi_end_step_check(s, &adamw);
    status = s->pending;
    if (adamw) s->adamw = *adamw;
    s->step++;
    spikes = s->told && snipi_loss_spikes(s);
    if (s->pass == SNIP_PASS_ORDINARY) snipi_watch(s, spikes);
    if (s->pass == SNIP_PASS_CLEAN) {
        s->measured = s->step;
        if (!adamw)
            s->due = 1;
        else if (s->n_layers && !status) {
            for (l = 0; l < s->n_layers; l++)
                for (i = 0; i < SNIPI_SKETCHES; i++)
                    s->layers[l].sketched_sq[i] = snipi_sum_sq(s->layers[l].sketch + i * SNIPI_SKETCH, SNIPI_SKETCH);
            status = snipi_decide(s, snipi_probes_updates(s) ? snipi_update_sq(s, adamw) : 0,
                                  adamw->grad_scale > 0 ? adamw->grad_scale : 1);
        }
    }
    snipi_begin_step(s);
    return status;
}

SNIP_API snip_pass snip_current_pass(const snip *s) { return s ? s->pass : SNIP_PASS_ORDINARY; }

SNIP_API int64_t snip_step(const snip *s) { return s ? s->step : 0; }

SNIP_API int snip_plans(const snip *s) { return s ? s->plans : 0; }

SNIP_API double snip_solve_seconds(const snip *s) { return s ? s->solve_seconds : 0; }

SNIP_API int snip_layers(const snip *s) { return s ? s->n_layers : 0; }

SNIP_API const char *snip_message(const snip *s) { return s ? s->message : ""; }

SNIP_API const char *snip_reason(const snip *s) { return s ? s->reason : ""; }

SNIP_API snip_status snip_layer(const snip *s, int layer, snip_layer_info *info) {
    const snipi_layer *l = snipi_layer_at(s, layer);
    if (!l || !info) return snipi_bad(s, "snip_layer");
    info->name = l->name;
    info->out_features = l->n;
    info->in_features = l->k;
    info->stage = l->stage;
    memcpy(info->format, l->format, sizeof info->format);
    info->fp8 = l->estimate[0];
    info->fp4 = l->estimate[1];
    info->nonfinite = l->nonfinite;
    info->saturated = l->saturated;
    memcpy(info->seconds, l->seconds, sizeof info->seconds);
    info->measurements = s->measurements > 0 ? 1 / s->squared_weights : 0;
    return SNIP_OK;
}

SNIP_API double snip_share(const snip *s, snip_format format) {
    double in_format = 0, all = 0;
    int l, g;
    for (l = 0; l < snip_layers(s); l++)
        for (g = 0; g < SNIP_GEMMS; g++) {
            double flops = (double)s->layers[l].n * (double)s->layers[l].k;
            all += flops;
            if (s->layers[l].format[g] == format) in_format += flops;
        }
    return all > 0 ? in_format / all : 0;
}

// ---- plan and state files
// Names are "block.part.kind": a table of blocks x kinds, the first 32 kinds. What has no place of its own there gets a
// line below it.
static const char *snipi_kind_of(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot ? dot + 1 : name;
}

static int snipi_block_length(const char *name) {
    const char *dot = strchr(name, '.');
    return dot ? (int)(dot - name) : 0;
}

static int snipi_same_block(const char *a, const char *b) {
    int n = snipi_block_length(a);
    return n == snipi_block_length(b) && strncmp(a, b, (size_t)n) == 0;
}

static char snipi_mark(snip_format f) {
    return f == SNIP_E2M1 ? '4' : f == SNIP_E4M3 ? '8' : f == SNIP_BF16 ? 'b' : 'f';
}

// The first layer of a kind in the block of layer `of`, or -1.
static int snipi_cell(const snip *s, int of, const char *kind) {
    int i;
    for (i = 0; i < s->n_layers; i++)
        if (snipi_same_block(s->layers[i].name, s->layers[of].name) && !strcmp(snipi_kind_of(s->layers[i].name), kind))
            return i;
    return -1;
}

SNIP_API snip_status snip_plan_print(const snip *s, FILE *file) {
    enum { MOST = 32 };

    const char *kinds[MOST];
    int n_kinds = 0, l, k, i;
    if (!s || !file) return snipi_bad(s, "snip_plan_print");
    for (l = 0; l < s->n_layers; l++) {
        const char *kind = snipi_kind_of(s->layers[l].name);
        for (k = 0; k < n_kinds && strcmp(kinds[k], kind); k++) {
        }
        if (k == n_kinds && n_kinds < MOST) kinds[n_kinds++] = kind;
    }
    fprintf(file, "plan after step %lld: fp4 %.1f%%, fp8 %.1f%% of the linear layers' FLOPs\n", (long long)s->step,
            100 * snip_share(s, SNIP_E2M1), 100 * snip_share(s, SNIP_E4M3));
    fprintf(file, "  fwd dgrad wgrad: 4 fp4, 8 fp8, b bf16, f f32\n  %-8s", "block");
    for (k = 0; k < n_kinds; k++) fprintf(file, " %-6s", kinds[k]);
    fprintf(file, "\n");
    for (l = 0; l < s->n_layers; l++) {
        const char *name = s->layers[l].name;
        for (i = 0; i < l && !snipi_same_block(s->layers[i].name, name); i++) {
        }
        if (i < l) continue;  // block already printed
        fprintf(file, "  %-8.*s", snipi_block_length(name), name);
        for (k = 0; k < n_kinds; k++) {
            i = snipi_cell(s, l, kinds[k]);
            if (i < 0)
                fprintf(file, " %-6s", "");
            else
                fprintf(file, " %c%c%c   ", snipi_mark(s->layers[i].format[0]), snipi_mark(s->layers[i].format[1]),
                        snipi_mark(s->layers[i].format[2]));
        }
        fprintf(file, "\n");
    }
    for (l = 0; l < s->n_layers; l++) {
        const snipi_layer *layer = &s->layers[l];
        for (k = 0; k < n_kinds && strcmp(kinds[k], snipi_kind_of(layer->name)); k++) {
        }
        if (k == n_kinds || snipi_cell(s, l, kinds[k]) != l)
            fprintf(file, "  %s %c%c%c\n", layer->name, snipi_mark(layer->format[0]), snipi_mark(layer->format[1]),
                    snipi_mark(layer->format[2]));
    }
    return ferror(file) ? snipi_fail_in(s, SNIP_IO, "snip_plan_print", snip_status_text(SNIP_IO)) : SNIP_OK;
}

static uint64_t snipi_hash(uint64_t hash, const void *data, size_t size) {  // FNV-1a
    const unsigned char *p = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < size; i++) hash = (hash ^ p[i]) * 0x100000001B3u;
    return hash;
}

#define SNIPI_HASH_START 0xCBF29CE484222325u

// A text file: header, one line a layer, and a hash of all lines before it.
static int snipi_plan_line(const snip *s, int line, char *text, size_t size) {
    if (line == 0)
        return snprintf(text, size, "snip-plan 1 layers %d step %lld budget %.6f fp4 %.6f%s%s\n", s->n_layers,
                        (long long)s->step, s->desc.budget, snip_share(s, SNIP_E2M1), s->reason[0] ? "; " : "",
                        s->reason);
    return snprintf(text, size, "%s %lld %lld %s %s %s\n", s->layers[line - 1].name, (long long)s->layers[line - 1].n,
                    (long long)s->layers[line - 1].k, snip_format_name(s->layers[line - 1].format[0]),
                    snip_format_name(s->layers[line - 1].format[1]), snip_format_name(s->layers[line - 1].format[2]));
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

SNIP_API snip_status snip_plan_save(snip *s, const char *path) {
    char text[512], *aside;
    uint64_t hash = SNIPI_HASH_START;
    FILE *file;
    size_t length;
    int line, ok, reason, renamed;
    if (!s || !path) return snipi_bad(s, "snip_plan_save");
    length = strlen(path) + 5;
    aside = (char *)snipi_alloc(s, length);
    if (!aside) return snipi_no_memory(s, "snip_plan_save");
    renamed = snipi_replaceable(path);
    snprintf(aside, length, renamed ? "%s.tmp" : "%s", path);
    file = fopen(aside, "wb");
    ok = file != NULL;
    for (line = 0; ok && line <= s->n_layers; line++) {
        int n = snipi_plan_line(s, line, text, sizeof text);
        hash = snipi_hash(hash, text, (size_t)n);
        ok = fwrite(text, 1, (size_t)n, file) == (size_t)n;
    }
    if (ok) ok = fprintf(file, "end %016llx\n", (unsigned long long)hash) > 0;
    reason = errno;
    if (file) {
        if (fclose(file) && ok) {
            ok = 0;
            reason = errno;
        }
        if (ok && renamed && rename(aside, path)) {
            ok = 0;
            reason = errno;
        }
        if (!ok && renamed) remove(aside);
    }
    snipi_free(s, aside);
    if (!ok) {
        snprintf(s->message, sizeof s->message, "%.150s: cannot be written: %.80s", path, strerror(reason));
        return SNIP_IO;
    }
    return SNIP_OK;
}

static snip_status snipi_plan_fail(snip *s, FILE *file, unsigned char *formats, snip_status status, const char *path,
                                   const char *reason) {
    if (file) fclose(file);
    snipi_free(s, formats);
    snprintf(s->message, sizeof s->message, "%.150s: %.100s", path, reason);
    return status;
}

SNIP_API snip_status snip_plan_load(snip *s, const char *path) {
    char text[512], name[256], format[SNIP_GEMMS][8];
    uint64_t hash = SNIPI_HASH_START;
    unsigned long long stored;
    unsigned char *formats;
    long long n, k;
    FILE *file;
    int line, layers, g, tail = 0;
    if (!s || !path) return snipi_bad(s, "snip_plan_load");
    formats = (unsigned char *)snipi_alloc(s, (size_t)s->n_layers * SNIP_GEMMS);
    if (!formats) return snipi_no_memory(s, "snip_plan_load");
    file = fopen(path, "rb");
    if (!file) return snipi_plan_fail(s, NULL, formats, SNIP_IO, path, strerror(errno));
    for (line = 0; line <= s->n_layers; line++) {
        if (!fgets(text, sizeof text, file)) {
            const char *reason = ferror(file) ? strerror(errno) : "ends too early";
            return snipi_plan_fail(s, file, formats, ferror(file) ? SNIP_IO : SNIP_CORRUPT, path, reason);
        }
        hash = snipi_hash(hash, text, strlen(text));
        if (line == 0) {
            if (sscanf(text, "snip-plan 1 layers %d", &layers) != 1)
                return snipi_plan_fail(s, file, formats, SNIP_CORRUPT, path, "is not a snip plan");
            if (layers != s->n_layers)
                return snipi_plan_fail(s, file, formats, SNIP_MISMATCH, path,
                                       "is for a model with another number of layers");
            continue;
        }
        if (sscanf(text, "%255s %lld %lld %7s %7s %7s", name, &n, &k, format[0], format[1], format[2]) != 6)
            return snipi_plan_fail(s, file, formats, SNIP_CORRUPT, path, "has a damaged line");
        if (strcmp(name, s->layers[line - 1].name) || n != s->layers[line - 1].n || k != s->layers[line - 1].k)
            return snipi_plan_fail(s, file, formats, SNIP_MISMATCH, path, "is for a model with other layers");
        for (g = 0; g < SNIP_GEMMS; g++) {
            static const snip_format known[4] = { SNIP_F32, SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };
            int i;
            for (i = 0; i < 4 && strcmp(format[g], snip_format_name(known[i])); i++) {
            }
            if (i == 4) return snipi_plan_fail(s, file, formats, SNIP_CORRUPT, path, "names an unknown precision");
            formats[(line - 1) * SNIP_GEMMS + g] = (unsigned char)known[i];
        }
    }
    if (!fgets(text, sizeof text, file) || sscanf(text, "end %16llx%n", &stored, &tail) != 1 || tail != 20 ||
        strcmp(text + tail, "\n"))
        return snipi_plan_fail(s, file, formats, SNIP_CORRUPT, path, "ends too early");
    if (stored != hash || fgetc(file) != EOF)
        return snipi_plan_fail(s, file, formats, SNIP_CORRUPT, path, "does not match its checksum");
    for (line = 0; line < s->n_layers; line++)
        for (g = 0; g < SNIP_GEMMS; g++) s->layers[line].format[g] = (snip_format)formats[line * SNIP_GEMMS + g];
    fclose(file);
    snipi_free(s, formats);
    return SNIP_OK;
}

// State: magic with a version, the last reason, then 8-byte words, little-endian on every machine: header, one record a
// layer, hash.
enum { SNIPI_STATE_TEXT = 8 + 256 };

typedef struct {
    uint64_t layers, model;
    int64_t step, plans;
    snip_adamw adamw;
    double measurements, squared_weights, loss_mean, loss_deviation;
    int64_t losses, levels, measured, due, fallen;
} snipi_state_header;

typedef struct {
    int64_t format[SNIP_GEMMS];
    snipi_average average[SNIPI_CANDIDATES];
    snip_estimate estimate[SNIPI_CANDIDATES];
    double seconds[1 + SNIPI_CANDIDATES][SNIP_GEMMS], level[2], reference[2];
} snipi_state_layer;

// Words of 8 bytes from the machine's order to little-endian, or back.
static void snipi_little_endian(void *words, size_t size) {
    unsigned char *p = (unsigned char *)words;
    size_t i;
    int j;
    for (i = 0; i + 8 <= size; i += 8) {
        uint64_t word, swapped = 0;
        memcpy(&word, p + i, 8);
        for (j = 0; j < 8; j++) ((unsigned char *)&swapped)[j] = (unsigned char)(word >> 8 * j);
        memcpy(p + i, &swapped, 8);
    }
}

static uint64_t snipi_model_hash(const snip *s) {
    uint64_t hash = SNIPI_HASH_START, seed = s->desc.seed;
    int l;
    for (l = 0; l < s->n_layers; l++) {
        int64_t dims[3];
        dims[0] = s->layers[l].n;
        dims[1] = s->layers[l].k;
        dims[2] = s->layers[l].stage;
        snipi_little_endian(dims, sizeof dims);
        hash = snipi_hash(hash, s->layers[l].name, strlen(s->layers[l].name) + 1);
        hash = snipi_hash(hash, dims, sizeof dims);
    }
    snipi_little_endian(&seed, sizeof seed);
    return snipi_hash(hash, &seed, sizeof seed);
}

SNIP_API size_t snip_state_size(const snip *s) {
    return s ? SNIPI_STATE_TEXT + sizeof(snipi_state_header) + (size_t)s->n_layers * sizeof(snipi_state_layer) +
                   sizeof(uint64_t)
             : 0;
}

static int snipi_within_step(const snip *s) {
    int l, calls = 0;
    for (l = 0; l < s->n_layers; l++) calls |= s->layers[l].calls_forward || s->layers[l].calls_backward;
    return calls || s->told || (s->pass != SNIP_PASS_ORDINARY && s->pass != SNIP_PASS_LOSS_PROBE);
}

SNIP_API snip_status snip_state_save(const snip *s, void *state) {
    snipi_state_header header;
    unsigned char *at = (unsigned char *)state;
    uint64_t hash;
    int l, g;
    if (!s || !state) return snipi_bad(s, "snip_state_save");
    if (snipi_within_step(s))
        return snipi_fail(s, SNIP_BAD_ARGUMENT, "session state is saved between steps: snip_end_step is missing");
    memcpy(at, "SNIPST2", 8);
    memcpy(at + 8, s->reason, sizeof s->reason);
    at += SNIPI_STATE_TEXT;
    memset(&header, 0, sizeof header);
    header.layers = (uint64_t)s->n_layers;
    header.model = snipi_model_hash(s);
    header.step = s->step;
    header.plans = s->plans;
    header.adamw = s->adamw;
    header.measurements = s->measurements;
    header.squared_weights = s->squared_weights;
    header.loss_mean = s->loss_mean;
    header.loss_deviation = s->loss_deviation;
    header.losses = s->losses;
    header.levels = s->levels;
    header.measured = s->measured;
    header.due = s->due;
    header.fallen = s->fallen;
    memcpy(at, &header, sizeof header);
    at += sizeof header;
    for (l = 0; l < s->n_layers; l++) {
        const snipi_layer *layer = &s->layers[l];
        snipi_state_layer record;
        memset(&record, 0, sizeof record);
        for (g = 0; g < SNIP_GEMMS; g++) record.format[g] = layer->format[g];
        memcpy(record.average, layer->average, sizeof record.average);
        memcpy(record.estimate, layer->estimate, sizeof record.estimate);
        memcpy(record.seconds, layer->seconds, sizeof record.seconds);
        memcpy(record.level, layer->level, sizeof record.level);
        memcpy(record.reference, layer->reference, sizeof record.reference);
        memcpy(at, &record, sizeof record);
        at += sizeof record;
    }
    snipi_little_endian((unsigned char *)state + SNIPI_STATE_TEXT,
                        (size_t)(at - (unsigned char *)state) - SNIPI_STATE_TEXT);
    hash = snipi_hash(SNIPI_HASH_START, state, (size_t)(at - (unsigned char *)state));
    snipi_little_endian(&hash, sizeof hash);
    memcpy(at, &hash, sizeof hash);
    return SNIP_OK;
}

static int snipi_header_ok(const snipi_state_header *h) {
    const int64_t most = INT64_C(1) << 62;
    const int64_t counts[] = { h->step, h->losses, h->levels, h->measured, h->adamw.step };
    const double values[] = { h->adamw.lr,        h->adamw.beta1,      h->adamw.beta2,
                              h->adamw.eps,       h->adamw.grad_scale, h->measurements,
                              h->squared_weights, h->loss_mean,        h->loss_deviation };
    size_t i;
    for (i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i] < 0 || counts[i] > most) return 0;
    for (i = 0; i < sizeof values / sizeof *values; i++)
        if (snipi_nonfinite_f64(values[i])) return 0;
    return h->plans >= 0 && h->plans <= INT32_MAX && (h->due == 0 || h->due == 1) && (h->fallen == 0 || h->fallen == 1);
}

static int snipi_record_ok(const unsigned char *at) {
    snipi_state_layer r;
    size_t i;
    memcpy(&r, at, sizeof r);
    snipi_little_endian(&r, sizeof r);
    for (i = 0; i < SNIP_GEMMS; i++)
        if (r.format[i] != SNIP_F32 && r.format[i] != SNIP_BF16 && r.format[i] != SNIP_E4M3 && r.format[i] != SNIP_E2M1)
            return 0;
    for (i = sizeof r.format; i < sizeof r; i += sizeof(double)) {  // all else are doubles
        double value;
        memcpy(&value, (const unsigned char *)&r + i, sizeof value);
        if (snipi_nonfinite_f64(value)) return 0;
    }
    return 1;
}

SNIP_API snip_status snip_state_load(snip *s, const void *state, size_t size) {
    snipi_state_header header;
    const unsigned char *at = (const unsigned char *)state;
    uint64_t hash;
    int l, g;
    if (!s || !state) return snipi_bad(s, "snip_state_load");
    if (snipi_within_step(s))
        return snipi_fail(s, SNIP_BAD_ARGUMENT, "session state is loaded between steps: snip_end_step is missing");
    if (size < 8 + sizeof hash) return snipi_fail(s, SNIP_CORRUPT, "session state is cut short");
    if (memcmp(at, "SNIPST", 6)) return snipi_fail(s, SNIP_CORRUPT, "not a session state");
    memcpy(&hash, at + size - sizeof hash, sizeof hash);
    snipi_little_endian(&hash, sizeof hash);
    if (hash != snipi_hash(SNIPI_HASH_START, state, size - sizeof hash))
        return snipi_fail(s, SNIP_CORRUPT, "session state does not match its checksum");
    if (memcmp(at, "SNIPST2", 8))
        return snipi_fail(s, SNIP_UNSUPPORTED, "session state of another version of snip; this one reads version 2");
    if (size < SNIPI_STATE_TEXT + sizeof header + sizeof hash)
        return snipi_fail(s, SNIP_CORRUPT, "session state is cut short");
    memcpy(&header, at + SNIPI_STATE_TEXT, sizeof header);
    snipi_little_endian(&header, sizeof header);
    if (header.layers != (uint64_t)s->n_layers || header.model != snipi_model_hash(s) || size != snip_state_size(s))
        return snipi_fail(s, SNIP_MISMATCH, "session state belongs to another model or seed");
    if (!snipi_header_ok(&header)) return snipi_fail(s, SNIP_CORRUPT, "session state holds values out of range");
    for (l = 0; l < s->n_layers; l++)
        if (!snipi_record_ok(at + SNIPI_STATE_TEXT + sizeof header + (size_t)l * sizeof(snipi_state_layer)))
            return snipi_fail(s, SNIP_CORRUPT, "session state holds values out of range");
    memcpy(s->reason, at + 8, sizeof s->reason);
    s->reason[sizeof s->reason - 1] = 0;
    s->step = header.step;
    s->plans = (int)header.plans;
    s->adamw = header.adamw;
    s->measurements = header.measurements;
    s->squared_weights = header.squared_weights;
    s->loss_mean = header.loss_mean;
    s->loss_deviation = header.loss_deviation;
    s->losses = header.losses;
    s->levels = header.levels;
    s->measured = header.measured;
    s->due = header.due;
    s->fallen = header.fallen;
    at += SNIPI_STATE_TEXT + sizeof header;
    for (l = 0; l < s->n_layers; l++) {
        snipi_layer *layer = &s->layers[l];
        snipi_state_layer record;
        memcpy(&record, at, sizeof record);
        snipi_little_endian(&record, sizeof record);
        at += sizeof record;
        for (g = 0; g < SNIP_GEMMS; g++) layer->format[g] = (snip_format)record.format[g];
        memcpy(layer->average, record.average, sizeof record.average);
        memcpy(layer->estimate, record.estimate, sizeof record.estimate);
        memcpy(layer->seconds, record.seconds, sizeof record.seconds);
        memcpy(layer->level, record.level, sizeof record.level);
        memcpy(layer->reference, record.reference, sizeof record.reference);
    }
    snipi_begin_step(s);
    return SNIP_OK;
}

// ================= END OF THE PORTABLE CODE. Below are instruction sets, behind the tables above.
// =====================

// >>simd -------------------------------------------------------------------------------------------
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
        __m256i part[SNIPI_AVX2_A][2], pairs;
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
        __m512i part[SNIPI_AVX512_A][2], pairs;
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
#            define SNIPI_TILE_ZERO(t) __asm__ volatile("tilezero {%%tmm" #t "|tmm" #t "}" : :)
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

// Quantizing runs. With e = max(exponent of |y|, that of the smallest normal number) and k = |y| in units of
// 2^(e - mantissa), rounded, the code is k + (e - smallest) * 2^mantissa. To nearest: |y| + power, where power is
// 2^(e + 23 - mantissa) plus that second term in its last places, rounds |y| and has the code in its low bits; the
// term is even, so that ties stay ties to even. Less power, the sum is the value.
// SNIPI_KEPT stops the compiler from undoing the rounding (-Ofast) or fusing the product with what follows.
#    define SNIPI_KEPT(v) __asm__("" : "+x"(v))
#    define SNIPI_KEPT512(v) __asm__("" : "+v"(v))
#    define SNIPI_LOW(v) _mm512_maskz_cvtps_pd(0xFF, _mm512_castps512_ps256(v))
#    define SNIPI_HIGH(v) _mm512_maskz_cvtps_pd(0xFF, _mm512_extractf32x8_ps(v, 1))

enum { SNIPI_AHEAD = 3072 };  // bytes: the hardware prefetcher stops at pages

SNIPI_TARGET_AVX2 static uint32_t snipi_amax_avx2(const float *x, int n, int64_t *nonfinite) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i most = _mm256_setzero_si256();
    uint32_t lane[8], rest, a;
    int64_t bad = 0;
    int i;
    for (i = 0; i + 8 <= n; i += 8) {  // most = max(most, |x|) of bits
        if (i % 16 == 0) _mm_prefetch((const char *)(x + i) + SNIPI_AHEAD, _MM_HINT_T0);
        most = _mm256_max_epi32(
            most, _mm256_and_si256(magnitude, _mm256_loadu_si256((const __m256i *)(const void *)(x + i))));
    }
    rest = snipi_amax_scalar(x + i, n - i, &bad);
    _mm256_storeu_si256((__m256i *)(void *)lane, most);
    for (a = 0, i = 0; i < 8; i++) a = lane[i] > a ? lane[i] : a;
    if (a >= 0x7F800000u || bad) return snipi_amax_scalar(x, n, nonfinite);
    return rest > a ? rest : a;
}

SNIPI_TARGET_AVX512 static uint32_t snipi_amax_avx512(const float *x, int n, int64_t *nonfinite) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most = _mm512_setzero_si512(), other = most;
    uint32_t a;
    int i;
    for (i = 0; i + 32 <= n; i += 32) {  // most = max(most, |x|) of bits
        _mm_prefetch((const char *)(x + i) + SNIPI_AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(x + i + 16) + SNIPI_AHEAD, _MM_HINT_T0);
        most = _mm512_max_epi32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + i)));
        other = _mm512_max_epi32(other, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + i + 16)));
    }
    for (; i < n; i += 16) {
        __mmask16 m = (__mmask16)(n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1);
        most = _mm512_max_epi32(most, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(m, x + i)));
    }
    a = (uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(most, other));
    return a >= 0x7F800000u ? snipi_amax_scalar(x, n, nonfinite) : a;
}

// Philox over counters with the same upper half: what the first two rounds have in common, and the keys of the other
// eight.
typedef struct {
    uint64_t first, second[3], key[16];
} snipi_rounds;

static snipi_rounds snipi_rounds_of(snip_rng_key key, uint32_t upper) {
    const uint64_t p1 = (uint64_t)key.step * 0xCD9E8D57u,
                   p0 = (uint64_t)((uint32_t)(p1 >> 32) ^ upper ^ (uint32_t)key.seed) * 0xD2511F53u;
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32), round;
    snipi_rounds s;
    s.first = key.tensor ^ k1;
    s.second[0] = (uint32_t)p1 ^ (k0 + 0x9E3779B9u);
    s.second[1] = (p0 >> 32) ^ (k1 + 0xBB67AE85u);
    s.second[2] = (uint32_t)p0;
    for (round = 2; round < 10; round++) {
        s.key[2 * round - 4] = (uint32_t)(k0 + round * 0x9E3779B9u);
        s.key[2 * round - 3] = (uint32_t)(k1 + round * 0xBB67AE85u);
    }
    return s;
}

// Philox over `n` times 4 or 8 counters in 64-bit lanes: the products' latency is long. Only the low halves of c0..c3
// count until the end. The counters' order makes the unpacked halves come out in sequence.
#    define SNIPI_WORDS(name, attribute, n, vec, lanes, bits, pre, si, order)                                   \
        attribute SNIPI_INLINE void name(const snipi_rounds *s, uint32_t first, uint32_t *out) {                \
            const vec m0 = pre##set1_epi64##si(0xD2511F53), m1 = pre##set1_epi64##si(0xCD9E8D57);               \
            vec c0[n], c1[n], c2[n], c3[n];                                                                     \
            int g, round;                                                                                       \
            SNIPI_UNROLL                                                                                        \
            for (g = 0; g < n; g++) {                                                                           \
                vec p0 = pre##mul_epu32(                                                                        \
                    pre##add_epi64(pre##set1_epi64##si((int64_t)(first + (uint32_t)(g * lanes))), order), m0);  \
                vec p1 = pre##mul_epu32(                                                                        \
                    pre##xor_si##bits(SNIPI_UPPER_##lanes(p0), pre##set1_epi64##si((int64_t)s->first)), m1);    \
                c0[g] = pre##xor_si##bits(SNIPI_UPPER_##lanes(p1), pre##set1_epi64##si((int64_t)s->second[0])); \
                c1[g] = p1;                                                                                     \
                c2[g] = pre##xor_si##bits(p0, pre##set1_epi64##si((int64_t)s->second[1]));                      \
                c3[g] = pre##set1_epi64##si((int64_t)s->second[2]);                                             \
            }                                                                                                   \
            SNIPI_UNROLL                                                                                        \
            for (round = 0; round < 7; round++) {                                                               \
                SNIPI_UNROLL                                                                                    \
                for (g = 0; g < n; g++) {                                                                       \
                    vec p0 = pre##mul_epu32(c0[g], m0), p1 = pre##mul_epu32(c2[g], m1); /* as snip_philox */    \
                    c0[g] = SNIPI_XOR3_##lanes(SNIPI_UPPER_##lanes(p1), c1[g],                                  \
                                               pre##set1_epi64##si((int64_t)s->key[2 * round]));                \
                    c2[g] = SNIPI_XOR3_##lanes(SNIPI_UPPER_##lanes(p0), c3[g],                                  \
                                               pre##set1_epi64##si((int64_t)s->key[2 * round + 1]));            \
                    c1[g] = p1;                                                                                 \
                    c3[g] = p0;                                                                                 \
                }                                                                                               \
            }                                                                                                   \
            SNIPI_UNROLL                                                                                        \
            for (g = 0; g < n; g++) {                                                                           \
                vec even = SNIPI_LAST_##lanes(pre##mul_epu32(c2[g], m1), c1[g],                                 \
                                              pre##set1_epi64##si((int64_t)s->key[14]));                        \
                vec odd = SNIPI_LAST_##lanes(pre##mul_epu32(c0[g], m0), c3[g],                                  \
                                             pre##set1_epi64##si((int64_t)s->key[15]));                         \
                SNIPI_STORE_##lanes(out + 4 * lanes * g, pre##unpacklo_epi64(even, odd));                       \
                SNIPI_STORE_##lanes(out + 4 * lanes * g + 2 * lanes, pre##unpackhi_epi64(even, odd));           \
            }                                                                                                   \
        }
#    define SNIPI_PHILOX(name, attribute, lanes)                                                                      \
        attribute static void name(snip_rng_key key, uint64_t first, int blocks, uint32_t *out) {                     \
            const snipi_rounds s = snipi_rounds_of(key, (uint32_t)(first >> 32));                                     \
            int b = 0;                                                                                                \
            if (!snipi_one_upper(first, blocks)) {                                                                    \
                snipi_philox_scalar(key, first, blocks, out);                                                         \
                return;                                                                                               \
            }                                                                                                         \
            for (; b + 4 * lanes <= blocks; b += 4 * lanes) name##_4(&s, (uint32_t)first + (uint32_t)b, out + 4 * b); \
            for (; b < blocks; b += 2 * lanes) name##_2(&s, (uint32_t)first + (uint32_t)b, out + 4 * b);              \
        }
#    define SNIPI_UPPER_4(a) _mm256_srli_epi64(a, 32)
#    define SNIPI_UPPER_8(a) _mm512_shuffle_epi32(a, _MM_PERM_DDBB)  // the shift's port is the product's
#    define SNIPI_XOR3_4(a, b, c) _mm256_xor_si256(_mm256_xor_si256(a, b), c)
#    define SNIPI_XOR3_8(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)
// Halves changed about, and the low one XORed.
#    define SNIPI_LAST_4(p, c, k)                       \
        _mm256_xor_si256(_mm256_shuffle_epi32(p, 0xB1), \
                         _mm256_and_si256(_mm256_xor_si256(c, k), _mm256_set1_epi64x(0xFFFFFFFF)))
#    define SNIPI_LAST_8(p, c, k) \
        _mm512_mask_ternarylogic_epi32(_mm512_shuffle_epi32(p, _MM_PERM_CDAB), 0x5555, c, k, 0x96)
#    define SNIPI_STORE_4(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), v)
#    define SNIPI_STORE_8(p, v) _mm512_storeu_si512(p, v)
SNIPI_WORDS(snipi_philox_avx2_2, SNIPI_TARGET_AVX2, 2, __m256i, 4, 256, _mm256_, x, _mm256_setr_epi64x(0, 2, 1, 3))
SNIPI_WORDS(snipi_philox_avx2_4, SNIPI_TARGET_AVX2, 4, __m256i, 4, 256, _mm256_, x, _mm256_setr_epi64x(0, 2, 1, 3))
SNIPI_PHILOX(snipi_philox_avx2, SNIPI_TARGET_AVX2, 4)
SNIPI_WORDS(snipi_philox_avx512_2, SNIPI_TARGET_AVX512, 2, __m512i, 8, 512, _mm512_, ,
            _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))
SNIPI_WORDS(snipi_philox_avx512_4, SNIPI_TARGET_AVX512, 4, __m512i, 8, 512, _mm512_, ,
            _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))
SNIPI_PHILOX(snipi_philox_avx512, SNIPI_TARGET_AVX512, 8)

SNIPI_TARGET_AVX2 static void snipi_run_avx2(const snipi_run *q) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), exponents = _mm256_set1_epi32(0x7F800000),
                  least = _mm256_set1_epi32(q->k.least);
    const __m256i cap = _mm256_set1_epi32(q->k.cap), beyond = _mm256_set1_epi32(q->k.beyond),
                  largest = _mm256_set1_epi32((int)q->e.largest);
    const __m256i magic = _mm256_set1_epi32(q->k.magic), unit = _mm256_set1_epi32(q->k.unit),
                  fixed_top = _mm256_set1_epi32((int)(277u << 23));
    const __m128i shifts = _mm_cvtsi32_si128(q->k.shift), sign_shifts = _mm_cvtsi32_si128(q->k.sign_shift),
                  random_shifts = _mm_cvtsi32_si128(q->k.random_shift);
    const __m256i sign_bit = _mm256_set1_epi32(q->k.sign);
    const __m256 inverse = _mm256_set1_ps(q->inverse), scale = _mm256_set1_ps(q->scale), max = _mm256_set1_ps(q->e.max);
    snipi_tally *t = q->tally;
    __m256i over = _mm256_setzero_si256();
    __m256 sum_sq[2], err_sq[2];
    __m256d dot[2];
    uint32_t lane[8];
    int i, g;
    sum_sq[0] = sum_sq[1] = err_sq[0] = err_sq[1] = _mm256_setzero_ps();
    dot[0] = dot[1] = _mm256_setzero_pd();
    for (i = 0; i < q->n; i += 16) {
        const int whole = q->n - i >= 16, rest = whole ? 16 : q->n - i;
        const float *x = q->x + i, *weight = q->weight ? q->weight + i : NULL;
        const uint32_t *random = q->random ? q->random + i : NULL;
        float *values = q->values ? q->values + i : NULL, last_x[16], last_weight[16], last_values[16];
        uint32_t last_random[16];
        __m256i code[2];
        if (!whole) {  // the last elements, padded with zeros
            memset(last_x, 0, sizeof last_x);
            memcpy(last_x, x, (size_t)rest * sizeof(float));
            x = last_x;
            if (random) {
                memset(last_random, 0, sizeof last_random);
                memcpy(last_random, random, (size_t)rest * sizeof(uint32_t));
                random = last_random;
            }
            if (weight) {
                memset(last_weight, 0, sizeof last_weight);
                memcpy(last_weight, weight, (size_t)rest * sizeof(float));
                weight = last_weight;
            }
            if (values) values = last_values;
        }
        SNIPI_UNROLL
        for (g = 0; g < 2; g++) {
            __m256i u = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * g), inverse)),
                    a = _mm256_and_si256(u, magnitude), k;
            __m256i capped = _mm256_min_epu32(a, cap), e = _mm256_max_epi32(_mm256_and_si256(capped, exponents), least),
                    sign = _mm256_andnot_si256(magnitude, u);
            __m256 value;
            if (!random) {
                __m256 power = _mm256_castsi256_ps(
                    _mm256_add_epi32(_mm256_add_epi32(e, magic), _mm256_srl_epi32(e, shifts)));
                __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(capped), power);
                SNIPI_KEPT(sum);
                k = _mm256_and_si256(_mm256_castps_si256(sum), _mm256_sub_epi32(sign_bit, _mm256_set1_epi32(1)));
                value = _mm256_sub_ps(sum, power);
                over = _mm256_sub_epi32(over, _mm256_cmpgt_epi32(a, beyond));
            } else {  // k = (|y| * 2^(23 - e) + random) >> shift
                __m256i r = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(random + 8 * g)),
                                             random_shifts);
                __m256 fixed = _mm256_mul_ps(_mm256_castsi256_ps(capped),
                                             _mm256_castsi256_ps(_mm256_sub_epi32(fixed_top, e)));
                k = _mm256_srl_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(fixed), r), shifts);
                value = _mm256_min_ps(
                    max, _mm256_mul_ps(_mm256_cvtepi32_ps(k), _mm256_castsi256_ps(_mm256_sub_epi32(e, unit))));
                k = _mm256_add_epi32(k, _mm256_srl_epi32(_mm256_sub_epi32(e, least), shifts));
                over = _mm256_sub_epi32(over, _mm256_cmpgt_epi32(k, largest));
                k = _mm256_min_epu32(k, largest);
            }
            code[g] = _mm256_or_si256(k, _mm256_srl_epi32(sign, sign_shifts));
            if (q->want_sums) {  // of |y|: the signs of y and value are the same
                __m256 d = _mm256_sub_ps(value, _mm256_castsi256_ps(a)),
                       v2 = _mm256_mul_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(a)), d2 = _mm256_mul_ps(d, d);
                SNIPI_KEPT(v2);
                SNIPI_KEPT(d2);
                sum_sq[g] = _mm256_add_ps(sum_sq[g], v2);
                err_sq[g] = _mm256_add_ps(err_sq[g], d2);
                if (weight) {
                    d = _mm256_xor_ps(d, _mm256_castsi256_ps(sign));
                    dot[0] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(weight + 8 * g)),
                                             _mm256_cvtps_pd(_mm256_castps256_ps128(d)), dot[0]);
                    dot[1] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(weight + 8 * g + 4)),
                                             _mm256_cvtps_pd(_mm256_extractf128_ps(d, 1)), dot[1]);
                }
            }
            if (values) {
                value = _mm256_mul_ps(_mm256_or_ps(value, _mm256_castsi256_ps(sign)), scale);
                if (q->stream && ((uintptr_t)values & 31) == 0)
                    _mm256_stream_ps(values + 8 * g, value);
                else
                    _mm256_storeu_ps(values + 8 * g, value);
            }
        }
        if (!whole && values) memcpy(q->values + i, last_values, (size_t)rest * sizeof(float));
        if (q->codes) {
            __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(code[0], code[1]), 0xD8);
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            uint8_t *codes = q->codes + (q->packed ? i / 2 : i), last[16];
            if (q->packed) {  // low + 16 * high
                bytes = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
                bytes = _mm_packus_epi16(bytes, bytes);
            }
            if (!whole) {
                _mm_storeu_si128((__m128i *)(void *)last, bytes);
                memcpy(codes, last, (size_t)(q->packed ? (rest + 1) / 2 : rest));
            } else if (q->packed)
                _mm_storel_epi64((__m128i *)(void *)codes, bytes);
            else if (q->stream && ((uintptr_t)codes & 15) == 0)
                _mm_stream_si128((__m128i *)(void *)codes, bytes);
            else
                _mm_storeu_si128((__m128i *)(void *)codes, bytes);
        }
    }
    _mm256_storeu_si256((__m256i *)(void *)lane, over);
    for (g = 0; g < 8; g++) t->saturated += lane[g];
    if (!q->want_sums) return;
    SNIPI_UNROLL
    for (g = 0; g < 2; g++) {  // tally += (lane + lane 8 further) * scale^2
        const __m256d s = _mm256_set1_pd((double)q->scale), s2 = _mm256_set1_pd((double)q->scale * (double)q->scale);
        __m256d v, d, w = _mm256_mul_pd(dot[g], s);
#    define SNIPI_HALF(pair)                                                                                    \
        _mm256_add_pd(_mm256_cvtps_pd(g ? _mm256_extractf128_ps(pair[0], 1) : _mm256_castps256_ps128(pair[0])), \
                      _mm256_cvtps_pd(g ? _mm256_extractf128_ps(pair[1], 1) : _mm256_castps256_ps128(pair[1])))
        v = _mm256_mul_pd(SNIPI_HALF(sum_sq), s2);
        d = _mm256_mul_pd(SNIPI_HALF(err_sq), s2);
        SNIPI_KEPT(v);
        SNIPI_KEPT(d);
        SNIPI_KEPT(w);
        _mm256_storeu_pd(t->sum_sq + 4 * g, _mm256_add_pd(_mm256_loadu_pd(t->sum_sq + 4 * g), v));
        _mm256_storeu_pd(t->err_sq + 4 * g, _mm256_add_pd(_mm256_loadu_pd(t->err_sq + 4 * g), d));
        _mm256_storeu_pd(t->dot + 4 * g, _mm256_add_pd(_mm256_loadu_pd(t->dot + 4 * g), w));
    }
}

// Strips and columns, AVX-512: exact for finite runs of ordinary size, as snipi_run_scalar. `power` (above) depends on
// the exponent alone: a table of 32. The sum keeps the sign of y in its top bit; rotated left by one, it has the code
// and then the sign in its low bits, and four such words rotated further make up four bytes at a time, eight make up
// nibbles. Stochastic: below the smallest normal number adding that number, truncated, puts |y| into the same fixed
// point.
typedef struct {
    __m512i magnitude, least, beyond, cap, top, keep, power[2], code_normal, code_below, sign_bit;
    __m512 least_float;
} snipi_codec512;

SNIPI_TARGET_AVX512 SNIPI_INLINE snipi_codec512 snipi_codec512_of(const snipi_run *q) {
    snipi_codec512 k;
    k.power[0] = _mm512_loadu_si512(q->k.power);
    k.power[1] = _mm512_loadu_si512(q->k.power + 16);
    k.magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    k.sign_bit = _mm512_set1_epi32((int)0x80000000u);
    k.least = _mm512_set1_epi32(q->k.least);
    k.least_float = _mm512_castsi512_ps(k.least);
    k.beyond = _mm512_set1_epi32(q->k.beyond);
    k.cap = _mm512_set1_epi32(q->k.cap);
    k.top = _mm512_set1_epi32((int32_t)snipi_bits(q->e.max) + (1 << q->k.shift) - 1);
    k.keep = _mm512_set1_epi32(-(1 << q->k.shift));
    k.code_normal = _mm512_set1_epi32(q->k.least - (1 << 23));
    k.code_below = k.least;
    return k;
}
#    if defined(__GNUC__) && !defined(__clang__)  // GCC's own macros for the rounding mode and vrangeps, at -O0
#        pragma GCC diagnostic push
#        pragma GCC diagnostic ignored "-Wsign-conversion"
#    endif
// y's code, in `sum` as above, and value.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_nearest512(const snipi_codec512 *k, __m512 y, int capped, __m512i *over,
                                                         __m512i *sum) {
    __m512 power, s;
    if (capped) {
        __m512i a = _mm512_and_si512(_mm512_castps_si512(y), k->magnitude);
        *over = _mm512_mask_add_epi32(*over, _mm512_cmpgt_epi32_mask(a, k->beyond), *over, _mm512_set1_epi32(1));
        y = _mm512_castsi512_ps(
            _mm512_ternarylogic_epi32(k->magnitude, _mm512_min_epi32(a, k->cap), _mm512_castps_si512(y), 0xCA));
    }
    power = _mm512_maskz_range_ps(0xFFFF, y, k->least_float, 3);  // the larger magnitude, with y's sign
    power = _mm512_castsi512_ps(
        _mm512_permutex2var_epi32(k->power[0], _mm512_srli_epi32(_mm512_castps_si512(power), 23), k->power[1]));
    power = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(power), _mm512_castps_si512(y), k->sign_bit, 0xF8));
    s = _mm512_add_ps(y, power);
    SNIPI_KEPT512(s);
    *sum = _mm512_castps_si512(s);
    return _mm512_sub_ps(s, power);
}

// The code from bit `shift` upwards of *sum; the value of |y| is returned.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_stochastic512(const snipi_codec512 *k, __m512 y, __m512i random,
                                                            int capped, __m512i *over, __m512i *sum) {
    __m512i a = _mm512_and_si512(_mm512_castps_si512(y), k->magnitude), t;
    __mmask16 below = _mm512_cmplt_epi32_mask(a, k->least);
    __m512 value;
    t = _mm512_castps_si512(_mm512_mask_add_round_ps(_mm512_castsi512_ps(a), below, _mm512_castsi512_ps(a),
                                                     k->least_float, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    t = _mm512_add_epi32(t, random);
    if (capped) {
        *over = _mm512_mask_add_epi32(*over, _mm512_cmpgt_epi32_mask(t, k->top), *over, _mm512_set1_epi32(1));
        t = _mm512_min_epi32(t, k->top);
    }
    value = _mm512_castsi512_ps(_mm512_and_si512(t, k->keep));
    *sum = _mm512_sub_epi32(t, _mm512_mask_mov_epi32(k->code_normal, below, k->code_below));
    return _mm512_mask_sub_ps(value, below, value, k->least_float);
}
#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic pop
#    endif
// tally += (lane + lane 8 further) * scale^2
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512d snipi_fold512(__m512d total, __m512 lanes, __m512d square) {
    __m512d v = _mm512_mul_pd(_mm512_add_pd(SNIPI_LOW(lanes), SNIPI_HIGH(lanes)), square);
    SNIPI_KEPT512(v);
    return _mm512_add_pd(total, v);
}

SNIPI_TARGET_AVX512 static void snipi_peaks_avx512(const snipi_strip *s, uint32_t *amax) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const int whole = s->width / 16, tiles = (int)(s->pieces * snipi_ceil_div(s->length, s->width));
    const float *x = s->x, *p = x;
    int64_t along = 0;
    int first, vectors, i, v;
    for (first = 0; first < tiles; first += 16) {
        __m512i most[16];
        for (i = 0; i < 16; i++) {
            most[i] = _mm512_setzero_si512();
            if (first + i >= tiles) continue;
            vectors = s->length - along < s->width ? 4 : whole;
            if (s->pieces == 1 && along % 64 == 0) _mm_prefetch(s->ahead + along * s->ahead_size / 4, _MM_HINT_T0);
            if (vectors == 8) {
                __m512i other = most[i];
                if (s->pieces == 1) _mm_prefetch(s->ahead + along * s->ahead_size / 4 + 64, _MM_HINT_T0);
                SNIPI_UNROLL
                for (v = 0; v < 8; v += 2) {
                    most[i] = _mm512_max_epu32(most[i], _mm512_and_si512(magnitude, _mm512_loadu_si512(p + 16 * v)));
                    other = _mm512_max_epu32(other, _mm512_and_si512(magnitude, _mm512_loadu_si512(p + 16 * v + 16)));
                }
                most[i] = _mm512_max_epu32(most[i], other);
            } else
                for (v = 0; v < vectors; v++)
                    most[i] = _mm512_max_epu32(most[i], _mm512_and_si512(magnitude, _mm512_loadu_si512(p + 16 * v)));
            p += 16 * vectors;
            along += 16 * vectors;
            if (along == s->length) {
                x += s->x_stride;
                p = x;
                along = 0;
            }
        }
        // Sixteen reductions at once: halves of two vectors side by side, their maximum, and so on.
        SNIPI_UNROLL
        for (i = 0; i < 8; i++)
            most[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(most[2 * i], most[2 * i + 1]),
                                       _mm512_unpackhi_epi32(most[2 * i], most[2 * i + 1]));
        SNIPI_UNROLL
        for (i = 0; i < 4; i++)
            most[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(most[2 * i], most[2 * i + 1]),
                                       _mm512_unpackhi_epi64(most[2 * i], most[2 * i + 1]));
        SNIPI_UNROLL
        for (i = 0; i < 2; i++)
            most[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(most[2 * i], most[2 * i + 1], 0x88),
                                       _mm512_shuffle_i32x4(most[2 * i], most[2 * i + 1], 0xDD));
        most[0] = _mm512_max_epu32(_mm512_shuffle_i32x4(most[0], most[1], 0x88),
                                   _mm512_shuffle_i32x4(most[0], most[1], 0xDD));
        _mm512_storeu_si512(amax + first, most[0]);
    }
}

// Scales of 16 tiles as snipi_scale_of has them; 0 where an amax is zero, tiny, huge or not finite. Quotients in
// double, then rounded.
SNIPI_TARGET_AVX512 SNIPI_INLINE __m512 snipi_quotient512(__m512 a, __m512 b) {
    __m512d low = SNIPI_LOW(b), high = SNIPI_HIGH(b);
    SNIPI_KEPT512(low);
    SNIPI_KEPT512(high);
    low = _mm512_div_pd(SNIPI_LOW(a), low);
    high = _mm512_div_pd(SNIPI_HIGH(a), high);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_maskz_cvtpd_ps(0xFF, low)),
                              _mm512_maskz_cvtpd_ps(0xFF, high), 1);
}

SNIPI_TARGET_AVX512 static int snipi_scales_avx512(snip_scale kind, const snipi_run *q, float tensor_scale,
                                                   float tensor_inverse, const uint32_t *amax, int tiles, float *scale,
                                                   float *inverse, uint8_t *bytes) {
    const __m512i least = _mm512_set1_epi32((127 - 40) << 23), range = _mm512_set1_epi32(80 << 23),
                  fraction = _mm512_set1_epi32(0x7FFFFF), one = _mm512_set1_epi32(127);
    const __m512i max_bits = _mm512_set1_epi32((int)snipi_bits(q->e.max));
    int i;
    for (i = 0; i < tiles; i += 16) {
        const __mmask16 live = (__mmask16)(tiles - i >= 16 ? 0xFFFF : (1 << (tiles - i)) - 1);
        __m512i a = _mm512_loadu_si512(amax + i), k, up;
        __m512 s, v;
        if (_mm512_mask_cmpgt_epu32_mask(live, _mm512_sub_epi32(a, least), range)) return 0;
        a = _mm512_mask_mov_epi32(least, live, a);
        k = _mm512_sub_epi32(_mm512_srli_epi32(a, 23), _mm512_set1_epi32(127 + q->e.emax));  // as in snipi_scale_of
        if (kind == SNIP_SCALE_POW2 || kind == SNIP_SCALE_UE8M0_UP) {
            up = _mm512_and_si512(max_bits, fraction);
            k = _mm512_mask_add_epi32(k, _mm512_cmpgt_epi32_mask(_mm512_and_si512(a, fraction), up), k,
                                      _mm512_set1_epi32(1));
        }
        if (kind == SNIP_SCALE_F32) {
            s = snipi_quotient512(_mm512_castsi512_ps(a), _mm512_castsi512_ps(max_bits));
            v = snipi_quotient512(_mm512_castsi512_ps(max_bits), _mm512_castsi512_ps(a));
        } else if (kind == SNIP_SCALE_UE4M3) {  // E4M3 by adding a power of two, as >>simd's runs
            const float sixth = tensor_inverse * snipi_float(0x3E2AAAABu);
            __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(sixth)), power, sum;
            __m512i e;
            SNIPI_KEPT512(y);
            if (_mm512_mask_cmplt_epu32_mask(live, _mm512_castps_si512(y), _mm512_set1_epi32((127 - 10) << 23)))
                return 0;  // perhaps a scale of 0
            y = _mm512_castsi512_ps(
                _mm512_min_epi32(_mm512_castps_si512(y), _mm512_set1_epi32((int)snipi_bits(448.0f))));
            e = _mm512_max_epi32(_mm512_andnot_si512(fraction, _mm512_castps_si512(y)),
                                 _mm512_set1_epi32((127 - 6) << 23));
            power = _mm512_castsi512_ps(_mm512_add_epi32(e, _mm512_set1_epi32(20 << 23)));
            sum = _mm512_add_ps(y, power);
            SNIPI_KEPT512(sum);
            y = _mm512_sub_ps(sum, power);
            SNIPI_KEPT512(y);
            k = _mm512_add_epi32(
                _mm512_castps_si512(sum),
                _mm512_slli_epi32(_mm512_sub_epi32(_mm512_srli_epi32(e, 23), _mm512_set1_epi32(127 - 6)), 3));
            k = _mm512_and_si512(k, _mm512_set1_epi32(0x7F));
            s = _mm512_mul_ps(y, _mm512_set1_ps(tensor_scale));
            if (_mm512_mask_cmpgt_epu32_mask(
                    live, _mm512_sub_epi32(_mm512_castps_si512(s), _mm512_set1_epi32((127 - 100) << 23)),
                    _mm512_set1_epi32(200 << 23)))
                return 0;
            v = snipi_quotient512(_mm512_set1_ps(1.0f), s);
            if (bytes) _mm512_mask_cvtepi32_storeu_epi8(bytes + i, live, k);
        } else {
            s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(one, k), 23));
            v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(one, k), 23));
            if (bytes && kind != SNIP_SCALE_POW2)
                _mm512_mask_cvtepi32_storeu_epi8(bytes + i, live, _mm512_add_epi32(one, k));
        }
        _mm512_storeu_ps(scale + i, s);
        _mm512_storeu_ps(inverse + i, v);
    }
    return 1;
}

// `plain`: codes alone, none beyond the largest.
SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_strip_avx512_as(const snipi_run *q, const snipi_strip *s,
                                                            const int stochastic, const int sums, const int narrow,
                                                            const int plain) {
    const snipi_codec512 k = snipi_codec512_of(q);
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i random_shift = _mm512_set1_epi32(q->k.random_shift), shift = _mm512_set1_epi32(q->k.shift),
                  sign_shift = _mm512_set1_epi16((short)q->e.sign);
    const __m512i sign_bytes = _mm512_set1_epi8((char)q->k.sign),
                  bytes_kept = _mm512_set1_epi8((char)(2 * q->k.sign - 1));
    const int packed = q->packed, capped = plain ? 0 : s->capped, step = s->one_scale ? 0 : 1, rows = s->pieces > 1,
              fetched = rows || s->one_scale ? 4 : 3;
    const int stream = q->stream && ((uintptr_t)s->values & 63) == 0 && (s->value_stride & 15) == 0;
    const int stream_codes = q->stream && ((uintptr_t)s->codes & 63) == 0 && (s->code_stride & 63) == 0 &&
                             s->length % 128 == 0;
    const float *scale = s->scale, *inverse = s->inverse;
    snipi_rounds rounds;
    snipi_tally *t = s->tally;
    __m512d total_sq = _mm512_loadu_pd(t->sum_sq), total_err = _mm512_loadu_pd(t->err_sq),
            total_dot = _mm512_loadu_pd(t->dot), dot = _mm512_setzero_pd();
    __m512 sum_sq = _mm512_setzero_ps(), err_sq = sum_sq;
    __m512i over = _mm512_setzero_si512();
    __m256i half = _mm256_setzero_si256();  // of a line of packed codes
    uint32_t words[128];
    int piece, g, in_tile = 0;
    if (stochastic) rounds = snipi_rounds_of(s->key, (uint32_t)(s->first >> 32));
    for (piece = 0; piece < s->pieces; piece++) {
        const float *x = s->x + piece * s->x_stride,
                    *weight = !plain && s->weight ? s->weight + piece * s->x_stride : NULL;
        const uint32_t *random = words, first = (uint32_t)(s->first + (uint64_t)piece * s->step);
        float *values = !plain && s->values ? s->values + piece * s->value_stride : NULL;
        uint8_t *codes = plain || s->codes ? s->codes + piece * s->code_stride : NULL;
        const char *ahead = s->ahead + piece * s->ahead_stride;
        const int64_t length = s->length, line = 16 * s->ahead_size;
        int64_t i;
        if (fetched == 3) ahead += length * s->ahead_size / 4;  // the first quarter was fetched with the maxima
        for (i = 0; i < length; i += 64, ahead += fetched * line) {
            __m512i word[4];
            if (stochastic) random = s->random ? s->random + piece * s->random_stride + i : words + i % 128;
            if (stochastic && !s->random && i % 128 == 0)
                snipi_philox_avx512_4(&rounds, first + (uint32_t)(i >> 2), words);
            SNIPI_UNROLL
            for (g = 0; g < 4; g++) {
                const int64_t at = i + 16 * g;
                __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + at), _mm512_set1_ps(*inverse)), value;
                if (rows)
                    _mm_prefetch(ahead + g * line, _MM_HINT_T1);  // they may share sets of the nearest cache
                else if (g < fetched)
                    _mm_prefetch(ahead + g * line, _MM_HINT_T0);
                SNIPI_KEPT512(y);
                if (stochastic)
                    value = snipi_stochastic512(&k, y,
                                                _mm512_srlv_epi32(_mm512_loadu_si512(random + 16 * g), random_shift),
                                                capped, &over, &word[g]);
                else
                    value = snipi_nearest512(&k, y, capped, &over, &word[g]);
                if (stochastic && (values || weight))
                    value = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value),
                                                                          _mm512_castps_si512(y), k.sign_bit, 0xF8));
                if (sums) {
                    __m512 to = stochastic && !(values || weight)
                                    ? _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(y), k.magnitude))
                                    : y;
                    __m512 d = _mm512_sub_ps(value, to), v2 = _mm512_mul_ps(y, y), d2 = _mm512_mul_ps(d, d);
                    SNIPI_KEPT512(v2);
                    SNIPI_KEPT512(d2);
                    sum_sq = _mm512_add_ps(sum_sq, v2);
                    err_sq = _mm512_add_ps(err_sq, d2);
                    if (weight) {
                        __m512 w = _mm512_loadu_ps(weight + at);
                        dot = _mm512_fmadd_pd(SNIPI_LOW(w), SNIPI_LOW(d), dot);
                        dot = _mm512_fmadd_pd(SNIPI_HIGH(w), SNIPI_HIGH(d), dot);
                    }
                }
                if (values) {
                    value = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value),
                                                                          _mm512_castps_si512(y), k.sign_bit, 0xF8));
                    value = _mm512_mul_ps(value, _mm512_set1_ps(*scale));
                    if (stream)
                        _mm512_stream_ps(values + at, value);
                    else
                        _mm512_storeu_ps(values + at, value);
                }
                if (stochastic)
                    word[g] = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(word[g], shift), _mm512_castps_si512(y),
                                                        k.sign_bit, 0xF8);
                word[g] = g == 0   ? _mm512_rol_epi32(word[g], 1)
                          : g == 1 ? _mm512_rol_epi32(word[g], 9)
                          : g == 2 ? _mm512_rol_epi32(word[g], 17)
                                   : _mm512_rol_epi32(word[g], 25);
                if (narrow || g == 3) {
                    in_tile += narrow ? 16 : 64;
                    if (in_tile == s->width || (g == 3 && i + 64 == length)) {
                        if (sums) {
                            const __m512d one = _mm512_set1_pd((double)*scale), square = _mm512_mul_pd(one, one);
                            total_sq = snipi_fold512(total_sq, sum_sq, square);
                            total_err = snipi_fold512(total_err, err_sq, square);
                            sum_sq = err_sq = _mm512_setzero_ps();
                            if (weight) {
                                __m512d w = _mm512_mul_pd(dot, one);
                                SNIPI_KEPT512(w);
                                total_dot = _mm512_add_pd(total_dot, w);
                                dot = _mm512_setzero_pd();
                            }
                        }
                        in_tile = 0;
                        scale += step;
                        inverse += step;
                    }
                }
            }
            if (codes) {  // byte g of dword j is the code of element 16 g + j
                __m512i bytes = _mm512_ternarylogic_epi32(
                    _mm512_set1_epi32(0x0000FFFF),
                    _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x000000FF), word[0], word[1], 0xCA),
                    _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00FF0000), word[2], word[3], 0xCA), 0xCA);
                bytes = _mm512_permutexvar_epi32(turn, _mm512_shuffle_epi8(bytes, spread));
                bytes = _mm512_ternarylogic_epi32(sign_bytes, _mm512_sllv_epi16(bytes, sign_shift),
                                                  _mm512_srli_epi16(bytes, 1), 0xCA);
                bytes = _mm512_and_si512(bytes, bytes_kept);
                if (packed) {  // low + 16 * high
                    __m256i pairs = _mm512_maskz_cvtepi16_epi8(0xFFFFFFFF,
                                                               _mm512_or_si512(bytes, _mm512_srli_epi16(bytes, 4)));
                    if (stream_codes && i % 128 == 0)
                        half = pairs;
                    else if (stream_codes)
                        _mm512_stream_si512((__m512i *)(void *)(codes + i / 2 - 32),
                                            _mm512_inserti64x4(_mm512_castsi256_si512(half), pairs, 1));
                    else
                        _mm256_storeu_si256((__m256i *)(void *)(codes + i / 2), pairs);
                } else if (stream_codes)
                    _mm512_stream_si512((__m512i *)(void *)(codes + i), bytes);
                else
                    _mm512_storeu_si512(codes + i, bytes);
            }
        }
    }
    if (_mm512_test_epi32_mask(over, over)) t->saturated += _mm512_reduce_add_epi32(over);
    if (!sums) return;
    _mm512_storeu_pd(t->sum_sq, total_sq);
    _mm512_storeu_pd(t->err_sq, total_err);
    _mm512_storeu_pd(t->dot, total_dot);
}

SNIPI_TARGET_AVX512 static void snipi_strip_avx512(const snipi_run *q, const snipi_strip *s) {
    const int narrow = s->width < 64,
              plain = s->codes && !s->values && !s->weight && !s->capped;  // constants below: a loop each
    if (q->stochastic) {
        if (q->want_sums && plain && !narrow)
            snipi_strip_avx512_as(q, s, 1, 1, 0, 1);
        else if (q->want_sums && narrow)
            snipi_strip_avx512_as(q, s, 1, 1, 1, 0);
        else if (q->want_sums)
            snipi_strip_avx512_as(q, s, 1, 1, 0, 0);
        else
            snipi_strip_avx512_as(q, s, 1, 0, 1, 0);
    } else if (plain && !narrow && q->want_sums)
        snipi_strip_avx512_as(q, s, 0, 1, 0, 1);
    else if (plain && !narrow)
        snipi_strip_avx512_as(q, s, 0, 0, 0, 1);
    else if (q->want_sums && narrow)
        snipi_strip_avx512_as(q, s, 0, 1, 1, 0);
    else if (q->want_sums)
        snipi_strip_avx512_as(q, s, 0, 1, 0, 0);
    else if (narrow)
        snipi_strip_avx512_as(q, s, 0, 0, 1, 0);
    else
        snipi_strip_avx512_as(q, s, 0, 0, 0, 0);
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_transpose512(__m512i v[16]) {
    __m512i w[16];
    int i;
    SNIPI_UNROLL
    for (i = 0; i < 8; i++) {  // dwords of neighbours, then pairs, then 128-bit lanes
        w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    SNIPI_UNROLL
    for (i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    SNIPI_UNROLL
    for (i = 0; i < 4; i++) {
        w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
        w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
    }
    SNIPI_UNROLL
    for (i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xDD);
        v[i + 4] = _mm512_shuffle_i32x4(w[i + 4], w[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(w[i + 4], w[i + 12], 0xDD);
    }
}

SNIPI_TARGET_AVX512 static void snipi_copy_avx512(const void *x, int bf16, int64_t at, int64_t ld, int r0, int cols,
                                                  int height, float *block, uint32_t *amax) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const int64_t size = bf16 ? 2 : 4;
    int r, v;
    at += r0 * ld;
    block += r0 * SNIPI_PANEL_LD;
    amax += r0 / height * SNIPI_RUN;
    for (v = 0; v < cols; v += 16) {
        const char *p = (const char *)x + (at + v) * size;
        __m512i most = r0 % height ? _mm512_loadu_si512(amax + v) : _mm512_setzero_si512();
        for (r = 0; r < SNIPI_BATCH; r++, p += ld * size) {
            __m512i u = bf16 ? _mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(
                                                     0xFFFF, _mm256_loadu_si256((const __m256i *)(const void *)p)),
                                                 16)
                             : _mm512_loadu_si512(p);
            _mm512_storeu_si512(block + r * SNIPI_PANEL_LD + v, u);
            most = _mm512_max_epu32(most, _mm512_and_si512(u, magnitude));
        }
        _mm512_storeu_si512(amax + v, most);
    }
}

// 4 words each for the counters `index` (8, in 64-bit lanes) of 16 columns, even ones and odd ones.
SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_random512(snip_rng_key key, __m512i even, __m512i odd, __m512i out[4]) {
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c[2][4];
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    int round, g;
    c[0][0] = even;
    c[1][0] = odd;
    SNIPI_UNROLL
    for (g = 0; g < 2; g++) {
        c[g][1] = _mm512_srli_epi64(c[g][0], 32);
        c[g][2] = _mm512_set1_epi64((int64_t)key.step);
        c[g][3] = _mm512_set1_epi64((int64_t)key.tensor);
    }
    SNIPI_UNROLL
    for (round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        SNIPI_UNROLL
        for (g = 0; g < 2; g++) {
            __m512i p0 = _mm512_mul_epu32(c[g][0], m0), p1 = _mm512_mul_epu32(c[g][2], m1);
            c[g][0] = SNIPI_XOR3_8(SNIPI_UPPER_8(p1), c[g][1], _mm512_set1_epi32((int)k0));
            c[g][2] = SNIPI_XOR3_8(SNIPI_UPPER_8(p0), c[g][3], _mm512_set1_epi32((int)k1));
            c[g][1] = p1;
            c[g][3] = p0;
        }
    }
    SNIPI_UNROLL
    for (g = 0; g < 4; g++) out[g] = _mm512_mask_shuffle_epi32(c[0][g], 0xAAAA, c[1][g], _MM_PERM_CCAA);
}

SNIPI_TARGET_AVX512 SNIPI_INLINE void snipi_columns_avx512_as(const snipi_run *q, const snipi_columns *s,
                                                              const int stochastic, const int sums, const int packed) {
    const snipi_codec512 k = snipi_codec512_of(q);
    const int each = packed ? 8 : 4, bits = packed ? 4 : 8, rows = 16 * each,
              capped = s->capped;  // rows to a dword, to a register of them
    const __m512i random_shift = _mm512_set1_epi32(q->k.random_shift), shift = _mm512_set1_epi32(q->k.shift);
    const __m512i lanes = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), step = _mm512_set1_epi64((int64_t)s->step);
    const __m512i signs = _mm512_set1_epi32((int)(packed ? 0x88888888u : 0x01010101u << q->e.sign)),
                  kept = _mm512_set1_epi32((int)(packed ? 0xFFFFFFFFu : 0x01010101u * (uint32_t)(2 * q->k.sign - 1)));
    const __m512i sign_shift = _mm512_set1_epi32(q->e.sign);
    const int stream = q->stream && ((uintptr_t)s->codes & 63) == 0 && (s->code_stride & 63) == 0;
    snipi_tally *t = s->tally;
    __m512d total_sq = _mm512_loadu_pd(t->sum_sq), total_err = _mm512_loadu_pd(t->err_sq);
    __m512i over = _mm512_setzero_si512();
    int c, r0, d, j, g, i;
    for (c = 0; c < s->cols; c += 16) {
        const __m512i columns = _mm512_add_epi64(_mm512_set1_epi64(c), lanes);
        const __m512i even = _mm512_add_epi64(_mm512_set1_epi64((int64_t)s->first), _mm512_mullo_epi64(columns, step)),
                      odd = _mm512_add_epi64(even, step);
        __m512i sum_sq[16], err_sq[16];  // by row modulo 16
        if (sums)
            for (i = 0; i < 16; i++) sum_sq[i] = err_sq[i] = _mm512_setzero_si512();
        for (r0 = 0; r0 < SNIPI_RUN; r0 += rows) {
            __m512i out[16];
            for (d = 0; d < 16; d++) {
                const int r = r0 + each * d, line = (c * SNIPI_RUN / 16 + r);
                const __m512 inverse = _mm512_loadu_ps(s->inverse + r / s->height * SNIPI_RUN + c);
                __m512i all = _mm512_setzero_si512(), random[4];
                if (line < 8 * s->ahead_rows) SNIPI_UNROLL
                for (j = 0; j < each; j++)
                    _mm_prefetch(s->ahead + (line >> 3) * s->ahead_stride + ((line & 7) + j) * 64, _MM_HINT_T1);
                SNIPI_UNROLL
                for (j = 0; j < each; j++) {
                    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(s->x + (r + j) * SNIPI_PANEL_LD + c), inverse), value,
                           to = y;
                    const __m512i place = _mm512_set1_epi32((int)(((1u << bits) - 1u) << (bits * j)));
                    __m512i word;
                    SNIPI_KEPT512(y);
                    if (stochastic) {
                        if (j % 4 == 0) {
                            const __m512i block = _mm512_set1_epi64((r + j) / 4);
                            snipi_random512(s->key, _mm512_add_epi64(even, block), _mm512_add_epi64(odd, block),
                                            random);
                        }
                        value = snipi_stochastic512(&k, y, _mm512_srlv_epi32(random[j % 4], random_shift), capped,
                                                    &over, &word);
                        word = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(word, shift), _mm512_castps_si512(y),
                                                         k.sign_bit, 0xF8);
                        if (sums) to = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(y), k.magnitude));
                    } else
                        value = snipi_nearest512(&k, y, capped, &over, &word);
                    word = _mm512_rolv_epi32(word, _mm512_set1_epi32((bits * j + 1) & 31));
                    all = j == 0 ? word : _mm512_ternarylogic_epi32(place, word, all, 0xCA);
                    if (sums) {
                        __m512 dv = _mm512_sub_ps(value, to), v2 = _mm512_mul_ps(y, y), d2 = _mm512_mul_ps(dv, dv);
                        SNIPI_KEPT512(v2);
                        SNIPI_KEPT512(d2);
                        i = (each * d + j) % 16;
                        sum_sq[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(sum_sq[i]), v2));
                        err_sq[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(err_sq[i]), d2));
                    }
                }
                all = _mm512_ternarylogic_epi32(signs, _mm512_sllv_epi32(all, sign_shift), _mm512_srli_epi32(all, 1),
                                                0xCA);
                out[d] = _mm512_and_si512(all, kept);
            }
            if (!s->codes) continue;
            snipi_transpose512(out);
            for (g = 0; g < 16; g++) {
                uint8_t *codes = s->codes + (c + g) * s->code_stride + (packed ? 0 : r0);
                if (stream)
                    _mm512_stream_si512((__m512i *)(void *)codes, out[g]);
                else
                    _mm512_storeu_si512(codes, out[g]);
            }
        }
        if (sums) {
            snipi_transpose512(sum_sq);
            snipi_transpose512(err_sq);
            for (i = 0; i < 16; i++) {
                const __m512d one = _mm512_set1_pd((double)s->scale[c + i]), square = _mm512_mul_pd(one, one);
                total_sq = snipi_fold512(total_sq, _mm512_castsi512_ps(sum_sq[i]), square);
                total_err = snipi_fold512(total_err, _mm512_castsi512_ps(err_sq[i]), square);
            }
        }
    }
    if (_mm512_test_epi32_mask(over, over)) t->saturated += _mm512_reduce_add_epi32(over);
    if (!sums) return;
    _mm512_storeu_pd(t->sum_sq, total_sq);
    _mm512_storeu_pd(t->err_sq, total_err);
}

SNIPI_TARGET_AVX512 static void snipi_columns_avx512(const snipi_run *q, const snipi_columns *s) {
    const int stochastic = q->stochastic, sums = q->want_sums;
    if (q->packed) {
        if (stochastic && sums)
            snipi_columns_avx512_as(q, s, 1, 1, 1);
        else if (stochastic)
            snipi_columns_avx512_as(q, s, 1, 0, 1);
        else if (sums)
            snipi_columns_avx512_as(q, s, 0, 1, 1);
        else
            snipi_columns_avx512_as(q, s, 0, 0, 1);
    } else if (stochastic && sums)
        snipi_columns_avx512_as(q, s, 1, 1, 0);
    else if (stochastic)
        snipi_columns_avx512_as(q, s, 1, 0, 0);
    else if (sums)
        snipi_columns_avx512_as(q, s, 0, 1, 0);
    else
        snipi_columns_avx512_as(q, s, 0, 0, 0);
}

SNIPI_TARGET_AVX2 static void snipi_transpose_avx2(const float *x, int64_t ld, int rows, int cols, float *out,
                                                   int64_t ld_out) {
    int r, c, i;
    for (r = 0; r + 8 <= rows; r += 8)
        for (c = 0; c < cols; c += 8) {
            __m256 a[8], b[8];
            if (c + 8 > cols) {
                for (i = r; i < r + 8; i++) {
                    int j;
                    for (j = c; j < cols; j++) out[j * ld_out + i] = x[i * ld + j];
                }
                continue;
            }
            SNIPI_UNROLL
            for (i = 0; i < 4; i++) {  // halves: rows i and i + 4 side by side
                const float *p = x + (r + i) * ld + c, *p4 = p + 4 * ld;
                a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p4), 1);
                a[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4)), _mm_loadu_ps(p4 + 4), 1);
            }
            SNIPI_UNROLL
            for (i = 0; i < 8; i += 4) {  // 4 x 4 in each half
                b[0] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
                b[2] = _mm256_unpacklo_ps(a[i + 2], a[i + 3]);
                b[3] = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
                _mm256_storeu_ps(out + (c + i) * ld_out + r, _mm256_shuffle_ps(b[0], b[2], 0x44));
                _mm256_storeu_ps(out + (c + i + 1) * ld_out + r, _mm256_shuffle_ps(b[0], b[2], 0xEE));
                _mm256_storeu_ps(out + (c + i + 2) * ld_out + r, _mm256_shuffle_ps(b[1], b[3], 0x44));
                _mm256_storeu_ps(out + (c + i + 3) * ld_out + r, _mm256_shuffle_ps(b[1], b[3], 0xEE));
            }
        }
    for (; r + 4 <= rows; r += 4) {
        for (c = 0; c + 4 <= cols; c += 4) {
            __m128 a = _mm_loadu_ps(x + r * ld + c), b = _mm_loadu_ps(x + (r + 1) * ld + c),
                   d = _mm_loadu_ps(x + (r + 2) * ld + c), e = _mm_loadu_ps(x + (r + 3) * ld + c);
            _MM_TRANSPOSE4_PS(a, b, d, e);
            _mm_storeu_ps(out + c * ld_out + r, a);
            _mm_storeu_ps(out + (c + 1) * ld_out + r, b);
            _mm_storeu_ps(out + (c + 2) * ld_out + r, d);
            _mm_storeu_ps(out + (c + 3) * ld_out + r, e);
        }
        snipi_transpose_scalar(x + r * ld + c, ld, 4, cols - c, out + c * ld_out + r, ld_out);
    }
    snipi_transpose_scalar(x + r * ld, ld, rows - r, cols, out + r, ld_out);
}

SNIPI_TARGET_AVX2 static void snipi_widen_avx2(const uint16_t *x, int n, float *out) {
    int i;
    for (i = 0; i + 8 <= n; i += 8)  // out[i] = bits x[i] << 16
        _mm256_storeu_si256(
            (__m256i *)(void *)(out + i),
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(x + i))), 16));
    snipi_widen_scalar(x + i, n - i, out + i);
}

SNIPI_TARGET_AVX2 static void snipi_narrow_avx2(const float *x, int n, uint16_t *out) {
    const __m256i half = _mm256_set1_epi32(0x7FFF), one = _mm256_set1_epi32(1),
                  magnitude = _mm256_set1_epi32(0x7FFFFFFF), infinity = _mm256_set1_epi32(0x7F800000);
    int i;
    for (i = 0; i + 8 <= n; i += 8) {  // as snipi_bf16_round
        __m256i u = _mm256_loadu_si256((const __m256i *)(const void *)(x + i)), high = _mm256_srli_epi32(u, 16);
        __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, half), _mm256_and_si256(high, one)),
                                            16);
        __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(u, magnitude), infinity), w;
        w = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
        w = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0xD8);
        _mm_storeu_si128((__m128i *)(void *)(out + i), _mm256_castsi256_si128(w));
    }
    snipi_narrow_scalar(x + i, n - i, out + i);
}

SNIPI_TARGET_AVX2 static void snipi_decode_avx2(snip_format format, const float *lut, const uint8_t *codes, int n,
                                                float scale, float *out, int stream) {
    const snipi_element e = snipi_element_of(format);
    const __m256i magnitude = _mm256_set1_epi32((1 << e.sign) - 1), base = _mm256_set1_epi32((127 - e.bias) << 23),
                  largest = _mm256_set1_epi32((int)e.largest);
    const __m256i last_tiny = _mm256_set1_epi32((1 << e.mantissa) - 1), sign = _mm256_set1_epi32((int)0x80000000u);
    const __m128i shift = _mm_cvtsi32_si128(23 - e.mantissa), sign_shift = _mm_cvtsi32_si128(31 - e.sign);
    const __m256 step = _mm256_set1_ps(lut[1]), s = _mm256_set1_ps(scale);
    int i = 0, packed = format == SNIP_E2M1;
    if (snipi_bits(scale) >= (127u - 100u) << 23)
        for (; i + 8 <= n; i += 8) {
            __m256i c, m;
            __m256 tiny, normal;
            __m128i bytes;
            if (packed) {
                int32_t four;
                memcpy(&four, codes + i / 2, 4);
                bytes = _mm_cvtsi32_si128(four);
                bytes = _mm_and_si128(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi8(15));
            } else
                bytes = _mm_loadl_epi64((const __m128i *)(const void *)(codes + i));
            c = _mm256_cvtepu8_epi32(bytes);
            m = _mm256_and_si256(c, magnitude);
            if (_mm256_movemask_epi8(_mm256_cmpgt_epi32(m, largest))) {  // NaN or infinity among them
                snipi_decode_scalar(format, lut, codes + i, 8, scale, out + i, 0);
                continue;
            }
            tiny = _mm256_mul_ps(_mm256_cvtepi32_ps(m), step);  // m * smallest, or its fields moved into a float's
            normal = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_sll_epi32(m, shift), base));
            tiny = _mm256_blendv_ps(tiny, normal, _mm256_castsi256_ps(_mm256_cmpgt_epi32(m, last_tiny)));
            tiny = _mm256_or_ps(tiny, _mm256_castsi256_ps(_mm256_and_si256(_mm256_sll_epi32(c, sign_shift), sign)));
            tiny = _mm256_mul_ps(s, tiny);
            if (stream && ((uintptr_t)out & 31) == 0)
                _mm256_stream_ps(out + i, tiny);
            else
                _mm256_storeu_ps(out + i, tiny);
        }
    snipi_decode_scalar(format, lut, codes + (packed ? i / 2 : i), n - i, scale, out + i, 0);
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
    snipi_decode_avx2(format, lut, codes + (packed ? i / 2 : i), n - i, scale, out + i, 0);
}

// Products of floats are exact in double, so that fused ones are the same.
SNIPI_TARGET_AVX2 static void snipi_sums_avx2(const float *x, const float *values, const float *weight, int n,
                                              snipi_tally *t) {
    __m256d sum_sq[2], err_sq[2], dot[2];
    int i, g;
    for (g = 0; g < 2; g++) {
        sum_sq[g] = _mm256_loadu_pd(t->sum_sq + 4 * g);
        err_sq[g] = _mm256_loadu_pd(t->err_sq + 4 * g);
        dot[g] = _mm256_loadu_pd(t->dot + 4 * g);
    }
    for (i = 0; i + 8 <= n; i += 8) SNIPI_UNROLL
    for (g = 0; g < 2; g++) {
        const __m128 a = _mm_loadu_ps(x + i + 4 * g), b = _mm_loadu_ps(values + i + 4 * g);
        const __m256d v = _mm256_cvtps_pd(a), d = _mm256_cvtps_pd(_mm_sub_ps(b, a));
        sum_sq[g] = _mm256_fmadd_pd(v, v, sum_sq[g]);
        err_sq[g] = _mm256_fmadd_pd(d, d, err_sq[g]);
        if (weight) dot[g] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(weight + i + 4 * g)), d, dot[g]);
    }
    for (g = 0; g < 2; g++) {
        _mm256_storeu_pd(t->sum_sq + 4 * g, sum_sq[g]);
        _mm256_storeu_pd(t->err_sq + 4 * g, err_sq[g]);
        _mm256_storeu_pd(t->dot + 4 * g, dot[g]);
    }
    snipi_sums_exact(x + i, values + i, weight ? weight + i : NULL, n - i, t);
}

// a m / (sqrt(b v) + eps) where v > 0
SNIPI_TARGET_AVX2 static void snipi_adam_avx2(const float *m, const float *v, float a, float b, float eps, int64_t n,
                                              float *out) {
    int64_t i;
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(v + i),
               top = m ? _mm256_mul_ps(_mm256_loadu_ps(m + i), _mm256_set1_ps(a)) : _mm256_set1_ps(a);
        __m256 u = _mm256_div_ps(
            top, _mm256_add_ps(_mm256_sqrt_ps(_mm256_mul_ps(x, _mm256_set1_ps(b))), _mm256_set1_ps(eps)));
        _mm256_storeu_ps(out + i, _mm256_and_ps(u, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ)));
    }
    snipi_adam_scalar(m ? m + i : NULL, v + i, a, b, eps, n - i, out + i);
}

SNIPI_TARGET_AVX512 static void snipi_adam_avx512(const float *m, const float *v, float a, float b, float eps,
                                                  int64_t n, float *out) {
    int64_t i;
    for (i = 0; i + 16 <= n; i += 16) {
        __m512 x = _mm512_loadu_ps(v + i),
               top = m ? _mm512_mul_ps(_mm512_loadu_ps(m + i), _mm512_set1_ps(a)) : _mm512_set1_ps(a);
        __m512 bottom = _mm512_add_ps(_mm512_sqrt_ps(_mm512_mul_ps(x, _mm512_set1_ps(b))), _mm512_set1_ps(eps));
        _mm512_storeu_ps(out + i,
                         _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), top, bottom));
    }
    snipi_adam_scalar(m ? m + i : NULL, v + i, a, b, eps, n - i, out + i);
}

SNIPI_TARGET_AVX2 static void snipi_flip_avx2(const uint32_t signs[4], float x[SNIPI_SIGNS]) {
    const __m256i top = _mm256_set1_epi32((int)0x80000000u), lane = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    int j;
    for (j = 0; j < SNIPI_SIGNS; j += 8) {  // x[j] with bit j in its sign place flipped
        __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32((int)(signs[j >> 5] >> (j & 31))), lane);
        _mm256_storeu_ps(x + j,
                         _mm256_xor_ps(_mm256_loadu_ps(x + j), _mm256_castsi256_ps(_mm256_and_si256(bits, top))));
    }
}

SNIPI_TARGET_AVX512 static void snipi_flip_avx512(const uint32_t signs[4], float x[SNIPI_SIGNS]) {
    const __m512i top = _mm512_set1_epi32((int)0x80000000u);
    int j;
    for (j = 0; j < SNIPI_SIGNS; j += 16) {
        __m512i v = _mm512_loadu_si512(x + j);
        _mm512_storeu_si512(x + j, _mm512_mask_xor_epi32(v, (__mmask16)(signs[j >> 5] >> (j & 31)), v, top));
    }
}
#endif  // SNIPI_X86
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic pop
#endif
#ifdef SNIPI_NEON
// Vectors of 4 floats, 16 elements a turn, so that element i stays in lane i % 16. Right shifts by a variable are left
// shifts by its negative. Tiles divide SNIPI_MAX_MR and SNIPI_MAX_NR. Intrinsics are plain arithmetic to the compiler:
// SNIPI_KEPT also holds sums in their order under -Ofast.
#    define SNIPI_KEPT(v) __asm__("" : "+w"(v))
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

static uint32_t snipi_amax_neon(const float *x, int n, int64_t *nonfinite) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7FFFFFFF);
    uint32x4_t most[4];
    uint32_t a, rest;
    int64_t bad = 0;
    int i, g;
    SNIPI_UNROLL
    for (g = 0; g < 4; g++) most[g] = vdupq_n_u32(0);
    for (i = 0; i + 16 <= n; i += 16)  // most = max(most, |x|) of bits
        SNIPI_UNROLL
    for (g = 0; g < 4; g++)
        most[g] = vmaxq_u32(most[g], vandq_u32(magnitude, vreinterpretq_u32_f32(vld1q_f32(x + i + 4 * g))));
    a = vmaxvq_u32(vmaxq_u32(vmaxq_u32(most[0], most[1]), vmaxq_u32(most[2], most[3])));
    rest = snipi_amax_scalar(x + i, n - i, &bad);
    if (a >= 0x7F800000u || bad) return snipi_amax_scalar(x, n, nonfinite);
    return rest > a ? rest : a;
}

static void snipi_philox_neon(snip_rng_key key, uint64_t first, int blocks, uint32_t *out) {
    static const uint32_t order[4] = { 0, 1, 2, 3 };
    const uint32x4_t m0 = vdupq_n_u32(0xD2511F53u), m1 = vdupq_n_u32(0xCD9E8D57u);
    int b, g, round;
    if ((uint32_t)first > 0xFFFFFFFFu - (uint32_t)blocks - 16u) {
        snipi_philox_scalar(key, first, blocks, out);
        return;
    }
    for (b = 0; b < blocks; b += 8) {  // two vectors in turn: the products' latency is long
        uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
        uint32x4x4_t c[2];
        SNIPI_UNROLL
        for (g = 0; g < 2; g++) {
            c[g].val[0] = vaddq_u32(vdupq_n_u32((uint32_t)first + (uint32_t)(b + 4 * g)), vld1q_u32(order));
            c[g].val[1] = vdupq_n_u32((uint32_t)(first >> 32));
            c[g].val[2] = vdupq_n_u32(key.step);
            c[g].val[3] = vdupq_n_u32(key.tensor);
        }
        for (round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) SNIPI_UNROLL
        for (g = 0; g < 2; g++) {  // as snip_philox: even words are low halves, odd ones high
            uint32x4_t low0 = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(c[g].val[0]), vget_low_u32(m0))),
                       high0 = vreinterpretq_u32_u64(vmull_high_u32(c[g].val[0], m0));
            uint32x4_t low1 = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(c[g].val[2]), vget_low_u32(m1))),
                       high1 = vreinterpretq_u32_u64(vmull_high_u32(c[g].val[2], m1));
            c[g].val[0] = veorq_u32(veorq_u32(vuzp2q_u32(low1, high1), c[g].val[1]), vdupq_n_u32(k0));
            c[g].val[2] = veorq_u32(veorq_u32(vuzp2q_u32(low0, high0), c[g].val[3]), vdupq_n_u32(k1));
            c[g].val[1] = vuzp1q_u32(low1, high1);
            c[g].val[3] = vuzp1q_u32(low0, high0);
        }
        SNIPI_UNROLL
        for (g = 0; g < 2; g++, out += 16) vst4q_u32(out, c[g]);
    }
}

// As snipi_run_avx2.
static void snipi_run_neon(const snipi_run *q) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7FFFFFFF), exponents = vdupq_n_u32(0x7F800000),
                     least = vdupq_n_u32((uint32_t)q->k.least);
    const uint32x4_t cap = vdupq_n_u32((uint32_t)q->k.cap), beyond = vdupq_n_u32((uint32_t)q->k.beyond),
                     largest = vdupq_n_u32(q->e.largest);
    const uint32x4_t magic = vdupq_n_u32((uint32_t)q->k.magic), unit = vdupq_n_u32((uint32_t)q->k.unit),
                     fixed_top = vdupq_n_u32(277u << 23);
    const int32x4_t shift = vdupq_n_s32(-q->k.shift), sign_shift = vdupq_n_s32(-q->k.sign_shift),
                    random_shift = vdupq_n_s32(-q->k.random_shift);
    const uint32x4_t low = vdupq_n_u32((uint32_t)q->k.sign - 1u);
    const float32x4_t max = vdupq_n_f32(q->e.max);
    snipi_tally *t = q->tally;
    uint32x4_t over = vdupq_n_u32(0);
    float32x4_t sum_sq[4], err_sq[4];
    float64x2_t dot[4];
    int i, g;
    SNIPI_UNROLL
    for (g = 0; g < 4; g++) {
        sum_sq[g] = err_sq[g] = vdupq_n_f32(0.0f);
        dot[g] = vdupq_n_f64(0.0);
    }
    for (i = 0; i < q->n; i += 16) {
        const int whole = q->n - i >= 16, rest = whole ? 16 : q->n - i;
        const float *x = q->x + i, *weight = q->weight ? q->weight + i : NULL;
        const uint32_t *random = q->random ? q->random + i : NULL;
        float *values = q->values ? q->values + i : NULL, last_x[16], last_weight[16], last_values[16];
        uint32_t last_random[16];
        uint32x4_t code[4];
        if (!whole) {  // the last elements, padded with zeros
            memset(last_x, 0, sizeof last_x);
            memcpy(last_x, x, (size_t)rest * sizeof(float));
            x = last_x;
            if (random) {
                memset(last_random, 0, sizeof last_random);
                memcpy(last_random, random, (size_t)rest * sizeof(uint32_t));
                random = last_random;
            }
            if (weight) {
                memset(last_weight, 0, sizeof last_weight);
                memcpy(last_weight, weight, (size_t)rest * sizeof(float));
                weight = last_weight;
            }
            if (values) values = last_values;
        }
        SNIPI_UNROLL
        for (g = 0; g < 4; g++) {
            uint32x4_t u = vreinterpretq_u32_f32(vmulq_n_f32(vld1q_f32(x + 4 * g), q->inverse)),
                       a = vandq_u32(u, magnitude), k;
            uint32x4_t capped = vminq_u32(a, cap), e = vmaxq_u32(vandq_u32(capped, exponents), least),
                       sign = vbicq_u32(u, magnitude);
            float32x4_t y = vreinterpretq_f32_u32(a), value;
            if (!random) {
                float32x4_t power = vreinterpretq_f32_u32(vaddq_u32(vaddq_u32(e, magic), vshlq_u32(e, shift)));
                float32x4_t sum = vaddq_f32(vreinterpretq_f32_u32(capped), power);
                SNIPI_KEPT(sum);
                k = vandq_u32(vreinterpretq_u32_f32(sum), low);
                value = vsubq_f32(sum, power);
                over = vsubq_u32(over, vcgtq_u32(a, beyond));
            } else {  // k = (|y| * 2^(23 - e) + random) >> shift
                uint32x4_t r = vshlq_u32(vld1q_u32(random + 4 * g), random_shift);
                float32x4_t fixed = vmulq_f32(vreinterpretq_f32_u32(capped),
                                              vreinterpretq_f32_u32(vsubq_u32(fixed_top, e)));
                k = vshlq_u32(vaddq_u32(vcvtq_u32_f32(fixed), r), shift);
                value = vminq_f32(max, vmulq_f32(vcvtq_f32_u32(k), vreinterpretq_f32_u32(vsubq_u32(e, unit))));
                k = vaddq_u32(k, vshlq_u32(vsubq_u32(e, least), shift));
                over = vsubq_u32(over, vcgtq_u32(k, largest));
                k = vminq_u32(k, largest);
            }
            SNIPI_KEPT(value);
            code[g] = vorrq_u32(k, vshlq_u32(sign, sign_shift));
            if (q->want_sums) {  // of |y|: the signs of y and value are the same
                float32x4_t d = vsubq_f32(value, y), v2 = vmulq_f32(y, y), d2 = vmulq_f32(d, d);
                SNIPI_KEPT(v2);
                SNIPI_KEPT(d2);
                sum_sq[g] = vaddq_f32(sum_sq[g], v2);
                err_sq[g] = vaddq_f32(err_sq[g], d2);
                SNIPI_KEPT(sum_sq[g]);
                SNIPI_KEPT(err_sq[g]);
                if (weight) {  // lane i % 8
                    const int pair = 2 * (g & 1);
                    float32x4_t w = vld1q_f32(weight + 4 * g);
                    d = vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(d), sign));
                    dot[pair] = vfmaq_f64(dot[pair], vcvt_f64_f32(vget_low_f32(w)), vcvt_f64_f32(vget_low_f32(d)));
                    dot[pair + 1] = vfmaq_f64(dot[pair + 1], vcvt_high_f64_f32(w), vcvt_high_f64_f32(d));
                }
            }
            if (values)
                vst1q_f32(values + 4 * g,
                          vmulq_n_f32(vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(value), sign)), q->scale));
        }
        if (!whole && values) memcpy(q->values + i, last_values, (size_t)rest * sizeof(float));
        if (q->codes) {
            uint16x8_t words0 = vcombine_u16(vmovn_u32(code[0]), vmovn_u32(code[1])),
                       words1 = vcombine_u16(vmovn_u32(code[2]), vmovn_u32(code[3]));
            uint8x16_t bytes = vcombine_u8(vmovn_u16(words0), vmovn_u16(words1));
            uint8_t *codes = q->codes + (q->packed ? i / 2 : i), last[16];
            if (q->packed) {  // low + 16 * high
                uint16x8_t pairs = vreinterpretq_u16_u8(bytes);
                uint8x8_t packed = vorr_u8(vmovn_u16(pairs), vshrn_n_u16(pairs, 4));
                bytes = vcombine_u8(packed, packed);
            }
            if (!whole) {
                vst1q_u8(last, bytes);
                memcpy(codes, last, (size_t)(q->packed ? (rest + 1) / 2 : rest));
            } else if (q->packed)
                vst1_u8(codes, vget_low_u8(bytes));
            else
                vst1q_u8(codes, bytes);
        }
    }
    t->saturated += vaddvq_u32(over);
    if (!q->want_sums) return;
    SNIPI_UNROLL
    for (g = 0; g < 4; g++) {  // tally += (lane + lane 8 further) * scale^2
        const double s = (double)q->scale;
        const int h = g / 2, upper = g & 1;
        float64x2_t v = upper ? vaddq_f64(vcvt_high_f64_f32(sum_sq[h]), vcvt_high_f64_f32(sum_sq[h + 2]))
                              : vaddq_f64(vcvt_f64_f32(vget_low_f32(sum_sq[h])),
                                          vcvt_f64_f32(vget_low_f32(sum_sq[h + 2])));
        float64x2_t d = upper ? vaddq_f64(vcvt_high_f64_f32(err_sq[h]), vcvt_high_f64_f32(err_sq[h + 2]))
                              : vaddq_f64(vcvt_f64_f32(vget_low_f32(err_sq[h])),
                                          vcvt_f64_f32(vget_low_f32(err_sq[h + 2])));
        float64x2_t w = vmulq_n_f64(dot[g], s);
        v = vmulq_n_f64(v, s * s);
        d = vmulq_n_f64(d, s * s);
        SNIPI_KEPT(v);
        SNIPI_KEPT(d);
        SNIPI_KEPT(w);
        vst1q_f64(t->sum_sq + 2 * g, vaddq_f64(vld1q_f64(t->sum_sq + 2 * g), v));
        vst1q_f64(t->err_sq + 2 * g, vaddq_f64(vld1q_f64(t->err_sq + 2 * g), d));
        vst1q_f64(t->dot + 2 * g, vaddq_f64(vld1q_f64(t->dot + 2 * g), w));
    }
}

static void snipi_transpose_neon(const float *x, int64_t ld, int rows, int cols, float *out, int64_t ld_out) {
    int r, c, i;
    for (r = 0; r + 4 <= rows; r += 4) {
        for (c = 0; c + 4 <= cols; c += 4) {  // rows 0 and 2, 1 and 3 interleaved, then those
            const float *p = x + r * ld + c;
            float *to = out + c * ld_out + r;
            float32x4_t a0 = vld1q_f32(p), a1 = vld1q_f32(p + ld), a2 = vld1q_f32(p + 2 * ld),
                        a3 = vld1q_f32(p + 3 * ld);
            float32x4_t b0 = vzip1q_f32(a0, a2), b1 = vzip1q_f32(a1, a3), b2 = vzip2q_f32(a0, a2),
                        b3 = vzip2q_f32(a1, a3);
            vst1q_f32(to, vzip1q_f32(b0, b1));
            vst1q_f32(to + ld_out, vzip2q_f32(b0, b1));
            vst1q_f32(to + 2 * ld_out, vzip1q_f32(b2, b3));
            vst1q_f32(to + 3 * ld_out, vzip2q_f32(b2, b3));
        }
        for (; c < cols; c++)
            for (i = r; i < r + 4; i++) out[c * ld_out + i] = x[i * ld + c];
    }
    snipi_transpose_scalar(x + r * ld, ld, rows - r, cols, out + r, ld_out);
}

static void snipi_widen_neon(const uint16_t *x, int n, float *out) {
    int i;
    for (i = 0; i + 4 <= n; i += 4)
        vst1q_f32(out + i,
                  vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(x + i)), 16)));  // out[i] = bits x[i] << 16
    snipi_widen_scalar(x + i, n - i, out + i);
}

static void snipi_narrow_neon(const float *x, int n, uint16_t *out) {
    int i;
    for (i = 0; i + 4 <= n; i += 4) {  // as snipi_bf16_round
        uint32x4_t u = vreinterpretq_u32_f32(vld1q_f32(x + i)), high = vshrq_n_u32(u, 16);
        uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7FFF)), vandq_u32(high, vdupq_n_u32(1))),
                                         16);
        uint32x4_t nan = vcgtq_u32(vandq_u32(u, vdupq_n_u32(0x7FFFFFFF)), vdupq_n_u32(0x7F800000));
        vst1_u16(out + i, vmovn_u32(vbslq_u32(nan, vorrq_u32(high, vdupq_n_u32(0x40)), rounded)));
    }
    snipi_narrow_scalar(x + i, n - i, out + i);
}

static void snipi_decode_neon(snip_format format, const float *lut, const uint8_t *codes, int n, float scale,
                              float *out, int stream) {
    const snipi_element e = snipi_element_of(format);
    const uint32x4_t magnitude = vdupq_n_u32((1u << e.sign) - 1u), base = vdupq_n_u32((uint32_t)(127 - e.bias) << 23);
    const uint32x4_t last_tiny = vdupq_n_u32((1u << e.mantissa) - 1u), top = vdupq_n_u32(0x80000000u);
    const int32x4_t shift = vdupq_n_s32(23 - e.mantissa), sign_shift = vdupq_n_s32(31 - e.sign);
    int i = 0, g, packed = format == SNIP_E2M1;
    (void)stream;
    if (snipi_bits(scale) >= (127u - 100u) << 23)
        for (; i + 8 <= n; i += 8) {
            uint8x8_t bytes;
            if (packed) {
                uint32_t four;
                memcpy(&four, codes + i / 2, 4);
                bytes = vcreate_u8(four);
                bytes = vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
            } else
                bytes = vld1_u8(codes + i);
            if (vmaxv_u8(vand_u8(bytes, vdup_n_u8((uint8_t)((1 << e.sign) - 1)))) >
                e.largest) {  // NaN or infinity among them
                snipi_decode_scalar(format, lut, codes + i, 8, scale, out + i, 0);
                continue;
            }
            SNIPI_UNROLL
            for (g = 0; g < 2; g++) {  // m * smallest, or its fields moved into a float's
                uint16x8_t wide = vmovl_u8(bytes);
                uint32x4_t c = vmovl_u16(g ? vget_high_u16(wide) : vget_low_u16(wide)), m = vandq_u32(c, magnitude);
                uint32x4_t tiny = vreinterpretq_u32_f32(vmulq_n_f32(vcvtq_f32_u32(m), lut[1])),
                           normal = vaddq_u32(vshlq_u32(m, shift), base);
                uint32x4_t v = vorrq_u32(vbslq_u32(vcgtq_u32(m, last_tiny), normal, tiny),
                                         vandq_u32(vshlq_u32(c, sign_shift), top));
                vst1q_f32(out + i + 4 * g, vmulq_n_f32(vreinterpretq_f32_u32(v), scale));
            }
        }
    snipi_decode_scalar(format, lut, codes + (packed ? i / 2 : i), n - i, scale, out + i, 0);
}

static void snipi_flip_neon(const uint32_t signs[4], float x[SNIPI_SIGNS]) {
    static const int32_t lane[4] = { 31, 30, 29, 28 };
    int j;
    for (j = 0; j < SNIPI_SIGNS; j += 4) {  // x[j] with bit j in its sign place flipped
        uint32x4_t bits = vandq_u32(vshlq_u32(vdupq_n_u32(signs[j >> 5] >> (j & 31)), vld1q_s32(lane)),
                                    vdupq_n_u32(0x80000000u));
        vst1q_f32(x + j, vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(vld1q_f32(x + j)), bits)));
    }
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

static const snipi_vector *snipi_vector_of(snip_isa isa) {
    static const snipi_vector scalar = { snipi_amax_scalar,
                                         snipi_philox_scalar,
                                         snipi_run_scalar,
                                         snipi_transpose_scalar,
                                         snipi_widen_scalar,
                                         snipi_narrow_scalar,
                                         snipi_decode_scalar,
                                         snipi_sums_exact,
                                         NULL,
                                         NULL,
                                         NULL,
                                         NULL,
                                         NULL };
#ifdef SNIPI_X86
    static const snipi_vector avx2 = { snipi_amax_avx2,
                                       snipi_philox_avx2,
                                       snipi_run_avx2,
                                       snipi_transpose_avx2,
                                       snipi_widen_avx2,
                                       snipi_narrow_avx2,
                                       snipi_decode_avx2,
                                       snipi_sums_avx2,
                                       NULL,
                                       NULL,
                                       NULL,
                                       NULL,
                                       NULL };
    static const snipi_vector avx512 = { snipi_amax_avx512,    snipi_philox_avx512, snipi_run_avx2,
                                         snipi_transpose_avx2, snipi_widen_avx2,    snipi_narrow_avx2,
                                         snipi_decode_avx512,  snipi_sums_avx2,     snipi_peaks_avx512,
                                         snipi_scales_avx512,  snipi_strip_avx512,  snipi_copy_avx512,
                                         snipi_columns_avx512 };
    if (isa == SNIP_ISA_BEST) isa = snipi_best_isa();
    if (isa >= SNIP_ISA_AVX512) return &avx512;
    if (isa >= SNIP_ISA_AVX2) return &avx2;
#elif defined(SNIPI_NEON)
    static const snipi_vector neon = { snipi_amax_neon,
                                       snipi_philox_neon,
                                       snipi_run_neon,
                                       snipi_transpose_neon,
                                       snipi_widen_neon,
                                       snipi_narrow_neon,
                                       snipi_decode_neon,
                                       snipi_sums_exact,
                                       NULL,
                                       NULL,
                                       NULL,
                                       NULL,
                                       NULL };
    if (isa != SNIP_ISA_SCALAR) return &neon;
#else
    (void)isa;
#endif
    return &scalar;
}

static snipi_adam snipi_adam_of(snip_isa isa) {
#ifdef SNIPI_X86
    if (isa == SNIP_ISA_BEST) isa = snipi_best_isa();
    if (isa >= SNIP_ISA_AVX512) return snipi_adam_avx512;
    if (isa >= SNIP_ISA_AVX2) return snipi_adam_avx2;
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
