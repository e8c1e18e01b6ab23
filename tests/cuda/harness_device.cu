/* harness_device.cu - kernels on a GPU. Without one the program ends with 77: skipped. */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

/* Without a GPU the first call fails; what fails later was broken by a kernel under test. */
static void need(cudaError_t rc)
{
    static bool works;

    if (rc != cudaSuccess) {
        fprintf(stderr, works ? "the GPU failed: %s\n" : "the GPU is not tested: %s\n",
                cudaGetErrorString(rc));
        exit(works ? 1 : 77);
    }
    works = true;
}

extern "C" void *kernel_alloc(size_t bytes)
{
    void *p;

    need(cudaHostAlloc(&p, bytes + 1, cudaHostAllocMapped));
    return memset(p, 0, bytes + 1);
}

extern "C" void kernel_free(void *p)
{
    if (p)
        cudaFreeHost(p);
}

/* A failed kernel is the test's failure. */
extern "C" int kernel_run(const struct cuda_launch *l)
{
    int rc = cuda_launch_any(l, NULL);

    return rc ? rc : (int)cudaDeviceSynchronize();
}

extern "C" bool kernel_is_device(void)
{
    return true;
}
