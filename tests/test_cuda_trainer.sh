#!/usr/bin/env bash
# test_cuda_trainer.sh - examples/train_llama.cu on the CPU, thread by thread, beside examples/train_llama.c: the same
# losses and plans; a plan that takes effect a step later; resuming. Its attention on tensor cores beside float32's.
#     tests/test_cuda_trainer.sh [TRAINER]       TRAINER: the built train_llama.c; without an argument it is built
set -u
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
ok() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "FAILED: $*"
}
end() {
    echo "$passed passed, $failed failed, 0 skipped"
    [ $failed -eq 0 ]
    exit
}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# ---- building ----
emulate="${CXX:-g++} -O1 -w -std=c++17 -DSNIP_STATIC -DSNIP_NO_SIMD -include $here/cuda_shim.h"
cpu=${1:-$dir/cpu} gpu=$dir/gpu
if [ $# = 0 ] && ! ${CC:-cc} -O2 -Wno-unknown-pragmas "$here/../examples/train_llama.c" -o "$cpu" -lm; then
    fail "building the CPU's trainer"
    end
fi
$emulate "$here/test_cuda_attention.cpp" -o "$dir/attention" -lm &
attention=$!
if ! $emulate -x c++ "$here/../examples/train_llama.cu" -o "$gpu" -lm; then
    fail "building the GPU's trainer"
    end
fi

# ---- attention ----
if wait $attention && "$dir/attention" > "$dir/log"; then
    ok
else
    fail "attention"
    grep FAILED "$dir/log" | head -5
fi

# ---- both trainers ----
seq 1 300 | head -c 600 > "$dir/text"           # few sequences to validate on
model="--data $dir/text --dim 16 --blocks 1 --heads 4 --kv-heads 2 --ffn 20 --seq 7 --batch 2 --val-every 2 --quiet"
layers() { sed '1d; $d' "$1/plan.txt"; }                    # without figures and checksum
shares() { awk -F, 'NR > 1 { printf "%s ", ($5 > 0.7) }' "$1/loss.csv"; }

# Training and validation losses of the first steps, side by side in two files' columns.
cat > "$dir/differ.awk" <<'AWK'
function apart(a, b) { return a - b > most || b - a > most || (a == "") != (b == "") }
NR > 1 && n < steps {
    n++
    if ($1 != $6 || apart($2, $7) || apart($3, $8)) bad = 1
}
END { exit bad || n < steps }
AWK

both() {                # name, most difference of a loss, steps compared, options
    local name=$1 most=$2 steps=$3
    shift 3
    if ! "$cpu" $model "$@" --out "$dir/c" > "$dir/log" 2>&1 || ! "$gpu" $model "$@" --out "$dir/g" > "$dir/log" 2>&1
    then
        fail "$name: exit status"
        head -3 "$dir/log"
        return
    fi
    paste -d, "$dir/c/loss.csv" "$dir/g/loss.csv" > "$dir/losses"
    if awk -F, -v most=$most -v steps=$steps -f "$dir/differ.awk" "$dir/losses"; then
        ok
    else
        fail "$name: losses"
        cat "$dir/losses"
    fi
    if [ "$(layers "$dir/c")" = "$(layers "$dir/g")" ]; then
        ok
    else
        fail "$name: plans"
        diff "$dir/c/plan.txt" "$dir/g/plan.txt"
    fi
}
both f32 1e-6 3 --precision f32 --steps 3 --tied --accum 2 --optimizer sgd

# The output layer is BF16 on the GPU, and the plan of the second step takes effect a step later.
both snip 2e-3 3 --steps 4 --every 2 --save-every 0
if [ "$(shares "$dir/c")" = "0 0 1 1 " ] && [ "$(shares "$dir/g")" = "0 0 0 1 " ]; then
    ok
else
    fail "a plan a step later"
fi

# ---- resuming a run that was killed ----
resumable="--steps 3 --precision fp4 --save-every 1"
"$gpu" $model $resumable --out "$dir/whole" > "$dir/log" 2>&1 || fail "a run: $(head -1 "$dir/log")"
"$gpu" $model $resumable --out "$dir/parts" > "$dir/log" 2>&1 &
run=$!
lines() { cat "$dir/parts/loss.csv" 2> /dev/null | wc -l; }
while [ "$(lines)" -lt 2 ] && kill -0 $run 2> /dev/null; do sleep 0.1; done
kill -9 $run 2> /dev/null
wait $run 2> /dev/null
"$gpu" $model $resumable --resume --out "$dir/parts" > "$dir/log" 2>&1 || fail "resuming: $(head -1 "$dir/log")"
losses() { cut -d, -f1-3,5 "$dir/$1/loss.csv"; }
if [ "$(losses whole)" = "$(losses parts)" ]; then
    ok
else
    fail "resumed losses"
    paste "$dir/whole/loss.csv" "$dir/parts/loss.csv"
fi
end
