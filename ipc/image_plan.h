/* image_plan.h - laying out a new cache image: for the side that fills it.
 *
 * Purpose    From counts alone compute every offset, then write the header and
 *            the head table; the caller fills the arrays in place.
 * Ownership  The plan is heap memory: image_plan_free().
 * Threads    No state.
 * Errors     LARDER_ETOOBIG when a size overflows or passes `max_bytes`.
 */
#ifndef LARDER_IMAGE_PLAN_H
#define LARDER_IMAGE_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"
#include "larder_image.h"

struct image_spec {
    struct kv_geom geom;
    enum kv_dtype dtype;
    bool has_bias;
    bool renumbered;
    uint32_t n_ctx, next_pos, n_vocab;
    uint64_t text_len;
    const uint32_t *rows; /* [n_layers * n_kv_heads]; borrowed during the call */
    uint8_t key[32], model_fingerprint[32], tokenizer_fingerprint[32];
};

/* Where the arrays of one (layer, KV head) go: offsets from the image's start. */
struct image_slot {
    uint32_t n_rows;
    uint64_t k_off, v_off, position_off, bias_off; /* bias_off 0: none */
};

struct image_plan {
    struct image_spec spec; /* spec.rows is NULL here */
    uint64_t n_bytes;
    uint64_t tokens_off, text_off, logits_off, heads_off;
    struct image_slot *slot; /* [n_layers * n_kv_heads] */
};

int image_plan_new(struct image_plan **ret, const struct image_spec *spec, uint64_t max_bytes,
                   struct larder_err *e);
void image_plan_free(struct image_plan *p); /* accepts NULL */

/* Write header and head table into `base`, which has p->n_bytes zeroed bytes. */
void image_plan_write(const struct image_plan *p, void *base);

#endif
