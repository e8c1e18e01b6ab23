/* pack.c - kept rows become tiles.
 *
 * Rows are looked at before they are packed, since a NaN has no code, and scales after,
 * since f16 ends at 65,504: what leaves here can be multiplied. */
#include "pack.h"

#include "half.h"
#include "mem.h"
#include "packed.h"
#include "select_ops.h"

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

static int no_memory(struct larder_err *e)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory to pack a layer's rows");
}

static int grow_tiles(struct packer *p, uint64_t bytes, struct larder_err *e)
{
    if (bytes <= p->tile_cap)
        return 0;
    if (p->b)
        backend_buffer_free(p->b, p->tiles);
    else
        mem_free(p->tiles);
    p->tiles = p->b ? backend_staging_new(p->b, bytes, 1) : mem_alloc(bytes, 1);
    p->tile_cap = p->tiles ? bytes : 0;
    return p->tiles ? 0 : no_memory(e);
}

static int grow_rows(struct packer *p, uint64_t n_elements, struct larder_err *e)
{
    if (n_elements <= p->row_cap)
        return 0;
    mem_free(p->rows);
    p->rows = mem_alloc(n_elements, sizeof *p->rows);
    p->row_cap = p->rows ? n_elements : 0;
    return p->rows ? 0 : no_memory(e);
}

static int refuse(enum kv_dtype t, struct larder_err *e)
{
    return larder_fail(e, LARDER_ENUMERIC,
                       "a key or value is not finite, or too large for %s codes; nothing was kept",
                       kv_dtype_name(t));
}

static int pack_head(const struct packer *p, uint32_t d, enum kv_dtype t, const struct kept_rows *h,
                     uint8_t *tile, struct larder_err *e)
{
    uint64_t n = (uint64_t)h->n_rows * d;
    uint8_t *v_tile = tile + tile_bytes_k(t, h->n_rows, d);
    const float *x = widened(h->k, h->dtype, n, p->rows);
    bool good = all_finite(x, n);

    packed_from_k(t, x, h->n_rows, d, tile);
    x = widened(h->v, h->dtype, n, p->rows);
    good = good && all_finite(x, n);
    packed_from_v(t, x, h->n_rows, d, v_tile);
    good =
        good && packed_finite_k(t, tile, h->n_rows, d) && packed_finite_v(t, v_tile, h->n_rows, d);
    return good ? 0 : refuse(t, e);
}

static uint64_t tile_bytes(enum kv_dtype t, const struct kept_rows *h, uint32_t d)
{
    return tile_bytes_k(t, h->n_rows, d) + tile_bytes_v(t, h->n_rows, d);
}

static int pack_here(struct packer *p, const struct kv_geom *g, enum kv_dtype t,
                     const struct kept_rows *heads, struct larder_err *e)
{
    uint8_t *tile = p->tiles;
    uint64_t most = 0;
    int rc;

    for (uint32_t i = 0; i < g->n_kv_heads; i++)
        most = heads[i].n_rows > most ? heads[i].n_rows : most;
    rc = grow_rows(p, most * g->head_dim, e);
    for (uint32_t i = 0; i < g->n_kv_heads && !rc; i++) {
        rc = pack_head(p, g->head_dim, t, &heads[i], tile, e);
        tile += tile_bytes(t, &heads[i], g->head_dim);
    }
    return rc;
}

static int pack_there(struct packer *p, const struct kv_geom *g, enum kv_dtype t,
                      const struct kept_rows *heads, struct larder_err *e)
{
    struct pack_rows x = {.to = t, .heads = heads, .tiles = p->tiles};

    if (!p->bad)
        p->bad = backend_staging_new(p->b, g->n_kv_heads, sizeof *p->bad);
    if (!p->bad)
        return no_memory(e);
    x.bad = p->bad;
    p->to = t;
    return p->b->ops->select->pack(p->b, &x, e);
}

int packer_layer(struct packer *p, const struct kv_geom *g, enum kv_dtype t,
                 struct kept_rows *heads, struct larder_err *e)
{
    uint64_t bytes = 0;
    uint8_t *tile;
    int rc;

    if (!packed_type(t))
        return 0;
    for (uint32_t i = 0; i < g->n_kv_heads; i++)
        bytes += tile_bytes(t, &heads[i], g->head_dim);
    rc = grow_tiles(p, bytes, e);
    if (!rc)
        rc = p->b ? pack_there(p, g, t, heads, e) : pack_here(p, g, t, heads, e);
    tile = p->tiles;
    for (uint32_t i = 0; i < g->n_kv_heads && !rc; i++) {
        struct kept_rows *h = &heads[i];
        uint64_t whole = tile_bytes(t, h, g->head_dim);

        h->k = tile;
        h->v = tile + tile_bytes_k(t, h->n_rows, g->head_dim);
        h->dtype = t;
        tile += whole;
    }
    return rc;
}

int packer_wait(const struct packer *p, uint32_t n_kv_heads, struct larder_err *e)
{
    int rc = 0;

    if (!p->b || !packed_type(p->to))
        return 0;
    rc = backend_view(p->b, p->tiles, VIEW_READ, e);
    if (!rc)
        rc = backend_view(p->b, p->bad, VIEW_READ, e);
    for (uint32_t i = 0; i < n_kv_heads && !rc; i++)
        if (p->bad[i])
            rc = refuse(p->to, e);
    return rc;
}

void packer_done(struct packer *p)
{
    if (p->b) {
        backend_buffer_free(p->b, p->tiles);
        backend_buffer_free(p->b, p->bad);
    } else {
        mem_free(p->tiles);
    }
    mem_free(p->rows);
    *p = (struct packer){0};
}
