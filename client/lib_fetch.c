/* lib_fetch.c - from a reference to a mapped image that can be trusted.
 *
 * The one idea: the descriptor's seals and size, then every offset and count of the image, are
 * checked before the caller sees a pointer; whatever fails, the lease is given back (or ends
 * with the broken connection) and nothing stays open. What the arrays hold is not touched: the
 * daemon has verified it before it sealed the file.
 */
#include "lib.h"

#include <string.h>
#include <unistd.h>

#include "image_layout.h"
#include "memfile.h"
#include "packed.h"

static int read_answer(const json_t *answer, struct larder_lease *l, uint64_t *ret_bytes,
                       struct larder_err *e)
{
    int rc = field_u64(answer, "lease", FIELD_REQUIRED, UINT64_MAX, &l->id, e);

    if (!rc)
        rc = field_u64(answer, "bytes", FIELD_REQUIRED, UINT64_MAX, ret_bytes, e);
    if (!rc)
        rc = larder_read_entry(json_object_get(answer, "entry"), &l->entry, e);
    if (!rc && l->fd < 0)
        rc = larder_fail(e, LARDER_EPROTO, "the image's descriptor is missing");
    return rc;
}

static int map_image(struct larder_lease *l, uint64_t n_bytes, bool packed, struct larder_err *e)
{
    const void *map = NULL;
    uint64_t n = 0;
    int rc = memfile_map_served(l->fd, n_bytes, UINT64_MAX, &map, &n, e);

    if (rc)
        return rc;
    rc = image_check_layout(map, n, &l->image, e);
    /* An image under another key would answer a question about another document. */
    if (!rc && memcmp(l->image.key, l->entry.key, sizeof l->image.key))
        rc = larder_fail(e, LARDER_EPROTO, "the image belongs to another entry");
    if (!rc && !packed && packed_type((enum kv_dtype)l->image.dtype))
        rc = larder_fail(e, LARDER_EPROTO, "the image has packed rows, which nobody asked for");
    if (rc) {
        memfile_unmap(map, n);
        memset(&l->image, 0, sizeof l->image);
    }
    return rc;
}

int larder_fetch(struct larder *c, const char *ref, int timeout_ms, struct larder_lease *ret,
                 struct larder_err *e)
{
    return larder_fetch_with(c, ref, NULL, timeout_ms, ret, e);
}

int larder_fetch_with(struct larder *c, const char *ref, const struct larder_fetch_options *o,
                      int timeout_ms, struct larder_lease *ret, struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_FETCH, .fd = -1, .timeout_ms = timeout_ms};
    struct larder_lease l = {.fd = -1};
    struct larder_err why = {0, ""};
    bool packed = o && o->packed;
    json_t *answer = NULL;
    uint64_t n_bytes = 0;
    int rc = larder_ref_body(ref, &q.body, e);

    if (!rc && packed) /* unsaid, so that a daemon of before understands the rest */
        q.body = larder_body_str(q.body, "rows", "packed");
    if (!rc)
        rc = larder_ask_json(c, &q, &answer, &l.fd, e);
    if (rc)
        return rc;
    rc = read_answer(answer, &l, &n_bytes, &why);
    if (!rc)
        rc = map_image(&l, n_bytes, packed, &why);
    json_decref(answer);
    if (!rc) {
        *ret = l;
        return 0;
    }
    if (rc == LARDER_EPROTO)
        larder_break(c, &why);
    else
        larder_release(c, &l, timeout_ms, NULL); /* nothing mapped; the daemon may drop it */
    if (l.fd >= 0)
        close(l.fd);
    if (e)
        *e = why;
    return rc;
}

int larder_release(struct larder *c, struct larder_lease *lease, int timeout_ms,
                   struct larder_err *e)
{
    uint64_t id;

    if (!lease)
        return 0;
    id = lease->id;
    memfile_unmap(lease->image.base, lease->image.n_bytes);
    if (lease->fd >= 0)
        close(lease->fd);
    memset(lease, 0, sizeof *lease);
    lease->fd = -1;
    return c ? larder_let_go(c, id, timeout_ms, e) : 0;
}
