/* cuda.c - backend `cuda`: opening a device for a model, and the table.
 *
 * The one idea: what this backend cannot do it says at the start - no device, one too old, heads
 * that it has no kernel for - and never computes elsewhere instead. */
#include "cuda.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "mem.h"
#include "pool.h"

#define MAX_THREADS 256u

static uint32_t thread_count(uint32_t asked)
{
    cpu_set_t set;
    uint32_t n = asked;

    if (!n)
        n = sched_getaffinity(0, sizeof set, &set) ? 1 : (uint32_t)CPU_COUNT(&set);
    return n < MAX_THREADS ? n : MAX_THREADS;
}

static int check_model(const struct model_params *p, struct larder_err *e)
{
    if (p->geom.head_dim > CUDA_MAX_HEAD_DIM || p->rope_dims > p->geom.head_dim || p->rope_dims % 2)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "backend cuda has no kernel for heads of %u elements, %u of them "
                           "rotated (at most %u); configure backend = cpu",
                           p->geom.head_dim, p->rope_dims, CUDA_MAX_HEAD_DIM);
    return 0;
}

/* Shared memory of the block that takes the most. */
static uint32_t most_shared(const struct model_params *p, bool bf16)
{
    const struct cuda_attend_args a = {
        .n_rows = 64, .n_tail = 64, .n_heads = 1, .group = 1, .d = p->geom.head_dim};
    const struct cuda_window_args w = {.n = 2, .w = 1, .n_batch = 1, .d = p->geom.head_dim};
    const uint32_t need[] = {cuda_grid_attend(&a, bf16, true).shared,
                             cuda_grid_attend(&a, bf16, false).shared,
                             cuda_grid_window(CUDA_WINDOW_LOGITS, bf16, &w).shared};
    uint32_t most = need[0];

    for (int i = 1; i < 3; i++)
        most = need[i] > most ? need[i] : most;
    return most;
}

static int check_device(const struct cuda_info *in, const struct model_params *p, bool bf16,
                        struct larder_err *e)
{
    uint32_t need = most_shared(p, bf16);

    if (in->major < CUDA_LEAST_MAJOR)
        return larder_fail(e, LARDER_EBACKEND,
                           "CUDA device %.60s has compute capability %d.%d; backend cuda needs "
                           "%d.0",
                           in->name, in->major, in->minor, CUDA_LEAST_MAJOR);
    if (need > in->shared_max)
        return larder_fail(e, LARDER_EBACKEND,
                           "CUDA device %.60s gives a block %llu bytes of shared memory; heads of "
                           "%u elements need %u",
                           in->name, (unsigned long long)in->shared_max, p->geom.head_dim, need);
    return 0;
}

static void describe(struct cuda_backend *b)
{
    const struct cuda_info *in = &b->info;

    snprintf(b->base.isa, sizeof b->base.isa, "sm_%d%d", in->major, in->minor);
    snprintf(b->base.device, sizeof b->base.device,
             "%.80s, CUDA driver %d.%d, %llu of %llu MiB free, weights %s", in->name,
             in->driver / 1000, in->driver % 1000 / 10, (unsigned long long)(in->free >> 20),
             (unsigned long long)(in->total >> 20), b->resident ? "resident" : "streamed");
}

static void cuda_close(struct backend *base)
{
    struct cuda_backend *b = cuda_of(base);

    if (!base)
        return;
    if (b->device) {
        cuda_head_free(base, b->head);
        cuda_weights_close(b);
        cuda_memory_close(b);
        b->d->close(b->device);
    }
    pool_close(b->pool);
    mem_free(b);
}

static int open_device(struct cuda_backend *b, struct larder_err *e)
{
    int rc = b->d->open(&b->device, &b->info, e);

    if (!rc)
        rc = check_device(&b->info, b->base.p, b->bf16, e);
    if (!rc)
        rc = cuda_weights_open(b, e);
    if (!rc)
        describe(b);
    return rc;
}

static int cuda_open(struct backend **ret, const struct model *m, const struct backend_opts *o,
                     struct larder_err *e)
{
    struct cuda_backend *b = mem_zalloc(1, sizeof *b);
    int rc = b ? check_model(model_params(m), e)
               : larder_fail(e, LARDER_ENOMEM, "no memory for backend cuda");

    if (rc) {
        mem_free(b);
        return rc;
    }
    b->base.ops = &backend_cuda;
    b->base.model = m;
    b->base.p = model_params(m);
    b->base.elem = o->dtype;
    b->base.n_threads = thread_count(o->n_threads);
    b->bf16 = o->dtype == KV_BF16;
    b->stream = o->stream;
    b->elem = kv_dtype_bytes(o->dtype);
    b->d = &cuda_device;
    b->logit_bytes = CUDA_WINDOW_BYTES;
    rc = pool_open(&b->pool, b->base.n_threads, e);
    if (!rc)
        rc = open_device(b, e);
    if (rc) {
        cuda_close(&b->base);
        return rc;
    }
    *ret = &b->base;
    return 0;
}

static void cuda_parallel(struct backend *b, uint32_t n, backend_item_fn *fn, void *arg)
{
    pool_for(cuda_of(b)->pool, n, fn, arg);
}

const struct backend_ops backend_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .layer_load = cuda_layer_load,
    .layer_free = cuda_layer_free,
    .qkv = cuda_qkv,
    .attend = cuda_attend,
    .finish = cuda_finish,
    .window = cuda_window,
    .resume = cuda_resume,
    .logits = cuda_logits,
    .head_load = cuda_head_load,
    .head_free = cuda_head_free,
    .parallel = cuda_parallel,
    .buffer_new = cuda_buffer_new,
    .buffer_free = cuda_buffer_free,
    .view = cuda_buffer_view,
    .select = &cuda_select,
    .hold = cuda_hold,
    .hold_end = cuda_hold_end,
};
