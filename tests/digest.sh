#!/bin/sh
# digest.sh - compares the results of two versions of snip.h, bit by bit, on every instruction set of this machine.
#     tests/digest.sh OLD NEW [part ...]      OLD, NEW: folders with a snip.h; parts: see digest.c
# Prints the lines that differ and ends with "N passed, N failed, N skipped". Subjects that end in "*" may differ: they
# are shown and count as skipped. FLAGS (-O2) and CC in the environment.
set -eu
tests=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
old=$1 new=$2
shift 2
for side in old new; do
    [ $side = old ] && folder=$old || folder=$new
    { ${CC:-cc} -std=c99 ${FLAGS:--O2} -w -I "$folder" "$tests/digest.c" -o "$dir/$side" -lm && "$dir/$side" "$@" > "$dir/$side.txt"; } &
    eval "$side=$!"
done
wait "$old" && wait "$new"
awk '
    /^#/ { next }
    NR == FNR { hash[$1 " " $2] = $3; next }
    { seen[$1 " " $2] = 1 }
    !(($1 " " $2) in hash) { skipped++; fresh[$1]++; next }
    hash[$1 " " $2] == $3 { passed++; next }
    $2 ~ /\*$/ { skipped++; print "differs, and may: " $1 " " $2; next }
    { failed++; print "FAILED: " $1 " " $2 " differs" }
    END {
        for (isa in fresh) print "not in the old one: " fresh[isa] " of " isa
        for (name in hash) if (!(name in seen)) { failed++; print "FAILED: " name " is missing" }
        print passed + 0 " passed, " failed + 0 " failed, " skipped + 0 " skipped"
        exit failed > 0 || passed == 0
    }' "$dir/old.txt" "$dir/new.txt"
