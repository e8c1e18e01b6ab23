/* Matching against a plain f64 model of its formulas; the solver, replay scores and probes. */
#include "testlib.h"

#include <math.h>

#include "engine_fixture.h"
#include "match.h"
#include "mul.h"
#include "recall.h"
#include "replay.h"
#include "solve.h"

enum {
    T = 21,
    DOC = 90,
    REP = 100,
    STRIDE = 192,
    D = FAKE_HEAD_DIM,
    GROUP = FAKE_HEADS / FAKE_KV_HEADS
};

/* ---- one random layer: a document of DOC rows and its replay in two chunks */

struct layer_data {
    float q[FAKE_HEADS][STRIDE][D], k[FAKE_KV_HEADS][STRIDE][D], v[FAKE_KV_HEADS][STRIDE][D];
    struct replay_chunk chunk[2];
    struct replay r;
    struct replay_rows x;
};

static struct layer_data *make_layer(void)
{
    struct layer_data *l = calloc(1, sizeof *l);
    uint64_t seed = 77;
    float *all = &l->q[0][0][0];

    for (size_t i = 0; i < sizeof l->q / sizeof *all; i++)
        all[i] = 1.6f * test_randf(&seed);
    for (size_t i = 0; i < sizeof l->k / sizeof *all; i++)
        (&l->k[0][0][0])[i] = 1.6f * test_randf(&seed);
    for (size_t i = 0; i < sizeof l->v / sizeof *all; i++)
        (&l->v[0][0][0])[i] = test_randf(&seed);
    l->chunk[0] = (struct replay_chunk){0, 48, 0, 52};
    l->chunk[1] = (struct replay_chunk){48, DOC, 52, 48};
    l->r = (struct replay){
        .n_doc = DOC, .chunk = l->chunk, .n_chunks = 2, .n_rows = REP, .max_rows = 52};
    l->x = (struct replay_rows){.q = l->q, .k = l->k, .stride = STRIDE};
    return l;
}

static double dot(const float *a, const float *b)
{
    double s = 0;

    for (int i = 0; i < D; i++)
        s += (double)a[i] * b[i];
    return s / sqrt(D);
}

/* ---- replay scores */

static double probability(const struct layer_data *l, int h, const struct replay_chunk *c,
                          uint32_t row, uint32_t j)
{
    const float *q = l->q[h][DOC + c->first + row];
    int g = h / GROUP;
    double sum = 0;

    for (uint32_t t = 0; t < DOC; t++)
        if ((t >= c->start && t < c->end) || t < REPLAY_SINKS)
            sum += exp(dot(q, l->k[g][t]));
    for (uint32_t t = 0; t <= row; t++)
        sum += exp(dot(q, l->k[g][DOC + c->first + t]));
    return exp(dot(q, l->k[g][j])) / sum;
}

static void replay_scores_follow_their_formula(void **state)
{
    struct layer_data *l = make_layer();
    struct model m = fake_model();
    float score[FAKE_KV_HEADS][DOC];

    (void)state;
    for (uint32_t threads = 1; threads <= 3; threads++) {
        struct backend *b = open_backend(&m, threads);

        assert_int_equal(replay_score(b, &l->r, &l->x, &score[0][0], NULL), 0);
        b->ops->close(b);
        for (int g = 0; g < FAKE_KV_HEADS; g++)
            for (uint32_t j = 0; j < DOC; j++) {
                const struct replay_chunk *c = &l->chunk[j >= 48];
                double best = 0;

                for (int h = g * GROUP; h < (g + 1) * GROUP; h++)
                    for (uint32_t row = 0; row < c->n; row++)
                        best = fmax(best, probability(l, h, c, row, j));
                assert_true(fabs(score[g][j] - best) < 1e-5);
            }
    }
    free(l);
}

/* ---- matching, from its formulas alone */

struct fitted {
    double bias[DOC], v[DOC][D];
};

struct system {
    double a[T][T], x[T][D];
};

/* Gaussian elimination of n equations with right-hand sides x. */
static void eliminate(struct system *s, int n)
{
    for (int p = 0; p < n; p++)
        for (int i = p + 1; i < n; i++) {
            double f = s->a[i][p] / s->a[p][p];

            for (int j = p; j < n; j++)
                s->a[i][j] -= f * s->a[p][j];
            for (int c = 0; c < D; c++)
                s->x[i][c] -= f * s->x[p][c];
        }
    for (int i = n; i-- > 0;)
        for (int c = 0; c < D; c++) {
            for (int j = i + 1; j < n; j++)
                s->x[i][c] -= s->a[i][j] * s->x[j][c];
            s->x[i][c] /= s->a[i][i];
        }
}

/* Document rows that are fitted together, and the replay rows that ask for them. */
struct part {
    uint32_t row, n_rows, first, n;
};

static const struct part whole = {0, DOC, 0, REP}, second = {48, DOC - 48, 52, 48};

/* Probabilities of query i (replay rows of all heads) over the first rows and the part: of the
 * kept rows; the part's output and its share of the probability. */
static double query_row(const struct layer_data *l, const struct part *u, int g, uint32_t i,
                        const uint32_t *keep, int t, double *p_kept, double *y)
{
    const float *q = l->q[g * GROUP + i / u->n][DOC + u->first + i % u->n];
    double p[DOC], sum = 0, mass = 0;

    for (uint32_t j = 0; j < DOC; j++)
        sum += p[j] = j < REPLAY_SINKS || (j >= u->row && j < u->row + u->n_rows)
                          ? exp(dot(q, l->k[g][j]))
                          : 0;
    for (int c = 0; c < D; c++)
        y[c] = 0;
    for (uint32_t j = u->row; j < u->row + u->n_rows; j++) {
        mass += p[j] / sum;
        for (int c = 0; c < D; c++)
            y[c] += p[j] / sum * l->v[g][j][c];
    }
    for (int j = 0; j < t; j++) {
        float k[D];

        for (int c = 0; c < D; c++)
            k[c] = bf16_to_f32(f32_to_bf16(l->k[g][keep[j]][c]));
        p_kept[j] = exp(dot(q, k)) / sum;
    }
    return mass;
}

/* The equations of the weights that are free: which[0..n). */
static int free_system(const struct system *all, const bool *fixed, const double *w, double ridge,
                       int *which, struct system *s)
{
    int n = 0;

    for (int i = 0; i < T; i++)
        if (!fixed[i])
            which[n++] = i;
    memset(s, 0, sizeof *s);
    for (int i = 0; i < n; i++) {
        s->x[i][0] = all->x[which[i]][0] + ridge;
        for (int j = 0; j < n; j++)
            s->a[i][j] = all->a[which[i]][which[j]] + (i == j ? ridge : 0);
        for (int j = 0; j < T; j++)
            s->x[i][0] -= fixed[j] ? all->a[which[i]][j] * w[j] : 0;
    }
    return n;
}

static void model_bias(const struct layer_data *l, const struct part *u, int g,
                       const uint32_t *keep, double *w)
{
    struct system all = {0}, s;
    bool fixed[T] = {0}, out = true;
    double p[T], y[D];
    int which[T];

    for (uint32_t i = 0; i < GROUP * u->n; i++) {
        double mass = query_row(l, u, g, i, keep, T, p, y);

        for (int a = 0; a < T; a++) {
            all.x[a][0] += p[a] * mass;
            for (int b = 0; b < T; b++)
                all.a[a][b] += p[a] * p[b];
        }
    }
    for (int round = 0; round < 6 && out; round++) {
        int n = free_system(&all, fixed, w, 1e-6 * GROUP * u->n, which, &s);

        out = false;
        eliminate(&s, n);
        for (int i = 0; i < n; i++) {
            double bound = fmin(fmax(s.x[i][0], 0.02), 50);

            fixed[which[i]] = bound != s.x[i][0];
            out |= bound != s.x[i][0];
            w[which[i]] = bound;
        }
    }
}

static void model_fit(const struct layer_data *l, const struct part *u, int g, const uint32_t *keep,
                      bool bias, struct fitted *f)
{
    struct system s = {0};
    double w[T], p[T], y[D];

    for (int i = 0; i < T; i++)
        w[i] = 1;
    if (bias)
        model_bias(l, u, g, keep, w);
    for (int i = 0; i < T; i++) {
        f->bias[i] = bf16_to_f32(f32_to_bf16((float)log(w[i])));
        w[i] = exp(f->bias[i]);
    }
    for (uint32_t i = 0; i < GROUP * u->n; i++) {
        double den = 0, mass = query_row(l, u, g, i, keep, T, p, y);

        for (int a = 0; a < T; a++)
            den += p[a] *= w[a];
        for (int a = 0; a < T; a++)
            p[a] *= mass / den;
        for (int a = 0; a < T; a++)
            for (int c = 0; c < D; c++)
                y[c] -= p[a] * l->v[g][keep[a]][c];
        for (int a = 0; a < T; a++) {
            for (int b = 0; b < T; b++)
                s.a[a][b] += p[a] * p[b];
            for (int c = 0; c < D; c++)
                s.x[a][c] += p[a] * y[c];
        }
    }
    for (int a = 0; a < T; a++)
        s.a[a][a] += 1e-5 * GROUP * u->n;
    eliminate(&s, T);
    for (int a = 0; a < T; a++)
        for (int c = 0; c < D; c++)
            f->v[a][c] = l->v[g][keep[a]][c] + s.x[a][c];
}

/* Rows keep[t] of one KV head, as they are: gathered, and fitted. */
static void fit_head(struct match *m, const struct match_opts *o, const struct layer_data *l,
                     uint32_t g, const uint32_t *keep, uint32_t t, float *v, float *bias)
{
    struct kept_rows heads[FAKE_KV_HEADS] = {{0}};
    float k[DOC * D], rows[DOC * D], same[DOC * D];

    for (uint32_t i = 0; i < t; i++) {
        memcpy(k + i * D, l->k[g][keep[i]], D * sizeof *k);
        memcpy(rows + i * D, l->v[g][keep[i]], D * sizeof *rows);
    }
    heads[g] = (struct kept_rows){t, keep, k, rows, NULL, KV_F32};
    assert_int_equal(match_fit(m, o, heads, same, v, bias, NULL), 0);
    assert_memory_equal(same, k, t * D * sizeof *k);
}

/* T rows of a part, where `span` document rows are fitted together. */
static void check_fit(const struct part *u, uint32_t span, bool with_bias, uint32_t threads)
{
    struct layer_data *l = make_layer();
    struct model model = fake_model();
    struct backend *b = open_backend(&model, threads);
    struct match_opts o = {KV_BF16, with_bias};
    struct replay_rows x = l->x;
    struct match *m = NULL;
    float v[DOC * D], bias[DOC];
    double score[FAKE_KV_HEADS * DOC];
    uint32_t keep[T];
    struct fitted want;

    for (uint32_t i = 0; i < T; i++)
        keep[i] = u->row + (u->n_rows < 4 * T ? 2 * i : i * 4 + i % 3);
    assert_int_equal(match_open(&m, b, &l->r, span, NULL), 0);
    assert_int_equal(match_layer(m, &x, l->v, score, NULL), 0);
    x = (struct replay_rows){NULL}; /* fits must not need the caller's struct again */
    for (uint32_t g = 0; g < FAKE_KV_HEADS; g++) {
        fit_head(m, &o, l, g, keep, T, v, bias);
        model_fit(l, u, (int)g, keep, with_bias, &want);
        for (int i = 0; i < T; i++) {
            assert_true(fabs(bias[i] - want.bias[i]) <= 0.02 * (1 + fabs(want.bias[i])));
            for (int c = 0; c < D; c++)
                assert_true(fabs(v[i * D + c] - want.v[i][c]) < 0.02);
        }
    }
    match_close(m);
    b->ops->close(b);
    free(l);
}

static void fits_follow_their_formulas(void **state)
{
    (void)state;
    check_fit(&whole, 0, false, 1);
    check_fit(&whole, 0, true, 2);
}

static void a_group_is_fitted_to_its_own_replay(void **state)
{
    (void)state;
    check_fit(&second, 40, false, 2);
    check_fit(&second, 40, true, 3);
}

/* The mean over queries of the squared probability. */
static void check_scores(const struct part *u, uint32_t span)
{
    struct layer_data *l = make_layer();
    struct model model = fake_model();
    struct backend *b = open_backend(&model, 3);
    uint32_t every[DOC];
    struct match *m = NULL;
    double score[FAKE_KV_HEADS * DOC];

    for (uint32_t i = 0; i < DOC; i++)
        every[i] = i;
    assert_int_equal(match_open(&m, b, &l->r, span, NULL), 0);
    assert_int_equal(match_layer(m, &l->x, l->v, score, NULL), 0);
    for (int g = 0; g < FAKE_KV_HEADS; g++) {
        double want[DOC] = {0}, p[DOC], y[D];

        for (uint32_t i = 0; i < GROUP * u->n; i++) {
            query_row(l, u, g, i, every, DOC, p, y);
            for (int j = 0; j < DOC; j++)
                want[j] += p[j] * p[j] / (GROUP * REP);
        }
        for (uint32_t j = u->row; j < u->row + u->n_rows; j++) /* query_row() rounds the keys */
            assert_true(fabs(score[g * DOC + j] - want[j]) < 0.03 * want[j] + 1e-6);
    }
    match_close(m);
    b->ops->close(b);
    free(l);
}

static void row_scores_are_mean_squares(void **state)
{
    (void)state;
    check_scores(&whole, 0);
    check_scores(&second, 40);
}

/* The same bytes for any number of threads, and in groups a fit that is still a fit. */
static void fits_do_not_depend_on_threads(void **state)
{
    struct layer_data *l = make_layer();
    struct model model = fake_model();
    float v[2][DOC * D], bias[2][DOC];
    uint32_t keep[40];

    (void)state;
    for (uint32_t i = 0; i < 40; i++)
        keep[i] = 2 * i;
    for (uint32_t span = 0; span <= 40; span += 40)
        for (int i = 0; i < 2; i++) {
            struct backend *b = open_backend(&model, i ? 4 : 1);
            struct match_opts o = {KV_INT4, true};
            struct match *m = NULL;
            double score[FAKE_KV_HEADS * DOC];

            assert_int_equal(match_open(&m, b, &l->r, span, NULL), 0);
            assert_int_equal(match_layer(m, &l->x, l->v, score, NULL), 0);
            fit_head(m, &o, l, 1, keep, 40, v[i], bias[i]);
            match_close(m);
            b->ops->close(b);
            if (i) {
                assert_memory_equal(v[0], v[1], sizeof(float) * 40 * D);
                assert_memory_equal(bias[0], bias[1], sizeof(float) * 40);
            }
        }
    free(l);
}

/* ---- the solver */

static void systems_are_solved(void **state)
{
    const uint32_t sizes[] = {1, 15, 16, 63, 64, 65, 130, 200};
    struct model model = fake_model();
    struct backend *b = open_backend(&model, 2);
    uint64_t seed = 9;

    (void)state;
    for (int s = 0; s < 8; s++) {
        uint32_t n = sizes[s], ld = mul_padded(n);
        float *a = mem_aligned((uint64_t)n * ld, sizeof *a), *x = mem_aligned(n * 16ull, sizeof *x);
        float *f = malloc(n * n * sizeof *f), *want = malloc(n * 16 * sizeof *want);

        for (uint32_t i = 0; i < n * n; i++)
            f[i] = test_randf(&seed);
        for (uint32_t i = 0; i < n * 16; i++)
            want[i] = test_randf(&seed);
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < n; j++) {
                double sum = 0;

                for (uint32_t k = 0; k < n; k++)
                    sum += (double)f[i * n + k] * f[j * n + k];
                for (uint32_t c = 0; c < 16; c++)
                    x[i * 16 + c] += (float)((sum + (i == j)) * want[j * 16 + c]);
                if (j <= i)
                    a[i * ld + j] = (float)sum;
            }
        assert_int_equal(solve_spd(b, a, n, 1, x, 16, NULL), 0);
        for (uint32_t i = 0; i < n * 16; i++)
            assert_true(fabs(x[i] - want[i]) < 2e-3);
        mem_free(a);
        mem_free(x);
        free(f);
        free(want);
    }
    b->ops->close(b);
}

static void an_indefinite_matrix_is_reported(void **state)
{
    struct model model = fake_model();
    struct backend *b = open_backend(&model, 1);
    float *a = mem_aligned(2 * 16, sizeof *a), *x = mem_aligned(2 * 16, sizeof *x);

    (void)state;
    a[0] = 1;
    a[16] = 2;
    a[17] = 1;
    assert_int_equal(solve_spd(b, a, 2, 0, x, 16, NULL), LARDER_ENUMERIC);
    mem_free(a);
    mem_free(x);
    b->ops->close(b);
}

/* ---- plans and probes */

static void a_replay_repeats_every_token_once(void **state)
{
    struct model m = fake_model();
    struct replay *r = NULL;
    uint32_t ids[FAKE_POSITIONS];

    (void)state;
    make_ids(ids, 200);
    assert_int_equal(replay_plan(&r, &m, NULL, ids, 200, 64, NULL), 0);
    assert_int_equal(r->n_chunks, 4);
    for (uint32_t c = 0; c < 4; c++) {
        const struct replay_chunk *k = &r->chunk[c];

        assert_int_equal(k->start, c * 64);
        assert_memory_equal(r->ids + k->first + k->n - (k->end - k->start), ids + k->start,
                            (k->end - k->start) * sizeof *ids);
        for (uint32_t i = 0; i < k->n; i++)
            assert_int_equal(r->pos[k->first + i], 200 + i);
    }
    replay_free(r);
    /* behind a long document chunks become smaller, and at last there is no room */
    make_ids(ids, 440);
    assert_int_equal(replay_plan(&r, &m, NULL, ids, 440, 400, NULL), 0);
    assert_true(r->n_chunks > 2 && 440 + r->max_rows <= FAKE_POSITIONS);
    replay_free(r);
    assert_int_equal(replay_plan(&r, &m, NULL, ids, FAKE_POSITIONS - 8, 400, NULL),
                     LARDER_ETOOLONG);
}

static void probes_quote_the_document(void **state)
{
    struct model m = fake_model();
    struct probes *p = NULL;
    uint32_t ids[400];

    (void)state;
    make_ids(ids, 400);
    assert_int_equal(probes_make(&p, &m, NULL, ids, 30, 400, NULL), 0);
    assert_int_equal(p->n, 400 / 64);
    for (uint32_t i = 0; i < p->n; i++) {
        const struct probe *b = &p->probe[i];

        assert_true(b->at >= 30 + PROBE_CUE && b->at + PROBE_QUOTE <= 400);
        assert_true(!i || b->at > p->probe[i - 1].at);
        assert_memory_equal(p->ids + b->scored + 1 - PROBE_CUE, ids + b->at - PROBE_CUE,
                            (PROBE_CUE + PROBE_QUOTE) * sizeof *ids);
        assert_true(b->scored + PROBE_QUOTE < p->n_rows);
    }
    for (uint32_t i = 0; i < p->n_rows; i++)
        assert_int_equal(p->pos[i], 400 + i);
    probes_free(p);
    assert_int_equal(probes_make(&p, &m, NULL, ids, 0, 12, NULL), 0);
    assert_int_equal(p->n, 0);
    probes_free(p);
}

static void a_cache_certified_against_itself_is_perfect(void **state)
{
    enum { V = 50 };
    struct certificate c = {0};
    struct probe at[2] = {{.at = 7}, {.at = 30}};
    float full[PROBE_QUOTE * V], kept[PROBE_QUOTE * V];
    uint64_t seed = 3;

    (void)state;
    for (uint32_t i = 0; i < PROBE_QUOTE * V; i++)
        full[i] = kept[i] = 4 * test_randf(&seed);
    certificate_reference(full, V);
    certificate_add(&c, &at[0], full, kept, V);
    assert_true(c.kl < 1e-9 && c.agreement == 1 && c.n_tokens == PROBE_QUOTE);
    for (uint32_t i = 0; i < PROBE_QUOTE * V; i++)
        kept[i] = -full[i];
    certificate_add(&c, &at[1], full, kept, V);
    assert_true(c.kl > 0.01 && c.agreement < 1 && c.worst_at == 30 && c.worst_kl > c.kl);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(replay_scores_follow_their_formula),
        cmocka_unit_test(row_scores_are_mean_squares),
        cmocka_unit_test(fits_follow_their_formulas),
        cmocka_unit_test(a_group_is_fitted_to_its_own_replay),
        cmocka_unit_test(fits_do_not_depend_on_threads),
        cmocka_unit_test(systems_are_solved),
        cmocka_unit_test(an_indefinite_matrix_is_reported),
        cmocka_unit_test(a_replay_repeats_every_token_once),
        cmocka_unit_test(probes_quote_the_document),
        cmocka_unit_test(a_cache_certified_against_itself_is_perfect),
    };

    backend_name = "cpu";
    return cmocka_run_group_tests_name("prefill/match", tests, NULL, NULL);
}
