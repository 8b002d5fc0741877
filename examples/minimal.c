// minimal.c - the smallest complete use of a snip session in a hand-written trainer: an MLP of three
// linear layers learns a function of 64 inputs, with AdamW.  Lines marked (snip) are all that snip adds.
//     cc -O2 examples/minimal.c -o minimal -lm && ./minimal
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define SNIP_IMPLEMENTATION  // (snip)
#include "../snip.h"         // (snip)

enum { ROWS = 128, IN = 64, HID = 256, OUT = 32, LAYERS = 3, STEPS = 300 };

static const int width[LAYERS + 1] = { IN, HID, HID, OUT };
static const char *const name[LAYERS] = { "0.mlp.up", "0.mlp.mix", "0.mlp.down" };

typedef struct {
    float *w, *dw, *m, *v, *y, *dy;
    int n, layer;
} linear;  // y (ROWS, out): its output, before ReLU

static float *floats(int n) {
    float *p = calloc((size_t)n, sizeof *p);
    if (!p) exit(1);
    return p;
}

static float uniform(void) {  // in -1 .. 1
    static unsigned s = 1;
    s = s * 1664525u + 1013904223u;
    return (float)(s >> 8) / 8388608.0f - 1.0f;
}

int main(void) {
    float *x[LAYERS], *dx = floats(ROWS * HID), lr = 2e-3f, b1 = 0.9f, b2 = 0.99f, eps = 1e-8f;
    linear fc[LAYERS];
    snip_desc desc = { 0 };        // (snip)
    desc.budget = 0.75;            // (snip)
    desc.every = 100;              // (snip)
    snip *s = snip_create(&desc);  // (snip)
    if (!s) {
        fprintf(stderr, "%s\n", snip_status_text(snip_desc_check(&desc)));
        return 2;
    }  // (snip)
    for (int l = 0; l < LAYERS; l++) {
        linear *f = &fc[l];
        f->n = width[l + 1] * width[l];
        f->w = floats(f->n);
        f->dw = floats(f->n);
        f->m = floats(f->n);
        f->v = floats(f->n);
        f->y = floats(ROWS * width[l + 1]);
        f->dy = floats(ROWS * width[l + 1]);
        x[l] = floats(ROWS * width[l]);
        for (int i = 0; i < f->n; i++) f->w[i] = uniform() * sqrtf(6.0f / (float)width[l]);
        f->layer = snip_add_linear(s, name[l], width[l + 1], width[l], 0);  // (snip)
        snip_bind_adamw(s, f->layer, f->m, f->v);                           // (snip)
    }
    for (int step = 1; step <= STEPS; step++) {
        double loss;
        float *target = floats(ROWS * OUT);
        for (int i = 0; i < ROWS * IN; i++) x[0][i] = uniform();
        for (int i = 0; i < ROWS * OUT; i++) {
            const float *r = x[0] + i / OUT * IN + i % OUT;
            target[i] = fabsf(r[0] + r[1]) - r[2];
        }
        do {  // (snip)
            for (int l = 0; l < LAYERS; l++) {
                memset(fc[l].dw, 0, sizeof(float) * (size_t)fc[l].n);
                snip_linear_forward(s, fc[l].layer, fc[l].y, x[l], fc[l].w, NULL, ROWS);  // was: matmul_forward
                for (int i = 0; l + 1 < LAYERS && i < ROWS * HID; i++) x[l + 1][i] = fc[l].y[i] > 0 ? fc[l].y[i] : 0;
            }
            loss = 0;
            for (int i = 0; i < ROWS * OUT; i++) {
                float e = fc[LAYERS - 1].y[i] - target[i];
                loss += (double)(e * e) / (ROWS * OUT);
                fc[LAYERS - 1].dy[i] = 2 * e / (ROWS * OUT);
            }
            for (int l = LAYERS - 1; l >= 0; l--) {
                memset(dx, 0, sizeof(float) * ROWS * HID);
                snip_linear_backward(s, fc[l].layer, l ? dx : NULL, fc[l].dw, NULL, fc[l].dy, x[l], fc[l].w, ROWS);
                for (int i = 0; l && i < ROWS * HID; i++) fc[l - 1].dy[i] = fc[l - 1].y[i] > 0 ? dx[i] : 0;
            }
        } while (snip_next_pass(s, loss));  // (snip)
        for (int l = 0; l < LAYERS; l++)
            for (int i = 0; i < fc[l].n; i++) {
                linear *f = &fc[l];
                f->m[i] = b1 * f->m[i] + (1 - b1) * f->dw[i];
                f->v[i] = b2 * f->v[i] + (1 - b2) * f->dw[i] * f->dw[i];
                f->w[i] -= lr * (f->m[i] / (1 - powf(b1, (float)step)) /
                                     (sqrtf(f->v[i] / (1 - powf(b2, (float)step))) + eps) +
                                 0.01f * f->w[i]);
            }
        snip_adamw update = { lr, b1, b2, eps, step, 1 };                                        // (snip)
        if (snip_end_step(s, &update)) fprintf(stderr, "step %d: %s\n", step, snip_message(s));  // (snip)
        if (step % 50 == 0) printf("step %d  loss %.4f  FP4 %.0f%%\n", step, loss, 100 * snip_share(s, SNIP_E2M1));
        free(target);
    }
    snip_plan_print(s, stdout);  // (snip)
    snip_destroy(s);             // (snip)
    return 0;
}
