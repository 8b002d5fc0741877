#!/usr/bin/env bash
# snip_cuda.cuh and the trainer's kernels under nvcc: no warnings and no spilled registers on any architecture, and the instructions meant for it.
set -u
cd "$(dirname "$0")/.."
if ! command -v nvcc > /dev/null; then
    echo "skipped: nvcc is not installed"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
printf '#define SNIP_IMPLEMENTATION\n#include "snip_cuda.cuh"\n#include "snip_cuda.cuh"\n' > "$dir/a.cu"
cat > "$dir/b.cpp" <<'CPP'
#include "snip_cuda.cuh"
#ifdef SNIP_CUBLASLT            // what it refuses without asking cuBLASLt
static snip_status lt(const snip_recipe *r, int64_t ldc, size_t short_of, void *handle) {
    static char memory[1024] __attribute__((aligned(256)));
    snip_operand o = snip_operand();
    o.recipe = r; o.codes = o.scales = memory;
    return snip_cuda_gemm_cublaslt((cublasLtHandle_t)handle, 16, 16, 128, &o, &o, (float *)(void *)memory, ldc, 0, memory, snip_cuda_cublaslt_scratch(16, 16, 128) - short_of, 0);
}
static bool refuses() {
    const snip_recipe fp8 = SNIP_RECIPE_FP8_TILE, fp4 = SNIP_RECIPE_FP4_TILE;
    int some = 0;
    return lt(&fp8, 16, 0, NULL) == SNIP_BAD_ARGUMENT && lt(&fp8, 16, 1, &some) == SNIP_BAD_ARGUMENT && lt(&fp8, 17, 0, &some) == SNIP_UNSUPPORTED && lt(&fp4, 16, 0, &some) == SNIP_UNSUPPORTED;
}
#else
static bool refuses() { return true; }
#endif
int main() { return snip_cuda_quantize(0, SNIP_CUDA_PACKED, 0, 0, 0, 0) != SNIP_BAD_ARGUMENT || !refuses(); }
CPP
ok() { passed=$((passed + 1)); }
fail() { echo "FAILED: $*"; failed=$((failed + 1)); }

# Instructions by kernel: the low 12 bits of each 16 bytes of code.
cat > "$dir/opcodes.py" <<'PY'
import struct, sys
names = { 0x27a: 'QMMA', 0x23c: 'HMMA', 0x237: 'IMMA', 0x9f3: 'QGMMA', 0x9f1: 'IGMMA', 0x83b: 'LDSM' }
utcmma = { 1: 'UTCIMMA', 3: 'UTCQMMA' }         # 5ea; the kind is in bits 72 to 74
b = open(sys.argv[1], 'rb').read()
table, = struct.unpack_from('<Q', b, 0x28)
size, count, strings = struct.unpack_from('<HHH', b, 0x3A)
sections = [struct.unpack_from('<IIQQQQIIQQ', b, table + i * size) for i in range(count)]
found = set()
for s in sections:
    name = b[sections[strings][4] + s[0]:].split(b'\0', 1)[0].decode()
    if name.startswith('.text.'):
        code = b[s[4]:s[4] + s[5]]
        words = [struct.unpack_from('<QQ', code, i) for i in range(0, len(code), 16)]
        found |= { utcmma.get(high >> 8 & 7) if low & 0xfff == 0x5ea else names.get(low & 0xfff) for low, high in words }
print(' '.join(sorted(found - { None })))
PY

archs=${ARCHS:-75 80 89 90a 100a 103a 120a}
for arch in $archs; do                      # JOBS at a time; a failure leaves no cubin
    while [ "$(jobs -r | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n; done
    nvcc -std=c++17 -I. -cubin -gencode arch=compute_$arch,code=sm_$arch -Werror all-warnings -Xptxas -v,-Werror,-warn-spills,-warn-lmem-usage examples/train_llama.cu -o "$dir/$arch.cubin" > "$dir/$arch.log" 2>&1 &
done
wait
for arch in $archs; do
    case $arch in
        75) want= ;;
        89 | 120a) want="HMMA IMMA LDSM QMMA" ;;
        90a) want="HMMA IGMMA IMMA LDSM QGMMA" ;;
        100a) want="HMMA IMMA LDSM UTCIMMA UTCQMMA" ;;
        100f | 103a) want="HMMA IMMA LDSM UTCQMMA" ;;
        *) want="HMMA IMMA LDSM" ;;
    esac
    if [ -f "$dir/$arch.cubin" ]; then ok; else fail "sm_$arch"; grep -E 'error|warning' "$dir/$arch.log" | head -5; continue; fi
    if ! command -v python3 > /dev/null; then
        echo "skipped: opcodes of sm_$arch, no python3"
        skipped=$((skipped + 1))
        continue
    fi
    got=$(python3 "$dir/opcodes.py" "$dir/$arch.cubin")
    if [ "$got" = "$want" ]; then ok; else fail "sm_$arch: opcodes '$got', expected '$want'"; fi
done
# Programs: the implementation by nvcc and a caller by the host compiler, with cuBLASLt if it is there; an example with that
# implementation, and those that take what is private, whole. Most want a GPU.
cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
fast="-std=c++17 -I. -arch=sm_75 -Xcicc -O0 -Xptxas -O0 -Werror all-warnings"
lt=-DSNIP_CUBLASLT link=-lcublasLt
if [ ! -f "$cuda/include/cublasLt.h" ]; then lt= link= skipped=$((skipped + 1)); echo "skipped: SNIP_CUBLASLT, cuBLASLt is not installed"; fi
if nvcc $fast $lt -c "$dir/a.cu" -o "$dir/a.o" > "$dir/log" 2>&1 &&
   ${CXX:-g++} -std=c++11 -Wall -Wextra -Werror -I. $lt -isystem "$cuda/include" -c "$dir/b.cpp" -o "$dir/b.o" > "$dir/log" 2>&1 &&
   nvcc -arch=sm_75 "$dir/a.o" "$dir/b.o" $link -o "$dir/program" > "$dir/log" 2>&1; then ok; else fail "a program of two files"; head -5 "$dir/log"; fi
if "$dir/program" > "$dir/log" 2>&1; then ok; else fail "a program of two files: what it refuses"; head -5 "$dir/log"; fi
once="-DSNIP_IMPLEMENTATION_DONE -DSNIP_CUDA_IMPLEMENTATION_DONE $dir/a.o $link"
for source in ${PROGRAMS:-examples/minimal.cu bench/bench_cuda.cu tests/test_cuda.cpp tests/test_cuda_attention.cpp}; do
    case $source in examples/*) how=$once ;; bench/*) how="$lt $link" ;; *) how="-x cu $lt $link" ;; esac
    if nvcc $fast $how "$source" -o "$dir/program" > "$dir/log" 2>&1 &&
       { "$dir/program" > "$dir/log" 2>&1 || grep -qx 'minimal: no GPU was found' "$dir/log"; }; then ok; else fail "$source"; head -5 "$dir/log"; fi
done
# With a GPU the examples run, without one they say so.
if nvcc $fast examples/train_llama.cu -o "$dir/program" > "$dir/log" 2>&1 &&
   { "$dir/program" --data examples/minimal.c --steps 2 --quiet --out "$dir/out" > "$dir/log" 2>&1 || grep -qx 'train_llama: no GPU was found' "$dir/log"; }; then ok; else fail "examples/train_llama.cu"; head -5 "$dir/log"; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
