/* cpu_blocks.c - products with weights that stay in the file's own blocks.
 *
 * The one idea: a few rows are bound by reading the weights, so these are read in the form with the
 * fewest bytes. One to three rows take a dot product per row of W, fused where this processor
 * has one for the format (cpu_dot_avx2.c), else through one expanded row. More rows share
 * an expanded panel of 16 rows of W, which stays in the second-level cache. Threads take
 * rows of W, so that one new token occupies all of them. */
#include <string.h>

#include "cpu.h"
#include "dequant.h"
#include "mem.h"

#define ITEM_ROWS 64u /* rows of W that an item takes: whole panels */
#define MANY 4u       /* rows of x from which expanding a panel pays */
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
    float *scratch; /* [n_threads][per_worker]: an expanded row, or 16 and their panel */
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

/* The same for at most 16 rows of W, which become a panel first. */
static void many(const struct multiply *m, const struct cpu_product *p, uint32_t row, uint32_t n,
                 float *buf)
{
    uint32_t n_in = p->w->n_in;
    float *panel = buf + (uint64_t)MUL_WIDE * n_in;

    for (uint32_t r = 0; r < n; r++)
        expand(p->w, row + r, buf + (uint64_t)r * n_in);
    if (n < MUL_WIDE) /* whole panels are read */
        memset(buf + (uint64_t)n * n_in, 0, (uint64_t)(MUL_WIDE - n) * n_in * sizeof *buf);
    for (uint64_t k = 0; k < n_in; k++)
        for (uint64_t r = 0; r < MUL_WIDE; r++)
            panel[k * MUL_WIDE + r] = buf[r * n_in + k];
    m->b->mul(&(struct mul){.a = m->x,
                            .a_row = n_in,
                            .a_k = 1,
                            .a_panel = MUL_WIDE * (uint64_t)n_in,
                            .b = panel,
                            .b_k = MUL_WIDE,
                            .b_panel = MUL_WIDE * (uint64_t)n_in,
                            .c = p->y + row,
                            .c_row = p->ld,
                            .c_panel = MUL_WIDE,
                            .m = m->n,
                            .n = n,
                            .k = n_in,
                            .add = p->add});
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

int cpu_blocks_multiply(struct cpu_backend *b, const struct cpu_product *p, uint32_t n_products,
                        const float *x, uint32_t n, struct larder_err *e)
{
    uint32_t n_in = p->w->n_in, n_sums = n < MANY ? n * (n_in / SUM_OVER) : 0, n_items = 0;
    struct multiply m = {.b = b, .p = p, .x = x, .n = n};

    m.per_worker = (uint64_t)n_in * (n < MANY ? 1 : 2 * MUL_WIDE);
    m.scratch = mem_aligned(m.per_worker * b->ref.base.n_threads + n_sums, sizeof *m.scratch);
    if (!m.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a matrix product");
    m.sums = m.scratch + m.per_worker * b->ref.base.n_threads;
    if (n < MANY)
        sum_up(&m, n_in);
    for (uint32_t i = 0; i < n_products; i++)
        n_items += items_of(&p[i]);
    pool_for(b->pool, n_items, multiply_item, &m);
    mem_free(m.scratch);
    return 0;
}
