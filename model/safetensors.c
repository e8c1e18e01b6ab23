/* safetensors.c - the header of a safetensors file under the assumption that it is hostile.
 *
 * The one idea: JSON is left to jansson, within a cap on its length and with every name once;
 * what it says is then checked entry by entry, and places once more after sorting: each must
 * begin where the one before ended, which rules out overlaps, holes and a wrong end together. */
#include "safetensors.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "dequant.h"
#include "input.h"
#include "mem.h"
#include "size.h"

#define LENGTH_BYTES 8u
#define MAX_HEADER (16u << 20) /* a tensor takes about 120 bytes of it */
#define MAX_TENSORS (1u << 17)

struct safetensors {
    int fd;
    uint64_t file_bytes;
    json_t *header; /* owns names and types */
    struct safetensor *tensor;
    uint32_t n;
};

/* Types whose size is known: the file's layout can be checked. */
static const struct {
    const char *name;
    uint32_t bytes;
    int type; /* enum tensor_type, or -1: not computed with */
} dtypes[] = {
    {"F32", 4, TENSOR_F32}, {"F16", 2, TENSOR_F16}, {"BF16", 2, TENSOR_BF16},
    {"F64", 8, -1},         {"I64", 8, -1},         {"U64", 8, -1},
    {"I32", 4, -1},         {"U32", 4, -1},         {"I16", 2, -1},
    {"U16", 2, -1},         {"I8", 1, -1},          {"U8", 1, -1},
    {"BOOL", 1, -1},        {"F8_E4M3", 1, -1},     {"F8_E5M2", 1, -1},
};

/* ---- one entry */

static int is_wrong(struct larder_err *e, const char *name, const char *why)
{
    return larder_fail(e, LARDER_EMODEL, "tensor %.80s: %s", name, why);
}

static int read_dtype(const json_t *entry, struct safetensor *t, uint64_t *ret_bytes,
                      struct larder_err *e)
{
    t->dtype = json_string_value(json_object_get(entry, "dtype"));
    if (!t->dtype)
        return is_wrong(e, t->name, "it has no dtype");
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(dtypes[i].name, t->dtype))
            continue;
        t->format = dtypes[i].type < 0 ? NULL : tensor_format((uint32_t)dtypes[i].type);
        *ret_bytes = dtypes[i].bytes;
        return 0;
    }
    return larder_fail(e, LARDER_EUNSUPPORTED, "tensor %.80s: dtype %.20s is not supported",
                       t->name, t->dtype);
}

static bool count_of(const json_t *v, uint64_t *ret)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return false;
    *ret = (uint64_t)json_integer_value(v);
    return true;
}

/* The dimensions; *bytes comes in as those of an element. */
static int read_shape(const json_t *entry, struct safetensor *t, uint64_t *bytes,
                      struct larder_err *e)
{
    const json_t *shape = json_object_get(entry, "shape");
    size_t n = json_array_size(shape);

    if (!json_is_array(shape) || n > SAFETENSORS_MAX_DIMS)
        return is_wrong(e, t->name, "its shape is not a list of at most 8 dimensions");
    for (size_t i = 0; i < n; i++) {
        if (!count_of(json_array_get(shape, i), &t->dim[i]))
            return is_wrong(e, t->name, "a dimension is not a count");
        if (!size_mul(*bytes, t->dim[i], bytes))
            return is_wrong(e, t->name, "its dimensions overflow");
    }
    t->n_dims = (uint32_t)n;
    return 0;
}

/* data: where the tensors' bytes begin. */
static int read_place(const json_t *entry, uint64_t data, uint64_t file_bytes, uint64_t bytes,
                      struct safetensor *t, struct larder_err *e)
{
    const json_t *at = json_object_get(entry, "data_offsets");
    uint64_t begin, end;

    if (json_array_size(at) != 2 || !count_of(json_array_get(at, 0), &begin) ||
        !count_of(json_array_get(at, 1), &end))
        return is_wrong(e, t->name, "data_offsets are not two counts");
    if (end < begin || end > file_bytes - data)
        return is_wrong(e, t->name, "its bytes lie beyond the end of the file");
    if (end - begin != bytes)
        return larder_fail(e, LARDER_EMODEL, "tensor %.80s: %llu bytes for a shape that takes %llu",
                           t->name, (unsigned long long)(end - begin), (unsigned long long)bytes);
    t->offset = data + begin;
    t->n_bytes = bytes;
    return 0;
}

static int read_entry(struct safetensors *s, uint64_t data, const char *name, const json_t *entry,
                      struct larder_err *e)
{
    struct safetensor *t = &s->tensor[s->n];
    uint64_t bytes = 0;
    int rc;

    t->name = name;
    if (!json_is_object(entry) || json_object_size(entry) != 3)
        return is_wrong(e, name, "its entry does not have dtype, shape and data_offsets alone");
    rc = read_dtype(entry, t, &bytes, e);
    if (!rc)
        rc = read_shape(entry, t, &bytes, e);
    if (!rc)
        rc = read_place(entry, data, s->file_bytes, bytes, t, e);
    s->n += !rc;
    return rc;
}

/* ---- all entries */

static int compare_place(const void *a, const void *b)
{
    const struct safetensor *x = a, *y = b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes); /* empty ones first */
}

static int check_places(const struct safetensors *s, uint64_t data, struct larder_err *e)
{
    uint64_t end = data;

    for (uint32_t i = 0; i < s->n; i++) {
        if (s->tensor[i].offset < end)
            return is_wrong(e, s->tensor[i].name, "it overlaps another");
        if (s->tensor[i].offset > end)
            return is_wrong(e, s->tensor[i].name, "there are bytes before it that belong to none");
        end += s->tensor[i].n_bytes;
    }
    if (end != s->file_bytes)
        return larder_fail(e, LARDER_EMODEL, "%llu bytes at its end belong to no tensor",
                           (unsigned long long)(s->file_bytes - end));
    return 0;
}

static int read_entries(struct safetensors *s, uint64_t data, struct larder_err *e)
{
    size_t n = json_object_size(s->header);
    const char *name;
    json_t *entry;
    int rc = 0;

    if (n > MAX_TENSORS)
        return larder_fail(e, LARDER_EMODEL, "%zu tensors; at most %u", n, MAX_TENSORS);
    s->tensor = mem_zalloc(n, sizeof *s->tensor);
    if (!s->tensor)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %zu tensors", n);
    json_object_foreach (s->header, name, entry) {
        if (!rc && strcmp(name, "__metadata__"))
            rc = read_entry(s, data, name, entry, e);
    }
    if (rc)
        return rc;
    qsort(s->tensor, s->n, sizeof *s->tensor, compare_place);
    return check_places(s, data, e);
}

/* ---- the file */

static int parse(struct safetensors *s, const char *text, uint64_t len, struct larder_err *e)
{
    json_error_t why;

    s->header = json_loadb(text, (size_t)len, JSON_REJECT_DUPLICATES, &why);
    if (!s->header && json_error_code(&why) == json_error_out_of_memory)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a header of %llu bytes",
                           (unsigned long long)len);
    if (!json_is_object(s->header))
        return larder_fail(e, LARDER_EMODEL, "its header is not a JSON object: %s",
                           s->header ? "another value" : why.text);
    return read_entries(s, LENGTH_BYTES + len, e);
}

static int read_header(struct safetensors *s, struct larder_err *e)
{
    uint8_t length[LENGTH_BYTES];
    struct rd r = rd_init(length, sizeof length);
    uint64_t len;
    char *text;
    int rc;

    if (s->file_bytes < LENGTH_BYTES)
        return larder_fail(e, LARDER_EMODEL, "not a safetensors file: it ends inside its header");
    rc = input_read_at(s->fd, 0, sizeof length, length, e);
    if (rc)
        return rc;
    len = rd_u64(&r);
    if (len > MAX_HEADER)
        return larder_fail(e, LARDER_EMODEL, "a header of %llu bytes; at most %u",
                           (unsigned long long)len, MAX_HEADER);
    if (len > s->file_bytes - LENGTH_BYTES)
        return larder_fail(e, LARDER_EMODEL, "it ends inside its header");
    text = mem_alloc(len, 1);
    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a header of %llu bytes",
                           (unsigned long long)len);
    rc = input_read_at(s->fd, LENGTH_BYTES, len, text, e);
    if (!rc)
        rc = parse(s, text, len, e);
    mem_free(text);
    return rc;
}

int safetensors_open(struct safetensors **ret, int dir, const char *name, struct larder_err *e)
{
    struct safetensors *s = mem_zalloc(1, sizeof *s);
    int rc;

    if (!s)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    s->fd = -1;
    rc = input_open(dir, name, &s->fd, &s->file_bytes, e);
    if (!rc && (rc = read_header(s, e)))
        larder_fail_in(e, rc, "%.120s", name);
    if (rc) {
        safetensors_close(s);
        return rc;
    }
    *ret = s;
    return 0;
}

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    json_decref(s->header);
    mem_free(s->tensor);
    if (s->fd >= 0)
        close(s->fd);
    mem_free(s);
}

int safetensors_fd(const struct safetensors *s)
{
    return s->fd;
}

uint64_t safetensors_bytes(const struct safetensors *s)
{
    return s->file_bytes;
}

uint32_t safetensors_n(const struct safetensors *s)
{
    return s->n;
}

const struct safetensor *safetensors_at(const struct safetensors *s, uint32_t i)
{
    return &s->tensor[i];
}
