/* lib_calls.c - the calls of larder.h that put, follow and find, each one question.
 *
 * The one idea: an answer that does not read is the daemon's fault, and a daemon that
 * answers nonsense once is not asked again on this connection.
 */
#include "lib.h"

#include <string.h>
#include <unistd.h>

#include "mem.h"

const char *larder_version(void)
{
    return LARDER_VERSION;
}

void larder_free(void *p)
{
    mem_free(p);
}

/* The answer to `q` read as a job; q->body is stolen. */
static int ask_job(struct larder *c, const struct larder_request *q, struct larder_job *ret,
                   struct larder_err *e)
{
    struct larder_err why = {0, ""};
    struct larder_job job;
    json_t *answer = NULL;
    int rc = larder_ask_json(c, q, &answer, NULL, e);

    if (rc)
        return rc;
    rc = larder_read_job(answer, &job, &why);
    json_decref(answer);
    if (rc) {
        if (e)
            *e = why;
        return larder_break(c, &why);
    }
    if (ret)
        *ret = job;
    return 0;
}

static json_t *document_body(const struct larder_document *d)
{
    return json_pack("{s:s, s:I}", "source", d->source, "bytes", (json_int_t)d->len);
}

static int put(struct larder *c, const struct larder_document *d,
               const struct larder_put_options *o, int timeout_ms, struct larder_job *ret,
               struct larder_err *e)
{
    static const struct larder_put_options none;
    struct larder_request q = {.type = FRAME_PUT, .fd = -1, .timeout_ms = timeout_ms};
    int rc = larder_document_file(d, &q.fd, e);

    if (rc)
        return rc;
    if (!o)
        o = &none;
    q.body = document_body(d);
    q.body = larder_body_str(q.body, "model", o->model);
    q.body = larder_body_str(q.body, "name", o->name);
    q.body = larder_body_str(q.body, "namespace", o->ns);
    q.body = larder_body_str(q.body, "policy", o->policy);
    q.body = larder_body_str(q.body, "template", o->tmpl);
    if (o->pin)
        q.body = larder_body_bool(q.body, "pin", true);
    rc = ask_job(c, &q, ret, e);
    close(q.fd);
    return rc;
}

int larder_put_text(struct larder *c, const char *text, size_t len,
                    const struct larder_put_options *o, int timeout_ms, struct larder_job *ret,
                    struct larder_err *e)
{
    struct larder_document d = {text, len, "text"};

    return put(c, &d, o, timeout_ms, ret, e);
}

static int token_document(const uint32_t *ids, size_t n, struct larder_document *ret,
                          struct larder_err *e)
{
    if (n > KV_MAX_CTX)
        return larder_fail(e, LARDER_ETOOBIG, "%zu tokens; the limit is %u", n, KV_MAX_CTX);
    *ret = (struct larder_document){ids, (uint64_t)n * sizeof *ids, "tokens"};
    return 0;
}

int larder_put_tokens(struct larder *c, const uint32_t *ids, size_t n,
                      const struct larder_put_options *o, int timeout_ms, struct larder_job *ret,
                      struct larder_err *e)
{
    struct larder_document d;
    int rc = token_document(ids, n, &d, e);

    return rc ? rc : put(c, &d, o, timeout_ms, ret, e);
}

static json_t *job_body(uint64_t id)
{
    return json_pack("{s:I}", "job", (json_int_t)id);
}

int larder_job_get(struct larder *c, uint64_t id, int timeout_ms, struct larder_job *ret,
                   struct larder_err *e)
{
    struct larder_request q = {
        .type = FRAME_JOB, .body = job_body(id), .fd = -1, .timeout_ms = timeout_ms};

    return ask_job(c, &q, ret, e);
}

int larder_cancel(struct larder *c, uint64_t id, int timeout_ms, struct larder_job *ret,
                  struct larder_err *e)
{
    struct larder_request q = {
        .type = FRAME_CANCEL, .body = job_body(id), .fd = -1, .timeout_ms = timeout_ms};

    return ask_job(c, &q, ret, e);
}

struct watcher {
    larder_progress *progress;
    void *arg;
};

/* Progress is a courtesy: an event that does not read is passed over. */
static void watch_event(void *arg, const json_t *body)
{
    const struct watcher *w = arg;
    struct larder_job job;

    if (w->progress && !larder_read_job(body, &job, NULL))
        w->progress(w->arg, &job);
}

int larder_watch(struct larder *c, uint64_t id, larder_progress *progress, void *arg,
                 int timeout_ms, struct larder_job *ret, struct larder_err *e)
{
    struct watcher w = {progress, arg};
    struct larder_request q = {.type = FRAME_WATCH,
                               .body = job_body(id),
                               .fd = -1,
                               .on_event = watch_event,
                               .arg = &w,
                               .timeout_ms = timeout_ms};

    return ask_job(c, &q, ret, e);
}

/* The answer to a LOOKUP; q->body is stolen. */
static int ask_entry(struct larder *c, const struct larder_request *q, struct larder_entry *ret,
                     uint64_t *ret_matched, struct larder_err *e)
{
    struct larder_err why = {0, ""};
    struct larder_entry en;
    json_t *answer = NULL;
    uint64_t matched = 0;
    int rc = larder_ask_json(c, q, &answer, NULL, e);

    if (rc)
        return rc;
    rc = larder_read_entry(json_object_get(answer, "entry"), &en, &why);
    if (!rc)
        rc = field_u64(answer, "matched", ret_matched ? FIELD_REQUIRED : FIELD_OPTIONAL, UINT64_MAX,
                       &matched, &why);
    json_decref(answer);
    if (rc) {
        if (e)
            *e = why;
        return larder_break(c, &why);
    }
    *ret = en;
    if (ret_matched)
        *ret_matched = matched;
    return 0;
}

int larder_lookup(struct larder *c, const char *ref, int timeout_ms, struct larder_entry *ret,
                  struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_LOOKUP, .fd = -1, .timeout_ms = timeout_ms};
    int rc = larder_ref_body(ref, &q.body, e);

    return rc ? rc : ask_entry(c, &q, ret, NULL, e);
}

static int lookup_prefix(struct larder *c, const struct larder_document *d,
                         const struct larder_lookup_options *o, int timeout_ms,
                         struct larder_entry *ret, uint64_t *ret_matched, struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_LOOKUP, .fd = -1, .timeout_ms = timeout_ms};
    uint64_t matched = 0;
    int rc = larder_document_file(d, &q.fd, e);

    if (rc)
        return rc;
    q.body = document_body(d);
    q.body = larder_body_str(q.body, "model", o ? o->model : NULL);
    q.body = larder_body_str(q.body, "policy", o ? o->policy : NULL);
    q.body = larder_body_str(q.body, "namespace", o ? o->ns : NULL);
    rc = ask_entry(c, &q, ret, &matched, e);
    close(q.fd);
    if (!rc && ret_matched)
        *ret_matched = matched;
    return rc;
}

int larder_lookup_tokens(struct larder *c, const uint32_t *ids, size_t n,
                         const struct larder_lookup_options *o, int timeout_ms,
                         struct larder_entry *ret, uint64_t *ret_matched, struct larder_err *e)
{
    struct larder_document d;
    int rc = token_document(ids, n, &d, e);

    return rc ? rc : lookup_prefix(c, &d, o, timeout_ms, ret, ret_matched, e);
}

int larder_lookup_text(struct larder *c, const char *text, size_t len,
                       const struct larder_lookup_options *o, int timeout_ms,
                       struct larder_entry *ret, uint64_t *ret_matched, struct larder_err *e)
{
    struct larder_document d = {text, len, "text"};

    return lookup_prefix(c, &d, o, timeout_ms, ret, ret_matched, e);
}

int larder_rm(struct larder *c, const char *ref, int timeout_ms, uint64_t *ret_freed,
              struct larder_err *e)
{
    struct larder_err why = {0, ""};
    json_t *body = NULL, *answer = NULL;
    uint64_t freed = 0;
    int rc = larder_ref_body(ref, &body, e);

    if (!rc)
        rc = larder_ask_plain(c, FRAME_RM, body, timeout_ms, &answer, e);
    if (rc)
        return rc;
    rc = field_u64(answer, "freed_bytes", FIELD_REQUIRED, UINT64_MAX, &freed, &why);
    json_decref(answer);
    if (rc) {
        if (e)
            *e = why;
        return larder_break(c, &why);
    }
    if (ret_freed)
        *ret_freed = freed;
    return 0;
}

int larder_pin(struct larder *c, const char *ref, int on, int timeout_ms, struct larder_err *e)
{
    json_t *body = NULL, *answer = NULL;
    int rc = larder_ref_body(ref, &body, e);

    if (rc)
        return rc;
    body = larder_body_bool(body, "pin", on != 0);
    rc = larder_ask_plain(c, FRAME_PIN, body, timeout_ms, &answer, e);
    json_decref(answer);
    return rc;
}

/* ---- any request */

static int type_number(const char *name, enum frame_type *ret, struct larder_err *e)
{
    for (int t = FRAME_HELLO; t < FRAME_OK; t++)
        if (!strcmp(frame_type_name(t), name) && strcmp(name, "?")) {
            *ret = (enum frame_type)t;
            return 0;
        }
    return larder_fail(e, LARDER_EINVAL, "no request is called '%.32s' (see PROTOCOL.md)", name);
}

/* jansson may have an allocator of its own: hand out what larder_free() takes. */
static char *dump(const json_t *j)
{
    size_t n = json_dumpb(j, NULL, 0, JSON_COMPACT);
    char *s = mem_alloc(n + 1, 1);

    if (!n || !s || json_dumpb(j, s, n, JSON_COMPACT) != n) {
        mem_free(s);
        return NULL;
    }
    s[n] = '\0';
    return s;
}

struct listener {
    larder_event *event;
    void *arg;
};

static void call_event(void *arg, const json_t *body)
{
    const struct listener *l = arg;
    char *s = l->event ? dump(body) : NULL;

    if (s)
        l->event(l->arg, s);
    mem_free(s);
}

int larder_call(struct larder *c, const char *type, const char *json, int fd_in,
                larder_event *event, void *arg, int timeout_ms, char **ret_json, int *ret_fd,
                struct larder_err *e)
{
    struct listener l = {event, arg};
    struct larder_request q = {.type = FRAME_HELLO,
                               .fd = fd_in,
                               .on_event = call_event,
                               .arg = &l,
                               .timeout_ms = timeout_ms};
    json_t *answer = NULL;
    char *text;
    int fd = -1;
    int rc = type_number(type, &q.type, e);

    if (!rc)
        rc = frame_parse_json(json ? json : "{}", json ? strlen(json) : 2, &q.body, e);
    if (rc == LARDER_EPROTO)
        rc = larder_fail_in(e, LARDER_EINVAL, "the request's body");
    if (!rc)
        rc = larder_ask_json(c, &q, &answer, ret_fd ? &fd : NULL, e);
    if (rc)
        return rc;
    text = dump(answer);
    json_decref(answer);
    if (!text) {
        if (fd >= 0)
            close(fd);
        return larder_fail(e, LARDER_ENOMEM, "no memory for an answer");
    }
    *ret_json = text;
    if (ret_fd)
        *ret_fd = fd;
    return 0;
}
