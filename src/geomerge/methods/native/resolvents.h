/* Sums of resolvents of a tridiagonal matrix (methods/roots.py): Σ wⱼ (T + tⱼ)⁻¹ C, with T + tⱼ = LDLᵀ. */

#pragma once

#define STRIP_REGISTERS 2
#define STRIP (STRIP_REGISTERS * LANES(double)) /* columns of C that are solved for together */

/* Of one shift: L's elements beside the diagonal, the first of which is 0, and w over the pivots. */
static void factorise(int64_t n, const double *diagonal, const double *beside, double shift, double weight, double *beneath, double *over) {
    double pivot = diagonal[0] + shift;
    beneath[0] = 0;
    over[0] = weight / pivot;
    for (int64_t i = 1; i < n; i++) {
        const double factor = beside[i - 1] / pivot;
        pivot = diagonal[i] + shift - factor * beside[i - 1];
        beneath[i] = factor;
        over[i] = weight / pivot;
    }
}

/* Of two shifts, whose factors lie one after the other: what they add to a strip. */
static void add_solutions(int64_t n, const double *beneath, const double *over, const lanes_double *strip, lanes_double *a, lanes_double *b,
                          lanes_double *sum) {
    lanes_double x[STRIP_REGISTERS], y[STRIP_REGISTERS];
    for (int r = 0; r < STRIP_REGISTERS; r++) x[r] = y[r] = (lanes_double){0};
    for (int64_t i = 0; i < n; i++)
        for (int r = 0; r < STRIP_REGISTERS; r++) {
            const int64_t at = i * STRIP_REGISTERS + r;
            a[at] = x[r] = strip[at] - beneath[i] * x[r];
            b[at] = y[r] = strip[at] - beneath[n + i] * y[r];
        }
    double below = 0, other = 0;
    for (int r = 0; r < STRIP_REGISTERS; r++) x[r] = y[r] = (lanes_double){0};
    for (int64_t i = n; i--;) {
        for (int r = 0; r < STRIP_REGISTERS; r++) {
            const int64_t at = i * STRIP_REGISTERS + r;
            x[r] = a[at] * over[i] - below * x[r];
            y[r] = b[at] * over[n + i] - other * y[r];
            sum[at] = sum[at] + x[r] + y[r];
        }
        below = beneath[i];
        other = beneath[n + i];
    }
}

/* `c` and `out`: rows of `columns`. Room, of whole registers: strips of C, of two solutions and of the sum; then the factors of all shifts,
 * of an even number. */
void geomerge_resolvents(int64_t n, int64_t columns, const double *diagonal, const double *beside, int64_t shifts, const double *shift,
                         const double *weight, const double *c, lanes_double *room, double *out) {
    const int64_t even = shifts + shifts % 2, size = n * STRIP_REGISTERS;
    lanes_double *strip = room, *a = strip + size, *b = a + size, *sum = b + size;
    double *beneath = (double *)(sum + size), *over = beneath + even * n;
    for (int64_t j = 0; j < even; j++)
        factorise(n, diagonal, beside, j < shifts ? shift[j] : shift[0], j < shifts ? weight[j] : 0, beneath + j * n, over + j * n);
    for (int64_t s = 0; s < columns; s += STRIP) {
        const int64_t m = least(STRIP, columns - s);
        memset(strip, 0, size * sizeof *strip);
        memset(sum, 0, size * sizeof *sum);
        for (int64_t i = 0; i < n; i++) memcpy((double *)strip + i * STRIP, c + i * columns + s, m * sizeof *c);
        for (int64_t j = 0; j < even; j += 2) add_solutions(n, beneath + j * n, over + j * n, strip, a, b, sum);
        for (int64_t i = 0; i < n; i++) memcpy(out + i * columns + s, (double *)sum + i * STRIP, m * sizeof *out);
    }
}
