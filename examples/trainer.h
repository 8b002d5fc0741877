// trainer.h - what a command-line trainer needs around its model: options, token data, steps of training, files that
// are written whole or not at all, safetensors, the progress line.
//
// POSIX. Define _POSIX_C_SOURCE 200809L and _FILE_OFFSET_BITS 64 before the first include; include snip.h and llama.h
// before this file.
//
// Bad input ends the program by tr_die(): one line on standard error, exit status 2, the temporary file in hand
// removed. A file is overwritten only by renaming a complete, synced one over it. What is not a regular file is left
// alone.
//
// INDEX (search for the tag)
//   >>die >>threads >>options >>data >>steps >>files >>safetensors >>json >>progress
#ifndef TRAINER_H
#define TRAINER_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TR_PATH 1024  // bytes of a path, with its end

// >>die --------------------------------------------------------------------------------------------
static const char *tr_program = "train";
static char tr_unfinished[TR_PATH];  // temporary file to remove when the program has to stop
static int tr_line_open;             // a progress line without its newline is on the terminal

#if defined(__GNUC__)
#    define TR_DIES __attribute__((format(printf, 1, 2), noreturn))
#else
#    define TR_DIES
#endif

static inline void tr_end_line(void) {
    if (tr_line_open) fputs("\n", stderr);
    tr_line_open = 0;
}

static inline void tr_die_with(int status, const char *format, va_list args) {
    tr_end_line();
    fprintf(stderr, "%s: ", tr_program);
    vfprintf(stderr, format, args);
    fputs("\n", stderr);
    if (tr_unfinished[0]) unlink(tr_unfinished);
    fflush(stdout);
    _exit(status);  // not exit(): memory still in use is no leak to be reported
}

// Bad input, or a file that cannot be read or written.
TR_DIES static inline void tr_die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    tr_die_with(2, format, args);
    va_end(args);
    exit(2);
}

// The training itself failed.
TR_DIES static inline void tr_stop(const char *format, ...) {
    va_list args;
    va_start(args, format);
    tr_die_with(1, format, args);
    va_end(args);
    exit(1);
}

static inline void *tr_alloc(size_t bytes) {  // zeroed
    void *memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) tr_die("out of memory");
    return memory;
}

static inline double tr_now(void) {  // seconds
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void tr_path(char *out, const char *dir, const char *name) {
    if (snprintf(out, TR_PATH, "%s/%s", dir, name) >= TR_PATH - 8) tr_die("%s: the path is too long", dir);
}

// >>threads ----------------------------------------------------------------------------------------
// OpenMP's threads spin while they wait for each other. Where other programs want the cores too, the one that is
// waited for is then kept from running, and a step takes 20 times as long or more. So the trainer asks for waiting
// without spinning, unless the user has set OMP_WAIT_POLICY. Call it first of all in main().
//
// LLVM's runtime reads the variable at its first use. GCC's reads it when it is loaded, before main(), so that the
// program has to start itself once more; where that is not possible it goes on, spinning.
static inline void tr_wait_passively(char **argv) {
#ifdef _OPENMP
    if (getenv("OMP_WAIT_POLICY") || setenv("OMP_WAIT_POLICY", "passive", 1)) return;
#    if defined(__linux__) && !defined(__clang__)
    execv("/proc/self/exe", argv);
#    endif
#endif
    (void)argv;
}

static inline void tr_use_threads(int64_t threads) {  // 0: as many as OpenMP chooses
#ifdef _OPENMP
    if (threads) omp_set_num_threads((int)threads);
#else
    (void)threads;
#endif
}

// >>options ----------------------------------------------------------------------------------------
#define TR_MAX_DATA 1024
#define TR_MAX_RUNS 5
static const char *const tr_precisions[TR_MAX_RUNS] = { "snip", "f32", "bf16", "fp8", "fp4" };

typedef struct {
    const char *data[TR_MAX_DATA], *out, *plan, *precision, *compare, *optimizer, *fallback;
    const char *runs[TR_MAX_RUNS];  // of --compare
    int n_data, n_runs;
    int64_t steps, every, dim, blocks, heads, kv_heads, ffn, seq, batch, accum, warmup, seed, threads, stages;
    int64_t save_every, val_every;
    double budget, speedup, margin, spike, lr;
    int64_t resume, quiet, tied;
    int budget_given, precision_given;
} tr_options;

typedef struct {
    const char *name;
    snip_optimizer kind;
    double lr;  // peak, unless --lr says otherwise
    double beta1, beta2, decay;
} tr_optimizer;

static inline const tr_optimizer *tr_optimizer_named(const char *name) {
    // clang-format off
    static const tr_optimizer optimizers[] = {
        // name   kind               lr    beta1 beta2 decay
        { "adamw", SNIP_ADAMW,        2e-3, 0.9, 0.95, 0.1 },
        { "sgd",   SNIP_SGD_MOMENTUM, 0.1,  0.9, 0,    2e-3 },
        { "lion",  SNIP_LION,         1e-3, 0.9, 0.99, 0.2 },
    };
    // clang-format on
    for (int i = 0; i < 3; i++)
        if (!strcmp(name, optimizers[i].name)) return &optimizers[i];
    return NULL;
}

// What a spike of the loss falls back to; 0: no such name.
static inline snip_format tr_fallback(const char *name) {
    if (!strcmp(name, "fp8")) return SNIP_E4M3;
    if (!strcmp(name, "bf16")) return SNIP_BF16;
    if (!strcmp(name, "f32")) return SNIP_F32;
    if (!strcmp(name, "none")) return SNIP_E2M1;
    return (snip_format)0;
}

typedef enum { TR_INT, TR_REAL, TR_TEXT, TR_FLAG, TR_DATA } tr_kind;

typedef struct {
    const char *name;
    tr_kind kind;
    size_t at;  // offset of the field in tr_options
    double low, high;
    const char *arg, *help;
} tr_option;

// clang-format off
#define TR_AT(field) offsetof(tr_options, field)
#define TR_ANY -1e308, 1e308  // the session knows the range
static const tr_option tr_option_table[] = {
    { "--data", TR_DATA, 0, 0, 0, "FILE", "text, read as bytes, or llm.c's .bin of tokens; may be repeated" },
    { "--out", TR_TEXT, TR_AT(out), 0, 0, "DIR", "folder for the results (out)" },
    { "--steps", TR_INT, TR_AT(steps), 1, 1e9, "N", "optimizer steps (600)" },
    { "--precision", TR_TEXT, TR_AT(precision), 0, 0, "P", "snip, f32, bf16, fp8 or fp4 for the linear layers (snip)" },
    { "--budget", TR_REAL, TR_AT(budget), TR_ANY, "F", "snip: least share of the linear layers' FLOPs in FP4 (0.75)" },
    { "--speedup", TR_REAL, TR_AT(speedup), TR_ANY, "F",
      "snip: instead, the linear layers at least F times as fast as in BF16, as timed here (0: off)" },
    { "--every", TR_INT, TR_AT(every), 0, 1e9, "N", "snip: steps from measurement to measurement; 0: never (100)" },
    { "--margin", TR_REAL, TR_AT(margin), -1, 1e9, "F",
      "snip: standard errors that a change of the plan must save; -1: any saving (2)" },
    { "--spike", TR_REAL, TR_AT(spike), -1, 1e9, "F",
      "snip: deviations above its mean at which the loss spikes; -1: never (6)" },
    { "--fallback", TR_TEXT, TR_AT(fallback), 0, 0, "P",
      "snip: fp8, bf16, f32 or none, from a spike to the next measurement (fp8)" },
    { "--plan", TR_TEXT, TR_AT(plan), 0, 0, "FILE", "train under this plan, without measuring" },
    { "--compare", TR_TEXT, TR_AT(compare), 0, 0, "LIST", "train each precision of a list such as bf16,fp8,fp4,snip" },
    { "--dim", TR_INT, TR_AT(dim), 1, 65536, "N", "model width (128)" },
    { "--blocks", TR_INT, TR_AT(blocks), 1, 1000, "N", "transformer blocks (4)" },
    { "--heads", TR_INT, TR_AT(heads), 1, 65536, "N", "attention heads (4)" },
    { "--kv-heads", TR_INT, TR_AT(kv_heads), 1, 65536, "N", "key and value heads (as many as heads)" },
    { "--ffn", TR_INT, TR_AT(ffn), 1, 1 << 20, "N", "width of the SwiGLU layer (8/3 of dim, rounded up to 128)" },
    { "--tied", TR_FLAG, TR_AT(tied), 0, 0, NULL, "output layer shares the embedding's weights" },
    { "--seq", TR_INT, TR_AT(seq), 1, 1 << 20, "N", "tokens in a sequence (128)" },
    { "--batch", TR_INT, TR_AT(batch), 1, 1 << 20, "N", "sequences in a micro-batch (8)" },
    { "--accum", TR_INT, TR_AT(accum), 1, 1 << 20, "N", "micro-batches in a step (1)" },
    { "--optimizer", TR_TEXT, TR_AT(optimizer), 0, 0, "O", "adamw, sgd (with momentum) or lion (adamw)" },
    { "--lr", TR_REAL, TR_AT(lr), 0, 1e30, "F", "peak learning rate (adamw 0.002, sgd 0.1, lion 0.001)" },
    { "--warmup", TR_INT, TR_AT(warmup), 0, 1e9, "N", "warm-up steps (a tenth of the steps, at most 100)" },
    { "--seed", TR_INT, TR_AT(seed), 0, 9e15, "N", "of weights, batches and rounding (1)" },
    { "--stages", TR_INT, TR_AT(stages), 1, 1000, "N", "pipeline stages, each of which meets the budget (1)" },
    { "--threads", TR_INT, TR_AT(threads), 1, 4096, "N", "threads, where built with OpenMP (all cores)" },
    { "--save-every", TR_INT, TR_AT(save_every), 0, 1e9, "N",
      "steps from checkpoint to checkpoint; 0: only the last (100)" },
    { "--val-every", TR_INT, TR_AT(val_every), 0, 1e9, "N",
      "steps from validation to validation; 0: only the last (a tenth)" },
    { "--resume", TR_FLAG, TR_AT(resume), 0, 0, NULL, "go on from DIR/model.safetensors" },
    { "--quiet", TR_FLAG, TR_AT(quiet), 0, 0, NULL, "no progress and no plan on the terminal" },
};

// clang-format on

enum { TR_N_OPTIONS = sizeof tr_option_table / sizeof tr_option_table[0] };

static inline void tr_usage(void) {
    printf("usage: %s --data FILE [option]...\n", tr_program);
    for (int i = 0; i < TR_N_OPTIONS; i++) {
        const tr_option *option = &tr_option_table[i];
        int width = (int)(18 - strlen(option->name) - (option->arg ? 1 : 0));
        printf("  %s%s%-*s %s\n", option->name, option->arg ? " " : "", width, option->arg ? option->arg : "",
               option->help);
    }
    printf("  %-18s %s\n", "--help", "this text");
}

static inline int tr_is_precision(const char *name) {
    for (int i = 0; i < TR_MAX_RUNS; i++)
        if (!strcmp(name, tr_precisions[i])) return 1;
    return 0;
}

static inline const tr_option *tr_find_option(const char *name, size_t length) {
    for (int i = 0; i < TR_N_OPTIONS; i++)
        if (strlen(tr_option_table[i].name) == length && !strncmp(name, tr_option_table[i].name, length))
            return &tr_option_table[i];
    return NULL;
}

static inline int64_t tr_whole_number(const tr_option *option, const char *value) {
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (end == value || *end || errno) tr_die("%s needs a whole number, not '%s'", option->name, value);
    if ((double)number < option->low || (double)number > option->high)
        tr_die("%s must be between %.0f and %.0f, not %s", option->name, option->low, option->high, value);
    return (int64_t)number;
}

static inline double tr_real_number(const tr_option *option, const char *value) {
    char *end;
    double number = strtod(value, &end);
    if (end == value || *end || !llama_finite(number)) tr_die("%s needs a number, not '%s'", option->name, value);
    if (number < option->low || number > option->high)
        tr_die("%s must be between %g and %g, not %s", option->name, option->low, option->high, value);
    return number;
}

static inline void tr_set(tr_options *o, const tr_option *option, const char *value) {
    void *field = (char *)o + option->at;
    switch (option->kind) {
        case TR_FLAG: *(int64_t *)field = 1; break;
        case TR_INT: *(int64_t *)field = tr_whole_number(option, value); break;
        case TR_REAL: *(double *)field = tr_real_number(option, value); break;
        case TR_DATA:
            if (o->n_data == TR_MAX_DATA) tr_die("more than %d data files", TR_MAX_DATA);
            o->data[o->n_data++] = value;
            break;
        case TR_TEXT:
            if (!value[0]) tr_die("%s needs a value", option->name);
            *(const char **)field = value;
            break;
    }
    if (option->at == TR_AT(budget)) o->budget_given = 1;
    if (option->at == TR_AT(precision)) o->precision_given = 1;
}

static inline void tr_defaults(tr_options *o) {
    memset(o, 0, sizeof *o);
    o->out = "out";
    o->precision = "snip";
    o->optimizer = "adamw";
    o->fallback = "fp8";
    o->budget = 0.75;
    o->steps = 600;
    o->every = 100;
    o->save_every = 100;
    o->dim = 128;
    o->blocks = 4;
    o->heads = 4;
    o->seq = 128;
    o->batch = 8;
    o->accum = 1;
    o->seed = 1;
    o->stages = 1;
    o->lr = -1;  // these three follow from other options
    o->val_every = -1;
    o->warmup = -1;
}

static inline void tr_list_runs(tr_options *o) {
    size_t size = strlen(o->compare) + 1;
    char *at = (char *)tr_alloc(size);
    memcpy(at, o->compare, size);
    while (at) {
        char *comma = strchr(at, ',');
        if (comma) *comma = 0;
        if (!tr_is_precision(at)) tr_die("unknown precision '%s' in --compare", at);
        for (int i = 0; i < o->n_runs; i++)
            if (!strcmp(o->runs[i], at)) tr_die("--compare names %s twice", at);
        o->runs[o->n_runs++] = at;
        at = comma ? comma + 1 : NULL;
    }
}

// Checks what can be checked without the data, and fills in the defaults that follow from other options.
static inline void tr_finish_options(tr_options *o) {
    if (!o->n_data) tr_die("no --data given (--help lists the options)");
    if (!tr_is_precision(o->precision)) tr_die("unknown --precision '%s'", o->precision);
    if (o->plan && o->precision_given && strcmp(o->precision, "snip"))
        tr_die("--plan cannot be combined with --precision %s", o->precision);
    if (!tr_optimizer_named(o->optimizer)) tr_die("unknown --optimizer '%s'", o->optimizer);
    if (!tr_fallback(o->fallback)) tr_die("unknown --fallback '%s'", o->fallback);
    if (o->compare && o->precision_given) tr_die("--compare and --precision exclude each other");
    if (o->compare) tr_list_runs(o);

    if (o->lr < 0) o->lr = tr_optimizer_named(o->optimizer)->lr;
    if (!o->kv_heads) o->kv_heads = o->heads;
    if (!o->ffn) o->ffn = (o->dim * 8 / 3 + 127) / 128 * 128;
    if (o->warmup < 0) o->warmup = o->steps / 10 < 100 ? o->steps / 10 : 100;
    if (o->val_every < 0) o->val_every = o->steps >= 10 ? o->steps / 10 : 1;
    if (!(o->lr > 0)) tr_die("--lr must be above 0");
    if (o->batch * o->seq > 1 << 24) tr_die("--batch times --seq is too large");
}

static inline void tr_parse(tr_options *o, int argc, char **argv) {
    tr_defaults(o);
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *equals = strchr(arg, '=');
        const tr_option *option = tr_find_option(arg, equals ? (size_t)(equals - arg) : strlen(arg));
        if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            tr_usage();
            exit(fflush(stdout) ? 2 : 0);
        }
        if (!option) tr_die("unknown option '%s' (--help lists them)", arg);
        if (option->kind == TR_FLAG) {
            if (equals) tr_die("%s takes no value", option->name);
            tr_set(o, option, "");
            continue;
        }
        if (!equals && i + 1 >= argc) tr_die("%s needs a value", option->name);
        tr_set(o, option, equals ? equals + 1 : argv[++i]);
    }
    tr_finish_options(o);
}

// The model that the options describe; the program ends where there is none.
static inline llama_config tr_config(const tr_options *o, int vocab) {
    llama_config config;
    config.vocab = vocab;
    config.dim = (int)o->dim;
    config.blocks = (int)o->blocks;
    config.heads = (int)o->heads;
    config.kv_heads = (int)o->kv_heads;
    config.ffn = (int)o->ffn;
    config.seq = (int)o->seq;
    config.tied = (int)o->tied;
    config.stages = (int)o->stages;
    config.seed = (uint64_t)o->seed;
    const char *why = llama_config_check(&config);
    if (why) tr_die("%s", why);
    return config;
}

// >>data -------------------------------------------------------------------------------------------
typedef struct {
    uint16_t *tokens;
    int64_t n, n_train;  // the last tenth of each file is for validation, behind the rest
    int vocab;
    uint64_t hash;
} tr_data;

#define TR_FNV 14695981039346656037u  // where a hash begins

static inline uint64_t tr_fnv(uint64_t hash, const void *data, size_t n) {  // FNV-1a, 64 bits
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < n; i++) hash = (hash ^ p[i]) * 1099511628211u;
    return hash;
}

// The whole file in memory, freed by the caller.
static inline unsigned char *tr_read(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    size_t room = 1 << 16, n = 0;
    if (!f) tr_die("%s: %s", path, strerror(errno));
    unsigned char *memory = (unsigned char *)malloc(room);
    while (memory) {
        n += fread(memory + n, 1, room - n, f);
        if (n < room) break;
        unsigned char *grown = (unsigned char *)realloc(memory, room *= 2);
        if (!grown) free(memory);
        memory = grown;
    }
    if (!memory) tr_die("%s: out of memory", path);
    if (ferror(f)) tr_die("%s: %s", path, strerror(errno ? errno : EIO));
    fclose(f);
    *size = n;
    return memory;
}

static inline uint32_t tr_u32(const unsigned char *p) {  // little-endian
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

// llm.c's .bin: a header of 1024 bytes (magic number, version, tokens), then a token in two bytes each.
enum { TR_BIN_MAGIC = 20240520, TR_BIN_HEADER = 1024 };

static inline int64_t tr_bin_tokens(const char *path, const unsigned char *bytes, size_t size) {
    if (size < TR_BIN_HEADER) tr_die("%s: shorter than the header of a .bin token file", path);
    if (tr_u32(bytes) != TR_BIN_MAGIC)
        tr_die("%s: not a .bin token file (the magic number is %" PRIu32 ", not %d)", path, tr_u32(bytes),
               (int)TR_BIN_MAGIC);
    if (tr_u32(bytes + 4) != 1)
        tr_die("%s: version %" PRIu32 " of the .bin format is not supported", path, tr_u32(bytes + 4));

    int64_t n = tr_u32(bytes + 8), held = (int64_t)((size - TR_BIN_HEADER) / 2);
    int64_t wanted = TR_BIN_HEADER + 2 * n;
    if ((int64_t)size != wanted)
        tr_die("%s: %s: the header promises %" PRId64 " tokens, the file has %" PRId64, path,
               (int64_t)size < wanted ? "truncated" : "too long", n, held);
    return n;
}

typedef struct {
    uint16_t *tokens;
    int64_t n, room;
} tr_tokens;

static inline void tr_reserve_tokens(tr_tokens *to, int64_t n) {  // for n more
    if (to->n + n <= to->room) return;
    to->room = 2 * (to->n + n);
    to->tokens = (uint16_t *)realloc(to->tokens, (size_t)to->room * sizeof *to->tokens);
    if (!to->tokens) tr_die("the data: out of memory");
}

static inline void tr_append_tokens(tr_tokens *to, const unsigned char *bytes, int64_t n, int bin, int *top) {
    tr_reserve_tokens(to, n);
    for (int64_t i = 0; i < n; i++) {
        uint16_t token = (uint16_t)(bin ? bytes[2 * i] | bytes[2 * i + 1] << 8 : bytes[i]);
        to->tokens[to->n++] = token;
        if (token > *top) *top = token;
    }
}

// All files; a tenth of each is for validation, so that it sees every kind of text.
static inline void tr_load_data(tr_data *d, const tr_options *o) {
    tr_tokens train = { NULL, 0, 0 }, validation = { NULL, 0, 0 };
    int bins = 0, top = 255;
    memset(d, 0, sizeof *d);
    for (int i = 0; i < o->n_data; i++) {
        const char *path = o->data[i];
        size_t size, length = strlen(path);
        int bin = length > 4 && !strcmp(path + length - 4, ".bin");
        unsigned char *bytes = tr_read(path, &size);
        bins += bin;
        if (bins && bins != i + 1) tr_die("%s: text and .bin files cannot be mixed", path);
        if (!size) tr_die("%s: the file is empty", path);

        int64_t n = bin ? tr_bin_tokens(path, bytes, size) : (int64_t)size, last = n / 10, first = n - last;
        const unsigned char *at = bytes + (bin ? TR_BIN_HEADER : 0);
        tr_append_tokens(&train, at, first, bin, &top);
        tr_append_tokens(&validation, at + first * (bin ? 2 : 1), last, bin, &top);
        free(bytes);
    }
    if (validation.n < o->seq + 1)
        tr_die("%s: too short: %" PRId64 " tokens, but --seq %" PRId64 " needs at least %" PRId64
               " (a tenth is for validation)",
               o->n_data == 1 ? o->data[0] : "the data", train.n + validation.n, o->seq, 10 * (o->seq + 1));

    tr_reserve_tokens(&train, validation.n);
    memcpy(train.tokens + train.n, validation.tokens, (size_t)validation.n * sizeof *train.tokens);
    free(validation.tokens);
    d->tokens = train.tokens;
    d->n_train = train.n;
    d->n = train.n + validation.n;
    d->vocab = (top + 128) / 128 * 128;
    d->hash = TR_FNV;
    for (int64_t i = 0; i < d->n; i++) {
        unsigned char bytes[2] = { (unsigned char)d->tokens[i], (unsigned char)(d->tokens[i] >> 8) };
        d->hash = tr_fnv(d->hash, bytes, 2);
    }
}

static inline void tr_sequence(const tr_data *d, int64_t at, int64_t seq, int32_t *tokens, int32_t *targets) {
    for (int64_t i = 0; i < seq; i++) {
        tokens[i] = d->tokens[at + i];
        targets[i] = d->tokens[at + i + 1];
    }
}

// The n-th sequence of a step: a function of (seed, step, n) alone, so that resuming needs no position.
static inline void tr_train_sequence(const tr_data *d, uint64_t seed, int64_t step, int64_t n, int64_t seq,
                                     int32_t *tokens, int32_t *targets) {
    snip_rng_key key = { seed, (uint32_t)step, 0x64617461u };  // "data"
    uint32_t random[4];
    snip_philox(key, (uint64_t)n, random);
    uint64_t at = (uint64_t)random[0] << 32 | random[1];
    tr_sequence(d, (int64_t)(at % (uint64_t)(d->n_train - seq)), seq, tokens, targets);
}

// >>steps ------------------------------------------------------------------------------------------
#define TR_EPS 1e-8  // of AdamW
#define TR_CLIP 1.0  // largest norm of the gradients

// The passes of a model and the calls of its session, on the machine that they run on.
typedef struct {
    llama *(*create)(const llama_config *, int batch, snip *);
    void (*destroy)(llama *);
    void (*zero_gradients)(llama *);
    snip_status (*forward)(llama *, snip *, const int32_t *tokens, const int32_t *targets, int sequences,
                           float grad_scale, double *loss);
    snip_status (*backward)(llama *, snip *, const int32_t *tokens, int sequences);
    double (*gradient_norm)(llama *);
    void (*update)(llama *, snip_optimizer, const snip_adamw *, double decay);
    int (*next_pass)(llama *, snip *, double loss);
    snip_status (*end_step)(llama *, snip *, const snip_adamw *);
    snip_status (*measure_gains)(llama *, snip *, int64_t rows);
    snip_status (*save_state)(llama *, snip *, void *state);
} trainer_backend;

// A model in training.
typedef struct {
    const trainer_backend *on;
    llama *model;
    snip *session;
    const tr_data *data;
    int64_t batch, micro_batches;  // sequences in a micro-batch; micro-batches in a step
    int32_t *tokens, *targets;     // [micro_batches * batch][seq]
} tr_training;

static inline void tr_make_batch(tr_training *t, int64_t batch, int64_t micro_batches) {
    size_t tokens = (size_t)(batch * micro_batches * t->model->config.seq);
    t->batch = batch;
    t->micro_batches = micro_batches;
    t->tokens = (int32_t *)tr_alloc(tokens * sizeof *t->tokens);
    t->targets = (int32_t *)tr_alloc(tokens * sizeof *t->targets);
}

static inline void tr_free_batch(tr_training *t) {
    free(t->tokens);
    free(t->targets);
}

static inline void tr_load_batch(const tr_training *t, uint64_t seed, int64_t step) {
    int64_t seq = t->model->config.seq;
    for (int64_t i = 0; i < t->micro_batches * t->batch; i++)
        tr_train_sequence(t->data, seed, step, i, seq, t->tokens + i * seq, t->targets + i * seq);
}

// One pass over the step's micro-batches, from zeroed gradients. *loss: the mean over their tokens.
static inline snip_status tr_pass(const tr_training *t, double *loss) {
    int64_t micro_tokens = t->batch * t->model->config.seq, tokens = micro_tokens * t->micro_batches;
    *loss = 0;
    t->on->zero_gradients(t->model);
    for (int64_t i = 0; i < t->micro_batches; i++) {
        double sum;
        snip_status status = t->on->forward(t->model, t->session, t->tokens + i * micro_tokens,
                                            t->targets + i * micro_tokens, (int)t->batch, 1.0f / (float)tokens, &sum);
        if (!status) status = t->on->backward(t->model, t->session, t->tokens + i * micro_tokens, (int)t->batch);
        if (status) return status;
        *loss += sum / (double)tokens;
    }
    return SNIP_OK;
}

typedef struct {
    double loss;
    int passes;         // more than 1 where the step measured
    const char *doing;  // what it was doing where it failed
} tr_step;

// A step with the loaded batch: its passes, the optimizer, the session's own end of the step. update_step: 1 for the
// optimizer's first. Where anything has failed before the optimizer runs, its moments and the weights stay as they are.
static inline snip_status tr_take_step(const tr_training *t, const tr_optimizer *optimizer, double lr,
                                       int64_t update_step, tr_step *step) {
    snip_status status;
    step->passes = 0;
    step->doing = "training";
    do {
        status = tr_pass(t, &step->loss);
        step->passes++;
    } while (!status && t->on->next_pass(t->model, t->session, step->loss));
    if (!status) status = snip_step_status(t->session);
    if (status) return status;

    step->doing = "adding up its gradient";
    double norm = t->on->gradient_norm(t->model);
    if (!llama_finite(norm)) return SNIP_NONFINITE;
    snip_adamw update = { lr, optimizer->beta1, optimizer->beta2, TR_EPS, update_step, 1.0 };
    if (norm > TR_CLIP) update.grad_scale = TR_CLIP / norm;
    t->on->update(t->model, optimizer->kind, &update, optimizer->decay);

    step->doing = "measuring";
    return t->on->end_step(t->model, t->session, &update);
}

// Mean loss, in a mode, of the n sequences that begin at `at`. The loaded batch is lost.
static inline snip_status tr_evaluate(const tr_training *t, snip_mode mode, const int64_t *at, int64_t n,
                                      double *loss) {
    int64_t seq = t->model->config.seq;
    double total = 0, sum;
    snip_status status = snip_set_mode(t->session, mode);
    for (int64_t i = 0; i < n && !status; i += t->batch) {
        int64_t sequences = n - i < t->batch ? n - i : t->batch;
        for (int64_t j = 0; j < sequences; j++)
            tr_sequence(t->data, at[i + j], seq, t->tokens + j * seq, t->targets + j * seq);
        status = t->on->forward(t->model, t->session, t->tokens, t->targets, (int)sequences, 0.0f, &sum);
        if (!status) total += sum;
    }
    snip_set_mode(t->session, SNIP_TRAIN);
    *loss = total / (double)(n * seq);
    return status;
}

// llama.h's passes and the session as it is.
static inline int tr_cpu_next_pass(llama *g, snip *s, double loss) {
    (void)g;
    return snip_next_pass(s, loss);
}

static inline snip_status tr_cpu_end_step(llama *g, snip *s, const snip_adamw *update) {
    (void)g;
    return snip_end_step(s, update);
}

static inline snip_status tr_cpu_measure_gains(llama *g, snip *s, int64_t rows) {
    (void)g;
    return snip_measure_gains(s, rows);
}

static inline snip_status tr_cpu_save_state(llama *g, snip *s, void *state) {
    (void)g;
    return snip_state_save(s, state);
}

static inline const trainer_backend *tr_cpu(void) {
    static const trainer_backend cpu = { llama_create,    llama_destroy,        llama_zero_grad,  llama_forward,
                                         llama_backward,  llama_grad_norm,      llama_update,     tr_cpu_next_pass,
                                         tr_cpu_end_step, tr_cpu_measure_gains, tr_cpu_save_state };
    return &cpu;
}

// >>files ------------------------------------------------------------------------------------------
static inline void tr_mkdir(const char *dir) {  // with its parents
    char path[TR_PATH];
    tr_path(path, dir, ".");
    for (char *p = path + 1; *p; p++)
        if (*p == '/') {
            *p = 0;
            if (mkdir(path, 0777) && errno != EEXIST) tr_die("cannot create %s: %s", path, strerror(errno));
            *p = '/';
        }
}

// One run at a time writes to a folder. Held until the program ends.
static inline void tr_lock(const char *dir) {
    int fd = open(dir, O_RDONLY);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) tr_die("%s: another run is writing here", dir);
}

// Opens path.tmp. Until tr_commit renames it, path is untouched.
static inline FILE *tr_begin(const char *path) {
    char aside[TR_PATH];
    struct stat info;
    if (snprintf(aside, sizeof aside, "%s.tmp", path) >= TR_PATH) tr_die("%s: the path is too long", path);
    if (!stat(path, &info) && !S_ISREG(info.st_mode))
        tr_die("cannot write %s: it is there and not a regular file", path);
    FILE *f = fopen(aside, "wb");
    if (!f) tr_die("cannot write %s: %s", path, strerror(errno));
    memcpy(tr_unfinished, aside, sizeof aside);
    errno = 0;  // tr_commit tells what the first failed write said
    return f;
}

// Syncs the file that tr_begin has opened and renames it to path. keep_open: it goes on being appended to under that
// name.
static inline void tr_commit(FILE *f, const char *path, int keep_open) {
    int bad = ferror(f) || fflush(f) || fsync(fileno(f));
    if (!keep_open && fclose(f)) bad = 1;
    if (bad || rename(tr_unfinished, path)) tr_die("cannot write %s: %s", path, strerror(errno ? errno : EIO));
    tr_unfinished[0] = 0;

    char dir[TR_PATH];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (slash) slash[1] = 0;
    int fd = open(slash ? dir : ".", O_RDONLY);  // the rename itself must survive a power cut
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

// Dies, before hours of work, if path cannot be written.
static inline void tr_try(const char *path) {
    fclose(tr_begin(path));
    unlink(tr_unfinished);
    tr_unfinished[0] = 0;
}

// >>safetensors ------------------------------------------------------------------------------------
// A file is 8 bytes of header length, a JSON header, and the tensors' bytes without gaps. Ours ends its header with the
// metadata entry "checksum": FNV-1a 64 of the header up to that value and of all data.
typedef struct {
    char name[64];
    const char *dtype;   // U8, F32 or F64
    int64_t rows, cols;  // rows 0: one dimension
    const void *data;
} tr_tensor;

typedef struct {
    char key[32], value[512];
} tr_meta;

#define TR_MAX_META 16

typedef struct {
    unsigned char *memory;
    int n, n_meta;
    tr_tensor *tensors;
    tr_meta meta[TR_MAX_META];
} tr_tensors;

enum { TR_DTYPES = 3 };

static const char *const tr_dtypes[TR_DTYPES] = { "U8", "F32", "F64" };

static inline size_t tr_dtype_size(const char *dtype) {
    static const size_t sizes[TR_DTYPES] = { 1, 4, 8 };
    for (int i = 0; i < TR_DTYPES; i++)
        if (!strcmp(dtype, tr_dtypes[i])) return sizes[i];
    return 0;
}

static inline size_t tr_tensor_bytes(const tr_tensor *t) {
    return (size_t)(t->rows ? t->rows : 1) * (size_t)t->cols * tr_dtype_size(t->dtype);
}

// Turns elements between the machine's byte order and the file's, which is little-endian.
static inline void tr_little_endian(unsigned char *p, size_t bytes, size_t size) {
    const uint16_t one = 1;
    if (*(const unsigned char *)&one) return;
    for (size_t i = 0; i + size <= bytes; i += size)
        for (size_t j = 0; j < size / 2; j++) {
            unsigned char byte = p[i + j];
            p[i + j] = p[i + size - 1 - j];
            p[i + size - 1 - j] = byte;
        }
}

// A tensor as the file has it. Written to f; with f NULL added to the checksum, which is returned.
static inline uint64_t tr_emit(FILE *f, uint64_t sum, const tr_tensor *t) {
    unsigned char part[4096];
    size_t bytes = tr_tensor_bytes(t);
    for (size_t at = 0; at < bytes; at += sizeof part) {
        size_t n = bytes - at < sizeof part ? bytes - at : sizeof part;
        memcpy(part, (const unsigned char *)t->data + at, n);
        tr_little_endian(part, n, tr_dtype_size(t->dtype));
        if (f)
            fwrite(part, 1, n, f);
        else
            sum = tr_fnv(sum, part, n);
    }
    return sum;
}

typedef struct {
    char *text;
    size_t length, room;
} tr_text;

static inline void tr_append(tr_text *to, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(to->text + to->length, to->room - to->length, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= to->room - to->length) tr_die("a checkpoint's header is too long");
    to->length += (size_t)n;
}

// Errors of the writes show in tr_commit.
static inline void tr_write_tensors(FILE *f, const tr_tensor *t, int n_tensors, const tr_meta *meta, int n_meta) {
    tr_text header = { NULL, 0, (size_t)n_tensors * 256 + (size_t)n_meta * 600 + 256 };
    size_t offset = 0;
    header.text = (char *)tr_alloc(header.room);
    tr_append(&header, "{");
    for (int i = 0; i < n_tensors; i++) {
        size_t end = offset + tr_tensor_bytes(&t[i]);
        tr_append(&header, "\"%s\":{\"dtype\":\"%s\",\"shape\":[", t[i].name, t[i].dtype);
        if (t[i].rows) tr_append(&header, "%" PRId64 ",", t[i].rows);
        tr_append(&header, "%" PRId64 "],\"data_offsets\":[%zu,%zu]},", t[i].cols, offset, end);
        offset = end;
    }
    tr_append(&header, "\"__metadata__\":{");
    for (int i = 0; i < n_meta; i++) tr_append(&header, "\"%s\":\"%s\",", meta[i].key, meta[i].value);
    tr_append(&header, "\"checksum\":\"");
    uint64_t sum = tr_fnv(TR_FNV, header.text, header.length);
    for (int i = 0; i < n_tensors; i++) sum = tr_emit(NULL, sum, &t[i]);
    tr_append(&header, "%016" PRIx64 "\"}}", sum);
    while (header.length % 8) tr_append(&header, " ");

    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.length >> 8 * i);
    fwrite(length, 1, 8, f);
    fwrite(header.text, 1, header.length, f);
    for (int i = 0; i < n_tensors; i++) tr_emit(f, 0, &t[i]);
    free(header.text);
}

// >>json -------------------------------------------------------------------------------------------
// A strict reader of the JSON that safetensors headers are made of. Each function returns 1 if it has read what it is
// for.
typedef struct {
    const char *p, *end;
} tr_json;

static inline int tr_json_char(tr_json *j, char c) {
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\n' || *j->p == '\t' || *j->p == '\r')) j->p++;
    if (j->p == j->end || *j->p != c) return 0;
    j->p++;
    return 1;
}

static inline int tr_json_string(tr_json *j, char *out, size_t room) {  // without escapes
    size_t n = 0;
    if (!tr_json_char(j, '"')) return 0;
    for (; j->p < j->end && *j->p != '"'; j->p++) {
        if (*j->p == '\\' || (unsigned char)*j->p < 32 || n + 1 >= room) return 0;
        out[n++] = *j->p;
    }
    out[n] = 0;
    return tr_json_char(j, '"');
}

static inline int tr_json_key(tr_json *j, char *out, size_t room) {
    return tr_json_string(j, out, room) && tr_json_char(j, ':');
}

static inline int tr_json_int(tr_json *j, int64_t *out) {
    int64_t value = 0;
    tr_json_char(j, ' ');
    const char *start = j->p;
    for (; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++) {
        if (value > (INT64_MAX >> 5) / 10) return 0;
        value = value * 10 + (*j->p - '0');
    }
    *out = value;
    return j->p > start;
}

static inline int tr_json_dtype(tr_json *j, tr_tensor *t) {
    char dtype[8];
    if (!tr_json_string(j, dtype, sizeof dtype)) return 0;
    for (int i = 0; i < TR_DTYPES; i++)
        if (!strcmp(dtype, tr_dtypes[i])) t->dtype = tr_dtypes[i];
    return 1;
}

static inline int tr_json_shape(tr_json *j, tr_tensor *t) {  // [cols] or [rows, cols]
    if (!tr_json_char(j, '[') || !tr_json_int(j, &t->cols)) return 0;
    if (tr_json_char(j, ',')) {
        t->rows = t->cols;
        if (!t->rows || !tr_json_int(j, &t->cols)) return 0;
    }
    return tr_json_char(j, ']');
}

static inline int tr_json_offsets(tr_json *j, int64_t *begin, int64_t *end) {
    return tr_json_char(j, '[') && tr_json_int(j, begin) && tr_json_char(j, ',') && tr_json_int(j, end) &&
           tr_json_char(j, ']');
}

static inline int tr_json_tensor(tr_json *j, tr_tensor *t, int64_t *begin, int64_t *end) {
    int has_dtype = 0, has_shape = 0, has_offsets = 0;
    char key[32];
    if (!tr_json_char(j, '{')) return 0;
    do {
        int ok = 0;
        if (!tr_json_key(j, key, sizeof key)) return 0;
        if (!strcmp(key, "dtype")) ok = has_dtype = tr_json_dtype(j, t);
        if (!strcmp(key, "shape")) ok = has_shape = tr_json_shape(j, t);
        if (!strcmp(key, "data_offsets")) ok = has_offsets = tr_json_offsets(j, begin, end);
        if (!ok) return 0;
    } while (tr_json_char(j, ','));
    return has_dtype && has_shape && has_offsets && t->dtype && tr_json_char(j, '}');
}

// The metadata. *checksum: where its checksum's digits stand.
static inline const char *tr_json_meta(tr_json *j, tr_tensors *s, const char **checksum) {
    static const char unreadable[] = "damaged: the header cannot be read";
    if (!tr_json_char(j, '{')) return unreadable;
    do {
        if (s->n_meta == TR_MAX_META) return "damaged: too much metadata";
        tr_meta *meta = &s->meta[s->n_meta++];
        if (!tr_json_key(j, meta->key, sizeof meta->key)) return unreadable;
        if (!strcmp(meta->key, "checksum")) *checksum = j->p + 1;
        if (!tr_json_string(j, meta->value, sizeof meta->value)) return unreadable;
    } while (tr_json_char(j, ','));
    return tr_json_char(j, '}') ? NULL : unreadable;
}

static inline void tr_free_tensors(tr_tensors *s) {
    free(s->memory);
    free(s->tensors);
    memset(s, 0, sizeof *s);
}

// One more tensor of the header. *offset: where the one before ended, and then where this one ends.
static inline const char *tr_add_tensor(tr_json *j, tr_tensors *s, const char *name, const unsigned char *data,
                                        int64_t data_size, int64_t *offset) {
    if (s->n % 64 == 0) {
        tr_tensor *grown = (tr_tensor *)realloc(s->tensors, (size_t)(s->n + 64) * sizeof *grown);
        if (!grown) return "out of memory";
        s->tensors = grown;
    }
    tr_tensor *t = &s->tensors[s->n++];
    int64_t begin = 0, end = 0;
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    if (!tr_json_tensor(j, t, &begin, &end)) return "damaged: the header cannot be read";
    if (begin != *offset || end < begin) return "damaged: the tensors' offsets do not join";
    if (end > data_size) return "truncated";
    int64_t elements = (end - begin) / (int64_t)tr_dtype_size(t->dtype), rows = t->rows ? t->rows : 1;
    if (elements / rows != t->cols || tr_tensor_bytes(t) != (size_t)(end - begin))
        return "damaged: a tensor's shape and size disagree";
    t->data = data + begin;
    *offset = end;
    return NULL;
}

// NULL, or why the file is refused. Takes memory over.
static inline const char *tr_parse_tensors(tr_tensors *s, unsigned char *memory, size_t size) {
    static const char unreadable[] = "damaged: the header cannot be read";
    uint64_t length = 0;
    memset(s, 0, sizeof *s);
    s->memory = memory;
    if (size < 8) return "truncated";
    for (int i = 0; i < 8; i++) length |= (uint64_t)memory[i] << 8 * i;
    if (length > 100000000u) return "damaged: the header's length makes no sense";
    if (length > size - 8) return "truncated";

    const unsigned char *data = memory + 8 + length;
    const char *header = (const char *)memory + 8, *checksum = NULL;
    int64_t data_size = (int64_t)(size - 8 - length), offset = 0;
    tr_json json = { header, header + length };
    if (!tr_json_char(&json, '{')) return "not a safetensors file";
    do {
        char name[64];
        if (!tr_json_key(&json, name, sizeof name)) return unreadable;
        const char *why = strcmp(name, "__metadata__") ? tr_add_tensor(&json, s, name, data, data_size, &offset)
                                                       : tr_json_meta(&json, s, &checksum);
        if (why) return why;
    } while (tr_json_char(&json, ','));
    if (!tr_json_char(&json, '}')) return unreadable;
    while (json.p < json.end)
        if (*json.p++ != ' ') return unreadable;
    if (offset != data_size) return "damaged: data beyond the last tensor";
    if (!checksum) return "not written by this trainer (no checksum)";

    char want[20];
    uint64_t sum = tr_fnv(TR_FNV, header, (size_t)(checksum - header));
    snprintf(want, sizeof want, "%016" PRIx64, tr_fnv(sum, data, (size_t)data_size));
    if (strncmp(want, checksum, 16)) return "damaged: the checksum does not match";
    for (int i = 0; i < s->n; i++) {
        const tr_tensor *t = &s->tensors[i];
        tr_little_endian(memory + ((const unsigned char *)t->data - memory), tr_tensor_bytes(t),
                         tr_dtype_size(t->dtype));
    }
    return NULL;
}

static inline const char *tr_meta_value(const tr_tensors *s, const char *key) {
    for (int i = 0; i < s->n_meta; i++)
        if (!strcmp(s->meta[i].key, key)) return s->meta[i].value;
    return "";
}

static inline const tr_tensor *tr_find_named(const tr_tensors *s, const char *name) {
    for (int i = 0; i < s->n; i++)
        if (!strcmp(s->tensors[i].name, name)) return &s->tensors[i];
    return NULL;
}

// NULL if there is no tensor of that name, type and shape.
static inline const void *tr_find(const tr_tensors *s, const char *name, const char *dtype, int64_t rows,
                                  int64_t cols) {
    const tr_tensor *t = tr_find_named(s, name);
    return t && !strcmp(t->dtype, dtype) && t->rows == rows && t->cols == cols ? t->data : NULL;
}

// >>progress ---------------------------------------------------------------------------------------
// One line that redraws itself on a terminal; elsewhere a plain line now and then.
typedef struct {
    int quiet, terminal;
    double last;  // when it was drawn
    const char *label;
} tr_progress;

static inline void tr_note(const tr_progress *p, const char *format, ...) {
    if (p->quiet) return;
    va_list args;
    va_start(args, format);
    if (tr_line_open) fputs("\r\033[K", stderr);
    tr_line_open = 0;
    vfprintf(stderr, format, args);
    fputs("\n", stderr);
    va_end(args);
}

// eta: seconds to the end.
static inline void tr_show(tr_progress *p, int64_t step, int64_t steps, double loss, double tokens_per_s, double eta,
                           double fp4) {
    enum { WIDTH = 8 };  // of the bar: the line must fit in 80 columns

    double now = tr_now();
    int last = step == steps;
    if (p->quiet || (!last && now - p->last < (p->terminal ? 0.1 : 10.0))) return;
    p->last = now;

    char bar[WIDTH + 1];
    for (int i = 0; i < WIDTH; i++) bar[i] = i < (int)(WIDTH * step / steps) ? '#' : '.';
    bar[WIDTH] = 0;
    if (p->terminal)
        fprintf(stderr, "\r%-4s [%s] ", p->label, bar);
    else
        fprintf(stderr, "%s: ", p->label);
    fprintf(stderr, "step %" PRId64 "/%" PRId64 "  loss %.4f  %.0f tok/s  ETA %d:%02d  FP4 %.0f%%%s", step, steps, loss,
            tokens_per_s, (int)(eta / 60), (int)eta % 60, 100 * fp4, p->terminal ? "\033[K" : "\n");
    tr_line_open = p->terminal;
    if (last) tr_end_line();
}
#endif  // TRAINER_H
