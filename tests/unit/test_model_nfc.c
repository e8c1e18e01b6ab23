/* test_prefill_nfc.c - composing text as the reference tokenizers do. */
#include "testlib.h"

#include "nfc.h"

static void expect(const char *text, const char *want)
{
    struct larder_err e;
    char *made;
    size_t n;

    assert_int_equal(nfc_compose(text, strlen(text), &made, &n, &e), 0);
    assert_int_equal(n, strlen(want));
    assert_memory_equal(made ? made : text, want, n);
    mem_free(made);
}

static void marks_are_ordered_and_composed(void **state)
{
    (void)state;
    expect("", "");
    expect("plain \xc3\xa9", "plain \xc3\xa9");
    expect("e\xcc\x81", "\xc3\xa9");                     /* e, acute */
    expect("a\xcc\x81\xcc\xa3", "\xe1\xba\xa1\xcc\x81"); /* dot below goes first */
    expect("\xe2\x84\xab", "\xc3\x85");                  /* the angstrom sign is a letter */
    expect("\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8", "\xea\xb0\x81"); /* Hangul */
}

/* U+0899 (Unicode 14) has a lower class than U+08F2, and the reference does not know it. */
static void marks_newer_than_the_reference_stay_where_they_are(void **state)
{
    (void)state;
    expect("\xe0\xa3\xb2\xe0\xa2\x99", "\xe0\xa3\xb2\xe0\xa2\x99");
    expect("e\xe0\xa2\x99\xcc\x81", "e\xe0\xa2\x99\xcc\x81");
    expect("e\xcc\x81\xe0\xa2\x99"
           "e\xcc\x81",
           "\xc3\xa9\xe0\xa2\x99\xc3\xa9");
    expect("\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0", "\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0");
    expect("\xdf\xbd\xcc\x81", "\xdf\xbd\xcc\x81"); /* U+07FD: the first of them */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(marks_are_ordered_and_composed),
        cmocka_unit_test(marks_newer_than_the_reference_stay_where_they_are),
    };

    return cmocka_run_group_tests_name("composed text", tests, NULL, NULL);
}
