/* mul_tile.h - the body of a product (mul.h), included once per instruction set.
 *
 * The includer defines MUL_NAME (the function), MUL_LANES (floats of a register, a divisor of
 * 16), MUL_ROWS (rows of a tile, a divisor of 16) and MUL_TARGET (its attributes).
 * Not a header in the ordinary sense: it is included several times, and the macros are
 * gone afterwards.
 */
#include "mul.h"

#ifdef MUL_NAME
#define MUL_PARTS ((int)MUL_WIDE / MUL_LANES)
#define MUL_JOIN2(a, b) a##b
#define MUL_JOIN(a, b) MUL_JOIN2(a, b)
#define MUL_VEC MUL_JOIN(MUL_NAME, _vec)
#define MUL_TILE MUL_JOIN(MUL_NAME, _tile)

typedef float MUL_VEC
    __attribute__((vector_size(MUL_LANES * sizeof(float)), aligned(4), may_alias));

/* One tile: `rows` is a constant at every call, so that the sums live in registers. */
MUL_TARGET static inline __attribute__((always_inline)) void
MUL_TILE(const struct mul *x, const float *a, const float *b, float *c, const int rows)
{
    MUL_VEC acc[MUL_ROWS][MUL_PARTS];

#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < MUL_PARTS; p++)
            acc[r][p] = x->add ? ((const MUL_VEC *)(c + (uint64_t)r * x->c_row))[p] : (MUL_VEC){0};
    for (uint32_t k = 0; k < x->k; k++) {
        const MUL_VEC *row = (const MUL_VEC *)(b + k * x->b_k);

#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int p = 0; p < MUL_PARTS; p++)
                acc[r][p] += a[(uint64_t)r * x->a_row + k * x->a_k] * row[p];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < MUL_PARTS; p++)
            ((MUL_VEC *)(c + (uint64_t)r * x->c_row))[p] = acc[r][p];
}

/* A tile that ends beyond column n goes through a buffer: nothing is written past it. */
MUL_TARGET static inline __attribute__((always_inline)) void
MUL_JOIN(MUL_NAME, _edge)(const struct mul *x, const float *a, const float *b, float *c, uint32_t n)
{
    float buf[MUL_WIDE];
    struct mul one = *x;

    one.c_row = MUL_WIDE;
    for (uint32_t j = 0; j < MUL_WIDE; j++)
        buf[j] = x->add && j < n ? c[j] : 0;
    MUL_TILE(&one, a, b, buf, 1);
    for (uint32_t j = 0; j < n; j++)
        c[j] = buf[j];
}

MUL_TARGET static void MUL_NAME(const struct mul *x)
{
    for (uint32_t j = 0; j < x->n; j += MUL_WIDE) {
        const float *b = x->b + (uint64_t)(j / MUL_WIDE) * x->b_panel;
        float *c = x->c + (uint64_t)(j / MUL_WIDE) * x->c_panel;
        uint32_t i = 0, step;

        for (; i < x->m; i += step) {
            /* 16 is a multiple of MUL_ROWS, so a tile never spans two panels of a */
            const float *a = x->a + i / MUL_WIDE * x->a_panel + i % MUL_WIDE * x->a_row;
            float *to = c + i * x->c_row;
            bool whole = x->n - j >= MUL_WIDE;

            step = whole && x->m - i >= MUL_ROWS ? MUL_ROWS : 1;
            if (step == MUL_ROWS)
                MUL_TILE(x, a, b, to, MUL_ROWS);
            else if (whole)
                MUL_TILE(x, a, b, to, 1);
            else
                MUL_JOIN(MUL_NAME, _edge)(x, a, b, to, x->n - j);
        }
    }
}

#undef MUL_PARTS
#undef MUL_JOIN2
#undef MUL_JOIN
#undef MUL_VEC
#undef MUL_TILE
#undef MUL_NAME
#undef MUL_LANES
#undef MUL_ROWS
#undef MUL_TARGET
#endif
