/* pretok.h - pre-tokenizer patterns as hand-written linear matchers.
 *
 * Purpose    Cut text into the pieces inside which BPE may merge. A pattern named by a
 *            model file, or written out in it, is looked up in a table of ours, never compiled
 *            from the file: each of ours passes once over the text, whatever the text is.
 * Threads    No state.
 */
#ifndef LARDER_PRETOK_H
#define LARDER_PRETOK_H

#include <stdbool.h>
#include <stddef.h>

#define PRETOK_STAGES 4

/* Length in bytes of the piece that starts at text[0]; text is valid UTF-8, len > 0. */
typedef size_t pretok_fn(const char *text, size_t len);

struct pretok_stage {
    const char *name;
    pretok_fn *fn;
    const char *pattern; /* the regular expression it stands for */
    bool covers;         /* no text is between its matches */
};

/* What a name in a GGUF file (tokenizer.ggml.pre) stands for. Each stage cuts the pieces of the
 * one before it; NULL ends the list. */
struct pretok {
    const char *name;
    const char *stage[PRETOK_STAGES];
    bool nfc;           /* the text is normalised first */
    bool ignore_merges; /* a piece that is a token needs no merging */
    bool add_bos;       /* unless the file says otherwise */
};

/* NULL for a name that is not in the table. */
const struct pretok *pretok_find(const char *name);

/* Names in the table, comma-separated. */
const char *pretok_names(void);

/* By name, or by regular expression; NULL for one that is not in the table. */
const struct pretok_stage *pretok_stage(const char *name);
const struct pretok_stage *pretok_stage_for(const char *pattern);

/* White space, and characters of words, as Unicode has them (\s and \w of regular expressions):
 * bytes of the one at p, or that ends before p + len; 0: none. Valid UTF-8. */
size_t pretok_space_at(const char *p, size_t len);
size_t pretok_space_before(const char *p, size_t len);
bool pretok_word_at(const char *p, size_t len);
bool pretok_word_before(const char *p, size_t len);

#endif
