/* pack.h - kept rows become tiles, where the policy stores int8 or int4.
 *
 * Purpose    The last thing that happens to a layer's rows before the sink sees them. With a
 *            backend that packs, tiles are on their way between packer_layer() and packer_wait().
 * Ownership  Tiles belong to the packer and hold until its next layer; packer_done() frees.
 * Threads    One.
 * Errors     LARDER_ENUMERIC: an element is not finite or further out than f16 steps reach;
 *            LARDER_ENOMEM.
 */
#ifndef LARDER_PACK_H
#define LARDER_PACK_H

#include "engine.h"

struct packer {
    struct backend *b; /* that packs (select_ops.h); NULL: the host does */
    enum kv_dtype to;  /* of the tiles that are on their way */
    uint8_t *tiles;
    uint32_t *bad; /* [n_kv_heads], a backend's word */
    float *rows;   /* of one head, widened */
    uint64_t tile_cap, row_cap;
};

/* Turn the rows of heads[n_kv_heads] into tiles of `precision`; any precision but int8 and int4
 * leaves them alone. */
int packer_layer(struct packer *p, const struct kv_geom *g, enum kv_dtype precision,
                 struct kept_rows *heads, struct larder_err *e);
/* Until tiles that are on their way are there, and checked. */
int packer_wait(const struct packer *p, uint32_t n_kv_heads, struct larder_err *e);
void packer_done(struct packer *p);

#endif
