// cublaslt.h - cuBLASLt's C[m][n] = A[m][k] * B[n][k]^T, everything row-major: test_cuda.cpp's oracle and bench_cuda.cu's
// peer, where it links (-DSNIP_CUBLASLT -lcublasLt). FP8 with a float scale for every 1 x 128 or 128 x 128 elements (cuBLAS
// 12.9, Hopper), INT8 with sums in int32, BF16.
#ifndef CUBLASLT_H
#define CUBLASLT_H
#include <cublasLt.h>

// Scales [rows][blocks], a row of them for each of a matrix's rows or for 128: as cuBLASLt wants them.
static __global__ void lt_order_scales(float *to, const float *scales, int64_t rows, int64_t blocks, int tile_rows) {
    const int64_t n = (rows + tile_rows - 1) / tile_rows * blocks, padded = (blocks + 3) / 4 * 4;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        to[tile_rows == 1 ? i % blocks * rows + i / blocks : i / blocks * padded + i % blocks] = scales[i];
}
struct lt_matrix { snip_format format; int64_t rows; int tile_rows; };      // SNIP_E2M1 stands for INT8; tile_rows 1 or 128, for FP8
class lt_gemm {
    enum { WORKSPACE = 32 << 20 };
    cublasLtHandle_t handle = NULL;
    cublasLtMatmulDesc_t desc = NULL;
    cublasLtMatrixLayout_t of_a = NULL, of_b = NULL, of_c = NULL;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t found = {};
    void *workspace = NULL;
    float *scales[2] = { NULL, NULL };
    lt_matrix a, b;
    int64_t k;
    bool have = false;
    static cudaDataType_t type(snip_format f) { return f == SNIP_E4M3 ? CUDA_R_8F_E4M3 : f == SNIP_E5M2 ? CUDA_R_8F_E5M2 : f == SNIP_BF16 ? CUDA_R_16BF : CUDA_R_8I; }
    static bool fp8(snip_format f) { return f == SNIP_E4M3 || f == SNIP_E5M2; }
    bool set_scales() {
#if CUBLAS_VERSION >= 120900
        const int64_t blocks = (k + 127) / 128;
        for (int i = 0; i < 2; i++) {       // cuBLASLt's A is B, because it thinks in columns
            const lt_matrix &x = i ? a : b;
            cublasLtMatmulMatrixScale_t mode = x.tile_rows == 1 ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F : CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
            if (cudaMalloc(&scales[i], (size_t)(((x.rows + x.tile_rows - 1) / x.tile_rows) * (blocks + 3)) * sizeof(float)) != cudaSuccess) return false;
            if (cublasLtMatmulDescSetAttribute(desc, i ? CUBLASLT_MATMUL_DESC_B_SCALE_MODE : CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode) ||
                cublasLtMatmulDescSetAttribute(desc, i ? CUBLASLT_MATMUL_DESC_B_SCALE_POINTER : CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scales[i], sizeof scales[i])) return false;
        }
        return true;
#else
        return false;
#endif
    }
public:
    lt_gemm(lt_matrix a_, lt_matrix b_, int64_t k_) : a(a_), b(b_), k(k_) {
        const bool integers = a.format == SNIP_E2M1;
        const cublasOperation_t turned = CUBLAS_OP_T;
        const size_t room = WORKSPACE;
        int count = 0;
        have = !cublasLtCreate(&handle) && cudaMalloc(&workspace, room) == cudaSuccess &&
               !cublasLtMatmulDescCreate(&desc, integers ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F, integers ? CUDA_R_32I : CUDA_R_32F) &&
               !cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned) && (!fp8(a.format) || set_scales()) &&
               !cublasLtMatrixLayoutCreate(&of_b, type(b.format), (uint64_t)k, (uint64_t)b.rows, k) && !cublasLtMatrixLayoutCreate(&of_a, type(a.format), (uint64_t)k, (uint64_t)a.rows, k) &&
               !cublasLtMatrixLayoutCreate(&of_c, integers ? CUDA_R_32I : CUDA_R_32F, (uint64_t)b.rows, (uint64_t)a.rows, b.rows) && !cublasLtMatmulPreferenceCreate(&preference) &&
               !cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room) &&
               !cublasLtMatmulAlgoGetHeuristic(handle, desc, of_b, of_a, of_c, of_c, preference, 1, &found, &count) && count > 0;
    }
    ~lt_gemm() {
        if (preference) cublasLtMatmulPreferenceDestroy(preference);
        for (cublasLtMatrixLayout_t layout : { of_a, of_b, of_c }) if (layout) cublasLtMatrixLayoutDestroy(layout);
        if (desc) cublasLtMatmulDescDestroy(desc);
        if (handle) cublasLtDestroy(handle);
        cudaFree(workspace);
        cudaFree(scales[0]);
        cudaFree(scales[1]);
    }
    lt_gemm(const lt_gemm &) = delete;
    bool exists() const { return have; }    // cuBLASLt has such a product here
    void set(const void *scales_a, const void *scales_b, cudaStream_t stream) {     // snip.h's, float: before run, for FP8
        const int64_t blocks = (k + 127) / 128;
        lt_order_scales<<<256, 256, 0, stream>>>(scales[0], (const float *)scales_b, b.rows, blocks, b.tile_rows);
        lt_order_scales<<<256, 256, 0, stream>>>(scales[1], (const float *)scales_a, a.rows, blocks, a.tile_rows);
    }
    bool run(const void *codes_a, const void *codes_b, void *c, cudaStream_t stream) {
        const float one = 1, zero = 0;
        const int32_t one_i = 1, zero_i = 0;
        const bool integers = a.format == SNIP_E2M1;
        return !cublasLtMatmul(handle, desc, integers ? (const void *)&one_i : &one, codes_b, of_b, codes_a, of_a, integers ? (const void *)&zero_i : &zero, c, of_c, c, of_c,
                               &found.algo, workspace, WORKSPACE, stream);
    }
};
#endif
