/* cuda_rows.cu - row-wise steps around the products: RMSNorm, RoPE, SwiGLU.
 *
 * The one idea: each is one pass over memory with neighbouring threads on neighbouring elements;
 * sums inside a row go through a tree of fixed shape. Angles are f64, as in `ref`: at position
 * 100,000 an f32 angle is off in the third digit. */
#include "cuda_prim.cuh"

/* Sum over the block, the same in every thread. */
PRIM double block_sum(double x)
{
    __shared__ double part[CUDA_ROW_BLOCK];

    part[threadIdx.x] = x;
    for (uint32_t half = CUDA_ROW_BLOCK / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            part[threadIdx.x] += part[threadIdx.x + half];
    }
    __syncthreads();
    return part[0];
}

template <typename T> __global__ void rmsnorm_kernel(struct cuda_rmsnorm_args a)
{
    const float *x = a.x + (uint64_t)blockIdx.x * a.n;
    T *out = (T *)a.out + (uint64_t)blockIdx.x * a.n;
    double sum = 0;
    float scale;

    for (uint32_t i = threadIdx.x; i < a.n; i += CUDA_ROW_BLOCK)
        sum += (double)x[i] * x[i];
    scale = (float)(1 / sqrt(block_sum(sum) / a.n + a.eps));
    for (uint32_t i = threadIdx.x; i < a.n; i += CUDA_ROW_BLOCK)
        prim_store(out + i, x[i] * scale * a.w[i]);
}

__global__ void angles_kernel(struct cuda_angles_args a)
{
    uint64_t n = (uint64_t)a.n * a.half;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        uint64_t row = i / a.half, j = i % a.half;
        double angle = a.pos[row] * a.freq[j];

        a.table[row * 2 * a.half + j] = (float)(cos(angle) * a.factor);
        a.table[(row * 2 + 1) * a.half + j] = (float)(sin(angle) * a.factor);
    }
}

/* A head of a row on its way: x + bias, times scale and norm. */
struct raw_head {
    const float *x, *bias, *norm; /* [d]; bias and norm may be NULL */
    float scale;
};

PRIM float head_element(const struct raw_head *h, uint32_t c)
{
    float x = h->bias ? h->x[c] + h->bias[c] : h->x[c];

    return h->norm ? x * h->scale * h->norm[c] : x;
}

/* The scale that makes the root mean square 1; all lanes of a warp together. */
PRIM float head_scale(const struct raw_head *h, uint32_t d, double eps)
{
    double sum = 0;

    for (uint32_t c = threadIdx.x % 32; c < d; c += 32) {
        float x = h->bias ? h->x[c] + h->bias[c] : h->x[c];

        sum += (double)x * x;
    }
    for (int m = 16; m; m /= 2)
        sum += prim_shfl_xor(sum, m);
    return (float)(1 / sqrt(sum / d + eps));
}

/* Element c, rotate-half over the first `dims`. */
PRIM float rotated(const struct raw_head *h, uint32_t dims, const float *cs, uint32_t c)
{
    uint32_t half = dims / 2, j = c < half ? c : c - half;
    float x = head_element(h, c);

    if (c >= dims)
        return x;
    return c < half ? x * cs[j] - head_element(h, c + half) * cs[half + j]
                    : x * cs[j] + head_element(h, c - half) * cs[half + j];
}

template <typename T> __global__ void rope_kernel(struct cuda_rope_args a)
{
    uint32_t heads = a.n_heads + 2 * a.n_kv;
    const float *row = a.x + (uint64_t)blockIdx.x * heads * a.d;
    const float *cs = a.table + (uint64_t)blockIdx.x * a.dims;

    for (uint32_t h = threadIdx.x / 32; h < heads; h += CUDA_ROW_BLOCK / 32) {
        bool is_q = h < a.n_heads, is_k = !is_q && h < a.n_heads + a.n_kv;
        struct raw_head x = {row + h * a.d, a.bias ? a.bias + h * a.d : NULL,
                             is_q ? a.q_norm : is_k ? a.k_norm : NULL, 1};
        uint64_t head = is_q ? h : is_k ? h - a.n_heads : h - a.n_heads - a.n_kv;
        T *to = (T *)(is_q ? a.q : is_k ? a.k : a.v) +
                (head * a.stride + a.row0 + blockIdx.x) * a.d;

        if (x.norm)
            x.scale = head_scale(&x, a.d, a.eps);
        for (uint32_t c = threadIdx.x % 32; c < a.d; c += 32)
            prim_store(to + c, rotated(&x, is_q || is_k ? a.dims : 0, cs, c));
    }
}

template <typename T> __global__ void swiglu_kernel(struct cuda_swiglu_args a)
{
    uint64_t n = a.n * a.n_ff;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        uint64_t row = i / a.n_ff, c = i % a.n_ff;
        float gate = a.x[row * 2 * a.n_ff + c], up = a.x[(row * 2 + 1) * a.n_ff + c];

        prim_store((T *)a.out + i, gate / (1 + expf(-gate)) * up);
    }
}

extern "C" int cuda_launch_rows(const struct cuda_launch *l, void *stream)
{
    if (l->kernel == CUDA_RMSNORM && l->bf16)
        PRIM_LAUNCH(rmsnorm_kernel<uint16_t>, struct cuda_rmsnorm_args, l, stream);
    if (l->kernel == CUDA_RMSNORM)
        PRIM_LAUNCH(rmsnorm_kernel<float>, struct cuda_rmsnorm_args, l, stream);
    if (l->kernel == CUDA_ANGLES)
        PRIM_LAUNCH(angles_kernel, struct cuda_angles_args, l, stream);
    if (l->kernel == CUDA_ROPE && l->bf16)
        PRIM_LAUNCH(rope_kernel<uint16_t>, struct cuda_rope_args, l, stream);
    if (l->kernel == CUDA_ROPE)
        PRIM_LAUNCH(rope_kernel<float>, struct cuda_rope_args, l, stream);
    if (l->bf16)
        PRIM_LAUNCH(swiglu_kernel<uint16_t>, struct cuda_swiglu_args, l, stream);
    PRIM_LAUNCH(swiglu_kernel<float>, struct cuda_swiglu_args, l, stream);
}
