// Scaled GEMMs beside OpenBLAS and oneDNN on the same shapes, operands quantized beforehand (or the activation within
// the time, where the case says so). Each pair is measured in turn; the medians and the median of the ratios are given:
// bench<TAB>case<TAB>ours<TAB>GFLOP/s<TAB>peer<TAB>theirs<TAB>ratio. Every instruction set that the machine has is
// timed, so one run gives all of its figures; the best one's are beside every peer.
//   --threads N   of ours and theirs (OMP_NUM_THREADS, or 2)
//   --isa NAME    that instruction set alone, as "avx2"; OPENBLAS_CORETYPE=Haswell and DNNL_MAX_CPU_ISA=AVX2 force the
//   peers
//   --all         the largest shapes too; m n k: one shape instead of the list
// -DOPENBLAS and -DDNNL where they are installed: the Makefile asks.
#define _DEFAULT_SOURCE
#define SNIP_IMPLEMENTATION
#include "../snip.h"
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
static snip_isa best = SNIP_ISA_BEST;  // --isa, or the machine's best
static char openblas_name[64] = "OpenBLAS f32";

static double now(void) {  // one thread: processor time, so that a shared machine disturbs less
    struct timespec t;
    clock_gettime(threads > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The last that is available: each is better than those before it.
static snip_isa best_isa(void) {
    int isa = SNIP_ISA_COUNT - 1;
    while (isa > SNIP_ISA_SCALAR && !snip_isa_available((snip_isa)isa)) isa--;
    return (snip_isa)isa;
}

static double median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, by_value);
    return v[n / 2];
}

static void *memory(size_t bytes) {
    char *p = (char *)malloc(bytes + 64);
    if (!p) {
        puts("out of memory");
        exit(1);
    }
    p += 64 - (uintptr_t)p % 64;
    memset(p, 0, bytes);
    return p;
}

static int64_t m, n, k;
static float *x, *w, *c, *theirs;
static void *scratch;
static uint8_t *bytes_x;
static int8_t *bytes_w;

typedef struct {
    snip_recipe recipe_x, recipe_w;
    snip_operand a, b;
    void *codes_x, *scales_x;
    int quantize;
    snip_isa isa;
} job;

static void prepare(job *j, snip_recipe rx, snip_recipe rw, snip_isa isa) {
    static const snip_operand none;
    snip_rng_key key = { 1, 2, 3 };
    void *codes_w = memory(snip_codes_bound(&rw, n, k)), *scales_w = memory(snip_scales_bound(&rw, n, k) + 1);
    j->recipe_x = rx;
    j->recipe_w = rw;
    j->isa = isa;
    j->quantize = 0;
    j->codes_x = memory(snip_codes_bound(&rx, m, k));
    j->scales_x = memory(snip_scales_bound(&rx, m, k) + 1);
    snip_quantize(&rx, x, m, k, k, j->codes_x, j->scales_x, key, NULL, NULL);
    snip_quantize(&rw, w, n, k, k, codes_w, scales_w, key, NULL, NULL);
    j->a = j->b = none;
    j->a.recipe = &j->recipe_x;
    j->a.codes = j->codes_x;
    j->a.scales = j->scales_x;
    j->b.recipe = &j->recipe_w;
    j->b.codes = codes_w;
    j->b.scales = scales_w;
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
#ifdef OPENBLAS
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

// BF16 x BF16 -> F32, the weight in the layout oneDNN likes best.
static int matmul_begin(matmul *t) {
    dnnl_dims_t sx, sw, so;
    dnnl_memory_desc_t dx, dw, dout;
    dnnl_primitive_desc_t pd;
    dnnl_engine_t engine;
    dnnl_memory_t mem[3];
    const dnnl_memory_desc_t *packed;
    int i;
    sx[0] = m;
    sx[1] = k;
    sw[0] = k;
    sw[1] = n;
    so[0] = m;
    so[1] = n;
    if (dnnl_engine_create(&engine, dnnl_cpu, 0) || dnnl_stream_create(&t->stream, engine, dnnl_stream_default_flags))
        return 0;
#    if DNNL_VERSION_MAJOR == 2
    {
        dnnl_matmul_desc_t d;
        if (dnnl_memory_desc_init_by_tag(&dx, 2, sx, dnnl_bf16, dnnl_ab) ||
            dnnl_memory_desc_init_by_tag(&dw, 2, sw, dnnl_bf16, dnnl_format_tag_any) ||
            dnnl_memory_desc_init_by_tag(&dout, 2, so, dnnl_f32, dnnl_ab) ||
            dnnl_matmul_desc_init(&d, &dx, &dw, NULL, &dout) || dnnl_primitive_desc_create(&pd, &d, NULL, engine, NULL))
            return 0;
        packed = dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
        if (dnnl_memory_create(&mem[0], &dx, engine, DNNL_MEMORY_ALLOCATE) ||
            dnnl_memory_create(&mem[1], packed, engine, DNNL_MEMORY_ALLOCATE) ||
            dnnl_memory_create(&mem[2], &dout, engine, DNNL_MEMORY_ALLOCATE))
            return 0;
    }
#    else
    if (dnnl_memory_desc_create_with_tag(&dx, 2, sx, dnnl_bf16, dnnl_ab) ||
        dnnl_memory_desc_create_with_tag(&dw, 2, sw, dnnl_bf16, dnnl_format_tag_any) ||
        dnnl_memory_desc_create_with_tag(&dout, 2, so, dnnl_f32, dnnl_ab) ||
        dnnl_matmul_primitive_desc_create(&pd, engine, dx, dw, NULL, dout, NULL))
        return 0;
    packed = (const dnnl_memory_desc_t *)dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    if (dnnl_memory_create(&mem[0], dx, engine, DNNL_MEMORY_ALLOCATE) ||
        dnnl_memory_create(&mem[1], (const_dnnl_memory_desc_t)packed, engine, DNNL_MEMORY_ALLOCATE) ||
        dnnl_memory_create(&mem[2], dout, engine, DNNL_MEMORY_ALLOCATE))
        return 0;
#    endif
    if (dnnl_primitive_create(&t->primitive, pd)) return 0;
    for (i = 0; i < 3; i++) t->args[i].memory = mem[i];
    t->args[0].arg = DNNL_ARG_SRC;
    t->args[1].arg = DNNL_ARG_WEIGHTS;
    t->args[2].arg = DNNL_ARG_DST;
    return 1;
}

static void onednn_bf16(void *p) {
    matmul *t = (matmul *)p;
    dnnl_primitive_execute(t->primitive, t->stream, 3, t->args);
    dnnl_stream_wait(t->stream);
}
#endif

static double seconds(void (*f)(void *), void *p, int times) {
    double t = now();
    int i;
    for (i = 0; i < times; i++) f(p);
    return (now() - t) / times;
}

static void compare(const char *name, job *j, const char *peer, void (*f)(void *), void *p) {
    double a[PAIRS], b[PAIRS], ratio[PAIRS], flops = 2.0 * (double)m * (double)n * (double)k, once;
    int i, times;
    ours(j);
    if (f) f(p);
    once = seconds(ours, j, 1);
    times = once > 0.05 ? 1 : (int)(0.05 / once);
    for (i = 0; i < PAIRS; i++) {
        a[i] = seconds(ours, j, times);
        b[i] = f ? seconds(f, p, times) : a[i];
        ratio[i] = b[i] / a[i];
    }
    printf("bench\t%s %s, %lldx%lldx%lld, %d thread%s\t%.0f\tGFLOP/s\t%s\t", name, snip_isa_name(j->isa), (long long)m,
           (long long)n, (long long)k, threads, threads > 1 ? "s" : "", flops / median(a, PAIRS) * 1e-9, peer);
    if (f)
        printf("%.0f\t%.2f\n", flops / median(b, PAIRS) * 1e-9, median(ratio, PAIRS));
    else
        puts("\t");
    fflush(stdout);
}

static int forced;  // by --isa

static void bench_shape(int64_t mm, int64_t nn, int64_t kk) {
    static const snip_recipe f32 = SNIP_RECIPE_F32, bf16 = SNIP_RECIPE_BF16, fp8 = SNIP_RECIPE_FP8_TILE,
                             fp8b = SNIP_RECIPE_FP8_BLOCK, fp4 = SNIP_RECIPE_FP4_TILE, fp4b = SNIP_RECIPE_FP4_BLOCK;
    job jf32, jbf16, jfp8, jfp84, jfp4, jfp4q;
    void (*peer_s8)(void *) = NULL, (*peer_bf16)(void *) = NULL;
    void *peer_data = NULL;
    const char *name_s8 = "", *name_bf16 = "";
    int64_t i;
    int isa;
    m = mm;
    n = nn;
    k = kk;
    x = (float *)memory((size_t)(m * k) * 4);
    w = (float *)memory((size_t)(n * k) * 4);
    c = (float *)memory((size_t)(m * n) * 4);
    theirs = (float *)memory((size_t)(m * n) * 4);
    bytes_x = (uint8_t *)memory((size_t)(m * k));
    bytes_w = (int8_t *)memory((size_t)(n * k));
    for (i = 0; i < m * k; i++) {
        x[i] = (float)((i * 2654435761u >> 7) % 2001) / 1000.0f - 1.0f;
        bytes_x[i] = (uint8_t)(i % 25);
    }
    for (i = 0; i < n * k; i++) {
        w[i] = (float)((i * 2246822519u >> 7) % 2001) / 1000.0f - 1.0f;
        bytes_w[i] = (int8_t)(i % 25 - 12);
    }
    scratch = memory(snip_gemm_scratch(m, n, k));
    prepare(&jf32, f32, f32, best);
    prepare(&jbf16, bf16, bf16, best);
    prepare(&jfp8, fp8, fp8b, best);
    prepare(&jfp84, fp8, fp4b, best);
    prepare(&jfp4, fp4, fp4b, best);
    jfp4q = jfp4;
    jfp4q.quantize = 1;
#ifdef DNNL
    {
        static matmul t;
        int bf = matmul_begin(&t);
        peer_s8 = onednn_s8;
        name_s8 = "oneDNN u8s8";
        if (bf) {
            peer_bf16 = onednn_bf16;
            peer_data = &t;
            name_bf16 = "oneDNN bf16";
        }
        compare("fp4", &jfp4, "oneDNN u8s8", onednn_s8, NULL);
        if (bf) compare("fp4", &jfp4, "oneDNN bf16", onednn_bf16, &t);
        if (bf) compare("fp4 with quantizing x", &jfp4q, "oneDNN bf16", onednn_bf16, &t);
        if (bf) compare("fp8", &jfp8, "oneDNN bf16", onednn_bf16, &t);
        if (bf) compare("fp8 x fp4", &jfp84, "oneDNN bf16", onednn_bf16, &t);
        if (bf) compare("bf16", &jbf16, "oneDNN bf16", onednn_bf16, &t);
        compare("f32", &jf32, "oneDNN f32", onednn_f32, NULL);
    }
#endif
#ifdef OPENBLAS
    compare("f32", &jf32, openblas_name, openblas_f32, NULL);
    compare("fp4", &jfp4, openblas_name, openblas_f32, NULL);
    compare("fp4 with quantizing x", &jfp4q, openblas_name, openblas_f32, NULL);
    compare("fp8", &jfp8, openblas_name, openblas_f32, NULL);
    if (!peer_s8) {
        peer_s8 = openblas_f32;
        name_s8 = openblas_name;
    }
    if (!peer_bf16) {
        peer_bf16 = openblas_f32;
        name_bf16 = openblas_name;
    }
#endif
#if !defined(DNNL) && !defined(OPENBLAS)
    compare("fp4", &jfp4, "", NULL, NULL);
    compare("fp4 with quantizing x", &jfp4q, "", NULL, NULL);
    compare("fp8", &jfp8, "", NULL, NULL);
    compare("fp8 x fp4", &jfp84, "", NULL, NULL);
    compare("bf16", &jbf16, "", NULL, NULL);
    compare("f32", &jf32, "", NULL, NULL);
#endif
    for (isa = SNIP_ISA_SCALAR + 1; isa < (int)best && !forced; isa++) {  // the others, as far as they differ
        if (!snip_isa_available((snip_isa)isa)) continue;
        jf32.isa = jbf16.isa = jfp8.isa = jfp84.isa = jfp4.isa = (snip_isa)isa;
        if (isa != SNIP_ISA_AVX512_BF16) compare("fp4", &jfp4, name_s8, peer_s8, NULL);
        if (isa == SNIP_ISA_AVX_VNNI || isa == SNIP_ISA_AVX512_VNNI) continue;
        compare("fp8", &jfp8, name_bf16, peer_bf16, peer_data);
        if (isa == SNIP_ISA_AVX512_BF16) compare("fp8 x fp4", &jfp84, name_bf16, peer_bf16, peer_data);
        compare("bf16", &jbf16, name_bf16, peer_bf16, peer_data);
        if (isa != SNIP_ISA_AVX512_BF16) compare("f32", &jf32, "", NULL, NULL);
    }
}

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
    int isa;
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(cpu, sizeof cpu, "%s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n")] = 0;
            break;
        }
    if (f) fclose(f);
    printf("# %s; %d thread%s; snip:", cpu, threads, threads > 1 ? "s" : "");
    for (isa = SNIP_ISA_SCALAR + 1; isa < SNIP_ISA_COUNT; isa++)
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

int main(int argc, char **argv) {
    int all = 0, sizes = 0, i, isa;
    int64_t size[3] = { 0, 0, 0 };
    threads = getenv("OMP_NUM_THREADS") ? atoi(getenv("OMP_NUM_THREADS")) : 2;
    best = best_isa();
    for (i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--all"))
            all = 1;
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
            threads = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--isa") && i + 1 < argc) {
            for (isa = SNIP_ISA_SCALAR; isa < SNIP_ISA_COUNT && strcmp(snip_isa_name((snip_isa)isa), argv[i + 1]);
                 isa++) {
            }
            if (isa == SNIP_ISA_COUNT || !snip_isa_available((snip_isa)isa)) {
                printf("skipped: %s (not on this machine)\n", argv[i + 1]);
                return 0;
            }
            best = (snip_isa)isa;
            forced = 1;
            i++;
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
    if (sizes == 3) {
        bench_shape(size[0], size[1], size[2]);
        return 0;
    }
    bench_shape(512, 512, 512);
    bench_shape(1024, 1024, 1024);
    bench_shape(64, 4096, 4096);
    bench_shape(4096, 64, 4096);
    if (all) {
        bench_shape(2048, 2048, 2048);
        bench_shape(2048, 4096, 4096);
        bench_shape(4096, 4096, 1024);
        bench_shape(4096, 2752, 1024);
        bench_shape(4096, 4096, 4096);
    }
    return 0;
}
