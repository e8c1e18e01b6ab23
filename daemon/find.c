/* find.c - which entry a client means, and why it is not there.
 *
 * The one idea: an entry that a client may not read is answered exactly as one that does not
 * exist: the same code, the same text. */
#include <string.h>
#include <unistd.h>

#include "daemon.h"
#include "mem.h"
#include "memfile.h"
#include "sha256.h"

static int absent(struct larder_err *e)
{
    return larder_fail(
        e, LARDER_ENOTFOUND,
        "no such entry; 'larder ls' lists what is stored, 'larder explain-miss' says why");
}

/* The entry's namespace, checked. */
static int may_read(struct request *r, const uint8_t key[32], struct larder_err *e)
{
    struct store_entry *en;
    int rc = store_entry_open(r->d->store, key, &en, e);

    if (rc)
        return rc == LARDER_ENOTFOUND ? absent(e) : rc;
    if (!request_may_use(r, store_entry_info(en)->ident.ns))
        rc = absent(e);
    store_entry_close(en);
    return rc;
}

int find_ref(struct request *r, uint8_t ret_key[32], struct larder_err *e)
{
    char ns[NAME_MAX_NS + 1], name[NAME_MAX_ENTRY + 1];
    const char *full = NULL;
    bool has_key = false;
    int rc = field_hex32(r->body, "key", FIELD_OPTIONAL, ret_key, &has_key, e);

    if (!rc)
        rc = field_str(r->body, "name", FIELD_OPTIONAL, NAME_MAX_NS + NAME_MAX_ENTRY + 1, &full, e);
    if (!rc && has_key == (full != NULL))
        rc = larder_fail(e, LARDER_EINVAL, "name one entry, by key or by name");
    if (rc)
        return rc;
    if (full) {
        rc = name_split(full, ns, name, e);
        if (!rc)
            rc = store_find_name(r->d->store, ns, name, ret_key, e);
        if (rc == LARDER_ENOTFOUND)
            return absent(e);
    }
    if (rc)
        return rc;
    rc = may_read(r, ret_key, e);
    /* a manifest that cannot be read may still be removed, verified and explained */
    return rc == LARDER_EDAMAGED && r->type != FRAME_FETCH && r->type != FRAME_SHOW ? 0 : rc;
}

int read_document(struct request *r, bool *ret_tokens, void **ret, uint64_t *ret_len,
                  struct larder_err *e)
{
    const char *source = NULL;
    const void *map;
    uint64_t bytes = 0;
    void *copy;
    int rc = field_str(r->body, "source", FIELD_REQUIRED, 16, &source, e);

    if (!rc)
        rc = field_u64(r->body, "bytes", FIELD_REQUIRED, UINT64_MAX >> 11, &bytes, e);
    if (rc)
        return rc;
    if (strcmp(source, "text") && strcmp(source, "tokens"))
        return larder_fail(e, LARDER_EINVAL, "source is \"text\" or \"tokens\", not \"%.20s\"",
                           source);
    if (!bytes)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty");
    if (bytes > r->d->conf.max_document_bytes)
        return larder_fail(
            e, LARDER_ETOOBIG, "the document has %llu bytes; max_document_bytes is %llu",
            (unsigned long long)bytes, (unsigned long long)r->d->conf.max_document_bytes);
    if (*source == 't' && source[1] == 'o' && bytes % 4)
        return larder_fail(e, LARDER_EINVAL,
                           "a token list of %llu bytes is not a whole number of 32-bit ids",
                           (unsigned long long)bytes);
    if (r->fd < 0)
        return larder_fail(e, LARDER_EPROTO, "the document's memory file is missing");
    rc = memfile_map(r->fd, bytes, bytes, &map, &bytes, e);
    if (rc)
        return rc;
    copy = mem_dup(map, bytes);
    memfile_unmap(map, bytes);
    if (!copy)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the document");
    *ret_tokens = !strcmp(source, "tokens");
    *ret = copy;
    *ret_len = bytes;
    return 0;
}

struct model *model_for(struct daemon *d, const char *name, struct larder_err *e)
{
    if (!name && d->n_models == 1)
        return &d->model[0];
    for (uint32_t i = 0; name && i < d->n_models; i++)
        if (!strcmp(d->model[i].conf->name, name))
            return &d->model[i];
    if (name)
        larder_fail(e, LARDER_EUNKNOWNMODEL,
                    "model '%.64s' is not configured; 'larder models' lists those that are", name);
    else
        larder_fail(e, LARDER_EUNKNOWNMODEL, "%u models are configured; name one", d->n_models);
    return NULL;
}

/* A policy as it was asked for into the spelling that entries carry; workers told us. */
static void canonical_policy(struct daemon *d, const char *asked, char *out, size_t cap)
{
    char key[600], *known = NULL;

    snprintf(key, sizeof key, "policy/%.256s", asked);
    if (store_setting_get(d->store, key, &known, NULL))
        known = NULL;
    snprintf(out, cap, "%s", known ? known : asked);
    mem_free(known);
}

/* ---- LOOKUP */

struct search {
    struct task task;
    struct request *r;
    const char *model, *policy, *ns; /* wanted; NULL: any. Borrowed from the body */
    char canonical[256];             /* what `policy` points to */
    bool tokens;
    void *doc;
    uint64_t len;
    uint8_t key[32];
    uint64_t matched;
    json_t *entry;
    struct larder_err e;
    int rc;
};

static bool acceptable(void *arg, const struct store_info *in)
{
    const struct search *q = arg;

    return request_may_use(q->r, in->ident.ns) && (!q->model || !strcmp(q->model, in->model)) &&
           (!q->policy || policy_serves(q->policy, in->ident.policy, NULL)) &&
           (!q->ns || !strcmp(q->ns, in->ident.ns));
}

static void search_run(struct task *t)
{
    struct search *q = (struct search *)t;
    struct store *s = q->r->d->store;
    struct store_entry *en;

    if (q->doc)
        q->rc = store_find_prefix(s, q->tokens ? STORE_PREFIX_TOKENS : STORE_PREFIX_TEXT, q->doc,
                                  q->len, acceptable, q, q->key, &q->matched, &q->e);
    if (!q->rc)
        q->rc = store_entry_open(s, q->key, &en, &q->e);
    if (q->rc == LARDER_ENOTFOUND)
        absent(&q->e);
    if (q->rc)
        return;
    q->entry = entry_summary(store_entry_info(en));
    if (!q->doc)
        q->matched = store_entry_info(en)->n_ctx;
    else if (q->tokens)
        q->matched /= 4;
    store_entry_close(en);
}

static void search_done(struct task *t)
{
    struct search *q = (struct search *)t;

    if (q->rc)
        request_fail(q->r, &q->e);
    else
        request_ok(q->r, json_pack("{so sI}", "entry", q->entry, "matched", (json_int_t)q->matched),
                   -1);
    mem_free(q->doc);
    mem_free(q);
}

void handle_lookup(struct request *r)
{
    struct search *q = mem_zalloc(1, sizeof *q);
    struct larder_err e;
    int rc = q ? 0 : larder_fail(&e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = field_str(r->body, "model", FIELD_OPTIONAL, NAME_MAX_NS, &q->model, &e);
    if (!rc)
        rc = field_str(r->body, "policy", FIELD_OPTIONAL, 256, &q->policy, &e);
    if (!rc)
        rc = field_str(r->body, "namespace", FIELD_OPTIONAL, NAME_MAX_NS, &q->ns, &e);
    if (!rc)
        rc = json_object_get(r->body, "source") ? read_document(r, &q->tokens, &q->doc, &q->len, &e)
                                                : find_ref(r, q->key, &e);
    if (rc) {
        mem_free(q);
        request_fail(r, &e);
        return;
    }
    if (q->policy) {
        canonical_policy(r->d, q->policy, q->canonical, sizeof q->canonical);
        q->policy = q->canonical;
    }
    q->r = r;
    q->task = (struct task){search_run, search_done, NULL};
    task_run(r->d->readers, &q->task);
}

/* ---- EXPLAIN */

/* The nearest stored relative of a document: same document bytes, one part of identity off. */
struct relative {
    const struct search *q;
    const struct model *m;
    const char *tmpl;
    int closeness; /* 0: none seen */
    const char *reason;
    char have[512];
};

static bool same_document(const struct search *q, const struct store_info *in, struct store *s)
{
    struct store_entry *en;
    const struct store_info *full;
    bool same = false;

    if (store_entry_open(s, in->key, &en, NULL))
        return false;
    full = store_entry_info(en);
    if (!store_entry_load(en, NULL)) {
        if (q->tokens)
            same = 4ull * full->n_ctx == q->len && !memcmp(full->ident.tokens, q->doc, q->len);
        else /* the rendered text ends with the document */
            same = full->text_len >= q->len &&
                   !memcmp(full->text + full->text_len - q->len, q->doc, q->len);
    }
    store_entry_close(en);
    return same;
}

static void relate(struct relative *v, int closeness, const char *reason, const char *have)
{
    if (closeness <= v->closeness)
        return;
    v->closeness = closeness;
    v->reason = reason;
    snprintf(v->have, sizeof v->have, "%s", have);
}

/* Candidates are few: only entries whose text or tokens are long enough to hold the document. */
static bool compare_relative(void *arg, const struct store_info *in)
{
    struct relative *v = arg;
    const struct model *m = v->m;

    if (!in->n_ctx || !request_may_use(v->q->r, in->ident.ns) ||
        (v->q->tokens ? 4ull * in->n_ctx != v->q->len : in->text_len < v->q->len) ||
        !same_document(v->q, in, v->q->r->d->store))
        return true;
    if (m && m->known && memcmp(in->ident.model_fp, m->fp, 32))
        relate(v, 1, "other_model", in->model);
    else if (m && m->known && memcmp(in->ident.tokenizer_fp, m->tokenizer_fp, 32))
        relate(v, 2, "other_tokenizer", in->model);
    else if (v->tmpl && strcmp(in->tmpl, v->tmpl))
        relate(v, 3, "other_template", in->tmpl);
    else if (v->q->policy && !policy_serves(v->q->policy, in->ident.policy, m))
        relate(v, 4, "other_policy", in->ident.policy);
    else
        relate(v, in->damaged ? 5 : 6, in->damaged ? "damaged" : "stored", in->ident.policy);
    return true;
}

static json_t *reason_body(const char *reason, const char *message)
{
    return json_pack("{ss ss}", "reason", reason, "message", message);
}

/* A job for the same name or document. */
static json_t *explain_job(struct daemon *d, const char *name, const struct search *q,
                           bool finished)
{
    uint8_t digest[32] = {0};

    if (q->doc)
        sha256_of(q->doc, q->len, digest);
    for (struct job *j = finished ? d->history : d->jobs; j; j = j->next) {
        bool match = q->doc && !memcmp(j->doc_digest, digest, 32) && j->doc_len == q->len;
        json_t *b;

        for (uint32_t i = 0; name && i < j->n_names; i++)
            match |= !strcmp(j->name[i], name) && !strcmp(j->ns, q->ns);
        if (!match || j->state == JOB_DONE || j->state == JOB_CANCELED ||
            !request_may_use(q->r, j->ns))
            continue;
        b = reason_body(finished ? "failed" : "computing",
                        finished ? j->why.msg : "a job for it is queued or running");
        json_object_set_new(b, "job", json_integer((json_int_t)j->id));
        return b;
    }
    return NULL;
}

/* An entry named by key: its tombstone says what became of it. */
static json_t *explain_gone(struct daemon *d, const uint8_t key[32])
{
    char why;
    uint64_t when;
    json_t *b;

    if (store_tombstone(d->store, key, &why, &when, NULL))
        return NULL;
    b = why == 'e'
            ? reason_body("evicted", "it was evicted to make room; raise store_budget or pin it")
            : reason_body("removed", "it was removed");
    json_object_set_new(b, "when", json_integer((json_int_t)when));
    return b;
}

static void explain_run(struct task *t)
{
    struct search *q = (struct search *)t;
    struct relative v = {.q = q};
    const char *tmpl = NULL;

    field_str(q->r->body, "template", FIELD_OPTIONAL, KV_MAX_TEMPLATE - 1, &tmpl, NULL);
    v.m = model_for(q->r->d, q->model, NULL);
    v.tmpl = tmpl ? tmpl : v.m && v.m->known ? v.m->template : NULL;
    q->rc = store_list(q->r->d->store, NULL, UINT32_MAX, compare_relative, &v, &q->e);
    if (q->rc || !v.closeness)
        return;
    q->entry = reason_body(v.reason, v.closeness == 6 ? "it is stored"
                                     : v.closeness == 5
                                         ? "it is stored, but its bytes are damaged; put it again"
                                         : "the document is stored, but under another identity");
    json_object_set_new(q->entry, "have", json_string(v.have));
}

static void explain_done(struct task *t)
{
    struct search *q = (struct search *)t;

    if (!q->rc && !q->entry) /* not stored: did somebody try? */
        q->entry = explain_job(q->r->d, NULL, q, true);
    if (q->rc)
        request_fail(q->r, &q->e);
    else
        request_ok(
            q->r,
            q->entry
                ? q->entry
                : reason_body("never_stored",
                              "nothing with this content was ever stored; 'larder put' stores it"),
            -1);
    mem_free(q->doc);
    mem_free(q);
}

/* By reference: stored, damaged, a job, a tombstone, or never. */
static void explain_ref(struct search *q)
{
    struct request *r = q->r;
    struct store_entry *en;
    const char *full = json_string_value(json_object_get(r->body, "name"));
    char ns[NAME_MAX_NS + 1] = "default", entry[NAME_MAX_ENTRY + 1] = "";
    struct larder_err e;
    bool has_key;
    json_t *b = NULL;
    int rc = find_ref(r, q->key, &e);

    if (!rc) {
        rc = store_entry_open(r->d->store, q->key, &en, &e);
        if (!rc) {
            bool damaged = store_entry_info(en)->damaged;

            b = damaged ? reason_body("damaged", "its bytes are damaged; put it again")
                        : reason_body("stored", "it is stored");
            store_entry_close(en);
        } else if (rc == LARDER_EDAMAGED) {
            b = reason_body("damaged", e.msg);
        }
    }
    if (rc && rc != LARDER_ENOTFOUND && !b) {
        request_fail(r, &e);
        mem_free(q);
        return;
    }
    q->ns = ns;
    if (!b && full && !name_split(full, ns, entry, NULL))
        b = explain_job(r->d, entry, q, false);
    if (!b && full && *entry)
        b = explain_job(r->d, entry, q, true);
    if (!b && !field_hex32(r->body, "key", FIELD_OPTIONAL, q->key, &has_key, NULL) && !full)
        b = explain_gone(r->d, q->key);
    request_ok(r,
               b ? b
                 : reason_body("never_stored",
                               "nothing was ever stored under it; 'larder ls' lists what is"),
               -1);
    mem_free(q);
}

void handle_explain(struct request *r)
{
    struct search *q = mem_zalloc(1, sizeof *q);
    struct larder_err e;
    json_t *b;
    int rc = q ? 0 : larder_fail(&e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = field_str(r->body, "model", FIELD_OPTIONAL, NAME_MAX_NS, &q->model, &e);
    if (!rc)
        rc = field_str(r->body, "policy", FIELD_OPTIONAL, 256, &q->policy, &e);
    if (!rc && json_object_get(r->body, "source"))
        rc = read_document(r, &q->tokens, &q->doc, &q->len, &e);
    if (rc) {
        mem_free(q);
        request_fail(r, &e);
        return;
    }
    if (q->policy) {
        canonical_policy(r->d, q->policy, q->canonical, sizeof q->canonical);
        q->policy = q->canonical;
    }
    q->r = r;
    if (!q->doc) {
        explain_ref(q);
        return;
    }
    b = explain_job(r->d, NULL, q, false);
    if (b) {
        request_ok(r, b, -1);
        mem_free(q->doc);
        mem_free(q);
        return;
    }
    q->task = (struct task){explain_run, explain_done, NULL};
    task_run(r->d->slow, &q->task);
}
