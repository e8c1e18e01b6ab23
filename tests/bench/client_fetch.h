/* client_fetch.h - one fetch of an entry as a decoder makes it, timed, and its release. */
#ifndef LARDER_CLIENT_FETCH_H
#define LARDER_CLIENT_FETCH_H

#include "benchlib.h"
#include "larder.h"

#define WAIT_MS 60000

/* *us: from the request to the checked image, of *n_bytes. The release is not timed. */
static inline int timed_fetch(struct larder *c, const char *name, double *us, uint64_t *n_bytes,
                              struct larder_err *e)
{
    struct larder_lease l;
    double t0 = now_us();
    int rc = larder_fetch(c, name, WAIT_MS, &l, e);

    if (rc)
        return rc;
    *us = now_us() - t0;
    *n_bytes = l.image.n_bytes;
    return larder_release(c, &l, WAIT_MS, e);
}

#endif
