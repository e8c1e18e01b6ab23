/* pack.c - kept rows become tiles.
 *
 * Rows are looked at before they are packed, since a NaN has no code, and scales after,
 * since f16 ends at 65,504: what leaves here can be multiplied. */
#include "pack.h"

#include "half.h"
#include "mem.h"
#include "packed.h"

static bool all_finite(const float *x, uint64_t n)
{
    uint32_t bad = 0;

    for (uint64_t i = 0; i < n; i++)
        bad |= (f32_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}

/* Elements of rows of any plain type as f32: in place, or through buf. */
static const float *widened(const void *x, enum kv_dtype t, uint64_t n, float *buf)
{
    if (t == KV_F32)
        return x;
    for (uint64_t i = 0; i < n; i++)
        buf[i] = bf16_to_f32(((const uint16_t *)x)[i]);
    return buf;
}

static int grow(struct packer *p, uint64_t tile_bytes, uint64_t n_elements, struct larder_err *e)
{
    if (tile_bytes > p->tile_cap) {
        mem_free(p->tiles);
        p->tiles = mem_alloc(tile_bytes, 1);
        p->tile_cap = p->tiles ? tile_bytes : 0;
    }
    if (n_elements > p->row_cap) {
        mem_free(p->rows);
        p->rows = mem_alloc(n_elements, sizeof *p->rows);
        p->row_cap = p->rows ? n_elements : 0;
    }
    if (tile_bytes > p->tile_cap || n_elements > p->row_cap)
        return larder_fail(e, LARDER_ENOMEM, "no memory to pack a layer's rows");
    return 0;
}

static int pack_head(const struct packer *p, uint32_t d, enum kv_dtype t, uint8_t *tile,
                     struct kept_rows *h, struct larder_err *e)
{
    uint64_t n = (uint64_t)h->n_rows * d;
    uint8_t *v_tile = tile + tile_bytes_k(t, h->n_rows, d);
    const float *x = widened(h->k, h->dtype, n, p->rows);
    bool good = all_finite(x, n);

    packed_from_k(t, x, h->n_rows, d, tile);
    x = widened(h->v, h->dtype, n, p->rows);
    good = good && all_finite(x, n);
    packed_from_v(t, x, h->n_rows, d, v_tile);
    if (!good || !packed_finite_k(t, tile, h->n_rows, d) ||
        !packed_finite_v(t, v_tile, h->n_rows, d))
        return larder_fail(e, LARDER_ENUMERIC,
                           "a key or value is not finite, or too large for %s codes; nothing was "
                           "kept",
                           kv_dtype_name(t));
    h->k = tile;
    h->v = v_tile;
    h->dtype = t;
    return 0;
}

int packer_layer(struct packer *p, const struct kv_geom *g, enum kv_dtype t,
                 struct kept_rows *heads, struct larder_err *e)
{
    uint64_t bytes = 0, most = 0;
    uint8_t *tile;
    int rc;

    if (!packed_type(t))
        return 0;
    for (uint32_t i = 0; i < g->n_kv_heads; i++) {
        uint32_t n = heads[i].n_rows;

        bytes += tile_bytes_k(t, n, g->head_dim) + tile_bytes_v(t, n, g->head_dim);
        most = n > most ? n : most;
    }
    rc = grow(p, bytes, most * g->head_dim, e);
    tile = p->tiles;
    for (uint32_t i = 0; i < g->n_kv_heads && !rc; i++) {
        uint32_t n = heads[i].n_rows;

        if (heads[i].dtype != t)
            rc = pack_head(p, g->head_dim, t, tile, &heads[i], e);
        tile += tile_bytes_k(t, n, g->head_dim) + tile_bytes_v(t, n, g->head_dim);
    }
    return rc;
}

void packer_done(struct packer *p)
{
    mem_free(p->tiles);
    mem_free(p->rows);
    *p = (struct packer){0};
}
