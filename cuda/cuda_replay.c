/* cuda_replay.c - replay scores of backend `cuda`.
 *
 * The one idea: a part's logits are products of queries with the keys of its normaliser, a few
 * heads at a time (and, in parts of thousands of rows, a few rows), so that they fit in the
 * window's memory; what is taken from them is small enough to be kept for all heads of the part. */
#include "cuda_replay.h"

#include <math.h>

#include "cuda.h"
#include "replay.h"
#include "select_ops.h"

/* One part, on the device. */
struct part {
    struct cuda_backend *b;
    struct cuda_replay_args a;
    const uint8_t *q, *k;
    uint64_t q_stride, k_stride; /* rows of a head */
    uint32_t first;              /* row of the first query */
    uint32_t n_now, n_batch;     /* rows and heads at once */
};

/* Columns by sixteens: products like aligned rows. */
static uint32_t whole(uint32_t n)
{
    return cuda_blocks(n, 16) * 16;
}

/* Columns, rows and heads of the logits, from shapes alone. */
static void lay_out(struct part *p, const struct replay_ask *x, const struct replay_part *part)
{
    const struct kv_geom *g = &p->b->base.p->geom;
    struct cuda_replay_args *a = &p->a;
    uint64_t fit;

    *a = (struct cuda_replay_args){.n_rows = part->n_rows,
                                   .n = part->n,
                                   .n_kv = g->n_kv_heads,
                                   .group = g->n_heads / g->n_kv_heads,
                                   .n_doc = x->n_doc,
                                   .n_replay = x->n_replay,
                                   .row = part->row,
                                   .scale = (float)(1 / sqrt(g->head_dim)),
                                   .own = !x->square,
                                   .square = x->square,
                                   .n_queries = x->n_queries};
    a->n_sinks = part->row < REPLAY_SINKS ? part->row : REPLAY_SINKS;
    a->at_rows = whole(a->n_sinks);
    a->at_own = a->at_rows + whole(part->n_rows);
    a->ld = a->at_own + (a->own ? whole(part->n) : 0);
    a->n_blocks = cuda_blocks(part->n, CUDA_REPLAY_ROWS);
    fit = p->b->logit_bytes / (a->ld * sizeof *a->logit) / CUDA_REPLAY_ROWS * CUDA_REPLAY_ROWS;
    p->n_now = fit < CUDA_REPLAY_ROWS ? CUDA_REPLAY_ROWS : fit < part->n ? (uint32_t)fit : part->n;
    fit = p->n_now ? p->b->logit_bytes / (p->n_now * a->ld * sizeof *a->logit) : 0;
    p->n_batch = fit < 1 ? 1 : fit < g->n_heads ? (uint32_t)fit : g->n_heads;
    p->first = x->n_doc + part->first;
}

static int rooms(struct part *p, struct larder_err *e)
{
    struct cuda_replay_args *a = &p->a;
    uint64_t rows = (uint64_t)p->n_batch * p->n_now;
    uint64_t parts = (uint64_t)a->n_kv * a->group * a->n_blocks;
    void *logit = NULL, *stat = NULL, *part = NULL;
    int rc = cuda_room(p->b, ROOM_LOGIT, rows * a->ld * sizeof *a->logit, &logit, e);

    if (!rc)
        rc = cuda_room(p->b, ROOM_STAT, rows * 2 * sizeof *a->stat, &stat, e);
    if (!rc)
        rc = cuda_room(p->b, ROOM_SUMS, parts * a->n_rows * sizeof *a->part, &part, e);
    a->logit = logit;
    a->stat = stat;
    a->part = part;
    return rc;
}

/* Logits of heads that share a KV head with keys key .. key+n-1, at a column. */
static int multiply(const struct part *p, uint32_t batch, uint32_t n_heads, uint32_t key,
                    uint32_t n, uint32_t at, struct larder_err *e)
{
    const struct cuda_replay_args *a = &p->a;
    uint32_t h = a->head0 + batch, d = p->b->base.p->geom.head_dim;
    uint64_t row = d * p->b->elem, query = h * p->q_stride + p->first + a->row0;
    struct cuda_gemm g = {.x = p->q + query * row,
                          .w = p->k + (h / a->group * p->k_stride + key) * row,
                          .y = a->logit + (uint64_t)batch * a->n_now * a->ld + at,
                          .ldx = d,
                          .ldy = a->ld,
                          .n = a->n_now,
                          .n_in = d,
                          .n_out = n,
                          .bf16 = p->b->bf16,
                          .batch = n_heads,
                          .x_stride = p->q_stride * d,
                          .y_stride = a->n_now * a->ld};

    return n ? cuda_check(p->b, p->b->d->gemm(p->b->device, &g), "a matrix product", e) : 0;
}

/* Logits of the heads of a batch, KV head by KV head. */
static int logits(const struct part *p, struct larder_err *e)
{
    const struct cuda_replay_args *a = &p->a;
    int rc = 0;

    for (uint32_t i = 0, n; i < a->n_batch && !rc; i += n) {
        n = a->group - (a->head0 + i) % a->group;
        n = n < a->n_batch - i ? n : a->n_batch - i;
        rc = multiply(p, i, n, 0, a->n_sinks, 0, e);
        if (!rc)
            rc = multiply(p, i, n, a->row, a->n_rows, a->at_rows, e);
        if (!rc && a->own) /* none sees further than the last */
            rc = multiply(p, i, n, p->first, a->row0 + a->n_now, a->at_own, e);
    }
    return rc;
}

static int score_batch(const struct part *p, struct larder_err *e)
{
    const struct cuda_replay_args *a = &p->a;
    struct cuda_launch l =
        cuda_grid_rows(CUDA_REPLAY_STATS, false, cuda_blocks(a->n_now, CUDA_REPLAY_WARPS), a);
    int rc = logits(p, e);

    l.grid[1] = a->n_batch;
    if (!rc)
        rc = cuda_run(p->b, l, e);
    l = cuda_grid_rows(CUDA_REPLAY_PART, false, cuda_blocks(a->n_rows, CUDA_ROW_BLOCK), a);
    l.grid[1] = cuda_blocks(a->n_now, CUDA_REPLAY_ROWS);
    l.grid[2] = a->n_batch;
    return rc ? rc : cuda_run(p->b, l, e);
}

static int score_part(struct part *p, struct larder_err *e)
{
    struct cuda_replay_args *a = &p->a;
    uint32_t n_heads = a->n_kv * a->group;
    int rc = rooms(p, e);

    for (a->head0 = 0; a->head0 < n_heads && !rc; a->head0 += p->n_batch) {
        a->n_batch = n_heads - a->head0 < p->n_batch ? n_heads - a->head0 : p->n_batch;
        for (a->row0 = 0; a->row0 < a->n && !rc; a->row0 += p->n_now) {
            a->n_now = a->n - a->row0 < p->n_now ? a->n - a->row0 : p->n_now;
            rc = score_batch(p, e);
        }
    }
    if (!rc)
        rc = cuda_run(
            p->b, cuda_grid_flat(CUDA_REPLAY_SCORE, false, (uint64_t)a->n_kv * a->n_rows, a), e);
    return rc;
}

/* What a replay row's probabilities are multiplied by, in replay+. */
static int send_weights(struct cuda_backend *b, const struct replay_ask *x, uint32_t n_replay,
                        const float **worth, const float **length, struct larder_err *e)
{
    uint64_t n = (uint64_t)b->base.p->geom.n_heads * x->n_doc;
    uint8_t *to = NULL;
    int rc = 0;

    if (x->worth)
        rc = cuda_source(b, x->worth, ROOM_WORTH, n * sizeof **worth, false, &to, e);
    *worth = (const float *)(const void *)to;
    to = NULL;
    if (!rc && x->length)
        rc = cuda_source(b, x->length, ROOM_LENGTH, n_replay * sizeof **length, false, &to, e);
    *length = (const float *)(const void *)to;
    return rc;
}

static uint32_t last_row(const struct replay_ask *x)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < x->n_parts; i++)
        if (x->part[i].first + x->part[i].n > n)
            n = x->part[i].first + x->part[i].n;
    return n;
}

int cuda_replay(struct backend *base, const struct replay_ask *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    const struct kv_geom *g = &base->p->geom;
    uint64_t bytes = (uint64_t)g->n_kv_heads * x->n_doc * sizeof *x->score;
    uint64_t sum_bytes = 2ull * g->n_heads * x->n_replay * sizeof *x->sums;
    uint32_t n_replay = last_row(x);
    const float *worth = NULL, *length = NULL;
    struct cuda_rows q, k;
    uint8_t *score = NULL, *sums = NULL;
    int rc = cuda_rows_in(b, x->q, ROOM_Q, g->n_heads, x->stride, x->n_doc + n_replay, &q, e);

    if (!rc)
        rc = cuda_rows_in(b, x->k, ROOM_K, g->n_kv_heads, x->stride, x->n_doc + n_replay, &k, e);
    if (!rc)
        rc = send_weights(b, x, n_replay, &worth, &length, e);
    if (!rc)
        rc = cuda_target(b, x->score, ROOM_SCORE, bytes, &score, e);
    if (!rc)
        rc = cuda_check(b, b->d->zero(b->device, score, bytes, CUDA_COMPUTE), "clearing", e);
    if (!rc && x->sums)
        rc = cuda_target(b, x->sums, ROOM_SUMS_OUT, sum_bytes, &sums, e);
    for (uint32_t i = 0; i < x->n_parts && !rc; i++) {
        struct part p = {
            .b = b, .q = q.device, .k = k.device, .q_stride = q.stride, .k_stride = k.stride};

        lay_out(&p, x, &x->part[i]);
        p.a.score = (double *)(void *)score;
        p.a.worth = worth;
        p.a.length = length ? length + x->part[i].first : NULL;
        p.a.sums = sums ? (float *)(void *)sums + 2ull * x->part[i].first : NULL;
        rc = p.n_now ? score_part(&p, e) : 0;
    }
    if (!rc && x->sums)
        rc = cuda_deliver(b, x->sums, sums, sum_bytes, e);
    return rc ? rc : cuda_deliver(b, x->score, score, bytes, e);
}
