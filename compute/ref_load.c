/* ref_load.c - weights of backend `ref`: dequantised to f32 and packed in panels.
 *
 * The one idea: matrices are read a few hundred rows at a time, so that loading
 * needs one small buffer beside the packed result; the output matrix can be used
 * slice by slice without ever being whole in memory. */
#include "ref.h"

#include "mem.h"

#define READ_ROWS 256u
#define HEAD_SLICE 2048u /* rows of the output matrix that logits without a head read at once */

static int no_memory(struct larder_err *e, const char *what)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory for %s", what);
}

static int matrix_new(struct ref_matrix *w, uint32_t n_out, uint32_t n_in, struct larder_err *e)
{
    w->n_in = n_in;
    w->n_out = n_out;
    w->panel = mem_aligned((uint64_t)ref_padded(n_out) * n_in, sizeof(float));
    return w->panel ? 0 : no_memory(e, "a weight matrix");
}

/* Source rows from.. of `which` become rows to.. of w. */
static int matrix_read(const struct model *m, uint32_t layer, enum model_weight which,
                       uint32_t from, uint32_t n, struct ref_matrix *w, uint32_t to,
                       struct larder_err *e)
{
    float *buf = mem_alloc((uint64_t)READ_ROWS * w->n_in, sizeof *buf);
    int rc = 0;

    if (!buf)
        return no_memory(e, "reading weights");
    for (uint32_t i = 0; i < n && !rc; i += READ_ROWS) {
        uint32_t step = n - i < READ_ROWS ? n - i : READ_ROWS;

        rc = model_read_f32(m, layer, which, from + i, step, buf, e);
        if (!rc)
            ref_pack_rows(w, to + i, buf, step);
    }
    mem_free(buf);
    return rc;
}

static int matrix_load(const struct model *m, uint32_t layer, enum model_weight which,
                       struct ref_matrix *w, struct larder_err *e)
{
    uint32_t rows, cols;
    int rc;

    model_weight_shape(m, which, &rows, &cols);
    rc = matrix_new(w, rows, cols, e);
    return rc ? rc : matrix_read(m, layer, which, 0, rows, w, 0, e);
}

/* Q, K and V side by side: one product gives all three. */
static int qkv_load(const struct backend *b, uint32_t layer, struct ref_matrix *w,
                    struct larder_err *e)
{
    const struct kv_geom *g = &b->p->geom;
    uint32_t nq = g->n_heads * g->head_dim, nkv = g->n_kv_heads * g->head_dim;
    int rc = matrix_new(w, nq + 2 * nkv, b->p->n_hidden, e);

    if (!rc)
        rc = matrix_read(b->model, layer, MODEL_Q, 0, nq, w, 0, e);
    if (!rc)
        rc = matrix_read(b->model, layer, MODEL_K, 0, nkv, w, nq, e);
    if (!rc)
        rc = matrix_read(b->model, layer, MODEL_V, 0, nkv, w, nq + nkv, e);
    return rc;
}

static int vector_load(const struct backend *b, uint32_t layer, enum model_weight which,
                       float **ret, struct larder_err *e)
{
    uint32_t rows, cols;

    model_weight_shape(b->model, which, &rows, &cols);
    *ret = mem_alloc(cols, sizeof **ret);
    if (!*ret)
        return no_memory(e, "a norm");
    return model_read_f32(b->model, layer, which, 0, 1, *ret, e);
}

static int bias_load(const struct backend *b, uint32_t layer, float **ret, struct larder_err *e)
{
    static const enum model_weight which[] = {MODEL_Q_BIAS, MODEL_K_BIAS, MODEL_V_BIAS};
    const struct kv_geom *g = &b->p->geom;
    float *at = mem_alloc((g->n_heads + 2ull * g->n_kv_heads) * g->head_dim, sizeof *at);
    int rc = 0;

    *ret = at;
    if (!at)
        return no_memory(e, "a bias");
    for (int i = 0; i < 3 && !rc; i++) {
        uint32_t rows, cols;

        model_weight_shape(b->model, which[i], &rows, &cols);
        rc = model_read_f32(b->model, layer, which[i], 0, rows, at, e);
        at += rows;
    }
    return rc;
}

int ref_extras_load(const struct backend *b, uint32_t layer, struct ref_extras *x,
                    struct larder_err *e)
{
    int rc = b->p->has_qkv_bias ? bias_load(b, layer, &x->bias, e) : 0;

    if (!rc && b->p->has_qk_norm)
        rc = vector_load(b, layer, MODEL_Q_NORM, &x->q_norm, e);
    if (!rc && b->p->has_qk_norm)
        rc = vector_load(b, layer, MODEL_K_NORM, &x->k_norm, e);
    return rc;
}

void ref_extras_done(struct ref_extras *x)
{
    mem_free(x->bias);
    mem_free(x->q_norm);
    mem_free(x->k_norm);
}

int ref_layer_load(struct backend *b, uint32_t layer, bool kept, struct layer **ret,
                   struct larder_err *e)
{
    struct layer *l = mem_zalloc(1, sizeof *l);
    int rc;

    (void)kept; /* one form for all */
    if (!l)
        return no_memory(e, "a layer");
    rc = vector_load(b, layer, MODEL_ATTN_NORM, &l->attn_norm, e);
    if (!rc)
        rc = vector_load(b, layer, MODEL_FFN_NORM, &l->ffn_norm, e);
    if (!rc)
        rc = ref_extras_load(b, layer, &l->extras, e);
    if (!rc)
        rc = qkv_load(b, layer, &l->qkv, e);
    if (!rc)
        rc = matrix_load(b->model, layer, MODEL_O, &l->o, e);
    if (!rc)
        rc = matrix_load(b->model, layer, MODEL_GATE, &l->gate, e);
    if (!rc)
        rc = matrix_load(b->model, layer, MODEL_UP, &l->up, e);
    if (!rc)
        rc = matrix_load(b->model, layer, MODEL_DOWN, &l->down, e);
    if (rc) {
        ref_layer_free(b, l);
        return rc;
    }
    *ret = l;
    return 0;
}

void ref_layer_free(struct backend *b, struct layer *l)
{
    (void)b;
    if (!l)
        return;
    mem_free(l->attn_norm);
    mem_free(l->ffn_norm);
    ref_extras_done(&l->extras);
    mem_free(l->qkv.panel);
    mem_free(l->o.panel);
    mem_free(l->gate.panel);
    mem_free(l->up.panel);
    mem_free(l->down.panel);
    mem_free(l);
}

int ref_head_load(struct backend *b, struct head **ret, struct larder_err *e)
{
    struct head *h = mem_zalloc(1, sizeof *h);
    int rc;

    if (!h)
        return no_memory(e, "the output matrix");
    rc = vector_load(b, 0, MODEL_OUT_NORM, &h->norm, e);
    if (!rc)
        rc = matrix_load(b->model, 0, MODEL_HEAD, &h->out, e);
    if (rc) {
        ref_head_free(b, h);
        return rc;
    }
    *ret = h;
    return 0;
}

void ref_head_free(struct backend *b, struct head *h)
{
    (void)b;
    if (!h)
        return;
    mem_free(h->norm);
    mem_free(h->out.panel);
    mem_free(h);
}

/* ---- logits */

struct head_work {
    ref_mul_fn *mul;
    struct ref_mul product; /* of the whole matrix; an item takes some panels of it */
};

#define PANELS_PER_ITEM 32u

static void head_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct head_work *w = arg;
    uint32_t panel = item * PANELS_PER_ITEM, from = panel * REF_WIDE;
    struct ref_mul x = w->product;

    (void)worker;
    x.b += panel * x.panel_stride;
    x.c += from;
    x.n = x.n - from < PANELS_PER_ITEM * REF_WIDE ? x.n - from : PANELS_PER_ITEM * REF_WIDE;
    w->mul(&x);
}

/* out[n][ldc] = x[n][n_hidden] · w^T */
static void head_mul(struct backend *b, const struct ref_matrix *w, const float *x, uint32_t n,
                     float *out, uint64_t ldc)
{
    struct head_work work = {ref_of(b)->mul, ref_by(w, x, w->n_in, n, out, ldc)};
    uint32_t wide = PANELS_PER_ITEM * REF_WIDE;

    ref_for(b, (w->n_out + wide - 1) / wide, head_item, &work);
}

static int head_sliced(struct backend *b, const float *x, uint32_t n, float *out,
                       struct larder_err *e)
{
    uint32_t n_vocab = b->p->n_vocab;
    struct ref_matrix w = {0};
    int rc = matrix_new(&w, HEAD_SLICE, b->p->n_hidden, e);

    for (uint32_t i = 0; i < n_vocab && !rc; i += HEAD_SLICE) {
        w.n_out = n_vocab - i < HEAD_SLICE ? n_vocab - i : HEAD_SLICE;
        rc = matrix_read(b->model, 0, MODEL_HEAD, i, w.n_out, &w, 0, e);
        if (!rc)
            head_mul(b, &w, x, n, out + i, n_vocab);
    }
    mem_free(w.panel);
    return rc;
}

int ref_logits(struct backend *b, const struct head *h, const float *hidden, uint32_t n, float *out,
               struct larder_err *e)
{
    uint32_t n_hidden = b->p->n_hidden;
    float *x = mem_alloc((uint64_t)n * n_hidden, sizeof *x);
    float *norm = NULL;
    int rc = x ? 0 : no_memory(e, "logits");

    if (!rc && !h)
        rc = vector_load(b, 0, MODEL_OUT_NORM, &norm, e);
    if (rc)
        goto out;
    for (uint32_t i = 0; i < n; i++)
        ref_rmsnorm(hidden + (uint64_t)i * n_hidden, h ? h->norm : norm, n_hidden, b->p->norm_eps,
                    x + (uint64_t)i * n_hidden);
    if (h)
        head_mul(b, &h->out, x, n, out, b->p->n_vocab);
    else
        rc = head_sliced(b, x, n, out, e);
out:
    mem_free(norm);
    mem_free(x);
    return rc;
}
