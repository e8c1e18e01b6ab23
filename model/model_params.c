/* model_params.c - parameters that follow alike from every format: RoPE tables, windows. */
#include <math.h>
#include <string.h>

#include "mem.h"
#include "model_file.h"

#define MAX_NAME 200u

static const struct model_arch archs[] = {
    {.name = "llama"},
    {.name = "mistral"},
    {.name = "qwen2", .qkv_bias = true},
    {.name = "qwen3", .qk_norm = true},
    {.name = "phi3", .fused = true},
};

const struct model_arch *model_arch(const char *name, size_t len)
{
    for (size_t i = 0; i < sizeof archs / sizeof archs[0]; i++)
        if (strlen(archs[i].name) == len && !memcmp(archs[i].name, name, len))
            return &archs[i];
    return NULL;
}

int model_arch_unknown(const char *name, size_t len, struct larder_err *e)
{
    return larder_fail(e, LARDER_EUNSUPPORTED,
                       "architecture %.*s is not supported; llama, mistral, qwen2, qwen3 and phi3 "
                       "are",
                       (int)(len < 40 ? len : 40), name);
}

int model_set_name(struct model *m, const char *name, size_t len, struct larder_err *e)
{
    len = len < MAX_NAME ? len : MAX_NAME;
    m->name = mem_zalloc(len + 1, 1);
    if (!m->name)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    memcpy(m->name, name, len);
    m->p.name = m->name;
    return 0;
}

int model_check_params(const struct model_params *p, struct larder_err *e)
{
    int rc = kv_geom_check(&p->geom, e);

    if (rc)
        return rc;
    if (!p->rope_dims || p->rope_dims % 2 || p->rope_dims > p->geom.head_dim)
        return larder_fail(e, LARDER_EMODEL, "%u rotated elements of a head of %u", p->rope_dims,
                           p->geom.head_dim);
    if (!(isfinite(p->rope_theta) && p->rope_theta > 0))
        return larder_fail(e, LARDER_EMODEL, "the base of RoPE is not a positive number");
    if (!(isfinite(p->norm_eps) && p->norm_eps > 0))
        return larder_fail(e, LARDER_EMODEL, "the epsilon of the norms is not a positive number");
    return 0;
}

int model_alloc_rope(struct model *m, struct larder_err *e)
{
    struct model_params *p = &m->p;

    m->freq = mem_alloc(p->rope_dims, sizeof *m->freq);
    if (!m->freq)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    rope_plain(p->rope_theta, p->rope_dims, m->freq);
    rope_plain(p->rope_theta, p->rope_dims, m->freq + p->rope_dims / 2);
    p->rope = (struct rope){m->freq, 1};
    p->rope_long = (struct rope){m->freq + p->rope_dims / 2, 1};
    p->rope_stretch = 1;
    return 0;
}

/* Divide a table by factors [n], finite and positive. */
static int divide_rope(double *freq, const double *factor, uint32_t n, struct larder_err *e)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!(isfinite(factor[i]) && factor[i] > 0))
            return larder_fail(e, LARDER_EMODEL, "factor %u of RoPE is not a positive number", i);
        freq[i] /= factor[i];
    }
    return 0;
}

int model_set_factors(struct model *m, const double *factor, struct larder_err *e)
{
    uint32_t half = m->p.rope_dims / 2;
    int rc = divide_rope(m->freq, factor, half, e);

    if (rc)
        return rc;
    m->p.rope_scaling = ROPE_FACTORS;
    m->p.rope_stretch = factor[half - 1];
    return 0;
}

int model_set_longrope(struct model *m, const double *short_factor, const double *long_factor,
                       uint32_t n_original, double factor, struct larder_err *e)
{
    struct model_params *p = &m->p;
    uint32_t half = p->rope_dims / 2;
    int rc = divide_rope(m->freq, short_factor, half, e);

    if (!rc)
        rc = divide_rope(m->freq + half, long_factor, half, e);
    if (rc)
        return rc;
    if (n_original < 2 || n_original > KV_MAX_CTX)
        return larder_fail(e, LARDER_EMODEL, "longrope was trained on %u positions", n_original);
    if (!factor)
        factor = rope_longrope_factor(p->n_positions, n_original);
    if (!(isfinite(factor) && factor > 0))
        return larder_fail(e, LARDER_EMODEL, "the attention factor is not a positive number");
    p->n_rope_short = n_original;
    p->rope_scaling = ROPE_LONGROPE;
    p->rope_stretch = (double)p->n_positions / n_original;
    p->rope.factor = p->rope_long.factor = factor;
    return 0;
}

int model_set_sliding(struct model *m, uint32_t positions, uint32_t first, struct larder_err *e)
{
    struct model_params *p = &m->p;

    if (!positions || positions >= p->n_positions || first >= p->geom.n_layers)
        return 0;
    m->sliding = mem_zalloc(p->geom.n_layers, sizeof *m->sliding);
    if (!m->sliding)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    for (uint32_t l = first; l < p->geom.n_layers; l++)
        m->sliding[l] = positions;
    p->sliding = m->sliding;
    return 0;
}
