/* solve.c - a right-looking Cholesky factorisation in blocks of 64 columns.
 *
 * The one idea: all but a block's own triangle is a product of matrices. 16 right-hand sides
 * stand in one panel, so that a triangle is solved for all of them at once; the rows below a
 * block are such right-hand sides too, transposed, and stay transposed for the update. */
#include "solve.h"

#include <math.h>
#include <string.h>

#include "fast.h"
#include "mem.h"
#include "mul.h"

#define BLOCK 64u
#define ROWS 128u /* rows of an update's item */

struct factor {
    struct backend *b;
    mul_fn *mul;
    float *a;
    uint32_t n, ld;
    uint32_t at, w; /* this block: columns at .. at + w */
    float *t;       /* [(n - at - w) / 16][w][16]: minus the block's rows below it, transposed;
                     * when that is done, [cols / 16][n][16]: minus the solution so far */
    float *x;
    uint32_t cols;
};

static uint32_t block_rows(const struct factor *f, uint32_t at)
{
    return f->n - at < BLOCK ? f->n - at : BLOCK;
}

/* The block on the diagonal, sums in f64. */
static bool factor_diagonal(const struct factor *f)
{
    for (uint32_t j = f->at; j < f->at + f->w; j++) {
        float *row = f->a + (uint64_t)j * f->ld;

        for (uint32_t i = f->at; i <= j; i++) {
            const float *left = f->a + (uint64_t)i * f->ld;
            double sum = row[i];

            for (uint32_t k = f->at; k < i; k++)
                sum -= (double)row[k] * left[k];
            if (i < j)
                row[i] = (float)(sum / left[i]);
            else if (sum > 0 && isfinite(sum))
                row[j] = (float)sqrt(sum);
            else
                return false;
        }
    }
    return true;
}

/* Row i of a triangle and a panel of right-hand sides x[n][16], where the rows first..end are
 * solved; element k of its row is at l[k * step]. */
static inline __attribute__((always_inline, optimize("O3", "fp-contract=off"))) void
solve_row(const float *l, uint64_t step, uint32_t first, uint32_t end, uint32_t i, float *x)
{
    float sum[MUL_WIDE];

    for (uint32_t c = 0; c < MUL_WIDE; c++)
        sum[c] = x[i * MUL_WIDE + c];
    for (uint32_t k = first; k < end; k++)
        for (uint32_t c = 0; c < MUL_WIDE; c++)
            sum[c] -= l[k * step] * x[k * MUL_WIDE + c];
    for (uint32_t c = 0; c < MUL_WIDE; c++)
        x[i * MUL_WIDE + c] = sum[c] / l[i * step];
}

/* L x = x, of n rows. */
FAST static void solve_lower(const float *l, uint64_t ld, uint32_t n, float *x)
{
    for (uint32_t i = 0; i < n; i++)
        solve_row(l + i * ld, 1, 0, i, i, x);
}

/* The same for the transposed triangle. */
FAST static void solve_upper(const float *l, uint64_t ld, uint32_t n, float *x)
{
    for (uint32_t i = n; i-- > 0;)
        solve_row(l + i, ld, i + 1, n, i, x);
}

static void negate(const float *x, uint32_t rows, float *to)
{
    for (uint32_t i = 0; i < rows * MUL_WIDE; i++)
        to[i] = -x[i];
}

/* Item: 16 rows below the block. */
static void panel_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct factor *f = arg;
    uint32_t row = f->at + f->w + item * MUL_WIDE;
    uint32_t rows = f->n - row < MUL_WIDE ? f->n - row : MUL_WIDE;
    float *x = f->a + (uint64_t)row * f->ld + f->at;
    float *t = f->t + (uint64_t)item * f->w * MUL_WIDE;

    (void)worker;
    for (uint32_t k = 0; k < f->w; k++)
        for (uint32_t i = 0; i < MUL_WIDE; i++)
            t[k * MUL_WIDE + i] = i < rows ? x[(uint64_t)i * f->ld + k] : 0;
    solve_lower(f->a + (uint64_t)f->at * f->ld + f->at, f->ld, f->w, t);
    for (uint32_t k = 0; k < f->w; k++)
        for (uint32_t i = 0; i < rows; i++)
            x[(uint64_t)i * f->ld + k] = t[k * MUL_WIDE + i];
    negate(t, f->w, t);
}

/* Item: rows behind the block, the part of each up to the diagonal. */
static void update_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct factor *f = arg;
    uint32_t first = f->at + f->w, row = first + item * ROWS;
    uint32_t rows = f->n - row < ROWS ? f->n - row : ROWS;

    (void)worker;
    f->mul(&(struct mul){.a = f->a + (uint64_t)row * f->ld + f->at,
                         .a_row = f->ld,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * (uint64_t)f->ld,
                         .b = f->t,
                         .b_k = MUL_WIDE,
                         .b_panel = (uint64_t)f->w * MUL_WIDE,
                         .c = f->a + (uint64_t)row * f->ld + first,
                         .c_row = f->ld,
                         .c_panel = MUL_WIDE,
                         .m = rows,
                         .n = row + rows - first,
                         .k = f->w,
                         .add = true});
}

static bool factor(struct factor *f)
{
    for (f->at = 0; f->at < f->n; f->at += f->w) {
        uint32_t rest;

        f->w = block_rows(f, f->at);
        if (!factor_diagonal(f))
            return false;
        rest = f->n - f->at - f->w;
        f->b->ops->parallel(f->b, mul_padded(rest) / MUL_WIDE, panel_item, f);
        f->b->ops->parallel(f->b, (rest + ROWS - 1) / ROWS, update_item, f);
    }
    return true;
}

/* What n rows of the solution owe to k others, whose negatives are in `known`; element (i, l) of
 * the factor is at l[i * a_row + l * a_k]. */
static void settle(const struct factor *f, const float *l, uint64_t a_row, uint64_t a_k,
                   const float *known, uint32_t k, float *x, uint32_t n)
{
    f->mul(&(struct mul){.a = l,
                         .a_row = a_row,
                         .a_k = a_k,
                         .a_panel = MUL_WIDE * a_row,
                         .b = known,
                         .b_k = MUL_WIDE,
                         .c = x,
                         .c_row = MUL_WIDE,
                         .m = n,
                         .n = MUL_WIDE,
                         .k = k,
                         .add = true});
}

/* L y = b for 16 columns; -y goes to known[n][16]. */
static void substitute_lower(const struct factor *f, const float *column, float *known)
{
    float x[BLOCK * MUL_WIDE];

    for (uint32_t at = 0; at < f->n; at += BLOCK) {
        uint32_t w = block_rows(f, at);
        const float *l = f->a + (uint64_t)at * f->ld;

        for (uint32_t i = 0; i < w; i++)
            memcpy(x + i * MUL_WIDE, column + (uint64_t)(at + i) * f->cols, MUL_WIDE * sizeof *x);
        settle(f, l, f->ld, 1, known, at, x, w);
        solve_lower(l + at, f->ld, w, x);
        negate(x, w, known + (uint64_t)at * MUL_WIDE);
    }
}

/* L^T x = y for 16 columns, in the place of y. */
static void substitute_upper(const struct factor *f, float *known, float *column)
{
    float x[BLOCK * MUL_WIDE];

    for (uint32_t block = (f->n + BLOCK - 1) / BLOCK; block-- > 0;) {
        uint32_t at = block * BLOCK, w = block_rows(f, at);
        const float *l = f->a + (uint64_t)at * f->ld + at;
        float *mine = known + (uint64_t)at * MUL_WIDE;

        negate(mine, w, x);
        if (at + w < f->n)
            settle(f, l + (uint64_t)w * f->ld, 1, f->ld, mine + w * MUL_WIDE, f->n - at - w, x, w);
        solve_upper(l, f->ld, w, x);
        negate(x, w, mine);
        for (uint32_t i = 0; i < w; i++)
            memcpy(column + (uint64_t)(at + i) * f->cols, x + i * MUL_WIDE, MUL_WIDE * sizeof *x);
    }
}

/* Item: 16 columns of the right-hand side, there and back. */
static void substitute_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct factor *f = arg;
    float *known = f->t + (uint64_t)item * mul_padded(f->n) * MUL_WIDE;
    float *column = f->x + (uint64_t)item * MUL_WIDE;

    (void)worker;
    substitute_lower(f, column, known);
    substitute_upper(f, known, column);
}

int solve_spd(struct backend *b, float *a, uint32_t n, float ridge, float *x, uint32_t cols,
              struct larder_err *e)
{
    struct factor f = {
        .b = b, .mul = mul_pick(), .a = a, .n = n, .ld = mul_padded(n), .x = x, .cols = cols};
    bool done;

    f.t = mem_aligned((uint64_t)mul_padded(n), (cols > BLOCK ? cols : BLOCK) * sizeof *f.t);
    if (!f.t)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a system of %u equations", n);
    for (uint32_t i = 0; i < n; i++)
        a[(uint64_t)i * f.ld + i] += ridge;
    done = factor(&f);
    if (done)
        b->ops->parallel(b, cols / MUL_WIDE, substitute_item, &f);
    mem_free(f.t);
    return done
               ? 0
               : larder_fail(e, LARDER_ENUMERIC, "a matrix of %u rows is not positive definite", n);
}
