/* match_fit.c - the two least squares fits of a KV head: biases, then values.
 *
 * The one idea: a fit is one pass over the group's queries that adds up normal equations, and
 * one factorisation. Both passes differ only in what is multiplied: plain probabilities for
 * the biases, probabilities with biases and normalised for the values. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "half.h"
#include "match_int.h"
#include "mem.h"
#include "packed.h"
#include "solve.h"

#define AT_ONCE 8u /* blocks whose probabilities exist together */
#define WIDE_ROWS (AT_ONCE * MATCH_ROWS)

struct fit {
    struct match *m;
    uint32_t g;
    const struct match_group *u;
    const uint32_t *keep; /* the group's */
    uint32_t t, pad_t, pad_d;
    float *keys;                 /* [pad_t / 16][head_dim][16], as they will be read back */
    float *values;               /* [pad_t][pad_d], original */
    float *p;                    /* [pad_t / 16][WIDE_ROWS][16] */
    float *rest;                 /* [WIDE_ROWS][pad_d]: what the values leave unexplained */
    float *matrix;               /* [pad_t][pad_t] */
    float *work;                 /* the same, for factorisations */
    float *rhs;                  /* [pad_t][pad_d] */
    float *x;                    /* [pad_t][pad_d]: a solution */
    float *weight;               /* [pad_t]: e^bias */
    bool with_values;            /* which pass this is */
    uint32_t first, n_blocks, n; /* blocks at hand, and their queries */
};

/* ---- probabilities of the kept rows */

/* p becomes probability x weight, normalised to the mass of the group. */
static void weigh_row(const struct fit *f, uint32_t row, float mass)
{
    float den = 0;

    for (uint32_t j = 0; j < f->pad_t; j += MUL_WIDE) {
        float *p = f->p + (uint64_t)j * WIDE_ROWS + (uint64_t)row * MUL_WIDE;

        for (uint32_t c = 0; c < MUL_WIDE; c++) {
            p[c] *= f->weight[j + c];
            den += p[c];
        }
    }
    den = den > 0 ? mass / den : 0;
    for (uint32_t j = 0; j < f->pad_t; j += MUL_WIDE) {
        float *p = f->p + (uint64_t)j * WIDE_ROWS + (uint64_t)row * MUL_WIDE;

        for (uint32_t c = 0; c < MUL_WIDE; c++)
            p[c] *= den;
    }
}

/* rest = y - p · values for the rows of a block. */
static void subtract(const struct fit *f, uint32_t row, uint32_t rows, const float *y)
{
    float *rest = f->rest + (uint64_t)row * f->pad_d;

    for (uint64_t i = 0; i < (uint64_t)rows * f->pad_d; i++)
        rest[i] = -y[i];
    for (uint32_t j = 0; j < f->pad_t; j += MUL_WIDE)
        f->m->mul(&(struct mul){.a = f->p + (uint64_t)j * WIDE_ROWS + (uint64_t)row * MUL_WIDE,
                                .a_row = MUL_WIDE,
                                .a_k = 1,
                                .a_panel = MUL_WIDE * MUL_WIDE,
                                .b = f->values + (uint64_t)j * f->pad_d,
                                .b_k = f->pad_d,
                                .b_panel = MUL_WIDE,
                                .c = rest,
                                .c_row = f->pad_d,
                                .c_panel = MUL_WIDE,
                                .m = rows,
                                .n = f->pad_d,
                                .k = MUL_WIDE,
                                .add = true});
    for (uint64_t i = 0; i < (uint64_t)rows * f->pad_d; i++)
        rest[i] = -rest[i];
}

/* Item: a block of queries. */
static void probability_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct fit *f = arg;
    struct match *m = f->m;
    const struct match_block *k = &m->block[f->first + item];
    uint64_t at = (uint64_t)f->g * m->n_queries + k->query;
    uint32_t row = k->query - m->block[f->first].query;
    float *q = m->scratch + worker * m->per_worker;

    match_queries(m, f->g, k, q);
    match_logits(m, q, k->rows, f->keys, f->t, f->p + (uint64_t)row * MUL_WIDE, MUL_WIDE,
                 (uint64_t)WIDE_ROWS * MUL_WIDE);
    for (uint32_t j = 0; j < f->pad_t; j += MUL_WIDE)
        for (uint32_t i = 0; i < k->rows; i++)
            cpu_softmax_exp(f->p + (uint64_t)j * WIDE_ROWS + (uint64_t)(row + i) * MUL_WIDE,
                            MUL_WIDE, MUL_WIDE, m->lse[at + i]);
    for (uint32_t i = 0; i < k->rows && f->t % MUL_WIDE; i++) /* columns that do not exist */
        memset(f->p + (uint64_t)(f->pad_t - MUL_WIDE) * WIDE_ROWS + (uint64_t)(row + i) * MUL_WIDE +
                   f->t % MUL_WIDE,
               0, (MUL_WIDE - f->t % MUL_WIDE) * sizeof *f->p);
    if (!f->with_values)
        return;
    for (uint32_t i = 0; i < k->rows; i++)
        weigh_row(f, row + i, m->mass[at + i]);
    subtract(f, row, k->rows, m->y + at * f->pad_d);
}

/* ---- normal equations */

/* Item: 16 kept rows. Their columns of the matrix, on and below the diagonal, and their rows of
 * the right-hand side. */
static void equation_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct fit *f = arg;
    const struct match *m = f->m;
    uint32_t j = item * MUL_WIDE;
    const float *mine = f->p + (uint64_t)j * WIDE_ROWS;
    struct mul x = {.a = mine,
                    .a_row = 1,
                    .a_k = MUL_WIDE,
                    .a_panel = (uint64_t)WIDE_ROWS * MUL_WIDE,
                    .k = f->n,
                    .add = true};

    (void)worker;
    x.b = mine;
    x.b_k = MUL_WIDE;
    x.c = f->matrix + (uint64_t)j * f->pad_t + j;
    x.c_row = f->pad_t;
    x.m = f->pad_t - j;
    x.n = MUL_WIDE;
    m->mul(&x);
    if (f->with_values) {
        x.b = f->rest;
        x.b_k = f->pad_d;
        x.b_panel = MUL_WIDE;
        x.c = f->rhs + (uint64_t)j * f->pad_d;
        x.c_row = f->pad_d;
        x.c_panel = MUL_WIDE;
        x.m = MUL_WIDE;
        x.n = f->pad_d;
        m->mul(&x);
        return;
    }
    for (uint32_t i = 0; i < f->n; i++) {
        float mass = m->mass[(uint64_t)f->g * m->n_queries + m->block[f->first].query + i];

        for (uint32_t c = 0; c < MUL_WIDE; c++)
            f->rhs[(uint64_t)(j + c) * f->pad_d] += mine[(uint64_t)i * MUL_WIDE + c] * mass;
    }
}

static void add_up(struct fit *f, bool with_values)
{
    struct backend *b = f->m->b;
    uint32_t end = f->u->block + f->u->n_blocks;

    f->with_values = with_values;
    memset(f->matrix, 0, (uint64_t)f->pad_t * f->pad_t * sizeof *f->matrix);
    memset(f->rhs, 0, (uint64_t)f->pad_t * f->pad_d * sizeof *f->rhs);
    for (f->first = f->u->block; f->first < end; f->first += f->n_blocks) {
        f->n_blocks = end - f->first < AT_ONCE ? end - f->first : AT_ONCE;
        f->n = 0;
        for (uint32_t i = 0; i < f->n_blocks; i++)
            f->n += f->m->block[f->first + i].rows;
        b->ops->parallel(b, f->n_blocks, probability_item, f);
        b->ops->parallel(b, f->pad_t / MUL_WIDE, equation_item, f);
    }
}

/* ---- biases */

/* The equations of the rows that are free, those at a bound moved to the other side. Returns
 * how many there are; which[] maps them to rows. */
static uint32_t reduce(const struct fit *f, const uint8_t *fixed, float ridge, uint32_t *which)
{
    uint32_t n = 0, ld;

    for (uint32_t i = 0; i < f->t; i++)
        if (!fixed[i])
            which[n++] = i;
    ld = mul_padded(n);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t r = which[i];
        double sum = f->rhs[(uint64_t)r * f->pad_d] + ridge;

        for (uint32_t j = 0; j <= i; j++)
            f->work[(uint64_t)i * ld + j] = f->matrix[(uint64_t)r * f->pad_t + which[j]];
        for (uint32_t j = 0; j < f->t; j++)
            if (fixed[j])
                sum -= (double)f->weight[j] * (j <= r ? f->matrix[(uint64_t)r * f->pad_t + j]
                                                      : f->matrix[(uint64_t)j * f->pad_t + r]);
        memset(f->x + (uint64_t)i * MUL_WIDE, 0, MUL_WIDE * sizeof *f->x);
        f->x[(uint64_t)i * MUL_WIDE] = (float)sum;
    }
    return n;
}

/* One bounded solve: false when nothing went out of bounds. */
static bool take_weights(struct fit *f, const uint32_t *which, uint32_t n, uint8_t *fixed)
{
    bool out = false;

    for (uint32_t i = 0; i < n; i++) {
        float w = f->x[(uint64_t)i * MUL_WIDE];
        float bound = w < BIAS_MIN ? BIAS_MIN : w > BIAS_MAX ? BIAS_MAX : w;

        fixed[which[i]] = bound != w;
        out |= bound != w;
        f->weight[which[i]] = bound;
    }
    return out;
}

static int solve_bias(struct fit *f, float ridge, uint8_t *fixed, uint32_t *which,
                      struct larder_err *e)
{
    float weight = ridge * (float)f->u->n_queries;

    memset(fixed, 0, f->t);
    for (int round = 0; round < BIAS_ROUNDS; round++) {
        uint32_t n = reduce(f, fixed, weight, which);
        int rc = n ? solve_spd(f->m->b, f->work, n, weight, f->x, MUL_WIDE, e) : 0;

        if (rc)
            return rc;
        if (!take_weights(f, which, n, fixed))
            break;
    }
    return 0;
}

static int fit_bias(struct fit *f, float *bias, struct larder_err *e)
{
    uint8_t *fixed = mem_alloc(f->t, 1);
    uint32_t *which = mem_alloc(f->t, sizeof *which);
    float ridge = RIDGE_BIAS;
    int rc = LARDER_ENUMERIC;

    add_up(f, false);
    if (!fixed || !which)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to match %u rows", f->t);
    for (int i = 0; i < RIDGE_TRIES && rc == LARDER_ENUMERIC; i++, ridge *= RIDGE_STEP)
        rc = solve_bias(f, ridge, fixed, which, e);
    for (uint32_t i = 0; i < f->t && !rc; i++) {
        bias[i] = bf16_to_f32(f32_to_bf16(logf(f->weight[i])));
        f->weight[i] = expf(bias[i]);
    }
    mem_free(fixed);
    mem_free(which);
    return rc;
}

/* ---- values */

static int fit_values(struct fit *f, float *v, struct larder_err *e)
{
    uint32_t d = f->m->b->p->geom.head_dim;
    float ridge = RIDGE_VALUE * (float)f->u->n_queries;
    int rc = LARDER_ENUMERIC;

    add_up(f, true);
    for (int i = 0; i < RIDGE_TRIES && rc == LARDER_ENUMERIC; i++, ridge *= RIDGE_STEP) {
        memcpy(f->work, f->matrix, (uint64_t)f->pad_t * f->pad_t * sizeof *f->work);
        memcpy(f->x, f->rhs, (uint64_t)f->pad_t * f->pad_d * sizeof *f->x);
        rc = solve_spd(f->m->b, f->work, f->t, ridge, f->x, f->pad_d, e);
    }
    for (uint32_t i = 0; i < f->t && !rc; i++)
        for (uint32_t c = 0; c < d; c++)
            v[(uint64_t)i * d + c] =
                f->values[(uint64_t)i * f->pad_d + c] + f->x[(uint64_t)i * f->pad_d + c];
    return rc;
}

/* ---- one group, one head */

static void fit_free(struct fit *f)
{
    mem_free(f->keys);
    mem_free(f->values);
    mem_free(f->p);
    mem_free(f->rest);
    mem_free(f->matrix);
    mem_free(f->work);
    mem_free(f->rhs);
    mem_free(f->x);
    mem_free(f->weight);
}

/* keys[t][head_dim]: as they will be read back. */
static int fit_init(struct fit *f, const float *keys, struct larder_err *e)
{
    uint32_t d = f->m->b->p->geom.head_dim;
    uint64_t square = (uint64_t)f->pad_t * f->pad_t, tall = (uint64_t)f->pad_t * f->pad_d;

    f->keys = mem_aligned((uint64_t)f->pad_t * d, sizeof(float));
    f->values = mem_aligned(tall, sizeof(float));
    f->p = mem_aligned((uint64_t)f->pad_t * WIDE_ROWS, sizeof(float));
    f->rest = mem_aligned((uint64_t)WIDE_ROWS * f->pad_d, sizeof(float));
    f->matrix = mem_aligned(square, sizeof(float));
    f->work = mem_aligned(square, sizeof(float));
    f->rhs = mem_aligned(tall, sizeof(float));
    f->x = mem_aligned(tall, sizeof(float));
    f->weight = mem_aligned(f->pad_t, sizeof(float));
    if (!f->keys || !f->values || !f->p || !f->rest || !f->matrix || !f->work || !f->rhs || !f->x ||
        !f->weight)
        return larder_fail(e, LARDER_ENOMEM, "no memory to match %u rows", f->t);
    for (uint32_t i = 0; i < f->t; i++) {
        float *to = f->keys + (uint64_t)(i / MUL_WIDE) * d * MUL_WIDE + i % MUL_WIDE;

        for (uint32_t c = 0; c < d; c++)
            to[(uint64_t)c * MUL_WIDE] = keys[(uint64_t)i * d + c];
        memcpy(f->values + (uint64_t)i * f->pad_d,
               f->m->doc[f->g].v + (uint64_t)f->keep[i] * f->pad_d, d * sizeof *f->values);
        f->weight[i] = 1;
    }
    return 0;
}

static int fit_group(struct match *m, bool with_bias, uint32_t g, const struct match_group *u,
                     const uint32_t *keep, uint32_t t, const float *keys, float *v, float *bias,
                     struct larder_err *e)
{
    struct fit f = {.m = m,
                    .g = g,
                    .u = u,
                    .keep = keep,
                    .t = t,
                    .pad_t = mul_padded(t),
                    .pad_d = mul_padded(m->b->p->geom.head_dim)};
    int rc = fit_init(&f, keys, e);

    if (!rc && with_bias)
        rc = fit_bias(&f, bias, e);
    if (!rc)
        rc = fit_values(&f, v, e);
    fit_free(&f);
    return rc;
}

/* The kept keys as a decoder will read them. */
static int stored_keys(const struct match *m, enum kv_dtype precision, uint32_t g,
                       const uint32_t *keep, uint32_t t, float **ret, struct larder_err *e)
{
    uint32_t d = m->b->p->geom.head_dim;
    float *k = mem_alloc((uint64_t)t * d, sizeof *k);
    bool packs = packed_type(precision);
    uint8_t *tile = packs ? mem_alloc(tile_bytes_k(precision, t, d), 1) : NULL;

    if (!k || (packs && !tile)) {
        mem_free(k);
        mem_free(tile);
        return larder_fail(e, LARDER_ENOMEM, "no memory to match %u rows", t);
    }
    for (uint32_t i = 0; i < t; i++) {
        const float *from =
            m->doc[g].k + (uint64_t)(keep[i] / MUL_WIDE) * d * MUL_WIDE + keep[i] % MUL_WIDE;

        for (uint32_t c = 0; c < d; c++)
            k[(uint64_t)i * d + c] = packs ? from[(uint64_t)c * MUL_WIDE]
                                           : bf16_to_f32(f32_to_bf16(from[(uint64_t)c * MUL_WIDE]));
    }
    if (packs) {
        packed_from_k(precision, k, t, d, tile);
        packed_expand_k_f32(precision, tile, t, d, k);
    }
    mem_free(tile);
    *ret = k;
    return 0;
}

int match_fit_head(struct match *m, const struct match_opts *o, uint32_t kv_head,
                   const uint32_t *keep, uint32_t t, float *v, float *bias, struct larder_err *e)
{
    uint32_t d = m->b->p->geom.head_dim, at = 0;
    float *keys = NULL;
    int rc = stored_keys(m, o->precision, kv_head, keep, t, &keys, e);

    memset(bias, 0, t * sizeof *bias);
    for (uint32_t i = 0; i < m->n_groups && !rc; i++) {
        const struct match_group *u = &m->group[i];
        uint32_t end = at;

        while (end < t && keep[end] < u->row + u->n_rows)
            end++;
        if (end > at)
            rc = fit_group(m, o->with_bias, kv_head, u, keep + at, end - at,
                           keys + (uint64_t)at * d, v + (uint64_t)at * d, bias + at, e);
        at = end;
    }
    mem_free(keys);
    return rc;
}
