// The functions behind the tables of instruction sets against the scalar ones, which are their specification: at every
// short length, from addresses that are not aligned, without a byte written beyond. PRIVATE NAMES: snipi_vector_of,
// snipi_run, snipi_run_begin, snipi_adam_of, snipi_flip_of, snipi_decode, snipi_value and the scalar functions.
#define SNIP_STATIC
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "test.h"

enum {
    MOST = 130,   // elements; runs have at most 128
    BEYOND = 80,  // elements after the last where nothing may be written, or 16 blocks where something may
    ROOM = MOST + BEYOND
};

static const snipi_vector *vector;  // of the instruction set at hand
static snip_isa isa;

// Calls `compare` for each instruction set that this machine has.
static void for_each_isa(void (*compare)(void)) {
    for (int i = SNIP_ISA_SCALAR; i < SNIP_ISA_COUNT; i++) {
        if (!snip_isa_available((snip_isa)i)) continue;
        isa = (snip_isa)i;
        vector = snipi_vector_of(isa);
        compare();
    }
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Any float; where `finite`, no infinity and no NaN.
static float any_float(int finite) {
    uint32_t bits = (uint32_t)random_bits();
    if (finite && (bits & 0x7F800000u) == 0x7F800000u) bits ^= 0x40000000u;
    if (!finite && random_bits() % 8 == 0) bits |= 0x7F800000u;
    if (!finite && random_bits() % 16 == 0) bits = 0x7F800000u | (bits & 0x80000000u);
    return float_of(bits);
}

static float in_units(void) { return (float)((int)(random_bits() % 4001) - 2000) * 0.01f; }  // -20 to 20

static void same_maxima(void) {
    float x[ROOM];
    for (int n = 0; n <= MOST; n++)
        for (int bad = 0; bad < 4; bad++) {
            int64_t nonfinite = 5, expected = 5;
            const float *from = x + n % 3;
            for (int i = 0; i < ROOM; i++) x[i] = bad ? any_float(1) : in_units();
            if (bad > 1 && n)
                x[n % 3 + (int)(random_bits() % (uint64_t)n)] = bad == 2 ? float_of(0xFF800000u)
                                                                         : float_of(0x7FC00001u);
            const uint32_t amax = vector->amax(from, n, &nonfinite);
            test_about("%s, %d elements", snip_isa_name(isa), n);
            CHECK(amax == snipi_amax_scalar(from, n, &expected) && nonfinite == expected);
        }
}

static void maxima_agree(void) { for_each_isa(same_maxima); }

static void same_random_words(void) {
    static const uint64_t firsts[] = { 0, 5, 0xFFFFFFA0u, 0xFFFFFFFFFFu, 0x1FFFFFFFEu, 0x1234567800000009u };
    const snip_rng_key key = { 0x299F31D0A4093822u, 0x13198A2Eu, 0x03707344u };
    for (int f = 0; f < 6; f++)
        for (int blocks = 0; blocks <= 70; blocks++) {
            uint32_t out[4 * 80 + 4], expected[4 * 70];
            memset(out, 0xA5, sizeof out);
            vector->philox(key, firsts[f], blocks, out);
            snipi_philox_scalar(key, firsts[f], blocks, expected);
            test_about("%s, %d blocks from %llx", snip_isa_name(isa), blocks, (unsigned long long)firsts[f]);
            CHECK(!memcmp(out, expected, (size_t)blocks * 16));
            CHECK(out[(blocks + 15) / 16 * 64] == 0xA5A5A5A5u);
        }
}

static void random_words_agree(void) { for_each_isa(same_random_words); }

static void same_transposes(void) {
    enum { MOST_ROWS = 19, LD = 23, LD_OUT = 21 };

    float x[MOST_ROWS * LD + 1], out[LD * LD_OUT], expected[LD * LD_OUT];
    for (int i = 0; i < MOST_ROWS * LD + 1; i++) x[i] = any_float(0);
    for (int rows = 0; rows <= MOST_ROWS; rows++)
        for (int cols = 0; cols <= LD; cols++) {
            memset(out, 0xA5, sizeof out);
            memset(expected, 0xA5, sizeof expected);
            vector->transpose(x + 1, LD, rows, cols, out, LD_OUT);
            snipi_transpose_scalar(x + 1, LD, rows, cols, expected, LD_OUT);
            test_about("%s, %d x %d", snip_isa_name(isa), rows, cols);
            CHECK(!memcmp(out, expected, sizeof out));
        }
}

static void transposes_agree(void) { for_each_isa(same_transposes); }

static void same_bfloat16(void) {
    float x[ROOM], wide[ROOM], expected_wide[ROOM];
    uint16_t narrow[ROOM], expected[ROOM];
    for (int n = 0; n <= MOST; n++) {
        for (int i = 0; i < ROOM; i++) {
            x[i] = any_float(0);
            if (i % 3 == 0) x[i] = float_of((snipi_bits(x[i]) & 0xFFFF0000u) | 0x8000u);  // ties
        }
        memset(narrow, 0xA5, sizeof narrow);
        memset(expected, 0xA5, sizeof expected);
        memset(wide, 0xA5, sizeof wide);
        memset(expected_wide, 0xA5, sizeof wide);
        vector->narrow(x + 1, n, narrow + 1);
        snipi_narrow_scalar(x + 1, n, expected + 1);
        vector->widen(expected + 1, n, wide + 1);
        snipi_widen_scalar(expected + 1, n, expected_wide + 1);
        test_about("%s, %d elements", snip_isa_name(isa), n);
        CHECK(!memcmp(narrow, expected, sizeof narrow));
        CHECK(!memcmp(wide, expected_wide, sizeof wide));
    }
}

static void bfloat16_agrees(void) { for_each_isa(same_bfloat16); }

// ---- runs ----

static float x[ROOM], weight[ROOM];
static uint32_t random_words[ROOM];

static void fill_run(void) {
    for (int i = 0; i < ROOM; i++) {
        x[i] = in_units();
        weight[i] = in_units();
        random_words[i] = (uint32_t)random_bits();
    }
}

// What a run writes: codes, values and sums.
typedef struct {
    uint8_t codes[ROOM];
    float values[ROOM];
    snipi_tally tally;
} outcome;

// With `run.stream` from addresses that streaming stores take, else from others.
static void run_with(void (*function)(const snipi_run *), snipi_run run, int with_codes, int with_values, outcome *to) {
    float *values = to->values + (run.stream ? (64 - (uintptr_t)to->values % 64) % 64 / sizeof(float) : 3);
    uint8_t *codes = to->codes + (run.stream ? (16 - (uintptr_t)to->codes % 16) % 16 : 1);
    memset(to, 0, sizeof *to);
    memset(to->codes, 0xA5, sizeof to->codes);
    memset(to->values, 0xA5, sizeof to->values);
    to->tally.sum_sq[3] = 1.5;
    to->tally.err_sq[6] = 1e-7;
    to->tally.dot[4] = -3.25;
    run.tally = &to->tally;
    run.codes = with_codes ? codes : NULL;
    run.values = with_values ? values : NULL;
    function(&run);
    snipi_stream_end();
}

static void same_runs_of(snip_format format, int stochastic) {
    static outcome got, expected;
    float lut[256];
    for (int n = 1; n <= 128; n++)
        for (int kind = 0; kind < 12; kind++) {
            if ((n + kind) % test.few) continue;
            snipi_run run;
            memset(&run, 0, sizeof run);
            snipi_run_begin(&run, format, stochastic);
            for (uint32_t code = 0; code < 1u << run.e.sign; code++) {
                lut[code] = snipi_decode(code, format);
                lut[code | 1u << run.e.sign] = -lut[code];
            }
            fill_run();
            x[1 + n / 2] = float_of((uint32_t)run.k.beyond);  // the last that rounds to the largest, and the next
            x[1 + n / 3] = float_of((uint32_t)run.k.beyond + 1u);
            run.lut = lut;
            run.x = x + 1;
            run.weight = kind % 3 == 2 ? weight + 1 : NULL;
            run.random = stochastic ? random_words + 1 : NULL;
            run.n = n;
            run.scale = kind % 3 == 0 ? 1.0f : kind % 2 ? 0.37f : 20.0f / run.e.max;
            run.inverse = 1.0f / run.scale;
            run.packed = format == SNIP_E2M1;
            run.stream = kind / 6;
            run.want_sums = kind % 3 > 0;
            run_with(snipi_run_scalar, run, kind % 4 != 3, kind % 4 > 0, &expected);
            run_with(vector->run, run, kind % 4 != 3, kind % 4 > 0, &got);
            test_about("%s, %s, stochastic %d, %d elements, kind %d", snip_isa_name(isa), snip_format_name(format),
                       stochastic, n, kind);
            CHECK(!memcmp(got.codes, expected.codes, sizeof got.codes));
            CHECK(!memcmp(got.values, expected.values, sizeof got.values));
            CHECK(!memcmp(&got.tally, &expected.tally, sizeof got.tally));
        }
}

static void same_runs(void) {
    for (int format = SNIP_E4M3; format <= SNIP_E3M2; format++)
        for (int stochastic = 0; stochastic < 2; stochastic++) same_runs_of((snip_format)format, stochastic);
}

static void runs_agree(void) { for_each_isa(same_runs); }

// ---- values of codes, sums, slopes, signs ----

static void same_values(void) {
    static const float scales[] = { 0.37f, 1e-35f, 3e37f, 0.0f };
    uint8_t codes[ROOM];
    float lut[256], out[ROOM], expected[ROOM];
    for (int f = SNIP_E4M3; f <= SNIP_E3M2; f++)
        for (int n = 0; n <= MOST; n++) {
            const snip_format format = (snip_format)f;
            const float scale = scales[(n + f) % 4];
            const int past_largest = n % 5 == 0;  // NaN and infinities among them
            for (int code = 0; code < 256; code++) lut[code] = snipi_decode((uint32_t)code, format);
            for (int i = 0; i < ROOM; i++) {
                codes[i] = (uint8_t)random_bits();
                if (!past_largest && format != SNIP_E2M1) codes[i] &= 0xBB;
            }
            memset(out, 0xA5, sizeof out);
            memset(expected, 0xA5, sizeof expected);
            vector->decode(format, lut, codes + 1, n, scale, out + 1, n % 2);
            snipi_stream_end();
            snipi_decode_scalar(format, lut, codes + 1, n, scale, expected + 1, 0);
            test_about("%s, %s, %d elements", snip_isa_name(isa), snip_format_name(format), n);
            int same = 1;
            for (int i = 0; i < ROOM; i++) {  // a NaN's bits are the machine's
                const int both_nan = (snipi_bits(out[i]) & 0x7FFFFFFFu) > 0x7F800000u &&
                                     (snipi_bits(expected[i]) & 0x7FFFFFFFu) > 0x7F800000u;
                same = same && (both_nan || snipi_bits(out[i]) == snipi_bits(expected[i]));
            }
            CHECK(same);
        }
}

static void values_agree(void) { for_each_isa(same_values); }

static void same_sums(void) {
    float from[ROOM], to[ROOM], by[ROOM];
    for (int n = 0; n <= MOST; n++)
        for (int weighted = 0; weighted < 2; weighted++) {
            snipi_tally got, expected;
            for (int i = 0; i < ROOM; i++) {
                from[i] = in_units() * float_of((uint32_t)(random_bits() % 200 + 1) << 23);
                to[i] = from[i] * 1.003f;
                by[i] = in_units();
            }
            memset(&got, 0, sizeof got);
            got.sum_sq[3] = 1.5;
            got.err_sq[7] = 1e-7;
            got.dot[4] = -3.25;
            expected = got;
            vector->sums(from + 1, to + 1, weighted ? by + 1 : NULL, n, &got);
            snipi_sums_exact(from + 1, to + 1, weighted ? by + 1 : NULL, n, &expected);
            test_about("%s, %d elements", snip_isa_name(isa), n);
            CHECK(!memcmp(&got, &expected, sizeof got));
        }
}

static void sums_agree(void) { for_each_isa(same_sums); }

static void same_slopes(void) {
    float m[ROOM], v[ROOM], out[ROOM], expected[ROOM];
    for (int n = 0; n <= MOST; n++)
        for (int with_m = 0; with_m < 2; with_m++) {
            for (int i = 0; i < ROOM; i++) {
                m[i] = in_units();
                v[i] = in_units() * in_units();
                if (random_bits() % 7 == 0) v[i] = 0;
            }
            memset(out, 0xA5, sizeof out);
            memset(expected, 0xA5, sizeof expected);
            snipi_adam_of(isa)(with_m ? m + 1 : NULL, v + 1, 0.3f, 1.7f, n % 2 ? 1e-3f : 0.0f, n, out + 1);
            snipi_adam_scalar(with_m ? m + 1 : NULL, v + 1, 0.3f, 1.7f, n % 2 ? 1e-3f : 0.0f, n, expected + 1);
            test_about("%s, %d elements, m %d", snip_isa_name(isa), n, with_m);
            int close = 1;  // division and root may be a bit off under -Ofast
            for (int i = 0; i < n; i++)
                close = close && fabsf(out[i + 1] - expected[i + 1]) <= 1e-6f * fabsf(expected[i + 1]);
            CHECK(close);
            CHECK(!memcmp(out + n + 1, expected + n + 1, (size_t)(ROOM - n - 1) * sizeof(float)));
        }
}

static void slopes_agree(void) { for_each_isa(same_slopes); }

static void same_signs(void) {
    for (int trial = 0; trial < 20; trial++) {
        float got[SNIPI_SIGNS], expected[SNIPI_SIGNS];
        uint32_t signs[4];
        for (int w = 0; w < 4; w++) signs[w] = (uint32_t)random_bits();
        for (int i = 0; i < SNIPI_SIGNS; i++) got[i] = expected[i] = any_float(0);
        snipi_flip_of(isa)(signs, got);
        snipi_flip_scalar(signs, expected);
        test_about("%s", snip_isa_name(isa));
        CHECK(!memcmp(got, expected, sizeof got));
    }
}

static void signs_agree(void) { for_each_isa(same_signs); }

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(maxima_agree);
    RUN(random_words_agree);
    RUN(transposes_agree);
    RUN(bfloat16_agrees);
    RUN(runs_agree);
    RUN(values_agree);
    RUN(sums_agree);
    RUN(slopes_agree);
    RUN(signs_agree);
    return test_end();
}
