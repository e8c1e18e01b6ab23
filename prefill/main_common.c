/* main_common.c - options to a model, a backend, a document; rows kept in memory.
 *
 * The one idea: every subcommand but the worker is "open, read, compute, print", and
 * this file is the first two. Files are read whole and bounded, before anything is computed. */
#include "main_common.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mem.h"
#include "packed.h"
#include "tokenizer.h"

uint64_t peak_bytes(void)
{
    struct rusage u;

    return getrusage(RUSAGE_SELF, &u) ? 0 : (uint64_t)u.ru_maxrss * 1024;
}

/* ---- model and backend */

int setup_template(const struct model *m, const char *text, struct template **ret,
                   struct larder_err *e)
{
    return template_open(ret, text ? text : model_template_name(m), e);
}

static int open_auto(const struct backend_ops *ops, const struct model *m, struct backend_opts bo,
                     struct backend **ret, struct larder_err *e)
{
    int rc;

    bo.dtype = KV_BF16;
    rc = ops->open(ret, m, &bo, e);
    if (rc != LARDER_EBACKEND)
        return rc;
    bo.dtype = KV_F32; /* what auto means on a processor without bf16 */
    return ops->open(ret, m, &bo, e);
}

int setup_backend(const struct options *o, const struct model *m, struct backend **ret,
                  struct larder_err *e)
{
    const char *asked = option_get(o, OPTION_BACKEND), *dtype = option_get(o, OPTION_DTYPE);
    const char *name = asked ? asked : "cpu";
    const struct backend_ops *ops = backend_find(name);
    struct backend_opts bo = {.dtype = KV_F32};
    uint64_t threads = 0;
    int rc = option_number(o, OPTION_THREADS, 1024, &threads, e);

    if (rc)
        return rc;
    if (!ops)
        return larder_fail(e, LARDER_EBACKEND, "no backend is named '%.40s' here; there are %s",
                           name, backend_names());
    bo.n_threads = (uint32_t)threads;
    bo.stream = o->n[OPTION_STREAM];
    if (!dtype || !strcmp(dtype, "auto"))
        return open_auto(ops, m, bo, ret, e);
    if (strcmp(dtype, "bf16") && strcmp(dtype, "f32"))
        return main_usage(e, "--dtype takes auto, bf16 or f32, not '%.40s'", dtype);
    bo.dtype = *dtype == 'b' ? KV_BF16 : KV_F32;
    return ops->open(ret, m, &bo, e);
}

/* A profile belongs to a fingerprint, and that takes reading the model file: only where a policy
 * asks for it. A policy that does not parse is told by whoever uses it. */
static bool wants_profile(const struct options *o)
{
    struct policy p;

    for (uint32_t i = 0; i < o->n[OPTION_POLICY]; i++)
        if (!policy_parse(o->value[OPTION_POLICY][i], &p, NULL) && policy_uses_profile(&p))
            return o->n[OPTION_PROFILE];
    return false;
}

int setup_open(const struct options *o, struct engine_setup *ret, struct larder_err *e)
{
    struct engine_setup s = {0};
    int rc;

    if (o->n[OPTION_MODEL] != 1)
        return main_usage(e, "one --model is needed");
    rc = model_open(&s.model, option_get(o, OPTION_MODEL), e);
    if (!rc)
        rc = setup_template(s.model, option_get(o, OPTION_TEMPLATE), &s.tmpl, e);
    if (!rc)
        rc = setup_backend(o, s.model, &s.backend, e);
    if (!rc && wants_profile(o))
        rc = profile_read(option_get(o, OPTION_PROFILE), s.model, &s.shares, e);
    if (rc) {
        setup_done(&s);
        return rc;
    }
    *ret = s;
    return 0;
}

int setup_policy(const struct engine_setup *s, const char *text, struct policy *ret,
                 struct larder_err *e)
{
    int rc = policy_parse(text, ret, e);

    return rc ? rc : shares_name_in(s->shares, ret, e);
}

void setup_done(struct engine_setup *s)
{
    if (s->backend)
        s->backend->ops->close(s->backend);
    model_close(s->model);
    template_free(s->tmpl);
    shares_free(s->shares);
}

/* ---- files */

static int read_all(int fd, const char *path, char *buf, size_t n, struct larder_err *e)
{
    size_t at = 0;

    while (at < n) {
        ssize_t got = read(fd, buf + at, n - at);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return larder_fail(e, LARDER_EIO, "%.200s: %s", path, strerror(errno));
        if (!got)
            return larder_fail(e, LARDER_EIO, "%.200s became shorter while it was read", path);
        at += (size_t)got;
    }
    return 0;
}

int file_read(const char *path, uint64_t max, char **ret, size_t *ret_len, struct larder_err *e)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    char *buf = NULL;
    int rc;

    if (fd < 0 || fstat(fd, &st))
        rc = larder_fail(e, LARDER_EIO, "%.200s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        rc = larder_fail(e, LARDER_EINVAL, "%.200s is not a regular file", path);
    else if ((uint64_t)st.st_size > max)
        rc = larder_fail(e, LARDER_ETOOBIG, "%.200s has %lld bytes; the limit is %llu", path,
                         (long long)st.st_size, (unsigned long long)max);
    else if (!(buf = mem_alloc((uint64_t)st.st_size + 1, 1)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to read %.200s", path);
    else
        rc = read_all(fd, path, buf, (size_t)st.st_size, e);
    if (fd >= 0)
        close(fd);
    if (rc) {
        mem_free(buf);
        return rc;
    }
    buf[st.st_size] = '\0';
    *ret = buf;
    *ret_len = (size_t)st.st_size;
    return 0;
}

/* ---- documents */

static bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* Ids of a NUL-terminated text, appended to d->ids, which has room. */
static int parse_ids(const char *path, const char *s, uint32_t n_vocab, struct document *d,
                     struct larder_err *e)
{
    for (;;) {
        uint64_t id = 0;
        const char *from;
        size_t word;

        while (is_space(*s))
            s++;
        if (!*s)
            return 0;
        for (from = s; *s >= '0' && *s <= '9' && id < n_vocab; s++)
            id = id * 10 + (uint64_t)(*s - '0');
        word = strcspn(from, " \t\r\n");
        if (s == from || (*s && !is_space(*s)) || id >= n_vocab)
            return larder_fail(e, LARDER_EINVAL,
                               "%.200s: entry %u ('%.*s') is not a token id below %u", path, d->n,
                               (int)(word < 20 ? word : 20), from, n_vocab);
        d->ids[d->n++] = (uint32_t)id;
    }
}

static int document_from_ids(const struct engine_setup *s, const char *path, struct document *ret,
                             struct larder_err *e)
{
    struct document d = {0};
    char *text;
    size_t len;
    int rc = file_read(path, MAIN_MAX_DOCUMENT, &text, &len, e);

    if (rc)
        return rc;
    d.ids = mem_alloc(len / 2 + 1, sizeof *d.ids);
    rc = d.ids ? parse_ids(path, text, model_params(s->model)->n_vocab, &d, e)
               : larder_fail(e, LARDER_ENOMEM, "no memory for the ids of %.200s", path);
    mem_free(text);
    if (rc) {
        document_done(&d);
        return rc;
    }
    *ret = d;
    return 0;
}

int document_from_text(const struct engine_setup *s, const char *text, size_t len,
                       struct document *ret, struct larder_err *e)
{
    struct document d = {0};
    size_t n = 0;
    int rc;

    if (!len)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty; there is nothing to prefill");
    rc = template_document(s->tmpl, model_tokenizer(s->model), text, len, &d.ids, &n, &d.text,
                           &d.text_len, e);
    if (rc)
        return rc;
    if (n > model_params(s->model)->n_positions) {
        document_done(&d);
        return larder_fail(e, LARDER_ETOOLONG,
                           "the document has %zu tokens, the model only %u positions; split it", n,
                           model_params(s->model)->n_positions);
    }
    d.n = (uint32_t)n;
    *ret = d;
    return 0;
}

int document_read(const struct engine_setup *s, const char *text_path, const char *ids_path,
                  struct document *ret, struct larder_err *e)
{
    char *text;
    size_t len;
    int rc;

    if (ids_path)
        return document_from_ids(s, ids_path, ret, e);
    rc = file_read(text_path, MAIN_MAX_DOCUMENT, &text, &len, e);
    if (rc)
        return rc;
    rc = document_from_text(s, text, len, ret, e);
    mem_free(text);
    return rc ? larder_fail_in(e, rc, "%.200s", text_path) : 0;
}

void document_done(struct document *d)
{
    mem_free(d->ids);
    mem_free(d->text);
    *d = (struct document){0};
}
