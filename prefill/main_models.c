/* main_models.c - what a worker serves: NAME=PATH[,template=T], and known fingerprints.
 *
 * The one idea: everything that can be wrong with a model is found before W_HELLO, so
 * that a worker that says hello can compute. A fingerprint is taken over from the
 * daemon only if the path is the very one that was hashed. */
#include "main_worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "geom.h"
#include "mem.h"
#include "sha256.h"
#include "tokenizer.h"

#define TEMPLATE_MARK ",template="

/* Split "NAME=PATH[,template=T]". */
static int split_model(const char *arg, struct served *m, struct larder_err *e)
{
    const char *eq = strchr(arg, '=');
    char *mark;

    if (!eq || eq == arg || !eq[1])
        return main_usage(e, "--model takes NAME=PATH[,template=T], not '%.80s'", arg);
    m->name = mem_dup(arg, (uint64_t)(eq - arg) + 1);
    m->path = mem_strdup(eq + 1);
    if (!m->name || !m->path)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the list of models");
    m->name[eq - arg] = '\0';
    mark = strstr(m->path, TEMPLATE_MARK);
    if (!mark)
        return 0;
    *mark = '\0';
    m->tmpl = mem_strdup(mark + strlen(TEMPLATE_MARK));
    return m->tmpl ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the list of models");
}

/* "DEV:INO:SIZE:MTIME_NS:HEX": take HEX over if the rest is this file. */
static bool use_known(struct model *m, const char *known)
{
    struct path_id id = model_path_id(m);
    const uint64_t want[4] = {id.dev, id.ino, id.size, id.mtime_ns};
    uint8_t fp[32];

    for (int i = 0; i < 4; i++) {
        char *end;

        if (*known < '0' || *known > '9' || strtoull(known, &end, 10) != want[i] || *end != ':')
            return false;
        known = end + 1;
    }
    if (sha256_unhex(known, fp))
        return false;
    model_fingerprint_known(m, fp);
    return true;
}

static void apply_known(struct served *m, const struct options *o)
{
    size_t n = strlen(m->name);

    for (uint32_t i = 0; i < o->n[OPTION_KNOWN]; i++) {
        const char *known = o->value[OPTION_KNOWN][i];

        if (!strncmp(known, m->name, n) && known[n] == '=' && use_known(m->s.model, known + n + 1))
            return;
    }
}

static int open_served(struct served *m, const struct options *o, struct larder_err *e)
{
    uint8_t fp[32];
    int rc = model_open(&m->s.model, m->path, e);

    if (!rc)
        rc = setup_template(m->s.model, m->tmpl, &m->s.tmpl, e);
    if (!rc)
        rc = setup_backend(o, m->s.model, &m->s.backend, e);
    if (rc)
        return rc;
    apply_known(m, o);
    return model_fingerprint(m->s.model, fp, e);
}

int worker_open_models(struct worker *w, const struct options *o, struct larder_err *e)
{
    if (!o->n[OPTION_MODEL])
        return main_usage(e, "a worker needs at least one --model NAME=PATH");
    for (uint32_t i = 0; i < o->n[OPTION_MODEL]; i++) {
        struct served *m = &w->model[w->n_models++];
        int rc = split_model(o->value[OPTION_MODEL][i], m, e);

        if (!rc)
            rc = open_served(m, o, e);
        if (rc)
            return larder_fail_in(e, rc, "model %.64s", m->name ? m->name : "?");
    }
    return 0;
}

void worker_close_models(struct worker *w)
{
    for (uint32_t i = 0; i < w->n_models; i++) {
        setup_done(&w->model[i].s);
        mem_free(w->model[i].name);
        mem_free(w->model[i].path);
        mem_free(w->model[i].tmpl);
    }
    w->n_models = 0;
}

int worker_template_hex(const struct template *t, char out[65], struct larder_err *e)
{
    uint8_t fp[32];
    int rc = template_fingerprint(t, fp, e);

    if (!rc)
        sha256_hex(fp, out);
    return rc;
}

static json_t *describe(const struct served *m)
{
    const struct model_params *p = model_params(m->s.model);
    struct path_id id = model_path_id(m->s.model);
    char fp_hex[65], tok_hex[65], tmpl_hex[65];
    uint8_t fp[32];

    if (model_fingerprint(m->s.model, fp, NULL) || worker_template_hex(m->s.tmpl, tmpl_hex, NULL))
        return NULL;
    sha256_hex(fp, fp_hex);
    tokenizer_fingerprint(model_tokenizer(m->s.model), fp);
    sha256_hex(fp, tok_hex);
    return json_pack(
        "{ss ss sI sI sI sI ss ss ss ss sI sI sI sI sI sI ss}", "name", m->name, "path", m->path,
        "dev", (json_int_t)id.dev, "ino", (json_int_t)id.ino, "size", (json_int_t)id.size,
        "mtime_ns", (json_int_t)id.mtime_ns, "fingerprint", fp_hex, "tokenizer_fingerprint",
        tok_hex, "template", m->s.tmpl->name, "template_fingerprint", tmpl_hex, "n_layers",
        (json_int_t)p->geom.n_layers, "n_heads", (json_int_t)p->geom.n_heads, "n_kv_heads",
        (json_int_t)p->geom.n_kv_heads, "head_dim", (json_int_t)p->geom.head_dim, "n_vocab",
        (json_int_t)p->n_vocab, "n_positions", (json_int_t)p->n_positions, "arch", p->arch);
}

json_t *worker_hello(const struct worker *w)
{
    const struct backend *b = w->model[0].s.backend;
    json_t *models = json_array();

    for (uint32_t i = 0; i < w->n_models; i++)
        if (json_array_append_new(models, describe(&w->model[i]))) {
            json_decref(models);
            return NULL;
        }
    return json_pack("{sI ss ss ss sI so ss*}", "pid", (json_int_t)getpid(), "backend",
                     b->ops->name, "isa", b->isa, "dtype", kv_dtype_name(b->elem), "threads",
                     (json_int_t)b->n_threads, "models", models, "device",
                     *b->device ? b->device : NULL);
}
