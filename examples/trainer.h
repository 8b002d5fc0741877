// trainer.h - what a command-line trainer needs around its model: options, token data, safetensors,
// files that are written whole or not at all, the progress line. POSIX; define _POSIX_C_SOURCE 200809L
// and _FILE_OFFSET_BITS 64 before the first include. Include snip.h and llama.h first.
//
// Bad input ends the program by tr_die(): one line on standard error, exit status 2, the temporary file
// in hand removed. Nothing is overwritten except by renaming a complete, synced file over it; what is not a file is
// left alone.
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

#define TR_PATH 1024

// >>die --------------------------------------------------------------------------------------------
static const char *tr_program = "train";
static char tr_unfinished[TR_PATH];  // temporary file to remove when we have to stop
static int tr_line_open;             // a progress line without its newline is on the terminal

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
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2), noreturn))
#endif
static inline void
tr_die(const char *format, ...) {  // bad input, or a file that cannot be read or written
    va_list args;
    va_start(args, format);
    tr_die_with(2, format, args);
    va_end(args);
    exit(2);
}
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2), noreturn))
#endif
static inline void
tr_stop(const char *format, ...) {  // the training itself failed
    va_list args;
    va_start(args, format);
    tr_die_with(1, format, args);
    va_end(args);
    exit(1);
}

static inline void *tr_alloc(size_t n) {
    void *p = calloc(n ? n : 1, 1);
    if (!p) tr_die("out of memory");
    return p;
}

static inline double tr_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void tr_path(char *out, const char *dir, const char *name) {
    if (snprintf(out, TR_PATH, "%s/%s", dir, name) >= TR_PATH - 8) tr_die("%s: the path is too long", dir);
}

// >>options ----------------------------------------------------------------------------------------
#define TR_MAX_DATA 1024
#define TR_MAX_RUNS 5
static const char *const tr_precisions[TR_MAX_RUNS] = { "snip", "f32", "bf16", "fp8", "fp4" };

typedef struct {
    const char *data[TR_MAX_DATA], *out, *plan, *precision, *compare, *optimizer, *fallback;
    const char *runs[TR_MAX_RUNS];  // of --compare
    int n_data, n_runs;
    int64_t steps, every, dim, blocks, heads, kv_heads, ffn, seq, batch, accum, warmup, seed, threads, stages,
        save_every, val_every;
    double budget, speedup, margin, spike, lr;
    int64_t resume, quiet, tied;
    int budget_given, precision_given;
} tr_options;

// lr: peak, unless --lr says otherwise.
typedef struct {
    const char *name;
    snip_optimizer kind;
    double lr, beta1, beta2, decay;
} tr_optimizer;

static const tr_optimizer tr_optimizers[] = {
    {"adamw", SNIP_ADAMW,        2e-3, 0.9, 0.95, 0.1 },
    { "sgd",  SNIP_SGD_MOMENTUM, 0.1,  0.9, 0,    2e-3},
    { "lion", SNIP_LION,         1e-3, 0.9, 0.99, 0.2 }
};

static inline const tr_optimizer *tr_optimizer_named(const char *name) {
    for (int i = 0; i < 3; i++)
        if (!strcmp(name, tr_optimizers[i].name)) return &tr_optimizers[i];
    return NULL;
}

// What a spike of the loss falls back to.
static inline snip_format tr_fallback(const char *name) {
    return !strcmp(name, "fp8")    ? SNIP_E4M3
           : !strcmp(name, "bf16") ? SNIP_BF16
           : !strcmp(name, "f32")  ? SNIP_F32
           : !strcmp(name, "none") ? SNIP_E2M1
                                   : (snip_format)0;
}

typedef enum { TR_INT, TR_REAL, TR_TEXT, TR_FLAG, TR_DATA } tr_kind;

typedef struct {
    const char *name;
    tr_kind kind;
    size_t at;
    double low, high;
    const char *arg, *help;
} tr_option;

#define TR_AT(field) offsetof(tr_options, field)
static const tr_option tr_option_table[] = {
    {"--data",        TR_DATA, 0,                 0,  0,       "FILE", "text, read as bytes, or llm.c's .bin of tokens; may be repeated"},
    { "--out",        TR_TEXT, TR_AT(out),        0,  0,       "DIR",  "folder for the results (out)"                                   },
    { "--steps",      TR_INT,  TR_AT(steps),      1,  1e9,     "N",    "optimizer steps (600)"                                          },
    { "--precision",  TR_TEXT, TR_AT(precision),  0,  0,       "P",    "snip, f32, bf16, fp8 or fp4 for the linear layers (snip)"       },
    { "--budget",     TR_REAL, TR_AT(budget),     0,  1,       "F",    "snip: least share of the linear layers' FLOPs in FP4 (0.75)"    },
    { "--speedup",    TR_REAL, TR_AT(speedup),    0,  100,     "F",
     "snip: instead, the linear layers at least F times as fast as in BF16, as timed here (0: off)"                                     },
    { "--every",      TR_INT,  TR_AT(every),      0,  1e9,     "N",    "snip: steps from measurement to measurement; 0: never (100)"    },
    { "--margin",     TR_REAL, TR_AT(margin),     -1, 1e9,     "F",
     "snip: standard errors that a change of the plan must save; -1: any saving (2)"                                                    },
    { "--spike",      TR_REAL, TR_AT(spike),      -1, 1e9,     "F",
     "snip: deviations above its mean at which the loss spikes; -1: never (6)"                                                          },
    { "--fallback",   TR_TEXT, TR_AT(fallback),   0,  0,       "P",
     "snip: fp8, bf16, f32 or none, from a spike to the next measurement (fp8)"                                                         },
    { "--plan",       TR_TEXT, TR_AT(plan),       0,  0,       "FILE", "train under this plan, without measuring"                       },
    { "--compare",    TR_TEXT, TR_AT(compare),    0,  0,       "LIST", "train each precision of a list such as bf16,fp8,fp4,snip"       },
    { "--dim",        TR_INT,  TR_AT(dim),        1,  65536,   "N",    "model width (128)"                                              },
    { "--blocks",     TR_INT,  TR_AT(blocks),     1,  1000,    "N",    "transformer blocks (4)"                                         },
    { "--heads",      TR_INT,  TR_AT(heads),      1,  65536,   "N",    "attention heads (4)"                                            },
    { "--kv-heads",   TR_INT,  TR_AT(kv_heads),   1,  65536,   "N",    "key and value heads (as many as heads)"                         },
    { "--ffn",        TR_INT,  TR_AT(ffn),        1,  1 << 20, "N",    "width of the SwiGLU layer (8/3 of dim, rounded up to 128)"      },
    { "--tied",       TR_FLAG, TR_AT(tied),       0,  0,       NULL,   "output layer shares the embedding's weights"                    },
    { "--seq",        TR_INT,  TR_AT(seq),        1,  1 << 20, "N",    "tokens in a sequence (128)"                                     },
    { "--batch",      TR_INT,  TR_AT(batch),      1,  1 << 20, "N",    "sequences in a micro-batch (8)"                                 },
    { "--accum",      TR_INT,  TR_AT(accum),      1,  1 << 20, "N",    "micro-batches in a step (1)"                                    },
    { "--optimizer",  TR_TEXT, TR_AT(optimizer),  0,  0,       "O",    "adamw, sgd (with momentum) or lion (adamw)"                     },
    { "--lr",         TR_REAL, TR_AT(lr),         0,  1e30,    "F",    "peak learning rate (adamw 0.002, sgd 0.1, lion 0.001)"          },
    { "--warmup",     TR_INT,  TR_AT(warmup),     0,  1e9,     "N",    "warm-up steps (a tenth of the steps, at most 100)"              },
    { "--seed",       TR_INT,  TR_AT(seed),       0,  9e15,    "N",    "of weights, batches and rounding (1)"                           },
    { "--stages",     TR_INT,  TR_AT(stages),     1,  1000,    "N",    "pipeline stages, each of which meets the budget (1)"            },
    { "--threads",    TR_INT,  TR_AT(threads),    1,  4096,    "N",    "threads, where built with OpenMP (all cores)"                   },
    { "--save-every", TR_INT,  TR_AT(save_every), 0,  1e9,     "N",
     "steps from checkpoint to checkpoint; 0: only the last (100)"                                                                      },
    { "--val-every",  TR_INT,  TR_AT(val_every),  0,  1e9,     "N",
     "steps from validation to validation; 0: only the last (a tenth)"                                                                  },
    { "--resume",     TR_FLAG, TR_AT(resume),     0,  0,       NULL,   "go on from DIR/model.safetensors"                               },
    { "--quiet",      TR_FLAG, TR_AT(quiet),      0,  0,       NULL,   "no progress and no plan on the terminal"                        },
};

enum { TR_N_OPTIONS = sizeof tr_option_table / sizeof tr_option_table[0] };

static inline void tr_usage(void) {
    printf("usage: %s --data FILE [option]...\n", tr_program);
    for (int i = 0; i < TR_N_OPTIONS; i++) {
        const tr_option *o = &tr_option_table[i];
        printf("  %s%s%-*s %s\n", o->name, o->arg ? " " : "", (int)(18 - strlen(o->name) - (o->arg ? 1 : 0)),
               o->arg ? o->arg : "", o->help);
    }
    printf("  %-18s %s\n", "--help", "this text");
}

static inline int tr_is_precision(const char *name) {
    for (int i = 0; i < TR_MAX_RUNS; i++)
        if (!strcmp(name, tr_precisions[i])) return 1;
    return 0;
}

static inline void tr_set(tr_options *o, const tr_option *t, const char *value) {
    char *field = (char *)o + t->at, *end;
    errno = 0;
    if (t->kind == TR_INT) {
        long long n = strtoll(value, &end, 10);
        if (end == value || *end || errno) tr_die("%s needs a whole number, not '%s'", t->name, value);
        if ((double)n < t->low || (double)n > t->high)
            tr_die("%s must be between %.0f and %.0f, not %s", t->name, t->low, t->high, value);
        *(int64_t *)(void *)field = n;
    } else if (t->kind == TR_REAL) {
        double x = strtod(value, &end);
        if (end == value || *end || !llama_finite(x)) tr_die("%s needs a number, not '%s'", t->name, value);
        if (x < t->low || x > t->high) tr_die("%s must be between %g and %g, not %s", t->name, t->low, t->high, value);
        *(double *)(void *)field = x;
    } else if (t->kind == TR_DATA) {
        if (o->n_data == TR_MAX_DATA) tr_die("more than %d data files", TR_MAX_DATA);
        o->data[o->n_data++] = value;
    } else {
        if (!value[0]) tr_die("%s needs a value", t->name);
        *(const char **)(void *)field = value;
    }
}

// Fills in the defaults, reads the command line and checks what can be checked without the data.
static inline void tr_parse(tr_options *o, int argc, char **argv) {
    tr_options defaults = { 0 };
    *o = defaults;
    o->out = "out";
    o->precision = "snip";
    o->budget = 0.75;
    o->lr = -1;
    o->optimizer = "adamw";
    o->fallback = "fp8";
    o->steps = 600;
    o->every = 100;
    o->save_every = 100;
    o->val_every = -1;
    o->warmup = -1;
    o->dim = 128;
    o->blocks = 4;
    o->heads = 4;
    o->seq = 128;
    o->batch = 8;
    o->accum = 1;
    o->seed = 1;
    o->stages = 1;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *eq = strchr(arg, '=');
        size_t len = eq ? (size_t)(eq - arg) : strlen(arg);
        const tr_option *t = NULL;
        if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            tr_usage();
            exit(fflush(stdout) ? 2 : 0);
        }
        for (int j = 0; j < TR_N_OPTIONS && !t; j++)
            if (strlen(tr_option_table[j].name) == len && !strncmp(arg, tr_option_table[j].name, len))
                t = &tr_option_table[j];
        if (!t) tr_die("unknown option '%s' (--help lists them)", arg);
        if (t->kind == TR_FLAG) {
            if (eq) tr_die("%s takes no value", t->name);
            *(int64_t *)(void *)((char *)o + t->at) = 1;
            continue;
        }
        if (!eq && i + 1 >= argc) tr_die("%s needs a value", t->name);
        tr_set(o, t, eq ? eq + 1 : argv[++i]);
        if (t->at == TR_AT(budget)) o->budget_given = 1;
        if (t->at == TR_AT(precision)) o->precision_given = 1;
    }
    if (!o->n_data) tr_die("no --data given (--help lists the options)");
    if (!tr_is_precision(o->precision)) tr_die("unknown --precision '%s'", o->precision);
    if (o->plan && o->precision_given && strcmp(o->precision, "snip"))
        tr_die("--plan cannot be combined with --precision %s", o->precision);
    if (!tr_optimizer_named(o->optimizer)) tr_die("unknown --optimizer '%s'", o->optimizer);
    if (!tr_fallback(o->fallback)) tr_die("unknown --fallback '%s'", o->fallback);
    if (o->lr < 0) o->lr = tr_optimizer_named(o->optimizer)->lr;
    if (o->compare) {
        if (o->precision_given) tr_die("--compare and --precision exclude each other");
        char *list = (char *)tr_alloc(strlen(o->compare) + 1), *at = list;
        memcpy(list, o->compare, strlen(o->compare) + 1);
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
    if (!o->kv_heads) o->kv_heads = o->heads;
    if (!o->ffn) o->ffn = (o->dim * 8 / 3 + 127) / 128 * 128;
    if (o->warmup < 0) o->warmup = o->steps / 10 < 100 ? o->steps / 10 : 100;
    if (o->val_every < 0) o->val_every = o->steps >= 10 ? o->steps / 10 : 1;
    if (!(o->lr > 0)) tr_die("--lr must be above 0");
    if (o->batch * o->seq > 1 << 24) tr_die("--batch times --seq is too large");
}

// >>data -------------------------------------------------------------------------------------------
typedef struct {
    uint16_t *tokens;
    int64_t n, n_train;  // the last tenth of each file is for validation, behind the rest
    int vocab;
    uint64_t hash;
} tr_data;

#define TR_FNV 14695981039346656037u

static inline uint64_t tr_fnv(uint64_t h, const void *data, size_t n) {  // FNV-1a, 64 bits
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 1099511628211u;
    return h;
}

// The whole file in memory, freed by the caller.
static inline unsigned char *tr_read(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    size_t room = 1 << 16, n = 0;
    if (!f) tr_die("%s: %s", path, strerror(errno));
    unsigned char *p = (unsigned char *)malloc(room);
    while (p) {
        n += fread(p + n, 1, room - n, f);
        if (n < room) break;
        unsigned char *q = (unsigned char *)realloc(p, room *= 2);
        if (!q) {
            free(p);
        }
        p = q;
    }
    if (!p) tr_die("%s: out of memory", path);
    if (ferror(f)) tr_die("%s: %s", path, strerror(errno ? errno : EIO));
    fclose(f);
    *size = n;
    return p;
}

static inline uint32_t tr_u32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline void tr_grow(uint16_t **tokens, int64_t *room, int64_t n, const char *path) {
    if (n <= *room) return;
    uint16_t *q = (uint16_t *)realloc(*tokens, (size_t)(2 * n) * sizeof *q);
    if (!q) tr_die("%s: out of memory", path);
    *tokens = q;
    *room = 2 * n;
}

static inline void tr_load_data(tr_data *d, const tr_options *o) {
    int64_t room = 0, val_room = 0, n_val = 0;
    uint16_t *val = NULL;
    int bins = 0, top = 255;
    memset(d, 0, sizeof *d);
    for (int i = 0; i < o->n_data; i++) {
        const char *path = o->data[i];
        size_t size, len = strlen(path);
        int bin = len > 4 && !strcmp(path + len - 4, ".bin");
        unsigned char *p = tr_read(path, &size);
        int64_t n = (int64_t)size;
        bins += bin;
        if (bins && bins != i + 1) tr_die("%s: text and .bin files cannot be mixed", path);
        if (!size) tr_die("%s: the file is empty", path);
        if (bin) {
            if (size < 1024) tr_die("%s: shorter than the header of a .bin token file", path);
            if (tr_u32(p) != 20240520)
                tr_die("%s: not a .bin token file (the magic number is %" PRIu32 ", not 20240520)", path, tr_u32(p));
            if (tr_u32(p + 4) != 1)
                tr_die("%s: version %" PRIu32 " of the .bin format is not supported", path, tr_u32(p + 4));
            n = tr_u32(p + 8);
            if ((uint64_t)size != 1024 + 2 * (uint64_t)n)
                tr_die("%s: %s: the header promises %" PRId64 " tokens, the file has %" PRIu64, path,
                       (uint64_t)size < 1024 + 2 * (uint64_t)n ? "truncated" : "too long", n,
                       ((uint64_t)size - 1024) / 2);
        }
        int64_t last = n / 10, first = n - last;  // a tenth of each file, so that validation sees every kind of text
        tr_grow(&d->tokens, &room, d->n_train + first, path);
        tr_grow(&val, &val_room, n_val + last, path);
        for (int64_t j = 0; j < n; j++) {
            uint16_t t = (uint16_t)(bin ? p[1024 + 2 * j] | p[1025 + 2 * j] << 8 : p[j]);
            *(j < first ? &d->tokens[d->n_train + j] : &val[n_val + j - first]) = t;
            if (t > top) top = t;
        }
        d->n_train += first;
        n_val += last;
        free(p);
    }
    d->n = d->n_train + n_val;
    tr_grow(&d->tokens, &room, d->n, o->data[0]);
    if (n_val) memcpy(d->tokens + d->n_train, val, (size_t)n_val * sizeof *val);
    free(val);
    d->vocab = (top + 128) / 128 * 128;
    if (n_val < o->seq + 1)
        tr_die("%s: too short: %" PRId64 " tokens, but --seq %" PRId64 " needs at least %" PRId64
               " (a tenth is for validation)",
               o->n_data == 1 ? o->data[0] : "the data", d->n, o->seq, 10 * (o->seq + 1));
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
    snip_rng_key key = { seed, (uint32_t)step, 0x64617461u };
    uint32_t r[4];
    snip_philox(key, (uint64_t)n, r);
    tr_sequence(d, (int64_t)(((uint64_t)r[0] << 32 | r[1]) % (uint64_t)(d->n_train - seq)), seq, tokens, targets);
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

// Opens path.tmp; tr_commit syncs it and renames it to path. Until then path is untouched.
static inline FILE *tr_begin(const char *path) {
    if (snprintf(tr_unfinished, TR_PATH, "%s.tmp", path) >= TR_PATH) {
        tr_unfinished[0] = 0;
        tr_die("%s: the path is too long", path);
    }
    struct stat info;
    if (!stat(path, &info) && !S_ISREG(info.st_mode)) {
        tr_unfinished[0] = 0;
        tr_die("cannot write %s: it is there and not a regular file", path);
    }
    FILE *f = fopen(tr_unfinished, "wb");
    if (!f) {
        int e = errno;
        tr_unfinished[0] = 0;
        tr_die("cannot write %s: %s", path, strerror(e));
    }
    errno = 0;  // tr_commit tells what the first failed write said
    return f;
}

// keep_open: the file goes on being appended to under its new name.
// Dies, before hours of work, if path cannot be written.
static inline void tr_try(const char *path) {
    fclose(tr_begin(path));
    unlink(tr_unfinished);
    tr_unfinished[0] = 0;
}

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
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

// >>safetensors ------------------------------------------------------------------------------------
// 8 bytes of header length, a JSON header, the tensors' bytes without gaps. Ours ends with the metadata
// entry "checksum": FNV-1a 64 of the header up to its value and of all data.
typedef struct {
    char name[64];
    const char *dtype;
    int64_t rows, cols;
    const void *data;
} tr_tensor;  // rows 0: one dimension

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

static inline size_t tr_dtype_size(const char *dtype) {
    static const char *const names[] = { "U8", "F32", "F64" };
    static const size_t sizes[] = { 1, 4, 8 };
    for (int i = 0; i < 3; i++)
        if (!strcmp(dtype, names[i])) return sizes[i];
    return 0;
}

static inline size_t tr_tensor_bytes(const tr_tensor *t) {
    return (size_t)(t->rows ? t->rows : 1) * (size_t)t->cols * tr_dtype_size(t->dtype);
}

static inline void tr_append(char *buffer, size_t room, size_t *n, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int k = vsnprintf(buffer + *n, room - *n, format, args);
    va_end(args);
    if (k < 0 || (size_t)k >= room - *n) tr_die("a checkpoint's header is too long");
    *n += (size_t)k;
}

// Elements between the machine's byte order and the file's, which is little-endian.
static inline void tr_little_endian(unsigned char *p, size_t bytes, size_t size) {
    const uint16_t one = 1;
    if (*(const unsigned char *)&one) return;
    for (size_t i = 0; i + size <= bytes; i += size)
        for (size_t j = 0; j < size / 2; j++) {
            unsigned char c = p[i + j];
            p[i + j] = p[i + size - 1 - j];
            p[i + size - 1 - j] = c;
        }
}

// A tensor as the file has it: added to the checksum, or written.
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

// Errors of the writes show in tr_commit.
static inline void tr_write_tensors(FILE *f, const tr_tensor *t, int n_tensors, const tr_meta *meta, int n_meta) {
    size_t room = (size_t)n_tensors * 256 + (size_t)n_meta * 600 + 256, n = 0, offset = 0;
    char *h = (char *)tr_alloc(room);
    tr_append(h, room, &n, "{");
    for (int i = 0; i < n_tensors; i++) {
        size_t bytes = tr_tensor_bytes(&t[i]);
        tr_append(h, room, &n, "\"%s\":{\"dtype\":\"%s\",\"shape\":[", t[i].name, t[i].dtype);
        if (t[i].rows) tr_append(h, room, &n, "%" PRId64 ",", t[i].rows);
        tr_append(h, room, &n, "%" PRId64 "],\"data_offsets\":[%zu,%zu]},", t[i].cols, offset, offset + bytes);
        offset += bytes;
    }
    tr_append(h, room, &n, "\"__metadata__\":{");
    for (int i = 0; i < n_meta; i++) tr_append(h, room, &n, "\"%s\":\"%s\",", meta[i].key, meta[i].value);
    tr_append(h, room, &n, "\"checksum\":\"");
    uint64_t sum = tr_fnv(TR_FNV, h, n);
    for (int i = 0; i < n_tensors; i++) sum = tr_emit(NULL, sum, &t[i]);
    tr_append(h, room, &n, "%016" PRIx64 "\"}}", sum);
    while (n % 8) tr_append(h, room, &n, " ");
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)n >> 8 * i);
    fwrite(length, 1, 8, f);
    fwrite(h, 1, n, f);
    for (int i = 0; i < n_tensors; i++) tr_emit(f, 0, &t[i]);
    free(h);
}

// A strict reader of the JSON that safetensors headers are made of.
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

static inline int tr_json_int(tr_json *j, int64_t *out) {
    tr_json_char(j, ' ');
    int64_t v = 0;
    const char *start = j->p;
    for (; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++) {
        if (v > (INT64_MAX >> 5) / 10) return 0;
        v = v * 10 + (*j->p - '0');
    }
    *out = v;
    return j->p > start;
}

static inline int tr_json_tensor(tr_json *j, tr_tensor *t, int64_t *begin, int64_t *end) {
    static const char *const dtypes[] = { "U8", "F32", "F64" };
    char key[32], dtype[8];
    int seen = 0;
    if (!tr_json_char(j, '{')) return 0;
    do {
        if (!tr_json_string(j, key, sizeof key) || !tr_json_char(j, ':')) return 0;
        if (!strcmp(key, "dtype")) {
            if (!tr_json_string(j, dtype, sizeof dtype)) return 0;
            for (int i = 0; i < 3; i++)
                if (!strcmp(dtype, dtypes[i])) t->dtype = dtypes[i];
            seen |= 1;
        } else if (!strcmp(key, "shape")) {
            if (!tr_json_char(j, '[') || !tr_json_int(j, &t->cols)) return 0;
            if (tr_json_char(j, ',')) {
                t->rows = t->cols;
                if (!t->rows || !tr_json_int(j, &t->cols)) return 0;
            }
            if (!tr_json_char(j, ']')) return 0;
            seen |= 2;
        } else if (!strcmp(key, "data_offsets")) {
            if (!tr_json_char(j, '[') || !tr_json_int(j, begin) || !tr_json_char(j, ',') || !tr_json_int(j, end) ||
                !tr_json_char(j, ']'))
                return 0;
            seen |= 4;
        } else
            return 0;
    } while (tr_json_char(j, ','));
    return seen == 7 && t->dtype && tr_json_char(j, '}');
}

static inline void tr_free_tensors(tr_tensors *s) {
    free(s->memory);
    free(s->tensors);
    memset(s, 0, sizeof *s);
}

// NULL, or why the file is refused. Takes memory over.
static inline const char *tr_parse_tensors(tr_tensors *s, unsigned char *memory, size_t size) {
    uint64_t length = 0;
    memset(s, 0, sizeof *s);
    s->memory = memory;
    if (size < 8) return "truncated";
    for (int i = 0; i < 8; i++) length |= (uint64_t)memory[i] << 8 * i;
    if (length > 100000000u) return "damaged: the header's length makes no sense";
    if (length > size - 8) return "truncated";
    const unsigned char *data = memory + 8 + length;
    const char *header = (const char *)memory + 8, *sum_at = NULL;
    int64_t data_size = (int64_t)(size - 8 - length), offset = 0, begin = 0, end = 0;
    tr_json j = { header, header + length };
    int room = 0;
    if (!tr_json_char(&j, '{')) return "not a safetensors file";
    do {
        char name[64];
        if (!tr_json_string(&j, name, sizeof name) || !tr_json_char(&j, ':'))
            return "damaged: the header cannot be read";
        if (!strcmp(name, "__metadata__")) {
            if (!tr_json_char(&j, '{')) return "damaged: the header cannot be read";
            do {
                if (s->n_meta == TR_MAX_META) return "damaged: too much metadata";
                tr_meta *m = &s->meta[s->n_meta++];
                if (!tr_json_string(&j, m->key, sizeof m->key) || !tr_json_char(&j, ':'))
                    return "damaged: the header cannot be read";
                if (!strcmp(m->key, "checksum")) sum_at = j.p + 1;
                if (!tr_json_string(&j, m->value, sizeof m->value)) return "damaged: the header cannot be read";
            } while (tr_json_char(&j, ','));
            if (!tr_json_char(&j, '}')) return "damaged: the header cannot be read";
            continue;
        }
        if (s->n == room) {
            room = room ? 2 * room : 64;
            tr_tensor *q = (tr_tensor *)realloc(s->tensors, (size_t)room * sizeof *q);
            if (!q) return "out of memory";
            s->tensors = q;
        }
        tr_tensor *t = &s->tensors[s->n++];
        memset(t, 0, sizeof *t);
        memcpy(t->name, name, sizeof name);
        if (!tr_json_tensor(&j, t, &begin, &end)) return "damaged: the header cannot be read";
        if (begin != offset || end < begin) return "damaged: the tensors' offsets do not join";
        if (end > data_size) return "truncated";
        int64_t elements = (end - begin) / (int64_t)tr_dtype_size(t->dtype), rows = t->rows ? t->rows : 1;
        if (elements / rows != t->cols || tr_tensor_bytes(t) != (size_t)(end - begin))
            return "damaged: a tensor's shape and size disagree";
        t->data = data + begin;
        offset = end;
    } while (tr_json_char(&j, ','));
    if (!tr_json_char(&j, '}')) return "damaged: the header cannot be read";
    while (j.p < j.end)
        if (*j.p++ != ' ') return "damaged: the header cannot be read";
    if (offset != data_size) return "damaged: data beyond the last tensor";
    if (!sum_at) return "not written by this trainer (no checksum)";
    char want[20];
    snprintf(want, sizeof want, "%016" PRIx64,
             tr_fnv(tr_fnv(TR_FNV, header, (size_t)(sum_at - header)), data, (size_t)data_size));
    if (strncmp(want, sum_at, 16)) return "damaged: the checksum does not match";
    for (int i = 0; i < s->n; i++)
        tr_little_endian(memory + ((const unsigned char *)s->tensors[i].data - memory), tr_tensor_bytes(&s->tensors[i]),
                         tr_dtype_size(s->tensors[i].dtype));
    return NULL;
}

static inline const char *tr_meta_value(const tr_tensors *s, const char *key) {
    for (int i = 0; i < s->n_meta; i++)
        if (!strcmp(s->meta[i].key, key)) return s->meta[i].value;
    return "";
}

// NULL if there is no tensor of that name, type and shape.
static inline const void *tr_find(const tr_tensors *s, const char *name, const char *dtype, int64_t rows,
                                  int64_t cols) {
    for (int i = 0; i < s->n; i++) {
        const tr_tensor *t = &s->tensors[i];
        if (!strcmp(t->name, name))
            return !strcmp(t->dtype, dtype) && t->rows == rows && t->cols == cols ? t->data : NULL;
    }
    return NULL;
}

// >>progress ---------------------------------------------------------------------------------------
// One line that redraws itself on a terminal; elsewhere a plain line now and then.
typedef struct {
    int quiet, terminal;
    double last;
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

static inline void tr_show(tr_progress *p, int64_t step, int64_t steps, double loss, double tokens_per_s, double eta,
                           double fp4) {
    double now = tr_now();
    int last = step == steps;
    if (p->quiet || (!last && now - p->last < (p->terminal ? 0.1 : 10.0))) return;
    p->last = now;

    enum { WIDTH = 8 };  // the line must fit in 80 columns

    char bar[WIDTH + 1];
    int full = (int)(WIDTH * step / steps), minutes = (int)(eta / 60);
    for (int i = 0; i < WIDTH; i++) bar[i] = i < full ? '#' : '.';
    bar[WIDTH] = 0;
    if (p->terminal)
        fprintf(stderr, "\r%-4s [%s] ", p->label, bar);
    else
        fprintf(stderr, "%s: ", p->label);
    fprintf(stderr, "step %" PRId64 "/%" PRId64 "  loss %.4f  %.0f tok/s  ETA %d:%02d  FP4 %.0f%%%s", step, steps, loss,
            tokens_per_s, minutes, (int)eta % 60, 100 * fp4, p->terminal ? "\033[K" : "\n");
    tr_line_open = p->terminal;
    if (last) tr_end_line();
}
#endif  // TRAINER_H
