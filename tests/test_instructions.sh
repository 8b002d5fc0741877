#!/usr/bin/env bash
# test_instructions.sh - which functions the instructions of AMX, AVX512-BF16 and (AVX-)VNNI are in: their kernels alone,
# which nothing calls but through a table of functions. Compilers too old for them, and SNIP_NO_AMX, leave them out; and
# what snip says to be available is what the kernel says of the processor. Run from the project's folder.
. "$(dirname "$0")/lib.sh"
[ "$(uname -m)" = x86_64 ] || { skip "not x86-64"; finish; }
have objdump || { skip "no objdump"; finish; }

# an instruction, and a word in the names of the functions that may hold it
cat > "$work/places" << 'END'
vdpbf16ps bf16
tdpbf16ps bf16
tdpbssd s8
tileloadd amx
tilestored amx
tilezero amx
{vex}vpdpbusd avx_vnni
vpdpbusd vnni
ldtilecfg tile
tilerelease tile
END
build() { "$@" -w -c -x c -DSNIP_IMPLEMENTATION snip.h -o "$work/snip.o" 2> "$log" || { fail "to build: $*"; return 1; }; }
# "instruction function" of every instruction that needs more than AVX-512 F, BW, DQ, VL
list() {
    objdump -d --no-show-raw-insn "$work/snip.o" | awk '
        /^[0-9a-f]+ <.*>:$/ { f = substr($2, 2, length($2) - 3) }
        { i = $2 == "{vex}" ? $2 $3 : $2 }
        i ~ /^(\{vex\})?(ldtilecfg|sttilecfg|tile|tdp|tcmm|vdpbf16|vcvtne|vpdp|vpmadd52)/ { print i, f }' | sort -u > "$work/list"
}
only() {                            # what, words of the functions that may hold late instructions, or nothing
    awk -v words="$2" '$2 !~ words' "$work/list" > "$log"
    if [ -s "$log" ] || [ ! -s "$work/list" ]; then fail "$1"; else ok; fi
}
cat > "$work/isa.c" << 'END'
#include "snip.h"
int main(void) {
    for (int i = SNIP_ISA_AVX2; i <= SNIP_ISA_AMX; i++)
        if (snip_isa_available((snip_isa)i)) printf("%s ", snip_isa_name((snip_isa)i));
    return 0;
}
END
has() { for flag; do grep -qw "$flag" /proc/cpuinfo || return 1; done; }
processor() {                       # names of the instruction sets that the kernel's flags amount to; AMX aside
    local avx512="avx512f avx512bw avx512dq avx512vl"
    has avx2 fma && printf "avx2 "
    has avx2 fma avx_vnni && printf "avx-vnni "
    has fma $avx512 && printf "avx512 "
    has fma $avx512 avx512_vnni && printf "avx512-vnni "
    has fma $avx512 avx512_vnni avx512_bf16 && printf "avx512-bf16 "
}

for cc in gcc clang; do
    have $cc || { skip "no $cc"; continue; }
    for flags in -O2 "-Ofast -masm=intel"; do
        build $cc $flags || continue
        list
        awk 'NR == FNR { word[$1] = $2; next } !($1 in word) || index($2, word[$1]) == 0' "$work/places" "$work/list" > "$log"
        if [ -s "$log" ]; then fail "$cc $flags: instructions elsewhere"; else ok; fi
        awk 'NR == FNR { seen[$1] = 1; next } !($1 in seen)' "$work/list" "$work/places" > "$log"
        if [ -s "$log" ]; then fail "$cc $flags: instructions that are lacking"; else ok; fi
        # functions that hold them, but those that set up and release tiles, called by name
        awk '$1 !~ /tilecfg|tilerelease/ { print $2 }' "$work/list" | sort -u > "$work/functions"
        objdump -dr --no-show-raw-insn "$work/snip.o" | grep -E '(call|jmp) ' | grep -v '+0x' |
            grep -wFf "$work/functions" > "$log"
        if [ -s "$log" ]; then fail "$cc $flags: called directly"; else ok; fi
    done
    if $cc -w -I. "$work/isa.c" "$work/snip.o" -lm -o "$work/isa" 2> "$log"; then
        got=$("$work/isa")
        case $got in *"amx "*) has amx_tile amx_int8 amx_bf16 || fail "AMX without its flags" ;; esac
        if [ "${got%amx }" = "$(processor)" ]; then ok; else fail "$cc: available: $got, of the processor: $(processor)"; fi
    else fail "to link: isa.c"; fi
    if [ $cc = gcc ] && build $cc -O1 -DSNIP_NO_AMX; then list; only "$cc -DSNIP_NO_AMX" 's8_vnni'; fi
    case $cc in gcc) old="-U__GNUC__ -D__GNUC__=11" ;; *) old="-U__clang_major__ -D__clang_major__=12" ;; esac
    if build $cc -O1 $old; then list; only "$cc $old" 's8_vnni'; fi
done
finish
