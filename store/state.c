/* state.c - what changes about an entry after it was stored: pins, damage, use, names.
 *
 * The one idea: it is a small record of its own beside the immutable manifest, so that
 * lists, eviction and counting never touch manifests. */
#include <string.h>

#include "bytes.h"
#include "mem.h"
#include "store_int.h"

#define FIXED 84u

int state_decode(const MDB_val *v, struct state *ret, struct larder_err *e)
{
    struct rd r = rd_init(v->mv_data, v->mv_size);
    struct state st = {0};
    const uint8_t *p;

    st.flags = rd_u32(&r);
    st.entry_id = rd_u64(&r);
    st.hits = rd_u64(&r);
    st.last_used = rd_u64(&r);
    st.stored_bytes = rd_u64(&r);
    st.raw_bytes = rd_u64(&r);
    st.n_ctx = rd_u32(&r);
    p = rd_bytes(&r, 32);
    if (p)
        memcpy(st.source, p, 32);
    st.n_names = rd_u32(&r);
    st.names_len = rd_left(&r);
    p = rd_bytes(&r, st.names_len);
    if (!rd_ok(&r) || st.n_names > STATE_MAX_NAMES || (st.names_len && p[st.names_len - 1]))
        return larder_fail(e, LARDER_EDAMAGED, "the state of an entry is damaged");
    for (size_t i = 0; i < st.names_len; i++)
        st.n_names -= !p[i];
    if (st.n_names)
        return larder_fail(e, LARDER_EDAMAGED, "the state of an entry is damaged");
    if (st.names_len) {
        st.names = mem_dup(p, st.names_len);
        if (!st.names)
            return larder_fail(e, LARDER_ENOMEM, "no memory");
        for (size_t i = 0; i < st.names_len; i++)
            st.n_names += !p[i];
    }
    *ret = st;
    return 0;
}

int state_get(const struct store *s, MDB_txn *txn, const uint8_t *key, struct state *ret,
              struct larder_err *e)
{
    MDB_val v;
    int rc = db_get(s, txn, DB_state, key, STORE_KEY_LEN, &v, e);

    return rc ? rc : state_decode(&v, ret, e);
}

int state_put(const struct store *s, MDB_txn *txn, const uint8_t *key, const struct state *st,
              struct larder_err *e)
{
    size_t len = FIXED + st->names_len;
    uint8_t *buf = mem_alloc(len, 1);
    struct wr w = wr_init(buf, len);
    int rc;

    if (!buf)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    wr_u32(&w, st->flags);
    wr_u64(&w, st->entry_id);
    wr_u64(&w, st->hits);
    wr_u64(&w, st->last_used);
    wr_u64(&w, st->stored_bytes);
    wr_u64(&w, st->raw_bytes);
    wr_u32(&w, st->n_ctx);
    wr_bytes(&w, st->source, 32);
    wr_u32(&w, st->n_names);
    wr_bytes(&w, st->names, st->names_len);
    rc = wr_ok(&w) ? db_put(s, txn, DB_state, key, STORE_KEY_LEN, buf, (size_t)(w.p - buf), e)
                   : larder_fail(e, LARDER_EINTERNAL, "state record");
    mem_free(buf);
    return rc;
}

void state_done(struct state *st)
{
    mem_free(st->names);
    st->names = NULL;
    st->names_len = 0;
    st->n_names = 0;
}
