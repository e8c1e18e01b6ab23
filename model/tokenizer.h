/* tokenizer.h - byte pair encoding, as a model's files define it.
 *
 * Purpose    Text to token ids and back, equal to the Hugging Face tokenizer of the same
 *            vocabulary (of a `llama` vocabulary in GGUF: to SentencePiece). Three kinds of
 *            vocabulary; around each the same steps: literals of added tokens are cut out,
 *            the rest is normalised, cut into pieces (pretok.h) and merged (bpe.h).
 * Ownership  Results are mem_free()d by the caller.
 * Threads    Read-only after construction.
 * Errors     LARDER_EUNSUPPORTED (names the feature), LARDER_EMODEL (what in the vocabulary is
 *            wrong), LARDER_ETEXT (invalid UTF-8, with the byte offset), LARDER_ETOOBIG,
 *            LARDER_ENOMEM.
 */
#ifndef LARDER_TOKENIZER_H
#define LARDER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"
#include "pretok.h"

struct tokenizer;

/* How tokens are spelled and which neighbours merge first. */
enum tokenizer_kind {
    TOKENIZER_BYTES,  /* bytes in the byte-level alphabet; by a list of merges */
    TOKENIZER_MERGES, /* characters, U+2581 for a space, <0xXX> for a byte; by a list of merges */
    TOKENIZER_SCORES, /* spelled likewise; by the score of what a merge makes */
};

/* The space that SentencePiece puts before a text. */
enum tokenizer_prefix {
    PREFIX_NONE,
    PREFIX_ALWAYS,  /* at the start and behind each added token */
    PREFIX_MISSING, /* there, unless a space is there already */
    PREFIX_FIRST,   /* at the start of a text only, unless a space is there already */
};

/* A token that text becomes where its literal stands. */
struct tokenizer_added {
    const char *text; /* UTF-8 */
    uint32_t len, id;
    bool special;        /* not looked for in a user's text */
    bool lstrip, rstrip; /* takes the white space before or after it along */
    bool single_word;    /* only between characters that are not part of words */
    bool normalized;     /* looked for after normalisation, not before */
};

/* What a model's files provide; all arrays are copied. */
struct tokenizer_spec {
    enum tokenizer_kind kind;
    const char *pretok; /* GGUF's name for the stages, for the fingerprint; NULL: it has none */
    uint32_t n_vocab;
    const char *const *token; /* [n_vocab], as the file spells them; NULL: no such token */
    const uint32_t *token_len;
    const uint8_t *literal; /* [n_vocab]; 1: reached by its literal only, never by merging */
    uint32_t n_merges;
    const char *const *merge; /* "left right", best first */
    const uint32_t *merge_len;
    const float *score; /* [n_vocab], TOKENIZER_SCORES only */
    uint32_t n_added;
    const struct tokenizer_added *added;
    int64_t bos, eos; /* -1: none */
    bool add_bos;     /* a sequence begins with bos */
    /* the steps between text and pieces */
    bool nfc;
    enum tokenizer_prefix prefix;
    bool mark_first;    /* spaces are marked before added tokens with `normalized` are looked for */
    bool split_spaces;  /* a piece ends before each space */
    bool ignore_merges; /* a piece that is a token needs no merging */
    const struct pretok_stage *stage[PRETOK_STAGES];
};

int tokenizer_new(struct tokenizer **ret, const struct tokenizer_spec *spec, struct larder_err *e);
void tokenizer_free(struct tokenizer *t); /* accepts NULL */

/* Token ids of text[0..len). With parse_special, literals of special tokens become
 * those tokens; otherwise they are plain text. No BOS is added. A byte that the
 * vocabulary cannot spell (some control characters) gives no token. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool parse_special,
                     uint32_t **ret_ids, size_t *ret_n, struct larder_err *e);

/* What stands before a text that is encoded by itself: it decides about SentencePiece's space. */
enum tokenizer_before { BEFORE_NOTHING, BEFORE_ADDED, BEFORE_TEXT };

/* What a text meets that goes on from ids[n], n > 0. */
enum tokenizer_before tokenizer_before(const struct tokenizer *t, const uint32_t *ids, size_t n);

int tokenizer_encode_after(const struct tokenizer *t, enum tokenizer_before before,
                           const char *text, size_t len, bool parse_special, uint32_t **ret_ids,
                           size_t *ret_n, struct larder_err *e);

/* Bytes of one token (not NUL-terminated, borrowed), spaces as spaces; an added token gives its
 * literal. A piece may end inside a UTF-8 sequence. NULL for an id out of range. */
const char *tokenizer_piece(const struct tokenizer *t, uint32_t id, size_t *ret_len);

uint32_t tokenizer_n_vocab(const struct tokenizer *t);
bool tokenizer_is_special(const struct tokenizer *t, uint32_t id);
bool tokenizer_is_added(const struct tokenizer *t, uint32_t id); /* special or not */
int64_t tokenizer_bos(const struct tokenizer *t);                /* -1: none */
int64_t tokenizer_eos(const struct tokenizer *t);                /* -1: none */
bool tokenizer_adds_bos(const struct tokenizer *t);
enum tokenizer_kind tokenizer_kind(const struct tokenizer *t);
bool tokenizer_composes(const struct tokenizer *t); /* texts are brought to NFC first */

/* Name of stage i of the pre-tokenizer, i < PRETOK_STAGES; NULL: there is none from i on. */
const char *tokenizer_stage(const struct tokenizer *t, uint32_t i);

/* The end of an answer, where the tokenizer's own file does not say it (tokenizer.json). Before
 * other threads read. LARDER_EMODEL: no such token. */
int tokenizer_set_eos(struct tokenizer *t, int64_t eos, struct larder_err *e);

/* Everything that decides how text becomes tokens (PROTOCOL.md section 2). */
void tokenizer_fingerprint(const struct tokenizer *t, uint8_t ret[32]);

#endif
