/* import.c - IMPORT: an image from elsewhere becomes an entry.
 *
 * The one idea: nobody can prove that rows were computed from the tokens beside them, so an
 * imported entry never gets the key under which this daemon looks for its own work: its policy
 * ends in ",imported=" and a hash of what was brought. Everything else is checked as the bytes of
 * a worker are. Checking takes as long as reading the image, so it has a thread apart from the
 * writer, which others wait for; only the rows are put there. */
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon.h"
#include "larder_image.h"
#include "mem.h"
#include "memfile.h"
#include "sha256.h"

#define MARK ",imported="
#define MARK_DIGITS 16
#define POLICY_MAX 256u /* as in PUT and in every answer */
#define OTHER_MODEL "imported:"

/* A configured model, as far as other threads than the loop need it. */
struct known {
    const char *name; /* the configuration's */
    uint8_t fp[32];
    struct kv_geom geom;
    uint32_t n_vocab;
};

struct import {
    struct task task;
    struct request *r;
    struct store_info info; /* strings of the request's body and this struct */
    const char *ns, *source_ns, *name, *policy;
    uint8_t key[32]; /* under which it was exported; then that of the entry */
    uint64_t bytes;
    char model[NAME_MAX_NS + sizeof OTHER_MODEL], canonical[POLICY_MAX + 1];
    char *extra;
    const void *map; /* `bytes` of the sealed file */
    struct larder_image im;
    struct known known[CONFIG_MAX_MODELS];
    uint32_t n_known;
    bool model_known;
    json_t *entry;
    struct larder_err e;
    int rc;
};

/* ---- on the loop: the body */

static int field_word(const json_t *body, const char *key, size_t max, const char **ret,
                      struct larder_err *e)
{
    int rc = field_str(body, key, FIELD_REQUIRED, max, ret, e);

    if (!rc && !**ret)
        return larder_fail(e, LARDER_EINVAL, "%s is empty", key);
    for (const char *p = rc ? "" : *ret; *p; p++)
        if (!isgraph((unsigned char)*p))
            return larder_fail(e, LARDER_EINVAL, "%s holds a byte that is not printable", key);
    return rc;
}

static bool all_numbers(const json_t *o)
{
    const char *key;
    json_t *v;

    json_object_foreach ((json_t *)(uintptr_t)o, key, v)
        if (!json_is_number(v) || !isfinite(json_number_value(v)))
            return false;
    return json_is_object(o);
}

/* What only `larder show` reads: numbers under their names. */
static int read_extra(struct import *m, struct larder_err *e)
{
    json_t *trace = json_object_get(m->r->body, "rank_variance"), *one, *extra;
    json_t *cert = json_object_get(m->r->body, "certificate");
    bool good = json_is_array(trace) && json_array_size(trace) <= KV_MAX_LAYERS &&
                (json_is_null(cert) || all_numbers(cert));
    size_t i;

    json_array_foreach (trace, i, one)
        good = good && all_numbers(one);
    if (!good)
        return larder_fail(e, LARDER_EINVAL, "rank_variance or certificate are not numbers");
    extra = json_pack("{sO sO}", "rank_variance", trace, "certificate", cert);
    m->extra = extra ? json_dumps(extra, JSON_COMPACT) : NULL;
    json_decref(extra);
    m->info.extra = m->extra;
    return m->extra ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for an import");
}

static int read_sel_layer(struct import *m, struct larder_err *e)
{
    uint32_t layer = 0;
    int rc;

    m->info.sel_layer = -1;
    if (json_is_null(json_object_get(m->r->body, "sel_layer")))
        return 0;
    rc = field_u32(m->r->body, "sel_layer", FIELD_REQUIRED, KV_MAX_LAYERS - 1, &layer, e);
    m->info.sel_layer = (int32_t)layer;
    return rc;
}

static int read_place(struct import *m, struct larder_err *e)
{
    const json_t *body = m->r->body;
    int rc = field_word(body, "namespace", NAME_MAX_NS, &m->ns, e);

    if (!rc)
        rc = field_word(body, "source_namespace", NAME_MAX_NS, &m->source_ns, e);
    if (!rc)
        rc = field_str(body, "name", FIELD_OPTIONAL, NAME_MAX_ENTRY, &m->name, e);
    if (!rc && (!name_is_namespace(m->ns) || (m->name && !name_is_entry(m->name))))
        rc = larder_fail(e, LARDER_EINVAL, "no such name is possible");
    if (!rc && !request_may_use(m->r, m->ns))
        rc = larder_fail(e, LARDER_ENOTFOUND, "no namespace '%.128s'", m->ns);
    return rc;
}

static void read_models(struct import *m)
{
    const struct daemon *d = m->r->d;

    for (uint32_t i = 0; i < d->n_models; i++) {
        const struct model *c = &d->model[i];
        struct known *k = &m->known[m->n_known];

        if (!c->known)
            continue;
        *k = (struct known){.name = c->conf->name, .geom = c->geom, .n_vocab = c->n_vocab};
        memcpy(k->fp, c->fp, 32);
        m->n_known++;
    }
}

static int read_body(struct import *m, struct larder_err *e)
{
    const json_t *body = m->r->body;
    const struct config *conf = &m->r->d->conf;
    int rc = read_place(m, e);

    if (rc || (rc = field_word(body, "policy", POLICY_MAX, &m->policy, e)) ||
        (rc = field_word(body, "model", NAME_MAX_NS, &m->info.model, e)) ||
        (rc = field_str(body, "template", FIELD_REQUIRED, KV_MAX_TEMPLATE - 1, &m->info.tmpl, e)) ||
        (rc = field_word(body, "backend", 63, &m->info.backend, e)) ||
        (rc = field_hex32(body, "key", FIELD_REQUIRED, m->key, NULL, e)) ||
        (rc = field_hex32(body, "template_fingerprint", FIELD_REQUIRED, m->info.ident.template_fp,
                          NULL, e)) ||
        (rc = field_u64(body, "prefill_ms", FIELD_REQUIRED, UINT64_MAX >> 11, &m->info.prefill_ms,
                        e)) ||
        (rc = field_u64(body, "bytes", FIELD_REQUIRED, UINT64_MAX >> 11, &m->bytes, e)) ||
        (rc = read_sel_layer(m, e)) || (rc = read_extra(m, e)))
        return rc;
    if (m->r->fd < 0)
        return larder_fail(e, LARDER_EPROTO, "the image's memory file is missing");
    if (m->bytes / 2 > conf->store_budget)
        return larder_fail(e, LARDER_EFULL, "an image of %llu bytes; store_budget is %llu",
                           (unsigned long long)m->bytes, (unsigned long long)conf->store_budget);
    return 0;
}

/* Whose name it gets: look-ups by model go by names, so that of a configured model is for its
 * very bytes. */
static int name_model(struct import *m, const struct larder_image *im, struct larder_err *e)
{
    const char *from = m->info.model;

    if (!strncmp(from, OTHER_MODEL, strlen(OTHER_MODEL)))
        from += strlen(OTHER_MODEL);
    snprintf(m->model, sizeof m->model, OTHER_MODEL "%.120s", from);
    for (uint32_t i = 0; i < m->n_known && !m->model_known; i++) {
        const struct known *c = &m->known[i];

        if (memcmp(c->fp, im->model_fingerprint, 32))
            continue;
        if (memcmp(&c->geom, &m->info.geom, sizeof c->geom) || c->n_vocab != im->n_vocab)
            return larder_fail(e, LARDER_EINVAL, "the image has not the geometry of model %s",
                               c->name);
        snprintf(m->model, sizeof m->model, "%s", c->name);
        m->model_known = true;
    }
    m->info.model = m->model;
    return 0;
}

/* ---- on the slow thread: the image */

static struct store_rows rows_of(const struct larder_image *im, uint32_t layer, uint32_t head)
{
    struct larder_rows h = larder_image_rows(im, layer, head);

    return (struct store_rows){h.n_rows, h.position, h.k, h.v, h.bias};
}

static int check_numbers(const struct import *m, const struct larder_image *im,
                         struct larder_err *e)
{
    struct layer_form form = {m->info.precision, m->info.has_bias};

    for (uint32_t i = 0; i < im->n_vocab; i++)
        if (!isfinite(larder_image_logits(im)[i]))
            return larder_fail(e, LARDER_ENUMERIC, "the image has logits that are not finite");
    for (uint32_t l = 0; l < im->n_layers; l++)
        for (uint32_t g = 0; g < im->n_kv_heads; g++) {
            struct store_rows h = rows_of(im, l, g);

            if (!layer_rows_finite(&h, form, im->head_dim))
                return larder_fail(e, LARDER_ENUMERIC,
                                   "layer %u, head %u has values that are not finite", l, g);
        }
    return 0;
}

/* The document: its size, its text, and whether the key is that of what the metadata say. */
static int check_document(struct import *m, const struct larder_image *im, struct larder_err *e)
{
    uint64_t max = m->r->d->conf.max_document_bytes;
    struct store_ident id = m->info.ident;
    uint8_t key[32];
    json_t *text;
    int rc;

    if (im->text_len > max || 4ull * im->n_ctx > max)
        return larder_fail(e, LARDER_ETOOBIG,
                           "the document has %u tokens and %llu bytes; max_document_bytes is %llu",
                           im->n_ctx, (unsigned long long)im->text_len, (unsigned long long)max);
    text = json_stringn(larder_image_text(im), im->text_len);
    if (!text)
        return larder_fail(e, LARDER_ETEXT, "the rendered text is not valid UTF-8");
    json_decref(text);
    id.policy = m->policy;
    id.ns = m->source_ns;
    rc = store_key(&id, key, e);
    if (!rc && (memcmp(key, m->key, 32) || memcmp(key, im->key, 32)))
        rc = larder_fail(e, LARDER_EINVAL,
                         "the key is not that of the model, template, policy, namespace and tokens "
                         "that it comes with");
    return rc;
}

static void describe(struct import *m, const struct larder_image *im)
{
    struct store_info *in = &m->info;

    in->geom = (struct kv_geom){im->n_layers, im->n_heads, im->n_kv_heads, im->head_dim};
    in->precision = (enum kv_dtype)im->dtype;
    in->has_bias = im->flags & LARDER_IMAGE_HAS_BIAS;
    in->renumbered = im->flags & LARDER_IMAGE_RENUMBERED;
    in->n_ctx = im->n_ctx;
    in->next_pos = im->next_pos;
    in->n_vocab = im->n_vocab;
    in->text = larder_image_text(im);
    in->text_len = im->text_len;
    in->logits = larder_image_logits(im);
    in->created = (uint64_t)time(NULL);
    memcpy(in->ident.model_fp, im->model_fingerprint, 32);
    memcpy(in->ident.tokenizer_fp, im->tokenizer_fingerprint, 32);
    in->ident.tokens = larder_image_tokens(im);
    in->ident.n_tokens = im->n_ctx;
}

static void hash_string(struct sha256 *h, const char *s)
{
    sha256_add(h, s, strlen(s) + 1);
}

/* The policy without a mark, and the mark of this content: what is brought twice, or comes back
 * from where it was brought to, is one entry. */
static int mark(struct import *m, const struct larder_image *im, struct larder_err *e)
{
    const char *old = strstr(m->policy, MARK);
    int n = old ? (int)(old - m->policy) : (int)strlen(m->policy);
    struct sha256 *h = sha256_new();
    uint8_t digest[SHA256_LEN];
    char hex[2 * SHA256_LEN + 1], sel[16];

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory for an import");
    snprintf(sel, sizeof sel, "%d", (int)m->info.sel_layer);
    hash_string(h, sel);
    hash_string(h, m->info.tmpl);
    hash_string(h, m->extra);
    sha256_add(h, im->base, 128); /* all but the key, which holds the mark of an earlier import */
    sha256_add(h, im->base + 160, im->n_bytes - 160);
    sha256_get(h, digest);
    sha256_free(h);
    sha256_hex(digest, hex);
    if ((size_t)n + strlen(MARK) + MARK_DIGITS > POLICY_MAX)
        return larder_fail(e, LARDER_ETOOBIG, "the policy has no room for its mark as imported");
    snprintf(m->canonical, sizeof m->canonical, "%.*s" MARK "%.*s", n, m->policy, MARK_DIGITS, hex);
    m->info.ident.policy = m->canonical;
    m->info.ident.ns = m->ns;
    return 0;
}

static int check(struct import *m, struct larder_err *e)
{
    struct larder_image *im = &m->im;
    int rc = memfile_map(m->r->fd, m->bytes, m->bytes, &m->map, NULL, e);

    if (!rc)
        rc = larder_image_check(m->map, m->bytes, im, e);
    if (!rc && (im->dtype == LARDER_ROWS_F16 || im->dtype == LARDER_ROWS_F32))
        rc = larder_fail(e, LARDER_EUNSUPPORTED, "rows in %s are not stored",
                         kv_dtype_name((enum kv_dtype)im->dtype));
    if (rc)
        return rc;
    describe(m, im);
    if (m->info.sel_layer >= (int32_t)im->n_layers)
        return larder_fail(e, LARDER_EINVAL, "a selection layer that the model has not");
    if ((rc = check_document(m, im, e)) || (rc = check_numbers(m, im, e)) ||
        (rc = name_model(m, im, e)))
        return rc;
    return mark(m, im, e);
}

static void check_run(struct task *t)
{
    struct import *m = (struct import *)t;

    m->rc = check(m, &m->e);
    if (m->rc)
        memfile_unmap(m->map, m->bytes);
}

/* ---- on the writer thread */

/* A name that somebody looks up must not come to mean something else by an import. */
static int check_name(const struct import *m, struct larder_err *e)
{
    struct store *s = m->r->d->store;
    struct store_entry *en;
    uint8_t key[32];
    bool same;
    int rc = m->name ? store_find_name(s, m->ns, m->name, key, e) : LARDER_ENOTFOUND;

    if (!rc)
        rc = store_entry_open(s, key, &en, e);
    if (rc)
        return rc == LARDER_ENOTFOUND ? 0 : rc;
    same = !strcmp(store_entry_info(en)->ident.policy, m->canonical);
    store_entry_close(en);
    return same ? 0
                : larder_fail(e, LARDER_EINVAL,
                              "the name %.128s is another entry's; import under another name, or "
                              "remove that entry",
                              m->name);
}

static int put(struct import *m, const struct larder_image *im, struct larder_err *e)
{
    struct store_put *p = NULL;
    struct store_rows *h = mem_alloc(im->n_kv_heads, sizeof *h);
    int rc = h ? store_put_begin(m->r->d->store, &p, &m->info.geom, m->info.precision,
                                 m->info.has_bias, e)
               : larder_fail(e, LARDER_ENOMEM, "no memory for an import");

    for (uint32_t l = 0; !rc && l < im->n_layers; l++) {
        for (uint32_t g = 0; g < im->n_kv_heads; g++)
            h[g] = rows_of(im, l, g);
        rc = store_put_layer(p, h, e);
    }
    mem_free(h);
    if (!rc)
        return store_put_commit(p, &m->info, m->name, false, m->key, e);
    if (p)
        store_put_abort(p);
    return rc;
}

static void put_run(struct task *t)
{
    struct import *m = (struct import *)t;
    struct store_entry *en;

    m->rc = check_name(m, &m->e);
    if (!m->rc)
        m->rc = put(m, &m->im, &m->e);
    memfile_unmap(m->map, m->bytes);
    if (!m->rc)
        m->rc = store_entry_open(m->r->d->store, m->key, &en, &m->e);
    if (m->rc)
        return;
    m->entry = entry_summary(store_entry_info(en));
    store_entry_close(en);
}

/* ---- on the loop again */

static void put_done(struct task *t)
{
    struct import *m = (struct import *)t;

    if (m->rc) {
        request_fail(m->r, &m->e);
    } else {
        images_forget(m->r->d, m->key);
        request_ok(m->r, json_pack("{so sb}", "entry", m->entry, "model_known", m->model_known),
                   -1);
    }
    free(m->extra);
    mem_free(m);
}

static void check_done(struct task *t)
{
    struct import *m = (struct import *)t;

    if (m->rc) {
        put_done(t);
        return;
    }
    m->task = (struct task){put_run, put_done, NULL};
    task_run(m->r->d->writer, &m->task);
}

void handle_import(struct request *r)
{
    struct import *m = mem_zalloc(1, sizeof *m);
    struct larder_err e;
    int rc = m ? 0 : larder_fail(&e, LARDER_ENOMEM, "no memory for an import");

    if (!rc && !r->d->conf.allow_import)
        rc = larder_fail(&e, LARDER_EUNSUPPORTED,
                         "this larderd takes no imports; allow_import = yes in larder.conf");
    if (!rc) {
        m->r = r;
        read_models(m);
        rc = read_body(m, &e);
    }
    if (rc) {
        if (m)
            free(m->extra);
        mem_free(m);
        request_fail(r, &e);
        return;
    }
    m->task = (struct task){check_run, check_done, NULL};
    task_run(r->d->slow, &m->task);
}
