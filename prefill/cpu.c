/* cpu.c - backend `cpu`: a layer as a pipeline over blocks of rows.
 *
 * The one idea: between two points where rows must meet (attention), each block of 128 rows
 * goes through all its steps on one thread while it is in that thread's cache: norm,
 * product, rotation on the way in; output product, norm, MLP on the way out. Products
 * are cpu_gemm.c's, one thread a call; the pool hands blocks to threads as they come free. */
#include "cpu.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "half.h"
#include "mem.h"

#define MAX_THREADS 256u
#define LOAD_ROWS 64u    /* weight rows an item dequantises */
#define HEAD_SLICE 4096u /* rows of the output matrix per slice */
#define MANY_LOGITS 4u   /* rows of logits from which packing the matrix pays */

/* `struct layer` and `struct head` of this backend; ref has its own. */
struct cpu_layer {
    float *attn_norm, *ffn_norm;
    struct cpu_matrix qkv, o, gate_up, down;
};

struct cpu_head {
    float *norm;
    void *rows; /* [n_vocab][n_hidden], element type */
};

static const struct cpu_layer *layer_of(const struct layer *l)
{
    return (const struct cpu_layer *)(const void *)l;
}

static uint32_t elem_bytes(const struct backend *b)
{
    return kv_dtype_bytes(b->elem);
}

/* ---- loading */

struct slice {
    enum model_weight which;
    uint32_t row, n;
    uint64_t to; /* row of the plain buffer */
    uint8_t *plain;
};

struct load {
    struct backend *b;
    uint32_t layer;
    struct slice *slice;
    atomic_int rc;
    struct larder_err e; /* of the first failure */
};

static void load_item(void *arg, uint32_t item, uint32_t worker)
{
    struct load *w = arg;
    const struct slice *s = &w->slice[item];
    const struct model *m = w->b->model;
    uint32_t rows, cols;
    struct larder_err e;
    int rc, none = 0;

    (void)worker;
    model_weight_shape(m, s->which, &rows, &cols);
    if (w->b->elem == KV_BF16)
        rc = model_read_bf16(m, w->layer, s->which, s->row, s->n,
                             (uint16_t *)s->plain + s->to * cols, &e);
    else
        rc = model_read_f32(m, w->layer, s->which, s->row, s->n, (float *)s->plain + s->to * cols,
                            &e);
    if (rc && atomic_compare_exchange_strong(&w->rc, &none, rc))
        w->e = e;
}

/* Cut a weight into slices; returns how many there are now. */
static uint32_t add_slices(const struct model *m, enum model_weight which, uint64_t to,
                           uint8_t *plain, struct slice *s, uint32_t n)
{
    uint32_t rows, cols;

    model_weight_shape(m, which, &rows, &cols);
    for (uint32_t r = 0; r < rows; r += LOAD_ROWS)
        s[n++] =
            (struct slice){which, r, rows - r < LOAD_ROWS ? rows - r : LOAD_ROWS, to + r, plain};
    return n;
}

/* The four matrices of a layer, in the order of their plain buffers. */
struct parts {
    struct cpu_backend *b;
    struct cpu_matrix *w[4];
    uint8_t *plain[4];
    atomic_int rc;
    struct larder_err e;
};

static void pack_item(void *arg, uint32_t item, uint32_t worker)
{
    struct parts *p = arg;
    struct larder_err e;
    int none = 0, rc = cpu_matrix_pack(p->b, p->w[item], p->plain[item], &e);

    (void)worker;
    if (rc && atomic_compare_exchange_strong(&p->rc, &none, rc))
        p->e = e;
}

static void set_shapes(const struct model_params *p, struct cpu_layer *l)
{
    uint32_t q = p->geom.n_heads * p->geom.head_dim, kv = p->geom.n_kv_heads * p->geom.head_dim;

    l->qkv = (struct cpu_matrix){.n_in = p->n_hidden, .n_out = q + 2 * kv};
    l->o = (struct cpu_matrix){.n_in = q, .n_out = p->n_hidden};
    l->gate_up = (struct cpu_matrix){.n_in = p->n_hidden, .n_out = 2 * p->n_ff};
    l->down = (struct cpu_matrix){.n_in = p->n_ff, .n_out = p->n_hidden};
}

static int read_matrices(struct backend *b, uint32_t layer, struct parts *x, struct larder_err *e)
{
    const struct model_params *p = b->p;
    uint32_t q = p->geom.n_heads * p->geom.head_dim, kv = p->geom.n_kv_heads * p->geom.head_dim,
             n = 0;
    uint64_t rows = (uint64_t)q + 2 * kv + 2ull * p->n_hidden + 2ull * p->n_ff;
    struct load w = {.b = b, .layer = layer};

    w.slice = mem_alloc(rows / LOAD_ROWS + 8, sizeof *w.slice);
    for (int i = 0; i < 4; i++)
        x->plain[i] = mem_aligned((uint64_t)x->w[i]->n_in * x->w[i]->n_out, elem_bytes(b));
    if (!w.slice || !x->plain[0] || !x->plain[1] || !x->plain[2] || !x->plain[3]) {
        mem_free(w.slice);
        return larder_fail(e, LARDER_ENOMEM, "no memory for the weights of layer %u", layer);
    }
    n = add_slices(b->model, MODEL_Q, 0, x->plain[0], w.slice, n);
    n = add_slices(b->model, MODEL_K, q, x->plain[0], w.slice, n);
    n = add_slices(b->model, MODEL_V, q + kv, x->plain[0], w.slice, n);
    n = add_slices(b->model, MODEL_O, 0, x->plain[1], w.slice, n);
    n = add_slices(b->model, MODEL_GATE, 0, x->plain[2], w.slice, n);
    n = add_slices(b->model, MODEL_UP, p->n_ff, x->plain[2], w.slice, n);
    n = add_slices(b->model, MODEL_DOWN, 0, x->plain[3], w.slice, n);
    pool_for(cpu_of(b)->pool, n, load_item, &w);
    mem_free(w.slice);
    if (w.rc)
        *e = w.e;
    return w.rc;
}

static int read_norm(struct backend *b, uint32_t layer, enum model_weight which, float **ret,
                     struct larder_err *e)
{
    *ret = mem_alloc(b->p->n_hidden, sizeof **ret);
    if (!*ret)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the weights of layer %u", layer);
    return model_read_f32(b->model, layer, which, 0, 1, *ret, e);
}

static void cpu_layer_free(struct backend *b, struct layer *layer)
{
    struct cpu_layer *l = (struct cpu_layer *)(void *)layer;

    (void)b;
    if (!l)
        return;
    cpu_matrix_done(&l->qkv);
    cpu_matrix_done(&l->o);
    cpu_matrix_done(&l->gate_up);
    cpu_matrix_done(&l->down);
    mem_free(l->attn_norm);
    mem_free(l->ffn_norm);
    mem_free(l);
}

static int cpu_layer_load(struct backend *b, uint32_t layer, struct layer **ret,
                          struct larder_err *e)
{
    struct cpu_layer *l = mem_zalloc(1, sizeof *l);
    struct parts x = {.b = cpu_of(b)};
    struct larder_err local;
    int rc;

    if (!e)
        e = &local;
    if (!l)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the weights of layer %u", layer);
    set_shapes(b->p, l);
    x.w[0] = &l->qkv;
    x.w[1] = &l->o;
    x.w[2] = &l->gate_up;
    x.w[3] = &l->down;
    rc = read_matrices(b, layer, &x, e);
    if (!rc) {
        pool_for(x.b->pool, 4, pack_item, &x);
        rc = x.rc;
        if (rc)
            *e = x.e;
    }
    for (int i = 0; i < 4; i++)
        mem_free(x.plain[i]);
    if (!rc)
        rc = read_norm(b, layer, MODEL_ATTN_NORM, &l->attn_norm, e);
    if (!rc)
        rc = read_norm(b, layer, MODEL_FFN_NORM, &l->ffn_norm, e);
    if (rc) {
        cpu_layer_free(b, (struct layer *)(void *)l);
        return rc;
    }
    *ret = (struct layer *)(void *)l;
    return 0;
}

/* ---- rotation tables, kept while positions stay the same */

struct tables {
    struct cpu_backend *b;
    const uint32_t *pos;
    uint32_t n;
};

static void table_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct tables *t = arg;
    const struct model_params *p = t->b->ref.base.p;
    uint32_t d = p->geom.head_dim,
             end = (item + 1) * CPU_ROWS < t->n ? (item + 1) * CPU_ROWS : t->n;

    (void)worker;
    for (uint32_t r = item * CPU_ROWS; r < end; r++)
        for (uint32_t i = 0; i < d / 2; i++) {
            double angle = t->pos[r] * pow(p->rope_theta, -2.0 * i / d);

            t->b->rope[(uint64_t)r * d + i] = (float)cos(angle);
            t->b->rope[(uint64_t)r * d + d / 2 + i] = (float)sin(angle);
        }
}

static int make_tables(struct cpu_backend *b, const uint32_t *pos, uint32_t n, struct larder_err *e)
{
    struct tables t = {b, pos, n};

    if (b->n_rope == n && !memcmp(b->rope_pos, pos, n * sizeof *pos))
        return 0;
    if (n > b->cap_rope) {
        mem_free(b->rope_pos);
        mem_free(b->rope);
        b->rope_pos = mem_alloc(n, sizeof *b->rope_pos);
        b->rope = mem_aligned((uint64_t)n * b->ref.base.p->geom.head_dim, sizeof *b->rope);
        b->cap_rope = b->rope_pos && b->rope ? n : 0;
        b->n_rope = 0;
        if (!b->cap_rope)
            return larder_fail(e, LARDER_ENOMEM, "no memory for %u positions", n);
    }
    pool_for(b->pool, (n + CPU_ROWS - 1) / CPU_ROWS, table_item, &t);
    memcpy(b->rope_pos, pos, n * sizeof *pos);
    b->n_rope = n;
    return 0;
}

/* ---- qkv */

struct work {
    struct cpu_backend *b;
    const struct cpu_layer *l;
    const float *in;
    float *hidden;
    const uint8_t *attended; /* o */
    uint32_t n;
    uint64_t stride;
    uint8_t *q, *k, *v;
    uint8_t *scratch;
    uint64_t per_worker, x_bytes, y_bytes;
    const struct cpu_shape *shape[2][3]; /* full blocks, last block */
    atomic_int failed;
};

static const struct cpu_shape *shape_for(const struct work *w, uint32_t rows, int which)
{
    return w->shape[rows != CPU_ROWS][which];
}

static void normalise(const struct backend *b, const float *x, const float *norm, uint32_t rows,
                      uint8_t *out)
{
    uint32_t n = b->p->n_hidden;

    for (uint64_t i = 0; i < rows; i++) {
        if (b->elem == KV_BF16)
            cpu_rmsnorm_bf16(x + i * n, norm, n, b->p->norm_eps, (uint16_t *)out + i * n);
        else
            cpu_rmsnorm(x + i * n, norm, n, b->p->norm_eps, (float *)out + i * n);
    }
}

/* A projected row into the head-major buffers, q and k rotated. */
static void scatter(const struct work *w, uint32_t row, const float *y, float *buf)
{
    const struct backend *b = &w->b->ref.base;
    const struct kv_geom *g = &b->p->geom;
    uint32_t d = g->head_dim, size = elem_bytes(b);
    const float *cs = w->b->rope + (uint64_t)row * d;

    for (uint32_t h = 0; h < g->n_heads + 2 * g->n_kv_heads; h++, y += d) {
        bool is_q = h < g->n_heads, is_k = !is_q && h < g->n_heads + g->n_kv_heads;
        uint8_t *base = is_q ? w->q : is_k ? w->k : w->v;
        uint32_t head = is_q ? h : is_k ? h - g->n_heads : h - g->n_heads - g->n_kv_heads;
        uint8_t *to = base + (head * w->stride + row) * d * size;
        const float *from = y;

        if (is_q || is_k) {
            cpu_rope(y, cs, d, buf);
            from = buf;
        }
        if (b->elem == KV_BF16)
            cpu_to_bf16(from, d, (uint16_t *)to);
        else
            memcpy(to, from, d * sizeof *from);
    }
}

static void qkv_item(void *arg, uint32_t item, uint32_t worker)
{
    struct work *w = arg;
    const struct backend *b = &w->b->ref.base;
    uint32_t row = item * CPU_ROWS, rows = w->n - row < CPU_ROWS ? w->n - row : CPU_ROWS;
    uint8_t *x = w->scratch + worker * w->per_worker;
    float *y = (float *)(x + w->x_bytes);
    uint8_t *scratch = x + w->x_bytes + w->y_bytes;
    float buf[KV_MAX_HEAD_DIM];

    normalise(b, w->in + (uint64_t)row * b->p->n_hidden, w->l->attn_norm, rows, x);
    if (cpu_multiply(w->b, shape_for(w, rows, 0), &w->l->qkv, x, y, scratch))
        atomic_store(&w->failed, 1);
    for (uint32_t i = 0; i < rows; i++)
        scatter(w, row + i, y + (uint64_t)i * w->l->qkv.n_out, buf);
}

/* Products for blocks of CPU_ROWS and for the rest; scratch for all of them. */
static int plan(struct work *w, const struct cpu_matrix *const *m, const bool *add, int n_products,
                struct larder_err *e)
{
    uint32_t rest = w->n % CPU_ROWS;
    size_t scratch = 64;
    int rc = 0;

    for (int i = 0; !rc && i < n_products; i++) {
        if (w->n >= CPU_ROWS)
            rc = cpu_shape_get(w->b, m[i], CPU_ROWS, add[i], &w->shape[0][i], e);
        if (!rc && rest)
            rc = cpu_shape_get(w->b, m[i], rest, add[i], &w->shape[1][i], e);
        for (int k = 0; !rc && k < 2; k++)
            if (w->shape[k][i] && cpu_shape_scratch(w->shape[k][i]) > scratch)
                scratch = cpu_shape_scratch(w->shape[k][i]);
    }
    if (rc)
        return rc;
    w->per_worker = (w->x_bytes + w->y_bytes + scratch + 127) & ~63ull;
    w->scratch = mem_aligned(w->per_worker, w->b->ref.base.n_threads);
    return w->scratch ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for a block of rows");
}

static int finish_work(struct work *w, pool_item_fn *fn, struct larder_err *e)
{
    pool_for(w->b->pool, (w->n + CPU_ROWS - 1) / CPU_ROWS, fn, w);
    mem_free(w->scratch);
    return w->failed ? larder_fail(e, LARDER_EBACKEND, "oneDNN failed in a matrix product") : 0;
}

static int cpu_qkv(struct backend *b, const struct layer *layer, const float *hidden,
                   const uint32_t *pos, uint32_t n, uint32_t stride, void *q, void *k, void *v,
                   struct larder_err *e)
{
    struct work w = {.b = cpu_of(b),
                     .l = layer_of(layer),
                     .in = hidden,
                     .n = n,
                     .stride = stride,
                     .q = q,
                     .k = k,
                     .v = v};
    uint32_t block = n < CPU_ROWS ? n : CPU_ROWS;
    int rc = make_tables(w.b, pos, n, e);

    w.x_bytes = ((uint64_t)block * b->p->n_hidden * elem_bytes(b) + 63) & ~63ull;
    w.y_bytes = ((uint64_t)block * w.l->qkv.n_out * sizeof(float) + 63) & ~63ull;
    if (!rc)
        rc = plan(&w, (const struct cpu_matrix *const[]){&w.l->qkv}, (const bool[]){false}, 1, e);
    return rc ? rc : finish_work(&w, qkv_item, e);
}

/* ---- finish */

static void swiglu(const struct backend *b, const float *y, uint32_t rows, uint8_t *x)
{
    uint64_t ff = b->p->n_ff;

    for (uint64_t i = 0; i < rows; i++) {
        if (b->elem == KV_BF16)
            cpu_swiglu_bf16(y + i * 2 * ff, (uint32_t)ff, (uint16_t *)x + i * ff);
        else
            cpu_swiglu(y + i * 2 * ff, (uint32_t)ff, (float *)x + i * ff);
    }
}

static void finish_item(void *arg, uint32_t item, uint32_t worker)
{
    struct work *w = arg;
    const struct backend *b = &w->b->ref.base;
    uint32_t row = item * CPU_ROWS, rows = w->n - row < CPU_ROWS ? w->n - row : CPU_ROWS;
    uint8_t *x = w->scratch + worker * w->per_worker, *y = x + w->x_bytes,
            *scratch = y + w->y_bytes;
    float *h = w->hidden + (uint64_t)row * b->p->n_hidden;
    const uint8_t *o = w->attended + (uint64_t)row * w->l->o.n_in * elem_bytes(b);
    int bad = cpu_multiply(w->b, shape_for(w, rows, 0), &w->l->o, o, h, scratch);

    normalise(b, h, w->l->ffn_norm, rows, x);
    bad |= cpu_multiply(w->b, shape_for(w, rows, 1), &w->l->gate_up, x, y, scratch);
    swiglu(b, (const float *)(const void *)y, rows, x);
    bad |= cpu_multiply(w->b, shape_for(w, rows, 2), &w->l->down, x, h, scratch);
    if (bad)
        atomic_store(&w->failed, 1);
}

static int cpu_finish(struct backend *b, const struct layer *layer, float *hidden, const void *o,
                      uint32_t n, struct larder_err *e)
{
    struct work w = {.b = cpu_of(b), .l = layer_of(layer), .hidden = hidden, .attended = o, .n = n};
    const struct cpu_matrix *const m[3] = {&w.l->o, &w.l->gate_up, &w.l->down};
    uint32_t block = n < CPU_ROWS ? n : CPU_ROWS;
    uint32_t wide = b->p->n_ff > b->p->n_hidden ? b->p->n_ff : b->p->n_hidden;
    int rc;

    w.x_bytes = ((uint64_t)block * wide * elem_bytes(b) + 63) & ~63ull;
    w.y_bytes = ((uint64_t)block * 2 * b->p->n_ff * sizeof(float) + 63) & ~63ull;
    rc = plan(&w, m, (const bool[]){true, false, true}, 3, e);
    return rc ? rc : finish_work(&w, finish_item, e);
}

/* ---- attention in bf16; in f32 it is cpu_attend.c's */

struct attention {
    struct cpu_backend *b;
    const struct attend *a;
    uint8_t *packed, *scratch;
    uint64_t packed_bytes, scratch_bytes;
    uint32_t n_blocks;
};

static void pack_head(void *arg, uint32_t g, uint32_t worker)
{
    const struct attention *x = arg;
    uint32_t d = x->b->ref.base.p->geom.head_dim;
    uint64_t at = (uint64_t)g * x->a->stride * d;

    (void)worker;
    cpu_attend_pack((const uint16_t *)x->a->k + at, (const uint16_t *)x->a->v + at, x->a->n, d,
                    x->packed + g * x->packed_bytes);
}

/* Late blocks see most keys: handing them out first evens out the end. */
static void attend_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct attention *x = arg;
    const struct kv_geom *geom = &x->b->ref.base.p->geom;
    uint32_t d = geom->head_dim, h = item % geom->n_heads,
             g = h / (geom->n_heads / geom->n_kv_heads);
    uint32_t row = x->a->row0 + (x->n_blocks - 1 - item / geom->n_heads) * CPU_ATTEND_Q;
    uint32_t rows = x->a->n - row < CPU_ATTEND_Q ? x->a->n - row : CPU_ATTEND_Q;
    uint64_t o_stride = (uint64_t)geom->n_heads * d;

    cpu_attend_rows((const uint16_t *)x->a->q + (uint64_t)h * x->a->stride * d,
                    x->packed + g * x->packed_bytes, x->a->n, d, row, rows,
                    (uint16_t *)x->a->o + row * o_stride + (uint64_t)h * d, o_stride,
                    x->scratch + worker * x->scratch_bytes);
}

static int cpu_attend(struct backend *b, const struct attend *a, struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    struct attention x = {.b = cpu_of(b), .a = a};

    if (b->elem == KV_F32)
        return cpu_attend_f32(b, a, e);
    x.packed_bytes = (cpu_attend_pack_bytes(a->n, geom->head_dim) + 63) & ~63ull;
    x.scratch_bytes = (cpu_attend_scratch_bytes(geom->head_dim) + 63) & ~63ull;
    x.packed = mem_aligned(x.packed_bytes, geom->n_kv_heads);
    x.scratch = mem_aligned(x.scratch_bytes, b->n_threads);
    x.n_blocks = (a->n - a->row0 + CPU_ATTEND_Q - 1) / CPU_ATTEND_Q;
    if (x.packed && x.scratch) {
        pool_for(x.b->pool, geom->n_kv_heads, pack_head, &x);
        pool_for(x.b->pool, x.n_blocks * geom->n_heads, attend_item, &x);
    }
    mem_free(x.scratch);
    mem_free(x.packed);
    return x.packed && x.scratch
               ? 0
               : larder_fail(e, LARDER_ENOMEM, "no memory for attention over %u tokens", a->n);
}

/* ---- output */

static void cpu_head_free(struct backend *b, struct head *head)
{
    struct cpu_head *h = (struct cpu_head *)(void *)head;

    (void)b;
    if (!h)
        return;
    mem_free(h->norm);
    mem_free(h->rows);
    mem_free(h);
}

/* Rows of the output matrix, read in parallel. */
static int read_head(struct backend *b, uint32_t row, uint32_t n, void *to, struct larder_err *e)
{
    struct load w = {.b = b};
    uint32_t n_slices = 0;

    w.slice = mem_alloc(n / LOAD_ROWS + 1, sizeof *w.slice);
    if (!w.slice)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the output matrix");
    for (uint32_t r = 0; r < n; r += LOAD_ROWS)
        w.slice[n_slices++] =
            (struct slice){MODEL_HEAD, row + r, n - r < LOAD_ROWS ? n - r : LOAD_ROWS, r, to};
    pool_for(cpu_of(b)->pool, n_slices, load_item, &w);
    mem_free(w.slice);
    if (w.rc && e)
        *e = w.e;
    return w.rc;
}

static int cpu_head_load(struct backend *b, struct head **ret, struct larder_err *e)
{
    struct cpu_head *h = mem_zalloc(1, sizeof *h);
    int rc;

    if (h)
        h->rows = mem_aligned((uint64_t)b->p->n_vocab * b->p->n_hidden, elem_bytes(b));
    if (!h || !h->rows) {
        mem_free(h);
        return larder_fail(e, LARDER_ENOMEM, "no memory for the output matrix");
    }
    rc = read_norm(b, 0, MODEL_OUT_NORM, &h->norm, e);
    if (!rc)
        rc = read_head(b, 0, b->p->n_vocab, h->rows, e);
    if (rc) {
        cpu_head_free(b, (struct head *)(void *)h);
        return rc;
    }
    *ret = (struct head *)(void *)h;
    return 0;
}

struct output {
    struct backend *b;
    const void *rows; /* n_rows of the matrix from `first` on */
    uint32_t first, n_rows, n;
    const float *x; /* [n][n_hidden], normalised */
    float *out;
    float *panel; /* [n_threads][LOAD_ROWS * n_hidden]; NULL: few rows, one dot product each */
};

/* Many rows: LOAD_ROWS of the matrix into panels, once for all of them. */
static void multiply_rows(const struct output *o, uint32_t row, uint32_t n, float *panel)
{
    uint32_t n_hidden = o->b->p->n_hidden;

    for (uint32_t r = 0; r < n; r++) {
        uint64_t at = (uint64_t)(row + r) * n_hidden;
        float *to = panel + (uint64_t)(r / MUL_WIDE) * n_hidden * MUL_WIDE + r % MUL_WIDE;

        for (uint32_t k = 0; k < n_hidden; k++)
            to[(uint64_t)k * MUL_WIDE] = o->b->elem == KV_F32
                                             ? ((const float *)o->rows)[at + k]
                                             : bf16_to_f32(((const uint16_t *)o->rows)[at + k]);
    }
    cpu_of(o->b)->mul(&(struct mul){.a = o->x,
                                    .a_row = n_hidden,
                                    .a_k = 1,
                                    .a_panel = MUL_WIDE * n_hidden,
                                    .b = panel,
                                    .b_k = MUL_WIDE,
                                    .b_panel = MUL_WIDE * (uint64_t)n_hidden,
                                    .c = o->out + o->first + row,
                                    .c_row = o->b->p->n_vocab,
                                    .c_panel = MUL_WIDE,
                                    .m = o->n,
                                    .n = n,
                                    .k = n_hidden});
}

static void output_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct output *o = arg;
    uint32_t n_hidden = o->b->p->n_hidden;
    uint32_t end = (item + 1) * LOAD_ROWS < o->n_rows ? (item + 1) * LOAD_ROWS : o->n_rows;

    if (o->panel) {
        multiply_rows(o, item * LOAD_ROWS, end - item * LOAD_ROWS,
                      o->panel + (uint64_t)worker * LOAD_ROWS * n_hidden);
        return;
    }
    for (uint32_t r = item * LOAD_ROWS; r < end; r++)
        for (uint64_t i = 0; i < o->n; i++)
            o->out[i * o->b->p->n_vocab + o->first + r] =
                cpu_dot(o->rows, o->b->elem, (uint64_t)r * n_hidden, o->x + i * n_hidden, n_hidden);
}

static int cpu_logits(struct backend *b, const struct head *head, const float *hidden, uint32_t n,
                      float *out, struct larder_err *e)
{
    const struct cpu_head *h = (const struct cpu_head *)(const void *)head;
    const struct model_params *p = b->p;
    float *x = mem_aligned((uint64_t)n * p->n_hidden, sizeof *x), *norm = NULL;
    uint32_t step = h ? p->n_vocab : HEAD_SLICE;
    void *slice = h ? NULL : mem_aligned((uint64_t)HEAD_SLICE * p->n_hidden, elem_bytes(b));
    bool many = n >= MANY_LOGITS;
    float *panel =
        many ? mem_aligned((uint64_t)b->n_threads * LOAD_ROWS * p->n_hidden, sizeof *panel) : NULL;
    int rc = x && (h || slice) && (!many || panel)
                 ? 0
                 : larder_fail(e, LARDER_ENOMEM, "no memory for logits");

    if (!rc && !h)
        rc = read_norm(b, 0, MODEL_OUT_NORM, &norm, e);
    for (uint64_t i = 0; !rc && i < n; i++)
        cpu_rmsnorm(hidden + i * p->n_hidden, h ? h->norm : norm, p->n_hidden, p->norm_eps,
                    x + i * p->n_hidden);
    for (uint32_t r = 0; !rc && r < p->n_vocab; r += step) {
        struct output o = {
            b,    h ? h->rows : slice, r, p->n_vocab - r < step ? p->n_vocab - r : step, n, x, out,
            panel};

        if (!h)
            rc = read_head(b, r, o.n_rows, slice, e);
        if (!rc)
            pool_for(cpu_of(b)->pool, (o.n_rows + LOAD_ROWS - 1) / LOAD_ROWS, output_item, &o);
    }
    mem_free(x);
    mem_free(norm);
    mem_free(slice);
    mem_free(panel);
    return rc;
}

/* ---- open and close */

static void cpu_close(struct backend *backend)
{
    struct cpu_backend *b = cpu_of(backend);

    if (!b)
        return;
    pool_close(b->pool);
    cpu_gemm_close(b);
    mem_free(b->rope_pos);
    mem_free(b->rope);
    mem_free(b);
}

static uint32_t thread_count(uint32_t asked)
{
    cpu_set_t set;
    uint32_t n = 1;

    if (asked)
        n = asked;
    else if (!sched_getaffinity(0, sizeof set, &set))
        n = (uint32_t)CPU_COUNT(&set);
    return n < MAX_THREADS ? n : MAX_THREADS;
}

static const char *isa_name(bool bf16)
{
    dnnl_cpu_isa_t isa = dnnl_get_effective_cpu_isa();

    if (bf16)
        return isa == dnnl_cpu_isa_avx512_core_amx ? "amx_bf16" : "avx512_bf16";
    if (__builtin_cpu_supports("avx512f"))
        return "avx512";
    return __builtin_cpu_supports("avx2") ? "avx2" : "generic";
}

static int cpu_open(struct backend **ret, const struct model *m, const struct backend_opts *o,
                    struct larder_err *e)
{
    struct cpu_backend *b;
    bool bf16 = o->dtype == KV_BF16;
    const char *mul_isa;
    int rc;

    if (!bf16 && o->dtype != KV_F32)
        return larder_fail(e, LARDER_EBACKEND, "backend cpu computes in bf16 or f32");
    if (bf16 && !(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl")))
        return larder_fail(e, LARDER_EBACKEND,
                           "this processor has no AVX-512-BF16, so backend cpu cannot compute in "
                           "bf16; use dtype auto or f32");
    b = mem_zalloc(1, sizeof *b);
    if (!b)
        return larder_fail(e, LARDER_ENOMEM, "no memory for backend cpu");
    b->ref.mul = ref_mul_pick(&mul_isa);
    b->mul = mul_pick();
    b->ref.base = (struct backend){.ops = &backend_cpu,
                                   .model = m,
                                   .p = model_params(m),
                                   .elem = o->dtype,
                                   .n_threads = thread_count(o->n_threads)};
    snprintf(b->ref.base.isa, sizeof b->ref.base.isa, "%s", isa_name(bf16));
    rc = pool_open(&b->pool, b->ref.base.n_threads, e);
    if (!rc)
        rc = cpu_gemm_open(b, e);
    if (rc) {
        cpu_close(&b->ref.base);
        return rc;
    }
    *ret = &b->ref.base;
    return 0;
}

static void cpu_parallel(struct backend *b, uint32_t n, backend_item_fn *fn, void *arg)
{
    pool_for(cpu_of(b)->pool, n, fn, arg);
}

const struct backend_ops backend_cpu = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .layer_load = cpu_layer_load,
    .layer_free = cpu_layer_free,
    .qkv = cpu_qkv,
    .attend = cpu_attend,
    .finish = cpu_finish,
    .window = cpu_window,
    .resume = cpu_resume,
    .logits = cpu_logits,
    .head_load = cpu_head_load,
    .head_free = cpu_head_free,
    .parallel = cpu_parallel,
};
