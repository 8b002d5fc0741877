#!/usr/bin/env bash
# Plants one fault after another in a copy of snip_cuda.cuh - each barrier removed in turn, wrong phases, wrong lanes -
# and demands that the tests notice each.
set -u
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
mkdir "$dir/tests"
cp snip.h snip_ilp.h "$dir"
cp tests/test_cuda.cpp tests/cuda_shim.h "$dir/tests"
try() {                 # what, sed command
    sed -E "$2" snip_cuda.cuh > "$dir/snip_cuda.cuh"
    if cmp -s snip_cuda.cuh "$dir/snip_cuda.cuh"; then
        echo "FAILED: nothing to change for: $1"
        failed=$((failed + 1))
    elif ! ${CXX:-g++} -O0 -std=c++17 -w "$dir/tests/test_cuda.cpp" -o "$dir/t" -lm 2> "$dir/log"; then
        echo "FAILED to build: $1"
        head -3 "$dir/log"
        failed=$((failed + 1))
    elif timeout 120 "$dir/t" --stop > "$dir/log" 2>&1; then
        echo "FAILED: not noticed: $1"
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
}
for line in $(grep -n '__syncthreads();' snip_cuda.cuh | cut -d: -f1); do try "line $line, no barrier" "${line}s/__syncthreads\(\);/;/"; done
try "half a warp's maximum" 's/for \(int o = 1; o < lanes; o/for (int o = 2; o < lanes; o/'
try "signs of another lane" 's/words\[w\], group\)/words[w], group ^ 1)/'
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
