/* cpu_packed.c - rows of int8 and int4 tiles as f32, a block at a time.
 *
 * The one idea: a block is expanded into what a product of a few query rows wants and used while
 * it is in the first caches, so memory gives up codes and nothing else. Eight rows of eight
 * channels are turned in registers; a step then belongs to a whole vector of keys. int4 keys are
 * turned as two planes, even channels and odd ones, since both halves of a byte are needed
 * anyway. The numbers are those of packed_expand_k_f32() and packed_expand_v_f32(). */
#include <string.h>

#include "cpu.h"
#include "fast.h"
#include "half.h"
#include "packed.h"
#include "turn.h"

#define BODY static inline __attribute__((always_inline))

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "scales are read in place");
_Static_assert(PACKED_GROUP % MUL_WIDE == 0, "a panel of int4 keys has one set of steps");

typedef int8_t codes8 __attribute__((vector_size(8), aligned(1), may_alias));
/* Both halves of eight bytes: a vector of bytes has no shift. */
BODY void split_bytes(const uint8_t *p, codes8 *lo, codes8 *hi)
{
    uint64_t both, mask = 0x0f0f0f0f0f0f0f0fu, half;

    memcpy(&both, p, sizeof both);
    half = both & mask;
    memcpy(lo, &half, sizeof half);
    half = both >> 4 & mask;
    memcpy(hi, &half, sizeof half);
}

typedef int16_t wide8 __attribute__((vector_size(16)));
typedef int32_t lanes8 __attribute__((vector_size(32)));

/* Step by step: compilers take a conversion by more than twice the width apart. */
BODY void widen_codes(const codes8 *codes, half_lanes *out)
{
    lanes8 x = __builtin_convertvector(__builtin_convertvector(*codes, wide8), lanes8);

    *out = __builtin_convertvector(x, half_lanes);
}

/* ---- keys */

/* Minima and steps of channels: one of each for eight keys of a channel. */
struct key_scales {
    float min[KV_MAX_HEAD_DIM], step[KV_MAX_HEAD_DIM];
};

BODY void read_key_scales(const uint8_t *scales, bool four, uint32_t d, struct key_scales *s)
{
    for (uint32_t c = 0; c < d && !four; c++)
        s->step[c] = f16_to_f32(packed_u16(scales, c));
    for (uint32_t c = 0; c < d && four; c++) {
        uint32_t both;

        memcpy(&both, scales + 4ull * c, sizeof both);
        s->min[c] = f16_to_f32((uint16_t)both);
        s->step[c] = f16_to_f32((uint16_t)(both >> 16));
    }
}

/* Channel c of eight keys. */
BODY void put_channel(const struct key_scales *s, bool four, uint32_t c, const half_lanes *codes,
                      float *to)
{
    half_lanes x = *codes * s->step[c];

    if (four)
        x += s->min[c];
    *(half_lanes *)(to + (uint64_t)c * MUL_WIDE) = x;
}

BODY float code_at(const uint8_t *row, bool four, uint32_t c)
{
    return four ? (float)(row[c / 2] >> c % 2 * 4 & 15) : (float)(int8_t)row[c];
}

/* n <= 8 rows to half a panel. */
BODY void half_panel(const uint8_t *codes, bool four, const struct key_scales *s, uint32_t n,
                     uint32_t d, float *to)
{
    const uint32_t stride = four ? d / 2 : d, wide = four ? 2 * TURN : TURN;
    uint32_t c = 0;

    for (; c + wide <= d; c += wide) {
        half_lanes even[TURN] = {{0}}, odd[TURN] = {{0}};

        for (uint32_t j = 0; j < n; j++) {
            const uint8_t *from = codes + (uint64_t)j * stride + (four ? c / 2 : c);

            if (four) {
                codes8 lo, hi;

                split_bytes(from, &lo, &hi);
                widen_codes(&lo, &even[j]);
                widen_codes(&hi, &odd[j]);
            } else {
                widen_codes((const codes8 *)from, &even[j]);
            }
        }
        turn8(even);
        if (four)
            turn8(odd);
        for (uint32_t j = 0; j < TURN; j++) {
            put_channel(s, four, four ? c + 2 * j : c + j, &even[j], to);
            if (four)
                put_channel(s, four, c + 2 * j + 1, &odd[j], to);
        }
    }
    for (; c < d; c++) {
        half_lanes x = {0};

        for (uint32_t j = 0; j < n; j++)
            x[j] = code_at(codes + (uint64_t)j * stride, four, c);
        put_channel(s, four, c, &x, to);
    }
}

BODY void panels(const struct packed_rows *p, bool four, uint32_t row, uint32_t n, float *to)
{
    uint32_t d = p->d, stride = four ? d / 2 : d;
    const uint8_t *codes = p->tile + p->parts.codes + (uint64_t)row * stride;
    struct key_scales s;

    for (uint32_t j = 0; j < mul_padded(n); j += TURN) {
        uint32_t left = j < n ? n - j : 0;

        if (j == 0 || (four && j % PACKED_GROUP == 0))
            read_key_scales(p->tile + p->parts.scales +
                                (four ? (uint64_t)(row + j) / PACKED_GROUP * 4 * d : 0),
                            four, d, &s);
        half_panel(codes + (uint64_t)j * stride, four, &s, left < TURN ? left : TURN, d,
                   to + (uint64_t)(j / MUL_WIDE) * MUL_WIDE * d + j % MUL_WIDE);
    }
}

FAST static void panels_int8(const struct packed_rows *p, uint32_t row, uint32_t n, float *to)
{
    panels(p, false, row, n, to);
}

FAST static void panels_int4(const struct packed_rows *p, uint32_t row, uint32_t n, float *to)
{
    panels(p, true, row, n, to);
}

void cpu_packed_keys(const struct packed_rows *p, uint32_t row, uint32_t n, float *panel)
{
    (p->t == KV_INT4 ? panels_int4 : panels_int8)(p, row, n, panel);
}

/* ---- values */

BODY void row_int8(const uint8_t *codes, float step, uint32_t d, float *restrict to)
{
    for (uint32_t c = 0; c < d; c++)
        to[c] = (float)(int8_t)codes[c] * step;
}

/* A group of at most 32 channels, which share a minimum and a step. */
BODY void group_int4(const uint8_t *codes, float min, float step, uint32_t n, float *to)
{
    uint32_t c = 0;

    for (; c + 16 <= n; c += 16) {
        codes8 lo, hi, first, second;
        half_lanes x, y;

        split_bytes(codes + c / 2, &lo, &hi);
        first = __builtin_shufflevector(lo, hi, 0, 8, 1, 9, 2, 10, 3, 11);
        second = __builtin_shufflevector(lo, hi, 4, 12, 5, 13, 6, 14, 7, 15);
        widen_codes(&first, &x);
        widen_codes(&second, &y);
        *(half_lanes *)(to + c) = min + x * step;
        *(half_lanes *)(to + c + 8) = min + y * step;
    }
    for (; c < n; c++)
        to[c] = min + code_at(codes, true, c) * step;
}

FAST static void values_int8(const struct packed_rows *p, uint32_t row, uint32_t n, float *to)
{
    const uint8_t *codes = p->tile + p->parts.codes + (uint64_t)row * p->d;
    const uint8_t *steps = p->tile + p->parts.scales + 2ull * row;

    for (uint32_t j = 0; j < n; j++)
        row_int8(codes + (uint64_t)j * p->d, f16_to_f32(packed_u16(steps, j)), p->d,
                 to + (uint64_t)j * mul_padded(p->d));
}

FAST static void values_int4(const struct packed_rows *p, uint32_t row, uint32_t n, float *to)
{
    uint32_t d = p->d, groups = (d + PACKED_GROUP - 1) / PACKED_GROUP;
    const uint8_t *codes = p->tile + p->parts.codes + (uint64_t)row * (d / 2);
    const uint8_t *scales = p->tile + p->parts.scales + 4ull * groups * row;

    for (uint32_t j = 0; j < n; j++, codes += d / 2, to += mul_padded(d))
        for (uint32_t c = 0; c < d; c += PACKED_GROUP, scales += 4)
            group_int4(codes + c / 2, f16_to_f32(packed_u16(scales, 0)),
                       f16_to_f32(packed_u16(scales, 1)),
                       d - c < PACKED_GROUP ? d - c : PACKED_GROUP, to + c);
}

void cpu_packed_values(const struct packed_rows *p, uint32_t row, uint32_t n, float *to)
{
    (p->t == KV_INT4 ? values_int4 : values_int8)(p, row, n, to);
}
