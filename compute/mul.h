/* mul.h - products of f32 matrices whose operands lie in panels of 16 columns.
 *
 * Purpose    The one fast f32 product beside oneDNN's: attention, replay scores and the normal
 *            equations of matching multiply small blocks that are in cache already and
 *            laid out for it, many times, from pool items.
 * Shapes     a [m][k], b [k][n], c [m][n]; columns of b and c in panels of MUL_WIDE that may
 *            stand anywhere; rows of a likewise, so that a product with a transposed
 *            operand needs no copy. Whole panels of b are read: pad its last one.
 * Order      Each element is one chain over k of fused multiply-adds (plain ones on a processor
 *            without them): its bits depend on neither blocking nor threads.
 * Threads    No state.
 */
#ifndef LARDER_MUL_H
#define LARDER_MUL_H

#include <stdbool.h>
#include <stdint.h>

#define MUL_WIDE 16u

struct mul {
    const float *a; /* element (i, l): a[i / 16 * a_panel + i % 16 * a_row + l * a_k] */
    uint64_t a_row, a_k, a_panel;
    const float *b; /* element (l, j): b[j / 16 * b_panel + l * b_k + j % 16] */
    uint64_t b_k, b_panel;
    float *c; /* element (i, j): c[j / 16 * c_panel + i * c_row + j % 16] */
    uint64_t c_row, c_panel;
    uint32_t m, n, k;
    bool add; /* to what is in c */
};

typedef void mul_fn(const struct mul *x);

/* The fastest product for this processor. */
mul_fn *mul_pick(void);

static inline uint32_t mul_padded(uint32_t n)
{
    return (n + MUL_WIDE - 1) / MUL_WIDE * MUL_WIDE;
}

#endif
