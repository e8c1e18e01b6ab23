/* test_store_codec.c - extents: channels, tiers, frames; every kernel; bytes that lie. */
#include <math.h>

#include "channels.h"
#include "codec.h"
#include "half.h"
#include "mem.h"
#include "testlib.h"
#include "tiers.h"

#define MAX_N CHANNELS_MAX_ELEMS

static void *must(void *p)
{
    assert_non_null(p);
    return p;
}

/* ---- tiers */

/* Bytes whose frequencies halve from value to value; `flat`: all alike. */
static void fill_bytes(uint8_t *p, uint32_t n, bool flat, uint64_t *seed)
{
    for (uint32_t i = 0; i < n; i++) {
        uint64_t r = test_rand(seed);

        p[i] = flat ? (uint8_t)r : (uint8_t)(200 + __builtin_ctzll(r | 1ull << 30) * 7);
    }
}

static size_t tiers_size(const struct tiers_kernel *k, const uint8_t *src, uint32_t n, uint8_t *out)
{
    uint8_t *scratch = must(mem_alloc(MAX_N + TIERS_GROUP, 1));
    size_t len = tiers_encode(k, src, n, scratch, out, 2 * MAX_N);

    mem_free(scratch);
    return len;
}

/* Decode in steps of `step`; 0 when the bytes are accepted. */
static int tiers_back(const struct tiers_kernel *k, const uint8_t *coded, size_t len, uint32_t n,
                      uint32_t step, uint8_t *dst)
{
    uint8_t *escaped = must(mem_zalloc(MAX_N + TIERS_GROUP, 1));
    struct tiers t;
    int rc = tiers_open(&t, k, coded, len, n, escaped);

    for (uint32_t at = 0; !rc && at < n; at += step) {
        uint32_t upto = n - at < step ? n : at + step;

        assert_true(tiers_read(&t, upto, dst) >= upto);
    }
    if (!rc)
        rc = tiers_close(&t);
    mem_free(escaped);
    return rc;
}

static void bytes_in_tiers_come_back_from_every_kernel(void **state)
{
    static const uint32_t sizes[] = {0, 1, 31, 63, 64, 65, 127, 4097, 100000, MAX_N};
    uint8_t *src = must(mem_alloc(MAX_N, 1)), *dst = must(mem_zalloc(MAX_N + TIERS_GROUP, 1));
    uint8_t *coded = must(mem_alloc(2 * MAX_N, 1)), *other = must(mem_alloc(2 * MAX_N, 1));
    uint64_t seed = 5;

    (void)state;
    for (size_t s = 0; s < 2 * sizeof sizes / sizeof *sizes; s++) {
        uint32_t n = sizes[s / 2];
        const struct tiers_kernel *k;
        size_t len;

        fill_bytes(src, n, s % 2, &seed);
        len = tiers_size(tiers_kernel(0), src, n, coded);
        assert_true(len > 0);
        for (unsigned i = 0; (k = tiers_kernel(i)); i++) {
            assert_int_equal(tiers_size(k, src, n, other), len);
            assert_memory_equal(other, coded, len);
            memset(dst, 0, MAX_N);
            assert_int_equal(tiers_back(k, coded, len, n, s % 3 ? 4096 : 1000, dst), 0);
            assert_memory_equal(dst, src, n);
        }
    }
    /* of values that halve: 2 bits, 3 for an eighth, 8 for a thousandth */
    fill_bytes(src, MAX_N, false, &seed);
    assert_in_range(tiers_size(tiers_kernel(0), src, MAX_N, coded), MAX_N * 2 / 8,
                    MAX_N * 2.45 / 8);
    mem_free(src);
    mem_free(dst);
    mem_free(coded);
    mem_free(other);
}

static void tiers_of_a_wrong_size_are_refused(void **state)
{
    enum { N = 1000 };
    uint8_t src[N], dst[N + TIERS_GROUP], coded[3 * N];
    const struct tiers_kernel *k;
    uint64_t seed = 9;
    size_t len;

    (void)state;
    fill_bytes(src, N, true, &seed);
    len = tiers_size(tiers_kernel(0), src, N, coded);
    for (unsigned i = 0; (k = tiers_kernel(i)); i++) {
        for (size_t cut = 0; cut < len; cut++) {
            uint8_t *exact = must(mem_dup(coded, cut ? cut : 1)); /* so that a read beyond shows */

            assert_int_equal(tiers_back(k, exact, cut, N, N, dst), -1);
            mem_free(exact);
        }
        assert_int_equal(tiers_back(k, coded, len + 1, N, N, dst), -1);
        assert_int_equal(tiers_back(k, coded, len, N + TIERS_GROUP, N, dst), -1);
        for (size_t at = 0; at < len; at++) { /* anything but a crash; a hash decides elsewhere */
            coded[at] ^= (uint8_t)(1 << at % 8);
            tiers_back(k, coded, len, N, N, dst);
            coded[at] ^= (uint8_t)(1 << at % 8);
        }
    }
    assert_int_equal(tiers_encode(tiers_kernel(0), src, N, dst, coded, TIERS_HEADER), 0);
}

/* ---- channels */

/* bf16 values whose channels differ in size by powers of two. */
static void fill_rows(uint8_t *raw, uint32_t n, uint32_t width, uint64_t *seed)
{
    for (uint32_t i = 0; i < n; i++) {
        float x = ldexpf(test_randf(seed), (int)(i % width * 7 % 23));
        uint16_t v = f32_to_bf16(x);

        memcpy(raw + 2 * (size_t)i, &v, 2);
    }
}

static void rows_add(struct channel_rows *rows, uint8_t *raw, uint32_t n, uint32_t width,
                     uint64_t *seed)
{
    uint32_t at = 0;

    for (uint32_t i = 0; i < rows->n_runs; i++)
        at += rows->run[i].n;
    fill_rows(raw + 2 * (size_t)at, n, width, seed);
    channels_add(rows, n, width);
}

static void planes_come_back_in_any_pieces(void **state)
{
    struct channel_rows rows = {0};
    struct channels *c = must(mem_zalloc(2, sizeof *c));
    uint8_t *raw = must(mem_zalloc(MAX_N, 2)), *back = must(mem_zalloc(MAX_N, 2));
    uint8_t *exponent = must(mem_zalloc(MAX_N, 1)), *rest = must(mem_zalloc(MAX_N, 1));
    static uint8_t bytes[CHANNELS_MAX_BYTES];
    struct channels_at a, b;
    uint64_t seed = 3;
    uint32_t n = 0;
    struct wr w = wr_init(bytes, sizeof bytes);
    struct rd r;

    (void)state;
    rows_add(&rows, raw, 300 * 64 + 17, 64, &seed); /* begins inside a row, as extents do */
    rows_add(&rows, raw, 90 * 80, 80, &seed);
    rows_add(&rows, raw, 30, 1, &seed); /* joins */
    rows_add(&rows, raw, 70 * 1024, 1024, &seed);
    rows_add(&rows, raw, 5000, 1, &seed);
    assert_int_equal(rows.n_runs, 4);
    for (uint32_t i = 0; i < rows.n_runs; i++)
        n += rows.run[i].n;
    channels_choose(&c[0], raw, &rows);
    channels_write(&c[0], &w);
    assert_true(wr_ok(&w));
    r = rd_init(bytes, (size_t)(w.p - bytes));
    assert_int_equal(channels_read(&c[1], &r, n), 0);
    assert_int_equal(rd_left(&r), 0);
    a = channels_start(&c[0]);
    b = channels_start(&c[1]);
    for (uint32_t at = 0, m; at < n; at += m) {
        m = 1 + (uint32_t)(test_rand(&seed) % 3000);
        m = m < n - at ? m : n - at;
        channels_split(&a, raw + 2 * (size_t)at, m, exponent + at, rest + at);
    }
    for (uint32_t at = 0, m; at < n; at += m) {
        m = 1 + (uint32_t)(test_rand(&seed) % 7000);
        m = m < n - at ? m : n - at;
        channels_merge(&b, exponent + at, rest + at, m, back + 2 * (size_t)at);
    }
    assert_memory_equal(back, raw, 2 * (size_t)n);
    mem_free(c);
    mem_free(raw);
    mem_free(back);
    mem_free(exponent);
    mem_free(rest);
}

static void a_base_is_the_exponent_of_its_channel(void **state)
{
    struct channel_rows rows = {0};
    struct channels *c = must(mem_zalloc(1, sizeof *c));
    uint8_t *raw = must(mem_alloc(100 * 64, 2));

    (void)state;
    channels_add(&rows, 100 * 64, 64);
    for (uint32_t i = 0; i < 100 * 64; i++) {
        uint16_t v = f32_to_bf16(ldexpf(i & 1 ? -1.5f : 1.5f, (int)(i % 64) - 32));

        memcpy(raw + 2 * (size_t)i, &v, 2);
    }
    channels_choose(c, raw, &rows);
    assert_int_equal(c->n_runs, 1);
    for (uint32_t j = 0; j < 64; j++) /* 0.9 x 1.5 x 2^e: exponent field e + 127 */
        assert_int_equal(c->run[0].base[j], 127 + j - 32);
    mem_free(c);
    mem_free(raw);
}

static void channels_that_lie_are_refused(void **state)
{
    static const struct {
        uint16_t n_runs;
        uint32_t n;
        uint16_t width;
        uint32_t elems, n_bases;
    } bad[] = {
        {1, 100, 0, 100, 0},     {1, 100, 1025, 100, 1025}, {1, 99, 4, 100, 4},
        {1, 101, 4, 100, 4},     {1, 100, 4, 100, 3},       {0, 0, 0, 100, 0},
        {65535, 100, 4, 100, 4}, {1, 0, 4, 0, 4},           {2, 100, 4, 100, 4},
    };
    struct channels *c = must(mem_zalloc(1, sizeof *c));

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint8_t bytes[2048] = {0};
        struct wr w = wr_init(bytes, sizeof bytes);
        struct rd r;

        wr_u16(&w, bad[i].n_runs);
        wr_u32(&w, bad[i].n);
        wr_u16(&w, bad[i].width);
        r = rd_init(bytes, bad[i].n_runs ? 8 + bad[i].n_bases : 2);
        assert_int_equal(channels_read(c, &r, bad[i].elems), -1);
    }
    mem_free(c);
}

/* ---- extents */

struct extent_of {
    uint8_t *raw, *coded, *back;
    uint32_t len, coded_len;
    enum codec_kind kind;
    uint8_t hash[EXTENT_HASH_LEN];
    struct channel_rows rows;
    struct codec *c;
};

static void extent_make(struct extent_of *x, uint32_t rows, uint32_t width, enum codec_kind want)
{
    const void *stored;
    uint64_t seed = rows + 1;
    struct larder_err e;

    *x = (struct extent_of){.len = 2 * rows * width, .c = must(codec_new())};
    x->raw = must(mem_alloc(EXTENT_RAW_MAX, 1));
    x->back = must(mem_zalloc(EXTENT_RAW_MAX, 1));
    rows_add(&x->rows, x->raw, rows * width, width, &seed);
    assert_int_equal(codec_encode(x->c, want, &(struct codec_input){x->raw, x->len, &x->rows},
                                  &x->kind, &stored, &x->coded_len, x->hash, &e),
                     0);
    x->coded = must(mem_dup(stored, x->coded_len));
}

static void extent_end(struct extent_of *x)
{
    codec_free(x->c);
    mem_free(x->raw);
    mem_free(x->coded);
    mem_free(x->back);
}

/* In pieces that end within blocks of the hash, at their ends, and several in one of them. */
static int extent_back(struct extent_of *x, uint32_t coded_len)
{
    static const uint32_t end[] = {2, 4, 64, 1u << 14, (3u << 14) + 2, 400002};
    struct codec_piece to[7];
    uint32_t at = 0, n = 0;
    struct larder_err e;

    for (size_t i = 0; i < 6 && end[i] < x->len; i++, n++) {
        to[n] = (struct codec_piece){x->back + at, end[i] - at};
        at = end[i];
    }
    to[n] = (struct codec_piece){x->back + at, x->len - at};
    return codec_decode(x->c, x->kind, x->coded, coded_len, x->len, x->hash, to, &e);
}

static void extents_of_every_codec_come_back(void **state)
{
    static const enum codec_kind kinds[] = {CODEC_RAW, CODEC_PLANES, CODEC_ZSTD, CODEC_TIERS};
    static const uint32_t shape[][2] = {{1, 64}, {333, 64}, {8192, 64}, {70, 80}, {512, 1024}};
    struct extent_of x;

    (void)state;
    for (size_t k = 0; k < 4; k++)
        for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
            extent_make(&x, shape[s][0], shape[s][1], kinds[k]);
            assert_int_equal(extent_back(&x, x.coded_len), 0);
            assert_memory_equal(x.back, x.raw, x.len);
            if (shape[s][0] == 8192 && (kinds[k] == CODEC_PLANES || kinds[k] == CODEC_TIERS)) {
                assert_int_equal(x.kind, kinds[k]);
                assert_true(x.coded_len < x.len / 1.4);
            }
            extent_end(&x);
        }
}

static void what_does_not_compress_is_stored_raw(void **state)
{
    struct codec *c = must(codec_new());
    uint8_t *raw = must(mem_alloc(EXTENT_RAW_MAX, 1)), hash[EXTENT_HASH_LEN];
    struct channel_rows rows = {0};
    const void *stored;
    enum codec_kind kind;
    uint64_t seed = 1;
    uint32_t len;

    (void)state;
    for (uint32_t i = 0; i < EXTENT_RAW_MAX; i++)
        raw[i] = (uint8_t)test_rand(&seed);
    channels_add(&rows, EXTENT_RAW_MAX / 2, 64);
    for (int k = CODEC_PLANES; k <= CODEC_TIERS; k++) {
        struct codec_input in = {raw, EXTENT_RAW_MAX, &rows};

        assert_int_equal(codec_encode(c, (enum codec_kind)k, &in, &kind, &stored, &len, hash, NULL),
                         0);
        assert_int_equal(kind, CODEC_RAW);
        assert_int_equal(len, EXTENT_RAW_MAX);
    }
    codec_free(c);
    mem_free(raw);
}

static void damage_is_found_wherever_it_is(void **state)
{
    static const enum codec_kind kinds[] = {CODEC_RAW, CODEC_PLANES, CODEC_ZSTD, CODEC_TIERS};
    struct extent_of x;

    (void)state;
    for (size_t k = 0; k < 4; k++) {
        extent_make(&x, 100, 64, kinds[k]);
        for (uint32_t at = 0; at < x.coded_len; at += 1 + at / 40) {
            x.coded[at] ^= 0x10;
            /* a bit that changes nothing (padding) may pass, wrong bytes may not */
            if (!extent_back(&x, x.coded_len))
                assert_memory_equal(x.back, x.raw, x.len);
            x.coded[at] ^= 0x10;
            assert_int_equal(extent_back(&x, at), LARDER_EDAMAGED);
        }
        x.hash[3] ^= 1;
        assert_int_equal(extent_back(&x, x.coded_len), LARDER_EDAMAGED);
        extent_end(&x);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_in_tiers_come_back_from_every_kernel),
        cmocka_unit_test(tiers_of_a_wrong_size_are_refused),
        cmocka_unit_test(planes_come_back_in_any_pieces),
        cmocka_unit_test(a_base_is_the_exponent_of_its_channel),
        cmocka_unit_test(channels_that_lie_are_refused),
        cmocka_unit_test(extents_of_every_codec_come_back),
        cmocka_unit_test(what_does_not_compress_is_stored_raw),
        cmocka_unit_test(damage_is_found_wherever_it_is),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
