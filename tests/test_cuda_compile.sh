#!/usr/bin/env bash
# test_cuda_compile.sh - snip_cuda.cuh and the trainer's kernels under nvcc: no warnings and no spilled registers on any
# architecture, the instructions meant for it, every program that is compiled for a GPU. Needs no GPU.
#     ARCHS=...      architectures ("75 80 89 90a 100a 103a 120a")
#     PROGRAMS=...   of examples/minimal.cu bench/bench_cuda.cu tests/test_cuda.cpp tests/test_cuda_attention.cpp
#     JOBS=n         compilers at a time (as many as there are cores)
set -u
cd "$(dirname "$0")/.." || exit 2
if ! command -v nvcc > /dev/null; then
    echo "skipped: nvcc is not installed"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); }
skip() { echo "skipped: $*"; skipped=$((skipped + 1)); }
fail() {                # what, its log
    echo "FAILED: $1"
    [ $# -lt 2 ] || grep -E 'error|warning|FAILED' "$2" | head -5
    failed=$((failed + 1))
}
wait_for_a_core() { while [ "$(jobs -r | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n; done; }

# ---- sources ----
printf '#define SNIP_IMPLEMENTATION\n#include "snip_cuda.cuh"\n#include "snip_cuda.cuh"\n' > "$dir/implementation.cu"

# A caller that a host compiler takes, and what is refused without asking the device.
cat > "$dir/caller.cpp" <<'CPP'
#include "snip_cuda.cuh"
#ifdef SNIP_CUBLASLT
static snip_status gemm(const snip_recipe *recipe, int64_t ldc, size_t short_of, void *handle) {
    static char memory[1024] __attribute__((aligned(256)));
    snip_operand o = snip_operand();
    o.recipe = recipe;
    o.codes = o.scales = memory;
    return snip_cuda_gemm_cublaslt((cublasLtHandle_t)handle, 16, 16, 128, &o, &o, (float *)(void *)memory, ldc, 0,
                                   memory, snip_cuda_cublaslt_scratch(16, 16, 128) - short_of, 0);
}
static bool refuses() {
    const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp4 = SNIP_RECIPE_FP4_TILE;
    int handle = 0;
    return gemm(&fp8, 16, 0, NULL) == SNIP_BAD_ARGUMENT && gemm(&fp8, 16, 1, &handle) == SNIP_BAD_ARGUMENT &&
           gemm(&fp8, 17, 0, &handle) == SNIP_UNSUPPORTED && gemm(&fp4, 16, 0, &handle) == SNIP_UNSUPPORTED;
}
#else
static bool refuses() { return true; }
#endif
int main() { return snip_cuda_quantize(0, SNIP_CUDA_PACKED, 0, 0, 0, 0) != SNIP_BAD_ARGUMENT || !refuses(); }
CPP

# Macros of other headers, after which no name of snip_cuda.cuh may be one of theirs. snip.h is tested by itself.
cat > "$dir/macros.cu" <<'CU'
#include <cuda.h>
#include <cuda_runtime.h>
#ifdef SNIP_CUBLASLT
#    include <cublasLt.h>
#endif
#include <type_traits>
#define SNIP_IMPLEMENTATION
#include "snip.h"
#include "tests/hostile_macros.h"
#include "snip_cuda.cuh"
CU

# Instructions of a cubin: the low 12 bits of each 16 bytes of code.
cat > "$dir/opcodes.py" <<'PY'
import struct, sys
names = { 0x27a: 'QMMA', 0x23c: 'HMMA', 0x237: 'IMMA', 0x9f3: 'QGMMA', 0x9f1: 'IGMMA', 0x83b: 'LDSM' }
tcgen05 = { 1: 'UTCIMMA', 3: 'UTCQMMA' }        # 5ea; the kind is in bits 72 to 74
file = open(sys.argv[1], 'rb').read()
table, = struct.unpack_from('<Q', file, 0x28)
size, count, strings = struct.unpack_from('<HHH', file, 0x3A)
sections = [struct.unpack_from('<IIQQQQIIQQ', file, table + i * size) for i in range(count)]
found = set()
for section in sections:
    name = file[sections[strings][4] + section[0]:].split(b'\0', 1)[0].decode()
    if not name.startswith('.text.'):
        continue
    code = file[section[4]:section[4] + section[5]]
    for low, high in (struct.unpack_from('<QQ', code, i) for i in range(0, len(code), 16)):
        opcode = low & 0xfff
        found.add(tcgen05.get(high >> 8 & 7) if opcode == 0x5ea else names.get(opcode))
print(' '.join(sorted(found - { None })))
PY

instructions_of() {     # architecture: those meant for it
    case $1 in
        75) echo ;;
        89 | 120a) echo "HMMA IMMA LDSM QMMA" ;;
        90a) echo "HMMA IGMMA IMMA LDSM QGMMA" ;;
        100a) echo "HMMA IMMA LDSM UTCIMMA UTCQMMA" ;;
        100f | 103a) echo "HMMA IMMA LDSM UTCQMMA" ;;
        *) echo "HMMA IMMA LDSM" ;;
    esac
}

# ---- all architectures; a failure leaves no cubin ----
warnings="-Werror all-warnings -Xptxas -v,-Werror,-warn-spills,-warn-lmem-usage"
for arch in ${ARCHS=75 80 89 90a 100a 103a 120a}; do
    wait_for_a_core
    nvcc -std=c++17 -I. -cubin -gencode arch=compute_$arch,code=sm_$arch $warnings examples/train_llama.cu \
        -o "$dir/$arch.cubin" > "$dir/$arch.log" 2>&1 &
done

# ---- programs, without optimization ----
# The implementation by nvcc and a caller by the host compiler, with cuBLASLt if it is there; examples with that
# implementation; and those that take what is private, whole.
fast="-I. -arch=sm_75 -Xcicc -O0 -Xptxas -O0 -Werror all-warnings"
cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
lt=-DSNIP_CUBLASLT link=-lcublasLt
if [ ! -f "$cuda/include/cublasLt.h" ]; then
    lt='' link=''
    skip "SNIP_CUBLASLT, cuBLASLt is not installed"
fi
compile() {             # name, arguments: $dir/NAME, of which a failure leaves none
    local name=$1
    shift
    wait_for_a_core
    "$@" -o "$dir/$name" > "$dir/$name.log" 2>&1 &
}
compile implementation.o nvcc -std=c++17 $fast $lt -c "$dir/implementation.cu"
compile caller.o ${CXX:-g++} -std=c++11 -Wall -Wextra -Werror -I. $lt -isystem "$cuda/include" -c "$dir/caller.cpp"
compile macros.o nvcc -std=c++20 --use_fast_math $fast $lt -c "$dir/macros.cu"
wait
once="-DSNIP_IMPLEMENTATION_DONE -DSNIP_CUDA_IMPLEMENTATION_DONE $dir/implementation.o $link"
compile caller nvcc -arch=sm_75 "$dir/implementation.o" "$dir/caller.o" $link
compile train_llama nvcc -std=c++17 $fast examples/train_llama.cu
for source in ${PROGRAMS=examples/minimal.cu bench/bench_cuda.cu tests/test_cuda.cpp tests/test_cuda_attention.cpp}; do
    case $source in
        examples/*) how=$once ;;
        bench/*) how="$lt $link" ;;
        *) how="-x cu $lt $link" ;;
    esac
    compile "$(basename "$source")" nvcc -std=c++17 $fast $how "$source"
done
wait

# ---- what came of it ----
for arch in $ARCHS; do
    if [ ! -f "$dir/$arch.cubin" ]; then
        fail "sm_$arch" "$dir/$arch.log"
        continue
    fi
    ok
    if ! command -v python3 > /dev/null; then
        skip "instructions of sm_$arch, no python3"
        continue
    fi
    got=$(python3 "$dir/opcodes.py" "$dir/$arch.cubin")
    want=$(instructions_of "$arch")
    if [ "$got" = "$want" ]; then ok; else fail "sm_$arch: instructions '$got', expected '$want'"; fi
done

if [ -f "$dir/macros.o" ]; then ok; else fail "C++20, fast math, other headers' macros" "$dir/macros.o.log"; fi

# With a GPU a program runs, without one it says so.
runs() {                # name, arguments
    local name=$1
    shift
    if [ ! -x "$dir/$name" ]; then
        fail "$name does not compile" "$dir/$name.log"
    elif "$dir/$name" "$@" > "$dir/log" 2>&1 || grep -qE '^[a-z_]+: no GPU was found$' "$dir/log"; then
        ok
    else
        fail "$name: $(head -1 "$dir/log")" "$dir/log"
    fi
}
runs caller
runs train_llama --data examples/minimal.c --steps 2 --quiet --out "$dir/out"
for source in $PROGRAMS; do runs "$(basename "$source")"; done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
