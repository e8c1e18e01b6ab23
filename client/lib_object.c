/* lib_object.c - requests' parts and the objects of answers, between JSON and structs.
 *
 * The one idea: answers come from a daemon that may be somebody else's, so every field
 * is typed and bounded like a client's. Unknown fields are passed over: a newer daemon
 * may say more.
 */
#include "lib.h"

#include <string.h>

#include "memfile.h"

json_t *larder_body_str(json_t *body, const char *key, const char *value)
{
    if (body && value && json_object_set_new(body, key, json_string(value))) {
        json_decref(body);
        return NULL;
    }
    return body;
}

json_t *larder_body_bool(json_t *body, const char *key, bool value)
{
    if (body && json_object_set_new(body, key, json_boolean(value))) {
        json_decref(body);
        return NULL;
    }
    return body;
}

static bool is_key(const char *s)
{
    return strlen(s) == 64 && strspn(s, "0123456789abcdef") == 64;
}

int larder_ref_body(const char *ref, json_t **ret, struct larder_err *e)
{
    char ns[NAME_MAX_NS + 1], name[NAME_MAX_ENTRY + 1];
    json_t *body;
    int rc = is_key(ref) ? 0 : name_split(ref, ns, name, e);

    if (rc)
        return rc;
    body = larder_body_str(json_object(), is_key(ref) ? "key" : "name", ref);
    if (!body)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a request");
    *ret = body;
    return 0;
}

int larder_document_file(const struct larder_document *d, int *ret_fd, struct larder_err *e)
{
    if (!d->len)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty");
    return memfile_from("larder-document", d->bytes, d->len, ret_fd, e);
}

/* Copy an optional string into a member; `size` counts the terminator. */
static int copy_str(const json_t *j, const char *key, char *out, size_t size, struct larder_err *e)
{
    const char *s = "";
    int rc = field_str(j, key, FIELD_OPTIONAL, size - 1, &s, e);

    if (!rc)
        memcpy(out, s, strlen(s) + 1);
    return rc;
}

static int copy_bool(const json_t *j, const char *key, int *out, struct larder_err *e)
{
    bool b = false;
    int rc = field_bool(j, key, FIELD_OPTIONAL, &b, e);

    *out = b;
    return rc;
}

static int read_state(const json_t *j, enum larder_job_state *ret, struct larder_err *e)
{
    static const char *const names[] = {"queued", "running", "done", "failed", "canceled"};
    const char *s = NULL;
    int rc = field_str(j, "state", FIELD_REQUIRED, 16, &s, e);

    for (int i = 0; !rc && i < 5; i++)
        if (!strcmp(s, names[i])) {
            *ret = (enum larder_job_state)i;
            return 0;
        }
    return rc ? rc : larder_fail(e, LARDER_EPROTO, "a job in unknown state '%s'", s);
}

/* Code and message of a failed job; messages may be longer than ours. */
static int read_failure(const json_t *j, struct larder_job *job, struct larder_err *e)
{
    struct larder_err why = {0, ""};
    int rc;

    if (job->state != LARDER_JOB_FAILED)
        return 0;
    rc = frame_error_read(j, &why);
    if (rc == LARDER_EPROTO && !json_object_get(j, "code"))
        return larder_fail(e, LARDER_EPROTO, "a failed job without its reason");
    job->code = rc;
    memcpy(job->message, why.msg, sizeof job->message);
    return 0;
}

int larder_read_job(const json_t *j, struct larder_job *ret, struct larder_err *e)
{
    struct larder_job job;
    bool has_key = false;
    int rc;

    memset(&job, 0, sizeof job);
    if ((rc = field_u64(j, "job", FIELD_REQUIRED, UINT64_MAX, &job.id, e)) ||
        (rc = read_state(j, &job.state, e)) ||
        (rc = field_hex32(j, "key", FIELD_OPTIONAL, job.key, &has_key, e)) ||
        (rc = copy_str(j, "name", job.name, sizeof job.name, e)) ||
        (rc = copy_str(j, "model", job.model, sizeof job.model, e)) ||
        (rc = copy_str(j, "policy", job.policy, sizeof job.policy, e)) ||
        (rc = copy_str(j, "pass", job.pass, sizeof job.pass, e)) ||
        (rc = field_u32(j, "layer", FIELD_OPTIONAL, UINT32_MAX, &job.layer, e)) ||
        (rc = field_u32(j, "layers", FIELD_OPTIONAL, UINT32_MAX, &job.n_layers, e)) ||
        (rc = field_u32(j, "n_ctx", FIELD_OPTIONAL, UINT32_MAX, &job.n_ctx, e)) ||
        (rc = copy_bool(j, "stored_already", &job.stored_already, e)) ||
        (rc = field_u64(j, "prefill_ms", FIELD_OPTIONAL, UINT64_MAX, &job.prefill_ms, e)) ||
        (rc = field_u64(j, "elapsed_ms", FIELD_OPTIONAL, UINT64_MAX, &job.elapsed_ms, e)) ||
        (rc = read_failure(j, &job, e)))
        return rc;
    job.has_key = has_key;
    *ret = job;
    return 0;
}

/* null, or a layer. */
static int read_sel_layer(const json_t *j, int32_t *ret, struct larder_err *e)
{
    const json_t *v = json_object_get(j, "sel_layer");
    uint32_t layer = 0;
    int rc;

    *ret = -1;
    if (!v || json_is_null(v))
        return 0;
    rc = field_u32(j, "sel_layer", FIELD_REQUIRED, KV_MAX_LAYERS, &layer, e);
    if (!rc)
        *ret = (int32_t)layer;
    return rc;
}

int larder_read_entry(const json_t *j, struct larder_entry *ret, struct larder_err *e)
{
    struct larder_entry en;
    int rc;

    memset(&en, 0, sizeof en);
    if ((rc = field_hex32(j, "key", FIELD_REQUIRED, en.key, NULL, e)) ||
        (rc = copy_str(j, "name", en.name, sizeof en.name, e)) ||
        (rc = copy_str(j, "model", en.model, sizeof en.model, e)) ||
        (rc = copy_str(j, "policy", en.policy, sizeof en.policy, e)) ||
        (rc = copy_str(j, "precision", en.precision, sizeof en.precision, e)) ||
        (rc = field_u32(j, "n_ctx", FIELD_REQUIRED, UINT32_MAX, &en.n_ctx, e)) ||
        (rc = field_u32(j, "next_pos", FIELD_REQUIRED, UINT32_MAX, &en.next_pos, e)) ||
        (rc = read_sel_layer(j, &en.sel_layer, e)) ||
        (rc = field_u64(j, "full_bytes", FIELD_OPTIONAL, UINT64_MAX, &en.full_bytes, e)) ||
        (rc = field_u64(j, "image_bytes", FIELD_OPTIONAL, UINT64_MAX, &en.image_bytes, e)) ||
        (rc = field_u64(j, "stored_bytes", FIELD_OPTIONAL, UINT64_MAX, &en.stored_bytes, e)) ||
        (rc = field_u64(j, "rows_total", FIELD_OPTIONAL, UINT64_MAX, &en.rows_total, e)) ||
        (rc = field_u64(j, "created", FIELD_OPTIONAL, UINT64_MAX, &en.created, e)) ||
        (rc = field_u64(j, "prefill_ms", FIELD_OPTIONAL, UINT64_MAX, &en.prefill_ms, e)) ||
        (rc = field_u64(j, "hits", FIELD_OPTIONAL, UINT64_MAX, &en.hits, e)) ||
        (rc = copy_bool(j, "pinned", &en.pinned, e)) ||
        (rc = copy_bool(j, "damaged", &en.damaged, e)))
        return rc;
    *ret = en;
    return 0;
}
