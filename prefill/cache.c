/* cache.c - copies of kept rows, head by head. */
#include "cache.h"

#include "mem.h"
#include "packed.h"

int cache_init(struct cache *c, const struct backend *b, bool with_rows, struct larder_err *e)
{
    const struct kv_geom *g = &b->p->geom;

    *c = (struct cache){*g, with_rows, NULL};
    c->head = mem_zalloc((uint64_t)g->n_layers * g->n_kv_heads, sizeof *c->head);
    return c->head ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the list of rows");
}

void cache_done(struct cache *c)
{
    uint32_t n = c->head ? c->geom.n_layers * c->geom.n_kv_heads : 0;

    for (uint32_t i = 0; i < n; i++) {
        mem_free(c->head[i].position);
        mem_free(c->head[i].k);
        mem_free(c->head[i].v);
        mem_free(c->head[i].bias);
    }
    mem_free(c->head);
    c->head = NULL;
}

int cache_add(void *arg, uint32_t layer, const struct kept_rows *heads, struct larder_err *e)
{
    struct cache *c = arg;
    uint32_t d = c->geom.head_dim;

    for (uint32_t g = 0; g < c->geom.n_kv_heads; g++) {
        struct cached_head *h = &c->head[layer * c->geom.n_kv_heads + g];
        const struct kept_rows *from = &heads[g];

        h->n_rows = from->n_rows;
        h->dtype = from->dtype;
        h->position = mem_dup(from->position, from->n_rows * sizeof *from->position);
        if (c->with_rows) {
            h->k = mem_dup(from->k, tile_bytes_k(from->dtype, from->n_rows, d));
            h->v = mem_dup(from->v, tile_bytes_v(from->dtype, from->n_rows, d));
            h->bias = from->bias ? mem_dup(from->bias, from->n_rows * sizeof *h->bias) : NULL;
        }
        if (!h->position || (c->with_rows && (!h->k || !h->v || (from->bias && !h->bias))))
            return larder_fail(e, LARDER_ENOMEM, "no memory for the kept rows of layer %u", layer);
    }
    return 0;
}

int cache_deliver(const struct cache *c, const struct engine_sink *sink, struct larder_err *e)
{
    uint32_t n_kv = c->geom.n_kv_heads;
    struct kept_rows *heads;
    int rc = 0;

    if (!sink || !sink->layer)
        return 0;
    heads = mem_alloc(n_kv, sizeof *heads);
    if (!heads)
        return larder_fail(e, LARDER_ENOMEM, "no memory to hand on the kept rows");
    for (uint32_t l = 0; l < c->geom.n_layers && !rc; l++) {
        for (uint32_t g = 0; g < n_kv; g++) {
            const struct cached_head *h = &c->head[l * n_kv + g];

            heads[g] = (struct kept_rows){h->n_rows, h->position, h->k, h->v, h->bias, h->dtype};
        }
        rc = sink->layer(sink->arg, l, heads, e);
    }
    mem_free(heads);
    return rc;
}
