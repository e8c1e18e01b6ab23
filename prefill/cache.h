/* cache.h - the kept rows of a prefill, in memory.
 *
 * Purpose    A sink (engine.h) that copies what every layer delivers, and gives it back later.
 * Ownership  cache_init() allocates, cache_done() frees (NULL and failed inits allowed).
 * Threads    One.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_CACHE_H
#define LARDER_CACHE_H

#include "engine.h"

struct cached_head {
    uint32_t n_rows;
    uint32_t *position;
    void *k, *v; /* NULL when only positions were wanted */
    float *bias; /* or NULL */
    enum kv_dtype dtype;
};

struct cache {
    struct kv_geom geom;
    bool with_rows;
    struct cached_head *head; /* [n_layers * n_kv_heads] */
};

int cache_init(struct cache *c, const struct backend *b, bool with_rows, struct larder_err *e);
void cache_done(struct cache *c);

/* engine_sink.layer; arg is the cache. */
int cache_add(void *arg, uint32_t layer, const struct kept_rows *heads, struct larder_err *e);

/* Hand all layers on, in order, to another sink. With rows. */
int cache_deliver(const struct cache *c, const struct engine_sink *sink, struct larder_err *e);

#endif
