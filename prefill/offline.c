/* offline.c - document, replay and probes through the layers side by side.
 *
 * The one idea: one list of rows, the document's first, then the replay's, then each probe's
 * twice. A layer projects and finishes all of them in one call; document rows attend among
 * themselves, the others to the document and causally to their own part. What the replay asks
 * of this layer is then known, its rows are chosen and refitted, and the probes' second copy
 * attends to those. Then the layer is done with: no cache of all layers ever exists. */
#include "offline.h"

#include <math.h>
#include <string.h>

#include "half.h"
#include "hold.h"
#include "keep.h"
#include "match.h"
#include "mem.h"
#include "observe.h"
#include "pack.h"
#include "pass.h"
#include "recall.h"
#include "replay.h"
#include "ref.h"

/* Document rows that are fitted together: the fit's cost then grows with the document and not
 * with its cube, and its matrices stay below 20 MiB. Documents up to half as long again are
 * fitted whole. */
#define MATCH_SPAN 1024u

struct run {
    struct backend *b;
    const struct model_params *p;
    const struct engine_doc *doc;
    const struct policy *policy;
    const struct engine_sink *sink;
    struct replay *replay;
    struct match *match;       /* NULL: nothing is fitted */
    struct probes *probes;     /* NULL: nothing is certified */
    uint32_t n, n_all;         /* rows of the document; of everything */
    uint32_t at_full, at_kept; /* first row of the probes on the full cache; on the kept rows */
    struct past_rows *past;    /* [n_kv_heads], of this layer */
    uint64_t stride;
    float *hidden;
    uint32_t *pos;
    void *q, *k, *v, *o;
    float *replayed; /* [n_kv_heads][n], replay scores */
    double *score;   /* the same, or those of the match */
    float *worth;    /* [n_heads][n], replay+: what a row's value adds, or NULL */
    float *length;   /* [replay rows], replay+: 1 / length of the layer's input, or NULL */
    struct keep keep;
    struct packer packer;
    struct hold hold;     /* shape=global: rows of all layers */
    float *fit_k, *fit_v; /* [n_kv_heads][n][head_dim], where rows are fitted */
    float *bias;          /* [n_kv_heads][n] */
    double load_ms;
    const struct offline_watch *watch; /* scores are all that is wanted */
};

/* ---- buffers */

static void run_done(struct run *r)
{
    replay_free(r->replay);
    match_close(r->match);
    probes_free(r->probes);
    mem_free(r->past);
    mem_free(r->hidden);
    mem_free(r->pos);
    mem_free(r->q);
    mem_free(r->k);
    mem_free(r->v);
    mem_free(r->o);
    mem_free(r->replayed);
    mem_free(r->score);
    mem_free(r->worth);
    mem_free(r->length);
    keep_done(&r->keep);
    hold_done(&r->hold);
    packer_done(&r->packer);
    mem_free(r->fit_k);
    mem_free(r->fit_v);
    mem_free(r->bias);
}

static bool alloc(struct run *r)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t per_head = r->stride * kv_dtype_bytes(r->b->elem) * g->head_dim;
    uint64_t kept = (uint64_t)g->n_kv_heads * r->n;

    r->hidden = mem_aligned((uint64_t)r->n_all * r->p->n_hidden, sizeof *r->hidden);
    r->pos = mem_alloc(r->n_all, sizeof *r->pos);
    r->past = mem_alloc(g->n_kv_heads, sizeof *r->past);
    r->q = mem_aligned(g->n_heads, per_head);
    r->k = mem_aligned(g->n_kv_heads, per_head);
    r->v = mem_aligned(g->n_kv_heads, per_head);
    r->o = mem_aligned(g->n_heads, per_head);
    r->replayed = mem_alloc(kept, sizeof *r->replayed);
    r->score = mem_alloc(kept, sizeof *r->score);
    if (r->policy->obs == OBS_REPLAY_PLUS) {
        r->worth = mem_alloc((uint64_t)g->n_heads * r->n, sizeof *r->worth);
        r->length = mem_alloc(r->n_all, sizeof *r->length);
        if (!r->worth || !r->length)
            return false;
    }
    return r->hidden && r->pos && r->past && r->q && r->k && r->v && r->o && r->replayed &&
           r->score;
}

static bool alloc_fit(struct run *r)
{
    uint64_t kept = (uint64_t)r->p->geom.n_kv_heads * r->n;

    r->fit_k = mem_alloc(kept, r->p->geom.head_dim * sizeof *r->fit_k);
    r->fit_v = mem_alloc(kept, r->p->geom.head_dim * sizeof *r->fit_v);
    r->bias = mem_alloc(kept, sizeof *r->bias);
    return r->fit_k && r->fit_v && r->bias;
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
    rc = embed(r, r->doc->ids, NULL, r->n, e);
    if (!rc)
        rc = embed(r, r->replay->ids, r->replay->pos, r->replay->n_rows, e);
    r->at_full = r->n_all;
    if (!rc && p)
        rc = embed(r, p->ids, p->pos, p->n_rows, e);
    r->at_kept = r->n_all;
    if (!rc && p)
        rc = embed(r, p->ids, p->pos, p->n_rows, e);
    return rc;
}

static int run_init(struct run *r, uint32_t chunk, struct larder_err *e)
{
    int rc = replay_plan(&r->replay, r->b->model, r->doc->tmpl, r->doc->ids, r->n, chunk, e);

    /* rows that are chosen only at the end cannot be asked layer by layer */
    if (!rc && !r->watch && !keep_waits(&r->keep))
        rc = probes_make(&r->probes, r->b->model, r->doc->tmpl, r->doc->ids, r->n, e);
    if (rc)
        return rc;
    r->n_all = r->n + r->replay->n_rows + (r->probes ? 2 * r->probes->n_rows : 0);
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
    struct attend a = {r->q, r->k, r->v, r->n, row0, (uint32_t)r->stride, r->o};

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
    int rc = 0;

    for (uint32_t i = 0; r->probes && i < r->probes->n && !rc; i++)
        rc = attend_part(r, first + r->probes->probe[i].first, r->probes->probe[i].n, e);
    return rc;
}

/* Everything but the document's rows. Those of the replay are not needed behind the last layer. */
static int attend_others(struct run *r, bool last, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    int rc = 0;

    for (uint32_t h = 0; h < g->n_kv_heads; h++)
        r->past[h] =
            (struct past_rows){r->n, r->b->elem, at_row(r, r->k, h * r->stride, g->head_dim),
                               at_row(r, r->v, h * r->stride, g->head_dim), NULL};
    for (uint32_t i = 0; i < r->replay->n_chunks && !last && !rc; i++)
        rc = attend_part(r, r->n + (uint64_t)r->replay->chunk[i].first, r->replay->chunk[i].n, e);
    if (!rc)
        rc = attend_probes(r, r->at_full, e);
    for (uint32_t h = 0; r->probes && h < g->n_kv_heads; h++) {
        const struct kept_rows *k = &r->keep.heads[h];

        r->past[h] = (struct past_rows){k->n_rows, k->dtype, k->k, k->v, k->bias};
    }
    return rc ? rc : attend_probes(r, r->at_kept, e);
}

static int finish(struct run *r, const struct layer *l, uint32_t row, uint32_t n,
                  struct larder_err *e)
{
    uint64_t width = (uint64_t)r->p->geom.n_heads * r->p->geom.head_dim;

    return n ? r->b->ops->finish(r->b, l, r->hidden + (uint64_t)row * r->p->n_hidden,
                                 at_row(r, r->o, row, width), n, e)
             : 0;
}

static int advance(struct run *r, const struct layer *l, bool last, struct larder_err *e)
{
    int rc = attend_document(r, last ? r->n - 1 : 0, e);

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

static int score_rows(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct replay_rows x = {r->q, r->k, r->stride, NULL, NULL};
    const float *score = r->replayed;
    uint64_t n = (uint64_t)r->p->geom.n_kv_heads * r->n;
    int rc = 0;

    if (r->worth) {
        rc = weigh(r, layer, e);
        x.worth = r->worth;
        x.length = r->length;
    }
    if (!rc && r->match)
        rc = match_layer(r->match, &x, r->v, &score, e);
    else if (!rc)
        rc = replay_score(r->b, r->replay, &x, r->replayed, e);
    for (uint64_t i = 0; i < n && !rc; i++)
        r->score[i] = score[i];
    if (!rc && r->watch)
        rc = r->watch->layer(r->watch->arg, layer, r->replayed, e);
    return rc;
}

/* ---- rows */

static void widen(const struct kept_rows *h, uint64_t n, float *k, float *v)
{
    for (uint64_t i = 0; i < n; i++) {
        bool f32 = h->dtype == KV_F32;

        k[i] = f32 ? ((const float *)h->k)[i] : bf16_to_f32(((const uint16_t *)h->k)[i]);
        v[i] = f32 ? ((const float *)h->v)[i] : bf16_to_f32(((const uint16_t *)h->v)[i]);
    }
}

/* Refit the rows of one head where they stand for the dropped ones. */
static int refit(struct run *r, uint32_t head, struct larder_err *e)
{
    struct kept_rows *h = &r->keep.heads[head];
    uint64_t at = (uint64_t)head * r->n, d = r->p->geom.head_dim;
    float *k = r->fit_k + at * d, *v = r->fit_v + at * d;

    widen(h, h->n_rows * d, k, v);
    h->k = k;
    h->v = v;
    h->dtype = KV_F32;
    h->bias = r->policy->fit == FIT_MATCHING ? r->bias + at : NULL;
    return match_fit(r->match, head, h->position, h->n_rows, v, r->bias + at, e);
}

static int deliver(struct run *r, uint32_t layer, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t g = 0; g < r->p->geom.n_kv_heads && r->match && !rc; g++)
        rc = refit(r, g, e);
    if (!rc)
        rc = packer_layer(&r->packer, &r->p->geom, r->policy->precision, r->keep.heads, e);
    if (!rc && r->sink && r->sink->layer)
        rc = r->sink->layer(r->sink->arg, layer, r->keep.heads, e);
    return rc;
}

static int observe(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct layer_rows x = {.layer = layer,
                           .n = r->n,
                           .stride = (uint32_t)r->stride,
                           .position = r->pos,
                           .k = r->k,
                           .v = r->v,
                           .score = r->score};
    int rc = score_rows(r, layer, e);

    if (rc || r->watch)
        return rc;
    if (keep_waits(&r->keep))
        return hold_add(&r->hold, &x, e);
    rc = keep_layer(&r->keep, &x, e);
    return rc ? rc : deliver(r, layer, e);
}

static int deliver_held(struct run *r, struct larder_err *e)
{
    int rc;

    if (!keep_waits(&r->keep))
        return 0;
    rc = keep_count_all(&r->keep, r->hold.layers, e);
    for (uint32_t l = 0; l < r->p->geom.n_layers && !rc; l++) {
        rc = keep_layer(&r->keep, &r->hold.layers[l], e);
        if (!rc)
            rc = deliver(r, l, e);
    }
    return rc;
}

static int run_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct layer *l = NULL;
    int rc = pass_progress(r->sink, "prefill", layer, r->p->geom.n_layers, e);

    if (!rc)
        rc = pass_load_layer(r->b, layer, &l, &r->load_ms, e);
    if (!rc)
        rc = r->b->ops->qkv(r->b, l, r->hidden, r->pos, r->n_all, (uint32_t)r->stride, r->q, r->k,
                            r->v, e);
    if (!rc)
        rc = observe(r, layer, e);
    if (!rc)
        rc = advance(r, l, layer + 1 == r->p->geom.n_layers, e);
    r->b->ops->layer_free(r->b, l);
    return rc;
}

/* ---- the certificate */

static void probe_rows(const struct run *r, const struct probe *p, uint32_t first, float *to)
{
    uint64_t n = r->p->n_hidden;

    memcpy(to, r->hidden + (first + (uint64_t)p->first + p->scored) * n,
           PROBE_QUOTE * n * sizeof *to);
}

/* A few probes at a time: logits are wide, and each call reads the output matrix again. */
static int certify(struct run *r, struct certificate *c, struct larder_err *e)
{
    enum { AT_ONCE = 4, ROWS = PROBE_QUOTE };
    uint64_t n_hidden = r->p->n_hidden, n_vocab = r->p->n_vocab;
    float *h = mem_aligned(2 * AT_ONCE * ROWS * n_hidden, sizeof *h);
    float *x = mem_aligned(2 * AT_ONCE * ROWS * n_vocab, sizeof *x);
    int rc = h && x ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the probes' logits");

    for (uint32_t i = 0; r->probes && i < r->probes->n && !rc; i += AT_ONCE) {
        uint32_t n = r->probes->n - i < AT_ONCE ? r->probes->n - i : AT_ONCE;

        for (uint32_t k = 0; k < n; k++) {
            probe_rows(r, &r->probes->probe[i + k], r->at_full, h + 2 * k * ROWS * n_hidden);
            probe_rows(r, &r->probes->probe[i + k], r->at_kept, h + (2 * k + 1) * ROWS * n_hidden);
        }
        rc = r->b->ops->logits(r->b, NULL, h, 2 * n * ROWS, x, e);
        for (uint32_t k = 0; k < n && !rc; k++)
            certificate_add(c, &r->probes->probe[i + k], x + 2 * k * ROWS * n_vocab,
                            x + (2 * k + 1) * ROWS * n_vocab, (uint32_t)n_vocab);
    }
    if (!rc && c->n_probes && !isfinite(c->kl))
        rc = larder_fail(e, LARDER_ENUMERIC, "the certificate is not finite; nothing was kept");
    mem_free(h);
    mem_free(x);
    return rc;
}

/* ---- the whole thing */

static int open_keep(struct run *r, struct larder_err *e)
{
    uint32_t rows;
    int rc = policy_rows(r->policy, &r->policy->rows, r->n, &rows, e);

    if (!rc)
        rc = keep_init(&r->keep, r->policy, &r->p->geom, r->b->elem, r->n, rows, e);
    if (!rc && keep_waits(&r->keep))
        rc = hold_init(&r->hold, &r->p->geom, r->b->elem, e);
    return rc;
}

static int open_match(struct run *r, struct larder_err *e)
{
    struct match_opts o = {r->policy->precision, r->policy->fit == FIT_MATCHING, MATCH_SPAN};

    if (r->policy->fit == FIT_NONE)
        return 0;
    if (keep_waits(&r->keep))
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: fit needs a layer's rows while its queries are there, and "
                           "shape=global knows them only at the end; use shape=shares");
    if (!alloc_fit(r))
        return larder_fail(e, LARDER_ENOMEM, "no memory to match %u rows", r->n);
    return match_open(&r->match, r->b, r->replay, &o, e);
}

int offline_prefill(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                    const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e)
{
    struct run r = {.b = b, .p = b->p, .doc = doc, .policy = policy, .sink = sink, .n = doc->n};
    struct engine_result res = {.n_ctx = doc->n, .next_pos = doc->n, .sel_layer = -1};
    int rc = open_keep(&r, e);

    if (!rc)
        rc = run_init(&r, policy->chunk, e);
    if (!rc)
        rc = open_match(&r, e);
    for (uint32_t l = 0; l < b->p->geom.n_layers && !rc; l++)
        rc = run_layer(&r, l, e);
    if (!rc)
        rc = deliver_held(&r, e);
    if (!rc)
        rc = pass_logits(b, r.hidden + (uint64_t)(r.n - 1) * r.p->n_hidden, &res.logits, &r.load_ms,
                         e);
    if (!rc)
        rc = certify(&r, &res.certificate, e);
    res.load_ms = r.load_ms;
    run_done(&r);
    if (rc)
        engine_result_done(&res);
    else
        *ret = res;
    return rc;
}

int offline_scores(struct backend *b, const struct engine_doc *doc, uint32_t chunk,
                   const struct offline_watch *watch, struct larder_err *e)
{
    struct policy p = {.kind = POLICY_OFFLINE, .obs = OBS_REPLAY};
    struct engine_sink sink = {watch->arg, NULL, watch->progress};
    struct run r = {
        .b = b, .p = b->p, .doc = doc, .policy = &p, .sink = &sink, .n = doc->n, .watch = watch};
    int rc = run_init(&r, chunk, e);

    for (uint32_t l = 0; l < b->p->geom.n_layers && !rc; l++)
        rc = run_layer(&r, l, e);
    run_done(&r);
    return rc;
}
