/* offline.c - document, replay and probes through the layers side by side.
 *
 * The one idea: one list of rows, the document's first, then the replay's, then the probes',
 * once for the full cache and once for each way of keeping (rung.h). A layer projects and
 * finishes all of them in one call; document rows attend among themselves, the others to the
 * document and causally to their own part. What the replay asks of this layer is then known,
 * each rung chooses and refits its rows, and its copy of the probes attends to those. Then the
 * layer is done with: no cache of all layers ever exists. */
#include "offline.h"

#include <math.h>
#include <string.h>

#include "match.h"
#include "mem.h"
#include "observe.h"
#include "pass.h"
#include "pick.h"
#include "recall.h"
#include "ref.h"
#include "replay.h"
#include "rung.h"
#include "select_ops.h"

/* Document rows that are fitted together: the fit's cost then grows with the document and not
 * with its cube, and its matrices stay below 20 MiB. Documents up to half as long again are
 * fitted whole. */
#define MATCH_SPAN 1024u

struct run {
    struct backend *b;
    const struct model_params *p;
    const struct engine_doc *doc;
    enum obs_kind obs;
    const struct engine_sink *sink; /* whose progress() is asked */
    struct rung *rung;
    uint32_t n_rungs;
    struct replay *replay;
    struct match *match;    /* NULL: nothing is fitted */
    struct probes *probes;  /* NULL: nothing is certified */
    uint32_t n, n_all;      /* rows of the document; of everything */
    uint32_t at_full;       /* first row of the probes on the full cache */
    struct past_rows *past; /* [n_kv_heads], of this layer */
    uint64_t stride;
    float *hidden;
    uint32_t *pos;
    void *q, *k, *v, *o;
    float *replayed; /* [n_kv_heads][n], replay scores */
    double *score;   /* the same, or those of the match; it stays with a backend that chooses */
    struct replay_part *part; /* [n_chunks], for such a backend */
    float *worth;             /* [n_heads][n], replay+: what a row's value adds, or NULL */
    float *length;            /* [replay rows], replay+: 1 / length of the layer's input, or NULL */
    double load_ms;
    const struct offline_watch *watch; /* scores are all that is wanted */
};

/* ---- buffers */

static void run_done(struct run *r)
{
    rungs_close(r->rung, r->n_rungs);
    replay_free(r->replay);
    match_close(r->match);
    probes_free(r->probes);
    mem_free(r->past);
    backend_buffer_free(r->b, r->hidden);
    mem_free(r->pos);
    backend_buffer_free(r->b, r->q);
    backend_buffer_free(r->b, r->k);
    backend_buffer_free(r->b, r->v);
    backend_buffer_free(r->b, r->o);
    mem_free(r->replayed);
    backend_buffer_free(r->b, r->score);
    mem_free(r->part);
    mem_free(r->worth);
    mem_free(r->length);
}

static bool alloc(struct run *r)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t per_head = r->stride * kv_dtype_bytes(r->b->elem) * g->head_dim;
    uint64_t kept = (uint64_t)g->n_kv_heads * r->n;

    r->hidden = backend_buffer_new(r->b, (uint64_t)r->n_all * r->p->n_hidden, sizeof *r->hidden);
    r->pos = mem_alloc(r->n_all, sizeof *r->pos);
    r->past = mem_alloc(g->n_kv_heads, sizeof *r->past);
    r->q = backend_buffer_new(r->b, g->n_heads, per_head);
    r->k = backend_buffer_new(r->b, g->n_kv_heads, per_head);
    r->v = backend_buffer_new(r->b, g->n_kv_heads, per_head);
    r->o = backend_buffer_new(r->b, g->n_heads, per_head);
    r->replayed = mem_alloc(kept, sizeof *r->replayed);
    r->score = backend_buffer_new(r->b, kept, sizeof *r->score);
    r->part = mem_alloc(r->replay->n_chunks, sizeof *r->part);
    if (r->obs == OBS_REPLAY_PLUS) {
        r->worth = mem_alloc((uint64_t)g->n_heads * r->n, sizeof *r->worth);
        r->length = mem_alloc(r->n_all, sizeof *r->length);
        if (!r->worth || !r->length)
            return false;
    }
    return r->hidden && r->pos && r->past && r->q && r->k && r->v && r->o && r->replayed &&
           r->score && r->part;
}

/* n rows at the end of the list. */
static int embed(struct run *r, const uint32_t *ids, const uint32_t *pos, uint32_t n,
                 struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < n && !rc; i++, r->n_all++) {
        r->pos[r->n_all] = pos ? pos[i] : i;
        rc = model_read_f32(r->b->model, 0, MODEL_EMBED, ids[i], 1,
                            r->hidden + (uint64_t)r->n_all * r->p->n_hidden, e);
    }
    return rc;
}

static int embed_all(struct run *r, struct larder_err *e)
{
    const struct probes *p = r->probes;
    int rc;

    r->n_all = 0;
    rc = backend_view(r->b, r->hidden, VIEW_WRITE, e);
    if (!rc)
        rc = embed(r, r->doc->ids, NULL, r->n, e);
    if (!rc)
        rc = embed(r, r->replay->ids, r->replay->pos, r->replay->n_rows, e);
    r->at_full = r->n_all;
    if (!rc && p)
        rc = embed(r, p->ids, p->pos, p->n_rows, e);
    for (uint32_t i = 0; i < r->n_rungs && p && !rc; i++) {
        r->rung[i].probes = r->n_all;
        rc = embed(r, p->ids, p->pos, p->n_rows, e);
    }
    return rc;
}

/* Rows that are chosen only at the end cannot be asked layer by layer. */
static bool can_certify(const struct run *r)
{
    for (uint32_t i = 0; i < r->n_rungs; i++)
        if (keep_waits(&r->rung[i].keep))
            return false;
    return r->n_rungs;
}

static bool any_fits(const struct run *r)
{
    for (uint32_t i = 0; i < r->n_rungs; i++)
        if (rung_fits(&r->rung[i]))
            return true;
    return false;
}

/* Does any go by the replay's own scores? */
static bool any_is_plain(const struct run *r)
{
    for (uint32_t i = 0; i < r->n_rungs; i++)
        if (!rung_fits(&r->rung[i]) && r->rung[i].keep.n_room)
            return true;
    return r->watch;
}

static int plan(struct run *r, uint32_t chunk, uint32_t percent, struct larder_err *e)
{
    bool *chosen;
    int rc = replay_plan(&r->replay, r->b->model, r->doc->tmpl, r->doc->ids, r->n, chunk, e);

    if (rc || percent == 100)
        return rc;
    chosen = mem_alloc(r->n, sizeof *chosen);
    if (!chosen)
        return larder_fail(e, LARDER_ENOMEM, "no memory to choose among %u tokens", r->n);
    rc = pick_tokens(r->b, r->doc, r->replay, percent, r->sink, chosen, e);
    if (!rc)
        replay_thin(r->replay, r->doc->ids, chosen);
    mem_free(chosen);
    return rc;
}

/* All that is repeated and quoted stands behind the document at once. */
static int check_reach(const struct run *r, struct larder_err *e)
{
    uint32_t after = r->probes ? r->probes->n_rows : 0, sliding = model_narrowest(r->p);

    after = r->replay->max_rows > after ? r->replay->max_rows : after;
    if (!r->watch)
        return engine_check_windows(r->p, r->rung[0].policy, (uint64_t)r->n + after, e);
    if (!sliding || (uint64_t)r->n + after <= sliding)
        return 0;
    return larder_fail(e, LARDER_EUNSUPPORTED,
                       "%u tokens and %u that repeat them, and layers of the model see only %u "
                       "positions back; 'larder calibrate' takes shorter texts (--no-builtin), and "
                       "snapkv, keydiff and full need no profile",
                       r->n, after, sliding);
}

static int run_init(struct run *r, uint32_t chunk, uint32_t percent, struct larder_err *e)
{
    int rc = plan(r, chunk, percent, e);

    if (!rc && can_certify(r))
        rc = probes_make(&r->probes, r->b->model, r->doc->tmpl, r->doc->ids,
                         r->replay->chunk[0].start, r->n, e);
    if (!rc && any_fits(r))
        rc = match_open(&r->match, r->b, r->replay, MATCH_SPAN, e);
    if (rc)
        return rc;
    rc = check_reach(r, e);
    if (rc)
        return rc;
    r->n_all = r->n + r->replay->n_rows + (r->probes ? (1 + r->n_rungs) * r->probes->n_rows : 0);
    r->stride = (r->n_all + 15ull) / 16 * 16;
    if (!alloc(r))
        return larder_fail(e, LARDER_ENOMEM, "no memory to prefill and replay %u tokens", r->n);
    return embed_all(r, e);
}

/* ---- one layer forward */

static void *at_row(const struct run *r, void *x, uint64_t row, uint64_t width)
{
    return (uint8_t *)x + row * width * kv_dtype_bytes(r->b->elem);
}

static int attend_document(struct run *r, uint32_t row0, struct larder_err *e)
{
    /* no layer slides here: check_reach() */
    struct attend a = {r->q, r->k, r->v, r->n, row0, (uint32_t)r->stride, r->o, 0};

    return r->b->ops->attend(r->b, &a, e);
}

/* Rows at .. at + n: to `past`, and causally to each other. */
static int attend_part(struct run *r, uint64_t at, uint32_t n, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    struct resume x = {
        .q = at_row(r, r->q, at, g->head_dim),
        .k = at_row(r, r->k, at, g->head_dim),
        .v = at_row(r, r->v, at, g->head_dim),
        .n_new = n,
        .n_tail = n,
        .q_stride = (uint32_t)r->stride,
        .stride = (uint32_t)r->stride,
        .past = r->past,
        .o = at_row(r, r->o, at, (uint64_t)g->n_heads * g->head_dim),
    };

    return r->b->ops->resume(r->b, &x, e);
}

static int attend_probes(struct run *r, uint32_t first, struct larder_err *e)
{
    return r->probes ? attend_part(r, first, r->probes->n_rows, e) : 0;
}

/* Everything but the document's rows. Those of the replay are not needed behind the last layer. */
static int attend_others(struct run *r, bool last, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    int rc = 0;

    for (uint32_t h = 0; h < g->n_kv_heads; h++)
        r->past[h] = (struct past_rows){r->n,
                                        r->b->elem,
                                        at_row(r, r->k, h * r->stride, g->head_dim),
                                        at_row(r, r->v, h * r->stride, g->head_dim),
                                        NULL,
                                        r->pos};
    for (uint32_t i = 0; i < r->replay->n_chunks && !last && !rc; i++)
        rc = attend_part(r, r->n + (uint64_t)r->replay->chunk[i].first, r->replay->chunk[i].n, e);
    if (!rc)
        rc = attend_probes(r, r->at_full, e);
    for (uint32_t i = 0; i < r->n_rungs && r->probes && !rc; i++) {
        rung_past(&r->rung[i], r->past);
        rc = attend_probes(r, r->rung[i].probes, e);
    }
    return rc;
}

static int finish(struct run *r, const struct layer *l, uint32_t row, uint32_t n,
                  struct larder_err *e)
{
    uint64_t width = (uint64_t)r->p->geom.n_heads * r->p->geom.head_dim;

    return n ? r->b->ops->finish(r->b, l, r->hidden + (uint64_t)row * r->p->n_hidden,
                                 at_row(r, r->o, row, width), n, e)
             : 0;
}

/* What was chosen, which a backend may have sent while the document's rows attend. */
static int deliver(struct run *r, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        rc = rung_deliver(&r->rung[i], e);
    return rc;
}

static int advance(struct run *r, const struct layer *l, bool last, struct larder_err *e)
{
    int rc = attend_document(r, last ? r->n - 1 : 0, e);

    if (!rc)
        rc = deliver(r, e);
    if (!rc)
        rc = attend_others(r, last, e);
    if (!rc && !last)
        return finish(r, l, 0, r->n_all, e);
    if (!rc)
        rc = finish(r, l, r->n - 1, 1, e);
    return rc ? rc : finish(r, l, r->at_full, r->n_all - r->at_full, e);
}

/* ---- scores */

/* replay+: what each row's value adds to the output, and how long the inputs of the replay
 * rows are after the norm (KVzip+). */
static int weigh(struct run *r, uint32_t layer, struct larder_err *e)
{
    const struct model_params *p = r->p;
    struct layer_view x = {.b = r->b,
                           .layer = layer,
                           .n = r->n,
                           .n_ctx = r->n,
                           .stride = (uint32_t)r->stride,
                           .pos = r->pos,
                           .hidden = r->hidden,
                           .q = r->q,
                           .k = r->k,
                           .v = r->v};
    uint64_t n = (uint64_t)p->geom.n_heads * r->n;
    double *out = mem_alloc(n, sizeof *out);
    float *norm = mem_alloc(2ull * p->n_hidden, sizeof *norm);
    int rc = out && norm ? observe_outputs(&x, 2, out, e)
                         : larder_fail(e, LARDER_ENOMEM, "no memory to weigh rows");

    if (!rc)
        rc = backend_view(r->b, r->hidden, VIEW_READ, e);
    if (!rc)
        rc = model_read_f32(r->b->model, layer, MODEL_ATTN_NORM, 0, 1, norm, e);
    for (uint64_t i = 0; i < n && !rc; i++)
        r->worth[i] = (float)out[i];
    for (uint32_t i = 0; i < r->replay->n_rows && !rc; i++) {
        float *y = norm + p->n_hidden;
        double sum = 0;

        ref_rmsnorm(r->hidden + (r->n + (uint64_t)i) * p->n_hidden, norm, p->n_hidden, p->norm_eps,
                    y);
        for (uint32_t c = 0; c < p->n_hidden; c++)
            sum += (double)y[c] * y[c];
        r->length[i] = (float)(1 / sqrt(sum));
    }
    mem_free(out);
    mem_free(norm);
    return rc;
}

/* Scores of the host to where rungs choose by them. */
static int set_scores(struct run *r, const float *score, struct larder_err *e)
{
    uint64_t n = (uint64_t)r->p->geom.n_kv_heads * r->n;
    int rc = backend_view(r->b, r->score, VIEW_WRITE, e);

    for (uint64_t i = 0; i < n && !rc; i++)
        r->score[i] = score[i];
    return rc;
}

/* Rungs that choose by r->score, or, if it is not `scored`, take all. */
static int choose_rows(struct run *r, uint32_t layer, bool scored, bool fits, struct larder_err *e)
{
    struct layer_rows x = {.layer = layer,
                           .n = r->n,
                           .stride = (uint32_t)r->stride,
                           .position = r->pos,
                           .k = r->k,
                           .v = r->v,
                           .score = scored ? r->score : NULL};
    int rc = 0;

    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        if (rung_fits(&r->rung[i]) == fits)
            rc = rung_choose(&r->rung[i], &x, r->match, e);
    return rc;
}

/* Where the keys are. */
static int score_there(struct run *r, const struct replay_rows *x, struct larder_err *e)
{
    struct replay_ask a = {.q = x->q,
                           .k = x->k,
                           .stride = (uint32_t)x->stride,
                           .n_doc = r->n,
                           .part = r->part,
                           .n_parts = r->replay->n_chunks,
                           .worth = x->worth,
                           .length = x->length,
                           .score = r->score};

    for (uint32_t i = 0; i < a.n_parts; i++) {
        const struct replay_chunk *c = &r->replay->chunk[i];

        r->part[i] = (struct replay_part){c->start, c->end - c->start, c->first, c->n};
    }
    return r->b->ops->select->replay(r->b, &a, e);
}

/* Scores of a backend's for who watches. */
static int get_scores(struct run *r, struct larder_err *e)
{
    uint64_t n = (uint64_t)r->p->geom.n_kv_heads * r->n;
    int rc = backend_view(r->b, r->score, VIEW_READ, e);

    for (uint64_t i = 0; i < n && !rc; i++) {
        r->replayed[i] = (float)r->score[i];
        if (!isfinite(r->replayed[i]))
            rc = larder_fail(e, LARDER_ENUMERIC, "a replay score is not finite; nothing was kept");
    }
    return rc;
}

/* The replay's own scores. */
static int score_replay(struct run *r, const struct replay_rows *x, struct larder_err *e)
{
    int rc;

    if (r->b->ops->select) {
        rc = score_there(r, x, e);
        return rc || !r->watch ? rc : get_scores(r, e);
    }
    rc = replay_score(r->b, r->replay, x, r->replayed, e);
    return rc ? rc : set_scores(r, r->replayed, e);
}

static int observe(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct replay_rows x = {r->q, r->k, r->stride, r->worth, r->length};
    bool plain = any_is_plain(r);
    int rc = r->worth ? weigh(r, layer, e) : 0;

    if (!rc && plain)
        rc = score_replay(r, &x, e);
    if (!rc)
        rc = choose_rows(r, layer, plain, false, e);
    if (!rc && r->watch)
        rc = r->watch->layer(r->watch->arg, layer, r->replayed, e);
    if (!rc && r->match)
        rc = match_layer(r->match, &x, r->v, r->score, e);
    if (!rc && r->match)
        rc = choose_rows(r, layer, true, true, e);
    return rc;
}

static int run_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct layer *l = NULL;
    struct project p = {.hidden = r->hidden,
                        .pos = r->pos,
                        .rope = model_rope(r->p, r->n),
                        .n = r->n_all,
                        .stride = (uint32_t)r->stride,
                        .q = r->q,
                        .k = r->k,
                        .v = r->v};
    int rc = pass_progress(r->sink, "prefill", layer, r->p->geom.n_layers, e);

    if (!rc)
        rc = pass_load_layer(r->b, layer, &l, &r->load_ms, e);
    if (!rc)
        rc = r->b->ops->qkv(r->b, l, &p, e);
    if (!rc)
        rc = observe(r, layer, e);
    if (!rc)
        rc = advance(r, l, layer + 1 == r->p->geom.n_layers, e);
    r->b->ops->layer_free(r->b, l);
    return rc;
}

/* ---- certificates */

#define AT_ONCE 8u /* probes whose logits are made together */

/* Hidden states of the scored rows of probes first..first + n, PROBE_QUOTE each, of the copy that
 * begins at row `copy`. */
static int probe_rows(const struct run *r, uint32_t first, uint32_t n, uint32_t copy, float *to,
                      struct larder_err *e)
{
    uint32_t index[AT_ONCE * PROBE_QUOTE], n_rows = n * PROBE_QUOTE;
    uint64_t width = r->p->n_hidden;
    struct gather g = {.from = r->hidden,
                       .stride = r->n_all,
                       .n_heads = 1,
                       .row_bytes = (uint32_t)(width * sizeof *to),
                       .count = &n_rows,
                       .index = index,
                       .to = to};

    for (uint32_t i = 0; i < n_rows; i++)
        index[i] = copy + r->probes->probe[first + i / PROBE_QUOTE].scored + i % PROBE_QUOTE;
    if (r->b->ops->select)
        return r->b->ops->select->gather(r->b, &g, e);
    for (uint32_t i = 0; i < n_rows; i++)
        memcpy(to + i * width, r->hidden + index[i] * width, width * sizeof *to);
    return 0;
}

/* Logits [PROBE_QUOTE][n_vocab] of probes first..first + n, on the cache whose copy begins at
 * row `copy`. Each call reads the output matrix: a few probes at a time, for logits are wide. */
static int probe_logits(const struct run *r, uint32_t first, uint32_t n, uint32_t copy,
                        float *hidden, float *logits, struct larder_err *e)
{
    int rc = probe_rows(r, first, n, copy, hidden, e);

    return rc ? rc : r->b->ops->logits(r->b, NULL, hidden, n * PROBE_QUOTE, logits, e);
}

static int certify_some(struct run *r, uint32_t first, uint32_t n, float *hidden, float *full,
                        float *kept, struct larder_err *e)
{
    uint64_t width = PROBE_QUOTE * (uint64_t)r->p->n_vocab;
    int rc = probe_logits(r, first, n, r->at_full, hidden, full, e);

    for (uint32_t k = 0; k < n && !rc; k++)
        certificate_reference(full + k * width, (uint32_t)r->p->n_vocab);
    for (uint32_t i = 0; i < r->n_rungs && !rc; i++) {
        rc = probe_logits(r, first, n, r->rung[i].probes, hidden, kept, e);
        for (uint32_t k = 0; k < n && !rc; k++)
            certificate_add(&r->rung[i].certificate, &r->probes->probe[first + k], full + k * width,
                            kept + k * width, (uint32_t)r->p->n_vocab);
    }
    return rc;
}

static int certify(struct run *r, struct larder_err *e)
{
    uint64_t n_rows = AT_ONCE * PROBE_QUOTE, n_vocab = r->p->n_vocab;
    float *hidden = backend_buffer_new(r->b, n_rows * r->p->n_hidden, sizeof *hidden);
    float *full = mem_aligned(n_rows * n_vocab, sizeof *full);
    float *kept = mem_aligned(n_rows * n_vocab, sizeof *kept);
    int rc = hidden && full && kept
                 ? 0
                 : larder_fail(e, LARDER_ENOMEM, "no memory for the probes' logits");

    for (uint32_t i = 0; i < r->probes->n && !rc; i += AT_ONCE)
        rc = certify_some(r, i, r->probes->n - i < AT_ONCE ? r->probes->n - i : AT_ONCE, hidden,
                          full, kept, e);
    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        if (!isfinite(r->rung[i].certificate.kl))
            rc = larder_fail(e, LARDER_ENUMERIC, "the certificate is not finite; nothing was kept");
    backend_buffer_free(r->b, hidden);
    mem_free(full);
    mem_free(kept);
    return rc;
}

/* ---- the whole thing */

static int run_layers(struct run *r, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t l = 0; l < r->p->geom.n_layers && !rc; l++)
        rc = run_layer(r, l, e);
    return rc;
}

static int take_results(struct run *r, struct engine_result *ret, struct larder_err *e)
{
    float *logits = NULL;
    int rc = pass_logits(r->b, r->hidden + (uint64_t)(r->n - 1) * r->p->n_hidden, &logits,
                         &r->load_ms, e);

    for (uint32_t i = 0; i < r->n_rungs && !rc; i++)
        ret[i] = (struct engine_result){.n_ctx = r->n,
                                        .next_pos = r->n,
                                        .sel_layer = -1,
                                        .certificate = r->rung[i].certificate,
                                        .load_ms = r->load_ms};
    ret->logits = logits;
    return rc;
}

int offline_prefill(struct backend *b, const struct engine_doc *doc, const struct rung_want *want,
                    uint32_t n_wants, struct engine_result *ret, struct larder_err *e)
{
    const struct policy *p = want[0].policy;
    struct run r = {
        .b = b, .p = b->p, .doc = doc, .obs = p->obs, .sink = want[0].sink, .n = doc->n};
    int rc = rungs_open(&r.rung, &r.n_rungs, b, want, n_wants, doc->n, e);

    if (!rc)
        rc = run_init(&r, p->chunk, p->replay, e);
    if (!rc)
        rc = run_layers(&r, e);
    for (uint32_t i = 0; i < n_wants && !rc; i++)
        rc = rung_end(&r.rung[i], e);
    if (!rc && r.probes)
        rc = certify(&r, e);
    if (!rc)
        rc = take_results(&r, ret, e);
    run_done(&r);
    return rc;
}

int offline_scores(struct backend *b, const struct engine_doc *doc, uint32_t chunk,
                   const struct offline_watch *watch, struct larder_err *e)
{
    struct engine_sink sink = {watch->arg, NULL, watch->progress};
    struct run r = {.b = b,
                    .p = b->p,
                    .doc = doc,
                    .obs = OBS_REPLAY,
                    .sink = &sink,
                    .n = doc->n,
                    .watch = watch};
    int rc = run_init(&r, chunk, 100, e);

    if (!rc)
        rc = run_layers(&r, e);
    run_done(&r);
    return rc;
}
