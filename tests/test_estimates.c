// The estimates of a measurement against what they estimate, computed in double precision: loss and update divergence
// of every GEMM, under each optimizer, with micro-batches. Public names alone.
#include "session.h"

// ---- the loss ----

// One linear layer, L = |X W^T - T|^2 / 2: tr d2L/dX2 = rows |W|^2 and tr d2L/dW2 = out |X|^2.
enum { ROWS = 48, OUT = 40, IN = 136 };

typedef struct {
    float *x, *w, *t;
    double *of_x, *of_w;  // the loss's gradients
} quadratic;

static quadratic quadratic_new(void) {
    quadratic q;
    double *residual = doubles(ROWS * OUT);
    q.x = randoms(ROWS * IN, 1);
    q.w = randoms(OUT * IN, 0.3f);
    q.t = floats(ROWS * OUT);
    q.of_x = doubles(ROWS * IN);
    q.of_w = doubles(OUT * IN);
    product(residual, ROWS, OUT, IN, q.x, IN, 1, q.w, IN, 1);
    for (int i = 0; i < ROWS * OUT; i++) {
        q.t[i] = (float)(residual[i] + 0.5 * (double)normal());
        residual[i] -= (double)q.t[i];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < OUT; j++)
            for (int k = 0; k < IN; k++) {
                q.of_x[i * IN + k] += residual[i * OUT + j] * (double)q.w[j * IN + k];
                q.of_w[j * IN + k] += residual[i * OUT + j] * (double)q.x[i * IN + k];
            }
    return q;
}

typedef struct {
    double first, second;  // of the change of the loss
    double size;           // of first's terms, squared and summed
} loss_change;

// Adds what rounding x [count] does to first order; the rounding error's |e|^2.
static double add_first_order(loss_change *change, const float *x, const float *rounded, const double *gradient,
                              int count) {
    double e_sq = 0;
    for (int i = 0; i < count; i++) {
        double e = (double)rounded[i] - (double)x[i];
        e_sq += e * e;
        change->first += gradient[i] * e;
        change->size += gradient[i] * gradient[i] * e * e;
    }
    return e_sq;
}

static loss_change loss_change_of(const quadratic *q, const snip_recipe *of_x, const snip_recipe *of_w) {
    loss_change change = { 0, 0, 0 };
    double ex = add_first_order(&change, q->x, quantized(of_x, q->x, ROWS, IN, 0), q->of_x, ROWS * IN);
    double ew = add_first_order(&change, q->w, quantized(of_w, q->w, OUT, IN, 0), q->of_w, OUT * IN);
    double x_sq = sum_of_squares(q->x, ROWS * IN), w_sq = sum_of_squares(q->w, OUT * IN);
    double along = along_gradient(of_x, q->x, q->of_x, ROWS, IN);
    change.second = 0.5 * (ROWS * w_sq * ex / (ROWS * IN) * along + OUT * x_sq * ew / (OUT * IN));
    return change;
}

static void quadratic_step(const quadratic *q, snip *s, int step) {
    float *y = floats(ROWS * OUT), *dy = floats(ROWS * OUT), *dw = floats(OUT * IN);
    snip_adamw o = optimizer(step);
    double loss;
    do {
        loss = 0;
        CHECK(snip_linear_forward(s, 0, y, q->x, q->w, NULL, ROWS) == SNIP_OK);
        for (int i = 0; i < ROWS * OUT; i++) {
            dy[i] = y[i] - q->t[i];
            loss += 0.5 * (double)dy[i] * (double)dy[i];
        }
        memset(dw, 0, OUT * IN * sizeof *dw);
        CHECK(snip_linear_backward(s, 0, NULL, dw, NULL, dy, q->x, q->w, ROWS) == SNIP_OK);
    } while (snip_next_pass(s, loss));
    CHECK(snip_end_step(s, &o) == SNIP_OK);
}

static void loss_estimates_are_those_of_a_quadratic_loss(void) {
    enum { STEPS = 24 };

    quadratic q = quadratic_new();
    loss_change fp8 = loss_change_of(&q, &recipe_fp8_tile, &recipe_fp8_block);
    loss_change fp4 = loss_change_of(&q, &recipe_fp4_tile, &recipe_fp4_block);
    float *m = randoms(OUT * IN, 1), *v = floats(OUT * IN);
    double mean_fp8 = 0, mean_fp4 = 0;
    snip_desc d = description();
    for (int i = 0; i < OUT * IN; i++) v[i] = 1;
    d.every = 1;
    snip *s = session_open(&d);
    snip_add_linear(s, "l", OUT, IN, 0);
    snip_bind_adamw(s, 0, m, v);
    quadratic_step(&q, s, 1);
    for (int step = 2; step <= STEPS + 1; step++) {
        quadratic_step(&q, s, step);
        snip_layer_info info = layer_of(s, 0);
        test_about("step %d", step);
        CHECK(fabs(info.fp8.loss_first - fp8.first) < 1e-3 * sqrt(fp8.size));
        CHECK(fabs(info.fp4.loss_first - fp4.first) < 1e-3 * sqrt(fp4.size));
        CHECK(close_to(info.fp8.loss_second, fp8.second, 0.3) && close_to(info.fp4.loss_second, fp4.second, 0.3));
        mean_fp8 += info.fp8.loss_second / STEPS;
        mean_fp4 += info.fp4.loss_second / STEPS;
    }
    CHECK(close_to(mean_fp8, fp8.second, 0.03) && close_to(mean_fp4, fp4.second, 0.03));
}

// ---- the next update ----

// A model at fixed weights, its gradients without rounding, and the optimizer's scale of a change of them.
typedef struct {
    model n;
    snip *exact;
    snip_adamw o;
    float *dw[2], *a, *dy;
    double w_sq[2], update_sq;  // sum over layers of |u|^2 / |W|^2
} update_reference;

// Takes over n as it is.
static update_reference update_reference_of(const model *n) {
    update_reference r;
    snip_desc d = description();
    r.n = *n;
    r.o = optimizer(5);
    r.update_sq = 0;
    d.every = -1;
    d.high = SNIP_F32;
    r.exact = model_session(&r.n, &d);
    model_pass(&r.n, r.exact);
    r.a = copied(r.n.a, n->rows * n->hid);
    r.dy = copied(r.n.dy, n->rows * n->out);
    for (int l = 0; l < 2; l++) {
        int count = weights_of(n, l);
        r.dw[l] = copied(r.n.dw[l], count);
        r.w_sq[l] = sum_of_squares(n->w[l], count);
        r.update_sq += adamw_update_sq(&r.o, n->m[l], n->v[l], count) / r.w_sq[l];
    }
    return r;
}

// sum over layers j of |D_j dG_j|^2 / |W_j|^2, dG_j: by how much the last pass's gradients differ, plus `own` on the
// first layer's where it is given
static double update_change(const update_reference *r, const double *own) {
    double total = 0;
    for (int j = 0; j < 2; j++)
        for (int i = 0; i < weights_of(&r->n, j); i++) {
            double change = (double)r->n.dw[j][i] - (double)r->dw[j][i] + (own && j == 0 ? own[i] : 0);
            total += pow(adamw_slope(&r->o, r->n.v[j][i]) * change, 2) / r->w_sq[j];
        }
    return total;
}

// Mean square of FP4's rounding errors of one operand of a GEMM (fwd or dgrad) of layer l.
static double operand_error(update_reference *r, int l, snip_gemm_kind gemm, int on_weight) {
    model *n = &r->n;
    int in = l ? n->hid : n->in, out = l ? n->out : n->hid;
    const float *x = l ? r->a : n->x;
    if (on_weight) return rounding_error(&recipe_fp4_block, n->w[l], out, in);
    if (gemm == SNIP_DGRAD) return rounding_error(&recipe_fp4_tile, r->dy, n->rows, out);
    double *dx = doubles(n->rows * in);  // X's errors are taken as far along dX as they lie
    model_pass(n, r->exact);
    product(dx, n->rows, in, out, l ? n->dy : n->dh, out, 1, n->w[l], 1, in);
    return rounding_error(&recipe_fp4_tile, x, n->rows, in) * along_gradient(&recipe_fp4_tile, x, dx, n->rows, in);
}

// E sum_j |D_j dG_j|^2 / |W_j|^2 for white noise, of the size of FP4's errors, on one operand.
static double update_truth(update_reference *r, int l, snip_gemm_kind gemm, int on_weight) {
    enum { DRAWS = 60 };

    const float amount = 1e-3f;
    model *n = &r->n;
    int in = l ? n->hid : n->in, out = l ? n->out : n->hid, rows = n->rows;
    int inner = gemm == SNIP_DGRAD ? out : in, width = gemm == SNIP_DGRAD ? in : out;
    const float *held = gemm == SNIP_DGRAD ? r->dy : l ? r->a : n->x;  // [rows][inner]
    float *white = floats((rows > width ? rows : width) * inner), *noise = floats(rows * width);
    double *sum = doubles(rows * width), truth = 0, error = operand_error(r, l, gemm, on_weight);
    for (int draw = 0; draw < DRAWS; draw++) {
        for (int i = 0; i < (rows > width ? rows : width) * inner; i++) white[i] = random_bits() & 1 ? amount : -amount;
        memset(sum, 0, (size_t)(rows * width) * sizeof *sum);
        if (on_weight)
            product(sum, rows, width, inner, held, inner, 1, white, inner, 1);
        else if (gemm == SNIP_DGRAD)
            product(sum, rows, width, inner, white, inner, 1, n->w[l], 1, in);
        else
            product(sum, rows, width, inner, white, inner, 1, n->w[l], in, 1);
        for (int i = 0; i < rows * width; i++) noise[i] = (float)sum[i];
        n->noise_h = gemm == SNIP_FWD && l == 0 ? noise : NULL;
        n->noise_y = gemm == SNIP_FWD && l == 1 ? noise : NULL;
        n->noise_da = gemm == SNIP_DGRAD ? noise : NULL;
        model_pass(n, r->exact);
        truth += error * update_change(r, NULL) / ((double)amount * (double)amount) / DRAWS;
    }
    n->noise_h = n->noise_y = n->noise_da = NULL;
    return truth;
}

// |D dW_err|^2 / |W|^2 of layer l's weight gradient computed in FP4
static double wgrad_truth(update_reference *r, const snip_desc *d, int l) {
    model *n = &r->n;
    int count = weights_of(n, l);
    float *y = floats(n->rows * n->hid), *dw = floats(count);
    const float *x = l ? n->a : n->x, *dy = l ? n->dy : n->dh;
    double truth = 0;
    snip *s = session_open(d);
    model_add(n, s);
    model_pass(n, r->exact);
    snip_set_format(s, -1, SNIP_GEMMS, SNIP_E2M1);
    snip_linear_forward(s, l, y, x, n->w[l], n->b[l], n->rows);
    snip_linear_backward(s, l, NULL, dw, NULL, dy, x, n->w[l], n->rows);
    for (int i = 0; i < count; i++)
        truth += pow(adamw_slope(&r->o, n->v[l][i]) * ((double)dw[i] - (double)r->dw[l][i]), 2) / r->w_sq[l];
    return truth;
}

static model update_model(void) { return model_new(11, 24, 32, 40, 28); }

static snip_desc update_description(void) {
    snip_desc d = description();
    d.every = 1;
    d.sample = 1;
    d.high = SNIP_F32;
    d.fp4.gradient = recipe_fp4_tile;
    return d;
}

static void update_estimates_are_those_of_white_noise(void) {
    enum { STEPS = 40 };

    model fresh = update_model();
    update_reference r = update_reference_of(&fresh);
    snip_desc d = update_description();
    double truth[2][2] = { { 0 } }, wgrad[2], got[2][SNIP_GEMMS] = { { 0 } };
    for (int l = 0; l < 2; l++) {
        for (int g = 0; g < 2; g++)
            for (int on_weight = 0; on_weight < 2; on_weight++)
                if (l || g == SNIP_FWD) truth[l][g] += update_truth(&r, l, (snip_gemm_kind)g, on_weight);
        wgrad[l] = wgrad_truth(&r, &d, l);
    }
    snip *s = model_session(&r.n, &d);
    CHECK(model_still_step(&r.n, s, r.o.step) == SNIP_OK);
    for (int step = 0; step < STEPS; step++) {  // averaged over probes: the weights, the batch and the step stay
        CHECK(model_still_step(&r.n, s, r.o.step) == SNIP_OK);
        for (int l = 0; l < 2; l++) {
            snip_layer_info info = layer_of(s, l);
            for (int g = 0; g < SNIP_GEMMS; g++) got[l][g] += info.fp4.update[g] * r.update_sq / STEPS;
            CHECK(close_to(info.fp4.update[SNIP_WGRAD] * r.update_sq, wgrad[l], 1e-3));
            CHECK(info.fp4.update[SNIP_FWD] > 10 * info.fp8.update[SNIP_FWD]);
        }
    }
    for (int l = 0; l < 2; l++) {
        test_about("layer %d: fwd %g of %g, dgrad %g of %g", l, got[l][0], truth[l][0], got[l][1], truth[l][1]);
        CHECK(close_to(got[l][0], truth[l][0], 0.25));  // the weight's part is divided between fwd and dgrad by norms
        if (l == 0)
            CHECK(got[l][1] == 0);  // nothing lies below the first layer's dX
        else
            CHECK(close_to(got[l][1], truth[l][1], 0.25));
        CHECK(close_to(got[l][0] + got[l][1], truth[l][0] + truth[l][1], 0.15));
    }
}

static snip_layer_info estimates_under_scale(double grad_scale) {
    model n = update_model();
    snip_desc d = update_description();
    snip_adamw o = optimizer(5);
    snip *s = model_session(&n, &d);
    o.grad_scale = grad_scale;
    for (int step = 0; step < 3; step++) {
        do model_pass(&n, s);
        while (snip_next_pass(s, n.loss));
        CHECK(snip_end_step(s, &o) == SNIP_OK);
    }
    return layer_of(s, 0);
}

static void a_factor_on_the_gradients_enters_squared(void) {  // as clipping puts one there
    snip_layer_info whole = estimates_under_scale(1), half = estimates_under_scale(0.5);
    CHECK(close_to(half.fp4.update[SNIP_FWD] / whole.fp4.update[SNIP_FWD], 0.25, 1e-6));
    CHECK(close_to(half.fp4.update[SNIP_WGRAD] / whole.fp4.update[SNIP_WGRAD], 0.25, 1e-6));
    CHECK(half.fp4.loss_second == whole.fp4.loss_second);
}

// What lies along dY when rounded to nearest repeats, the rest is divided by the horizon.
static void backward_errors_average_out_over_the_horizon(void) {
    model n = update_model();
    update_reference r = update_reference_of(&n);
    double dy_sq = sum_of_squares(r.dy, n.rows * n.out);
    for (int stochastic = 0; stochastic < 2; stochastic++) {
        snip_desc d = update_description();
        d.horizon = 50;
        if (stochastic) d.fp4.gradient.rounding = SNIP_ROUND_STOCHASTIC;
        snip *s = model_session(&n, &d);
        for (int step = 0; step < 2; step++) CHECK(model_still_step(&n, s, r.o.step) == SNIP_OK);
        snip_layer_info info = layer_of(s, 1);
        double error = rounding_error(&recipe_fp4_tile, r.dy, n.rows, n.out) * n.rows * n.out;
        double repeats = stochastic ? 0 : error / dy_sq;
        CHECK(stochastic || repeats > 0.002);
        for (int g = SNIP_DGRAD; g <= SNIP_WGRAD; g++)
            CHECK(close_to(info.fp4.cost[g], info.fp4.update[g] * (repeats + (1 - repeats) / 50), 1e-3));
    }
}

// Operands that all saturate, of equal size: MXFP4 turns 7.5 into 6, so e = -0.2 X and -0.2 W, and Y shrinks by 0.4. Of
// the first layer, against the gradients under such a shrinking, block of rows by block: sum_j |D_j dG_j|^2 / |W_j|^2,
// with dW itself added to the first layer's (the probe's <dX, X> moves with W too).
static double shrinking_truth(update_reference *r) {
    enum { BLOCK = 32 };

    const float step_size = 1e-3f;
    model *n = &r->n;
    double *h = doubles(n->rows * n->hid), truth = 0;
    product(h, n->rows, n->hid, n->in, n->x, n->in, 1, n->w[0], n->in, 1);
    for (int first = 0; first < n->rows; first += BLOCK) {
        int rows = first + BLOCK < n->rows ? BLOCK : n->rows - first;
        float *shrunk = floats(n->rows * n->hid);
        double *own = doubles(n->hid * n->in);
        model_pass(n, r->exact);
        product(own, n->hid, n->in, rows, n->dh + first * n->hid, 1, n->hid, n->x + first * n->in, 1, n->in);
        for (int i = 0; i < n->hid * n->in; i++) own[i] *= (double)step_size;
        for (int i = first * n->hid; i < (first + rows) * n->hid; i++) shrunk[i] = (float)h[i] * step_size;
        n->noise_h = shrunk;
        model_pass(n, r->exact);
        n->noise_h = NULL;
        truth += 0.16 * update_change(r, own) / ((double)step_size * (double)step_size);
    }
    return truth;
}

static void update_estimates_of_operands_that_shrink(void) {
    enum { STEPS = 300 };

    static const snip_recipe mx = SNIP_RECIPE_MXFP4;
    model n = model_new(12, 80, 32, 64, 28);
    for (int i = 0; i < n.rows * n.in; i++) n.x[i] = random_bits() & 1 ? 1.875f : -1.875f;
    for (int i = 0; i < n.hid * n.in; i++) n.w[0][i] = random_bits() & 1 ? 0.1171875f : -0.1171875f;
    update_reference r = update_reference_of(&n);
    double truth = shrinking_truth(&r), got = 0;
    snip_desc d = description();
    d.every = 1;
    d.high = SNIP_F32;
    d.fp4.activation = d.fp4.weight = mx;
    snip *s = model_session(&r.n, &d);
    CHECK(model_still_step(&r.n, s, r.o.step) == SNIP_OK);
    for (int step = 0; step < STEPS; step++) {
        CHECK(model_still_step(&r.n, s, r.o.step) == SNIP_OK);
        got += layer_of(s, 0).fp4.update[SNIP_FWD] * r.update_sq / STEPS;
    }
    test_about("%g, expected %g", got, truth);
    CHECK(close_to(got, truth, 0.15));
}

// ---- other optimizers ----

static const double pi = 3.14159265358979;

// The mean of sign(a + noise * N(0, 1)) by the trapezoid rule
static double mean_sign(double a, double noise) {
    double sum = 0;
    for (double z = -8; z <= 8; z += 1e-4) {
        double value = a + noise * z;
        sum += (value > 0 ? 1 : value < 0 ? -1 : 0) * exp(-0.5 * z * z) * 1e-4 / sqrt(2 * pi);
    }
    return sum;
}

// Lion's slope for a weight of momentum m: `noise` is the gradient's, beside which m is known.
static double lion_slope(const snip_adamw *o, double m, double noise) {
    double rest = (1 - o->beta1) * noise;
    return sqrt(2 / pi) / noise * exp(-0.5 * pow(o->beta1 * m / rest, 2));
}

static void the_lion_slope_is_that_of_the_mean_sign(void) {
    const snip_adamw o = optimizer(9);
    const double noise = 0.7, step = 1e-2 * noise, rest = (1 - o.beta1) * noise;
    for (int i = 0; i < 25; i++) {
        double m = 0.15 * noise * (double)normal(), at = o.beta1 * m;
        double slope = mean_sign(at + (1 - o.beta1) * step, rest) - mean_sign(at - (1 - o.beta1) * step, rest);
        CHECK(close_to(lion_slope(&o, m, noise), slope / (2 * step), 0.02));
    }
}

static model other_model(void) { return model_new(12, 32, 24, 40, 16); }

// |D * dW_err|^2 / |W|^2 / U^2 with each layer's own weight gradient in FP4, D by definition.
static void momentum_truth(model *n, const snip_desc *description_of, double truth[2]) {
    snip_desc d = *description_of;
    const snip_adamw o = optimizer(9);
    double update_sq = 0;
    d.every = -1;
    d.high = SNIP_F32;
    snip *exact = session_open(&d), *fp4 = session_open(&d);
    model_add(n, exact);
    model_add(n, fp4);
    snip_set_format(fp4, -1, SNIP_GEMMS, SNIP_E2M1);
    model_pass(n, exact);
    for (int l = 0; l < 2; l++) {
        int count = weights_of(n, l);
        float *y = floats(n->rows * n->hid), *dw = floats(count);
        double m_sq = sum_of_squares(n->m[l], count), w_sq = sum_of_squares(n->w[l], count);
        double noise = sqrt(m_sq / count * (1 + o.beta2) / (1 - o.beta2));
        snip_linear_forward(fp4, l, y, l ? n->a : n->x, n->w[l], NULL, n->rows);
        snip_linear_backward(fp4, l, NULL, dw, NULL, l ? n->dy : n->dh, l ? n->a : n->x, n->w[l], n->rows);
        update_sq += (d.optimizer == SNIP_LION ? count : m_sq) / w_sq;
        truth[l] = 0;
        for (int i = 0; i < count; i++) {
            double slope = d.optimizer == SNIP_LION ? lion_slope(&o, (double)n->m[l][i], noise) : 1;
            truth[l] += pow(slope * ((double)dw[i] - (double)n->dw[l][i]), 2) / w_sq;
        }
    }
    for (int l = 0; l < 2; l++) truth[l] /= update_sq;
}

static void check_momentum_optimizer(snip_optimizer kind) {
    model n = other_model();
    double truth[2];
    snip_desc d = description();
    d.optimizer = kind;
    d.fp4.gradient = recipe_fp4_tile;
    d.sample = 1;
    d.every = 1;
    snip *s = session_open(&d);
    CHECK(snip_bind_momentum(s, 0, n.m[0]) == SNIP_BAD_ARGUMENT);  // no such layer yet
    model_add(&n, s);
    for (int l = 0; l < 2; l++) CHECK(snip_bind_momentum(s, l, n.m[l]) == SNIP_OK);
    CHECK(snip_bind_adamw(s, 0, n.m[0], n.v[0]) == SNIP_BAD_ARGUMENT);
    CHECK(snip_bind_momentum(s, 0, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(model_still_step(&n, s, 9) == SNIP_OK && model_still_step(&n, s, 9) == SNIP_OK && snip_plans(s) == 1);
    momentum_truth(&n, &d, truth);
    for (int l = 0; l < 2; l++) {
        snip_layer_info info = layer_of(s, l);
        CHECK(close_to(info.fp4.update[SNIP_WGRAD], truth[l], 1e-3));
        CHECK(info.fp4.update[SNIP_FWD] > 10 * info.fp8.update[SNIP_FWD] && info.fp8.update[SNIP_FWD] > 0);
    }
}

static void sgd_with_momentum(void) { check_momentum_optimizer(SNIP_SGD_MOMENTUM); }

static void lion(void) { check_momentum_optimizer(SNIP_LION); }

typedef struct {
    model *n;
    snip_adamw o;
    int asked;
} custom;

static double custom_sensitivity(void *user, int layer, float *d) {
    custom *c = (custom *)user;
    const float *v = c->n->v[layer];
    int count = weights_of(c->n, layer);
    c->asked++;
    for (int i = 0; d && i < count; i++) d[i] = (float)adamw_slope(&c->o, v[i]);
    return adamw_update_sq(&c->o, c->n->m[layer], v, count);
}

static void adamw_by_callback_gives_the_estimates_of_adamw(void) {
    snip_layer_info info[2][2];
    for (int i = 0; i < 2; i++) {
        model n = other_model();
        custom c = { NULL, optimizer(9), 0 };
        snip_desc d = description();
        c.n = &n;
        d.every = 1;
        if (i) {
            d.optimizer = SNIP_CUSTOM;
            d.sensitivity = custom_sensitivity;
            d.sensitivity_user = &c;
        }
        snip *s = session_open(&d);
        model_add(&n, s);
        if (i) {
            CHECK(snip_bind_adamw(s, 0, n.m[0], n.v[0]) == SNIP_BAD_ARGUMENT);
            CHECK(snip_bind_momentum(s, 0, n.m[0]) == SNIP_BAD_ARGUMENT);
        } else
            model_bind(&n, s);
        CHECK(model_still_step(&n, s, 9) == SNIP_OK && c.asked == 0);
        CHECK(model_still_step(&n, s, 9) == SNIP_OK && (c.asked > 0) == i && snip_plans(s) == 1);
        for (int l = 0; l < 2; l++) info[i][l] = layer_of(s, l);
    }
    for (int l = 0; l < 2; l++)
        for (int g = 0; g < SNIP_GEMMS; g++) {
            CHECK(close_to(info[0][l].fp4.update[g], info[1][l].fp4.update[g], 1e-4));
            CHECK(close_to(info[0][l].fp8.update[g], info[1][l].fp8.update[g], 1e-4));
        }
}

// ---- micro-batches ----

typedef struct {
    double loss_first, loss_second, update[SNIP_GEMMS];
} mean_estimate;

// Mean estimates of both layers in FP4 with so many micro-batches, the weights at rest.
static void mean_estimates(int micros, mean_estimate mean[2]) {
    enum { STEPS = 30 };

    model n = model_new(5, 64, 48, 64, 32);
    snip_desc d = description();
    memset(mean, 0, 2 * sizeof *mean);
    n.micros = micros;
    d.every = 1;
    d.sample = 1;
    d.fp4.gradient = recipe_fp4_tile;
    snip *s = model_session(&n, &d);
    CHECK(model_still_step(&n, s, 3) == SNIP_OK);
    for (int step = 0; step < STEPS; step++) {
        CHECK(model_still_step(&n, s, 3) == SNIP_OK);
        for (int l = 0; l < 2; l++) {
            snip_layer_info info = layer_of(s, l);
            mean[l].loss_first += info.fp4.loss_first / STEPS;
            mean[l].loss_second += info.fp4.loss_second / STEPS;
            for (int g = 0; g < SNIP_GEMMS; g++) mean[l].update[g] += info.fp4.update[g] / STEPS;
        }
    }
}

static void micro_batches_give_the_estimates_of_the_whole_batch(void) {
    mean_estimate whole[2], parts[2];
    mean_estimates(1, whole);
    for (int micros = 2; micros <= 3; micros++) {
        mean_estimates(micros, parts);
        for (int l = 0; l < 2; l++) {
            const mean_estimate *a = &parts[l], *b = &whole[l];
            test_about("%d micro-batches, layer %d", micros, l);
            CHECK(close_to(a->loss_first, b->loss_first, 2e-3));
            CHECK(close_to(a->loss_second, b->loss_second, 0.1));
            CHECK(close_to(a->update[SNIP_FWD], b->update[SNIP_FWD], 0.2));
            if (l == 0)
                CHECK(a->update[SNIP_DGRAD] < 1e-9);  // nothing lies below the first layer
            else
                CHECK(close_to(a->update[SNIP_DGRAD], b->update[SNIP_DGRAD], 0.2));
            CHECK(a->update[SNIP_WGRAD] > 0.5 * b->update[SNIP_WGRAD]);
            CHECK(a->update[SNIP_WGRAD] < 2 * b->update[SNIP_WGRAD]);
        }
    }
}

// The optimizer's slopes and the size of its update, as the estimates use them.
static void slopes_and_updates_are_those_of_adamw(void) {
    model n = model_small();
    snip_desc d = description();
    d.every = 1;
    snip *s = model_session(&n, &d);
    float *slopes = floats(weights_of(&n, 0));
    snip_adamw o = optimizer(2);
    CHECK(snip_layer_sensitivity(s, 0, slopes) == SNIP_BAD_ARGUMENT);      // no step yet
    CHECK(model_step(&n, s, 1) == SNIP_OK && snip_update_sq(s, &o) == 0);  // no |W| yet
    CHECK(model_step(&n, s, 2) == SNIP_OK);
    CHECK(snip_layer_sensitivity(s, 0, slopes) == SNIP_OK);
    for (int i = 0; i < weights_of(&n, 0); i++) CHECK(close_to((double)slopes[i], adamw_slope(&o, n.v[0][i]), 1e-4));
    CHECK(snip_layer_sensitivity(s, 2, slopes) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "no such layer"));
    CHECK(snip_layer_sensitivity(s, 0, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_layer_sensitivity(NULL, 0, slopes) == SNIP_BAD_ARGUMENT);
    double expected = 0;
    for (int l = 0; l < 2; l++)
        expected += adamw_update_sq(&o, n.m[l], n.v[l], weights_of(&n, l)) / sum_of_squares(n.w[l], weights_of(&n, l));
    CHECK(close_to(snip_update_sq(s, &o), expected, 0.05));  // |W|^2 is of before the update
    CHECK(snip_update_sq(s, NULL) == 0 && snip_update_sq(NULL, &o) == 0);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(loss_estimates_are_those_of_a_quadratic_loss);
    RUN(update_estimates_are_those_of_white_noise);
    RUN(a_factor_on_the_gradients_enters_squared);
    RUN(backward_errors_average_out_over_the_horizon);
    RUN(update_estimates_of_operands_that_shrink);
    RUN(the_lion_slope_is_that_of_the_mean_sign);
    RUN(slopes_and_updates_are_those_of_adamw);
    RUN(sgd_with_momentum);
    RUN(lion);
    RUN(adamw_by_callback_gives_the_estimates_of_adamw);
    RUN(micro_batches_give_the_estimates_of_the_whole_batch);
    return test_end();
}
