// Compares the codecs with NVIDIA's own host conversions (the CUDA toolkit's cuda_fp8.h, cuda_fp6.h and
// cuda_fp4.h) on every one of the 2^32 float inputs and every code. "--tables" instead prints
// tests/codec_tables.h, which lets test_codec.c check the same where no toolkit is installed.
// Needs a C++17 compiler and -I of the toolkit's include directory; -fopenmp uses all cores.
#include <cuda_fp4.h>
#include <cuda_fp6.h>
#include <cuda_fp8.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cstdio>
#include <cstring>
#define SNIP_IMPLEMENTATION
#include "../snip.h"

template <__nv_fp8_interpretation_t F, __nv_saturation_t S> static uint8_t fp8(float x) {
    return __nv_cvt_float_to_fp8(x, S, F);
}

template <__nv_fp6_interpretation_t F> static uint8_t fp6(float x) {
    return __nv_cvt_float_to_fp6(x, F, cudaRoundNearest);
}

static uint8_t fp4(float x) { return __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest); }

template <cudaRoundMode R> static uint8_t e8m0(float x) { return __nv_cvt_float_to_e8m0(x, __NV_SATFINITE, R); }

static float half_to_float(__half_raw h) { return __half2float(__half(h)); }

static float e4m3_value(uint8_t c) { return half_to_float(__nv_cvt_fp8_to_halfraw(c, __NV_E4M3)); }

static float e5m2_value(uint8_t c) { return half_to_float(__nv_cvt_fp8_to_halfraw(c, __NV_E5M2)); }

static float e2m3_value(uint8_t c) { return half_to_float(__nv_cvt_fp6_to_halfraw(c, __NV_E2M3)); }

static float e3m2_value(uint8_t c) { return half_to_float(__nv_cvt_fp6_to_halfraw(c, __NV_E3M2)); }

static float e2m1_value(uint8_t c) { return half_to_float(__nv_cvt_fp4_to_halfraw(c, __NV_E2M1)); }

static float e8m0_value(uint8_t c) { return __bfloat162float(__nv_bfloat16(__nv_cvt_e8m0_to_bf16raw(c))); }

struct codec {
    const char *name;
    uint8_t (*theirs)(float), (*ours)(float);
};

// clang-format off
static const codec codecs[] = {
    { "e4m3",        fp8<__NV_E4M3, __NV_SATFINITE>, snip_e4m3_from_f32 },
    { "e4m3_nosat",  fp8<__NV_E4M3, __NV_NOSAT>,     snip_e4m3_from_f32_nosat },
    { "e5m2",        fp8<__NV_E5M2, __NV_SATFINITE>, snip_e5m2_from_f32 },
    { "e5m2_nosat",  fp8<__NV_E5M2, __NV_NOSAT>,     snip_e5m2_from_f32_nosat },
    { "e2m1",        fp4,                            snip_e2m1_from_f32 },
    { "e2m3",        fp6<__NV_E2M3>,                 snip_e2m3_from_f32 },
    { "e3m2",        fp6<__NV_E3M2>,                 snip_e3m2_from_f32 },
    { "ue8m0",       e8m0<cudaRoundPosInf>,          snip_ue8m0_from_f32 },
    { "ue8m0_floor", e8m0<cudaRoundZero>,            snip_ue8m0_from_f32_floor },
};
// clang-format on

struct decoder {
    const char *name;
    int codes;
    float (*theirs)(uint8_t), (*ours)(uint8_t);
};

static const decoder decoders[] = {
    {"e4m3",   256, e4m3_value, snip_e4m3_to_f32 },
    { "e5m2",  256, e5m2_value, snip_e5m2_to_f32 },
    { "e2m1",  16,  e2m1_value, snip_e2m1_to_f32 },
    { "e2m3",  64,  e2m3_value, snip_e2m3_to_f32 },
    { "e3m2",  64,  e3m2_value, snip_e3m2_to_f32 },
    { "ue8m0", 256, e8m0_value, snip_ue8m0_to_f32},
};

static uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

static float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

static bool same_value(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

static void print_tables() {
    std::puts("// Runs of equal codes over all float bit patterns in ascending order: { first pattern, code }.\n"
              "// Written by codec_oracle.cpp --tables from NVIDIA's host conversions; do not edit.\n"
              "typedef struct { uint32_t first; uint8_t code; } codec_run;");
    for (const codec &c : codecs) {
        std::printf("static const codec_run runs_%s[] = {", c.name);
        int last = -1, column = 0;
        for (uint64_t u = 0; u <= 0xFFFFFFFFu; u++) {
            int code = c.theirs(float_of((uint32_t)u));
            if (code != last) std::printf("%s{0x%08X,%d},", column++ % 6 ? "" : "\n", (uint32_t)u, code);
            last = code;
        }
        std::puts("\n};");
    }
    for (const decoder &d : decoders) {
        std::printf("static const uint32_t values_%s[%d] = {", d.name, d.codes);
        for (int c = 0; c < d.codes; c++) std::printf("%s0x%08X,", c % 8 ? "" : "\n", bits_of(d.theirs((uint8_t)c)));
        std::puts("\n};");
    }
}

int main(int argc, char **argv) {
    int passed = 0, failed = 0;
    if (argc > 1 && !std::strcmp(argv[1], "--tables")) {
        print_tables();
        return 0;
    }
    for (const codec &c : codecs) {
        int64_t wrong = 0, first = -1;
#pragma omp parallel for schedule(static) reduction(+ : wrong)
        for (int64_t u = 0; u <= 0xFFFFFFFFll; u++) {
            float x = float_of((uint32_t)u);
            if (c.theirs(x) != c.ours(x)) {
                wrong++;
#pragma omp critical
                if (first < 0) first = u;
            }
        }
        std::printf("%s: %lld of 2^32 inputs differ", c.name, (long long)wrong);
        if (wrong) std::printf(", one is 0x%08llX", (unsigned long long)first);
        std::puts("");
        std::fflush(stdout);
        wrong ? failed++ : passed++;
    }
    for (const decoder &d : decoders) {
        int wrong = 0;
        for (int c = 0; c < d.codes; c++) wrong += !same_value(d.theirs((uint8_t)c), d.ours((uint8_t)c));
        std::printf("%s: %d of %d codes decode differently\n", d.name, wrong, d.codes);
        wrong ? failed++ : passed++;
    }
    std::printf("%d passed, %d failed, 0 skipped\n", passed, failed);
    return failed != 0;
}
