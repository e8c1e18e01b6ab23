/* test_daemon_layer.c - a layer's rows as a worker sends them, and as a bad one might. */
#include "testlib.h"

#include <math.h>

#include "half.h"
#include "layer_file.h"
#include "packed.h"

enum { HEADS = 3, DIM = 6, N_CTX = 90 };
static const struct kv_geom geom = {2, HEADS, HEADS, DIM};
static const uint32_t rows[HEADS] = {41, 0, 9};

static const struct layer_form forms[] = {{KV_BF16, false}, {KV_BF16, true},  {KV_INT8, false},
                                          {KV_INT8, true},  {KV_INT4, false}, {KV_INT4, true}};
#define N_FORMS (sizeof forms / sizeof *forms)

/* A file written from the words of PROTOCOL.md, at its exact size so that a sanitizer sees a step
 * outside. */
struct made {
    struct layer_form form;
    uint64_t n;
    uint8_t *file;
    struct store_rows heads[HEADS]; /* where things are */
};

static uint64_t pad4(uint64_t n)
{
    return (n + 3) & ~3ull;
}

static void make_tile(struct layer_form f, bool keys, uint32_t n, uint8_t *to)
{
    float x[64 * DIM];
    uint64_t seed = n + keys;

    for (uint32_t i = 0; i < n * DIM; i++)
        x[i] = test_randf(&seed);
    if (f.precision != KV_BF16) {
        (keys ? packed_from_k : packed_from_v)(f.precision, x, n, DIM, to);
        return;
    }
    for (uint32_t i = 0; i < n * DIM; i++) {
        to[2 * i] = (uint8_t)f32_to_bf16(x[i]);
        to[2 * i + 1] = (uint8_t)(f32_to_bf16(x[i]) >> 8);
    }
}

static struct made make(struct layer_form f)
{
    struct made m = {.form = f};
    uint8_t *at;

    for (int g = 0; g < HEADS; g++)
        m.n += 4 * rows[g] +
               pad4(tile_bytes_k(f.precision, rows[g], DIM) +
                    tile_bytes_v(f.precision, rows[g], DIM)) +
               (f.has_bias ? 4 * rows[g] : 0);
    m.file = at = calloc(m.n, 1);
    assert_non_null(at);
    for (int g = 0; g < HEADS; g++) {
        uint64_t k = tile_bytes_k(f.precision, rows[g], DIM);
        uint64_t v = tile_bytes_v(f.precision, rows[g], DIM);
        uint32_t *pos = (uint32_t *)(void *)at;
        float *bias = (float *)(void *)(at + 4 * rows[g] + pad4(k + v));

        for (uint32_t i = 0; i < rows[g]; i++) {
            pos[i] = 2 * i + (uint32_t)g;
            if (f.has_bias)
                bias[i] = (float)i / 8;
        }
        make_tile(f, true, rows[g], at + 4 * rows[g]);
        make_tile(f, false, rows[g], at + 4 * rows[g] + k);
        m.heads[g] = (struct store_rows){rows[g], pos, at + 4 * rows[g], at + 4 * rows[g] + k,
                                         f.has_bias ? bias : NULL};
        at += 4 * rows[g] + pad4(k + v) + (f.has_bias ? 4 * rows[g] : 0);
    }
    return m;
}

static int read_it(const struct made *m, uint64_t n, struct store_rows *heads)
{
    return layer_file_read(m->file, n, &geom, m->form, rows, N_CTX, heads, NULL);
}

static void every_form_of_a_layer_is_read(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_FORMS; i++) {
        struct store_rows got[HEADS];
        struct made m = make(forms[i]);

        assert_int_equal(layer_file_bytes(&geom, m.form, rows), m.n);
        assert_int_equal(read_it(&m, m.n, got), 0);
        for (int g = 0; g < HEADS; g++) {
            assert_int_equal(got[g].n_rows, rows[g]);
            assert_ptr_equal(got[g].position, m.heads[g].position);
            assert_ptr_equal(got[g].k, m.heads[g].k);
            assert_ptr_equal(got[g].v, m.heads[g].v);
            assert_ptr_equal(got[g].bias, m.heads[g].bias);
        }
        free(m.file);
    }
}

static void every_other_length_is_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_FORMS; i++) {
        struct store_rows got[HEADS];
        struct made m = make(forms[i]);

        for (uint64_t n = 0; n < m.n + 64; n++)
            if (n != m.n)
                assert_int_equal(read_it(&m, n, got), LARDER_EWORKER);
        free(m.file);
    }
}

/* Change 2 or 4 bytes at p, read, change them back. */
static int read_with(const struct made *m, const void *p, const void *value, size_t n)
{
    struct store_rows got[HEADS];
    uint8_t *at = m->file + ((const uint8_t *)p - m->file), was[4];
    int rc;

    memcpy(was, at, n);
    memcpy(at, value, n);
    rc = read_it(m, m->n, got);
    memcpy(at, was, n);
    return rc;
}

static void positions_must_ascend_below_the_documents_length(void **state)
{
    static const uint32_t bad[] = {N_CTX, UINT32_MAX, 1u << 31};
    struct made m = make(forms[5]);

    (void)state;
    for (int g = 0; g < HEADS; g++)
        for (uint32_t i = 0; i < rows[g]; i++) {
            for (int b = 0; b < 3; b++)
                assert_int_equal(read_with(&m, m.heads[g].position + i, &bad[b], 4),
                                 LARDER_EWORKER);
            if (i)
                assert_int_equal(
                    read_with(&m, m.heads[g].position + i, m.heads[g].position + i - 1, 4),
                    LARDER_EWORKER);
        }
    free(m.file);
}

/* Every 16-bit word of exact rows and scales, and none of the codes, decides. */
static void what_would_be_multiplied_must_be_finite(void **state)
{
    static const uint16_t bad[] = {0x7f80, 0xff80, 0x7fff}, f16_inf = 0x7c00;

    (void)state;
    for (size_t f = 0; f < N_FORMS; f++) {
        struct made m = make(forms[f]);
        enum kv_dtype t = m.form.precision;

        for (int what = 0; what < 2 * HEADS; what++) {
            uint32_t n = rows[what / 2];
            const uint8_t *tile = what & 1 ? m.heads[what / 2].v : m.heads[what / 2].k;
            struct packed_parts p =
                what & 1 ? packed_parts_v(t, n, DIM) : packed_parts_k(t, n, DIM);
            uint64_t end = t == KV_BF16 ? 2ull * n * DIM : p.codes;

            for (uint64_t at = 0; at < end; at += 2) {
                for (int b = 0; b < 3; b++)
                    assert_int_equal(read_with(&m, tile + at, &bad[b], 2), LARDER_ENUMERIC);
                if (t != KV_BF16 && at >= p.scales)
                    assert_int_equal(read_with(&m, tile + at, &f16_inf, 2), LARDER_ENUMERIC);
            }
            for (uint64_t at = end; t != KV_BF16 && at + 2 <= p.end; at++)
                assert_int_equal(read_with(&m, tile + at, &bad[2], 2), 0);
        }
        free(m.file);
    }
}

/* 3.4e38 is a number, but not in the bf16 that it is stored as. */
static void a_bias_must_be_finite_as_it_is_stored(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f}, good = 3e38f;

    (void)state;
    for (size_t f = 1; f < N_FORMS; f += 2) {
        struct made m = make(forms[f]);

        for (int g = 0; g < HEADS; g++)
            for (uint32_t i = 0; i < rows[g]; i++) {
                for (int b = 0; b < 5; b++)
                    assert_int_equal(read_with(&m, m.heads[g].bias + i, &bad[b], 4),
                                     LARDER_ENUMERIC);
                assert_int_equal(read_with(&m, m.heads[g].bias + i, &good, 4), 0);
            }
        free(m.file);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_form_of_a_layer_is_read),
        cmocka_unit_test(every_other_length_is_refused),
        cmocka_unit_test(positions_must_ascend_below_the_documents_length),
        cmocka_unit_test(what_would_be_multiplied_must_be_finite),
        cmocka_unit_test(a_bias_must_be_finite_as_it_is_stored),
    };

    return cmocka_run_group_tests_name("daemon_layer", tests, NULL, NULL);
}
