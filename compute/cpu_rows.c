/* cpu_rows.c - what happens to a row between two products.
 *
 * The one idea: loops over fixed groups of 16 lanes, written so that the compiler turns
 * them into vectors of whatever width the processor has; the lanes, not the
 * instruction set, fix the order of every sum, so all variants agree bit for bit. */
/* For the whole file, so that functions still inline into each other. Without traps a
 * conditional becomes a blend and loops over it become vectors. */
#pragma GCC optimize("O3", "fp-contract=off", "no-trapping-math")
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "half.h"
#include "lanes.h"

#define FAST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))

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

void cpu_normalise(const struct backend *b, const float *in, const float *norm, uint32_t n,
                   float *out)
{
    for (uint64_t i = 0; i < n; i++)
        cpu_rmsnorm(in + i * b->p->n_hidden, norm, b->p->n_hidden, b->p->norm_eps,
                    out + i * b->p->n_hidden);
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

FAST void cpu_add(const float *restrict x, uint32_t n, float *restrict to)
{
    for (uint32_t i = 0; i < n; i++)
        to[i] += x[i];
}

FAST void cpu_rope(const float *x, const float *cs, uint32_t dims, uint32_t d, float *out)
{
    uint32_t half = dims / 2;
    const float *sn = cs + half;

    for (uint32_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];

        out[i] = a * cs[i] - b * sn[i];
        out[i + half] = b * cs[i] + a * sn[i];
    }
    if (d > dims)
        memcpy(out + dims, x + dims, (d - dims) * sizeof *x);
}

static inline float silu(float x)
{
    float e = exp_neg(-fabsf(x)), top = x < 0 ? x * e : x;

    return top / (1.0f + e);
}

FAST void cpu_swiglu(const float *restrict row, uint32_t n_ff, float *restrict out)
{
    for (uint32_t i = 0; i < n_ff; i++)
        out[i] = silu(row[i]) * row[n_ff + i];
}

FAST void cpu_swiglu_bf16(const float *restrict row, uint32_t n_ff, uint16_t *restrict out)
{
    for (uint32_t i = 0; i < n_ff; i++)
        out[i] = round_bf16(silu(row[i]) * row[n_ff + i]);
}

static inline void take_max(half_lanes *max, const float *x)
{
    const half_lanes *v = (const half_lanes *)x;
    half_mask is_more = *v > *max;

    *max = (half_lanes)(((half_mask)*v & is_more) | ((half_mask)*max & ~is_more));
}

FAST float cpu_max(const float *x, uint32_t n)
{
    half_lanes a = (half_lanes){0} - INFINITY, b = a;
    float max = -INFINITY;
    uint32_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        take_max(&a, x + i);
        take_max(&b, x + i + LANES / 2);
    }
    take_max(&a, (const float *)&b);
    for (uint32_t l = 0; l < LANES / 2; l++)
        max = a[l] > max ? a[l] : max;
    for (; i < n; i++)
        max = x[i] > max ? x[i] : max;
    return max;
}

FAST float cpu_softmax_exp(float *x, uint32_t n, uint32_t wide, float max)
{
    half_lanes a = {0}, b = {0};
    uint32_t i = 0;
    float sum;

    /* a NaN must reach the sum: exp_neg() passes it on */
    for (uint32_t j = 0; j < n; j++)
        x[j] = exp_neg(x[j] - max);
    for (; i + LANES <= n; i += LANES) {
        a += *(const half_lanes *)(x + i);
        b += *(const half_lanes *)(x + i + LANES / 2);
    }
    sum = sum_lanes(&a, &b);
    for (; i < n; i++)
        sum += x[i];
    memset(x + n, 0, (wide - n) * sizeof *x);
    return sum;
}

void cpu_soften(float *x, uint32_t n, uint32_t from, uint32_t to, const struct cpu_running *r)
{
    float before = *r->max, keep = 1;

    if (from >= to) {
        memset(x, 0, n * sizeof *x);
        return;
    }
    *r->max = fmaxf(before, cpu_max(x + from, to - from));
    if (*r->sum > 0)
        keep = expf(before - *r->max);
    *r->sum = *r->sum * keep + cpu_softmax_exp(x + from, to - from, n - from, *r->max);
    memset(x, 0, from * sizeof *x);
    for (uint32_t c = 0; c < r->pad && keep != 1; c++)
        r->o[c] *= keep;
}
