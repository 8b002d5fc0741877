// minimal.cu - the smallest use of snip_cuda.cuh: the three GEMMs of one linear layer on a GPU, in FP8 and in FP4, and
// how far the results are from products in double precision.
//     nvcc -O2 -std=c++17 -arch=native examples/minimal.cu -o minimal && ./minimal      (Hopper: -arch=sm_90a, B200:
//     sm_100a)
#include <math.h>
#include <stdlib.h>
#define SNIP_IMPLEMENTATION
#include "../snip_cuda.cuh"

enum { ROWS = 512, IN = 1024, OUT = 768 };

static void check(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void check(snip_status status, const char *what) {
    if (status) fprintf(stderr, "%s: %s\n", what, snip_status_text(status));
    check(status == SNIP_OK, "stopped");
}

template <class T> static T *memory(size_t n) {  // that host and device see
    T *p;
    check(cudaMallocManaged(&p, n * sizeof(T)) == cudaSuccess, "out of GPU memory");
    return p;
}

// A matrix and its codes both ways: as it lies, and transposed.
struct tensor {
    float *x;
    int64_t rows, cols;
    snip_operand straight, turned;
};

static tensor random_tensor(int64_t rows, int64_t cols) {
    tensor t = { memory<float>((size_t)(rows * cols)), rows, cols, {}, {} };
    for (int64_t i = 0; i < rows * cols; i++) t.x[i] = ((float)rand() + (float)rand()) / (float)RAND_MAX - 1.0f;
    return t;
}

static void quantize(tensor *t, const snip_recipe *recipe) {
    snip_quantize_job job = {};
    job.x = t->x;
    job.rows = t->rows;
    job.cols = job.ld = t->cols;
    job.recipe = job.recipe_t = recipe;  // one read of x gives both
    job.codes = memory<char>(snip_codes_bound(recipe, t->rows, t->cols));
    job.scales = memory<char>(snip_scales_bound(recipe, t->rows, t->cols));
    job.codes_t = memory<char>(snip_codes_bound(recipe, t->cols, t->rows));
    job.scales_t = memory<char>(snip_scales_bound(recipe, t->cols, t->rows));
    check(snip_cuda_quantize(&job, SNIP_CUDA_PACKED, NULL, NULL, NULL, 0), "quantize");
    t->straight.recipe = t->turned.recipe = recipe;
    t->straight.codes = job.codes;
    t->straight.scales = job.scales;
    t->turned.codes = job.codes_t;
    t->turned.scales = job.scales_t;
}

// C = A B^T. x(i, l) and y(j, l) are the elements that A and B stand for.
template <class X, class Y>
static void multiply(const char *name, int64_t m, int64_t n, int64_t k, const snip_operand &a, const snip_operand &b,
                     X x, Y y) {
    float *c = memory<float>((size_t)(m * n));
    double error = 0, norm = 0;
    check(snip_cuda_gemm(m, n, k, &a, &b, c, n, 0, NULL, 0), name);
    check(cudaDeviceSynchronize() == cudaSuccess, name);
    for (int sample = 0; sample < 2000; sample++) {
        int64_t i = rand() % m, j = rand() % n;
        double exact = 0;
        for (int64_t l = 0; l < k; l++) exact += (double)x(i, l) * (double)y(j, l);
        error += (c[i * n + j] - exact) * (c[i * n + j] - exact);
        norm += exact * exact;
    }
    printf("  %-6s %4d x %4d x %4d   relative error %.4f\n", name, (int)m, (int)n, (int)k, sqrt(error / norm));
    cudaFree(c);
}

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        fprintf(stderr, "minimal: no GPU was found\n");
        return 2;
    }
    const snip_recipe tile[2] = { SNIP_RECIPE_FP8_TILE, SNIP_RECIPE_FP4_TILE },
                      block[2] = { SNIP_RECIPE_FP8_BLOCK, SNIP_RECIPE_FP4_BLOCK };
    tensor x = random_tensor(ROWS, IN), w = random_tensor(OUT, IN), dy = random_tensor(ROWS, OUT);
    for (int fp4 = 0; fp4 < 2; fp4++) {
        printf("%s\n", fp4 ? "FP4" : "FP8");
        quantize(&x, &tile[fp4]);
        quantize(&w, &block[fp4]);
        quantize(&dy, &tile[fp4]);
        multiply(
            "fwd", ROWS, OUT, IN, x.straight, w.straight, [&](int64_t i, int64_t l) { return x.x[i * IN + l]; },
            [&](int64_t j, int64_t l) { return w.x[j * IN + l]; });
        multiply(
            "dgrad", ROWS, IN, OUT, dy.straight, w.turned, [&](int64_t i, int64_t l) { return dy.x[i * OUT + l]; },
            [&](int64_t j, int64_t l) { return w.x[l * IN + j]; });
        multiply(
            "wgrad", OUT, IN, ROWS, dy.turned, x.turned, [&](int64_t i, int64_t l) { return dy.x[l * OUT + i]; },
            [&](int64_t j, int64_t l) { return x.x[l * IN + j]; });
    }
    return 0;
}
