/* cuda_attend.cu - attention in f32 for any head size and any stored rows: f32 mode, packed rows.
 *
 * The one idea: 16 query rows against 32 keys of their KV head at a time, with a running maximum
 * and sum (online softmax, arXiv 1805.02867), so that no row of probabilities is ever whole in
 * memory. All query heads of a KV head are rows of the same blocks: its keys are read once for the
 * whole group, as they are stored. Eight neighbouring lanes share a row: they split its keys for
 * the logits and its channels for the values. Where few rows see many keys, each block takes a
 * part of them, and a second kernel joins the parts. */
#include "cuda_past.cuh"

#define ROWS CUDA_ATTEND_ROWS
#define KEYS CUDA_ATTEND_KEYS
#define SHARE 8u                             /* lanes of a row */
#define MINE (CUDA_MAX_HEAD_DIM / SHARE)     /* channels of a lane at most */
#define THREADS (ROWS * SHARE)

/* Rows of a block: number i of a group's is query row i / group of its head i % group. */
struct block_rows {
    uint32_t first, n;
};

PRIM uint32_t row_of(const struct cuda_attend_args *a, uint32_t i)
{
    return a->row0 + i / a->group;
}

PRIM uint32_t head_of(const struct cuda_attend_args *a, uint32_t i)
{
    return blockIdx.y * a->group + i % a->group;
}

template <typename T>
PRIM void stage_queries(float *to, const struct cuda_attend_args *a, const struct block_rows *b)
{
    for (uint32_t i = threadIdx.x; i < ROWS * a->d; i += THREADS) {
        uint32_t r = i / a->d, c = i % a->d, at = b->first + r;
        const T *head = (const T *)a->q + head_of(a, at) * a->q_stride * a->d;

        to[r * (a->d + 1) + c] =
            r < b->n ? prim_load(head[(uint64_t)row_of(a, at) * a->d + c]) : 0;
    }
}

/* Keys (or values) key0 and up of the block's KV head as f32 rows of d + 1; zeros from n_keys. */
template <typename T>
PRIM void stage_keys(float *to, const struct cuda_attend_args *a, const struct cuda_past *p,
                     uint32_t n_past, bool keys, uint32_t key0, uint32_t n_keys)
{
    const T *own = (const T *)(keys ? a->k : a->v) + blockIdx.y * a->kv_stride * a->d;

    for (uint32_t i = threadIdx.x; i < KEYS * a->d; i += THREADS) {
        uint32_t r = i / a->d, c = i % a->d, key = key0 + r;
        float x = 0;

        if (key < n_past)
            x = past_element(p, keys, a->d, key, c);
        else if (key < n_keys)
            x = prim_load(own[(uint64_t)(key - n_past) * a->d + c]);
        to[r * (a->d + 1) + c] = x;
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

/* Sums of a row over the keys of split s, relative to their maximum, which stands behind them. */
PRIM float *part_of(const struct cuda_attend_args *a, uint32_t row, uint32_t h, uint32_t s)
{
    uint64_t at = (uint64_t)(row - a->row0) * a->n_heads + h;

    return a->part + (at * a->n_splits + s) * (a->d + 2);
}

/* What makes them relative to `max`; a part without a key has no weight. */
PRIM float weight_of(const float *part, uint32_t d, float max)
{
    return part[d] == max ? 1 : expf(part[d] - max);
}

template <typename T> __global__ void attend_kernel(struct cuda_attend_args a)
{
    PRIM_SHARED(shared);
    uint32_t d = a.d, ld = d + 1, all = (a.n_rows - a.row0) * a.group;
    float *q = (float *)shared, *k = q + ROWS * ld, *v = k + KEYS * ld, *p = v + KEYS * ld;
    uint32_t r = threadIdx.x / SHARE, lane = threadIdx.x % SHARE;
    struct block_rows b = {(gridDim.x - 1 - blockIdx.x) * ROWS, ROWS}; /* long rows first */
    const struct cuda_past *past = a.past ? a.past + blockIdx.y : NULL;
    uint32_t n_past = past ? past->n_rows : 0, before = n_past + a.n_tail - a.n_rows;
    const float *bias = past ? past->bias : NULL;
    uint32_t at, row, n_keys, seen, from; /* the row sees keys from .. seen - 1 */
    uint32_t begin, end, share;           /* keys of this block */
    float max = -INFINITY, sum = 0, acc[MINE];

    b.n = all - b.first < ROWS ? all - b.first : ROWS;
    at = b.first + (r < b.n ? r : b.n - 1);
    row = row_of(&a, at);
    n_keys = before + row_of(&a, b.first + b.n - 1) + 1;
    seen = before + row + 1;
    from = sees_from(&a, past, row);
    begin = sees_from(&a, past, row_of(&a, b.first));
    share = ((n_keys - begin + KEYS - 1) / KEYS + a.n_splits - 1) / a.n_splits * KEYS;
    begin += blockIdx.z * share;
    end = n_keys < begin + share ? n_keys : begin + share;
    stage_queries<T>(q, &a, &b);
#pragma unroll
    for (uint32_t i = 0; i < MINE; i++)
        acc[i] = 0;
    for (uint32_t key0 = begin; key0 < end; key0 += KEYS) {
        float x[KEYS / SHARE], top = -INFINITY, total = 0, keep;

        __syncthreads(); /* nobody reads the last keys any more */
        stage_keys<T>(k, &a, past, n_past, true, key0, n_keys);
        stage_keys<T>(v, &a, past, n_past, false, key0, n_keys);
        __syncthreads();
        for (uint32_t i = 0; i < KEYS / SHARE; i++) {
            uint32_t j = lane + i * SHARE, key = key0 + j;
            float dot = 0;

            for (uint32_t c = 0; c < d; c++)
                dot += q[r * ld + c] * k[j * ld + c];
            x[i] = dot * a.scale;
            if (bias && key < n_past)
                x[i] += bias[key];
            if (key < from || key >= seen)
                x[i] = -INFINITY;
            /* written so that a NaN reaches the sum instead of vanishing in a maximum */
            top = x[i] > top ? x[i] : top;
        }
        top = row_max(top);
        top = max > top ? max : top;
        keep = max == top ? 1 : expf(max - top);
        for (uint32_t i = 0; i < KEYS / SHARE; i++) {
            uint32_t key = key0 + lane + i * SHARE;
            float e = key >= from && key < seen ? expf(x[i] - top) : 0;

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
    if (r < b.n && a.n_splits > 1) {
        float *to = part_of(&a, row, head_of(&a, at), blockIdx.z);

#pragma unroll
        for (uint32_t i = 0; i < MINE; i++)
            if (lane + i * SHARE < d)
                to[lane + i * SHARE] = acc[i];
        to[d] = max; /* all lanes of a row have the same */
        to[d + 1] = sum;
    } else if (r < b.n) {
        T *o = (T *)a.o + ((uint64_t)row * a.n_heads + head_of(&a, at)) * d;

#pragma unroll
        for (uint32_t i = 0; i < MINE; i++)
            if (lane + i * SHARE < d)
                prim_store(o + lane + i * SHARE, acc[i] / sum);
    }
}

/* Block: one row of one head. */
template <typename T> __global__ void merge_kernel(struct cuda_attend_args a)
{
    uint32_t d = a.d, row = a.row0 + blockIdx.x / a.n_heads, h = blockIdx.x % a.n_heads;
    const float *part = part_of(&a, row, h, 0);
    T *o = (T *)a.o + ((uint64_t)row * a.n_heads + h) * d;
    float max = -INFINITY, total = 0;

    for (uint32_t s = 0; s < a.n_splits; s++) {
        float x = part[s * (d + 2) + d];

        max = x > max ? x : max;
    }
    for (uint32_t s = 0; s < a.n_splits; s++)
        total += weight_of(part + s * (d + 2), d, max) * part[s * (d + 2) + d + 1];
    for (uint32_t c = threadIdx.x; c < d; c += CUDA_ROW_BLOCK) {
        float sum = 0;

        for (uint32_t s = 0; s < a.n_splits; s++)
            sum += weight_of(part + s * (d + 2), d, max) * part[s * (d + 2) + c];
        prim_store(o + c, sum / total);
    }
}

extern "C" int cuda_launch_attend(const struct cuda_launch *l, void *stream)
{
    if (l->kernel == CUDA_MERGE && l->bf16)
        PRIM_LAUNCH(merge_kernel<uint16_t>, struct cuda_attend_args, l, stream);
    if (l->kernel == CUDA_MERGE)
        PRIM_LAUNCH(merge_kernel<float>, struct cuda_attend_args, l, stream);
    if (l->bf16)
        PRIM_LAUNCH(attend_kernel<uint16_t>, struct cuda_attend_args, l, stream);
    PRIM_LAUNCH(attend_kernel<float>, struct cuda_attend_args, l, stream);
}
