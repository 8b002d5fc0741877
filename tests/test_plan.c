// Plans: the least harm that meets the budget or the time, when they change, how they are printed, saved and loaded.
// Public names alone.
#include "session.h"
#include <fcntl.h>
#include <sys/stat.h>

// ---- the least harm that meets a budget ----

enum { STAGES = 3 };

static double weights_in(int layer) { return (double)bundle_layers[layer].out * bundle_layers[layer].in; }

typedef struct {
    snip_layer_info info[BUNDLE];
    double cost, in_fp4[STAGES], all[STAGES];  // FLOPs by stage, in units of rows
} plan_figures;

static plan_figures figures_of(const snip *s) {
    plan_figures p;
    memset(&p, 0, sizeof p);
    for (int l = 0; l < BUNDLE; l++) {
        p.info[l] = layer_of(s, l);
        for (int g = 0; g < SNIP_GEMMS; g++) {
            int fp4 = p.info[l].format[g] == SNIP_E2M1;
            CHECK(fp4 || p.info[l].format[g] == SNIP_E4M3);
            p.all[bundle_layers[l].stage] += weights_in(l);
            p.in_fp4[bundle_layers[l].stage] += fp4 * weights_in(l);
            p.cost += (fp4 ? &p.info[l].fp4 : &p.info[l].fp8)->cost[g];
        }
    }
    return p;
}

// The least cost of a stage that meets the budget, of every choice; bit 3 l + g of a choice: FP4.
static double cheapest(const plan_figures *p, int stage, double budget, int per_layer) {
    double best = 1e300;
    for (int choice = 0; choice < 512; choice++) {
        double gain = 0, price = 0;
        int bit = 0, legal = 1;
        for (int l = 0; l < BUNDLE; l++) {
            if (bundle_layers[l].stage != stage) continue;
            for (int g = 0; g < SNIP_GEMMS; g++, bit++) {
                int fp4 = choice >> bit & 1;
                if (per_layer && g && fp4 != (choice >> (bit - g) & 1)) legal = 0;
                gain += fp4 * weights_in(l);
                price += (fp4 ? &p->info[l].fp4 : &p->info[l].fp8)->cost[g];
            }
        }
        if (legal && gain >= budget * p->all[stage] * (1 - 1e-12) && price < best) best = price;
    }
    return best;
}

static snip *planned(const bundle *b, double budget, int per_layer, int restricted) {
    snip_desc d = description();
    d.budget = budget;
    d.per_layer = per_layer;
    snip *s = bundle_session(b, d, BUNDLE);
    if (restricted) {
        CHECK(snip_allow(s, 0, SNIP_FWD, 0, 1) == SNIP_OK);  // must be FP4
        if (budget <= 0.5)
            CHECK(snip_allow(s, 2, per_layer ? SNIP_GEMMS : SNIP_WGRAD, 1, 0) == SNIP_OK);  // must be FP8
    }
    CHECK(bundle_step(b, s, 1) == SNIP_OK && bundle_step(b, s, 2) == SNIP_OK);
    CHECK(snip_plans(s) == 1 && snip_solve_seconds(s) >= 0 && snip_solve_seconds(s) < 1);
    return s;
}

static const double budgets[] = { 0, 0.1, 0.25, 0.3333, 0.5, 0.6, 0.75, 0.9, 0.99, 1 };

enum { BUDGETS = (int)(sizeof budgets / sizeof budgets[0]) };

static void plans_are_the_cheapest_that_meet_the_budget(void) {
    bundle b = bundle_new();
    for (int i = 0; i < BUDGETS; i++)
        for (int per_layer = 0; per_layer < 2; per_layer++) {
            double best = 0;
            test_about("budget %g, per layer %d", budgets[i], per_layer);
            snip *s = planned(&b, budgets[i], per_layer, 0);
            plan_figures p = figures_of(s);
            for (int stage = 0; stage < STAGES; stage++) {
                CHECK(p.in_fp4[stage] >= budgets[i] * p.all[stage] * (1 - 1e-12));
                best += cheapest(&p, stage, budgets[i], per_layer);
            }
            CHECK(fabs(p.cost - best) <= 1e-9 * (fabs(p.cost) + 1e-3));
            for (int l = 0; l < BUNDLE && per_layer; l++) {
                const snip_format *format = p.info[l].format;
                CHECK(format[0] == format[1] && format[1] == format[2]);
            }
            session_close(s);
        }
}

static void plans_keep_to_the_allowed_formats(void) {
    bundle b = bundle_new();
    for (int i = 0; i < BUDGETS; i++)
        for (int per_layer = 0; per_layer < 2; per_layer++) {
            test_about("budget %g, per layer %d", budgets[i], per_layer);
            snip *s = planned(&b, budgets[i], per_layer, 1);
            plan_figures p = figures_of(s);
            for (int stage = 0; stage < STAGES; stage++)
                CHECK(p.in_fp4[stage] >= budgets[i] * p.all[stage] * (1 - 1e-12));
            CHECK(p.info[0].format[SNIP_FWD] == SNIP_E2M1);
            if (budgets[i] <= 0.5) CHECK(p.info[2].format[SNIP_WGRAD] == SNIP_E4M3);
            session_close(s);
        }
}

static void a_budget_that_no_plan_meets_leaves_the_old_plan(void) {
    bundle b = bundle_new();
    snip_format before[3 * BUNDLE], after[3 * BUNDLE];
    snip *s = planned(&b, 0.5, 0, 0);
    CHECK(!strcmp(snip_message(s), ""));
    formats_of(s, before);
    CHECK(snip_allow(s, 3, SNIP_GEMMS, 1, 0) == SNIP_OK && snip_allow(s, 4, SNIP_FWD, 1, 0) == SNIP_OK);
    CHECK(bundle_step(&b, s, 3) == SNIP_INFEASIBLE);
    CHECK(strstr(snip_message(s), "stage 1") && strstr(snip_message(s), "50.00%"));
    formats_of(s, after);
    CHECK(!memcmp(before, after, sizeof before) && snip_plans(s) == 1 && snip_step(s) == 3);
    CHECK(snip_allow(s, -1, SNIP_GEMMS, 1, 1) == SNIP_OK);
    CHECK(bundle_step(&b, s, 4) == SNIP_OK && snip_plans(s) == 2);
}

static void formats_set_by_hand_count_in_the_shares(void) {
    bundle b = bundle_new();
    double all = 0;
    snip *s = bundle_session(&b, description(), BUNDLE);
    for (int l = 0; l < BUNDLE; l++) all += 3 * weights_in(l);
    CHECK(snip_set_format(s, -1, SNIP_GEMMS, SNIP_E4M3) == SNIP_OK && snip_share(s, SNIP_E4M3) == 1);
    CHECK(snip_set_format(s, 0, SNIP_DGRAD, SNIP_F32) == SNIP_OK);
    CHECK(close_to(snip_share(s, SNIP_F32), weights_in(0) / all, 1e-12));
}

// ---- printing ----

static char *printed_plan(const snip *s) {
    FILE *file = fopen(test_path("printed"), "w");
    size_t size;
    CHECK(file && snip_plan_print(s, file) == SNIP_OK);
    if (file) fclose(file);
    return test_read(test_path("printed"), &size);
}

static void the_printed_plan_is_a_table_of_blocks_and_kinds(void) {
    bundle b = bundle_new();
    snip *s = planned(&b, 0.5, 0, 0);
    const char *text = printed_plan(s);
    CHECK(strstr(text, "plan after step 2") && strstr(text, " down"));
}

static void layers_without_a_place_in_the_table_follow_it(void) {  // 41 columns
    char name[16];
    snip_desc d = description();
    snip *s = session_open(&d);
    snip_add_linear(s, "0.self.q", 8, 8, 0);
    snip_add_linear(s, "0.cross.q", 8, 8, 0);
    for (int kind = 0; kind < 39; kind++) {
        snprintf(name, sizeof name, "1.x.k%d", kind);
        snip_add_linear(s, name, 8, 8, 0);
    }
    CHECK(snip_set_format(s, 1, SNIP_FWD, SNIP_E2M1) == SNIP_OK);
    const char *text = printed_plan(s);
    CHECK(strstr(text, " self.q cross.q k0 ") && strstr(text, "\n  0        bbb    4bb "));  // a kind of two parts
    CHECK(strstr(text, "\n    1.x.k30 bbb\n") && strstr(text, "\n    1.x.k38 bbb\n") && !strstr(text, "1.x.k29"));
}

static void kinds_of_one_name_in_a_block_are_all_printed(void) {
    snip_desc d = description();
    snip *s = session_open(&d);
    CHECK(snip_add_linear(s, "0.attn.proj", 8, 8, 0) == 0 && snip_add_linear(s, "0.mlp.proj", 8, 8, 0) == 1);
    CHECK(snip_set_format(s, 0, SNIP_FWD, SNIP_E2M1) == SNIP_OK &&
          snip_set_format(s, 1, SNIP_FWD, SNIP_E4M3) == SNIP_OK);
    const char *text = printed_plan(s);
    CHECK(strstr(text, "4bb") && strstr(text, "8bb"));
}

// ---- plans by seconds: of two layers ----

enum { TIMED_GEMMS = 6, PLANS = 729 };  // 3 formats to the 6th

static double set_seconds(snip *s) {  // 7 in `high`, so that some GEMMs lose in FP8; the sum in `high`
    double high = 0;
    for (int l = 0; l < 2; l++)
        for (int g = 0; g < SNIP_GEMMS; g++) {
            double seconds[3] = { 7, 6.0 + g - l, 2.0 + (l ^ (g & 1)) };
            CHECK(snip_set_seconds(s, l, (snip_gemm_kind)g, seconds) == SNIP_OK);
            high += seconds[0];
        }
    return high;
}

static double gemm_cost(const snip_layer_info *info, int gemm, int format) {  // 0: `high`, 1: FP8, 2: FP4
    return format == 0 ? 0 : (format == 1 ? &info->fp8 : &info->fp4)->cost[gemm];
}

typedef struct {
    double least_seconds, least_cost;
} timed_best;

// Of every plan within the time allowed; per_layer: one format for a layer's three GEMMs.
static timed_best best_within(const snip_layer_info info[2], double allowed, int per_layer) {
    timed_best best = { 1e300, 1e300 };
    for (int plan = 0; plan < PLANS; plan++) {
        double seconds = 0, cost = 0;
        int rest = plan;
        if (per_layer && plan != plan % 3 * 13 + plan / 27 % 3 * 13 * 27) continue;
        for (int i = 0; i < TIMED_GEMMS; i++, rest /= 3) {
            seconds += info[i / 3].seconds[rest % 3][i % 3];
            cost += gemm_cost(&info[i / 3], i % 3, rest % 3);
        }
        if (seconds < best.least_seconds) best.least_seconds = seconds;
        if (seconds <= allowed * (1 + 1e-12) && cost < best.least_cost) best.least_cost = cost;
    }
    return best;
}

// Number of GEMMs left in `high` by the plan for a speedup, asked for as such or in seconds.
static int check_timed_plan(const bundle *b, double speedup, int by_seconds, int per_layer) {
    snip_desc d = description();
    snip_layer_info info[2];
    int high_left = 0;
    d.budget = 1;  // ignored
    d.per_layer = per_layer;
    if (by_seconds)
        d.seconds = 42 / speedup;
    else
        d.speedup = speedup;
    snip *s = bundle_session(b, d, 2);
    CHECK(bundle_step(b, s, 1) == SNIP_BAD_ARGUMENT && strstr(snip_message(s), "snip_measure_gains"));
    CHECK(snip_plan_seconds(s) == 0 && bundle_step(b, s, 2) == SNIP_BAD_ARGUMENT && snip_plans(s) == 0);
    double allowed = set_seconds(s) / speedup, seconds = 0, cost = 0;
    snip_status status = bundle_step(b, s, 3);
    for (int l = 0; l < 2; l++) info[l] = layer_of(s, l);
    timed_best best = best_within(info, allowed, per_layer);
    CHECK(status == (best.least_seconds <= allowed ? SNIP_OK : SNIP_INFEASIBLE));
    if (status == SNIP_INFEASIBLE)
        CHECK(strstr(snip_message(s), "seconds are lacking"));
    else {
        for (int i = 0; i < TIMED_GEMMS; i++) {
            snip_format f = info[i / 3].format[i % 3];
            int format = f == SNIP_E2M1 ? 2 : f == SNIP_E4M3;
            high_left += !format;
            seconds += info[i / 3].seconds[format][i % 3];
            cost += gemm_cost(&info[i / 3], i % 3, format);
        }
        CHECK(seconds <= allowed * (1 + 1e-9) && close_to(snip_plan_seconds(s), seconds, 1e-12));
        CHECK(fabs(cost - best.least_cost) <= 1e-9 * (fabs(cost) + 1e-3));
    }
    session_close(s);
    return high_left;
}

static void plans_by_seconds_are_the_cheapest_that_are_fast_enough(void) {
    static const double speedups[] = { 0.8, 1.0, 1.3, 1.7, 1.95, 3.5 };
    bundle b = bundle_new();
    int high_left = 0;
    for (int by_seconds = 0; by_seconds < 2; by_seconds++)
        for (int per_layer = 0; per_layer < 2; per_layer++)
            for (int i = 0; i < (int)(sizeof speedups / sizeof speedups[0]); i++) {
                test_about("speedup %g, by seconds %d, per layer %d", speedups[i], by_seconds, per_layer);
                high_left += check_timed_plan(&b, speedups[i], by_seconds, per_layer);
            }
    CHECK(high_left > 0);
}

static void measured_gains_are_seconds_and_change_no_plan(void) {
    bundle b = bundle_new();
    snip_format before[3 * BUNDLE], after[3 * BUNDLE];
    snip *s = bundle_session(&b, description(), BUNDLE);
    formats_of(s, before);
    CHECK(snip_measure_gains(s, 0) == SNIP_BAD_ARGUMENT && snip_measure_gains(NULL, 4) == SNIP_BAD_ARGUMENT);
    CHECK(snip_measure_gains(s, 5) == SNIP_OK);
    formats_of(s, after);
    CHECK(!memcmp(before, after, sizeof before) && snip_plan_seconds(s) > 0);
    for (int l = 0; l < BUNDLE; l++) {
        snip_layer_info info = layer_of(s, l);
        CHECK(info.nonfinite == 0);
        for (int g = 0; g < SNIP_GEMMS; g++)
            for (int f = 0; f < 3; f++) CHECK(info.seconds[f][g] > 0 && info.seconds[f][g] < 10);
    }
}

static void seconds_are_positive_and_kept_in_the_state(void) {
    bundle b = bundle_new();
    double seconds[3] = { 3, 2, 1 };
    snip *s = bundle_session(&b, description(), BUNDLE), *restored = bundle_session(&b, description(), BUNDLE);
    CHECK(snip_set_seconds(s, BUNDLE, SNIP_FWD, seconds) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_seconds(s, -2, SNIP_FWD, seconds) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_seconds(s, 0, SNIP_FWD, NULL) == SNIP_BAD_ARGUMENT);
    CHECK(snip_set_seconds(s, 3, SNIP_WGRAD, seconds) == SNIP_OK);
    snip *all = bundle_session(&b, description(), BUNDLE);
    CHECK(snip_set_seconds(all, -1, SNIP_GEMMS, seconds) == SNIP_OK);
    for (int l = 0; l < BUNDLE; l++)
        for (int g = 0; g < SNIP_GEMMS; g++) CHECK(layer_of(all, l).seconds[0][g] == 3);
    seconds[1] = 0;
    CHECK(snip_set_seconds(s, 3, SNIP_WGRAD, seconds) == SNIP_BAD_ARGUMENT);
    size_t size = snip_state_size(s);
    void *state = room(size);
    CHECK(snip_state_save(s, state) == SNIP_OK && snip_state_load(restored, state, size) == SNIP_OK);
    for (int l = 0; l < BUNDLE; l++) {
        snip_layer_info a = layer_of(s, l), z = layer_of(restored, l);
        CHECK(!memcmp(a.seconds, z.seconds, sizeof a.seconds));
        CHECK(a.seconds[1][SNIP_WGRAD] == (l == 3 ? 2 : 0));
    }
}

// ---- spikes of the loss ----

// A step with a loss of our choice; 1: it measured.
static int step_with_loss(model *n, snip *s, double loss) {
    snip_adamw o = optimizer(snip_step(s) + 1);
    int passes = 0;
    do {
        model_pass(n, s);
        passes++;
    } while (snip_next_pass(s, loss));
    CHECK(snip_end_step(s, &o) == SNIP_OK);
    return passes > 1;
}

typedef struct {
    const char *name;
    snip_format fallback;  // of desc
    snip_format falls_to;  // all of the plan; 0: the plan stays
    int measures;          // at all
    int off;               // desc.spike < 0
} spike_case;

static const spike_case spike_cases[] = {
    {"falls back to FP8",   (snip_format)0, SNIP_E4M3,      1, 0},
    { "the plan stays",     SNIP_E2M1,      (snip_format)0, 1, 0},
    { "falls back to BF16", SNIP_BF16,      SNIP_BF16,      1, 0},
    { "falls back to F32",  SNIP_F32,       SNIP_F32,       1, 0},
    { "spikes are off",     (snip_format)0, (snip_format)0, 1, 1},
    { "never measuring",    (snip_format)0, (snip_format)0, 0, 0},
};

enum { SPIKE_CASES = (int)(sizeof spike_cases / sizeof spike_cases[0]) };

// A session with a plan of step 41, after 42 steps with a loss near 2. A spike before the plan has no consequence.
static snip *spike_session(model *n, const spike_case *c) {
    snip_desc d = description();
    *n = model_small();
    d.every = c->measures ? 40 : -1;
    d.budget = 0.5;
    d.fallback = c->fallback;
    d.spike = c->off ? -1 : 0;
    snip *s = model_session(n, &d);
    random_state = 77;
    for (int step = 1; step <= 42; step++) {
        double loss = step == 38 ? 9 : 2 + 0.02 * (double)normal();
        CHECK(step_with_loss(n, s, loss) == (step == 41 && c->measures));
    }
    if (!c->measures) snip_set_format(s, -1, SNIP_GEMMS, SNIP_E2M1);
    CHECK(snip_share(s, SNIP_E2M1) >= 0.5);
    CHECK(!c->measures || strstr(snip_reason(s), "step 41: the first plan"));
    return s;
}

static void a_spike_falls_back_until_the_next_measurement(void) {
    for (int i = 0; i < SPIKE_CASES; i++) {
        const spike_case *c = &spike_cases[i];
        snip_format before[6], after[6];
        model n;
        snip *s = spike_session(&n, c);
        int heeded = c->measures && !c->off;
        test_about("%s", c->name);
        formats_of(s, before);
        CHECK(!step_with_loss(&n, s, 2.3));  // step 43, soon after the measurement
        formats_of(s, after);
        CHECK((memcmp(before, after, sizeof before) != 0) == (c->falls_to != 0));
        if (c->falls_to) CHECK(snip_share(s, SNIP_E2M1) == 0 && snip_share(s, c->falls_to) == 1);
        if (heeded) {
            CHECK(!strncmp(snip_reason(s), "step 43: the loss spikes: 2.3,", 30));
            CHECK((strstr(snip_reason(s), "fp8 until") != NULL) == (c->falls_to == SNIP_E4M3));
        }
        CHECK(!step_with_loss(&n, s, 2) && !step_with_loss(&n, s, 2));
        CHECK(step_with_loss(&n, s, 2) == heeded);  // step 46: a tenth of `every` after the last one
        CHECK(snip_share(s, SNIP_E2M1) >= 0.5);
        if (c->falls_to == SNIP_E4M3) CHECK(strstr(snip_reason(s), "step 46: a new plan after the fall back"));
        if (heeded && !c->falls_to)
            CHECK(strstr(snip_reason(s), "step 46: the plan stays") || strstr(snip_reason(s), "change: "));
    }
}

static void a_loss_that_is_not_a_number_is_measured_at_once(void) {
    for (int i = 0; i < SPIKE_CASES; i++) {
        const spike_case *c = &spike_cases[i];
        model n;
        snip *s = spike_session(&n, c);
        test_about("%s", c->name);
        for (int step = 43; step < 60; step++) CHECK(!step_with_loss(&n, s, 2 + 0.004 * (step - 46)));  // it may rise
        CHECK(!step_with_loss(&n, s, (double)NAN));
        CHECK(step_with_loss(&n, s, 2) == (c->measures && !c->off));
        CHECK(snip_share(s, SNIP_E2M1) >= 0.5);
    }
}

static void falling_noisy_losses_are_no_spikes(void) {
    model n = model_small();
    int measured = 0;
    snip_desc d = description();
    d.every = 1000;
    snip *s = model_session(&n, &d);
    snip_set_format(s, -1, SNIP_GEMMS, SNIP_E2M1);
    random_state = 3;
    for (int step = 1; step <= 900; step++)
        measured += step_with_loss(&n, s, 1.5 + 4 * exp(-step / 150.0) + 0.05 * (double)normal());
    CHECK(measured == 0 && snip_share(s, SNIP_E2M1) == 1);
}

static void a_new_level_of_the_loss_becomes_the_rule(void) {
    model n = model_small();
    int last_spike = 0;
    double mean = 0;
    snip_desc d = description();
    d.every = 10;
    d.budget = 0.5;
    d.drift = -1;
    snip *s = model_session(&n, &d);
    random_state = 3;
    for (int step = 1; step <= 100; step++) step_with_loss(&n, s, 1.5 + 0.05 * (double)normal());
    for (int step = 101; step <= 300; step++) {
        step_with_loss(&n, s, 3 + 0.05 * (double)normal());
        if (strstr(snip_reason(s), "spikes")) last_spike = step;
    }
    CHECK(last_spike > 100 && last_spike < 250);  // the step up is one, the level is none
    CHECK(snip_share(s, SNIP_E2M1) >= 0.5);       // a plan, no fall back
    step_with_loss(&n, s, 3);                     // measures
    step_with_loss(&n, s, 30);                    // does not: this one is told
    const char *told = strstr(snip_reason(s), "mean ");
    CHECK(told && sscanf(told, "mean %lf", &mean) == 1 && mean > 2.9 && mean < 3.1);
}

// Numbers of spikes among 400 losses, and whether a real one after them is seen: the plan falls back.
static int spikes_among(double (*loss_of)(int step), double jump, int *seen) {
    model n = model_small();
    int spikes = 0;
    snip_desc d = description();
    d.every = 100000;
    snip *s = model_session(&n, &d);
    random_state = 9;
    for (int step = 1; step <= 401; step++) {
        snip_set_format(s, -1, SNIP_GEMMS, SNIP_E2M1);
        CHECK(!step_with_loss(&n, s, step <= 400 ? loss_of(step) : jump));
        *seen = snip_share(s, SNIP_E2M1) < 1;
        if (step <= 400) spikes += *seen;
    }
    return spikes;
}

static float coarse(double x) { return snip_bf16_to_f32(snip_bf16_from_f32((float)x)); }

static double zero_first(int step) { return step <= 40 ? 0 : 0.01 * (1 + 0.02 * sin(1.7 * step)); }

static double zero_now_and_then(int step) { return step / 60 % 2 ? 0 : 0.01 * (double)normal(); }

static double huge(int step) { return 1e30 * (2 + 0.1 * sin(step)); }

static double tiny(int step) { return 1e-30 * (2 + 0.1 * sin(step)); }

static double negative(int step) { return -5 + 0.1 * sin(step); }

static double constant(int step) { return 3 + 0 * step; }

static double in_bf16(int step) { return (double)coarse(4 * exp(-step / 300.0) + 0.01 * (double)normal()); }

static void spikes_are_told_from_any_losses(void) {
    static const struct {
        const char *name;
        double (*loss_of)(int);
        double jump;
        int most;
    } cases[] = {
        {"0 first",         zero_first,        1,     1},
        { "0 now and then", zero_now_and_then, 1,     0},
        { "huge",           huge,              1e31,  0},
        { "tiny",           tiny,              1e-29, 0},
        { "negative",       negative,          3,     0},
        { "constant",       constant,          4,     0},
        { "coarse",         in_bf16,           9,     0}
    };

    for (int i = 0; i < 7; i++) {
        int seen = 0, spikes = spikes_among(cases[i].loss_of, cases[i].jump, &seen);
        test_about("%s: %d spikes, the real one %s", cases[i].name, spikes, seen ? "seen" : "missed");
        CHECK(spikes <= cases[i].most && seen);
    }
}

// ---- nothing is asked for ----

static void without_a_budget_equal_harm_stays_precise(void) {
    bundle b = bundle_new();
    snip_desc d = description();
    d.update_weight = -1;  // so that the backward GEMMs' harm is 0 in either format
    snip *s = bundle_session(&b, d, BUNDLE);
    for (int step = 1; step <= 2; step++) CHECK(bundle_step(&b, s, step) == SNIP_OK);
    for (int l = 0; l < BUNDLE; l++)
        CHECK(layer_of(s, l).format[SNIP_DGRAD] == SNIP_E4M3 && layer_of(s, l).format[SNIP_WGRAD] == SNIP_E4M3);
}

// ---- drift of inputs and gradients ----

typedef struct {
    float factor;  // on all inputs, after the first plan
    double drift;  // of desc
    int noticed;
} drift_case;

static void inputs_that_drift_are_measured_anew(void) {
    static const drift_case cases[] = {
        {1,     0,  0},
        { 1.5f, 0,  0},
        { 4,    0,  1},
        { 4,    -1, 0}
    };
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        bundle b = bundle_new();
        snip_desc d = description();
        int measured = 0, when = 0;
        test_about("by %g, drift %g", (double)cases[i].factor, cases[i].drift);
        d.budget = 0.5;
        d.drift = cases[i].drift;
        d.every = 200;
        snip *s = bundle_session(&b, d, BUNDLE);
        for (int step = 1; step <= 201; step++) CHECK(bundle_step(&b, s, step) == SNIP_OK);
        CHECK(snip_plans(s) == 1);
        for (int l = 0; l < BUNDLE; l++)
            for (int k = 0; k < BUNDLE_ROWS * bundle_layers[l].in; k++) b.x[l][k] *= cases[i].factor;
        for (int step = 202; step <= 300; step++) {
            int plans = snip_plans(s);
            CHECK(bundle_step(&b, s, step) == SNIP_OK);
            if (!when && strstr(snip_reason(s), "drifted")) {
                when = step;
                CHECK(snip_share(s, SNIP_E2M1) >= 0.5);
            }
            measured += snip_plans(s) - plans;
        }
        CHECK(measured == cases[i].noticed);
        CHECK(cases[i].noticed ? when > 205 && when < 240 : when == 0);
    }
}

// ---- plan files ----

enum { FILED = 3 };  // layers

// A session with a plan of all four formats.
static snip *filed_session(const bundle *b) {
    snip_desc d = description();
    d.budget = 0.5;
    snip *s = bundle_session(b, d, FILED);
    CHECK(bundle_step(b, s, 1) == SNIP_OK && bundle_step(b, s, 2) == SNIP_OK);
    snip_set_format(s, 2, SNIP_DGRAD, SNIP_F32);
    snip_set_format(s, 2, SNIP_WGRAD, SNIP_BF16);
    return s;
}

static void a_plan_comes_back_from_its_file(void) {
    bundle b = bundle_new();
    snip_format plan[3 * FILED], got[3 * FILED];
    size_t size, size2;
    snip *s = filed_session(&b), *fresh = bundle_session(&b, description(), FILED);
    formats_of(s, plan);
    CHECK(snip_plan_save(s, test_path("plan")) == SNIP_OK && snip_plan_save(s, test_path("again")) == SNIP_OK);
    CHECK(snip_plan_load(fresh, test_path("plan")) == SNIP_OK);
    formats_of(fresh, got);
    CHECK(!memcmp(got, plan, sizeof plan));
    char *text = test_read(test_path("plan"), &size), *text2 = test_read(test_path("again"), &size2);
    CHECK(size > 50 && size2 == size && !memcmp(text, text2, size));
}

// As editors and version control leave it: a byte-order mark, carriage returns, both.
static void a_plan_file_survives_an_editor(void) {
    bundle b = bundle_new();
    snip_format plan[3 * FILED], got[3 * FILED];
    size_t size;
    snip *s = filed_session(&b);
    formats_of(s, plan);
    CHECK(snip_plan_save(s, test_path("plan")) == SNIP_OK);
    const char *text = test_read(test_path("plan"), &size);
    for (int marks = 0; marks < 4; marks++) {
        snip *fresh = bundle_session(&b, description(), FILED);
        char *edited = (char *)room(2 * size + 3), *to = edited;
        if (marks & 1) {
            memcpy(to, "\xEF\xBB\xBF", 3);
            to += 3;
        }
        for (size_t i = 0; i < size; i++) {
            if ((marks & 2) && text[i] == '\n') *to++ = '\r';
            *to++ = text[i];
        }
        test_write(test_path("edited"), edited, (size_t)(to - edited));
        CHECK(snip_plan_load(fresh, test_path("edited")) == SNIP_OK);
        formats_of(fresh, got);
        CHECK(!memcmp(got, plan, sizeof plan));
        session_close(fresh);
    }
    test_write(test_path("edited"), "snip-plan 2 layers 4\n", 21);
    CHECK(snip_plan_load(s, test_path("edited")) == SNIP_UNSUPPORTED && strstr(snip_message(s), "version"));
}

typedef struct {
    snip *s;
    snip_format plan[3 * FILED], high[3 * FILED];
    long refused, accepted;
} damage;

// Loads a file of these bytes: it gives the plan, or is refused whole.
static void load_damaged(damage *d, const char *text, size_t size) {
    snip_format got[3 * FILED];
    snip_set_format(d->s, -1, SNIP_GEMMS, SNIP_BF16);
    test_write(test_path("damaged"), text, size);
    snip_status status = snip_plan_load(d->s, test_path("damaged"));
    formats_of(d->s, got);
    if (status == SNIP_OK) {
        d->accepted++;
        CHECK(!memcmp(got, d->plan, sizeof got));
    } else {
        d->refused++;
        CHECK(status == SNIP_CORRUPT || status == SNIP_MISMATCH || status == SNIP_UNSUPPORTED);
        CHECK(!memcmp(got, d->high, sizeof got) && *snip_message(d->s));
    }
}

static void damaged_plan_files_are_refused_whole(void) {
    static const char put[] = { 0, ' ', '\n', '9', 'a', 'A', '-', '+', '%', (char)0xFF, '4', '8' };
    bundle b = bundle_new();
    damage d;
    size_t size;
    snip *s = filed_session(&b);
    memset(&d, 0, sizeof d);
    d.s = bundle_session(&b, description(), FILED);
    formats_of(s, d.plan);
    formats_of(d.s, d.high);
    CHECK(snip_plan_save(s, test_path("plan")) == SNIP_OK);
    char *text = test_read(test_path("plan"), &size), *changed = (char *)room(size + 2);
    for (size_t i = 0; i <= size; i++) load_damaged(&d, text, i);  // cut short
    CHECK(d.accepted >= 1 && d.accepted <= 2);
    for (size_t i = 0; i < size; i++) {
        for (int bit = 0; bit < 8; bit++) {
            memcpy(changed, text, size);
            changed[i] = (char)(changed[i] ^ 1 << bit);
            load_damaged(&d, changed, size);
        }
        for (size_t k = 0; k < sizeof put; k++) {
            memcpy(changed, text, size);
            changed[i] = put[k];
            load_damaged(&d, changed, size);
        }
        memcpy(changed, text, i);  // a byte dropped
        memcpy(changed + i, text + i + 1, size - i - 1);
        load_damaged(&d, changed, size - 1);
        memcpy(changed, text, i + 1);  // doubled
        memcpy(changed + i + 1, text + i, size - i);
        load_damaged(&d, changed, size + 1);
    }
    CHECK(d.refused > 15 * (long)size);
    long refused = d.refused;
    memcpy(changed, text, size);
    changed[size] = 'x';
    load_damaged(&d, changed, size + 1);
    CHECK(d.refused == refused + 1);
}

static void plans_of_another_model_are_refused(void) {
    static const struct {
        const char *name;
        int out, in;
    } others[][FILED] = {
        {{ "0.attn.q", 16, 16 },  { "0.attn.k", 32, 16 }, { "1.mlp.up", 16, 47 }},
        { { "0.attn.q", 16, 16 }, { "0.attn.v", 32, 16 }, { "1.mlp.up", 16, 48 }},
    };

    bundle b = bundle_new();
    snip_desc d = description();
    snip *s = filed_session(&b), *more = bundle_session(&b, d, FILED + 1);
    CHECK(snip_plan_save(s, test_path("plan")) == SNIP_OK);
    CHECK(snip_plan_load(more, test_path("plan")) == SNIP_MISMATCH && snip_share(more, SNIP_BF16) == 1);
    for (int i = 0; i < 2; i++) {
        snip *other = session_open(&d);
        for (int l = 0; l < FILED; l++)
            CHECK(snip_add_linear(other, others[i][l].name, others[i][l].out, others[i][l].in, 0) == l);
        CHECK(snip_plan_load(other, test_path("plan")) == SNIP_MISMATCH && snip_share(other, SNIP_BF16) == 1);
        CHECK(*snip_message(other));
    }
}

static void pipes_and_links_are_written_as_they_are(void) {
    bundle b = bundle_new();
    char line[64] = "";
    struct stat info;
    snip *s = filed_session(&b);
    CHECK(snip_plan_save(s, test_path("plan")) == SNIP_OK);
    if (mkfifo(test_path("pipe"), 0600) == 0) {
        int reader = open(test_path("pipe"), O_RDWR | O_NONBLOCK);
        CHECK(snip_plan_save(s, test_path("pipe")) == SNIP_OK);
        CHECK(lstat(test_path("pipe"), &info) == 0 && S_ISFIFO(info.st_mode));
        CHECK(read(reader, line, sizeof line - 1) > 0 && !strncmp(line, "snip-plan ", 10));
        close(reader);
    } else
        test_skip("no pipes here");
    if (symlink(test_path("plan"), test_path("link")) == 0) {
        CHECK(snip_plan_save(s, test_path("link")) == SNIP_OK && snip_plan_load(s, test_path("plan")) == SNIP_OK);
        CHECK(lstat(test_path("link"), &info) == 0 && S_ISLNK(info.st_mode));
    } else
        test_skip("no links here");
}

static void plan_files_that_are_not_there(void) {
    bundle b = bundle_new();
    snip *s = filed_session(&b);
    CHECK(snip_plan_load(s, test_path("missing")) == SNIP_IO && *snip_message(s));
    CHECK(snip_plan_save(s, test_path("missing_folder/plan")) == SNIP_IO);
    CHECK(strstr(snip_message(s), "missing_folder"));
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(plans_are_the_cheapest_that_meet_the_budget);
    RUN(plans_keep_to_the_allowed_formats);
    RUN(a_budget_that_no_plan_meets_leaves_the_old_plan);
    RUN(formats_set_by_hand_count_in_the_shares);
    RUN(the_printed_plan_is_a_table_of_blocks_and_kinds);
    RUN(layers_without_a_place_in_the_table_follow_it);
    RUN(kinds_of_one_name_in_a_block_are_all_printed);
    RUN(plans_by_seconds_are_the_cheapest_that_are_fast_enough);
    RUN(measured_gains_are_seconds_and_change_no_plan);
    RUN(seconds_are_positive_and_kept_in_the_state);
    RUN(a_spike_falls_back_until_the_next_measurement);
    RUN(a_loss_that_is_not_a_number_is_measured_at_once);
    RUN(falling_noisy_losses_are_no_spikes);
    RUN(spikes_are_told_from_any_losses);
    RUN(without_a_budget_equal_harm_stays_precise);
    RUN(a_new_level_of_the_loss_becomes_the_rule);
    RUN(inputs_that_drift_are_measured_anew);
    RUN(a_plan_comes_back_from_its_file);
    RUN(a_plan_file_survives_an_editor);
    RUN(damaged_plan_files_are_refused_whole);
    RUN(plans_of_another_model_are_refused);
    RUN(pipes_and_links_are_written_as_they_are);
    RUN(plan_files_that_are_not_there);
    return test_end();
}
