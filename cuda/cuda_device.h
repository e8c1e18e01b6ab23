/* cuda_device.h - a CUDA device as a table of functions.
 *
 * Purpose    What backend `cuda` asks of a device. cuda_driver.cu is the one that reaches a GPU; a
 *            test has one that is host memory and fails when told to (tests/cuda).
 * Units      Bytes; matrices in elements.
 * Ownership  alloc/release, pin/unpin and open/close pair up.
 * Threads    One thread owns the device.
 * Errors     0 or the driver's own number, which text() explains; open() alone gives a LARDER_E*.
 */
#ifndef LARDER_CUDA_DEVICE_H
#define LARDER_CUDA_DEVICE_H

#include "cuda_kernel.h"
#include "geom.h"
#include "larder_status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_OUT_OF_MEMORY 2 /* the driver's number for it */

/* Marks: two of a slot of weights, one of a layer's held rows. */
#define CUDA_MARK_HELD (2 * KV_MAX_LAYERS)
#define CUDA_MARKS (3 * KV_MAX_LAYERS + 2) /* and those of what leaves */

struct cuda_info {
    char name[96];
    int driver, runtime; /* 1000 major + 10 minor */
    int major, minor;    /* compute capability */
    uint64_t total, free;
    uint64_t shared_max; /* bytes of shared memory that a block may have */
};

/* y[n][ldy] (+)= x[n][ldx] w[n_out][n_in]^T; x and w of T, y f32, sums f32. */
struct cuda_gemm {
    const void *x, *w;
    float *y;
    uint64_t ldx, ldy;
    uint32_t n, n_in, n_out;
    bool bf16, add;
    bool x_tall, w_tall; /* stored the other way: x[n_in][ldx], w[n_in][n_out] */
    uint32_t batch;      /* more than 1: so many products, whose matrices are so far apart */
    uint64_t x_stride, w_stride, y_stride; /* 0: the same matrix, of w */
};

/* a x = b by Cholesky, f32. */
struct cuda_solve {
    float *a;      /* [n][ld], symmetric; overwritten */
    float *x;      /* [cols][ld]: right-hand sides, then solutions */
    uint32_t *bad; /* on the device: not 0 where a is not positive definite; x is then spoilt */
    uint32_t n, cols;
    uint64_t ld;
};

enum cuda_way { CUDA_TO_DEVICE, CUDA_TO_HOST, CUDA_ON_DEVICE };

/* Functions return 0 or the driver's number. Work of one lane is done in order; `mark`s are
 * points of a lane that others wait for. */
struct cuda_driver {
    int (*open)(void **ret, struct cuda_info *info, struct larder_err *e); /* a LARDER_E* */
    void (*close)(void *d);
    const char *(*text)(int rc);
    int (*free_bytes)(void *d, uint64_t *ret);
    int (*alloc)(void *d, uint64_t bytes, void **ret);
    void (*release)(void *d, void *p); /* waits for work that uses it */
    int (*pin)(void *d, uint64_t bytes, void **ret);
    void (*unpin)(void *d, void *p);
    /* To and from pinned memory without waiting; `from` may be reused after sync(). */
    int (*copy)(void *d, void *to, const void *from, uint64_t bytes, enum cuda_way way,
                enum cuda_lane lane);
    int (*zero)(void *d, void *to, uint64_t bytes, enum cuda_lane lane);
    int (*mark)(void *d, uint32_t mark, enum cuda_lane lane);
    int (*wait)(void *d, uint32_t mark, enum cuda_lane lane); /* lane waits for the mark */
    int (*sync_mark)(void *d, uint32_t mark);                 /* the caller waits */
    int (*sync)(void *d, enum cuda_lane lane);
    int (*gemm)(void *d, const struct cuda_gemm *g);
    int (*solve)(void *d, const struct cuda_solve *s);
    int (*launch)(void *d, const struct cuda_launch *l);
};

/* The device of this program: cuda_driver.cu, or a test's. */
extern const struct cuda_driver cuda_device;

#ifdef __cplusplus
}
#endif
#endif
