/* tokenizer_gguf.h - the tokenizer in a GGUF file.
 *
 * Purpose    The kinds `gpt2` (byte-level BPE with a named pre-tokenizer) and `llama`
 *            (SentencePiece BPE by score, byte fallback). Others are refused by name.
 * Ownership  The tokenizer is the caller's (tokenizer_free); nothing of the file is kept.
 * Threads    No state.
 * Errors     LARDER_EMODEL, LARDER_EUNSUPPORTED, LARDER_ENOMEM.
 */
#ifndef LARDER_TOKENIZER_GGUF_H
#define LARDER_TOKENIZER_GGUF_H

#include "gguf.h"
#include "tokenizer.h"

/* n_vocab: rows of the embedding, which the vocabulary must match; 0: any number. */
int tokenizer_from_gguf(struct tokenizer **ret, const struct gguf *g, uint32_t n_vocab,
                        struct larder_err *e);

#endif
