/* engine.c - layer-major prefill: which rows go through which layer, and which stay.
 *
 * The one idea: a pass is a list of rows (their hidden states, their positions) that
 * goes through the layers one at a time; after a layer the list may shrink. Rows leave
 * for the sink before that, from the complete K and V of the layer, so pruning the
 * cache never changes the prefill itself. The three axes of a policy are asked in turn:
 * observe.h for scores, cut.h for what goes on, rung.h for what stays. Two-pass policies
 * run a scoring pass first and then an ordinary pass over the chosen tokens. */
#include "engine.h"

#include <float.h>
#include <math.h>
#include <string.h>
#include <time.h>

#include "ladder.h"
#include "mem.h"
#include "observe.h"
#include "offline.h"
#include "pass.h"
#include "probe.h"
#include "rung.h"
#include "select.h"
#include "select_ops.h"

struct run {
    struct backend *b;
    const struct model_params *p;
    const struct policy *policy;  /* the first: cuts, where there is one, are its own */
    const struct rung_want *want; /* the first's progress() is asked */
    uint32_t n_wants;             /* 0: nobody takes rows */
    const char *pass;
    uint32_t n0;      /* document rows at the start */
    uint32_t n;       /* document rows now */
    uint32_t n_probe; /* rows after them that only ask */
    uint32_t stride;  /* row capacity per head */
    uint32_t select;  /* rows that pass a cut */
    float *hidden;
    uint32_t *pos;      /* rotation positions */
    uint32_t *original; /* positions in the document */
    void *q, *k, *v, *o;
    double *score, *worth; /* [n_kv_heads][n] of the layer at hand */
    struct cut cut;
    struct rung *rung;
    uint32_t n_rungs;
    int32_t sel_layer;
    bool chose; /* the order of the cut is the choice of a scoring pass */
    double load_ms;
};

static int no_memory(struct larder_err *e, uint32_t n)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory to prefill %u tokens", n);
}

/* ---- buffers */

static void run_done(struct run *r)
{
    backend_buffer_free(r->b, r->hidden);
    mem_free(r->pos);
    mem_free(r->original);
    backend_buffer_free(r->b, r->q);
    backend_buffer_free(r->b, r->k);
    backend_buffer_free(r->b, r->v);
    backend_buffer_free(r->b, r->o);
    backend_buffer_free(r->b, r->score);
    mem_free(r->worth);
    cut_done(&r->cut);
    rungs_close(r->rung, r->n_rungs);
}

static bool any_scores(const struct run *r)
{
    for (uint32_t i = 0; i < r->n_wants; i++)
        if (r->want[i].policy->obs != OBS_NONE)
            return true;
    return r->policy->obs != OBS_NONE;
}

static bool any_weighs(const struct run *r)
{
    for (uint32_t i = 0; i < r->n_wants; i++)
        if (r->want[i].policy->critical)
            return true;
    return false;
}

static bool alloc_rows(struct run *r)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t elem = (uint64_t)kv_dtype_bytes(r->b->elem) * g->head_dim;
    uint64_t per_head = (uint64_t)r->stride * elem, n = r->n0 + r->n_probe;
    uint64_t scores = any_scores(r) ? (uint64_t)g->n_kv_heads * r->n0 : 0;

    r->hidden = backend_buffer_new(r->b, n * r->p->n_hidden, sizeof *r->hidden);
    r->pos = mem_alloc(n, sizeof *r->pos);
    r->original = mem_alloc(r->n0, sizeof *r->original);
    r->q = backend_buffer_new(r->b, g->n_heads, per_head);
    r->k = backend_buffer_new(r->b, g->n_kv_heads, per_head);
    r->v = backend_buffer_new(r->b, g->n_kv_heads, per_head);
    r->o = backend_buffer_new(r->b, g->n_heads, per_head);
    r->score = backend_buffer_new(r->b, scores, sizeof *r->score);
    r->worth = mem_alloc(any_weighs(r) ? scores : 0, sizeof *r->worth);
    return r->hidden && r->pos && r->original && r->q && r->k && r->v && r->o && r->score &&
           r->worth;
}

static int embed_row(struct run *r, uint32_t id, uint32_t row, struct larder_err *e)
{
    r->pos[row] = row;
    return model_read_f32(r->b->model, 0, MODEL_EMBED, id, 1,
                          r->hidden + (uint64_t)row * r->p->n_hidden, e);
}

/* Hidden states of ids[], which sit at rotation positions 0.., and of the probe after them. */
static int embed(struct run *r, const uint32_t *ids, const uint32_t *original,
                 const uint32_t *probe, struct larder_err *e)
{
    int rc = backend_view(r->b, r->hidden, VIEW_WRITE, e);

    for (uint32_t i = 0; i < r->n0 && !rc; i++) {
        r->original[i] = original ? original[i] : i;
        rc = embed_row(r, ids[i], i, e);
    }
    for (uint32_t i = 0; i < r->n_probe && !rc; i++)
        rc = embed_row(r, probe[i], r->n0 + i, e);
    return rc;
}

static int read_probe(struct run *r, uint32_t n, uint32_t **ret, struct larder_err *e)
{
    size_t n_probe = 0;
    int rc;

    if (r->policy->obs != OBS_PROBE)
        return 0;
    rc = probe_ids(r->b->model, ret, &n_probe, e);
    if (!rc && n + n_probe > r->p->n_positions)
        rc = larder_fail(e, LARDER_ETOOLONG,
                         "the document has %u tokens and obs=probe adds %zu, the model has only %u "
                         "positions; split it",
                         n, n_probe, r->p->n_positions);
    r->n_probe = (uint32_t)n_probe;
    return rc;
}

/* In a layer that slides, a row's place in the list must be its position: nothing may leave the
 * list while there is something to hide, and rows never get fresh positions, which the stored
 * ones are not. Asking for what a layer cannot see says nothing about what to keep of it: all that
 * is repeated must lie within every window, which then hides nothing. */
int engine_check_windows(const struct model_params *m, const struct policy *p, uint64_t n,
                         struct larder_err *e)
{
    uint32_t sliding = model_narrowest(m);

    if (sliding && policy_is_two_pass(p))
        return larder_fail(
            e, LARDER_EUNSUPPORTED,
            "the policy gives rows fresh positions, and layers of the model see only "
            "%u positions back; use one that does not, like snapkv or keydiff",
            sliding);
    if (!sliding || n <= sliding)
        return 0;
    if (p->cut != CUT_OFF)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "the policy cuts tokens, and layers of the model see only %u positions "
                           "back, which is less than the document; use one that does not cut, "
                           "like snapkv or keydiff",
                           sliding);
    if (!policy_is_replay(p))
        return 0;
    return larder_fail(e, LARDER_EUNSUPPORTED,
                       "the document and what repeats it take %llu positions or more, and layers "
                       "of the model see only %u back; use snapkv, keydiff or full, or split the "
                       "document",
                       (unsigned long long)n, sliding);
}

/* The rows of ids[n], ready for the first layer. */
static int run_init(struct run *r, const uint32_t *ids, const uint32_t *original, uint32_t n,
                    struct larder_err *e)
{
    uint32_t *probe = NULL;
    int rc = read_probe(r, n, &probe, e);

    if (!rc)
        rc = engine_check_windows(r->p, r->policy, (uint64_t)n + r->n_probe, e);
    r->n0 = r->n = n;
    r->stride = (n + r->n_probe + 15) / 16 * 16;
    r->sel_layer = -1;
    if (!rc && !alloc_rows(r))
        rc = no_memory(e, n);
    if (!rc)
        rc = cut_init(&r->cut, r->b, r->policy, n, r->select, e);
    if (!rc)
        rc = rungs_open(&r->rung, &r->n_rungs, r->b, r->want, r->n_wants, n, e);
    if (!rc)
        rc = embed(r, ids, original, probe, e);
    mem_free(probe);
    return rc;
}

/* ---- one layer */

static int project(struct run *r, const struct layer *l, struct larder_err *e)
{
    return r->b->ops->qkv(r->b, l,
                          &(struct project){.hidden = r->hidden,
                                            .pos = r->pos,
                                            .rope = model_rope(r->p, r->n0),
                                            .n = r->n + r->n_probe,
                                            .stride = r->stride,
                                            .q = r->q,
                                            .k = r->k,
                                            .v = r->v},
                          e);
}

/* Attention and MLP for rows row0 and up. */
static int advance(struct run *r, const struct layer *l, uint32_t layer, uint32_t row0,
                   struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t o_row = (uint64_t)g->n_heads * g->head_dim * kv_dtype_bytes(r->b->elem);
    uint32_t n = r->n + r->n_probe;
    struct attend a = {r->q, r->k, r->v, n, row0, r->stride, r->o, model_sliding(r->p, layer)};
    int rc = r->b->ops->attend(r->b, &a, e);

    if (rc)
        return rc;
    return r->b->ops->finish(r->b, l, r->hidden + (uint64_t)row0 * r->p->n_hidden,
                             (const uint8_t *)r->o + row0 * o_row, n - row0, e);
}

static struct layer_view view(const struct run *r, uint32_t layer)
{
    return (struct layer_view){
        .b = r->b,
        .layer = layer,
        .n = r->n,
        .n_probe = r->n_probe,
        .n_ctx = r->n0,
        .stride = r->stride,
        .pos = r->pos,
        .hidden = r->hidden,
        .q = r->q,
        .k = r->k,
        .v = r->v,
    };
}

/* Choose the rows of the layer at hand for one way of keeping; *by: whose scores there are. */
static int choose_rows(struct run *r, struct rung *g, const struct layer_view *x,
                       const struct policy **by, struct larder_err *e)
{
    bool scored = keep_needs_scores(&g->keep, r->n), weighed = scored && g->policy->critical;
    struct layer_rows rows = {x->layer,
                              r->n,
                              r->stride,
                              r->original,
                              r->k,
                              r->v,
                              scored ? r->score : NULL,
                              weighed ? r->worth : NULL};
    int rc = 0;

    if (scored && *by != g->policy) {
        rc = observe_layer(x, g->policy, r->score, e);
        *by = g->policy;
    }
    if (!rc && weighed)
        rc = observe_worth(x, r->worth, e);
    return rc ? rc : rung_choose(g, &rows, NULL, e);
}

/* What was chosen, which a backend may have sent while it went on with the layer. */
static int deliver(struct run *r, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        rc = rung_deliver(&r->rung[i], e);
    return rc;
}

/* Scores, rows and the decision of one layer whose q, k and v are there. */
static int observe(struct run *r, uint32_t layer, bool *ret_cut, struct larder_err *e)
{
    struct layer_view x = view(r, layer);
    const struct policy *by = NULL;
    int rc = 0;

    if (r->sel_layer < 0 && cut_is_candidate(&r->cut, layer)) {
        by = r->policy;
        rc = observe_layer(&x, by, r->score, e);
        if (!rc)
            rc = cut_look(&r->cut, layer, r->score, r->n, ret_cut, e);
    }
    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        rc = choose_rows(r, &r->rung[i], &x, &by, e);
    return rc;
}

/* ---- fewer rows for the layers above */

/* Hidden states rows[n], ascending, to the front. */
static int move_hidden(struct run *r, const uint32_t *rows, uint32_t n, struct larder_err *e)
{
    uint64_t row = r->p->n_hidden * sizeof *r->hidden;
    struct gather g = {.from = r->hidden,
                       .n_heads = 1,
                       .row_bytes = (uint32_t)row,
                       .count = &n,
                       .index = rows,
                       .to = r->hidden,
                       .stride = r->n + r->n_probe};

    if (r->b->ops->select)
        return r->b->ops->select->gather(r->b, &g, e);
    for (uint32_t i = 0; i < n; i++) /* rows[i] >= i */
        memmove((uint8_t *)r->hidden + i * row, (uint8_t *)r->hidden + rows[i] * row, row);
    return 0;
}

/* Go on with rows[n] of the document, ascending, and with the probe, for which rows[] has room. */
static int shrink(struct run *r, uint32_t *rows, uint32_t n, struct larder_err *e)
{
    int rc;

    for (uint32_t i = 0; i < r->n_probe; i++)
        rows[n + i] = r->n + i;
    rc = move_hidden(r, rows, n + r->n_probe, e);
    for (uint32_t i = 0; i < n + r->n_probe && !rc; i++) {
        r->pos[i] = r->pos[rows[i]];
        if (i < n)
            r->original[i] = r->original[rows[i]];
    }
    if (!rc)
        r->n = n;
    return rc;
}

static int cut_here(struct run *r, uint32_t layer, struct larder_err *e)
{
    uint32_t *rows = mem_alloc(r->n + r->n_probe, sizeof *rows), n;
    int rc = rows ? cut_rows(&r->cut, r->n, rows, &n, e) : no_memory(e, r->n);

    if (!rc)
        rc = shrink(r, rows, n, e);
    mem_free(rows);
    r->sel_layer = (int32_t)layer;
    return rc;
}

/* The best `n_keep` of the first `n_context` rows - the policy's first ones are the best - and
 * all rows after them. */
static int decay_rows(struct run *r, double *score, uint32_t n_context, uint32_t n_keep,
                      struct larder_err *e)
{
    uint32_t n_sink = r->policy->sink < n_context ? r->policy->sink : n_context;
    uint32_t *order = mem_alloc(n_context, sizeof *order);
    uint32_t *rows = mem_alloc(r->n + r->n_probe, sizeof *rows);
    int rc = order && rows ? 0 : no_memory(e, r->n);

    for (uint32_t i = 0; i < n_sink; i++)
        score[i] = DBL_MAX;
    if (!rc)
        rc = select_order(score, n_context, order, e);
    if (!rc) {
        select_top(order, n_keep, rows);
        for (uint32_t i = n_context; i < r->n; i++)
            rows[n_keep + i - n_context] = i;
        rc = shrink(r, rows, n_keep + r->n - n_context, e);
    }
    mem_free(order);
    mem_free(rows);
    return rc;
}

/* PyramidInfer: a few of the rows before the recent ones leave after each layer. */
static int decay(struct run *r, uint32_t layer, struct larder_err *e)
{
    const struct policy *p = r->policy;
    uint32_t n_recent = (uint32_t)(r->n0 * (p->recent / 100)) + 1;
    uint32_t least =
        r->n0 > n_recent && p->context > r->n0 - n_recent ? r->n0 - n_recent : p->context;
    uint32_t n_context = r->n > n_recent ? r->n - n_recent : 0;
    uint32_t n_keep = cut_decay_rows(p, layer, r->p->geom.n_layers, n_context, least);
    struct layer_view x = view(r, layer);
    double *score;
    int rc;

    if (n_keep == n_context)
        return 0;
    score = mem_alloc(n_context, sizeof *score);
    rc = score ? observe_recent(&x, n_recent, p->weight, score, e) : no_memory(e, r->n);
    if (!rc)
        rc = decay_rows(r, score, n_context, n_keep, e);
    mem_free(score);
    return rc;
}

static int run_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    bool last = layer + 1 == r->p->geom.n_layers, cut = false;
    struct layer *l = NULL;
    int rc = pass_load_layer(r->b, layer, &l, &r->load_ms, e);

    if (!rc)
        rc = project(r, l, e);
    if (!rc)
        rc = observe(r, layer, &cut, e);
    if (!rc) /* nothing reads the other rows of the last layer */
        rc = advance(r, l, layer, last ? r->n - 1 : 0, e);
    if (!rc)
        rc = deliver(r, e);
    if (!rc && cut)
        rc = cut_here(r, layer, e);
    if (!rc && r->policy->cut == CUT_DECAY && !last)
        rc = decay(r, layer, e);
    r->b->ops->layer_free(r->b, l);
    return rc;
}

/* One layer of a scoring pass; r->chose ends it. */
static int scan_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    bool last = layer + 1 == r->p->geom.n_layers, cut = false;
    struct layer *l = NULL;
    int rc = pass_load_layer(r->b, layer, &l, &r->load_ms, e);

    if (!rc)
        rc = project(r, l, e);
    if (!rc)
        rc = observe(r, layer, &cut, e);
    if (!rc && cut)
        r->sel_layer = (int32_t)layer;
    if (!rc)
        r->chose = cut || last;
    if (!rc && !r->chose)
        rc = advance(r, l, layer, 0, e);
    r->b->ops->layer_free(r->b, l);
    return rc;
}

/* ---- passes */

/* Move what the result needs out of a run. */
static void take_trace(struct run *r, struct engine_result *res)
{
    res->sel_layer = r->sel_layer;
    if (r->cut.n_trace) {
        res->trace = r->cut.trace;
        res->n_trace = r->cut.n_trace;
        r->cut.trace = NULL;
    }
}

static void take_selected(uint32_t *selected, uint32_t n, struct engine_result *res)
{
    res->selected = selected;
    res->n_selected = n;
}

/* An ordinary pass over ids; fills everything but the times. */
static int pass_prefill(struct run *r, const uint32_t *ids, const uint32_t *original, uint32_t n,
                        struct engine_result *res, struct larder_err *e)
{
    int rc = run_init(r, ids, original, n, e);

    for (uint32_t l = 0; l < r->p->geom.n_layers && !rc; l++) {
        rc = pass_progress(r->want->sink, r->pass, l, r->p->geom.n_layers, e);
        if (!rc)
            rc = run_layer(r, l, e);
    }
    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        rc = rung_end(&r->rung[i], e);
    if (!rc)
        rc = pass_logits(r->b, r->hidden + (uint64_t)(r->n - 1) * r->p->n_hidden, &res->logits,
                         &r->load_ms, e);
    if (rc || original)
        return rc;
    take_trace(r, res);
    if (r->sel_layer >= 0) {
        take_selected(r->original, r->n, res);
        r->original = NULL;
    }
    return 0;
}

/* A scoring pass; the chosen tokens become res->selected. */
static int pass_scan(struct run *r, const struct engine_sink *sink, const uint32_t *ids, uint32_t n,
                     struct engine_result *res, struct larder_err *e)
{
    uint32_t *rows, n_rows = 0;
    int rc = run_init(r, ids, NULL, n, e);

    for (uint32_t l = 0; l < r->p->geom.n_layers && !rc && !r->chose; l++) {
        rc = pass_progress(sink, r->pass, l, r->p->geom.n_layers, e);
        if (!rc)
            rc = scan_layer(r, l, e);
    }
    if (rc)
        return rc;
    rows = mem_alloc(r->select, sizeof *rows);
    if (!rows)
        return no_memory(e, n);
    rc = cut_rows(&r->cut, n, rows, &n_rows, e);
    take_trace(r, res);
    take_selected(rows, n_rows, res);
    return rc;
}

/* ---- the whole thing */

/* The stored form is the policy's; nothing is dropped. */
static struct policy keep_everything(const struct policy *p)
{
    return (struct policy){.kind = POLICY_FULL, .precision = p->precision};
}

/* Score the document, then prefill the chosen tokens at fresh positions. */
static int two_passes(struct run *proto, const uint32_t *ids, uint32_t n, struct engine_result *res,
                      struct larder_err *e)
{
    struct policy everything = keep_everything(proto->policy);
    struct rung_want want = {&everything, proto->want->sink};
    struct run scan = *proto, fill = *proto;
    uint32_t *chosen = NULL;
    int rc;

    scan.pass = "select";
    scan.n_wants = 0;
    rc = pass_scan(&scan, want.sink, ids, n, res, e);
    run_done(&scan);
    if (rc)
        return rc;
    chosen = mem_alloc(res->n_selected, sizeof *chosen);
    if (!chosen)
        return no_memory(e, n);
    for (uint32_t i = 0; i < res->n_selected; i++)
        chosen[i] = ids[res->selected[i]];
    fill.policy = &everything;
    fill.want = &want;
    rc = pass_prefill(&fill, chosen, res->selected, res->n_selected, res, e);
    res->next_pos = res->n_selected;
    res->renumbered = true;
    res->load_ms = scan.load_ms + fill.load_ms;
    run_done(&fill);
    mem_free(chosen);
    return rc;
}

static int one_pass(struct run *proto, const uint32_t *ids, uint32_t n, struct engine_result *res,
                    struct larder_err *e)
{
    struct run r = *proto;
    int rc = pass_prefill(&r, ids, NULL, n, res, e);

    res->load_ms = r.load_ms;
    run_done(&r);
    return rc;
}

static int check_ids(const struct model_params *p, const uint32_t *ids, uint32_t n,
                     struct larder_err *e)
{
    if (!n)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty; there is nothing to prefill");
    if (n > p->n_positions)
        return larder_fail(e, LARDER_ETOOLONG,
                           "the document has %u tokens, the model only %u positions; split it", n,
                           p->n_positions);
    for (uint32_t i = 0; i < n; i++)
        if (ids[i] >= p->n_vocab)
            return larder_fail(e, LARDER_EINVAL,
                               "token %u is %u, but the vocabulary has %u entries", i, ids[i],
                               p->n_vocab);
    return 0;
}

/* The model's shares for the policy's budget, where it needs them: *ret is owned. */
static int set_shares(const struct engine_doc *doc, const struct kv_geom *g, struct policy *p,
                      double **ret, struct larder_err *e)
{
    uint32_t n_heads = g->n_layers * g->n_kv_heads;

    if (!policy_needs_profile(p))
        return 0;
    if (!doc->shares || doc->shares->n_heads != n_heads)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "a budget by shares needs the model's calibration; run larder "
                           "calibrate, or use shape=uniform, layer or global");
    *ret = mem_alloc(n_heads, sizeof **ret);
    if (!*ret)
        return no_memory(e, doc->n);
    shares_at(doc->shares, policy_rows_exact(&p->rows, doc->n) / doc->n, *ret);
    p->shares = *ret;
    return 0;
}

/* A policy as it is computed: layers resolved, shares looked up. */
struct ready {
    struct policy p;
    double *shares;
};

static int make_ready(const struct backend *b, const struct engine_doc *doc,
                      const struct policy *policy, struct ready *ret, struct larder_err *e)
{
    const struct profile_window *w = doc->shares ? &doc->shares->window : NULL;
    int rc;

    *ret = (struct ready){.p = *policy};
    rc = set_shares(doc, &b->p->geom, &ret->p, &ret->shares, e);
    return rc ? rc : policy_resolve(&ret->p, b->p->geom.n_layers, w, e);
}

static bool any_takes_rows(const struct rung_want *want, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (want[i].sink && want[i].sink->layer)
            return true;
    return false;
}

/* A pass without a replay. In two-pass policies `rows` is what passes the cut. */
static int plain(struct backend *b, const struct engine_doc *doc, struct policy *first,
                 const struct rung_want *want, uint32_t n, struct engine_result *res,
                 struct larder_err *e)
{
    struct run proto = {.b = b,
                        .p = b->p,
                        .policy = first,
                        .want = want,
                        .n_wants = any_takes_rows(want, n) ? n : 0,
                        .pass = "prefill"};
    bool two = policy_is_two_pass(first);
    int rc = policy_rows(first, &first->rows, doc->n, &proto.select, e);

    if (!rc && !two)
        rc = policy_rows(first, &first->select, doc->n, &proto.select, e);
    if (rc)
        return rc;
    if (two && proto.select >= doc->n) { /* nothing to choose */
        *first = keep_everything(first);
        two = false;
    }
    return two ? two_passes(&proto, doc->ids, doc->n, res, e)
               : one_pass(&proto, doc->ids, doc->n, res, e);
}

/* What the first of n results has of the pass itself. */
static int share_result(struct engine_result *res, uint32_t n, uint32_t n_vocab,
                        struct larder_err *e)
{
    for (uint32_t i = 1; i < n; i++) {
        res[i].load_ms = res->load_ms;
        res[i].logits = mem_dup(res->logits, n_vocab * sizeof *res->logits);
        if (!res[i].logits)
            return larder_fail(e, LARDER_ENOMEM, "no memory for %u logits", n_vocab);
    }
    return 0;
}

static int together(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                    const struct engine_sink *sink, uint32_t n, struct engine_result *res,
                    struct larder_err *e)
{
    struct rung_want *want = mem_alloc(n, sizeof *want);
    struct ready *ready = mem_zalloc(n, sizeof *ready);
    int rc = want && ready ? 0 : no_memory(e, doc->n);

    for (uint32_t i = 0; i < n && !rc; i++) {
        rc = make_ready(b, doc, &policy[i], &ready[i], e);
        want[i] = (struct rung_want){&ready[i].p, sink ? &sink[i] : NULL};
    }
    if (!rc && policy_is_replay(policy))
        rc = offline_prefill(b, doc, want, n, res, e);
    else if (!rc)
        rc = plain(b, doc, &ready->p, want, n, res, e);
    if (!rc)
        rc = share_result(res, n, b->p->n_vocab, e);
    for (uint32_t i = 0; ready && i < n; i++)
        mem_free(ready[i].shares);
    mem_free(ready);
    mem_free(want);
    return rc;
}

int engine_prefill_each(struct backend *b, const struct engine_doc *doc,
                        const struct policy *policy, const struct engine_sink *sink, uint32_t n,
                        struct engine_result *ret, struct larder_err *e)
{
    double start = pass_clock_ms();
    int rc = check_ids(b->p, doc->ids, doc->n, e);

    for (uint32_t i = 0; i < n; i++)
        ret[i] = (struct engine_result){.n_ctx = doc->n, .next_pos = doc->n, .sel_layer = -1};
    for (uint32_t i = 1; i < n && !rc; i++)
        if (!policy_same_pass(&policy[0], &policy[i]))
            rc = larder_fail(e, LARDER_EINVAL,
                             "policies that do not share a pass cannot be prefilled together");
    if (!rc && n == 1 && policy->rows.kind == ROWS_AUTO)
        rc = ladder_prefill(b, doc, policy, sink, ret, e);
    else if (!rc)
        rc = together(b, doc, policy, sink, n, ret, e);
    for (uint32_t i = 0; i < n; i++) {
        if (rc)
            engine_result_done(&ret[i]);
        else
            ret[i].prefill_ms = pass_clock_ms() - start;
    }
    return rc;
}

int engine_prefill(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                   const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e)
{
    return engine_prefill_each(b, doc, policy, sink, 1, ret, e);
}

void engine_result_done(struct engine_result *r)
{
    if (!r)
        return;
    mem_free(r->trace);
    mem_free(r->selected);
    mem_free(r->logits);
    *r = (struct engine_result){.sel_layer = -1};
}
