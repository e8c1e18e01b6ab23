/* pick.c - a pass through the first layers, and the tokens that stand out there. */
#include "pick.h"

#include <string.h>

#include "mem.h"
#include "observe.h"
#include "pass.h"
#include "select.h"

/* Of all layers: what stands out does so early, and a replay is worth little when choosing what
 * to replay costs as much. */
#define LAYERS_SHARE 4u

struct scan {
    struct backend *b;
    const struct model_params *p;
    uint32_t n, stride;
    float *hidden;
    uint32_t *pos;
    void *q, *k, *v, *o;
    double *score; /* [n_kv_heads][n] of a layer */
    double *sum;   /* [n] */
};

static void scan_done(struct scan *s)
{
    backend_buffer_free(s->b, s->hidden);
    mem_free(s->pos);
    backend_buffer_free(s->b, s->q);
    backend_buffer_free(s->b, s->k);
    backend_buffer_free(s->b, s->v);
    backend_buffer_free(s->b, s->o);
    mem_free(s->score);
    mem_free(s->sum);
}

static int scan_init(struct scan *s, const uint32_t *ids, struct larder_err *e)
{
    const struct kv_geom *g = &s->p->geom;
    uint64_t per_head = (uint64_t)s->stride * kv_dtype_bytes(s->b->elem) * g->head_dim;
    int rc;

    s->hidden = backend_buffer_new(s->b, (uint64_t)s->n * s->p->n_hidden, sizeof *s->hidden);
    s->pos = mem_alloc(s->n, sizeof *s->pos);
    s->q = backend_buffer_new(s->b, g->n_heads, per_head);
    s->k = backend_buffer_new(s->b, g->n_kv_heads, per_head);
    s->v = backend_buffer_new(s->b, g->n_kv_heads, per_head);
    s->o = backend_buffer_new(s->b, g->n_heads, per_head);
    s->score = mem_alloc((uint64_t)g->n_kv_heads * s->n, sizeof *s->score);
    s->sum = mem_zalloc(s->n, sizeof *s->sum);
    if (!s->hidden || !s->pos || !s->q || !s->k || !s->v || !s->o || !s->score || !s->sum)
        return larder_fail(e, LARDER_ENOMEM, "no memory to choose among %u tokens", s->n);
    rc = backend_view(s->b, s->hidden, VIEW_WRITE, e);
    for (uint32_t i = 0; i < s->n && !rc; i++) {
        s->pos[i] = i;
        rc = model_read_f32(s->b->model, 0, MODEL_EMBED, ids[i], 1,
                            s->hidden + (uint64_t)i * s->p->n_hidden, e);
    }
    return rc;
}

static int add_scores(struct scan *s, uint32_t layer, struct larder_err *e)
{
    static const struct policy by_keys = {.kind = POLICY_KEYDIFF, .obs = OBS_KEYS};
    struct layer_view x = {.b = s->b,
                           .layer = layer,
                           .n = s->n,
                           .n_ctx = s->n,
                           .stride = s->stride,
                           .pos = s->pos,
                           .hidden = s->hidden,
                           .q = s->q,
                           .k = s->k,
                           .v = s->v};
    int rc = observe_layer(&x, &by_keys, s->score, e);

    for (uint32_t g = 0; g < s->p->geom.n_kv_heads && !rc; g++)
        for (uint32_t i = 0; i < s->n; i++)
            s->sum[i] += s->score[(uint64_t)g * s->n + i];
    return rc;
}

static int scan_layer(struct scan *s, uint32_t layer, bool last, struct larder_err *e)
{
    struct attend a = {s->q, s->k, s->v, s->n, 0, s->stride, s->o, model_sliding(s->p, layer)};
    struct project p = {.hidden = s->hidden,
                        .pos = s->pos,
                        .rope = model_rope(s->p, s->n),
                        .n = s->n,
                        .stride = s->stride,
                        .q = s->q,
                        .k = s->k,
                        .v = s->v};
    struct layer *l = NULL;
    double load_ms = 0;
    int rc = pass_load_layer(s->b, layer, &l, &load_ms, e);

    if (!rc)
        rc = s->b->ops->qkv(s->b, l, &p, e);
    if (!rc)
        rc = add_scores(s, layer, e);
    if (!rc && !last)
        rc = s->b->ops->attend(s->b, &a, e);
    if (!rc && !last)
        rc = s->b->ops->finish(s->b, l, s->hidden, s->o, s->n, e);
    s->b->ops->layer_free(s->b, l);
    return rc;
}

/* The best of each chunk, at least one. */
static int choose(const struct scan *s, const struct replay *r, uint32_t percent, bool *chosen,
                  struct larder_err *e)
{
    uint32_t *order = mem_alloc(s->n, sizeof *order);
    int rc = order ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to choose among tokens");

    memset(chosen, 0, s->n * sizeof *chosen);
    for (uint32_t c = 0; c < r->n_chunks && !rc; c++) {
        uint32_t at = r->chunk[c].start, n = r->chunk[c].end - at;
        uint32_t n_best = (uint32_t)(((uint64_t)n * percent + 99) / 100);

        rc = select_order(s->sum + at, n, order, e);
        for (uint32_t i = 0; i < n_best && !rc; i++)
            chosen[at + order[i]] = true;
    }
    mem_free(order);
    return rc;
}

int pick_tokens(struct backend *b, const struct engine_doc *doc, const struct replay *r,
                uint32_t percent, const struct engine_sink *sink, bool *chosen,
                struct larder_err *e)
{
    struct scan s = {.b = b, .p = b->p, .n = doc->n, .stride = (doc->n + 15) / 16 * 16};
    uint32_t n_layers = (b->p->geom.n_layers + LAYERS_SHARE - 1) / LAYERS_SHARE;
    int rc = scan_init(&s, doc->ids, e);

    for (uint32_t l = 0; l < n_layers && !rc; l++) {
        rc = pass_progress(sink, "select", l, b->p->geom.n_layers, e);
        if (!rc)
            rc = scan_layer(&s, l, l + 1 == n_layers, e);
    }
    if (!rc)
        rc = choose(&s, r, percent, chosen, e);
    scan_done(&s);
    return rc;
}
