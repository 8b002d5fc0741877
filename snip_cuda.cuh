// snip_cuda.cuh - snip.h's quantization, noise, GEMMs and training session on NVIDIA GPUs.
// MIT licence (see LICENSE). CUDA C++17 or later, compute capability 7.5 or later. It needs the CUDA runtime alone,
// and cuBLASLt where SNIP_CUBLASLT is defined (>>cuda-gemm).
//
// QUICK START
//   In ONE .cu file:               #define SNIP_IMPLEMENTATION         (stands for snip.h's implementation too)
//                                  #include "snip_cuda.cuh"            (snip.h and snip_ilp.h must lie beside it)
//   Elsewhere:                     #include "snip_cuda.cuh"
//
//     snip_recipe fp8 = SNIP_RECIPE_FP8_TILE;
//     snip_quantize_job job = {};
//     job.x = x;
//     job.rows = rows;
//     job.cols = job.ld = cols;
//     job.recipe = &fp8;
//     job.codes = codes;
//     job.scales = scales;
//     snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, stream);
//
//   examples/minimal.cu has a layer's three GEMMs. examples/train_llama.cu has a training session (>>cuda-session).
//
// MEMORY
//   Tensors, codes, scales, scratch, statistics and sums lie in device memory. Recipes, operands and jobs are read on
//   the host before a function returns. A tensor stays in use until the stream has passed the call. Shapes, alignment
//   and what may overlap are those of snip.h's function of the same name, unless a declaration says otherwise.
//
// STREAMS AND THREADS
//   Functions that take a stream allocate nothing and wait for nothing, and may be captured into a CUDA graph. The
//   exceptions are snip_cuda_create, snip_cuda_measure_gains and snip_cuda_end_step, which say so. Functions without a
//   session keep no state: any thread may call them, on any stream. Calls on one session come one after another, on
//   one stream. The current device is the caller's choice, and the same for all calls on a session.
//
// ERRORS
//   The status tells whether the arguments are right and the launches have succeeded, not whether the kernels have.
//   A refused call writes nothing. NaN and infinity are counted, as in snip.h. What has no kernel is SNIP_UNSUPPORTED,
//   never something slower or less precise in silence.
//
// DETERMINISM
//   Codes, scales, values, noise, sketches and counts are snip.h's, byte for byte. Sums are taken in a fixed order, so
//   that they are the same on every GPU; they agree with snip.h's to 1e-6. A session's plan is switched in a given
//   step, not when its measurement happens to arrive, so that a run can be repeated.
//
//   nvcc's --use_fast_math flushes subnormal floats to zero. Codes, scales, values and noise keep their bytes under it;
//   statistics take subnormal elements as zeros, and in FP4 GEMMs products of scales below 2^-126 become 0.
//
// WHAT WAS RUN
//   The kernels' own source runs on the CPU, thread by thread (tests/test_cuda.cpp, tests/test_cuda_trainer.sh), and is
//   compiled for 7.5, 8.0, 8.9, 9.0, 10.0, 10.3 and 12.0. No GPU has run it yet: `make test-gpu` runs the same tests on
//   one. The kernels for 10.x (tcgen05) are compiled and emulated, and so far no more than that.
//
// INDEX (search for the tag)
//   API:             >>cuda-quantize >>cuda-noise >>cuda-gemm >>cuda-session
//   Implementation:  >>cuda-launch >>cuda-ptx
//                    >>cuda-quantize-impl >>cuda-noise-impl
//                    >>cuda-gemm-impl >>cuda-gemm-mma >>cuda-gemm-plain >>cuda-gemm-tma >>cuda-gemm-wgmma
//                    >>cuda-gemm-tcgen05 >>cuda-gemm-choice >>cuda-gemm-cublaslt
//                    >>cuda-session-impl
#ifndef SNIP_CUDA_CUH
#define SNIP_CUDA_CUH

#include "snip.h"
#ifndef SNIP_CUDA_SHIM  // the tests' stand-in for the CUDA runtime
#    include <cuda.h>
#    include <cuda_runtime.h>
#    ifdef SNIP_CUBLASLT
#        include <cublasLt.h>
#    endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// >>cuda-quantize --------------------------------------------------------------------------------------------------
// How E2M1 values are stored. FP8 codes take a byte each under any of these.
typedef enum {
    // Two codes to a byte, as in snip.h.
    SNIP_CUDA_PACKED,
    // The values as E4M3 codes, one to a byte: operands for FP8 tensor cores.
    SNIP_CUDA_E4M3_BYTES,
    // Twice the values as INT8, for snip_cuda_gemm_s8. A row takes a multiple of 16 bytes; the padding is neither
    // written nor read.
    SNIP_CUDA_S8_BYTES
} snip_cuda_codes;

// Bytes of scratch for a matrix [rows][cols]. 0: a shape that snip_cuda_quantize refuses.
SNIP_API size_t snip_cuda_quantize_scratch(int64_t rows, int64_t cols);

// snip_quantize_with on the GPU, with the same bytes.
//   job         what to quantize and where to. Its isa is ignored. Recipes are E4M3, E5M2 or E2M1, without scales or
//               with tiles of 1 x 16, 1 x 32, 1 x 64, 1 x 128 or 128 x 128. Both orientations come from one read of
//               x, or from two if their formats or roundings differ.
//   form        how E2M1 is stored, in both orientations
//   stats       statistics under job->recipe, overwritten; or NULL
//   stats_t     statistics of the transposed matrix under job->recipe_t, overwritten; or NULL
//   scratch     snip_cuda_quantize_scratch bytes, 8-byte aligned. It may be NULL where there are no statistics and no
//               SNIP_SCALE_UE4M3.
// SNIP_UNSUPPORTED: another recipe, or 2^31 blocks of 128 x 128 elements and more.
SNIP_API snip_status snip_cuda_quantize(const snip_quantize_job *job, snip_cuda_codes form, snip_quant_stats *stats,
                                        snip_quant_stats *stats_t, void *scratch, cudaStream_t stream);

// snip_dequantize and snip_dequantize_bf16 on the GPU, with the same bytes. Any recipe of snip.h.
//   codes, scales   as in snip.h: E2M1 is SNIP_CUDA_PACKED
//   x               [rows][cols], `ld` elements from row to row
//   x_format        SNIP_F32 or SNIP_BF16
SNIP_API snip_status snip_cuda_dequantize(const snip_recipe *recipe, const void *codes, const void *scales,
                                          int64_t rows, int64_t cols, void *x, snip_format x_format, int64_t ld,
                                          cudaStream_t stream);

// >>cuda-noise -----------------------------------------------------------------------------------------------------
// Bytes of scratch for the sums below, 8-byte aligned.
#define SNIP_CUDA_NOISE_SCRATCH 4096

// snip_noise_add on the GPU, with the same bytes: out[i] = x[i] + scale * noise[i] * (shape ? shape[i] : 1), i < n.
//   noise[i]    +1 or -1, by (key, i)
//   out         may be x
SNIP_API snip_status snip_cuda_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                         snip_rng_key key, cudaStream_t stream);

// *dot = the sum of noise[i] * x[i], i < n, in double; 0 for n 0.
//   dot         overwritten, in device memory
//   scratch     SNIP_CUDA_NOISE_SCRATCH bytes
SNIP_API snip_status snip_cuda_noise_dot(const float *x, int64_t n, snip_rng_key key, double *dot, void *scratch,
                                         cudaStream_t stream);

// The same with the noise of snip_gauss, which takes double-precision arithmetic.
SNIP_API snip_status snip_cuda_gauss_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                         snip_rng_key key, cudaStream_t stream);
SNIP_API snip_status snip_cuda_gauss_dot(const float *x, int64_t n, snip_rng_key key, double *dot, void *scratch,
                                         cudaStream_t stream);

// >>cuda-gemm ------------------------------------------------------------------------------------------------------
// snip_gemm on tensor cores: C[m][n] (+)= A[m][k] * B[n][k]^T + bias[n].
//   a, b        Two of E2M1, or two of E4M3 or E5M2, with scale tiles 128 wide along k and of any height. (fwd and
//               dgrad: 1 x 128 by 128 x 128; wgrad: 1 x 128 by 1 x 128.) Or two of F32 or BF16, each as it lies or
//               transposed.
//   c           [m][n], `ldc` floats from row to row, ldc >= n; overlaps no operand
//   accumulate  0: C is overwritten. Else it is added to.
//   bias        [n], added in both cases; or NULL
// SNIP_UNSUPPORTED: other operands, or a GPU without the instructions:
//
//   E2M1            8.0 and later    INT8 mma, bit for bit snip_gemm's result
//   E4M3, E5M2      9.0              wgmma, in code for sm_90a (*)
//                   10.x             tcgen05, in code for sm_100a, sm_103a or sm_100f (*)
//                   8.9, 12.x        FP8 mma
//                   others from 8.0  FP16 mma of the same values; (*) also where k is no multiple of 16, or codes are
//                                    not 16-byte aligned
//   BF16, or rounded to it, both     BF16 mma from 8.0 on, else as F32
//   F32             7.5 and later    multiply-adds in float32, no tensor cores
//
// Tensor cores keep as little as 14 bits of an FP8 sum. After every 128 of k it is added in float32.
SNIP_API snip_status snip_cuda_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                                    float *c, int64_t ldc, int accumulate, const float *bias, cudaStream_t stream);

// The same for two operands of E2M1 whose codes are SNIP_CUDA_S8_BYTES, 16-byte aligned. Bit for bit snip_gemm's
// result too. It is for tensor cores that mma cannot keep busy: wgmma on 9.0 (code for sm_90a), tcgen05 on 10.0 (code
// for sm_100a). Elsewhere SNIP_UNSUPPORTED.
SNIP_API snip_status snip_cuda_gemm_s8(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                                       float *c, int64_t ldc, int accumulate, const float *bias, cudaStream_t stream);

// The same for all operands that snip_gemm takes, a thread for each element of C: what the others are tested against.
SNIP_API snip_status snip_cuda_gemm_reference(int64_t m, int64_t n, int64_t k, const snip_operand *a,
                                              const snip_operand *b, float *c, int64_t ldc, int accumulate,
                                              const float *bias, cudaStream_t stream);

#ifdef SNIP_CUBLASLT  // define it in every file that includes this one, and link with -lcublasLt
// Bytes of scratch that snip_cuda_gemm_cublaslt wants at least. 0: a shape that it refuses.
SNIP_API size_t snip_cuda_cublaslt_scratch(int64_t m, int64_t n, int64_t k);

// snip_cuda_gemm's FP8 products by cuBLASLt 12.9 or later on 9.0, where the caller prefers it.
//   lt             of the current device
//   a, b           tiles of 1 x 128 or 128 x 128, not both of 128 x 128; not both of E5M2; float scales; codes 16-byte
//                  aligned; k at least 1
//   c, ldc         c and its rows 16-byte aligned
//   scratch        256-byte aligned
//   scratch_bytes  snip_cuda_cublaslt_scratch or more. cuBLASLt may work in what is beyond; 32 MiB are plenty.
// SNIP_UNSUPPORTED: other operands, or a product that cuBLASLt lacks. Its sums are not the same on every GPU.
SNIP_API snip_status snip_cuda_gemm_cublaslt(cublasLtHandle_t lt, int64_t m, int64_t n, int64_t k,
                                             const snip_operand *a, const snip_operand *b, float *c, int64_t ldc,
                                             int accumulate, void *scratch, size_t scratch_bytes, cudaStream_t stream);
#endif

// >>cuda-session -----------------------------------------------------------------------------------
// snip.h's session for tensors in device memory. Plan, averages, solver and files are those of a snip on the host. What
// a step measures is gathered in device memory, copied to the host behind the step's own work, and read `lag` steps
// later, so that the device has work while the host solves (the paper's Figure 6):
//     cudaMalloc(&memory, snip_cuda_memory(s, rows));
//     snip_cuda *c = snip_cuda_create(s, rows, 2, memory, stream);
//     for (step = 1; ; step++) {
//         do {
//             zero_grad();
//             ... snip_cuda_linear_forward (c, l, out, inp, weight, bias, rows, stream);
//             ... snip_cuda_linear_backward(c, l, dinp, dweight, dbias, dout, inp, weight, rows, stream);
//         } while (snip_cuda_next_pass(c, loss, stream));
//         optimizer_step();
//         if (snip_cuda_end_step(c, &adamw, NULL, stream)) puts(snip_message(s));
//     }
// All calls go to one stream. m and v of snip_bind_adamw are device pointers. desc.optimizer is not SNIP_CUSTOM, and
// the recipes are those that snip_cuda_gemm takes. desc.measure: SNIP_BF16 runs on tensor cores.
// What snip.h does with tensors on the host is not for this session: snip_linear_*, snip_next_pass, snip_end_step,
// snip_measure_gains, snip_update_sq, snip_layer_sensitivity.
//
// ERRORS
//   Refused arguments are told of at once, as in snip.h, and kept for snip_step_status. NaN and infinity are counted on
//   the device, in what is quantized, in biases and in the products of high precision. snip_cuda_end_step tells of them
//   `lag` steps later: what must not reach m and v, the optimizer's kernel has to look at itself.
//
// CUDA GRAPHS
//   Capture a pass and the optimizer when snip_current_pass is SNIP_PASS_ORDINARY, replay them in ordinary steps, and
//   capture anew when snip_reason has changed. Measuring steps, snip_cuda_next_pass and snip_cuda_end_step run outside.
//   Random numbers move on, because kernels read the step's number from device memory.
typedef struct snip_cuda snip_cuda;

// 1: the current device runs a session: it has tensor cores of compute capability 8.0 or later, and this file was
// compiled for them.
SNIP_API int snip_cuda_supported(void);

// Bytes of device memory that snip_cuda_create wants for calls of at most `rows` rows; 0: a bad argument.
// Every weight has room for its codes, as it lies and transposed (2 bytes an element): each is quantized once a step,
// at its first use, for fwd, dgrad and all micro-batches. Sessions that measure keep 80 KiB of sketches a layer.
SNIP_API size_t snip_cuda_memory(const snip *, int64_t rows);

// After the last snip_add_linear and after snip_state_load. Queues work on the stream; destroy it before the snip.
// rows: the most that a call may have.
// lag: steps from a measurement to its plan, 0 to desc.every - 1.
// memory: snip_cuda_memory bytes of the device's, 16-byte aligned. It stays the caller's, and in use until
// snip_cuda_destroy.
// NULL: refused, unsupported or out of memory; snip_message says why.
SNIP_API snip_cuda *snip_cuda_create(snip *, int64_t rows, int lag, void *memory, cudaStream_t);

// Waits for the device. NULL is ignored.
SNIP_API void snip_cuda_destroy(snip_cuda *);

// As snip_linear_forward, with all pointers to device memory.
SNIP_API snip_status snip_cuda_linear_forward(snip_cuda *, int layer, float *out, const float *inp, const float *weight,
                                              const float *bias, int64_t rows, cudaStream_t);

// As snip_linear_backward, with all pointers to device memory. A micro-batch is known by the address of its input: of
// several forward calls whose inputs were at other places, the first that waits is taken.
SNIP_API snip_status snip_cuda_linear_backward(snip_cuda *, int layer, float *dinp, float *dweight, float *dbias,
                                               const float *dout, const float *inp, const float *weight, int64_t rows,
                                               cudaStream_t);

// As snip_linear_recompute: a forward call of this pass run again before its backward call, with the same bits in out.
// It counts as no call, adds to no sum and counts no NaN. The micro-batch is known as in snip_cuda_linear_backward.
SNIP_API snip_status snip_cuda_linear_recompute(snip_cuda *, int layer, float *out, const float *inp,
                                                const float *weight, const float *bias, int64_t rows, cudaStream_t);

// After all forward and backward calls of a pass, on every step. Returns what snip_next_pass returns.
// loss: the batch's mean loss, a float in device memory, read on the stream. NULL: this step's is not watched for
// spikes; an error in a measuring step's last pass.
SNIP_API int snip_cuda_next_pass(snip_cuda *, const float *loss, cudaStream_t);

// Once per step, after the optimizer, as snip_end_step. Waits until the device is done with the step `lag` steps back;
// if that measured, solves and switches the plan.
// grad_scale: device memory, instead of adamw's; or NULL.
// Returns the first error of this step that the host knows of, or else of the step `lag` back, whose counts snip_layer
// then has.
SNIP_API snip_status snip_cuda_end_step(snip_cuda *, const snip_adamw *, const float *grad_scale, cudaStream_t);

// Reads all steps ended so far, and waits for them: before snip_state_save, and at the end of the training. Returns the
// first error among them. Ask snip_current_pass after it: what was read may have the next step measure.
SNIP_API snip_status snip_cuda_finish(snip_cuda *);

// snip_measure_gains on this GPU, by CUDA events. Allocates, and waits for the device.
// rows: 1 to snip_cuda_create's.
SNIP_API snip_status snip_cuda_measure_gains(snip_cuda *, int64_t rows, cudaStream_t);
#ifdef SNIP_CUBLASLT

// From now on the session's FP8 products go to snip_cuda_gemm_cublaslt; with a NULL handle no longer. What cuBLASLt
// lacks is then SNIP_UNSUPPORTED: nothing is replaced in silence.
// scratch: as there, snip_cuda_cublaslt_memory bytes at least; stays the caller's.
SNIP_API snip_status snip_cuda_use_cublaslt(snip_cuda *, cublasLtHandle_t, void *scratch, size_t scratch_bytes);
SNIP_API size_t snip_cuda_cublaslt_memory(const snip_cuda *);
#endif

#ifdef __cplusplus
}
#endif
#endif  // SNIP_CUDA_CUH

// ================= END OF THE API. You need not read further to use the library. =====================
#if defined(SNIP_IMPLEMENTATION) && !defined(SNIP_CUDA_IMPLEMENTATION_DONE)
#define SNIP_CUDA_IMPLEMENTATION_DONE

// >>cuda-launch ----------------------------------------------------------------------------------------------------
// Launches, loops over elements, and sums in a fixed order.
#define SNIPI_DEVICE static __device__ __forceinline__

enum {
    SNIPI_WARP = 32,      // threads of a warp
    SNIPI_THREADS = 256,  // threads of a thread block, where a kernel does not say otherwise: eight warps
    SNIPI_GRID = 1 << 16  // most thread blocks of a loop over elements: enough to fill any GPU
};

static const unsigned SNIPI_ALL_LANES = 0xFFFFFFFFu;  // the mask of a warp operation that all 32 lanes take part in

SNIPI_DEVICE int snipi_lane() { return (int)threadIdx.x % SNIPI_WARP; }

SNIPI_DEVICE int snipi_warp() { return (int)threadIdx.x / SNIPI_WARP; }

template <class... Parameters, class... Arguments>
static snip_status snipi_cuda_launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                                     cudaStream_t stream, const Arguments &...arguments) {
    if (blocks > INT32_MAX) return SNIP_UNSUPPORTED;

    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess ? SNIP_OK : SNIP_DEVICE;
}

// Thread blocks of a loop over n elements, `each` of them to a thread block.
static int64_t snipi_cuda_grid(int64_t n, int64_t each) { return snipi_min(snipi_ceil_div(n, each), SNIPI_GRID); }

// visit(i), i < n
template <class Visit> static __global__ void snipi_cuda_each_kernel(const Visit visit, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * SNIPI_THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * SNIPI_THREADS)
        visit(i);
}

template <class Visit> static snip_status snipi_cuda_each(const Visit &visit, int64_t n, cudaStream_t stream) {
    return snipi_cuda_launch(snipi_cuda_each_kernel<Visit>, snipi_cuda_grid(n, SNIPI_THREADS), SNIPI_THREADS, 0, stream,
                             visit, n);
}

// The sum over a thread block, in its thread 0. `sums` has a place for each warp.
SNIPI_DEVICE double snipi_cuda_block_sum(double x, double *sums) {
    const int lane = snipi_lane(), warp = snipi_warp(), warps = (int)blockDim.x / SNIPI_WARP;
    double sum = 0;

    for (int distance = SNIPI_WARP / 2; distance > 0; distance /= 2)
        x += __shfl_down_sync(SNIPI_ALL_LANES, x, distance);

    __syncthreads();  // the places' last sums have been read
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 0; w < warps; w++) sum += sums[w];
    return sum;
}

enum { SNIPI_SUM_BLOCKS = SNIP_CUDA_NOISE_SCRATCH / (int)sizeof(double) };  // most partial sums

// Thread blocks of a sum over n elements: a function of n alone, and with it the order of the sum.
static int64_t snipi_cuda_sum_blocks(int64_t n) {
    return snipi_max(1, snipi_min(SNIPI_SUM_BLOCKS, snipi_ceil_div(n, 4 * SNIPI_THREADS)));
}

// parts[thread block]: the sum of its terms, term(i), i < n
template <class Term> static __global__ void snipi_cuda_reduce_kernel(const Term term, int64_t n, double *parts) {
    __shared__ double sums[SNIPI_THREADS / SNIPI_WARP];
    double sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * SNIPI_THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * SNIPI_THREADS)
        sum += term(i);
    sum = snipi_cuda_block_sum(sum, sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

static __global__ void snipi_cuda_sum_kernel(const double *parts, int n, double *total, double factor, int add) {
    __shared__ double sums[(int)SNIPI_SUM_BLOCKS / SNIPI_WARP];
    const double sum = snipi_cuda_block_sum((int)threadIdx.x < n ? parts[threadIdx.x] : 0, sums);
    if (threadIdx.x == 0) *total = (add ? *total : 0) + factor * sum;
}

// *total (+)= factor * the sum of `n` parts
static snip_status snipi_cuda_sum(const void *parts, int64_t n, double *total, double factor, int add,
                                  cudaStream_t stream) {
    return snipi_cuda_launch(snipi_cuda_sum_kernel, 1, (int)snipi_ceil_div(n, SNIPI_WARP) * SNIPI_WARP, 0, stream,
                             (const double *)parts, (int)n, total, factor, add);
}

// *total (+)= factor * the sum of term(i), i < n. scratch: SNIP_CUDA_NOISE_SCRATCH bytes.
template <class Term>
static snip_status snipi_cuda_reduce(const Term &term, int64_t n, double *total, double factor, int add, void *scratch,
                                     cudaStream_t stream) {
    const int64_t blocks = snipi_cuda_sum_blocks(n);
    const snip_status status = snipi_cuda_launch(snipi_cuda_reduce_kernel<Term>, blocks, SNIPI_THREADS, 0, stream, term,
                                                 n, (double *)scratch);
    return status ? status : snipi_cuda_sum(scratch, blocks, total, factor, add, stream);
}

// >>cuda-ptx -------------------------------------------------------------------------------------------------------
// Instructions without a name in CUDA C++, each in a function. The tests have functions of their own for the CPU.
#ifndef SNIP_CUDA_SHIM
// Bytes of `low` (0 to 3) and `high` (4 to 7) as the low four nibbles of `select` say. A nibble's top bit takes the
// byte's sign eight times instead.
SNIPI_DEVICE uint32_t snipi_ptx_prmt(uint32_t low, uint32_t high, uint32_t select) {
    uint32_t word;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(select));
    return word;
}

// Two floats to codes of a byte: to nearest even, saturating.
#    if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
SNIPI_DEVICE uint32_t snipi_ptx_e4m3x2(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

SNIPI_DEVICE uint32_t snipi_ptx_e5m2x2(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#    endif

SNIPI_DEVICE uint32_t snipi_ptx_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The address of shared memory, as instructions take it.
SNIPI_DEVICE uint32_t snipi_ptx_shared(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

SNIPI_DEVICE char *snipi_ptx_dynamic_shared() {
    extern __shared__ char snipi_dynamic_shared[];
    return snipi_dynamic_shared;
}

// Four 8 x 8 matrices of 16 bits. Lane l gives row l % 8 of matrix l / 8.
SNIPI_DEVICE void snipi_ptx_ldmatrix4(uint32_t words[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(snipi_ptx_shared(row))
                 : "memory");
}

// d += A B^T, 16 x 8 from 32 bytes of k, by a warp.
#    define SNIPI_PTX_MMA(name, shape, types, Sum, constraint)                                    \
        SNIPI_DEVICE void name(Sum d[4], const uint32_t a[4], const uint32_t b[2]) {              \
            asm volatile("mma.sync.aligned." shape ".row.col." types                              \
                         " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
                         : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3]) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));     \
        }
SNIPI_PTX_MMA(snipi_ptx_mma_s8, "m16n8k32", "s32.s8.s8.s32", int32_t, "+r")
SNIPI_PTX_MMA(snipi_ptx_mma_f16, "m16n8k16", "f32.f16.f16.f32", float, "+f")
SNIPI_PTX_MMA(snipi_ptx_mma_bf16, "m16n8k16", "f32.bf16.bf16.f32", float, "+f")
SNIPI_PTX_MMA(snipi_ptx_mma_e4m3_e4m3, "m16n8k32", "f32.e4m3.e4m3.f32", float, "+f")
SNIPI_PTX_MMA(snipi_ptx_mma_e4m3_e5m2, "m16n8k32", "f32.e4m3.e5m2.f32", float, "+f")
SNIPI_PTX_MMA(snipi_ptx_mma_e5m2_e4m3, "m16n8k32", "f32.e5m2.e4m3.f32", float, "+f")
SNIPI_PTX_MMA(snipi_ptx_mma_e5m2_e5m2, "m16n8k32", "f32.e5m2.e5m2.f32", float, "+f")

// ---- Hopper: barriers in shared memory, the tensor memory accelerator (TMA), wgmma ----
// A barrier counts arrivals and bytes. Its phase is over when all that it was told to expect have come.
SNIPI_DEVICE void snipi_ptx_barrier_init(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(snipi_ptx_shared(barrier)), "r"(count) : "memory");
}

// Initialized barriers become visible to other threads, and to TMA, which is of another proxy.
SNIPI_DEVICE void snipi_ptx_barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" : : : "memory");
}

SNIPI_DEVICE void snipi_ptx_barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(snipi_ptx_shared(barrier)) : "memory");
}

// Arrives, and has the phase wait for so many bytes more.
SNIPI_DEVICE void snipi_ptx_barrier_arrive_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(snipi_ptx_shared(barrier)), "r"(bytes)
                 : "memory");
}

// Returns once the phase of this parity is over.
SNIPI_DEVICE void snipi_ptx_barrier_wait(uint64_t *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}"
                 :
                 : "r"(snipi_ptx_shared(barrier)), "r"(parity)
                 : "memory");
}

// A box of a map, from (x, y) on, to shared memory. Its bytes are told to the barrier.
SNIPI_DEVICE void snipi_ptx_tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        :
        : "r"(snipi_ptx_shared(to)), "l"(map), "r"(snipi_ptx_shared(barrier)), "r"(x), "r"(y)
        : "memory");
}

// A warpgroup gives registers back, or takes more: this many a thread from now on.
template <int Registers> SNIPI_DEVICE void snipi_ptx_registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(Registers));
}

template <int Registers> SNIPI_DEVICE void snipi_ptx_registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(Registers));
}

// Keeps the compiler from moving reads and writes of x across: an instruction still works on its register.
SNIPI_DEVICE void snipi_ptx_settled(float &x) { asm volatile("" : "+f"(x) : : "memory"); }

SNIPI_DEVICE void snipi_ptx_settled(int32_t &x) { asm volatile("" : "+r"(x) : : "memory"); }

// Products between begin and end run on their own. At the end they are done.
template <class Sum> SNIPI_DEVICE void snipi_ptx_wgmma_begin(Sum d[64]) {
#    pragma unroll
    for (int i = 0; i < 64; i++) snipi_ptx_settled(d[i]);
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}

template <class Sum> SNIPI_DEVICE void snipi_ptx_wgmma_end(Sum d[64]) {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" : : : "memory");
#    pragma unroll
    for (int i = 0; i < 64; i++) snipi_ptx_settled(d[i]);
}

// Operands 0 to 31 and 32 to 63 of an instruction; eight of them as C++ expressions.
#    define SNIPI_PTX_FIRST_32             \
        "%0,%1,%2,%3,%4,%5,%6,%7,"         \
        "%8,%9,%10,%11,%12,%13,%14,%15,"   \
        "%16,%17,%18,%19,%20,%21,%22,%23," \
        "%24,%25,%26,%27,%28,%29,%30,%31"
#    define SNIPI_PTX_NEXT_32              \
        "%32,%33,%34,%35,%36,%37,%38,%39," \
        "%40,%41,%42,%43,%44,%45,%46,%47," \
        "%48,%49,%50,%51,%52,%53,%54,%55," \
        "%56,%57,%58,%59,%60,%61,%62,%63"
#    define SNIPI_PTX_8(x, d, i) \
        x(d[i]), x(d[i + 1]), x(d[i + 2]), x(d[i + 3]), x(d[i + 4]), x(d[i + 5]), x(d[i + 6]), x(d[i + 7])
#    define SNIPI_PTX_32(x, d, i) \
        SNIPI_PTX_8(x, d, i), SNIPI_PTX_8(x, d, i + 8), SNIPI_PTX_8(x, d, i + 16), SNIPI_PTX_8(x, d, i + 24)

// d (+)= A B^T, 64 x 128 from 32 bytes of k, by a warpgroup. a, b: descriptors; add 0: d is overwritten.
#    define SNIPI_PTX_WGMMA(name, types, Sum, constraint, signs)                                  \
        SNIPI_DEVICE void name(Sum d[64], uint64_t a, uint64_t b, int add) {                      \
            asm volatile("{\n"                                                                    \
                         ".reg .pred add;\n"                                                      \
                         "setp.ne.b32 add, %66, 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n128k32." types " {" SNIPI_PTX_FIRST_32 \
                         "," SNIPI_PTX_NEXT_32 "},"                                               \
                         " %64, %65, add" signs ";\n"                                             \
                         "}"                                                                      \
                         : SNIPI_PTX_32(constraint, d, 0), SNIPI_PTX_32(constraint, d, 32)        \
                         : "l"(a), "l"(b), "r"(add));                                             \
        }
SNIPI_PTX_WGMMA(snipi_ptx_wgmma_e4m3_e4m3, "f32.e4m3.e4m3", float, "+f", ", 1, 1")
SNIPI_PTX_WGMMA(snipi_ptx_wgmma_e4m3_e5m2, "f32.e4m3.e5m2", float, "+f", ", 1, 1")
SNIPI_PTX_WGMMA(snipi_ptx_wgmma_e5m2_e4m3, "f32.e5m2.e4m3", float, "+f", ", 1, 1")
SNIPI_PTX_WGMMA(snipi_ptx_wgmma_e5m2_e5m2, "f32.e5m2.e5m2", float, "+f", ", 1, 1")
SNIPI_PTX_WGMMA(snipi_ptx_wgmma_s8, "s32.s8.s8", int32_t, "+r", "")

// ---- Datacenter Blackwell: tensor memory, tcgen05 ----
// Tensor memory has 128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. A warp takes all of it,
// and gives it back.
SNIPI_DEVICE void snipi_ptx_tensor_memory_alloc(uint32_t *address) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 512;\n"
                 "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
                 :
                 : "r"(snipi_ptx_shared(address))
                 : "memory");
}

SNIPI_DEVICE void snipi_ptx_tensor_memory_free(uint32_t address) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 512;" : : "r"(address) : "memory");
}

// Fences: before a thread tells others of its work on tensor memory, and after it was told of theirs. Commit implies
// the first.
SNIPI_DEVICE void snipi_ptx_tcgen05_before() { asm volatile("tcgen05.fence::before_thread_sync;" : : : "memory"); }

SNIPI_DEVICE void snipi_ptx_tcgen05_after() { asm volatile("tcgen05.fence::after_thread_sync;" : : : "memory"); }

// d (+)= A B^T from 32 bytes of k, started by one thread. d: tensor memory.
#    define SNIPI_PTX_TCGEN05(name, kind)                                                           \
        SNIPI_DEVICE void name(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, int add) { \
            asm volatile("{\n"                                                                      \
                         ".reg .pred add;\n"                                                        \
                         "setp.ne.b32 add, %4, 0;\n"                                                \
                         "tcgen05.mma.cta_group::1.kind::" kind " [%0], %1, %2, %3, add;\n"         \
                         "}"                                                                        \
                         :                                                                          \
                         : "r"(d), "l"(a), "l"(b), "r"(instruction), "r"(add)                       \
                         : "memory");                                                               \
        }
SNIPI_PTX_TCGEN05(snipi_ptx_tcgen05_fp8, "f8f6f4")
SNIPI_PTX_TCGEN05(snipi_ptx_tcgen05_s8, "i8")

// The barrier gets an arrival when all that this thread has started is done.
SNIPI_DEVICE void snipi_ptx_tcgen05_commit(uint64_t *barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];"
                 :
                 : "r"(snipi_ptx_shared(barrier))
                 : "memory");
}

// 16 lanes of 64 columns to a warp's registers, laid out as wgmma's sums; from lane 32 * (warp % 4), or from 16 lanes
// further. They have come after the wait.
#    define SNIPI_PTX_LOAD(Sum, constraint)                                           \
        SNIPI_DEVICE void snipi_ptx_tensor_memory_load(Sum d[32], uint32_t address) { \
            asm volatile("tcgen05.ld.sync.aligned.16x256b.x8.b32"                     \
                         " {" SNIPI_PTX_FIRST_32 "}, [%32];"                          \
                         : SNIPI_PTX_32(constraint, d, 0)                             \
                         : "r"(address)                                               \
                         : "memory");                                                 \
        }
SNIPI_PTX_LOAD(float, "=f")
SNIPI_PTX_LOAD(int32_t, "=r")

template <class Sum> SNIPI_DEVICE void snipi_ptx_tensor_memory_wait(Sum d[32]) {
    asm volatile("tcgen05.wait::ld.sync.aligned;" : : : "memory");
#    pragma unroll
    for (int i = 0; i < 32; i++) snipi_ptx_settled(d[i]);
}

// A map of bytes [rows][k], row_bytes from row to row, in boxes of 128 x 128 with 128-byte swizzle, zeros beyond the
// edges. 1: done. The driver's function is asked for by name, so that programs need not link the driver's library.
static int snipi_cuda_tensor_map(CUtensorMap *map, const void *codes, int64_t rows, int64_t k, int64_t row_bytes) {
    const cuuint64_t size[2] = { (cuuint64_t)k, (cuuint64_t)rows };
    const cuuint64_t stride[1] = { (cuuint64_t)row_bytes };
    const cuuint32_t box[2] = { 128, 128 };
    const cuuint32_t step[2] = { 1, 1 };

    cudaDriverEntryPointQueryResult found;
    void *encode = NULL;
#    if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                               cudaEnableDefault, &found);
#    else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &encode, cudaEnableDefault, &found);
#    endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || !encode) return 0;

    const CUresult result = ((decltype(&cuTensorMapEncodeTiled))encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, (void *)(uintptr_t)codes, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS;
}
#endif

// >>cuda-quantize-impl ---------------------------------------------------------------------------------------------
// A thread block takes a block of 128 x 128 elements of x: as it lies (straight), transposed (turned), or both. For
// each orientation come the tiles' largest magnitudes, by shuffles and by maxima in shared memory; then their scales;
// then the codes. Turned codes pass through shared memory, to leave in whole rows.
//
// A thread has 16 rows: straight, of 4 columns side by side; turned, of 4 columns 32 apart, so that its warp reads
// whole lines. Blocks in the interior that want codes to nearest and nothing else are held: a thread keeps its elements
// (straight's columns) in registers. The others read them again, from caches.
enum {
    SNIPI_BLOCK = 128,                                        // edge of a block in elements: that of the largest tile
    SNIPI_ROWS = SNIPI_BLOCK / (SNIPI_THREADS / SNIPI_WARP),  // rows of a thread: a warp has 16, as wide as the block
    SNIPI_TILES = SNIPI_BLOCK * (SNIPI_BLOCK / 16)            // most tiles of a block: those of 1 x 16
};

// A kernel's Format is a snip_format or one of these. They stand for E2M1 and say how it is stored.
enum {
    SNIPI_E2M1_WIDE = 64,  // as E4M3 codes; beyond all of snip_format
    SNIPI_E2M1_S8          // twice the values, as INT8
};

// A kernel's Mode.
enum {
    SNIPI_NEAREST,     // codes to nearest, and no more
    SNIPI_STOCHASTIC,  // codes by stochastic rounding, and no more
    SNIPI_MEASURE      // codes by either, statistics and values
};

// One orientation of a matrix: how it is quantized and where to.
typedef struct {
    snip_recipe recipe;  // format 0: not wanted
    int64_t rows, cols;  // as quantized: x's, or those of x transposed
    int64_t row_bytes;   // of codes, from row to row
    int log2_tile_cols;
    int aligned;                 // whether 4 codes (straight) or 16 (turned) may be stored at once
    uint8_t *codes;              // [rows][row_bytes], or NULL
    void *scales;                // or NULL
    snip_quant_stats *parts;     // [thread blocks], or NULL
    unsigned long long *counts;  // added to: NaN and infinity, saturated elements; or NULL
} snipi_cuda_side;

typedef struct {
    const void *x;        // [rows][cols], ld
    const float *weight;  // [rows][cols], ld; or NULL
    int64_t rows, cols, ld;
    int bf16;     // x is
    int vectors;  // rows of x may be read four elements at a time
    int held;     // blocks in the interior may be
    snipi_cuda_side straight, turned;
    void *out;  // [rows][cols], ld_out: the values of `straight`; or NULL
    int64_t ld_out;
    int out_bf16;
    snip_rng_key key, key_t;         // of straight and of turned
    const uint32_t *step;            // in place of the keys' steps, or NULL
    const unsigned long long *more;  // two more for straight's counts (turned's, if alone), or NULL
    const uint32_t *amax;            // of the tensor, as bits: for SNIP_SCALE_UE4M3
} snipi_cuda_quantize_work;

typedef struct {
    uint32_t amax[SNIPI_TILES];  // as bits, by tile
    float scale[SNIPI_TILES], inverse[SNIPI_TILES];
    uint4 codes[SNIPI_BLOCK * SNIPI_BLOCK / 16];  // turned's, a byte an element
    double sums[SNIPI_THREADS / SNIPI_WARP];
    int low;  // a tile is
} snipi_cuda_shared;

// Four elements side by side in the quantized matrix.
typedef struct {
    float x[4];
    uint32_t random[4];  // for stochastic rounding
    float weight[4];     // for the statistics
    float value[4];      // dequantized
} snipi_cuda_four;

SNIPI_DEVICE uint32_t snipi_cuda_amax(uint32_t amax, float x) {  // of finite elements
    const uint32_t magnitude = snipi_bits(x) & 0x7FFFFFFFu;
    return magnitude < 0x7F800000u && magnitude > amax ? magnitude : amax;
}

// ---- elements of x ----
SNIPI_DEVICE float snipi_cuda_load(const float *x) { return *x; }

SNIPI_DEVICE float snipi_cuda_load(const uint16_t *x) { return snipi_float((uint32_t)*x << 16); }

SNIPI_DEVICE void snipi_cuda_load4(const float *x, float out[4]) {
    const float4 v = *(const float4 *)x;
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
}

SNIPI_DEVICE void snipi_cuda_load4(const uint16_t *x, float out[4]) {
    const uint2 v = *(const uint2 *)x;
    out[0] = snipi_float(v.x << 16);
    out[1] = snipi_float(v.x & 0xFFFF0000u);
    out[2] = snipi_float(v.y << 16);
    out[3] = snipi_float(v.y & 0xFFFF0000u);
}

// Zeros beyond x's edges.
SNIPI_DEVICE float snipi_cuda_at(const snipi_cuda_quantize_work &work, int64_t row, int64_t col) {
    const int64_t at = row * work.ld + col;
    if (row >= work.rows || col >= work.cols) return 0.0f;
    return work.bf16 ? snipi_cuda_load((const uint16_t *)work.x + at) : ((const float *)work.x)[at];
}

SNIPI_DEVICE void snipi_cuda_row4(const snipi_cuda_quantize_work &work, int64_t row, int64_t col, float out[4]) {
    const int64_t at = row * work.ld + col;
    if (!work.vectors || row >= work.rows || col + 4 > work.cols)
        for (int j = 0; j < 4; j++) out[j] = snipi_cuda_at(work, row, col + j);
    else if (work.bf16)
        snipi_cuda_load4((const uint16_t *)work.x + at, out);
    else
        snipi_cuda_load4((const float *)work.x + at, out);
}

SNIPI_DEVICE void snipi_cuda_column4(const snipi_cuda_quantize_work &work, int64_t row, int64_t col, float out[4]) {
    for (int i = 0; i < 4; i++) out[i] = snipi_cuda_at(work, row + i, col);
}

SNIPI_DEVICE snip_rng_key snipi_cuda_key(const snipi_cuda_quantize_work &work, snip_rng_key key) {
    if (work.step) key.step = *work.step;
    return key;
}

// Random words of the four elements from `element` on, which may straddle two counters.
SNIPI_DEVICE void snipi_cuda_random4(snip_rng_key key, uint64_t element, uint32_t out[4]) {
    const uint32_t skip = (uint32_t)(element & 3);
    uint32_t words[8] = { 0, 0, 0, 0, 0, 0, 0, 0 };
    snipi_philox(key, element >> 2, words);
    if (skip) snipi_philox(key, (element >> 2) + 1, words + 4);
#pragma unroll
    for (int i = 0; i < 4; i++)  // an index that is not constant would put the words in local memory
        out[i] = skip == 0 ? words[i] : skip == 1 ? words[i + 1] : skip == 2 ? words[i + 2] : words[i + 3];
}

// ---- codes ----
template <int Format> SNIPI_DEVICE constexpr snip_format snipi_cuda_format() {
    return Format >= SNIPI_E2M1_WIDE ? SNIP_E2M1 : (snip_format)Format;
}

// Bytes that four codes take.
template <int Format> SNIPI_DEVICE constexpr int snipi_cuda_word() { return Format == SNIP_E2M1 ? 2 : 4; }

template <int Mode> SNIPI_DEVICE int snipi_cuda_stochastic(const snipi_cuda_side &side) {
    return Mode == SNIPI_STOCHASTIC || (Mode == SNIPI_MEASURE && side.recipe.rounding == SNIP_ROUND_STOCHASTIC);
}

// The code of y. *over: 1 if rounding alone puts it beyond the largest.
template <int Format> SNIPI_DEVICE uint32_t snipi_cuda_encode(float y, int stochastic, uint32_t random, int *over) {
    const snipi_element element = snipi_element_of(snipi_cuda_format<Format>());
    const uint32_t bits = snipi_bits(y), magnitude = bits & 0x7FFFFFFFu;
    uint32_t code = stochastic ? snipi_encode_stochastic(magnitude, random, element.mantissa, element.bias)
                               : snipi_encode_nearest(magnitude, element.mantissa, element.bias);
    *over = code > element.largest;
    code = (code < element.largest ? code : element.largest) | (bits >> 31) << element.sign;
    return magnitude > 0x7F800000u ? element.nan : code;
}

// Twice the values of four E2M1 codes, the low nibbles of `codes`, as bytes. First the magnitudes of the positive ones
// (0 for the others) and of the negative ones; then their difference byte by byte, which 128 keeps from borrowing.
SNIPI_DEVICE uint32_t snipi_mma_twice(uint32_t codes) {
    const uint32_t positive = snipi_ptx_prmt(0x03020100u, 0x0C080604u, codes);
    const uint32_t negative = snipi_ptx_prmt(0x03020100u, 0x0C080604u, codes ^ 0x8888u);
    return (positive + 0x80808080u - negative) ^ 0x80808080u;
}

// E2M1 as E4M3: 0, 0.5, and the normal numbers 1 to 6, whose mantissa bit is E4M3's highest.
SNIPI_DEVICE uint32_t snipi_cuda_widen(uint32_t code) {
    const uint32_t magnitude = code & 7;
    return (code & 8) << 4 | (magnitude > 1 ? 0x30 + 4 * magnitude : 0x30 * magnitude);
}

// Four codes as they are stored: bytes, or nibbles in the low half.
template <int Format> SNIPI_DEVICE uint32_t snipi_cuda_pack(const uint32_t codes[4]) {
    const int bits = Format == SNIP_E2M1 || Format == SNIPI_E2M1_S8 ? 4 : 8;
    uint32_t word = 0;
    for (int i = 0; i < 4; i++) word |= (Format == SNIPI_E2M1_WIDE ? snipi_cuda_widen(codes[i]) : codes[i]) << bits * i;
    return Format == SNIPI_E2M1_S8 ? snipi_mma_twice(word) : word;
}

template <int Format> SNIPI_DEVICE void snipi_cuda_store4(uint8_t *to, uint32_t word) {
    if (Format == SNIP_E2M1)
        *(uint16_t *)to = (uint16_t)word;
    else
        *(uint32_t *)to = word;
}

// Four codes to nearest, of a tile that is not low. Hardware rounds FP8 as snip.h does.
template <int Format> SNIPI_DEVICE uint32_t snipi_cuda_nearest4(const float x[4], float inverse) {
    float y[4];
    for (int i = 0; i < 4; i++) y[i] = __fmul_rn(x[i], inverse);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (Format == SNIP_E4M3)
        return snipi_ptx_e4m3x2(y[0], y[1]) | snipi_ptx_e4m3x2(y[2], y[3]) << 16;
    else if constexpr (Format == SNIP_E5M2)
        return snipi_ptx_e5m2x2(y[0], y[1]) | snipi_ptx_e5m2x2(y[2], y[3]) << 16;
    else
#endif
    {
        uint32_t codes[4];
        int over;
        for (int i = 0; i < 4; i++) codes[i] = snipi_cuda_encode<Format>(y[i], 0, 0, &over);
        return snipi_cuda_pack<Format>(codes);
    }
}

// A low tile's elements and inverse scale are taken 2^64 times as large and as small: a subnormal x could matter to
// the code, and the product would lose it. As in snipi_encode_tile.
static const uint32_t SNIPI_LOW = (127u - 64u) << 23;  // 2^-64, as bits

SNIPI_DEVICE int snipi_cuda_is_low(uint32_t amax, float scale) { return amax < SNIPI_LOW || snipi_bits(scale) == 0; }

// An element's part of the statistics. Its error is taken in units of the scale, where nothing overflows, unless the
// tile is low.
SNIPI_DEVICE void snipi_cuda_tally(float x, float y, float weight, float element, float value, float scale, int low,
                                   snip_quant_stats *tally) {
    const int finite = !snipi_nonfinite(x);
    const double given = finite ? (double)x : 0;
    const double error = !finite ? 0 : low ? (double)(value - x) : (double)(element - y) * (double)scale;
    tally->sum_sq += given * given;
    tally->err_sq += error * error;
    tally->dot += (double)weight * error;
    tally->amax = snipi_float(snipi_cuda_amax(snipi_bits(tally->amax), x));
    tally->nonfinite += !finite;
}

// Four codes of any tile, as they are stored; with SNIPI_MEASURE their values and statistics.
template <int Format, int Mode>
SNIPI_DEVICE uint32_t snipi_cuda_encode4(snipi_cuda_four *four, const snipi_cuda_side &side,
                                         const snipi_cuda_shared *shared, int tile, snip_quant_stats *tally) {
    const float scale = shared->scale[tile];
    const int low = side.recipe.scale != SNIP_SCALE_NONE && snipi_cuda_is_low(shared->amax[tile], scale);
    const float inverse = low ? shared->inverse[tile] * snipi_float(SNIPI_LOW) : shared->inverse[tile];
    const int overflows = snipi_overflows(snipi_element_of(snipi_cuda_format<Format>()), scale);
    uint32_t codes[4];
    for (int i = 0; i < 4; i++) {
        const float x = four->x[i], y = __fmul_rn(low ? snipi_raise(x) : x, inverse);
        const int finite = !snipi_nonfinite(x);
        int over;
        codes[i] = snipi_cuda_encode<Format>(y, snipi_cuda_stochastic<Mode>(side), four->random[i], &over);
        if (overflows) over = snipi_nonfinite(scale * snipi_decode(codes[i], snipi_cuda_format<Format>()));
        tally->saturated += finite & over;
        if (Mode == SNIPI_MEASURE) {
            const float element = snipi_decode(codes[i], snipi_cuda_format<Format>());
            four->value[i] = snipi_value(scale, element);
            snipi_cuda_tally(x, y, four->weight[i], element, four->value[i], scale, low, tally);
        }
    }
    return snipi_cuda_pack<Format>(codes);
}

// ---- tiles ----
// The tile of a block's element (row, col), as quantized.
SNIPI_DEVICE int snipi_cuda_tile(const snipi_cuda_side &side, int row, int col) {
    if (side.recipe.tile_rows == SNIPI_BLOCK) return 0;
    return (row << (7 - side.log2_tile_cols)) + (col >> side.log2_tile_cols);
}

// The largest of `lanes` neighbours, a power of two.
SNIPI_DEVICE uint32_t snipi_cuda_lanes_max(uint32_t amax, int lanes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if (lanes == SNIPI_WARP) return __reduce_max_sync(SNIPI_ALL_LANES, amax);
#endif
    for (int distance = 1; distance < lanes; distance *= 2) {
        const uint32_t other = __shfl_xor_sync(SNIPI_ALL_LANES, amax, distance);
        amax = amax > other ? amax : other;
    }
    return amax;
}

SNIPI_DEVICE void snipi_cuda_clear(snipi_cuda_shared *shared) {
    for (int tile = (int)threadIdx.x; tile < SNIPI_TILES; tile += SNIPI_THREADS) shared->amax[tile] = 0;
    if (threadIdx.x == 0) shared->low = 0;
    __syncthreads();
}

// NVFP4's scale of the tensor S and its inverse 1/S, which is stored behind the tiles' bytes, at a multiple of 4.
SNIPI_DEVICE void snipi_cuda_tensor_scale(const snipi_cuda_quantize_work &work, const snipi_cuda_side &side,
                                          int64_t tiles, float *scale, float *inverse) {
    if (*work.amax) *inverse = snipi_divide(448.0f * 6.0f, snipi_float(*work.amax));
    *scale = snipi_divide(1.0f, *inverse);
    if (!side.scales || blockIdx.x != 0 || threadIdx.x != 0) return;
    for (; tiles % 4; tiles++) ((uint8_t *)side.scales)[tiles] = 0;
    ((float *)side.scales)[tiles / 4] = *scale;
}

// Scales of the block at (row0, col0), as quantized, from its tiles' largest magnitudes.
SNIPI_DEVICE void snipi_cuda_scales(const snipi_cuda_quantize_work &work, const snipi_cuda_side &side,
                                    snipi_cuda_shared *shared, snip_format format, int64_t row0, int64_t col0) {
    const int single = side.recipe.tile_rows == SNIPI_BLOCK, log2_across = 7 - side.log2_tile_cols;
    const int tiles = single ? 1 : SNIPI_BLOCK << log2_across;
    const int64_t across = (side.cols + (1 << side.log2_tile_cols) - 1) >> side.log2_tile_cols;
    const int64_t down = single ? (side.rows + SNIPI_BLOCK - 1) / SNIPI_BLOCK : side.rows;
    float tensor_scale = 1.0f, tensor_inverse = 1.0f;

    __syncthreads();
    if (side.recipe.scale == SNIP_SCALE_UE4M3)
        snipi_cuda_tensor_scale(work, side, down * across, &tensor_scale, &tensor_inverse);
    for (int tile = (int)threadIdx.x; tile < tiles; tile += SNIPI_THREADS) {
        const int64_t row = single ? row0 / SNIPI_BLOCK : row0 + (tile >> log2_across);
        const int64_t col = (col0 >> side.log2_tile_cols) + (tile & ((1 << log2_across) - 1));
        const uint32_t amax = shared->amax[tile];
        const snipi_tile_scale s = snipi_scale_of(side.recipe.scale, snipi_element_of(format), amax, tensor_scale,
                                                  tensor_inverse);
        shared->scale[tile] = s.scale;
        shared->inverse[tile] = s.inverse;
        if (amax && snipi_cuda_is_low(amax, s.scale)) shared->low = 1;
        if (snipi_overflows(snipi_element_of(format), s.scale)) shared->low = 1;  // its elements are counted one by one
        if (!side.scales || side.recipe.scale == SNIP_SCALE_NONE || row >= down || col >= across) continue;
        if (snipi_byte_scale(side.recipe.scale))
            ((uint8_t *)side.scales)[row * across + col] = (uint8_t)s.byte;
        else
            ((float *)side.scales)[row * across + col] = s.scale;
    }
    __syncthreads();
}

// ---- statistics ----
// The sum of all threads' statistics, in thread 0. sums and amax: shared memory.
SNIPI_DEVICE snip_quant_stats snipi_cuda_stats_sum(snip_quant_stats stats, double *sums, uint32_t *amax) {
    stats.sum_sq = snipi_cuda_block_sum(stats.sum_sq, sums);
    if (threadIdx.x == 0) *amax = 0;  // the sum's barriers have ended its last use, and the next begin this one
    stats.err_sq = snipi_cuda_block_sum(stats.err_sq, sums);
    stats.dot = snipi_cuda_block_sum(stats.dot, sums);
    stats.nonfinite = (int64_t)snipi_cuda_block_sum((double)stats.nonfinite, sums);
    stats.saturated = (int64_t)snipi_cuda_block_sum((double)stats.saturated, sums);
    atomicMax(amax, snipi_bits(stats.amax));
    __syncthreads();
    stats.amax = snipi_float(*amax);
    return stats;
}

// One thread block adds the others' parts.
static __global__ void snipi_cuda_stats_kernel(const snip_quant_stats *parts, int64_t n, snip_quant_stats *stats,
                                               int add) {
    __shared__ double sums[SNIPI_THREADS / SNIPI_WARP];
    __shared__ uint32_t amax;
    snip_quant_stats own = { 0, 0, 0, 0, 0, 0 };
    if (add && threadIdx.x == 0) own = *stats;
    for (int64_t i = threadIdx.x; i < n; i += SNIPI_THREADS) {
        own.sum_sq += parts[i].sum_sq;
        own.err_sq += parts[i].err_sq;
        own.dot += parts[i].dot;
        own.amax = own.amax > parts[i].amax ? own.amax : parts[i].amax;
        own.nonfinite += parts[i].nonfinite;
        own.saturated += parts[i].saturated;
    }
    own = snipi_cuda_stats_sum(own, sums, &amax);
    if (threadIdx.x == 0) *stats = own;
}

SNIPI_DEVICE void snipi_cuda_count(unsigned long long *count, int64_t n) {
    if (n) atomicAdd(count, (unsigned long long)n);
}

// A thread's counts and statistics of one orientation.
template <int Mode>
SNIPI_DEVICE void snipi_cuda_side_end(const snipi_cuda_side &side, const snip_quant_stats &tally,
                                      snipi_cuda_shared *shared) {
    if (side.counts) snipi_cuda_count(side.counts + 1, tally.saturated);
    if (Mode != SNIPI_MEASURE || !side.parts) return;
    const snip_quant_stats stats = snipi_cuda_stats_sum(tally, shared->sums, &shared->amax[0]);
    if (threadIdx.x == 0) side.parts[blockIdx.x] = stats;
}

// ---- straight ----
// (row0, col0): the block's first element in x. held: this thread's elements, if Held.
template <int Held>
SNIPI_DEVICE void snipi_cuda_straight_amax(const snipi_cuda_quantize_work &work, snipi_cuda_shared *shared,
                                           const float held[SNIPI_ROWS][4], int64_t row0, int64_t col0) {
    const int row = snipi_warp() * SNIPI_ROWS, lane = snipi_lane();
    const int lanes = 1 << (work.straight.log2_tile_cols - 2);  // of a tile's row
    int bad = 0;
#pragma unroll(Held ? SNIPI_ROWS : 1)
    for (int i = 0; i < SNIPI_ROWS; i++) {
        float x[4];
        uint32_t amax = 0;
        if (!Held) snipi_cuda_row4(work, row0 + row + i, col0 + 4 * lane, x);
        for (int j = 0; j < 4; j++) {
            amax = snipi_cuda_amax(amax, Held ? held[i][j] : x[j]);
            bad += snipi_nonfinite(Held ? held[i][j] : x[j]);
        }
        amax = snipi_cuda_lanes_max(amax, lanes);
        if (lane % lanes == 0) atomicMax(&shared->amax[snipi_cuda_tile(work.straight, row + i, 4 * lane)], amax);
    }
    if (work.straight.counts) snipi_cuda_count(work.straight.counts, bad);
}

template <int Format>
SNIPI_DEVICE void snipi_cuda_straight_held(const snipi_cuda_side &side, const snipi_cuda_shared *shared,
                                           const float held[SNIPI_ROWS][4], int64_t row0, int64_t col0) {
    const int row = snipi_warp() * SNIPI_ROWS, col = snipi_lane() * 4;
    if (!side.codes) return;
#pragma unroll
    for (int i = 0; i < SNIPI_ROWS; i++) {
        const float inverse = shared->inverse[snipi_cuda_tile(side, row + i, col)];
        uint8_t *to = side.codes + (row0 + row + i) * side.row_bytes;  // [row_bytes]
        snipi_cuda_store4<Format>(to + (col0 + col) / 4 * snipi_cuda_word<Format>(),
                                  snipi_cuda_nearest4<Format>(held[i], inverse));
    }
}

// n of four codes and values to where (row, col) of x says.
template <int Format>
SNIPI_DEVICE void snipi_cuda_straight_codes(const snipi_cuda_side &side, int64_t row, int64_t col, int n,
                                            uint32_t word) {
    uint8_t *to = side.codes + row * side.row_bytes + (Format == SNIP_E2M1 ? col >> 1 : col);
    if (side.aligned && n == 4)
        snipi_cuda_store4<Format>(to, word);
    else
        for (int b = 0; b < (Format == SNIP_E2M1 ? (n + 1) / 2 : n); b++) to[b] = (uint8_t)(word >> 8 * b);
}

SNIPI_DEVICE void snipi_cuda_straight_values(const snipi_cuda_quantize_work &work, int64_t row, int64_t col, int n,
                                             const float values[4]) {
    const int64_t at = row * work.ld_out + col;
    for (int j = 0; j < 4; j++) {
        if (j >= n) continue;
        if (work.out_bf16)
            ((uint16_t *)work.out)[at + j] = (uint16_t)snipi_bf16_round(snipi_bits(values[j]));
        else
            ((float *)work.out)[at + j] = values[j];
    }
}

template <int Format, int Mode>
SNIPI_DEVICE void snipi_cuda_straight_any(const snipi_cuda_quantize_work &work, snipi_cuda_shared *shared, int64_t row0,
                                          int64_t col0) {
    const snipi_cuda_side &side = work.straight;
    const int down = snipi_warp() * SNIPI_ROWS, along = snipi_lane() * 4;
    const int64_t col = col0 + along;
    const int n = col >= side.cols ? 0 : (int)snipi_min(4, side.cols - col);
    const snip_rng_key key = snipi_cuda_key(work, work.key);
    snip_quant_stats tally = { 0, 0, 0, 0, 0, 0 };
#pragma unroll 1
    for (int i = 0; i < SNIPI_ROWS && n && row0 + down + i < side.rows; i++) {
        const int64_t row = row0 + down + i;
        snipi_cuda_four four = {};
        snipi_cuda_row4(work, row, col, four.x);
        if (snipi_cuda_stochastic<Mode>(side))
            snipi_cuda_random4(key, (uint64_t)row * (uint64_t)side.cols + (uint64_t)col, four.random);
        if constexpr (Mode == SNIPI_MEASURE)
            for (int j = 0; j < 4; j++)
                if (j < n && work.weight) four.weight[j] = work.weight[row * work.ld + col + j];

        const int tile = snipi_cuda_tile(side, down + i, along);
        const uint32_t word = snipi_cuda_encode4<Format, Mode>(&four, side, shared, tile, &tally);
        if (side.codes) snipi_cuda_straight_codes<Format>(side, row, col, n, word);
        if constexpr (Mode == SNIPI_MEASURE)
            if (work.out) snipi_cuda_straight_values(work, row, col, n, four.value);
    }
    snipi_cuda_side_end<Mode>(side, tally, shared);
}

// ---- turned ----
template <int Held>
SNIPI_DEVICE void snipi_cuda_turned_amax(const snipi_cuda_quantize_work &work, snipi_cuda_shared *shared,
                                         const float held[SNIPI_ROWS][4], int64_t row0, int64_t col0) {
    const int row = snipi_warp() * SNIPI_ROWS, lane = snipi_lane();
    int bad = 0;
#pragma unroll(Held ? 4 : 1)
    for (int j = 0; j < 4; j++) {
        const int col = Held ? 4 * lane + j : lane + SNIPI_WARP * j;
        uint32_t amax = 0;
#pragma unroll(Held ? SNIPI_ROWS : 4)
        for (int i = 0; i < SNIPI_ROWS; i++) {
            const float x = Held ? held[i][j] : snipi_cuda_at(work, row0 + row + i, col0 + col);
            amax = snipi_cuda_amax(amax, x);
            bad += snipi_nonfinite(x);
        }
        atomicMax(&shared->amax[snipi_cuda_tile(work.turned, col, row)], amax);
    }
    if (work.turned.counts) snipi_cuda_count(work.turned.counts, bad);
}

// Where a column's codes of 16 rows, the chunk-th of eight, lie in shared memory. Chunks are permuted, so that neither
// the threads that write them nor those that read them meet in one bank.
template <int Format> SNIPI_DEVICE uint8_t *snipi_cuda_chunk(snipi_cuda_shared *shared, int col, int chunk) {
    const int place = col * 8 + (chunk ^ ((col ^ col >> 3) & 7));
    return (uint8_t *)shared->codes + place * 4 * snipi_cuda_word<Format>();
}

template <int Format>
SNIPI_DEVICE void snipi_cuda_turned_held(const snipi_cuda_side &side, snipi_cuda_shared *shared,
                                         const float held[SNIPI_ROWS][4]) {
    const int warp = snipi_warp(), lane = snipi_lane();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int col = 4 * lane + j;
        const float inverse = shared->inverse[snipi_cuda_tile(side, col, SNIPI_ROWS * warp)];
        uint8_t *to = snipi_cuda_chunk<Format>(shared, col, warp);
        uint32_t words[4];
#pragma unroll
        for (int g = 0; g < 4; g++) {
            const float x[4] = { held[4 * g][j], held[4 * g + 1][j], held[4 * g + 2][j], held[4 * g + 3][j] };
            words[g] = snipi_cuda_nearest4<Format>(x, inverse);
        }
        if (Format == SNIP_E2M1)
            *(uint2 *)to = make_uint2(words[0] | words[1] << 16, words[2] | words[3] << 16);
        else
            *(uint4 *)to = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

template <int Format, int Mode>
SNIPI_DEVICE void snipi_cuda_turned_any(const snipi_cuda_quantize_work &work, snipi_cuda_shared *shared, int64_t row0,
                                        int64_t col0) {
    const snipi_cuda_side &side = work.turned;
    const int warp = snipi_warp(), lane = snipi_lane();
    const snip_rng_key key = snipi_cuda_key(work, work.key_t);
    snip_quant_stats tally = { 0, 0, 0, 0, 0, 0 };
#pragma unroll 1
    for (int i = 0; i < SNIPI_ROWS; i++) {  // four of a column's rows at a time
        const int along = lane + SNIPI_WARP * (i / 4), down = SNIPI_ROWS * warp + i % 4 * 4;
        const int64_t row = row0 + down, col = col0 + along;
        snipi_cuda_four four = {};
        snipi_cuda_column4(work, row, col, four.x);
        if (snipi_cuda_stochastic<Mode>(side))
            snipi_cuda_random4(key, (uint64_t)col * (uint64_t)side.cols + (uint64_t)row, four.random);
        if constexpr (Mode == SNIPI_MEASURE)
            for (int j = 0; j < 4; j++)
                if (row + j < work.rows && col < work.cols && work.weight)
                    four.weight[j] = work.weight[(row + j) * work.ld + col];

        const int tile = snipi_cuda_tile(side, along, down);
        const uint32_t word = snipi_cuda_encode4<Format, Mode>(&four, side, shared, tile, &tally);
        uint8_t *to = snipi_cuda_chunk<Format>(shared, along, warp);
        snipi_cuda_store4<Format>(to + i % 4 * snipi_cuda_word<Format>(), word);
    }
    snipi_cuda_side_end<Mode>(side, tally, shared);
}

// Out of shared memory, 16 codes a thread.
template <int Format>
SNIPI_DEVICE void snipi_cuda_turned_store(const snipi_cuda_side &side, snipi_cuda_shared *shared, int64_t row0,
                                          int64_t col0) {
    const int size = 4 * snipi_cuda_word<Format>();
    __syncthreads();
    for (int t = (int)threadIdx.x; side.codes && t < SNIPI_BLOCK * 8; t += SNIPI_THREADS) {
        const uint8_t *from = snipi_cuda_chunk<Format>(shared, t / 8, t % 8);
        const int64_t byte = row0 / 16 * size + t % 8 * size, col = col0 + t / 8;
        const int n = col >= side.rows || byte >= side.row_bytes ? 0 : (int)snipi_min(size, side.row_bytes - byte);
        uint8_t *to = side.codes + col * side.row_bytes + byte;
        if (!side.aligned || n < size)
            for (int b = 0; b < n; b++) to[b] = from[b];
        else if (Format == SNIP_E2M1)
            *(uint2 *)to = *(const uint2 *)from;
        else
            *(uint4 *)to = *(const uint4 *)from;
    }
}

// ---- the kernel ----
template <class Element>
SNIPI_DEVICE void snipi_cuda_hold(const snipi_cuda_quantize_work &work, int64_t row0, int64_t col0,
                                  float held[SNIPI_ROWS][4]) {
    const int64_t at = (row0 + threadIdx.x / SNIPI_WARP * SNIPI_ROWS) * work.ld + col0 + threadIdx.x % SNIPI_WARP * 4;
#pragma unroll
    for (int i = 0; i < SNIPI_ROWS; i++) snipi_cuda_load4((const Element *)work.x + at + i * work.ld, held[i]);
}

template <int Format, int Mode>
static __global__ void __launch_bounds__(SNIPI_THREADS, 2)
    snipi_cuda_quantize_kernel(const snipi_cuda_quantize_work work) {
    __shared__ snipi_cuda_shared shared;
    const snip_format format = snipi_cuda_format<Format>();
    const int64_t across = (work.cols + SNIPI_BLOCK - 1) / SNIPI_BLOCK;
    const int64_t row0 = blockIdx.x / across * SNIPI_BLOCK, col0 = blockIdx.x % across * SNIPI_BLOCK;
    const int straight = work.straight.recipe.format != 0, turned = work.turned.recipe.format != 0;
    const int interior = row0 + SNIPI_BLOCK <= work.rows && col0 + SNIPI_BLOCK <= work.cols;
    const int hold = Mode == SNIPI_NEAREST && work.held && interior;
    float held[SNIPI_ROWS][4];

    if (work.more && blockIdx.x == 0 && threadIdx.x < 2)
        atomicAdd((straight ? work.straight.counts : work.turned.counts) + threadIdx.x, work.more[threadIdx.x]);
    if (hold) {
        if (work.bf16)
            snipi_cuda_hold<uint16_t>(work, row0, col0, held);
        else
            snipi_cuda_hold<float>(work, row0, col0, held);
    }

    if (turned) {  // first, because out may be x; after the barrier in turned_store it reads codes alone
        snipi_cuda_clear(&shared);
        if (hold)
            snipi_cuda_turned_amax<1>(work, &shared, held, row0, col0);
        else
            snipi_cuda_turned_amax<0>(work, &shared, held, row0, col0);
        snipi_cuda_scales(work, work.turned, &shared, format, col0, row0);
        if (hold && !shared.low)
            snipi_cuda_turned_held<Format>(work.turned, &shared, held);
        else
            snipi_cuda_turned_any<Format, Mode>(work, &shared, row0, col0);
        snipi_cuda_turned_store<Format>(work.turned, &shared, row0, col0);
    }

    if (straight) {
        snipi_cuda_clear(&shared);
        if (hold)
            snipi_cuda_straight_amax<1>(work, &shared, held, row0, col0);
        else
            snipi_cuda_straight_amax<0>(work, &shared, held, row0, col0);
        snipi_cuda_scales(work, work.straight, &shared, format, row0, col0);
        if (hold && !shared.low)
            snipi_cuda_straight_held<Format>(work.straight, &shared, held, row0, col0);
        else
            snipi_cuda_straight_any<Format, Mode>(work, &shared, row0, col0);
    }
}

// Largest magnitude of a tensor; a thread block takes a row at a time. *amax is 0 before.
template <class Element>
static __global__ void snipi_cuda_amax_kernel(const Element *x, int64_t rows, int64_t cols, int64_t ld,
                                              uint32_t *amax) {
    uint32_t largest = 0;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
        for (int64_t col = threadIdx.x; col < cols; col += blockDim.x)
            largest = snipi_cuda_amax(largest, snipi_cuda_load(x + row * ld + col));
    largest = snipi_cuda_lanes_max(largest, SNIPI_WARP);
    if (threadIdx.x % SNIPI_WARP == 0) atomicMax(amax, largest);
}

// ---- on the host ----
typedef void (*snipi_cuda_quantize_fn)(const snipi_cuda_quantize_work);

template <int Format> static snipi_cuda_quantize_fn snipi_cuda_quantize_of(int mode) {
    return mode == SNIPI_NEAREST      ? snipi_cuda_quantize_kernel<Format, SNIPI_NEAREST>
           : mode == SNIPI_STOCHASTIC ? snipi_cuda_quantize_kernel<Format, SNIPI_STOCHASTIC>
                                      : snipi_cuda_quantize_kernel<Format, SNIPI_MEASURE>;
}

static snipi_cuda_quantize_fn snipi_cuda_quantize_of(snip_format format, snip_cuda_codes form, int mode) {
    if (format == SNIP_E4M3) return snipi_cuda_quantize_of<SNIP_E4M3>(mode);
    if (format == SNIP_E5M2) return snipi_cuda_quantize_of<SNIP_E5M2>(mode);
    if (form == SNIP_CUDA_S8_BYTES) return snipi_cuda_quantize_of<SNIPI_E2M1_S8>(mode);
    return form == SNIP_CUDA_PACKED ? snipi_cuda_quantize_of<SNIP_E2M1>(mode)
                                    : snipi_cuda_quantize_of<SNIPI_E2M1_WIDE>(mode);
}

static int snipi_cuda_recipe_ok(const snip_recipe *recipe) {
    const int cols = recipe->tile_cols;
    if (recipe->format != SNIP_E4M3 && recipe->format != SNIP_E5M2 && recipe->format != SNIP_E2M1) return 0;
    if (recipe->scale == SNIP_SCALE_NONE) return 1;
    if (recipe->tile_rows == SNIPI_BLOCK) return cols == SNIPI_BLOCK;
    return recipe->tile_rows == 1 && (cols == 16 || cols == 32 || cols == 64 || cols == 128);
}

// Whether rounding to nearest may put an element beyond the largest. It may not where the scale follows from the
// tile's largest element and is not rounded down.
static int snipi_cuda_may_saturate(const snip_recipe *recipe) {
    return recipe->scale != SNIP_SCALE_POW2 && recipe->scale != SNIP_SCALE_F32 && recipe->scale != SNIP_SCALE_UE8M0_UP;
}

static int64_t snipi_cuda_blocks(int64_t rows, int64_t cols) {
    return snipi_ceil_div(rows, SNIPI_BLOCK) * snipi_ceil_div(cols, SNIPI_BLOCK);
}

// Bytes of a row of SNIP_CUDA_S8_BYTES: TMA reads rows that begin at multiples of 16.
static int64_t snipi_cuda_s8_row(int64_t cols) { return snipi_round_up(cols, 16); }

// together: how many codes are stored at once where they are aligned.
static snipi_cuda_side snipi_cuda_side_of(const snip_recipe *recipe, snip_cuda_codes form, int64_t rows, int64_t cols,
                                          void *codes, void *scales, int together) {
    const int e2m1 = recipe->format == SNIP_E2M1, packed = e2m1 && form == SNIP_CUDA_PACKED;
    const int bytes = packed ? together / 2 : together;
    snipi_cuda_side side = {};
    side.recipe = *recipe;
    if (recipe->scale == SNIP_SCALE_NONE) {  // tiles of scale 1
        side.recipe.tile_rows = 1;
        side.recipe.tile_cols = SNIPI_BLOCK;
    }
    while (1 << side.log2_tile_cols < side.recipe.tile_cols) side.log2_tile_cols++;
    side.rows = rows;
    side.cols = cols;
    side.row_bytes = packed ? (cols + 1) / 2 : e2m1 && form == SNIP_CUDA_S8_BYTES ? snipi_cuda_s8_row(cols) : cols;
    side.codes = (uint8_t *)codes;
    side.scales = scales;
    side.aligned = side.row_bytes % bytes == 0 && (uintptr_t)codes % (uintptr_t)bytes == 0;
    return side;
}

// Scratch: the tensor's largest magnitude, then from here on the thread blocks' statistics, of straight and of turned.
enum { SNIPI_PARTS = 256 };  // bytes, a multiple of what any access wants

SNIP_API size_t snip_cuda_quantize_scratch(int64_t rows, int64_t cols) {
    if (!snipi_shape_ok(rows, cols, cols)) return 0;
    return SNIPI_PARTS + 2 * (size_t)snipi_cuda_blocks(rows, cols) * sizeof(snip_quant_stats);
}

// What a session wants of the quantizer beyond snip_quantize_job.
typedef struct {
    uint32_t tensor_t;                      // key.tensor of the transposed matrix
    const uint32_t *step;                   // in place of the key's, in device memory; or NULL
    unsigned long long *counts, *counts_t;  // added to, by orientation: NaN and infinity, saturated; or NULL
    const unsigned long long *more;         // two more for the first of these; or NULL
    int add_stats;                          // statistics are added to
} snipi_cuda_options;

static int snipi_cuda_is_nvfp4(const snip_recipe *recipe) { return recipe && recipe->scale == SNIP_SCALE_UE4M3; }

static snip_status snipi_cuda_quantize_check(const snip_quantize_job *job, snip_cuda_codes form,
                                             const snip_quant_stats *stats, const snip_quant_stats *stats_t,
                                             const void *scratch) {
    if (!job || (form != SNIP_CUDA_PACKED && form != SNIP_CUDA_E4M3_BYTES && form != SNIP_CUDA_S8_BYTES))
        return SNIP_BAD_ARGUMENT;

    snip_quantize_job portable = *job;
    portable.isa = SNIP_ISA_BEST;
    const snip_status status = snipi_job_check(&portable);
    if (status) return status;

    const snip_recipe *recipe = job->recipe, *recipe_t = job->recipe_t;
    const int64_t blocks = snipi_cuda_blocks(job->rows, job->cols);
    if ((stats && !recipe) || (stats_t && !recipe_t)) return SNIP_BAD_ARGUMENT;
    if (recipe && !snipi_cuda_recipe_ok(recipe)) return SNIP_UNSUPPORTED;
    if (recipe_t && !snipi_cuda_recipe_ok(recipe_t)) return SNIP_UNSUPPORTED;
    if (blocks > INT32_MAX) return SNIP_UNSUPPORTED;
    if (blocks > 0 && !scratch && (stats || stats_t || snipi_cuda_is_nvfp4(recipe) || snipi_cuda_is_nvfp4(recipe_t)))
        return SNIP_BAD_ARGUMENT;
    return SNIP_OK;
}

static snipi_cuda_quantize_work snipi_cuda_quantize_work_of(const snip_quantize_job *job, snip_cuda_codes form,
                                                            const snip_quant_stats *stats,
                                                            const snip_quant_stats *stats_t, void *scratch,
                                                            const snipi_cuda_options &options) {
    const snip_recipe *recipe = job->recipe, *recipe_t = job->recipe_t;
    snip_quant_stats *parts = (snip_quant_stats *)((char *)scratch + SNIPI_PARTS);
    snipi_cuda_quantize_work work = {};
    work.x = job->x;
    work.weight = job->weight;
    work.rows = job->rows;
    work.cols = job->cols;
    work.ld = job->ld;
    work.bf16 = job->x_format == SNIP_BF16;
    work.vectors = job->ld % 4 == 0 && (uintptr_t)job->x % (work.bf16 ? 8 : 16) == 0;
    work.out = job->out;
    work.ld_out = job->ld_out;
    work.out_bf16 = job->out_format == SNIP_BF16;
    work.key = work.key_t = job->key;
    work.key_t.tensor = options.tensor_t;
    work.step = options.step;
    work.more = options.more;
    work.amax = (const uint32_t *)scratch;
    work.held = work.vectors;
    if (recipe) {
        work.straight = snipi_cuda_side_of(recipe, form, job->rows, job->cols, job->codes, job->scales, 4);
        work.straight.counts = options.counts;
        if (stats) work.straight.parts = parts;
        work.held &= work.straight.aligned && !(options.counts && snipi_cuda_may_saturate(recipe));
    }
    if (recipe_t) {
        work.turned = snipi_cuda_side_of(recipe_t, form, job->cols, job->rows, job->codes_t, job->scales_t, 16);
        work.turned.counts = options.counts_t;
        if (stats_t) work.turned.parts = parts + snipi_cuda_blocks(job->rows, job->cols);
        work.held &= !(options.counts_t && snipi_cuda_may_saturate(recipe_t));
    }
    return work;
}

template <class Element>
static snip_status snipi_cuda_tensor_amax(const snip_quantize_job *job, void *amax, cudaStream_t stream) {
    const int64_t blocks = snipi_min(job->rows, 4096);  // enough for any GPU; each ends in atomics on one word
    if (cudaMemsetAsync(amax, 0, sizeof(uint32_t), stream) != cudaSuccess) return SNIP_DEVICE;
    return snipi_cuda_launch(snipi_cuda_amax_kernel<Element>, blocks, SNIPI_THREADS, 0, stream, (const Element *)job->x,
                             job->rows, job->cols, job->ld, (uint32_t *)amax);
}

static snip_status snipi_cuda_stats(const snip_quant_stats *parts, int64_t n, snip_quant_stats *stats, int add,
                                    cudaStream_t stream) {
    return snipi_cuda_launch(snipi_cuda_stats_kernel, 1, SNIPI_THREADS, 0, stream, parts, n, stats, add);
}

static snip_status snipi_cuda_quantize(const snip_quantize_job *job, snip_cuda_codes form, snip_quant_stats *stats,
                                       snip_quant_stats *stats_t, void *scratch, const snipi_cuda_options &options,
                                       cudaStream_t stream);

// One orientation after the other. The transposed one comes first, because out may be x.
static snip_status snipi_cuda_quantize_apart(const snip_quantize_job *job, snip_cuda_codes form,
                                             snip_quant_stats *stats, snip_quant_stats *stats_t, void *scratch,
                                             const snipi_cuda_options &options, cudaStream_t stream) {
    snip_quantize_job straight = *job, turned = *job;
    snipi_cuda_options uncounted = options;
    uncounted.more = NULL;
    turned.recipe = NULL;
    turned.codes = turned.scales = turned.out = NULL;
    straight.recipe_t = NULL;
    straight.codes_t = straight.scales_t = NULL;
    const snip_status status = snipi_cuda_quantize(&turned, form, NULL, stats_t, scratch, uncounted, stream);
    return status ? status : snipi_cuda_quantize(&straight, form, stats, NULL, scratch, options, stream);
}

static snip_status snipi_cuda_quantize(const snip_quantize_job *job, snip_cuda_codes form, snip_quant_stats *stats,
                                       snip_quant_stats *stats_t, void *scratch, const snipi_cuda_options &options,
                                       cudaStream_t stream) {
    snip_status status = snipi_cuda_quantize_check(job, form, stats, stats_t, scratch);
    if (status) return status;

    const snip_recipe *recipe = job->recipe, *recipe_t = job->recipe_t, *either = recipe ? recipe : recipe_t;
    const int64_t blocks = snipi_cuda_blocks(job->rows, job->cols);
    if (recipe && recipe_t && (recipe->format != recipe_t->format || recipe->rounding != recipe_t->rounding))
        return snipi_cuda_quantize_apart(job, form, stats, stats_t, scratch, options, stream);
    if (blocks == 0) {
        if (stats && cudaMemsetAsync(stats, 0, sizeof *stats, stream) != cudaSuccess) return SNIP_DEVICE;
        if (stats_t && cudaMemsetAsync(stats_t, 0, sizeof *stats_t, stream) != cudaSuccess) return SNIP_DEVICE;
        return SNIP_OK;
    }

    if (snipi_cuda_is_nvfp4(recipe) || snipi_cuda_is_nvfp4(recipe_t))
        status = job->x_format == SNIP_BF16 ? snipi_cuda_tensor_amax<uint16_t>(job, scratch, stream)
                                            : snipi_cuda_tensor_amax<float>(job, scratch, stream);
    const int mode = stats || stats_t || job->out                ? SNIPI_MEASURE
                     : either->rounding == SNIP_ROUND_STOCHASTIC ? SNIPI_STOCHASTIC
                                                                 : SNIPI_NEAREST;
    const snipi_cuda_quantize_work work = snipi_cuda_quantize_work_of(job, form, stats, stats_t, scratch, options);
    if (!status)
        status = snipi_cuda_launch(snipi_cuda_quantize_of(either->format, form, mode), blocks, SNIPI_THREADS, 0, stream,
                                   work);
    if (!status && stats) status = snipi_cuda_stats(work.straight.parts, blocks, stats, options.add_stats, stream);
    if (!status && stats_t) status = snipi_cuda_stats(work.turned.parts, blocks, stats_t, options.add_stats, stream);
    return status;
}

SNIP_API snip_status snip_cuda_quantize(const snip_quantize_job *job, snip_cuda_codes form, snip_quant_stats *stats,
                                        snip_quant_stats *stats_t, void *scratch, cudaStream_t stream) {
    const snipi_cuda_options options = { job ? job->key.tensor : 0, NULL, NULL, NULL, NULL, 0 };
    return snipi_cuda_quantize(job, form, stats, stats_t, scratch, options, stream);
}

// ---- reading codes ----
// Any quantized matrix [rows][cols], to be read element by element.
typedef struct {
    snip_recipe recipe;
    const uint8_t *codes;
    const void *scales;
    int64_t row_bytes, tile_rows, tile_cols, tiles_across;
    const float *tensor_scale;
} snipi_cuda_reader;

static snipi_cuda_reader snipi_cuda_reader_of(const snip_recipe *recipe, const void *codes, const void *scales,
                                              int64_t rows, int64_t cols) {
    snipi_cuda_reader reader = {};
    reader.recipe = *recipe;
    reader.codes = (const uint8_t *)codes;
    reader.scales = scales;
    reader.row_bytes = (int64_t)snipi_row_bytes(recipe->format, cols);
    reader.tile_rows = snipi_tile(recipe->tile_rows, rows);
    reader.tile_cols = snipi_tile(recipe->tile_cols, cols);
    reader.tiles_across = snipi_ceil_div(cols, reader.tile_cols);
    if (recipe->scale == SNIP_SCALE_UE4M3)
        reader.tensor_scale = (const float *)snipi_tensor_scale_at(recipe, scales, rows, cols);
    return reader;
}

SNIPI_DEVICE float snipi_cuda_scale_at(const snipi_cuda_reader &reader, int64_t tile) {
    const uint8_t *bytes = (const uint8_t *)reader.scales;
    switch (reader.recipe.scale) {
        case SNIP_SCALE_NONE: break;
        case SNIP_SCALE_F32:
        case SNIP_SCALE_POW2: return ((const float *)reader.scales)[tile];
        case SNIP_SCALE_UE8M0:
        case SNIP_SCALE_UE8M0_UP: return snipi_ue8m0_decode(bytes[tile]);
        case SNIP_SCALE_UE4M3: return snipi_multiply(snipi_decode(bytes[tile] & 127u, SNIP_E4M3), *reader.tensor_scale);
    }
    return 1.0f;
}

SNIPI_DEVICE float snipi_cuda_scale(const snipi_cuda_reader &reader, int64_t row, int64_t tile_col) {
    return snipi_cuda_scale_at(reader, row / reader.tile_rows * reader.tiles_across + tile_col);
}

SNIPI_DEVICE uint32_t snipi_cuda_code(const snipi_cuda_reader &reader, int64_t row, int64_t col) {
    const uint8_t *codes = reader.codes + row * reader.row_bytes;
    return reader.recipe.format == SNIP_E2M1 ? codes[col >> 1] >> (col & 1) * 4 & 15u : codes[col];
}

SNIPI_DEVICE float snipi_cuda_element(const snipi_cuda_reader &reader, int64_t row, int64_t col) {
    const uint8_t *codes = reader.codes + row * reader.row_bytes;
    if (reader.recipe.format == SNIP_F32) return ((const float *)codes)[col];
    if (reader.recipe.format == SNIP_BF16) return snipi_cuda_load((const uint16_t *)codes + col);
    return snipi_value(snipi_cuda_scale(reader, row, col / reader.tile_cols),
                       snipi_decode(snipi_cuda_code(reader, row, col), reader.recipe.format));
}

struct snipi_cuda_dequantized {
    snipi_cuda_reader reader;
    int64_t cols, ld;
    void *x;
    int bf16;

    __device__ void operator()(int64_t i) const {
        const int64_t row = i / cols, col = i % cols;
        const float value = snipi_cuda_element(reader, row, col);
        if (bf16)
            ((uint16_t *)x)[row * ld + col] = (uint16_t)snipi_bf16_round(snipi_bits(value));
        else
            ((float *)x)[row * ld + col] = value;
    }
};

SNIP_API snip_status snip_cuda_dequantize(const snip_recipe *recipe, const void *codes, const void *scales,
                                          int64_t rows, int64_t cols, void *x, snip_format x_format, int64_t ld,
                                          cudaStream_t stream) {
    if (!snipi_recipe_ok(recipe) || !snipi_shape_ok(rows, cols, ld) || !snipi_element_size(x_format))
        return SNIP_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return SNIP_OK;
    if (!codes || !x || (!scales && recipe->scale != SNIP_SCALE_NONE)) return SNIP_BAD_ARGUMENT;

    const snipi_cuda_reader reader = snipi_cuda_reader_of(recipe, codes, scales, rows, cols);
    const snipi_cuda_dequantized each = { reader, cols, ld, x, x_format == SNIP_BF16 };
    return snipi_cuda_each(each, rows * cols, stream);
}

// >>cuda-noise-impl ------------------------------------------------------------------------------------------------
// Signs come in groups of SNIPI_SIGNS (128), one counter's four words. A warp takes 32 groups: each lane makes one
// group's words, then they are handed round. A lane's four elements of a group have their signs in word lane / 8, from
// bit 4 * lane % 32 on.
SNIPI_DEVICE uint32_t snipi_cuda_signs(const uint32_t words[4], int group) {
    const int lane = snipi_lane();
    uint32_t mine = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const uint32_t word = __shfl_sync(SNIPI_ALL_LANES, words[w], group);
        if (lane / 8 == w) mine = word;
    }
    return mine >> (4 * (lane % 8));
}

// visit(i, sign) for this thread's elements of n; sign is 0 or the sign bit of a float.
template <class Visit> SNIPI_DEVICE void snipi_cuda_each_sign(int64_t n, snip_rng_key key, Visit visit) {
    const int64_t span = (int)SNIPI_WARP * (int)SNIPI_SIGNS, spans = (n + span - 1) / span;  // a warp's elements
    const int64_t warps = (int64_t)gridDim.x * (blockDim.x / SNIPI_WARP);
    const int lane = snipi_lane();
    for (int64_t s = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / SNIPI_WARP; s < spans; s += warps) {
        uint32_t words[4];
        snipi_philox(key, (uint64_t)(s * SNIPI_WARP + lane), words);
        for (int group = 0; group < SNIPI_WARP; group++) {
            const int64_t i = (s * SNIPI_WARP + group) * SNIPI_SIGNS + 4 * lane;
            const uint32_t signs = snipi_cuda_signs(words, group);
            for (int j = 0; j < 4; j++)
                if (i + j < n) visit(i + j, (signs >> j & 1u) << 31);
        }
    }
}

// device_scale: where the scale lies in device memory; NULL: it is `scale`.
static __global__ void snipi_cuda_noise_add_kernel(float *out, const float *x, int64_t n, float scale,
                                                   const double *device_scale, const float *shape, snip_rng_key key) {
    if (device_scale) scale = (float)*device_scale;
    snipi_cuda_each_sign(n, key, [=](int64_t i, uint32_t sign) {
        const float noise = shape ? __fmul_rn(scale, shape[i]) : scale;
        out[i] = __fadd_rn(x[i], snipi_float(snipi_bits(noise) ^ sign));
    });
}

static __global__ void snipi_cuda_noise_dot_kernel(const float *x, int64_t n, snip_rng_key key, double *parts) {
    __shared__ double sums[SNIPI_THREADS / SNIPI_WARP];
    double sum = 0;
    snipi_cuda_each_sign(n, key,
                         [&](int64_t i, uint32_t sign) { sum += (double)snipi_float(snipi_bits(x[i]) ^ sign); });
    sum = snipi_cuda_block_sum(sum, sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

static snip_status snipi_cuda_add_noise(float *out, const float *x, int64_t n, float scale, const double *device_scale,
                                        const float *shape, snip_rng_key key, cudaStream_t stream) {
    return snipi_cuda_launch(snipi_cuda_noise_add_kernel, snipi_cuda_grid(n, (int)SNIPI_THREADS * SNIPI_SIGNS),
                             SNIPI_THREADS, 0, stream, out, x, n, scale, device_scale, shape, key);
}

// *dot (+)= the sum of noise[i] * x[i]
static snip_status snipi_cuda_dot_noise(const float *x, int64_t n, snip_rng_key key, double *dot, int add,
                                        void *scratch, cudaStream_t stream) {
    const int64_t blocks = snipi_cuda_sum_blocks(n);
    const snip_status status = snipi_cuda_launch(snipi_cuda_noise_dot_kernel, blocks, SNIPI_THREADS, 0, stream, x, n,
                                                 key, (double *)scratch);
    return status ? status : snipi_cuda_sum(scratch, blocks, dot, 1, add, stream);
}

SNIP_API snip_status snip_cuda_noise_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                         snip_rng_key key, cudaStream_t stream) {
    if (n < 0 || (n > 0 && (!out || !x))) return SNIP_BAD_ARGUMENT;
    return n ? snipi_cuda_add_noise(out, x, n, scale, NULL, shape, key, stream) : SNIP_OK;
}

SNIP_API snip_status snip_cuda_noise_dot(const float *x, int64_t n, snip_rng_key key, double *dot, void *scratch,
                                         cudaStream_t stream) {
    if (n < 0 || !dot || !scratch || (n > 0 && !x)) return SNIP_BAD_ARGUMENT;
    return snipi_cuda_dot_noise(x, n, key, dot, 0, scratch, stream);
}

// Gaussian noise: a thread makes that of four elements, one counter's, at a time.
struct snipi_cuda_gauss_added {
    float *out;
    const float *x;
    int64_t n;
    float scale;
    const float *shape;
    snip_rng_key key;

    __device__ void operator()(int64_t counter) const {
        float noise[4];
        snipi_gauss(key, (uint64_t)counter, noise);
        for (int j = 0; j < 4; j++) {
            const int64_t i = 4 * counter + j;
            if (i < n) out[i] = __fadd_rn(x[i], __fmul_rn(noise[j], shape ? __fmul_rn(scale, shape[i]) : scale));
        }
    }
};

struct snipi_cuda_gauss_term {
    const float *x;
    int64_t n;
    snip_rng_key key;

    __device__ double operator()(int64_t counter) const {
        float noise[4];
        double sum = 0;
        snipi_gauss(key, (uint64_t)counter, noise);
        for (int j = 0; j < 4; j++)
            if (4 * counter + j < n) sum += (double)x[4 * counter + j] * (double)noise[j];
        return sum;
    }
};

SNIP_API snip_status snip_cuda_gauss_add(float *out, const float *x, int64_t n, float scale, const float *shape,
                                         snip_rng_key key, cudaStream_t stream) {
    if (n < 0 || (n > 0 && (!out || !x))) return SNIP_BAD_ARGUMENT;
    if (n == 0) return SNIP_OK;
    const snipi_cuda_gauss_added added = { out, x, n, scale, shape, key };
    return snipi_cuda_each(added, snipi_ceil_div(n, 4), stream);
}

SNIP_API snip_status snip_cuda_gauss_dot(const float *x, int64_t n, snip_rng_key key, double *dot, void *scratch,
                                         cudaStream_t stream) {
    if (n < 0 || !dot || !scratch || (n > 0 && !x)) return SNIP_BAD_ARGUMENT;
    const snipi_cuda_gauss_term term = { x, n, key };
    return snipi_cuda_reduce(term, snipi_ceil_div(n, 4), dot, 1, 0, scratch, stream);
}

// >>cuda-gemm-impl -------------------------------------------------------------------------------------------------
// What all GEMM kernels take, and the one that the others are tested against. All but that one make blocks of C of 128
// rows; all add to C's float32 the partial sums of a block of k, times both scales, as snip_gemm does.
typedef struct {
    snipi_cuda_reader reader;
    int64_t rows;           // of the operand: m or n
    int64_t across, along;  // of F32 and BF16: element (row, k) lies at row * across + k * along
    int plain;              // F32 or BF16
    int round_bf16;
    int aligned;  // 16 bytes of codes, or four floats of a row, may be read at once
} snipi_cuda_operand;

typedef struct {
    snipi_cuda_operand a, b;
    int64_t m, n, k, ldc;
    int64_t block;  // of exact integer sums along k; 0: float sums
    float *c;
    const float *bias;
    int accumulate;
    int pairs;                      // two floats of a row of C may be read or written at once
    unsigned long long *nonfinite;  // counts C's where the operands are plain; or NULL
} snipi_cuda_gemm_work;

SNIPI_DEVICE float snipi_cuda_operand_at(const snipi_cuda_operand &operand, int64_t row, int64_t k) {
    if (!operand.plain) return snipi_cuda_element(operand.reader, row, k);
    const int64_t at = row * operand.across + k * operand.along;
    const void *x = operand.reader.codes;
    const float value = operand.reader.recipe.format == SNIP_BF16 ? snipi_cuda_load((const uint16_t *)x + at)
                                                                  : ((const float *)x)[at];
    return operand.round_bf16 ? snipi_float(snipi_bf16_round(snipi_bits(value)) << 16) : value;
}

SNIPI_DEVICE int snipi_cuda_twice(const snipi_cuda_operand &operand, int64_t row, int64_t k) {
    return (int)(2.0f * snipi_decode(snipi_cuda_code(operand.reader, row, k), SNIP_E2M1));
}

SNIPI_DEVICE float snipi_cuda_begin_c(const snipi_cuda_gemm_work &work, int64_t row, int64_t col) {
    return work.accumulate ? work.c[row * work.ldc + col] : work.bias ? work.bias[col] : 0.0f;
}

SNIPI_DEVICE void snipi_cuda_end_c(const snipi_cuda_gemm_work &work, int64_t row, int64_t col, float c) {
    work.c[row * work.ldc + col] = work.accumulate && work.bias ? __fadd_rn(c, work.bias[col]) : c;
}

// c + scale_a * scale_b * sum. Scales of exact sums are halved, because these are of doubled elements.
SNIPI_DEVICE float snipi_cuda_add_block(float scale_a, float scale_b, float sum, float c) {
    return fmaf(__fmul_rn(scale_a, scale_b), sum, c);
}

static __global__ void snipi_cuda_gemm_reference_kernel(const snipi_cuda_gemm_work work) {  // 16 x 16 of C
    const snipi_cuda_reader &a = work.a.reader, &b = work.b.reader;
    const int64_t across = (work.n + 15) / 16;
    const int64_t row = blockIdx.x / across * 16 + threadIdx.x / 16, col = blockIdx.x % across * 16 + threadIdx.x % 16;
    const int64_t step = work.block ? work.block : (int64_t)SNIPI_KC_F32;
    if (row >= work.m || col >= work.n) return;

    float c = snipi_cuda_begin_c(work, row, col);
    for (int64_t k0 = 0; k0 < work.k; k0 += step) {
        const int64_t end = snipi_min(work.k, k0 + step);
        if (work.block) {
            int32_t sum = 0;
            for (int64_t k = k0; k < end; k++)
                sum += snipi_cuda_twice(work.a, row, k) * snipi_cuda_twice(work.b, col, k);
            c = snipi_cuda_add_block(0.5f * snipi_cuda_scale(a, row, k0 / a.tile_cols),
                                     0.5f * snipi_cuda_scale(b, col, k0 / b.tile_cols), (float)sum, c);
        } else {
            float sum = 0;
            for (int64_t k = k0; k < end; k++)
                sum = fmaf(snipi_cuda_operand_at(work.a, row, k), snipi_cuda_operand_at(work.b, col, k), sum);
            c += sum;
        }
    }
    snipi_cuda_end_c(work, row, col, c);
}

// The first row and column of the thread block's 128 x 128 of C.
SNIPI_DEVICE void snipi_cuda_block_of_c(const snipi_cuda_gemm_work &work, int64_t *m0, int64_t *n0) {
    const int64_t across = (work.n + SNIPI_BLOCK - 1) / SNIPI_BLOCK;
    *m0 = blockIdx.x / across * SNIPI_BLOCK;
    *n0 = blockIdx.x % across * SNIPI_BLOCK;
}

// >>cuda-gemm-mma --------------------------------------------------------------------------------------------------
// Tensor cores by mma.sync. A thread block makes 128 x 128 of C from tiles of 128 rows by 64 bytes of k, eight warps of
// 64 x 32 each. While a warp multiplies, the next tiles' codes are on their way from memory to registers; then they are
// stored to the other half of shared memory, E2M1 as twice its value, FP8 as it is. After every 128 elements of k the
// partial sums are added to C's times both scales.
enum {
    SNIPI_MMA_BYTES = 64,                           // of a tile's row
    SNIPI_MMA_TILE = SNIPI_BLOCK * SNIPI_MMA_BYTES  // bytes
};

// A kernel's Kind: what it multiplies.
enum {
    SNIPI_MMA_S8,   // E2M1, doubled, as INT8
    SNIPI_MMA_FP8,  // FP8
    SNIPI_MMA_F16   // FP8 as FP16
};

template <int Kind> using snipi_mma_sum = typename std::conditional<Kind == SNIPI_MMA_S8, int32_t, float>::type;

// Integer sums begin at the bits of 1.5 * 2^23, so that as float bits they are that plus the sum.
template <int Kind> SNIPI_DEVICE constexpr snipi_mma_sum<Kind> snipi_mma_start() {
    return (snipi_mma_sum<Kind>)(Kind == SNIPI_MMA_S8 ? 0x4B400000 : 0);
}

template <int Kind> SNIPI_DEVICE float snipi_mma_float(snipi_mma_sum<Kind> sum) {
    return Kind == SNIPI_MMA_S8 ? snipi_float((uint32_t)sum) - 12582912.0f : (float)sum;  // 1.5 * 2^23
}

typedef struct {
    uint4 tile[2][2][SNIPI_MMA_TILE / 16];  // [half][A, B]
    float scale[2][2][SNIPI_BLOCK];         // [block of k % 2][A, B][row]
} snipi_mma_shared;

// What is on its way from memory: this thread's 16-byte pieces of A's and B's tile, and a row's scale.
typedef struct {
    uint4 codes[2][2];
    float scale;
} snipi_mma_next;

// Where a thread works: the block's first row and column of C, and the warp's within the block.
typedef struct {
    int64_t m0, n0;
    int warp_m, warp_n, lane;
} snipi_mma_place;

SNIPI_DEVICE snipi_mma_place snipi_mma_place_of(const snipi_cuda_gemm_work &work) {
    snipi_mma_place place;
    snipi_cuda_block_of_c(work, &place.m0, &place.n0);
    place.warp_m = snipi_warp() % 2 * 64;
    place.warp_n = snipi_warp() / 2 * 32;
    place.lane = snipi_lane();
    return place;
}

// A thread's sums are [4][4][4]: 16 rows further, 8 columns further, and mma's own four. Their rows and columns of C:
SNIPI_DEVICE int64_t snipi_mma_row(const snipi_mma_place &place, int i, int e) {
    return place.m0 + place.warp_m + 16 * i + place.lane / 4 + 8 * (e / 2);
}

SNIPI_DEVICE int64_t snipi_mma_col(const snipi_mma_place &place, int j, int e) {
    return place.n0 + place.warp_n + 8 * j + place.lane % 4 * 2 + e % 2;
}

SNIPI_DEVICE void snipi_mma_begin_c(const snipi_cuda_gemm_work &work, const snipi_mma_place &place, float c[4][4][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int64_t row = snipi_mma_row(place, i, e), col = snipi_mma_col(place, j, e);
                c[i][j][e] = row < work.m && col < work.n ? snipi_cuda_begin_c(work, row, col) : 0.0f;
            }
}

// A tile's row is four pieces of 16 bytes. Those of two rows are permuted by their line of 128 bytes, so that eight
// rows' pieces lie in different banks.
SNIPI_DEVICE uint4 *snipi_mma_chunk(uint4 *tile, int row, int chunk) {
    return tile + row * 4 + (chunk ^ (row >> 1 & 3));
}

// Operands of 32 of a tile's bytes, half 0 or 1: 64 rows of A, 32 of B.
SNIPI_DEVICE void snipi_mma_fragments(uint4 tile[2][SNIPI_MMA_TILE / 16], const snipi_mma_place &place, int half,
                                      uint32_t a[4][4], uint32_t b[2][4]) {
    const int lane = place.lane;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = place.warp_m + 16 * i + lane % 16;
        snipi_ptx_ldmatrix4(a[i], snipi_mma_chunk(tile[0], row, 2 * half + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int row = place.warp_n + 16 * j + lane % 8 + lane / 16 * 8;
        snipi_ptx_ldmatrix4(b[j], snipi_mma_chunk(tile[1], row, 2 * half + lane / 8 % 2));
    }
}

// 16 bytes of a row's codes, zeros beyond the edges. Of an odd number of E2M1 codes, the last byte holds one.
SNIPI_DEVICE uint4 snipi_mma_fetch(const snipi_cuda_operand &operand, int64_t k, int64_t row, int64_t byte) {
    const int64_t row_bytes = operand.reader.row_bytes;
    const uint8_t *from = operand.reader.codes + row * row_bytes + byte;
    uint32_t words[4] = { 0, 0, 0, 0 };
    if (row < operand.rows && byte < row_bytes) {
        if (operand.aligned) return *(const uint4 *)from;
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (byte + i < row_bytes) {
                uint32_t code = from[i];
                if (operand.reader.recipe.format == SNIP_E2M1 && (k & 1) && byte + i == row_bytes - 1) code &= 15;
                words[i / 4] |= code << i % 4 * 8;
            }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Two of four FP8 bytes, the even ones, as FP16: E4M3 times 2^-8, E5M2 as it is.
template <int Format> SNIPI_DEVICE uint32_t snipi_mma_half2(uint32_t codes) {
    if (Format == SNIP_E5M2) return (codes & 0x00FF00FFu) << 8;
    const uint32_t nan = ((codes & 0x007F007Fu) + 0x00010001u) & 0x00800080u;
    return (codes & 0x00800080u) << 8 | (codes & 0x007F007Fu) << 7 | nan * 0xF8u;
}

// What the products lack, to go into the scale: the doubled elements' half, FP16's 2^8.
template <int Kind, int Format> SNIPI_DEVICE constexpr float snipi_mma_post() {
    return Kind == SNIPI_MMA_S8 ? 0.5f : Kind == SNIPI_MMA_F16 && Format == SNIP_E4M3 ? 256.0f : 1.0f;
}

template <int FormatA, int FormatB>
SNIPI_DEVICE void snipi_mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {  // the same elements of k in A and B, in whatever order
        uint32_t a16[4], b16[2];
#pragma unroll
        for (int i = 0; i < 4; i++) a16[i] = snipi_mma_half2<FormatA>(a[i] >> 8 * odd);
#pragma unroll
        for (int i = 0; i < 2; i++) b16[i] = snipi_mma_half2<FormatB>(b[i] >> 8 * odd);
        snipi_ptx_mma_f16(d, a16, b16);
    }
}

template <int FormatA, int FormatB>
SNIPI_DEVICE void snipi_mma_fp8(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    if constexpr (FormatA == SNIP_E4M3 && FormatB == SNIP_E4M3)
        snipi_ptx_mma_e4m3_e4m3(d, a, b);
    else if constexpr (FormatA == SNIP_E4M3)
        snipi_ptx_mma_e4m3_e5m2(d, a, b);
    else if constexpr (FormatB == SNIP_E4M3)
        snipi_ptx_mma_e5m2_e4m3(d, a, b);
    else
        snipi_ptx_mma_e5m2_e5m2(d, a, b);
}

// Twice the values of 16 E2M1 codes as bytes.
SNIPI_DEVICE uint4 snipi_mma_twice16(uint32_t low, uint32_t high) {
    return make_uint4(snipi_mma_twice(low), snipi_mma_twice(low >> 16), snipi_mma_twice(high),
                      snipi_mma_twice(high >> 16));
}

// A thread takes one piece of either tile from packed E2M1, two to a row, or two from FP8, four to a row.
template <int Kind> SNIPI_DEVICE constexpr int snipi_mma_pieces() { return Kind == SNIPI_MMA_S8 ? 1 : 2; }

template <int Kind> SNIPI_DEVICE constexpr int snipi_mma_across() { return Kind == SNIPI_MMA_S8 ? 2 : 4; }

template <int Kind, int FormatA, int FormatB>
SNIPI_DEVICE void snipi_mma_fetch_tiles(const snipi_cuda_gemm_work &work, const snipi_mma_place &place, int64_t t,
                                        snipi_mma_next *next) {
    const int thread = (int)threadIdx.x, across = snipi_mma_across<Kind>();
#pragma unroll
    for (int f = 0; f < snipi_mma_pieces<Kind>(); f++) {
        const int piece = thread + SNIPI_THREADS * f;
        const int64_t byte = t * across * 16 + piece % across * 16;
        next->codes[0][f] = snipi_mma_fetch(work.a, work.k, place.m0 + piece / across, byte);
        next->codes[1][f] = snipi_mma_fetch(work.b, work.k, place.n0 + piece / across, byte);
    }
    if (t % 2) return;
    // A block of 128 of k begins: half the threads fetch a scale of A's rows, half of B's.
    if (thread < SNIPI_BLOCK) {
        const int64_t row = place.m0 + thread;
        const float scale = row < work.m ? snipi_cuda_scale(work.a.reader, row, t / 2) : 0.0f;
        next->scale = snipi_mma_post<Kind, FormatA>() * scale;
    } else {
        const int64_t row = place.n0 + thread - SNIPI_BLOCK;
        const float scale = row < work.n ? snipi_cuda_scale(work.b.reader, row, t / 2) : 0.0f;
        next->scale = snipi_mma_post<Kind, FormatB>() * scale;
    }
}

template <int Kind>
SNIPI_DEVICE void snipi_mma_store_tiles(const snipi_mma_next &next, int64_t t, snipi_mma_shared *shared) {
    const int thread = (int)threadIdx.x, across = snipi_mma_across<Kind>();
#pragma unroll
    for (int f = 0; f < snipi_mma_pieces<Kind>(); f++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int piece = thread + SNIPI_THREADS * f, row = piece / across, chunk = piece % across;
            const uint4 codes = next.codes[side][f];
            uint4 *tile = shared->tile[t & 1][side];
            if (Kind == SNIPI_MMA_S8) {  // a piece becomes two
                uint4 *first = snipi_mma_chunk(tile, row, 2 * chunk),
                      *second = snipi_mma_chunk(tile, row, 2 * chunk + 1);
                *first = snipi_mma_twice16(codes.x, codes.y);
                *second = snipi_mma_twice16(codes.z, codes.w);
            } else
                *snipi_mma_chunk(tile, row, chunk) = codes;
        }
    if (t % 2 == 0) shared->scale[t / 2 & 1][thread / SNIPI_BLOCK][thread % SNIPI_BLOCK] = next.scale;
}

template <int Kind, int FormatA, int FormatB>
SNIPI_DEVICE void snipi_mma_multiply(uint4 tile[2][SNIPI_MMA_TILE / 16], const snipi_mma_place &place,
                                     snipi_mma_sum<Kind> d[4][4][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[4][4], b[2][4];
        snipi_mma_fragments(tile, place, half, a, b);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t *b_of_j = b[j / 2] + j % 2 * 2;
                if constexpr (Kind == SNIPI_MMA_S8)
                    snipi_ptx_mma_s8(d[i][j], a[i], b_of_j);
                else if constexpr (Kind == SNIPI_MMA_F16)
                    snipi_mma_f16<FormatA, FormatB>(d[i][j], a[i], b_of_j);
                else
                    snipi_mma_fp8<FormatA, FormatB>(d[i][j], a[i], b_of_j);
            }
    }
}

// C's get the partial sums times both scales, [A, B][row]; the sums begin anew.
template <int Kind>
SNIPI_DEVICE void snipi_mma_promote(const float scale[2][SNIPI_BLOCK], const snipi_mma_place &place,
                                    snipi_mma_sum<Kind> d[4][4][4], float c[4][4][4]) {
    const float *scale_a = scale[0] + place.warp_m + place.lane / 4;
    const float *scale_b = scale[1] + place.warp_n + place.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                c[i][j][e] = snipi_cuda_add_block(scale_a[16 * i + 8 * (e / 2)], scale_b[8 * j + e % 2],
                                                  snipi_mma_float<Kind>(d[i][j][e]), c[i][j][e]);
                d[i][j][e] = snipi_mma_start<Kind>();
            }
}

template <int Kind, int FormatA, int FormatB>
SNIPI_DEVICE void snipi_mma_kernel_body(const snipi_cuda_gemm_work &work) {
    __shared__ snipi_mma_shared shared;
    const snipi_mma_place place = snipi_mma_place_of(work);
    const int64_t tiles = (work.k + SNIPI_MMA_BYTES - 1) / SNIPI_MMA_BYTES;
    snipi_mma_sum<Kind> d[4][4][4];
    float c[4][4][4];
    snipi_mma_next next;

    snipi_mma_begin_c(work, place, c);
#pragma unroll
    for (int i = 0; i < 64; i++) d[i / 16][i / 4 % 4][i % 4] = snipi_mma_start<Kind>();

    for (int64_t t = -1; t < tiles; t++) {
        if (t + 1 < tiles) snipi_mma_fetch_tiles<Kind, FormatA, FormatB>(work, place, t + 1, &next);
        if (t >= 0) {
            snipi_mma_multiply<Kind, FormatA, FormatB>(shared.tile[t & 1], place, d);
            if ((t & 1) || t == tiles - 1) snipi_mma_promote<Kind>(shared.scale[t / 2 & 1], place, d, c);
        }
        if (t + 1 < tiles) snipi_mma_store_tiles<Kind>(next, t + 1, &shared);
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int64_t row = snipi_mma_row(place, i, e), col = snipi_mma_col(place, j, e);
                if (row < work.m && col < work.n) snipi_cuda_end_c(work, row, col, c[i][j][e]);
            }
}

// Empty where the instructions are missing: snip_cuda_gemm sees that, and does not launch it.
template <int Kind, int FormatA, int FormatB>
static __global__ void __launch_bounds__(SNIPI_THREADS, 1) snipi_mma_kernel(const snipi_cuda_gemm_work work) {
#if defined(__CUDA_ARCH__)
    if constexpr (__CUDA_ARCH__ >= 800 &&
                  Kind != (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200 ? SNIPI_MMA_F16 : SNIPI_MMA_FP8))
#endif
        snipi_mma_kernel_body<Kind, FormatA, FormatB>(work);
}

// >>cuda-gemm-plain ------------------------------------------------------------------------------------------------
// F32 and BF16 operands. Both kernels make 128 x 128 of C, and a thread's loads run along whichever way the operand
// lies.

// Row, and place in the row, of the n-th of a tile's pieces, `across` of them to a row.
SNIPI_DEVICE void snipi_plain_place(const snipi_cuda_operand &operand, int n, int across, int *row, int *piece) {
    const int turned = operand.along != 1;
    *row = turned ? n % SNIPI_BLOCK : n / across;
    *piece = turned ? n / SNIPI_BLOCK : n % across;
}

SNIPI_DEVICE float snipi_plain_at(const snipi_cuda_operand &operand, int64_t row, int64_t k, int64_t k_end) {
    return row < operand.rows && k < k_end ? snipi_cuda_operand_at(operand, row, k) : 0.0f;
}

SNIPI_DEVICE void snipi_plain_end(const snipi_cuda_gemm_work &work, int64_t row, int64_t col, float c, int *bad) {
    if (row >= work.m || col >= work.n) return;
    if (work.accumulate && work.bias) c = __fadd_rn(c, work.bias[col]);
    work.c[row * work.ldc + col] = c;
    *bad += snipi_nonfinite(c);
}

SNIPI_DEVICE void snipi_plain_count(const snipi_cuda_gemm_work &work, int bad) {
    if (bad && work.nonfinite) atomicAdd(work.nonfinite, (unsigned long long)bad);
}

// BF16: as mma's kernel, 32 elements of k at a time, with C's sums kept by the tensor cores.
SNIPI_DEVICE void snipi_bf16_fetch(const snipi_cuda_operand &operand, int64_t row, int64_t k, int64_t k_end,
                                   float x[8]) {
    if (operand.aligned && row < operand.rows && k + 8 <= k_end) {
        const float *from = (const float *)operand.reader.codes + row * operand.across + k;
        snipi_cuda_load4(from, x);
        snipi_cuda_load4(from + 4, x + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = snipi_plain_at(operand, row, k + i, k_end);
    }
}

SNIPI_DEVICE void snipi_bf16_kernel_body(const snipi_cuda_gemm_work &work) {
    __shared__ uint4 tile[2][2][SNIPI_MMA_TILE / 16];  // [half][A, B]
    const snipi_mma_place place = snipi_mma_place_of(work);
    const int thread = (int)threadIdx.x;
    const int64_t tiles = (work.k + 31) / 32;
    float c[4][4][4], next[2][2][8];  // next: [A, B][piece]
    int bad = 0;

    snipi_mma_begin_c(work, place, c);
    for (int64_t t = -1; t < tiles; t++) {
        if (t + 1 < tiles) {
#pragma unroll
            for (int f = 0; f < 4; f++) {
                const snipi_cuda_operand &operand = f / 2 ? work.b : work.a;
                int row, chunk;
                snipi_plain_place(operand, thread + SNIPI_THREADS * (f % 2), 4, &row, &chunk);
                snipi_bf16_fetch(operand, (f / 2 ? place.n0 : place.m0) + row, 32 * (t + 1) + 8 * chunk, work.k,
                                 next[f / 2][f % 2]);
            }
        }
        if (t >= 0) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t a[4][4], b[2][4];
                snipi_mma_fragments(tile[t & 1], place, half, a, b);
#pragma unroll
                for (int i = 0; i < 16; i++) snipi_ptx_mma_bf16(c[i / 4][i % 4], a[i / 4], b[i % 4 / 2] + i % 2 * 2);
            }
        }
        if (t + 1 < tiles) {
#pragma unroll
            for (int f = 0; f < 4; f++) {
                const float *x = next[f / 2][f % 2];
                int row, chunk;
                snipi_plain_place(f / 2 ? work.b : work.a, thread + SNIPI_THREADS * (f % 2), 4, &row, &chunk);
                uint4 *to = snipi_mma_chunk(tile[(t + 1) & 1][f / 2], row, chunk);
                *to = make_uint4(snipi_ptx_bf16x2(x[0], x[1]), snipi_ptx_bf16x2(x[2], x[3]),
                                 snipi_ptx_bf16x2(x[4], x[5]), snipi_ptx_bf16x2(x[6], x[7]));
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 64; i++)
        snipi_plain_end(work, snipi_mma_row(place, i / 16, i % 4), snipi_mma_col(place, i / 4 % 4, i % 4),
                        c[i / 16][i / 4 % 4][i % 4], &bad);
    snipi_plain_count(work, bad);
}

static __global__ void __launch_bounds__(SNIPI_THREADS, 1) snipi_bf16_kernel(const snipi_cuda_gemm_work work) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    snipi_bf16_kernel_body(work);
#endif
}

// F32: 16 elements of k at a time. A thread has four times 4 x 4 of C, 64 rows and columns apart.
enum {
    SNIPI_F32_K = 16,                // elements of k in a tile
    SNIPI_F32_ROW = SNIPI_BLOCK + 4  // floats; padded, so that a row's elements lie in different banks
};

static __global__ void __launch_bounds__(SNIPI_THREADS, 1) snipi_f32_kernel(const snipi_cuda_gemm_work work) {
    __shared__ float4 tile[2][2][SNIPI_F32_K * SNIPI_F32_ROW / 4];  // [half][A, B][k][row]
    const int thread = (int)threadIdx.x, down = thread / 16 * 4, along = thread % 16 * 4;
    const int64_t tiles = (work.k + SNIPI_F32_K - 1) / SNIPI_F32_K;
    int64_t m0, n0;
    float c[8][8], next[2][8];  // next: [A, B][element]
    int bad = 0;

    snipi_cuda_block_of_c(work, &m0, &n0);
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int64_t row = m0 + down + i / 32 * 64 + i / 8 % 4, col = n0 + along + i % 8 / 4 * 64 + i % 4;
        c[i / 8][i % 8] = row < work.m && col < work.n ? snipi_cuda_begin_c(work, row, col) : 0.0f;
    }

    for (int64_t t = -1; t < tiles; t++) {
        if (t + 1 < tiles) {
#pragma unroll
            for (int f = 0; f < 16; f++) {
                const snipi_cuda_operand &operand = f / 8 ? work.b : work.a;
                int row, k;
                snipi_plain_place(operand, thread + SNIPI_THREADS * (f % 8), SNIPI_F32_K, &row, &k);
                next[f / 8][f % 8] = snipi_plain_at(operand, (f / 8 ? n0 : m0) + row, SNIPI_F32_K * (t + 1) + k,
                                                    work.k);
            }
        }
        if (t >= 0) {
            const float *a = (const float *)tile[t & 1][0] + down, *b = (const float *)tile[t & 1][1] + along;
#pragma unroll
            for (int k = 0; k < SNIPI_F32_K; k++, a += SNIPI_F32_ROW, b += SNIPI_F32_ROW) {
                float x[8], y[8];
                snipi_cuda_load4(a, x);
                snipi_cuda_load4(a + 64, x + 4);
                snipi_cuda_load4(b, y);
                snipi_cuda_load4(b + 64, y + 4);
#pragma unroll
                for (int i = 0; i < 64; i++) c[i / 8][i % 8] = fmaf(x[i / 8], y[i % 8], c[i / 8][i % 8]);
            }
        }
        if (t + 1 < tiles) {
#pragma unroll
            for (int f = 0; f < 16; f++) {
                int row, k;
                snipi_plain_place(f / 8 ? work.b : work.a, thread + SNIPI_THREADS * (f % 8), SNIPI_F32_K, &row, &k);
                ((float *)tile[(t + 1) & 1][f / 8])[k * SNIPI_F32_ROW + row] = next[f / 8][f % 8];
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 64; i++)
        snipi_plain_end(work, m0 + down + i / 32 * 64 + i / 8 % 4, n0 + along + i % 8 / 4 * 64 + i % 4, c[i / 8][i % 8],
                        &bad);
    snipi_plain_count(work, bad);
}

// >>cuda-gemm-tma --------------------------------------------------------------------------------------------------
// What Hopper's and datacenter Blackwell's kernels have in common. A persistent thread block for each multiprocessor
// makes one block of C after another, of 128 rows and Columns columns. One warpgroup produces: a thread lets TMA copy
// 128 bytes of each row of A and B to one of several stages of shared memory, and all its threads fetch rows' scales of
// A and of B. Two warpgroups consume. Barriers: full, when both have come; empty, when every consuming warp has read
// the stage.
enum {
    SNIPI_WARPGROUP = 128,                   // threads
    SNIPI_STAGED = 192 * 1024,               // bytes of all stages: of 227 KiB that a thread block may have
    SNIPI_TMA_SHARED = SNIPI_STAGED + 1024,  // bytes of dynamic shared memory: the stages begin at a multiple of 1024
    SNIPI_RASTER = 8                         // blocks of C side by side that are made at a time
};

template <int Columns> struct snipi_tma_shared {
    enum { BytesOfStage = (SNIPI_BLOCK + Columns) * 128, Stages = SNIPI_STAGED / BytesOfStage };

    uint64_t full[Stages], empty[Stages];
    float scale[Stages][SNIPI_BLOCK + Columns];  // of A's rows, of B's
};

static_assert(SNIPI_BLOCK == 128, "a stage is of TMA's boxes, each at a multiple of 1024 bytes");

// A place in the ring of stages, and the parity of its barriers' phase.
typedef struct {
    int stage, parity;
} snipi_tma_ring;

template <int Columns> SNIPI_DEVICE void snipi_tma_advance(snipi_tma_ring *ring) {
    if (++ring->stage < snipi_tma_shared<Columns>::Stages) return;
    ring->stage = 0;
    ring->parity ^= 1;
}

SNIPI_DEVICE char *snipi_tma_stages() { return (char *)(((uintptr_t)snipi_ptx_dynamic_shared() + 1023) / 1024 * 1024); }

SNIPI_DEVICE int64_t snipi_tma_blocks(const snipi_cuda_gemm_work &work, int columns) {
    return (work.m + SNIPI_BLOCK - 1) / SNIPI_BLOCK * ((work.n + columns - 1) / columns);
}

// The t-th block of C: down columns of SNIPI_RASTER blocks, so that those made at one time share rows and columns in
// the cache.
template <int Columns>
SNIPI_DEVICE void snipi_tma_block(const snipi_cuda_gemm_work &work, int64_t t, int64_t *m0, int64_t *n0) {
    const int64_t down = (work.m + SNIPI_BLOCK - 1) / SNIPI_BLOCK, across = (work.n + Columns - 1) / Columns;
    const int64_t column = t / (SNIPI_RASTER * down), in = t % (SNIPI_RASTER * down);
    const int64_t width = snipi_min(SNIPI_RASTER, across - column * SNIPI_RASTER);
    *m0 = in / width * SNIPI_BLOCK;
    *n0 = (column * SNIPI_RASTER + in % width) * Columns;
}

template <int Columns> SNIPI_DEVICE void snipi_tma_barriers(snipi_tma_shared<Columns> *shared) {
    for (int s = 0; s < shared->Stages; s++) {
        snipi_ptx_barrier_init(&shared->full[s], SNIPI_WARPGROUP + 1);
        snipi_ptx_barrier_init(&shared->empty[s], 2 * SNIPI_WARPGROUP / SNIPI_WARP);
    }
}

// Scales of one block of k: of a row of A, and of rows of B 128 apart. 0 beyond the edges.
template <int Wide> struct snipi_tma_scales { float a, b[Wide]; };

template <int Wide>
SNIPI_DEVICE void snipi_tma_fetch_scales(const snipi_cuda_gemm_work &work, int64_t row_a, int64_t row_b, int64_t at_a,
                                         const int64_t at_b[Wide], int block, snipi_tma_scales<Wide> *scales) {
    scales->a = row_a < work.m ? snipi_cuda_scale_at(work.a.reader, at_a + block) : 0.0f;
#pragma unroll
    for (int j = 0; j < Wide; j++)
        scales->b[j] = row_b + SNIPI_BLOCK * j < work.n ? snipi_cuda_scale_at(work.b.reader, at_b[j] + block) : 0.0f;
}

// blocks: of C, and along k. post: what the products lack, to go into the scales.
template <int Columns>
SNIPI_DEVICE void snipi_tma_produce(const snipi_cuda_gemm_work &work, const CUtensorMap *map_a,
                                    const CUtensorMap *map_b, char *stages, snipi_tma_shared<Columns> *shared,
                                    int64_t blocks_of_c, int blocks_of_k, float post) {
    enum { Wide = Columns / SNIPI_BLOCK };

    const int thread = (int)threadIdx.x;
    snipi_tma_ring ring = { 0, 1 };  // of the empty barriers: the first wait is for a phase before the first
    for (int64_t t = blockIdx.x; t < blocks_of_c; t += gridDim.x) {
        int64_t m0, n0;
        snipi_tma_block<Columns>(work, t, &m0, &n0);
        const int64_t row_a = m0 + thread, row_b = n0 + thread;
        const int64_t at_a = row_a / work.a.reader.tile_rows * work.a.reader.tiles_across;
        int64_t at_b[Wide];
#pragma unroll
        for (int j = 0; j < Wide; j++)
            at_b[j] = (row_b + SNIPI_BLOCK * j) / work.b.reader.tile_rows * work.b.reader.tiles_across;
        snipi_tma_scales<Wide> next;
        snipi_tma_fetch_scales<Wide>(work, row_a, row_b, at_a, at_b, 0, &next);

        for (int kb = 0; kb < blocks_of_k; kb++) {
            const snipi_tma_scales<Wide> scales = next;
            if (kb + 1 < blocks_of_k) snipi_tma_fetch_scales<Wide>(work, row_a, row_b, at_a, at_b, kb + 1, &next);

            uint64_t *full = &shared->full[ring.stage];
            snipi_ptx_barrier_wait(&shared->empty[ring.stage], ring.parity);
            if (thread == 0) {
                char *to = stages + ring.stage * shared->BytesOfStage;
                snipi_ptx_barrier_arrive_expect(full, shared->BytesOfStage);
                snipi_ptx_tma_load(to, map_a, full, kb * SNIPI_BLOCK, (int)m0);
#pragma unroll
                for (int j = 0; j < Wide; j++)
                    snipi_ptx_tma_load(to + (1 + j) * SNIPI_BLOCK * 128, map_b, full, kb * SNIPI_BLOCK,
                                       (int)n0 + SNIPI_BLOCK * j);
            }
            float *scale = shared->scale[ring.stage] + thread;
            scale[0] = post * scales.a;
#pragma unroll
            for (int j = 0; j < Wide; j++) scale[(1 + j) * SNIPI_BLOCK] = post * scales.b[j];
            snipi_ptx_barrier_arrive(full);
            snipi_tma_advance<Columns>(&ring);
        }
    }
}

// A thread's part of 16 rows, the row-th and the eighth below, by 128 columns from the col-th: c[i] lies i / 4 * 8
// columns further, for i & 2 in the row below, for i & 1 in the next column. Two neighbours at once where work.pairs
// says that they may be.
SNIPI_DEVICE void snipi_tma_begin_c(const snipi_cuda_gemm_work &work, int64_t row0, int64_t col0, float c[64]) {
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
        const int64_t row = row0 + (i & 2) * 4, col = col0 + i / 4 * 8;
        c[i] = c[i + 1] = 0;
        if (row >= work.m || col >= work.n) continue;
        if (work.accumulate && work.pairs) {
            const float2 pair = *(const float2 *)(work.c + row * work.ldc + col);
            c[i] = pair.x;
            c[i + 1] = pair.y;
        } else {
            c[i] = snipi_cuda_begin_c(work, row, col);
            if (col + 1 < work.n) c[i + 1] = snipi_cuda_begin_c(work, row, col + 1);
        }
    }
}

SNIPI_DEVICE void snipi_tma_end_c(const snipi_cuda_gemm_work &work, int64_t row0, int64_t col0, const float c[64]) {
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
        const int64_t row = row0 + (i & 2) * 4, col = col0 + i / 4 * 8;
        if (row >= work.m || col >= work.n) continue;
        if (work.pairs && !(work.accumulate && work.bias))
            *(float2 *)(work.c + row * work.ldc + col) = make_float2(c[i], c[i + 1]);
        else {
            snipi_cuda_end_c(work, row, col, c[i]);
            if (col + 1 < work.n) snipi_cuda_end_c(work, row, col + 1, c[i + 1]);
        }
    }
}

// Count of them get a block's sums times both scales. above, below: scales of their two rows of A. one_scale: all
// columns have the same.
template <int Count, class Sum>
SNIPI_DEVICE void snipi_tma_promote(float *c, const Sum *d, float above, float below, const float *scale_b, int col,
                                    int one_scale) {
    if (one_scale) {  // the same products of scales, two instead of Count
        above = __fmul_rn(above, scale_b[0]);
        below = __fmul_rn(below, scale_b[0]);
#pragma unroll
        for (int i = 0; i < Count; i++) c[i] = fmaf(i & 2 ? below : above, (float)d[i], c[i]);
    } else {
#pragma unroll
        for (int i = 0; i < Count; i++)
            c[i] = snipi_cuda_add_block(i & 2 ? below : above, scale_b[i / 4 * 8 + col + (i & 1)], (float)d[i], c[i]);
    }
}

// A descriptor of an operand: rows of 128 bytes in groups of eight, with 128-byte swizzle. 32 bytes of k further is the
// address plus 32; the hardware swizzles by address bits, so that groups lie at multiples of 1024. Address and
// distances are in units of 16 bytes.
//   bits 0 to 13    address
//   16 to 29        distance along k, not used: 1
//   32 to 45        distance from group to group: 1024 bytes
//   46 to 48        version: 0 for wgmma, 1 for tcgen05
//   61 to 63        128-byte swizzle: 2 for tcgen05; wgmma has 1 in bits 62 and 63, which is the same
SNIPI_DEVICE uint64_t snipi_tma_operand(const void *rows, int version) {
    const uint64_t address = (snipi_ptx_shared(rows) & 0x3FFFFu) >> 4;
    return address | 1ull << 16 | 64ull << 32 | (uint64_t)version << 46 | 1ull << 62;
}

// >>cuda-gemm-wgmma ------------------------------------------------------------------------------------------------
// Hopper: blocks of C of 128 x 128, six stages. A consuming warpgroup multiplies 64 rows by wgmma, then adds the sums
// times both scales to C's. While one adds, the other multiplies: at nominal rates 64 x 128 x 128 products take the
// tensor cores 256 clocks, conversions of integer sums 128, on the integer pipe, and multiply-adds 64.
enum {
    SNIPI_WGMMA_THREADS = 3 * SNIPI_WARPGROUP,
    SNIPI_PRODUCER_REGISTERS = 40,  // a thread: enough not to spill, and the consumers get the rest
    SNIPI_WGMMA_REGISTERS = 232
};

typedef snipi_tma_shared<128> snipi_wgmma_shared;

static_assert(SNIPI_TMA_SHARED + sizeof(snipi_wgmma_shared) <= 232448, "a thread block's shared memory on Hopper");
static_assert(128 * SNIPI_PRODUCER_REGISTERS + 256 * SNIPI_WGMMA_REGISTERS <=
                  SNIPI_WGMMA_THREADS * (65536 / SNIPI_WGMMA_THREADS / 8 * 8),
              "registers of the launch");
static_assert(SNIPI_PRODUCER_REGISTERS % 8 == 0 && SNIPI_WGMMA_REGISTERS % 8 == 0, "setmaxnreg");

// Formats of E2M1 stand for their values times 2 as INT8, here and in tcgen05's functions.
template <int Format> using snipi_tma_sum = typename std::conditional<Format == SNIP_E2M1, int32_t, float>::type;

template <int FormatA, int FormatB, class Sum>
SNIPI_DEVICE void snipi_wgmma_start(Sum d[64], uint64_t a, uint64_t b, int add) {
    if constexpr (FormatA == SNIP_E2M1)
        snipi_ptx_wgmma_s8(d, a, b, add);
    else if constexpr (FormatA == SNIP_E4M3 && FormatB == SNIP_E4M3)
        snipi_ptx_wgmma_e4m3_e4m3(d, a, b, add);
    else if constexpr (FormatA == SNIP_E4M3)
        snipi_ptx_wgmma_e4m3_e5m2(d, a, b, add);
    else if constexpr (FormatB == SNIP_E4M3)
        snipi_ptx_wgmma_e5m2_e4m3(d, a, b, add);
    else
        snipi_ptx_wgmma_e5m2_e5m2(d, a, b, add);
}

template <int FormatA, int FormatB>
SNIPI_DEVICE void snipi_wgmma_consume(const snipi_cuda_gemm_work &work, char *stages, snipi_wgmma_shared *shared,
                                      int64_t blocks_of_c, int blocks_of_k) {
    const int group = (int)threadIdx.x / SNIPI_WARPGROUP - 1, warp = (int)threadIdx.x % SNIPI_WARPGROUP / SNIPI_WARP;
    const int lane = snipi_lane(), row = 64 * group + 16 * warp + lane / 4, col = lane % 4 * 2;
    const int one_scale = work.b.reader.tile_rows % SNIPI_BLOCK == 0;  // for all of a block's columns
    snipi_tma_ring ring = { 0, 0 };
    for (int64_t t = blockIdx.x; t < blocks_of_c; t += gridDim.x) {
        int64_t m0, n0;
        float c[64];
        snipi_tma_sum<FormatA> d[64];
        snipi_tma_block<128>(work, t, &m0, &n0);
        snipi_tma_begin_c(work, m0 + row, n0 + col, c);
#pragma unroll
        for (int i = 0; i < 64; i++) d[i] = 0;

        for (int kb = 0; kb < blocks_of_k; kb++) {
            const char *a = stages + ring.stage * shared->BytesOfStage + group * 64 * 128;
            const char *b = stages + ring.stage * shared->BytesOfStage + SNIPI_BLOCK * 128;
            const float *scale = shared->scale[ring.stage];
            snipi_ptx_barrier_wait(&shared->full[ring.stage], ring.parity);
            snipi_ptx_wgmma_begin(d);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                const uint64_t at_a = snipi_tma_operand(a + 32 * kk, 0), at_b = snipi_tma_operand(b + 32 * kk, 0);
                snipi_wgmma_start<FormatA, FormatB>(d, at_a, at_b, kk > 0);
            }
            snipi_ptx_wgmma_end(d);
            snipi_tma_promote<64>(c, d, scale[row], scale[row + 8], scale + SNIPI_BLOCK, col, one_scale);
            __syncwarp();
            if (lane == 0) snipi_ptx_barrier_arrive(&shared->empty[ring.stage]);
            snipi_tma_advance<128>(&ring);
        }
        snipi_tma_end_c(work, m0 + row, n0 + col, c);
    }
}

template <int FormatA, int FormatB>
static __global__ void __launch_bounds__(SNIPI_WGMMA_THREADS, 1)
    snipi_wgmma_kernel(const snipi_cuda_gemm_work work, const __grid_constant__ CUtensorMap map_a,
                       const __grid_constant__ CUtensorMap map_b) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __shared__ snipi_wgmma_shared shared;
    char *const stages = snipi_tma_stages();
    const int64_t blocks_of_c = snipi_tma_blocks(work, 128);
    const int blocks_of_k = (int)((work.k + SNIPI_BLOCK - 1) / SNIPI_BLOCK);
    if (threadIdx.x == 0) {
        snipi_tma_barriers(&shared);
        snipi_ptx_barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < SNIPI_WARPGROUP) {
        snipi_ptx_registers_fewer<SNIPI_PRODUCER_REGISTERS>();
        snipi_tma_produce<128>(work, &map_a, &map_b, stages, &shared, blocks_of_c, blocks_of_k,
                               FormatA == SNIP_E2M1 ? 0.5f : 1.0f);
    } else {
        snipi_ptx_registers_more<SNIPI_WGMMA_REGISTERS>();
        snipi_wgmma_consume<FormatA, FormatB>(work, stages, &shared, blocks_of_c, blocks_of_k);
    }
#endif
}

// >>cuda-gemm-tcgen05 ----------------------------------------------------------------------------------------------
// Datacenter Blackwell: blocks of C of 128 x 256, four stages, sums in two accumulators that fill tensor memory. A
// thread of a fourth warpgroup lets tcgen05 multiply. Each consuming warpgroup loads the sums of 128 columns and adds
// them times both scales to C's, while the next block's are made in the other accumulator.
//
// At nominal rates (8192 products and 128 multiply-adds a clock) a block of k takes the tensor cores 512 clocks and the
// multiply-adds 256: multiplying is the limit. Where columns have scales of their own, products of scales take 256
// more, and adding is about as long; so are conversions of integer sums, 64 a clock. 256 columns rather than 128, so
// that the cache has to give 96 bytes a clock, not 128.
//
// Barriers beside full and empty: summed, when a stage's products are done. The stage is empty when they have been
// read, and so is its accumulator.
enum {
    SNIPI_TCGEN05_COLUMNS = 256,
    SNIPI_TCGEN05_THREADS = 4 * SNIPI_WARPGROUP,
    SNIPI_MULTIPLIER_REGISTERS = 24,  // a thread
    SNIPI_TCGEN05_REGISTERS = 224     // of a consumer: all that the others leave, less one step of 8
};

struct snipi_tcgen05_shared : snipi_tma_shared<SNIPI_TCGEN05_COLUMNS> {
    uint64_t summed[Stages];
    uint32_t tensor_memory;
};

static_assert(snipi_tcgen05_shared::Stages == 4, "two stages for each accumulator");
static_assert(SNIPI_TMA_SHARED + sizeof(snipi_tcgen05_shared) <= 232448, "a thread block's shared memory on Blackwell");
static_assert(128 * ((int)SNIPI_PRODUCER_REGISTERS + SNIPI_MULTIPLIER_REGISTERS) + 256 * SNIPI_TCGEN05_REGISTERS <=
                  65536,
              "registers of the launch");

// An instruction's descriptor.
//   bits 4 and 5    sums: 1 float, 2 int32
//   7 to 9          A: 0 E4M3, 1 E5M2 or signed bytes
//   10 to 12        B, likewise
//   17 to 22        columns / 8
//   24 to 28        rows / 16
template <int FormatA, int FormatB> SNIPI_DEVICE constexpr uint32_t snipi_tcgen05_instruction(int rows, int columns) {
    return (FormatA == SNIP_E2M1 ? 2u : 1u) << 4 | (FormatA == SNIP_E4M3 ? 0u : 1u) << 7 |
           (FormatB == SNIP_E4M3 ? 0u : 1u) << 10 | (uint32_t)columns / 8 << 17 | (uint32_t)rows / 16 << 24;
}

template <int FormatA>
SNIPI_DEVICE void snipi_tcgen05_start(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, int add) {
    if constexpr (FormatA == SNIP_E2M1)
        snipi_ptx_tcgen05_s8(d, a, b, instruction, add);
    else
        snipi_ptx_tcgen05_fp8(d, a, b, instruction, add);
}

template <int FormatA, int FormatB>
SNIPI_DEVICE void snipi_tcgen05_multiply(char *stages, snipi_tcgen05_shared *shared, int64_t blocks_of_c,
                                         int blocks_of_k) {
    const uint32_t instruction = snipi_tcgen05_instruction<FormatA, FormatB>(SNIPI_BLOCK, SNIPI_TCGEN05_COLUMNS);
    snipi_tma_ring ring = { 0, 0 };
    for (int64_t t = blockIdx.x; t < blocks_of_c; t += gridDim.x)
        for (int kb = 0; kb < blocks_of_k; kb++) {
            const char *a = stages + ring.stage * shared->BytesOfStage, *b = a + SNIPI_BLOCK * 128;
            const uint32_t sums = shared->tensor_memory + ring.stage % 2 * SNIPI_TCGEN05_COLUMNS;
            snipi_ptx_barrier_wait(&shared->full[ring.stage], ring.parity);
            // The accumulator's last block, two ago, has been read.
            snipi_ptx_barrier_wait(&shared->empty[ring.stage ^ 2], ring.stage < 2 ? ring.parity ^ 1 : ring.parity);
            snipi_ptx_tcgen05_after();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                const uint64_t at_a = snipi_tma_operand(a + 32 * kk, 1), at_b = snipi_tma_operand(b + 32 * kk, 1);
                snipi_tcgen05_start<FormatA>(sums, at_a, at_b, instruction, kk > 0);
            }
            snipi_ptx_tcgen05_commit(&shared->summed[ring.stage]);
            snipi_tma_advance<SNIPI_TCGEN05_COLUMNS>(&ring);
        }
}

template <int FormatA>
SNIPI_DEVICE void snipi_tcgen05_consume(const snipi_cuda_gemm_work &work, snipi_tcgen05_shared *shared,
                                        int64_t blocks_of_c, int blocks_of_k) {
    const int group = (int)threadIdx.x / SNIPI_WARPGROUP - 1, lane = snipi_lane();
    const int warp_row = (int)threadIdx.x % SNIPI_WARPGROUP / SNIPI_WARP * 32;
    const int row = warp_row + lane / 4, col = lane % 4 * 2;
    const int one_scale = work.b.reader.tile_rows % SNIPI_BLOCK == 0;  // for all of a group's columns
    const uint32_t sums = shared->tensor_memory + ((uint32_t)warp_row << 16) + (uint32_t)group * SNIPI_BLOCK;
    snipi_tma_ring ring = { 0, 0 };
    for (int64_t t = blockIdx.x; t < blocks_of_c; t += gridDim.x) {
        int64_t m0, n0;
        float c[2][64];  // of two times 16 rows
        snipi_tma_sum<FormatA> d[2][32];
        snipi_tma_block<SNIPI_TCGEN05_COLUMNS>(work, t, &m0, &n0);
        n0 += group * SNIPI_BLOCK;
#pragma unroll
        for (int i = 0; i < 2; i++) snipi_tma_begin_c(work, m0 + row + 16 * i, n0 + col, c[i]);

        for (int kb = 0; kb < blocks_of_k; kb++) {
            const float *scale_a = shared->scale[ring.stage] + row;
            const float *scale_b = shared->scale[ring.stage] + (1 + group) * SNIPI_BLOCK;
            const uint32_t at = sums + (uint32_t)ring.stage % 2 * SNIPI_TCGEN05_COLUMNS;
            snipi_ptx_barrier_wait(&shared->full[ring.stage], ring.parity);  // the scales
            snipi_ptx_barrier_wait(&shared->summed[ring.stage], ring.parity);
            snipi_ptx_tcgen05_after();
            snipi_ptx_tensor_memory_load(d[0], at);
#pragma unroll
            for (int i = 0; i < 4; i++) {  // 16 rows by 64 columns; the next are loaded while these are added
                snipi_ptx_tensor_memory_wait(d[i % 2]);
                if (i < 3)
                    snipi_ptx_tensor_memory_load(d[(i + 1) % 2],
                                                 at + ((uint32_t)(i + 1) / 2 * 16 << 16) + (uint32_t)(i + 1) % 2 * 64);
                snipi_tma_promote<32>(c[i / 2] + i % 2 * 32, d[i % 2], scale_a[i / 2 * 16], scale_a[i / 2 * 16 + 8],
                                      scale_b + i % 2 * 64, col, one_scale);
            }
            snipi_ptx_tcgen05_before();
            __syncwarp();
            if (lane == 0) snipi_ptx_barrier_arrive(&shared->empty[ring.stage]);
            snipi_tma_advance<SNIPI_TCGEN05_COLUMNS>(&ring);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) snipi_tma_end_c(work, m0 + row + 16 * i, n0 + col, c[i]);
    }
}

SNIPI_DEVICE void snipi_tcgen05_syncthreads() {
    snipi_ptx_tcgen05_before();
    __syncthreads();
    snipi_ptx_tcgen05_after();
}

template <int FormatA, int FormatB>
SNIPI_DEVICE void snipi_tcgen05_kernel_body(const snipi_cuda_gemm_work &work, const CUtensorMap *map_a,
                                            const CUtensorMap *map_b) {
    __shared__ snipi_tcgen05_shared shared;
    char *const stages = snipi_tma_stages();
    const int64_t blocks_of_c = snipi_tma_blocks(work, SNIPI_TCGEN05_COLUMNS);
    const int blocks_of_k = (int)((work.k + SNIPI_BLOCK - 1) / SNIPI_BLOCK);
    const int group = (int)threadIdx.x / SNIPI_WARPGROUP, multiplier = snipi_warp() == 12;  // the last group's first
    if (threadIdx.x == 0) {
        snipi_tma_barriers(&shared);
        for (int s = 0; s < shared.Stages; s++) snipi_ptx_barrier_init(&shared.summed[s], 1);
        snipi_ptx_barrier_init_fence();
    }
    if (multiplier) snipi_ptx_tensor_memory_alloc(&shared.tensor_memory);
    snipi_tcgen05_syncthreads();
    if (group == 0) {
        snipi_ptx_registers_fewer<SNIPI_PRODUCER_REGISTERS>();
        snipi_tma_produce<SNIPI_TCGEN05_COLUMNS>(work, map_a, map_b, stages, &shared, blocks_of_c, blocks_of_k,
                                                 FormatA == SNIP_E2M1 ? 0.5f : 1.0f);
    } else if (group < 3) {
        snipi_ptx_registers_more<SNIPI_TCGEN05_REGISTERS>();
        snipi_tcgen05_consume<FormatA>(work, &shared, blocks_of_c, blocks_of_k);
    } else {
        snipi_ptx_registers_fewer<SNIPI_MULTIPLIER_REGISTERS>();
        if (threadIdx.x == 384) snipi_tcgen05_multiply<FormatA, FormatB>(stages, &shared, blocks_of_c, blocks_of_k);
        __syncwarp();
    }
    snipi_tcgen05_syncthreads();
    if (multiplier) snipi_ptx_tensor_memory_free(shared.tensor_memory);
}

// tcgen05 multiplies bytes as integers on 10.0 alone, and only in code for sm_100a.
template <int FormatA, int FormatB>
static __global__ void __launch_bounds__(SNIPI_TCGEN05_THREADS, 1)
    snipi_tcgen05_kernel(const snipi_cuda_gemm_work work, const __grid_constant__ CUtensorMap map_a,
                         const __grid_constant__ CUtensorMap map_b) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
    snipi_tcgen05_kernel_body<FormatA, FormatB>(work, &map_a, &map_b);
#elif defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    (__CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100 && defined(__CUDA_ARCH_FAMILY_SPECIFIC__))
    if constexpr (FormatA != SNIP_E2M1) snipi_tcgen05_kernel_body<FormatA, FormatB>(work, &map_a, &map_b);
#endif
}

// >>cuda-gemm-choice -----------------------------------------------------------------------------------------------
// Which kernel multiplies what, on the GPU at hand.
static snipi_cuda_operand snipi_cuda_operand_of(const snip_operand *given, int64_t rows, int64_t k) {
    const int64_t ld = given->ld ? given->ld : given->transposed ? rows : k;
    snipi_cuda_operand operand = {};
    operand.reader = snipi_cuda_reader_of(given->recipe, given->codes, given->scales, rows, k);
    operand.rows = rows;
    operand.across = given->transposed ? 1 : ld;
    operand.along = given->transposed ? ld : 1;
    operand.plain = snipi_plain(given->recipe->format);
    operand.round_bf16 = given->round_bf16;
    operand.aligned = (uintptr_t)given->codes % 16 == 0;
    if (operand.plain)
        operand.aligned &= given->recipe->format == SNIP_F32 && !given->transposed && ld % 4 == 0;
    else
        operand.aligned &= k % 2 == 0 && operand.reader.row_bytes % 16 == 0;
    return operand;
}

static snip_status snipi_cuda_gemm_begin(snipi_cuda_gemm_work *work, int64_t m, int64_t n, int64_t k,
                                         const snip_operand *a, const snip_operand *b, float *c, int64_t ldc,
                                         int accumulate, const float *bias) {
    if (m < 0 || n < 0 || k < 0 || !snipi_shape_ok(m, n, ldc)) return SNIP_BAD_ARGUMENT;
    if (!snipi_operand_ok(a, m, k) || !snipi_operand_ok(b, n, k)) return SNIP_BAD_ARGUMENT;
    if (m > 0 && n > 0 && !c) return SNIP_BAD_ARGUMENT;

    work->m = m;
    work->n = n;
    work->k = k;
    work->c = c;
    work->ldc = ldc;
    work->bias = bias;
    work->accumulate = accumulate != 0;
    work->pairs = n % 2 == 0 && ldc % 2 == 0 && (uintptr_t)c % sizeof(float2) == 0;
    if (k == 0) return SNIP_OK;
    work->a = snipi_cuda_operand_of(a, m, k);
    work->b = snipi_cuda_operand_of(b, n, k);
    work->block = snipi_s8_block(a, b, k);
    return SNIP_OK;
}

SNIP_API snip_status snip_cuda_gemm_reference(int64_t m, int64_t n, int64_t k, const snip_operand *a,
                                              const snip_operand *b, float *c, int64_t ldc, int accumulate,
                                              const float *bias, cudaStream_t stream) {
    snipi_cuda_gemm_work work = {};
    const snip_status status = snipi_cuda_gemm_begin(&work, m, n, k, a, b, c, ldc, accumulate, bias);
    if (status || m == 0 || n == 0) return status;
    return snipi_cuda_launch(snipi_cuda_gemm_reference_kernel, snipi_ceil_div(m, 16) * snipi_ceil_div(n, 16), 256, 0,
                             stream, work);
}

// Whether a kernel was compiled for this GPU with its body, which has shared memory: more than the 1024 bytes that from
// 9.0 on the system adds to every kernel beside one that has some.
enum { SNIPI_EMPTY_SHARED = 4096 };  // bytes: above the system's, below all bodies'

static_assert(sizeof(snipi_wgmma_shared) > SNIPI_EMPTY_SHARED && sizeof(snipi_mma_shared) > SNIPI_EMPTY_SHARED,
              "a body is told by its shared memory");

template <class... Parameters> static int snipi_cuda_has_body(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
        return attributes.sharedSizeBytes > SNIPI_EMPTY_SHARED;
    cudaGetLastError();  // it has none: no error of the caller's
    return 0;
}

// The kernel that TMA feeds, if this GPU has one; or NULL.
typedef void (*snipi_tma_fn)(const snipi_cuda_gemm_work, const CUtensorMap, const CUtensorMap);

template <int FormatA, int FormatB> static snipi_tma_fn snipi_tma_kernel() {
    if (snipi_cuda_has_body(snipi_tcgen05_kernel<FormatA, FormatB>)) return snipi_tcgen05_kernel<FormatA, FormatB>;
    return snipi_cuda_has_body(snipi_wgmma_kernel<FormatA, FormatB>) ? snipi_wgmma_kernel<FormatA, FormatB> : NULL;
}

// Also NULL if TMA cannot read the operands.
template <int FormatA, int FormatB> static snipi_tma_fn snipi_tma_kernel_of(const snipi_cuda_gemm_work &work) {
    if (work.k >= INT32_MAX || work.m >= INT32_MAX || work.n >= INT32_MAX) return NULL;
    return work.a.aligned && work.b.aligned ? snipi_tma_kernel<FormatA, FormatB>() : NULL;
}

static snip_status snipi_tma_launch(snipi_tma_fn kernel, bool tcgen05, const snipi_cuda_gemm_work &work,
                                    cudaStream_t stream) {
    const int columns = tcgen05 ? (int)SNIPI_TCGEN05_COLUMNS : SNIPI_BLOCK;
    const int threads = tcgen05 ? (int)SNIPI_TCGEN05_THREADS : SNIPI_WGMMA_THREADS;
    const int64_t blocks = snipi_ceil_div(work.m, SNIPI_BLOCK) * snipi_ceil_div(work.n, columns);
    CUtensorMap map_a, map_b;
    int device, processors;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SNIPI_TMA_SHARED) != cudaSuccess ||
        !snipi_cuda_tensor_map(&map_a, work.a.reader.codes, work.m, work.k, work.a.reader.row_bytes) ||
        !snipi_cuda_tensor_map(&map_b, work.b.reader.codes, work.n, work.k, work.b.reader.row_bytes))
        return SNIP_DEVICE;
    return snipi_cuda_launch(kernel, snipi_min(blocks, processors), threads, SNIPI_TMA_SHARED, stream, work, map_a,
                             map_b);
}

static snip_status snipi_mma_launch(void (*kernel)(const snipi_cuda_gemm_work), const snipi_cuda_gemm_work &work,
                                    cudaStream_t stream) {
    if (!snipi_cuda_has_body(kernel)) return SNIP_UNSUPPORTED;
    return snipi_cuda_launch(kernel, snipi_cuda_blocks(work.m, work.n), SNIPI_THREADS, 0, stream, work);
}

template <int FormatA, int FormatB>
static snip_status snipi_cuda_gemm_fp8(const snipi_cuda_gemm_work &work, cudaStream_t stream) {
    const snipi_tma_fn kernel = work.k > 0 ? snipi_tma_kernel_of<FormatA, FormatB>(work) : NULL;
    if (kernel) return snipi_tma_launch(kernel, kernel == snipi_tcgen05_kernel<FormatA, FormatB>, work, stream);
    if (snipi_cuda_has_body(snipi_mma_kernel<SNIPI_MMA_FP8, FormatA, FormatB>))
        return snipi_mma_launch(snipi_mma_kernel<SNIPI_MMA_FP8, FormatA, FormatB>, work, stream);
    return snipi_mma_launch(snipi_mma_kernel<SNIPI_MMA_F16, FormatA, FormatB>, work, stream);
}

static snip_status snipi_cuda_gemm_s8(snipi_cuda_gemm_work *work, cudaStream_t stream) {
    for (snipi_cuda_operand *operand : { &work->a, &work->b }) {
        operand->reader.row_bytes = snipi_cuda_s8_row(work->k);
        operand->aligned = (uintptr_t)operand->reader.codes % 16 == 0;
    }
    const snipi_tma_fn kernel = snipi_tma_kernel_of<SNIP_E2M1, SNIP_E2M1>(*work);
    if (!kernel) return SNIP_UNSUPPORTED;
    if (work->k > 0)
        return snipi_tma_launch(kernel, kernel == snipi_tcgen05_kernel<SNIP_E2M1, SNIP_E2M1>, *work, stream);
    return snipi_mma_launch(snipi_mma_kernel<SNIPI_MMA_S8, SNIP_E2M1, SNIP_E2M1>, *work, stream);  // no codes
}

static snip_status snipi_cuda_gemm_plain(const snipi_cuda_gemm_work &work, int bf16, cudaStream_t stream) {
    const int cores = bf16 && snipi_cuda_has_body(snipi_bf16_kernel);
    return snipi_cuda_launch(cores ? snipi_bf16_kernel : snipi_f32_kernel, snipi_cuda_blocks(work.m, work.n),
                             SNIPI_THREADS, 0, stream, work);
}

static int snipi_cuda_is_fp8(snip_format format) { return format == SNIP_E4M3 || format == SNIP_E5M2; }

static int snipi_cuda_is_bf16(const snip_operand *operand) {
    return operand->recipe->format == SNIP_BF16 || operand->round_bf16;
}

// form: of E2M1 operands, SNIP_CUDA_PACKED or SNIP_CUDA_S8_BYTES. nonfinite: see snipi_cuda_gemm_work.
static snip_status snipi_cuda_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                                   snip_cuda_codes form, float *c, int64_t ldc, int accumulate, const float *bias,
                                   unsigned long long *nonfinite, cudaStream_t stream) {
    snipi_cuda_gemm_work work = {};
    const snip_status status = snipi_cuda_gemm_begin(&work, m, n, k, a, b, c, ldc, accumulate, bias);
    if (status) return status;

    const snip_format format_a = a->recipe->format, format_b = b->recipe->format;
    const int plain = snipi_plain(format_a) && snipi_plain(format_b);
    const int fp4 = format_a == SNIP_E2M1 && format_b == SNIP_E2M1;
    const int fp8 = snipi_cuda_is_fp8(format_a) && snipi_cuda_is_fp8(format_b);
    const int blocks_of_k = a->recipe->tile_cols == SNIPI_BLOCK && b->recipe->tile_cols == SNIPI_BLOCK;
    if (!plain && !((fp4 || fp8) && blocks_of_k)) return SNIP_UNSUPPORTED;
    if (m == 0 || n == 0) return SNIP_OK;

    work.nonfinite = nonfinite;
    if (plain) return snipi_cuda_gemm_plain(work, snipi_cuda_is_bf16(a) && snipi_cuda_is_bf16(b), stream);
    if (fp4 && form == SNIP_CUDA_S8_BYTES) return snipi_cuda_gemm_s8(&work, stream);
    if (fp4) return snipi_mma_launch(snipi_mma_kernel<SNIPI_MMA_S8, SNIP_E2M1, SNIP_E2M1>, work, stream);
    if (format_a == SNIP_E4M3)
        return format_b == SNIP_E4M3 ? snipi_cuda_gemm_fp8<SNIP_E4M3, SNIP_E4M3>(work, stream)
                                     : snipi_cuda_gemm_fp8<SNIP_E4M3, SNIP_E5M2>(work, stream);
    return format_b == SNIP_E4M3 ? snipi_cuda_gemm_fp8<SNIP_E5M2, SNIP_E4M3>(work, stream)
                                 : snipi_cuda_gemm_fp8<SNIP_E5M2, SNIP_E5M2>(work, stream);
}

SNIP_API snip_status snip_cuda_gemm(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                                    float *c, int64_t ldc, int accumulate, const float *bias, cudaStream_t stream) {
    return snipi_cuda_gemm(m, n, k, a, b, SNIP_CUDA_PACKED, c, ldc, accumulate, bias, NULL, stream);
}

SNIP_API snip_status snip_cuda_gemm_s8(int64_t m, int64_t n, int64_t k, const snip_operand *a, const snip_operand *b,
                                       float *c, int64_t ldc, int accumulate, const float *bias, cudaStream_t stream) {
    if (a && b && a->recipe && b->recipe && (a->recipe->format != SNIP_E2M1 || b->recipe->format != SNIP_E2M1))
        return SNIP_UNSUPPORTED;
    return snipi_cuda_gemm(m, n, k, a, b, SNIP_CUDA_S8_BYTES, c, ldc, accumulate, bias, NULL, stream);
}

#ifdef SNIP_CUBLASLT
// >>cuda-gemm-cublaslt ---------------------------------------------------------------------------------------------
// cuBLASLt thinks in columns: for it our B is A, and C [m][n] is (n, m).
typedef struct {
    cudaDataType_t type;
    int64_t rows;
    int scale_rows;       // of a scale's tile: 1 or 128; 0: no scales
    const float *scales;  // in cuBLASLt's order
} snipi_cublaslt_matrix;

typedef struct {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    cublasLtMatmulHeuristicResult_t found;
} snipi_cublaslt;

// What cuBLASLt calls invalid is a configuration that it lacks: the arguments were checked before.
static snip_status snipi_cublaslt_status(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_ARCH_MISMATCH ||
        status == CUBLAS_STATUS_INVALID_VALUE)
        return SNIP_UNSUPPORTED;
    return status == CUBLAS_STATUS_SUCCESS ? SNIP_OK : SNIP_DEVICE;
}

// Blocks of 128 of k, padded to the multiple of 4 that cuBLASLt wants of scales of 128 x 128.
static int64_t snipi_cublaslt_blocks(int64_t k) { return snipi_round_up(snipi_ceil_div(k, SNIPI_BLOCK), 4); }

// Floats of scratch for an operand's scales. Rounded up, so that the next operand's are 256-byte aligned.
static int64_t snipi_cublaslt_room(int64_t rows, int64_t k) {
    return snipi_round_up(rows, 64) * snipi_cublaslt_blocks(k);
}

// Scales [rows][blocks]: those of 1 x 128 block after block; those of 128 x 128 row after row, each padded to `padded`.
struct snipi_cublaslt_ordered {
    float *to;
    const float *scales;
    int64_t rows, blocks, padded;

    __device__ void operator()(int64_t i) const {
        to[padded ? i / blocks * padded + i % blocks : i % blocks * rows + i / blocks] = scales[i];
    }
};

static snip_status snipi_cublaslt_order(float *to, const void *scales, int64_t rows, int64_t k, int scale_rows,
                                        cudaStream_t stream) {
    const int64_t down = snipi_ceil_div(rows, scale_rows), blocks = snipi_ceil_div(k, SNIPI_BLOCK);
    const int64_t padded = scale_rows > 1 ? snipi_cublaslt_blocks(k) : 0;
    const snipi_cublaslt_ordered ordered = { to, (const float *)scales, down, blocks, padded };
    return snipi_cuda_each(ordered, down * blocks, stream);
}

// A way to make C from rows of k elements without gaps, all of them 16-byte aligned.
static snip_status snipi_cublaslt_find(snipi_cublaslt *p, cublasLtHandle_t lt, cublasComputeType_t compute,
                                       cudaDataType_t sum, const snipi_cublaslt_matrix *a,
                                       const snipi_cublaslt_matrix *b, int64_t k, int64_t ldc, size_t workspace) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const uint32_t alignment = 16;  // bytes
    cublasLtMatmulPreferenceOpaque_t preference;
    int count = 0;

#    define SNIPI_LT(call)                                          \
        do {                                                        \
            const snip_status failed = snipi_cublaslt_status(call); \
            if (failed) return failed;                              \
        } while (0)
#    define SNIPI_LT_PRODUCT(attribute, value) \
        SNIPI_LT(cublasLtMatmulDescSetAttribute(&p->product, CUBLASLT_MATMUL_DESC_##attribute, &(value), sizeof(value)))
#    define SNIPI_LT_PREFER(attribute, value)                                                                          \
        SNIPI_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_##attribute##_BYTES, &(value), \
                                                      sizeof(value)))

    SNIPI_LT(cublasLtMatmulDescInit(&p->product, compute, sum));
    SNIPI_LT_PRODUCT(TRANSA, transposed);
    if (a->scale_rows) {
#    if CUBLAS_VERSION >= 120900
        const cublasLtMatmulMatrixScale_t modes[2] = { CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F,
                                                       CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F };
        SNIPI_LT_PRODUCT(A_SCALE_MODE, modes[b->scale_rows > 1]);
        SNIPI_LT_PRODUCT(B_SCALE_MODE, modes[a->scale_rows > 1]);
        SNIPI_LT_PRODUCT(A_SCALE_POINTER, b->scales);
        SNIPI_LT_PRODUCT(B_SCALE_POINTER, a->scales);
#    else
        return SNIP_UNSUPPORTED;
#    endif
    }

    SNIPI_LT(cublasLtMatrixLayoutInit(&p->a, b->type, (uint64_t)k, (uint64_t)b->rows, k));
    SNIPI_LT(cublasLtMatrixLayoutInit(&p->b, a->type, (uint64_t)k, (uint64_t)a->rows, k));
    SNIPI_LT(cublasLtMatrixLayoutInit(&p->c, sum, (uint64_t)b->rows, (uint64_t)a->rows, ldc));

    SNIPI_LT(cublasLtMatmulPreferenceInit(&preference));
    SNIPI_LT_PREFER(MAX_WORKSPACE, workspace);
    SNIPI_LT_PREFER(MIN_ALIGNMENT_A, alignment);
    SNIPI_LT_PREFER(MIN_ALIGNMENT_B, alignment);
    SNIPI_LT_PREFER(MIN_ALIGNMENT_C, alignment);
    SNIPI_LT_PREFER(MIN_ALIGNMENT_D, alignment);
    SNIPI_LT(
        cublasLtMatmulAlgoGetHeuristic(lt, &p->product, &p->a, &p->b, &p->c, &p->c, &preference, 1, &p->found, &count));
    return count > 0 ? snipi_cublaslt_status(p->found.state) : SNIP_UNSUPPORTED;
#    undef SNIPI_LT
#    undef SNIPI_LT_PRODUCT
#    undef SNIPI_LT_PREFER
}

SNIP_API size_t snip_cuda_cublaslt_scratch(int64_t m, int64_t n, int64_t k) {
    if (!snipi_shape_ok(m, k, k) || !snipi_shape_ok(n, k, k)) return 0;
    return (size_t)(snipi_cublaslt_room(m, k) + snipi_cublaslt_room(n, k)) * sizeof(float);
}

static int snipi_cublaslt_takes(const snip_operand *operand) {
    const snip_recipe *recipe = operand->recipe;
    return snipi_cuda_is_fp8(recipe->format) && (recipe->scale == SNIP_SCALE_F32 || recipe->scale == SNIP_SCALE_POW2) &&
           recipe->tile_cols == SNIPI_BLOCK && (recipe->tile_rows == 1 || recipe->tile_rows == SNIPI_BLOCK) &&
           (uintptr_t)operand->codes % 16 == 0;
}

static snipi_cublaslt_matrix snipi_cublaslt_matrix_of(const snip_operand *operand, int64_t rows, float *scales) {
    const snip_recipe *recipe = operand->recipe;
    return { recipe->format == SNIP_E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2, rows, recipe->tile_rows, scales };
}

SNIP_API snip_status snip_cuda_gemm_cublaslt(cublasLtHandle_t lt, int64_t m, int64_t n, int64_t k,
                                             const snip_operand *a, const snip_operand *b, float *c, int64_t ldc,
                                             int accumulate, void *scratch, size_t scratch_bytes, cudaStream_t stream) {
    const size_t scales = snip_cuda_cublaslt_scratch(m, n, k);
    snipi_cuda_gemm_work checked = {};
    snip_status status = snipi_cuda_gemm_begin(&checked, m, n, k, a, b, c, ldc, accumulate, NULL);
    if (status) return status;
    if (!lt || (scales && !scratch) || scratch_bytes < scales || (uintptr_t)scratch % 256) return SNIP_BAD_ARGUMENT;
    if (!snipi_cublaslt_takes(a) || !snipi_cublaslt_takes(b) || k == 0) return SNIP_UNSUPPORTED;
    if (ldc % 4 || (uintptr_t)c % 16) return SNIP_UNSUPPORTED;
    if (m == 0 || n == 0) return SNIP_OK;

    float *scales_a = (float *)scratch, *scales_b = scales_a + snipi_cublaslt_room(m, k);
    char *workspace = (char *)scratch + scales;
    const size_t workspace_bytes = scratch_bytes - scales;
    const snipi_cublaslt_matrix our_a = snipi_cublaslt_matrix_of(a, m, scales_a);
    const snipi_cublaslt_matrix our_b = snipi_cublaslt_matrix_of(b, n, scales_b);
    snipi_cublaslt p;
    status = snipi_cublaslt_find(&p, lt, CUBLAS_COMPUTE_32F, CUDA_R_32F, &our_a, &our_b, k, ldc, workspace_bytes);
    if (!status) status = snipi_cublaslt_order(scales_a, a->scales, m, k, our_a.scale_rows, stream);
    if (!status) status = snipi_cublaslt_order(scales_b, b->scales, n, k, our_b.scale_rows, stream);
    if (status) return status;

    const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    return snipi_cublaslt_status(cublasLtMatmul(lt, &p.product, &one, b->codes, &p.a, a->codes, &p.b, &beta, c, &p.c, c,
                                                &p.c, &p.found.algo, workspace, workspace_bytes, stream));
}
#endif

// >>cuda-session-impl ------------------------------------------------------------------------------
// The operations of snip.h's >>passes on the device. A layer's sums and sketches are the CPU's own records, in device
// memory: sketches have the CPU's bits, sums are taken in another order, which does not depend on the GPU. Costs, plan
// and policy are snip.h's, on the host, where a step's results come `lag` steps later.

// Of the step under way, in device memory.
typedef struct {
    double tau;
    float loss, grad_scale;
    uint32_t step;
} snipi_cuda_globals;

enum { SNIPI_CUDA_NONFINITE, SNIPI_CUDA_SATURATED, SNIPI_CUDA_COUNTS };

// What is seen and counted of a layer in a step. Device memory; the next step begins with zeros.
typedef struct {
    double seen_sq[2], seen[2];  // as in snipi_layer
    int64_t seen_calls;
    unsigned long long counts[SNIPI_CUDA_COUNTS];
    unsigned long long held[2][SNIPI_CUDA_COUNTS];  // of the held weight, as it lies and transposed
    unsigned long long state;                       // m and v that are not finite
} snipi_cuda_watched;

// What the device keeps of a layer from step to step.
typedef struct {
    double input_size;  // as in snipi_kept_layer
    double probe_step;  // tau / |W|
} snipi_cuda_kept;

// What a weight's held codes were made of and when: in which step, and in which CUDA graph (0: in none).
typedef struct {
    const float *weight;
    snip_format format;
    int64_t step;
    unsigned long long capture;
} snipi_cuda_origin;

// A layer's weight as quantized for a step's ordinary pass, as it lies and transposed.
typedef struct {
    void *codes[2], *scales[2];
    snipi_cuda_origin of[2];
} snipi_cuda_held;

// A step on its way to the host. globals and watched: pinned memory.
typedef struct {
    cudaEvent_t done;
    snipi_cuda_globals *globals;
    snipi_cuda_watched *watched;  // [layers]
    int sent;                     // 0: the device failed, and there is nothing to read
    int ordinary, has_loss, measured;
    int device_scale;   // 1: globals has the gradients' scale
    double grad_scale;  // else it is this
} snipi_cuda_ended;

// Scratch in device memory: snip.h's slots, and more.
enum {
    SNIPI_CUDA_TURNED = SNIPI_SLOTS,  // a transposed operand of wgrad
    SNIPI_CUDA_TURNED_SCALES,
    SNIPI_CUDA_QUANTIZE,  // snip_cuda_quantize's
    SNIPI_CUDA_STATS,     // a snip_quant_stats
    SNIPI_CUDA_PARTS,     // parts of a sum
    SNIPI_CUDA_ROWS,      // sums of rows: [SNIPI_ROW_SUMS][rows]
    SNIPI_CUDA_SLOTS
};

// As a micro-batch: GEMMs are timed, and the weight is quantized in each of them.
enum { SNIPI_ALONE = -1 };

struct snip_cuda {
    snip *s;
    int64_t rows;
    int lag;
    snip_cuda_codes codes;  // of E2M1 operands: S8_BYTES where wgmma or tcgen05 takes them
    int64_t step, read;     // the step under way; steps that have been read
    int64_t measuring;      // the last measuring step, until it has been read; then -1
    int has_loss;           // snip_cuda_next_pass was given this step's loss
    int uncounted;          // 1: NaN and saturated elements of the call under way have been counted, or are made up

    // Device memory.
    snipi_sums *sums;               // [layers]
    float (*sketch)[SNIPI_SKETCH];  // [layers * SNIPI_SKETCHES]
    snipi_cuda_globals *globals;
    snipi_cuda_watched *watched;  // [layers]
    snipi_cuda_kept *kept;        // [layers]
    size_t records;               // bytes of all these
    void *slot[SNIPI_CUDA_SLOTS];
    size_t slot_size[SNIPI_CUDA_SLOTS];

    // Host memory.
    snipi_cuda_held *held;           // [layers]
    snipi_cuda_ended *ended;         // [lag + 1]
    const snipi_cuda_watched *last;  // of the last step read
    snipi_sums *measured;            // pinned, [layers]: sums of the last measuring step
    void *pinned;
#ifdef SNIP_CUBLASLT
    cublasLtHandle_t lt;  // or NULL
    void *lt_scratch;
    size_t lt_bytes;
#endif
};

static snip_cuda *snipi_cuda_of(const snipi_call *call) { return (snip_cuda *)call->device; }

static cudaStream_t snipi_cuda_stream(const snipi_call *call) { return (cudaStream_t)call->stream; }

static snip_status snipi_cuda_status(cudaError_t error) { return error == cudaSuccess ? SNIP_OK : SNIP_DEVICE; }

static int snipi_cuda_index(const snipi_call *call) { return snipi_index_of(call->s, call->l); }

static snipi_cuda_watched *snipi_cuda_watched_of(const snipi_call *call) {
    return snipi_cuda_of(call)->watched + snipi_cuda_index(call);
}

static snipi_cuda_kept *snipi_cuda_kept_of(const snipi_call *call) {
    return snipi_cuda_of(call)->kept + snipi_cuda_index(call);
}

// ---- device memory

typedef struct {
    char *base;  // NULL: sizes alone are wanted
    size_t used;
} snipi_cuda_room;

static void *snipi_cuda_take(snipi_cuda_room *room, size_t size) {
    void *at = room->base ? room->base + room->used : NULL;
    room->used += (size + 255) / 256 * 256;
    return at;
}

// Bytes of a tensor's codes and scales in the wider candidate.
static size_t snipi_cuda_code_bytes(int64_t rows, int64_t cols) { return (size_t)(rows * snipi_cuda_s8_row(cols)); }

static size_t snipi_cuda_scale_bytes(const snip *s, snipi_kind kind, int64_t rows, int64_t cols) {
    size_t most = 0;
    for (snip_format format : snipi_candidates) {
        const snip_recipe r = snipi_recipe_of(s, format, kind);
        const size_t size = snip_scales_bound(&r, rows, cols);
        if (size > most) most = size;
    }
    return most;
}

static void snipi_cuda_want(snip_cuda *c, int slot, size_t size) {
    if (size > c->slot_size[slot]) c->slot_size[slot] = size;
}

static void snipi_cuda_want_floats(snip_cuda *c, int slot, int64_t floats) {
    snipi_cuda_want(c, slot, (size_t)floats * sizeof(float));
}

// slot holds the codes, slot + 1 the scales.
static void snipi_cuda_want_operand(snip_cuda *c, int slot, snipi_kind kind, int64_t rows, int64_t cols) {
    snipi_cuda_want(c, slot, snipi_cuda_code_bytes(rows, cols));
    snipi_cuda_want(c, slot + 1, snipi_cuda_scale_bytes(c->s, kind, rows, cols));
}

// Scratch for a layer's calls.
static void snipi_cuda_want_layer(snip_cuda *c, const snipi_layer *l) {
    const int64_t rows = c->rows, n = l->n, k = l->k, samples = snipi_samples(c->s, l), wider = snipi_max(n, k);
    snipi_cuda_want_operand(c, SNIPI_SLOT_A, SNIPI_ACTIVATION, rows, k);
    snipi_cuda_want_operand(c, SNIPI_SLOT_A, SNIPI_GRADIENT, rows, n);
    snipi_cuda_want_operand(c, SNIPI_CUDA_TURNED, SNIPI_GRADIENT, n, rows);
    snipi_cuda_want_operand(c, SNIPI_SLOT_B, SNIPI_WEIGHT, n, k);
    snipi_cuda_want_operand(c, SNIPI_SLOT_B, SNIPI_WEIGHT, k, n);
    snipi_cuda_want_operand(c, SNIPI_SLOT_B, SNIPI_ACTIVATION, k, rows);
    snipi_cuda_want(c, SNIPI_CUDA_QUANTIZE, snip_cuda_quantize_scratch(snipi_max(rows, n), wider));
    if (c->s->desc.every < 0) return;
    snipi_cuda_want_floats(c, SNIPI_SLOT_X, rows * k);
    snipi_cuda_want_floats(c, SNIPI_SLOT_W, n * k);
    snipi_cuda_want_floats(c, SNIPI_SLOT_OUT, snipi_max(rows, snipi_max(n, SNIPI_PROJECTED)) * k);
    snipi_cuda_want_floats(c, SNIPI_SLOT_SAMPLE, rows * snipi_max(samples, SNIPI_PROJECTED));
    snipi_cuda_want_floats(c, SNIPI_SLOT_SAMPLE_OUT, snipi_max(samples * k, SNIPI_SKETCH));
    snipi_cuda_want_floats(c, SNIPI_SLOT_PROJECT, wider * SNIPI_PROJECTED);
    snipi_cuda_want_floats(c, SNIPI_SLOT_MIXED, wider * SNIPI_MIXED);
    snipi_cuda_want_floats(c, SNIPI_SLOT_SKETCH, (int64_t)SNIPI_CHUNKS * (int64_t)SNIPI_SKETCH);
    snipi_cuda_want(c, SNIPI_CUDA_STATS, sizeof(snip_quant_stats));
    snipi_cuda_want(c, SNIPI_CUDA_PARTS, SNIP_CUDA_NOISE_SCRATCH);
    snipi_cuda_want(c, SNIPI_CUDA_ROWS, (size_t)(SNIPI_ROW_SUMS * rows) * sizeof(double));
}

// Places all device memory from base on; the bytes taken. base NULL: counts them alone.
static size_t snipi_cuda_layout(snip_cuda *c, char *base) {
    const snip *s = c->s;
    const size_t layers = (size_t)s->n_layers, sketches = s->desc.every > 0 ? layers * SNIPI_SKETCHES : 0;
    snipi_cuda_room room = { base, 0 };
    c->sums = (snipi_sums *)snipi_cuda_take(&room, layers * sizeof *c->sums);
    c->sketch = (float(*)[SNIPI_SKETCH])snipi_cuda_take(&room, sketches * sizeof *c->sketch);
    c->globals = (snipi_cuda_globals *)snipi_cuda_take(&room, sizeof *c->globals);
    c->watched = (snipi_cuda_watched *)snipi_cuda_take(&room, layers * sizeof *c->watched);
    c->kept = (snipi_cuda_kept *)snipi_cuda_take(&room, layers * sizeof *c->kept);
    c->records = room.used;

    for (int i = 0; i < s->n_layers; i++)
        for (int transposed = 0; transposed < 2; transposed++) {
            const snipi_layer *l = &s->layers[i];
            const int64_t rows = transposed ? l->k : l->n, cols = transposed ? l->n : l->k;
            void *codes = snipi_cuda_take(&room, snipi_cuda_code_bytes(rows, cols));
            void *scales = snipi_cuda_take(&room, snipi_cuda_scale_bytes(s, SNIPI_WEIGHT, rows, cols));
            if (!base) continue;
            c->held[i].codes[transposed] = codes;
            c->held[i].scales[transposed] = scales;
        }

    for (int i = 0; i < s->n_layers; i++) snipi_cuda_want_layer(c, &s->layers[i]);
    for (int i = 0; i < SNIPI_CUDA_SLOTS; i++) c->slot[i] = snipi_cuda_take(&room, c->slot_size[i]);
    return room.used;
}

static float *snipi_cuda_scratch(const snipi_call *call, int slot, int64_t floats) {
    const snip_cuda *c = snipi_cuda_of(call);
    return (size_t)floats * sizeof(float) <= c->slot_size[slot] ? (float *)c->slot[slot] : NULL;
}

// ---- element by element

// *total (+)= factor * the sum of f(i), i < n.
template <class Term>
static snip_status snipi_cuda_total(const snipi_call *call, const Term &f, int64_t n, double *total, double factor,
                                    int add) {
    return snipi_cuda_reduce(f, n, total, factor, add, snipi_cuda_of(call)->slot[SNIPI_CUDA_PARTS],
                             snipi_cuda_stream(call));
}

struct snipi_cuda_add_scaled {
    float *to;
    const float *from;
    float factor;

    __device__ void operator()(int64_t i) const { to[i] += factor * from[i]; }
};

struct snipi_cuda_repeat_row {  // row [n]
    float *to;
    const float *row;
    int64_t n;

    __device__ void operator()(int64_t i) const { to[i] = row[i % n]; }
};

struct snipi_cuda_value {
    const double *x;

    __device__ double operator()(int64_t i) const { return x[i]; }
};

struct snipi_cuda_square {
    const float *x;

    __device__ double operator()(int64_t i) const { return (double)x[i] * (double)x[i]; }
};

static snip_status snipi_cuda_add_to(const snipi_call *call, float *to, const float *x, int64_t n) {
    return to ? snipi_cuda_each(snipi_cuda_add_scaled{ to, x, 1.0f }, n, snipi_cuda_stream(call)) : SNIP_OK;
}

// ---- one GEMM of a layer in one format

// An operand as it is quantized for a GEMM. slot: of its codes; the next one has its scales.
typedef struct {
    int slot, role;
    snip_recipe recipe;
    snip_operand operand;  // its recipe is the one above
} snipi_cuda_coded;

static snipi_cuda_coded snipi_cuda_coded_in(int slot, int role) {
    snipi_cuda_coded coded = {};
    coded.slot = slot;
    coded.role = role;
    return coded;
}

static unsigned long long *snipi_cuda_counts(const snipi_call *call) {
    return snipi_cuda_of(call)->uncounted ? NULL : snipi_cuda_watched_of(call)->counts;
}

// Quantizes x [rows][cols] as it lies, transposed, or both from one read. F32 and BF16 are read where they are.
// more: counts of the GEMM's other operand, a held weight, that are added along with x's; or NULL.
static snip_status snipi_cuda_code(const snipi_call *call, snip_format format, snipi_kind kind, const float *x,
                                   int64_t rows, int64_t cols, const unsigned long long *more,
                                   snipi_cuda_coded *straight, snipi_cuda_coded *turned) {
    snip_cuda *c = snipi_cuda_of(call);
    snip_quantize_job job = {};
    snipi_cuda_options options = {};
    for (snipi_cuda_coded *coded : { straight, turned }) {
        if (!coded) continue;
        coded->recipe = snipi_recipe_of(call->s, format, kind);
        coded->operand = {};
        coded->operand.recipe = &coded->recipe;
        coded->operand.codes = snipi_plain(format) ? (const void *)x : c->slot[coded->slot];
        coded->operand.scales = snipi_plain(format) ? NULL : c->slot[coded->slot + 1];
        coded->operand.transposed = snipi_plain(format) && coded == turned;
        coded->operand.round_bf16 = format == SNIP_BF16;
    }
    if (snipi_plain(format)) return SNIP_OK;

    job.x = x;
    job.rows = rows;
    job.cols = job.ld = cols;
    job.key = snipi_key(call->s, call->l, call->micro, (straight ? straight : turned)->role);
    if (straight) {
        job.recipe = &straight->recipe;
        job.codes = c->slot[straight->slot];
        job.scales = c->slot[straight->slot + 1];
    }
    if (turned) {
        job.recipe_t = &turned->recipe;
        job.codes_t = c->slot[turned->slot];
        job.scales_t = c->slot[turned->slot + 1];
        options.tensor_t = snipi_key(call->s, call->l, call->micro, turned->role).tensor;
    }
    options.step = &c->globals->step;
    options.counts = options.counts_t = snipi_cuda_counts(call);
    options.more = more;
    return snipi_cuda_quantize(&job, c->codes, NULL, NULL, c->slot[SNIPI_CUDA_QUANTIZE], options,
                               snipi_cuda_stream(call));
}

static int snipi_cuda_same(const snipi_cuda_origin &a, const snipi_cuda_origin &b) {
    return a.weight == b.weight && a.format == b.format && a.step == b.step && a.capture == b.capture;
}

// Quantizes the weight for its uses in the step: transposed, or as it lies and, where dgrad has the same format, also
// transposed from the same read.
static snip_status snipi_cuda_hold(const snipi_call *call, const snip_recipe *recipe, const snipi_cuda_origin &origin,
                                   int transposed) {
    snip_cuda *c = snipi_cuda_of(call);
    const snipi_layer *l = call->l;
    snipi_cuda_held *h = &c->held[snipi_cuda_index(call)];
    const int first = transposed, last = transposed || snipi_format(l, SNIP_DGRAD) == origin.format;
    unsigned long long(*counts)[SNIPI_CUDA_COUNTS] = snipi_cuda_watched_of(call)->held;
    snip_quantize_job job = {};
    snipi_cuda_options options = {};
    job.x = origin.weight;
    job.rows = l->n;
    job.cols = job.ld = l->k;
    if (first == 0) {
        job.recipe = recipe;
        job.codes = h->codes[0];
        job.scales = h->scales[0];
    }
    if (last == 1) {
        job.recipe_t = recipe;
        job.codes_t = h->codes[1];
        job.scales_t = h->scales[1];
    }
    options.step = &c->globals->step;
    options.counts = counts[0];
    options.counts_t = counts[1];
    snip_status status = snipi_cuda_status(
        cudaMemsetAsync(counts[first], 0, (size_t)(last - first + 1) * sizeof *counts, snipi_cuda_stream(call)));
    if (!status)
        status = snipi_cuda_quantize(&job, c->codes, NULL, NULL, c->slot[SNIPI_CUDA_QUANTIZE], options,
                                     snipi_cuda_stream(call));
    for (int t = first; t <= last && !status; t++) h->of[t] = origin;
    return status;
}

// 1 where the weight's codes serve all micro-batches, and fwd and dgrad: they do not depend on the call.
static int snipi_cuda_is_held(const snipi_call *call, snip_format format) {
    return !snipi_plain(format) && call->s->pass == SNIP_PASS_ORDINARY && call->s->mode == SNIP_TRAIN &&
           call->micro != SNIPI_ALONE &&
           snipi_recipe_of(call->s, format, SNIPI_WEIGHT).rounding == SNIP_ROUND_NEAREST_EVEN;
}

// The weight as operand B. *counts: what is to be counted for this use, or NULL where that is done.
static snip_status snipi_cuda_weight(const snipi_call *call, snip_format format, int transposed, const float *w,
                                     snipi_cuda_coded *b, const unsigned long long **counts) {
    snip_cuda *c = snipi_cuda_of(call);
    const snipi_layer *l = call->l;
    const snipi_cuda_held *h = &c->held[snipi_cuda_index(call)];
    *b = snipi_cuda_coded_in(SNIPI_SLOT_B, transposed ? SNIPI_ROLE_W_T : SNIPI_ROLE_W);
    *counts = NULL;
    if (!snipi_cuda_is_held(call, format))
        return snipi_cuda_code(call, format, SNIPI_WEIGHT, w, l->n, l->k, NULL, transposed ? NULL : b,
                               transposed ? b : NULL);

    snipi_cuda_origin origin = { w, format, c->step, 0 };
    cudaStreamCaptureStatus capturing;
    if (cudaStreamGetCaptureInfo(snipi_cuda_stream(call), &capturing, &origin.capture) != cudaSuccess)
        return SNIP_DEVICE;
    if (capturing == cudaStreamCaptureStatusNone) origin.capture = 0;
    b->recipe = snipi_recipe_of(call->s, format, SNIPI_WEIGHT);
    b->operand.recipe = &b->recipe;
    b->operand.codes = h->codes[transposed];
    b->operand.scales = h->scales[transposed];
    if (!c->uncounted) *counts = snipi_cuda_watched_of(call)->held[transposed];
    const int first_use = !transposed && call->micro == 0 && !c->uncounted;
    if (!first_use && snipi_cuda_same(h->of[transposed], origin)) return SNIP_OK;
    return snipi_cuda_hold(call, &b->recipe, origin, transposed);
}

static snip_status snipi_cuda_multiply(const snipi_call *call, int64_t m, int64_t n, int64_t k, const snip_operand *a,
                                       const snip_operand *b, float *y, int accumulate, const float *bias) {
    const snip_cuda *c = snipi_cuda_of(call);
    const cudaStream_t stream = snipi_cuda_stream(call);
#ifdef SNIP_CUBLASLT
    if (c->lt && snipi_cuda_is_fp8(a->recipe->format)) {
        const snip_status status = bias ? snipi_cuda_each(snipi_cuda_repeat_row{ y, bias, n }, m * n, stream) : SNIP_OK;
        return status ? status
                      : snip_cuda_gemm_cublaslt(c->lt, m, n, k, a, b, y, n, accumulate || bias, c->lt_scratch,
                                                c->lt_bytes, stream);
    }
#endif
    return snipi_cuda_gemm(m, n, k, a, b, c->codes, y, n, accumulate, bias, snipi_cuda_counts(call), stream);
}

static snip_status snipi_cuda_fwd(const snipi_call *call, snip_format format, float *y, const float *x, const float *w,
                                  const float *bias) {
    const snipi_layer *l = call->l;
    snipi_cuda_coded a = snipi_cuda_coded_in(SNIPI_SLOT_A, SNIPI_ROLE_X), b;
    const unsigned long long *more;
    snip_status status = snipi_cuda_weight(call, format, 0, w, &b, &more);
    if (!status) status = snipi_cuda_code(call, format, SNIPI_ACTIVATION, x, call->rows, l->k, more, &a, NULL);
    return status ? status : snipi_cuda_multiply(call, call->rows, l->n, l->k, &a.operand, &b.operand, y, 0, bias);
}

// dy_t, if wanted, becomes dY transposed, from the same read of dY.
static snip_status snipi_cuda_dgrad_with(const snipi_call *call, snip_format format, float *dx, int accumulate,
                                         const float *dy, const float *w, snipi_cuda_coded *dy_t) {
    const snipi_layer *l = call->l;
    snipi_cuda_coded a = snipi_cuda_coded_in(SNIPI_SLOT_A, SNIPI_ROLE_DY), b;
    const unsigned long long *more;
    snip_status status = snipi_cuda_weight(call, format, 1, w, &b, &more);
    if (!status) status = snipi_cuda_code(call, format, SNIPI_GRADIENT, dy, call->rows, l->n, more, &a, dy_t);
    return status ? status
                  : snipi_cuda_multiply(call, call->rows, l->k, l->n, &a.operand, &b.operand, dx, accumulate, NULL);
}

static snip_status snipi_cuda_dgrad(const snipi_call *call, snip_format format, float *dx, int accumulate,
                                    const float *dy, const float *w) {
    return snipi_cuda_dgrad_with(call, format, dx, accumulate, dy, w, NULL);
}

static snip_status snipi_cuda_wgrad_with(const snipi_call *call, snip_format format, float *dw, int accumulate,
                                         const snip_operand *dy_t, int64_t features, const float *x) {
    const snipi_layer *l = call->l;
    snipi_cuda_coded b = snipi_cuda_coded_in(SNIPI_SLOT_B, SNIPI_ROLE_X_T);
    const snip_status status = snipi_cuda_code(call, format, SNIPI_ACTIVATION, x, call->rows, l->k, NULL, NULL, &b);
    return status ? status
                  : snipi_cuda_multiply(call, features, l->k, call->rows, dy_t, &b.operand, dw, accumulate, NULL);
}

static snip_status snipi_cuda_wgrad(const snipi_call *call, snip_format format, float *dw, int accumulate,
                                    const float *dy, int64_t features, const float *x) {
    snipi_cuda_coded dy_t = snipi_cuda_coded_in(SNIPI_CUDA_TURNED, SNIPI_ROLE_DY_T);
    const snip_status status = snipi_cuda_code(call, format, SNIPI_GRADIENT, dy, call->rows, features, NULL, NULL,
                                               &dy_t);
    return status ? status : snipi_cuda_wgrad_with(call, format, dw, accumulate, &dy_t.operand, features, x);
}

// Where both GEMMs have one format, dY is quantized for both from one read.
static snip_status snipi_cuda_gradients(const snipi_call *call, float *dinp, float *dweight, const float *dout,
                                        const float *inp, const float *weight) {
    const snipi_layer *l = call->l;
    const snip_format format = snipi_format(l, SNIP_DGRAD), format_w = snipi_format(l, SNIP_WGRAD);
    const int both = dinp && dweight && format == format_w;
    snipi_cuda_coded dy_t = snipi_cuda_coded_in(SNIPI_CUDA_TURNED, SNIPI_ROLE_DY_T);
    snip_status status = SNIP_OK;
    if (dinp) status = snipi_cuda_dgrad_with(call, format, dinp, 1, dout, weight, both ? &dy_t : NULL);
    if (status || !dweight) return status;
    return both ? snipi_cuda_wgrad_with(call, format_w, dweight, 1, &dy_t.operand, l->n, inp)
                : snipi_cuda_wgrad(call, format_w, dweight, 1, dout, l->n, inp);
}

// dbias += the sum of dy's rows, in double as on the CPU; a warp takes every eighth row of 32 columns.
static __global__ void snipi_cuda_bias_kernel(float *dbias, const float *dy, int64_t rows, int64_t n) {
    __shared__ double sums[SNIPI_THREADS];
    const int warp = (int)threadIdx.x / SNIPI_WARP, lane = (int)threadIdx.x % SNIPI_WARP;
    const int warps = SNIPI_THREADS / SNIPI_WARP;
    const int64_t col = (int64_t)blockIdx.x * SNIPI_WARP + lane;
    double sum = 0;
    for (int64_t r = warp; r < rows && col < n; r += warps) sum += (double)dy[r * n + col];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp || col >= n) return;
    for (int w = 1; w < warps; w++) sum += sums[w * SNIPI_WARP + lane];
    dbias[col] = (float)((double)dbias[col] + sum);
}

static snip_status snipi_cuda_bias_gradient(const snipi_call *call, float *dbias, const float *dout) {
    return snipi_cuda_launch(snipi_cuda_bias_kernel, snipi_ceil_div(call->l->n, SNIPI_WARP), SNIPI_THREADS, 0,
                             snipi_cuda_stream(call), dbias, dout, call->rows, call->l->n);
}

// ---- what is watched in every step

static __global__ void snipi_cuda_nonfinite_kernel(const float *x, int64_t n, unsigned long long *count) {
    __shared__ double sums[SNIPI_THREADS / SNIPI_WARP];
    double bad = 0;
    for (int64_t i = (int64_t)blockIdx.x * SNIPI_THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * SNIPI_THREADS)
        bad += snipi_nonfinite(x[i]);
    bad = snipi_cuda_block_sum(bad, sums);
    if (threadIdx.x == 0 && bad > 0) atomicAdd(count, (unsigned long long)bad);
}

static snip_status snipi_cuda_add_nonfinite(const snipi_call *call, const float *x, int64_t n,
                                            unsigned long long *count) {
    return snipi_cuda_launch(snipi_cuda_nonfinite_kernel, snipi_cuda_sum_blocks(n), SNIPI_THREADS, 0,
                             snipi_cuda_stream(call), x, n, count);
}

static snip_status snipi_cuda_count_nonfinite(const snipi_call *call, const float *x, int64_t n) {
    return snipi_cuda_add_nonfinite(call, x, n, &snipi_cuda_watched_of(call)->counts[SNIPI_CUDA_NONFINITE]);
}

// The host cannot look at x: its address alone tells micro-batches apart.
static uint64_t snipi_cuda_content(const snipi_call *, const float *, int64_t) { return 0; }

static __global__ void snipi_cuda_observe_kernel(snipi_cuda_watched *watched, int which, const float *x, int64_t n) {
    __shared__ double sums[SNIPI_OBSERVED_RUNS / SNIPI_WARP];
    int64_t i;
    const int64_t end = snipi_observed_run(threadIdx.x, n, &i);
    double seen = (double)(end - i), square = 0;
    for (; i < end; i++) square += (double)x[i] * (double)x[i];
    seen = snipi_cuda_block_sum(seen, sums);
    square = snipi_cuda_block_sum(square, sums);
    if (threadIdx.x) return;
    watched->seen[which] += seen;
    watched->seen_sq[which] += square;
    watched->seen_calls += which == 0;
}

// A frozen plan is not watched.
static snip_status snipi_cuda_observe(const snipi_call *call, int which, const float *x, int64_t n) {
    if (call->s->desc.every < 0) return SNIP_OK;
    return snipi_cuda_launch(snipi_cuda_observe_kernel, 1, SNIPI_OBSERVED_RUNS, 0, snipi_cuda_stream(call),
                             snipi_cuda_watched_of(call), which, x, n);
}

// ---- records, norms and noise

static snip_status snipi_cuda_record(snipi_call *call) {
    snip_cuda *c = snipi_cuda_of(call);
    const cudaStream_t stream = snipi_cuda_stream(call);
    int begins;
    if (!snipi_measurement_of(call, 0, &begins)) return SNIP_OUT_OF_MEMORY;
    call->sums = c->sums + snipi_cuda_index(call);
    call->sketch = c->sketch + snipi_cuda_index(call) * SNIPI_SKETCHES;
    if (!begins) return SNIP_OK;
    // Where the loss probe did not call the layer, |W| is not known and W does not move.
    cudaError_t error = cudaMemsetAsync(&snipi_cuda_kept_of(call)->probe_step, 0, sizeof(double), stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(call->sums, 0, sizeof *call->sums, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(call->sketch, 0, SNIPI_SKETCHES * sizeof *call->sketch, stream);
    return snipi_cuda_status(error);
}

static snip_status snipi_cuda_sum_sq(const snipi_call *call, const float *x, int64_t n, double *total) {
    return snipi_cuda_total(call, snipi_cuda_square{ x }, n, total, 1, 0);
}

// From |X|^2, which sigma_x holds until then, and |W|^2.
struct snipi_cuda_size_sigmas {
    snipi_sums *sums;
    const snipi_cuda_kept *kept;
    double noise, elements_x, elements_w;

    __device__ void operator()(int64_t) const {
        sums->sigma_x = noise * snipi_input_size(kept->input_size, sqrt(sums->sigma_x / elements_x));
        sums->sigma_w = noise * sqrt(sums->weight_sq / elements_w);
    }
};

static snip_status snipi_cuda_size_noise(const snipi_call *call, const float *inp, const float *weight) {
    const int64_t in_x = call->rows * call->l->k, in_w = call->l->n * call->l->k;
    snipi_cuda_size_sigmas sigmas = { call->sums, snipi_cuda_kept_of(call), SNIPI_NOISE, (double)in_x, (double)in_w };
    snip_status status = snipi_cuda_sum_sq(call, weight, in_w, &call->sums->weight_sq);
    if (!status) status = snipi_cuda_sum_sq(call, inp, in_x, &call->sums->sigma_x);
    return status ? status : snipi_cuda_each(sigmas, 1, snipi_cuda_stream(call));
}

static snip_status snipi_cuda_noisy_input(const snipi_call *call, float *out, const float *x) {
    return snipi_cuda_add_noise(out, x, call->rows * call->l->k, 0, &call->sums->sigma_x, NULL,
                                snipi_key(call->s, call->l, call->micro, SNIPI_ROLE_NOISE_X), snipi_cuda_stream(call));
}

static snip_status snipi_cuda_noise_dot(const snipi_call *call, const float *x, int64_t n, snip_rng_key key, double *to,
                                        float *add_to) {
    const snip_status status = snipi_cuda_dot_noise(x, n, key, to, 1, snipi_cuda_of(call)->slot[SNIPI_CUDA_PARTS],
                                                    snipi_cuda_stream(call));
    return status ? status : snipi_cuda_add_to(call, add_to, x, n);
}

// ---- the optimizer's sensitivity

// D. Lion's noise comes from the mean square of m, which the host does not know.
struct snipi_cuda_sensitivities {
    snipi_sensitivity d;
    const double *moment_sq;
    double density, variance, ratio;  // 2 / sqrt(2 pi); noise^2 / |m|^2; beta1 / (1 - beta1)
    float *to;

    __device__ float at(int64_t i) const {
        snipi_sensitivity own = d;
        if (moment_sq) {
            const double noise = sqrt(*moment_sq * variance);
            own.numerator = noise > 0 ? (float)(density / noise) : 0;
            own.scale = noise > 0 ? (float)(ratio / noise) : 0;
        }
        return snipi_sensitivity_at(&own, i);
    }

    __device__ void operator()(int64_t i) const { to[i] = at(i); }
};

struct snipi_cuda_sensitivity_square {
    snipi_cuda_sensitivities d;

    __device__ double operator()(int64_t i) const { return (double)d.at(i) * (double)d.at(i); }
};

static snipi_cuda_sensitivities snipi_cuda_sensitivities_of(const snipi_call *call, float *to) {
    const snip_adamw *o = &call->s->kept.adamw;
    const snipi_layer *l = call->l;
    snipi_cuda_sensitivities d = {};
    d.to = to;
    if (call->s->desc.optimizer != SNIP_LION) {
        d.d = snipi_sensitivity_of(call->s, l, NULL);
        return d;
    }
    d.d.kind = SNIP_LION;
    d.d.state = l->m;
    d.moment_sq = &call->sums->moment_sq;
    d.density = SNIPI_DENSITY;
    d.variance = (1 + o->beta2) / (1 - o->beta2) / (double)(l->n * l->k);
    d.ratio = o->beta1 / (1 - o->beta1);
    return d;
}

// m and v that are not finite discard the measurement when it is read.
static snip_status snipi_cuda_sensitivity(const snipi_call *call) {
    const snipi_layer *l = call->l;
    const int64_t n = l->n * l->k;
    snip_status status = SNIP_OK;
    for (const float *state : { l->m, l->v })
        if (state && !status) status = snipi_cuda_add_nonfinite(call, state, n, &snipi_cuda_watched_of(call)->state);
    if (call->s->desc.optimizer == SNIP_LION && !status)
        status = snipi_cuda_sum_sq(call, l->m, n, &call->sums->moment_sq);
    if (status) return status;
    const snipi_cuda_sensitivity_square square = { snipi_cuda_sensitivities_of(call, NULL) };
    return snipi_cuda_total(call, square, n, &call->sums->sensitivity_sq, 1, 0);
}

static __global__ void snipi_cuda_step_size_kernel(snipi_cuda_globals *globals, snipi_cuda_kept *kept,
                                                   const snipi_sums *sums, int layers, double step) {
    __shared__ double parts[SNIPI_THREADS / SNIPI_WARP];
    double sum = 0;
    for (int i = (int)threadIdx.x; i < layers; i += SNIPI_THREADS)
        if (sums[i].weight_sq > 0) sum += sums[i].sensitivity_sq / (sums[i].weight_sq * sums[i].weight_sq);
    sum = snipi_cuda_block_sum(sum, parts);
    if (threadIdx.x == 0) globals->tau = sum > 0 ? step / sqrt(sum / layers) : 0;
    __syncthreads();
    const double tau = globals->tau;
    for (int i = (int)threadIdx.x; i < layers; i += SNIPI_THREADS)
        kept[i].probe_step = sums[i].weight_sq > 0 ? tau / sqrt(sums[i].weight_sq) : 0;
}

static snip_status snipi_cuda_step_size(const snipi_call *call) {
    const snip_cuda *c = snipi_cuda_of(call);
    const snip_status status = snipi_cuda_launch(snipi_cuda_step_size_kernel, 1, SNIPI_THREADS, 0,
                                                 snipi_cuda_stream(call), c->globals, c->kept,
                                                 (const snipi_sums *)c->sums, c->s->n_layers, SNIPI_STEP);
    return status ? snipi_fail(c->s, status, "snip_cuda_next_pass", snip_status_text(status)) : SNIP_OK;
}

static snip_status snipi_cuda_noisy_weight(const snipi_call *call, float *out, const float *w) {
    const snip *s = call->s;
    const snipi_layer *l = call->l;
    const cudaStream_t stream = snipi_cuda_stream(call);
    const int64_t n = l->n * l->k;
    if (s->pass == SNIP_PASS_LOSS_PROBE)
        return snipi_cuda_add_noise(out, w, n, 0, &call->sums->sigma_w, NULL, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_W),
                                    stream);
    const snip_status status = l->frozen ? snipi_cuda_status(cudaMemsetAsync(out, 0, (size_t)n * sizeof(float), stream))
                                         : snipi_cuda_each(snipi_cuda_sensitivities_of(call, out), n, stream);
    return status ? status
                  : snipi_cuda_add_noise(out, w, n, 0, &snipi_cuda_kept_of(call)->probe_step, out,
                                         snipi_key(s, l, 0, SNIPI_ROLE_PROBE), stream);
}

// |u|^2 of the optimizer's last update, at learning rate 1.
struct snipi_cuda_update_square {
    snip_optimizer kind;
    const float *m, *v;
    float m_scale, v_scale, eps;

    __device__ double operator()(int64_t i) const {
        const float u = kind == SNIP_ADAMW          ? snipi_adam_at(m[i] * m_scale, v[i], v_scale, eps)
                        : kind == SNIP_SGD_MOMENTUM ? m[i]
                                                    : 1.0f;
        return (double)u * (double)u;
    }
};

static snip_status snipi_cuda_update_sq(const snipi_call *call) {
    const snip_adamw *o = &call->s->kept.adamw;
    const snipi_layer *l = call->l;
    const snipi_cuda_update_square square = { call->s->desc.optimizer,
                                              l->m,
                                              l->v,
                                              (float)(1 / (1 - pow(o->beta1, (double)o->step))),
                                              (float)(1 / (1 - pow(o->beta2, (double)o->step))),
                                              (float)o->eps };
    return snipi_cuda_total(call, square, l->n * l->k, &call->sums->update_sq, 1, 0);
}

// ---- sketches and mixing, with the CPU's bits

// As snipi_sketch_part: a thread for each bucket of each part adds its element of one chunk after another. For 32
// chunks at a time a lane finds where its chunk's element for the warp's first bucket lies, and the signs of the 32
// from there on.
static __global__ void snipi_cuda_sketch_kernel(float *own, const float *x, int64_t n, float factor, snip_rng_key key,
                                                int64_t chunks, int64_t parts) {
    const int across = SNIPI_SKETCH / SNIPI_THREADS, part = (int)blockIdx.x / across;
    const int bucket = (int)blockIdx.x % across * SNIPI_THREADS + (int)threadIdx.x, lane = bucket % SNIPI_WARP;
    const int64_t end = chunks * (part + 1) / parts;
    float sum = 0;
    for (int64_t c0 = chunks * part / parts; c0 < end; c0 += SNIPI_WARP) {
        const uint64_t chunk = (uint64_t)(c0 + lane);
        uint32_t words[4], signs = 0;
        snipi_philox(key, chunk | (uint64_t)1 << 63, words);
        const uint32_t begin = ((uint32_t)(bucket - lane) - words[0]) % SNIPI_SKETCH;
        for (uint32_t w = 0; w < 2; w++) {  // of the two words that hold them
            uint32_t at = (begin / 32 + w) % (SNIPI_SKETCH / 32);
            snipi_philox(key, chunk * (SNIPI_SKETCH / SNIPI_SIGNS) + at / 4, words);
            at = at % 4 == 0 ? words[0] : at % 4 == 1 ? words[1] : at % 4 == 2 ? words[2] : words[3];
            signs |= w == 0 ? at >> begin % 32 : begin % 32 ? at << (32 - begin % 32) : 0;
        }
        for (int j = 0; j < SNIPI_WARP && c0 + j < end; j++) {
            const uint32_t from = __shfl_sync(SNIPI_ALL_LANES, begin, j);
            const uint32_t sign = __shfl_sync(SNIPI_ALL_LANES, signs, j) >> lane << 31;
            const int64_t i = (c0 + j) * SNIPI_SKETCH + (from + (uint32_t)lane) % SNIPI_SKETCH;
            if (i < n) sum += snipi_float(snipi_bits(factor * x[i]) ^ sign);
        }
    }
    own[(int64_t)part * SNIPI_SKETCH + bucket] = sum;
}

struct snipi_cuda_add_parts {  // own [parts][SNIPI_SKETCH]
    float *sketch;
    const float *own;
    int64_t parts;

    __device__ void operator()(int64_t i) const {
        float sum = sketch[i];
        for (int64_t p = 0; p < parts; p++) sum += own[p * SNIPI_SKETCH + i];
        sketch[i] = sum;
    }
};

static snip_status snipi_cuda_sketch_add(const snipi_call *call, int which, const float *x, int64_t n, float factor) {
    const int64_t chunks = snipi_ceil_div(n, SNIPI_SKETCH), parts = snipi_sketch_parts(chunks);
    const cudaStream_t stream = snipi_cuda_stream(call);
    float *own = snipi_cuda_scratch(call, SNIPI_SLOT_SKETCH, parts * SNIPI_SKETCH);
    if (!own) return SNIP_OUT_OF_MEMORY;
    const snip_status status = snipi_cuda_launch(
        snipi_cuda_sketch_kernel, parts * ((int)SNIPI_SKETCH / (int)SNIPI_THREADS), SNIPI_THREADS, 0, stream, own, x, n,
        factor, snipi_key(call->s, call->l, 0, SNIPI_ROLE_SKETCH + which), chunks, parts);
    return status ? status
                  : snipi_cuda_each(snipi_cuda_add_parts{ call->sketch[which], own, parts }, SNIPI_SKETCH, stream);
}

static snip_status snipi_cuda_sketch_sum(const snipi_call *call, int which, const float *x, float factor) {
    return snipi_cuda_each(snipi_cuda_add_scaled{ call->sketch[which], x, factor }, SNIPI_SKETCH,
                           snipi_cuda_stream(call));
}

// |sketch|^2 of all layers' sketches; a block for each.
static __global__ void snipi_cuda_sketched_kernel(snipi_sums *sums, const float (*sketch)[SNIPI_SKETCH]) {
    __shared__ double parts[SNIPI_THREADS / SNIPI_WARP];
    const float *x = sketch[blockIdx.x];
    double sum = 0;
    for (int i = (int)threadIdx.x; i < SNIPI_SKETCH; i += SNIPI_THREADS) sum += (double)x[i] * (double)x[i];
    sum = snipi_cuda_block_sum(sum, parts);
    if (threadIdx.x == 0) sums[blockIdx.x / SNIPI_SKETCHES].sketched_sq[blockIdx.x % SNIPI_SKETCHES] = sum;
}

// An element of snipi_mix_part.
struct snipi_cuda_mixed_rows {
    snip_rng_key key;
    const float *x;
    int64_t rows, cols, before;
    uint32_t targets;
    float *mixed;

    __device__ void operator()(int64_t i) const {
        const uint32_t to = (uint32_t)(i / cols);
        uint32_t signs[4], hash[4];
        float sum = 0;
        for (int64_t chunk = before / targets; chunk * targets < before + rows; chunk++) {
            snipi_mix_hash(key, chunk, signs, hash);
            const uint32_t at = (to - hash[0]) % targets;  // 2^32 is a multiple of it
            const int64_t row = chunk * targets + at - before;
            // An index would put the words in local memory.
            const uint32_t word = at < 32 ? signs[0] : at < 64 ? signs[1] : at < 96 ? signs[2] : signs[3];
            if (row >= 0 && row < rows) sum += (word >> at % 32 & 1u ? 1.0f : -1.0f) * x[row * cols + i % cols];
        }
        mixed[i] = sum;
    }
};

static snip_status snipi_cuda_mix_rows(const snipi_call *call, snip_rng_key key, const float *x, int64_t rows,
                                       int64_t cols, int64_t before, int targets, float *mixed) {
    const snipi_cuda_mixed_rows mix = { key, x, rows, cols, before, (uint32_t)targets, mixed };
    return snipi_cuda_each(mix, targets * cols, snipi_cuda_stream(call));
}

// An element of snipi_mix_columns_part.
struct snipi_cuda_mixed_columns {
    snip_rng_key key;
    const float *x;
    int64_t cols;
    float *mixed;

    __device__ void operator()(int64_t i) const {
        const uint32_t to = (uint32_t)(i % SNIPI_PROJECTED);
        const float *row = x + i / SNIPI_PROJECTED * cols;
        uint32_t signs[4], hash[4];
        float sum = 0, straight = 0, round = 0;  // round: what has gone round the end
        for (int64_t chunk = 0; chunk * SNIPI_PROJECTED < cols; chunk++) {
            snipi_mix_hash(key, chunk, signs, hash);
            const uint32_t at = (to - hash[0]) % SNIPI_PROJECTED;
            const int64_t col = chunk * SNIPI_PROJECTED + at;
            const float term = col < cols ? (signs[0] >> at & 1u ? 1.0f : -1.0f) * row[col] : 0.0f;
            if (at + hash[0] % SNIPI_PROJECTED < SNIPI_PROJECTED)
                straight += term;
            else
                round += term;
            if (chunk % SNIPI_MIX_CHUNKS < SNIPI_MIX_CHUNKS - 1 && (chunk + 1) * SNIPI_PROJECTED < cols) continue;
            sum += straight + round;
            straight = round = 0;
        }
        mixed[i] = sum;
    }
};

static snip_status snipi_cuda_mix_columns(const snipi_call *call, snip_rng_key key, const float *x, int64_t rows,
                                          int64_t cols, float *mixed) {
    return snipi_cuda_each(snipi_cuda_mixed_columns{ key, x, cols, mixed }, rows * SNIPI_PROJECTED,
                           snipi_cuda_stream(call));
}

static snip_status snipi_cuda_product(const snipi_call *call, int64_t m, int64_t n, int64_t k, const float *a,
                                      const float *b, int turned, float *c) {
    const snip_recipe recipe = SNIP_RECIPE_F32;
    snip_operand operand_a = {}, operand_b = {};
    operand_a.recipe = operand_b.recipe = &recipe;
    operand_a.codes = a;
    operand_b.codes = b;
    operand_b.transposed = !turned;
    return snip_cuda_gemm(m, n, k, &operand_a, &operand_b, c, n, 0, NULL, snipi_cuda_stream(call));
}

// ---- rounding errors

// As snipi_scaling_bucket: a block for each bucket.
static __global__ void snipi_cuda_scaling_kernel(double *buckets, const float *x, const float *dx, int64_t rows,
                                                 int64_t k, int64_t before, double factor) {
    __shared__ double parts[SNIPI_THREADS / SNIPI_WARP];
    const int64_t first = before / SNIPI_BLOCK_ROWS, end = before + rows;
    int64_t block = first + ((int64_t)blockIdx.x + SNIPI_BLOCKS - first % SNIPI_BLOCKS) % SNIPI_BLOCKS;
    double sum = 0;
    for (; block * SNIPI_BLOCK_ROWS < end; block += SNIPI_BLOCKS) {
        const int64_t from = snipi_max(block * SNIPI_BLOCK_ROWS, before) - before;
        const int64_t to = snipi_min((block + 1) * SNIPI_BLOCK_ROWS, end) - before;
        for (int64_t i = from * k + threadIdx.x; i < to * k; i += SNIPI_THREADS) sum += (double)dx[i] * (double)x[i];
    }
    sum = snipi_cuda_block_sum(sum, parts);
    if (threadIdx.x == 0) buckets[blockIdx.x] += factor * sum;
}

static snip_status snipi_cuda_scaling(const snipi_call *call, const float *x, const float *dx, double factor,
                                      float *add_to) {
    const snip_status status = snipi_cuda_launch(snipi_cuda_scaling_kernel, SNIPI_BLOCKS, SNIPI_THREADS, 0,
                                                 snipi_cuda_stream(call), &call->sums->scaling[0], x, dx, call->rows,
                                                 call->l->k, call->before, factor);
    return status ? status : snipi_cuda_add_to(call, add_to, dx, call->rows * call->l->k);
}

// What quantizing has measured, added to a layer's sums; each of them may be NULL.
struct snipi_cuda_add_stats {
    double *err_sq, *dot, *sum_sq;
    int once;  // sum_sq is known where it is not 0
    const snip_quant_stats *stats;

    __device__ void operator()(int64_t) const {
        if (err_sq) *err_sq += stats->err_sq;
        if (dot) *dot += stats->dot;
        if (sum_sq && !(once && *sum_sq > 0)) *sum_sq += stats->sum_sq;
    }
};

// Rounds x [rows][cols] as candidate f does. beside: what the errors are multiplied by for stats.dot, or NULL. rounded:
// what x becomes, or NULL.
static snip_status snipi_cuda_round(const snipi_call *call, int f, snipi_kind kind, snip_rng_key key, const float *x,
                                    int64_t rows, int64_t cols, const float *beside, float *rounded,
                                    snipi_cuda_add_stats add) {
    const snip_cuda *c = snipi_cuda_of(call);
    const cudaStream_t stream = snipi_cuda_stream(call);
    const snip_recipe recipe = snipi_recipe_of(call->s, snipi_candidates[f], kind);
    snip_quant_stats *stats = (snip_quant_stats *)c->slot[SNIPI_CUDA_STATS];
    snip_quantize_job job = {};
    job.x = x;
    job.rows = rows;
    job.cols = job.ld = job.ld_out = cols;
    job.recipe = &recipe;
    job.weight = beside;
    job.out = rounded;
    job.key = key;
    add.stats = stats;
    const snip_status status = snip_cuda_quantize(&job, SNIP_CUDA_PACKED, stats, NULL, c->slot[SNIPI_CUDA_QUANTIZE],
                                                  stream);
    return status ? status : snipi_cuda_each(add, 1, stream);
}

// As snipi_input_errors_chunk: a block for each row, whose sums go to sums [SNIPI_ROW_SUMS][rows].
static __global__ void snipi_cuda_rows_kernel(double *sums, const float *x, const float *rounded, const float *dx,
                                              int64_t k) {
    __shared__ double parts[SNIPI_THREADS / SNIPI_WARP];
    const int64_t row = blockIdx.x, rows = gridDim.x;
    double dot = 0, dx_sq = 0, scale = 0;  // <dX_r, e_r>, |dX_r|^2, <dX_r, X_r>
    for (int64_t i = row * k + threadIdx.x; i < (row + 1) * k; i += SNIPI_THREADS) {
        const double d = (double)dx[i];
        dot += d * (double)(rounded[i] - x[i]);
        dx_sq += d * d;
        scale += d * (double)x[i];
    }
    dot = snipi_cuda_block_sum(dot, parts);
    dx_sq = snipi_cuda_block_sum(dx_sq, parts);
    scale = snipi_cuda_block_sum(scale, parts);
    if (threadIdx.x) return;
    sums[SNIPI_DOT * rows + row] = dot;
    sums[SNIPI_DX_SQ * rows + row] = dx_sq;
    sums[SNIPI_ALONG * rows + row] = dot * dot;
    sums[SNIPI_BOTH * rows + row] = dot * scale;
    sums[SNIPI_SCALE * rows + row] = scale * scale;
}

static snip_status snipi_cuda_input_errors(const snipi_call *call, int f, const float *x, const float *dx) {
    const int64_t rows = call->rows, k = call->l->k;
    snipi_candidate_sums *to = &call->sums->candidate[f];
    double *total[SNIPI_ROW_SUMS] = { &to->dot_x, &to->dx_sq, &to->along_x, &to->both_x, &to->scale_x };
    double *sums = (double *)snipi_cuda_of(call)->slot[SNIPI_CUDA_ROWS];
    float *rounded = snipi_cuda_scratch(call, SNIPI_SLOT_X, rows * k);
    if (!rounded) return SNIP_OUT_OF_MEMORY;
    snip_status status = snipi_cuda_round(
        call, f, SNIPI_ACTIVATION, snipi_key(call->s, call->l, call->micro, SNIPI_ROLE_X), x, rows, k, x, rounded,
        { &to->err_x, &to->self_x, f ? NULL : &call->sums->input_sq, 0, NULL });
    if (!status)
        status = snipi_cuda_launch(snipi_cuda_rows_kernel, rows, SNIPI_THREADS, 0, snipi_cuda_stream(call), sums, x,
                                   (const float *)rounded, dx, k);
    for (int i = 0; i < SNIPI_ROW_SUMS && !status; i++)
        status = snipi_cuda_total(call, snipi_cuda_value{ sums + i * rows }, rows, total[i], 1, 1);
    return status;
}

static snip_status snipi_cuda_gradient_errors(const snipi_call *call, int f, const float *dy) {
    return snipi_cuda_round(call, f, SNIPI_GRADIENT, snipi_key(call->s, call->l, call->micro, SNIPI_ROLE_DY), dy,
                            call->rows, call->l->n, NULL, NULL,
                            { &call->sums->candidate[f].err_dy, NULL, f ? NULL : &call->sums->gradient_sq, 0, NULL });
}

// first: W is met for the first time in this pass. A layer that the loss probe did not call has no |W|^2 yet.
static snip_status snipi_cuda_weight_errors(const snipi_call *call, int f, const float *w, const float *dw, int first) {
    const snipi_layer *l = call->l;
    const snip_rng_key key = snipi_key(call->s, l, 0, SNIPI_ROLE_W);
    snipi_candidate_sums *to = &call->sums->candidate[f];
    snipi_cuda_add_stats add = { first ? &to->err_w : NULL, &to->dot_w, first ? &call->sums->weight_sq : NULL, 1,
                                 NULL };
    const snip_status status = snipi_cuda_round(call, f, SNIPI_WEIGHT, key, w, l->n, l->k, dw, NULL, add);
    if (status || !first || !snipi_probes_updates(call->s)) return status;
    return snipi_cuda_round(call, f, SNIPI_WEIGHT, key, w, l->n, l->k, w, NULL, { NULL, &to->self_w, NULL, 0, NULL });
}

// samples of n output features, at equal distances.
struct snipi_cuda_pick {
    float *to;
    const float *dy;
    int64_t n, samples;

    __device__ void operator()(int64_t i) const { to[i] = dy[i / samples * n + i % samples * n / samples]; }
};

struct snipi_cuda_feature_errors {  // of the sampled features
    const float *result, *exact;
    snipi_cuda_sensitivities d;
    int64_t n, k, samples;

    __device__ double operator()(int64_t i) const {
        const int64_t at = i / k * n / samples * k + i % k;
        const float e = (result[i] - exact[at]) * d.at(at);
        return (double)e * (double)e;
    }
};

static snip_status snipi_cuda_wgrad_errors(const snipi_call *call, const float *dy, const float *x, const float *dw) {
    snip_cuda *c = snipi_cuda_of(call);
    const snipi_layer *l = call->l;
    const int64_t samples = snipi_samples(call->s, l);
    float *picked = snipi_cuda_scratch(call, SNIPI_SLOT_SAMPLE, call->rows * samples);
    float *result = snipi_cuda_scratch(call, SNIPI_SLOT_SAMPLE_OUT, samples * l->k);
    if (!picked || !result) return SNIP_OUT_OF_MEMORY;
    const snipi_cuda_feature_errors errors = {
        result, dw, snipi_cuda_sensitivities_of(call, NULL), l->n, l->k, samples
    };
    c->uncounted = 1;  // counted by the layer's own GEMMs
    snip_status status = snipi_cuda_each(snipi_cuda_pick{ picked, dy, l->n, samples }, call->rows * samples,
                                         snipi_cuda_stream(call));
    for (int f = 0; f < SNIPI_CANDIDATES && !status; f++) {
        status = snipi_cuda_wgrad(call, snipi_candidates[f], result, 0, picked, samples, x);
        if (!status)
            status = snipi_cuda_total(call, errors, samples * l->k, &call->sums->candidate[f].wgrad_err,
                                      (double)l->n / (double)samples, 1);
    }
    c->uncounted = 0;
    return status;
}

static const snipi_operations *snipi_cuda_operations() {
    static const snipi_operations device = {
        snipi_cuda_fwd,           snipi_cuda_dgrad,           snipi_cuda_wgrad,         snipi_cuda_gradients,
        snipi_cuda_bias_gradient, snipi_cuda_count_nonfinite, snipi_cuda_content,       snipi_cuda_observe,
        snipi_cuda_record,        snipi_cuda_scratch,         snipi_cuda_size_noise,    snipi_cuda_noisy_input,
        snipi_cuda_noisy_weight,  snipi_cuda_noise_dot,       snipi_cuda_mix_rows,      snipi_cuda_mix_columns,
        snipi_cuda_sketch_add,    snipi_cuda_sketch_sum,      snipi_cuda_product,       snipi_cuda_scaling,
        snipi_cuda_input_errors,  snipi_cuda_gradient_errors, snipi_cuda_weight_errors, snipi_cuda_wgrad_errors,
        snipi_cuda_sensitivity,   snipi_cuda_step_size,
    };
    return &device;
}

// ---- calls of a layer

static const char snipi_cuda_step_changed[] = "the session's step was changed after snip_cuda_create";

// Begins a call; refused as in snip.h, and where the session is not the one that the device knows.
static snip_status snipi_cuda_begin_call(snipi_call *call, snip_cuda *c, const char *function, int layer, const void *x,
                                         const void *y, const void *z, int64_t rows, cudaStream_t stream) {
    snip *s = c ? c->s : NULL;
    if (!s || !snipi_begin_call(call, s, layer, x, y, z, rows, snipi_cuda_operations(), c, stream))
        return snipi_refuse_call(s, function, layer);
    if (rows <= c->rows && c->step == s->kept.step) return SNIP_OK;
    snipi_fail_layer(s, SNIP_BAD_ARGUMENT, call->l,
                     rows > c->rows ? "more rows than snip_cuda_create was told of" : snipi_cuda_step_changed);
    return s->mode == SNIP_TRAIN ? snipi_keep(s, SNIP_BAD_ARGUMENT) : SNIP_BAD_ARGUMENT;
}

SNIP_API snip_status snip_cuda_linear_forward(snip_cuda *c, int layer, float *out, const float *inp,
                                              const float *weight, const float *bias, int64_t rows,
                                              cudaStream_t stream) {
    snipi_call call;
    const snip_status refused = snipi_cuda_begin_call(&call, c, "snip_cuda_linear_forward", layer, out, inp, weight,
                                                      rows, stream);
    if (refused || rows == 0) return refused;
    return snipi_finish_call(&call, call.l->nonfinite, snipi_forward(&call, out, inp, weight, bias));
}

SNIP_API snip_status snip_cuda_linear_backward(snip_cuda *c, int layer, float *dinp, float *dweight, float *dbias,
                                               const float *dout, const float *inp, const float *weight, int64_t rows,
                                               cudaStream_t stream) {
    snipi_call call;
    const snip_status refused = snipi_cuda_begin_call(&call, c, "snip_cuda_linear_backward", layer, dout, inp, weight,
                                                      rows, stream);
    if (refused || rows == 0) return refused;
    return snipi_finish_call(&call, call.l->nonfinite, snipi_backward(&call, dinp, dweight, dbias, dout, inp, weight));
}

SNIP_API snip_status snip_cuda_linear_recompute(snip_cuda *c, int layer, float *out, const float *inp,
                                                const float *weight, const float *bias, int64_t rows,
                                                cudaStream_t stream) {
    snipi_call call;
    const snip_status refused = snipi_cuda_begin_call(&call, c, "snip_cuda_linear_recompute", layer, out, inp, weight,
                                                      rows, stream);
    if (refused || rows == 0) return refused;
    c->uncounted = 1;  // counted by the forward call
    const snip_status status = snipi_recompute(&call, out, inp, weight, bias);
    c->uncounted = 0;
    return snipi_finish_call(&call, call.l->nonfinite, status);
}

// ---- passes and steps

SNIP_API int snip_cuda_next_pass(snip_cuda *c, const float *loss, cudaStream_t stream) {
    snipi_call call;
    if (!c) return 0;
    snip *s = c->s;
    if (s->told) {
        snipi_keep(
            s, snipi_bad(s, "snip_cuda_next_pass", "called after the step's last pass: snip_cuda_end_step is missing"));
        return 0;
    }
    snipi_end_pass(s);
    if (snipi_in_probe(s)) {
        snipi_begin_call(&call, s, 0, NULL, NULL, NULL, 0, snipi_cuda_operations(), c, stream);
        snipi_advance(&call);
        return 1;
    }
    s->told = 1;
    c->has_loss = loss != NULL;
    if (!loss && s->pass == SNIP_PASS_CLEAN)
        snipi_keep(s, snipi_bad(s, "snip_cuda_next_pass", "a measuring step needs its loss"));
    if (loss && cudaMemcpyAsync(&c->globals->loss, loss, sizeof *loss, cudaMemcpyDeviceToDevice, stream) != cudaSuccess)
        snipi_keep(s, snipi_fail(s, SNIP_DEVICE, "snip_cuda_next_pass", snip_status_text(SNIP_DEVICE)));
    return 0;
}

// The records are complete once the optimizer has run; then they go to the host.
static snip_status snipi_cuda_send_records(snip_cuda *c, cudaStream_t stream) {
    snip *s = c->s;
    snipi_call call;
    snip_status status = SNIP_OK;
    for (int i = 0; i < s->n_layers && snipi_probes_updates(s); i++) {
        const snipi_layer *l = &s->layers[i];
        snipi_begin_call(&call, s, i, NULL, NULL, NULL, 0, snipi_cuda_operations(), c, stream);
        call.sums = c->sums + i;
        if (l->measurement && !l->frozen && snipi_bound(s, l) && !status) status = snipi_cuda_update_sq(&call);
    }
    if (!status)
        status = snipi_cuda_launch(snipi_cuda_sketched_kernel, (int64_t)s->n_layers * SNIPI_SKETCHES, SNIPI_THREADS, 0,
                                   stream, c->sums, (const float(*)[SNIPI_SKETCH])c->sketch);
    return status ? status
                  : snipi_cuda_status(cudaMemcpyAsync(c->measured, c->sums, (size_t)s->n_layers * sizeof *c->sums,
                                                      cudaMemcpyDeviceToHost, stream));
}

// The step is over: what was seen of X sizes the next measurement's noise, and watching begins anew.
static __global__ void snipi_cuda_next_step_kernel(snipi_cuda_globals *globals, uint32_t step,
                                                   snipi_cuda_watched *watched, snipi_cuda_kept *kept, int layers) {
    if (blockIdx.x == 0 && threadIdx.x == 0) globals->step = step;
    for (int i = (int)(blockIdx.x * SNIPI_THREADS + threadIdx.x); i < layers; i += (int)gridDim.x * SNIPI_THREADS) {
        const snipi_cuda_watched w = watched[i];
        kept[i].input_size = snipi_next_input_size(kept[i].input_size, w.seen_sq[0], w.seen[0], w.seen_calls);
        watched[i] = snipi_cuda_watched();
    }
}

// On the stream: the step's results to the host, and the next step's beginning.
static snip_status snipi_cuda_send(snip_cuda *c, snipi_cuda_ended *e, const float *grad_scale, cudaStream_t stream) {
    const int layers = c->s->n_layers;
    cudaError_t error = cudaSuccess;
    snip_status status = e->measured ? snipi_cuda_send_records(c, stream) : SNIP_OK;
    if (status) return status;
    if (grad_scale)
        error = cudaMemcpyAsync(&c->globals->grad_scale, grad_scale, sizeof *grad_scale, cudaMemcpyDeviceToDevice,
                                stream);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(e->globals, c->globals, sizeof *c->globals, cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess && layers)
        error = cudaMemcpyAsync(e->watched, c->watched, (size_t)layers * sizeof *c->watched, cudaMemcpyDeviceToHost,
                                stream);
    if (error != cudaSuccess) return SNIP_DEVICE;
    status = snipi_cuda_launch(snipi_cuda_next_step_kernel, snipi_max(1, snipi_ceil_div(layers, SNIPI_THREADS)),
                               SNIPI_THREADS, 0, stream, c->globals, (uint32_t)(c->step + 1), c->watched, c->kept,
                               layers);
    return status ? status : snipi_cuda_status(cudaEventRecord(e->done, stream));
}

// Whether a step that has been read met NaN or infinity, and in which layer.
static snip_status snipi_cuda_check(const snip *s, const snipi_cuda_ended *e) {
    for (int i = 0; i < s->n_layers; i++) {
        const char *why = e->watched[i].state                          ? "the optimizer's state is not finite"
                          : e->watched[i].counts[SNIPI_CUDA_NONFINITE] ? snip_status_text(SNIP_NONFINITE)
                                                                       : NULL;
        if (why) return snipi_fail_layer(s, SNIP_NONFINITE, &s->layers[i], why);
    }
    return SNIP_OK;
}

// What the device measured, into the layers' records; then the plan.
static snip_status snipi_cuda_decide(const snip_cuda *c, const snipi_cuda_ended *e) {
    snip *s = c->s;
    const double grad_scale = e->device_scale ? (double)e->globals->grad_scale : e->grad_scale;
    s->tau = e->globals->tau;
    for (int i = 0; i < s->n_layers; i++)
        if (s->layers[i].measurement) s->layers[i].measurement->sums = c->measured[i];
    return snipi_decide(s, grad_scale == 0 ? 1 : grad_scale);
}

// Reads the oldest step that has not been read.
static snip_status snipi_cuda_read(snip_cuda *c) {
    const snipi_cuda_ended *e = &c->ended[c->read % (c->lag + 1)];
    snip *s = c->s;
    if (c->measuring == c->read++) c->measuring = -1;
    if (!e->sent) return SNIP_OK;
    if (cudaEventSynchronize(e->done) != cudaSuccess) {
        snipi_fail(s, SNIP_DEVICE, "snip_cuda_end_step", snip_status_text(SNIP_DEVICE));
        if (e->measured) snipi_discard_measurement(s, SNIP_DEVICE);
        return SNIP_DEVICE;
    }
    c->last = e->watched;
    if (e->has_loss) s->loss = (double)e->globals->loss;
    const int spikes = e->has_loss && snipi_loss_spikes(s, !e->ordinary);
    for (int i = 0; i < s->n_layers; i++) {
        snipi_layer *l = &s->layers[i];
        memcpy(l->seen_sq, e->watched[i].seen_sq, sizeof l->seen_sq);
        memcpy(l->seen, e->watched[i].seen, sizeof l->seen);
        l->seen_calls = e->watched[i].seen_calls;
    }
    if (e->ordinary) snipi_watch(s, spikes);
    for (int i = 0; i < s->n_layers; i++) snipi_end_watch(&s->layers[i]);
    const snip_status status = snipi_cuda_check(s, e);
    if (e->measured && status) snipi_discard_measurement(s, status);
    return e->measured && !status ? snipi_cuda_decide(c, e) : status;
}

// The next step measures if one is due and no other is on its way. snip_layer has the counts of the last step read.
static void snipi_cuda_begin_step(const snip_cuda *c) {
    snip *s = c->s;
    snipi_begin_step(s, snipi_measures_now(s) && c->measuring < 0);
    for (int i = 0; c->last && i < s->n_layers; i++) {
        s->layers[i].nonfinite = (int64_t)c->last[i].counts[SNIPI_CUDA_NONFINITE];
        s->layers[i].saturated = (int64_t)c->last[i].counts[SNIPI_CUDA_SATURATED];
    }
}

SNIP_API snip_status snip_cuda_end_step(snip_cuda *c, const snip_adamw *adamw, const float *grad_scale,
                                        cudaStream_t stream) {
    static const char function[] = "snip_cuda_end_step";
    if (!c) return SNIP_BAD_ARGUMENT;
    snip *s = c->s;
    if (c->step != s->kept.step) return snipi_bad(s, function, snipi_cuda_step_changed);
    if (snipi_in_probe(s)) return snipi_still_probing(s, function);
    snipi_check_end_step(s, function, &adamw);
    if (adamw) s->kept.adamw = *adamw;

    snipi_cuda_ended *e = &c->ended[c->step % (c->lag + 1)];
    e->ordinary = s->pass == SNIP_PASS_ORDINARY;
    e->has_loss = s->told && c->has_loss;
    e->measured = s->measuring && s->n_layers && adamw && !s->pending;
    e->device_scale = grad_scale != NULL;
    e->grad_scale = s->kept.adamw.grad_scale;
    const snip_status sent = snipi_cuda_send(c, e, grad_scale, stream);
    e->sent = !sent;
    if (sent) snipi_keep(s, snipi_fail(s, sent, function, snip_status_text(sent)));
    snip_status status = s->pending;

    c->step = ++s->kept.step;
    if (s->measuring && s->n_layers) {
        s->kept.measured = s->kept.step;
        if (e->measured && e->sent)
            c->measuring = c->step - 1;
        else
            snipi_discard_measurement(s, status);
    }
    const snip_status late = c->read <= c->step - 1 - c->lag ? snipi_cuda_read(c) : SNIP_OK;
    if (status)
        snipi_show_pending(s);
    else
        status = late ? late : snipi_check_first_step(s, adamw);
    snipi_cuda_begin_step(c);
    return status;
}

// Between two steps the next one begins anew, as it does in a session that loads this one's state.
SNIP_API snip_status snip_cuda_finish(snip_cuda *c) {
    snip_status first = SNIP_OK;
    if (!c) return SNIP_BAD_ARGUMENT;
    while (c->read < c->step) {
        const snip_status status = snipi_cuda_read(c);
        if (!first) first = status;
    }
    if (!snipi_within_step(c->s)) snipi_cuda_begin_step(c);
    return first;
}

// ---- seconds of GEMMs on this GPU

// Seconds of the fastest of several calls, after one to warm up.
template <class Call>
static snip_status snipi_cuda_time(cudaEvent_t begin, cudaEvent_t end, cudaStream_t stream, double *seconds,
                                   Call call) {
    double best = 0;
    for (int i = 0; i < 1 + SNIPI_TIMES; i++) {
        float milliseconds = 0;
        if (cudaEventRecord(begin, stream) != cudaSuccess) return SNIP_DEVICE;
        const snip_status status = call();
        if (status) return status;
        if (cudaEventRecord(end, stream) != cudaSuccess || cudaEventSynchronize(end) != cudaSuccess ||
            cudaEventElapsedTime(&milliseconds, begin, end) != cudaSuccess)
            return SNIP_DEVICE;
        if (i == 1 || (i > 1 && milliseconds * 1e-3 < best)) best = milliseconds * 1e-3;
    }
    *seconds = best > 1e-9 ? best : 1e-9;
    return SNIP_OK;
}

// x: room for the operands, made up of noise, and a product.
static snip_status snipi_cuda_time_layer(const snipi_call *call, float *x, cudaEvent_t begin, cudaEvent_t end) {
    const snip *s = call->s;
    snipi_layer *l = call->l;
    const cudaStream_t stream = snipi_cuda_stream(call);
    const int64_t rows = call->rows, n = l->n, k = l->k, given = rows * (n + k) + n * k;
    float *dy = x + rows * k, *w = dy + rows * n, *out = w + n * k;
    snip_status status = snipi_cuda_status(cudaMemsetAsync(x, 0, (size_t)given * sizeof(float), stream));
    if (!status)
        status = snipi_cuda_add_noise(x, x, given, 1.0f, NULL, NULL, snipi_key(s, l, 0, SNIPI_ROLE_NOISE_X), stream);
    for (int g = 0; g < SNIP_GEMMS; g++)
        for (int state = 0; state < SNIPI_STATES && !status; state++)
            status = snipi_cuda_time(begin, end, stream, &l->kept.seconds[state][g], [&]() {
                return snipi_time_gemm(call, g, snipi_format_of(s, state), x, w, dy, out);
            });
    return status;
}

// Layers of one shape are timed once.
static snip_status snipi_cuda_time_layers(snip_cuda *c, int64_t rows, cudaEvent_t begin, cudaEvent_t end,
                                          cudaStream_t stream) {
    snip *s = c->s;
    for (int i = 0; i < s->n_layers; i++) {
        snipi_call call;
        float *x;
        int same = 0;
        snipi_begin_call(&call, s, i, NULL, NULL, NULL, 0, snipi_cuda_operations(), c, stream);
        const int64_t n = call.l->n, k = call.l->k;
        call.rows = rows;
        call.micro = SNIPI_ALONE;
        while (s->layers[same].n != n || s->layers[same].k != k) same++;
        if (same < i) {
            memcpy(call.l->kept.seconds, s->layers[same].kept.seconds, sizeof call.l->kept.seconds);
            continue;
        }
        const int64_t floats = rows * (n + k) + n * k + snipi_max(rows * snipi_max(n, k), n * k);
        snip_status status = SNIP_OUT_OF_MEMORY;
        if (cudaMalloc(&x, (size_t)floats * sizeof(float)) == cudaSuccess) {
            status = snipi_cuda_time_layer(&call, x, begin, end);
            cudaFree(x);
        }
        if (status) return snipi_fail_at(s, status, i, "snip_cuda_measure_gains", snip_status_text(status));
    }
    return SNIP_OK;
}

SNIP_API snip_status snip_cuda_measure_gains(snip_cuda *c, int64_t rows, cudaStream_t stream) {
    static const char function[] = "snip_cuda_measure_gains";
    cudaEvent_t begin, end;
    if (!c || rows < 1 || rows > c->rows)
        return snipi_bad(c ? c->s : NULL, function, "rows is 1 to what snip_cuda_create was told");
    if (cudaEventCreate(&begin) != cudaSuccess)
        return snipi_fail(c->s, SNIP_DEVICE, function, snip_status_text(SNIP_DEVICE));
    if (cudaEventCreate(&end) != cudaSuccess) {
        cudaEventDestroy(begin);
        return snipi_fail(c->s, SNIP_DEVICE, function, snip_status_text(SNIP_DEVICE));
    }
    c->uncounted = 1;  // operands are made up
    const snip_status status = snipi_cuda_time_layers(c, rows, begin, end, stream);
    c->uncounted = 0;
    c->s->checked = 0;
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return status;
}

#ifdef SNIP_CUBLASLT
SNIP_API size_t snip_cuda_cublaslt_memory(const snip_cuda *c) {
    size_t most = 0;
    for (int i = 0; c && i < c->s->n_layers; i++) {
        const int64_t rows = c->rows, n = c->s->layers[i].n, k = c->s->layers[i].k;
        for (const size_t size : { snip_cuda_cublaslt_scratch(rows, n, k), snip_cuda_cublaslt_scratch(rows, k, n),
                                   snip_cuda_cublaslt_scratch(n, k, rows) })
            if (size > most) most = size;
    }
    return most;
}

SNIP_API snip_status snip_cuda_use_cublaslt(snip_cuda *c, cublasLtHandle_t lt, void *scratch, size_t scratch_bytes) {
    if (!c) return SNIP_BAD_ARGUMENT;
    if (lt && (!scratch || (uintptr_t)scratch % 256 || scratch_bytes < snip_cuda_cublaslt_memory(c)))
        return snipi_bad(c->s, "snip_cuda_use_cublaslt",
                         "scratch is 256-byte aligned and has snip_cuda_cublaslt_memory bytes");
    c->lt = lt;
    c->lt_scratch = scratch;
    c->lt_bytes = scratch_bytes;
    return SNIP_OK;
}
#endif

// ---- creation

SNIP_API int snip_cuda_supported(void) {
    return snipi_cuda_has_body(snipi_mma_kernel<SNIPI_MMA_S8, SNIP_E2M1, SNIP_E2M1>);
}

static int snipi_cuda_multiplies(const snip_recipe &a, const snip_recipe &b) {
    const int fp4 = a.format == SNIP_E2M1 && b.format == SNIP_E2M1;
    const int fp8 = snipi_cuda_is_fp8(a.format) && snipi_cuda_is_fp8(b.format);
    return (fp4 || fp8) && a.tile_cols == SNIPI_BLOCK && b.tile_cols == SNIPI_BLOCK && snipi_cuda_recipe_ok(&a) &&
           snipi_cuda_recipe_ok(&b);
}

// Whether all three GEMMs of a candidate have kernels.
static int snipi_cuda_has_kernels(const snip *s, snip_format format) {
    const snip_recipe x = snipi_recipe_of(s, format, SNIPI_ACTIVATION), w = snipi_recipe_of(s, format, SNIPI_WEIGHT);
    const snip_recipe dy = snipi_recipe_of(s, format, SNIPI_GRADIENT);
    return snipi_cuda_multiplies(x, w) && snipi_cuda_multiplies(dy, w) && snipi_cuda_multiplies(dy, x);
}

SNIP_API size_t snip_cuda_memory(const snip *s, int64_t rows) {
    snip_cuda c = {};
    if (!s || rows < 1 || rows > INT32_MAX) return 0;
    c.s = const_cast<snip *>(s);
    c.rows = rows;
    return snipi_cuda_layout(&c, NULL);
}

static snip_status snipi_cuda_check_create(const snip *s, int64_t rows, int lag, const void *memory) {
    static const char function[] = "snip_cuda_create";
    if (!s) return SNIP_BAD_ARGUMENT;
    if (rows < 1 || rows > INT32_MAX) return snipi_bad(s, function, "rows is 1 to 2^31 - 1");
    if (!memory || (uintptr_t)memory % 16) return snipi_bad(s, function, "memory is 16-byte aligned device memory");
    if (lag < 0 || (s->desc.every > 0 && lag >= s->desc.every))
        return snipi_bad(s, function, "lag is a number of steps, 0 to desc.every - 1");
    if (s->desc.optimizer == SNIP_CUSTOM)
        return snipi_bad(s, function, "desc.optimizer is SNIP_CUSTOM, which runs on the host alone");
    if (!snip_cuda_supported())
        return snipi_fail(s, SNIP_UNSUPPORTED, function,
                          "not compiled for this GPU, or it lacks tensor cores of compute capability 8.0 or later");
    for (snip_format format : snipi_candidates)
        if (!snipi_cuda_has_kernels(s, format))
            return snipi_fail(s, SNIP_UNSUPPORTED, function, "there are no GEMM kernels for the session's recipes");
    return SNIP_OK;
}

// Records on the host are of one machine's calls: a session that changes machines measures anew.
static void snipi_cuda_drop_measurements(snip *s) {
    for (int i = 0; i < s->n_layers; i++) {
        snipi_free(s, s->layers[i].measurement);
        s->layers[i].measurement = NULL;
    }
}

SNIP_API void snip_cuda_destroy(snip_cuda *c) {
    if (!c) return;
    snip *s = c->s;
    for (int i = 0; c->ended && i <= c->lag; i++)
        if (c->ended[i].done) {
            cudaEventSynchronize(c->ended[i].done);
            cudaEventDestroy(c->ended[i].done);
        }
    if (c->pinned) cudaFreeHost(c->pinned);
    snipi_cuda_drop_measurements(s);
    snipi_free(s, c->ended);
    snipi_free(s, c->held);
    snipi_free(s, c);
}

// Host memory, and where device memory lies.
static snip_status snipi_cuda_prepare(snip_cuda *c, void *memory) {
    const snip *s = c->s;
    const size_t layers = (size_t)s->n_layers, slots = (size_t)c->lag + 1, records = layers * sizeof *c->measured;
    const size_t a_step = sizeof(snipi_cuda_globals) + layers * sizeof(snipi_cuda_watched);
    c->ended = (snipi_cuda_ended *)snipi_alloc(s, slots * sizeof *c->ended);
    c->held = (snipi_cuda_held *)snipi_alloc(s, layers * sizeof *c->held);
    if (!c->ended || !c->held) return SNIP_OUT_OF_MEMORY;
    snipi_cuda_layout(c, (char *)memory);
    if (cudaMallocHost(&c->pinned, records + slots * a_step) != cudaSuccess) return SNIP_DEVICE;
    c->measured = (snipi_sums *)c->pinned;
    for (size_t i = 0; i < slots; i++) {
        c->ended[i].globals = (snipi_cuda_globals *)(void *)((char *)c->pinned + records + i * a_step);
        c->ended[i].watched = (snipi_cuda_watched *)(c->ended[i].globals + 1);
        if (cudaEventCreateWithFlags(&c->ended[i].done, cudaEventDisableTiming) != cudaSuccess) return SNIP_DEVICE;
    }
    return SNIP_OK;
}

// Records of zeros, the number of the first step, and what the state keeps for its noise.
static snip_status snipi_cuda_upload(snip_cuda *c, void *memory, cudaStream_t stream) {
    const snip *s = c->s;
    snipi_cuda_kept *kept = (snipi_cuda_kept *)c->pinned;  // free until a measurement comes
    for (int i = 0; i < s->n_layers; i++) kept[i] = { s->layers[i].kept.input_size, 0 };
    if (cudaMemsetAsync(memory, 0, c->records, stream) != cudaSuccess) return SNIP_DEVICE;
    if (s->n_layers && cudaMemcpyAsync(c->kept, kept, (size_t)s->n_layers * sizeof *kept, cudaMemcpyHostToDevice,
                                       stream) != cudaSuccess)
        return SNIP_DEVICE;
    return snipi_cuda_launch(snipi_cuda_next_step_kernel, snipi_max(1, snipi_ceil_div(s->n_layers, SNIPI_THREADS)),
                             SNIPI_THREADS, 0, stream, c->globals, (uint32_t)s->kept.step, c->watched, c->kept,
                             s->n_layers);
}

SNIP_API snip_cuda *snip_cuda_create(snip *s, int64_t rows, int lag, void *memory, cudaStream_t stream) {
    if (snipi_cuda_check_create(s, rows, lag, memory)) return NULL;
    snip_cuda *c = (snip_cuda *)snipi_alloc(s, sizeof *c);
    snip_status status = SNIP_OUT_OF_MEMORY;
    if (c) {
        c->s = s;
        c->rows = rows;
        c->lag = lag;
        c->codes = snipi_tma_kernel<SNIP_E2M1, SNIP_E2M1>() ? SNIP_CUDA_S8_BYTES : SNIP_CUDA_PACKED;
        c->step = c->read = s->kept.step;
        c->measuring = -1;
        snipi_cuda_drop_measurements(s);
        status = snipi_cuda_prepare(c, memory);
    }
    if (!status) status = snipi_cuda_upload(c, memory, stream);
    if (!status) return c;
    snipi_fail(s, status, "snip_cuda_create", snip_status_text(status));
    snip_cuda_destroy(c);
    return NULL;
}

#endif  // SNIP_IMPLEMENTATION
