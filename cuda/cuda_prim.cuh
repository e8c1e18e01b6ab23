/* cuda_prim.cuh - the few instructions that kernels of backend `cuda` need beyond C++.
 *
 * The one idea: whatever a processor cannot run stands here behind a name, so that the kernels
 * themselves are compiled for a GPU by nvcc and for a processor by a test (tests/cuda/shim.h,
 * which defines the same names). Conversions round to nearest even like base/half.h. */
#ifndef LARDER_CUDA_PRIM_CUH
#define LARDER_CUDA_PRIM_CUH

#include "cuda_kernel.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define PRIM __device__ __forceinline__
#define PRIM_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

/* Launch kernel<<<...>>>(*(const type *)l->args); the value of the enclosing function. */
#define PRIM_LAUNCH(kernel, type, l, stream)                                                       \
    do {                                                                                           \
        cudaError_t rc_ = cudaSuccess;                                                             \
        if ((l)->shared > 48u << 10)                                                               \
            rc_ = cudaFuncSetAttribute((const void *)kernel,                                       \
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,                \
                                       (int)(l)->shared);                                          \
        if (rc_ == cudaSuccess)                                                                    \
            kernel<<<dim3((l)->grid[0], (l)->grid[1], (l)->grid[2]), (l)->block, (l)->shared,      \
                     (cudaStream_t)(stream)>>>(*(const type *)(l)->args);                          \
        return (int)cudaGetLastError(); /* of the launch, or of what came before it */             \
    } while (0)

PRIM uint32_t prim_bits(float x)
{
    return __float_as_uint(x);
}

PRIM float prim_float(uint32_t u)
{
    return __uint_as_float(u);
}

PRIM float prim_shfl_xor(float x, int mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

PRIM double prim_shfl_xor(double x, int mask)
{
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

PRIM void prim_syncwarp(void)
{
    __syncwarp();
}

/* c += a b: m16n8k16, bf16 operands, f32 sums (PTX ISA, mma). */
PRIM void prim_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four 8 x 8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8. */
PRIM void prim_ldmatrix(uint32_t r[4], const void *shared)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);

    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

PRIM void prim_ldmatrix_trans(uint32_t r[4], const void *shared)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);

    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* 16 bytes to shared memory, both aligned to 16, without waiting; zeros if not `there`. */
PRIM void prim_copy16(void *shared, const void *global, bool there)
{
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared), bytes = there ? 16u : 0u;

    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(global), "r"(bytes)
                 : "memory");
}

PRIM void prim_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All groups but the last `left` have landed, as far as this thread copied them. */
template <int left> PRIM void prim_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

/* Two floats as bf16, the first in the low half. */
PRIM uint32_t prim_pair(float lo, float hi)
{
    uint32_t r;

    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

#endif

/* ---- T: float, or uint16_t for bf16 */

PRIM float prim_load(float x)
{
    return x;
}

PRIM float prim_load(uint16_t x)
{
    return prim_float((uint32_t)x << 16);
}

PRIM void prim_store(float *to, float x)
{
    *to = x;
}

PRIM void prim_store(uint16_t *to, float x)
{
    uint32_t u = prim_bits(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;

    *to = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40u : rounded);
}

PRIM float prim_f16(const uint8_t *p)
{
    uint32_t h = p[0] | (uint32_t)p[1] << 8, sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;

    if (rest >= 0x7c00u)
        return prim_float(sign | rest << 13 | 0x7f800000u);
    if (rest < 0x400u)
        return prim_float(sign | prim_bits((float)rest * 5.9604644775390625e-8f));
    return prim_float(sign | ((rest << 13) + (112u << 23)));
}

PRIM float prim_bf16(const uint8_t *p)
{
    return prim_float((uint32_t)p[0] << 16 | (uint32_t)p[1] << 24);
}

PRIM bool prim_finite(float x)
{
    return (prim_bits(x) & 0x7f800000u) != 0x7f800000u;
}

/* Sum over a warp, the same in every lane. */
PRIM float prim_warp_sum(float x)
{
    for (int step = 16; step; step /= 2)
        x += prim_shfl_xor(x, step);
    return x;
}

/* Sum over a block of CUDA_ROW_BLOCK threads, by halves: the same in every thread. */
template <typename T> PRIM T prim_block_sum(T x)
{
    __shared__ T part[CUDA_ROW_BLOCK];
    uint32_t t = threadIdx.x;

    __syncthreads(); /* the last sum has been read */
    part[t] = x;
    for (uint32_t half = CUDA_ROW_BLOCK / 2; half; half /= 2) {
        __syncthreads();
        if (t < half)
            part[t] += part[t + half];
    }
    __syncthreads();
    return part[0];
}

PRIM uint64_t prim_thread(void)
{
    return (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
}

PRIM uint64_t prim_threads(void)
{
    return (uint64_t)gridDim.x * blockDim.x;
}

#endif
