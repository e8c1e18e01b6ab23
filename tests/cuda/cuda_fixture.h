/* cuda_fixture.h - backend `cuda` on a fake model, and `ref`. The device is host memory, or, with
 * LARDER_ON_GPU, a GPU. */
#ifndef LARDER_CUDA_FIXTURE_H
#define LARDER_CUDA_FIXTURE_H

#include "testlib.h"

#include <math.h>

#include "engine.h"
#include "fake_model.h"
#include "half.h"

#ifdef LARDER_ON_GPU
#include "cuda.h"
#else
#include "fake_device.h"
#endif

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

/* A healthy device; nothing of it is in use when the backend is closed. */
#ifdef LARDER_ON_GPU
static inline void fresh_device(void) {}

/* Ends the program with 77 where there is none. */
static inline void skip_without_gpu(void)
{
    struct larder_err e = {0, ""};
    struct cuda_info info;
    void *d;

    if (cuda_device.open(&d, &info, &e)) {
        fprintf(stderr, "the GPU is not tested: %s\n", e.msg);
        exit(77);
    }
    cuda_device.close(d);
}

static inline void close_clean(struct backend *b)
{
    b->ops->close(b);
}
#else
static inline void fresh_device(void)
{
    fake_reset();
}

static inline void skip_without_gpu(void) {}

static inline void close_clean(struct backend *b)
{
    b->ops->close(b);
    assert_int_equal(fake.n_live, 0);
    assert_int_equal(fake.used, 0);
}
#endif

static inline float *random_rows(size_t n, float scale, uint64_t *seed)
{
    float *x = malloc((n + 1) * sizeof *x);

    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = scale * test_randf(seed);
    return x;
}

/* T holds the values of x afterwards. */
static inline void *elements(float *x, size_t n, enum kv_dtype t)
{
    uint16_t *narrow = malloc(n * 4 + 4);

    assert_non_null(narrow);
    if (t == KV_F32)
        return memcpy(narrow, x, n * 4);
    for (size_t i = 0; i < n; i++) {
        narrow[i] = f32_to_bf16(x[i]);
        x[i] = bf16_to_f32(narrow[i]);
    }
    return narrow;
}

/* A document of n random tokens, always the same, by each policy. */
static inline int prefill_tokens(struct backend *b, uint32_t n, const char *const *policy,
                                 const struct engine_sink *sink, uint32_t n_policies,
                                 struct engine_result *r, struct larder_err *e)
{
    struct policy p[4];
    uint32_t ids[FAKE_POSITIONS];
    struct engine_doc doc = {ids, n, NULL, NULL};
    uint64_t seed = 11;

    assert_true(n <= FAKE_POSITIONS && n_policies <= 4);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (uint32_t)(test_rand(&seed) % FAKE_VOCAB);
    for (uint32_t i = 0; i < n_policies; i++)
        if (policy_parse(policy[i], &p[i], e))
            fail_msg("%s: %s", policy[i], e->msg);
    return engine_prefill_each(b, &doc, p, sink, n_policies, r, e);
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
