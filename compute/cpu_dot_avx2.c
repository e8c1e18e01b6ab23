/* cpu_dot_avx2.c - dot products with rows of quantised blocks, without expanding them.
 *
 * The one idea: inside a block the codes are multiplied as they are, and their step multiplies the
 * block's sum; a block's minimum meets the sum of x over the block, which is the same for all
 * rows of a matrix. Eight lanes run over the row and are added at its end, so a result
 * depends on the row and on x alone. Block layouts are those of dequant.c. */
#include <immintrin.h>
#include <string.h>

#include "cpu.h"
#include "dequant.h"

#define BLOCK 32

static inline __m128 halves(const uint8_t *p)
{
    int32_t two;

    memcpy(&two, p, sizeof two);
    return _mm_cvtph_ps(_mm_cvtsi32_si128(two));
}

static inline __m256 eight(__m128i codes)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

static inline float total(__m256 x)
{
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));

    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}

/* 32 codes against 32 elements of x. */
static inline __m256 block_sum(__m128i first, __m128i second, const float *x)
{
    __m256 a = _mm256_mul_ps(eight(first), _mm256_loadu_ps(x));
    __m256 b = _mm256_mul_ps(eight(second), _mm256_loadu_ps(x + 16));

    a = _mm256_fmadd_ps(eight(_mm_srli_si128(first, 8)), _mm256_loadu_ps(x + 8), a);
    b = _mm256_fmadd_ps(eight(_mm_srli_si128(second, 8)), _mm256_loadu_ps(x + 24), b);
    return _mm256_add_ps(a, b);
}

static float q4_0(const uint8_t *p, uint32_t n, const float *x, const float *sums)
{
    const __m128i low = _mm_set1_epi8(15), middle = _mm_set1_epi8(8);
    __m256 sum = _mm256_setzero_ps();

    (void)sums;
    for (uint32_t i = 0; i < n; i++, p += 18, x += BLOCK) {
        __m128i both = _mm_loadu_si128((const __m128i *)(const void *)(p + 2));
        __m128i lo = _mm_and_si128(both, low), hi = _mm_and_si128(_mm_srli_epi16(both, 4), low);

        sum =
            _mm256_fmadd_ps(_mm256_broadcastss_ps(halves(p)),
                            block_sum(_mm_sub_epi8(lo, middle), _mm_sub_epi8(hi, middle), x), sum);
    }
    return total(sum);
}

static float q4_1(const uint8_t *p, uint32_t n, const float *x, const float *sums)
{
    const __m128i low = _mm_set1_epi8(15);
    __m256 sum = _mm256_setzero_ps();
    __m128 min = _mm_setzero_ps(); /* in lane 1 */

    for (uint32_t i = 0; i < n; i++, p += 20, x += BLOCK) {
        __m128i both = _mm_loadu_si128((const __m128i *)(const void *)(p + 4));
        __m128i lo = _mm_and_si128(both, low), hi = _mm_and_si128(_mm_srli_epi16(both, 4), low);
        __m128 scale = halves(p);

        sum = _mm256_fmadd_ps(_mm256_broadcastss_ps(scale), block_sum(lo, hi, x), sum);
        min = _mm_fmadd_ps(scale, _mm_set1_ps(sums[i]), min);
    }
    return total(sum) + _mm_cvtss_f32(_mm_shuffle_ps(min, min, 1));
}

static float q8_0(const uint8_t *p, uint32_t n, const float *x, const float *sums)
{
    __m256 sum = _mm256_setzero_ps();

    (void)sums;
    for (uint32_t i = 0; i < n; i++, p += 34, x += BLOCK) {
        __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(p + 2));
        __m128i b = _mm_loadu_si128((const __m128i *)(const void *)(p + 18));

        sum = _mm256_fmadd_ps(_mm256_broadcastss_ps(halves(p)), block_sum(a, b, x), sum);
    }
    return total(sum);
}

cpu_dot_fn *cpu_dot_avx2(uint32_t type)
{
    switch (type) {
    case TENSOR_Q4_0:
        return q4_0;
    case TENSOR_Q4_1:
        return q4_1;
    case TENSOR_Q8_0:
        return q8_0;
    default:
        return NULL;
    }
}
