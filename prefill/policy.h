/* policy.h - a pruning policy: one canonical string, `name[,key=value...]`.
 *
 * Purpose    Parse, check against a model and a document, and print a policy in its one
 *            canonical spelling, which is part of every entry's key. A name stands for a
 *            choice on three axes - what is observed, how a budget is shaped, where tokens
 *            are cut - and for defaults; keys change both (policy_table.c has the table).
 * Source     ASL arXiv 2601.07667; SnapKV 2404.14469; FastKV 2502.01068; GemFilter 2409.17422;
 *            PyramidInfer 2405.12532; StreamingLLM 2309.17453; KeyDiff 2504.15364; KVzip
 *            2505.23416; AdaKV 2407.11550; PyramidKV 2406.02069; Expected Attention 2510.00636;
 *            TOVA 2401.06104; Knorm 2406.11430; H2O 2306.14048; CriticalKV 2502.03805;
 *            DefensiveKV 2510.13334; DuoAttention 2410.10819; Attention Matching 2602.16284.
 * Threads    No state.
 * Errors     LARDER_EPOLICY names the offending key, value or combination; LARDER_EBUDGET a
 *            budget that cannot hold more than the rows that always stay.
 */
#ifndef LARDER_POLICY_H
#define LARDER_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"
#include "larder_status.h"
#include "profile_id.h"

enum policy_kind {
    POLICY_FULL,
    POLICY_SNAPKV,
    POLICY_ASL,
    POLICY_FASTKV,
    POLICY_GEMFILTER,
    POLICY_ASL2PASS,
    POLICY_PYRAMIDINFER,
    POLICY_STREAMING,
    POLICY_KEYDIFF,
    POLICY_EXPECTED,
    POLICY_TOVA,
    POLICY_KNORM,
    POLICY_OBSERVED,
    POLICY_ADAKV,
    POLICY_PYRAMIDKV,
    POLICY_CRITICALKV,
    POLICY_DEFENSIVE,
    POLICY_DUO,
    POLICY_KVZIP,
    POLICY_KVZIP_PLUS,
    POLICY_MATCHING,
    POLICY_OFFLINE,
    N_POLICIES,
};

/* What gives a row its score. */
enum obs_kind {
    OBS_NONE,        /* nothing does: full */
    OBS_TAIL,        /* attention of the document's last w rows */
    OBS_PROBE,       /* attention of a generic question, appended for scoring only */
    OBS_KEYS,        /* how far a key points away from the mean direction (KeyDiff) */
    OBS_REPLAY,      /* attention while the document is repeated (KVzip) */
    OBS_REPLAY_PLUS, /* the same, weighed by what the value contributes (KVzip+) */
    OBS_EXPECTED,    /* attention of queries to come, from the statistics of those seen */
    OBS_LAST,        /* attention of the last row, one ranking for all heads (TOVA) */
    OBS_NORM,        /* short keys first (Knorm) */
    OBS_ALL,         /* mean attention of all rows that see it (observed attention, H2O) */
    OBS_RECENT,      /* later rows first (StreamingLLM) */
    OBS_DEFENSIVE,   /* largest attention any row of the window gave (DefensiveKV) */
    OBS_DOT,         /* inner product with the last query, no softmax (GemFilter) */
    N_OBS,
};

/* How many rows each layer and KV head keeps. */
enum shape_kind {
    SHAPE_UNIFORM, /* the same number everywhere */
    SHAPE_LAYER,   /* the heads of a layer compete (AdaKV) */
    SHAPE_GLOBAL,  /* all heads of all layers compete */
    SHAPE_SHARES,  /* a calibrated share for each layer and head */
    SHAPE_PYRAMID, /* fewer in higher layers (PyramidKV) */
    SHAPE_HEADS,   /* whole heads by calibrated share, first and recent rows elsewhere (Duo) */
    N_SHAPES,
};

/* After which layer tokens stop going on. */
enum cut_kind {
    CUT_OFF,
    CUT_FIXED,    /* after `layer` */
    CUT_ADAPTIVE, /* where the ranks of the tokens settle (ASL) */
    CUT_FIXED2,   /* what is chosen at `layer` is prefilled again, at fresh positions */
    CUT_ADAPTIVE2,
    CUT_DECAY, /* a few after every layer (PyramidInfer) */
    N_CUTS,
};

/* What is done to the kept rows so that they answer for the dropped ones. */
enum fit_kind { FIT_NONE, FIT_VALUES, FIT_MATCHING, N_FITS };

enum pool_kind { POOL_AVG, POOL_MAX };

/* A number of rows as written: all, a count, a share of the document, or as few as the
 * policy's max_kl allows. */
struct row_budget {
    enum { ROWS_ALL, ROWS_COUNT, ROWS_SHARE, ROWS_AUTO } kind;
    double value; /* ROWS_COUNT: rows; ROWS_SHARE: percent */
};

/* Fields that the axes do not use are at their defaults and not printed. */
struct policy {
    enum policy_kind kind;
    enum obs_kind obs;
    enum shape_kind shape;
    enum cut_kind cut;
    enum fit_kind fit;
    enum kv_dtype precision;  /* of stored rows: KV_BF16, KV_INT8, KV_INT4 */
    bool critical;            /* half of a head's rows by score, half by score x |v W_O| */
    struct row_budget rows;   /* kept per layer and KV head (the reference's cache_k) */
    struct row_budget select; /* propagated past the cut (select_k) */
    uint32_t n_obs;           /* w: last rows, observed from where that applies, always kept */
    uint32_t sink;            /* first rows, always kept */
    uint32_t pool_kernel;     /* odd; UINT32_MAX: auto */
    enum pool_kind pool;
    uint32_t l_min; /* UINT32_MAX: auto */
    uint32_t l_obs;
    double tau;       /* negative: auto */
    uint32_t layer;   /* of a fixed cut; UINT32_MAX: auto */
    double guard;     /* SHAPE_LAYER: percent of an equal budget that each head is sure of */
    double eps;       /* OBS_EXPECTED: added to the probability before the value's norm */
    uint32_t chunk;   /* tokens replayed at a time */
    uint32_t replay;  /* percent of them that are: 100, 50 or 25 */
    double max_kl;    /* ROWS_AUTO: divergence from the full cache that is accepted */
    double recent;    /* CUT_DECAY: percent of the document that is never cut, at the end, */
    double decay;     /* share of the others that stays in the last layer, */
    uint32_t context; /* number of the others below which none is cut, */
    double weight;    /* weight of the last row; the first of the recent ones has 1 */
    /* SHAPE_SHARES, SHAPE_HEADS: [n_layers][n_kv_heads], none negative. Not part of the string:
     * the caller sets it after parsing. Borrowed; NULL: none was calibrated. */
    const double *shares;
    /* which calibration (profile_id.h), where something depends on one; "": the model's */
    char profile[PROFILE_ID_LEN + 1];
};

#define POLICY_TEXT_MAX 256

int policy_parse(const char *text, struct policy *ret, struct larder_err *e);

/* The canonical spelling: every key that the policy uses, in fixed order, defaults written out. */
void policy_print(const struct policy *p, char out[POLICY_TEXT_MAX]);

/* Against a model: layers in range, l_min >= l_obs - 1. Resolves `auto`: pool, lmin and tau are
 * what was measured (`w`; NULL: never calibrated) and otherwise the documented defaults: 7 (5
 * where the method's authors use it), floor(n_layers / 3) and 0.3. */
int policy_resolve(struct policy *p, uint32_t n_layers, const struct profile_window *w,
                   struct larder_err *e);

/* Rows for a document of n tokens: min(n, ...), LARDER_EBUDGET when that is fewer than n and
 * not more than the rows that always stay (sink and n_obs). ROWS_AUTO gives n. */
int policy_rows(const struct policy *p, const struct row_budget *b, uint32_t n, uint32_t *ret,
                struct larder_err *e);

/* The same before it is cut to whole rows: shapes distribute the fraction too. */
double policy_rows_exact(const struct row_budget *b, uint32_t n);

static inline bool policy_is_adaptive(const struct policy *p)
{
    return p->cut == CUT_ADAPTIVE || p->cut == CUT_ADAPTIVE2;
}

static inline bool policy_is_two_pass(const struct policy *p)
{
    return p->cut == CUT_FIXED2 || p->cut == CUT_ADAPTIVE2;
}

/* Is the budget shared out by a table that was measured on the model? Without it nothing can be
 * computed. */
static inline bool policy_needs_profile(const struct policy *p)
{
    return p->shape == SHAPE_SHARES || p->shape == SHAPE_HEADS;
}

/* Does it need a profile, or take numbers from one where there is one? */
bool policy_uses_profile(const struct policy *p);

/* Does anything in it come from a profile that says this? */
bool policy_depends_on(const struct policy *p, const struct profile_window *w);

static inline bool policy_is_replay(const struct policy *p)
{
    return p->obs == OBS_REPLAY || p->obs == OBS_REPLAY_PLUS;
}

/* Can both be kept from one pass? What differs between them comes after what they observe: either
 * both ask the same replay of the document, or both let every row pass every layer and add none.
 * A ladder of its own (rows=auto) shares with nobody. */
static inline bool policy_same_pass(const struct policy *a, const struct policy *b)
{
    if (a->rows.kind == ROWS_AUTO || b->rows.kind == ROWS_AUTO)
        return false;
    if (policy_is_replay(a))
        return a->obs == b->obs && a->chunk == b->chunk && a->replay == b->replay;
    return !policy_is_replay(b) && a->cut == CUT_OFF && b->cut == CUT_OFF && a->obs != OBS_PROBE &&
           b->obs != OBS_PROBE;
}

#endif
