#!/usr/bin/env bash
# test_headers.sh - the headers under every language and compiler they promise: alone, twice, in any order, as several
# translation units, beside names a trainer is likely to have; and that nothing without their prefix leaks.
# Ends with "N passed, N failed, N skipped"; exit status 1 on a failure.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED: $1"; [ -s "$dir/log" ] && head -n "${2:-6}" "$dir/log"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $1"; }
try() {                             # name, command...
    local name=$1
    shift
    if "$@" > "$dir/log" 2>&1; then ok; else bad "$name"; fi
}
refuse() {                          # name, command that must fail...
    local name=$1
    shift
    if "$@" > "$dir/log" 2>&1; then bad "$name was accepted"; else ok; fi
}
lang() { case $1 in c++*) echo c++ ;; *) echo c ;; esac; }

# ---- sources
cd "$dir" || exit 2
cat > alone_snip.h <<'S'
#include "snip.h"
S
cat > alone_ilp.h <<'S'
#include "snip_ilp.h"
S
cat > twice.h <<'S'
#include "snip.h"
#include "snip.h"
#include "snip_ilp.h"
#include "snip_ilp.h"
S
cat > order.h <<'S'
#include "snip_ilp.h"
#include "snip.h"
#include "snip_ilp.h"
S
for base in alone_snip alone_ilp twice order; do
    cp $base.h api_$base.c
    echo 'typedef int snip_test_not_empty;' >> api_$base.c
    { echo '#define SNIP_IMPLEMENTATION'; cat $base.h; echo 'typedef int snip_test_not_empty;'; } > impl_$base.c
    { echo '#define SNIP_NO_SIMD'; cat impl_$base.c; } > nosimd_$base.c
done
{ cat twice.h; echo '#define SNIP_IMPLEMENTATION'; cat twice.h; cat twice.h; } > impl_later.c           # interface first, implementation last
{ echo '#define SNIP_ILP_IMPLEMENTATION'; cat alone_ilp.h; } > impl_ilp_only.c
{ echo '#define SNIP_ILP_IMPLEMENTATION'; cat alone_ilp.h; echo '#define SNIP_IMPLEMENTATION'; cat alone_snip.h; } > impl_both.c
cat > use.h <<'S'
#include <string.h>
static int use(void) {
    snip_desc d;
    snip_recipe r = SNIP_RECIPE_FP4_TILE;
    snip_rng_key key;
    snip_quant_stats stats;
    snip_operand o;
    snip_layer_info info;
    snip_adamw adamw;
    float x[4] = { 1, 2, 3, 4 }, y[4];
    unsigned char codes[64], scales[64];
    unsigned words[4];
    double dot = 0;
    snip *s;
    int bad = 0;
    memset(&d, 0, sizeof d);
    memset(&key, 0, sizeof key);
    memset(&o, 0, sizeof o);
    memset(&adamw, 0, sizeof adamw);
    bad |= snip_desc_check(&d) != SNIP_OK;
    s = snip_create(&d);
    bad |= snip_add_linear(s, "l", 2, 2, 0) != 0;
    bad |= snip_bind_adamw(s, 0, x, x) || snip_allow(s, 0, SNIP_GEMMS, 1, 1) || snip_set_format(s, 0, SNIP_FWD, SNIP_F32) || snip_set_mode(s, SNIP_TRAIN);
    bad |= snip_linear_forward(s, 0, y, x, x, NULL, 2) || snip_linear_backward(s, 0, y, y, NULL, x, x, x, 2);
    adamw.step = 1;
    bad |= snip_next_pass(s, 1.0) || snip_end_step(s, &adamw) || snip_current_pass(s) != SNIP_PASS_ORDINARY || snip_step(s) != 1 || snip_plans(s);
    bad |= snip_solve_seconds(s) > 0 || snip_layers(s) != 1 || snip_layer(s, 0, &info) || snip_share(s, SNIP_F32) > 0.5 || snip_message(s)[0] || snip_reason(s)[0];
    bad |= !snip_plan_save(s, "no/such/folder/plan") || !snip_plan_load(s, "no/such/folder/plan") || snip_state_size(s) == 0 || !snip_state_save(s, NULL) || !snip_state_load(s, codes, 1);
    if (bad) snip_plan_print(s, stderr);
    snip_destroy(s);
    bad |= snip_codes_bound(&r, 2, 2) > sizeof codes || snip_scales_bound(&r, 2, 2) > sizeof scales;
    bad |= snip_quantize(&r, x, 2, 2, 2, codes, scales, key, NULL, &stats) || snip_quantize_transposed(&r, x, 2, 2, 2, codes, scales, key, NULL, NULL);
    bad |= snip_dequantize(&r, codes, scales, 2, 2, y, 2) || snip_fake_quantize(&r, x, 2, 2, 2, y, 2, key, NULL, NULL);
    snip_philox(key, 1, words);
    bad |= snip_noise_add(y, x, 4, 1.0f, NULL, key) || snip_noise_dot(x, 4, key, &dot);
    bad |= snip_gemm_scratch(1, 1, 1) == 0 || !snip_gemm(1, 1, 1, &o, &o, y, 1, 0, NULL, NULL, SNIP_ISA_BEST) || !snip_isa_available(SNIP_ISA_SCALAR) || !snip_isa_name(SNIP_ISA_BEST);
    bad |= !snip_status_text(SNIP_OK) || !snip_format_name(SNIP_F32) || snip_format_bits(SNIP_E2M1) != 4 || snip_format_max(SNIP_E2M1) < 5;
    bad |= snip_e4m3_to_f32(snip_e4m3_from_f32(1)) < 1 || snip_e5m2_to_f32(snip_e5m2_from_f32(1)) < 1 || snip_e2m1_to_f32(snip_e2m1_from_f32(1)) < 1;
    bad |= snip_e2m3_to_f32(snip_e2m3_from_f32(1)) < 1 || snip_e3m2_to_f32(snip_e3m2_from_f32(1)) < 1 || snip_ue8m0_to_f32(snip_ue8m0_from_f32(1)) < 1;
    bad |= snip_ue4m3_to_f32(snip_ue4m3_from_f32(1)) < 1 || snip_bf16_to_f32(snip_bf16_from_f32(1)) < 1;
    {
        snip_ilp_option q[2] = { { 0.0, 0.0 }, { 0.3, 1.0 } };
        snip_ilp_group group;
        snip_ilp_problem problem;
        int choice[1] = { 7 };
        group.options = q; group.n_options = 2; group.stage = 0;
        memset(&problem, 0, sizeof problem);
        problem.n_groups = 1; problem.groups = &group; problem.total_target = 1;
        bad |= snip_ilp_solve(&problem, NULL, choice, NULL) != SNIP_ILP_OPTIMAL || choice[0] != 1;
    }
    return bad;
}
S
cat > main_unit.c <<'S'
#include "snip_ilp.h"
#include "snip.h"
#include "use.h"
int other(void);
int main(void) { return use() | other(); }
S
cat > impl_unit.c <<'S'
#define SNIP_IMPLEMENTATION
#include "snip.h"
int other(void);
int other(void) { return snip_format_bits(SNIP_BF16) != 16; }
S
cat > static_unit.c <<'S'
#define SNIP_STATIC
#define SNIP_IMPLEMENTATION
#include "snip.h"
#include "snip_ilp.h"
#include "use.h"
#ifdef SECOND
int other(void);
int other(void) { return use(); }
#else
int other(void);
int main(void) { return use() | other(); }
#endif
S
cat > static_quiet.c <<'S'
#define SNIP_STATIC
#define SNIP_IMPLEMENTATION
#include "snip.h"
int main(void) { return snip_format_bits(SNIP_BF16) != 16; }
S
# Names of a hand-written trainer, as functions, macros, types and members.
cat > names.h <<'S'
#define B 4
#define T 64
#define C 768
#define V 50257
#define L 12
#define NH 12
#define OC 3
#define X 1
#define Y 2
#define N 3
#define K 4
#define M 5
#define E 6
#define A 7
#define I 8
#define S 9
#define BLOCKS 32
#define MOST 10
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define NUM_PARAMETER_TENSORS 16
#define GELU_SCALING_FACTOR 0.7978f
#define cudaCheck(e) (e)
#define WARP_SIZE 32
#define EPS 1e-5f
#define SCALE 1
#define ROUND 1
#define check(x) (x)
S
cat > names_body.h <<'S'
typedef struct { float *wte, *wpe; int channels; } ParameterTensors;
typedef struct { void (*free)(void *); void *(*malloc)(unsigned long); int (*round)(int); int step, loss; } GPT2;
typedef float floatX;
typedef int linear;
typedef struct { int a; } operand, layer, job, state;
static float gelu_forward(float x) { return x; }
static float matmul_forward(float x) { return x; }
static float quantize(float x) { return x; }
static float dequantize(float x) { return x; }
static float gemm(float x) { return x; }
static float min(float a, float b) { return a < b ? a : b; }
static float max(float a, float b) { return a > b ? a : b; }
static int solve(void) { return 0; }
static int encode(void) { return 0; }
static int decode(void) { return 0; }
static int divide(void) { return 0; }
static float random_f32(void) { return 0; }
static unsigned philox(void) { return 0; }
static int names_use(void) {
    GPT2 g = { 0, 0, 0, 0, 0 };
    ParameterTensors p = { 0, 0, 0 };
    layer l = { 0 };
    floatX sum = gelu_forward(0) + matmul_forward(0) + quantize(0) + dequantize(0) + gemm(0) + min(0, 0) + max(0, 0) + random_f32();
    return (int)sum + solve() + encode() + decode() + divide() + (int)philox() + g.step + p.channels + l.a;
}
S
{ cat names.h; echo '#include "snip.h"'; cat names_body.h; echo 'int main(void) { return names_use(); }'; } > names_api.c            # macros before the interface
{ echo '#define SNIP_IMPLEMENTATION'; echo '#include "snip.h"'; cat names.h names_body.h; echo 'int main(void) { return names_use(); }'; } > names_impl.c    # code after the implementation

# ---- every compiler and language
for cc in gcc clang; do
    cxx=${cc/gcc/g++}; cxx=${cxx/clang/clang++}
    for std in c99 c11 c++11 c++17; do
        compiler=$cc
        [ "$(lang $std)" = c++ ] && compiler=$cxx
        if ! command -v $compiler > /dev/null 2>&1; then skip "$compiler -std=$std: not installed"; continue; fi
        flags="-x $(lang $std) -std=$std $warn -I$here -I$dir"
        for base in alone_snip alone_ilp twice order; do try "$compiler $std interface $base" $compiler $flags -fsyntax-only api_$base.c; done
        try "$compiler $std implementation" $compiler $flags -O1 -fsyntax-only impl_alone_snip.c
        try "$compiler $std solver alone" $compiler $flags -fsyntax-only impl_ilp_only.c
        try "$compiler $std beside a trainer's macros" $compiler $flags -Wno-unused-macros -fsyntax-only names_api.c
        try "$compiler $std beside a trainer's functions" $compiler $flags -Wno-unused-macros -fsyntax-only names_impl.c
        case $std in c11|c++11) continue ;; esac        # parsing the implementation is what takes the time
        for base in alone_ilp twice order; do try "$compiler $std implementation $base" $compiler $flags -fsyntax-only impl_$base.c; done
        try "$compiler $std scalar implementation" $compiler $flags -fsyntax-only nosimd_alone_snip.c
        try "$compiler $std implementation after the interface" $compiler $flags -fsyntax-only impl_later.c
        try "$compiler $std solver's implementation, then all" $compiler $flags -fsyntax-only impl_both.c
        try "$compiler $std with OpenMP" $compiler $flags -fopenmp -fsyntax-only impl_alone_snip.c
        try "$compiler $std SNIP_STATIC, little of it used" $compiler $flags -fsyntax-only static_quiet.c
    done
done
# the checks above can fail at all
echo 'static int x(void) { return 1.5; }' > canary.c
for cc in gcc clang; do command -v $cc > /dev/null 2>&1 && refuse "$cc: a conversion" $cc -x c -std=c99 $warn -fsyntax-only canary.c; done

# ---- linked programs: warnings that need code generation, and that it runs
for cc in gcc clang; do
    command -v $cc > /dev/null 2>&1 || continue
    cxx=${cc/gcc/g++}; cxx=${cxx/clang/clang++}
    try "$cc: implementation compiles" $cc -std=c99 $warn -O1 -I"$here" -c impl_unit.c -o impl_$cc.o
    try "$cc: user compiles" $cc -std=c99 $warn -O1 -I"$here" -c main_unit.c -o main_$cc.o
    try "$cc: two units link" $cc main_$cc.o impl_$cc.o -lm -o two_$cc
    try "$cc: two units run" ./two_$cc
    try "$cc: static compiles" $cc -std=c99 $warn -Wno-unused-function -I"$here" -c static_unit.c -o static1_$cc.o
    try "$cc: static compiles again" $cc -std=c99 $warn -Wno-unused-function -DSECOND -I"$here" -c static_unit.c -o static2_$cc.o
    try "$cc: two static units link" $cc static1_$cc.o static2_$cc.o -lm -o static_$cc
    try "$cc: two static units run" ./static_$cc
    if command -v $cxx > /dev/null 2>&1; then           # the implementation in C, the user in C++
        try "$cxx: user compiles" $cxx -x c++ -std=c++17 $warn -O1 -I"$here" -c main_unit.c -o mainxx_$cc.o
        sed 's/^int other(void);/extern "C" int other(void);/' main_unit.c > mainxx.c
        try "$cxx: user compiles" $cxx -x c++ -std=c++17 $warn -O1 -I"$here" -c mainxx.c -o mainxx_$cc.o
        try "$cxx: links with C" $cxx mainxx_$cc.o impl_$cc.o -lm -o mixed_$cc
        try "$cxx: runs with C" ./mixed_$cc
    fi
done

# ---- what leaks
for cc in gcc clang; do
    [ -f impl_$cc.o ] || continue
    nm -g --defined-only impl_$cc.o | awk '{print $3}' | grep -v '^other$' > symbols
    grep -vE '^_?snip_' symbols > log
    if [ -s symbols ] && [ ! -s log ] && grep -q 'snip_create' symbols; then ok; else bad "$cc: external symbols without the prefix" 20; fi
    if [ -f static1_$cc.o ]; then
        nm -g --defined-only static1_$cc.o | awk '{print $3}' | grep -v '^main$' > log
        if [ ! -s log ]; then ok; else bad "$cc: external symbols under SNIP_STATIC" 20; fi
    fi
    $cc -std=c99 -I"$here" -fopenmp -c impl_alone_snip.c -o omp_$cc.o > log 2>&1 && nm -g --defined-only omp_$cc.o | awk '{print $3}' | grep -vE '^_?snip_' > log
    if [ -f omp_$cc.o ] && [ ! -s log ]; then ok; else bad "$cc: external symbols with OpenMP" 20; fi
    # macros: those of the header less those of the system headers it includes
    printf '#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n' > system_api.c
    { cat system_api.c; printf '#include <errno.h>\n#include <sys/stat.h>\n#include <math.h>\n#include <stdlib.h>\n#include <string.h>\n#include <time.h>\n#include <float.h>\n#include <limits.h>\n#include <assert.h>\n#if defined(__x86_64__)\n#include <immintrin.h>\n#endif\n'; } > system_impl.c
    for part in api impl; do
        $cc -std=c99 -I"$here" -dM -E ${part}_twice.c 2> /dev/null | awk '{sub(/\(.*/, "", $2); print $2}' | sort -u > ours
        $cc -std=c99 -dM -E system_$part.c 2> /dev/null | awk '{sub(/\(.*/, "", $2); print $2}' | sort -u > theirs
        comm -23 ours theirs | grep -vE '^(SNIP|snip)' > log
        if grep -q '^SNIP_H$' ours && [ ! -s log ]; then ok; else bad "$cc: macros without the prefix ($part)" 20; fi
    done
    # names at file scope, static ones too, seen by the assembler
    nm impl_$cc.o | awk 'NF == 3 && $2 ~ /[tdbrTDBR]/ {print $3}' | grep -vE '\.[0-9]+$|^(_?snip|other$|\.L|\.rodata|\.text|CSWTCH|__func__|\.str)' > log
    if [ ! -s log ]; then ok; else bad "$cc: static names without the prefix" 20; fi
done
# names of types, enumerators and functions that the interface declares
if command -v gcc > /dev/null 2>&1; then
    gcc -std=c99 -I"$here" -E -P api_twice.c | tr -c 'A-Za-z0-9_\n' '\n' | sort -u > ours
    gcc -std=c99 -E -P system_api.c | tr -c 'A-Za-z0-9_\n' '\n' | sort -u > theirs
    # in a header's interface all capitalized words are constants or macros
    comm -23 ours theirs | grep -E '^[A-Z][A-Z0-9_]+$' | grep -v '^SNIP' > log
    if [ ! -s log ]; then ok; else bad "constants without the prefix" 20; fi
fi

# ---- 32 bits
echo '#include <stdio.h>
int main(void) { return 0; }' > m32.c
for cc in gcc clang; do
    if command -v $cc > /dev/null 2>&1 && $cc -m32 m32.c -o m32 > /dev/null 2>&1 && ./m32; then
        try "$cc -m32 compiles" $cc -m32 -std=c99 $warn -O1 -I"$here" main_unit.c impl_unit.c -lm -o m32_$cc
        try "$cc -m32 runs" ./m32_$cc
    else
        skip "$cc -m32: not installed"
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
