# snip: headers to vendor need no build. This builds the examples, tests and benchmarks.
CC ?= cc
CFLAGS ?= -O3 -march=native -fno-math-errno
OPENMP ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
B = build
HEADERS = snip.h snip_ilp.h
TRAINER = $(wildcard examples/*.h)
DATA ?= snip.h snip_ilp.h README.md examples/llama.h examples/trainer.h examples/train_llama.c
OUT ?= out/demo

.PHONY: help demo test test-all test-programs programs test-exhaustive sanitize digest figures bench fidelity quality \
        fuzz test-gpu bench-gpu clean
help:
	@echo 'make demo       train a small Llama on real text under snip (DATA="file ..." for other text)'
	@echo 'make test       every public function, path and refusal; 2 minutes on two cores'
	@echo 'make test-all   the rest too: all compilers, other machines, sanitizers, planted faults; half an hour'
	@echo 'make sanitize   the test programs under ASan and UBSan'
	@echo 'make digest     a digest of every result; BASE=folder compares with the snip.h there'
	@echo 'make bench      benchmarks, tab-separated'
	@echo 'make fidelity   the estimates beside ground truth (DATA="file ...", STEPS=400)'
	@echo 'make quality    plans of several makers, trained beside each other (DATA="file ...")'
	@echo 'make test-exhaustive   all 2^32 inputs of every codec'
	@echo 'make fuzz       libFuzzer on the solver, the quantizer and the file readers'
	@echo 'make test-gpu   the CUDA kernels on the GPU at hand; make bench-gpu: their speed'
	@echo 'make figures    bytes, lines, blank lines and the longest function of each header'
	@echo 'make clean      remove build/ and out/'

$(B):
	mkdir -p $(B)

# The implementation, compiled once for the programs that take its interface alone.
$(B)/snip.o: $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 -D_POSIX_C_SOURCE=200809L -DSNIP_IMPLEMENTATION -x c -c $< -o $@
$(B)/train_llama $(B)/minimal: $(B)/%: examples/%.c $(TRAINER) $(HEADERS) $(B)/snip.o
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 -DSNIP_IMPLEMENTATION_DONE $< $(B)/snip.o -o $@ -lm
$(B)/fidelity $(B)/quality $(B)/bench_train: $(B)/%: bench/%.c bench/norms.h bench/run.h bench/stats.h $(TRAINER) $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) -std=c99 $< -o $@ -lm

# Text for the demo: the project's own sources, or DATA="file ...".
demo: $(B)/train_llama
	$(B)/train_llama $(DATA:%=--data %) --out $(OUT) --steps 240 --every 60 --save-every 80 --budget 0.75

# ---- tests: of the implementation's interface alone, LINKED; of its inside too, WHOLE ----
LINKED = codec linear calls errors protocol estimates plan state unusual stack train
WHOLE = quant gemm vector inside pool
TEST_PROGRAMS = $(LINKED) $(WHOLE) ilp report cuda
# -O1 compiles faster; the implementation is as slow at -O1 as it is quick at -O2
TEST_CFLAGS ?= -O1
TEST_LIB_CFLAGS ?= -O2
TEST_HEADERS = $(wildcard tests/*.h) $(TRAINER) $(HEADERS)
# Threads for however little work
$(B)/snip_test.o: $(HEADERS) | $(B)
	$(CC) $(TEST_LIB_CFLAGS) $(OPENMP) $(WARN) -std=c99 -D_POSIX_C_SOURCE=200809L -DSNIPI_WORTH=0 -DSNIP_IMPLEMENTATION -x c -c $< -o $@
$(LINKED:%=$(B)/test_%): $(B)/test_%: tests/test_%.c $(B)/snip_test.o $(TEST_HEADERS)
	$(CC) $(TEST_CFLAGS) $(OPENMP) -pthread $(WARN) -std=c99 -DSNIP_IMPLEMENTATION_DONE $< $(B)/snip_test.o -o $@ -lm
$(WHOLE:%=$(B)/test_%) $(B)/test_gemm_emulated: $(B)/test_%: tests/test_%.c $(TEST_HEADERS) | $(B)
	$(CC) $(TEST_LIB_CFLAGS) $(OPENMP) -pthread $(WARN) -std=c99 $< -o $@ -lm
$(B)/test_gemm_emulated: tests/test_gemm.c
$(B)/test_ilp $(B)/test_report: $(B)/test_%: tests/test_%.c $(TEST_HEADERS) | $(B)
	$(CC) $(TEST_LIB_CFLAGS) $(WARN) -std=c99 $< -o $@ -lm
# snip_cuda.cuh's kernels on the CPU
$(B)/test_cuda: tests/test_cuda.cpp $(TEST_HEADERS) snip_cuda.cuh | $(B)
	$(CXX) $(TEST_CFLAGS) -DSNIP_NO_SIMD -Wall -Wextra -Wno-unknown-pragmas -std=c++17 $< -o $@ -lm
programs: $(TEST_PROGRAMS:%=$(B)/test_%)

# What run.sh runs, JOBS at a time, the longest first. FEW: where a test draws many cases, one in so many.
FEW_CUDA = SNIP_TEST_FEW=$${SNIP_TEST_FEW:-16}
FEW_QUANT = SNIP_TEST_FEW=$${SNIP_TEST_FEW:-4}
RUN_PROGRAMS = '$(FEW_CUDA) $(B)/test_cuda' '$(FEW_QUANT) $(B)/test_quant' \
               $(patsubst %,'$(B)/test_%',$(filter-out cuda quant,$(TEST_PROGRAMS)))
RUN_SCRIPTS = 'ROUNDS=2 tests/test_trainer.sh $(B)/train_llama' tests/test_headers.sh tests/test_bench.sh \
              'tests/test_readme.sh $(B)/minimal' tests/test_style.sh tests/test_reference.sh
RUN = CC="$(CC)" CXX="$(CXX)" BUILD=$(B) JOBS=$(JOBS) tests/run.sh
test:
	@$(MAKE) --no-print-directory -j$(JOBS) programs $(B)/train_llama $(B)/minimal
	@$(RUN) $(B)/test.total $(RUN_SCRIPTS) $(RUN_PROGRAMS)
# For other compilers and flags: what is compiled with them
test-programs:
	@$(MAKE) --no-print-directory -j$(JOBS) programs $(B)/train_llama
	@$(RUN) $(B)/programs.total 'ROUNDS=1 tests/test_trainer.sh $(B)/train_llama' $(RUN_PROGRAMS)
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED = B=build/sanitize CFLAGS="$(SANITIZE)" TEST_CFLAGS="$(SANITIZE)" TEST_LIB_CFLAGS="$(SANITIZE)" OPENMP=
sanitize:
	@SNIP_TEST_FEW=$${SNIP_TEST_FEW:-16} $(MAKE) --no-print-directory $(SANITIZED) test-programs

# The rest, once `make test` has passed; it is not run again where nothing has changed since.
ALL_SOURCES = $(wildcard *.h *.cuh Makefile README.md tests/* bench/* examples/*)
$(B)/test.total: $(ALL_SOURCES)
	@$(MAKE) --no-print-directory test
ONE_JOB = $(MAKE) --no-print-directory JOBS=1
RUN_REST = 'tests/test_cuda_faults.sh' 'tests/test_cuda_compile.sh' 'tests/test_targets.sh $(B)' \
           'sanitized: $(ONE_JOB) sanitize' \
           'clang: SNIP_TEST_FEW=$${SNIP_TEST_FEW:-4} $(ONE_JOB) B=build/clang CC=clang CXX=clang++ test-programs' \
           'SNIP_TEST_FEW=$${SNIP_TEST_FEW:-2} $(B)/test_cuda' 'SNIP_TEST_HUGE=1 $(B)/test_quant' $(B)/test_gemm_emulated \
           'tests/test_headers.sh rest' tests/test_compilers.sh tests/test_frames.sh tests/test_instructions.sh \
           'tests/test_trainer.sh $(B)/train_llama' 'tests/test_cuda_trainer.sh $(B)/train_llama'
test-all: $(B)/test.total
	@$(MAKE) --no-print-directory -j$(JOBS) programs $(B)/test_gemm_emulated $(B)/train_llama
	@$(RUN) $(B)/all.total @$(B)/test.total $(RUN_REST)

# Results of this snip.h, or what of them differs from those of the snip.h in BASE.
digest: | $(B)
ifdef BASE
	tests/digest.sh $(BASE) .
else
	$(CC) -O2 -std=c99 -I. tests/digest.c -o $(B)/digest -lm
	$(B)/digest
endif
figures:
	@tests/figures.sh $(HEADERS) snip_cuda.cuh

# Every one of the 2^32 float inputs against NVIDIA's own host conversions: needs the CUDA toolkit's headers, not a GPU.
CUDA_HOME ?= /usr/local/cuda
test-exhaustive: | $(B)
	@if [ -f $(CUDA_HOME)/include/cuda_fp4.h ]; then \
	    $(CXX) -O2 $(OPENMP) -std=c++17 -w -I$(CUDA_HOME)/include tests/codec_oracle.cpp -o $(B)/codec_oracle -lm && \
	    $(B)/codec_oracle; \
	else \
	    echo 'skipped: no CUDA headers in $(CUDA_HOME)/include (set CUDA_HOME)'; echo '0 passed, 0 failed, 1 skipped'; \
	fi

# ---- benchmarks ----
# One core each, GEMMs two. Peers that are not installed are named in "skipped" lines; GGML=path of libggml-cpu.so,
# DNNL=path of libdnnl.so.
BENCH_ILP = --limit 10 --cases snip_560x8,snip_560x8_8stages,measured_560x27_8stages,coupled_measured_560x8
bench: $(B)/bench_ilp $(B)/bench_quant $(B)/bench_gemm $(B)/bench_train $(B)/snip.so
	$(B)/bench_quant
	OMP_WAIT_POLICY=passive $(B)/bench_gemm
	OMP_WAIT_POLICY=passive OPENBLAS_CORETYPE=Haswell DNNL_MAX_CPU_ISA=AVX2 $(B)/bench_gemm --isa avx2 1024 1024 1024
	OMP_NUM_THREADS=1 $(B)/bench_train $(DATA:%=--data %) --quiet --threads 1 --dim 256 --heads 8 --kv-heads 1 --batch 4
	@if command -v python3 > /dev/null; then \
	    python3 bench/bench_quant_peers.py --lib $(B)/snip.so; \
	    python3 bench/bench_ilp.py --bench $(B)/bench_ilp $(BENCH_ILP); \
	else echo 'skipped: python3'; fi
$(B)/snip.so: $(HEADERS) | $(B)
	$(CC) -O2 -std=gnu99 -shared -fPIC -DSNIP_IMPLEMENTATION -DSNIP_ILP_IMPLEMENTATION -x c snip.h -o $@ -lm
# HAS,header,library,flags: flags where a program with both compiles and links
HAS = $(shell printf '\043include <$(1)>\nint main(void){return 0;}' | $(CC) -x c - -o /dev/null $(2) 2>/dev/null && echo "$(3)")
$(B)/bench_gemm: bench/bench_gemm.c $(HEADERS) | $(B)
	$(CC) -O2 $(OPENMP) $(call HAS,cblas.h,-lopenblas,-DOPENBLAS) $(call HAS,dnnl.h,-ldnnl,-DDNNL) -std=gnu99 $< -o $@ \
	    -lm $(call HAS,cblas.h,-lopenblas,-lopenblas) $(call HAS,dnnl.h,-ldnnl,-ldnnl)
$(B)/bench_%: bench/bench_%.c $(HEADERS) | $(B)
	$(CC) -O2 -std=gnu99 $< -o $@ -lm

fidelity: $(B)/fidelity
	$(B)/fidelity $(DATA:%=--data %) --steps $(or $(STEPS),400) --batch 4
quality: $(B)/quality
	$(B)/quality $(DATA:%=--data %)

# Ten minutes each by default, under ASan and UBSan; needs clang with libFuzzer.
FUZZ_SECONDS ?= 600
FUZZ = clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
fuzz: | $(B)
	$(FUZZ) -DSNIP_FUZZER tests/fuzz_ilp.c -o $(B)/fuzz_ilp -lm
	$(FUZZ) tests/fuzz_quant.c -o $(B)/fuzz_quant -lm
	mkdir -p $(B)/corpus && cp tests/corpus_ilp/* tests/corpus_quant/* $(B)/corpus
	$(B)/fuzz_ilp -max_len=600 -max_total_time=$(FUZZ_SECONDS) $(B)/corpus
	$(B)/fuzz_quant -max_total_time=$(FUZZ_SECONDS) $(B)/corpus

# Build with nvcc for the GPU at hand; without one they say that they are skipped.
test-gpu bench-gpu:
	@BUILD=$(B) tests/gpu.sh $(@:%-gpu=%)

clean:
	rm -rf build out
