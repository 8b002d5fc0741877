// norms.h - what the norm-only estimators see; shared by fidelity.c and quality.c.
//
// Include after snip.h (with its implementation) and before llama.h: llama.h's linear layers are routed through here,
// and on the clean pass of a measuring step the Frobenius norms of every operand, gradient and quantization error are
// kept.
//   snip, loss     sqrt(|dX|^2 |e_X|^2 / n_X + |dW|^2 |e_W|^2 / n_W)
//   snip, weight   each GEMM's squared relative output error, from norms ((|e_A|/|A|)^2 + (|e_B|/|B|)^2), times what it
//   is
//                  worth in the layer's own next update: |D|^2 |dW|^2 / (n_W |W|^2)
// The paper's kind: norms and optimizer state, the size of the whole model's answer to a layer's error unknown.
#ifndef NORMS_H
#define NORMS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NORMS_LAYERS = 1024, NORMS_FORMATS = 2 };

static const snip_format norms_formats[NORMS_FORMATS] = { SNIP_E4M3, SNIP_E2M1 };

typedef struct {
    double x, w, dy, dx, dw, n_x, n_w, d;  // squared norms; d: of D at learning rate 1
    double e_x[NORMS_FORMATS], e_w[NORMS_FORMATS], e_dy[NORMS_FORMATS];
} norms_layer;

static norms_layer norms[NORMS_LAYERS];

static inline double norms_error(const snip *s, snip_format format, snipi_kind kind, const float *x, int64_t rows,
                                 int64_t cols, float *out) {
    snip_recipe recipe = snipi_recipe_of(s, format, kind);
    snip_rng_key key = { 1, 0, 0 };
    snip_quant_stats stats;
    memset(&stats, 0, sizeof stats);
    snip_fake_quantize(&recipe, x, rows, cols, cols, out, cols, key, NULL, &stats);
    return stats.err_sq;
}

static inline snip_status norms_linear_backward(snip *s, int layer, float *dinp, float *dweight, float *dbias,
                                                const float *dout, const float *inp, const float *weight,
                                                int64_t rows) {
    if (snip_current_pass(s) != SNIP_PASS_CLEAN || layer >= NORMS_LAYERS)
        return snip_linear_backward(s, layer, dinp, dweight, dbias, dout, inp, weight, rows);
    snip_layer_info info;
    snip_layer(s, layer, &info);
    int64_t n = info.out_features, k = info.in_features, most = n > k ? n : k;
    float *own = (float *)calloc((size_t)(rows * k), sizeof *own),
          *out = (float *)malloc((size_t)((rows > n ? rows : n) * most) * sizeof *out);
    if (!own || !out) {
        free(own);
        free(out);
        return SNIP_OUT_OF_MEMORY;
    }
    norms_layer *q = &norms[layer];
    memset(q, 0, sizeof *q);
    snip_status status = snip_linear_backward(s, layer, own, dweight, dbias, dout, inp, weight,
                                              rows);  // dweight: zero before
    for (int64_t i = 0; dinp && i < rows * k; i++) dinp[i] += own[i];
    q->n_x = (double)(rows * k);
    q->n_w = (double)(n * k);
    q->x = snipi_sum_sq(inp, rows * k);
    q->w = snipi_sum_sq(weight, n * k);
    q->dy = snipi_sum_sq(dout, rows * n);
    q->dx = snipi_sum_sq(own, rows * k);
    q->dw = snipi_sum_sq(dweight, n * k);
    q->d = s->layers[layer].sensitivity_sq;
    for (int f = 0; f < NORMS_FORMATS; f++) {
        q->e_x[f] = norms_error(s, norms_formats[f], SNIPI_ACTIVATION, inp, rows, k, out);
        q->e_w[f] = norms_error(s, norms_formats[f], SNIPI_WEIGHT, weight, n, k, out);
        q->e_dy[f] = norms_error(s, norms_formats[f], SNIPI_GRADIENT, dout, rows, n, out);
    }
    free(own);
    free(out);
    return status;
}

#define snip_linear_backward norms_linear_backward

static inline double norms_ratio(double a, double b) { return b > 0 ? a / b : 0; }

static inline double norms_loss(const norms_layer *q, int f) {
    return sqrt(norms_ratio(q->dx * q->e_x[f], q->n_x) + norms_ratio(q->dw * q->e_w[f], q->n_w));
}

static inline double norms_weight(const norms_layer *q, int f, int gemm) {
    double x = norms_ratio(q->e_x[f], q->x), w = norms_ratio(q->e_w[f], q->w), dy = norms_ratio(q->e_dy[f], q->dy);
    double relative = gemm == SNIP_FWD ? x + w : gemm == SNIP_DGRAD ? dy + w : dy + x;
    return relative * norms_ratio(q->d * q->dw, q->n_w * q->w);
}

// Squared error of a GEMM's operands, absolute or relative to their size.
static inline double norms_operands(const norms_layer *q, int f, int gemm, int relative) {
    double a = gemm == SNIP_FWD ? q->x : q->dy, b = gemm == SNIP_WGRAD ? q->x : q->w;
    double e_a = gemm == SNIP_FWD ? q->e_x[f] : q->e_dy[f], e_b = gemm == SNIP_WGRAD ? q->e_x[f] : q->e_w[f];
    return relative ? norms_ratio(e_a, a) + norms_ratio(e_b, b) : e_a + e_b;
}

// Recipes by name, into desc: "default"; "rne": gradients to nearest; "tensor": that, and one scale a tensor;
// "tensor-sr": one scale a tensor; "mxfp4", with MXFP8, and "nvfp4", with MXFP8, gradients rounded stochastically in
// FP4. 0: no such name.
static inline int norms_recipes(snip_desc *desc, const char *name) {
    static const snip_recipe tile8 = SNIP_RECIPE_FP8_TILE, block8 = SNIP_RECIPE_FP8_BLOCK, tile4 = SNIP_RECIPE_FP4_TILE,
                             block4 = SNIP_RECIPE_FP4_BLOCK;
    static const snip_recipe mx8 = SNIP_RECIPE_MXFP8, mx4 = SNIP_RECIPE_MXFP4, nv4 = SNIP_RECIPE_NVFP4;
    int mx = !strcmp(name, "mxfp4"), nv = !strcmp(name, "nvfp4"), tensor = !strncmp(name, "tensor", 6),
        nearest = !strcmp(name, "tensor") || !strcmp(name, "rne");
    snip_recipe *all[6] = { &desc->fp8.activation, &desc->fp8.weight, &desc->fp8.gradient,
                            &desc->fp4.activation, &desc->fp4.weight, &desc->fp4.gradient };
    if (!mx && !nv && !nearest && strcmp(name, "default") && strcmp(name, "tensor-sr")) return 0;
    for (int i = 0; i < 6; i++) {
        *all[i] = mx || nv ? i < 3 ? mx8 : mx ? mx4 : nv4 : i < 3 ? i == 1 ? block8 : tile8 : i == 4 ? block4 : tile4;
        if (tensor) all[i]->tile_rows = all[i]->tile_cols = 0;
    }
    if (!nearest) desc->fp4.gradient.rounding = SNIP_ROUND_STOCHASTIC;
    return 1;
}
#endif  // NORMS_H
