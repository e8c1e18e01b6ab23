/* cuda_past.cuh - stored rows as kernels read them, and which of them a row sees.
 *
 * The one idea: what is stored is read where it is, in any type, one element at a time (FORMAT.md,
 * "Packed tiles"): no copy of it in another type exists. */
#ifndef LARDER_CUDA_PAST_CUH
#define LARDER_CUDA_PAST_CUH

#include "cuda_prim.cuh"
#include "geom.h"

#define PAST_GROUP 32u /* int4: rows (keys) or channels (values) that share a step */

/* Element c of packed row r, counted after the exact rows. */
PRIM float packed_element(const struct cuda_tile *t, uint32_t dtype, bool keys, uint32_t d,
                          uint32_t r, uint32_t c)
{
    uint64_t at = (uint64_t)r * d + c;
    const uint8_t *scales = t->at + t->scales, *s;
    uint8_t code;

    if (dtype == KV_INT8) {
        s = scales + 2ull * (keys ? c : r);
        return (float)(int8_t)t->at[t->codes + at] * prim_f16(s);
    }
    if (keys)
        s = scales + ((uint64_t)(r / PAST_GROUP) * d + c) * 4;
    else
        s = scales + ((uint64_t)r * ((d + PAST_GROUP - 1) / PAST_GROUP) + c / PAST_GROUP) * 4;
    code = t->at[t->codes + at / 2];
    return prim_f16(s) + (float)(at % 2 ? code >> 4 : code & 15) * prim_f16(s + 2);
}

/* Element c of stored row r. */
PRIM float past_element(const struct cuda_past *p, bool keys, uint32_t d, uint32_t r, uint32_t c)
{
    const struct cuda_tile *t = keys ? &p->k : &p->v;
    uint64_t i = (uint64_t)r * d + c;

    if (p->dtype == KV_F32)
        return ((const float *)t->at)[i];
    if (p->dtype == KV_BF16 || r < p->n_exact)
        return prim_bf16(t->at + 2 * i);
    return packed_element(t, p->dtype, keys, d, r - p->n_exact, c);
}

/* Number of the first key that row i sees: of the stored ones, of which the first near enough is
 * looked for, or of the sequence's own. */
PRIM uint32_t sees_from(const struct cuda_attend_args *a, const struct cuda_past *p, uint32_t i)
{
    uint32_t n_past = p ? p->n_rows : 0, lo = 0, hi = n_past;
    uint32_t own = a->n_tail - a->n_rows + i, pos = a->pos0 + own;

    if (!a->sliding || pos < a->sliding)
        return 0;
    if (own >= a->sliding)
        return n_past + own - a->sliding + 1;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;

        if (p->position[mid] > pos - a->sliding)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

#endif
