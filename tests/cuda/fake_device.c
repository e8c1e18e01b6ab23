/* fake_device.c - cuda_device for tests: memory is malloc'd, kernels run through the shim.
 *
 * Fresh memory is NaN, every lane but the one for what leaves runs at once, and a product is the
 * plainest loop. */
#include "fake_device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"

#define HEALTHY                                                                                    \
    {                                                                                              \
        .info = {.name = "fake device",                                                            \
                 .driver = 13000,                                                                  \
                 .runtime = 13000,                                                                 \
                 .major = 9,                                                                       \
                 .total = 8ull << 30,                                                              \
                 .free = 4ull << 30,                                                               \
                 .shared_max = 227 << 10},                                                         \
        .fail_rc = 700,                                                                            \
    }

struct fake fake = HEALTHY;

#define MAX_LEAVING 4096u

static struct {
    void *to;
    const void *from;
    uint64_t bytes;
} leaving[MAX_LEAVING];
static uint32_t n_leaving;

static void all_leave(void)
{
    for (uint32_t i = 0; i < n_leaving; i++)
        memcpy(leaving[i].to, leaving[i].from, leaving[i].bytes);
    n_leaving = 0;
}

void fake_reset(void)
{
    n_leaving = 0;
    fake = (struct fake)HEALTHY;
}

static int step(enum fake_call c)
{
    return ++fake.count[c] == fake.fail_at && fake.fail == c ? fake.fail_rc : 0;
}

static int fake_open(void **ret, struct cuda_info *info, struct larder_err *e)
{
    if (step(FAKE_OPEN))
        return larder_fail(e, LARDER_EBACKEND, "no CUDA device");
    *info = fake.info;
    *ret = &fake;
    return 0;
}

static void fake_close(void *d)
{
    (void)d;
}

static const char *fake_text(int rc)
{
    return rc == 700 ? "an illegal memory access was encountered" : "out of memory";
}

static int fake_free_bytes(void *d, uint64_t *ret)
{
    (void)d;
    *ret = fake.info.free - fake.used;
    return 0;
}

enum { BEFORE = 256, BEHIND = 64 };

/* The size stands before what is handed out, in 256 bytes that keep the alignment of a device, and
 * bytes that nobody may write to behind it. */
static void *take(uint64_t bytes)
{
    uint8_t *p = aligned_alloc(BEFORE, (BEFORE + bytes + BEHIND + 255) / 256 * 256);

    memcpy(p, &bytes, sizeof bytes);
    memset(p + BEFORE, 0xff, bytes);
    memset(p + BEFORE + bytes, 0xa5, BEHIND);
    fake.n_live++;
    return p + BEFORE;
}

/* -> its size */
static uint64_t give_back(void *p)
{
    const uint8_t *behind;
    uint64_t bytes;

    memcpy(&bytes, (uint8_t *)p - BEFORE, sizeof bytes);
    behind = (uint8_t *)p + bytes;
    for (int i = 0; i < BEHIND; i++)
        if (behind[i] != 0xa5)
            abort(); /* something wrote past the end */
    memset(p, 0xff, bytes);
    fake.n_live--;
    free((uint8_t *)p - BEFORE);
    return bytes;
}

static int fake_alloc(void *d, uint64_t bytes, void **ret)
{
    int rc = step(FAKE_ALLOC);

    (void)d;
    if (rc)
        return rc;
    if (bytes > fake.info.free - fake.used)
        return CUDA_OUT_OF_MEMORY;
    *ret = take(bytes);
    fake.used += bytes;
    fake.peak = fake.used > fake.peak ? fake.used : fake.peak;
    return 0;
}

static void fake_release(void *d, void *p)
{
    (void)d;
    all_leave();
    fake.used -= give_back(p);
}

static int fake_pin(void *d, uint64_t bytes, void **ret)
{
    int rc = step(FAKE_PIN);

    (void)d;
    if (!rc)
        *ret = take(bytes);
    return rc;
}

static void fake_unpin(void *d, void *p)
{
    (void)d;
    all_leave();
    give_back(p);
}

static int fake_copy(void *d, void *to, const void *from, uint64_t bytes, enum cuda_way way,
                     enum cuda_lane lane)
{
    int rc = step(FAKE_COPY);

    (void)d;
    if (rc)
        return rc;
    fake.sent += way == CUDA_TO_DEVICE && lane == CUDA_COPY ? bytes : 0;
    fake.down += way == CUDA_TO_HOST ? bytes : 0;
    if (lane == CUDA_LEAVE && n_leaving < MAX_LEAVING) {
        leaving[n_leaving].to = to;
        leaving[n_leaving].from = from;
        leaving[n_leaving++].bytes = bytes;
    } else {
        memcpy(to, from, bytes);
    }
    return 0;
}

static int fake_zero(void *d, void *to, uint64_t bytes, enum cuda_lane lane)
{
    int rc = step(FAKE_ZERO);

    (void)d;
    (void)lane;
    if (!rc)
        memset(to, 0, bytes);
    return rc;
}

static int fake_mark(void *d, uint32_t mark, enum cuda_lane lane)
{
    (void)d;
    (void)mark;
    (void)lane;
    return step(FAKE_MARK);
}

static int fake_wait(void *d, uint32_t mark, enum cuda_lane lane)
{
    (void)d;
    if (mark == CUDA_MARK_LEFT && lane != CUDA_LEAVE)
        all_leave();
    return step(FAKE_WAIT);
}

static int fake_sync_mark(void *d, uint32_t mark)
{
    (void)d;
    if (mark == CUDA_MARK_LEFT)
        all_leave();
    return step(FAKE_SYNC);
}

static int fake_sync(void *d, enum cuda_lane lane)
{
    (void)d;
    if (lane == CUDA_LEAVE)
        all_leave();
    return step(FAKE_SYNC);
}

static float element(const void *x, bool is_bf16, uint64_t i)
{
    return is_bf16 ? bf16_to_f32(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static void product(const struct cuda_gemm *g, uint64_t x0, uint64_t w0, float *y0)
{
    uint64_t xi = g->x_tall ? 1 : g->ldx, xk = g->x_tall ? g->ldx : 1;
    uint64_t wj = g->w_tall ? 1 : g->n_in, wk = g->w_tall ? g->n_out : 1;

    for (uint64_t i = 0; i < g->n; i++)
        for (uint64_t j = 0; j < g->n_out; j++) {
            float *y = y0 + i * g->ldy + j, sum = 0;

            for (uint64_t k = 0; k < g->n_in; k++)
                sum += element(g->x, g->bf16, x0 + i * xi + k * xk) *
                       element(g->w, g->bf16, w0 + j * wj + k * wk);
            *y = g->add ? *y + sum : sum;
        }
}

static int fake_gemm(void *d, const struct cuda_gemm *g)
{
    int rc = step(FAKE_GEMM);

    (void)d;
    if (rc)
        return rc;
    product(g, 0, 0, g->y);
    for (uint64_t i = 1; i < g->batch; i++)
        product(g, i * g->x_stride, i * g->w_stride, g->y + i * g->y_stride);
    return 0;
}

/* L over the lower triangle of a; the row, counted from 1, that has no root; or 0. */
static uint32_t factor(const struct cuda_solve *s)
{
    for (uint64_t j = 0; j < s->n; j++)
        for (uint64_t i = 0; i <= j; i++) {
            float *a = s->a + j * s->ld;
            double sum = a[i];

            for (uint64_t k = 0; k < i; k++)
                sum -= (double)a[k] * s->a[i * s->ld + k];
            if (i == j && !(sum > 0))
                return (uint32_t)j + 1;
            a[i] = (float)(i == j ? sqrt(sum) : sum / s->a[i * s->ld + i]);
        }
    return 0;
}

static void substitute(const struct cuda_solve *s, float *x)
{
    for (uint64_t i = 0; i < s->n; i++) {
        double sum = x[i];

        for (uint64_t k = 0; k < i; k++)
            sum -= (double)s->a[i * s->ld + k] * x[k];
        x[i] = (float)(sum / s->a[i * s->ld + i]);
    }
    for (uint64_t i = s->n; i-- > 0;) {
        double sum = x[i];

        for (uint64_t k = i + 1; k < s->n; k++)
            sum -= (double)s->a[k * s->ld + i] * x[k];
        x[i] = (float)(sum / s->a[i * s->ld + i]);
    }
}

static int fake_solve(void *d, const struct cuda_solve *s)
{
    int rc = step(FAKE_SOLVE);

    (void)d;
    if (rc)
        return rc;
    *s->bad = factor(s);
    if (fake.indefinite > 0) {
        fake.indefinite--;
        *s->bad = 1;
    }
    for (uint64_t c = 0; c < s->cols; c++)
        substitute(s, s->x + c * s->ld);
    return 0;
}

static int fake_launch(void *d, const struct cuda_launch *l)
{
    int rc = step(FAKE_LAUNCH);

    (void)d;
    if (rc)
        return rc;
    fake.kernels[l->kernel]++;
    fake.copy_lane += l->lane == CUDA_COPY;
    return cuda_launch_any(l, NULL);
}

const struct cuda_driver cuda_device = {
    .open = fake_open,
    .close = fake_close,
    .text = fake_text,
    .free_bytes = fake_free_bytes,
    .alloc = fake_alloc,
    .release = fake_release,
    .pin = fake_pin,
    .unpin = fake_unpin,
    .copy = fake_copy,
    .zero = fake_zero,
    .mark = fake_mark,
    .wait = fake_wait,
    .sync_mark = fake_sync_mark,
    .sync = fake_sync,
    .gemm = fake_gemm,
    .solve = fake_solve,
    .launch = fake_launch,
};
