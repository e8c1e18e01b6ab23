/* settle.h - where in a model the ranks of tokens settle: lmin and tau of the adaptive cut.
 *
 * Purpose    An adaptive cut compares the variance of ranks in each layer with that of layer
 *            lmin and cuts where it is below tau times as large (cut.h). Which layer is a good
 *            one to compare with, and how far the variance comes down after it, are properties
 *            of a model: with lmin in a valley the criterion never fires.
 * Units      Layers from 0; tau in thousandths.
 * Threads    No state.
 */
#ifndef LARDER_SETTLE_H
#define LARDER_SETTLE_H

#include <stdbool.h>
#include <stdint.h>

#include "profile_id.h"

/* Traces of the variance in layers first .. n_layers - 1, one after the other. */
struct traces {
    const double *variance; /* [n][n_layers - first], each trace with something above 0 */
    uint32_t n;
    uint32_t first; /* lobs - 1, the first layer with lobs ranks to compare */
    uint32_t n_layers;
};

/* Sets l_min and tau_milli and returns true, or leaves both alone: the ranks of this model do not
 * settle in the middle of it.
 *
 *   lmin  the layer in the first two thirds at which the variance is largest; each trace counts
 *         as a share of its own mean, and of equals the lower layer is taken
 *   tau   the smallest of 0.05, 0.10 ... 0.95 with which the layer of the cut, averaged over the
 *         traces, is not above three quarters of the layers - a trace that never comes down
 *         counts as all layers - if it is then not below one half */
bool settle_choose(const struct traces *t, struct profile_window *w);

#endif
