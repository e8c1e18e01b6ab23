/* test_base_packed.c - int8 and int4 tiles: what FORMAT.md says, and how near they come. */
#include "testlib.h"

#include <math.h>

#include "half.h"
#include "packed.h"

static const uint32_t dims[] = {2, 6, 32, 64, 66, 128, 1024};
static const uint32_t counts[] = {0, 1, 3, 4, 5, 35, 36, 37, 68, 100};
#define N_DIMS (sizeof dims / sizeof *dims)
#define N_COUNTS (sizeof counts / sizeof *counts)

/* A tile and what it was made from, every array at its exact size. */
struct made {
    enum kv_dtype t;
    bool keys;
    uint32_t n, d;
    uint64_t bytes;
    float *rows;
    uint8_t *tile;
};

static struct made make(enum kv_dtype t, bool keys, uint32_t n, uint32_t d)
{
    struct made m = {.t = t, .keys = keys, .n = n, .d = d};
    uint64_t seed = 1 + t + 7 * n + 1000 * d;

    m.bytes = keys ? tile_bytes_k(t, n, d) : tile_bytes_v(t, n, d);
    m.rows = malloc((uint64_t)n * d * sizeof *m.rows + 1);
    m.tile = malloc(m.bytes + 1); /* malloc may give NULL for nothing */
    assert_true(m.rows && m.tile);
    for (uint64_t i = 0; i < (uint64_t)n * d; i++) /* channels of several sizes and offsets */
        m.rows[i] = test_randf(&seed) * (float)(1 + i % d % 7) + (i % d % 5 ? 0 : 30);
    (keys ? packed_from_k : packed_from_v)(t, m.rows, n, d, m.tile);
    return m;
}

static void drop(struct made *m)
{
    free(m->rows);
    free(m->tile);
}

static uint16_t u16_at(const uint8_t *p, uint64_t i)
{
    return (uint16_t)(p[2 * i] | p[2 * i + 1] << 8);
}

/* Element (row, c) and the step it was stored with, straight from the words of FORMAT.md. */
static float element(const struct made *m, uint32_t row, uint32_t c, float *ret_step)
{
    uint32_t e = m->n < 4 ? m->n : 4, p = m->n - e, d = m->d, groups = (d + 31) / 32;
    const uint8_t *at = m->tile + 2ull * e * d;
    uint64_t i, n_scales;

    *ret_step = 0;
    if (row < e)
        return bf16_to_f32(u16_at(m->tile, (uint64_t)row * d + c));
    row -= e;
    if (m->t == KV_INT8) {
        i = m->keys ? c : row;
        n_scales = m->keys ? d : p;
        *ret_step = f16_to_f32(u16_at(at, i));
        return (float)(int8_t)at[2 * n_scales + (uint64_t)row * d + c] * *ret_step;
    }
    i = m->keys ? (uint64_t)(row / 32) * d + c : (uint64_t)row * groups + c / 32;
    n_scales = m->keys ? (uint64_t)(p + 31) / 32 * d : (uint64_t)p * groups;
    *ret_step = f16_to_f32(u16_at(at, 2 * i + 1));
    at += 4 * n_scales;
    at += ((uint64_t)row * d + c) / 2;
    return f16_to_f32(u16_at(m->tile + 2ull * e * d, 2 * i)) +
           (float)(c % 2 ? *at >> 4 : *at & 15) * *ret_step;
}

/* Half a step, and the roundings of the scales: f16 keeps 11 bits of a minimum, and of a step
 * that counts up to 15 or 127 times. */
static float bound(const struct made *m, uint32_t row, float x, float step)
{
    if (row < 4)
        return fabsf(x) / 256;
    return step / 2 + (m->t == KV_INT8 ? 127 : 15) * (step / 2048 + 0x1p-25f) +
           (m->t == KV_INT4 ? 40 / 2048.0f : 0);
}

static void check(const struct made *m)
{
    uint64_t n = (uint64_t)m->n * m->d;
    float *wide = malloc(n * sizeof *wide + 1);
    uint16_t *narrow = malloc(n * sizeof *narrow + 1);

    assert_true(wide && narrow);
    (m->keys ? packed_expand_k_f32 : packed_expand_v_f32)(m->t, m->tile, m->n, m->d, wide);
    (m->keys ? packed_expand_k : packed_expand_v)(m->t, m->tile, m->n, m->d, narrow);
    for (uint64_t i = 0; i < n; i++) {
        float step, x = element(m, (uint32_t)(i / m->d), (uint32_t)(i % m->d), &step);

        assert_true(wide[i] == x);
        assert_int_equal(narrow[i], f32_to_bf16(x));
        assert_true(fabsf(x - m->rows[i]) <= bound(m, (uint32_t)(i / m->d), m->rows[i], step));
    }
    free(wide);
    free(narrow);
}

static void tiles_expand_to_what_the_format_says_within_half_a_step(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_DIMS; i++)
        for (size_t j = 0; j < N_COUNTS; j++)
            for (int what = 0; what < 4; what++) {
                struct made m = make(what & 1 ? KV_INT4 : KV_INT8, what & 2, counts[j], dims[i]);

                check(&m);
                assert_true((m.keys ? packed_finite_k : packed_finite_v)(m.t, m.tile, m.n, m.d));
                drop(&m);
            }
}

static void tiles_have_the_promised_sizes(void **state)
{
    (void)state;
    assert_int_equal(tile_bytes_k(KV_BF16, 7, 64), 7 * 128);
    assert_int_equal(tile_bytes_v(KV_F32, 7, 64), 7 * 256);
    assert_int_equal(
        tile_bytes_k(KV_INT4, 4 + 32, 64) + tile_bytes_v(KV_INT4, 4 + 32, 64) - 4 * 256, 32 * 80);
    assert_int_equal(tile_bytes_k(KV_INT8, 4 + 10, 64) - tile_bytes_k(KV_INT8, 4, 64),
                     128 + 10 * 64);
    assert_int_equal(tile_bytes_v(KV_INT8, 4 + 10, 64) - tile_bytes_v(KV_INT8, 4, 64), 10 * 66);
    for (int t = KV_INT8; t <= KV_INT4; t++) {
        assert_int_equal(tile_bytes_k((enum kv_dtype)t, 0, 64), 0);
        assert_int_equal(tile_bytes_v((enum kv_dtype)t, 4, 64), 4 * 128);
    }
}

/* Ranges that f16 can hardly express must not turn into infinities or wrap around. */
static void narrow_and_far_ranges_stay_near(void **state)
{
    static const float base[] = {0, 1e-7f, -1e-7f, 100, -3000, 60000, -60000};
    enum { N = 40, D = 32 };
    float rows[N * D], back[N * D];
    uint8_t tile[N * D * 2];
    uint64_t seed = 3;

    (void)state;
    for (size_t b = 0; b < sizeof base / sizeof *base; b++)
        for (int t = KV_INT8; t <= KV_INT4; t++) {
            for (int i = 0; i < N * D; i++)
                rows[i] = base[b] * (1 + 1e-5f * test_randf(&seed));
            for (int keys = 0; keys < 2; keys++) {
                (keys ? packed_from_k : packed_from_v)((enum kv_dtype)t, rows, N, D, tile);
                (keys ? packed_expand_k_f32 : packed_expand_v_f32)((enum kv_dtype)t, tile, N, D,
                                                                   back);
                for (int i = 4 * D; i < N * D; i++)
                    assert_true(fabsf(back[i] - rows[i]) <= fabsf(rows[i]) / 200 + 4e-6f);
            }
        }
}

static void every_scale_that_is_not_finite_is_seen(void **state)
{
    (void)state;
    for (int what = 0; what < 4; what++) {
        struct made m = make(what & 1 ? KV_INT4 : KV_INT8, what & 2, 70, 64);
        struct packed_parts p =
            m.keys ? packed_parts_k(m.t, m.n, m.d) : packed_parts_v(m.t, m.n, m.d);
        bool (*is_finite)(enum kv_dtype, const uint8_t *, uint32_t, uint32_t) =
            m.keys ? packed_finite_k : packed_finite_v;

        for (uint64_t at = 1; at < p.codes; at += 2) {
            uint8_t was = m.tile[at];

            m.tile[at] = 0xff; /* -NaN in either format, once the low byte allows it */
            m.tile[at - 1] |= 0x80;
            assert_false(is_finite(m.t, m.tile, m.n, m.d));
            m.tile[at] = was;
        }
        memset(m.tile + p.codes, 0xff, m.bytes - p.codes); /* any code is a number */
        assert_true(is_finite(m.t, m.tile, m.n, m.d));
        drop(&m);
    }
    for (int keys = 0; keys < 2; keys++) { /* further than f16 reaches */
        float rows[8 * 2] = {[10] = 1e9f};
        uint8_t tile[64];

        (keys ? packed_from_k : packed_from_v)(KV_INT4, rows, 8, 2, tile);
        assert_false((keys ? packed_finite_k : packed_finite_v)(KV_INT4, tile, 8, 2));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tiles_expand_to_what_the_format_says_within_half_a_step),
        cmocka_unit_test(tiles_have_the_promised_sizes),
        cmocka_unit_test(narrow_and_far_ranges_stay_near),
        cmocka_unit_test(every_scale_that_is_not_finite_is_seen),
    };

    return cmocka_run_group_tests_name("base_packed", tests, NULL, NULL);
}
