// train_llama.c - trains a small Llama on any text under an adaptive FP4/FP8 plan, on the CPU.
//     cc -O2 -fopenmp examples/train_llama.c -o train_llama -lm
//     ./train_llama --data book.txt --out out/book            (--help lists the options)
// Writes into the output folder: loss.csv, row by row; model.safetensors, the weights and all that
// --resume needs to go on bit for bit; plan.txt, plan.svg, report.html.
// Exit status: 0 finished, 1 the training met NaN or infinity, 2 bad input or a file that cannot be written.
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <signal.h>
#define SNIP_IMPLEMENTATION
#include "../snip.h"
#include "llama.h"
#include "report.h"
#include "trainer.h"

#define EPS 1e-8
#define CLIP 1.0
#define VAL_SEQUENCES 128
#define SPEED_WINDOW 21

enum { LOSS, VAL, SPEED, SHARE, COLUMNS };

static const char *const column_name[COLUMNS] = { "history.loss", "history.val_loss", "history.tokens_per_s",
                                                  "history.fp4_share" };

typedef struct {
    const char *precision;
    char dir[TR_PATH];
    snip *session;
    llama *model;
    int64_t step;                       // steps done
    double *number, *history[COLUMNS];  // by step - 1; a val_loss below 0 was not evaluated
    double *plan_step;
    int n_plans;
    char reason[256];  // the session's last
    snip_layer_info *layers;
    double val_high;  // final validation loss of the trained weights in high precision; < 0: not taken
    double seconds;
} run;

static char invocation[512];  // what a checkpoint must have been written with

static void describe(const tr_options *o, const tr_data *d, const char *precision, char *out, size_t room) {
    int n = snprintf(
        out, room,
        "--dim=%d --blocks=%d --heads=%d --kv-heads=%d --ffn=%d --tied=%d --seq=%d --batch=%d --accum=%d --seed=%lld --stages=%d --precision=%s data=%016llx --optimizer=%s",
        (int)o->dim, (int)o->blocks, (int)o->heads, (int)o->kv_heads, (int)o->ffn, (int)o->tied, (int)o->seq,
        (int)o->batch, (int)o->accum, (long long)o->seed, (int)o->stages, precision, (unsigned long long)d->hash,
        o->optimizer);
    if (n < 0 || (size_t)n >= room) tr_die("the options are too long");
}

// >>checkpoint -------------------------------------------------------------------------------------
static int optimizer_tensors(const tr_options *o) {
    return tr_optimizer_named(o->optimizer)->kind == SNIP_ADAMW ? 2 : 1;
}  // of a parameter: m and v, or m

// An earlier run's checkpoint, which holds all of it, is not overwritten by one that was started without --resume.
static void keep_checkpoint(const run *r, const tr_options *o) {
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
    if (link(path, old) && rename(path, old))
        tr_die("cannot rename %s: %s", path, strerror(errno));  // a link keeps both names until the first write
    if (!o->quiet) fprintf(stderr, "%s: an earlier run's, kept as model.safetensors.old\n", path);
}

static void save_checkpoint(const run *r, const tr_options *o) {
    const llama *g = r->model;
    int n = 0, max = COLUMNS + 2 + 3 * g->n_tensors;
    tr_tensor *t = (tr_tensor *)tr_alloc((size_t)max * sizeof *t);
    tr_meta meta[4] = {
        {"writer",   "snip train_llama 2"},
        { "step",    ""                  },
        { "plans",   ""                  },
        { "options", ""                  }
    };
    const float *part[3] = { g->params, g->m, g->v };
    static const char *const prefix[3] = { "", "optimizer.m.", "optimizer.v." };
    char path[TR_PATH];
    size_t state_size = snip_state_size(r->session);
    void *state = tr_alloc(state_size);
    snip_status st = snip_state_save(r->session, state);
    if (st) tr_die("the session cannot be saved: %s", snip_status_text(st));

    for (int i = 0; i < COLUMNS; i++) {
        snprintf(t[n].name, sizeof t[n].name, "%s", column_name[i]);
        t[n].dtype = "F64";
        t[n].cols = r->step;
        t[n++].data = r->history[i];
    }
    snprintf(t[n].name, sizeof t[n].name, "history.plan_step");
    t[n].dtype = "F64";
    t[n].cols = r->n_plans;
    t[n++].data = r->plan_step;
    for (int p = 0; p <= optimizer_tensors(o); p++)
        for (int i = 0; i < g->n_tensors; i++) {
            const llama_tensor *w = &g->tensors[i];
            snprintf(t[n].name, sizeof t[n].name, "%s%s", prefix[p], w->name);
            t[n].dtype = "F32";
            t[n].rows = w->matrix ? w->rows : 0;
            t[n].cols = w->cols;
            t[n++].data = part[p] + w->offset;
        }
    snprintf(t[n].name, sizeof t[n].name, "session.state");
    t[n].dtype = "U8";
    t[n].cols = (int64_t)state_size;
    t[n++].data = state;

    snprintf(meta[1].value, sizeof meta[1].value, "%lld", (long long)r->step);
    snprintf(meta[2].value, sizeof meta[2].value, "%d", r->n_plans);
    snprintf(meta[3].value, sizeof meta[3].value, "%s", invocation);
    tr_path(path, r->dir, "model.safetensors");
    FILE *f = tr_begin(path);
    tr_write_tensors(f, t, n, meta, 4);
    if (!r->step && !fflush(f) && !ferror(f)) keep_checkpoint(r, o);
    tr_commit(f, path, 0);
    free(state);
    free(t);
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

static void load_checkpoint(run *r, const tr_options *o) {
    llama *g = r->model;
    char path[TR_PATH];
    size_t size;
    tr_tensors s;
    struct stat info;
    tr_path(path, r->dir, "model.safetensors");
    if (stat(path, &info) && errno == ENOENT) {  // killed before its first checkpoint
        if (!o->quiet) fprintf(stderr, "%s: no checkpoint: from the start\n", path);
        return;
    }
    unsigned char *bytes = tr_read(path, &size);
    const char *why = tr_parse_tensors(&s, bytes, size);
    if (why) tr_die("%s: %s", path, why);
    if (strcmp(tr_meta_value(&s, "options"), invocation))
        refuse_other_options(path, tr_meta_value(&s, "options"), invocation);
    r->step = strtoll(tr_meta_value(&s, "step"), NULL, 10);
    r->n_plans = (int)strtol(tr_meta_value(&s, "plans"), NULL, 10);
    if (r->step < 0 || r->step > o->steps)
        tr_die("%s: already at step %lld, beyond --steps %lld", path, (long long)r->step, (long long)o->steps);
    for (int i = 0; i < COLUMNS; i++) {
        const void *p = tr_find(&s, column_name[i], "F64", 0, r->step);
        if (!p) tr_die("%s: damaged: no tensor %s of %lld steps", path, column_name[i], (long long)r->step);
        memcpy(r->history[i], p, (size_t)r->step * sizeof(double));
    }
    const void *plans = tr_find(&s, "history.plan_step", "F64", 0, r->n_plans);
    if (!plans || r->n_plans > r->step) tr_die("%s: damaged: the plans' steps are missing", path);
    memcpy(r->plan_step, plans, (size_t)r->n_plans * sizeof(double));
    float *part[3] = { g->params, g->m, g->v };
    static const char *const prefix[3] = { "", "optimizer.m.", "optimizer.v." };
    for (int p = 0; p <= optimizer_tensors(o); p++)
        for (int i = 0; i < g->n_tensors; i++) {
            const llama_tensor *w = &g->tensors[i];
            char name[64];
            snprintf(name, sizeof name, "%s%s", prefix[p], w->name);
            const void *data = tr_find(&s, name, "F32", w->matrix ? w->rows : 0, w->cols);
            if (!data) tr_die("%s: damaged: no tensor %s of the model's shape", path, name);
            memcpy(part[p] + w->offset, data, (size_t)(w->rows * w->cols) * sizeof(float));
        }
    for (int i = 0; i < s.n; i++)
        if (!strcmp(s.tensors[i].name, "session.state")) {
            snip_status st = snip_state_load(r->session, s.tensors[i].data, tr_tensor_bytes(&s.tensors[i]));
            if (st)
                tr_die("%s: the session's state: %s", path,
                       snip_message(r->session)[0] ? snip_message(r->session) : snip_status_text(st));
            snprintf(r->reason, sizeof r->reason, "%s", snip_reason(r->session));
            tr_free_tensors(&s);
            return;
        }
    tr_die("%s: damaged: no session state", path);
}

// >>run --------------------------------------------------------------------------------------------
static const char *session_error(const snip *s, snip_status st) {
    return snip_message(s)[0] ? snip_message(s) : snip_status_text(st);
}

// Told before the training, not at the first measurement.
static void check_speedup(const snip *s, int stages, double wanted) {
    for (int stage = 0; stage < stages; stage++) {
        double slow = 0, fast = 0;
        for (int l = 0; l < snip_layers(s); l++) {
            snip_layer_info info;
            snip_layer(s, l, &info);
            for (int g = 0; g < SNIP_GEMMS && info.stage == stage; g++) {
                slow += info.seconds[0][g];
                fast += fmin(info.seconds[0][g], fmin(info.seconds[1][g], info.seconds[2][g]));
            }
        }
        if (slow < wanted * fast)
            tr_die("--speedup %g: with this model the linear layers can be at most %.2f times as fast here", wanted,
                   slow / fast);
    }
}

// Session, model, checkpoint and plan; writes nothing.
static void open_run(run *r, const tr_options *o, const tr_data *d, const char *precision, const char *dir) {
    static const struct {
        const char *name;
        snip_format format, high;
    } fixed[] = {
        {"f32",   SNIP_F32,  SNIP_F32 },
        { "bf16", SNIP_BF16, SNIP_BF16},
        { "fp8",  SNIP_E4M3, SNIP_BF16},
        { "fp4",  SNIP_E2M1, SNIP_BF16}
    };

    snip_desc desc = { 0 };
    snip_format format = (snip_format)0;
    snip_status st;
    memset(r, 0, sizeof *r);
    r->precision = precision;
    r->val_high = -1;
    snprintf(r->dir, sizeof r->dir, "%s", dir);
    describe(o, d, precision, invocation, sizeof invocation);
    desc.budget = o->budget;
    desc.every = o->every && !o->plan ? (int)o->every : -1;
    desc.seed = (uint64_t)o->seed;
    desc.n_stages = (int)o->stages;
    desc.optimizer = tr_optimizer_named(o->optimizer)->kind;
    desc.margin = o->margin;
    desc.spike = o->spike;
    desc.fallback = tr_fallback(o->fallback);
    for (int i = 0; i < 4; i++)
        if (!strcmp(precision, fixed[i].name)) {
            format = fixed[i].format;
            desc.high = fixed[i].high;
            desc.every = -1;
        }
    if (!format && !o->plan) desc.speedup = o->speedup;
    if ((st = snip_desc_check(&desc)) != SNIP_OK) tr_die("the session's options: %s", snip_status_text(st));
    llama_config c = { d->vocab,    (int)o->dim, (int)o->blocks, (int)o->heads,  (int)o->kv_heads,
                       (int)o->ffn, (int)o->seq, (int)o->tied,   (int)o->stages, (uint64_t)o->seed };
    r->session = snip_create(&desc);
    r->model = r->session ? llama_create(&c, (int)o->batch, r->session) : NULL;
    if (!r->model) tr_die("out of memory");
    size_t column = (size_t)o->steps * sizeof(double);
    r->number = (double *)tr_alloc(column);
    r->plan_step = (double *)tr_alloc(column);
    for (int i = 0; i < COLUMNS; i++) r->history[i] = (double *)tr_alloc(column);
    for (int64_t i = 0; i < o->steps; i++) r->number[i] = (double)(i + 1);
    if (format) snip_set_format(r->session, -1, SNIP_GEMMS, format);
    if (o->resume) load_checkpoint(r, o);
    if (desc.speedup > 0 && snip_plan_seconds(r->session) <= 0 &&
        (st = snip_measure_gains(r->session, o->batch * o->seq)) != SNIP_OK)
        tr_die("timing the layers: %s", session_error(r->session, st));
    if (desc.speedup > 0) check_speedup(r->session, desc.n_stages, desc.speedup);
    if (o->plan && !format) {
        if ((st = snip_plan_load(r->session, o->plan)) != SNIP_OK) {
            const char *why = session_error(r->session, st);
            if (strstr(why, o->plan)) tr_die("%s", why);
            tr_die("%s: %s", o->plan, why);
        }
        if (o->budget_given && snip_share(r->session, SNIP_E2M1) < o->budget - 1e-9)
            tr_die("%s: the plan puts %.2f%% of the FLOPs in FP4, --budget asks for %.2f%%", o->plan,
                   100 * snip_share(r->session, SNIP_E2M1), 100 * o->budget);
    }
}

static void close_run(run *r) {
    llama_destroy(r->model);
    snip_destroy(r->session);
    free(r->number);
    free(r->plan_step);
    free(r->layers);
    for (int i = 0; i < COLUMNS; i++) free(r->history[i]);
}

static void stop_nonfinite(const run *r, int64_t step, snip_status st, const char *doing) {
    const char *layer = r->model->failed[0] ? r->model->failed : "unknown";
    if (st != SNIP_NONFINITE)
        tr_stop("%s: step %lld: layer %s: %s", r->precision, (long long)step, layer, session_error(r->session, st));
    tr_stop("%s: step %lld: layer %s: NaN or infinity while %s; stopped", r->precision, (long long)step, layer, doing);
}

// Mean loss over sequences spread evenly over the validation tokens, always the same ones.
static double validate(run *r, const tr_options *o, const tr_data *d, int64_t step, snip_mode mode, int32_t *tokens,
                       int32_t *targets) {
    int64_t room = d->n - d->n_train - o->seq - 1, n = (d->n - d->n_train - 1) / o->seq;
    double total = 0, sum;
    if (n > VAL_SEQUENCES) n = VAL_SEQUENCES;
    snip_set_mode(r->session, mode);
    for (int64_t i = 0; i < n; i += o->batch) {
        int64_t m = n - i < o->batch ? n - i : o->batch;
        for (int64_t j = 0; j < m; j++)
            tr_sequence(d, d->n_train + (n > 1 ? (i + j) * room / (n - 1) : 0), o->seq, tokens + j * o->seq,
                        targets + j * o->seq);
        snip_status st = llama_forward(r->model, r->session, tokens, targets, (int)m, 0.0f, &sum);
        if (st) stop_nonfinite(r, step, st, "validating");
        total += sum;
    }
    snip_set_mode(r->session, SNIP_TRAIN);
    return total / (double)(n * o->seq);
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

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void save_plan(run *r) {
    char path[TR_PATH];
    tr_path(path, r->dir, "plan.txt");
    snip_status st = snip_plan_save(r->session, path);
    if (st) tr_die("cannot write %s: %s", path, session_error(r->session, st));
}

static volatile sig_atomic_t stop_asked;  // by the signal of this number

static void ask_stop(int signal_number) { stop_asked = signal_number; }

static void train(run *r, const tr_options *o, const tr_data *d) {
    llama *g = r->model;
    snip *s = r->session;
    const tr_optimizer *opt = tr_optimizer_named(o->optimizer);
    int64_t micro = o->batch * o->seq, tokens_per_step = micro * o->accum;
    int32_t *tokens = (int32_t *)tr_alloc((size_t)tokens_per_step * 4),
            *targets = (int32_t *)tr_alloc((size_t)tokens_per_step * 4);
    double recent[SPEED_WINDOW], sorted[SPEED_WINDOW], start = tr_now();
    int64_t ordinary = 0;
    char path[TR_PATH], csv_path[TR_PATH];
    tr_progress progress = { (int)o->quiet, isatty(2), tr_now(), r->precision };

    if (!r->step) {  // a fresh run: what an earlier one left here must not be resumed or mixed in
        save_checkpoint(r, o);
        tr_path(path, r->dir, "plan.svg");
        unlink(path);
        tr_path(path, r->dir, "report.html");
        unlink(path);
    } else
        tr_note(&progress, "%s: resumed after step %lld", r->precision, (long long)r->step);
    tr_path(csv_path, r->dir, "loss.csv");
    FILE *csv = start_csv(r, csv_path);
    save_plan(r);

    while (r->step < o->steps) {
        int64_t step = r->step + 1;
        double before = tr_now(), loss;
        int passes = 0;
        snip_status st;
        for (int64_t i = 0; i < o->accum * o->batch; i++)
            tr_train_sequence(d, (uint64_t)o->seed, step, i, o->seq, tokens + i * o->seq, targets + i * o->seq);
        do {
            loss = 0;
            passes++;
            llama_zero_grad(g);
            for (int64_t a = 0; a < o->accum; a++) {
                double sum;
                if ((st = llama_forward(g, s, tokens + a * micro, targets + a * micro, (int)o->batch,
                                        1.0f / (float)tokens_per_step, &sum)) != SNIP_OK ||
                    (st = llama_backward(g, s, tokens + a * micro, (int)o->batch)) != SNIP_OK)
                    stop_nonfinite(r, step, st, "training");
                loss += sum / (double)tokens_per_step;
            }
        } while (snip_next_pass(s, loss));
        double norm = llama_grad_norm(g), scale = norm > CLIP ? CLIP / norm : 1.0, lr = learning_rate(o, step);
        if (!llama_finite(norm)) stop_nonfinite(r, step, SNIP_NONFINITE, "adding up its gradient");
        snip_adamw update = { lr, opt->beta1, opt->beta2, EPS, step, scale };
        llama_update(g, opt->kind, &update, opt->decay);
        double share = snip_share(s, SNIP_E2M1);
        int plans = snip_plans(s);
        if ((st = snip_end_step(s, &update)) == SNIP_INFEASIBLE)
            tr_die("step %lld: %s", (long long)step, session_error(s, st));
        if (st) stop_nonfinite(r, step, st, "measuring");
        double took = tr_now() - before,
               speed = r->step ? r->history[SPEED][r->step - 1] : (double)tokens_per_step / took;
        if (passes == 1) {  // median of the latest ordinary steps
            int64_t n = ++ordinary < SPEED_WINDOW ? ordinary : SPEED_WINDOW;
            recent[(ordinary - 1) % SPEED_WINDOW] = took;
            memcpy(sorted, recent, (size_t)n * sizeof *sorted);
            qsort(sorted, (size_t)n, sizeof *sorted, by_value);
            speed = (double)tokens_per_step / sorted[n / 2];
        }
        if (snip_plans(s) != plans) {
            r->plan_step[r->n_plans++] = (double)step;
            tr_note(
                &progress,
                "%s: step %lld: measured %d layers in %d passes (%.1f ordinary steps), solved in %.3f ms; FP4 share %.1f%% -> %.1f%%",
                r->precision, (long long)step, snip_layers(s), passes, took * speed / (double)tokens_per_step,
                1e3 * snip_solve_seconds(s), 100 * share, 100 * snip_share(s, SNIP_E2M1));
        }
        if (strcmp(r->reason, snip_reason(s))) {
            snprintf(r->reason, sizeof r->reason, "%s", snip_reason(s));
            tr_note(&progress, "%s: %s", r->precision, r->reason);
            save_plan(r);
            ordinary = 0;  // the new plan has a speed of its own
        }
        r->history[LOSS][r->step] = loss;
        r->history[SPEED][r->step] = speed;
        r->history[SHARE][r->step] = snip_share(s, SNIP_E2M1);
        r->history[VAL][r->step] = -1;
        if (step == o->steps || (o->val_every && step % o->val_every == 0))
            r->history[VAL][r->step] = validate(r, o, d, step, SNIP_EVAL, tokens, targets);
        r->step = step;
        write_row(csv, r, step);
        errno = 0;
        if (fflush(csv)) tr_die("cannot write %s: %s", csv_path, strerror(errno));
        if (stop_asked || step == o->steps || (o->save_every && step % o->save_every == 0)) save_checkpoint(r, o);
        tr_show(&progress, step, o->steps, loss, speed, (double)((o->steps - step) * tokens_per_step) / speed,
                snip_share(s, SNIP_E2M1));
        if (stop_asked) {
            tr_note(&progress, "%s: stopped after step %lld; --resume goes on", r->precision, (long long)step);
            signal(stop_asked, SIG_DFL);
            raise(stop_asked);
        }
    }
    if (fclose(csv)) tr_die("cannot write %s: %s", csv_path, strerror(errno));
    if (strcmp(r->precision, "f32") && strcmp(r->precision, "bf16"))
        r->val_high = validate(r, o, d, o->steps, SNIP_EVAL_HIGH, tokens, targets);
    r->seconds = tr_now() - start;
    save_plan(r);
    r->layers = (snip_layer_info *)tr_alloc((size_t)snip_layers(s) * sizeof *r->layers);
    for (int i = 0; i < snip_layers(s); i++) snip_layer(s, i, &r->layers[i]);
    free(tokens);
    free(targets);
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
    p.n_layers = snip_layers(r->session);
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

static void write_report(const char *path, const run *runs, int n, const tr_options *o, const tr_data *d) {
    report_run p[TR_MAX_RUNS];
    char value[10][96];
    double seconds = 0;
    int64_t params = 0;
    const llama *g = runs[0].model;
    for (int i = 0; i < n; i++) {
        p[i] = as_report(&runs[i]);
        seconds += runs[i].seconds;
    }
    for (int i = 0; i < g->n_tensors; i++) params += g->tensors[i].rows * g->tensors[i].cols;
    report_fact facts[10] = {
        {"model",             value[0]},
        { "parameters",       value[1]},
        { "vocabulary",       value[2]},
        { "data",             value[3]},
        { "steps",            value[4]},
        { "tokens in a step", value[5]},
        { "FP4 budget",       value[6]},
        { "measured every",   value[7]},
        { "seed",             value[8]},
        { "time",             value[9]}
    };
    snprintf(value[0], 96, "%d blocks, d %d, %d heads (%d for keys and values), FFN %d", g->config.blocks,
             g->config.dim, g->config.heads, g->config.kv_heads, g->config.ffn);
    snprintf(value[1], 96, "%.2f million", (double)params * 1e-6);
    snprintf(value[2], 96, "%d", d->vocab);
    snprintf(value[3], 96, "%lld tokens, the last tenth of each file for validation", (long long)d->n);
    snprintf(value[4], 96, "%lld", (long long)o->steps);
    snprintf(value[5], 96, "%lld x %lld x %lld", (long long)o->accum, (long long)o->batch, (long long)o->seq);
    if (o->speedup > 0)
        snprintf(value[6], 96, "as many as make the linear layers %g times as fast", o->speedup);
    else
        snprintf(value[6], 96, "%g%%", 100 * o->budget);
    snprintf(value[7], 96,
             o->plan    ? "never: plan from a file"
             : o->every ? "%lld steps"
                        : "never",
             (long long)o->every);
    snprintf(value[8], 96, "%lld", (long long)o->seed);
    snprintf(value[9], 96, "%.0f s", seconds);
    FILE *f = tr_begin(path);
    if (report_write_html(f, "train_llama under snip", p, n, facts, 10))
        tr_die("cannot write %s: %s", path, strerror(errno ? errno : EIO));
    tr_commit(f, path, 0);
}

int main(int argc, char **argv) {
    static tr_options o;
    static run runs[TR_MAX_RUNS];
    tr_data d;
    char dir[TR_PATH], path[TR_PATH];
    struct stat info;
    tr_program = "train_llama";
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);  // a file-size limit then shows as a failed write, which says what failed
#endif
    static const int stops[] = { SIGINT, SIGTERM };
    for (int i = 0; i < 2; i++) {  // the step is finished and saved; a second one kills
        struct sigaction stop;
        memset(&stop, 0, sizeof stop);
        stop.sa_handler = ask_stop;
        stop.sa_flags = (int)SA_RESETHAND;
        sigaction(stops[i], &stop, NULL);
    }
    tr_parse(&o, argc, argv);
#ifdef _OPENMP
    if (o.threads) omp_set_num_threads((int)o.threads);
#endif
    llama_config shape = { 256,        (int)o.dim, (int)o.blocks, (int)o.heads,  (int)o.kv_heads,
                           (int)o.ffn, (int)o.seq, (int)o.tied,   (int)o.stages, 0 };
    if (llama_config_check(&shape)) tr_die("%s", llama_config_check(&shape));
    if (!o.n_runs) o.runs[0] = o.precision;
    int n = o.n_runs ? o.n_runs : 1, compare = o.n_runs > 0;
    tr_load_data(&d, &o);
    if (o.resume && stat(o.out, &info)) tr_die("--resume: %s: %s", o.out, strerror(errno));

    for (int i = 0; i < n; i++) {  // everything that can be refused is refused before anything is written
        snprintf(dir, sizeof dir, "%s", o.out);
        if (compare) tr_path(dir, o.out, o.runs[i]);
        open_run(&runs[i], &o, &d, o.runs[i], dir);
        if (compare) close_run(&runs[i]);
    }
    for (int i = 0; i < n; i++) {
        if (compare) tr_path(dir, o.out, o.runs[i]);
        tr_mkdir(dir);
        tr_lock(dir);
        static const char *const files[] = { "loss.csv", "plan.txt", "plan.svg", "report.html", "model.safetensors" };
        for (int j = 0; j < 5; j++) {
            tr_path(path, dir, files[j]);
            tr_try(path);
        }
    }
    for (int i = 0; i < n; i++) {
        if (compare) {
            tr_path(dir, o.out, o.runs[i]);
            open_run(&runs[i], &o, &d, o.runs[i], dir);
        }
        train(&runs[i], &o, &d);
        write_svg(&runs[i]);
        if (!o.quiet && (!strcmp(o.runs[i], "snip") || !compare)) {
            printf("\nPlan of %s after step %lld:\n", o.runs[i], (long long)runs[i].step);
            snip_plan_print(runs[i].session, stdout);
        }
    }
    tr_path(path, o.out, "report.html");
    write_report(path, runs, n, &o, &d);
    printf("\n%-10s %9s %15s %10s %9s\n", "precision", "val loss", "same, in high", "last tok/s", "FP4 share");
    for (int i = 0; i < n; i++) {
        const run *r = &runs[i];
        int64_t last = r->step - 1;
        char high[16] = "";
        if (r->val_high >= 0) snprintf(high, sizeof high, "%.4f", r->val_high);
        printf("%-10s %9.4f %15s %10.0f %8.1f%%\n", r->precision, r->history[VAL][last], high, r->history[SPEED][last],
               100 * r->history[SHARE][last]);
    }
    printf("report: %s\n", path);
    for (int i = 0; i < n; i++) close_run(&runs[i]);
    free(d.tokens);
    if (o.n_runs) free((void *)(uintptr_t)o.runs[0]);
    if (fflush(stdout)) tr_die("cannot write to standard output: %s", strerror(errno));
    return 0;
}
