/* entry.c - reading an entry: manifest first, then extents in any order.
 *
 * The one idea: the row stream is one sequence of tiles, so an extent's place in it says
 * into which (layer, KV head) arrays its bytes go. Extents are decoded into a buffer that stays in
 * cache and put from there, each in a short transaction of its own, by as many threads as ask. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bytes.h"
#include "half.h"
#include "mem.h"
#include "packed.h"
#include "size.h"
#include "store_int.h"

#define AHEAD 8u         /* extents of at most a mebibyte */
#define MAX_PIECES 64u   /* of an extent that is decoded in place */
#define TILES_PER_HEAD 3 /* K, V, bias (which may be empty) */

struct store_entry {
    struct store *s;
    struct manifest m;
    uint64_t *tile; /* [n_tiles + 1] offsets in the row stream */
    uint32_t n_tiles;
    char *name;
    uint8_t *aux; /* tokens, text, positions, logits, extra; NULL until loaded */
    uint32_t *tokens;
    float *logits;
    char *extra;
    uint32_t *positions;   /* all heads, back to back */
    uint64_t *position_at; /* [n_layers * n_kv_heads] */
};

/* ---- scratch decoders */

struct codec *codec_take(struct store *s)
{
    struct codec *c = NULL;

    pthread_mutex_lock(&s->small);
    if (s->n_scratch)
        c = s->scratch[--s->n_scratch];
    pthread_mutex_unlock(&s->small);
    return c ? c : codec_new();
}

void codec_give(struct store *s, struct codec *c)
{
    pthread_mutex_lock(&s->small);
    if (s->n_scratch < MAX_SCRATCH) {
        s->scratch[s->n_scratch++] = c;
        c = NULL;
    }
    pthread_mutex_unlock(&s->small);
    codec_free(c);
}

/* ---- opening */

static int lay_tiles(struct store_entry *en, struct larder_err *e)
{
    const struct store_info *in = &en->m.info;
    uint64_t heads = (uint64_t)in->geom.n_layers * in->geom.n_kv_heads, at = 0, *t;

    en->n_tiles = (uint32_t)(heads * TILES_PER_HEAD);
    en->tile = t = mem_alloc(en->n_tiles + 1ull, sizeof *t);
    if (!t)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read an entry");
    for (uint64_t i = 0; i < heads; i++) {
        *t++ = at;
        at += tile_bytes_k(in->precision, in->rows[i], in->geom.head_dim);
        *t++ = at;
        at += tile_bytes_v(in->precision, in->rows[i], in->geom.head_dim);
        *t++ = at;
        at += in->has_bias ? 2ull * in->rows[i] : 0;
    }
    *t = at;
    return 0;
}

/* What the mutable state adds to the info. */
static int add_state(struct store_entry *en, MDB_txn *txn, struct larder_err *e)
{
    struct store_info *in = &en->m.info;
    struct state st = {0};
    const char *last, *slash;
    int rc = state_get(en->s, txn, in->key, &st, e);

    if (rc)
        return rc == LARDER_ENOTFOUND
                   ? larder_fail(e, LARDER_EDAMAGED, "the state of an entry is missing")
                   : rc;
    in->pinned = st.flags & STATE_PINNED;
    in->damaged = st.flags & STATE_DAMAGED;
    in->hits = st.hits;
    in->last_used = st.last_used;
    if (st.n_names) {
        last = st.names + st.names_len - 1;
        while (last > st.names && last[-1])
            last--;
        slash = strchr(last, '/');
        en->name = mem_strdup(slash ? slash + 1 : last);
        if (!en->name)
            rc = larder_fail(e, LARDER_ENOMEM, "no memory to read an entry");
        in->name = en->name;
    }
    state_done(&st);
    return rc;
}

int entry_open_txn(struct store *s, MDB_txn *txn, const uint8_t *key, struct store_entry **ret,
                   struct larder_err *e)
{
    struct store_entry *en;
    MDB_val v;
    int rc = db_get(s, txn, DB_entries, key, STORE_KEY_LEN, &v, e);

    if (rc)
        return rc;
    en = mem_zalloc(1, sizeof *en);
    if (!en)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read an entry");
    en->s = s;
    rc = manifest_decode(v.mv_data, v.mv_size, &en->m, e);
    if (!rc && memcmp(en->m.info.key, key, STORE_KEY_LEN))
        rc = larder_fail(e, LARDER_EDAMAGED, "a manifest lies under another entry's key");
    if (!rc)
        rc = lay_tiles(en, e);
    if (!rc)
        rc = add_state(en, txn, e);
    if (rc) {
        store_entry_close(en);
        return rc;
    }
    *ret = en;
    return 0;
}

int store_entry_open(struct store *s, const uint8_t key[STORE_KEY_LEN], struct store_entry **ret,
                     struct larder_err *e)
{
    MDB_txn *txn;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = entry_open_txn(s, txn, key, ret, e);
    mdb_txn_abort(txn);
    return rc;
}

void store_entry_close(struct store_entry *en)
{
    if (!en)
        return;
    manifest_done(&en->m);
    mem_free(en->tile);
    mem_free(en->name);
    mem_free(en->aux);
    mem_free(en->tokens);
    mem_free(en->logits);
    mem_free(en->extra);
    mem_free(en->positions);
    mem_free(en->position_at);
    mem_free(en);
}

const struct store_info *store_entry_info(const struct store_entry *en)
{
    return &en->m.info;
}

/* ---- extents */

/* Verify extent i and decode it (NULL: verify only). */
static int decode_extent(const struct store_entry *en, MDB_txn *txn, uint32_t i, struct codec *c,
                         const struct codec_piece *to, struct larder_err *e)
{
    const struct extent *x = &en->m.extent[i];
    uint8_t key[EXTENT_KEY_LEN];
    MDB_val v;
    int rc;

    extent_key(en->m.entry_id, i, key);
    rc = db_get(en->s, txn, DB_extents, key, sizeof key, &v, e);
    if (rc == LARDER_ENOTFOUND)
        return larder_fail(e, LARDER_EDAMAGED, "extent %u is missing", i);
    if (!rc && v.mv_size != x->stored_len)
        return larder_fail(e, LARDER_EDAMAGED, "extent %u has a wrong length", i);
    if (!rc)
        rc = codec_decode(c, x->codec, v.mv_data, x->stored_len, x->raw_len, x->hash, to, e);
    return rc == LARDER_EDAMAGED ? larder_fail_in(e, rc, "extent %u", i) : rc;
}

/* Have the pages of an extent read while others are decoded. Advice: what fails is read later. */
static void ask_for(const struct store_entry *en, MDB_txn *txn, uint32_t i)
{
    uintptr_t page = (uintptr_t)getpagesize(), into;
    uint8_t key[EXTENT_KEY_LEN];
    MDB_val v;

    if (i >= en->m.n_extents)
        return;
    extent_key(en->m.entry_id, i, key);
    if (db_get(en->s, txn, DB_extents, key, sizeof key, &v, NULL))
        return;
    into = (uintptr_t)v.mv_data % page;
    madvise((char *)v.mv_data - into, v.mv_size + into, MADV_WILLNEED);
}

/* Extents are taken in order: each asks for one further on, the first for those between too. */
static void read_ahead(const struct store_entry *en, MDB_txn *txn, uint32_t i)
{
    for (uint32_t n = i ? AHEAD : 1; n <= AHEAD; n++)
        ask_for(en, txn, i + n);
}

/* In a transaction of its own; an entry deleted meanwhile is not damage. */
static int decode_alone(const struct store_entry *en, uint32_t i, struct codec *c,
                        const struct codec_piece *to, struct larder_err *e)
{
    MDB_txn *txn;
    MDB_val v;
    int rc = txn_read(en->s, &txn, e);

    if (rc)
        return rc;
    read_ahead(en, txn, i);
    rc = decode_extent(en, txn, i, c, to, e);
    if (rc == LARDER_EDAMAGED &&
        db_get(en->s, txn, DB_entries, en->m.info.key, STORE_KEY_LEN, &v, NULL) == LARDER_ENOTFOUND)
        rc = larder_fail(e, LARDER_ENOTFOUND, "the entry was removed while it was read");
    mdb_txn_abort(txn);
    return rc;
}

static int decode_buffered(const struct store_entry *en, uint32_t i, struct codec *c,
                           struct larder_err *e)
{
    struct codec_piece to = {codec_buffer(c), en->m.extent[i].raw_len};

    return decode_alone(en, i, c, &to, e);
}

/* ---- aux: tokens, text, positions, logits, extra */

static int read_varint(struct rd *r, uint32_t *ret)
{
    uint32_t v = 0;

    for (unsigned shift = 0; shift < 32; shift += 7) {
        uint8_t b = rd_u8(r);

        v |= (uint32_t)(b & 0x7f) << shift;
        if (!(b & 0x80)) {
            *ret = v;
            return rd_ok(r) ? 0 : -1;
        }
    }
    return -1;
}

/* One head's list of n positions below n_ctx. */
static int read_positions(struct rd *r, uint32_t n, uint32_t n_ctx, const uint32_t *before,
                          uint32_t n_before, uint32_t *out)
{
    uint32_t runs, gap, more, at = 0, i = 0;

    if (read_varint(r, &runs))
        return -1;
    if (!runs && n) {
        if (n != n_before)
            return -1;
        memcpy(out, before, n * sizeof *out);
        return 0;
    }
    for (; runs; runs--) {
        if (read_varint(r, &gap) || read_varint(r, &more) || gap > n_ctx || more >= n_ctx ||
            at + gap > n_ctx || at + gap + more >= n_ctx || more >= n - i || i >= n)
            return -1;
        at += gap;
        for (uint32_t j = 0; j <= more; j++)
            out[i++] = at++;
    }
    return i == n ? 0 : -1;
}

static int unpack_positions(struct store_entry *en, struct rd *r, struct larder_err *e)
{
    const struct store_info *in = &en->m.info;
    uint64_t heads = (uint64_t)in->geom.n_layers * in->geom.n_kv_heads, total = 0;
    const uint32_t *before = NULL;
    uint32_t n_before = 0;

    for (uint64_t i = 0; i < heads; i++)
        total += in->rows[i];
    en->positions = mem_alloc(total, sizeof *en->positions);
    en->position_at = mem_alloc(heads, sizeof *en->position_at);
    if (!en->positions || !en->position_at)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read an entry");
    total = 0;
    for (uint64_t i = 0; i < heads; i++) {
        uint32_t *out = en->positions + total, n = in->rows[i];

        if (read_positions(r, n, in->n_ctx, before, n_before, out))
            return larder_fail(e, LARDER_EDAMAGED, "the positions of an entry are damaged");
        en->position_at[i] = total;
        total += n;
        if (n) {
            before = out;
            n_before = n;
        }
    }
    return rd_left(r) ? larder_fail(e, LARDER_EDAMAGED, "the positions of an entry are damaged")
                      : 0;
}

static int unpack_aux(struct store_entry *en, struct larder_err *e)
{
    struct store_info *in = &en->m.info;
    const struct aux_layout *a = &en->m.aux;
    uint64_t at = a->tokens + a->text;
    struct rd r = rd_init(en->aux, a->tokens);
    int rc;

    en->tokens = mem_alloc(in->n_ctx, sizeof *en->tokens);
    en->logits = mem_alloc(in->n_vocab, sizeof *en->logits);
    en->extra = mem_zalloc(a->extra + 1, 1);
    if (!en->tokens || !en->logits || !en->extra)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read an entry");
    for (uint32_t i = 0; i < in->n_ctx; i++)
        en->tokens[i] = rd_u32(&r);
    r = rd_init(en->aux + at, a->positions);
    rc = unpack_positions(en, &r, e);
    if (rc)
        return rc;
    at += a->positions;
    r = rd_init(en->aux + at, a->logits);
    for (uint32_t i = 0; i < in->n_vocab; i++)
        en->logits[i] = f16_to_f32(rd_u16(&r));
    memcpy(en->extra, en->aux + at + a->logits, a->extra);
    in->ident.tokens = en->tokens;
    in->text = (const char *)en->aux + a->tokens;
    in->logits = en->logits;
    in->extra = en->extra;
    return 0;
}

int entry_load_txn(struct store_entry *en, MDB_txn *txn, struct larder_err *e)
{
    const struct aux_layout *a = &en->m.aux;
    uint64_t at = 0;
    struct codec *c;
    int rc = 0;

    if (en->extra)
        return 0;
    mem_free(en->aux);
    en->aux = mem_alloc(a->tokens + a->text + a->positions + a->logits + a->extra, 1);
    c = codec_take(en->s);
    if (!en->aux || !c) {
        codec_free(c);
        return larder_fail(e, LARDER_ENOMEM, "no memory to read an entry");
    }
    for (uint32_t i = en->m.n_row_extents; !rc && i < en->m.n_extents; i++) {
        struct codec_piece to = {en->aux + at, en->m.extent[i].raw_len};

        rc = decode_extent(en, txn, i, c, &to, e);
        at += to.n;
    }
    codec_give(en->s, c);
    return rc ? rc : unpack_aux(en, e);
}

int store_entry_load(struct store_entry *en, struct larder_err *e)
{
    MDB_txn *txn;
    int rc = txn_read(en->s, &txn, e);

    if (rc)
        return rc;
    rc = entry_load_txn(en, txn, e);
    mdb_txn_abort(txn);
    return rc;
}

const uint32_t *store_entry_positions(const struct store_entry *en, uint32_t layer, uint32_t head)
{
    return en->positions + en->position_at[(uint64_t)layer * en->m.info.geom.n_kv_heads + head];
}

/* ---- rows */

uint32_t store_entry_n_extents(const struct store_entry *en, enum kv_dtype as)
{
    return as == en->m.info.precision ? en->m.n_row_extents : en->m.info.geom.n_layers;
}

/* First tile that ends after `offset`. */
static uint32_t tile_at(const struct store_entry *en, uint64_t offset)
{
    uint32_t lo = 0, hi = en->n_tiles;

    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;

        if (en->tile[mid + 1] <= offset)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static int make_room(const struct store_sink *to, uint64_t at, uint64_t n, struct larder_err *e)
{
    return to->room && n ? to->room(to->arg, at, n, e) : 0;
}

int store_sink_put(const struct store_sink *to, uint64_t at, const void *bytes, uint64_t n,
                   struct larder_err *e)
{
    int rc = make_room(to, at, n, e);

    if (!rc && n)
        memcpy(to->base + at, bytes, n);
    return rc;
}

/* Bias tiles are stored as bf16 and wanted as f32. K and V of a head are an even number of bytes
 * together, so no bias lies across two extents. */
static int put_bias(const struct store_sink *to, uint64_t at, const uint8_t *half, uint32_t n,
                    struct larder_err *e)
{
    int rc = make_room(to, at, 4ull * n, e);

    for (uint32_t i = 0; !rc && i < n; i++, half += 2) {
        float wide = bf16_to_f32((uint16_t)(half[0] | half[1] << 8));

        memcpy(to->base + at + 4ull * i, &wide, sizeof wide);
    }
    return rc;
}

/* The place of tile t. */
static uint64_t place_of(const struct store_sink *to, uint32_t t)
{
    const struct store_target *at = &to->target[t / TILES_PER_HEAD];

    return t % TILES_PER_HEAD == 0 ? at->k : t % TILES_PER_HEAD == 1 ? at->v : at->bias;
}

/* A part of an extent, within one tile: bytes [from, till) of the row stream go to `place`. */
struct piece {
    uint32_t tile;
    uint64_t from, till, place;
};

/* Bias is f32 there, so twice as far into its tile. */
static bool is_bias(const struct piece *p)
{
    return p->tile % TILES_PER_HEAD == 2;
}

/* The piece that starts at `from`, of a stream that ends at `end`. */
static struct piece piece_at(const struct store_entry *en, const struct store_sink *to,
                             uint64_t from, uint64_t end)
{
    uint32_t t = tile_at(en, from);
    struct piece p = {t, from, end < en->tile[t + 1] ? end : en->tile[t + 1], 0};

    p.place = place_of(to, t) + (is_bias(&p) ? 2 : 1) * (from - en->tile[t]);
    return p;
}

/* The extent's bytes in as few pieces as they have places there; 0 where that is more than
 * MAX_PIECES, or one is a bias. */
static uint32_t list_pieces(const struct store_entry *en, uint64_t begin, uint64_t end,
                            const struct store_sink *to, struct codec_piece out[MAX_PIECES])
{
    uint32_t n = 0;

    while (begin < end) {
        struct piece p = piece_at(en, to, begin, end);
        uint8_t *place = to->base + p.place;

        if (is_bias(&p))
            return 0;
        if (n && out[n - 1].to + out[n - 1].n == place)
            out[n - 1].n += (uint32_t)(p.till - begin);
        else if (n == MAX_PIECES)
            return 0;
        else
            out[n++] = (struct codec_piece){place, (uint32_t)(p.till - begin)};
        begin = p.till;
    }
    return n;
}

static int put_pieces(const struct store_entry *en, uint64_t begin, uint64_t end,
                      const uint8_t *bytes, const struct store_sink *to, struct larder_err *e)
{
    int rc = 0;

    for (uint64_t at = begin; !rc && at < end;) {
        struct piece p = piece_at(en, to, at, end);
        uint64_t n = p.till - at;

        rc = is_bias(&p) ? put_bias(to, p.place, bytes, (uint32_t)n / 2, e)
                         : store_sink_put(to, p.place, bytes, n, e);
        bytes += n;
        at = p.till;
    }
    return rc;
}

static int decode_tiles(const struct store_entry *en, uint32_t i, struct codec *c,
                        const struct store_sink *to, struct larder_err *e)
{
    uint64_t begin = (uint64_t)i * EXTENT_RAW_MAX, end = begin + en->m.extent[i].raw_len;
    struct codec_piece there[MAX_PIECES];
    uint32_t n = list_pieces(en, begin, end, to, there);
    int rc = 0;

    if (!n) {
        rc = decode_buffered(en, i, c, e);
        return rc ? rc : put_pieces(en, begin, end, codec_buffer(c), to, e);
    }
    for (uint32_t p = 0; !rc && p < n; p++)
        rc = make_room(to, (uint64_t)(there[p].to - to->base), there[p].n, e);
    return rc ? rc : decode_alone(en, i, c, there, e);
}

/* Bytes [at, at + n) of the row stream; each extent that holds some is verified whole. */
static int read_stream(const struct store_entry *en, uint64_t at, uint64_t n, struct codec *c,
                       uint8_t *out, struct larder_err *e)
{
    const uint8_t *bytes = codec_buffer(c);
    int rc = 0;

    while (!rc && n) {
        uint32_t i = (uint32_t)(at / EXTENT_RAW_MAX), skip = (uint32_t)(at % EXTENT_RAW_MAX);
        uint64_t left = en->m.extent[i].raw_len - skip, take = left < n ? left : n;

        rc = decode_buffered(en, i, c, e);
        if (!rc)
            memcpy(out, bytes + skip, take);
        out += take;
        at += take;
        n -= take;
    }
    return rc;
}

/* A head of a packed layer as bf16. `bytes` begin at offset `at` of the row stream. */
static int put_expanded(const struct store_entry *en, uint32_t g, const uint8_t *bytes, uint64_t at,
                        const struct store_sink *to, struct larder_err *e)
{
    const struct store_info *in = &en->m.info;
    const uint64_t *t = en->tile + (uint64_t)g * TILES_PER_HEAD;
    uint32_t rows = in->rows[g], d = in->geom.head_dim;
    uint64_t n = 2ull * rows * d;
    int rc = make_room(to, to->target[g].k, n, e);

    if (!rc)
        rc = make_room(to, to->target[g].v, n, e);
    if (rc)
        return rc;
    packed_expand_k(in->precision, bytes + (t[0] - at), rows, d,
                    (void *)(to->base + to->target[g].k));
    packed_expand_v(in->precision, bytes + (t[1] - at), rows, d,
                    (void *)(to->base + to->target[g].v));
    return in->has_bias ? put_bias(to, to->target[g].bias, bytes + (t[2] - at), rows, e) : 0;
}

/* A packed layer as bf16: fetch its bytes, expand each tile. */
static int decode_expanded(const struct store_entry *en, uint32_t layer, struct codec *c,
                           const struct store_sink *to, struct larder_err *e)
{
    const struct store_info *in = &en->m.info;
    uint32_t first = layer * in->geom.n_kv_heads, end = first + in->geom.n_kv_heads;
    uint64_t at = en->tile[first * TILES_PER_HEAD], n = en->tile[end * TILES_PER_HEAD] - at;
    uint8_t *bytes = mem_alloc(n, 1);
    int rc = bytes ? read_stream(en, at, n, c, bytes, e)
                   : larder_fail(e, LARDER_ENOMEM, "no memory to decode a layer");

    for (uint32_t g = first; !rc && g < end; g++)
        rc = put_expanded(en, g, bytes, at, to, e);
    mem_free(bytes);
    return rc;
}

int store_entry_decode(const struct store_entry *en, enum kv_dtype as, uint32_t i,
                       const struct store_sink *to, struct larder_err *e)
{
    struct codec *c;
    int rc = 0;

    if (as != en->m.info.precision && as != KV_BF16)
        return larder_fail(e, LARDER_EINVAL, "rows are read as they are stored or as bf16");
    if (i >= store_entry_n_extents(en, as))
        return larder_fail(e, LARDER_EINVAL, "extent %u of %u", i, store_entry_n_extents(en, as));
    c = codec_take(en->s);
    if (!c || !codec_buffer(c))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to decode an extent");
    else if (as == en->m.info.precision)
        rc = decode_tiles(en, i, c, to, e);
    else
        rc = decode_expanded(en, i, c, to, e);
    if (c)
        codec_give(en->s, c);
    return rc;
}

int store_verify(struct store *s, const uint8_t key[STORE_KEY_LEN], uint64_t *ret_bytes,
                 struct larder_err *e)
{
    struct store_entry *en;
    struct codec *c;
    int rc = store_entry_open(s, key, &en, e);

    if (rc)
        return rc;
    c = codec_take(s);
    if (!c)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to decode an extent");
    for (uint32_t i = 0; !rc && i < en->m.n_extents; i++)
        rc = decode_alone(en, i, c, NULL, e);
    if (c)
        codec_give(s, c);
    if (!rc)
        rc = store_entry_load(en, e);
    if (!rc)
        *ret_bytes = en->m.info.stored_bytes;
    store_entry_close(en);
    return rc;
}
