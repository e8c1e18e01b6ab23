/* packed.h - int8 and int4 tiles (FORMAT.md, "Packed tiles"): sizes, packing, expanding.
 *
 * Purpose    The rows of one KV head as codes with scales: keys per channel, values per row,
 *            since a key's channels and a value's rows differ most in range. The first rows of a
 *            tile stay exact: attention sinks do not survive quantisation.
 * Shapes     rows and f32 output: [n_rows][head_dim] f32; bf16 output: the same in bf16. Tiles
 *            may lie at any address.
 * Source     Codes of KIVI (arXiv 2402.02750).
 * Threads    No state.
 * Errors     None: counts are the caller's to cap (rows at KV_MAX_CTX, head_dim even and at most
 *            KV_MAX_HEAD_DIM), and every byte string of the right length is a tile.
 */
#ifndef LARDER_PACKED_H
#define LARDER_PACKED_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"

#define PACKED_EXACT_ROWS 4u /* first rows of a packed tile: bf16 */
#define PACKED_GROUP 32u     /* int4: rows (keys) or channels (values) that share a step */

static inline bool packed_type(enum kv_dtype t)
{
    return t == KV_INT8 || t == KV_INT4;
}

/* Bytes of a tile of the given type: of rows * head_dim elements where it is not packed. */
uint64_t tile_bytes_k(enum kv_dtype t, uint32_t rows, uint32_t head_dim);
uint64_t tile_bytes_v(enum kv_dtype t, uint32_t rows, uint32_t head_dim);

/* Where the parts of a packed tile begin, in bytes from its start. Exact rows begin at 0. */
struct packed_parts {
    uint32_t n_exact, n_packed;
    uint64_t scales, codes, end;
};
struct packed_parts packed_parts_k(enum kv_dtype t, uint32_t rows, uint32_t head_dim);
struct packed_parts packed_parts_v(enum kv_dtype t, uint32_t rows, uint32_t head_dim);

/* Write tile_bytes_k() / tile_bytes_v() bytes to tile; t is KV_INT8 or KV_INT4. Rows must be
 * finite: a NaN would be stored as some number. Elements that f16 steps cannot reach (beyond
 * 65,504) make a tile for which packed_finite_*() is false. */
void packed_from_k(enum kv_dtype t, const float *rows, uint32_t n_rows, uint32_t head_dim,
                   uint8_t *tile);
void packed_from_v(enum kv_dtype t, const float *rows, uint32_t n_rows, uint32_t head_dim,
                   uint8_t *tile);

void packed_expand_k(enum kv_dtype t, const uint8_t *tile, uint32_t n_rows, uint32_t head_dim,
                     uint16_t *out);
void packed_expand_v(enum kv_dtype t, const uint8_t *tile, uint32_t n_rows, uint32_t head_dim,
                     uint16_t *out);

/* The same without the last rounding: what a decoder of packed rows computes with. */
void packed_expand_k_f32(enum kv_dtype t, const uint8_t *tile, uint32_t n_rows, uint32_t head_dim,
                         float *out);
void packed_expand_v_f32(enum kv_dtype t, const uint8_t *tile, uint32_t n_rows, uint32_t head_dim,
                         float *out);

/* Are exact rows, steps and minima finite? Then so is every element. */
bool packed_finite_k(enum kv_dtype t, const uint8_t *tile, uint32_t n_rows, uint32_t head_dim);
bool packed_finite_v(enum kv_dtype t, const uint8_t *tile, uint32_t n_rows, uint32_t head_dim);

/* i-th f16 or bf16 bits at p, which need not be aligned. */
static inline uint16_t packed_u16(const uint8_t *p, uint64_t i)
{
    return (uint16_t)(p[2 * i] | p[2 * i + 1] << 8);
}

#endif
