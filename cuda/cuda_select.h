/* cuda_select.h - arguments of the kernels that score, choose and move rows.
 *
 * The part of cuda_kernel.h that belongs to cuda_select.c; shapes as in select_ops.h.
 */
#ifndef LARDER_CUDA_SELECT_H
#define LARDER_CUDA_SELECT_H

#include "cuda_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* CUDA_POOL: score[g][ld] of mass [n_kv * group][m], one thread a row of a KV head. */
struct cuda_pool_args {
    const float *mass;
    double *score;
    uint64_t ld;
    uint32_t n_kv, group, m;
    uint32_t kernel;
    bool max; /* of the neighbours, not their mean */
    double share;
    uint32_t n_unseen;
    double unseen;
};

/* CUDA_TOKENS: token[j] = sum over the heads of score[.][lo + j]. */
struct cuda_tokens_args {
    const double *score;
    double *token;
    uint64_t ld;
    uint32_t n_heads, lo, m;
};

/* CUDA_RANK: rank[j] = 1 + tokens that go before j; NULL: not wanted. The last block writes into
 * bad[0] the first token that is not finite, or UINT32_MAX. */
struct cuda_rank_args {
    const double *token;
    uint32_t *rank, *bad;
    uint32_t m;
};

/* CUDA_SPREAD: part[block] = sums over the block's tokens: squared distances of their ranks, and
 * how many tokens count. CUDA_SPREAD_SUM: ret[0..1], those of all blocks. */
struct cuda_spread_args {
    const uint32_t *rank; /* [n_layers][m] */
    double *part;         /* [n_blocks][2] */
    double *ret;
    uint32_t n_layers, m, k, n_blocks;
};

/* CUDA_TOP: one block a head; its list is index[at .. at + count). bad as above, one a head. */
struct cuda_top_args {
    const double *score;
    uint64_t ld;
    uint32_t n, lo, hi;
    const uint32_t *count, *at;
    uint32_t *index, *bad;
};

/* CUDA_GATHER: n rows of `units` units of `variant` bytes; index NULL: the first ones. */
struct cuda_gather_args {
    const void *from;
    void *to;
    const uint32_t *index;
    uint64_t n;
    uint32_t units;
};

int cuda_launch_select(const struct cuda_launch *l, void *stream);
int cuda_launch_gather(const struct cuda_launch *l, void *stream);

#ifdef __cplusplus
}
#endif
#endif
