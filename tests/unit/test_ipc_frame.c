/* test_ipc_frame.c - frames, typed fields, error bodies, names. */
#include "testlib.h"

#include "bytes.h"
#include "frame.h"

/* jansson allocates through the hook too, so that a sweep reaches every allocation. */
static void *hooked_malloc(size_t n)
{
    return mem_alloc(n, 1);
}

static int setup(void **state)
{
    (void)state;
    json_set_alloc_funcs(hooked_malloc, mem_free);
    return 0;
}

/* A packet with any header and any body; the caller mem_free()s it. */
static uint8_t *raw(uint32_t magic, unsigned version, unsigned type, uint32_t body_len,
                    const char *body, size_t *ret_len)
{
    size_t n = strlen(body);
    uint8_t *p = mem_alloc(FRAME_HEADER_BYTES + n, 1);
    struct wr w = wr_init(p, FRAME_HEADER_BYTES + n);

    wr_u32(&w, magic);
    wr_u16(&w, (uint16_t)version);
    wr_u16(&w, (uint16_t)type);
    wr_u32(&w, 7);
    wr_u32(&w, body_len);
    wr_bytes(&w, body, n);
    assert_true(wr_ok(&w));
    *ret_len = FRAME_HEADER_BYTES + n;
    return p;
}

static int decode_raw(uint32_t magic, unsigned version, unsigned type, uint32_t body_len,
                      const char *body)
{
    struct frame f = {.body = NULL};
    size_t len = 0;
    uint8_t *p = raw(magic, version, type, body_len, body, &len);
    int rc = frame_decode(p, len, &f, NULL);

    json_decref(f.body);
    mem_free(p);
    return rc;
}

static int decode_body(const char *body)
{
    return decode_raw(FRAME_MAGIC, 1, FRAME_PUT, (uint32_t)strlen(body), body);
}

static void a_frame_survives_the_round_trip(void **state)
{
    json_t *body =
        json_pack("{s:s, s:I, s:[b,n]}", "name", "a/b", "n", (json_int_t)1 << 53, "l", 1);
    struct frame f = {.body = NULL};
    void *p = NULL;
    size_t len = 0;

    (void)state;
    assert_int_equal(frame_encode(FRAME_FETCH, 0xdeadbeef, body, &p, &len, NULL), 0);
    assert_memory_equal(p, "LRRD\1\0\10\0\xef\xbe\xad\xde", 12);
    assert_int_equal(frame_decode(p, len, &f, NULL), 0);
    assert_int_equal(f.type, FRAME_FETCH);
    assert_int_equal(f.seq, 0xdeadbeef);
    assert_true(json_equal(f.body, body));
    json_decref(f.body);
    mem_free(p);
    assert_int_equal(frame_encode(FRAME_STATUS, 1, NULL, &p, &len, NULL), 0);
    assert_int_equal(len, 18);
    mem_free(p);
    json_decref(body);
}

static void every_truncation_is_refused(void **state)
{
    struct frame f = {.body = NULL};
    size_t len = 0;
    const char *body = "{\"name\":\"x\",\"bytes\":12}";
    uint8_t *p = raw(FRAME_MAGIC, 1, FRAME_PUT, (uint32_t)strlen(body), body, &len);

    (void)state;
    for (size_t n = 0; n < len; n++) {
        /* An exact copy, so that a read past the end is seen by the sanitizer. */
        uint8_t *cut = mem_dup(p, n);

        assert_int_equal(frame_decode(cut, n, &f, NULL), LARDER_EPROTO);
        assert_null(f.body);
        mem_free(cut);
    }
    mem_free(p);
}

static void a_wrong_header_is_refused(void **state)
{
    (void)state;
    assert_int_equal(decode_raw(FRAME_MAGIC, 1, FRAME_PUT, 2, "{}"), 0);
    assert_int_equal(decode_raw(FRAME_MAGIC + 1, 1, FRAME_PUT, 2, "{}"), LARDER_EPROTO);
    assert_int_equal(decode_raw(0x4c525244, 1, FRAME_PUT, 2, "{}"), LARDER_EPROTO);
    assert_int_equal(decode_raw(FRAME_MAGIC, 0, FRAME_PUT, 2, "{}"), LARDER_EPROTO);
    assert_int_equal(decode_raw(FRAME_MAGIC, 2, FRAME_PUT, 2, "{}"), LARDER_EPROTO);
    assert_int_equal(decode_raw(FRAME_MAGIC, 65535, FRAME_PUT, 2, "{}"), LARDER_EPROTO);
    for (unsigned type = 0; type < 65536; type++) {
        int known = frame_type_name((int)type)[0] != '?';

        assert_int_equal(decode_raw(FRAME_MAGIC, 1, type, 2, "{}"), known ? 0 : LARDER_EPROTO);
    }
}

static void a_wrong_length_is_refused(void **state)
{
    static const uint32_t len[] = {0, 1, 3, 65535, 1u << 31, UINT32_MAX};

    (void)state;
    for (size_t i = 0; i < sizeof len / sizeof *len; i++)
        assert_true(decode_raw(FRAME_MAGIC, 1, FRAME_PUT, len[i], "{}") < 0);
    assert_int_equal(decode_raw(FRAME_MAGIC, 1, FRAME_PUT, FRAME_MAX_BODY + 1, "{}"),
                     LARDER_ETOOBIG);
}

static void a_body_that_is_no_plain_object_is_refused(void **state)
{
    static const char *const bad[] = {
        "",
        "[]",
        "1",
        "null",
        "\"x\"",
        "{",
        "{}x",
        "{}{}",
        "{\"a\":1,}",
        "{'a':1}",
        "{\"a\":01}",
        "{\"a\"}",
        "{a:1}",
        "{\"a\":1e999}",
        "{\"a\":\"\\u0000\"}",
        "{\"a\":1,\"a\":2}",
        "{\"a\":{\"b\":1,\"b\":1}}",
        "{\"a\":\"\xff\"}",
        "{\"a\":\"\xed\xa0\x80\"}",
        "{\"a\":99999999999999999999}",
    };

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(decode_body(bad[i]), LARDER_EPROTO);
    assert_int_equal(decode_body(" { } "), 0);
}

static void nest(char *out, const char *open, const char *inner, const char *close_, int depth)
{
    *out = '\0';
    for (int i = 0; i < depth; i++)
        strcat(out, open);
    strcat(out, inner);
    for (int i = 0; i < depth; i++)
        strcat(out, close_);
}

static void nesting_beyond_sixteen_is_refused(void **state)
{
    static char text[65536];

    (void)state;
    nest(text, "{\"a\":", "1", "}", 16);
    assert_int_equal(decode_body(text), 0);
    nest(text, "{\"a\":", "1", "}", 17);
    assert_int_equal(decode_body(text), LARDER_EPROTO);
    nest(text, "{\"a\":", "1", "}", 9000);
    assert_int_equal(decode_body(text), LARDER_EPROTO);
    memset(text, '[', sizeof text - 17);
    text[sizeof text - 17] = '\0';
    assert_int_equal(decode_body(text), LARDER_EPROTO);
    /* Brackets in strings do not nest, and an escaped quote does not end one. */
    assert_int_equal(decode_body("{\"a\":\"[[[[[[[[[[[[[[[[[[[[\\\"[[[[[[[[\"}"), 0);
}

static void a_body_over_the_limit_is_refused_before_it_is_sent(void **state)
{
    static char text[FRAME_MAX_BODY];
    json_t *body = json_object();
    void *p = NULL;
    size_t len = 0;

    (void)state;
    memset(text, 'x', sizeof text - 1);
    text[FRAME_MAX_BODY - 8] = '\0'; /* {"t":"..."} has 8 bytes beside the text */
    json_object_set_new(body, "t", json_string(text));
    assert_int_equal(frame_encode(FRAME_OK, 1, body, &p, &len, NULL), 0);
    assert_int_equal(len, FRAME_MAX_BYTES);
    mem_free(p);
    p = NULL;
    text[FRAME_MAX_BODY - 8] = 'x';
    text[FRAME_MAX_BODY - 7] = '\0';
    json_object_set_new(body, "t", json_string(text));
    assert_int_equal(frame_encode(FRAME_OK, 1, body, &p, &len, NULL), LARDER_ETOOBIG);
    assert_null(p);
    json_decref(body);
}

static void any_changed_byte_is_refused_or_decodes(void **state)
{
    const char *body = "{\"name\":\"x\",\"bytes\":12}";
    size_t len = 0;
    uint8_t *p = raw(FRAME_MAGIC, 1, FRAME_PUT, (uint32_t)strlen(body), body, &len);

    (void)state;
    for (size_t i = 0; i < len; i++)
        for (unsigned v = 0; v < 256; v++) {
            struct frame f = {.body = NULL};
            uint8_t was = p[i];
            int rc;

            p[i] = (uint8_t)v;
            rc = frame_decode(p, len, &f, NULL);
            assert_true(rc == 0 ? json_is_object(f.body) : f.body == NULL);
            json_decref(f.body);
            p[i] = was;
        }
    mem_free(p);
}

static void fields_are_typed_and_bounded(void **state)
{
    json_t *b =
        json_pack("{s:s, s:i, s:I, s:b, s:f, s:n, s:[i,i], s:i}", "s", "text", "n", 7, "big",
                  ((json_int_t)1 << 53) + 1, "b", 1, "f", 1.0, "null", "a", 1, 2, "neg", -1);
    struct larder_err e = {0, ""};
    const char *s = "kept";
    const json_t *a = NULL;
    uint64_t u = 99;
    uint32_t u32 = 99;
    int64_t i = 99;
    bool t = false;

    (void)state;
    assert_int_equal(field_str(b, "s", FIELD_REQUIRED, 4, &s, NULL), 0);
    assert_string_equal(s, "text");
    assert_int_equal(field_str(b, "s", FIELD_REQUIRED, 3, &s, NULL), LARDER_EPROTO);
    assert_int_equal(field_str(b, "n", FIELD_OPTIONAL, 9, &s, NULL), LARDER_EPROTO);
    assert_int_equal(field_str(b, "none", FIELD_REQUIRED, 9, &s, &e), LARDER_EPROTO);
    assert_non_null(strstr(e.msg, "'none'"));
    assert_int_equal(field_str(b, "none", FIELD_OPTIONAL, 9, &s, NULL), 0);
    assert_string_equal(s, "text");
    assert_int_equal(field_u64(b, "neg", FIELD_REQUIRED, UINT64_MAX, &u, NULL), LARDER_EPROTO);
    assert_int_equal(field_u64(b, "big", FIELD_REQUIRED, UINT64_MAX, &u, NULL), LARDER_EPROTO);
    assert_int_equal(field_u64(b, "n", FIELD_REQUIRED, 6, &u, NULL), LARDER_EPROTO);
    assert_int_equal(field_u64(b, "f", FIELD_REQUIRED, 6, &u, NULL), LARDER_EPROTO);
    assert_int_equal(field_u64(b, "none", FIELD_OPTIONAL, 6, &u, NULL), 0);
    assert_int_equal(u, 99);
    assert_int_equal(field_u64(b, "n", FIELD_REQUIRED, 7, &u, NULL), 0);
    assert_int_equal(u, 7);
    assert_int_equal(field_u32(b, "n", FIELD_REQUIRED, UINT32_MAX, &u32, NULL), 0);
    assert_int_equal(u32, 7);
    assert_int_equal(field_i64(b, "neg", FIELD_REQUIRED, &i, NULL), 0);
    assert_int_equal(i, -1);
    assert_int_equal(field_i64(b, "big", FIELD_REQUIRED, &i, NULL), LARDER_EPROTO);
    assert_int_equal(field_i64(b, "null", FIELD_OPTIONAL, &i, NULL), LARDER_EPROTO);
    assert_int_equal(field_bool(b, "b", FIELD_REQUIRED, &t, NULL), 0);
    assert_true(t);
    assert_int_equal(field_bool(b, "n", FIELD_REQUIRED, &t, NULL), LARDER_EPROTO);
    assert_int_equal(field_array(b, "a", FIELD_REQUIRED, 2, &a, NULL), 0);
    assert_int_equal(json_array_size(a), 2);
    assert_int_equal(field_array(b, "a", FIELD_REQUIRED, 1, &a, NULL), LARDER_EPROTO);
    assert_int_equal(field_array(b, "s", FIELD_REQUIRED, 9, &a, NULL), LARDER_EPROTO);
    json_decref(b);
}

static void a_key_is_64_lower_case_hex_digits(void **state)
{
    static const char good[] = "00ff0123456789abcdef0123456789abcdef0123456789abcdef0123456789ab";
    const char *bad[] = {"", "00", "zz", NULL, NULL, NULL};
    char upper[65], nondigit[65], longer[66];
    uint8_t key[32] = {9};
    bool there = true;
    json_t *b = json_pack("{s:s}", "key", good);

    (void)state;
    assert_int_equal(field_hex32(b, "none", FIELD_OPTIONAL, key, &there, NULL), 0);
    assert_false(there);
    assert_int_equal(key[0], 9);
    assert_int_equal(field_hex32(b, "key", FIELD_REQUIRED, key, &there, NULL), 0);
    assert_true(there);
    assert_int_equal(key[0], 0);
    assert_int_equal(key[1], 255);
    assert_int_equal(key[31], 0xab);
    snprintf(upper, sizeof upper, "%s", good);
    upper[2] = 'F';
    snprintf(nondigit, sizeof nondigit, "%s", good);
    nondigit[63] = 'g';
    snprintf(longer, sizeof longer, "%s0", good);
    bad[3] = upper;
    bad[4] = nondigit;
    bad[5] = longer;
    for (int i = 0; i < 6; i++) {
        json_object_set_new(b, "key", json_string(bad[i]));
        assert_int_equal(field_hex32(b, "key", FIELD_REQUIRED, key, NULL, NULL), LARDER_EPROTO);
    }
    json_decref(b);
}

static void an_unknown_field_is_named(void **state)
{
    static const char *const allowed[] = {"a", "b", NULL};
    json_t *b = json_pack("{s:i, s:i}", "a", 1, "b", 2);
    struct larder_err e = {0, ""};

    (void)state;
    assert_int_equal(field_only(b, allowed, &e), 0);
    json_object_set_new(b, "nasty", json_true());
    assert_int_equal(field_only(b, allowed, &e), LARDER_EPROTO);
    assert_non_null(strstr(e.msg, "'nasty'"));
    json_decref(b);
}

static void an_error_survives_the_round_trip_as_one_line(void **state)
{
    struct larder_err e = {0, ""}, back = {0, ""};
    json_t *b;

    (void)state;
    larder_fail(&e, LARDER_ETOOLONG, "9000 tokens; a\nb\x1b[31m \xc3\xa9");
    b = frame_error_body(&e);
    assert_string_equal(json_string_value(json_object_get(b, "status")), "LARDER_ETOOLONG");
    assert_int_equal(frame_error_read(b, &back), LARDER_ETOOLONG);
    assert_string_equal(back.msg, "9000 tokens; a b [31m \xc3\xa9");
    json_decref(b);
    larder_fail(&e, LARDER_EPROTO, "cut \xc3");
    b = frame_error_body(&e);
    assert_non_null(b);
    assert_string_equal(json_string_value(json_object_get(b, "message")), "cut ?");
    json_decref(b);
}

static void a_malformed_error_is_a_protocol_error(void **state)
{
    static const char *const bad[] = {
        "{}",
        "{\"code\":0,\"message\":\"x\"}",
        "{\"code\":5,\"message\":\"x\"}",
        "{\"code\":-4294967297,\"message\":\"x\"}",
        "{\"code\":\"-4\",\"message\":\"x\"}",
        "{\"code\":-4}",
        "{\"code\":-4,\"message\":7}",
    };

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct larder_err e = {0, ""};
        json_t *b = NULL;

        assert_int_equal(frame_parse_json(bad[i], strlen(bad[i]), &b, NULL), 0);
        assert_int_equal(frame_error_read(b, &e), LARDER_EPROTO);
        assert_int_equal(e.code, LARDER_EPROTO);
        json_decref(b);
    }
}

static void names_follow_the_rules(void **state)
{
    char max[514], ns[NAME_MAX_NS + 1] = "x", name[NAME_MAX_ENTRY + 1] = "y";

    (void)state;
    memset(max, 'a', sizeof max);
    max[513] = '\0';
    assert_true(name_is_namespace("a.b_C-9"));
    assert_false(name_is_namespace("") || name_is_namespace("a/b") || name_is_namespace("..") ||
                 name_is_namespace("a b") || name_is_namespace("\xc3\xa9") ||
                 name_is_namespace(max));
    assert_true(name_is_entry("a/b+c@d:e,f=g"));
    assert_false(name_is_entry("/a") || name_is_entry("a/../b") || name_is_entry("=a") ||
                 name_is_entry("a\n") || name_is_entry(max));
    assert_true(name_is_entry(max + 1));
    assert_int_equal(name_split("doc", ns, name, NULL), 0);
    assert_string_equal(ns, "default");
    assert_string_equal(name, "doc");
    assert_int_equal(name_split("team/a/b", ns, name, NULL), 0);
    assert_string_equal(ns, "team");
    assert_string_equal(name, "a/b");
    assert_int_equal(name_split("/b", ns, name, NULL), LARDER_EINVAL);
    assert_int_equal(name_split("a/", ns, name, NULL), LARDER_EINVAL);
    assert_int_equal(name_split("", ns, name, NULL), LARDER_EINVAL);
    max[200] = '/';
    assert_int_equal(name_split(max, ns, name, NULL), LARDER_EINVAL);
    assert_string_equal(ns, "team");
    assert_string_equal(name, "a/b");
}

/* Everything that allocates, once; the code of the first failure. */
static int allocate_everything(const void *in, size_t in_len)
{
    struct larder_err e = {LARDER_EIO, "disk"};
    struct frame f = {.body = NULL};
    size_t len = 0;
    void *packet = NULL;
    json_t *err = NULL;
    int rc = frame_decode(in, in_len, &f, NULL);

    if (!rc)
        rc = frame_encode(FRAME_PUT, 1, f.body, &packet, &len, NULL);
    if (!rc) {
        err = frame_error_body(&e);
        rc = err ? 0 : LARDER_ENOMEM;
    }
    json_decref(err);
    json_decref(f.body);
    mem_free(packet);
    return rc;
}

/* jansson's lexer reports a failed allocation as a syntax error, so that frame_decode()
 * may say LARDER_EPROTO; the frame is refused and nothing leaks either way. */
static void running_out_of_memory_is_an_error_and_leaks_nothing(void **state)
{
    const char *body = "{\"a\":[1,{\"b\":\"c\"}],\"d\":2.5}";
    size_t len = 0;
    uint8_t *in = raw(FRAME_MAGIC, 1, FRAME_PUT, (uint32_t)strlen(body), body, &len);
    int n_failed = 0, n_memory = 0, rc;

    (void)state;
    for (long n = 0;; n++) {
        long left = n;

        mem_set_hook(test_fail_nth, &left);
        rc = allocate_everything(in, len);
        mem_set_hook(NULL, NULL);
        if (left >= 0)
            break; /* nothing failed: the sweep is over */
        n_failed += rc != 0;
        n_memory += rc == LARDER_ENOMEM;
        assert_true(rc == 0 || rc == LARDER_ENOMEM || rc == LARDER_EPROTO);
    }
    assert_int_equal(rc, 0);
    assert_true(n_failed > 10 && n_memory > 10);
    mem_free(in);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_frame_survives_the_round_trip),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(a_wrong_header_is_refused),
        cmocka_unit_test(a_wrong_length_is_refused),
        cmocka_unit_test(a_body_that_is_no_plain_object_is_refused),
        cmocka_unit_test(nesting_beyond_sixteen_is_refused),
        cmocka_unit_test(a_body_over_the_limit_is_refused_before_it_is_sent),
        cmocka_unit_test(any_changed_byte_is_refused_or_decodes),
        cmocka_unit_test(fields_are_typed_and_bounded),
        cmocka_unit_test(a_key_is_64_lower_case_hex_digits),
        cmocka_unit_test(an_unknown_field_is_named),
        cmocka_unit_test(an_error_survives_the_round_trip_as_one_line),
        cmocka_unit_test(a_malformed_error_is_a_protocol_error),
        cmocka_unit_test(names_follow_the_rules),
        cmocka_unit_test(running_out_of_memory_is_an_error_and_leaks_nothing),
    };

    return cmocka_run_group_tests_name("ipc_frame", tests, setup, NULL);
}
