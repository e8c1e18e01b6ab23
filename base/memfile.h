/* memfile.h - sealed memory files: made, checked, mapped.
 *
 * Purpose    Everything long that crosses a process boundary is a memfd sealed with
 *            exactly SEAL|SHRINK|GROW|WRITE: its receiver can map it without fear of
 *            truncation (SIGBUS) or change.
 * Ownership  Descriptors returned belong to the caller; memfile_unmap() ends a mapping.
 * Threads    No state.
 * Errors     LARDER_EIO, LARDER_ENOMEM, LARDER_EPROTO (not a sealed memory file of that size).
 */
#ifndef LARDER_MEMFILE_H
#define LARDER_MEMFILE_H

#include <stdint.h>

#include "larder_status.h"

/* A new sealed file of mode 0400 that holds a copy of buf. */
int memfile_from(const char *label, const void *buf, uint64_t len, int *ret_fd,
                 struct larder_err *e);

/* An unsealed, empty file of n_bytes, mapped read-write (populated if `populate`). */
int memfile_new(const char *label, uint64_t n_bytes, int populate, int *ret_fd, void **ret_map,
                struct larder_err *e);

/* An unsealed, zeroed file of n_bytes whose pages are there already. Written, not mapped: taking a
 * mapping of many pages down again costs more than copying into them. */
int memfile_blank(const char *label, uint64_t n_bytes, int *ret_fd, struct larder_err *e);
int memfile_write(int fd, uint64_t at, const void *buf, uint64_t len, struct larder_err *e);
int memfile_cut(int fd, uint64_t n_bytes, struct larder_err *e);

/* Unmap (map, n_bytes; NULL where there is no mapping), cut the file to keep_bytes, chmod 0400 and
 * seal it. */
int memfile_seal(int fd, void *map, uint64_t n_bytes, uint64_t keep_bytes, struct larder_err *e);

/* Check seals and size and map read-only. n_bytes UINT64_MAX: any size up to max_bytes. */
int memfile_map(int fd, uint64_t n_bytes, uint64_t max_bytes, const void **ret_map,
                uint64_t *ret_bytes, struct larder_err *e);
void memfile_unmap(const void *map, uint64_t n_bytes); /* accepts NULL */

#endif
