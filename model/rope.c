/* rope.c - tables of frequencies and the angles of a position, in f64. */
#include "rope.h"

#include <math.h>

void rope_plain(double theta, uint32_t dims, double *freq)
{
    for (uint32_t i = 0; i < dims / 2; i++)
        freq[i] = pow(theta, -2.0 * i / dims);
}

void rope_scale_llama3(const struct rope_llama3 *s, uint32_t dims, double *freq)
{
    for (uint32_t i = 0; i < dims / 2; i++) {
        double wave = 2 * 3.14159265358979323846 / freq[i];
        double smooth = (s->n_original / wave - s->low_freq) / (s->high_freq - s->low_freq);

        if (wave > s->n_original / s->low_freq)
            freq[i] /= s->factor;
        else if (wave >= s->n_original / s->high_freq)
            freq[i] = (1 - smooth) * freq[i] / s->factor + smooth * freq[i];
    }
}

double rope_longrope_factor(uint32_t n, uint32_t n_original)
{
    return n > n_original ? sqrt(1 + log((double)n / n_original) / log(n_original)) : 1;
}

void rope_angles(const struct rope *r, uint32_t dims, uint32_t pos, float *cosine, float *sine)
{
    for (uint32_t i = 0; i < dims / 2; i++) {
        double angle = pos * r->freq[i];

        cosine[i] = (float)(cos(angle) * r->factor);
        sine[i] = (float)(sin(angle) * r->factor);
    }
}
