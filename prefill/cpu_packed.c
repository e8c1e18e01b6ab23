/* cpu_packed.c - attention of a few rows on int8 and int4 tiles, without expanding them.
 *
 * The one idea: a code is only ever multiplied. Steps of keys go into the queries and minima into
 * one number per query, steps of values go into the weights and minima into one number per
 * group of channels; what is left are products with small integers, which become f32 in blocks
 * that stay in the first-level cache. int4 codes are kept as two planes, even channels and odd
 * ones, since taking nibbles apart is cheap and interleaving them is not; queries and outputs
 * are put into that order instead. */
#pragma GCC optimize("O3", "fp-contract=fast")
#include <string.h>

#include "cpu.h"
#include "half.h"
#include "packed.h"

#define BODY static inline __attribute__((always_inline))
#define BLOCK 32u /* rows of codes at a time: the group of int4 keys */
#define LANES 8u
#define CHUNK 16u /* columns of a sum over rows */
#define MAX_GROUPS (KV_MAX_HEAD_DIM / PACKED_GROUP)

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "scales are read in place");
_Static_assert(BLOCK == PACKED_GROUP, "a block of int4 keys has one set of steps");
_Static_assert(2 * CHUNK == PACKED_GROUP, "a chunk of either plane has one step of int4 values");

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));

/* A minimum and a step of int4, side by side as they are stored. */
typedef uint32_t pair __attribute__((aligned(1), may_alias));

BODY float min_of(pair p)
{
    return f16_to_f32((uint16_t)p);
}

BODY float step_of(pair p)
{
    return f16_to_f32((uint16_t)(p >> 16));
}

/* One call. Planes are padded with zeros to whole chunks. */
struct packed {
    const uint8_t *tile;
    struct packed_parts parts;
    bool four;
    uint32_t d, rows;
    uint32_t plane;    /* int4: columns of each of the two planes; int8: all columns */
    uint32_t width;    /* columns of a row */
    float *x, *y;      /* [rows][width]: queries and scaled ones, or outputs */
    float *codes;      /* [BLOCK][width] */
    float *step, *min; /* [width] */
    float *weight;     /* [rows][BLOCK] */
    float *base;       /* [rows], or [groups][rows] */
};

static uint32_t padded(uint32_t n)
{
    return (n + CHUNK - 1) / CHUNK * CHUNK;
}

static uint32_t groups_of(uint32_t d)
{
    return (d + PACKED_GROUP - 1) / PACKED_GROUP;
}

uint64_t cpu_packed_floats(uint32_t d, uint32_t rows)
{
    uint64_t width = 2ull * padded(d / 2); /* int8 has no more */

    return (2ull * rows + BLOCK + 2) * width + (uint64_t)rows * (BLOCK + groups_of(d)) + CHUNK;
}

static struct packed open_tile(enum kv_dtype t, const void *tile, uint32_t d, uint32_t rows,
                               float *scratch)
{
    struct packed p = {.tile = tile, .four = t == KV_INT4, .d = d, .rows = rows};

    p.plane = p.four ? padded(d / 2) : padded(d);
    p.width = p.four ? 2 * p.plane : p.plane;
    p.x = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    p.y = p.x + (uint64_t)rows * p.width;
    p.codes = p.y + (uint64_t)rows * p.width;
    p.step = p.codes + (uint64_t)BLOCK * p.width;
    p.min = p.step + p.width;
    p.weight = p.min + p.width;
    p.base = p.weight + (uint64_t)rows * BLOCK;
    /* sums run over the padding and over the rows of a block that are not there */
    memset(p.x, 0, (2ull * rows + BLOCK + 2) * p.width * sizeof *p.x);
    return p;
}

/* Column of a channel. */
BODY uint32_t column(const struct packed *p, uint32_t c)
{
    return p->four ? c % 2 * p->plane + c / 2 : c;
}

/* ---- codes to f32 */

BODY void widen(const struct packed *p, const uint8_t *restrict codes, uint32_t n)
{
    uint32_t half = p->d / 2;

    for (uint32_t r = 0; r < n; r++) {
        float *restrict lo = p->codes + (uint64_t)r * p->width, *restrict hi = lo + p->plane;

        if (p->four) {
            for (uint32_t c = 0; c < half; c++) {
                lo[c] = (float)(codes[c] & 15);
                hi[c] = (float)(codes[c] >> 4);
            }
            codes += half;
        } else {
            for (uint32_t c = 0; c < p->d; c++)
                lo[c] = (float)(int8_t)codes[c];
            codes += p->d;
        }
    }
}

/* The exact rows take the place of codes. */
static void widen_exact(const struct packed *p)
{
    for (uint32_t r = 0; r < p->parts.n_exact; r++)
        for (uint32_t c = 0; c < p->d; c++)
            p->codes[(uint64_t)r * p->width + column(p, c)] =
                bf16_to_f32(packed_u16(p->tile, (uint64_t)r * p->d + c));
}

static float total(const vec *x)
{
    return (((*x)[0] + (*x)[4]) + ((*x)[2] + (*x)[6])) +
           (((*x)[1] + (*x)[5]) + ((*x)[3] + (*x)[7]));
}

/* ---- logits */

/* out[i] = sum of p[i]: three rounds of adding neighbours, each of which halves the vectors. */
BODY void sum_each(const vec *p, vec *out)
{
    vec a[4], b[2];

    for (int i = 0; i < 4; i++)
        a[i] = __builtin_shuffle(p[2 * i], p[2 * i + 1], (lanes){0, 8, 1, 9, 4, 12, 5, 13}) +
               __builtin_shuffle(p[2 * i], p[2 * i + 1], (lanes){2, 10, 3, 11, 6, 14, 7, 15});
    for (int i = 0; i < 2; i++)
        b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], (lanes){0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(a[2 * i], a[2 * i + 1], (lanes){2, 3, 10, 11, 6, 7, 14, 15});
    *out = __builtin_shuffle(b[0], b[1], (lanes){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(b[0], b[1], (lanes){4, 5, 6, 7, 12, 13, 14, 15});
}

/* logit[i][j] = q[i] . codes[j] + base[i] for the n rows of a block. */
BODY void dots(const struct packed *p, const float *q, uint32_t n, float *logit, uint64_t ld)
{
    for (uint32_t j = 0; j < n; j += LANES) {
        const float *codes = p->codes + (uint64_t)j * p->width;

        for (uint32_t i = 0; i < p->rows; i++) {
            const float *x = q + (uint64_t)i * p->width;
            vec sum[LANES] = {{0}}, out;

            for (uint32_t c = 0; c < p->width; c += LANES) {
                vec xc = *(const vec *)(x + c);

#pragma GCC unroll 8
                for (uint32_t r = 0; r < LANES; r++)
                    sum[r] += xc * *(const vec *)(codes + (uint64_t)r * p->width + c);
            }
            sum_each(sum, &out);
            out += p->base[i];
            if (n - j >= LANES)
                *(vec *)(logit + i * ld + j) = out;
            else
                memcpy(logit + i * ld + j, &out, (n - j) * sizeof *logit);
        }
    }
}

/* Minima and steps of the channels into their columns. */
BODY void key_scales(const struct packed *p, const uint8_t *scales)
{
    float min[KV_MAX_HEAD_DIM], step[KV_MAX_HEAD_DIM];
    const pair *both = (const pair *)scales;
    uint32_t half = p->d / 2;

    if (!p->four) {
        for (uint32_t c = 0; c < p->d; c++)
            p->step[c] = f16_to_f32(packed_u16(scales, c));
        return;
    }
    for (uint32_t c = 0; c < p->d; c++) {
        min[c] = min_of(both[c]);
        step[c] = step_of(both[c]);
    }
    for (uint32_t c = 0; c < half; c++) {
        p->min[c] = min[2 * c];
        p->min[p->plane + c] = min[2 * c + 1];
        p->step[c] = step[2 * c];
        p->step[p->plane + c] = step[2 * c + 1];
    }
}

/* Queries for a set of steps, and what its minima add to every row. */
BODY void scale_queries(const struct packed *p, const uint8_t *scales)
{
    key_scales(p, scales);
    for (uint32_t i = 0; i < p->rows; i++) {
        const float *x = p->x + (uint64_t)i * p->width;
        float *y = p->y + (uint64_t)i * p->width;
        vec sum = {0};

        for (uint32_t c = 0; c < p->width; c += LANES) {
            *(vec *)(y + c) = *(const vec *)(x + c) * *(const vec *)(p->step + c);
            sum += *(const vec *)(x + c) * *(const vec *)(p->min + c);
        }
        p->base[i] = total(&sum);
    }
}

BODY void logits_body(struct packed *p, float *logit, uint64_t ld)
{
    const uint8_t *scales = p->tile + p->parts.scales, *codes = p->tile + p->parts.codes;
    uint32_t n;

    memset(p->base, 0, p->rows * sizeof *p->base);
    widen_exact(p);
    dots(p, p->x, p->parts.n_exact, logit, ld);
    logit += p->parts.n_exact;
    for (uint32_t j = 0; j < p->parts.n_packed; j += n) {
        n = p->parts.n_packed - j < BLOCK ? p->parts.n_packed - j : BLOCK;
        if (p->four || !j) {
            scale_queries(p, scales);
            scales += 4ull * p->d;
        }
        widen(p, codes, n);
        codes += (uint64_t)n * p->d / (p->four ? 2 : 1);
        dots(p, p->y, n, logit + j, ld);
    }
}

/* ---- values */

/* y[i] += sum over the n rows of weight[i][j] * codes[j], CHUNK columns from `at` on; `rows` of
 * them from `i` on, a constant at every call. */
BODY void weigh_rows(const struct packed *p, uint32_t i, const uint32_t rows, uint32_t n,
                     uint32_t at)
{
    const float *w = p->weight + (uint64_t)i * BLOCK, *codes = p->codes + at;
    float *y = p->y + (uint64_t)i * p->width + at;
    vec sum[4][2];

#pragma GCC unroll 4
    for (uint32_t r = 0; r < rows; r++) {
        sum[r][0] = *(const vec *)(y + (uint64_t)r * p->width);
        sum[r][1] = *(const vec *)(y + (uint64_t)r * p->width + LANES);
    }
    for (uint32_t j = 0; j < n; j++, codes += p->width) {
        vec a = *(const vec *)codes, b = *(const vec *)(codes + LANES);

#pragma GCC unroll 4
        for (uint32_t r = 0; r < rows; r++) {
            sum[r][0] += w[r * BLOCK + j] * a;
            sum[r][1] += w[r * BLOCK + j] * b;
        }
    }
#pragma GCC unroll 4
    for (uint32_t r = 0; r < rows; r++) {
        *(vec *)(y + (uint64_t)r * p->width) = sum[r][0];
        *(vec *)(y + (uint64_t)r * p->width + LANES) = sum[r][1];
    }
}

BODY void weigh(const struct packed *p, uint32_t n, uint32_t at)
{
    uint32_t i = 0;

    for (; i + 4 <= p->rows; i += 4)
        weigh_rows(p, i, 4, n, at);
    if (p->rows - i == 3)
        weigh_rows(p, i, 3, n, at);
    else if (p->rows - i == 2)
        weigh_rows(p, i, 2, n, at);
    else if (p->rows - i == 1)
        weigh_rows(p, i, 1, n, at);
}

/* Weights of a block of n rows times their steps; with minima, what those add. */
BODY void scale_weights(const struct packed *p, const float *prob, uint64_t ld, uint32_t n,
                        const float *step, const float *min, float *base)
{
    for (uint32_t i = 0; i < p->rows; i++) {
        float *w = p->weight + (uint64_t)i * BLOCK;
        vec sum = {0};

        memcpy(w, prob + i * ld, n * sizeof *w);
        memset(w + n, 0, (BLOCK - n) * sizeof *w);
        for (uint32_t j = 0; j < BLOCK; j += LANES) {
            if (min)
                sum += *(const vec *)(w + j) * *(const vec *)(min + j);
            *(vec *)(w + j) *= *(const vec *)(step + j);
        }
        if (min)
            base[i] += total(&sum);
    }
}

/* int4: minima and steps [groups][BLOCK] of a block of n rows. */
BODY void value_scales(const uint8_t *scales, uint32_t n, uint32_t groups, float *min, float *step)
{
    float all_min[MAX_GROUPS * BLOCK], all_step[MAX_GROUPS * BLOCK];
    const pair *both = (const pair *)scales;

    for (uint32_t i = 0; i < n * groups; i++) {
        all_min[i] = min_of(both[i]);
        all_step[i] = step_of(both[i]);
    }
    for (uint32_t g = 0; g < groups; g++)
        for (uint32_t j = 0; j < n; j++) {
            min[g * BLOCK + j] = all_min[j * groups + g];
            step[g * BLOCK + j] = all_step[j * groups + g];
        }
}

BODY void values_block(const struct packed *p, const uint8_t *scales, const float *prob,
                       uint64_t ld, uint32_t n)
{
    float min[MAX_GROUPS * BLOCK], step[MAX_GROUPS * BLOCK];
    uint32_t groups = p->four ? groups_of(p->d) : 1;

    /* not there beyond n, but multiplied */
    memset(min, 0, groups * BLOCK * sizeof *min);
    memset(step, 0, groups * BLOCK * sizeof *step);
    if (!p->four) {
        for (uint32_t j = 0; j < n; j++)
            step[j] = f16_to_f32(packed_u16(scales, j));
        scale_weights(p, prob, ld, n, step, NULL, NULL);
        for (uint32_t c = 0; c < p->width; c += CHUNK)
            weigh(p, n, c);
        return;
    }
    value_scales(scales, n, groups, min, step);
    for (uint32_t g = 0; g < groups; g++) {
        scale_weights(p, prob, ld, n, step + g * BLOCK, min + g * BLOCK,
                      p->base + (uint64_t)g * p->rows);
        weigh(p, n, g * CHUNK);
        weigh(p, n, p->plane + g * CHUNK);
    }
}

BODY void values_body(struct packed *p, const float *prob, uint64_t ld)
{
    const uint8_t *scales = p->tile + p->parts.scales, *codes = p->tile + p->parts.codes;
    uint32_t n = p->parts.n_exact, groups = groups_of(p->d);

    memset(p->base, 0, (uint64_t)groups * p->rows * sizeof *p->base);
    widen_exact(p);
    for (uint32_t i = 0; i < p->rows; i++)
        memcpy(p->weight + (uint64_t)i * BLOCK, prob + i * ld, n * sizeof *prob);
    for (uint32_t c = 0; c < p->width; c += CHUNK)
        weigh(p, n, c);
    prob += n;
    for (uint32_t j = 0; j < p->parts.n_packed; j += n) {
        n = p->parts.n_packed - j < BLOCK ? p->parts.n_packed - j : BLOCK;
        widen(p, codes, n);
        values_block(p, scales, prob + j, ld, n);
        codes += (uint64_t)n * p->d / (p->four ? 2 : 1);
        scales += (uint64_t)n * (p->four ? 4 * groups : 2);
    }
}

/* ---- for this processor */

static void logits_any(struct packed *p, float *logit, uint64_t ld)
{
    logits_body(p, logit, ld);
}

static void values_any(struct packed *p, const float *prob, uint64_t ld)
{
    values_body(p, prob, ld);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void logits_avx2(struct packed *p, float *logit,
                                                            uint64_t ld)
{
    logits_body(p, logit, ld);
}

__attribute__((target("avx2,fma"))) static void values_avx2(struct packed *p, const float *prob,
                                                            uint64_t ld)
{
    values_body(p, prob, ld);
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#define logits_avx2 logits_any
#define values_avx2 values_any
#define has_avx2() false
#endif

void cpu_packed_logits(const struct past_rows *past, uint32_t d, const float *q, uint32_t rows,
                       float *logit, uint64_t ld, float *scratch)
{
    struct packed p = open_tile(past->dtype, past->k, d, rows, scratch);

    p.parts = packed_parts_k(past->dtype, past->n_rows, d);
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t c = 0; c < d; c++)
            p.x[(uint64_t)i * p.width + column(&p, c)] = q[(uint64_t)i * d + c];
    (has_avx2() ? logits_avx2 : logits_any)(&p, logit, ld);
}

void cpu_packed_values(const struct past_rows *past, uint32_t d, const float *prob, uint32_t rows,
                       uint64_t ld, float *o, float *scratch)
{
    struct packed p = open_tile(past->dtype, past->v, d, rows, scratch);

    p.parts = packed_parts_v(past->dtype, past->n_rows, d);
    (has_avx2() ? values_avx2 : values_any)(&p, prob, ld);
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t c = 0; c < d; c++)
            o[(uint64_t)i * d + c] += p.y[(uint64_t)i * p.width + column(&p, c)] +
                                      (p.four ? p.base[c / PACKED_GROUP * rows + i] : 0);
}
