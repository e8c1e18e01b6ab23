/* pick.h - which tokens of a document are worth repeating.
 *
 * Purpose    A replay of half or a quarter of the tokens costs as much less. Tokens whose keys
 *            point away from the others' carry what the document says once; random ones in their
 *            place lose most of what a replay is for.
 * Source     KeyDiff, arXiv 2504.15364, as a choice of what to replay: kvpress' KVSquared.
 * Shapes     Chunks as in replay.h: the same share of each.
 * Ownership  The caller's.
 * Threads    Results do not depend on the backend's.
 * Errors     LARDER_ENOMEM, LARDER_ENUMERIC, the backend's.
 */
#ifndef LARDER_PICK_H
#define LARDER_PICK_H

#include <stdbool.h>

#include "engine.h"
#include "replay.h"

/* chosen[n]: `percent` of the tokens of each chunk, by the mean KeyDiff score over the KV heads of
 * the first layers, which a pass of its own goes through. */
int pick_tokens(struct backend *b, const struct engine_doc *doc, const struct replay *r,
                uint32_t percent, const struct engine_sink *sink, bool *chosen,
                struct larder_err *e);

#endif
