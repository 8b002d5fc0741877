// Training runs that are unlike the usual: losses of zero and losses that stand still, mixtures of experts, frozen
// layers, micro-batches of zeros and in reverse, measurements that fail, thousands of layers. Public names alone.
#include "session.h"
#include <time.h>

enum { WIDTH = 64, WEIGHTS = WIDTH * WIDTH };

// ---- one square layer ----

typedef struct {
    float *w, *x, *y, *dy, *dx, *dw, *m, *v;  // [WIDTH][WIDTH]
} square;

static square square_new(void) {
    square q;
    q.w = randoms(WEIGHTS, 0.25f);
    q.x = randoms(WEIGHTS, 1);
    q.y = floats(WEIGHTS);
    q.dy = randoms(WEIGHTS, 1.0f / 4096);
    q.dx = floats(WEIGHTS);
    q.dw = floats(WEIGHTS);
    q.m = randoms(WEIGHTS, 1e-3f);
    q.v = floats(WEIGHTS);
    for (int i = 0; i < WEIGHTS; i++) q.v[i] = q.m[i] * q.m[i];
    return q;
}

static snip *square_session(const square *q, int every) {
    snip_desc d = description();
    d.budget = 0.5;
    d.every = every;
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.a", WIDTH, WIDTH, 0) == 0 && snip_bind_adamw(s, 0, q->m, q->v) == SNIP_OK);
    return s;
}

// A step with a loss of our choice; its number of passes.
static int square_step(const square *q, snip *s, double loss, snip_status *status) {
    snip_adamw o = optimizer(snip_step(s) + 1);
    int passes = 0;
    do {
        passes++;
        snip_linear_forward(s, 0, q->y, q->x, q->w, NULL, WIDTH);
        snip_linear_backward(s, 0, q->dx, q->dw, NULL, q->dy, q->x, q->w, WIDTH);
    } while (snip_next_pass(s, loss));
    *status = snip_end_step(s, &o);
    return passes;
}

// ---- losses ----

typedef struct {
    const char *name;
    double first, later, noise, grain, jump;  // grain: losses are its multiples, as those of bfloat16 are
} loss_case;

// Of 600 steps, those that fall back; the jump at step 590 is told apart.
static int alarms_of(const loss_case *c, int *jump_is_seen) {
    square q = square_new();
    snip *s = square_session(&q, 100000);
    int alarms = 0;
    for (int step = 1; step <= 600; step++) {
        snip_status status;
        double loss = step <= 60 ? c->first : c->later * (1 + c->noise * sin(1.7 * step));
        if (c->grain > 0) loss = c->grain * floor(loss / c->grain + 0.5);
        if (step == 590) loss = c->jump;
        snip_set_format(s, 0, SNIP_GEMMS, SNIP_E2M1);
        square_step(&q, s, loss, &status);
        CHECK(status == SNIP_OK);
        int alarm = layer_of(s, 0).format[SNIP_FWD] != SNIP_E2M1;
        if (step == 590)
            *jump_is_seen = alarm;
        else
            alarms += alarm;
    }
    session_close(s);
    return alarms;
}

static void losses_that_stand_still_do_not_blind_the_spike_detector(void) {
    static const loss_case cases[] = {
        {"0, then 0.01",             0,    0.01, 0.02,  0,        1   },
        { "0, then a million",       0,    1e6,  0.02,  0,        1e8 },
        { "2.5, then a little less", 2.5,  2.4,  0.01,  0,        9   },
        { "in bfloat16's steps",     2.5,  2.4,  0.002, 1.0 / 64, 9   },
        { "tiny",                    1e-9, 1e-9, 0.02,  0,        1e-6},
        { "negative",                -3,   -3.1, 0.02,  0,        2   },
    };
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        int seen = 0, alarms = alarms_of(&cases[i], &seen);
        test_about("%s: %d of 599 steps are taken for spikes", cases[i].name, alarms);
        CHECK(seen);
        CHECK(alarms <= 12);
    }
}

static void losses_of_zero_and_near_it_are_planned(void) {
    static const double losses[] = { 0, 1e-12, 1e-6, 1, -1e-6, 1e9 };
    for (int i = 0; i < (int)(sizeof losses / sizeof losses[0]); i++) {
        square q = square_new();
        snip *s = square_session(&q, 5);
        test_about("loss %g", losses[i]);
        for (int step = 1; step <= 30; step++) {
            snip_status status;
            square_step(&q, s, losses[i], &status);
            CHECK(status == SNIP_OK);
        }
        snip_layer_info info = layer_of(s, 0);
        CHECK(snip_plans(s) >= 5 && snip_share(s, SNIP_E2M1) >= 0.5);
        for (int g = 0; g < SNIP_GEMMS; g++) CHECK(is_finite(info.fp4.cost[g]) && is_finite(info.fp4.error[g]));
    }
}

// ---- measurements that fail, or meet nothing ----

static void a_failed_measurement_is_made_anew_soon(void) {
    enum { EVERY = 100 };

    square q = square_new();
    snip *s = square_session(&q, EVERY);
    snip_status status;
    for (int step = 1; step <= EVERY; step++) CHECK(square_step(&q, s, 2, &status) == 1);
    CHECK(square_step(&q, s, (double)NAN, &status) > 1 && status == SNIP_NONFINITE && snip_plans(s) == 0);
    for (int step = 0; step < EVERY / 5; step++) square_step(&q, s, 2, &status);
    CHECK(snip_plans(s) == 1);
}

static void a_measurement_that_meets_no_layer_makes_no_plan(void) {
    enum { EVERY = 100 };

    square q = square_new();
    snip *s = square_session(&q, EVERY);
    snip_status status;
    for (int step = 1; step <= EVERY; step++) square_step(&q, s, 2, &status);
    snip_adamw o = optimizer(EVERY + 1);
    while (snip_next_pass(s, 2)) {  // nothing but the loss
    }
    snip_end_step(s, &o);
    CHECK(snip_plans(s) == 0 && !strstr(snip_reason(s), "first plan"));
    for (int step = 0; step < EVERY / 5; step++) square_step(&q, s, 2, &status);
    CHECK(snip_plans(s) == 1);
}

// ---- a mixture of experts, whose router reads the first layer's output ----

enum { TOKENS = 512, FEATURES = 32, EXPERTS = 4, LAYERS = EXPERTS + 1, EXPERT_WEIGHTS = FEATURES * FEATURES };

typedef struct {
    float *w[LAYERS], *dw[LAYERS], *m[LAYERS], *v[LAYERS];
    float *x, *h, *dh, *in, *out, *dout, *din, *router;
    int expert[TOKENS];
    int idle;  // an expert that no token reaches
    int64_t fewest, most;
} experts;

static experts experts_new(int idle) {
    experts e;
    memset(&e, 0, sizeof e);
    e.idle = idle;
    e.fewest = TOKENS;
    for (int l = 0; l < LAYERS; l++) {
        e.w[l] = randoms(EXPERT_WEIGHTS, 0.2f);
        e.dw[l] = floats(EXPERT_WEIGHTS);
        e.m[l] = floats(EXPERT_WEIGHTS);
        e.v[l] = floats(EXPERT_WEIGHTS);
    }
    e.x = floats(TOKENS * FEATURES);
    e.h = floats(TOKENS * FEATURES);
    e.dh = floats(TOKENS * FEATURES);
    e.in = floats(TOKENS * FEATURES);
    e.out = floats(TOKENS * FEATURES);
    e.dout = floats(TOKENS * FEATURES);
    e.din = floats(TOKENS * FEATURES);
    e.router = randoms(EXPERTS * FEATURES, 1);
    return e;
}

static int expert_of(const experts *e, const float *h) {
    int best = -1;
    float most = 0;
    for (int k = 0; k < EXPERTS; k++) {
        float score = 0;
        for (int j = 0; j < FEATURES; j++) score += e->router[k * FEATURES + j] * h[j];
        if (k != e->idle && (best < 0 || score > most)) {
            most = score;
            best = k;
        }
    }
    return best;
}

// Forward and backward of one expert's tokens; its part of the loss.
static double expert_pass(experts *e, snip *s, int expert) {
    int index[TOKENS], rows = 0;
    double loss = 0;
    for (int t = 0; t < TOKENS; t++)
        if (e->expert[t] == expert) {
            memcpy(e->in + rows * FEATURES, e->h + t * FEATURES, FEATURES * sizeof(float));
            index[rows++] = t;
        }
    snip_linear_forward(s, expert + 1, e->out, e->in, e->w[expert + 1], NULL, rows);
    for (int i = 0; i < rows * FEATURES; i++) {
        float error = e->out[i] - e->x[index[i / FEATURES] * FEATURES + i % FEATURES];
        loss += (double)(error * error) / (TOKENS * FEATURES);
        e->dout[i] = 2 * error / (TOKENS * FEATURES);
    }
    memset(e->din, 0, TOKENS * FEATURES * sizeof(float));
    snip_linear_backward(s, expert + 1, e->din, e->dw[expert + 1], NULL, e->dout, e->in, e->w[expert + 1], rows);
    for (int i = 0; i < rows * FEATURES; i++) e->dh[index[i / FEATURES] * FEATURES + i % FEATURES] += e->din[i];
    if (expert == 0 && rows < e->fewest) e->fewest = rows;
    if (expert == 0 && rows > e->most) e->most = rows;
    return loss;
}

static snip_status experts_step(experts *e, snip *s, int step) {
    snip_adamw o = optimizer(step);
    double loss;
    for (int i = 0; i < TOKENS * FEATURES; i++) e->x[i] = uniform();
    do {
        loss = 0;
        for (int l = 0; l < LAYERS; l++) memset(e->dw[l], 0, EXPERT_WEIGHTS * sizeof(float));
        memset(e->dh, 0, TOKENS * FEATURES * sizeof(float));
        snip_linear_forward(s, 0, e->h, e->x, e->w[0], NULL, TOKENS);
        for (int t = 0; t < TOKENS; t++) e->expert[t] = expert_of(e, e->h + t * FEATURES);
        for (int k = 0; k < EXPERTS; k++) loss += expert_pass(e, s, k);
        snip_linear_backward(s, 0, NULL, e->dw[0], NULL, e->dh, e->x, e->w[0], TOKENS);
    } while (snip_next_pass(s, loss));
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < EXPERT_WEIGHTS; i++) {
            e->m[l][i] = 0.9f * e->m[l][i] + 0.1f * e->dw[l][i];
            e->v[l][i] = 0.95f * e->v[l][i] + 0.05f * e->dw[l][i] * e->dw[l][i];
            e->w[l][i] -= 1e-3f * e->m[l][i] / (sqrtf(e->v[l][i]) + 1e-8f);
        }
    return snip_end_step(s, &o);
}

static void check_experts(int idle) {
    experts e = experts_new(idle);
    snip_desc d = description();
    d.budget = 0.5;
    d.every = 5;
    snip *s = session_open(&d);
    for (int l = 0; l < LAYERS; l++) {
        char name[16];
        snprintf(name, sizeof name, "0.%d.w", l);
        CHECK(snip_add_linear(s, name, FEATURES, FEATURES, 0) == l && snip_bind_adamw(s, l, e.m[l], e.v[l]) == SNIP_OK);
    }
    for (int step = 1; step <= 21; step++) CHECK(experts_step(&e, s, step) == SNIP_OK);
    CHECK(snip_plans(s) >= 3 && snip_share(s, SNIP_E2M1) > 0.3);
    CHECK(idle == 0 || e.fewest < e.most);  // rows do change
}

static void experts_whose_rows_change_between_passes_are_planned(void) { check_experts(-1); }

static void experts_without_rows_are_no_hindrance(void) { check_experts(0); }

// ---- frozen layers, as under an adapter: no weight gradient, no optimizer state ----

static void frozen_layers_need_no_optimizer_and_count_what_runs(void) {
    square base = square_new(), adapter = square_new();
    double fp4 = 0;
    snip_desc d = description();
    d.budget = 0.5;
    d.every = 5;
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.base", WIDTH, WIDTH, 0) == 0 && snip_add_linear(s, "0.adapter", WIDTH, WIDTH, 0) == 1);
    CHECK(snip_bind_adamw(s, 1, adapter.m, adapter.v) == SNIP_OK);
    for (int step = 1; step <= 16; step++) {
        snip_adamw o = optimizer(step);
        do {
            snip_linear_forward(s, 0, base.y, base.x, base.w, NULL, WIDTH);
            snip_linear_forward(s, 1, adapter.y, base.x, adapter.w, NULL, WIDTH);
            snip_linear_backward(s, 1, adapter.dx, adapter.dw, NULL, base.dy, base.x, adapter.w, WIDTH);
            snip_linear_backward(s, 0, base.dx, NULL, NULL, base.dy, base.x, base.w, WIDTH);
        } while (snip_next_pass(s, 1));
        CHECK(snip_end_step(s, &o) == SNIP_OK);
    }
    CHECK(snip_plans(s) >= 2);
    for (int l = 0; l < 2; l++)
        for (int g = 0; g < SNIP_GEMMS; g++)
            if (l || g != SNIP_WGRAD) fp4 += layer_of(s, l).format[g] == SNIP_E2M1;
    CHECK(fp4 / 5 >= 0.5 && close_to(snip_share(s, SNIP_E2M1), fp4 / 5, 1e-12));  // of the five that run
}

// ---- micro-batches ----

typedef enum { WHOLE_BATCH, FORWARD_ORDER, OTHER_ORDER, REVERSED_BACKWARD } batch_order;

// FP4's curvature of the mean of y^4 / 4 over two halves of a batch; status: the measuring step's.
static double curvature(const square *q, float first_scale, batch_order order, snip_status *status) {
    enum { ROWS = 2 * WIDTH, COUNT = ROWS * WIDTH, HALF = COUNT / 2 };

    float *x = floats(COUNT), *y = floats(COUNT), *dy = floats(COUNT), *dw = floats(WEIGHTS);
    snip *s = square_session(q, 1);
    random_state = 77;
    for (int i = 0; i < COUNT; i++) x[i] = uniform() * (i < HALF ? first_scale : 1);
    for (int step = 1; step <= 2; step++) {
        snip_adamw o = optimizer(step);
        double loss;
        int parts = order == WHOLE_BATCH ? 1 : 2;
        do {
            loss = 0;
            for (int p = 0; p < parts; p++) {
                int at = (order == OTHER_ORDER ? 1 - p : p) * HALF, count = COUNT / parts;
                snip_linear_forward(s, 0, y + at, x + at, q->w, NULL, count / WIDTH);
                for (int i = at; i < at + count; i++) {
                    loss += 0.25 * pow((double)y[i], 4) / COUNT;
                    dy[i] = y[i] * y[i] * y[i] / COUNT;
                }
                if (order != REVERSED_BACKWARD)
                    snip_linear_backward(s, 0, NULL, dw, NULL, dy + at, x + at, q->w, count / WIDTH);
            }
            for (int p = 1; p >= 0 && order == REVERSED_BACKWARD; p--)
                snip_linear_backward(s, 0, NULL, dw, NULL, dy + p * HALF, x + p * HALF, q->w, WIDTH);
        } while (snip_next_pass(s, loss));
        *status = snip_end_step(s, &o);
    }
    double second = layer_of(s, 0).fp4.loss_second;
    session_close(s);
    return second;
}

static void the_order_of_micro_batches_does_not_matter(void) {
    static const float scales[] = { 1, 1e-3f, 0 };
    square q = square_new();
    for (int i = 0; i < 3; i++) {
        snip_status status;
        double whole = curvature(&q, scales[i], WHOLE_BATCH, &status);
        CHECK(status == SNIP_OK);
        for (int order = FORWARD_ORDER; order <= OTHER_ORDER; order++) {
            double parts = curvature(&q, scales[i], (batch_order)order, &status);
            test_about("first half times %g, order %d: %g, whole %g", (double)scales[i], order, parts, whole);
            CHECK(status == SNIP_OK && close_to(parts, whole, 0.3));
        }
    }
}

static void backward_calls_in_reverse_are_matched_or_refused(void) {
    square q = square_new();
    snip_status status;
    double ordered = curvature(&q, 1, FORWARD_ORDER, &status), reversed = curvature(&q, 1, REVERSED_BACKWARD, &status);
    test_about("status %d, %g, in order %g", (int)status, reversed, ordered);
    CHECK(status == SNIP_BAD_ARGUMENT || close_to(reversed, ordered, 0.1));
}

// ---- sums of a million rows ----

static void dbias_of_a_million_rows_is_right(void) {
    enum { MANY = 1 << 20 };

    float *dout = floats(MANY), *x = floats(MANY), w = 1, dbias = 0;
    double sum = 0;
    snip_desc d = description();
    d.every = -1;
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "a", 1, 1, 0) == 0);
    for (int i = 0; i < MANY; i++) {
        dout[i] = 0.1f + 0.01f * uniform();
        sum += (double)dout[i];
    }
    CHECK(snip_linear_backward(s, 0, NULL, NULL, &dbias, dout, x, &w, MANY) == SNIP_OK);
    test_about("off by %.2g", fabs((double)dbias - sum) / sum);
    CHECK(close_to((double)dbias, sum, 1e-6));
}

// ---- thousands of layers ----

static size_t live_bytes;

static void *counted_alloc(size_t size, void *user) {
    size_t *p = (size_t *)malloc(size + 16);
    (void)user;
    if (!p) return NULL;
    *p = size;
    live_bytes += size;
    return p + 16 / sizeof *p;
}

static void counted_free(void *p, void *user) {
    size_t *at = (size_t *)p - 16 / sizeof *at;
    (void)user;
    live_bytes -= *at;
    free(at);
}

static snip *session_of(int blocks, int experts_a_block) {
    snip_desc d = description();
    d.alloc.alloc_fn = counted_alloc;
    d.alloc.free_fn = counted_free;
    snip *s = session_open(&d);
    for (int b = 0; b < blocks; b++)
        for (int e = 0; e < experts_a_block; e++)
            for (int k = 0; k < 3; k++) {
                char name[48];
                snprintf(name, sizeof name, "%d.expert%d.%s", b, e, k == 0 ? "gate" : k == 1 ? "up" : "down");
                CHECK(snip_add_linear(s, name, 16, 16, 0) == (b * experts_a_block + e) * 3 + k);
            }
    return s;
}

static double seconds_to_print(const snip *s) {
    FILE *file = fopen(test_path("plan"), "w");
    clock_t began = clock();
    CHECK(file && snip_plan_print(s, file) == SNIP_OK);
    double seconds = (double)(clock() - began) / CLOCKS_PER_SEC;
    if (file) fclose(file);
    return seconds;
}

static void memory_before_a_measurement_is_small(void) {
    enum { MOST_BYTES = 4096 };

    session_of(24, 32);
    test_about("%g bytes a layer", (double)live_bytes / (24 * 32 * 3));
    CHECK(live_bytes < (size_t)24 * 32 * 3 * MOST_BYTES);
}

static void printing_takes_time_in_proportion_to_the_layers(void) {
    double few = seconds_to_print(session_of(24, 32)), many = seconds_to_print(session_of(96, 32));
    test_about("2304 layers %g s, 9216 layers %g s", few, many);
    CHECK(many < 8 * few + 0.02);  // 4 times as many
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(losses_that_stand_still_do_not_blind_the_spike_detector);
    RUN(losses_of_zero_and_near_it_are_planned);
    RUN(a_failed_measurement_is_made_anew_soon);
    RUN(a_measurement_that_meets_no_layer_makes_no_plan);
    RUN(experts_whose_rows_change_between_passes_are_planned);
    RUN(experts_without_rows_are_no_hindrance);
    RUN(frozen_layers_need_no_optimizer_and_count_what_runs);
    RUN(the_order_of_micro_batches_does_not_matter);
    RUN(backward_calls_in_reverse_are_matched_or_refused);
    RUN(dbias_of_a_million_rows_is_right);
    RUN(memory_before_a_measurement_is_small);
    RUN(printing_takes_time_in_proportion_to_the_layers);
    return test_end();
}
