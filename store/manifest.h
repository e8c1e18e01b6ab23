/* manifest.h - the record that describes one entry (FORMAT.md, "Manifest").
 *
 * Purpose    Encode and decode the manifest. What comes from disk is hostile: every count
 *            is capped and every sum checked before it is used.
 * Ownership  A decoded manifest owns its strings and arrays: manifest_done().
 * Threads    No state.
 * Errors     LARDER_EDAMAGED, LARDER_EVERSION, LARDER_ENOMEM.
 */
#ifndef LARDER_MANIFEST_H
#define LARDER_MANIFEST_H

#include "codec.h"
#include "store.h"

#define MANIFEST_MAX (64u << 20)
#define MANIFEST_MAX_EXTENTS (1u << 20) /* 1 TiB of rows */
#define MANIFEST_MAX_STRING 4096u
#define MANIFEST_MAX_AUX (1u << 30)

enum stream { STREAM_ROWS = 0, STREAM_AUX = 1 };

struct extent {
    enum stream stream;
    enum codec_kind codec;
    uint32_t raw_len, stored_len;
    uint8_t hash[EXTENT_HASH_LEN];
};

/* The pieces of the aux stream, in order. */
struct aux_layout {
    uint64_t tokens, text, positions, logits, extra; /* bytes of each */
};

struct manifest {
    uint64_t entry_id;
    struct store_info info; /* strings and rows point into `mem` */
    struct aux_layout aux;
    uint64_t payload_bytes; /* of the row stream */
    uint32_t n_extents;
    uint32_t n_row_extents; /* these come first */
    struct extent *extent;
    char *mem;
    uint32_t *rows;
};

/* Encode; *ret is mem_free()d by the caller. */
int manifest_encode(const struct manifest *m, void **ret, size_t *ret_len, struct larder_err *e);
int manifest_decode(const void *bytes, size_t len, struct manifest *ret, struct larder_err *e);
void manifest_done(struct manifest *m); /* accepts a zeroed one */

#endif
