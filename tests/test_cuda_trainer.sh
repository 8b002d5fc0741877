#!/usr/bin/env bash
# examples/train_llama.cu on the CPU, thread by thread, beside examples/train_llama.c: the same losses and plans; a plan
# that takes effect a step later; resuming. Its attention on tensor cores beside the float32 one.
#     tests/test_cuda_trainer.sh [TRAINER]       TRAINER: the built train_llama.c; without an argument it is built
set -u
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
ok() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAILED: $*"; }
done_now() { echo "$passed passed, $failed failed, 0 skipped"; [ $failed -eq 0 ]; exit; }
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
cpu=${1:-$dir/cpu} gpu=$dir/gpu
[ $# -gt 0 ] || ${CC:-cc} -O2 -Wno-unknown-pragmas "$here/../examples/train_llama.c" -o "$cpu" -lm || { fail "building the CPU's trainer"; done_now; }
${CXX:-g++} -O1 -w -std=c++17 -DSNIP_STATIC -DSNIP_NO_SIMD -include "$here/cuda_shim.h" -x c++ "$here/../examples/train_llama.cu" -o "$gpu" -lm || { fail "building the GPU's trainer"; done_now; }
if ${CXX:-g++} -O1 -w -std=c++17 -DSNIP_STATIC -DSNIP_NO_SIMD -include "$here/cuda_shim.h" "$here/test_cuda_attention.cpp" -o "$dir/attention" -lm && "$dir/attention" > "$dir/log"; then ok; else fail "attention"; grep FAILED "$dir/log" | head -5; fi
head -c 600 "$here/../LICENSE" > "$dir/text"          # few sequences to validate on; a text that stays as it is
model="--data $dir/text --dim 16 --blocks 1 --heads 4 --kv-heads 2 --ffn 20 --seq 7 --batch 2 --val-every 2 --quiet"
both() {                # name, most difference of a loss, steps compared, options
    local name=$1 most=$2 steps=$3
    shift 3
    "$cpu" $model "$@" --out "$dir/c" > "$dir/log" 2>&1 && "$gpu" $model "$@" --out "$dir/g" > "$dir/log" 2>&1 || { fail "$name: exit status"; head -3 "$dir/log"; return; }
    if paste -d, "$dir/c/loss.csv" "$dir/g/loss.csv" | awk -F, -v most=$most -v steps=$steps 'NR > 1 && n < steps { n++; if ($1 != $6 || $2 - $7 > most || $7 - $2 > most || $3 - $8 > most || $8 - $3 > most || ($3 == "") != ($8 == "")) bad = 1 } END { exit bad || n < steps }'
    then ok; else fail "$name: losses"; paste -d, "$dir/c/loss.csv" "$dir/g/loss.csv"; fi
    if [ "$(layers "$dir/c")" = "$(layers "$dir/g")" ]; then ok; else fail "$name: plans"; diff "$dir/c/plan.txt" "$dir/g/plan.txt"; fi
}
layers() { sed '1d; $d' "$1/plan.txt"; }        # without figures and checksum
shares() { awk -F, 'NR > 1 { printf "%s ", ($5 > 0.7) }' "$1"; }
both f32 1e-6 3 --precision f32 --steps 3 --tied --accum 2 --optimizer sgd
both snip 2e-3 3 --steps 4 --every 2 --save-every 0         # the output layer is BF16 on the GPU; the fourth step's plan differs:
if [ "$(shares "$dir/c/loss.csv")" = "0 0 1 1 " ] && [ "$(shares "$dir/g/loss.csv")" = "0 0 0 1 " ]; then ok; else fail "a plan a step later"; fi
resumable="--steps 3 --precision fp4 --save-every 1"
"$gpu" $model $resumable --out "$dir/whole" > "$dir/log" 2>&1 || fail "a run: $(head -1 "$dir/log")"
(   "$gpu" $model $resumable --out "$dir/parts" > "$dir/log" 2>&1 &
    pid=$!
    while [ ! -f "$dir/parts/loss.csv" ] || [ "$(wc -l < "$dir/parts/loss.csv")" -lt 2 ] && kill -0 $pid 2> /dev/null; do sleep 0.1; done
    kill -9 $pid 2> /dev/null
    wait $pid 2> /dev/null )
"$gpu" $model $resumable --resume --out "$dir/parts" > "$dir/log" 2>&1 || fail "resuming: $(head -1 "$dir/log")"
if [ "$(cut -d, -f1-3,5 "$dir/whole/loss.csv")" = "$(cut -d, -f1-3,5 "$dir/parts/loss.csv")" ]; then ok; else fail "resumed losses"; paste "$dir/whole/loss.csv" "$dir/parts/loss.csv"; fi
done_now
