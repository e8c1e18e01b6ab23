/* observe_outputs.c - what a row's value adds to the layer's output.
 *
 * The one idea: a value reaches the output only through its query head's columns of W_O, so
 * its size there is what a row is worth. The matrix is read from the model when a policy
 * asks for it; the backend's own form of it stays the backend's. */
#include "observe.h"

#include <math.h>
#include <string.h>

#include "mem.h"
#include "ref.h"

struct work {
    const struct layer_view *x;
    ref_mul_fn *mul;
    struct ref_matrix *head; /* [n_heads]: W_O of the head, head_dim in, n_hidden out */
    float *scratch;          /* per worker: a block of values and of outputs */
    uint64_t per_worker;
    int norm;
    double *out;
};

static void split_row(const struct work *w, const float *row, uint32_t i)
{
    const struct kv_geom *geom = &w->x->b->p->geom;

    for (uint32_t h = 0; h < geom->n_heads; h++)
        ref_pack_rows(&w->head[h], i, row + (uint64_t)h * geom->head_dim, 1);
}

static int load(struct work *w, struct larder_err *e)
{
    const struct model_params *p = w->x->b->p;
    uint32_t n_heads = p->geom.n_heads, d = p->geom.head_dim;
    float *row = mem_alloc((uint64_t)n_heads * d, sizeof *row);
    int rc = row ? 0 : LARDER_ENOMEM;

    for (uint32_t h = 0; h < n_heads && !rc; h++) {
        w->head[h] = (struct ref_matrix){d, p->n_hidden, NULL};
        w->head[h].panel = mem_aligned((uint64_t)ref_padded(p->n_hidden) * d, sizeof(float));
        if (!w->head[h].panel)
            rc = LARDER_ENOMEM;
    }
    if (rc)
        larder_fail(e, rc, "no memory for the output matrix of layer %u", w->x->layer);
    for (uint32_t i = 0; i < p->n_hidden && !rc; i++) {
        rc = model_read_f32(w->x->b->model, w->x->layer, MODEL_O, i, 1, row, e);
        if (!rc)
            split_row(w, row, i);
    }
    mem_free(row);
    return rc;
}

static double norm_of(const float *y, uint32_t n, int norm)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += norm == 1 ? fabs((double)y[i]) : (double)y[i] * y[i];
    return norm == 1 ? sum : sqrt(sum);
}

static void head_item(void *arg, uint32_t h, uint32_t worker)
{
    const struct work *w = arg;
    const struct layer_view *x = w->x;
    uint32_t d = x->b->p->geom.head_dim, n_hidden = x->b->p->n_hidden;
    float *v = w->scratch + worker * w->per_worker, *y = v + (uint64_t)REF_BLOCK * d;
    uint64_t at = (uint64_t)(h / observe_group(x)) * x->stride;

    for (uint32_t row = 0; row < x->n; row += REF_BLOCK) {
        uint32_t n = x->n - row < REF_BLOCK ? x->n - row : REF_BLOCK;
        struct ref_mul mul = ref_by(&w->head[h], v, d, n, y, n_hidden);

        observe_row(x, x->v, (at + row) * d, n * d, v);
        w->mul(&mul);
        for (uint32_t i = 0; i < n; i++)
            w->out[(uint64_t)h * x->n + row + i] =
                norm_of(y + (uint64_t)i * n_hidden, n_hidden, w->norm);
    }
}

int observe_outputs(const struct layer_view *x, int norm, double *out, struct larder_err *e)
{
    uint32_t n_heads = x->b->p->geom.n_heads;
    struct work w = {.x = x, .norm = norm, .out = out};
    const char *isa;
    int rc;

    w.mul = ref_mul_pick(&isa);
    w.per_worker = (uint64_t)REF_BLOCK * (x->b->p->geom.head_dim + x->b->p->n_hidden);
    w.scratch = ref_scratch(x->b, w.per_worker);
    w.head = mem_zalloc(n_heads, sizeof *w.head);
    if (!w.scratch || !w.head)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for the outputs of %u tokens", x->n);
    else
        rc = load(&w, e);
    if (!rc)
        rc = backend_view(x->b, x->v, VIEW_READ, e);
    if (!rc)
        ref_for(x->b, n_heads, head_item, &w);
    for (uint32_t h = 0; w.head && h < n_heads; h++)
        mem_free(w.head[h].panel);
    mem_free(w.head);
    mem_free(w.scratch);
    return rc;
}

int observe_worth(const struct layer_view *x, double *worth, struct larder_err *e)
{
    uint32_t n = x->n, group = observe_group(x);
    double *out = mem_alloc((uint64_t)x->b->p->geom.n_heads * n, sizeof *out);
    int rc = out ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the outputs of %u tokens", n);

    if (!rc)
        rc = observe_outputs(x, 1, out, e);
    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads && !rc; g++) {
        for (uint32_t j = 0; j < n; j++) {
            double sum = 0;

            for (uint32_t h = g * group; h < (g + 1) * group; h++)
                sum += out[(uint64_t)h * n + j];
            worth[(uint64_t)g * n + j] = sum / group;
        }
    }
    mem_free(out);
    return rc;
}
