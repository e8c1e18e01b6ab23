/* cuda_fixture.h - backend `cuda` on a device that is host memory, and `ref`, on a fake model. */
#ifndef LARDER_CUDA_FIXTURE_H
#define LARDER_CUDA_FIXTURE_H

#include "testlib.h"

#include <math.h>

#include "fake_device.h"
#include "fake_model.h"
#include "half.h"

static inline struct backend *open_on(const struct backend_ops *ops, const struct model *m,
                                      enum kv_dtype dtype)
{
    struct backend_opts o = {.dtype = dtype, .n_threads = 2};
    struct backend *b = NULL;
    struct larder_err e = {0, ""};

    if (ops->open(&b, m, &o, &e))
        fail_msg("%s", e.msg);
    if (ops == &backend_cuda)
        cuda_of(b)->poison = true;
    return b;
}

static inline struct backend *open_cuda(const struct model *m, enum kv_dtype dtype)
{
    return open_on(&backend_cuda, m, dtype);
}

static inline struct backend *open_ref(const struct model *m)
{
    return open_on(&backend_ref, m, KV_F32);
}

static inline void close_clean(struct backend *b)
{
    b->ops->close(b);
    assert_int_equal(fake.n_live, 0);
    assert_int_equal(fake.used, 0);
}

static inline void fill(float *x, size_t n, uint64_t *seed)
{
    for (size_t i = 0; i < n; i++)
        x[i] = test_randf(seed);
}

static inline bool cuda_count_down(void *arg)
{
    return test_fail_nth(arg);
}

#endif
