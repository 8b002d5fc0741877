#!/usr/bin/env bash
# readme_code.sh - compiles the C code blocks of README.md and the quick start of snip.h's head as they stand there.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk '/^```c$/ { n++; on = 1; next } /^```$/ { on = 0 } on { print > ("'"$work"'/block" n ".c") }' "$here/README.md"
count=0
for block in "$work"/block*.c; do
    count=$((count + 1))
    { printf '#define SNIP_IMPLEMENTATION\n#include "snip.h"\n'
      cat "$here/tests/readme_names.h"
      if grep -q 'int main' "$block"; then cat "$block"; else printf 'int main(void) {\n'; cat "$block"; printf 'return 0;\n}\n'; fi
    } > "$work/program.c"
    "${CC:-cc}" -std=c99 -Wall -Wextra -Werror -Wno-unused -I"$here" "$work/program.c" -o "$work/program" -lm
done
[ $count -gt 0 ]
echo "README.md: $count code blocks compile"
