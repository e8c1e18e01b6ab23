/* index.c - longest stored prefix of a prompt, and the source index.
 *
 * The one idea: an entry of n bytes (token ids or text) is filed once, under the hash of
 * its largest whole number of 256-byte blocks; the rest, its tail, is filed by length and hash
 * beneath. A look-up hashes the prompt once, asks at each block boundary from the longest
 * down whether anything is filed there, and jumps between the tail lengths that exist.
 * What it finds is compared in full before it counts. */
#include <string.h>

#include "bytes.h"
#include "mem.h"
#include "sha256.h"
#include "store_int.h"

#define BLOCK 256u
#define HASH_LEN 16u
#define GROUP_LEN (1 + HASH_LEN)               /* kind, block hash */
#define KEY_LEN (GROUP_LEN + 1 + HASH_LEN + 8) /* + 255 - tail length, tail hash, entry id */

/* First 16 bytes of SHA-256 over the kind byte and data. */
static void hash16(uint8_t kind, const uint8_t *p, size_t n, uint8_t out[HASH_LEN],
                   struct sha256 *h)
{
    uint8_t digest[SHA256_LEN];

    sha256_add(h, &kind, 1);
    sha256_add(h, p, n);
    sha256_get(h, digest);
    memcpy(out, digest, HASH_LEN);
}

static int prefix_key(uint8_t kind, const uint8_t *p, uint64_t n, uint64_t entry_id,
                      uint8_t out[KEY_LEN], struct larder_err *e)
{
    uint64_t tail = n % BLOCK;
    struct sha256 *blocks = sha256_new(), *rest = sha256_new();
    int rc = 0;

    if (blocks && rest) {
        out[0] = kind;
        hash16(kind, p, (size_t)(n - tail), out + 1, blocks);
        out[GROUP_LEN] = (uint8_t)(255 - tail);
        hash16(kind, p + n - tail, (size_t)tail, out + GROUP_LEN + 1, rest);
        be64(entry_id, out + GROUP_LEN + 1 + HASH_LEN);
    } else {
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to index an entry");
    }
    sha256_free(blocks);
    sha256_free(rest);
    return rc;
}

/* Token ids as the bytes that are hashed. */
static uint8_t *token_bytes(const uint32_t *tokens, uint32_t n)
{
    uint8_t *b = mem_alloc(n, 4);
    struct wr w = wr_init(b, 4ull * n);

    for (uint32_t i = 0; b && i < n; i++)
        wr_u32(&w, tokens[i]);
    return b;
}

/* Both index keys of an entry. */
static int keys_of(const struct store_info *info, uint64_t entry_id, uint8_t out[2][KEY_LEN],
                   struct larder_err *e)
{
    uint8_t *tokens = token_bytes(info->ident.tokens, info->n_ctx);
    int rc;

    if (!tokens)
        return larder_fail(e, LARDER_ENOMEM, "no memory to index an entry");
    rc = prefix_key(STORE_PREFIX_TOKENS, tokens, 4ull * info->n_ctx, entry_id, out[0], e);
    if (!rc)
        rc = prefix_key(STORE_PREFIX_TEXT, (const uint8_t *)info->text, info->text_len, entry_id,
                        out[1], e);
    mem_free(tokens);
    return rc;
}

int prefix_add(const struct store *s, MDB_txn *txn, const struct manifest *m,
               const struct store_info *info, struct larder_err *e)
{
    uint8_t key[2][KEY_LEN];
    int rc = keys_of(info, m->entry_id, key, e);

    for (int i = 0; !rc && i < 2; i++)
        if (i == 0 || info->text_len)
            rc = db_put(s, txn, DB_prefix, key[i], KEY_LEN, info->key, STORE_KEY_LEN, e);
    return rc;
}

int prefix_remove(const struct store *s, MDB_txn *txn, const struct store_info *info,
                  uint64_t entry_id, struct larder_err *e)
{
    uint8_t key[2][KEY_LEN];
    int rc = keys_of(info, entry_id, key, e);

    for (int i = 0; !rc && i < 2; i++)
        rc = db_del(s, txn, DB_prefix, key[i], KEY_LEN, e);
    return rc;
}

/* ---- look-up */

struct search {
    struct store *s;
    MDB_txn *txn;
    MDB_cursor *c;
    uint8_t kind;
    const uint8_t *data;
    uint64_t n;
    store_accept *accept;
    void *arg;
    uint8_t key[STORE_KEY_LEN]; /* found */
    uint64_t matched;
};

/* Is this entry's whole content the first bytes of the prompt, and acceptable? */
static int confirm(struct search *q, const uint8_t *key, bool *ret, struct larder_err *e)
{
    struct store_entry *en = NULL;
    const struct store_info *in;
    uint8_t *tokens = NULL;
    const uint8_t *own;
    uint64_t n;
    int rc = entry_open_txn(q->s, q->txn, key, &en, e);

    *ret = false;
    if (!rc)
        rc = entry_load_txn(en, q->txn, e);
    if (rc) {
        store_entry_close(en);
        /* damaged or dangling: not a match, and not this look-up's failure */
        return rc == LARDER_EDAMAGED || rc == LARDER_ENOTFOUND ? 0 : rc;
    }
    in = store_entry_info(en);
    n = q->kind == STORE_PREFIX_TOKENS ? 4ull * in->n_ctx : in->text_len;
    if (q->kind == STORE_PREFIX_TOKENS)
        own = tokens = token_bytes(in->ident.tokens, in->n_ctx);
    else
        own = (const uint8_t *)in->text;
    if (!own)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to compare a prefix");
    else if (n && n <= q->n && !memcmp(own, q->data, n) && !in->damaged && q->accept(q->arg, in)) {
        *ret = true;
        memcpy(q->key, key, STORE_KEY_LEN);
        q->matched = n;
    }
    mem_free(tokens);
    store_entry_close(en);
    return rc;
}

/* Everything filed under one block boundary, longest tail first. */
static int search_group(struct search *q, const uint8_t *group, uint64_t at, bool *ret_found,
                        struct larder_err *e)
{
    uint64_t left = q->n - at;
    uint8_t from[KEY_LEN] = {0};
    MDB_val k, v;
    int rc;

    memcpy(from, group, GROUP_LEN);
    from[GROUP_LEN] = (uint8_t)(left < BLOCK ? 255 - left : 0);
    for (;;) {
        uint8_t tail_hash[HASH_LEN], tail_byte;
        struct sha256 *h;

        k = (MDB_val){KEY_LEN, from};
        rc = mdb_cursor_get(q->c, &k, &v, MDB_SET_RANGE);
        if (rc || k.mv_size != KEY_LEN || memcmp(k.mv_data, group, GROUP_LEN))
            break;
        tail_byte = ((const uint8_t *)k.mv_data)[GROUP_LEN];
        h = sha256_new();
        if (!h)
            return larder_fail(e, LARDER_ENOMEM, "no memory to look up a prefix");
        hash16(q->kind, q->data + at, 255u - tail_byte, tail_hash, h);
        sha256_free(h);
        from[GROUP_LEN] = tail_byte;
        memcpy(from + GROUP_LEN + 1, tail_hash, HASH_LEN);
        memset(from + GROUP_LEN + 1 + HASH_LEN, 0, 8);
        k = (MDB_val){KEY_LEN, from};
        rc = mdb_cursor_get(q->c, &k, &v, MDB_SET_RANGE);
        while (!rc && k.mv_size == KEY_LEN && !memcmp(k.mv_data, from, KEY_LEN - 8)) {
            if (v.mv_size == STORE_KEY_LEN) {
                rc = confirm(q, v.mv_data, ret_found, e);
                if (rc || *ret_found)
                    return rc;
            }
            rc = mdb_cursor_get(q->c, &k, &v, MDB_NEXT);
        }
        if (tail_byte == 255) /* the empty tail was the last */
            return 0;
        from[GROUP_LEN] = (uint8_t)(tail_byte + 1);
        memset(from + GROUP_LEN + 1, 0, HASH_LEN + 8);
    }
    return rc && rc != MDB_NOTFOUND ? lmdb_fail(q->s, rc, "prefix look-up", e) : 0;
}

static int search_all(struct search *q, bool *ret_found, struct larder_err *e)
{
    uint64_t n_blocks = q->n / BLOCK;
    uint8_t(*group)[GROUP_LEN] = mem_alloc(n_blocks + 1, sizeof *group), digest[SHA256_LEN];
    struct sha256 *h = sha256_new();
    int rc = 0;

    if (!group || !h)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to look up a prefix");
    if (!rc)
        sha256_add(h, &q->kind, 1);
    for (uint64_t b = 0; !rc && b <= n_blocks; b++) {
        if (b)
            sha256_add(h, q->data + (b - 1) * BLOCK, BLOCK);
        sha256_get(h, digest);
        group[b][0] = q->kind;
        memcpy(group[b] + 1, digest, HASH_LEN);
    }
    for (uint64_t b = n_blocks + 1; !rc && !*ret_found && b-- > 0;)
        rc = search_group(q, group[b], b * BLOCK, ret_found, e);
    mem_free(group);
    sha256_free(h);
    return rc;
}

int store_find_prefix(struct store *s, enum store_prefix_kind kind, const void *data,
                      uint64_t n_bytes, store_accept *accept, void *arg,
                      uint8_t ret_key[STORE_KEY_LEN], uint64_t *ret_matched, struct larder_err *e)
{
    struct search q = {
        .s = s, .kind = (uint8_t)kind, .data = data, .n = n_bytes, .accept = accept, .arg = arg};
    bool found = false;
    int rc = txn_read(s, &q.txn, e);

    if (rc)
        return rc;
    rc = mdb_cursor_open(q.txn, s->dbi[DB_prefix], &q.c);
    if (rc) {
        rc = lmdb_fail(s, rc, "prefix look-up", e);
    } else {
        rc = search_all(&q, &found, e);
        mdb_cursor_close(q.c);
    }
    mdb_txn_abort(q.txn);
    if (rc)
        return rc;
    if (!found)
        return LARDER_ENOTFOUND;
    memcpy(ret_key, q.key, STORE_KEY_LEN);
    *ret_matched = q.matched;
    return 0;
}

/* ---- sources */

int store_find_source(struct store *s, const uint8_t digest[32], uint8_t ret_key[STORE_KEY_LEN],
                      struct larder_err *e)
{
    MDB_txn *txn;
    MDB_val v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = db_get(s, txn, DB_sources, digest, 32, &v, e);
    if (!rc && v.mv_size != STORE_KEY_LEN)
        rc = larder_fail(e, LARDER_EDAMAGED, "a source record is damaged");
    if (!rc)
        memcpy(ret_key, v.mv_data, STORE_KEY_LEN);
    mdb_txn_abort(txn);
    return rc;
}

int store_set_source(struct store *s, const uint8_t digest[32], const uint8_t key[STORE_KEY_LEN],
                     struct larder_err *e)
{
    struct state st = {0};
    MDB_txn *txn;
    int rc = txn_write(s, &txn, e);

    if (rc)
        return rc;
    rc = state_get(s, txn, key, &st, e);
    /* an entry remembers one source, so that its record goes when the entry goes */
    if (!rc && st.flags & STATE_SOURCE)
        rc = db_del(s, txn, DB_sources, st.source, 32, e);
    if (!rc) {
        st.flags |= STATE_SOURCE;
        memcpy(st.source, digest, 32);
        rc = state_put(s, txn, key, &st, e);
    }
    state_done(&st);
    if (!rc)
        rc = db_put(s, txn, DB_sources, digest, 32, key, STORE_KEY_LEN, e);
    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    return txn_commit(s, txn, e);
}
