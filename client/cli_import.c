/* cli_import.c - a file that export wrote becomes an entry again.
 *
 * The one idea: the header decides how the image is laid out, and the file's tensors are read
 * straight into their places in a memory file; the daemon checks what came. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli.h"
#include "cli_safetensors.h"
#include "mem.h"
#include "memfile.h"

struct import {
    const char *path;
    int fd;
    uint64_t data_at; /* where the tensors begin */
    json_t *meta;
    struct image_plan *plan;
};

static int read_at(const struct import *m, void *to, uint64_t n, uint64_t at, struct larder_err *e)
{
    char *p = to;

    while (n) {
        ssize_t got = pread(m->fd, p, n, (off_t)at);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return larder_fail(e, LARDER_EIO, "cannot read %.200s: %s", m->path,
                               got ? strerror(errno) : "it became shorter");
        p += got;
        n -= (uint64_t)got;
        at += (uint64_t)got;
    }
    return 0;
}

static int read_header(struct import *m, struct larder_err *e)
{
    struct stat st;
    uint8_t word[8];
    uint64_t len = 0, size;
    char *text;
    int rc;

    m->fd = open(m->path, O_RDONLY | O_CLOEXEC);
    if (m->fd < 0 || fstat(m->fd, &st))
        return larder_fail(e, LARDER_EIO, "cannot open %.200s: %s", m->path, strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size < 8)
        return larder_fail(e, LARDER_EINVAL, "%.200s is not a safetensors file", m->path);
    size = (uint64_t)st.st_size - 8;
    rc = read_at(m, word, sizeof word, 0, e);
    for (unsigned i = 0; i < 8; i++)
        len |= (uint64_t)word[i] << 8 * i;
    if (!rc && (!len || len > size || len > ST_MAX_HEADER))
        rc = larder_fail(e, LARDER_EINVAL, "%.200s: a header of %llu bytes in a file of %llu",
                         m->path, (unsigned long long)len, (unsigned long long)size);
    if (rc)
        return rc;
    text = mem_alloc(len, 1);
    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read %.200s", m->path);
    m->data_at = 8 + len;
    rc = read_at(m, text, len, 8, e);
    if (!rc)
        rc = st_parse(text, len, size - len, &m->meta, &m->plan, e);
    mem_free(text);
    return rc ? larder_fail_in(e, rc, "%.200s", m->path) : 0;
}

/* The sealed image. */
static int make_image(const struct import *m, int *ret_fd, struct larder_err *e)
{
    const struct image_plan *p = m->plan;
    const json_t *text = json_object_get(m->meta, "text");
    uint64_t at = m->data_at;
    void *map = NULL;
    int fd = -1, rc = memfile_new("larder-import", p->n_bytes, 0, &fd, &map, e);

    if (rc)
        return rc;
    image_plan_write(p, map);
    memcpy((char *)map + p->text_off, json_string_value(text), json_string_length(text));
    for (uint64_t i = 0; !rc && i < st_count(p); i++) {
        struct st_tensor t;

        st_tensor_at(p, i, &t);
        rc = read_at(m, (char *)map + t.at, t.n_bytes, at, e);
        at += t.n_bytes;
        cli_progress(m->path, at - m->data_at, p->n_bytes);
    }
    if (!rc)
        rc = memfile_seal(fd, map, p->n_bytes, p->n_bytes, e);
    else
        memfile_unmap(map, p->n_bytes);
    if (rc)
        close(fd);
    else
        *ret_fd = fd;
    return rc;
}

/* Metadata that are JSON and no string. */
static int add_value(const struct import *m, const char *key, json_t *body, struct larder_err *e)
{
    const char *text = json_string_value(json_object_get(m->meta, key));
    json_t *v = json_loads(text, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, NULL);

    if (!v)
        return larder_fail(e, LARDER_EINVAL, "%.200s: metadata %s is not JSON", m->path, key);
    json_object_set_new(body, key, v);
    return 0;
}

static int make_body(const struct cli *c, const struct import *m, json_t *body,
                     struct larder_err *e)
{
    static const char *const strings[] = {"policy",   "model",   "key",
                                          "template", "backend", "template_fingerprint"};
    static const char *const values[] = {"sel_layer", "rank_variance", "certificate", "prefill_ms"};
    const char *ns = json_string_value(json_object_get(m->meta, "namespace"));
    const char *full = json_string_value(json_object_get(m->meta, "name"));
    const char *slash = full ? strchr(full, '/') : NULL;
    int rc = 0;

    for (size_t i = 0; i < sizeof strings / sizeof strings[0]; i++)
        json_object_set(body, strings[i], json_object_get(m->meta, strings[i]));
    for (size_t i = 0; !rc && i < sizeof values / sizeof values[0]; i++)
        rc = add_value(m, values[i], body, e);
    json_object_set_new(body, "source_namespace", json_string(ns));
    json_object_set_new(body, "namespace",
                        json_string(c->opt[OPT_NAMESPACE] ? c->opt[OPT_NAMESPACE] : ns));
    if (c->opt[OPT_NAME] || slash)
        json_object_set_new(body, "name",
                            json_string(c->opt[OPT_NAME] ? c->opt[OPT_NAME] : slash + 1));
    json_object_set_new(body, "bytes", json_integer((json_int_t)m->plan->n_bytes));
    return rc;
}

static void print_answer(const struct cli *c, const json_t *answer)
{
    const json_t *en = json_object_get(answer, "entry");

    if (!cli_true(answer, "model_known"))
        fprintf(stderr,
                "larder: warning: the entry's model is not configured here; nothing here can "
                "decode from it\n");
    if (c->opt[OPT_JSON])
        cli_print_json(answer);
    else
        printf("imported\t%s\t%s\n", *cli_str(en, "name") ? cli_str(en, "name") : "-",
               cli_str(en, "key"));
}

static int send_image(struct cli *c, const struct import *m, struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_IMPORT, .fd = -1, .timeout_ms = CLI_WORK_MS};
    json_t *body = json_object(), *answer = NULL;
    int rc = make_body(c, m, body, e);

    if (!rc)
        rc = cli_connect(c, e);
    if (!rc)
        rc = make_image(m, &q.fd, e);
    if (!rc) {
        q.body = json_incref(body);
        rc = larder_ask_json(c->conn, &q, &answer, NULL, e);
    }
    cli_progress_end();
    if (!rc)
        print_answer(c, answer);
    if (q.fd >= 0)
        close(q.fd);
    json_decref(body);
    json_decref(answer);
    return rc;
}

int cli_import(struct cli *c, struct larder_err *e)
{
    struct import m = {.path = c->arg[0], .fd = -1};
    int rc = read_header(&m, e);

    if (!rc)
        rc = send_image(c, &m, e);
    if (m.fd >= 0)
        close(m.fd);
    json_decref(m.meta);
    image_plan_free(m.plan);
    return rc;
}
