/* codec.c - exponent planes, zstd frames and their hashes.
 *
 * The one idea: in bf16 rows the exponent byte carries about 2.7 bits and the other byte
 * nearly 8, so only exponents are coded, with Huffman codes alone: matches do not exist
 * there and looking for them costs both time and size. The frame stays a standard one that any zstd
 * reads. Merging works in blocks that stay in cache, so that hashing them is nearly free. */
#define ZSTD_STATIC_LINKING_ONLY
#include "codec.h"

#include <string.h>

#include <xxhash.h>
#include <zstd.h>

#include "bytes.h"
#include "mem.h"

#define PLANE_MAX (EXTENT_RAW_MAX / 2)
#define ZSTD_BLOCK (128u << 10)
#define HASH_BLOCK (16u << 10)
#define MAX_WINDOW_LOG 23 /* 8 MiB: what a hostile frame may ask for */
#define AUX_LEVEL 3
#define FAST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"), optimize("O3")))

struct codec {
    ZSTD_CCtx *cctx;
    ZSTD_DCtx *dctx;
    XXH3_state_t *hash;
    uint8_t *plane;  /* PLANE_MAX: exponents; EXTENT_RAW_MAX for CODEC_ZSTD */
    uint8_t *stored; /* EXTENT_STORED_MAX */
};

struct codec *codec_new(void)
{
    struct codec *c = mem_zalloc(1, sizeof *c);

    if (!c)
        return NULL;
    c->dctx = ZSTD_createDCtx();
    c->hash = XXH3_createState();
    c->plane = mem_alloc(EXTENT_RAW_MAX, 1);
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
    mem_free(c);
}

/* ---- planes: r = rotl16(v, 1) has the exponent in its high byte */

FAST static void split(const uint8_t *raw, uint32_t n, uint8_t *exponent, uint8_t *rest)
{
    for (uint32_t i = 0; i < n; i++) {
        uint16_t v = (uint16_t)(raw[2 * i] | raw[2 * i + 1] << 8);
        uint16_t r = (uint16_t)(v << 1 | v >> 15);

        exponent[i] = (uint8_t)(r >> 8);
        rest[i] = (uint8_t)r;
    }
}

FAST static void merge(const uint8_t *exponent, const uint8_t *rest, uint32_t n, uint16_t *dst)
{
    for (uint32_t i = 0; i < n; i++) {
        uint16_t r = (uint16_t)(exponent[i] << 8 | rest[i]);

        dst[i] = (uint16_t)(r >> 1 | r << 15);
    }
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

/* Bytes written to c->stored, 0 when coding failed. */
static size_t encode(struct codec *c, enum codec_kind want, const void *raw, uint32_t len)
{
    struct wr w = wr_init(c->stored, 4);
    uint32_t n = len / 2;
    size_t frame;

    if (want == CODEC_ZSTD)
        return plain_frame(c, raw, len, c->stored, EXTENT_STORED_MAX);
    /* the frame goes first, so the rest plane waits behind the exponents for its place */
    split(raw, n, c->plane, c->plane + PLANE_MAX);
    frame = huffman_frame(c, c->plane, n, c->stored + 4, EXTENT_STORED_MAX - 4);
    if (!frame || 4 + frame + n > EXTENT_STORED_MAX)
        return 0;
    wr_u32(&w, (uint32_t)frame);
    memcpy(c->stored + 4 + frame, c->plane + PLANE_MAX, n);
    return 4 + frame + n;
}

int codec_encode(struct codec *c, enum codec_kind want, const void *raw, uint32_t len,
                 enum codec_kind *ret_kind, const void **ret_stored, uint32_t *ret_len,
                 uint8_t hash[EXTENT_HASH_LEN], struct larder_err *e)
{
    size_t n = 0;

    if (len > EXTENT_RAW_MAX || (want == CODEC_PLANES && len % 2))
        return larder_fail(e, LARDER_EINVAL, "an extent of %u bytes", len);
    if (!c->cctx)
        c->cctx = ZSTD_createCCtx();
    if (!c->stored)
        c->stored = mem_alloc(EXTENT_STORED_MAX, 1);
    if (!c->cctx || !c->stored)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a codec");
    hash_of(raw, len, hash);
    if (want != CODEC_RAW && len)
        n = encode(c, want, raw, len);
    *ret_kind = n && n < len ? want : CODEC_RAW;
    *ret_stored = *ret_kind == CODEC_RAW ? raw : c->stored;
    *ret_len = *ret_kind == CODEC_RAW ? len : (uint32_t)n;
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

/* Where the uncompressed bytes come from: bytes, or two planes. */
struct source {
    const uint8_t *bytes;
    const uint8_t *exponent, *rest;
};

static void produce(const struct source *s, uint32_t at, uint32_t n, void *dst)
{
    if (s->bytes)
        memcpy(dst, s->bytes + at, n);
    else
        merge(s->exponent + at / 2, s->rest + at / 2, n / 2, dst);
}

static int deliver(struct codec *c, const struct source *s, uint32_t raw_len,
                   const uint8_t hash[EXTENT_HASH_LEN], const struct codec_piece *piece,
                   uint32_t n_pieces, struct larder_err *e)
{
    XXH128_canonical_t canonical;
    uint16_t block[HASH_BLOCK / 2];
    uint32_t at = 0;

    XXH3_128bits_reset(c->hash);
    for (uint32_t p = 0; p < n_pieces; p++) {
        uint8_t *dst = piece[p].dst;

        for (uint32_t done = 0; done < piece[p].len;) {
            uint32_t n = piece[p].len - done < HASH_BLOCK ? piece[p].len - done : HASH_BLOCK;
            void *to = dst ? (void *)(dst + done) : (void *)block;

            produce(s, at, n, to);
            XXH3_128bits_update(c->hash, to, n);
            at += n;
            done += n;
        }
    }
    if (at != raw_len)
        return larder_fail(e, LARDER_EINTERNAL, "pieces of %u bytes for an extent of %u", at,
                           raw_len);
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(c->hash));
    if (memcmp(canonical.digest, hash, EXTENT_HASH_LEN))
        return damaged(e, "the hash of an extent does not match");
    return 0;
}

int codec_decode(struct codec *c, enum codec_kind kind, const void *stored, uint32_t stored_len,
                 uint32_t raw_len, const uint8_t hash[EXTENT_HASH_LEN],
                 const struct codec_piece *piece, uint32_t n_pieces, struct larder_err *e)
{
    struct rd r = rd_init(stored, stored_len);
    struct source s = {.bytes = stored};
    uint32_t frame_len;
    const uint8_t *frame;
    int rc = 0;

    if (raw_len > EXTENT_RAW_MAX)
        return damaged(e, "an extent is larger than the format allows");
    if (kind == CODEC_RAW) {
        if (stored_len != raw_len)
            return damaged(e, "an extent does not have the declared size");
    } else if (kind == CODEC_ZSTD) {
        rc = inflate(c, stored, stored_len, c->plane, raw_len, e);
        s.bytes = c->plane;
    } else if (kind == CODEC_PLANES) {
        frame_len = rd_u32(&r);
        frame = rd_bytes(&r, frame_len);
        if (!rd_ok(&r) || raw_len % 2 || rd_left(&r) != raw_len / 2)
            return damaged(e, "the planes of an extent do not have the declared size");
        rc = inflate(c, frame, frame_len, c->plane, raw_len / 2, e);
        s = (struct source){.exponent = c->plane, .rest = r.p};
    } else {
        return damaged(e, "an extent names an unknown codec");
    }
    return rc ? rc : deliver(c, &s, raw_len, hash, piece, n_pieces, e);
}
