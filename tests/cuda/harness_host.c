/* harness_host.c - kernels on a processor, through the shim. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

void *kernel_alloc(size_t bytes)
{
    size_t whole = (bytes + 64) / 64 * 64; /* never none */
    void *p = aligned_alloc(64, whole);

    if (!p)
        abort();
    return memset(p, 0, whole);
}

void kernel_free(void *p)
{
    free(p);
}

int kernel_run(const struct cuda_launch *l)
{
    return cuda_launch_any(l, NULL);
}

bool kernel_is_device(void)
{
    return false;
}
