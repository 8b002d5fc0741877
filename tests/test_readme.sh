#!/usr/bin/env bash
# test_readme.sh - the C code blocks of README.md compile as they stand there, and the smallest example runs.
#     tests/test_readme.sh [MINIMAL]      MINIMAL: the built examples/minimal.c; without an argument it is built
. "$(dirname "$0")/lib.sh"
cc=${CC:-cc}
awk -v work="$work" '/^```c$/ { n++; on = 1; next } /^```$/ { on = 0 } on { print > (work "/block" n ".c") }' "$root/README.md"
for block in "$work"/block*.c; do
    [ -f "$block" ] || { : > "$log"; fail "README.md has no code"; break; }
    { printf '#define SNIP_IMPLEMENTATION\n#include "snip.h"\n'
      cat "$root/tests/readme_names.h"
      if grep -q 'int main' "$block"; then cat "$block"; else printf 'int main(void) {\n%s\nreturn 0;\n}\n' "$(cat "$block")"; fi
    } > "$work/program.c"
    try "README.md, $(basename "$block" .c)" "$cc" -std=c99 -Wall -Wextra -Werror -Wno-unused -I"$root" "$work/program.c" -o "$work/program" -lm
done
minimal=${1:-$work/minimal}
[ $# -gt 0 ] || try "minimal.c compiles" "$cc" -std=c99 -O2 "$root/examples/minimal.c" -o "$minimal" -lm
try "minimal.c runs" "$minimal"
if grep -q 'FP4 7[5-9]%' "$log" && grep -q 'up' "$log"; then ok; else fail "minimal.c trains under a plan"; fi
finish
