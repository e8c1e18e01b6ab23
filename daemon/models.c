/* models.c - what larderd knows of each configured model.
 *
 * The one idea: everything comes from the worker's own words (W_HELLO); the settings remember
 * only the fingerprint of an unchanged file, so that a restart need not hash it again. */
#include <string.h>

#include "bytes.h"
#include "mem.h"
#include "sha256.h"
#include "worker.h"

/* ---- what is known of a model */

static void model_setting(const struct model *m, char *out, size_t cap)
{
    snprintf(out, cap, "model/%.480s", m->conf->path);
}

struct remember {
    char key[512];
    char value[2048];
};

static int remember_run(struct daemon *d, void *arg, struct larder_err *e)
{
    const struct remember *r = arg;

    return store_setting_put(d->store, r->key, r->value, e);
}

static void remember_model(struct daemon *d, const struct model *m)
{
    struct remember r;
    char fp[65], tok[65], tmpl[65];
    json_t *value;
    size_t n;

    model_setting(m, r.key, sizeof r.key);
    sha256_hex(m->fp, fp);
    sha256_hex(m->tokenizer_fp, tok);
    sha256_hex(m->template_fp, tmpl);
    value = json_pack("{sI sI sI sI ss ss ss ss}", "dev", (json_int_t)m->id.dev, "ino",
                      (json_int_t)m->id.ino, "size", (json_int_t)m->id.size, "mtime_ns",
                      (json_int_t)m->id.mtime_ns, "fingerprint", fp, "tokenizer_fingerprint", tok,
                      "template", m->template, "template_fingerprint", tmpl);
    n = value ? json_dumpb(value, r.value, sizeof r.value - 1, JSON_COMPACT) : 0;
    json_decref(value);
    if (!n || n >= sizeof r.value)
        return; /* it is asked for again at the next start */
    r.value[n] = '\0';
    write_quietly(d, remember_run, &r, sizeof r, "model fingerprint");
}

bool model_same_file(const struct model *m)
{
    struct path_id now;

    return path_id_get(m->conf->path, &now) && path_id_same(&now, &m->id);
}

static void recall_model(struct daemon *d, struct model *m)
{
    char key[512], *text = NULL;
    json_t *o = NULL;
    bool present;

    model_setting(m, key, sizeof key);
    if (store_setting_get(d->store, key, &text, NULL))
        return;
    o = json_loads(text, 0, NULL);
    mem_free(text);
    /* only the fingerprint is taken: everything else comes from the worker's own words */
    if (o && !field_u64(o, "dev", FIELD_REQUIRED, UINT64_MAX >> 11, &m->id.dev, NULL) &&
        !field_u64(o, "ino", FIELD_REQUIRED, UINT64_MAX >> 11, &m->id.ino, NULL) &&
        !field_u64(o, "size", FIELD_REQUIRED, UINT64_MAX >> 11, &m->id.size, NULL) &&
        json_is_integer(json_object_get(o, "mtime_ns")) &&
        !field_hex32(o, "fingerprint", FIELD_REQUIRED, m->fp, &present, NULL)) {
        m->id.mtime_ns = (uint64_t)json_integer_value(json_object_get(o, "mtime_ns"));
        if (!model_same_file(m))
            m->id.size = 0;
    } else {
        m->id.size = 0;
    }
    json_decref(o);
}

void models_recall(struct daemon *d)
{
    for (uint32_t i = 0; i < d->n_models; i++)
        recall_model(d, &d->model[i]);
}

void models_configure(struct daemon *d)
{
    memset(d->model, 0, sizeof d->model);
    d->n_models = d->conf.n_models;
    for (uint32_t i = 0; i < d->n_models; i++)
        d->model[i].conf = &d->conf.model[i];
}

/* ---- W_HELLO */

static int copy_field(const json_t *o, const char *key, char *out, size_t cap, struct larder_err *e)
{
    const char *s = NULL;
    int rc = field_str(o, key, FIELD_REQUIRED, cap - 1, &s, e);

    if (!rc)
        strcpy(out, s);
    return rc;
}

static int hello_numbers(const json_t *o, struct model *m, struct larder_err *e)
{
    const struct {
        const char *key;
        uint32_t *to, max;
    } u32[] = {{"n_layers", &m->geom.n_layers, KV_MAX_LAYERS},
               {"n_heads", &m->geom.n_heads, KV_MAX_HEADS},
               {"n_kv_heads", &m->geom.n_kv_heads, KV_MAX_HEADS},
               {"head_dim", &m->geom.head_dim, KV_MAX_HEAD_DIM},
               {"n_vocab", &m->n_vocab, KV_MAX_VOCAB},
               {"n_positions", &m->n_positions, KV_MAX_CTX}};
    const struct {
        const char *key;
        uint64_t *to;
    } id[] = {{"dev", &m->id.dev},
              {"ino", &m->id.ino},
              {"size", &m->id.size},
              {"mtime_ns", &m->id.mtime_ns}};
    int rc = 0;

    for (size_t i = 0; !rc && i < sizeof u32 / sizeof u32[0]; i++)
        rc = field_u32(o, u32[i].key, FIELD_REQUIRED, u32[i].max, u32[i].to, e);
    for (size_t i = 0; !rc && i < sizeof id / sizeof id[0]; i++) {
        const json_t *v = json_object_get(o, id[i].key);

        if (!json_is_integer(v) || json_integer_value(v) < 0)
            return larder_fail(e, LARDER_EPROTO, "field '%s' is not a count", id[i].key);
        *id[i].to = (uint64_t)json_integer_value(v);
    }
    return rc ? rc : kv_geom_check(&m->geom, e);
}

int model_hello(struct worker *w, const json_t *hello, const json_t *o, struct larder_err *e)
{
    struct model *m, fresh;
    const char *name = NULL;
    bool present;
    int rc = field_str(o, "name", FIELD_REQUIRED, NAME_MAX_NS, &name, e);

    if (rc)
        return rc;
    m = model_for(w->d, name, e);
    if (!m)
        return LARDER_EUNKNOWNMODEL;
    if (m->worker && m->worker != w)
        return larder_fail(e, LARDER_EBUSY, "model %s has a worker already", name);
    fresh = *m;
    rc = hello_numbers(o, &fresh, e);
    if (!rc)
        rc = field_hex32(o, "fingerprint", FIELD_REQUIRED, fresh.fp, &present, e);
    if (!rc)
        rc = field_hex32(o, "tokenizer_fingerprint", FIELD_REQUIRED, fresh.tokenizer_fp, &present,
                         e);
    if (!rc)
        rc = field_hex32(o, "template_fingerprint", FIELD_REQUIRED, fresh.template_fp, &present, e);
    if (!rc)
        rc = copy_field(o, "template", fresh.template, sizeof fresh.template, e);
    if (!rc)
        rc = copy_field(hello, "backend", fresh.backend, sizeof fresh.backend, e);
    if (!rc)
        rc = copy_field(hello, "isa", fresh.isa, sizeof fresh.isa, e);
    if (!rc)
        rc = copy_field(hello, "dtype", fresh.dtype, sizeof fresh.dtype, e);
    *fresh.device = '\0';
    if (!rc && json_object_get(hello, "device"))
        rc = copy_field(hello, "device", fresh.device, sizeof fresh.device, e);
    if (rc)
        return rc;
    fresh.known = true;
    fresh.refused = false;
    fresh.worker = w;
    *m = fresh;
    remember_model(w->d, m);
    profile_recall(w->d, m);
    return 0;
}
