#!/bin/sh
# figures.sh - how a source reads: bytes, lines, bytes a line, share of blank lines, longest line and the longest function
# in lines, of files formatted by clang-format.
#     tests/figures.sh snip.h snip_ilp.h ...
printf '%-16s %8s %6s %11s %7s %8s %13s  %s\n' file bytes lines bytes/line blank longest 'over 120 col' 'longest function'
for file in "$@"; do
    awk -v file="$(basename "$file")" -v over="$(LC_ALL=C.UTF-8 grep -cE '^.{121}' "$file")" '
        { bytes += length($0) + 1 }
        length($0) > widest { widest = length($0) }
        /^[ \t]*$/ { blank++ }
        /^[^ \t#}\/].*\{([ \t]*\/\/.*)?$/ { begin = NR; name = $0 }
        /^}/ && begin { if (name ~ /\(/ && NR - begin + 1 > most) { most = NR - begin + 1; of = name } begin = 0 }
        END {
            sub(/\(.*/, "", of); sub(/.*[ *]/, "", of)
            printf "%-16s %8d %6d %11.1f %6.1f%% %8d %13d  %d: %s\n", file, bytes, NR, bytes / NR, 100 * blank / NR, widest, over, most, of
        }' "$file"
done
