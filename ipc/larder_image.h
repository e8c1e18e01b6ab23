/* larder_image.h - the cache image that a decoder maps (IMAGE.md).
 *
 * Purpose    One read-only, sealed memory file holds everything a decoder needs to
 *            resume: ragged K and V rows per layer and KV head, their original
 *            positions, an optional bias per row, tokens, text and the last row's
 *            logits. It is used in place. larder_image_check() looks at every
 *            offset and count before anything else does.
 * Units      Offsets and sizes are bytes from the start of the image; counts are
 *            rows or tokens. All integers are little-endian.
 * Ownership  A `struct larder_image` borrows the mapping it was made from.
 * Threads    Read-only; any number of threads.
 * Errors     LARDER_EVERSION, LARDER_EDAMAGED (with what is wrong), LARDER_EINVAL (a mapping that
 *            is not aligned), LARDER_ENOMEM never.
 */
#ifndef LARDER_IMAGE_H
#define LARDER_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LARDER_IMAGE_MAGIC 0x4d4952454452414cull /* "LARDERIM" */
#define LARDER_IMAGE_VERSION 1u
#define LARDER_IMAGE_HEADER_BYTES 256u
#define LARDER_IMAGE_ALIGN 64u   /* of every array */
#define LARDER_IMAGE_PAGE 4096u  /* of the first array of every layer, and of the size */

#define LARDER_IMAGE_HAS_BIAS 1u   /* every (layer, head) has a bias array */
#define LARDER_IMAGE_RENUMBERED 2u /* keys are rotated by row index, not by position */

/* Element type of the rows: the numbers of enum kv_dtype. */
#define LARDER_ROWS_BF16 1u
#define LARDER_ROWS_F16 2u
#define LARDER_ROWS_F32 3u
#define LARDER_ROWS_INT8 4u /* tiles (IMAGE.md section 4); only when packed rows were asked for */
#define LARDER_ROWS_INT4 5u

/* What the header says, in native form. */
struct larder_image {
    const uint8_t *base; /* borrowed */
    uint64_t n_bytes;    /* of the whole image */
    uint32_t n_layers, n_heads, n_kv_heads, head_dim;
    uint32_t dtype; /* LARDER_ROWS_* */
    uint32_t flags; /* LARDER_IMAGE_* */
    uint32_t n_ctx;    /* tokens of the document */
    uint32_t next_pos; /* position of the first new token */
    uint32_t n_vocab;
    uint32_t n_tokens; /* == n_ctx */
    uint64_t text_len;
    uint8_t key[32];
    uint8_t model_fingerprint[32];
    uint8_t tokenizer_fingerprint[32];
    uint64_t tokens_off, text_off, logits_off, heads_off;
};

/* The rows of one (layer, KV head). Pointers borrow the mapping. */
struct larder_rows {
    uint32_t n_rows;
    const void *k;            /* [n_rows][head_dim], after RoPE (rotate-half order), or a tile */
    const void *v;            /* [n_rows][head_dim], or a tile */
    const uint32_t *position; /* [n_rows], ascending, original */
    const float *bias;        /* [n_rows], to be added to the logit, or NULL */
};

/* Check every count and offset, tokens, positions and biases, and fill *ret. `mapping` must be
 * 64-byte aligned. Row data, logits and text are not read: any bytes are legal there. */
LARDER_API int larder_image_check(const void *mapping, uint64_t n_bytes, struct larder_image *ret,
                                  struct larder_err *e);

/* Rows of `layer` and `kv_head`; both must be in range. */
LARDER_API struct larder_rows larder_image_rows(const struct larder_image *im, uint32_t layer,
                                                uint32_t kv_head);

LARDER_API const uint32_t *larder_image_tokens(const struct larder_image *im); /* [n_tokens] */
LARDER_API const char *larder_image_text(const struct larder_image *im); /* [text_len], no NUL */
LARDER_API const float *larder_image_logits(const struct larder_image *im); /* [n_vocab] */

#ifdef __cplusplus
}
#endif
#endif
