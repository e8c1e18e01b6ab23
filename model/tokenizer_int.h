/* tokenizer_int.h - what the parts of the tokenizer share: its tables.
 *
 * Purpose    tokenizer_build.c fills them, tokenizer.c, added.c and bpe.c read them.
 * Ownership  All arrays are the tokenizer's.
 * Threads    Read-only after construction.
 */
#ifndef LARDER_TOKENIZER_INT_H
#define LARDER_TOKENIZER_INT_H

#include "tokenizer.h"

#define TOKENIZER_NONE UINT32_MAX

/* (left, right) -> (rank, into), open addressing. */
struct pair_slot {
    uint32_t left, right; /* left TOKENIZER_NONE: free */
    uint32_t rank, into;
};

struct pair_table {
    struct pair_slot *slot;
    uint32_t mask;
};

/* Literals of added tokens as a tree over bytes: node (parent, byte) -> into, from node 0. */
struct literals {
    struct pair_table edge;
    uint32_t *token; /* [n_nodes]: index of the added token that ends here, or TOKENIZER_NONE */
    uint32_t n_nodes;
    bool first[256]; /* bytes with which one begins */
};

struct tokenizer {
    enum tokenizer_kind kind;
    uint32_t n_vocab;
    char *bytes;     /* what each token spells, back to back */
    uint64_t *start; /* [n_vocab + 1] */
    uint8_t *word;   /* [n_vocab]: merging can reach it */
    uint8_t *flags;  /* [n_vocab]: enum below */
    struct tokenizer_added *added;
    uint32_t n_added;
    char *added_text;       /* what added[].text points into */
    struct literals before; /* normalisation: what is looked for before it */
    struct literals after;
    uint32_t *word_slot; /* hash of spelling -> id, open addressing */
    uint32_t word_mask;
    struct pair_table merges;
    uint32_t *rank; /* [n_vocab], TOKENIZER_SCORES: place of the score, 0 the best */
    uint32_t byte_token[256];
    bool nfc, mark_first, split_spaces, ignore_merges, add_bos;
    bool space_leads; /* no word holds a space behind another character */
    enum tokenizer_prefix prefix;
    const struct pretok_stage *stage[PRETOK_STAGES];
    int64_t bos, eos;
    uint8_t fingerprint[32];
};

enum { TOKEN_ADDED = 1, TOKEN_SPECIAL = 2 };

/* Id of the word spelled p[0..n), or TOKENIZER_NONE. */
uint32_t tokenizer_find_word(const struct tokenizer *t, const char *p, size_t n);

/* The slot of a pair: its own, or the free one where it belongs. */
struct pair_slot *pair_find(const struct pair_table *t, uint32_t left, uint32_t right);
int pair_table_init(struct pair_table *t, uint64_t n, struct larder_err *e);

/* Normalised text: *ret is mem_free()d by the caller, or NULL where text stays as it is. */
int tokenizer_normalise(const struct tokenizer *t, bool prefix, const char *text, size_t len,
                        char **ret, size_t *ret_len, struct larder_err *e);

/* How many of the bytes at p are valid UTF-8. */
size_t tokenizer_valid_utf8(const char *p, size_t len);

static inline size_t tokenizer_len(const struct tokenizer *t, uint32_t id)
{
    return (size_t)(t->start[id + 1] - t->start[id]);
}

#endif
