/* cuda_dequant.cu - stored weights become elements.
 *
 * The one idea: one thread an element, each format one short function that says what element j of
 * a block is. Products and sums are rounded one after the other (this file is compiled without
 * fused multiply-add), so f32 results are those of dequant.c bit for bit. */
#include "cuda_prim.cuh"
#include "dequant.h"

/* Element j of a block of 32 with a scale, perhaps a minimum, perhaps fifth bits. */
template <bool five, bool min> PRIM float small(const uint8_t *b, uint32_t j, int offset)
{
    const uint8_t *at = b + (min ? 4 : 2), *nibble = at + (five ? 4 : 0);
    int q = nibble[j % 16] >> (j / 16 * 4) & 15;
    float d = prim_f16(b);

    if (five)
        q |= (at[j / 8] >> (j % 8) & 1) << 4;
    return min ? (float)q * d + prim_f16(b + 2) : (float)(q - offset) * d;
}

/* Six-bit scale and minimum number j of a K block's 12 bytes. */
PRIM void scale_min(const uint8_t *s, uint32_t j, float *scale, float *min)
{
    if (j < 4) {
        *scale = (float)(s[j] & 63);
        *min = (float)(s[j + 4] & 63);
    } else {
        *scale = (float)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (float)((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

template <bool five> PRIM float q45_k(const uint8_t *b, uint32_t j)
{
    uint32_t g = j / 32, l = j % 32;
    const uint8_t *q = b + (five ? 48 : 16) + g / 2 * 32;
    int v = q[l] >> (g % 2 * 4) & 15;
    float scale, min;

    if (five)
        v |= (b[16 + l] >> g & 1) << 4;
    scale_min(b + 4, g, &scale, &min);
    return prim_f16(b) * scale * (float)v - prim_f16(b + 2) * min;
}

PRIM float q6_k(const uint8_t *b, uint32_t j)
{
    uint32_t g = j / 32, l = j % 32;
    int low = b[g / 4 * 64 + g % 2 * 32 + l] >> (g % 4 / 2 * 4) & 15;
    int high = b[128 + g / 4 * 32 + l] >> (g % 4 * 2) & 3;
    int scale = (int8_t)b[192 + g * 2 + l / 16];

    return prim_f16(b + 208) * (float)scale * (float)((low | high << 4) - 32);
}

PRIM float element(uint32_t type, const uint8_t *b, uint32_t j)
{
    switch (type) {
    case TENSOR_F32:
        return prim_float(b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
    case TENSOR_F16:
        return prim_f16(b);
    case TENSOR_BF16:
        return prim_bf16(b);
    case TENSOR_Q4_0:
        return small<false, false>(b, j, 8);
    case TENSOR_Q4_1:
        return small<false, true>(b, j, 0);
    case TENSOR_Q5_0:
        return small<true, false>(b, j, 16);
    case TENSOR_Q5_1:
        return small<true, true>(b, j, 0);
    case TENSOR_Q8_0:
        return (float)(int8_t)b[2 + j] * prim_f16(b);
    case TENSOR_Q4_K:
        return q45_k<false>(b, j);
    case TENSOR_Q5_K:
        return q45_k<true>(b, j);
    default: /* TENSOR_Q6_K: the host asks for no other */
        return q6_k(b, j);
    }
}

template <typename T> __global__ void dequant_kernel(struct cuda_dequant_args a)
{
    for (uint64_t i = prim_thread(); i < a.n; i += prim_threads()) {
        const uint8_t *b = a.src + i / a.block_len * a.block_bytes;

        prim_store((T *)a.dst + i, element(a.type, b, (uint32_t)(i % a.block_len)));
    }
}

extern "C" int cuda_launch_dequant(const struct cuda_launch *l, void *stream)
{
    if (l->bf16)
        PRIM_LAUNCH(dequant_kernel<uint16_t>, struct cuda_dequant_args, l, stream);
    PRIM_LAUNCH(dequant_kernel<float>, struct cuda_dequant_args, l, stream);
}
