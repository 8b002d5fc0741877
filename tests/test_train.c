// test_train.c - the example model against an independent double-precision one: gradients by central
// differences, gradient accumulation, independence of the number of threads; and the checkpoint format:
// what is written comes back, and no damaged byte gets through.
//     cc -O2 -fopenmp tests/test_train.c -o test_train -lm && ./test_train
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "../examples/llama.h"
#include "../examples/trainer.h"

static int passed, failed;

static void check(int ok, const char *what, double figure) {
    if (ok)
        passed++;
    else {
        failed++;
        printf("FAILED: %s (%.3g)\n", what, figure);
    }
}

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

static double *grab(int64_t n) {
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

static void test_gradients(int tied) {
    llama_config c = { 24, 24, 2, 6, 2, 40, 37, tied, 0, 11 };
    int32_t tok[2 * 37], tgt[2 * 37];
    snip *s = f32_session();
    llama *g = llama_create(&c, 2, s);
    double sum, worst = 0;
    char what[128];
    if (!s || !g) {
        check(0, "create", 0);
        return;
    }
    snip_set_format(s, -1, SNIP_GEMMS, SNIP_F32);
    stir(g);
    random_tokens(tok, 74, 24, 1);
    random_tokens(tgt, 74, 24, 2);
    llama_zero_grad(g);
    check(!llama_forward(g, s, tok, tgt, 2, 1.0f / 74, &sum), "forward", 0);
    check(!llama_backward(g, s, tok, 2), "backward", 0);
    double *p = grab(g->n_params);
    for (int64_t i = 0; i < g->n_params; i++) p[i] = (double)g->params[i];
    double ref = ref_loss(g, p, tok, tgt, 2);
    check(fabs(sum / 74 - ref) < 1e-5 * ref, "the loss agrees with double precision", fabs(sum / 74 - ref) / ref);
    for (int i = 0; i < g->n_tensors; i++) {
        const llama_tensor *t = &g->tensors[i];
        int64_t n = t->rows * t->cols, stride = n > 48 ? n / 48 | 1 : 1;
        double err = 0, norm = 0, h = 1e-5;
        for (int64_t j = 0; j < n; j += stride) {
            double *w = p + t->offset + j, keep = *w, up, down;
            *w = keep + h;
            up = ref_loss(g, p, tok, tgt, 2);
            *w = keep - h;
            down = ref_loss(g, p, tok, tgt, 2);
            *w = keep;
            double want = (up - down) / (2 * h), e = (double)g->grads[t->offset + j] - want;
            err += e * e;
            norm += want * want;
        }
        double rel = sqrt(err / norm);
        worst = rel > worst ? rel : worst;
        snprintf(what, sizeof what, "gradient of %s agrees with central differences", t->name);
        check(norm > 0 && rel < 1e-4, what, rel);
    }
    printf("gradients (%s): worst relative error of a tensor %.2g\n", tied ? "tied" : "untied", worst);
    free(p);
    llama_destroy(g);
    snip_destroy(s);
}

// The same four sequences as one batch of 4 and as two of 2; with one thread and with three.
static int64_t gradients_of(llama_config *c, int split, int threads, const int32_t *tok, const int32_t *tgt, float *out,
                            double *loss) {
#ifdef _OPENMP
    int before = omp_get_max_threads();
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
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
        check(!llama_forward(g, s, tok + at, tgt + at, 4 / split, 1.0f / (float)(4 * c->seq), &sum),
              "forward of a micro-batch", i);
        check(!llama_backward(g, s, tok + at, 4 / split), "backward of a micro-batch", i);
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
#ifdef _OPENMP
    omp_set_num_threads(before);
#endif
    return n;
}

static void test_accumulation_and_threads(void) {
    llama_config c = { 64, 32, 2, 4, 2, 48, 40, 0, 0, 3 };

    enum { N = 4 * 40, ROOM = 1 << 18 };

    static float a[ROOM], b[ROOM], d[ROOM];
    int32_t tok[N], tgt[N];
    double la, lb, ld, err = 0, norm = 0;
    random_tokens(tok, N, 64, 3);
    random_tokens(tgt, N, 64, 4);
    int64_t n = gradients_of(&c, 1, 1, tok, tgt, a, &la);
    gradients_of(&c, 2, 1, tok, tgt, b, &lb);
    gradients_of(&c, 1, 3, tok, tgt, d, &ld);
    for (int64_t i = 0; i < n + 1; i++) {  // the norm, then the gradients
        err += (double)(a[i] - b[i]) * (double)(a[i] - b[i]);
        norm += (double)a[i] * (double)a[i];
    }
    check(fabs(la - lb) < 1e-6 * la, "accumulated loss equals the larger batch's", fabs(la - lb));
    check(norm > 0 && sqrt(err / norm) < 1e-6, "accumulated gradients equal the larger batch's to rounding",
          sqrt(err / norm));
    check(!memcmp(a, d, sizeof a) && memcmp(&la, &ld, sizeof la) == 0,
          "gradients and update are the same with 1 and 3 threads, bit for bit", 0);
}

// SGD with momentum and Lion, two updates, against their definitions in double precision.
static void test_optimizers(void) {
    for (int kind = SNIP_SGD_MOMENTUM; kind <= SNIP_LION; kind++) {
        llama_config c = { 64, 32, 1, 2, 2, 48, 8, 0, 0, 3 };
        snip_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.optimizer = (snip_optimizer)kind;
        snip *s = snip_create(&desc);
        llama *g = s ? llama_create(&c, 1, s) : NULL;
        if (!g) {
            check(0, "a model bound to its momentum", kind);
            return;
        }
        double worst = 0;
        float *before = (float *)malloc((size_t)g->n_params * sizeof(float));
        memcpy(before, g->params, (size_t)g->n_params * sizeof(float));
        for (int64_t i = 0; i < g->n_params; i++) g->grads[i] = (float)((i * 7919) % 101 - 50) * 0.01f;
        for (int step = 1; step <= 2; step++) {
            snip_adamw o = { 0.125, 0.75, 0.5, 0, step, 0.5 };
            llama_update(g, (snip_optimizer)kind, &o, 0.25);
        }
        for (int i = 0; i < g->n_tensors; i++) {
            const llama_tensor *t = &g->tensors[i];
            for (int64_t j = t->offset; j < t->offset + t->rows * t->cols; j++) {
                double p = (double)before[j], gr = 0.5 * (double)g->grads[j], m = 0,
                       keep = t->matrix ? 1 - 0.125 * 0.25 : 1;
                for (int step = 1; step <= 2; step++) {
                    double u = 0.75 * m + (kind == SNIP_LION ? 0.25 * gr : gr);
                    p = p * keep - 0.125 * (kind == SNIP_LION ? (u > 0) - (u < 0) : u);
                    m = kind == SNIP_LION ? 0.5 * m + 0.5 * gr : u;
                }
                double e = fabs((double)g->params[j] - p) + fabs((double)g->m[j] - m);
                worst = e > worst ? e : worst;
            }
        }
        check(worst < 1e-6, kind == SNIP_LION ? "Lion" : "SGD with momentum", worst);
        free(before);
        llama_destroy(g);
        snip_destroy(s);
    }
}

// A trainer_backend whose session refuses a call that nobody looks at.
static snip_status forward_with_error(llama *g, snip *s, const int32_t *tokens, const int32_t *targets, int sequences,
                                      float grad_scale, double *loss) {
    snip_linear_forward(s, 0, NULL, NULL, NULL, NULL, 1);
    return llama_forward(g, s, tokens, targets, sequences, grad_scale, loss);
}

// A step that met an error leaves the weights and the optimizer's moments as they are.
static void test_refused_step(void) {
    llama_config c = { 64, 32, 1, 2, 2, 48, 8, 0, 0, 3 };
    trainer_backend on = *tr_cpu();
    tr_training t = { &on, NULL, f32_session(), NULL, 0, 0, NULL, NULL };
    tr_step step;
    t.model = llama_create(&c, 2, t.session);
    if (!t.model) {
        check(0, "a model", 0);
        return;
    }
    tr_make_batch(&t, 2, 1);
    llama *g = t.model;
    size_t bytes = 3 * (size_t)g->n_params * sizeof(float);  // params, m, v
    float *before = (float *)tr_alloc(bytes);
    for (int broken = 1; broken >= 0; broken--) {
        memcpy(before, g->params, bytes / 3);
        memcpy(before + g->n_params, g->m, bytes / 3);
        memcpy(before + 2 * g->n_params, g->v, bytes / 3);
        on.forward = broken ? forward_with_error : llama_forward;
        snip_status status = tr_take_step(&t, tr_optimizer_named("adamw"), 1e-2, 1, &step);
        int same = !memcmp(before, g->params, bytes / 3) && !memcmp(before + g->n_params, g->m, bytes / 3) &&
                   !memcmp(before + 2 * g->n_params, g->v, bytes / 3);
        check(status == (broken ? SNIP_BAD_ARGUMENT : SNIP_OK), "the step's status", (double)status);
        check(same == broken, broken ? "a refused step changes nothing" : "an ordinary one does", broken);
        if (broken) snip_end_step(t.session, NULL);
    }
    free(before);
    tr_free_batch(&t);
    llama_destroy(g);
    snip_destroy(t.session);
}

static void test_exp(void) {
    double worst = 0;
    for (int i = -860000; i <= 870000; i++) {
        float x = (float)i * 1e-4f;
        double want = exp((double)x), e = fabs((double)llama_exp(x) - want) / want;
        worst = e > worst ? e : worst;
    }
    check(worst < 3e-7, "llama_exp is exp to 2 ulp", worst);

    union {
        uint32_t u;
        float f;
    } nan = { 0x7fc00000u }, out;

    out.f = llama_exp(nan.f);
    check((out.u & 0x7fffffffu) > 0x7f800000u, "llama_exp keeps NaN", (double)out.f);
    check(llama_exp(-1000.0f) < 1e-37f && llama_exp(0.0f) == 1.0f, "llama_exp of -1000 and 0",
          (double)llama_exp(-1000.0f));
    out.f = llama_exp_softmax(nan.f);
    check((out.u & 0x7fffffffu) > 0x7f800000u, "llama_exp_softmax keeps NaN", (double)out.f);
    check(llama_exp_softmax(-39.9f) == llama_exp(-39.9f) && llama_exp_softmax(-0.0f) == 1.0f,
          "llama_exp_softmax is exp down to -40", (double)llama_exp_softmax(-39.9f));
    check(llama_exp_softmax(-40.1f) == 0 && llama_exp_softmax(-1e30f) == 0, "llama_exp_softmax is 0 below -40",
          (double)llama_exp_softmax(-40.1f));
    nan.u = 0x7f800000u;
    check(!llama_finite((double)nan.f) && llama_finite(1e308), "llama_finite sees infinity", 0);
}

// ---- the checkpoint format ----
static void test_safetensors(void) {
    float w[6] = { 1, 2, 3, -4, 5e-30f, 6 };
    double h[3] = { 0.1, 2, 3 };
    unsigned char state[5] = { 9, 8, 7, 0, 255 };
    tr_tensor t[3] = {
        {"history.loss",   "F64", 0, 3, h    },
        { "embed.weight",  "F32", 2, 3, w    },
        { "session.state", "U8",  0, 5, state}
    };
    tr_meta meta[2] = {
        {"format", "test"},
        { "step",  "3"   }
    };
    FILE *f = tmpfile();
    if (!f) {
        check(0, "a temporary file", 0);
        return;
    }
    tr_write_tensors(f, t, 3, meta, 2);
    long size = ftell(f);
    unsigned char *bytes = (unsigned char *)malloc((size_t)size);
    tr_tensors s;
    rewind(f);
    check(bytes && fread(bytes, 1, (size_t)size, f) == (size_t)size, "read back", 0);
    fclose(f);

    unsigned char *copy = (unsigned char *)malloc((size_t)size);
    memcpy(copy, bytes, (size_t)size);
    const char *why = tr_parse_tensors(&s, copy, (size_t)size);
    check(!why && s.n == 3 && !strcmp(tr_meta_value(&s, "step"), "3"), "a safetensors file comes back", 0);
    const void *p = tr_find(&s, "embed.weight", "F32", 2, 3);
    check(p && !memcmp(p, w, sizeof w), "its tensors too", 0);
    check(!tr_find(&s, "embed.weight", "F32", 3, 2) && !tr_find(&s, "embed.weight", "U8", 2, 3) &&
              !tr_find(&s, "x", "F32", 2, 3),
          "another shape, type or name is not found", 0);
    tr_free_tensors(&s);

    int through = 0;
    for (long i = 0; i < size * 8; i++) {  // every single bit
        copy = (unsigned char *)malloc((size_t)size);
        memcpy(copy, bytes, (size_t)size);
        copy[i / 8] ^= (unsigned char)(1 << i % 8);
        through += !tr_parse_tensors(&s, copy, (size_t)size);
        tr_free_tensors(&s);
    }
    check(through == 0, "no flipped bit gets through", through);
    for (long i = through = 0; i < size; i++) {  // every length
        copy = (unsigned char *)malloc(i ? (size_t)i : 1);
        memcpy(copy, bytes, (size_t)i);
        through += !tr_parse_tensors(&s, copy, (size_t)i);
        tr_free_tensors(&s);
    }
    check(through == 0, "no cut file gets through", through);
    copy = (unsigned char *)calloc((size_t)size + 1, 1);
    memcpy(copy, bytes, (size_t)size);
    check(tr_parse_tensors(&s, copy, (size_t)size + 1) != NULL, "nor one with a byte too many", 0);
    tr_free_tensors(&s);
    free(bytes);
}

int main(void) {
    test_exp();
    test_gradients(0);
    test_gradients(1);
    test_accumulation_and_threads();
    test_optimizers();
    test_refused_step();
    test_safetensors();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
