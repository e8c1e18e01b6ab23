/* gguf.h - bounded reader of GGUF v2 and v3 files.
 *
 * Purpose    Read the metadata (keys, tensor table) of a file that may be hostile and check
 *            it whole. Tensor bytes are read by whoever wants them, at the offsets that stand
 *            here (input.h). Nothing is mapped.
 * Ownership  gguf_open() allocates, gguf_close() frees (NULL allowed). Strings and arrays are
 *            borrowed from the gguf.
 * Threads    Read-only after open; any number of threads may read.
 * Errors     LARDER_EMODEL names the key or tensor and what is wrong; LARDER_EUNSUPPORTED;
 *            LARDER_EIO; LARDER_ENOMEM.
 */
#ifndef LARDER_GGUF_H
#define LARDER_GGUF_H

#include <stdbool.h>
#include <stdint.h>

#include "larder_status.h"

struct gguf;

/* Value types of the format. */
enum gguf_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_N_TYPES,
};

struct gguf_str {
    const char *p; /* not NUL-terminated */
    uint64_t len;
};

struct gguf_tensor {
    struct gguf_str name;
    uint32_t type; /* enum tensor_type (dequant.h) */
    uint32_t n_dims;
    uint64_t ne[4];  /* elements per dimension, fastest first; 1 where unused */
    uint64_t offset; /* of its bytes, from the start of the file */
    uint64_t n_bytes;
};

int gguf_open(struct gguf **ret, const char *path, struct larder_err *e);
void gguf_close(struct gguf *g);

/* Descriptor of the open file, for hashing and weights, and its length; stays the gguf's. */
int gguf_fd(const struct gguf *g);
uint64_t gguf_bytes(const struct gguf *g);

bool gguf_has(const struct gguf *g, const char *key);

/* Scalars: LARDER_ENOTFOUND (no message) when the key is absent, LARDER_EMODEL when its type or
 * range does not fit. Integers of every width are accepted if the value fits. */
int gguf_get_u32(const struct gguf *g, const char *key, uint32_t *ret, struct larder_err *e);
int gguf_get_f64(const struct gguf *g, const char *key, double *ret, struct larder_err *e);
int gguf_get_bool(const struct gguf *g, const char *key, bool *ret, struct larder_err *e);
int gguf_get_str(const struct gguf *g, const char *key, struct gguf_str *ret, struct larder_err *e);

/* Arrays: LARDER_EMODEL unless the element type is exactly `type`. */
int gguf_get_array(const struct gguf *g, const char *key, enum gguf_type type, uint64_t *ret_n,
                   const uint8_t **ret_bytes, struct larder_err *e);

/* Walk an array of strings that gguf_get_array() returned: *at starts as its bytes. */
struct gguf_str gguf_next_str(const uint8_t **at);

/* NULL when there is no such tensor. */
const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name);
uint64_t gguf_n_tensors(const struct gguf *g);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, uint64_t i);

#endif
