// Macros that other headers and trainers define, each as a token that no compiler accepts: what is included after this
// file must use none of these names. System headers come first, as where such macros stand they have been read before.
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#    include <sys/stat.h>
#    include <unistd.h>
#endif
#if defined(__linux__)
#    include <sys/auxv.h>
#    include <sys/syscall.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#    include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#    include <arm_neon.h>
#endif
#ifdef _OPENMP
#    include <omp.h>
#endif

// windows.h and what it includes
#define near @
#define far @
#define small @
#define hyper @
#define interface @
#define cdecl @
#define pascal @
#define huge @
#define min(a, b) @
#define max(a, b) @
#define IN @
#define OUT @
#define OPTIONAL @
#define CONST @
#define VOID @
#define BOOL @
#define TRUE @
#define FALSE @
#define THIS @
#define STRICT @
#define ERROR @
#define NO_ERROR @
#define DELETE @
#define OPAQUE @
#define TRANSPARENT @
#define ABSOLUTE @
#define RELATIVE @
#define DIFFERENCE @
#define ALTERNATE @
#define WINDING @
#define INFINITE @
#define IGNORE @
#define DOMAIN @
#define OVERFLOW @
#define UNDERFLOW @
#define UNICODE @
#define PASCAL @
#define CALLBACK @
#define WINAPI @
#define Yield() @
#define CreateWindow(a) @
#define GetMessage @
#define SendMessage @
#define GetObject @
#define s_addr @
#define s_host @
#define rad1 @
#define grp1 @
#define lst1 @
#define ctl1 @
#define cmb1 @
#define edt1 @
#define stc1 @
#define scr1 @

// Unix: complex.h, iso646.h, sys/param.h, sys/sysmacros.h, termios.h, signal.h, threads.h, gnu dialects
#define I @
#define complex @
#define imaginary @
#ifndef __cplusplus
#    define and @
#    define or @
#    define not @
#    define xor @
#    define compl @
#    define bitand @
#    define bitor @
#    define alignas @
#    define noreturn @
#    define thread_local @
#endif
#define MIN(a, b) @
#define MAX(a, b) @
#define howmany(a, b) @
#define roundup(a, b) @
#define powerof2(a) @
#define major(a) @
#define minor(a) @
#define makedev(a, b) @
#define ECHO @
#define NL0 @
#define TAB0 @
#define B0 @
#define B50 @
#define sa_handler @
#define si_value @
#define sigmask(a) @
#define sv_onstack @
#undef unix  // GNU C has it
#define unix @
#undef linux  // GNU C has it
#define linux @

// X11
#define Always @
#define Above @
#define Below @
#define Bool @
#define Complex @
#define Convex @
#define False @
#define None @
#define Status @
#define Success @
#define True @

// Trainers and other libraries
#define A @
#define B @
#define C @
#define E @
#define F @
#define H @
#define K @
#define L @
#define M @
#define N @
#define P @
#define Q @
#define R @
#define S @
#define T @
#define U @
#define V @
#define W @
#define X @
#define Y @
#define Z @
#define NH @
#define OC @
#define EPS @
#define PI @
#define LOG(a) @
#define INFO @
#define CHECK(a) @
#define ASSERT(a) @
#define LIKELY(a) @
#define UNLIKELY(a) @
#define ALIGN(a) @
#define INLINE @
#define RESTRICT @
#define UNUSED @
#define ARRAY_SIZE(a) @
#define CEIL_DIV(a, b) @
#define SWAP(a, b) @
#define CLAMP(a, b, c) @
#define ROUND @
#define SCALE @
#define BLOCK @
#define BLOCKS @
#define CHUNK @
#define CHUNKS @
#define ROWS @
#define COLS @
#define TILE @
#define TILES @
#define LANES @
#define VECTORS @
#define UNROLL @
#define TIMES @
#define MOST @
#define TO @
#define FROM @
#define PART @
#define PARTS @
#define HALF @
#define FULL @
#define SIZE @
#define COUNT @
#define WIDTH @
#define HEIGHT @
#define DEPTH @
#define RANK @
#define STEP @
#define STEPS @
#define BYTE @
#define BYTES @
#define BITS @
#define WORD @
#define DWORD @
#define FLOAT @
#define FLOATS @
#define DOUBLE @
#define INT @
#define WARP_SIZE @
#define THREADS @
#define PASS @
#define FAIL @
#define OK @
