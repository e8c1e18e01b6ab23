/* solve.h - symmetric positive definite systems in f32.
 *
 * Purpose    The normal equations of matching: (A + ridge I) X = B by Cholesky, in blocks whose
 *            updates are products of mul.h on the backend's threads.
 * Shapes     a: [n][ld], row-major, ld = mul_padded(n), lower triangle and diagonal; overwritten.
 *            x: [n][cols], cols a multiple of 16: B on entry, X on return.
 * Threads    Results do not depend on their number.
 * Errors     LARDER_ENUMERIC when the matrix is not positive definite (a and x are then spoilt),
 *            LARDER_ENOMEM.
 */
#ifndef LARDER_SOLVE_H
#define LARDER_SOLVE_H

#include "backend.h"

int solve_spd(struct backend *b, float *a, uint32_t n, float ridge, float *x, uint32_t cols,
              struct larder_err *e);

#endif
