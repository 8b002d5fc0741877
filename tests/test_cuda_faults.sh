#!/usr/bin/env bash
# test_cuda_faults.sh - plants one fault after another in a copy of snip_cuda.cuh (each barrier removed in turn, wrong
# phases, wrong lanes) and demands that the tests named beside it notice. A fault that no longer applies to the text
# fails, chosen or not.
#     EVERY=n      one fault in n (1)
#     JOBS=n       compiled and run at a time (2)
#     ONLY=words   faults whose description contains this
set -u
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cp snip_cuda.cuh "$dir/whole.cuh"
compile="${CXX:-g++} -O0 ${ARCH--march=native} -std=c++17 -w -DSNIP_NO_SIMD"
count=0 chosen=0

# A fault is told of in a file, because it is tried in the background.
told() {                # number, passed or failed, text
    echo "$2 $3" > "$dir/$1.told"
}

# Compiles the faulty copy in its own folder and runs the tests.
attempt() {             # number, what, tests
    local at=$dir/$1
    mkdir "$at/tests"
    cp snip.h snip_ilp.h "$at"
    cp tests/test_cuda.cpp tests/test.h tests/cuda_shim.h tests/codec_tables.h "$at/tests"
    if ! $compile "$at/tests/test_cuda.cpp" -o "$at/test" -lm > "$at/log" 2>&1; then
        told "$1" failed "does not compile: $2: $(grep -m 1 error "$at/log")"
    elif timeout 300 "$at/test" --stop $3 > "$at/log" 2>&1; then
        told "$1" failed "not noticed: $2"
    else
        told "$1" passed "$2"
    fi
    rm -rf "$at"
}

try() {                 # what, parts of the names of tests that must notice, sed command
    case $1 in *"${ONLY-}"*) ;; *) return ;; esac
    local number=$((count += 1)) name
    for name in $2; do
        if ! grep -q "^ *RUN([a-z0-9_]*$name[a-z0-9_]*);" tests/test_cuda.cpp; then
            told $number failed "no such test: $name, for: $1"
            return
        fi
    done
    mkdir "$dir/$number"
    sed -E "$3" "$dir/whole.cuh" > "$dir/$number/snip_cuda.cuh"
    if cmp -s "$dir/whole.cuh" "$dir/$number/snip_cuda.cuh"; then
        told $number failed "nothing to change for: $1"
    elif [ $((number % ${EVERY:-1})) = 0 ]; then
        chosen=$((chosen + 1))
        while [ "$(jobs -r | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
        attempt $number "$1" "$2" &
        return
    fi
    rm -rf "${dir:?}/$number"
}

# ---- barriers ----
tests_of() {            # section
    case $1 in
        cuda-launch) echo quantize_statistics noise session_beside_cpu ;;
        cuda-quantize-impl) echo quantize_held quantize_recipes quantize_in_place ;;
        cuda-gemm-mma) echo gemm_e2m1 ;;
        cuda-gemm-plain) echo gemm_plain ;;
        cuda-gemm-wgmma | cuda-gemm-tcgen05) echo gemm_s8_bytes ;;
        *) echo session_beside_cpu ;;
    esac
}
while read -r line section; do
    try "line $line, no barrier" "$(tests_of "$section")" "${line}s/__syncthreads\(\);/;/"
done < <(awk '/^\/\/ >>/ { section = substr($2, 3) } /__syncthreads\(\);/ { print NR, section }' "$dir/whole.cuh")

# ---- quantization and noise ----
try "half a warp's maximum" quantize_recipes \
    's/for \(int distance = 1; distance < lanes;/for (int distance = 2; distance < lanes;/'
try "saturation is not looked for" quantize_counts \
    's/ && !\(options\.counts && snipi_cuda_may_saturate\(recipe\)\)//'
try "saturation is not looked for in transposed codes" quantize_counts \
    's/&= !\(options\.counts_t && snipi_cuda_may_saturate\(recipe_t\)\);/\&= 1;/'
try "INT8 bytes of magnitudes" quantize_held \
    's/positive \+ 0x80808080u - negative/positive + 0x80808080u + negative/'
try "the second orientation is checked late" quantize_refusals \
    '/^static snip_status snipi_cuda_quantize_check/,/^}/{/blocks > 0 && !scratch/,/BAD_ARGUMENT/d}'
try "signs of another lane" noise \
    's/words\[w\], group\)/words[w], group ^ 1)/'

# ---- GEMMs by mma, and plain ones ----
try "scales of the wrong block" gemm_e2m1 \
    's/shared\.scale\[t \/ 2 & 1\], place/shared.scale[0], place/'
try "fragments of the wrong rows" gemm_e2m1 \
    's/lane % 8 \+ lane \/ 16 \* 8/lane % 8 + lane \/ 8 % 2 * 8/'
try "B is taken for A's format" gemm_fp8 \
    's/b16\[i\] = snipi_mma_half2<FormatB>/b16[i] = snipi_mma_half2<FormatA>/'
try "an empty kernel is taken for one with a body" gemm_refusals \
    's/sharedSizeBytes > SNIPI_EMPTY_SHARED/sharedSizeBytes > 0/'
try "a BF16 tile is stored where it is read" gemm_plain \
    's/snipi_mma_chunk\(tile\[\(t \+ 1\) & 1\]\[f/snipi_mma_chunk(tile[t \& 1][f/'

# ---- GEMMs by wgmma ----
produce='/void snipi_tma_produce\(/,/^}/'
consume='/void snipi_wgmma_consume\(/,/^}/'
try "producers begin in the wrong phase" gemm_s8_bytes \
    "$produce"'s/ring = \{ 0, 1 \};/ring = { 0, 0 };/'
try "consumers begin in the wrong phase" gemm_fp8 \
    "$consume"'s/ring = \{ 0, 0 \};/ring = { 0, 1 };/'
try "the phase never turns" gemm_s8_bytes \
    's/ring->parity \^= 1;//'
try "a stage is read before it is full" gemm_fp8 \
    "$consume"'s/snipi_ptx_barrier_wait\(&shared->full[^;]*;//'
try "a stage is filled before it is empty" gemm_s8_bytes \
    "$produce"'s/snipi_ptx_barrier_wait\(&shared->empty[^;]*;//'
released='if \(lane == 0\) snipi_ptx_barrier_arrive\(&shared->empty\[ring\.stage\]\);'
release='if (lane == 0) snipi_ptx_barrier_arrive(\&shared->empty[ring.stage]);'
try "a stage is released before its products are done" gemm_fp8 \
    "$consume{s/^( *)snipi_ptx_wgmma_end\(d\);/;$release &/; s/^( *)$released//}"
try "full does not wait for the scales" gemm_s8_bytes \
    's/full\[s\], SNIPI_WARPGROUP \+ 1\)/full[s], 1)/'
try "one scale where columns have their own" gemm_s8_bytes \
    's/const int one_scale = [^;]*;/const int one_scale = 1;/'
try "pairs beyond the edge" gemm_fp8 \
    's/work->pairs = n % 2 == 0 && /work->pairs = /'
try "sums are kept from block to block" gemm_fp8 \
    "$consume"'s/at_b, kk > 0\)/at_b, 1)/'
try "INT8 products with whole scales" gemm_s8_bytes \
    's/FormatA == SNIP_E2M1 \? 0\.5f : 1\.0f/1.0f/'
try "INT8 bytes without padding" gemm_s8_bytes \
    's/work\.m, work\.k, work\.a\.reader\.row_bytes\)/work.m, work.k, snipi_max(16, work.k \/ 16 * 16))/'
try "zeros beyond k are not asked for" gemm_s8_bytes \
    's/work\.k, (work\.[ab]\.reader\.row_bytes)\)/\1, \1)/'
try "INT8 bytes that TMA cannot read" gemm_s8_refusals \
    '/^static snip_status snipi_cuda_gemm_s8/,/^}/s/operand->aligned = [^;]*;/operand->aligned = 1;/'

# ---- GEMMs by tcgen05 ----
multiply='/void snipi_tcgen05_multiply\(/,/^}/'
consume='/void snipi_tcgen05_consume\(/,/^}/'
try "products are not committed" gemm_s8_bytes \
    "$multiply"'s/snipi_ptx_tcgen05_commit\([^;]*;//'
try "sums are read before they are made" gemm_s8_bytes \
    "$consume"'s/snipi_ptx_barrier_wait\(&shared->summed[^;]*;//'
try "sums are overwritten before they are read" gemm_s8_bytes \
    "$multiply"'s/snipi_ptx_barrier_wait\(&shared->empty[^;]*;//'
try "an accumulator is waited for in the wrong phase" gemm_s8_bytes \
    "$multiply"'s/ring\.stage < 2 \? ring\.parity \^ 1 : ring\.parity/ring.parity/'
try "sums are added before they are loaded" gemm_s8_bytes \
    "$consume"'s/snipi_ptx_tensor_memory_wait\(d\[i % 2\]\);//'
try "an accumulator is released before its sums are loaded" gemm_s8_bytes \
    "$consume{s/snipi_ptx_tensor_memory_load\(d\[0\], at\);/& snipi_ptx_tcgen05_before(); $release/
        s/^( *)$released//}"
try "no fence before products" gemm_s8_bytes \
    "$multiply"'s/snipi_ptx_tcgen05_after\(\);//'
try "no fence before loads" gemm_s8_bytes \
    "$consume"'s/snipi_ptx_tcgen05_after\(\);//'
try "no fence after loads" gemm_s8_bytes \
    "$consume"'s/snipi_ptx_tcgen05_before\(\);//'
try "no fences around the block's barrier" gemm_s8_bytes \
    '/void snipi_tcgen05_syncthreads/,/^}/s/snipi_ptx_tcgen05_(before|after)\(\);//'
try "the other accumulator" gemm_s8_bytes \
    "$consume"'s/\(uint32_t\)ring\.stage % 2/(uint32_t)(ring.stage + 1) % 2/'
try "another group's columns" gemm_s8_bytes \
    "$consume"'s/\(uint32_t\)group \* SNIPI_BLOCK;/0;/'
try "another warp's lanes" gemm_s8_bytes \
    "$consume"'s/\(uint32_t\)warp_row << 16/0/'
try "the same lanes twice" gemm_s8_bytes \
    "$consume"'s/\(i \+ 1\) \/ 2 \* 16 << 16/(i + 1) \/ 2 * 0/'
try "one accumulator's sums are kept from block to block" gemm_s8_bytes \
    "$multiply"'s/instruction, kk > 0\)/instruction, 1)/'
try "tensor memory is kept" gemm_s8_bytes \
    's/if \(multiplier\) snipi_ptx_tensor_memory_free\(shared\.tensor_memory\);//'
try "another block's place" gemm_s8_bytes \
    "$consume"'s/snipi_tma_block<SNIPI_TCGEN05_COLUMNS>/snipi_tma_block<128>/'
try "the same rows of B twice" gemm_s8_bytes \
    's/\(int\)n0 \+ SNIPI_BLOCK \* j\)/(int)n0)/'
try "tcgen05 operands of wgmma's version" gemm_s8_bytes \
    's/snipi_tma_operand\(b \+ 32 \* kk, 1\)/snipi_tma_operand(b + 32 * kk, 0)/'
try "row groups 512 bytes apart" gemm_s8_bytes \
    's/64ull << 32/32ull << 32/'
try "another swizzle" gemm_s8_bytes \
    's/1ull << 62;/1ull << 61;/'
try "an instruction for half the columns" gemm_s8_bytes \
    's/\(uint32_t\)columns \/ 8 << 17/(uint32_t)columns \/ 16 << 17/'
try "an instruction for half the rows" gemm_s8_bytes \
    's/\(uint32_t\)rows \/ 16 << 24/(uint32_t)rows \/ 32 << 24/'
try "an instruction with float sums for integers" gemm_s8_bytes \
    's/\(FormatA == SNIP_E2M1 \? 2u : 1u\) << 4/1u << 4/'
try "an instruction that takes B's type for A's" gemm_fp8 \
    's/\(FormatA == SNIP_E4M3 \? 0u : 1u\) << 7/(FormatB == SNIP_E4M3 ? 0u : 1u) << 7/'
try "an instruction that takes A's type for B's" gemm_fp8 \
    's/\(FormatB == SNIP_E4M3 \? 0u : 1u\) << 10/(FormatA == SNIP_E4M3 ? 0u : 1u) << 10/'

# ---- cuBLASLt ----
try "cuBLASLt's scales in our order" gemm_by_cublaslt \
    's/i % blocks \* rows \+ i \/ blocks/i/'
try "cuBLASLt's scales without padding" gemm_by_cublaslt \
    's/snipi_cublaslt_blocks\(k\) : 0;/blocks : 0;/'
try "cuBLASLt's A is ours" gemm_by_cublaslt \
    's/A_SCALE_MODE, modes\[b->/A_SCALE_MODE, modes[a->/'
try "cuBLASLt gets room that it was not given" gemm_by_cublaslt \
    's/ldc, workspace_bytes\);/ldc, scratch_bytes);/'
# ---- the session ----
within() { echo "/$1\\(/,/^}/$2"; }      # a sed command in one function
try "a step is read before it has come" session_ \
    's/if \(cudaEventSynchronize\(e->done\) != cudaSuccess\)/if (0)/'
try "the plan is switched a step early" session_ \
    's/c->read <= c->step - 1 - c->lag/c->read <= c->step - c->lag/'
try "counts of NaN are kept" session_ \
    's/watched\[i\] = snipi_cuda_watched\(\);//'
try "measurements add up" session_ \
    's/cudaMemsetAsync\(call->sums, 0, sizeof \*call->sums, stream\)/cudaSuccess/'
try "sketches add up" session_ \
    's/cudaMemsetAsync\(call->sketch, 0, .*stream\);/cudaSuccess;/'
try "statistics of the last micro-batch alone" session_ \
    's/\*err_sq \+= stats->err_sq/*err_sq = stats->err_sq/'
try "two measurements at a time" session_ \
    's/snipi_measures_now\(s\) && c->measuring < 0/snipi_measures_now(s)/'
try "a sketch's signs of the next word" session_ \
    's/at = \(begin \/ 32 \+ w\)/at = (begin \/ 32 + 1 - w)/'
try "the wrong features are sampled" session_ \
    's/i % samples \* n \/ samples\]/i % samples]/'
try "INT8 bytes where no kernel takes them" session_ \
    's/c->codes = snipi_tma_kernel<.*/c->codes = SNIP_CUDA_S8_BYTES;/'
try "a session does not ask cuBLASLt" session_by_cublaslt \
    's/if \(c->lt && /if (0 \&\& /'
try "a session asks cuBLASLt for what is not FP8" session_by_cublaslt \
    's/c->lt && snipi_cuda_is_fp8\(a->recipe->format\)/c->lt/'
try "a session's cuBLASLt forgets the bias" session_by_cublaslt \
    's/n, accumulate \|\| bias, c->lt_scratch/n, accumulate, c->lt_scratch/'
try "a held weight's counts once" session_ \
    's/if \(!c->uncounted\) \*counts = .*/*counts = NULL;/'
try "a weight of the last step" session_ \
    's/ && a\.step == b\.step//'
try "a weight that was only captured" session_ \
    's/ && a\.capture == b\.capture//'
try "a weight for each micro-batch" session_ \
    's/a\.weight == b\.weight/0/'
try "a weight for each recomputed forward" session_ \
    's/call->micro == 0 && !c->uncounted/call->micro == 0/'
try "a recomputed forward is counted" session_ \
    's/c->uncounted = 1;  \/\/ counted by the forward call//'
try "the first micro-batch sizes the noise" session_ \
    's/kept\[i\]\.input_size = .*/kept[i].input_size = 0;/'
try "a state's size of X does not reach the device" session_ \
    's/\{ s->layers\[i\]\.kept\.input_size, 0 \}/{ 0, 0 }/'
try "replayed calls are not counted" session_ \
    's/watched->seen_calls \+= which == 0;/watched->seen_calls = 1;/'
try "a frozen layer's weights move" session_ \
    "$(within snipi_cuda_noisy_weight 's/l->frozen/0/')"
try "weights of unknown size move" session_ \
    's/cudaMemsetAsync\(&snipi_cuda_kept_of\(call\)->probe_step, 0, sizeof\(double\), stream\)/cudaSuccess/'
try "no |W| without a loss probe" session_ \
    's/first \? &call->sums->weight_sq : NULL, 1/NULL, 1/'
try "|W| is added to" session_ \
    's/if \(sum_sq && !\(once && \*sum_sq > 0\)\)/if (sum_sq)/'
try "m is not looked at" session_ \
    's/for \(const float \*state : \{ l->m, l->v \}\)/for (const float *state : { l->v })/'
try "v is not looked at" session_ \
    's/for \(const float \*state : \{ l->m, l->v \}\)/for (const float *state : { l->m })/'
try "biases are not looked at" session_ \
    "$(within snipi_cuda_count_nonfinite 's/return .*/return SNIP_OK;/')"
try "dbias is summed in float" session_ \
    "$(within snipi_cuda_bias_kernel 's/double sum = 0;/float sum = 0;/')"
try "a discarded measurement is not made anew" session_ \
    "$(within snipi_cuda_read 's/if \(e->measured && status\).*//')"
try "a message of another step" session_ \
    's/^( *)snipi_show_pending\(s\);/\1;/'
try "finish leaves the next step as it was" session_ \
    's/if \(!snipi_within_step\(c->s\)\) snipi_cuda_begin_step\(c\);//'
try "a step without a loss goes on" session_ \
    's/^( *)s->told = 1;/\1s->told = loss != NULL;/'
try "blocks of rows in another bucket" session_ \
    "$(within snipi_cuda_scaling_kernel 's/first % SNIPI_BLOCKS/0/')"
try "U is left out" session_ \
    's/if \(l->measurement && !l->frozen && snipi_bound\(s, l\) && !status\)/if (0)/'

wait
if [ -z "$(ls "$dir"/*.told 2> /dev/null)" ]; then
    echo "FAILED: no fault was chosen"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
sed -n 's/^failed/FAILED:/p' "$dir"/*.told
passed=$(cat "$dir"/*.told | grep -c '^passed') failed=$(cat "$dir"/*.told | grep -c '^failed')
echo "$count faults, $chosen chosen"
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
