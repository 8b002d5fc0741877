/* The instructions of AMX, AVX512-BF16 and AVX-VNNI that snip.h uses, as C functions with the semantics of Intel's
   manual (SDM volume 2), for machines that lack them. Include before snip.h: its macros of these instructions are
   defined here, and it takes the machine to have them. What would fault on hardware is counted in `emulated_faults`. */
#ifndef EMULATE_X86_H
#define EMULATE_X86_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define SNIPI_EMULATED 1
#define EMULATED           \
    static __attribute__(( \
        noinline)) /* inlined into a caller for such a machine, it would be compiled to its instructions */
#define SNIPI_DPBUSD256(acc, x, y) emulate_dpbusd(&(acc), &(x), &(y))
#define SNIPI_DPBF16(acc, x, y) emulate_dpbf16(&(acc), &(x), &(y))
#define SNIPI_TILE_SHAPES(shapes) emulate_ldtilecfg(shapes)
#define SNIPI_TILE_RELEASE() emulate_tilerelease()
#define SNIPI_TILE_ZERO(t) emulate_tilezero(t)
#define SNIPI_TILE_LOAD(t, p, stride) emulate_tileload(t, p, stride)
#define SNIPI_TILE_STORE(t, p, stride) emulate_tilestore(t, p, stride)
#define SNIPI_TILE_DPBSSD(t, a, b) emulate_tdpbssd(t, a, b)
#define SNIPI_TILE_DPBF16(t, a, b) emulate_tdpbf16(t, a, b)

static long emulated_faults, emulated_products[4]; /* instructions run: vpdpbusd, vdpbf16ps, tdpbssd, tdpbf16ps */

typedef struct {
    int rows, row_bytes;
    unsigned char data[16][64];
} emulated_tile;

static __thread struct {
    int shaped;
    emulated_tile tile[8];
} emulated_tiles; /* of each thread, as the hardware's */

static void emulated_fault(const char *why) {
    if (__atomic_fetch_add(&emulated_faults, 1, __ATOMIC_RELAXED) < 5) printf("FAILED: would fault: %s\n", why);
}

static void count_product(int which) { __atomic_fetch_add(&emulated_products[which], 1, __ATOMIC_RELAXED); }

/* "FP32 FMA with DAZ=FTZ=1, RNE rounding" */
static float no_subnormal(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if (!(u & 0x7F800000u)) u &= 0x80000000u;
    memcpy(&x, &u, 4);
    return x;
}

static float from_bf16(uint16_t x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return no_subnormal(f);
}

static float flushed_fma(uint16_t x, uint16_t y, float sum) {
    return no_subnormal(fmaf(from_bf16(x), from_bf16(y), no_subnormal(sum)));
}

EMULATED void emulate_dpbusd(void *acc, const void *x,
                             const void *y) { /* VEX.256: 8 sums of four unsigned x signed bytes */
    int32_t sum[8];
    const uint8_t *a = (const uint8_t *)x;
    const int8_t *b = (const int8_t *)y;
    int i, t;
    memcpy(sum, acc, sizeof sum);
    for (i = 0; i < 8; i++)
        for (t = 0; t < 4; t++) sum[i] += a[4 * i + t] * b[4 * i + t];
    memcpy(acc, sum, sizeof sum);
    count_product(0);
}

EMULATED void emulate_dpbf16(void *acc, const void *x,
                             const void *y) { /* EVEX.512: 16 sums of two; the odd product is added first */
    float sum[16];
    uint16_t a[32], b[32];
    int i;
    memcpy(sum, acc, sizeof sum);
    memcpy(a, x, sizeof a);
    memcpy(b, y, sizeof b);
    for (i = 0; i < 16; i++) sum[i] = flushed_fma(a[2 * i], b[2 * i], flushed_fma(a[2 * i + 1], b[2 * i + 1], sum[i]));
    memcpy(acc, sum, sizeof sum);
    count_product(1);
}

EMULATED void emulate_ldtilecfg(const void *shapes) {
    const unsigned char *p = (const unsigned char *)shapes;
    int t, i;
    if (emulated_tiles.shaped)
        emulated_fault("shapes loaded twice without a release"); /* allowed, but nobody here means to */
    memset(&emulated_tiles, 0, sizeof emulated_tiles);
    if (p[0] != 1) emulated_fault("palette");
    for (i = 1; i < 16; i++)
        if (p[i]) emulated_fault("reserved bytes or a start row");
    for (i = 32; i < 48; i++)
        if (p[i]) emulated_fault("tiles 8 to 15");
    for (i = 56; i < 64; i++)
        if (p[i]) emulated_fault("tiles 8 to 15");
    for (t = 0; t < 8; t++) {
        emulated_tiles.tile[t].row_bytes = p[16 + 2 * t] + 256 * p[17 + 2 * t];
        emulated_tiles.tile[t].rows = p[48 + t];
        if (emulated_tiles.tile[t].row_bytes > 64 || emulated_tiles.tile[t].rows > 16 ||
            !emulated_tiles.tile[t].row_bytes != !emulated_tiles.tile[t].rows)
            emulated_fault("shape");
    }
    emulated_tiles.shaped = 1;
}

EMULATED void emulate_tilerelease(void) { memset(&emulated_tiles, 0, sizeof emulated_tiles); }

static int shaped(int t) {
    if (emulated_tiles.shaped && emulated_tiles.tile[t].rows) return 1;
    emulated_fault("a tile without a shape");
    return 0;
}

EMULATED void emulate_tilezero(int t) {
    if (shaped(t)) memset(emulated_tiles.tile[t].data, 0, sizeof emulated_tiles.tile[t].data);
}

EMULATED void emulate_tileload(int t, const void *p, int64_t stride) {
    int i;
    if (!shaped(t)) return;
    memset(emulated_tiles.tile[t].data, 0, sizeof emulated_tiles.tile[t].data);
    for (i = 0; i < emulated_tiles.tile[t].rows; i++)
        memcpy(emulated_tiles.tile[t].data[i], (const char *)p + i * stride, (size_t)emulated_tiles.tile[t].row_bytes);
}

EMULATED void emulate_tilestore(int t, void *p, int64_t stride) {
    int i;
    for (i = 0; shaped(t) && i < emulated_tiles.tile[t].rows; i++)
        memcpy((char *)p + i * stride, emulated_tiles.tile[t].data[i], (size_t)emulated_tiles.tile[t].row_bytes);
}

/* c[m][n] of 32 bits, a[m][4k], b[k][4n] */
static int shapes_fit(const emulated_tile *c, const emulated_tile *a, const emulated_tile *b) {
    if (c->rows == a->rows && c->row_bytes == b->row_bytes && a->row_bytes == 4 * b->rows && c != a && c != b && a != b)
        return 1;
    emulated_fault("shapes of a product");
    return 0;
}

EMULATED void emulate_tdpbssd(int to, int from_a, int from_b) {
    emulated_tile *c = &emulated_tiles.tile[to];
    const emulated_tile *a = &emulated_tiles.tile[from_a], *b = &emulated_tiles.tile[from_b];
    int m, n, k, t;
    if (!shaped(to) || !shaped(from_a) || !shaped(from_b) || !shapes_fit(c, a, b)) return;
    for (m = 0; m < c->rows; m++) {
        int32_t sum[16];
        memcpy(sum, c->data[m], sizeof sum);
        for (k = 0; k < b->rows; k++)
            for (n = 0; n < b->row_bytes / 4; n++)
                for (t = 0; t < 4; t++) sum[n] += (int8_t)a->data[m][4 * k + t] * (int8_t)b->data[k][4 * n + t];
        memcpy(c->data[m], sum, sizeof sum);
    }
    count_product(2);
}

EMULATED void emulate_tdpbf16(int to, int from_a,
                              int from_b) { /* even and odd products are summed apart, then together, then onto c */
    emulated_tile *c = &emulated_tiles.tile[to];
    const emulated_tile *a = &emulated_tiles.tile[from_a], *b = &emulated_tiles.tile[from_b];
    int m, n, k, t;
    if (!shaped(to) || !shaped(from_a) || !shaped(from_b) || !shapes_fit(c, a, b)) return;
    for (m = 0; m < c->rows; m++) {
        float sum[16], part[32];
        uint16_t x[32], y[32];
        memset(part, 0, sizeof part);
        memcpy(sum, c->data[m], sizeof sum);
        memcpy(x, a->data[m], sizeof x);
        for (k = 0; k < b->rows; k++) {
            memcpy(y, b->data[k], sizeof y);
            for (n = 0; n < b->row_bytes / 4; n++)
                for (t = 0; t < 2; t++) part[2 * n + t] = flushed_fma(x[2 * k + t], y[2 * n + t], part[2 * n + t]);
        }
        for (n = 0; n < b->row_bytes / 4; n++)
            sum[n] = no_subnormal(no_subnormal(sum[n]) + no_subnormal(part[2 * n] + part[2 * n + 1]));
        memcpy(c->data[m], sum, sizeof sum);
    }
    count_product(3);
}
#endif
