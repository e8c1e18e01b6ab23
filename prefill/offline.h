/* offline.h - prefill with a replay: for documents whose questions are not known yet.
 *
 * Purpose    The document's rows and the replay's (replay.h) pass the layers side by side, so
 *            that each layer's rows are scored, refitted (match.h) and handed on while the
 *            layer's complete K and V are there, and no later.
 * Ownership  As engine_prefill(), which calls this.
 * Errors     The engine's; LARDER_EUNSUPPORTED where a share table is needed and none is given.
 */
#ifndef LARDER_OFFLINE_H
#define LARDER_OFFLINE_H

#include "engine.h"
#include "rung.h"

/* n_wants >= 1 policies that share a replay (policy_same_pass()); ret[n_wants], to be freed by
 * the caller also after an error, the logits in the first alone. The first sink's progress()
 * counts the layers. */
int offline_prefill(struct backend *b, const struct engine_doc *doc,
                    const struct rung_want *want, uint32_t n_wants, struct engine_result *ret,
                    struct larder_err *e);

struct offline_watch {
    void *arg;
    /* score[n_kv_heads][n] of each layer in turn. */
    int (*layer)(void *arg, uint32_t layer, const float *score, struct larder_err *e);
    /* As engine_sink.progress; may be NULL. */
    int (*progress)(void *arg, const char *pass, uint32_t layer, uint32_t n_layers);
};

/* The replay scores of every layer, and nothing else. */
int offline_scores(struct backend *b, const struct engine_doc *doc, uint32_t chunk,
                   const struct offline_watch *watch, struct larder_err *e);

#endif
