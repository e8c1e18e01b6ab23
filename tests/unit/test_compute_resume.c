/* New rows on stored ones: backend cpu against ref, whatever the number of rows, their type, bias and
 * window, and bit for bit the same with one thread and with three. */
#include "testlib.h"

#include <math.h>

#include "cpu.h"
#include "fake_model.h"
#include "half.h"

enum { D = FAKE_HEAD_DIM, MOST = 5000, MOST_NEW = 300, STRIDE = MOST_NEW + 5 };

struct setup {
    uint32_t n_past[FAKE_KV_HEADS], n_new, n_tail;
    enum kv_dtype stored;
    bool bias;
    uint32_t sliding; /* 0: none */
};

struct rows {
    float *wide, *bias;
    uint32_t *position;
    uint8_t *tile[FAKE_KV_HEADS][2];
    float *q, *k, *v, *o;
    struct past_rows past[FAKE_KV_HEADS];
};

static void *room(size_t n)
{
    void *p = malloc(n + 1);

    assert_non_null(p);
    return p;
}

static float *random_rows(uint64_t n, float size, uint64_t *seed)
{
    float *x = room(n * sizeof *x);

    for (uint64_t i = 0; i < n; i++)
        x[i] = size * test_randf(seed);
    return x;
}

static void store_as(enum kv_dtype t, bool keys, const float *x, uint32_t n, uint8_t *tile)
{
    if (t == KV_F32)
        memcpy(tile, x, (uint64_t)n * D * sizeof *x);
    else if (t == KV_BF16)
        for (uint64_t i = 0; i < (uint64_t)n * D; i++)
            ((uint16_t *)(void *)tile)[i] = f32_to_bf16(x[i]);
    else
        (keys ? packed_from_k : packed_from_v)(t, x, n, D, tile);
}

static void make_rows(const struct setup *s, struct rows *r)
{
    uint64_t seed = 7 + s->n_past[0];

    r->wide = random_rows(MOST * D, 2, &seed);
    r->bias = random_rows(MOST, 3, &seed);
    r->position = room(MOST * sizeof *r->position);
    for (uint32_t i = 0; i < MOST; i++)
        r->position[i] = 2 * i; /* every second one was dropped */
    for (int g = 0; g < FAKE_KV_HEADS; g++) {
        for (int i = 0; i < 2; i++) {
            r->tile[g][i] = room(4ull * MOST * D);
            store_as(s->stored, !i, r->wide + (uint64_t)(g + i) * 7, s->n_past[g], r->tile[g][i]);
        }
        r->past[g] = (struct past_rows){
            s->n_past[g], s->stored, r->tile[g][0], r->tile[g][1], s->bias ? r->bias : NULL,
            r->position};
    }
    r->q = random_rows(FAKE_HEADS * STRIDE * D, 1, &seed);
    r->k = random_rows(FAKE_KV_HEADS * STRIDE * D, 1, &seed);
    r->v = random_rows(FAKE_KV_HEADS * STRIDE * D, 1, &seed);
    r->o = room(FAKE_HEADS * MOST_NEW * D * sizeof *r->o);
}

static void drop_rows(struct rows *r)
{
    for (int g = 0; g < FAKE_KV_HEADS; g++)
        for (int i = 0; i < 2; i++)
            free(r->tile[g][i]);
    free(r->wide);
    free(r->bias);
    free(r->position);
    free(r->q);
    free(r->k);
    free(r->v);
    free(r->o);
}

static float *attended(const char *backend, uint32_t n_threads, const struct setup *s,
                       const struct rows *rows)
{
    struct backend_opts o = {.dtype = KV_F32, .n_threads = n_threads};
    struct model m = fake_model();
    struct backend *b = NULL;
    uint64_t n = (uint64_t)s->n_new * FAKE_HEADS * D;
    float *out = room(n * sizeof *out);
    struct resume r = {.q = rows->q,
                       .k = rows->k,
                       .v = rows->v,
                       .n_new = s->n_new,
                       .n_tail = s->n_tail,
                       .q_stride = STRIDE,
                       .stride = STRIDE,
                       .past = rows->past,
                       .o = out,
                       .sliding = s->sliding,
                       .pos0 = 2 * MOST};
    struct larder_err e;

    assert_int_equal(backend_find(backend)->open(&b, &m, &o, &e), 0);
    for (int again = 0; again < 2; again++) { /* what is kept between calls does not show */
        memset(out, 0xff, n * sizeof *out);
        assert_int_equal(b->ops->resume(b, &r, &e), 0);
    }
    b->ops->close(b);
    return out;
}

static void check(const struct setup *s)
{
    uint64_t n = (uint64_t)s->n_new * FAKE_HEADS * D;
    struct rows r;
    float *want, *got, *again;

    make_rows(s, &r);
    want = attended("ref", 1, s, &r);
    got = attended("cpu", 1, s, &r);
    again = attended("cpu", 3, s, &r);
    for (uint64_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) < 2e-5f))
            fail_msg("%u and %u rows of type %d, %u new of %u, window %u: %g, not %g", s->n_past[0],
                     s->n_past[1], s->stored, s->n_new, s->n_tail, s->sliding, got[i], want[i]);
    assert_memory_equal(got, again, n * sizeof *got);
    free(want);
    free(got);
    free(again);
    drop_rows(&r);
}

static const enum kv_dtype types[] = {KV_F32, KV_BF16, KV_INT8, KV_INT4};

static void every_type_at_every_size(void **state)
{
    static const uint32_t past[][2] = {{0, 1},     {3, 4},     {5, 127},
                                       {128, 129}, {255, 257}, {1000, 36}};
    static const uint32_t new_rows[][2] = {{1, 1}, {1, 9}, {3, 3}, {20, 31}};

    (void)state;
    for (int t = 0; t < 4; t++)
        for (int p = 0; p < 6; p++)
            for (int n = 0; n < 4; n++)
                check(&(struct setup){{past[p][0], past[p][1]},
                                      new_rows[n][0],
                                      new_rows[n][1],
                                      types[t],
                                      (p + n) % 2,
                                      0});
}

/* Where the processor multiplies bf16, new rows and outputs are bf16. Attention is f32 all the same,
 * so a backend that is told so serves for it here. */
static void new_rows_in_bf16(void **state)
{
    enum { NEW = 5, TAIL = 9, QS = FAKE_HEADS * STRIDE * D, KS = FAKE_KV_HEADS * STRIDE * D };
    const struct setup s = {{300, 77}, NEW, TAIL, KV_INT4, true, 0};
    static uint16_t q[QS], k[KS], v[KS], got[NEW * FAKE_HEADS * D];
    struct backend_opts o = {.dtype = KV_F32, .n_threads = 2};
    struct model m = fake_model();
    struct backend *b = NULL;
    struct rows r;
    float *want;

    (void)state;
    make_rows(&s, &r);
    for (int i = 0; i < QS; i++)
        r.q[i] = bf16_to_f32(q[i] = f32_to_bf16(r.q[i]));
    for (int i = 0; i < KS; i++) {
        r.k[i] = bf16_to_f32(k[i] = f32_to_bf16(r.k[i]));
        r.v[i] = bf16_to_f32(v[i] = f32_to_bf16(r.v[i]));
    }
    want = attended("ref", 1, &s, &r);
    assert_int_equal(backend_find("cpu")->open(&b, &m, &o, NULL), 0);
    b->elem = KV_BF16;
    assert_int_equal(b->ops->resume(b,
                                    &(struct resume){.q = q,
                                                     .k = k,
                                                     .v = v,
                                                     .n_new = NEW,
                                                     .n_tail = TAIL,
                                                     .q_stride = STRIDE,
                                                     .stride = STRIDE,
                                                     .past = r.past,
                                                     .o = got},
                                    NULL),
                     0);
    b->ops->close(b);
    for (int i = 0; i < NEW * FAKE_HEADS * D; i++)
        if (!(fabsf(bf16_to_f32(got[i]) - want[i]) <= fabsf(want[i]) / 256 + 2e-5f))
            fail_msg("%g, not %g", bf16_to_f32(got[i]), want[i]);
    free(want);
    drop_rows(&r);
}

/* More chunks than the smallest, and more new rows than are taken at once. */
static void long_pasts_and_long_questions(void **state)
{
    (void)state;
    for (int t = 0; t < 4; t++) {
        check(&(struct setup){{MOST - 2, 4097}, 2, 2, types[t], t % 2, 0});
        check(&(struct setup){{700, 300}, MOST_NEW, MOST_NEW, types[t], !(t % 2), 0});
        check(&(struct setup){{700, 300}, CPU_MANY_ROWS - 1, CPU_MANY_ROWS + 3, types[t], true, 0});
    }
}

/* Windows that begin in stored rows, at their end and in the tail: the last stored row has
 * position 1998, the tail begins at 10000. */
static void a_window_hides_what_is_far(void **state)
{
    static const uint32_t window[] = {1, 4, 12, 10000, 9000, 8500, 8030};

    (void)state;
    for (int t = 0; t < 4; t++)
        for (int w = 0; w < 7; w++)
            check(&(struct setup){{1000, 600}, 5, 12, types[t], w % 2, window[w]});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_at_every_size),
        cmocka_unit_test(new_rows_in_bf16),
        cmocka_unit_test(long_pasts_and_long_questions),
        cmocka_unit_test(a_window_hides_what_is_far),
    };

    return cmocka_run_group_tests_name("prefill_resume", tests, NULL, NULL);
}
