/* cuda_pack.c - kept rows become tiles on the device.
 *
 * The one idea: one table says where the rows and the tiles of each KV head are, so that heads of
 * any lengths are packed by the same three launches. */
#include "cuda_pack.h"

#include "cuda.h"
#include "engine.h"
#include "packed.h"
#include "select_ops.h"

struct work {
    struct cuda_backend *b;
    struct cuda_pack_head head[KV_MAX_HEADS];
    struct cuda_pack_args a;
    enum kv_dtype to;
    uint64_t tile_bytes;
};

static void start(struct work *w, struct cuda_backend *b, enum kv_dtype to)
{
    *w = (struct work){.b = b, .to = to};
    w->a = (struct cuda_pack_args){.n_heads = b->base.p->geom.n_kv_heads,
                                   .d = b->base.p->geom.head_dim,
                                   .per_block = to == KV_INT4 ? PACKED_GROUP : CUDA_PACK_ROWS,
                                   .four = to == KV_INT4};
}

/* The next head's tile of keys, and of values if it has any, behind those before it. */
static void add_head(struct work *w, uint32_t g, uint32_t n, const void *k, const void *v)
{
    struct packed_parts pk = packed_parts_k(w->to, n, w->a.d),
                        pv = packed_parts_v(w->to, n, w->a.d);
    struct cuda_pack_head *h = &w->head[g];

    h->k = k;
    h->v = v;
    h->to = (struct cuda_past){.n_rows = n, .dtype = w->to, .n_exact = pk.n_exact};
    h->to.k = (struct cuda_tile){NULL, pk.scales, pk.codes};
    h->to.v = (struct cuda_tile){NULL, pv.scales, pv.codes};
    w->tile_bytes += pk.end + (v ? pv.end : 0);
    w->a.most = n > w->a.most ? n : w->a.most;
}

/* Where the tiles are, now that there is memory for all of them. */
static void place(struct work *w, const uint8_t *tiles)
{
    for (uint32_t g = 0; g < w->a.n_heads; g++) {
        struct cuda_pack_head *h = &w->head[g];

        h->to.k.at = tiles;
        tiles += tile_bytes_k(w->to, h->to.n_rows, w->a.d);
        h->to.v.at = h->v ? tiles : NULL;
        tiles += h->v ? tile_bytes_v(w->to, h->to.n_rows, w->a.d) : 0;
    }
}

static int send_table(struct work *w, struct larder_err *e)
{
    uint64_t bytes = w->a.n_heads * sizeof *w->head;
    void *table = NULL;
    int rc = cuda_room(w->b, ROOM_PACK_TABLE, bytes, &table, e);

    w->a.head = table;
    return rc ? rc : cuda_up(w->b, table, w->head, bytes, e);
}

static int rooms(struct work *w, struct larder_err *e)
{
    uint64_t n;
    void *lo = NULL;
    int rc;

    w->a.n_blocks = cuda_blocks(w->a.most, w->a.per_block);
    n = (uint64_t)w->a.n_heads * w->a.n_blocks * w->a.d;
    rc = cuda_room(w->b, ROOM_PACK_RANGES, 2 * n * sizeof *w->a.lo, &lo, e);
    w->a.lo = lo;
    w->a.hi = w->a.lo + n;
    return rc;
}

static int launch(struct work *w, enum cuda_kernel k, bool bf16, uint32_t n, struct larder_err *e)
{
    struct cuda_launch l = cuda_grid_rows(k, bf16, n, &w->a);

    l.grid[1] = w->a.n_heads;
    return cuda_run(w->b, l, e);
}

static int pack_keys(struct work *w, bool bf16, struct larder_err *e)
{
    int rc = rooms(w, e);

    if (!rc)
        rc = launch(w, CUDA_PACK_RANGES, bf16, w->a.n_blocks, e);
    return rc ? rc : launch(w, CUDA_PACK_KEYS, bf16, w->a.n_blocks, e);
}

static int pack_values(struct work *w, bool bf16, struct larder_err *e)
{
    uint32_t per_row = w->a.four ? cuda_blocks(w->a.d, PACKED_GROUP) : 1;

    return launch(w, CUDA_PACK_VALUES, bf16, cuda_blocks(w->a.most * per_row, CUDA_ROW_BLOCK), e);
}

/* ---- the calls */

static int add_kept(struct work *w, uint32_t g, const struct kept_rows *h, struct larder_err *e)
{
    uint8_t *k = NULL, *v = NULL;
    int rc = h->n_rows ? cuda_twin_need(w->b, h->k, &k, e) : 0;

    if (!rc && h->n_rows)
        rc = cuda_twin_need(w->b, h->v, &v, e);
    if (!rc)
        add_head(w, g, h->n_rows, k, v);
    return rc;
}

int cuda_pack(struct backend *base, const struct pack_rows *x, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    bool bf16 = x->heads->dtype == KV_BF16;
    uint64_t said = base->p->geom.n_kv_heads * sizeof *x->bad;
    uint8_t *tiles = NULL, *bad = NULL;
    struct work w;
    int rc = 0;

    start(&w, b, x->to);
    for (uint32_t g = 0; g < w.a.n_heads && !rc; g++)
        rc = add_kept(&w, g, &x->heads[g], e);
    if (!rc)
        rc = cuda_target(b, x->tiles, ROOM_TILES, w.tile_bytes, &tiles, e);
    if (!rc)
        rc = cuda_target(b, x->bad, ROOM_BAD, said, &bad, e);
    if (rc)
        return rc;
    place(&w, tiles);
    w.a.bad = (uint32_t *)(void *)bad;
    rc = cuda_check(b, b->d->zero(b->device, bad, said, CUDA_COMPUTE), "clearing", e);
    if (!rc)
        rc = send_table(&w, e);
    if (!rc)
        rc = pack_keys(&w, bf16, e);
    if (!rc)
        rc = pack_values(&w, bf16, e);
    if (!rc)
        rc = cuda_deliver(b, x->tiles, tiles, w.tile_bytes, e);
    return rc ? rc : cuda_deliver(b, x->bad, bad, said, e);
}

/* Tiles to a room; what cannot be packed is found when it is packed to be stored. */
static int pack_to_room(struct work *w, struct larder_err *e)
{
    void *tiles = NULL, *bad = NULL;
    int rc = cuda_room(w->b, ROOM_TILES, w->tile_bytes, &tiles, e);

    if (!rc)
        rc = cuda_room(w->b, ROOM_BAD, w->a.n_heads * sizeof *w->a.bad, &bad, e);
    if (rc)
        return rc;
    place(w, tiles);
    w->a.bad = bad;
    rc = send_table(w, e);
    return rc ? rc : pack_keys(w, w->b->bf16, e);
}

int cuda_keys_read_back(struct cuda_backend *b, enum kv_dtype to, const void *const *keys,
                        const uint32_t *count, float *ret, struct larder_err *e)
{
    struct work w;
    uint64_t at = 0;
    int rc;

    start(&w, b, to);
    for (uint32_t g = 0; g < w.a.n_heads; g++) {
        add_head(&w, g, count[g], keys[g], NULL);
        w.head[g].first = at;
        at += count[g];
    }
    w.a.wide = ret;
    w.a.round = to == KV_BF16;
    if (packed_type(to)) {
        rc = pack_to_room(&w, e);
    } else {
        for (uint32_t g = 0; g < w.a.n_heads; g++)
            w.head[g].to =
                (struct cuda_past){.k.at = keys[g], .n_rows = count[g], .dtype = b->base.elem};
        rc = send_table(&w, e);
    }
    return rc ? rc
              : launch(&w, CUDA_UNPACK, false, cuda_blocks(w.a.most * w.a.d, CUDA_ROW_BLOCK), e);
}
