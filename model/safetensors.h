/* safetensors.h - bounded reader of safetensors files.
 *
 * Purpose    Read the header (a JSON object with one entry per tensor) of a file that may be
 *            hostile and check it whole: every shape against its type and its place, places
 *            against each other and against the file. Tensor bytes are read by whoever wants them,
 *            at the offsets that stand here (input.h). Nothing is mapped.
 * Source     The format of huggingface/safetensors: u64 LE length, header, data. As there, tensors
 *            must fill the data without a hole.
 * Ownership  safetensors_open() allocates, safetensors_close() frees (NULL allowed). Names are
 *            borrowed from the file.
 * Threads    Read-only after open.
 * Errors     LARDER_EMODEL names the tensor and what is wrong; LARDER_EUNSUPPORTED a type of
 *            which not even the size is known; LARDER_ENOTFOUND without a message where there is no
 *            such file; LARDER_EIO; LARDER_ENOMEM.
 */
#ifndef LARDER_SAFETENSORS_H
#define LARDER_SAFETENSORS_H

#include <stdint.h>

#include "larder_status.h"

#define SAFETENSORS_MAX_DIMS 8u

struct safetensors;
struct tensor_format;

struct safetensor {
    const char *name;
    const char *dtype;                  /* "BF16", ... */
    const struct tensor_format *format; /* NULL: a type that nothing here computes with */
    uint32_t n_dims;
    uint64_t dim[SAFETENSORS_MAX_DIMS]; /* slowest first */
    uint64_t offset;                    /* of its bytes, from the start of the file */
    uint64_t n_bytes;
};

/* File `name` below the open directory `dir`. */
int safetensors_open(struct safetensors **ret, int dir, const char *name, struct larder_err *e);
void safetensors_close(struct safetensors *s);

/* Descriptor of the open file and its length; stays the file's. */
int safetensors_fd(const struct safetensors *s);
uint64_t safetensors_bytes(const struct safetensors *s);

/* In the order of their places. */
uint32_t safetensors_n(const struct safetensors *s);
const struct safetensor *safetensors_at(const struct safetensors *s, uint32_t i);

#endif
