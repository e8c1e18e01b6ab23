/* layer_file.c - checking a layer's rows before they are stored.
 *
 * Sizes follow from the counts, so that a file has one right length. Codes of packed rows
 * need no look: any code is a number, exact rows and scales decide. */
#include "layer_file.h"

#include <math.h>

#include "half.h"
#include "packed.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "rows are taken from the wire as they are");

/* K and V of n rows, up to a multiple of 4 bytes. */
static uint64_t tiles_bytes(enum kv_dtype t, uint32_t n, uint32_t d)
{
    return (tile_bytes_k(t, n, d) + tile_bytes_v(t, n, d) + 3) / 4 * 4;
}

uint64_t layer_file_bytes(const struct kv_geom *g, struct layer_form form, const uint32_t *rows)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < g->n_kv_heads; i++)
        sum += tiles_bytes(form.precision, rows[i], g->head_dim) +
               (form.has_bias ? 8ull : 4ull) * rows[i];
    return sum;
}

static bool all_finite(const uint16_t *v, uint64_t n)
{
    uint32_t bad = 0;

    for (uint64_t i = 0; i < n; i++)
        bad |= (v[i] & 0x7f80) == 0x7f80;
    return !bad;
}

/* A bias near the end of f32 would become infinite in bf16. */
static bool bias_finite(const struct store_rows *h)
{
    for (uint32_t i = 0; h->bias && i < h->n_rows; i++)
        if (!isfinite(bf16_to_f32(f32_to_bf16(h->bias[i]))))
            return false;
    return true;
}

static bool rows_finite(const struct store_rows *h, enum kv_dtype t, uint32_t d)
{
    if (packed_type(t))
        return packed_finite_k(t, h->k, h->n_rows, d) && packed_finite_v(t, h->v, h->n_rows, d);
    return all_finite(h->k, (uint64_t)h->n_rows * d) && all_finite(h->v, (uint64_t)h->n_rows * d);
}

bool layer_rows_finite(const struct store_rows *h, struct layer_form form, uint32_t head_dim)
{
    return bias_finite(h) && rows_finite(h, form.precision, head_dim);
}

static int check_head(const struct store_rows *h, enum kv_dtype t, uint32_t d, uint32_t n_ctx,
                      struct larder_err *e)
{
    for (uint32_t i = 0; i < h->n_rows; i++)
        if (h->position[i] >= n_ctx || (i && h->position[i] <= h->position[i - 1]))
            return larder_fail(e, LARDER_EWORKER,
                               "the worker sent rows whose positions are not ascending");
    if (!bias_finite(h))
        return larder_fail(e, LARDER_ENUMERIC, "the worker sent a bias that is not finite");
    if (!rows_finite(h, t, d))
        return larder_fail(e, LARDER_ENUMERIC,
                           "the prefill produced values that are not finite; nothing was stored");
    return 0;
}

/* The pieces of one head; returns where the next one begins. */
static const uint8_t *take_head(const uint8_t *at, enum kv_dtype t, bool has_bias, uint32_t n,
                                uint32_t d, struct store_rows *ret)
{
    const uint8_t *k = at + 4ull * n, *end = k + tiles_bytes(t, n, d);

    *ret = (struct store_rows){.n_rows = n,
                               .position = (const uint32_t *)(const void *)at,
                               .k = k,
                               .v = k + tile_bytes_k(t, n, d),
                               .bias = has_bias ? (const float *)(const void *)end : NULL};
    return has_bias ? end + 4ull * n : end;
}

int layer_file_read(const void *file, uint64_t n_bytes, const struct kv_geom *g,
                    struct layer_form form, const uint32_t *rows, uint32_t n_ctx,
                    struct store_rows *heads, struct larder_err *e)
{
    const uint8_t *at = file;
    int rc = 0;

    if (n_bytes != layer_file_bytes(g, form, rows))
        return larder_fail(e, LARDER_EWORKER, "the worker sent a layer of %llu bytes, not %llu",
                           (unsigned long long)n_bytes,
                           (unsigned long long)layer_file_bytes(g, form, rows));
    for (uint32_t i = 0; !rc && i < g->n_kv_heads; i++) {
        at = take_head(at, form.precision, form.has_bias, rows[i], g->head_dim, &heads[i]);
        rc = check_head(&heads[i], form.precision, g->head_dim, n_ctx, e);
    }
    return rc;
}
