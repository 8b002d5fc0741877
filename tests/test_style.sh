#!/usr/bin/env bash
# test_style.sh - C, C++ and CUDA sources keep to 120 columns, spaces alone, no blanks at the ends of lines, a newline at
# the end of the file, and to what may stand in them.
. "$(dirname "$0")/lib.sh"
cd "$root" || exit 2
export LC_ALL=C.UTF-8
sources=$(ls ./*.h ./*.cuh examples/*.[hc]* tests/*.[hc]* bench/*.[hc]* | grep -E '\.(h|c|cpp|cuh|cu)$')
none() {                            # what, extended regular expression, files...
    local what=$1 pattern=$2
    shift 2
    grep -nE -e "$pattern" "$@" | cut -c 1-100 > "$log"
    if [ -s "$log" ]; then fail "$what: $(wc -l < "$log") lines" 10; else ok; fi
}
[ "$(echo $sources | wc -w)" -gt 30 ] && ok || fail "sources are found"
for file in $sources; do none "$file: more than 120 columns" '^.{121}' "$file"; done
none "tabs" '	' $sources
none "blanks at the ends of lines" '[ 	]$' $sources Makefile tests/*.sh tests/*.py .ci/run
none "what is left for later" '\b(TODO|FIXME|XXX|HACK)\b' $(echo $sources | tr ' ' '\n' | grep -v tests/)
for file in $sources; do [ -z "$(tail -c 1 "$file")" ] || echo "$file"; done > "$log"
if [ -s "$log" ]; then fail "no newline at the end"; else ok; fi
finish
