/* model.c - a model as a table of places in files, whatever their format.
 *
 * The one idea: everything that could change the computation is checked at open, so
 * that a model which opens can be run; weights are then read slice by slice. Some files store Q
 * and K rows for interleaved RoPE; readers get them in rotate-half order. */
#include "model.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "dequant.h"
#include "input.h"
#include "mem.h"
#include "model_file.h"
#include "template.h"
#include "tokenizer.h"

#define READ_CHUNK (1u << 20) /* bytes of file per pread: fits L2 beside its result */

/* ---- life */

void model_set_template(struct model *m, const char *text, size_t len)
{
    const char *name = template_recognise(text, len);

    if (name)
        m->template_name = name;
}

static bool is_directory(const char *path)
{
    struct stat st;

    return !stat(path, &st) && S_ISDIR(st.st_mode);
}

/* What was opened must be what its id says: a fingerprint may be taken over by that id. */
static int open_as_is(struct model *m, const char *path, struct larder_err *e)
{
    struct path_id after;
    int rc;

    if (!path_id_get(path, &m->id))
        return larder_fail(e, LARDER_EIO, "%s", strerror(errno));
    rc = m->format->open(m, path, e);
    if (!rc && !(path_id_get(path, &after) && path_id_same(&m->id, &after)))
        rc = larder_fail(e, LARDER_EIO, "the model changed while it was opened; try again");
    return rc;
}

int model_open(struct model **ret, const char *path, struct larder_err *e)
{
    struct model *m = mem_zalloc(1, sizeof *m);
    int rc;

    if (!m)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    m->format = is_directory(path) ? &model_format_hf : &model_format_gguf;
    m->template_name = "plain";
    rc = open_as_is(m, path, e);
    if (rc) {
        larder_fail_in(e, rc, "%.200s", path);
        model_close(m);
        return rc;
    }
    *ret = m;
    return 0;
}

void model_close(struct model *m)
{
    if (!m)
        return;
    m->format->close(m);
    tokenizer_free(m->tok);
    mem_free(m->layer);
    mem_free(m->freq);
    mem_free(m->sliding);
    mem_free(m->name);
    mem_free(m);
}

const struct model_params *model_params(const struct model *m)
{
    return &m->p;
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    return m->tok;
}

const char *model_template_name(const struct model *m)
{
    return m->template_name;
}

bool model_is_end(const struct model *m, uint32_t id)
{
    for (uint32_t i = 0; i < m->n_ends; i++)
        if (m->end[i] == id)
            return true;
    return false;
}

/* ---- identity */

struct path_id model_path_id(const struct model *m)
{
    return m->id;
}

int model_hash_file(int fd, uint64_t bytes, struct sha256 *s, struct larder_err *e)
{
    uint8_t *buf = mem_alloc(READ_CHUNK, 1);
    int rc = buf ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to hash a file");

    for (uint64_t at = 0; at < bytes && !rc; at += READ_CHUNK) {
        uint64_t n = bytes - at < READ_CHUNK ? bytes - at : READ_CHUNK;

        rc = input_read_at(fd, at, n, buf, e);
        if (!rc)
            sha256_add(s, buf, (size_t)n);
    }
    mem_free(buf);
    return rc;
}

int model_fingerprint(struct model *m, uint8_t ret[32], struct larder_err *e)
{
    if (!m->has_fingerprint) {
        struct sha256 *s = sha256_new();
        int rc = s ? m->format->hash(m, s, e) : larder_fail(e, LARDER_ENOMEM, "no memory");

        if (!rc)
            sha256_get(s, m->fingerprint);
        sha256_free(s);
        if (rc)
            return larder_fail_in(e, rc, "fingerprint of the model");
        m->has_fingerprint = true;
    }
    memcpy(ret, m->fingerprint, 32);
    return 0;
}

void model_fingerprint_known(struct model *m, const uint8_t fp[32])
{
    memcpy(m->fingerprint, fp, 32);
    m->has_fingerprint = true;
}

/* ---- weights */

static const struct stored_weight *weight_of(const struct model *m, uint32_t layer,
                                             enum model_weight w)
{
    switch (w) {
    case MODEL_EMBED:
        return &m->embed;
    case MODEL_OUT_NORM:
        return &m->out_norm;
    case MODEL_HEAD:
        return &m->head;
    default:
        return &m->layer[layer][w];
    }
}

/* Row r of the rotate-half order, as the file numbers it. Interleaved storage puts
 * element pair (i, i + d/2) of a head at its rows 2i and 2i + 1. */
static uint32_t file_row(const struct model *m, const struct stored_weight *t, uint32_t r)
{
    uint32_t d = m->p.geom.head_dim, in_head = r % d;

    if (!t->paired)
        return r;
    return r - in_head + 2 * (in_head % (d / 2)) + in_head / (d / 2);
}

/* Where rows go: as stored, f32, or through a scratch row to bf16. */
struct sink {
    uint8_t *stored;
    float *f32;
    uint16_t *bf16;
    float *scratch; /* one row, with bf16 only */
};

static void give_row(const struct stored_weight *t, const uint8_t *src, struct sink *to)
{
    if (to->stored) {
        memcpy(to->stored, src, t->row_bytes);
        to->stored += t->row_bytes;
        return;
    }
    t->format->to_f32(src, t->cols / t->format->block_len, to->f32 ? to->f32 : to->scratch);
    if (to->f32) {
        to->f32 += t->cols;
    } else {
        dequant_round_bf16(to->scratch, t->cols, to->bf16);
        to->bf16 += t->cols;
    }
}

/* Rows [row0, row0 + n), all inside file rows [base, base + span) that one read brings. */
static int read_span(const struct model *m, const struct stored_weight *t, uint32_t base,
                     uint32_t span, uint32_t row0, uint32_t n, uint8_t *raw, struct sink *to,
                     struct larder_err *e)
{
    int rc = input_read_at(t->fd, t->offset + base * t->row_bytes, span * t->row_bytes, raw, e);

    for (uint32_t i = 0; !rc && i < n; i++)
        give_row(t, raw + (file_row(m, t, row0 + i) - base) * t->row_bytes, to);
    return rc;
}

static int read_rows(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                     uint32_t n, struct sink *to, struct larder_err *e)
{
    const struct stored_weight *t = weight_of(m, layer, w);
    /* rows that are out of order are read by whole heads */
    uint32_t unit = t->paired ? m->p.geom.head_dim : 1;
    uint32_t step = READ_CHUNK / t->row_bytes > unit
                        ? (uint32_t)(READ_CHUNK / t->row_bytes) / unit * unit
                        : unit;
    uint8_t *raw;
    int rc = 0;

    if ((uint64_t)row0 + n > t->rows)
        return larder_fail(e, LARDER_EINVAL, "rows %u to %u of %u", row0, row0 + n, t->rows);
    raw = mem_alloc(step, t->row_bytes);
    if (!raw)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read weights");
    while (!rc && n) {
        uint32_t base = row0 / unit * unit, left = t->rows - base;
        uint32_t span = left < step ? left : step;
        uint32_t take = base + span - row0 < n ? base + span - row0 : n;

        if (unit == 1)
            span = take;
        rc = read_span(m, t, base, span, row0, take, raw, to, e);
        row0 += take;
        n -= take;
    }
    mem_free(raw);
    return rc;
}

int model_read_f32(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                   uint32_t n, float *dst, struct larder_err *e)
{
    struct sink to = {.f32 = dst};

    return read_rows(m, layer, w, row0, n, &to, e);
}

const struct tensor_format *model_weight_format(const struct model *m, uint32_t layer,
                                                enum model_weight w)
{
    return weight_of(m, layer, w)->format;
}

int model_read_stored(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                      uint32_t n, uint8_t *dst, struct larder_err *e)
{
    struct sink to = {.stored = dst};

    return read_rows(m, layer, w, row0, n, &to, e);
}

int model_read_bf16(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                    uint32_t n, uint16_t *dst, struct larder_err *e)
{
    struct sink to = {.bf16 = dst};
    uint32_t rows, cols;
    int rc;

    model_weight_shape(m, w, &rows, &cols);
    to.scratch = mem_alloc(cols, sizeof *to.scratch);
    if (!to.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read weights");
    rc = read_rows(m, layer, w, row0, n, &to, e);
    mem_free(to.scratch);
    return rc;
}
