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

struct rope_case {
    uint32_t n_heads, n_kv, d, dims;
    bool bias, norm;
    double factor;
};

static const float *maybe(bool is, float *x)
{
    return is ? x : NULL;
}

/* One row of one head by its formula. */
static void plain_rope(const struct rope_case *t, const struct cuda_rope_args *a,
                       const double *freq, uint32_t pos, uint32_t row, uint32_t h, double *out)
{
    uint32_t d = t->d, all = (t->n_heads + 2 * t->n_kv) * d, half = t->dims / 2;
    bool is_v = h >= t->n_heads + t->n_kv;
    const float *norm = is_v ? NULL : h < t->n_heads ? a->q_norm : a->k_norm;
    double x[CUDA_MAX_HEAD_DIM], sum = 0;

    for (uint32_t c = 0; c < d; c++) {
        x[c] = a->x[row * all + h * d + c] + (a->bias ? (double)a->bias[h * d + c] : 0);
        sum += x[c] * x[c];
    }
    for (uint32_t c = 0; c < d && norm; c++)
        x[c] = x[c] / sqrt(sum / d + a->eps) * norm[c];
    for (uint32_t c = 0; c < d; c++) {
        double at = pos * freq[c % (half ? half : 1)];

        if (c >= t->dims || is_v)
            out[c] = x[c];
        else if (c < half)
            out[c] = (x[c] * cos(at) - x[c + half] * sin(at)) * t->factor;
        else
            out[c] = (x[c] * cos(at) + x[c - half] * sin(at)) * t->factor;
    }
}

static void check_rope(struct rope_case t, bool bf16)
{
    enum { N = 5, STRIDE = 9, ROW0 = 2 };
    const uint32_t at_pos[N] = {0, 1, 77, 100000, 131071};
    uint32_t d = t.d, heads = t.n_heads + 2 * t.n_kv, all = heads * d;
    size_t elem = bf16 ? 2 : 4;
    uint64_t seed = 5 + d;
    uint32_t *pos = NEW(uint32_t, N);
    float *x = random_f32(N * all, &seed), *table = NEW(float, N *t.dims);
    float *bias = random_f32(all, &seed), *norm[2] = {random_f32(d, &seed), random_f32(d, &seed)};
    uint8_t *q = kernel_alloc(t.n_heads * STRIDE * d * elem);
    uint8_t *k = kernel_alloc(t.n_kv * STRIDE * d * elem);
    uint8_t *v = kernel_alloc(t.n_kv * STRIDE * d * elem);
    double *freq = NEW(double, t.dims / 2), want[CUDA_MAX_HEAD_DIM];
    struct cuda_angles_args angles = {pos, freq, table, N, t.dims / 2, t.factor};
    struct cuda_rope_args a = {x, table, maybe(t.bias, bias), maybe(t.norm, norm[0]),
                               maybe(t.norm, norm[1]), 1e-6, q, k, v, t.n_heads, t.n_kv, d,
                               t.dims, ROW0, STRIDE};

    memcpy(pos, at_pos, sizeof at_pos);
    for (uint32_t i = 0; i < t.dims / 2; i++)
        freq[i] = pow(5e5, -2.0 * i / t.dims);
    run(cuda_grid_flat(CUDA_ANGLES, false, N * t.dims / 2, &angles));
    run(cuda_grid_rows(CUDA_ROPE, bf16, N, &a));
    for (uint32_t h = 0; h < heads; h++) {
        bool is_q = h < t.n_heads, is_k = !is_q && h < t.n_heads + t.n_kv;
        const uint8_t *to = is_q ? q : is_k ? k : v;
        size_t head = is_q ? h : is_k ? h - t.n_heads : h - t.n_heads - t.n_kv;

        for (uint32_t r = 0; r < STRIDE; r++) {
            bool written = r >= ROW0 && r < ROW0 + N;

            if (written)
                plain_rope(&t, &a, freq, pos[r - ROW0], r - ROW0, h, want);
            for (uint32_t c = 0; c < d; c++) {
                float got = element(to, bf16, (head * STRIDE + r) * d + c);

                if (!(fabs(got - (written ? want[c] : 0)) <=
                      (bf16 && written ? 5e-3 * fabs(want[c]) : 0) + 3e-6))
                    fail_msg("%u heads of %u, %u rotated, bias %d, norm %d: %g, not %g", heads, d,
                             t.dims, t.bias, t.norm, got, want[c]);
            }
        }
    }
    kernel_free(pos);
    kernel_free(freq);
    kernel_free(table);
    kernel_free(bias);
    kernel_free(norm[0]);
    kernel_free(norm[1]);
    kernel_free(q);
    kernel_free(k);
    kernel_free(v);
    kernel_free(x);
}

static void rope_rotates_queries_and_keys_and_scatters(void **state)
{
    const uint32_t dims[] = {10, 64, 80, 96, 128};

    (void)state;
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (int i = 0; i < 5; i++) {
            uint32_t d = dims[i];

            check_rope((struct rope_case){3, 1, d, d, false, false, 1}, bf16);
            check_rope((struct rope_case){2, 1, d, d / 2 / 2 * 2, false, false, 1.19}, bf16);
            check_rope((struct rope_case){16, 1, d, d, true, false, 1}, bf16);
            check_rope((struct rope_case){4, 2, d, d, false, true, 1}, bf16);
            check_rope((struct rope_case){9, 3, d, d - 2, true, true, 1.19}, bf16);
        }
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

/* ---- attention */

struct shape {
    uint32_t n_heads, n_kv, d, n_rows, row0, n_tail;
    uint32_t n_past[4];    /* per KV head */
    enum kv_dtype past[4]; /* 0: as the elements are */
    bool bias;
    uint32_t sliding, gap; /* stored rows are `gap` positions apart */
    uint32_t splits;
};

/* What a KV head has: its rows in f32, exactly as they are stored, and where that is. */
struct head_rows {
    float *k, *v, *bias; /* [n_past + n_tail][d] */
    uint32_t *position;
    void *tile[2];
};

/* Softmax in f64 for one row of one head. */
static void plain_row(const struct shape *s, const struct head_rows *r, uint32_t n_past,
                      uint32_t pos0, const float *x, uint32_t i, float *out)
{
    uint32_t own = s->n_tail - s->n_rows + i, n = n_past + own + 1, d = s->d;
    double *p = malloc(n * sizeof *p), max = -INFINITY, sum = 0;

    for (uint32_t j = 0; j < n; j++) {
        uint32_t pos = j < n_past ? r->position[j] : pos0 + j - n_past;

        p[j] = 0;
        for (uint32_t c = 0; c < d; c++)
            p[j] += (double)x[c] * r->k[j * d + c];
        p[j] = p[j] / sqrt(d) + (s->bias && j < n_past ? (double)r->bias[j] : 0);
        if (s->sliding && pos + s->sliding <= pos0 + own)
            p[j] = -INFINITY;
        max = fmax(max, p[j]);
    }
    for (uint32_t j = 0; j < n; j++)
        sum += p[j] = exp(p[j] - max);
    for (uint32_t c = 0; c < d; c++) {
        double o = 0;

        for (uint32_t j = 0; j < n; j++)
            o += p[j] / sum * r->v[j * d + c];
        out[c] = (float)o;
    }
    free(p);
}

/* n rows as type t; x becomes what they are worth. */
static void *store_rows(enum kv_dtype t, bool keys, float *x, uint32_t n, uint32_t d)
{
    uint8_t *tile;

    if (!packed_type(t))
        return to_elements(x, (size_t)n * d, t == KV_BF16);
    tile = kernel_alloc(keys ? tile_bytes_k(t, n, d) : tile_bytes_v(t, n, d));
    (keys ? packed_from_k : packed_from_v)(t, x, n, d, tile);
    (keys ? packed_expand_k_f32 : packed_expand_v_f32)(t, tile, n, d, x);
    return tile;
}

static enum kv_dtype stored_as(const struct shape *s, uint32_t g, bool bf16)
{
    return s->past[g] ? s->past[g] : bf16 ? KV_BF16 : KV_F32;
}

/* KV head g: its stored rows, and its own in the tails k and v. */
static struct head_rows make_head(const struct shape *s, uint32_t g, bool bf16, float *tail_k,
                                  float *tail_v, struct cuda_past *past, uint64_t *seed)
{
    uint32_t n = s->n_past[g], d = s->d, all = n + s->n_tail;
    enum kv_dtype t = stored_as(s, g, bf16);
    struct packed_parts pk = packed_parts_k(t, n, d), pv = packed_parts_v(t, n, d);
    struct head_rows r = {random_f32(all * d, seed), random_f32(all * d, seed),
                          random_f32(n + 1, seed), NEW(uint32_t, n + 1), {NULL, NULL}};

    r.tile[0] = store_rows(t, true, r.k, n, d);
    r.tile[1] = store_rows(t, false, r.v, n, d);
    memcpy(r.k + n * d, tail_k, s->n_tail * d * sizeof *r.k);
    memcpy(r.v + n * d, tail_v, s->n_tail * d * sizeof *r.v);
    for (uint32_t j = 0; j < n; j++)
        r.position[j] = j * s->gap;
    *past = (struct cuda_past){{r.tile[0], pk.scales, pk.codes}, {r.tile[1], pv.scales, pv.codes},
                               s->bias ? r.bias : NULL, r.position, n, t, pk.n_exact};
    return r;
}

static void free_head(struct head_rows *r)
{
    kernel_free(r->k);
    kernel_free(r->v);
    kernel_free(r->bias);
    kernel_free(r->position);
    kernel_free(r->tile[0]);
    kernel_free(r->tile[1]);
}

static void check_attend(struct shape s, bool bf16, enum cuda_kernel kernel)
{
    uint64_t seed = 9 + s.n_rows + 1000 * s.d;
    uint32_t most = 0, d = s.d, stride = s.n_tail + 2, q_stride = s.n_rows + 3;
    size_t n_q = s.n_heads * q_stride * d, n_kv = s.n_kv * stride * d;
    size_t n_o = (size_t)s.n_rows * s.n_heads * d, from = (size_t)s.row0 * s.n_heads * d;
    float *want = NEW(float, n_o), *got = NEW(float, n_o);
    float *qf = random_f32(n_q, &seed), *kf = random_f32(n_kv, &seed);
    float *vf = random_f32(n_kv, &seed);
    void *q, *k, *v, *o = kernel_alloc(n_o * 4);
    struct cuda_past *past = NEW(struct cuda_past, s.n_kv);
    struct head_rows rows[4];
    struct cuda_attend_args a = {.n_heads = s.n_heads, .group = s.n_heads / s.n_kv, .d = d,
                                 .n_rows = s.n_rows, .row0 = s.row0, .n_tail = s.n_tail,
                                 .sliding = s.sliding, .scale = (float)(1 / sqrt(d)),
                                 .q_stride = q_stride, .kv_stride = stride, .n_splits = s.splits};
    bool all_bf16 = true;
    struct cuda_launch l;
    double err;

    for (size_t i = 0; i < n_q; i++)
        qf[i] *= 4; /* probabilities far from even */
    q = to_elements(qf, n_q, bf16);
    k = to_elements(kf, n_kv, bf16);
    v = to_elements(vf, n_kv, bf16);
    for (uint32_t g = 0; g < s.n_kv; g++) {
        rows[g] = make_head(&s, g, bf16, kf + g * stride * d, vf + g * stride * d, &past[g], &seed);
        most = s.n_past[g] > most ? s.n_past[g] : most;
        all_bf16 = all_bf16 && (!s.n_past[g] || stored_as(&s, g, bf16) == KV_BF16);
    }
    memset(o, 0xff, n_o * 4);
    a.q = q;
    a.k = k;
    a.v = v;
    a.o = o;
    a.past = most ? past : NULL;
    a.pos0 = most * s.gap;
    if ((s.n_rows - s.row0) * a.group <= CUDA_ATTEND_ROWS) /* too few for tensor cores */
        kernel = CUDA_ATTEND;
    l = cuda_grid_attend(&a, bf16, all_bf16);
    assert_int_equal(l.kernel, kernel);
    if (s.splits > 1)
        a.part = kernel_alloc(n_o * s.splits * (d + 2) / d * sizeof *a.part);
    run(l);
    if (s.splits > 1)
        run(cuda_grid_merge(&a, bf16));
    kernel_free(a.part);
    for (uint32_t i = 0; i < s.n_rows; i++)
        for (uint32_t h = 0; h < s.n_heads; h++) {
            size_t at = ((size_t)i * s.n_heads + h) * d;
            uint32_t g = h / a.group;

            for (uint32_t c = 0; c < d; c++) {
                got[at + c] = element(o, bf16, at + c);
                if (i < s.row0 && !isnan(got[at + c]))
                    fail_msg("row %u was written", i);
            }
            if (i >= s.row0)
                plain_row(&s, &rows[g], s.n_past[g], a.pos0, qf + (h * q_stride + i) * d, i,
                          want + at);
        }
    err = nmse(want + from, got + from, n_o - from);
    /* f32 sums; bf16: outputs, and in tensor cores probabilities, have 8 bits */
    if (!(err < (bf16 ? 2e-5 : 1e-11)))
        fail_msg("%u rows of %u behind %u, %u on %u heads, window %u, bf16 %d: error %g", s.n_rows,
                 d, most, s.n_heads, s.n_kv, s.sliding, bf16, err);
    for (uint32_t g = 0; g < s.n_kv; g++)
        free_head(&rows[g]);
    kernel_free(past);
    kernel_free(qf);
    kernel_free(kf);
    kernel_free(vf);
    kernel_free(q);
    kernel_free(k);
    kernel_free(v);
    kernel_free(o);
    kernel_free(want);
    kernel_free(got);
}

static struct shape causal(uint32_t n, uint32_t d, uint32_t n_heads, uint32_t n_kv)
{
    return (struct shape){.n_heads = n_heads, .n_kv = n_kv, .d = d, .n_rows = n, .n_tail = n, .gap = 1,
                          .splits = 1};
}

static void attention_of_odd_lengths_and_head_sizes(void **state)
{
    const uint32_t rows[] = {1, 31, 33, 65, 129}, dims[] = {64, 80, 96, 128};

    (void)state;
    for (int i = 0; i < 20; i++) {
        uint32_t n = rows[i % 5], d = dims[i / 5];

        check_attend(causal(n, d, 2, 1), false, CUDA_ATTEND);
        check_attend(causal(n, d, 2, 1), true, CUDA_ATTEND_MMA);
    }
    check_attend(causal(70, 32, 2, 2), true, CUDA_ATTEND_MMA);
    check_attend(causal(1, 64, 20, 1), true, CUDA_ATTEND_MMA);
    check_attend(causal(70, 72, 2, 1), true, CUDA_ATTEND); /* no tensor core kernel */
    check_attend(causal(40, 256, 1, 1), true, CUDA_ATTEND);
    check_attend(causal(20, 2, 1, 1), false, CUDA_ATTEND);
}

static void attention_of_any_number_of_query_heads_per_key(void **state)
{
    (void)state;
    for (uint32_t group = 1; group <= 16; group += group < 4 ? 1 : 4) {
        check_attend(causal(35, 64, 2 * group, 2), false, CUDA_ATTEND);
        check_attend(causal(35, 64, 2 * group, 2), true, CUDA_ATTEND_MMA);
    }
}

/* The keys of few rows, dealt out; with more blocks than keys some have none. */
static void keys_may_be_shared_by_blocks(void **state)
{
    const uint32_t splits[] = {2, 3, 8};
    struct shape s = {.n_heads = 4, .n_kv = 2, .d = 80, .n_rows = 3, .n_tail = 40,
                      .n_past = {170, 20}, .past = {KV_INT4, KV_F32}, .bias = true, .gap = 2};

    (void)state;
    for (int i = 0; i < 6; i++) {
        struct shape alone = causal(130, 64, 6, 2);

        alone.splits = s.splits = splits[i / 2];
        alone.row0 = 125;
        check_attend(alone, i % 2, CUDA_ATTEND);
        s.sliding = 0;
        check_attend(s, i % 2, CUDA_ATTEND);
        s.sliding = 90;
        check_attend(s, i % 2, CUDA_ATTEND);
    }
}

static void attention_from_a_row_on(void **state)
{
    (void)state;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        enum cuda_kernel k = bf16 ? CUDA_ATTEND_MMA : CUDA_ATTEND;
        struct shape s = causal(100, 64, 4, 2);

        s.row0 = 99;
        check_attend(s, bf16, k);
        s.row0 = 37;
        check_attend(s, bf16, k);
    }
}

/* Windows that end inside a block of keys, at one, and before the first row. */
static void rows_see_their_window_only(void **state)
{
    const uint32_t windows[] = {1, 5, 31, 32, 33, 64, 100, 200}, dims[] = {64, 80, 96, 128};

    (void)state;
    for (int i = 0; i < 8; i++) {
        struct shape s = causal(150, dims[i % 4], 2, 1);

        s.sliding = windows[i];
        check_attend(s, false, CUDA_ATTEND);
        check_attend(s, true, CUDA_ATTEND_MMA);
        s.row0 = 77;
        check_attend(s, true, CUDA_ATTEND_MMA);
    }
}

static void resumed_rows_see_ragged_biased_pasts(void **state)
{
    struct shape s = {.n_heads = 4, .n_kv = 2, .d = 64, .n_rows = 5, .n_tail = 9,
                      .n_past = {70, 0}, .gap = 1, .splits = 1};

    (void)state;
    for (int i = 0; i < 2; i++) {
        s.bias = i;
        check_attend(s, false, CUDA_ATTEND);
        check_attend(s, true, CUDA_ATTEND_MMA);
        s.n_rows = s.n_tail = 1;
        s.n_past[0] = 63;
        s.n_past[1] = 130;
    }
}

/* Where stored rows are sparse, a window covers fewer of them; a long tail leaves them all. */
static void resumed_rows_see_their_window_only(void **state)
{
    const uint32_t windows[] = {1, 3, 40, 130, 400};

    (void)state;
    for (int i = 0; i < 10; i++) {
        struct shape s = {.n_heads = 4, .n_kv = 2, .d = 64, .n_rows = 70, .n_tail = 75,
                          .n_past = {90, 33}, .bias = i / 5, .gap = 3, .splits = 1};

        s.sliding = windows[i % 5];
        check_attend(s, false, CUDA_ATTEND);
        check_attend(s, true, CUDA_ATTEND_MMA);
        s.n_rows = s.n_tail = 1;
        check_attend(s, false, CUDA_ATTEND);
        check_attend(s, true, CUDA_ATTEND_MMA);
    }
}

static void stored_rows_are_read_in_every_type(void **state)
{
    const uint32_t rows[] = {1, 4, 5, 31, 33, 100}, dims[] = {64, 80, 96, 128};

    (void)state;
    for (int i = 0; i < 24; i++) {
        struct shape s = {.n_heads = 4, .n_kv = 4, .d = dims[i / 6], .n_rows = 2, .n_tail = 2,
                          .past = {KV_INT8, KV_INT4, KV_BF16, KV_F32}, .bias = i % 2, .gap = 2,
                          .splits = 1};

        for (int g = 0; g < 4; g++)
            s.n_past[g] = rows[(i + g) % 6];
        s.sliding = i % 3 ? 0 : 60;
        check_attend(s, i % 2, CUDA_ATTEND);
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
                                     .q_stride = N, .kv_stride = N, .n_splits = 1, .scale = .125f};

        x[BAD * D + 3] = NAN;
        k = to_elements(x, N * D, bf16);
        a.q = q;
        a.k = k;
        a.v = v;
        a.o = o;
        run(cuda_grid_attend(&a, bf16, true));
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

static void check_window(uint32_t n, uint32_t w, uint32_t d, uint32_t sliding, bool bf16)
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
                                 0, 3, sliding, (float)(1 / sqrt(d))};

    memset(logit, 0xff, H * w * n * sizeof *logit);

    for (; a.head0 < H; a.head0 += 3, a.n_batch = 1) { /* three heads, then one */
        run(cuda_grid_window(CUDA_WINDOW_LOGITS, bf16, &a));
        run(cuda_grid_window(CUDA_WINDOW_STATS, bf16, &a));
        run(cuda_grid_window(CUDA_WINDOW_MASS, bf16, &a));
    }
    for (uint32_t h = 0; h < H; h++)
        for (uint32_t i = 0; i < w; i++) {
            uint32_t from = sliding_from(sliding, m + i);
            double sum = 0;

            for (uint32_t j = from; j <= m + i; j++) {
                p[j] = 0;
                for (uint32_t c = 0; c < d; c++)
                    p[j] += (double)qf[(h * stride + m + i) * d + c] *
                            kf[(h / (H / KV) * stride + j) * d + c];
                sum += p[j] = exp(p[j] / sqrt(d));
            }
            for (uint32_t j = from; j < m; j++)
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
        check_window(2, 1, 64, 0, bf16);
        check_window(33, 32, 80, 0, bf16);
        check_window(65, 17, 96, 0, bf16);
        check_window(200, 33, 128, 0, bf16);
        check_window(200, 33, 64, 40, bf16);
        check_window(131, 20, 80, 65, bf16);
        check_window(131, 20, 96, 4, bf16);
    }
}

/* The last rows of long sequences: two blocks of the matrix kernel on a processor, more on a GPU,
 * where the comparison is what takes the time. */
static void long_rows(void **state)
{
    const uint32_t dims[] = {64, 80, 96, 128};

    (void)state;
    for (int i = 0; i < 4; i += kernel_is_device() ? 1 : 3) {
        struct shape s = causal(4097, dims[i], 2, 1);

        s.row0 = kernel_is_device() ? 3900 : 4030;
        check_attend(s, true, CUDA_ATTEND_MMA);
        s.sliding = 1000;
        check_attend(s, true, CUDA_ATTEND_MMA);
        s.row0 = kernel_is_device() ? 3900 : 4090;
        check_attend(s, false, CUDA_ATTEND);
        check_window(4097, 3, dims[i], 0, true);
        check_window(4097, 33, dims[i], 1000, true);
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
                                 .q_stride = N, .kv_stride = N, .n_splits = 1, .scale = .125f};

    (void)state;
    run(cuda_grid_attend(&a, true, true));
    a.o = second;
    run(cuda_grid_attend(&a, true, true));
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
        cmocka_unit_test(attention_of_odd_lengths_and_head_sizes),
        cmocka_unit_test(attention_of_any_number_of_query_heads_per_key),
        cmocka_unit_test(keys_may_be_shared_by_blocks),
        cmocka_unit_test(attention_from_a_row_on),
        cmocka_unit_test(rows_see_their_window_only),
        cmocka_unit_test(resumed_rows_see_ragged_biased_pasts),
        cmocka_unit_test(resumed_rows_see_their_window_only),
        cmocka_unit_test(stored_rows_are_read_in_every_type),
        cmocka_unit_test(a_key_that_is_not_finite_reaches_the_rows_that_see_it),
        cmocka_unit_test(window_mass_of_odd_sizes),
        cmocka_unit_test(long_rows),
        cmocka_unit_test(the_same_input_gives_the_same_bits),
    };

    return cmocka_run_group_tests_name("cuda/kernels", tests, NULL, NULL);
}
