/* engine.h - layer-major prefill with pruning.
 *
 * Purpose    All tokens pass layer L before L+1: one layer's weights, K and V exist at a
 *            time, the window scores of every layer are seen in order, and tokens can be
 *            cut after any layer. Surviving rows leave through a sink, layer by layer.
 * Ownership  Results are filled in and freed with engine_result_done().
 * Threads    One run at a time per backend.
 * Errors     LARDER_EEMPTY, LARDER_ETOOLONG, LARDER_EBUDGET, LARDER_EPOLICY,
 *            LARDER_EUNSUPPORTED (a policy that needs a calibration, and there is none),
 *            LARDER_ENUMERIC (a score or a logit is not finite: nothing may be stored),
 *            LARDER_ECANCELED, and the backend's.
 */
#ifndef LARDER_ENGINE_H
#define LARDER_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "cut.h"
#include "policy.h"
#include "recall.h"
#include "shares.h"
#include "template.h"

/* What is prefilled; borrowed during the call. */
struct engine_doc {
    const uint32_t *ids; /* [n] */
    uint32_t n;
    const struct template *tmpl; /* whose form a replay's prompt takes; NULL: none */
    const struct shares *shares; /* of the model; NULL: never calibrated */
};

/* The kept rows of one layer, gathered: borrowed during the call. */
struct kept_rows {
    uint32_t n_rows;
    const uint32_t *position; /* [n_rows] original positions, ascending */
    const void *k, *v;        /* [n_rows][head_dim], or tiles of a packed type (packed.h) */
    const float *bias;        /* [n_rows], values that bf16 represents; NULL for all or for none */
    enum kv_dtype dtype;      /* of k and v: the backend's, or the policy's int8 or int4 */
};

struct engine_sink {
    void *arg;
    /* Once per layer in ascending order; heads[n_kv_heads]. May be NULL. */
    int (*layer)(void *arg, uint32_t layer, const struct kept_rows *heads, struct larder_err *e);
    /* Before each layer; a non-zero return cancels the run with that code. May be NULL. */
    int (*progress)(void *arg, const char *pass, uint32_t layer, uint32_t n_layers);
};

struct engine_result {
    uint32_t n_ctx;
    uint32_t next_pos;
    int32_t sel_layer; /* -1: no cut */
    bool renumbered;   /* gemfilter, asl2pass: rows have fresh positions */
    struct variance_point *trace;
    uint32_t n_trace;
    uint32_t *selected; /* original positions that passed the cut, ascending; NULL: all */
    uint32_t n_selected;
    float *logits;                  /* [n_vocab] of the last row */
    struct certificate certificate; /* n_probes 0: none was made */
    double load_ms, prefill_ms;
};

/* LARDER_EUNSUPPORTED where n positions, those of a document and of what stands behind it at once,
 * pass a layer's window and the policy cannot be computed then. */
int engine_check_windows(const struct model_params *m, const struct policy *p, uint64_t n,
                         struct larder_err *e);

int engine_prefill(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                   const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e);

/* n policies in one pass, of which each shares it with the first (policy_same_pass()): one
 * sink[n] and ret[n] for each, and the first sink's progress(). Times are those of the pass. */
int engine_prefill_each(struct backend *b, const struct engine_doc *doc,
                        const struct policy *policy, const struct engine_sink *sink, uint32_t n,
                        struct engine_result *ret, struct larder_err *e);
void engine_result_done(struct engine_result *r);

#endif
