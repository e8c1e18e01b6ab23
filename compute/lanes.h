/* lanes.h - 16 fixed lanes, as two vectors of eight that every instruction set can hold.
 *
 * The order of a sum is that of the lanes and not of the instruction set, so every variant of
 * a function gives the same bits. Vectors are passed by address: by value they would change
 * the calling convention where a set does not have them.
 */
#ifndef LARDER_LANES_H
#define LARDER_LANES_H

#include <stdint.h>

#define LANES 16u

typedef float half_lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t half_mask __attribute__((vector_size(32), aligned(4), may_alias));

typedef uint32_t half_bits __attribute__((vector_size(32)));
typedef uint16_t half_bf16 __attribute__((vector_size(16), aligned(2), may_alias));

/* Eight bf16 as f32. */
static inline __attribute__((always_inline)) void widen_lanes(const uint16_t *x, half_lanes *out)
{
    *out = (half_lanes)(__builtin_convertvector(*(const half_bf16 *)x, half_bits) << 16);
}

/* Pairwise. */
static inline __attribute__((always_inline)) float sum_lanes(const half_lanes *a,
                                                             const half_lanes *b)
{
    half_lanes c = *a + *b;

    return ((c[0] + c[4]) + (c[2] + c[6])) + ((c[1] + c[5]) + (c[3] + c[7]));
}

#endif
