// session.h - what the tests of the session share: descriptions, a two-layer model that trains, a bundle of layers that
// do not know of each other, references in double precision. Public names of snip.h alone.
#ifndef SNIP_TEST_SESSION_H
#define SNIP_TEST_SESSION_H

#include "test.h"
#ifndef SNIPI_WORTH
#    define SNIPI_WORTH 0  // threads for however little, where the implementation is compiled with the test
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include <math.h>

enum { MOST_SESSIONS = 64 };

// ---- numbers ----

static inline float uniform(void) { return (float)(random_bits() >> 40) * (1.0f / 8388608.0f) - 1.0f; }  // -1 to 1

static inline float normal(void) {
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return 0.5f * sum;
}

static inline float *floats(int64_t count) { return (float *)room((size_t)count * sizeof(float)); }

static inline double *doubles(int64_t count) { return (double *)room((size_t)count * sizeof(double)); }

static inline float *randoms(int64_t count, float size) {
    float *x = floats(count);
    for (int64_t i = 0; i < count; i++) x[i] = size * normal();
    return x;
}

static inline float *copied(const float *x, int64_t count) {
    float *copy = floats(count);
    memcpy(copy, x, (size_t)count * sizeof *x);
    return copy;
}

static inline int same_floats(const float *a, const float *b, int64_t count) {
    return !memcmp(a, b, (size_t)count * sizeof *a);
}

static inline int is_finite(double x) {  // -Ofast folds isfinite() to 1
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7FF0000000000000u) != 0x7FF0000000000000u;
}

static inline double sum_of_squares(const float *x, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

static inline int close_to(double a, double b, double relative) {
    return fabs(a - b) <= relative * fmax(fabs(a), fabs(b));
}

// |got - expected| / |expected|
static inline double distance(const float *got, const double *expected, int64_t count) {
    double error = 0, all = 0;
    for (int64_t i = 0; i < count; i++) {
        error += pow((double)got[i] - expected[i], 2);
        all += expected[i] * expected[i];
    }
    return all > 0 ? sqrt(error / all) : sqrt(error);
}

// c[m][n] += a[m][k] b[n][k]^T, the operands read with these strides
static inline void product(double *c, int m, int n, int k, const float *a, int a_row, int a_col, const float *b,
                           int b_row, int b_col) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int t = 0; t < k; t++) sum += (double)a[i * a_row + t * a_col] * (double)b[j * b_row + t * b_col];
            c[i * n + j] += sum;
        }
}

// ---- sessions ----

static const snip_recipe recipe_f32 = SNIP_RECIPE_F32, recipe_bf16 = SNIP_RECIPE_BF16;
static const snip_recipe recipe_fp8_tile = SNIP_RECIPE_FP8_TILE, recipe_fp8_block = SNIP_RECIPE_FP8_BLOCK;
static const snip_recipe recipe_fp4_tile = SNIP_RECIPE_FP4_TILE, recipe_fp4_block = SNIP_RECIPE_FP4_BLOCK;

static snip *sessions[MOST_SESSIONS];

static inline void close_sessions(void) {
    for (int i = 0; i < MOST_SESSIONS; i++) {
        snip_destroy(sessions[i]);
        sessions[i] = NULL;
    }
}

static inline void session_close(snip *s) {
    for (int i = 0; i < MOST_SESSIONS; i++)
        if (sessions[i] == s) sessions[i] = NULL;
    snip_destroy(s);
}

// A session that is destroyed after the test, at the latest.
static inline snip *session_open(const snip_desc *d) {
    snip *s = snip_create(d);
    test.after = close_sessions;
    if (!s) {
        printf("no session: %s\n", snip_status_text(snip_desc_check(d)));
        exit(2);
    }
    for (int i = 0; i < MOST_SESSIONS; i++)
        if (!sessions[i]) {
            sessions[i] = s;
            return s;
        }
    printf("too many sessions\n");
    exit(2);
}

static inline snip_desc description(void) {
    snip_desc d;
    memset(&d, 0, sizeof d);
    d.seed = 7;
    return d;
}

static inline snip_adamw optimizer(int64_t step) {
    snip_adamw o = { 1e-2, 0.9, 0.95, 1e-8, step, 1 };
    return o;
}

// The slope of AdamW's next update in the gradient, for the weight whose second moment is v.
static inline double adamw_slope(const snip_adamw *o, float v) {
    double first = (1 - o->beta1) / (1 - pow(o->beta1, (double)(o->step + 1)));
    return first / (sqrt((double)v / (1 - pow(o->beta2, (double)o->step))) + o->eps);
}

// |u|^2 of AdamW's last update of these weights, at learning rate 1.
static inline double adamw_update_sq(const snip_adamw *o, const float *m, const float *v, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        double root = sqrt((double)v[i] / (1 - pow(o->beta2, (double)o->step))) + o->eps;
        sum += pow((double)m[i] / (1 - pow(o->beta1, (double)o->step)) / root, 2);
    }
    return sum;
}

static inline snip_layer_info layer_of(const snip *s, int layer) {
    snip_layer_info info;
    memset(&info, 0, sizeof info);
    CHECK(snip_layer(s, layer, &info) == SNIP_OK);
    return info;
}

// The plan: three formats a layer.
static inline void formats_of(const snip *s, snip_format *formats) {
    for (int l = 0; l < snip_layers(s); l++) {
        snip_layer_info info;
        if (snip_layer(s, l, &info) == SNIP_OK) memcpy(formats + 3 * l, info.format, sizeof info.format);
    }
}

// What a GEMM sees of x [rows][cols]: quantized as stored, or with tiles along the other dimension.
static inline float *quantized(const snip_recipe *recipe, const float *x, int rows, int cols, int transposed) {
    float *out = floats(rows * cols);
    snip_rng_key key = { 0, 0, 0 };
    if (recipe->format == SNIP_F32) return copied(x, rows * cols);
    if (!transposed) {
        CHECK(snip_fake_quantize(recipe, x, rows, cols, cols, out, cols, key, NULL, NULL) == SNIP_OK);
        return out;
    }
    float *turned = floats(rows * cols);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) turned[j * rows + i] = x[i * cols + j];
    CHECK(snip_fake_quantize(recipe, turned, cols, rows, rows, turned, rows, key, NULL, NULL) == SNIP_OK);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) out[i * cols + j] = turned[j * rows + i];
    return out;
}

static inline double rounding_error(const snip_recipe *recipe, const float *x, int rows, int cols) {  // mean square
    snip_rng_key key = { 1, 0, 0 };
    snip_quant_stats stats;
    CHECK(snip_fake_quantize(recipe, x, rows, cols, cols, NULL, 0, key, NULL, &stats) == SNIP_OK);
    return stats.err_sq / (rows * cols);
}

// How much more of the rounding error of x [rows][cols] lies along the gradient, row by row, than of white noise spread
// evenly over the rows.
static inline double along_gradient(const snip_recipe *recipe, const float *x, const double *gradient, int rows,
                                    int cols) {
    float *q = quantized(recipe, x, rows, cols, 0);
    double along = 0, g_sq = 0, e_sq = 0;
    for (int i = 0; i < rows; i++) {
        double dot = 0;
        for (int j = 0; j < cols; j++) {
            double e = (double)q[i * cols + j] - (double)x[i * cols + j], g = gradient[i * cols + j];
            dot += e * g;
            g_sq += g * g;
            e_sq += e * e;
        }
        along += dot * dot;
    }
    return along / (g_sq * e_sq) * rows * cols;
}

// ---- a model: X -> W1 -> tanh -> W2 -> Y, L = |Y - T|^2 / 2 ----

typedef struct {
    int rows, in, hid, out, micros;       // rows: of all micro-batches together
    float *x, *t;                         // [rows][in], [rows][out]
    float *w[2], *b[2], *dw[2], *db[2];   // [out][in], [out]
    float *m[2], *v[2];                   // [out][in]
    float *h, *a, *y, *dy, *da, *dh;      // [rows][hid or out]; h before tanh, a after
    float *noise_h, *noise_y, *noise_da;  // added to the outputs of fwd 0, fwd 1 and dgrad 1, if not NULL
    snip_mode eval_between;               // evaluates in this mode before each pass; SNIP_TRAIN: not
    double loss;
} model;

static inline int weights_of(const model *n, int layer) { return layer ? n->out * n->hid : n->hid * n->in; }

static inline model model_new(uint64_t seed, int rows, int in, int hid, int out) {
    model n;
    memset(&n, 0, sizeof n);
    random_state = seed;
    n.rows = rows;
    n.in = in;
    n.hid = hid;
    n.out = out;
    n.micros = 1;
    n.x = randoms(rows * in, 1);
    n.w[0] = randoms(hid * in, 1 / sqrtf((float)in));
    n.w[1] = randoms(out * hid, 1 / sqrtf((float)hid));
    n.t = randoms(rows * out, 0.5f);
    n.h = floats(rows * hid);
    n.a = floats(rows * hid);
    n.y = floats(rows * out);
    n.dy = floats(rows * out);
    n.da = floats(rows * hid);
    n.dh = floats(rows * hid);
    for (int l = 0; l < 2; l++) {
        int count = weights_of(&n, l), width = l ? out : hid;
        n.b[l] = randoms(width, 0.1f);
        n.db[l] = floats(width);
        n.dw[l] = floats(count);
        n.m[l] = floats(count);
        n.v[l] = floats(count);
        for (int i = 0; i < count; i++) {
            n.m[l][i] = 0.1f * normal();
            n.v[l][i] = 0.05f + 0.1f * fabsf(normal());
        }
    }
    return n;
}

static inline model model_small(void) { return model_new(3, 20, 12, 24, 8); }

static inline void model_add(const model *n, snip *s) {
    CHECK(snip_add_linear(s, "0.mlp.up", n->hid, n->in, 0) == 0);
    CHECK(snip_add_linear(s, "0.mlp.down", n->out, n->hid, 0) == 1);
}

static inline void model_bind(const model *n, snip *s) {
    for (int l = 0; l < 2; l++) CHECK(snip_bind_adamw(s, l, n->m[l], n->v[l]) == SNIP_OK);
}

// A session for the model, its AdamW bound.
static inline snip *model_session(const model *n, const snip_desc *d) {
    snip *s = session_open(d);
    model_add(n, s);
    model_bind(n, s);
    return s;
}

static inline snip_status worse(snip_status a, snip_status b) { return a > b ? a : b; }

// Forward and backward of `rows` rows from row `first` on, the loss and the gradients added; the worst status.
static inline snip_status model_micro_batch(model *n, snip *s, int first, int rows) {
    float *x = n->x + first * n->in, *h = n->h + first * n->hid, *a = n->a + first * n->hid;
    float *y = n->y + first * n->out, *t = n->t + first * n->out, *dy = n->dy + first * n->out;
    float *da = n->da + first * n->hid, *dh = n->dh + first * n->hid;
    snip_status worst = snip_linear_forward(s, 0, h, x, n->w[0], n->b[0], rows);
    for (int i = 0; i < rows * n->hid; i++) a[i] = tanhf(h[i] + (n->noise_h ? n->noise_h[first * n->hid + i] : 0));
    worst = worse(worst, snip_linear_forward(s, 1, y, a, n->w[1], n->b[1], rows));
    for (int i = 0; i < rows * n->out; i++) {
        dy[i] = y[i] + (n->noise_y ? n->noise_y[first * n->out + i] : 0) - t[i];
        n->loss += 0.5 * (double)dy[i] * (double)dy[i];
    }
    memset(da, 0, (size_t)(rows * n->hid) * sizeof *da);
    worst = worse(worst, snip_linear_backward(s, 1, da, n->dw[1], n->db[1], dy, a, n->w[1], rows));
    for (int i = 0; i < rows * n->hid; i++)
        dh[i] = (da[i] + (n->noise_da ? n->noise_da[first * n->hid + i] : 0)) * (1 - a[i] * a[i]);
    return worse(worst, snip_linear_backward(s, 0, NULL, n->dw[0], n->db[0], dh, x, n->w[0], rows));
}

// One pass over all micro-batches from zeroed gradients; the worst status of its calls.
static inline snip_status model_pass(model *n, snip *s) {
    snip_status worst = SNIP_OK;
    n->loss = 0;
    for (int l = 0; l < 2; l++) {
        memset(n->dw[l], 0, (size_t)weights_of(n, l) * sizeof(float));
        memset(n->db[l], 0, (size_t)(l ? n->out : n->hid) * sizeof(float));
    }
    if (n->eval_between != SNIP_TRAIN) {
        worst = worse(worst, snip_set_mode(s, n->eval_between));
        worst = worse(worst, snip_linear_forward(s, 0, n->h, n->x, n->w[0], n->b[0], n->rows));
        worst = worse(worst, snip_linear_forward(s, 1, n->y, n->h, n->w[1], NULL, n->rows / 2));
        worst = worse(worst, snip_set_mode(s, SNIP_TRAIN));
    }
    for (int micro = 0; micro < n->micros; micro++) {
        int first = n->rows * micro / n->micros, end = n->rows * (micro + 1) / n->micros;
        worst = worse(worst, model_micro_batch(n, s, first, end - first));
    }
    return worst;
}

#if defined(__clang__)
#    define TEST_AS_WRITTEN __attribute__((optnone))  // -Ofast rounds vectors and single elements differently, by how
#else                                                 // the arrays lie
#    define TEST_AS_WRITTEN
#endif

TEST_AS_WRITTEN static inline void model_update(model *n, const snip_adamw *o) {
    float b1 = (float)o->beta1, b2 = (float)o->beta2;
    float c1 = (float)(1 / (1 - pow(o->beta1, (double)o->step))),
          c2 = (float)(1 / (1 - pow(o->beta2, (double)o->step)));
    for (int l = 0; l < 2; l++)
        for (int i = 0; i < weights_of(n, l); i++) {
            float g = n->dw[l][i] * (float)o->grad_scale;
            n->m[l][i] = b1 * n->m[l][i] + (1 - b1) * g;
            n->v[l][i] = b2 * n->v[l][i] + (1 - b2) * g * g;
            n->w[l][i] -= (float)o->lr * (n->m[l][i] * c1 / (sqrtf(n->v[l][i] * c2) + (float)o->eps));
        }
}

// A whole step that leaves the weights and the optimizer's state alone.
static inline snip_status model_still_step(model *n, snip *s, int64_t step) {
    snip_adamw o = optimizer(step);
    do model_pass(n, s);
    while (snip_next_pass(s, n->loss));
    return snip_end_step(s, &o);
}

static inline snip_status model_step(model *n, snip *s, int64_t step) {
    snip_adamw o = optimizer(step);
    do model_pass(n, s);
    while (snip_next_pass(s, n->loss));
    model_update(n, &o);
    return snip_end_step(s, &o);
}

// ---- a bundle: layers that do not know of each other ----

enum { BUNDLE = 7, BUNDLE_ROWS = 24, BUNDLE_WIDEST = 64 };

static const struct {
    const char *name;
    int out, in, stage;
} bundle_layers[BUNDLE] = {
    {"0.attn.q",    16, 16, 0},
    { "0.attn.k",   32, 16, 0},
    { "1.mlp.up",   16, 48, 0},
    { "1.mlp.down", 24, 24, 1},
    { "x",          8,  64, 1},
    { "2.y",        40, 8,  2},
    { "2.z",        16, 20, 2},
};

typedef struct {
    float *x[BUNDLE], *w[BUNDLE], *dy[BUNDLE], *m[BUNDLE], *v[BUNDLE];
} bundle;

static inline bundle bundle_new(void) {
    bundle b;
    random_state = 99;
    for (int l = 0; l < BUNDLE; l++) {
        int out = bundle_layers[l].out, in = bundle_layers[l].in;
        b.x[l] = randoms(BUNDLE_ROWS * in, 1);
        b.w[l] = randoms(out * in, 0.2f);
        b.dy[l] = randoms(BUNDLE_ROWS * out, 0.1f);
        b.m[l] = randoms(out * in, 0.1f);
        b.v[l] = floats(out * in);
        for (int i = 0; i < out * in; i++) b.v[l][i] = 0.01f + 0.1f * fabsf(normal());
    }
    return b;
}

// A session of the first `layers` of them in three stages, which measures every step where d leaves that open.
static inline snip *bundle_session(const bundle *b, snip_desc d, int layers) {
    d.n_stages = 3;
    if (!d.every) d.every = 1;
    snip *s = session_open(&d);
    for (int l = 0; l < layers; l++) {
        CHECK(snip_add_linear(s, bundle_layers[l].name, bundle_layers[l].out, bundle_layers[l].in,
                              bundle_layers[l].stage) == l);
        CHECK(snip_bind_adamw(s, l, b->m[l], b->v[l]) == SNIP_OK);
    }
    return s;
}

static inline snip_status bundle_step(const bundle *b, snip *s, int64_t step) {
    snip_adamw o = optimizer(step);
    float y[BUNDLE_ROWS * BUNDLE_WIDEST], dx[BUNDLE_ROWS * BUNDLE_WIDEST], dw[BUNDLE_WIDEST * BUNDLE_WIDEST];
    do
        for (int l = 0; l < snip_layers(s); l++) {
            snip_linear_forward(s, l, y, b->x[l], b->w[l], NULL, BUNDLE_ROWS);
            memset(dx, 0, sizeof dx);
            memset(dw, 0, sizeof dw);
            snip_linear_backward(s, l, dx, dw, NULL, b->dy[l], b->x[l], b->w[l], BUNDLE_ROWS);
        }
    while (snip_next_pass(s, 2.5));
    return snip_end_step(s, &o);
}

#endif
