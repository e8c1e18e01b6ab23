/* policy_table.c - named policies, their axes and keys, and which axes go together.
 *
 * The one idea: a name is a point on the three axes and nothing in it is special, so the
 * keys that a policy takes follow from where its axes stand. A name only decides which
 * axes may be moved (`open`) and which stay visible in the spelling even where they were
 * not (`shown`). */
#include "policy_table.h"

#include <stdio.h>
#include <string.h>

#define BIT POLICY_BIT
#define WINDOW_KEYS (BIT(W) | BIT(POOL) | BIT(POOLKIND))
#define VARIANCE_KEYS (BIT(LMIN) | BIT(LOBS) | BIT(TAU))
#define DECAY_KEYS (BIT(RECENT) | BIT(DECAY) | BIT(CONTEXT) | BIT(WEIGHT) | BIT(SINK))
#define OBS_SHAPE (BIT(OBS) | BIT(SHAPE))
#define SHAPE_CUT (BIT(SHAPE) | BIT(CUT))
#define N2048                                                                                      \
    {                                                                                              \
        ROWS_COUNT, 2048                                                                           \
    }
#define PERCENT(x)                                                                                 \
    {                                                                                              \
        ROWS_SHARE, x                                                                              \
    }
#define SINK_ROWS 4 /* first rows attract attention whatever they say */

static const char *const key_name[N_KEYS] = {
    "rows",  "select",  "w",      "pool",   "poolkind", "lmin",      "lobs",    "tau",    "layer",
    "obs",   "shape",   "cut",    "sink",   "guard",    "eps",       "chunk",   "replay", "recent",
    "decay", "context", "weight", "max_kl", "fit",      "precision", "profile",
};

struct named {
    const char *name;
    enum obs_kind obs;
    enum shape_kind shape;
    enum cut_kind cut;
    struct row_budget rows;
    uint32_t n_obs, pool, chunk;
    enum fit_kind fit;
    enum kv_dtype precision;
    bool unguarded; /* heads that compete are sure of nothing */
    unsigned open, shown;
};

/* Names that stand for an observation keep it, those that stand for a shape keep that. */
static const struct named table[N_POLICIES] = {
    [POLICY_FULL] = {"full", OBS_NONE, .rows = {ROWS_ALL, 0}},
    [POLICY_SNAPKV] = {"snapkv", OBS_TAIL, .rows = N2048, .open = BIT(OBS) | SHAPE_CUT},
    [POLICY_ASL] = {"asl", OBS_TAIL, .cut = CUT_ADAPTIVE, .rows = N2048, .open = OBS_SHAPE},
    [POLICY_FASTKV] = {"fastkv", OBS_TAIL, .cut = CUT_FIXED, .rows = N2048, .open = OBS_SHAPE},
    [POLICY_GEMFILTER] = {"gemfilter", OBS_DOT, .cut = CUT_FIXED2, .rows = N2048},
    [POLICY_ASL2PASS] = {"asl2pass", OBS_TAIL, .cut = CUT_ADAPTIVE2, .rows = N2048,
                         .open = BIT(OBS)},
    [POLICY_PYRAMIDINFER] = {"pyramidinfer", OBS_TAIL, .cut = CUT_DECAY, .rows = {ROWS_ALL, 0}},
    [POLICY_STREAMING] = {"streaming", OBS_RECENT, .rows = N2048, .open = SHAPE_CUT,
                          .shown = BIT(SINK)},
    [POLICY_KEYDIFF] = {"keydiff", OBS_KEYS, .rows = N2048, .open = SHAPE_CUT, .shown = BIT(SINK)},
    [POLICY_EXPECTED] = {"expected", OBS_EXPECTED, .rows = N2048, .open = SHAPE_CUT,
                         .shown = BIT(SINK)},
    [POLICY_TOVA] = {"tova", OBS_LAST, .rows = N2048, .open = SHAPE_CUT},
    [POLICY_KNORM] = {"knorm", OBS_NORM, .rows = N2048, .open = SHAPE_CUT, .shown = BIT(SINK)},
    [POLICY_OBSERVED] = {"observed", OBS_ALL, .rows = N2048, .open = SHAPE_CUT},
    [POLICY_ADAKV] = {"adakv", OBS_TAIL, SHAPE_LAYER, .rows = N2048, .n_obs = 64, .pool = 5,
                      .open = BIT(OBS) | BIT(CUT), .shown = BIT(OBS)},
    [POLICY_PYRAMIDKV] = {"pyramidkv", OBS_TAIL, SHAPE_PYRAMID, .rows = N2048, .n_obs = 64,
                          .pool = 5, .open = BIT(OBS) | BIT(CUT)},
    [POLICY_CRITICALKV] = {"criticalkv", OBS_TAIL, .rows = N2048, .n_obs = 64, .pool = 5,
                           .open = POLICY_AXES, .shown = OBS_SHAPE},
    [POLICY_DEFENSIVE] = {"defensive", OBS_DEFENSIVE, SHAPE_LAYER, .rows = N2048, .pool = 5,
                          .open = SHAPE_CUT, .shown = BIT(SHAPE)},
    [POLICY_DUO] = {"duo", OBS_RECENT, SHAPE_HEADS, .rows = PERCENT(50), .shown = BIT(SINK)},
    [POLICY_KVZIP] = {"kvzip", OBS_REPLAY, SHAPE_GLOBAL, .rows = PERCENT(50), .chunk = 2048,
                      .unguarded = true, .open = BIT(SHAPE), .shown = BIT(SHAPE) | BIT(SINK)},
    [POLICY_KVZIP_PLUS] = {"kvzip+", OBS_REPLAY_PLUS, SHAPE_GLOBAL, .rows = PERCENT(50),
                           .chunk = 2048, .unguarded = true, .open = BIT(SHAPE),
                           .shown = BIT(SHAPE) | BIT(SINK)},
    [POLICY_MATCHING] = {"matching", OBS_REPLAY, SHAPE_SHARES, .rows = PERCENT(25),
                         .fit = FIT_MATCHING, .open = OBS_SHAPE,
                         .shown = BIT(SHAPE) | BIT(SINK) | BIT(FIT) | BIT(PRECISION)},
    [POLICY_OFFLINE] = {"offline", OBS_REPLAY, SHAPE_SHARES, .rows = {ROWS_AUTO, 0},
                        .fit = FIT_MATCHING, .precision = KV_INT4, .open = POLICY_AXES,
                        .shown = POLICY_AXES | BIT(SINK) | BIT(FIT) | BIT(PRECISION)},
};

const char *policy_key_name(enum policy_key k)
{
    return key_name[k];
}

const char *policy_kind_name(enum policy_kind k)
{
    return table[k].name;
}

/* ---- words */

static const char *word_of(const char *const *words, unsigned n, unsigned value)
{
    return value < n ? words[value] : NULL;
}

const char *policy_word(enum policy_key k, unsigned value)
{
    static const char *const obs[N_OBS] = {"none",    "tail",      "probe", "keys", "replay",
                                           "replay+", "expected",  "last",  "norm", "all",
                                           "recent",  "defensive", "dot"};
    static const char *const shape[N_SHAPES] = {"uniform", "layer",   "global",
                                                "shares",  "pyramid", "heads"};
    static const char *const cut[N_CUTS] = {"off",    "fixed",     "adaptive",
                                            "fixed2", "adaptive2", "decay"};
    static const char *const fit[N_FITS] = {"none", "values", "matching"};
    static const char *const pool[] = {"avg", "max"};

    switch ((int)k) {
    case KEY_OBS:
        return word_of(obs, N_OBS, value);
    case KEY_SHAPE:
        return word_of(shape, N_SHAPES, value);
    case KEY_CUT:
        return word_of(cut, N_CUTS, value);
    case KEY_FIT:
        return word_of(fit, N_FITS, value);
    case KEY_POOLKIND:
        return word_of(pool, 2, value);
    default:
        return NULL;
    }
}

int policy_kind_find(const char *name, enum policy_kind *ret, struct larder_err *e)
{
    char all[256];
    size_t at = 0;

    for (unsigned i = 0; i < N_POLICIES; i++) {
        if (!strcmp(name, table[i].name)) {
            *ret = (enum policy_kind)i;
            return 0;
        }
        at += (size_t)snprintf(all + at, sizeof all - at, "%s%s", i ? ", " : "", table[i].name);
    }
    return larder_fail(e, LARDER_EPOLICY, "policy: no policy is named '%.40s'; there are %s", name,
                       all);
}

/* ---- defaults */

static uint32_t window_of(const struct policy *p, const struct named *t)
{
    if (p->cut == CUT_DECAY)
        return 0; /* its window is a share of the document */
    if (p->obs == OBS_TAIL || p->obs == OBS_DEFENSIVE || p->shape == SHAPE_HEADS)
        return t->n_obs ? t->n_obs : 32;
    return p->obs == OBS_LAST; /* the only row that is observed from */
}

/* First rows are forced where the rows are not chosen by what the document's end looks at:
 * there they would stay for the attention that they always get. */
static uint32_t sink_of(const struct policy *p)
{
    switch (p->obs) {
    case OBS_KEYS:
    case OBS_EXPECTED:
    case OBS_NORM:
    case OBS_RECENT:
    case OBS_PROBE:
    case OBS_REPLAY:
    case OBS_REPLAY_PLUS:
        return SINK_ROWS;
    default:
        return p->cut == CUT_DECAY ? SINK_ROWS : 0;
    }
}

uint32_t policy_pool_default(const struct policy *p)
{
    const struct named *t = &table[p->kind];

    return t->pool ? t->pool : p->obs == OBS_DOT ? 5 : 7;
}

void policy_follow_axes(struct policy *p)
{
    const struct named *t = &table[p->kind];

    p->n_obs = window_of(p, t);
    /* where a measured kernel may take the place of ASL's 7; names of kvpress do as kvpress does */
    p->pool_kernel = t->pool || p->obs == OBS_DOT ? policy_pool_default(p) : POLICY_AUTO;
    p->sink = sink_of(p);
    p->eps = p->shape == SHAPE_LAYER ? 0.01 : 0;
    p->guard = t->unguarded ? 0 : 20;
    p->fit = policy_is_replay(p) ? t->fit : FIT_NONE;
    p->rows = t->rows;
    if (t->rows.kind == ROWS_AUTO && (!policy_is_replay(p) || p->shape == SHAPE_GLOBAL))
        p->rows = (struct row_budget)PERCENT(25); /* there is no certificate to go by */
    p->select = p->rows;
}

struct policy policy_defaults(enum policy_kind kind)
{
    const struct named *t = &table[kind];
    struct policy p = {
        .kind = kind,
        .obs = t->obs,
        .shape = t->shape,
        .cut = t->cut,
        .precision = t->precision ? t->precision : KV_BF16,
        .critical = kind == POLICY_CRITICALKV,
        .pool = POOL_AVG,
        .l_min = POLICY_AUTO,
        .l_obs = 8,
        .tau = POLICY_AUTO_TAU,
        .layer = POLICY_AUTO,
        .chunk = t->chunk ? t->chunk : 512,
        .replay = 100,
        .max_kl = 0.006,
        .recent = 20,
        .decay = 0.9,
        .context = 64,
        .weight = 1.2,
    };

    policy_follow_axes(&p);
    return p;
}

/* ---- which keys */

static unsigned keys_of_obs(const struct policy *p)
{
    switch (p->obs) {
    case OBS_TAIL:
        return p->cut == CUT_DECAY ? 0 : WINDOW_KEYS;
    case OBS_DEFENSIVE:
        return BIT(W) | BIT(POOL);
    case OBS_PROBE:
        return BIT(POOL) | BIT(POOLKIND);
    case OBS_DOT:
        return BIT(POOL);
    case OBS_EXPECTED: /* a critical policy weighs values on its own */
        return p->critical ? 0 : BIT(EPS);
    case OBS_REPLAY:
    case OBS_REPLAY_PLUS:
        return BIT(CHUNK) | BIT(REPLAY);
    default:
        return 0;
    }
}

static unsigned keys_of_cut(enum cut_kind c)
{
    switch (c) {
    case CUT_FIXED:
        return BIT(SELECT) | BIT(LAYER);
    case CUT_ADAPTIVE:
        return BIT(SELECT) | VARIANCE_KEYS;
    case CUT_FIXED2:
        return BIT(LAYER);
    case CUT_ADAPTIVE2:
        return VARIANCE_KEYS;
    case CUT_DECAY:
        return DECAY_KEYS;
    default:
        return 0;
    }
}

/* Keys without which the axes' choice would not be complete. */
static unsigned keys_needed(const struct policy *p)
{
    unsigned keys = keys_of_obs(p) | keys_of_cut(p->cut) | table[p->kind].shown;

    if (p->kind == POLICY_FULL)
        return 0;
    if (p->cut != CUT_DECAY)
        keys |= BIT(ROWS);
    if (p->shape == SHAPE_LAYER)
        keys |= BIT(GUARD);
    if (p->shape == SHAPE_HEADS)
        keys |= BIT(W);
    if (p->rows.kind == ROWS_AUTO)
        keys |= BIT(MAX_KL);
    return keys;
}

bool policy_uses_profile(const struct policy *p)
{
    static const struct profile_window all = {1, 1, 1};

    return policy_depends_on(p, &all);
}

bool policy_depends_on(const struct policy *p, const struct profile_window *w)
{
    unsigned keys = keys_needed(p);

    if (policy_needs_profile(p) || (w->pool && keys & BIT(POOL) && p->pool_kernel == POLICY_AUTO))
        return true;
    return w->l_min && keys & BIT(TAU) && (p->l_min == POLICY_AUTO || p->tau < 0);
}

unsigned policy_keys_taken(const struct policy *p)
{
    unsigned keys = keys_needed(p) | table[p->kind].open | BIT(PRECISION);

    if (p->kind == POLICY_FULL)
        return keys;
    if (policy_is_replay(p))
        keys |= BIT(FIT) | BIT(MAX_KL);
    if (policy_uses_profile(p))
        keys |= BIT(PROFILE);
    return keys | BIT(SINK);
}

unsigned policy_keys_printed(const struct policy *p)
{
    struct policy d = policy_defaults(p->kind), here = *p;
    unsigned moved = 0;

    policy_follow_axes(&here);
    moved |= p->obs != d.obs ? BIT(OBS) : 0;
    moved |= p->shape != d.shape ? BIT(SHAPE) : 0;
    moved |= p->cut != d.cut ? BIT(CUT) : 0;
    moved |= p->sink != d.sink || p->sink != here.sink ? BIT(SINK) : 0;
    moved |= p->precision != d.precision ? BIT(PRECISION) : 0;
    moved |= p->fit != d.fit || p->fit != here.fit ? BIT(FIT) : 0;
    moved |= *p->profile ? BIT(PROFILE) : 0;
    return keys_needed(p) | moved;
}

/* ---- combinations */

static const char *why_not_cut(const struct policy *p)
{
    if (p->cut == CUT_OFF)
        return NULL;
    if (p->cut == CUT_DECAY && p->kind != POLICY_PYRAMIDINFER)
        return "cut=decay is pyramidinfer's own; use cut=fixed or cut=adaptive";
    if (policy_is_replay(p))
        return "a replay must see every row of every layer; it takes cut=off";
    if (policy_is_adaptive(p) && p->obs == OBS_RECENT)
        return "ranks by position never change, so cut=adaptive has nothing to wait for";
    if (policy_is_two_pass(p) && p->shape != SHAPE_UNIFORM)
        return "a second pass keeps all of its rows; it takes shape=uniform";
    if (policy_is_two_pass(p) && p->critical)
        return "a second pass keeps all of its rows; criticalkv takes cut=off, fixed or adaptive";
    return NULL;
}

static const char *why_not_shape(const struct policy *p)
{
    if ((p->shape == SHAPE_HEADS) != (p->kind == POLICY_DUO))
        return "shape=heads is duo's own; use shape=shares";
    if (p->rows.kind == ROWS_AUTO && (!policy_is_replay(p) || p->shape == SHAPE_GLOBAL))
        return "rows=auto goes by the certificate, which only obs=replay with shape=shares, layer "
               "or uniform has";
    if (p->obs == OBS_DOT && p->cut == CUT_OFF && p->shape != SHAPE_UNIFORM)
        return "inner products of different heads have no common scale; obs=dot takes "
               "shape=uniform";
    return NULL;
}

static const char *why_not_obs(const struct policy *p)
{
    if (p->kind != POLICY_FULL && p->obs == OBS_NONE)
        return "obs=none ranks nothing; that is policy full";
    if (p->critical &&
        (p->obs == OBS_KEYS || p->obs == OBS_NORM || p->obs == OBS_DOT || p->obs == OBS_RECENT))
        return "criticalkv multiplies scores, which takes an attention: obs=tail, probe, expected, "
               "all, last, defensive or replay";
    if (p->fit != FIT_NONE && !policy_is_replay(p))
        return "fit needs the queries of a replay; it takes obs=replay";
    return NULL;
}

int policy_check(const struct policy *p, struct larder_err *e)
{
    const char *why = why_not_obs(p);

    if (!why)
        why = why_not_shape(p);
    if (!why)
        why = why_not_cut(p);
    return why ? larder_fail(e, LARDER_EPOLICY, "policy: %s", why) : 0;
}
