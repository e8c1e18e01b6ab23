/* cli_eval_result.c - results of an evaluation, one JSON object a line.
 *
 * The one idea: the file only grows, by whole lines, each written at once. A result belongs
 * to a task, a canonical policy, a model and what computed it; the last one of a key counts,
 * and a line that is not a whole result (an interrupted write) is passed over. public.py
 * writes the same lines, without what only a stored entry has. */
#include "cli_eval.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "mem.h"

static const char *const identity[] = {"id", "policy", "model", "backend", "dtype", "isa"};
#define N_IDENTITY (sizeof identity / sizeof *identity)

/* What a result is kept under, to be free()d; NULL where a part is missing. */
static char *key_of(const json_t *result)
{
    json_t *parts = json_array();
    char *key = NULL;

    for (size_t i = 0; i < N_IDENTITY; i++) {
        json_t *part = json_object_get(result, identity[i]);

        if (!json_is_string(part))
            break;
        json_array_append(parts, part);
    }
    if (json_array_size(parts) == N_IDENTITY)
        key = json_dumps(parts, JSON_COMPACT);
    json_decref(parts);
    return key;
}

/* Steals the result; false: it is none. A later one of the same key takes the place. */
static bool remember(struct eval_results *r, json_t *result)
{
    char *key = key_of(result);
    bool whole = key && !json_object_set(r->by_key, key, result);

    free(key);
    json_decref(result);
    return whole;
}

static void take_lines(struct eval_results *r, const char *text, size_t len)
{
    const char *end = text + len;

    for (const char *p = text; p < end;) {
        const char *nl = memchr(p, '\n', (size_t)(end - p));
        size_t n = (size_t)((nl ? nl : end) - p);

        remember(r, json_loadb(p, n, JSON_REJECT_DUPLICATES, NULL));
        p += n + 1;
    }
    r->midline = len && text[len - 1] != '\n';
}

int eval_results_open(struct eval_results *r, const char *path, bool may_be_new,
                      struct larder_err *e)
{
    char *text = NULL;
    size_t len = 0;
    int rc = 0;

    *r = (struct eval_results){.path = path, .fd = -1, .by_key = json_object()};
    if (!r->by_key)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the results");
    if (may_be_new && access(path, F_OK) && errno == ENOENT)
        return 0;
    rc = cli_read_file(path, &text, &len, e);
    if (!rc)
        take_lines(r, text, len);
    mem_free(text);
    if (!rc && len && !json_object_size(r->by_key))
        rc = larder_fail(e, LARDER_EINVAL, "%s has lines, and none is a result of eval", path);
    return rc;
}

void eval_results_done(struct eval_results *r)
{
    if (r->by_key && r->fd >= 0)
        close(r->fd);
    json_decref(r->by_key);
    *r = (struct eval_results){.fd = -1};
}

/* One write: a reader, or an interruption, finds whole lines. */
static int write_line(struct eval_results *r, const char *line, size_t len, struct larder_err *e)
{
    ssize_t n;

    if (r->fd < 0)
        r->fd = open(r->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (r->fd < 0)
        return larder_fail(e, LARDER_EIO, "cannot open %s: %s", r->path, strerror(errno));
    do
        n = write(r->fd, line, len);
    while (n < 0 && errno == EINTR);
    if (n == (ssize_t)len)
        return 0;
    return larder_fail(e, LARDER_EIO, "cannot write to %s: %s", r->path,
                       n < 0 ? strerror(errno) : "the disk is full");
}

/* What is remembered is what was written, to the last digit: a later run says the same. */
int eval_results_add(struct eval_results *r, json_t *result, struct larder_err *e)
{
    char *json = json_dumps(result, JSON_COMPACT | JSON_REAL_PRECISION(15)), *line = NULL;
    int n = json ? asprintf(&line, "%s%s\n", r->midline ? "\n" : "", json) : -1;
    int rc = n < 0 ? larder_fail(e, LARDER_ENOMEM, "no memory for a result")
                   : write_line(r, line, (size_t)n, e);

    json_decref(result);
    if (!rc)
        r->midline = false;
    if (!rc && !remember(r, json_loads(json, 0, NULL)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for a result");
    free(json);
    if (n >= 0)
        free(line);
    return rc;
}

const json_t *eval_results_get(const struct eval_results *r, const json_t *what, const char *id,
                               const char *policy)
{
    json_t *wanted = json_copy((json_t *)(uintptr_t)what);
    const json_t *found = NULL;
    char *key;

    json_object_set_new(wanted, "id", json_string(id));
    json_object_set_new(wanted, "policy", json_string(policy));
    key = key_of(wanted);
    if (key)
        found = json_object_get(r->by_key, key);
    free(key);
    json_decref(wanted);
    return found;
}

bool eval_result_is_stored(const json_t *result)
{
    return json_is_integer(json_object_get(result, "stored_bytes"));
}

double eval_number(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);

    return json_is_number(v) ? json_number_value(v) : NAN;
}
