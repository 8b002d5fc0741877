// What the session refuses, and what it says: arguments, calls in a wrong order, tensors that are not finite, memory
// that runs out. Public names alone.
#include "session.h"

// ---- arguments ----

static void descriptions_are_refused(void) {
    const double nan = NAN, inf = INFINITY;
    snip_desc d = description(), e;
    CHECK(snip_desc_check(NULL) == SNIP_BAD_ARGUMENT && snip_create(NULL) == NULL);
    CHECK(snip_desc_check(&d) == SNIP_OK);
#define REFUSED(change)                                  \
    do {                                                 \
        e = d;                                           \
        change;                                          \
        test_about("%s", #change);                       \
        CHECK(snip_desc_check(&e) == SNIP_BAD_ARGUMENT); \
        CHECK(snip_create(&e) == NULL);                  \
    } while (0)
    REFUSED(e.budget = -0.01);
    REFUSED(e.budget = 1.01);
    REFUSED(e.budget = nan);
    REFUSED(e.budget = inf);
    REFUSED(e.speedup = -1);
    REFUSED(e.speedup = nan);
    REFUSED(e.seconds = -1);
    REFUSED(e.n_stages = -1);
    REFUSED(e.high = SNIP_E4M3);
    REFUSED(e.high = (snip_format)-1);
    REFUSED(e.high = (snip_format)50);
    REFUSED(e.measure = SNIP_E2M1);
    REFUSED(e.measure = (snip_format)99);
    REFUSED(e.loss_weight = nan);
    REFUSED(e.loss_weight = -inf);
    REFUSED(e.update_weight = nan);
    REFUSED(e.update_weight = inf);
    REFUSED(e.horizon = -1);
    REFUSED(e.horizon = nan);
    REFUSED(e.sample = -0.1);
    REFUSED(e.sample = 1.5);
    REFUSED(e.sample = nan);
    REFUSED(e.optimizer = (snip_optimizer)3);  // SNIP_CUSTOM, without its function
    REFUSED(e.optimizer = (snip_optimizer)4);
    REFUSED(e.optimizer = (snip_optimizer)-1);
    REFUSED(e.margin = nan);
    REFUSED(e.spike = inf);
    REFUSED(e.drift = nan);
    REFUSED(e.fallback = SNIP_E5M2);
    REFUSED(e.fallback = (snip_format)-1);
    REFUSED(e.isa = (snip_isa)-1);
    REFUSED(e.isa = SNIP_ISA_COUNT);
#undef REFUSED
}

static void *plain_alloc(size_t size, void *user) {
    (void)user;
    return malloc(size);
}

static void the_field_that_is_refused_is_named(void) {
    static const snip_recipe f32 = SNIP_RECIPE_F32;
    const double nan = NAN;
    snip_desc d = description(), e;
    CHECK(snip_desc_error(&d) == NULL && strstr(snip_desc_error(NULL), "NULL"));
#define NAMES(field, value)                                                  \
    do {                                                                     \
        e = d;                                                               \
        e.field = value;                                                     \
        test_about("%s: %s", #field, snip_desc_error(&e));                   \
        CHECK(strncmp(snip_desc_error(&e), #field " ", sizeof #field) == 0); \
    } while (0)
    NAMES(budget, 75);
    NAMES(speedup, 1e9);
    NAMES(seconds, -1);
    NAMES(n_stages, -1);
    NAMES(high, SNIP_E4M3);
    NAMES(measure, SNIP_E2M1);
    NAMES(loss_weight, nan);
    NAMES(update_weight, nan);
    NAMES(horizon, -1);
    NAMES(sample, 2);
    NAMES(optimizer, (snip_optimizer)9);
    NAMES(margin, nan);
    NAMES(spike, nan);
    NAMES(drift, nan);
    NAMES(fallback, SNIP_E5M2);
    NAMES(isa, SNIP_ISA_COUNT);
#undef NAMES
    e = d;
    e.budget = 75;
    CHECK(strcmp(snip_desc_error(&e), "budget is a share, 0 to 1") == 0);
    e = d;
    e.optimizer = SNIP_CUSTOM;
    CHECK(strncmp(snip_desc_error(&e), "sensitivity ", 12) == 0);
    e = d;
    e.fp4.weight = f32;
    CHECK(strncmp(snip_desc_error(&e), "fp4 ", 4) == 0);
    e = d;
    e.alloc.free_fn = (void (*)(void *, void *))1;
    CHECK(strncmp(snip_desc_error(&e), "alloc ", 6) == 0);
}

static void layers_are_refused_by_cause(void) {
    static const struct {
        const char *name;
        int64_t out, in;
        int stage;
        const char *cause;
    } cases[] = {
        {"my layer", 8, 8, 0, "blank"       },
        { "",        8, 8, 0, "255"         },
        { NULL,      8, 8, 0, "NULL"        },
        { "a",       0, 8, 0, "out_features"},
        { "a",       8, 8, 1, "n_stages"    }
    };

    snip_desc d = description();
    snip *s = session_open(&d);
    for (int i = 0; i < 5; i++) {
        CHECK(snip_add_linear(s, cases[i].name, cases[i].out, cases[i].in, cases[i].stage) == -SNIP_BAD_ARGUMENT);
        CHECK(strstr(snip_message(s), "snip_add_linear: ") && strstr(snip_message(s), cases[i].cause));
    }
}

static void what_no_plan_could_do_without_is_said_in_the_first_step(void) {
    bundle b = bundle_new();
    snip_desc d = description();
    d.budget = 0.75;
    d.every = 500;
    snip *s = bundle_session(&b, d, BUNDLE);
    CHECK(snip_allow(s, -1, SNIP_FWD, 1, 0) == SNIP_OK);
    CHECK(bundle_step(&b, s, 1) == SNIP_INFEASIBLE && strstr(snip_message(s), "at most 66.67%"));
    CHECK(bundle_step(&b, s, 2) == SNIP_OK);  // once
    CHECK(snip_allow(s, -1, SNIP_FWD, 1, 1) == SNIP_OK && bundle_step(&b, s, 3) == SNIP_OK);
    d.speedup = 1.5;
    s = bundle_session(&b, d, BUNDLE);
    CHECK(bundle_step(&b, s, 1) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "snip_measure_gains"));
    CHECK(snip_failed_layer(s) == 0);
}

static void layers_are_found_by_name(void) {
    bundle b = bundle_new();
    snip_desc d = description();
    snip *s = bundle_session(&b, d, BUNDLE);
    CHECK(snip_find_layer(s, "x") == 4 && snip_find_layer(s, "2.z") == 6 && snip_find_layer(s, "0.attn.q") == 0);
    CHECK(snip_find_layer(s, "0.attn") == -1 && snip_find_layer(s, NULL) == -1 && snip_find_layer(NULL, "x") == -1);
    CHECK(snip_settings(s)->measure == SNIP_F32 && snip_settings(s)->horizon == 100 && snip_settings(NULL) == NULL);
    CHECK(snip_failed_layer(s) == -1 && snip_failed_layer(NULL) == -1);
    CHECK(snip_step_status(NULL) == SNIP_BAD_ARGUMENT && snip_step_status(s) == SNIP_OK);
}

static void recipes_and_allocators_are_refused(void) {
    snip_desc d = description(), e;
#define REFUSED(member, value)                           \
    do {                                                 \
        e = d;                                           \
        e.member = value;                                \
        test_about("%s = %s", #member, #value);          \
        CHECK(snip_desc_check(&e) == SNIP_BAD_ARGUMENT); \
        CHECK(snip_create(&e) == NULL);                  \
    } while (0)
    snip_alloc half = { plain_alloc, NULL, NULL };
    snip_recipe backwards = recipe_fp4_block, two_scales = recipe_fp8_tile;
    backwards.tile_cols = -1;
    two_scales.scale = SNIP_SCALE_UE4M3;
    REFUSED(fp8.weight.format, (snip_format)77);
    REFUSED(fp8.activation.format, SNIP_F32);
    REFUSED(fp4.gradient.format, SNIP_UE8M0);
    REFUSED(fp4.weight, backwards);
    REFUSED(fp8.gradient, two_scales);
    REFUSED(alloc, half);
#undef REFUSED
}

static void instruction_sets_that_are_lacking_are_unsupported(void) {
    for (int isa = 0; isa < SNIP_ISA_COUNT; isa++) {
        snip_desc d = description();
        d.isa = (snip_isa)isa;
        test_about("%s", snip_isa_name(d.isa));
        if (snip_isa_available(d.isa))
            CHECK(snip_desc_check(&d) == SNIP_OK);
        else
            CHECK(snip_desc_check(&d) == SNIP_UNSUPPORTED && snip_create(&d) == NULL);
    }
}

static void layers_are_refused(void) {
    char name[300];
    snip_desc d = description();
    d.n_stages = 2;
    snip *s = session_open(&d);
#define REFUSED(name, out, in, stage) CHECK(snip_add_linear(s, name, out, in, stage) == -(int)SNIP_BAD_ARGUMENT)
    REFUSED(NULL, 4, 4, 0);
    REFUSED("", 4, 4, 0);
    REFUSED("a b", 4, 4, 0);
    REFUSED("a\n", 4, 4, 0);
    REFUSED("\t", 4, 4, 0);
    REFUSED("a", 0, 4, 0);
    REFUSED("a", 4, 0, 0);
    REFUSED("a", -4, 4, 0);
    REFUSED("a", 4, -4, 0);
    REFUSED("a", 4, 4, -1);
    REFUSED("a", 4, 4, 2);
    REFUSED("a", INT64_MAX, 4, 0);
    REFUSED("a", 4, INT64_MAX, 0);
    REFUSED("a", (int64_t)1 << 40, (int64_t)1 << 40, 0);
    memset(name, 'x', sizeof name);
    name[256] = 0;
    REFUSED(name, 4, 4, 0);
#undef REFUSED
    CHECK(snip_add_linear(NULL, "a", 4, 4, 0) == -(int)SNIP_BAD_ARGUMENT);
    CHECK(snip_layers(s) == 0 && snip_layers(NULL) == 0);

    name[255] = 0;
    CHECK(snip_add_linear(s, name, 4, 4, 1) == 0 && snip_layers(s) == 1);
    snip_layer_info info = layer_of(s, 0);
    CHECK(!strcmp(info.name, name) && info.out_features == 4 && info.in_features == 4 && info.stage == 1);
    CHECK(info.format[SNIP_FWD] == SNIP_BF16);
    CHECK(snip_layer(s, 1, &info) == SNIP_BAD_ARGUMENT && snip_layer(s, -1, &info) == SNIP_BAD_ARGUMENT);
    CHECK(snip_layer(NULL, 0, &info) == SNIP_BAD_ARGUMENT && snip_layer(s, 0, NULL) == SNIP_BAD_ARGUMENT);
}

static void layers_are_added_before_the_first_step(void) {
    snip_desc d = description();
    snip *s = session_open(&d);
    snip_adamw o = optimizer(1);
    CHECK(snip_add_linear(s, "early", 4, 4, 0) == 0);
    CHECK(snip_end_step(s, &o) == SNIP_OK);
    CHECK(snip_add_linear(s, "late", 4, 4, 0) == -(int)SNIP_BAD_ARGUMENT && snip_layers(s) == 1);
}

static snip *session_of_one_layer(void) {
    snip_desc d = description();
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.a", 4, 4, 0) == 0);
    return s;
}

static void bindings_are_refused(void) {
    float w[16] = { 1 };
    snip *s = session_of_one_layer();
    CHECK(snip_bind_adamw(NULL, 0, w, w) == SNIP_BAD_ARGUMENT);
    CHECK(snip_bind_adamw(s, 1, w, w) == SNIP_BAD_ARGUMENT && snip_bind_adamw(s, -1, w, w) == SNIP_BAD_ARGUMENT);
    CHECK(snip_bind_adamw(s, 0, NULL, w) == SNIP_BAD_ARGUMENT && snip_bind_adamw(s, 0, w, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_bind_momentum(NULL, 0, w) == SNIP_BAD_ARGUMENT && snip_bind_momentum(s, 0, w) == SNIP_BAD_ARGUMENT);
}

static void formats_and_modes_are_refused(void) {
    snip *s = session_of_one_layer();
    CHECK(snip_allow(NULL, 0, SNIP_FWD, 1, 1) == SNIP_BAD_ARGUMENT);
    CHECK(snip_allow(s, 1, SNIP_FWD, 1, 1) == SNIP_BAD_ARGUMENT &&
          snip_allow(s, -2, SNIP_FWD, 1, 1) == SNIP_BAD_ARGUMENT);
    CHECK(snip_allow(s, 0, (snip_gemm_kind)4, 1, 1) == SNIP_BAD_ARGUMENT);
    CHECK(snip_allow(s, 0, (snip_gemm_kind)-1, 1, 1) == SNIP_BAD_ARGUMENT);
    CHECK(snip_allow(s, 0, SNIP_FWD, 0, 0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_format(NULL, 0, SNIP_FWD, SNIP_F32) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_format(s, 1, SNIP_FWD, SNIP_F32) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_format(s, 0, (snip_gemm_kind)9, SNIP_F32) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_format(s, 0, SNIP_FWD, SNIP_E5M2) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_format(s, 0, SNIP_FWD, (snip_format)0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_format(s, 0, SNIP_FWD, SNIP_UE8M0) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_mode(NULL, SNIP_TRAIN) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_mode(s, (snip_mode)3) == SNIP_BAD_ARGUMENT && snip_set_mode(s, (snip_mode)-1) == SNIP_BAD_ARGUMENT);
}

static void refused_linear_calls_leave_the_outputs_alone(void) {
    float w[16] = { 1 }, x[16] = { 1 }, y[16], before[16];
    snip *s = session_of_one_layer();
    for (int i = 0; i < 16; i++) y[i] = before[i] = (float)i;
#define FORWARD(s, l, out, inp, w, rows)                                                \
    do {                                                                                \
        CHECK(snip_linear_forward(s, l, out, inp, w, NULL, rows) == SNIP_BAD_ARGUMENT); \
        CHECK(same_floats(y, before, 16));                                              \
    } while (0)
    FORWARD(NULL, 0, y, x, w, 4);
    FORWARD(s, 1, y, x, w, 4);
    FORWARD(s, -1, y, x, w, 4);
    FORWARD(s, 0, NULL, x, w, 4);
    FORWARD(s, 0, y, NULL, w, 4);
    FORWARD(s, 0, y, x, NULL, 4);
    FORWARD(s, 0, y, x, w, -1);
    FORWARD(s, 0, y, x, w, INT64_MAX);
#undef FORWARD
#define BACKWARD(s, l, dout, inp, w, rows)                                                   \
    do {                                                                                     \
        CHECK(snip_linear_backward(s, l, y, y, y, dout, inp, w, rows) == SNIP_BAD_ARGUMENT); \
        CHECK(same_floats(y, before, 16));                                                   \
    } while (0)
    BACKWARD(NULL, 0, x, x, w, 4);
    BACKWARD(s, 1, x, x, w, 4);
    BACKWARD(s, -1, x, x, w, 4);
    BACKWARD(s, 0, NULL, x, w, 4);
    BACKWARD(s, 0, x, NULL, w, 4);
    BACKWARD(s, 0, x, x, NULL, 4);
    BACKWARD(s, 0, x, x, w, -1);
    BACKWARD(s, 0, x, x, w, INT64_MAX);
    snip_set_mode(s, SNIP_EVAL);
    BACKWARD(s, 0, x, x, w, 4);
    snip_set_mode(s, SNIP_TRAIN);
#undef BACKWARD
    snip_adamw o = optimizer(1);
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && *snip_message(s) && snip_step(s) == 1);  // the refused calls
}

static void steps_end_with_a_valid_optimizer(void) {
    const double nan = NAN, inf = INFINITY;
    snip *s = session_of_one_layer();
    snip_adamw o = optimizer(1), p;
    CHECK(snip_next_pass(NULL, 1) == 0 && snip_end_step(NULL, &o) == SNIP_BAD_ARGUMENT);
    CHECK(snip_end_step(s, NULL) == SNIP_OK && snip_step(s) == 1);  // no optimizer's step
#define REFUSED(change)                                                       \
    do {                                                                      \
        int64_t step = snip_step(s);                                          \
        p = o;                                                                \
        change;                                                               \
        CHECK(snip_end_step(s, &p) == SNIP_BAD_ARGUMENT && *snip_message(s)); \
        CHECK(snip_step(s) == step + 1);                                      \
    } while (0)
    REFUSED(p.step = 0);
    REFUSED(p.step = -3);
    REFUSED(p.beta1 = 1);
    REFUSED(p.beta1 = -0.1);
    REFUSED(p.beta2 = 1);
    REFUSED(p.beta2 = nan);
    REFUSED(p.eps = -1e-9);
    REFUSED(p.eps = nan);
    REFUSED(p.grad_scale = -1);
    REFUSED(p.grad_scale = inf);
    REFUSED(p.lr = nan);
#undef REFUSED
    CHECK(snip_end_step(s, &o) == SNIP_OK);
}

static void null_sessions_and_places_are_refused(void) {
    unsigned char state[4096];
    snip *s = session_of_one_layer();
    CHECK(snip_state_size(s) <= sizeof state);
    CHECK(snip_plan_print(NULL, stdout) == SNIP_BAD_ARGUMENT && snip_plan_print(s, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_plan_save(NULL, "x") == SNIP_BAD_ARGUMENT && snip_plan_save(s, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_plan_load(NULL, "x") == SNIP_BAD_ARGUMENT && snip_plan_load(s, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_state_save(NULL, state) == SNIP_BAD_ARGUMENT && snip_state_save(s, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_state_load(NULL, state, 4) == SNIP_BAD_ARGUMENT && snip_state_load(s, NULL, 4) == SNIP_BAD_ARGUMENT);
    CHECK(snip_state_size(NULL) == 0 && snip_current_pass(NULL) == SNIP_PASS_ORDINARY && snip_step(NULL) == 0);
    CHECK(snip_plans(NULL) == 0 && snip_share(NULL, SNIP_F32) == 0 && snip_solve_seconds(NULL) == 0);
    CHECK(snip_plan_seconds(NULL) == 0 && !strcmp(snip_message(NULL), "") && !strcmp(snip_reason(NULL), ""));
    snip_destroy(NULL);
}

static void every_status_has_a_text(void) {
    for (int i = 0; i < SNIP_STATUS_COUNT; i++) CHECK(strcmp(snip_status_text((snip_status)i), "unknown status"));
    CHECK(!strcmp(snip_status_text(SNIP_STATUS_COUNT), "unknown status"));
}

// ---- calls in a wrong order ----

enum { WIDTH = 32 };

// What happens to layer 1 of two, in a measuring step
typedef enum { ALL_CALLS, LACKS_BACKWARD, LACKS_LAYER, RECOMPUTES, LACKS_ROWS, IDLE, ODDITIES } oddity;

typedef struct {
    float *x, *w, *m, *v;  // [WIDTH][WIDTH]
    snip_desc d;
    snip *s;
} odd_run;

static void odd_pass(const odd_run *run, oddity odd) {
    float y[WIDTH * WIDTH], dx[WIDTH * WIDTH], dw[WIDTH * WIDTH];
    int idle = odd == IDLE || (odd == LACKS_LAYER && snip_current_pass(run->s) == SNIP_PASS_CLEAN);
    memset(dx, 0, sizeof dx);
    memset(dw, 0, sizeof dw);
    snip_linear_forward(run->s, 0, y, run->x, run->w, NULL, WIDTH);
    if (!idle) snip_linear_forward(run->s, 1, y, run->x, run->w, NULL, WIDTH);
    if (odd == RECOMPUTES) snip_linear_forward(run->s, 1, y, run->x, run->w, NULL, WIDTH);
    for (int l = idle || odd == LACKS_BACKWARD ? 0 : 1; l >= 0; l--)
        snip_linear_backward(run->s, l, dx, dw, NULL, run->x, run->x, run->w,
                             odd == LACKS_ROWS && l ? WIDTH / 2 : WIDTH);
}

static snip_status odd_step_of(const odd_run *run, oddity odd, double loss, const snip_adamw *o) {
    do odd_pass(run, odd);
    while (snip_next_pass(run->s, loss));
    return snip_end_step(run->s, o);
}

static snip_status odd_step(const odd_run *run, oddity odd) {
    snip_adamw o = optimizer(5);
    return odd_step_of(run, odd, 1, &o);
}

// Two layers, one step of which has been made; a measuring step is next where `every` is 1.
static odd_run odd_run_new(int every) {
    odd_run run;
    run.x = randoms(WIDTH * WIDTH, 1);
    run.w = randoms(WIDTH * WIDTH, 1);
    run.m = randoms(WIDTH * WIDTH, 0.1f);
    run.v = floats(WIDTH * WIDTH);
    for (int i = 0; i < WIDTH * WIDTH; i++) run.v[i] = 0.1f;
    run.d = description();
    run.d.every = every;
    run.d.budget = 1;
    run.d.fp4.gradient = recipe_fp4_tile;  // nearest: its errors repeat in part
    run.s = session_open(&run.d);
    for (int l = 0; l < 2; l++) {
        CHECK(snip_add_linear(run.s, l ? "0.b" : "0.a", WIDTH, WIDTH, 0) == l);
        CHECK(snip_bind_adamw(run.s, l, run.m, run.v) == SNIP_OK);
    }
    CHECK(odd_step(&run, ALL_CALLS) == SNIP_OK);
    return run;
}

static void measuring_steps_with_calls_missing_are_refused_whole(void) {
    for (int odd = ALL_CALLS; odd < IDLE; odd++) {
        if (odd == LACKS_LAYER) continue;  // as an expert without tokens
        odd_run run = odd_run_new(1);
        test_about("calls of a measuring step, case %d", odd);
        CHECK(odd_step(&run, (oddity)odd) == (odd ? SNIP_BAD_ARGUMENT : SNIP_OK));
        CHECK(snip_plans(run.s) == !odd);
        CHECK(!odd || strstr(snip_message(run.s), "0.b"));
        CHECK(odd_step(&run, ALL_CALLS) == SNIP_OK && snip_plans(run.s) == 1 + !odd);
        CHECK(snip_share(run.s, SNIP_E2M1) == 1);  // nothing of it is left
    }
}

static void idle_layers_keep_what_is_known(void) {
    odd_run run = odd_run_new(1);
    CHECK(odd_step(&run, IDLE) == SNIP_OK && snip_plans(run.s) == 1);
    CHECK(snip_share(run.s, SNIP_BF16) == 0.5);  // unknown: not planned
    CHECK(snip_share(run.s, SNIP_E2M1) == 0.5);  // of the other, all
    CHECK(odd_step(&run, ALL_CALLS) == SNIP_OK && snip_plans(run.s) == 2 && snip_share(run.s, SNIP_E2M1) == 1);

    snip_layer_info before = layer_of(run.s, 1);
    CHECK(odd_step(&run, IDLE) == SNIP_OK && snip_plans(run.s) == 3);
    snip_layer_info after = layer_of(run.s, 1);
    CHECK(before.fp4.cost[SNIP_FWD] > 0 && before.fp4.cost[SNIP_WGRAD] > 0);
    CHECK(before.fp4.update[SNIP_FWD] == after.fp4.update[SNIP_FWD]);
    CHECK(before.fp4.loss_second == after.fp4.loss_second);
    CHECK(!memcmp(before.fp4.cost, after.fp4.cost, sizeof after.fp4.cost));
    CHECK(!memcmp(before.fp4.error, after.fp4.error, sizeof after.fp4.error));
}

static void nothing_is_accepted_before_a_step_is_ended(void) {
    unsigned char state[8192];
    float y[WIDTH * WIDTH] = { 3 };
    snip_adamw o = optimizer(5);
    odd_run run = odd_run_new(1);
    CHECK(snip_state_size(run.s) <= sizeof state);
    for (int pass = 0; pass < 3; pass++) {
        odd_pass(&run, ALL_CALLS);
        CHECK(snip_next_pass(run.s, 1) == (pass < 2));
    }
    CHECK(snip_state_save(run.s, state) == SNIP_BAD_ARGUMENT);
    CHECK(snip_state_load(run.s, state, snip_state_size(run.s)) == SNIP_BAD_ARGUMENT);
    CHECK(strstr(snip_message(run.s), "snip_end_step"));
    CHECK(snip_linear_forward(run.s, 0, y, run.x, run.w, NULL, WIDTH) == SNIP_BAD_ARGUMENT);
    CHECK(snip_linear_backward(run.s, 0, NULL, y, NULL, run.x, run.x, run.w, WIDTH) == SNIP_BAD_ARGUMENT);
    CHECK(y[0] == 3 && strstr(snip_message(run.s), "snip_end_step"));
    CHECK(snip_end_step(run.s, &o) == SNIP_BAD_ARGUMENT && snip_plans(run.s) == 0);

    CHECK(odd_step(&run, ALL_CALLS) == SNIP_OK && snip_plans(run.s) == 1 && snip_state_save(run.s, state) == SNIP_OK);
    snip_linear_forward(run.s, 0, y, run.x, run.w, NULL, WIDTH);
    CHECK(snip_state_save(run.s, state) == SNIP_BAD_ARGUMENT);
}

static void steps_are_not_ended_in_a_probe(void) {
    model n = model_small();
    snip_adamw o = optimizer(2);
    snip_desc d = description();
    d.every = 1;
    snip *s = model_session(&n, &d);
    CHECK(model_still_step(&n, s, 1) == SNIP_OK);
    model_pass(&n, s);
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && *snip_message(s) && snip_step(s) == 1);
    while (snip_next_pass(s, n.loss)) model_pass(&n, s);
    CHECK(snip_end_step(s, &o) == SNIP_OK && snip_plans(s) == 1);
}

static void backward_outside_training_spoils_the_step(void) {
    float dw[WIDTH * WIDTH] = { 0 };
    odd_run run = odd_run_new(1);
    snip_set_mode(run.s, SNIP_EVAL);
    CHECK(snip_linear_backward(run.s, 0, NULL, dw, NULL, run.x, run.x, run.w, WIDTH) == SNIP_BAD_ARGUMENT);
    snip_set_mode(run.s, SNIP_TRAIN);
    CHECK(odd_step(&run, ALL_CALLS) == SNIP_BAD_ARGUMENT && snip_plans(run.s) == 0);
}

static void skipped_optimizer_steps_discard_the_measurement(void) {
    odd_run run = odd_run_new(20);
    while (snip_step(run.s) < 20) odd_step(&run, ALL_CALLS);
    CHECK(odd_step_of(&run, ALL_CALLS, 1, NULL) == SNIP_OK && snip_plans(run.s) == 0 && snip_step(run.s) == 21);
    for (int i = 0; i < 3; i++) CHECK(odd_step(&run, ALL_CALLS) == SNIP_OK);
    CHECK(snip_plans(run.s) == 1);
}

static void measuring_steps_are_told_their_loss(void) {
    model n = model_small();
    snip_adamw o = optimizer(1);
    snip_desc d = description();
    d.every = 1;
    snip *s = model_session(&n, &d);
    CHECK(model_still_step(&n, s, 1) == SNIP_OK);
    for (int pass = 0; pass < 2; pass++) CHECK(model_pass(&n, s) == SNIP_OK && snip_next_pass(s, n.loss) == 1);
    CHECK(model_pass(&n, s) == SNIP_OK && snip_current_pass(s) == SNIP_PASS_CLEAN);
    CHECK(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "snip_next_pass"));
    CHECK(snip_plans(s) == 0);
}

static void layers_without_optimizer_state_are_named(void) {
    model n = model_small();
    snip_adamw o = optimizer(2);
    snip_desc d = description();
    int passes = 0;
    d.every = 1;
    snip *s = session_open(&d);
    model_add(&n, s);
    CHECK(snip_bind_adamw(s, 0, n.m[0], n.v[0]) == SNIP_OK);
    CHECK(model_still_step(&n, s, 1) == SNIP_NOT_BOUND && strstr(snip_message(s), "0.mlp.down"));
    CHECK(snip_failed_layer(s) == 1 && strstr(snip_message(s), "snip_bind_adamw"));
    do {
        CHECK(model_pass(&n, s) == SNIP_OK);
        passes++;
    } while (passes < 5 && snip_next_pass(s, n.loss));
    CHECK(passes == 2 && snip_current_pass(s) == SNIP_PASS_ORDINARY);  // the last one without noise
    CHECK(snip_end_step(s, &o) == SNIP_NOT_BOUND && strstr(snip_message(s), "0.mlp.down"));
    CHECK(snip_plans(s) == 0 && snip_step(s) == 2);
    CHECK(snip_bind_adamw(s, 1, n.m[1], n.v[1]) == SNIP_OK);
    CHECK(model_still_step(&n, s, 3) == SNIP_OK && snip_plans(s) == 1);
}

// ---- messages: about the call that was refused last, not an earlier one ----

#define SAYS(call, word)                         \
    do {                                         \
        snip_plan_load(s, test_path("missing")); \
        CHECK(call);                             \
        CHECK(strstr(snip_message(s), word));    \
    } while (0)
#define REFUSES(function, arguments) SAYS(function arguments == SNIP_BAD_ARGUMENT, #function)

static void messages_name_the_function(void) {
    const double none[3] = { 0, 0, 0 };
    unsigned char state[8] = { 0 };
    snip_layer_info info;
    snip_desc d = description();
    model n = model_small();
    snip *s = session_open(&d);
    model_add(&n, s);
    SAYS(snip_add_linear(s, NULL, 4, 4, 0) == -(int)SNIP_BAD_ARGUMENT, "snip_add_linear");
    SAYS(snip_add_linear(s, "a b", 4, 4, 0) == -(int)SNIP_BAD_ARGUMENT, "snip_add_linear");
    SAYS(snip_add_linear(s, "", 4, 4, 0) == -(int)SNIP_BAD_ARGUMENT, "snip_add_linear");
    SAYS(snip_add_linear(s, "a", INT64_MAX, 4, 0) == -(int)SNIP_BAD_ARGUMENT, "snip_add_linear");
    REFUSES(snip_bind_adamw, (s, 0, NULL, NULL));
    REFUSES(snip_bind_momentum, (s, 0, n.m[0]));
    REFUSES(snip_allow, (s, 0, SNIP_FWD, 0, 0));
    REFUSES(snip_set_format, (s, 9, SNIP_FWD, SNIP_F32));
    REFUSES(snip_set_format, (s, 0, SNIP_FWD, SNIP_E5M2));
    REFUSES(snip_set_mode, (s, (snip_mode)3));
    REFUSES(snip_set_seconds, (s, 9, SNIP_FWD, none));
    REFUSES(snip_set_seconds, (s, 0, SNIP_FWD, none));
    REFUSES(snip_measure_gains, (s, 0));
    REFUSES(snip_layer, (s, 9, &info));
    REFUSES(snip_plan_print, (s, NULL));
    REFUSES(snip_plan_save, (s, NULL));
    REFUSES(snip_plan_load, (s, NULL));
    REFUSES(snip_state_save, (s, NULL));
    REFUSES(snip_state_load, (s, NULL, 4));
    SAYS(snip_state_load(s, state, sizeof state) == SNIP_CORRUPT, "state");
}

static void messages_of_gains_and_prints(void) {
    model n = model_small();
    snip_desc d = description();
    snip *s = session_open(&d);
    model_add(&n, s);
    FILE *full = fopen("/dev/full", "w");
    if (full) {
        setvbuf(full, NULL, _IONBF, 0);
        SAYS(snip_plan_print(s, full) == SNIP_IO, "snip_plan_print");
        fclose(full);
    } else
        test_skip("no /dev/full");
    if (sizeof(size_t) == 8) {  // operands of 2^64 + 12 bytes
        CHECK(snip_add_linear(s, "1.wide", INT64_C(922337203685477581), 1, 0) == 2);
        REFUSES(snip_measure_gains, (s, 2));
    }
}

static void evaluation_has_messages_and_no_step(void) {
    model n = model_small();
    snip_adamw o = optimizer(1);
    snip_desc d = description();
    snip *s = session_open(&d);
    model_add(&n, s);
    snip_set_mode(s, SNIP_EVAL);
    REFUSES(snip_linear_forward, (s, 0, NULL, n.x, n.w[0], NULL, 4));
    n.w[0][3] = (float)NAN;
    SAYS(snip_linear_forward(s, 0, n.h, n.x, n.w[0], NULL, n.rows) == SNIP_NONFINITE, "layer 0.mlp.up");
    n.w[0][3] = 0;
    snip_set_mode(s, SNIP_TRAIN);
    CHECK(snip_end_step(s, &o) == SNIP_OK);  // nothing of this was a training step's
}

static void a_step_ends_with_its_first_error(void) {
    model n = model_small();
    snip_adamw o = optimizer(1);
    snip_desc d = description();
    d.every = 1;
    snip *s = session_open(&d);
    model_add(&n, s);
    CHECK(snip_end_step(s, &o) == SNIP_OK);
    REFUSES(snip_linear_forward, (s, 0, NULL, n.x, n.w[0], NULL, 4));
    REFUSES(snip_linear_backward,
            (s, 0, NULL, NULL, NULL, NULL, n.x, n.w[0], 4));  // a second error has its own message
    REFUSES(snip_end_step, (s, &o));                          // in a probe pass
    while (snip_next_pass(s, 1)) {
    }
    SAYS(snip_end_step(s, &o) == SNIP_BAD_ARGUMENT, "snip_linear_forward");
}

#undef REFUSES
#undef SAYS

// ---- tensors that are not finite ----

// NaN and infinity in one of x, w and dout (1, 2, 3) or none: the status of both calls, the count, what is computed.
static void nonfinite_tensor(snip_format format, int which) {
    enum { ROWS = 20, OUT = 12, IN = 36 };

    float *x = randoms(ROWS * IN, 1), *w = randoms(OUT * IN, 1), *dout = randoms(ROWS * OUT, 1);
    float *y = floats(ROWS * OUT), *dx = floats(ROWS * IN), *dw = floats(OUT * IN);
    float *at = which == 1 ? x : which == 2 ? w : dout;
    snip_desc d = description();
    snip *s = session_open(&d);
    snip_adamw o = optimizer(1);
    int in_forward = which == 1 || which == 2, bad = 0;
    snip_add_linear(s, "l", OUT, IN, 0);
    snip_bind_adamw(s, 0, floats(OUT * IN), floats(OUT * IN));
    snip_set_format(s, 0, SNIP_GEMMS, format);
    if (which) {
        at[5] = (float)NAN;
        at[77] = (float)-INFINITY;
    }
    CHECK(snip_linear_forward(s, 0, y, x, w, NULL, ROWS) == (in_forward ? SNIP_NONFINITE : SNIP_OK));
    CHECK(layer_of(s, 0).nonfinite == (in_forward ? 2 : 0));
    CHECK(snip_linear_backward(s, 0, dx, dw, NULL, dout, x, w, ROWS) == (which ? SNIP_NONFINITE : SNIP_OK));
    CHECK(layer_of(s, 0).nonfinite == (which ? 4 : 0));
    CHECK(snip_step_status(s) == (which ? SNIP_NONFINITE : SNIP_OK));  // before any optimizer runs
    for (int i = 0; i < OUT * IN; i++) bad += !is_finite((double)dw[i]);
    for (int i = 0; i < ROWS * IN; i++) bad += !is_finite((double)dx[i]);
    if (which && format != SNIP_E2M1) CHECK(bad > 0);  // the work has been done, and shows it
    CHECK(snip_next_pass(s, 1) == 0 && snip_end_step(s, &o) == (which ? SNIP_NONFINITE : SNIP_OK));
    CHECK(layer_of(s, 0).nonfinite == 0);
    session_close(s);
}

static void nonfinite_tensors_are_counted_and_said(void) {
    static const snip_format formats[] = { SNIP_F32, SNIP_BF16, SNIP_E4M3, SNIP_E2M1 };
    for (int f = 0; f < 4; f++)
        for (int which = 0; which < 4; which++) {
            test_about("%s, tensor %d", snip_format_name(formats[f]), which);
            nonfinite_tensor(formats[f], which);
        }
}

static void costs_are_finite(const snip *s) {
    for (int l = 0; l < 2; l++)
        for (int g = 0; g < SNIP_GEMMS; g++) {
            snip_layer_info info = layer_of(s, l);
            CHECK(is_finite(info.fp4.cost[g]) && is_finite(info.fp8.cost[g]));
        }
}

static void a_nonfinite_measuring_step_leaves_no_trace(void) {
    model n = model_small();
    float keep = n.t[3];
    snip_desc d = description();
    d.every = 1;
    d.budget = 0.5;
    snip *s = model_session(&n, &d);
    CHECK(model_still_step(&n, s, 1) == SNIP_OK);
    n.t[3] = (float)-INFINITY;
    CHECK(model_still_step(&n, s, 2) == SNIP_NONFINITE && *snip_message(s) && snip_plans(s) == 0);
    n.t[3] = keep;
    for (int step = 3; step <= 5; step++) CHECK(model_still_step(&n, s, step) == SNIP_OK);
    CHECK(snip_plans(s) == 3);
    costs_are_finite(s);
}

static void a_loss_that_is_not_a_number_is_said(void) {
    model n = model_small();
    snip_adamw o = optimizer(2);
    snip_desc d = description();
    d.every = 1;
    d.budget = 0.5;
    snip *s = model_session(&n, &d);
    CHECK(model_still_step(&n, s, 1) == SNIP_OK);
    do model_pass(&n, s);
    while (snip_next_pass(s, NAN));
    CHECK(snip_end_step(s, &o) == SNIP_NONFINITE && snip_plans(s) == 0);
}

static void a_loss_of_zero_is_planned_by_what_is_measured(void) {
    static const double losses[] = { 0, 1e-300, -1e-9, 1 };
    for (int i = 0; i < 4; i++) {
        odd_run run = odd_run_new(1);
        snip_adamw o = optimizer(5);
        test_about("loss %g", losses[i]);
        CHECK(odd_step_of(&run, ALL_CALLS, losses[i], &o) == SNIP_OK && snip_plans(run.s) == 1);
        snip_layer_info info = layer_of(run.s, 0);
        CHECK(is_finite(info.fp4.cost[0]) && fabs(info.fp4.cost[0]) < 1e3);
    }
}

static void gradient_scales_are_finite(void) {
    odd_run run = odd_run_new(1);
    snip_adamw bad = optimizer(5);
    bad.grad_scale = NAN;
    run.x[3] = (float)NAN;
    CHECK(odd_step_of(&run, ALL_CALLS, 1, &bad) == SNIP_NONFINITE && snip_step(run.s) == 2);  // the first error
    run.x[3] = 1;
    CHECK(odd_step_of(&run, ALL_CALLS, 1, &bad) == SNIP_BAD_ARGUMENT && snip_step(run.s) == 3);
    CHECK(snip_plans(run.s) == 0);
    CHECK(odd_step(&run, ALL_CALLS) == SNIP_OK && snip_plans(run.s) == 1);
}

static void optimizer_states_and_biases_are_finite(void) {
    odd_run run = odd_run_new(1);
    float bias[WIDTH] = { 0 }, y[WIDTH * WIDTH];
    run.v[7] = (float)NAN;
    CHECK(odd_step(&run, ALL_CALLS) == SNIP_NONFINITE && strstr(snip_message(run.s), "0.a"));
    CHECK(snip_plans(run.s) == 0);
    run.v[7] = 0.1f;
    bias[5] = (float)INFINITY;
    CHECK(snip_linear_forward(run.s, 0, y, run.x, run.w, bias, WIDTH) == SNIP_NONFINITE);
}

static void a_layer_of_zeros_is_measured(void) {  // as many trainers start output projections
    model n = model_small();
    snip_desc d = description();
    d.every = 1;
    d.budget = 0.5;
    memset(n.w[1], 0, (size_t)weights_of(&n, 1) * sizeof(float));
    snip *s = model_session(&n, &d);
    CHECK(model_still_step(&n, s, 1) == SNIP_OK);
    CHECK(model_still_step(&n, s, 2) == SNIP_OK && snip_plans(s) == 1);
    costs_are_finite(s);
}

static void weights_without_gradients_are_measured(void) {  // with eps 0: 0 / 0 in the optimizer's own formula
    model n = model_small();
    snip_adamw o = optimizer(3);
    snip_desc d = description();
    d.every = 1;
    d.budget = 0.5;
    n.m[0][4] = n.v[0][4] = 0;
    o.eps = 0;
    snip *s = model_session(&n, &d);
    for (int step = 0; step < 2; step++) {
        do model_pass(&n, s);
        while (snip_next_pass(s, n.loss));
        CHECK(snip_end_step(s, &o) == SNIP_OK);
    }
    snip_layer_info info = layer_of(s, 1);
    CHECK(info.fp4.update[SNIP_WGRAD] > 0 && is_finite(info.fp4.update[SNIP_WGRAD]));
}

// ---- memory ----

typedef struct {
    long count, fail_at, live;
    long out_of_memory, others;  // statuses seen
} allocator;

static void *failing_alloc(size_t size, void *user) {
    allocator *a = (allocator *)user;
    if (++a->count == a->fail_at) return NULL;
    void *p = malloc(size);
    if (p) {
        memset(p, 0xA5, size);
        a->live++;
    }
    return p;
}

static void failing_free(void *p, void *user) {
    allocator *a = (allocator *)user;
    CHECK(p != NULL);
    a->live--;
    free(p);
}

static void saw(allocator *a, const snip *s, snip_status status) {
    if (status == SNIP_OUT_OF_MEMORY) {
        a->out_of_memory++;
        CHECK(strstr(snip_message(s), "out of memory"));
    } else if (status != SNIP_OK)
        a->others++;
}

// Adds a layer, with a second try where memory ran out.
static void add_stubbornly(allocator *a, snip *s, const char *name, int out, int in, int expected) {
    int layer = snip_add_linear(s, name, out, in, 0);
    if (layer < 0) {
        saw(a, s, (snip_status)-layer);
        layer = snip_add_linear(s, name, out, in, 0);
    }
    CHECK(layer == expected);
}

// All that a session does with memory, whatever fails.
static void use_session(allocator *a, snip *s) {
    model n = model_small();
    add_stubbornly(a, s, "0.a", n.hid, n.in, 0);
    add_stubbornly(a, s, "0.b", n.out, n.hid, 1);
    for (int l = 0; l < 2; l++) saw(a, s, snip_bind_adamw(s, l, n.m[l], n.v[l]));
    for (int step = 1; step <= 5; step++) {
        snip_adamw o = optimizer(step);
        do saw(a, s, model_pass(&n, s));
        while (snip_next_pass(s, 1));
        saw(a, s, snip_end_step(s, &o));
        CHECK(snip_step(s) == step);
    }
    saw(a, s, snip_plan_save(s, test_path("plan")));
    saw(a, s, snip_plan_load(s, test_path("plan")));
    saw(a, s, snip_measure_gains(s, 4));
}

// All allocations but one succeed: the call says so, the session goes on, nothing leaks.
static void allocations_that_fail_are_survived(void) {
    int done = 0;
    long fail_at;
    for (fail_at = 0; !done && fail_at < 500; fail_at++) {
        allocator a;
        snip_desc d = description();
        test_about("allocation %ld fails", fail_at);
        memset(&a, 0, sizeof a);
        a.fail_at = fail_at;  // 0: none
        d.alloc.alloc_fn = failing_alloc;
        d.alloc.free_fn = failing_free;
        d.alloc.user = &a;
        d.every = 2;
        d.budget = 0.5;
        snip *s = snip_create(&d);
        if (s) use_session(&a, s);
        if (fail_at == 0)
            CHECK(s && a.out_of_memory == 0 && a.others == 0 && a.count > 15);
        else if (a.count < fail_at)
            done = 1;
        else if (!s)
            CHECK(fail_at == 1);
        else
            CHECK((a.out_of_memory == 1 || a.out_of_memory == 2) && a.others <= 1);  // by the call, at the step's end
        snip_destroy(s);
        remove(test_path("plan"));
        CHECK(a.live == 0);
    }
    CHECK(done && fail_at > 15);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(descriptions_are_refused);
    RUN(the_field_that_is_refused_is_named);
    RUN(layers_are_refused_by_cause);
    RUN(what_no_plan_could_do_without_is_said_in_the_first_step);
    RUN(layers_are_found_by_name);
    RUN(recipes_and_allocators_are_refused);
    RUN(instruction_sets_that_are_lacking_are_unsupported);
    RUN(layers_are_refused);
    RUN(layers_are_added_before_the_first_step);
    RUN(bindings_are_refused);
    RUN(formats_and_modes_are_refused);
    RUN(refused_linear_calls_leave_the_outputs_alone);
    RUN(steps_end_with_a_valid_optimizer);
    RUN(null_sessions_and_places_are_refused);
    RUN(every_status_has_a_text);
    RUN(measuring_steps_with_calls_missing_are_refused_whole);
    RUN(idle_layers_keep_what_is_known);
    RUN(nothing_is_accepted_before_a_step_is_ended);
    RUN(steps_are_not_ended_in_a_probe);
    RUN(backward_outside_training_spoils_the_step);
    RUN(skipped_optimizer_steps_discard_the_measurement);
    RUN(measuring_steps_are_told_their_loss);
    RUN(layers_without_optimizer_state_are_named);
    RUN(messages_name_the_function);
    RUN(messages_of_gains_and_prints);
    RUN(evaluation_has_messages_and_no_step);
    RUN(a_step_ends_with_its_first_error);
    RUN(nonfinite_tensors_are_counted_and_said);
    RUN(a_nonfinite_measuring_step_leaves_no_trace);
    RUN(a_loss_that_is_not_a_number_is_said);
    RUN(a_loss_of_zero_is_planned_by_what_is_measured);
    RUN(gradient_scales_are_finite);
    RUN(optimizer_states_and_biases_are_finite);
    RUN(a_layer_of_zeros_is_measured);
    RUN(weights_without_gradients_are_measured);
    RUN(allocations_that_fail_are_survived);
    return test_end();
}
