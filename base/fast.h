/* fast.h - plain loops compiled for several kinds of processor.
 *
 * Purpose    FAST marks a function whose loops the compiler turns into vectors, once for each kind;
 *            which one runs is decided when the program starts. Sums keep their order and are never
 *            fused, so the kind does not change a result.
 */
#ifndef LARDER_FAST_H
#define LARDER_FAST_H

#define FAST                                                                                       \
    __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"),                             \
                   optimize("O3", "fp-contract=off")))

#endif
