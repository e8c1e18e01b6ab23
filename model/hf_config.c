/* hf_config.c - parameters from config.json.
 *
 * The one idea: a key that is missing means what the architecture's own configuration class
 * says it means, and a key that would change the computation is either understood or refused. */
#include "hf_config.h"

#include <math.h>
#include <string.h>

#include "input.h"
#include "mem.h"

#define MISTRAL_WINDOW 4096u
#define QWEN3_HEAD_DIM 128u
#define QWEN2_FULL_LAYERS 28u

int hf_parse_json(const char *name, const char *text, size_t len, json_t **ret,
                  struct larder_err *e)
{
    json_error_t why;
    json_t *j = json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
    int rc;

    if (!j && json_error_code(&why) == json_error_out_of_memory)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %s", name);
    if (!json_is_object(j)) {
        rc = larder_fail(e, LARDER_EMODEL, "%s is not a JSON object: %s", name,
                         j ? "it is another value" : why.text);
        json_decref(j);
        return rc;
    }
    *ret = j;
    return 0;
}

int hf_read_json(int dir, const char *name, json_t **ret, struct larder_err *e)
{
    char *text;
    size_t len;
    int rc = input_read_text(dir, name, HF_MAX_JSON, &text, &len, e);

    if (rc)
        return rc;
    rc = hf_parse_json(name, text, len, ret, e);
    mem_free(text);
    return rc;
}

/* ---- keys; null counts as absent */

static const json_t *key_of(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);

    return json_is_null(v) ? NULL : v;
}

/* Leaves *ret alone when the key is absent. */
static int may_count(const json_t *o, const char *key, uint32_t max, uint32_t *ret,
                     struct larder_err *e)
{
    const json_t *v = key_of(o, key);
    json_int_t n = json_integer_value(v);

    if (!v)
        return 0;
    if (!json_is_integer(v) || n < 1 || n > max)
        return larder_fail(e, LARDER_EMODEL, "config.json: %s is not a count from 1 to %u", key,
                           max);
    *ret = (uint32_t)n;
    return 0;
}

static int need_count(const json_t *o, const char *key, uint32_t max, uint32_t *ret,
                      struct larder_err *e)
{
    if (!key_of(o, key))
        return larder_fail(e, LARDER_EMODEL, "config.json: %s is missing", key);
    return may_count(o, key, max, ret, e);
}

static int may_number(const json_t *o, const char *key, double *ret, struct larder_err *e)
{
    const json_t *v = key_of(o, key);
    double x = json_number_value(v);

    if (!v)
        return 0;
    if (!json_is_number(v) || !(isfinite(x) && x > 0))
        return larder_fail(e, LARDER_EMODEL, "config.json: %s is not a positive number", key);
    *ret = x;
    return 0;
}

static int need_number(const json_t *o, const char *key, double *ret, struct larder_err *e)
{
    if (!key_of(o, key))
        return larder_fail(e, LARDER_EMODEL, "config.json: %s is missing", key);
    return may_number(o, key, ret, e);
}

static int may_flag(const json_t *o, const char *key, bool *ret, struct larder_err *e)
{
    const json_t *v = key_of(o, key);

    if (v && !json_is_boolean(v))
        return larder_fail(e, LARDER_EMODEL, "config.json: %s is not true or false", key);
    if (v)
        *ret = json_is_true(v);
    return 0;
}

static const char *word_of(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));

    return s ? s : "";
}

/* ---- what is refused */

/* Off when absent, null, false, 0 or empty. */
static bool is_on(const json_t *v)
{
    if (json_is_number(v))
        return json_number_value(v) != 0;
    if (json_is_array(v))
        return json_array_size(v) > 0;
    return v && !json_is_null(v) && !json_is_false(v);
}

static int refuse_features(const json_t *c, struct larder_err *e)
{
    static const char *const absent[] = {"quantization_config",
                                         "num_experts",
                                         "num_local_experts",
                                         "n_routed_experts",
                                         "vision_config",
                                         "audio_config",
                                         "attn_logit_softcapping",
                                         "final_logit_softcapping",
                                         "logit_scale",
                                         "embedding_multiplier",
                                         "residual_multiplier",
                                         "attention_multiplier",
                                         "mlp_bias",
                                         "is_encoder_decoder"};
    const char *act = word_of(c, "hidden_act");

    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++)
        if (is_on(json_object_get(c, absent[i])))
            return larder_fail(e, LARDER_EUNSUPPORTED, "config.json: %s is not supported",
                               absent[i]);
    if (*act && strcmp(act, "silu"))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "config.json: hidden_act %.40s is not supported; silu is", act);
    return 0;
}

/* The class that computes, beside the type: a classifier has another head. */
static int check_class(const json_t *c, struct larder_err *e)
{
    static const char causal[] = "ForCausalLM";
    const json_t *classes = key_of(c, "architectures");
    const char *s;
    size_t n;

    if (!classes)
        return 0;
    s = json_string_value(json_array_get(classes, 0));
    n = s ? strlen(s) : 0;
    if (json_array_size(classes) != 1 || n < strlen(causal) ||
        strcmp(s + n - strlen(causal), causal))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "config.json: architectures is not one ForCausalLM class but %.60s",
                           s ? s : "something else");
    return 0;
}

/* ---- RoPE */

static int no_table(struct larder_err *e, const char *key, uint32_t n)
{
    return larder_fail(e, LARDER_EMODEL, "config.json: %s is not a list of %u numbers", key, n);
}

static int read_factors(const json_t *o, const char *key, uint32_t n, double *ret,
                        struct larder_err *e)
{
    const json_t *v = json_object_get(o, key);

    if (json_array_size(v) != n)
        return no_table(e, key, n);
    for (uint32_t i = 0; i < n; i++) {
        if (!json_is_number(json_array_get(v, i)))
            return no_table(e, key, n);
        ret[i] = json_number_value(json_array_get(v, i));
    }
    return 0;
}

static int set_longrope(const json_t *c, const json_t *scaling, struct model *m,
                        struct larder_err *e)
{
    uint32_t half = m->p.rope_dims / 2, n_original = m->p.n_positions;
    double *table = mem_alloc(2ull * half, sizeof *table), factor = 0;
    int rc = table ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = may_count(scaling, "original_max_position_embeddings", KV_MAX_CTX, &n_original, e);
    if (!rc)
        rc = may_count(c, "original_max_position_embeddings", KV_MAX_CTX, &n_original, e);
    if (!rc)
        rc = may_number(scaling, "attention_factor", &factor, e);
    if (!rc)
        rc = read_factors(scaling, "short_factor", half, table, e);
    if (!rc)
        rc = read_factors(scaling, "long_factor", half, table + half, e);
    if (!rc)
        rc = model_set_longrope(m, table, table + half, n_original, factor, e);
    mem_free(table);
    return rc;
}

static int set_llama3(const json_t *scaling, struct model *m, struct larder_err *e)
{
    struct rope_llama3 s;
    int rc = need_number(scaling, "factor", &s.factor, e);

    if (!rc)
        rc = need_number(scaling, "low_freq_factor", &s.low_freq, e);
    if (!rc)
        rc = need_number(scaling, "high_freq_factor", &s.high_freq, e);
    if (!rc)
        rc = need_number(scaling, "original_max_position_embeddings", &s.n_original, e);
    if (!rc && !(s.high_freq > s.low_freq))
        rc = larder_fail(e, LARDER_EMODEL,
                         "config.json: high_freq_factor is not above "
                         "low_freq_factor");
    if (rc)
        return rc;
    rope_scale_llama3(&s, m->p.rope_dims, m->freq);
    m->p.rope_scaling = ROPE_LLAMA3;
    m->p.rope_stretch = s.factor;
    return 0;
}

static int read_rope(const json_t *c, struct model *m, struct larder_err *e)
{
    const json_t *now = key_of(c, "rope_parameters"), *scaling = key_of(c, "rope_scaling");
    const char *type;
    int rc;

    if (now && scaling)
        return larder_fail(e, LARDER_EMODEL,
                           "config.json has both rope_scaling and rope_parameters");
    scaling = now ? now : scaling;
    if (scaling && !json_is_object(scaling))
        return larder_fail(e, LARDER_EMODEL, "config.json: rope_scaling is not an object");
    type = word_of(scaling, "rope_type");
    type = *type ? type : word_of(scaling, "type");
    m->p.rope_theta = 10000.0;
    rc = may_number(c, "rope_theta", &m->p.rope_theta, e);
    if (!rc)
        rc = may_number(now, "rope_theta", &m->p.rope_theta, e);
    if (!rc)
        rc = model_check_params(&m->p, e);
    if (!rc)
        rc = model_alloc_rope(m, e);
    if (rc || (!scaling) || !strcmp(type, "default"))
        return rc;
    if (!strcmp(type, "llama3"))
        return set_llama3(scaling, m, e);
    if (!strcmp(type, "longrope") || !strcmp(type, "su"))
        return set_longrope(c, scaling, m, e);
    return larder_fail(e, LARDER_EUNSUPPORTED,
                       "config.json: rope scaling '%.40s' is not supported; llama3 and longrope "
                       "are",
                       type);
}

/* ---- shape */

static int read_shape(const json_t *c, struct model *m, struct larder_err *e)
{
    struct model_params *p = &m->p;
    struct kv_geom *g = &p->geom;
    int rc = need_count(c, "num_hidden_layers", KV_MAX_LAYERS, &g->n_layers, e);

    if (!rc)
        rc = need_count(c, "num_attention_heads", KV_MAX_HEADS, &g->n_heads, e);
    if (!rc)
        rc = need_count(c, "hidden_size", MODEL_MAX_HIDDEN, &p->n_hidden, e);
    if (!rc)
        rc = need_count(c, "intermediate_size", MODEL_MAX_FF, &p->n_ff, e);
    if (!rc)
        rc = need_count(c, "vocab_size", KV_MAX_VOCAB, &p->n_vocab, e);
    if (!rc)
        rc = need_count(c, "max_position_embeddings", KV_MAX_CTX, &p->n_positions, e);
    if (!rc)
        rc = need_number(c, "rms_norm_eps", &p->norm_eps, e);
    if (rc)
        return rc;
    g->n_kv_heads = g->n_heads;
    g->head_dim = strcmp(p->arch, "qwen3") ? p->n_hidden / g->n_heads : QWEN3_HEAD_DIM;
    rc = may_count(c, "num_key_value_heads", KV_MAX_HEADS, &g->n_kv_heads, e);
    return rc ? rc : may_count(c, "head_dim", KV_MAX_HEAD_DIM, &g->head_dim, e);
}

static int read_rotated(const json_t *c, struct model *m, struct larder_err *e)
{
    const json_t *now = key_of(c, "rope_parameters");
    double part = 1;
    int rc = may_number(c, "partial_rotary_factor", &part, e);

    if (!rc)
        rc = may_number(now, "partial_rotary_factor", &part, e);
    if (!rc && part > 1)
        rc = larder_fail(e, LARDER_EMODEL, "config.json: partial_rotary_factor is above 1");
    m->p.rope_dims = (uint32_t)(m->p.geom.head_dim * part);
    return rc;
}

/* ---- sliding windows */

/* layer_types, where there is one, names the layers that slide. */
static int layers_by_name(const json_t *types, uint32_t positions, struct model *m,
                          struct larder_err *e)
{
    uint32_t n = m->p.geom.n_layers;
    int rc = json_array_size(types) == n ? model_set_sliding(m, positions, 0, e)
                                         : larder_fail(e, LARDER_EMODEL,
                                                       "config.json: layer_types does not name "
                                                       "%u layers",
                                                       n);

    for (uint32_t l = 0; l < n && !rc; l++) {
        const char *type = json_string_value(json_array_get(types, l));

        if (type && !strcmp(type, "full_attention") && m->sliding)
            m->sliding[l] = 0;
        else if (!type || (strcmp(type, "full_attention") && strcmp(type, "sliding_attention")))
            rc = larder_fail(e, LARDER_EUNSUPPORTED,
                             "config.json: layer type '%.40s' is not supported", type ? type : "?");
        else if (!positions && strcmp(type, "full_attention"))
            rc = larder_fail(e, LARDER_EMODEL, "config.json: layers slide without sliding_window");
    }
    return rc;
}

static int read_sliding(const json_t *c, struct model *m, struct larder_err *e)
{
    bool is_qwen = !strncmp(m->p.arch, "qwen", 4), used = !is_qwen;
    uint32_t positions = 0, first = is_qwen ? QWEN2_FULL_LAYERS : 0;
    const json_t *types = key_of(c, "layer_types"), *layers = key_of(c, "max_window_layers");
    int rc = may_flag(c, "use_sliding_window", &used, e);

    if (!strcmp(m->p.arch, "mistral") && !json_object_get(c, "sliding_window"))
        positions = MISTRAL_WINDOW;
    if (!rc && used)
        rc = may_count(c, "sliding_window", INT32_MAX, &positions, e);
    if (rc || (!used && !types) || !strcmp(m->p.arch, "llama"))
        return rc;
    if (types)
        return layers_by_name(types, positions, m, e);
    if (layers && (!json_is_integer(layers) || json_integer_value(layers) < 0 ||
                   json_integer_value(layers) > KV_MAX_LAYERS))
        return larder_fail(e, LARDER_EMODEL, "config.json: max_window_layers is not a count");
    if (layers && is_qwen)
        first = (uint32_t)json_integer_value(layers);
    return model_set_sliding(m, positions, first, e);
}

/* ---- the whole */

int hf_read_config(const json_t *c, struct model *m, struct hf_config *ret, struct larder_err *e)
{
    const char *type = word_of(c, "model_type");
    int rc;

    ret->arch = model_arch(type, strlen(type));
    if (!ret->arch)
        return model_arch_unknown(type, strlen(type), e);
    m->p.arch = ret->arch->name;
    rc = check_class(c, e);
    if (!rc)
        rc = refuse_features(c, e);
    if (!rc)
        rc = read_shape(c, m, e);
    if (!rc)
        rc = read_rotated(c, m, e);
    if (!rc)
        rc = read_rope(c, m, e);
    if (!rc)
        rc = read_sliding(c, m, e);
    if (!rc)
        rc = may_flag(c, "tie_word_embeddings", &ret->tied, e);
    return rc ? rc : may_flag(c, "attention_bias", &ret->has_bias, e);
}

static int add_end(const json_t *v, struct model *m, struct larder_err *e)
{
    json_int_t id = json_integer_value(v);

    if (!json_is_integer(v) || id < 0 || id >= m->p.n_vocab)
        return larder_fail(e, LARDER_EMODEL, "eos_token_id is not a token of the vocabulary");
    if (m->n_ends == MODEL_MAX_ENDS)
        return larder_fail(e, LARDER_EMODEL, "eos_token_id has more than %u tokens",
                           MODEL_MAX_ENDS);
    m->end[m->n_ends++] = (uint32_t)id;
    return 0;
}

int hf_read_ends(const json_t *config, struct model *m, struct larder_err *e)
{
    const json_t *v = key_of(config, "eos_token_id");
    int rc = 0;

    if (v && !json_is_array(v))
        return add_end(v, m, e);
    for (size_t i = 0; i < json_array_size(v) && !rc; i++)
        rc = add_end(json_array_get(v, i), m, e);
    return rc;
}
