/* model.c - a GGUF file of the llama architecture as a model.
 *
 * The one idea: everything that could change the computation is checked at open, so
 * that a model which opens can be run; weights are then read slice by slice. The file
 * stores Q and K rows for interleaved RoPE; readers get them in rotate-half order. */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dequant.h"
#include "gguf.h"
#include "mem.h"
#include "sha256.h"
#include "size.h"
#include "template.h"
#include "tokenizer_gguf.h"

#define READ_CHUNK (1u << 20) /* bytes of file per pread: fits L2 beside its result */
#define MAX_HIDDEN (1u << 17)
#define MAX_FF (1u << 20)
#define MAX_NAME 96

struct model {
    struct gguf *g;
    struct model_params p;
    char *name;
    struct tokenizer *tok;
    const char *template_name;
    struct model_file_id id;
    const struct gguf_tensor *(*tensor)[MODEL_LAYER_WEIGHTS]; /* [n_layers] */
    const struct gguf_tensor *embed, *out_norm, *head;
    uint8_t fingerprint[32];
    bool has_fingerprint;
};

static const char *const weight_name[MODEL_WEIGHTS] = {
    [MODEL_ATTN_NORM] = "attn_norm",
    [MODEL_Q] = "attn_q",
    [MODEL_K] = "attn_k",
    [MODEL_V] = "attn_v",
    [MODEL_O] = "attn_output",
    [MODEL_FFN_NORM] = "ffn_norm",
    [MODEL_GATE] = "ffn_gate",
    [MODEL_UP] = "ffn_up",
    [MODEL_DOWN] = "ffn_down",
    [MODEL_EMBED] = "token_embd",
    [MODEL_OUT_NORM] = "output_norm",
    [MODEL_HEAD] = "output",
};

/* ---- parameters */

static int missing(const char *key, struct larder_err *e)
{
    return larder_fail(e, LARDER_EMODEL, "key %s is missing", key);
}

static int need_count(const struct gguf *g, const char *key, uint32_t max, uint32_t *ret,
                      struct larder_err *e)
{
    int rc = gguf_get_u32(g, key, ret, e);

    if (rc == LARDER_ENOTFOUND)
        return missing(key, e);
    if (!rc && (!*ret || *ret > max))
        return larder_fail(e, LARDER_EMODEL, "key %s is %u; must be 1 to %u", key, *ret, max);
    return rc;
}

/* Leaves *ret alone when the key is absent. */
static int may_count(const struct gguf *g, const char *key, uint32_t *ret, struct larder_err *e)
{
    int rc = gguf_get_u32(g, key, ret, e);

    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int may_number(const struct gguf *g, const char *key, double *ret, struct larder_err *e)
{
    int rc = gguf_get_f64(g, key, ret, e);

    if (rc == LARDER_ENOTFOUND)
        return 0;
    if (!rc && !(isfinite(*ret) && *ret > 0))
        return larder_fail(e, LARDER_EMODEL, "key %s is not a positive number", key);
    return rc;
}

static bool str_is(struct gguf_str s, const char *want)
{
    return s.len == strlen(want) && !memcmp(s.p, want, s.len);
}

/* Features that would change the computation and that this reader does not have. */
static int refuse_unknown_features(const struct gguf *g, struct larder_err *e)
{
    static const char *const absent[] = {
        "llama.expert_count", "llama.attention.sliding_window", "llama.attention.clamp_kqv",
        "llama.logit_scale",  "llama.rope.scaling.factor",      "llama.rope.scale_linear"};
    struct gguf_str s;
    uint32_t n;
    int rc;

    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++) {
        n = 0;
        if (!gguf_has(g, absent[i]))
            continue;
        if (gguf_get_u32(g, absent[i], &n, NULL) || n)
            return larder_fail(e, LARDER_EUNSUPPORTED, "feature %s is not supported", absent[i]);
    }
    rc = gguf_get_str(g, "llama.rope.scaling.type", &s, e);
    if (!rc && !str_is(s, "none"))
        return larder_fail(e, LARDER_EUNSUPPORTED, "rope scaling %.*s is not supported",
                           (int)(s.len < 40 ? s.len : 40), s.p);
    if (rc && rc != LARDER_ENOTFOUND)
        return rc;
    if (gguf_find_tensor(g, "rope_freqs.weight"))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "rope scaling by frequency factors is not supported");
    return 0;
}

static int check_arch(const struct gguf *g, struct larder_err *e)
{
    struct gguf_str arch;
    int rc = gguf_get_str(g, "general.architecture", &arch, e);

    if (rc == LARDER_ENOTFOUND)
        return missing("general.architecture", e);
    if (rc)
        return rc;
    if (!str_is(arch, "llama"))
        return larder_fail(e, LARDER_EUNSUPPORTED, "architecture %.*s is not supported; llama is",
                           (int)(arch.len < 40 ? arch.len : 40), arch.p);
    return refuse_unknown_features(g, e);
}

static int read_shape(struct model *m, struct larder_err *e)
{
    struct model_params *p = &m->p;
    struct kv_geom *geom = &p->geom;
    int rc;

    rc = need_count(m->g, "llama.block_count", KV_MAX_LAYERS, &geom->n_layers, e);
    if (!rc)
        rc = need_count(m->g, "llama.embedding_length", MAX_HIDDEN, &p->n_hidden, e);
    if (!rc)
        rc = need_count(m->g, "llama.feed_forward_length", MAX_FF, &p->n_ff, e);
    if (!rc)
        rc = need_count(m->g, "llama.attention.head_count", KV_MAX_HEADS, &geom->n_heads, e);
    if (!rc)
        rc = need_count(m->g, "llama.context_length", KV_MAX_CTX, &p->n_positions, e);
    if (rc)
        return rc;
    geom->n_kv_heads = geom->n_heads;
    geom->head_dim = p->n_hidden / geom->n_heads;
    rc = may_count(m->g, "llama.attention.head_count_kv", &geom->n_kv_heads, e);
    if (!rc)
        rc = may_count(m->g, "llama.attention.key_length", &geom->head_dim, e);
    if (!rc)
        rc = kv_geom_check(geom, e);
    return rc;
}

static int read_params(struct model *m, struct larder_err *e)
{
    struct model_params *p = &m->p;
    uint32_t value_len;
    struct gguf_str s = {"", 0};
    int rc;

    p->arch = "llama";
    p->rope_theta = 10000.0;
    rc = read_shape(m, e);
    if (rc)
        return rc;
    value_len = p->rope_dims = p->geom.head_dim;
    rc = may_count(m->g, "llama.rope.dimension_count", &p->rope_dims, e);
    if (!rc)
        rc = may_count(m->g, "llama.attention.value_length", &value_len, e);
    if (!rc)
        rc = may_number(m->g, "llama.rope.freq_base", &p->rope_theta, e);
    if (!rc)
        rc = may_number(m->g, "llama.attention.layer_norm_rms_epsilon", &p->norm_eps, e);
    if (rc)
        return rc;
    if (!(p->norm_eps > 0))
        return missing("llama.attention.layer_norm_rms_epsilon", e);
    if (p->rope_dims != p->geom.head_dim || value_len != p->geom.head_dim)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "head_dim %u with %u rotated and %u value elements is not supported",
                           p->geom.head_dim, p->rope_dims, value_len);
    if (gguf_get_str(m->g, "general.name", &s, NULL) == 0 && s.len > 200)
        s.len = 200;
    m->name = mem_zalloc(s.len + 1, 1);
    if (!m->name)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    memcpy(m->name, s.p, s.len);
    p->name = m->name;
    return 0;
}

/* ---- tensors */

void model_weight_shape(const struct model *m, enum model_weight w, uint32_t *rows, uint32_t *cols)
{
    const struct model_params *p = &m->p;
    uint32_t q = p->geom.n_heads * p->geom.head_dim, kv = p->geom.n_kv_heads * p->geom.head_dim;

    *cols = w == MODEL_O ? q : w == MODEL_DOWN ? p->n_ff : p->n_hidden;
    switch (w) {
    case MODEL_ATTN_NORM:
    case MODEL_FFN_NORM:
    case MODEL_OUT_NORM:
        *rows = 1;
        break;
    case MODEL_Q:
        *rows = q;
        break;
    case MODEL_K:
    case MODEL_V:
        *rows = kv;
        break;
    case MODEL_GATE:
    case MODEL_UP:
        *rows = p->n_ff;
        break;
    case MODEL_EMBED:
    case MODEL_HEAD:
        *rows = p->n_vocab;
        break;
    default:
        *rows = p->n_hidden;
    }
}

static int find_weight(struct model *m, enum model_weight w, const char *name,
                       const struct gguf_tensor **ret, struct larder_err *e)
{
    const struct gguf_tensor *t = gguf_find_tensor(m->g, name);
    uint32_t rows, cols;

    if (!t)
        return larder_fail(e, LARDER_EMODEL, "tensor %s is missing", name);
    model_weight_shape(m, w, &rows, &cols);
    if (t->ne[0] != cols || t->ne[1] != rows || t->ne[2] != 1 || t->ne[3] != 1)
        return larder_fail(e, LARDER_EMODEL, "tensor %s is %llu x %llu; expected %u x %u", name,
                           (unsigned long long)t->ne[1], (unsigned long long)t->ne[0], rows, cols);
    *ret = t;
    return 0;
}

static int find_layer(struct model *m, uint32_t layer, struct larder_err *e)
{
    char name[MAX_NAME];
    int rc;

    for (int w = 0; w < MODEL_LAYER_WEIGHTS; w++) {
        snprintf(name, sizeof name, "blk.%u.%s.bias", layer, weight_name[w]);
        if (gguf_find_tensor(m->g, name))
            return larder_fail(e, LARDER_EUNSUPPORTED, "bias tensor %s is not supported", name);
        snprintf(name, sizeof name, "blk.%u.%s.weight", layer, weight_name[w]);
        rc = find_weight(m, (enum model_weight)w, name, &m->tensor[layer][w], e);
        if (rc)
            return rc;
    }
    return 0;
}

static int find_tensors(struct model *m, struct larder_err *e)
{
    const struct gguf_tensor *embed = gguf_find_tensor(m->g, "token_embd.weight");
    int rc;

    if (!embed)
        return larder_fail(e, LARDER_EMODEL, "tensor token_embd.weight is missing");
    if (!embed->ne[1] || embed->ne[1] > KV_MAX_VOCAB)
        return larder_fail(e, LARDER_EMODEL, "a vocabulary of %llu tokens; at most %u",
                           (unsigned long long)embed->ne[1], KV_MAX_VOCAB);
    m->p.n_vocab = (uint32_t)embed->ne[1];
    m->tensor = mem_zalloc(m->p.geom.n_layers, sizeof *m->tensor);
    if (!m->tensor)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    rc = find_weight(m, MODEL_EMBED, "token_embd.weight", &m->embed, e);
    if (!rc)
        rc = find_weight(m, MODEL_OUT_NORM, "output_norm.weight", &m->out_norm, e);
    m->head = m->embed;
    if (!rc && gguf_find_tensor(m->g, "output.weight"))
        rc = find_weight(m, MODEL_HEAD, "output.weight", &m->head, e);
    for (uint32_t l = 0; !rc && l < m->p.geom.n_layers; l++)
        rc = find_layer(m, l, e);
    return rc;
}

/* ---- template */

static const char *recognise_template(const struct gguf *g)
{
    struct gguf_str s;
    const char *name = NULL;

    if (!gguf_get_str(g, "tokenizer.chat_template", &s, NULL))
        name = template_recognise(s.p, s.len);
    return name ? name : "plain";
}

/* ---- life */

int model_open(struct model **ret, const char *path, struct larder_err *e)
{
    struct model *m = mem_zalloc(1, sizeof *m);
    struct stat st;
    int rc;

    if (!m)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    rc = gguf_open(&m->g, path, e);
    if (rc) {
        mem_free(m);
        return rc;
    }
    if (fstat(gguf_fd(m->g), &st) == 0)
        m->id = (struct model_file_id){st.st_dev, st.st_ino, (uint64_t)st.st_size,
                                       (uint64_t)st.st_mtim.tv_sec * 1000000000u +
                                           (uint64_t)st.st_mtim.tv_nsec};
    rc = check_arch(m->g, e);
    if (!rc)
        rc = read_params(m, e);
    if (!rc)
        rc = find_tensors(m, e);
    if (!rc)
        rc = tokenizer_from_gguf(&m->tok, m->g, m->p.n_vocab, e);
    if (rc) {
        larder_fail_in(e, rc, "%s", path);
        model_close(m);
        return rc;
    }
    m->template_name = recognise_template(m->g);
    *ret = m;
    return 0;
}

void model_close(struct model *m)
{
    if (!m)
        return;
    tokenizer_free(m->tok);
    gguf_close(m->g);
    mem_free(m->tensor);
    mem_free(m->name);
    mem_free(m);
}

const struct model_params *model_params(const struct model *m)
{
    return &m->p;
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    return m->tok;
}

const char *model_template_name(const struct model *m)
{
    return m->template_name;
}

struct model_file_id model_file_id(const struct model *m)
{
    return m->id;
}

int model_fingerprint(struct model *m, uint8_t ret[32], struct larder_err *e)
{
    struct sha256 *s;
    uint8_t *buf;
    off_t at = 0;
    ssize_t n = 0;

    if (!m->has_fingerprint) {
        s = sha256_new();
        buf = mem_alloc(READ_CHUNK, 1);
        while (s && buf && (n = pread(gguf_fd(m->g), buf, READ_CHUNK, at)) > 0) {
            sha256_add(s, buf, (size_t)n);
            at += n;
        }
        if (s)
            sha256_get(s, m->fingerprint);
        m->has_fingerprint = s && buf && !n && (uint64_t)at == m->id.size;
        sha256_free(s);
        mem_free(buf);
    }
    if (!m->has_fingerprint)
        return larder_fail(e, LARDER_EIO,
                           "the model file could not be read whole for its fingerprint");
    memcpy(ret, m->fingerprint, 32);
    return 0;
}

void model_fingerprint_known(struct model *m, const uint8_t fp[32])
{
    memcpy(m->fingerprint, fp, 32);
    m->has_fingerprint = true;
}

/* ---- weights */

static const struct gguf_tensor *tensor_of(const struct model *m, uint32_t layer,
                                           enum model_weight w)
{
    switch (w) {
    case MODEL_EMBED:
        return m->embed;
    case MODEL_OUT_NORM:
        return m->out_norm;
    case MODEL_HEAD:
        return m->head;
    default:
        return m->tensor[layer][w];
    }
}

/* Row r of the rotate-half order, as the file numbers it. Interleaved storage puts
 * element pair (i, i + d/2) of a head at its rows 2i and 2i + 1. */
static uint32_t file_row(const struct model *m, enum model_weight w, uint32_t r)
{
    uint32_t d = m->p.geom.head_dim, in_head = r % d;

    if (w != MODEL_Q && w != MODEL_K)
        return r;
    return r - in_head + 2 * (in_head % (d / 2)) + in_head / (d / 2);
}

/* Where rows go: as stored, f32, or through a scratch row to bf16. */
struct sink {
    uint8_t *stored;
    float *f32;
    uint16_t *bf16;
    float *scratch; /* one row, with bf16 only */
};

/* Rows [row0, row0 + n), all inside file rows [base, base + span) that one read brings. */
static int read_span(const struct model *m, const struct gguf_tensor *t, enum model_weight w,
                     uint32_t base, uint32_t span, uint32_t row0, uint32_t n, uint8_t *raw,
                     struct sink *to, struct larder_err *e)
{
    const struct tensor_format *f = tensor_format(t->type);
    size_t cols = (size_t)t->ne[0], blocks = cols / f->block_len;
    size_t row_bytes = blocks * f->block_bytes;
    int rc = gguf_read(m->g, t, (uint64_t)base * row_bytes, (uint64_t)span * row_bytes, raw, e);

    for (uint32_t i = 0; !rc && i < n; i++) {
        const uint8_t *src = raw + (file_row(m, w, row0 + i) - base) * row_bytes;

        if (to->stored) {
            memcpy(to->stored, src, row_bytes);
            to->stored += row_bytes;
            continue;
        }
        f->to_f32(src, blocks, to->f32 ? to->f32 : to->scratch);
        if (to->f32) {
            to->f32 += cols;
        } else {
            dequant_round_bf16(to->scratch, cols, to->bf16);
            to->bf16 += cols;
        }
    }
    return rc;
}

static int read_rows(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                     uint32_t n, struct sink *to, struct larder_err *e)
{
    const struct gguf_tensor *t = tensor_of(m, layer, w);
    uint64_t row_bytes = t->n_bytes / t->ne[1];
    /* permuted rows are read by whole heads */
    uint32_t unit = w == MODEL_Q || w == MODEL_K ? m->p.geom.head_dim : 1;
    uint32_t step =
        READ_CHUNK / row_bytes > unit ? (uint32_t)(READ_CHUNK / row_bytes) / unit * unit : unit;
    uint8_t *raw;
    int rc = 0;

    if ((uint64_t)row0 + n > t->ne[1])
        return larder_fail(e, LARDER_EINVAL, "rows %u to %u of %llu", row0, row0 + n,
                           (unsigned long long)t->ne[1]);
    raw = mem_alloc(step, row_bytes);
    if (!raw)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read weights");
    while (!rc && n) {
        uint32_t base = row0 / unit * unit;
        uint32_t left = (uint32_t)t->ne[1] - base;
        uint32_t span = left < step ? left : step;
        uint32_t take = base + span - row0 < n ? base + span - row0 : n;

        if (unit == 1)
            span = take;
        rc = read_span(m, t, w, base, span, row0, take, raw, to, e);
        row0 += take;
        n -= take;
    }
    mem_free(raw);
    return rc;
}

int model_read_f32(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                   uint32_t n, float *dst, struct larder_err *e)
{
    struct sink to = {.f32 = dst};

    return read_rows(m, layer, w, row0, n, &to, e);
}

const struct tensor_format *model_weight_format(const struct model *m, uint32_t layer,
                                                enum model_weight w)
{
    return tensor_format(tensor_of(m, layer, w)->type);
}

int model_read_stored(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                      uint32_t n, uint8_t *dst, struct larder_err *e)
{
    struct sink to = {.stored = dst};

    return read_rows(m, layer, w, row0, n, &to, e);
}

int model_read_bf16(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                    uint32_t n, uint16_t *dst, struct larder_err *e)
{
    struct sink to = {.bf16 = dst};
    uint32_t rows, cols;
    int rc;

    model_weight_shape(m, w, &rows, &cols);
    to.scratch = mem_alloc(cols, sizeof *to.scratch);
    if (!to.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read weights");
    rc = read_rows(m, layer, w, row0, n, &to, e);
    mem_free(to.scratch);
    return rc;
}
