// The example model against an independent double-precision one: gradients by central differences, gradient
// accumulation, independence of the number of threads; and the checkpoint format: what is written comes back, and no
// damaged byte gets through. Public names of snip.h alone.
#define _FILE_OFFSET_BITS 64
#include "test.h"
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"

// ---- the reference: the same mathematics in double precision, written as plainly as possible ----
static void ref_norm(double *out, const double *x, const double *w, int d) {
    double s = 0;
    for (int i = 0; i < d; i++) s += x[i] * x[i];
    s = 1 / sqrt(s / d + 1e-5);
    for (int i = 0; i < d; i++) out[i] = x[i] * s * w[i];
}

static void ref_linear(double *y, const double *x, const double *w, int out, int in) {
    for (int o = 0; o < out; o++) {
        y[o] = 0;
        for (int i = 0; i < in; i++) y[o] += x[i] * w[o * in + i];
    }
}

static void ref_rope(double *x, int heads, int hd, int t) {
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < hd / 2; i++) {
            double a = t * pow(10000.0, -2.0 * i / hd), u = x[h * hd + i], v = x[h * hd + i + hd / 2];
            x[h * hd + i] = u * cos(a) - v * sin(a);
            x[h * hd + i + hd / 2] = u * sin(a) + v * cos(a);
        }
}

static double *grab(int64_t n) {  // the reference runs many times a test: its memory is freed at once
    double *p = (double *)calloc((size_t)n, sizeof *p);
    if (!p) exit(1);
    return p;
}

// Mean cross-entropy over all tokens; p is laid out as llama.params.
static double ref_loss(const llama *g, const double *p, const int32_t *tok, const int32_t *tgt, int sequences) {
    const llama_config *c = &g->config;
    int T = c->seq, d = c->dim, H = c->heads, hd = d / H, kv = hd * c->kv_heads, f = c->ffn;
    double *x = grab((int64_t)T * d), *n = grab((int64_t)T * d), *q = grab((int64_t)T * d), *k = grab((int64_t)T * kv),
           *v = grab((int64_t)T * kv);
    double *a = grab(d), *s = grab(T), *gate = grab(f), *up = grab(f), *y = grab(d), *z = grab(c->vocab), total = 0;
    for (int b = 0; b < sequences; b++, tok += T, tgt += T) {
        for (int t = 0; t < T; t++)
            for (int i = 0; i < d; i++) x[t * d + i] = p[g->tensors[g->embed].offset + tok[t] * d + i];
        for (int l = 0; l < c->blocks; l++) {
            const llama_block *B = &g->block[l];
            const double *w[LLAMA_LINEARS];
            for (int j = 0; j < LLAMA_LINEARS; j++) w[j] = p + g->tensors[B->lin[j]].offset;
            for (int t = 0; t < T; t++) {
                ref_norm(n, x + t * d, p + g->tensors[B->norm1].offset, d);
                ref_linear(q + t * d, n, w[LLAMA_Q], d, d);
                ref_linear(k + t * kv, n, w[LLAMA_K], kv, d);
                ref_linear(v + t * kv, n, w[LLAMA_V], kv, d);
                ref_rope(q + t * d, H, hd, t);
                ref_rope(k + t * kv, c->kv_heads, hd, t);
            }
            for (int t = 0; t < T; t++) {
                for (int h = 0; h < H; h++) {
                    int kh = h / (H / c->kv_heads) * hd;
                    double sum = 0;
                    for (int j = 0; j <= t; j++) {
                        double dot = 0;
                        for (int i = 0; i < hd; i++) dot += q[t * d + h * hd + i] * k[j * kv + kh + i];
                        sum += s[j] = exp(dot / sqrt(hd));
                    }
                    for (int i = 0; i < hd; i++) {
                        a[h * hd + i] = 0;
                        for (int j = 0; j <= t; j++) a[h * hd + i] += s[j] / sum * v[j * kv + kh + i];
                    }
                }
                ref_linear(y, a, w[LLAMA_O], d, d);
                for (int i = 0; i < d; i++) x[t * d + i] += y[i];
                ref_norm(n, x + t * d, p + g->tensors[B->norm2].offset, d);
                ref_linear(gate, n, w[LLAMA_GATE], f, d);
                ref_linear(up, n, w[LLAMA_UP], f, d);
                for (int i = 0; i < f; i++) gate[i] *= up[i] / (1 + exp(-gate[i]));
                ref_linear(y, gate, w[LLAMA_DOWN], d, f);
                for (int i = 0; i < d; i++) x[t * d + i] += y[i];
            }
        }
        for (int t = 0; t < T; t++) {
            double sum = 0;
            ref_norm(n, x + t * d, p + g->tensors[g->norm].offset, d);
            ref_linear(z, n, p + g->tensors[g->output].offset, c->vocab, d);
            for (int j = 0; j < c->vocab; j++) sum += exp(z[j]);
            total += log(sum) - z[tgt[t]];
        }
    }
    free(x);
    free(n);
    free(q);
    free(k);
    free(v);
    free(a);
    free(s);
    free(gate);
    free(up);
    free(y);
    free(z);
    return total / ((double)sequences * T);
}

static snip *f32_session(void) {
    snip_desc desc = { 0 };
    desc.high = SNIP_F32;
    desc.every = -1;
    return snip_create(&desc);
}

static void random_tokens(int32_t *t, int n, int vocab, uint32_t tensor) {
    snip_rng_key key = { 5, 0, tensor };
    for (int i = 0; i < n; i++) {
        uint32_t r[4];
        snip_philox(key, (uint64_t)i, r);
        t[i] = (int32_t)(r[0] % (uint32_t)vocab);
    }
}

// Larger weights and uneven norms, so that no gradient is near zero by symmetry.
static void stir(llama *g) {
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        for (int64_t j = 0; j < t->rows * t->cols; j++)
            g->params[t->offset + j] *= t->matrix ? 8.0f : 1.0f + 0.3f * (float)(j % 5 - 2) / 2;
    }
}

static void check_gradients(int tied) {
    enum { TOKENS = 2 * 37 };

    const llama_config c = { 24, 24, 2, 6, 2, 40, 37, tied, 0, 11 };
    int32_t tok[TOKENS], tgt[TOKENS];
    snip *s = f32_session();
    llama *g = llama_create(&c, 2, s);
    double sum, *p;
    if (!CHECK(s && g)) return;
    snip_set_format(s, -1, SNIP_GEMMS, SNIP_F32);
    stir(g);
    random_tokens(tok, TOKENS, 24, 1);
    random_tokens(tgt, TOKENS, 24, 2);
    llama_zero_grad(g);
    CHECK(!llama_forward(g, s, tok, tgt, 2, 1.0f / TOKENS, &sum));
    CHECK(!llama_backward(g, s, tok, 2));
    p = grab(g->n_params);
    for (int64_t i = 0; i < g->n_params; i++) p[i] = (double)g->params[i];
    double ref = ref_loss(g, p, tok, tgt, 2);
    CHECK_THAT(fabs(sum / TOKENS - ref) < 1e-5 * ref, "the loss: %g, in double precision %g", sum / TOKENS, ref);
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        int64_t n = t->rows * t->cols, stride = n > 48 ? n / 48 | 1 : 1;
        double err = 0, norm = 0, h = 1e-5;
        for (int64_t j = 0; j < n; j += stride) {
            double *w = p + t->offset + j, keep = *w;
            *w = keep + h;
            double up = ref_loss(g, p, tok, tgt, 2);
            *w = keep - h;
            double down = ref_loss(g, p, tok, tgt, 2), want = (up - down) / (2 * h);
            *w = keep;
            err += pow((double)g->grads[t->offset + j] - want, 2);
            norm += want * want;
        }
        CHECK_THAT(norm > 0 && sqrt(err / norm) < 1e-4, "gradient of %s: off by %.3g", t->name, sqrt(err / norm));
    }
    free(p);
    llama_destroy(g);
    snip_destroy(s);
}

static void gradients_are_central_differences(void) { check_gradients(0); }

static void gradients_are_central_differences_with_tied_embeddings(void) { check_gradients(1); }

// The same four sequences as one batch of 4 and as two of 2; with one thread and with three.
static int64_t gradients_of(llama_config *c, int split, int threads, const int32_t *tok, const int32_t *tgt, float *out,
                            double *loss) {
    set_threads(threads);
    snip *s = f32_session();
    llama *g = llama_create(c, 4 / split, s);
    if (!s || !g) exit(1);
    snip_set_format(s, -1, SNIP_GEMMS, SNIP_F32);
    stir(g);
    llama_zero_grad(g);
    *loss = 0;
    for (int i = 0; i < split; i++) {
        double sum;
        int at = i * 4 / split * c->seq;
        CHECK(!llama_forward(g, s, tok + at, tgt + at, 4 / split, 1.0f / (float)(4 * c->seq), &sum));
        CHECK(!llama_backward(g, s, tok + at, 4 / split));
        *loss += sum;
    }
    out[0] = (float)llama_grad_norm(g);
    snip_adamw update = { 1e-3, 0.9, 0.95, 1e-8, 1, 1.0 };
    llama_update(g, SNIP_ADAMW, &update, 0.1);
    memcpy(out + 1, g->grads, (size_t)g->n_params * sizeof(float));
    memcpy(out + 1 + g->n_params, g->params, (size_t)g->n_params * sizeof(float));
    int64_t n = g->n_params;
    llama_destroy(g);
    snip_destroy(s);
    set_threads(1);
    return n;
}

enum { SEQUENCES = 4, SEQUENCE = 40, TOKENS = SEQUENCES * SEQUENCE, ROOM = 1 << 18 };

static llama_config small_config(void) {
    llama_config c = { 64, 32, 2, 4, 2, 48, SEQUENCE, 0, 0, 3 };
    return c;
}

static void accumulated_gradients_are_those_of_the_larger_batch(void) {
    llama_config c = small_config();
    static float whole[ROOM], parts[ROOM];
    int32_t tok[TOKENS], tgt[TOKENS];
    double loss_whole, loss_parts, err = 0, norm = 0;
    random_tokens(tok, TOKENS, 64, 3);
    random_tokens(tgt, TOKENS, 64, 4);
    int64_t n = gradients_of(&c, 1, 1, tok, tgt, whole, &loss_whole);
    gradients_of(&c, 2, 1, tok, tgt, parts, &loss_parts);
    for (int64_t i = 0; i < n + 1; i++) {  // the norm, then the gradients
        err += pow((double)(whole[i] - parts[i]), 2);
        norm += (double)whole[i] * (double)whole[i];
    }
    CHECK(fabs(loss_whole - loss_parts) < 1e-6 * loss_whole);
    CHECK_THAT(norm > 0 && sqrt(err / norm) < 1e-6, "off by %.3g", sqrt(err / norm));
}

static void gradients_and_update_are_the_same_bits_with_any_threads(void) {
    llama_config c = small_config();
    static float one[ROOM], three[ROOM];
    int32_t tok[TOKENS], tgt[TOKENS];
    double loss_one, loss_three;
    random_tokens(tok, TOKENS, 64, 3);
    random_tokens(tgt, TOKENS, 64, 4);
    gradients_of(&c, 1, 1, tok, tgt, one, &loss_one);
    gradients_of(&c, 1, 3, tok, tgt, three, &loss_three);
    CHECK(!memcmp(one, three, sizeof one) && !memcmp(&loss_one, &loss_three, sizeof loss_one));
}

// SGD with momentum or Lion, two updates, against their definitions in double precision.
static void check_optimizer(snip_optimizer kind) {
    const llama_config c = { 64, 32, 1, 2, 2, 48, 8, 0, 0, 3 };
    snip_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.optimizer = kind;
    snip *s = snip_create(&desc);
    llama *g = s ? llama_create(&c, 1, s) : NULL;
    if (!CHECK(g != NULL)) return;
    double worst = 0;
    float *before = (float *)room((size_t)g->n_params * sizeof(float));
    memcpy(before, g->params, (size_t)g->n_params * sizeof(float));
    for (int64_t i = 0; i < g->n_params; i++) g->grads[i] = (float)((i * 7919) % 101 - 50) * 0.01f;
    for (int step = 1; step <= 2; step++) {
        snip_adamw o = { 0.125, 0.75, 0.5, 0, step, 0.5 };
        llama_update(g, kind, &o, 0.25);
    }
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        for (int64_t j = t->offset; j < t->offset + t->rows * t->cols; j++) {
            double p = (double)before[j], gradient = 0.5 * (double)g->grads[j], m = 0;
            double keep = t->matrix ? 1 - 0.125 * 0.25 : 1;
            for (int step = 1; step <= 2; step++) {
                double u = 0.75 * m + (kind == SNIP_LION ? 0.25 * gradient : gradient);
                p = p * keep - 0.125 * (kind == SNIP_LION ? (u > 0) - (u < 0) : u);
                m = kind == SNIP_LION ? 0.5 * m + 0.5 * gradient : u;
            }
            worst = fmax(worst, fabs((double)g->params[j] - p) + fabs((double)g->m[j] - m));
        }
    }
    CHECK_THAT(worst < 1e-6, "off by %.3g", worst);
    llama_destroy(g);
    snip_destroy(s);
}

static void sgd_updates_are_those_of_the_definition(void) { check_optimizer(SNIP_SGD_MOMENTUM); }

static void lion_updates_are_those_of_the_definition(void) { check_optimizer(SNIP_LION); }

// ---- a step that met an error ----

// A trainer_backend whose session refuses a call that nobody looks at.
static snip_status forward_with_error(llama *g, snip *s, const int32_t *tokens, const int32_t *targets, int sequences,
                                      float grad_scale, double *loss) {
    snip_linear_forward(s, 0, NULL, NULL, NULL, NULL, 1);
    return llama_forward(g, s, tokens, targets, sequences, grad_scale, loss);
}

static void a_step_that_met_an_error_changes_no_weight_and_no_moment(void) {
    llama_config c = { 64, 32, 1, 2, 2, 48, 8, 0, 0, 3 };
    trainer_backend on = *tr_cpu();
    tr_training t = { &on, NULL, f32_session(), NULL, 0, 0, NULL, NULL };
    tr_step step;
    t.model = llama_create(&c, 2, t.session);
    if (!CHECK(t.model)) return;
    tr_make_batch(&t, 2, 1);
    llama *g = t.model;
    const size_t n = (size_t)g->n_params, bytes = n * sizeof(float);
    float *before = (float *)room(3 * bytes);  // params, m, v
    for (int broken = 1; broken >= 0; broken--) {
        memcpy(before, g->params, bytes);
        memcpy(before + n, g->m, bytes);
        memcpy(before + 2 * n, g->v, bytes);
        on.forward = broken ? forward_with_error : llama_forward;
        snip_status status = tr_take_step(&t, tr_optimizer_named("adamw"), 1e-2, 1, &step);
        int same = !memcmp(before, g->params, bytes) && !memcmp(before + n, g->m, bytes) &&
                   !memcmp(before + 2 * n, g->v, bytes);
        test_about("broken %d", broken);
        CHECK(status == (broken ? SNIP_BAD_ARGUMENT : SNIP_OK));
        CHECK(same == broken);
        if (broken) snip_end_step(t.session, NULL);
    }
    tr_free_batch(&t);
    llama_destroy(g);
    snip_destroy(t.session);
}

// ---- exp ----
static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int is_nan(float x) {  // -Ofast folds isnan() to 0
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u;
}

static void exp_is_right_to_two_ulps(void) {
    double worst = 0;
    for (int i = -860000; i <= 870000; i++) {
        float x = (float)i * 1e-4f;
        double want = exp((double)x);
        worst = fmax(worst, fabs((double)llama_exp(x) - want) / want);
    }
    CHECK_THAT(worst < 3e-7, "off by %.3g", worst);
    CHECK(is_nan(llama_exp(float_of(0x7FC00000u))));
    CHECK(llama_exp(-1000.0f) < 1e-37f && llama_exp(0.0f) == 1.0f);
}

static void exp_of_softmax_is_exp_down_to_minus_40(void) {
    CHECK(is_nan(llama_exp_softmax(float_of(0x7FC00000u))));
    CHECK(llama_exp_softmax(-39.9f) == llama_exp(-39.9f) && llama_exp_softmax(-0.0f) == 1.0f);
    CHECK(llama_exp_softmax(-40.1f) == 0 && llama_exp_softmax(-1e30f) == 0);
    CHECK(!llama_finite((double)float_of(0x7F800000u)) && llama_finite(1e308));
}

// ---- the checkpoint format ----
static const float saved_weight[6] = { 1, 2, 3, -4, 5e-30f, 6 };

// A file of three tensors and two facts.
static unsigned char *saved_tensors(size_t *size) {
    static double history[3] = { 0.1, 2, 3 };
    static unsigned char state[5] = { 9, 8, 7, 0, 255 };
    static float weight[6];
    tr_tensor t[3] = {
        {"history.loss",   "F64", 0, 3, history},
        { "embed.weight",  "F32", 2, 3, weight },
        { "session.state", "U8",  0, 5, state  }
    };
    tr_meta meta[2] = {
        {"format", "test"},
        { "step",  "3"   }
    };
    memcpy(weight, saved_weight, sizeof weight);
    FILE *f = fopen(test_path("tensors"), "wb");
    if (!CHECK(f != NULL)) exit(2);
    tr_write_tensors(f, t, 3, meta, 2);
    CHECK(fclose(f) == 0);
    return (unsigned char *)test_read(test_path("tensors"), size);
}

// tr_parse_tensors takes over what it is given.
static const char *parse(tr_tensors *s, const unsigned char *bytes, size_t size) {
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    if (!copy) exit(2);
    memcpy(copy, bytes, size);
    return tr_parse_tensors(s, copy, size);
}

static void safetensors_come_back(void) {
    size_t size;
    unsigned char *bytes = saved_tensors(&size);
    tr_tensors s;
    const char *why = parse(&s, bytes, size);
    CHECK(!why && s.n == 3 && !strcmp(tr_meta_value(&s, "step"), "3"));
    const void *p = tr_find(&s, "embed.weight", "F32", 2, 3);
    CHECK(p && !memcmp(p, saved_weight, sizeof saved_weight));
    CHECK(!tr_find(&s, "embed.weight", "F32", 3, 2));  // another shape, type or name
    CHECK(!tr_find(&s, "embed.weight", "U8", 2, 3) && !tr_find(&s, "x", "F32", 2, 3));
    tr_free_tensors(&s);
}

static void damaged_safetensors_are_refused(void) {
    size_t size;
    unsigned char *bytes = saved_tensors(&size), *longer = (unsigned char *)room(size + 1);
    long flipped = 0, cut = 0;
    tr_tensors s;
    for (size_t i = 0; i < size * 8; i++) {
        bytes[i / 8] ^= (unsigned char)(1 << i % 8);
        flipped += !parse(&s, bytes, size);
        tr_free_tensors(&s);
        bytes[i / 8] ^= (unsigned char)(1 << i % 8);
    }
    for (size_t i = 0; i < size; i++) {
        cut += !parse(&s, bytes, i);
        tr_free_tensors(&s);
    }
    CHECK(flipped == 0);
    CHECK(cut == 0);
    memcpy(longer, bytes, size);
    CHECK(parse(&s, longer, size + 1) != NULL);
    tr_free_tensors(&s);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(exp_is_right_to_two_ulps);
    RUN(exp_of_softmax_is_exp_down_to_minus_40);
    RUN(gradients_are_central_differences);
    RUN(gradients_are_central_differences_with_tied_embeddings);
    RUN(accumulated_gradients_are_those_of_the_larger_batch);
    RUN(gradients_and_update_are_the_same_bits_with_any_threads);
    RUN(sgd_updates_are_those_of_the_definition);
    RUN(lion_updates_are_those_of_the_definition);
    RUN(a_step_that_met_an_error_changes_no_weight_and_no_moment);
    RUN(safetensors_come_back);
    RUN(damaged_safetensors_are_refused);
    return test_end();
}
