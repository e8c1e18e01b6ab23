/* cuda_resume.c - new rows on top of stored ones.
 *
 * The one idea: a KV head's stored rows, however they are stored, are expanded in front of the
 * sequence's own, so that attention is the same as inside one sequence, with a different number of
 * keys in each head. Where any head's rows are packed or wider than T, keys and values are f32:
 * codes are used as they are, without another rounding. */
#include "cuda.h"

#include <math.h>
#include <string.h>

#include "mem.h"
#include "packed.h"

struct joined {
    uint8_t *k, *v; /* [n_kv_heads][stride][head_dim] */
    float *bias;    /* [n_kv_heads][bias_stride] or NULL */
    uint32_t *n_past;
    uint64_t stride, bias_stride;
    bool wide;
};

static uint32_t longest(const struct past_rows *p, uint32_t n)
{
    uint32_t max = 0;

    for (uint32_t h = 0; h < n; h++)
        max = p[h].n_rows > max ? p[h].n_rows : max;
    return max;
}

static bool any_bias(const struct past_rows *p, uint32_t n)
{
    for (uint32_t h = 0; h < n; h++)
        if (p[h].bias && p[h].n_rows)
            return true;
    return false;
}

static bool any_wider(const struct cuda_backend *b, const struct past_rows *p, uint32_t n)
{
    for (uint32_t h = 0; h < n; h++)
        if (p[h].n_rows && p[h].dtype != KV_BF16 && b->bf16)
            return true;
    return !b->bf16;
}

/* Keys or values of one head to its place. */
static int expand(struct cuda_backend *b, const struct past_rows *p, bool keys, bool wide, void *to,
                  struct larder_err *e)
{
    uint32_t d = b->base.p->geom.head_dim;
    const void *from = keys ? p->k : p->v;
    uint64_t bytes =
        keys ? tile_bytes_k(p->dtype, p->n_rows, d) : tile_bytes_v(p->dtype, p->n_rows, d);
    struct packed_parts parts =
        keys ? packed_parts_k(p->dtype, p->n_rows, d) : packed_parts_v(p->dtype, p->n_rows, d);
    struct cuda_past_args a = {.dst = to,
                               .n_rows = p->n_rows,
                               .d = d,
                               .dtype = p->dtype,
                               .keys = keys,
                               .n_exact = parts.n_exact,
                               .scales = parts.scales,
                               .codes = parts.codes,
                               .wide = wide};
    uint8_t *device = NULL;
    void *tile = NULL;
    int rc;

    if (!p->n_rows)
        return 0;
    rc = cuda_twin_find(b, from, false, &device, e);
    if (!rc && !device) {
        rc = cuda_room(b, ROOM_TILE, bytes, &tile, e);
        device = tile;
        if (!rc)
            rc = cuda_up(b, tile, from, bytes, e);
    }
    a.src = device;
    if (rc)
        return rc;
    return cuda_run(b, cuda_grid_flat(CUDA_PAST, b->bf16, (uint64_t)p->n_rows * d, &a), e);
}

/* Biases, zero where a head has none. */
static int send_bias(struct cuda_backend *b, const struct past_rows *p, struct joined *j,
                     struct larder_err *e)
{
    uint32_t n_kv = b->base.p->geom.n_kv_heads;
    uint64_t bytes = n_kv * j->bias_stride * sizeof(float);
    void *to = NULL;
    int rc = cuda_room(b, ROOM_BIAS, bytes, &to, e);

    j->bias = to;
    if (!rc)
        rc = cuda_check(b, b->d->zero(b->device, to, bytes, CUDA_COMPUTE), "clearing", e);
    for (uint32_t h = 0; h < n_kv && !rc; h++)
        if (p[h].bias && p[h].n_rows)
            rc = cuda_up(b, j->bias + h * j->bias_stride, p[h].bias,
                         p[h].n_rows * sizeof(float), e);
    return rc;
}

static int send_counts(struct cuda_backend *b, const struct past_rows *p, struct joined *j,
                       struct larder_err *e)
{
    uint32_t n_kv = b->base.p->geom.n_kv_heads, n[KV_MAX_HEADS];
    void *to = NULL;
    int rc = cuda_room(b, ROOM_N_PAST, n_kv * sizeof *n, &to, e);

    for (uint32_t h = 0; h < n_kv; h++)
        n[h] = p[h].n_rows;
    j->n_past = to;
    return rc ? rc : cuda_up(b, to, n, n_kv * sizeof *n, e);
}

/* The sequence's own rows behind the stored ones. */
static int append(struct cuda_backend *b, const struct resume *r, const void *rows,
                  enum cuda_room room, const struct joined *j, void *to, struct larder_err *e)
{
    const struct kv_geom *g = &b->base.p->geom;
    struct cuda_rows from;
    struct cuda_tail_args a;
    int rc = cuda_rows_in(b, rows, room, g->n_kv_heads, r->stride, r->n_tail, &from, e);

    if (rc)
        return rc;
    a = (struct cuda_tail_args){.src = from.device,
                                .dst = to,
                                .n_past = j->n_past,
                                .stride = from.stride,
                                .dst_stride = j->stride,
                                .n = r->n_tail,
                                .d = g->head_dim,
                                .n_kv = g->n_kv_heads,
                                .wide = j->wide};
    return cuda_run(
        b,
        cuda_grid_flat(CUDA_TAIL, b->bf16, (uint64_t)g->n_kv_heads * r->n_tail * g->head_dim, &a),
        e);
}

static int join_rows(struct cuda_backend *b, const struct resume *r, struct joined *j,
                     struct larder_err *e)
{
    const struct kv_geom *g = &b->base.p->geom;
    uint64_t elem, head;
    void *k = NULL, *v = NULL;
    int rc;

    j->wide = any_wider(b, r->past, g->n_kv_heads);
    j->bias_stride = longest(r->past, g->n_kv_heads);
    j->stride = j->bias_stride + r->n_tail;
    elem = j->wide ? sizeof(float) : b->elem;
    head = j->stride * g->head_dim * elem;
    rc = cuda_room(b, ROOM_PAST_K, g->n_kv_heads * head, &k, e);
    if (!rc)
        rc = cuda_room(b, ROOM_PAST_V, g->n_kv_heads * head, &v, e);
    j->k = k;
    j->v = v;
    if (!rc)
        rc = send_counts(b, r->past, j, e);
    if (!rc && any_bias(r->past, g->n_kv_heads))
        rc = send_bias(b, r->past, j, e);
    for (uint32_t h = 0; h < g->n_kv_heads && !rc; h++) {
        rc = expand(b, &r->past[h], true, j->wide, j->k + h * head, e);
        if (!rc)
            rc = expand(b, &r->past[h], false, j->wide, j->v + h * head, e);
    }
    if (!rc)
        rc = append(b, r, r->k, ROOM_K, j, j->k, e);
    return rc ? rc : append(b, r, r->v, ROOM_V, j, j->v, e);
}

int cuda_resume(struct backend *base, const struct resume *r, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    const struct kv_geom *g = &base->p->geom;
    struct cuda_attend_args a = {.n_heads = g->n_heads,
                                 .group = g->n_heads / g->n_kv_heads,
                                 .d = g->head_dim,
                                 .n_rows = r->n_new,
                                 .n_tail = r->n_tail,
                                 .scale = (float)(1 / sqrt(g->head_dim))};
    struct joined j = {0};
    struct cuda_rows q, o;
    int rc = join_rows(b, r, &j, e);

    if (!rc)
        rc = cuda_rows_in(b, r->q, ROOM_Q, g->n_heads, r->q_stride, r->n_new, &q, e);
    if (!rc)
        rc = cuda_rows_out(b, r->o, ROOM_O, 1, (uint64_t)r->n_new * g->n_heads,
                           r->n_new * g->n_heads, &o, e);
    if (rc)
        return rc;
    a.q = q.device;
    a.k = j.k;
    a.v = j.v;
    a.o = o.device;
    a.bias = j.bias;
    a.n_past = j.n_past;
    a.q_stride = q.stride;
    a.kv_stride = j.stride;
    a.bias_stride = j.bias_stride;
    rc = cuda_run(b, cuda_grid_attend(&a, b->bf16, b->bf16 && j.wide), e);
    if (!rc)
        rc = cuda_rows_back(b, r->o, &o, 1, (uint64_t)r->n_new * g->n_heads, r->n_new * g->n_heads,
                            e);
    return rc;
}
