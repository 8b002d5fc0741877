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
try "a stage is released before its products are done" '/void snipi_wgmma_consume/,/^}/{s/^( *)snipi_ptx_wgmma_end\(d\);/if (lane == 0) snipi_ptx_barrier_arrive(\&shared->empty[stage]); snipi_ptx_wgmma_end(d);/; s/^( *)if \(lane == 0\) snipi_ptx_barrier_arrive\(&shared->empty\[stage\]\);//}' gemm
try "full does not wait for the scales" 's/full\[s\], 128 \+ 1\)/full[s], 1)/' gemm
tcgen05='/void snipi_tcgen05_multiply/,/^template.*snipi_tcgen05_kernel\(/'
try "products are not committed" "$tcgen05"'s/snipi_ptx_tcgen05_commit\(&shared->summed\[stage\]\);//' s8
try "sums are read before they are made" "$tcgen05"'s/snipi_ptx_barrier_wait\(&shared->summed\[stage\], parity\);//' s8
try "sums are overwritten before they are read" "$tcgen05"'s/snipi_ptx_barrier_wait\(&shared->empty\[stage \^ 2\],[^;]*\);//' s8
try "an accumulator is waited for in the wrong phase" "$tcgen05"'s/stage < 2 \? parity \^ 1 : parity/parity/' s8
try "sums are added before they are loaded" "$tcgen05"'s/snipi_ptx_tensor_memory_wait\(d\[i % 2\]\);//' s8
try "an accumulator is released before its sums are loaded" "$tcgen05"'{s/^( *)snipi_ptx_tensor_memory_load\(d\[0\], at\);/& snipi_ptx_tcgen05_before(); if (lane == 0) snipi_ptx_barrier_arrive(\&shared->empty[stage]);/; s/^( *)if \(lane == 0\) snipi_ptx_barrier_arrive\(&shared->empty\[stage\]\);//}' s8
try "no fence before products" "$tcgen05"'{/void snipi_tcgen05_multiply/,/^}/s/snipi_ptx_tcgen05_after\(\);//}' s8
try "no fence before loads" "$tcgen05"'{/void snipi_tcgen05_consume/,/^}/s/snipi_ptx_tcgen05_after\(\);//}' s8
try "no fence after loads" "$tcgen05"'{/void snipi_tcgen05_consume/,/^}/s/snipi_ptx_tcgen05_before\(\);//}' s8
try "no fences around the block's barrier" '/void snipi_tcgen05_syncthreads/,/^}/s/snipi_ptx_tcgen05_(before|after)\(\);//' s8
try "the other accumulator" "$tcgen05"'s/\(uint32_t\)stage % 2/(uint32_t)(stage + 1) % 2/' s8
try "another group's columns" "$tcgen05"'s/\(uint32_t\)group \* SNIPI_BLOCK;/0;/' s8
try "another warp's lanes" "$tcgen05"'s/\(uint32_t\)warp_row << 16/0/' s8
try "the same lanes twice" "$tcgen05"'s/\(i \+ 1\) \/ 2 \* 16 << 16/(i + 1) \/ 2 * 0/' s8
try "one accumulator's sums are kept from block to block" "$tcgen05"'s/instruction, kk > 0\)/instruction, 1)/' s8
try "tensor memory is kept" 's/if \(multiplier\) snipi_ptx_tensor_memory_free\(shared\.tensor_memory\);//' s8
try "another tile's place" "$tcgen05"'s/snipi_tma_tile<SNIPI_TCGEN05_COLUMNS>/snipi_tma_tile<128>/' s8
try "the same rows of B twice" 's/\(int\)n0 \+ SNIPI_BLOCK \* j\)/(int)n0)/' s8
try "tcgen05 operands of wgmma's version" 's/snipi_ptx_operand\(b \+ 32 \* kk, 1\)/snipi_ptx_operand(b + 32 * kk, 0)/' s8
try "row groups 512 bytes apart" 's/64ull << 32/32ull << 32/' s8
try "another swizzle" 's/1ull << 62;/1ull << 61;/' s8
try "an instruction for half the columns" 's/\(uint32_t\)columns \/ 8 << 17/(uint32_t)columns \/ 16 << 17/' s8
try "an instruction for half the rows" 's/\(uint32_t\)rows \/ 16 << 24/(uint32_t)rows \/ 32 << 24/' s8
try "an instruction with float sums for integers" 's/\(A == SNIP_E2M1 \? 2u : 1u\) << 4/1u << 4/' s8
try "an instruction that takes B's type for A's" 's/\(A == SNIP_E4M3 \? 0u : 1u\) << 7/(B == SNIP_E4M3 ? 0u : 1u) << 7/' gemm
try "an instruction that takes A's type for B's" 's/\(B == SNIP_E4M3 \? 0u : 1u\) << 10/(A == SNIP_E4M3 ? 0u : 1u) << 10/' gemm
try "scales of the wrong block" 's/shared.scale\[t \/ 2 & 1\]\[0\]/shared.scale[0][0]/' gemm
try "fragments of the wrong rows" 's/lane % 8 \+ lane \/ 16 \* 8/lane % 8 + lane \/ 8 % 2 * 8/' gemm
try "a BF16 tile is stored where it is read" 's/\*snipi_mma_chunk\(tile\[\(t \+ 1\) & 1\]\[f/*snipi_mma_chunk(tile[t \& 1][f/' gemm
try "one step's random numbers for ever" 's/if \(q\.step\) key\.step = \*q\.step;//' session
try "both orientations with one key" 's/q\.key_t\.tensor = options\.tensor_t;//' session
try "B is taken for A's format" 's/b16\[i\] = snipi_mma_half2<FORMAT_B>/b16[i] = snipi_mma_half2<FORMAT_A>/' gemm
try "one scale where columns have their own" 's/const int one_scale = [^;]*;/const int one_scale = 1;/' gemm
try "an empty kernel is taken for one with a body" 's/sharedSizeBytes > SNIPI_EMPTY_SHARED/sharedSizeBytes > 0/' gemm
try "sums are kept from block to block" 's/at_b, kk > 0\)/at_b, 1)/' s8
try "INT8 products with whole scales" 's/FORMAT_A == SNIP_E2M1 \? 0\.5f : 1\.0f/1.0f/' s8
try "INT8 bytes without padding" 's/g\.m, g\.k, g\.a\.reader\.row_bytes\)/g.m, g.k, snipi_max(16, g.k \/ 16 * 16))/' s8
try "zeros beyond k are not asked for" 's/g\.n, g\.k, g\.b\.reader\.row_bytes\)/g.n, g.b.reader.row_bytes, g.b.reader.row_bytes)/; s/g\.m, g\.k, g\.a\.reader\.row_bytes\)/g.m, g.a.reader.row_bytes, g.a.reader.row_bytes)/' s8
try "INT8 bytes that TMA cannot read" 's/o->aligned = \(uintptr_t\)o->reader\.codes % 16 == 0;/o->aligned = 1;/' s8
try "INT8 bytes of magnitudes" 's/positive \+ 0x80808080u - negative/positive + 0x80808080u + negative/' quantize
try "cuBLASLt's scales in our order" 's/i % blocks \* rows \+ i \/ blocks/i/' cublaslt
try "cuBLASLt's scales without padding" 's/snipi_cublaslt_blocks\(k\) : 0;/blocks : 0;/' cublaslt
try "cuBLASLt's A is ours" 's/A_SCALE_MODE, modes\[b->/A_SCALE_MODE, modes[a->/' cublaslt
try "cuBLASLt gets room that it was not given" 's/ldc, scratch_bytes - scales\);/ldc, scratch_bytes);/' cublaslt
try "pairs beyond the edge" 's/g->pairs = n % 2 == 0 && /g->pairs = /' gemm
try "saturation is not looked for" 's/ && !\(q\.straight\.counts && snipi_cuda_may_saturate\(r\)\)//' quantize
# >>cuda-session-impl
within() { echo "/$1\\(/,/^}/$2"; }      # a sed command in one function
try "a step is read before it has come" 's/if \(cudaEventSynchronize\(e->done\) != cudaSuccess\)/if (0)/' session
try "the plan is switched a step early" 's/c->read <= c->step - 1 - c->lag/c->read <= c->step - c->lag/' session
try "counts of NaN are kept" 's/watched\[i\] = snipi_cuda_watched\(\);//' session
try "measurements add up" 's/cudaMemsetAsync\(call->sums, 0, sizeof \*call->sums, stream\)/cudaSuccess/' session
try "sketches add up" 's/cudaMemsetAsync\(call->sketch, 0, .*stream\);/cudaSuccess;/' session
try "statistics of the last micro-batch alone" 's/\*err_sq \+= stats->err_sq/*err_sq = stats->err_sq/' session
try "two measurements at a time" 's/snipi_measures_now\(s\) && c->measuring < 0/snipi_measures_now(s)/' session
try "a sketch's signs of the next word" 's/at = \(begin \/ 32 \+ w\)/at = (begin \/ 32 + 1 - w)/' session
try "the wrong features are sampled" 's/i % samples \* n \/ samples\]/i % samples]/' session
try "INT8 bytes where no kernel takes them" 's/c->codes = snipi_tma_kernel<.*/c->codes = SNIP_CUDA_S8_BYTES;/' session
try "a session does not ask cuBLASLt" 's/if \(c->lt && /if (0 \&\& /' cublaslt
try "a session asks cuBLASLt for what is not FP8" 's/c->lt && snipi_cuda_is_fp8\(a->recipe->format\)/c->lt/' cublaslt
try "a session's cuBLASLt forgets the bias" 's/n, accumulate \|\| bias, c->lt_scratch/n, accumulate, c->lt_scratch/' cublaslt
try "a held weight's counts once" 's/if \(!c->uncounted\) \*counts = .*/*counts = NULL;/' session
try "a weight of the last step" 's/ && a\.step == b\.step//' session
try "a weight that was only captured" 's/ && a\.capture == b\.capture//' session
try "a weight for each micro-batch" 's/a\.weight == b\.weight/0/' session
try "a weight for each recomputed forward" 's/call->micro == 0 && !c->uncounted/call->micro == 0/' session
try "a recomputed forward is counted" 's/c->uncounted = 1;  \/\/ counted by the forward call//' session
try "the first micro-batch sizes the noise" 's/kept\[i\]\.input_size = .*/kept[i].input_size = 0;/' session
try "a state's size of X does not reach the device" 's/\{ s->layers\[i\]\.kept\.input_size, 0 \}/{ 0, 0 }/' session
try "replayed calls are not counted" 's/watched->seen_calls \+= which == 0;/watched->seen_calls = 1;/' session
try "a frozen layer's weights move" "$(within snipi_cuda_noisy_weight 's/l->frozen/0/')" session
try "weights of unknown size move" 's/cudaMemsetAsync\(&snipi_cuda_kept_of\(call\)->probe_step, 0, sizeof\(double\), stream\)/cudaSuccess/' session
try "no |W| without a loss probe" 's/first \? &call->sums->weight_sq : NULL, 1/NULL, 1/' session
try "|W| is added to" 's/if \(sum_sq && !\(once && \*sum_sq > 0\)\)/if (sum_sq)/' session
try "m is not looked at" 's/for \(const float \*state : \{ l->m, l->v \}\)/for (const float *state : { l->v })/' session
try "v is not looked at" 's/for \(const float \*state : \{ l->m, l->v \}\)/for (const float *state : { l->m })/' session
try "biases are not looked at" "$(within snipi_cuda_count_nonfinite 's/return .*/return SNIP_OK;/')" session
try "dbias is summed in float" "$(within snipi_cuda_bias_kernel 's/double sum = 0;/float sum = 0;/')" session
try "a discarded measurement is not made anew" "$(within snipi_cuda_read 's/if \(e->measured && status\).*//')" session
try "a message of another step" 's/^( *)snipi_show_pending\(s\);/\1;/' session
try "finish leaves the next step as it was" 's/if \(!snipi_within_step\(c->s\)\) snipi_cuda_begin_step\(c\);//' session
try "a step without a loss goes on" 's/^( *)s->told = 1;/\1s->told = loss != NULL;/' session
try "blocks of rows in another bucket" "$(within snipi_cuda_scaling_kernel 's/first % SNIPI_BLOCKS/0/')" session
try "U is left out" 's/if \(l->measurement && !l->frozen && snipi_bound\(s, l\) && !status\)/if (0)/' session
# <<cuda-session-impl
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
