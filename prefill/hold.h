/* hold.h - rows of all layers, kept until it is known which ones stay.
 *
 * Purpose    Layer-major prefill has one layer's K and V at a time; where the heads of all
 *            layers compete, each layer's are copied here with their scores.
 * Units      Memory: the full cache in the backend's element type, and 8 bytes a score.
 * Ownership  hold_init() allocates, hold_add() copies, hold_done() frees (also after a
 *            failed init).
 * Threads    One caller.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_HOLD_H
#define LARDER_HOLD_H

#include "keep.h"

struct hold {
    struct backend *b;
    const struct kv_geom *geom;
    enum kv_dtype elem;
    struct layer_rows *layers; /* [n_layers], those that were added */
};

int hold_init(struct hold *h, struct backend *b, struct larder_err *e);
void hold_done(struct hold *h);

/* x->score is there; layers come in any order, each once. */
int hold_add(struct hold *h, const struct layer_rows *x, struct larder_err *e);

#endif
