#!/usr/bin/env bash
# test_targets.sh - other machines under qemu-user: NEON with and without dot products, a 32-bit target and a big-endian
# one. Codecs, quantizer, GEMM and solver against their references, a share of the cases each; digests of many quantized
# matrices and of a session's state, which are this machine's; checkpoints that cross from little- to big-endian and back.
#     tests/test_targets.sh [BUILD]      from the project's folder; BUILD (build) has this machine's programs, by make
. "$(dirname "$0")/lib.sh"
here=${1:-build}
there() { for tool; do have "$tool" || { skip "no $tool"; return 1; }; done; }
build() {                           # program, compiler and flags
    name=$1
    shift
    rm -f "$work/$name"
    "$@" -w -I. "tests/test_$name.c" -o "$work/$name" -lm 2> "$log" && return 0
    fail "to build test_$name: $*" 3
    return 1
}
equal() {                           # what, value, expected
    : > "$log"
    if [ -n "$2" ] && [ "$2" = "$3" ]; then ok; else fail "$1: $2, expected $3"; fi
}
digest() { equal "digest of quantizers of $2 under $1" "$(SNIP_TEST_FEW=8 $1 "$work/quant" --hash)" "$expected"; }
whole() {                           # programs, one case in how many, emulator, compiler and flags
    local programs=$1 few=$2 emulator=$3 arguments line status
    shift 3
    there "$emulator" "$1" || return
    for t in $programs; do
        build $t "$@" || continue
        arguments=
        [ $t = ilp ] && arguments="--instances 2000 --lattices 5 --slow 100"
        SNIP_TEST_FEW=$few $emulator "$work/$t" $arguments > "$log" 2>&1
        status=$?
        line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
        if [ $status = 0 ] && [ -n "$line" ]; then passed=$((passed + ${line%% *})); continue; fi
        grep FAILED "$log" > "$log.failed"
        mv "$log.failed" "$log"
        fail "test_$t, $* under $emulator: status $status, $line"
    done
    build inside "$@" && equal "digest of a session's state, $* under $emulator" "$($emulator "$work/inside" --state)" "$state"
    if [ -x "$work/quant" ]; then digest "$emulator" "$*"; fi
}
crossing() {                        # emulator, compiler and flags: three steps here, two there, two here; as seven here
    local emulator=$1 options
    shift
    there "$emulator" "$1" || return
    head -c 2000 snip.h > "$work/text"
    options="--data $work/text --dim 32 --blocks 1 --heads 2 --ffn 48 --seq 16 --batch 1 --every 2 --val-every 0 --warmup 1000 --quiet"
    "$@" -w examples/train_llama.c -o "$work/trainer" -lm 2> "$log" || { fail "to build the trainer: $*"; return; }
    if "$here/train_llama" $options --out "$work/straight" --steps 7 && "$here/train_llama" $options --out "$work/crossed" --steps 3 &&
       $emulator "$work/trainer" $options --out "$work/crossed" --steps 5 --resume &&
       "$here/train_llama" $options --out "$work/crossed" --steps 7 --resume &&
       paste -d, "$work/straight/loss.csv" "$work/crossed/loss.csv" |
           awk -F, 'NR > 1 { d = $2 - $7; if (!(d < 1e-4 && d > -1e-4)) bad = 1 } END { exit bad || NR != 8 }'
    then ok; else fail "a checkpoint crossing byte orders, $emulator"; fi > "$log.out" 2>&1
    grep FAILED "$log.out"
}
state=$("$here/test_inside" --state) && expected=$(SNIP_TEST_FEW=8 "$here/test_quant" --hash) || { fail "this machine's digests"; finish; }
whole "codec quant" 32 qemu-arm-static arm-linux-gnueabihf-gcc -O1 -static
whole "codec gemm ilp quant" 32 qemu-ppc64-static powerpc64-linux-gnu-gcc -O1 -static
crossing qemu-ppc64-static powerpc64-linux-gnu-gcc -O1 -static
if whole "codec gemm ilp quant" 16 qemu-aarch64-static aarch64-linux-gnu-gcc -O1 -static; then
    digest "qemu-aarch64-static -cpu cortex-a53" "the same"                             # no dot products
    build quant aarch64-linux-gnu-gcc -Ofast -mcpu=neoverse-v1 -static && digest qemu-aarch64-static "gcc -Ofast"
    there clang && build quant clang --target=aarch64-linux-gnu -Ofast -static && digest qemu-aarch64-static "clang -Ofast"
fi
finish
