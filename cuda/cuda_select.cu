/* cuda_select.cu - from attention mass to ranks and to the rows that are kept.
 *
 * The one idea: what the host does in an order that scores alone decide has an answer that does
 * not depend on how it is found. A rank is a count of the tokens that go before; the best k rows
 * are those above a threshold that is found bit by bit, and of those at it the lowest. Scores are
 * compared as 64-bit integers in the same order. Sums are the host's, term by term; this file is
 * compiled without fused multiply-add. */
#include "cuda_prim.cuh"
#include "cuda_select.h"

#define BLOCK CUDA_ROW_BLOCK

/* Larger for a larger finite score, equal for equal ones: zeros have no sign. */
PRIM uint64_t key_of(double x)
{
    uint64_t u;

    x = x == 0 ? 0 : x;
    memcpy(&u, &x, sizeof u);
    return u >> 63 ? ~u : u | 1ull << 63;
}

PRIM bool is_finite(double x)
{
    uint64_t u;

    memcpy(&u, &x, sizeof u);
    return (u >> 52 & 0x7ff) != 0x7ff;
}

/* ---- scores */

/* The mean or the largest of the neighbours that exist; not finite where one of them is not. */
PRIM double pooled(const struct cuda_pool_args *a, const float *x, uint32_t j)
{
    uint32_t r = a->kernel / 2, lo = j > r ? j - r : 0, hi = a->m - 1 - j > r ? j + r : a->m - 1;
    double acc = x[lo], bad = x[lo] - x[lo];

    for (uint32_t c = lo + 1; c <= hi; c++) {
        double y = x[c];

        bad += y - y;
        acc = !a->max ? acc + y : y > acc ? y : acc;
    }
    return (a->max ? acc : acc / a->kernel) + bad;
}

__global__ void pool_kernel(struct cuda_pool_args a)
{
    uint64_t n = (uint64_t)a.n_kv * a.m;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        uint32_t g = (uint32_t)(i / a.m), j = (uint32_t)(i % a.m);
        double sum = 0;

        for (uint32_t h = g * a.group; h < (g + 1) * a.group; h++)
            sum += pooled(&a, a.mass + (uint64_t)h * a.m, j);
        a.score[g * a.ld + j] = j < a.n_unseen ? a.unseen : sum * a.share;
    }
}

/* ---- ranks */

__global__ void tokens_kernel(struct cuda_tokens_args a)
{
    for (uint64_t j = prim_thread(); j < a.m; j += prim_threads()) {
        double sum = 0;

        for (uint32_t g = 0; g < a.n_heads; g++)
            sum += a.score[g * a.ld + a.lo + j];
        a.token[j] = sum;
    }
}

/* The first of x[m] that is not finite, or m: the same in every thread. */
PRIM uint32_t first_bad(const double *x, uint32_t m)
{
    __shared__ uint32_t part[BLOCK];
    uint32_t t = threadIdx.x, first = m;

    for (uint32_t j = t; j < m && first == m; j += BLOCK)
        if (!is_finite(x[j]))
            first = j;
    part[t] = first;
    for (uint32_t half = BLOCK / 2; half; half /= 2) {
        __syncthreads();
        if (t < half && part[t + half] < part[t])
            part[t] = part[t + half];
    }
    __syncthreads();
    return part[0];
}

/* A thread counts for one token; keys pass by in tiles. */
PRIM void count_before(const struct cuda_rank_args *a)
{
    __shared__ uint64_t key[BLOCK];
    uint32_t t = threadIdx.x, j = blockIdx.x * BLOCK + t, before = 0;
    uint64_t own = j < a->m ? key_of(a->token[j]) : 0;

    for (uint32_t j0 = 0; j0 < a->m; j0 += BLOCK) {
        uint32_t n = a->m - j0 < BLOCK ? a->m - j0 : BLOCK;

        __syncthreads();
        if (t < n)
            key[t] = key_of(a->token[j0 + t]);
        __syncthreads();
        for (uint32_t i = 0; i < n; i++)
            before += key[i] > own || (key[i] == own && j0 + i < j);
    }
    if (j < a->m)
        a->rank[j] = before + 1;
}

__global__ void rank_kernel(struct cuda_rank_args a)
{
    if (blockIdx.x + 1 < gridDim.x) {
        count_before(&a);
    } else {
        uint32_t first = first_bad(a.token, a.m);

        if (!threadIdx.x)
            a.bad[0] = first < a.m ? first : UINT32_MAX;
    }
}

/* ---- variance of ranks over layers */

/* Squared distances of a token's ranks from their mean; false: it is among no layer's best. */
PRIM bool spread_of(const struct cuda_spread_args *a, uint64_t j, double *ret)
{
    bool best = false;
    double mean = 0, sum = 0;

    for (uint32_t l = 0; l < a->n_layers; l++) {
        uint32_t rank = a->rank[l * (uint64_t)a->m + j];

        best = best || rank <= a->k;
        mean += rank;
    }
    mean /= a->n_layers;
    for (uint32_t l = 0; l < a->n_layers && best; l++) {
        double x = a->rank[l * (uint64_t)a->m + j] - mean;

        sum += x * x;
    }
    *ret = sum;
    return best;
}

/* Both sums over the block, into to[2]. */
PRIM void block_sums(double x, double n, double *to)
{
    x = prim_block_sum(x);
    n = prim_block_sum(n);
    if (!threadIdx.x) {
        to[0] = x;
        to[1] = n;
    }
}

__global__ void spread_kernel(struct cuda_spread_args a)
{
    uint64_t j = prim_thread();
    double x = 0;
    bool counts = j < a.m && spread_of(&a, j, &x);

    block_sums(counts ? x : 0, counts, a.part + 2 * blockIdx.x);
}

__global__ void spread_sum_kernel(struct cuda_spread_args a)
{
    double x = 0, n = 0;

    for (uint32_t i = threadIdx.x; i < a.n_blocks; i += BLOCK) {
        x += a.part[2 * i];
        n += a.part[2 * i + 1];
    }
    block_sums(x, n, a.ret);
}

/* ---- the best rows of a head */

/* How many of x[m] have at least this key: the same in every thread. */
PRIM uint32_t count_from(const double *x, uint32_t m, uint64_t key)
{
    uint32_t n = 0;

    for (uint32_t j = threadIdx.x; j < m; j += BLOCK)
        n += key_of(x[j]) >= key;
    return prim_block_sum(n);
}

/* The largest key that at least k of x[m] have, or a lower one that exactly k have; k > 0. */
PRIM uint64_t threshold(const double *x, uint32_t m, uint32_t k)
{
    uint64_t key = 0;

    for (uint64_t bit = 1ull << 63; bit; bit >>= 1) {
        uint32_t n = count_from(x, m, key | bit);

        if (n >= k)
            key |= bit;
        if (n == k)
            break;
    }
    return key;
}

/* Sum of x over the threads before this one; *all: over the block. */
PRIM uint32_t sum_before(uint32_t x, uint32_t *all)
{
    __shared__ uint32_t part[BLOCK];
    uint32_t t = threadIdx.x;

    __syncthreads(); /* the last sums have been read */
    part[t] = x;
    for (uint32_t step = 1; step < BLOCK; step *= 2) {
        uint32_t y;

        __syncthreads();
        y = t >= step ? part[t - step] : 0;
        __syncthreads();
        part[t] += y;
    }
    __syncthreads();
    *all = part[BLOCK - 1];
    return part[t] - x;
}

/* Rows above the key, and the first of those at it, ascending: k in all. */
PRIM void list_from(const double *x, uint32_t m, uint32_t k, uint32_t first_row, uint64_t key,
                    uint32_t *out)
{
    uint32_t ties = k - count_from(x, m, key + 1), above = 0, equal = 0;

    for (uint32_t j0 = 0; j0 < m; j0 += BLOCK) {
        uint32_t j = j0 + threadIdx.x, before, all;
        uint64_t own = j < m ? key_of(x[j]) : 0;
        bool is_above = own > key, is_equal = j < m && own == key;

        before = sum_before(is_above | (uint32_t)is_equal << 16, &all);
        if (is_above || (is_equal && equal + (before >> 16) < ties)) {
            uint32_t tied = equal + (before >> 16);

            out[above + (before & 0xffff) + (tied < ties ? tied : ties)] = first_row + j;
        }
        above += all & 0xffff;
        equal += all >> 16;
    }
}

__global__ void top_kernel(struct cuda_top_args a)
{
    const double *x = a.score + blockIdx.x * a.ld + a.lo;
    uint32_t m = a.hi - a.lo, count = a.count[blockIdx.x], k = count - (a.lo + a.n - a.hi);
    uint32_t *out = a.index + a.at[blockIdx.x], bad = first_bad(x, m), t = threadIdx.x;

    if (!t)
        a.bad[blockIdx.x] = bad < m ? a.lo + bad : UINT32_MAX;
    if (bad < m)
        return;
    for (uint32_t j = t; j < a.lo; j += BLOCK)
        out[j] = j;
    for (uint32_t j = a.hi + t; j < a.n; j += BLOCK)
        out[count - (a.n - j)] = j;
    if (k)
        list_from(x, m, k, a.lo, threshold(x, m, k), out + a.lo);
}

extern "C" int cuda_launch_select(const struct cuda_launch *l, void *stream)
{
    if (l->kernel == CUDA_POOL)
        PRIM_LAUNCH(pool_kernel, struct cuda_pool_args, l, stream);
    if (l->kernel == CUDA_TOKENS)
        PRIM_LAUNCH(tokens_kernel, struct cuda_tokens_args, l, stream);
    if (l->kernel == CUDA_RANK)
        PRIM_LAUNCH(rank_kernel, struct cuda_rank_args, l, stream);
    if (l->kernel == CUDA_SPREAD)
        PRIM_LAUNCH(spread_kernel, struct cuda_spread_args, l, stream);
    if (l->kernel == CUDA_SPREAD_SUM)
        PRIM_LAUNCH(spread_sum_kernel, struct cuda_spread_args, l, stream);
    PRIM_LAUNCH(top_kernel, struct cuda_top_args, l, stream);
}
