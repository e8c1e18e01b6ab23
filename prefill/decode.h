/* decode.h - resume generation on a pruned, ragged cache (notes: PRUNING 13).
 *
 * Purpose    Question rows sit at next_pos and on; each attends to all stored rows of its
 *            (layer, KV head), plus bias, and causally to the rows before it. New K/V go to a
 *            private tail; the cache stays read-only. Any number of new tokens per call.
 * Ownership  decode_open() allocates, decode_close() frees (NULL allowed); past rows are borrowed.
 * Threads    A session belongs to one thread.
 * Errors     LARDER_ETOOLONG past the model's positions, LARDER_ENUMERIC, and the backend's.
 */
#ifndef LARDER_DECODE_H
#define LARDER_DECODE_H

#include <stdint.h>

#include "backend.h"

struct decode;
struct weights; /* all layers and the head, loaded once, shared by sessions */

int weights_load(struct weights **ret, struct backend *b, struct larder_err *e);
void weights_free(struct weights *w);

/* past: [n_layers * n_kv_heads]; max_new: rows the tail may hold. */
int decode_open(struct decode **ret, struct backend *b, const struct weights *w,
                const struct past_rows *past, uint32_t next_pos, uint32_t max_new,
                struct larder_err *e);
void decode_close(struct decode *d);

/* Append ids; logits[n_vocab] of the last one. */
int decode_step(struct decode *d, const uint32_t *ids, uint32_t n, float *logits,
                struct larder_err *e);

/* The same with the logits [n_last][n_vocab] of the last n_last ids (1..n): what scoring a known
 * answer needs. */
int decode_step_rows(struct decode *d, const uint32_t *ids, uint32_t n, uint32_t n_last,
                     float *logits, struct larder_err *e);

/* Forget all new tokens but the first n_keep, of which there must be as many. */
void decode_rewind(struct decode *d, uint32_t n_keep);

#endif
