/* ladder.h - rows=auto: as few rows as the certificate allows.
 *
 * Purpose    Some documents are served by a sixteenth of their rows and some need half. Every
 *            budget of a ladder - 3.1, 6.25, 12.5 and 25 percent beside each other from one replay
 *            (engine_prefill_each()), if need be 37.5 and 50 from a second, and all from a
 *            third - gets its certificate, and the smallest that stays within the policy's max_kl
 *            is handed on.
 *            A document too short to be certified keeps everything.
 * Errors     The engine's; LARDER_EBUDGET where not even all rows, in the policy's precision, are
 *            within max_kl: nothing was handed on.
 */
#ifndef LARDER_LADDER_H
#define LARDER_LADDER_H

#include "engine.h"

/* As engine_prefill(), for a policy with rows=auto. */
int ladder_prefill(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                   const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e);

#endif
