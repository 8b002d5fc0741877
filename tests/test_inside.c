// Parts of the session that its interface does not show. PRIVATE NAMES: snipi_host_mix_rows and _columns, SNIPI_MIXED,
// SNIPI_PROJECTED, snipi_sum_sq, snipi_adam_scalar, snipi_adam_of, snipi_average_measurement, snipi_solve, SNIPI_TERMS,
// snipi_costs, snipi_kept, SNIPI_STATE_MAGIC and its like, snipi_little_endian and the members of snip.
//     test_inside --state      prints a digest of a saved state, which test_targets.sh compares between machines
#include "session.h"

// ---- sketches ----

enum { ROWS = 300, COLS = 70 };

static const float *mixed_input(int equal_rows) {  // [ROWS][COLS]
    float *x = randoms(ROWS * COLS, 1);
    for (int i = 0; equal_rows && i < ROWS * COLS; i++) x[i] = x[i % COLS];
    return x;
}

static void mixed_rows_keep_the_norm_on_average(void) {
    enum { KEYS = 300 };

    float *mixed = floats(SNIPI_MIXED * COLS), *again = floats(SNIPI_MIXED * COLS);
    for (int equal_rows = 0; equal_rows < 2; equal_rows++) {
        const float *x = mixed_input(equal_rows);
        double mean = 0;
        for (int i = 0; i < KEYS; i++) {
            snip_rng_key key = { 1, 2, (uint32_t)i };
            set_threads(1 + i % 3);
            snipi_host_mix_rows(NULL, key, x, ROWS, COLS, 0, SNIPI_MIXED, mixed);
            set_threads(1);
            snipi_host_mix_rows(NULL, key, x, ROWS, COLS, 0, SNIPI_MIXED, again);
            CHECK(same_floats(mixed, again, SNIPI_MIXED * COLS));
            mean += snipi_sum_sq(mixed, SNIPI_MIXED * COLS) / KEYS;
        }
        test_about("equal rows %d", equal_rows);
        CHECK(close_to(mean, snipi_sum_sq(x, ROWS * COLS), 0.03));
    }
}

static void mixed_rows_are_the_sum_of_their_parts(void) {
    enum { PART = 131 };

    const float *x = mixed_input(0);
    float *mixed = floats(SNIPI_MIXED * COLS), *part = floats(SNIPI_MIXED * COLS), *rest = floats(SNIPI_MIXED * COLS);
    for (int i = 0; i < 300; i++) {
        snip_rng_key key = { 1, 2, (uint32_t)i };
        snipi_host_mix_rows(NULL, key, x, ROWS, COLS, 0, SNIPI_MIXED, mixed);
        snipi_host_mix_rows(NULL, key, x, PART, COLS, 0, SNIPI_MIXED, part);
        snipi_host_mix_rows(NULL, key, x + PART * COLS, ROWS - PART, COLS, PART, SNIPI_MIXED, rest);
        for (int j = 0; j < SNIPI_MIXED * COLS; j++) part[j] += rest[j] - mixed[j];
        CHECK(snipi_sum_sq(part, SNIPI_MIXED * COLS) < 1e-10 * snipi_sum_sq(x, ROWS * COLS));
    }
}

static void columns_are_mixed_as_the_rows_of_the_transpose(void) {
    static const int shapes[2][2] = {
        {9,     1325},
        { COLS, 70  }
    };  // 42 chunks, 3; the last of them short
    snip_rng_key key = { 1, 2, 0 };
    const float *x = mixed_input(0);
    for (int shape = 0; shape < 2; shape++) {
        int rows = shapes[shape][0], cols = shapes[shape][1];
        float *turned = floats(rows * cols), *by_rows = floats(SNIPI_PROJECTED * rows);
        float *by_columns = floats(rows * SNIPI_PROJECTED);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) turned[j * rows + i] = x[i * cols + j];
        snipi_host_mix_rows(NULL, key, turned, cols, rows, 0, SNIPI_PROJECTED, by_rows);
        snipi_host_mix_columns(NULL, key, x, rows, cols, by_columns);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < SNIPI_PROJECTED; j++)
                CHECK(fabsf(by_columns[i * SNIPI_PROJECTED + j] - by_rows[j * rows + i]) < 1e-4f);
    }
}

// ---- Adam's step ----

static void adam_steps_are_the_scalar_ones_on_every_path(void) {
    enum { N = 101 };

    float *m = randoms(N, 1), *v = randoms(N, 1), *a = floats(N), *b = floats(N);
    for (int i = 0; i < N; i++) v[i] = i % 10 ? v[i] * v[i] : 0;
    for (int with_m = 0; with_m < 2; with_m++)
        for (int isa = SNIP_ISA_BEST; isa < SNIP_ISA_COUNT; isa++) {
            if (!snip_isa_available((snip_isa)isa)) continue;
            test_about("%s", snip_isa_name((snip_isa)isa));
            snipi_adam_scalar(with_m ? m : NULL, v, 0.3f, 1.7f, 1e-3f, N, a);
            snipi_adam_of((snip_isa)isa)(with_m ? m : NULL, v, 0.3f, 1.7f, 1e-3f, N, b);
            CHECK(a[10] == 0);  // where v is 0
            CHECK(
                close_to((double)a[11], 0.3 * (with_m ? (double)m[11] : 1) / (sqrt(1.7 * (double)v[11]) + 1e-3), 1e-5));
#ifdef __FAST_MATH__  // roots and quotients by approximations
            for (int j = 0; j < N; j++) CHECK(close_to((double)a[j], (double)b[j], 1e-5));
#else
            for (int j = 0; j < N; j++) CHECK(a[j] == b[j]);
#endif
        }
}

// ---- averages of one layer ----

// As if layer l had been called in a measurement.
static void make_up_a_call(snip *s, int l) {
    s->layers[l].rows_of[SNIP_PASS_CLEAN] = 1;
    s->layers[l].measurement = (snipi_measurement *)snipi_alloc(s, sizeof(snipi_measurement));
}

static snip *averaged_session(int layers) {
    snip_desc d = description();
    d.update_weight = -1;
    snip *s = session_open(&d);
    for (int l = 0; l < layers; l++) {
        CHECK(snip_add_linear(s, "l", 16, 16, 0) == l);
        make_up_a_call(s, l);
    }
    return s;
}

static void costs_are_averages_by_the_textbook(void) {
    static const double x[4] = { 3, 5, 4, 9 };
    snip *s = averaged_session(1);
    s->loss = -20;
    for (int n = 1; n <= 4; n++) {
        double mean = 0, var = 0, weights_sq = 0, weight[4] = { 0 };
        s->layers[0].kept.estimate[1].loss_second = x[n - 1];
        snipi_average_measurement(s);
        snipi_costs(s);
        for (int j = 0; j < n; j++) weight[j] = n < 4 ? 1.0 / n : j == 3 ? 1.0 / 3 : 2.0 / 9;
        for (int j = 0; j < n; j++) mean += weight[j] * x[j];
        for (int j = 0; j < n; j++) {
            var += weight[j] * (x[j] - mean) * (x[j] - mean);
            weights_sq += weight[j] * weight[j];
        }
        snip_layer_info info = layer_of(s, 0);
        double error = n == 1 ? mean : sqrt(var / (1 - weights_sq) * weights_sq);
        CHECK(close_to(info.fp4.cost[0], mean / 20, 1e-12) && close_to(info.fp4.error[0], error / 20, 1e-12));
        CHECK(info.fp4.cost[1] == 0 && info.fp4.error[1] == 0 && info.fp8.cost[0] == 0);
        CHECK(close_to(info.measurements, 1 / weights_sq, 1e-12));
    }
}

static void errors_are_moderated_by_those_of_all_layers(void) {
    const double mean[2] = { 6, 2 }, own[2] = { 2, 0.02 };
    const double relative = (2 + 0.02) / (36 + 2 + 4 + 0.02);  // of two measurements each
    snip *s = averaged_session(2);
    s->loss = 100;
    for (int sign = -1; sign < 2; sign += 2) {
        for (int l = 0; l < 2; l++) s->layers[l].kept.estimate[0].loss_second = mean[l] + sign * sqrt(own[l] / 2);
        snipi_average_measurement(s);
        snipi_costs(s);
    }
    for (int l = 0; l < 2; l++) {
        snip_layer_info info = layer_of(s, l);
        double error = sqrt(0.5 * (4 * relative * (mean[l] * mean[l] + own[l]) + own[l]) / 5);
        CHECK(close_to(info.fp8.cost[0], mean[l] / 100, 1e-12) && close_to(info.fp8.error[0], error / 100, 1e-12));
    }
}

static void a_first_order_term_averages_out(void) {
    snip *s = averaged_session(1);
    s->loss = -2;
    for (int i = 0; i < 200; i++) {
        s->layers[0].kept.estimate[1].loss_first = i & 1 ? 1 : -1;
        snipi_average_measurement(s);
        snipi_costs(s);
    }
    snip_layer_info info = layer_of(s, 0);  // the last came out as 1: mean 0.2, nearly all error
    CHECK(info.fp4.cost[0] > 0 && info.fp4.cost[0] < 0.2 / 2 * 0.3 && close_to(info.measurements, 5, 1e-9));
}

// ---- many layers that are never run; their measurements are made up ----

enum { MADE_UP = 28, MADE_UP_GEMMS = 3 * MADE_UP };

static snip *made_up_session(snip_desc d) {
    snip *s = session_open(&d);
    for (int l = 0; l < MADE_UP; l++) {
        char name[16];
        snprintf(name, sizeof name, "%d.x.y", l);
        CHECK(snip_add_linear(s, name, 16, 16, 0) == l);
    }
    for (int l = 0; l < MADE_UP; l++) make_up_a_call(s, l);
    s->loss = 1;
    return s;
}

// One measurement of costs that are right but for a factor exp(noise * N(0, 1)) each. Number of GEMMs that change.
static int made_up_measurement(snip *s, double truth[MADE_UP][3], double noise) {
    snip_format before[MADE_UP_GEMMS], after[MADE_UP_GEMMS];
    int changed = 0;
    formats_of(s, before);
    for (int l = 0; l < MADE_UP; l++)
        for (int f = 0; f < 2; f++)
            for (int g = 0; g < 3; g++)
                s->layers[l].kept.estimate[f].update[g] = truth[l][g] * (f ? 1 : 0.01) * exp(noise * (double)normal()) *
                                                          (g ? s->desc.horizon : 1);
    snipi_average_measurement(s);
    snipi_costs(s);
    CHECK(snipi_solve(s) == SNIP_OK);
    formats_of(s, after);
    for (int i = 0; i < MADE_UP_GEMMS; i++) changed += before[i] != after[i];
    return changed;
}

static void draw_truth(double truth[MADE_UP][3]) {
    for (int l = 0; l < MADE_UP; l++)
        for (int g = 0; g < 3; g++) truth[l][g] = exp(0.7 * (double)normal());
}

static int in_fp4(const snip *s, double truth[MADE_UP][3], double *harm) {
    snip_format now[MADE_UP_GEMMS];
    int count = 0;
    formats_of(s, now);
    *harm = 0;
    for (int i = 0; i < MADE_UP_GEMMS; i++) {
        count += now[i] == SNIP_E2M1;
        *harm += (now[i] == SNIP_E2M1 ? 1 : 0.01) * truth[i / 3][i % 3];
    }
    return count;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double least_harm(double truth[MADE_UP][3], int count) {
    double sorted[MADE_UP_GEMMS], sum = 0;
    memcpy(sorted, truth, sizeof sorted);
    qsort(sorted, MADE_UP_GEMMS, sizeof *sorted, by_size);
    for (int i = 0; i < MADE_UP_GEMMS; i++) sum += (i < count ? 1 : 0.01) * sorted[i];
    return sum;
}

static void standard_errors_are_those_of_the_costs(void) {
    enum { RUNS = 30 };

    for (int n = 1; n <= 16; n *= 2) {
        double sum = 0;
        for (int run = 0; run < RUNS; run++) {
            double truth[MADE_UP][3];
            snip *s = made_up_session(description());
            random_state = 100 + (uint64_t)run;
            draw_truth(truth);
            for (int j = 0; j < n; j++) made_up_measurement(s, truth, 0.2);
            for (int l = 0; l < MADE_UP; l++) {
                snip_layer_info info = layer_of(s, l);
                double off = (info.fp4.cost[0] - truth[l][0] * exp(0.02)) / info.fp4.error[0];
                sum += off * off / (RUNS * MADE_UP);
            }
            session_close(s);
        }
        test_about("%d measurements are off by %g standard errors", n, sqrt(sum));
        CHECK(n == 1 ? sum < 0.1 : sqrt(sum) > 0.9 && sqrt(sum) < (n == 2 ? 1.25 : 1.15));
    }
}

typedef struct {
    int changes, after;   // of GEMMs: under the same costs, when the costs have really changed
    double excess, late;  // harm beyond the least: under the same costs, afterwards
} plan_history;

static plan_history plan_under_noise(snip *s, double truth[MADE_UP][3]) {
    enum { FIRST = 10, STEPS = 100, FP4 = 51 };

    plan_history h = { 0, 0, 0, 0 };
    double harm;
    random_state = 5;
    draw_truth(truth);
    CHECK(made_up_measurement(s, truth, 0.2) == MADE_UP_GEMMS && strstr(snip_reason(s), "first plan"));
    for (int i = 1; i < FIRST; i++) made_up_measurement(s, truth, 0.2);
    for (int i = FIRST; i < STEPS; i++) {
        h.changes += made_up_measurement(s, truth, 0.2);
        CHECK(in_fp4(s, truth, &harm) == FP4);
        h.excess += harm / least_harm(truth, FP4) - 1;
    }
    if (h.changes == 0) CHECK(strstr(snip_reason(s), "stays"));
    draw_truth(truth);
    for (int i = 0; i < 10; i++) h.after += made_up_measurement(s, truth, 0.2);
    CHECK(in_fp4(s, truth, &harm) == FP4);
    h.late = harm / least_harm(truth, FP4) - 1;
    return h;
}

static snip *margin_session(double margin) {
    snip_desc d = description();
    d.margin = margin;
    d.budget = 0.6;
    return made_up_session(d);
}

// Noisy costs of layers much alike: the plan holds still and is none the worse; costs that really change move it.
static void plans_hold_still_under_noise(void) {
    static const double margins[3] = { 0, -1, 1000 };
    double truth[MADE_UP][3];
    plan_history h[3];
    for (int k = 0; k < 3; k++) {
        test_about("margin %g", margins[k]);
        h[k] = plan_under_noise(margin_session(margins[k]), truth);
    }
    test_about("changes %d %d %d", h[0].changes, h[1].changes, h[2].changes);
    CHECK(h[2].changes == 0 && h[1].changes > 100 && h[0].changes < h[1].changes / 10);
    test_about("excess harm %g %g", h[0].excess, h[1].excess);
    CHECK(h[0].excess < h[1].excess);
    test_about("after a true change %d %d, excess harm %g %g", h[0].after, h[2].after, h[0].late, h[2].late);
    CHECK(h[0].after > 20 && h[2].after == 0 && h[0].late < 0.05 && h[2].late > 0.3);
}

static void a_change_that_pays_is_made(void) {
    static const double margins[2] = { 0, -1 };
    for (int k = 0; k < 2; k++) {
        double truth[MADE_UP][3];
        snip *s = margin_session(margins[k]);
        test_about("margin %g", margins[k]);
        plan_under_noise(s, truth);
        truth[0][0] = truth[0][1] = truth[0][2] = 1e3;
        for (int i = 0; i < 3; i++)
            if (made_up_measurement(s, truth, 0) && strstr(snip_reason(s), "harm"))
                CHECK(strstr(snip_reason(s), "change: predicted"));
        snip_layer_info info = layer_of(s, 0);
        for (int g = 0; g < SNIP_GEMMS; g++) CHECK(info.format[g] == SNIP_E4M3);
    }
}

static void a_plan_that_no_longer_meets_its_targets_is_changed(void) {
    double truth[MADE_UP][3], harm;
    snip *s = margin_session(1000);
    plan_under_noise(s, truth);
    s->desc.budget = 0.8;
    CHECK(made_up_measurement(s, truth, 0.2) == 17 && in_fp4(s, truth, &harm) == 68);
    CHECK(strstr(snip_reason(s), "targets"));
}

// ---- state ----

// A session of made-up numbers, all of them whole or halves: the same on every machine.
static snip *numbered_session(void) {
    snip *s = made_up_session(description());
    for (int l = 0; l < MADE_UP; l++) {
        snipi_kept_layer *layer = &s->layers[l].kept;
        for (int f = 0; f < 2; f++) {
            for (int t = 0; t < SNIPI_TERMS; t++) {
                layer->average[f].mean[t] = 0.5 * l + f - t;
                layer->average[f].variance[t] = 3 + l;
            }
            layer->estimate[f].loss_first = 3 + l;
        }
        layer->level[0] = layer->seconds[2][1] = -0.5 * l;
        layer->format[l % 3] = SNIP_E2M1;
    }
    s->kept.step = 123456789012;
    s->kept.plans = 7;
    s->kept.measurements = 3;
    s->kept.squared_weights = 0.5;
    s->kept.loss_mean = 2.5;
    s->kept.losses = 99;
    s->kept.levels = 98;
    s->kept.measured = 97;
    s->kept.due = s->kept.fallen = 1;
    s->kept.adamw = optimizer(12);
    snprintf(s->reason, sizeof s->reason, "step 3: because");
    return s;
}

static uint64_t state_digest(void) {
    snip *s = numbered_session(), *other = made_up_session(description());
    size_t size = snip_state_size(s);
    unsigned char *state = (unsigned char *)room(size), *again = (unsigned char *)room(size);
    CHECK(snip_state_save(s, state) == SNIP_OK && snip_state_load(other, state, size) == SNIP_OK);
    CHECK(snip_state_save(other, again) == SNIP_OK && !memcmp(state, again, size));
    CHECK(other->kept.step == s->kept.step &&
          other->layers[5].kept.average[1].mean[2] == s->layers[5].kept.average[1].mean[2]);
    return test_hash(TEST_HASH_START, state, size);
}

static void a_state_is_the_same_bytes_on_every_machine(void) { CHECK(state_digest() == 0xe30d30f5c4a91168u); }

// A state whose checksum is right and whose values are not.
static void forged_values_are_refused(void) {
    const size_t header = SNIPI_STATE_MAGIC + SNIPI_STATE_REASON + SNIPI_STATE_SIZES;
    const size_t layer = header + sizeof(snipi_kept), drift = layer + offsetof(snipi_kept_layer, reference);
    const size_t ran = layer + offsetof(snipi_kept_layer, ran);
    snip_desc d = description();
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.a", 8, 8, 0) == 0);
    const size_t size = snip_state_size(s);
    const size_t step = header + offsetof(snipi_kept, step), plans = header + offsetof(snipi_kept, plans);

    const struct {
        size_t at;
        uint64_t word;
        int good;
    } cases[] = {
        {layer,  77,                  0}, // a format
        { layer, 4,                   0}, // E5M2 is none of the plan's
        { layer, 0xFFFFFFFFFFFFFFFFu, 0},
        { drift, 0x7FF8000000000000u, 0}, // a double: NaN, infinity, 1
        { drift, 0x7FF0000000000000u, 0},
        { drift, 0x3FF0000000000000u, 1},
        { ran,   8,                   0}, // bits of the GEMMs that ran
        { ran,   7,                   1},
        { step,  0x7FFFFFFFFFFFFFFFu, 0},
        { step,  0x8000000000000000u, 0},
        { step,  41,                  1},
        { plans, 1u << 31,            0},
        { plans, 0xFFFFFFFF00000000u, 0},
        { plans, 3,                   1},
    };

    unsigned char *state = (unsigned char *)room(size), *forged = (unsigned char *)room(size);
    CHECK(snip_state_save(s, state) == SNIP_OK && snip_state_load(s, state, size) == SNIP_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t word = cases[i].word;
        memcpy(forged, state, size);
        snipi_little_endian(&word, 8);
        memcpy(forged + cases[i].at, &word, 8);
        uint64_t hash = test_hash(TEST_HASH_START, forged, size - 8);
        snipi_little_endian(&hash, 8);
        memcpy(forged + size - 8, &hash, 8);
        test_about("case %d", (int)i);
        CHECK(snip_state_load(s, forged, size) == (cases[i].good ? SNIP_OK : SNIP_CORRUPT));
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--state")) {
        uint64_t digest = state_digest();
        if (!test.failed) printf("%016llx\n", (unsigned long long)digest);
        close_sessions();
        return test.failed != 0;
    }
    test_start(argc, argv);
    RUN(mixed_rows_keep_the_norm_on_average);
    RUN(mixed_rows_are_the_sum_of_their_parts);
    RUN(columns_are_mixed_as_the_rows_of_the_transpose);
    RUN(adam_steps_are_the_scalar_ones_on_every_path);
    RUN(costs_are_averages_by_the_textbook);
    RUN(errors_are_moderated_by_those_of_all_layers);
    RUN(a_first_order_term_averages_out);
    RUN(standard_errors_are_those_of_the_costs);
    RUN(plans_hold_still_under_noise);
    RUN(a_change_that_pays_is_made);
    RUN(a_plan_that_no_longer_meets_its_targets_is_changed);
    RUN(a_state_is_the_same_bytes_on_every_machine);
    RUN(forged_values_are_refused);
    return test_end();
}
