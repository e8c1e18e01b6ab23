/* config.c - a table of keys; sections `model NAME { ... }` and `namespace NAME { ... }`.
 *
 * The one idea: a key is a row of a table (name, type, offset, limits, default, what it
 * means), and parser, defaults and dump walk the rows. Nothing about a key is written twice. */
#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "frame.h"
#include "mem.h"

#define MAX_LINE 4096

enum kind { STRING, BYTES, SECONDS, COUNT, OCTAL, FLAG, WORD };

struct key {
    const char *name;
    enum kind kind;
    size_t offset;
    uint64_t min, max;
    const char *preset; /* default, as it would be written; WORD: all words, the default first */
    const char *help;
};

#define TOP(field) offsetof(struct config, field)
static const struct key top_keys[] = {
    {"store", STRING, TOP(store), 0, 0, "/var/lib/larder", "directory of the store"},
    {"store_budget", BYTES, TOP(store_budget), 1 << 20, 1ull << 50, "20G",
     "bytes that entries may take; the least useful ones are evicted beyond it"},
    {"codec", WORD, TOP(codec), 0, 0, "fast|zstd",
     "how new bf16 rows are coded: fast or zstd; either is read"},
    {"allow_any_fs", FLAG, TOP(allow_any_fs), 0, 1, "no",
     "accept a store on network, FUSE or overlay file systems, which may lose data"},
    {"allow_import", FLAG, TOP(allow_import), 0, 1, "no",
     "store entries that were computed elsewhere (larder import)"},
    {"socket", STRING, TOP(socket), 0, 0, "/run/larder/larder.sock", "socket for clients"},
    {"socket_mode", OCTAL, TOP(socket_mode), 0, 0777, "0660", "who may connect: its file mode"},
    {"worker_socket", STRING, TOP(worker_socket), 0, 0, "/run/larder/worker.sock",
     "socket for prefill workers that larderd does not start itself"},
    {"worker_program", STRING, TOP(worker_program), 0, 0, "",
     "larder-prefill to start (-cuda is added for backend cuda); empty: beside larderd, then "
     "../bin"},
    {"worker_idle", SECONDS, TOP(worker_idle_s), 1, 86400, "60s",
     "end a worker without a job after"},
    {"worker_timeout", SECONDS, TOP(worker_timeout_s), 1, 86400, "10m",
     "kill a worker that says nothing during a job for"},
    {"worker_nice", COUNT, TOP(worker_nice), 0, 19, "5",
     "nice level of workers: decoders come first"},
    {"image_cache_bytes", BYTES, TOP(image_cache_bytes), 0, 1ull << 46, "1G",
     "decoded images kept in memory without a lease"},
    {"prepared_files", COUNT, TOP(prepared_files), 0, 16, "2", "fresh memory files kept ready"},
    {"prepared_bytes", BYTES, TOP(prepared_bytes), 1 << 16, 1ull << 36, "64M",
     "size of the largest of them; the others are as large as the last images"},
    {"max_clients", COUNT, TOP(max_clients), 1, 65536, "256", "connections at a time"},
    {"max_in_flight", COUNT, TOP(max_in_flight), 1, 1024, "32",
     "unanswered requests of a connection"},
    {"max_queued_frames", COUNT, TOP(max_queued_frames), 4, 65536, "256",
     "answers a client may leave unread before it is disconnected"},
    {"max_document_bytes", BYTES, TOP(max_document_bytes), 1, 1ull << 32, "64M",
     "size of a document"},
    {"max_jobs", COUNT, TOP(max_jobs), 1, 1000000, "10000", "jobs waiting at a time"},
};

#define MODEL(field) offsetof(struct config_model, field)
static const struct key model_keys[] = {
    {"path", STRING, MODEL(path), 0, 0, "", "a GGUF file, or a directory as Hugging Face has it"},
    {"backend", STRING, MODEL(backend), 0, 0, "cpu", "cpu, cuda (in a build with CUDA=1) or ref"},
    {"dtype", STRING, MODEL(dtype), 0, 0, "auto",
     "auto (bf16 where the processor has it, else f32), bf16 or f32"},
    {"threads", COUNT, MODEL(threads), 0, 1024, "0", "threads of its worker; 0: one per processor"},
    {"policy", STRING, MODEL(policy), 0, 0, "offline", "pruning policy where a client names none"},
    {"template", STRING, MODEL(template), 0, 0, "auto",
     "chat template; auto: as the model file says"},
    {"calibrate", FLAG, MODEL(calibrate), 0, 1, "yes",
     "measure the model when a policy first needs its profile; no: only larder calibrate does"},
};

#define N(table) (sizeof table / sizeof table[0])

/* ---- values */

static int bad(const char *where, const struct key *k, const char *v, const char *want,
               struct larder_err *e)
{
    return larder_fail(e, LARDER_ECONFIG, "%s: %s = %.60s: expected %s", where, k->name, v, want);
}

/* Digits with an optional unit letter; 0 when it is not one. */
static uint64_t unit_of(enum kind kind, const char *u)
{
    static const struct {
        enum kind kind;
        const char *name;
        uint64_t factor;
    } units[] = {{BYTES, "", 1},           {BYTES, "K", 1ull << 10}, {BYTES, "M", 1ull << 20},
                 {BYTES, "G", 1ull << 30}, {BYTES, "T", 1ull << 40}, {SECONDS, "", 1},
                 {SECONDS, "s", 1},        {SECONDS, "m", 60},       {SECONDS, "min", 60},
                 {SECONDS, "h", 3600},     {COUNT, "", 1},           {OCTAL, "", 1}};

    for (size_t i = 0; i < N(units); i++)
        if (units[i].kind == kind && !strcmp(units[i].name, u))
            return units[i].factor;
    return 0;
}

static int set_number(const struct key *k, uint64_t *to, const char *v, const char *where,
                      struct larder_err *e)
{
    unsigned long long n;
    uint64_t factor;
    char *end;

    errno = 0;
    n = isdigit((unsigned char)*v) ? strtoull(v, &end, k->kind == OCTAL ? 8 : 10) : 0;
    factor = isdigit((unsigned char)*v) ? unit_of(k->kind, end) : 0;
    if (!factor || errno || n > UINT64_MAX / factor)
        return bad(where, k, v,
                   k->kind == BYTES     ? "a size such as 512M or 20G"
                   : k->kind == SECONDS ? "a time such as 30s or 10m"
                                        : "a number",
                   e);
    if (n * factor < k->min || n * factor > k->max)
        return larder_fail(e, LARDER_ECONFIG, "%s: %s = %.60s is out of range: %llu to %llu", where,
                           k->name, v, (unsigned long long)k->min, (unsigned long long)k->max);
    *to = n * factor;
    return 0;
}

/* The number of a word among those of the key. */
static int set_word(const struct key *k, uint64_t *to, const char *v, const char *where,
                    struct larder_err *e)
{
    const char *at = k->preset;

    for (uint64_t i = 0; at; i++) {
        size_t len = strcspn(at, "|");

        if (len == strlen(v) && !memcmp(at, v, len)) {
            *to = i;
            return 0;
        }
        at = at[len] ? at + len + 1 : NULL;
    }
    return bad(where, k, v, k->preset, e);
}

static int set_value(const struct key *k, void *base, const char *v, const char *where,
                     struct larder_err *e)
{
    void *to = (char *)base + k->offset;
    char *copy;

    if (k->kind == FLAG) {
        bool yes = !strcmp(v, "yes"), no = !strcmp(v, "no");

        if (!yes && !no)
            return bad(where, k, v, "yes or no", e);
        *(bool *)to = yes;
        return 0;
    }
    if (k->kind == WORD)
        return set_word(k, to, v, where, e);
    if (k->kind != STRING)
        return set_number(k, to, v, where, e);
    copy = mem_strdup(v);
    if (!copy)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the configuration");
    mem_free(*(char **)to);
    *(char **)to = copy;
    return 0;
}

static const struct key *find_key(const struct key *table, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(table[i].name, name))
            return &table[i];
    return NULL;
}

static int set_defaults(const struct key *table, size_t n, void *base, struct larder_err *e)
{
    int rc = 0;

    for (size_t i = 0; !rc && i < n; i++)
        if (table[i].kind != WORD) /* 0 is the first */
            rc = set_value(&table[i], base, table[i].preset, "default", e);
    return rc;
}

int config_init(struct config *c, struct larder_err *e)
{
    memset(c, 0, sizeof *c);
    return set_defaults(top_keys, N(top_keys), c, e);
}

static void free_strings(const struct key *table, size_t n, void *base)
{
    for (size_t i = 0; i < n; i++)
        if (table[i].kind == STRING)
            mem_free(*(char **)((char *)base + table[i].offset));
}

void config_done(struct config *c)
{
    free_strings(top_keys, N(top_keys), c);
    for (uint32_t i = 0; i < c->n_models; i++) {
        mem_free(c->model[i].name);
        free_strings(model_keys, N(model_keys), &c->model[i]);
    }
    for (uint32_t i = 0; i < c->n_ns; i++)
        mem_free(c->ns[i].name);
    memset(c, 0, sizeof *c);
}

/* ---- sections */

const struct config_model *config_find_model(const struct config *c, const char *name)
{
    for (uint32_t i = 0; i < c->n_models; i++)
        if (!strcmp(c->model[i].name, name))
            return &c->model[i];
    return NULL;
}

static int new_model(struct config *c, const char *name, const char *where,
                     struct config_model **ret, struct larder_err *e)
{
    struct config_model *m;
    int rc;

    if (!name_is_namespace(name))
        return larder_fail(e, LARDER_ECONFIG,
                           "%s: '%.60s' is no model name: use letters, digits, . _ -", where, name);
    if (config_find_model(c, name))
        return larder_fail(e, LARDER_ECONFIG, "%s: model %s is configured twice", where, name);
    if (c->n_models == CONFIG_MAX_MODELS)
        return larder_fail(e, LARDER_ECONFIG, "%s: more than %u models", where, CONFIG_MAX_MODELS);
    m = &c->model[c->n_models];
    m->name = mem_strdup(name);
    if (!m->name)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the configuration");
    c->n_models++;
    rc = set_defaults(model_keys, N(model_keys), m, e);
    *ret = m;
    return rc;
}

static int new_namespace(struct config *c, const char *name, const char *where,
                         struct config_namespace **ret, struct larder_err *e)
{
    if (!name_is_namespace(name))
        return larder_fail(e, LARDER_ECONFIG,
                           "%s: '%.60s' is no namespace: use letters, digits, . _ -", where, name);
    if (c->n_ns == CONFIG_MAX_NAMESPACES)
        return larder_fail(e, LARDER_ECONFIG, "%s: more than %u namespaces", where,
                           CONFIG_MAX_NAMESPACES);
    *ret = &c->ns[c->n_ns];
    (*ret)->name = mem_strdup(name);
    if (!(*ret)->name)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the configuration");
    c->n_ns++;
    return 0;
}

/* One user or group, by name or number. */
static int add_id(struct config_namespace *n, bool is_user, const char *who, const char *where,
                  struct larder_err *e)
{
    struct passwd *pw = is_user ? getpwnam(who) : NULL;
    struct group *gr = is_user ? NULL : getgrnam(who);
    uint32_t *count = is_user ? &n->n_uids : &n->n_gids;
    unsigned long id = 0;
    char *end;

    if (*count == CONFIG_MAX_IDS)
        return larder_fail(e, LARDER_ECONFIG, "%s: more than %u in one list", where,
                           CONFIG_MAX_IDS);
    if (!pw && !gr) {
        id = strtoul(who, &end, 10);
        if (!isdigit((unsigned char)*who) || *end)
            return larder_fail(e, LARDER_ECONFIG, "%s: no %s '%.60s' on this machine", where,
                               is_user ? "user" : "group", who);
    }
    if (is_user)
        n->uid[(*count)++] = pw ? pw->pw_uid : (uid_t)id;
    else
        n->gid[(*count)++] = gr ? gr->gr_gid : (gid_t)id;
    return 0;
}

static int set_members(struct config_namespace *n, const char *key, char *v, const char *where,
                       struct larder_err *e)
{
    bool users = !strcmp(key, "users");
    char *save = NULL;
    int rc = 0;

    if (!users && strcmp(key, "groups"))
        return larder_fail(e, LARDER_ECONFIG, "%s: a namespace has users and groups, not '%.60s'",
                           where, key);
    for (char *w = strtok_r(v, ", \t", &save); !rc && w; w = strtok_r(NULL, ", \t", &save))
        rc = add_id(n, users, w, where, e);
    return rc;
}

bool config_may_use(const struct config *c, const char *ns, uid_t uid, const gid_t *gid,
                    uint32_t n_gids)
{
    for (uint32_t i = 0; i < c->n_ns; i++) {
        const struct config_namespace *n = &c->ns[i];

        if (strcmp(n->name, ns))
            continue;
        for (uint32_t u = 0; u < n->n_uids; u++)
            if (n->uid[u] == uid)
                return true;
        for (uint32_t g = 0; g < n->n_gids; g++)
            for (uint32_t h = 0; h < n_gids; h++)
                if (n->gid[g] == gid[h])
                    return true;
        return false;
    }
    return true;
}

/* ---- lines */

struct parser {
    struct config *c;
    struct config_model *model; /* inside its section */
    struct config_namespace *ns;
    char where[512];
};

static char *trim(char *s)
{
    char *end = s + strlen(s);

    while (isspace((unsigned char)*s))
        s++;
    while (end > s && isspace((unsigned char)end[-1]))
        *--end = '\0';
    return s;
}

static int assign(struct parser *p, char *line, struct larder_err *e)
{
    char *eq = strchr(line, '='), *key, *v;
    const struct key *k;

    if (!eq)
        return larder_fail(e, LARDER_ECONFIG, "%s: expected key = value", p->where);
    *eq = '\0';
    key = trim(line);
    v = trim(eq + 1);
    if (p->ns)
        return set_members(p->ns, key, v, p->where, e);
    k = p->model ? find_key(model_keys, N(model_keys), key) : find_key(top_keys, N(top_keys), key);
    if (!k)
        return larder_fail(e, LARDER_ECONFIG,
                           "%s: unknown key '%.60s'; larderd --dump-config lists all", p->where,
                           key);
    return set_value(k, p->model ? (void *)p->model : (void *)p->c, v, p->where, e);
}

static int open_section(struct parser *p, char *line, struct larder_err *e)
{
    char *save = NULL, *kind, *name, *brace;

    kind = strtok_r(line, " \t", &save);
    name = kind ? strtok_r(NULL, " \t", &save) : NULL;
    brace = name ? strtok_r(NULL, " \t", &save) : NULL;
    if (!brace || strcmp(brace, "{") || p->model || p->ns)
        return larder_fail(e, LARDER_ECONFIG, "%s: expected 'model NAME {' or 'namespace NAME {'",
                           p->where);
    if (!strcmp(kind, "model"))
        return new_model(p->c, name, p->where, &p->model, e);
    if (!strcmp(kind, "namespace"))
        return new_namespace(p->c, name, p->where, &p->ns, e);
    return larder_fail(e, LARDER_ECONFIG, "%s: unknown section '%.60s'", p->where, kind);
}

static int read_line(struct parser *p, char *line, struct larder_err *e)
{
    char *s = trim(line);
    size_t n = strlen(s);

    if (!n || *s == '#')
        return 0;
    if (!strcmp(s, "}")) {
        if (!p->model && !p->ns)
            return larder_fail(e, LARDER_ECONFIG, "%s: '}' closes nothing", p->where);
        if (p->model && !*p->model->path)
            return larder_fail(e, LARDER_ECONFIG, "%s: model %s has no path", p->where,
                               p->model->name);
        p->model = NULL;
        p->ns = NULL;
        return 0;
    }
    return s[n - 1] == '{' ? open_section(p, s, e) : assign(p, s, e);
}

int config_read(struct config *c, const char *path, struct larder_err *e)
{
    struct parser p = {.c = c};
    char line[MAX_LINE];
    FILE *f = fopen(path, "re");
    int rc = 0;

    if (!f)
        return larder_fail(e, LARDER_ECONFIG, "%s: %s", path, strerror(errno));
    for (unsigned n = 1; !rc && fgets(line, sizeof line, f); n++) {
        snprintf(p.where, sizeof p.where, "%.480s:%u", path, n);
        if (!strchr(line, '\n') && !feof(f))
            rc = larder_fail(e, LARDER_ECONFIG, "%s: line too long", p.where);
        else
            rc = read_line(&p, line, e);
    }
    if (!rc && ferror(f))
        rc = larder_fail(e, LARDER_ECONFIG, "%s: %s", path, strerror(errno));
    if (!rc && (p.model || p.ns))
        rc = larder_fail(e, LARDER_ECONFIG, "%s: a section is not closed", p.where);
    fclose(f);
    return rc;
}

int config_set(struct config *c, const char *assignment, const char *where, struct larder_err *e)
{
    struct parser p = {.c = c};
    char line[MAX_LINE];

    snprintf(p.where, sizeof p.where, "%s", where);
    if ((size_t)snprintf(line, sizeof line, "%s", assignment) >= sizeof line)
        return larder_fail(e, LARDER_ECONFIG, "%s: too long", where);
    return assign(&p, line, e);
}

int config_add_model(struct config *c, const char *spec, struct larder_err *e)
{
    const char *eq = strchr(spec, '=');
    struct config_model *m;
    char name[NAME_MAX_NS + 1];
    int rc;

    if (!eq || !eq[1] || (size_t)(eq - spec) >= sizeof name)
        return larder_fail(e, LARDER_ECONFIG, "--model takes NAME=PATH, not '%.60s'", spec);
    memcpy(name, spec, (size_t)(eq - spec));
    name[eq - spec] = '\0';
    rc = new_model(c, name, "--model", &m, e);
    return rc ? rc : set_value(&model_keys[0], m, eq + 1, "--model", e);
}

/* ---- dump */

static void print_word(const char *words, uint64_t i, FILE *out)
{
    for (; i; i--)
        words += strcspn(words, "|") + 1;
    fprintf(out, "%.*s\n", (int)strcspn(words, "|"), words);
}

static void print_value(const struct key *k, const void *base, FILE *out)
{
    const void *at = (const char *)base + k->offset;

    switch (k->kind) {
    case STRING:
        fprintf(out, "%s\n", *(char *const *)at);
        break;
    case FLAG:
        fprintf(out, "%s\n", *(const bool *)at ? "yes" : "no");
        break;
    case WORD:
        print_word(k->preset, *(const uint64_t *)at, out);
        break;
    case OCTAL:
        fprintf(out, "0%llo\n", (unsigned long long)*(const uint64_t *)at);
        break;
    default: {
        uint64_t v = *(const uint64_t *)at;
        int unit = 0;

        while (k->kind == BYTES && v && v % 1024 == 0 && unit < 4) {
            v /= 1024;
            unit++;
        }
        fprintf(out, "%llu%s\n", (unsigned long long)v,
                k->kind == SECONDS ? "s"
                : unit             ? (const char *[]){"", "K", "M", "G", "T"}[unit]
                                   : "");
    }
    }
}

static void dump(const struct key *table, size_t n, const void *base, const char *indent, FILE *out)
{
    for (size_t i = 0; i < n; i++) {
        fprintf(out, "%s# %s\n%s%s = ", indent, table[i].help, indent, table[i].name);
        print_value(&table[i], base, out);
    }
}

void config_dump(const struct config *c, FILE *out)
{
    dump(top_keys, N(top_keys), c, "", out);
    for (uint32_t i = 0; i < c->n_models; i++) {
        fprintf(out, "model %s {\n", c->model[i].name);
        dump(model_keys, N(model_keys), &c->model[i], "    ", out);
        fprintf(out, "}\n");
    }
    for (uint32_t i = 0; i < c->n_ns; i++) {
        const struct config_namespace *n = &c->ns[i];

        fprintf(out, "namespace %s {\n    users =", n->name);
        for (uint32_t u = 0; u < n->n_uids; u++)
            fprintf(out, " %u", n->uid[u]);
        fprintf(out, "\n    groups =");
        for (uint32_t g = 0; g < n->n_gids; g++)
            fprintf(out, " %u", n->gid[g]);
        fprintf(out, "\n}\n");
    }
}
