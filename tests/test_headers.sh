#!/usr/bin/env bash
# test_headers.sh - the headers under every language and compiler they promise: alone, twice, in any order, as several
# translation units, beside names a trainer is likely to have and macros that other headers define; that nothing without
# their prefix leaks, and that every public function is called by a test.
#     tests/test_headers.sh          two pairs of compiler and language
#     tests/test_headers.sh rest     the other ones, linked programs by clang, 32 bits
. "$(dirname "$0")/lib.sh"
which=${1:-two}
cd "$work" || exit 2

lang() { case $1 in c++* | gnu++*) echo c++ ;; *) echo c ;; esac }
compiler_for() {                    # gcc or clang, standard
    case $1-$(lang "$2") in gcc-c++) echo g++ ;; clang-c++) echo clang++ ;; *) echo "$1" ;; esac
}

# ---- sources ----
echo '#include "snip.h"' > alone_snip.h
echo '#include "snip_ilp.h"' > alone_ilp.h
printf '#include "%s"\n' snip.h snip.h snip_ilp.h snip_ilp.h > twice.h
printf '#include "%s"\n' snip_ilp.h snip.h snip_ilp.h > order.h
for base in alone_snip alone_ilp twice order; do
    { cat $base.h; echo 'typedef int snip_test_not_empty;'; } > api_$base.c
    { echo '#define SNIP_IMPLEMENTATION'; cat api_$base.c; } > impl_$base.c
    { echo '#define SNIP_NO_SIMD'; cat impl_$base.c; } > nosimd_$base.c
done
# the interface first, the implementation last; the solver's implementation alone, and then all
{ cat twice.h; echo '#define SNIP_IMPLEMENTATION'; cat twice.h twice.h; } > impl_later.c
{ echo '#define SNIP_ILP_IMPLEMENTATION'; cat alone_ilp.h; } > impl_ilp_only.c
{ cat impl_ilp_only.c; echo '#define SNIP_IMPLEMENTATION'; cat alone_snip.h; } > impl_both.c
{ echo "#include \"$root/tests/hostile_macros.h\""; cat twice.h; } > hostile_api.c
{ echo "#include \"$root/tests/hostile_macros.h\""; cat impl_twice.c; } > hostile_impl.c
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
#ifdef __cplusplus
extern "C"
#endif
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
int other(void);
#ifdef SECOND
int other(void) { return use(); }
#else
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
# macros before the interface; code after the implementation
{ cat names.h alone_snip.h names_body.h; echo 'int main(void) { return names_use(); }'; } > names_api.c
{ echo '#define SNIP_IMPLEMENTATION'; cat alone_snip.h names.h names_body.h; echo 'int main(void) { return names_use(); }'; } > names_impl.c

# ---- one pair of compiler and language ----
parses() {                          # what, gcc or clang, standard, file, flags...
    local what=$1 cc std=$3 file=$4
    cc=$(compiler_for "$2" "$3")
    shift 4
    try "$cc -std=$std $what" "$cc" -x "$(lang "$std")" -std="$std" $warnings -I"$root" -I"$work" -fsyntax-only "$@" "$file"
}
interface() {                       # gcc or clang, standard
    for base in alone_snip alone_ilp twice order; do parses "interface $base" "$1" "$2" api_$base.c; done
    parses "solver alone" "$1" "$2" impl_ilp_only.c
    parses "interface beside a trainer's macros" "$1" "$2" names_api.c -Wno-unused-macros
    parses "interface after other headers' macros" "$1" "$2" hostile_api.c -Wno-unused-macros
}
implementation() {
    parses "implementation" "$1" "$2" impl_alone_snip.c -O1
    parses "implementation before a trainer's functions" "$1" "$2" names_impl.c -Wno-unused-macros
    parses "implementation after other headers' macros" "$1" "$2" hostile_impl.c -Wno-unused-macros
}
implementation_in_any_order() {
    for base in alone_ilp twice order; do parses "implementation $base" "$1" "$2" impl_$base.c; done
    parses "scalar implementation" "$1" "$2" nosimd_alone_snip.c
    parses "implementation after the interface" "$1" "$2" impl_later.c
    parses "solver's implementation, then all" "$1" "$2" impl_both.c
    parses "with OpenMP" "$1" "$2" impl_alone_snip.c -fopenmp
    parses "SNIP_STATIC, little of it used" "$1" "$2" static_quiet.c
}
first="gcc c99" second="clang c++17"
have gcc || first="clang c99"
have clang++ || second="gcc c++17"
if [ "$which" = two ]; then
    for pair in "$first" "$second"; do interface $pair; implementation $pair; done
    implementation_in_any_order $first
else
    for cc in gcc clang; do
        have $cc || { skip "$cc: not installed"; continue; }
        for std in c99 gnu99 c11 c++11 c++17 c++20 c++2b; do
            [ "$cc $std" = "$first" ] || [ "$cc $std" = "$second" ] && continue
            have "$(compiler_for $cc $std)" || { skip "$(compiler_for $cc $std): not installed"; continue; }
            interface $cc $std
            implementation $cc $std
        done
    done
    implementation_in_any_order clang c99
    implementation_in_any_order gcc c++17
    implementation_in_any_order $second
fi
# the checks above can fail at all
echo 'static int x(void) { return 1.5; }' > canary.c
for cc in gcc clang; do have $cc && refuse "$cc: a conversion" $cc -x c -std=c99 $warnings -fsyntax-only canary.c; done
for name in near LANES IN; do
    { echo "#include \"$root/tests/hostile_macros.h\""; echo "int f(int $name) { return $name; }"; } > canary.c
    refuse "the name $name" ${first% *} -x c -std=c99 -fsyntax-only canary.c
done

# ---- linked programs: warnings that need code generation, and that it runs ----
linked() {                          # gcc or clang
    local cc=$1 cxx
    cxx=$(compiler_for "$1" c++17)
    have "$cc" || return
    try "$cc: implementation compiles" $cc -std=c99 $warnings -O1 -I"$root" -c impl_unit.c -o impl_$cc.o
    try "$cc: user compiles" $cc -std=c99 $warnings -O1 -I"$root" -c main_unit.c -o main_$cc.o
    try "$cc: two units link" $cc main_$cc.o impl_$cc.o -lm -o two_$cc
    try "$cc: two units run" ./two_$cc
    try "$cc: static compiles" $cc -std=c99 $warnings -Wno-unused-function -I"$root" -c static_unit.c -o static1_$cc.o
    try "$cc: static compiles again" $cc -std=c99 $warnings -Wno-unused-function -DSECOND -I"$root" -c static_unit.c -o static2_$cc.o
    try "$cc: two static units link" $cc static1_$cc.o static2_$cc.o -lm -o static_$cc
    try "$cc: two static units run" ./static_$cc
    have "$cxx" || return
    try "$cxx: user compiles" $cxx -x c++ -std=c++17 $warnings -O1 -I"$root" -c main_unit.c -o mainxx_$cc.o
    try "$cxx: links with C" $cxx mainxx_$cc.o impl_$cc.o -lm -o mixed_$cc
    try "$cxx: runs with C" ./mixed_$cc
}

# ---- what leaks ----
empty() { if [ -s "$log" ]; then fail "$1" 20; else ok; fi; }
leaks() {                           # gcc or clang
    local cc=$1
    [ -f impl_$cc.o ] || return
    nm -g --defined-only impl_$cc.o | awk '{print $3}' | grep -v '^other$' > symbols
    grep -vE '^_?snip_' symbols > "$log"
    grep -q 'snip_create' symbols || echo "no symbols" > "$log"
    empty "$cc: external symbols without the prefix"
    nm -g --defined-only static1_$cc.o | awk '{print $3}' | grep -v '^main$' > "$log"
    empty "$cc: external symbols under SNIP_STATIC"
    $cc -std=c99 -I"$root" -fopenmp -c impl_alone_snip.c -o omp_$cc.o > "$log" 2>&1 &&
        nm -g --defined-only omp_$cc.o | awk '{print $3}' | grep -vE '^_?snip_' > "$log"
    empty "$cc: external symbols with OpenMP"
    # names at file scope, static ones too, seen by the assembler
    nm impl_$cc.o | awk 'NF == 3 && $2 ~ /[tdbrTDBR]/ {print $3}' |
        grep -vE '\.[0-9]+$|^(_?snip|other$|\.L|\.rodata|\.text|CSWTCH|__func__|\.str)' > "$log"
    empty "$cc: static names without the prefix"
    # macros: those of the header less those of the system headers it includes
    printf '#include <%s.h>\n' stddef stdint stdio > system_api.c
    { cat system_api.c
      printf '#include <%s.h>\n' errno fenv sched sys/stat math stdlib string time float limits assert
      printf '#if defined(__x86_64__)\n#include <immintrin.h>\n#endif\n'; } > system_impl.c
    for part in api impl; do
        $cc -std=c99 -I"$root" -dM -E ${part}_twice.c 2> /dev/null | awk '{sub(/\(.*/, "", $2); print $2}' | sort -u > ours
        $cc -std=c99 -dM -E system_$part.c 2> /dev/null | awk '{sub(/\(.*/, "", $2); print $2}' | sort -u > theirs
        comm -23 ours theirs | grep -vE '^(SNIP|snip)' > "$log"
        grep -q '^SNIP_H$' ours || echo "no macros" > "$log"
        empty "$cc: macros without the prefix ($part)"
    done
}
if [ "$which" = two ]; then linked ${first% *}; leaks ${first% *}; else linked clang; leaks clang; fi

# ---- names in the text ----
words() { tr -c 'A-Za-z0-9_' '\n' | sort -u; }
names() {
    local cc=${first% *}
    # in a header's interface all capitalized words are constants or macros
    $cc -std=c99 -I"$root" -E -P api_twice.c | words > ours
    $cc -std=c99 -E -P system_api.c | words > theirs
    comm -23 ours theirs | grep -E '^[A-Z][A-Z0-9_]+$' | grep -v '^SNIP' > "$log"
    empty "constants without the prefix"
    # in the implementation too: any of them may be somebody's macro. Without comments and strings; X and the like, which
    # are parameters of macros, aside.
    for header in snip.h snip_ilp.h; do
        gcc -fpreprocessed -dD -E -P -x c "$root/$header" 2> /dev/null | sed -E 's/"([^"\\]|\\.)*"//g' | words |
            grep -E '^[A-Z][A-Z0-9_]+$' | grep -vE '^SNIPI?_' |
            grep -vE '^(NULL|FILE|EOF|GCC|S_ISREG|AT_HWCAP|(U?INT(8|16|32|64)?|PTRDIFF|SIZE|DBL|FLT)_(MAX|MIN|C|EPSILON)|CLOCK_MONOTONIC|TIME_UTC|CLOCKS_PER_SEC|EIO|FE_TONEAREST|INFINITY|NAN|HUGE_VAL|ARCH_[A-Z_]*|SYS_[a-z_]*)$' > "$log"
        empty "$header: names of capitals alone without the prefix" 20
    done
    # every public function is called in the tests
    grep -ohE '\bsnip_[a-z0-9_]+ *\(' "$root"/tests/*.c "$work/use.h" | tr -d ' (' | sort -u > called
    gcc -std=c99 -I"$root" -E -P api_twice.c | tr '\n' ' ' | tr ';' '\n' | grep -E '\bextern\b' |
        grep -oE '\bsnip_[a-z0-9_]+ *\(' | tr -d ' (' | sort -u > declared
    comm -23 declared called > "$log"
    [ "$(wc -l < declared)" -gt 60 ] || echo "only $(wc -l < declared) functions are declared" > "$log"
    empty "public functions that no test calls" 20
}
[ "$which" = two ] && have gcc && names

# ---- 32 bits ----
printf '#include <stdio.h>\nint main(void) { return 0; }\n' > m32.c
for cc in gcc clang; do
    [ "$which" = two ] && continue
    if have $cc && $cc -m32 m32.c -o m32 > /dev/null 2>&1 && ./m32; then
        try "$cc -m32 compiles" $cc -m32 -std=c99 $warnings -O1 -I"$root" main_unit.c impl_unit.c -lm -o m32_$cc
        try "$cc -m32 runs" ./m32_$cc
    else
        skip "$cc -m32: not installed"
    fi
done
finish
