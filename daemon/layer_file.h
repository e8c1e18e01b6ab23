/* layer_file.h - the rows of one layer as a worker sends them (PROTOCOL.md, W_LAYER).
 *
 * Purpose    A stranger's bytes in, rows that the store may keep out: sizes, positions and finite
 *            numbers are checked here and nowhere later.
 * Ownership  Rows borrow the file's mapping.
 * Threads    No state.
 * Errors     LARDER_EWORKER, LARDER_ENUMERIC.
 */
#ifndef LARDER_LAYER_FILE_H
#define LARDER_LAYER_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"
#include "store.h"

/* What all layers of an entry have in common. */
struct layer_form {
    enum kv_dtype precision; /* KV_BF16, KV_INT8 or KV_INT4 */
    bool has_bias;
};

/* Are all numbers of these rows finite, biases as bf16, in which they are stored? */
bool layer_rows_finite(const struct store_rows *h, struct layer_form form, uint32_t head_dim);

/* rows: [n_kv_heads], each at most KV_MAX_CTX. */
uint64_t layer_file_bytes(const struct kv_geom *g, struct layer_form form, const uint32_t *rows);

/* Fill heads[n_kv_heads] from a file, which is 4-byte aligned. */
int layer_file_read(const void *file, uint64_t n_bytes, const struct kv_geom *g,
                    struct layer_form form, const uint32_t *rows, uint32_t n_ctx,
                    struct store_rows *heads, struct larder_err *e);

#endif
