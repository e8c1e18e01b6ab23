/* profile.h - a model's calibration as JSON (PROTOCOL.md, section 6): read as a stranger's bytes.
 *
 * Purpose    The one reader of a profile, for larderd, which stores what workers and clients
 *            send, and for larder-prefill, which computes with it.
 * Ownership  profile_parse() fills, profile_done() frees (zeroed is fine).
 * Threads    No state.
 * Errors     LARDER_EINVAL says what is wrong with it, LARDER_EVERSION, LARDER_ETOOBIG,
 *            LARDER_ENOMEM.
 */
#ifndef LARDER_PROFILE_H
#define LARDER_PROFILE_H

#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "larder_status.h"
#include "profile_id.h"

#define PROFILE_VERSION 2 /* 1: without `window` */
#define PROFILE_MAX_BYTES (4u << 20)
#define PROFILE_MAX_BUDGETS 32u
#define PROFILE_MAX_TEXTS 256u
#define PROFILE_MAX_NAME 256u /* of a text */
#define PROFILE_MAX_POOL 1023u

struct profile {
    json_t *json; /* all of it */
    uint8_t model_fp[32];
    char id[PROFILE_ID_LEN + 1]; /* equal to what the numbers give */
    uint32_t n_layers, n_kv_heads, n_budgets;
    float budget[PROFILE_MAX_BUDGETS]; /* ascending */
    float *share;                      /* [n_budgets][n_layers * n_kv_heads], owned */
    struct profile_window window;      /* version 1: zeros */
};

int profile_parse(const char *text, size_t len, struct profile *ret, struct larder_err *e);
void profile_done(struct profile *p);

/* Is it this model's? LARDER_EINVAL names both. */
int profile_fits(const struct profile *p, const uint8_t model_fp[32], uint32_t n_layers,
                 uint32_t n_kv_heads, struct larder_err *e);

#endif
