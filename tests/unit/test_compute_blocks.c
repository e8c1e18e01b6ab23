/* Products with weights in the file's blocks: against the plainest loop over their values, and a
 * layer that is kept against one that is packed. */
#include "fake_model.h"

#include "cpu.h"

enum { N_IN = 512, N_OUT = 83, MOST_ROWS = 21, LD = N_OUT + 5 };

/* Where a block's scales are, which may not be any two bytes. */
static const struct {
    uint32_t type;
    int scale[2];
} formats[] = {
    {TENSOR_Q4_0, {0, -1}},  {TENSOR_Q4_1, {0, 2}},    {TENSOR_Q5_0, {0, -1}},
    {TENSOR_Q5_1, {0, 2}},   {TENSOR_Q8_0, {0, -1}},   {TENSOR_Q4_K, {0, 2}},
    {TENSOR_Q5_K, {0, 2}},   {TENSOR_Q6_K, {208, -1}}, {TENSOR_F16, {0, -1}},
    {TENSOR_BF16, {-1, -1}},
};
#define N_FORMATS (sizeof formats / sizeof formats[0])

static struct backend *open_backend(struct model *m, uint32_t n_threads)
{
    struct backend_opts o = {.dtype = KV_F32, .n_threads = n_threads};
    struct larder_err e = {0, ""};
    struct backend *b = NULL;

    if (backend_find("cpu")->open(&b, m, &o, &e))
        fail_msg("%s", e.msg);
    return b;
}

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

/* Random codes with scales of about 0.01, or random elements. */
static struct cpu_blocks random_weight(size_t format, uint64_t *seed)
{
    const struct tensor_format *f = tensor_format(formats[format].type);
    struct cpu_blocks w;

    assert_int_equal(cpu_blocks_init(&w, f, N_OUT, N_IN, NULL), 0);
    for (uint64_t i = 0; i < N_OUT * w.row_bytes; i++)
        w.rows[i] = (uint8_t)(int)(test_randf(seed) * 127);
    for (uint64_t at = 0; at < N_OUT * w.row_bytes; at += f->block_bytes) {
        if (f->type == TENSOR_BF16)
            put16(w.rows + at, f32_to_bf16(test_randf(seed)));
        for (int k = 0; k < 2 && formats[format].scale[k] >= 0; k++)
            put16(w.rows + at + formats[format].scale[k], f32_to_f16(test_randf(seed) * 0.01f));
    }
    return w;
}

static void fill(float *x, size_t n, uint64_t *seed)
{
    for (size_t i = 0; i < n; i++)
        x[i] = test_randf(seed);
}

static void multiply(struct backend *b, const struct cpu_blocks *w, const float *x, uint32_t n,
                     bool add, float *y)
{
    struct cpu_product p = {w, y, LD, add};

    assert_int_equal(cpu_blocks_multiply(cpu_of(b), &p, 1, x, n, NULL), 0);
}

/* y[n][LD] against sums in f64; what is beyond N_OUT stays as it was. */
static void check(const struct cpu_blocks *w, const float *x, uint32_t n, const float *before,
                  bool add, const float *y)
{
    float value[N_IN];

    for (uint32_t r = 0; r < LD; r++) {
        if (r < N_OUT)
            w->format->to_f32(w->rows + r * w->row_bytes, w->n_blocks, value);
        for (uint32_t i = 0; i < n; i++) {
            double want = add ? before[i * LD + r] : 0, size = fabs(want);

            if (r >= N_OUT) {
                assert_memory_equal(&y[i * LD + r], &before[i * LD + r], sizeof *y);
                continue;
            }
            for (uint32_t k = 0; k < N_IN; k++) {
                want += (double)value[k] * x[i * N_IN + k];
                size += fabs((double)value[k] * x[i * N_IN + k]);
            }
            if (!(fabs(y[i * LD + r] - want) <= 2e-6 * size + 1e-6))
                fail_msg("%s, row %u of %u: output %u is %g, not %g", w->format->name, i, n, r,
                         y[i * LD + r], want);
        }
    }
}

static void products_of_every_format_are_those_of_its_values(void **state)
{
    static float x[MOST_ROWS * N_IN], y[MOST_ROWS * LD], before[MOST_ROWS * LD];
    const uint32_t rows[] = {1, 3, 4, MOST_ROWS};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 3);
    uint64_t seed = 11;

    (void)state;
    for (size_t f = 0; f < N_FORMATS; f++) {
        struct cpu_blocks w = random_weight(f, &seed);

        for (int i = 0; i < 8; i++) {
            fill(x, MOST_ROWS * N_IN, &seed);
            fill(before, MOST_ROWS * LD, &seed);
            memcpy(y, before, sizeof y);
            multiply(b, &w, x, rows[i / 2], i % 2, y);
            check(&w, x, rows[i / 2], before, i % 2, y);
        }
        /* through one expanded row, whatever this processor could do */
        w.dot = NULL;
        memcpy(y, before, sizeof y);
        multiply(b, &w, x, 1, true, y);
        check(&w, x, 1, before, true, y);
        cpu_blocks_done(&w);
    }
    b->ops->close(b);
}

static void bits_do_not_depend_on_threads(void **state)
{
    static float x[MOST_ROWS * N_IN], one[MOST_ROWS * LD], other[MOST_ROWS * LD];
    struct model m = fake_model();
    uint64_t seed = 12;

    (void)state;
    fill(x, MOST_ROWS * N_IN, &seed);
    for (size_t f = 0; f < N_FORMATS; f++) {
        struct cpu_blocks w = random_weight(f, &seed);

        for (uint32_t n = 1; n <= MOST_ROWS; n += MOST_ROWS - 1)
            for (uint32_t threads = 1; threads < 6; threads += 2) {
                struct backend *b = open_backend(&m, threads);

                multiply(b, &w, x, n, false, threads == 1 ? one : other);
                if (threads > 1)
                    assert_memory_equal(one, other, n * LD * sizeof *one);
                b->ops->close(b);
            }
        cpu_blocks_done(&w);
    }
}

/* ---- a layer */

enum { LONG = 150 };

static void near(const char *what, const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(a[i] - b[i]) <= 1e-4f * (1 + fabsf(a[i]))))
            fail_msg("%s %zu: %g packed, %g kept", what, i, a[i], b[i]);
}

static void steps_of_a_layer(struct backend *b, bool kept, uint32_t n, const float *in, float *q,
                             float *k, float *v, float *hidden)
{
    uint32_t pos[LONG];
    struct layer *l = NULL;
    struct project p = {hidden, pos, &b->p->rope, n, n, q, k, v};

    for (uint32_t i = 0; i < n; i++)
        pos[i] = 7 + i;
    memcpy(hidden, in, (size_t)n * FAKE_HIDDEN * sizeof *in);
    assert_int_equal(b->ops->layer_load(b, 3, kept, &l, NULL), 0);
    assert_int_equal(b->ops->qkv(b, l, &p, NULL), 0);
    assert_int_equal(b->ops->finish(b, l, hidden, q, n, NULL), 0);
    b->ops->layer_free(b, l);
}

static void a_kept_layer_computes_what_a_packed_one_does(void **state)
{
    enum { WIDE = FAKE_HEADS * FAKE_HEAD_DIM };
    static float in[LONG * FAKE_HIDDEN], q[2][LONG * WIDE], k[2][LONG * WIDE], v[2][LONG * WIDE],
        hidden[2][LONG * FAKE_HIDDEN];
    const uint32_t rows[] = {1, 5, LONG};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    uint64_t seed = 13;

    (void)state;
    fill(in, LONG * FAKE_HIDDEN, &seed);
    for (int i = 0; i < 3; i++) {
        uint32_t n = rows[i], kv = n * FAKE_KV_HEADS * FAKE_HEAD_DIM;

        for (int kept = 0; kept < 2; kept++)
            steps_of_a_layer(b, kept, n, in, q[kept], k[kept], v[kept], hidden[kept]);
        near("q", q[0], q[1], n * WIDE);
        near("k", k[0], k[1], kv);
        near("v", v[0], v[1], kv);
        near("hidden", hidden[0], hidden[1], n * FAKE_HIDDEN);
    }
    b->ops->close(b);
}

static void a_kept_output_matrix_gives_the_logits_of_one_read_in_slices(void **state)
{
    static float in[5 * FAKE_HIDDEN], out[2][5 * FAKE_VOCAB];
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct head *h = NULL;
    uint64_t seed = 14;

    (void)state;
    fill(in, 5 * FAKE_HIDDEN, &seed);
    assert_int_equal(b->ops->head_load(b, &h, NULL), 0);
    for (uint32_t n = 1; n <= 5; n += 4) {
        assert_int_equal(b->ops->logits(b, NULL, in, n, out[0], NULL), 0);
        assert_int_equal(b->ops->logits(b, h, in, n, out[1], NULL), 0);
        near("logit", out[0], out[1], n * FAKE_VOCAB);
    }
    b->ops->head_free(b, h);
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_of_every_format_are_those_of_its_values),
        cmocka_unit_test(bits_do_not_depend_on_threads),
        cmocka_unit_test(a_kept_layer_computes_what_a_packed_one_does),
        cmocka_unit_test(a_kept_output_matrix_gives_the_logits_of_one_read_in_slices),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
