#!/bin/sh
# Codes, scales, values and counts of many matrices are the same bits under every compiler and flag, also where the
# flags flush subnormals and allow reassociation (test_targets.sh: on other machines); test_session under those too. Run from the project's folder.
set -u
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0 expected=
try() { # compiler, flags
    if ! command -v "$1" >/dev/null 2>&1; then
        echo "skipped: $*"
        skipped=$((skipped + 1))
        return
    fi
    case $1 in *++*) language="-x c++" ;; *) language= ;; esac
    if ! "$@" $language -w -I. tests/test_quant.c -o "$dir/t" -lm 2>"$dir/log"; then
        echo "FAILED to build: $*"
        head -3 "$dir/log"
        failed=$((failed + 1))
        return
    fi
    got=$(SNIP_TEST_FEW=4 "$dir/t" --hash)
    [ -n "$expected" ] || expected=$got
    if [ "$got" = "$expected" ]; then
        passed=$((passed + 1))
    else
        echo "FAILED: $*: $got, expected $expected"
        failed=$((failed + 1))
    fi
}
try gcc -O2 -DSNIP_NO_SIMD
try gcc -O0
try gcc -Ofast -march=native
try g++ -O2 -std=c++11 -fopenmp
try clang -Ofast -march=native
try clang++ -O2 -std=c++17
for cc in gcc clang; do                 # the session under flags that fold isfinite() and reorder sums
    command -v $cc > /dev/null 2>&1 || { echo "skipped: $cc"; skipped=$((skipped + 1)); continue; }
    if $cc -Ofast -march=native -w -I. tests/test_session.c -o "$dir/t" -lm 2> "$dir/log" && "$dir/t" > "$dir/log"; then passed=$((passed + 1))
    else
        echo "FAILED: test_session, $cc -Ofast -march=native"
        grep FAILED "$dir/log" | head -3
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
