// Saved sessions: a run that is interrupted goes on bit for bit; damaged, forged and foreign states are refused whole.
// Public names alone.
#include "session.h"

enum { STEPS = 11, CHECKSUM = 8 };  // a state ends with the FNV-1a digest of what is before it, little endian

static snip_desc state_description(void) {
    snip_desc d = description();
    d.every = 3;
    d.budget = 0.5;
    return d;
}

static model state_model(void) { return model_new(21, 30, 20, 36, 12); }

// A session of that model after so many steps.
static snip *state_session(model *n, int steps) {
    snip_desc d = state_description();
    *n = state_model();
    snip *s = model_session(n, &d);
    for (int step = 1; step <= steps; step++) CHECK(model_step(n, s, step) == SNIP_OK);
    return s;
}

static unsigned char *saved(const snip *s, size_t *size) {
    *size = snip_state_size(s);
    unsigned char *state = (unsigned char *)room(*size);
    CHECK(snip_state_save(s, state) == SNIP_OK);
    return state;
}

static int same_state(const snip *s, const unsigned char *state, size_t size) {
    size_t now_size;
    unsigned char *now = saved(s, &now_size);
    return now_size == size && !memcmp(now, state, size);
}

static void seal(unsigned char *state, size_t size) {
    uint64_t hash = test_hash(TEST_HASH_START, state, size - CHECKSUM);
    for (int i = 0; i < CHECKSUM; i++) state[size - CHECKSUM + (size_t)i] = (unsigned char)(hash >> 8 * i);
}

static void restored_sessions_go_on_bit_for_bit(void) {
    model straight, n, again;
    size_t size, size2;
    snip *s = state_session(&straight, STEPS);
    unsigned char *state = saved(s, &size);
    for (int stop = 0; stop < STEPS; stop++) {
        test_about("saved after step %d", stop);
        snip *first = state_session(&n, stop), *second = state_session(&again, 0);
        CHECK(snip_state_load(second, saved(first, &size2), size) == SNIP_OK && size2 == size);
        CHECK(snip_step(second) == stop);
        for (int l = 0; l < 2; l++) snip_bind_adamw(second, l, n.m[l], n.v[l]);
        for (int step = stop + 1; step <= STEPS; step++) CHECK(model_step(&n, second, step) == SNIP_OK);
        for (int l = 0; l < 2; l++) CHECK(same_floats(n.w[l], straight.w[l], weights_of(&n, l)));
        CHECK(n.loss == straight.loss && snip_plans(second) == snip_plans(s));
        CHECK(!strcmp(snip_reason(second), snip_reason(s)) && *snip_reason(s));
        CHECK(same_state(second, state, size));
        session_close(first);
        session_close(second);
    }
}

static void damaged_states_are_refused_whole(void) {
    model n, m;
    size_t size, size2;
    snip *s = state_session(&n, STEPS), *other = state_session(&m, 4);
    unsigned char *state = saved(s, &size), *before = saved(other, &size2), *damaged = (unsigned char *)room(size + 1);
    unsigned char *now = (unsigned char *)room(size);
    long accepted = 0, touched = 0;
    for (size_t i = 0; i < size; i++) {
        accepted += snip_state_load(other, state, i) != SNIP_CORRUPT;  // cut short
        for (int bit = 0; bit < 8; bit++) {
            memcpy(damaged, state, size);
            damaged[i] = (unsigned char)(damaged[i] ^ 1 << bit);
            accepted += snip_state_load(other, damaged, size) != SNIP_CORRUPT;
        }
        snip_state_save(other, now);
        touched += memcmp(now, before, size) != 0;
    }
    memcpy(damaged, state, size);
    accepted += snip_state_load(other, damaged, size + 1) != SNIP_CORRUPT;
    CHECK(accepted == 0 && touched == 0 && *snip_message(other) && same_state(other, before, size));
    CHECK(snip_state_load(other, state, size) == SNIP_OK && same_state(other, state, size));
}

// Any word of a state replaced by values that mean trouble, under a checksum that is right: refused whole, or a session
// that can take a step and be saved.
static void forged_states_are_refused_or_harmless(void) {
    static const uint64_t values[] = { 0,
                                       1,
                                       77,
                                       0x7FF8000000000000u,
                                       0x7FF0000000000000u,
                                       0xFFF0000000000000u,
                                       0x7FFFFFFFFFFFFFFFu,
                                       0x8000000000000000u,
                                       0xFFFFFFFFFFFFFFFFu,
                                       0xFFFFFFFF00000000u,
                                       0x80000000u,
                                       0x7FEFFFFFFFFFFFFFu };
    model n, m;
    size_t size;
    snip *s = state_session(&n, 5);
    unsigned char *state = saved(s, &size), *forged = (unsigned char *)room(size);
    long refused = 0, accepted = 0;
    for (size_t at = 8; at + 8 + CHECKSUM <= size; at += 8)
        for (int i = 0; i < (int)(sizeof values / sizeof values[0]); i++) {
            if ((at / 8 + (size_t)i) % (size_t)test.few) continue;
            test_about("word %d, value %d", (int)at / 8, i);
            memcpy(forged, state, size);
            for (int byte = 0; byte < 8; byte++) forged[at + (size_t)byte] = (unsigned char)(values[i] >> 8 * byte);
            seal(forged, size);
            snip *victim = state_session(&m, 0);
            snip_status status = snip_state_load(victim, forged, size);
            CHECK(status == SNIP_OK || status == SNIP_CORRUPT || status == SNIP_MISMATCH);
            if (status)
                refused++;
            else {
                accepted++;
                for (int l = 0; l < 2; l++)
                    for (int g = 0; g < SNIP_GEMMS; g++) CHECK(*snip_format_name(layer_of(victim, l).format[g]) != '?');
                model_still_step(&m, victim, 6);
                CHECK(snip_state_save(victim, forged) == SNIP_OK);
            }
            session_close(victim);
        }
    CHECK(refused > 50 / test.few && accepted > 50 / test.few);
}

static void states_of_another_version_are_unsupported(void) {
    model n;
    size_t size;
    snip *s = state_session(&n, 2);
    unsigned char *state = saved(s, &size);
    state[6] = '1';  // "SNIPST2"
    seal(state, size);
    CHECK(snip_state_load(s, state, size) == SNIP_UNSUPPORTED && strstr(snip_message(s), "version"));
    CHECK(snip_state_load(s, state, size - 8) == SNIP_CORRUPT);
}

// A state of version 2: no sizes of the records, which end where version 3's additions begin.
static void states_of_version_2_are_read(void) {
    enum { HEAD = 8 + 256, SIZES = 16, SESSION = 152, SESSION_3 = SESSION + 32, LAYER = 464, LAYER_3 = LAYER + 16 };

    model n, m;
    size_t size;
    snip *s = state_session(&n, STEPS), *old = state_session(&m, 0);
    const unsigned char *state = saved(s, &size), *from = state + HEAD + SIZES + SESSION_3;
    const size_t old_size = HEAD + SESSION + 2 * LAYER + CHECKSUM;
    unsigned char *version2 = (unsigned char *)room(old_size), *to = version2 + HEAD;
    CHECK(size == HEAD + SIZES + SESSION_3 + 2 * LAYER_3 + CHECKSUM);
    memcpy(version2, state, HEAD);
    version2[6] = '2';
    memcpy(to, state + HEAD + SIZES, SESSION);
    for (int l = 0; l < 2; l++) memcpy(to + SESSION + l * LAYER, from + l * LAYER_3, LAYER);
    seal(version2, old_size);
    CHECK(snip_state_load(old, version2, old_size) == SNIP_OK && snip_step(old) == STEPS);
    CHECK(snip_plans(old) == snip_plans(s) && !strcmp(snip_reason(old), snip_reason(s)));
    for (int l = 0; l < 2; l++) {
        snip_layer_info a = layer_of(s, l), z = layer_of(old, l);
        CHECK(!memcmp(a.format, z.format, sizeof a.format) && !memcmp(&a.fp4, &z.fp4, sizeof a.fp4));
    }
    for (int l = 0; l < 2; l++) snip_bind_adamw(old, l, n.m[l], n.v[l]);
    for (int step = STEPS + 1; step <= STEPS + 4; step++) CHECK(model_step(&n, old, step) == SNIP_OK);
    CHECK(snip_state_load(old, version2, old_size - 8) == SNIP_CORRUPT);
}

static void states_of_another_model_or_seed_are_refused(void) {
    model n;
    size_t size;
    snip_desc d = state_description(), other_seed = d;
    snip *s = state_session(&n, 3);
    unsigned char *state = saved(s, &size);
    other_seed.seed++;
    snip *other = model_session(&n, &other_seed);
    CHECK(snip_state_load(other, state, size) == SNIP_MISMATCH && snip_step(other) == 0);
    other = session_open(&d);
    CHECK(snip_add_linear(other, "0.mlp.up", 36, 20, 0) == 0);
    CHECK(snip_state_load(other, state, size) == SNIP_MISMATCH && snip_step(other) == 0);
    CHECK(snip_add_linear(other, "0.mlp.dawn", 12, 36, 0) == 1);
    CHECK(snip_state_load(other, state, size) == SNIP_MISMATCH && snip_step(other) == 0);
}

static void a_measuring_step_is_not_saved_in_its_middle(void) {
    model n;
    snip *s = state_session(&n, STEPS);
    unsigned char *state = (unsigned char *)room(snip_state_size(s));
    for (int step = STEPS + 1; snip_current_pass(s) == SNIP_PASS_ORDINARY; step++) model_step(&n, s, step);
    CHECK(snip_state_save(s, state) == SNIP_OK);
    for (int pass = 0; pass < 2; pass++) {
        model_pass(&n, s);
        CHECK(snip_next_pass(s, n.loss) == 1 && snip_state_save(s, state) == SNIP_BAD_ARGUMENT);
        CHECK(snip_state_load(s, state, snip_state_size(s)) == SNIP_BAD_ARGUMENT);
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(restored_sessions_go_on_bit_for_bit);
    RUN(damaged_states_are_refused_whole);
    RUN(forged_states_are_refused_or_harmless);
    RUN(states_of_another_version_are_unsupported);
    RUN(states_of_version_2_are_read);
    RUN(states_of_another_model_or_seed_are_refused);
    RUN(a_measuring_step_is_not_saved_in_its_middle);
    return test_end();
}
