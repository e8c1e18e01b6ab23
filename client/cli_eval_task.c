/* cli_eval_task.c - task files: questions with known answers about documents.
 *
 * The one idea: every line is checked and brought to one form as it is read: the object's
 * document moves to a list in which equal ones are one, the answers are a list, and what
 * comes as text is noted to be tokenised. After that nothing about a task can be wrong. */
#include "cli_eval.h"

#include <stdlib.h>
#include <string.h>

#include "mem.h"
#include "sha256.h"

#define MAX_TASKS 100000u
#define MAX_ID 512u
#define MAX_IDS (1u << 20) /* tokens of a question or an answer */
#define MAX_GOLD 1000u     /* known answers of one question */

struct reading {
    struct eval_set *s;
    json_t *docs; /* index of each, by what it is made of */
    json_t *ids;  /* of tasks so far */
    size_t limit;
    unsigned line;
};

/* ---- fields */

static int take_ids(const json_t *list, const char *key, size_t max, struct larder_err *e)
{
    const json_t *v;
    size_t i;

    if (!json_is_array(list) || !json_array_size(list))
        return larder_fail(e, LARDER_EINVAL, "\"%s\" is not a list of token ids", key);
    if (json_array_size(list) > max)
        return larder_fail(e, LARDER_ETOOBIG, "\"%s\" has %zu token ids; at most %zu", key,
                           json_array_size(list), max);
    json_array_foreach (list, i, v) {
        json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;

        if (id < 0 || id > UINT32_MAX)
            return larder_fail(e, LARDER_EINVAL, "entry %zu of \"%s\" is no token id", i, key);
    }
    return 0;
}

/* A text that is there and not empty; *ret NULL when it is absent. */
static int take_text(const json_t *o, const char *key, const char **ret, struct larder_err *e)
{
    const json_t *v = json_object_get(o, key);

    if (v && (!json_is_string(v) || !json_string_length(v)))
        return larder_fail(e, LARDER_EINVAL, "\"%s\" is not a text (or empty)", key);
    *ret = json_string_value(v);
    return 0;
}

static int check_id(const struct reading *r, struct eval_task *t, struct larder_err *e)
{
    int rc = take_text(t->o, "id", &t->id, e);

    if (!rc && !t->id)
        rc = larder_fail(e, LARDER_EINVAL, "the task has no \"id\"");
    if (!rc && strlen(t->id) > MAX_ID)
        rc = larder_fail(e, LARDER_ETOOBIG, "the \"id\" is longer than %u bytes", MAX_ID);
    if (!rc && json_object_get(r->ids, t->id))
        rc = larder_fail(e, LARDER_EINVAL, "the \"id\" '%.100s' is that of an earlier line", t->id);
    if (!rc && json_object_set_new(r->ids, t->id, json_true()))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for the tasks");
    return rc;
}

/* "gold" becomes a list, and "single" says whether it was none. */
static int check_gold(json_t *o, struct larder_err *e)
{
    json_t *gold = json_object_get(o, "gold");
    const json_t *v;
    size_t i;
    int rc = 0;

    if (json_is_string(gold)) {
        json_object_set_new(o, "single", json_true());
        json_object_set_new(o, "gold", json_pack("[O]", gold));
        gold = json_object_get(o, "gold");
    } else {
        json_object_set_new(o, "single", json_false());
    }
    if (!json_is_array(gold) || !json_array_size(gold) || json_array_size(gold) > MAX_GOLD)
        return larder_fail(e, LARDER_EINVAL, "\"gold\" is neither an answer nor 1 to %u of them",
                           MAX_GOLD);
    json_array_foreach (gold, i, v)
        if (!json_is_string(v) || !json_string_length(v))
            return larder_fail(e, LARDER_EINVAL, "an answer in \"gold\" is not a text (or empty)");
    v = json_object_get(o, "gold_ids");
    if (json_is_array(v) && !json_array_size(v)) /* as for a list of answers */
        json_object_del(o, "gold_ids");
    else if (v)
        rc = take_ids(v, "gold_ids", MAX_IDS, e);
    return rc;
}

static int check_question(json_t *o, struct larder_err *e)
{
    const json_t *tail = json_object_get(o, "tail_ids");
    const char *question = NULL, *answer;
    int rc = take_text(o, "question", &question, e);

    if (!rc)
        rc = take_text(o, "answer_prefix", &answer, e);
    if (!rc && tail)
        rc = take_ids(tail, "tail_ids", MAX_IDS, e);
    if (!rc && !tail && !question)
        rc = larder_fail(e, LARDER_EINVAL, "the task has neither \"tail_ids\" nor \"question\"");
    return rc;
}

static int check_rest(json_t *o, struct larder_err *e)
{
    const json_t *any = json_object_get(o, "any"), *length = json_object_get(o, "length");
    const json_t *depth = json_object_get(o, "depth"), *n = json_object_get(o, "max_new");
    const char *kind;

    if (any && !json_is_boolean(any))
        return larder_fail(e, LARDER_EINVAL, "\"any\" is not true or false");
    if (n &&
        (!json_is_integer(n) || json_integer_value(n) < 1 || json_integer_value(n) > KV_MAX_CTX))
        return larder_fail(e, LARDER_EINVAL, "\"max_new\" is not a number of tokens");
    if (length && (!json_is_integer(length) || json_integer_value(length) < 0))
        return larder_fail(e, LARDER_EINVAL, "\"length\" is not a number of tokens");
    if (depth &&
        !(json_is_number(depth) && json_number_value(depth) >= 0 && json_number_value(depth) <= 1))
        return larder_fail(e, LARDER_EINVAL, "\"depth\" is not a number from 0 to 1");
    return take_text(o, "task", &kind, e);
}

/* ---- documents */

/* The first 16 hex digits of SHA-256 over the ids as text: a name that public.py gives too. */
static int name_doc(struct eval_doc *d, struct larder_err *e)
{
    struct sha256 *h = sha256_new();
    uint8_t digest[SHA256_LEN];
    char hex[2 * SHA256_LEN + 1], number[16];

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory to name a document");
    for (size_t i = 0; i < d->n_ids; i++)
        sha256_add(h, number, (size_t)snprintf(number, sizeof number, i ? " %u" : "%u", d->ids[i]));
    sha256_get(h, digest);
    sha256_free(h);
    sha256_hex(digest, hex);
    memcpy(d->name, hex, 16);
    return 0;
}

static int fill_doc_ids(struct eval_doc *d, const json_t *list, struct larder_err *e)
{
    const json_t *v;
    size_t i;

    d->ids = mem_alloc(json_array_size(list), sizeof *d->ids);
    if (!d->ids)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a document");
    json_array_foreach (list, i, v)
        d->ids[i] = (uint32_t)json_integer_value(v);
    d->n_ids = json_array_size(list);
    return name_doc(d, e);
}

/* What tells documents apart: token ids if there are any, else the text. */
static int read_doc(const json_t *o, struct eval_doc *d, char key[70], struct larder_err *e)
{
    const json_t *ids = json_object_get(o, "prefix_ids");
    uint8_t digest[SHA256_LEN];
    const char *text = NULL;
    int rc;

    if (ids) {
        rc = take_ids(ids, "prefix_ids", KV_MAX_CTX, e);
        if (!rc)
            rc = fill_doc_ids(d, ids, e);
        if (!rc)
            sha256_of(d->ids, d->n_ids * sizeof *d->ids, digest);
    } else {
        rc = take_text(o, "document", &text, e);
        if (!rc && !text)
            rc = larder_fail(e, LARDER_EINVAL,
                             "the task has neither \"prefix_ids\" nor \"document\"");
        if (!rc && !(d->text = mem_strdup(text)))
            rc = larder_fail(e, LARDER_ENOMEM, "no memory for a document");
        if (!rc)
            sha256_of(text, strlen(text), digest);
    }
    if (rc)
        return rc;
    memcpy(key, ids ? "ids:" : "txt:", 4);
    sha256_hex(digest, key + 4);
    return 0;
}

static void doc_done(struct eval_doc *d)
{
    mem_free(d->ids);
    mem_free(d->text);
}

static int add_doc(struct reading *r, const char *key, struct eval_doc *d, size_t *ret,
                   struct larder_err *e)
{
    struct eval_doc *more = mem_grow(r->s->doc, r->s->n_docs + 1, sizeof *more);

    if (more)
        r->s->doc = more;
    if (!more || json_object_set_new(r->docs, key, json_integer((json_int_t)r->s->n_docs)))
        return larder_fail(e, LARDER_ENOMEM, "no memory for the documents");
    *ret = r->s->n_docs;
    r->s->doc[r->s->n_docs++] = *d;
    *d = (struct eval_doc){0}; /* moved */
    return 0;
}

/* The place of the line's document; *ret_past: it is one too many. */
static int find_doc(struct reading *r, json_t *o, size_t *ret, bool *ret_past, struct larder_err *e)
{
    struct eval_doc d = {0};
    const json_t *known;
    char key[70];
    int rc = read_doc(o, &d, key, e);

    if (!rc && (known = json_object_get(r->docs, key)))
        *ret = (size_t)json_integer_value(known);
    else if (!rc && r->limit && r->s->n_docs == r->limit)
        *ret_past = true;
    else if (!rc)
        rc = add_doc(r, key, &d, ret, e);
    doc_done(&d);
    json_object_del(o, "prefix_ids"); /* the document is kept once */
    json_object_del(o, "document");
    return rc;
}

/* ---- lines */

static int keep_task(struct reading *r, const struct eval_task *t, struct larder_err *e)
{
    struct eval_task *more;

    if (r->s->n_tasks == MAX_TASKS)
        return larder_fail(e, LARDER_ETOOBIG, "more than %u tasks", MAX_TASKS);
    more = mem_grow(r->s->task, r->s->n_tasks + 1, sizeof *more);
    if (!more)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the tasks");
    r->s->task = more;
    r->s->task[r->s->n_tasks++] = *t;
    return 0;
}

static int read_line(struct reading *r, const char *line, size_t len, struct larder_err *e)
{
    struct eval_task t = {.line = r->line};
    json_error_t why;
    bool past = false;
    int rc;

    t.o = json_loadb(line, len, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(t.o)) {
        rc = larder_fail(e, LARDER_EINVAL, "no JSON object%s%s", t.o ? "" : ": ",
                         t.o ? "" : why.text);
        json_decref(t.o);
        return rc;
    }
    rc = check_id(r, &t, e);
    if (!rc)
        rc = check_gold(t.o, e);
    if (!rc)
        rc = check_question(t.o, e);
    if (!rc)
        rc = check_rest(t.o, e);
    if (!rc)
        rc = find_doc(r, t.o, &t.doc, &past, e);
    if (!rc && !past)
        rc = keep_task(r, &t, e);
    if (rc || past)
        json_decref(t.o);
    return rc;
}

static int by_document(const void *a, const void *b)
{
    const struct eval_task *x = a, *y = b;

    if (x->doc != y->doc)
        return x->doc < y->doc ? -1 : 1;
    return (x->line > y->line) - (x->line < y->line);
}

static void group(struct eval_set *s)
{
    qsort(s->task, s->n_tasks, sizeof *s->task, by_document);
    for (size_t i = s->n_tasks; i-- > 0;) {
        s->doc[s->task[i].doc].first = i;
        s->doc[s->task[i].doc].n_tasks++;
    }
}

static bool is_blank(const char *p, size_t n)
{
    while (n && (*p == ' ' || *p == '\t' || *p == '\r')) {
        p++;
        n--;
    }
    return !n;
}

static int read_lines(struct reading *r, const char *name, const char *text, size_t len,
                      struct larder_err *e)
{
    const char *end = text + len;
    int rc = 0;

    for (const char *p = text; !rc && p < end;) {
        const char *nl = memchr(p, '\n', (size_t)(end - p));
        size_t n = (size_t)((nl ? nl : end) - p);

        r->line++;
        if (!is_blank(p, n)) /* blank lines are no tasks */
            rc = read_line(r, p, n, e);
        if (rc)
            larder_fail_in(e, rc, "%.200s, line %u", name, r->line);
        p += n + 1;
    }
    if (!rc && !r->s->n_tasks)
        rc = larder_fail(e, LARDER_EEMPTY, "%.200s has no tasks", name);
    return rc;
}

int eval_set_parse(struct eval_set *s, const char *name, const char *text, size_t len, size_t limit,
                   struct larder_err *e)
{
    struct reading r = {.s = s, .docs = json_object(), .ids = json_object(), .limit = limit};
    int rc = r.docs && r.ids ? read_lines(&r, name, text, len, e)
                             : larder_fail(e, LARDER_ENOMEM, "no memory for the tasks");

    json_decref(r.docs);
    json_decref(r.ids);
    if (!rc)
        group(s);
    return rc;
}

int eval_set_read(struct eval_set *s, const char *path, size_t limit, struct larder_err *e)
{
    char *text = NULL;
    size_t len = 0;
    int rc = cli_read_file(path, &text, &len, e);

    if (!rc)
        rc = eval_set_parse(s, path, text, len, limit, e);
    mem_free(text);
    return rc;
}

void eval_set_done(struct eval_set *s)
{
    for (size_t i = 0; i < s->n_docs; i++)
        doc_done(&s->doc[i]);
    for (size_t i = 0; i < s->n_tasks; i++)
        json_decref(s->task[i].o);
    mem_free(s->doc);
    mem_free(s->task);
    mem_free(s->want);
    *s = (struct eval_set){0};
}

/* ---- texts become token ids */

static json_t *want_doc(const struct eval_doc *d)
{
    return d->ids ? NULL : json_pack("{s:s}", "document", d->text);
}

static json_t *want_tail(const json_t *o)
{
    json_t *j = json_object_get(o, "tail_ids")
                    ? NULL
                    : json_pack("{s:O}", "question", json_object_get(o, "question"));

    if (j && json_object_get(o, "answer_prefix"))
        json_object_set(j, "answer", json_object_get(o, "answer_prefix"));
    return j;
}

/* Several answers have no one sequence of tokens. A space stands before one, as after the answer's
 * beginning. */
static json_t *want_gold(const json_t *o)
{
    const json_t *gold = json_array_get(json_object_get(o, "gold"), 0);

    if (json_object_get(o, "gold_ids") || !json_is_true(json_object_get(o, "single")))
        return NULL;
    return json_pack("{s:s+}", "text", " ", json_string_value(gold));
}

/* Print one line, and remember what it is for. Steals j; NULL is nothing to tokenise. */
static void want(struct eval_set *s, FILE *f, json_t *j, int what, size_t at)
{
    if (!j)
        return;
    json_dumpf(j, f, JSON_COMPACT);
    fputc('\n', f);
    json_decref(j);
    s->want[s->n_wants].what = what;
    s->want[s->n_wants++].at = at;
}

char *eval_set_strings(struct eval_set *s)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);

    s->n_wants = s->n_got = 0;
    s->want = mem_grow(s->want, s->n_docs + 2 * s->n_tasks, sizeof *s->want);
    if (f && s->want) {
        for (size_t i = 0; i < s->n_docs; i++)
            want(s, f, want_doc(&s->doc[i]), EVAL_WANT_DOC, i);
        for (size_t i = 0; i < s->n_tasks; i++) {
            want(s, f, want_tail(s->task[i].o), EVAL_WANT_TAIL, i);
            want(s, f, want_gold(s->task[i].o), EVAL_WANT_GOLD, i);
        }
    }
    if (f)
        fclose(f);
    if (s->n_wants)
        return text;
    free(text);
    return NULL;
}

int eval_set_take(struct eval_set *s, const json_t *line, struct larder_err *e)
{
    json_t *ids = json_object_get(line, "ids");
    const struct eval_want *w = &s->want[s->n_got];
    int rc;

    if (s->n_got == s->n_wants)
        return larder_fail(e, LARDER_EWORKER, "the tokeniser answered more than it was asked");
    rc = take_ids(ids, "ids", w->what == EVAL_WANT_DOC ? KV_MAX_CTX : MAX_IDS, e);
    if (!rc && w->what == EVAL_WANT_DOC)
        rc = fill_doc_ids(&s->doc[w->at], ids, e);
    else if (!rc && json_object_set(s->task[w->at].o,
                                    w->what == EVAL_WANT_TAIL ? "tail_ids" : "gold_ids", ids))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for the questions");
    s->n_got++;
    return rc;
}

/* ---- what an answer is worth */

double eval_found(const struct eval_task *t, const char *text)
{
    const json_t *gold = json_object_get(t->o, "gold"), *one;
    size_t i, hits = 0;

    json_array_foreach (gold, i, one)
        hits += strcasestr(text, json_string_value(one)) != NULL;
    if (json_is_true(json_object_get(t->o, "any")))
        return hits > 0;
    return (double)hits / (double)json_array_size(gold);
}

bool eval_is_right(const struct eval_task *t, bool all_top1, const char *text)
{
    if (json_is_true(json_object_get(t->o, "single")))
        return all_top1;
    return eval_found(t, text) == 1;
}
