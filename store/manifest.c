/* manifest.c - one table of fields written and read in the same order, then a SHA-256. */
#include "manifest.h"

#include <string.h>

#include "bytes.h"
#include "mem.h"
#include "packed.h"
#include "sha256.h"
#include "size.h"

#define MAGIC 0x4d44524cu /* "LRDM" */
#define VERSION 1u
#define FLAG_BIAS 1u
#define FLAG_RENUMBERED 2u
#define FIXED_BYTES 512u /* more than all fixed fields together */
#define EXTENT_BYTES (1 + 1 + 2 + 4 + 4 + EXTENT_HASH_LEN)
#define N_STRINGS 5

static uint64_t payload_of(const struct manifest *m)
{
    const struct store_info *in = &m->info;
    uint64_t n = (uint64_t)in->geom.n_layers * in->geom.n_kv_heads, sum = 0;

    for (uint64_t i = 0; i < n; i++)
        sum += tile_bytes_k(in->precision, m->rows[i], in->geom.head_dim) +
               tile_bytes_v(in->precision, m->rows[i], in->geom.head_dim) +
               (in->has_bias ? 2ull * m->rows[i] : 0);
    return sum;
}

/* ---- encoding */

static void put_string(struct wr *w, const char *s)
{
    size_t n = strlen(s);

    if (n > MANIFEST_MAX_STRING) {
        w->bad = true;
        return;
    }
    wr_u16(w, (uint16_t)n);
    wr_bytes(w, s, n);
}

static void put_fixed(struct wr *w, const struct manifest *m)
{
    const struct store_info *in = &m->info;

    wr_u32(w, MAGIC);
    wr_u32(w, VERSION);
    wr_u64(w, m->entry_id);
    wr_bytes(w, in->key, STORE_KEY_LEN);
    wr_bytes(w, in->ident.model_fp, 32);
    wr_bytes(w, in->ident.tokenizer_fp, 32);
    wr_bytes(w, in->ident.template_fp, 32);
    wr_u32(w, in->geom.n_layers);
    wr_u32(w, in->geom.n_heads);
    wr_u32(w, in->geom.n_kv_heads);
    wr_u32(w, in->geom.head_dim);
    wr_u32(w, in->precision);
    wr_u32(w, (in->has_bias ? FLAG_BIAS : 0) | (in->renumbered ? FLAG_RENUMBERED : 0));
    wr_u32(w, in->n_ctx);
    wr_u32(w, in->next_pos);
    wr_u32(w, in->n_vocab);
    wr_u32(w, (uint32_t)in->sel_layer);
    wr_u64(w, in->created);
    wr_u64(w, in->prefill_ms);
    wr_u64(w, m->aux.text);
    wr_u64(w, m->aux.positions);
    wr_u64(w, m->aux.extra);
}

int manifest_encode(const struct manifest *m, void **ret, size_t *ret_len, struct larder_err *e)
{
    const struct store_info *in = &m->info;
    uint64_t n_rows = (uint64_t)in->geom.n_layers * in->geom.n_kv_heads;
    uint64_t cap = FIXED_BYTES + N_STRINGS * (2 + MANIFEST_MAX_STRING) + 4 * n_rows +
                   (uint64_t)m->n_extents * EXTENT_BYTES + SHA256_LEN;
    uint8_t *buf = mem_alloc(cap, 1), digest[SHA256_LEN];
    struct wr w = wr_init(buf, cap);

    if (!buf)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a manifest");
    put_fixed(&w, m);
    put_string(&w, in->ident.ns);
    put_string(&w, in->ident.policy);
    put_string(&w, in->model);
    put_string(&w, in->tmpl);
    put_string(&w, in->backend);
    for (uint64_t i = 0; i < n_rows; i++)
        wr_u32(&w, m->rows[i]);
    wr_u32(&w, m->n_extents);
    for (uint32_t i = 0; i < m->n_extents; i++) {
        const struct extent *x = &m->extent[i];

        wr_u8(&w, (uint8_t)x->stream);
        wr_u8(&w, (uint8_t)x->codec);
        wr_u16(&w, 0);
        wr_u32(&w, x->raw_len);
        wr_u32(&w, x->stored_len);
        wr_bytes(&w, x->hash, EXTENT_HASH_LEN);
    }
    if (wr_ok(&w)) {
        sha256_of(buf, (size_t)(w.p - buf), digest);
        wr_bytes(&w, digest, SHA256_LEN);
    }
    if (!wr_ok(&w)) {
        mem_free(buf);
        return larder_fail(e, LARDER_EINVAL, "a string of the entry is longer than %u bytes",
                           MANIFEST_MAX_STRING);
    }
    *ret = buf;
    *ret_len = (size_t)(w.p - buf);
    return 0;
}

/* ---- decoding */

static int damaged(struct larder_err *e, const char *what)
{
    return larder_fail(e, LARDER_EDAMAGED, "manifest: %s", what);
}

static void get_bytes(struct rd *r, uint8_t *out, size_t n)
{
    const uint8_t *p = rd_bytes(r, n);

    if (p)
        memcpy(out, p, n);
}

static int get_fixed(struct rd *r, struct manifest *m, struct larder_err *e)
{
    struct store_info *in = &m->info;
    uint32_t flags, precision;

    if (rd_u32(r) != MAGIC)
        return damaged(e, "wrong magic");
    if (rd_u32(r) != VERSION)
        return larder_fail(e, LARDER_EVERSION,
                           "manifest: written by another version of the format");
    m->entry_id = rd_u64(r);
    get_bytes(r, in->key, STORE_KEY_LEN);
    get_bytes(r, in->ident.model_fp, 32);
    get_bytes(r, in->ident.tokenizer_fp, 32);
    get_bytes(r, in->ident.template_fp, 32);
    in->geom.n_layers = rd_u32(r);
    in->geom.n_heads = rd_u32(r);
    in->geom.n_kv_heads = rd_u32(r);
    in->geom.head_dim = rd_u32(r);
    precision = rd_u32(r);
    flags = rd_u32(r);
    in->n_ctx = rd_u32(r);
    in->next_pos = rd_u32(r);
    in->n_vocab = rd_u32(r);
    in->sel_layer = (int32_t)rd_u32(r);
    in->created = rd_u64(r);
    in->prefill_ms = rd_u64(r);
    m->aux.text = in->text_len = rd_u64(r);
    m->aux.positions = rd_u64(r);
    m->aux.extra = rd_u64(r);
    if (!rd_ok(r))
        return damaged(e, "too short");
    if (kv_geom_check(&in->geom, e))
        return larder_fail_in(e, LARDER_EDAMAGED, "manifest");
    if ((precision != KV_BF16 && precision != KV_INT8 && precision != KV_INT4) ||
        flags > (FLAG_BIAS | FLAG_RENUMBERED) || !in->n_ctx || in->n_ctx > KV_MAX_CTX ||
        in->n_vocab > KV_MAX_VOCAB || in->sel_layer < -1 || m->aux.text > MANIFEST_MAX_AUX ||
        in->sel_layer >= (int32_t)in->geom.n_layers || m->aux.positions > MANIFEST_MAX_AUX ||
        m->aux.extra > MANIFEST_MAX_AUX)
        return damaged(e, "a field is out of range");
    in->precision = (enum kv_dtype)precision;
    in->has_bias = flags & FLAG_BIAS;
    in->renumbered = flags & FLAG_RENUMBERED;
    m->aux.tokens = 4ull * in->n_ctx;
    m->aux.logits = 2ull * in->n_vocab;
    return 0;
}

static int get_strings(struct rd *r, struct manifest *m, struct larder_err *e)
{
    struct store_info *in = &m->info;
    const char **to[N_STRINGS] = {&in->ident.ns, &in->ident.policy, &in->model, &in->tmpl,
                                  &in->backend};
    char *out;

    m->mem = out = mem_alloc(N_STRINGS, MANIFEST_MAX_STRING + 1);
    if (!out)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a manifest");
    for (int i = 0; i < N_STRINGS; i++) {
        uint16_t n = rd_u16(r);
        const uint8_t *p = rd_bytes(r, n);

        if (!p || n > MANIFEST_MAX_STRING || memchr(p, 0, n))
            return damaged(e, "a string is out of range");
        memcpy(out, p, n);
        out[n] = '\0';
        *to[i] = out;
        out += n + 1;
    }
    return 0;
}

static int get_rows(struct rd *r, struct manifest *m, struct larder_err *e)
{
    uint64_t n = (uint64_t)m->info.geom.n_layers * m->info.geom.n_kv_heads;

    if (n > rd_left(r) / 4)
        return damaged(e, "too short");
    m->rows = mem_alloc(n, sizeof *m->rows);
    if (!m->rows)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a manifest");
    for (uint64_t i = 0; i < n; i++) {
        m->rows[i] = rd_u32(r);
        if (m->rows[i] > m->info.n_ctx)
            return damaged(e, "more rows than tokens");
    }
    m->info.rows = m->rows;
    m->payload_bytes = m->info.raw_bytes = payload_of(m);
    return 0;
}

/* Extents: rows first, then aux, each stream cut into full extents and a last one. */
static int get_extents(struct rd *r, struct manifest *m, struct larder_err *e)
{
    uint64_t left[2] = {m->payload_bytes, 0};
    const struct aux_layout *a = &m->aux;

    left[STREAM_AUX] = a->tokens + a->text + a->positions + a->logits + a->extra;
    m->n_extents = rd_u32(r);
    if (m->n_extents > MANIFEST_MAX_EXTENTS || m->n_extents > rd_left(r) / EXTENT_BYTES)
        return damaged(e, "too many extents");
    m->extent = mem_zalloc(m->n_extents, sizeof *m->extent);
    if (!m->extent)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a manifest");
    for (uint32_t i = 0; i < m->n_extents; i++) {
        struct extent *x = &m->extent[i];
        uint8_t stream = rd_u8(r), codec = rd_u8(r);
        uint64_t want;

        if (rd_u16(r) || stream > STREAM_AUX || codec >= CODEC_COUNT ||
            (stream == STREAM_ROWS && i != m->n_row_extents))
            return damaged(e, "an extent is out of range");
        want = left[stream] < EXTENT_RAW_MAX ? left[stream] : EXTENT_RAW_MAX;
        x->stream = (enum stream)stream;
        x->codec = (enum codec_kind)codec;
        x->raw_len = rd_u32(r);
        x->stored_len = rd_u32(r);
        get_bytes(r, x->hash, EXTENT_HASH_LEN);
        if (!want || x->raw_len != want || x->stored_len > EXTENT_STORED_MAX)
            return damaged(e, "an extent has a wrong size");
        left[stream] -= want;
        m->n_row_extents += stream == STREAM_ROWS;
        m->info.stored_bytes += x->stored_len;
    }
    if (left[0] || left[1])
        return damaged(e, "extents are missing");
    return rd_ok(r) && !rd_left(r) ? 0 : damaged(e, "wrong length");
}

int manifest_decode(const void *bytes, size_t len, struct manifest *ret, struct larder_err *e)
{
    struct manifest m = {0};
    uint8_t digest[SHA256_LEN];
    struct rd r;
    int rc;

    if (len < SHA256_LEN || len > MANIFEST_MAX)
        return damaged(e, "wrong length");
    sha256_of(bytes, len - SHA256_LEN, digest);
    if (memcmp(digest, (const uint8_t *)bytes + len - SHA256_LEN, SHA256_LEN))
        return damaged(e, "its SHA-256 does not match");
    r = rd_init(bytes, len - SHA256_LEN);
    rc = get_fixed(&r, &m, e);
    if (!rc)
        rc = get_strings(&r, &m, e);
    if (!rc)
        rc = get_rows(&r, &m, e);
    if (!rc)
        rc = get_extents(&r, &m, e);
    if (rc) {
        manifest_done(&m);
        return rc;
    }
    m.info.stored_bytes += len;
    m.info.ident.n_tokens = m.info.n_ctx;
    *ret = m;
    return 0;
}

void manifest_done(struct manifest *m)
{
    mem_free(m->mem);
    mem_free(m->rows);
    mem_free(m->extent);
    *m = (struct manifest){0};
}
