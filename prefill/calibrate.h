/* calibrate.h - what a model's heads need, and where its layers settle, measured once.
 *
 * Purpose    Every text is replayed once (replay.h); one threshold over all layers and heads
 *            then says, for each of some budgets, which share of its rows each head would keep.
 *            The mean over the texts is the model's table of shares. Then a few questions are
 *            asked about every text, each as a part of it: the variance of ranks that they see in
 *            every layer gives lmin and tau (settle.h), the tokenizer the pooling kernel
 *            (reach.h).
 * Ownership  calibrate_open() allocates, calibrate_free() frees (NULL allowed).
 * Threads    One run at a time per backend.
 * Errors     The engine's; LARDER_ECANCELED where `progress` said so.
 */
#ifndef LARDER_CALIBRATE_H
#define LARDER_CALIBRATE_H

#include "engine.h"

struct calibration;

struct calibrate_watch {
    void *arg;
    /* Before each layer of each text, of all that are planned; as engine_sink.progress. */
    int (*progress)(void *arg, const char *pass, uint32_t layer, uint32_t n_layers);
};

/* For `n_texts` texts. watch NULL: nobody looks. */
int calibrate_open(struct calibration **ret, struct backend *b, uint32_t n_texts,
                   const struct calibrate_watch *watch, struct larder_err *e);
void calibrate_free(struct calibration *c);

/* Measure one text; doc->shares is not looked at. */
int calibrate_add(struct calibration *c, const struct engine_doc *doc, struct larder_err *e);

/* The mean over what was added; at least one text. The table's window says what else was measured:
 * no lmin and tau where every text was too short, or ranks do not settle; no kernel without a
 * tokenizer. */
int calibrate_shares(const struct calibration *c, struct shares **ret, struct larder_err *e);

/* Texts for models that nobody measured yet: part of the program, static. */
struct calibration_text {
    const char *name;
    const char *text; /* not terminated */
    size_t len;
};
#define CALIBRATION_TEXTS 3u
struct calibration_text calibration_text(uint32_t i);

#endif
