// cuda_shim.h - stands in for the CUDA runtime, so that snip_cuda.cuh's kernels run on the CPU: each CUDA thread is a
// fiber, blocks run one after another. Threads change only where they wait for one another, so that a missing barrier
// shows as a read of poison or of the last value in one of the three orders (shim_order). Wrong synchronization (lanes
// at different warp operations, threads at different barriers, a wait without end) aborts with the source line.
#ifndef CUDA_SHIM_H
#define CUDA_SHIM_H
#define SNIP_CUDA_SHIM 1
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <functional>
#include <type_traits>
#include <vector>
#if !defined(__x86_64__)
#    include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#    define SHIM_ASAN 1
#elif defined(__has_feature)
#    if __has_feature(address_sanitizer)
#        define SHIM_ASAN 1
#    endif
#endif
#ifdef SHIM_ASAN
#    include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Shared variables lie side by side in a section of their own, for each block to poison.
#define __shared__ static __attribute__((section("shim_shared")))
extern char __start_shim_shared[] __attribute__((weak)), __stop_shim_shared[] __attribute__((weak));

struct uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(8) float2 {
    float x, y;
};

static inline float2 make_float2(float x, float y) { return { x, y }; }

static inline uint2 make_uint2(unsigned x, unsigned y) { return { x, y }; }

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }

struct dim3 {
    unsigned x, y, z;

    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// ---- fibers ----
enum { SHIM_STACK = 128 * 1024, SHIM_MOST = 1024, SHIM_ORDERS = 3 };

struct shim_barrier {
    unsigned generation, arrived;
    const char *site;
};

struct shim_warp {
    shim_barrier barrier;
    unsigned live, mask, slot_of[32];
    uint64_t slot[2][32];
};

struct shim_fiber {
    bool done;
    char *stack;
#if defined(__x86_64__)
    void *sp;
#else
    ucontext_t context;
#endif
    void *fake;
};

static struct {
    shim_fiber fiber[SHIM_MOST], scheduler;
    shim_warp warp[SHIM_MOST / 32];
    shim_barrier barrier;
    unsigned threads, live, current;
    bool progress;
    void (*call)(void *);
    void *argument;
    char *dynamic_shared;
} shim;

static int shim_order;
// Of each thread, for tcgen05's fences: waited, and did not yet fence; worked on tensor memory, and did not yet fence.
static bool shim_waited[SHIM_MOST], shim_touched[SHIM_MOST];
static dim3 gridDim, blockDim, blockIdx, threadIdx;

[[noreturn]] static void shim_die(const char *what, const char *site) {
    fprintf(stderr, "FAILED: %s at %s (block %u, thread %u, order %d)\n", what, site ? site : "?", blockIdx.x,
            shim.current, shim_order);
    exit(3);
}
#if defined(__x86_64__)
extern "C" void shim_swap(void **save, void *load);
asm(".text\n.globl shim_swap\n.type shim_swap,@function\nshim_swap:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size shim_swap,.-shim_swap\n");
#endif
static void shim_switch(shim_fiber *from, shim_fiber *to) {
#ifdef SHIM_ASAN
    __sanitizer_start_switch_fiber(from->done ? NULL : &from->fake, to->stack, SHIM_STACK);
#endif
#if defined(__x86_64__)
    shim_swap(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
#ifdef SHIM_ASAN
    __sanitizer_finish_switch_fiber(from->fake, NULL, NULL);
#endif
}

static void shim_yield() { shim_switch(&shim.fiber[shim.current], &shim.scheduler); }

static void shim_entry() {
#ifdef SHIM_ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
    shim.scheduler.stack = (char *)bottom;
#endif
    shim.call(shim.argument);
    shim_warp &w = shim.warp[shim.current / 32];
    shim.fiber[shim.current].done = true;
    shim.live--;
    w.live &= ~(1u << shim.current % 32);
    shim.progress = true;
    if (shim.barrier.arrived) shim_die("a thread ends while others wait in __syncthreads", shim.barrier.site);
    if (w.barrier.arrived && (w.mask & ~w.live))
        shim_die("a lane ends while others wait in a warp operation", w.barrier.site);
    shim_yield();
}

static void shim_meet(shim_barrier *b, unsigned count, const char *site) {
    unsigned generation = b->generation;
    b->site = site;
    shim.progress = true;
    if (++b->arrived == count) {
        b->arrived = 0;
        b->generation++;
        return;
    }
    while (b->generation == generation) shim_yield();
}

static void shim_tells(const char *site) {
    if (shim_touched[shim.current]) shim_die("no tcgen05.fence::before_thread_sync", site);
}

static void shim_syncthreads(const char *site) {
    shim_tells(site);
    shim_waited[shim.current] = true;
    if (shim.live != shim.threads) shim_die("__syncthreads after a thread has ended", site);
    if (shim.barrier.arrived && shim.barrier.site != site)
        shim_die("threads of one block meet at different __syncthreads", site);
    shim_meet(&shim.barrier, shim.threads, site);
}

static void shim_syncwarp(unsigned mask, const char *site) {
    shim_warp &w = shim.warp[shim.current / 32];
    if (!(mask >> shim.current % 32 & 1)) shim_die("a lane is not in its own mask", site);
    if (mask & ~w.live) shim_die("a mask names a lane that has ended", site);
    if (w.barrier.arrived && (w.barrier.site != site || w.mask != mask))
        shim_die("lanes of one warp meet at different operations", site);
    w.mask = mask;
    shim_meet(&w.barrier, (unsigned)__builtin_popcount(mask), site);
}

template <class T> static T shim_shuffle(unsigned mask, T value, unsigned from, const char *site) {
    shim_warp &w = shim.warp[shim.current / 32];
    unsigned lane = shim.current % 32, parity = w.slot_of[lane]++ & 1;
    T result;
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    memcpy(&w.slot[parity][lane], &value, sizeof value);
    shim_syncwarp(mask, site);
    if (from > 31) from = lane;
    if (!(mask >> from & 1)) shim_die("a shuffle reads a lane outside its mask", site);
    memcpy(&result, &w.slot[parity][from], sizeof result);
    return result;
}

#define SHIM_TEXT_(x) #x
#define SHIM_TEXT(x) SHIM_TEXT_(x)
#define SHIM_SITE __FILE__ ":" SHIM_TEXT(__LINE__)
#define __syncthreads() shim_syncthreads(SHIM_SITE)
#define __syncwarp() shim_syncwarp(0xFFFFFFFFu, SHIM_SITE)
#define __shfl_sync(mask, value, lane) shim_shuffle(mask, value, (unsigned)(lane) % 32, SHIM_SITE)
#define __shfl_xor_sync(mask, value, bits) shim_shuffle(mask, value, shim.current % 32 ^ (unsigned)(bits), SHIM_SITE)
#define __shfl_down_sync(mask, value, by) shim_shuffle(mask, value, shim.current % 32 + (unsigned)(by), SHIM_SITE)

static inline void atomicAdd(unsigned long long *p, unsigned long long v) { *p += v; }

static inline uint32_t atomicMax(uint32_t *p, uint32_t v) {
    uint32_t old = *p;
    if (v > old) *p = v;
    return old;
}

// Each rounded on its own, whatever the compiler may fuse.
static inline float __fmul_rn(float a, float b) {
    volatile float p = a * b;
    return p;
}

static inline float __fadd_rn(float a, float b) {
    volatile float s = a + b;
    return s;
}

// ---- tensor cores: the fragment layouts of the PTX ISA ----
static inline uint32_t snipi_ptx_prmt(uint32_t low, uint32_t high, uint32_t select) {
    uint64_t bytes = low | (uint64_t)high << 32;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t nibble = select >> 4 * i & 15, byte = (uint32_t)(bytes >> 8 * (nibble & 7)) & 255;
        r |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return r;
}

struct shim_words {
    uint32_t w[6];
};

static shim_words shim_lane_words[2][SHIM_MOST];
static unsigned shim_words_of[SHIM_MOST];

// Every lane's words, once all lanes have come.
static const shim_words *shim_gather(const shim_words &mine, const char *site) {
    unsigned parity = shim_words_of[shim.current]++ & 1;
    shim_lane_words[parity][shim.current] = mine;
    shim_syncwarp(0xFFFFFFFFu, site);
    return &shim_lane_words[parity][shim.current / 32 * 32];
}

static inline void snipi_ptx_ldmatrix4(uint32_t r[4], const void *row) {
    shim_words mine = {};
    uint64_t at = (uint64_t)(uintptr_t)row;
    if (at % 16) shim_die("ldmatrix: a row is not aligned", "ldmatrix");
    memcpy(mine.w, &at, sizeof at);
    const shim_words *all = shim_gather(mine, "ldmatrix");
    for (unsigned i = 0; i < 4; i++) {
        memcpy(&at, all[8 * i + shim.current % 32 / 4].w, sizeof at);
        memcpy(&r[i], (const char *)(uintptr_t)at + shim.current % 4 * 4, 4);
    }
}

// d += A B^T of 16 x 8 elements, `size` bytes each, 32 bytes of k; multiply(d, a, b) takes elements as bits.
template <class D, class F>
static void shim_mma(D d[4], const uint32_t a[4], const uint32_t b[2], unsigned size, const char *site, F multiply) {
    shim_words mine = { { a[0], a[1], a[2], a[3], b[0], b[1] } };
    const shim_words *all = shim_gather(mine, site);
    unsigned lane = shim.current % 32, mask = size == 1 ? 255 : 65535;
    for (unsigned i = 0; i < 4; i++)
        for (unsigned half = 0; half < 2; half++)
            for (unsigned t = 0; t < 4; t++)
                for (unsigned e = 0; e < 4 / size; e++)
                    multiply(d[i], all[lane / 4 * 4 + t].w[i / 2 + 2 * half] >> 8 * size * e & mask,
                             all[(lane % 4 * 2 + i % 2) * 4 + t].w[4 + half] >> 8 * size * e & mask);
}

static float shim_e5m2_value(uint32_t code) {
    uint32_t e = code >> 2 & 31, m = code & 3;
    float v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(4.0f + (float)m, (int)e - 17) : ldexpf((float)m, -16);
    return code & 128 ? -v : v;
}

static float shim_e4m3_value(uint32_t code) {
    uint32_t e = code >> 3 & 15, m = code & 7;
    float v = e == 15 && m == 7 ? NAN : e ? ldexpf(8.0f + (float)m, (int)e - 10) : ldexpf((float)m, -9);
    return code & 128 ? -v : v;
}

static float shim_f16_value(uint32_t code) {
    uint32_t e = code >> 10 & 31, m = code & 1023;
    float v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024.0f + (float)m, (int)e - 25) : ldexpf((float)m, -24);
    return code & 32768 ? -v : v;
}

static struct shim_tables {
    float e4m3[256], e5m2[256], s8[256], f16[65536];

    shim_tables() {
        for (uint32_t c = 0; c < 65536; c++) f16[c] = shim_f16_value(c);
        for (uint32_t c = 0; c < 256; c++) {
            e4m3[c] = shim_e4m3_value(c);
            e5m2[c] = shim_e5m2_value(c);
            s8[c] = (float)(int8_t)c;
        }
    }
} shim_of;

static inline void snipi_ptx_mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2]) {
    shim_mma(d, a, b, 1, "mma s8", [](int32_t &s, uint32_t x, uint32_t y) { s += (int8_t)x * (int8_t)y; });
}

static inline void snipi_ptx_mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    shim_mma(d, a, b, 2, "mma f16", [](float &s, uint32_t x, uint32_t y) { s += shim_of.f16[x] * shim_of.f16[y]; });
}

static inline float shim_bf16(uint32_t code) {
    code <<= 16;
    float x;
    memcpy(&x, &code, 4);
    return x;
}

static inline uint32_t snipi_ptx_bf16x2(float low, float high) {
    uint32_t u[2], r = 0;
    memcpy(u, &low, 4);
    memcpy(u + 1, &high, 4);
    for (int i = 0; i < 2; i++)
        r |= ((u[i] & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : (u[i] + 0x7FFFu + (u[i] >> 16 & 1u)) >> 16) << 16 * i;
    return r;
}

static inline void snipi_ptx_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    shim_mma(d, a, b, 2, "mma bf16", [](float &s, uint32_t x, uint32_t y) { s += shim_bf16(x) * shim_bf16(y); });
}

// examples/train_llama.cu's own
static inline uint32_t ptx_bf16x2(float low, float high) { return snipi_ptx_bf16x2(low, high); }

static inline void ptx_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) { snipi_ptx_mma_bf16(d, a, b); }

#define SHIM_FP8(a_format, b_format)                                                                                 \
    static inline void snipi_ptx_mma_##a_format##_##b_format(float d[4], const uint32_t a[4], const uint32_t b[2]) { \
        shim_mma(d, a, b, 1, "mma fp8",                                                                              \
                 [](float &s, uint32_t x, uint32_t y) { s += shim_of.a_format[x] * shim_of.b_format[y]; });          \
    }
SHIM_FP8(e4m3, e4m3)
SHIM_FP8(e4m3, e5m2)
SHIM_FP8(e5m2, e4m3)
SHIM_FP8(e5m2, e5m2)

// ---- Hopper: barriers, TMA, wgmma ----
struct shim_mbarrier {
    uint16_t count, pending;
    int32_t bytes : 31;
    uint32_t phase : 1;
};

static shim_mbarrier *shim_barrier_at(uint64_t *b) {
    static_assert(sizeof(shim_mbarrier) == 8, "");
    return (shim_mbarrier *)(void *)b;
}

static void shim_barrier_step(shim_mbarrier *b) {
    shim.progress = true;
    if (b->pending || b->bytes) return;
    b->phase ^= 1;
    b->pending = b->count;
}

static inline char *snipi_ptx_dynamic_shared() { return shim.dynamic_shared; }

static inline void snipi_ptx_barrier_init(uint64_t *b, int count) {
    shim_mbarrier fresh = {};
    fresh.count = fresh.pending = (uint16_t)count;
    memcpy(b, &fresh, sizeof fresh);
}

static inline void snipi_ptx_barrier_init_fence() {}

static void shim_barrier_arrive(uint64_t *at) {
    shim_mbarrier *b = shim_barrier_at(at);
    if (!b->pending) shim_die("a barrier gets more arrivals than it waits for", "mbarrier");
    b->pending--;
    shim_barrier_step(b);
}

static inline void snipi_ptx_barrier_arrive(uint64_t *at) {
    shim_tells("mbarrier");
    shim_barrier_arrive(at);
}

static inline void snipi_ptx_barrier_arrive_expect(uint64_t *at, int bytes) {
    shim_barrier_at(at)->bytes += bytes;
    snipi_ptx_barrier_arrive(at);
}

static inline void snipi_ptx_barrier_wait(uint64_t *at, int parity) {
    while (shim_barrier_at(at)->phase == (uint32_t)parity) shim_yield();
    shim.progress = shim_waited[shim.current] = true;
}

struct CUtensorMap {
    const uint8_t *codes;
    int64_t rows, k, row_bytes;
};

static inline int snipi_cuda_tensor_map(CUtensorMap *map, const void *codes, int64_t rows, int64_t k,
                                        int64_t row_bytes) {
    map->codes = (const uint8_t *)codes;
    map->rows = rows;
    map->k = k;
    map->row_bytes = row_bytes;
    return (uintptr_t)codes % 16 == 0 && row_bytes % 16 == 0 && row_bytes >= k && rows > 0 && k > 0;
}

// A byte of a tile in 128-byte swizzle: address bits 4 to 6 are permuted by bits 7 to 9.
static uint8_t *shim_swizzled(uintptr_t tile, unsigned row, unsigned k) {
    uintptr_t at = tile + row * 128 + k;
    return (uint8_t *)(at ^ (at >> 7 & 7) << 4);
}

static inline void snipi_ptx_tma_load(void *to, const CUtensorMap *map, uint64_t *b, int x, int y) {
    if ((uintptr_t)to % 1024) shim_die("TMA: the destination is not aligned", "TMA");
    for (unsigned r = 0; r < 128; r++)
        for (unsigned k = 0; k < 128; k++)
            *shim_swizzled((uintptr_t)to, r,
                           k) = y + r < map->rows && x + k < map->k ? map->codes[(y + r) * map->row_bytes + x + k] : 0;
    shim_barrier_at(b)->bytes -= 128 * 128;
    shim_barrier_step(shim_barrier_at(b));
}

template <int> static inline void snipi_ptx_registers_fewer() {}

template <int> static inline void snipi_ptx_registers_more() {}

// Shared memory has addresses of its own; dynamic shared memory begins somewhere beyond 0.
enum { SHIM_DYNAMIC = 3072 };

static inline uint32_t snipi_ptx_shared(const void *p) {
    return SHIM_DYNAMIC + (uint32_t)((const char *)p - shim.dynamic_shared);
}

// What a descriptor of K-major rows in 128-byte swizzle says; 18 bits of address and distance, in units of 16 bytes.
struct shim_operand {
    const char *at;
    unsigned group;  // bytes from eight rows to the next eight

    shim_operand(uint64_t d, unsigned version, const char *site)
        : at(shim.dynamic_shared - SHIM_DYNAMIC + (d & 0x3FFF) * 16), group((unsigned)(d >> 32 & 0x3FFF) * 16) {
        if (d >> 14 & 3 || d >> 30 & 3 || (d >> 46 & 7) != version) shim_die("a descriptor's fixed bits", site);
        if (d >> 49 & 7 || d >> 52 & 511) shim_die("a descriptor's base offset or mode is not zero", site);
        if (d >> 61 != 2) shim_die("a descriptor without 128-byte swizzle", site);
        if ((uintptr_t)at % 1024 >= 128) shim_die("an operand does not begin with a row group", site);
    }

    uint8_t byte(unsigned row, unsigned k) const { return *shim_swizzled((uintptr_t)at + row / 8 * group, row % 8, k); }
};

// Products are put off to the wait, as late as hardware may make them, and the other threads run before.
struct shim_product {
    uint64_t a, b;
    int add;
    const float *table_a, *table_b;
};

static std::vector<shim_product> shim_products[SHIM_MOST];

template <class D> static inline void snipi_ptx_wgmma_begin(D *) {}

#define SHIM_WGMMA(name, sum, a_format, b_format)                                                 \
    static inline void snipi_ptx_wgmma_##name(sum *, uint64_t a, uint64_t b, int add) {           \
        shim_products[shim.current].push_back({ a, b, add, shim_of.a_format, shim_of.b_format }); \
    }
SHIM_WGMMA(e4m3_e4m3, float, e4m3, e4m3)
SHIM_WGMMA(e4m3_e5m2, float, e4m3, e5m2)
SHIM_WGMMA(e5m2_e4m3, float, e5m2, e4m3)
SHIM_WGMMA(e5m2_e5m2, float, e5m2, e5m2)
SHIM_WGMMA(s8, int32_t, s8, s8)

template <class D> static inline void snipi_ptx_wgmma_end(D d[64]) {
    shim.progress = true;
    shim_yield();
    for (const shim_product &p : shim_products[shim.current]) {
        const shim_operand at_a(p.a, 0, "wgmma"), at_b(p.b, 0, "wgmma");
        D a[2][32], b[2][32];
        for (unsigned i = 0; i < 64; i++) {
            if (i % 4 == 0)  // eight columns further
                for (unsigned k = 0; k < 32; k++)
                    for (unsigned e = 0; e < 2; e++) {
                        if (i == 0)
                            a[e][k] = (D)p.table_a[at_a.byte(
                                shim.current % 128 / 32 * 16 + shim.current % 32 / 4 + e * 8, k)];
                        b[e][k] = (D)p.table_b[at_b.byte(i / 4 * 8 + shim.current % 4 * 2 + e, k)];
                    }
            D sum = p.add ? d[i] : 0;
            for (unsigned k = 0; k < 32; k++) sum += a[i / 2 % 2][k] * b[i % 2][k];
            d[i] = sum;
        }
    }
    shim_products[shim.current].clear();
}

// ---- datacenter Blackwell: tensor memory, tcgen05 ----
// Products are made when no thread gets further: as late as hardware may make them. In order 1, at once: as early.
// Loads are made at the wait, after the other threads.
enum { SHIM_LANES = 128, SHIM_COLUMNS = 512 };

struct shim_work {
    uint64_t *commit;
    uint32_t d, instruction;
    uint64_t a, b;
    bool integers, add;
};  // commit: or NULL, a product

struct shim_load {
    void *to;
    uint32_t from;
};

typedef float shim_floats __attribute__((vector_size(32)));

static struct {
    uint32_t word[SHIM_LANES][SHIM_COLUMNS];
    bool taken, relinquished;
    std::vector<shim_work> work;
    std::vector<shim_load> loads[SHIM_MOST];
} shim_tensor;

static void shim_tensor_check(uint32_t address, unsigned columns, const char *site) {
    if (!shim_tensor.taken) shim_die("tensor memory was not allocated", site);
    if (address >> 16 >= SHIM_LANES || (address & 65535) + columns > SHIM_COLUMNS)
        shim_die("beyond tensor memory", site);
    if (shim_waited[shim.current]) shim_die("no tcgen05.fence::after_thread_sync", site);
}

// A product by its instruction descriptor.
static void shim_multiply(const shim_work &w) {
    static shim_floats b[32][32], sums[32];
    static float a[SHIM_LANES][32];
    const uint32_t i = w.instruction, type_a = i >> 7 & 7, type_b = i >> 10 & 7, columns = (i >> 17 & 63) * 8;
    const char *site = "tcgen05.mma";
    const shim_operand at_a(w.a, 1, site), at_b(w.b, 1, site);
    if (i & 15 || i >> 6 & 1 || i >> 13 & 15 || i >> 23 & 1 || i >> 29)
        shim_die("an instruction's bits: sparse, saturating, negated, transposed or reserved", site);
    if ((i >> 4 & 3) != (w.integers ? 2 : 1)) shim_die("an instruction's type of sums", site);
    if (type_a > 1 || type_b > 1 || (w.integers && !(type_a && type_b)))
        shim_die("an instruction's types of operands", site);
    if ((i >> 24 & 31) * 16 != SHIM_LANES || columns == 0 || columns > 256 || columns % 16)
        shim_die("an instruction's shape", site);
    if (w.d >> 16 || w.d + columns > SHIM_COLUMNS) shim_die("beyond tensor memory", site);
    const float *table_a = w.integers ? shim_of.s8
                           : type_a   ? shim_of.e5m2
                                      : shim_of.e4m3,
                *table_b = w.integers ? shim_of.s8
                           : type_b   ? shim_of.e5m2
                                      : shim_of.e4m3;
    for (unsigned k = 0; k < 32; k++) {
        for (unsigned r = 0; r < SHIM_LANES; r++) a[r][k] = table_a[at_a.byte(r, k)];
        for (unsigned c = 0; c < columns; c++) ((float *)b[k])[c] = table_b[at_b.byte(c, k)];
    }
    for (unsigned r = 0; r < SHIM_LANES; r++) {
        uint32_t *d = &shim_tensor.word[r][w.d];
        float *sum = (float *)sums;
        for (unsigned c = 0; c < columns; c++) {
            if (!w.add)
                sum[c] = 0;
            else if (w.integers)
                sum[c] = (float)(int32_t)d[c];
            else
                memcpy(&sum[c], &d[c], 4);
        }
        for (unsigned k = 0; k < 32; k++)
            for (unsigned c = 0; c < columns / 8; c++) sums[c] += a[r][k] * b[k][c];
        for (unsigned c = 0; c < columns; c++) {
            if (w.integers)
                d[c] = (uint32_t)(int32_t)sum[c];
            else
                memcpy(&d[c], &sum[c], 4);
        }
    }
}

// Up to the next commit. Whether there was one.
static bool shim_tensor_step() {
    for (size_t n = 0; n < shim_tensor.work.size(); n++) {
        const shim_work w = shim_tensor.work[n];
        if (!w.commit) {
            shim_multiply(w);
            continue;
        }
        shim_tensor.work.erase(shim_tensor.work.begin(), shim_tensor.work.begin() + (long)n + 1);
        shim_barrier_arrive(w.commit);
        return true;
    }
    return false;
}

static void shim_tcgen05(bool integers, uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, int add) {
    const shim_work w = { NULL, d, instruction, a, b, integers, add != 0 };
    shim_tensor_check(d, 1, "tcgen05.mma");
    shim_touched[shim.current] = true;
    if (shim_order == 1)
        shim_multiply(w);
    else
        shim_tensor.work.push_back(w);
}

static inline void snipi_ptx_tcgen05_fp8(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, int add) {
    shim_tcgen05(false, d, a, b, instruction, add);
}

static inline void snipi_ptx_tcgen05_s8(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, int add) {
    shim_tcgen05(true, d, a, b, instruction, add);
}

static inline void snipi_ptx_tcgen05_commit(uint64_t *b) {
    shim_work w = {};
    w.commit = b;
    shim_tensor.work.push_back(w);
    shim_touched[shim.current] = false;
    if (shim_order == 1) shim_tensor_step();
}

static inline void snipi_ptx_tcgen05_before() {
    if (shim_tensor.loads[shim.current].empty()) shim_touched[shim.current] = false;
}

static inline void snipi_ptx_tcgen05_after() { shim_waited[shim.current] = false; }

static inline void snipi_ptx_tensor_memory_alloc(uint32_t *address) {
    shim_syncwarp(0xFFFFFFFFu, "tcgen05.alloc");
    shim_touched[shim.current] = true;
    if (shim.current % 32) return;
    if (shim_tensor.taken || shim_tensor.relinquished) shim_die("tensor memory is taken twice", "tcgen05.alloc");
    shim_tensor.taken = shim_tensor.relinquished = true;
    memset(shim_tensor.word, 0xFF, sizeof shim_tensor.word);
    *address = 0;
}

static inline void snipi_ptx_tensor_memory_free(uint32_t address) {
    shim_syncwarp(0xFFFFFFFFu, "tcgen05.dealloc");
    if (shim.current % 32) return;
    shim_tensor_check(address, SHIM_COLUMNS, "tcgen05.dealloc");
    if (!shim_tensor.work.empty()) shim_die("products are not done", "tcgen05.dealloc");
    shim_tensor.taken = false;
}

template <class D> static inline void snipi_ptx_tensor_memory_load(D d[32], uint32_t address) {
    if (shim_shuffle(0xFFFFFFFFu, address, 0, "tcgen05.ld") != address)
        shim_die("lanes load from different addresses", "tcgen05.ld");
    shim_tensor_check(address, 64, "tcgen05.ld");
    if ((address >> 16 & ~16u) != shim.current / 32 % 4 * 32)
        shim_die("a warp loads from another's lanes", "tcgen05.ld");
    memset(d, 0xFF, 32 * sizeof *d);
    shim_tensor.loads[shim.current].push_back({ d, address });
    shim_touched[shim.current] = true;
}

template <class D> static inline void snipi_ptx_tensor_memory_wait(D *) {
    shim_syncwarp(0xFFFFFFFFu, "tcgen05.wait::ld");
    shim.progress = true;
    shim_yield();
    for (const shim_load &l : shim_tensor.loads[shim.current])
        for (unsigned i = 0; i < 32; i++)
            memcpy((D *)l.to + i,
                   &shim_tensor.word[(l.from >> 16) + shim.current % 32 / 4 + (i & 2) * 4]
                                    [(l.from & 65535) + i / 4 * 8 + shim.current % 4 * 2 + (i & 1)],
                   4);
    shim_tensor.loads[shim.current].clear();
}

// ---- the runtime: launches run at once ----
typedef int cudaError_t;
typedef struct shim_stream *cudaStream_t;

enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaFuncAttributes {
    size_t sharedSizeBytes;
    int ptxVersion;
};

static std::vector<const void *> shim_absent;  // kernels without a body on the GPU played

static inline cudaError_t cudaGetLastError() { return cudaSuccess; }

static inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

static inline cudaError_t cudaDeviceGetAttribute(int *value, int, int) {
    *value = 2;
    return cudaSuccess;
}

template <class F> static cudaError_t cudaFuncSetAttribute(F *, int, int) { return cudaSuccess; }

template <class F> static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, F *kernel) {
    attributes->sharedSizeBytes = 6240;
    attributes->ptxVersion = 90;
    for (const void *absent : shim_absent)
        if (absent == (const void *)kernel) attributes->sharedSizeBytes = 1024;  // the system's own
    return cudaSuccess;
}

// Between cudaStreamBeginCapture and EndCapture work is noted down; a graph's launch does it.
typedef std::vector<std::function<void()>> *cudaGraph_t, *cudaGraphExec_t;

enum { cudaStreamCaptureModeGlobal };

static cudaGraph_t shim_capture;

static inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = NULL;
    return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

static inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status,
                                                   unsigned long long *id) {
    *status = shim_capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    *id = (unsigned long long)(uintptr_t)shim_capture;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

static inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) {
    shim_capture = new std::vector<std::function<void()>>;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = shim_capture;
    shim_capture = NULL;
    return cudaSuccess;
}

static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new std::vector<std::function<void()>>(*graph);
    return cudaSuccess;
}

static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (auto &work : *exec) work();
    return cudaSuccess;
}

static inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

static cudaError_t shim_do(const std::function<void()> &work) {
    if (shim_capture)
        shim_capture->push_back(work);
    else
        work();
    return cudaSuccess;
}

// Copies to the host arrive when an event recorded behind them is waited for; until then there is poison.
struct shim_copy {
    void *to;
    std::vector<char> bytes;
};

typedef struct shim_event {
    std::vector<shim_copy> copies;
    double when;
} * cudaEvent_t;

static std::vector<shim_copy> shim_copies;

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    memcpy(to, from, size);
    return cudaSuccess;
}

static inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

enum { cudaEventDisableTiming = 2 };

static inline cudaError_t cudaMallocHost(void **p, size_t size) {
    *p = malloc(size);
    return *p ? cudaSuccess : cudaErrorInvalidValue;
}

static inline cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}

// One call fails, after so many more; negative: none does.
static int shim_mallocs = -1, shim_events = -1;

static bool shim_refuses(int *left) { return *left >= 0 && (*left)-- == 0; }

template <class T> static cudaError_t cudaMalloc(T **p, size_t size) {
    *p = shim_refuses(&shim_mallocs) ? NULL : (T *)malloc(size);
    return *p ? cudaSuccess : cudaErrorInvalidValue;
}

static inline cudaError_t cudaFree(void *p) {
    free(p);
    return cudaSuccess;
}

static inline cudaError_t cudaEventCreate(cudaEvent_t *e) {
    if (shim_refuses(&shim_events)) return cudaErrorInvalidValue;
    *e = new shim_event();
    return cudaSuccess;
}

static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }

static inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}

static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    struct timespec t;
    e->copies.swap(shim_copies);
    shim_copies.clear();
    clock_gettime(CLOCK_MONOTONIC, &t);
    e->when = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
    return cudaSuccess;
}

static inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    for (const shim_copy &c : e->copies) memcpy(c.to, c.bytes.data(), c.bytes.size());
    e->copies.clear();
    return cudaSuccess;
}

static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)(b->when - a->when);
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, cudaStream_t) {
    return shim_do([=] {
        if (kind == cudaMemcpyDeviceToHost) {
            shim_copies.push_back({ to, std::vector<char>((const char *)from, (const char *)from + size) });
            memset(to, 0xA5, size);
        } else
            memmove(to, from, size);
    });
}

static inline cudaError_t cudaMemset(void *p, int byte, size_t size) {
    memset(p, byte, size);
    return cudaSuccess;
}

static inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t size, cudaStream_t) {
    return shim_do([=] { memset(p, byte, size); });
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

// Whether the thread got further.
static bool shim_resume(unsigned thread) {
    if (thread >= shim.threads || shim.fiber[thread].done) return false;
    shim.progress = false;
    shim.current = threadIdx.x = thread;
    shim_switch(&shim.scheduler, &shim.fiber[thread]);
    return shim.progress;
}

template <class F> static void shim_run(dim3 grid, dim3 block, size_t dynamic, F f) {
    gridDim = grid;
    blockDim = block;
    shim.threads = block.x;
    shim.call = [](void *p) { (*(F *)p)(); };
    shim.argument = &f;
    shim.dynamic_shared = (char *)aligned_alloc(1024, (dynamic + 1024) / 1024 * 1024);
    for (unsigned i = 0; i < shim.threads; i++)
        if (!shim.fiber[i].stack) shim.fiber[i].stack = (char *)aligned_alloc(64, SHIM_STACK);
    for (blockIdx = dim3(0); blockIdx.x < grid.x; blockIdx.x++) {
        shim.live = shim.threads;
        shim.barrier = {};
        memset(shim.warp, 0, sizeof shim.warp);
        memset(shim_waited, 0, sizeof shim_waited);
        memset(shim_touched, 0, sizeof shim_touched);
        shim_tensor.relinquished = false;
        memset(shim.dynamic_shared, 0xA5, dynamic);
        if (__start_shim_shared) memset(__start_shim_shared, 0xA5, (size_t)(__stop_shim_shared - __start_shim_shared));
        for (unsigned i = 0; i < shim.threads; i++) {
            shim_fiber &fiber = shim.fiber[i];
            fiber.done = false;
            fiber.fake = NULL;
#ifdef SHIM_ASAN
            __asan_unpoison_memory_region(fiber.stack, SHIM_STACK);  // of the last block's frames
#endif
            shim.warp[i / 32].live |= 1u << i % 32;
#if defined(__x86_64__)
            void **sp = (void **)(fiber.stack + SHIM_STACK);
            *--sp = NULL;
            *--sp = (void *)shim_entry;
            for (int k = 0; k < 6; k++) *--sp = NULL;
            fiber.sp = sp;
#else
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack;
            fiber.context.uc_stack.ss_size = SHIM_STACK;
            fiber.context.uc_link = NULL;
            makecontext(&fiber.context, shim_entry, 0);
#endif
        }
        while (shim.live) {
            bool any = false;
            if (shim_order == 2)  // all in turn, in steps of 7
                for (unsigned k = 0; k < shim.threads; k++) any |= shim_resume((7 * k + 3) % shim.threads);
            else  // warp after warp as far as it gets, forward or backward
                for (unsigned w = 0, warps = (shim.threads + 31) / 32; w < warps; w++)
                    for (bool more = true; more;) {
                        more = false;
                        for (unsigned l = 0; l < 32; l++)
                            more |= shim_resume(shim_order ? 32 * (warps - w) - 1 - l : 32 * w + l);
                        any |= more;
                    }
            if (!any && shim.live && !shim_tensor_step())
                shim_die("threads wait for one another without end", shim.barrier.site);
        }
        if (shim_tensor.taken) shim_die("tensor memory is not given back", "tcgen05.dealloc");
    }
    free(shim.dynamic_shared);
}

template <class... P, class... A>
static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), const A &...args) {
    if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > SHIM_MOST ||
        config->blockDim.x % 7 == 0)
        return cudaErrorInvalidValue;
    const cudaLaunchConfig_t c = *config;
    return shim_do([=] { shim_run(c.gridDim, c.blockDim, c.dynamicSmemBytes, [&] { kernel(args...); }); });
}

#ifdef SNIP_CUBLASLT
// ---- cuBLASLt, as its documentation has it: what is asked for is kept, and computed element by element ----
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};

#    define CUBLAS_VERSION 120900

enum cudaDataType_t { CUDA_R_32F, CUDA_R_8F_E4M3 = 28, CUDA_R_8F_E5M2 };

enum cublasComputeType_t { CUBLAS_COMPUTE_32F };

enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };

enum cublasLtMatmulMatrixScale_t {
    CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F = 4,
    CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F
};

enum {
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
    CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
    CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
    CUBLASLT_MATMUL_DESC_B_SCALE_POINTER
};

enum {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};

struct cublasLtMatmulDescOpaque_t {
    cublasOperation_t transa;
    cublasLtMatmulMatrixScale_t mode[2];
    const float *scales[2];
};

struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType_t type;
    int64_t rows, cols, ld;
};

struct cublasLtMatmulPreferenceOpaque_t {
    size_t workspace;
};

struct cublasLtMatmulAlgo_t {
    size_t workspace;
};

struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    cublasStatus_t state;
};

typedef struct shim_cublaslt {
    cublasStatus_t find;
    bool fails;
    size_t workspace;
} * cublasLtHandle_t;  // what it answers; what its way needs

static inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDescOpaque_t *d, cublasComputeType_t,
                                                    cudaDataType_t) {
    *d = {};
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDescOpaque_t *d, int what, const void *value,
                                                            size_t size) {
    void *at[] = { &d->transa, &d->mode[0], &d->mode[1], &d->scales[0], &d->scales[1] };
    memcpy(at[what], value, size);
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayoutOpaque_t *l, cudaDataType_t type,
                                                      uint64_t rows, uint64_t cols, int64_t ld) {
    *l = { type, (int64_t)rows, (int64_t)cols, ld };
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreferenceOpaque_t *p) {
    p->workspace = 0;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreferenceOpaque_t *p, int what,
                                                                  const void *value, size_t size) {
    if (!what) memcpy(&p->workspace, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t lt, const cublasLtMatmulDescOpaque_t *, const cublasLtMatrixLayoutOpaque_t *,
    const cublasLtMatrixLayoutOpaque_t *, const cublasLtMatrixLayoutOpaque_t *, const cublasLtMatrixLayoutOpaque_t *,
    const cublasLtMatmulPreferenceOpaque_t *p, int, cublasLtMatmulHeuristicResult_t *found, int *count) {
    *count = lt->find == CUBLAS_STATUS_SUCCESS && lt->workspace <= p->workspace;
    *found = { { lt->workspace }, CUBLAS_STATUS_SUCCESS };
    return lt->find;
}

// D (m, n) = alpha A (k, m)^T B (k, n) + beta C, by columns.
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t lt, const cublasLtMatmulDescOpaque_t *p,
                                            const float *alpha, const void *a, const cublasLtMatrixLayoutOpaque_t *la,
                                            const void *b, const cublasLtMatrixLayoutOpaque_t *lb, const float *beta,
                                            const float *c, const cublasLtMatrixLayoutOpaque_t *lc, float *d,
                                            const cublasLtMatrixLayoutOpaque_t *ld, const cublasLtMatmulAlgo_t *way,
                                            void *workspace, size_t bytes, cudaStream_t) {
    const int64_t k = la->rows, blocks = (k + 127) / 128;
    const cublasLtMatrixLayoutOpaque_t *layout[2] = { la, lb };
    const void *codes[2] = { a, b };
    auto value = [&](int of, int64_t i, int64_t l) {
        const uint8_t code = ((const uint8_t *)codes[of])[i * layout[of]->ld + l];
        const float *scales = p->scales[of] + (p->mode[of] == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F
                                                   ? l / 128 * layout[of]->cols + i
                                                   : i / 128 * ((blocks + 3) / 4 * 4) + l / 128);
        return (double)(layout[of]->type == CUDA_R_8F_E4M3 ? shim_of.e4m3 : shim_of.e5m2)[code] * (double)*scales;
    };
    if (lt->fails || p->transa != CUBLAS_OP_T || lb->rows != k || lc->rows != la->cols || lc->cols != lb->cols ||
        bytes < way->workspace)
        return CUBLAS_STATUS_EXECUTION_FAILED;
    memset(workspace, 0xA5, bytes);
    for (int64_t j = 0; j < lb->cols; j++)
        for (int64_t i = 0; i < la->cols; i++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++) sum += value(0, i, l) * value(1, j, l);
            d[i + j * ld->ld] = (float)((double)*alpha * sum +
                                        (*beta != 0.0f ? (double)*beta * (double)c[i + j * lc->ld] : 0.0));
        }
    return CUBLAS_STATUS_SUCCESS;
}
#endif
#endif
