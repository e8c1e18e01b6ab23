/* cpu_kept.c - a layer whose weights stay in the file's own blocks: that of a decoder.
 *
 * The steps are cpu.c's; the difference is that each product is spread over all threads by rows of
 * the weights (cpu_blocks.c), because a decoder has one new row, or a question's few. */
#include "cpu.h"
#include "mem.h"

enum { Q, K, V, O, GATE, UP, DOWN, N_MATRICES };

struct cpu_kept {
    struct cpu_blocks w[N_MATRICES];
};

static const enum model_weight weight[N_MATRICES] = {MODEL_Q,    MODEL_K,  MODEL_V,   MODEL_O,
                                                     MODEL_GATE, MODEL_UP, MODEL_DOWN};

int cpu_kept_load(struct cpu_backend *b, uint32_t layer, struct cpu_kept **ret,
                  struct larder_err *e)
{
    struct cpu_kept *l = mem_zalloc(1, sizeof *l);
    int rc = l ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the weights of layer %u", layer);

    for (int i = 0; i < N_MATRICES && !rc; i++)
        rc = cpu_blocks_load(b, layer, weight[i], &l->w[i], e);
    if (rc) {
        cpu_kept_free(l);
        return rc;
    }
    *ret = l;
    return 0;
}

void cpu_kept_free(struct cpu_kept *l)
{
    if (!l)
        return;
    for (int i = 0; i < N_MATRICES; i++)
        cpu_blocks_done(&l->w[i]);
    mem_free(l);
}

int cpu_kept_qkv(struct cpu_backend *b, const struct cpu_kept *l, const float *norm,
                 const float *hidden, uint32_t n, float *y, struct larder_err *e)
{
    uint32_t q = l->w[Q].n_out, kv = l->w[K].n_out, wide = q + 2 * kv;
    const struct cpu_product p[] = {{&l->w[Q], y, wide, false},
                                    {&l->w[K], y + q, wide, false},
                                    {&l->w[V], y + q + kv, wide, false}};
    float *x = mem_aligned((uint64_t)n * b->ref.base.p->n_hidden, sizeof *x);
    int rc;

    if (!x)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %u rows", n);
    cpu_normalise(&b->ref.base, hidden, norm, n, x);
    rc = cpu_blocks_multiply(b, p, 3, x, n, e);
    mem_free(x);
    return rc;
}

static int mlp(struct cpu_backend *b, const struct cpu_kept *l, const float *norm, float *hidden,
               uint32_t n, float *x, float *y, struct larder_err *e)
{
    uint64_t ff = l->w[GATE].n_out, wide = l->w[DOWN].n_out;
    const struct cpu_product in[] = {{&l->w[GATE], y, 2 * ff, false},
                                     {&l->w[UP], y + ff, 2 * ff, false}},
                             out = {&l->w[DOWN], hidden, wide, true};
    int rc;

    cpu_normalise(&b->ref.base, hidden, norm, n, x);
    rc = cpu_blocks_multiply(b, in, 2, x, n, e);
    for (uint64_t i = 0; i < n && !rc; i++)
        cpu_swiglu(y + i * 2 * ff, (uint32_t)ff, x + i * ff);
    return rc ? rc : cpu_blocks_multiply(b, &out, 1, x, n, e);
}

int cpu_kept_finish(struct cpu_backend *b, const struct cpu_kept *l, const float *norm,
                    float *hidden, const float *o, uint32_t n, struct larder_err *e)
{
    uint64_t ff = l->w[GATE].n_out, wide = l->w[O].n_out;
    const struct cpu_product out = {&l->w[O], hidden, wide, true};
    float *x = mem_aligned(n * (ff > wide ? ff : wide), sizeof *x);
    float *y = mem_aligned(n * 2 * ff, sizeof *y);
    int rc = x && y ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for %u rows", n);

    if (!rc)
        rc = cpu_blocks_multiply(b, &out, 1, o, n, e);
    if (!rc)
        rc = mlp(b, l, norm, hidden, n, x, y, e);
    mem_free(x);
    mem_free(y);
    return rc;
}
