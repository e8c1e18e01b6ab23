/* ref_mul.c - the matrix product of backend `ref`.
 *
 * The one idea: a tile of rows x 16 columns stays in registers while k runs; each
 * element is one chain of multiply, then add (the tree is compiled with
 * -ffp-contract=off), so every variant below gives the same bits and only the
 * speed differs. No blocking over k, which would need a second rounding order. */
#include "ref.h"

#include <string.h>

typedef float vec __attribute__((vector_size(REF_WIDE * sizeof(float))));
typedef float vec_any __attribute__((vector_size(REF_WIDE * sizeof(float)), aligned(4), may_alias));

static inline __attribute__((always_inline)) void store(float *c, const vec *v, uint32_t n)
{
    if (n >= REF_WIDE)
        *(vec_any *)c = *v;
    else
        memcpy(c, v, n * sizeof *c);
}

/* One tile: `rows` is a constant at every call, so that the array lives in registers. */
static inline __attribute__((always_inline)) void
tile(const struct ref_mul *x, const float *a, const float *b, float *c, uint32_t n, const int rows)
{
    vec acc[8];

#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        acc[r] = (vec){0};
    for (uint32_t k = 0; k < x->k; k++) {
        vec row = *(const vec_any *)(b + k * x->ldb);

#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            acc[r] += a[(uint64_t)r * x->lda + k] * row;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        store(c + (uint64_t)r * x->ldc, &acc[r], n);
}

static inline __attribute__((always_inline)) void mul_body(const struct ref_mul *x, const int rows)
{
    for (uint32_t j = 0; j < x->n; j += REF_WIDE) {
        const float *b = x->b + (uint64_t)(j / REF_WIDE) * x->panel_stride;
        uint32_t i = 0;

        for (; i + (uint32_t)rows <= x->m; i += (uint32_t)rows)
            tile(x, x->a + i * x->lda, b, x->c + i * x->ldc + j, x->n - j, rows);
        for (; i < x->m; i++)
            tile(x, x->a + i * x->lda, b, x->c + i * x->ldc + j, x->n - j, 1);
    }
}

static void mul_generic(const struct ref_mul *x)
{
    mul_body(x, 2);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void mul_avx2(const struct ref_mul *x)
{
    mul_body(x, 4);
}

__attribute__((target("avx512f"))) static void mul_avx512(const struct ref_mul *x)
{
    mul_body(x, 8);
}
#endif

ref_mul_fn *ref_mul_pick(const char **ret_isa)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        *ret_isa = "avx512";
        return mul_avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
        *ret_isa = "avx2";
        return mul_avx2;
    }
#endif
    *ret_isa = "generic";
    return mul_generic;
}

void ref_pack_rows(struct ref_matrix *w, uint32_t row0, const float *src, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t row = row0 + i;
        float *to = w->panel + (uint64_t)(row / REF_WIDE) * w->n_in * REF_WIDE + row % REF_WIDE;

        for (uint32_t k = 0; k < w->n_in; k++)
            to[(uint64_t)k * REF_WIDE] = src[(uint64_t)i * w->n_in + k];
    }
}
