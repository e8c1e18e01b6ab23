/* rung.c - rows of a layer: chosen, refitted, packed, handed on. */
#include "rung.h"

#include <string.h>

#include "mem.h"
#include "packed.h"

/* Fitted rows are packed where they are, or leave. */
static void *fit_buffer(const struct rung *r, uint64_t n, uint64_t size)
{
    return packed_type(r->policy->precision) ? backend_buffer_new(r->b, n, size)
                                             : backend_staging_new(r->b, n, size);
}

static bool alloc_fit(struct rung *r)
{
    uint64_t n = r->keep.n_room ? r->keep.n_room : (uint64_t)r->b->p->geom.n_kv_heads * r->n;

    r->fit_k = fit_buffer(r, n, r->b->p->geom.head_dim * sizeof *r->fit_k);
    r->fit_v = fit_buffer(r, n, r->b->p->geom.head_dim * sizeof *r->fit_v);
    r->bias = backend_staging_new(r->b, n, sizeof *r->bias);
    return r->fit_k && r->fit_v && r->bias;
}

static int rung_open(struct rung *r, struct backend *b, const struct rung_want *want, uint32_t n,
                     struct larder_err *e)
{
    const struct policy *p = want->policy;
    uint32_t rows;
    int rc = policy_rows(p, &p->rows, n, &rows, e);

    *r = (struct rung){.b = b, .policy = p, .sink = want->sink, .n = n};
    if (!rc)
        rc = keep_init(&r->keep, b, p, n, rows, e);
    r->packer.b = r->keep.stays ? b : NULL;
    if (!rc && keep_waits(&r->keep))
        rc = hold_init(&r->hold, b, e);
    if (rc || !rung_fits(r))
        return rc;
    if (keep_waits(&r->keep))
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: fit needs a layer's rows while its queries are there, and "
                           "shape=global knows them only at the end; use shape=shares");
    return alloc_fit(r) ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to match %u rows", n);
}

int rungs_open(struct rung **ret, uint32_t *ret_n, struct backend *b, const struct rung_want *want,
               uint32_t n_wants, uint32_t n, struct larder_err *e)
{
    int rc = 0;

    *ret = mem_zalloc(n_wants, sizeof **ret);
    if (!*ret)
        return larder_fail(e, LARDER_ENOMEM, "no memory to keep rows of %u tokens", n);
    for (uint32_t i = 0; i < n_wants && !rc; i++)
        rc = rung_open(&(*ret)[(*ret_n)++], b, &want[i], n, e);
    return rc;
}

void rungs_close(struct rung *r, uint32_t n_rungs)
{
    for (uint32_t i = 0; i < n_rungs; i++) {
        keep_done(&r[i].keep);
        hold_done(&r[i].hold);
        packer_done(&r[i].packer);
        backend_buffer_free(r[i].b, r[i].fit_k);
        backend_buffer_free(r[i].b, r[i].fit_v);
        backend_buffer_free(r[i].b, r[i].bias);
    }
    mem_free(r);
}

/* Refit the rows of all heads where they stand for the dropped ones. */
static int refit(struct rung *r, struct match *m, struct larder_err *e)
{
    struct match_opts o = {r->policy->precision, r->policy->fit == FIT_MATCHING};
    uint64_t at = 0, d = r->b->p->geom.head_dim;
    int rc = match_fit(m, &o, r->keep.heads, r->fit_k, r->fit_v, r->bias, e);

    for (uint32_t g = 0; g < r->b->p->geom.n_kv_heads && !rc; g++) {
        struct kept_rows *h = &r->keep.heads[g];

        h->k = r->fit_k + at * d;
        h->v = r->fit_v + at * d;
        h->dtype = KV_F32;
        h->bias = o.with_bias ? r->bias + at : NULL;
        at += h->n_rows;
    }
    return rc;
}

/* Rows that the layer's window hides from all that comes after the document are not kept: they
 * are the first ones. One row stays, whatever the window. */
static void drop_unseen(struct rung *r, uint32_t layer)
{
    uint32_t first = sliding_from(model_sliding(r->b->p, layer), r->n);

    for (uint32_t g = 0; g < r->b->p->geom.n_kv_heads; g++) {
        struct kept_rows *h = &r->keep.heads[g];
        uint64_t bytes = (uint64_t)kv_dtype_bytes(h->dtype) * r->b->p->geom.head_dim;

        while (h->n_rows > 1 && *h->position < first) {
            h->n_rows--;
            h->position++;
            h->k = (const uint8_t *)h->k + bytes;
            h->v = (const uint8_t *)h->v + bytes;
        }
    }
}

/* What was chosen, with positions. */
static int collect(struct rung *r, struct larder_err *e)
{
    int rc = keep_collect(&r->keep, e);

    if (!rc)
        drop_unseen(r, r->keep.at_hand.layer);
    return rc;
}

static int choose(struct rung *r, const struct layer_rows *x, struct match *m, struct larder_err *e)
{
    int rc = keep_choose(&r->keep, x, e);

    if (rc || !r->keep.changes)
        return rc;
    rc = collect(r, e);
    if (!rc && rung_fits(r))
        rc = refit(r, m, e);
    return rc ? rc
              : packer_layer(&r->packer, &r->b->p->geom, r->policy->precision, r->keep.heads, e);
}

/* Fitted rows that nobody packs, and biases. */
static int view_fitted(struct rung *r, struct larder_err *e)
{
    int rc = backend_view(r->b, r->bias, VIEW_READ, e);

    if (rc || packed_type(r->policy->precision))
        return rc;
    rc = backend_view(r->b, r->fit_k, VIEW_READ, e);
    return rc ? rc : backend_view(r->b, r->fit_v, VIEW_READ, e);
}

static int hand_on(struct rung *r, struct larder_err *e)
{
    int rc = r->keep.changes ? packer_wait(&r->packer, r->b->p->geom.n_kv_heads, e) : collect(r, e);

    if (!rc && rung_fits(r))
        rc = view_fitted(r, e);
    if (!rc && r->sink && r->sink->layer)
        rc = r->sink->layer(r->sink->arg, r->keep.at_hand.layer, r->keep.heads, e);
    return rc;
}

int rung_choose(struct rung *r, const struct layer_rows *x, struct match *m, struct larder_err *e)
{
    return keep_waits(&r->keep) ? hold_add(&r->hold, x, e) : choose(r, x, m, e);
}

int rung_deliver(struct rung *r, struct larder_err *e)
{
    return keep_waits(&r->keep) ? 0 : hand_on(r, e);
}

int rung_end(struct rung *r, struct larder_err *e)
{
    int rc;

    if (!keep_waits(&r->keep))
        return 0;
    rc = keep_count_all(&r->keep, r->hold.layers, e);
    for (uint32_t l = 0; l < r->b->p->geom.n_layers && !rc; l++) {
        rc = choose(r, &r->hold.layers[l], NULL, e);
        if (!rc)
            rc = hand_on(r, e);
    }
    return rc;
}

void rung_past(const struct rung *r, struct past_rows *past)
{
    for (uint32_t g = 0; g < r->b->p->geom.n_kv_heads; g++) {
        const struct kept_rows *h = &r->keep.heads[g];

        past[g] = (struct past_rows){h->n_rows, h->dtype, h->k, h->v, h->bias, h->position};
    }
}
