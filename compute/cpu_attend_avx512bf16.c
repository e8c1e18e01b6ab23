/* cpu_attend_avx512bf16.c - causal attention with bf16 dot products and f32 sums.
 *
 * The one idea: K and V of a head are packed once so that one instruction multiplies a
 * pair of elements for 16 keys (or 16 output channels) at a time. An item takes 48 query
 * rows through the keys in steps of 256, keeping a running maximum and sum per row, so
 * the n x n matrix never exists and everything an item touches stays in L2.
 *
 * Packed K: [key / 16][d / 2][16 keys][2]; packed V: [key / 2][d][2], both zero-padded. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu.h"

#define TILE_ROWS 6u /* 6 rows x 4 vectors of sums fill the registers */
#define TILE_VECS 4u
#define KEY_PAD 64u

static uint32_t pad_keys(uint32_t n)
{
    return (n + KEY_PAD - 1) / KEY_PAD * KEY_PAD;
}

static uint32_t pad_dim(uint32_t d)
{
    return (d + 15) / 16 * 16;
}

uint64_t cpu_attend_pack_bytes(uint32_t n, uint32_t d)
{
    return 2ull * 2 * pad_keys(n) * pad_dim(d);
}

/* logits, their bf16 form, sums of output, per-row state, the rows of q */
uint64_t cpu_attend_scratch_bytes(uint32_t d)
{
    return (uint64_t)CPU_ATTEND_Q * (CPU_ATTEND_K * 6 + pad_dim(d) * 6 + 2 * 4) + 64 * 8;
}

void cpu_attend_pack(const uint16_t *k, const uint16_t *v, uint32_t n, uint32_t d, uint8_t *packed)
{
    uint32_t keys = pad_keys(n), dim = pad_dim(d);
    uint16_t *pk = (uint16_t *)packed, *pv = pk + (uint64_t)keys * dim;

    if (keys != n || dim != d)
        memset(packed, 0, cpu_attend_pack_bytes(n, d));
    for (uint32_t j = 0; j < n; j++) {
        uint16_t *to_k = pk + (uint64_t)(j / 16) * dim * 16 + j % 16 * 2;
        uint16_t *to_v = pv + (uint64_t)(j / 2) * dim * 2 + j % 2;

        for (uint32_t i = 0; i < d; i += 2)
            memcpy(to_k + i * 16, k + (uint64_t)j * d + i, 4);
        for (uint32_t i = 0; i < d; i++)
            to_v[2 * i] = v[(uint64_t)j * d + i];
    }
}

static inline __m512bh pair_at(const uint16_t *p)
{
    int32_t pair;

    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* x[r][64 keys] = q rows · 64 keys; q [rows][dim]. */
static inline void dot_tile(const uint16_t *q, const uint16_t *pk, uint32_t dim, float *x)
{
    __m512 s[TILE_ROWS][TILE_VECS];

    for (uint32_t r = 0; r < TILE_ROWS; r++)
        for (uint32_t c = 0; c < TILE_VECS; c++)
            s[r][c] = _mm512_setzero_ps();
    for (uint32_t i = 0; i < dim; i += 2) {
        __m512bh kv[TILE_VECS];

        for (uint32_t c = 0; c < TILE_VECS; c++)
            kv[c] = (__m512bh)_mm512_loadu_si512(pk + (uint64_t)c * dim * 16 + i * 16);
        for (uint32_t r = 0; r < TILE_ROWS; r++) {
            __m512bh a = pair_at(q + r * dim + i);

            for (uint32_t c = 0; c < TILE_VECS; c++)
                s[r][c] = _mm512_dpbf16_ps(s[r][c], a, kv[c]);
        }
    }
    for (uint32_t r = 0; r < TILE_ROWS; r++)
        for (uint32_t c = 0; c < TILE_VECS; c++)
            _mm512_storeu_ps(x + r * CPU_ATTEND_K + c * 16, s[r][c]);
}

/* o[r][vecs * 16] += p rows · V; p [rows][CPU_ATTEND_K] bf16, n_keys of them (even). */
static inline __attribute__((always_inline)) void value_tile(const uint16_t *p, const uint16_t *pv,
                                                             uint32_t dim, uint32_t n_keys,
                                                             float *o, uint32_t vecs)
{
    __m512 s[TILE_ROWS][TILE_VECS];

    for (uint32_t r = 0; r < TILE_ROWS; r++)
        for (uint32_t c = 0; c < vecs; c++)
            s[r][c] = _mm512_loadu_ps(o + r * dim + c * 16);
    for (uint32_t j = 0; j < n_keys; j += 2) {
        __m512bh vv[TILE_VECS];

        for (uint32_t c = 0; c < vecs; c++)
            vv[c] = (__m512bh)_mm512_loadu_si512(pv + (uint64_t)j * dim + c * 32);
        for (uint32_t r = 0; r < TILE_ROWS; r++) {
            __m512bh a = pair_at(p + r * CPU_ATTEND_K + j);

            for (uint32_t c = 0; c < vecs; c++)
                s[r][c] = _mm512_dpbf16_ps(s[r][c], a, vv[c]);
        }
    }
    for (uint32_t r = 0; r < TILE_ROWS; r++)
        for (uint32_t c = 0; c < vecs; c++)
            _mm512_storeu_ps(o + r * dim + c * 16, s[r][c]);
}

static void value_rows(const uint16_t *p, const uint16_t *pv, uint32_t dim, uint32_t n_keys,
                       float *o)
{
    uint32_t at = 0;

    for (; at + 64 <= dim; at += 64)
        value_tile(p, pv + at * 2, dim, n_keys, o + at, 4);
    for (; at < dim; at += 16)
        value_tile(p, pv + at * 2, dim, n_keys, o + at, 1);
}

/* 2^x for x <= 0, relative error below 1e-6; tiny x give 0. */
static inline __m512 exp2_neg(__m512 x)
{
    __m512 z = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(z, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);

    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_scalef_ps(p, n);
    return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_LT_OQ),
                              _mm512_setzero_ps());
}

struct rows {
    float *x;         /* [CPU_ATTEND_Q][CPU_ATTEND_K] logits */
    uint16_t *p;      /* the same, as bf16 probabilities */
    float *o;         /* [CPU_ATTEND_Q][dim] */
    uint16_t *q;      /* [CPU_ATTEND_Q][dim], zero-padded */
    float *max, *sum; /* [CPU_ATTEND_Q]; logits in powers of two */
};

static void lay_out(struct rows *w, uint8_t *scratch, uint32_t dim)
{
    uint8_t *at = (uint8_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);

    w->x = (float *)at;
    at += 4ull * CPU_ATTEND_Q * CPU_ATTEND_K;
    w->o = (float *)at;
    at += 4ull * CPU_ATTEND_Q * dim;
    w->p = (uint16_t *)at;
    at += 2ull * CPU_ATTEND_Q * CPU_ATTEND_K;
    w->q = (uint16_t *)at;
    at += 2ull * CPU_ATTEND_Q * dim;
    w->max = (float *)at;
    w->sum = w->max + CPU_ATTEND_Q;
}

/* Which of 16 keys from `j` on lie in from..to. */
static inline __mmask16 within(uint32_t j, uint32_t from, uint32_t to)
{
    uint32_t low = from > j ? from - j : 0, high = to > j ? to - j : 0;

    if (low >= 16 || high <= low)
        return 0;
    return (__mmask16)((high >= 16 ? 0xffffu : (1u << high) - 1) & ~((1u << low) - 1));
}

/* One row's logits of this step into probabilities; keys from..to of `wide` are visible. */
static void soften(struct rows *w, uint32_t r, uint32_t dim, uint32_t from, uint32_t to,
                   uint32_t wide, float scale)
{
    float *x = w->x + (uint64_t)r * CPU_ATTEND_K, *o = w->o + (uint64_t)r * dim;
    uint16_t *p = w->p + (uint64_t)r * CPU_ATTEND_K;
    const __m512 s = _mm512_set1_ps(scale), low = _mm512_set1_ps(-INFINITY);
    __m512 max = low, sum = _mm512_setzero_ps(), m;
    float new_max, shrink;

    for (uint32_t j = from / 16 * 16; j < to; j += 16) {
        __mmask16 k = within(j, from, to);

        max = _mm512_max_ps(max, _mm512_mask_mul_ps(low, k, _mm512_loadu_ps(x + j), s));
    }
    new_max = _mm512_reduce_max_ps(max);
    new_max = new_max > w->max[r] ? new_max : w->max[r];
    shrink = w->max[r] == -INFINITY ? 0.0f : exp2f(w->max[r] - new_max);
    m = _mm512_set1_ps(new_max);
    for (uint32_t j = 0; j < wide; j += 16) {
        __mmask16 k = within(j, from, to);
        __m512 y = _mm512_maskz_mov_ps(
            k, exp2_neg(_mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(x + j), s), m)));

        sum = _mm512_add_ps(sum, y);
        _mm256_storeu_si256((__m256i *)(p + j), (__m256i)_mm512_cvtneps_pbh(y));
    }
    w->sum[r] = w->sum[r] * shrink + _mm512_reduce_add_ps(sum);
    w->max[r] = new_max;
    if (shrink != 1.0f)
        for (uint32_t i = 0; i < dim; i += 16)
            _mm512_storeu_ps(o + i, _mm512_mul_ps(_mm512_loadu_ps(o + i), _mm512_set1_ps(shrink)));
}

/* Keys [key, key + wide) for all rows of the item. */
static void step(struct rows *w, const uint16_t *pk, const uint16_t *pv, uint32_t dim, uint32_t key,
                 uint32_t wide, const struct cpu_attend_item *x, float scale)
{
    uint32_t rows = x->rows, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;

    for (uint32_t t = 0; t < tiles; t++)
        for (uint32_t j = 0; j < wide; j += KEY_PAD)
            dot_tile(w->q + (uint64_t)t * TILE_ROWS * dim, pk + (uint64_t)(key + j) * dim, dim,
                     w->x + (uint64_t)t * TILE_ROWS * CPU_ATTEND_K + j);
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t first = sliding_from(x->sliding, x->row + r), last = x->row + r + 1;
        uint32_t to = last <= key ? 0 : last - key < wide ? last - key : wide;
        uint32_t from = first <= key ? 0 : first - key;

        if (from < to)
            soften(w, r, dim, from, to, wide, scale);
        else
            memset(w->p + (uint64_t)r * CPU_ATTEND_K, 0, wide * sizeof *w->p);
    }
    for (uint32_t t = 0; t < tiles; t++)
        value_rows(w->p + (uint64_t)t * TILE_ROWS * CPU_ATTEND_K, pv + (uint64_t)key * dim, dim,
                   wide, w->o + (uint64_t)t * TILE_ROWS * dim);
}

void cpu_attend_rows(const struct cpu_attend_item *x)
{
    uint32_t d = x->d, rows = x->rows;
    uint32_t keys = pad_keys(x->n), dim = pad_dim(d), last = pad_keys(x->row + rows);
    uint32_t first = sliding_from(x->sliding, x->row) / CPU_ATTEND_K * CPU_ATTEND_K;
    const uint16_t *pk = (const uint16_t *)x->packed, *pv = pk + (uint64_t)keys * dim;
    float scale = (float)(1.4426950408889634 / sqrt(d)); /* logits as powers of two */
    struct rows w;

    lay_out(&w, x->scratch, dim);
    memset(w.o, 0, 4ull * CPU_ATTEND_Q * dim);
    memset(w.p, 0, 2ull * CPU_ATTEND_Q * CPU_ATTEND_K);
    memset(w.q, 0, 2ull * CPU_ATTEND_Q * dim);
    for (uint32_t r = 0; r < CPU_ATTEND_Q; r++) {
        w.max[r] = -INFINITY;
        w.sum[r] = 0;
    }
    for (uint32_t r = 0; r < rows; r++)
        memcpy(w.q + (uint64_t)r * dim, x->q + (uint64_t)(x->row + r) * d, 2ull * d);
    for (uint32_t key = first; key < last; key += CPU_ATTEND_K)
        step(&w, pk, pv, dim, key, last - key < CPU_ATTEND_K ? last - key : CPU_ATTEND_K, x, scale);
    for (uint32_t r = 0; r < rows; r++) {
        const __m512 inv = _mm512_set1_ps(1.0f / w.sum[r]);

        for (uint32_t i = 0; i < d; i += 16) {
            __mmask16 k = d - i >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (d - i)) - 1);
            __m512 y = _mm512_mul_ps(_mm512_loadu_ps(w.o + (uint64_t)r * dim + i), inv);

            _mm256_mask_storeu_epi16(x->o + r * x->o_stride + i, k, (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}
