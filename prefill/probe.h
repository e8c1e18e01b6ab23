/* probe.h - a question about nothing in particular, for scoring documents by (obs=probe).
 *
 * Ownership  Ids are mem_free()d by the caller.
 * Errors     LARDER_EUNSUPPORTED for a model without a tokenizer, LARDER_ENOMEM.
 */
#ifndef LARDER_PROBE_H
#define LARDER_PROBE_H

#include <stddef.h>
#include <stdint.h>

#include "model.h"

/* Token ids that follow the document's own; none of them is stored. */
int probe_ids(const struct model *m, uint32_t **ret, size_t *ret_n, struct larder_err *e);

#endif
