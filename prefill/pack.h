/* pack.h - kept rows become tiles, where the policy stores int8 or int4.
 *
 * Purpose    The last thing that happens to a layer's rows before the sink sees them.
 * Ownership  Tiles belong to the packer and hold until its next layer; packer_done() frees.
 * Threads    One.
 * Errors     LARDER_ENUMERIC: an element is not finite or further out than f16 steps reach;
 *            LARDER_ENOMEM.
 */
#ifndef LARDER_PACK_H
#define LARDER_PACK_H

#include "engine.h"

struct packer {
    uint8_t *tiles;
    float *rows; /* of one head, widened */
    uint64_t tile_cap, row_cap;
};

/* Turn the rows of heads[n_kv_heads] into tiles of `precision`. Heads that are tiles of that
 * precision already, and any precision but int8 and int4, are left alone. */
int packer_layer(struct packer *p, const struct kv_geom *g, enum kv_dtype precision,
                 struct kept_rows *heads, struct larder_err *e);
void packer_done(struct packer *p);

#endif
