#!/usr/bin/env bash
# test_compilers.sh - codes, scales, values and counts of many matrices are the same bits under every compiler and flag,
# also where the flags flush subnormals and allow reassociation (test_targets.sh: on other machines); the session's tests
# pass under flags that fold isfinite() and reorder sums. Run from the project's folder.
. "$(dirname "$0")/lib.sh"
expected=
digest() {                          # compiler, flags
    local language= got
    if ! have "$1"; then skip "$*"; return; fi
    case $1 in *++*) language="-x c++" ;; esac
    if ! "$@" $language -w -I. tests/test_quant.c -o "$work/t" -lm 2> "$log"; then fail "to build: $*"; return; fi
    got=$(SNIP_TEST_FEW=4 "$work/t" --hash)
    [ -n "$expected" ] || expected=$got
    : > "$log"
    if [ "$got" = "$expected" ]; then ok; else fail "$*: $got, expected $expected"; fi
}
digest gcc -O2 -DSNIP_NO_SIMD
digest gcc -O0
digest gcc -Ofast -march=native
digest g++ -O2 -std=c++11 -fopenmp
digest clang -Ofast -march=native
digest clang++ -O2 -std=c++17

fast="-Ofast -march=native"
for cc in gcc clang; do
    have $cc || { skip "$cc: not installed"; continue; }
    for t in errors linear protocol estimates plan state inside; do
        if ! make -s B="$work/$cc" CC=$cc TEST_CFLAGS="$fast" TEST_LIB_CFLAGS="$fast" "$work/$cc/test_$t" > "$log" 2>&1; then
            fail "to build test_$t: $cc $fast"
            continue
        fi
        if "$work/$cc/test_$t" > "$log"; then ok; else fail "test_$t, $cc $fast"; fi
    done
done
finish
