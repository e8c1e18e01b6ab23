/* packed.h - int8 and int4 tiles (FORMAT.md, "Packed tiles").
 *
 * Purpose    Quantise rows into tiles and expand tiles to bf16. The first four rows of a
 *            tile stay exact: attention sinks do not survive quantisation.
 * Shapes     rows: [n_rows][head_dim] f32; out: [n_rows][head_dim] bf16.
 * Source     Codes of KIVI (arXiv 2402.02750): keys per channel, values per token.
 * Threads    No state.
 */
#ifndef LARDER_PACKED_H
#define LARDER_PACKED_H

#include "manifest.h"

/* Write tile_bytes_k() / tile_bytes_v() bytes to tile; precision KV_INT8 or KV_INT4. */
void packed_from_k(enum kv_dtype precision, const float *rows, uint32_t n_rows, uint32_t head_dim,
                   uint8_t *tile);
void packed_from_v(enum kv_dtype precision, const float *rows, uint32_t n_rows, uint32_t head_dim,
                   uint8_t *tile);

void packed_expand_k(enum kv_dtype precision, const uint8_t *tile, uint32_t n_rows,
                     uint32_t head_dim, uint16_t *out);
void packed_expand_v(enum kv_dtype precision, const uint8_t *tile, uint32_t n_rows,
                     uint32_t head_dim, uint16_t *out);

#endif
