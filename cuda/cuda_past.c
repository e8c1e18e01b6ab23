/* cuda_past.c - stored rows of backend `cuda`: on the device as they are stored, with a table of
 * where.
 *
 * The one idea: nothing is expanded. Rows that a session reads at every step are sent once: those
 * of a layer, which an image has in one piece, on the copy lane while the layer before computes.
 * Other rows are sent for one call. Rows in memory that has a copy on the device are not sent. */
#include "cuda.h"

#include <string.h>

#include "mem.h"
#include "packed.h"

#define ALIGN 256u /* of each array: what kernels copy in pieces of 16 bytes begins at one */

/* Arrays on their way to `memory`, which is where they would be when it is NULL. */
struct sending {
    uint8_t *memory;
    uint64_t at;
    enum cuda_lane lane;
};

static int send_array(struct cuda_backend *b, struct sending *s, const void *from, uint64_t bytes,
                      const void **ret, struct larder_err *e)
{
    uint8_t *to = NULL;
    int rc = from && bytes ? cuda_twin_find(b, from, false, &to, e) : 0;

    *ret = to;
    if (rc || to || !from || !bytes)
        return rc;
    if (s->memory) {
        *ret = s->memory + s->at;
        rc = cuda_check(
            b, b->d->copy(b->device, s->memory + s->at, from, bytes, CUDA_TO_DEVICE, s->lane),
            "a copy of stored rows", e);
    }
    s->at += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return rc;
}

static int send_head(struct cuda_backend *b, struct sending *s, const struct past_rows *p,
                     struct cuda_past *ret, struct larder_err *e)
{
    uint32_t n = p->n_rows, d = b->base.p->geom.head_dim;
    const void *k, *v, *bias, *position;
    int rc = send_array(b, s, p->k, tile_bytes_k(p->dtype, n, d), &k, e);

    if (!rc)
        rc = send_array(b, s, p->v, tile_bytes_v(p->dtype, n, d), &v, e);
    if (!rc)
        rc = send_array(b, s, p->bias, n * sizeof *p->bias, &bias, e);
    if (!rc)
        rc = send_array(b, s, p->position, n * sizeof *p->position, &position, e);
    if (rc)
        return rc;
    *ret = (struct cuda_past){
        .k.at = k, .v.at = v, .bias = bias, .position = position, .n_rows = n, .dtype = p->dtype};
    if (packed_type(p->dtype)) {
        struct packed_parts pk = packed_parts_k(p->dtype, n, d);
        struct packed_parts pv = packed_parts_v(p->dtype, n, d);

        ret->n_exact = pk.n_exact;
        ret->k.scales = pk.scales;
        ret->k.codes = pk.codes;
        ret->v.scales = pv.scales;
        ret->v.codes = pv.codes;
    }
    return 0;
}

static int send_heads(struct cuda_backend *b, struct sending *s, const struct past_rows *p,
                      uint32_t n, struct cuda_past *ret, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t h = 0; h < n && !rc; h++)
        rc = send_head(b, s, &p[h], &ret[h], e);
    return rc;
}

/* ---- for one call */

static int send_once(struct cuda_backend *b, const struct past_rows *past, struct cuda_past **ret,
                     struct larder_err *e)
{
    uint32_t n = b->base.p->geom.n_kv_heads;
    struct cuda_past table[KV_MAX_HEADS];
    struct sending s = {.lane = CUDA_COMPUTE};
    void *memory = NULL, *to = NULL;
    int rc = send_heads(b, &s, past, n, table, e);

    if (!rc)
        rc = cuda_room(b, ROOM_PAST, s.at, &memory, e);
    if (!rc)
        rc = cuda_room(b, ROOM_PAST_TABLE, n * sizeof *table, &to, e);
    s = (struct sending){memory, 0, CUDA_COMPUTE};
    if (!rc)
        rc = send_heads(b, &s, past, n, table, e);
    if (!rc)
        rc = cuda_up(b, to, table, n * sizeof *table, e);
    *ret = to;
    return rc;
}

/* ---- for a session */

static struct cuda_hold *hold_of(struct cuda_backend *b, const struct past_rows *past)
{
    const struct kv_geom *g = &b->base.p->geom;

    for (struct cuda_hold *h = b->holds; h; h = h->next)
        if (past >= h->rows && past < h->rows + (uint64_t)g->n_layers * g->n_kv_heads)
            return h;
    return NULL;
}

/* A point of the copy lane behind the held rows of a layer. Sessions share it: what was recorded
 * later comes later. */
static uint32_t mark_held(uint32_t layer)
{
    return CUDA_MARK_HELD + layer;
}

static int send_layer(struct cuda_backend *b, struct cuda_hold *h, struct larder_err *e)
{
    uint32_t n = b->base.p->geom.n_kv_heads, first = h->n_sent * n;
    struct sending s = {h->memory, h->at, CUDA_COPY};
    int rc = send_heads(b, &s, h->rows + first, n, h->host + first, e);

    if (!rc)
        rc = cuda_check(b,
                        b->d->copy(b->device, h->device + first, h->host + first,
                                   n * sizeof *h->host, CUDA_TO_DEVICE, CUDA_COPY),
                        "a copy of stored rows", e);
    if (!rc)
        rc = cuda_check(b, b->d->mark(b->device, mark_held(h->n_sent), CUDA_COPY), "marking", e);
    if (rc)
        return rc;
    h->at = s.at;
    h->n_sent++;
    return 0;
}

static void hold_free(struct cuda_backend *b, struct cuda_hold *h)
{
    const struct kv_geom *g = &b->base.p->geom;

    /* nothing reads the caller's rows any more; a device that fails here fails again */
    b->d->sync(b->device, CUDA_COPY);
    cuda_release(b, h->memory, h->bytes);
    cuda_release(b, h->device, (uint64_t)g->n_layers * g->n_kv_heads * sizeof *h->device);
    mem_free(h->host);
    mem_free(h);
}

static int hold_new(struct cuda_backend *b, const struct past_rows *past, struct cuda_hold **ret,
                    struct larder_err *e)
{
    const struct kv_geom *g = &b->base.p->geom;
    uint32_t n = g->n_layers * g->n_kv_heads;
    struct cuda_hold *h = mem_zalloc(1, sizeof *h);
    struct sending s = {0};
    void *memory = NULL, *table = NULL;
    int rc = 0;

    if (h)
        h->host = mem_zalloc(n, sizeof *h->host);
    if (!h || !h->host) {
        mem_free(h);
        return larder_fail(e, LARDER_ENOMEM, "no memory for the list of rows");
    }
    h->rows = past;
    h->n_users = 1;
    rc = send_heads(b, &s, past, n, h->host, e);
    if (!rc)
        rc = cuda_alloc(b, s.at, "stored rows", &memory, e);
    h->memory = memory;
    h->bytes = s.at;
    if (!rc)
        rc = cuda_alloc(b, n * sizeof *h->device, "a table of stored rows", &table, e);
    h->device = table;
    if (!rc)
        rc = send_layer(b, h, e);
    if (rc) {
        hold_free(b, h);
        return rc;
    }
    *ret = h;
    return 0;
}

int cuda_hold(struct backend *base, const struct past_rows *past, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_hold *h = hold_of(b, past);
    int rc;

    if (h && h->rows == past) {
        h->n_users++;
        return 0;
    }
    rc = hold_new(b, past, &h, e);
    if (rc)
        return rc;
    h->next = b->holds;
    b->holds = h;
    return 0;
}

void cuda_hold_end(struct backend *base, const struct past_rows *past)
{
    struct cuda_backend *b = cuda_of(base);

    for (struct cuda_hold **at = &b->holds; *at; at = &(*at)->next) {
        struct cuda_hold *h = *at;

        if (h->rows != past)
            continue;
        if (--h->n_users)
            return;
        *at = h->next;
        hold_free(b, h);
        return;
    }
}

uint64_t cuda_held(const struct cuda_backend *b)
{
    const struct kv_geom *g = &b->base.p->geom;
    uint64_t bytes = 0;

    for (const struct cuda_hold *h = b->holds; h; h = h->next)
        bytes += h->bytes + (uint64_t)g->n_layers * g->n_kv_heads * sizeof *h->device;
    return bytes;
}

static uint32_t layer_of(const struct cuda_backend *b, const struct cuda_hold *h,
                         const struct past_rows *past)
{
    return (uint32_t)(past - h->rows) / b->base.p->geom.n_kv_heads;
}

int cuda_past_find(struct cuda_backend *b, const struct past_rows *past, struct cuda_past **ret,
                   struct larder_err *e)
{
    struct cuda_hold *h = hold_of(b, past);
    uint32_t layer = h ? layer_of(b, h, past) : 0;
    int rc = 0;

    if (!h)
        return send_once(b, past, ret, e);
    while (h->n_sent <= layer && !rc)
        rc = send_layer(b, h, e);
    if (!rc)
        rc = cuda_check(b, b->d->wait(b->device, mark_held(layer), CUDA_COMPUTE), "waiting", e);
    *ret = h->device + (past - h->rows);
    return rc;
}

int cuda_past_ahead(struct cuda_backend *b, const struct past_rows *past, struct larder_err *e)
{
    struct cuda_hold *h = hold_of(b, past);

    if (!h || h->n_sent == b->base.p->geom.n_layers || h->n_sent > layer_of(b, h, past) + 1)
        return 0;
    return send_layer(b, h, e);
}
