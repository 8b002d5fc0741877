// Scaled GEMMs beside OpenBLAS and oneDNN on the same shapes, operands quantized beforehand (or the activation within
// the time, where the case says so).
//
// Each pair is measured in turn; the medians and the median of the ratios are given: bench<TAB>case<TAB>ours<TAB>
// GFLOP/s<TAB>peer<TAB>theirs<TAB>ratio. Every instruction set that the machine has is timed, so one run gives all of
// its figures; the best one's are beside every peer.
//   --threads N   of ours and theirs (OMP_NUM_THREADS, or 2)
//   --isa NAME    that instruction set alone, as "avx2"; OPENBLAS_CORETYPE=Haswell and DNNL_MAX_CPU_ISA=AVX2 force the
//                 peers
//   --all         the largest shapes too
//   m n k         one shape instead of the list
// -DOPENBLAS and -DDNNL where they are installed: the Makefile asks.
#define _DEFAULT_SOURCE
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "stats.h"
#ifdef _OPENMP
#    include <omp.h>
#endif
#ifdef OPENBLAS
#    include <cblas.h>
void openblas_set_num_threads(int);
char *openblas_get_corename(void);
#endif
#ifdef DNNL
#    include <dnnl.h>
#endif

enum { PAIRS = 7 };

static int threads = 1;
static snip_isa best;  // --isa, or the machine's best
static int forced;     // by --isa

// >>shape ------------------------------------------------------------------------------------------
// What is multiplied: C[m][n] = X[m][k] W[n][k]^T.
static int64_t m, n, k;
static float *x, *w, *c, *theirs;
static void *scratch;
static uint8_t *bytes_x;  // for the peers' INT8
static int8_t *bytes_w;

static void *memory(size_t bytes) {  // zeroed, 64-byte aligned
    char *p = (char *)malloc(bytes + 64);
    if (!p) {
        puts("out of memory");
        exit(1);
    }
    p += 64 - (uintptr_t)p % 64;
    memset(p, 0, bytes);
    return p;
}

static void make_shape(int64_t rows, int64_t cols, int64_t inner) {
    m = rows;
    n = cols;
    k = inner;
    x = (float *)memory((size_t)(m * k) * 4);
    w = (float *)memory((size_t)(n * k) * 4);
    c = (float *)memory((size_t)(m * n) * 4);
    theirs = (float *)memory((size_t)(m * n) * 4);
    bytes_x = (uint8_t *)memory((size_t)(m * k));
    bytes_w = (int8_t *)memory((size_t)(n * k));
    scratch = memory(snip_gemm_scratch(m, n, k));
    for (int64_t i = 0; i < m * k; i++) {
        x[i] = (float)((i * 2654435761u >> 7) % 2001) / 1000.0f - 1.0f;
        bytes_x[i] = (uint8_t)(i % 25);
    }
    for (int64_t i = 0; i < n * k; i++) {
        w[i] = (float)((i * 2246822519u >> 7) % 2001) / 1000.0f - 1.0f;
        bytes_w[i] = (int8_t)(i % 25 - 12);
    }
}

// >>ours -------------------------------------------------------------------------------------------
typedef struct {
    snip_recipe recipe_x, recipe_w;
    snip_operand a, b;
    void *codes_x, *scales_x;
    int quantize;  // x, within the time
    snip_isa isa;
} job;

typedef enum { FP4, FP4_QUANTIZED, FP8, FP8_FP4, BF16, F32, JOBS } kind;

static const char *const job_name[JOBS] = { "fp4", "fp4 with quantizing x", "fp8", "fp8 x fp4", "bf16", "f32" };

static job jobs[JOBS];

static void prepare(job *j, snip_recipe recipe_x, snip_recipe recipe_w) {
    const snip_operand none = { 0 };
    const snip_rng_key key = { 1, 2, 3 };
    void *codes_w = memory(snip_codes_bound(&recipe_w, n, k)),
         *scales_w = memory(snip_scales_bound(&recipe_w, n, k) + 1);
    j->recipe_x = recipe_x;
    j->recipe_w = recipe_w;
    j->isa = best;
    j->quantize = 0;
    j->codes_x = memory(snip_codes_bound(&recipe_x, m, k));
    j->scales_x = memory(snip_scales_bound(&recipe_x, m, k) + 1);
    snip_quantize(&recipe_x, x, m, k, k, j->codes_x, j->scales_x, key, NULL, NULL);
    snip_quantize(&recipe_w, w, n, k, k, codes_w, scales_w, key, NULL, NULL);
    j->a = j->b = none;
    j->a.recipe = &j->recipe_x;
    j->a.codes = j->codes_x;
    j->a.scales = j->scales_x;
    j->b.recipe = &j->recipe_w;
    j->b.codes = codes_w;
    j->b.scales = scales_w;
}

static void make_jobs(void) {
    const snip_recipe f32 = SNIP_RECIPE_F32, bf16 = SNIP_RECIPE_BF16;
    const snip_recipe fp8_tile = SNIP_RECIPE_FP8_TILE, fp8_block = SNIP_RECIPE_FP8_BLOCK;
    const snip_recipe fp4_tile = SNIP_RECIPE_FP4_TILE, fp4_block = SNIP_RECIPE_FP4_BLOCK;
    prepare(&jobs[F32], f32, f32);
    prepare(&jobs[BF16], bf16, bf16);
    prepare(&jobs[FP8], fp8_tile, fp8_block);
    prepare(&jobs[FP8_FP4], fp8_tile, fp4_block);
    prepare(&jobs[FP4], fp4_tile, fp4_block);
    prepare(&jobs[FP4_QUANTIZED], fp4_tile, fp4_block);
    jobs[FP4_QUANTIZED].quantize = 1;
}

static void ours(void *p) {
    job *j = (job *)p;
    snip_rng_key key = { 1, 2, 3 };
    if (j->quantize) snip_quantize(&j->recipe_x, x, m, k, k, j->codes_x, j->scales_x, key, NULL, NULL);
    if (snip_gemm(m, n, k, &j->a, &j->b, c, n, 0, NULL, scratch, j->isa) != SNIP_OK) {
        puts("snip_gemm failed");
        exit(1);
    }
}

// >>peers ------------------------------------------------------------------------------------------
typedef struct {
    const char *name;
    void (*call)(void *);  // NULL: there is none
    void *data;
} peer;

static const peer no_peer = { "", NULL, NULL };

#ifdef OPENBLAS
static char openblas_name[64];

static void openblas_f32(void *p) {
    (void)p;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)m, (int)n, (int)k, 1, x, (int)k, w, (int)k, 0, theirs,
                (int)n);
}
#endif

#ifdef DNNL
static void onednn_f32(void *p) {
    (void)p;
    dnnl_sgemm('N', 'T', m, n, k, 1, x, k, w, k, 0, theirs, n);
}

static void onednn_s8(void *p) {
    int32_t zero = 0;
    (void)p;
    dnnl_gemm_u8s8s32('N', 'T', 'F', m, n, k, 1, bytes_x, k, 0, bytes_w, k, 0, 0, (int32_t *)(void *)theirs, n, &zero);
}

typedef struct {
    dnnl_primitive_t primitive;
    dnnl_stream_t stream;
    dnnl_exec_arg_t args[3];
} matmul;

// What the two versions of oneDNN's interface call differently: the primitive's description, and memory for its
// operands. 0: refused.
#    if DNNL_VERSION_MAJOR == 2
static int describe_matmul(dnnl_engine_t engine, dnnl_dims_t dims[3], dnnl_primitive_desc_t *primitive,
                           dnnl_memory_t mem[3]) {
    dnnl_memory_desc_t of_x, of_w, of_out;
    dnnl_matmul_desc_t d;
    if (dnnl_memory_desc_init_by_tag(&of_x, 2, dims[0], dnnl_bf16, dnnl_ab) ||
        dnnl_memory_desc_init_by_tag(&of_w, 2, dims[1], dnnl_bf16, dnnl_format_tag_any) ||
        dnnl_memory_desc_init_by_tag(&of_out, 2, dims[2], dnnl_f32, dnnl_ab) ||
        dnnl_matmul_desc_init(&d, &of_x, &of_w, NULL, &of_out) ||
        dnnl_primitive_desc_create(primitive, &d, NULL, engine, NULL))
        return 0;
    const dnnl_memory_desc_t *packed = dnnl_primitive_desc_query_md(*primitive, dnnl_query_weights_md, 0);
    return !dnnl_memory_create(&mem[0], &of_x, engine, DNNL_MEMORY_ALLOCATE) &&
           !dnnl_memory_create(&mem[1], packed, engine, DNNL_MEMORY_ALLOCATE) &&
           !dnnl_memory_create(&mem[2], &of_out, engine, DNNL_MEMORY_ALLOCATE);
}
#    else
static int describe_matmul(dnnl_engine_t engine, dnnl_dims_t dims[3], dnnl_primitive_desc_t *primitive,
                           dnnl_memory_t mem[3]) {
    dnnl_memory_desc_t of_x, of_w, of_out;
    if (dnnl_memory_desc_create_with_tag(&of_x, 2, dims[0], dnnl_bf16, dnnl_ab) ||
        dnnl_memory_desc_create_with_tag(&of_w, 2, dims[1], dnnl_bf16, dnnl_format_tag_any) ||
        dnnl_memory_desc_create_with_tag(&of_out, 2, dims[2], dnnl_f32, dnnl_ab) ||
        dnnl_matmul_primitive_desc_create(primitive, engine, of_x, of_w, NULL, of_out, NULL))
        return 0;
    const_dnnl_memory_desc_t packed = dnnl_primitive_desc_query_md(*primitive, dnnl_query_weights_md, 0);
    return !dnnl_memory_create(&mem[0], of_x, engine, DNNL_MEMORY_ALLOCATE) &&
           !dnnl_memory_create(&mem[1], packed, engine, DNNL_MEMORY_ALLOCATE) &&
           !dnnl_memory_create(&mem[2], of_out, engine, DNNL_MEMORY_ALLOCATE);
}
#    endif

// BF16 x BF16 -> F32, the weight in the layout that oneDNN likes best. 0: there is none.
static int matmul_begin(matmul *t) {
    static const int args[3] = { DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST };
    dnnl_dims_t dims[3] = {
        {m,  k},
        { k, n},
        { m, n}
    };
    dnnl_primitive_desc_t primitive;
    dnnl_engine_t engine;
    dnnl_memory_t mem[3];
    if (dnnl_engine_create(&engine, dnnl_cpu, 0) || dnnl_stream_create(&t->stream, engine, dnnl_stream_default_flags))
        return 0;
    if (!describe_matmul(engine, dims, &primitive, mem)) return 0;
    if (dnnl_primitive_create(&t->primitive, primitive)) return 0;
    for (int i = 0; i < 3; i++) {
        t->args[i].arg = args[i];
        t->args[i].memory = mem[i];
    }
    return 1;
}

static void onednn_bf16(void *p) {
    matmul *t = (matmul *)p;
    dnnl_primitive_execute(t->primitive, t->stream, 3, t->args);
    dnnl_stream_wait(t->stream);
}
#endif

// >>compare ----------------------------------------------------------------------------------------
static double seconds(void (*call)(void *), void *data, int times) {
    double start = stats_seconds(threads);
    for (int i = 0; i < times; i++) call(data);
    return (stats_seconds(threads) - start) / times;
}

static void compare(kind of, const peer *other) {
    job *j = &jobs[of];
    double a[PAIRS], b[PAIRS], ratio[PAIRS], flops = 2.0 * (double)m * (double)n * (double)k;
    ours(j);
    if (other->call) other->call(other->data);
    double once = seconds(ours, j, 1);
    int times = once > 0.05 ? 1 : (int)(0.05 / once);
    for (int i = 0; i < PAIRS; i++) {
        a[i] = seconds(ours, j, times);
        b[i] = other->call ? seconds(other->call, other->data, times) : a[i];
        ratio[i] = b[i] / a[i];
    }
    printf("bench\t%s %s, %lldx%lldx%lld, %d thread%s\t%.0f\tGFLOP/s\t%s\t", job_name[of], snip_isa_name(j->isa),
           (long long)m, (long long)n, (long long)k, threads, threads > 1 ? "s" : "",
           flops / stats_median(a, PAIRS) * 1e-9, other->name);
    if (other->call)
        printf("%.0f\t%.2f\n", flops / stats_median(b, PAIRS) * 1e-9, stats_median(ratio, PAIRS));
    else
        puts("\t");
    fflush(stdout);
}

// The instruction sets below the best, as far as they differ.
static void compare_others(const peer *s8, const peer *bf16) {
    for (int isa = SNIP_ISA_SCALAR + 1; isa < (int)best && !forced; isa++) {
        if (!snip_isa_available((snip_isa)isa) || isa == SNIP_ISA_SSE2) continue;  // SSE2 has the scalar GEMMs
        const int has_bf16 = isa == SNIP_ISA_AVX512_BF16;
        for (int i = 0; i < JOBS; i++) jobs[i].isa = (snip_isa)isa;
        if (!has_bf16) compare(FP4, s8);
        if (isa == SNIP_ISA_AVX_VNNI || isa == SNIP_ISA_AVX512_VNNI) continue;
        compare(FP8, bf16);
        if (has_bf16) compare(FP8_FP4, bf16);
        compare(BF16, bf16);
        if (!has_bf16) compare(F32, &no_peer);
    }
}

static void bench_shape(int64_t rows, int64_t cols, int64_t inner) {
    peer s8 = no_peer, bf16 = no_peer;
    make_shape(rows, cols, inner);
    make_jobs();
#ifdef DNNL
    static matmul t;
    const peer f32 = { "oneDNN f32", onednn_f32, NULL };
    const peer dnnl_s8 = { "oneDNN u8s8", onednn_s8, NULL }, dnnl_bf16 = { "oneDNN bf16", onednn_bf16, &t };
    s8 = dnnl_s8;
    compare(FP4, &s8);
    if (matmul_begin(&t)) {
        bf16 = dnnl_bf16;
        for (int of = FP4; of <= BF16; of++) compare((kind)of, &bf16);
    }
    compare(F32, &f32);
#endif
#ifdef OPENBLAS
    const peer openblas = { openblas_name, openblas_f32, NULL };
    compare(F32, &openblas);
    compare(FP4, &openblas);
    compare(FP4_QUANTIZED, &openblas);
    compare(FP8, &openblas);
    if (!s8.call) s8 = openblas;
    if (!bf16.call) bf16 = openblas;
#endif
#if !defined(DNNL) && !defined(OPENBLAS)
    for (int of = FP4; of < JOBS; of++) compare((kind)of, &no_peer);
#endif
    compare_others(&s8, &bf16);
}

// >>main -------------------------------------------------------------------------------------------
#ifdef DNNL
static const char *onednn_isa(void) {
    switch ((int)dnnl_get_effective_cpu_isa()) {
        case dnnl_cpu_isa_avx2: return "avx2";
        case dnnl_cpu_isa_avx2_vnni: return "avx2 with vnni";
        case dnnl_cpu_isa_avx512_core: return "avx512";
        case dnnl_cpu_isa_avx512_core_vnni: return "avx512 with vnni";
        case dnnl_cpu_isa_avx512_core_bf16: return "avx512 with vnni and bf16";
        case dnnl_cpu_isa_avx512_core_amx: return "avx512 with vnni, bf16 and amx";
        default: return "another instruction set";
    }
}
#endif

// The processor and what each library makes of it.
static void tell_machine(void) {
    char line[256] = "", cpu[256] = "processor unknown";
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(cpu, sizeof cpu, "%s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n")] = 0;
            break;
        }
    if (f) fclose(f);
    printf("# %s; %d thread%s; snip:", cpu, threads, threads > 1 ? "s" : "");
    for (int isa = SNIP_ISA_SCALAR + 1; isa < SNIP_ISA_COUNT; isa++)
        if (snip_isa_available((snip_isa)isa)) printf(" %s", snip_isa_name((snip_isa)isa));
    if (forced) printf(", of which %s", snip_isa_name(best));
#ifdef OPENBLAS
    openblas_set_num_threads(threads);
    snprintf(openblas_name, sizeof openblas_name, "OpenBLAS f32 (%s)", openblas_get_corename());
    printf("; OpenBLAS: core type %s", openblas_get_corename());
#endif
#ifdef DNNL
    printf("; oneDNN %d.%d: %s", dnnl_version()->major, dnnl_version()->minor, onednn_isa());
#endif
    puts("");
#ifndef OPENBLAS
    puts("skipped: OpenBLAS (not installed)");
#endif
#ifndef DNNL
    puts("skipped: oneDNN (not installed)");
#endif
}

// The last one that there is; the enumeration goes from less to more.
static snip_isa best_isa(void) {
    int isa = SNIP_ISA_COUNT - 1;
    while (isa > SNIP_ISA_SCALAR && !snip_isa_available((snip_isa)isa)) isa--;
    return (snip_isa)isa;
}

static snip_isa isa_named(const char *name) {
    for (int isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT; isa++)
        if (!strcmp(snip_isa_name((snip_isa)isa), name) && snip_isa_available((snip_isa)isa)) return (snip_isa)isa;
    printf("skipped: %s (not on this machine)\n", name);
    exit(0);
}

int main(int argc, char **argv) {
    static const int64_t shapes[][3] = {
        {512,   512,  512 },
        { 1024, 1024, 1024},
        { 64,   4096, 4096},
        { 4096, 64,   4096},
        { 2048, 2048, 2048},
        { 2048, 4096, 4096},
        { 4096, 4096, 1024},
        { 4096, 2752, 1024},
        { 4096, 4096, 4096},
    };
    int n_shapes = 4, sizes = 0;
    int64_t size[3] = { 0, 0, 0 };
    threads = getenv("OMP_NUM_THREADS") ? atoi(getenv("OMP_NUM_THREADS")) : 2;
    best = best_isa();
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--all"))
            n_shapes = sizeof shapes / sizeof shapes[0];
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
            threads = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--isa") && i + 1 < argc) {
            best = isa_named(argv[++i]);
            forced = 1;
        } else if (sizes < 3 && atoll(argv[i]) > 0)
            size[sizes++] = atoll(argv[i]);
        else {
            fprintf(stderr, "bench_gemm [--threads N] [--isa NAME] [--all | m n k]\n");
            return 2;
        }
    if (threads < 1) threads = 1;
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    threads = 1;
#endif
    tell_machine();
    if (sizes == 3)
        bench_shape(size[0], size[1], size[2]);
    else
        for (int i = 0; i < n_shapes; i++) bench_shape(shapes[i][0], shapes[i][1], shapes[i][2]);
    return 0;
}
