#!/usr/bin/env bash
# Plants one fault after another in a copy of snip_cuda.cuh - each barrier removed in turn, wrong phases, wrong lanes -
# and demands that the tests notice each. One fault in EVERY (4); EVERY=1: all of them.
set -u
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 count=0
mkdir "$dir/tests"
cp snip.h snip_ilp.h "$dir"
cp snip_cuda.cuh "$dir/whole.cuh"
cp tests/test_cuda.cpp tests/cuda_shim.h tests/codec_tables.h "$dir/tests"
try() {                 # what, sed command, part of the tests
    count=$((count + 1))
    [ $((count % ${EVERY:-4})) = 0 ] || return
    sed -E "$2" "$dir/whole.cuh" > "$dir/snip_cuda.cuh"
    if cmp -s "$dir/whole.cuh" "$dir/snip_cuda.cuh"; then
        echo "FAILED: nothing to change for: $1"
        failed=$((failed + 1))
    elif ! ${CXX:-g++} -O0 -std=c++17 -w "$dir/tests/test_cuda.cpp" -o "$dir/t" -lm 2> "$dir/log"; then
        echo "FAILED to build: $1"
        head -3 "$dir/log"
        failed=$((failed + 1))
    elif timeout 300 "$dir/t" --stop $3 > "$dir/log" 2>&1; then
        echo "FAILED: not noticed: $1"
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
}
gemms=$(grep -n '>>cuda-gemm-impl ---' "$dir/whole.cuh" | cut -d: -f1) session=$(grep -n '>>cuda-session-impl ---' "$dir/whole.cuh" | cut -d: -f1)
for line in $(grep -n '__syncthreads();' "$dir/whole.cuh" | cut -d: -f1); do
    if [ $line -lt $gemms ]; then part=quantize; elif [ $line -lt $session ]; then part=gemm; else part=session; fi
    try "line $line, no barrier" "${line}s/__syncthreads\(\);/;/" $part
done
try "half a warp's maximum" 's/for \(int o = 1; o < lanes; o/for (int o = 2; o < lanes; o/' quantize
try "signs of another lane" 's/words\[w\], group\)/words[w], group ^ 1)/' noise
try "producers begin in the wrong phase" 's/int stage = 0, parity = 1;/int stage = 0, parity = 0;/' gemm
try "consumers begin in the wrong phase" 's/int stage = 0, parity = 0;/int stage = 0, parity = 1;/' gemm
try "the phase never turns" 's/stage = 0; parity \^= 1;/stage = 0;/' gemm
try "a stage is read before it is full" 's/snipi_ptx_barrier_wait\(&shared->full\[stage\], parity\);//' gemm
try "a stage is filled before it is empty" 's/snipi_ptx_barrier_wait\(&shared->empty\[stage\], parity\);//' gemm
try "a stage is released before its products are done" 's/^( *)snipi_ptx_wgmma_end\(d\);/if (lane == 0) snipi_ptx_barrier_arrive(\&shared->empty[stage]); snipi_ptx_wgmma_end(d);/; s/^( *)if \(lane == 0\) snipi_ptx_barrier_arrive\(&shared->empty\[stage\]\);//' gemm
try "full does not wait for the scales" 's/full\[s\], 128 \+ 1\)/full[s], 1)/' gemm
try "scales of the wrong block" 's/shared.scale\[t \/ 2 & 1\]\[0\]/shared.scale[0][0]/' gemm
try "fragments of the wrong rows" 's/lane % 8 \+ lane \/ 16 \* 8/lane % 8 + lane \/ 8 % 2 * 8/' gemm
try "a BF16 tile is stored where it is read" 's/\*snipi_mma_chunk\(tile\[\(t \+ 1\) & 1\]\[f/*snipi_mma_chunk(tile[t \& 1][f/' gemm
try "a step is read before it has come" 's/if \(cudaEventSynchronize\(e->done\) != cudaSuccess\)/if (0)/' session
try "the plan is switched a step early" 's/c->read <= c->step - 1 - c->lag/c->read <= c->step - c->lag/' session
try "one step's random numbers for ever" 's/if \(q\.step\) key\.step = \*q\.step;//' session
try "both orientations with one key" 's/q\.key_t\.tensor = options\.tensor_t;//' session
try "counts of NaN are kept" 's/ \|\| cudaMemsetAsync\(c->watched, 0, watched, stream\) != cudaSuccess//' session
try "measurements add up" 's/cudaMemsetAsync\(c->record, 0, \(size_t\)s->n_layers \* sizeof \*c->record, stream\) != cudaSuccess/0/' session
try "sketches add up" 's/cudaMemsetAsync\(c->sketch, 0, .*stream\) != cudaSuccess\)/0)/' session
try "statistics of the last micro-batch alone" 's/snipi_cuda_options options = \{ 0, NULL, NULL, NULL, NULL, 1 \};/snipi_cuda_options options = { 0, NULL, NULL, NULL, NULL, 0 };/' session
try "two measurements at a time" 's/if \(s->pass == SNIP_PASS_LOSS_PROBE && c->measuring >= 0\)/if (0)/' session
try "a sketch's signs of the next word" 's/at = \(begin \/ 32 \+ w\)/at = (begin \/ 32 + 1 - w)/' session
try "the wrong features are sampled" 's/i % samples \* n \/ samples\]/i % samples]/' session
try "B is taken for A's format" 's/b16\[i\] = snipi_mma_half2<FORMAT_B>/b16[i] = snipi_mma_half2<FORMAT_A>/' gemm
try "one scale where columns have their own" 's/const int one_scale = [^;]*;/const int one_scale = 1;/' gemm
try "an empty kernel is taken for one with a body" 's/sharedSizeBytes > SNIPI_EMPTY_SHARED/sharedSizeBytes > 0/' gemm
try "sums are kept from block to block" 's/at_b, kk > 0\)/at_b, 1)/' s8
try "INT8 products with whole scales" 's/FORMAT_A == SNIP_E2M1 \? 0\.5f : 1\.0f/1.0f/' s8
try "INT8 bytes without padding" 's/g\.m, g\.k, g\.a\.reader\.row_bytes\)/g.m, g.k, snipi_max(16, g.k \/ 16 * 16))/' s8
try "zeros beyond k are not asked for" 's/g\.n, g\.k, g\.b\.reader\.row_bytes\)/g.n, g.b.reader.row_bytes, g.b.reader.row_bytes)/; s/g\.m, g\.k, g\.a\.reader\.row_bytes\)/g.m, g.a.reader.row_bytes, g.a.reader.row_bytes)/' s8
try "INT8 bytes that TMA cannot read" 's/o->aligned = \(uintptr_t\)o->reader\.codes % 16 == 0;/o->aligned = 1;/' s8
try "INT8 bytes of magnitudes" 's/positive \+ 0x80808080u - negative/positive + 0x80808080u + negative/' quantize
try "INT8 bytes where there is no wgmma" 's/c->codes = snipi_cuda_has_body\(.*/c->codes = SNIP_CUDA_S8_BYTES;/' session
try "cuBLASLt's scales in our order" 's/i % blocks \* rows \+ i \/ blocks/i/' cublaslt
try "cuBLASLt's scales without padding" 's/snipi_cublaslt_blocks\(k\) : 0;/blocks : 0;/' cublaslt
try "cuBLASLt's A is ours" 's/A_SCALE_MODE, modes\[b->/A_SCALE_MODE, modes[a->/' cublaslt
try "cuBLASLt gets room that it was not given" 's/ldc, scratch_bytes - scales\);/ldc, scratch_bytes);/' cublaslt
try "pairs beyond the edge" 's/g->pairs = n % 2 == 0 && /g->pairs = /' gemm
try "saturation is not looked for" 's/ && !\(q\.straight\.counts && snipi_cuda_may_saturate\(r\)\)//' quantize
try "a held weight's counts once" 's/^( *)\*counts = c->watched.*/\1*counts = NULL;/' session
try "a weight of the last step" 's/ \|\| h->step\[transposed\] != c->step//' session
try "a weight that was only captured" 's/ \|\| h->capture\[transposed\] != capture//' session
try "a weight for each micro-batch" 's/ \|\| h->of\[transposed\] != w / || 1 /' session
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
