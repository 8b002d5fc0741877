#!/usr/bin/env bash
# gpu.sh test | bench - builds for the GPU at hand and runs. Without a GPU or nvcc: skips, and says so.
set -eu
cd "$(dirname "$0")/.."
build=${BUILD:-build}
skip() { echo "skipped: $1"; if [ "$what" = test ]; then echo "0 passed, 0 failed, 1 skipped"; fi; exit 0; }
what=${1:-test}
command -v nvcc > /dev/null || skip "nvcc is not installed"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d '. ') || true
[ -n "$capability" ] || skip "no GPU"
case $capability in 90 | 100 | 103 | 120 | 121) arch=sm_${capability}a ;; *) arch=sm_$capability ;; esac
mkdir -p "$build"
if [ "$what" = test ]; then
    nvcc -O2 -std=c++17 -arch=$arch -x cu tests/test_cuda.cpp -o "$build/test_cuda_gpu"
    nvcc -O2 -std=c++17 -arch=$arch examples/minimal.cu -o "$build/minimal_cuda"
    "$build/minimal_cuda"
    nvcc -O2 -std=c++17 -arch=$arch examples/train_llama.cu -o "$build/train_llama_cuda"
    "$build/train_llama_cuda" --data snip.h --steps 60 --every 20 --out "$build/train_llama_cuda.out"
    "$build/test_cuda_gpu"
else
    nvcc -O2 -std=c++17 -arch=$arch -DSNIP_CUBLASLT bench/bench_cuda.cu -o "$build/bench_cuda" -lcublas -lcublasLt 2> /dev/null ||
        { echo "skipped: cuBLAS"; nvcc -O2 -std=c++17 -arch=$arch bench/bench_cuda.cu -o "$build/bench_cuda"; }
    "$build/bench_cuda"
fi
