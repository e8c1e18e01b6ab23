/* Replays of a share of the tokens: which they are, and what is repeated. */
#include "engine_fixture.h"

#include "mem.h"
#include "pick.h"

enum { CHUNK = 64 };

static struct replay *make_plan(const struct model *m, const uint32_t *ids)
{
    struct replay *r = NULL;

    assert_int_equal(replay_plan(&r, m, NULL, ids, N, CHUNK, NULL), 0);
    return r;
}

static void pick(const struct model *m, uint32_t threads, const uint32_t *ids, uint32_t percent,
                 bool *chosen)
{
    struct backend *b = open_backend(m, threads);
    struct engine_doc doc = {ids, N, NULL, NULL};
    struct replay *r = make_plan(m, ids);

    assert_int_equal(pick_tokens(b, &doc, r, percent, NULL, chosen, NULL), 0);
    replay_free(r);
    b->ops->close(b);
}

static void a_share_of_every_chunk_is_chosen(void **state)
{
    struct model m = fake_model();
    bool half[N], quarter[N], again[N];
    uint32_t ids[N];

    (void)state;
    make_ids(ids, N);
    pick(&m, 1, ids, 50, half);
    pick(&m, 3, ids, 50, again);
    pick(&m, 1, ids, 25, quarter);
    assert_memory_equal(half, again, sizeof half);
    for (uint32_t at = 0; at < N; at += CHUNK) {
        uint32_t end = at + CHUNK < N ? at + CHUNK : N, n_half = 0, n_quarter = 0;

        for (uint32_t i = at; i < end; i++) {
            n_half += half[i];
            n_quarter += quarter[i];
            assert_true(half[i] || !quarter[i]); /* the best of the best */
        }
        assert_int_equal(n_half, (end - at + 1) / 2);
        assert_int_equal(n_quarter, (end - at + 3) / 4);
    }
}

static void only_chosen_tokens_are_repeated(void **state)
{
    struct model m = fake_model();
    uint32_t ids[N], at = 0;
    struct replay *r;
    bool chosen[N];

    (void)state;
    make_ids(ids, N);
    for (uint32_t i = 0; i < N; i++)
        chosen[i] = i % 3 == 1;
    r = make_plan(&m, ids);
    replay_thin(r, ids, chosen);
    for (uint32_t c = 0; c < r->n_chunks; c++) {
        assert_int_equal(r->chunk[c].first, at);
        for (uint32_t i = r->chunk[c].start; i < r->chunk[c].end; i++) {
            if (!chosen[i])
                continue;
            assert_int_equal(r->ids[at], ids[i]);
            assert_int_equal(r->pos[at], N + at - r->chunk[c].first);
            at++;
        }
        assert_int_equal(r->chunk[c].first + r->chunk[c].n, at);
        assert_true(r->chunk[c].n <= r->max_rows);
    }
    assert_int_equal(r->n_rows, at);
    replay_free(r);
}

static void a_policy_replays_the_share_it_says(void **state)
{
    struct model m = fake_model();
    struct outcome all = run(&m, N, "kvzip,shape=uniform,chunk=64,rows=50%");
    struct outcome half = run(&m, N, "kvzip,shape=uniform,chunk=64,rows=50%,replay=50%");

    (void)state;
    assert_string_equal(all.passes, "prefill ");
    assert_string_equal(half.passes, "select prefill ");
    assert_same_logits(&all, &half); /* the document itself is the same */
    assert_int_equal(half.head[0].n_rows, N / 2);
    assert_memory_not_equal(all.head[5].position, half.head[5].position, N / 2 * sizeof(uint32_t));
    drop(&all);
    drop(&half);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_share_of_every_chunk_is_chosen),
        cmocka_unit_test(only_chosen_tokens_are_repeated),
        cmocka_unit_test(a_policy_replays_the_share_it_says),
    };

    return run_on_every_backend(tests, sizeof tests / sizeof tests[0]);
}
