/* cuda_replay.cu - how much a replay needed each row of the document.
 *
 * The one idea: the logits are products, which the library for products makes; what is left are
 * two passes over them, as for the window: a row's maximum and sum, then for each key the largest
 * probability, or the sum of squares, over blocks of rows, and over the blocks in their order. */
#include "cuda_prim.cuh"
#include "cuda_replay.h"

/* Column of the i-th key that a row sees. */
PRIM uint32_t column(const struct cuda_replay_args *a, uint32_t i)
{
    if (i < a->n_sinks)
        return i;
    i -= a->n_sinks;
    return i < a->n_rows ? a->at_rows + i : a->at_own + i - a->n_rows;
}

PRIM float warp_max(float x)
{
    for (int step = 16; step; step /= 2)
        x = fmaxf(x, prim_shfl_xor(x, step));
    return x;
}

/* Warp: a row of a head. The last block has warps without one, which take the last row again. */
__global__ void replay_stats_kernel(struct cuda_replay_args a)
{
    uint32_t want = blockIdx.x * CUDA_REPLAY_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t i = want < a.n_now ? want : a.n_now - 1, row = a.row0 + i;
    uint32_t seen = a.n_sinks + a.n_rows + (a.own ? row + 1 : 0);
    uint64_t at = (uint64_t)blockIdx.y * a.n_now + i;
    const float *x = a.logit + at * a.ld;
    float max = -INFINITY, sum = 0, mass = 0; /* mass: without the first rows */

    for (uint32_t j = lane; j < seen; j += 32)
        max = fmaxf(max, x[column(&a, j)] * a.scale);
    max = warp_max(max);
    for (uint32_t j = lane; j < seen; j += 32) {
        float p = expf(x[column(&a, j)] * a.scale - max);

        sum += p;
        mass += j < a.n_sinks ? 0 : p;
    }
    sum = prim_warp_sum(sum);
    mass = prim_warp_sum(mass);
    if (want >= a.n_now || lane)
        return;
    a.stat[2 * at] = max;
    a.stat[2 * at + 1] = (a.length ? a.length[row] : 1) / sum;
    if (a.sums) {
        float *to = a.sums + 2 * ((uint64_t)(a.head0 + blockIdx.y) * a.n_replay + row);

        to[0] = max + logf(sum);
        to[1] = mass / sum;
    }
}

/* A comparison would swallow what is not a number: x - x keeps it. */
PRIM void take(bool square, float p, float *best, float *bad)
{
    if (square) {
        *best += p * p;
        return;
    }
    *bad += p - p;
    *best = p > *best ? p : *best;
}

__global__ void replay_part_kernel(struct cuda_replay_args a)
{
    uint64_t j = prim_thread();
    uint32_t b = blockIdx.z, h = a.head0 + b, first = blockIdx.y * CUDA_REPLAY_ROWS;
    uint32_t last = a.n_now - first < CUDA_REPLAY_ROWS ? a.n_now : first + CUDA_REPLAY_ROWS;
    uint64_t block = (uint64_t)h * a.n_blocks + a.row0 / CUDA_REPLAY_ROWS + blockIdx.y;
    float best = 0, bad = 0, worth;

    if (j >= a.n_rows)
        return;
    worth = a.worth ? a.worth[(uint64_t)h * a.n_doc + a.row + j] : 1;
    for (uint32_t i = first; i < last; i++) {
        uint64_t at = (uint64_t)b * a.n_now + i;
        float x = a.logit[at * a.ld + a.at_rows + j] * a.scale - a.stat[2 * at];

        take(a.square, expf(x) * a.stat[2 * at + 1] * worth, &best, &bad);
    }
    a.part[block * a.n_rows + j] = best + bad;
}

__global__ void replay_score_kernel(struct cuda_replay_args a)
{
    uint64_t n = (uint64_t)a.n_kv * a.n_rows;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        uint64_t g = i / a.n_rows, j = i % a.n_rows, n_parts = (uint64_t)a.group * a.n_blocks;
        const float *part = a.part + g * n_parts * a.n_rows + j;
        float best = 0, bad = 0;
        double sum = 0;

        for (uint64_t k = 0; k < n_parts; k++) {
            float p = part[k * a.n_rows];

            sum += p;
            take(false, p, &best, &bad);
        }
        a.score[g * a.n_doc + a.row + j] = a.square ? (float)(sum / a.n_queries) : best + bad;
    }
}

extern "C" int cuda_launch_replay(const struct cuda_launch *l, void *stream)
{
    if (l->kernel == CUDA_REPLAY_STATS)
        PRIM_LAUNCH(replay_stats_kernel, struct cuda_replay_args, l, stream);
    if (l->kernel == CUDA_REPLAY_PART)
        PRIM_LAUNCH(replay_part_kernel, struct cuda_replay_args, l, stream);
    PRIM_LAUNCH(replay_score_kernel, struct cuda_replay_args, l, stream);
}
