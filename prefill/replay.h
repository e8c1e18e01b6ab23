/* replay.h - reading a document a second time to see which rows that takes.
 *
 * Purpose    Offline nobody has asked yet; the one question whose answer needs every part of
 *            a document is to repeat it. Chunk by chunk the model is asked to, with
 *            the chunk's own tokens forced, and the attention that these replay rows pay
 *            to the chunk's rows is the score. Replay rows are never stored.
 * Source     KVzip, arXiv 2505.23416, section 3; prompts and normaliser as its evaluation in
 *            kvpress 0.5.5 has them.
 * Shapes     Replay rows of all chunks follow one another; a chunk's rows see all n document
 *            rows and, causally, their own chunk's. Positions start at n for each chunk.
 * Ownership  replay_plan() allocates, replay_free() frees (NULL allowed).
 * Threads    Work is spread over the backend's; results do not depend on them.
 * Errors     LARDER_ETOOLONG when no chunk fits behind the document in the model's positions,
 *            LARDER_ENUMERIC, LARDER_ENOMEM.
 */
#ifndef LARDER_REPLAY_H
#define LARDER_REPLAY_H

#include <stdbool.h>

#include "backend.h"
#include "template.h"

#define REPLAY_SINKS 4u /* first rows that take part in every normaliser */

struct replay_chunk {
    uint32_t start, end; /* document tokens that are repeated */
    uint32_t first, n;   /* rows of the replay */
};

struct replay {
    uint32_t n_doc;
    struct replay_chunk *chunk; /* from the end of the chat form's head to that of the document */
    uint32_t n_chunks;
    uint32_t n_rows;
    uint32_t max_rows; /* of a chunk */
    uint32_t *ids;     /* [n_rows] */
    uint32_t *pos;     /* [n_rows] */
};

/* Chunks of at most `chunk` tokens, fewer where the model's positions end. tmpl NULL: the
 * prompt stands without a chat form. */
int replay_plan(struct replay **ret, const struct model *m, const struct template *tmpl,
                const uint32_t *ids, uint32_t n, uint32_t chunk, struct larder_err *e);
void replay_free(struct replay *r);

/* Leave only the chosen tokens of each chunk, without its prompt: chosen[n_doc]. */
void replay_thin(struct replay *r, const uint32_t *ids, const bool *chosen);

/* What the scores of one layer are made from. */
struct replay_rows {
    const void *q; /* [n_heads][stride][head_dim]: document rows, then replay rows */
    const void *k; /* [n_kv_heads][stride][head_dim] likewise */
    uint64_t stride;
    /* KVzip+, or NULL: a probability is multiplied by both */
    const float *worth;  /* [n_heads][n_doc]: what the row's value adds to the output */
    const float *length; /* [replay rows]: 1 / length of the layer's input after its norm */
};

/* score[n_kv_heads][n_doc] = the largest probability that any replay row of the chunk and any
 * query head of the group gives the row, softmax over the first rows, the chunk and the
 * replay rows before it; 0 for rows that no chunk repeats. */
int replay_score(struct backend *b, const struct replay *r, const struct replay_rows *x,
                 float *score, struct larder_err *e);

#endif
