/* fake_device.h - a CUDA device that is host memory, and whose calls can be made to fail.
 *
 * Order      Lanes run at once, but what leaves (CUDA_LEAVE) is copied only when somebody waits for
 *            it: who looks too early, or writes over what has not left, is seen.
 * Ownership  One at a time. What it hands out is counted: fake.n_live is 0 after a clean close.
 */
#ifndef LARDER_FAKE_DEVICE_H
#define LARDER_FAKE_DEVICE_H

#include "cuda.h"

enum fake_call {
    FAKE_OPEN,
    FAKE_ALLOC,
    FAKE_PIN,
    FAKE_COPY,
    FAKE_ZERO,
    FAKE_MARK,
    FAKE_WAIT,
    FAKE_SYNC,
    FAKE_GEMM,
    FAKE_SOLVE,
    FAKE_LAUNCH,
    FAKE_CALLS,
};

struct fake {
    struct cuda_info info; /* what open() reports; free also bounds allocations */
    enum fake_call fail;   /* this call ... */
    long fail_at;          /* ... fails at its n-th use, counted from 1; 0: never */
    int fail_rc;
    long indefinite;       /* so many of the systems to come are said not to be positive definite */
    long count[FAKE_CALLS];
    uint64_t used, peak;
    long n_live;     /* allocations, pinned ones too */
    long kernels[CUDA_KERNELS];
    long copy_lane;  /* launches on the copy lane */
    uint64_t down;   /* bytes copied to the host */
    uint64_t sent;   /* bytes copied to the device on the copy lane */
};

extern struct fake fake;

/* A large healthy device. */
void fake_reset(void);

#endif
