/* cpu_load.c - rows of weights read in parallel, a slice an item. */
#include <stdatomic.h>

#include "cpu.h"
#include "mem.h"

#define SLICE 64u /* rows an item reads */

struct load {
    struct backend *b;
    uint32_t layer;
    const struct cpu_part *part;
    uint32_t n_parts;
    atomic_int rc;
    struct larder_err e; /* of the first failure */
};

static uint32_t slices_of(const struct cpu_part *p)
{
    return (p->n + SLICE - 1) / SLICE;
}

static int read_slice(const struct load *w, const struct cpu_part *p, uint32_t at,
                      struct larder_err *e)
{
    const struct model *m = w->b->model;
    uint32_t n = p->n - at < SLICE ? p->n - at : SLICE, rows, cols;

    model_weight_shape(m, p->which, &rows, &cols);
    if (p->stored_row)
        return model_read_stored(m, w->layer, p->which, p->row + at, n, p->to + at * p->stored_row,
                                 e);
    if (w->b->elem == KV_BF16)
        return model_read_bf16(m, w->layer, p->which, p->row + at, n,
                               (uint16_t *)(void *)p->to + (uint64_t)at * cols, e);
    return model_read_f32(m, w->layer, p->which, p->row + at, n,
                          (float *)(void *)p->to + (uint64_t)at * cols, e);
}

static void load_item(void *arg, uint32_t item, uint32_t worker)
{
    struct load *w = arg;
    const struct cpu_part *p = w->part;
    struct larder_err e;
    int rc, none = 0;

    (void)worker;
    for (; item >= slices_of(p); p++)
        item -= slices_of(p);
    rc = read_slice(w, p, item * SLICE, &e);
    if (rc && atomic_compare_exchange_strong(&w->rc, &none, rc))
        w->e = e;
}

int cpu_read(struct cpu_backend *b, uint32_t layer, const struct cpu_part *part, uint32_t n_parts,
             struct larder_err *e)
{
    struct load w = {.b = &b->ref.base, .layer = layer, .part = part, .n_parts = n_parts};
    uint32_t n = 0;

    for (uint32_t i = 0; i < n_parts; i++)
        n += slices_of(&part[i]);
    pool_for(b->pool, n, load_item, &w);
    if (w.rc && e)
        *e = w.e;
    return w.rc;
}

int cpu_read_norm(struct backend *b, uint32_t layer, enum model_weight which, float **ret,
                  struct larder_err *e)
{
    uint32_t rows, cols;

    model_weight_shape(b->model, which, &rows, &cols);
    *ret = mem_alloc(cols, sizeof **ret);
    if (!*ret)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a norm");
    return model_read_f32(b->model, layer, which, 0, 1, *ret, e);
}
