#!/usr/bin/env bash
# test_frames.sh - no function of the implementation has a frame of more than 16 KB, or one whose size is not known, under
# gcc and clang (-fstack-usage). Without optimization kernels keep all their registers on the stack: not looked at.
. "$(dirname "$0")/lib.sh"
most=16384
cd "$work" || exit 2
frames() {                          # compiler, bound, flags...
    local cc=$1 bound=$2
    shift 2
    rm -f ./*.su
    if ! "$cc" -std=c99 -w "$@" -DSNIP_IMPLEMENTATION -fstack-usage -x c -c "$root/snip.h" -o snip.o > "$log" 2>&1; then fail "$cc $*"; return; fi
    awk -F'\t' -v bound="$bound" '$2 > bound || $3 !~ /static|bounded/' ./*.su > "$log"
    if [ -s "$log" ] || ! ls ./*.su > /dev/null 2>&1; then fail "$cc $*: large frames" 10; else ok; fi
    echo "$cc $*: $(sort -t'	' -k2 -n -r ./*.su | head -1 | cut -f1,2)"
}
echo 'int f(int n); void g(char *); int f(int n) { char a[20000]; g(a); return a[n]; }' > canary.c
for cc in gcc clang; do
    if ! have $cc || ! $cc -fstack-usage -c canary.c -o canary.o 2> /dev/null || [ ! -s canary.su ]; then skip "$cc: no -fstack-usage"; continue; fi
    awk -F'\t' -v bound=$most '$2 > bound' canary.su > "$log"
    if [ -s "$log" ]; then ok; else fail "$cc: a large frame is not noticed"; fi
    rm -f canary.su
    frames $cc $most -O2
    frames $cc $most -O3 -march=native
    frames $cc $most -O1 -DSNIP_NO_SIMD
done
finish
