/* pass.h - what every pass through the layers does alike (engine.c, offline.c).
 *
 * Ownership  pass_load_layer() gives a layer to be freed through the backend; pass_logits()
 *            allocates.
 * Errors     LARDER_ECANCELED or what the caller's progress says, LARDER_ENUMERIC, the backend's.
 */
#ifndef LARDER_PASS_H
#define LARDER_PASS_H

#include "engine.h"

double pass_clock_ms(void);

/* Tell the sink (NULL allowed) that a layer begins; its refusal is the error. */
int pass_progress(const struct engine_sink *sink, const char *pass, uint32_t layer,
                  uint32_t n_layers, struct larder_err *e);

/* Time is added to *load_ms. */
int pass_load_layer(struct backend *b, uint32_t layer, struct layer **ret, double *load_ms,
                    struct larder_err *e);

/* Finite logits [n_vocab] of one row of hidden states. */
int pass_logits(struct backend *b, const float *hidden, float **ret, double *load_ms,
                struct larder_err *e);

#endif
