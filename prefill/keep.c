/* keep.c - from scores to gathered rows.
 *
 * The one idea: counts first, rows second (shape.h). Where a shape needs nothing but
 * budgets, the counts of all layers are fixed before the first one passes; where the heads
 * of one layer compete, each layer fixes its own; where all compete, the last one does. */
#include "keep.h"

#include <string.h>

#include "mem.h"
#include "shape.h"

static int no_memory(struct larder_err *e, uint32_t n)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory for the kept rows of %u tokens", n);
}

static uint64_t row_bytes(const struct keep *k)
{
    return (uint64_t)kv_dtype_bytes(k->elem) * k->geom->head_dim;
}

/* Rows that one layer's heads keep together, at most. */
static uint64_t room(const struct keep *k)
{
    uint32_t n_kv = k->geom->n_kv_heads;

    if (k->rows >= k->n)
        return 0; /* rows are handed on where they are */
    if (k->policy->shape == SHAPE_UNIFORM)
        return (uint64_t)k->rows * n_kv;
    return (uint64_t)k->n * n_kv;
}

/* Heads as they are before any layer has passed. */
static void plain_heads(const struct keep *k, struct scored_head *h, uint32_t n_heads)
{
    for (uint32_t i = 0; i < n_heads; i++)
        h[i] = (struct scored_head){k->n, k->policy->sink, k->n - k->policy->n_obs, NULL, NULL};
}

/* Counts that follow from shares and the budget alone. */
static int count_shares(struct keep *k, struct larder_err *e)
{
    const struct policy *p = k->policy;
    uint32_t n_heads = k->geom->n_layers * k->geom->n_kv_heads;
    uint64_t total = shape_total(&p->rows, k->n, n_heads);
    struct scored_head *h = mem_alloc(n_heads, sizeof *h);
    int rc = 0;

    if (!h)
        return no_memory(e, k->n);
    plain_heads(k, h, n_heads);
    if (p->shape == SHAPE_HEADS)
        rc = shape_heads(h, n_heads, p->shares, total, k->count, e);
    else
        shape_shares(h, n_heads, p->shares, total, k->count);
    mem_free(h);
    return rc;
}

static void count_pyramid(struct keep *k)
{
    const struct policy *p = k->policy;
    uint32_t n_kv = k->geom->n_kv_heads, stay = p->sink + p->n_obs;
    double rows = policy_rows_exact(&p->rows, k->n);

    for (uint32_t i = 0; i < k->geom->n_layers * n_kv; i++)
        k->count[i] = shape_pyramid(rows, k->n, stay, k->geom->n_layers, i / n_kv);
}

static bool counts_early(const struct keep *k)
{
    enum shape_kind s = k->policy->shape;

    return s == SHAPE_SHARES || s == SHAPE_HEADS || s == SHAPE_PYRAMID;
}

int keep_init(struct keep *k, const struct policy *p, const struct kv_geom *geom,
              enum kv_dtype elem, uint32_t n, uint32_t rows, struct larder_err *e)
{
    uint32_t n_kv = geom->n_kv_heads;

    *k = (struct keep){.policy = p, .geom = geom, .elem = elem, .n = n, .rows = rows};
    k->n_room = room(k);
    k->now = mem_alloc(n_kv, sizeof *k->now);
    k->heads = mem_zalloc(n_kv, sizeof *k->heads);
    k->index = mem_alloc(k->n_room ? n : 0, sizeof *k->index);
    k->position = mem_alloc(k->n_room, sizeof *k->position);
    k->k = mem_aligned(k->n_room, row_bytes(k));
    k->v = mem_aligned(k->n_room, row_bytes(k));
    if (!k->now || !k->heads || !k->index || !k->position || !k->k || !k->v)
        return no_memory(e, n);
    if (!k->n_room || (!counts_early(k) && p->shape != SHAPE_GLOBAL))
        return 0;
    k->count = mem_alloc((uint64_t)geom->n_layers * n_kv, sizeof *k->count);
    if (!k->count)
        return no_memory(e, n);
    if (p->shape == SHAPE_PYRAMID)
        count_pyramid(k);
    return counts_early(k) && p->shape != SHAPE_PYRAMID ? count_shares(k, e) : 0;
}

void keep_done(struct keep *k)
{
    mem_free(k->count);
    mem_free(k->now);
    mem_free(k->heads);
    mem_free(k->index);
    mem_free(k->position);
    mem_free(k->k);
    mem_free(k->v);
    *k = (struct keep){0};
}

bool keep_needs_scores(const struct keep *k, uint32_t n)
{
    return k->n_room && (k->count || n > k->rows);
}

bool keep_waits(const struct keep *k)
{
    return k->n_room && k->policy->shape == SHAPE_GLOBAL;
}

static struct scored_head head_of(const struct keep *k, const struct layer_rows *x, uint32_t g)
{
    uint64_t at = (uint64_t)g * x->n;

    return (struct scored_head){x->n, k->policy->sink, x->n - k->policy->n_obs, x->score + at,
                                x->worth ? x->worth + at : NULL};
}

int keep_count_all(struct keep *k, const struct layer_rows *layers, struct larder_err *e)
{
    uint32_t n_kv = k->geom->n_kv_heads, n_heads = k->geom->n_layers * n_kv;
    struct scored_head *h = mem_alloc(n_heads, sizeof *h);
    int rc;

    if (!h)
        return no_memory(e, k->n);
    for (uint32_t i = 0; i < n_heads; i++)
        h[i] = head_of(k, &layers[i / n_kv], i % n_kv);
    rc = shape_compete(h, n_heads, shape_total(&k->policy->rows, k->n, n_heads), 0, k->count, e);
    mem_free(h);
    return rc;
}

/* Rows that each head of a layer is sure of where heads compete. */
static uint32_t n_sure(const struct keep *k)
{
    uint32_t rows = (uint32_t)(k->rows * (k->policy->guard / 100));

    if (k->policy->shape != SHAPE_LAYER || k->policy->guard == 0)
        return 0;
    return rows ? rows : 1;
}

/* Without a guarantee there is no budget per head, and the layer's own is rounded once. */
static int count_layer(struct keep *k, const struct layer_rows *x, const struct scored_head *h,
                       struct larder_err *e)
{
    uint32_t n_kv = k->geom->n_kv_heads, sure = n_sure(k);
    uint64_t total = sure ? (uint64_t)k->rows * n_kv : shape_total(&k->policy->rows, k->n, n_kv);

    if (k->policy->shape == SHAPE_LAYER)
        return shape_compete(h, n_kv, total, sure, k->now, e);
    shape_uniform(h, n_kv, k->rows, k->now);
    for (uint32_t g = 0; g < n_kv && k->count; g++) {
        uint32_t count = k->count[x->layer * n_kv + g];

        k->now[g] = count < x->n ? count : x->n;
    }
    return 0;
}

/* index[] of head g into the buffers from row `at` on. */
static void gather(struct keep *k, const struct layer_rows *x, uint32_t g, uint64_t at)
{
    uint64_t bytes = row_bytes(k), from = (uint64_t)g * x->stride;
    const uint8_t *src_k = (const uint8_t *)x->k + from * bytes;
    const uint8_t *src_v = (const uint8_t *)x->v + from * bytes;
    uint32_t n = k->now[g];

    for (uint32_t i = 0; i < n; i++) {
        memcpy(k->k + (at + i) * bytes, src_k + k->index[i] * bytes, bytes);
        memcpy(k->v + (at + i) * bytes, src_v + k->index[i] * bytes, bytes);
        k->position[at + i] = x->position[k->index[i]];
    }
    k->heads[g] = (struct kept_rows){n,    k->position + at, k->k + at * bytes, k->v + at * bytes,
                                     NULL, k->elem};
}

static void keep_all(struct keep *k, const struct layer_rows *x)
{
    uint64_t head = (uint64_t)x->stride * row_bytes(k);

    for (uint32_t g = 0; g < k->geom->n_kv_heads; g++)
        k->heads[g] = (struct kept_rows){
            x->n, x->position, (const uint8_t *)x->k + g * head, (const uint8_t *)x->v + g * head,
            NULL, k->elem};
}

int keep_layer(struct keep *k, const struct layer_rows *x, struct larder_err *e)
{
    uint32_t n_kv = k->geom->n_kv_heads;
    struct scored_head *h;
    uint64_t at = 0;
    int rc;

    if (!x->score || !k->n_room) { /* nothing to choose, and no buffers to choose into */
        keep_all(k, x);
        return 0;
    }
    h = mem_alloc(n_kv, sizeof *h);
    if (!h)
        return no_memory(e, k->n);
    for (uint32_t g = 0; g < n_kv; g++)
        h[g] = head_of(k, x, g);
    rc = count_layer(k, x, h, e);
    for (uint32_t g = 0; g < n_kv && !rc; g++) {
        rc = shape_take(&h[g], k->now[g], n_sure(k), k->index, e);
        if (!rc)
            gather(k, x, g, at);
        at += k->now[g];
    }
    mem_free(h);
    return rc;
}
