/* Rows that become tiles on their way out of the engine, and attention on tiles. */
#include "testlib.h"

#include <math.h>

#include "cpu.h"
#include "half.h"
#include "pack.h"
#include "packed.h"

static float *random_floats(uint64_t n, float size, uint64_t seed)
{
    float *x = malloc(n * sizeof *x + 1);

    assert_non_null(x);
    for (uint64_t i = 0; i < n; i++)
        x[i] = size * test_randf(&seed);
    return x;
}

/* One KV head in tiles, and the f32 rows that they stand for. */
struct packed_head {
    uint32_t n, d;
    struct past_rows past;
    uint8_t *k_tile, *v_tile;
    float *k, *v;
};

static struct packed_head make_head(enum kv_dtype t, uint32_t n, uint32_t d)
{
    struct packed_head h = {.n = n, .d = d};
    uint64_t size = (uint64_t)n * d;

    h.k = random_floats(size, 3, 1 + n);
    h.v = random_floats(size, 1, 2 + n);
    h.k_tile = malloc(tile_bytes_k(t, n, d) + 1);
    h.v_tile = malloc(tile_bytes_v(t, n, d) + 1);
    packed_from_k(t, h.k, n, d, h.k_tile);
    packed_from_v(t, h.v, n, d, h.v_tile);
    packed_expand_k_f32(t, h.k_tile, n, d, h.k);
    packed_expand_v_f32(t, h.v_tile, n, d, h.v);
    h.past = (struct past_rows){n, t, h.k_tile, h.v_tile, NULL, NULL};
    return h;
}

static void drop_head(struct packed_head *h)
{
    free(h->k);
    free(h->v);
    free(h->k_tile);
    free(h->v_tile);
}

/* Rows from..from + n - 1 after the exact ones, bit for bit. */
static void check_block(const struct packed_head *h, uint32_t from, uint32_t n)
{
    uint32_t d = h->d, pad = mul_padded(d), first;
    struct packed_rows k = {h->past.dtype, h->k_tile, packed_parts_k(h->past.dtype, h->n, d), d};
    struct packed_rows v = {h->past.dtype, h->v_tile, packed_parts_v(h->past.dtype, h->n, d), d};
    float *panel = random_floats((uint64_t)mul_padded(n) * d, 1, 3);
    float *rows = random_floats((uint64_t)n * pad, 1, 4);

    first = k.parts.n_exact + from;
    cpu_packed_keys(&k, from, n, panel);
    cpu_packed_values(&v, from, n, rows);
    for (uint32_t c = 0; c < d; c++) {
        for (uint32_t j = 0; j < n; j++) {
            uint64_t at = (uint64_t)(first + j) * d + c;

            assert_memory_equal(&panel[(j / MUL_WIDE * d + c) * MUL_WIDE + j % MUL_WIDE], &h->k[at],
                                sizeof *panel);
            assert_memory_equal(&rows[(uint64_t)j * pad + c], &h->v[at], sizeof *rows);
        }
    }
    free(panel);
    free(rows);
}

static void blocks_of_tiles_are_what_expanding_gives(void **state)
{
    static const uint32_t dims[] = {2, 6, 32, 64, 66, 80, 96, 128},
                          counts[] = {5, 12, 35, 36, 37, 69, 200};

    (void)state;
    for (int t = KV_INT8; t <= KV_INT4; t++)
        for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
            for (size_t j = 0; j < sizeof counts / sizeof *counts; j++) {
                struct packed_head h = make_head((enum kv_dtype)t, counts[j], dims[i]);
                uint32_t n = counts[j] - PACKED_EXACT_ROWS;

                check_block(&h, 0, n);
                for (uint32_t from = PACKED_GROUP; from < n; from += PACKED_GROUP)
                    check_block(&h, from, n - from < 50 ? n - from : 50);
                drop_head(&h);
            }
}

enum { HEADS = 2, DIM = 8, MOST = 40 };

/* Two heads of different length in f32 or bf16. */
static void make_rows(enum kv_dtype elem, uint32_t n0, uint32_t n1, float *x, uint16_t *half,
                      struct kept_rows *heads)
{
    uint64_t seed = 5;

    for (int i = 0; i < HEADS * MOST * DIM; i++) {
        half[i] = f32_to_bf16(test_randf(&seed));
        x[i] = bf16_to_f32(half[i]);
    }
    for (int g = 0; g < HEADS; g++) {
        const void *at =
            elem == KV_F32 ? (void *)(x + g * MOST * DIM) : (void *)(half + g * MOST * DIM);

        heads[g] = (struct kept_rows){g ? n1 : n0, NULL, at, at, NULL, elem};
    }
}

static void a_layer_becomes_the_tiles_of_its_rows(void **state)
{
    struct kv_geom g = {1, HEADS, HEADS, DIM};
    float x[HEADS * MOST * DIM];
    uint16_t half[HEADS * MOST * DIM];
    uint8_t want[MOST * DIM * 2];
    struct kept_rows heads[HEADS];
    struct packer p = {0};

    (void)state;
    for (int what = 0; what < 4; what++) {
        enum kv_dtype t = what & 1 ? KV_INT4 : KV_INT8, elem = what & 2 ? KV_F32 : KV_BF16;

        for (uint32_t n = 0; n <= MOST; n += 20) {
            make_rows(elem, n, MOST - n, x, half, heads);
            assert_int_equal(packer_layer(&p, &g, t, heads, NULL), 0);
            for (int i = 0; i < HEADS; i++) {
                uint32_t rows = heads[i].n_rows;

                assert_int_equal(heads[i].dtype, t);
                packed_from_k(t, x + i * MOST * DIM, rows, DIM, want);
                assert_memory_equal(heads[i].k, want, tile_bytes_k(t, rows, DIM));
                packed_from_v(t, x + i * MOST * DIM, rows, DIM, want);
                assert_memory_equal(heads[i].v, want, tile_bytes_v(t, rows, DIM));
            }
        }
    }
    make_rows(KV_F32, 9, 9, x, half, heads);
    assert_int_equal(packer_layer(&p, &g, KV_BF16, heads, NULL), 0);
    assert_ptr_equal(heads[0].k, x);
    assert_int_equal(heads[0].dtype, KV_F32);
    packer_done(&p);
}

static void what_has_no_code_is_an_error(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 1e30f};
    struct kv_geom g = {1, HEADS, HEADS, DIM};
    float x[HEADS * MOST * DIM];
    uint16_t half[HEADS * MOST * DIM];
    struct kept_rows heads[HEADS];
    struct packer p = {0};

    (void)state;
    for (int i = 0; i < 4; i++)
        for (int at = 0; at < MOST; at += 13) {
            if (i == 3 && at < 4)
                continue; /* an exact row may be as large as bf16 is */
            make_rows(KV_F32, MOST, MOST, x, half, heads);
            x[MOST * DIM + at * DIM + 3] = bad[i];
            assert_int_equal(packer_layer(&p, &g, KV_INT4, heads, NULL), LARDER_ENUMERIC);
        }
    packer_done(&p);
}

static void packing_without_memory_fails_cleanly(void **state)
{
    struct kv_geom g = {1, HEADS, HEADS, DIM};
    float x[HEADS * MOST * DIM];
    uint16_t half[HEADS * MOST * DIM];
    struct kept_rows heads[HEADS];

    (void)state;
    for (long n = 0; n < 3; n++) {
        struct packer p = {0};
        long left = n;
        int rc;

        make_rows(KV_BF16, 7, MOST, x, half, heads);
        mem_set_hook(test_fail_nth, &left);
        rc = packer_layer(&p, &g, KV_INT8, heads, NULL);
        mem_set_hook(NULL, NULL);
        assert_int_equal(rc, n < 2 ? LARDER_ENOMEM : 0);
        packer_done(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_of_tiles_are_what_expanding_gives),
        cmocka_unit_test(a_layer_becomes_the_tiles_of_its_rows),
        cmocka_unit_test(what_has_no_code_is_an_error),
        cmocka_unit_test(packing_without_memory_fails_cleanly),
    };

    return cmocka_run_group_tests_name("prefill_packed", tests, NULL, NULL);
}
