/* profile_id.h - the identity of a table of shares (a model's calibration).
 *
 * Purpose    What a pruned cache holds depends on the table that its budget was shared out by,
 *            so its policy names the table: whoever reads or writes one computes this name
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

/* First digits of SHA-256 over version 1, n_heads, n_budgets (u32 LE), budget[n_budgets] and
 * share[n_budgets][n_heads] (f32 LE). LARDER_ENOMEM. */
int profile_id(uint32_t n_heads, uint32_t n_budgets, const float *budget, const float *share,
               char out[PROFILE_ID_LEN + 1], struct larder_err *e);

/* Has the string the form of one? */
bool profile_id_valid(const char *s);

#endif
