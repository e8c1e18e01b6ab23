/* cuda_select.c - scores, ranks, choices and moves of backend `cuda`.
 *
 * The one idea: a call reads what the call before it left on the device and leaves its own result
 * there; what comes to the host is the number that a decision needs, the lists of rows that are
 * kept, and those rows. The kernels are those of cuda_select.cu and cuda_gather.cu. */
#include "cuda_select.h"

#include "cuda.h"
#include "select_ops.h"

/* n heads of ld scores, and one more row's worth that is read nowhere: the last head may be cut
 * short at `rows`. */
static int scores_in(struct cuda_backend *b, const double *score, uint32_t n_heads, uint64_t ld,
                     uint32_t rows, const double **ret, struct larder_err *e)
{
    uint8_t *at = NULL;
    int rc = cuda_source(b, score, ROOM_SCORE, ((n_heads - 1) * ld + rows) * sizeof *score, false,
                         &at, e);

    *ret = (const double *)(const void *)at;
    return rc;
}

/* The first row that is not finite, of n heads: an error that names it. */
static int check_bad(struct cuda_backend *b, const uint32_t *device, uint32_t n,
                     struct larder_err *e)
{
    uint32_t bad[KV_MAX_HEADS];
    int rc = cuda_down(b, bad, device, n * sizeof *bad, e);

    for (uint32_t i = 0; i < n && !rc; i++)
        if (bad[i] != UINT32_MAX)
            rc = larder_fail(e, LARDER_ENUMERIC,
                             "score of token %u is not finite; nothing was kept", bad[i]);
    return rc;
}

/* ---- scores */

static int window(struct backend *base, const struct window_score *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    const struct kv_geom *g = &base->p->geom;
    uint32_t m = x->of.n - x->of.w;
    struct cuda_pool_args a = {.ld = x->ld,
                               .n_kv = g->n_kv_heads,
                               .group = g->n_heads / g->n_kv_heads,
                               .m = m,
                               .kernel = x->pool_kernel,
                               .max = x->pool == POOL_MAX,
                               .share = x->share,
                               .n_unseen = x->n_unseen,
                               .unseen = x->unseen};
    uint64_t bytes = ((g->n_kv_heads - 1) * x->ld + m) * sizeof *x->score;
    uint8_t *to = NULL;
    float *mass = NULL;
    int rc = cuda_window_mass(b, &x->of, &mass, e);

    if (!rc)
        rc = cuda_target(b, x->score, ROOM_SCORE, bytes, &to, e);
    a.mass = mass;
    a.score = (double *)(void *)to;
    if (!rc)
        rc = cuda_run(b, cuda_grid_flat(CUDA_POOL, false, (uint64_t)a.n_kv * m, &a), e);
    return rc ? rc : cuda_deliver(b, x->score, to, bytes, e);
}

/* ---- ranks */

static int rank_tokens(struct cuda_backend *b, const struct token_rank *x, const double *token,
                       struct larder_err *e)
{
    struct cuda_rank_args a = {.token = token, .m = x->m};
    uint64_t bytes = x->m * sizeof *x->rank;
    void *bad = NULL;
    uint8_t *to = NULL;
    int rc = cuda_room(b, ROOM_BAD, sizeof *a.bad, &bad, e);

    if (!rc && x->rank)
        rc = cuda_target(b, x->rank, ROOM_INDEX, bytes, &to, e);
    a.bad = bad;
    a.rank = (uint32_t *)(void *)to;
    if (!rc) /* the last block looks for what is not finite */
        rc = cuda_run(b,
                      cuda_grid_rows(CUDA_RANK, false,
                                     (x->rank ? cuda_blocks(x->m, CUDA_ROW_BLOCK) : 0) + 1, &a),
                      e);
    if (!rc)
        rc = check_bad(b, bad, 1, e);
    return rc || !x->rank ? rc : cuda_deliver(b, x->rank, to, bytes, e);
}

static int rank(struct backend *base, const struct token_rank *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_tokens_args a = {.ld = x->ld, .n_heads = x->n_heads, .lo = x->lo, .m = x->m};
    uint64_t bytes = x->m * sizeof *x->token;
    uint8_t *to = NULL;
    int rc = scores_in(b, x->score, x->n_heads, x->ld, x->lo + x->m, &a.score, e);

    if (!rc)
        rc = cuda_target(b, x->token, ROOM_SUMS, bytes, &to, e);
    a.token = (double *)(void *)to;
    if (!rc)
        rc = cuda_run(b, cuda_grid_flat(CUDA_TOKENS, false, x->m, &a), e);
    if (!rc)
        rc = rank_tokens(b, x, a.token, e);
    return rc ? rc : cuda_deliver(b, x->token, to, bytes, e);
}

static int variance(struct backend *base, const struct rank_variance *x, double *ret,
                    struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_spread_args a = {.n_layers = x->n_layers,
                                 .m = x->m,
                                 .k = x->k,
                                 .n_blocks = cuda_blocks(x->m, CUDA_ROW_BLOCK)};
    double sum[2] = {0, 0}; /* squared distances, tokens */
    uint8_t *ranks = NULL;
    void *part = NULL;
    int rc = cuda_source(b, x->rank, ROOM_INDEX, (uint64_t)x->n_layers * x->m * sizeof *x->rank,
                         false, &ranks, e);

    if (!rc)
        rc = cuda_room(b, ROOM_SUMS, 2 * (a.n_blocks + 1) * sizeof *a.part, &part, e);
    if (rc)
        return rc;
    a.rank = (const uint32_t *)(const void *)ranks;
    a.ret = part;
    a.part = a.ret + 2;
    rc = cuda_run(b, cuda_grid_rows(CUDA_SPREAD, false, a.n_blocks, &a), e);
    if (!rc)
        rc = cuda_run(b, cuda_grid_rows(CUDA_SPREAD_SUM, false, 1, &a), e);
    if (!rc)
        rc = cuda_down(b, sum, a.ret, sizeof sum, e);
    if (!rc)
        *ret = sum[1] > 0 ? sum[0] / (x->n_layers * sum[1]) : 0;
    return rc;
}

/* ---- rows */

/* Counts of the heads, and where their lists begin. */
static int send_counts(struct cuda_backend *b, const struct top_rows *x, struct cuda_top_args *a,
                       uint64_t *ret_n, struct larder_err *e)
{
    uint32_t both[2 * KV_MAX_HEADS], n = x->n_heads;
    void *to = NULL;
    int rc = cuda_room(b, ROOM_COUNTS, 2 * n * sizeof *both, &to, e);
    uint64_t at = 0;

    for (uint32_t g = 0; g < n; g++) {
        both[g] = x->count[g];
        both[n + g] = (uint32_t)at;
        at += x->count[g];
    }
    a->count = to;
    a->at = a->count + n;
    *ret_n = at;
    return rc ? rc : cuda_up(b, to, both, 2 * n * sizeof *both, e);
}

static int top(struct backend *base, const struct top_rows *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_top_args a = {.ld = x->ld, .n = x->n, .lo = x->lo, .hi = x->hi};
    uint64_t n = 0;
    uint8_t *to = NULL;
    void *bad = NULL;
    int rc = scores_in(b, x->score, x->n_heads, x->ld, x->hi, &a.score, e);

    if (!rc)
        rc = send_counts(b, x, &a, &n, e);
    if (!rc)
        rc = cuda_room(b, ROOM_BAD, x->n_heads * sizeof *a.bad, &bad, e);
    if (!rc)
        rc = cuda_target(b, x->index, ROOM_INDEX, n * sizeof *x->index, &to, e);
    a.bad = bad;
    a.index = (uint32_t *)(void *)to;
    if (!rc)
        rc = cuda_run(b, cuda_grid_rows(CUDA_TOP, false, x->n_heads, &a), e);
    if (!rc)
        rc = check_bad(b, bad, x->n_heads, e);
    return rc ? rc : cuda_deliver(b, x->index, to, n * sizeof *x->index, e);
}

static uint32_t unit_of(const struct cuda_gather_args *a, uint32_t row_bytes)
{
    uintptr_t bits = (uintptr_t)a->from | (uintptr_t)a->to | row_bytes;

    return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

static int gather_head(struct cuda_backend *b, const struct gather *x, struct cuda_gather_args a,
                       struct larder_err *e)
{
    uint32_t unit = unit_of(&a, x->row_bytes);
    struct cuda_launch l;

    a.units = x->row_bytes / unit;
    l = cuda_grid_flat(CUDA_GATHER, false, a.n * a.units, &a);
    l.variant = unit;
    return cuda_run(b, l, e);
}

/* Chosen rows to `to` on the device. */
static int gather_rows(struct cuda_backend *b, const struct gather *x, const uint8_t *from,
                       uint64_t n, uint8_t *to, struct larder_err *e)
{
    uint8_t *index = NULL;
    uint64_t at = 0;
    int rc = 0;

    if (x->index)
        rc = cuda_source(b, x->index, ROOM_INDEX, n * sizeof *x->index, false, &index, e);
    for (uint32_t g = 0; g < x->n_heads && !rc; g++) {
        struct cuda_gather_args a = {.from = from + g * x->stride * x->row_bytes,
                                     .to = to + at * x->row_bytes,
                                     .n = x->count[g]};

        if (x->index)
            a.index = (const uint32_t *)(const void *)index + at;
        rc = gather_head(b, x, a, e);
        at += x->count[g];
    }
    return rc;
}

/* The first rows of each head need not be gathered to leave. */
static int send_heads(struct cuda_backend *b, const struct gather *x, const uint8_t *from,
                      struct larder_err *e)
{
    struct cuda_twin *t = cuda_twin_of(b, x->to);
    uint8_t *to = x->to;
    int rc = 0;

    if (t) {
        cuda_taken(b, t);
        t->on_device = false; /* they leave from where they are */
    }
    for (uint32_t g = 0; g < x->n_heads && !rc; g++) {
        uint64_t bytes = (uint64_t)x->count[g] * x->row_bytes;
        const uint8_t *rows = from + g * x->stride * x->row_bytes;

        rc = t ? cuda_leave(b, t, to, rows, bytes, e) : cuda_down(b, to, rows, bytes, e);
        to += bytes;
    }
    return rc;
}

static int gather(struct backend *base, const struct gather *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    const struct cuda_twin *t = cuda_twin_of(b, x->to);
    uint64_t n = 0, bytes;
    uint8_t *from = NULL, *to = NULL;
    void *moved = NULL;
    int rc =
        cuda_source(b, x->from, ROOM_FROM, x->n_heads * x->stride * x->row_bytes, false, &from, e);

    for (uint32_t g = 0; g < x->n_heads; g++)
        n += x->count[g];
    bytes = n * x->row_bytes;
    if (!rc && !x->index && (!t || t->staging))
        return send_heads(b, x, from, e);
    if (!rc && x->to == x->from) {
        rc = cuda_room(b, ROOM_MOVED, bytes, &moved, e);
        if (!rc)
            rc = gather_rows(b, x, from, n, moved, e);
    }
    if (!rc)
        rc = cuda_target(b, x->to, ROOM_MOVED, bytes, &to, e);
    if (!rc && moved && to != moved)
        rc = cuda_check(b, b->d->copy(b->device, to, moved, bytes, CUDA_ON_DEVICE, CUDA_COMPUTE),
                        "moving rows", e);
    else if (!rc && !moved)
        rc = gather_rows(b, x, from, n, to, e);
    return rc ? rc : cuda_deliver(b, x->to, to, bytes, e);
}

const struct select_ops cuda_select = {
    .window = window,
    .rank = rank,
    .variance = variance,
    .top = top,
    .gather = gather,
    .replay = cuda_replay,
    .pack = cuda_pack,
    .fit = cuda_fit,
};
