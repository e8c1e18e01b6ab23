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

/* `struct layer` of this backend; ref has its own. The matrices for a pass, or kept ones. */
struct cpu_layer {
    float *attn_norm, *ffn_norm;
    struct ref_extras extras;
    struct cpu_matrix qkv, o, gate_up, down;
    struct cpu_kept *kept;
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
    uint32_t q = p->geom.n_heads * p->geom.head_dim, kv = p->geom.n_kv_heads * p->geom.head_dim;
    uint64_t row = (uint64_t)p->n_hidden * elem_bytes(b);

    for (int i = 0; i < 4; i++) {
        x->plain[i] = mem_aligned((uint64_t)x->w[i]->n_in * x->w[i]->n_out, elem_bytes(b));
        if (!x->plain[i])
            return larder_fail(e, LARDER_ENOMEM, "no memory for the weights of layer %u", layer);
    }
    return cpu_read(cpu_of(b), layer,
                    (const struct cpu_part[]){
                        {.which = MODEL_Q, .n = q, .to = x->plain[0]},
                        {.which = MODEL_K, .n = kv, .to = x->plain[0] + q * row},
                        {.which = MODEL_V, .n = kv, .to = x->plain[0] + (q + kv) * row},
                        {.which = MODEL_O, .n = p->n_hidden, .to = x->plain[1]},
                        {.which = MODEL_GATE, .n = p->n_ff, .to = x->plain[2]},
                        {.which = MODEL_UP, .n = p->n_ff, .to = x->plain[2] + p->n_ff * row},
                        {.which = MODEL_DOWN, .n = p->n_hidden, .to = x->plain[3]},
                    },
                    7, e);
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
    cpu_kept_free(l->kept);
    ref_extras_done(&l->extras);
    mem_free(l->attn_norm);
    mem_free(l->ffn_norm);
    mem_free(l);
}

static int load_packed(struct backend *b, uint32_t layer, struct cpu_layer *l, struct larder_err *e)
{
    struct parts x = {.b = cpu_of(b), .w = {&l->qkv, &l->o, &l->gate_up, &l->down}};
    int rc = read_matrices(b, layer, &x, e);

    if (!rc) {
        pool_for(x.b->pool, 4, pack_item, &x);
        rc = x.rc;
        if (rc && e)
            *e = x.e;
    }
    for (int i = 0; i < 4; i++)
        mem_free(x.plain[i]);
    return rc;
}

/* Products of a few rows are bound by reading the weights; only where oneDNN multiplies bf16
 * are they packed for those too. */
static int cpu_layer_load(struct backend *b, uint32_t layer, bool kept, struct layer **ret,
                          struct larder_err *e)
{
    struct cpu_layer *l = mem_zalloc(1, sizeof *l);
    int rc;

    if (!l)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the weights of layer %u", layer);
    set_shapes(b->p, l);
    rc = kept && b->elem == KV_F32 ? cpu_kept_load(cpu_of(b), layer, &l->kept, e)
                                   : load_packed(b, layer, l, e);
    if (!rc)
        rc = cpu_read_norm(b, layer, MODEL_ATTN_NORM, &l->attn_norm, e);
    if (!rc)
        rc = cpu_read_norm(b, layer, MODEL_FFN_NORM, &l->ffn_norm, e);
    if (!rc)
        rc = ref_extras_load(b, layer, &l->extras, e);
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
    const struct rope *rope;
    const uint32_t *pos;
    uint32_t n;
};

static void table_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct tables *t = arg;
    uint32_t dims = t->b->ref.base.p->rope_dims,
             end = (item + 1) * CPU_ROWS < t->n ? (item + 1) * CPU_ROWS : t->n;

    (void)worker;
    for (uint32_t r = item * CPU_ROWS; r < end; r++) {
        float *to = t->b->rope + (uint64_t)r * dims;

        rope_angles(t->rope, dims, t->pos[r], to, to + dims / 2);
    }
}

static int make_tables(struct cpu_backend *b, const struct project *p, struct larder_err *e)
{
    const uint32_t *pos = p->pos, n = p->n;
    struct tables t = {b, p->rope, pos, n};

    if (b->rope_of == p->rope && b->n_rope == n && !memcmp(b->rope_pos, pos, n * sizeof *pos))
        return 0;
    if (n > b->cap_rope) {
        mem_free(b->rope_pos);
        mem_free(b->rope);
        b->rope_pos = mem_alloc(n, sizeof *b->rope_pos);
        b->rope = mem_aligned((uint64_t)n * b->ref.base.p->rope_dims, sizeof *b->rope);
        b->cap_rope = b->rope_pos && b->rope ? n : 0;
        b->n_rope = 0;
        if (!b->cap_rope)
            return larder_fail(e, LARDER_ENOMEM, "no memory for %u positions", n);
    }
    pool_for(b->pool, (n + CPU_ROWS - 1) / CPU_ROWS, table_item, &t);
    memcpy(b->rope_pos, pos, n * sizeof *pos);
    b->n_rope = n;
    b->rope_of = p->rope;
    return 0;
}

/* ---- qkv */

struct work {
    struct cpu_backend *b;
    const struct cpu_layer *l;
    const struct project *r; /* qkv */
    float *hidden;
    const uint8_t *attended; /* o */
    uint32_t n;
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

/* A projected row into the head-major buffers, q and k normalised and rotated; it is changed. */
static void scatter(const struct work *w, uint32_t row, float *y, float *buf)
{
    const struct backend *b = &w->b->ref.base;
    const struct kv_geom *g = &b->p->geom;
    const struct ref_extras *extras = &w->l->extras;
    uint32_t d = g->head_dim, size = elem_bytes(b), dims = b->p->rope_dims;
    const float *cs = w->b->rope + (uint64_t)row * dims;

    if (extras->bias)
        cpu_add(extras->bias, w->l->qkv.n_out, y);
    for (uint32_t h = 0; h < g->n_heads + 2 * g->n_kv_heads; h++, y += d) {
        bool is_q = h < g->n_heads, is_k = !is_q && h < g->n_heads + g->n_kv_heads;
        uint8_t *base = is_q ? w->r->q : is_k ? w->r->k : w->r->v;
        uint64_t head = is_q ? h : is_k ? h - g->n_heads : h - g->n_heads - g->n_kv_heads;
        uint8_t *to = base + (head * w->r->stride + row) * d * size;
        const float *norm = is_q ? extras->q_norm : is_k ? extras->k_norm : NULL, *from = y;

        if (norm)
            cpu_rmsnorm(y, norm, d, b->p->norm_eps, y);
        if (is_q || is_k) {
            cpu_rope(y, cs, dims, d, buf);
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

    normalise(b, w->r->hidden + (uint64_t)row * b->p->n_hidden, w->l->attn_norm, rows, x);
    if (cpu_multiply(w->b, shape_for(w, rows, 0), &w->l->qkv, x, y, scratch))
        atomic_store(&w->failed, 1);
    for (uint32_t i = 0; i < rows; i++)
        scatter(w, row + i, y + (uint64_t)i * w->l->qkv.n_out, buf);
}

static void scatter_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct work *w = arg;
    uint32_t end = (item + 1) * CPU_ROWS < w->n ? (item + 1) * CPU_ROWS : w->n;
    uint64_t wide = w->l->qkv.n_out;
    float buf[KV_MAX_HEAD_DIM];

    (void)worker;
    for (uint32_t i = item * CPU_ROWS; i < end; i++)
        scatter(w, i, (float *)(void *)w->scratch + i * wide, buf);
}

static int qkv_kept(struct work *w, struct larder_err *e)
{
    uint32_t n_out = w->l->qkv.n_out;
    int rc;

    w->scratch = mem_aligned((uint64_t)w->n * n_out, sizeof(float));
    if (!w->scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %u rows", w->n);
    rc = cpu_kept_qkv(w->b, w->l->kept, w->l->attn_norm, w->r->hidden, w->n,
                      (float *)(void *)w->scratch, e);
    if (!rc)
        pool_for(w->b->pool, (w->n + CPU_ROWS - 1) / CPU_ROWS, scatter_item, w);
    mem_free(w->scratch);
    return rc;
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

static int cpu_qkv(struct backend *b, const struct layer *layer, const struct project *r,
                   struct larder_err *e)
{
    struct work w = {.b = cpu_of(b), .l = layer_of(layer), .r = r, .n = r->n};
    uint32_t block = r->n < CPU_ROWS ? r->n : CPU_ROWS;
    int rc = make_tables(w.b, r, e);

    if (!rc && w.l->kept)
        return qkv_kept(&w, e);
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

    if (w.l->kept)
        return cpu_kept_finish(w.b, w.l->kept, w.l->ffn_norm, hidden, o, n, e);
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

    cpu_attend_rows(&(struct cpu_attend_item){
        .q = (const uint16_t *)x->a->q + (uint64_t)h * x->a->stride * d,
        .packed = x->packed + g * x->packed_bytes,
        .n = x->a->n,
        .d = d,
        .row = row,
        .rows = rows,
        .sliding = x->a->sliding,
        .o = (uint16_t *)x->a->o + row * o_stride + (uint64_t)h * d,
        .o_stride = o_stride,
        .scratch = x->scratch + worker * x->scratch_bytes,
    });
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
    mem_free(b->scratch);
    mem_free(b);
}

float *cpu_scratch(struct cpu_backend *b, uint64_t n, struct larder_err *e)
{
    if (n > b->n_scratch) {
        mem_free(b->scratch);
        b->scratch = mem_aligned(n, sizeof *b->scratch);
        b->n_scratch = b->scratch ? n : 0;
    }
    if (!b->scratch)
        larder_fail(e, LARDER_ENOMEM, "no memory for %llu bytes of scratch",
                    (unsigned long long)n * sizeof *b->scratch);
    return b->scratch;
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
