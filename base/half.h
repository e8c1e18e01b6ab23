/* half.h - bf16 and f16 conversions, round to nearest even.
 *
 * Threads    No state. Scalar; vector kernels have their own and are tested
 *            against these.
 */
#ifndef LARDER_HALF_H
#define LARDER_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float bits_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline float bf16_to_f32(uint16_t h)
{
    return bits_f32((uint32_t)h << 16);
}

/* NaN stays NaN (quiet), everything else rounds to nearest even. */
static inline uint16_t f32_to_bf16(float f)
{
    uint32_t u = f32_bits(f), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;

    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40u : rounded);
}

/* Without branches, so that a loop of it becomes vectors. */
static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    uint32_t normal = (rest << 13) + (112u << 23);
    uint32_t tiny = f32_bits((float)(int32_t)rest * 0x1p-24f); /* exact in f32 */
    uint32_t odd = rest << 13 | 0x7f800000u;                   /* infinite or NaN */

    normal = rest < 0x400u ? tiny : normal;
    return bits_f32(sign | (rest >= 0x7c00u ? odd : normal));
}

uint16_t f32_to_f16(float f); /* overflow gives infinity */

#endif
