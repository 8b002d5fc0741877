# snip: headers to vendor need no build. This builds the examples, tests and benchmarks.
CC ?= cc
CFLAGS ?= -O3 -march=native -fno-math-errno
OPENMP ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion
B = build
HEADERS = snip.h snip_ilp.h
TRAINER = examples/llama.h examples/trainer.h examples/report.h
DATA ?= snip.h snip_ilp.h README.md examples/llama.h examples/trainer.h examples/train_llama.c
OUT ?= out/demo
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: help demo test test-headers test-exhaustive sanitize bench fidelity clean
help:
	@echo 'make demo       train a small Llama on real text under snip (DATA="file ..." for other text)'
	@echo 'make test       all tests, under 10 minutes'
	@echo 'make sanitize   the same tests under ASan and UBSan'
	@echo 'make bench      benchmarks, tab-separated'
	@echo 'make fidelity   the estimates beside ground truth (DATA="file ...", STEPS=400)'
	@echo 'make test-exhaustive   all 2^32 inputs of every codec'
	@echo 'make clean      remove build/ and out/'

$(B):
	mkdir -p $(B)
$(B)/train_llama: examples/train_llama.c $(TRAINER) $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 $< -o $@ -lm
$(B)/minimal: examples/minimal.c $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 $< -o $@ -lm
$(B)/fidelity: bench/fidelity.c $(TRAINER) $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) -std=c99 $< -o $@ -lm
$(B)/test_%: tests/test_%.c $(TRAINER) $(HEADERS) | $(B)
	$(CC) $(CFLAGS) $(OPENMP) $(WARN) -std=c99 $< -o $@ -lm

# Text for the demo: the project's own sources, or DATA="file ...".
demo: $(B)/train_llama
	$(B)/train_llama $(DATA:%=--data %) --out $(OUT) --steps 240 --every 60 --save-every 80 --budget 0.75

TESTS = test_ilp test_codec test_quant test_gemm test_session test_train test_report
test: $(TESTS:%=$(B)/%) $(B)/train_llama $(B)/minimal
	CC="$(CC)" BUILD=$(B) tests/run.sh $(TESTS)
sanitize:
	$(MAKE) B=build/sanitize CFLAGS="$(SANITIZE)" OPENMP= test

fidelity: $(B)/fidelity
	$(B)/fidelity $(DATA:%=--data %) --steps $(or $(STEPS),400) --batch 4

clean:
	rm -rf build out
