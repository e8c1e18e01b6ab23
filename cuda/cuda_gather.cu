/* cuda_gather.cu - rows from here and there, one after the other.
 *
 * The one idea: neighbouring threads copy neighbouring units of a row, the widest that all rows
 * are aligned to. */
#include "cuda_prim.cuh"
#include "cuda_select.h"

struct alignas(16) wide {
    uint32_t x[4];
};

template <typename U> __global__ void gather_kernel(struct cuda_gather_args a)
{
    uint64_t n = a.n * a.units;

    for (uint64_t i = prim_thread(); i < n; i += prim_threads()) {
        uint64_t row = i / a.units, at = i % a.units, from = a.index ? a.index[row] : row;

        ((U *)a.to)[i] = ((const U *)a.from)[from * a.units + at];
    }
}

extern "C" int cuda_launch_gather(const struct cuda_launch *l, void *stream)
{
    if (l->variant == 16)
        PRIM_LAUNCH(gather_kernel<struct wide>, struct cuda_gather_args, l, stream);
    if (l->variant == 4)
        PRIM_LAUNCH(gather_kernel<uint32_t>, struct cuda_gather_args, l, stream);
    PRIM_LAUNCH(gather_kernel<uint16_t>, struct cuda_gather_args, l, stream);
}
