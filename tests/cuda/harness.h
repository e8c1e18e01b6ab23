/* harness.h - where kernels under test run: on a processor or on a GPU.
 *
 * Memory is reached by both sides and cleared. On a GPU it is pinned host memory: slow, and every
 * access out of bounds is seen by compute-sanitizer. A launch has ended when kernel_run() returns.
 */
#ifndef LARDER_CUDA_HARNESS_H
#define LARDER_CUDA_HARNESS_H

#include "cuda_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

void *kernel_alloc(size_t bytes);
void kernel_free(void *p);
int kernel_run(const struct cuda_launch *l);
bool kernel_is_device(void);

#ifdef __cplusplus
}
#endif
#endif
