/* decode.c - new tokens on top of a stored cache.
 *
 * The one idea: the cache is never touched. New rows have their own K and V, one
 * buffer per layer with room for all tokens this session may add; the backend projects
 * into it and attends to both. Positions go on from next_pos whatever was pruned. What lives as
 * long as the session is the backend's, which may have it elsewhere. */
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
    bool holds; /* the backend has been told of `past` */
    uint32_t next_pos;
    uint32_t n_tail, max_new;
    uint64_t layer_bytes; /* of k, and of v, of one layer's tail */
    uint8_t *k, *v;       /* [n_layers][n_kv_heads][max_new][head_dim] */
    void *q;              /* [n_heads][max_new][head_dim]; of a step, like what follows */
    void *o;              /* [max_new][n_heads * head_dim] */
    uint32_t *pos;        /* [max_new] */
    float *hidden;        /* [n_hidden_rows][n_hidden]: of the last step's size */
    uint32_t n_hidden_rows;
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

static int alloc_session(struct decode *d, struct larder_err *e)
{
    const struct kv_geom *g = &d->b->p->geom;
    uint64_t row = (uint64_t)g->head_dim * kv_dtype_bytes(d->b->elem);

    d->layer_bytes = g->n_kv_heads * d->max_new * row;
    d->k = backend_buffer_new(d->b, g->n_layers, d->layer_bytes);
    d->v = backend_buffer_new(d->b, g->n_layers, d->layer_bytes);
    d->q = backend_buffer_new(d->b, d->max_new, g->n_heads * row);
    d->o = backend_buffer_new(d->b, d->max_new, g->n_heads * row);
    d->pos = mem_alloc(d->max_new, sizeof *d->pos);
    if (d->k && d->v && d->q && d->o && d->pos)
        return 0;
    return larder_fail(e, LARDER_ENOMEM, "no memory to decode %u tokens", d->max_new);
}

int decode_open(struct decode **ret, struct backend *b, const struct weights *w,
                const struct past_rows *past, uint32_t next_pos, uint32_t max_new,
                struct larder_err *e)
{
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
    rc = alloc_session(d, e);
    if (!rc && b->ops->hold) {
        rc = b->ops->hold(b, past, e);
        d->holds = !rc;
    }
    if (rc) {
        decode_close(d);
        return rc;
    }
    *ret = d;
    return 0;
}

void decode_close(struct decode *d)
{
    if (!d)
        return;
    if (d->holds)
        d->b->ops->hold_end(d->b, d->past);
    backend_buffer_free(d->b, d->k);
    backend_buffer_free(d->b, d->v);
    backend_buffer_free(d->b, d->q);
    backend_buffer_free(d->b, d->o);
    backend_buffer_free(d->b, d->hidden);
    mem_free(d->pos);
    mem_free(d);
}

/* Positions and embeddings of the new tokens. */
static int embed(struct decode *d, const uint32_t *ids, uint32_t n, struct larder_err *e)
{
    const struct model_params *p = d->b->p;
    int rc;

    if (d->n_hidden_rows != n) {
        backend_buffer_free(d->b, d->hidden);
        d->hidden = backend_buffer_new(d->b, (uint64_t)n * p->n_hidden, sizeof *d->hidden);
        d->n_hidden_rows = d->hidden ? n : 0;
    }
    if (!d->hidden)
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode %u tokens", n);
    rc = backend_view(d->b, d->hidden, VIEW_WRITE, e);
    for (uint32_t i = 0; i < n && !rc; i++) {
        d->pos[i] = d->next_pos + d->n_tail + i;
        rc = model_read_f32(d->b->model, 0, MODEL_EMBED, ids[i], 1,
                            d->hidden + (uint64_t)i * p->n_hidden, e);
    }
    return rc;
}

static int step_layer(struct decode *d, uint32_t layer, uint32_t n, struct larder_err *e)
{
    struct backend *b = d->b;
    uint64_t tail = (uint64_t)d->n_tail * b->p->geom.head_dim * kv_dtype_bytes(b->elem);
    uint8_t *k = d->k + layer * d->layer_bytes, *v = d->v + layer * d->layer_bytes;
    struct resume r = {
        .q = d->q,
        .k = k,
        .v = v,
        .n_new = n,
        .n_tail = d->n_tail + n,
        .q_stride = d->max_new,
        .stride = d->max_new,
        .past = d->past + (uint64_t)layer * b->p->geom.n_kv_heads,
        .o = d->o,
        .sliding = model_sliding(b->p, layer),
        .pos0 = d->next_pos,
    };
    struct project p = {.hidden = d->hidden,
                        .pos = d->pos,
                        .rope = model_rope(b->p, d->next_pos),
                        .n = n,
                        .stride = d->max_new,
                        .q = d->q,
                        .k = k + tail, /* behind the rows that are there */
                        .v = v + tail};
    int rc = b->ops->qkv(b, d->w->layer[layer], &p, e);

    if (!rc)
        rc = b->ops->resume(b, &r, e);
    return rc ? rc : b->ops->finish(b, d->w->layer[layer], d->hidden, d->o, n, e);
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
    int rc = check_step(d, ids, n, e);

    if (!rc && (!n_last || n_last > n))
        rc = larder_fail(e, LARDER_EINVAL, "logits of %u of %u new tokens", n_last, n);
    if (!rc)
        rc = embed(d, ids, n, e);
    for (uint32_t l = 0; l < p->geom.n_layers && !rc; l++)
        rc = step_layer(d, l, n, e);
    if (!rc)
        rc = d->b->ops->logits(d->b, d->w->head, d->hidden + (uint64_t)(n - n_last) * p->n_hidden,
                               n_last, logits, e);
    for (uint64_t i = 0; i < (uint64_t)n_last * p->n_vocab && !rc; i++)
        if (!isfinite(logits[i]))
            rc = larder_fail(e, LARDER_ENUMERIC, "logit %u is not finite",
                             (uint32_t)(i % p->n_vocab));
    if (!rc)
        d->n_tail += n;
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
