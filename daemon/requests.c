/* requests.c - what each client frame does, but for jobs, look-ups and fetches.
 *
 * The one idea: one table says, per frame, which fields it may have and who handles it.
 * Handlers take the request and answer it exactly once, at once or when a task is done. */
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "daemon.h"
#include "image_plan.h"
#include "mem.h"
#include "sha256.h"

#define LS_DEFAULT 100u
#define LS_MAX 1000u

/* ---- entries as JSON */

static void set(json_t *j, const char *key, json_t *v)
{
    json_object_set_new(j, key, v);
}

static void set_hex(json_t *j, const char *key, const uint8_t v[32])
{
    char hex[2 * SHA256_LEN + 1];

    sha256_hex(v, hex);
    set(j, key, json_string(hex));
}

static uint64_t heads_of(const struct store_info *in)
{
    return (uint64_t)in->geom.n_layers * in->geom.n_kv_heads;
}

/* Size of the image, as a fetch would lay it out. */
static uint64_t image_bytes(const struct store_info *in)
{
    struct image_spec spec = {.geom = in->geom,
                              .dtype = KV_BF16,
                              .has_bias = in->has_bias,
                              .n_ctx = in->n_ctx,
                              .next_pos = in->next_pos,
                              .n_vocab = in->n_vocab,
                              .text_len = in->text_len,
                              .rows = in->rows};
    struct image_plan *plan;
    uint64_t n;

    if (image_plan_new(&plan, &spec, UINT64_MAX / 2, NULL))
        return 0;
    n = plan->n_bytes;
    image_plan_free(plan);
    return n;
}

static void set_name(json_t *j, const struct store_info *in)
{
    char full[NAME_MAX_NS + NAME_MAX_ENTRY + 2];

    if (!in->name)
        return;
    snprintf(full, sizeof full, "%s/%s", in->ident.ns, in->name);
    set(j, "name", json_string(full));
}

json_t *entry_summary(const struct store_info *in)
{
    json_t *j = json_object();
    uint64_t rows = 0;

    set_hex(j, "key", in->key);
    set(j, "damaged", json_boolean(in->damaged));
    if (!in->n_ctx) { /* its manifest cannot be read */
        set(j, "n_ctx", json_integer(0));
        set(j, "next_pos", json_integer(0));
        return j;
    }
    for (uint64_t i = 0; i < heads_of(in); i++)
        rows += in->rows[i];
    set_name(j, in);
    set(j, "model", json_string(in->model));
    set(j, "policy", json_string(in->ident.policy));
    set(j, "n_ctx", json_integer(in->n_ctx));
    set(j, "next_pos", json_integer(in->next_pos));
    set(j, "sel_layer", in->sel_layer < 0 ? json_null() : json_integer(in->sel_layer));
    set(j, "full_bytes",
        json_integer((json_int_t)(4 * heads_of(in) * in->n_ctx * in->geom.head_dim)));
    set(j, "image_bytes", json_integer((json_int_t)image_bytes(in)));
    set(j, "stored_bytes", json_integer((json_int_t)in->stored_bytes));
    set(j, "rows_total", json_integer((json_int_t)rows));
    set(j, "precision", json_string(kv_dtype_name(in->precision)));
    set(j, "pinned", json_boolean(in->pinned));
    set(j, "imported", json_boolean(strstr(in->ident.policy, ",imported=")));
    set(j, "created", json_integer((json_int_t)in->created));
    set(j, "prefill_ms", json_integer((json_int_t)in->prefill_ms));
    set(j, "hits", json_integer((json_int_t)in->hits));
    return j;
}

static json_t *rows_object(const struct store_info *in)
{
    json_t *layers = json_array();

    for (uint32_t l = 0; l < in->geom.n_layers; l++) {
        json_t *heads = json_array();

        for (uint32_t g = 0; g < in->geom.n_kv_heads; g++)
            json_array_append_new(heads,
                                  json_integer(in->rows[(uint64_t)l * in->geom.n_kv_heads + g]));
        json_array_append_new(layers, heads);
    }
    return layers;
}

json_t *entry_full(const struct store_info *in, bool text, bool tokens)
{
    json_t *j = entry_summary(in), *extra = in->extra ? json_loads(in->extra, 0, NULL) : NULL, *v;

    set(j, "namespace", json_string(in->ident.ns));
    set(j, "template", json_string(in->tmpl));
    set_hex(j, "model_fingerprint", in->ident.model_fp);
    set_hex(j, "tokenizer_fingerprint", in->ident.tokenizer_fp);
    set_hex(j, "template_fingerprint", in->ident.template_fp);
    set(j, "n_layers", json_integer(in->geom.n_layers));
    set(j, "n_heads", json_integer(in->geom.n_heads));
    set(j, "n_kv_heads", json_integer(in->geom.n_kv_heads));
    set(j, "head_dim", json_integer(in->geom.head_dim));
    set(j, "n_vocab", json_integer(in->n_vocab));
    set(j, "rows", rows_object(in));
    set(j, "has_bias", json_boolean(in->has_bias));
    set(j, "renumbered", json_boolean(in->renumbered));
    v = json_object_get(extra, "rank_variance");
    set(j, "rank_variance", v ? json_incref(v) : json_array());
    v = json_object_get(extra, "certificate");
    set(j, "certificate", v ? json_incref(v) : json_null());
    set(j, "backend", json_string(in->backend));
    if (text && in->text)
        set(j, "text", json_stringn(in->text, in->text_len));
    if (tokens && in->ident.tokens) {
        v = json_array();
        for (uint32_t i = 0; i < in->n_ctx; i++)
            json_array_append_new(v, json_integer(in->ident.tokens[i]));
        set(j, "tokens", v);
    }
    json_decref(extra);
    return j;
}

/* ---- small requests */

static void handle_hello(struct request *r)
{
    const char *who = NULL;
    struct larder_err e;

    if (field_str(r->body, "client", FIELD_REQUIRED, 256, &who, &e)) {
        request_fail(r, &e);
        return;
    }
    request_ok(r,
               json_pack("{ss si sb sb}", "server", "larderd " LARDER_VERSION, "protocol",
                         (int)FRAME_VERSION, "namespaces_restricted", r->d->conf.n_ns > 0,
                         "quiet_release", 1),
               -1);
}

static json_t *model_object(const struct model *m)
{
    char hex[2 * SHA256_LEN + 1] = "";
    json_t *j = json_object();

    sha256_hex(m->fp, hex);
    set(j, "name", json_string(m->conf->name));
    set(j, "path", json_string(m->conf->path));
    set(j, "template", json_string(m->known ? m->template : m->conf->template));
    set(j, "policy", json_string(m->conf->policy));
    set(j, "backend", json_string(m->conf->backend));
    set(j, "dtype", json_string(*m->dtype ? m->dtype : m->conf->dtype));
    set(j, "fingerprint", m->known ? json_string(hex) : json_null());
    set(j, "n_positions", json_integer(m->n_positions));
    set(j, "profile", *m->profile_id ? json_string(m->profile_id) : json_null());
    set(j, "worker", json_string(m->worker ? "running" : "stopped"));
    if (*m->device)
        set(j, "device", json_string(m->device));
    return j;
}

static void handle_status(struct request *r)
{
    struct daemon *d = r->d;
    struct store_stats st;
    struct larder_err e;
    json_t *models = json_array();

    if (store_stats(d->store, &st, &e)) {
        json_decref(models);
        request_fail(r, &e);
        return;
    }
    for (uint32_t i = 0; i < d->n_models; i++)
        json_array_append_new(models, model_object(&d->model[i]));
    request_ok(r,
               json_pack("{ss sI sI s{ss sI sI sI sI sI sI} so sI sI so so}", "version",
                         LARDER_VERSION, "pid", (json_int_t)getpid(), "uptime_s",
                         (json_int_t)((uint64_t)time(NULL) - d->started), "store", "dir",
                         d->conf.store, "budget_bytes", (json_int_t)st.budget, "used_bytes",
                         (json_int_t)st.used, "entries", (json_int_t)st.entries, "pinned",
                         (json_int_t)st.pinned, "damaged", (json_int_t)st.damaged, "evicted",
                         (json_int_t)st.evicted, "images", images_status(d), "clients",
                         (json_int_t)d->n_clients, "requests", (json_int_t)d->n_requests, "jobs",
                         jobs_status(d), "models", models),
               -1);
}

static void handle_release(struct request *r)
{
    struct larder_err e;
    uint64_t lease = 0;
    bool quiet = false;
    int rc = field_u64(r->body, "lease", FIELD_REQUIRED, UINT64_MAX >> 11, &lease, &e);

    if (!rc)
        rc = field_bool(r->body, "quiet", FIELD_OPTIONAL, &quiet, &e);
    if (!rc && client_release(r->client, lease))
        rc = larder_fail(&e, LARDER_ENOTFOUND, "no lease %llu on this connection",
                         (unsigned long long)lease);
    if (rc)
        request_fail(r, &e);
    else if (quiet)
        request_end(r);
    else
        request_ok(r, NULL, -1);
}

/* ---- LS */

struct listing {
    struct request *r;
    const char *ns, *prefix;
    json_t *entries;
    uint32_t limit;
    bool more;
};

static bool list_one(void *arg, const struct store_info *in)
{
    struct listing *l = arg;
    const char *ns = in->ident.ns;

    if (ns && (!request_may_use(l->r, ns) || (l->ns && strcmp(ns, l->ns))))
        return true;
    if (l->prefix && (!in->name || strncmp(in->name, l->prefix, strlen(l->prefix))))
        return true;
    if (json_array_size(l->entries) == l->limit) {
        l->more = true;
        return false;
    }
    json_array_append_new(l->entries, entry_summary(in));
    return true;
}

static void handle_ls(struct request *r)
{
    struct listing l = {.r = r, .limit = LS_DEFAULT};
    struct larder_err e;
    uint8_t after[32];
    bool has_after = false;
    int rc = field_str(r->body, "namespace", FIELD_OPTIONAL, NAME_MAX_NS, &l.ns, &e);

    if (!rc)
        rc = field_str(r->body, "prefix", FIELD_OPTIONAL, NAME_MAX_ENTRY, &l.prefix, &e);
    if (!rc)
        rc = field_hex32(r->body, "after", FIELD_OPTIONAL, after, &has_after, &e);
    if (!rc)
        rc = field_u32(r->body, "limit", FIELD_OPTIONAL, LS_MAX, &l.limit, &e);
    if (!rc) {
        l.entries = json_array();
        rc = store_list(r->d->store, has_after ? after : NULL, UINT32_MAX, list_one, &l, &e);
    }
    if (rc) {
        json_decref(l.entries);
        request_fail(r, &e);
        return;
    }
    request_ok(r, json_pack("{so sb}", "entries", l.entries, "more", l.more), -1);
}

/* ---- SHOW: reads and verifies tokens and text, so it runs on a reader */

struct show {
    struct task task;
    struct request *r;
    uint8_t key[32];
    bool text, tokens;
    json_t *body;
    struct larder_err e;
    int rc;
};

static void show_run(struct task *t)
{
    struct show *s = (struct show *)t;
    struct store_entry *en;

    s->rc = store_entry_open(s->r->d->store, s->key, &en, &s->e);
    if (s->rc == LARDER_ENOTFOUND)
        larder_fail(&s->e, s->rc, "no such entry");
    if (s->rc)
        return;
    s->rc = store_entry_load(en, &s->e);
    if (!s->rc)
        s->body = json_pack("{so}", "entry", entry_full(store_entry_info(en), s->text, s->tokens));
    store_entry_close(en);
}

static void show_done(struct task *t)
{
    struct show *s = (struct show *)t;

    if (s->rc)
        request_fail(s->r, &s->e);
    else
        request_ok(s->r, s->body, -1);
    mem_free(s);
}

static void handle_show(struct request *r)
{
    struct show *s = mem_zalloc(1, sizeof *s);
    struct larder_err e;
    int rc = s ? find_ref(r, s->key, &e) : larder_fail(&e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = field_bool(r->body, "text", FIELD_OPTIONAL, &s->text, &e);
    if (!rc)
        rc = field_bool(r->body, "tokens", FIELD_OPTIONAL, &s->tokens, &e);
    if (rc) {
        mem_free(s);
        request_fail(r, &e);
        return;
    }
    s->r = r;
    s->task = (struct task){show_run, show_done, NULL};
    task_run(r->d->readers, &s->task);
}

/* ---- RM, PIN: the writer's */

struct change {
    struct task task;
    struct request *r;
    uint8_t key[32];
    bool pin;
    uint64_t freed;
    struct larder_err e;
    int rc;
};

static void change_run(struct task *t)
{
    struct change *c = (struct change *)t;
    struct store *s = c->r->d->store;

    if (c->r->type == FRAME_RM)
        c->rc = store_delete(s, c->key, &c->freed, &c->e);
    else
        c->rc = store_pin(s, c->key, c->pin, &c->e);
    if (c->rc == LARDER_ENOTFOUND)
        larder_fail(&c->e, c->rc, "no such entry");
}

static void change_done(struct task *t)
{
    struct change *c = (struct change *)t;
    bool rm = c->r->type == FRAME_RM;

    if (!c->rc && rm)
        images_forget(c->r->d, c->key);
    if (c->rc)
        request_fail(c->r, &c->e);
    else
        request_ok(c->r, rm ? json_pack("{sI}", "freed_bytes", (json_int_t)c->freed) : NULL, -1);
    mem_free(c);
}

static void handle_change(struct request *r)
{
    struct change *c = mem_zalloc(1, sizeof *c);
    struct larder_err e;
    int rc = c ? find_ref(r, c->key, &e) : larder_fail(&e, LARDER_ENOMEM, "no memory");

    if (!rc && r->type == FRAME_PIN)
        rc = field_bool(r->body, "pin", FIELD_REQUIRED, &c->pin, &e);
    if (rc) {
        mem_free(c);
        request_fail(r, &e);
        return;
    }
    c->r = r;
    c->task = (struct task){change_run, change_done, NULL};
    task_run(r->d->writer, &c->task);
}

/* ---- VERIFY: one entry a task, so that other slow work gets its turn */

struct verify {
    struct task task;
    struct request *r;
    uint8_t (*key)[32];
    uint32_t n, cap, at;
    uint64_t bytes;
    json_t *damaged;
    int rc;
    struct larder_err e;
};

static bool verify_add(void *arg, const struct store_info *in)
{
    struct verify *v = arg;

    if (in->ident.ns && !request_may_use(v->r, in->ident.ns))
        return true;
    if (v->n == v->cap) {
        uint32_t cap = v->cap ? 2 * v->cap : 64;
        void *grown = mem_grow(v->key, cap, sizeof *v->key);

        if (!grown)
            return false;
        v->key = grown;
        v->cap = cap;
    }
    memcpy(v->key[v->n++], in->key, 32);
    return true;
}

static void verify_run(struct task *t)
{
    struct verify *v = (struct verify *)t;
    uint64_t bytes = 0;

    v->rc = store_verify(v->r->d->store, v->key[v->at], &bytes, &v->e);
    v->bytes += bytes;
}

static int quarantine(struct daemon *d, void *arg, struct larder_err *e)
{
    return store_quarantine(d->store, arg, e);
}

static void verify_report(struct verify *v, const uint8_t key[32])
{
    json_t *j = json_object();

    set_hex(j, "key", key);
    set(j, "message", json_string(v->e.msg));
    json_array_append_new(v->damaged, j);
    images_forget(v->r->d, key);
    write_quietly(v->r->d, quarantine, (void *)(uintptr_t)key, 32, "quarantine");
}

static void verify_end(struct verify *v, const struct larder_err *e)
{
    if (e) {
        json_decref(v->damaged);
        request_fail(v->r, e);
    } else {
        request_ok(v->r,
                   json_pack("{sI sI so}", "checked", (json_int_t)v->n, "bytes",
                             (json_int_t)v->bytes, "damaged", v->damaged),
                   -1);
    }
    mem_free(v->key);
    mem_free(v);
}

static void verify_done(struct task *t)
{
    struct verify *v = (struct verify *)t;

    if (v->rc == LARDER_EDAMAGED) {
        verify_report(v, v->key[v->at]);
    } else if (v->rc && v->rc != LARDER_ENOTFOUND) { /* an entry removed meanwhile is fine */
        verify_end(v, &v->e);
        return;
    }
    v->at++;
    request_event(v->r, json_pack("{sI sI}", "done", (json_int_t)v->at, "of", (json_int_t)v->n));
    if (v->at == v->n || !v->r->client || v->r->d->stopping)
        verify_end(v, NULL);
    else
        task_run(v->r->d->slow, &v->task);
}

static void handle_verify(struct request *r)
{
    struct verify *v = mem_zalloc(1, sizeof *v);
    bool one = json_object_get(r->body, "key") || json_object_get(r->body, "name");
    struct store_info only = {0};
    struct larder_err e;
    int rc = v ? 0 : larder_fail(&e, LARDER_ENOMEM, "no memory");

    if (v) {
        v->r = r;
        v->task = (struct task){verify_run, verify_done, NULL};
        v->damaged = json_array();
    }
    if (!rc && one)
        rc = find_ref(r, only.key, &e);
    if (!rc && one && !verify_add(v, &only))
        rc = larder_fail(&e, LARDER_ENOMEM, "no memory");
    if (!rc && !one)
        rc = store_list(r->d->store, NULL, UINT32_MAX, verify_add, v, &e);
    if (rc) {
        if (v)
            json_decref(v->damaged);
        mem_free(v ? v->key : NULL);
        mem_free(v);
        request_fail(r, &e);
    } else if (!v->n) {
        verify_end(v, NULL);
    } else {
        task_run(r->d->slow, &v->task);
    }
}

/* ---- quiet writes */

struct quiet {
    struct task task;
    struct daemon *d;
    quiet_fn *fn;
    const char *what;
    struct larder_err e;
    int rc;
    uint8_t arg[];
};

static void quiet_run(struct task *t)
{
    struct quiet *q = (struct quiet *)t;

    q->rc = q->fn(q->d, q->arg, &q->e);
}

static void quiet_done(struct task *t)
{
    struct quiet *q = (struct quiet *)t;

    if (q->rc && q->rc != LARDER_ENOTFOUND)
        log_line(LOG_LEVEL_WARNING, "%s: %s", q->what, q->e.msg);
    mem_free(q);
}

void write_quietly(struct daemon *d, quiet_fn *fn, void *arg, size_t arg_len, const char *what)
{
    struct quiet *q = mem_zalloc(1, sizeof *q + arg_len);

    if (!q) {
        log_line(LOG_LEVEL_WARNING, "%s: no memory", what);
        return;
    }
    q->task = (struct task){quiet_run, quiet_done, NULL};
    q->d = d;
    q->fn = fn;
    q->what = what;
    memcpy(q->arg, arg, arg_len);
    task_run(d->writer, &q->task);
}

/* ---- dispatch */

#define REF "key", "name"
#define FIELDS(...)                                                                                \
    (const char *const[])                                                                          \
    {                                                                                              \
        __VA_ARGS__, NULL                                                                          \
    }
static const char *const no_fields[] = {NULL};

static const struct {
    enum frame_type type;
    void (*handle)(struct request *r);
    const char *const *fields;
} table[] = {
    {FRAME_HELLO, handle_hello, FIELDS("client")},
    {FRAME_PUT, handle_put,
     FIELDS("source", "bytes", "model", "name", "namespace", "policy", "template", "pin", "wait")},
    {FRAME_JOB, handle_job, FIELDS("job")},
    {FRAME_WATCH, handle_job, FIELDS("job")},
    {FRAME_CANCEL, handle_job, FIELDS("job")},
    {FRAME_JOBS, handle_jobs, no_fields},
    {FRAME_LOOKUP, handle_lookup, FIELDS(REF, "source", "bytes", "model", "policy", "namespace")},
    {FRAME_FETCH, handle_fetch, FIELDS(REF, "rows")},
    {FRAME_RELEASE, handle_release, FIELDS("lease", "quiet")},
    {FRAME_LS, handle_ls, FIELDS("namespace", "prefix", "after", "limit")},
    {FRAME_SHOW, handle_show, FIELDS(REF, "text", "tokens")},
    {FRAME_RM, handle_change, FIELDS(REF)},
    {FRAME_PIN, handle_change, FIELDS(REF, "pin")},
    {FRAME_STATUS, handle_status, no_fields},
    {FRAME_VERIFY, handle_verify, FIELDS(REF)},
    {FRAME_EXPLAIN, handle_explain,
     FIELDS(REF, "source", "bytes", "model", "policy", "template", "namespace")},
    {FRAME_PROFILE, handle_profile, FIELDS("model", "bytes")},
    {FRAME_IMPORT, handle_import,
     FIELDS("bytes", "name", "namespace", "source_namespace", "key", "policy", "model", "template",
            "template_fingerprint", "backend", "sel_layer", "rank_variance", "certificate",
            "prefill_ms")},
};

void request_dispatch(struct request *r)
{
    struct larder_err e;

    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        if (table[i].type != r->type)
            continue;
        if (field_only(r->body, table[i].fields, &e))
            request_fail(r, &e);
        else
            table[i].handle(r);
        return;
    }
    larder_fail(&e, LARDER_EPROTO, "%s is not a request", frame_type_name(r->type));
    request_fail(r, &e);
}
