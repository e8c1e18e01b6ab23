/* decode.c - new tokens on top of a stored cache.
 *
 * The one idea: the cache is never touched. New rows have their own K and V, one
 * buffer per layer with room for all tokens this session may add, and the backend
 * attends to both. Positions go on from next_pos whatever was pruned. */
#include "decode.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "mem.h"

struct weights {
    struct backend *b;
    struct layer **layer; /* [n_layers] */
    struct head *head;
};

struct decode {
    struct backend *b;
    const struct weights *w;
    const struct past_rows *past;
    uint32_t next_pos;
    uint32_t n_tail, max_new;
    uint64_t layer_bytes; /* of k, and of v, of one layer's tail */
    uint8_t *k, *v;       /* [n_layers][n_kv_heads][max_new][head_dim] */
};

/* Buffers of one step of n rows. */
struct step {
    uint32_t n;
    uint32_t *pos;
    float *hidden;
    void *q, *k, *v, *o;
};

int weights_load(struct weights **ret, struct backend *b, struct larder_err *e)
{
    uint32_t n_layers = b->p->geom.n_layers;
    struct weights *w = mem_zalloc(1, sizeof *w);
    int rc = 0;

    if (w)
        w->layer = mem_zalloc(n_layers, sizeof(struct layer *));
    if (!w || !w->layer) {
        mem_free(w);
        return larder_fail(e, LARDER_ENOMEM, "no memory for the model's weights");
    }
    w->b = b;
    for (uint32_t l = 0; l < n_layers && !rc; l++)
        rc = b->ops->layer_load(b, l, true, &w->layer[l], e);
    if (!rc)
        rc = b->ops->head_load(b, &w->head, e);
    if (rc) {
        weights_free(w);
        return rc;
    }
    *ret = w;
    return 0;
}

void weights_free(struct weights *w)
{
    if (!w)
        return;
    for (uint32_t l = 0; l < w->b->p->geom.n_layers; l++)
        w->b->ops->layer_free(w->b, w->layer[l]);
    w->b->ops->head_free(w->b, w->head);
    mem_free(w->layer);
    mem_free(w);
}

/* Where a layer slides, rows need their positions. */
static int check_positions(const struct backend *b, const struct past_rows *past,
                           struct larder_err *e)
{
    uint32_t n_kv = b->p->geom.n_kv_heads;

    for (uint32_t i = 0; i < b->p->geom.n_layers * n_kv; i++)
        if (model_sliding(b->p, i / n_kv) && past[i].n_rows && !past[i].position)
            return larder_fail(e, LARDER_EINVAL,
                               "rows without positions for a layer with a sliding window");
    return 0;
}

int decode_open(struct decode **ret, struct backend *b, const struct weights *w,
                const struct past_rows *past, uint32_t next_pos, uint32_t max_new,
                struct larder_err *e)
{
    const struct kv_geom *g = &b->p->geom;
    struct decode *d;
    int rc = check_positions(b, past, e);

    if (rc)
        return rc;
    if (max_new > b->p->n_positions || next_pos > b->p->n_positions - max_new)
        return larder_fail(e, LARDER_ETOOLONG,
                           "the document ends at position %u; %u new tokens would pass the model's "
                           "%u positions",
                           next_pos, max_new, b->p->n_positions);
    d = mem_zalloc(1, sizeof *d);
    if (!d)
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode");
    *d = (struct decode){.b = b, .w = w, .past = past, .next_pos = next_pos, .max_new = max_new};
    d->layer_bytes = (uint64_t)g->n_kv_heads * max_new * g->head_dim * kv_dtype_bytes(b->elem);
    d->k = mem_aligned(g->n_layers, d->layer_bytes);
    d->v = mem_aligned(g->n_layers, d->layer_bytes);
    if (!d->k || !d->v) {
        decode_close(d);
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode %u tokens", max_new);
    }
    *ret = d;
    return 0;
}

void decode_close(struct decode *d)
{
    if (!d)
        return;
    mem_free(d->k);
    mem_free(d->v);
    mem_free(d);
}

static void step_done(struct step *s)
{
    mem_free(s->pos);
    mem_free(s->hidden);
    mem_free(s->q);
    mem_free(s->k);
    mem_free(s->v);
    mem_free(s->o);
}

static int step_init(const struct decode *d, const uint32_t *ids, uint32_t n, struct step *s,
                     struct larder_err *e)
{
    const struct model_params *p = d->b->p;
    uint64_t row = (uint64_t)p->geom.head_dim * kv_dtype_bytes(d->b->elem);
    int rc = 0;

    s->n = n;
    s->pos = mem_alloc(n, sizeof *s->pos);
    s->hidden = mem_aligned((uint64_t)n * p->n_hidden, sizeof *s->hidden);
    s->q = mem_aligned(n, p->geom.n_heads * row);
    s->k = mem_aligned(n, p->geom.n_kv_heads * row);
    s->v = mem_aligned(n, p->geom.n_kv_heads * row);
    s->o = mem_aligned(n, p->geom.n_heads * row);
    if (!s->pos || !s->hidden || !s->q || !s->k || !s->v || !s->o)
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode %u tokens", n);
    for (uint32_t i = 0; i < n && !rc; i++) {
        s->pos[i] = d->next_pos + d->n_tail + i;
        rc = model_read_f32(d->b->model, 0, MODEL_EMBED, ids[i], 1,
                            s->hidden + (uint64_t)i * p->n_hidden, e);
    }
    return rc;
}

/* Put the new rows of x [n_kv_heads][n] behind those in the tail [n_kv_heads][max_new]. */
static void append(const struct decode *d, uint8_t *tail, const uint8_t *x, uint32_t n)
{
    const struct kv_geom *g = &d->b->p->geom;
    uint64_t row = (uint64_t)g->head_dim * kv_dtype_bytes(d->b->elem);

    for (uint64_t h = 0; h < g->n_kv_heads; h++)
        memcpy(tail + (h * d->max_new + d->n_tail) * row, x + h * n * row, n * row);
}

static int step_layer(struct decode *d, uint32_t layer, struct step *s, struct larder_err *e)
{
    struct backend *b = d->b;
    uint8_t *k = d->k + layer * d->layer_bytes, *v = d->v + layer * d->layer_bytes;
    struct resume r = {
        .q = s->q,
        .k = k,
        .v = v,
        .n_new = s->n,
        .n_tail = d->n_tail + s->n,
        .q_stride = s->n,
        .stride = d->max_new,
        .past = d->past + (uint64_t)layer * b->p->geom.n_kv_heads,
        .o = s->o,
        .sliding = model_sliding(b->p, layer),
        .pos0 = d->next_pos,
    };
    struct project p = {.hidden = s->hidden,
                        .pos = s->pos,
                        .rope = model_rope(b->p, d->next_pos),
                        .n = s->n,
                        .stride = s->n,
                        .q = s->q,
                        .k = s->k,
                        .v = s->v};
    int rc = b->ops->qkv(b, d->w->layer[layer], &p, e);

    if (rc)
        return rc;
    append(d, k, s->k, s->n);
    append(d, v, s->v, s->n);
    rc = b->ops->resume(b, &r, e);
    return rc ? rc : b->ops->finish(b, d->w->layer[layer], s->hidden, s->o, s->n, e);
}

static int check_step(const struct decode *d, const uint32_t *ids, uint32_t n, struct larder_err *e)
{
    if (!n)
        return larder_fail(e, LARDER_EEMPTY, "no tokens to decode");
    if (n > d->max_new - d->n_tail)
        return larder_fail(e, LARDER_ETOOLONG, "%u new tokens, but room for %u", n,
                           d->max_new - d->n_tail);
    for (uint32_t i = 0; i < n; i++)
        if (ids[i] >= d->b->p->n_vocab)
            return larder_fail(e, LARDER_EINVAL,
                               "token %u is %u, but the vocabulary has %u entries", i, ids[i],
                               d->b->p->n_vocab);
    return 0;
}

int decode_step_rows(struct decode *d, const uint32_t *ids, uint32_t n, uint32_t n_last,
                     float *logits, struct larder_err *e)
{
    const struct model_params *p = d->b->p;
    struct step s = {0};
    int rc = check_step(d, ids, n, e);

    if (!rc && (!n_last || n_last > n))
        rc = larder_fail(e, LARDER_EINVAL, "logits of %u of %u new tokens", n_last, n);
    if (!rc)
        rc = step_init(d, ids, n, &s, e);
    for (uint32_t l = 0; l < p->geom.n_layers && !rc; l++)
        rc = step_layer(d, l, &s, e);
    if (!rc)
        rc = d->b->ops->logits(d->b, d->w->head, s.hidden + (uint64_t)(n - n_last) * p->n_hidden,
                               n_last, logits, e);
    for (uint64_t i = 0; i < (uint64_t)n_last * p->n_vocab && !rc; i++)
        if (!isfinite(logits[i]))
            rc = larder_fail(e, LARDER_ENUMERIC, "logit %u is not finite",
                             (uint32_t)(i % p->n_vocab));
    if (!rc)
        d->n_tail += n;
    step_done(&s);
    return rc;
}

int decode_step(struct decode *d, const uint32_t *ids, uint32_t n, float *logits,
                struct larder_err *e)
{
    return decode_step_rows(d, ids, n, 1, logits, e);
}

void decode_rewind(struct decode *d, uint32_t n_keep)
{
    assert(n_keep <= d->n_tail);
    d->n_tail = n_keep;
}
