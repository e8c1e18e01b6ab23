/* sha256.h - SHA-256, the one cryptographic hash of larder.
 *
 * Ownership  sha256_new() allocates, sha256_free() frees (NULL allowed).
 * Threads    One context belongs to one thread.
 */
#ifndef LARDER_SHA256_H
#define LARDER_SHA256_H

#include <stddef.h>
#include <stdint.h>

#define SHA256_LEN 32

struct sha256;

/* NULL when memory is out. */
struct sha256 *sha256_new(void);
void sha256_free(struct sha256 *s);
void sha256_add(struct sha256 *s, const void *p, size_t n);

/* Digest of what was added so far; more may be added afterwards. */
void sha256_get(const struct sha256 *s, uint8_t out[SHA256_LEN]);

/* One call for a whole buffer. */
void sha256_of(const void *p, size_t n, uint8_t out[SHA256_LEN]);

/* Lower-case hex with terminator. */
void sha256_hex(const uint8_t in[SHA256_LEN], char out[2 * SHA256_LEN + 1]);

/* 0, or -1 unless `hex` is exactly 64 hex digits. */
int sha256_unhex(const char *hex, uint8_t out[SHA256_LEN]);

#endif
