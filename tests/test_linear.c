// A linear layer's three GEMMs in every format against references in double precision; rounding noise, rows that come
// and go, weights kept for micro-batches. Public names alone.
#include "session.h"

// ---- against a reference ----

typedef struct {
    int rows, out, in;
} layer_size;

static const snip_format all_formats[] = { SNIP_F32, SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };

enum { WITH_BIAS_AND_DX = 1, WITH_DW = 2, WITH_DBIAS = 4, WITH_ALL = 7 };

typedef struct {
    int rows, out, in;
    const snip_recipe *activation, *weight, *gradient;
    float *x, *w, *bias, *y, *dy, *dx, *dw, *db;  // [rows][in], [out][in], [out], [rows][out] ...
    snip *s;
} layer_case;

static layer_case case_new(snip_format format, layer_size size) {
    layer_case c;
    int rows = size.rows, out = size.out, in = size.in;
    snip_desc d = description();
    d.high = SNIP_F32;
    d.fp4.gradient = recipe_fp4_tile;  // nearest: the key is the session's own business
    c.s = session_open(&d);
    CHECK(snip_add_linear(c.s, "l", out, in, 0) == 0 && snip_set_format(c.s, -1, SNIP_GEMMS, format) == SNIP_OK);
    c.rows = rows;
    c.out = out;
    c.in = in;
    c.activation = c.weight = c.gradient = format == SNIP_BF16 ? &recipe_bf16 : &recipe_f32;
    if (format == SNIP_E4M3 || format == SNIP_E2M1) {
        c.activation = c.gradient = format == SNIP_E4M3 ? &recipe_fp8_tile : &recipe_fp4_tile;
        c.weight = format == SNIP_E4M3 ? &recipe_fp8_block : &recipe_fp4_block;
    }
    c.x = randoms(rows * in, 1);
    c.w = randoms(out * in, 0.1f);
    c.bias = randoms(out, 1);
    c.dy = randoms(rows * out, 0.01f);
    c.y = randoms(rows * out, 9);
    c.dx = randoms(rows * in, 0.01f);
    c.dw = randoms(out * in, 0.01f);
    c.db = randoms(out, 0.01f);
    return c;
}

static void check_forward(const layer_case *c, int with_bias) {
    double *expected = doubles(c->rows * c->out);
    const float *x = quantized(c->activation, c->x, c->rows, c->in, 0),
                *w = quantized(c->weight, c->w, c->out, c->in, 0);
    CHECK(snip_linear_forward(c->s, 0, c->y, c->x, c->w, with_bias ? c->bias : NULL, c->rows) == SNIP_OK);
    for (int i = 0; i < c->rows; i++)
        for (int j = 0; j < c->out; j++) expected[i * c->out + j] = with_bias ? (double)c->bias[j] : 0;
    product(expected, c->rows, c->out, c->in, x, c->in, 1, w, c->in, 1);
    CHECK(distance(c->y, expected, c->rows * c->out) < 2e-6);
}

// What backward adds to dx, dw and db, each where it is asked for.
static void check_backward(const layer_case *c, int given) {
    const int rows = c->rows, out = c->out, in = c->in;
    const float *dx = copied(c->dx, rows * in), *dw = copied(c->dw, out * in), *db = copied(c->db, out);
    double *of_dx = doubles(rows * in), *of_dw = doubles(out * in), *of_db = doubles(out);
    CHECK(snip_linear_backward(c->s, 0, given & WITH_BIAS_AND_DX ? c->dx : NULL, given & WITH_DW ? c->dw : NULL,
                               given & WITH_DBIAS ? c->db : NULL, c->dy, c->x, c->w, rows) == SNIP_OK);
    for (int i = 0; i < rows * in; i++) of_dx[i] = (double)dx[i];
    for (int i = 0; i < out * in; i++) of_dw[i] = (double)dw[i];
    for (int j = 0; j < out; j++) of_db[j] = (double)db[j];
    product(of_dx, rows, in, out, quantized(c->gradient, c->dy, rows, out, 0), out, 1,
            quantized(c->weight, c->w, out, in, 1), 1, in);
    product(of_dw, out, in, rows, quantized(c->gradient, c->dy, rows, out, 1), 1, out,
            quantized(c->activation, c->x, rows, in, 1), 1, in);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < out; j++) of_db[j] += (double)c->dy[i * out + j];
    if (given & WITH_BIAS_AND_DX)
        CHECK(distance(c->dx, of_dx, rows * in) < 2e-6);
    else
        CHECK(same_floats(c->dx, dx, rows * in));
    if (given & WITH_DW)
        CHECK(distance(c->dw, of_dw, out * in) < 2e-6);
    else
        CHECK(same_floats(c->dw, dw, out * in));
    if (given & WITH_DBIAS)
        CHECK(distance(c->db, of_db, out) < 1e-6);
    else
        CHECK(same_floats(c->db, db, out));
}

static void check_evaluation(const layer_case *c) {
    float *y = floats(c->rows * c->out);
    double *expected = doubles(c->rows * c->out);
    snip_adamw o = optimizer(1);
    CHECK(snip_next_pass(c->s, 1) == 0);
    snip_end_step(c->s, &o);
    snip_set_mode(c->s, SNIP_EVAL);
    CHECK(snip_linear_forward(c->s, 0, y, c->x, c->w, c->bias, c->rows) == SNIP_OK);
    CHECK(same_floats(c->y, y, c->rows * c->out));
    snip_set_mode(c->s, SNIP_EVAL_HIGH);
    CHECK(snip_linear_forward(c->s, 0, y, c->x, c->w, c->bias, c->rows) == SNIP_OK);
    for (int i = 0; i < c->rows; i++)
        for (int j = 0; j < c->out; j++) expected[i * c->out + j] = (double)c->bias[j];
    product(expected, c->rows, c->out, c->in, c->x, c->in, 1, c->w, c->in, 1);
    CHECK(distance(y, expected, c->rows * c->out) < 1e-6);
}

static void gemms_are_those_of_the_quantized_operands(void) {
    static const layer_size sizes[] = {
        {1,    1,   1  },
        { 3,   5,   7  },
        { 16,  32,  64 },
        { 33,  17,  129},
        { 140, 40,  24 },
        { 20,  136, 70 },
        { 9,   12,  300}
    };
    for (int f = 0; f < 4; f++)
        for (int z = 0; z < (int)(sizeof sizes / sizeof sizes[0]); z++) {
            layer_case c = case_new(all_formats[f], sizes[z]);
            test_about("%s, rows %d out %d in %d", snip_format_name(all_formats[f]), c.rows, c.out, c.in);
            check_forward(&c, 1);
            check_backward(&c, WITH_ALL);
            check_evaluation(&c);
        }
}

static void what_is_not_asked_for_is_not_touched(void) {
    const layer_size size = { 16, 32, 64 };
    for (int f = 0; f < 4; f++)
        for (int given = 0; given < WITH_ALL; given++) {
            layer_case c = case_new(all_formats[f], size);
            test_about("%s, given %d", snip_format_name(all_formats[f]), given);
            check_forward(&c, given & WITH_BIAS_AND_DX);
            check_backward(&c, given);
        }
}

// ---- stochastic rounding ----

// Another step, other bits; the mean over steps approaches the exact product.
static void stochastic_gradients_average_out(void) {
    enum { ROWS = 32, OUT = 32, IN = 16, STEPS = 400, COUNT = ROWS * IN };

    float *w = randoms(OUT * IN, 0.1f), *dy = randoms(ROWS * OUT, 1), *x = randoms(ROWS * IN, 1);
    float *dx = floats(COUNT), *last = floats(COUNT), *mean = floats(COUNT);
    double *sum = doubles(COUNT), *exact = doubles(COUNT), single = 0;
    int changed = 0;
    snip_desc d = description();
    d.fp4.weight = recipe_fp8_tile;  // weights nearly exact, so that the gradient's rounding is what is seen
    d.fp4.weight.tile_cols = 1;
    d.fp4.weight.scale = SNIP_SCALE_F32;
    d.every = -1;
    snip *s = session_open(&d);
    snip_add_linear(s, "l", OUT, IN, 0);
    snip_set_format(s, 0, SNIP_DGRAD, SNIP_E2M1);
    product(exact, ROWS, IN, OUT, dy, OUT, 1, w, 1, IN);
    for (int step = 1; step <= STEPS; step++) {
        snip_adamw o = optimizer(step);
        memcpy(last, dx, COUNT * sizeof *dx);
        memset(dx, 0, COUNT * sizeof *dx);
        CHECK(snip_linear_backward(s, 0, dx, NULL, NULL, dy, x, w, ROWS) == SNIP_OK);
        if (step == 1)
            single = distance(dx, exact, COUNT);
        else
            changed += !same_floats(last, dx, COUNT);
        for (int i = 0; i < COUNT; i++) sum[i] += (double)dx[i] / STEPS;
        CHECK(snip_next_pass(s, 1) == 0 && snip_end_step(s, &o) == SNIP_OK);
    }
    for (int i = 0; i < COUNT; i++) mean[i] = (float)sum[i];
    CHECK(changed == STEPS - 1);
    CHECK(single > 0.02 && distance(mean, exact, COUNT) < 3 * single / sqrt(STEPS));
}

// ---- rows and micro-batches ----

static void number_of_rows_may_change_from_call_to_call(void) {
    enum { OUT = 24, IN = 40 };

    static const int rows_of[] = { 5, 50, 3, 129, 1, 0, 64, 200, 2 };
    for (int f = 0; f < 4; f++) {
        snip_desc d = description();
        d.fp4.gradient = recipe_fp4_tile;
        snip *used = session_open(&d);
        snip_add_linear(used, "l", OUT, IN, 0);
        snip_set_format(used, 0, SNIP_GEMMS, all_formats[f]);
        for (int i = 0; i < (int)(sizeof rows_of / sizeof rows_of[0]); i++) {
            int rows = rows_of[i];
            float *x = randoms(rows * IN, 1), *w = randoms(OUT * IN, 1), *dy = randoms(rows * OUT, 1);
            float *y[2], *dx[2], *dw[2];
            test_about("%d rows, %s", rows, snip_format_name(all_formats[f]));
            snip *fresh = session_open(&d);
            snip_add_linear(fresh, "l", OUT, IN, 0);
            snip_set_format(fresh, 0, SNIP_GEMMS, all_formats[f]);
            for (int k = 0; k < 2; k++) {
                snip *s = k ? fresh : used;
                y[k] = floats(rows * OUT);
                dx[k] = floats(rows * IN);
                dw[k] = floats(OUT * IN);
                CHECK(snip_linear_forward(s, 0, y[k], x, w, NULL, rows) == SNIP_OK);
                CHECK(snip_linear_backward(s, 0, dx[k], dw[k], NULL, dy, x, w, rows) == SNIP_OK);
            }
            CHECK(same_floats(y[0], y[1], rows * OUT) && same_floats(dx[0], dx[1], rows * IN));
            CHECK(same_floats(dw[0], dw[1], OUT * IN));
            session_close(fresh);
        }
    }
}

// No rows: nothing to read, nothing to do, whatever the pass.
static void calls_without_rows_do_nothing(void) {
    model n = model_small();
    snip_desc d = description();
    d.every = 1;
    snip *s = model_session(&n, &d);
    for (int step = 1; step <= 2; step++) {
        snip_adamw o = optimizer(step);
        float dbias[2] = { 5, 6 };
        do {
            CHECK(model_pass(&n, s) == SNIP_OK);
            CHECK(snip_linear_forward(s, 0, NULL, NULL, n.w[0], NULL, 0) == SNIP_OK);
            CHECK(snip_linear_backward(s, 0, NULL, NULL, dbias, NULL, NULL, n.w[0], 0) == SNIP_OK);
            snip_status status = snip_linear_forward(s, 0, NULL, NULL, NULL, NULL, 0);
            CHECK(status == SNIP_OK || status == SNIP_BAD_ARGUMENT);
            status = snip_linear_backward(s, 0, NULL, NULL, NULL, NULL, NULL, NULL, 0);
            CHECK(status == SNIP_OK || status == SNIP_BAD_ARGUMENT);
        } while (snip_next_pass(s, n.loss));
        CHECK(dbias[0] == 5 && dbias[1] == 6);
        CHECK(snip_end_step(s, &o) == SNIP_OK);
    }
}

enum { KEPT_ROWS = 5, KEPT_IN = 2100, KEPT_OUT = 40 };  // in: panels of several steps along k

static snip *kept_session(snip_format format) {
    snip_desc d = description();
    d.every = -1;
    d.fp4.gradient = recipe_fp4_tile;
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.a.b", KEPT_OUT, KEPT_IN, 0) == 0);
    CHECK(snip_set_format(s, 0, SNIP_GEMMS, format) == SNIP_OK);
    return s;
}

typedef struct {
    float *y, *dx;
    snip_status forward, backward;
} kept_result;

static kept_result kept_run(snip *s, const float *x, const float *w, const float *dy) {
    kept_result r;
    r.y = floats(KEPT_ROWS * KEPT_OUT);
    r.dx = floats(KEPT_ROWS * KEPT_IN);
    r.forward = snip_linear_forward(s, 0, r.y, x, w, NULL, KEPT_ROWS);
    r.backward = snip_linear_backward(s, 0, r.dx, NULL, NULL, dy, x, w, KEPT_ROWS);
    return r;
}

// One float that a million rows are added to one after the other is 2e-3 off.
static void bias_gradients_of_many_rows_lose_no_digits(void) {
    enum { OUT = 3 };

    const int64_t rows = (int64_t)1 << 18;
    float *x = floats(rows), *dy = floats(rows * OUT), dw[OUT] = { 0 }, w[OUT] = { 1, 2, 3 };
    double sum[OUT] = { 0 };
    snip_desc d = description();
    d.every = -1;
    for (int64_t i = 0; i < rows * OUT; i++) {
        dy[i] = 0.1f + 0.01f * uniform();
        sum[i % OUT] += (double)dy[i];
    }
    float bias[2][OUT];
    for (int threads = 1; threads <= 2; threads++) {
        snip *s = session_open(&d);
        snip_add_linear(s, "l", OUT, 1, 0);
        set_threads(threads);
        for (int j = 0; j < OUT; j++) bias[threads - 1][j] = 0.5f;
        CHECK(snip_linear_backward(s, 0, NULL, dw, bias[threads - 1], dy, x, w, rows) == SNIP_OK);
    }
    set_threads(1);
    for (int j = 0; j < OUT; j++) CHECK(close_to((double)bias[0][j], sum[j] + 0.5, 1e-7));
    CHECK(same_floats(bias[0], bias[1], OUT));
}

// Weights quantized and packed once for several micro-batches: outputs and counts as without, also when weights or
// formats change.
static void weights_kept_for_micro_batches_give_the_same_bits(void) {
    enum { MICROS = 3, STEPS = 5 };

    static const snip_format formats[STEPS] = { SNIP_E2M1, SNIP_BF16, SNIP_E4M3, SNIP_E2M1, SNIP_E2M1 };
    float *w = randoms(KEPT_OUT * KEPT_IN, 1), *x = randoms(KEPT_ROWS * KEPT_IN, 1);
    float *dy = randoms(KEPT_ROWS * KEPT_OUT, 1), last = 0;
    snip *keeps = kept_session(SNIP_F32);
    for (int step = 0; step < STEPS; step++) {
        snip_adamw o = optimizer(step + 1);
        int64_t once = 0;
        int nonfinite = step == STEPS - 1;
        if (nonfinite) w[3] = (float)INFINITY;
        CHECK(snip_set_format(keeps, 0, SNIP_GEMMS, formats[step]) == SNIP_OK);
        for (int micro = 0; micro < MICROS; micro++) {
            snip *fresh = kept_session(formats[step]);  // nothing to keep
            kept_result a = kept_run(keeps, x, w, dy), b = kept_run(fresh, x, w, dy);
            test_about("step %d, micro-batch %d", step, micro);
            CHECK(a.forward == b.forward && a.forward == (nonfinite ? SNIP_NONFINITE : SNIP_OK));
            CHECK(a.backward == b.backward && (nonfinite || a.backward == SNIP_OK));
            CHECK(same_floats(a.y, b.y, KEPT_ROWS * KEPT_OUT) && same_floats(a.dx, b.dx, KEPT_ROWS * KEPT_IN));
            if (micro == 0) {
                CHECK(a.y[0] != last);
                last = a.y[0];
                once = layer_of(keeps, 0).nonfinite;
            }
            CHECK(layer_of(keeps, 0).nonfinite == (micro + 1) * once && (once > 0) == nonfinite);
            session_close(fresh);
        }
        CHECK(snip_end_step(keeps, &o) == (nonfinite ? SNIP_NONFINITE : SNIP_OK));
        for (int i = 0; i < KEPT_OUT * KEPT_IN; i++) w[i] += 0.3f * normal();
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(gemms_are_those_of_the_quantized_operands);
    RUN(what_is_not_asked_for_is_not_touched);
    RUN(stochastic_gradients_average_out);
    RUN(number_of_rows_may_change_from_call_to_call);
    RUN(calls_without_rows_do_nothing);
    RUN(bias_gradients_of_many_rows_lose_no_digits);
    RUN(weights_kept_for_micro_batches_give_the_same_bits);
    return test_end();
}
