/* calibrate.c - scores of a replay, layer by layer, into shares of every head; and ranks as
 * questions see them, layer by layer, into the numbers of an adaptive cut.
 *
 * The one idea of the second: a question that stands behind a text is what a window policy is
 * made for, so traces are those of an ordinary prefill of text and question, with a
 * threshold that nothing is below. The questions ask for passages, those that recall.h finds. */
#include "calibrate.h"

#include <stdio.h>
#include <string.h>

#include "geom.h"
#include "mem.h"
#include "offline.h"
#include "reach.h"
#include "recall.h"
#include "settle.h"

#define CHUNK 512u
#define SINK 4u
#define QUESTIONS 4u /* about each text, spread over it */
/* A quarter of the tokens goes on after a cut: enough of them must be others than the last w. */
#define LEAST_TOKENS 256u

static const char request[] = "Quote the passage that begins with: ";
static const double budgets[] = {0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75};
#define N_BUDGETS (sizeof budgets / sizeof budgets[0])

struct calibration {
    struct backend *b;
    uint32_t n_heads, n_texts, n_done;
    struct calibrate_watch watch;
    double *sum;                  /* [N_BUDGETS][n_heads] */
    struct profile_window window; /* the kernel; 0: no tokenizer, so nothing is asked */
    uint32_t l_obs;
    double *variance; /* [n_traces][n_layers - first] */
    uint32_t n_traces;
    /* of the text under way */
    uint32_t n, n_passes; /* passes that are over, of all texts */
    float **score;        /* [n_heads][n], both levels owned */
};

/* Layers whose variance is looked at start where l_obs ranks are there. */
static uint32_t first_layer(const struct calibration *c)
{
    return c->l_obs - 1;
}

/* Could a cut be chosen in this model at all? */
static bool may_settle(const struct calibration *c)
{
    return c->window.pool && 3 * first_layer(c) < 2 * c->b->p->geom.n_layers;
}

static int open_window(struct calibration *c, struct larder_err *e)
{
    const struct tokenizer *t = model_tokenizer(c->b->model);
    struct policy p;
    int rc = policy_parse("asl", &p, e);

    c->l_obs = p.l_obs;
    return rc || !t ? rc : reach_kernel(t, &c->window.pool, e);
}

int calibrate_open(struct calibration **ret, struct backend *b, uint32_t n_texts,
                   const struct calibrate_watch *watch, struct larder_err *e)
{
    struct calibration *c = mem_zalloc(1, sizeof *c);
    int rc;

    if (!c)
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    c->b = b;
    c->n_texts = n_texts;
    if (watch)
        c->watch = *watch;
    c->n_heads = b->p->geom.n_layers * b->p->geom.n_kv_heads;
    c->sum = mem_zalloc(N_BUDGETS * (uint64_t)c->n_heads, sizeof *c->sum);
    c->score = mem_zalloc(c->n_heads, sizeof *c->score);
    if (!c->sum || !c->score) {
        calibrate_free(c);
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    }
    rc = open_window(c, e);
    if (rc) {
        calibrate_free(c);
        return rc;
    }
    *ret = c;
    return 0;
}

static void drop_scores(struct calibration *c)
{
    for (uint32_t h = 0; c->score && h < c->n_heads; h++) {
        mem_free(c->score[h]);
        c->score[h] = NULL;
    }
}

void calibrate_free(struct calibration *c)
{
    if (!c)
        return;
    drop_scores(c);
    mem_free(c->score);
    mem_free(c->variance);
    mem_free(c->sum);
    mem_free(c);
}

/* Layers of all passes in one count, which stays within what a frame may say. */
static int on_progress(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    struct calibration *c = arg;
    uint32_t texts = c->n_texts > c->n_done ? c->n_texts : c->n_done + 1;
    uint64_t passes = (uint64_t)texts * (may_settle(c) ? 1 + QUESTIONS : 1);

    (void)pass;
    if (!c->watch.progress)
        return 0;
    if (passes * n_layers > KV_MAX_LAYERS)
        return c->watch.progress(c->watch.arg, "calibrate", layer, n_layers);
    return c->watch.progress(c->watch.arg, "calibrate", c->n_passes * n_layers + layer,
                             (uint32_t)passes * n_layers);
}

static int take_layer(void *arg, uint32_t layer, const float *score, struct larder_err *e)
{
    struct calibration *c = arg;
    uint32_t n_kv_heads = c->b->p->geom.n_kv_heads;

    for (uint32_t g = 0; g < n_kv_heads; g++) {
        float **to = &c->score[layer * n_kv_heads + g];

        *to = mem_dup(score + (uint64_t)g * c->n, c->n * sizeof *score);
        if (!*to)
            return larder_fail(e, LARDER_ENOMEM, "no memory for scores of layer %u", layer);
    }
    return 0;
}

static int add_budget(struct calibration *c, uint32_t i, float *share, struct larder_err *e)
{
    int rc = shares_measure((const float *const *)c->score, c->n_heads, c->n, SINK, budgets[i],
                            share, e);

    for (uint32_t h = 0; h < c->n_heads && !rc; h++)
        c->sum[i * c->n_heads + h] += share[h];
    return rc;
}

/* ---- questions */

/* Keep the trace of one prefill. One whose ranks never move at all says nothing. */
static int take_trace(struct calibration *c, const struct engine_result *r, struct larder_err *e)
{
    uint32_t n = c->b->p->geom.n_layers - first_layer(c);
    double *all, sum = 0;

    for (uint32_t i = 0; i < r->n_trace; i++)
        sum += r->trace[i].value;
    if (r->n_trace != n || !(sum > 0))
        return 0;
    all = mem_grow(c->variance, c->n_traces + 1ull, n * sizeof *all);
    if (!all)
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    c->variance = all;
    for (uint32_t i = 0; i < n; i++)
        all[(uint64_t)c->n_traces * n + i] = r->trace[i].value;
    c->n_traces++;
    return 0;
}

/* Ranks in all layers, as they are after text and question. */
static int trace_ranks(struct calibration *c, const struct engine_doc *doc, struct larder_err *e)
{
    const struct engine_sink sink = {c, NULL, on_progress};
    struct engine_result r = {0};
    char text[POLICY_TEXT_MAX];
    struct policy p;
    int rc;

    snprintf(text, sizeof text, "asl,rows=all,select=25%%,pool=%u,lmin=%u,lobs=%u,tau=0",
             c->window.pool, first_layer(c), c->l_obs);
    rc = policy_parse(text, &p, e);
    if (!rc)
        rc = engine_prefill(c->b, doc, &p, &sink, &r, e);
    if (!rc)
        rc = take_trace(c, &r, e);
    engine_result_done(&r);
    return rc;
}

/* What stands before and after the words that are asked about. */
struct asking {
    uint32_t *head, *tail;
    size_t n_head, n_tail;
};

static int asking_init(struct asking *a, const struct calibration *c, const struct template *tmpl,
                       struct larder_err *e)
{
    const struct tokenizer *t = model_tokenizer(c->b->model);
    int rc = template_join(t, tmpl ? tmpl->ask_head : "\n\n", request, &a->head, &a->n_head, e);

    return rc ? rc : template_join(t, tmpl ? tmpl->ask_tail : "\n", "", &a->tail, &a->n_tail, e);
}

static void asking_done(struct asking *a)
{
    mem_free(a->head);
    mem_free(a->tail);
}

/* The text, and behind it a question about the passage at `at`, which begins with the cue. */
static int ask(struct calibration *c, const struct engine_doc *doc, const struct asking *a,
               uint32_t at, struct larder_err *e)
{
    uint64_t n = doc->n + a->n_head + PROBE_CUE + a->n_tail;
    uint32_t *ids, *to;
    int rc;

    if (n > c->b->p->n_positions)
        return 0;
    ids = to = mem_alloc(n, sizeof *ids);
    if (!ids)
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    memcpy(to, doc->ids, doc->n * sizeof *ids);
    memcpy(to += doc->n, a->head, a->n_head * sizeof *ids);
    memcpy(to += a->n_head, doc->ids + at - PROBE_CUE, PROBE_CUE * sizeof *ids);
    memcpy(to + PROBE_CUE, a->tail, a->n_tail * sizeof *ids);
    rc = trace_ranks(c, &(struct engine_doc){ids, (uint32_t)n, doc->tmpl, NULL}, e);
    mem_free(ids);
    return rc;
}

static int ask_all(struct calibration *c, const struct engine_doc *doc, struct larder_err *e)
{
    struct probes *p = NULL;
    struct asking a = {0};
    int rc;

    if (!may_settle(c) || doc->n < LEAST_TOKENS)
        return 0;
    rc = asking_init(&a, c, doc->tmpl, e);
    if (!rc)
        rc = probes_make(&p, c->b->model, doc->tmpl, doc->ids, 0, doc->n, e);
    for (uint32_t i = 0; !rc && p->n && i < QUESTIONS; i++) {
        rc = ask(c, doc, &a, p->probe[(2 * i + 1) * p->n / (2 * QUESTIONS)].at, e);
        c->n_passes++;
    }
    probes_free(p);
    asking_done(&a);
    return rc;
}

/* ---- the whole thing */

int calibrate_add(struct calibration *c, const struct engine_doc *doc, struct larder_err *e)
{
    const struct offline_watch watch = {c, take_layer, on_progress};
    float *share = mem_alloc(c->n_heads, sizeof *share);
    int rc = share ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");

    c->n = doc->n;
    if (!rc)
        rc = offline_scores(c->b, doc, CHUNK, &watch, e);
    for (uint32_t i = 0; i < N_BUDGETS && !rc; i++)
        rc = add_budget(c, i, share, e);
    drop_scores(c);
    mem_free(share);
    c->n_passes++;
    if (!rc)
        rc = ask_all(c, doc, e);
    if (!rc)
        c->n_done++;
    c->n_passes = c->n_done * (may_settle(c) ? 1 + QUESTIONS : 1); /* some may be left out */
    return rc;
}

int calibrate_shares(const struct calibration *c, struct shares **ret, struct larder_err *e)
{
    float *share = mem_alloc(c->n_heads, sizeof *share);
    const struct traces traces = {c->variance, c->n_traces, first_layer(c), c->b->p->geom.n_layers};
    struct profile_window window = c->window;
    struct shares *s = NULL;
    int rc = share ? shares_new(&s, c->n_heads, e)
                   : larder_fail(e, LARDER_ENOMEM, "no memory for a table of shares");

    for (uint32_t i = 0; i < N_BUDGETS && !rc; i++) {
        for (uint32_t h = 0; h < c->n_heads; h++)
            share[h] = (float)(c->sum[i * c->n_heads + h] / c->n_done);
        rc = shares_add(s, budgets[i], share, e);
    }
    if (!rc && window.pool) {
        settle_choose(&traces, &window); /* what is not measured stays 0 */
        rc = shares_set_window(s, &window, e);
    }
    mem_free(share);
    if (rc) {
        shares_free(s);
        return rc;
    }
    *ret = s;
    return 0;
}
