/* model_hf.c - a directory as Hugging Face has it, as a model.
 *
 * The one idea: the index of a sharded model is only a list of files; what counts is which
 * tensors those have, each exactly once. What decides the computation, and so the fingerprint,
 * is config.json and those files. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "dequant.h"
#include "hf_config.h"
#include "input.h"
#include "mem.h"
#include "safetensors.h"
#include "tokenizer.h"
#include "tokenizer_json.h"

#define CONFIG "config.json"
#define SINGLE "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define IDENTITY "larder-hf-1"
#define MAX_SHARDS 4096u
#define MAX_SHARD_NAME 128u
#define MAX_TEMPLATE (4u << 20)

static const struct tensor_names names = {
    .layer = "model.layers",
    .weight =
        {
            [MODEL_ATTN_NORM] = "input_layernorm.weight",
            [MODEL_Q] = "self_attn.q_proj.weight",
            [MODEL_K] = "self_attn.k_proj.weight",
            [MODEL_V] = "self_attn.v_proj.weight",
            [MODEL_O] = "self_attn.o_proj.weight",
            [MODEL_FFN_NORM] = "post_attention_layernorm.weight",
            [MODEL_GATE] = "mlp.gate_proj.weight",
            [MODEL_UP] = "mlp.up_proj.weight",
            [MODEL_DOWN] = "mlp.down_proj.weight",
            [MODEL_Q_BIAS] = "self_attn.q_proj.bias",
            [MODEL_K_BIAS] = "self_attn.k_proj.bias",
            [MODEL_V_BIAS] = "self_attn.v_proj.bias",
            [MODEL_Q_NORM] = "self_attn.q_norm.weight",
            [MODEL_K_NORM] = "self_attn.k_norm.weight",
            [MODEL_EMBED] = "model.embed_tokens.weight",
            [MODEL_OUT_NORM] = "model.norm.weight",
            [MODEL_HEAD] = "lm_head.weight",
        },
    .qkv = "self_attn.qkv_proj.weight",
    .gate_up = "mlp.gate_up_proj.weight",
};

struct shard {
    char *name;
    struct safetensors *file;
};

/* A tensor and whether it was asked for. */
struct listed {
    const struct safetensor *t;
    const struct shard *shard;
    bool used;
};

struct hf_files {
    int dir;
    char *config; /* config.json as it was read, for the fingerprint */
    size_t config_len;
    struct shard *shard; /* by name */
    uint32_t n_shards;
    struct listed *tensor; /* by name */
    uint32_t n_tensors;
};

/* ---- files */

static int compare_shard(const void *a, const void *b)
{
    return strcmp(((const struct shard *)a)->name, ((const struct shard *)b)->name);
}

static bool is_shard_name(const char *s)
{
    size_t n = strlen(s);

    return n <= MAX_SHARD_NAME && n > 12 && !strchr(s, '/') && !strcmp(s + n - 12, ".safetensors");
}

static int add_shard(struct hf_files *f, const char *name, struct larder_err *e)
{
    for (uint32_t i = 0; i < f->n_shards; i++)
        if (!strcmp(f->shard[i].name, name))
            return 0;
    if (f->n_shards == MAX_SHARDS)
        return larder_fail(e, LARDER_EMODEL, INDEX " names more than %u files", MAX_SHARDS);
    f->shard[f->n_shards].name = mem_strdup(name);
    if (!f->shard[f->n_shards].name)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the list of files");
    f->n_shards++;
    return 0;
}

/* The files that an index's weight_map names. */
static int list_shards(struct hf_files *f, const json_t *map, struct larder_err *e)
{
    const char *tensor, *last = NULL;
    json_t *each;
    int rc = 0;

    if (!json_is_object(map) || !json_object_size(map))
        return larder_fail(e, LARDER_EMODEL, INDEX " has no weight_map");
    json_object_foreach ((json_t *)(uintptr_t)map, tensor, each) {
        const char *name = json_string_value(each);

        if (rc || (last && name && !strcmp(last, name)))
            continue; /* neighbours lie in the same file */
        if (!name || !is_shard_name(name))
            rc = larder_fail(
                e, LARDER_EMODEL,
                INDEX ": tensor %.80s is not given a safetensors file of the directory", tensor);
        else
            rc = add_shard(f, name, e);
        last = name;
    }
    return rc;
}

static int find_files(struct hf_files *f, json_t **ret_index, struct larder_err *e)
{
    int rc;

    f->shard = mem_zalloc(MAX_SHARDS, sizeof *f->shard);
    if (!f->shard)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the list of files");
    rc = hf_read_json(f->dir, INDEX, ret_index, e);
    if (rc == LARDER_ENOTFOUND)
        return add_shard(f, SINGLE, e);
    if (!rc)
        rc = list_shards(f, json_object_get(*ret_index, "weight_map"), e);
    qsort(f->shard, f->n_shards, sizeof *f->shard, compare_shard);
    return rc;
}

static int open_shards(struct hf_files *f, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < f->n_shards && !rc; i++) {
        rc = safetensors_open(&f->shard[i].file, f->dir, f->shard[i].name, e);
        if (rc == LARDER_ENOTFOUND)
            rc = larder_fail(e, LARDER_EMODEL, "file %s is missing", f->shard[i].name);
        if (!rc)
            f->n_tensors += safetensors_n(f->shard[i].file);
    }
    return rc;
}

/* ---- tensors of all files */

static int compare_listed(const void *a, const void *b)
{
    return strcmp(((const struct listed *)a)->t->name, ((const struct listed *)b)->t->name);
}

static struct listed *listed_of(const struct hf_files *f, const char *name)
{
    struct safetensor t = {.name = name};
    struct listed want = {.t = &t};

    return f->n_tensors ? bsearch(&want, f->tensor, f->n_tensors, sizeof want, compare_listed)
                        : NULL;
}

static int list_tensors(struct hf_files *f, struct larder_err *e)
{
    uint32_t at = 0;

    f->tensor = mem_zalloc(f->n_tensors, sizeof *f->tensor);
    if (!f->tensor)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %u tensors", f->n_tensors);
    for (uint32_t i = 0; i < f->n_shards; i++)
        for (uint32_t k = 0; k < safetensors_n(f->shard[i].file); k++)
            f->tensor[at++] =
                (struct listed){safetensors_at(f->shard[i].file, k), &f->shard[i], false};
    qsort(f->tensor, f->n_tensors, sizeof *f->tensor, compare_listed);
    for (uint32_t i = 1; i < f->n_tensors; i++)
        if (!compare_listed(&f->tensor[i - 1], &f->tensor[i]))
            return larder_fail(e, LARDER_EMODEL, "tensor %.80s is in %s and in %s",
                               f->tensor[i].t->name, f->tensor[i - 1].shard->name,
                               f->tensor[i].shard->name);
    return 0;
}

/* An index that says something else than the files is of another model. */
static int check_index(const struct hf_files *f, const json_t *index, struct larder_err *e)
{
    const char *name;
    json_t *file;

    json_object_foreach (json_object_get(index, "weight_map"), name, file) {
        const struct listed *l = listed_of(f, name);

        if (!l || strcmp(l->shard->name, json_string_value(file)))
            return larder_fail(e, LARDER_EMODEL, INDEX ": tensor %.80s is not in %.120s", name,
                               json_string_value(file));
    }
    return 0;
}

static int find_tensor(void *arg, const char *name, struct found_tensor *ret, struct larder_err *e)
{
    struct listed *l = listed_of(arg, name);
    const struct safetensor *t;

    if (!l)
        return LARDER_ENOTFOUND;
    l->used = true;
    t = l->t;
    if (!t->format)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "tensor %s has dtype %s; F32, F16 and BF16 are supported", name,
                           t->dtype);
    if (t->n_dims < 1 || t->n_dims > 2)
        return larder_fail(e, LARDER_EMODEL, "tensor %s has %u dimensions", name, t->n_dims);
    *ret = (struct found_tensor){safetensors_fd(l->shard->file), t->format, t->offset,
                                 t->n_dims == 2 ? t->dim[0] : 1, t->dim[t->n_dims - 1]};
    return 0;
}

/* Tables that some versions of transformers wrote and none reads. */
static bool is_passed_over(const char *name)
{
    static const char end[] = ".rotary_emb.inv_freq";
    size_t n = strlen(name);

    return n >= strlen(end) && !strcmp(name + n - strlen(end), end);
}

static bool unused_tensor(void *arg, char *name, size_t cap)
{
    const struct hf_files *f = arg;

    for (uint32_t i = 0; i < f->n_tensors; i++)
        if (!f->tensor[i].used && !is_passed_over(f->tensor[i].t->name)) {
            snprintf(name, cap, "%s", f->tensor[i].t->name);
            return true;
        }
    return false;
}

/* ---- what else is there */

static int read_ends(struct model *m, const json_t *config, struct larder_err *e)
{
    json_t *own = NULL;
    int rc = hf_read_json(m->hf->dir, "generation_config.json", &own, e);

    if (!rc)
        rc = hf_read_ends(own, m, e);
    json_decref(own);
    if (rc && rc != LARDER_ENOTFOUND)
        return rc;
    return m->n_ends ? 0 : hf_read_ends(config, m, e);
}

/* The default one of tokenizer_config.json, which may be a list of named ones, or else of
 * chat_template.jinja. */
static const char *template_text(const json_t *config)
{
    const json_t *t = json_object_get(config, "chat_template"), *each;
    size_t i;

    if (json_is_string(t))
        return json_string_value(t);
    json_array_foreach ((json_t *)(uintptr_t)t, i, each) {
        const char *name = json_string_value(json_object_get(each, "name"));

        if (name && !strcmp(name, "default"))
            return json_string_value(json_object_get(each, "template"));
    }
    return NULL;
}

static int read_template(struct model *m, struct larder_err *e)
{
    json_t *config = NULL;
    const char *s;
    char *text = NULL;
    size_t len;
    int rc = input_read_text(m->hf->dir, "chat_template.jinja", MAX_TEMPLATE, &text, &len, e);

    if (!rc) {
        model_set_template(m, text, len);
    } else if (rc == LARDER_ENOTFOUND) {
        rc = hf_read_json(m->hf->dir, "tokenizer_config.json", &config, e);
        s = rc ? NULL : template_text(config);
        if (s)
            model_set_template(m, s, strlen(s));
    }
    mem_free(text);
    json_decref(config);
    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int read_tokenizer(struct model *m, const char *path, struct larder_err *e)
{
    char *file;
    int rc;

    if (asprintf(&file, "%s/tokenizer.json", path) < 0)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    rc = tokenizer_from_json(&m->tok, file, e);
    free(file);
    if (!rc && tokenizer_n_vocab(m->tok) > m->p.n_vocab)
        rc = larder_fail(e, LARDER_EMODEL,
                         "tokenizer.json has %u tokens, the embedding only %u rows",
                         tokenizer_n_vocab(m->tok), m->p.n_vocab);
    if (!rc && m->n_ends) /* the file does not say it */
        rc = tokenizer_set_eos(m->tok, m->end[0], e);
    return rc;
}

/* ---- life */

static void hf_model_close(struct model *m)
{
    struct hf_files *f = m->hf;

    if (!f)
        return;
    for (uint32_t i = 0; f->shard && i < f->n_shards; i++) {
        safetensors_close(f->shard[i].file);
        mem_free(f->shard[i].name);
    }
    if (f->dir >= 0)
        close(f->dir);
    mem_free(f->config);
    mem_free(f->shard);
    mem_free(f->tensor);
    mem_free(f);
}

static int read_weights(struct model *m, const struct hf_config *config, struct larder_err *e)
{
    struct tensor_source s = {.arg = m->hf,
                              .names = &names,
                              .find = find_tensor,
                              .unused = unused_tensor,
                              .arch = config->arch,
                              .tied = config->tied,
                              .may_have_bias = config->has_bias};
    json_t *index = NULL;
    int rc = find_files(m->hf, &index, e);

    if (!rc)
        rc = open_shards(m->hf, e);
    if (!rc)
        rc = list_tensors(m->hf, e);
    if (!rc && index)
        rc = check_index(m->hf, index, e);
    json_decref(index);
    return rc ? rc : model_bind(m, &s, e);
}

static int read_all(struct model *m, const char *path, const json_t *config, struct larder_err *e)
{
    const char *name = json_string_value(json_object_get(config, "_name_or_path"));
    struct hf_config c = {0};
    int rc = hf_read_config(config, m, &c, e);

    if (!rc)
        rc = model_set_name(m, name ? name : "", name ? strlen(name) : 0, e);
    if (!rc)
        rc = read_weights(m, &c, e);
    if (!rc)
        rc = read_ends(m, config, e);
    if (!rc)
        rc = read_template(m, e);
    return rc ? rc : read_tokenizer(m, path, e);
}

static int hf_model_open(struct model *m, const char *path, struct larder_err *e)
{
    json_t *config = NULL;
    int rc;

    m->hf = mem_zalloc(1, sizeof *m->hf);
    if (!m->hf)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    m->hf->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (m->hf->dir < 0)
        return larder_fail(e, LARDER_EIO, "%s", strerror(errno));
    rc = input_read_text(m->hf->dir, CONFIG, HF_MAX_JSON, &m->hf->config, &m->hf->config_len, e);
    if (rc == LARDER_ENOTFOUND)
        return larder_fail(e, LARDER_EMODEL, "the directory has no " CONFIG);
    if (!rc)
        rc = hf_parse_json(CONFIG, m->hf->config, m->hf->config_len, &config, e);
    if (!rc)
        rc = read_all(m, path, config, e);
    json_decref(config);
    return rc;
}

/* ---- identity: PROTOCOL.md section 2 */

static void hash_length(struct sha256 *s, uint64_t n)
{
    uint8_t length[8];
    struct wr w = wr_init(length, sizeof length);

    wr_u64(&w, n);
    sha256_add(s, length, sizeof length);
}

static void hash_text(struct sha256 *s, const char *text, size_t len)
{
    hash_length(s, len);
    sha256_add(s, text, len);
}

static int hf_model_hash(const struct model *m, struct sha256 *s, struct larder_err *e)
{
    const struct hf_files *f = m->hf;
    int rc = 0;

    hash_text(s, IDENTITY, strlen(IDENTITY));
    hash_text(s, CONFIG, strlen(CONFIG));
    hash_text(s, f->config, f->config_len);
    for (uint32_t i = 0; i < f->n_shards && !rc; i++) {
        const struct shard *h = &f->shard[i];

        hash_text(s, h->name, strlen(h->name));
        hash_length(s, safetensors_bytes(h->file));
        rc = model_hash_file(safetensors_fd(h->file), safetensors_bytes(h->file), s, e);
    }
    return rc;
}

const struct model_format model_format_hf = {
    .open = hf_model_open,
    .hash = hf_model_hash,
    .close = hf_model_close,
};
