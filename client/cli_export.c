/* cli_export.c - an entry as a file: its image, or its rows as tensors or arrays.
 *
 * The one idea: a file is written straight from the mapped image; only the header of a
 * safetensors file is made in memory. */
#include "cli_export.h"

#include <string.h>

#include "cli_file.h"
#include "cli_npz.h"
#include "cli_safetensors.h"
#include "mem.h"
#include "sha256.h"

static int write_image(const struct export *x, struct larder_err *e)
{
    struct cli_file f;
    int rc = cli_file_open(&f, x->path, x->force, x->image->n_bytes, e);

    if (rc)
        return rc;
    rc = cli_file_write(&f, x->image->base, x->image->n_bytes, e);
    return cli_file_close(&f, rc, e);
}

static int write_tensors(const struct export *x, const struct image_plan *p, const char *header,
                         uint64_t header_len, struct larder_err *e)
{
    struct cli_file f;
    struct st_tensor t;
    int rc = cli_file_open(&f, x->path, x->force, x->image->n_bytes, e);

    if (rc)
        return rc;
    rc = cli_file_write(&f, header, header_len, e);
    for (uint64_t i = 0; !rc && i < st_count(p); i++) {
        st_tensor_at(p, i, &t);
        rc = cli_file_write(&f, x->image->base + t.at, t.n_bytes, e);
    }
    return cli_file_close(&f, rc, e);
}

static int write_safetensors(const struct export *x, struct larder_err *e)
{
    struct image_plan *p = NULL;
    char *header = NULL;
    uint64_t len = 0;
    int rc = st_plan_of(x->image, &p, e);

    if (!rc)
        rc = st_header(p, x->entry, &header, &len, e);
    if (!rc)
        rc = write_tensors(x, p, header, len, e);
    image_plan_free(p);
    mem_free(header);
    return rc;
}

/* ---- the command */

static const struct {
    const char *name;
    int (*write)(const struct export *x, struct larder_err *e);
} formats[] = {
    {"safetensors", write_safetensors}, {"hf-npz", cli_npz_write}, {"image", write_image}};

static int show(struct cli *c, json_t **ret, struct larder_err *e)
{
    json_t *body = NULL;
    int rc = larder_ref_body(c->arg[0], &body, e);

    if (rc)
        return rc;
    body = larder_body_bool(body, "text", true);
    rc = cli_ask_daemon(c, FRAME_SHOW, body, CLI_WORK_MS, ret, e);
    return cli_hint_namespace(rc, c->arg[0], e);
}

int cli_export(struct cli *c, struct larder_err *e)
{
    const char *format = c->opt[OPT_FORMAT] ? c->opt[OPT_FORMAT] : "safetensors";
    struct larder_fetch_options o = {.packed = c->opt[OPT_PACKED] != NULL};
    struct export x = {.path = c->opt[OPT_OUTPUT], .force = c->opt[OPT_FORCE] != NULL};
    struct larder_lease l = {.fd = -1};
    json_t *answer = NULL;
    size_t i = 0;
    int rc;

    while (i < sizeof formats / sizeof formats[0] && strcmp(format, formats[i].name))
        i++;
    if (i == sizeof formats / sizeof formats[0])
        return cli_usage(e, "--format is safetensors, hf-npz or image, not '%.40s'", format);
    if (!x.path)
        return cli_usage(e, "export needs --output FILE ('-': standard output)");
    rc = show(c, &answer, e);
    if (rc)
        return rc;
    x.entry = json_object_get(answer, "entry");
    /* by its key, so that both answers are about one entry */
    rc = larder_fetch_with(c->conn, cli_str(x.entry, "key"), &o, CLI_WORK_MS, &l, e);
    if (!rc) {
        x.image = &l.image;
        rc = formats[i].write(&x, e);
        larder_release(c->conn, &l, CLI_SOON_MS, NULL);
    }
    json_decref(answer);
    return rc;
}
