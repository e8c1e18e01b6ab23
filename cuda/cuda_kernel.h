/* cuda_kernel.h - the kernels of backend `cuda`: their names, arguments and launches.
 *
 * Purpose    The seam between plain C, which decides what runs on which bytes with which grid,
 *            and cuda_*.cu, which computes. A launch is data, so that a test can look at it and
 *            run it on a processor (tests/cuda).
 * Shapes     As in backend.h. T is the element type: f32, or bf16 as 16 bits. Offsets are 64
 *            bits wide wherever rows are multiplied by a width.
 * Ownership  Arguments are copied at the launch; what they point to is device memory that lives
 *            until the stream has passed.
 * Order      No kernel adds with atomics and no split depends on anything but shapes: the same
 *            input gives the same bits on the same device.
 * Errors     Launch functions return 0 or the driver's own number.
 */
#ifndef LARDER_CUDA_KERNEL_H
#define LARDER_CUDA_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum cuda_kernel {
    CUDA_DEQUANT,
    CUDA_RMSNORM,
    CUDA_ANGLES,
    CUDA_ROPE,
    CUDA_SWIGLU,
    CUDA_ATTEND,     /* any head_dim and any stored rows, f32 products */
    CUDA_MERGE,      /* what several blocks of CUDA_ATTEND made of the same rows */
    CUDA_ATTEND_MMA, /* bf16 tensor cores; variant: head_dim */
    CUDA_WINDOW_LOGITS,
    CUDA_WINDOW_STATS,
    CUDA_WINDOW_MASS,
    CUDA_POOL, /* cuda_select.h */
    CUDA_TOKENS,
    CUDA_RANK,
    CUDA_SPREAD,
    CUDA_SPREAD_SUM,
    CUDA_TOP,
    CUDA_GATHER,       /* variant: bytes of a unit */
    CUDA_REPLAY_STATS, /* cuda_replay.h */
    CUDA_REPLAY_PART,
    CUDA_REPLAY_SCORE,
    CUDA_WIDEN, /* cuda_match.h */
    CUDA_MATCH_KEPT,
    CUDA_MATCH_FULL,
    CUDA_MATCH_WEIGH,
    CUDA_MATCH_REDUCE,
    CUDA_MATCH_TAKE,
    CUDA_MATCH_BIAS,
    CUDA_MATCH_VALUES,
    CUDA_PACK_RANGES, /* cuda_pack.h */
    CUDA_PACK_KEYS,
    CUDA_PACK_VALUES,
    CUDA_UNPACK,
    CUDA_KERNELS,
};

enum cuda_lane { CUDA_COMPUTE, CUDA_COPY, CUDA_LEAVE, CUDA_LANES };

struct cuda_launch {
    enum cuda_kernel kernel;
    bool bf16; /* T */
    uint32_t variant;
    uint32_t grid[3], block, shared;
    enum cuda_lane lane;
    const void *args; /* the struct of the kernel, below */
};

/* Stored blocks to T, one thread an element. */
struct cuda_dequant_args {
    const uint8_t *src;
    void *dst;
    uint64_t n;
    uint32_t type, block_len, block_bytes; /* dequant.h */
};

/* out[i] = x[i] / rms(x[i]) * w, one block a row. */
struct cuda_rmsnorm_args {
    const float *x; /* [grid][n] */
    const float *w; /* [n] */
    void *out;      /* [grid][n] T */
    uint32_t n;
    double eps;
};

/* table[n][2][half]: cos, sin of pos[i] * freq[j], times `factor`. */
struct cuda_angles_args {
    const uint32_t *pos;
    const double *freq;
    float *table;
    uint32_t n, half;
    double factor;
};

/* Rows of x, [n][(n_heads + 2 n_kv) d]: bias added, normalised and rotated (q, k), and scattered to
 * rows row0.. of [heads][stride][d]. One block a row, a warp a head. */
struct cuda_rope_args {
    const float *x, *table;
    const float *bias;            /* [(n_heads + 2 n_kv) d], or NULL */
    const float *q_norm, *k_norm; /* [d], or NULL */
    double eps;                   /* of the norms */
    void *q, *k, *v;
    uint32_t n_heads, n_kv, d, dims; /* dims: rotated elements of a head */
    uint64_t row0, stride;
};

/* out[n][n_ff] = silu(x[.][0..n_ff]) * x[.][n_ff..2 n_ff]. */
struct cuda_swiglu_args {
    const float *x;
    void *out;
    uint64_t n;
    uint32_t n_ff;
};

/* Keys or values of one KV head as they are stored: [n_rows][d], or a tile (packed.h). */
struct cuda_tile {
    const uint8_t *at;
    uint64_t scales, codes; /* bytes from its start */
};

/* Stored rows of one KV head. Tensor cores want bf16 at multiples of 16 bytes. */
struct cuda_past {
    struct cuda_tile k, v;
    const float *bias;        /* [n_rows], or NULL */
    const uint32_t *position; /* [n_rows], ascending; read where `sliding` is not 0 */
    uint32_t n_rows;
    uint32_t dtype;   /* enum kv_dtype */
    uint32_t n_exact; /* packed.h */
};

/* o[i][h] = softmax(q[h][i] . K / sqrt(d) + bias) V for rows row0 <= i < n_rows. Keys of a KV head
 * are its stored rows and behind them n_tail of the sequence's own, at positions pos0 and up; the
 * last n_rows of these are the rows i, of which each sees the keys up to its own that are less than
 * `sliding` positions before it (0: all of them). CUDA_ATTEND deals the keys of few rows out to
 * n_splits blocks, whose sums CUDA_MERGE joins in order. */
struct cuda_attend_args {
    const void *q, *k, *v;
    void *o;                      /* [n_rows][n_heads * d] */
    const struct cuda_past *past; /* [n_kv]; NULL: none */
    uint64_t q_stride, kv_stride;
    uint32_t n_heads, group, d;
    uint32_t n_rows, row0, n_tail;
    uint32_t sliding, pos0;
    uint32_t n_splits; /* 1: o is written at once */
    float *part; /* [n_rows - row0][n_heads][n_splits][d + 2]: sums, their maximum and total */
    float scale;
};

/* Window mass in three steps, over heads head0 .. head0 + n_batch - 1:
 * logit[b][i][j] = q[h][n - w + i] . k[g][j] / sqrt(d) of the keys j that row n - w + i sees;
 * stat[b][i] = (maximum, 1 / sum); mass[h][j] = sum over i of exp(logit - maximum) / sum. */
struct cuda_window_args {
    const void *q, *k;
    float *logit; /* [n_batch][w][n] */
    float *stat;  /* [n_batch][w][2] */
    float *mass;  /* [n_heads][n - w] */
    uint64_t stride;
    uint32_t n, w, d, group, head0, n_batch;
    uint32_t sliding; /* as in struct cuda_attend_args */
    float scale;
};

#define CUDA_ROW_BLOCK 256u  /* threads of row kernels */
#define CUDA_ATTEND_ROWS 16u /* query rows of a block of CUDA_ATTEND, of all heads of a group */
#define CUDA_ATTEND_KEYS 32u
#define CUDA_SPLIT_KEYS 256u  /* keys that are worth a block of their own */
#define CUDA_SPLIT_BLOCKS 256 /* a GPU has about half as many processors */
#define CUDA_MMA_ROWS 64u     /* of CUDA_ATTEND_MMA: four warps of 16 rows */
#define CUDA_MMA_KEYS 64u
#define CUDA_MMA_PAD 8u      /* elements after each row in shared memory: no bank conflicts */
#define CUDA_WINDOW_ROWS 16u /* window rows and keys of a block of CUDA_WINDOW_LOGITS */
#define CUDA_WINDOW_KEYS 64u
#define CUDA_MAX_HEAD_DIM 256u

/* One per file; each knows its own kernels. `stream` is a cudaStream_t. */
int cuda_launch_rows(const struct cuda_launch *l, void *stream);
int cuda_launch_dequant(const struct cuda_launch *l, void *stream);
int cuda_launch_attend(const struct cuda_launch *l, void *stream);
int cuda_launch_mma(const struct cuda_launch *l, void *stream);
int cuda_launch_window(const struct cuda_launch *l, void *stream);

/* By kernel (cuda_launch.c). */
int cuda_launch_any(const struct cuda_launch *l, void *stream);

#ifdef __cplusplus
}
#endif
#endif
