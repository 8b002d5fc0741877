/* test_gemm with AMX, AVX512-BF16 and AVX-VNNI emulated (emulate_x86.h): their kernels, packing, panels and scales are
   the real ones, compiled for this machine, the products are C functions. Arguments and environment as test_gemm's. */
#include "test.h"
#if defined(__x86_64__) && !defined(SNIP_NO_SIMD)
#    include "emulate_x86.h"
#endif
#define SNIPI_ATOMIC 0  // phases as parallel loops of their own, as compilers without atomic counters get them
#include "test_gemm.c"
