/* policy.c - the policy string: parsing, printing, and the checks against model and document.
 *
 * The one idea: a policy uses a set of keys that follows from its axes (policy_table.c),
 * and parsing, defaults and printing all walk the same keys, so that the canonical
 * spelling contains exactly what influences the result and nothing else. The axes are
 * read first, because the defaults of the other keys depend on them. */
#include "policy.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policy_table.h"

#define BIT POLICY_BIT
#define MAX_WINDOW 4096u
#define MAX_POOL 1023u
#define MAX_CHUNK 65536u
#define MAX_TAU 1e6
#define MAX_ITEMS 32u

/* ---- values */

static int bad_value(struct larder_err *e, enum policy_key k, const char *v, const char *want)
{
    return larder_fail(e, LARDER_EPOLICY, "policy: %s=%.40s is not valid; %s takes %s",
                       policy_key_name(k), v, policy_key_name(k), want);
}

/* Plain decimal digits up to max. */
static bool read_count(const char *v, uint32_t max, uint32_t *ret)
{
    uint64_t n = 0;

    if (!*v)
        return false;
    for (; *v; v++) {
        if (*v < '0' || *v > '9')
            return false;
        n = n * 10 + (uint64_t)(*v - '0');
        if (n > max)
            return false;
    }
    *ret = (uint32_t)n;
    return true;
}

/* Digits with an optional fraction: no sign, exponent, infinity or locale. */
static bool read_decimal(const char *v, double max, double *ret)
{
    double n = 0;
    size_t digits = strspn(v, "0123456789");
    size_t len = digits;

    if (v[len] == '.') {
        size_t frac = strspn(v + len + 1, "0123456789");

        digits += frac;
        len += 1 + frac;
    }
    if (v[len] || !digits || digits > 17)
        return false;
    n = strtod(v, NULL);
    if (!(n <= max))
        return false;
    *ret = n;
    return true;
}

/* The shortest decimal that reads back as v. */
static void print_decimal(double v, char *out, size_t cap)
{
    for (int digits = 0; digits <= 20; digits++) {
        snprintf(out, cap, "%.*f", digits, v);
        if (strtod(out, NULL) == v)
            return;
    }
}

/* A share such as 25%. */
static bool read_percent(const char *v, double *ret)
{
    size_t len = strlen(v);
    char share[32];
    double pct;

    if (len < 2 || len >= sizeof share || v[len - 1] != '%')
        return false;
    memcpy(share, v, len - 1);
    share[len - 1] = '\0';
    if (!read_decimal(share, 100, &pct))
        return false;
    *ret = pct;
    return true;
}

static int set_budget(struct row_budget *b, enum policy_key k, const char *v, struct larder_err *e)
{
    double pct;
    uint32_t n;

    if (!strcmp(v, "all"))
        *b = (struct row_budget){ROWS_ALL, 0};
    else if (k == KEY_ROWS && !strcmp(v, "auto"))
        *b = (struct row_budget){ROWS_AUTO, 0};
    else if (read_count(v, KV_MAX_CTX, &n) && n > 0)
        *b = (struct row_budget){ROWS_COUNT, n};
    else if (read_percent(v, &pct) && pct > 0) /* the whole document has one spelling */
        *b = pct == 100 ? (struct row_budget){ROWS_ALL, 0} : (struct row_budget){ROWS_SHARE, pct};
    else
        return bad_value(e, k, v, "a number of rows, a share such as 25%, or all");
    return 0;
}

static int set_layer(uint32_t *to, enum policy_key k, const char *v, struct larder_err *e)
{
    if (!strcmp(v, "auto")) {
        *to = POLICY_AUTO;
        return 0;
    }
    if (!read_count(v, KV_MAX_LAYERS, to))
        return bad_value(e, k, v, "a layer number or auto");
    return 0;
}

static int set_count(uint32_t *to, enum policy_key k, const char *v, uint32_t min, uint32_t max,
                     const char *want, struct larder_err *e)
{
    uint32_t n;

    if (!read_count(v, max, &n) || n < min)
        return bad_value(e, k, v, want);
    *to = n;
    return 0;
}

static int set_decimal(double *to, enum policy_key k, const char *v, double max, const char *want,
                       struct larder_err *e)
{
    return read_decimal(v, max, to) ? 0 : bad_value(e, k, v, want);
}

static int set_tau(struct policy *p, const char *v, struct larder_err *e)
{
    if (!strcmp(v, "auto")) {
        p->tau = POLICY_AUTO_TAU;
        return 0;
    }
    return set_decimal(&p->tau, KEY_TAU, v, MAX_TAU, "a decimal number such as 0.3, or auto", e);
}

static int set_percent(double *to, enum policy_key k, const char *v, struct larder_err *e)
{
    return read_percent(v, to) ? 0 : bad_value(e, k, v, "a share from 0% to 100%");
}

static int set_word(unsigned *to, enum policy_key k, const char *v, struct larder_err *e)
{
    char all[128];
    size_t at = 0;

    for (unsigned i = 0; policy_word(k, i); i++) {
        if (!strcmp(v, policy_word(k, i))) {
            *to = i;
            return 0;
        }
        at += (size_t)snprintf(all + at, sizeof all - at, "%s%s",
                               !i                      ? ""
                               : policy_word(k, i + 1) ? ", "
                                                       : " or ",
                               policy_word(k, i));
    }
    return bad_value(e, k, v, all);
}

static int set_pool(struct policy *p, const char *v, struct larder_err *e)
{
    uint32_t n = POLICY_AUTO;

    if (strcmp(v, "auto") && (!read_count(v, MAX_POOL, &n) || n % 2 == 0))
        return bad_value(e, KEY_POOL, v, "an odd number from 1 to 1023, or auto");
    p->pool_kernel = n;
    return 0;
}

static int set_replay(struct policy *p, const char *v, struct larder_err *e)
{
    double pct;

    if (!read_percent(v, &pct) || (pct != 100 && pct != 50 && pct != 25))
        return bad_value(e, KEY_REPLAY, v, "100%, 50% or 25%");
    p->replay = (uint32_t)pct;
    return 0;
}

static int set_precision(struct policy *p, const char *v, struct larder_err *e)
{
    static const enum kv_dtype some[] = {KV_BF16, KV_INT8, KV_INT4};

    for (size_t i = 0; i < sizeof some / sizeof some[0]; i++) {
        if (!strcmp(v, kv_dtype_name(some[i]))) {
            p->precision = some[i];
            return 0;
        }
    }
    return bad_value(e, KEY_PRECISION, v, "bf16, int8 or int4");
}

static int set_profile(struct policy *p, const char *v, struct larder_err *e)
{
    if (!profile_id_valid(v))
        return bad_value(e, KEY_PROFILE, v, "12 hex digits, as larder show-model prints them");
    memcpy(p->profile, v, sizeof p->profile);
    return 0;
}

/* Keys that choose among words. */
static int set_choice(struct policy *p, enum policy_key k, const char *v, struct larder_err *e)
{
    unsigned word = 0;
    int rc = set_word(&word, k, v, e);

    if (rc)
        return rc;
    if (k == KEY_OBS)
        p->obs = (enum obs_kind)word;
    else if (k == KEY_SHAPE)
        p->shape = (enum shape_kind)word;
    else if (k == KEY_CUT)
        p->cut = (enum cut_kind)word;
    else if (k == KEY_FIT)
        p->fit = (enum fit_kind)word;
    else
        p->pool = (enum pool_kind)word;
    return 0;
}

static int set_value(struct policy *p, enum policy_key k, const char *v, struct larder_err *e)
{
    switch (k) {
    case KEY_ROWS:
        return set_budget(&p->rows, k, v, e);
    case KEY_SELECT:
        return set_budget(&p->select, k, v, e);
    case KEY_W:
        return set_count(&p->n_obs, k, v, 1, MAX_WINDOW, "a number of rows from 1 to 4096", e);
    case KEY_POOL:
        return set_pool(p, v, e);
    case KEY_LMIN:
        return set_layer(&p->l_min, k, v, e);
    case KEY_LOBS:
        return set_count(&p->l_obs, k, v, 2, KV_MAX_LAYERS, "a number of layers from 2", e);
    case KEY_TAU:
        return set_tau(p, v, e);
    case KEY_LAYER:
        return set_layer(&p->layer, k, v, e);
    case KEY_SINK:
        return set_count(&p->sink, k, v, 0, MAX_WINDOW, "a number of rows from 0 to 4096", e);
    case KEY_GUARD:
        return set_percent(&p->guard, k, v, e);
    case KEY_EPS:
        return set_decimal(&p->eps, k, v, 1, "a decimal number from 0 to 1", e);
    case KEY_CHUNK:
        return set_count(&p->chunk, k, v, 16, MAX_CHUNK, "a number of tokens from 16 to 65536", e);
    case KEY_REPLAY:
        return set_replay(p, v, e);
    case KEY_RECENT:
        return set_percent(&p->recent, k, v, e);
    case KEY_DECAY:
        return set_decimal(&p->decay, k, v, 1, "a decimal number from 0 to 1", e);
    case KEY_CONTEXT:
        return set_count(&p->context, k, v, 0, KV_MAX_CTX, "a number of rows", e);
    case KEY_WEIGHT:
        return set_decimal(&p->weight, k, v, 1e3, "a decimal number up to 1000", e);
    case KEY_MAX_KL:
        return set_decimal(&p->max_kl, k, v, 1e3, "a decimal number such as 0.02", e);
    case KEY_PRECISION:
        return set_precision(p, v, e);
    case KEY_PROFILE:
        return set_profile(p, v, e);
    case KEY_POOLKIND:
    case KEY_OBS:
    case KEY_SHAPE:
    case KEY_CUT:
    case KEY_FIT:
        return set_choice(p, k, v, e);
    case N_KEYS:
        break;
    }
    return larder_fail(e, LARDER_EINTERNAL, "policy key %d has no setter", (int)k);
}

/* ---- parse */

struct item {
    const char *key, *value;
};

static void list_keys(const struct policy *p, char *out, size_t cap)
{
    unsigned keys = policy_keys_taken(p);
    size_t at = 0;

    for (int k = 0; k < N_KEYS; k++)
        if (keys >> k & 1u)
            at += (size_t)snprintf(out + at, cap - at, "%s%s", at ? ", " : "", policy_key_name(k));
}

static int split(char *rest, struct item items[MAX_ITEMS], uint32_t *ret_n, struct larder_err *e)
{
    uint32_t n = 0;

    while (rest) {
        char *item = strsep(&rest, ","), *eq = strchr(item, '=');

        if (!eq)
            return larder_fail(e, LARDER_EPOLICY, "policy: '%.40s' is not of the form key=value",
                               item);
        if (n == MAX_ITEMS)
            return larder_fail(e, LARDER_EPOLICY, "policy: more than %u keys", MAX_ITEMS);
        *eq = '\0';
        items[n++] = (struct item){item, eq + 1};
    }
    *ret_n = n;
    return 0;
}

/* Keys among `keys`, which may be given once each. */
static int set_items(struct policy *p, const struct item *items, uint32_t n, unsigned keys,
                     unsigned *seen, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < n && !rc; i++) {
        for (int k = 0; k < N_KEYS && !rc; k++) {
            if (!(keys >> k & 1u) || strcmp(items[i].key, policy_key_name(k)))
                continue;
            if (*seen >> k & 1u)
                return larder_fail(e, LARDER_EPOLICY, "policy: %s is given twice", items[i].key);
            *seen |= 1u << k;
            rc = set_value(p, k, items[i].value, e);
        }
    }
    return rc;
}

static int no_strangers(const struct policy *p, const struct item *items, uint32_t n,
                        struct larder_err *e)
{
    unsigned taken = policy_keys_taken(p);
    char keys[256];

    for (uint32_t i = 0; i < n; i++) {
        int k = 0;

        while (k < N_KEYS && (!(taken >> k & 1u) || strcmp(items[i].key, policy_key_name(k))))
            k++;
        if (k < N_KEYS)
            continue;
        list_keys(p, keys, sizeof keys);
        return larder_fail(e, LARDER_EPOLICY, "policy: %s does not take '%.40s'; it takes %s",
                           policy_kind_name(p->kind), items[i].key, keys);
    }
    return 0;
}

int policy_parse(const char *text, struct policy *ret, struct larder_err *e)
{
    struct item items[MAX_ITEMS] = {{NULL, NULL}};
    char buf[POLICY_TEXT_MAX];
    enum policy_kind kind = POLICY_FULL;
    struct policy p;
    unsigned seen = 0, axes;
    uint32_t n = 0;
    char *rest = buf;
    int rc;

    if (strlen(text) >= sizeof buf)
        return larder_fail(e, LARDER_EPOLICY, "policy: longer than %u characters",
                           POLICY_TEXT_MAX - 1);
    memcpy(buf, text, strlen(text) + 1);
    rc = policy_kind_find(strsep(&rest, ","), &kind, e);
    if (!rc)
        rc = split(rest, items, &n, e);
    if (rc)
        return rc;
    p = policy_defaults(kind);
    axes = policy_keys_taken(&p) & POLICY_AXES;
    rc = set_items(&p, items, n, axes, &seen, e);
    if (!rc) {
        policy_follow_axes(&p);
        rc = no_strangers(&p, items, n, e);
    }
    if (!rc)
        rc = set_items(&p, items, n, policy_keys_taken(&p) & ~axes, &seen, e);
    if (!rc)
        rc = policy_check(&p, e);
    if (!rc && seen & BIT(MAX_KL) && p.rows.kind != ROWS_AUTO)
        rc = larder_fail(e, LARDER_EPOLICY, "policy: max_kl goes with rows=auto");
    if (!rc && *p.profile && !policy_uses_profile(&p))
        rc = larder_fail(e, LARDER_EPOLICY,
                         "policy: profile is given, but every number of the policy is written out");
    if (rc)
        return rc;
    if (!(seen & BIT(SELECT)))
        p.select = p.rows;
    *ret = p;
    return 0;
}

/* ---- print */

static void print_budget(const struct row_budget *b, char *out, size_t cap)
{
    char num[40];

    if (b->kind == ROWS_ALL || b->kind == ROWS_AUTO) {
        snprintf(out, cap, "%s", b->kind == ROWS_ALL ? "all" : "auto");
        return;
    }
    print_decimal(b->value, num, sizeof num);
    snprintf(out, cap, "%s%s", num, b->kind == ROWS_SHARE ? "%" : "");
}

/* Keys that are numbers of rows, tokens or layers. */
static bool print_count(const struct policy *p, enum policy_key k, char *out, size_t cap)
{
    const uint32_t *x = k == KEY_W         ? &p->n_obs
                        : k == KEY_POOL    ? &p->pool_kernel
                        : k == KEY_LMIN    ? &p->l_min
                        : k == KEY_LAYER   ? &p->layer
                        : k == KEY_LOBS    ? &p->l_obs
                        : k == KEY_SINK    ? &p->sink
                        : k == KEY_CHUNK   ? &p->chunk
                        : k == KEY_CONTEXT ? &p->context
                                           : NULL;

    if (x && *x == POLICY_AUTO)
        snprintf(out, cap, "auto");
    else if (x)
        snprintf(out, cap, "%u", *x);
    return x;
}

static bool print_number(const struct policy *p, enum policy_key k, char *out, size_t cap)
{
    double x = k == KEY_TAU      ? p->tau
               : k == KEY_GUARD  ? p->guard
               : k == KEY_EPS    ? p->eps
               : k == KEY_RECENT ? p->recent
               : k == KEY_DECAY  ? p->decay
               : k == KEY_WEIGHT ? p->weight
               : k == KEY_MAX_KL ? p->max_kl
               : k == KEY_REPLAY ? (double)p->replay
                                 : -1;
    bool share = k == KEY_GUARD || k == KEY_RECENT || k == KEY_REPLAY;

    if (x < 0)
        return false;
    print_decimal(x, out, cap - 1);
    if (share)
        memcpy(out + strlen(out), "%", 2);
    return true;
}

static const char *word_now(const struct policy *p, enum policy_key k)
{
    switch ((int)k) {
    case KEY_OBS:
        return policy_word(k, p->obs);
    case KEY_SHAPE:
        return policy_word(k, p->shape);
    case KEY_CUT:
        return policy_word(k, p->cut);
    case KEY_FIT:
        return policy_word(k, p->fit);
    case KEY_POOLKIND:
        return policy_word(k, p->pool);
    default:
        return kv_dtype_name(p->precision);
    }
}

static void print_value(const struct policy *p, enum policy_key k, char *out, size_t cap)
{
    if (k == KEY_ROWS)
        print_budget(&p->rows, out, cap);
    else if (k == KEY_SELECT)
        print_budget(&p->select, out, cap);
    else if (k == KEY_TAU && p->tau < 0)
        snprintf(out, cap, "auto");
    else if (k == KEY_PROFILE)
        snprintf(out, cap, "%s", p->profile);
    else if (!print_count(p, k, out, cap) && !print_number(p, k, out, cap))
        snprintf(out, cap, "%s", word_now(p, k));
}

void policy_print(const struct policy *p, char out[POLICY_TEXT_MAX])
{
    size_t at = (size_t)snprintf(out, POLICY_TEXT_MAX, "%s", policy_kind_name(p->kind));
    unsigned keys = policy_keys_printed(p);
    char value[64];

    for (int k = 0; k < N_KEYS; k++) {
        if (!(keys >> k & 1u))
            continue;
        print_value(p, k, value, sizeof value);
        at += (size_t)snprintf(out + at, POLICY_TEXT_MAX - at, ",%s=%s", policy_key_name(k), value);
    }
}

/* ---- against a model and a document */

static int resolve_lmin(struct policy *p, uint32_t n_layers, const struct profile_window *w,
                        struct larder_err *e)
{
    bool measured = w && w->l_min;

    if (p->l_min == POLICY_AUTO)
        p->l_min = measured ? w->l_min : n_layers / 3;
    if (p->tau < 0)
        p->tau = measured ? w->tau_milli / 1000.0 : 0.3;
    if (p->l_min >= n_layers)
        return larder_fail(e, LARDER_EPOLICY, "policy: lmin=%u, but the model's layers are 0 to %u",
                           p->l_min, n_layers - 1);
    if (p->l_min + 1 < p->l_obs)
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: lmin=%u has fewer than lobs=%u layers up to it; raise lmin to "
                           "%u or lower lobs",
                           p->l_min, p->l_obs, p->l_obs - 1);
    return 0;
}

int policy_resolve(struct policy *p, uint32_t n_layers, const struct profile_window *w,
                   struct larder_err *e)
{
    uint64_t n = n_layers;

    if (p->pool_kernel == POLICY_AUTO)
        p->pool_kernel = w && w->pool ? w->pool : policy_pool_default(p);
    if (policy_is_adaptive(p))
        return resolve_lmin(p, n_layers, w, e);
    if (p->cut != CUT_FIXED && p->cut != CUT_FIXED2)
        return 0;
    if (p->layer == POLICY_AUTO) /* FastKV's 15 and GemFilter's 13 of 32 layers */
        p->layer = (uint32_t)(n * (p->cut == CUT_FIXED ? 15 : 13) / 32);
    if (p->layer >= n_layers)
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: layer=%u, but the model's layers are 0 to %u", p->layer,
                           n_layers - 1);
    return 0;
}

double policy_rows_exact(const struct row_budget *b, uint32_t n)
{
    if (b->kind == ROWS_COUNT)
        return fmin(n, b->value);
    return b->kind == ROWS_SHARE ? n * b->value / 100 : n;
}

int policy_rows(const struct policy *p, const struct row_budget *b, uint32_t n, uint32_t *ret,
                struct larder_err *e)
{
    double rows = floor(policy_rows_exact(b, n));
    uint32_t stay = p->n_obs + p->sink;

    if (rows < n && rows <= stay && !p->sink)
        return larder_fail(e, LARDER_EBUDGET,
                           "a budget of %.0f of %u rows cannot hold more than the observation "
                           "window of %u; raise rows and select above w",
                           rows, n, p->n_obs);
    if (rows < n && rows <= stay)
        return larder_fail(e, LARDER_EBUDGET,
                           "a budget of %.0f of %u rows cannot hold more than the first %u and the "
                           "last %u, which always stay; raise rows and select above %u",
                           rows, n, p->sink, p->n_obs, stay);
    *ret = (uint32_t)rows;
    return 0;
}
