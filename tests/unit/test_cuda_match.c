/* Attention matching of backend `cuda`, on a device that is host memory (tests/cuda), against the
 * host's (match_fit.c): the same values and biases, whatever fits in memory at once, and the same
 * way out where a matrix is singular. */
#include "testlib.h"

#include <math.h>

#include "cuda_fixture.h"
#include "engine.h"
#include "match.h"

enum { HEADS_MAX = 4, KEPT = 400 };

/* ---- one layer: a document, its replay in three chunks, and what is kept of it */

struct shape {
    uint32_t n_doc, start, n_heads, n_kv, d;
    enum kv_dtype elem, precision;
    bool with_bias;
    uint32_t span;             /* document rows that are fitted together */
    uint64_t logit_bytes;      /* of the device */
    uint32_t every[HEADS_MAX]; /* of a head every so many rows are kept; 0: none */
};

struct layer_case {
    struct shape s;
    struct model m;
    struct replay_chunk chunk[3];
    struct replay r;
    uint32_t stride;
    float *q, *k, *v;        /* what the elements hold */
    void *q_t, *k_t, *v_t;   /* elements */
    uint32_t position[KEPT]; /* head after head */
    struct kept_rows heads[HEADS_MAX];
    uint32_t n_kept;
};

struct fitted {
    float k[KEPT * 128], v[KEPT * 128], bias[KEPT];
};

static struct fitted want, got;

static void choose(struct layer_case *c)
{
    for (uint32_t g = 0; g < c->s.n_kv; g++) {
        c->heads[g] = (struct kept_rows){.position = c->position + c->n_kept, .dtype = c->s.elem};
        for (uint32_t j = g; j < c->s.n_doc && c->s.every[g]; j += c->s.every[g]) {
            assert_true(c->n_kept < KEPT);
            c->position[c->n_kept++] = j;
            c->heads[g].n_rows++;
        }
    }
}

static struct layer_case *make_case(const struct shape *s)
{
    uint32_t third = (s->n_doc - s->start) / 3, at = s->start;
    struct layer_case *c = calloc(1, sizeof *c);
    uint64_t seed = s->n_doc + s->d;

    assert_non_null(c);
    c->s = *s;
    c->m = fake_model();
    c->stride = s->n_doc + 95 + 3;
    c->m.p.geom = (struct kv_geom){1, s->n_heads, s->n_kv, s->d};
    c->q = random_rows((size_t)s->n_heads * c->stride * s->d, 3, &seed);
    c->k = random_rows((size_t)s->n_kv * c->stride * s->d, 1, &seed);
    c->v = random_rows((size_t)s->n_kv * c->stride * s->d, 1, &seed);
    c->q_t = elements(c->q, (size_t)s->n_heads * c->stride * s->d, s->elem);
    c->k_t = elements(c->k, (size_t)s->n_kv * c->stride * s->d, s->elem);
    c->v_t = elements(c->v, (size_t)s->n_kv * c->stride * s->d, s->elem);
    c->chunk[0] = (struct replay_chunk){at, at + third, 0, 40};
    c->chunk[1] = (struct replay_chunk){at + third, at + 2 * third, 40, 37};
    c->chunk[2] = (struct replay_chunk){at + 2 * third, s->n_doc - 1, 77, 18};
    c->r = (struct replay){
        .n_doc = s->n_doc, .chunk = c->chunk, .n_chunks = 3, .n_rows = 95, .max_rows = 40};
    choose(c);
    return c;
}

static void free_case(struct layer_case *c)
{
    free(c->q);
    free(c->k);
    free(c->v);
    free(c->q_t);
    free(c->k_t);
    free(c->v_t);
    free(c);
}

/* The kept rows one after the other, in memory of the backend. */
static void gather(struct backend *b, struct layer_case *c, const void *k, const void *v,
                   uint32_t row, uint8_t **ret_k, uint8_t **ret_v)
{
    uint8_t *to_k = backend_buffer_new(b, c->n_kept + 1, row);
    uint8_t *to_v = backend_buffer_new(b, c->n_kept + 1, row);
    uint64_t at = 0;

    assert_int_equal(backend_view(b, to_k, VIEW_WRITE, NULL), 0);
    assert_int_equal(backend_view(b, to_v, VIEW_WRITE, NULL), 0);
    for (uint32_t g = 0; g < c->s.n_kv; g++) {
        struct kept_rows *h = &c->heads[g];

        h->k = to_k + at * row;
        h->v = to_v + at * row;
        for (uint32_t i = 0; i < h->n_rows; i++, at++) {
            uint64_t from = (uint64_t)g * c->stride + h->position[i];

            memcpy(to_k + at * row, (const uint8_t *)k + from * row, row);
            memcpy(to_v + at * row, (const uint8_t *)v + from * row, row);
        }
    }
    *ret_k = to_k;
    *ret_v = to_v;
}

/* A copy of what a call left in a buffer of the backend. */
static void take(struct backend *b, float *from, float *to, size_t n)
{
    assert_int_equal(backend_view(b, from, VIEW_READ, NULL), 0);
    memcpy(to, from, n * sizeof *to);
    backend_buffer_free(b, from);
}

static int fit_on(struct backend *b, struct layer_case *c, bool typed, struct fitted *ret,
                  struct larder_err *e)
{
    const struct replay_rows x = {typed ? c->q_t : c->q, typed ? c->k_t : c->k, c->stride, NULL,
                                  NULL};
    const void *v = typed ? c->v_t : c->v;
    struct match_opts o = {c->s.precision, c->s.with_bias};
    uint64_t n = (uint64_t)c->n_kept * c->s.d;
    uint32_t row = c->s.d * (b->elem == KV_F32 ? 4 : 2);
    double *score = malloc(sizeof *score * c->s.n_kv * c->s.n_doc);
    float *to_k = backend_staging_new(b, n, sizeof *to_k);
    float *to_v = backend_buffer_new(b, n, sizeof *to_v);
    float *bias = backend_staging_new(b, c->n_kept, sizeof *bias);
    struct match *m = NULL;
    uint8_t *k_rows, *v_rows;
    int rc;

    gather(b, c, x.k, v, row, &k_rows, &v_rows);
    for (uint32_t g = 0; g < c->s.n_kv; g++)
        c->heads[g].dtype = b->elem;
    rc = match_open(&m, b, &c->r, c->s.span, e);
    if (!rc)
        rc = match_layer(m, &x, v, score, e);
    if (!rc)
        rc = match_fit(m, &o, c->heads, to_k, to_v, bias, e);
    match_close(m);
    take(b, to_k, ret->k, n);
    take(b, to_v, ret->v, n);
    take(b, bias, ret->bias, c->n_kept);
    backend_buffer_free(b, k_rows);
    backend_buffer_free(b, v_rows);
    free(score);
    return rc;
}

static int fit_here(struct layer_case *c, struct larder_err *e)
{
    struct backend *ref = open_on(&backend_ref, &c->m, KV_F32);
    int rc = fit_on(ref, c, false, &want, e);

    ref->ops->close(ref);
    return rc;
}

static int fit_there(struct layer_case *c, struct larder_err *e)
{
    struct backend *b;
    int rc;

    fresh_device();
    b = open_on(&backend_cuda, &c->m, c->s.elem);
    cuda_of(b)->logit_bytes = c->s.logit_bytes;
    rc = fit_on(b, c, true, &got, e);
    close_clean(b);
    return rc;
}

/* What a replay row of a query head gets from the kept rows of its KV head. */
static void attend(const struct layer_case *c, const struct fitted *f, uint32_t h, uint32_t row,
                   double *ret)
{
    uint32_t d = c->s.d, g = h / (c->s.n_heads / c->s.n_kv), at = 0;
    const float *q = c->q + ((uint64_t)h * c->stride + c->s.n_doc + row) * d;
    double sum = 0;

    for (uint32_t i = 0; i < g; i++)
        at += c->heads[i].n_rows;
    memset(ret, 0, d * sizeof *ret);
    for (uint32_t i = at; i < at + c->heads[g].n_rows; i++) {
        double x = 0;

        for (uint32_t j = 0; j < d; j++)
            x += (double)q[j] * f->k[i * d + j] / sqrt(d);
        x = exp(x + (c->s.with_bias ? f->bias[i] : 0));
        sum += x;
        for (uint32_t j = 0; j < d; j++)
            ret[j] += x * f->v[i * d + j];
    }
    for (uint32_t j = 0; j < d && sum > 0; j++)
        ret[j] /= sum;
}

/* How far apart two fits are in what the queries get, in parts of it. */
static double distance(const struct layer_case *c, const struct fitted *a, const struct fitted *b)
{
    double w[128], o[128], err = 0, all = 0;

    for (uint32_t h = 0; h < c->s.n_heads; h++)
        for (uint32_t row = 0; row < 95; row++) {
            attend(c, a, h, row, w);
            attend(c, b, h, row, o);
            for (uint32_t j = 0; j < c->s.d; j++) {
                err += pow(w[j] - o[j], 2);
                all += pow(w[j], 2);
            }
        }
    return sqrt(err / all);
}

/* The kept rows as they are in the document. */
static void unfitted(const struct layer_case *c, struct fitted *ret)
{
    uint32_t d = c->s.d, at = 0;

    memset(ret, 0, sizeof *ret);
    for (uint32_t g = 0; g < c->s.n_kv; g++)
        for (uint32_t i = 0; i < c->heads[g].n_rows; i++, at++) {
            uint64_t from = ((uint64_t)g * c->stride + c->heads[g].position[i]) * d;

            memcpy(ret->k + at * d, c->k + from, d * sizeof *c->k);
            memcpy(ret->v + at * d, c->v + from, d * sizeof *c->v);
        }
}

/* Weights that no query tells apart may differ; what queries get may not. */
static void compare(const struct layer_case *c)
{
    static struct fitted raw;
    double off = distance(c, &want, &got), moved;

    unfitted(c, &raw);
    moved = distance(c, &want, &raw);
    for (uint32_t i = 0; i < c->n_kept * c->s.d; i++)
        assert_true(want.k[i] == raw.k[i] && got.k[i] == raw.k[i]);
    if (!(off < 1e-3 && moved > 0.02))
        fail_msg("%u rows of %u, d %u: outputs differ by %g where the fit moves them by %g",
                 c->n_kept, c->s.n_doc, c->s.d, off, moved);
}

static void check(struct shape s)
{
    struct layer_case *c = make_case(&s);
    struct larder_err e = {0, ""};

    if (fit_here(c, &e) || fit_there(c, &e))
        fail_msg("%s", e.msg);
    compare(c);
    free_case(c);
}

static const struct shape plain = {.n_doc = 150,
                                   .n_heads = 6,
                                   .n_kv = 2,
                                   .d = 32,
                                   .elem = KV_F32,
                                   .precision = KV_BF16,
                                   .with_bias = true,
                                   .span = 40,
                                   .logit_bytes = 8 << 20,
                                   .every = {5, 9, 4, 6}};

static void fits_are_the_hosts(void **state)
{
    const uint32_t dims[] = {32, 64, 80, 96, 128};
    const enum kv_dtype precisions[] = {KV_BF16, KV_INT8, KV_INT4};
    struct shape s = plain;

    (void)state;
    for (int i = 0; i < 5; i++) {
        s.d = dims[i];
        s.elem = i % 2 ? KV_BF16 : KV_F32;
        s.precision = precisions[i % 3];
        s.with_bias = i != 3;
        check(s);
    }
    for (uint32_t group = 1; group <= 16; group *= 4) {
        s = plain;
        s.n_kv = 1;
        s.n_heads = group;
        check(s);
    }
    s = plain;
    s.span = 0; /* all at once */
    check(s);
    s.start = 20; /* rows before the first chunk are its group's */
    s.n_heads = 4;
    s.n_kv = 4;
    check(s);
}

/* Heads that keep nothing, one row, everything. */
static void heads_keep_what_they_like(void **state)
{
    struct shape s = plain;

    (void)state;
    s.n_kv = 3;
    s.every[0] = 0;
    s.every[1] = 1000;
    s.every[2] = 1;
    check(s);
    s.precision = KV_INT4;
    check(s);
}

static void fits_do_not_depend_on_what_fits_in_memory(void **state)
{
    struct shape s = plain;

    (void)state;
    for (s.logit_bytes = 1; s.logit_bytes < 1 << 20; s.logit_bytes *= 8)
        check(s);
    s.n_heads = s.n_kv = 3;
    s.logit_bytes = 1 << 18;
    check(s);
}

/* Rows that little is asked of want weights below the least, and get it. */
static void weights_stop_at_their_bounds(void **state)
{
    struct shape s = plain;
    struct layer_case *c;
    uint32_t least = 0, other = 0;

    (void)state;
    s.every[0] = 1;
    s.every[1] = 2;
    c = make_case(&s);
    assert_int_equal(fit_here(c, NULL) | fit_there(c, NULL), 0);
    for (uint32_t i = 0; i < c->n_kept; i++) {
        least += want.bias[i] < -3.9f && got.bias[i] < -3.9f;
        other += (want.bias[i] < -3.9f) != (got.bias[i] < -3.9f);
    }
    assert_true(least > 0 && other == 0);
    free_case(c);
}

/* ---- what goes wrong */

static void what_is_not_finite_ends_the_job(void **state)
{
    struct layer_case *c = make_case(&plain);
    struct larder_err e = {0, ""};
    uint64_t row = (uint64_t)c->heads[1].position[3] + c->stride;

    (void)state;
    ((float *)c->v_t)[row * c->s.d + 7] = NAN;
    assert_int_equal(fit_there(c, &e), LARDER_ENUMERIC);
    assert_true(strstr(e.msg, "rows is not positive definite") != NULL);
    free_case(c);
}

#ifndef LARDER_ON_GPU

/* A larger ridge is tried, and another; then the job ends. */
static void singular_matrices_get_larger_ridges(void **state)
{
    struct layer_case *c = make_case(&plain);
    struct larder_err e = {0, ""};
    long solved;

    (void)state;
    assert_int_equal(fit_here(c, NULL) | fit_there(c, NULL), 0);
    solved = fake.count[FAKE_SOLVE];
    for (long bad = 1; bad <= 4; bad++) {
        struct backend *b;

        fake_reset();
        fake.indefinite = bad;
        b = open_on(&backend_cuda, &c->m, c->s.elem);
        assert_int_equal(fit_on(b, c, true, &got, &e), 0);
        assert_int_equal(fake.count[FAKE_SOLVE], solved + bad);
        assert_true(distance(c, &want, &got) < 0.05);
        close_clean(b);
    }
    {
        struct backend *b;

        fake_reset();
        fake.indefinite = 1000;
        b = open_on(&backend_cuda, &c->m, c->s.elem);
        assert_int_equal(fit_on(b, c, true, &got, &e), LARDER_ENUMERIC);
        assert_int_equal(fake.count[FAKE_SOLVE], 2 * 5); /* two heads climb side by side */
        close_clean(b);
    }
    free_case(c);
}

#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fits_are_the_hosts),
        cmocka_unit_test(heads_keep_what_they_like),
        cmocka_unit_test(fits_do_not_depend_on_what_fits_in_memory),
        cmocka_unit_test(weights_stop_at_their_bounds),
        cmocka_unit_test(what_is_not_finite_ends_the_job),
#ifndef LARDER_ON_GPU
        cmocka_unit_test(singular_matrices_get_larger_ridges),
#endif
    };

    skip_without_gpu();
    return cmocka_run_group_tests_name("cuda/match", tests, NULL, NULL);
}
