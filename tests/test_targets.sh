#!/bin/sh
# Other machines under qemu-user: NEON with and without dot products, a 32-bit target and a big-endian one. Codecs,
# quantizer, GEMM and solver against their references, a share of the cases each; and digests of many quantized
# matrices and of a session's state, which are this machine's. Checkpoints cross from little- to big-endian and back.
#     tests/test_targets.sh [BUILD]      from the project's folder; BUILD (build) has this machine's programs, by make
set -u
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
here=${1:-build}
there() { for tool; do command -v "$tool" > /dev/null 2>&1 || { echo "skipped: no $tool"; skipped=$((skipped + 1)); return 1; }; done; }
build() { # program, compiler and flags
    name=$1
    shift
    rm -f "$dir/$name"
    "$@" -w -I. "tests/test_$name.c" -o "$dir/$name" -lm 2> "$dir/log" && return 0
    echo "FAILED to build test_$name: $*"
    head -3 "$dir/log"
    failed=$((failed + 1))
    return 1
}
digest() { # emulator, name: of the quantizer built last
    got=$(SNIP_TEST_FEW=8 $1 "$dir/quant" --hash)
    if [ "$got" = "$expected" ]; then passed=$((passed + 1))
    else echo "FAILED: digest of $2 under $1: $got, expected $expected"; failed=$((failed + 1)); fi
}
whole() { # programs, one case in how many, emulator, compiler and flags
    programs=$1 few=$2 emulator=$3
    shift 3
    there "$emulator" "$1" || return
    for t in $programs; do
        build $t "$@" || continue
        arguments=
        [ $t = ilp ] && arguments="--instances 2000 --lattices 5 --slow 100"
        SNIP_TEST_FEW=$few $emulator "$dir/$t" $arguments > "$dir/log" 2>&1
        status=$?
        line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$dir/log" | tail -n 1)
        passed=$((passed + ${line:+${line%% *}} + 0))
        [ $status = 0 ] && [ -n "$line" ] && continue
        echo "FAILED: test_$t, $* under $emulator: status $status, $line"
        grep FAILED "$dir/log" | head -5
        failed=$((failed + 1))
    done
    build session "$@" && state=$($emulator "$dir/session" --state)
    if [ "$state" = "$expected_state" ]; then passed=$((passed + 1))
    else echo "FAILED: digest of a session's state, $* under $emulator: $state, expected $expected_state"; failed=$((failed + 1)); fi
    [ -x "$dir/quant" ] && digest "$emulator" "$*"
}
crossing() { # emulator, compiler and flags: three steps here, two there, two here; as seven here, to rounding
    emulator=$1
    shift
    there "$emulator" "$1" || return
    head -c 2000 snip.h > "$dir/text"
    options="--data $dir/text --dim 32 --blocks 1 --heads 2 --ffn 48 --seq 16 --batch 1 --every 2 --val-every 0 --warmup 1000 --quiet"
    "$@" -w examples/train_llama.c -o "$dir/trainer" -lm || { failed=$((failed + 1)); return; }
    { "$here/train_llama" $options --out "$dir/straight" --steps 7 && "$here/train_llama" $options --out "$dir/crossed" --steps 3 &&
      $emulator "$dir/trainer" $options --out "$dir/crossed" --steps 5 --resume && "$here/train_llama" $options --out "$dir/crossed" --steps 7 --resume; } > "$dir/log" 2>&1
    if [ $? = 0 ] && paste -d, "$dir/straight/loss.csv" "$dir/crossed/loss.csv" | awk -F, 'NR > 1 { d = $2 - $7; if (!(d < 1e-4 && d > -1e-4)) bad = 1 } END { exit bad || NR != 8 }'; then passed=$((passed + 1))
    else echo "FAILED: a checkpoint crossing byte orders, $emulator: $(tail -n 1 "$dir/log")"; failed=$((failed + 1)); fi
}
expected_state=$("$here/test_session" --state) && expected=$(SNIP_TEST_FEW=8 "$here/test_quant" --hash) || exit 1
whole "codec quant" 32 qemu-arm-static arm-linux-gnueabihf-gcc -O1 -static
whole "codec gemm ilp quant" 32 qemu-ppc64-static powerpc64-linux-gnu-gcc -O1 -static
crossing qemu-ppc64-static powerpc64-linux-gnu-gcc -O1 -static
if whole "codec gemm ilp quant" 16 qemu-aarch64-static aarch64-linux-gnu-gcc -O1 -static; then
    digest "qemu-aarch64-static -cpu cortex-a53" "the same"                             # no dot products
    build quant aarch64-linux-gnu-gcc -Ofast -mcpu=neoverse-v1 -static && digest qemu-aarch64-static "gcc -Ofast"
    there clang && build quant clang --target=aarch64-linux-gnu -Ofast -static && digest qemu-aarch64-static "clang -Ofast"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
