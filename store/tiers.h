/* tiers.h - bytes of which few values are frequent, in codes of two bits, three bits and eight.
 *
 * Purpose    What exponents look like once their channel's base is taken off: three values make up
 *            about three quarters of them, seven more nearly all of the rest. Codes of fixed width
 *            decode without a branch per byte, faster than Huffman codes and at almost their size
 *            (FORMAT.md section 3).
 * Ownership  Everything borrows the caller's buffers.
 * Threads    Pure functions over them.
 */
#ifndef LARDER_TIERS_H
#define LARDER_TIERS_H

#include <stddef.h>
#include <stdint.h>

#define TIERS_GROUP 64u /* codes are written in groups; the last group is padded */
#define TIERS_FIRST 3u
#define TIERS_SECOND 7u
#define TIERS_HEADER 16u

/* Codes of groups of 64 bytes, `values` having one of their own. Bytes that escape go to `escaped`;
 * returns their number. */
typedef uint32_t tiers_escape(const uint8_t *src, uint32_t groups, const uint8_t *values,
                              uint8_t *codes, uint8_t *escaped);

/* The inner loops, one set for each kind of processor. */
struct tiers_kernel {
    const char *name;
    tiers_escape *escape;       /* opposite of first(): 3 values, 64 bytes of room behind escaped */
    tiers_escape *escape_again; /* opposite of second(): 7 values */
    /* Groups of 24 bytes to 64 bytes each; code 7 takes its byte from *raw, and none may be taken
     * beyond end. 0, or -1. */
    int (*second)(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                  const uint8_t **raw, const uint8_t *end, uint8_t *out);
    /* Groups of 16 bytes to 64 bytes each; code 3 takes the next byte of *escaped, which has 64
     * bytes behind its last. */
    void (*first)(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                  const uint8_t **escaped, uint8_t *out);
};

/* Those that this processor runs, best first; the last is plain C. NULL beyond them. */
const struct tiers_kernel *tiers_kernel(unsigned i);

/* Code src[0..n) to out. `scratch`: n + TIERS_GROUP bytes. Returns the bytes written, 0 when
 * they are more than `cap`. */
size_t tiers_encode(const struct tiers_kernel *k, const uint8_t *src, uint32_t n, uint8_t *scratch,
                    uint8_t *out, size_t cap);

/* Decoding, from the first byte to the last. */
struct tiers {
    const struct tiers_kernel *kernel;
    const uint8_t *codes; /* of the next group */
    const uint8_t *escaped, *escaped_end;
    uint8_t table[16];
    uint32_t n_groups, group; /* groups in all, the next one */
};

/* `escaped` holds CHANNELS_MAX_ELEMS + TIERS_GROUP bytes and is used until the last tiers_read().
 * 0, or -1 for bytes that are not n coded bytes. */
int tiers_open(struct tiers *t, const struct tiers_kernel *k, const uint8_t *coded, size_t len,
               uint32_t n, uint8_t *escaped);

/* Decode groups until `upto` bytes are there, into the same dst in every call (room for whole
 * groups). Returns how many are there. */
uint32_t tiers_read(struct tiers *t, uint32_t upto, uint8_t *dst);

/* After the last byte: 0, or -1 when there were more or fewer second codes than said. */
int tiers_close(const struct tiers *t);

#endif
