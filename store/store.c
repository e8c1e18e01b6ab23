/* store.c - opening, closing, transactions.
 *
 * The one idea: LMDB runs with its default durability and nothing else, so a commit that
 * returned 0 is on disk; any commit that fails for another reason than space ends writing
 * until the process is restarted, because a failed fsync must never be retried. */
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "bytes.h"
#include "mem.h"
#include "store_int.h"

#define FORMAT_VERSION 2u
#define MAX_READERS 512
#define MIN_MAP (1ull << 30)
#define NEW_DIR "new.tmp"

static const char *const db_name[N_DBS] = {
#define X(name) #name,
    STORE_DB_LIST(X)
#undef X
};

/* ---- errors */

static bool disk_full(const struct store *s)
{
    struct statvfs v;

    return !fstatvfs(s->dir_fd, &v) && v.f_bavail < 16;
}

int lmdb_fail(const struct store *s, int rc, const char *what, struct larder_err *e)
{
    /* ext4 reports a full disk as a short write, which LMDB turns into EIO */
    if (rc == MDB_MAP_FULL || rc == ENOSPC || rc == EDQUOT || rc == EFBIG ||
        (rc == EIO && disk_full(s)))
        return larder_fail(e, LARDER_EFULL, "%s: no space left (%s); free some or raise the limit",
                           what, mdb_strerror(rc));
    if (rc == ENOMEM)
        return larder_fail(e, LARDER_ENOMEM, "%s: no memory", what);
    if (rc == MDB_CORRUPTED || rc == MDB_PAGE_NOTFOUND || rc == MDB_BAD_TXN)
        return larder_fail(e, LARDER_EDAMAGED, "%s: the store is damaged (%s)", what,
                           mdb_strerror(rc));
    if (rc == MDB_VERSION_MISMATCH || rc == MDB_INVALID)
        return larder_fail(e, LARDER_EVERSION, "%s: not a store of this LMDB version (%s)", what,
                           mdb_strerror(rc));
    return larder_fail(e, LARDER_EIO, "%s: %s", what, mdb_strerror(rc));
}

/* ---- transactions */

int txn_read(struct store *s, MDB_txn **ret, struct larder_err *e)
{
    int rc = mdb_txn_begin(s->env, NULL, MDB_RDONLY, ret);

    return rc ? lmdb_fail(s, rc, "read transaction", e) : 0;
}

int txn_write(struct store *s, MDB_txn **ret, struct larder_err *e)
{
    int rc;

    pthread_mutex_lock(&s->write);
    if (s->broken)
        rc = larder_fail(e, LARDER_EIO,
                         "the store stopped writing after a failed commit; restart larderd");
    else if ((rc = mdb_txn_begin(s->env, NULL, 0, ret)))
        rc = lmdb_fail(s, rc, "write transaction", e);
    if (rc)
        pthread_mutex_unlock(&s->write);
    else
        s->added = 0;
    return rc;
}

/* Uses counted since the last commit. */
static int write_touches(struct store *s, MDB_txn *txn, struct larder_err *e)
{
    struct touch touch[MAX_TOUCHES];
    uint32_t n;
    int rc = 0;

    pthread_mutex_lock(&s->small);
    n = s->n_touch;
    memcpy(touch, s->touch, n * sizeof touch[0]);
    s->n_touch = 0;
    pthread_mutex_unlock(&s->small);
    for (uint32_t i = 0; !rc && i < n; i++) {
        struct state st = {0};

        rc = state_get(s, txn, touch[i].key, &st, e);
        if (!rc) {
            st.hits += touch[i].hits;
            st.last_used = touch[i].last_used;
            rc = state_put(s, txn, touch[i].key, &st, e);
        } else if (rc == LARDER_ENOTFOUND || rc == LARDER_EDAMAGED) {
            rc = 0; /* the entry is gone; so is its count */
        }
        state_done(&st);
    }
    return rc;
}

int txn_commit(struct store *s, MDB_txn *txn, struct larder_err *e)
{
    int rc = write_touches(s, txn, e);

    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    rc = mdb_txn_commit(txn);
    if (rc) {
        rc = lmdb_fail(s, rc, "commit", e);
        s->broken |= rc != LARDER_EFULL && rc != LARDER_ENOMEM;
    } else {
        s->used += (uint64_t)s->added;
    }
    pthread_mutex_unlock(&s->write);
    return rc;
}

void txn_abort(struct store *s, MDB_txn *txn)
{
    mdb_txn_abort(txn);
    pthread_mutex_unlock(&s->write);
}

int db_get(const struct store *s, MDB_txn *txn, enum store_db db, const void *key, size_t key_len,
           MDB_val *ret, struct larder_err *e)
{
    MDB_val k = {key_len, (void *)(uintptr_t)key};
    int rc = mdb_get(txn, s->dbi[db], &k, ret);

    if (rc == MDB_NOTFOUND)
        return LARDER_ENOTFOUND;
    return rc ? lmdb_fail(s, rc, "read", e) : 0;
}

int db_put(const struct store *s, MDB_txn *txn, enum store_db db, const void *key, size_t key_len,
           const void *val, size_t val_len, struct larder_err *e)
{
    MDB_val k = {key_len, (void *)(uintptr_t)key}, v = {val_len, (void *)(uintptr_t)val};
    int rc = mdb_put(txn, s->dbi[db], &k, &v, 0);

    return rc ? lmdb_fail(s, rc, "write", e) : 0;
}

int db_del(const struct store *s, MDB_txn *txn, enum store_db db, const void *key, size_t key_len,
           struct larder_err *e)
{
    MDB_val k = {key_len, (void *)(uintptr_t)key};
    int rc = mdb_del(txn, s->dbi[db], &k, NULL);

    return rc && rc != MDB_NOTFOUND ? lmdb_fail(s, rc, "delete", e) : 0;
}

void be64(uint64_t v, uint8_t out[8])
{
    for (int i = 0; i < 8; i++)
        out[i] = (uint8_t)(v >> (56 - 8 * i));
}

uint64_t from_be64(const uint8_t *p)
{
    uint64_t v = 0;

    for (int i = 0; i < 8; i++)
        v = v << 8 | p[i];
    return v;
}

int meta_next(const struct store *s, MDB_txn *txn, const char *counter, uint64_t *ret,
              struct larder_err *e)
{
    uint8_t buf[8];
    uint64_t v = 1;
    MDB_val val;
    int rc = db_get(s, txn, DB_meta, counter, strlen(counter), &val, e);

    if (rc && rc != LARDER_ENOTFOUND)
        return rc;
    if (!rc && val.mv_size != 8)
        return larder_fail(e, LARDER_EDAMAGED, "counter %s is damaged", counter);
    if (!rc)
        v = from_be64(val.mv_data);
    be64(v + 1, buf);
    rc = db_put(s, txn, DB_meta, counter, strlen(counter), buf, 8, e);
    if (!rc)
        *ret = v;
    return rc;
}

/* ---- opening */

/* Network, FUSE and stacked file systems do not keep LMDB's promises. */
static int check_fs(const struct store_opts *o, struct larder_err *e)
{
    static const struct {
        uint32_t magic;
        const char *name;
    } bad[] = {{0x6969, "NFS"},      {0x65735546, "FUSE"}, {0x794c7630, "overlay"},
               {0xff534d42, "CIFS"}, {0xfe534d42, "SMB"},  {0x01021997, "9P"}};
    struct statfs st;

    if (o->allow_any_fs || statfs(o->dir, &st))
        return 0;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        if ((uint32_t)st.f_type == bad[i].magic)
            return larder_fail(e, LARDER_EUNSUPPORTED,
                               "%s lies on %s, which does not keep what LMDB needs; use a local "
                               "file system or set allow_any_fs",
                               o->dir, bad[i].name);
    return 0;
}

static int lock_dir(struct store *s, const char *dir, struct larder_err *e)
{
    s->dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (s->dir_fd < 0)
        return larder_fail(e, LARDER_EIO, "%s: %s", dir, strerror(errno));
    s->lock_fd = openat(s->dir_fd, "larder.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->lock_fd < 0)
        return larder_fail(e, LARDER_EIO, "%s/larder.lock: %s", dir, strerror(errno));
    if (flock(s->lock_fd, LOCK_EX | LOCK_NB))
        return larder_fail(e, LARDER_EBUSY, "%s is in use by another larderd", dir);
    return 0;
}

static int open_dbs(struct store *s, unsigned flags, struct larder_err *e)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(s->env, NULL, 0, &txn);

    if (rc)
        return lmdb_fail(s, rc, "open", e);
    for (int i = 0; i < N_DBS; i++) {
        rc = mdb_dbi_open(txn, db_name[i], flags, &s->dbi[i]);
        if (rc) {
            mdb_txn_abort(txn);
            return rc == MDB_NOTFOUND
                       ? larder_fail(e, LARDER_EVERSION, "database '%s' is missing", db_name[i])
                       : lmdb_fail(s, rc, "open", e);
        }
    }
    rc = mdb_txn_commit(txn);
    return rc ? lmdb_fail(s, rc, "open", e) : 0;
}

static int open_env(struct store *s, const char *dir, struct larder_err *e)
{
    uint64_t map = s->budget > UINT64_MAX / 8 ? UINT64_MAX / 8 : s->budget;
    int rc = mdb_env_create(&s->env);

    if (rc)
        return lmdb_fail(s, rc, "open", e);
    /* Twice the budget for entries being replaced and freed runs that do not fit, and
     * room for the queue; it is address space, not memory. */
    map = 2 * map + MIN_MAP;
    if (map > 1ull << 45)
        map = 1ull << 45;
    if ((rc = mdb_env_set_mapsize(s->env, (size_t)map)) ||
        (rc = mdb_env_set_maxdbs(s->env, N_DBS)) ||
        (rc = mdb_env_set_maxreaders(s->env, MAX_READERS)) ||
        (rc = mdb_env_open(s->env, dir, MDB_NOTLS, 0600)))
        return lmdb_fail(s, rc, dir, e);
    return 0;
}

/* format: u32 version, u32 LMDB major * 1000 + minor */
static void format_record(uint8_t out[8])
{
    struct wr w = wr_init(out, 8);

    wr_u32(&w, FORMAT_VERSION);
    wr_u32(&w, MDB_VERSION_MAJOR * 1000 + MDB_VERSION_MINOR);
}

static int check_format(struct store *s, struct larder_err *e)
{
    uint8_t want[8];
    MDB_txn *txn;
    MDB_val v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    format_record(want);
    rc = db_get(s, txn, DB_meta, "format", 6, &v, e);
    if (rc == LARDER_ENOTFOUND || (!rc && (v.mv_size != 8 || memcmp(v.mv_data, want, 8))))
        rc = larder_fail(
            e, LARDER_EVERSION,
            "the store was written by another version of larder or LMDB; nothing was changed");
    mdb_txn_abort(txn);
    return rc;
}

/* A power cut while LMDB first writes its meta pages would leave a file that does not open:
 * create beside, then rename. */
static int create(struct store *s, const char *dir, struct larder_err *e)
{
    char path[4096], file[4200];
    uint8_t format[8];
    MDB_txn *txn;
    int rc;

    if ((size_t)snprintf(path, sizeof path, "%s/" NEW_DIR, dir) >= sizeof path)
        return larder_fail(e, LARDER_EINVAL, "%s: path too long", dir);
    if (mkdir(path, 0700) && errno != EEXIST)
        return larder_fail(e, LARDER_EIO, "%s: %s", path, strerror(errno));
    snprintf(file, sizeof file, "%s/data.mdb", path);
    unlink(file); /* left by a creation that was interrupted */
    rc = open_env(s, path, e);
    if (!rc)
        rc = open_dbs(s, MDB_CREATE, e);
    if (!rc)
        rc = txn_write(s, &txn, e);
    if (!rc) {
        format_record(format);
        rc = db_put(s, txn, DB_meta, "format", 6, format, 8, e);
        if (rc)
            txn_abort(s, txn);
        else
            rc = txn_commit(s, txn, e);
    }
    mdb_env_close(s->env);
    s->env = NULL;
    if (rc)
        return rc;
    if (renameat(s->dir_fd, NEW_DIR "/data.mdb", s->dir_fd, "data.mdb") || fsync(s->dir_fd))
        return larder_fail(e, LARDER_EIO, "%s: %s", dir, strerror(errno));
    unlinkat(s->dir_fd, NEW_DIR "/lock.mdb", 0);
    unlinkat(s->dir_fd, NEW_DIR, AT_REMOVEDIR);
    return 0;
}

int store_open(struct store **ret, const struct store_opts *opts, struct larder_err *e)
{
    struct store *s;
    int rc, dead;

    if (!opts->store_budget)
        return larder_fail(e, LARDER_EINVAL,
                           "store_budget is 0; it must be at least a few megabytes");
    rc = check_fs(opts, e);
    if (rc)
        return rc;
    s = mem_zalloc(1, sizeof *s);
    if (!s)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    s->lock_fd = s->dir_fd = -1;
    s->budget = opts->store_budget;
    s->codec = opts->codec == STORE_FAST ? CODEC_TIERS : CODEC_PLANES;
    pthread_mutex_init(&s->write, NULL);
    pthread_mutex_init(&s->small, NULL);
    rc = lock_dir(s, opts->dir, e);
    if (!rc && faccessat(s->dir_fd, "data.mdb", F_OK, 0))
        rc = create(s, opts->dir, e);
    if (!rc)
        rc = open_env(s, opts->dir, e);
    if (!rc)
        rc = open_dbs(s, 0, e);
    if (!rc)
        rc = check_format(s, e);
    if (!rc) {
        mdb_reader_check(s->env, &dead);
        rc = orphans_sweep(s, e);
    }
    if (rc) {
        store_close(s);
        return rc;
    }
    *ret = s;
    return 0;
}

void store_close(struct store *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < s->n_scratch; i++)
        codec_free(s->scratch[i]);
    if (s->env)
        mdb_env_close(s->env);
    if (s->lock_fd >= 0)
        close(s->lock_fd);
    if (s->dir_fd >= 0)
        close(s->dir_fd);
    pthread_mutex_destroy(&s->write);
    pthread_mutex_destroy(&s->small);
    mem_free(s);
}
