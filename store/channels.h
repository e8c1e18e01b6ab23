/* channels.h - bf16 rows as two planes: exponents relative to their channel's, and the rest.
 *
 * Purpose    r = rotate left (v, 1) of a bf16 value has the exponent in its high byte; sign and
 *            mantissa, the low byte, do not compress. The exponents of one channel of one head lie
 *            close together, those of different channels do not: what is coded is the difference
 *            from a base that the channel has for a run of rows (FORMAT.md section 3).
 * Ownership  A struct channels borrows its bases: from the bytes it was read from, or from itself.
 * Threads    Pure functions over the caller's structures.
 */
#ifndef LARDER_CHANNELS_H
#define LARDER_CHANNELS_H

#include <stddef.h>
#include <stdint.h>

#include "bytes.h"
#include "geom.h"

#define CHANNELS_MAX_ELEMS (1u << 19)
#define CHANNELS_RUN_ELEMS                                                                         \
    4096u /* a run has at least as many, and at least as many rows as here: */
#define CHANNELS_RUN_ROWS 64u
#define CHANNELS_MAX_RUNS (CHANNELS_MAX_ELEMS / CHANNELS_RUN_ELEMS + 1)
#define CHANNELS_MAX_BASES (CHANNELS_MAX_ELEMS / CHANNELS_RUN_ROWS + KV_MAX_HEAD_DIM)
/* A run count, then per run its elements (u32), width (u16) and bases. */
#define CHANNELS_MAX_BYTES (2 + 6 * CHANNELS_MAX_RUNS + CHANNELS_MAX_BASES)

/* What the elements to be coded are: runs of n in rows of `width`, the first of any channel. */
struct channel_rows {
    uint32_t n_runs;
    struct {
        uint32_t n, width;
    } run[CHANNELS_MAX_RUNS];
};

/* n more elements. Few of them join the run before: bases of their own would not pay. */
void channels_add(struct channel_rows *rows, uint32_t n, uint32_t width);

struct channel_run {
    uint32_t n, width;
    const uint8_t *base; /* [width]: of elements whose index in the run is that modulo width */
};

struct channels {
    uint32_t n_runs;
    struct channel_run run[CHANNELS_MAX_RUNS];
    uint8_t own[CHANNELS_MAX_BASES];
};

/* Choose bases for little-endian values, as many as `rows` has (at most CHANNELS_MAX_ELEMS). */
void channels_choose(struct channels *c, const uint8_t *raw, const struct channel_rows *rows);

void channels_write(const struct channels *c, struct wr *w);
/* 0, or -1 for bytes that do not describe n elements. Bases stay where they are read. */
int channels_read(struct channels *c, struct rd *r, uint32_t n);

/* A place in the runs; passes from the first element to the last. */
struct channels_at {
    const struct channels *c;
    uint32_t run, at;                     /* next element: in which run, how far into it */
    uint32_t period;                      /* of `pattern`; 0: not laid out yet */
    uint8_t pattern[2 * KV_MAX_HEAD_DIM]; /* the run's bases, again and again */
};

static inline struct channels_at channels_start(const struct channels *c)
{
    return (struct channels_at){.c = c};
}

/* The next n values of raw into their two planes, and back. */
void channels_split(struct channels_at *a, const uint8_t *raw, uint32_t n, uint8_t *exponent,
                    uint8_t *rest);
void channels_merge(struct channels_at *a, const uint8_t *exponent, const uint8_t *rest, uint32_t n,
                    uint8_t *raw);

#endif
