/* cuda_attention.c - attention of backend `cuda`: inside one sequence, and on top of stored rows.
 *
 * The one idea: both are the same rows of queries over the same list of keys, stored ones (if any)
 * before the sequence's own. Stored rows are read where they are and as they are; where some are
 * packed or wider than bf16 that takes the kernel that computes in f32. */
#include "cuda.h"

#include <math.h>

static bool all_bf16(const struct past_rows *p, uint32_t n)
{
    for (uint32_t h = 0; p && h < n; h++)
        if (p[h].n_rows && p[h].dtype != KV_BF16)
            return false;
    return true;
}

static uint32_t longest(const struct past_rows *p, uint32_t n)
{
    uint32_t max = 0;

    for (uint32_t h = 0; p && h < n; h++)
        max = p[h].n_rows > max ? p[h].n_rows : max;
    return max;
}

/* One kernel, or two where few rows see many keys. */
static int launch(struct cuda_backend *b, struct cuda_attend_args *a, const struct past_rows *past,
                  struct larder_err *e)
{
    uint32_t n_kv = b->base.p->geom.n_kv_heads;
    struct cuda_launch l = cuda_grid_attend(a, b->bf16, all_bf16(past, n_kv));
    void *part = NULL;
    int rc = 0;

    if (l.kernel != CUDA_ATTEND)
        return cuda_run(b, l, e);
    a->n_splits = l.grid[2] = cuda_attend_splits(a, longest(past, n_kv) + a->n_tail);
    if (a->n_splits > 1)
        rc = cuda_room(b, ROOM_PART,
                       (uint64_t)(a->n_rows - a->row0) * a->n_heads * a->n_splits * (a->d + 2) *
                           sizeof(float),
                       &part, e);
    a->part = part;
    if (!rc)
        rc = cuda_run(b, l, e);
    if (rc || a->n_splits == 1)
        return rc;
    return cuda_run(b, cuda_grid_merge(a, b->bf16), e);
}

/* Rows row0 and up of the new ones. */
static int attention(struct cuda_backend *b, const struct resume *r, uint32_t row0,
                     struct larder_err *e)
{
    const struct kv_geom *g = &b->base.p->geom;
    uint64_t row = (uint64_t)g->n_heads * g->head_dim * b->elem;
    struct cuda_attend_args a = {.n_heads = g->n_heads,
                                 .group = g->n_heads / g->n_kv_heads,
                                 .d = g->head_dim,
                                 .n_rows = r->n_new,
                                 .row0 = row0,
                                 .n_tail = r->n_tail,
                                 .sliding = r->sliding,
                                 .pos0 = r->pos0,
                                 .n_splits = 1,
                                 .scale = (float)(1 / sqrt(g->head_dim))};
    struct cuda_past *past = NULL;
    struct cuda_rows q, k, v, o;
    int rc = r->past ? cuda_past_find(b, r->past, &past, e) : 0;

    if (!rc)
        rc = cuda_rows_in(b, r->q, ROOM_Q, g->n_heads, r->q_stride, r->n_new, &q, e);
    if (!rc)
        rc = cuda_rows_in(b, r->k, ROOM_K, g->n_kv_heads, r->stride, r->n_tail, &k, e);
    if (!rc)
        rc = cuda_rows_in(b, r->v, ROOM_V, g->n_kv_heads, r->stride, r->n_tail, &v, e);
    if (!rc)
        rc = cuda_rows_out(b, r->o, ROOM_O, 1, (uint64_t)r->n_new * g->n_heads,
                           r->n_new * g->n_heads, &o, e);
    if (rc)
        return rc;
    a.past = past;
    a.q = q.device;
    a.k = k.device;
    a.v = v.device;
    a.o = o.device;
    a.q_stride = q.stride;
    a.kv_stride = k.stride;
    rc = launch(b, &a, r->past, e);
    if (!rc && r->past)
        rc = cuda_past_ahead(b, r->past, e);
    if (!rc && o.copied) /* rows before row0 are the caller's */
        rc = cuda_down(b, (uint8_t *)r->o + row0 * row, o.device + row0 * row,
                       (r->n_new - row0) * row, e);
    return rc;
}

int cuda_attend(struct backend *base, const struct attend *t, struct larder_err *e)
{
    const struct resume r = {.q = t->q,
                             .k = t->k,
                             .v = t->v,
                             .n_new = t->n,
                             .n_tail = t->n,
                             .q_stride = t->stride,
                             .stride = t->stride,
                             .o = t->o,
                             .sliding = t->sliding};

    return attention(cuda_of(base), &r, t->row0, e);
}

int cuda_resume(struct backend *base, const struct resume *r, struct larder_err *e)
{
    return attention(cuda_of(base), r, 0, e);
}
