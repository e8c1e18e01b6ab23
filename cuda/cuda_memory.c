/* cuda_memory.c - device memory: rooms, and buffers that are in two places.
 *
 * The one idea: a caller knows a buffer by its host address, as with every backend. A buffer that
 * came from buffer_new() has a twin on the device, and a copy is made only when the side that is
 * about to read is not valid; a buffer that did not is copied in and out around each step. What a
 * staging buffer is given leaves at once, on a lane of its own, and looking at it waits. */
#include "cuda.h"

#include <string.h>

#include "mem.h"

int cuda_check(struct cuda_backend *b, int rc, const char *step, struct larder_err *e)
{
    if (!rc)
        return 0;
    return larder_fail(e, LARDER_EBACKEND, "CUDA device %.60s failed at %s: %.120s (%d)",
                       b->info.name, step, b->d->text(rc), rc);
}

static unsigned long long mib(uint64_t bytes)
{
    return (unsigned long long)((bytes + (1 << 20) - 1) >> 20);
}

int cuda_alloc(struct cuda_backend *b, uint64_t bytes, const char *what, void **ret,
               struct larder_err *e)
{
    uint64_t left = 0;
    int rc = b->d->alloc(b->device, bytes ? bytes : 1, ret);

    if (rc && rc != CUDA_OUT_OF_MEMORY)
        return cuda_check(b, rc, "an allocation", e);
    if (rc) {
        b->d->free_bytes(b->device, &left);
        return larder_fail(e, LARDER_ENOMEM,
                           "no device memory for %s: %llu MiB asked for, %llu MiB of %llu MiB free "
                           "on %.60s (%llu MiB in use here); shorten the document, or free the "
                           "device",
                           what, mib(bytes), mib(left), mib(b->info.total), b->info.name,
                           mib(b->used));
    }
    b->used += bytes;
    if (b->used > b->peak)
        b->peak = b->used;
    return 0;
}

void cuda_release(struct cuda_backend *b, void *p, uint64_t bytes)
{
    if (!p)
        return;
    b->d->release(b->device, p);
    b->used -= bytes;
}

int cuda_room(struct cuda_backend *b, enum cuda_room r, uint64_t bytes, void **ret,
              struct larder_err *e)
{
    int rc = 0;

    if (!b->room[r] || b->room_bytes[r] < bytes) {
        cuda_release(b, b->room[r], b->room_bytes[r]);
        b->room[r] = NULL;
        b->room_bytes[r] = 0;
        rc = cuda_alloc(b, bytes, "workspace", &b->room[r], e);
        if (!rc)
            b->room_bytes[r] = bytes;
    }
    if (!rc)
        *ret = b->room[r];
    return rc;
}

static int send(struct cuda_backend *b, void *to, const void *from, uint64_t bytes,
                struct larder_err *e)
{
    return cuda_check(b, b->d->copy(b->device, to, from, bytes, CUDA_TO_DEVICE, CUDA_COMPUTE),
                      "a copy to the device", e);
}

/* A runtime that reads pageable memory directly may still read it when the copy returns. */
static int sent(struct cuda_backend *b, struct larder_err *e)
{
    return cuda_check(b, b->d->sync(b->device, CUDA_COMPUTE), "a copy to the device", e);
}

int cuda_up(struct cuda_backend *b, void *to, const void *from, uint64_t bytes,
            struct larder_err *e)
{
    int rc = send(b, to, from, bytes, e);

    return rc ? rc : sent(b, e);
}

int cuda_down(struct cuda_backend *b, void *to, const void *from, uint64_t bytes,
              struct larder_err *e)
{
    int rc = b->d->copy(b->device, to, from, bytes, CUDA_TO_HOST, CUDA_COMPUTE);

    if (!rc)
        rc = b->d->sync(b->device, CUDA_COMPUTE);
    return cuda_check(b, rc, "a copy from the device", e);
}

/* ---- twins */

struct cuda_twin *cuda_twin_of(struct cuda_backend *b, const void *p)
{
    const uint8_t *at = p;

    for (struct cuda_twin *t = b->twins; t; t = t->next)
        if (at >= t->host && at < t->host + t->bytes)
            return t;
    return NULL;
}

static uint8_t *staging_new(struct cuda_backend *b, uint64_t count, uint64_t size)
{
    void *p = NULL;

    uint64_t bytes = count * size;

    if (size && count > UINT64_MAX / size)
        return NULL;
    if (b->d->pin(b->device, bytes ? bytes : 1, &p))
        return NULL;
    return memset(p, 0, bytes);
}

void *cuda_buffer_new(struct backend *base, uint64_t count, uint64_t size, bool staging)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_twin *t = mem_zalloc(1, sizeof *t);

    if (t)
        t->host = staging ? staging_new(b, count, size) : mem_aligned(count, size);
    if (!t || !t->host) {
        mem_free(t);
        return NULL;
    }
    t->staging = staging;
    t->bytes = count * size;
    t->on_host = t->blank = true;
    t->next = b->twins;
    b->twins = t;
    return t->host;
}

void cuda_buffer_free(struct backend *base, void *p)
{
    struct cuda_backend *b = cuda_of(base);

    for (struct cuda_twin **at = &b->twins; p && *at; at = &(*at)->next) {
        struct cuda_twin *t = *at;

        if (t->host != p)
            continue;
        *at = t->next;
        cuda_release(b, t->device, t->bytes);
        if (t->staging)
            b->d->unpin(b->device, t->host);
        else
            mem_free(t->host);
        mem_free(t);
        return;
    }
}

/* What leaves is there. */
static int arrived(struct cuda_backend *b, struct cuda_twin *t, struct larder_err *e)
{
    int rc = cuda_check(b, b->d->sync_mark(b->device, CUDA_MARK_LEFT), "waiting for rows", e);

    t->on_host = !rc;
    t->leaving = rc != 0;
    return rc;
}

int cuda_buffer_view(struct backend *base, const void *p, enum backend_view how,
                     struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_twin *t = cuda_twin_of(b, p);
    int rc = 0;

    if (!t)
        return 0;
    if (t->leaving)
        rc = arrived(b, t, e);
    else if (!t->on_host)
        rc = cuda_down(b, t->host, t->device, t->bytes, e);
    if (rc)
        return rc;
    t->on_host = true;
    if (how == VIEW_WRITE)
        t->on_device = t->blank = false;
    return 0;
}

static int to_device(struct cuda_backend *b, struct cuda_twin *t, struct larder_err *e)
{
    void *device = t->device;
    int rc = device ? 0 : cuda_alloc(b, t->bytes, "the rows of a layer", &device, e);

    if (rc)
        return rc;
    t->device = device;
    if (t->on_device)
        return 0;
    if (t->leaving) { /* it left from elsewhere on the device */
        rc = arrived(b, t, e);
        if (rc)
            return rc;
    }
    if (t->blank)
        rc = cuda_check(b, b->d->zero(b->device, device, t->bytes, CUDA_COMPUTE), "clearing", e);
    else
        rc = cuda_up(b, device, t->host, t->bytes, e);
    t->on_device = !rc;
    return rc;
}

void cuda_taken(const struct cuda_backend *b, struct cuda_twin *t)
{
    t->on_host = t->blank = t->leaving = false;
    if (b->poison) /* all ones: NaN in f32 and in bf16 */
        memset(t->host, 0xff, t->bytes);
}

int cuda_twin_find(struct cuda_backend *b, const void *p, bool writes, uint8_t **ret,
                   struct larder_err *e)
{
    struct cuda_twin *t = cuda_twin_of(b, p);
    int rc = 0;

    *ret = NULL;
    if (!t)
        return 0;
    rc = to_device(b, t, e);
    if (rc)
        return rc;
    *ret = t->device + ((const uint8_t *)p - t->host);
    if (writes)
        cuda_taken(b, t);
    return 0;
}

int cuda_twin_need(struct cuda_backend *b, const void *p, uint8_t **ret, struct larder_err *e)
{
    int rc = cuda_twin_find(b, p, false, ret, e);

    return rc || *ret ? rc
                      : larder_fail(e, LARDER_EBACKEND,
                                    "backend cuda: kept rows are not where they were chosen");
}

/* ---- what calls write */

int cuda_target(struct cuda_backend *b, void *p, enum cuda_room room, uint64_t bytes, uint8_t **ret,
                struct larder_err *e)
{
    struct cuda_twin *t = cuda_twin_of(b, p);
    void *device = t ? t->device : NULL;
    int rc = 0;

    if (!t)
        rc = cuda_room(b, room, bytes, &device, e);
    else if (!device)
        rc = cuda_alloc(b, t->bytes, "what is kept of a layer", &device, e);
    if (!rc && t && t->leaving) /* what was there before has not left */
        rc = cuda_check(b, b->d->wait(b->device, CUDA_MARK_LEFT, CUDA_COMPUTE), "waiting", e);
    if (t)
        t->device = device;
    if (rc)
        return rc;
    *ret = device;
    if (t) {
        *ret += (uint8_t *)p - t->host;
        t->on_device = true;
        cuda_taken(b, t);
    }
    return 0;
}

int cuda_leave(struct cuda_backend *b, struct cuda_twin *t, void *to, const void *device,
               uint64_t bytes, struct larder_err *e)
{
    int rc = b->d->mark(b->device, CUDA_MARK_CHOSEN, CUDA_COMPUTE);

    if (!rc)
        rc = b->d->wait(b->device, CUDA_MARK_CHOSEN, CUDA_LEAVE);
    if (!rc)
        rc = b->d->copy(b->device, to, device, bytes, CUDA_TO_HOST, CUDA_LEAVE);
    if (!rc)
        rc = b->d->mark(b->device, CUDA_MARK_LEFT, CUDA_LEAVE);
    t->leaving = !rc;
    return cuda_check(b, rc, "sending rows to the host", e);
}

int cuda_deliver(struct cuda_backend *b, void *p, const void *device, uint64_t bytes,
                 struct larder_err *e)
{
    struct cuda_twin *t = cuda_twin_of(b, p);

    if (!t)
        return cuda_down(b, p, device, bytes, e);
    return t->staging ? cuda_leave(b, t, p, device, bytes, e) : 0;
}

int cuda_source(struct cuda_backend *b, const void *p, enum cuda_room room, uint64_t bytes,
                bool writes, uint8_t **ret, struct larder_err *e)
{
    void *to = NULL;
    int rc = cuda_twin_find(b, p, writes, ret, e);

    if (rc || *ret)
        return rc;
    rc = cuda_room(b, room, bytes, &to, e);
    *ret = to;
    return rc ? rc : cuda_up(b, to, p, bytes, e);
}

void cuda_memory_close(struct cuda_backend *b)
{
    while (b->holds)
        cuda_hold_end(&b->base, b->holds->rows);
    while (b->twins)
        cuda_buffer_free(&b->base, b->twins->host);
    for (int i = 0; i < CUDA_ROOMS; i++)
        cuda_release(b, b->room[i], b->room_bytes[i]);
}

/* ---- rows of callers */

static uint64_t row_bytes(const struct cuda_backend *b)
{
    return b->base.p->geom.head_dim * b->elem;
}

int cuda_rows_out(struct cuda_backend *b, void *p, enum cuda_room room, uint32_t heads,
                  uint64_t stride, uint32_t n, struct cuda_rows *ret, struct larder_err *e)
{
    void *to = NULL;
    int rc = cuda_twin_find(b, p, true, &ret->device, e);

    ret->stride = stride;
    ret->copied = !rc && !ret->device;
    if (!ret->copied)
        return rc;
    ret->stride = n;
    rc = cuda_room(b, room, (uint64_t)heads * n * row_bytes(b), &to, e);
    ret->device = to;
    return rc;
}

int cuda_rows_in(struct cuda_backend *b, const void *p, enum cuda_room room, uint32_t heads,
                 uint64_t stride, uint32_t n, struct cuda_rows *ret, struct larder_err *e)
{
    uint64_t row = row_bytes(b);
    void *to = NULL;
    int rc = cuda_twin_find(b, p, false, &ret->device, e);

    ret->stride = stride;
    ret->copied = !rc && !ret->device;
    if (!ret->copied)
        return rc;
    ret->stride = n;
    rc = cuda_room(b, room, (uint64_t)heads * n * row, &to, e);
    ret->device = to;
    for (uint64_t h = 0; h < heads && !rc; h++)
        rc = send(b, ret->device + h * n * row, (const uint8_t *)p + h * stride * row, n * row, e);
    return rc ? rc : sent(b, e);
}

int cuda_rows_back(struct cuda_backend *b, void *p, const struct cuda_rows *r, uint32_t heads,
                   uint64_t stride, uint32_t n, struct larder_err *e)
{
    uint64_t row = row_bytes(b);
    int rc = 0;

    for (uint64_t h = 0; h < heads && r->copied && !rc; h++)
        rc = cuda_down(b, (uint8_t *)p + h * stride * row, r->device + h * r->stride * row, n * row,
                       e);
    return rc;
}
