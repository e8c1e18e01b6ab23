/* ref_mul.c - the matrix product of backend `ref`.
 *
 * The one idea: the tiles of mul_tile.h without contraction (the tree is compiled with
 * -ffp-contract=off). Each element is one chain of multiply, then add, so every
 * variant gives the same bits and only the speed differs. No blocking over k, which
 * would need a second rounding order. */
#include "ref.h"

#include "mul.h"

#define MUL_NAME generic
#define MUL_LANES 4
#define MUL_ROWS 2
#define MUL_TARGET
#include "mul_tile.h"

#if defined(__x86_64__)
#define MUL_NAME avx2
#define MUL_LANES 8
#define MUL_ROWS 4
#define MUL_TARGET __attribute__((target("avx2")))
#include "mul_tile.h"

#define MUL_NAME avx512
#define MUL_LANES 16
#define MUL_ROWS 8
#define MUL_TARGET __attribute__((target("avx512f")))
#include "mul_tile.h"
#endif

static struct mul plain(const struct ref_mul *x)
{
    return (struct mul){
        .a = x->a,
        .a_row = x->lda,
        .a_k = 1,
        .a_panel = MUL_WIDE * x->lda,
        .b = x->b,
        .b_k = x->ldb,
        .b_panel = x->panel_stride,
        .c = x->c,
        .c_row = x->ldc,
        .c_panel = MUL_WIDE,
        .m = x->m,
        .n = x->n,
        .k = x->k,
    };
}

static void mul_generic(const struct ref_mul *x)
{
    struct mul m = plain(x);

    generic(&m);
}

#if defined(__x86_64__)
static void mul_avx2(const struct ref_mul *x)
{
    struct mul m = plain(x);

    avx2(&m);
}

static void mul_avx512(const struct ref_mul *x)
{
    struct mul m = plain(x);

    avx512(&m);
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
