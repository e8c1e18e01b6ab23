/* store_make.h - a synthetic entry to put into a store and to compare with what comes back. */
#ifndef LARDER_STORE_MAKE_H
#define LARDER_STORE_MAKE_H

#include "half.h"
#include "manifest.h"
#include "packed.h"
#include "store.h"
#include "testlib.h"

#define LAYERS 3
#define HEADS 2
#define DIM 64
#define VOCAB 40
#define MAX_ROWS 4000

struct synthetic {
    struct kv_geom geom;
    enum kv_dtype precision;
    bool has_bias;
    uint32_t n_ctx;
    uint32_t rows[LAYERS][HEADS];
    uint32_t *position[LAYERS][HEADS];
    uint8_t *k[LAYERS][HEADS], *v[LAYERS][HEADS];            /* tiles */
    uint16_t *want_k[LAYERS][HEADS], *want_v[LAYERS][HEADS]; /* bf16 after expansion */
    float *bias[LAYERS][HEADS];                              /* values that bf16 represents */
    uint32_t *tokens;
    float logits[VOCAB];
    struct store_info info;
};

static inline void *must(void *p)
{
    assert_non_null(p);
    return p;
}

static inline void make_head(struct synthetic *y, int l, int h, uint64_t *seed)
{
    uint32_t n = y->rows[l][h], p = 0, d = y->geom.head_dim;
    float *k = must(mem_alloc((uint64_t)n * d, sizeof *k));
    float *v = must(mem_alloc((uint64_t)n * d, sizeof *v));

    y->position[l][h] = must(mem_alloc(n, 4));
    y->bias[l][h] = must(mem_alloc(n, 4));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slack = y->n_ctx - p - (n - i);

        p += slack ? (uint32_t)(test_rand(seed) % 3 ? 0
                                                    : test_rand(seed) % (slack < 5 ? slack + 1 : 5))
                   : 0;
        y->position[l][h][i] = p++;
        y->bias[l][h][i] = bf16_to_f32(f32_to_bf16(test_randf(seed)));
    }
    for (uint64_t i = 0; i < (uint64_t)n * d; i++) {
        k[i] = test_randf(seed) * (float)(1 + i % 7);
        v[i] = test_randf(seed);
    }
    y->k[l][h] = must(mem_zalloc(tile_bytes_k(y->precision, n, d), 1));
    y->v[l][h] = must(mem_zalloc(tile_bytes_v(y->precision, n, d), 1));
    y->want_k[l][h] = must(mem_zalloc((uint64_t)n * d, 2));
    y->want_v[l][h] = must(mem_zalloc((uint64_t)n * d, 2));
    if (y->precision == KV_BF16) {
        for (uint64_t i = 0; i < (uint64_t)n * d; i++) {
            y->want_k[l][h][i] = f32_to_bf16(k[i]);
            y->want_v[l][h][i] = f32_to_bf16(v[i]);
        }
        memcpy(y->k[l][h], y->want_k[l][h], 2ull * n * d);
        memcpy(y->v[l][h], y->want_v[l][h], 2ull * n * d);
    } else {
        packed_from_k(y->precision, k, n, d, y->k[l][h]);
        packed_from_v(y->precision, v, n, d, y->v[l][h]);
        packed_expand_k(y->precision, y->k[l][h], n, d, y->want_k[l][h]);
        packed_expand_v(y->precision, y->v[l][h], n, d, y->want_v[l][h]);
    }
    mem_free(k);
    mem_free(v);
}

/* An entry of n_ctx tokens with ragged rows of d elements; `seed` makes it, so equal seeds are
 * equal. */
static inline struct synthetic *synthetic_of(uint32_t n_ctx, uint32_t d, enum kv_dtype precision,
                                             bool has_bias, uint64_t seed)
{
    struct synthetic *y = must(mem_zalloc(1, sizeof *y));
    uint64_t s = seed * 2654435761u + 1;

    y->geom = (struct kv_geom){LAYERS, HEADS * 2, HEADS, d};
    y->precision = precision;
    y->has_bias = has_bias;
    y->n_ctx = n_ctx;
    y->tokens = must(mem_alloc(n_ctx, 4));
    for (uint32_t i = 0; i < n_ctx; i++)
        y->tokens[i] = (uint32_t)(test_rand(&s) % VOCAB);
    for (int i = 0; i < VOCAB; i++)
        y->logits[i] = (float)(i - 20) / 4;
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < HEADS; h++) {
            y->rows[l][h] = n_ctx - (uint32_t)(test_rand(&s) % (n_ctx / 2 + 1));
            make_head(y, l, h, &s);
        }
    y->info = (struct store_info){
        .ident = {.policy = "full", .ns = "default", .tokens = y->tokens, .n_tokens = n_ctx},
        .n_ctx = n_ctx,
        .next_pos = n_ctx,
        .n_vocab = VOCAB,
        .sel_layer = 1,
        .model = "m",
        .tmpl = "plain",
        .backend = "test",
        .extra = "{\"a\":1}",
        .text = "some text",
        .text_len = 9,
        .logits = y->logits,
        .prefill_ms = 12,
        .created = 1000};
    memset(y->info.ident.model_fp, 1, 32);
    return y;
}

static inline struct synthetic *synthetic_new(uint32_t n_ctx, enum kv_dtype precision,
                                              bool has_bias, uint64_t seed)
{
    return synthetic_of(n_ctx, DIM, precision, has_bias, seed);
}

static inline void synthetic_free(struct synthetic *y)
{
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < HEADS; h++) {
            mem_free(y->position[l][h]);
            mem_free(y->k[l][h]);
            mem_free(y->v[l][h]);
            mem_free(y->want_k[l][h]);
            mem_free(y->want_v[l][h]);
            mem_free(y->bias[l][h]);
        }
    mem_free(y->tokens);
    mem_free(y);
}

static inline int synthetic_put(struct store *s, const struct synthetic *y, const char *name,
                                bool pin, uint8_t key[32], struct larder_err *e)
{
    struct store_put *p = NULL;
    int rc = store_put_begin(s, &p, &y->geom, y->precision, y->has_bias, e);

    for (int l = 0; !rc && l < LAYERS; l++) {
        struct store_rows r[HEADS];

        for (int h = 0; h < HEADS; h++)
            r[h] = (struct store_rows){y->rows[l][h], y->position[l][h], y->k[l][h], y->v[l][h],
                                       y->bias[l][h]};
        rc = store_put_layer(p, r, e);
    }
    if (rc) {
        store_put_abort(p);
        return rc;
    }
    return store_put_commit(p, &y->info, name, pin, key, e);
}

/* Decode the rows as they are stored or as bf16, and compare. */
static inline int synthetic_compare_rows(struct store_entry *en, const struct synthetic *y,
                                         enum kv_dtype as, struct larder_err *e)
{
    struct store_target t[LAYERS * HEADS];
    struct store_sink to = {.target = t};
    uint32_t d = y->geom.head_dim;
    uint64_t at = 0;
    int rc = 0;

    /* Heads of odd layers one after the other, so that extents are decoded in place, others apart. */
    for (int i = 0; i < LAYERS * HEADS; i++) {
        uint32_t n = y->rows[i / HEADS][i % HEADS];
        uint64_t gap = i / HEADS % 2 ? 0 : 64;

        t[i].k = at;
        t[i].v = t[i].k + tile_bytes_k(as, n, d) + gap;
        t[i].bias = t[i].v + tile_bytes_v(as, n, d) + gap;
        at = t[i].bias + (y->has_bias ? 4ull * n : 0) + gap;
    }
    to.base = must(mem_alloc(at, 1));
    memset(to.base, 0xff, at);
    for (uint32_t i = 0; !rc && i < store_entry_n_extents(en, as); i++)
        rc = store_entry_decode(en, as, i, &to, e);
    for (int i = 0; i < LAYERS * HEADS; i++) {
        int l = i / HEADS, h = i % HEADS;
        uint32_t n = y->rows[l][h];

        if (!rc) {
            bool wide = as != y->precision || as == KV_BF16;

            assert_int_equal(store_entry_info(en)->rows[i], n);
            assert_memory_equal(to.base + t[i].k, wide ? (void *)y->want_k[l][h] : y->k[l][h],
                                tile_bytes_k(as, n, d));
            assert_memory_equal(to.base + t[i].v, wide ? (void *)y->want_v[l][h] : y->v[l][h],
                                tile_bytes_v(as, n, d));
            if (y->has_bias)
                assert_memory_equal(to.base + t[i].bias, y->bias[l][h], 4ull * n);
        }
    }
    mem_free(to.base);
    return rc;
}

/* Decode everything and compare; 0 when all is right, else the first failing code. */
static inline int synthetic_compare(struct store *s, const struct synthetic *y,
                                    const uint8_t key[32], struct larder_err *e)
{
    struct store_entry *en = NULL;
    int rc = store_entry_open(s, key, &en, e);

    if (rc)
        return rc;
    rc = synthetic_compare_rows(en, y, KV_BF16, e);
    if (!rc)
        rc = synthetic_compare_rows(en, y, y->precision, e);
    if (!rc)
        rc = store_entry_load(en, e);
    for (int i = 0; !rc && i < LAYERS * HEADS; i++)
        assert_memory_equal(store_entry_positions(en, (uint32_t)(i / HEADS), (uint32_t)(i % HEADS)),
                            y->position[i / HEADS][i % HEADS],
                            4ull * y->rows[i / HEADS][i % HEADS]);
    if (!rc) {
        const struct store_info *in = store_entry_info(en);

        assert_memory_equal(in->ident.tokens, y->tokens, 4ull * y->n_ctx);
        assert_memory_equal(in->logits, y->logits, sizeof y->logits);
        assert_int_equal(in->text_len, y->info.text_len);
        assert_memory_equal(in->text, y->info.text, y->info.text_len);
        assert_string_equal(in->extra, y->info.extra);
        assert_string_equal(in->ident.policy, y->info.ident.policy);
        assert_int_equal(in->sel_layer, 1);
    }
    store_entry_close(en);
    return rc;
}

#endif
