/* tokenizer_json.h - a tokenizer from a Hugging Face tokenizer.json.
 *
 * Purpose    Read the file, which may be hostile, and accept exactly what tokenizer.h can do:
 *            BPE at byte level (GPT-2, Llama 3, Qwen 2, SmolLM) and SentencePiece-style BPE with
 *            byte fallback (Llama 2, Mistral, Phi-3). Everything else is refused by its name.
 * Ownership  The tokenizer is the caller's (tokenizer_free); nothing of the file is kept.
 * Threads    No state.
 * Errors     LARDER_EIO, LARDER_ETOOBIG, LARDER_EMODEL, LARDER_EUNSUPPORTED, LARDER_ENOMEM.
 */
#ifndef LARDER_TOKENIZER_JSON_H
#define LARDER_TOKENIZER_JSON_H

#include "tokenizer.h"

#define TOKENIZER_JSON_MAX (64u << 20) /* bytes; the largest published files have half of that */

/* BOS is what the post-processor puts first, if it does. The file does not say which token is
 * EOS: see tokenizer_set_eos(). Ids may have holes, and there may be fewer than the model's
 * embedding has rows. */
int tokenizer_from_json(struct tokenizer **ret, const char *path, struct larder_err *e);

#endif
