/* sha256.c - a thin cover over libcrypto, which uses the processor's SHA
 * instructions. The low-level context is used because it can be copied for
 * free: a prefix index takes a digest at every block. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include "sha256.h"

#include <string.h>

#include <openssl/sha.h>

#include "mem.h"

struct sha256 {
    SHA256_CTX ctx;
};

struct sha256 *sha256_new(void)
{
    struct sha256 *s = mem_alloc(1, sizeof *s);

    if (s)
        SHA256_Init(&s->ctx);
    return s;
}

void sha256_free(struct sha256 *s)
{
    mem_free(s);
}

void sha256_add(struct sha256 *s, const void *p, size_t n)
{
    SHA256_Update(&s->ctx, p, n);
}

void sha256_get(const struct sha256 *s, uint8_t out[SHA256_LEN])
{
    SHA256_CTX copy = s->ctx;

    SHA256_Final(out, &copy);
}

void sha256_of(const void *p, size_t n, uint8_t out[SHA256_LEN])
{
    SHA256(p, n, out);
}

void sha256_hex(const uint8_t in[SHA256_LEN], char out[2 * SHA256_LEN + 1])
{
    static const char digit[] = "0123456789abcdef";

    for (int i = 0; i < SHA256_LEN; i++) {
        out[2 * i] = digit[in[i] >> 4];
        out[2 * i + 1] = digit[in[i] & 15];
    }
    out[2 * SHA256_LEN] = '\0';
}

static int nibble(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

int sha256_unhex(const char *hex, uint8_t out[SHA256_LEN])
{
    uint8_t tmp[SHA256_LEN];

    if (strlen(hex) != 2 * SHA256_LEN)
        return -1;
    for (int i = 0; i < SHA256_LEN; i++) {
        int hi = nibble(hex[2 * i]);
        int lo = nibble(hex[2 * i + 1]);

        if (hi < 0 || lo < 0)
            return -1;
        tmp[i] = (uint8_t)(hi << 4 | lo);
    }
    memcpy(out, tmp, sizeof tmp);
    return 0;
}
