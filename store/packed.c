/* packed.c - quantised tiles in plain loops.
 *
 * The one idea: a tile is exact rows, then scales, then codes. A `grid` says which scale
 * an element uses, so that keys (steps per channel) and values (steps per row) share the
 * same loops for reading and writing codes. */
#include "packed.h"

#include <math.h>

#include "half.h"

#define EXACT_ROWS 4u
#define GROUP 32u

static uint16_t le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static float half_at(const uint8_t *p)
{
    return f16_to_f32(le16(p));
}

/* Which scale record belongs to packed row i, channel c. */
struct grid {
    uint32_t row_group, col_group; /* rows and channels that share a scale */
    uint32_t per_row;              /* scale records per row group */
    uint32_t n_records;
};

static struct grid key_grid(enum kv_dtype t, uint32_t packed, uint32_t d)
{
    uint32_t rows = t == KV_INT8 ? (packed ? packed : 1) : GROUP;

    return (struct grid){rows, 1, d, (packed + rows - 1) / rows * d};
}

static struct grid value_grid(enum kv_dtype t, uint32_t packed, uint32_t d)
{
    uint32_t cols = t == KV_INT8 ? d : GROUP, per_row = (d + cols - 1) / cols;

    return (struct grid){1, cols, per_row, packed * per_row};
}

static uint32_t record_of(const struct grid *g, uint32_t row, uint32_t col)
{
    return row / g->row_group * g->per_row + col / g->col_group;
}

/* ---- packing */

/* Smallest and largest element of each record's cell. */
static void range_of(const struct grid *g, uint32_t record, const float *rows, uint32_t n,
                     uint32_t d, float *lo, float *hi)
{
    uint32_t row0 = record / g->per_row * g->row_group, col0 = record % g->per_row * g->col_group;
    uint32_t row1 = row0 + g->row_group < n ? row0 + g->row_group : n;
    uint32_t col1 = col0 + g->col_group < d ? col0 + g->col_group : d;

    *lo = INFINITY;
    *hi = -INFINITY;
    for (uint32_t r = row0; r < row1; r++)
        for (uint32_t c = col0; c < col1; c++) {
            *lo = fminf(*lo, rows[(uint64_t)r * d + c]);
            *hi = fmaxf(*hi, rows[(uint64_t)r * d + c]);
        }
}

static uint32_t code_of(float x, float lo, float step, float max)
{
    float q = step > 0 ? nearbyintf((x - lo) / step) : 0;

    return (uint32_t)fminf(fmaxf(q, 0), max);
}

static void pack(enum kv_dtype t, const struct grid *g, const float *rows, uint32_t n, uint32_t d,
                 uint8_t *scales, uint8_t *codes)
{
    for (uint32_t i = 0; i < g->n_records; i++) {
        float lo, hi;

        range_of(g, i, rows, n, d, &lo, &hi);
        if (t == KV_INT8) {
            put16(scales + 2 * i, f32_to_f16(fmaxf(fabsf(lo), fabsf(hi)) / 127));
        } else {
            put16(scales + 4 * i, f32_to_f16(lo));
            put16(scales + 4 * i + 2, f32_to_f16((hi - lo) / 15));
        }
    }
    for (uint64_t at = 0; at < (uint64_t)n * d; at++) {
        uint32_t i = record_of(g, (uint32_t)(at / d), (uint32_t)(at % d));

        if (t == KV_INT8) {
            float scale = half_at(scales + 2 * i);
            float q = scale > 0 ? nearbyintf(rows[at] / scale) : 0;

            codes[at] = (uint8_t)(int8_t)fminf(fmaxf(q, -127), 127);
        } else {
            uint32_t q =
                code_of(rows[at], half_at(scales + 4 * i), half_at(scales + 4 * i + 2), 15);

            codes[at / 2] = (uint8_t)(at % 2 ? (codes[at / 2] & 15) | q << 4 : q);
        }
    }
}

static uint32_t exact_of(uint32_t n_rows)
{
    return n_rows < EXACT_ROWS ? n_rows : EXACT_ROWS;
}

static void from(enum kv_dtype t, const struct grid *g, const float *rows, uint32_t n_rows,
                 uint32_t d, uint8_t *tile)
{
    uint32_t exact = exact_of(n_rows);
    uint8_t *scales = tile + 2ull * exact * d;

    for (uint32_t i = 0; i < exact * d; i++)
        put16(tile + 2 * i, f32_to_bf16(rows[i]));
    pack(t, g, rows + (uint64_t)exact * d, n_rows - exact, d, scales,
         scales + (t == KV_INT8 ? 2ull : 4ull) * g->n_records);
}

void packed_from_k(enum kv_dtype precision, const float *rows, uint32_t n_rows, uint32_t head_dim,
                   uint8_t *tile)
{
    struct grid g = key_grid(precision, n_rows - exact_of(n_rows), head_dim);

    from(precision, &g, rows, n_rows, head_dim, tile);
}

void packed_from_v(enum kv_dtype precision, const float *rows, uint32_t n_rows, uint32_t head_dim,
                   uint8_t *tile)
{
    struct grid g = value_grid(precision, n_rows - exact_of(n_rows), head_dim);

    from(precision, &g, rows, n_rows, head_dim, tile);
}

/* ---- expanding */

static void expand(enum kv_dtype t, const struct grid *g, const uint8_t *tile, uint32_t n_rows,
                   uint32_t d, uint16_t *out)
{
    uint32_t exact = exact_of(n_rows);
    const uint8_t *scales = tile + 2ull * exact * d;
    const uint8_t *codes = scales + (t == KV_INT8 ? 2ull : 4ull) * g->n_records;

    for (uint32_t i = 0; i < exact * d; i++)
        out[i] = le16(tile + 2 * i);
    out += (uint64_t)exact * d;
    for (uint64_t at = 0; at < (uint64_t)(n_rows - exact) * d; at++) {
        uint32_t i = record_of(g, (uint32_t)(at / d), (uint32_t)(at % d));
        float x;

        if (t == KV_INT8)
            x = (float)(int8_t)codes[at] * half_at(scales + 2 * i);
        else
            x = half_at(scales + 4 * i) +
                (float)(codes[at / 2] >> (at % 2 * 4) & 15) * half_at(scales + 4 * i + 2);
        out[at] = f32_to_bf16(x);
    }
}

void packed_expand_k(enum kv_dtype precision, const uint8_t *tile, uint32_t n_rows,
                     uint32_t head_dim, uint16_t *out)
{
    struct grid g = key_grid(precision, n_rows - exact_of(n_rows), head_dim);

    expand(precision, &g, tile, n_rows, head_dim, out);
}

void packed_expand_v(enum kv_dtype precision, const uint8_t *tile, uint32_t n_rows,
                     uint32_t head_dim, uint16_t *out)
{
    struct grid g = value_grid(precision, n_rows - exact_of(n_rows), head_dim);

    expand(precision, &g, tile, n_rows, head_dim, out);
}
