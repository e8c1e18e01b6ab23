/* test_base_all.c - status codes, sizes, bytes, halves, hashes, geometry. */
#include "testlib.h"

#include <math.h>

#include "bytes.h"
#include "geom.h"
#include "half.h"
#include "larder_status.h"
#include "sha256.h"
#include "size.h"

static void status_names_and_numbers_are_fixed(void **state)
{
    (void)state;
    assert_string_equal(larder_status_name(LARDER_ENOTFOUND), "LARDER_ENOTFOUND");
    assert_int_equal(LARDER_ENOTFOUND, -4);
    assert_int_equal(LARDER_EINTERNAL, -27);
    assert_string_equal(larder_status_name(-999), "LARDER_E?");
    assert_string_equal(larder_status_text(LARDER_OK), "success");
}

static void fail_in_prefixes_the_message(void **state)
{
    struct larder_err e = {0, ""};

    (void)state;
    assert_int_equal(larder_fail(&e, LARDER_EIO, "read %d", 7), LARDER_EIO);
    assert_int_equal(larder_fail_in(&e, LARDER_EMODEL, "model %s", "x"), LARDER_EMODEL);
    assert_string_equal(e.msg, "model x: read 7");
    assert_int_equal(e.code, LARDER_EMODEL);
    assert_int_equal(larder_fail(NULL, LARDER_EIO, "nobody listens"), LARDER_EIO);
}

static void sizes_refuse_to_wrap(void **state)
{
    uint64_t r = 5;

    (void)state;
    assert_false(size_mul(1ULL << 32, 1ULL << 32, &r));
    assert_false(size_add(UINT64_MAX, 1, &r));
    assert_false(size_align(UINT64_MAX - 3, 32, &r));
    assert_false(size_mac(&r, UINT64_MAX, 2));
    assert_int_equal(r, 5);
    assert_true(size_align(65, 64, &r));
    assert_int_equal(r, 128);
}

static void reader_turns_bad_and_stays_bad(void **state)
{
    const uint8_t b[] = {1, 2, 3, 4, 5};
    struct rd r = rd_init(b, sizeof b);

    (void)state;
    assert_int_equal(rd_u32(&r), 0x04030201);
    assert_int_equal(rd_u16(&r), 0);
    assert_false(rd_ok(&r));
    assert_int_equal(rd_u8(&r), 0);
    assert_int_equal(rd_left(&r), 0);
    r = rd_init(b, sizeof b);
    assert_null(rd_bytes(&r, UINT64_MAX));
}

static void writer_and_reader_agree(void **state)
{
    uint8_t b[64];
    struct wr w = wr_init(b, sizeof b);
    struct rd r;

    (void)state;
    wr_u8(&w, 0xab);
    wr_u64(&w, 0x1122334455667788ULL);
    wr_f32(&w, -1.5f);
    wr_f64(&w, 1e300);
    assert_true(wr_ok(&w));
    r = rd_init(b, (size_t)(w.p - b));
    assert_int_equal(rd_u8(&r), 0xab);
    assert_true(rd_u64(&r) == 0x1122334455667788ULL);
    assert_true(rd_f32(&r) == -1.5f);
    assert_true(rd_f64(&r) == 1e300);
    assert_int_equal(rd_left(&r), 0);
    w = wr_init(b, 3);
    wr_u32(&w, 1);
    assert_false(wr_ok(&w));
}

static void f16_round_trips_every_value(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = f16_to_f32((uint16_t)h);

        if (isnan(f))
            assert_true(isnan(f16_to_f32(f32_to_f16(f))));
        else
            assert_int_equal(f32_to_f16(f), h);
    }
    assert_int_equal(f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(f32_to_f16(0x1p-25f), 0);
    assert_int_equal(f32_to_f16(0x1.8p-25f), 1);
    assert_int_equal(f32_to_f16(1.0f + 0x1p-11f), 0x3c00);
    assert_int_equal(f32_to_f16(1.0f + 3 * 0x1p-11f), 0x3c02);
}

static void bf16_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = bf16_to_f32((uint16_t)h);

        if (!isnan(f))
            assert_int_equal(f32_to_bf16(f), h);
        else
            assert_true(isnan(bf16_to_f32(f32_to_bf16(f))));
    }
    assert_int_equal(f32_to_bf16(1.0f + 0x1p-8f), 0x3f80);
    assert_int_equal(f32_to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82);
}

static void sha256_matches_its_standard_vector(void **state)
{
    uint8_t d[SHA256_LEN], back[SHA256_LEN];
    char hex[2 * SHA256_LEN + 1];
    struct sha256 *s = sha256_new();

    (void)state;
    assert_non_null(s);
    sha256_add(s, "a", 1);
    sha256_get(s, d);
    sha256_add(s, "bc", 2);
    sha256_get(s, d);
    sha256_hex(d, hex);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_int_equal(sha256_unhex(hex, back), 0);
    assert_memory_equal(back, d, sizeof d);
    hex[5] = 'g';
    assert_int_equal(sha256_unhex(hex, back), -1);
    assert_int_equal(sha256_unhex("ab", back), -1);
    sha256_free(s);
}

static void geometry_is_capped_and_consistent(void **state)
{
    struct kv_geom ok = {30, 9, 3, 64}, g;
    struct larder_err e;

    (void)state;
    assert_int_equal(kv_geom_check(&ok, &e), 0);
    g = ok;
    g.n_layers = 0;
    assert_int_equal(kv_geom_check(&g, &e), LARDER_EINVAL);
    g = ok;
    g.n_kv_heads = 0;
    assert_int_equal(kv_geom_check(&g, &e), LARDER_EINVAL);
    g = ok;
    g.n_kv_heads = 4;
    assert_int_equal(kv_geom_check(&g, &e), LARDER_EINVAL);
    g = ok;
    g.head_dim = UINT32_MAX - 1;
    assert_int_equal(kv_geom_check(&g, &e), LARDER_EINVAL);
    assert_int_equal(kv_dtype_bytes(KV_INT4), 0);
    assert_string_equal(kv_dtype_name(KV_BF16), "bf16");
}

static void allocations_fail_on_overflow_and_on_the_hook(void **state)
{
    long left = 0;
    void *p;

    (void)state;
    assert_null(mem_alloc(UINT64_MAX, 2));
    assert_null(mem_zalloc(UINT64_MAX / 2, 1));
    mem_set_hook(test_fail_nth, &left);
    assert_null(mem_alloc(1, 1));
    p = mem_alloc(1, 1);
    mem_set_hook(NULL, NULL);
    assert_non_null(p);
    mem_free(p);
    p = mem_aligned(3, 5);
    assert_int_equal((uintptr_t)p % 64, 0);
    mem_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(status_names_and_numbers_are_fixed),
        cmocka_unit_test(fail_in_prefixes_the_message),
        cmocka_unit_test(sizes_refuse_to_wrap),
        cmocka_unit_test(reader_turns_bad_and_stays_bad),
        cmocka_unit_test(writer_and_reader_agree),
        cmocka_unit_test(f16_round_trips_every_value),
        cmocka_unit_test(bf16_rounds_to_nearest_even),
        cmocka_unit_test(sha256_matches_its_standard_vector),
        cmocka_unit_test(geometry_is_capped_and_consistent),
        cmocka_unit_test(allocations_fail_on_overflow_and_on_the_hook),
    };

    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
