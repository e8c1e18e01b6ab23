/* test_prefill_tokenizers.c - token ids against frozen answers of the reference tokenizers, and
 * files that must be refused.
 *
 * Made by tests/tokenizers/check.py --freeze; see tests/golden/data/README.md. */
#include "testlib.h"

#include <jansson.h>

#include "gguf.h"
#include "tokenizer_gguf.h"
#include "tokenizer_json.h"

#define DATA "tests/golden/data/tokenizers/"
#define N_STRINGS 160

static struct tokenizer *open_file(const char *name, bool gguf)
{
    struct tokenizer *t = NULL;
    struct gguf *g = NULL;
    struct larder_err e = {0};
    char path[200];
    int rc;

    snprintf(path, sizeof path, DATA "%s.%s", name, gguf ? "gguf" : "json");
    if (gguf) {
        rc = gguf_open(&g, path, &e);
        if (!rc)
            rc = tokenizer_from_gguf(&t, g, 0, &e);
        gguf_close(g);
    } else {
        rc = tokenizer_from_json(&t, path, &e);
    }
    if (rc)
        fail_msg("%s", e.msg);
    return t;
}

static void expect_line(const struct tokenizer *t, const json_t *line)
{
    const json_t *text = json_object_get(line, "text"), *want = json_object_get(line, "ids");
    struct larder_err e;
    uint32_t *ids;
    size_t n;

    assert_non_null(text);
    assert_int_equal(tokenizer_encode(t, json_string_value(text), json_string_length(text),
                                      json_is_true(json_object_get(line, "special")), &ids, &n, &e),
                     0);
    if (n != json_array_size(want))
        fail_msg("%zu tokens for '%s'", n, json_string_value(text));
    for (size_t i = 0; i < n; i++)
        assert_int_equal(ids[i], json_integer_value(json_array_get(want, i)));
    mem_free(ids);
}

/* Every frozen string of a family; the vocabulary may come from another file. */
static void expect_family(const char *strings, const char *vocabulary, bool gguf)
{
    struct tokenizer *t = open_file(vocabulary, gguf);
    char path[200], *line = NULL;
    size_t cap = 0;
    int n = 0;
    FILE *f;

    snprintf(path, sizeof path, DATA "%s.jsonl", strings);
    f = fopen(path, "r");
    assert_non_null(f);
    while (getline(&line, &cap, f) > 0) {
        json_t *j = json_loads(line, JSON_ALLOW_NUL, NULL);

        assert_non_null(j);
        expect_line(t, j);
        json_decref(j);
        n++;
    }
    assert_int_equal(n, N_STRINGS);
    free(line);
    fclose(f);
    tokenizer_free(t);
}

static void byte_level_families_agree_with_the_reference(void **state)
{
    static const char *const name[] = {"gpt2", "llama3", "qwen2", "smollm", "digit-runs", "added"};

    (void)state;
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++)
        expect_family(name[i], name[i], false);
}

static void byte_fallback_families_agree_with_the_reference(void **state)
{
    static const char *const name[] = {"llama2",    "mistral",         "phi3",
                                       "metaspace", "metaspace-never", "prepend-added"};

    (void)state;
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++)
        expect_family(name[i], name[i], false);
}

static void a_vocabulary_in_gguf_gives_the_same_ids(void **state)
{
    (void)state;
    expect_family("llama3", "llama3", true);
}

static void scores_in_gguf_agree_with_sentencepiece(void **state)
{
    (void)state;
    expect_family("llama", "llama", true);
}

/* ---- continuing a text, BOS */

/* What the tokens of a text spell, joined. */
static void expect_spelled(const struct tokenizer *t, enum tokenizer_before before,
                           const char *text, const char *want)
{
    struct larder_err e;
    char got[200] = "";
    uint32_t *ids;
    size_t n;

    assert_int_equal(tokenizer_encode_after(t, before, text, strlen(text), true, &ids, &n, &e), 0);
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *p = tokenizer_piece(t, ids[i], &len);

        snprintf(got + strlen(got), sizeof got - strlen(got), "%.*s", (int)len, p);
    }
    assert_string_equal(got, want);
    mem_free(ids);
}

static void a_text_that_goes_on_gets_no_space_before_it(void **state)
{
    struct tokenizer *always = open_file("llama2", false), *first = open_file("mistral", false);

    (void)state;
    expect_spelled(always, BEFORE_NOTHING, "%", " %");
    expect_spelled(always, BEFORE_ADDED, "%", " %");
    expect_spelled(always, BEFORE_TEXT, "%", "%");
    expect_spelled(first, BEFORE_NOTHING, "%", " %");
    expect_spelled(first, BEFORE_ADDED, "%", "%");
    expect_spelled(first, BEFORE_TEXT, "%", "%");
    expect_spelled(always, BEFORE_TEXT, "%<s>%", "%<s> %");
    tokenizer_free(always);
    tokenizer_free(first);
}

static void bos_is_what_the_file_puts_first(void **state)
{
    struct tokenizer *t = open_file("llama3", false), *g = open_file("llama3", true);
    struct tokenizer *none = open_file("qwen2", false);
    struct larder_err e;
    size_t len;

    (void)state;
    assert_true(tokenizer_adds_bos(t));
    assert_memory_equal(tokenizer_piece(t, (uint32_t)tokenizer_bos(t), &len), "<|begin_of_text|>",
                        17);
    assert_true(tokenizer_adds_bos(g));
    assert_int_equal(tokenizer_bos(g), tokenizer_bos(t));
    assert_false(tokenizer_adds_bos(none));
    assert_int_equal(tokenizer_bos(none), -1);
    assert_int_equal(tokenizer_set_eos(none, 3, &e), 0);
    assert_int_equal(tokenizer_eos(none), 3);
    assert_int_equal(tokenizer_set_eos(none, 1 << 20, &e), LARDER_EMODEL);
    tokenizer_free(t);
    tokenizer_free(g);
    tokenizer_free(none);
}

/* ---- refusals: small files, each with one thing in it that is not supported or wrong */

#define MODEL(more) "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]" more "}"
#define BYTES "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"

static const struct {
    const char *json;
    int code;
    const char *names; /* what the message must hold */
} refused[] = {
    {"{", LARDER_EMODEL, "line 1"},
    {"[]", LARDER_EMODEL, "no tokenizer model"},
    {"{\"model\":{},\"model\":{}}", LARDER_EMODEL, "line 1"},
    {"{\"model\":{\"type\":\"Unigram\"}}", LARDER_EUNSUPPORTED, "Unigram"},
    {"{" BYTES MODEL(",\"dropout\":0.1") "}", LARDER_EUNSUPPORTED, "dropout"},
    {"{" BYTES MODEL(",\"end_of_word_suffix\":\"</w>\"") "}", LARDER_EUNSUPPORTED, "end_of_word"},
    {"{" BYTES MODEL(",\"unk_token\":\"a\"") "}", LARDER_EUNSUPPORTED, "0x00"},
    {"{" BYTES MODEL(",\"ignore_merges\":1") "}", LARDER_EMODEL, "ignore_merges"},
    {"{" MODEL("") "}", LARDER_EUNSUPPORTED, "ByteLevel"},
    {"{\"pre_tokenizer\":{\"type\":\"ByteLevel\"}," MODEL("") "}", LARDER_EUNSUPPORTED,
     "add_prefix_space"},
    {"{\"pre_tokenizer\":{\"type\":\"Whitespace\"}," MODEL("") "}", LARDER_EUNSUPPORTED,
     "Whitespace"},
    {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a+)+b\"}}," MODEL("") "}",
     LARDER_EUNSUPPORTED, "(a+)+b"},
    {"{\"normalizer\":{\"type\":\"Lowercase\"}," BYTES MODEL("") "}", LARDER_EUNSUPPORTED,
     "Lowercase"},
    {"{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Sequence\"}]}," BYTES
         MODEL("") "}",
     LARDER_EUNSUPPORTED, "Sequence"},
    {"{\"post_processor\":{\"type\":\"BertProcessing\"}," BYTES MODEL("") "}", LARDER_EUNSUPPORTED,
     "BertProcessing"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", LARDER_EMODEL,
     "'a'"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":4194304},\"merges\":[]}}",
     LARDER_EMODEL, "4194304"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}",
     LARDER_EMODEL, "token 0 is both"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a b\":0},\"merges\":[]}}", LARDER_EMODEL,
     "byte-level alphabet"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a a\"]}}",
     LARDER_EMODEL, "merge 0"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"aa\":1},"
     "\"merges\":[\"a a\",[\"a\",\"a\"]]}}",
     LARDER_EMODEL, "repeats"},
    {"{" BYTES "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}}",
     LARDER_EMODEL, "merge 0"},
    {"{\"added_tokens\":[{\"id\":1,\"content\":\"a\"}]," BYTES MODEL("") "}", LARDER_EMODEL, "'a'"},
    {"{\"added_tokens\":[{\"id\":1}]," BYTES MODEL("") "}", LARDER_EMODEL, "no content"},
    {"{\"added_tokens\":{}," BYTES MODEL("") "}", LARDER_EMODEL, "not a list"},
    {"{\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\"}," MODEL(
         ",\"byte_fallback\":true") "}",
     LARDER_EUNSUPPORTED, "U+2581"},
};

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
    assert_int_equal(fclose(f), 0);
}

static void what_is_not_supported_is_named(void **state)
{
    char path[] = "/tmp/larder-tokenizer.XXXXXX";
    int fd = mkstemp(path);

    (void)state;
    assert_true(fd >= 0);
    close(fd);
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        struct tokenizer *t = NULL;
        struct larder_err e = {0};

        write_text(path, refused[i].json);
        if (tokenizer_from_json(&t, path, &e) != refused[i].code || t ||
            !strstr(e.msg, refused[i].names))
            fail_msg("case %zu: %d %s", i, e.code, e.msg);
    }
    unlink(path);
}

static void what_is_no_file_is_refused(void **state)
{
    struct tokenizer *t = NULL;
    struct larder_err e;

    (void)state;
    assert_int_equal(tokenizer_from_json(&t, DATA, &e), LARDER_EIO);
    assert_int_equal(tokenizer_from_json(&t, DATA "none.json", &e), LARDER_EIO);
    assert_null(t);
}

/* ---- memory, cut files */

static int left;

static bool some(void *arg)
{
    (void)arg;
    return left-- > 0;
}

static void every_failed_allocation_is_reported(void **state)
{
    static const char text[] = "<s> a text, <|x|> 12345 \xcc\x81";
    int n = 0, rc;

    (void)state;
    do {
        struct tokenizer *t = NULL;
        struct larder_err e;
        uint32_t *ids = NULL;
        size_t n_ids;

        left = n++;
        mem_set_hook(some, NULL);
        rc = tokenizer_from_json(&t, DATA "prepend-added.json", &e);
        if (!rc)
            rc = tokenizer_encode(t, text, sizeof text - 1, true, &ids, &n_ids, &e);
        mem_set_hook(NULL, NULL);
        assert_true(rc == 0 || rc == LARDER_ENOMEM);
        mem_free(ids);
        tokenizer_free(t);
    } while (rc);
    assert_true(n > 20);
}

/* A file that was cut off anywhere, or has a byte changed, is a tokenizer or is refused. */
static void damaged_files_are_read_safely(void **state)
{
    char path[] = "/tmp/larder-tokenizer.XXXXXX", *whole = NULL;
    int fd = mkstemp(path), refusals = 0;
    FILE *f = fopen(DATA "phi3.json", "r");
    size_t cap = 0;
    ssize_t len;

    (void)state;
    assert_true(fd >= 0 && f);
    close(fd);
    len = getdelim(&whole, &cap, EOF, f);
    assert_true(len > 0);
    for (ssize_t at = 1; at < len; at += 61) {
        struct tokenizer *t = NULL;
        struct larder_err e;
        char kept = whole[at];

        whole[at] = at % 2 ? '\0' : (char)("{}[],:\"0\\9"[at / 2 % 10]);
        write_text(path, whole);
        whole[at] = kept;
        refusals += tokenizer_from_json(&t, path, &e) != 0;
        tokenizer_free(t);
    }
    assert_true(refusals > 20);
    unlink(path);
    free(whole);
    fclose(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(byte_level_families_agree_with_the_reference),
        cmocka_unit_test(byte_fallback_families_agree_with_the_reference),
        cmocka_unit_test(a_vocabulary_in_gguf_gives_the_same_ids),
        cmocka_unit_test(scores_in_gguf_agree_with_sentencepiece),
        cmocka_unit_test(a_text_that_goes_on_gets_no_space_before_it),
        cmocka_unit_test(bos_is_what_the_file_puts_first),
        cmocka_unit_test(what_is_not_supported_is_named),
        cmocka_unit_test(what_is_no_file_is_refused),
        cmocka_unit_test(every_failed_allocation_is_reported),
        cmocka_unit_test(damaged_files_are_read_safely),
    };

    return cmocka_run_group_tests_name("tokenizers", tests, NULL, NULL);
}
