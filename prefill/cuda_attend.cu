/* cuda_attend.cu - attention in f32 for any head size: f32 mode, resumed rows, odd head sizes.
 *
 * The one idea: 16 query rows of a head against 32 keys at a time, with a running maximum and
 * sum (online softmax, arXiv 1805.02867), so that no row of probabilities is ever whole in
 * memory. Eight neighbouring lanes share a row: they split its keys for the logits and its
 * channels for the values. */
#include "cuda_prim.cuh"

#define ROWS CUDA_ATTEND_ROWS
#define KEYS CUDA_ATTEND_KEYS
#define SHARE 8u                             /* lanes of a row */
#define MINE (CUDA_MAX_HEAD_DIM / SHARE)     /* channels of a lane at most */
#define THREADS (ROWS * SHARE)

/* Rows of src [..][d] into shared f32 rows of `ld`; zeros from row `n` on. */
template <typename T>
PRIM void stage(float *to, uint32_t ld, const T *src, uint32_t rows, uint32_t n, uint32_t d)
{
    for (uint32_t i = threadIdx.x; i < rows * d; i += THREADS) {
        uint32_t r = i / d, c = i % d;

        to[r * ld + c] = r < n ? prim_load(src[(uint64_t)r * d + c]) : 0;
    }
}

PRIM float row_max(float x)
{
    for (int m = 1; m < (int)SHARE; m *= 2) {
        float y = prim_shfl_xor(x, m);

        x = y > x ? y : x;
    }
    return x;
}

PRIM float row_sum(float x)
{
    for (int m = 1; m < (int)SHARE; m *= 2)
        x += prim_shfl_xor(x, m);
    return x;
}

template <typename T, typename KV> __global__ void attend_kernel(struct cuda_attend_args a)
{
    PRIM_SHARED(shared);
    uint32_t d = a.d, ld = d + 1, h = blockIdx.y, g = h / a.group;
    float *q = (float *)shared, *k = q + ROWS * ld, *v = k + KEYS * ld, *p = v + KEYS * ld;
    uint32_t r = threadIdx.x / SHARE, lane = threadIdx.x % SHARE;
    uint32_t base = a.row0 + (gridDim.x - 1 - blockIdx.x) * ROWS; /* long rows first */
    uint32_t rows = a.n_rows - base < ROWS ? a.n_rows - base : ROWS, row = base + r;
    uint32_t past = a.n_past ? a.n_past[g] : 0;
    uint32_t before = past + a.n_tail - a.n_rows; /* row i sees before + i + 1 keys */
    uint32_t n_keys = before + base + rows, seen = before + row + 1;
    const KV *kh = (const KV *)a.k + (uint64_t)g * a.kv_stride * d;
    const KV *vh = (const KV *)a.v + (uint64_t)g * a.kv_stride * d;
    const float *bias = a.bias ? a.bias + g * a.bias_stride : NULL;
    float max = -INFINITY, sum = 0, acc[MINE];

    stage(q, ld, (const T *)a.q + ((uint64_t)h * a.q_stride + base) * d, ROWS, rows, d);
#pragma unroll
    for (uint32_t i = 0; i < MINE; i++)
        acc[i] = 0;
    for (uint32_t key0 = 0; key0 < n_keys; key0 += KEYS) {
        float x[KEYS / SHARE], top = -INFINITY, total = 0, keep;

        __syncthreads(); /* nobody reads the last keys any more */
        stage(k, ld, kh + (uint64_t)key0 * d, KEYS, n_keys - key0, d);
        stage(v, ld, vh + (uint64_t)key0 * d, KEYS, n_keys - key0, d);
        __syncthreads();
        for (uint32_t i = 0; i < KEYS / SHARE; i++) {
            uint32_t j = lane + i * SHARE;
            float dot = 0;

            for (uint32_t c = 0; c < d; c++)
                dot += q[r * ld + c] * k[j * ld + c];
            x[i] = dot * a.scale;
            if (bias && key0 + j < past)
                x[i] += bias[key0 + j];
            if (key0 + j >= seen)
                x[i] = -INFINITY;
            /* written so that a NaN reaches the sum instead of vanishing in a maximum */
            top = x[i] > top ? x[i] : top;
        }
        top = row_max(top);
        top = max > top ? max : top;
        keep = max == top ? 1 : expf(max - top);
        for (uint32_t i = 0; i < KEYS / SHARE; i++) {
            float e = key0 + lane + i * SHARE < seen ? expf(x[i] - top) : 0;

            total += e;
            p[r * KEYS + lane + i * SHARE] = e;
        }
        sum = sum * keep + row_sum(total);
        max = top;
        prim_syncwarp(); /* the row's probabilities come from its own warp */
#pragma unroll
        for (uint32_t i = 0; i < MINE; i++) { /* unrolled: acc stays in registers */
            uint32_t c = lane + i * SHARE;

            if (c < d) {
                float s = acc[i] * keep;

                for (uint32_t j = 0; j < KEYS; j++)
                    s += p[r * KEYS + j] * v[j * ld + c];
                acc[i] = s;
            }
        }
    }
    if (r < rows) {
        T *o = (T *)a.o + ((uint64_t)row * a.n_heads + h) * d;

#pragma unroll
        for (uint32_t i = 0; i < MINE; i++)
            if (lane + i * SHARE < d)
                prim_store(o + lane + i * SHARE, acc[i] / sum);
    }
}

extern "C" int cuda_launch_attend(const struct cuda_launch *l, void *stream)
{
    if (l->bf16 && l->variant)
        PRIM_LAUNCH((attend_kernel<uint16_t, float>), struct cuda_attend_args, l, stream);
    if (l->bf16)
        PRIM_LAUNCH((attend_kernel<uint16_t, uint16_t>), struct cuda_attend_args, l, stream);
    PRIM_LAUNCH((attend_kernel<float, float>), struct cuda_attend_args, l, stream);
}
