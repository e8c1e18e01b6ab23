/* mem.c - the one place that calls malloc, so that a test can fail the n-th
 * allocation. The hook is the only mutable global outside daemon/: tests set it
 * before any thread starts and production code never does. */
#include "mem.h"

#include <stdlib.h>
#include <string.h>

#include "size.h"

static bool (*hook_allow)(void *arg);
static void *hook_arg;

/* Total bytes, or 0 when the request must fail. */
static size_t want(uint64_t count, uint64_t size)
{
    uint64_t n;

    if (!size_mul(count, size, &n) || n > SIZE_MAX / 2)
        return 0;
    if (hook_allow && !hook_allow(hook_arg))
        return 0;
    return n ? (size_t)n : 1;
}

void *mem_alloc(uint64_t count, uint64_t size)
{
    size_t n = want(count, size);
    return n ? malloc(n) : NULL;
}

void *mem_zalloc(uint64_t count, uint64_t size)
{
    size_t n = want(count, size);
    return n ? calloc(1, n) : NULL;
}

void *mem_aligned(uint64_t count, uint64_t size)
{
    size_t n = want(count, size);
    void *p;

    if (!n)
        return NULL;
    n = (n + 63) & ~(size_t)63;
    p = aligned_alloc(64, n);
    if (p)
        memset(p, 0, n);
    return p;
}

void *mem_grow(void *p, uint64_t count, uint64_t size)
{
    size_t n = want(count, size);
    return n ? realloc(p, n) : NULL;
}

void *mem_dup(const void *p, uint64_t n)
{
    void *q = mem_alloc(n, 1);

    if (q && n)
        memcpy(q, p, n);
    return q;
}

char *mem_strdup(const char *s)
{
    return mem_dup(s, strlen(s) + 1);
}

void mem_free(void *p)
{
    free(p);
}

void mem_set_hook(bool (*allow)(void *arg), void *arg)
{
    hook_allow = allow;
    hook_arg = arg;
}
