/* cuda_replay.h - arguments of the kernels that score by a replay.
 *
 * The part of cuda_kernel.h that belongs to cuda_replay.c. A part of the replay (select_ops.h) is n
 * replay rows that look at n_rows rows of the document, at the first rows of all, and, causally,
 * at each other. Columns of a row's logits: the first rows at 0, n_sinks of them; those of the
 * document from at_rows; those of the replay from at_own, of which it sees its own and those
 * before.
 */
#ifndef LARDER_CUDA_REPLAY_H
#define LARDER_CUDA_REPLAY_H

#include "cuda_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_REPLAY_ROWS 64u /* replay rows whose probabilities become one number a key */
#define CUDA_REPLAY_WARPS 8u /* rows of a block of CUDA_REPLAY_STATS */

/* CUDA_REPLAY_STATS: a warp for a row and head; CUDA_REPLAY_PART: part[h][block of rows][j], a
 * thread for each; CUDA_REPLAY_SCORE: score[g][row + j] from those of all blocks and heads. The
 * first two work on rows row0 .. row0 + n_now - 1 and heads head0 .. head0 + n_batch - 1. */
struct cuda_replay_args {
    float *logit;        /* [n_batch][n_now][ld], not scaled */
    float *stat;         /* [n_batch][n_now][2]: maximum, what a probability is multiplied by */
    float *part;         /* [n_heads][n_blocks][n_rows] */
    double *score;       /* [n_kv][n_doc] */
    float *sums;         /* [n_heads][n_replay][2] of the part's first row and up, or NULL */
    const float *worth;  /* [n_heads][n_doc], or NULL */
    const float *length; /* [n], or NULL */
    uint64_t ld;
    uint32_t n_sinks, at_rows, at_own, n_rows, n, n_blocks;
    uint32_t row0, n_now, head0, n_batch;
    uint32_t n_kv, group, n_doc, n_replay, row;
    float scale;
    bool own;    /* rows see each other */
    bool square; /* the mean square over n_queries, not the largest */
    uint32_t n_queries;
};

int cuda_launch_replay(const struct cuda_launch *l, void *stream);

#ifdef __cplusplus
}
#endif
#endif
