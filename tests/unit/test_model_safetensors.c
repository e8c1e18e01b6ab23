/* Headers of safetensors files that lie. */
#include "testlib.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "bytes.h"
#include "dequant.h"
#include "safetensors.h"

static char *dir;
static int dir_fd;

static int set_up(void **state)
{
    (void)state;
    dir = test_mkdir();
    dir_fd = open(dir, O_RDONLY | O_DIRECTORY);
    return dir_fd < 0;
}

static int tear_down(void **state)
{
    (void)state;
    close(dir_fd);
    test_rmdir(dir);
    return 0;
}

/* A file that claims `length` bytes of header, has those of `header`, and n_data bytes after. */
static void write_file(uint64_t length, const char *header, size_t n_data)
{
    uint8_t bytes[8], zero[256] = {0};
    struct wr w = wr_init(bytes, sizeof bytes);
    int fd = openat(dir_fd, "f", O_WRONLY | O_CREAT | O_TRUNC, 0600);

    wr_u64(&w, length);
    assert_true(n_data <= sizeof zero);
    assert_int_equal(write(fd, bytes, 8), 8);
    assert_int_equal(write(fd, header, strlen(header)), (ssize_t)strlen(header));
    assert_int_equal(write(fd, zero, n_data), (ssize_t)n_data);
    close(fd);
}

static int open_file(struct safetensors **ret, struct larder_err *e)
{
    return safetensors_open(ret, dir_fd, "f", e);
}

/* The header with n_data bytes of data is refused, and the message says why. */
static void refused(const char *header, size_t n_data, int code, const char *why)
{
    struct safetensors *s = NULL;
    struct larder_err e = {0, ""};

    write_file(strlen(header), header, n_data);
    if (open_file(&s, &e) != code || !strstr(e.msg, why))
        fail_msg("%s: %d, %s", header, e.code, e.msg);
    assert_null(s);
}

#define ENTRY(dtype, shape, from, to)                                                              \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"

static void a_file_opens_and_lists_its_tensors_by_place(void **state)
{
    struct safetensors *s = NULL;
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"b\":" ENTRY("BF16", "[2,3]", 8,
                       20) ","
                           "\"a\":" ENTRY("F32", "[2]", 0,
                                          8) ","
                                             "\"none\":" ENTRY("F16", "[0,7]", 20,
                                                               20) ","
                                                                   "\"c\":" ENTRY("I8", "[]", 20,
                                                                                  21) "}   ";
    const struct safetensor *t;

    (void)state;
    write_file(strlen(header), header, 21);
    assert_int_equal(open_file(&s, NULL), 0);
    assert_int_equal(safetensors_n(s), 4);
    t = safetensors_at(s, 0);
    assert_string_equal(t->name, "a");
    assert_int_equal(t->offset, 8 + strlen(header));
    assert_int_equal(t->format->type, TENSOR_F32);
    t = safetensors_at(s, 1);
    assert_string_equal(t->name, "b");
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->dim[0], 2);
    assert_int_equal(t->dim[1], 3);
    assert_int_equal(t->n_bytes, 12);
    assert_int_equal(t->offset, 8 + strlen(header) + 8);
    assert_string_equal(safetensors_at(s, 2)->name, "none");
    t = safetensors_at(s, 3);
    assert_null(t->format);
    assert_string_equal(t->dtype, "I8");
    safetensors_close(s);
    safetensors_close(NULL);
}

static void a_file_that_is_not_there_is_not_an_error_message(void **state)
{
    struct safetensors *s = NULL;
    struct larder_err e = {0, ""};

    (void)state;
    assert_int_equal(safetensors_open(&s, dir_fd, "nothing", &e), LARDER_ENOTFOUND);
    assert_string_equal(e.msg, "");
}

/* Every proper prefix of a good file. */
static void truncated_files_are_refused(void **state)
{
    static const char header[] = "{\"a\":" ENTRY("F32", "[2,2]", 0, 16) "}";
    struct safetensors *s = NULL;
    char path[256];

    (void)state;
    snprintf(path, sizeof path, "%s/f", dir);
    for (size_t n = 0; n < 8 + strlen(header) + 16; n++) {
        write_file(strlen(header), header, 16);
        assert_int_equal(truncate(path, (off_t)n), 0);
        assert_int_equal(open_file(&s, NULL), LARDER_EMODEL);
    }
}

static void a_length_that_cannot_be_is_refused(void **state)
{
    const uint64_t lengths[] = {9,         1u << 20,       (16u << 20) + 1, 1ull << 40,
                                INT64_MAX, UINT64_MAX - 7, UINT64_MAX};
    struct safetensors *s = NULL;

    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        write_file(lengths[i], "{}", 0);
        assert_int_equal(open_file(&s, NULL), LARDER_EMODEL);
    }
}

static void what_is_not_an_object_of_entries_is_refused(void **state)
{
    (void)state;
    refused("", 0, LARDER_EMODEL, "JSON");
    refused("[]", 0, LARDER_EMODEL, "JSON");
    refused("{\"a\":1", 0, LARDER_EMODEL, "JSON");
    refused("{} {}", 0, LARDER_EMODEL, "JSON");
    refused("{\"a\":1}", 0, LARDER_EMODEL, "tensor a");
    refused("{\"a\":{}}", 0, LARDER_EMODEL, "tensor a");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, LARDER_EMODEL, "tensor a");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"more\":0}}", 4,
            LARDER_EMODEL, "alone");
}

static void a_name_may_stand_once(void **state)
{
    (void)state;
    refused("{\"a\":" ENTRY("F32", "[1]", 0, 4) ",\"a\":" ENTRY("F32", "[1]", 4, 8) "}", 8,
            LARDER_EMODEL, "duplicate");
    refused("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
            LARDER_EMODEL, "duplicate");
}

static void types_and_shapes_are_checked(void **state)
{
    (void)state;
    refused("{\"a\":" ENTRY("Q4_0", "[1]", 0, 4) "}", 4, LARDER_EUNSUPPORTED, "Q4_0");
    refused("{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LARDER_EMODEL,
            "dtype");
    refused("{\"a\":" ENTRY("F32", "[-1]", 0, 4) "}", 4, LARDER_EMODEL, "dimension");
    refused("{\"a\":" ENTRY("F32", "[1.0]", 0, 4) "}", 4, LARDER_EMODEL, "dimension");
    refused("{\"a\":" ENTRY("F32", "[\"1\"]", 0, 4) "}", 4, LARDER_EMODEL, "dimension");
    refused("{\"a\":" ENTRY("F32", "{}", 0, 4) "}", 4, LARDER_EMODEL, "shape");
    refused("{\"a\":" ENTRY("F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, LARDER_EMODEL, "shape");
    refused("{\"a\":" ENTRY("F32", "[4611686018427387904,4]", 0, 0) "}", 0, LARDER_EMODEL,
            "overflow");
    refused("{\"a\":" ENTRY("F32", "[99999999999999999999]", 0, 4) "}", 4, LARDER_EMODEL, "");
    refused("{\"a\":" ENTRY("F32", "[2]", 0, 4) "}", 4, LARDER_EMODEL, "takes 8");
    refused("{\"a\":" ENTRY("BF16", "[1]", 0, 4) "}", 4, LARDER_EMODEL, "takes 2");
}

static void places_are_checked(void **state)
{
    (void)state;
    refused("{\"a\":" ENTRY("F32", "[1]", 0, 8) "}", 4, LARDER_EMODEL, "beyond");
    refused("{\"a\":" ENTRY("F32", "[1]", 4, 8) "}", 4, LARDER_EMODEL, "beyond");
    refused("{\"a\":" ENTRY("F32", "[1]", 4, 0) "}", 4, LARDER_EMODEL, "beyond");
    refused("{\"a\":" ENTRY("F32", "[1]", -4, 0) "}", 4, LARDER_EMODEL, "counts");
    refused("{\"a\":" ENTRY("F32", "[1]", 0, 4.0) "}", 4, LARDER_EMODEL, "counts");
    refused("{\"a\":" ENTRY("F32", "[1]", 0, 9223372036854775807) "}", 4, LARDER_EMODEL, "beyond");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, LARDER_EMODEL,
            "counts");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":{}}}", 4, LARDER_EMODEL,
            "counts");
}

static void tensors_lie_side_by_side(void **state)
{
    (void)state;
    refused("{\"a\":" ENTRY("F32", "[2]", 0, 8) ",\"b\":" ENTRY("F32", "[2]", 4, 12) "}", 12,
            LARDER_EMODEL, "overlaps");
    refused("{\"a\":" ENTRY("F32", "[2]", 0, 8) ",\"b\":" ENTRY("F32", "[2]", 0, 8) "}", 8,
            LARDER_EMODEL, "overlaps");
    refused("{\"a\":" ENTRY("F32", "[3]", 0, 12) ",\"b\":" ENTRY("F32", "[1]", 4, 8) "}", 12,
            LARDER_EMODEL, "overlaps");
    refused("{\"a\":" ENTRY("F32", "[1]", 4, 8) "}", 8, LARDER_EMODEL, "belong to none");
    refused("{\"a\":" ENTRY("F32", "[1]", 0, 4) "}", 8, LARDER_EMODEL, "belong to no tensor");
    refused("{}", 1, LARDER_EMODEL, "belong to no tensor");
}

static void a_directory_is_not_a_file(void **state)
{
    struct safetensors *s = NULL;

    (void)state;
    assert_int_equal(mkdirat(dir_fd, "d", 0700), 0);
    assert_int_equal(safetensors_open(&s, dir_fd, "d", NULL), LARDER_EMODEL);
}

static void reading_survives_failing_allocations(void **state)
{
    static const char header[] = "{\"a\":" ENTRY("F32", "[2,2]", 0, 16) "}";
    int rc = LARDER_ENOMEM;

    (void)state;
    write_file(strlen(header), header, 16);
    for (long n = 0; rc; n++) {
        struct safetensors *s = NULL;
        long left = n;

        mem_set_hook(test_fail_nth, &left);
        rc = open_file(&s, NULL);
        mem_set_hook(NULL, NULL);
        safetensors_close(s);
        assert_true(rc == 0 || rc == LARDER_ENOMEM);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_file_opens_and_lists_its_tensors_by_place),
        cmocka_unit_test(a_file_that_is_not_there_is_not_an_error_message),
        cmocka_unit_test(truncated_files_are_refused),
        cmocka_unit_test(a_length_that_cannot_be_is_refused),
        cmocka_unit_test(what_is_not_an_object_of_entries_is_refused),
        cmocka_unit_test(a_name_may_stand_once),
        cmocka_unit_test(types_and_shapes_are_checked),
        cmocka_unit_test(places_are_checked),
        cmocka_unit_test(tensors_lie_side_by_side),
        cmocka_unit_test(a_directory_is_not_a_file),
        cmocka_unit_test(reading_survives_failing_allocations),
    };

    return cmocka_run_group_tests(tests, set_up, tear_down);
}
