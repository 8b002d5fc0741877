// llama.h - a small Llama-style model with hand-written forward and backward passes, for the examples,
// tests and benchmarks of snip.h. Plain C99, float32; include snip.h first.
//
// WHAT IT IS
//   Token embedding; blocks of RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU; final RMSNorm;
//   output layer (tied or not); cross-entropy; AdamW, SGD with momentum, Lion. No biases. The seven linear layers of a
//   block run through snip_linear_forward/backward; embedding, norms, attention and the output layer are float32.
//
// IN ORDER
//     llama *g = llama_create(&config, batch, session);        registers and binds every linear layer
//     do {
//         llama_zero_grad(g);
//         llama_forward (g, session, tokens, targets, sequences, 1 / (float)tokens_in_step, &loss_sum);
//         llama_backward(g, session, tokens, sequences);
//     } while (snip_next_pass(session, loss));
//     llama_adamw(g, ...);  snip_end_step(session, ...);
//
// DETERMINISM
//   Work is split over outputs only, and every sum has a fixed order: results are the same, bit for bit,
//   for any number of threads.
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

typedef struct {  // a block's tensors and what its backward pass needs from the forward pass
    int norm1, norm2, lin[LLAMA_LINEARS];
    float *x, *n1, *rstd1, *q, *k, *v, *att,
        *lse;                                  // (R, dim) (R, dim) (R) (R, dim) (R, kv) (R, kv) (R, dim) (R, heads)
    float *x2, *n2, *rstd2, *gate, *up, *act;  // (R, dim) (R, dim) (R) (R, ffn) (R, ffn) (R, ffn)
} llama_block;

typedef struct {
    llama_config config;
    int batch, threads;                  // most sequences per call; threads that scratch memory was made for
    int n_tensors, embed, norm, output;  // output == embed when tied
    int64_t n_params;                    // floats in params, with the padding between tensors
    llama_tensor *tensors;
    llama_block *block;
    float *params, *grads, *m, *v;
    char failed[64];  // the layer at which a call met NaN or infinity

    void *memory;
    size_t gemm_scratch_size;
    float *x, *n, *rstd, *logits;  // (R, dim) (R, dim) (R) (chunk, vocab)
    float *dx, *dn, *dq, *dk, *dv, *datt, *dgate, *dup, *dact;
    float *rope, *scratch;  // (seq, head_dim): cos, then sin; per thread
    double *row_loss, *partial;
    void *gemm_scratch;
    int64_t head_chunk, scratch_stride;
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

// >>math -------------------------------------------------------------------------------------------
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

// Of softmax, x <= 0: 0 below -40. Nothing to a sum of 1 or more, but its products would be subnormal, a hundred times
// as slow.
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

// C (m, n) = or += A (m, k) B (k, n), for attention's small matrices inside one thread. A is reached by
// strides (ra, ca), so it may be a transposed view. A tile of some rows x 2 vectors of C stays in registers
// while k runs; the vector type is GCC's and clang's, because -O2 alone does not get there from arrays.
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
static inline void llama_mm(int64_t m, int64_t n, int64_t k, const float *a, int64_t ra, int64_t ca, const float *b,
                            int64_t ldb, float *c, int64_t ldc, int accumulate) {
    for (int64_t j = 0, nj; j < n; j += nj) {
        void (*tile)(int64_t, const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, int) = NULL;
        nj = n - j < 8 ? n - j : 8;
#ifdef __GNUC__
        if (n - j >= 8) tile = llama_mm_4;
#    ifdef __AVX2__
        if (n - j >= 16) {
            tile = llama_mm_8;
            nj = 16;
        }
#    endif
#    ifdef __AVX512F__
        if (n - j >= 32) {
            tile = llama_mm_16;
            nj = 32;
        }
#    endif
#endif
        for (int64_t i = 0; i < m; i += LLAMA_MR) {
            int64_t mi = m - i < LLAMA_MR ? m - i : LLAMA_MR;
            if (tile && mi == LLAMA_MR) {
                tile(k, a + i * ra, ra, ca, b + j, ldb, c + i * ldc + j, ldc, accumulate);
                continue;
            }
            float acc[LLAMA_MR][8 * 4] = { { 0 } };
            for (int64_t p = 0; p < k; p++)
                for (int64_t y = 0; y < mi; y++)
                    for (int64_t x = 0; x < nj; x++) acc[y][x] += a[(i + y) * ra + p * ca] * b[p * ldb + j + x];
            for (int64_t y = 0; y < mi; y++) {
                float *row = c + (i + y) * ldc + j;
                for (int64_t x = 0; x < nj; x++) row[x] = accumulate ? row[x] + acc[y][x] : acc[y][x];
            }
        }
    }
}

// >>create -----------------------------------------------------------------------------------------
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

static inline size_t llama_layout(llama *g, unsigned char *base) {
    const llama_config *c = &g->config;
    int64_t R = (int64_t)g->batch * c->seq, d = c->dim, f = c->ffn, hd = d / c->heads, kv = hd * c->kv_heads;
    size_t used = 0;
#define LLAMA_TAKE(p, n) (p) = llama_take(base, &used, (n))
    LLAMA_TAKE(g->params, g->n_params);
    LLAMA_TAKE(g->grads, g->n_params);
    LLAMA_TAKE(g->m, g->n_params);
    LLAMA_TAKE(g->v, g->n_params);
    for (int i = 0; i < c->blocks; i++) {
        llama_block *b = &g->block[i];
        LLAMA_TAKE(b->x, R * d);
        LLAMA_TAKE(b->n1, R * d);
        LLAMA_TAKE(b->rstd1, R);
        LLAMA_TAKE(b->q, R * d);
        LLAMA_TAKE(b->k, R * kv);
        LLAMA_TAKE(b->v, R * kv);
        LLAMA_TAKE(b->att, R * d);
        LLAMA_TAKE(b->lse, R * c->heads);
        LLAMA_TAKE(b->x2, R * d);
        LLAMA_TAKE(b->n2, R * d);
        LLAMA_TAKE(b->rstd2, R);
        LLAMA_TAKE(b->gate, R * f);
        LLAMA_TAKE(b->up, R * f);
        LLAMA_TAKE(b->act, R * f);
    }
    LLAMA_TAKE(g->x, R * d);
    LLAMA_TAKE(g->n, R * d);
    LLAMA_TAKE(g->rstd, R);
    LLAMA_TAKE(g->dx, R * d);
    LLAMA_TAKE(g->dn, R * d);
    LLAMA_TAKE(g->dq, R * d);
    LLAMA_TAKE(g->datt, R * d);
    LLAMA_TAKE(g->dk, R * kv);
    LLAMA_TAKE(g->dv, R * kv);
    LLAMA_TAKE(g->dgate, R * f);
    LLAMA_TAKE(g->dup, R * f);
    LLAMA_TAKE(g->dact, R * f);
    LLAMA_TAKE(g->logits, g->head_chunk * c->vocab);
    LLAMA_TAKE(g->rope, c->seq * hd);
    LLAMA_TAKE(g->scratch, g->scratch_stride * g->threads);
    float *p;
    LLAMA_TAKE(p, 2 * R);
    g->row_loss = (double *)(void *)p;
    LLAMA_TAKE(p, 2 * (g->n_params / 4096 + 1));
    g->partial = (double *)(void *)p;
    LLAMA_TAKE(p, (int64_t)(g->gemm_scratch_size / 4 + 1));
    g->gemm_scratch = p;
#undef LLAMA_TAKE
    return used;
}

static inline void llama_destroy(llama *g) {
    if (!g) return;
    free(g->memory);
    free(g->tensors);
    free(g->block);
    free(g);
}

// Weights from N(0, 0.02^2), those that write to the residual stream scaled by 1/sqrt(2 blocks), norms 1.
static inline void llama_init(llama *g) {
    const double tau = 6.283185307179586;
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        float *p = g->params + t->offset;
        int64_t n = t->rows * t->cols;
        size_t len = strlen(t->name);
        int residual = strstr(t->name, ".attn.o.") || (len > 12 && strstr(t->name, ".mlp.down."));
        double std = residual ? 0.02 / sqrt(2.0 * g->config.blocks) : 0.02;
        snip_rng_key key = { g->config.seed, 0xffffffffu, (uint32_t)i };
        if (!t->matrix) {
            for (int64_t j = 0; j < n; j++) p[j] = 1.0f;
            continue;
        }
        LLAMA_OMP(parallel for schedule(static))
        for (int64_t j = 0; j < n; j += 2) {
            uint32_t r[4];
            snip_philox(key, (uint64_t)j, r);
            double radius = std * sqrt(-2.0 * log((r[0] + 0.5) / 4294967296.0)), angle = tau * r[1] / 4294967296.0;
            p[j] = (float)(radius * cos(angle));
            if (j + 1 < n) p[j + 1] = (float)(radius * sin(angle));
        }
    }
}

// Registers the linear layers in session order "0.attn.q", "0.attn.k", ... and binds their moments.
// NULL: out of memory, or the configuration is refused.
static inline llama *llama_create(const llama_config *config, int batch, snip *session) {
    static const char *const kind[LLAMA_LINEARS] = { "attn.q",   "attn.k", "attn.v",  "attn.o",
                                                     "mlp.gate", "mlp.up", "mlp.down" };
    if (llama_config_check(config) || batch < 1 || batch > 1 << 20) return NULL;
    llama *g = (llama *)calloc(1, sizeof *g);
    if (!g) return NULL;
    g->config = *config;
    const llama_config *c = &g->config;
    int64_t d = c->dim, hd = d / c->heads, kv = hd * c->kv_heads, R = (int64_t)batch * c->seq;
    const int64_t out[LLAMA_LINEARS] = { d, kv, kv, d, c->ffn, c->ffn, d },
                  in[LLAMA_LINEARS] = { d, d, d, d, d, d, c->ffn };
    g->tensors = (llama_tensor *)calloc((size_t)c->blocks * 9 + 3, sizeof *g->tensors);
    g->block = (llama_block *)calloc((size_t)c->blocks, sizeof *g->block);
    if (!g->tensors || !g->block) {
        llama_destroy(g);
        return NULL;
    }

    char name[40];
    g->embed = llama_add_tensor(g, "embed.weight", c->vocab, d, 1);
    for (int i = 0; i < c->blocks; i++) {
        llama_block *b = &g->block[i];
        for (int j = 0; j < LLAMA_LINEARS; j++) {
            if (j == LLAMA_Q) {
                snprintf(name, sizeof name, "blocks.%d.norm1.weight", i);
                b->norm1 = llama_add_tensor(g, name, 1, d, 0);
            }
            if (j == LLAMA_GATE) {
                snprintf(name, sizeof name, "blocks.%d.norm2.weight", i);
                b->norm2 = llama_add_tensor(g, name, 1, d, 0);
            }
            snprintf(name, sizeof name, "blocks.%d.%s.weight", i, kind[j]);
            b->lin[j] = llama_add_tensor(g, name, out[j], in[j], 1);
        }
    }
    g->norm = llama_add_tensor(g, "norm.weight", 1, d, 0);
    g->output = c->tied ? g->embed : llama_add_tensor(g, "output.weight", c->vocab, d, 1);

    g->batch = batch;
    g->threads = 1;
#ifdef _OPENMP
    g->threads = omp_get_max_threads();
#endif
    g->head_chunk = (1 << 23) / c->vocab < R ? (1 << 23) / c->vocab : R;  // logits in pieces of at most 32 MB
    int64_t chunk = g->head_chunk;
    size_t s[3] = { snip_gemm_scratch(chunk, c->vocab, d), snip_gemm_scratch(chunk, d, c->vocab),
                    snip_gemm_scratch(c->vocab, d, chunk) };
    for (int i = 0; i < 3; i++)
        if (s[i] > g->gemm_scratch_size) g->gemm_scratch_size = s[i];
    g->scratch_stride = ((4 * hd + 64) * (((int64_t)c->seq + 31) / 32) + 3 * hd) * 32 + 64;
    size_t size = llama_layout(g, NULL);
    g->memory = calloc(size + 64, 1);
    if (!g->memory) {
        llama_destroy(g);
        return NULL;
    }
    llama_layout(g, (unsigned char *)g->memory + (64 - (uintptr_t)g->memory % 64));

    for (int64_t t = 0; t < c->seq; t++)
        for (int64_t i = 0; i < hd / 2; i++) {
            double angle = (double)t * pow(10000.0, -2.0 * (double)i / (double)hd);
            g->rope[t * hd + i] = (float)cos(angle);
            g->rope[t * hd + hd / 2 + i] = (float)sin(angle);
        }
    llama_init(g);
    for (int i = 0; i < c->blocks; i++)
        for (int j = 0; j < LLAMA_LINEARS; j++) {
            llama_tensor *t = &g->tensors[g->block[i].lin[j]];
            snprintf(name, sizeof name, "%d.%s", i, kind[j]);
            t->layer = snip_add_linear(session, name, t->rows, t->cols,
                                       c->stages > 1 ? (int)((int64_t)i * c->stages / c->blocks) : 0);
            if (t->layer < 0 || (snip_bind_adamw(session, t->layer, g->m + t->offset, g->v + t->offset) &&
                                 snip_bind_momentum(session, t->layer, g->m + t->offset))) {
                llama_destroy(g);
                return NULL;
            }
        }
    return g;
}

// >>layers -----------------------------------------------------------------------------------------
static inline void llama_fail(llama *g, const llama_tensor *t, const char *where) {
    if (g->failed[0]) return;
    const char *name = strncmp(t->name, "blocks.", 7) ? t->name : t->name + 7;  // "0.attn.q", as the session calls it
    size_t len = strlen(name), tail = strlen(".weight");
    snprintf(g->failed, sizeof g->failed, "%.*s (%s)", (int)(len > tail ? len - tail : len), name, where);
}

static inline snip_status llama_linear_fwd(llama *g, snip *s, int tensor, float *out, const float *inp, int64_t rows) {
    const llama_tensor *t = &g->tensors[tensor];
    snip_status st = snip_linear_forward(s, t->layer, out, inp, g->params + t->offset, NULL, rows);
    if (st) llama_fail(g, t, "forward");
    return st;
}

static inline snip_status llama_linear_bwd(llama *g, snip *s, int tensor, float *dinp, const float *dout,
                                           const float *inp, int64_t rows) {
    const llama_tensor *t = &g->tensors[tensor];
    snip_status st = snip_linear_backward(s, t->layer, dinp, g->grads + t->offset, NULL, dout, inp,
                                          g->params + t->offset, rows);
    if (st) llama_fail(g, t, "backward");
    return st;
}

static inline void llama_rmsnorm_fwd(float *out, float *rstd, const float *x, const float *w, int64_t R, int64_t d) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++) {
        const float *xr = x + r * d;
        float s = 1.0f / sqrtf(llama_dot(xr, xr, d) / (float)d + 1e-5f);
        rstd[r] = s;
        for (int64_t i = 0; i < d; i++) out[r * d + i] = xr[i] * s * w[i];
    }
}

// dx += the gradient through the norm; dw accumulates.
static inline void llama_rmsnorm_bwd(float *dx, float *dw, const float *dout, const float *x, const float *w,
                                     const float *rstd, int64_t R, int64_t d) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++) {
        const float *xr = x + r * d, *dy = dout + r * d;
        float acc[LLAMA_LANES] = { 0 }, s = rstd[r];
        int64_t i = 0;
        for (; i + LLAMA_LANES <= d; i += LLAMA_LANES)
            for (int j = 0; j < LLAMA_LANES; j++) acc[j] += dy[i + j] * w[i + j] * xr[i + j];
        for (int j = 0; j < LLAMA_LANES && i + j < d; j++) acc[j] += dy[i + j] * w[i + j] * xr[i + j];
        float mean = llama_sum_lanes(acc) * s * s * s / (float)d;
        for (i = 0; i < d; i++) dx[r * d + i] += dy[i] * w[i] * s - xr[i] * mean;
    }
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t c = 0; c < d; c += 64) {  // columns in parallel, rows in order
        int64_t n = d - c < 64 ? d - c : 64;
        float acc[64] = { 0 };
        for (int64_t r = 0; r < R; r++)
            for (int64_t i = 0; i < n; i++) acc[i] += dout[r * d + c + i] * x[r * d + c + i] * rstd[r];
        for (int64_t i = 0; i < n; i++) dw[c + i] += acc[i];
    }
}

// Turns the pairs (i, i + hd/2) of every head by the position's angle, in place; sign -1 turns back.
static inline void llama_rope(const llama *g, float *x, int64_t R, int64_t heads, float sign) {
    int64_t hd = g->config.dim / g->config.heads, half = hd / 2;
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++) {
        const float *co = g->rope + r % g->config.seq * hd, *si = co + half;
        for (int64_t h = 0; h < heads; h++) {
            float *a = x + (r * heads + h) * hd, *b = a + half;
            for (int64_t i = 0; i < half; i++) {
                float u = a[i], w = b[i], sn = sign * si[i];
                a[i] = u * co[i] - w * sn;
                b[i] = u * sn + w * co[i];
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

// Both passes take one (sequence, key-value head) at a time and 32 query rows within it, so that scores
// never take more than 32 x seq floats; the backward pass rebuilds them from the rows' log-sum-exp. Scores are
// kept as (key, query): what is done for each query is done for 32 of them side by side. Heads are copied
// together first, in whole blocks of 32 rows, zeros beyond the sequence: rows far apart share few cache sets.
#define LLAMA_QROWS 32

static inline void llama_take_rows(float *out, const float *x, int64_t ldx, int64_t rows, int64_t padded, int64_t hd) {
    for (int64_t t = 0; t < rows; t++) memcpy(out + t * hd, x + t * ldx, (size_t)hd * sizeof(float));
    memset(out + rows * hd, 0, (size_t)((padded - rows) * hd) * sizeof(float));
}

static inline void llama_give_rows(float *out, int64_t ldo, const float *x, int64_t rows, int64_t hd) {
    for (int64_t t = 0; t < rows; t++) memcpy(out + t * ldo, x + t * hd, (size_t)hd * sizeof(float));
}

static inline void llama_transpose_rows(float *out, const float *x, int64_t hd) {  // (32, hd) to (hd, 32)
    for (int64_t i = 0; i < hd; i++)
        for (int64_t t = 0; t < LLAMA_QROWS; t++) out[i * LLAMA_QROWS + t] = x[t * hd + i];
}

// Scores (n, 32) of the keys that a query may not see: those of the last 32 rows above the diagonal.
static inline void llama_mask(float *s, int64_t n, float value) {
    for (int64_t j = 1; j < LLAMA_QROWS; j++)
        for (int64_t i = 0; i < j; i++) s[(n - LLAMA_QROWS + j) * LLAMA_QROWS + i] = value;
}

static inline void llama_attention_fwd(const llama *g, const llama_block *b, int64_t sequences) {
    const llama_config *c = &g->config;
    int64_t T = c->seq, H = c->heads, G = c->kv_heads, hd = c->dim / H, d = c->dim, kv = hd * G, Q = LLAMA_QROWS,
            padded = (T + Q - 1) / Q * Q;
    float scale = 1.0f / sqrtf((float)hd);
    LLAMA_OMP(parallel for schedule(static) num_threads(g->threads))
    for (int64_t task = 0; task < sequences * G; task++) {
        int64_t r0 = task / G * T, kvh = task % G;
        float *k = llama_thread_scratch(g), *v = k + padded * hd, *s = v + padded * hd, *q = s + padded * Q,
              *qt = q + Q * hd;  // (seq, hd) (seq, hd) (seq, 32) (32, hd) (hd, 32)
        llama_take_rows(k, b->k + r0 * kv + kvh * hd, kv, T, padded, hd);
        llama_take_rows(v, b->v + r0 * kv + kvh * hd, kv, T, padded, hd);
        for (int64_t h = kvh * (H / G); h < (kvh + 1) * (H / G); h++)
            for (int64_t i0 = 0; i0 < T; i0 += Q) {
                int64_t m = T - i0 < Q ? T - i0 : Q, n = i0 + Q, at = (r0 + i0) * d + h * hd;
                float top[LLAMA_QROWS], total[LLAMA_QROWS] = { 0 };
                llama_take_rows(q, b->q + at, d, m, Q, hd);
                llama_transpose_rows(qt, q, hd);
                llama_mm(n, Q, hd, k, hd, 1, qt, Q, s, Q, 0);
                llama_mask(s, n, -1e30f);
                memcpy(top, s, sizeof top);
                for (int64_t j = 1; j < n; j++)
                    for (int64_t i = 0; i < LLAMA_QROWS; i++)
                        top[i] = s[j * LLAMA_QROWS + i] > top[i] ? s[j * LLAMA_QROWS + i] : top[i];
                for (int64_t j = 0; j < n; j++)
                    for (int64_t i = 0; i < LLAMA_QROWS; i++)
                        s[j * LLAMA_QROWS + i] = llama_exp_softmax((s[j * LLAMA_QROWS + i] - top[i]) * scale);
                llama_mask(s, n, 0.0f);
                for (int64_t j0 = 0; j0 < n; j0 += Q) {  // shorter sums are closer ones
                    float part[LLAMA_QROWS] = { 0 };
                    for (int64_t j = j0; j < j0 + Q; j++)
                        for (int64_t i = 0; i < LLAMA_QROWS; i++) part[i] += s[j * LLAMA_QROWS + i];
                    for (int64_t i = 0; i < LLAMA_QROWS; i++) total[i] += part[i];
                }
                llama_mm(Q, hd, n, s, 1, Q, v, hd, q, hd, 0);
                for (int64_t i = 0; i < m; i++) {
                    float inv = 1.0f / total[i];
                    for (int64_t j = 0; j < hd; j++) q[i * hd + j] *= inv;
                    b->lse[(r0 + i0 + i) * H + h] = top[i] * scale + logf(total[i]);
                }
                llama_give_rows(b->att + at, d, q, m, hd);
            }
    }
}

static inline void llama_attention_bwd(llama *g, const llama_block *b, int64_t sequences) {
    const llama_config *c = &g->config;
    int64_t T = c->seq, H = c->heads, G = c->kv_heads, hd = c->dim / H, d = c->dim, kv = hd * G, Q = LLAMA_QROWS,
            padded = (T + Q - 1) / Q * Q;
    float scale = 1.0f / sqrtf((float)hd);
    LLAMA_OMP(parallel for schedule(static) num_threads(g->threads))
    for (int64_t task = 0; task < sequences * G; task++) {
        int64_t r0 = task / G * T, kvh = task % G, at_kv = r0 * kv + kvh * hd;
        float *k = llama_thread_scratch(g), *v = k + padded * hd, *dk = v + padded * hd,
              *dv = dk + padded * hd;  // (seq, hd)
        float *p = dv + padded * hd, *ds = p + padded * Q, *q = ds + padded * Q, *dout = q + Q * hd,
              *turned = dout + Q * hd;  // (seq, 32) (seq, 32) (32, hd) (32, hd) (hd, 32)
        llama_take_rows(k, b->k + at_kv, kv, T, padded, hd);
        llama_take_rows(v, b->v + at_kv, kv, T, padded, hd);
        memset(dk, 0, (size_t)(2 * padded * hd) * sizeof(float));
        for (int64_t h = kvh * (H / G); h < (kvh + 1) * (H / G); h++)
            for (int64_t i0 = 0; i0 < T; i0 += Q) {
                int64_t m = T - i0 < Q ? T - i0 : Q, n = i0 + Q, at = (r0 + i0) * d + h * hd;
                float lse[LLAMA_QROWS] = { 0 }, along[LLAMA_QROWS] = { 0 };
                llama_take_rows(q, b->q + at, d, m, Q, hd);
                llama_transpose_rows(turned, q, hd);
                llama_mm(n, Q, hd, k, hd, 1, turned, Q, p, Q, 0);
                llama_take_rows(dout, g->datt + at, d, m, Q, hd);
                llama_transpose_rows(turned, dout, hd);
                llama_mm(n, Q, hd, v, hd, 1, turned, Q, ds, Q, 0);
                for (int64_t i = 0; i < m; i++) {
                    lse[i] = b->lse[(r0 + i0 + i) * H + h];
                    along[i] = llama_dot(dout + i * hd, b->att + at + i * d, hd);
                }
                for (int64_t j = 0; j < n; j++)
                    for (int64_t i = 0; i < LLAMA_QROWS; i++) {
                        float pi = llama_exp_softmax(p[j * LLAMA_QROWS + i] * scale - lse[i]);
                        p[j * LLAMA_QROWS + i] = pi;
                        ds[j * LLAMA_QROWS + i] = pi * (ds[j * LLAMA_QROWS + i] - along[i]) * scale;
                    }
                llama_mask(p, n, 0.0f);
                llama_mask(ds, n, 0.0f);
                llama_mm(n, hd, Q, ds, Q, 1, q, hd, dk, hd, 1);
                llama_mm(n, hd, Q, p, Q, 1, dout, hd, dv, hd, 1);
                llama_mm(Q, hd, n, ds, 1, Q, k, hd, q, hd, 0);
                llama_give_rows(g->dq + at, d, q, m, hd);
            }
        llama_give_rows(g->dk + at_kv, kv, dk, T, hd);
        llama_give_rows(g->dv + at_kv, kv, dv, T, hd);
    }
}

static inline void llama_swiglu_fwd(float *act, const float *gate, const float *up, int64_t R, int64_t f) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = r * f; i < (r + 1) * f; i++) act[i] = gate[i] / (1.0f + llama_exp(-gate[i])) * up[i];
}

static inline void llama_swiglu_bwd(float *dgate, float *dup, const float *dact, const float *gate, const float *up,
                                    int64_t R, int64_t f) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = r * f; i < (r + 1) * f; i++) {
            float s = 1.0f / (1.0f + llama_exp(-gate[i])), x = gate[i];
            dup[i] = dact[i] * x * s;
            dgate[i] = dact[i] * up[i] * s * (1.0f + x * (1.0f - s));
        }
}

static inline void llama_add(float *out, const float *a, const float *b, int64_t R, int64_t d) {
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = r * d; i < (r + 1) * d; i++) out[i] = a[i] + b[i];
}

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

// Output layer and cross-entropy, in pieces of head_chunk rows: *loss gets the sum over the rows. With
// grad_scale != 0 the gradient of grad_scale * sum is taken at once: into g->dn, and into the output weights'.
static inline snip_status llama_head(llama *g, const int32_t *targets, int64_t R, float grad_scale, double *loss) {
    int64_t V = g->config.vocab, d = g->config.dim;
    const llama_tensor *t = &g->tensors[g->output];
    const float *w = g->params + t->offset;
    for (int64_t r0 = 0; r0 < R; r0 += g->head_chunk) {
        int64_t m = R - r0 < g->head_chunk ? R - r0 : g->head_chunk;
        float *logits = g->logits;
        snip_operand n = llama_operand(g->n + r0 * d, d, 0), wt = llama_operand(w, d, 0);
        snip_status st = snip_gemm(m, V, d, &n, &wt, logits, V, 0, NULL, g->gemm_scratch, SNIP_ISA_BEST);
        if (st) return st;
        LLAMA_OMP(parallel for schedule(static))
        for (int64_t r = 0; r < m; r++) {
            float *row = logits + r * V, top = llama_max(row, V);
            int32_t y = targets[r0 + r];
            float at_target = row[y];
            for (int64_t j = 0; j < V; j++) row[j] = llama_exp_softmax(row[j] - top);
            float total = llama_sum(row, V), f = grad_scale / total;
            g->row_loss[r0 + r] = log((double)total) + (double)top - (double)at_target;
            if (grad_scale == 0.0f) continue;
            for (int64_t j = 0; j < V; j++) row[j] *= f;
            row[y] -= grad_scale;
        }
        if (grad_scale == 0.0f) continue;
        snip_operand dl = llama_operand(logits, V, 0), wk = llama_operand(w, d, 1);
        st = snip_gemm(m, d, V, &dl, &wk, g->dn + r0 * d, d, 0, NULL, g->gemm_scratch, SNIP_ISA_BEST);
        if (st) return st;
        dl.transposed = n.transposed = 1;
        st = snip_gemm(V, d, m, &dl, &n, g->grads + t->offset, d, 1, NULL, g->gemm_scratch, SNIP_ISA_BEST);
        if (st) return st;
    }
    double sum = 0;
    for (int64_t r = 0; r < R; r++) sum += g->row_loss[r];
    *loss = sum;
    if (llama_finite(sum)) return SNIP_OK;
    llama_fail(g, t, "loss");
    return SNIP_NONFINITE;
}

// >>passes -----------------------------------------------------------------------------------------
static inline void llama_zero_grad(llama *g) { memset(g->grads, 0, (size_t)g->n_params * sizeof(float)); }

// tokens, targets: (sequences, seq). *loss: the sum over all tokens. grad_scale 0: validation, no
// backward pass may follow. Stops at the first layer that meets NaN or infinity and names it in g->failed.
static inline snip_status llama_forward(llama *g, snip *s, const int32_t *tokens, const int32_t *targets, int sequences,
                                        float grad_scale, double *loss) {
    const llama_config *c = &g->config;
    int64_t R = (int64_t)sequences * c->seq, d = c->dim;
    const float *embed = g->params + g->tensors[g->embed].offset;
    float *x = c->blocks ? g->block[0].x : g->x, *y = g->dn;  // y: what a branch adds to the stream
    snip_status st;
    g->failed[0] = 0;
    if (sequences < 1 || sequences > g->batch) return SNIP_BAD_ARGUMENT;
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t r = 0; r < R; r++) memcpy(x + r * d, embed + tokens[r] * d, (size_t)d * sizeof(float));
    for (int i = 0; i < c->blocks; i++) {
        llama_block *b = &g->block[i];
        float *next = i + 1 < c->blocks ? g->block[i + 1].x : g->x;
        llama_rmsnorm_fwd(b->n1, b->rstd1, b->x, g->params + g->tensors[b->norm1].offset, R, d);
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_Q], b->q, b->n1, R)) != SNIP_OK) return st;
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_K], b->k, b->n1, R)) != SNIP_OK) return st;
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_V], b->v, b->n1, R)) != SNIP_OK) return st;
        llama_rope(g, b->q, R, c->heads, 1.0f);
        llama_rope(g, b->k, R, c->kv_heads, 1.0f);
        llama_attention_fwd(g, b, sequences);
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_O], y, b->att, R)) != SNIP_OK) return st;
        llama_add(b->x2, b->x, y, R, d);
        llama_rmsnorm_fwd(b->n2, b->rstd2, b->x2, g->params + g->tensors[b->norm2].offset, R, d);
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_GATE], b->gate, b->n2, R)) != SNIP_OK) return st;
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_UP], b->up, b->n2, R)) != SNIP_OK) return st;
        llama_swiglu_fwd(b->act, b->gate, b->up, R, c->ffn);
        if ((st = llama_linear_fwd(g, s, b->lin[LLAMA_DOWN], y, b->act, R)) != SNIP_OK) return st;
        llama_add(next, b->x2, y, R, d);
    }
    llama_rmsnorm_fwd(g->n, g->rstd, g->x, g->params + g->tensors[g->norm].offset, R, d);
    return llama_head(g, targets, R, grad_scale, loss);
}

// After llama_forward with the same tokens; gradients accumulate.
static inline snip_status llama_backward(llama *g, snip *s, const int32_t *tokens, int sequences) {
    const llama_config *c = &g->config;
    int64_t R = (int64_t)sequences * c->seq, d = c->dim, f = c->ffn;
    size_t row_bytes = (size_t)(R * d) * sizeof(float);
    snip_status st;
    memset(g->dx, 0, row_bytes);
    llama_rmsnorm_bwd(g->dx, g->grads + g->tensors[g->norm].offset, g->dn, g->x, g->params + g->tensors[g->norm].offset,
                      g->rstd, R, d);
    for (int i = c->blocks - 1; i >= 0; i--) {
        llama_block *b = &g->block[i];
        memset(g->dact, 0, (size_t)(R * f) * sizeof(float));
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_DOWN], g->dact, g->dx, b->act, R)) != SNIP_OK) return st;
        llama_swiglu_bwd(g->dgate, g->dup, g->dact, b->gate, b->up, R, f);
        memset(g->dn, 0, row_bytes);
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_UP], g->dn, g->dup, b->n2, R)) != SNIP_OK) return st;
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_GATE], g->dn, g->dgate, b->n2, R)) != SNIP_OK) return st;
        llama_rmsnorm_bwd(g->dx, g->grads + g->tensors[b->norm2].offset, g->dn, b->x2,
                          g->params + g->tensors[b->norm2].offset, b->rstd2, R, d);
        memset(g->datt, 0, row_bytes);
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_O], g->datt, g->dx, b->att, R)) != SNIP_OK) return st;
        llama_attention_bwd(g, b, sequences);
        llama_rope(g, g->dq, R, c->heads, -1.0f);
        llama_rope(g, g->dk, R, c->kv_heads, -1.0f);
        memset(g->dn, 0, row_bytes);
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_V], g->dn, g->dv, b->n1, R)) != SNIP_OK) return st;
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_K], g->dn, g->dk, b->n1, R)) != SNIP_OK) return st;
        if ((st = llama_linear_bwd(g, s, b->lin[LLAMA_Q], g->dn, g->dq, b->n1, R)) != SNIP_OK) return st;
        llama_rmsnorm_bwd(g->dx, g->grads + g->tensors[b->norm1].offset, g->dn, b->x,
                          g->params + g->tensors[b->norm1].offset, b->rstd1, R, d);
    }
    float *de = g->grads + g->tensors[g->embed].offset;
    LLAMA_OMP(parallel for schedule(static))
    for (int64_t j = 0; j < d; j += 64) {  // columns in parallel: a token's rows add up in order
        int64_t n = d - j < 64 ? d - j : 64;
        for (int64_t r = 0; r < R; r++)
            for (int64_t k = 0; k < n; k++) de[tokens[r] * d + j + k] += g->dx[r * d + j + k];
    }
    return SNIP_OK;
}

// >>optimizer --------------------------------------------------------------------------------------
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
    if (!llama_finite(sum))
        for (int i = 0; i < g->n_tensors && !g->failed[0]; i++) {
            const llama_tensor *t = &g->tensors[i];
            for (int64_t j = 0; j < t->rows * t->cols; j++)
                if (!llama_finite((double)g->grads[t->offset + j])) {
                    llama_fail(g, t, "gradient");
                    break;
                }
        }
    return sqrt(sum);
}

// One AdamW update with gradients times grad_scale; decay on matrices only. step: 1 for the first.
static inline void llama_adamw(llama *g, double lr, double beta1, double beta2, double eps, double decay, int64_t step,
                               double grad_scale) {
    float b1 = (float)beta1, b2 = (float)beta2, e = (float)eps, scale = (float)grad_scale;
    float c1 = (float)(1.0 / (1.0 - pow(beta1, (double)step))), c2 = (float)(1.0 / (1.0 - pow(beta2, (double)step))),
          rate = (float)lr;
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        float *p = g->params + t->offset, *m = g->m + t->offset, *v = g->v + t->offset;
        const float *dp = g->grads + t->offset;
        float keep = 1.0f - (t->matrix ? (float)(lr * decay) : 0.0f);
        int64_t n = t->rows * t->cols;
        LLAMA_OMP(parallel for schedule(static) if (n > 4096))
        for (int64_t j = 0; j < n; j++) {
            float gr = dp[j] * scale;
            m[j] = b1 * m[j] + (1.0f - b1) * gr;
            v[j] = b2 * v[j] + (1.0f - b2) * gr * gr;
            p[j] = p[j] * keep - rate * (m[j] * c1) / (sqrtf(v[j] * c2) + e);
        }
    }
}

// One update as snip_adamw describes it, with decay on matrices only: SGD with momentum, Lion (Chen et al. 2023, arXiv
// 2302.06675) or AdamW.
static inline void llama_update(llama *g, snip_optimizer kind, const snip_adamw *o, double decay) {
    float b1 = (float)o->beta1, b2 = (float)o->beta2, scale = (float)o->grad_scale, rate = (float)o->lr;
    if (kind == SNIP_ADAMW) {
        llama_adamw(g, o->lr, o->beta1, o->beta2, o->eps, decay, o->step, o->grad_scale);
        return;
    }
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        float *p = g->params + t->offset, *m = g->m + t->offset;
        const float *dp = g->grads + t->offset;
        float keep = 1.0f - (t->matrix ? (float)(o->lr * decay) : 0.0f);
        int64_t n = t->rows * t->cols;
        LLAMA_OMP(parallel for schedule(static) if (n > 4096))
        for (int64_t j = 0; j < n; j++) {
            float gr = dp[j] * scale, c = b1 * m[j] + (1.0f - b1) * gr;
            m[j] = kind == SNIP_LION ? b2 * m[j] + (1.0f - b2) * gr : b1 * m[j] + gr;
            p[j] = p[j] * keep - rate * (kind == SNIP_LION ? (float)((c > 0) - (c < 0)) : m[j]);
        }
    }
}
#endif  // LLAMA_H
