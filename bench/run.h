// run.h - training steps of examples/llama.h's model under a session; shared by fidelity.c and quality.c. Include after
// trainer.h.
#ifndef RUN_H
#define RUN_H

static const double BETA1 = 0.9, BETA2 = 0.95, EPS = 1e-8, DECAY = 0.1;

static inline void check(snip_status status, const snip *s, const char *where) {
    if (status) tr_stop("%s: %s", where, snip_message(s)[0] ? snip_message(s) : snip_status_text(status));
}

typedef struct {
    llama *g;
    snip *s;
    int32_t *tokens, *targets;
    const tr_data *d;
    const tr_options *o;
    const void *fresh;
} run;  // fresh: s's state before its first step

static inline double pass(const run *r, int backward) {
    double sum = 0, n = (double)r->o->batch * r->g->config.seq;
    if (backward) llama_zero_grad(r->g);
    check(llama_forward(r->g, r->s, r->tokens, r->targets, (int)r->o->batch, backward ? (float)(1 / n) : 0.0f, &sum),
          r->s, "forward");
    if (backward) check(llama_backward(r->g, r->s, r->tokens, (int)r->o->batch), r->s, "backward");
    return sum / n;
}

static inline void load_batch(const run *r, uint64_t batches, int64_t step) {
    for (int64_t j = 0; j < r->o->batch; j++)
        tr_train_sequence(r->d, batches, step, j, r->o->seq, r->tokens + j * r->o->seq, r->targets + j * r->o->seq);
}

// On the step-th batch of the seed `batches`; returns its loss.
static inline double train_step(const run *r, uint64_t batches, int64_t step, double lr, int64_t optimizer_step) {
    double loss, norm;
    load_batch(r, batches, step);
    do loss = pass(r, 1);
    while (snip_next_pass(r->s, loss));
    norm = llama_grad_norm(r->g);
    snip_adamw update = { lr, BETA1, BETA2, EPS, optimizer_step, norm > 1 ? 1 / norm : 1 };
    llama_adamw(r->g, lr, BETA1, BETA2, EPS, DECAY, optimizer_step, update.grad_scale);
    check(snip_end_step(r->s, &update), r->s, "training");
    return loss;
}
#endif  // RUN_H
