/* main_past.h - what a question attends to, and the answer it gets.
 *
 * Purpose    An image, a pruned prefill and a full one all end as a list of past rows per
 *            (layer, KV head); the same decode goes on from each.
 * Ownership  past_done() and answer_done() free; both accept what was never filled (zeroed).
 * Threads    One.
 * Errors     The engine's, the image's, LARDER_EINVAL for an image of another model.
 */
#ifndef LARDER_MAIN_PAST_H
#define LARDER_MAIN_PAST_H

#include "main_common.h"

#include "decode.h"
#include "textout.h"

struct past {
    struct past_rows *rows; /* [n_layers * n_kv_heads], owned */
    uint32_t n_ctx, next_pos;
    const void *map; /* the image's */
    const uint32_t *tokens; /* [n_ctx] of an image; borrowed from the map */
    uint64_t map_bytes;
    struct cache cache; /* the prefill's */
    struct engine_result result;
};

int past_from_image(const struct engine_setup *s, int fd, struct past *p, struct larder_err *e);
int past_from_document(const struct engine_setup *s, const struct document *d,
                       const struct policy *policy, struct past *p, struct larder_err *e);
void past_done(struct past *p);

/* The same for each of n policy strings, one after the other; neighbours that share a pass
 * (engine_prefill_each()) are computed together. with_kv: K and V are wanted, not only which rows
 * stay. */
typedef int past_run(void *arg, const struct policy *policy, struct past *p, struct larder_err *e);
int past_each(const struct engine_setup *s, const struct document *d, const char *const *text,
              uint32_t n, bool with_kv, past_run *run, void *arg, struct larder_err *e);

/* Kept rows over all layers and KV heads, and their bytes as they are stored. */
uint64_t past_n_rows(const struct engine_setup *s, const struct past *p);
uint64_t past_row_bytes(const struct engine_setup *s, const struct past *p);

struct answer {
    uint32_t *ids; /* [max] */
    uint32_t n, max;
    bool ignore_eos;
    struct text_out text;
};

int answer_init(struct answer *a, uint32_t max, struct larder_err *e);
void answer_done(struct answer *a);

/* Greedy: the most likely token, ties to the lower id. */
uint32_t answer_best(const float *logits, uint32_t n_vocab);

/* Take a token; false when the answer is complete: it was the end token, or the last one. */
bool answer_take(const struct engine_setup *s, struct answer *a, uint32_t id);

/* Go on from `logits` [n_vocab], which are overwritten, until the answer is complete. */
int answer_generate(const struct engine_setup *s, struct decode *d, float *logits, struct answer *a,
                    struct larder_err *e);

json_t *json_ids(const uint32_t *ids, size_t n);

#endif
