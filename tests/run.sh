#!/usr/bin/env bash
# run.sh - runs built test programs and the shell tests, JOBS (2) at a time, and adds up their closing lines.
#     CC=gcc BUILD=build tests/run.sh test_ilp test_gemm ...
set -u
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-build}
passed=0 failed=0 skipped=0 results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
one() {                 # name, command...; in the background
    while [ "$(jobs -r | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    { run "$@" > "$results/$1.out"; cat "$results/$1.out"; } &
    names="${names-} $1"
}
run() {
    local name=$1 log=$build/$1.log start=$SECONDS status line
    shift
    "$@" > "$log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$log" | tail -n 1)
    if [ -z "$line" ]; then
        line="0 passed, 1 failed"
        echo "$name: no result (exit status $status)"
        tail -n 20 "$log"
    elif [ $status -ne 0 ] || ! echo "$line" | grep -q ' 0 failed'; then
        grep -iE 'fail' "$log" | head -n 20
        case $line in *" 0 failed"*) line="${line%% *} passed, 1 failed" ;; esac
    fi
    grep -iE '^skip' "$log" | sed "s/^/$name: /"
    echo "$line" | tr -cd '0-9 ' > "$results/$name"
    printf '%-20s %s  (%d s)\n' "$name" "$line" $((SECONDS - start))
}
for t in "$@"; do one "$t" "$build/$t"; done
for t in ${SHELL_TESTS-targets cuda_compile compilers cuda_faults headers trainer instructions cuda_trainer bench reference}; do
    case $t in
        cuda_trainer) one test_cuda_trainer "$here/test_cuda_trainer.sh" "$build/train_llama" ;;
        trainer) one test_trainer "$here/test_trainer.sh" "$build/train_llama" ;;
        targets) one test_targets "$here/test_targets.sh" "$build" ;;
        reference) if command -v python3 > /dev/null; then one reference_quant python3 "$here/reference_quant.py"; else echo "skipped: reference_quant.py, no python3"; fi ;;
        *) one "test_$t" "$here/test_$t.sh" ;;
    esac
done
wait
for name in $names; do
    set -- $(cat "$results/$name" 2> /dev/null || echo 0 1)
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + ${3:-0}))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
