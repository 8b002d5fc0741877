// run.h - what the benchmarks that train examples/llama.h's model share: a program's own options beside the trainer's,
// a model with its session, passes and steps that stop the program where they fail.
//
// Include snip.h, llama.h and trainer.h first.
#ifndef RUN_H
#define RUN_H

// >>options ----------------------------------------------------------------------------------------
typedef struct {
    const char *name;
    const char **value;  // NULL: the option takes none, and sets `given`
    int *given;
} run_option;

// The own option that argv[*i] is, or NULL. *i moves on to its value, which is "" where there is none.
static inline const run_option *run_own_option(char **argv, int *i, const run_option *own, int n_own) {
    for (const run_option *option = own; option < own + n_own; option++) {
        size_t length = strlen(option->name);
        const char *rest = argv[*i] + length;
        if (strncmp(argv[*i], option->name, length) || (*rest && *rest != '=')) continue;
        if (!option->value)
            *option->given = 1;
        else if (*rest)
            *option->value = rest + 1;
        else
            *option->value = argv[*i + 1] ? argv[++*i] : "";
        return option;
    }
    return NULL;
}

// The trainer's options from `defaults`, which ends with NULL, and then from the command line, without the own ones.
// help: prints what goes before the trainer's.
static inline void run_parse(tr_options *o, int argc, char **argv, const char *const *defaults, const run_option *own,
                             int n_own, void (*help)(void)) {
    char *args[80];
    int n = 0;
    tr_wait_passively(argv);
    args[n++] = argv[0];
    while (*defaults) args[n++] = (char *)(uintptr_t)*defaults++;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            help();
            tr_usage();
            exit(fflush(stdout) ? 2 : 0);
        }
        if (run_own_option(argv, &i, own, n_own)) continue;
        if (n == 80) tr_die("too many options");
        args[n++] = argv[i];
    }
    tr_parse(o, n, args);
    tr_use_threads(o->threads);
}

static inline int run_whole(const char *text, int low, int high, const char *name) {
    char *end;
    long n = strtol(text, &end, 10);
    if (end == text || *end || n < low || n > high)
        tr_die("%s needs a whole number between %d and %d, not '%s'", name, low, high, text);
    return (int)n;
}

static inline void run_end(void) {  // of standard output
    if (fflush(stdout) || ferror(stdout)) tr_die("cannot write to standard output: %s", strerror(errno ? errno : EIO));
}

// >>steps ------------------------------------------------------------------------------------------
static inline void check(snip_status status, const snip *s, const char *where) {
    if (status) tr_stop("%s: %s", where, snip_message(s)[0] ? snip_message(s) : snip_status_text(status));
}

static inline tr_training run_begin(const tr_options *o, const tr_data *d, const snip_desc *desc) {
    llama_config config = tr_config(o, d->vocab);
    tr_training t = { tr_cpu(), NULL, snip_create(desc), d, 0, 0, NULL, NULL };
    config.stages = 0;
    if (t.session) t.model = llama_create(&config, (int)o->batch, t.session);
    if (!t.model) tr_stop("out of memory");
    tr_make_batch(&t, o->batch, 1);
    return t;
}

static inline void run_close(tr_training *t) {
    llama_destroy(t->model);
    snip_destroy(t->session);
    tr_free_batch(t);
}

static inline double run_pass(const tr_training *t) {  // forward and backward; returns the loss
    double loss;
    check(tr_pass(t, &loss), t->session, "a pass");
    return loss;
}

static inline double run_loss(const tr_training *t) {  // of the loaded batch, forward alone
    double sum;
    int64_t tokens = t->batch * t->model->config.seq;
    check(llama_forward(t->model, t->session, t->tokens, t->targets, (int)t->batch, 0.0f, &sum), t->session, "forward");
    return sum / (double)tokens;
}

// A step of AdamW on batch `step` of the seed `batches`; returns its loss. update_step: 1 for the optimizer's first.
static inline double run_step(const tr_training *t, uint64_t batches, int64_t step, double lr, int64_t update_step) {
    tr_step taken;
    tr_load_batch(t, batches, step);
    check(tr_take_step(t, tr_optimizer_named("adamw"), lr, update_step, &taken), t->session, "training");
    return taken.loss;
}
#endif  // RUN_H
