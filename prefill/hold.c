/* hold.c - copies of layers, without the unused capacity of their buffers. */
#include "hold.h"

#include <string.h>

#include "mem.h"

int hold_init(struct hold *h, const struct kv_geom *geom, enum kv_dtype elem, struct larder_err *e)
{
    *h = (struct hold){.geom = geom, .elem = elem};
    h->layers = mem_zalloc(geom->n_layers, sizeof *h->layers);
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

/* [n_kv_heads][n] rows of `bytes` out of [n_kv_heads][stride]. */
static void *compact(const void *rows, uint32_t n_kv, uint32_t n, uint32_t stride, uint64_t bytes)
{
    uint8_t *to = mem_aligned((uint64_t)n_kv * n, bytes);

    for (uint32_t g = 0; to && g < n_kv; g++)
        memcpy(to + (uint64_t)g * n * bytes, (const uint8_t *)rows + (uint64_t)g * stride * bytes,
               n * bytes);
    return to;
}

int hold_add(struct hold *h, const struct layer_rows *x, struct larder_err *e)
{
    uint32_t n_kv = h->geom->n_kv_heads;
    uint64_t bytes = (uint64_t)kv_dtype_bytes(h->elem) * h->geom->head_dim;
    uint64_t scores = (uint64_t)n_kv * x->n * sizeof *x->score;
    struct layer_rows *to = &h->layers[x->layer];

    *to = (struct layer_rows){.layer = x->layer, .n = x->n, .stride = x->n};
    to->position = mem_dup(x->position, x->n * sizeof *x->position);
    to->k = compact(x->k, n_kv, x->n, x->stride, bytes);
    to->v = compact(x->v, n_kv, x->n, x->stride, bytes);
    to->score = mem_dup(x->score, scores);
    to->worth = x->worth ? mem_dup(x->worth, scores) : NULL;
    if (to->position && to->k && to->v && to->score && (to->worth || !x->worth))
        return 0;
    return larder_fail(e, LARDER_ENOMEM, "no memory to hold layer %u of %u tokens", x->layer, x->n);
}
