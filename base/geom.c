/* geom.c - checks on the shape of a KV cache. */
#include "geom.h"

#include <stddef.h>

int kv_geom_check(const struct kv_geom *g, struct larder_err *e)
{
    if (!g->n_layers || g->n_layers > KV_MAX_LAYERS)
        return larder_fail(e, LARDER_EINVAL, "%u layers; must be 1 to %u", g->n_layers,
                           KV_MAX_LAYERS);
    if (!g->n_heads || g->n_heads > KV_MAX_HEADS)
        return larder_fail(e, LARDER_EINVAL, "%u query heads; must be 1 to %u", g->n_heads,
                           KV_MAX_HEADS);
    if (!g->n_kv_heads || g->n_heads % g->n_kv_heads)
        return larder_fail(e, LARDER_EINVAL, "%u KV heads do not divide %u query heads",
                           g->n_kv_heads, g->n_heads);
    if (!g->head_dim || g->head_dim % 2 || g->head_dim > KV_MAX_HEAD_DIM)
        return larder_fail(e, LARDER_EINVAL, "head_dim %u; must be even and at most %u",
                           g->head_dim, KV_MAX_HEAD_DIM);
    return 0;
}

uint32_t kv_dtype_bytes(enum kv_dtype t)
{
    switch (t) {
    case KV_BF16:
    case KV_F16:
        return 2;
    case KV_F32:
        return 4;
    default:
        return 0;
    }
}

const char *kv_dtype_name(enum kv_dtype t)
{
    switch (t) {
    case KV_BF16:
        return "bf16";
    case KV_F16:
        return "f16";
    case KV_F32:
        return "f32";
    case KV_INT8:
        return "int8";
    case KV_INT4:
        return "int4";
    }
    return NULL;
}
