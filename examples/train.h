// train.h - the trainer of train_llama.c and train_llama.cu, for either's trainer_backend: checkpoints, the training
// loop, reports, and train_main(), which is main() but for the backend.
//
// Include snip.h, llama.h, report.h and trainer.h first.
//
// INDEX (search for the tag)
//   >>run >>checkpoint >>open >>train >>report >>main
#ifndef TRAIN_H
#define TRAIN_H

#include <signal.h>

// >>run --------------------------------------------------------------------------------------------
enum {
    VAL_SEQUENCES = 128,  // at most, spread evenly over the validation tokens
    SPEED_WINDOW = 21     // ordinary steps whose median is the speed
};

enum { LOSS, VAL, SPEED, SHARE, COLUMNS };  // of the history; a VAL below 0 was not evaluated

static const char *const column_name[COLUMNS] = { "history.loss", "history.val_loss", "history.tokens_per_s",
                                                  "history.fp4_share" };

static const char *const result_name[] = { "loss.csv", "plan.txt", "plan.svg", "report.html", "model.safetensors" };

enum { RESULTS = sizeof result_name / sizeof result_name[0] };

typedef struct {
    const char *precision;
    char dir[TR_PATH];
    char invocation[512];  // what a checkpoint must have been written with
    const tr_options *options;
    tr_training training;
    int64_t step;                       // steps done
    double *number, *history[COLUMNS];  // by step - 1
    double *plan_step;                  // steps at which a plan was made
    int n_plans;
    char reason[256];  // the session's last
    snip_layer_info *layers;
    double val_high;  // final validation loss of the trained weights in high precision; below 0: not taken
    double seconds;
} run;

static const char *session_error(const snip *s, snip_status status) {
    return snip_message(s)[0] ? snip_message(s) : snip_status_text(status);
}

// The layer that the last error is about.
static const char *failed_layer(const run *r) {
    const snip *s = r->training.session;
    snip_layer_info info;
    if (r->training.model->failed[0]) return r->training.model->failed;
    return snip_layer(s, snip_failed_layer(s), &info) ? "unknown" : info.name;
}

static void stop_at(const run *r, int64_t step, snip_status status, const char *doing) {
    const char *layer = failed_layer(r), *why = session_error(r->training.session, status);
    if (status != SNIP_NONFINITE) tr_stop("%s: step %lld: layer %s: %s", r->precision, (long long)step, layer, why);
    tr_stop("%s: step %lld: layer %s: NaN or infinity while %s; stopped", r->precision, (long long)step, layer, doing);
}

// >>checkpoint -------------------------------------------------------------------------------------
static void describe(const tr_options *o, const tr_data *d, const char *precision, char *out, size_t room) {
    int n = snprintf(out, room,
                     "--dim=%d --blocks=%d --heads=%d --kv-heads=%d --ffn=%d --tied=%d --seq=%d --batch=%d "
                     "--accum=%d --seed=%lld --stages=%d --precision=%s data=%016llx --optimizer=%s",
                     (int)o->dim, (int)o->blocks, (int)o->heads, (int)o->kv_heads, (int)o->ffn, (int)o->tied,
                     (int)o->seq, (int)o->batch, (int)o->accum, (long long)o->seed, (int)o->stages, precision,
                     (unsigned long long)d->hash, o->optimizer);
    if (n < 0 || (size_t)n >= room) tr_die("the options are too long");
}

// The k-th kind of what a checkpoint keeps of each parameter: itself, m, and v where the optimizer has one.
static float *parameter_part(const llama *g, int k, const char **prefix) {
    static const char *const prefixes[3] = { "", "optimizer.m.", "optimizer.v." };
    *prefix = prefixes[k];
    return k == 0 ? g->params : k == 1 ? g->m : g->v;
}

static int parameter_parts(const tr_options *o) { return tr_optimizer_named(o->optimizer)->kind == SNIP_ADAMW ? 3 : 2; }

// An earlier run's checkpoint, which holds all of it, is not overwritten by one that was started without --resume.
static void keep_checkpoint(const run *r) {
    char path[TR_PATH], old[TR_PATH];
    tr_tensors s;
    size_t size;
    struct stat info;
    tr_path(path, r->dir, "model.safetensors");
    if (stat(path, &info)) return;
    unsigned char *bytes = tr_read(path, &size);
    int begun = tr_parse_tensors(&s, bytes, size) || strcmp(tr_meta_value(&s, "step"), "0");
    tr_free_tensors(&s);
    if (!begun) return;
    tr_path(old, r->dir, "model.safetensors.old");
    unlink(old);
    if (link(path, old) && rename(path, old))  // a link keeps both names until the first write
        tr_die("cannot rename %s: %s", path, strerror(errno));
    if (!r->options->quiet) fprintf(stderr, "%s: an earlier run's, kept as model.safetensors.old\n", path);
}

static void add_tensor(tr_tensor *list, int *n, const char *prefix, const char *name, const char *dtype, int64_t rows,
                       int64_t cols, const void *data) {
    tr_tensor *t = &list[(*n)++];
    snprintf(t->name, sizeof t->name, "%s%s", prefix, name);
    t->dtype = dtype;
    t->rows = rows;
    t->cols = cols;
    t->data = data;
}

static void save_checkpoint(const run *r) {
    const llama *g = r->training.model;
    snip *s = r->training.session;
    size_t state_size = snip_state_size(s);
    void *state = tr_alloc(state_size);
    snip_status status = r->training.on->save_state(r->training.model, s, state);
    if (status) tr_die("the session cannot be saved: %s", snip_status_text(status));

    int n = 0, parts = parameter_parts(r->options);
    tr_tensor *list = (tr_tensor *)tr_alloc((size_t)(COLUMNS + 2 + parts * g->n_tensors) * sizeof *list);
    for (int i = 0; i < COLUMNS; i++) add_tensor(list, &n, "", column_name[i], "F64", 0, r->step, r->history[i]);
    add_tensor(list, &n, "", "history.plan_step", "F64", 0, r->n_plans, r->plan_step);
    for (int k = 0; k < parts; k++)
        for (int i = 0; i < g->n_tensors; i++) {
            const llama_tensor *t = &g->tensors[i];
            const char *prefix;
            const float *part = parameter_part(g, k, &prefix);
            add_tensor(list, &n, prefix, t->name, "F32", t->matrix ? t->rows : 0, t->cols, part + t->offset);
        }
    add_tensor(list, &n, "", "session.state", "U8", 0, (int64_t)state_size, state);

    tr_meta meta[4] = {
        {"writer",   "snip train_llama 2"},
        { "step",    ""                  },
        { "plans",   ""                  },
        { "options", ""                  }
    };
    snprintf(meta[1].value, sizeof meta[1].value, "%lld", (long long)r->step);
    snprintf(meta[2].value, sizeof meta[2].value, "%d", r->n_plans);
    snprintf(meta[3].value, sizeof meta[3].value, "%s", r->invocation);

    char path[TR_PATH];
    tr_path(path, r->dir, "model.safetensors");
    FILE *f = tr_begin(path);
    tr_write_tensors(f, list, n, meta, 4);
    if (!r->step && !fflush(f) && !ferror(f)) keep_checkpoint(r);
    tr_commit(f, path, 0);
    free(state);
    free(list);
}

// Names the first option in which two descriptions differ.
static void refuse_other_options(const char *path, const char *was, const char *is) {
    char a[128], b[128];
    while (sscanf(was, "%127s", a) == 1 && sscanf(is, "%127s", b) == 1) {
        if (!strncmp(a, "data=", 5) && strcmp(a, b)) tr_die("%s: written with other --data; cannot resume", path);
        if (strcmp(a, b)) tr_die("%s: written with %s, not %s; cannot resume", path, a, b);
        was += strspn(was, " ") + strlen(a);
        is += strspn(is, " ") + strlen(b);
    }
    tr_die("%s: written with other options; cannot resume", path);
}

static void load_history(run *r, const char *path, const tr_tensors *s) {
    r->step = strtoll(tr_meta_value(s, "step"), NULL, 10);
    r->n_plans = (int)strtol(tr_meta_value(s, "plans"), NULL, 10);
    if (r->step < 0 || r->step > r->options->steps)
        tr_die("%s: already at step %lld, beyond --steps %lld", path, (long long)r->step, (long long)r->options->steps);
    for (int i = 0; i < COLUMNS; i++) {
        const void *column = tr_find(s, column_name[i], "F64", 0, r->step);
        if (!column) tr_die("%s: damaged: no tensor %s of %lld steps", path, column_name[i], (long long)r->step);
        memcpy(r->history[i], column, (size_t)r->step * sizeof(double));
    }
    const void *plans = tr_find(s, "history.plan_step", "F64", 0, r->n_plans);
    if (!plans || r->n_plans > r->step) tr_die("%s: damaged: the plans' steps are missing", path);
    memcpy(r->plan_step, plans, (size_t)r->n_plans * sizeof(double));
}

static void load_parameters(const run *r, const char *path, const tr_tensors *s) {
    const llama *g = r->training.model;
    for (int k = 0; k < parameter_parts(r->options); k++)
        for (int i = 0; i < g->n_tensors; i++) {
            const llama_tensor *t = &g->tensors[i];
            const char *prefix;
            float *part = parameter_part(g, k, &prefix);
            char name[64];
            snprintf(name, sizeof name, "%s%s", prefix, t->name);
            const void *data = tr_find(s, name, "F32", t->matrix ? t->rows : 0, t->cols);
            if (!data) tr_die("%s: damaged: no tensor %s of the model's shape", path, name);
            memcpy(part + t->offset, data, (size_t)(t->rows * t->cols) * sizeof(float));
        }
}

static void load_checkpoint(run *r) {
    snip *session = r->training.session;
    char path[TR_PATH];
    size_t size;
    tr_tensors s;
    struct stat info;
    tr_path(path, r->dir, "model.safetensors");
    if (stat(path, &info) && errno == ENOENT) {  // killed before its first checkpoint
        if (!r->options->quiet) fprintf(stderr, "%s: no checkpoint: from the start\n", path);
        return;
    }
    unsigned char *bytes = tr_read(path, &size);
    const char *why = tr_parse_tensors(&s, bytes, size), *written = tr_meta_value(&s, "options");
    if (why) tr_die("%s: %s", path, why);
    if (strcmp(written, r->invocation)) refuse_other_options(path, written, r->invocation);
    load_history(r, path, &s);
    load_parameters(r, path, &s);

    const tr_tensor *state = tr_find_named(&s, "session.state");
    if (!state) tr_die("%s: damaged: no session state", path);
    snip_status status = snip_state_load(session, state->data, tr_tensor_bytes(state));
    if (status) tr_die("%s: the session's state: %s", path, session_error(session, status));
    snprintf(r->reason, sizeof r->reason, "%s", snip_reason(session));
    tr_free_tensors(&s);
}

// >>open -------------------------------------------------------------------------------------------
// The session that the options ask for. *format: what every GEMM is put in, or 0 under snip.
static snip_desc session_desc(const tr_options *o, const char *precision, snip_format *format) {
    static const struct {
        const char *name;
        snip_format format, high;
    } fixed[] = {
        {"f32",   SNIP_F32,  SNIP_F32 },
        { "bf16", SNIP_BF16, SNIP_BF16},
        { "fp8",  SNIP_E4M3, SNIP_BF16},
        { "fp4",  SNIP_E2M1, SNIP_BF16},
    };

    snip_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.budget = o->budget;
    desc.speedup = o->speedup;
    desc.every = o->every && !o->plan ? (int)o->every : -1;
    desc.seed = (uint64_t)o->seed;
    desc.n_stages = (int)o->stages;
    desc.optimizer = tr_optimizer_named(o->optimizer)->kind;
    desc.margin = o->margin;
    desc.spike = o->spike;
    desc.fallback = tr_fallback(o->fallback);
    const char *why = snip_desc_error(&desc);  // "budget is a share, 0 to 1": the options have the fields' names
    if (why) tr_die("--%s", why);

    *format = (snip_format)0;
    for (int i = 0; i < 4; i++)
        if (!strcmp(precision, fixed[i].name)) {
            *format = fixed[i].format;
            desc.high = fixed[i].high;
            desc.every = -1;
        }
    if (*format || o->plan) desc.speedup = 0;
    return desc;
}

// Told before the training, not at the first measurement.
static void check_speedup(const snip *s) {
    const snip_desc *desc = snip_settings(s);
    for (int stage = 0; stage < desc->n_stages; stage++) {
        double slow = 0, fast = 0;
        for (int l = 0; l < snip_layers(s); l++) {
            snip_layer_info info;
            snip_layer(s, l, &info);
            for (int g = 0; g < SNIP_GEMMS && info.stage == stage; g++) {
                slow += info.seconds[0][g];
                fast += fmin(info.seconds[0][g], fmin(info.seconds[1][g], info.seconds[2][g]));
            }
        }
        if (slow < desc->speedup * fast)
            tr_die("--speedup %g: with this model the linear layers can be at most %.2f times as fast here",
                   desc->speedup, slow / fast);
    }
}

static void load_plan(snip *s, const tr_options *o) {
    snip_status status = snip_plan_load(s, o->plan);
    const char *why = session_error(s, status);
    if (status && strstr(why, o->plan)) tr_die("%s", why);
    if (status) tr_die("%s: %s", o->plan, why);
    double share = snip_share(s, SNIP_E2M1);
    if (o->budget_given && share < o->budget - 1e-9)
        tr_die("%s: the plan puts %.2f%% of the FLOPs in FP4, --budget asks for %.2f%%", o->plan, 100 * share,
               100 * o->budget);
}

// Session, model, checkpoint and plan; writes nothing.
static void open_run(run *r, const tr_options *o, const tr_data *d, const trainer_backend *on, const char *precision,
                     const char *dir) {
    snip_format format;
    snip_desc desc = session_desc(o, precision, &format);
    llama_config config = tr_config(o, d->vocab);
    memset(r, 0, sizeof *r);
    r->precision = precision;
    r->options = o;
    r->val_high = -1;
    snprintf(r->dir, sizeof r->dir, "%s", dir);
    describe(o, d, precision, r->invocation, sizeof r->invocation);

    snip *s = snip_create(&desc);
    tr_training *t = &r->training;
    t->on = on;
    t->data = d;
    t->session = s;
    t->model = s ? on->create(&config, (int)o->batch, s) : NULL;
    if (!t->model) tr_die("out of memory");
    tr_make_batch(t, o->batch, o->accum);
    size_t column = (size_t)o->steps * sizeof(double);
    r->number = (double *)tr_alloc(column);
    r->plan_step = (double *)tr_alloc(column);
    for (int i = 0; i < COLUMNS; i++) r->history[i] = (double *)tr_alloc(column);
    for (int64_t i = 0; i < o->steps; i++) r->number[i] = (double)(i + 1);

    if (format) snip_set_format(s, -1, SNIP_GEMMS, format);
    if (o->resume) load_checkpoint(r);
    if (desc.speedup > 0) {
        snip_status status = SNIP_OK;
        if (snip_plan_seconds(s) <= 0) status = on->measure_gains(t->model, s, o->batch * o->seq);
        if (status) tr_die("timing the layers: %s", session_error(s, status));
        check_speedup(s);
    }
    if (o->plan && !format) load_plan(s, o);
}

static void close_run(run *r) {
    r->training.on->destroy(r->training.model);
    snip_destroy(r->training.session);
    tr_free_batch(&r->training);
    free(r->number);
    free(r->plan_step);
    free(r->layers);
    for (int i = 0; i < COLUMNS; i++) free(r->history[i]);
}

// >>train ------------------------------------------------------------------------------------------
// Always the same sequences.
static double validate(const run *r, int64_t step, snip_mode mode) {
    const tr_data *d = r->training.data;
    int64_t seq = r->options->seq, room = d->n - d->n_train - seq - 1, n = (d->n - d->n_train - 1) / seq;
    int64_t at[VAL_SEQUENCES];
    double loss;
    if (n > VAL_SEQUENCES) n = VAL_SEQUENCES;
    for (int64_t i = 0; i < n; i++) at[i] = d->n_train + (n > 1 ? i * room / (n - 1) : 0);
    snip_status status = tr_evaluate(&r->training, mode, at, n, &loss);
    if (status) stop_at(r, step, status, "validating");
    return loss;
}

static double learning_rate(const tr_options *o, int64_t step) {  // warm-up, then a cosine to a tenth
    if (step <= o->warmup) return o->lr * (double)step / (double)o->warmup;
    double x = o->steps > o->warmup ? (double)(step - o->warmup) / (double)(o->steps - o->warmup) : 1.0;
    return o->lr * (0.1 + 0.45 * (1.0 + cos(3.14159265358979 * x)));
}

static void write_row(FILE *f, const run *r, int64_t step) {
    int64_t i = step - 1;
    char val[32] = "";
    if (r->history[VAL][i] >= 0) snprintf(val, sizeof val, "%.9g", r->history[VAL][i]);
    fprintf(f, "%lld,%.9g,%s,%.1f,%.6g\n", (long long)step, r->history[LOSS][i], val, r->history[SPEED][i],
            r->history[SHARE][i]);
}

static FILE *start_csv(const run *r, const char *path) {
    FILE *f = tr_begin(path);
    fputs("step,loss,val_loss,tokens_per_s,fp4_share\n", f);
    for (int64_t step = 1; step <= r->step; step++) write_row(f, r, step);
    tr_commit(f, path, 1);
    return f;
}

static void save_plan(const run *r) {
    char path[TR_PATH];
    tr_path(path, r->dir, "plan.txt");
    snip_status status = snip_plan_save(r->training.session, path);
    if (status) tr_die("cannot write %s: %s", path, session_error(r->training.session, status));
}

// Writes what a run begins with; what an earlier one left in a fresh run's folder must not be resumed or mixed in.
static FILE *begin_files(const run *r, const tr_progress *progress, char *csv_path) {
    char path[TR_PATH];
    if (!r->step) {
        save_checkpoint(r);
        tr_path(path, r->dir, "plan.svg");
        unlink(path);
        tr_path(path, r->dir, "report.html");
        unlink(path);
    } else
        tr_note(progress, "%s: resumed after step %lld", r->precision, (long long)r->step);
    tr_path(csv_path, r->dir, "loss.csv");
    FILE *csv = start_csv(r, csv_path);
    save_plan(r);
    return csv;
}

typedef struct {  // seconds of the latest ordinary steps under the plan in force
    double seconds[SPEED_WINDOW];
    int64_t steps;
} speedometer;

static double median_seconds(speedometer *m, double seconds) {  // with one more step
    double sorted[SPEED_WINDOW];
    m->seconds[m->steps++ % SPEED_WINDOW] = seconds;
    int n = m->steps < SPEED_WINDOW ? (int)m->steps : SPEED_WINDOW;
    memcpy(sorted, m->seconds, (size_t)n * sizeof *sorted);
    return report_median(sorted, n);
}

static volatile sig_atomic_t stop_asked;  // by the signal of this number

static void ask_stop(int signal_number) { stop_asked = signal_number; }

// Trains by one step and adds it to the history.
static void train_step(run *r, speedometer *meter, const tr_progress *progress) {
    const tr_training *t = &r->training;
    const tr_options *o = r->options;
    snip *s = t->session;
    const int64_t i = r->step, number = i + 1;
    const double tokens = (double)(o->batch * o->seq * o->accum), share = snip_share(s, SNIP_E2M1), start = tr_now();
    const int plans = snip_plans(s);
    tr_step step;
    tr_load_batch(t, (uint64_t)o->seed, number);
    snip_status status = tr_take_step(t, tr_optimizer_named(o->optimizer), learning_rate(o, number), number, &step);
    if (status == SNIP_INFEASIBLE) tr_die("step %lld: %s", (long long)number, session_error(s, status));
    if (status) stop_at(r, number, status, step.doing);

    const double took = tr_now() - start;
    double speed = i ? r->history[SPEED][i - 1] : tokens / took;
    if (step.passes == 1) speed = tokens / median_seconds(meter, took);
    if (snip_plans(s) != plans) {
        r->plan_step[r->n_plans++] = (double)number;
        tr_note(progress,
                "%s: step %lld: measured %d layers in %d passes (%.1f ordinary steps), solved in %.3f ms; "
                "FP4 share %.1f%% -> %.1f%%",
                r->precision, (long long)number, snip_layers(s), step.passes, took * speed / tokens,
                1e3 * snip_solve_seconds(s), 100 * share, 100 * snip_share(s, SNIP_E2M1));
    }
    if (strcmp(r->reason, snip_reason(s))) {
        snprintf(r->reason, sizeof r->reason, "%s", snip_reason(s));
        tr_note(progress, "%s: %s", r->precision, r->reason);
        save_plan(r);
        meter->steps = 0;
    }
    r->history[LOSS][i] = step.loss;
    r->history[SPEED][i] = speed;
    r->history[SHARE][i] = snip_share(s, SNIP_E2M1);
    r->history[VAL][i] = -1;
    if (number == o->steps || (o->val_every && number % o->val_every == 0))
        r->history[VAL][i] = validate(r, number, SNIP_EVAL);
    r->step = number;
}

static void train(run *r) {
    const tr_options *o = r->options;
    snip *s = r->training.session;
    const double start = tr_now();
    char csv_path[TR_PATH];
    tr_progress progress = { (int)o->quiet, isatty(2), start, r->precision };
    speedometer meter = { { 0 }, 0 };
    FILE *csv = begin_files(r, &progress, csv_path);
    while (r->step < o->steps) {
        train_step(r, &meter, &progress);
        write_row(csv, r, r->step);
        errno = 0;
        if (fflush(csv)) tr_die("cannot write %s: %s", csv_path, strerror(errno));
        if (stop_asked || r->step == o->steps || (o->save_every && r->step % o->save_every == 0)) save_checkpoint(r);

        const double speed = r->history[SPEED][r->step - 1];
        const int64_t left = (o->steps - r->step) * o->batch * o->seq * o->accum;
        tr_show(&progress, r->step, o->steps, r->history[LOSS][r->step - 1], speed, (double)left / speed,
                r->history[SHARE][r->step - 1]);
        if (stop_asked) {
            tr_note(&progress, "%s: stopped after step %lld; --resume goes on", r->precision, (long long)r->step);
            signal(stop_asked, SIG_DFL);
            raise(stop_asked);
        }
    }
    if (fclose(csv)) tr_die("cannot write %s: %s", csv_path, strerror(errno));
    if (strcmp(r->precision, "f32") && strcmp(r->precision, "bf16"))
        r->val_high = validate(r, o->steps, SNIP_EVAL_HIGH);
    r->seconds = tr_now() - start;
    save_plan(r);
    r->layers = (snip_layer_info *)tr_alloc((size_t)snip_layers(s) * sizeof *r->layers);
    for (int i = 0; i < snip_layers(s); i++) snip_layer(s, i, &r->layers[i]);
}

// >>report -----------------------------------------------------------------------------------------
static report_run as_report(const run *r) {
    report_run p;
    memset(&p, 0, sizeof p);
    p.name = r->precision;
    p.n = (int)r->step;
    p.step = r->number;
    p.loss = r->history[LOSS];
    p.val_loss = r->history[VAL];
    p.tokens_per_s = r->history[SPEED];
    p.fp4_share = r->history[SHARE];
    p.n_layers = snip_layers(r->training.session);
    p.layers = r->layers;
    p.n_plans = r->n_plans;
    p.plan_step = r->plan_step;
    return p;
}

static void write_svg(const run *r) {
    char path[TR_PATH];
    report_run p = as_report(r);
    tr_path(path, r->dir, "plan.svg");
    FILE *f = tr_begin(path);
    if (report_write_plan_svg(f, &p)) tr_die("cannot write %s: %s", path, strerror(errno ? errno : EIO));
    tr_commit(f, path, 0);
}

enum { FACTS = 10, FACT = 96 };  // facts, and bytes of one

static void state_facts(const run *r, double seconds, report_fact facts[FACTS], char value[FACTS][FACT]) {
    static const char *const keys[FACTS] = { "model",      "parameters",     "vocabulary",
                                             "data",       "steps",          "tokens in a step",
                                             "FP4 budget", "measured every", "seed",
                                             "time" };
    const tr_options *o = r->options;
    const llama *g = r->training.model;
    int64_t parameters = 0;
    for (int i = 0; i < g->n_tensors; i++) parameters += g->tensors[i].rows * g->tensors[i].cols;
    snprintf(value[0], FACT, "%d blocks, d %d, %d heads (%d for keys and values), FFN %d", g->config.blocks,
             g->config.dim, g->config.heads, g->config.kv_heads, g->config.ffn);
    snprintf(value[1], FACT, "%.2f million", (double)parameters * 1e-6);
    snprintf(value[2], FACT, "%d", g->config.vocab);
    snprintf(value[3], FACT, "%lld tokens, the last tenth of each file for validation", (long long)r->training.data->n);
    snprintf(value[4], FACT, "%lld", (long long)o->steps);
    snprintf(value[5], FACT, "%lld x %lld x %lld", (long long)o->accum, (long long)o->batch, (long long)o->seq);
    if (o->speedup > 0)
        snprintf(value[6], FACT, "as many as make the linear layers %g times as fast", o->speedup);
    else
        snprintf(value[6], FACT, "%g%%", 100 * o->budget);
    if (o->plan)
        snprintf(value[7], FACT, "never: plan from a file");
    else if (!o->every)
        snprintf(value[7], FACT, "never");
    else
        snprintf(value[7], FACT, "%lld steps", (long long)o->every);
    snprintf(value[8], FACT, "%lld", (long long)o->seed);
    snprintf(value[9], FACT, "%.0f s", seconds);
    for (int i = 0; i < FACTS; i++) {
        facts[i].key = keys[i];
        facts[i].value = value[i];
    }
}

static void write_report(const char *path, const run *runs, int n) {
    report_run p[TR_MAX_RUNS];
    report_fact facts[FACTS];
    char value[FACTS][FACT];
    double seconds = 0;
    for (int i = 0; i < n; i++) {
        p[i] = as_report(&runs[i]);
        seconds += runs[i].seconds;
    }
    state_facts(&runs[0], seconds, facts, value);
    FILE *f = tr_begin(path);
    if (report_write_html(f, "train_llama under snip", p, n, facts, FACTS))
        tr_die("cannot write %s: %s", path, strerror(errno ? errno : EIO));
    tr_commit(f, path, 0);
}

static void print_results(const run *runs, int n, const char *report) {
    printf("\n%-10s %9s %15s %10s %9s\n", "precision", "val loss", "same, in high", "last tok/s", "FP4 share");
    for (int i = 0; i < n; i++) {
        const run *r = &runs[i];
        int64_t last = r->step - 1;
        char high[16] = "";
        if (r->val_high >= 0) snprintf(high, sizeof high, "%.4f", r->val_high);
        printf("%-10s %9.4f %15s %10.0f %8.1f%%\n", r->precision, r->history[VAL][last], high, r->history[SPEED][last],
               100 * r->history[SHARE][last]);
    }
    printf("report: %s\n", report);
}

// >>main -------------------------------------------------------------------------------------------
// Signals that end the training: the step is finished and saved; a second one kills.
static void catch_signals(void) {
    static const int stops[] = { SIGINT, SIGTERM };
    for (int i = 0; i < 2; i++) {
        struct sigaction stop;
        memset(&stop, 0, sizeof stop);
        stop.sa_handler = ask_stop;
        stop.sa_flags = (int)SA_RESETHAND;
        sigaction(stops[i], &stop, NULL);
    }
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);  // a file-size limit then shows as a failed write, which says what failed
#endif
}

static const char *run_dir(const tr_options *o, int i, char *dir) {
    snprintf(dir, TR_PATH, "%s", o->out);
    if (o->compare) tr_path(dir, o->out, o->runs[i]);
    return dir;
}

// All that can be refused is refused before anything is written.
static void check_runs(run *runs, int n, const tr_options *o, const tr_data *d, const trainer_backend *on) {
    char dir[TR_PATH], path[TR_PATH];
    for (int i = 0; i < n; i++) {
        open_run(&runs[i], o, d, on, o->runs[i], run_dir(o, i, dir));
        if (o->compare) close_run(&runs[i]);  // models are in memory one at a time
    }
    for (int i = 0; i < n; i++) {
        tr_mkdir(run_dir(o, i, dir));
        tr_lock(dir);
        for (int j = 0; j < RESULTS; j++) {
            tr_path(path, dir, result_name[j]);
            tr_try(path);
        }
    }
}

static int train_main(int argc, char **argv, const trainer_backend *on) {
    static tr_options o;
    static run runs[TR_MAX_RUNS];
    tr_data d;
    char dir[TR_PATH], path[TR_PATH];
    struct stat info;
    tr_wait_passively(argv);
    tr_program = "train_llama";
    catch_signals();
    tr_parse(&o, argc, argv);
    tr_use_threads(o.threads);
    tr_config(&o, 256);  // refused before the data is read
    if (!o.n_runs) o.runs[0] = o.precision;
    int n = o.n_runs ? o.n_runs : 1;
    tr_load_data(&d, &o);
    if (o.resume && stat(o.out, &info)) tr_die("--resume: %s: %s", o.out, strerror(errno));

    check_runs(runs, n, &o, &d, on);
    for (int i = 0; i < n; i++) {
        if (o.compare) open_run(&runs[i], &o, &d, on, o.runs[i], run_dir(&o, i, dir));
        train(&runs[i]);
        write_svg(&runs[i]);
        if (!o.quiet && (!strcmp(o.runs[i], "snip") || !o.compare)) {
            printf("\nPlan of %s after step %lld:\n", o.runs[i], (long long)runs[i].step);
            snip_plan_print(runs[i].training.session, stdout);
        }
    }
    tr_path(path, o.out, "report.html");
    write_report(path, runs, n);
    print_results(runs, n, path);
    for (int i = 0; i < n; i++) close_run(&runs[i]);
    free(d.tokens);
    if (o.n_runs) free((void *)(uintptr_t)o.runs[0]);
    if (fflush(stdout)) tr_die("cannot write to standard output: %s", strerror(errno));
    return 0;
}
#endif  // TRAIN_H
