/* nfc.h - Unicode normalisation form C, as the reference tokenizers have it.
 *
 * Purpose    Compose a text before it is cut: NFC of Unicode 9.0, which is what the Hugging Face
 *            implementation knows, on valid UTF-8.
 * Threads    No state.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_NFC_H
#define LARDER_NFC_H

#include <stddef.h>

#include "larder_status.h"

/* *ret: the composed text, mem_free()d by the caller; NULL where text stays as it is. */
int nfc_compose(const char *text, size_t len, char **ret, size_t *ret_len, struct larder_err *e);

#endif
