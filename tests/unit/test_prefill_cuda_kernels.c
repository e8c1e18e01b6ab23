/* Every CUDA kernel against the formulas it follows: built for a processor (tests/cuda/shim.h) here,
 * and for a GPU by make check-cuda, which also runs the sizes that take a processor too long. */
#include "testlib.h"

#include <math.h>

#include "cuda.h"
#include "half.h"
#include "harness.h"
#include "packed.h"

/* ---- helpers */

static void run(struct cuda_launch l)
{
    assert_int_equal(kernel_run(&l), 0);
}

/* n objects that kernels can reach. */
#define NEW(type, n) ((type *)kernel_alloc((n) * sizeof(type)))

static float *random_f32(size_t n, uint64_t *seed)
{
    float *x = NEW(float, n);

    for (size_t i = 0; i < n; i++)
        x[i] = test_randf(seed);
    return x;
}

/* Elements of T in 16-byte aligned memory, from f32 values that T represents afterwards. */
static void *to_elements(float *x, size_t n, bool bf16)
{
    size_t bytes = n * (bf16 ? 2 : 4);
    void *p = kernel_alloc(bytes);

    if (!bf16)
        memcpy(p, x, bytes);
    for (size_t i = 0; i < n && bf16; i++) {
        ((uint16_t *)p)[i] = f32_to_bf16(x[i]);
        x[i] = bf16_to_f32(((uint16_t *)p)[i]);
    }
    return p;
}

static float element(const void *p, bool bf16, size_t i)
{
    return bf16 ? bf16_to_f32(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* Normalised mean square error. */
static double nmse(const float *want, const float *got, size_t n)
{
    double err = 0, all = 0;

    for (size_t i = 0; i < n; i++) {
        err += ((double)want[i] - got[i]) * ((double)want[i] - got[i]);
        all += (double)want[i] * want[i];
    }
    return isfinite(err) ? err / all : INFINITY;
}

/* ---- weights */

static void every_format_gives_the_exact_values(void **state)
{
    const uint32_t types[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_Q4_0, TENSOR_Q4_1,
                              TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q4_K,
                              TENSOR_Q5_K, TENSOR_Q6_K, TENSOR_BF16};
    uint64_t seed = 3;

    (void)state;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        const struct tensor_format *f = tensor_format(types[t]);
        size_t n_blocks = 37, n = n_blocks * f->block_len, bytes = n_blocks * f->block_bytes;
        uint8_t *raw = kernel_alloc(bytes);
        float *want = kernel_alloc(n * sizeof *want), *got = kernel_alloc(n * sizeof *got);
        uint16_t *narrow = kernel_alloc(n * sizeof *narrow), *rounded = kernel_alloc(n * sizeof *rounded);
        struct cuda_dequant_args a = {raw, got, n, f->type, f->block_len, f->block_bytes};

        for (size_t i = 0; i < bytes; i++)
            raw[i] = (uint8_t)(test_rand(&seed) >> 40);
        f->to_f32(raw, n_blocks, want);
        run(cuda_grid_flat(CUDA_DEQUANT, false, n, &a));
        a.dst = narrow;
        run(cuda_grid_flat(CUDA_DEQUANT, true, n, &a));
        dequant_round_bf16(want, n, rounded);
        for (size_t i = 0; i < n; i++) { /* the sign of a NaN is nobody's concern */
            if (isnan(want[i]) ? !isnan(got[i]) : f32_bits(want[i]) != f32_bits(got[i]))
                fail_msg("%s: element %zu is %g, not %g", f->name, i, got[i], want[i]);
            if (!isnan(want[i]) && narrow[i] != rounded[i])
                fail_msg("%s: element %zu is bf16 %04x, not %04x", f->name, i, narrow[i],
                         rounded[i]);
        }
        kernel_free(raw);
        kernel_free(want);
        kernel_free(got);
        kernel_free(narrow);
        kernel_free(rounded);
    }
}

/* ---- rows */

static void rmsnorm_of_odd_widths(void **state)
{
    const uint32_t widths[] = {1, 33, 576, 4097};
    uint64_t seed = 4;

    (void)state;
    for (int c = 0; c < 8; c++) {
        uint32_t n = widths[c / 2], rows = 3;
        bool bf16 = c % 2;
        float *x = random_f32(rows * n, &seed), *w = random_f32(n, &seed);
        void *out = kernel_alloc(rows * n * 4);
        struct cuda_rmsnorm_args a = {x, w, out, n, 1e-5};

        run(cuda_grid_rows(CUDA_RMSNORM, bf16, rows, &a));
        for (uint32_t r = 0; r < rows; r++) {
            double sum = 0;

            for (uint32_t i = 0; i < n; i++)
                sum += (double)x[r * n + i] * x[r * n + i];
            for (uint32_t i = 0; i < n; i++) {
                double want = x[r * n + i] / sqrt(sum / n + 1e-5) * w[i];

                assert_true(fabs(element(out, bf16, r * n + i) - want) <=
                            (bf16 ? 5e-3 : 1e-6) * fabs(want) + 1e-9);
            }
        }
        kernel_free(x);
        kernel_free(w);
        kernel_free(out);
    }
}

static void rope_rotates_queries_and_keys_and_scatters(void **state)
{
    enum { N = 5, H = 3, KV = 1, D = 10, DIMS = 8, STRIDE = 9, ROW0 = 2, ALL = (H + 2 * KV) * D };
    const uint32_t at_pos[N] = {0, 1, 77, 100000, 131071};
    uint64_t seed = 5;
    uint32_t *pos = NEW(uint32_t, N);
    float *x = random_f32(N * ALL, &seed), *table = NEW(float, N *DIMS);
    float *q = NEW(float, H *STRIDE *D), *k = NEW(float, KV *STRIDE *D);
    float *v = NEW(float, KV *STRIDE *D);
    double *freq = NEW(double, DIMS / 2);
    struct cuda_angles_args angles = {pos, freq, table, N, DIMS / 2};
    struct cuda_rope_args a = {x, table, q, k, v, H, KV, D, DIMS, ROW0, STRIDE};

    (void)state;
    memcpy(pos, at_pos, sizeof at_pos);
    for (int i = 0; i < DIMS / 2; i++)
        freq[i] = pow(5e5, -2.0 * i / DIMS);
    run(cuda_grid_flat(CUDA_ANGLES, false, N * DIMS / 2, &angles));
    run(cuda_grid_rows(CUDA_ROPE, false, N, &a));
    for (int r = 0; r < N; r++)
        for (int h = 0; h < H + 2 * KV; h++)
            for (int c = 0; c < D; c++) {
                const float *head = x + r * ALL + h * D;
                int half = DIMS / 2, j = c % half;
                double at = pos[r] * freq[j], want = head[c];
                const float *to = h < H ? q + h * STRIDE * D : h < H + KV ? k : v;

                if (c < DIMS && h < H + KV)
                    want = c < half ? head[c] * cos(at) - head[c + half] * sin(at)
                                    : head[c] * cos(at) + head[c - half] * sin(at);
                assert_true(fabs(to[(ROW0 + r) * D + c] - want) < 1e-6);
            }
    for (int c = 0; c < D; c++) /* rows around them are left alone */
        assert_true(q[(ROW0 - 1) * D + c] == 0 && q[(ROW0 + N) * D + c] == 0);
    kernel_free(pos);
    kernel_free(freq);
    kernel_free(table);
    kernel_free(q);
    kernel_free(k);
    kernel_free(v);
    kernel_free(x);
}

static void swiglu_is_silu_times_up(void **state)
{
    enum { N = 3, FF = 301 };
    uint64_t seed = 6;
    float *x = random_f32(2 * N * FF, &seed), *out = NEW(float, N *FF);
    struct cuda_swiglu_args a = {x, out, N, FF};

    (void)state;
    run(cuda_grid_flat(CUDA_SWIGLU, false, N * FF, &a));
    for (int i = 0; i < N * FF; i++) {
        double g = x[i / FF * 2 * FF + i % FF], up = x[i / FF * 2 * FF + FF + i % FF];

        assert_true(fabs(out[i] - g / (1 + exp(-g)) * up) < 1e-6);
    }
    kernel_free(out);
    kernel_free(x);
}

/* ---- stored rows */

static void check_past(enum kv_dtype t, uint32_t n, uint32_t d, uint64_t *seed)
{
    float *rows = random_f32(n * d, seed), *want = kernel_alloc(n * d * sizeof *want);
    float *got = kernel_alloc(n * d * sizeof *got);
    uint8_t *tile = kernel_alloc(tile_bytes_k(t, n, d) + tile_bytes_v(t, n, d));

    for (int keys = 0; keys < 2; keys++) {
        struct packed_parts p = keys ? packed_parts_k(t, n, d) : packed_parts_v(t, n, d);
        struct cuda_past_args a = {tile, got, n, d, t, keys, p.n_exact, p.scales, p.codes, true};

        if (keys) {
            packed_from_k(t, rows, n, d, tile);
            packed_expand_k_f32(t, tile, n, d, want);
        } else {
            packed_from_v(t, rows, n, d, tile);
            packed_expand_v_f32(t, tile, n, d, want);
        }
        run(cuda_grid_flat(CUDA_PAST, true, (uint64_t)n * d, &a));
        if (memcmp(want, got, n * d * sizeof *got))
            fail_msg("type %d, %u rows of %u, keys %d", t, n, d, keys);
    }
    kernel_free(rows);
    kernel_free(want);
    kernel_free(got);
    kernel_free(tile);
}

static void packed_rows_expand_to_the_same_bits(void **state)
{
    const uint32_t rows[] = {1, 4, 5, 31, 33, 100}, dims[] = {64, 80, 96, 128};
    uint64_t seed = 7;

    (void)state;
    for (int i = 0; i < 24; i++) {
        check_past(KV_INT8, rows[i % 6], dims[i / 6], &seed);
        check_past(KV_INT4, rows[i % 6], dims[i / 6], &seed);
    }
}

static void own_rows_stand_behind_stored_ones(void **state)
{
    enum { KV = 2, N = 3, D = 4, STRIDE = 5, TO = 11 };
    uint32_t *n_past = NEW(uint32_t, KV);
    uint64_t seed = 8;
    float *src = random_f32(KV * STRIDE * D, &seed), *dst = NEW(float, KV *TO *D);
    struct cuda_tail_args a = {src, dst, n_past, STRIDE, TO, N, D, KV, true};

    (void)state;
    n_past[1] = 7;
    run(cuda_grid_flat(CUDA_TAIL, false, KV * N * D, &a));
    for (uint32_t i = 0; i < KV * TO * D; i++) {
        uint32_t g = i / (TO * D), r = i / D % TO, c = i % D;
        bool there = r >= n_past[g] && r < n_past[g] + N;

        assert_true(dst[i] == (there ? src[(g * STRIDE + r - n_past[g]) * D + c] : 0));
    }
    kernel_free(n_past);
    kernel_free(dst);
    kernel_free(src);
}

/* ---- attention */

struct shape {
    uint32_t n_heads, n_kv, d, n_rows, row0, n_tail;
    uint32_t n_past[4]; /* per KV head */
    bool bias;
};

/* Softmax in f64 for one row of one head. */
static void plain_row(const struct shape *s, const struct cuda_attend_args *a, const float *q,
                      const float *k, const float *v, uint32_t h, uint32_t i, float *out)
{
    uint32_t g = h / a->group, n = s->n_past[g] + s->n_tail - s->n_rows + i + 1, d = s->d;
    const float *x = q + (h * a->q_stride + i) * d;
    double *p = kernel_alloc(n * sizeof *p), max = -INFINITY, sum = 0;

    for (uint32_t j = 0; j < n; j++) {
        const float *key = k + (g * a->kv_stride + j) * d;

        p[j] = 0;
        for (uint32_t c = 0; c < d; c++)
            p[j] += (double)x[c] * key[c];
        p[j] /= sqrt(d);
        if (a->bias && j < s->n_past[g])
            p[j] += a->bias[g * a->bias_stride + j];
        max = fmax(max, p[j]);
    }
    for (uint32_t j = 0; j < n; j++)
        sum += p[j] = exp(p[j] - max);
    for (uint32_t c = 0; c < d; c++) {
        double o = 0;

        for (uint32_t j = 0; j < n; j++)
            o += p[j] / sum * v[(g * a->kv_stride + j) * d + c];
        out[c] = (float)o;
    }
    kernel_free(p);
}

static void check_attend(struct shape s, bool bf16, bool wide, enum cuda_kernel kernel)
{
    uint64_t seed = 9 + s.n_rows + 1000 * s.d;
    uint32_t most = 0, d = s.d;
    size_t n_q, n_kv, n_o = (size_t)s.n_rows * s.n_heads * d;
    float *want = NEW(float, n_o), *got = NEW(float, n_o);
    float *qf, *kf, *vf, *bias;
    uint32_t *n_past = NEW(uint32_t, 4);
    void *q, *k, *v, *o = kernel_alloc(n_o * 4);
    struct cuda_attend_args a = {.n_heads = s.n_heads, .group = s.n_heads / s.n_kv, .d = d,
                                 .n_rows = s.n_rows, .row0 = s.row0, .n_tail = s.n_tail,
                                 .scale = (float)(1 / sqrt(d))};
    struct cuda_launch l;

    for (uint32_t g = 0; g < s.n_kv; g++)
        most = s.n_past[g] > most ? s.n_past[g] : most;
    a.q_stride = s.n_rows + 3;
    a.kv_stride = most + s.n_tail + 2;
    a.bias_stride = most;
    n_q = s.n_heads * a.q_stride * d;
    n_kv = s.n_kv * a.kv_stride * d;
    qf = random_f32(n_q, &seed);
    kf = random_f32(n_kv, &seed);
    vf = random_f32(n_kv, &seed);
    for (size_t i = 0; i < n_q; i++)
        qf[i] *= 4; /* probabilities far from even */
    bias = random_f32(s.n_kv * most + 1, &seed);
    q = to_elements(qf, n_q, bf16);
    k = to_elements(kf, n_kv, bf16 && !wide);
    v = to_elements(vf, n_kv, bf16 && !wide);
    memset(o, 0xff, n_o * 4);
    a.q = q;
    a.k = k;
    a.v = v;
    a.o = o;
    a.bias = s.bias ? bias : NULL;
    memcpy(n_past, s.n_past, sizeof s.n_past);
    a.n_past = most ? n_past : NULL;
    l = cuda_grid_attend(&a, bf16, wide);
    assert_int_equal(l.kernel, kernel);
    run(l);
    for (uint32_t i = 0; i < s.n_rows; i++)
        for (uint32_t h = 0; h < s.n_heads; h++) {
            size_t at = ((size_t)i * s.n_heads + h) * d;

            for (uint32_t c = 0; c < d; c++) {
                got[at + c] = element(o, bf16, at + c);
                if (i < s.row0 && !isnan(got[at + c]))
                    fail_msg("row %u was written", i);
            }
            if (i >= s.row0)
                plain_row(&s, &a, qf, kf, vf, h, i, want + at);
        }
    {
        size_t from = (size_t)s.row0 * s.n_heads * d;
        double err = nmse(want + from, got + from, n_o - from);

        /* f32 sums; bf16: outputs, and in tensor cores probabilities, have 8 bits */
        if (!(err < (bf16 ? 2e-5 : 1e-11)))
            fail_msg("%u rows of %u, %u on %u heads, bf16 %d, wide %d: error %g", s.n_rows, d,
                     s.n_heads, s.n_kv, bf16, wide, err);
    }
    kernel_free(qf);
    kernel_free(kf);
    kernel_free(vf);
    kernel_free(bias);
    kernel_free(n_past);
    kernel_free(q);
    kernel_free(k);
    kernel_free(v);
    kernel_free(o);
    kernel_free(want);
    kernel_free(got);
}

static struct shape causal(uint32_t n, uint32_t d, uint32_t n_heads, uint32_t n_kv)
{
    return (struct shape){.n_heads = n_heads, .n_kv = n_kv, .d = d, .n_rows = n, .n_tail = n};
}

static void attention_of_odd_lengths_and_head_sizes(void **state)
{
    const uint32_t rows[] = {1, 31, 33, 65, 129}, dims[] = {64, 80, 96, 128};

    (void)state;
    for (int i = 0; i < 20; i++) {
        uint32_t n = rows[i % 5], d = dims[i / 5];

        check_attend(causal(n, d, 2, 1), false, false, CUDA_ATTEND);
        check_attend(causal(n, d, 2, 1), true, false, CUDA_ATTEND_MMA);
    }
    check_attend(causal(70, 32, 2, 2), true, false, CUDA_ATTEND_MMA);
    check_attend(causal(70, 72, 2, 1), true, false, CUDA_ATTEND); /* no tensor core kernel */
    check_attend(causal(40, 256, 1, 1), true, false, CUDA_ATTEND);
    check_attend(causal(20, 2, 1, 1), false, false, CUDA_ATTEND);
}

static void attention_of_any_number_of_query_heads_per_key(void **state)
{
    (void)state;
    for (uint32_t group = 1; group <= 16; group += group < 4 ? 1 : 4) {
        check_attend(causal(35, 64, 2 * group, 2), false, false, CUDA_ATTEND);
        check_attend(causal(35, 64, 2 * group, 2), true, false, CUDA_ATTEND_MMA);
    }
}

static void attention_from_a_row_on(void **state)
{
    (void)state;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        enum cuda_kernel k = bf16 ? CUDA_ATTEND_MMA : CUDA_ATTEND;
        struct shape s = causal(100, 64, 4, 2);

        s.row0 = 99;
        check_attend(s, bf16, false, k);
        s.row0 = 37;
        check_attend(s, bf16, false, k);
    }
}

static void resumed_rows_see_ragged_biased_pasts(void **state)
{
    struct shape s = {4, 2, 64, 5, 0, 9, {70, 0}, false};

    (void)state;
    for (int i = 0; i < 2; i++) {
        s.bias = i;
        check_attend(s, false, false, CUDA_ATTEND);
        check_attend(s, true, false, CUDA_ATTEND_MMA);
        check_attend(s, true, true, CUDA_ATTEND);
        s.n_rows = s.n_tail = 1;
        s.n_past[0] = 63;
        s.n_past[1] = 130;
    }
}

static void a_key_that_is_not_finite_reaches_the_rows_that_see_it(void **state)
{
    enum { N = 70, D = 64, BAD = 65 };
    uint64_t seed = 12;

    (void)state;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        float *x = random_f32(N * D, &seed), *o = kernel_alloc(N * D * sizeof *o);
        void *q = to_elements(x, N * D, bf16), *v = to_elements(x, N * D, bf16), *k;
        struct cuda_attend_args a = {.n_heads = 1, .group = 1, .d = D, .n_rows = N, .n_tail = N,
                                     .q_stride = N, .kv_stride = N, .scale = .125f};

        x[BAD * D + 3] = NAN;
        k = to_elements(x, N * D, bf16);
        a.q = q;
        a.k = k;
        a.v = v;
        a.o = o;
        run(cuda_grid_attend(&a, bf16, false));
        for (uint32_t i = 0; i < N; i++)
            assert_int_equal(isfinite(element(o, bf16, i * D)) != 0, i < BAD);
        kernel_free(x);
        kernel_free(o);
        kernel_free(q);
        kernel_free(k);
        kernel_free(v);
    }
}

/* ---- window */

static void check_window(uint32_t n, uint32_t w, uint32_t d, bool bf16)
{
    enum { H = 4, KV = 2 };
    uint64_t seed = 10 + n;
    uint32_t stride = n + 2, m = n - w;
    float *qf = random_f32(H * stride * d, &seed), *kf = random_f32(KV * stride * d, &seed);
    void *q = to_elements(qf, H * stride * d, bf16), *k = to_elements(kf, KV * stride * d, bf16);
    float *logit = kernel_alloc(H * w * n * sizeof *logit), *stat = NEW(float, H *64 * 2);
    float *mass = kernel_alloc(H * m * sizeof *mass), *want = kernel_alloc((H * m) * sizeof *want);
    double *p = kernel_alloc(n * sizeof *p);
    struct cuda_window_args a = {q, k, logit, stat, mass, stride, n, w, d, H / KV,
                                 0, 3, (float)(1 / sqrt(d))};

    for (; a.head0 < H; a.head0 += 3, a.n_batch = 1) { /* three heads, then one */
        run(cuda_grid_window(CUDA_WINDOW_LOGITS, bf16, &a));
        run(cuda_grid_window(CUDA_WINDOW_STATS, bf16, &a));
        run(cuda_grid_window(CUDA_WINDOW_MASS, bf16, &a));
    }
    for (uint32_t h = 0; h < H; h++)
        for (uint32_t i = 0; i < w; i++) {
            double sum = 0;

            for (uint32_t j = 0; j <= m + i; j++) {
                p[j] = 0;
                for (uint32_t c = 0; c < d; c++)
                    p[j] += (double)qf[(h * stride + m + i) * d + c] *
                            kf[(h / (H / KV) * stride + j) * d + c];
                sum += p[j] = exp(p[j] / sqrt(d));
            }
            for (uint32_t j = 0; j < m; j++)
                want[h * m + j] += (float)(p[j] / sum);
        }
    assert_true(nmse(want, mass, H * m) < 1e-11);
    kernel_free(qf);
    kernel_free(kf);
    kernel_free(q);
    kernel_free(k);
    kernel_free(logit);
    kernel_free(stat);
    kernel_free(mass);
    kernel_free(want);
    kernel_free(p);
}

static void window_mass_of_odd_sizes(void **state)
{
    (void)state;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        check_window(2, 1, 64, bf16);
        check_window(33, 32, 80, bf16);
        check_window(65, 17, 96, bf16);
        check_window(200, 33, 128, bf16);
    }
}

/* Sizes that a processor would take minutes for. */
static void long_rows(void **state)
{
    const uint32_t dims[] = {64, 80, 96, 128};

    (void)state;
    if (!kernel_is_device())
        skip();
    for (int i = 0; i < 4; i++) {
        struct shape s = causal(4097, dims[i], 4, 1);

        s.row0 = 4000; /* the comparison is on the host */
        check_attend(s, false, false, CUDA_ATTEND);
        check_attend(s, true, false, CUDA_ATTEND_MMA);
        check_window(4097, 33, dims[i], true);
    }
}

static void the_same_input_gives_the_same_bits(void **state)
{
    enum { N = 90, D = 64 };
    uint64_t seed = 11;
    float *x = random_f32(3 * N * D, &seed);
    uint16_t *t = to_elements(x, 3 * N * D, true);
    uint16_t *first = NEW(uint16_t, N *D), *second = NEW(uint16_t, N *D);
    struct cuda_attend_args a = {.q = t, .k = t + N * D, .v = t + 2 * N * D, .o = first,
                                 .n_heads = 1, .group = 1, .d = D, .n_rows = N, .n_tail = N,
                                 .q_stride = N, .kv_stride = N, .scale = .125f};

    (void)state;
    run(cuda_grid_attend(&a, true, false));
    a.o = second;
    run(cuda_grid_attend(&a, true, false));
    assert_memory_equal(first, second, N * D * sizeof *first);
    kernel_free(first);
    kernel_free(second);
    kernel_free(x);
    kernel_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_gives_the_exact_values),
        cmocka_unit_test(rmsnorm_of_odd_widths),
        cmocka_unit_test(rope_rotates_queries_and_keys_and_scatters),
        cmocka_unit_test(swiglu_is_silu_times_up),
        cmocka_unit_test(packed_rows_expand_to_the_same_bits),
        cmocka_unit_test(own_rows_stand_behind_stored_ones),
        cmocka_unit_test(attention_of_odd_lengths_and_head_sizes),
        cmocka_unit_test(attention_of_any_number_of_query_heads_per_key),
        cmocka_unit_test(attention_from_a_row_on),
        cmocka_unit_test(resumed_rows_see_ragged_biased_pasts),
        cmocka_unit_test(a_key_that_is_not_finite_reaches_the_rows_that_see_it),
        cmocka_unit_test(window_mass_of_odd_sizes),
        cmocka_unit_test(long_rows),
        cmocka_unit_test(the_same_input_gives_the_same_bits),
    };

    return cmocka_run_group_tests_name("prefill/cuda_kernels", tests, NULL, NULL);
}
