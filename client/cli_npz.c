/* cli_npz.c - NumPy arrays of an image, one after the other into a stored zip archive.
 *
 * The one idea: an array is a function that pours its elements into a sink. It is called twice, by
 * a sink that computes the CRC, which a zip member's header begins with, and by one that writes;
 * so nothing larger than a buffer is held, and standard output need not be seekable.
 * Source of the array format: numpy.lib.format, version 1.0. */
#include "cli_npz.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "cli_file.h"
#include "cli_safetensors.h"
#include "cli_zip.h"
#include "half.h"

#define NPZ_FORMAT "larder-hf-npz-1"
#define NPY_ALIGN 64u

/* ---- where elements go */

struct sink {
    struct cli_file *f; /* NULL: only the CRC is wanted */
    uint32_t crc;
    size_t fill;
    int rc;
    struct larder_err *e;
    uint8_t buf[1 << 16];
};

static void drain(struct sink *s)
{
    if (s->f && !s->rc)
        s->rc = cli_file_write(s->f, s->buf, s->fill, s->e);
    if (!s->f)
        s->crc = (uint32_t)crc32_z(s->crc, s->buf, s->fill);
    s->fill = 0;
}

static void pour(struct sink *s, const void *p, uint64_t n)
{
    const uint8_t *at = p;

    while (n) {
        size_t room = sizeof s->buf - s->fill, some = n < room ? (size_t)n : room;

        memcpy(s->buf + s->fill, at, some);
        s->fill += some;
        at += some;
        n -= some;
        if (s->fill == sizeof s->buf)
            drain(s);
    }
}

static void pour_f32(struct sink *s, float f)
{
    pour(s, &f, sizeof f);
}

static void pour_i64(struct sink *s, int64_t v)
{
    pour(s, &v, sizeof v);
}

/* ---- what the arrays hold */

struct npz {
    const struct larder_image *im;
    char *metadata;
};

static uint32_t most_rows(const struct larder_image *im, uint32_t layer)
{
    uint32_t most = 0;

    for (uint32_t g = 0; g < im->n_kv_heads; g++) {
        uint32_t n = larder_image_rows(im, layer, g).n_rows;

        most = n > most ? n : most;
    }
    return most;
}

/* Not all rows of the layer's arrays are there, or not all count alike. */
static bool has_bias(const struct larder_image *im, uint32_t layer)
{
    uint32_t most = most_rows(im, layer);

    for (uint32_t g = 0; g < im->n_kv_heads; g++)
        if (larder_image_rows(im, layer, g).n_rows < most)
            return true;
    return im->flags & LARDER_IMAGE_HAS_BIAS;
}

static void pour_metadata(struct sink *s, const struct npz *z, uint32_t layer)
{
    (void)layer;
    pour(s, z->metadata, strlen(z->metadata));
}

static void pour_tokens(struct sink *s, const struct npz *z, uint32_t layer)
{
    (void)layer;
    for (uint32_t i = 0; i < z->im->n_ctx; i++)
        pour_i64(s, larder_image_tokens(z->im)[i]);
}

static void pour_logits(struct sink *s, const struct npz *z, uint32_t layer)
{
    (void)layer;
    pour(s, larder_image_logits(z->im), 4ull * z->im->n_vocab);
}

static void pour_rows(struct sink *s, const struct npz *z, uint32_t layer, bool v)
{
    uint64_t d = z->im->head_dim, most = most_rows(z->im, layer);

    for (uint32_t g = 0; g < z->im->n_kv_heads; g++) {
        struct larder_rows r = larder_image_rows(z->im, layer, g);
        const uint16_t *x = v ? r.v : r.k;

        for (uint64_t i = 0; i < most * d; i++)
            pour_f32(s, i < r.n_rows * d ? bf16_to_f32(x[i]) : 0);
    }
}

static void pour_keys(struct sink *s, const struct npz *z, uint32_t layer)
{
    pour_rows(s, z, layer, false);
}

static void pour_values(struct sink *s, const struct npz *z, uint32_t layer)
{
    pour_rows(s, z, layer, true);
}

static void pour_positions(struct sink *s, const struct npz *z, uint32_t layer)
{
    uint32_t most = most_rows(z->im, layer);

    for (uint32_t g = 0; g < z->im->n_kv_heads; g++) {
        struct larder_rows r = larder_image_rows(z->im, layer, g);

        for (uint32_t i = 0; i < most; i++)
            pour_i64(s, i < r.n_rows ? (int64_t)r.position[i] : -1);
    }
}

static void pour_biases(struct sink *s, const struct npz *z, uint32_t layer)
{
    uint32_t most = most_rows(z->im, layer);

    for (uint32_t g = 0; g < z->im->n_kv_heads; g++) {
        struct larder_rows r = larder_image_rows(z->im, layer, g);

        for (uint32_t i = 0; i < most; i++)
            pour_f32(s, i >= r.n_rows ? -INFINITY : r.bias ? r.bias[i] : 0);
    }
}

/* ---- an array as a file */

struct array {
    char name[32];
    char type[24]; /* NumPy's spelling */
    uint64_t item; /* bytes */
    unsigned n_dims;
    uint64_t dim[4];
    uint32_t layer;
    void (*pour)(struct sink *s, const struct npz *z, uint32_t layer);
    char header[256]; /* as the file begins */
    unsigned header_len;
};

static uint64_t array_bytes(const struct array *a)
{
    uint64_t n = a->item;

    for (unsigned i = 0; i < a->n_dims; i++)
        n *= a->dim[i];
    return a->header_len + n;
}

/* Magic, version, a length of two bytes, and a dictionary filled up with spaces. */
static void make_header(struct array *a)
{
    char shape[96] = "";
    unsigned len;
    int n = 0;

    for (unsigned i = 0; i < a->n_dims; i++)
        n += snprintf(shape + n, sizeof shape - (size_t)n, "%s%llu%s", i ? ", " : "",
                      (unsigned long long)a->dim[i], a->n_dims == 1 ? "," : "");
    n = snprintf(a->header + 10, sizeof a->header - 10,
                 "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", a->type, shape);
    len = (10 + (unsigned)n + 1 + NPY_ALIGN - 1) / NPY_ALIGN * NPY_ALIGN;
    memcpy(a->header, "\x93NUMPY\x01\x00", 8);
    a->header[8] = (char)((len - 10) & 255);
    a->header[9] = (char)((len - 10) >> 8);
    memset(a->header + 10 + n, ' ', len - 10 - (unsigned)n);
    a->header[len - 1] = '\n';
    a->header_len = len;
}

static void pour_array(struct sink *s, const struct npz *z, const struct array *a)
{
    pour(s, a->header, a->header_len);
    a->pour(s, z, a->layer);
    drain(s);
}

/* Arrays in the order of the file: i is below n_arrays(). Some have no place: false. */
#define OF_ENTRY 3u
#define OF_LAYER 4u

static uint32_t n_arrays(const struct larder_image *im)
{
    return OF_ENTRY + OF_LAYER * im->n_layers;
}

static void of_entry(const struct npz *z, uint32_t i, struct array *a)
{
    static const char *const names[OF_ENTRY] = {"metadata", "tokens", "logits"};

    snprintf(a->name, sizeof a->name, "%s.npy", names[i]);
    if (!i) { /* one string, in UTF-8 */
        a->item = strlen(z->metadata);
        snprintf(a->type, sizeof a->type, "|S%llu", (unsigned long long)a->item);
        a->pour = pour_metadata;
        return;
    }
    a->item = i == 1 ? 8 : 4;
    snprintf(a->type, sizeof a->type, i == 1 ? "<i8" : "<f4");
    a->n_dims = 1;
    a->dim[0] = i == 1 ? z->im->n_ctx : z->im->n_vocab;
    a->pour = i == 1 ? pour_tokens : pour_logits;
}

static void of_layer(const struct npz *z, uint32_t what, struct array *a)
{
    static const struct {
        const char *name, *type;
        unsigned item, n_dims;
        void (*pour)(struct sink *s, const struct npz *z, uint32_t layer);
    } kinds[OF_LAYER] = {{"key", "<f4", 4, 4, pour_keys},
                         {"value", "<f4", 4, 4, pour_values},
                         {"position", "<i8", 8, 2, pour_positions},
                         {"bias", "<f4", 4, 4, pour_biases}};
    uint64_t rows = most_rows(z->im, a->layer), heads = z->im->n_kv_heads;
    bool flat = kinds[what].n_dims == 2, bias = kinds[what].pour == pour_biases;

    snprintf(a->name, sizeof a->name, "%s.%u.npy", kinds[what].name, a->layer);
    snprintf(a->type, sizeof a->type, "%s", kinds[what].type);
    a->item = kinds[what].item;
    a->n_dims = kinds[what].n_dims;
    a->dim[0] = flat ? heads : 1;
    a->dim[1] = flat ? rows : heads;
    a->dim[2] = bias ? 1 : rows;
    a->dim[3] = bias ? rows : z->im->head_dim;
    a->pour = kinds[what].pour;
}

static bool array_at(const struct npz *z, uint32_t i, struct array *a)
{
    memset(a, 0, sizeof *a);
    if (i < OF_ENTRY) {
        of_entry(z, i, a);
    } else {
        a->layer = (i - OF_ENTRY) / OF_LAYER;
        of_layer(z, (i - OF_ENTRY) % OF_LAYER, a);
        if (a->pour == pour_biases && !has_bias(z->im, a->layer))
            return false;
    }
    make_header(a);
    return true;
}

/* ---- the archive */

static int write_array(struct cli_zip *zip, const struct npz *z, const struct array *a,
                       struct larder_err *e)
{
    static struct sink s; /* as large as its buffer; one thread */
    int rc;

    s = (struct sink){.f = NULL};
    pour_array(&s, z, a);
    rc = cli_zip_begin(zip, a->name, array_bytes(a), s.crc, e);
    if (rc)
        return rc;
    s.f = zip->f;
    s.e = e;
    pour_array(&s, z, a);
    return s.rc;
}

static int write_archive(const struct export *x, const struct npz *z, struct larder_err *e)
{
    struct cli_file f;
    struct cli_zip zip = {.f = &f};
    struct array a;
    uint64_t sum = 0;
    int rc;

    for (uint32_t i = 0; i < n_arrays(z->im); i++)
        sum += array_at(z, i, &a) ? array_bytes(&a) : 0;
    rc = cli_file_open(&f, x->path, x->force, sum, e);
    if (rc)
        return rc;
    for (uint32_t i = 0; !rc && i < n_arrays(z->im); i++)
        if (array_at(z, i, &a))
            rc = write_array(&zip, z, &a, e);
    if (!rc)
        rc = cli_zip_end(&zip, e);
    cli_zip_free(&zip);
    return cli_file_close(&f, rc, e);
}

int cli_npz_write(const struct export *x, struct larder_err *e)
{
    struct npz z = {.im = x->image};
    json_t *meta = NULL;
    int rc;

    if (z.im->dtype != LARDER_ROWS_BF16)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "hf-npz holds numbers, not packed tiles; leave "
                           "--packed out");
    rc = st_metadata(x->entry, &meta, e);
    if (rc)
        return rc;
    json_object_set_new(meta, "format", json_string(NPZ_FORMAT));
    z.metadata = json_dumps(meta, JSON_COMPACT);
    json_decref(meta);
    if (!z.metadata)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the metadata");
    if (strlen(z.metadata) > INT_MAX)
        rc = larder_fail(e, LARDER_ETOOBIG, "the metadata, with the text, pass NumPy's 2 GiB");
    else
        rc = write_archive(x, &z, e);
    free(z.metadata);
    return rc;
}
