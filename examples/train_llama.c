// train_llama.c - trains a small Llama on any text under an adaptive FP4/FP8 plan, on the CPU.
//     cc -O2 -fopenmp examples/train_llama.c -o train_llama -lm
//     ./train_llama --data book.txt --out out/book            (--help lists the options)
//
// Writes into the output folder: loss.csv, row by row; model.safetensors, the weights and all that --resume needs to go
// on bit for bit; plan.txt, plan.svg, report.html.
// Exit status: 0 finished, 1 the training met NaN or infinity, 2 bad input or a file that cannot be written.
//
// The model is in llama.h, a training step and its passes under a session in trainer.h (>>steps), the training loop in
// train.h (>>train); train_llama.cu is the same trainer on a GPU.
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "llama.h"
#include "report.h"
#include "trainer.h"
#include "train.h"

int main(int argc, char **argv) { return train_main(argc, argv, tr_cpu()); }
