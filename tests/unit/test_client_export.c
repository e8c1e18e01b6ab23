/* test_client_export.c - safetensors headers: what the writer makes is read back, and nothing else. */
#include "testlib.h"

#include <stdlib.h>
#include <string.h>

#include "cli_safetensors.h"
#include "mem.h"

#define HEX64 "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

static const uint32_t rows[] = {2, 0, 3, 1}; /* [2 layers][2 KV heads] */

static struct image_plan *make_plan(enum kv_dtype dtype, bool bias)
{
    struct image_spec s = {.geom = {2, 4, 2, 4},
                           .dtype = dtype,
                           .has_bias = bias,
                           .n_ctx = 5,
                           .next_pos = 5,
                           .n_vocab = 7,
                           .text_len = 3,
                           .rows = rows};
    struct image_plan *p = NULL;

    assert_int_equal(image_plan_new(&p, &s, 1 << 20, NULL), 0);
    return p;
}

/* What SHOW would say of it. */
static json_t *make_entry(const char *precision, bool bias)
{
    json_t *j = json_pack(
        "{ss ss ss ss ss ss si si si si si si si sn sb sb ss ss si si sn s[] ss ss ss ss}", "key",
        HEX64, "namespace", "default", "name", "default/a", "model", "m", "policy", "full",
        "template", "plain", "n_layers", 2, "n_heads", 4, "n_kv_heads", 2, "head_dim", 4, "n_vocab",
        7, "n_ctx", 5, "next_pos", 5, "sel_layer", "renumbered", 0, "has_bias", bias, "precision",
        precision, "backend", "ref/f32/c", "created", 1, "prefill_ms", 2, "certificate",
        "rank_variance", "model_fingerprint", HEX64, "tokenizer_fingerprint", HEX64,
        "template_fingerprint", HEX64, "text", "abc");

    assert_non_null(j);
    return j;
}

static uint64_t data_bytes(const struct image_plan *p)
{
    uint64_t sum = 0;

    for (uint64_t i = 0; i < st_count(p); i++) {
        struct st_tensor t;

        st_tensor_at(p, i, &t);
        sum += t.n_bytes;
    }
    return sum;
}

static json_t *make_header(enum kv_dtype dtype, bool bias, uint64_t *ret_data)
{
    struct image_plan *p = make_plan(dtype, bias);
    json_t *entry = make_entry(kv_dtype_name(dtype), bias), *header;
    char *text = NULL;
    uint64_t len = 0;

    assert_int_equal(st_header(p, entry, &text, &len, NULL), 0);
    assert_int_equal(len % 8, 0);
    header = json_loadb(text + 8, len - 8, 0, NULL);
    assert_non_null(header);
    *ret_data = data_bytes(p);
    mem_free(text);
    json_decref(entry);
    image_plan_free(p);
    return header;
}

static int parse(const json_t *header, uint64_t data, struct image_plan **ret)
{
    char *text = json_dumps(header, JSON_COMPACT);
    json_t *meta = NULL;
    struct larder_err e;
    int rc = st_parse(text, strlen(text), data, &meta, ret, &e);

    json_decref(meta);
    free(text);
    return rc;
}

static void comes_back(void **state)
{
    static const enum kv_dtype types[] = {KV_BF16, KV_INT8, KV_INT4};

    (void)state;
    for (int i = 0; i < 6; i++) {
        enum kv_dtype type = types[i / 2];
        struct image_plan *p = NULL, *was = make_plan(type, i % 2);
        uint64_t data;
        json_t *h = make_header(type, i % 2, &data);

        assert_int_equal(parse(h, data, &p), 0);
        assert_int_equal(p->n_bytes, was->n_bytes);
        assert_memory_equal(p->slot, was->slot, 4 * sizeof *p->slot);
        assert_int_equal(p->spec.dtype, type);
        image_plan_free(p);
        image_plan_free(was);
        json_decref(h);
    }
}

/* Every single change of a tensor's place, shape or type is refused, and every one left out. */
static void refuses_changes(void **state)
{
    struct image_plan *p = NULL;
    uint64_t data;
    json_t *h = make_header(KV_BF16, true, &data), *t;
    const char *name;

    (void)state;
    json_object_foreach (h, name, t) {
        for (int what = 0; what < 4 && strcmp(name, "__metadata__"); what++) {
            json_t *bad = json_deep_copy(h), *b = json_object_get(bad, name);

            if (what == 0)
                json_object_del(bad, name);
            if (what == 1)
                json_array_set_new(json_object_get(b, "data_offsets"), 0, json_integer(1));
            if (what == 2)
                json_array_set_new(json_object_get(b, "shape"), 0, json_integer(1ll << 40));
            if (what == 3)
                json_object_set_new(b, "dtype", json_string("F64"));
            assert_int_equal(parse(bad, data, &p), LARDER_EINVAL);
            json_decref(bad);
        }
    }
    assert_int_equal(parse(h, data + 1, &p), LARDER_EINVAL);
    assert_int_equal(parse(h, data - 1, &p), LARDER_EINVAL);
    json_decref(h);
}

static void refuses_metadata(void **state)
{
    static const char *const set[][2] = {
        {"format", "pt"},
        {"n_layers", "0"},
        {"n_layers", "4294967295"},
        {"n_layers", "99999999999"},
        {"head_dim", "-4"},
        {"head_dim", ""},
        {"n_ctx", "4"},
        {"has_bias", "yes"},
        {"key", "00"},
        {"precision", "int9"},
        {"extra", "1"},
    };
    struct image_plan *p = NULL;
    uint64_t data;
    json_t *h = make_header(KV_INT8, true, &data);

    (void)state;
    for (size_t i = 0; i < sizeof set / sizeof set[0]; i++) {
        json_t *bad = json_deep_copy(h);

        json_object_set_new(json_object_get(bad, "__metadata__"), set[i][0],
                            json_string(set[i][1]));
        assert_int_equal(parse(bad, data, &p), LARDER_EINVAL);
        json_decref(bad);
    }
    json_object_del(h, "__metadata__");
    assert_int_equal(parse(h, data, &p), LARDER_EINVAL);
    json_decref(h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(comes_back),
        cmocka_unit_test(refuses_changes),
        cmocka_unit_test(refuses_metadata),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
