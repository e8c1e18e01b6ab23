/* queue.c - the durable job queue and small settings.
 *
 * The one idea: a job is a JSON text under its id and its document in chunks of at most
 * 1 MiB beside it, because long values fragment the free list. */
#include <errno.h>
#include <string.h>

#include "mem.h"
#include "store_int.h"

#define CHUNK (1u << 20)
#define MAX_DOC (1ull << 32)
#define SETTING_KEY_MAX 500u

static int doc_remove(const struct store *s, MDB_txn *txn, uint64_t id, struct larder_err *e)
{
    uint8_t key[EXTENT_KEY_LEN];
    MDB_val v;
    int rc = 0;

    for (uint32_t i = 0; !rc; i++) {
        extent_key(id, i, key);
        rc = db_get(s, txn, DB_jobdocs, key, sizeof key, &v, e);
        if (!rc)
            rc = db_del(s, txn, DB_jobdocs, key, sizeof key, e);
    }
    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int doc_write(const struct store *s, MDB_txn *txn, uint64_t id, const uint8_t *doc,
                     uint64_t len, struct larder_err *e)
{
    uint8_t key[EXTENT_KEY_LEN];
    int rc = doc_remove(s, txn, id, e);

    for (uint64_t at = 0; !rc && at < len; at += CHUNK) {
        extent_key(id, (uint32_t)(at / CHUNK), key);
        rc = db_put(s, txn, DB_jobdocs, key, sizeof key, doc + at,
                    (size_t)(len - at < CHUNK ? len - at : CHUNK), e);
    }
    return rc;
}

static int finish(struct store *s, MDB_txn *txn, int rc, struct larder_err *e)
{
    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    return txn_commit(s, txn, e);
}

int store_job_put(struct store *s, uint64_t id, const char *json, const void *doc, uint64_t doc_len,
                  struct larder_err *e)
{
    uint8_t key[8];
    MDB_txn *txn;
    int rc;

    if (doc_len > MAX_DOC)
        return larder_fail(e, LARDER_ETOOBIG, "a document of %llu bytes",
                           (unsigned long long)doc_len);
    rc = txn_write(s, &txn, e);
    if (rc)
        return rc;
    be64(id, key);
    rc = db_put(s, txn, DB_jobs, key, sizeof key, json, strlen(json), e);
    if (!rc && doc)
        rc = doc_write(s, txn, id, doc, doc_len, e);
    return finish(s, txn, rc, e);
}

int store_job_delete(struct store *s, uint64_t id, struct larder_err *e)
{
    uint8_t key[8];
    MDB_txn *txn;
    int rc = txn_write(s, &txn, e);

    if (rc)
        return rc;
    be64(id, key);
    rc = db_del(s, txn, DB_jobs, key, sizeof key, e);
    if (!rc)
        rc = doc_remove(s, txn, id, e);
    return finish(s, txn, rc, e);
}

static int doc_read(const struct store *s, MDB_txn *txn, uint64_t id, uint8_t **ret,
                    uint64_t *ret_len, struct larder_err *e)
{
    uint8_t key[EXTENT_KEY_LEN], *doc = NULL, *grown;
    uint64_t len = 0;
    MDB_val v;
    int rc = 0;

    for (uint32_t i = 0;; i++) {
        extent_key(id, i, key);
        rc = db_get(s, txn, DB_jobdocs, key, sizeof key, &v, e);
        if (rc)
            break;
        grown = mem_grow(doc, len + v.mv_size, 1);
        if (!grown) {
            rc = larder_fail(e, LARDER_ENOMEM, "no memory for a document");
            break;
        }
        doc = grown;
        memcpy(doc + len, v.mv_data, v.mv_size);
        len += v.mv_size;
    }
    if (rc != LARDER_ENOTFOUND) {
        mem_free(doc);
        return rc;
    }
    *ret = doc;
    *ret_len = len;
    return 0;
}

static char *text_of(const MDB_val *v)
{
    char *p = mem_alloc(v->mv_size + 1, 1);

    if (p) {
        memcpy(p, v->mv_data, v->mv_size);
        p[v->mv_size] = '\0';
    }
    return p;
}

int store_job_get(struct store *s, uint64_t id, char **ret_json, void **ret_doc,
                  uint64_t *ret_doc_len, struct larder_err *e)
{
    uint8_t key[8], *doc = NULL;
    uint64_t len = 0;
    char *json = NULL;
    MDB_txn *txn;
    MDB_val v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    be64(id, key);
    rc = db_get(s, txn, DB_jobs, key, sizeof key, &v, e);
    if (!rc && ret_json && !(json = text_of(&v)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for a job");
    if (!rc && ret_doc)
        rc = doc_read(s, txn, id, &doc, &len, e);
    mdb_txn_abort(txn);
    if (rc) {
        mem_free(json);
        return rc;
    }
    if (ret_json)
        *ret_json = json;
    if (ret_doc) {
        *ret_doc = doc;
        *ret_doc_len = len;
    }
    return 0;
}

int store_job_list(struct store *s, store_job_visit *visit, void *arg, struct larder_err *e)
{
    MDB_cursor *c = NULL;
    MDB_txn *txn;
    MDB_val k, v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = mdb_cursor_open(txn, s->dbi[DB_jobs], &c);
    while (!rc && !(rc = mdb_cursor_get(c, &k, &v, MDB_NEXT))) {
        char *json = text_of(&v);
        bool more = json && k.mv_size == 8 && visit(arg, from_be64(k.mv_data), json);

        if (!json)
            rc = ENOMEM;
        mem_free(json);
        if (!more)
            break;
    }
    if (c)
        mdb_cursor_close(c);
    mdb_txn_abort(txn);
    return rc && rc != MDB_NOTFOUND ? lmdb_fail(s, rc, "job list", e) : 0;
}

/* ---- settings */

int store_setting_put(struct store *s, const char *key, const char *value, struct larder_err *e)
{
    MDB_txn *txn;
    int rc;

    if (!*key || strlen(key) > SETTING_KEY_MAX)
        return larder_fail(e, LARDER_EINVAL, "a setting's key has 1 to %u bytes", SETTING_KEY_MAX);
    rc = txn_write(s, &txn, e);
    if (rc)
        return rc;
    rc = value ? db_put(s, txn, DB_settings, key, strlen(key), value, strlen(value), e)
               : db_del(s, txn, DB_settings, key, strlen(key), e);
    return finish(s, txn, rc, e);
}

int store_setting_get(struct store *s, const char *key, char **ret, struct larder_err *e)
{
    char *value = NULL;
    MDB_txn *txn;
    MDB_val v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = db_get(s, txn, DB_settings, key, strlen(key), &v, e);
    if (!rc && !(value = text_of(&v)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory");
    mdb_txn_abort(txn);
    if (!rc)
        *ret = value;
    return rc;
}
