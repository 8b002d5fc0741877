// Attention of examples/train_llama.cu on tensor cores beside the float32 one: with a C++ compiler under cuda_shim.h,
// in three orders of the threads; with nvcc (-x cu) on a GPU. Ends with "N passed, N failed, N skipped".
#include <vector>
#define main trainer_main
#include "../examples/train_llama.cu"
#undef main

#ifdef __CUDACC__
enum { SHIM_ORDERS = 1 };

static void take_order(int) {}
#else
static void take_order(int order) { shim_order = order; }
#endif
static int passed, failed;

static void expect(bool ok, const char *what, const llama_config &c, double figure) {
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("FAILED: %s, seq %d, %d of %d heads of %d: %g\n", what, c.seq, c.kv_heads, c.heads, c.dim / c.heads, figure);
}

// Elements that BF16 holds, so that products differ by the rounding of probabilities and gradients alone.
static float *random_tensor(int64_t n, uint32_t seed) {
    std::vector<float> x((size_t)n);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = ((uint32_t)i + 1000003u * seed) * 2654435761u;
        x[(size_t)i] = (float)((int)((u ^ u >> 15) * 2246822519u >> 24) - 128) / 64.0f;
    }
    float *to = device_memory<float>((size_t)n);
    copy(to, (const float *)x.data(), n, cudaMemcpyHostToDevice);
    return to;
}

static std::vector<float> back(const float *from, int64_t n) {
    std::vector<float> x((size_t)n);
    copy(x.data(), from, n, cudaMemcpyDeviceToHost);
    return x;
}

static double distance(const std::vector<float> &a, const std::vector<float> &b) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < a.size(); i++) {
        error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return error <= 1e30 && norm > 0 ? sqrt(error / norm) : 1e30;
}

int main() {
    static const int cases[][4] = {
        {1,    2, 1, 4  },
        { 7,   2, 2, 64 },
        { 64,  1, 1, 32 },
        { 200, 4, 2, 24 },
        { 130, 3, 1, 80 },
        { 257, 2, 1, 64 },
        { 129, 1, 1, 128}
    };  // seq, heads, kv_heads, width
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no GPU\n0 passed, 0 failed, 1 skipped\n");
        return 0;
    }
    if (!attends_on_tensor_cores()) {
        printf("skipped: attention on tensor cores, compute capability before 8.0\n0 passed, 0 failed, 1 skipped\n");
        return 0;
    }
    for (const int *of : cases) {
        const int64_t sequences = 2, T = of[0], H = of[1], G = of[2], hd = of[3], R = sequences * T;
        gpu g = {};
        llama_block b = {};
        g.d.config.seq = (int)T;
        g.d.config.heads = (int)H;
        g.d.config.kv_heads = (int)G;
        g.d.config.dim = (int)(H * hd);
        b.q = random_tensor(R * H * hd, 1);
        b.k = random_tensor(R * G * hd, 2);
        b.v = random_tensor(R * G * hd, 3);
        g.d.datt = random_tensor(R * H * hd, 4);
        b.att = device_memory<float>((size_t)(R * H * hd));
        b.lse = device_memory<float>((size_t)(R * H));
        g.d.dq = device_memory<float>((size_t)(R * H * hd));
        g.d.dk = device_memory<float>((size_t)(R * G * hd));
        g.d.dv = device_memory<float>((size_t)(R * G * hd));
        g.scores = device_memory<float>((size_t)(R * H * T));
        g.dscores = device_memory<float>((size_t)(R * H * T));

        const struct {
            const char *name;
            float *at;
            int64_t n;
        } results[] = {
            {"out",          b.att,  R * H * hd},
            { "log-sum-exp", b.lse,  R * H     },
            { "dq",          g.d.dq, R * H * hd},
            { "dk",          g.d.dk, R * G * hd},
            { "dv",          g.d.dv, R * G * hd}
        };

        std::vector<float> plain[5], first[5];
        for (int order = -1; order < SHIM_ORDERS; order++) {
            g.tensor_cores = order >= 0;
            take_order(order < 0 ? 0 : order);
            for (auto &r : results)
                check(cudaMemset(r.at, 0xFF, (size_t)r.n * sizeof(float)) == cudaSuccess, "filling");  // NaN
            attention_fwd(&g, &b, sequences);
            attention_bwd(&g, &b, sequences);
            for (int i = 0; i < 5; i++) {
                std::vector<float> x = back(results[i].at, results[i].n);
                if (order < 0)
                    plain[i] = x;
                else {
                    if (order == 0) first[i] = x;
                    const double most = i == 1 ? 2e-6 : 3e-3,
                                 d = T == 1 && (i == 2 || i == 3)
                                         ? x == plain[i] ? 0 : 1e30
                                         : distance(x, plain[i]);  // a single key has no gradient
                    expect(d <= most, results[i].name, g.d.config, d);
                    expect(!memcmp(x.data(), first[i].data(), x.size() * sizeof(float)), "the same in any order",
                           g.d.config, order);
                    if (getenv("SNIP_TEST_VERBOSE")) printf("%s %g\n", results[i].name, d);
                }
            }
        }
        for (float *p : { b.q, b.k, b.v, b.att, b.lse, g.d.datt, g.d.dq, g.d.dk, g.d.dv, g.scores, g.dscores })
            cudaFree(p);
    }
    printf("%d passed, %d failed, 0 skipped\n", passed, failed);
    return failed != 0;
}
