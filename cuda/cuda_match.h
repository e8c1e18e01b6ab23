/* cuda_match.h - arguments of the kernels that fit what is kept.
 *
 * The part of cuda_kernel.h that belongs to cuda_match.c. A fit is of a part of the document
 * (select_ops.h) and of n_batch KV heads from head0 on; a KV head has group * n_now queries at
 * once: of each of its query heads the replay rows row0 .. row0 + n_now - 1 of the part. Matrices
 * have t_pad rows, more than any head's t kept ones of the part; those that do not exist are zeros.
 */
#ifndef LARDER_CUDA_MATCH_H
#define LARDER_CUDA_MATCH_H

#include "cuda_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_MATCH_PAD 64u  /* rows of matrices come by so many: few shapes of products */
#define CUDA_MATCH_WARPS 8u /* queries of a block of CUDA_MATCH_WEIGH */

/* CUDA_WIDEN: to[h][i][c] = scale * from[head0 + h][row0 + i][c], of T. */
struct cuda_widen_args {
    const void *from; /* [heads][stride][d] */
    float *to;        /* [n_heads][n][d] */
    uint64_t stride, row0, n;
    uint32_t head0, n_heads, d;
    float scale;
};

/* A KV head of a batch, as the host sees it. */
struct cuda_match_head {
    const void *v; /* its kept rows of this part, [t][d] of T */
    uint64_t at;   /* of all kept rows, the first of these */
    uint32_t t;
    uint32_t active; /* it is still to be solved, */
    uint32_t fresh;  /* with no row at a bound yet, */
    float ridge;     /* and this */
};

struct cuda_match_verdict {
    uint32_t indefinite; /* the solver's word */
    uint32_t out;        /* a weight was out of bounds */
    uint32_t bad;        /* something is not finite */
};

struct cuda_match_args {
    struct cuda_match_head *head;       /* [n_batch] */
    struct cuda_match_verdict *verdict; /* [n_batch] */
    const float *sums;                  /* cuda_replay.h, from the part's first row on */
    const float *keys;                  /* [rows of all heads][d], as they will be read back */
    float *q;                           /* [n_batch][group * n_now][d], scaled */
    float *rows_k, *rows_v;             /* [n_batch][n_rows][d]: all of the part's */
    float *full;                        /* [n_batch][group * n_now][n_rows]: their probabilities */
    float *kept_k, *minus_v;            /* [n_batch][t_pad][d] */
    /* [n_batch][group * n_now][wide]: probabilities of the kept rows and, from column t_pad on,
     * what they are to give: the mass, or what of the output is missing */
    float *p;
    float *matrix;   /* [n_batch][t_pad][wide]: p^T p, and behind it the right-hand side */
    float *work;     /* [n_batch][t_pad][t_pad] */
    float *x;        /* [n_batch][d][t_pad]: solutions, of biases in the first row */
    float *weight;   /* [n_batch][t_pad]: e^bias */
    uint32_t *fixed; /* [n_batch][t_pad]: at a bound */
    float *to_v, *bias;
    uint32_t d, group, head0, n_batch, n_rows, n_replay, row0, n_now;
    uint32_t t_pad, wide;
    float least, most; /* weights */
    bool values;       /* which fit it is */
};

/* CUDA_MATCH_KEPT: kept_k, minus_v, weights of 1; CUDA_MATCH_FULL: logits in `full` become
 * probabilities; CUDA_MATCH_WEIGH: those in p, weighted, a warp a query; CUDA_MATCH_REDUCE: `work`
 * and `x` of the rows that are free, a block a row; CUDA_MATCH_TAKE: weights, a block a head;
 * CUDA_MATCH_BIAS: biases; CUDA_MATCH_VALUES: values. */
int cuda_launch_match(const struct cuda_launch *l, void *stream);

#ifdef __cplusplus
}
#endif
#endif
