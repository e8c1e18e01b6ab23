/* tokenizer.h - byte-level BPE, as the model file defines it.
 *
 * Purpose    Text to token ids and back, equal to the Hugging Face tokenizer of
 *            the same vocabulary. Pre-tokenizer patterns are hand-written linear
 *            matchers in a table of ours (pretok.h); nothing is compiled from the file.
 * Ownership  Results are mem_free()d by the caller.
 * Threads    Read-only after construction.
 * Errors     LARDER_ETEXT (invalid UTF-8, with the byte offset), LARDER_ETOOBIG, LARDER_ENOMEM.
 */
#ifndef LARDER_TOKENIZER_H
#define LARDER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"

struct tokenizer;

/* What a model file provides; all arrays are copied. */
struct tokenizer_spec {
    const char *model;  /* "gpt2" */
    const char *pretok; /* "smollm", ... */
    uint32_t n_vocab;
    const char *const *token; /* [n_vocab], in the byte-level alphabet, UTF-8 */
    const uint32_t *token_len;
    const uint8_t *is_special; /* [n_vocab]; control tokens, matched as literals */
    uint32_t n_merges;
    const char *const *merge; /* "left right", best first */
    const uint32_t *merge_len;
    int64_t bos, eos; /* -1: none */
    bool add_bos;
};

int tokenizer_new(struct tokenizer **ret, const struct tokenizer_spec *spec, struct larder_err *e);
void tokenizer_free(struct tokenizer *t); /* accepts NULL */

/* Token ids of text[0..len). With parse_special, literals of special tokens become
 * those tokens; otherwise they are plain text. No BOS is added. A byte that the
 * vocabulary cannot spell (some control characters) gives no token. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool parse_special,
                     uint32_t **ret_ids, size_t *ret_n, struct larder_err *e);

/* Bytes of one token (not NUL-terminated, borrowed); a special token gives its literal.
 * A piece may end inside a UTF-8 sequence. NULL for an id out of range. */
const char *tokenizer_piece(const struct tokenizer *t, uint32_t id, size_t *ret_len);

uint32_t tokenizer_n_vocab(const struct tokenizer *t);
bool tokenizer_is_special(const struct tokenizer *t, uint32_t id);
int64_t tokenizer_eos(const struct tokenizer *t); /* -1: none */
void tokenizer_fingerprint(const struct tokenizer *t, uint8_t ret[32]);

#endif
