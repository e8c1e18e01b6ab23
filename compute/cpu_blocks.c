/* cpu_blocks.c - products with weights that stay in the file's own blocks.
 *
 * The one idea: a few rows are bound by reading the weights, so these are read in the form with the
 * fewest bytes. One to three rows take a dot product per row of W, fused where this processor
 * has one for the format (cpu_dot_avx2.c), else through one expanded row. More rows share
 * 16 expanded rows of W, which stay in the second-level cache. Threads take
 * rows of W, so that one new token occupies all of them. */
#include <string.h>

#include "cpu.h"
#include "dequant.h"
#include "mem.h"

#define ITEM_ROWS 64u /* rows of W that an item takes: whole panels */
#define MANY 4u       /* rows of x from which expanding rows of W pays */
#define SUM_OVER 32u  /* elements of x that a block's minimum meets */

static cpu_dot_fn *find_dot(const struct tensor_format *f)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return cpu_dot_avx2(f->type);
#endif
    (void)f;
    return NULL;
}

int cpu_blocks_init(struct cpu_blocks *w, const struct tensor_format *f, uint32_t n_out,
                    uint32_t n_in, struct larder_err *e)
{
    *w = (struct cpu_blocks){.format = f, .n_in = n_in, .n_out = n_out, .dot = find_dot(f)};
    w->n_blocks = n_in / f->block_len;
    w->row_bytes = (uint64_t)w->n_blocks * f->block_bytes;
    w->rows = mem_aligned(n_out, w->row_bytes);
    return w->rows ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the model's weights");
}

int cpu_blocks_load(struct cpu_backend *b, uint32_t layer, enum model_weight which,
                    struct cpu_blocks *w, struct larder_err *e)
{
    const struct model *m = b->ref.base.model;
    struct cpu_part part = {.which = which};
    uint32_t cols;
    int rc;

    model_weight_shape(m, which, &part.n, &cols);
    rc = cpu_blocks_init(w, model_weight_format(m, layer, which), part.n, cols, e);
    part.to = w->rows;
    part.stored_row = w->row_bytes;
    return rc ? rc : cpu_read(b, layer, &part, 1, e);
}

void cpu_blocks_done(struct cpu_blocks *w)
{
    mem_free(w->rows);
    *w = (struct cpu_blocks){0};
}

/* ---- products */

struct multiply {
    struct cpu_backend *b;
    const struct cpu_product *p;
    const float *x; /* [n][n_in] */
    float *sums;    /* [n][n_in / SUM_OVER]: a dot product of blocks with a minimum wants them */
    uint32_t n;
    float *panels;  /* x in panels of 16 rows, for many rows */
    float *scratch; /* [n_threads][per_worker]: an expanded row, or 16 and their products */
    uint64_t per_worker;
};

static void expand(const struct cpu_blocks *w, uint32_t row, float *to)
{
    w->format->to_f32(w->rows + row * w->row_bytes, w->n_blocks, to);
}

static float plain_dot(const float *a, const float *b, uint32_t n)
{
    return cpu_dot(a, KV_F32, 0, b, n);
}

/* Rows row .. row+n-1 of W, one dot product each. */
static void few(const struct multiply *m, const struct cpu_product *p, uint32_t row, uint32_t n,
                float *buf)
{
    const struct cpu_blocks *w = p->w;
    uint32_t n_sums = w->n_in / SUM_OVER;

    for (uint32_t r = row; r < row + n; r++) {
        if (!w->dot)
            expand(w, r, buf);
        for (uint32_t i = 0; i < m->n; i++) {
            const float *x = m->x + (uint64_t)i * w->n_in;
            float *y = p->y + i * p->ld + r;
            float v = w->dot ? w->dot(w->rows + r * w->row_bytes, w->n_blocks, x,
                                      m->sums + (uint64_t)i * n_sums)
                             : plain_dot(buf, x, w->n_in);

            *y = p->add ? *y + v : v;
        }
    }
}

/* Values of y for `rows` rows of W from `row` on, laid out as a product's c, and back. */
static void take_y(const struct multiply *m, const struct cpu_product *p, uint32_t row,
                   uint32_t rows, float *c)
{
    for (uint32_t i = 0; i < m->n; i++)
        for (uint32_t r = 0; r < rows; r++)
            c[i / MUL_WIDE * MUL_WIDE * MUL_WIDE + r * MUL_WIDE + i % MUL_WIDE] =
                p->y[i * p->ld + row + r];
}

static void give_y(const struct multiply *m, const struct cpu_product *p, uint32_t row,
                   uint32_t rows, const float *c)
{
    for (uint32_t i = 0; i < m->n; i++)
        for (uint32_t r = 0; r < rows; r++)
            p->y[i * p->ld + row + r] =
                c[i / MUL_WIDE * MUL_WIDE * MUL_WIDE + r * MUL_WIDE + i % MUL_WIDE];
}

/* The same for at most 16 rows of W. W times x^T: x has the panels, so expanded rows of W are
 * used as they come. Columns beyond the last row of x are computed and dropped: cheaper than
 * an edge. */
static void many(const struct multiply *m, const struct cpu_product *p, uint32_t row, uint32_t n,
                 float *buf)
{
    uint32_t n_in = p->w->n_in;
    float *c = buf + (uint64_t)MUL_WIDE * n_in;

    for (uint32_t r = 0; r < n; r++)
        expand(p->w, row + r, buf + (uint64_t)r * n_in);
    if (p->add)
        take_y(m, p, row, n, c);
    m->b->mul(&(struct mul){.a = buf,
                            .a_row = n_in,
                            .a_k = 1,
                            .b = m->panels,
                            .b_k = MUL_WIDE,
                            .b_panel = MUL_WIDE * (uint64_t)n_in,
                            .c = c,
                            .c_row = MUL_WIDE,
                            .c_panel = MUL_WIDE * MUL_WIDE,
                            .m = n,
                            .n = mul_padded(m->n),
                            .k = n_in,
                            .add = p->add});
    give_y(m, p, row, n, c);
}

static uint32_t items_of(const struct cpu_product *p)
{
    return (p->w->n_out + ITEM_ROWS - 1) / ITEM_ROWS;
}

static void multiply_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct multiply *m = arg;
    const struct cpu_product *p = m->p;
    float *buf = m->scratch + worker * m->per_worker;
    uint32_t row, end;

    for (; item >= items_of(p); p++)
        item -= items_of(p);
    row = item * ITEM_ROWS;
    end = p->w->n_out - row < ITEM_ROWS ? p->w->n_out : row + ITEM_ROWS;
    if (m->n < MANY)
        few(m, p, row, end - row, buf);
    for (; m->n >= MANY && row < end; row += MUL_WIDE)
        many(m, p, row, end - row < MUL_WIDE ? end - row : MUL_WIDE, buf);
}

static void sum_up(const struct multiply *m, uint32_t n_in)
{
    uint32_t n_sums = n_in / SUM_OVER;

    for (uint32_t i = 0; i < m->n; i++)
        for (uint32_t s = 0; s < n_sums; s++) {
            const float *x = m->x + (uint64_t)i * n_in + (uint64_t)s * SUM_OVER;
            double sum = 0;

            for (uint32_t k = 0; k < SUM_OVER; k++)
                sum += x[k];
            m->sums[(uint64_t)i * n_sums + s] = (float)sum;
        }
}

/* [n / 16][n_in][16]; rows that do not exist are 0. */
static void lay_panels(const struct multiply *m, uint32_t n_in)
{
    for (uint64_t i = 0; i < mul_padded(m->n); i++) {
        float *to = m->panels + i / MUL_WIDE * MUL_WIDE * n_in + i % MUL_WIDE;

        for (uint64_t k = 0; k < n_in; k++)
            to[k * MUL_WIDE] = i < m->n ? m->x[i * n_in + k] : 0;
    }
}

int cpu_blocks_multiply(struct cpu_backend *b, const struct cpu_product *p, uint32_t n_products,
                        const float *x, uint32_t n, struct larder_err *e)
{
    uint32_t n_in = p->w->n_in, n_items = 0, n_threads = b->ref.base.n_threads;
    struct multiply m = {.b = b, .p = p, .x = x, .n = n};
    bool wide = n >= MANY;
    uint64_t shared = wide ? (uint64_t)mul_padded(n) * n_in : (uint64_t)n * (n_in / SUM_OVER);

    m.per_worker = wide ? (uint64_t)MUL_WIDE * (n_in + mul_padded(n)) : n_in;
    m.scratch = mem_aligned(m.per_worker * n_threads + shared, sizeof *m.scratch);
    if (!m.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a matrix product");
    m.sums = m.panels = m.scratch + m.per_worker * n_threads;
    if (wide)
        lay_panels(&m, n_in);
    else
        sum_up(&m, n_in);
    for (uint32_t i = 0; i < n_products; i++)
        n_items += items_of(&p[i]);
    pool_for(b->pool, n_items, multiply_item, &m);
    mem_free(m.scratch);
    return 0;
}
