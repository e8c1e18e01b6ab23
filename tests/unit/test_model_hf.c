/* Directories as models: what is refused, and by which name; what identifies one. */
#include "testlib.h"

#include <fcntl.h>
#include <jansson.h>
#include <sys/stat.h>

#include "bytes.h"
#include "model.h"
#include "sha256.h"

#define INDEX "model.safetensors.index.json"

static char *dir;
static int dir_fd;

static void write_bytes(const char *name, const void *p, size_t n)
{
    int fd = openat(dir_fd, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, p, n), (ssize_t)n);
    close(fd);
}

static void write_text(const char *name, const char *text)
{
    write_bytes(name, text, strlen(text));
}

/* ---- a model of one layer: hidden 8, 2 heads, 1 KV head, head dim 4, feed-forward 6, 16 tokens */

static const char plain_config[] =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":8,"
    "\"intermediate_size\":6,\"num_hidden_layers\":1,\"num_attention_heads\":2,"
    "\"num_key_value_heads\":1,\"vocab_size\":16,\"max_position_embeddings\":64,"
    "\"rms_norm_eps\":1e-5,\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,"
    "\"eos_token_id\":[2,3]}";

struct tensor {
    const char *name, *dtype;
    int rows, cols; /* cols 0: a vector */
};

#define LAYER "model.layers.0."
enum { N_TENSORS = 11, Q_PROJ = 3, MAX_TENSORS = 16 };
static const struct tensor plain_tensors[N_TENSORS] = {
    {"model.embed_tokens.weight", "F32", 16, 8},
    {"model.norm.weight", "F32", 8, 0},
    {LAYER "input_layernorm.weight", "F32", 8, 0},
    {LAYER "self_attn.q_proj.weight", "F32", 8, 8},
    {LAYER "self_attn.k_proj.weight", "F32", 4, 8},
    {LAYER "self_attn.v_proj.weight", "F32", 4, 8},
    {LAYER "self_attn.o_proj.weight", "F32", 8, 8},
    {LAYER "post_attention_layernorm.weight", "F32", 8, 0},
    {LAYER "mlp.gate_proj.weight", "F32", 6, 8},
    {LAYER "mlp.up_proj.weight", "F32", 6, 8},
    {LAYER "mlp.down_proj.weight", "F32", 8, 6},
};

static size_t bytes_of(const struct tensor *t)
{
    size_t n = (size_t)t->rows * (size_t)(t->cols ? t->cols : 1);

    return n * (!strcmp(t->dtype, "F32") ? 4 : !strcmp(t->dtype, "I8") ? 1 : 2);
}

static void write_tensors(const char *name, const struct tensor *t, int n)
{
    json_t *header = json_object();
    size_t at = 0, len;
    uint8_t *file;
    struct wr w;
    char *text;

    for (int i = 0; i < n; i++) {
        json_t *shape =
            t[i].cols ? json_pack("[ii]", t[i].rows, t[i].cols) : json_pack("[i]", t[i].rows);

        json_object_set_new(header, t[i].name,
                            json_pack("{ss so s[II]}", "dtype", t[i].dtype, "shape", shape,
                                      "data_offsets", (json_int_t)at,
                                      (json_int_t)(at + bytes_of(&t[i]))));
        at += bytes_of(&t[i]);
    }
    text = json_dumps(header, JSON_COMPACT);
    len = strlen(text);
    file = calloc(1, 8 + len + at);
    w = wr_init(file, 8 + len + at);
    wr_u64(&w, len);
    wr_bytes(&w, text, len);
    for (size_t i = 0; i < at / 2; i++)
        wr_u16(&w, (uint16_t)(0x3c00 + i % 97)); /* small and positive in every type */
    assert_true(wr_ok(&w));
    write_bytes(name, file, 8 + len + at);
    free(file);
    free(text);
    json_decref(header);
}

static void write_tokenizer(int n)
{
    json_t *vocab = json_object();
    char *text;
    json_t *j;

    for (int i = 0; i < n; i++) {
        char token[2] = {(char)('a' + i), 0};

        json_object_set_new(vocab, token, json_integer(i));
    }
    j = json_pack("{ss s[] sn s{ss sb sb sb} sn s{ss sb} s{ss so s[] sb}}", "version", "1.0",
                  "added_tokens", "normalizer", "pre_tokenizer", "type", "ByteLevel",
                  "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 1, "post_processor",
                  "decoder", "type", "ByteLevel", "use_regex", 1, "model", "type", "BPE", "vocab",
                  vocab, "merges", "byte_fallback", 0);
    text = json_dumps(j, 0);
    write_text("tokenizer.json", text);
    free(text);
    json_decref(j);
}

static int set_up(void **state)
{
    (void)state;
    dir = test_mkdir();
    dir_fd = open(dir, O_RDONLY | O_DIRECTORY);
    write_text("config.json", plain_config);
    write_tensors("model.safetensors", plain_tensors, N_TENSORS);
    write_tokenizer(16);
    return dir_fd < 0;
}

static int tear_down(void **state)
{
    (void)state;
    close(dir_fd);
    test_rmdir(dir);
    return 0;
}

/* ---- helpers */

static void refused(int code, const char *why)
{
    struct model *m = NULL;
    struct larder_err e = {0, ""};

    if (model_open(&m, dir, &e) != code || !strstr(e.msg, why))
        fail_msg("expected %d and '%s': %d, %s", code, why, e.code, e.msg);
    assert_null(m);
}

static struct model *opened(void)
{
    struct model *m = NULL;
    struct larder_err e = {0, ""};

    if (model_open(&m, dir, &e))
        fail_msg("%s", e.msg);
    return m;
}

/* The plain configuration with one key changed; value NULL: without it. */
static void config_with(const char *key, const char *value)
{
    json_t *j = json_loads(plain_config, 0, NULL);
    char *text;

    if (value)
        json_object_set_new(j, key, json_loads(value, JSON_DECODE_ANY, NULL));
    else
        json_object_del(j, key);
    text = json_dumps(j, 0);
    write_text("config.json", text);
    free(text);
    json_decref(j);
}

static void refused_with(const char *key, const char *value, int code, const char *why)
{
    config_with(key, value);
    refused(code, why);
    write_text("config.json", plain_config);
}

/* The plain tensors with one changed; a NULL name leaves it out, index N_TENSORS adds one. */
static void refused_tensor(int i, struct tensor t, int code, const char *why)
{
    struct tensor all[MAX_TENSORS];
    int n = i == N_TENSORS ? N_TENSORS + 1 : N_TENSORS;

    memcpy(all, plain_tensors, sizeof plain_tensors);
    all[i] = t;
    if (!t.name)
        memmove(all + i, all + i + 1, (size_t)(--n - i) * sizeof *all);
    write_tensors("model.safetensors", all, n);
    refused(code, why);
}

/* ---- what opens */

static void a_directory_opens_as_a_model(void **state)
{
    struct model *m = opened();
    const struct model_params *p = model_params(m);
    float row[8], bias;

    (void)state;
    assert_string_equal(p->arch, "llama");
    assert_int_equal(p->geom.n_heads, 2);
    assert_int_equal(p->geom.n_kv_heads, 1);
    assert_int_equal(p->geom.head_dim, 4);
    assert_int_equal(p->n_vocab, 16);
    assert_false(p->has_qkv_bias || p->has_qk_norm);
    assert_true(model_is_end(m, 2) && model_is_end(m, 3) && !model_is_end(m, 1));
    assert_int_equal(model_read_f32(m, 0, MODEL_K, 3, 1, row, NULL), 0);
    assert_true(row[0] > 0);
    assert_int_equal(model_read_f32(m, 0, MODEL_K, 4, 1, &bias, NULL), LARDER_EINVAL);
    model_close(m);
}

static void ends_come_from_the_generation_config_first(void **state)
{
    struct model *m;

    (void)state;
    write_text("generation_config.json", "{\"eos_token_id\": 7}");
    m = opened();
    assert_true(model_is_end(m, 7) && !model_is_end(m, 2));
    model_close(m);
    write_text("generation_config.json", "{\"eos_token_id\": 16}");
    refused(LARDER_EMODEL, "eos_token_id");
    write_text("generation_config.json", "{}");
    m = opened();
    assert_true(model_is_end(m, 2));
    model_close(m);
}

static void halves_and_a_table_nobody_reads_are_accepted(void **state)
{
    struct tensor all[MAX_TENSORS];
    struct model *m;
    float x[8];

    (void)state;
    memcpy(all, plain_tensors, sizeof plain_tensors);
    all[Q_PROJ].dtype = "BF16";
    all[Q_PROJ + 1].dtype = "F16";
    all[N_TENSORS] = (struct tensor){LAYER "self_attn.rotary_emb.inv_freq", "F32", 2, 0};
    all[N_TENSORS + 1] = (struct tensor){"lm_head.weight", "F32", 16, 8}; /* tied all the same */
    write_tensors("model.safetensors", all, N_TENSORS + 2);
    m = opened();
    assert_int_equal(model_read_f32(m, 0, MODEL_Q, 0, 1, x, NULL), 0);
    assert_true(x[0] > 0);
    model_close(m);
}

/* ---- files */

static void missing_and_broken_files_are_named(void **state)
{
    (void)state;
    unlinkat(dir_fd, "model.safetensors", 0);
    refused(LARDER_EMODEL, "model.safetensors is missing");
    unlinkat(dir_fd, "config.json", 0);
    refused(LARDER_EMODEL, "config.json");
    write_text("config.json", "{");
    refused(LARDER_EMODEL, "config.json");
    write_text("config.json", "[1]");
    refused(LARDER_EMODEL, "config.json");
    write_text("config.json", "{\"model_type\":\"llama\",\"model_type\":\"llama\"}");
    refused(LARDER_EMODEL, "duplicate");
}

static void a_tokenizer_is_needed(void **state)
{
    (void)state;
    unlinkat(dir_fd, "tokenizer.json", 0);
    refused(LARDER_EIO, "tokenizer.json");
}

static void shards_are_found_through_the_index(void **state)
{
    static const char good[] = "{\"weight_map\":{\"model.norm.weight\":\"a.safetensors\","
                               "\"model.embed_tokens.weight\":\"b.safetensors\"}}";
    struct model *m;

    (void)state;
    unlinkat(dir_fd, "model.safetensors", 0);
    write_tensors("b.safetensors", plain_tensors, 1);
    write_tensors("a.safetensors", plain_tensors + 1, N_TENSORS - 1);
    write_text(INDEX, good);
    m = opened();
    model_close(m);
    write_tensors("a.safetensors", plain_tensors, N_TENSORS);
    refused(LARDER_EMODEL, "is in a.safetensors and in b.safetensors");
    write_tensors("a.safetensors", plain_tensors + 1, N_TENSORS - 1);
    write_text(INDEX, "{\"weight_map\":{\"model.norm.weight\":\"b.safetensors\","
                      "\"model.embed_tokens.weight\":\"a.safetensors\"}}");
    refused(LARDER_EMODEL, "is not in");
    write_text(INDEX, "{\"weight_map\":{\"model.norm.weight\":\"c.safetensors\"}}");
    refused(LARDER_EMODEL, "c.safetensors is missing");
    write_text(INDEX, "{\"weight_map\":{}}");
    refused(LARDER_EMODEL, "weight_map");
    write_text(INDEX, "{\"weight_map\":[]}");
    refused(LARDER_EMODEL, "weight_map");
}

static void an_index_stays_in_its_directory(void **state)
{
    const char *names[] = {"\"../a.safetensors\"",
                           "\"/etc/passwd\"",
                           "\"sub/a.safetensors\"",
                           "\".safetensors\"",
                           "\"a.bin\"",
                           "7",
                           "null",
                           "\"\""};
    char text[256];

    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        snprintf(text, sizeof text, "{\"weight_map\":{\"model.norm.weight\":%s}}", names[i]);
        write_text(INDEX, text);
        refused(LARDER_EMODEL, "safetensors file of the directory");
    }
}

/* ---- config.json */

static void other_architectures_are_refused_by_name(void **state)
{
    (void)state;
    refused_with("model_type", "\"gemma2\"", LARDER_EUNSUPPORTED, "gemma2");
    refused_with("model_type", "\"qwen2_moe\"", LARDER_EUNSUPPORTED, "qwen2_moe");
    refused_with("model_type", NULL, LARDER_EUNSUPPORTED, "architecture");
    refused_with("architectures", "[\"LlamaForSequenceClassification\"]", LARDER_EUNSUPPORTED,
                 "LlamaForSequenceClassification");
    refused_with("architectures", "[]", LARDER_EUNSUPPORTED, "architectures");
}

static void features_that_are_not_computed_are_refused_by_name(void **state)
{
    (void)state;
    refused_with("quantization_config", "{\"quant_method\":\"gptq\"}", LARDER_EUNSUPPORTED,
                 "quantization_config");
    refused_with("num_local_experts", "8", LARDER_EUNSUPPORTED, "num_local_experts");
    refused_with("num_experts", "64", LARDER_EUNSUPPORTED, "num_experts");
    refused_with("vision_config", "{}", LARDER_EUNSUPPORTED, "vision_config");
    refused_with("attn_logit_softcapping", "50.0", LARDER_EUNSUPPORTED, "attn_logit_softcapping");
    refused_with("final_logit_softcapping", "30.0", LARDER_EUNSUPPORTED, "final_logit_softcapping");
    refused_with("mlp_bias", "true", LARDER_EUNSUPPORTED, "mlp_bias");
    refused_with("hidden_act", "\"gelu\"", LARDER_EUNSUPPORTED, "gelu");
    refused_with("rope_scaling", "{\"type\":\"yarn\",\"factor\":4.0}", LARDER_EUNSUPPORTED, "yarn");
    refused_with("rope_scaling", "{\"rope_type\":\"dynamic\",\"factor\":2.0}", LARDER_EUNSUPPORTED,
                 "dynamic");
    refused_with("rope_scaling", "{\"factor\":2.0}", LARDER_EUNSUPPORTED, "rope scaling");
}

static void numbers_are_checked(void **state)
{
    (void)state;
    refused_with("hidden_size", NULL, LARDER_EMODEL, "hidden_size is missing");
    refused_with("hidden_size", "0", LARDER_EMODEL, "hidden_size");
    refused_with("hidden_size", "-8", LARDER_EMODEL, "hidden_size");
    refused_with("hidden_size", "8.0", LARDER_EMODEL, "hidden_size");
    refused_with("hidden_size", "1e9", LARDER_EMODEL, "hidden_size");
    refused_with("num_hidden_layers", "100000", LARDER_EMODEL, "num_hidden_layers");
    refused_with("num_attention_heads", "5", LARDER_EINVAL, "");
    refused_with("num_key_value_heads", "7", LARDER_EINVAL, "");
    refused_with("head_dim", "99999", LARDER_EMODEL, "head_dim");
    refused_with("vocab_size", "99999999", LARDER_EMODEL, "vocab_size");
    refused_with("max_position_embeddings", "9999999999", LARDER_EMODEL, "max_position");
    refused_with("rms_norm_eps", "0", LARDER_EMODEL, "rms_norm_eps");
    refused_with("rms_norm_eps", "\"small\"", LARDER_EMODEL, "rms_norm_eps");
    refused_with("rope_theta", "-1", LARDER_EMODEL, "rope_theta");
    refused_with("partial_rotary_factor", "1.5", LARDER_EMODEL, "partial_rotary_factor");
    refused_with("tie_word_embeddings", "1", LARDER_EMODEL, "tie_word_embeddings");
    refused_with("rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8}", LARDER_EMODEL,
                 "low_freq_factor is missing");
    refused_with("rope_scaling",
                 "{\"rope_type\":\"longrope\",\"short_factor\":[1,1],\"long_factor\":[1]}",
                 LARDER_EMODEL, "long_factor");
    refused_with("rope_scaling",
                 "{\"rope_type\":\"longrope\",\"short_factor\":[1,0],\"long_factor\":[1,1]}",
                 LARDER_EMODEL, "RoPE");
    refused_with("rope_scaling",
                 "{\"rope_type\":\"longrope\",\"short_factor\":[1,\"x\"],\"long_factor\":[1,1]}",
                 LARDER_EMODEL, "short_factor");
}

/* ---- tensors */

static void tensors_are_checked_by_name(void **state)
{
    static const char q[] = LAYER "self_attn.q_proj.weight";

    (void)state;
    refused_tensor(Q_PROJ, (struct tensor){0}, LARDER_EMODEL,
                   "tensor " LAYER "self_attn.q_proj.weight is missing");
    refused_tensor(0, (struct tensor){0}, LARDER_EMODEL, "embed_tokens.weight is missing");
    refused_tensor(Q_PROJ, (struct tensor){q, "F32", 8, 7}, LARDER_EMODEL, "8 x 7; expected 8 x 8");
    refused_tensor(Q_PROJ, (struct tensor){q, "F32", 64, 0}, LARDER_EMODEL, "expected 8 x 8");
    refused_tensor(Q_PROJ, (struct tensor){q, "I8", 8, 8}, LARDER_EUNSUPPORTED, "I8");
    refused_tensor(0, (struct tensor){"model.embed_tokens.weight", "F32", 15, 8}, LARDER_EMODEL,
                   "expected 16 x 8");
    refused_tensor(N_TENSORS, (struct tensor){LAYER "self_attn.q_norm.weight", "F32", 4, 0},
                   LARDER_EUNSUPPORTED, "q_norm");
    refused_tensor(N_TENSORS, (struct tensor){LAYER "self_attn.q_proj.bias", "F32", 8, 0},
                   LARDER_EUNSUPPORTED, "q_proj.bias");
    refused_tensor(N_TENSORS, (struct tensor){"model.layers.1.mlp.up_proj.weight", "F32", 6, 8},
                   LARDER_EUNSUPPORTED, "model.layers.1");
}

static void an_untied_head_must_be_there(void **state)
{
    (void)state;
    refused_with("tie_word_embeddings", "false", LARDER_EMODEL, "lm_head.weight is missing");
    refused_with("tie_word_embeddings", NULL, LARDER_EMODEL, "lm_head.weight is missing");
}

static void a_tokenizer_with_more_tokens_than_rows_is_refused(void **state)
{
    (void)state;
    write_tokenizer(17);
    refused(LARDER_EMODEL, "17 tokens");
}

/* ---- identity */

static void hash_length(struct sha256 *s, uint64_t n)
{
    uint8_t bytes[8];
    struct wr w = wr_init(bytes, 8);

    wr_u64(&w, n);
    sha256_add(s, bytes, 8);
}

static void hash_part(struct sha256 *s, const char *name)
{
    uint8_t buf[8192];
    int fd = openat(dir_fd, name, O_RDONLY);
    ssize_t n = read(fd, buf, sizeof buf);

    assert_true(n > 0 && n < (ssize_t)sizeof buf);
    hash_length(s, strlen(name));
    sha256_add(s, name, strlen(name));
    hash_length(s, (uint64_t)n);
    sha256_add(s, buf, (size_t)n);
    close(fd);
}

/* As PROTOCOL.md has it. */
static void the_fingerprint_is_over_config_and_weights(void **state)
{
    struct sha256 *s = sha256_new();
    struct model *m = opened();
    uint8_t want[32], got[32], again[32];

    (void)state;
    hash_length(s, 11);
    sha256_add(s, "larder-hf-1", 11);
    hash_part(s, "config.json");
    hash_part(s, "model.safetensors");
    sha256_get(s, want);
    sha256_free(s);
    assert_int_equal(model_fingerprint(m, got, NULL), 0);
    assert_memory_equal(want, got, 32);
    model_close(m);

    write_text("generation_config.json", "{}");
    m = opened();
    assert_int_equal(model_fingerprint(m, again, NULL), 0);
    assert_memory_equal(got, again, 32);
    model_close(m);

    config_with("max_position_embeddings", "65");
    m = opened();
    assert_int_equal(model_fingerprint(m, again, NULL), 0);
    assert_memory_not_equal(got, again, 32);
    model_close(m);
}

static void a_change_in_place_changes_the_path_id(void **state)
{
    struct timespec times[2] = {{0, UTIME_OMIT}, {4102444800, 5}}; /* some time later */
    struct model *m = opened();
    struct path_id before = model_path_id(m), after;

    (void)state;
    model_close(m);
    assert_int_equal(utimensat(dir_fd, "model.safetensors", times, 0), 0);
    assert_true(path_id_get(dir, &after));
    assert_false(path_id_same(&before, &after));
    assert_int_equal(after.mtime_ns, 4102444800ull * 1000000000u + 5);
    write_text("new", "more");
    assert_true(path_id_get(dir, &before));
    assert_int_equal(before.size, after.size + 4);
    assert_false(path_id_get("/nothing/here", &after));
}

static void opening_survives_failing_allocations(void **state)
{
    int rc = LARDER_ENOMEM;

    (void)state;
    for (long n = 0; rc; n++) {
        struct model *m = NULL;
        long left = n;

        mem_set_hook(test_fail_nth, &left);
        rc = model_open(&m, dir, NULL);
        mem_set_hook(NULL, NULL);
        model_close(m);
        assert_true(rc == 0 || rc == LARDER_ENOMEM);
    }
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(a_directory_opens_as_a_model),
        CASE(ends_come_from_the_generation_config_first),
        CASE(halves_and_a_table_nobody_reads_are_accepted),
        CASE(missing_and_broken_files_are_named),
        CASE(a_tokenizer_is_needed),
        CASE(shards_are_found_through_the_index),
        CASE(an_index_stays_in_its_directory),
        CASE(other_architectures_are_refused_by_name),
        CASE(features_that_are_not_computed_are_refused_by_name),
        CASE(numbers_are_checked),
        CASE(tensors_are_checked_by_name),
        CASE(an_untied_head_must_be_there),
        CASE(a_tokenizer_with_more_tokens_than_rows_is_refused),
        CASE(the_fingerprint_is_over_config_and_weights),
        CASE(a_change_in_place_changes_the_path_id),
        CASE(opening_survives_failing_allocations),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
