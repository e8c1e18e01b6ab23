/* added.h - literals of added tokens inside a text.
 *
 * Purpose    Find where a text spells an added token: leftmost first, longest of those.
 * Ownership  added_init() copies the list into the tokenizer, added_done() frees it.
 * Threads    Read-only after construction.
 * Errors     LARDER_EMODEL, LARDER_ENOMEM.
 */
#ifndef LARDER_ADDED_H
#define LARDER_ADDED_H

#include "tokenizer_int.h"

int added_init(struct tokenizer *t, const struct tokenizer_spec *spec, struct larder_err *e);
void added_done(struct tokenizer *t);

/* Index of the added token spelled exactly p[0..n), or TOKENIZER_NONE. */
uint32_t added_find(const struct tokenizer *t, const char *p, size_t n);

struct added_match {
    size_t start, end; /* with the white space that the token takes along */
    uint32_t id;
};

/* The first match in text[*at..len) that counts; *at moves past it. Text before `done` belongs
 * to earlier matches. False: there is none. */
bool added_next(const struct tokenizer *t, const struct literals *l, const char *text, size_t len,
                bool parse_special, size_t done, size_t *at, struct added_match *ret);

#endif
