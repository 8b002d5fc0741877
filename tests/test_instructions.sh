#!/bin/sh
# Which functions the instructions of AMX, AVX512-BF16 and (AVX-)VNNI are in: their kernels alone, which nothing calls but through
# snipi_kernels_of's table. Compilers too old for them, and SNIP_NO_AMX, leave them out; and what snip says to be available
# is what the kernel says of the processor. Run from the project's folder.
set -u
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); }
fail() { echo "FAILED: $*"; failed=$((failed + 1)); }
skip() { echo "skipped: $*"; skipped=$((skipped + 1)); }
finish() { echo "$passed passed, $failed failed, $skipped skipped"; [ "$failed" = 0 ]; exit; }
[ "$(uname -m)" = x86_64 ] || { skip "not x86-64"; finish; }
command -v objdump > /dev/null || { skip "no objdump"; finish; }

build() { "$@" -w -c -x c -DSNIP_IMPLEMENTATION snip.h -o "$dir/snip.o" 2> "$dir/log" || { fail "to build: $*: $(head -1 "$dir/log")"; return 1; }; }
# "count function instruction" of every instruction that needs more than AVX-512 F, BW, DQ, VL
list() {
    objdump -d --no-show-raw-insn "$dir/snip.o" | awk '
        /^[0-9a-f]+ <.*>:$/ { f = substr($2, 2, length($2) - 3) }
        { i = $2 == "{vex}" ? $2 $3 : $2 }
        i ~ /^(\{vex\})?(ldtilecfg|sttilecfg|tile|tdp|tcmm|vdpbf16|vcvtne|vpdp|vpmadd52)/ { n[f " " i]++ }
        END { for (k in n) print n[k], k }' | sort -k2 > "$dir/list"
}
cat > "$dir/expected" << 'END'
24 snipi_kernel_bf16_avx512 vdpbf16ps
4 snipi_kernel_bf16_amx tdpbf16ps
4 snipi_kernel_bf16_amx tileloadd
4 snipi_kernel_bf16_amx tilestored
4 snipi_kernel_bf16_amx tilezero
4 snipi_kernel_s8_amx tdpbssd
4 snipi_kernel_s8_amx tileloadd
4 snipi_kernel_s8_amx tilestored
4 snipi_kernel_s8_amx tilezero
12 snipi_kernel_s8_avx_vnni {vex}vpdpbusd
24 snipi_kernel_s8_vnni vpdpbusd
1 snipi_tiles_begin ldtilecfg
1 snipi_tiles_end tilerelease
END
cut -d' ' -f2- "$dir/expected" | sort > "$dir/expected_names"
cat > "$dir/isa.c" << 'END'
#include "snip.h"
int main(void) {
    int i;
    for (i = SNIP_ISA_AVX2; i <= SNIP_ISA_AMX; i++) if (snip_isa_available((snip_isa)i)) printf("%s ", snip_isa_name((snip_isa)i));
    return 0;
}
END
late='snipi_kernel_(bf16|s8_amx|s8_avx_vnni|s8_vnni)|snipi_tiles'
for cc in gcc clang; do
    command -v $cc > /dev/null || { skip "no $cc"; continue; }
    for flags in -O2 "-Ofast -masm=intel"; do
        build $cc $flags || continue
        list
        # GCC duplicates a product here and there; the pairs of function and instruction are what counts, and no product may be missing
        cut -d' ' -f2- "$dir/list" > "$dir/names"
        if diff "$dir/expected_names" "$dir/names" > "$dir/diff"; then ok; else fail "$cc $flags: $(grep '^[<>]' "$dir/diff" | head -3 | tr '\n' ';')"; fi
        short=$(sort -k2 "$dir/list" | awk 'NR == FNR { n[$2 " " $3] = $1; next } n[$2 " " $3] < $1' "$dir/list" "$dir/expected")
        if [ -z "$short" ]; then ok; else fail "$cc $flags: fewer than $short"; fi
        if objdump -dr --no-show-raw-insn "$dir/snip.o" | grep -E "(call|jmp) .*<($late)[a-z0-9_]*>" | grep -v '+0x' > "$dir/calls"; then fail "$cc $flags: called directly: $(head -1 "$dir/calls")"; else ok; fi
    done
    $cc -w -I. "$dir/isa.c" "$dir/snip.o" -lm -o "$dir/isa" || { fail "to link: isa.c"; continue; }
    has() { for flag; do grep -qw "$flag" /proc/cpuinfo || return 1; done; }
    want=
    avx512="avx512f avx512bw avx512dq avx512vl"
    has avx2 fma && want="$want"avx2" "
    has avx2 fma avx_vnni && want="$want"avx-vnni" "
    has fma $avx512 && want="$want"avx512" "
    has fma $avx512 avx512_vnni && want="$want"avx512-vnni" "
    has fma $avx512 avx512_vnni avx512_bf16 && want="$want"avx512-bf16" "
    got=$("$dir/isa")
    case $got in *"amx "*) has amx_tile amx_int8 amx_bf16 || fail "AMX without its flags" ;; esac
    if [ "${got%amx }" = "$want" ]; then ok; else fail "$cc: available: $got, of the processor: $want"; fi
    [ $cc = gcc ] && build $cc -O1 -DSNIP_NO_AMX && { list; if [ "$(cut -d' ' -f2 "$dir/list" | sort -u)" = snipi_kernel_s8_vnni ]; then ok; else fail "$cc -DSNIP_NO_AMX: $(head -1 "$dir/list")"; fi; }
    case $cc in gcc) old="-U__GNUC__ -D__GNUC__=11" ;; *) old="-U__clang_major__ -D__clang_major__=12" ;; esac
    build $cc -O1 $old && { list; if [ "$(cut -d' ' -f2 "$dir/list" | sort -u)" = snipi_kernel_s8_vnni ]; then ok; else fail "$cc $old: $(head -1 "$dir/list")"; fi; }
done
finish
