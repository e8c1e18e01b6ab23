/* keep.h - the rows of a layer that stay, gathered for the sink.
 *
 * Purpose    Applies a policy's shape to the scores of a layer, or, where heads of all layers
 *            compete, to those of all layers that a hold (hold.h) has kept. Choosing and
 *            collecting are two calls: with a backend that gathers (select_ops.h) rows are on
 *            their way in between.
 * Ownership  keep_init() allocates, keep_done() frees (also after a failed init). Gathered rows
 *            are borrowed until the next keep_choose(); those that stay with the backend are looked
 *            at by its calls alone (backend_view()).
 * Threads    One caller.
 * Errors     LARDER_ENUMERIC, LARDER_ENOMEM.
 */
#ifndef LARDER_KEEP_H
#define LARDER_KEEP_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

/* K and V of one layer with their scores: borrowed. */
struct layer_rows {
    uint32_t layer;
    uint32_t n, stride;       /* rows, and their capacity per head */
    const uint32_t *position; /* [n] in the document */
    const void *k, *v;        /* [n_kv_heads][stride][head_dim] */
    const double *score;      /* [n_kv_heads][n]; NULL: everything stays */
    const double *worth;      /* the same, or NULL */
};

struct keep {
    struct backend *b;
    const struct select_ops *select; /* NULL: choices are made here */
    const struct policy *policy;
    const struct kv_geom *geom;
    enum kv_dtype elem;
    uint32_t n;      /* rows of the document */
    uint32_t rows;   /* budget per head */
    uint32_t *count; /* [n_layers][n_kv_heads], where known before a layer passes, or NULL */
    uint32_t *now;   /* [n_kv_heads] of the layer at hand */
    uint64_t n_room; /* rows of a layer that are chosen, at most; 0: all stay, always */
    uint64_t n_out;  /* rows that fit what follows; 0: rows are handed on where they are */
    bool changes;    /* they are fitted or packed before they are handed on: where a backend */
    bool stays;      /* gathers, it does that too, and they stay there */
    uint32_t *index; /* chosen: one head after the other */
    uint8_t *k, *v;  /* gathered likewise */
    uint32_t *position;
    struct layer_rows at_hand; /* between choosing and collecting */
    bool all;                  /* and all of them stay */
    struct kept_rows *heads;   /* [n_kv_heads], the result */
};

/* For a document of n rows; *k is zero before. */
int keep_init(struct keep *k, struct backend *b, const struct policy *p, uint32_t n, uint32_t rows,
              struct larder_err *e);
void keep_done(struct keep *k);

/* Must the rows of a layer, of which n are left, be scored? */
bool keep_needs_scores(const struct keep *k, uint32_t n);

/* Is it known only after the last layer which rows stay? */
bool keep_waits(const struct keep *k);

/* What it waited for. */
int keep_count_all(struct keep *k, const struct layer_rows *layers, struct larder_err *e);

/* Choose the rows of a layer. All stay when there are no scores or the budget holds the document.
 * What x points to, but for its scores, stays as it is until the rows are collected. */
int keep_choose(struct keep *k, const struct layer_rows *x, struct larder_err *e);
/* They are in k->heads. */
int keep_collect(struct keep *k, struct larder_err *e);

#endif
