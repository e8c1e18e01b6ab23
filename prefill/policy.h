/* policy.h - a pruning policy: one canonical string, `name[,key=value...]`.
 *
 * Purpose    Parse, check against a model and a document, and print a policy in its one
 *            canonical spelling, which is part of every entry's key.
 * Source     ASL arXiv 2601.07667; SnapKV 2404.14469; FastKV 2502.01068; GemFilter 2409.17422.
 * Threads    No state.
 * Errors     LARDER_EPOLICY names the offending key or value; LARDER_EBUDGET a budget that
 *            cannot hold the observation window.
 */
#ifndef LARDER_POLICY_H
#define LARDER_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "larder_status.h"

enum policy_kind {
    POLICY_FULL,
    POLICY_SNAPKV,
    POLICY_ASL,
    POLICY_FASTKV,
    POLICY_GEMFILTER,
    POLICY_ASL2PASS,
};

enum pool_kind { POOL_AVG, POOL_MAX };

/* A number of rows as written: all, a count, or a share of the document. */
struct row_budget {
    enum { ROWS_ALL, ROWS_COUNT, ROWS_SHARE } kind;
    double value; /* ROWS_COUNT: rows; ROWS_SHARE: percent */
};

struct policy {
    enum policy_kind kind;
    struct row_budget rows;   /* kept per layer and KV head (the reference's cache_k) */
    struct row_budget select; /* propagated past the cut (select_k) */
    uint32_t n_obs;           /* w: observation window, rows */
    uint32_t pool_kernel;     /* odd */
    enum pool_kind pool;
    uint32_t l_min; /* UINT32_MAX: auto = floor(n_layers / 3) */
    uint32_t l_obs;
    double tau;
    uint32_t layer; /* fixed cut of fastkv, filter layer of gemfilter; UINT32_MAX: auto */
};

#define POLICY_TEXT_MAX 256

int policy_parse(const char *text, struct policy *ret, struct larder_err *e);

/* The canonical spelling: every key that the policy uses, in fixed order, defaults written out. */
void policy_print(const struct policy *p, char out[POLICY_TEXT_MAX]);

/* Against a model: layers in range, l_min >= l_obs - 1; resolves `auto`. */
int policy_resolve(struct policy *p, uint32_t n_layers, struct larder_err *e);

/* Rows for a document of n tokens: min(n, ...), LARDER_EBUDGET when the number is not above
 * n_obs although the document is longer than it. */
int policy_rows(const struct policy *p, const struct row_budget *b, uint32_t n, uint32_t *ret,
                struct larder_err *e);

#endif
