/* bpe.h - merging one piece of text.
 *
 * Purpose    The tokens of a piece: byte pair encoding, best merge first, leftmost of equals.
 * Ownership  Working memory and the list grow as needed; bpe_done() and mem_free(ids.id) end them.
 * Threads    One struct bpe belongs to one thread.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_BPE_H
#define LARDER_BPE_H

#include "tokenizer_int.h"

struct ids {
    uint32_t *id;
    size_t n, cap;
};

/* Working memory of one encode call. */
struct bpe {
    struct bpe_node *node;
    struct bpe_pair *heap;
    uint32_t cap, n_heap;
};

int ids_push(struct ids *out, uint32_t id, struct larder_err *e);

/* Appends the tokens of p[0..len), valid UTF-8 of at most 2^30 bytes. */
int bpe_piece(const struct tokenizer *t, struct bpe *w, const char *p, size_t len, struct ids *out,
              struct larder_err *e);
void bpe_done(struct bpe *w);

#endif
