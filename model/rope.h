/* rope.h - rotary position embedding: how fast each pair of elements of a head turns.
 *
 * Purpose    A table of frequencies is all that architectures differ in: plain powers of a base,
 *            or those changed by one of the known scalings. Tables are made once, at open.
 * Source     RoFormer, arXiv 2104.09864; scalings as in Llama 3.1 ("llama3") and LongRoPE, arXiv
 *            2402.13753 ("longrope").
 * Shapes     Tables are [dims / 2]; pair i is elements i and i + dims / 2 of a head.
 * Units      Radians per position.
 * Ownership  Tables are the caller's.
 * Threads    No state.
 */
#ifndef LARDER_ROPE_H
#define LARDER_ROPE_H

#include <stdint.h>

struct rope {
    const double *freq; /* [rope_dims / 2] */
    double factor;      /* cos and sin are multiplied by it: the attention factor, else 1 */
};

/* How a model's frequencies differ from the plain ones. */
enum rope_scaling {
    ROPE_PLAIN,
    ROPE_LLAMA3,
    ROPE_FACTORS, /* by a table in the file, which is what GGUF makes of llama3 */
    ROPE_LONGROPE,
};

/* freq[i] = theta^(-2 i / dims) */
void rope_plain(double theta, uint32_t dims, double *freq);

/* Waves longer than n_original / low_freq turn `factor` times slower, those shorter than n_original
 * / high_freq as before, those between by an interpolation. */
struct rope_llama3 {
    double factor, low_freq, high_freq, n_original;
};
void rope_scale_llama3(const struct rope_llama3 *s, uint32_t dims, double *freq);

/* The attention factor that longrope prescribes for n positions where n_original were trained. */
double rope_longrope_factor(uint32_t n, uint32_t n_original);

/* cos and sin of one position, [dims / 2] each. */
void rope_angles(const struct rope *r, uint32_t dims, uint32_t pos, float *cosine, float *sine);

#endif
