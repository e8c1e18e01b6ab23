/* cuda_forward.c - the forward pass of backend `cuda`: projections, MLP, window mass, logits.
 *
 * The one idea: rows go through the products CUDA_ROWS at a time, so that the workspace does not
 * grow with the document; hidden states, Q, K, V and O are whole, and stay on the device when
 * the caller lets them. Products give f32; what follows rounds to T once. */
#include "cuda.h"

#include <math.h>
#include <string.h>

#include "mem.h"

/* ---- steps on some rows */

static int multiply(struct cuda_backend *b, const void *x, uint32_t n, uint32_t n_in, const void *w,
                    uint32_t n_out, float *y, bool add, struct larder_err *e)
{
    struct cuda_gemm g = {.x = x,
                          .w = w,
                          .y = y,
                          .ldx = n_in,
                          .ldy = n_out,
                          .n = n,
                          .n_in = n_in,
                          .n_out = n_out,
                          .bf16 = b->bf16,
                          .add = add};

    return cuda_check(b, b->d->gemm(b->device, &g), "a matrix product", e);
}

static int normalise(struct cuda_backend *b, const float *x, const float *norm, uint32_t n,
                     void *out, struct larder_err *e)
{
    struct cuda_rmsnorm_args a = {x, norm, out, b->base.p->n_hidden, b->base.p->norm_eps};

    return cuda_run(b, cuda_grid_rows(CUDA_RMSNORM, b->bf16, n, &a), e);
}

/* Rooms of one block of rows. */
struct work {
    void *x, *wide, *act;
    void *pos, *angles, *freq;
};

static int work_rooms(struct cuda_backend *b, uint32_t n, struct work *w, struct larder_err *e)
{
    const struct model_params *p = b->base.p;
    const struct kv_geom *g = &p->geom;
    uint64_t rows = n < CUDA_ROWS ? n : CUDA_ROWS;
    uint64_t qkv = (g->n_heads + 2ull * g->n_kv_heads) * g->head_dim;
    uint64_t wide = qkv > 2ull * p->n_ff ? qkv : 2ull * p->n_ff;
    int rc = cuda_room(b, ROOM_X, rows * p->n_hidden * b->elem, &w->x, e);

    if (!rc)
        rc = cuda_room(b, ROOM_WIDE, rows * wide * sizeof(float), &w->wide, e);
    if (!rc)
        rc = cuda_room(b, ROOM_ACT, rows * p->n_ff * b->elem, &w->act, e);
    if (!rc)
        rc = cuda_room(b, ROOM_ANGLES, rows * p->rope_dims * sizeof(float), &w->angles, e);
    if (!rc)
        rc = cuda_room(b, ROOM_POS, n * sizeof(uint32_t), &w->pos, e);
    if (!rc)
        rc = cuda_room(b, ROOM_FREQ, p->rope_dims / 2 * sizeof(double), &w->freq, e);
    return rc;
}

/* ---- hidden states of a caller */

static int hidden_in(struct cuda_backend *b, const float *hidden, uint32_t n, bool writes,
                     uint8_t **ret, struct larder_err *e)
{
    uint64_t bytes = (uint64_t)n * b->base.p->n_hidden * sizeof *hidden;

    return cuda_source(b, hidden, ROOM_HIDDEN, bytes, writes, ret, e);
}

/* Once for each larger n, and where sessions hold more than then: does it fit at all? */
static int plan_rows(struct cuda_backend *b, uint64_t n, struct larder_err *e)
{
    uint64_t held = cuda_held(b);
    struct cuda_plan plan;
    int rc;

    if (n <= b->planned_rows && held <= b->plan.held)
        return 0;
    plan = cuda_plan_rows(b->base.p, &b->size, b->base.elem, b->resident, n, held);
    rc = cuda_plan_check(&plan, n, &b->info, e);
    if (rc)
        return rc;
    b->plan = plan;
    b->planned_rows = n;
    if (plan.total > b->base.device_planned)
        b->base.device_planned = plan.total;
    return 0;
}

/* ---- qkv */

/* Where the rows of a call are. */
struct projected {
    const float *hidden;
    struct cuda_rows q, k, v;
    double factor; /* of the rotation table */
};

static int qkv_block(struct cuda_backend *b, const struct layer *l, const struct work *w,
                     const struct projected *to, uint32_t row0, uint32_t n, struct larder_err *e)
{
    const struct model_params *p = b->base.p;
    const struct kv_geom *g = &p->geom;
    uint32_t wide = (g->n_heads + 2 * g->n_kv_heads) * g->head_dim;
    struct cuda_angles_args angles = {(uint32_t *)w->pos + row0, w->freq,   w->angles, n,
                                      p->rope_dims / 2,          to->factor};
    struct cuda_rope_args rope = {.x = w->wide,
                                  .table = w->angles,
                                  .bias = l->bias,
                                  .q_norm = l->q_norm,
                                  .k_norm = l->k_norm,
                                  .eps = p->norm_eps,
                                  .q = to->q.device,
                                  .k = to->k.device,
                                  .v = to->v.device,
                                  .n_heads = g->n_heads,
                                  .n_kv = g->n_kv_heads,
                                  .d = g->head_dim,
                                  .dims = p->rope_dims,
                                  .row0 = row0,
                                  .stride = to->q.stride};
    int rc = normalise(b, to->hidden + (uint64_t)row0 * p->n_hidden, l->attn_norm, n, w->x, e);

    if (!rc)
        rc = multiply(b, w->x, n, p->n_hidden, l->qkv, wide, w->wide, false, e);
    if (!rc)
        rc = cuda_run(b, cuda_grid_flat(CUDA_ANGLES, false, (uint64_t)n * angles.half, &angles), e);
    if (!rc)
        rc = cuda_run(b, cuda_grid_rows(CUDA_ROPE, b->bf16, n, &rope), e);
    return rc;
}

int cuda_qkv(struct backend *base, const struct layer *l, const struct project *p,
             struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    const struct kv_geom *g = &base->p->geom;
    uint32_t n = p->n, stride = p->stride;
    struct projected to = {.factor = p->rope->factor};
    struct work w = {0};
    uint8_t *h = NULL;
    int rc = plan_rows(b, n, e);

    if (!rc)
        rc = work_rooms(b, n, &w, e);
    if (!rc)
        rc = hidden_in(b, p->hidden, n, false, &h, e);
    to.hidden = (float *)(void *)h;
    if (!rc)
        rc = cuda_rows_out(b, p->q, ROOM_Q, g->n_heads, stride, n, &to.q, e);
    if (!rc)
        rc = cuda_rows_out(b, p->k, ROOM_K, g->n_kv_heads, stride, n, &to.k, e);
    if (!rc)
        rc = cuda_rows_out(b, p->v, ROOM_V, g->n_kv_heads, stride, n, &to.v, e);
    if (!rc && (to.q.copied != to.k.copied || to.k.copied != to.v.copied))
        rc = larder_fail(e, LARDER_EINTERNAL, "q, k and v must be the same kind of memory");
    if (!rc)
        rc = cuda_up(b, w.pos, p->pos, n * sizeof *p->pos, e);
    if (!rc)
        rc = cuda_up(b, w.freq, p->rope->freq, base->p->rope_dims / 2 * sizeof *p->rope->freq, e);
    for (uint32_t i = 0; i < n && !rc; i += CUDA_ROWS)
        rc = qkv_block(b, l, &w, &to, i, n - i < CUDA_ROWS ? n - i : CUDA_ROWS, e);
    if (!rc)
        rc = cuda_rows_back(b, p->q, &to.q, g->n_heads, stride, n, e);
    if (!rc)
        rc = cuda_rows_back(b, p->k, &to.k, g->n_kv_heads, stride, n, e);
    return rc ? rc : cuda_rows_back(b, p->v, &to.v, g->n_kv_heads, stride, n, e);
}

/* ---- finish */

static int finish_block(struct cuda_backend *b, const struct layer *l, const struct work *w,
                        float *hidden, const void *o, uint32_t n, struct larder_err *e)
{
    const struct model_params *p = b->base.p;
    struct cuda_swiglu_args swiglu = {w->wide, w->act, n, p->n_ff};
    int rc =
        multiply(b, o, n, p->geom.n_heads * p->geom.head_dim, l->o, p->n_hidden, hidden, true, e);

    if (!rc)
        rc = normalise(b, hidden, l->ffn_norm, n, w->x, e);
    if (!rc)
        rc = multiply(b, w->x, n, p->n_hidden, l->gate_up, 2 * p->n_ff, w->wide, false, e);
    if (!rc)
        rc = cuda_run(b, cuda_grid_flat(CUDA_SWIGLU, b->bf16, (uint64_t)n * p->n_ff, &swiglu), e);
    return rc ? rc : multiply(b, w->act, n, p->n_ff, l->down, p->n_hidden, hidden, true, e);
}

int cuda_finish(struct backend *base, const struct layer *l, float *hidden, const void *o,
                uint32_t n, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    uint64_t h_row = (uint64_t)base->p->n_hidden * sizeof *hidden;
    uint32_t n_heads = base->p->geom.n_heads;
    uint64_t o_row = (uint64_t)n_heads * base->p->geom.head_dim * b->elem;
    struct cuda_rows or ;
    struct work w = {0};
    uint8_t *h = NULL;
    int rc = work_rooms(b, n, &w, e);
    bool copied;

    if (!rc)
        rc = hidden_in(b, hidden, n, true, &h, e);
    copied = !rc && h == b->room[ROOM_HIDDEN];
    if (!rc) /* [n][n_heads * head_dim] is n heads' worth of rows, dense */
        rc = cuda_rows_in(b, o, ROOM_O, 1, (uint64_t)n * n_heads, n * n_heads, & or, e);
    for (uint32_t i = 0; i < n && !rc; i += CUDA_ROWS)
        rc = finish_block(b, l, &w, (float *)(void *)(h + i * h_row), or.device + i * o_row,
                          n - i < CUDA_ROWS ? n - i : CUDA_ROWS, e);
    if (!rc && copied)
        rc = cuda_down(b, hidden, h, n * h_row, e);
    if (b->peak > base->device_peak)
        base->device_peak = b->peak;
    return rc;
}

/* ---- window mass */

int cuda_window_mass(struct cuda_backend *b, const struct window_mass *x, float **ret,
                     struct larder_err *e)
{
    const struct kv_geom *g = &b->base.p->geom;
    uint32_t n = x->n, w = x->w, batch = cuda_window_batch(g->n_heads, n, w);
    uint64_t mass_bytes = (uint64_t)g->n_heads * (n - w) * sizeof(float);
    struct cuda_window_args a = {.n = n,
                                 .w = w,
                                 .d = g->head_dim,
                                 .group = g->n_heads / g->n_kv_heads,
                                 .sliding = x->sliding,
                                 .scale = (float)(1 / sqrt(g->head_dim))};
    void *logit = NULL, *stat = NULL, *out = NULL;
    struct cuda_rows qr, kr;
    int rc = cuda_rows_in(b, x->q, ROOM_Q, g->n_heads, x->stride, n, &qr, e);

    if (!rc)
        rc = cuda_rows_in(b, x->k, ROOM_K, g->n_kv_heads, x->stride, n, &kr, e);
    if (!rc)
        rc = cuda_room(b, ROOM_LOGIT, (uint64_t)batch * w * n * sizeof(float), &logit, e);
    if (!rc)
        rc = cuda_room(b, ROOM_STAT, (uint64_t)batch * w * 2 * sizeof(float), &stat, e);
    if (!rc)
        rc = cuda_room(b, ROOM_MASS, mass_bytes, &out, e);
    if (rc)
        return rc;
    a.q = qr.device;
    a.k = kr.device;
    a.stride = qr.stride;
    a.logit = logit;
    a.stat = stat;
    a.mass = out;
    for (a.head0 = 0; a.head0 < g->n_heads && !rc; a.head0 += batch) {
        a.n_batch = g->n_heads - a.head0 < batch ? g->n_heads - a.head0 : batch;
        rc = cuda_run(b, cuda_grid_window(CUDA_WINDOW_LOGITS, b->bf16, &a), e);
        if (!rc)
            rc = cuda_run(b, cuda_grid_window(CUDA_WINDOW_STATS, b->bf16, &a), e);
        if (!rc)
            rc = cuda_run(b, cuda_grid_window(CUDA_WINDOW_MASS, b->bf16, &a), e);
    }
    *ret = out;
    return rc;
}

int cuda_window(struct backend *base, const struct window_mass *x, struct larder_err *e)
{
    uint64_t bytes = (uint64_t)base->p->geom.n_heads * (x->n - x->w) * sizeof *x->mass;
    float *mass = NULL;
    int rc = cuda_window_mass(cuda_of(base), x, &mass, e);

    return rc ? rc : cuda_down(cuda_of(base), x->mass, mass, bytes, e);
}

/* ---- logits */

/* Logits of a slice of the vocabulary. */
static int logits_slice(struct cuda_backend *b, const void *x, uint32_t n, const void *w,
                        uint32_t first, uint32_t n_words, float *y, struct larder_err *e)
{
    struct cuda_gemm g = {.x = x,
                          .w = w,
                          .y = y + first,
                          .ldx = b->base.p->n_hidden,
                          .ldy = b->base.p->n_vocab,
                          .n = n,
                          .n_in = b->base.p->n_hidden,
                          .n_out = n_words,
                          .bf16 = b->bf16};

    return cuda_check(b, b->d->gemm(b->device, &g), "a matrix product", e);
}

static int logits_sliced(struct cuda_backend *b, const void *x, uint32_t n, float *y,
                         struct larder_err *e)
{
    uint32_t n_vocab = b->base.p->n_vocab;
    void *w = NULL;
    int rc =
        cuda_room(b, ROOM_HEAD, (uint64_t)CUDA_HEAD_ROWS * b->base.p->n_hidden * b->elem, &w, e);

    for (uint32_t i = 0; i < n_vocab && !rc; i += CUDA_HEAD_ROWS) {
        uint32_t words = n_vocab - i < CUDA_HEAD_ROWS ? n_vocab - i : CUDA_HEAD_ROWS;

        rc = cuda_read_rows(b, 0, MODEL_HEAD, i, words, w, e);
        if (!rc)
            rc = logits_slice(b, x, n, w, i, words, y, e);
    }
    return rc;
}

int cuda_logits(struct backend *base, const struct head *h, const float *hidden, uint32_t n,
                float *out, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    uint64_t bytes = (uint64_t)n * base->p->n_vocab * sizeof *out;
    void *norm = NULL, *x = NULL, *y = NULL;
    uint8_t *rows = NULL;
    int rc = 0;

    if (!h && b->resident && !b->head)
        rc = cuda_head_load(base, &b->head, e);
    if (!h)
        h = b->head;
    if (!rc)
        rc = cuda_room(b, ROOM_X, (uint64_t)n * base->p->n_hidden * b->elem, &x, e);
    if (!rc)
        rc = cuda_room(b, ROOM_LOGITS, bytes, &y, e);
    if (!rc && !h)
        rc = cuda_room(b, ROOM_NORM, base->p->n_hidden * sizeof(float), &norm, e);
    if (!rc && !h)
        rc = cuda_read_norm(b, 0, MODEL_OUT_NORM, norm, e);
    if (!rc)
        rc = hidden_in(b, hidden, n, false, &rows, e);
    if (!rc)
        rc = normalise(b, (float *)(void *)rows, h ? h->norm : norm, n, x, e);
    if (!rc && h)
        rc = logits_slice(b, x, n, h->out, 0, base->p->n_vocab, y, e);
    else if (!rc)
        rc = logits_sliced(b, x, n, y, e);
    return rc ? rc : cuda_down(b, out, y, bytes, e);
}
