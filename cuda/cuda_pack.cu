/* cuda_pack.cu - rows become codes with scales, byte for byte those of base/packed.c.
 *
 * The one idea: a range is found in any order, and all that follows from it - a step as f16, a
 * code as the nearest integer - is one chain of IEEE operations, so this file is compiled without
 * fused multiply-add and has its own conversion to f16, in integers. */
#include "cuda_pack.h"
#include "cuda_past.cuh"

/* As f32_to_f16() of base/half.h. */
PRIM uint32_t to_f16(float x)
{
    uint32_t u = prim_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu, shift, man;

    if (a > 0x7f800000u)
        return sign | 0x7e00u;
    if (a >= 0x477ff000u) /* rounds past 65504 */
        return sign | 0x7c00u;
    if (a < 0x33000001u) /* at most half of the smallest subnormal */
        return sign;
    if (a >= 0x38800000u) {
        a -= 0x38000000u;
        return sign | (a + 0xfffu + (a >> 13 & 1u)) >> 13;
    }
    shift = 126 - (a >> 23);
    man = (a & 0x7fffffu) | 0x800000u;
    return sign | (man + (1u << (shift - 1)) - 1 + (man >> shift & 1u)) >> shift;
}

PRIM float from_f16(uint32_t h)
{
    const uint8_t bytes[2] = {(uint8_t)h, (uint8_t)(h >> 8)};

    return prim_f16(bytes);
}

PRIM void put16(uint8_t *to, uint64_t i, uint32_t v)
{
    to[2 * i] = (uint8_t)v;
    to[2 * i + 1] = (uint8_t)(v >> 8);
}

PRIM float one_over(float step)
{
    return step > 0 ? 1 / step : 0;
}

/* To the nearest integer, ties to even, between lo and hi. */
PRIM uint8_t code_of(float x, int32_t lo, int32_t hi)
{
    int32_t q = (int32_t)(prim_bits(x + 12582912.0f) - 0x4b400000u);

    q = q < lo ? lo : q;
    return (uint8_t)(q > hi ? hi : q);
}

/* What elements of a range are coded with. */
struct range {
    float lo, inv;
    bool bad;
};

/* From smallest and largest, + 0.0f as there; `scales` if they are to be stored, as the i-th. */
PRIM struct range put_range(bool four, float lo, float hi, uint8_t *scales, uint64_t i)
{
    struct range r = {lo, 0, false};
    uint32_t min, step;

    if (!four) {
        step = to_f16((-lo > hi ? -lo : hi) / 127 + 0.0f);
        r.bad = (step & 0x7c00u) == 0x7c00u;
        if (scales)
            put16(scales, i, step);
    } else {
        min = to_f16(lo + 0.0f);
        r.lo = from_f16(min);
        /* the rounded minimum may lie above a narrow range */
        step = to_f16(hi > r.lo ? (hi - r.lo) / 15 : 0);
        r.bad = (step & 0x7c00u) == 0x7c00u || (min & 0x7c00u) == 0x7c00u;
        if (scales) {
            put16(scales, 2 * i, min);
            put16(scales, 2 * i + 1, step);
        }
    }
    r.inv = one_over(from_f16(step));
    return r;
}

PRIM uint8_t coded(bool four, const struct range *r, float x)
{
    return four ? code_of((x - r->lo) * r->inv, 0, 15) : code_of(x * r->inv, -127, 127);
}

/* An exact row's element; false: it is not finite in bf16. */
PRIM bool put_exact(const uint8_t *tile, uint64_t i, float x)
{
    uint16_t rounded;

    prim_store(&rounded, x);
    put16((uint8_t *)tile, i, rounded);
    return (rounded & 0x7f80u) != 0x7f80u;
}

/* ---- keys */

/* Rows of a block, counted after the exact ones. */
PRIM void block_rows(const struct cuda_pack_args *a, const struct cuda_pack_head *h,
                     uint32_t *first, uint32_t *end)
{
    uint32_t n = h->to.n_rows - h->to.n_exact;

    *first = blockIdx.x * a->per_block;
    *end = n < *first + a->per_block ? n : *first + a->per_block;
}

template <typename T> __global__ void ranges_kernel(struct cuda_pack_args a)
{
    const struct cuda_pack_head *h = &a.head[blockIdx.y];
    const T *x = (const T *)h->k + (uint64_t)h->to.n_exact * a.d;
    uint32_t first, end;
    bool bad = false;

    block_rows(&a, h, &first, &end);
    for (uint32_t c = threadIdx.x; c < a.d && first < end; c += blockDim.x) {
        uint64_t to = ((uint64_t)blockIdx.y * a.n_blocks + blockIdx.x) * a.d + c;
        float lo = prim_load(x[(uint64_t)first * a.d + c]), hi = lo;

        for (uint32_t r = first; r < end; r++) {
            float y = prim_load(x[(uint64_t)r * a.d + c]);

            bad = bad || !prim_finite(y);
            lo = y < lo ? y : lo;
            hi = y > hi ? y : hi;
        }
        a.lo[to] = lo;
        a.hi[to] = hi;
    }
    if (bad)
        a.bad[blockIdx.y] = 1;
}

/* Of a channel of this block: its own rows', or the whole head's. */
PRIM struct range channel_range(const struct cuda_pack_args *a, const struct cuda_pack_head *h,
                                uint32_t c)
{
    uint32_t n = h->to.n_rows - h->to.n_exact;
    uint32_t b = a->four ? blockIdx.x : 0;
    uint32_t end = a->four ? b + 1 : (n + a->per_block - 1) / a->per_block;
    const float *lo = a->lo + (uint64_t)blockIdx.y * a->n_blocks * a->d + c;
    const float *hi = a->hi + (uint64_t)blockIdx.y * a->n_blocks * a->d + c;
    float least = lo[(uint64_t)b * a->d], most = hi[(uint64_t)b * a->d];
    uint8_t *scales = (uint8_t *)h->to.k.at + h->to.k.scales;
    bool stores = a->four || !blockIdx.x;

    for (uint32_t i = b + 1; i < end; i++) {
        least = lo[(uint64_t)i * a->d] < least ? lo[(uint64_t)i * a->d] : least;
        most = hi[(uint64_t)i * a->d] > most ? hi[(uint64_t)i * a->d] : most;
    }
    return put_range(a->four, least, most, stores ? scales : NULL, (uint64_t)b * a->d + c);
}

template <typename T>
PRIM void code_keys(const struct cuda_pack_args *a, const struct cuda_pack_head *h, uint32_t c,
                    uint32_t step, const struct range *range, uint32_t first, uint32_t end)
{
    const T *x = (const T *)h->k + (uint64_t)h->to.n_exact * a->d + c;
    uint8_t *codes = (uint8_t *)h->to.k.at + h->to.k.codes;

    for (uint32_t r = first; r < end; r++) {
        uint64_t at = (uint64_t)r * a->d;
        uint8_t q = coded(a->four, &range[0], prim_load(x[at]));

        if (step == 2)
            q |= (uint8_t)(coded(true, &range[1], prim_load(x[at + 1])) << 4);
        codes[(at + c) / step] = q;
    }
}

/* int4: a thread has two channels, whose codes share a byte. */
template <typename T> __global__ void keys_kernel(struct cuda_pack_args a)
{
    const struct cuda_pack_head *h = &a.head[blockIdx.y];
    uint32_t step = a.four ? 2 : 1, first, end, n_exact = blockIdx.x ? 0 : h->to.n_exact;
    bool bad = false;

    block_rows(&a, h, &first, &end);
    for (uint64_t i = threadIdx.x; i < (uint64_t)n_exact * a.d; i += blockDim.x)
        bad = !put_exact(h->to.k.at, i, prim_load(((const T *)h->k)[i])) || bad;
    for (uint32_t c = threadIdx.x * step; c < a.d && first < end; c += blockDim.x * step) {
        struct range range[2];

        range[0] = channel_range(&a, h, c);
        if (step == 2)
            range[1] = channel_range(&a, h, c + 1);
        bad = bad || range[0].bad || (step == 2 && range[1].bad);
        code_keys<T>(&a, h, c, step, range, first, end);
    }
    if (bad)
        a.bad[blockIdx.y] = 1;
}

/* ---- values */

/* The i-th range of the packed rows: channels c0 .. c1 - 1 of a row. */
template <typename T>
PRIM bool put_values(const struct cuda_pack_args *a, const struct cuda_pack_head *h, uint64_t i,
                     uint32_t per_row)
{
    uint64_t row = i / per_row, at = row * a->d;
    uint32_t c0 = (uint32_t)(i % per_row) * PAST_GROUP;
    uint32_t c1 = a->four && a->d - c0 > PAST_GROUP ? c0 + PAST_GROUP : a->d;
    const T *x = (const T *)h->v + (uint64_t)h->to.n_exact * a->d + at;
    uint8_t *tile = (uint8_t *)h->to.v.at, *codes = tile + h->to.v.codes;
    float lo = prim_load(x[c0]), hi = lo;
    bool good = true;
    struct range r;

    for (uint32_t c = c0; c < c1; c++) {
        float y = prim_load(x[c]);

        good = good && prim_finite(y);
        lo = y < lo ? y : lo;
        hi = y > hi ? y : hi;
    }
    r = put_range(a->four, lo, hi, tile + h->to.v.scales, i);
    for (uint32_t c = c0; c < c1; c += a->four ? 2 : 1) {
        uint8_t q = coded(a->four, &r, prim_load(x[c]));

        if (a->four)
            q |= (uint8_t)(coded(true, &r, prim_load(x[c + 1])) << 4);
        codes[(at + c) / (a->four ? 2 : 1)] = q;
    }
    return good && !r.bad;
}

template <typename T> __global__ void values_kernel(struct cuda_pack_args a)
{
    const struct cuda_pack_head *h = &a.head[blockIdx.y];
    uint32_t per_row = a.four ? (a.d + PAST_GROUP - 1) / PAST_GROUP : 1;
    uint64_t n = (uint64_t)(h->to.n_rows - h->to.n_exact) * per_row;
    uint64_t exact = blockIdx.x ? 0 : (uint64_t)h->to.n_exact * a.d;
    bool bad = false;

    for (uint64_t i = threadIdx.x; i < exact; i += blockDim.x)
        bad = !put_exact(h->to.v.at, i, prim_load(((const T *)h->v)[i])) || bad;
    for (uint64_t i = prim_thread(); i < n; i += prim_threads())
        bad = !put_values<T>(&a, h, i, per_row) || bad;
    if (bad)
        a.bad[blockIdx.y] = 1;
}

/* ---- reading back */

__global__ void unpack_kernel(struct cuda_pack_args a)
{
    const struct cuda_pack_head *h = &a.head[blockIdx.y];
    uint64_t n = (uint64_t)h->to.n_rows * a.d;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        float x = past_element(&h->to, true, a.d, (uint32_t)(i / a.d), (uint32_t)(i % a.d));
        uint16_t rounded;

        prim_store(&rounded, x);
        a.wide[h->first * a.d + i] = a.round ? prim_load(rounded) : x;
    }
}

extern "C" int cuda_launch_pack(const struct cuda_launch *l, void *stream)
{
    switch (l->kernel) {
    case CUDA_PACK_RANGES:
        if (l->bf16)
            PRIM_LAUNCH(ranges_kernel<uint16_t>, struct cuda_pack_args, l, stream);
        PRIM_LAUNCH(ranges_kernel<float>, struct cuda_pack_args, l, stream);
    case CUDA_PACK_KEYS:
        if (l->bf16)
            PRIM_LAUNCH(keys_kernel<uint16_t>, struct cuda_pack_args, l, stream);
        PRIM_LAUNCH(keys_kernel<float>, struct cuda_pack_args, l, stream);
    case CUDA_PACK_VALUES:
        if (l->bf16)
            PRIM_LAUNCH(values_kernel<uint16_t>, struct cuda_pack_args, l, stream);
        PRIM_LAUNCH(values_kernel<float>, struct cuda_pack_args, l, stream);
    default:
        PRIM_LAUNCH(unpack_kernel, struct cuda_pack_args, l, stream);
    }
}
