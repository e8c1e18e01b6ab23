/* cuda_plan.c - how much device memory a prefill takes, before anything is allocated.
 *
 * The one idea: prefill is layer-major, so the peak is hidden states, one layer's Q, K, V and O,
 * two layers of weights (all of them when they stay), the workspace of a block of rows, and what a
 * policy chooses with: scores and lists, and at most all rows once more, fitted and packed. What
 * sessions hold comes on top. */
#include "cuda.h"

#define TOKEN_BYTES 40u /* a sum over the heads and ranks of eight layers */
/* An element of K and one of V, fitted: both, and K as it will be read back, in f32; tiles, of K
 * two; ranges */
#define FIT_BYTES 16u
#define SUM_BYTES 8u /* of a row and a query head: what a fit needs of the replay */

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

int cuda_weights_size(const struct model *m, enum kv_dtype elem, struct cuda_weights_size *ret,
                      struct larder_err *e)
{
    const struct model_params *p = model_params(m);
    struct cuda_weights_size s = {0};
    struct cuda_layout layout;
    uint32_t rows, cols;

    for (uint32_t l = 0; l < p->geom.n_layers; l++) {
        int rc = cuda_layer_layout(m, l, elem, &layout, e);

        if (rc)
            return rc;
        s.raw = larger(s.raw, layout.raw);
        s.all_stored += layout.raw;
        s.layer = layout.bytes; /* of every layer */
    }
    model_weight_shape(m, MODEL_HEAD, &rows, &cols);
    s.head = (uint64_t)rows * cols * kv_dtype_bytes(elem);
    *ret = s;
    return 0;
}

bool cuda_plan_resident(const struct cuda_weights_size *w, uint32_t n_layers, uint64_t free_bytes)
{
    return n_layers * w->layer + w->head <= free_bytes / 100 * CUDA_RESIDENT_PERCENT;
}

struct cuda_plan cuda_plan_rows(const struct model_params *p, const struct cuda_weights_size *w,
                                enum kv_dtype elem, bool resident, uint64_t n, uint64_t held)
{
    const struct kv_geom *g = &p->geom;
    uint64_t bytes = kv_dtype_bytes(elem), rows = n < CUDA_ROWS ? n : CUDA_ROWS;
    uint64_t q = (uint64_t)g->n_heads * g->head_dim, kv = (uint64_t)g->n_kv_heads * g->head_dim;
    uint64_t wide = larger(q + 2 * kv, 2ull * p->n_ff);
    struct cuda_plan plan = {.resident = resident, .held = held};

    plan.hidden = n * p->n_hidden * sizeof(float);
    plan.kv = n * 2 * (q + kv) * bytes; /* Q and O, K and V */
    plan.weights = w->raw + (resident ? g->n_layers * w->layer + w->head : 2 * w->layer);
    plan.workspace = rows * (p->n_hidden * bytes + wide * sizeof(float) + p->n_ff * bytes) +
                     rows * p->rope_dims * sizeof(float) + n * sizeof(uint32_t) + CUDA_WINDOW_BYTES;
    plan.chosen =
        n * (kv * (2 * bytes + FIT_BYTES) + TOKEN_BYTES + (uint64_t)g->n_heads * SUM_BYTES +
             g->n_kv_heads * (sizeof(double) + sizeof(uint32_t)));
    plan.total = plan.hidden + plan.kv + plan.weights + plan.workspace + plan.chosen + held;
    return plan;
}

int cuda_plan_check(const struct cuda_plan *plan, uint64_t n, const struct cuda_info *info,
                    struct larder_err *e)
{
    const unsigned long long mib = 1 << 20;

    if (plan->total <= info->free)
        return 0;
    return larder_fail(e, LARDER_ENOMEM,
                       "%llu tokens need %llu MiB of device memory (hidden states %llu, rows of a "
                       "layer %llu, weights %llu, workspace %llu, kept rows %llu, rows of sessions "
                       "%llu) and %.60s had %llu MiB free; shorten the document, or end sessions",
                       (unsigned long long)n, plan->total / mib, plan->hidden / mib, plan->kv / mib,
                       plan->weights / mib, plan->workspace / mib, plan->chosen / mib,
                       plan->held / mib, info->name, info->free / mib);
}
