/* cpu_rows.c - what happens to a row between two products.
 *
 * The one idea: loops over fixed groups of 16 lanes, written so that the compiler turns
 * them into vectors of whatever width the processor has; the lanes, not the
 * instruction set, fix the order of every sum, so all variants agree bit for bit. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "half.h"

#define LANES 16u
#define FAST                                                                                       \
    __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"),                             \
                   optimize("O3", "fp-contract=off")))

/* Pairwise, so that the order is fixed. */
static inline float sum_lanes(const float *x)
{
    float y[8];

    for (int i = 0; i < 8; i++)
        y[i] = x[i] + x[i + 8];
    return ((y[0] + y[4]) + (y[2] + y[6])) + ((y[1] + y[5]) + (y[3] + y[7]));
}

/* e^x for x <= 0, within 2 units in the last place; 0 below -87. */
static inline float exp_neg(float x)
{
    float z = x < -87.0f ? -87.0f : x;
    float n = z * 1.44269504f + 12582912.0f; /* round to integer by the magic addend */
    uint32_t bits = f32_bits(n);
    float k = n - 12582912.0f;
    float r = z - k * 0.693145752f, p;

    r = r - k * 1.42860677e-6f;
    p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = bits_f32(f32_bits(p) + (bits << 23));
    return x < -87.0f ? 0.0f : p;
}

static inline uint16_t round_bf16(float f)
{
    uint32_t u = f32_bits(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = (u >> 16) | 0x40u;

    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static inline double square_sum(const float *x, uint32_t n)
{
    double lane[8] = {0}, sum = 0;
    uint32_t i = 0;

    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++)
            lane[l] += (double)x[i + l] * x[i + l];
    for (int l = 0; l < 8; l++)
        sum += lane[l];
    for (; i < n; i++)
        sum += (double)x[i] * x[i];
    return sum;
}

FAST void cpu_rmsnorm(const float *x, const float *w, uint32_t n, double eps, float *out)
{
    float scale = (float)(1 / sqrt(square_sum(x, n) / n + eps));

    for (uint32_t i = 0; i < n; i++)
        out[i] = x[i] * scale * w[i];
}

FAST void cpu_rmsnorm_bf16(const float *x, const float *w, uint32_t n, double eps, uint16_t *out)
{
    float scale = (float)(1 / sqrt(square_sum(x, n) / n + eps));

    for (uint32_t i = 0; i < n; i++)
        out[i] = round_bf16(x[i] * scale * w[i]);
}

FAST void cpu_to_bf16(const float *x, uint64_t n, uint16_t *out)
{
    for (uint64_t i = 0; i < n; i++)
        out[i] = round_bf16(x[i]);
}

FAST void cpu_to_f32(const uint16_t *x, uint64_t n, float *out)
{
    for (uint64_t i = 0; i < n; i++)
        out[i] = bf16_to_f32(x[i]);
}

FAST void cpu_rope(const float *x, const float *cs, uint32_t d, float *out)
{
    uint32_t half = d / 2;
    const float *sn = cs + half;

    for (uint32_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];

        out[i] = a * cs[i] - b * sn[i];
        out[i + half] = b * cs[i] + a * sn[i];
    }
}

static inline float silu(float x)
{
    float e = exp_neg(x < 0 ? x : -x); /* e^-|x| */

    return x < 0 ? x * e / (1.0f + e) : x / (1.0f + e);
}

FAST void cpu_swiglu(const float *row, uint32_t n_ff, float *out)
{
    for (uint32_t i = 0; i < n_ff; i++)
        out[i] = silu(row[i]) * row[n_ff + i];
}

FAST void cpu_swiglu_bf16(const float *row, uint32_t n_ff, uint16_t *out)
{
    for (uint32_t i = 0; i < n_ff; i++)
        out[i] = round_bf16(silu(row[i]) * row[n_ff + i]);
}

FAST float cpu_max(const float *x, uint32_t n)
{
    float lane[LANES], max;
    uint32_t i = 0;

    for (uint32_t l = 0; l < LANES; l++)
        lane[l] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (uint32_t l = 0; l < LANES; l++)
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    max = lane[0];
    for (uint32_t l = 1; l < LANES; l++)
        max = lane[l] > max ? lane[l] : max;
    for (; i < n; i++)
        max = x[i] > max ? x[i] : max;
    return max;
}

FAST float cpu_softmax_exp(float *x, uint32_t n, uint32_t wide, float max)
{
    float lane[LANES] = {0}, sum;
    uint32_t i = 0;

    for (; i + LANES <= n; i += LANES)
        for (uint32_t l = 0; l < LANES; l++) {
            /* a NaN must reach the sum: exp_neg() passes it on */
            x[i + l] = exp_neg(x[i + l] - max);
            lane[l] += x[i + l];
        }
    sum = sum_lanes(lane);
    for (; i < n; i++)
        sum += x[i] = exp_neg(x[i] - max);
    memset(x + n, 0, (wide - n) * sizeof *x);
    return sum;
}
