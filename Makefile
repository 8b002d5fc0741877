# snip: headers to vendor need no build. This builds the examples, tests and benchmarks.
CC ?= cc
CFLAGS ?= -O3 -march=native -fno-math-errno
OPENMP ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion
B = build
HEADERS = snip.h snip_ilp.h
TRAINER = examples/llama.h examples/report.h examples/train.h examples/trainer.h
DATA ?= snip.h snip_ilp.h README.md examples/llama.h examples/trainer.h examples/train_llama.c
OUT ?= out/demo
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: help demo test test-exhaustive sanitize bench fidelity quality fuzz test-gpu bench-gpu clean
help:
	@echo 'make demo       train a small Llama on real text under snip (DATA="file ..." for other text)'
	@echo 'make test       all tests'
	@echo 'make sanitize   the same tests under ASan and UBSan'
	@echo 'make bench      benchmarks, tab-separated'
	@echo 'make fidelity   the estimates beside ground truth (DATA="file ...", STEPS=400)'
	@echo 'make quality    plans of several makers, trained beside each other (DATA="file ...")'
	@echo 'make test-exhaustive   all 2^32 inputs of every codec'
	@echo 'make fuzz       libFuzzer on the solver, the quantizer and the file readers'
	@echo 'make test-gpu   the CUDA kernels on the GPU at hand; make bench-gpu: their speed'
	@echo 'make clean      remove build/ and out/'

$(B):
	mkdir -p $(B)
# The implementation, compiled once for the programs that take its interface alone
$(B)/snip.o: $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 -D_POSIX_C_SOURCE=200809L -DSNIP_IMPLEMENTATION -x c -c $< -o $@
LINKED = $(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 -DSNIP_IMPLEMENTATION_DONE $< $(B)/snip.o -o $@ -lm
$(B)/train_llama $(B)/minimal: $(B)/%: examples/%.c $(TRAINER) $(HEADERS) $(B)/snip.o
	$(LINKED)
$(B)/test_train: tests/test_train.c $(TRAINER) $(HEADERS) $(B)/snip.o
	$(LINKED)
$(B)/fidelity $(B)/quality $(B)/bench_train: $(B)/%: bench/%.c bench/norms.h bench/run.h bench/stats.h $(TRAINER) $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) -std=c99 $< -o $@ -lm
$(B)/test_gemm_emulated: tests/test_gemm.c tests/emulate_x86.h
$(B)/test_pool: CFLAGS += -O1 -pthread
$(B)/test_%: tests/test_%.c $(TRAINER) $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 $< -o $@ -lm

# Text for the demo: the project's own sources, or DATA="file ...".
demo: $(B)/train_llama
	$(B)/train_llama $(DATA:%=--data %) --out $(OUT) --steps 240 --every 60 --save-every 80 --budget 0.75

# snip_cuda.cuh's kernels on the CPU.
$(B)/test_cuda: tests/test_cuda.cpp tests/cuda_shim.h snip_cuda.cuh $(HEADERS) | $(B)
	$(CXX) $(CFLAGS) -O1 -Wall -Wextra -Wno-unknown-pragmas -std=c++17 $< -o $@ -lm

# The longest first: two run at a time
TESTS = test_session test_cuda test_quant test_gemm test_gemm_emulated test_ilp test_train test_pool test_report test_codec
SHELL_TESTS ?= targets cuda_compile compilers cuda_faults headers trainer instructions cuda_trainer bench reference
test: $(TESTS:%=$(B)/%) $(B)/train_llama $(B)/minimal
	CC="$(CC)" BUILD=$(B) SHELL_TESTS="$(SHELL_TESTS)" tests/run.sh $(TESTS)
sanitize:
	SNIP_TEST_FEW=$(or $(SNIP_TEST_FEW),4) $(MAKE) B=build/sanitize CFLAGS="$(SANITIZE)" OPENMP= SHELL_TESTS=trainer test

# Every one of the 2^32 float inputs against NVIDIA's own host conversions: needs the CUDA toolkit's headers, not a GPU.
CUDA_HOME ?= /usr/local/cuda
test-exhaustive: | $(B)
	@if [ -f $(CUDA_HOME)/include/cuda_fp4.h ]; then \
	    $(CXX) -O2 $(OPENMP) -std=c++17 -w -I$(CUDA_HOME)/include tests/codec_oracle.cpp -o $(B)/codec_oracle -lm && $(B)/codec_oracle; \
	else echo 'skipped: no CUDA headers in $(CUDA_HOME)/include (set CUDA_HOME)'; echo '0 passed, 0 failed, 1 skipped'; fi

# One core each, GEMMs two. Peers that are not installed are named in "skipped" lines; GGML=path of libggml-cpu.so, DNNL=path of libdnnl.so.
BENCH_ILP = --limit 10 --cases snip_560x8,snip_560x8_8stages,measured_560x27_8stages,coupled_measured_560x8
bench: $(B)/bench_ilp $(B)/bench_quant $(B)/bench_gemm $(B)/bench_train $(B)/snip.so
	$(B)/bench_quant
	OMP_WAIT_POLICY=passive $(B)/bench_gemm
	OMP_WAIT_POLICY=passive OPENBLAS_CORETYPE=Haswell DNNL_MAX_CPU_ISA=AVX2 $(B)/bench_gemm --isa avx2 1024 1024 1024
	OMP_NUM_THREADS=1 $(B)/bench_train $(DATA:%=--data %) --quiet --threads 1 --dim 256 --heads 8 --kv-heads 1 --batch 4
	@if command -v python3 > /dev/null; then python3 bench/bench_quant_peers.py --lib $(B)/snip.so; else echo 'skipped: python3'; fi
	@if command -v python3 > /dev/null; then python3 bench/bench_ilp.py --bench $(B)/bench_ilp $(BENCH_ILP); else echo 'skipped: python3'; fi
$(B)/snip.so: $(HEADERS) | $(B)
	$(CC) -O2 -std=gnu99 -shared -fPIC -DSNIP_IMPLEMENTATION -DSNIP_ILP_IMPLEMENTATION -x c snip.h -o $@ -lm
# HAS,header,library,flags: flags where a program with both compiles and links
HAS = $(shell printf '\043include <$(1)>\nint main(void){return 0;}' | $(CC) -x c - -o /dev/null $(2) 2>/dev/null && echo "$(3)")
$(B)/bench_gemm: bench/bench_gemm.c bench/stats.h $(HEADERS) | $(B)
	$(CC) -O2 $(OPENMP) $(call HAS,cblas.h,-lopenblas,-DOPENBLAS) $(call HAS,dnnl.h,-ldnnl,-DDNNL) -std=gnu99 $< -o $@ -lm $(call HAS,cblas.h,-lopenblas,-lopenblas) $(call HAS,dnnl.h,-ldnnl,-ldnnl)
$(B)/bench_%: bench/bench_%.c bench/stats.h $(HEADERS) | $(B)
	$(CC) -O2 -std=gnu99 $< -o $@ -lm

fidelity: $(B)/fidelity
	$(B)/fidelity $(DATA:%=--data %) --steps $(or $(STEPS),400) --batch 4
quality: $(B)/quality
	$(B)/quality $(DATA:%=--data %)

# Ten minutes each by default, under ASan and UBSan; needs clang with libFuzzer.
FUZZ_SECONDS ?= 600
fuzz: | $(B)
	clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DSNIP_FUZZER tests/fuzz_ilp.c -o $(B)/fuzz_ilp -lm
	clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all tests/fuzz_quant.c -o $(B)/fuzz_quant -lm
	mkdir -p $(B)/corpus && cp tests/corpus_ilp/* tests/corpus_quant/* $(B)/corpus
	$(B)/fuzz_ilp -max_len=600 -max_total_time=$(FUZZ_SECONDS) $(B)/corpus
	$(B)/fuzz_quant -max_total_time=$(FUZZ_SECONDS) $(B)/corpus

# Build with nvcc for the GPU at hand; without one they say that they are skipped.
test-gpu bench-gpu:
	@BUILD=$(B) tests/gpu.sh $(@:%-gpu=%)

clean:
	rm -rf build out
