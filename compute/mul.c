/* mul.c - the product of mul.h, compiled once per instruction set.
 *
 * The one idea: a tile of rows x 16 columns stays in registers while k runs; the number of
 * rows is what fills the registers of the set. The tree forbids contraction
 * (-ffp-contract=off), this file asks for it: the oracle is ref_mul.c. */
#pragma GCC optimize("O3", "fp-contract=fast")
#include "mul.h"

#define MUL_NAME mul_generic
#define MUL_LANES 4
#define MUL_ROWS 2
#define MUL_TARGET
#include "mul_tile.h"

#if defined(__x86_64__)
#define MUL_NAME mul_avx2
#define MUL_LANES 8
#define MUL_ROWS 4
#define MUL_TARGET __attribute__((target("avx2,fma")))
#include "mul_tile.h"

#define MUL_NAME mul_avx512
#define MUL_LANES 16
#define MUL_ROWS 8
#define MUL_TARGET __attribute__((target("avx512f")))
#include "mul_tile.h"
#endif

mul_fn *mul_pick(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return mul_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return mul_avx2;
#endif
    return mul_generic;
}
