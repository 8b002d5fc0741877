// train_llama.cu - train_llama.c on a GPU: the same trainer, options and files. This file has the model's passes as
// CUDA kernels; the linear layers run through snip_cuda_linear_forward/backward, a plan takes effect LAG steps after
// its measuring step; the rest is train_llama.c itself, included at the end.
//     nvcc -O2 -std=c++17 -arch=native examples/train_llama.cu -o train_llama        (Hopper: -arch=sm_90a, B200:
//     sm_100a)
//
// Everything is float32 but the linear layers (the plan), the output layer (BF16, under --precision f32 float32) and
// attention. Attention is BF16 on tensor cores, its scores in registers; under --precision f32, before compute
// capability 8.0 and with heads wider than 128 it is float32 without them, and keeps the scores in memory. All sums
// have a fixed order: a run can be repeated bit for bit.
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#define SNIP_IMPLEMENTATION
#include "../snip_cuda.cuh"
#include "llama.h"
#include "trainer.h"
#ifndef LAG
#    define LAG 1
#endif

enum { WARP = 32, THREADS = 256, ROW_THREADS = 128, TILE = 64, DEPTH = 16, PARTS = 256 };

#define KERNEL static __global__ void

static void check(bool ok, const char *what) {
    if (!ok) tr_die("CUDA: %s failed", what);
}

template <class... P, class... A>
static void launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, const A &...args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess, "a kernel's launch");
}

static int64_t blocks_of(int64_t n) {
    return n < (int64_t)THREADS << 14 ? (n + THREADS - 1) / THREADS : (int64_t)1 << 14;
}

#define EACH(i, n) \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (int64_t)gridDim.x * blockDim.x)

// >>sums -------------------------------------------------------------------------------------------
// Over a block, for all its threads.
struct add_op {
    template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};

struct max_op {
    template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

template <class T, class F> static __device__ T block_all(T x, F f) {
    __shared__ T part[THREADS / WARP];
    const int warps = (int)blockDim.x / WARP;
    for (int o = WARP / 2; o > 0; o /= 2) x = f(x, (T)__shfl_xor_sync(0xFFFFFFFFu, x, o));
    __syncthreads();
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < warps; w++) x = f(x, part[w]);
    return x;
}

KERNEL sum_squares(const float *x, int64_t n, double *part) {
    double sum = 0;
    EACH(i, n) sum += (double)x[i] * (double)x[i];
    sum = block_all(sum, add_op());
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

KERNEL sum_parts(const double *part, int64_t n, double *total) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += part[i];
    sum = block_all(sum, add_op());
    if (threadIdx.x == 0) *total = sum;
}

// >>layers -----------------------------------------------------------------------------------------
KERNEL embed_rows(float *x, const float *embed, const int32_t *tokens, int64_t R, int64_t d) {
    EACH(i, R * d) x[i] = embed[tokens[i / d] * d + i % d];
}

// A block for each token of the vocabulary adds up the rows where it occurs, in order.
KERNEL embed_gradient(float *de, const float *dx, const int32_t *tokens, int64_t R, int64_t d) {
    __shared__ int occurs[THREADS];
    const int token = (int)blockIdx.x;
    for (int64_t r0 = 0; r0 < R; r0 += THREADS) {
        int64_t n = R - r0 < THREADS ? R - r0 : (int64_t)THREADS;
        __syncthreads();
        occurs[threadIdx.x] = threadIdx.x < n && tokens[r0 + threadIdx.x] == token;
        __syncthreads();
        for (int64_t r = 0; r < n; r++)
            if (occurs[r])
                for (int64_t j = threadIdx.x; j < d; j += THREADS) de[token * d + j] += dx[(r0 + r) * d + j];
    }
}

KERNEL rmsnorm(float *out, float *rstd, const float *x, const float *w, int64_t d) {  // a block a row
    const float *row = x + blockIdx.x * d;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) sum += row[i] * row[i];
    float s = 1.0f / sqrtf(block_all(sum, add_op()) / (float)d + 1e-5f);
    if (threadIdx.x == 0) rstd[blockIdx.x] = s;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) out[blockIdx.x * d + i] = row[i] * s * w[i];
}

KERNEL rmsnorm_gradient(float *dx, const float *dout, const float *x, const float *w, const float *rstd, int64_t d) {
    const int64_t at = blockIdx.x * d;
    const float s = rstd[blockIdx.x];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) sum += dout[at + i] * w[i] * x[at + i];
    float mean = block_all(sum, add_op()) * s * s * s / (float)d;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) dx[at + i] += dout[at + i] * w[i] * s - x[at + i] * mean;
}

KERNEL rmsnorm_weights(float *dw, const float *dout, const float *x, const float *rstd, int64_t R,
                       int64_t d) {  // a warp takes every eighth row of 32 columns
    __shared__ float part[THREADS];
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    const int64_t col = (int64_t)blockIdx.x * WARP + lane;
    float sum = 0;
    for (int64_t r = warp; r < R && col < d; r += THREADS / WARP) sum += dout[r * d + col] * x[r * d + col] * rstd[r];
    part[threadIdx.x] = sum;
    __syncthreads();
    if (warp || col >= d) return;
    for (int w = 1; w < THREADS / WARP; w++) sum += part[w * WARP + lane];
    dw[col] += sum;
}

KERNEL rope_turn(float *x, const float *rope, int64_t R, int64_t heads, int64_t hd, int64_t T, float sign) {
    const int64_t half = hd / 2;
    EACH(i, R * heads * half) {
        const int64_t j = i % half, r = i / half / heads;
        float *a = x + i / half * hd + j, c = rope[r % T * hd + j], s = sign * rope[r % T * hd + half + j], u = a[0],
              v = a[half];
        a[0] = u * c - v * s;
        a[half] = u * s + v * c;
    }
}

KERNEL swiglu(float *act, const float *gate, const float *up, int64_t n) {
    EACH(i, n) act[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

KERNEL swiglu_gradient(float *dgate, float *dup, const float *dact, const float *gate, const float *up, int64_t n) {
    EACH(i, n) {
        float x = gate[i], s = 1.0f / (1.0f + expf(-x));
        dup[i] = dact[i] * x * s;
        dgate[i] = dact[i] * up[i] * s * (1.0f + x * (1.0f - s));
    }
}

KERNEL add_rows(float *out, const float *a, const float *b, int64_t n) { EACH(i, n) out[i] = a[i] + b[i]; }

// A block a row: the row's loss; with grad_scale its logits become the gradient of grad_scale * loss.
KERNEL cross_entropy(float *logits, const int32_t *targets, double *loss, int64_t V, float grad_scale) {
    float *row = logits + blockIdx.x * V, top = row[0], sum = 0;
    const int32_t y = targets[blockIdx.x];
    const float at_target = row[y];
    for (int64_t j = threadIdx.x; j < V; j += blockDim.x) top = row[j] > top ? row[j] : top;
    top = block_all(top, max_op());
    for (int64_t j = threadIdx.x; j < V; j += blockDim.x) sum += row[j] = expf(row[j] - top);
    sum = block_all(sum, add_op());
    if (threadIdx.x == 0) loss[blockIdx.x] = log((double)sum) + (double)top - (double)at_target;
    if (grad_scale != 0.0f)
        for (int64_t j = threadIdx.x; j < V; j += blockDim.x)
            row[j] = row[j] * (grad_scale / sum) - (j == y ? grad_scale : 0.0f);
}

KERNEL momentum_update(float *p, const float *dp, float *m, int64_t n, int lion, float b1, float b2, float scale,
                       float rate, float keep) {
    EACH(i, n) {
        float g = dp[i] * scale, c = b1 * m[i] + (1.0f - b1) * g;
        m[i] = lion ? b2 * m[i] + (1.0f - b2) * g : b1 * m[i] + g;
        p[i] = p[i] * keep - rate * (lion ? (float)((c > 0) - (c < 0)) : m[i]);
    }
}

KERNEL adamw_update(float *p, const float *dp, float *m, float *v, int64_t n, float b1, float b2, float e, float scale,
                    float c1, float c2, float rate, float keep) {
    EACH(i, n) {
        float g = dp[i] * scale;
        m[i] = b1 * m[i] + (1.0f - b1) * g;
        v[i] = b2 * v[i] + (1.0f - b2) * g * g;
        p[i] = p[i] * keep - rate * (m[i] * c1) / (sqrtf(v[i] * c2) + e);
    }
}

// >>attention --------------------------------------------------------------------------------------
// Matrices of all heads of all sequences: (i, j) of head h of sequence s lies at s * sequence + h / group * head + i *
// row + j * col.
typedef struct {
    float *x;
    int64_t row, col, sequence, head;
    int group;
} view;

static __device__ float *view_at(const view &v, int64_t s, int64_t h) {
    return v.x + s * v.sequence + h / v.group * v.head;
}

enum { WHOLE, LOWER, BELOW_A, ABOVE_A };  // C wanted up to its diagonal; A 0 above its diagonal; A 0 below it

// C (m, n) = or += A (m, k) B (n, k)^T. A block makes 64 x 64 of one head's C, a thread 4 x 4.
KERNEL head_products(view a, view b, view c, int64_t m, int64_t n, int64_t k, int64_t heads, int part, int accumulate) {
    __shared__ float tile_a[DEPTH][TILE + 1], tile_b[DEPTH][TILE + 1];
    const int64_t down = (m + TILE - 1) / TILE, across = (n + TILE - 1) / TILE, z = blockIdx.x / (down * across),
                  t = blockIdx.x % (down * across);
    const int64_t m0 = t / across * TILE, n0 = t % across * TILE, begin = part == ABOVE_A ? m0 : 0,
                  end = part == BELOW_A && m0 + TILE < k ? m0 + TILE : k;
    const int y = (int)threadIdx.x / 16, x = (int)threadIdx.x % 16;
    const float *pa = view_at(a, z / heads, z % heads), *pb = view_at(b, z / heads, z % heads);
    float *pc = view_at(c, z / heads, z % heads), sum[4][4] = {};
    if (part == LOWER && n0 > m0) return;
    for (int64_t k0 = begin; k0 < end; k0 += DEPTH) {
        for (int i = (int)threadIdx.x; i < TILE * DEPTH; i += THREADS) {  // along whichever way the matrix lies
            int ra = a.col == 1 ? i / DEPTH : i % TILE, ka = a.col == 1 ? i % DEPTH : i / TILE,
                rb = b.col == 1 ? i / DEPTH : i % TILE, kb = b.col == 1 ? i % DEPTH : i / TILE;
            tile_a[ka][ra] = m0 + ra < m && k0 + ka < end ? pa[(m0 + ra) * a.row + (k0 + ka) * a.col] : 0.0f;
            tile_b[kb][rb] = n0 + rb < n && k0 + kb < end ? pb[(n0 + rb) * b.row + (k0 + kb) * b.col] : 0.0f;
        }
        __syncthreads();
        for (int l = 0; l < DEPTH; l++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(tile_a[l][y + 16 * i], tile_b[l][x + 16 * j], sum[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int64_t r = m0 + y + 16 * i, q = n0 + x + 16 * j;
            if (r >= m || q >= n) continue;
            float *to = pc + r * c.row + q * c.col;
            *to = accumulate ? *to + sum[i][j] : sum[i][j];
        }
}

// A block for each row i of scores: softmax over 0 .. i, zeros beyond, and the row's log-sum-exp.
KERNEL softmax_rows(float *scores, float *lse, int64_t T, int64_t H, float scale) {
    const int64_t i = blockIdx.x % T, seen = i + 1, h = blockIdx.x / T % H, s = blockIdx.x / T / H;
    float *row = scores + blockIdx.x * T, top = row[0], sum = 0;
    for (int64_t j = threadIdx.x; j < seen; j += blockDim.x) top = row[j] > top ? row[j] : top;
    top = block_all(top, max_op());
    for (int64_t j = threadIdx.x; j < seen; j += blockDim.x) sum += row[j] = expf((row[j] - top) * scale);
    sum = block_all(sum, add_op());
    for (int64_t j = threadIdx.x; j < T; j += blockDim.x) row[j] = j < seen ? row[j] / sum : 0.0f;
    if (threadIdx.x == 0) lse[(s * T + i) * H + h] = top * scale + logf(sum);
}

// scores become the probabilities, dscores (their gradient) that of the scores; out and dout: (R, H * hd).
KERNEL softmax_gradient(float *scores, float *dscores, const float *lse, const float *out, const float *dout, int64_t T,
                        int64_t H, int64_t hd, float scale) {
    const int64_t i = blockIdx.x % T, h = blockIdx.x / T % H, r = blockIdx.x / T / H * T + i, at = (r * H + h) * hd;
    float *p = scores + blockIdx.x * T, *ds = dscores + blockIdx.x * T, along = 0;
    for (int64_t j = threadIdx.x; j < hd; j += blockDim.x) along += out[at + j] * dout[at + j];
    along = block_all(along, add_op());
    for (int64_t j = threadIdx.x; j < T; j += blockDim.x) {
        p[j] = j <= i ? expf(p[j] * scale - lse[r * H + h]) : 0.0f;
        ds[j] = j <= i ? p[j] * (ds[j] - along) * scale : 0.0f;
    }
}

// >>attention-mma ----------------------------------------------------------------------------------
// The same by mma.sync. A block takes 128 rows of a head, a warp 16 of them; COLS columns at a time pass through shared
// memory. FORWARD and QUERIES (dq): rows are queries, columns the keys up to them. KEYS (dk) and VALUES (dv): rows are
// keys, columns the queries from them on, of each head of the group in turn. A lane has of sums rows lane / 4 and 8
// below, columns lane % 4 * 2 and the next.
enum { FORWARD, QUERIES, KEYS, VALUES };

enum { ROWS = 128 };

#define LOG2_E 1.44269504f

typedef struct {
    const float *a[2], *b[2];  // of rows and of columns: query or key; gradient of out or value
    float *out, *lse;
    const float *along;  // sums of dout times out, as lse
    int T, H, G, hd;
    float scale, scale2;  // 1 / sqrt(hd); times log2 e
} attention;

#define UNROLL _Pragma("unroll")

[[maybe_unused]] static __device__ uint32_t bf16_pair(const float *x, bool there) {
    const float2 v = there ? *(const float2 *)x : make_float2(0.0f, 0.0f);
    return snipi_ptx_bf16x2(v.x, v.y);
}

// COLS rows of x, of which n are there, as pairs of BF16: along the rows and, turned, along the columns; either may be
// NULL. Rows of words are 4 longer than needed, so that a warp's words lie in different banks.
template <int HD, int COLS>
static __device__ void load_tile(uint32_t *tile, uint32_t *turned, const float *x, int row, int n, int hd) {
    UNROLL for (int i = (int)threadIdx.x; i < COLS * HD / 4; i += THREADS) {
        const int c = i % 8 + i / WARP % (HD / 16) * 8, r = i / 8 % 4 + i / (2 * HD) * 4;  // two elements of two rows
        float2 v[2];
        for (int e = 0; e < 2; e++)
            v[e] = 2 * r + e < n && 2 * c < hd ? *(const float2 *)(x + (2 * r + e) * row + 2 * c)
                                               : make_float2(0.0f, 0.0f);
        for (int e = 0; e < 2 && tile; e++) tile[(2 * r + e) * (HD / 2 + 4) + c] = snipi_ptx_bf16x2(v[e].x, v[e].y);
        for (int e = 0; e < 2 && turned; e++)
            turned[(2 * c + e) * (COLS / 2 + 4) + r] = e ? snipi_ptx_bf16x2(v[0].y, v[1].y)
                                                         : snipi_ptx_bf16x2(v[0].x, v[1].x);
    }
}

[[maybe_unused]] static __device__ void multiply(float d[4], const uint32_t a[4], const uint32_t *b) {
    const uint32_t words[2] = { b[0], b[4] };
    snipi_ptx_mma_bf16(d, a, words);
}

template <int KIND, int HD> static __device__ void attend_rows(const attention &t) {
    enum {
        COLS = HD > 64 ? 32 : 64,
        STEP = KIND == FORWARD ? 32 : 16,
        WIDE = HD / 2 + 4,
        TALL = COLS / 2 + 4,
        BY_KEYS = KIND == KEYS || KIND == VALUES,
        TWO = KIND == QUERIES || KIND == KEYS
    };

    __shared__ uint32_t b0[COLS * WIDE], b1[COLS * WIDE], turned[HD * TALL];
    __shared__ float col_lse[COLS], col_along[COLS];
    const int lane = (int)threadIdx.x % WARP, y = lane / 4, x = lane % 4;
    const int T = t.T, hd = t.hd, heads = BY_KEYS ? t.G : t.H, others = BY_KEYS ? t.H : t.G, group = t.H / t.G;
    const int tiles = (T + ROWS - 1) / ROWS, all = (int)gridDim.x / tiles, head = (int)blockIdx.x % all % heads;
    const int r0 = (BY_KEYS ? (int)blockIdx.x / all : tiles - 1 - (int)blockIdx.x / all) * ROWS;  // the longest first
    const int warp_row = r0 + (int)threadIdx.x / WARP * 16, row = warp_row + y,
              end = BY_KEYS || r0 + ROWS > T ? T : r0 + ROWS;
    const int64_t first = (int64_t)((int)blockIdx.x % all / heads) * T,
                  at = (first * heads + head) * hd;  // the sequence's first row
    uint32_t a0[HD / 16][4], a1[HD / 16][4];
    float out[HD / 8][4] = {}, top[2] = { -INFINITY, -INFINITY }, sum[2] = {}, lse[2], along[2];
    UNROLL for (int k = 0; k < HD / 16; k++) UNROLL for (int i = 0; i < 4; i++) {
        const int r = row + i % 2 * 8, c = 16 * k + 2 * x + i / 2 * 8;
        const int64_t from = at + (int64_t)r * (heads * hd) + c;
        a0[k][i] = bf16_pair(t.a[0] + from, r < T && c < hd);
        if (TWO) a1[k][i] = bf16_pair(t.a[1] + from, r < T && c < hd);
    }
    for (int i = 0; i < 2 && KIND == QUERIES; i++) {
        const int r = row + 8 * i;
        lse[i] = r < T ? t.lse[(first + r) * t.H + head] * LOG2_E : 0.0f;
        along[i] = r < T ? t.along[(first + r) * t.H + head] : 0.0f;
    }
    for (int other = BY_KEYS ? head * group : head / group, last = BY_KEYS ? other + group : other + 1; other < last;
         other++)
        for (int c0 = BY_KEYS ? r0 : 0; c0 < end; c0 += COLS) {
            const int64_t from = ((first + c0) * others + other) * hd;
            __syncthreads();
            load_tile<HD, COLS>(b0, TWO ? turned : NULL, t.b[0] + from, others * hd, end - c0, hd);
            load_tile<HD, COLS>(TWO ? b1 : NULL, TWO ? NULL : turned, t.b[1] + from, others * hd, end - c0, hd);
            if (BY_KEYS && threadIdx.x < COLS) {
                const int c = c0 + (int)threadIdx.x;
                const int64_t of = (first + c) * t.H + other;
                col_lse[threadIdx.x] = c < T ? t.lse[of] * LOG2_E : 0.0f;
                col_along[threadIdx.x] = c < T ? t.along[of] : 0.0f;
            }
            __syncthreads();
            if (BY_KEYS ? c0 + COLS <= warp_row : c0 > warp_row) continue;  // nothing seen by this warp
            _Pragma("unroll 1") for (int k0 = 0; k0 < COLS; k0 += STEP) {
                float p[STEP / 8][4] = {};
                UNROLL for (int j = 0; j < STEP / 8; j++) {
                    float dp[4] = {};
                    UNROLL for (int k = 0; k < HD / 16; k++) {
                        multiply(p[j], a0[k], b0 + (k0 + 8 * j + y) * WIDE + 8 * k + x);
                        if (TWO) multiply(dp, a1[k], b1 + (k0 + 8 * j + y) * WIDE + 8 * k + x);
                    }
                    UNROLL for (int e = 0; e < 4; e++) {
                        const int in = k0 + 8 * j + 2 * x + e % 2, r = row + e / 2 * 8, c = c0 + in;
                        const bool seen = BY_KEYS ? r <= c : c <= r;  // columns beyond the end add zeros
                        if (KIND == FORWARD)
                            p[j][e] = seen ? p[j][e] : -INFINITY;
                        else
                            p[j][e] = seen ? exp2f(p[j][e] * t.scale2 - (BY_KEYS ? col_lse[in] : lse[e / 2])) : 0.0f;
                        if (TWO) p[j][e] *= (dp[e] - (BY_KEYS ? col_along[in] : along[e / 2])) * t.scale;
                    }
                }
                UNROLL for (int i = 0; i < 2 && KIND == FORWARD; i++) {  // of each row
                    float most = top[i], keep;
                    UNROLL for (int e = 0; e < STEP / 4; e++) most = fmaxf(most, p[e / 2][2 * i + e % 2]);
                    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
                    keep = exp2f((top[i] - most) * t.scale2);
                    top[i] = most;
                    sum[i] *= keep;
                    UNROLL for (int e = 0; e < STEP / 4; e++) {
                        float &v = p[e / 2][2 * i + e % 2];
                        sum[i] += v = exp2f((v - most) * t.scale2);
                    }
                    UNROLL for (int e = 0; e < HD / 4; e++) out[e / 2][2 * i + e % 2] *= keep;
                }
                UNROLL for (int k = 0; k < STEP / 16; k++) {
                    uint32_t left[4];
                    UNROLL for (int i = 0; i < 4; i++)
                        left[i] = snipi_ptx_bf16x2(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
                    UNROLL for (int j = 0; j < HD / 8; j++)
                        multiply(out[j], left, turned + (8 * j + y) * TALL + k0 / 2 + 8 * k + x);
                }
            }
        }
    UNROLL for (int i = 0; i < 2; i++) {
        const int r = row + 8 * i;
        float by = 1.0f;
        if (KIND == FORWARD) {
            sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 1);
            sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 2);
            by = 1.0f / sum[i];
            if (x == 0 && r < T) t.lse[(first + r) * t.H + head] = top[i] * t.scale + logf(sum[i]);
        }
        UNROLL for (int j = 0; j < HD / 8; j++) if (r < T && 8 * j + 2 * x < hd) *
            (float2 *)(t.out + at + (int64_t)r * (heads * hd) + 8 * j + 2 * x) = make_float2(out[j][2 * i] * by,
                                                                                             out[j][2 * i + 1] * by);
    }
}

// Two blocks at a time hide each other's loads; elsewhere than on 9.0 they would lack registers for heads of 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
enum { WIDEST_OF_TWO = 64 };
#else
enum { WIDEST_OF_TWO = 32 };
#endif
// Empty where the instructions are missing, which gpu_begin sees.
template <int KIND, int HD> KERNEL __launch_bounds__(THREADS, HD > WIDEST_OF_TWO ? 1 : 2) attend(const attention t) {
#ifdef __CUDA_ARCH__
    if constexpr (__CUDA_ARCH__ >= 800)
#endif
        attend_rows<KIND, HD>(t);
}

KERNEL along_rows(float *along, const float *out, const float *dout, int64_t n, int64_t hd) {  // a warp a row of a head
    const int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) / WARP;
    float sum = 0;
    for (int64_t j = threadIdx.x % WARP; j < hd && i < n; j += WARP) sum += out[i * hd + j] * dout[i * hd + j];
    for (int o = WARP / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
    if (threadIdx.x % WARP == 0 && i < n) along[i] = sum;
}

// >>model ------------------------------------------------------------------------------------------
typedef struct gpu {
    llama *host;
    llama d;  // the same tensors in device memory, which begins at d.params
    snip *session;
    snip_cuda *c;  // NULL: not on the device yet
    cudaStream_t stream;
    void *session_memory;
    int32_t *tokens, *targets;
    bool tensor_cores;               // for attention
    float *scores, *dscores, *loss;  // (batch, heads, seq, seq) twice, with tensor cores (R, heads); 1
    double *sums;                    // (PARTS), then their sum
    struct gpu *next;
} gpu;

static gpu *gpus;

static gpu *gpu_of(const llama *host, const snip *session) {
    gpu *g = gpus;
    while (g && g->host != host && g->session != session) g = g->next;
    return g;
}

template <class T> static T *device_memory(size_t n) {
    T *p;
    check(cudaMalloc(&p, (n ? n : 1) * sizeof(T)) == cudaSuccess, "allocating memory");
    return p;
}

template <class T> static void copy(T *to, const T *from, int64_t n, cudaMemcpyKind kind) {
    check(cudaMemcpy(to, from, (size_t)n * sizeof(T), kind) == cudaSuccess, "copying");
}

static llama *gpu_create(const llama_config *config, int batch, snip *session) {
    llama *host = llama_create(config, batch, session);
    if (!host) return NULL;
    gpu *g = (gpu *)tr_alloc(sizeof *g);
    g->host = host;
    g->session = session;
    g->next = gpus;
    gpus = g;
    return host;
}

static void gpu_destroy(llama *host) {
    gpu *g = gpu_of(host, NULL), **link = &gpus;
    if (g) {
        while (*link != g) link = &(*link)->next;
        *link = g->next;
        snip_cuda_destroy(g->c);
        if (g->c) {
            for (void *p : { (void *)g->d.params, g->session_memory, (void *)g->tokens, (void *)g->targets,
                             (void *)g->scores, (void *)g->dscores, (void *)g->loss, (void *)g->sums })
                cudaFree(p);
            cudaStreamDestroy(g->stream);
            free(g->d.block);
        }
        free(g);
    }
    llama_destroy(host);
}

// To the device, at the first use: after a checkpoint has been loaded.
static gpu *gpu_begin(const llama *host, const snip *session) {
    gpu *g = gpu_of(host, session);
    if (g->c) return g;
    const llama_config *c = &g->host->config;
    int64_t R = (int64_t)g->host->batch * c->seq;
    size_t blocks = (size_t)c->blocks * sizeof *g->d.block;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) tr_die("no GPU was found");
    g->d = *g->host;
    g->d.threads = 0;
    g->d.gemm_scratch_size = 0;
    g->d.block = (llama_block *)tr_alloc(blocks);
    memcpy(g->d.block, g->host->block, blocks);
    llama_layout(&g->d, device_memory<unsigned char>(llama_layout(&g->d, NULL)));
    copy(g->d.params, g->host->params, g->host->n_params, cudaMemcpyHostToDevice);
    copy(g->d.m, g->host->m, g->host->n_params, cudaMemcpyHostToDevice);
    copy(g->d.v, g->host->v, g->host->n_params, cudaMemcpyHostToDevice);
    copy(g->d.rope, g->host->rope, c->seq * (c->dim / c->heads), cudaMemcpyHostToDevice);
    g->tokens = device_memory<int32_t>((size_t)R);
    g->targets = device_memory<int32_t>((size_t)R);
    g->tensor_cores = g->session->desc.high == SNIP_BF16 && c->dim / c->heads <= 128 &&
                      snipi_cuda_has_body(attend<FORWARD, 64>);
    g->scores = device_memory<float>((size_t)(R * c->heads * (g->tensor_cores ? 1 : c->seq)));
    g->dscores = device_memory<float>((size_t)(R * c->heads * (g->tensor_cores ? 0 : c->seq)));
    g->loss = device_memory<float>(1);
    g->sums = device_memory<double>(PARTS + 1);
    for (int i = 0; i < g->d.n_tensors; i++) {
        const llama_tensor *t = &g->d.tensors[i];
        if (t->layer >= 0 && snip_bind_adamw(g->session, t->layer, g->d.m + t->offset, g->d.v + t->offset))
            snip_bind_momentum(g->session, t->layer, g->d.m + t->offset);
    }
    check(cudaStreamCreate(&g->stream) == cudaSuccess, "making a stream");
    g->session_memory = device_memory<char>(snip_cuda_memory(g->session, R));
    g->c = snip_cuda_create(g->session, R, g->session->desc.every > 0 && g->session->desc.every <= LAG ? 0 : LAG,
                            g->session_memory, g->stream);
    if (!g->c) tr_die("%s", snip_message(g->session));
    return g;
}

static void linear_fwd(gpu *g, int tensor, float *out, const float *inp, int64_t rows) {
    const llama_tensor *t = &g->d.tensors[tensor];
    snip_status st = snip_cuda_linear_forward(g->c, t->layer, out, inp, g->d.params + t->offset, NULL, rows, g->stream);
    if (st) tr_stop("%s forward: %s", t->name, snip_status_text(st));
}

static void linear_bwd(gpu *g, int tensor, float *dinp, const float *dout, const float *inp, int64_t rows) {
    const llama_tensor *t = &g->d.tensors[tensor];
    snip_status st = snip_cuda_linear_backward(g->c, t->layer, dinp, g->d.grads + t->offset, NULL, dout, inp,
                                               g->d.params + t->offset, rows, g->stream);
    if (st) tr_stop("%s backward: %s", t->name, snip_status_text(st));
}

static void zero(gpu *g, float *x, int64_t n) {
    check(cudaMemsetAsync(x, 0, (size_t)n * sizeof(float), g->stream) == cudaSuccess, "zeroing");
}

static void norm_fwd(gpu *g, float *out, float *rstd, const float *x, int tensor, int64_t R) {
    launch(rmsnorm, R, ROW_THREADS, g->stream, out, rstd, x, (const float *)(g->d.params + g->d.tensors[tensor].offset),
           (int64_t)g->d.config.dim);
}

static void norm_bwd(gpu *g, const float *dout, const float *x, const float *rstd, int tensor, int64_t R) {
    const int64_t d = g->d.config.dim, at = g->d.tensors[tensor].offset;
    launch(rmsnorm_gradient, R, ROW_THREADS, g->stream, g->d.dx, dout, x, (const float *)(g->d.params + at), rstd, d);
    launch(rmsnorm_weights, (d + WARP - 1) / WARP, THREADS, g->stream, g->d.grads + at, dout, x, rstd, R, d);
}

static void turn(gpu *g, float *x, int64_t R, int64_t heads, float sign) {
    const int64_t hd = g->d.config.dim / g->d.config.heads;
    launch(rope_turn, blocks_of(R * heads * hd / 2), THREADS, g->stream, x, (const float *)g->d.rope, R, heads, hd,
           (int64_t)g->d.config.seq, sign);
}

static void multiply_heads(gpu *g, view a, view b, view c, int64_t m, int64_t n, int64_t k, int64_t sequences,
                           int64_t heads, int part, int accumulate) {
    launch(head_products, sequences * heads * ((m + TILE - 1) / TILE) * ((n + TILE - 1) / TILE), THREADS, g->stream, a,
           b, c, m, n, k, heads, part, accumulate);
}

// Heads of an activation (R, heads * hd) as (T, hd), or transposed; the scores' as (T, T).
static view heads_of(const gpu *g, float *x, int64_t heads, int transposed) {
    const int64_t T = g->d.config.seq, hd = g->d.config.dim / g->d.config.heads, row = heads * hd;
    view v = { x, transposed ? 1 : row, transposed ? row : 1, T * row, hd, (int)(g->d.config.heads / heads) };
    return v;
}

static view scores_of(const gpu *g, float *x, int transposed) {
    const int64_t T = g->d.config.seq;
    view v = { x, transposed ? 1 : T, transposed ? T : 1, g->d.config.heads * T * T, T * T, 1 };
    return v;
}

template <int KIND> static void attend_heads(gpu *g, attention t, int64_t sequences) {
    const llama_config *c = &g->d.config;
    t.T = c->seq;
    t.H = c->heads;
    t.G = c->kv_heads;
    t.hd = c->dim / c->heads;
    t.scale = 1.0f / sqrtf((float)t.hd);
    t.scale2 = t.scale * LOG2_E;
    launch(t.hd > 64   ? attend<KIND, 128>
           : t.hd > 32 ? attend<KIND, 64>
                       : attend<KIND, 32>,
           sequences * (KIND == KEYS || KIND == VALUES ? t.G : t.H) * ((t.T + ROWS - 1) / ROWS), THREADS, g->stream, t);
}

static void attention_fwd(gpu *g, const llama_block *b, int64_t sequences) {
    const llama_config *c = &g->d.config;
    const int64_t T = c->seq, H = c->heads, hd = c->dim / H;
    if (g->tensor_cores)
        return attend_heads<FORWARD>(g,
                                     {
                                         {b->q },
                                         { b->k, b->v },
                                         b->att, b->lse
        },
                                     sequences);
    multiply_heads(g, heads_of(g, b->q, H, 0), heads_of(g, b->k, c->kv_heads, 0), scores_of(g, g->scores, 0), T, T, hd,
                   sequences, H, LOWER, 0);
    launch(softmax_rows, sequences * H * T, ROW_THREADS, g->stream, g->scores, b->lse, T, H, 1.0f / sqrtf((float)hd));
    multiply_heads(g, scores_of(g, g->scores, 0), heads_of(g, b->v, c->kv_heads, 1), heads_of(g, b->att, H, 0), T, hd,
                   T, sequences, H, BELOW_A, 0);
}

static void attention_bwd(gpu *g, const llama_block *b, int64_t sequences) {
    const llama_config *c = &g->d.config;
    const int64_t T = c->seq, H = c->heads, G = c->kv_heads, hd = c->dim / H, group = H / G;
    if (g->tensor_cores) {
        launch(along_rows, (sequences * T * H * WARP + THREADS - 1) / THREADS, THREADS, g->stream, g->scores,
               (const float *)b->att, (const float *)g->d.datt, sequences * T * H, hd);
        attend_heads<QUERIES>(g,
                              {
                                  {b->q,  g->d.datt},
                                  { b->k, b->v     },
                                  g->d.dq, b->lse, g->scores
        },
                              sequences);
        attend_heads<KEYS>(g,
                           {
                               {b->k,  b->v     },
                               { b->q, g->d.datt},
                               g->d.dk, b->lse, g->scores
        },
                           sequences);
        attend_heads<VALUES>(g,
                             {
                                 {b->k      },
                                 { b->q, g->d.datt },
                                 g->d.dv, b->lse, g->scores
        },
                             sequences);
        return;
    }
    multiply_heads(g, heads_of(g, b->q, H, 0), heads_of(g, b->k, G, 0), scores_of(g, g->scores, 0), T, T, hd, sequences,
                   H, LOWER, 0);
    multiply_heads(g, heads_of(g, g->d.datt, H, 0), heads_of(g, b->v, G, 0), scores_of(g, g->dscores, 0), T, T, hd,
                   sequences, H, LOWER, 0);
    launch(softmax_gradient, sequences * H * T, ROW_THREADS, g->stream, g->scores, g->dscores, (const float *)b->lse,
           (const float *)b->att, (const float *)g->d.datt, T, H, hd, 1.0f / sqrtf((float)hd));
    multiply_heads(g, scores_of(g, g->dscores, 0), heads_of(g, b->k, G, 1), heads_of(g, g->d.dq, H, 0), T, hd, T,
                   sequences, H, BELOW_A, 0);
    for (int64_t i = 0; i < group; i++) {  // the i-th query head of every key-value head
        view ds = scores_of(g, g->dscores, 1), p = scores_of(g, g->scores, 1), q = heads_of(g, b->q, H, 1),
             dout = heads_of(g, g->d.datt, H, 1);
        view dk = heads_of(g, g->d.dk, G, 0), dv = heads_of(g, g->d.dv, G, 0);
        for (view *v : { &ds, &p, &q, &dout }) {
            v->x += i * v->head;
            v->head *= group;
        }
        dk.group = dv.group = 1;
        multiply_heads(g, ds, q, dk, T, hd, T, sequences, G, ABOVE_A, i > 0);
        multiply_heads(g, p, dout, dv, T, hd, T, sequences, G, ABOVE_A, i > 0);
    }
}

// Output layer and cross-entropy, as in llama_head.
static void head(gpu *g, int64_t R, float grad_scale) {
    const int64_t V = g->d.config.vocab, d = g->d.config.dim, at = g->d.tensors[g->d.output].offset;
    for (int64_t r0 = 0; r0 < R; r0 += g->d.head_chunk) {
        const int64_t m = R - r0 < g->d.head_chunk ? R - r0 : g->d.head_chunk;
        snip_operand n = llama_operand(g->d.n + r0 * d, d, 0), w = llama_operand(g->d.params + at, d, 0),
                     dl = llama_operand(g->d.logits, V, 0);
        n.round_bf16 = w.round_bf16 = dl.round_bf16 = g->session->desc.high == SNIP_BF16;
        check(snip_cuda_gemm(m, V, d, &n, &w, g->d.logits, V, 0, NULL, g->stream) == SNIP_OK, "the output layer");
        launch(cross_entropy, m, THREADS, g->stream, g->d.logits, (const int32_t *)(g->targets + r0),
               g->d.row_loss + r0, V, grad_scale);
        if (grad_scale == 0.0f) continue;
        w.transposed = 1;
        check(snip_cuda_gemm(m, d, V, &dl, &w, g->d.dn + r0 * d, d, 0, NULL, g->stream) == SNIP_OK,
              "the output layer's gradient");
        dl.transposed = n.transposed = 1;
        check(snip_cuda_gemm(V, d, m, &dl, &n, g->d.grads + at, d, 1, NULL, g->stream) == SNIP_OK,
              "the output weights' gradient");
    }
}

// >>passes -----------------------------------------------------------------------------------------
static void gpu_zero_grad(llama *host) {
    gpu *g = gpu_begin(host, NULL);
    zero(g, g->d.grads, g->d.n_params);
}

static snip_status gpu_forward(llama *host, snip *s, const int32_t *tokens, const int32_t *targets, int sequences,
                               float grad_scale, double *loss) {
    gpu *g = gpu_begin(host, s);
    const llama_config *c = &g->d.config;
    const int64_t R = (int64_t)sequences * c->seq, d = c->dim, f = c->ffn;
    float *y = g->d.dn;  // what a branch adds to the stream
    host->failed[0] = 0;
    copy(g->tokens, tokens, R, cudaMemcpyHostToDevice);
    copy(g->targets, targets, R, cudaMemcpyHostToDevice);
    launch(embed_rows, blocks_of(R * d), THREADS, g->stream, g->d.block[0].x,
           (const float *)(g->d.params + g->d.tensors[g->d.embed].offset), (const int32_t *)g->tokens, R, d);
    for (int i = 0; i < c->blocks; i++) {
        const llama_block *b = &g->d.block[i];
        norm_fwd(g, b->n1, b->rstd1, b->x, b->norm1, R);
        linear_fwd(g, b->lin[LLAMA_Q], b->q, b->n1, R);
        linear_fwd(g, b->lin[LLAMA_K], b->k, b->n1, R);
        linear_fwd(g, b->lin[LLAMA_V], b->v, b->n1, R);
        turn(g, b->q, R, c->heads, 1.0f);
        turn(g, b->k, R, c->kv_heads, 1.0f);
        attention_fwd(g, b, sequences);
        linear_fwd(g, b->lin[LLAMA_O], y, b->att, R);
        launch(add_rows, blocks_of(R * d), THREADS, g->stream, b->x2, (const float *)b->x, (const float *)y, R * d);
        norm_fwd(g, b->n2, b->rstd2, b->x2, b->norm2, R);
        linear_fwd(g, b->lin[LLAMA_GATE], b->gate, b->n2, R);
        linear_fwd(g, b->lin[LLAMA_UP], b->up, b->n2, R);
        launch(swiglu, blocks_of(R * f), THREADS, g->stream, b->act, (const float *)b->gate, (const float *)b->up,
               R * f);
        linear_fwd(g, b->lin[LLAMA_DOWN], y, b->act, R);
        launch(add_rows, blocks_of(R * d), THREADS, g->stream, i + 1 < c->blocks ? g->d.block[i + 1].x : g->d.x,
               (const float *)b->x2, (const float *)y, R * d);
    }
    norm_fwd(g, g->d.n, g->d.rstd, g->d.x, g->d.norm, R);
    head(g, R, grad_scale);
    launch(sum_parts, 1, THREADS, g->stream, (const double *)g->d.row_loss, R, g->sums + PARTS);
    check(cudaStreamSynchronize(g->stream) == cudaSuccess, "a forward pass");
    copy(loss, (const double *)(g->sums + PARTS), 1, cudaMemcpyDeviceToHost);
    if (llama_finite(*loss)) return SNIP_OK;
    llama_fail(host, &host->tensors[host->output], "loss");
    return SNIP_NONFINITE;
}

static snip_status gpu_backward(llama *host, snip *s, const int32_t *tokens, int sequences) {
    gpu *g = gpu_begin(host, s);
    const llama_config *c = &g->d.config;
    const int64_t R = (int64_t)sequences * c->seq, d = c->dim, f = c->ffn;
    llama *D = &g->d;
    (void)tokens;  // there since the forward pass
    zero(g, D->dx, R * d);
    norm_bwd(g, D->dn, D->x, D->rstd, D->norm, R);
    for (int i = c->blocks - 1; i >= 0; i--) {
        const llama_block *b = &D->block[i];
        zero(g, D->dact, R * f);
        linear_bwd(g, b->lin[LLAMA_DOWN], D->dact, D->dx, b->act, R);
        launch(swiglu_gradient, blocks_of(R * f), THREADS, g->stream, D->dgate, D->dup, (const float *)D->dact,
               (const float *)b->gate, (const float *)b->up, R * f);
        zero(g, D->dn, R * d);
        linear_bwd(g, b->lin[LLAMA_UP], D->dn, D->dup, b->n2, R);
        linear_bwd(g, b->lin[LLAMA_GATE], D->dn, D->dgate, b->n2, R);
        norm_bwd(g, D->dn, b->x2, b->rstd2, b->norm2, R);
        zero(g, D->datt, R * d);
        linear_bwd(g, b->lin[LLAMA_O], D->datt, D->dx, b->att, R);
        attention_bwd(g, b, sequences);
        turn(g, D->dq, R, c->heads, -1.0f);
        turn(g, D->dk, R, c->kv_heads, -1.0f);
        zero(g, D->dn, R * d);
        linear_bwd(g, b->lin[LLAMA_V], D->dn, D->dv, b->n1, R);
        linear_bwd(g, b->lin[LLAMA_K], D->dn, D->dk, b->n1, R);
        linear_bwd(g, b->lin[LLAMA_Q], D->dn, D->dq, b->n1, R);
        norm_bwd(g, D->dn, b->x, b->rstd1, b->norm1, R);
    }
    launch(embed_gradient, c->vocab, THREADS, g->stream, D->grads + D->tensors[D->embed].offset, (const float *)D->dx,
           (const int32_t *)g->tokens, R, d);
    return SNIP_OK;
}

static double gpu_grad_norm(llama *host) {
    gpu *g = gpu_begin(host, NULL);
    double sum;
    launch(sum_squares, PARTS, THREADS, g->stream, (const float *)g->d.grads, g->d.n_params, g->sums);
    launch(sum_parts, 1, THREADS, g->stream, (const double *)g->sums, (int64_t)PARTS, g->sums + PARTS);
    check(cudaStreamSynchronize(g->stream) == cudaSuccess, "a backward pass");
    copy(&sum, (const double *)(g->sums + PARTS), 1, cudaMemcpyDeviceToHost);
    return sqrt(sum);
}

static void gpu_update(llama *host, snip_optimizer kind, const snip_adamw *o, double decay) {  // as llama_update
    gpu *g = gpu_begin(host, NULL);
    for (int i = 0; i < g->d.n_tensors; i++) {
        const llama_tensor *t = &g->d.tensors[i];
        const int64_t n = t->rows * t->cols;
        const float *dp = g->d.grads + t->offset, keep = 1.0f - (t->matrix ? (float)(o->lr * decay) : 0.0f);
        float *p = g->d.params + t->offset, *m = g->d.m + t->offset, *v = g->d.v + t->offset;
        if (kind == SNIP_ADAMW)
            launch(adamw_update, blocks_of(n), THREADS, g->stream, p, dp, m, v, n, (float)o->beta1, (float)o->beta2,
                   (float)o->eps, (float)o->grad_scale, (float)(1.0 / (1.0 - pow(o->beta1, (double)o->step))),
                   (float)(1.0 / (1.0 - pow(o->beta2, (double)o->step))), (float)o->lr, keep);
        else
            launch(momentum_update, blocks_of(n), THREADS, g->stream, p, dp, m, n, (int)(kind == SNIP_LION),
                   (float)o->beta1, (float)o->beta2, (float)o->grad_scale, (float)o->lr, keep);
    }
}

// >>session ----------------------------------------------------------------------------------------
static int gpu_next_pass(snip *s, double loss) {
    gpu *g = gpu_begin(NULL, s);
    float value = (float)loss;
    copy(g->loss, (const float *)&value, 1, cudaMemcpyHostToDevice);
    return snip_cuda_next_pass(g->c, g->loss, g->stream);
}

static snip_status gpu_end_step(snip *s, const snip_adamw *update) {
    gpu *g = gpu_begin(NULL, s);
    snip_status st = snip_cuda_end_step(g->c, update, NULL, g->stream);
    if (st == SNIP_NONFINITE && !g->host->failed[0]) sscanf(snip_message(s), "layer %50[^:]", g->host->failed);
    return st;
}

static snip_status gpu_measure_gains(snip *s, int64_t rows) {
    gpu *g = gpu_begin(NULL, s);
    return snip_cuda_measure_gains(g->c, rows, g->stream);
}

// Before a checkpoint is written: all that the device knows.
static snip_status gpu_state_save(const snip *s, void *state) {
    gpu *g = gpu_of(NULL, s);
    if (g->c) {
        snip_status st = snip_cuda_finish(g->c);
        if (st) return st;
        check(cudaStreamSynchronize(g->stream) == cudaSuccess, "a step");
        copy(g->host->params, (const float *)g->d.params, g->d.n_params, cudaMemcpyDeviceToHost);
        copy(g->host->m, (const float *)g->d.m, g->d.n_params, cudaMemcpyDeviceToHost);
        copy(g->host->v, (const float *)g->d.v, g->d.n_params, cudaMemcpyDeviceToHost);
    }
    return snip_state_save(s, state);
}

#define llama_create gpu_create
#define llama_destroy gpu_destroy
#define llama_zero_grad gpu_zero_grad
#define llama_forward gpu_forward
#define llama_backward gpu_backward
#define llama_grad_norm gpu_grad_norm
#define llama_update gpu_update
#define snip_next_pass gpu_next_pass
#define snip_end_step gpu_end_step
#define snip_measure_gains gpu_measure_gains
#define snip_state_save gpu_state_save
#include "train_llama.c"
