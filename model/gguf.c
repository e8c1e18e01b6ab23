/* gguf.c - GGUF metadata under the assumption that the file is hostile.
 *
 * The one idea: the metadata is read into one capped buffer and everything in it is
 * checked in a single pass, so that later look-ups can borrow from the buffer without
 * checks of their own. Every count is bounded by the bytes that are left before
 * anything is allocated for it. */
#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bytes.h"
#include "dequant.h"
#include "input.h"
#include "mem.h"
#include "size.h"

#define MAGIC 0x46554747u /* "GGUF" */
#define FIRST_READ (1u << 20)
#define MAX_METADATA (256u << 20) /* vocabularies of 256k tokens take about 10 MiB */
#define MAX_KEY_LEN 65535u
#define MIN_KV_BYTES 13u     /* key length, type, one byte of value */
#define MIN_TENSOR_BYTES 32u /* name length, n_dims, one dimension, type, offset */
#define MAX_ALIGNMENT (1u << 20)
#define DEFAULT_ALIGNMENT 32u

struct kv {
    struct gguf_str key;
    enum gguf_type type;
    enum gguf_type elem;  /* of an array */
    uint64_t n;           /* elements of an array, bytes of a string, else 1 */
    const uint8_t *bytes; /* value, elements or characters */
};

struct gguf {
    int fd;
    uint64_t file_bytes;
    uint8_t *buf; /* metadata */
    struct kv *kv;
    uint64_t n_kv;
    struct gguf_tensor *tensor; /* in file order */
    const struct gguf_tensor **by_name;
    uint64_t n_tensors;
};

static const uint8_t scalar_bytes[GGUF_N_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static int ends_early(struct larder_err *e)
{
    return larder_fail(e, LARDER_EMODEL, "the file ends inside its metadata");
}

/* ---- one pass over the metadata */

static struct gguf_str read_str(struct rd *r, uint64_t max)
{
    struct gguf_str s = {NULL, rd_u64(r)};

    if (s.len > max)
        r->bad = true;
    s.p = (const char *)rd_bytes(r, s.len);
    return s;
}

static int read_array(struct rd *r, struct kv *kv, struct larder_err *e)
{
    uint32_t elem = rd_u32(r);
    uint64_t n = rd_u64(r), bytes;

    if (!rd_ok(r))
        return ends_early(e);
    if (elem >= GGUF_N_TYPES || elem == GGUF_ARRAY)
        return larder_fail(e, LARDER_EMODEL, "key %.*s: array of unknown element type %u",
                           (int)kv->key.len, kv->key.p, elem);
    kv->elem = (enum gguf_type)elem;
    kv->n = n;
    kv->bytes = r->p;
    if (elem == GGUF_STRING) {
        if (n > rd_left(r) / 8)
            return ends_early(e);
        for (uint64_t i = 0; i < n; i++)
            read_str(r, MAX_METADATA);
    } else if (!size_mul(n, scalar_bytes[elem], &bytes) || !rd_bytes(r, bytes)) {
        return ends_early(e);
    }
    return rd_ok(r) ? 0 : ends_early(e);
}

static int read_kv(struct rd *r, struct kv *kv, struct larder_err *e)
{
    struct gguf_str s;
    uint32_t type;

    kv->key = read_str(r, MAX_KEY_LEN);
    type = rd_u32(r);
    if (!rd_ok(r))
        return ends_early(e);
    if (type >= GGUF_N_TYPES)
        return larder_fail(e, LARDER_EMODEL, "key %.*s: unknown value type %u", (int)kv->key.len,
                           kv->key.p, type);
    kv->type = (enum gguf_type)type;
    if (type == GGUF_ARRAY)
        return read_array(r, kv, e);
    if (type == GGUF_STRING) {
        s = read_str(r, MAX_METADATA);
        kv->n = s.len;
        kv->bytes = (const uint8_t *)s.p;
    } else {
        kv->n = 1;
        kv->bytes = rd_bytes(r, scalar_bytes[type]);
    }
    return rd_ok(r) ? 0 : ends_early(e);
}

static int compare_str(const struct gguf_str *a, const struct gguf_str *b)
{
    uint64_t n = a->len < b->len ? a->len : b->len;
    int c = n ? memcmp(a->p, b->p, (size_t)n) : 0;

    return c ? c : (a->len > b->len) - (a->len < b->len);
}

static int compare_kv(const void *a, const void *b)
{
    return compare_str(&((const struct kv *)a)->key, &((const struct kv *)b)->key);
}

static int read_kvs(struct gguf *g, struct rd *r, uint64_t n, struct larder_err *e)
{
    int rc;

    if (n > rd_left(r) / MIN_KV_BYTES)
        return ends_early(e);
    g->kv = mem_zalloc(n, sizeof *g->kv);
    if (!g->kv)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %llu keys", (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++) {
        rc = read_kv(r, &g->kv[i], e);
        if (rc)
            return rc;
    }
    g->n_kv = n;
    qsort(g->kv, (size_t)n, sizeof *g->kv, compare_kv);
    for (uint64_t i = 1; i < n; i++)
        if (!compare_kv(&g->kv[i - 1], &g->kv[i]))
            return larder_fail(e, LARDER_EMODEL, "key %.*s appears twice", (int)g->kv[i].key.len,
                               g->kv[i].key.p);
    return 0;
}

/* Bytes of the tensor from its type and dimensions. */
static int tensor_size(struct gguf_tensor *t, struct larder_err *e)
{
    const struct tensor_format *f = tensor_format(t->type);
    uint64_t n;

    if (!f)
        return larder_fail(e, LARDER_EUNSUPPORTED, "tensor %.*s: type %u is not supported",
                           (int)t->name.len, t->name.p, t->type);
    if (!t->ne[0] || t->ne[0] % f->block_len)
        return larder_fail(e, LARDER_EMODEL,
                           "tensor %.*s: rows of %llu elements do not divide into %s blocks",
                           (int)t->name.len, t->name.p, (unsigned long long)t->ne[0], f->name);
    n = t->ne[0] / f->block_len;
    if (!size_mul(n, f->block_bytes, &n) || !size_mul(n, t->ne[1], &n) ||
        !size_mul(n, t->ne[2], &n) || !size_mul(n, t->ne[3], &n) || !n)
        return larder_fail(e, LARDER_EMODEL, "tensor %.*s: its dimensions overflow or are zero",
                           (int)t->name.len, t->name.p);
    t->n_bytes = n;
    return 0;
}

static int read_tensor_info(struct rd *r, struct gguf_tensor *t, struct larder_err *e)
{
    t->name = read_str(r, MAX_KEY_LEN);
    t->n_dims = rd_u32(r);
    if (!rd_ok(r))
        return ends_early(e);
    if (!t->n_dims || t->n_dims > 4)
        return larder_fail(e, LARDER_EMODEL, "tensor %.*s: %u dimensions", (int)t->name.len,
                           t->name.p, t->n_dims);
    for (unsigned d = 0; d < 4; d++)
        t->ne[d] = d < t->n_dims ? rd_u64(r) : 1;
    t->type = rd_u32(r);
    t->offset = rd_u64(r);
    if (!rd_ok(r))
        return ends_early(e);
    return tensor_size(t, e);
}

static int compare_offset(const void *a, const void *b)
{
    const struct gguf_tensor *x = *(const struct gguf_tensor *const *)a;
    const struct gguf_tensor *y = *(const struct gguf_tensor *const *)b;

    return (x->offset > y->offset) - (x->offset < y->offset);
}

static int compare_name(const void *a, const void *b)
{
    const struct gguf_tensor *x = *(const struct gguf_tensor *const *)a;
    const struct gguf_tensor *y = *(const struct gguf_tensor *const *)b;

    return compare_str(&x->name, &y->name);
}

/* Turn offsets into file offsets; every tensor inside the file, none overlapping another. */
static int place_tensors(struct gguf *g, uint64_t data, uint64_t alignment, struct larder_err *e)
{
    uint64_t end;

    for (uint64_t i = 0; i < g->n_tensors; i++) {
        struct gguf_tensor *t = &g->tensor[i];

        if (t->offset % alignment)
            return larder_fail(e, LARDER_EMODEL, "tensor %.*s: offset is not a multiple of %llu",
                               (int)t->name.len, t->name.p, (unsigned long long)alignment);
        if (!size_add(t->offset, data, &t->offset) || !size_add(t->offset, t->n_bytes, &end) ||
            end > g->file_bytes)
            return larder_fail(e, LARDER_EMODEL,
                               "tensor %.*s: its bytes lie beyond the end of the file",
                               (int)t->name.len, t->name.p);
    }
    qsort(g->by_name, (size_t)g->n_tensors, sizeof(struct gguf_tensor *), compare_offset);
    for (uint64_t i = 1; i < g->n_tensors; i++)
        if (g->by_name[i - 1]->offset + g->by_name[i - 1]->n_bytes > g->by_name[i]->offset)
            return larder_fail(e, LARDER_EMODEL, "tensor %.*s overlaps another",
                               (int)g->by_name[i]->name.len, g->by_name[i]->name.p);
    qsort(g->by_name, (size_t)g->n_tensors, sizeof(struct gguf_tensor *), compare_name);
    for (uint64_t i = 1; i < g->n_tensors; i++)
        if (!compare_name(&g->by_name[i - 1], &g->by_name[i]))
            return larder_fail(e, LARDER_EMODEL, "tensor %.*s appears twice",
                               (int)g->by_name[i]->name.len, g->by_name[i]->name.p);
    return 0;
}

static int read_alignment(const struct gguf *g, uint64_t *ret, struct larder_err *e)
{
    uint32_t a = DEFAULT_ALIGNMENT;
    int rc = gguf_get_u32(g, "general.alignment", &a, e);

    if (rc && rc != LARDER_ENOTFOUND)
        return rc;
    if (!a || a & (a - 1) || a > MAX_ALIGNMENT)
        return larder_fail(e, LARDER_EMODEL,
                           "general.alignment is %u; must be a power of two up to %u", a,
                           MAX_ALIGNMENT);
    *ret = a;
    return 0;
}

static int read_tensors(struct gguf *g, struct rd *r, uint64_t n, struct larder_err *e)
{
    uint64_t alignment = DEFAULT_ALIGNMENT, data;
    int rc;

    if (n > rd_left(r) / MIN_TENSOR_BYTES)
        return ends_early(e);
    g->tensor = mem_zalloc(n, sizeof *g->tensor);
    g->by_name = mem_zalloc(n, sizeof *g->by_name);
    if (!g->tensor || !g->by_name)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %llu tensors", (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++) {
        rc = read_tensor_info(r, &g->tensor[i], e);
        if (rc)
            return rc;
        g->by_name[i] = &g->tensor[i];
    }
    g->n_tensors = n;
    rc = read_alignment(g, &alignment, e);
    if (rc)
        return rc;
    if (!size_align((uint64_t)(r->p - g->buf), alignment, &data))
        return ends_early(e);
    return place_tensors(g, data, alignment, e);
}

static int parse(struct gguf *g, uint64_t len, struct larder_err *e)
{
    struct rd r = rd_init(g->buf, (size_t)len);
    uint32_t magic = rd_u32(&r), version = rd_u32(&r);
    uint64_t n_tensors = rd_u64(&r), n_kv = rd_u64(&r);
    int rc;

    if (!rd_ok(&r))
        return magic == MAGIC ? ends_early(e) : larder_fail(e, LARDER_EMODEL, "not a GGUF file");
    if (magic != MAGIC)
        return larder_fail(e, LARDER_EMODEL, "not a GGUF file");
    if (version != 2 && version != 3)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "GGUF version %u; versions 2 and 3 are supported", version);
    rc = read_kvs(g, &r, n_kv, e);
    return rc ? rc : read_tensors(g, &r, n_tensors, e);
}

/* ---- the file */

static void drop_metadata(struct gguf *g)
{
    mem_free(g->kv);
    mem_free(g->tensor);
    mem_free(g->by_name);
    mem_free(g->buf);
    g->kv = NULL;
    g->tensor = NULL;
    g->by_name = NULL;
    g->buf = NULL;
    g->n_kv = g->n_tensors = 0;
}

/* The length of the metadata is not stated anywhere: read more until it parses. */
static int read_metadata(struct gguf *g, struct larder_err *e)
{
    uint64_t most = g->file_bytes < MAX_METADATA ? g->file_bytes : MAX_METADATA;
    uint64_t len = most < FIRST_READ ? most : FIRST_READ;
    int rc;

    for (;;) {
        g->buf = mem_alloc(len, 1);
        if (!g->buf)
            return larder_fail(e, LARDER_ENOMEM, "no memory for %llu bytes of metadata",
                               (unsigned long long)len);
        rc = input_read_at(g->fd, 0, len, g->buf, e);
        if (!rc)
            rc = parse(g, len, e);
        if (rc != LARDER_EMODEL || len == most)
            return rc;
        drop_metadata(g);
        len = len > most / 8 ? most : len * 8;
    }
}

int gguf_open(struct gguf **ret, const char *path, struct larder_err *e)
{
    struct gguf *g = mem_zalloc(1, sizeof *g);
    struct stat st;
    int rc;

    if (!g)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    g->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (g->fd < 0) {
        rc = larder_fail(e, LARDER_EIO, "%s", strerror(errno));
        goto fail;
    }
    if (fstat(g->fd, &st) || !S_ISREG(st.st_mode)) {
        rc = larder_fail(e, LARDER_EMODEL, "not a regular file");
        goto fail;
    }
    g->file_bytes = (uint64_t)st.st_size;
    rc = read_metadata(g, e);
    if (rc)
        goto fail;
    *ret = g;
    return 0;
fail:
    gguf_close(g);
    return rc;
}

void gguf_close(struct gguf *g)
{
    if (!g)
        return;
    drop_metadata(g);
    if (g->fd >= 0)
        close(g->fd);
    mem_free(g);
}

int gguf_fd(const struct gguf *g)
{
    return g->fd;
}

uint64_t gguf_bytes(const struct gguf *g)
{
    return g->file_bytes;
}

/* ---- look-up */

static const struct kv *find(const struct gguf *g, const char *key)
{
    struct kv want = {.key = {key, strlen(key)}};

    return g->n_kv ? bsearch(&want, g->kv, (size_t)g->n_kv, sizeof want, compare_kv) : NULL;
}

bool gguf_has(const struct gguf *g, const char *key)
{
    return find(g, key) != NULL;
}

static int wrong_type(const char *key, const char *want, struct larder_err *e)
{
    return larder_fail(e, LARDER_EMODEL, "key %s is not %s", key, want);
}

int gguf_get_u32(const struct gguf *g, const char *key, uint32_t *ret, struct larder_err *e)
{
    const struct kv *kv = find(g, key);
    struct rd r;
    uint64_t v;
    unsigned n;

    if (!kv)
        return LARDER_ENOTFOUND;
    if (kv->type == GGUF_STRING || kv->type == GGUF_ARRAY || kv->type == GGUF_F32 ||
        kv->type == GGUF_F64 || kv->type == GGUF_BOOL)
        return wrong_type(key, "an integer", e);
    n = scalar_bytes[kv->type];
    r = rd_init(kv->bytes, n);
    v = rd_uint(&r, n);
    if ((kv->type == GGUF_I8 || kv->type == GGUF_I16 || kv->type == GGUF_I32 ||
         kv->type == GGUF_I64) &&
        v >> (8 * n - 1))
        return wrong_type(key, "a count: it is negative", e);
    if (v > UINT32_MAX)
        return wrong_type(key, "a 32-bit count", e);
    *ret = (uint32_t)v;
    return 0;
}

int gguf_get_f64(const struct gguf *g, const char *key, double *ret, struct larder_err *e)
{
    const struct kv *kv = find(g, key);
    struct rd r;

    if (!kv)
        return LARDER_ENOTFOUND;
    r = rd_init(kv->bytes, 8);
    if (kv->type == GGUF_F32)
        *ret = (double)rd_f32(&r);
    else if (kv->type == GGUF_F64)
        *ret = rd_f64(&r);
    else
        return wrong_type(key, "a floating-point number", e);
    return 0;
}

int gguf_get_bool(const struct gguf *g, const char *key, bool *ret, struct larder_err *e)
{
    const struct kv *kv = find(g, key);

    if (!kv)
        return LARDER_ENOTFOUND;
    if (kv->type != GGUF_BOOL)
        return wrong_type(key, "a boolean", e);
    *ret = kv->bytes[0] != 0;
    return 0;
}

int gguf_get_str(const struct gguf *g, const char *key, struct gguf_str *ret, struct larder_err *e)
{
    const struct kv *kv = find(g, key);

    if (!kv)
        return LARDER_ENOTFOUND;
    if (kv->type != GGUF_STRING)
        return wrong_type(key, "a string", e);
    *ret = (struct gguf_str){(const char *)kv->bytes, kv->n};
    return 0;
}

int gguf_get_array(const struct gguf *g, const char *key, enum gguf_type type, uint64_t *ret_n,
                   const uint8_t **ret_bytes, struct larder_err *e)
{
    const struct kv *kv = find(g, key);

    if (!kv)
        return LARDER_ENOTFOUND;
    if (kv->type != GGUF_ARRAY || kv->elem != type)
        return wrong_type(key, "an array of the expected type", e);
    *ret_n = kv->n;
    *ret_bytes = kv->bytes;
    return 0;
}

struct gguf_str gguf_next_str(const uint8_t **at)
{
    struct rd r = rd_init(*at, 8);
    struct gguf_str s = {(const char *)*at + 8, rd_u64(&r)};

    *at += 8 + s.len;
    return s;
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name)
{
    struct gguf_tensor want = {.name = {name, strlen(name)}};
    const struct gguf_tensor *key = &want, **hit;

    if (!g->n_tensors)
        return NULL;
    hit = bsearch(&key, g->by_name, (size_t)g->n_tensors, sizeof key, compare_name);
    return hit ? *hit : NULL;
}

uint64_t gguf_n_tensors(const struct gguf *g)
{
    return g->n_tensors;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, uint64_t i)
{
    return &g->tensor[i];
}
