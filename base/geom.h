/* geom.h - the shape of a model's KV cache and the element types of its rows.
 *
 * Units      Counts. A KV row is one token's K or V vector of one KV head.
 * Threads    No state.
 */
#ifndef LARDER_GEOM_H
#define LARDER_GEOM_H

#include <stdint.h>

#include "larder_status.h"

/* Caps on what a model file, a worker or a stored record may claim; the largest
 * public models stay well below each. Allocation sizes derive from these. */
#define KV_MAX_LAYERS 512u
#define KV_MAX_HEADS 512u
#define KV_MAX_HEAD_DIM 1024u
#define KV_MAX_CTX (1u << 22)   /* tokens of a document */
#define KV_MAX_VOCAB (1u << 22) /* token ids */

#define KV_MAX_TEMPLATE 256u /* bytes of a template's string, with its end */

/* Numbers are stored on disk and in images: append only. */
enum kv_dtype {
    KV_BF16 = 1,
    KV_F16 = 2,
    KV_F32 = 3,
    KV_INT8 = 4, /* stored rows only: FORMAT.md, "Packed tiles" */
    KV_INT4 = 5, /* stored rows only */
};

struct kv_geom {
    uint32_t n_layers;
    uint32_t n_heads;    /* query heads */
    uint32_t n_kv_heads; /* divides n_heads; query head h reads h / (n_heads / n_kv_heads) */
    uint32_t head_dim;   /* elements of a row; even */
};

/* LARDER_EINVAL with a message unless every field is within its cap and consistent. */
int kv_geom_check(const struct kv_geom *g, struct larder_err *e);

/* Bytes of an element of KV_BF16, KV_F16 or KV_F32; 0 for packed types. */
uint32_t kv_dtype_bytes(enum kv_dtype t);

/* "bf16", ...; NULL for a number that is not in the list. */
const char *kv_dtype_name(enum kv_dtype t);

#endif
