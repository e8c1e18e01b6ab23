/* mem.h - allocation with checked sizes and a hook for fault tests.
 *
 * Ownership  What mem_* returns belongs to the caller: release with mem_free().
 * Threads    Safe, but install the hook before other threads run.
 * Errors     NULL when memory is out, when count * size overflows, or when the
 *            hook says so; the caller turns that into LARDER_ENOMEM.
 */
#ifndef LARDER_MEM_H
#define LARDER_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* count * size bytes, not cleared. A request for zero bytes yields one byte. */
void *mem_alloc(uint64_t count, uint64_t size);

/* The same, zeroed. */
void *mem_zalloc(uint64_t count, uint64_t size);

/* 64-byte aligned and zeroed, for vector kernels; release with mem_free(). */
void *mem_aligned(uint64_t count, uint64_t size);

/* Grow `p` (NULL allowed) to count * size bytes; on failure `p` stays valid. */
void *mem_grow(void *p, uint64_t count, uint64_t size);

/* Copies of n bytes, or of a string with its terminator. */
void *mem_dup(const void *p, uint64_t n);
char *mem_strdup(const char *s);

/* Accepts NULL. */
void mem_free(void *p);

/* Tests only: `allow(arg)` is asked before each allocation; false makes it fail.
 * NULL removes the hook. */
void mem_set_hook(bool (*allow)(void *arg), void *arg);

#endif
