#!/usr/bin/env bash
# gpu.sh test | bench - builds for the GPU at hand, with all cores, runs, and writes a table to build/gpu_test.txt or
# build/gpu_bench.tsv. Without a GPU or nvcc: skips, and says so. Ends with 0 only if nothing failed.
#     NVCC     nvcc, if neither in PATH nor in CUDA_HOME/bin
#     CUBLAS   where include/cublasLt.h and lib/libcublasLt.so* are, if nvcc does not find them
set -u
cd "$(dirname "$0")/.."
build=${BUILD:-build}
what=${1:-test}
skip() {
    echo "skipped: $1"
    if [ "$what" = test ]; then echo "0 passed, 0 failed, 1 skipped"; fi
    exit 0
}
case $what in
    test | bench) ;;
    *)
        echo "gpu.sh test | bench" >&2
        exit 2
        ;;
esac
mkdir -p "$build" || exit 2
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

first_of() { ls -d "$@" 2> /dev/null | head -n 1; }
nvcc=${NVCC:-$(command -v nvcc || first_of "${CUDA_HOME:-/usr/local/cuda}"/bin/nvcc /usr/local/cuda-*/bin/nvcc)}
[ -n "$nvcc" ] && "$nvcc" --version > /dev/null 2>&1 || skip "nvcc is not installed"
toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -dc 0-9)
[ -n "$capability" ] || capability=$("$toolkit/bin/__nvcc_device_query" 2> /dev/null | cut -d, -f1 | tr -dc 0-9)
[ -n "$capability" ] || skip "no GPU"
echo 'int main() { return 0; }' > "$tmp/empty.cu"
arch=
case $capability in 9? | 1[0-9][0-9]) suffixes="a -" ;; *) suffixes=- ;; esac        # a: with wgmma and tcgen05
for suffix in $suffixes; do
    a=$capability${suffix#-}
    if "$nvcc" -gencode arch=compute_$a,code=sm_$a "$tmp/empty.cu" -o "$tmp/empty" > "$tmp/log" 2>&1; then
        arch=$a
        break
    fi
done
why=$(grep -m 1 -i -E 'error|fatal|unsupported' "$tmp/log")
[ -n "$arch" ] || skip "nvcc does not make programs for compute capability $capability: $why"
flags="-O2 -std=c++17 -lineinfo -gencode arch=compute_$arch,code=sm_$arch"
for faster in "--split-compile 0" "-Xptxas --split-compile=0"; do
    "$nvcc" -cubin $flags $faster "$tmp/empty.cu" -o "$tmp/empty" > /dev/null 2>&1 && flags="$flags $faster"
done

# cuBLASLt: where nvcc looks, in CUBLAS, or in the packages of python3.
printf '#include <cublasLt.h>\nint main() { return cublasLtGetVersion() == 0; }\n' > "$tmp/lt.cu"
lt="-DSNIP_CUBLASLT -lcublasLt"
links() { "$nvcc" "$tmp/lt.cu" $lt -o "$tmp/lt" > /dev/null 2>&1 && "$tmp/lt" > /dev/null 2>&1; }
packages='import nvidia, glob; print(*[d for p in nvidia.__path__ for d in glob.glob(p + "/*")])'
if ! links; then
    lt=
    for root in ${CUBLAS:-} $(python3 -c "$packages" 2> /dev/null); do
        library=$(first_of "$root"/lib*/libcublasLt.so*)
        header=$(first_of "$root/include/cublasLt.h" "$toolkit/include/cublasLt.h")
        [ -n "$library" ] || continue
        folder=$(dirname "$library")
        lt="-DSNIP_CUBLASLT -L$folder -Xlinker -rpath,$folder -l:$(basename "$library")"
        [ -z "$header" ] || lt="$lt -I$(dirname "$header")"
        links && break
        lt=
    done
fi
[ -n "$lt" ] || echo "skipped: cuBLASLt does not link, no oracle and no peer (set CUBLAS)"

# What both targets need is built at once; a program newer than its sources stays.
made() {                # name, flags, sources
    local out=$build/$1 stamp="$nvcc $flags $2"
    shift 2
    [ -x "$out" ] && [ "$(cat "$out.flags" 2> /dev/null)" = "$stamp" ] || return 1
    for source in "$@" snip.h snip_ilp.h snip_cuda.cuh; do [ "$out" -nt "$source" ] || return 1; done
}
make_one() {            # name, flags, sources, the first of which is compiled
    local name=$1 more=$2 begin=$SECONDS
    if made "$@"; then return; fi
    rm -f "$build/$name" "$build/$name.flags"
    if timeout 400 "$nvcc" $flags $more "$3" -o "$build/$name" > "$tmp/$name.log" 2>&1; then
        echo "$nvcc $flags $more" > "$build/$name.flags"
        echo "built $name in $((SECONDS - begin)) s"
    else
        echo "FAILED to build $name"
        grep -E -m 12 'error|undefined|fatal|Killed' "$tmp/$name.log" || tail -n 5 "$tmp/$name.log"
    fi
}
trainer="examples/train_llama.c examples/llama.h examples/report.h examples/train.h examples/trainer.h"
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1)
echo "# sm_$arch, $("$nvcc" --version | grep -o 'release [^,]*'), $(nproc) cores, $gpu"
make_one test_cuda_gpu "-x cu $lt" tests/test_cuda.cpp tests/test.h tests/cublaslt.h tests/codec_tables.h &
make_one bench_cuda "$lt" bench/bench_cuda.cu tests/cublaslt.h &
make_one train_llama_cuda "" examples/train_llama.cu $trainer &
make_one minimal_cuda "" examples/minimal.cu &
if [ "$what" = test ]; then
    make_one attention_cuda "-x cu" tests/test_cuda_attention.cpp tests/test.h examples/train_llama.cu $trainer
fi
wait

if [ "$what" = bench ]; then
    table=$build/gpu_bench.tsv status=0
    [ -x "$build/bench_cuda" ] && [ -x "$build/train_llama_cuda" ] || exit 1
    timeout 200 "$build/bench_cuda" > "$table" 2> "$tmp/errors" || {
        status=1
        echo "FAILED: bench_cuda ($?)"
        tail -n 3 "$tmp/errors"
    }
    # Tokens a second of a model of 110 million parameters; the plan is the measured one of the third step on.
    model="--dim 1024 --blocks 10 --heads 16 --kv-heads 16 --ffn 2304 --seq 256 --batch 32"
    run="--data snip.h --steps 12 --every 4 --val-every 12 --budget 0.75 --save-every 0 --quiet"
    for precision in bf16 fp8 snip; do
        if timeout 100 "$build/train_llama_cuda" $model $run --precision $precision --out "$tmp/run" \
            > "$tmp/errors" 2>&1; then
            awk -F, -v p=$precision 'NR > 1 && $4 > 0 { n[m++] = $4; loss = $2 }
                END { print "bench\ttrain_llama 110M " p ", final loss " loss "\t" n[m - 2] "\ttokens/s\t-\t-\t-" }' \
                "$tmp/run/loss.csv" >> "$table"
        else
            echo "FAILED: train_llama --precision $precision ($?)"
            tail -n 2 "$tmp/errors"
            status=1
        fi
        rm -rf "$tmp/run"
    done
    awk -F '\t' '/^bench/ { printf "%-58s %10s %-9s %-15s %10s %7s\n", $2, $3, $4, $5, $6, $7; next }
        { print }' "$table"
    exit $status
fi

table=$build/gpu_test.txt
: > "$table"
: > "$tmp/totals"
count() { echo "$1 $2 $3" >> "$tmp/totals"; }      # passed, failed, skipped: also from the background
row() { printf '%-32s %-8s %4s s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$table"; }
# Runs one part; it may print "N passed, N failed, N skipped". What it printed is left in $tmp/NAME.
step() {                # name, limit in seconds, command
    local name=$1 limit=$2 begin=$SECONDS status counts out="$tmp/$1"
    shift 2
    timeout -k 5 "$limit" "$@" > "$out" 2>&1
    status=$?
    counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$out" | tail -n 1)
    if [ -n "$counts" ]; then
        set -- $counts
        if [ $status != 0 ] && [ "$3" = 0 ]; then set -- "$1" "" 1 "" "$5"; fi
        count "$1" "$3" "$5"
    elif [ $status = 0 ]; then count 1 0 0
    elif [ $status = 124 ] && [ -n "${MAY_STOP:-}" ] && ! grep -q -E "$MAY_STOP" "$out"; then
        count 0 0 1
        row "$name" skipped $((SECONDS - begin)) "stopped, without an error so far"
        return
    else count 0 1 0; fi
    if [ $status = 0 ]; then
        row "$name" ok $((SECONDS - begin)) "$counts"
        grep -E '^skipped: ' "$out"
        return
    fi
    [ $status = 124 ] && how=stopped || how="exit status $status"
    row "$name" FAILED $((SECONDS - begin)) "$how $counts"
    grep -E -m 14 'FAILED|=========|error|rror:' "$out" || tail -n 6 "$out"
}
for program in test_cuda_gpu minimal_cuda train_llama_cuda attention_cuda; do
    [ -x "$build/$program" ] && continue
    count 0 1 0
    row "$program" FAILED 0 "not built"
done
if [ -x "$build/minimal_cuda" ]; then
    step minimal 60 "$build/minimal_cuda"
    grep relative "$tmp/minimal"
fi
if [ -x "$build/test_cuda_gpu" ]; then
    for part in codec quantize noise gemm oracle session; do step $part 90 "$build/test_cuda_gpu" $part; done
fi
if [ -x "$build/attention_cuda" ]; then step attention 60 "$build/attention_cuda"; fi
# The trainer beside the CPU's, in float32 from one seed; then under plans.
if [ -x "$build/train_llama_cuda" ]; then
    options="--data snip.h --blocks 2 --steps 12 --val-every 4 --seed 3 --quiet --precision f32"
    step "train_llama f32" 60 "$build/train_llama_cuda" $options --out "$tmp/gpu"
    if ${CC:-cc} -O2 -fopenmp -Wno-unknown-pragmas examples/train_llama.c -o "$tmp/trainer" -lm 2> /dev/null ||
        ${CC:-cc} -O2 -Wno-unknown-pragmas examples/train_llama.c -o "$tmp/trainer" -lm 2> /dev/null; then
        step "train_llama f32 on the CPU" 90 "$tmp/trainer" $options --out "$tmp/cpu"
        paste -d, "$tmp/cpu/loss.csv" "$tmp/gpu/loss.csv" > "$tmp/both" 2> /dev/null
        step "their difference" 5 awk -F, 'NR > 1 { n++; d = $2 - $7; if (d < 0) d = -d; if (d > most) most = d }
            END { print "largest difference", most + 0, "in", n + 0, "steps"; exit !(n >= 12 && most < 2e-3) }' \
            "$tmp/both"
        grep largest "$tmp/their difference"
    else
        echo "skipped: no C compiler for the CPU's trainer"
        count 0 0 1
    fi
    step "train_llama under plans" 60 "$build/train_llama_cuda" --data snip.h --steps 60 --every 20 --quiet \
        --out "$tmp/plans"
fi
# compute-sanitizer on a sample of the cases, all tools at once. It does not know what wgmma and tcgen05 read: no races
# are looked for there.
sanitizer=$(command -v compute-sanitizer ||
    first_of "$toolkit/bin/compute-sanitizer" /usr/local/cuda-*/bin/compute-sanitizer)
sanitize() {            # tool, one case in so many, tests, options
    local tool=$1 few=$2 tests=$3
    shift 3
    MAY_STOP='ERROR SUMMARY: [1-9]|========= (Invalid|Error|Program hit|Barrier|Uninit|Race)|hazard' \
        step "$tool" 90 env SNIP_TEST_FEW=$few "$sanitizer" --tool $tool --error-exitcode 9 "$@" \
        "$build/test_cuda_gpu" $tests
}
if [ -z "$sanitizer" ]; then
    echo "skipped: compute-sanitizer is not installed"
    count 0 0 1
elif [ -x "$build/test_cuda_gpu" ] && [ -x "$build/minimal_cuda" ]; then
    timeout -k 5 60 "$sanitizer" --tool memcheck --error-exitcode 9 "$build/minimal_cuda" > "$tmp/probe" 2>&1
    status=$?
    if [ $status = 0 ]; then
        sanitize memcheck 24 "quantize noise gemm session" &
        sanitize racecheck 60 "quantize noise gemm" --kernel-name-exclude kns=wgmma,kns=tcgen05 &
        sanitize synccheck 60 "quantize noise gemm" &
        wait
    elif [ $status = 9 ]; then
        count 0 1 0
        row "memcheck minimal" FAILED 0 ""
        grep -m 8 '=========' "$tmp/probe"
    else
        why=$(grep -m 1 -i -E 'not supported|error' "$tmp/probe")
        echo "skipped: compute-sanitizer does not run here ($status): $why"
        count 0 0 1
    fi
fi
sum='{ p += $1; f += $2; s += $3 } END { print p + 0, f + 0, s + 0 }'
read -r passed failed skipped <<< "$(awk "$sum" "$tmp/totals")"
echo "$passed passed, $failed failed, $skipped skipped" | tee -a "$table"
[ "$failed" = 0 ]
