// How a trainer may call its linear layers: micro-batches in any order, forwards run again, experts whose tokens move,
// frozen layers, evaluation. Public names alone.
#include "session.h"

enum { WIDTH = 32, ROWS = 64, ALL = ROWS * WIDTH, WEIGHTS = WIDTH * WIDTH };

// ---- a layer whose loss is the mean of y^4 / 4 ----

typedef struct {
    float *w, *m, *v, *dw;
    float *x, *y, *dy;  // [ROWS][WIDTH]
    double loss;
} quartic;

static quartic quartic_new(void) {
    quartic q;
    q.w = randoms(WEIGHTS, 0.2f);
    q.m = randoms(WEIGHTS, 1e-3f);
    q.v = floats(WEIGHTS);
    for (int i = 0; i < WEIGHTS; i++) q.v[i] = q.m[i] * q.m[i];
    q.dw = floats(WEIGHTS);
    q.x = randoms(ALL, 1);
    q.y = floats(ALL);
    q.dy = floats(ALL);
    return q;
}

static snip *quartic_session(const quartic *q, int every) {
    snip_desc d = description();
    d.budget = 0.5;
    d.every = every;
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.a", WIDTH, WIDTH, 0) == 0 && snip_bind_adamw(s, 0, q->m, q->v) == SNIP_OK);
    return s;
}

static snip_status quartic_forward(quartic *q, snip *s, int first, int rows) {
    float *y = q->y + first * WIDTH, *dy = q->dy + first * WIDTH;
    snip_status status = snip_linear_forward(s, 0, y, q->x + first * WIDTH, q->w, NULL, rows);
    for (int i = 0; i < rows * WIDTH; i++) {
        q->loss += 0.25 * pow((double)y[i], 4) / ALL;
        dy[i] = y[i] * y[i] * y[i] / ALL;
    }
    return status;
}

static snip_status quartic_backward(quartic *q, snip *s, int first, int rows) {
    return snip_linear_backward(s, 0, NULL, q->dw, NULL, q->dy + first * WIDTH, q->x + first * WIDTH, q->w, rows);
}

// Two micro-batches, forward in the order `forward` (0: as they lie), backward as forward, or the other way round.
static snip_status quartic_step(quartic *q, snip *s, int forward, int reversed) {
    snip_adamw o = optimizer(snip_step(s) + 1);
    snip_status worst = SNIP_OK;
    do {
        q->loss = 0;
        for (int i = 0; i < 2; i++) worst = worse(worst, quartic_forward(q, s, (i ^ forward) * ROWS / 2, ROWS / 2));
        for (int i = 0; i < 2; i++)
            worst = worse(worst, quartic_backward(q, s, (i ^ forward ^ reversed) * ROWS / 2, ROWS / 2));
    } while (snip_next_pass(s, q->loss));
    return worse(worst, snip_end_step(s, &o));
}

static double quartic_curvature(quartic *q, int forward, int reversed) {
    snip *s = quartic_session(q, 1);
    for (int step = 0; step < 2; step++) CHECK(quartic_step(q, s, forward, reversed) == SNIP_OK);
    CHECK(snip_plans(s) == 1);
    return layer_of(s, 0).fp4.loss_second;
}

static void backward_calls_come_in_any_order_of_micro_batches(void) {
    quartic q = quartic_new();
    double in_order = quartic_curvature(&q, 0, 0);
    CHECK(in_order > 0 && close_to(quartic_curvature(&q, 0, 1), in_order, 1e-6));
}

static void small_micro_batches_may_come_first(void) {
    static const float sizes[] = { 1, 1e-3f, 1e-9f, 0 };
    quartic q = quartic_new();
    const float *x = copied(q.x, ALL);
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < ALL; j++) q.x[j] = x[j] * (j < ALL / 2 ? sizes[i] : 1);
        double first = quartic_curvature(&q, 0, 0), last = quartic_curvature(&q, 1, 0);
        test_about("half the rows times %g: %g, %g", (double)sizes[i], first, last);
        CHECK(first > 0 && close_to(first, last, 0.3));  // other noise
    }
}

static void a_measurement_refuses_inputs_that_no_forward_call_had(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 1);
    float *other = copied(q.x, ALL);
    snip_adamw o = optimizer(2);
    CHECK(quartic_step(&q, s, 0, 0) == SNIP_OK);
    CHECK(quartic_forward(&q, s, 0, ROWS) == SNIP_OK);
    CHECK(snip_linear_backward(s, 0, NULL, q.dw, NULL, q.dy, other, q.w, ROWS) == SNIP_OK);          // a copy will do
    CHECK(snip_linear_backward(s, 0, NULL, q.dw, NULL, q.dy, q.x, q.w, ROWS) == SNIP_BAD_ARGUMENT);  // it is done
    other[0] += 1;
    CHECK(quartic_forward(&q, s, 0, ROWS) == SNIP_OK);
    CHECK(snip_linear_backward(s, 0, NULL, q.dw, NULL, q.dy, other, q.w, ROWS) == SNIP_BAD_ARGUMENT);
    CHECK(strstr(snip_message(s), "0.a") && strstr(snip_message(s), "no forward call") && snip_failed_layer(s) == 0);
    CHECK(snip_step_status(s) == SNIP_BAD_ARGUMENT);
    while (snip_next_pass(s, 1)) {
    }
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && snip_plans(s) == 0);
}

// ---- gradient checkpointing ----

static void forwards_run_again_give_the_same_bits_and_count_as_none(void) {
    static const snip_recipe stochastic = SNIP_RECIPE_FP4_TILE_SR;
    quartic q = quartic_new(), other = q;
    snip_desc d = description();
    float *again = floats(ALL);
    other.dw = floats(WEIGHTS);
    d.budget = 1;
    d.every = 2;
    d.fp4.activation = stochastic;  // bits that a wrong key would change
    snip *s[2];
    for (int i = 0; i < 2; i++) {
        s[i] = session_open(&d);
        snip_add_linear(s[i], "0.a", WIDTH, WIDTH, 0);
        snip_bind_adamw(s[i], 0, q.m, q.v);
    }
    for (int step = 1; step <= 6; step++) {
        snip_adamw o = optimizer(step);
        int more;
        do {
            test_about("step %d, pass %d", step, (int)snip_current_pass(s[0]));
            memset(q.dw, 0, WEIGHTS * sizeof(float));
            memset(other.dw, 0, WEIGHTS * sizeof(float));
            for (int first = 0; first < ROWS; first += ROWS / 2)
                CHECK(quartic_forward(&q, s[0], first, ROWS / 2) == SNIP_OK &&
                      quartic_forward(&other, s[1], first, ROWS / 2) == SNIP_OK);
            for (int first = ROWS / 2; first >= 0; first -= ROWS / 2) {
                const float *copy = copied(q.x + first * WIDTH, ROWS / 2 * WIDTH);
                CHECK(snip_linear_recompute(s[0], 0, again, copy, q.w, NULL, ROWS / 2) == SNIP_OK);
                CHECK(same_floats(again, q.y + first * WIDTH, ROWS / 2 * WIDTH));
                CHECK(quartic_backward(&q, s[0], first, ROWS / 2) == SNIP_OK &&
                      quartic_backward(&other, s[1], first, ROWS / 2) == SNIP_OK);
            }
            CHECK(layer_of(s[0], 0).saturated == layer_of(s[1], 0).saturated);
            more = snip_next_pass(s[0], q.loss);
            CHECK(more == snip_next_pass(s[1], q.loss));
        } while (more);
        CHECK(snip_end_step(s[0], &o) == SNIP_OK && snip_end_step(s[1], &o) == SNIP_OK);
        snip_layer_info a = layer_of(s[0], 0), b = layer_of(s[1], 0);
        CHECK(!memcmp(&a.fp4, &b.fp4, sizeof a.fp4) && same_floats(q.dw, other.dw, WEIGHTS));
    }
    CHECK(snip_plans(s[0]) == 2 && snip_share(s[0], SNIP_E2M1) == 1);
}

static void a_forward_that_was_not_is_not_run_again(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 1);
    float *again = floats(ALL);
    again[0] = 3;
    CHECK(snip_linear_recompute(s, 0, again, q.x, q.w, NULL, ROWS) == SNIP_BAD_ARGUMENT && again[0] == 3);
    CHECK(strstr(snip_message(s), "snip_linear_recompute"));
    CHECK(snip_linear_recompute(s, 1, again, q.x, q.w, NULL, ROWS) == SNIP_BAD_ARGUMENT);
    CHECK(snip_linear_recompute(s, 0, NULL, q.x, q.w, NULL, ROWS) == SNIP_BAD_ARGUMENT);
    CHECK(snip_linear_recompute(NULL, 0, again, q.x, q.w, NULL, ROWS) == SNIP_BAD_ARGUMENT);
    CHECK(snip_linear_recompute(s, 0, again, q.x, q.w, NULL, 0) == SNIP_OK);
    snip_set_mode(s, SNIP_EVAL);
    CHECK(snip_linear_recompute(s, 0, again, q.x, q.w, NULL, ROWS) == SNIP_BAD_ARGUMENT && again[0] == 3);
}

static void the_mode_stays_within_a_pass(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 5);
    snip_adamw o = optimizer(1);
    CHECK(snip_set_mode(s, SNIP_EVAL) == SNIP_OK && snip_set_mode(s, SNIP_TRAIN) == SNIP_OK);
    CHECK(quartic_forward(&q, s, 0, ROWS) == SNIP_OK);
    CHECK(snip_set_mode(s, SNIP_EVAL) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "within a pass"));
    CHECK(snip_set_mode(s, SNIP_TRAIN) == SNIP_OK);
    CHECK(quartic_backward(&q, s, 0, ROWS) == SNIP_OK && snip_next_pass(s, 1) == 0);
    CHECK(snip_set_mode(s, SNIP_EVAL) == SNIP_OK && snip_set_mode(s, SNIP_TRAIN) == SNIP_OK);
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT);
}

static void a_forgotten_evaluation_mode_is_named(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 1);
    snip_adamw o = optimizer(2);
    CHECK(quartic_step(&q, s, 0, 0) == SNIP_OK);
    CHECK(quartic_forward(&q, s, 0, ROWS) == SNIP_OK);  // a validation, before a measuring step
    do {
        quartic_forward(&q, s, 0, ROWS);
        quartic_backward(&q, s, 0, ROWS);
    } while (snip_next_pass(s, 1));
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "SNIP_EVAL"));
    CHECK(quartic_forward(&q, s, 0, ROWS) == SNIP_OK && quartic_backward(&q, s, 0, ROWS) == SNIP_OK);
    while (snip_next_pass(s, 1)) {
        quartic_forward(&q, s, 0, ROWS);
        quartic_backward(&q, s, 0, ROWS);
    }
    CHECK(quartic_forward(&q, s, 0, ROWS) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "SNIP_EVAL"));
}

// ---- a mixture of experts, whose router sees the first layer's output ----

enum { EXPERTS = 4, TOKENS = 1024, IN = 32, EXPERT_WEIGHTS = IN * IN };

typedef struct {
    float *w[EXPERTS + 1], *m[EXPERTS + 1], *v[EXPERTS + 1], *dw[EXPERTS + 1];
    float *router;                         // [EXPERTS][IN]
    float *x, *h, *dh;                     // [TOKENS][IN]
    float *gathered, *y, *dy, *dgathered;  // of one expert
    int expert[TOKENS], place[TOKENS];
    int hold;   // the routing is the first pass's
    int empty;  // this expert gets no tokens in probes
    double loss;
} mixture;

static mixture mixture_new(void) {
    mixture x;
    memset(&x, 0, sizeof x);
    x.empty = -1;
    for (int l = 0; l <= EXPERTS; l++) {
        x.w[l] = randoms(EXPERT_WEIGHTS, 0.3f);
        x.m[l] = randoms(EXPERT_WEIGHTS, 0.01f);
        x.v[l] = floats(EXPERT_WEIGHTS);
        for (int i = 0; i < EXPERT_WEIGHTS; i++) x.v[l][i] = x.m[l][i] * x.m[l][i] + 1e-6f;
        x.dw[l] = floats(EXPERT_WEIGHTS);
    }
    x.router = randoms(EXPERTS * IN, 1);
    x.x = randoms(TOKENS * IN, 1);
    x.h = floats(TOKENS * IN);
    x.dh = floats(TOKENS * IN);
    x.gathered = floats(TOKENS * IN);
    x.y = floats(TOKENS * IN);
    x.dy = floats(TOKENS * IN);
    x.dgathered = floats(TOKENS * IN);
    return x;
}

static void mixture_route(mixture *x) {
    for (int t = 0; t < TOKENS; t++) {
        double best = -1e30;
        for (int e = 0; e < EXPERTS; e++) {
            double score = 0;
            for (int j = 0; j < IN; j++) score += (double)x->router[e * IN + j] * (double)x->h[t * IN + j];
            if (score > best) {
                best = score;
                x->expert[t] = e;
            }
        }
    }
}

static snip_status mixture_expert(mixture *x, snip *s, int e) {
    int n = 0;
    for (int t = 0; t < TOKENS; t++)
        if (x->expert[t] == e && (e != x->empty || snip_current_pass(s) == SNIP_PASS_CLEAN)) x->place[n++] = t;
    for (int i = 0; i < n; i++) memcpy(x->gathered + i * IN, x->h + x->place[i] * IN, IN * sizeof(float));
    snip_status status = snip_linear_forward(s, e + 1, x->y, x->gathered, x->w[e + 1], NULL, n);
    for (int i = 0; i < n * IN; i++) {
        float r = x->y[i] - x->x[x->place[i / IN] * IN + i % IN];
        x->loss += (double)r * (double)r / (TOKENS * IN);
        x->dy[i] = 2 * r / (TOKENS * IN);
    }
    memset(x->dgathered, 0, (size_t)(n * IN) * sizeof(float));
    status = worse(
        status, snip_linear_backward(s, e + 1, x->dgathered, x->dw[e + 1], NULL, x->dy, x->gathered, x->w[e + 1], n));
    for (int i = 0; i < n * IN; i++) x->dh[x->place[i / IN] * IN + i % IN] += x->dgathered[i];
    return status;
}

static snip_status mixture_step(mixture *x, snip *s) {
    snip_adamw o = optimizer(snip_step(s) + 1);
    snip_status worst = SNIP_OK;
    int first = 1;
    do {
        x->loss = 0;
        memset(x->dh, 0, TOKENS * IN * sizeof(float));
        worst = worse(worst, snip_linear_forward(s, 0, x->h, x->x, x->w[0], NULL, TOKENS));
        if (first || !x->hold) mixture_route(x);
        first = 0;
        for (int e = 0; e < EXPERTS; e++) worst = worse(worst, mixture_expert(x, s, e));
        worst = worse(worst, snip_linear_backward(s, 0, NULL, x->dw[0], NULL, x->dh, x->x, x->w[0], TOKENS));
    } while (snip_next_pass(s, x->loss));
    return worse(worst, snip_end_step(s, &o));
}

static snip *mixture_session(const mixture *x) {
    char name[16];
    snip_desc d = description();
    d.budget = 0.5;
    d.every = 2;
    snip *s = session_open(&d);
    for (int l = 0; l <= EXPERTS; l++) {
        snprintf(name, sizeof name, "0.%d.w", l);
        CHECK(snip_add_linear(s, name, IN, IN, 0) == l && snip_bind_adamw(s, l, x->m[l], x->v[l]) == SNIP_OK);
    }
    return s;
}

static void experts_whose_tokens_move_are_planned(void) {
    mixture moving = mixture_new(), held = moving;
    snip *s = mixture_session(&moving), *still = mixture_session(&held);
    held.hold = 1;
    for (int step = 1; step <= 11; step++) {
        CHECK(mixture_step(&moving, s) == SNIP_OK && mixture_step(&held, still) == SNIP_OK);
        for (int i = 0; i < TOKENS * IN; i++) moving.x[i] = normal();  // held shares them
    }
    CHECK(snip_plans(s) == 5 && snip_plans(still) == 5 && snip_share(s, SNIP_E2M1) >= 0.5);
    for (int l = 1; l <= EXPERTS; l++) {
        snip_layer_info info = layer_of(s, l);
        double second = info.fp4.loss_second, known = layer_of(still, l).fp4.loss_second;
        test_about("layer %d: %g, held %g", l, second, known);
        CHECK(second > known / 2 && second < known * 2);
        CHECK(is_finite(info.fp4.cost[SNIP_FWD]) && info.fp4.cost[SNIP_DGRAD] > 0 && info.fp4.cost[SNIP_WGRAD] > 0);
    }
}

static void experts_without_tokens_are_planned(void) {
    mixture x = mixture_new();
    x.empty = 2;
    snip *s = mixture_session(&x);
    for (int step = 1; step <= 3; step++) CHECK(mixture_step(&x, s) == SNIP_OK);
    CHECK(snip_plans(s) == 1);
    snip_layer_info info = layer_of(s, 3);  // no tokens in the probes, some in the clean pass
    for (int g = 0; g < SNIP_GEMMS; g++) CHECK(info.fp4.cost[g] > 0 && is_finite(info.fp4.cost[g]));
    CHECK(info.fp4.update[SNIP_FWD] > 0 && info.fp4.update[SNIP_DGRAD] > 0 && info.fp4.loss_second > 0);
}

static void passes_of_other_rows_all_over_are_refused(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 1);
    snip_adamw o = optimizer(2);
    CHECK(quartic_step(&q, s, 0, 0) == SNIP_OK);
    do {
        const int rows = snip_current_pass(s) == SNIP_PASS_CLEAN ? ROWS / 2 : ROWS;
        quartic_forward(&q, s, 0, rows);
        quartic_backward(&q, s, 0, rows);
    } while (snip_next_pass(s, 1));
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "different rows"));
    CHECK(snip_plans(s) == 0);
}

// ---- frozen layers ----

// A frozen layer (dweight NULL, nothing bound) and one that trains.
static snip *frozen_session(const quartic *q, double budget, int bound) {
    snip_desc d = description();
    d.budget = budget;
    d.every = 3;
    snip *s = session_open(&d);
    snip_add_linear(s, "0.base", WIDTH, WIDTH, 0);
    snip_add_linear(s, "0.adapter", WIDTH, WIDTH, 0);
    snip_bind_adamw(s, 1, q->m, q->v);
    if (bound) snip_bind_adamw(s, 0, floats(WEIGHTS), floats(WEIGHTS));
    return s;
}

static snip_status frozen_step(const quartic *q, snip *s) {
    snip_adamw o = optimizer(snip_step(s) + 1);
    float *dx = floats(ALL);
    snip_status worst = SNIP_OK;
    do
        for (int l = 0; l < 2; l++) {
            worst = worse(worst, snip_linear_forward(s, l, q->y, q->x, q->w, NULL, ROWS));
            worst = worse(worst, snip_linear_backward(s, l, dx, l ? q->dw : NULL, NULL, q->dy, q->x, q->w, ROWS));
        }
    while (snip_next_pass(s, 1));
    return worse(worst, snip_end_step(s, &o));
}

static void frozen_layers_are_planned_and_count_what_runs(void) {
    for (int bound = 0; bound < 2; bound++) {
        quartic q = quartic_new();
        for (int i = 0; i < ALL; i++) q.dy[i] = 1e-3f * normal();
        snip *s = frozen_session(&q, 1, bound);
        for (int step = 1; step <= 4; step++) CHECK(frozen_step(&q, s) == SNIP_OK);
        snip_layer_info base = layer_of(s, 0), adapter = layer_of(s, 1);
        CHECK(snip_plans(s) == 1 && snip_share(s, SNIP_E2M1) == 1);  // all five GEMMs that run
        CHECK(base.runs[SNIP_FWD] && base.runs[SNIP_DGRAD] && !base.runs[SNIP_WGRAD] && adapter.runs[SNIP_WGRAD]);
        CHECK(base.format[SNIP_FWD] == SNIP_E2M1 && base.format[SNIP_WGRAD] == SNIP_BF16);
        CHECK(base.fp4.update[SNIP_WGRAD] == 0 && adapter.fp4.update[SNIP_WGRAD] > 0);
    }
}

// ---- measurements that fail ----

static void failed_measurements_are_made_anew_soon(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 100);
    int measuring[40] = { 0 }, count = 0;
    while (snip_step(s) < 100) CHECK(quartic_step(&q, s, 0, 0) == SNIP_OK);
    const float keep = q.x[5];
    while (snip_step(s) < 140 && snip_plans(s) == 0) {
        if (snip_current_pass(s) != SNIP_PASS_ORDINARY) measuring[count++] = (int)snip_step(s);
        q.x[5] = count < 4 ? (float)NAN : keep;
        quartic_step(&q, s, 0, 0);
        if (count == 1 && measuring[0] == snip_step(s) - 1)
            CHECK(strstr(snip_reason(s), "step 101: no measurement, to be made anew after 1 steps: layer 0.a"));
    }
    CHECK(count == 4 && measuring[0] == 100 && measuring[1] == 102 && measuring[2] == 105 && measuring[3] == 110);
    CHECK(snip_plans(s) == 1);
}

static void a_measuring_step_without_layers_is_no_plan(void) {
    quartic q = quartic_new();
    snip *s = quartic_session(&q, 1);
    snip_adamw o = optimizer(2);
    CHECK(quartic_step(&q, s, 0, 0) == SNIP_OK);
    while (snip_next_pass(s, 1)) {
    }
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "no linear layer"));
    CHECK(snip_plans(s) == 0 && !strstr(snip_reason(s), "first plan"));
    CHECK(quartic_step(&q, s, 0, 0) == SNIP_OK && snip_plans(s) == 1);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(backward_calls_come_in_any_order_of_micro_batches);
    RUN(small_micro_batches_may_come_first);
    RUN(a_measurement_refuses_inputs_that_no_forward_call_had);
    RUN(forwards_run_again_give_the_same_bits_and_count_as_none);
    RUN(a_forward_that_was_not_is_not_run_again);
    RUN(the_mode_stays_within_a_pass);
    RUN(a_forgotten_evaluation_mode_is_named);
    RUN(experts_whose_tokens_move_are_planned);
    RUN(experts_without_tokens_are_planned);
    RUN(passes_of_other_rows_all_over_are_refused);
    RUN(frozen_layers_are_planned_and_count_what_runs);
    RUN(failed_measurements_are_made_anew_soon);
    RUN(a_measuring_step_without_layers_is_no_plan);
    return test_end();
}
