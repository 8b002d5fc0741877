// libFuzzer target: recipe, shape and data from bytes into quantize and dequantize by every instruction set; bytes as
// a plan file and as a saved state. clang -fsanitize=fuzzer,address,undefined; with -DFUZZ_FILES a plain program that
// runs the files named on its command line.
#define SNIP_IMPLEMENTATION
#define SNIP_ILP_IMPLEMENTATION
#include "../snip.h"

static void demand(int ok) {
    if (!ok) abort();
}

static void fuzz_quantize(const uint8_t *data, size_t size) {
    static const int tiles[] = { 0, 1, 2, 3, 7, 16, 32, 128, 200, INT32_MAX };
    snip_recipe r;
    snip_quantize_job job;
    snip_quant_stats stats, first;
    int64_t rows, cols;
    size_t nc, ns, i, n;
    uint8_t *codes, *scales, *again;
    float *x, *out, *back;
    int isa, transposed;
    if (size < 8) return;
    r.format = (snip_format)(data[0] % 10);
    r.scale = (snip_scale)(data[1] % 7);
    r.rounding = (snip_rounding)(data[2] % 3);
    r.tile_rows = tiles[data[3] % 10];
    r.tile_cols = tiles[data[3] / 10 % 10];
    rows = data[4] % 70;
    cols = data[5] + 1;
    transposed = data[6] & 1;
    memset(&job, 0, sizeof job);
    job.x_format = data[6] & 2 ? SNIP_BF16 : SNIP_F32;
    job.out_format = data[6] & 4 ? SNIP_BF16 : SNIP_F32;
    job.key.seed = data[7];
    data += 8;
    size -= 8;
    n = (size_t)(rows * cols);
    nc = transposed ? snip_codes_bound(&r, cols, rows) : snip_codes_bound(&r, rows, cols);
    ns = transposed ? snip_scales_bound(&r, cols, rows) : snip_scales_bound(&r, rows, cols);
    x = (float *)calloc(n + 1, 4);
    out = (float *)calloc(n + 1, 4);
    back = (float *)calloc(n + 1, 4);
    codes = (uint8_t *)malloc(nc + 1);
    again = (uint8_t *)malloc(nc + 1);
    scales = (uint8_t *)malloc(ns + 4);
    demand(x && out && back && codes && again && scales);
    for (i = 0; i < 4 * n && size; i++) ((uint8_t *)x)[i] = data[i % size];
    job.x = x;
    job.rows = rows;
    job.cols = cols;
    job.ld = cols;
    if (transposed) {
        job.recipe_t = &r;
        job.codes_t = codes;
        job.scales_t = scales;
    } else {
        job.recipe = &r;
        job.codes = codes;
        job.scales = scales;
        job.out = out;
        job.ld_out = cols;
    }
    memset(&first, 0, sizeof first);
    for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++) {
        snip_status status;
        if (!snip_isa_available((snip_isa)isa)) continue;
        job.isa = (snip_isa)isa;
        status = snip_quantize_with(&job, transposed ? NULL : &stats, transposed ? &stats : NULL);
        demand(status == SNIP_OK || (status == SNIP_BAD_ARGUMENT && nc == 0));
        if (status) break;
        if (isa == SNIP_ISA_SCALAR) {
            memcpy(again, codes, nc);
            first = stats;
        }
        demand(memcmp(codes, again, nc) == 0 &&
               memcmp(&first.amax, &stats.amax, sizeof stats - 3 * sizeof(double)) == 0);
        if (!transposed && job.out_format == SNIP_F32) {
            demand(snip_dequantize(&r, codes, scales, rows, cols, back, cols) == SNIP_OK);
            for (i = 0; i < n; i++)
                demand(snipi_bits(back[i]) == snipi_bits(out[i]) ||
                       (snipi_nonfinite(back[i]) && snipi_nonfinite(out[i])));
        }
    }
    if (nc && !transposed) {  // any bytes are codes and scales
        for (i = 0; i < nc && size; i++) codes[i] = data[i % size];
        for (i = 0; i < ns && size; i++) scales[i] = data[(i + 3) % size];
        demand(snip_dequantize(&r, codes, scales, rows, cols, back, cols) == SNIP_OK);
        demand(snip_dequantize_bf16(&r, codes, scales, rows, cols, (uint16_t *)(void *)out, cols) == SNIP_OK);
    }
    free(x);
    free(out);
    free(back);
    free(codes);
    free(again);
    free(scales);
}

static snip *session(void) {
    snip_desc desc;
    snip *s;
    memset(&desc, 0, sizeof desc);
    desc.budget = 0.5;
    s = snip_create(&desc);
    demand(s != NULL);
    demand(snip_add_linear(s, "0.attn.q", 8, 16, 0) == 0 && snip_add_linear(s, "0.mlp.up", 16, 8, 0) == 1);
    return s;
}

static void fuzz_plan(const uint8_t *data, size_t size) {
    const char *path = "fuzz_plan.tmp";
    FILE *f = fopen(path, "wb");
    snip *s = session();
    demand(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    if (snip_plan_load(s, path) == SNIP_OK)
        demand(snip_plan_save(s, path) == SNIP_OK && snip_plan_load(s, path) == SNIP_OK);
    snip_destroy(s);
}

static void fuzz_state(const uint8_t *data, size_t size) {
    snip *s = session();
    size_t n = snip_state_size(s);
    uint8_t *copy = (uint8_t *)malloc((n > size ? n : size) + 1);
    demand(copy != NULL && snip_state_save(s, copy) == SNIP_OK);
    if (size) {
        if (data[0] & 1) {
            size_t i;
            for (i = 2; i + 3 < size; i += 3) copy[(data[i] | (size_t)data[i + 1] << 8) % n] ^= data[i + 2];
        }  // a damaged one
        else {
            memcpy(copy, data, size);
            n = size;
        }
    }
    (void)snip_state_load(s, copy, n);
    free(copy);
    snip_destroy(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    switch (data[0] % 4) {
        case 0: fuzz_plan(data + 1, size - 1); break;
        case 1: fuzz_state(data + 1, size - 1); break;
        default: fuzz_quantize(data + 1, size - 1);
    }
    return 0;
}

#ifdef FUZZ_FILES
int main(int argc, char **argv) {
    static uint8_t data[1 << 20];
    int i, passed = 0;
    for (i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        size_t size = f ? fread(data, 1, sizeof data, f) : 0;
        if (f) fclose(f);
        demand(f != NULL);
        LLVMFuzzerTestOneInput(data, size);
        passed++;
    }
    (void)remove("fuzz_plan.tmp");
    printf("%d passed, 0 failed\n", passed);
    return passed == 0;
}
#endif
