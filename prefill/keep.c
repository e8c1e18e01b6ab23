/* keep.c - from scores to gathered rows.
 *
 * The one idea: counts first, rows second (shape.h). Where a shape needs nothing but
 * budgets, the counts of all layers are fixed before the first one passes; where the heads
 * of one layer compete, each layer fixes its own; where all compete, the last one does. Rows that
 * a backend gathers are asked for when they are chosen and looked at when they are collected. */
#include "keep.h"

#include <string.h>

#include "mem.h"
#include "packed.h"
#include "select_ops.h"
#include "shape.h"

static int no_memory(struct larder_err *e, uint32_t n)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory for the kept rows of %u tokens", n);
}

static uint64_t row_bytes(const struct keep *k)
{
    return (uint64_t)kv_dtype_bytes(k->elem) * k->geom->head_dim;
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

/* Counts that are known before a layer passes; memory for those that the last one decides. */
static int count_early(struct keep *k, struct larder_err *e)
{
    enum shape_kind s = k->policy->shape;

    if (!counts_early(k) && s != SHAPE_GLOBAL)
        return 0;
    k->count = mem_alloc((uint64_t)k->geom->n_layers * k->geom->n_kv_heads, sizeof *k->count);
    if (!k->count)
        return no_memory(e, k->n);
    if (s == SHAPE_PYRAMID)
        count_pyramid(k);
    return s == SHAPE_SHARES || s == SHAPE_HEADS ? count_shares(k, e) : 0;
}

/* Rows that one layer's heads keep together, at most. */
static uint64_t room(const struct keep *k)
{
    uint32_t n_kv = k->geom->n_kv_heads;
    uint64_t most = 0;

    if (k->policy->shape == SHAPE_UNIFORM)
        return (uint64_t)k->rows * n_kv;
    if (!counts_early(k))
        return (uint64_t)k->n * n_kv;
    for (uint32_t l = 0; l < k->geom->n_layers; l++) {
        uint64_t n = 0;

        for (uint32_t g = 0; g < n_kv; g++)
            n += k->count[l * n_kv + g];
        most = n > most ? n : most;
    }
    return most;
}

/* leaves: for the host. */
static void *new_rows(const struct keep *k, uint64_t size, bool leaves)
{
    if (!k->select)
        return mem_aligned(k->n_out, size);
    return leaves ? backend_staging_new(k->b, k->n_out, size)
                  : backend_buffer_new(k->b, k->n_out, size);
}

static void free_rows(const struct keep *k, void *rows)
{
    if (k->select)
        backend_buffer_free(k->b, rows);
    else
        mem_free(rows);
}

int keep_init(struct keep *k, struct backend *b, const struct policy *p, uint32_t n, uint32_t rows,
              struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    uint32_t n_kv = geom->n_kv_heads;
    int rc = 0;

    *k = (struct keep){.b = b, .policy = p, .geom = geom, .elem = b->elem, .n = n, .rows = rows};
    if (rows < n) { /* or else rows are handed on where they are */
        rc = count_early(k, e);
        k->n_room = k->n_out = rc ? 0 : room(k);
    }
    if (rc)
        return rc;
    k->select = keep_waits(k) ? NULL : b->ops->select; /* those are the host's by then */
    k->changes = packed_type(p->precision) || (p->fit != FIT_NONE && k->n_room);
    k->stays = k->select && k->changes;
    if (k->select && !k->n_out && !k->stays)
        k->n_out = (uint64_t)n * n_kv; /* all leave, but they leave */
    k->now = mem_alloc(n_kv, sizeof *k->now);
    k->heads = mem_zalloc(n_kv, sizeof *k->heads);
    k->index = new_rows(k, sizeof *k->index, true);
    k->position = mem_alloc(k->n_out, sizeof *k->position);
    k->k = new_rows(k, row_bytes(k), !k->stays);
    k->v = new_rows(k, row_bytes(k), !k->stays);
    if (k->now && k->heads && k->index && k->position && k->k && k->v)
        return 0;
    return no_memory(e, n);
}

void keep_done(struct keep *k)
{
    mem_free(k->count);
    mem_free(k->now);
    mem_free(k->heads);
    free_rows(k, k->index);
    mem_free(k->position);
    free_rows(k, k->k);
    free_rows(k, k->v);
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

/* ---- choosing */

/* The rows of each head, by its own order. */
static int take(struct keep *k, const struct layer_rows *x, const struct scored_head *h,
                struct larder_err *e)
{
    int rc = backend_view(k->b, x->score, VIEW_READ, e);
    uint64_t at = 0;

    if (!rc && k->select)
        rc = backend_view(k->b, k->index, VIEW_WRITE, e);
    for (uint32_t g = 0; g < k->geom->n_kv_heads && !rc; g++) {
        rc = shape_take(&h[g], k->now[g], n_sure(k), k->index + at, e);
        at += k->now[g];
    }
    return rc;
}

/* The same where the scores are. A worth is the host's. */
static int take_there(struct keep *k, const struct layer_rows *x, struct larder_err *e)
{
    const struct top_rows t = {.score = x->score,
                               .n_heads = k->geom->n_kv_heads,
                               .ld = x->n,
                               .n = x->n,
                               .lo = k->policy->sink,
                               .hi = x->n - k->policy->n_obs,
                               .count = k->now,
                               .index = k->index};

    return k->select->top(k->b, &t, e);
}

static int choose(struct keep *k, const struct layer_rows *x, struct larder_err *e)
{
    uint32_t n_kv = k->geom->n_kv_heads;
    struct scored_head *h = mem_alloc(n_kv, sizeof *h);
    int rc = h ? 0 : no_memory(e, k->n);

    for (uint32_t g = 0; g < n_kv && !rc; g++)
        h[g] = head_of(k, x, g);
    if (!rc && k->policy->shape == SHAPE_LAYER) /* heads are compared here */
        rc = backend_view(k->b, x->score, VIEW_READ, e);
    if (!rc)
        rc = count_layer(k, x, h, e);
    if (!rc)
        rc = k->select && !x->worth ? take_there(k, x, e) : take(k, x, h, e);
    mem_free(h);
    return rc;
}

static int send(struct keep *k, const void *rows, void *to, struct larder_err *e)
{
    const struct gather x = {.from = rows,
                             .stride = k->at_hand.stride,
                             .n_heads = k->geom->n_kv_heads,
                             .row_bytes = (uint32_t)row_bytes(k),
                             .count = k->now,
                             .index = k->all ? NULL : k->index,
                             .to = to};

    return k->select->gather(k->b, &x, e);
}

/* Rows that nobody gathers: all of them, where they are. */
static bool stay_there(const struct keep *k)
{
    return k->all && (!k->select || k->stays);
}

int keep_choose(struct keep *k, const struct layer_rows *x, struct larder_err *e)
{
    int rc = 0;

    k->at_hand = *x;
    k->all = !x->score || !k->n_room;
    for (uint32_t g = 0; g < k->geom->n_kv_heads && k->all; g++)
        k->now[g] = x->n;
    if (!k->all)
        rc = choose(k, x, e);
    if (rc || !k->select || stay_there(k))
        return rc;
    rc = send(k, x->k, k->k, e);
    return rc ? rc : send(k, x->v, k->v, e);
}

/* ---- collecting */

/* index[] of head g into the buffers from row `at` on. */
static void gather_head(struct keep *k, uint32_t g, uint64_t at)
{
    uint64_t bytes = row_bytes(k), from = (uint64_t)g * k->at_hand.stride;
    const uint8_t *src_k = (const uint8_t *)k->at_hand.k + from * bytes;
    const uint8_t *src_v = (const uint8_t *)k->at_hand.v + from * bytes;

    for (uint64_t i = at; i < at + k->now[g]; i++) {
        memcpy(k->k + i * bytes, src_k + k->index[i] * bytes, bytes);
        memcpy(k->v + i * bytes, src_v + k->index[i] * bytes, bytes);
    }
}

/* Rows are handed on where they are. */
static void keep_all(struct keep *k)
{
    const struct layer_rows *x = &k->at_hand;
    uint64_t head = (uint64_t)x->stride * row_bytes(k);

    for (uint32_t g = 0; g < k->geom->n_kv_heads; g++)
        k->heads[g] = (struct kept_rows){
            x->n, x->position, (const uint8_t *)x->k + g * head, (const uint8_t *)x->v + g * head,
            NULL, k->elem};
}

static int wait_for(struct keep *k, struct larder_err *e)
{
    int rc = k->all ? 0 : backend_view(k->b, k->index, VIEW_READ, e);

    if (k->stays)
        return rc;
    if (!rc)
        rc = backend_view(k->b, k->k, VIEW_READ, e);
    return rc ? rc : backend_view(k->b, k->v, VIEW_READ, e);
}

int keep_collect(struct keep *k, struct larder_err *e)
{
    const uint32_t *position = k->at_hand.position;
    uint64_t at = 0, bytes = row_bytes(k);
    int rc = k->select ? wait_for(k, e) : 0;

    if (rc)
        return rc;
    if (stay_there(k)) {
        keep_all(k);
        return 0;
    }
    for (uint32_t g = 0; g < k->geom->n_kv_heads; g++) {
        uint32_t n = k->now[g];

        if (!k->select)
            gather_head(k, g, at);
        for (uint32_t i = 0; i < n; i++)
            k->position[at + i] = position[k->all ? i : k->index[at + i]];
        k->heads[g] = (struct kept_rows){
            n, k->position + at, k->k + at * bytes, k->v + at * bytes, NULL, k->elem};
        at += n;
    }
    return 0;
}
