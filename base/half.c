/* half.c - IEEE binary16 in integer arithmetic, so that every machine agrees. */
#include "half.h"

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exp = (h >> 10) & 0x1fu;
    uint32_t man = h & 0x3ffu;

    if (exp == 0x1f)
        return bits_f32(sign | 0x7f800000u | (man << 13));
    if (exp)
        return bits_f32(sign | ((exp + 112) << 23) | (man << 13));
    /* subnormal: man * 2^-24 is exact in f32 */
    return bits_f32(sign | f32_bits((float)man * 0x1p-24f));
}

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
