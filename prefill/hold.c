/* hold.c - copies of layers, without the unused capacity of their buffers. */
#include "hold.h"

#include <string.h>

#include "mem.h"
#include "select_ops.h"

int hold_init(struct hold *h, struct backend *b, struct larder_err *e)
{
    *h = (struct hold){.b = b, .geom = &b->p->geom, .elem = b->elem};
    h->layers = mem_zalloc(h->geom->n_layers, sizeof *h->layers);
    return h->layers ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to hold layers");
}

static void drop(struct layer_rows *x)
{
    mem_free((void *)x->position);
    mem_free((void *)x->k);
    mem_free((void *)x->v);
    mem_free((void *)x->score);
    mem_free((void *)x->worth);
    *x = (struct layer_rows){0};
}

void hold_done(struct hold *h)
{
    for (uint32_t l = 0; h->layers && l < h->geom->n_layers; l++)
        drop(&h->layers[l]);
    mem_free(h->layers);
    *h = (struct hold){0};
}

/* [n_kv_heads][n] rows out of [n_kv_heads][stride]. */
static int copy_rows(const struct hold *h, const struct layer_rows *x, const void *from, void *to,
                     struct larder_err *e)
{
    uint32_t count[KV_MAX_HEADS], n_kv = h->geom->n_kv_heads;
    uint64_t bytes = (uint64_t)kv_dtype_bytes(h->elem) * h->geom->head_dim;
    struct gather g = {.from = from,
                       .stride = x->stride,
                       .n_heads = n_kv,
                       .row_bytes = (uint32_t)bytes,
                       .count = count,
                       .to = to};

    for (uint32_t i = 0; i < n_kv; i++)
        count[i] = x->n;
    if (h->b->ops->select)
        return h->b->ops->select->gather(h->b, &g, e);
    for (uint64_t i = 0; i < n_kv; i++)
        memcpy((uint8_t *)to + i * x->n * bytes, (const uint8_t *)from + i * x->stride * bytes,
               x->n * bytes);
    return 0;
}

int hold_add(struct hold *h, const struct layer_rows *x, struct larder_err *e)
{
    uint64_t n = (uint64_t)h->geom->n_kv_heads * x->n, scores = n * sizeof *x->score;
    uint64_t bytes = (uint64_t)kv_dtype_bytes(h->elem) * h->geom->head_dim;
    struct layer_rows *to = &h->layers[x->layer];
    void *k = mem_aligned(n, bytes), *v = mem_aligned(n, bytes);
    int rc = backend_view(h->b, x->score, VIEW_READ, e);

    *to = (struct layer_rows){.layer = x->layer, .n = x->n, .stride = x->n, .k = k, .v = v};
    if (rc)
        return rc;
    to->position = mem_dup(x->position, x->n * sizeof *x->position);
    to->score = mem_dup(x->score, scores);
    to->worth = x->worth ? mem_dup(x->worth, scores) : NULL;
    if (!k || !v || !to->position || !to->score || (!to->worth && x->worth))
        return larder_fail(e, LARDER_ENOMEM, "no memory to hold layer %u of %u tokens", x->layer,
                           x->n);
    rc = copy_rows(h, x, x->k, k, e);
    return rc ? rc : copy_rows(h, x, x->v, v, e);
}
