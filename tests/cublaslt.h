// cublaslt.h - cuBLASLt's C[m][n] = A[m][k] * B[n][k]^T, everything row-major: test_cuda.cpp's oracle and
// bench_cuda.cu's peer, where it links (-DSNIP_CUBLASLT -lcublasLt), by the calls of snip_cuda.cuh. FP8 as
// snip_cuda_gemm_cublaslt, with the scales brought into order beforehand; INT8 with sums in int32; BF16.
#ifndef CUBLASLT_H
#define CUBLASLT_H

struct lt_matrix {
    snip_format format;
    int64_t rows;
    int tile_rows;
};  // SNIP_E2M1 stands for INT8; tile_rows 1 or 128, for FP8

class lt_gemm {
    enum { WORKSPACE = 32 << 20 };

    snipi_cublaslt product;
    void *memory = NULL;
    size_t room = 0;  // for scales
    snipi_cublaslt_matrix a, b;
    int64_t k;
    bool integers, have = false;

    static snipi_cublaslt_matrix matrix_of(const lt_matrix &x) {
        const bool fp8 = x.format == SNIP_E4M3 || x.format == SNIP_E5M2;
        return { x.format == SNIP_E4M3   ? CUDA_R_8F_E4M3
                 : fp8                   ? CUDA_R_8F_E5M2
                 : x.format == SNIP_BF16 ? CUDA_R_16BF
                                         : CUDA_R_8I,
                 x.rows, fp8 ? x.tile_rows : 0, NULL };
    }

  public:
    cublasLtHandle_t handle = NULL;

    lt_gemm(lt_matrix a_, lt_matrix b_, int64_t k_)
        : a(matrix_of(a_)), b(matrix_of(b_)), k(k_), integers(a_.format == SNIP_E2M1) {
        room = snip_cuda_cublaslt_scratch(a.rows, b.rows, k);
        if (cublasLtCreate(&handle) || cudaMalloc(&memory, room + WORKSPACE) != cudaSuccess) return;
        a.scales = (float *)memory;
        b.scales = a.scales + snipi_round_up(a.rows, 64) * snipi_cublaslt_blocks(k);
        have = snipi_cublaslt_find(&product, handle, integers ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                   integers ? CUDA_R_32I : CUDA_R_32F, &a, &b, k, b.rows, WORKSPACE) == SNIP_OK;
    }

    ~lt_gemm() {
        if (handle) cublasLtDestroy(handle);
        cudaFree(memory);
    }

    lt_gemm(const lt_gemm &) = delete;

    bool exists() const { return have; }  // cuBLASLt has such a product here

    bool set(const void *scales_a, const void *scales_b, cudaStream_t stream) {  // snip.h's, float: before run, for FP8
        return !snipi_cublaslt_order((float *)a.scales, scales_a, a.rows, k, a.scale_rows, stream) &&
               !snipi_cublaslt_order((float *)b.scales, scales_b, b.rows, k, b.scale_rows, stream);
    }

    bool run(const void *codes_a, const void *codes_b, void *c, cudaStream_t stream) {
        const float floats[2] = { 0, 1 };
        const int32_t ints[2] = { 0, 1 };
        const void *zero = integers ? (const void *)&ints[0] : &floats[0],
                   *one = integers ? (const void *)&ints[1] : &floats[1];
        return !cublasLtMatmul(handle, &product.product, one, codes_b, &product.a, codes_a, &product.b, zero, c,
                               &product.c, c, &product.c, &product.found.algo, (char *)memory + room, WORKSPACE,
                               stream);
    }
};
#endif
