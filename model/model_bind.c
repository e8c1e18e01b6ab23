/* model_bind.c - which tensors a model must have, their shapes, and that there are no others.
 *
 * The one idea: a tensor that nobody asked for is something the forward pass does not compute,
 * so a model with one is refused by the tensor's name. Fused matrices become several weights with
 * places of their own. */
#include <stdio.h>
#include <string.h>

#include "dequant.h"
#include "input.h"
#include "mem.h"
#include "model_file.h"

#define MAX_TENSOR_NAME 128

static bool is_bias(enum model_weight w)
{
    return w == MODEL_Q_BIAS || w == MODEL_K_BIAS || w == MODEL_V_BIAS;
}

static bool is_paired(enum model_weight w)
{
    return w == MODEL_Q || w == MODEL_K || w == MODEL_Q_BIAS || w == MODEL_K_BIAS;
}

static int missing(const char *name, struct larder_err *e)
{
    return larder_fail(e, LARDER_EMODEL, "tensor %s is missing", name);
}

/* A tensor of that shape; the rest of *ret is its place. */
static int find_shaped(const struct tensor_source *s, const char *name, uint64_t rows,
                       uint64_t cols, struct found_tensor *ret, struct larder_err *e)
{
    struct found_tensor t;
    int rc = s->find(s->arg, name, &t, e);

    if (rc == LARDER_ENOTFOUND)
        return missing(name, e);
    if (rc)
        return rc;
    if (t.rows != rows || t.cols != cols)
        return larder_fail(e, LARDER_EMODEL, "tensor %s is %llu x %llu; expected %llu x %llu", name,
                           (unsigned long long)t.rows, (unsigned long long)t.cols,
                           (unsigned long long)rows, (unsigned long long)cols);
    *ret = t;
    return 0;
}

/* Rows row0 and up of a tensor as a weight. */
static void take_rows(const struct tensor_source *s, const struct found_tensor *t,
                      enum model_weight w, uint32_t row0, uint32_t rows, uint32_t cols,
                      struct stored_weight *ret)
{
    uint64_t row_bytes = (uint64_t)cols / t->format->block_len * t->format->block_bytes;

    *ret = (struct stored_weight){.fd = t->fd,
                                  .format = t->format,
                                  .offset = t->offset + row0 * row_bytes,
                                  .row_bytes = row_bytes,
                                  .rows = rows,
                                  .cols = cols,
                                  .paired = s->paired && is_paired(w)};
}

static int bind_one(const struct model *m, const struct tensor_source *s, enum model_weight w,
                    const char *name, struct stored_weight *ret, struct larder_err *e)
{
    struct found_tensor t;
    uint32_t rows, cols;
    int rc;

    model_weight_shape(m, w, &rows, &cols);
    /* a bias stands in the file as one row; it is used as rows, like those it is added to */
    rc =
        is_bias(w) ? find_shaped(s, name, 1, rows, &t, e) : find_shaped(s, name, rows, cols, &t, e);
    if (!rc && is_bias(w) && t.format->block_len != 1)
        rc = larder_fail(e, LARDER_EUNSUPPORTED, "tensor %s: a bias in %s is not supported", name,
                         t.format->name);
    if (!rc)
        take_rows(s, &t, w, 0, rows, cols, ret);
    return rc;
}

/* Several weights one after the other in one matrix. */
static int bind_fused(const struct model *m, const struct tensor_source *s, const char *name,
                      const enum model_weight *w, int n, struct stored_weight *to,
                      struct larder_err *e)
{
    struct found_tensor t;
    uint32_t rows, cols, all = 0, at = 0;
    int rc;

    for (int i = 0; i < n; i++) {
        model_weight_shape(m, w[i], &rows, &cols);
        all += rows;
    }
    rc = find_shaped(s, name, all, cols, &t, e);
    for (int i = 0; i < n && !rc; i++) {
        model_weight_shape(m, w[i], &rows, &cols);
        take_rows(s, &t, w[i], at, rows, cols, &to[w[i]]);
        at += rows;
    }
    return rc;
}

/* "blk.3.attn_q.weight" */
static void layer_name(const struct tensor_source *s, uint32_t layer, const char *name,
                       char out[MAX_TENSOR_NAME])
{
    snprintf(out, MAX_TENSOR_NAME, "%s.%u.%s", s->names->layer, layer, name);
}

static bool has_weight(const struct model *m, const struct model_arch *arch, enum model_weight w)
{
    bool fused = w == MODEL_Q || w == MODEL_K || w == MODEL_V || w == MODEL_GATE || w == MODEL_UP;

    if (is_bias(w))
        return m->p.has_qkv_bias;
    if (w == MODEL_Q_NORM || w == MODEL_K_NORM)
        return m->p.has_qk_norm;
    return !(arch->fused && fused);
}

static int bind_layer(const struct model *m, const struct tensor_source *s, uint32_t layer,
                      struct larder_err *e)
{
    static const enum model_weight qkv[] = {MODEL_Q, MODEL_K, MODEL_V},
                                   gate_up[] = {MODEL_GATE, MODEL_UP};
    struct stored_weight *to = m->layer[layer];
    char name[MAX_TENSOR_NAME];
    int rc = 0;

    for (int w = 0; w < MODEL_LAYER_WEIGHTS && !rc; w++) {
        if (!has_weight(m, s->arch, (enum model_weight)w))
            continue;
        layer_name(s, layer, s->names->weight[w], name);
        rc = bind_one(m, s, (enum model_weight)w, name, &to[w], e);
    }
    if (rc || !s->arch->fused)
        return rc;
    layer_name(s, layer, s->names->qkv, name);
    rc = bind_fused(m, s, name, qkv, 3, to, e);
    layer_name(s, layer, s->names->gate_up, name);
    return rc ? rc : bind_fused(m, s, name, gate_up, 2, to, e);
}

/* Biases are the file's choice in some architectures: the first layer decides for all. */
static int look_for_bias(struct model *m, const struct tensor_source *s, struct larder_err *e)
{
    char name[MAX_TENSOR_NAME];
    struct found_tensor t;
    int rc;

    m->p.has_qk_norm = s->arch->qk_norm;
    m->p.has_qkv_bias = s->arch->qkv_bias;
    if (s->arch->qkv_bias || s->arch->fused || !s->may_have_bias)
        return 0;
    layer_name(s, 0, s->names->weight[MODEL_Q_BIAS], name);
    rc = s->find(s->arg, name, &t, e);
    m->p.has_qkv_bias = !rc;
    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int bind_head(struct model *m, const struct tensor_source *s, struct larder_err *e)
{
    const char *name = s->names->weight[MODEL_HEAD];
    struct found_tensor t;
    int rc;

    m->p.tied = s->tied;
    if (s->tied) {
        m->head = m->embed;
        rc = s->find(s->arg, name, &t, e); /* a copy that nobody reads */
        return rc == LARDER_ENOTFOUND ? 0 : rc;
    }
    return bind_one(m, s, MODEL_HEAD, name, &m->head, e);
}

static int bind_embedding(struct model *m, const struct tensor_source *s, struct larder_err *e)
{
    const char *name = s->names->weight[MODEL_EMBED];
    struct found_tensor t;
    int rc = s->find(s->arg, name, &t, e);

    if (rc)
        return rc == LARDER_ENOTFOUND ? missing(name, e) : rc;
    if (!m->p.n_vocab) {
        if (!t.rows || t.rows > KV_MAX_VOCAB)
            return larder_fail(e, LARDER_EMODEL, "a vocabulary of %llu tokens; at most %u",
                               (unsigned long long)t.rows, KV_MAX_VOCAB);
        m->p.n_vocab = (uint32_t)t.rows;
    }
    rc = bind_one(m, s, MODEL_EMBED, name, &m->embed, e);
    if (!rc)
        rc = bind_one(m, s, MODEL_OUT_NORM, s->names->weight[MODEL_OUT_NORM], &m->out_norm, e);
    return rc ? rc : bind_head(m, s, e);
}

int model_bind(struct model *m, const struct tensor_source *s, struct larder_err *e)
{
    char name[MAX_TENSOR_NAME];
    int rc;

    m->layer = mem_zalloc(m->p.geom.n_layers, sizeof *m->layer);
    if (!m->layer)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    rc = bind_embedding(m, s, e);
    if (!rc)
        rc = look_for_bias(m, s, e);
    for (uint32_t l = 0; !rc && l < m->p.geom.n_layers; l++)
        rc = bind_layer(m, s, l, e);
    if (!rc && s->unused(s->arg, name, sizeof name))
        rc = larder_fail(e, LARDER_EUNSUPPORTED,
                         "tensor %s is not part of what is computed for architecture %s", name,
                         s->arch->name);
    return rc;
}

int model_read_vector(const struct tensor_source *s, const char *name, uint32_t n, double *ret,
                      struct larder_err *e)
{
    struct found_tensor t;
    uint8_t *raw;
    float *x;
    int rc = s->find(s->arg, name, &t, e);

    if (rc)
        return rc;
    if (t.rows != 1 || t.cols != n || t.format->block_len != 1)
        return larder_fail(e, LARDER_EMODEL, "tensor %s is not a plain vector of %u elements", name,
                           n);
    raw = mem_alloc(n, t.format->block_bytes);
    x = mem_alloc(n, sizeof *x);
    rc = raw && x ? input_read_at(t.fd, t.offset, (uint64_t)n * t.format->block_bytes, raw, e)
                  : larder_fail(e, LARDER_ENOMEM, "no memory to read %s", name);
    if (!rc)
        t.format->to_f32(raw, n, x);
    for (uint32_t i = 0; i < n && !rc; i++)
        ret[i] = x[i];
    mem_free(raw);
    mem_free(x);
    return rc;
}
