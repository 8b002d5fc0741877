// train_llama.cu - train_llama.c on a GPU: the same trainer, options and files.
//     nvcc -O2 -std=c++17 -arch=native examples/train_llama.cu -o train_llama
// On Hopper -arch=sm_90a, on a B200 -arch=sm_100a.
//
// This file has the model's passes as CUDA kernels, and at its end the trainer_backend that train.h trains by. The
// linear layers run through snip_cuda_linear_forward and _backward; a plan takes effect LAG steps after its measuring
// step.
//
// Everything is float32 but the linear layers (the plan), the output layer (BF16; under --precision f32 float32) and
// attention. Attention is BF16 on tensor cores, its scores in registers; under --precision f32, before compute
// capability 8.0 and with heads wider than 128 it is float32 without them, and keeps the scores in memory. All sums
// have a fixed order: a run can be repeated bit for bit.
//
// INDEX (search for the tag)
//   >>launch >>sums >>layers >>attention >>attention-mma >>model >>calls >>passes >>session
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#define SNIP_IMPLEMENTATION
#include "../snip_cuda.cuh"
#include "llama.h"
#include "report.h"
#include "trainer.h"
#include "train.h"

#ifndef LAG
#    define LAG 1  // steps from a measurement to its plan
#endif

// >>launch -----------------------------------------------------------------------------------------
enum {
    WARP = 32,
    THREADS = 256,      // of a block
    ROW_THREADS = 128,  // of a block that has a row of the model's width or less
    TILE = 64,          // rows and columns of C that a block of head_products makes
    DEPTH = 16,         // of what it has in shared memory of A and B at a time
    PARTS = 256         // sums of squares that a gradient's norm is added up from
};

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

static int64_t blocks_of(int64_t n) {  // for EACH of n elements
    return n < (int64_t)THREADS << 14 ? (n + THREADS - 1) / THREADS : (int64_t)1 << 14;
}

// A thread's share of n elements.
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
KERNEL embed_rows(float *x, const float *embed, const int32_t *tokens, int64_t rows, int64_t dim) {
    EACH(i, rows * dim) x[i] = embed[tokens[i / dim] * dim + i % dim];
}

// A block for each token of the vocabulary adds up the rows where it occurs, in order.
KERNEL embed_gradient(float *de, const float *dx, const int32_t *tokens, int64_t rows, int64_t dim) {
    __shared__ int occurs[THREADS];
    const int token = (int)blockIdx.x;
    for (int64_t r0 = 0; r0 < rows; r0 += THREADS) {
        int64_t n = rows - r0 < THREADS ? rows - r0 : (int64_t)THREADS;
        __syncthreads();
        occurs[threadIdx.x] = threadIdx.x < n && tokens[r0 + threadIdx.x] == token;
        __syncthreads();
        for (int64_t r = 0; r < n; r++) {
            if (!occurs[r]) continue;
            for (int64_t j = threadIdx.x; j < dim; j += THREADS) de[token * dim + j] += dx[(r0 + r) * dim + j];
        }
    }
}

// A block a row.
KERNEL rmsnorm(float *out, float *rstd, const float *x, const float *w, int64_t dim) {
    const float *row = x + blockIdx.x * dim;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) sum += row[i] * row[i];
    float s = 1.0f / sqrtf(block_all(sum, add_op()) / (float)dim + 1e-5f);
    if (threadIdx.x == 0) rstd[blockIdx.x] = s;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) out[blockIdx.x * dim + i] = row[i] * s * w[i];
}

KERNEL rmsnorm_gradient(float *dx, const float *dout, const float *x, const float *w, const float *rstd, int64_t dim) {
    const int64_t at = blockIdx.x * dim;
    const float s = rstd[blockIdx.x];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) sum += dout[at + i] * w[i] * x[at + i];
    float mean = block_all(sum, add_op()) * s * s * s / (float)dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) dx[at + i] += dout[at + i] * w[i] * s - x[at + i] * mean;
}

// A block takes 32 columns, a warp every eighth row of them.
KERNEL rmsnorm_weights(float *dw, const float *dout, const float *x, const float *rstd, int64_t rows, int64_t dim) {
    __shared__ float part[THREADS];
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    const int64_t col = (int64_t)blockIdx.x * WARP + lane;
    float sum = 0;
    for (int64_t r = warp; r < rows && col < dim; r += THREADS / WARP)
        sum += dout[r * dim + col] * x[r * dim + col] * rstd[r];
    part[threadIdx.x] = sum;
    __syncthreads();
    if (warp || col >= dim) return;
    for (int w = 1; w < THREADS / WARP; w++) sum += part[w * WARP + lane];
    dw[col] += sum;
}

KERNEL rope_turn(float *x, const float *rope, int64_t rows, int64_t heads, int64_t head_dim, int64_t seq, float sign) {
    const int64_t half = head_dim / 2;
    EACH(i, rows * heads * half) {
        const int64_t j = i % half, r = i / half / heads;
        const float *angle = rope + r % seq * head_dim;
        float *a = x + i / half * head_dim + j, c = angle[j], s = sign * angle[half + j], u = a[0], v = a[half];
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
KERNEL cross_entropy(float *logits, const int32_t *targets, double *loss, int64_t vocab, float grad_scale) {
    float *row = logits + blockIdx.x * vocab, top = row[0], sum = 0;
    const int32_t target = targets[blockIdx.x];
    const float at_target = row[target];
    for (int64_t j = threadIdx.x; j < vocab; j += blockDim.x) top = row[j] > top ? row[j] : top;
    top = block_all(top, max_op());
    for (int64_t j = threadIdx.x; j < vocab; j += blockDim.x) sum += row[j] = expf(row[j] - top);
    sum = block_all(sum, add_op());
    if (threadIdx.x == 0) loss[blockIdx.x] = log((double)sum) + (double)top - (double)at_target;
    if (grad_scale == 0.0f) return;
    for (int64_t j = threadIdx.x; j < vocab; j += blockDim.x)
        row[j] = row[j] * (grad_scale / sum) - (j == target ? grad_scale : 0.0f);
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
// Matrices of all heads of all sequences. Element (i, j) of head h of sequence s lies at
//     x + s * sequence + h / group * head + i * row + j * col.
typedef struct {
    float *x;
    int64_t row, col, sequence, head;
    int group;
} view;

static __device__ float *view_at(const view &v, int64_t s, int64_t h) {
    return v.x + s * v.sequence + h / v.group * v.head;
}

enum {
    LOWER,    // C is wanted up to its diagonal
    BELOW_A,  // A is 0 above its diagonal
    ABOVE_A   // A is 0 below its diagonal
};

// C[m][n] = or += A[m][k] B[n][k]^T. A block makes 64 x 64 of one head's C, a thread 4 x 4.
KERNEL head_products(view a, view b, view c, int64_t m, int64_t n, int64_t k, int64_t heads, int part, int accumulate) {
    __shared__ float tile_a[DEPTH][TILE + 1], tile_b[DEPTH][TILE + 1];
    const int64_t down = (m + TILE - 1) / TILE, across = (n + TILE - 1) / TILE;
    const int64_t z = blockIdx.x / (down * across), t = blockIdx.x % (down * across);
    const int64_t m0 = t / across * TILE, n0 = t % across * TILE;
    const int64_t begin = part == ABOVE_A ? m0 : 0, end = part == BELOW_A && m0 + TILE < k ? m0 + TILE : k;
    const int y = (int)threadIdx.x / 16, x = (int)threadIdx.x % 16;
    const float *pa = view_at(a, z / heads, z % heads), *pb = view_at(b, z / heads, z % heads);
    float *pc = view_at(c, z / heads, z % heads), sum[4][4] = {};
    if (part == LOWER && n0 > m0) return;
    for (int64_t k0 = begin; k0 < end; k0 += DEPTH) {
        for (int i = (int)threadIdx.x; i < TILE * DEPTH; i += THREADS) {  // along whichever way the matrix lies
            int ra = a.col == 1 ? i / DEPTH : i % TILE, ka = a.col == 1 ? i % DEPTH : i / TILE;
            int rb = b.col == 1 ? i / DEPTH : i % TILE, kb = b.col == 1 ? i % DEPTH : i / TILE;
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
            int64_t row = m0 + y + 16 * i, col = n0 + x + 16 * j;
            if (row >= m || col >= n) continue;
            float *to = pc + row * c.row + col * c.col;
            *to = accumulate ? *to + sum[i][j] : sum[i][j];
        }
}

// A block for each row i of scores: softmax over 0 .. i, zeros beyond, and the row's log-sum-exp.
KERNEL softmax_rows(float *scores, float *lse, int64_t seq, int64_t heads, float scale) {
    const int64_t i = blockIdx.x % seq, seen = i + 1, h = blockIdx.x / seq % heads, s = blockIdx.x / seq / heads;
    float *row = scores + blockIdx.x * seq, top = row[0], sum = 0;
    for (int64_t j = threadIdx.x; j < seen; j += blockDim.x) top = row[j] > top ? row[j] : top;
    top = block_all(top, max_op());
    for (int64_t j = threadIdx.x; j < seen; j += blockDim.x) sum += row[j] = expf((row[j] - top) * scale);
    sum = block_all(sum, add_op());
    for (int64_t j = threadIdx.x; j < seq; j += blockDim.x) row[j] = j < seen ? row[j] / sum : 0.0f;
    if (threadIdx.x == 0) lse[(s * seq + i) * heads + h] = top * scale + logf(sum);
}

// scores become the probabilities; dscores, the gradients of these, the gradients of the scores. out, dout:
// [rows][heads][head_dim].
KERNEL softmax_gradient(float *scores, float *dscores, const float *lse, const float *out, const float *dout,
                        int64_t seq, int64_t heads, int64_t head_dim, float scale) {
    const int64_t i = blockIdx.x % seq, h = blockIdx.x / seq % heads, r = blockIdx.x / seq / heads * seq + i;
    const int64_t at = (r * heads + h) * head_dim;
    float *p = scores + blockIdx.x * seq, *ds = dscores + blockIdx.x * seq, along = 0;
    for (int64_t j = threadIdx.x; j < head_dim; j += blockDim.x) along += out[at + j] * dout[at + j];
    along = block_all(along, add_op());
    for (int64_t j = threadIdx.x; j < seq; j += blockDim.x) {
        p[j] = j <= i ? expf(p[j] * scale - lse[r * heads + h]) : 0.0f;
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
    const float *a[2];    // of rows: query or key; gradient of out or value
    const float *b[2];    // of columns: the same
    float *out, *lse;     // lse [rows][heads]
    const float *along;   // [rows][heads] sums of dout times out
    int T, H, G, hd;      // positions, query heads, key-value heads, width of a head
    float scale, scale2;  // 1 / sqrt(hd); times log2 e
} attention;

#ifndef SNIP_CUDA_SHIM  // the tests' stand-in for the CUDA runtime has these two of its own
static __device__ __forceinline__ uint32_t ptx_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// d[16][8] += a[16][16] b[8][16]^T
static __device__ __forceinline__ void ptx_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

[[maybe_unused]] static __device__ uint32_t bf16_pair(const float *x, bool there) {
    const float2 v = there ? *(const float2 *)x : make_float2(0.0f, 0.0f);
    return ptx_bf16x2(v.x, v.y);
}

// clang-format off
#define UNROLL _Pragma("unroll")

// COLS rows of x, of which n are there, as pairs of BF16: along the rows and, turned, along the columns; either may be
// NULL. Rows of words are 4 longer than needed, so that a warp's words lie in different banks.
template <int HD, int COLS>
static __device__ void load_tile(uint32_t *tile, uint32_t *turned, const float *x, int row, int n, int hd) {
    UNROLL for (int i = (int)threadIdx.x; i < COLS * HD / 4; i += THREADS) {
        const int c = i % 8 + i / WARP % (HD / 16) * 8, r = i / 8 % 4 + i / (2 * HD) * 4;  // two elements of two rows
        float2 v[2];
        for (int e = 0; e < 2; e++) {
            const bool there = 2 * r + e < n && 2 * c < hd;
            v[e] = there ? *(const float2 *)(x + (2 * r + e) * row + 2 * c) : make_float2(0.0f, 0.0f);
        }
        for (int e = 0; e < 2 && tile; e++) tile[(2 * r + e) * (HD / 2 + 4) + c] = ptx_bf16x2(v[e].x, v[e].y);
        for (int e = 0; e < 2 && turned; e++)
            turned[(2 * c + e) * (COLS / 2 + 4) + r] = e ? ptx_bf16x2(v[0].y, v[1].y) : ptx_bf16x2(v[0].x, v[1].x);
    }
}

[[maybe_unused]] static __device__ void multiply(float d[4], const uint32_t a[4], const uint32_t *b) {
    const uint32_t words[2] = { b[0], b[4] };
    ptx_mma_bf16(d, a, words);
}

template <int KIND, int HD> static __device__ void attend_rows(const attention &t) {
    enum {
        COLS = HD > 64 ? 32 : 64,
        STEP = KIND == FORWARD ? 32 : 16,
        WIDE = HD / 2 + 4,    // words of a row of b0 and b1
        TALL = COLS / 2 + 4,  // of a row of `turned`
        BY_KEYS = KIND == KEYS || KIND == VALUES,
        TWO = KIND == QUERIES || KIND == KEYS
    };
    __shared__ uint32_t b0[COLS * WIDE], b1[COLS * WIDE], turned[HD * TALL];
    __shared__ float col_lse[COLS], col_along[COLS];
    const int lane = (int)threadIdx.x % WARP, y = lane / 4, x = lane % 4;
    const int T = t.T, hd = t.hd, heads = BY_KEYS ? t.G : t.H, others = BY_KEYS ? t.H : t.G, group = t.H / t.G;
    const int tiles = (T + ROWS - 1) / ROWS, all = (int)gridDim.x / tiles, head = (int)blockIdx.x % all % heads;
    const int tile = (int)blockIdx.x / all, r0 = (BY_KEYS ? tile : tiles - 1 - tile) * ROWS;  // the longest first
    const int warp_row = r0 + (int)threadIdx.x / WARP * 16, row = warp_row + y;
    const int end = BY_KEYS || r0 + ROWS > T ? T : r0 + ROWS;
    const int64_t first = (int64_t)((int)blockIdx.x % all / heads) * T;  // the sequence's first row
    const int64_t at = (first * heads + head) * hd;

    // This warp's rows.
    uint32_t a0[HD / 16][4], a1[HD / 16][4];
    float out[HD / 8][4] = {}, top[2] = { -INFINITY, -INFINITY }, sum[2] = {}, lse[2], along[2];
    UNROLL for (int k = 0; k < HD / 16; k++)
        UNROLL for (int i = 0; i < 4; i++) {
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

    const int first_other = BY_KEYS ? head * group : head / group, n_others = BY_KEYS ? group : 1;
    for (int other = first_other; other < first_other + n_others; other++)
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
                // Scores of STEP columns, and from them probabilities or their gradients.
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

                // FORWARD: a row's largest score so far has grown, and what was added up for it shrinks.
                UNROLL for (int i = 0; i < 2 && KIND == FORWARD; i++) {
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

                // Their product with the columns' vectors.
                UNROLL for (int k = 0; k < STEP / 16; k++) {
                    uint32_t left[4];
                    UNROLL for (int i = 0; i < 4; i++)
                        left[i] = ptx_bf16x2(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
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
        UNROLL for (int j = 0; j < HD / 8; j++)
            if (r < T && 8 * j + 2 * x < hd)
                *(float2 *)(t.out + at + (int64_t)r * (heads * hd) + 8 * j + 2 * x) =
                    make_float2(out[j][2 * i] * by, out[j][2 * i + 1] * by);
    }
}

// clang-format on

// Two blocks at a time hide each other's loads; elsewhere than on 9.0 they would lack registers for heads of 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
enum { WIDEST_OF_TWO = 64 };
#else
enum { WIDEST_OF_TWO = 32 };
#endif

// Empty where the instructions are missing.
template <int KIND, int HD> KERNEL __launch_bounds__(THREADS, HD > WIDEST_OF_TWO ? 1 : 2) attend(const attention t) {
#ifdef __CUDA_ARCH__
    if constexpr (__CUDA_ARCH__ >= 800)
#endif
        attend_rows<KIND, HD>(t);
}

// Whether this GPU has code of `attend` with the instructions.
static bool attends_on_tensor_cores() {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, attend<FORWARD, 64>) == cudaSuccess, "asking for a kernel's attributes");
    return attributes.ptxVersion >= 80;
}

KERNEL along_rows(float *along, const float *out, const float *dout, int64_t n, int64_t hd) {  // a warp a row of a head
    const int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) / WARP;
    float sum = 0;
    for (int64_t j = threadIdx.x % WARP; j < hd && i < n; j += WARP) sum += out[i * hd + j] * dout[i * hd + j];
    for (int o = WARP / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
    if (threadIdx.x % WARP == 0 && i < n) along[i] = sum;
}

// >>model ------------------------------------------------------------------------------------------
// What a model has beside itself: a copy on the device. llama.device points to it.
typedef struct {
    llama *host;
    llama d;  // the same tensors in device memory, which begins at d.params
    snip *session;
    snip_cuda *c;  // NULL: not on the device yet
    cudaStream_t stream;
    void *session_memory;
    int32_t *tokens, *targets;  // [batch][seq]
    bool bf16;                  // the session's high precision, and the output layer's
    bool tensor_cores;          // for attention
    float *scores;              // [batch][heads][seq][seq], with tensor cores [rows][heads]
    float *dscores;             // the same, with tensor cores nothing
    float *loss;                // 1
    double *sums;               // [PARTS], then their sum
} gpu;

template <class T> static T *device_memory(size_t n) {
    T *p;
    check(cudaMalloc(&p, (n ? n : 1) * sizeof(T)) == cudaSuccess, "allocating memory");
    return p;
}

template <class T> static void copy(T *to, const T *from, int64_t n, cudaMemcpyKind kind) {
    check(cudaMemcpy(to, from, (size_t)n * sizeof(T), kind) == cudaSuccess, "copying");
}

static llama *gpu_create(const llama_config *config, int batch, snip *session) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) tr_die("no GPU was found");
    llama *host = llama_create(config, batch, session);
    if (!host) return NULL;
    gpu *g = (gpu *)tr_alloc(sizeof *g);
    g->host = host;
    g->session = session;
    host->device = g;
    return host;
}

static void gpu_destroy(llama *host) {
    gpu *g = (gpu *)host->device;
    snip_cuda_destroy(g->c);
    if (g->c) {
        for (void *p : { (void *)g->d.params, g->session_memory, (void *)g->tokens, (void *)g->targets,
                         (void *)g->scores, (void *)g->dscores, (void *)g->loss, (void *)g->sums })
            cudaFree(p);
        cudaStreamDestroy(g->stream);
        free(g->d.block);
    }
    free(g);
    llama_destroy(host);
}

static void make_device_copy(gpu *g) {
    const llama *host = g->host;
    const llama_config *c = &host->config;
    const size_t blocks = (size_t)c->blocks * sizeof *g->d.block;
    g->d = *host;
    g->d.threads = 0;
    g->d.gemm_scratch_size = 0;
    g->d.block = (llama_block *)tr_alloc(blocks);
    memcpy(g->d.block, host->block, blocks);
    llama_layout(&g->d, device_memory<unsigned char>(llama_layout(&g->d, NULL)));
    copy(g->d.params, host->params, host->n_params, cudaMemcpyHostToDevice);
    copy(g->d.m, host->m, host->n_params, cudaMemcpyHostToDevice);
    copy(g->d.v, host->v, host->n_params, cudaMemcpyHostToDevice);
    copy(g->d.rope, host->rope, c->seq * (c->dim / c->heads), cudaMemcpyHostToDevice);
    for (int i = 0; i < g->d.n_tensors; i++) {
        const llama_tensor *t = &g->d.tensors[i];
        if (t->layer >= 0 && snip_bind_adamw(g->session, t->layer, g->d.m + t->offset, g->d.v + t->offset))
            snip_bind_momentum(g->session, t->layer, g->d.m + t->offset);
    }
}

// The model's copy on the device, made at the first use: after a checkpoint has been loaded.
static gpu *on_device(const llama *host) {
    gpu *g = (gpu *)host->device;
    if (g->c) return g;
    const llama_config *c = &host->config;
    const snip_desc *desc = snip_settings(g->session);
    const int64_t rows = (int64_t)host->batch * c->seq;
    const int lag = desc->every > 0 && desc->every <= LAG ? 0 : LAG;
    make_device_copy(g);
    g->bf16 = desc->high == SNIP_BF16;
    g->tensor_cores = g->bf16 && c->dim / c->heads <= 128 && attends_on_tensor_cores();
    g->tokens = device_memory<int32_t>((size_t)rows);
    g->targets = device_memory<int32_t>((size_t)rows);
    g->scores = device_memory<float>((size_t)(rows * c->heads * (g->tensor_cores ? 1 : c->seq)));
    g->dscores = device_memory<float>((size_t)(rows * c->heads * (g->tensor_cores ? 0 : c->seq)));
    g->loss = device_memory<float>(1);
    g->sums = device_memory<double>(PARTS + 1);
    check(cudaStreamCreate(&g->stream) == cudaSuccess, "making a stream");
    g->session_memory = device_memory<char>(snip_cuda_memory(g->session, rows));
    g->c = snip_cuda_create(g->session, rows, lag, g->session_memory, g->stream);
    if (!g->c) tr_die("%s", snip_message(g->session));
    return g;
}

// >>calls ------------------------------------------------------------------------------------------
static void linear_fwd(gpu *g, int tensor, float *out, const float *inp, int64_t rows) {
    const llama_tensor *t = &g->d.tensors[tensor];
    snip_status status = snip_cuda_linear_forward(g->c, t->layer, out, inp, g->d.params + t->offset, NULL, rows,
                                                  g->stream);
    if (status) tr_stop("%s forward: %s", t->name, snip_status_text(status));
}

static void linear_bwd(gpu *g, int tensor, float *dinp, const float *dout, const float *inp, int64_t rows) {
    const llama_tensor *t = &g->d.tensors[tensor];
    snip_status status = snip_cuda_linear_backward(g->c, t->layer, dinp, g->d.grads + t->offset, NULL, dout, inp,
                                                   g->d.params + t->offset, rows, g->stream);
    if (status) tr_stop("%s backward: %s", t->name, snip_status_text(status));
}

static void zero(gpu *g, float *x, int64_t n) {
    check(cudaMemsetAsync(x, 0, (size_t)n * sizeof(float), g->stream) == cudaSuccess, "zeroing");
}

static void norm_fwd(gpu *g, float *out, float *rstd, const float *x, int tensor, int64_t rows) {
    launch(rmsnorm, rows, ROW_THREADS, g->stream, out, rstd, x, llama_weights(&g->d, tensor), (int64_t)g->d.config.dim);
}

static void norm_bwd(gpu *g, const float *dout, const float *x, const float *rstd, int tensor, int64_t rows) {
    const int64_t dim = g->d.config.dim;
    launch(rmsnorm_gradient, rows, ROW_THREADS, g->stream, g->d.dx, dout, x, llama_weights(&g->d, tensor), rstd, dim);
    launch(rmsnorm_weights, (dim + WARP - 1) / WARP, THREADS, g->stream, llama_gradients(&g->d, tensor), dout, x, rstd,
           rows, dim);
}

static void add(gpu *g, float *out, const float *a, const float *b, int64_t n) {
    launch(add_rows, blocks_of(n), THREADS, g->stream, out, a, b, n);
}

static void turn(gpu *g, float *x, int64_t rows, int64_t heads, float sign) {
    const int64_t head_dim = g->d.config.dim / g->d.config.heads;
    launch(rope_turn, blocks_of(rows * heads * head_dim / 2), THREADS, g->stream, x, (const float *)g->d.rope, rows,
           heads, head_dim, (int64_t)g->d.config.seq, sign);
}

static void multiply_heads(gpu *g, view a, view b, view c, int64_t m, int64_t n, int64_t k, int64_t sequences,
                           int64_t heads, int part, int accumulate) {
    const int64_t tiles = ((m + TILE - 1) / TILE) * ((n + TILE - 1) / TILE);
    launch(head_products, sequences * heads * tiles, THREADS, g->stream, a, b, c, m, n, k, heads, part, accumulate);
}

// Heads of an activation [rows][heads][head_dim] as [seq][head_dim], or transposed.
static view heads_of(const gpu *g, float *x, int64_t heads, int transposed) {
    const int64_t T = g->d.config.seq, hd = g->d.config.dim / g->d.config.heads, row = heads * hd;
    view v = { x, transposed ? 1 : row, transposed ? row : 1, T * row, hd, (int)(g->d.config.heads / heads) };
    return v;
}

// Heads of the scores as [seq][seq], or transposed.
static view scores_of(const gpu *g, float *x, int transposed) {
    const int64_t T = g->d.config.seq;
    view v = { x, transposed ? 1 : T, transposed ? T : 1, g->d.config.heads * T * T, T * T, 1 };
    return v;
}

// a1, b1 and along: NULL where a kind has no use for them.
template <int KIND>
static void attend_heads(gpu *g, const float *a0, const float *a1, const float *b0, const float *b1, float *out,
                         float *lse, const float *along, int64_t sequences) {
    const llama_config *c = &g->d.config;
    const int hd = c->dim / c->heads;
    const float scale = 1.0f / sqrtf((float)hd);
    const attention t = {
        {a0,  a1},
        { b0, b1},
        out, lse, along, c->seq, c->heads, c->kv_heads, hd, scale, scale * LOG2_E
    };
    const int64_t heads = KIND == KEYS || KIND == VALUES ? t.G : t.H, tiles = (t.T + ROWS - 1) / ROWS;
    launch(hd > 64   ? attend<KIND, 128>
           : hd > 32 ? attend<KIND, 64>
                     : attend<KIND, 32>,
           sequences * heads * tiles, THREADS, g->stream, t);
}

static void attention_fwd(gpu *g, const llama_block *b, int64_t sequences) {
    const llama_config *c = &g->d.config;
    const int64_t T = c->seq, H = c->heads, hd = c->dim / H;
    if (g->tensor_cores) {
        attend_heads<FORWARD>(g, b->q, NULL, b->k, b->v, b->att, b->lse, NULL, sequences);
        return;
    }
    const view scores = scores_of(g, g->scores, 0);
    multiply_heads(g, heads_of(g, b->q, H, 0), heads_of(g, b->k, c->kv_heads, 0), scores, T, T, hd, sequences, H, LOWER,
                   0);
    launch(softmax_rows, sequences * H * T, ROW_THREADS, g->stream, g->scores, b->lse, T, H, 1.0f / sqrtf((float)hd));
    multiply_heads(g, scores, heads_of(g, b->v, c->kv_heads, 1), heads_of(g, b->att, H, 0), T, hd, T, sequences, H,
                   BELOW_A, 0);
}

// The gradients of keys and values from the i-th query head of every group, added to those of the heads before.
static void group_bwd(gpu *g, const llama_block *b, int64_t sequences, int64_t i) {
    const llama_config *c = &g->d.config;
    const int64_t T = c->seq, H = c->heads, G = c->kv_heads, hd = c->dim / H, group = H / G;
    view ds = scores_of(g, g->dscores, 1), p = scores_of(g, g->scores, 1);
    view q = heads_of(g, b->q, H, 1), dout = heads_of(g, g->d.datt, H, 1);
    view dk = heads_of(g, g->d.dk, G, 0), dv = heads_of(g, g->d.dv, G, 0);
    for (view *v : { &ds, &p, &q, &dout }) {
        v->x += i * v->head;
        v->head *= group;
    }
    dk.group = dv.group = 1;
    multiply_heads(g, ds, q, dk, T, hd, T, sequences, G, ABOVE_A, i > 0);
    multiply_heads(g, p, dout, dv, T, hd, T, sequences, G, ABOVE_A, i > 0);
}

static void attention_bwd(gpu *g, const llama_block *b, int64_t sequences) {
    const llama_config *c = &g->d.config;
    const int64_t T = c->seq, H = c->heads, G = c->kv_heads, hd = c->dim / H, n = sequences * T * H;
    const llama *d = &g->d;
    if (g->tensor_cores) {
        float *along = g->scores;
        launch(along_rows, (n * WARP + THREADS - 1) / THREADS, THREADS, g->stream, along, (const float *)b->att,
               (const float *)d->datt, n, hd);
        attend_heads<QUERIES>(g, b->q, d->datt, b->k, b->v, d->dq, b->lse, along, sequences);
        attend_heads<KEYS>(g, b->k, b->v, b->q, d->datt, d->dk, b->lse, along, sequences);
        attend_heads<VALUES>(g, b->k, NULL, b->q, d->datt, d->dv, b->lse, along, sequences);
        return;
    }
    const view scores = scores_of(g, g->scores, 0), dscores = scores_of(g, g->dscores, 0);
    multiply_heads(g, heads_of(g, b->q, H, 0), heads_of(g, b->k, G, 0), scores, T, T, hd, sequences, H, LOWER, 0);
    multiply_heads(g, heads_of(g, d->datt, H, 0), heads_of(g, b->v, G, 0), dscores, T, T, hd, sequences, H, LOWER, 0);
    launch(softmax_gradient, n, ROW_THREADS, g->stream, g->scores, g->dscores, (const float *)b->lse,
           (const float *)b->att, (const float *)d->datt, T, H, hd, 1.0f / sqrtf((float)hd));
    multiply_heads(g, dscores, heads_of(g, b->k, G, 1), heads_of(g, d->dq, H, 0), T, hd, T, sequences, H, BELOW_A, 0);
    for (int64_t i = 0; i < H / G; i++) group_bwd(g, b, sequences, i);
}

// Output layer and cross-entropy, as in llama_head.
static void head(gpu *g, int64_t rows, float grad_scale) {
    const int64_t vocab = g->d.config.vocab, dim = g->d.config.dim;
    const float *weight = llama_weights(&g->d, g->d.output);
    for (int64_t r0 = 0; r0 < rows; r0 += g->d.head_chunk) {
        const int64_t m = rows - r0 < g->d.head_chunk ? rows - r0 : g->d.head_chunk;
        snip_operand n = llama_operand(g->d.n + r0 * dim, dim, 0), dn = llama_operand(g->d.logits, vocab, 0);
        snip_operand w = llama_operand(weight, dim, 0);
        n.round_bf16 = w.round_bf16 = dn.round_bf16 = g->bf16;
        check(snip_cuda_gemm(m, vocab, dim, &n, &w, g->d.logits, vocab, 0, NULL, g->stream) == SNIP_OK,
              "the output layer");
        launch(cross_entropy, m, THREADS, g->stream, g->d.logits, (const int32_t *)(g->targets + r0),
               g->d.row_loss + r0, vocab, grad_scale);
        if (grad_scale == 0.0f) continue;
        w.transposed = 1;
        check(snip_cuda_gemm(m, dim, vocab, &dn, &w, g->d.dn + r0 * dim, dim, 0, NULL, g->stream) == SNIP_OK,
              "the output layer's gradient");
        dn.transposed = n.transposed = 1;
        check(snip_cuda_gemm(vocab, dim, m, &dn, &n, llama_gradients(&g->d, g->d.output), dim, 1, NULL, g->stream) ==
                  SNIP_OK,
              "the output weights' gradient");
    }
}

// >>passes -----------------------------------------------------------------------------------------
static void gpu_zero_gradients(llama *host) {
    gpu *g = on_device(host);
    zero(g, g->d.grads, g->d.n_params);
}

static void block_fwd(gpu *g, const llama_block *b, float *next, int64_t rows) {  // as llama_block_fwd
    const llama_config *c = &g->d.config;
    const int64_t dim = c->dim, ffn = c->ffn;
    float *y = g->d.dn;  // what a branch adds to the stream
    norm_fwd(g, b->n1, b->rstd1, b->x, b->norm1, rows);
    linear_fwd(g, b->lin[LLAMA_Q], b->q, b->n1, rows);
    linear_fwd(g, b->lin[LLAMA_K], b->k, b->n1, rows);
    linear_fwd(g, b->lin[LLAMA_V], b->v, b->n1, rows);
    turn(g, b->q, rows, c->heads, 1.0f);
    turn(g, b->k, rows, c->kv_heads, 1.0f);
    attention_fwd(g, b, rows / c->seq);
    linear_fwd(g, b->lin[LLAMA_O], y, b->att, rows);
    add(g, b->x2, b->x, y, rows * dim);

    norm_fwd(g, b->n2, b->rstd2, b->x2, b->norm2, rows);
    linear_fwd(g, b->lin[LLAMA_GATE], b->gate, b->n2, rows);
    linear_fwd(g, b->lin[LLAMA_UP], b->up, b->n2, rows);
    launch(swiglu, blocks_of(rows * ffn), THREADS, g->stream, b->act, (const float *)b->gate, (const float *)b->up,
           rows * ffn);
    linear_fwd(g, b->lin[LLAMA_DOWN], y, b->act, rows);
    add(g, next, b->x2, y, rows * dim);
}

static snip_status gpu_forward(llama *host, snip *s, const int32_t *tokens, const int32_t *targets, int sequences,
                               float grad_scale, double *loss) {
    gpu *g = on_device(host);
    const llama *d = &g->d;
    const llama_config *c = &d->config;
    const int64_t rows = (int64_t)sequences * c->seq, dim = c->dim;
    (void)s;
    host->failed[0] = 0;
    copy(g->tokens, tokens, rows, cudaMemcpyHostToDevice);
    copy(g->targets, targets, rows, cudaMemcpyHostToDevice);
    launch(embed_rows, blocks_of(rows * dim), THREADS, g->stream, d->block[0].x, llama_weights(d, d->embed),
           (const int32_t *)g->tokens, rows, dim);
    for (int i = 0; i < c->blocks; i++) block_fwd(g, &d->block[i], i + 1 < c->blocks ? d->block[i + 1].x : d->x, rows);
    norm_fwd(g, d->n, d->rstd, d->x, d->norm, rows);
    head(g, rows, grad_scale);
    launch(sum_parts, 1, THREADS, g->stream, (const double *)d->row_loss, rows, g->sums + PARTS);
    check(cudaStreamSynchronize(g->stream) == cudaSuccess, "a forward pass");
    copy(loss, (const double *)(g->sums + PARTS), 1, cudaMemcpyDeviceToHost);
    if (llama_finite(*loss)) return SNIP_OK;
    llama_fail(host, &host->tensors[host->output], "loss");
    return SNIP_NONFINITE;
}

static void block_bwd(gpu *g, const llama_block *b, int64_t rows) {  // as llama_block_bwd
    const llama *d = &g->d;
    const llama_config *c = &d->config;
    const int64_t dim = c->dim, ffn = c->ffn;
    zero(g, d->dact, rows * ffn);
    linear_bwd(g, b->lin[LLAMA_DOWN], d->dact, d->dx, b->act, rows);
    launch(swiglu_gradient, blocks_of(rows * ffn), THREADS, g->stream, d->dgate, d->dup, (const float *)d->dact,
           (const float *)b->gate, (const float *)b->up, rows * ffn);
    zero(g, d->dn, rows * dim);
    linear_bwd(g, b->lin[LLAMA_UP], d->dn, d->dup, b->n2, rows);
    linear_bwd(g, b->lin[LLAMA_GATE], d->dn, d->dgate, b->n2, rows);
    norm_bwd(g, d->dn, b->x2, b->rstd2, b->norm2, rows);

    zero(g, d->datt, rows * dim);
    linear_bwd(g, b->lin[LLAMA_O], d->datt, d->dx, b->att, rows);
    attention_bwd(g, b, rows / c->seq);
    turn(g, d->dq, rows, c->heads, -1.0f);
    turn(g, d->dk, rows, c->kv_heads, -1.0f);
    zero(g, d->dn, rows * dim);
    linear_bwd(g, b->lin[LLAMA_V], d->dn, d->dv, b->n1, rows);
    linear_bwd(g, b->lin[LLAMA_K], d->dn, d->dk, b->n1, rows);
    linear_bwd(g, b->lin[LLAMA_Q], d->dn, d->dq, b->n1, rows);
    norm_bwd(g, d->dn, b->x, b->rstd1, b->norm1, rows);
}

static snip_status gpu_backward(llama *host, snip *s, const int32_t *tokens, int sequences) {
    gpu *g = on_device(host);
    const llama *d = &g->d;
    const llama_config *c = &d->config;
    const int64_t rows = (int64_t)sequences * c->seq, dim = c->dim;
    (void)s;
    (void)tokens;  // there since the forward pass
    zero(g, d->dx, rows * dim);
    norm_bwd(g, d->dn, d->x, d->rstd, d->norm, rows);
    for (int i = c->blocks - 1; i >= 0; i--) block_bwd(g, &d->block[i], rows);
    launch(embed_gradient, c->vocab, THREADS, g->stream, llama_gradients(d, d->embed), (const float *)d->dx,
           (const int32_t *)g->tokens, rows, dim);
    return SNIP_OK;
}

static double gpu_gradient_norm(llama *host) {
    gpu *g = on_device(host);
    double sum;
    launch(sum_squares, PARTS, THREADS, g->stream, (const float *)g->d.grads, g->d.n_params, g->sums);
    launch(sum_parts, 1, THREADS, g->stream, (const double *)g->sums, (int64_t)PARTS, g->sums + PARTS);
    check(cudaStreamSynchronize(g->stream) == cudaSuccess, "a backward pass");
    copy(&sum, (const double *)(g->sums + PARTS), 1, cudaMemcpyDeviceToHost);
    return sqrt(sum);
}

static void gpu_update(llama *host, snip_optimizer kind, const snip_adamw *o, double decay) {  // as llama_update
    gpu *g = on_device(host);
    const float b1 = (float)o->beta1, b2 = (float)o->beta2, scale = (float)o->grad_scale, rate = (float)o->lr;
    const float m_scale = (float)(1.0 / (1.0 - pow(o->beta1, (double)o->step)));
    const float v_scale = (float)(1.0 / (1.0 - pow(o->beta2, (double)o->step)));
    for (int i = 0; i < g->d.n_tensors; i++) {
        const llama_tensor *t = &g->d.tensors[i];
        const int64_t n = t->rows * t->cols;
        const float *dp = g->d.grads + t->offset, keep = llama_keep(t, o->lr, decay);
        float *p = g->d.params + t->offset, *m = g->d.m + t->offset, *v = g->d.v + t->offset;
        if (kind == SNIP_ADAMW)
            launch(adamw_update, blocks_of(n), THREADS, g->stream, p, dp, m, v, n, b1, b2, (float)o->eps, scale,
                   m_scale, v_scale, rate, keep);
        else
            launch(momentum_update, blocks_of(n), THREADS, g->stream, p, dp, m, n, (int)(kind == SNIP_LION), b1, b2,
                   scale, rate, keep);
    }
}

// >>session ----------------------------------------------------------------------------------------
static int gpu_next_pass(llama *host, snip *s, double loss) {
    gpu *g = on_device(host);
    float value = (float)loss;
    (void)s;
    copy(g->loss, (const float *)&value, 1, cudaMemcpyHostToDevice);
    return snip_cuda_next_pass(g->c, g->loss, g->stream);
}

static snip_status gpu_end_step(llama *host, snip *s, const snip_adamw *update) {
    gpu *g = on_device(host);
    (void)s;
    return snip_cuda_end_step(g->c, update, NULL, g->stream);
}

static snip_status gpu_measure_gains(llama *host, snip *s, int64_t rows) {
    gpu *g = on_device(host);
    (void)s;
    return snip_cuda_measure_gains(g->c, rows, g->stream);
}

// For a checkpoint: all that the device knows.
static snip_status gpu_save_state(llama *host, snip *s, void *state) {
    gpu *g = (gpu *)host->device;
    if (g->c) {
        snip_status status = snip_cuda_finish(g->c);
        if (status) return status;
        check(cudaStreamSynchronize(g->stream) == cudaSuccess, "a step");
        copy(host->params, (const float *)g->d.params, g->d.n_params, cudaMemcpyDeviceToHost);
        copy(host->m, (const float *)g->d.m, g->d.n_params, cudaMemcpyDeviceToHost);
        copy(host->v, (const float *)g->d.v, g->d.n_params, cudaMemcpyDeviceToHost);
    }
    return snip_state_save(s, state);
}

int main(int argc, char **argv) {
    static const trainer_backend on_gpu = { gpu_create,   gpu_destroy,       gpu_zero_gradients, gpu_forward,
                                            gpu_backward, gpu_gradient_norm, gpu_update,         gpu_next_pass,
                                            gpu_end_step, gpu_measure_gains, gpu_save_state };
    return train_main(argc, argv, &on_gpu);
}
