/* cuda_mma.cu - attention in bf16 on tensor cores.
 *
 * The one idea: FlashAttention-2 (arXiv 2307.08691). A block has 64 query rows of a head, 16 for
 * each of its four warps; keys and values pass through shared memory 64 at a time, the next ones
 * copied while these are used. Logits and outputs stay in registers: the accumulator of the first
 * product has the layout that the second wants its left operand in, so probabilities never touch
 * memory. Rows in shared memory are 16 bytes longer than they need be, which puts the eight
 * rows of a matrix load on different banks. */
#include "cuda_past.cuh"

#define ROWS CUDA_MMA_ROWS
#define KEYS CUDA_MMA_KEYS
#define THREADS 128u
#define TILES (KEYS / 8) /* key tiles of 8 in a step */
#define LOG2E 1.4426950408889634f

/* Rows of [..][D] bf16: those of `past`, and behind them `own`. */
struct bf16_rows {
    const uint16_t *past, *own;
    uint32_t n_past;
};

/* Copy rows from.. to shared rows of D + CUDA_MMA_PAD; zeros from row n on. */
template <int D>
PRIM void copy_rows(uint16_t *to, const struct bf16_rows *src, uint32_t from, uint32_t n)
{
    for (uint32_t i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        uint32_t r = i / (D / 8), c = i % (D / 8) * 8, row = from + r;
        bool there = row < n;
        const uint16_t *at = row < src->n_past ? src->past + (uint64_t)row * D
                                               : src->own + (uint64_t)(row - src->n_past) * D;

        prim_copy16(to + r * (D + CUDA_MMA_PAD) + c, there ? at + c : src->own, there);
    }
}

PRIM float quad_max(float x)
{
    for (int m = 1; m < 4; m *= 2) {
        float y = prim_shfl_xor(x, m);

        x = y > x ? y : x;
    }
    return x;
}

PRIM float quad_sum(float x)
{
    x += prim_shfl_xor(x, 1);
    return x + prim_shfl_xor(x, 2);
}

/* What a warp holds of its 16 rows: a thread has rows lane / 4 and lane / 4 + 8. */
template <int D> struct warp_rows {
    uint32_t q[D / 16][4];
    float o[D / 8][4];
    float max[2], sum[2];
    uint32_t from[2], seen[2]; /* the two rows see keys from .. seen - 1 */
};

/* s = q k^T for the keys in shared memory. */
template <int D> PRIM void products(const struct warp_rows<D> *w, const uint16_t *k, float s[][4])
{
    uint32_t lane = threadIdx.x % 32;
    const uint16_t *at = k + ((lane / 16) * 8 + lane % 8) * (D + CUDA_MMA_PAD) + lane / 8 % 2 * 8;

#pragma unroll
    for (uint32_t j = 0; j < TILES; j += 2) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            s[j][i] = s[j + 1][i] = 0;
#pragma unroll
        for (uint32_t c = 0; c < D / 16; c++) {
            uint32_t b[4];

            prim_ldmatrix(b, at + j * 8 * (D + CUDA_MMA_PAD) + c * 16);
            prim_mma(s[j], w->q[c], b[0], b[1]);
            prim_mma(s[j + 1], w->q[c], b[2], b[3]);
        }
    }
}

/* Logits in powers of two, biased; keys that a row does not see are -infinity. */
template <int D>
PRIM void mask(const struct warp_rows<D> *w, uint32_t key0, const struct cuda_attend_args *a,
               const float *bias, uint32_t past, float s[][4])
{
    uint32_t col = threadIdx.x % 4 * 2;
    float scale = a->scale * LOG2E;
    bool whole = key0 >= w->from[1] && key0 + KEYS <= w->seen[0] && !(bias && key0 < past);

#pragma unroll
    for (uint32_t j = 0; j < TILES; j++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t key = key0 + j * 8 + col + i % 2;

            s[j][i] *= scale;
            if (!whole) {
                if (bias && key < past)
                    s[j][i] += bias[key] * LOG2E;
                if (key < w->from[i / 2] || key >= w->seen[i / 2])
                    s[j][i] = -INFINITY;
            }
        }
    }
}

/* s becomes probabilities relative to the new maximum; sums and outputs follow. */
template <int D> PRIM void soften(struct warp_rows<D> *w, float s[][4])
{
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float top = w->max[r], total = 0, keep, zero;

#pragma unroll
        for (uint32_t j = 0; j < TILES; j++)
#pragma unroll
            for (uint32_t i = 2 * r; i < 2 * r + 2; i++)
                top = s[j][i] > top ? s[j][i] : top;
        top = quad_max(top);
        keep = w->max[r] == top ? 1 : exp2f(w->max[r] - top);
        w->max[r] = top;
        zero = top == -INFINITY ? 0 : top; /* a row that has seen no key yet */
#pragma unroll
        for (uint32_t j = 0; j < TILES; j++)
#pragma unroll
            for (uint32_t i = 2 * r; i < 2 * r + 2; i++) {
                s[j][i] = exp2f(s[j][i] - zero);
                total += s[j][i];
            }
        w->sum[r] = w->sum[r] * keep + total; /* of this thread's keys; joined at the end */
#pragma unroll
        for (uint32_t n = 0; n < D / 8; n++) {
            w->o[n][2 * r] *= keep;
            w->o[n][2 * r + 1] *= keep;
        }
    }
}

/* o += p v */
template <int D> PRIM void weigh(struct warp_rows<D> *w, const uint16_t *v, float p[][4])
{
    uint32_t lane = threadIdx.x % 32;
    const uint16_t *at = v + (lane / 8 % 2 * 8 + lane % 8) * (D + CUDA_MMA_PAD) + lane / 16 * 8;

#pragma unroll
    for (uint32_t j = 0; j < TILES; j += 2) {
        const uint32_t a[4] = {prim_pair(p[j][0], p[j][1]), prim_pair(p[j][2], p[j][3]),
                               prim_pair(p[j + 1][0], p[j + 1][1]),
                               prim_pair(p[j + 1][2], p[j + 1][3])};

#pragma unroll
        for (uint32_t n = 0; n < D / 8; n += 2) {
            uint32_t b[4];

            prim_ldmatrix_trans(b, at + j * 8 * (D + CUDA_MMA_PAD) + n * 8);
            prim_mma(w->o[n], a, b[0], b[1]);
            prim_mma(w->o[n + 1], a, b[2], b[3]);
        }
    }
}

template <int D>
PRIM void write_rows(const struct warp_rows<D> *w, const struct cuda_attend_args *a, uint32_t row,
                     uint32_t h)
{
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float one = 1 / quad_sum(w->sum[r]);
        uint64_t at = ((uint64_t)(row + r * 8) * a->n_heads + h) * D + threadIdx.x % 4 * 2;

        if (row + r * 8 < a->n_rows) {
#pragma unroll
            for (uint32_t n = 0; n < D / 8; n++)
                *(uint32_t *)((uint16_t *)a->o + at + n * 8) =
                    prim_pair(w->o[n][2 * r] * one, w->o[n][2 * r + 1] * one);
        }
    }
}

/* Each thread's part of the rows at `row` (of the tile in shared memory at `q`). */
template <int D> PRIM void start_rows(struct warp_rows<D> *w, const uint16_t *q)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint16_t *at = q + (warp * 16 + lane % 16) * (D + CUDA_MMA_PAD) + lane / 16 * 8;

#pragma unroll
    for (uint32_t c = 0; c < D / 16; c++)
        prim_ldmatrix(w->q[c], at + c * 16);
#pragma unroll
    for (uint32_t n = 0; n < D / 8; n++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            w->o[n][i] = 0;
    w->max[0] = w->max[1] = -INFINITY;
    w->sum[0] = w->sum[1] = 0;
}

template <int D> __global__ void __launch_bounds__(THREADS) mma_kernel(struct cuda_attend_args a)
{
    PRIM_SHARED(shared);
    const uint32_t tile = ROWS * (D + CUDA_MMA_PAD);
    uint16_t *q = (uint16_t *)shared, *k = q + tile, *v = k + 2 * tile; /* two k, two v */
    uint32_t h = blockIdx.y, g = h / a.group;
    uint32_t base = a.row0 + (gridDim.x - 1 - blockIdx.x) * ROWS; /* long rows first */
    uint32_t end = a.n_rows - base < ROWS ? a.n_rows : base + ROWS;
    uint32_t row = base + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const struct cuda_past *past = a.past ? a.past + g : NULL;
    uint32_t n_past = past ? past->n_rows : 0, before = n_past + a.n_tail - a.n_rows;
    uint32_t n_keys = before + end, first = sees_from(&a, past, base);
    const struct bf16_rows
        qs = {NULL, (const uint16_t *)a.q + (uint64_t)h * a.q_stride * D, 0},
        ks = {past ? (const uint16_t *)past->k.at : NULL,
              (const uint16_t *)a.k + (uint64_t)g * a.kv_stride * D, n_past},
        vs = {past ? (const uint16_t *)past->v.at : NULL,
              (const uint16_t *)a.v + (uint64_t)g * a.kv_stride * D, n_past};
    struct warp_rows<D> w;
    uint32_t at = 0;

    copy_rows<D>(q, &qs, base, end);
    copy_rows<D>(k, &ks, first, n_keys);
    copy_rows<D>(v, &vs, first, n_keys);
    prim_commit();
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        w.seen[r] = before + row + r * 8 + 1;
        w.from[r] = sees_from(&a, past, row + r * 8);
    }
    for (uint32_t key0 = first; key0 < n_keys; key0 += KEYS, at ^= 1) {
        float s[TILES][4];
        uint32_t next = key0 + KEYS;

        if (next < n_keys) { /* the barrier below the last step freed these */
            copy_rows<D>(k + (at ^ 1) * tile, &ks, next, n_keys);
            copy_rows<D>(v + (at ^ 1) * tile, &vs, next, n_keys);
        }
        prim_commit();
        prim_wait<1>();
        __syncthreads();
        if (key0 == first)
            start_rows<D>(&w, q);
        products<D>(&w, k + at * tile, s);
        mask<D>(&w, key0, &a, past ? past->bias : NULL, n_past, s);
        soften<D>(&w, s);
        weigh<D>(&w, v + at * tile, s);
        __syncthreads();
    }
    write_rows<D>(&w, &a, row, h);
}

extern "C" int cuda_launch_mma(const struct cuda_launch *l, void *stream)
{
    switch (l->variant) {
    case 32:
        PRIM_LAUNCH(mma_kernel<32>, struct cuda_attend_args, l, stream);
    case 64:
        PRIM_LAUNCH(mma_kernel<64>, struct cuda_attend_args, l, stream);
    case 80:
        PRIM_LAUNCH(mma_kernel<80>, struct cuda_attend_args, l, stream);
    case 96:
        PRIM_LAUNCH(mma_kernel<96>, struct cuda_attend_args, l, stream);
    default:
        PRIM_LAUNCH(mma_kernel<128>, struct cuda_attend_args, l, stream);
    }
}
