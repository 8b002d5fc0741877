// llama.h - a small Llama-style model with hand-written forward and backward passes, for the examples, tests and
// benchmarks of snip.h. Plain C99, float32. Include snip.h first.
//
// WHAT IT IS
//   Token embedding; blocks of RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU; final RMSNorm; output layer
//   (tied or not); cross-entropy; AdamW, SGD with momentum, Lion. There are no biases. The seven linear layers of a
//   block run through snip_linear_forward and _backward; embedding, norms, attention and the output layer are float32.
//
// IN ORDER
//     llama *g = llama_create(&config, batch, session);        registers and binds every linear layer
//     do {
//         llama_zero_grad(g);
//         llama_forward (g, session, tokens, targets, sequences, 1 / (float)tokens_in_step, &loss_sum);
//         llama_backward(g, session, tokens, sequences);
//     } while (snip_next_pass(session, loss));
//     if (!snip_step_status(session)) llama_update(g, ...);
//     snip_end_step(session, ...);
//
// DETERMINISM
//   Work is split over outputs only, and every sum has a fixed order: results are the same, bit for bit, for any number
//   of threads.
//
// SHAPES
//   rows: sequences x seq, the tokens of a call. head_dim: dim / heads. kv_dim: head_dim x kv_heads.
//
// INDEX (search for the tag)
//   >>llama-model >>llama-math >>llama-products >>llama-create >>llama-linear >>llama-norm >>llama-attention
//   >>llama-ffn >>llama-head >>llama-passes >>llama-optimizer
#ifndef LLAMA_H
#define LLAMA_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#    include <omp.h>
#    define LLAMA_PRAGMA(x) _Pragma(#    x)
#    define LLAMA_OMP(x) LLAMA_PRAGMA(omp x)
#else
#    define LLAMA_OMP(x)
#endif

// >>llama-model ------------------------------------------------------------------------------------
typedef struct {
    int vocab, dim, blocks, heads, kv_heads, ffn, seq;
    int tied;       // 1: the output layer uses the embedding's weights
    int stages;     // pipeline stages that the session balances; 0: 1
    uint64_t seed;  // of the initial weights
} llama_config;

enum { LLAMA_Q, LLAMA_K, LLAMA_V, LLAMA_O, LLAMA_GATE, LLAMA_UP, LLAMA_DOWN, LLAMA_LINEARS };

typedef struct {  // one parameter tensor
    char name[40];
    int64_t rows, cols, offset;  // offset in params, grads, m and v; vectors have rows = 1
    int matrix;                  // weight decay applies
    int layer;                   // index in the session, or -1
} llama_tensor;

typedef struct {  // a block: where its tensors are, and what its backward pass needs of the forward pass
    int norm1, norm2, lin[LLAMA_LINEARS];
    float *x, *n1;     // [rows][dim] input, and normed
    float *rstd1;      // [rows]
    float *q;          // [rows][dim]
    float *k, *v;      // [rows][kv_dim]
    float *att;        // [rows][dim]
    float *lse;        // [rows][heads] log-sum-exp of the scores
    float *x2, *n2;    // [rows][dim] after attention, and normed
    float *rstd2;      // [rows]
    float *gate, *up;  // [rows][ffn]
    float *act;        // [rows][ffn] SwiGLU of the two
} llama_block;

// snip_linear_backward, or what stands in front of it.
typedef snip_status (*llama_linear_backward)(snip *, int layer, float *dinp, float *dweight, float *dbias,
                                             const float *dout, const float *inp, const float *weight, int64_t rows);

typedef struct {
    llama_config config;
    int batch, threads;                  // most sequences per call; threads that scratch memory was made for
    int n_tensors, embed, norm, output;  // output == embed when tied
    int64_t n_params;                    // floats in params, with the padding between tensors
    llama_tensor *tensors;
    llama_block *block;
    float *params, *grads, *m, *v;
    char failed[64];                        // the layer at which a call met NaN or infinity
    llama_linear_backward linear_backward;  // snip_linear_backward; a caller may watch the layers by one of its own
    void *device;                           // the caller's, such as a copy of the model on a GPU

    void *memory;
    float *x, *n;        // [rows][dim] input of the final norm, and normed
    float *rstd;         // [rows]
    float *logits;       // [head_chunk][vocab]
    float *dx, *dn;      // [rows][dim] gradients: of the stream, of what a branch reads or adds
    float *dq, *datt;    // [rows][dim]
    float *dk, *dv;      // [rows][kv_dim]
    float *dgate, *dup;  // [rows][ffn]
    float *dact;         // [rows][ffn]
    float *rope;         // [seq][head_dim]: cosines, then sines
    float *scratch;      // [threads][scratch_stride]
    double *row_loss;    // [rows]
    double *partial;     // [n_params / 4096 + 1]
    void *gemm_scratch;
    size_t gemm_scratch_size;
    int64_t head_chunk;  // rows whose logits are made at a time
    int64_t scratch_stride;
} llama;

static inline const char *llama_config_check(const llama_config *c) {  // NULL: fine
    if (c->vocab < 2 || c->vocab > 65536) return "the vocabulary must have 2 to 65536 tokens";
    if (c->dim < 1 || c->blocks < 1 || c->heads < 1 || c->kv_heads < 1 || c->ffn < 1 || c->seq < 1)
        return "every dimension must be at least 1";
    if (c->dim > 65536 || c->ffn > 1 << 20 || c->seq > 1 << 20 || c->blocks > 1000) return "a dimension is too large";
    if (c->dim % c->heads) return "--dim must be a multiple of --heads";
    if (c->heads % c->kv_heads) return "--heads must be a multiple of --kv-heads";
    if (c->dim / c->heads % 2) return "--dim / --heads must be even (RoPE turns pairs)";
    if (c->stages < 0 || c->stages > c->blocks) return "--stages must not exceed --blocks";
    return NULL;
}

// >>llama-math -------------------------------------------------------------------------------------
static inline int llama_finite(double x) {  // by bits: holds under -Ofast, where isfinite() is folded to 1
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return (u >> 52 & 0x7ff) != 0x7ff;
}

// exp to 2 ulp between -87 and 87, its ends beyond; NaN stays NaN. Choices are made on integers, which compilers
// turn into selects (a comparison of floats may trap and keeps the branch), so that loops over it vectorize.
static inline float llama_exp(float x) {
    union {
        float f;
        uint32_t u;
    } in, t, half, e;

    in.f = x;
    uint32_t sign = in.u & 0x80000000u, a = in.u & 0x7fffffffu;
    t.u = sign | (a < 0x42ae0000u ? a : 0x42ae0000u);
    half.u = sign | 0x3f000000u;
    int32_t n = (int32_t)(t.f * 1.44269504f + half.f);
    float r = t.f - (float)n * 0.693359375f + (float)n * 2.12194440e-4f;  // t - n ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    e.u = (uint32_t)(n + 127) << 23;
    e.f *= p;
    e.u |= (0u - (uint32_t)(a > 0x7f800000u)) & 0x7fc00000u;
    return e.f;
}

// Of softmax, whose x is at most 0: 0 below -40, which is nothing beside a sum of 1 or more, but whose products would
// be subnormal and a hundred times as slow.
static inline float llama_exp_softmax(float x) {
    union {
        float f;
        uint32_t u;
    } in, e;

    in.f = x;
    e.f = llama_exp(x);
    uint32_t a = in.u & 0x7fffffffu;
    e.u &= 0u - (uint32_t)((a < 0x42200000u) | (a > 0x7f800000u));
    return e.f;
}

// Sixteen partial sums: a fixed order that vectorizes without -ffast-math.
#define LLAMA_LANES 16

static inline float llama_sum_lanes(const float *a) {
    float s[8], t[4];
    for (int i = 0; i < 8; i++) s[i] = a[i] + a[i + 8];
    for (int i = 0; i < 4; i++) t[i] = s[i] + s[i + 4];
    return (t[0] + t[2]) + (t[1] + t[3]);
}

static inline float llama_dot(const float *a, const float *b, int64_t n) {
    float acc[LLAMA_LANES] = { 0 };
    int64_t i = 0;
    for (; i + LLAMA_LANES <= n; i += LLAMA_LANES)
        for (int j = 0; j < LLAMA_LANES; j++) acc[j] += a[i + j] * b[i + j];
    for (int j = 0; j < LLAMA_LANES && i + j < n; j++) acc[j] += a[i + j] * b[i + j];
    return llama_sum_lanes(acc);
}

static inline float llama_sum(const float *a, int64_t n) {
    float acc[LLAMA_LANES] = { 0 };
    int64_t i = 0;
    for (; i + LLAMA_LANES <= n; i += LLAMA_LANES)
        for (int j = 0; j < LLAMA_LANES; j++) acc[j] += a[i + j];
    for (int j = 0; j < LLAMA_LANES && i + j < n; j++) acc[j] += a[i + j];
    return llama_sum_lanes(acc);
}

static inline float llama_max(const float *a, int64_t n) {
    float acc[LLAMA_LANES], best = a[0];
    int64_t i = 0;
    for (int j = 0; j < LLAMA_LANES; j++) acc[j] = best;
    for (; i + LLAMA_LANES <= n; i += LLAMA_LANES)
        for (int j = 0; j < LLAMA_LANES; j++) acc[j] = a[i + j] > acc[j] ? a[i + j] : acc[j];
    for (; i < n; i++) best = a[i] > best ? a[i] : best;
    for (int j = 0; j < LLAMA_LANES; j++) best = acc[j] > best ? acc[j] : best;
    return best;
}

// >>llama-products ---------------------------------------------------------------------------------
// C[m][n] = or += A[m][k] B[k][n], for attention's small matrices inside one thread. A is reached by strides (ra, ca),
// so it may be a transposed view. A tile of some rows x 2 vectors of C stays in registers while k runs; the vector type
// is GCC's and clang's, because -O2 alone does not get there from arrays.
#define LLAMA_ROWS_4(x) x(0) x(1) x(2) x(3)
#define LLAMA_ROWS_8(x) LLAMA_ROWS_4(x) x(4) x(5) x(6) x(7)
#ifdef __AVX512F__
#    define LLAMA_MR 8
#    define LLAMA_ROWS LLAMA_ROWS_8
#else
#    define LLAMA_MR 4
#    define LLAMA_ROWS LLAMA_ROWS_4
#endif
#define LLAMA_CLEAR(y) vec p##y = { 0 }, q##y = { 0 };
#define LLAMA_STEP(y)       \
    p##y += a[y * ra] * b0; \
    q##y += a[y * ra] * b1;
#define LLAMA_STORE(y)                   \
    {                                    \
        vec *row = (vec *)(c + y * ldc); \
        if (accumulate) {                \
            row[0] += p##y;              \
            row[1] += q##y;              \
        } else {                         \
            row[0] = p##y;               \
            row[1] = q##y;               \
        }                                \
    }
#define LLAMA_TILE(width)                                                                                  \
    static inline void llama_mm_##width(int64_t k, const float *a, int64_t ra, int64_t ca, const float *b, \
                                        int64_t ldb, float *c, int64_t ldc, int accumulate) {              \
        typedef float vec __attribute__((vector_size(4 * width), aligned(4), may_alias));                  \
        LLAMA_ROWS(LLAMA_CLEAR)                                                                            \
        for (int64_t p = 0; p < k; p++, b += ldb, a += ca) {                                               \
            vec b0 = *(const vec *)b, b1 = *(const vec *)(b + width);                                      \
            LLAMA_ROWS(LLAMA_STEP)                                                                         \
        }                                                                                                  \
        LLAMA_ROWS(LLAMA_STORE)                                                                            \
    }
#ifdef __GNUC__
LLAMA_TILE(4)
#    ifdef __AVX2__
LLAMA_TILE(8)
#    endif
#    ifdef __AVX512F__
LLAMA_TILE(16)
#    endif
#endif
// The same for m x n elements at most LLAMA_MR x 8, which a tile does not fill.
static inline void llama_mm_edge(int64_t m, int64_t n, int64_t k, const float *a, int64_t ra, int64_t ca,
                                 const float *b, int64_t ldb, float *c, int64_t ldc, int accumulate) {
    float acc[LLAMA_MR][32] = { { 0 } };
    for (int64_t p = 0; p < k; p++)
        for (int64_t y = 0; y < m; y++)
            for (int64_t x = 0; x < n; x++) acc[y][x] += a[y * ra + p * ca] * b[p * ldb + x];
    for (int64_t y = 0; y < m; y++) {
        float *row = c + y * ldc;
        for (int64_t x = 0; x < n; x++) row[x] = accumulate ? row[x] + acc[y][x] : acc[y][x];
    }
}

typedef void (*llama_tile)(int64_t k, const float *a, int64_t ra, int64_t ca, const float *b, int64_t ldb, float *c,
                           int64_t ldc, int accumulate);

// The widest tile that fits into n columns, and how many it takes; NULL: none fits, or there are none.
static inline llama_tile llama_tile_for(int64_t n, int64_t *width) {
    *width = n < 8 ? n : 8;
#ifdef __GNUC__
#    ifdef __AVX512F__
    if (n >= 32) {
        *width = 32;
        return llama_mm_16;
    }
#    endif
#    ifdef __AVX2__
    if (n >= 16) {
        *width = 16;
        return llama_mm_8;
    }
#    endif
    if (n >= 8) return llama_mm_4;
#endif
    return NULL;
}

static inline void llama_mm(int64_t m, int64_t n, int64_t k, const float *a, int64_t ra, int64_t ca, const float *b,
                            int64_t ldb, float *c, int64_t ldc, int accumulate) {
    for (int64_t j = 0, width; j < n; j += width) {
        llama_tile tile = llama_tile_for(n - j, &width);
        for (int64_t i = 0; i < m; i += LLAMA_MR) {
            int64_t rows = m - i < LLAMA_MR ? m - i : LLAMA_MR;
            if (tile && rows == LLAMA_MR)
                tile(k, a + i * ra, ra, ca, b + j, ldb, c + i * ldc + j, ldc, accumulate);
            else
                llama_mm_edge(rows, width, k, a + i * ra, ra, ca, b + j, ldb, c + i * ldc + j, ldc, accumulate);
        }
    }
}

// >>llama-create -----------------------------------------------------------------------------------
static inline int llama_add_tensor(llama *g, const char *name, int64_t rows, int64_t cols, int matrix) {
    llama_tensor *t = &g->tensors[g->n_tensors];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rows = rows;
    t->cols = cols;
    t->offset = g->n_params;
    t->matrix = matrix;
    t->layer = -1;
    g->n_params += (rows * cols + 15) / 16 * 16;  // every tensor starts on a cache line
    return g->n_tensors++;
}

// Hands out memory; with base NULL it only counts.
static inline float *llama_take(unsigned char *base, size_t *used, int64_t floats) {
    float *p = base ? (float *)(void *)(base + *used) : NULL;
    *used += ((size_t)floats * sizeof(float) + 63) / 64 * 64;
    return p;
}

// Lays the tensors and the scratch memory out from base on, or with base NULL only counts their bytes.
static inline size_t llama_layout(llama *g, unsigned char *base) {
    const llama_config *c = &g->config;
    int64_t rows = (int64_t)g->batch * c->seq, dim = c->dim, ffn = c->ffn, head_dim = dim / c->heads;
    int64_t kv_dim = head_dim * c->kv_heads;
    size_t used = 0;
#define LLAMA_TAKE(p, n) (p) = llama_take(base, &used, (n))
    LLAMA_TAKE(g->params, g->n_params);
    LLAMA_TAKE(g->grads, g->n_params);
    LLAMA_TAKE(g->m, g->n_params);
    LLAMA_TAKE(g->v, g->n_params);
    for (int i = 0; i < c->blocks; i++) {
        llama_block *b = &g->block[i];
        LLAMA_TAKE(b->x, rows * dim);
        LLAMA_TAKE(b->n1, rows * dim);
        LLAMA_TAKE(b->rstd1, rows);
        LLAMA_TAKE(b->q, rows * dim);
        LLAMA_TAKE(b->k, rows * kv_dim);
        LLAMA_TAKE(b->v, rows * kv_dim);
        LLAMA_TAKE(b->att, rows * dim);
        LLAMA_TAKE(b->lse, rows * c->heads);
        LLAMA_TAKE(b->x2, rows * dim);
        LLAMA_TAKE(b->n2, rows * dim);
        LLAMA_TAKE(b->rstd2, rows);
        LLAMA_TAKE(b->gate, rows * ffn);
        LLAMA_TAKE(b->up, rows * ffn);
        LLAMA_TAKE(b->act, rows * ffn);
    }
    LLAMA_TAKE(g->x, rows * dim);
    LLAMA_TAKE(g->n, rows * dim);
    LLAMA_TAKE(g->rstd, rows);
    LLAMA_TAKE(g->dx, rows * dim);
    LLAMA_TAKE(g->dn, rows * dim);
    LLAMA_TAKE(g->dq, rows * dim);
    LLAMA_TAKE(g->datt, rows * dim);
    LLAMA_TAKE(g->dk, rows * kv_dim);
    LLAMA_TAKE(g->dv, rows * kv_dim);
    LLAMA_TAKE(g->dgate, rows * ffn);
    LLAMA_TAKE(g->dup, rows * ffn);
    LLAMA_TAKE(g->dact, rows * ffn);
    LLAMA_TAKE(g->logits, g->head_chunk * c->vocab);
    LLAMA_TAKE(g->rope, c->seq * head_dim);
    LLAMA_TAKE(g->scratch, g->scratch_stride * g->threads);
#undef LLAMA_TAKE
    g->row_loss = (double *)(void *)llama_take(base, &used, 2 * rows);
    g->partial = (double *)(void *)llama_take(base, &used, 2 * (g->n_params / 4096 + 1));
    g->gemm_scratch = llama_take(base, &used, (int64_t)(g->gemm_scratch_size / 4 + 1));
    return used;
}

static inline void llama_destroy(llama *g) {
    if (!g) return;
    free(g->memory);
    free(g->tensors);
    free(g->block);
    free(g);
}

// Weights from N(0, 0.02^2), those that write to the residual stream scaled by 1 / sqrt(2 blocks), norms 1.
static inline void llama_init(llama *g) {
    const double tau = 6.283185307179586;
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        float *p = g->params + t->offset;
        int64_t n = t->rows * t->cols;
        int residual = strstr(t->name, ".attn.o.") || strstr(t->name, ".mlp.down.");
        double deviation = residual ? 0.02 / sqrt(2.0 * g->config.blocks) : 0.02;
        snip_rng_key key = { g->config.seed, 0xffffffffu, (uint32_t)i };
        if (!t->matrix) {
            for (int64_t j = 0; j < n; j++) p[j] = 1.0f;
            continue;
        }
        LLAMA_OMP(parallel for schedule(static))
        for (int64_t j = 0; j < n; j += 2) {  // Box-Muller: two at a time
            uint32_t random[4];
            snip_philox(key, (uint64_t)j, random);
            double radius = deviation * sqrt(-2.0 * log((random[0] + 0.5) / 4294967296.0));
            double angle = tau * random[1] / 4294967296.0;
            p[j] = (float)(radius * cos(angle));
            if (j + 1 < n) p[j + 1] = (float)(radius * sin(angle));
        }
    }
}

static const char *const llama_kind[LLAMA_LINEARS] = { "attn.q",   "attn.k", "attn.v",  "attn.o",
                                                       "mlp.gate", "mlp.up", "mlp.down" };

static inline void llama_add_tensors(llama *g) {
    const llama_config *c = &g->config;
    int64_t dim = c->dim, kv_dim = dim / c->heads * c->kv_heads;
    const int64_t out[LLAMA_LINEARS] = { dim, kv_dim, kv_dim, dim, c->ffn, c->ffn, dim };
    char name[40];
    g->embed = llama_add_tensor(g, "embed.weight", c->vocab, dim, 1);
    for (int i = 0; i < c->blocks; i++) {
        llama_block *b = &g->block[i];
        for (int j = 0; j < LLAMA_LINEARS; j++) {
            if (j == LLAMA_Q || j == LLAMA_GATE) {
                snprintf(name, sizeof name, "blocks.%d.norm%d.weight", i, j == LLAMA_Q ? 1 : 2);
                *(j == LLAMA_Q ? &b->norm1 : &b->norm2) = llama_add_tensor(g, name, 1, dim, 0);
            }
            snprintf(name, sizeof name, "blocks.%d.%s.weight", i, llama_kind[j]);
            b->lin[j] = llama_add_tensor(g, name, out[j], j == LLAMA_DOWN ? c->ffn : dim, 1);
        }
    }
    g->norm = llama_add_tensor(g, "norm.weight", 1, dim, 0);
    g->output = c->tied ? g->embed : llama_add_tensor(g, "output.weight", c->vocab, dim, 1);
}

// 0: out of memory.
static inline int llama_allocate(llama *g) {
    const llama_config *c = &g->config;
    int64_t rows = (int64_t)g->batch * c->seq, head_dim = c->dim / c->heads;
    g->threads = 1;
#ifdef _OPENMP
    g->threads = omp_get_max_threads();
#endif
    int64_t chunk = (1 << 23) / c->vocab;  // logits in pieces of at most 32 MB
    g->head_chunk = chunk < rows ? chunk : rows;
    const size_t scratch[3] = { snip_gemm_scratch(g->head_chunk, c->vocab, c->dim),
                                snip_gemm_scratch(g->head_chunk, c->dim, c->vocab),
                                snip_gemm_scratch(c->vocab, c->dim, g->head_chunk) };
    for (int i = 0; i < 3; i++)
        if (scratch[i] > g->gemm_scratch_size) g->gemm_scratch_size = scratch[i];
    g->scratch_stride = ((4 * head_dim + 64) * (((int64_t)c->seq + 31) / 32) + 3 * head_dim) * 32 + 64;
    g->memory = calloc(llama_layout(g, NULL) + 64, 1);
    if (!g->memory) return 0;
    llama_layout(g, (unsigned char *)g->memory + (64 - (uintptr_t)g->memory % 64));
    return 1;
}

static inline void llama_fill_rope(llama *g) {
    int64_t head_dim = g->config.dim / g->config.heads;
    for (int64_t t = 0; t < g->config.seq; t++)
        for (int64_t i = 0; i < head_dim / 2; i++) {
            double angle = (double)t * pow(10000.0, -2.0 * (double)i / (double)head_dim);
            g->rope[t * head_dim + i] = (float)cos(angle);
            g->rope[t * head_dim + head_dim / 2 + i] = (float)sin(angle);
        }
}

// Registers the linear layers in session order "0.attn.q", "0.attn.k", ... and binds their moments. 0: refused.
static inline int llama_register(llama *g, snip *session) {
    const llama_config *c = &g->config;
    char name[40];
    for (int i = 0; i < c->blocks; i++)
        for (int j = 0; j < LLAMA_LINEARS; j++) {
            llama_tensor *t = &g->tensors[g->block[i].lin[j]];
            int stage = c->stages > 1 ? (int)((int64_t)i * c->stages / c->blocks) : 0;
            snprintf(name, sizeof name, "%d.%s", i, llama_kind[j]);
            t->layer = snip_add_linear(session, name, t->rows, t->cols, stage);
            if (t->layer < 0 || (snip_bind_adamw(session, t->layer, g->m + t->offset, g->v + t->offset) &&
                                 snip_bind_momentum(session, t->layer, g->m + t->offset)))
                return 0;
        }
    return 1;
}

// NULL: out of memory, or the configuration is refused.
static inline llama *llama_create(const llama_config *config, int batch, snip *session) {
    if (llama_config_check(config) || batch < 1 || batch > 1 << 20) return NULL;
    llama *g = (llama *)calloc(1, sizeof *g);
    if (!g) return NULL;
    g->config = *config;
    g->batch = batch;
    g->linear_backward = snip_linear_backward;
    g->tensors = (llama_tensor *)calloc((size_t)config->blocks * 9 + 3, sizeof *g->tensors);
    g->block = (llama_block *)calloc((size_t)config->blocks, sizeof *g->block);
    if (g->tensors && g->block) {
        llama_add_tensors(g);
        if (llama_allocate(g)) {
            llama_fill_rope(g);
            llama_init(g);
            if (llama_register(g, session)) return g;
        }
    }
    llama_destroy(g);
    return NULL;
}

// >>llama-linear -----------------------------------------------------------------------------------
static inline void llama_fail(llama *g, const llama_tensor *t, const char *where) {
    if (g->failed[0]) return;
    const char *name = strncmp(t->name, "blocks.", 7) ? t->name : t->name + 7;  // "0.attn.q", as the session calls it
    size_t length = strlen(name), tail = strlen(".weight");
    snprintf(g->failed, sizeof g->failed, "%.*s (%s)", (int)(length > tail ? length - tail : length), name, where);
}

static inline snip_status llama_linear_fwd(llama *g, snip *s, int tensor, float *out, const float *inp, int64_t rows) {
    const llama_tensor *t = &g->tensors[tensor];
    snip_status status = snip_linear_forward(s, t->layer, out, inp, g->params + t->offset, NULL, rows);
    if (status) llama_fail(g, t, "forward");
    return status;
}

static inline snip_status llama_linear_bwd(llama *g, snip *s, int tensor, float *dinp, const float *dout,
                                           const float *inp, int64_t rows) {
    const llama_tensor *t = &g->tensors[tensor];
    snip_status status = g->linear_backward(s, t->layer, dinp, g->grads + t->offset, NULL, dout, inp,
                                            g->params + t->offset, rows);
    if (status) llama_fail(g, t, "backward");
    return status;
}

// >>llama-norm -------------------------------------------------------------------------------------
static inline void llama_rmsnorm_fwd(float *out, float *rstd, const float *x, const float *w, int64_t rows,
                                     int64_t dim) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * dim;
        float s = 1.0f / sqrtf(llama_dot(row, row, dim) / (float)dim + 1e-5f);
        rstd[r] = s;
        for (int64_t i = 0; i < dim; i++) out[r * dim + i] = row[i] * s * w[i];
    }
}

// dx += the gradient through the norm; dw accumulates.
static inline void llama_rmsnorm_bwd(float *dx, float *dw, const float *dout, const float *x, const float *w,
                                     const float *rstd, int64_t rows, int64_t dim) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * dim, *dy = dout + r * dim;
        float acc[LLAMA_LANES] = { 0 }, s = rstd[r];
        int64_t i = 0;
        for (; i + LLAMA_LANES <= dim; i += LLAMA_LANES)
            for (int j = 0; j < LLAMA_LANES; j++) acc[j] += dy[i + j] * w[i + j] * row[i + j];
        for (int j = 0; j < LLAMA_LANES && i + j < dim; j++) acc[j] += dy[i + j] * w[i + j] * row[i + j];
        float mean = llama_sum_lanes(acc) * s * s * s / (float)dim;
        for (i = 0; i < dim; i++) dx[r * dim + i] += dy[i] * w[i] * s - row[i] * mean;
    }
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t c = 0; c < dim; c += 64) {  // columns in parallel, rows in order
        int64_t n = dim - c < 64 ? dim - c : 64;
        float acc[64] = { 0 };
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < n; i++) acc[i] += dout[r * dim + c + i] * x[r * dim + c + i] * rstd[r];
        for (int64_t i = 0; i < n; i++) dw[c + i] += acc[i];
    }
}

// >>llama-attention --------------------------------------------------------------------------------
// Turns the pairs (i, i + head_dim / 2) of every head by the position's angle, in place; sign -1 turns back.
static inline void llama_rope(const llama *g, float *x, int64_t rows, int64_t heads, float sign) {
    int64_t head_dim = g->config.dim / g->config.heads, half = head_dim / 2;
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++) {
        const float *cosine = g->rope + r % g->config.seq * head_dim, *sine = cosine + half;
        for (int64_t h = 0; h < heads; h++) {
            float *a = x + (r * heads + h) * head_dim, *b = a + half;
            for (int64_t i = 0; i < half; i++) {
                float u = a[i], v = b[i], s = sign * sine[i];
                a[i] = u * cosine[i] - v * s;
                b[i] = u * s + v * cosine[i];
            }
        }
    }
}

static inline float *llama_thread_scratch(const llama *g) {
#ifdef _OPENMP
    return g->scratch + omp_get_thread_num() * g->scratch_stride;
#else
    return g->scratch;
#endif
}

// Both passes take one (sequence, key-value head) at a time and 32 query rows within it, so that scores never take more
// than 32 x seq floats; the backward pass rebuilds them from the rows' log-sum-exp. Scores are kept as (key, query):
// what is done for each query is done for 32 of them side by side. Heads are copied together first, in whole blocks of
// 32 rows, zeros beyond the sequence: rows far apart share few cache sets.
#define LLAMA_QROWS 32

typedef struct {
    int64_t seq, padded;  // positions, and in whole blocks
    int64_t heads, kv_heads, dim, kv_dim, head_dim;
    float scale;  // 1 / sqrt(head_dim)
} llama_shape;

static inline llama_shape llama_shape_of(const llama_config *c) {
    llama_shape t;
    t.seq = c->seq;
    t.padded = (t.seq + LLAMA_QROWS - 1) / LLAMA_QROWS * LLAMA_QROWS;
    t.heads = c->heads;
    t.kv_heads = c->kv_heads;
    t.dim = c->dim;
    t.head_dim = t.dim / t.heads;
    t.kv_dim = t.head_dim * t.kv_heads;
    t.scale = 1.0f / sqrtf((float)t.head_dim);
    return t;
}

static inline void llama_take_rows(float *out, const float *x, int64_t ldx, int64_t rows, int64_t padded,
                                   int64_t head_dim) {
    for (int64_t t = 0; t < rows; t++) memcpy(out + t * head_dim, x + t * ldx, (size_t)head_dim * sizeof(float));
    memset(out + rows * head_dim, 0, (size_t)((padded - rows) * head_dim) * sizeof(float));
}

static inline void llama_give_rows(float *out, int64_t ldo, const float *x, int64_t rows, int64_t head_dim) {
    for (int64_t t = 0; t < rows; t++) memcpy(out + t * ldo, x + t * head_dim, (size_t)head_dim * sizeof(float));
}

static inline void llama_transpose_rows(float *out, const float *x, int64_t head_dim) {  // [32][head_dim] turned
    for (int64_t i = 0; i < head_dim; i++)
        for (int64_t t = 0; t < LLAMA_QROWS; t++) out[i * LLAMA_QROWS + t] = x[t * head_dim + i];
}

// Scores [n][32] of the keys that a query may not see: those of the last 32 rows above the diagonal.
static inline void llama_mask(float *s, int64_t n, float value) {
    for (int64_t j = 1; j < LLAMA_QROWS; j++)
        for (int64_t i = 0; i < j; i++) s[(n - LLAMA_QROWS + j) * LLAMA_QROWS + i] = value;
}

// Scores [n][32] become e^((score - top) scale), top the largest of a query and total their sum.
static inline void llama_softmax(float *s, int64_t n, float scale, float top[LLAMA_QROWS], float total[LLAMA_QROWS]) {
    llama_mask(s, n, -1e30f);
    memcpy(top, s, LLAMA_QROWS * sizeof *top);
    for (int64_t j = 1; j < n; j++)
        for (int64_t i = 0; i < LLAMA_QROWS; i++)
            top[i] = s[j * LLAMA_QROWS + i] > top[i] ? s[j * LLAMA_QROWS + i] : top[i];
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < LLAMA_QROWS; i++)
            s[j * LLAMA_QROWS + i] = llama_exp_softmax((s[j * LLAMA_QROWS + i] - top[i]) * scale);
    llama_mask(s, n, 0.0f);
    for (int64_t i = 0; i < LLAMA_QROWS; i++) total[i] = 0;
    for (int64_t j0 = 0; j0 < n; j0 += LLAMA_QROWS) {  // shorter sums are closer ones
        float part[LLAMA_QROWS] = { 0 };
        for (int64_t j = j0; j < j0 + LLAMA_QROWS; j++)
            for (int64_t i = 0; i < LLAMA_QROWS; i++) part[i] += s[j * LLAMA_QROWS + i];
        for (int64_t i = 0; i < LLAMA_QROWS; i++) total[i] += part[i];
    }
}

static inline void llama_attention_fwd(const llama *g, const llama_block *b, int64_t sequences) {
    const llama_shape t = llama_shape_of(&g->config);
    const int64_t head_dim = t.head_dim, group = t.heads / t.kv_heads;
    LLAMA_OMP(parallel for schedule(static) num_threads(g->threads))
    for (int64_t task = 0; task < sequences * t.kv_heads; task++) {
        int64_t first = task / t.kv_heads * t.seq, kv_head = task % t.kv_heads;
        int64_t at_kv = first * t.kv_dim + kv_head * head_dim;
        float *k = llama_thread_scratch(g), *v = k + t.padded * head_dim;             // [padded][head_dim]
        float *s = v + t.padded * head_dim;                                           // [padded][32]
        float *q = s + t.padded * LLAMA_QROWS, *turned = q + LLAMA_QROWS * head_dim;  // [32][head_dim]
        llama_take_rows(k, b->k + at_kv, t.kv_dim, t.seq, t.padded, head_dim);
        llama_take_rows(v, b->v + at_kv, t.kv_dim, t.seq, t.padded, head_dim);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
            for (int64_t i0 = 0; i0 < t.seq; i0 += LLAMA_QROWS) {
                int64_t m = t.seq - i0 < LLAMA_QROWS ? t.seq - i0 : LLAMA_QROWS, n = i0 + LLAMA_QROWS;
                int64_t at = (first + i0) * t.dim + h * head_dim;
                float top[LLAMA_QROWS], total[LLAMA_QROWS];
                llama_take_rows(q, b->q + at, t.dim, m, LLAMA_QROWS, head_dim);
                llama_transpose_rows(turned, q, head_dim);
                llama_mm(n, LLAMA_QROWS, head_dim, k, head_dim, 1, turned, LLAMA_QROWS, s, LLAMA_QROWS, 0);
                llama_softmax(s, n, t.scale, top, total);
                llama_mm(LLAMA_QROWS, head_dim, n, s, 1, LLAMA_QROWS, v, head_dim, q, head_dim, 0);
                for (int64_t i = 0; i < m; i++) {
                    float inverse = 1.0f / total[i];
                    for (int64_t j = 0; j < head_dim; j++) q[i * head_dim + j] *= inverse;
                    b->lse[(first + i0 + i) * t.heads + h] = top[i] * t.scale + logf(total[i]);
                }
                llama_give_rows(b->att + at, t.dim, q, m, head_dim);
            }
    }
}

// Scores p [n][32] become probabilities, and ds, the gradients of these, the gradients of the scores. along: the sum of
// dout times out of a query.
static inline void llama_softmax_bwd(float *p, float *ds, int64_t n, float scale, const float lse[LLAMA_QROWS],
                                     const float along[LLAMA_QROWS]) {
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < LLAMA_QROWS; i++) {
            float probability = llama_exp_softmax(p[j * LLAMA_QROWS + i] * scale - lse[i]);
            p[j * LLAMA_QROWS + i] = probability;
            ds[j * LLAMA_QROWS + i] = probability * (ds[j * LLAMA_QROWS + i] - along[i]) * scale;
        }
    llama_mask(p, n, 0.0f);
    llama_mask(ds, n, 0.0f);
}

static inline void llama_attention_bwd(llama *g, const llama_block *b, int64_t sequences) {
    const llama_shape t = llama_shape_of(&g->config);
    const int64_t head_dim = t.head_dim, group = t.heads / t.kv_heads, Q = LLAMA_QROWS;
    LLAMA_OMP(parallel for schedule(static) num_threads(g->threads))
    for (int64_t task = 0; task < sequences * t.kv_heads; task++) {
        int64_t first = task / t.kv_heads * t.seq, kv_head = task % t.kv_heads;
        int64_t at_kv = first * t.kv_dim + kv_head * head_dim, kv_size = t.padded * head_dim;
        float *k = llama_thread_scratch(g), *v = k + kv_size;    // [padded][head_dim]
        float *dk = v + kv_size, *dv = dk + kv_size;             // [padded][head_dim]
        float *p = dv + kv_size, *ds = p + t.padded * Q;         // [padded][32]
        float *q = ds + t.padded * Q, *dout = q + Q * head_dim;  // [32][head_dim]
        float *turned = dout + Q * head_dim;                     // [head_dim][32]
        llama_take_rows(k, b->k + at_kv, t.kv_dim, t.seq, t.padded, head_dim);
        llama_take_rows(v, b->v + at_kv, t.kv_dim, t.seq, t.padded, head_dim);
        memset(dk, 0, (size_t)(2 * kv_size) * sizeof(float));
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
            for (int64_t i0 = 0; i0 < t.seq; i0 += Q) {
                int64_t m = t.seq - i0 < Q ? t.seq - i0 : Q, n = i0 + Q, at = (first + i0) * t.dim + h * head_dim;
                float lse[LLAMA_QROWS] = { 0 }, along[LLAMA_QROWS] = { 0 };
                llama_take_rows(q, b->q + at, t.dim, m, Q, head_dim);
                llama_transpose_rows(turned, q, head_dim);
                llama_mm(n, Q, head_dim, k, head_dim, 1, turned, Q, p, Q, 0);
                llama_take_rows(dout, g->datt + at, t.dim, m, Q, head_dim);
                llama_transpose_rows(turned, dout, head_dim);
                llama_mm(n, Q, head_dim, v, head_dim, 1, turned, Q, ds, Q, 0);
                for (int64_t i = 0; i < m; i++) {
                    lse[i] = b->lse[(first + i0 + i) * t.heads + h];
                    along[i] = llama_dot(dout + i * head_dim, b->att + at + i * t.dim, head_dim);
                }
                llama_softmax_bwd(p, ds, n, t.scale, lse, along);
                llama_mm(n, head_dim, Q, ds, Q, 1, q, head_dim, dk, head_dim, 1);
                llama_mm(n, head_dim, Q, p, Q, 1, dout, head_dim, dv, head_dim, 1);
                llama_mm(Q, head_dim, n, ds, 1, Q, k, head_dim, q, head_dim, 0);
                llama_give_rows(g->dq + at, t.dim, q, m, head_dim);
            }
        llama_give_rows(g->dk + at_kv, t.kv_dim, dk, t.seq, head_dim);
        llama_give_rows(g->dv + at_kv, t.kv_dim, dv, t.seq, head_dim);
    }
}

// >>llama-ffn --------------------------------------------------------------------------------------
static inline void llama_swiglu_fwd(float *act, const float *gate, const float *up, int64_t rows, int64_t ffn) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * ffn; i < (r + 1) * ffn; i++) act[i] = gate[i] / (1.0f + llama_exp(-gate[i])) * up[i];
}

static inline void llama_swiglu_bwd(float *dgate, float *dup, const float *dact, const float *gate, const float *up,
                                    int64_t rows, int64_t ffn) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * ffn; i < (r + 1) * ffn; i++) {
            float s = 1.0f / (1.0f + llama_exp(-gate[i])), x = gate[i];
            dup[i] = dact[i] * x * s;
            dgate[i] = dact[i] * up[i] * s * (1.0f + x * (1.0f - s));
        }
}

static inline void llama_add(float *out, const float *a, const float *b, int64_t rows, int64_t dim) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * dim; i < (r + 1) * dim; i++) out[i] = a[i] + b[i];
}

// >>llama-head -------------------------------------------------------------------------------------
static inline snip_operand llama_operand(const float *x, int64_t ld, int transposed) {
    static const snip_recipe f32 = SNIP_RECIPE_F32;
    snip_operand o;
    memset(&o, 0, sizeof o);
    o.recipe = &f32;
    o.codes = x;
    o.ld = ld;
    o.transposed = transposed;
    return o;
}

// A row's loss; with grad_scale != 0 its logits become the gradient of grad_scale times that loss.
static inline double llama_cross_entropy(float *row, int64_t vocab, int32_t target, float grad_scale) {
    float top = llama_max(row, vocab), at_target = row[target];
    for (int64_t j = 0; j < vocab; j++) row[j] = llama_exp_softmax(row[j] - top);
    float total = llama_sum(row, vocab), factor = grad_scale / total;
    double loss = log((double)total) + (double)top - (double)at_target;
    if (grad_scale == 0.0f) return loss;
    for (int64_t j = 0; j < vocab; j++) row[j] *= factor;
    row[target] -= grad_scale;
    return loss;
}

// Output layer and cross-entropy, in pieces of head_chunk rows: *loss gets the sum over the rows. With grad_scale != 0
// the gradient of grad_scale * sum is taken at once: into g->dn, and into the output weights'.
static inline snip_status llama_head(llama *g, const int32_t *targets, int64_t rows, float grad_scale, double *loss) {
    int64_t vocab = g->config.vocab, dim = g->config.dim;
    const llama_tensor *t = &g->tensors[g->output];
    const float *w = g->params + t->offset;
    for (int64_t r0 = 0; r0 < rows; r0 += g->head_chunk) {
        int64_t m = rows - r0 < g->head_chunk ? rows - r0 : g->head_chunk;
        snip_operand n = llama_operand(g->n + r0 * dim, dim, 0), dn = llama_operand(g->logits, vocab, 0);
        snip_operand w_out = llama_operand(w, dim, 0), w_in = llama_operand(w, dim, 1);
        snip_status status = snip_gemm(m, vocab, dim, &n, &w_out, g->logits, vocab, 0, NULL, g->gemm_scratch,
                                       SNIP_ISA_BEST);
        if (status) return status;
        LLAMA_OMP(parallel for schedule(static))
        for (int64_t r = 0; r < m; r++)
            g->row_loss[r0 + r] = llama_cross_entropy(g->logits + r * vocab, vocab, targets[r0 + r], grad_scale);
        if (grad_scale == 0.0f) continue;
        status = snip_gemm(m, dim, vocab, &dn, &w_in, g->dn + r0 * dim, dim, 0, NULL, g->gemm_scratch, SNIP_ISA_BEST);
        if (status) return status;
        dn.transposed = n.transposed = 1;
        status = snip_gemm(vocab, dim, m, &dn, &n, g->grads + t->offset, dim, 1, NULL, g->gemm_scratch, SNIP_ISA_BEST);
        if (status) return status;
    }
    double sum = 0;
    for (int64_t r = 0; r < rows; r++) sum += g->row_loss[r];
    *loss = sum;
    if (llama_finite(sum)) return SNIP_OK;
    llama_fail(g, t, "loss");
    return SNIP_NONFINITE;
}

// >>llama-passes -----------------------------------------------------------------------------------
static inline void llama_zero(float *x, int64_t n) { memset(x, 0, (size_t)n * sizeof *x); }

static inline void llama_zero_grad(llama *g) { llama_zero(g->grads, g->n_params); }

static inline const float *llama_weights(const llama *g, int tensor) { return g->params + g->tensors[tensor].offset; }

static inline float *llama_gradients(const llama *g, int tensor) { return g->grads + g->tensors[tensor].offset; }

// From b->x to next, the next block's x.
static inline snip_status llama_block_fwd(llama *g, snip *s, llama_block *b, float *next, int64_t rows) {
    const llama_config *c = &g->config;
    const int *lin = b->lin;
    float *y = g->dn;  // what a branch adds to the stream
    snip_status status;
    llama_rmsnorm_fwd(b->n1, b->rstd1, b->x, llama_weights(g, b->norm1), rows, c->dim);
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_Q], b->q, b->n1, rows)) != SNIP_OK) return status;
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_K], b->k, b->n1, rows)) != SNIP_OK) return status;
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_V], b->v, b->n1, rows)) != SNIP_OK) return status;
    llama_rope(g, b->q, rows, c->heads, 1.0f);
    llama_rope(g, b->k, rows, c->kv_heads, 1.0f);
    llama_attention_fwd(g, b, rows / c->seq);
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_O], y, b->att, rows)) != SNIP_OK) return status;
    llama_add(b->x2, b->x, y, rows, c->dim);

    llama_rmsnorm_fwd(b->n2, b->rstd2, b->x2, llama_weights(g, b->norm2), rows, c->dim);
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_GATE], b->gate, b->n2, rows)) != SNIP_OK) return status;
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_UP], b->up, b->n2, rows)) != SNIP_OK) return status;
    llama_swiglu_fwd(b->act, b->gate, b->up, rows, c->ffn);
    if ((status = llama_linear_fwd(g, s, lin[LLAMA_DOWN], y, b->act, rows)) != SNIP_OK) return status;
    llama_add(next, b->x2, y, rows, c->dim);
    return SNIP_OK;
}

// tokens, targets: [sequences][seq]. *loss: the sum over all tokens. grad_scale 0: validation, no backward pass may
// follow. Stops at the first layer that meets NaN or infinity and names it in g->failed.
static inline snip_status llama_forward(llama *g, snip *s, const int32_t *tokens, const int32_t *targets, int sequences,
                                        float grad_scale, double *loss) {
    const llama_config *c = &g->config;
    int64_t rows = (int64_t)sequences * c->seq, dim = c->dim;
    const float *embed = llama_weights(g, g->embed);
    float *x = g->block[0].x;
    g->failed[0] = 0;
    if (sequences < 1 || sequences > g->batch) return SNIP_BAD_ARGUMENT;
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < rows; r++) memcpy(x + r * dim, embed + tokens[r] * dim, (size_t)dim * sizeof(float));
    for (int i = 0; i < c->blocks; i++) {
        float *next = i + 1 < c->blocks ? g->block[i + 1].x : g->x;
        snip_status status = llama_block_fwd(g, s, &g->block[i], next, rows);
        if (status) return status;
    }
    llama_rmsnorm_fwd(g->n, g->rstd, g->x, llama_weights(g, g->norm), rows, dim);
    return llama_head(g, targets, rows, grad_scale, loss);
}

// g->dx, the gradient of the block's output, becomes that of its input.
static inline snip_status llama_block_bwd(llama *g, snip *s, llama_block *b, int64_t rows) {
    const llama_config *c = &g->config;
    const int *lin = b->lin;
    snip_status status;
    llama_zero(g->dact, rows * c->ffn);
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_DOWN], g->dact, g->dx, b->act, rows)) != SNIP_OK) return status;
    llama_swiglu_bwd(g->dgate, g->dup, g->dact, b->gate, b->up, rows, c->ffn);
    llama_zero(g->dn, rows * c->dim);
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_UP], g->dn, g->dup, b->n2, rows)) != SNIP_OK) return status;
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_GATE], g->dn, g->dgate, b->n2, rows)) != SNIP_OK) return status;
    llama_rmsnorm_bwd(g->dx, llama_gradients(g, b->norm2), g->dn, b->x2, llama_weights(g, b->norm2), b->rstd2, rows,
                      c->dim);

    llama_zero(g->datt, rows * c->dim);
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_O], g->datt, g->dx, b->att, rows)) != SNIP_OK) return status;
    llama_attention_bwd(g, b, rows / c->seq);
    llama_rope(g, g->dq, rows, c->heads, -1.0f);
    llama_rope(g, g->dk, rows, c->kv_heads, -1.0f);
    llama_zero(g->dn, rows * c->dim);
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_V], g->dn, g->dv, b->n1, rows)) != SNIP_OK) return status;
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_K], g->dn, g->dk, b->n1, rows)) != SNIP_OK) return status;
    if ((status = llama_linear_bwd(g, s, lin[LLAMA_Q], g->dn, g->dq, b->n1, rows)) != SNIP_OK) return status;
    llama_rmsnorm_bwd(g->dx, llama_gradients(g, b->norm1), g->dn, b->x, llama_weights(g, b->norm1), b->rstd1, rows,
                      c->dim);
    return SNIP_OK;
}

// After llama_forward with the same tokens; gradients accumulate.
static inline snip_status llama_backward(llama *g, snip *s, const int32_t *tokens, int sequences) {
    const llama_config *c = &g->config;
    int64_t rows = (int64_t)sequences * c->seq, dim = c->dim;
    llama_zero(g->dx, rows * dim);
    llama_rmsnorm_bwd(g->dx, llama_gradients(g, g->norm), g->dn, g->x, llama_weights(g, g->norm), g->rstd, rows, dim);
    for (int i = c->blocks - 1; i >= 0; i--) {
        snip_status status = llama_block_bwd(g, s, &g->block[i], rows);
        if (status) return status;
    }
    float *dembed = llama_gradients(g, g->embed);
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t j = 0; j < dim; j += 64) {  // columns in parallel: a token's rows add up in order
        int64_t n = dim - j < 64 ? dim - j : 64;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < n; i++) dembed[tokens[r] * dim + j + i] += g->dx[r * dim + j + i];
    }
    return SNIP_OK;
}

// >>llama-optimizer --------------------------------------------------------------------------------
// Global norm of the gradients, summed in pieces of 4096 in a fixed order.
static inline double llama_grad_norm(llama *g) {
    int64_t pieces = (g->n_params + 4095) / 4096;
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t p = 0; p < pieces; p++) {
        int64_t end = (p + 1) * 4096 < g->n_params ? (p + 1) * 4096 : g->n_params;
        double acc[8] = { 0 };  // n_params is a multiple of 16
        for (int64_t i = p * 4096; i < end; i += 8)
            for (int j = 0; j < 8; j++) acc[j] += (double)g->grads[i + j] * (double)g->grads[i + j];
        g->partial[p] = ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
    }
    double sum = 0;
    for (int64_t p = 0; p < pieces; p++) sum += g->partial[p];
    for (int i = 0; i < g->n_tensors && !llama_finite(sum); i++) {
        const llama_tensor *t = &g->tensors[i];
        for (int64_t j = 0; j < t->rows * t->cols && !g->failed[0]; j++)
            if (!llama_finite((double)g->grads[t->offset + j])) llama_fail(g, t, "gradient");
    }
    return sqrt(sum);
}

// What a matrix, whose weights decay, keeps of itself in an update.
static inline float llama_keep(const llama_tensor *t, double lr, double decay) {
    return 1.0f - (t->matrix ? (float)(lr * decay) : 0.0f);
}

static inline void llama_adamw(llama *g, const snip_adamw *o, double decay) {
    float b1 = (float)o->beta1, b2 = (float)o->beta2, eps = (float)o->eps;
    float scale = (float)o->grad_scale, rate = (float)o->lr;
    float m_scale = (float)(1.0 / (1.0 - pow(o->beta1, (double)o->step)));
    float v_scale = (float)(1.0 / (1.0 - pow(o->beta2, (double)o->step)));
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        const float *gradient = g->grads + t->offset;
        float *p = g->params + t->offset, *m = g->m + t->offset, *v = g->v + t->offset;
        float keep = llama_keep(t, o->lr, decay);
        int64_t n = t->rows * t->cols;
        LLAMA_OMP(parallel for schedule(static) if (n > 4096))
        for (int64_t j = 0; j < n; j++) {
            float d = gradient[j] * scale;
            m[j] = b1 * m[j] + (1.0f - b1) * d;
            v[j] = b2 * v[j] + (1.0f - b2) * d * d;
            p[j] = p[j] * keep - rate * (m[j] * m_scale) / (sqrtf(v[j] * v_scale) + eps);
        }
    }
}

// SGD with momentum, or Lion (Chen et al. 2023, arXiv 2302.06675).
static inline void llama_momentum(llama *g, int lion, const snip_adamw *o, double decay) {
    float b1 = (float)o->beta1, b2 = (float)o->beta2, scale = (float)o->grad_scale, rate = (float)o->lr;
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        const float *gradient = g->grads + t->offset;
        float *p = g->params + t->offset, *m = g->m + t->offset, keep = llama_keep(t, o->lr, decay);
        int64_t n = t->rows * t->cols;
        LLAMA_OMP(parallel for schedule(static) if (n > 4096))
        for (int64_t j = 0; j < n; j++) {
            float d = gradient[j] * scale, c = b1 * m[j] + (1.0f - b1) * d;
            m[j] = lion ? b2 * m[j] + (1.0f - b2) * d : b1 * m[j] + d;
            p[j] = p[j] * keep - rate * (lion ? (float)((c > 0) - (c < 0)) : m[j]);
        }
    }
}

// One update, as snip_adamw describes it, with decay on matrices only.
static inline void llama_update(llama *g, snip_optimizer kind, const snip_adamw *o, double decay) {
    if (kind == SNIP_ADAMW)
        llama_adamw(g, o, decay);
    else
        llama_momentum(g, kind == SNIP_LION, o, decay);
}
#endif  // LLAMA_H
