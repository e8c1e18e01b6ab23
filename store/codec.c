/* codec.c - extents and their hashes: exponents coded in a zstd frame or in tiers, or bytes as they
 * are.
 *
 * The one idea: the exponents of bf16 rows, relative to their channels', carry about 2.5 bits and
 * the rest nearly 8, so only exponents are coded. In a zstd frame, which any zstd reads, with
 * Huffman codes alone: matches do not exist there and looking for them costs both time and size.
 * Merging works in blocks that stay in cache, so that hashing them is nearly free. */
#define ZSTD_STATIC_LINKING_ONLY
#include "codec.h"

#include <string.h>

#include <xxhash.h>
#include <zstd.h>

#include "bytes.h"
#include "channels.h"
#include "mem.h"
#include "tiers.h"

#define PLANE_MAX CHANNELS_MAX_ELEMS
#define ZSTD_BLOCK (128u << 10)
#define HASH_BLOCK (16u << 10)
#define MAX_WINDOW_LOG 23 /* 8 MiB: what a hostile frame may ask for */
#define AUX_LEVEL 3

struct codec {
    ZSTD_CCtx *cctx;
    ZSTD_DCtx *dctx;
    XXH3_state_t *hash;
    uint8_t *plane;  /* EXTENT_RAW_MAX: for CODEC_ZSTD; else exponents, then PLANE_MAX of scratch */
    uint8_t *stored; /* EXTENT_STORED_MAX */
    uint8_t *buffer; /* EXTENT_RAW_MAX, for the caller */
    struct channels channels;
    struct tiers tiers;
};

struct codec *codec_new(void)
{
    struct codec *c = mem_zalloc(1, sizeof *c);

    if (!c)
        return NULL;
    c->dctx = ZSTD_createDCtx();
    c->hash = XXH3_createState();
    c->plane = mem_alloc(EXTENT_RAW_MAX + TIERS_GROUP, 1);
    if (!c->dctx || !c->hash || !c->plane ||
        ZSTD_isError(ZSTD_DCtx_setParameter(c->dctx, ZSTD_d_windowLogMax, MAX_WINDOW_LOG))) {
        codec_free(c);
        return NULL;
    }
    return c;
}

void codec_free(struct codec *c)
{
    if (!c)
        return;
    ZSTD_freeCCtx(c->cctx);
    ZSTD_freeDCtx(c->dctx);
    XXH3_freeState(c->hash);
    mem_free(c->plane);
    mem_free(c->stored);
    mem_free(c->buffer);
    mem_free(c);
}

uint8_t *codec_buffer(struct codec *c)
{
    if (!c->buffer)
        c->buffer = mem_alloc(EXTENT_RAW_MAX, 1);
    return c->buffer;
}

/* ---- encoding */

static void hash_of(const void *p, size_t n, uint8_t out[EXTENT_HASH_LEN])
{
    XXH128_canonical_t canonical;

    XXH128_canonicalFromHash(&canonical, XXH3_128bits(p, n));
    memcpy(out, canonical.digest, EXTENT_HASH_LEN);
}

/* Literals only: one sequence without a match per block. 0 when zstd cannot. */
static size_t huffman_frame(struct codec *c, const uint8_t *src, size_t len, uint8_t *dst,
                            size_t cap)
{
    ZSTD_Sequence seq[PLANE_MAX / ZSTD_BLOCK + 1];
    size_t n_seq = 0, rc;

    for (size_t at = 0; at < len; at += ZSTD_BLOCK) {
        size_t block = len - at < ZSTD_BLOCK ? len - at : ZSTD_BLOCK;

        seq[n_seq++] = (ZSTD_Sequence){.litLength = (unsigned)block};
    }
    ZSTD_CCtx_reset(c->cctx, ZSTD_reset_session_and_parameters);
    ZSTD_CCtx_setParameter(c->cctx, ZSTD_c_compressionLevel, 1);
    ZSTD_CCtx_setParameter(c->cctx, ZSTD_c_blockDelimiters, ZSTD_sf_explicitBlockDelimiters);
    ZSTD_CCtx_setParameter(c->cctx, ZSTD_c_literalCompressionMode, ZSTD_ps_enable);
    rc = ZSTD_compressSequences(c->cctx, dst, cap, seq, n_seq, src, len);
    return ZSTD_isError(rc) ? 0 : rc;
}

static size_t plain_frame(struct codec *c, const void *src, size_t len, uint8_t *dst, size_t cap)
{
    size_t rc;

    ZSTD_CCtx_reset(c->cctx, ZSTD_reset_session_and_parameters);
    ZSTD_CCtx_setParameter(c->cctx, ZSTD_c_compressionLevel, AUX_LEVEL);
    rc = ZSTD_compress2(c->cctx, dst, cap, src, len);
    return ZSTD_isError(rc) ? 0 : rc;
}

/* bf16: length of the coded exponents, channels, coded exponents, the rest. Bytes written to
 * c->stored, 0 when they do not fit. */
static size_t encode_rows(struct codec *c, enum codec_kind want, const struct codec_input *in)
{
    uint8_t *exponent = c->plane, *scratch = c->plane + PLANE_MAX;
    struct wr w = wr_init(c->stored, EXTENT_STORED_MAX), head = wr_init(c->stored, 4);
    uint32_t n = in->len / 2;
    struct channels_at at = channels_start(&c->channels);
    size_t coded, room;

    channels_choose(&c->channels, in->raw, in->rows);
    wr_u32(&w, 0);
    channels_write(&c->channels, &w);
    if (!wr_ok(&w) || (size_t)(w.end - w.p) < n)
        return 0;
    /* the rest waits at the end until it is known how long the exponents before it are */
    channels_split(&at, in->raw, n, exponent, w.end - n);
    room = (size_t)(w.end - w.p) - n;
    if (want == CODEC_PLANES)
        coded = huffman_frame(c, exponent, n, w.p, room);
    else
        coded = tiers_encode(tiers_kernel(0), exponent, n, scratch, w.p, room);
    if (!coded)
        return 0;
    wr_u32(&head, (uint32_t)coded);
    memmove(w.p + coded, w.end - n, n);
    return (size_t)(w.p - c->stored) + coded + n;
}

int codec_encode(struct codec *c, enum codec_kind want, const struct codec_input *in,
                 enum codec_kind *ret_kind, const void **ret_stored, uint32_t *ret_len,
                 uint8_t hash[EXTENT_HASH_LEN], struct larder_err *e)
{
    bool rows = want == CODEC_PLANES || want == CODEC_TIERS;
    size_t n = 0;

    if (in->len > EXTENT_RAW_MAX || (rows && in->len % 2))
        return larder_fail(e, LARDER_EINVAL, "an extent of %u bytes", in->len);
    if (!c->cctx)
        c->cctx = ZSTD_createCCtx();
    if (!c->stored)
        c->stored = mem_alloc(EXTENT_STORED_MAX, 1);
    if (!c->cctx || !c->stored)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a codec");
    hash_of(in->raw, in->len, hash);
    if (rows && in->len)
        n = encode_rows(c, want, in);
    else if (want == CODEC_ZSTD)
        n = plain_frame(c, in->raw, in->len, c->stored, EXTENT_STORED_MAX);
    *ret_kind = n && n < in->len ? want : CODEC_RAW;
    *ret_stored = *ret_kind == CODEC_RAW ? in->raw : c->stored;
    *ret_len = *ret_kind == CODEC_RAW ? in->len : (uint32_t)n;
    return 0;
}

/* ---- decoding */

static int damaged(struct larder_err *e, const char *what)
{
    return larder_fail(e, LARDER_EDAMAGED, "%s", what);
}

/* Exactly one frame of exactly the declared sizes. */
static int inflate(struct codec *c, const uint8_t *frame, size_t frame_len, uint8_t *dst,
                   size_t len, struct larder_err *e)
{
    size_t rc;

    if (ZSTD_getFrameContentSize(frame, frame_len) != len ||
        ZSTD_findFrameCompressedSize(frame, frame_len) != frame_len)
        return damaged(e, "a zstd frame does not have the declared size");
    rc = ZSTD_decompressDCtx(c->dctx, dst, len, frame, frame_len);
    if (ZSTD_isError(rc))
        return larder_fail(e, LARDER_EDAMAGED, "a zstd frame does not decode: %s",
                           ZSTD_getErrorName(rc));
    return rc == len ? 0 : damaged(e, "a zstd frame does not have the declared size");
}

/* Where the uncompressed bytes come from: bytes, or two planes. Exponents in tiers are decoded just
 * before they are merged, `ready` of them so far. */
struct source {
    const uint8_t *bytes;
    struct channels_at at;
    struct tiers *tiers;
    uint8_t *exponent;
    const uint8_t *rest;
    uint32_t ready;
};

static void produce(struct source *s, uint32_t at, uint32_t n, void *dst)
{
    if (s->bytes) {
        memcpy(dst, s->bytes + at, n);
        return;
    }
    if ((at + n) / 2 > s->ready)
        s->ready = tiers_read(s->tiers, (at + n) / 2, s->exponent);
    channels_merge(&s->at, s->exponent + at / 2, s->rest + at / 2, n / 2, dst);
}

/* Places that are filled one after the other. */
struct outlet {
    const struct codec_piece *piece;
    uint32_t used; /* of it */
};

/* Bytes that come next and lie in one place. There must be some. */
static uint32_t room(struct outlet *o)
{
    if (o->used == o->piece->n)
        *o = (struct outlet){o->piece + 1, 0};
    return o->piece->n - o->used;
}

static uint8_t *take(struct outlet *o, uint32_t n)
{
    uint8_t *to = o->piece->to + o->used;

    o->used += n;
    return to;
}

static void put_block(struct outlet *o, const uint8_t *bytes, uint32_t n)
{
    for (uint32_t some; n; n -= some, bytes += some) {
        uint32_t left = room(o);

        some = n < left ? n : left;
        memcpy(take(o, some), bytes, some);
    }
}

static int deliver(struct codec *c, struct source *s, uint32_t raw_len,
                   const uint8_t hash[EXTENT_HASH_LEN], const struct codec_piece *to,
                   struct larder_err *e)
{
    struct outlet out = {to, 0};
    XXH128_canonical_t canonical;
    uint16_t block[HASH_BLOCK / 2];

    XXH3_128bits_reset(c->hash);
    for (uint32_t at = 0, n; at < raw_len; at += n) {
        void *place = block;

        n = raw_len - at < HASH_BLOCK ? raw_len - at : HASH_BLOCK;
        if (to && room(&out) >= n)
            place = take(&out, n);
        produce(s, at, n, place);
        XXH3_128bits_update(c->hash, place, n);
        if (to && place == block)
            put_block(&out, place, n);
    }
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(c->hash));
    if (memcmp(canonical.digest, hash, EXTENT_HASH_LEN))
        return damaged(e, "the hash of an extent does not match");
    return 0;
}

/* Everything but the bytes themselves: where they will come from. */
static int open_rows(struct codec *c, enum codec_kind kind, const void *stored, uint32_t stored_len,
                     uint32_t raw_len, struct source *s, struct larder_err *e)
{
    struct rd r = rd_init(stored, stored_len);
    uint32_t coded_len = rd_u32(&r), n = raw_len / 2;
    const uint8_t *coded;

    if (raw_len % 2 || channels_read(&c->channels, &r, n))
        return damaged(e, "the channels of an extent are not those of its rows");
    coded = rd_bytes(&r, coded_len);
    if (!rd_ok(&r) || rd_left(&r) != n)
        return damaged(e, "the planes of an extent do not have the declared size");
    *s = (struct source){
        .at = channels_start(&c->channels), .exponent = c->plane, .rest = r.p, .ready = n};
    if (kind == CODEC_PLANES)
        return inflate(c, coded, coded_len, c->plane, n, e);
    if (tiers_open(&c->tiers, tiers_kernel(0), coded, coded_len, n, c->plane + PLANE_MAX))
        return damaged(e, "the tiers of an extent do not have the declared size");
    s->tiers = &c->tiers;
    s->ready = 0;
    return 0;
}

int codec_decode(struct codec *c, enum codec_kind kind, const void *stored, uint32_t stored_len,
                 uint32_t raw_len, const uint8_t hash[EXTENT_HASH_LEN],
                 const struct codec_piece *to, struct larder_err *e)
{
    struct source s = {.bytes = stored};
    int rc = 0;

    if (raw_len > EXTENT_RAW_MAX)
        return damaged(e, "an extent is larger than the format allows");
    if (kind == CODEC_RAW) {
        if (stored_len != raw_len)
            return damaged(e, "an extent does not have the declared size");
    } else if (kind == CODEC_ZSTD) {
        rc = inflate(c, stored, stored_len, c->plane, raw_len, e);
        s.bytes = c->plane;
    } else if (kind == CODEC_PLANES || kind == CODEC_TIERS) {
        rc = open_rows(c, kind, stored, stored_len, raw_len, &s, e);
    } else {
        return damaged(e, "an extent names an unknown codec");
    }
    if (!rc)
        rc = deliver(c, &s, raw_len, hash, to, e);
    if (!rc && kind == CODEC_TIERS && tiers_close(&c->tiers))
        rc = damaged(e, "the tiers of an extent do not have the declared size");
    return rc;
}
