/* Packing of kept rows by backend `cuda`, on a device that is host memory (tests/cuda) or a GPU:
 * the bytes of base/packed.c and the verdict of pack.c, for rows of every kind. */
#include "testlib.h"

#include <math.h>

#include "cuda_fixture.h"
#include "engine.h"
#include "packed.h"
#include "select_ops.h"

enum { HEADS = 3, MOST = 4200, /* rows of all heads */ WIDEST = 128 };

enum kind { RANDOM, CONSTANT, ZEROS, TINY, LARGE, HUGE_ONES, INFINITE, NOT_A_NUMBER, KINDS };

static float element(enum kind kind, uint32_t at, uint64_t *seed)
{
    float x = test_randf(seed);

    switch (kind) {
    case CONSTANT:
        return 0.37f;
    case ZEROS:
        return x < 0 ? -0.0f : 0.0f;
    case TINY:
        return x * 1e-7f; /* steps below the smallest f16 */
    case LARGE:
        return x * 60000;
    case HUGE_ONES: /* no f16 step reaches these; an exact row holds them */
        return at % 997 == 500 ? 1e30f : x;
    case INFINITE:
        return at % 997 == 500 ? -INFINITY : x;
    case NOT_A_NUMBER:
        return at % 997 == 500 ? NAN : x;
    default:
        return x * 3 + .5f;
    }
}

/* Rows of all heads with their positions left out, as elements of T and as what these hold. */
struct rows {
    uint32_t n[HEADS], d;
    enum kv_dtype elem;
    float x[MOST * WIDEST];
    uint8_t *there; /* of the backend */
};

static void make_rows(struct backend *b, struct rows *r, enum kind kind, uint64_t seed)
{
    uint64_t n = 0, row = r->d * kv_dtype_bytes(r->elem);

    for (int g = 0; g < HEADS; g++)
        n += r->n[g];
    r->there = backend_buffer_new(b, n + 1, row);
    assert_int_equal(backend_view(b, r->there, VIEW_WRITE, NULL), 0);
    for (uint32_t i = 0; i < n * r->d; i++) {
        uint16_t narrow;

        r->x[i] = element(kind, i, &seed);
        narrow = f32_to_bf16(r->x[i]);
        if (r->elem == KV_BF16)
            r->x[i] = bf16_to_f32(narrow);
        if (r->elem == KV_BF16)
            memcpy(r->there + 2 * i, &narrow, 2);
        else
            memcpy(r->there + 4 * i, &r->x[i], 4);
    }
}

static bool finite_rows(const float *x, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return false;
    return true;
}

/* What pack.c says of a head. */
static bool host_packs(enum kv_dtype t, const float *k, const float *v, uint32_t n, uint32_t d,
                       uint8_t *tile)
{
    uint8_t *v_tile = tile + tile_bytes_k(t, n, d);

    packed_from_k(t, k, n, d, tile);
    packed_from_v(t, v, n, d, v_tile);
    return finite_rows(k, (uint64_t)n * d) && finite_rows(v, (uint64_t)n * d) &&
           packed_finite_k(t, tile, n, d) && packed_finite_v(t, v_tile, n, d);
}

static struct rows k, v;

static void check(enum kv_dtype t, enum kv_dtype elem, const uint32_t *counts, uint32_t d,
                  enum kind kind)
{
    static uint8_t want[MOST * WIDEST * 4];
    struct kept_rows heads[HEADS] = {{0}};
    struct pack_rows x = {.to = t, .heads = heads};
    uint64_t at = 0, bytes = 0, row = d * kv_dtype_bytes(elem);
    struct model m = fake_model();
    bool good[HEADS];
    struct backend *b;

    m.p.geom = (struct kv_geom){1, HEADS, HEADS, d};
    m.p.rope_dims = 2;
    fresh_device();
    b = open_cuda(&m, elem);
    for (int g = 0; g < HEADS; g++)
        k.n[g] = v.n[g] = counts[g];
    k.d = v.d = d;
    k.elem = v.elem = elem;
    make_rows(b, &k, kind, 5 + d);
    make_rows(b, &v, kind, 6 + d);
    for (int g = 0; g < HEADS; g++) {
        heads[g] =
            (struct kept_rows){counts[g], NULL, k.there + at * row, v.there + at * row, NULL, elem};
        good[g] = host_packs(t, k.x + at * d, v.x + at * d, counts[g], d, want + bytes);
        bytes += tile_bytes_k(t, counts[g], d) + tile_bytes_v(t, counts[g], d);
        at += counts[g];
    }
    x.tiles = backend_staging_new(b, bytes + 1, 1);
    x.bad = backend_staging_new(b, HEADS, sizeof *x.bad);
    assert_int_equal(cuda_select.pack(b, &x, NULL), 0);
    assert_int_equal(backend_view(b, x.tiles, VIEW_READ, NULL), 0);
    assert_int_equal(backend_view(b, x.bad, VIEW_READ, NULL), 0);
    for (int g = 0; g < HEADS; g++)
        if (good[g] != !x.bad[g])
            fail_msg("%s of %s, %u rows of %u, kind %d: packed %d, not %d", kv_dtype_name(t),
                     kv_dtype_name(elem), counts[g], d, kind, !x.bad[g], good[g]);
    for (uint64_t i = 0; i < bytes && kind < INFINITE; i++)
        if (x.tiles[i] != want[i])
            fail_msg("%s of %s, %u %u %u rows of %u, kind %d: byte %u is %u, not %u",
                     kv_dtype_name(t), kv_dtype_name(elem), counts[0], counts[1], counts[2], d,
                     kind, (uint32_t)i, x.tiles[i], want[i]);
    backend_buffer_free(b, x.tiles);
    backend_buffer_free(b, x.bad);
    backend_buffer_free(b, k.there);
    backend_buffer_free(b, v.there);
    close_clean(b);
}

static const uint32_t rows_of_heads[][HEADS] = {
    {0, 0, 0}, {0, 1, 3}, {4, 5, 31}, {33, 0, 37}, {300, 7, 129}};
static const uint32_t dims[] = {2, 34, 64, 80, 96, 128};

static void tiles_are_the_hosts(void **state)
{
    (void)state;
    for (int i = 0; i < 5 * 6 * 4; i++)
        check(i % 2 ? KV_INT8 : KV_INT4, i / 2 % 2 ? KV_BF16 : KV_F32, rows_of_heads[i / 24],
              dims[i / 4 % 6], RANDOM);
}

static void long_heads_are_packed_by_many_blocks(void **state)
{
    const uint32_t counts[] = {1, 4097, 33};

    (void)state;
    check(KV_INT8, KV_BF16, counts, 64, RANDOM);
    check(KV_INT4, KV_F32, counts, 80, RANDOM);
}

static void so_are_tiles_of_odd_rows_and_verdicts(void **state)
{
    const uint32_t counts[] = {3, 40, 5};

    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int i = 0; i < 4; i++)
            check(i % 2 ? KV_INT8 : KV_INT4, i / 2 ? KV_BF16 : KV_F32, counts, 64, kind);
}

/* Keys as a decoder will read them. */
static void keys_are_read_back_as_by_the_host(void **state)
{
    const enum kv_dtype types[] = {KV_BF16, KV_INT8, KV_INT4};
    const uint32_t counts[HEADS] = {5, 0, 70};
    static float want[75 * 80], got[75 * 80];
    static uint8_t tile[75 * 80 * 4];

    (void)state;
    for (int i = 0; i < 6; i++) {
        enum kv_dtype t = types[i / 2], elem = i % 2 ? KV_BF16 : KV_F32;
        uint64_t row = 80 * kv_dtype_bytes(elem);
        const void *at[HEADS] = {NULL};
        struct model m = fake_model();
        struct backend *b;
        uint8_t *there;
        float *to;

        m.p.geom = (struct kv_geom){1, HEADS, HEADS, 80};
        fresh_device();
        b = open_cuda(&m, elem);
        memcpy(k.n, counts, sizeof counts);
        k.d = 80;
        k.elem = elem;
        make_rows(b, &k, RANDOM, 3);
        assert_int_equal(cuda_twin_need(cuda_of(b), k.there, &there, NULL), 0);
        at[0] = there;
        at[2] = there + 5 * row;
        to = backend_buffer_new(b, 75 * 80, sizeof *to);
        assert_int_equal(cuda_target(cuda_of(b), to, ROOM_TO_K, sizeof got, &there, NULL), 0);
        assert_int_equal(
            cuda_keys_read_back(cuda_of(b), t, at, counts, (float *)(void *)there, NULL), 0);
        assert_int_equal(backend_view(b, to, VIEW_READ, NULL), 0);
        for (int j = 0; j < 75 * 80 && t == KV_BF16; j++)
            want[j] = bf16_to_f32(f32_to_bf16(k.x[j]));
        if (t != KV_BF16) {
            packed_from_k(t, k.x, 5, 80, tile);
            packed_expand_k_f32(t, tile, 5, 80, want);
            packed_from_k(t, k.x + 5 * 80, 70, 80, tile);
            packed_expand_k_f32(t, tile, 70, 80, want + 5 * 80);
        }
        for (int j = 0; j < 75 * 80; j++)
            assert_true(fabsf(want[j] - to[j]) <= 1e-6f * fabsf(want[j]));
        backend_buffer_free(b, to);
        backend_buffer_free(b, k.there);
        close_clean(b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tiles_are_the_hosts),
        cmocka_unit_test(long_heads_are_packed_by_many_blocks),
        cmocka_unit_test(so_are_tiles_of_odd_rows_and_verdicts),
        cmocka_unit_test(keys_are_read_back_as_by_the_host),
    };

    skip_without_gpu();
    return cmocka_run_group_tests_name("cuda/pack", tests, NULL, NULL);
}
