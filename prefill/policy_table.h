/* policy_table.h - private to the policy string: names, keys, and which goes with which.
 *
 * Threads    Constant tables.
 * Errors     LARDER_EPOLICY.
 */
#ifndef LARDER_POLICY_TABLE_H
#define LARDER_POLICY_TABLE_H

#include "policy.h"

/* In the order in which they are printed. */
enum policy_key {
    KEY_ROWS,
    KEY_SELECT,
    KEY_W,
    KEY_POOL,
    KEY_POOLKIND,
    KEY_LMIN,
    KEY_LOBS,
    KEY_TAU,
    KEY_LAYER,
    KEY_OBS,
    KEY_SHAPE,
    KEY_CUT,
    KEY_SINK,
    KEY_GUARD,
    KEY_EPS,
    KEY_CHUNK,
    KEY_REPLAY,
    KEY_RECENT,
    KEY_DECAY,
    KEY_CONTEXT,
    KEY_WEIGHT,
    KEY_MAX_KL,
    KEY_FIT,
    KEY_PRECISION,
    KEY_PROFILE,
    N_KEYS,
};

#define POLICY_AUTO UINT32_MAX
#define POLICY_AUTO_TAU (-1.0)
#define POLICY_BIT(k) (1u << KEY_##k)
#define POLICY_AXES (POLICY_BIT(OBS) | POLICY_BIT(SHAPE) | POLICY_BIT(CUT))

const char *policy_key_name(enum policy_key k);
const char *policy_kind_name(enum policy_kind k);

/* Values of the keys that are words; NULL beyond the last. */
const char *policy_word(enum policy_key k, unsigned value);

/* The kind of that name. LARDER_EPOLICY lists the names. */
int policy_kind_find(const char *name, enum policy_kind *ret, struct larder_err *e);

/* The named policy with its own axes. */
struct policy policy_defaults(enum policy_kind kind);

/* The defaults that belong to the axes which *p has now. */
void policy_follow_axes(struct policy *p);

/* The pooling kernel of a policy's authors. */
uint32_t policy_pool_default(const struct policy *p);

/* Bit masks over enum policy_key: keys that may be given, and those that are printed. */
unsigned policy_keys_taken(const struct policy *p);
unsigned policy_keys_printed(const struct policy *p);

/* Does the combination mean something? */
int policy_check(const struct policy *p, struct larder_err *e);

#endif
