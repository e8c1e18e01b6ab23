/* test_prefill_golden_text.c - tokenizer and templates against recorded cases of the real model. */
#include "testlib.h"

#include <jansson.h>

#include "model.h"
#include "template.h"
#include "tokenizer.h"

static struct model *model; /* NULL: the model is not installed */
static struct template *smollm2;

static int open_model(void **state)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char *path = NULL;
    struct larder_err e;

    (void)state;
    if (asprintf(&path, "%s%s/larder/SmolLM2-135M-Instruct.Q4_1.gguf",
                 cache  ? cache
                 : home ? home
                        : "",
                 cache ? "" : "/.cache") < 0)
        return -1;
    if (access(path, R_OK) == 0 && model_open(&model, path, &e))
        fprintf(stderr, "%s\n", e.msg);
    free(path);
    return template_open(&smollm2, "smollm2", &e);
}

static int close_model(void **state)
{
    (void)state;
    model_close(model);
    template_free(smollm2);
    return 0;
}

static void expect_ids(const uint32_t *ids, size_t n, const json_t *want)
{
    assert_int_equal(n, json_array_size(want));
    for (size_t i = 0; i < n; i++)
        assert_int_equal(ids[i], json_integer_value(json_array_get(want, i)));
}

static void encode_and_expect(const char *text, size_t len, bool special, const json_t *want)
{
    struct larder_err e;
    uint32_t *ids;
    size_t n;

    assert_int_equal(tokenizer_encode(model_tokenizer(model), text, len, special, &ids, &n, &e), 0);
    expect_ids(ids, n, want);
    mem_free(ids);
}

/* The pieces of `ids`, joined, spell the text again. */
static void expect_spelling(const json_t *ids, const char *text, size_t len)
{
    size_t at = 0;

    for (size_t i = 0; i < json_array_size(ids); i++) {
        size_t n;
        const char *p = tokenizer_piece(model_tokenizer(model),
                                        (uint32_t)json_integer_value(json_array_get(ids, i)), &n);

        assert_non_null(p);
        assert_true(at + n <= len);
        assert_memory_equal(p, text + at, n);
        at += n;
    }
    assert_int_equal(at, len);
}

/* Calls fn for each line of a JSONL file; returns the number of lines. */
static int each_line(const char *path, void (*fn)(json_t *))
{
    FILE *f = fopen(path, "r");
    char *line = NULL;
    size_t cap = 0;
    int n = 0;

    assert_non_null(f);
    while (getline(&line, &cap, f) > 0) {
        json_t *j = json_loads(line, JSON_ALLOW_NUL, NULL);

        assert_non_null(j);
        fn(j);
        json_decref(j);
        n++;
    }
    free(line);
    fclose(f);
    return n;
}

static void one_string(json_t *j)
{
    const json_t *text = json_object_get(j, "text"), *ids = json_object_get(j, "ids");
    const json_t *plain = json_object_get(j, "ids_nospecial");
    const char *p = json_string_value(text);
    size_t len = json_string_length(text);

    encode_and_expect(p, len, true, ids);
    encode_and_expect(p, len, false, plain ? plain : ids);
    expect_spelling(ids, p, len);
}

static void tokenizer_agrees_with_every_recorded_string(void **state)
{
    (void)state;
    if (!model)
        skip();
    assert_int_equal(each_line("tests/golden/data/tokenizer.jsonl", one_string), 263);
}

static void one_conversation(json_t *j)
{
    const json_t *messages = json_object_get(j, "messages"), *want = json_object_get(j, "rendered");
    struct chat_message msg[8];
    struct larder_err e;
    char *text;
    size_t len, n = json_array_size(messages);

    assert_true(n <= 8);
    for (size_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(messages, i);

        msg[i] = (struct chat_message){json_string_value(json_object_get(m, "role")),
                                       json_string_value(json_object_get(m, "content"))};
    }
    assert_int_equal(template_chat(smollm2, msg, n,
                                   json_is_true(json_object_get(j, "add_generation_prompt")), &text,
                                   &len, &e),
                     0);
    assert_int_equal(len, json_string_length(want));
    assert_memory_equal(text, json_string_value(want), len);
    encode_and_expect(text, len, true, json_object_get(j, "ids"));
    mem_free(text);
}

static void conversations_render_and_tokenise_as_recorded(void **state)
{
    (void)state;
    if (!model)
        skip();
    assert_string_equal(model_template_name(model), "smollm2");
    assert_int_equal(each_line("tests/golden/data/chat.jsonl", one_conversation), 3);
}

static void one_task(json_t *j)
{
    const struct template *t = smollm2;
    const json_t *doc = json_object_get(j, "document"), *ask = json_object_get(j, "question");
    const json_t *tail = json_object_get(j, "tail_ids");
    struct larder_err e;
    uint32_t *ids;
    size_t n, len;
    char *text;

    assert_int_equal(template_document(t, model_tokenizer(model), json_string_value(doc),
                                       json_string_length(doc), &ids, &n, &text, &len, &e),
                     0);
    expect_ids(ids, n, json_object_get(j, "prefix_ids"));
    mem_free(ids);
    mem_free(text);
    assert_int_equal(template_question(t, model_tokenizer(model), json_string_value(ask),
                                       json_string_length(ask), &ids, &n, &e),
                     0);
    assert_true(n <=
                json_array_size(tail)); /* the task's tail goes on with the answer's beginning */
    for (size_t i = 0; i < n; i++)
        assert_int_equal(ids[i], json_integer_value(json_array_get(tail, i)));
    mem_free(ids);
}

static void documents_and_questions_tokenise_as_the_tasks_do(void **state)
{
    (void)state;
    if (!model || access("../shared/tasks/public_tasks.jsonl", R_OK))
        skip();
    assert_int_equal(each_line("../shared/tasks/public_tasks.jsonl", one_task), 60);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokenizer_agrees_with_every_recorded_string),
        cmocka_unit_test(conversations_render_and_tokenise_as_recorded),
        cmocka_unit_test(documents_and_questions_tokenise_as_the_tasks_do),
    };

    return cmocka_run_group_tests_name("recorded text", tests, open_model, close_model);
}
