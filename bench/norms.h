// norms.h - what the norm-only estimators see; shared by fidelity.c and quality.c.
//
// Include snip.h and llama.h first. norms_watch(model) puts norms_linear_backward in front of the model's linear
// layers: on the clean pass of a measuring step it keeps the squared Frobenius norms of every operand, gradient and
// quantization error.
//   snip, loss     sqrt(|dX|^2 |e_X|^2 / n_X + |dW|^2 |e_W|^2 / n_W)
//   snip, weight   each GEMM's squared relative output error, from norms ((|e_A| / |A|)^2 + (|e_B| / |B|)^2), times
//                  what it is worth in the layer's own next update: |D|^2 |dW|^2 / (n_W |W|^2)
// The paper's kind: norms and optimizer state; how the whole model answers to a layer's error is unknown.
#ifndef NORMS_H
#define NORMS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NORMS_LAYERS = 1024 };

enum { NORMS_FP8, NORMS_FP4, NORMS_FORMATS };

static const snip_format norms_formats[NORMS_FORMATS] = { SNIP_E4M3, SNIP_E2M1 };

typedef struct {  // squared norms
    double x, w, dy, dx, dw;
    double n_x, n_w;  // elements of X and W
    double d;         // of D at learning rate 1
    double e_x[NORMS_FORMATS], e_w[NORMS_FORMATS], e_dy[NORMS_FORMATS];
} norms_layer;

static norms_layer norms[NORMS_LAYERS];

static inline double norms_sum_sq(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

// Squared error of x [rows][cols] under the recipe; out: room for as much.
static inline double norms_error(const snip_recipe *recipe, const float *x, int64_t rows, int64_t cols, float *out) {
    snip_rng_key key = { 1, 0, 0 };
    snip_quant_stats stats;
    memset(&stats, 0, sizeof stats);
    snip_fake_quantize(recipe, x, rows, cols, cols, out, cols, key, NULL, &stats);
    return stats.err_sq;
}

// dinp: of this layer alone. room: for the largest of X, W and dY.
static inline void norms_take(snip *s, int layer, const float *dinp, const float *dweight, const float *dout,
                              const float *inp, const float *weight, int64_t rows, float *room) {
    const snip_desc *desc = snip_settings(s);
    norms_layer *norm = &norms[layer];
    snip_layer_info info;
    snip_layer(s, layer, &info);
    int64_t n = info.out_features, k = info.in_features;
    memset(norm, 0, sizeof *norm);
    norm->n_x = (double)(rows * k);
    norm->n_w = (double)(n * k);
    norm->x = norms_sum_sq(inp, rows * k);
    norm->w = norms_sum_sq(weight, n * k);
    norm->dy = norms_sum_sq(dout, rows * n);
    norm->dx = norms_sum_sq(dinp, rows * k);
    norm->dw = norms_sum_sq(dweight, n * k);
    snip_layer_sensitivity(s, layer, room);
    norm->d = norms_sum_sq(room, n * k);
    for (int f = 0; f < NORMS_FORMATS; f++) {
        const snip_recipes *recipes = f == NORMS_FP8 ? &desc->fp8 : &desc->fp4;
        norm->e_x[f] = norms_error(&recipes->activation, inp, rows, k, room);
        norm->e_w[f] = norms_error(&recipes->weight, weight, n, k, room);
        norm->e_dy[f] = norms_error(&recipes->gradient, dout, rows, n, room);
    }
}

// snip_linear_backward; dweight must be 0 before.
static inline snip_status norms_linear_backward(snip *s, int layer, float *dinp, float *dweight, float *dbias,
                                                const float *dout, const float *inp, const float *weight,
                                                int64_t rows) {
    snip_layer_info info;
    if (snip_current_pass(s) != SNIP_PASS_CLEAN || layer >= NORMS_LAYERS || snip_layer(s, layer, &info))
        return snip_linear_backward(s, layer, dinp, dweight, dbias, dout, inp, weight, rows);
    int64_t n = info.out_features, k = info.in_features, high = rows > n ? rows : n, wide = n > k ? n : k;
    float *own = (float *)calloc((size_t)(rows * k), sizeof *own);
    float *room = (float *)malloc((size_t)(high * wide) * sizeof *room);
    snip_status status = SNIP_OUT_OF_MEMORY;
    if (own && room) {
        status = snip_linear_backward(s, layer, own, dweight, dbias, dout, inp, weight, rows);
        for (int64_t i = 0; dinp && i < rows * k; i++) dinp[i] += own[i];
        norms_take(s, layer, own, dweight, dout, inp, weight, rows, room);
    }
    free(own);
    free(room);
    return status;
}

static inline void norms_watch(llama *model) { model->linear_backward = norms_linear_backward; }

static inline double norms_ratio(double a, double b) { return b > 0 ? a / b : 0; }

static inline double norms_loss(const norms_layer *norm, int f) {
    return sqrt(norms_ratio(norm->dx * norm->e_x[f], norm->n_x) + norms_ratio(norm->dw * norm->e_w[f], norm->n_w));
}

// Squared error of a GEMM's operands, absolute or relative to their size.
static inline double norms_operands(const norms_layer *norm, int f, int gemm, int relative) {
    double a = gemm == SNIP_FWD ? norm->x : norm->dy, e_a = gemm == SNIP_FWD ? norm->e_x[f] : norm->e_dy[f];
    double b = gemm == SNIP_WGRAD ? norm->x : norm->w, e_b = gemm == SNIP_WGRAD ? norm->e_x[f] : norm->e_w[f];
    return relative ? norms_ratio(e_a, a) + norms_ratio(e_b, b) : e_a + e_b;
}

static inline double norms_weight(const norms_layer *norm, int f, int gemm) {
    return norms_operands(norm, f, gemm, 1) * norms_ratio(norm->d * norm->dw, norm->n_w * norm->w);
}

#define NORMS_RECIPES "default, rne, tensor, tensor-sr, mxfp4 or nvfp4"

// Recipes by name, into desc; 0: no such name.
//   default           the library's own
//   rne               gradients to nearest
//   tensor            that, and one scale a tensor
//   tensor-sr         one scale a tensor
//   mxfp4, nvfp4      with MXFP8; gradients rounded stochastically in FP4
static inline int norms_recipes(snip_desc *desc, const char *name) {
    static const snip_recipe fp8_tile = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK;
    static const snip_recipe fp4_tile = SNIP_RECIPE_FP4_TILE, fp4_block = SNIP_RECIPE_FP4_BLOCK;
    static const snip_recipe mxfp8 = SNIP_RECIPE_MXFP8, mxfp4 = SNIP_RECIPE_MXFP4, nvfp4 = SNIP_RECIPE_NVFP4;
    int mx = !strcmp(name, "mxfp4"), nv = !strcmp(name, "nvfp4"), nearest = 0, tensor = 0;
    if (!strcmp(name, "rne"))
        nearest = 1;
    else if (!strcmp(name, "tensor"))
        nearest = tensor = 1;
    else if (!strcmp(name, "tensor-sr"))
        tensor = 1;
    else if (!mx && !nv && strcmp(name, "default"))
        return 0;

    snip_recipe *all[6] = { &desc->fp8.activation, &desc->fp8.weight, &desc->fp8.gradient,
                            &desc->fp4.activation, &desc->fp4.weight, &desc->fp4.gradient };
    for (int i = 0; i < 6; i++) {
        int fp8 = i < 3, weight = i % 3 == 1;
        if (mx || nv)
            *all[i] = fp8 ? mxfp8 : mx ? mxfp4 : nvfp4;
        else if (fp8)
            *all[i] = weight ? fp8_block : fp8_tile;
        else
            *all[i] = weight ? fp4_block : fp4_tile;
        if (tensor) all[i]->tile_rows = all[i]->tile_cols = 0;
    }
    if (!nearest) desc->fp4.gradient.rounding = SNIP_ROUND_STOCHASTIC;
    return 1;
}
#endif  // NORMS_H
