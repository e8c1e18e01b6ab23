/* backend.c - the list of compute backends in this build, and memory shared with callers. */
#include "backend.h"

#include <string.h>

#include "mem.h"

static const struct backend_ops *const all[] = {
    &backend_ref,
    &backend_cpu,
#ifdef LARDER_CUDA
    &backend_cuda,
#endif
};

const struct backend_ops *backend_find(const char *name)
{
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (!strcmp(name, all[i]->name))
            return all[i];
    return NULL;
}

const char *backend_names(void)
{
#ifdef LARDER_CUDA
    return "ref, cpu and cuda";
#else
    return "ref and cpu (cuda is in larder-prefill-cuda)";
#endif
}

void *backend_buffer_new(struct backend *b, uint64_t count, uint64_t size)
{
    return b->ops->buffer_new ? b->ops->buffer_new(b, count, size, false)
                              : mem_aligned(count, size);
}

void *backend_staging_new(struct backend *b, uint64_t count, uint64_t size)
{
    return b->ops->buffer_new ? b->ops->buffer_new(b, count, size, true) : mem_aligned(count, size);
}

void backend_buffer_free(struct backend *b, void *p)
{
    if (b->ops->buffer_free)
        b->ops->buffer_free(b, p);
    else
        mem_free(p);
}

int backend_view(struct backend *b, const void *p, enum backend_view how, struct larder_err *e)
{
    return b->ops->view ? b->ops->view(b, p, how, e) : 0;
}
