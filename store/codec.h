/* codec.h - lossless coding of one extent (FORMAT.md, "Codecs").
 *
 * Purpose    bf16 rows are split into exponents, which are coded, and a plane of signs and
 *            mantissas, which does not compress (channels.h). An XXH3-128 over the uncompressed
 *            bytes is taken on the way in and out.
 * Ownership  codec_new() allocates, codec_free() frees (NULL allowed).
 * Threads    A codec belongs to one thread at a time.
 * Errors     LARDER_EDAMAGED for bytes that do not decode to what was declared.
 */
#ifndef LARDER_CODEC_H
#define LARDER_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "channels.h"
#include "larder_status.h"

#define EXTENT_RAW_MAX (1u << 20)
#define EXTENT_STORED_MAX (EXTENT_RAW_MAX + 4096u)
#define EXTENT_HASH_LEN 16

enum codec_kind {
    CODEC_RAW = 0,    /* bytes as they are */
    CODEC_PLANES = 1, /* bf16: the exponents in a zstd frame */
    CODEC_ZSTD = 2,   /* a zstd frame */
    CODEC_TIERS = 3,  /* bf16: the exponents in tiers (tiers.h) */
    CODEC_COUNT,
};

struct codec;

struct codec *codec_new(void); /* NULL when memory is out */
void codec_free(struct codec *c);

/* What there is to code: raw[0..len), len <= EXTENT_RAW_MAX; for bf16 codecs also what its rows
 * are. */
struct codec_input {
    const void *raw;
    uint32_t len;
    const struct channel_rows *rows; /* len / 2 elements */
};

/* Code it with `want`, or CODEC_RAW where that is not larger. *ret_stored is borrowed from the
 * codec (or is `raw`) until the next call. */
int codec_encode(struct codec *c, enum codec_kind want, const struct codec_input *in,
                 enum codec_kind *ret_kind, const void **ret_stored, uint32_t *ret_len,
                 uint8_t hash[EXTENT_HASH_LEN], struct larder_err *e);

/* EXTENT_RAW_MAX bytes to decode into, kept with the codec; NULL when memory is out. */
uint8_t *codec_buffer(struct codec *c);

/* Where decoded bytes go: a list of pieces whose lengths add up to all of them. */
struct codec_piece {
    uint8_t *to;
    uint32_t n;
};

/* Decode raw_len bytes (NULL: decode and hash only) and compare the hash. What is in the pieces is
 * only to be used when it returns 0. */
int codec_decode(struct codec *c, enum codec_kind kind, const void *stored, uint32_t stored_len,
                 uint32_t raw_len, const uint8_t hash[EXTENT_HASH_LEN],
                 const struct codec_piece *to, struct larder_err *e);

#endif
