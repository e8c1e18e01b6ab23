/* shim.h - lets a C++ compiler build the kernels, cuda_*.cu, for a processor.
 *
 * Every thread of a block is a fiber; a block runs until all of its fibers have ended. Barriers and
 * warp instructions are points where a fiber waits for the others, and matrix instructions
 * move elements between lanes as the PTX ISA says. So a test sees what a kernel computes: its
 * indices, masks, fragments and sums. It sees neither speed nor data races.
 */
#ifndef LARDER_CUDA_SHIM_H
#define LARDER_CUDA_SHIM_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_kernel.h"
#include "half.h"

#define __global__ static
#define __shared__ static
#define __launch_bounds__(n)
#define PRIM static inline
#define PRIM_SHARED(name) uint8_t *const name = shim_shared()
#define PRIM_LAUNCH(kernel, type, l, stream)                                                       \
    do {                                                                                           \
        const type args_ = *(const type *)(l)->args;                                               \
        (void)(stream);                                                                            \
        return shim_run(l, [&] { kernel(args_); });                                                \
    } while (0)

struct shim_index {
    uint32_t x, y, z;
};
extern shim_index threadIdx, blockIdx, blockDim, gridDim;

int shim_run(const struct cuda_launch *l, const std::function<void()> &kernel);
uint8_t *shim_shared(void); /* NaNs at the start of each block */
void __syncthreads(void);
void prim_syncwarp(void);
float prim_shfl_xor(float x, int mask);
double prim_shfl_xor(double x, int mask);
void prim_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
void prim_ldmatrix(uint32_t r[4], const void *shared);
void prim_ldmatrix_trans(uint32_t r[4], const void *shared);
void prim_copy16(void *shared, const void *global, bool there);
uint32_t prim_pair(float lo, float hi);

static inline void prim_commit(void)
{
}

template <int left> static inline void prim_wait(void)
{
}

static inline uint32_t prim_bits(float x)
{
    return f32_bits(x);
}

static inline float prim_float(uint32_t u)
{
    return bits_f32(u);
}

#endif
