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
//         snip_end_step(s, &(snip_adamw){ lr, beta1, beta2, eps, step, clip });
//     }
//
// WHAT STAYS YOURS
//   The optimizer, master weights, data, attention, norms, communication between ranks. The same
//   batch must be used for every pass of a step, and the weights must not move between the passes.
//
// ERRORS
//   Functions that can fail return snip_status, in every build. A refused argument leaves the outputs
//   untouched. NaN and infinity in a tensor are counted and reported as SNIP_NONFINITE, after the work
//   has been done; nothing is flattened in silence.
//
// DETERMINISM
//   Codes, scales and stochastic rounding depend on the input and the key alone: not on threads,
//   tiling or instruction set, nor on -Ofast. GEMMs are deterministic for any number of threads;
//   between instruction sets FP4 GEMMs are equal bit for bit (exact integer sums, one fused
//   multiply-add per scale block), the others within rounding.
//
// CONFIGURATION (define before the implementation)
//   SNIP_STATIC            all functions static to the including file
//   SNIP_MALLOC(size), SNIP_FREE(ptr)   defaults of snip_desc.alloc; define both
//   SNIP_NO_SIMD           the scalar specification only
//
// INDEX (search for the tag)
//   API:             >>status >>format >>codec >>quantize >>noise >>gemm >>session
//   Implementation:  >>codec-impl >>random-impl >>quantize-impl >>gemm-impl >>simd >>session-impl
#ifndef SNIP_H
#define SNIP_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef SNIP_STATIC
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
    X(SNIP_MISMATCH,      "the data belongs to a different model or session")
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
    SNIP_SCALE_UE4M3    // NVFP4: one E4M3 byte per tile times one float32 per tensor
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

// "f32", "bf16", "fp8" (E4M3), "fp4" (E2M1), "e5m2", ...; "?" for anything else.
SNIP_API const char *snip_format_name(snip_format);
SNIP_API float       snip_format_max(snip_format);      // largest finite value; 0 for F32 and BF16
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
SNIP_API uint8_t  snip_ue4m3_from_f32(float);  SNIP_API float snip_ue4m3_to_f32(uint8_t);  // negative becomes 0
SNIP_API uint16_t snip_bf16_from_f32(float);   SNIP_API float snip_bf16_to_f32(uint16_t);  // keeps NaN and infinity

// >>quantize ---------------------------------------------------------------------------------------
// Matrices are row-major; ld counts elements from row to row. A tile is tile_rows x tile_cols, short
// at the right and lower edges. Codes: [rows][cols] without padding; for E2M1 a row takes (cols+1)/2
// bytes. Scales: [ceil(rows/tile_rows)][ceil(cols/tile_cols)], dequantizing (x ~ scale * code): float
// for F32 and POW2, a byte for UE8M0 and UE4M3; UE4M3 is followed, at the next multiple of 4 bytes, by
// the tensor's float scale. amax is over finite elements; a tile of zeros has scale 1 (POW2, F32); no
// scale is smaller than 2^-126. The code of x is that of x * (largest/amax), each rounded to float32.
//
// Random numbers: (seed, step, tensor) and the element's index r * cols + c in the quantized matrix.
typedef struct { uint64_t seed; uint32_t step, tensor; } snip_rng_key;
typedef struct {
    double sum_sq, err_sq, dot;         // |x|^2, |Q(x) - x|^2, <weight, Q(x) - x>, over finite elements
    float amax;                         // of finite elements
    int64_t nonfinite, saturated;       // NaN and infinity; elements that rounding alone puts beyond the largest
} snip_quant_stats;

// Bytes for codes and scales; 0 for arguments that snip_quantize would refuse.
SNIP_API size_t snip_codes_bound (const snip_recipe *, int64_t rows, int64_t cols);
SNIP_API size_t snip_scales_bound(const snip_recipe *, int64_t rows, int64_t cols);
// x: [rows][cols]; weight: same shape and ld as x, or NULL; stats or NULL (overwritten).
// scales may be NULL where snip_scales_bound is 0.
SNIP_API snip_status snip_quantize(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, snip_rng_key, const float *weight, snip_quant_stats *);
// The same bytes as snip_quantize of the transposed matrix: codes and scales of a [cols][rows] matrix.
SNIP_API snip_status snip_quantize_transposed(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   void *codes, void *scales, snip_rng_key, const float *weight, snip_quant_stats *);
SNIP_API snip_status snip_dequantize(const snip_recipe *, const void *codes, const void *scales, int64_t rows, int64_t cols,
                                   float *x, int64_t ld);
// Quantize and dequantize at once. out may be x, or NULL for statistics alone.
SNIP_API snip_status snip_fake_quantize(const snip_recipe *, const float *x, int64_t rows, int64_t cols, int64_t ld,
                                   float *out, int64_t ld_out, snip_rng_key, const float *weight, snip_quant_stats *);

// >>noise ------------------------------------------------------------------------------------------
// White noise of unit variance: +1 or -1 (Rademacher), element i's sign from (key, i) alone.
// Philox4x32-10 (Salmon et al., SC 2011): four words for counter (index, step, tensor), key seed.
SNIP_API void snip_philox(snip_rng_key, uint64_t index, uint32_t out[4]);
// out[i] = x[i] + scale * noise[i] * (shape ? shape[i] : 1). out may be x.
SNIP_API snip_status snip_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape, snip_rng_key);
// *dot = sum noise[i] * x[i]
SNIP_API snip_status snip_noise_dot(const float *x, int64_t n, snip_rng_key, double *dot);

// >>gemm -------------------------------------------------------------------------------------------
// C[m][n] (+)= A[m][k] * B[n][k]^T + bias[n], operands quantized along k (k contiguous).
// E2M1 * E2M1 whose scale tiles along k nest: exact integer sums inside a scale block, then
// c = fmaf(sa * sb, sum, c) block after block. Everything else: float32 sums of the dequantized
// operands. F32 and BF16 operands may be stored transposed, [k][rows].
typedef enum { SNIP_ISA_BEST, SNIP_ISA_SCALAR, SNIP_ISA_AVX2, SNIP_ISA_AVX512, SNIP_ISA_AVX512_VNNI, SNIP_ISA_COUNT } snip_isa;
SNIP_API int         snip_isa_available(snip_isa);      // on this machine and in this build
SNIP_API const char *snip_isa_name(snip_isa);
typedef struct {
    const snip_recipe *recipe;
    const void *codes, *scales;
    int64_t ld;             // F32 and BF16: elements from row to row; 0: contiguous. Other formats: 0
    int transposed;         // F32 and BF16 only: stored [k][rows]
} snip_operand;
SNIP_API size_t snip_gemm_scratch(int64_t m, int64_t n, int64_t k);    // bytes; 64-byte aligned is fastest
SNIP_API snip_status snip_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                               float *c, int64_t ldc, int accumulate, const float *bias, void *scratch, snip_isa);

// >>session ----------------------------------------------------------------------------------------
// Linear layer: Y = X W^T + bias, X [rows][in], W [out][in], Y [rows][out].
//   fwd Y = X W^T    dgrad dX = dY W    wgrad dW = dY^T X
// One call chain at a time on a session; different sessions are independent.
typedef struct snip snip;
typedef enum { SNIP_FWD, SNIP_DGRAD, SNIP_WGRAD, SNIP_GEMMS } snip_gemm_kind;
typedef struct { snip_recipe activation, weight, gradient; } snip_recipes;     // of the GEMMs in one precision
typedef struct { void *(*alloc_fn)(size_t, void *user); void (*free_fn)(void *, void *user); void *user; } snip_alloc;

typedef struct {                // zero means the default
    double budget;              // least share of the linear layers' FLOPs in FP4, per pipeline stage, in [0, 1]
    int every;                  // steps from measurement to measurement; 0: 500; negative: never
    uint64_t seed;
    int n_stages;               // pipeline stages; 0: 1
    int per_layer;              // 1: one precision for a layer's three GEMMs, as in the paper
    snip_format high;           // precision until the first plan: SNIP_BF16 (default) or SNIP_F32
    snip_format measure;        // precision of the measuring passes: SNIP_F32 (default) or SNIP_BF16
    double loss_weight;         // of the loss divergence in the cost; 0: 1; negative: off
    double update_weight;       // of the weight divergence; 0: 1; negative: off (saves its probe pass)
    double horizon;             // steps over which rounding noise of the backward GEMMs averages out; 0: 100
    double sample;              // share of the output rows on which GEMM errors are measured; 0: 0.25
    snip_recipes fp8, fp4;      // zero format: FP8_TILE, FP8_BLOCK, FP8_TILE; FP4_TILE, FP4_BLOCK, FP4_TILE_SR
    snip_isa isa;
    snip_alloc alloc;
} snip_desc;

typedef struct {                // of the step just taken: update = lr * mhat / (sqrt(vhat) + eps)
    double lr, beta1, beta2, eps;
    int64_t step;               // 1 for the first
    double grad_scale;          // factor on the gradients before the optimizer (clipping); 0: 1
} snip_adamw;

typedef struct {                // what one precision would do to one layer (>>session-impl has the formulas)
    double loss_first, loss_second;         // of the last measurement: first-order and curvature part of the loss change
    double update[SNIP_GEMMS];              // relative squared error of the model's next update, by GEMM
    double cost[SNIP_GEMMS];                // what the solver was given
} snip_estimate;
typedef struct {
    const char *name;
    int64_t out_features, in_features;
    int stage;
    snip_format format[SNIP_GEMMS];         // the plan
    snip_estimate fp8, fp4;
    int64_t nonfinite, saturated;           // operand elements of the current step so far
} snip_layer_info;
typedef enum { SNIP_PASS_ORDINARY, SNIP_PASS_LOSS_PROBE, SNIP_PASS_UPDATE_PROBE, SNIP_PASS_CLEAN } snip_pass;
typedef enum { SNIP_TRAIN, SNIP_EVAL /* forward under the plan, outside any pass */, SNIP_EVAL_HIGH /* in desc.high */ } snip_mode;

SNIP_API snip_status snip_desc_check(const snip_desc *);
SNIP_API snip *snip_create(const snip_desc *);          // NULL: out of memory, or snip_desc_check says why
SNIP_API void  snip_destroy(snip *);
// Index of the new layer, or minus a snip_status. name: "block.part.kind"; copied.
SNIP_API int   snip_add_linear(snip *, const char *name, int64_t out_features, int64_t in_features, int stage);
SNIP_API snip_status snip_bind_adamw(snip *, int layer, const float *m, const float *v);     // [out][in] each
// Formats a plan may use for a layer's GEMM; layer -1: every layer so far; gemm SNIP_GEMMS: all three.
SNIP_API snip_status snip_allow(snip *, int layer, snip_gemm_kind gemm, int fp8, int fp4);
// Put a GEMM in a format by hand (F32, BF16, E4M3 or E2M1), until the next plan.
SNIP_API snip_status snip_set_format(snip *, int layer, snip_gemm_kind gemm, snip_format);
SNIP_API snip_status snip_set_mode(snip *, snip_mode);

// out [rows][out] is overwritten. bias [out] or NULL. Allocates only when rows grows.
SNIP_API snip_status snip_linear_forward(snip *, int layer, float *out, const float *inp, const float *weight, const float *bias, int64_t rows);
// dinp [rows][in], dweight [out][in] and dbias [out] accumulate; each may be NULL.
SNIP_API snip_status snip_linear_backward(snip *, int layer, float *dinp, float *dweight, float *dbias, const float *dout,
                                          const float *inp, const float *weight, int64_t rows);
// After all forward and backward calls of a pass. 1: run the same batch once more from zeroed gradients.
SNIP_API int snip_next_pass(snip *, double loss);
// After the optimizer. On a measuring step: turns the measurements into costs, solves, switches the plan.
// SNIP_INFEASIBLE leaves the old plan in force; snip_message() names the target and the shortfall.
SNIP_API snip_status snip_end_step(snip *, const snip_adamw *);

SNIP_API snip_pass   snip_current_pass(const snip *);   // kind of the pass under way, or about to begin
SNIP_API int64_t     snip_step(const snip *);           // steps ended
SNIP_API int         snip_plans(const snip *);          // plans solved so far
SNIP_API double      snip_solve_seconds(const snip *);  // time of the last solve
SNIP_API int         snip_layers(const snip *);
SNIP_API snip_status snip_layer(const snip *, int layer, snip_layer_info *);
SNIP_API double      snip_share(const snip *, snip_format);     // share of the linear layers' FLOPs planned in a format
SNIP_API const char *snip_message(const snip *);        // one line on the last error, "" if none

SNIP_API snip_status snip_plan_print(const snip *, FILE *);     // table: blocks x kinds, one mark per GEMM
SNIP_API snip_status snip_plan_save(snip *, const char *path);  // text; written aside, then renamed
SNIP_API snip_status snip_plan_load(snip *, const char *path);  // refused whole unless every layer matches
// Plan, counters and averages: with the same batches a restored session goes on bit for bit. Between steps only.
SNIP_API size_t      snip_state_size(const snip *);
SNIP_API snip_status snip_state_save(const snip *, void *state);
SNIP_API snip_status snip_state_load(snip *, const void *state, size_t size);

#ifdef __cplusplus
}
#endif
#endif // SNIP_H

// ================= END OF THE API. You need not read further to use the library. =====================
