/* model_gguf.c - a GGUF file as a model.
 *
 * The one idea: keys carry the architecture's name and are otherwise the same for all of them,
 * and so are the tensors' names. Only files of the llama architecture store Q and K rows for
 * interleaved RoPE. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "dequant.h"
#include "gguf.h"
#include "mem.h"
#include "model_file.h"
#include "tokenizer_gguf.h"

#define MAX_KEY 96

static const struct tensor_names names = {
    .layer = "blk",
    .weight =
        {
            [MODEL_ATTN_NORM] = "attn_norm.weight",
            [MODEL_Q] = "attn_q.weight",
            [MODEL_K] = "attn_k.weight",
            [MODEL_V] = "attn_v.weight",
            [MODEL_O] = "attn_output.weight",
            [MODEL_FFN_NORM] = "ffn_norm.weight",
            [MODEL_GATE] = "ffn_gate.weight",
            [MODEL_UP] = "ffn_up.weight",
            [MODEL_DOWN] = "ffn_down.weight",
            [MODEL_Q_BIAS] = "attn_q.bias",
            [MODEL_K_BIAS] = "attn_k.bias",
            [MODEL_V_BIAS] = "attn_v.bias",
            [MODEL_Q_NORM] = "attn_q_norm.weight",
            [MODEL_K_NORM] = "attn_k_norm.weight",
            [MODEL_EMBED] = "token_embd.weight",
            [MODEL_OUT_NORM] = "output_norm.weight",
            [MODEL_HEAD] = "output.weight",
        },
    .qkv = "attn_qkv.weight",
    .gate_up = "ffn_up.weight",
};

/* A file while it is opened. */
struct opening {
    struct model *m;
    const struct gguf *g;
    bool *used; /* [tensors] */
    struct tensor_source source;
    char key[MAX_KEY]; /* the last one that was asked for */
};

/* "llama.block_count" */
static const char *key_of(struct opening *o, const char *name)
{
    snprintf(o->key, sizeof o->key, "%s.%s", o->m->p.arch, name);
    return o->key;
}

/* ---- parameters */

static int missing(const char *key, struct larder_err *e)
{
    return larder_fail(e, LARDER_EMODEL, "key %s is missing", key);
}

/* Leaves *ret alone when the key is absent. */
static int may_count(struct opening *o, const char *name, uint32_t *ret, struct larder_err *e)
{
    int rc = gguf_get_u32(o->g, key_of(o, name), ret, e);

    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int need_count(struct opening *o, const char *name, uint32_t max, uint32_t *ret,
                      struct larder_err *e)
{
    int rc = gguf_get_u32(o->g, key_of(o, name), ret, e);

    if (rc == LARDER_ENOTFOUND)
        return missing(o->key, e);
    if (!rc && (!*ret || *ret > max))
        return larder_fail(e, LARDER_EMODEL, "key %s is %u; must be 1 to %u", o->key, *ret, max);
    return rc;
}

static int may_number(struct opening *o, const char *name, double *ret, struct larder_err *e)
{
    int rc = gguf_get_f64(o->g, key_of(o, name), ret, e);

    if (rc == LARDER_ENOTFOUND)
        return 0;
    if (!rc && !(isfinite(*ret) && *ret > 0))
        return larder_fail(e, LARDER_EMODEL, "key %s is not a positive number", o->key);
    return rc;
}

static bool str_is(struct gguf_str s, const char *want)
{
    return s.len == strlen(want) && !memcmp(s.p, want, s.len);
}

/* Features that would change the computation and that this reader does not have. */
static int refuse_unknown_features(struct opening *o, struct larder_err *e)
{
    static const char *const absent[] = {
        "expert_count",           "attention.clamp_kqv",     "attention.scale",
        "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
        "embedding_scale",        "residual_scale",          "rope.scaling.factor",
        "rope.scale_linear"};
    struct gguf_str s;
    uint32_t n;
    int rc;

    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++) {
        n = 0;
        if (!gguf_has(o->g, key_of(o, absent[i])))
            continue;
        if (gguf_get_u32(o->g, o->key, &n, NULL) || n)
            return larder_fail(e, LARDER_EUNSUPPORTED, "feature %s is not supported", o->key);
    }
    rc = gguf_get_str(o->g, key_of(o, "rope.scaling.type"), &s, e);
    if (!rc && !str_is(s, "none") && !str_is(s, "longrope"))
        return larder_fail(e, LARDER_EUNSUPPORTED, "rope scaling %.*s is not supported",
                           (int)(s.len < 40 ? s.len : 40), s.p);
    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int read_arch(struct opening *o, struct larder_err *e)
{
    struct gguf_str arch;
    int rc = gguf_get_str(o->g, "general.architecture", &arch, e);

    if (rc == LARDER_ENOTFOUND)
        return missing("general.architecture", e);
    if (rc)
        return rc;
    o->source.arch = model_arch(arch.p, arch.len);
    if (!o->source.arch)
        return model_arch_unknown(arch.p, arch.len, e);
    o->m->p.arch = o->source.arch->name;
    o->source.paired = str_is(arch, "llama");
    return refuse_unknown_features(o, e);
}

static int read_shape(struct opening *o, struct larder_err *e)
{
    struct model_params *p = &o->m->p;
    struct kv_geom *geom = &p->geom;
    int rc;

    rc = need_count(o, "block_count", KV_MAX_LAYERS, &geom->n_layers, e);
    if (!rc)
        rc = need_count(o, "embedding_length", MODEL_MAX_HIDDEN, &p->n_hidden, e);
    if (!rc)
        rc = need_count(o, "feed_forward_length", MODEL_MAX_FF, &p->n_ff, e);
    if (!rc)
        rc = need_count(o, "attention.head_count", KV_MAX_HEADS, &geom->n_heads, e);
    if (!rc)
        rc = need_count(o, "context_length", KV_MAX_CTX, &p->n_positions, e);
    if (rc)
        return rc;
    geom->n_kv_heads = geom->n_heads;
    geom->head_dim = p->n_hidden / geom->n_heads;
    rc = may_count(o, "attention.head_count_kv", &geom->n_kv_heads, e);
    return rc ? rc : may_count(o, "attention.key_length", &geom->head_dim, e);
}

static int read_numbers(struct opening *o, struct larder_err *e)
{
    struct model_params *p = &o->m->p;
    uint32_t value_len = p->geom.head_dim;
    int rc;

    p->rope_dims = p->geom.head_dim;
    p->rope_theta = 10000.0;
    rc = may_count(o, "rope.dimension_count", &p->rope_dims, e);
    if (!rc)
        rc = may_count(o, "attention.value_length", &value_len, e);
    if (!rc)
        rc = may_number(o, "rope.freq_base", &p->rope_theta, e);
    if (!rc)
        rc = may_number(o, "attention.layer_norm_rms_epsilon", &p->norm_eps, e);
    if (rc)
        return rc;
    if (!(p->norm_eps > 0))
        return missing(key_of(o, "attention.layer_norm_rms_epsilon"), e);
    if (value_len != p->geom.head_dim || (o->source.paired && p->rope_dims != p->geom.head_dim))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "head_dim %u with %u rotated and %u value elements is not supported",
                           p->geom.head_dim, p->rope_dims, value_len);
    return model_check_params(p, e);
}

static int read_params(struct opening *o, struct larder_err *e)
{
    struct gguf_str s = {"", 0};
    uint32_t sliding = 0;
    int rc = read_shape(o, e);

    if (!rc)
        rc = read_numbers(o, e);
    if (!rc)
        rc = may_count(o, "attention.sliding_window", &sliding, e);
    if (!rc)
        rc = model_set_sliding(o->m, sliding, 0, e);
    if (rc)
        return rc;
    gguf_get_str(o->g, "general.name", &s, NULL);
    return model_set_name(o->m, s.p, s.len, e);
}

/* ---- RoPE: scalings are tensors of factors */

static int read_longrope(struct opening *o, const double *long_factor, double *buf,
                         struct larder_err *e)
{
    uint32_t half = o->m->p.rope_dims / 2, n_original = 0;
    double factor = 0;
    int rc = model_read_vector(&o->source, "rope_factors_short.weight", half, buf, e);

    if (rc)
        return rc == LARDER_ENOTFOUND
                   ? larder_fail(e, LARDER_EMODEL, "tensor rope_factors_short.weight is missing")
                   : rc;
    rc = need_count(o, "rope.scaling.original_context_length", KV_MAX_CTX, &n_original, e);
    if (!rc)
        rc = may_number(o, "rope.scaling.attn_factor", &factor, e);
    return rc ? rc : model_set_longrope(o->m, buf, long_factor, n_original, factor, e);
}

static int read_rope(struct opening *o, struct larder_err *e)
{
    uint32_t half = o->m->p.rope_dims / 2;
    double *factor = mem_alloc(o->m->p.rope_dims, sizeof *factor);
    int rc = factor ? model_alloc_rope(o->m, e) : larder_fail(e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = model_read_vector(&o->source, "rope_freqs.weight", half, factor, e);
    if (!rc)
        rc = model_set_factors(o->m, factor, e);
    if (!rc || rc == LARDER_ENOTFOUND)
        rc = model_read_vector(&o->source, "rope_factors_long.weight", half, factor, e);
    if (!rc)
        rc = read_longrope(o, factor, factor + half, e);
    mem_free(factor);
    if (rc == LARDER_ENOTFOUND && gguf_has(o->g, key_of(o, "rope.scaling.attn_factor")))
        return larder_fail(e, LARDER_EUNSUPPORTED, "key %s without factors is not supported",
                           o->key);
    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

/* ---- tensors */

static int find_tensor(void *arg, const char *name, struct found_tensor *ret, struct larder_err *e)
{
    struct opening *o = arg;
    const struct gguf_tensor *t = gguf_find_tensor(o->g, name);

    if (!t)
        return LARDER_ENOTFOUND;
    if (t->ne[2] != 1 || t->ne[3] != 1)
        return larder_fail(e, LARDER_EMODEL, "tensor %s has more than two dimensions", name);
    o->used[t - gguf_tensor_at(o->g, 0)] = true;
    *ret =
        (struct found_tensor){gguf_fd(o->g), tensor_format(t->type), t->offset, t->ne[1], t->ne[0]};
    return 0;
}

static bool unused_tensor(void *arg, char *name, size_t cap)
{
    const struct opening *o = arg;

    for (uint64_t i = 0; i < gguf_n_tensors(o->g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(o->g, i);

        if (o->used[i])
            continue;
        snprintf(name, cap, "%.*s", (int)(t->name.len < 120 ? t->name.len : 120), t->name.p);
        return true;
    }
    return false;
}

static int read_weights(struct opening *o, struct larder_err *e)
{
    int rc;

    o->source.tied = !gguf_find_tensor(o->g, names.weight[MODEL_HEAD]);
    o->source.may_have_bias = true;
    rc = read_rope(o, e);
    return rc ? rc : model_bind(o->m, &o->source, e);
}

/* ---- life */

static void gguf_model_close(struct model *m)
{
    gguf_close(m->gguf);
}

static int gguf_model_open(struct model *m, const char *path, struct larder_err *e)
{
    struct opening o = {.m = m};
    struct gguf_str s;
    int rc = gguf_open(&m->gguf, path, e);

    if (rc)
        return rc;
    o.g = m->gguf;
    o.source = (struct tensor_source){
        .arg = &o, .names = &names, .find = find_tensor, .unused = unused_tensor};
    o.used = mem_zalloc(gguf_n_tensors(o.g), sizeof *o.used);
    rc = o.used ? read_arch(&o, e) : larder_fail(e, LARDER_ENOMEM, "no memory");
    if (!rc)
        rc = read_params(&o, e);
    if (!rc)
        rc = read_weights(&o, e);
    if (!rc)
        rc = tokenizer_from_gguf(&m->tok, o.g, m->p.n_vocab, e);
    mem_free(o.used);
    if (rc)
        return rc;
    if (tokenizer_eos(m->tok) >= 0)
        m->end[m->n_ends++] = (uint32_t)tokenizer_eos(m->tok);
    if (!gguf_get_str(o.g, "tokenizer.chat_template", &s, NULL))
        model_set_template(m, s.p, s.len);
    return 0;
}

static int gguf_model_hash(const struct model *m, struct sha256 *s, struct larder_err *e)
{
    return model_hash_file(gguf_fd(m->gguf), gguf_bytes(m->gguf), s, e);
}

const struct model_format model_format_gguf = {
    .open = gguf_model_open,
    .hash = gguf_model_hash,
    .close = gguf_model_close,
};
