/* store.h - the persistent store of pruned KV caches (FORMAT.md).
 *
 * Purpose    Map a 32-byte key to the rows that survived pruning and to everything that
 *            describes them. An entry becomes visible only whole, after a durable commit;
 *            every byte is verified on every read. Beside entries: names, a prefix index
 *            over tokens and text, tombstones, the job queue and small settings.
 * Units      Bytes, rows, tokens; times are Unix seconds.
 * Ownership  store_open() allocates, store_close() frees. Opaque objects have their own
 *            release function, which accepts NULL. `const` pointers inside info structs are
 *            borrowed from the object they came from.
 * Threads    One `struct store` may be shared: it locks inside. A store_put or store_entry
 *            belongs to one thread at a time, except store_entry_decode(), which any number
 *            of threads may call on one entry. No LMDB transaction outlives a call.
 * Fork       Open after fork(), never before.
 * Errors     0 or LARDER_E*; nothing here logs, prints or exits. LARDER_EDAMAGED: bytes fail
 *            verification; LARDER_EFULL: over budget even after eviction, or the disk
 *            is full, the store is unchanged. After LARDER_EIO from a commit the store refuses
 *            further writes: restart.
 */
#ifndef LARDER_STORE_H
#define LARDER_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "geom.h"
#include "larder_status.h"

#define STORE_KEY_LEN 32

struct store;
struct store_put;
struct store_entry;

/* How bf16 rows are coded when they are written; either is read (FORMAT.md section 3). */
enum store_codec {
    STORE_FAST, /* tiers */
    STORE_ZSTD, /* planes, whose exponents any zstd decodes */
};

struct store_opts {
    const char *dir;       /* must exist, 0700, on a local file system; used during the call only */
    uint64_t store_budget; /* bytes of manifests and extents, as stored_bytes counts; never 0 */
    enum store_codec codec;
    bool allow_any_fs; /* do not refuse network, FUSE or overlay file systems */
};

int store_open(struct store **ret, const struct store_opts *opts, struct larder_err *e);
void store_close(struct store *s);

/* ---- describing an entry */

/* Identity, in the order in which it is hashed (PROTOCOL.md section 2). */
struct store_ident {
    uint8_t model_fp[32];
    uint8_t tokenizer_fp[32];
    uint8_t template_fp[32];
    const char *policy; /* canonical */
    const char *ns;
    const uint32_t *tokens; /* [n_tokens] */
    uint32_t n_tokens;      /* == n_ctx */
};
int store_key(const struct store_ident *id, uint8_t ret[STORE_KEY_LEN], struct larder_err *e);

struct store_info {
    uint8_t key[STORE_KEY_LEN];
    struct store_ident ident;
    struct kv_geom geom;
    enum kv_dtype precision; /* KV_BF16, KV_INT8 or KV_INT4 */
    bool has_bias;
    bool renumbered;
    uint32_t n_ctx, next_pos, n_vocab;
    int32_t sel_layer;   /* -1: none */
    const char *model;   /* configured name when it was stored */
    const char *tmpl;    /* template name */
    const char *backend; /* "cpu/bf16/avx512_bf16" */
    const char *extra;   /* JSON: rank_variance, certificate, ...; opaque to the store */
    const char *text;    /* rendered text, text_len bytes */
    uint64_t text_len;
    const float *logits;  /* [n_vocab] of the last row, stored as f16 */
    const uint32_t *rows; /* [n_layers * n_kv_heads]; filled by the store on read, ignored on put */
    uint64_t prefill_ms;
    uint64_t created;
    /* filled by the store on read: */
    const char *name; /* without namespace; NULL when unnamed */
    bool pinned;
    bool damaged; /* quarantined by an earlier failed verification */
    uint64_t hits, last_used;
    uint64_t stored_bytes; /* manifest + extents */
    uint64_t raw_bytes;    /* rows before compression */
};

/* ---- writing: begin, layers in ascending order, commit */

struct store_rows {
    uint32_t n_rows;
    const uint32_t *position; /* ascending, < n_ctx */
    const void *k,
        *v; /* tiles in the entry's precision: bf16 [rows][head_dim], or packed (FORMAT.md) */
    const float *bias; /* [n_rows] when has_bias; stored as bf16 */
};

int store_put_begin(struct store *s, struct store_put **ret, const struct kv_geom *geom,
                    enum kv_dtype precision, bool has_bias, struct larder_err *e);

/* heads: [n_kv_heads]; copied. Full extents are compressed and written (in transactions of
 * their own, invisible until the commit), so memory stays bounded. */
int store_put_layer(struct store_put *p, const struct store_rows *heads, struct larder_err *e);

/* Write manifest, index, tokens, text, logits; evict what the budget needs; name the entry when
 * `name` is not NULL (moving the name if it was taken). Durable when it returns 0. `info->key` is
 * computed here. Replaces an entry of the same key. Always ends the put. */
int store_put_commit(struct store_put *p, const struct store_info *info, const char *name, bool pin,
                     uint8_t ret_key[STORE_KEY_LEN], struct larder_err *e);
void store_put_abort(struct store_put *p);

/* ---- reading */

/* Manifest of an entry, verified; text, tokens and logits are loaded by store_entry_load(). */
int store_entry_open(struct store *s, const uint8_t key[STORE_KEY_LEN], struct store_entry **ret,
                     struct larder_err *e);
void store_entry_close(struct store_entry *en);
const struct store_info *store_entry_info(const struct store_entry *en);

/* Read and verify tokens, text, logits, extra and positions. */
int store_entry_load(struct store_entry *en, struct larder_err *e);

/* Original positions of the rows of (layer, head); after store_entry_load(). */
const uint32_t *store_entry_positions(const struct store_entry *en, uint32_t layer, uint32_t head);

/* Memory that rows are decoded into. Where decoding fails, what lies there is undefined. */
struct store_sink {
    uint8_t *base;
    const struct store_target *target; /* [n_layers * n_kv_heads] */
    /* Called before bytes [at, at + n) of it are written, from any number of threads at a time;
     * fails with LARDER_E*. NULL: they can be written. */
    int (*room)(void *arg, uint64_t at, uint64_t n, struct larder_err *e);
    void *arg;
};

/* Other bytes into the same memory. */
int store_sink_put(const struct store_sink *to, uint64_t at, const void *bytes, uint64_t n,
                   struct larder_err *e);

/* Offsets from the base: of the rows of one (layer, KV head). */
struct store_target {
    uint64_t k, v; /* bf16 rows, or tile_bytes_k() and tile_bytes_v() of the entry's precision */
    uint64_t bias; /* f32; with has_bias */
};

/* Rows are read `as` KV_BF16, into which packed ones are expanded, or in the entry's own precision.
 * They come in independent parts: number i (< store_entry_n_extents()) is decoded and verified.
 * A part is an extent, or a layer where rows are expanded. */
uint32_t store_entry_n_extents(const struct store_entry *en, enum kv_dtype as);
int store_entry_decode(const struct store_entry *en, enum kv_dtype as, uint32_t i,
                       const struct store_sink *to, struct larder_err *e);

/* ---- names, lists, life */

int store_find_name(struct store *s, const char *ns, const char *name,
                    uint8_t ret_key[STORE_KEY_LEN], struct larder_err *e);
/* Give an entry a (further or other) name. */
int store_set_name(struct store *s, const uint8_t key[STORE_KEY_LEN], const char *ns,
                   const char *name, struct larder_err *e);

/* Longest stored prefix of `data` among entries for which accept() is true. Tokens are compared in
 * full before it answers. n_bytes counts bytes in both kinds. */
enum store_prefix_kind { STORE_PREFIX_TOKENS, STORE_PREFIX_TEXT };
typedef bool store_accept(void *arg, const struct store_info *info);
int store_find_prefix(struct store *s, enum store_prefix_kind kind, const void *data,
                      uint64_t n_bytes, store_accept *accept, void *arg,
                      uint8_t ret_key[STORE_KEY_LEN], uint64_t *ret_matched, struct larder_err *e);

/* Up to `limit` entries in key order after `after` (NULL: from the start); visit() gets manifests
 * without text, tokens and logits; a false return stops. */
typedef bool store_visit(void *arg, const struct store_info *info);
int store_list(struct store *s, const uint8_t *after, uint32_t limit, store_visit *visit, void *arg,
               struct larder_err *e);

int store_delete(struct store *s, const uint8_t key[STORE_KEY_LEN], uint64_t *ret_freed,
                 struct larder_err *e);
int store_pin(struct store *s, const uint8_t key[STORE_KEY_LEN], bool pin, struct larder_err *e);

/* Count a use; kept in memory and written with the next commit. */
void store_touch(struct store *s, const uint8_t key[STORE_KEY_LEN], uint64_t now);

/* Mark as damaged: it is reported, never served, and may be replaced or removed. */
int store_quarantine(struct store *s, const uint8_t key[STORE_KEY_LEN], struct larder_err *e);

/* Re-read and re-hash everything of one entry. */
int store_verify(struct store *s, const uint8_t key[STORE_KEY_LEN], uint64_t *ret_bytes,
                 struct larder_err *e);

/* Why an entry is gone: 'e' evicted, 'r' removed; the most recent 65,536 are remembered. */
int store_tombstone(struct store *s, const uint8_t key[STORE_KEY_LEN], char *ret_why,
                    uint64_t *ret_when, struct larder_err *e);

struct store_stats {
    uint64_t budget, used, entries, pinned, damaged, evicted, file_bytes;
};
int store_stats(struct store *s, struct store_stats *ret, struct larder_err *e);

/* ---- source index: digest of (namespace, model, policy, template, document) -> key, so that
 * a document already stored is recognised without tokenising it again. */
int store_find_source(struct store *s, const uint8_t digest[32], uint8_t ret_key[STORE_KEY_LEN],
                      struct larder_err *e);
int store_set_source(struct store *s, const uint8_t digest[32], const uint8_t key[STORE_KEY_LEN],
                     struct larder_err *e);

/* ---- the job queue: durable when the call returns */
int store_job_put(struct store *s, uint64_t id, const char *json, const void *doc, uint64_t doc_len,
                  struct larder_err *e); /* doc NULL: keep what is there */
int store_job_delete(struct store *s, uint64_t id, struct larder_err *e);
/* doc is owned by the caller (mem_free); both outputs may be NULL. */
int store_job_get(struct store *s, uint64_t id, char **ret_json, void **ret_doc,
                  uint64_t *ret_doc_len, struct larder_err *e);
typedef bool store_job_visit(void *arg, uint64_t id, const char *json);
int store_job_list(struct store *s, store_job_visit *visit, void *arg, struct larder_err *e);

/* ---- small settings (model fingerprints, ...): NULL value deletes */
int store_setting_put(struct store *s, const char *key, const char *value, struct larder_err *e);
int store_setting_get(struct store *s, const char *key, char **ret, struct larder_err *e);

#endif
