// Element codecs against tables made from NVIDIA's host conversions (codec_oracle.cpp, which also compares all
// 2^32 inputs): every run of equal codes at both its ends and inside, a dense sample, every code decoded; BF16
// and UE4M3 against their definitions. Public names alone.
#include "test.h"
#ifndef SNIP_IMPLEMENTATION_DONE
#    define SNIP_STATIC  // what is not called is not compiled
#endif
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "codec_tables.h"

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static int is_nan(uint32_t u) { return (u & 0x7FFFFFFFu) > 0x7F800000u; }

typedef struct {
    const char *name;
    const codec_run *runs;
    int n;
    uint8_t (*encode)(float);
} codec;

#define CODEC(name) \
    { #name, runs_##name, (int)(sizeof runs_##name / sizeof runs_##name[0]), snip_##name##_from_f32 }
static const codec codecs[] = {
    CODEC(e4m3),
    CODEC(e5m2),
    CODEC(e2m1),
    CODEC(e2m3),
    CODEC(e3m2),
    CODEC(ue8m0),
    {"e4m3_nosat",   runs_e4m3_nosat,  (int)(sizeof runs_e4m3_nosat / sizeof runs_e4m3_nosat[0]),
             snip_e4m3_from_f32_nosat },
    { "e5m2_nosat",  runs_e5m2_nosat,  (int)(sizeof runs_e5m2_nosat / sizeof runs_e5m2_nosat[0]),
             snip_e5m2_from_f32_nosat },
    { "ue8m0_floor", runs_ue8m0_floor, (int)(sizeof runs_ue8m0_floor / sizeof runs_ue8m0_floor[0]),
             snip_ue8m0_from_f32_floor},
};

// Whether x's bits encode as the run that they lie in says; the run's code is told.
static int encodes(const codec *c, uint32_t bits, int run) { return c->encode(float_of(bits)) == c->runs[run].code; }

static void check_runs(const codec *c) {
    int64_t wrong = 0;
    uint32_t example = 0;
    CHECK_THAT(c->n >= 10 && c->n <= 512 && c->runs[0].first == 0, "the table of %s", c->name);
    for (int i = 0; i < c->n; i++) {
        uint32_t first = c->runs[i].first, last = i + 1 < c->n ? c->runs[i + 1].first - 1 : 0xFFFFFFFFu;
        const uint32_t probes[4] = { first, first + (first < last), last - (first < last), last };
        for (int k = 0; k < 4; k++)
            if (!encodes(c, probes[k], i)) {
                wrong++;
                example = probes[k];
            }
    }
    CHECK_THAT(wrong == 0, "%s at the ends of runs: %lld wrong, one is 0x%08X", c->name, (long long)wrong, example);
}

static void check_sample(const codec *c) {
    const int64_t stride = test.few > 1 ? 210 * test.few + 1
                                        : 211;  // coprime to the powers of two: all low bits come up
    int64_t wrong = 0;
    uint32_t example = 0;
    int run = 0;
    for (int64_t u = 0; u <= 0xFFFFFFFF; u += stride) {
        while (run + 1 < c->n && c->runs[run + 1].first <= (uint64_t)u) run++;
        if (!encodes(c, (uint32_t)u, run)) {
            wrong++;
            example = (uint32_t)u;
        }
    }
    CHECK_THAT(wrong == 0, "%s, sampled: %lld wrong, one is 0x%08X", c->name, (long long)wrong, example);
}

static void encoders_are_those_of_nvidia(void) {
    for (size_t c = 0; c < sizeof codecs / sizeof codecs[0]; c++) {
        check_runs(&codecs[c]);
        check_sample(&codecs[c]);
    }
}

static void check_decoder(const char *name, const uint32_t *values, int n, float (*decode)(uint8_t),
                          uint8_t (*encode)(float)) {
    int wrong = 0, trip = 0;
    for (int c = 0; c < n; c++) {
        uint32_t u = bits_of(decode((uint8_t)c));
        wrong += u != values[c] && !(is_nan(u) && is_nan(values[c]));
        if (!is_nan(u) && (u & 0x7FFFFFFFu) < 0x7F800000u) trip += encode(float_of(u)) != c;
    }
    CHECK_THAT(wrong == 0, "%s decodes", name);
    CHECK_THAT(trip == 0, "%s decoded and encoded gives the code back", name);
}

static void decoders_are_those_of_nvidia(void) {
    check_decoder("e4m3", values_e4m3, 256, snip_e4m3_to_f32, snip_e4m3_from_f32);
    check_decoder("e5m2", values_e5m2, 256, snip_e5m2_to_f32, snip_e5m2_from_f32);
    check_decoder("e2m1", values_e2m1, 16, snip_e2m1_to_f32, snip_e2m1_from_f32);
    check_decoder("e2m3", values_e2m3, 64, snip_e2m3_to_f32, snip_e2m3_from_f32);
    check_decoder("e3m2", values_e3m2, 64, snip_e3m2_to_f32, snip_e3m2_from_f32);
    check_decoder("ue8m0", values_ue8m0, 256, snip_ue8m0_to_f32, snip_ue8m0_from_f32);
}

static void ue4m3_is_e4m3_without_a_sign(void) {
    const uint64_t stride = test.few > 1 ? 3000u * (unsigned)test.few + 1 : 3001;
    int decoded = 0, encoded = 0;
    for (int c = 0; c < 256; c++) {
        uint32_t ours = bits_of(snip_ue4m3_to_f32((uint8_t)c)), theirs = values_e4m3[c & 127];
        decoded += ours != theirs && !(is_nan(ours) && is_nan(theirs));
    }
    for (uint64_t u = 0; u <= 0xFFFFFFFFu; u += stride) {  // negative becomes 0, NaN 0x7F
        uint32_t v = (uint32_t)u;
        uint8_t expected = is_nan(v) ? 0x7F : v >> 31 ? 0 : snip_e4m3_from_f32(float_of(v));
        encoded += snip_ue4m3_from_f32(float_of(v)) != expected;
    }
    CHECK(decoded == 0);
    CHECK(encoded == 0);
}

// BF16 of every pattern of the upper half with the lower halves around the tie, against rounding in integers.
static void bf16_rounds_to_nearest_even_and_keeps_nan(void) {
    static const uint32_t low[] = { 0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF };
    int encoded = 0, decoded = 0;
    for (uint32_t high = 0; high < 65536; high++) {
        decoded += bits_of(snip_bf16_to_f32((uint16_t)high)) != high << 16;
        for (size_t j = 0; j < sizeof low / sizeof low[0]; j++) {
            uint32_t u = high << 16 | low[j], got = snip_bf16_from_f32(float_of(u));
            if (is_nan(u))
                encoded += !is_nan(got << 16) || got >> 15 != u >> 31;
            else
                encoded += got != high + (low[j] > 0x8000 || (low[j] == 0x8000 && (high & 1)));
        }
    }
    CHECK(encoded == 0);
    CHECK(decoded == 0);
}

static void formats_have_names_and_sizes(void) {
    static const struct {
        snip_format format;
        const char *name;
        int bits;
        float largest;
    } formats[] = {
        {SNIP_F32,         "f32",   32, 0    },
        { SNIP_BF16,       "bf16",  16, 0    },
        { SNIP_E4M3,       "fp8",   8,  448  },
        { SNIP_E5M2,       "e5m2",  8,  57344},
        { SNIP_E2M1,       "fp4",   4,  6    },
        { SNIP_E2M3,       "e2m3",  8,  7.5f },
        { SNIP_E3M2,       "e3m2",  8,  28   },
        { SNIP_UE8M0,      "ue8m0", 8,  0    },
        { SNIP_UE4M3,      "ue4m3", 8,  448  },
        { (snip_format)0,  "?",     0,  0    },
        { (snip_format)77, "?",     0,  0    },
    };

    for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++) {
        test_about("%s", formats[i].name);
        CHECK(!strcmp(snip_format_name(formats[i].format), formats[i].name));
        CHECK(snip_format_bits(formats[i].format) == formats[i].bits);
        CHECK(snip_format_max(formats[i].format) == formats[i].largest);
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(encoders_are_those_of_nvidia);
    RUN(decoders_are_those_of_nvidia);
    RUN(ue4m3_is_e4m3_without_a_sign);
    RUN(bf16_rounds_to_nearest_even_and_keeps_nan);
    RUN(formats_have_names_and_sizes);
    return test_end();
}
