/* small_entry.h - synthetic entries without a model, put into a store of their own.
 *
 * Entry number i of a shape is the same in every run. All entries begin with the same tokens, as
 * documents behind one system prompt do; what follows differs, in length too.
 */
#ifndef LARDER_SMALL_ENTRY_H
#define LARDER_SMALL_ENTRY_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "mem.h"
#include "store.h"

#define SMALL_VOCAB 256u
#define SMALL_SHARED 64u
#define SMALL_OWN 8u /* tokens at least, so that no two are the same */
#define SMALL_LENGTHS 56u
#define SMALL_MAX_TOKENS (SMALL_SHARED + SMALL_OWN + SMALL_LENGTHS)
#define SMALL_MAX_HEADS 8u
#define SMALL_NAME_BYTES 24

struct small_shape {
    struct kv_geom geom; /* at most SMALL_MAX_HEADS KV heads */
    uint32_t rows;       /* of each head; at most SMALL_SHARED */
};

/* xorshift64* */
static inline uint64_t small_rand(uint64_t *s)
{
    *s ^= *s >> 12;
    *s ^= *s << 25;
    *s ^= *s >> 27;
    return *s * 0x2545f4914f6cdd1dULL;
}

/* Tokens of entry i, [SMALL_MAX_TOKENS], of which it has as many as are returned; those after
 * them are no entry's. */
static inline uint32_t small_tokens(uint64_t i, uint32_t *tokens)
{
    uint64_t seed = i * 2654435761u + 88172645463325252u;

    for (uint32_t t = 0; t < SMALL_MAX_TOKENS; t++)
        tokens[t] = t < SMALL_SHARED ? t : (uint32_t)(small_rand(&seed) % SMALL_VOCAB);
    return SMALL_SHARED + SMALL_OWN + (uint32_t)(i % SMALL_LENGTHS);
}

static inline void small_name(uint64_t i, char name[SMALL_NAME_BYTES])
{
    snprintf(name, SMALL_NAME_BYTES, "n%llu", (unsigned long long)i);
}

/* Values around one, as rows have them: the exponents compress, the rest does not. */
static inline void small_fill(uint64_t i, uint16_t *v, uint64_t n)
{
    uint64_t seed = i + 88172645463325252u;

    for (uint64_t j = 0; j < n; j++)
        v[j] = (uint16_t)(0x3f00 + (small_rand(&seed) >> 57));
}

/* Put entry i, durably. */
static inline int small_put(struct store *s, const struct small_shape *shape, uint64_t i,
                            const char *name, uint8_t ret_key[STORE_KEY_LEN], struct larder_err *e)
{
    static const float logits[SMALL_VOCAB]; /* all 0 */
    uint32_t tokens[SMALL_MAX_TOKENS], position[SMALL_SHARED], n = small_tokens(i, tokens);
    uint64_t n_values = (uint64_t)shape->rows * shape->geom.head_dim;
    struct store_rows rows[SMALL_MAX_HEADS];
    struct store_info info = {
        .ident = {.policy = "full", .ns = "default", .tokens = tokens, .n_tokens = n},
        .n_ctx = n,
        .next_pos = n,
        .n_vocab = SMALL_VOCAB,
        .sel_layer = -1,
        .model = "synthetic",
        .tmpl = "plain",
        .backend = "none",
        .extra = "{}",
        .text = name,
        .text_len = strlen(name),
        .logits = logits,
        .created = 1000};
    uint16_t *values = mem_alloc(n_values, sizeof *values);
    struct store_put *p = NULL;
    int rc = values ? store_put_begin(s, &p, &shape->geom, KV_BF16, false, e)
                    : larder_fail(e, LARDER_ENOMEM, "no memory for an entry");

    if (rc)
        goto out;
    small_fill(i, values, n_values);
    for (uint32_t r = 0; r < shape->rows; r++)
        position[r] = r;
    for (uint32_t h = 0; h < shape->geom.n_kv_heads; h++)
        rows[h] = (struct store_rows){shape->rows, position, values, values, NULL};
    for (uint32_t l = 0; !rc && l < shape->geom.n_layers; l++)
        rc = store_put_layer(p, rows, e);
    if (rc)
        store_put_abort(p);
    else
        rc = store_put_commit(p, &info, name, false, ret_key, e);
out:
    mem_free(values);
    return rc;
}

#endif
