/* profile_id.h - the identity of a model's calibration.
 *
 * Purpose    What a pruned cache holds depends on the numbers that were measured on its model,
 *            so its policy names them: whoever reads or writes a profile computes this name
 *            from the numbers and never takes another's word for it.
 * Units      Budgets and shares are fractions, 0 to 1.
 * Threads    No state.
 */
#ifndef LARDER_PROFILE_ID_H
#define LARDER_PROFILE_ID_H

#include <stdbool.h>
#include <stdint.h>

#include "larder_status.h"

#define PROFILE_ID_LEN 12 /* hex digits */

/* What policies take that rank tokens by a window of queries and leave these open (`auto`). */
struct profile_window {
    uint32_t pool;  /* pooling kernel, odd; 0: nothing here was measured */
    uint32_t l_min; /* first layer whose ranks are compared; 0: this and tau were not measured */
    uint32_t tau_milli; /* thousandths, 1 to 1000 */
};

/* First digits of SHA-256 over version 1, n_heads, n_budgets (u32 LE), budget[n_budgets] and
 * share[n_budgets][n_heads] (f32 LE); with a window over version 2, the same, and pool, l_min
 * and tau_milli (u32 LE). LARDER_ENOMEM. */
int profile_id(uint32_t n_heads, uint32_t n_budgets, const float *budget, const float *share,
               const struct profile_window *window, char out[PROFILE_ID_LEN + 1],
               struct larder_err *e);

/* Has the string the form of one? */
bool profile_id_valid(const char *s);

#endif
