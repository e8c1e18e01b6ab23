/* put.c - writing an entry: layers stream in, one commit makes it visible.
 *
 * The one idea: rows are cut into 1 MiB extents as they arrive, coded, and written in
 * transactions of their own under an entry id nobody refers to yet. The last
 * transaction adds the manifest and everything that points to it; until then a crash
 * leaves orphans that the next start sweeps away. */
#include <string.h>
#include <time.h>

#include "bytes.h"
#include "half.h"
#include "mem.h"
#include "packed.h"
#include "sha256.h"
#include "size.h"
#include "store_int.h"

#define BATCH_BYTES (4u << 20) /* coded extents per transaction: one fsync each */

struct staged {
    uint8_t *bytes;
    uint32_t len, index;
};

struct buffer {
    uint8_t *p;
    uint64_t len, cap;
};

struct store_put {
    struct store *s;
    struct codec *codec;
    struct manifest m;
    uint32_t next_layer;
    uint32_t cap_extents;
    uint8_t *raw; /* the extent being filled */
    uint32_t fill;
    struct channel_rows rows; /* what it holds, where that is bf16 */
    struct staged staged[BATCH_BYTES / 4096];
    uint32_t n_staged, staged_bytes;
    struct buffer positions; /* coded */
    uint32_t *last;          /* positions of the head before */
    uint32_t n_last;
    uint64_t written; /* bytes of extents so far */
};

/* ---- growing buffers */

static int append(struct buffer *b, const void *p, uint64_t n, struct larder_err *e)
{
    if (b->len + n > b->cap) {
        uint64_t cap = 2 * b->cap + n + 256;
        uint8_t *grown = mem_grow(b->p, cap, 1);

        if (!grown)
            return larder_fail(e, LARDER_ENOMEM, "no memory to describe an entry");
        b->p = grown;
        b->cap = cap;
    }
    if (n)
        memcpy(b->p + b->len, p, n);
    b->len += n;
    return 0;
}

static int append_varint(struct buffer *b, uint32_t v, struct larder_err *e)
{
    uint8_t out[5];
    unsigned n = 0;

    for (; v >= 0x80; v >>= 7)
        out[n++] = (uint8_t)(v | 0x80);
    out[n++] = (uint8_t)v;
    return append(b, out, n, e);
}

/* Runs of consecutive positions as (gap, length - 1); zero runs where there are rows
 * means the same list as the (layer, head) before (FORMAT.md). */
static int code_positions(struct store_put *p, const uint32_t *pos, uint32_t n,
                          struct larder_err *e)
{
    uint32_t runs = 0, end = 0;
    int rc;

    if (n && n == p->n_last && !memcmp(pos, p->last, n * sizeof *pos))
        return append_varint(&p->positions, 0, e);
    for (uint32_t i = 0; i < n; i++)
        runs += !i || pos[i] != pos[i - 1] + 1;
    rc = append_varint(&p->positions, runs, e);
    for (uint32_t i = 0, j; !rc && i < n; i = j) {
        for (j = i + 1; j < n && pos[j] == pos[j - 1] + 1;)
            j++;
        rc = append_varint(&p->positions, pos[i] - end, e);
        if (!rc)
            rc = append_varint(&p->positions, j - i - 1, e);
        end = pos[i] + (j - i);
    }
    if (rc || !n)
        return rc;
    if (n > p->n_last) {
        uint32_t *grown = mem_grow(p->last, n, sizeof *grown);

        if (!grown)
            return larder_fail(e, LARDER_ENOMEM, "no memory to describe an entry");
        p->last = grown;
    }
    memcpy(p->last, pos, n * sizeof *pos);
    p->n_last = n;
    return 0;
}

/* ---- extents */

static void staged_free(struct store_put *p)
{
    for (uint32_t i = 0; i < p->n_staged; i++)
        mem_free(p->staged[i].bytes);
    p->n_staged = p->staged_bytes = 0;
}

void extent_key(uint64_t entry_id, uint32_t index, uint8_t out[EXTENT_KEY_LEN])
{
    be64(entry_id, out);
    for (int i = 0; i < 4; i++)
        out[8 + i] = (uint8_t)(index >> (24 - 8 * i));
}

static int write_staged(struct store_put *p, MDB_txn *txn, struct larder_err *e)
{
    uint8_t key[EXTENT_KEY_LEN];
    int rc = 0;

    for (uint32_t i = 0; !rc && i < p->n_staged; i++) {
        extent_key(p->m.entry_id, p->staged[i].index, key);
        rc =
            db_put(p->s, txn, DB_extents, key, sizeof key, p->staged[i].bytes, p->staged[i].len, e);
    }
    return rc;
}

static int flush_staged(struct store_put *p, struct larder_err *e)
{
    MDB_txn *txn;
    int rc;

    if (!p->n_staged)
        return 0;
    rc = txn_write(p->s, &txn, e);
    if (rc)
        return rc;
    rc = write_staged(p, txn, e);
    if (rc) {
        txn_abort(p->s, txn);
        return rc;
    }
    rc = txn_commit(p->s, txn, e);
    if (!rc)
        staged_free(p);
    return rc;
}

static int new_extent(struct store_put *p, struct extent **ret, struct larder_err *e)
{
    if (p->m.n_extents == MANIFEST_MAX_EXTENTS)
        return larder_fail(e, LARDER_ETOOBIG, "an entry of more than %u extents",
                           MANIFEST_MAX_EXTENTS);
    if (p->m.n_extents == p->cap_extents) {
        uint32_t cap = p->cap_extents ? 2 * p->cap_extents : 64;
        struct extent *grown = mem_grow(p->m.extent, cap, sizeof *grown);

        if (!grown)
            return larder_fail(e, LARDER_ENOMEM, "no memory to describe an entry");
        p->m.extent = grown;
        p->cap_extents = cap;
    }
    *ret = &p->m.extent[p->m.n_extents];
    return 0;
}

/* Code it as the next extent and queue it for writing. */
static int stage(struct store_put *p, enum stream stream, enum codec_kind want,
                 const struct codec_input *in, struct larder_err *e)
{
    struct extent *x = NULL;
    const void *stored;
    int rc = new_extent(p, &x, e);

    if (rc)
        return rc;
    x->stream = stream;
    x->raw_len = in->len;
    rc = codec_encode(p->codec, want, in, &x->codec, &stored, &x->stored_len, x->hash, e);
    if (rc)
        return rc;
    p->written += x->stored_len;
    if (p->written > p->s->budget)
        return larder_fail(e, LARDER_EFULL,
                           "the entry alone exceeds the store budget of %llu bytes; raise "
                           "store_budget or keep fewer rows",
                           (unsigned long long)p->s->budget);
    p->staged[p->n_staged].bytes = mem_dup(stored, x->stored_len);
    if (!p->staged[p->n_staged].bytes)
        return larder_fail(e, LARDER_ENOMEM, "no memory to store an extent");
    p->staged[p->n_staged].len = x->stored_len;
    p->staged[p->n_staged++].index = p->m.n_extents++;
    p->m.n_row_extents += stream == STREAM_ROWS;
    p->staged_bytes += x->stored_len;
    if (p->staged_bytes >= BATCH_BYTES || p->n_staged == sizeof p->staged / sizeof p->staged[0])
        return flush_staged(p, e);
    return 0;
}

static int stage_rows(struct store_put *p, struct larder_err *e)
{
    enum codec_kind want = p->m.info.precision == KV_BF16 ? p->s->codec : CODEC_RAW;
    struct codec_input in = {p->raw, p->fill, &p->rows};
    int rc = p->fill ? stage(p, STREAM_ROWS, want, &in, e) : 0;

    p->fill = 0;
    p->rows.n_runs = 0;
    return rc;
}

/* Add bytes, elements in rows of `width` where they are bf16, to the row stream. */
static int stream_rows(struct store_put *p, const void *bytes, uint64_t n, uint32_t width,
                       struct larder_err *e)
{
    const uint8_t *at = bytes;
    int rc = 0;

    p->m.payload_bytes += n;
    while (!rc && n) {
        uint32_t room = EXTENT_RAW_MAX - p->fill, take = n < room ? (uint32_t)n : room;

        memcpy(p->raw + p->fill, at, take);
        p->fill += take;
        if (p->m.info.precision == KV_BF16)
            channels_add(&p->rows, take / 2, width);
        at += take;
        n -= take;
        if (p->fill == EXTENT_RAW_MAX)
            rc = stage_rows(p, e);
    }
    return rc;
}

static int stream_bias(struct store_put *p, const float *bias, uint32_t n, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; !rc && i < n; i++) {
        uint16_t h = f32_to_bf16(bias[i]);
        uint8_t b[2] = {(uint8_t)h, (uint8_t)(h >> 8)};

        rc = stream_rows(p, b, 2, 1, e);
    }
    return rc;
}

/* ---- the put */

int store_put_begin(struct store *s, struct store_put **ret, const struct kv_geom *geom,
                    enum kv_dtype precision, bool has_bias, struct larder_err *e)
{
    struct store_put *p;
    MDB_txn *txn;
    int rc = kv_geom_check(geom, e);

    if (rc)
        return rc;
    if (precision != KV_BF16 && precision != KV_INT8 && precision != KV_INT4)
        return larder_fail(e, LARDER_EINVAL, "rows are stored as bf16, int8 or int4");
    p = mem_zalloc(1, sizeof *p);
    if (!p)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    p->s = s;
    p->m.info.geom = *geom;
    p->m.info.precision = precision;
    p->m.info.has_bias = has_bias;
    p->codec = codec_new();
    p->raw = mem_alloc(EXTENT_RAW_MAX, 1);
    p->m.rows = mem_zalloc((uint64_t)geom->n_layers * geom->n_kv_heads, sizeof *p->m.rows);
    if (!p->codec || !p->raw || !p->m.rows) {
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to store an entry");
        goto fail;
    }
    rc = txn_write(s, &txn, e);
    if (rc)
        goto fail;
    rc = meta_next(s, txn, "next_entry", &p->m.entry_id, e);
    if (rc)
        txn_abort(s, txn);
    else
        rc = txn_commit(s, txn, e);
    if (rc)
        goto fail;
    *ret = p;
    return 0;
fail:
    store_put_abort(p);
    return rc;
}

static int check_positions(const struct store_rows *h, uint32_t layer, struct larder_err *e)
{
    for (uint32_t i = 0; i < h->n_rows; i++)
        if (h->position[i] >= KV_MAX_CTX || (i && h->position[i] <= h->position[i - 1]))
            return larder_fail(e, LARDER_EINVAL, "layer %u: positions are not ascending", layer);
    return 0;
}

int store_put_layer(struct store_put *p, const struct store_rows *heads, struct larder_err *e)
{
    const struct store_info *in = &p->m.info;
    uint32_t layer = p->next_layer, d = in->geom.head_dim;
    int rc = 0;

    if (layer == in->geom.n_layers)
        return larder_fail(e, LARDER_EINVAL, "more layers than the model has");
    for (uint32_t g = 0; !rc && g < in->geom.n_kv_heads; g++) {
        const struct store_rows *h = &heads[g];

        p->m.rows[(uint64_t)layer * in->geom.n_kv_heads + g] = h->n_rows;
        rc = check_positions(h, layer, e);
        if (!rc)
            rc = code_positions(p, h->position, h->n_rows, e);
        if (!rc)
            rc = stream_rows(p, h->k, tile_bytes_k(in->precision, h->n_rows, d), d, e);
        if (!rc)
            rc = stream_rows(p, h->v, tile_bytes_v(in->precision, h->n_rows, d), d, e);
        if (!rc && in->has_bias)
            rc = stream_bias(p, h->bias, h->n_rows, e);
    }
    p->next_layer++;
    return rc;
}

/* Tokens, text, positions, logits and extra as one stream of extents. */
static int stage_aux(struct store_put *p, const struct store_info *info, struct larder_err *e)
{
    struct buffer aux = {0};
    int rc = 0;

    for (uint32_t i = 0; !rc && i < info->n_ctx; i++) {
        uint32_t t = info->ident.tokens[i];
        uint8_t b[4] = {(uint8_t)t, (uint8_t)(t >> 8), (uint8_t)(t >> 16), (uint8_t)(t >> 24)};

        rc = append(&aux, b, 4, e);
    }
    if (!rc)
        rc = append(&aux, info->text, info->text_len, e);
    if (!rc)
        rc = append(&aux, p->positions.p, p->positions.len, e);
    for (uint32_t i = 0; !rc && i < info->n_vocab; i++) {
        uint16_t h = f32_to_f16(info->logits[i]);
        uint8_t b[2] = {(uint8_t)h, (uint8_t)(h >> 8)};

        rc = append(&aux, b, 2, e);
    }
    if (!rc)
        rc = append(&aux, info->extra, strlen(info->extra), e);
    for (uint64_t at = 0; !rc && at < aux.len; at += EXTENT_RAW_MAX) {
        uint64_t left = aux.len - at;
        struct codec_input in = {aux.p + at,
                                 left < EXTENT_RAW_MAX ? (uint32_t)left : EXTENT_RAW_MAX, NULL};

        rc = stage(p, STREAM_AUX, CODEC_ZSTD, &in, e);
    }
    mem_free(aux.p);
    return rc;
}

/* Fill the manifest from what the caller says and what was streamed. */
static int complete(struct store_put *p, const struct store_info *info, struct larder_err *e)
{
    struct store_info *in = &p->m.info;
    struct store_info keep = *in;
    int rc;

    if (p->next_layer != in->geom.n_layers)
        return larder_fail(e, LARDER_EINVAL, "%u of %u layers were given", p->next_layer,
                           in->geom.n_layers);
    if (!info->n_ctx || info->n_ctx > KV_MAX_CTX || info->n_ctx != info->ident.n_tokens ||
        info->n_vocab > KV_MAX_VOCAB || info->text_len > MANIFEST_MAX_AUX)
        return larder_fail(e, LARDER_EINVAL, "an entry of %u tokens", info->n_ctx);
    *in = *info;
    in->geom = keep.geom;
    in->precision = keep.precision;
    in->has_bias = keep.has_bias;
    in->rows = p->m.rows;
    in->raw_bytes = p->m.payload_bytes;
    rc = store_key(&info->ident, in->key, e);
    if (rc)
        return rc;
    p->m.aux = (struct aux_layout){4ull * info->n_ctx, info->text_len, p->positions.len,
                                   2ull * info->n_vocab, strlen(info->extra)};
    rc = stage_rows(p, e);
    return rc ? rc : stage_aux(p, info, e);
}

/* Everything that makes the entry visible, inside one transaction. */
static int publish(struct store_put *p, MDB_txn *txn, const void *manifest, size_t len,
                   const char *name, bool pin, struct larder_err *e)
{
    const struct store_info *in = &p->m.info;
    struct state st = {.entry_id = p->m.entry_id, .n_ctx = in->n_ctx};
    struct state old = {0};
    uint64_t now = in->created;
    int rc = write_staged(p, txn, e);

    if (rc)
        return rc;
    rc = state_get(p->s, txn, in->key, &old, e);
    if (!rc) { /* replaced: names and pins stay, bytes go */
        st.names = old.names;
        st.names_len = old.names_len;
        st.n_names = old.n_names;
        st.flags = old.flags & STATE_PINNED;
        old.names = NULL;
        rc = entry_remove(p->s, txn, in->key, 0, now, NULL, e);
    } else if (rc == LARDER_ENOTFOUND) {
        rc = 0;
    }
    st.flags |= pin ? STATE_PINNED : 0;
    st.last_used = now;
    st.stored_bytes = p->written + len;
    st.raw_bytes = in->raw_bytes;
    if (!rc)
        rc = evict_for(p->s, txn, st.stored_bytes, in->key, now, e);
    if (!rc)
        rc = db_put(p->s, txn, DB_entries, in->key, STORE_KEY_LEN, manifest, len, e);
    if (!rc)
        rc = state_put(p->s, txn, in->key, &st, e);
    p->s->added += (int64_t)st.stored_bytes;
    if (!rc)
        rc = prefix_add(p->s, txn, &p->m, in, e);
    if (!rc && name)
        rc = name_bind(p->s, txn, in->key, in->ident.ns, name, e);
    if (!rc)
        rc = db_del(p->s, txn, DB_tombs, in->key, STORE_KEY_LEN, e);
    state_done(&st);
    state_done(&old);
    return rc;
}

int store_put_commit(struct store_put *p, const struct store_info *info, const char *name, bool pin,
                     uint8_t ret_key[STORE_KEY_LEN], struct larder_err *e)
{
    void *manifest = NULL;
    uint8_t key[STORE_KEY_LEN];
    MDB_txn *txn;
    size_t len;
    int rc = complete(p, info, e);

    if (!rc)
        rc = manifest_encode(&p->m, &manifest, &len, e);
    if (!rc && (rc = txn_write(p->s, &txn, e)) == 0) {
        rc = publish(p, txn, manifest, len, name, pin, e);
        if (rc)
            txn_abort(p->s, txn);
        else
            rc = txn_commit(p->s, txn, e);
    }
    mem_free(manifest);
    if (rc) {
        store_put_abort(p);
        return rc;
    }
    memcpy(key, p->m.info.key, STORE_KEY_LEN);
    p->m.entry_id = 0; /* published: nothing to remove */
    store_put_abort(p);
    memcpy(ret_key, key, STORE_KEY_LEN);
    return 0;
}

void store_put_abort(struct store_put *p)
{
    MDB_txn *txn;

    if (!p)
        return;
    if (p->m.entry_id && p->m.n_extents && !txn_write(p->s, &txn, NULL)) {
        if (extents_remove(p->s, txn, p->m.entry_id, NULL))
            txn_abort(p->s, txn);
        else
            txn_commit(p->s, txn, NULL);
    }
    staged_free(p);
    codec_free(p->codec);
    mem_free(p->raw);
    mem_free(p->m.rows);
    mem_free(p->m.extent);
    mem_free(p->positions.p);
    mem_free(p->last);
    mem_free(p);
}

static void add_field(struct sha256 *h, const void *p, uint32_t n)
{
    uint8_t len[4];
    struct wr w = wr_init(len, sizeof len);

    wr_u32(&w, n);
    sha256_add(h, len, sizeof len);
    if (n)
        sha256_add(h, p, n);
}

int store_key(const struct store_ident *id, uint8_t ret[STORE_KEY_LEN], struct larder_err *e)
{
    struct sha256 *h = sha256_new();
    uint8_t *tokens = mem_alloc(id->n_tokens, 4);
    struct wr w = wr_init(tokens, 4ull * id->n_tokens);

    if (!h || !tokens) {
        sha256_free(h);
        mem_free(tokens);
        return larder_fail(e, LARDER_ENOMEM, "no memory to compute a key");
    }
    for (uint32_t i = 0; i < id->n_tokens; i++)
        wr_u32(&w, id->tokens[i]);
    add_field(h, "larder-key-1", 12);
    add_field(h, id->model_fp, 32);
    add_field(h, id->tokenizer_fp, 32);
    add_field(h, id->template_fp, 32);
    add_field(h, id->policy, (uint32_t)strlen(id->policy));
    add_field(h, id->ns, (uint32_t)strlen(id->ns));
    add_field(h, tokens, 4 * id->n_tokens);
    sha256_get(h, ret);
    sha256_free(h);
    mem_free(tokens);
    return 0;
}
