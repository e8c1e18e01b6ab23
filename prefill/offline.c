/* offline.c - document and replay through the layers side by side.
 *
 * The one idea: one list of rows, the document's first and the replay's behind them. A layer
 * projects and finishes all of them in one call; document rows attend among themselves,
 * replay rows to the document and to their own chunk. What the replay asks of this layer
 * is then known, its rows are chosen and refitted, and the layer is done with. */
#include "offline.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "half.h"
#include "match.h"
#include "mem.h"
#include "packed.h"
#include "replay.h"
#include "select.h"

struct run {
    struct backend *b;
    const struct model_params *p;
    const struct engine_doc *doc;
    const struct policy *policy;
    const struct engine_sink *sink;
    struct replay *replay;
    struct match *match; /* NULL: nothing is fitted */
    uint32_t n, n_all;   /* rows of the document; with the replay's */
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
    const struct offline_watch *watch; /* scores are all that is wanted */
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
    return r->hidden && r->pos && r->q && r->k && r->v && r->o && r->score && r->rows && r->keep &&
           r->keep_k && r->keep_v && r->bias && r->heads;
}

static int embed(struct run *r, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < r->n_all && !rc; i++) {
        bool own = i < r->n;

        r->pos[i] = own ? i : r->replay->pos[i - r->n];
        rc = model_read_f32(r->b->model, 0, MODEL_EMBED,
                            own ? r->doc->ids[i] : r->replay->ids[i - r->n], 1,
                            r->hidden + (uint64_t)i * r->p->n_hidden, e);
    }
    return rc;
}

static int run_init(struct run *r, uint32_t chunk, struct larder_err *e)
{
    int rc = replay_plan(&r->replay, r->b->model, r->doc->tmpl, r->doc->ids, r->n, chunk, e);

    if (rc)
        return rc;
    r->n_all = r->n + r->replay->n_rows;
    r->stride = (r->n_all + 15ull) / 16 * 16;
    if (!alloc(r))
        return larder_fail(e, LARDER_ENOMEM, "no memory to prefill and replay %u tokens", r->n);
    return embed(r, e);
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

static int attend_replay(struct run *r, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    struct past_rows *past = mem_alloc(g->n_kv_heads, sizeof *past);
    int rc = past ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the list of rows");

    for (uint32_t h = 0; h < g->n_kv_heads && !rc; h++)
        past[h] = (struct past_rows){r->n, r->b->elem, at_row(r, r->k, h * r->stride, g->head_dim),
                                     at_row(r, r->v, h * r->stride, g->head_dim), NULL};
    for (uint32_t i = 0; i < r->replay->n_chunks && !rc; i++) {
        const struct replay_chunk *c = &r->replay->chunk[i];
        uint64_t row = r->n + (uint64_t)c->first;
        struct resume x = {
            .q = at_row(r, r->q, row, g->head_dim),
            .k = at_row(r, r->k, row, g->head_dim),
            .v = at_row(r, r->v, row, g->head_dim),
            .n_new = c->n,
            .n_tail = c->n,
            .q_stride = (uint32_t)r->stride,
            .stride = (uint32_t)r->stride,
            .past = past,
            .o = at_row(r, r->o, row, (uint64_t)g->n_heads * g->head_dim),
        };

        rc = r->b->ops->resume(r->b, &x, e);
    }
    mem_free(past);
    return rc;
}

/* The last layer's other rows are read by nobody. */
static int advance(struct run *r, const struct layer *l, bool last, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    uint32_t row0 = last ? r->n - 1 : 0, n = last ? 1 : r->n_all;
    int rc = attend_document(r, row0, e);

    if (!rc && !last)
        rc = attend_replay(r, e);
    if (rc)
        return rc;
    return r->b->ops->finish(r->b, l, r->hidden + (uint64_t)row0 * r->p->n_hidden,
                             at_row(r, r->o, row0, (uint64_t)g->n_heads * g->head_dim), n, e);
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
    if (!rc && r->watch)
        return r->watch->layer(r->watch->arg, layer, score, e);
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
    res.load_ms = r.load_ms;
    run_done(&r);
    if (!rc)
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
