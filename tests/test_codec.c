// Element codecs against tables made from NVIDIA's host conversions (codec_oracle.cpp, which also compares all
// 2^32 inputs): every run of equal codes at both its ends and inside, a dense sample, every code decoded; BF16
// and UE4M3 against their definitions. SNIP_TEST_FEW=n in the environment: a sample n times as sparse, for emulators.
#define SNIP_STATIC  // what is not called is not compiled
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "codec_tables.h"

static int passed, failed, few = 1;

static void check(int ok, const char *what) {
    ok ? passed++ : failed++;
    if (!ok) printf("FAILED: %s\n", what);
}

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

static void test_encoders(void) {
    size_t c;
    char text[128];
    for (c = 0; c < sizeof codecs / sizeof codecs[0]; c++) {
        const codec *k = &codecs[c];
        int64_t wrong = 0, u;
        uint32_t example = 0;
        int i, run = 0;
        check(k->n >= 10 && k->n <= 512 && k->runs[0].first == 0, "a table is whole");
        for (i = 0; i < k->n; i++) {
            uint32_t first = k->runs[i].first, last = i + 1 < k->n ? k->runs[i + 1].first - 1 : 0xFFFFFFFFu;
            uint32_t probe[4];
            int j;
            probe[0] = first;
            probe[1] = first + (first < last);
            probe[2] = last - (first < last);
            probe[3] = last;
            for (j = 0; j < 4; j++)
                if (k->encode(float_of(probe[j])) != k->runs[i].code) {
                    wrong++;
                    example = probe[j];
                }
        }
        for (u = 0; u <= 0xFFFFFFFF;
             u += few > 1 ? 210 * few + 1 : 211) {  // coprime to the powers of two: all low bits come up
            while (run + 1 < k->n && k->runs[run + 1].first <= (uint64_t)u) run++;
            if (k->encode(float_of((uint32_t)u)) != k->runs[run].code) {
                wrong++;
                example = (uint32_t)u;
            }
        }
        snprintf(text, sizeof text, "%s encodes as NVIDIA's (%lld wrong, one is 0x%08X)", k->name, (long long)wrong,
                 example);
        check(wrong == 0, text);
    }
}

static void test_decoder(const char *name, const uint32_t *values, int n, float (*decode)(uint8_t),
                         uint8_t (*encode)(float)) {
    char text[96];
    int c, wrong = 0, trip = 0;
    for (c = 0; c < n; c++) {
        uint32_t u = bits_of(decode((uint8_t)c));
        wrong += u != values[c] && !(is_nan(u) && is_nan(values[c]));
        if (!is_nan(u) && (u & 0x7FFFFFFFu) < 0x7F800000u) trip += encode(float_of(u)) != c;
    }
    snprintf(text, sizeof text, "%s decodes as NVIDIA's", name);
    check(wrong == 0, text);
    snprintf(text, sizeof text, "%s decode and encode give the code back", name);
    check(trip == 0, text);
}

static void test_ue4m3(void) {
    uint64_t u;
    int c, wrong = 0;
    for (c = 0; c < 256; c++) {
        uint32_t ours = bits_of(snip_ue4m3_to_f32((uint8_t)c)), theirs = values_e4m3[c & 127];
        wrong += ours != theirs && !(is_nan(ours) && is_nan(theirs));
    }
    check(wrong == 0, "UE4M3 decodes as E4M3 without a sign");
    for (wrong = 0, u = 0; u <= 0xFFFFFFFFu; u += few > 1 ? 3000u * (unsigned)few + 1 : 3001) {
        uint32_t v = (uint32_t)u;
        uint8_t expected = is_nan(v) ? 0x7F : v >> 31 ? 0 : snip_e4m3_from_f32(float_of(v));
        wrong += snip_ue4m3_from_f32(float_of(v)) != expected;
    }
    check(wrong == 0, "UE4M3 encodes as E4M3, negative as 0, NaN as 0x7F");
}

// BF16 of every pattern of the upper half with the lower halves around the tie, against rounding in doubles.
static void test_bf16(void) {
    static const uint32_t low[] = { 0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF };
    uint32_t high;
    size_t j;
    int wrong = 0, decode = 0;
    for (high = 0; high < 65536; high++) {
        decode += bits_of(snip_bf16_to_f32((uint16_t)high)) != high << 16;
        for (j = 0; j < sizeof low / sizeof low[0]; j++) {
            uint32_t u = high << 16 | low[j], got = snip_bf16_from_f32(float_of(u));
            if (is_nan(u)) {
                wrong += !is_nan(got << 16) || got >> 15 != u >> 31;
                continue;
            }
            wrong += got != high + (low[j] > 0x8000 || (low[j] == 0x8000 && (high & 1)));
        }
    }
    check(wrong == 0, "BF16 rounds to nearest even, keeps infinity and NaN");
    check(decode == 0, "BF16 decodes");
}

int main(void) {
    if (getenv("SNIP_TEST_FEW") && atoi(getenv("SNIP_TEST_FEW")) > 1) few = atoi(getenv("SNIP_TEST_FEW"));
    test_encoders();
    test_decoder("e4m3", values_e4m3, 256, snip_e4m3_to_f32, snip_e4m3_from_f32);
    test_decoder("e5m2", values_e5m2, 256, snip_e5m2_to_f32, snip_e5m2_from_f32);
    test_decoder("e2m1", values_e2m1, 16, snip_e2m1_to_f32, snip_e2m1_from_f32);
    test_decoder("e2m3", values_e2m3, 64, snip_e2m3_to_f32, snip_e2m3_from_f32);
    test_decoder("e3m2", values_e3m2, 64, snip_e3m2_to_f32, snip_e3m2_from_f32);
    test_decoder("ue8m0", values_ue8m0, 256, snip_ue8m0_to_f32, snip_ue8m0_from_f32);
    test_ue4m3();
    test_bf16();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
