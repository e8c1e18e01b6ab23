/* input.h - bytes of a model's files: rows of weights, and small texts whole.
 *
 * Ownership  input_read_text() allocates, the caller mem_free()s.
 * Threads    No state; pread, so that any number of threads may share a descriptor.
 * Errors     LARDER_EIO, LARDER_EMODEL (shorter than it was, not a regular file, above its limit),
 *            LARDER_ENOTFOUND without a message where a file is not there, LARDER_ENOMEM.
 */
#ifndef LARDER_INPUT_H
#define LARDER_INPUT_H

#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"

/* A regular file below a directory, open for reading; *ret_bytes: its size. */
int input_open(int dir, const char *name, int *ret, uint64_t *ret_bytes, struct larder_err *e);

/* Exactly n bytes at `offset`. */
int input_read_at(int fd, uint64_t offset, uint64_t n, void *dst, struct larder_err *e);

/* A whole file of at most `max` bytes, NUL-terminated. */
int input_read_text(int dir, const char *name, uint64_t max, char **ret, size_t *ret_len,
                    struct larder_err *e);

#endif
