// How steps and passes follow each other: which passes a measuring step has, that measuring changes no training step,
// independence of threads, ranks, memory. Public names alone.
#include "session.h"

// ---- passes ----

typedef struct {
    const char *name;
    int rows, in, hid, out;
    int update_probe;
    snip_format measure;
} protocol;

static snip_pass expected_pass(int measuring, int passes, int update_probe) {
    if (!measuring) return SNIP_PASS_ORDINARY;
    if (passes == 0) return SNIP_PASS_LOSS_PROBE;
    return passes == 1 && update_probe ? SNIP_PASS_UPDATE_PROBE : SNIP_PASS_CLEAN;
}

// The gradients that the optimizer is left with are those of an ordinary step.
static void check_last_pass(const model *n, model *ordinary, snip *plain) {
    for (int l = 0; l < 2; l++) memcpy(ordinary->w[l], n->w[l], (size_t)weights_of(n, l) * sizeof(float));
    CHECK(model_pass(ordinary, plain) == SNIP_OK && n->loss == ordinary->loss);
    for (int l = 0; l < 2; l++) {
        CHECK(same_floats(n->dw[l], ordinary->dw[l], weights_of(n, l)));
        CHECK(same_floats(n->db[l], ordinary->db[l], l ? n->out : n->hid));
    }
    CHECK(same_floats(n->dh, ordinary->dh, n->rows * n->hid) && same_floats(n->y, ordinary->y, n->rows * n->out));
}

static void check_protocol(const protocol *p) {
    model n = model_new(3, p->rows, p->in, p->hid, p->out), ordinary = model_new(3, p->rows, p->in, p->hid, p->out);
    snip_desc d = description(), d2 = description();
    d.every = 3;
    d.budget = 0.5;
    d.update_weight = p->update_probe ? 0 : -1;
    d.measure = p->measure;
    d2.every = -1;
    d2.high = p->measure ? p->measure : SNIP_F32;
    snip *s = session_open(&d), *plain = model_session(&ordinary, &d2);
    model_add(&n, s);
    if (p->update_probe) model_bind(&n, s);
    for (int step = 1; step <= 8; step++) {
        int measuring = (step - 1) % 3 == 0 && step > 1, passes = 0;
        snip_adamw o = optimizer(step);
        CHECK(snip_step(s) == step - 1);
        do {
            CHECK(snip_current_pass(s) == expected_pass(measuring, passes, p->update_probe));
            CHECK(model_pass(&n, s) == SNIP_OK);
            passes++;
        } while (snip_next_pass(s, n.loss));
        CHECK(passes == (measuring ? 2 + p->update_probe : 1));
        if (measuring) check_last_pass(&n, &ordinary, plain);
        model_update(&n, &o);
        CHECK(snip_end_step(s, &o) == SNIP_OK && snip_plans(s) == (step - 1) / 3);
        CHECK(snip_share(s, SNIP_BF16) == (step < 4 ? 1.0 : 0.0));
        CHECK(step < 4 || snip_share(s, SNIP_E2M1) >= 0.5 - 1e-12);
        CHECK(fabs(snip_share(s, SNIP_E2M1) + snip_share(s, SNIP_E4M3) + snip_share(s, SNIP_BF16) - 1) < 1e-12);
    }
}

static void measuring_steps_pass_three_times_and_leave_ordinary_gradients(void) {
    static const protocol protocols[] = {
        {"loss alone",                                                  20, 12,  24,  8,  0, (snip_format)0},
        { "both probes",                                                20, 12,  24,  8,  1, (snip_format)0},
        { "loss alone, measured in BF16",                               20, 12,  24,  8,  0, SNIP_BF16     },
        { "both probes, measured in BF16",                              20, 12,  24,  8,  1, SNIP_BF16     },
        { "several blocks of every GEMM, loss alone",                   10, 300, 270, 12, 0, (snip_format)0},
        { "several blocks of every GEMM",                               10, 300, 270, 12, 1, (snip_format)0},
        { "several blocks of every GEMM, loss alone, measured in BF16", 10, 300, 270, 12, 0, SNIP_BF16     },
        { "several blocks of every GEMM, measured in BF16",             10, 300, 270, 12, 1, SNIP_BF16     },
    };
    for (int i = 0; i < (int)(sizeof protocols / sizeof protocols[0]); i++) {
        test_about("%s", protocols[i].name);
        check_protocol(&protocols[i]);
    }
}

static void a_session_with_negative_every_never_measures(void) {
    model n = model_small();
    snip_desc d = description();
    d.every = -1;
    snip *s = session_open(&d);
    model_add(&n, s);
    for (int step = 1; step <= 5; step++) {
        CHECK(snip_current_pass(s) == SNIP_PASS_ORDINARY);
        CHECK(model_step(&n, s, step) == SNIP_OK);
    }
    CHECK(snip_plans(s) == 0 && snip_share(s, SNIP_BF16) == 1);
}

// Measuring with the plan held back: the weights of a run that never measures, bit for bit.
static void measuring_alone_does_not_change_the_training(void) {
    model n[2];
    for (int i = 0; i < 2; i++) {
        snip_desc d = description();
        n[i] = model_small();
        d.every = i ? -1 : 2;
        d.high = SNIP_F32;
        snip *s = model_session(&n[i], &d);
        for (int step = 1; step <= 9; step++) {
            CHECK(model_step(&n[i], s, step) == SNIP_OK);
            snip_set_format(s, -1, SNIP_GEMMS, SNIP_F32);
        }
        CHECK(snip_plans(s) == (i ? 0 : 4));
    }
    for (int l = 0; l < 2; l++) CHECK(same_floats(n[0].w[l], n[1].w[l], weights_of(n, l)));
}

// ---- determinism ----

// Every bit of what a session measured and did, over a few steps.
static uint64_t fingerprint(int threads, int micros, snip_mode eval_between) {
    enum { STEPS = 6 };

    model n = model_new(5, 70, 90, 150, 30);
    snip_desc d = description();
    uint64_t hash = TEST_HASH_START;
    set_threads(threads);
    n.micros = micros;
    n.eval_between = eval_between;
    d.every = 2;
    d.budget = 0.6;
    snip *s = model_session(&n, &d);
    for (int step = 1; step <= STEPS; step++) {
        CHECK(model_step(&n, s, step) == SNIP_OK);
        for (int l = 0; l < 2; l++) {
            snip_layer_info info = layer_of(s, l);
            hash = test_hash(hash, &info.fp8, sizeof info.fp8);
            hash = test_hash(hash, &info.fp4, sizeof info.fp4);
            hash = test_hash(hash, info.format, sizeof info.format);
            hash = test_hash(hash, n.w[l], (size_t)weights_of(&n, l) * sizeof(float));
        }
    }
    CHECK(snip_plans(s) == (STEPS - 1) / 2);
    set_threads(1);
    return hash;
}

static void threads_do_not_show(void) {
    uint64_t one = fingerprint(1, 1, SNIP_TRAIN), two = fingerprint(1, 2, SNIP_TRAIN);
    CHECK(one == fingerprint(1, 1, SNIP_TRAIN));
    CHECK(one == fingerprint(3, 1, SNIP_TRAIN));
    CHECK(one == fingerprint(2, 1, SNIP_TRAIN));
    CHECK(two == fingerprint(3, 2, SNIP_TRAIN));
    CHECK(two != one);
}

static void evaluation_between_passes_does_not_show(void) {
    uint64_t one = fingerprint(1, 1, SNIP_TRAIN);
    CHECK(one == fingerprint(1, 1, SNIP_EVAL));
    CHECK(one == fingerprint(1, 1, SNIP_EVAL_HIGH));
    CHECK(fingerprint(1, 2, SNIP_TRAIN) == fingerprint(1, 2, SNIP_EVAL));
}

// ---- ranks ----

typedef struct {
    model n[2];
    snip *s[2];
} two_ranks;

// A step of both on the loss averaged over them, times a factor; 1: a measuring step.
static int ranks_step(two_ranks *ranks, int step, double factor) {
    snip_adamw o = optimizer(step);
    int measuring = snip_current_pass(ranks->s[0]) != SNIP_PASS_ORDINARY, again[2];
    do {
        for (int r = 0; r < 2; r++) model_pass(&ranks->n[r], ranks->s[r]);
        for (int r = 0; r < 2; r++)
            again[r] = snip_next_pass(ranks->s[r], (ranks->n[0].loss + ranks->n[1].loss) / 2 * factor);
        CHECK(again[0] == again[1]);
    } while (again[0]);
    for (int r = 0; r < 2; r++) CHECK(snip_end_step(ranks->s[r], &o) == SNIP_OK);
    return measuring;
}

static int ranks_have_one_plan(const two_ranks *ranks) {
    snip_format formats[2][6];
    for (int r = 0; r < 2; r++) formats_of(ranks->s[r], formats[r]);
    return !memcmp(formats[0], formats[1], sizeof formats[0]);
}

// Two ranks with data of their own, as the header has it: they pass, measure and plan alike, also when the loss spikes.
static void ranks_that_exchange_state_plan_alike(void) {
    two_ranks ranks;
    snip_desc d = description();
    int spikes = 0, apart = 0;
    d.every = 12;
    d.budget = 0.5;
    d.drift = -1;
    for (int r = 0; r < 2; r++) {
        ranks.n[r] = model_new(31, 12, 20, 24, 12);
        ranks.s[r] = model_session(&ranks.n[r], &d);
    }
    for (int i = 0; i < 12 * 20; i++) ranks.n[1].x[i] = (i % 3 ? 0.3f : 5.0f) * normal();
    size_t size = snip_state_size(ranks.s[0]);
    void *state = room(size);
    for (int step = 1; step <= 48; step++) {
        test_about("step %d", step);
        if (ranks_step(&ranks, step, step == 40 ? 100 : 1)) {
            apart += !ranks_have_one_plan(&ranks) ||
                     layer_of(ranks.s[0], 0).fp4.loss_second != layer_of(ranks.s[1], 0).fp4.loss_second;
            CHECK(snip_state_save(ranks.s[0], state) == SNIP_OK);
            CHECK(snip_state_load(ranks.s[1], state, size) == SNIP_OK);
        }
        CHECK(ranks_have_one_plan(&ranks) && snip_current_pass(ranks.s[0]) == snip_current_pass(ranks.s[1]));
        CHECK(!strcmp(snip_reason(ranks.s[0]), snip_reason(ranks.s[1])));
        spikes += strstr(snip_reason(ranks.s[0]), "spikes") != NULL;
    }
    CHECK(apart > 0 && spikes > 0 && snip_plans(ranks.s[0]) >= 3);  // the test tests something
}

// ---- memory ----

typedef struct {
    size_t live, most;
} meter;

static void *metered_alloc(size_t size, void *user) {
    meter *m = (meter *)user;
    size_t *p = (size_t *)malloc(size + 16);
    if (!p) return NULL;
    *p = size;
    m->live += size;
    if (m->live > m->most) m->most = m->live;
    return p + 16 / sizeof *p;
}

static void metered_free(void *p, void *user) {
    size_t *at = (size_t *)p - 16 / sizeof *at;
    ((meter *)user)->live -= *at;
    free(at);
}

// The most bytes that a session of so many layers holds at a time, over two measuring steps.
static size_t most_memory(int layers) {
    enum { SIZE = 128, ROWS = 64 };

    float *x = randoms(ROWS * SIZE, 1), *w = randoms(SIZE * SIZE, 0.1f), *v = floats(SIZE * SIZE);
    float *y = floats(ROWS * SIZE), *dw = floats(SIZE * SIZE);
    meter m = { 0, 0 };
    snip_desc d = description();
    d.every = 1;
    d.alloc.alloc_fn = metered_alloc;
    d.alloc.free_fn = metered_free;
    d.alloc.user = &m;
    snip *s = session_open(&d);
    for (int l = 0; l < layers; l++) {
        char name[16];
        snprintf(name, sizeof name, "%d.x.y", l);
        snip_add_linear(s, name, SIZE, SIZE, 0);
        snip_bind_adamw(s, l, w, v);
    }
    for (int step = 1; step <= 3; step++) {
        snip_adamw o = optimizer(step);
        do
            for (int l = 0; l < layers; l++) {
                CHECK(snip_linear_forward(s, l, y, x, w, NULL, ROWS) == SNIP_OK);
                CHECK(snip_linear_backward(s, l, NULL, dw, NULL, x, x, w, ROWS) == SNIP_OK);
            }
        while (snip_next_pass(s, 1));
        CHECK(snip_end_step(s, &o) == SNIP_OK);
    }
    session_close(s);
    CHECK(m.live == 0);
    return m.most;
}

static void a_measured_layer_takes_20_kib_a_sketched_tensor(void) {
    size_t few = most_memory(16), many = most_memory(48);
    test_about("%g KiB a layer", (double)(many - few) / 32 / 1024);
    CHECK((many - few) / 32 <= 5 * 20 * 1024);
}

// Nothing is kept of a layer that no measurement has called but its record of averages.
static void a_layer_that_is_not_called_takes_little_memory(void) {
    enum { LAYERS = 4096 };

    meter m = { 0, 0 };
    snip_desc d = description();
    d.every = 1;
    d.alloc.alloc_fn = metered_alloc;
    d.alloc.free_fn = metered_free;
    d.alloc.user = &m;
    snip *s = session_open(&d);
    for (int l = 0; l < LAYERS; l++) {
        char name[16];
        snprintf(name, sizeof name, "%d.x.y", l);
        snip_add_linear(s, name, 8, 8, 0);
    }
    size_t added = m.live;
    float x[64] = { 1 }, y[64], dw[64], v[64] = { 1 };
    snip_bind_adamw(s, 0, v, v);
    for (int step = 1; step <= 3; step++) {
        snip_adamw o = optimizer(step);
        do {
            snip_linear_forward(s, 0, y, x, x, NULL, 8);
            snip_linear_backward(s, 0, NULL, dw, NULL, x, x, x, 8);
        } while (snip_next_pass(s, 1));
        CHECK(snip_end_step(s, &o) == SNIP_OK);
    }
    test_about("%g bytes a layer, %g KiB for one that is called", (double)added / LAYERS,
               (double)(m.live - added) / 1024);
    CHECK(added / LAYERS < 2048 && m.live - added < 512 * 1024);
    CHECK(snip_plans(s) == 2);
    session_close(s);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(measuring_steps_pass_three_times_and_leave_ordinary_gradients);
    RUN(a_session_with_negative_every_never_measures);
    RUN(measuring_alone_does_not_change_the_training);
    RUN(threads_do_not_show);
    RUN(evaluation_between_passes_does_not_show);
    RUN(ranks_that_exchange_state_plan_alike);
    RUN(a_measured_layer_takes_20_kib_a_sketched_tensor);
    RUN(a_layer_that_is_not_called_takes_little_memory);
    return test_end();
}
