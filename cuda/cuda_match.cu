/* cuda_match.cu - what stands between the products and the solver of a fit.
 *
 * The one idea: probabilities, weights and bounds are element by element; every sum over queries
 * or rows is a product's or the solver's, but for what rows at a bound leave to the others, which
 * a block adds up in f64. */
#include "cuda_match.h"
#include "cuda_prim.cuh"

#define BLOCK CUDA_ROW_BLOCK

template <typename T> __global__ void widen_kernel(struct cuda_widen_args a)
{
    uint64_t n = a.n_heads * a.n * a.d;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        uint64_t h = i / (a.n * a.d), at = i % (a.n * a.d);

        a.to[i] = a.scale *
                  prim_load(((const T *)a.from)[((a.head0 + h) * a.stride + a.row0) * a.d + at]);
    }
}

template <typename T> __global__ void kept_kernel(struct cuda_match_args a)
{
    uint64_t per_head = (uint64_t)a.t_pad * a.d;

    for (uint64_t i = prim_thread(); i < a.n_batch * per_head; i += prim_threads()) {
        uint64_t b = i / per_head, at = i % per_head;
        const struct cuda_match_head *h = &a.head[b];
        bool there = at < (uint64_t)h->t * a.d;

        a.kept_k[i] = there ? a.keys[h->at * a.d + at] : 0;
        a.minus_v[i] = there ? -prim_load(((const T *)h->v)[at]) : 0;
        if (at % a.d == 0)
            a.weight[b * a.t_pad + at / a.d] = 1;
    }
}

/* What the replay found of query q of head b: the log of its sum, and the mass of the part. */
PRIM const float *sums_of(const struct cuda_match_args *a, uint32_t b, uint32_t q)
{
    uint64_t head = (uint64_t)(a->head0 + b) * a->group + q / a->n_now;

    return a->sums + 2 * (head * a->n_replay + a->row0 + q % a->n_now);
}

__global__ void full_kernel(struct cuda_match_args a)
{
    uint64_t per_head = (uint64_t)a.group * a.n_now * a.n_rows;

    for (uint64_t i = prim_thread(); i < a.n_batch * per_head; i += prim_threads()) {
        uint32_t b = (uint32_t)(i / per_head), q = (uint32_t)(i % per_head / a.n_rows);

        a.full[i] = expf(a.full[i] - sums_of(&a, b, q)[0]);
    }
}

__global__ void weigh_kernel(struct cuda_match_args a)
{
    uint32_t q = blockIdx.x * CUDA_MATCH_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t b = blockIdx.y, n_q = a.group * a.n_now;
    const float *weight = a.weight + (uint64_t)b * a.t_pad, *sums;
    float *p = a.p + ((uint64_t)b * n_q + q) * a.wide, den = 0;

    if (q >= n_q)
        return;
    sums = sums_of(&a, b, q);
    for (uint32_t j = lane; j < a.t_pad; j += 32) {
        p[j] = j < a.head[b].t ? expf(p[j] - sums[0]) * weight[j] : 0;
        den += p[j];
    }
    if (!a.values) {
        for (uint32_t j = a.t_pad + lane; j < a.wide; j += 32)
            p[j] = j == a.t_pad ? sums[1] : 0;
        return;
    }
    den = prim_warp_sum(den);
    den = den > 0 ? sums[1] / den : 0;
    for (uint32_t j = lane; j < a.t_pad; j += 32)
        p[j] *= den;
}

/* A row at a bound becomes an equation of its own, and what it says to others goes to their other
 * side. */
__global__ void reduce_kernel(struct cuda_match_args a)
{
    uint32_t i = blockIdx.x, b = blockIdx.y;
    const struct cuda_match_head *h = &a.head[b];
    const float *row = a.matrix + ((uint64_t)b * a.t_pad + i) * a.wide;
    const float *weight = a.weight + (uint64_t)b * a.t_pad;
    const uint32_t *fixed = a.fixed + (uint64_t)b * a.t_pad;
    float *work = a.work + ((uint64_t)b * a.t_pad + i) * a.t_pad;
    float *x = a.x + (uint64_t)b * a.d * a.t_pad + i;
    bool bounds = !a.values && !h->fresh, mine = bounds && i < h->t && fixed[i];
    double sum = 0;

    if (!h->active || i >= h->t)
        return;
    if (!i && !threadIdx.x)
        a.verdict[b].out = a.verdict[b].bad = 0;
    for (uint32_t j = threadIdx.x; j < h->t; j += BLOCK) {
        bool other = bounds && fixed[j];

        sum += other && !mine ? (double)weight[j] * row[j] : 0;
        work[j] = mine || other ? i == j : i == j ? row[j] + h->ridge : row[j];
    }
    if (a.values) {
        for (uint32_t c = threadIdx.x; c < a.d; c += BLOCK)
            x[(uint64_t)c * a.t_pad] = row[a.t_pad + c];
        return;
    }
    sum = prim_block_sum(sum);
    if (!threadIdx.x)
        x[0] = mine ? weight[i] : (float)((double)row[a.t_pad] + h->ridge - sum);
}

__global__ void take_kernel(struct cuda_match_args a)
{
    uint32_t b = blockIdx.x;
    const struct cuda_match_head *h = &a.head[b];
    struct cuda_match_verdict *verdict = &a.verdict[b];
    uint32_t *fixed = a.fixed + (uint64_t)b * a.t_pad;
    float *weight = a.weight + (uint64_t)b * a.t_pad;

    if (!h->active || verdict->indefinite)
        return;
    for (uint32_t i = threadIdx.x; i < h->t; i += BLOCK) {
        float x = a.x[(uint64_t)b * a.d * a.t_pad + i], bound = x;

        if (!h->fresh && fixed[i])
            continue;
        if (!prim_finite(x))
            verdict->bad = 1;
        if (x < a.least || x > a.most) {
            bound = x < a.least ? a.least : a.most;
            verdict->out = 1;
        }
        fixed[i] = bound != x;
        weight[i] = bound;
    }
}

__global__ void bias_kernel(struct cuda_match_args a)
{
    uint64_t n = (uint64_t)a.n_batch * a.t_pad;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        const struct cuda_match_head *h = &a.head[i / a.t_pad];
        uint64_t at = i % a.t_pad;
        uint16_t rounded;

        if (at >= h->t)
            continue;
        prim_store(&rounded, logf(a.weight[i]));
        a.bias[h->at + at] = prim_load(rounded);
        a.weight[i] = expf(prim_load(rounded));
    }
}

__global__ void values_kernel(struct cuda_match_args a)
{
    uint64_t per_head = (uint64_t)a.t_pad * a.d;

    for (uint64_t i = prim_thread(); i < a.n_batch * per_head; i += prim_threads()) {
        uint64_t b = i / per_head, at = i % per_head, row = at / a.d, c = at % a.d;
        const struct cuda_match_head *h = &a.head[b];
        float v;

        if (!h->active || a.verdict[b].indefinite || row >= h->t)
            continue;
        v = a.x[(b * a.d + c) * a.t_pad + row] - a.minus_v[i];
        if (!prim_finite(v))
            a.verdict[b].bad = 1;
        a.to_v[h->at * a.d + at] = v;
    }
}

extern "C" int cuda_launch_match(const struct cuda_launch *l, void *stream)
{
    switch (l->kernel) {
    case CUDA_WIDEN:
        if (l->bf16)
            PRIM_LAUNCH(widen_kernel<uint16_t>, struct cuda_widen_args, l, stream);
        PRIM_LAUNCH(widen_kernel<float>, struct cuda_widen_args, l, stream);
    case CUDA_MATCH_KEPT:
        if (l->bf16)
            PRIM_LAUNCH(kept_kernel<uint16_t>, struct cuda_match_args, l, stream);
        PRIM_LAUNCH(kept_kernel<float>, struct cuda_match_args, l, stream);
    case CUDA_MATCH_FULL:
        PRIM_LAUNCH(full_kernel, struct cuda_match_args, l, stream);
    case CUDA_MATCH_WEIGH:
        PRIM_LAUNCH(weigh_kernel, struct cuda_match_args, l, stream);
    case CUDA_MATCH_REDUCE:
        PRIM_LAUNCH(reduce_kernel, struct cuda_match_args, l, stream);
    case CUDA_MATCH_TAKE:
        PRIM_LAUNCH(take_kernel, struct cuda_match_args, l, stream);
    case CUDA_MATCH_BIAS:
        PRIM_LAUNCH(bias_kernel, struct cuda_match_args, l, stream);
    default:
        PRIM_LAUNCH(values_kernel, struct cuda_match_args, l, stream);
    }
}
