/* dequant.c - block formats of GGUF, one short loop each.
 *
 * The one idea: the loops are written so that the compiler vectorises them, and are
 * compiled for several instruction sets at once; without floating-point contraction all
 * of them give the same bits. Block layouts follow the GGUF specification. */
#include "dequant.h"

#include <string.h>

#include "half.h"

#define K_BLOCK 256
#define FAST                                                                                       \
    __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3", "fp-contract="      \
                                                                               "off")))

static uint16_t le16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static void f32_blocks(const uint8_t *src, size_t n, float *dst)
{
    memcpy(dst, src, n * sizeof *dst);
}

static void f16_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = f16_to_f32(le16(src + 2 * i));
}

static void bf16_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = bf16_to_f32(le16(src + 2 * i));
}

/* f16 scale, 16 bytes of nibbles: low ones first, offset 8. */
FAST static void q4_0_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 18, dst += 32) {
        float d = f16_to_f32(le16(src));

        for (int j = 0; j < 16; j++) {
            dst[j] = (float)((src[2 + j] & 15) - 8) * d;
            dst[j + 16] = (float)((src[2 + j] >> 4) - 8) * d;
        }
    }
}

/* f16 scale, f16 minimum, nibbles. */
FAST static void q4_1_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 20, dst += 32) {
        float d = f16_to_f32(le16(src)), m = f16_to_f32(le16(src + 2));

        for (int j = 0; j < 16; j++) {
            dst[j] = (float)(src[4 + j] & 15) * d + m;
            dst[j + 16] = (float)(src[4 + j] >> 4) * d + m;
        }
    }
}

static uint32_t le32(const uint8_t *p)
{
    return (uint32_t)le16(p) | (uint32_t)le16(p + 2) << 16;
}

/* f16 scale, 32 fifth bits, nibbles, offset 16. */
FAST static void q5_0_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 22, dst += 32) {
        float d = f16_to_f32(le16(src));
        uint32_t high = le32(src + 2);

        for (unsigned j = 0; j < 16; j++) {
            int lo = (src[6 + j] & 15) | (int)((high >> j & 1) << 4);
            int hi = (src[6 + j] >> 4) | (int)((high >> (j + 16) & 1) << 4);

            dst[j] = (float)(lo - 16) * d;
            dst[j + 16] = (float)(hi - 16) * d;
        }
    }
}

FAST static void q5_1_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 24, dst += 32) {
        float d = f16_to_f32(le16(src)), m = f16_to_f32(le16(src + 2));
        uint32_t high = le32(src + 4);

        for (unsigned j = 0; j < 16; j++) {
            int lo = (src[8 + j] & 15) | (int)((high >> j & 1) << 4);
            int hi = (src[8 + j] >> 4) | (int)((high >> (j + 16) & 1) << 4);

            dst[j] = (float)lo * d + m;
            dst[j + 16] = (float)hi * d + m;
        }
    }
}

FAST static void q8_0_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 34, dst += 32) {
        float d = f16_to_f32(le16(src));

        for (int j = 0; j < 32; j++)
            dst[j] = (float)(int8_t)src[2 + j] * d;
    }
}

/* Six-bit scale and minimum number j (0..7) of a K block's 12 packed bytes. */
static void k_scale_min(const uint8_t *s, int j, float *scale, float *min)
{
    if (j < 4) {
        *scale = (float)(s[j] & 63);
        *min = (float)(s[j + 4] & 63);
    } else {
        *scale = (float)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (float)((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

/* f16 d, f16 dmin, 12 bytes of scales, 128 bytes of nibbles; 8 groups of 32. */
FAST static void q4_k_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 144, dst += K_BLOCK) {
        float d = f16_to_f32(le16(src)), dmin = f16_to_f32(le16(src + 2));

        for (int g = 0; g < 8; g++) {
            const uint8_t *q = src + 16 + g / 2 * 32;
            int shift = g % 2 * 4;
            float scale, min;

            k_scale_min(src + 4, g, &scale, &min);
            scale *= d;
            min *= dmin;
            for (int l = 0; l < 32; l++)
                dst[g * 32 + l] = scale * (float)(q[l] >> shift & 15) - min;
        }
    }
}

/* As q4_k with 32 bytes of fifth bits (bit g of byte l) before the nibbles. */
FAST static void q5_k_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 176, dst += K_BLOCK) {
        float d = f16_to_f32(le16(src)), dmin = f16_to_f32(le16(src + 2));
        const uint8_t *high = src + 16;

        for (int g = 0; g < 8; g++) {
            const uint8_t *q = src + 48 + g / 2 * 32;
            int shift = g % 2 * 4;
            float scale, min;

            k_scale_min(src + 4, g, &scale, &min);
            scale *= d;
            min *= dmin;
            for (int l = 0; l < 32; l++) {
                int v = (q[l] >> shift & 15) | (high[l] >> g & 1) << 4;

                dst[g * 32 + l] = scale * (float)v - min;
            }
        }
    }
}

/* 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, f16 d; halves of 128. */
FAST static void q6_k_blocks(const uint8_t *src, size_t n, float *dst)
{
    for (size_t b = 0; b < n; b++, src += 210, dst += K_BLOCK) {
        float d = f16_to_f32(le16(src + 208));

        for (int g = 0; g < 8; g++) {
            const uint8_t *low = src + g / 4 * 64 + g % 2 * 32;
            const uint8_t *high = src + 128 + g / 4 * 32;
            const int8_t *scale = (const int8_t *)src + 192 + g * 2;
            int low_shift = g % 4 / 2 * 4, high_shift = g % 4 * 2;

            for (int l = 0; l < 32; l++) {
                int v = (low[l] >> low_shift & 15) | (high[l] >> high_shift & 3) << 4;

                dst[g * 32 + l] = d * (float)scale[l / 16] * (float)(v - 32);
            }
        }
    }
}

static const struct tensor_format formats[] = {
    {TENSOR_F32, "F32", 1, 4, f32_blocks},
    {TENSOR_F16, "F16", 1, 2, f16_blocks},
    {TENSOR_Q4_0, "Q4_0", 32, 18, q4_0_blocks},
    {TENSOR_Q4_1, "Q4_1", 32, 20, q4_1_blocks},
    {TENSOR_Q5_0, "Q5_0", 32, 22, q5_0_blocks},
    {TENSOR_Q5_1, "Q5_1", 32, 24, q5_1_blocks},
    {TENSOR_Q8_0, "Q8_0", 32, 34, q8_0_blocks},
    {TENSOR_Q4_K, "Q4_K", K_BLOCK, 144, q4_k_blocks},
    {TENSOR_Q5_K, "Q5_K", K_BLOCK, 176, q5_k_blocks},
    {TENSOR_Q6_K, "Q6_K", K_BLOCK, 210, q6_k_blocks},
    {TENSOR_BF16, "BF16", 1, 2, bf16_blocks},
};

const struct tensor_format *tensor_format(uint32_t type)
{
    for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++)
        if (formats[i].type == type)
            return &formats[i];
    return NULL;
}

FAST void dequant_round_bf16(const float *src, size_t n, uint16_t *dst)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t u = f32_bits(src[i]);
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        uint32_t nan = (u >> 16) | 0x40u;

        dst[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
}
