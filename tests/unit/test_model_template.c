/* test_prefill_template.c - templates against what Jinja renders, and the ids at their seams. */
#include "testlib.h"

#include <jansson.h>

#include "geom.h"
#include "sha256.h"
#include "template.h"
#include "template_form.h"

#define META "\xe2\x96\x81" /* U+2581, which stands for a space */

static struct template *opened(const char *text)
{
    struct template *t = NULL;
    struct larder_err e;

    if (template_open(&t, text, &e))
        fail_msg("%s", e.msg);
    return t;
}

/* ---- rendered text */

static const char *content(const json_t *messages, size_t i)
{
    return json_string_value(json_object_get(json_array_get(messages, i), "content"));
}

static void chat_is(const struct template *t, const json_t *messages, const char *want)
{
    struct chat_message msg[8];
    size_t n = json_array_size(messages), len;
    struct larder_err e;
    char *text;

    assert_true(n <= 8);
    for (size_t i = 0; i < n; i++)
        msg[i] = (struct chat_message){
            json_string_value(json_object_get(json_array_get(messages, i), "role")),
            content(messages, i)};
    assert_int_equal(template_chat(t, msg, n, true, &text, &len, &e), 0);
    assert_int_equal(len, strlen(want));
    assert_memory_equal(text, want, len);
    mem_free(text);
}

/* Head, document, what is between, question and tail are one conversation's text. */
static void prompt_is(const char *template, const char *document, const char *question,
                      const char *want)
{
    struct template *t = opened(template);
    char *made = NULL;

    assert_true(asprintf(&made, "%s%s%s%s%s", t->doc_head, document, t->ask_head, question,
                         t->ask_tail) > 0);
    assert_string_equal(made, want);
    free(made);
    template_free(t);
}

static void one_conversation(json_t *o)
{
    const char *name = json_string_value(json_object_get(o, "template"));
    const json_t *jinja = json_object_get(o, "jinja"), *messages = json_object_get(o, "messages");
    const char *want = json_string_value(json_object_get(o, "rendered"));
    size_t n = json_array_size(messages);
    struct template *t = opened(name);
    char option[64];

    assert_string_equal(template_recognise(json_string_value(jinja), json_string_length(jinja)),
                        name);
    chat_is(t, messages, want);
    template_free(t);
    if (n == 1) { /* "What is larder?" as a document and a question */
        snprintf(option, sizeof option, "%s,suffix=\\s", name);
        prompt_is(option, "What", "is larder?", want);
        snprintf(option, sizeof option, "%s,prefix=What\\s,suffix=\\s", name);
        prompt_is(option, "is", "larder?", want);
    } else if (n == 2) {
        snprintf(option, sizeof option, "%s,turn=system", name);
        prompt_is(option, content(messages, 0), content(messages, 1), want);
    }
}

static void every_form_renders_as_its_published_template(void **state)
{
    FILE *f = fopen("tests/templates/rendered.jsonl", "r");
    char *line = NULL;
    size_t cap = 0;
    int n = 0;

    (void)state;
    assert_non_null(f);
    while (getline(&line, &cap, f) > 0) {
        json_t *o = json_loads(line, 0, NULL);

        assert_non_null(o);
        one_conversation(o);
        json_decref(o);
        n++;
    }
    free(line);
    fclose(f);
    assert_int_equal(n, 33);
}

static void other_templates_are_not_taken_for_ours(void **state)
{
    static const char *const other[] = {
        "",
        "{{ '<start_of_turn>' + message['role'] }}",
        "{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}",
        "{{ '<|user|>\n' + message['content'] + eos_token }}{{ '<|assistant|>' }}",
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}<|assistant|>",
        "{{ '[INST] ' }}{{ ' [/INST]' }}{{ '[SYSTEM_PROMPT]' }}",
        "{{ '[INST]' + message['content'] + '[/INST]' }}",
    };

    (void)state;
    for (size_t i = 0; i < sizeof other / sizeof other[0]; i++)
        assert_null(template_recognise(other[i], strlen(other[i])));
}

/* ---- strings and fingerprints */

static void expect_refused(const char *text, const char *says)
{
    struct template *t = NULL;
    struct larder_err e;

    assert_int_equal(template_open(&t, text, &e), LARDER_EINVAL);
    assert_non_null(strstr(e.msg, says));
    assert_null(t);
}

static void a_wrong_string_is_refused_with_the_reason(void **state)
{
    char longer[KV_MAX_TEMPLATE + 1];

    (void)state;
    expect_refused("", "no template is named ''");
    expect_refused("chatm", "smollm2, chatml");
    expect_refused("chatml,", "not ''");
    expect_refused("chatml,turn=assistant", "'turn=assistant'");
    expect_refused("chatml,turn=", "'turn='");
    expect_refused("chatml,prefix=a,prefix=b", "'prefix=b'");
    expect_refused("chatml,suffix=,suffix=", "'suffix='");
    expect_refused("chatml,prefix=a\nb", "control character");
    expect_refused("chatml,prefix=\\x", "backslash");
    expect_refused("chatml,prefix=\\", "backslash");
    expect_refused("plain,turn=system", "no system turn");
    memset(longer, 'a', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    expect_refused(longer, "at most 255");
}

static void texts_are_read_with_their_escapes(void **state)
{
    struct template *t = opened("chatml,suffix=\\,\\\\\\n,prefix=a=b\\t\\s,turn=user");

    (void)state;
    assert_string_equal(t->doc_head, "<|im_start|>user\na=b\t ");
    assert_string_equal(t->ask_head, ",\\\n");
    assert_string_equal(t->name, "chatml,suffix=\\,\\\\\\n,prefix=a=b\\t\\s,turn=user");
    template_free(t);
    t = opened("llama2,turn=system,suffix=end");
    assert_string_equal(t->doc_head, "<s>[INST] <<SYS>>\n");
    assert_string_equal(t->ask_head, "end\n<</SYS>>\n\n");
    template_free(t);
}

static void fingerprint(const char *text, char hex[65])
{
    struct template *t = opened(text);
    struct larder_err e;
    uint8_t fp[32];

    assert_int_equal(template_fingerprint(t, fp, &e), 0);
    sha256_hex(fp, hex);
    template_free(t);
}

/* Keys of stored entries depend on these. */
static void fingerprints_of_old_forms_never_change(void **state)
{
    static const char *const want[][2] = {
        {"smollm2", "d690d8770c5e9cf45e4cfc14aaa25036459c0c58b718bb5f77a6cdb58a74ac7c"},
        {"chatml", "5c6992f2fedeb8a85e4d2a6aa026c69c7445a35942849053f35abb32740bbd6e"},
        {"plain", "975d0a87367ceeed1095f05de2f9a3376f64f1d2989da67fdaa1eaccd299300a"},
    };
    char hex[65];

    (void)state;
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        fingerprint(want[i][0], hex);
        assert_string_equal(hex, want[i][1]);
    }
}

static void a_fingerprint_depends_on_all_that_is_rendered(void **state)
{
    static const char *const other[] = {"qwen,turn=system", "qwen,prefix=a", "qwen,suffix=a",
                                        "qwen2.5", "chatml"};
    char same[65], hex[65];

    (void)state;
    fingerprint("qwen", hex);
    fingerprint("qwen,suffix=\\n\\n,turn=user", same);
    assert_string_equal(hex, same);
    for (size_t i = 0; i < sizeof other / sizeof other[0]; i++) {
        fingerprint(other[i], same);
        assert_string_not_equal(hex, same);
    }
}

/* ---- seams */

enum { UNK, BOS, EOS, TURN, SPACE, A, SPACE_A, BYTES }; /* ids */

/* A SentencePiece-like vocabulary: bytes, a space, "a", and the two of them as one. */
static struct tokenizer *make_tokenizer(bool add_bos)
{
    static const char *const word[] = {"<unk>", "<s>", "</s>", "<|end|>", META, "a", META "a"};
    static char byte[256][8];
    const char *token[BYTES + 256], *merge = META " a";
    uint32_t len[BYTES + 256], merge_len = (uint32_t)strlen(merge);
    uint8_t literal[BYTES + 256] = {1, 1, 1, 1};
    struct tokenizer_added added[4];
    struct tokenizer *t = NULL;
    struct larder_err e;
    struct tokenizer_spec s = {.kind = TOKENIZER_MERGES,
                               .n_vocab = BYTES + 256,
                               .token = token,
                               .token_len = len,
                               .literal = literal,
                               .n_merges = 1,
                               .merge = &merge,
                               .merge_len = &merge_len,
                               .n_added = 4,
                               .added = added,
                               .bos = BOS,
                               .eos = EOS,
                               .add_bos = add_bos,
                               .prefix = PREFIX_ALWAYS,
                               .mark_first = true};

    for (uint32_t i = 0; i < BYTES + 256; i++) {
        if (i >= BYTES)
            snprintf(byte[i - BYTES], sizeof byte[0], "<0x%02X>", i - BYTES);
        token[i] = i < BYTES ? word[i] : byte[i - BYTES];
        len[i] = (uint32_t)strlen(token[i]);
    }
    for (uint32_t i = 0; i < 4; i++)
        added[i] =
            (struct tokenizer_added){.text = word[i], .len = len[i], .id = i, .special = true};
    if (tokenizer_new(&t, &s, &e))
        fail_msg("%s", e.msg);
    return t;
}

static void document_is(const char *template, bool add_bos, const char *doc, size_t n,
                        const uint32_t *want)
{
    struct tokenizer *tok = make_tokenizer(add_bos);
    struct template *t = opened(template);
    uint32_t *ids, *head;
    size_t got, n_head, len;
    struct larder_err e;
    char *text;

    assert_int_equal(template_document(t, tok, doc, strlen(doc), &ids, &got, &text, &len, &e), 0);
    assert_int_equal(len, strlen(t->doc_head) + strlen(doc));
    assert_memory_equal(text, t->doc_head, strlen(t->doc_head));
    assert_memory_equal(text + strlen(t->doc_head), doc, strlen(doc));
    assert_int_equal(got, n);
    assert_memory_equal(ids, want, n * sizeof *want);
    assert_int_equal(template_head(t, tok, &head, &n_head, &e), 0);
    assert_true(n_head < n);
    assert_memory_equal(ids, head, n_head * sizeof *ids);
    mem_free(head);
    mem_free(ids);
    mem_free(text);
    template_free(t);
    tokenizer_free(tok);
}

#define BYTE(c) (BYTES + (unsigned char)(c))

static void a_document_begins_with_one_bos(void **state)
{
    const uint32_t plain[] = {BOS, SPACE_A}, without[] = {SPACE_A};
    const uint32_t mistral[] = {BOS,       SPACE,     BYTE('['), BYTE('I'), BYTE('N'),
                                BYTE('S'), BYTE('T'), BYTE(']'), SPACE_A,   SPACE_A};

    (void)state;
    document_is("plain", true, "a", 2, plain);
    document_is("plain", false, "a", 1, without);
    document_is("mistral", true, "a a", 10, mistral);
    document_is("mistral", false, "a a", 10, mistral);
}

static void a_document_cannot_end_its_turn(void **state)
{
    const uint32_t text[] = {SPACE,     BYTE('<'), BYTE('|'), BYTE('e'),
                             BYTE('n'), BYTE('d'), BYTE('|'), BYTE('>')};

    (void)state;
    document_is("plain", false, "<|end|>", 8, text);
    document_is("plain,prefix=<|end|>", false, "a", 2, (const uint32_t[]){TURN, SPACE_A});
}

static void question_is(const char *template, size_t n, const uint32_t *want)
{
    struct tokenizer *tok = make_tokenizer(true);
    struct template *t = opened(template);
    struct larder_err e;
    uint32_t *ids;
    size_t got;

    assert_int_equal(template_question(t, tok, "a", 1, &ids, &got, &e), 0);
    assert_int_equal(got, n);
    assert_memory_equal(ids, want, n * sizeof *want);
    mem_free(ids);
    template_free(t);
    tokenizer_free(tok);
}

static void a_question_goes_on_from_the_document(void **state)
{
    (void)state;
    question_is("plain", 3, (const uint32_t[]){BYTE('\n'), BYTE('\n'), A});
    question_is("plain,suffix=\\s", 1, (const uint32_t[]){SPACE_A});
    /* behind an added token SentencePiece's space comes back */
    question_is("phi3,suffix=", 18,
                (const uint32_t[]){A, TURN, SPACE, BYTE('\n'), BYTE('<'), BYTE('|'), A, BYTE('s'),
                                   BYTE('s'), BYTE('i'), BYTE('s'), BYTE('t'), A, BYTE('n'),
                                   BYTE('t'), BYTE('|'), BYTE('>'), BYTE('\n')});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_form_renders_as_its_published_template),
        cmocka_unit_test(other_templates_are_not_taken_for_ours),
        cmocka_unit_test(a_wrong_string_is_refused_with_the_reason),
        cmocka_unit_test(texts_are_read_with_their_escapes),
        cmocka_unit_test(fingerprints_of_old_forms_never_change),
        cmocka_unit_test(a_fingerprint_depends_on_all_that_is_rendered),
        cmocka_unit_test(a_document_begins_with_one_bos),
        cmocka_unit_test(a_document_cannot_end_its_turn),
        cmocka_unit_test(a_question_goes_on_from_the_document),
    };

    return cmocka_run_group_tests_name("templates", tests, NULL, NULL);
}
