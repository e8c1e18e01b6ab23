/* life.c - names, pins, use, eviction, removal, tombstones, lists, counts.
 *
 * The one idea: an entry's worth is what it saves per byte it takes,
 * (hits, halved every six hours, + 1) x tokens / stored bytes; under pressure the least
 * worthy goes first, never a pinned one and never the one being stored. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "bytes.h"
#include "mem.h"
#include "store_int.h"

#define HALF_LIFE_S 21600.0
#define MAX_TOMBS 65536u
#define NAME_KEY_MAX 480u /* LMDB keys end at 511 bytes */

/* ---- tombstones: why an entry is gone */

static int tomb_add(const struct store *s, MDB_txn *txn, const uint8_t *key, char why, uint64_t now,
                    struct larder_err *e)
{
    uint8_t rec[9], seq_key[8];
    uint64_t seq;
    MDB_val v;
    int rc = meta_next(s, txn, "next_tomb", &seq, e);

    if (rc)
        return rc;
    rec[0] = (uint8_t)why;
    be64(now, rec + 1);
    rc = db_put(s, txn, DB_tombs, key, STORE_KEY_LEN, rec, sizeof rec, e);
    be64(seq, seq_key);
    if (!rc)
        rc = db_put(s, txn, DB_tombseq, seq_key, 8, key, STORE_KEY_LEN, e);
    if (rc || seq <= MAX_TOMBS)
        return rc;
    be64(seq - MAX_TOMBS, seq_key); /* forget the oldest */
    rc = db_get(s, txn, DB_tombseq, seq_key, 8, &v, e);
    if (!rc && v.mv_size == STORE_KEY_LEN) {
        uint8_t old[STORE_KEY_LEN];

        memcpy(old, v.mv_data, sizeof old);
        rc = db_del(s, txn, DB_tombs, old, sizeof old, e);
    }
    if (!rc || rc == LARDER_ENOTFOUND)
        rc = db_del(s, txn, DB_tombseq, seq_key, 8, e);
    return rc;
}

int store_tombstone(struct store *s, const uint8_t key[STORE_KEY_LEN], char *ret_why,
                    uint64_t *ret_when, struct larder_err *e)
{
    MDB_txn *txn;
    MDB_val v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = db_get(s, txn, DB_tombs, key, STORE_KEY_LEN, &v, e);
    if (!rc && v.mv_size != 9)
        rc = larder_fail(e, LARDER_EDAMAGED, "a tombstone is damaged");
    if (!rc) {
        *ret_why = *(const char *)v.mv_data;
        *ret_when = from_be64((const uint8_t *)v.mv_data + 1);
    }
    mdb_txn_abort(txn);
    return rc;
}

/* ---- removal */

int extents_remove(const struct store *s, MDB_txn *txn, uint64_t entry_id, struct larder_err *e)
{
    uint8_t first[EXTENT_KEY_LEN];
    MDB_cursor *c;
    MDB_val k, v;
    int rc = mdb_cursor_open(txn, s->dbi[DB_extents], &c);

    if (rc)
        return lmdb_fail(s, rc, "delete", e);
    extent_key(entry_id, 0, first);
    for (;;) {
        k = (MDB_val){sizeof first, first};
        rc = mdb_cursor_get(c, &k, &v, MDB_SET_RANGE);
        if (rc || k.mv_size != EXTENT_KEY_LEN || memcmp(k.mv_data, first, 8))
            break;
        rc = mdb_cursor_del(c, 0);
        if (rc)
            break;
    }
    mdb_cursor_close(c);
    return rc && rc != MDB_NOTFOUND ? lmdb_fail(s, rc, "delete", e) : 0;
}

/* The prefix records of an entry need its tokens; if those are damaged the records stay
 * behind and are skipped when a look-up meets them. */
static int unindex(struct store *s, MDB_txn *txn, const uint8_t *key, uint64_t entry_id,
                   struct larder_err *e)
{
    struct store_entry *en;
    int rc = entry_open_txn(s, txn, key, &en, e);

    if (!rc) {
        rc = entry_load_txn(en, txn, e);
        if (!rc)
            rc = prefix_remove(s, txn, store_entry_info(en), entry_id, e);
        store_entry_close(en);
    }
    return rc == LARDER_EDAMAGED || rc == LARDER_ENOTFOUND ? 0 : rc;
}

static int names_remove(const struct store *s, MDB_txn *txn, const struct state *st,
                        struct larder_err *e)
{
    int rc = 0;

    for (const char *n = st->names; !rc && n && n < st->names + st->names_len; n += strlen(n) + 1)
        rc = db_del(s, txn, DB_names, n, strlen(n), e);
    return rc;
}

/* why 0: replaced by a new version of itself; names stay and no tombstone is set. */
int entry_remove(struct store *s, MDB_txn *txn, const uint8_t *key, char why, uint64_t now,
                 uint64_t *ret_freed, struct larder_err *e)
{
    struct state st = {0};
    int rc = state_get(s, txn, key, &st, e);

    if (rc)
        return rc;
    rc = unindex(s, txn, key, st.entry_id, e);
    if (!rc)
        rc = extents_remove(s, txn, st.entry_id, e);
    if (!rc && why)
        rc = names_remove(s, txn, &st, e);
    if (!rc && st.flags & STATE_SOURCE)
        rc = db_del(s, txn, DB_sources, st.source, sizeof st.source, e);
    if (!rc)
        rc = db_del(s, txn, DB_entries, key, STORE_KEY_LEN, e);
    if (!rc)
        rc = db_del(s, txn, DB_state, key, STORE_KEY_LEN, e);
    s->added -= (int64_t)st.stored_bytes;
    if (!rc && why)
        rc = tomb_add(s, txn, key, why, now, e);
    if (!rc && ret_freed)
        *ret_freed = st.stored_bytes;
    state_done(&st);
    return rc;
}

int store_delete(struct store *s, const uint8_t key[STORE_KEY_LEN], uint64_t *ret_freed,
                 struct larder_err *e)
{
    uint64_t freed = 0;
    MDB_txn *txn;
    int rc = txn_write(s, &txn, e);

    if (rc)
        return rc;
    rc = entry_remove(s, txn, key, 'r', (uint64_t)time(NULL), &freed, e);
    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    rc = txn_commit(s, txn, e);
    if (!rc && ret_freed)
        *ret_freed = freed;
    return rc;
}

/* ---- eviction */

typedef int each_state(void *arg, const uint8_t *key, const struct state *st);

/* Visit every entry's state; a positive return of fn stops. */
static int each(const struct store *s, MDB_txn *txn, each_state *fn, void *arg,
                struct larder_err *e)
{
    MDB_cursor *c;
    MDB_val k, v;
    int rc = mdb_cursor_open(txn, s->dbi[DB_state], &c);

    if (rc)
        return lmdb_fail(s, rc, "list", e);
    while (!(rc = mdb_cursor_get(c, &k, &v, MDB_NEXT))) {
        struct state st;

        if (k.mv_size != STORE_KEY_LEN || state_decode(&v, &st, NULL))
            continue;
        rc = fn(arg, k.mv_data, &st);
        state_done(&st);
        if (rc)
            break;
    }
    mdb_cursor_close(c);
    return rc < 0 && rc != MDB_NOTFOUND ? lmdb_fail(s, rc, "list", e) : 0;
}

static double worth(const struct state *st, uint64_t now)
{
    double age = now > st->last_used ? (double)(now - st->last_used) : 0;
    double hits = (double)st->hits * exp2(-age / HALF_LIFE_S);

    return (hits + 1) * st->n_ctx / (double)(st->stored_bytes + 1);
}

struct victim {
    const uint8_t *spare;
    uint64_t now;
    bool found;
    double worth;
    uint8_t key[STORE_KEY_LEN];
};

static int least_worthy(void *arg, const uint8_t *key, const struct state *st)
{
    struct victim *v = arg;
    double w = worth(st, v->now);

    if (st->flags & STATE_PINNED || !memcmp(key, v->spare, STORE_KEY_LEN) ||
        (v->found && w >= v->worth))
        return 0;
    v->found = true;
    v->worth = w;
    memcpy(v->key, key, STORE_KEY_LEN);
    return 0;
}

int evict_for(struct store *s, MDB_txn *txn, uint64_t need, const uint8_t *keep, uint64_t now,
              struct larder_err *e)
{
    for (;;) {
        uint64_t used = s->used + (uint64_t)s->added;
        struct victim v = {.spare = keep, .now = now};
        int rc;

        if (need <= s->budget && used <= s->budget - need)
            return 0;
        rc = each(s, txn, least_worthy, &v, e);
        if (rc)
            return rc;
        if (!v.found)
            return larder_fail(e, LARDER_EFULL,
                               "%llu bytes do not fit: the budget is %llu and %llu are pinned; "
                               "raise store_budget, keep fewer rows or unpin entries",
                               (unsigned long long)need, (unsigned long long)s->budget,
                               (unsigned long long)used);
        rc = entry_remove(s, txn, v.key, 'e', now, NULL, e);
        if (rc)
            return rc;
        s->evicted++;
    }
}

/* ---- orphans */

struct live {
    uint64_t *id, n, cap;
    uint64_t used; /* bytes of the entries */
};

static int add_live(void *arg, const uint8_t *key, const struct state *st)
{
    struct live *l = arg;

    (void)key;
    if (l->n == l->cap) {
        uint64_t cap = l->cap ? 2 * l->cap : 256, *grown = mem_grow(l->id, cap, sizeof *grown);

        if (!grown)
            return 1;
        l->id = grown;
        l->cap = cap;
    }
    l->id[l->n++] = st->entry_id;
    l->used += st->stored_bytes;
    return 0;
}

static int compare_id(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Walk entry ids present in `extents`, jumping over the live ones. */
static int sweep_txn(struct store *s, MDB_txn *txn, struct live *l, struct larder_err *e)
{
    uint64_t id = 0, entries = 0;
    MDB_stat stat;
    int rc = each(s, txn, add_live, l, e);

    if (!rc && !mdb_stat(txn, s->dbi[DB_state], &stat))
        entries = stat.ms_entries;
    if (!rc && l->n < entries && l->n == l->cap)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to look for orphans");
    if (!rc && l->n < entries) /* a damaged state record: sweeping could take its extents */
        return 0;
    if (!rc && l->n)
        qsort(l->id, (size_t)l->n, sizeof *l->id, compare_id);
    while (!rc) {
        uint8_t first[EXTENT_KEY_LEN];
        MDB_cursor *c;
        MDB_val k = {sizeof first, first}, v;

        extent_key(id, 0, first);
        rc = mdb_cursor_open(txn, s->dbi[DB_extents], &c);
        if (rc)
            return lmdb_fail(s, rc, "sweep", e);
        rc = mdb_cursor_get(c, &k, &v, MDB_SET_RANGE);
        if (!rc)
            id = k.mv_size == EXTENT_KEY_LEN ? from_be64(k.mv_data) : UINT64_MAX;
        mdb_cursor_close(c);
        if (rc == MDB_NOTFOUND || id == UINT64_MAX)
            return 0;
        if (rc)
            return lmdb_fail(s, rc, "sweep", e);
        if (!l->n || !bsearch(&id, l->id, (size_t)l->n, sizeof id, compare_id))
            rc = extents_remove(s, txn, id, e);
        id++;
    }
    return rc;
}

int orphans_sweep(struct store *s, struct larder_err *e)
{
    struct live live = {0};
    MDB_txn *txn;
    int rc = txn_write(s, &txn, e);

    if (rc)
        return rc;
    rc = sweep_txn(s, txn, &live, e);
    s->used = live.used;
    mem_free(live.id);
    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    return txn_commit(s, txn, e);
}

/* ---- names */

static int name_key(const char *ns, const char *name, char out[NAME_KEY_MAX], struct larder_err *e)
{
    if (strlen(ns) + strlen(name) + 2 > NAME_KEY_MAX)
        return larder_fail(e, LARDER_EINVAL, "the name '%.40s...' is longer than %u bytes", name,
                           NAME_KEY_MAX - 2);
    strcpy(out, ns);
    strcat(out, "/");
    strcat(out, name);
    return 0;
}

/* Take `full` out of an entry's list of names. */
static void forget_name(struct state *st, const char *full)
{
    size_t len = strlen(full) + 1;

    for (char *n = st->names; n && n < st->names + st->names_len; n += strlen(n) + 1) {
        if (strcmp(n, full))
            continue;
        memmove(n, n + len, (size_t)(st->names + st->names_len - (n + len)));
        st->names_len -= len;
        st->n_names--;
        return;
    }
}

static int remember_name(struct state *st, const char *full, struct larder_err *e)
{
    size_t len = strlen(full) + 1;
    char *grown;

    forget_name(st, full);
    if (st->n_names == STATE_MAX_NAMES)
        return larder_fail(e, LARDER_ELIMIT, "an entry has at most %u names", STATE_MAX_NAMES);
    grown = mem_grow(st->names, st->names_len + len, 1);
    if (!grown)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    memcpy(grown + st->names_len, full, len);
    st->names = grown;
    st->names_len += len;
    st->n_names++;
    return 0;
}

int name_bind(struct store *s, MDB_txn *txn, const uint8_t *key, const char *ns, const char *name,
              struct larder_err *e)
{
    uint8_t old_key[STORE_KEY_LEN];
    char full[NAME_KEY_MAX];
    struct state st = {0};
    MDB_val v;
    int rc = name_key(ns, name, full, e);

    if (rc)
        return rc;
    rc = db_get(s, txn, DB_names, full, strlen(full), &v, e);
    if (!rc && v.mv_size == STORE_KEY_LEN && memcmp(v.mv_data, key, STORE_KEY_LEN)) {
        memcpy(old_key, v.mv_data, STORE_KEY_LEN);
        if (!state_get(s, txn, old_key, &st, NULL)) {
            forget_name(&st, full);
            rc = state_put(s, txn, old_key, &st, e);
        }
        state_done(&st);
    }
    if (rc && rc != LARDER_ENOTFOUND)
        return rc;
    rc = state_get(s, txn, key, &st, e);
    if (!rc)
        rc = remember_name(&st, full, e);
    if (!rc)
        rc = state_put(s, txn, key, &st, e);
    state_done(&st);
    return rc ? rc : db_put(s, txn, DB_names, full, strlen(full), key, STORE_KEY_LEN, e);
}

int store_find_name(struct store *s, const char *ns, const char *name,
                    uint8_t ret_key[STORE_KEY_LEN], struct larder_err *e)
{
    char full[NAME_KEY_MAX];
    MDB_txn *txn;
    MDB_val v;
    int rc = name_key(ns, name, full, e);

    if (!rc)
        rc = txn_read(s, &txn, e);
    if (rc)
        return rc;
    rc = db_get(s, txn, DB_names, full, strlen(full), &v, e);
    if (!rc && v.mv_size != STORE_KEY_LEN)
        rc = larder_fail(e, LARDER_EDAMAGED, "the name %s is damaged", full);
    if (!rc)
        memcpy(ret_key, v.mv_data, STORE_KEY_LEN);
    mdb_txn_abort(txn);
    return rc;
}

int store_set_name(struct store *s, const uint8_t key[STORE_KEY_LEN], const char *ns,
                   const char *name, struct larder_err *e)
{
    MDB_txn *txn;
    int rc = txn_write(s, &txn, e);

    if (rc)
        return rc;
    rc = name_bind(s, txn, key, ns, name, e);
    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    return txn_commit(s, txn, e);
}

/* ---- flags and use */

static int set_flag(struct store *s, const uint8_t *key, uint32_t flag, bool on,
                    struct larder_err *e)
{
    struct state st = {0};
    MDB_txn *txn;
    int rc = txn_write(s, &txn, e);

    if (rc)
        return rc;
    rc = state_get(s, txn, key, &st, e);
    if (!rc) {
        st.flags = on ? st.flags | flag : st.flags & ~flag;
        rc = state_put(s, txn, key, &st, e);
    }
    state_done(&st);
    if (rc) {
        txn_abort(s, txn);
        return rc;
    }
    return txn_commit(s, txn, e);
}

int store_pin(struct store *s, const uint8_t key[STORE_KEY_LEN], bool pin, struct larder_err *e)
{
    return set_flag(s, key, STATE_PINNED, pin, e);
}

int store_quarantine(struct store *s, const uint8_t key[STORE_KEY_LEN], struct larder_err *e)
{
    return set_flag(s, key, STATE_DAMAGED, true, e);
}

void store_touch(struct store *s, const uint8_t key[STORE_KEY_LEN], uint64_t now)
{
    struct touch *t = NULL;

    pthread_mutex_lock(&s->small);
    for (uint32_t i = 0; i < s->n_touch && !t; i++)
        if (!memcmp(s->touch[i].key, key, STORE_KEY_LEN))
            t = &s->touch[i];
    if (!t && s->n_touch < MAX_TOUCHES) {
        t = &s->touch[s->n_touch++];
        memset(t, 0, sizeof *t);
        memcpy(t->key, key, STORE_KEY_LEN);
    }
    if (t) { /* when the table is full a use goes uncounted */
        t->hits++;
        t->last_used = now;
    }
    pthread_mutex_unlock(&s->small);
}

/* ---- lists and counts */

int store_list(struct store *s, const uint8_t *after, uint32_t limit, store_visit *visit, void *arg,
               struct larder_err *e)
{
    uint8_t key[STORE_KEY_LEN];
    MDB_cursor *c = NULL;
    MDB_txn *txn;
    MDB_val k, v;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = mdb_cursor_open(txn, s->dbi[DB_state], &c);
    if (!rc && after) {
        memcpy(key, after, sizeof key);
        k = (MDB_val){sizeof key, key};
        rc = mdb_cursor_get(c, &k, &v, MDB_SET_RANGE);
        if (!rc && k.mv_size == sizeof key && !memcmp(k.mv_data, after, sizeof key))
            rc = mdb_cursor_get(c, &k, &v, MDB_NEXT);
    } else if (!rc) {
        rc = mdb_cursor_get(c, &k, &v, MDB_FIRST);
    }
    for (; !rc && limit; limit--) {
        struct store_info broken = {.damaged = true, .sel_layer = -1};
        struct store_entry *en = NULL;
        bool more;

        if (k.mv_size == STORE_KEY_LEN) {
            memcpy(broken.key, k.mv_data, STORE_KEY_LEN);
            entry_open_txn(s, txn, k.mv_data, &en, NULL);
            more = visit(arg, en ? store_entry_info(en) : &broken);
            store_entry_close(en);
            if (!more)
                break;
        }
        rc = mdb_cursor_get(c, &k, &v, MDB_NEXT);
    }
    if (c)
        mdb_cursor_close(c);
    mdb_txn_abort(txn);
    return rc && rc != MDB_NOTFOUND ? lmdb_fail(s, rc, "list", e) : 0;
}

static int count_one(void *arg, const uint8_t *key, const struct state *st)
{
    struct store_stats *r = arg;

    (void)key;
    r->entries++;
    r->used += st->stored_bytes;
    r->pinned += (st->flags & STATE_PINNED) != 0;
    r->damaged += (st->flags & STATE_DAMAGED) != 0;
    return 0;
}

int store_stats(struct store *s, struct store_stats *ret, struct larder_err *e)
{
    struct store_stats r = {.budget = s->budget, .evicted = s->evicted};
    struct stat st;
    MDB_txn *txn;
    int rc = txn_read(s, &txn, e);

    if (rc)
        return rc;
    rc = each(s, txn, count_one, &r, e);
    mdb_txn_abort(txn);
    if (rc)
        return rc;
    if (!fstatat(s->dir_fd, "data.mdb", &st, 0))
        r.file_bytes = (uint64_t)st.st_blocks * 512;
    *ret = r;
    return 0;
}
