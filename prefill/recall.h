/* recall.h - recall probes made from a document, and what their answers certify.
 *
 * Purpose    Nobody has asked yet, so an entry's quality is measured on questions that any
 *            document answers: to quote it. The answer is one sequence of passages, each from
 *            another part of the document; of each, some tokens are given as a cue and those after
 *            them are asked for. The same tokens are forced on the full cache and on the kept
 *            rows; how far the two distributions are apart at the quoted tokens is the certificate.
 * Shapes     One causal sequence of n_rows rows, positions from the document's end on.
 * Units      KL in nats, KL(full || kept), over the whole vocabulary.
 * Ownership  probes_make() allocates, probes_free() frees (NULL allowed).
 * Threads    No state.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_RECALL_H
#define LARDER_RECALL_H

#include "model.h"
#include "template.h"

#define PROBES 16u     /* spread over the document */
#define PROBE_CUE 8u   /* tokens that are given */
#define PROBE_QUOTE 8u /* tokens that are asked for */

struct probe {
    uint32_t at;     /* document position of the first quoted token */
    uint32_t scored; /* PROBE_QUOTE rows from this one on predict the quote */
};

struct probes {
    struct probe probe[PROBES];
    uint32_t n; /* 0: the document is too short, or leaves no positions */
    uint32_t n_rows;
    uint32_t *ids, *pos;
};

/* What was measured; n_probes 0: nothing. */
struct certificate {
    uint32_t n_probes, n_tokens;
    double kl;         /* mean over all quoted tokens */
    double agreement;  /* share of them where both have the same most likely token */
    double worst_kl;   /* mean of the worst probe, */
    uint32_t worst_at; /* and the position of its quote */
};

/* One probe in each of PROBES equal parts of the document's tokens from..n (fewer below 1,024
 * tokens, and where the model's positions end), where its tokens are rarest; digits and capitals
 * count extra. */
int probes_make(struct probes **ret, const struct model *m, const struct template *tmpl,
                const uint32_t *ids, uint32_t from, uint32_t n, struct larder_err *e);
void probes_free(struct probes *p);

/* One probe's logits on the full cache, [PROBE_QUOTE][n_vocab], become log-probabilities. */
void certificate_reference(float *full, uint32_t n_vocab);

/* Take one probe: `full` as certificate_reference() left it, and the logits on the kept rows, which
 * are overwritten. */
void certificate_add(struct certificate *c, const struct probe *p, const float *full, float *kept,
                     uint32_t n_vocab);

#endif
