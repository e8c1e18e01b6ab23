/* test_ipc_image.c - planning, writing and checking cache images. */
#include "testlib.h"

#include <math.h>

#include "image_plan.h"
#include "packed.h"

struct shape {
    struct kv_geom g;
    enum kv_dtype dtype;
    bool bias, renumbered;
    uint32_t n_ctx, n_vocab;
    uint64_t text_len;
};

static const struct shape shapes[] = {
    {{1, 1, 1, 2}, KV_BF16, false, false, 1, 1, 0},
    {{3, 9, 3, 64}, KV_BF16, false, false, 37, 101, 53},
    {{2, 4, 2, 6}, KV_F32, true, false, 9, 3, 64},
    {{5, 8, 1, 10}, KV_F16, true, true, 33, 17, 1},
    {{2, 2, 2, 128}, KV_BF16, true, false, 300, 1000, 4097},
    {{2, 4, 2, 6}, KV_INT4, true, false, 71, 9, 5},
    {{3, 3, 3, 64}, KV_INT8, false, true, 40, 9, 0},
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

/* A filled image: ragged rows (the first head of a layer may have none), positions that
 * ascend with gaps. */
struct made {
    struct image_plan *plan;
    uint8_t *base; /* 64-byte aligned */
    uint32_t *rows;
};

static void fill(struct made *m, const struct shape *s, uint64_t *seed)
{
    for (uint32_t i = 0; i < s->g.n_layers * s->g.n_kv_heads; i++) {
        const struct image_slot *t = &m->plan->slot[i];
        uint32_t *pos = (uint32_t *)(void *)(m->base + t->position_off);
        float *bias = (float *)(void *)(m->base + t->bias_off);

        for (uint32_t r = 0; r < t->n_rows; r++) {
            pos[r] = s->n_ctx - t->n_rows + r;
            if (s->bias)
                bias[r] = test_randf(seed);
        }
        memset(m->base + t->k_off, 0x11, tile_bytes_k(s->dtype, t->n_rows, s->g.head_dim));
        memset(m->base + t->v_off, 0x22, tile_bytes_v(s->dtype, t->n_rows, s->g.head_dim));
    }
    for (uint32_t i = 0; i < s->n_ctx; i++)
        ((uint32_t *)(void *)(m->base + m->plan->tokens_off))[i] = i % s->n_vocab;
    memset(m->base + m->plan->text_off, 't', s->text_len);
}

static struct image_spec spec_of(const struct shape *s, const uint32_t *rows)
{
    struct image_spec spec = {.geom = s->g,
                              .dtype = s->dtype,
                              .has_bias = s->bias,
                              .renumbered = s->renumbered,
                              .n_ctx = s->n_ctx,
                              .next_pos = s->n_ctx,
                              .n_vocab = s->n_vocab,
                              .text_len = s->text_len,
                              .rows = rows};

    memset(spec.key, 0xaa, 32);
    memset(spec.model_fingerprint, 0xbb, 32);
    memset(spec.tokenizer_fingerprint, 0xcc, 32);
    return spec;
}

static struct made make_image(const struct shape *s)
{
    struct made m = {0};
    struct image_spec spec;
    uint64_t seed = 42;
    uint32_t n = s->g.n_layers * s->g.n_kv_heads;

    m.rows = mem_zalloc(n, sizeof *m.rows);
    for (uint32_t i = 0; i < n; i++)
        m.rows[i] = i == 0 ? s->n_ctx : (uint32_t)(test_rand(&seed) % (s->n_ctx + 1));
    spec = spec_of(s, m.rows);
    assert_int_equal(image_plan_new(&m.plan, &spec, 1 << 24, NULL), 0);
    m.base = mem_aligned(m.plan->n_bytes, 1);
    image_plan_write(m.plan, m.base);
    fill(&m, s, &seed);
    return m;
}

static void drop(struct made *m)
{
    image_plan_free(m->plan);
    mem_free(m->base);
    mem_free(m->rows);
}

static void an_image_survives_the_round_trip(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SHAPES; i++) {
        const struct shape *s = &shapes[i];
        struct made m = make_image(s);
        struct larder_image im;
        struct larder_err e = {0, ""};

        assert_int_equal(larder_image_check(m.base, m.plan->n_bytes, &im, &e), 0);
        assert_int_equal(im.n_layers, s->g.n_layers);
        assert_int_equal(im.n_heads, s->g.n_heads);
        assert_int_equal(im.dtype, s->dtype);
        assert_int_equal(im.next_pos, s->n_ctx);
        assert_int_equal(im.text_len, s->text_len);
        assert_int_equal(im.key[31], 0xaa);
        assert_int_equal(im.model_fingerprint[0], 0xbb);
        assert_int_equal(im.tokenizer_fingerprint[31], 0xcc);
        assert_int_equal(larder_image_tokens(&im)[s->n_ctx - 1], (s->n_ctx - 1) % s->n_vocab);
        for (uint32_t j = 0; j < s->text_len; j++)
            assert_int_equal(larder_image_text(&im)[j], 't');
        for (uint32_t l = 0; l < s->g.n_layers; l++)
            for (uint32_t h = 0; h < s->g.n_kv_heads; h++) {
                struct larder_rows r = larder_image_rows(&im, l, h);

                assert_int_equal(r.n_rows, m.rows[l * s->g.n_kv_heads + h]);
                assert_true(s->bias == (r.bias != NULL));
                assert_int_equal((uintptr_t)r.k % 64, 0);
                assert_int_equal((uintptr_t)r.v % 64, 0);
                if (!h)
                    assert_int_equal(((uintptr_t)r.k - (uintptr_t)m.base) % 4096, 0);
                if (r.n_rows) {
                    assert_int_equal(*(const uint8_t *)r.k, 0x11);
                    assert_int_equal(*(const uint8_t *)r.v, 0x22);
                    assert_int_equal(r.position[r.n_rows - 1], s->n_ctx - 1);
                }
            }
        assert_int_equal(m.plan->n_bytes % 4096, 0);
        drop(&m);
    }
}

static uint64_t touch(const void *p, uint64_t n)
{
    const uint8_t *b = p;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < n; i++)
        sum += b[i];
    return sum;
}

/* Read every byte that the accessors hand out; the sanitizer sees a step outside. */
static uint64_t read_all(const struct larder_image *im)
{
    enum kv_dtype t = (enum kv_dtype)im->dtype;
    uint64_t sum = touch(larder_image_text(im), im->text_len);

    sum += touch(larder_image_tokens(im), 4ull * im->n_tokens);
    sum += touch(larder_image_logits(im), 4ull * im->n_vocab);
    for (uint32_t l = 0; l < im->n_layers; l++)
        for (uint32_t h = 0; h < im->n_kv_heads; h++) {
            struct larder_rows r = larder_image_rows(im, l, h);

            sum += touch(r.k, tile_bytes_k(t, r.n_rows, im->head_dim));
            sum += touch(r.v, tile_bytes_v(t, r.n_rows, im->head_dim));
            sum += touch(r.position, 4ull * r.n_rows);
            if (r.bias)
                sum += touch(r.bias, 4ull * r.n_rows);
        }
    return sum;
}

/* Bytes of the header and the head table that mean something beyond a size or an offset
 * may change and still be legal (a key, next_pos, dtype of equal size); whatever passes
 * must stay inside the image. */
static void a_changed_header_or_table_byte_is_refused_or_harmless(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SHAPES; i++) {
        struct made m = make_image(&shapes[i]);
        uint64_t n = 256 + 40ull * shapes[i].g.n_layers * shapes[i].g.n_kv_heads;
        uint64_t refused = 0, passed = 0, sum = 0;

        for (uint64_t at = 0; at < n; at++)
            for (unsigned v = 0; v < 256; v++) {
                struct larder_image im = {0};
                uint8_t was = m.base[at];

                m.base[at] = (uint8_t)v;
                if (larder_image_check(m.base, m.plan->n_bytes, &im, NULL)) {
                    refused++;
                    assert_null(im.base);
                } else if (v != was && !(at >= 128 && at < 224)) {
                    passed++;
                    sum += read_all(&im);
                }
                m.base[at] = was;
            }
        assert_true(refused > 255 * (n - 96) * 9 / 10);
        assert_true(sum > 0 || !passed);
        drop(&m);
    }
}

static int check_with(struct made *m, uint64_t at, uint64_t value, unsigned width)
{
    struct larder_image im;
    uint8_t was[8];
    int rc;

    memcpy(was, m->base + at, 8);
    memcpy(m->base + at, &value, width);
    rc = larder_image_check(m->base, m->plan->n_bytes, &im, NULL);
    memcpy(m->base + at, was, 8);
    return rc;
}

static void counts_that_overflow_are_refused(void **state)
{
    static const uint64_t hostile[] = {0,          1ull << 31,      UINT32_MAX,        1ull << 63,
                                       UINT64_MAX, UINT64_MAX - 63, UINT64_MAX - 4095, 1ull << 62};
    struct made m = make_image(&shapes[1]);

    (void)state;
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        for (uint64_t at = 8; at < 64; at += 4) { /* version ... n_tokens */
            uint32_t v = (uint32_t)hostile[i];

            if (memcmp(m.base + at, &v, 4))
                assert_true(check_with(&m, at, v, 4) < 0);
        }
        for (uint64_t at = 64; at < 104; at += 8) /* text_len and offsets */
            assert_int_equal(check_with(&m, at, hostile[i], 8), LARDER_EDAMAGED);
        for (uint64_t at = 256; at < 256 + 9 * 40; at += 40) {
            for (uint64_t f = 8; f < 32; f += 8)
                assert_int_equal(check_with(&m, at + f, hostile[i], 8), LARDER_EDAMAGED);
            if ((uint32_t)hostile[i])
                assert_int_equal(check_with(&m, at, (uint32_t)hostile[i], 4), LARDER_EDAMAGED);
        }
    }
    assert_int_equal(check_with(&m, 8, 2, 4), LARDER_EVERSION);
    drop(&m);
}

/* The same counts as another type are another layout. */
static void a_type_of_other_size_is_refused(void **state)
{
    (void)state;
    for (size_t i = 4; i < N_SHAPES; i++) {
        struct made m = make_image(&shapes[i]);

        for (uint32_t t = 0; t < 9; t++)
            if (t != shapes[i].dtype && !(t == KV_F16 && shapes[i].dtype == KV_BF16))
                assert_int_equal(check_with(&m, 28, t, 4), LARDER_EDAMAGED);
        drop(&m);
    }
}

static void contents_that_would_mislead_a_decoder_are_refused(void **state)
{
    struct made m = make_image(&shapes[4]);
    const struct image_slot *t = &m.plan->slot[0];
    float inf = INFINITY, nan_ = NAN, big = 3e38f;
    uint64_t bits = 0;

    (void)state;
    for (uint32_t r = 0; r < t->n_rows; r++) {
        assert_int_equal(check_with(&m, t->position_off + 4ull * r, m.plan->spec.n_ctx, 4),
                         LARDER_EDAMAGED);
        assert_int_equal(check_with(&m, t->position_off + 4ull * r, UINT32_MAX, 4),
                         LARDER_EDAMAGED);
        assert_int_equal(check_with(&m, t->position_off + 4ull * r, 1u << 31, 4), LARDER_EDAMAGED);
        if (r)
            assert_int_equal(check_with(&m, t->position_off + 4ull * r, r - 1, 4), LARDER_EDAMAGED);
        memcpy(&bits, &inf, 4);
        assert_int_equal(check_with(&m, t->bias_off + 4ull * r, bits, 4), LARDER_EDAMAGED);
        memcpy(&bits, &nan_, 4);
        assert_int_equal(check_with(&m, t->bias_off + 4ull * r, bits, 4), LARDER_EDAMAGED);
        memcpy(&bits, &big, 4);
        assert_int_equal(check_with(&m, t->bias_off + 4ull * r, bits, 4), 0);
    }
    for (uint32_t i = 0; i < m.plan->spec.n_ctx; i++) {
        assert_int_equal(check_with(&m, m.plan->tokens_off + 4ull * i, m.plan->spec.n_vocab, 4),
                         LARDER_EDAMAGED);
        assert_int_equal(check_with(&m, m.plan->tokens_off + 4ull * i, UINT32_MAX, 4),
                         LARDER_EDAMAGED);
    }
    drop(&m);
}

static void every_truncation_and_a_misaligned_mapping_are_refused(void **state)
{
    struct larder_image im;

    (void)state;
    for (int shape = 2; shape < (int)N_SHAPES; shape += 3) { /* one of them packed */
        struct made m = make_image(&shapes[shape]);

        for (uint64_t n = 0; n < m.plan->n_bytes; n++) {
            uint8_t *cut = mem_aligned(n, 1);

            memcpy(cut, m.base, n);
            assert_int_equal(larder_image_check(cut, n, &im, NULL), LARDER_EDAMAGED);
            mem_free(cut);
        }
        assert_int_equal(larder_image_check(m.base + 4, m.plan->n_bytes - 4, &im, NULL),
                         LARDER_EINVAL);
        drop(&m);
    }
    assert_int_equal(larder_image_check(NULL, 4096, &im, NULL), LARDER_EINVAL);
}

static void a_stated_size_cut_to_the_file_is_still_refused(void **state)
{
    struct larder_image im;

    (void)state;
    for (size_t shape = 4; shape < N_SHAPES; shape++) {
        struct made m = make_image(&shapes[shape]);

        for (uint64_t n = 4096; n < m.plan->n_bytes; n += 4096) {
            uint8_t *cut = mem_aligned(n, 1);

            memcpy(cut, m.base, n);
            memcpy(cut + 16, &n, 8);
            assert_int_equal(larder_image_check(cut, n, &im, NULL), LARDER_EDAMAGED);
            mem_free(cut);
        }
        drop(&m);
    }
}

static void a_plan_refuses_what_cannot_be_an_image(void **state)
{
    uint32_t rows[2] = {4, 4};
    struct shape s = {{2, 1, 1, 4}, KV_BF16, false, false, 4, 4, 0};
    struct image_spec ok = spec_of(&s, rows), bad;
    struct image_plan *p = NULL;

    (void)state;
    assert_int_equal(image_plan_new(&p, &ok, 8192, NULL), LARDER_ETOOBIG);
    assert_int_equal(image_plan_new(&p, &ok, 3 * 4096, NULL), 0);
    assert_int_equal(p->n_bytes, 3 * 4096);
    image_plan_free(p);
    image_plan_free(NULL);
    p = NULL;
    bad = ok;
    bad.text_len = UINT64_MAX - 100;
    assert_int_equal(image_plan_new(&p, &bad, UINT64_MAX, NULL), LARDER_ETOOBIG);
    bad = ok;
    bad.dtype = (enum kv_dtype)6;
    assert_int_equal(image_plan_new(&p, &bad, 1 << 20, NULL), LARDER_EINVAL);
    bad = ok;
    bad.next_pos = 3;
    assert_int_equal(image_plan_new(&p, &bad, 1 << 20, NULL), LARDER_EINVAL);
    bad.renumbered = true;
    assert_int_equal(image_plan_new(&p, &bad, 1 << 20, NULL), LARDER_EINVAL);
    bad = ok;
    bad.n_ctx = KV_MAX_CTX + 1;
    assert_int_equal(image_plan_new(&p, &bad, 1 << 20, NULL), LARDER_EINVAL);
    bad = ok;
    bad.geom.n_layers = 0;
    assert_int_equal(image_plan_new(&p, &bad, 1 << 20, NULL), LARDER_EINVAL);
    rows[1] = 5;
    assert_int_equal(image_plan_new(&p, &ok, 1 << 20, NULL), LARDER_EINVAL);
    assert_null(p);
}

static void renumbered_keys_may_continue_below_n_ctx(void **state)
{
    uint32_t rows[2] = {3, 2};
    struct shape s = {{2, 1, 1, 4}, KV_BF16, false, true, 9, 4, 0};
    struct image_spec spec = spec_of(&s, rows);
    struct image_plan *p = NULL;
    struct larder_image im;
    uint8_t *base;

    (void)state;
    spec.next_pos = 3;
    assert_int_equal(image_plan_new(&p, &spec, 1 << 20, NULL), 0);
    base = mem_aligned(p->n_bytes, 1);
    image_plan_write(p, base);
    for (int i = 0; i < 2; i++)
        for (uint32_t r = 0; r < rows[i]; r++)
            ((uint32_t *)(void *)(base + p->slot[i].position_off))[r] = 3 * r;
    assert_int_equal(larder_image_check(base, p->n_bytes, &im, NULL), 0);
    assert_int_equal(im.next_pos, 3);
    base[52] = 2;
    assert_int_equal(larder_image_check(base, p->n_bytes, &im, NULL), LARDER_EDAMAGED);
    mem_free(base);
    image_plan_free(p);
}

static void planning_without_memory_fails_cleanly(void **state)
{
    uint32_t rows[2] = {4, 4};
    struct shape s = {{2, 1, 1, 4}, KV_BF16, false, false, 4, 4, 0};
    struct image_spec spec = spec_of(&s, rows);
    struct image_plan *p = NULL;

    (void)state;
    for (long n = 0; n < 3; n++) {
        long left = n;
        int rc;

        mem_set_hook(test_fail_nth, &left);
        rc = image_plan_new(&p, &spec, 1 << 20, NULL);
        mem_set_hook(NULL, NULL);
        assert_int_equal(rc, n < 2 ? LARDER_ENOMEM : 0);
        if (n < 2)
            assert_null(p);
    }
    image_plan_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_image_survives_the_round_trip),
        cmocka_unit_test(a_changed_header_or_table_byte_is_refused_or_harmless),
        cmocka_unit_test(counts_that_overflow_are_refused),
        cmocka_unit_test(a_type_of_other_size_is_refused),
        cmocka_unit_test(contents_that_would_mislead_a_decoder_are_refused),
        cmocka_unit_test(every_truncation_and_a_misaligned_mapping_are_refused),
        cmocka_unit_test(a_stated_size_cut_to_the_file_is_still_refused),
        cmocka_unit_test(a_plan_refuses_what_cannot_be_an_image),
        cmocka_unit_test(renumbered_keys_may_continue_below_n_ctx),
        cmocka_unit_test(planning_without_memory_fails_cleanly),
    };

    return cmocka_run_group_tests_name("ipc_image", tests, NULL, NULL);
}
