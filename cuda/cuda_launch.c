/* cuda_launch.c - grids of the kernels, and which file has which kernel.
 *
 * The one idea: a launch follows from shapes alone - not from the device, its load or its free
 * memory - so that the same input takes the same sums in the same order. */
#include "cuda.h"
#include "cuda_match.h"
#include "cuda_pack.h"
#include "cuda_replay.h"
#include "cuda_select.h"

#define FLAT_BLOCKS 16384u /* each thread then takes several elements */

struct cuda_launch cuda_grid_rows(enum cuda_kernel k, bool bf16, uint64_t rows, const void *args)
{
    return (struct cuda_launch){.kernel = k,
                                .bf16 = bf16,
                                .grid = {(uint32_t)rows, 1, 1},
                                .block = CUDA_ROW_BLOCK,
                                .args = args};
}

struct cuda_launch cuda_grid_flat(enum cuda_kernel k, bool bf16, uint64_t n, const void *args)
{
    uint64_t want = (n + CUDA_ROW_BLOCK - 1) / CUDA_ROW_BLOCK;

    return cuda_grid_rows(k, bf16, want < FLAT_BLOCKS ? want : FLAT_BLOCKS, args);
}

static bool has_mma(uint32_t d)
{
    return d == 32 || d == 64 || d == 80 || d == 96 || d == 128;
}

/* Rows of a group in blocks of CUDA_ATTEND. */
static uint32_t row_blocks(const struct cuda_attend_args *a)
{
    return cuda_blocks((uint64_t)(a->n_rows - a->row0) * a->group, CUDA_ATTEND_ROWS);
}

uint32_t cuda_attend_splits(const struct cuda_attend_args *a, uint32_t n_keys)
{
    uint32_t n_blocks = row_blocks(a) * (a->n_heads / a->group);
    uint32_t most = (n_keys + CUDA_SPLIT_KEYS - 1) / CUDA_SPLIT_KEYS, n;

    if (!n_blocks || n_blocks >= CUDA_SPLIT_BLOCKS)
        return 1;
    n = (CUDA_SPLIT_BLOCKS + n_blocks - 1) / n_blocks;
    return most < 1 ? 1 : n < most ? n : most;
}

struct cuda_launch cuda_grid_attend(const struct cuda_attend_args *a, bool bf16, bool bf16_past)
{
    uint32_t rows = a->n_rows - a->row0, d = a->d;
    struct cuda_launch l = {.bf16 = bf16, .grid[2] = 1, .args = a};

    if (bf16 && bf16_past && has_mma(d) && row_blocks(a) > 1) {
        l.kernel = CUDA_ATTEND_MMA;
        l.variant = d;
        l.block = 128;
        l.shared = (CUDA_MMA_ROWS + 4 * CUDA_MMA_KEYS) * (d + CUDA_MMA_PAD) * 2;
        l.grid[0] = cuda_blocks(rows, CUDA_MMA_ROWS);
        l.grid[1] = a->n_heads;
    } else {
        l.kernel = CUDA_ATTEND;
        l.block = CUDA_ATTEND_ROWS * 8;
        l.shared = ((CUDA_ATTEND_ROWS + 2 * CUDA_ATTEND_KEYS) * (d + 1) +
                    CUDA_ATTEND_ROWS * CUDA_ATTEND_KEYS) *
                   4;
        l.grid[0] = row_blocks(a);
        l.grid[1] = a->n_heads / a->group;
        l.grid[2] = a->n_splits;
    }
    return l;
}

struct cuda_launch cuda_grid_merge(const struct cuda_attend_args *a, bool bf16)
{
    return cuda_grid_rows(CUDA_MERGE, bf16, (uint64_t)(a->n_rows - a->row0) * a->n_heads, a);
}

struct cuda_launch cuda_grid_window(enum cuda_kernel k, bool bf16, const struct cuda_window_args *a)
{
    struct cuda_launch l = {.kernel = k, .bf16 = bf16, .block = CUDA_ROW_BLOCK, .args = a};

    l.grid[2] = 1;
    if (k == CUDA_WINDOW_LOGITS) {
        l.grid[0] = cuda_blocks(a->n, CUDA_WINDOW_KEYS);
        l.grid[1] = cuda_blocks(a->w, CUDA_WINDOW_ROWS);
        l.grid[2] = a->n_batch;
        l.shared = (CUDA_WINDOW_ROWS + CUDA_WINDOW_KEYS) * (a->d + 1) * 4;
    } else if (k == CUDA_WINDOW_STATS) {
        l.grid[0] = a->w;
        l.grid[1] = a->n_batch;
    } else {
        l.grid[0] = cuda_blocks(a->n - a->w, CUDA_ROW_BLOCK);
        l.grid[1] = a->n_batch;
    }
    return l;
}

uint32_t cuda_window_batch(uint32_t n_heads, uint32_t n, uint32_t w)
{
    uint64_t fit = CUDA_WINDOW_BYTES / ((uint64_t)n * w * sizeof(float));

    return fit < 1 ? 1 : fit < n_heads ? (uint32_t)fit : n_heads;
}

int cuda_launch_any(const struct cuda_launch *l, void *stream)
{
    switch (l->kernel) {
    case CUDA_RMSNORM:
    case CUDA_ANGLES:
    case CUDA_ROPE:
    case CUDA_SWIGLU:
        return cuda_launch_rows(l, stream);
    case CUDA_ATTEND:
    case CUDA_MERGE:
        return cuda_launch_attend(l, stream);
    case CUDA_ATTEND_MMA:
        return cuda_launch_mma(l, stream);
    case CUDA_WINDOW_LOGITS:
    case CUDA_WINDOW_STATS:
    case CUDA_WINDOW_MASS:
        return cuda_launch_window(l, stream);
    case CUDA_POOL:
    case CUDA_TOKENS:
    case CUDA_RANK:
    case CUDA_SPREAD:
    case CUDA_SPREAD_SUM:
    case CUDA_TOP:
        return cuda_launch_select(l, stream);
    case CUDA_GATHER:
        return cuda_launch_gather(l, stream);
    case CUDA_REPLAY_STATS:
    case CUDA_REPLAY_PART:
    case CUDA_REPLAY_SCORE:
        return cuda_launch_replay(l, stream);
    case CUDA_WIDEN:
    case CUDA_MATCH_KEPT:
    case CUDA_MATCH_FULL:
    case CUDA_MATCH_WEIGH:
    case CUDA_MATCH_REDUCE:
    case CUDA_MATCH_TAKE:
    case CUDA_MATCH_BIAS:
    case CUDA_MATCH_VALUES:
        return cuda_launch_match(l, stream);
    case CUDA_PACK_RANGES:
    case CUDA_PACK_KEYS:
    case CUDA_PACK_VALUES:
    case CUDA_UNPACK:
        return cuda_launch_pack(l, stream);
    default:
        return cuda_launch_dequant(l, stream);
    }
}

static const char *const names[CUDA_KERNELS] = {
    [CUDA_DEQUANT] = "dequantisation",
    [CUDA_RMSNORM] = "RMSNorm",
    [CUDA_ANGLES] = "the angles of RoPE",
    [CUDA_ROPE] = "RoPE",
    [CUDA_SWIGLU] = "SwiGLU",
    [CUDA_ATTEND] = "attention",
    [CUDA_MERGE] = "joining attention",
    [CUDA_ATTEND_MMA] = "attention on tensor cores",
    [CUDA_WINDOW_LOGITS] = "window logits",
    [CUDA_WINDOW_STATS] = "window sums",
    [CUDA_WINDOW_MASS] = "window mass",
    [CUDA_POOL] = "pooling",
    [CUDA_TOKENS] = "the scores of tokens",
    [CUDA_RANK] = "ranking",
    [CUDA_SPREAD] = "the variance of ranks",
    [CUDA_SPREAD_SUM] = "the variance of ranks",
    [CUDA_TOP] = "choosing rows",
    [CUDA_GATHER] = "gathering rows",
    [CUDA_REPLAY_STATS] = "replay sums",
    [CUDA_REPLAY_PART] = "replay probabilities",
    [CUDA_REPLAY_SCORE] = "replay scores",
    [CUDA_WIDEN] = "widening rows",
    [CUDA_MATCH_KEPT] = "the kept rows of a fit",
    [CUDA_MATCH_FULL] = "the probabilities of a fit",
    [CUDA_MATCH_WEIGH] = "the probabilities of a fit",
    [CUDA_MATCH_REDUCE] = "the equations of a fit",
    [CUDA_MATCH_TAKE] = "the weights of a fit",
    [CUDA_MATCH_BIAS] = "the biases of a fit",
    [CUDA_MATCH_VALUES] = "the values of a fit",
    [CUDA_PACK_RANGES] = "the ranges of keys",
    [CUDA_PACK_KEYS] = "packing keys",
    [CUDA_PACK_VALUES] = "packing values",
    [CUDA_UNPACK] = "reading keys back",
};

int cuda_run(struct cuda_backend *b, struct cuda_launch l, struct larder_err *e)
{
    if (!l.grid[0] || !l.grid[1] || !l.grid[2])
        return 0; /* nothing to do, and the driver refuses empty grids */
    return cuda_check(b, b->d->launch(b->device, &l), names[l.kernel], e);
}
