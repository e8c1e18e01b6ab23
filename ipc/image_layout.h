/* image_layout.h - the one legal layout of a cache image (IMAGE.md), private to the project.
 *
 * Purpose    Both the side that fills an image and the check walk the same cursor, so
 *            an image's offsets follow from its counts and nothing else is accepted.
 * Units      Bytes from the start of the image.
 * Threads    A cursor belongs to one thread.
 * Errors     A size that overflows turns the cursor bad; it stays bad.
 */
#ifndef LARDER_IMAGE_LAYOUT_H
#define LARDER_IMAGE_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"
#include "larder_image.h"

#define IMAGE_HEAD_BYTES 40u /* of one entry of the head table */

/* Offsets of header fields. */
enum {
    IMAGE_AT_MAGIC = 0,
    IMAGE_AT_VERSION = 8,
    IMAGE_AT_HEADER_BYTES = 12,
    IMAGE_AT_N_BYTES = 16,
    IMAGE_AT_FLAGS = 24,
    IMAGE_AT_ZERO1 = 104, /* 24 reserved bytes */
    IMAGE_AT_KEY = 128,
    IMAGE_AT_ZERO2 = 224, /* 32 reserved bytes */
};

struct image_cursor {
    uint64_t at;
    bool bad;
};

struct image_front {
    uint64_t heads_off, tokens_off, logits_off, text_off;
};

/* An array of count * size bytes at the next multiple of `align`; returns its offset. */
uint64_t image_take(struct image_cursor *c, uint64_t align, uint64_t count, uint64_t size);

/* larder_image_check() without a look at token ids, positions and biases: for images whose maker
 * has made it. Every offset and count is checked, so nothing lies outside. */
int image_check_layout(const void *mapping, uint64_t n_bytes, struct larder_image *ret,
                       struct larder_err *e);

/* What stands before the arrays per head; starts the cursor. */
struct image_front image_take_front(struct image_cursor *c, const struct kv_geom *g, uint32_t n_ctx,
                                    uint32_t n_vocab, uint64_t text_len);

#endif
