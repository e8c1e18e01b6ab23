/* pretok.h - pre-tokenizer patterns as hand-written linear matchers.
 *
 * Purpose    Cut text into the pieces inside which BPE may merge. A pattern named by a
 *            model file is looked up in a table of ours, never compiled from the file.
 * Threads    No state.
 */
#ifndef LARDER_PRETOK_H
#define LARDER_PRETOK_H

#include <stddef.h>

/* Length in bytes of the piece that starts at text[0]; text is valid UTF-8, len > 0. */
typedef size_t pretok_fn(const char *text, size_t len);

/* NULL for a name that is not in the table. */
pretok_fn *pretok_find(const char *name);

/* Names in the table, comma-separated. */
const char *pretok_names(void);

#endif
