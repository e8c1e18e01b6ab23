/* pass.c - progress, loading and the last row's logits. */
#include "pass.h"

#include <math.h>
#include <time.h>

#include "mem.h"

double pass_clock_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

int pass_progress(const struct engine_sink *sink, const char *pass, uint32_t layer,
                  uint32_t n_layers, struct larder_err *e)
{
    int rc = 0;

    if (sink && sink->progress)
        rc = sink->progress(sink->arg, pass, layer, n_layers);
    return rc ? larder_fail(e, rc, "canceled before layer %u of %u", layer, n_layers) : 0;
}

int pass_load_layer(struct backend *b, uint32_t layer, struct layer **ret, double *load_ms,
                    struct larder_err *e)
{
    double start = pass_clock_ms();
    int rc = b->ops->layer_load(b, layer, false, ret, e);

    *load_ms += pass_clock_ms() - start;
    return rc;
}

int pass_logits(struct backend *b, const float *hidden, float **ret, double *load_ms,
                struct larder_err *e)
{
    uint32_t n_vocab = b->p->n_vocab;
    float *x = mem_alloc(n_vocab, sizeof *x);
    double start = pass_clock_ms();
    int rc;

    if (!x)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %u logits", n_vocab);
    rc = b->ops->logits(b, NULL, hidden, 1, x, e);
    *load_ms += pass_clock_ms() - start; /* reading the output matrix dominates */
    for (uint32_t i = 0; i < n_vocab && !rc; i++)
        if (!isfinite(x[i]))
            rc = larder_fail(e, LARDER_ENUMERIC,
                             "logit %u of the last token is not finite; nothing was kept", i);
    if (rc) {
        mem_free(x);
        return rc;
    }
    *ret = x;
    return 0;
}
