/* size.h - checked size arithmetic: every product, sum and padding of numbers
 * that came from outside goes through here before it is compared or allocated.
 *
 * Errors     Each function returns false on overflow and leaves *ret untouched.
 * Threads    No state.
 */
#ifndef LARDER_SIZE_H
#define LARDER_SIZE_H

#include <stdbool.h>
#include <stdint.h>

static inline bool size_add(uint64_t a, uint64_t b, uint64_t *ret)
{
    uint64_t r;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *ret = r;
    return true;
}

static inline bool size_mul(uint64_t a, uint64_t b, uint64_t *ret)
{
    uint64_t r;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *ret = r;
    return true;
}

/* Round `a` up to a multiple of `align`, a power of two. */
static inline bool size_align(uint64_t a, uint64_t align, uint64_t *ret)
{
    uint64_t r;
    if (!size_add(a, align - 1, &r))
        return false;
    *ret = r & ~(align - 1);
    return true;
}

/* *ret = *ret + a * b: the usual step when laying out a file. */
static inline bool size_mac(uint64_t *ret, uint64_t a, uint64_t b)
{
    uint64_t p;
    return size_mul(a, b, &p) && size_add(*ret, p, ret);
}

#endif
