/* packed.c - quantised tiles.
 *
 * The one idea: scales are turned into rows of f32 before their codes are looked at, so that
 * the loops over codes are plain multiply-and-add over channels, which the compiler makes
 * vectors of (this file is compiled with -O3). Each direction has one body, inlined for AVX2
 * and for any processor; both give the same bits. */
#include "packed.h"

#include <string.h>

#include "half.h"

#define BODY static inline __attribute__((always_inline))
#define LANES 16u

/* ---- sizes */

static uint32_t exact_of(uint32_t rows)
{
    return rows < PACKED_EXACT_ROWS ? rows : PACKED_EXACT_ROWS;
}

/* scales: bytes of all of them. */
static struct packed_parts lay_out(enum kv_dtype t, uint32_t rows, uint32_t d, uint64_t scales)
{
    struct packed_parts p = {.n_exact = exact_of(rows)};

    p.n_packed = rows - p.n_exact;
    p.scales = 2ull * p.n_exact * d;
    p.codes = p.scales + scales;
    p.end = p.codes + (uint64_t)p.n_packed * d / (t == KV_INT4 ? 2 : 1);
    return p;
}

struct packed_parts packed_parts_k(enum kv_dtype t, uint32_t rows, uint32_t d)
{
    uint64_t packed = rows - exact_of(rows);

    if (t == KV_INT4)
        return lay_out(t, rows, d, (packed + PACKED_GROUP - 1) / PACKED_GROUP * 4 * d);
    return lay_out(t, rows, d, packed ? 2ull * d : 0);
}

struct packed_parts packed_parts_v(enum kv_dtype t, uint32_t rows, uint32_t d)
{
    uint64_t packed = rows - exact_of(rows);

    if (t == KV_INT4)
        return lay_out(t, rows, d, packed * ((d + PACKED_GROUP - 1) / PACKED_GROUP) * 4);
    return lay_out(t, rows, d, packed * 2);
}

uint64_t tile_bytes_k(enum kv_dtype t, uint32_t rows, uint32_t d)
{
    return packed_type(t) ? packed_parts_k(t, rows, d).end : (uint64_t)rows * d * kv_dtype_bytes(t);
}

uint64_t tile_bytes_v(enum kv_dtype t, uint32_t rows, uint32_t d)
{
    return packed_type(t) ? packed_parts_v(t, rows, d).end : (uint64_t)rows * d * kv_dtype_bytes(t);
}

/* ---- one tile in either direction */

struct work {
    enum kv_dtype t;
    bool keys;
    struct packed_parts parts;
    uint32_t d;
    const float *rows; /* packing: the rows after the exact ones */
    uint8_t *tile;
    const uint8_t *from; /* expanding */
    uint16_t *narrow;    /* one of these two is wanted */
    float *wide;
};

typedef void work_fn(const struct work *w);

static void put16(uint8_t *p, uint64_t i, uint16_t v)
{
    p[2 * i] = (uint8_t)v;
    p[2 * i + 1] = (uint8_t)(v >> 8);
}

static float half_at(const uint8_t *p, uint64_t i)
{
    return f16_to_f32(packed_u16(p, i));
}

/* Rows with a common scale start at `row`; how many are there? */
static uint32_t group_rows(enum kv_dtype t, uint32_t row, uint32_t n)
{
    return t == KV_INT4 && n - row > PACKED_GROUP ? PACKED_GROUP : n - row;
}

/* ---- packing */

/* To the nearest integer, ties to even; |x| below 2^22. */
BODY int32_t nearest(float x)
{
    return (int32_t)(f32_bits(x + 12582912.0f) - 0x4b400000u);
}

BODY int32_t clamp(int32_t x, int32_t lo, int32_t hi)
{
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

static float one_over(float step)
{
    return step > 0 ? 1 / step : 0;
}

/* Which zero a range of both ends at depends on who looked: + 0.0f makes it the one without a sign.
 * int4: minimum and step of a range, as stored; *lo becomes the stored minimum. */
static float put_range(uint8_t *scales, uint64_t i, float *lo, float hi)
{
    uint16_t min = f32_to_f16(*lo + 0.0f), step;

    *lo = f16_to_f32(min);
    /* the rounded minimum may lie above a narrow range */
    step = f32_to_f16(hi > *lo ? (hi - *lo) / 15 : 0);
    put16(scales, 2 * i, min);
    put16(scales, 2 * i + 1, step);
    return one_over(f16_to_f32(step));
}

/* int8: the step for elements from lo to hi. */
static float put_step(uint8_t *scales, uint64_t i, float lo, float hi)
{
    uint16_t step = f32_to_f16((-lo > hi ? -lo : hi) / 127 + 0.0f);

    put16(scales, i, step);
    return one_over(f16_to_f32(step));
}

/* Codes of a row: in q one a byte; int4 then puts two in each. */
BODY void code_row(const float *restrict x, const float *restrict lo, const float *restrict inv,
                   uint32_t d, bool four, uint8_t *restrict codes)
{
    uint8_t q[KV_MAX_HEAD_DIM];

    if (!four) {
        for (uint32_t c = 0; c < d; c++)
            codes[c] = (uint8_t)clamp(nearest(x[c] * inv[c]), -127, 127);
        return;
    }
    for (uint32_t c = 0; c < d; c++)
        q[c] = (uint8_t)clamp(nearest((x[c] - lo[c]) * inv[c]), 0, 15);
    for (uint32_t c = 0; c < d / 2; c++)
        codes[c] = (uint8_t)(q[2 * c] | q[2 * c + 1] << 4);
}

/* Smallest and largest of each channel over n rows. */
BODY void channel_ranges(const float *restrict x, uint32_t n, uint32_t d, float *restrict lo,
                         float *restrict hi)
{
    memcpy(lo, x, d * sizeof *lo);
    memcpy(hi, x, d * sizeof *hi);
    for (uint32_t r = 1; r < n; r++) {
        x += d;
        for (uint32_t c = 0; c < d; c++) {
            lo[c] = x[c] < lo[c] ? x[c] : lo[c];
            hi[c] = x[c] > hi[c] ? x[c] : hi[c];
        }
    }
}

BODY void pack_keys(const struct work *w, bool four)
{
    float lo[KV_MAX_HEAD_DIM], hi[KV_MAX_HEAD_DIM], inv[KV_MAX_HEAD_DIM];
    uint8_t *scales = w->tile + w->parts.scales, *codes = w->tile + w->parts.codes;
    uint32_t d = w->d, n;

    for (uint32_t row = 0; row < w->parts.n_packed; row += n) {
        const float *x = w->rows + (uint64_t)row * d;

        n = group_rows(w->t, row, w->parts.n_packed);
        channel_ranges(x, n, d, lo, hi);
        for (uint32_t c = 0; c < d; c++)
            inv[c] = four ? put_range(scales, c, &lo[c], hi[c]) : put_step(scales, c, lo[c], hi[c]);
        scales += 4ull * d;
        for (uint32_t r = 0; r < n; r++, x += d, codes += four ? d / 2 : d)
            code_row(x, lo, inv, d, four, codes);
    }
}

/* Smallest and largest of n > 0 channels of a row; in lanes, since their order does not matter. */
BODY void row_range(const float *x, uint32_t n, float *lo, float *hi)
{
    float min[LANES], max[LANES];
    uint32_t c = 0;

    for (uint32_t l = 0; l < LANES; l++)
        min[l] = max[l] = x[0];
    for (; c + LANES <= n; c += LANES)
        for (uint32_t l = 0; l < LANES; l++) {
            min[l] = x[c + l] < min[l] ? x[c + l] : min[l];
            max[l] = x[c + l] > max[l] ? x[c + l] : max[l];
        }
    for (; c < n; c++) {
        min[0] = x[c] < min[0] ? x[c] : min[0];
        max[0] = x[c] > max[0] ? x[c] : max[0];
    }
    *lo = min[0];
    *hi = max[0];
    for (uint32_t l = 1; l < LANES; l++) {
        *lo = min[l] < *lo ? min[l] : *lo;
        *hi = max[l] > *hi ? max[l] : *hi;
    }
}

BODY void pack_values(const struct work *w, bool four)
{
    float lo[KV_MAX_HEAD_DIM], inv[KV_MAX_HEAD_DIM];
    uint8_t *scales = w->tile + w->parts.scales, *codes = w->tile + w->parts.codes;
    uint32_t d = w->d, wide = four ? PACKED_GROUP : d;
    const float *x = w->rows;
    uint64_t at = 0;

    for (uint32_t row = 0; row < w->parts.n_packed; row++, x += d) {
        for (uint32_t c0 = 0, c1; c0 < d; c0 = c1) {
            float min, max, scale;

            c1 = d - c0 > wide ? c0 + wide : d;
            row_range(x + c0, c1 - c0, &min, &max);
            scale = four ? put_range(scales, at, &min, max) : put_step(scales, at, min, max);
            at++;
            for (uint32_t c = c0; c < c1; c++) {
                lo[c] = min;
                inv[c] = scale;
            }
        }
        code_row(x, lo, inv, d, four, codes);
        codes += four ? d / 2 : d;
    }
}

BODY void pack_body(const struct work *w)
{
    bool four = w->t == KV_INT4;

    if (w->keys && four)
        pack_keys(w, true);
    else if (w->keys)
        pack_keys(w, false);
    else if (four)
        pack_values(w, true);
    else
        pack_values(w, false);
}

/* ---- expanding */

/* Codes as signed bytes, one each. */
BODY void spread(const uint8_t *restrict codes, uint32_t d, bool four, int8_t *restrict q)
{
    if (!four)
        memcpy(q, codes, d);
    for (uint32_t c = 0; four && c < d / 2; c++) {
        q[2 * c] = (int8_t)(codes[c] & 15);
        q[2 * c + 1] = (int8_t)(codes[c] >> 4);
    }
}

/* A row of f32 to where it is wanted. */
BODY void row_out(const struct work *w, uint64_t at, const float *restrict x)
{
    uint16_t *restrict narrow = w->narrow + at;

    for (uint32_t c = 0; c < w->d; c++)
        narrow[c] = f32_to_bf16(x[c]);
}

BODY void expand_keys(const struct work *w, bool four, bool to_f32)
{
    const uint8_t *scales = w->from + w->parts.scales, *codes = w->from + w->parts.codes;
    uint64_t at = (uint64_t)w->parts.n_exact * w->d;
    float lo[KV_MAX_HEAD_DIM], step[KV_MAX_HEAD_DIM], row[KV_MAX_HEAD_DIM], *x;
    int8_t q[KV_MAX_HEAD_DIM];
    uint32_t d = w->d;

    for (uint32_t i = 0; i < w->parts.n_packed; i++, at += d) {
        if (four ? i % PACKED_GROUP == 0 : i == 0) {
            for (uint32_t c = 0; c < d; c++) {
                lo[c] = four ? half_at(scales, 2ull * c) : 0;
                step[c] = half_at(scales, four ? 2ull * c + 1 : c);
            }
            scales += 4ull * d;
        }
        spread(codes, d, four, q);
        codes += four ? d / 2 : d;
        x = to_f32 ? w->wide + at : row;
        for (uint32_t c = 0; c < d; c++)
            x[c] = four ? lo[c] + (float)q[c] * step[c] : (float)q[c] * step[c];
        if (!to_f32)
            row_out(w, at, row);
    }
}

BODY void expand_values(const struct work *w, bool four, bool to_f32)
{
    const uint8_t *scales = w->from + w->parts.scales, *codes = w->from + w->parts.codes;
    uint64_t at = (uint64_t)w->parts.n_exact * w->d;
    float row[KV_MAX_HEAD_DIM], *x;
    int8_t q[KV_MAX_HEAD_DIM];
    uint32_t d = w->d, wide = four ? PACKED_GROUP : d;

    for (uint32_t i = 0; i < w->parts.n_packed; i++, at += d) {
        x = to_f32 ? w->wide + at : row;
        spread(codes, d, four, q);
        codes += four ? d / 2 : d;
        for (uint32_t c0 = 0; c0 < d; c0 += wide) {
            uint32_t n = d - c0 < wide ? d - c0 : wide;
            float lo = four ? half_at(scales, 0) : 0, step = half_at(scales, four);

            scales += four ? 4 : 2;
            for (uint32_t c = c0; c < c0 + n; c++)
                x[c] = four ? lo + (float)q[c] * step : (float)q[c] * step;
        }
        if (!to_f32)
            row_out(w, at, row);
    }
}

BODY void expand_as(const struct work *w, bool four, bool to_f32)
{
    if (w->keys)
        expand_keys(w, four, to_f32);
    else
        expand_values(w, four, to_f32);
}

BODY void expand_body(const struct work *w)
{
    if (w->t == KV_INT4)
        w->wide ? expand_as(w, true, true) : expand_as(w, true, false);
    else
        w->wide ? expand_as(w, false, true) : expand_as(w, false, false);
}

/* ---- for this processor */

static void pack_any(const struct work *w)
{
    pack_body(w);
}

static void expand_any(const struct work *w)
{
    expand_body(w);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void pack_avx2(const struct work *w)
{
    pack_body(w);
}

__attribute__((target("avx2"))) static void expand_avx2(const struct work *w)
{
    expand_body(w);
}

static work_fn *pick(work_fn *any, work_fn *avx2)
{
    return __builtin_cpu_supports("avx2") ? avx2 : any;
}
#else
#define pick(any, avx2) (any)
#endif

/* ---- entry points */

static void from_rows(enum kv_dtype t, bool keys, const float *rows, uint32_t n, uint32_t d,
                      uint8_t *tile)
{
    struct work w = {.t = t, .keys = keys, .d = d, .tile = tile};

    w.parts = keys ? packed_parts_k(t, n, d) : packed_parts_v(t, n, d);
    for (uint64_t i = 0; i < (uint64_t)w.parts.n_exact * d; i++)
        put16(tile, i, f32_to_bf16(rows[i]));
    w.rows = rows + (uint64_t)w.parts.n_exact * d;
    pick(pack_any, pack_avx2)(&w);
}

void packed_from_k(enum kv_dtype t, const float *rows, uint32_t n, uint32_t d, uint8_t *tile)
{
    from_rows(t, true, rows, n, d, tile);
}

void packed_from_v(enum kv_dtype t, const float *rows, uint32_t n, uint32_t d, uint8_t *tile)
{
    from_rows(t, false, rows, n, d, tile);
}

static void expand(enum kv_dtype t, bool keys, const uint8_t *tile, uint32_t n, uint32_t d,
                   uint16_t *narrow, float *wide)
{
    struct work w = {.t = t, .keys = keys, .d = d, .from = tile, .narrow = narrow, .wide = wide};

    w.parts = keys ? packed_parts_k(t, n, d) : packed_parts_v(t, n, d);
    for (uint64_t i = 0; i < (uint64_t)w.parts.n_exact * d; i++) {
        if (wide)
            wide[i] = bf16_to_f32(packed_u16(tile, i));
        else
            narrow[i] = packed_u16(tile, i);
    }
    pick(expand_any, expand_avx2)(&w);
}

void packed_expand_k(enum kv_dtype t, const uint8_t *tile, uint32_t n, uint32_t d, uint16_t *out)
{
    expand(t, true, tile, n, d, out, NULL);
}

void packed_expand_v(enum kv_dtype t, const uint8_t *tile, uint32_t n, uint32_t d, uint16_t *out)
{
    expand(t, false, tile, n, d, out, NULL);
}

void packed_expand_k_f32(enum kv_dtype t, const uint8_t *tile, uint32_t n, uint32_t d, float *out)
{
    expand(t, true, tile, n, d, NULL, out);
}

void packed_expand_v_f32(enum kv_dtype t, const uint8_t *tile, uint32_t n, uint32_t d, float *out)
{
    expand(t, false, tile, n, d, NULL, out);
}

/* Exact rows are bf16, scales f16: neither may have all exponent bits set. */
static bool tile_finite(const uint8_t *tile, const struct packed_parts *p)
{
    uint32_t bad = 0;

    for (uint64_t i = 0; i < p->scales / 2; i++)
        bad |= (packed_u16(tile, i) & 0x7f80u) == 0x7f80u;
    for (uint64_t i = p->scales / 2; i < p->codes / 2; i++)
        bad |= (packed_u16(tile, i) & 0x7c00u) == 0x7c00u;
    return !bad;
}

bool packed_finite_k(enum kv_dtype t, const uint8_t *tile, uint32_t n, uint32_t d)
{
    struct packed_parts p = packed_parts_k(t, n, d);

    return tile_finite(tile, &p);
}

bool packed_finite_v(enum kv_dtype t, const uint8_t *tile, uint32_t n, uint32_t d)
{
    struct packed_parts p = packed_parts_v(t, n, d);

    return tile_finite(tile, &p);
}
