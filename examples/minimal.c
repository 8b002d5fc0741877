// minimal.c - the smallest complete use of a snip session in a hand-written trainer: an MLP of three linear layers
// learns a function of 64 inputs, with AdamW. Lines marked (snip) are all that snip adds.
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

static struct {
    float w[HID * HID], dw[HID * HID], m[HID * HID], v[HID * HID];  // [out][in]
    float x[ROWS * HID];                                            // [ROWS][in] input
    float y[ROWS * HID], dy[ROWS * HID];                            // [ROWS][out] output, before ReLU
    int n, layer;                                                   // weights, and index in the session
} fc[LAYERS];

static float target[ROWS * OUT], dx[ROWS * HID];

static float uniform(void) {  // in -1 .. 1
    static unsigned s = 1;
    s = s * 1664525u + 1013904223u;
    return (float)(s >> 8) / 8388608.0f - 1.0f;
}

static double forward(snip *s) {  // returns the loss
    double loss = 0;
    for (int l = 0; l < LAYERS; l++) {
        // In place of matmul_forward (snip)
        snip_linear_forward(s, fc[l].layer, fc[l].y, fc[l].x, fc[l].w, NULL, ROWS);
        for (int i = 0; l + 1 < LAYERS && i < ROWS * HID; i++) fc[l + 1].x[i] = fc[l].y[i] > 0 ? fc[l].y[i] : 0;
    }
    for (int i = 0; i < ROWS * OUT; i++) {
        float e = fc[LAYERS - 1].y[i] - target[i];
        loss += (double)(e * e) / (ROWS * OUT);
        fc[LAYERS - 1].dy[i] = 2 * e / (ROWS * OUT);
    }
    return loss;
}

static void backward(snip *s) {
    for (int l = LAYERS - 1; l >= 0; l--) {
        memset(dx, 0, sizeof dx);
        memset(fc[l].dw, 0, sizeof fc[l].dw);
        // In place of matmul_backward (snip)
        snip_linear_backward(s, fc[l].layer, l ? dx : NULL, fc[l].dw, NULL, fc[l].dy, fc[l].x, fc[l].w, ROWS);
        for (int i = 0; l && i < ROWS * HID; i++) fc[l - 1].dy[i] = fc[l - 1].y[i] > 0 ? dx[i] : 0;
    }
}

static void adamw(int l, const snip_adamw *o) {
    float b1 = (float)o->beta1, b2 = (float)o->beta2, *w = fc[l].w, *m = fc[l].m, *v = fc[l].v;
    float m_bias = 1 - powf(b1, (float)o->step), v_bias = 1 - powf(b2, (float)o->step);
    for (int i = 0; i < fc[l].n; i++) {
        m[i] = b1 * m[i] + (1 - b1) * fc[l].dw[i];
        v[i] = b2 * v[i] + (1 - b2) * fc[l].dw[i] * fc[l].dw[i];
        w[i] -= (float)o->lr * (m[i] / m_bias / (sqrtf(v[i] / v_bias) + (float)o->eps) + 0.01f * w[i]);
    }
}

int main(void) {
    snip_desc desc = { 0 };                    // (snip)
    desc.budget = 0.75;                        // (snip)
    desc.every = 100;                          // (snip)
    const char *why = snip_desc_error(&desc);  // (snip)
    if (why) fprintf(stderr, "%s\n", why);     // (snip)
    snip *s = snip_create(&desc);              // (snip)
    if (!s) return 2;
    for (int l = 0; l < LAYERS; l++) {
        fc[l].n = width[l + 1] * width[l];
        for (int i = 0; i < fc[l].n; i++) fc[l].w[i] = uniform() * sqrtf(6.0f / (float)width[l]);
        fc[l].layer = snip_add_linear(s, name[l], width[l + 1], width[l], 0);  // (snip)
        snip_bind_adamw(s, fc[l].layer, fc[l].m, fc[l].v);                     // (snip)
    }
    for (int step = 1; step <= STEPS; step++) {
        snip_adamw update = { 2e-3, 0.9, 0.99, 1e-8, step, 1 };
        double loss;
        for (int i = 0; i < ROWS * IN; i++) fc[0].x[i] = uniform();
        for (int i = 0; i < ROWS * OUT; i++) {
            const float *r = fc[0].x + i / OUT * IN + i % OUT;
            target[i] = fabsf(r[0] + r[1]) - r[2];
        }
        do {  // (snip)
            loss = forward(s);
            backward(s);
        } while (snip_next_pass(s, loss));                                           // (snip)
        for (int l = 0; l < LAYERS && !snip_step_status(s); l++) adamw(l, &update);  // (snip): the condition
        if (snip_end_step(s, &update)) fprintf(stderr, "step %d: %s\n", step, snip_message(s));  // (snip)
        if (step % 50 == 0) printf("step %d  loss %.4f  FP4 %.0f%%\n", step, loss, 100 * snip_share(s, SNIP_E2M1));
    }
    snip_plan_print(s, stdout);  // (snip)
    snip_destroy(s);             // (snip)
    return 0;
}
