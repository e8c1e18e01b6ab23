/* policy.c - the policy string: one table of names, one of keys.
 *
 * The one idea: a policy uses a fixed set of keys (a bit mask per name), and parsing,
 * defaults and printing all walk the same key table, so that the canonical spelling
 * contains exactly what influences the result and nothing else. */
#include "policy.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "geom.h"

enum key {
    KEY_ROWS,
    KEY_SELECT,
    KEY_W,
    KEY_POOL,
    KEY_POOLKIND,
    KEY_LMIN,
    KEY_LOBS,
    KEY_TAU,
    KEY_LAYER,
    N_KEYS,
};

static const char *const key_name[N_KEYS] = {"rows", "select", "w",   "pool", "poolkind",
                                             "lmin", "lobs",   "tau", "layer"};

#define BIT(k) (1u << KEY_##k)
#define WINDOW_KEYS (BIT(ROWS) | BIT(W) | BIT(POOL) | BIT(POOLKIND))
#define VARIANCE_KEYS (BIT(LMIN) | BIT(LOBS) | BIT(TAU))

static const struct {
    const char *name;
    unsigned keys;
} kinds[] = {
    [POLICY_FULL] = {"full", 0},
    [POLICY_SNAPKV] = {"snapkv", WINDOW_KEYS},
    [POLICY_ASL] = {"asl", WINDOW_KEYS | BIT(SELECT) | VARIANCE_KEYS},
    [POLICY_FASTKV] = {"fastkv", WINDOW_KEYS | BIT(SELECT) | BIT(LAYER)},
    [POLICY_GEMFILTER] = {"gemfilter", BIT(ROWS) | BIT(POOL) | BIT(LAYER)},
    [POLICY_ASL2PASS] = {"asl2pass", WINDOW_KEYS | VARIANCE_KEYS},
};
#define N_KINDS (sizeof kinds / sizeof kinds[0])

#define MAX_WINDOW 4096u
#define MAX_POOL 1023u
#define MAX_TAU 1e6
#define AUTO UINT32_MAX

static bool is_used(const struct policy *p, enum key k)
{
    return kinds[p->kind].keys >> k & 1u;
}

/* ---- values */

static int bad_value(struct larder_err *e, enum key k, const char *v, const char *want)
{
    return larder_fail(e, LARDER_EPOLICY, "policy: %s=%.40s is not valid; %s takes %s", key_name[k],
                       v, key_name[k], want);
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

static int set_budget(struct row_budget *b, enum key k, const char *v, struct larder_err *e)
{
    const char *want = "a number of rows, a share such as 25%, or all";
    size_t len = strlen(v);
    char share[32];
    double pct;
    uint32_t n;

    if (!strcmp(v, "all")) {
        *b = (struct row_budget){ROWS_ALL, 0};
        return 0;
    }
    if (read_count(v, KV_MAX_CTX, &n) && n > 0) {
        *b = (struct row_budget){ROWS_COUNT, n};
        return 0;
    }
    if (len < 2 || len >= sizeof share || v[len - 1] != '%')
        return bad_value(e, k, v, want);
    memcpy(share, v, len - 1);
    share[len - 1] = '\0';
    if (!read_decimal(share, 100, &pct) || pct <= 0)
        return bad_value(e, k, v, want);
    /* The whole document has one spelling. */
    *b = pct == 100 ? (struct row_budget){ROWS_ALL, 0} : (struct row_budget){ROWS_SHARE, pct};
    return 0;
}

static int set_layer(uint32_t *to, enum key k, const char *v, struct larder_err *e)
{
    if (!strcmp(v, "auto")) {
        *to = AUTO;
        return 0;
    }
    if (!read_count(v, KV_MAX_LAYERS, to))
        return bad_value(e, k, v, "a layer number or auto");
    return 0;
}

static int set_pool_kind(struct policy *p, const char *v, struct larder_err *e)
{
    if (strcmp(v, "avg") && strcmp(v, "max"))
        return bad_value(e, KEY_POOLKIND, v, "avg or max");
    p->pool = *v == 'a' ? POOL_AVG : POOL_MAX;
    return 0;
}

static int set_value(struct policy *p, enum key k, const char *v, struct larder_err *e)
{
    switch (k) {
    case KEY_ROWS:
        return set_budget(&p->rows, k, v, e);
    case KEY_SELECT:
        return set_budget(&p->select, k, v, e);
    case KEY_W:
        if (!read_count(v, MAX_WINDOW, &p->n_obs) || !p->n_obs)
            return bad_value(e, k, v, "a number of rows from 1 to 4096");
        return 0;
    case KEY_POOL:
        if (!read_count(v, MAX_POOL, &p->pool_kernel) || p->pool_kernel % 2 == 0)
            return bad_value(e, k, v, "an odd number from 1 to 1023");
        return 0;
    case KEY_POOLKIND:
        return set_pool_kind(p, v, e);
    case KEY_LMIN:
        return set_layer(&p->l_min, k, v, e);
    case KEY_LOBS:
        if (!read_count(v, KV_MAX_LAYERS, &p->l_obs) || p->l_obs < 2)
            return bad_value(e, k, v, "a number of layers from 2");
        return 0;
    case KEY_TAU:
        if (!read_decimal(v, MAX_TAU, &p->tau))
            return bad_value(e, k, v, "a decimal number such as 0.3");
        return 0;
    case KEY_LAYER:
        return set_layer(&p->layer, k, v, e);
    case N_KEYS:
        break;
    }
    return larder_fail(e, LARDER_EINTERNAL, "policy key %d has no setter", (int)k);
}

/* ---- parse */

static struct policy defaults(enum policy_kind kind)
{
    struct policy p = {
        .kind = kind,
        .rows = {ROWS_COUNT, 2048},
        .select = {ROWS_COUNT, 2048},
        .n_obs = 32,
        .pool_kernel = kind == POLICY_GEMFILTER ? 5 : 7,
        .pool = POOL_AVG,
        .l_min = AUTO,
        .l_obs = 8,
        .tau = 0.3,
        .layer = AUTO,
    };

    if (kind == POLICY_FULL)
        p.rows = p.select = (struct row_budget){ROWS_ALL, 0};
    if (!is_used(&p, KEY_W))
        p.n_obs = 0; /* no window: every row may be dropped */
    return p;
}

static void list_kinds(char *out, size_t cap)
{
    size_t at = 0;

    for (size_t i = 0; i < N_KINDS; i++)
        at += (size_t)snprintf(out + at, cap - at, "%s%s", i ? ", " : "", kinds[i].name);
}

static void list_keys(const struct policy *p, char *out, size_t cap)
{
    size_t at = 0;

    snprintf(out, cap, "no keys");
    for (int k = 0; k < N_KEYS; k++)
        if (is_used(p, k))
            at += (size_t)snprintf(out + at, cap - at, "%s%s", at ? ", " : "", key_name[k]);
}

static int find_kind(const char *name, enum policy_kind *ret, struct larder_err *e)
{
    char all[128];

    for (size_t i = 0; i < N_KINDS; i++) {
        if (!strcmp(name, kinds[i].name)) {
            *ret = (enum policy_kind)i;
            return 0;
        }
    }
    list_kinds(all, sizeof all);
    return larder_fail(e, LARDER_EPOLICY, "policy: no policy is named '%.40s'; there are %s", name,
                       all);
}

static int set_item(struct policy *p, char *item, unsigned *seen, struct larder_err *e)
{
    char *eq = strchr(item, '=');
    char keys[128];

    if (!eq)
        return larder_fail(e, LARDER_EPOLICY, "policy: '%.40s' is not of the form key=value", item);
    *eq = '\0';
    for (int k = 0; k < N_KEYS; k++) {
        if (strcmp(item, key_name[k]) || !is_used(p, k))
            continue;
        if (*seen >> k & 1u)
            return larder_fail(e, LARDER_EPOLICY, "policy: %s is given twice", item);
        *seen |= 1u << k;
        return set_value(p, k, eq + 1, e);
    }
    list_keys(p, keys, sizeof keys);
    return larder_fail(e, LARDER_EPOLICY, "policy: %s does not take '%.40s'; it takes %s",
                       kinds[p->kind].name, item, keys);
}

int policy_parse(const char *text, struct policy *ret, struct larder_err *e)
{
    char buf[POLICY_TEXT_MAX];
    enum policy_kind kind = POLICY_FULL;
    struct policy p;
    unsigned seen = 0;
    char *rest = buf;
    int rc;

    if (strlen(text) >= sizeof buf)
        return larder_fail(e, LARDER_EPOLICY, "policy: longer than %u characters",
                           POLICY_TEXT_MAX - 1);
    memcpy(buf, text, strlen(text) + 1);
    rc = find_kind(strsep(&rest, ","), &kind, e);
    if (rc)
        return rc;
    p = defaults(kind);
    while (rest) {
        rc = set_item(&p, strsep(&rest, ","), &seen, e);
        if (rc)
            return rc;
    }
    if (!(seen & BIT(SELECT)))
        p.select = p.rows;
    *ret = p;
    return 0;
}

/* ---- print */

static void print_budget(const struct row_budget *b, char *out, size_t cap)
{
    char num[40];

    if (b->kind == ROWS_ALL) {
        snprintf(out, cap, "all");
        return;
    }
    print_decimal(b->value, num, sizeof num);
    snprintf(out, cap, "%s%s", num, b->kind == ROWS_SHARE ? "%" : "");
}

static void print_layer(uint32_t layer, char *out, size_t cap)
{
    if (layer == AUTO)
        snprintf(out, cap, "auto");
    else
        snprintf(out, cap, "%u", layer);
}

static void print_value(const struct policy *p, enum key k, char *out, size_t cap)
{
    switch (k) {
    case KEY_ROWS:
        print_budget(&p->rows, out, cap);
        return;
    case KEY_SELECT:
        print_budget(&p->select, out, cap);
        return;
    case KEY_W:
        snprintf(out, cap, "%u", p->n_obs);
        return;
    case KEY_POOL:
        snprintf(out, cap, "%u", p->pool_kernel);
        return;
    case KEY_POOLKIND:
        snprintf(out, cap, "%s", p->pool == POOL_AVG ? "avg" : "max");
        return;
    case KEY_LMIN:
        print_layer(p->l_min, out, cap);
        return;
    case KEY_LOBS:
        snprintf(out, cap, "%u", p->l_obs);
        return;
    case KEY_TAU:
        print_decimal(p->tau, out, cap);
        return;
    case KEY_LAYER:
        print_layer(p->layer, out, cap);
        return;
    case N_KEYS:
        break;
    }
    *out = '\0';
}

void policy_print(const struct policy *p, char out[POLICY_TEXT_MAX])
{
    size_t at = (size_t)snprintf(out, POLICY_TEXT_MAX, "%s", kinds[p->kind].name);
    char value[64];

    for (int k = 0; k < N_KEYS; k++) {
        if (!is_used(p, k))
            continue;
        print_value(p, k, value, sizeof value);
        at += (size_t)snprintf(out + at, POLICY_TEXT_MAX - at, ",%s=%s", key_name[k], value);
    }
}

/* ---- against a model and a document */

static int resolve_lmin(struct policy *p, uint32_t n_layers, struct larder_err *e)
{
    if (p->l_min == AUTO)
        p->l_min = n_layers / 3;
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

int policy_resolve(struct policy *p, uint32_t n_layers, struct larder_err *e)
{
    uint64_t n = n_layers;

    if (is_used(p, KEY_LMIN))
        return resolve_lmin(p, n_layers, e);
    if (!is_used(p, KEY_LAYER))
        return 0;
    if (p->layer == AUTO) /* the papers' 15 and 13 of 32 layers */
        p->layer = (uint32_t)(n * (p->kind == POLICY_FASTKV ? 15 : 13) / 32);
    if (p->layer >= n_layers)
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: layer=%u, but the model's layers are 0 to %u", p->layer,
                           n_layers - 1);
    return 0;
}

int policy_rows(const struct policy *p, const struct row_budget *b, uint32_t n, uint32_t *ret,
                struct larder_err *e)
{
    double rows = n;

    if (b->kind == ROWS_COUNT)
        rows = fmin(n, b->value);
    else if (b->kind == ROWS_SHARE)
        rows = floor(n * b->value / 100);
    if (rows < n && rows <= p->n_obs)
        return larder_fail(e, LARDER_EBUDGET,
                           "a budget of %.0f of %u rows cannot hold more than the observation "
                           "window of %u; raise rows and select above w",
                           rows, n, p->n_obs);
    *ret = (uint32_t)rows;
    return 0;
}
