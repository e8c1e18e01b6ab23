/* store_int.h - what the files of store/ share; nobody else includes it.
 *
 * Locks      `write` serialises write transactions (LMDB would too, but by blocking
 *            without a word); `small` guards touches and the scratch pool. `small` may
 *            be taken while `write` is held, never the other way round.
 */
#ifndef LARDER_STORE_INT_H
#define LARDER_STORE_INT_H

#include <lmdb.h>
#include <pthread.h>

#include "codec.h"
#include "manifest.h"
#include "store.h"

/* X(name) - one LMDB database each; the names are part of the format (FORMAT.md). */
#define STORE_DB_LIST(X)                                                                           \
    X(entries)                                                                                     \
    X(state) X(extents) X(names) X(prefix) X(tombs) X(tombseq) X(sources) X(jobs) X(jobdocs)       \
        X(settings) X(meta)

enum store_db {
#define X(name) DB_##name,
    STORE_DB_LIST(X)
#undef X
        N_DBS,
};

#define MAX_TOUCHES 256
#define MAX_SCRATCH 16

struct touch {
    uint8_t key[STORE_KEY_LEN];
    uint64_t hits, last_used;
};

struct store {
    MDB_env *env;
    MDB_dbi dbi[N_DBS];
    int lock_fd, dir_fd;
    pthread_mutex_t write, small;
    bool broken; /* a commit failed: no more writes; under `write` */
    uint64_t budget;
    uint64_t used;         /* bytes of all entries; under `write` */
    int64_t added;         /* to them by the open write transaction; under `write` */
    uint64_t evicted;      /* since open */
    enum codec_kind codec; /* of bf16 rows */
    struct touch touch[MAX_TOUCHES];
    uint32_t n_touch;
    struct codec *scratch[MAX_SCRATCH]; /* idle decoders */
    uint32_t n_scratch;
};

/* ---- transactions */
int txn_read(struct store *s, MDB_txn **ret, struct larder_err *e);
int txn_write(struct store *s, MDB_txn **ret, struct larder_err *e); /* locks */
int txn_commit(struct store *s, MDB_txn *txn, struct larder_err *e); /* unlocks; durable */
void txn_abort(struct store *s, MDB_txn *txn);                       /* unlocks */
int lmdb_fail(const struct store *s, int rc, const char *what, struct larder_err *e);

/* Plain gets and puts; LARDER_ENOTFOUND leaves `e` alone. */
int db_get(const struct store *s, MDB_txn *txn, enum store_db db, const void *key, size_t key_len,
           MDB_val *ret, struct larder_err *e);
int db_put(const struct store *s, MDB_txn *txn, enum store_db db, const void *key, size_t key_len,
           const void *val, size_t val_len, struct larder_err *e);
/* Absent is fine. */
int db_del(const struct store *s, MDB_txn *txn, enum store_db db, const void *key, size_t key_len,
           struct larder_err *e);

/* Counters in `meta`: taken and advanced inside the transaction. */
int meta_next(const struct store *s, MDB_txn *txn, const char *counter, uint64_t *ret,
              struct larder_err *e);

/* ---- the mutable half of an entry (db `state`) */
#define STATE_PINNED 1u
#define STATE_DAMAGED 2u
#define STATE_SOURCE 4u /* `source` is set */
#define STATE_MAX_NAMES 64u

struct state {
    uint32_t flags;
    uint64_t entry_id, hits, last_used, stored_bytes, raw_bytes;
    uint32_t n_ctx;
    uint8_t source[32];
    uint32_t n_names;
    char *names; /* "ns/name" strings, NUL-separated, newest last; owned */
    size_t names_len;
};

int state_get(const struct store *s, MDB_txn *txn, const uint8_t *key, struct state *ret,
              struct larder_err *e);
int state_put(const struct store *s, MDB_txn *txn, const uint8_t *key, const struct state *st,
              struct larder_err *e);
void state_done(struct state *st);
int state_decode(const MDB_val *v, struct state *ret, struct larder_err *e);

/* ---- life.c: inside a write transaction */
int entry_remove(struct store *s, MDB_txn *txn, const uint8_t *key, char why, uint64_t now,
                 uint64_t *ret_freed, struct larder_err *e);
/* Evict until used + need <= budget; `keep` is spared. */
int evict_for(struct store *s, MDB_txn *txn, uint64_t need, const uint8_t *keep, uint64_t now,
              struct larder_err *e);
int extents_remove(const struct store *s, MDB_txn *txn, uint64_t entry_id, struct larder_err *e);
/* Extents whose entry never got its manifest: an interrupted put. Own transaction. Adds up what
 * the entries take on the way. */
int orphans_sweep(struct store *s, struct larder_err *e);
int name_bind(struct store *s, MDB_txn *txn, const uint8_t *key, const char *ns, const char *name,
              struct larder_err *e);

/* ---- index.c: inside a write transaction */
int prefix_add(const struct store *s, MDB_txn *txn, const struct manifest *m,
               const struct store_info *info, struct larder_err *e);
int prefix_remove(const struct store *s, MDB_txn *txn, const struct store_info *info,
                  uint64_t entry_id, struct larder_err *e);

/* ---- entry.c */
int entry_open_txn(struct store *s, MDB_txn *txn, const uint8_t *key, struct store_entry **ret,
                   struct larder_err *e);
int entry_load_txn(struct store_entry *en, MDB_txn *txn, struct larder_err *e);

/* Extent keys: entry id and index, big-endian, so that an entry's extents are adjacent. */
#define EXTENT_KEY_LEN 12
void extent_key(uint64_t entry_id, uint32_t index, uint8_t out[EXTENT_KEY_LEN]);
/* Decoders, kept between calls. codec_take() is NULL when memory is out. */
struct codec *codec_take(struct store *s);
void codec_give(struct store *s, struct codec *c);

/* Put one encoded extent or manifest under its key. */
void be64(uint64_t v, uint8_t out[8]);
uint64_t from_be64(const uint8_t *p);

#endif
