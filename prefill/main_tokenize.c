/* main_tokenize.c - larder-prefill tokenize: the token ids of texts.
 *
 * The one idea: an object's key says where its text stands (document, question, or text by
 * itself), so that whoever makes token files needs no template of his own. */
#include "main_common.h"

#include <stdio.h>
#include <string.h>

#include "mem.h"
#include "tokenizer.h"

struct ids {
    uint32_t *id; /* owned */
    size_t n;
};

static int print_ids(const struct ids *ids, bool json, struct larder_err *e)
{
    json_t *list;

    if (json) {
        list = json_array();
        for (size_t i = 0; i < ids->n; i++)
            json_array_append_new(list, json_integer(ids->id[i]));
        return json_print(json_pack("{sI so}", "n", (json_int_t)ids->n, "ids", list), e);
    }
    for (size_t i = 0; i < ids->n; i++)
        printf(i ? " %u" : "%u", ids->id[i]);
    return putchar('\n') == EOF || fflush(stdout)
               ? larder_fail(e, LARDER_EIO, "cannot write to standard output")
               : 0;
}

/* Goes on from what is there: an answer's beginning, from the turn that the question's tail
 * opened. */
static int append_text(const struct tokenizer *tok, const char *text, size_t len, struct ids *to,
                       struct larder_err *e)
{
    struct ids more = {0};
    uint32_t *grown;
    int rc =
        tokenizer_encode_after(tok, to->n ? tokenizer_before(tok, to->id, to->n) : BEFORE_NOTHING,
                               text, len, false, &more.id, &more.n, e);

    if (rc)
        return rc;
    grown = mem_grow(to->id, to->n + more.n + 1, sizeof *grown);
    if (grown) {
        if (more.n)
            memcpy(grown + to->n, more.id, more.n * sizeof *grown);
        to->id = grown;
        to->n += more.n;
    }
    mem_free(more.id);
    return grown ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for %zu tokens", to->n + more.n);
}

static int encode(const struct engine_setup *s, const json_t *o, struct ids *ret,
                  struct larder_err *e)
{
    const struct tokenizer *tok = model_tokenizer(s->model);
    json_t *document = json_object_get(o, "document"), *question = json_object_get(o, "question");
    json_t *text = json_object_get(o, "text"), *answer = json_object_get(o, "answer");
    size_t len;
    char *rendered = NULL;
    int rc;

    if (json_is_string(document) + json_is_string(question) + json_is_string(text) != 1 ||
        (answer && !(json_is_string(answer) && question)))
        return larder_fail(e, LARDER_EINVAL,
                           "a line is {\"document\": text}, {\"question\": text, "
                           "\"answer\": its beginning} or {\"text\": text}");
    if (text)
        return append_text(tok, json_string_value(text), json_string_length(text), ret, e);
    if (document) {
        rc = template_document(s->tmpl, tok, json_string_value(document),
                               json_string_length(document), &ret->id, &ret->n, &rendered, &len, e);
        mem_free(rendered);
        return rc;
    }
    rc = template_question(s->tmpl, tok, json_string_value(question), json_string_length(question),
                           &ret->id, &ret->n, e);
    if (!rc && answer)
        rc = append_text(tok, json_string_value(answer), json_string_length(answer), ret, e);
    return rc;
}

static int tokenize_strings(const struct engine_setup *s, const char *path, bool json,
                            struct larder_err *e)
{
    struct json_lines lines;
    json_t *o = NULL;
    int rc = json_lines_open(&lines, path, e);

    while (!rc && !(rc = json_lines_next(&lines, &o, e)) && o) {
        struct ids ids = {0};

        rc = encode(s, o, &ids, e);
        if (rc)
            larder_fail_in(e, rc, "%.200s, line %u", path, lines.line);
        else
            rc = print_ids(&ids, json, e);
        mem_free(ids.id);
        json_decref(o);
    }
    json_lines_done(&lines);
    return rc;
}

static int tokenize_file(const struct engine_setup *s, const char *path, bool json,
                         struct larder_err *e)
{
    struct document d = {0};
    struct ids ids;
    int rc = document_read(s, path, NULL, &d, e);

    if (rc)
        return rc;
    ids = (struct ids){d.ids, d.n};
    rc = print_ids(&ids, json, e);
    document_done(&d);
    return rc;
}

int main_tokenize(const struct options *o, struct larder_err *e)
{
    const char *file = option_get(o, OPTION_FILE), *strings = option_get(o, OPTION_STRINGS);
    struct engine_setup s = {0}; /* without a backend */
    int rc;

    if (o->n[OPTION_MODEL] != 1 || !file == !strings || o->n_args)
        return main_usage(e, "tokenize needs one --model and one of --file and --strings");
    rc = model_open(&s.model, option_get(o, OPTION_MODEL), e);
    if (!rc)
        rc = setup_template(s.model, option_get(o, OPTION_TEMPLATE), &s.tmpl, e);
    if (!rc)
        rc = file ? tokenize_file(&s, file, o->n[OPTION_JSON], e)
                  : tokenize_strings(&s, strings, o->n[OPTION_JSON], e);
    setup_done(&s);
    return rc;
}
