/* testlib.h - what every unit test needs: cmocka, a private directory, fault injection.
 *
 * A test binary holds one group; a case's name is a claim. Cases use fixed seeds,
 * never the clock.
 */
#ifndef LARDER_TESTLIB_H
#define LARDER_TESTLIB_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "mem.h"

/* xorshift64*: the same numbers everywhere. */
static inline uint64_t test_rand(uint64_t *s)
{
    *s ^= *s >> 12;
    *s ^= *s << 25;
    *s ^= *s >> 27;
    return *s * 0x2545f4914f6cdd1dULL;
}

/* Uniform in [-1, 1). */
static inline float test_randf(uint64_t *s)
{
    return (float)((double)(test_rand(s) >> 11) / (double)(1ULL << 52) - 1.0);
}

/* A fresh directory below $TMPDIR; the caller removes it with test_rmdir(). */
static inline char *test_mkdir(void)
{
    const char *base = getenv("TMPDIR");
    char *p = NULL;

    if (asprintf(&p, "%s/larder-test-XXXXXX", base ? base : "/tmp") < 0 || !mkdtemp(p))
        abort();
    return p;
}

static inline void test_rmdir(char *dir)
{
    char *cmd = NULL;

    if (asprintf(&cmd, "rm -rf '%s'", dir) < 0 || system(cmd) != 0)
        abort();
    free(cmd);
    free(dir);
}

/* mem_set_hook() callback: *arg counts down, the allocation that finds 0 fails. */
static inline bool test_fail_nth(void *arg)
{
    long *left = arg;

    return (*left)-- != 0;
}

#endif
