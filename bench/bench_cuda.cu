// bench_cuda.cu - speed of snip_cuda.cuh on the GPU at hand: quantization beside a copy of as many bytes; GEMMs in
// TFLOPS beside cuBLASLt's (-DSNIP_CUBLASLT -lcublasLt): BF16, and of FP8 with the same scaling, of FP4 INT8; FP4 as
// INT8 bytes beside our FP8; the twelve GEMMs of a layer with all quantization beside BF16's. Both calls take turns,
// over cold caches; medians. Tab-separated, see make bench-gpu.
#include <stdlib.h>
#include <algorithm>
#define SNIP_IMPLEMENTATION
#include "../snip_cuda.cuh"
#ifdef SNIP_CUBLASLT
#    include "../tests/cublaslt.h"
#endif

static void check(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
    exit(1);
}

static void check(snip_status status, const char *what) {
    if (status) fprintf(stderr, "%s: %s\n", what, snip_status_text(status));
    check(status == SNIP_OK, what);
}

template <class T = char> static T *memory(size_t bytes) {
    void *p;
    check(cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess, "out of GPU memory");
    return (T *)p;
}

enum { RUNS = 15, FLUSH = 256 << 20 };

static char *flush;
static cudaEvent_t begin, end;

template <class F> static float once(F call) {  // ms
    float ms;
    check(cudaMemsetAsync(flush, 1, FLUSH) == cudaSuccess && cudaEventRecord(begin) == cudaSuccess, "run");
    call();
    check(cudaEventRecord(end) == cudaSuccess && cudaEventSynchronize(end) == cudaSuccess &&
              cudaEventElapsedTime(&ms, begin, end) == cudaSuccess,
          "run");
    return ms;
}

static double median(float *ms) {
    std::sort(ms, ms + RUNS);
    return ms[RUNS / 2] * 1e-3;
}

// Seconds of two calls in turn.
template <class F, class G> static void seconds(F ours, G theirs, double out[2]) {
    float a[RUNS], b[RUNS];
    once(ours);
    once(theirs);
    for (int i = 0; i < RUNS; i++) {
        a[i] = once(ours);
        b[i] = once(theirs);
    }
    out[0] = median(a);
    out[1] = median(b);
}

// work: per second of it the unit counts; peer_name NULL: none was measured.
static void print(const char *name, double work, const char *unit, const double s[2], const char *peer_name) {
    if (peer_name)
        printf("bench\t%s\t%.1f\t%s\t%s\t%.1f\t%.3f\n", name, work / s[0], unit, peer_name, work / s[1], s[1] / s[0]);
    else
        printf("bench\t%s\t%.1f\t%s\t-\t-\t-\n", name, work / s[0], unit);
    fflush(stdout);
}

static __global__ void fill(uint32_t *x, int64_t n, uint32_t mask, uint32_t bits) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t u = (uint32_t)i * 0x9E3779B9u;
        u = (u ^ u >> 15) * 0x2C1B3C6Du;
        u = (u ^ u >> 12) * 0x297A2D39u;
        x[i] = ((u ^ u >> 15) & mask) | bits;
    }
}

static void fill_floats(void *x, int64_t n) {
    fill<<<1024, 256>>>((uint32_t *)x, n, 0x80FFFFFFu, 0x3F000000u);
}  // .5 to 2, either sign

static void fill_bf16(void *x, int64_t n) { fill<<<1024, 256>>>((uint32_t *)x, (n + 1) / 2, 0x80FF80FFu, 0x3F003F00u); }

static void none() {}

static size_t codes_bytes(const snip_recipe &r, int64_t rows, int64_t cols, snip_cuda_codes as) {
    return as == SNIP_CUDA_S8_BYTES ? (size_t)(rows * ((cols + 15) / 16 * 16)) : snip_codes_bound(&r, rows, cols);
}

static void bench_quantize(const char *name, snip_recipe recipe, int bf16, int both, int64_t rows, int64_t cols,
                           snip_cuda_codes as = SNIP_CUDA_PACKED) {
    size_t unit = bf16 ? 2 : 4, codes = codes_bytes(recipe, rows, cols, as),
           scales = snip_scales_bound(&recipe, rows, cols), scales_t = snip_scales_bound(&recipe, cols, rows);
    size_t bytes = (size_t)(rows * cols) * unit + (both ? 2 * codes + scales + scales_t : codes + scales);
    char *x = memory((size_t)(rows * cols) * unit), *from = memory(bytes / 2), *to = memory(bytes / 2);
    snip_quantize_job job = {};
    double s[2];
    job.x = x;
    job.x_format = bf16 ? SNIP_BF16 : SNIP_F32;
    job.rows = rows;
    job.cols = job.ld = cols;
    job.recipe = &recipe;
    job.codes = memory(codes);
    job.scales = memory(scales);
    if (both) {
        job.recipe_t = &recipe;
        job.codes_t = memory(codes);
        job.scales_t = memory(scales_t);
    }
    if (bf16)
        fill_bf16(x, rows * cols);
    else
        fill_floats(x, rows * cols);
    fill_floats(from, (int64_t)(bytes / 8));
    seconds([&] { check(snip_cuda_quantize(&job, as, NULL, NULL, NULL, 0), name); },
            [&] { cudaMemcpyAsync(to, from, bytes / 2, cudaMemcpyDeviceToDevice); }, s);
    print(name, (double)bytes * 1e-9, "GB/s", s, "copy");
    for (void *p : { (void *)x, (void *)from, (void *)to, job.codes, job.scales, job.codes_t, job.scales_t })
        cudaFree(p);
}

// A matrix as codes made from made-up numbers.
static snip_operand operand_of(const snip_recipe *r, int64_t rows, int64_t k, snip_cuda_codes as) {
    snip_operand o = {};
    snip_quantize_job job = {};
    float *x = memory<float>((size_t)(rows * k) * 4);
    job.x = x;
    job.rows = rows;
    job.cols = job.ld = k;
    job.recipe = r;
    job.codes = memory(codes_bytes(*r, rows, k, as));
    job.scales = memory(snip_scales_bound(r, rows, k));
    fill_floats(x, rows * k);
    check(snip_cuda_quantize(&job, as, NULL, NULL, NULL, 0), "quantize");
    check(cudaDeviceSynchronize() == cudaSuccess, "quantize");
    cudaFree(x);
    o.recipe = r;
    o.codes = job.codes;
    o.scales = job.scales;
    return o;
}

static snip_status gemm(snip_cuda_codes as, int64_t m, int64_t n, int64_t k, const snip_operand &a,
                        const snip_operand &b, float *c) {
    return (as == SNIP_CUDA_S8_BYTES ? snip_cuda_gemm_s8 : snip_cuda_gemm)(m, n, k, &a, &b, c, n, 0, NULL, 0);
}

// fp8_peer: recipes of an FP8 product to set it beside, or NULL.
static void bench_gemm(const char *kinds, const snip_recipe &ra, const snip_recipe &rb, int64_t m, int64_t n, int64_t k,
                       snip_cuda_codes as = SNIP_CUDA_PACKED, const snip_recipe *const *fp8_peer = NULL) {
    char name[96];
    const double work = 2e-12 * (double)m * (double)n * (double)k;
    double s[2];
    snip_operand a = operand_of(&ra, m, k, as), b = operand_of(&rb, n, k, as);
    float *c = memory<float>((size_t)(m * n) * 4);
    auto ours = [&] { check(gemm(as, m, n, k, a, b, c), kinds); };
    snprintf(name, sizeof name, "%s %dx%dx%d", kinds, (int)m, (int)n, (int)k);
    if (fp8_peer) {
        snip_operand a8 = operand_of(fp8_peer[0], m, k, SNIP_CUDA_PACKED),
                     b8 = operand_of(fp8_peer[1], n, k, SNIP_CUDA_PACKED);
        seconds(
            ours, [&] { check(gemm(SNIP_CUDA_PACKED, m, n, k, a8, b8, c), "fp8"); }, s);
        print(name, work, "TFLOPS", s, "our FP8");
        for (const void *p : { a8.codes, a8.scales, b8.codes, b8.scales }) cudaFree((void *)p);
    }
#ifdef SNIP_CUBLASLT
    const bool fp4 = ra.format == SNIP_E2M1;

    const struct {
        const char *name;
        lt_matrix a, b;
    } peers[] = {
        { fp4 ? "cuBLASLt INT8" : "cuBLASLt", { ra.format, m, ra.tile_rows }, { rb.format, n, rb.tile_rows } },
        { "cuBLASLt BF16", { SNIP_BF16, m, 0 }, { SNIP_BF16, n, 0 } }
    };

    for (auto &peer : peers) {
        lt_gemm lt(peer.a, peer.b, k);
        if (!lt.exists()) {
            printf("skipped: %s, %s has no such product here\n", name, peer.name);
            continue;
        }
        char *pa = memory((size_t)(m * k) * 2), *pb = memory((size_t)(n * k) * 2);
        fill_bf16(pa, m * k);
        fill_bf16(pb, n * k);
        const bool fp8 = !fp4 && peer.a.format != SNIP_BF16;
        if (fp8) check(lt.set(a.scales, b.scales, 0), peer.name);
        seconds(
            ours, [&] { check(lt.run(fp8 ? a.codes : pa, fp8 ? b.codes : pb, c, 0), peer.name); }, s);
        print(name, work, "TFLOPS", s, peer.name);
        cudaFree(pa);
        cudaFree(pb);
    }
#else
    seconds(ours, none, s);
    print(name, work, "TFLOPS", s, NULL);
#endif
    for (const void *p : { a.codes, a.scales, b.codes, b.scales, (const void *)c }) cudaFree((void *)p);
}

// The linear layers of a block of a Llama, forward and backward: X, W and dY from BF16, both ways from one read, and
// three GEMMs each.
static void bench_layer(const char *name, const snip_recipe &tile, const snip_recipe &block, int64_t rows,
                        snip_cuda_codes as = SNIP_CUDA_PACKED) {
    static const int64_t dims[][2] = {
        { 6144, 4096 }, { 4096, 4096 }, { 28672, 4096 }, { 4096, 14336 }
    };  // out, in: q k v, o, gate up, down

    struct tensor {
        char *x;
        snip_quantize_job job;
        snip_operand o, t;
    };

    auto make = [&](const snip_recipe &r, int64_t n, int64_t k) {
        tensor v = {};
        v.x = memory((size_t)(n * k) * 2);
        fill_bf16(v.x, n * k);
        v.job.x = v.x;
        v.job.x_format = SNIP_BF16;
        v.job.rows = n;
        v.job.cols = v.job.ld = k;
        v.job.recipe = v.job.recipe_t = &r;
        v.job.codes = memory(codes_bytes(r, n, k, as));
        v.job.scales = memory(snip_scales_bound(&r, n, k));
        v.job.codes_t = memory(codes_bytes(r, k, n, as));
        v.job.scales_t = memory(snip_scales_bound(&r, k, n));
        v.o.recipe = v.t.recipe = &r;
        v.o.codes = v.job.codes;
        v.o.scales = v.job.scales;
        v.t.codes = v.job.codes_t;
        v.t.scales = v.job.scales_t;
        return v;
    };
    double work = 0, total[2] = { 0, 0 };
    bool peer = false;
    for (const int64_t *d : dims) {
        const int64_t n = d[0], k = d[1];
        tensor x = make(tile, rows, k), w = make(block, n, k), dy = make(tile, rows, n);
        float *out = memory<float>((size_t)(std::max(rows, n) * std::max(n, k)) * 4);
        double s[2];
        work += 6e-12 * (double)rows * (double)n * (double)k;
        auto ours = [&] {
            for (tensor *v : { &x, &w, &dy }) check(snip_cuda_quantize(&v->job, as, NULL, NULL, NULL, 0), name);
            check(gemm(as, rows, n, k, x.o, w.o, out), name);
            check(gemm(as, rows, k, n, dy.o, w.t, out), name);
            check(gemm(as, n, k, rows, dy.t, x.t, out), name);
        };
#ifdef SNIP_CUBLASLT
        lt_gemm fwd({ SNIP_BF16, rows, 0 }, { SNIP_BF16, n, 0 }, k),
            dgrad({ SNIP_BF16, rows, 0 }, { SNIP_BF16, k, 0 }, n),
            wgrad({ SNIP_BF16, n, 0 }, { SNIP_BF16, k, 0 }, rows);
        peer = fwd.exists() && dgrad.exists() && wgrad.exists();
        if (peer)
            seconds(
                ours,
                [&] {
                    check(fwd.run(x.x, w.x, out, 0) && dgrad.run(dy.x, w.x, out, 0) && wgrad.run(dy.x, x.x, out, 0),
                          "cuBLASLt");
                },
                s);
        else
#endif
            seconds(ours, none, s);
        total[0] += s[0];
        total[1] += s[1];
        for (tensor *v : { &x, &w, &dy })
            for (void *p : { (void *)v->x, v->job.codes, v->job.scales, v->job.codes_t, v->job.scales_t }) cudaFree(p);
        cudaFree(out);
    }
    print(name, work, "TFLOPS", total, peer ? "cuBLASLt BF16" : NULL);
}

int main() {
    const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK, fp4 = SNIP_RECIPE_FP4_TILE,
                      fp4_sr = SNIP_RECIPE_FP4_TILE_SR, fp4_block = SNIP_RECIPE_FP4_BLOCK;
    const snip_recipe e5m2 = { SNIP_E5M2, 1, 128, SNIP_SCALE_POW2, SNIP_ROUND_NEAREST_EVEN };
    static const int64_t shapes[][3] = { { 4096, 7168, 16384 }, { 4096, 4096, 7168 }, { 4096, 24576, 1536 },
                                         { 4096, 7168, 2048 },  { 4096, 2112, 7168 }, { 128, 7168, 16384 } };
    int devices = 0;
    cudaDeviceProp device;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no GPU\n");
        return 0;
    }
    check(cudaGetDeviceProperties(&device, 0) == cudaSuccess, "device");
    printf("# %s, %d multiprocessors\n", device.name, device.multiProcessorCount);
#ifndef SNIP_CUBLASLT
    printf("skipped: cuBLASLt is not linked, GEMMs have no peer\n");
#endif
    snip_operand none = {};
    none.recipe = &fp4;
    none.codes = none.scales = memory(16);
    const bool s8 = snip_cuda_gemm_s8(1, 1, 0, &none, &none, memory<float>(4), 1, 0, NULL, 0) != SNIP_UNSUPPORTED;
    if (!s8)
        printf("skipped: FP4 as INT8 bytes, not a GPU of compute capability 9.0 or 10.0, "
               "or no code for sm_90a or sm_100a\n");
    flush = memory(FLUSH);
    check(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess, "event");
    for (int bf16 = 0; bf16 < 2; bf16++) {
        bench_quantize(bf16 ? "quantize bf16 fp8 1x128" : "quantize f32 fp8 1x128", fp8, bf16, 0, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp8 1x128 both" : "quantize f32 fp8 1x128 both", fp8, bf16, 1, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp8 128x128 both" : "quantize f32 fp8 128x128 both", fp8_block, bf16, 1,
                       8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp4 1x128" : "quantize f32 fp4 1x128", fp4, bf16, 0, 8192, 8192);
        bench_quantize(bf16 ? "quantize bf16 fp4 1x128 stochastic both" : "quantize f32 fp4 1x128 stochastic both",
                       fp4_sr, bf16, 1, 8192, 8192);
        if (s8)
            bench_quantize(bf16 ? "quantize bf16 fp4 1x128 both, INT8 bytes"
                                : "quantize f32 fp4 1x128 both, INT8 bytes",
                           fp4, bf16, 1, 8192, 8192, SNIP_CUDA_S8_BYTES);
    }
    const snip_recipe *const fp8_forward[] = { &fp8, &fp8_block }, *const fp8_wgrad[] = { &fp8, &fp8 };
    for (const int64_t *s : shapes) {
        bench_gemm("fp8 1x128 128x128", fp8, fp8_block, s[0], s[1], s[2]);
        bench_gemm("fp4 1x128 128x128", fp4, fp4_block, s[0], s[1], s[2]);
        if (s8)
            bench_gemm("fp4 INT8 bytes 1x128 128x128", fp4, fp4_block, s[0], s[1], s[2], SNIP_CUDA_S8_BYTES,
                       fp8_forward);
    }
    bench_gemm("fp8 1x128 1x128", fp8, fp8, 4096, 4096, 16384);
    bench_gemm("fp8 e5m2 1x128 1x128", e5m2, fp8, 4096, 4096, 16384);
    bench_gemm("fp4 1x128 1x128", fp4, fp4, 4096, 4096, 16384);
    if (s8) bench_gemm("fp4 INT8 bytes 1x128 1x128", fp4, fp4, 4096, 4096, 16384, SNIP_CUDA_S8_BYTES, fp8_wgrad);
    bench_layer("layer fp8, 12 GEMMs and quantization, 8192 rows", fp8, fp8_block, 8192);
    bench_layer("layer fp4, 12 GEMMs and quantization, 8192 rows", fp4, fp4_block, 8192);
    if (s8)
        bench_layer("layer fp4 INT8 bytes, 12 GEMMs and quantization, 8192 rows", fp4, fp4_block, 8192,
                    SNIP_CUDA_S8_BYTES);
    check(cudaDeviceSynchronize() == cudaSuccess, "end");
    return 0;
}
