/* half.c - IEEE binary16 in integer arithmetic, so that every machine agrees. */
#include "half.h"

uint16_t f32_to_f16(float f)
{
    uint32_t u = f32_bits(f);
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    uint32_t a = u & 0x7fffffffu;
    uint32_t shift, man, half;

    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) /* rounds past 65504 */
        return (uint16_t)(sign | 0x7c00u);
    if (a < 0x33000001u) /* at most half of the smallest subnormal */
        return sign;
    if (a >= 0x38800000u) { /* normal: a carry out of the mantissa raises the exponent */
        a -= 0x38000000u;
        return (uint16_t)(sign | ((a + 0xfffu + ((a >> 13) & 1u)) >> 13));
    }
    shift = 126 - (a >> 23); /* 14 to 24 */
    man = (a & 0x7fffffu) | 0x800000u;
    half = 1u << (shift - 1);
    return (uint16_t)(sign | ((man + half - 1 + ((man >> shift) & 1u)) >> shift));
}
