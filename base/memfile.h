/* memfile.h - sealed memory files: made, checked, mapped.
 *
 * Purpose    Everything long that crosses a process boundary is a memfd sealed with
 *            exactly SEAL|SHRINK|GROW|WRITE: its receiver can map it without fear of
 *            truncation (SIGBUS) or change. A file that the daemon serves may have
 *            FUTURE_WRITE for WRITE: nobody can write to it any more except through a
 *            mapping that was there before, and the daemon's is on its way out.
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

/* An unsealed, zeroed file of n_bytes, mapped read-write (populated if `populate`). */
int memfile_new(const char *label, uint64_t n_bytes, int populate, int *ret_fd, void **ret_map,
                struct larder_err *e);

/* Make the pages of [at, at + len) and map them, so that writing there cannot end in SIGBUS. Any
 * number of threads at a time. */
int memfile_populate(void *map, uint64_t at, uint64_t len, struct larder_err *e);

/* Unmap (map, n_bytes; NULL where there is no mapping), cut the file to keep_bytes, chmod 0400 and
 * seal it. */
int memfile_seal(int fd, void *map, uint64_t n_bytes, uint64_t keep_bytes, struct larder_err *e);

/* In place of memfile_seal(), with FUTURE_WRITE, while the caller's mapping stays: taking one of
 * many pages down takes longer than filling them, so that is done where nobody waits. The caller
 * writes no more. */
int memfile_seal_mapped(int fd, struct larder_err *e);

/* To n_bytes, before it is sealed. What a mapping has beyond is not touched any more. */
int memfile_cut(int fd, uint64_t n_bytes, struct larder_err *e);

/* Check seals and size and map read-only. n_bytes UINT64_MAX: any size up to max_bytes. */
int memfile_map(int fd, uint64_t n_bytes, uint64_t max_bytes, const void **ret_map,
                uint64_t *ret_bytes, struct larder_err *e);

/* The same for a file that the daemon serves: WRITE or FUTURE_WRITE. */
int memfile_map_served(int fd, uint64_t n_bytes, uint64_t max_bytes, const void **ret_map,
                       uint64_t *ret_bytes, struct larder_err *e);
void memfile_unmap(const void *map, uint64_t n_bytes); /* accepts NULL */

#endif
