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
#include <time.h>

#include "half.h"
#include "match.h"
#include "mem.h"
#include "packed.h"
#include "probe.h"
#include "replay.h"
#include "select.h"

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
    float *score;   /* [n_kv_heads][n], of the replay */
    uint32_t *rows; /* [n_layers * n_kv_heads]: the budget of each head */
    /* kept rows of one layer */
    uint32_t *keep; /* [n_kv_heads][n] */
    float *keep_k, *keep_v, *bias;
    struct kept_rows *heads;
    double load_ms;
    int (*on_scores)(void *arg, uint32_t layer, const float *score, struct larder_err *e);
    void *scores_arg;
};

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

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
    mem_free(r->score);
    mem_free(r->rows);
    mem_free(r->keep);
    mem_free(r->keep_k);
    mem_free(r->keep_v);
    mem_free(r->bias);
    mem_free(r->heads);
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
    r->score = mem_alloc(kept, sizeof *r->score);
    r->rows = mem_alloc((uint64_t)g->n_layers * g->n_kv_heads, sizeof *r->rows);
    r->keep = mem_alloc(kept, sizeof *r->keep);
    r->keep_k = mem_alloc(kept, g->head_dim * sizeof *r->keep_k);
    r->keep_v = mem_alloc(kept, g->head_dim * sizeof *r->keep_v);
    r->bias = mem_alloc(kept, sizeof *r->bias);
    r->heads = mem_zalloc(g->n_kv_heads, sizeof *r->heads);
    return r->hidden && r->pos && r->past && r->q && r->k && r->v && r->o && r->score && r->rows &&
           r->keep && r->keep_k && r->keep_v && r->bias && r->heads;
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

    if (!rc && !r->on_scores)
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
    for (uint32_t h = 0; h < g->n_kv_heads; h++) {
        const struct kept_rows *k = &r->heads[h];

        r->past[h] = (struct past_rows){k->n_rows, KV_F32, k->k, k->v, k->bias};
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

/* ---- rows */

/* The t best of a head, ascending; first rows always. */
static int choose(const struct run *r, const float *score, uint32_t t, uint32_t *keep,
                  struct larder_err *e)
{
    double *s = mem_alloc(r->n, sizeof *s);
    uint32_t *order = mem_alloc(r->n, sizeof *order);
    int rc = s && order ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to rank %u rows", r->n);

    for (uint32_t j = 0; j < r->n && !rc; j++) /* scores are probabilities */
        s[j] = j < r->policy->sink ? 2 : score[j];
    if (!rc)
        rc = select_order(s, r->n, order, e);
    if (!rc)
        select_top(order, t, keep);
    mem_free(s);
    mem_free(order);
    return rc;
}

static void gather(const struct run *r, uint32_t head, const uint32_t *keep, uint32_t t, float *k,
                   float *v)
{
    uint32_t d = r->p->geom.head_dim;

    for (uint32_t i = 0; i < t; i++) {
        uint64_t at = (head * r->stride + keep[i]) * d;

        for (uint32_t c = 0; c < d; c++) {
            bool f32 = r->b->elem == KV_F32;

            k[(uint64_t)i * d + c] =
                f32 ? ((const float *)r->k)[at + c] : bf16_to_f32(((const uint16_t *)r->k)[at + c]);
            v[(uint64_t)i * d + c] =
                f32 ? ((const float *)r->v)[at + c] : bf16_to_f32(((const uint16_t *)r->v)[at + c]);
        }
    }
}

static int keep_head(struct run *r, uint32_t layer, uint32_t head, const float *score,
                     struct larder_err *e)
{
    uint32_t t = r->rows[layer * r->p->geom.n_kv_heads + head];
    uint64_t at = (uint64_t)head * r->n, d = r->p->geom.head_dim;
    struct kept_rows *to = &r->heads[head];
    int rc = choose(r, score + at, t, r->keep + at, e);

    if (rc)
        return rc;
    gather(r, head, r->keep + at, t, r->keep_k + at * d, r->keep_v + at * d);
    if (r->match)
        rc = match_fit(r->match, head, r->keep + at, t, r->keep_v + at * d, r->bias + at, e);
    if (!rc && packed_type(r->policy->precision)) { /* until rows leave packed */
        uint8_t *tile = mem_alloc(tile_bytes_k(r->policy->precision, t, (uint32_t)d) +
                                      tile_bytes_v(r->policy->precision, t, (uint32_t)d),
                                  1);
        packed_from_k(r->policy->precision, r->keep_k + at * d, t, (uint32_t)d, tile);
        packed_expand_k_f32(r->policy->precision, tile, t, (uint32_t)d, r->keep_k + at * d);
        packed_from_v(r->policy->precision, r->keep_v + at * d, t, (uint32_t)d, tile);
        packed_expand_v_f32(r->policy->precision, tile, t, (uint32_t)d, r->keep_v + at * d);
        mem_free(tile);
    }
    *to = (struct kept_rows){.n_rows = t,
                             .position = r->keep + at,
                             .k = r->keep_k + at * d,
                             .v = r->keep_v + at * d,
                             .bias = r->policy->fit == FIT_MATCHING ? r->bias + at : NULL};
    return rc;
}

/* Scores of this layer, then its rows. */
static int observe(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct replay_rows x = {r->q, r->k, r->stride};
    const float *score = r->score;
    int rc = 0;

    if (r->match)
        rc = match_layer(r->match, &x, r->v, &score, e);
    else
        rc = replay_score(r->b, r->replay, &x, r->score, e);
    if (!rc && r->on_scores)
        return r->on_scores(r->scores_arg, layer, score, e);
    for (uint32_t g = 0; g < r->p->geom.n_kv_heads && !rc; g++)
        rc = keep_head(r, layer, g, score, e);
    if (!rc && r->sink && r->sink->layer)
        rc = r->sink->layer(r->sink->arg, layer, r->heads, e);
    return rc;
}

static int run_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    struct layer *l = NULL;
    double start = now_ms();
    int rc = 0;

    if (r->sink && r->sink->progress)
        rc = r->sink->progress(r->sink->arg, "prefill", layer, r->p->geom.n_layers);
    if (rc)
        return larder_fail(e, rc, "canceled before layer %u of %u", layer, r->p->geom.n_layers);
    rc = r->b->ops->layer_load(r->b, layer, &l, e);
    r->load_ms += now_ms() - start;
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

static int last_logits(struct run *r, float **ret, struct larder_err *e)
{
    float *x = mem_alloc(r->p->n_vocab, sizeof *x);
    double start = now_ms();
    int rc;

    if (!x)
        return larder_fail(e, LARDER_ENOMEM, "no memory for logits");
    rc = r->b->ops->logits(r->b, NULL, r->hidden + (uint64_t)(r->n - 1) * r->p->n_hidden, 1, x, e);
    r->load_ms += now_ms() - start;
    for (uint32_t i = 0; i < r->p->n_vocab && !rc; i++)
        if (!isfinite(x[i]))
            rc = larder_fail(e, LARDER_ENUMERIC,
                             "logit %u of the last token is not finite; nothing was kept", i);
    if (rc) {
        mem_free(x);
        return rc;
    }
    *ret = x;
    return 0;
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

static int set_rows(struct run *r, struct larder_err *e)
{
    uint32_t n_heads = r->p->geom.n_layers * r->p->geom.n_kv_heads, least, even;
    const struct shares *s = r->doc->shares;
    int rc = policy_rows(r->policy, &r->policy->rows, r->n, &even, e);

    if (rc)
        return rc;
    least = r->policy->sink < r->n ? r->policy->sink : r->n;
    if (r->policy->shape == SHAPE_UNIFORM) {
        for (uint32_t i = 0; i < n_heads; i++)
            r->rows[i] = even;
        return 0;
    }
    if (!s || s->n_heads != n_heads)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "shape=shares needs the model's calibration; run larder calibrate");
    shares_rows(s, policy_rows_exact(&r->policy->rows, r->n) / r->n, r->n, least, r->rows);
    return 0;
}

static int open_match(struct run *r, struct larder_err *e)
{
    struct match_opts o = {r->policy->precision, r->policy->fit == FIT_MATCHING, 0};

    if (r->policy->fit == FIT_NONE)
        return 0;
    return match_open(&r->match, r->b, r->replay, &o, e);
}

int offline_prefill(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                    const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e)
{
    struct run r = {.b = b, .p = b->p, .doc = doc, .policy = policy, .sink = sink, .n = doc->n};
    struct engine_result res = {.n_ctx = doc->n, .next_pos = doc->n, .sel_layer = -1};
    int rc = run_init(&r, policy->chunk, e);

    if (!rc)
        rc = set_rows(&r, e);
    if (!rc)
        rc = open_match(&r, e);
    for (uint32_t l = 0; l < b->p->geom.n_layers && !rc; l++)
        rc = run_layer(&r, l, e);
    if (!rc)
        rc = last_logits(&r, &res.logits, e);
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
                   int (*layer)(void *arg, uint32_t layer, const float *score,
                                struct larder_err *e),
                   void *arg, struct larder_err *e)
{
    struct policy p = {.kind = POLICY_OFFLINE, .obs = OBS_REPLAY};
    struct run r = {.b = b,
                    .p = b->p,
                    .doc = doc,
                    .policy = &p,
                    .n = doc->n,
                    .on_scores = layer,
                    .scores_arg = arg};
    int rc = run_init(&r, chunk, e);

    for (uint32_t l = 0; l < b->p->geom.n_layers && !rc; l++)
        rc = run_layer(&r, l, e);
    run_done(&r);
    return rc;
}
