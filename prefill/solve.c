/* solve.c - a right-looking Cholesky factorisation in blocks of 64 columns.
 *
 * The one idea: the work is in the update behind a block, a product of its columns with their
 * own transpose. The block's rows are copied, negated and transposed once, so that the
 * update reads the matrix itself as one operand and writes it in place. */
#include "solve.h"

#include <math.h>

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
    float *t;       /* [(n - at - w) / 16][w][16]: minus the block's rows below it, transposed */
    float *x;
    uint32_t cols;
};

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

/* Item: rows below the block; each is solved against it and copied for the update. */
static void panel_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct factor *f = arg;
    uint32_t first = f->at + f->w, row = first + item * ROWS;
    uint32_t end = f->n - row < ROWS ? f->n : row + ROWS;

    (void)worker;
    for (; row < end; row++) {
        float *x = f->a + (uint64_t)row * f->ld + f->at;
        uint32_t i = row - first;
        float *to = f->t + (uint64_t)(i / MUL_WIDE) * f->w * MUL_WIDE + i % MUL_WIDE;

        for (uint32_t j = 0; j < f->w; j++) {
            const float *l = f->a + (uint64_t)(f->at + j) * f->ld + f->at;
            float sum = x[j];

            for (uint32_t k = 0; k < j; k++)
                sum -= x[k] * l[k];
            x[j] = sum / l[j];
            to[(uint64_t)j * MUL_WIDE] = -x[j];
        }
    }
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

        f->w = f->n - f->at < BLOCK ? f->n - f->at : BLOCK;
        if (!factor_diagonal(f))
            return false;
        rest = f->n - f->at - f->w;
        f->b->ops->parallel(f->b, (rest + ROWS - 1) / ROWS, panel_item, f);
        f->b->ops->parallel(f->b, (rest + ROWS - 1) / ROWS, update_item, f);
    }
    return true;
}

/* Item: 16 columns of the right-hand side, there and back. */
static void substitute_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct factor *f = arg;
    float *x = f->x + (uint64_t)item * MUL_WIDE;

    (void)worker;
    for (uint32_t i = 0; i < f->n; i++) {
        const float *l = f->a + (uint64_t)i * f->ld;
        float *xi = x + (uint64_t)i * f->cols;

        for (uint32_t k = 0; k < i; k++)
            for (uint32_t c = 0; c < MUL_WIDE; c++)
                xi[c] -= l[k] * x[(uint64_t)k * f->cols + c];
        for (uint32_t c = 0; c < MUL_WIDE; c++)
            xi[c] /= l[i];
    }
    for (uint32_t i = f->n; i-- > 0;) {
        const float *l = f->a + (uint64_t)i * f->ld;
        float *xi = x + (uint64_t)i * f->cols;

        for (uint32_t c = 0; c < MUL_WIDE; c++)
            xi[c] /= l[i];
        for (uint32_t k = 0; k < i; k++) /* L^T by columns: row i of L is met once, in order */
            for (uint32_t c = 0; c < MUL_WIDE; c++)
                x[(uint64_t)k * f->cols + c] -= l[k] * xi[c];
    }
}

int solve_spd(struct backend *b, float *a, uint32_t n, float ridge, float *x, uint32_t cols,
              struct larder_err *e)
{
    struct factor f = {
        .b = b, .mul = mul_pick(), .a = a, .n = n, .ld = mul_padded(n), .x = x, .cols = cols};
    bool done;

    f.t = mem_aligned((uint64_t)mul_padded(n), BLOCK * sizeof *f.t);
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
