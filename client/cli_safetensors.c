/* cli_safetensors.c - the header of a safetensors file, made and read.
 *
 * The one idea: nothing in a header is believed. Counts are read from it, the list of tensors
 * that belongs to them is generated anew, and every member must be the same. So offsets cannot
 * overlap, leave gaps or pass the end, and nothing can be missing or added. */
#include "cli_safetensors.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "mem.h"
#include "packed.h"
#include "sha256.h"

/* ---- the list of tensors */

static uint64_t n_heads_of(const struct image_plan *p)
{
    return (uint64_t)p->spec.geom.n_layers * p->spec.geom.n_kv_heads;
}

uint64_t st_count(const struct image_plan *p)
{
    return 2 + (p->spec.has_bias ? 4 : 3) * n_heads_of(p);
}

static void flat(struct st_tensor *t, const char *dtype, uint64_t n, uint64_t width, uint64_t at)
{
    t->dtype = dtype;
    t->n_dims = 1;
    t->dim[0] = n;
    t->n_bytes = n * width;
    t->at = at;
}

static void of_head(const struct image_plan *p, uint64_t head, const char *what,
                    struct st_tensor *t)
{
    uint32_t n_kv = p->spec.geom.n_kv_heads;

    snprintf(t->name, sizeof t->name, "layers.%u.heads.%u.%s", (unsigned)(head / n_kv),
             (unsigned)(head % n_kv), what);
}

static void rows_of_head(const struct image_plan *p, uint64_t i, struct st_tensor *t)
{
    const struct image_slot *s = &p->slot[i / 2];
    enum kv_dtype type = p->spec.dtype;
    uint32_t d = p->spec.geom.head_dim;
    bool v = i % 2;

    of_head(p, i / 2, v ? "v" : "k", t);
    flat(t, "U8", v ? tile_bytes_v(type, s->n_rows, d) : tile_bytes_k(type, s->n_rows, d), 1,
         v ? s->v_off : s->k_off);
    if (packed_type(type))
        return;
    t->dtype = "BF16";
    t->n_dims = 2;
    t->dim[0] = s->n_rows;
    t->dim[1] = d;
}

void st_tensor_at(const struct image_plan *p, uint64_t i, struct st_tensor *ret)
{
    uint64_t n = n_heads_of(p);

    memset(ret, 0, sizeof *ret);
    if (i < 2) {
        snprintf(ret->name, sizeof ret->name, "%s", i ? "logits" : "tokens");
        flat(ret, i ? "F32" : "U32", i ? p->spec.n_vocab : p->spec.n_ctx, 4,
             i ? p->logits_off : p->tokens_off);
        return;
    }
    i -= 2;
    if (i < n) {
        of_head(p, i, "position", ret);
        flat(ret, "U32", p->slot[i].n_rows, 4, p->slot[i].position_off);
        return;
    }
    i -= n;
    if (p->spec.has_bias && i < n) {
        of_head(p, i, "bias", ret);
        flat(ret, "F32", p->slot[i].n_rows, 4, p->slot[i].bias_off);
        return;
    }
    rows_of_head(p, p->spec.has_bias ? i - n : i, ret);
}

/* What the header says of a tensor that begins at `from`. */
static json_t *tensor_object(const struct st_tensor *t, uint64_t from)
{
    json_t *shape = t->n_dims == 2
                        ? json_pack("[I,I]", (json_int_t)t->dim[0], (json_int_t)t->dim[1])
                        : json_pack("[I]", (json_int_t)t->dim[0]);

    return json_pack("{s:s,s:o,s:[I,I]}", "dtype", t->dtype, "shape", shape, "data_offsets",
                     (json_int_t)from, (json_int_t)(from + t->n_bytes));
}

int st_plan_of(const struct larder_image *im, struct image_plan **ret, struct larder_err *e)
{
    struct image_spec s = {
        .geom = {im->n_layers, im->n_heads, im->n_kv_heads, im->head_dim},
        .dtype = (enum kv_dtype)im->dtype,
        .has_bias = im->flags & LARDER_IMAGE_HAS_BIAS,
        .renumbered = im->flags & LARDER_IMAGE_RENUMBERED,
        .n_ctx = im->n_ctx,
        .next_pos = im->next_pos,
        .n_vocab = im->n_vocab,
        .text_len = im->text_len,
    };
    uint64_t n = (uint64_t)im->n_layers * im->n_kv_heads;
    uint32_t *rows = mem_alloc(n, sizeof *rows);
    int rc;

    if (!rows)
        return larder_fail(e, LARDER_ENOMEM, "no memory to lay out a file");
    for (uint64_t i = 0; i < n; i++)
        rows[i] =
            larder_image_rows(im, (uint32_t)(i / im->n_kv_heads), (uint32_t)(i % im->n_kv_heads))
                .n_rows;
    s.rows = rows;
    rc = image_plan_new(ret, &s, im->n_bytes, e);
    mem_free(rows);
    return rc;
}

/* ---- metadata */

/* Members of an entry object that identify it: strings as they are, the rest as JSON. */
static const char *const meta_keys[] = {
    "key",
    "namespace",
    "name",
    "model",
    "policy",
    "template",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "n_vocab",
    "n_ctx",
    "next_pos",
    "sel_layer",
    "renumbered",
    "has_bias",
    "precision",
    "backend",
    "created",
    "prefill_ms",
    "certificate",
    "rank_variance",
    "model_fingerprint",
    "tokenizer_fingerprint",
    "template_fingerprint",
    "text",
};
#define N_META (sizeof meta_keys / sizeof meta_keys[0])

static json_t *as_string(const json_t *v)
{
    char *text;
    json_t *s;

    if (json_is_string(v))
        return json_incref((json_t *)(uintptr_t)v);
    text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    s = text ? json_string(text) : NULL;
    free(text);
    return s;
}

int st_metadata(const json_t *entry, json_t **ret, struct larder_err *e)
{
    json_t *meta = json_object();
    bool bad = !meta;

    for (size_t i = 0; !bad && i < N_META; i++) {
        json_t *v = json_object_get(entry, meta_keys[i]);

        if (!v && strcmp(meta_keys[i], "name")) {
            json_decref(meta);
            return larder_fail(e, LARDER_EUNSUPPORTED,
                               strcmp(meta_keys[i], "text")
                                   ? "the daemon does not tell the entry's %s"
                                   : "the entry's %s is not valid UTF-8; use --format image",
                               meta_keys[i]);
        }
        bad = v && json_object_set(meta, meta_keys[i], v);
    }
    if (bad) {
        json_decref(meta);
        return larder_fail(e, LARDER_ENOMEM, "no memory for the metadata");
    }
    *ret = meta;
    return 0;
}

/* As strings, which is all that the format has. */
static int add_metadata(const json_t *entry, json_t *header, struct larder_err *e)
{
    json_t *meta = NULL, *strings = json_object(), *v;
    const char *key;
    bool bad = json_object_set_new(header, "__metadata__", strings) ||
               json_object_set_new(strings, "format", json_string(ST_FORMAT));
    int rc = st_metadata(entry, &meta, e);

    json_object_foreach (meta, key, v)
        bad = bad || json_object_set_new(strings, key, as_string(v));
    json_decref(meta);
    return !rc && bad ? larder_fail(e, LARDER_ENOMEM, "no memory for a header") : rc;
}

static int dump_header(const json_t *header, char **ret, uint64_t *ret_len, struct larder_err *e)
{
    size_t n = json_dumpb(header, NULL, 0, JSON_COMPACT), padded = (n + 7) / 8 * 8;
    char *out;

    if (padded > ST_MAX_HEADER)
        return larder_fail(e, LARDER_ETOOBIG,
                           "the header would have %zu bytes, and readers accept %u; use --format "
                           "image",
                           padded, ST_MAX_HEADER);
    out = n ? mem_alloc(8 + padded, 1) : NULL;
    if (!out)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a header");
    for (unsigned i = 0; i < 8; i++)
        out[i] = (char)(padded >> 8 * i);
    json_dumpb(header, out + 8, n, JSON_COMPACT);
    memset(out + 8 + n, ' ', padded - n);
    *ret = out;
    *ret_len = 8 + padded;
    return 0;
}

int st_header(const struct image_plan *p, const json_t *entry, char **ret, uint64_t *ret_len,
              struct larder_err *e)
{
    json_t *header = json_object();
    uint64_t at = 0;
    int rc = header ? add_metadata(entry, header, e)
                    : larder_fail(e, LARDER_ENOMEM, "no memory for a header");

    for (uint64_t i = 0; !rc && i < st_count(p); i++) {
        struct st_tensor t;

        st_tensor_at(p, i, &t);
        if (json_object_set_new(header, t.name, tensor_object(&t, at)))
            rc = larder_fail(e, LARDER_ENOMEM, "no memory for a header");
        at += t.n_bytes;
    }
    if (!rc)
        rc = dump_header(header, ret, ret_len, e);
    json_decref(header);
    return rc;
}

/* ---- reading */

static bool known_key(const char *key)
{
    for (size_t i = 0; i < N_META; i++)
        if (!strcmp(key, meta_keys[i]))
            return true;
    return !strcmp(key, "format");
}

/* Every member known, a string, and there. */
static int check_metadata(json_t *meta, struct larder_err *e)
{
    const char *key, *format = json_string_value(json_object_get(meta, "format"));
    json_t *v;

    if (!format || strcmp(format, ST_FORMAT))
        return larder_fail(e, LARDER_EINVAL,
                           "the metadata does not say format %s: larder export "
                           "did not write this file",
                           ST_FORMAT);
    json_object_foreach (meta, key, v)
        if (!known_key(key) || !json_is_string(v))
            return larder_fail(e, LARDER_EINVAL, "unknown metadata '%.40s'", key);
    for (size_t i = 0; i < N_META; i++)
        if (!json_object_get(meta, meta_keys[i]) && strcmp(meta_keys[i], "name"))
            return larder_fail(e, LARDER_EINVAL, "the metadata has no %s", meta_keys[i]);
    return 0;
}

static int meta_u32(const json_t *meta, const char *key, uint32_t *ret, struct larder_err *e)
{
    const char *s = json_string_value(json_object_get(meta, key));
    size_t n = strspn(s, "0123456789");
    unsigned long long v = n && n <= 10 && !s[n] ? strtoull(s, NULL, 10) : UINT64_MAX;

    if (v > UINT32_MAX)
        return larder_fail(e, LARDER_EINVAL, "metadata %s = '%.20s' is no count", key, s);
    *ret = (uint32_t)v;
    return 0;
}

static int meta_flag(const json_t *meta, const char *key, bool *ret, struct larder_err *e)
{
    const char *s = json_string_value(json_object_get(meta, key));

    *ret = !strcmp(s, "true");
    return *ret || !strcmp(s, "false")
               ? 0
               : larder_fail(e, LARDER_EINVAL, "metadata %s = '%.20s' is not true or false", key,
                             s);
}

static int meta_hash(const json_t *meta, const char *key, uint8_t ret[32], struct larder_err *e)
{
    return sha256_unhex(json_string_value(json_object_get(meta, key)), ret)
               ? larder_fail(e, LARDER_EINVAL, "metadata %s is not 64 hex digits", key)
               : 0;
}

/* Packed files say by their precision which tiles they hold. */
static int read_dtype(const json_t *header, const json_t *meta, enum kv_dtype *ret,
                      struct larder_err *e)
{
    const json_t *k = json_object_get(header, "layers.0.heads.0.k");
    const char *dtype = json_string_value(json_object_get(k, "dtype"));
    const char *precision = json_string_value(json_object_get(meta, "precision"));

    *ret = KV_BF16;
    if (dtype && !strcmp(dtype, "BF16"))
        return 0;
    *ret = !strcmp(precision, "int8") ? KV_INT8 : KV_INT4;
    if (dtype && !strcmp(dtype, "U8") && (*ret == KV_INT8 || !strcmp(precision, "int4")))
        return 0;
    return larder_fail(e, LARDER_EINVAL, "layers.0.heads.0.k is neither BF16 nor a packed tile");
}

static int read_spec(const json_t *header, const json_t *meta, struct image_spec *s,
                     struct larder_err *e)
{
    int rc;

    if ((rc = meta_u32(meta, "n_layers", &s->geom.n_layers, e)) ||
        (rc = meta_u32(meta, "n_heads", &s->geom.n_heads, e)) ||
        (rc = meta_u32(meta, "n_kv_heads", &s->geom.n_kv_heads, e)) ||
        (rc = meta_u32(meta, "head_dim", &s->geom.head_dim, e)) ||
        (rc = meta_u32(meta, "n_ctx", &s->n_ctx, e)) ||
        (rc = meta_u32(meta, "next_pos", &s->next_pos, e)) ||
        (rc = meta_u32(meta, "n_vocab", &s->n_vocab, e)) ||
        (rc = meta_flag(meta, "has_bias", &s->has_bias, e)) ||
        (rc = meta_flag(meta, "renumbered", &s->renumbered, e)) ||
        (rc = meta_hash(meta, "key", s->key, e)) ||
        (rc = meta_hash(meta, "model_fingerprint", s->model_fingerprint, e)) ||
        (rc = meta_hash(meta, "tokenizer_fingerprint", s->tokenizer_fingerprint, e)) ||
        (rc = read_dtype(header, meta, &s->dtype, e)) || (rc = kv_geom_check(&s->geom, e)))
        return rc;
    s->text_len = json_string_length(json_object_get(meta, "text"));
    return 0;
}

static int read_rows(const json_t *header, const struct image_spec *s, uint32_t *rows,
                     struct larder_err *e)
{
    for (uint64_t i = 0; i < (uint64_t)s->geom.n_layers * s->geom.n_kv_heads; i++) {
        char name[64];
        const json_t *n;

        snprintf(name, sizeof name, "layers.%u.heads.%u.position",
                 (unsigned)(i / s->geom.n_kv_heads), (unsigned)(i % s->geom.n_kv_heads));
        n = json_array_get(json_object_get(json_object_get(header, name), "shape"), 0);
        if (!json_is_integer(n) || json_integer_value(n) < 0 || json_integer_value(n) > s->n_ctx)
            return larder_fail(e, LARDER_EINVAL, "tensor %s is missing or has no count of rows",
                               name);
        rows[i] = (uint32_t)json_integer_value(n);
    }
    return 0;
}

/* Every tensor is the one that the plan asks for, and there is no other. */
static int compare(const json_t *header, const struct image_plan *p, uint64_t data_bytes,
                   struct larder_err *e)
{
    uint64_t at = 0;

    for (uint64_t i = 0; i < st_count(p); i++) {
        struct st_tensor t;
        json_t *want;
        const json_t *have;
        int same;

        st_tensor_at(p, i, &t);
        have = json_object_get(header, t.name);
        want = tensor_object(&t, at);
        same = json_equal(want, have);
        json_decref(want);
        if (!want)
            return larder_fail(e, LARDER_ENOMEM, "no memory to check a header");
        if (!same)
            return larder_fail(e, LARDER_EINVAL,
                               have ? "tensor %s has another type, shape or place than export gives"
                                    : "tensor %s is missing",
                               t.name);
        at += t.n_bytes;
    }
    if (json_object_size(header) != st_count(p) + 1)
        return larder_fail(e, LARDER_EINVAL, "there are tensors that export does not write");
    if (at != data_bytes)
        return larder_fail(e, LARDER_EINVAL, "the tensors take %llu bytes, the file has %llu",
                           (unsigned long long)at, (unsigned long long)data_bytes);
    return 0;
}

static int plan(const json_t *header, json_t *meta, uint64_t data_bytes, struct image_plan **ret,
                struct larder_err *e)
{
    struct image_spec s = {.n_ctx = 0};
    struct image_plan *p = NULL;
    uint32_t *rows = NULL;
    int rc = check_metadata(meta, e);

    if (!rc)
        rc = read_spec(header, meta, &s, e);
    if (!rc && !(rows = mem_alloc((uint64_t)s.geom.n_layers * s.geom.n_kv_heads, sizeof *rows)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to read a header");
    if (!rc)
        rc = read_rows(header, &s, rows, e);
    s.rows = rows;
    if (!rc)
        rc = image_plan_new(&p, &s, UINT64_MAX / 2, e);
    if (!rc)
        rc = compare(header, p, data_bytes, e);
    mem_free(rows);
    if (rc)
        image_plan_free(p);
    else
        *ret = p;
    return rc;
}

int st_parse(const char *text, uint64_t len, uint64_t data_bytes, json_t **ret_meta,
             struct image_plan **ret, struct larder_err *e)
{
    json_t *header = NULL, *meta;
    int rc;

    if (len > ST_MAX_HEADER)
        return larder_fail(e, LARDER_ETOOBIG, "a header of %llu bytes; the limit is %u",
                           (unsigned long long)len, ST_MAX_HEADER);
    rc = frame_parse_json(text, len, &header, e);
    if (rc)
        return rc == LARDER_ENOMEM ? rc : larder_fail_in(e, LARDER_EINVAL, "header");
    meta = json_object_get(header, "__metadata__");
    rc = plan(header, meta, data_bytes, ret, e);
    if (!rc)
        *ret_meta = json_incref(meta);
    json_decref(header);
    return rc;
}
