// bench_cuda.cu - speed of snip_cuda.cuh on the GPU at hand: quantization beside a copy of as many bytes, GEMMs in TFLOPS
// beside cuBLAS's BF16 product and, of FP8, cuBLASLt's with the same scaling, where they are linked (-DSNIP_CUBLASLT
// -lcublas -lcublasLt). Tab-separated, see make bench-gpu.
#include <stdlib.h>
#include <algorithm>
#define SNIP_IMPLEMENTATION
#include "../snip_cuda.cuh"
#ifdef SNIP_CUBLASLT
#  include <cublas_v2.h>
#  include <cublasLt.h>
#endif

static void check(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
    exit(1);
}
template <class T = char> static T *memory(size_t bytes) {
    void *p;
    check(cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess, "out of GPU memory");
    return (T *)p;
}
enum { RUNS = 15, FLUSH = 256 << 20 };
static char *flush;
// Median seconds of a call, with the caches written over before each.
template <class F> static double seconds(F call) {
    cudaEvent_t begin, end;
    float ms[RUNS];
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    call();
    for (int i = 0; i < RUNS; i++) {
        cudaMemsetAsync(flush, i, FLUSH);
        cudaEventRecord(begin);
        call();
        cudaEventRecord(end);
        check(cudaEventSynchronize(end) == cudaSuccess, "run");
        cudaEventElapsedTime(&ms[i], begin, end);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(ms, ms + RUNS);
    return ms[RUNS / 2] * 1e-3;
}
static void print(const char *name, double ours, const char *unit, const char *peer_name, double peer) {
    printf("bench\t%s\t%.1f\t%s\t%s\t%.1f\t%.3f\n", name, ours, unit, peer_name, peer, ours / peer);
}
static __global__ void fill(uint32_t *x, int64_t n) {       // floats in -2 .. 2; as BF16, two of them
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t u = (uint32_t)i * 2654435761u;
        x[i] = (u & 0x807F807Fu) | 0x3F003F00u;
    }
}

static void bench_quantize(const char *name, snip_recipe recipe, int bf16, int both, int64_t rows, int64_t cols) {
    size_t unit = bf16 ? 2 : 4, codes = snip_codes_bound(&recipe, rows, cols), scales = snip_scales_bound(&recipe, rows, cols), scales_t = snip_scales_bound(&recipe, cols, rows);
    size_t bytes = (size_t)(rows * cols) * unit + (both ? 2 * codes + scales + scales_t : codes + scales);
    char *x = memory((size_t)(rows * cols) * unit), *from = memory(bytes / 2), *to = memory(bytes / 2);
    snip_quantize_job job = {};
    job.x = x; job.x_format = bf16 ? SNIP_BF16 : SNIP_F32;
    job.rows = rows; job.cols = job.ld = cols;
    job.recipe = &recipe; job.codes = memory(codes); job.scales = memory(scales);
    if (both) { job.recipe_t = &recipe; job.codes_t = memory(codes); job.scales_t = memory(scales_t); }
    fill<<<1024, 256>>>((uint32_t *)(void *)x, (int64_t)((size_t)(rows * cols) * unit / 4));
    check(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_OK, name);
    double ours = seconds([&] { snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0); });
    double copy = seconds([&] { cudaMemcpyAsync(to, from, bytes / 2, cudaMemcpyDeviceToDevice); });
    print(name, (double)bytes / ours * 1e-9, "GB/s", "copy", (double)bytes / copy * 1e-9);
    for (void *p : { (void *)x, (void *)from, (void *)to, job.codes, job.scales, job.codes_t, job.scales_t }) cudaFree(p);
}
#ifdef SNIP_CUBLASLT
// Seconds of cuBLASLt's E4M3 product with a scale for 128 of k in each row of A (all 1 here) and for rb's tiles in B; 0 if it has none.
static double seconds_lt(const snip_recipe &rb, int64_t m, int64_t n, int64_t k, const void *a, const void *b, float *c) {
    static cublasLtHandle_t handle;
    static char *workspace;
    const size_t room = 32 << 20;
    const cublasOperation_t turned = CUBLAS_OP_T;
    const cublasLtMatmulMatrixScale_t tile = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F, block = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    const cublasLtMatmulMatrixScale_t mode = rb.tile_rows == 128 ? block : tile;
    const float one = 1, zero = 0;
    const int64_t scales = (m > n ? m : n) * ((k + 127) / 128) + 128;
    float *ones = memory<float>((size_t)scales * 4);
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t of_a, of_b, of_c;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    double time = 0;
    if (!handle) {
        check(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cuBLASLt");
        workspace = memory(room);
    }
    for (int64_t i = 0; i < scales; i++) cudaMemcpyAsync(ones + i, &one, sizeof one, cudaMemcpyHostToDevice);
    // Column-major: C^T (n, m) = B A^T, both stored with k contiguous.
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &tile, sizeof tile);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &ones, sizeof ones);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &ones, sizeof ones);
    cublasLtMatrixLayoutCreate(&of_b, CUDA_R_8F_E4M3, (uint64_t)k, (uint64_t)n, k);
    cublasLtMatrixLayoutCreate(&of_a, CUDA_R_8F_E4M3, (uint64_t)k, (uint64_t)m, k);
    cublasLtMatrixLayoutCreate(&of_c, CUDA_R_32F, (uint64_t)n, (uint64_t)m, n);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room);
    if (cublasLtMatmulAlgoGetHeuristic(handle, desc, of_b, of_a, of_c, of_c, preference, 1, &found, &count) == CUBLAS_STATUS_SUCCESS && count)
        time = seconds([&] { cublasLtMatmul(handle, desc, &one, b, of_b, a, of_a, &zero, c, of_c, c, of_c, &found.algo, workspace, room, 0); });
    cublasLtMatmulPreferenceDestroy(preference);
    for (cublasLtMatrixLayout_t layout : { of_a, of_b, of_c }) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(desc);
    cudaFree(ones);
    return time;
}
#endif
static void bench_gemm(const char *kind, snip_recipe ra, snip_recipe rb, int64_t m, int64_t n, int64_t k) {
    char name[96];
    float *c = memory<float>((size_t)(m * n) * 4);
    snip_operand operand[2] = {};
    const snip_recipe *recipe[2] = { &ra, &rb };
    snprintf(name, sizeof name, "gemm %s %d,%d,%d", kind, (int)m, (int)n, (int)k);
    for (int i = 0; i < 2; i++) {
        int64_t rows = i ? n : m;
        float *x = memory<float>((size_t)(rows * k) * 4);
        snip_quantize_job job = {};
        job.x = x; job.rows = rows; job.cols = job.ld = k;
        job.recipe = operand[i].recipe = recipe[i];
        operand[i].codes = job.codes = memory(snip_codes_bound(recipe[i], rows, k));
        operand[i].scales = job.scales = memory(snip_scales_bound(recipe[i], rows, k));
        fill<<<1024, 256>>>((uint32_t *)(void *)x, rows * k);
        check(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0) == SNIP_OK, name);
        check(cudaDeviceSynchronize() == cudaSuccess, name);
        cudaFree(x);
    }
    snip_status status = snip_cuda_gemm(m, n, k, &operand[0], &operand[1], c, n, 0, NULL, 0);
    if (status) printf("skipped: %s, %s\n", name, snip_status_text(status));
    else {
        double flops = 2e-12 * (double)m * (double)n * (double)k;
        double ours = seconds([&] { snip_cuda_gemm(m, n, k, &operand[0], &operand[1], c, n, 0, NULL, 0); });
#ifdef SNIP_CUBLASLT
        static cublasHandle_t handle;
        float one = 1, zero = 0;
        char *a = memory((size_t)(m * k) * 2), *b = memory((size_t)(n * k) * 2);
        if (!handle) check(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cuBLAS");
        fill<<<1024, 256>>>((uint32_t *)(void *)a, m * k / 2);
        fill<<<1024, 256>>>((uint32_t *)(void *)b, n * k / 2);
        double peer = seconds([&] { cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, (int)n, (int)m, (int)k, &one, b, CUDA_R_16BF, (int)k, a, CUDA_R_16BF, (int)k, &zero, c, CUDA_R_32F, (int)n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT); });
        print(name, flops / ours, "TFLOPS", "cuBLAS BF16", flops / peer);
        if (ra.format == SNIP_E4M3) {
            double lt = seconds_lt(rb, m, n, k, operand[0].codes, operand[1].codes, c);
            if (lt > 0) print(name, flops / ours, "TFLOPS", "cuBLASLt", flops / lt);
            else printf("skipped: %s, cuBLASLt has no such product here\n", name);
        }
        cudaFree(a);
        cudaFree(b);
#else
        printf("bench\t%s\t%.1f\tTFLOPS\t-\t-\t-\n", name, flops / ours);
#endif
    }
    for (int i = 0; i < 2; i++) { cudaFree((void *)operand[i].codes); cudaFree((void *)operand[i].scales); }
    cudaFree(c);
}

int main() {
    const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK, fp4 = SNIP_RECIPE_FP4_TILE, fp4_sr = SNIP_RECIPE_FP4_TILE_SR, fp4_block = SNIP_RECIPE_FP4_BLOCK;
    static const int64_t shapes[][3] = { { 4096, 7168, 16384 }, { 4096, 4096, 7168 }, { 4096, 24576, 1536 }, { 4096, 7168, 2048 }, { 4096, 2112, 7168 }, { 128, 7168, 16384 } };
    int devices = 0;
    cudaDeviceProp device;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) { printf("skipped: no GPU\n"); return 0; }
    check(cudaGetDeviceProperties(&device, 0) == cudaSuccess, "device");
    printf("# %s, %d multiprocessors\n", device.name, device.multiProcessorCount);
    flush = memory(FLUSH);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        bench_quantize(bf16 ? "quantize bf16 fp8 1x128" : "quantize f32 fp8 1x128", fp8, bf16, 0, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp8 1x128 both" : "quantize f32 fp8 1x128 both", fp8, bf16, 1, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp8 128x128 both" : "quantize f32 fp8 128x128 both", fp8_block, bf16, 1, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp4 1x128" : "quantize f32 fp4 1x128", fp4, bf16, 0, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp4 1x128 stochastic both" : "quantize f32 fp4 1x128 stochastic both", fp4_sr, bf16, 1, 8192, 8192);
    }
    for (const int64_t *s : shapes) {
        bench_gemm("fp8 1x128 128x128", fp8, fp8_block, s[0], s[1], s[2]);
        bench_gemm("fp4 1x128 128x128", fp4, fp4_block, s[0], s[1], s[2]);
    }
    bench_gemm("fp8 1x128 1x128", fp8, fp8, 4096, 4096, 16384);
    bench_gemm("fp4 1x128 1x128", fp4, fp4, 4096, 4096, 16384);
    return 0;
}
