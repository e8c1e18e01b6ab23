/* cuda_window.cu - how much attention the last w rows pay to each row before them.
 *
 * The one idea: w is small, so the w x n logits of a few heads fit in memory; then a row's
 * maximum and sum, and a column's sum of probabilities, are passes over them in a fixed order.
 * Nothing of size n x n exists. Sums are f64, as in `ref`: these scores decide what is kept. */
#include "cuda_prim.cuh"

#define ROWS CUDA_WINDOW_ROWS
#define KEYS CUDA_WINDOW_KEYS

/* The first key that window row i sees. */
PRIM uint32_t window_from(const struct cuda_window_args *a, uint32_t i)
{
    uint32_t row = a->n - a->w + i;

    return a->sliding && row >= a->sliding ? row - a->sliding + 1 : 0;
}

/* Block: 16 window rows x 64 keys of a head; a thread has one row and four keys. Blocks of keys
 * that none of the rows sees are left as they are. */
template <typename T> __global__ void logits_kernel(struct cuda_window_args a)
{
    PRIM_SHARED(shared);
    uint32_t d = a.d, ld = d + 1, b = blockIdx.z, h = a.head0 + b;
    float *q = (float *)shared, *k = q + ROWS * ld;
    uint32_t row0 = blockIdx.y * ROWS, key0 = blockIdx.x * KEYS, first = a.n - a.w;
    const T *qh = (const T *)a.q + ((uint64_t)h * a.stride + first + row0) * d;
    const T *kh = (const T *)a.k + ((uint64_t)(h / a.group) * a.stride + key0) * d;
    uint32_t row = threadIdx.x / 16, lane = threadIdx.x % 16;
    float *out = a.logit + ((uint64_t)b * a.w + row0 + row) * a.n;

    if (key0 + KEYS <= window_from(&a, row0))
        return;
    for (uint32_t i = threadIdx.x; i < ROWS * d; i += CUDA_ROW_BLOCK)
        q[i / d * ld + i % d] = row0 + i / d < a.w ? prim_load(qh[i]) : 0;
    for (uint32_t i = threadIdx.x; i < KEYS * d; i += CUDA_ROW_BLOCK)
        k[i / d * ld + i % d] = key0 + i / d < a.n ? prim_load(kh[i]) : 0;
    __syncthreads();
    for (uint32_t j = lane; j < KEYS; j += 16) {
        float dot = 0;

        for (uint32_t c = 0; c < d; c++)
            dot += q[row * ld + c] * k[j * ld + c];
        if (row0 + row < a.w && key0 + j < a.n)
            out[key0 + j] = dot * a.scale;
    }
}

/* Block: one window row of a head; it sees keys up to its own, number n - w + row. */
__global__ void stats_kernel(struct cuda_window_args a)
{
    __shared__ double part[CUDA_ROW_BLOCK];
    uint64_t at = (uint64_t)blockIdx.y * a.w + blockIdx.x;
    const float *x = a.logit + at * a.n;
    uint32_t seen = a.n - a.w + blockIdx.x + 1, from = window_from(&a, blockIdx.x);
    uint32_t t = threadIdx.x;
    double max = -INFINITY, sum = 0;

    for (uint32_t j = from + t; j < seen; j += CUDA_ROW_BLOCK)
        max = x[j] > max ? x[j] : max;
    part[t] = max;
    for (uint32_t half = CUDA_ROW_BLOCK / 2; half; half /= 2) {
        __syncthreads();
        if (t < half && part[t + half] > part[t])
            part[t] = part[t + half];
    }
    __syncthreads();
    max = part[0];
    __syncthreads();
    for (uint32_t j = from + t; j < seen; j += CUDA_ROW_BLOCK)
        sum += (double)expf(x[j] - (float)max);
    part[t] = sum;
    for (uint32_t half = CUDA_ROW_BLOCK / 2; half; half /= 2) {
        __syncthreads();
        if (t < half)
            part[t] += part[t + half];
    }
    __syncthreads();
    if (!t) {
        a.stat[2 * at] = (float)max;
        a.stat[2 * at + 1] = (float)(1 / part[0]);
    }
}

/* Thread: one key of a head. */
__global__ void mass_kernel(struct cuda_window_args a)
{
    uint32_t m = a.n - a.w;
    uint64_t j = prim_thread();
    const float *x = a.logit + (uint64_t)blockIdx.y * a.w * a.n;
    const float *stat = a.stat + (uint64_t)blockIdx.y * a.w * 2;
    double sum = 0;

    if (j >= m)
        return;
    for (uint32_t i = 0; i < a.w && window_from(&a, i) <= j; i++)
        sum += (double)expf(x[(uint64_t)i * a.n + j] - stat[2 * i]) * stat[2 * i + 1];
    a.mass[(uint64_t)(a.head0 + blockIdx.y) * m + j] = (float)sum;
}

extern "C" int cuda_launch_window(const struct cuda_launch *l, void *stream)
{
    if (l->kernel == CUDA_WINDOW_LOGITS && l->bf16)
        PRIM_LAUNCH(logits_kernel<uint16_t>, struct cuda_window_args, l, stream);
    if (l->kernel == CUDA_WINDOW_LOGITS)
        PRIM_LAUNCH(logits_kernel<float>, struct cuda_window_args, l, stream);
    if (l->kernel == CUDA_WINDOW_STATS)
        PRIM_LAUNCH(stats_kernel, struct cuda_window_args, l, stream);
    PRIM_LAUNCH(mass_kernel, struct cuda_window_args, l, stream);
}
