/* bytes.h - bounded little-endian reader and writer.
 *
 * Purpose    Every stored or received integer passes through here; no struct is
 *            ever cast onto bytes. A reader that runs past its end turns bad and
 *            stays bad: read a whole header, then check rd_ok() once.
 * Ownership  Both borrow their buffer.
 * Threads    One reader or writer belongs to one thread.
 * Errors     rd_*: zero and the bad flag; wr_*: nothing is written, bad flag.
 */
#ifndef LARDER_BYTES_H
#define LARDER_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct rd {
    const uint8_t *p;   /* next byte */
    const uint8_t *end; /* one past the last byte */
    bool bad;           /* a read went past the end */
};

static inline struct rd rd_init(const void *buf, size_t len)
{
    struct rd r = {buf, buf ? (const uint8_t *)buf + len : NULL, false};
    return r;
}

static inline size_t rd_left(const struct rd *r)
{
    return r->bad ? 0 : (size_t)(r->end - r->p);
}

static inline bool rd_ok(const struct rd *r)
{
    return !r->bad;
}

/* n bytes in place, borrowed from the buffer; NULL when fewer are left. */
static inline const uint8_t *rd_bytes(struct rd *r, uint64_t n)
{
    const uint8_t *at = r->p;

    if (r->bad || n > rd_left(r)) {
        r->bad = true;
        return NULL;
    }
    r->p += n;
    return at;
}

static inline uint64_t rd_uint(struct rd *r, unsigned n)
{
    const uint8_t *b = rd_bytes(r, n);
    uint64_t v = 0;

    if (!b)
        return 0;
    for (unsigned i = 0; i < n; i++)
        v |= (uint64_t)b[i] << (8 * i);
    return v;
}

static inline uint8_t rd_u8(struct rd *r) { return (uint8_t)rd_uint(r, 1); }
static inline uint16_t rd_u16(struct rd *r) { return (uint16_t)rd_uint(r, 2); }
static inline uint32_t rd_u32(struct rd *r) { return (uint32_t)rd_uint(r, 4); }
static inline uint64_t rd_u64(struct rd *r) { return rd_uint(r, 8); }

static inline float rd_f32(struct rd *r)
{
    uint32_t u = rd_u32(r);
    float f;

    memcpy(&f, &u, sizeof f);
    return f;
}

static inline double rd_f64(struct rd *r)
{
    uint64_t u = rd_u64(r);
    double f;

    memcpy(&f, &u, sizeof f);
    return f;
}

struct wr {
    uint8_t *p;
    uint8_t *end;
    bool bad;
};

static inline struct wr wr_init(void *buf, size_t len)
{
    struct wr w = {buf, buf ? (uint8_t *)buf + len : NULL, false};
    return w;
}

static inline bool wr_ok(const struct wr *w)
{
    return !w->bad;
}

static inline void wr_bytes(struct wr *w, const void *b, uint64_t n)
{
    if (w->bad || n > (uint64_t)(w->end - w->p)) {
        w->bad = true;
        return;
    }
    if (n)
        memcpy(w->p, b, (size_t)n);
    w->p += n;
}

static inline void wr_uint(struct wr *w, uint64_t v, unsigned n)
{
    uint8_t b[8];

    for (unsigned i = 0; i < n; i++)
        b[i] = (uint8_t)(v >> (8 * i));
    wr_bytes(w, b, n);
}

static inline void wr_u8(struct wr *w, uint8_t v) { wr_uint(w, v, 1); }
static inline void wr_u16(struct wr *w, uint16_t v) { wr_uint(w, v, 2); }
static inline void wr_u32(struct wr *w, uint32_t v) { wr_uint(w, v, 4); }
static inline void wr_u64(struct wr *w, uint64_t v) { wr_uint(w, v, 8); }

static inline void wr_f32(struct wr *w, float f)
{
    uint32_t u;

    memcpy(&u, &f, sizeof u);
    wr_u32(w, u);
}

static inline void wr_f64(struct wr *w, double f)
{
    uint64_t u;

    memcpy(&u, &f, sizeof u);
    wr_u64(w, u);
}

#endif
