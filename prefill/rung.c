/* rung.c - rows of a layer: chosen, refitted, packed, handed on. */
#include "rung.h"

#include <string.h>

#include "half.h"
#include "mem.h"

static bool alloc_fit(struct rung *r)
{
    uint64_t kept = (uint64_t)r->geom->n_kv_heads * r->n;

    r->fit_k = mem_alloc(kept, r->geom->head_dim * sizeof *r->fit_k);
    r->fit_v = mem_alloc(kept, r->geom->head_dim * sizeof *r->fit_v);
    r->bias = mem_alloc(kept, sizeof *r->bias);
    return r->fit_k && r->fit_v && r->bias;
}

static int rung_open(struct rung *r, struct backend *b, const struct rung_want *want, uint32_t n,
                     struct larder_err *e)
{
    const struct policy *p = want->policy;
    uint32_t rows;
    int rc = policy_rows(p, &p->rows, n, &rows, e);

    *r =
        (struct rung){.policy = p, .sink = want->sink, .geom = &b->p->geom, .params = b->p, .n = n};
    if (!rc)
        rc = keep_init(&r->keep, b, p, n, rows, e);
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
        mem_free(r[i].fit_k);
        mem_free(r[i].fit_v);
        mem_free(r[i].bias);
    }
    mem_free(r);
}

static void widen(const struct kept_rows *h, uint64_t n, float *k, float *v)
{
    for (uint64_t i = 0; i < n; i++) {
        bool f32 = h->dtype == KV_F32;

        k[i] = f32 ? ((const float *)h->k)[i] : bf16_to_f32(((const uint16_t *)h->k)[i]);
        v[i] = f32 ? ((const float *)h->v)[i] : bf16_to_f32(((const uint16_t *)h->v)[i]);
    }
}

/* Refit the rows of one head where they stand for the dropped ones. */
static int refit(struct rung *r, uint32_t head, struct match *m, struct larder_err *e)
{
    struct match_opts o = {r->policy->precision, r->policy->fit == FIT_MATCHING};
    struct kept_rows *h = &r->keep.heads[head];
    uint64_t at = (uint64_t)head * r->n, d = r->geom->head_dim;
    float *k = r->fit_k + at * d, *v = r->fit_v + at * d;

    widen(h, h->n_rows * d, k, v);
    h->k = k;
    h->v = v;
    h->dtype = KV_F32;
    h->bias = o.with_bias ? r->bias + at : NULL;
    return match_fit(m, &o, head, h->position, h->n_rows, v, r->bias + at, e);
}

/* Rows that the layer's window hides from all that comes after the document are not kept: they
 * are the first ones. One row stays, whatever the window. */
static void drop_unseen(struct rung *r, uint32_t layer)
{
    uint32_t first = sliding_from(model_sliding(r->params, layer), r->n);

    for (uint32_t g = 0; g < r->geom->n_kv_heads; g++) {
        struct kept_rows *h = &r->keep.heads[g];
        uint64_t bytes = (uint64_t)kv_dtype_bytes(h->dtype) * r->geom->head_dim;

        while (h->n_rows > 1 && *h->position < first) {
            h->n_rows--;
            h->position++;
            h->k = (const uint8_t *)h->k + bytes;
            h->v = (const uint8_t *)h->v + bytes;
        }
    }
}

static int hand_on(struct rung *r, struct match *m, struct larder_err *e)
{
    uint32_t layer = r->keep.at_hand.layer;
    int rc = keep_collect(&r->keep, e);

    if (rc)
        return rc;
    drop_unseen(r, layer);
    for (uint32_t g = 0; g < r->geom->n_kv_heads && rung_fits(r) && !rc; g++)
        rc = refit(r, g, m, e);
    if (!rc)
        rc = packer_layer(&r->packer, r->geom, r->policy->precision, r->keep.heads, e);
    if (!rc && r->sink && r->sink->layer)
        rc = r->sink->layer(r->sink->arg, layer, r->keep.heads, e);
    return rc;
}

int rung_choose(struct rung *r, const struct layer_rows *x, struct larder_err *e)
{
    return keep_waits(&r->keep) ? hold_add(&r->hold, x, e) : keep_choose(&r->keep, x, e);
}

int rung_deliver(struct rung *r, struct match *m, struct larder_err *e)
{
    return keep_waits(&r->keep) ? 0 : hand_on(r, m, e);
}

int rung_end(struct rung *r, struct larder_err *e)
{
    int rc;

    if (!keep_waits(&r->keep))
        return 0;
    rc = keep_count_all(&r->keep, r->hold.layers, e);
    for (uint32_t l = 0; l < r->geom->n_layers && !rc; l++) {
        rc = keep_choose(&r->keep, &r->hold.layers[l], e);
        if (!rc)
            rc = hand_on(r, NULL, e);
    }
    return rc;
}

void rung_past(const struct rung *r, struct past_rows *past)
{
    for (uint32_t g = 0; g < r->geom->n_kv_heads; g++) {
        const struct kept_rows *h = &r->keep.heads[g];

        past[g] = (struct past_rows){h->n_rows, h->dtype, h->k, h->v, h->bias, h->position};
    }
}
