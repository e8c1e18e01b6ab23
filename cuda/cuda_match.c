/* cuda_match.c - attention matching of backend `cuda`.
 *
 * The one idea: the two fits of match_fit.c, for the KV heads of a layer side by side. All of them
 * go through the same products in batches, part of the document by part; only how many rows a head
 * keeps, and whether its matrix could be solved, differ. The host learns nothing but the latter. */
#include "cuda_match.h"

#include <math.h>

#include "cuda.h"
#include "engine.h"
#include "match.h"
#include "select_ops.h"

#define BIAS_COLUMNS 16u /* behind the matrix: the mass, and what aligned rows need */

/* A head's way up the ridges. */
struct climb {
    uint32_t tries, rounds;
};

struct fit {
    struct cuda_backend *b;
    const struct fit_rows *x;
    struct cuda_rows q, k, v;
    const float *sums;
    const void *kept_k[KV_MAX_HEADS]; /* what was kept of a head */
    const uint8_t *kept_v[KV_MAX_HEADS];
    uint64_t at[KV_MAX_HEADS]; /* of all kept rows, its first */
    const struct replay_part *part;
    uint32_t first[KV_MAX_HEADS], t[KV_MAX_HEADS]; /* its kept rows of the part */
    struct cuda_match_head head[KV_MAX_HEADS];     /* of a batch */
    struct climb climb[KV_MAX_HEADS];
    struct cuda_match_args a;
    uint32_t n_now; /* replay rows at once */
};

/* ---- memory */

/* Arrays one after the other, of which `at` is NULL while they are only counted. */
struct carve {
    uint8_t *at;
    uint64_t bytes;
};

static void *carve(struct carve *c, uint64_t count, uint64_t size)
{
    void *p = c->at ? c->at + c->bytes : NULL;

    c->bytes += (count * size + 255) / 256 * 256;
    return p;
}

/* Arrays of n_batch heads and n_now rows. */
static uint64_t lay_out(struct cuda_match_args *a, uint32_t n_batch, uint32_t n_now, uint8_t *at)
{
    struct carve c = {at, 0};
    uint64_t n_q = (uint64_t)a->group * n_now, d = a->d, f = sizeof(float);
    uint64_t wide = a->t_pad + (d > BIAS_COLUMNS ? d : BIAS_COLUMNS);

    a->head = carve(&c, n_batch, sizeof *a->head);
    a->verdict = carve(&c, n_batch, sizeof *a->verdict);
    a->q = carve(&c, n_batch * n_q, d * f);
    a->rows_k = carve(&c, (uint64_t)n_batch * a->n_rows, d * f);
    a->rows_v = carve(&c, (uint64_t)n_batch * a->n_rows, d * f);
    a->full = carve(&c, n_batch * n_q, a->n_rows * f);
    a->kept_k = carve(&c, (uint64_t)n_batch * a->t_pad, d * f);
    a->minus_v = carve(&c, (uint64_t)n_batch * a->t_pad, d * f);
    a->p = carve(&c, n_batch * n_q, wide * f);
    a->matrix = carve(&c, (uint64_t)n_batch * a->t_pad, wide * f);
    a->work = carve(&c, (uint64_t)n_batch * a->t_pad, a->t_pad * f);
    a->x = carve(&c, (uint64_t)n_batch * a->t_pad, d * f);
    a->weight = carve(&c, (uint64_t)n_batch * a->t_pad, f);
    a->fixed = carve(&c, (uint64_t)n_batch * a->t_pad, sizeof *a->fixed);
    return c.bytes;
}

/* As many heads as fit, or, if not even one does, fewer rows at once. */
static uint32_t batch_of(struct fit *f)
{
    struct cuda_match_args *a = &f->a;
    uint64_t room = f->b->logit_bytes, one;

    f->n_now = f->part->n;
    while (f->n_now > 16 && lay_out(a, 1, f->n_now, NULL) > room)
        f->n_now = cuda_blocks(f->n_now, 2);
    one = lay_out(a, 1, f->n_now, NULL);
    return room / one < 1 ? 1 : room / one > KV_MAX_HEADS ? KV_MAX_HEADS : (uint32_t)(room / one);
}

/* ---- steps on the device */

static int flat(struct fit *f, enum cuda_kernel k, uint64_t n, struct larder_err *e)
{
    return cuda_run(f->b, cuda_grid_flat(k, f->b->bf16, n, &f->a), e);
}

static int rows(struct fit *f, enum cuda_kernel k, uint32_t x, uint32_t y, struct larder_err *e)
{
    struct cuda_launch l = cuda_grid_rows(k, false, x, &f->a);

    l.grid[1] = y;
    return cuda_run(f->b, l, e);
}

static int send_heads(struct fit *f, struct larder_err *e)
{
    return cuda_up(f->b, f->a.head, f->head, f->a.n_batch * sizeof *f->head, e);
}

static int multiply(struct fit *f, struct cuda_gemm g, struct larder_err *e)
{
    g.batch = f->a.n_batch;
    return cuda_check(f->b, f->b->d->gemm(f->b->device, &g), "a matrix product", e);
}

static int widen(struct fit *f, const struct cuda_rows *from, uint32_t per_head, uint32_t row0,
                 uint32_t n, float scale, float *to, struct larder_err *e)
{
    struct cuda_widen_args w = {.from = from->device,
                                .to = to,
                                .stride = from->stride,
                                .row0 = row0,
                                .n = n,
                                .head0 = f->a.head0 * per_head,
                                .n_heads = f->a.n_batch * per_head,
                                .d = f->a.d,
                                .scale = scale};

    return cuda_run(f->b, cuda_grid_flat(CUDA_WIDEN, f->b->bf16, w.n_heads * w.n * w.d, &w), e);
}

/* Columns from t_pad on: the output of the full part, which p's share is then taken from. */
static int explain(struct fit *f, bool kept, struct larder_err *e)
{
    const struct cuda_match_args *a = &f->a;
    uint32_t n_q = a->group * a->n_now, n_in = kept ? a->t_pad : a->n_rows;
    struct cuda_gemm g = {.x = kept ? a->p : a->full,
                          .w = kept ? a->minus_v : a->rows_v,
                          .y = a->p + a->t_pad,
                          .ldx = kept ? a->wide : a->n_rows,
                          .ldy = a->wide,
                          .n = n_q,
                          .n_in = n_in,
                          .n_out = a->d,
                          .add = kept,
                          .w_tall = true,
                          .x_stride = (uint64_t)n_q * (kept ? a->wide : a->n_rows),
                          .w_stride = (uint64_t)n_in * a->d,
                          .y_stride = (uint64_t)n_q * a->wide};

    return multiply(f, g, e);
}

/* Logits of queries and keys [n][d]. */
static int logits(struct fit *f, const float *keys, uint32_t n, float *to, uint64_t ld,
                  struct larder_err *e)
{
    const struct cuda_match_args *a = &f->a;
    uint32_t n_q = a->group * a->n_now;
    struct cuda_gemm g = {.x = a->q,
                          .w = keys,
                          .y = to,
                          .ldx = a->d,
                          .ldy = ld,
                          .n = n_q,
                          .n_in = a->d,
                          .n_out = n,
                          .x_stride = (uint64_t)n_q * a->d,
                          .w_stride = (uint64_t)n * a->d,
                          .y_stride = n_q * ld};

    return multiply(f, g, e);
}

/* The normal equations, of which these queries are a share. */
static int equations(struct fit *f, struct larder_err *e)
{
    const struct cuda_match_args *a = &f->a;
    uint64_t far = (uint64_t)a->group * a->n_now * a->wide;
    struct cuda_gemm g = {.x = a->p,
                          .w = a->p,
                          .y = a->matrix,
                          .ldx = a->wide,
                          .ldy = a->wide,
                          .n = a->t_pad,
                          .n_in = a->group * a->n_now,
                          .n_out = a->wide,
                          .add = a->row0 > 0,
                          .x_tall = true,
                          .w_tall = true,
                          .x_stride = far,
                          .w_stride = far,
                          .y_stride = (uint64_t)a->t_pad * a->wide};

    return multiply(f, g, e);
}

static int add_up_some(struct fit *f, struct larder_err *e)
{
    struct cuda_match_args *a = &f->a;
    uint32_t n_q = a->group * a->n_now;
    int rc = widen(f, &f->q, a->group, f->x->ask->n_doc + f->part->first + a->row0, a->n_now,
                   (float)(1 / sqrt(a->d)), a->q, e);

    if (!rc && a->values)
        rc = logits(f, a->rows_k, a->n_rows, a->full, a->n_rows, e);
    if (!rc && a->values)
        rc = flat(f, CUDA_MATCH_FULL, (uint64_t)a->n_batch * n_q * a->n_rows, e);
    if (!rc && a->values)
        rc = explain(f, false, e);
    if (!rc)
        rc = logits(f, a->kept_k, a->t_pad, a->p, a->wide, e);
    if (!rc)
        rc = rows(f, CUDA_MATCH_WEIGH, cuda_blocks(n_q, CUDA_MATCH_WARPS), a->n_batch, e);
    if (!rc && a->values)
        rc = explain(f, true, e);
    return rc ? rc : equations(f, e);
}

static int add_up(struct fit *f, bool values, struct larder_err *e)
{
    struct cuda_match_args *a = &f->a;
    int rc = 0;

    a->values = values;
    a->wide = a->t_pad + (values ? a->d : BIAS_COLUMNS);
    for (a->row0 = 0; a->row0 < f->part->n && !rc; a->row0 += f->n_now) {
        a->n_now = f->part->n - a->row0 < f->n_now ? f->part->n - a->row0 : f->n_now;
        rc = add_up_some(f, e);
    }
    return rc;
}

/* ---- solving, up the ridges */

static bool start(struct fit *f)
{
    float ridge = (f->a.values ? RIDGE_VALUE : RIDGE_BIAS) * (float)(f->a.group * f->part->n);
    bool any = false;

    for (uint32_t i = 0; i < f->a.n_batch; i++) {
        struct cuda_match_head *h = &f->head[i];

        h->active = h->t > 0;
        h->fresh = true;
        h->ridge = ridge;
        f->climb[i] = (struct climb){0, 0};
        any = any || h->active;
    }
    return any;
}

static int solve(struct fit *f, struct larder_err *e)
{
    struct cuda_match_args *a = &f->a;
    uint64_t square = (uint64_t)a->t_pad * a->t_pad, tall = (uint64_t)a->t_pad * a->d;
    int rc = send_heads(f, e);

    if (!rc)
        rc = rows(f, CUDA_MATCH_REDUCE, a->t_pad, a->n_batch, e);
    for (uint32_t i = 0; i < a->n_batch && !rc; i++) {
        const struct cuda_solve s = {.a = a->work + i * square,
                                     .x = a->x + i * tall,
                                     .bad = &a->verdict[i].indefinite,
                                     .n = f->head[i].t,
                                     .cols = a->values ? a->d : 1,
                                     .ld = a->t_pad};

        if (f->head[i].active)
            rc = cuda_check(f->b, f->b->d->solve(f->b->device, &s), "solving", e);
    }
    if (rc)
        return rc;
    return a->values ? flat(f, CUDA_MATCH_VALUES, a->n_batch * tall, e)
                     : rows(f, CUDA_MATCH_TAKE, a->n_batch, 1, e);
}

/* What is next for a head that was solved for. */
static int judge(struct fit *f, uint32_t i, const struct cuda_match_verdict *v,
                 struct larder_err *e)
{
    struct cuda_match_head *h = &f->head[i];
    struct climb *c = &f->climb[i];

    if (v->indefinite || v->bad) {
        if (++c->tries == RIDGE_TRIES)
            return larder_fail(e, LARDER_ENUMERIC, "a matrix of %u rows is not positive definite",
                               h->t);
        c->rounds = 0;
        h->fresh = true;
        h->ridge *= RIDGE_STEP;
        return 0;
    }
    h->fresh = false;
    h->active = !f->a.values && v->out && ++c->rounds < BIAS_ROUNDS;
    return 0;
}

static int settle(struct fit *f, struct larder_err *e)
{
    struct cuda_match_verdict verdict[KV_MAX_HEADS];
    bool any = start(f);
    int rc = 0;

    while (any && !rc) {
        rc = solve(f, e);
        if (!rc)
            rc = cuda_down(f->b, verdict, f->a.verdict, f->a.n_batch * sizeof *verdict, e);
        any = false;
        for (uint32_t i = 0; i < f->a.n_batch && !rc; i++) {
            if (f->head[i].active)
                rc = judge(f, i, &verdict[i], e);
            any = any || f->head[i].active;
        }
    }
    return rc;
}

/* ---- parts of the document */

static int fit_batch(struct fit *f, struct larder_err *e)
{
    struct cuda_match_args *a = &f->a;
    uint64_t n = (uint64_t)a->n_batch * a->t_pad;
    int rc;

    for (uint32_t i = 0; i < a->n_batch; i++) {
        uint32_t g = a->head0 + i;
        uint64_t row = a->d * f->b->elem;

        f->head[i] = (struct cuda_match_head){
            .v = f->kept_v[g] + f->first[g] * row, .at = f->at[g] + f->first[g], .t = f->t[g]};
    }
    rc = send_heads(f, e);
    if (!rc)
        rc = widen(f, &f->k, 1, f->part->row, a->n_rows, 1, a->rows_k, e);
    if (!rc)
        rc = widen(f, &f->v, 1, f->part->row, a->n_rows, 1, a->rows_v, e);
    if (!rc)
        rc = flat(f, CUDA_MATCH_KEPT, n * a->d, e);
    if (!rc && f->x->with_bias)
        rc = add_up(f, false, e);
    if (!rc && f->x->with_bias)
        rc = settle(f, e);
    if (!rc && f->x->with_bias)
        rc = flat(f, CUDA_MATCH_BIAS, n, e);
    if (!rc)
        rc = add_up(f, true, e);
    return rc ? rc : settle(f, e);
}

static int fit_part(struct fit *f, struct larder_err *e)
{
    struct cuda_match_args *a = &f->a;
    uint32_t n_kv = f->b->base.p->geom.n_kv_heads, most = 0, n_batch;
    void *room = NULL;
    int rc;

    for (uint32_t g = 0; g < n_kv; g++)
        most = f->t[g] > most ? f->t[g] : most;
    if (!most)
        return 0;
    a->n_rows = f->part->n_rows;
    a->sums = f->sums + 2ull * f->part->first;
    a->t_pad = cuda_blocks(most, CUDA_MATCH_PAD) * CUDA_MATCH_PAD;
    n_batch = batch_of(f);
    n_batch = n_batch < n_kv ? n_batch : n_kv;
    rc = cuda_room(f->b, ROOM_LOGIT, lay_out(a, n_batch, f->n_now, NULL), &room, e);
    if (rc)
        return rc;
    lay_out(a, n_batch, f->n_now, room);
    for (a->head0 = 0; a->head0 < n_kv && !rc; a->head0 += n_batch) {
        a->n_batch = n_kv - a->head0 < n_batch ? n_kv - a->head0 : n_batch;
        rc = fit_batch(f, e);
    }
    return rc;
}

/* The kept rows of each head that lie in the part. */
static void find_rows(struct fit *f)
{
    for (uint32_t g = 0; g < f->b->base.p->geom.n_kv_heads; g++) {
        const struct kept_rows *h = &f->x->heads[g];
        uint32_t first = f->first[g] + f->t[g], end;

        while (first < h->n_rows && h->position[first] < f->part->row)
            first++;
        for (end = first; end < h->n_rows; end++)
            if (h->position[end] >= f->part->row + f->part->n_rows)
                break;
        f->first[g] = first;
        f->t[g] = end - first;
    }
}

/* ---- the call */

/* A head's rows to f32, as they are. */
static int widen_kept(struct fit *f, const uint8_t *from, uint32_t g, float *to,
                      struct larder_err *e)
{
    uint32_t n = f->x->heads[g].n_rows;
    struct cuda_widen_args w = {
        .from = from, .to = to + f->at[g] * f->a.d, .n = n, .n_heads = 1, .d = f->a.d, .scale = 1};

    return cuda_run(f->b, cuda_grid_flat(CUDA_WIDEN, f->b->bf16, (uint64_t)n * w.d, &w), e);
}

/* What was kept of the head, and what of it stays as it is. */
static int bring_head(struct fit *f, uint32_t g, float *to_k, float *to_v, struct larder_err *e)
{
    const struct kept_rows *h = &f->x->heads[g];
    uint8_t *k = NULL, *v = NULL;
    int rc = cuda_twin_need(f->b, h->k, &k, e);

    if (!rc)
        rc = cuda_twin_need(f->b, h->v, &v, e);
    f->kept_k[g] = k;
    f->kept_v[g] = v;
    if (!rc)
        rc = widen_kept(f, k, g, to_k, e);
    return rc ? rc : widen_kept(f, v, g, to_v, e);
}

/* Rows of no part keep their values, and have no bias. */
static int bring(struct fit *f, uint8_t *to_k, uint8_t *to_v, uint8_t *bias, struct larder_err *e)
{
    uint32_t n_kv = f->b->base.p->geom.n_kv_heads, count[KV_MAX_HEADS];
    uint64_t n = 0;
    void *keys = NULL;
    int rc = 0;

    f->a.to_v = (float *)(void *)to_v;
    f->a.bias = (float *)(void *)bias;
    for (uint32_t g = 0; g < n_kv && !rc; g++) {
        count[g] = f->x->heads[g].n_rows;
        f->at[g] = n;
        n += count[g];
        if (count[g])
            rc = bring_head(f, g, (float *)(void *)to_k, f->a.to_v, e);
    }
    if (!rc)
        rc = cuda_room(f->b, ROOM_KEYS, n * f->a.d * sizeof *f->a.keys, &keys, e);
    f->a.keys = keys;
    if (!rc && bias)
        rc = cuda_check(f->b, f->b->d->zero(f->b->device, bias, n * sizeof(float), CUDA_COMPUTE),
                        "clearing", e);
    return rc ? rc : cuda_keys_read_back(f->b, f->x->precision, f->kept_k, count, keys, e);
}

static int fit_parts(struct fit *f, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < f->x->ask->n_parts && !rc; i++) {
        f->part = &f->x->ask->part[i];
        find_rows(f);
        rc = fit_part(f, e);
    }
    return rc;
}

static int sources(struct fit *f, struct larder_err *e)
{
    const struct kv_geom *g = &f->b->base.p->geom;
    const struct replay_ask *x = f->x->ask;
    uint32_t n = x->n_doc + x->n_replay;
    uint8_t *sums = NULL;
    int rc = cuda_rows_in(f->b, x->q, ROOM_Q, g->n_heads, x->stride, n, &f->q, e);

    if (!rc)
        rc = cuda_rows_in(f->b, x->k, ROOM_K, g->n_kv_heads, x->stride, n, &f->k, e);
    if (!rc)
        rc = cuda_rows_in(f->b, f->x->v, ROOM_V, g->n_kv_heads, x->stride, n, &f->v, e);
    if (!rc)
        rc = cuda_source(f->b, x->sums, ROOM_SUMS_OUT,
                         2ull * g->n_heads * x->n_replay * sizeof *x->sums, false, &sums, e);
    f->sums = (const float *)(const void *)sums;
    return rc;
}

int cuda_fit(struct backend *base, const struct fit_rows *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    const struct kv_geom *g = &base->p->geom;
    uint8_t *to_k = NULL, *to_v = NULL, *bias = NULL;
    struct fit f = {.b = b, .x = x};
    uint64_t n = 0, bytes;
    int rc = sources(&f, e);

    for (uint32_t i = 0; i < g->n_kv_heads; i++)
        n += x->heads[i].n_rows;
    bytes = n * g->head_dim * sizeof *x->to_k;
    f.a = (struct cuda_match_args){.d = g->head_dim,
                                   .group = g->n_heads / g->n_kv_heads,
                                   .n_replay = x->ask->n_replay,
                                   .least = BIAS_MIN,
                                   .most = BIAS_MAX};
    if (!rc)
        rc = cuda_target(b, x->to_k, ROOM_TO_K, bytes, &to_k, e);
    if (!rc)
        rc = cuda_target(b, x->to_v, ROOM_TO_V, bytes, &to_v, e);
    if (!rc && x->with_bias)
        rc = cuda_target(b, x->bias, ROOM_BIAS, n * sizeof *x->bias, &bias, e);
    if (!rc)
        rc = bring(&f, to_k, to_v, bias, e);
    if (!rc)
        rc = fit_parts(&f, e);
    if (!rc)
        rc = cuda_deliver(b, x->to_k, to_k, bytes, e);
    if (!rc)
        rc = cuda_deliver(b, x->to_v, to_v, bytes, e);
    return rc || !bias ? rc : cuda_deliver(b, x->bias, bias, n * sizeof *x->bias, e);
}
