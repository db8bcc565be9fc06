/* Exponential functions, with the bits of methods/functions.py. */

#pragma once

/* (e^r - 1 - r) / r^2 */
static const double exp_terms[12] = {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320.,
                                     1 / 5040., 1 / 720., 1 / 120., 1 / 24., 1 / 6., 1 / 2.};

static inline double series(double r) {
    double p = exp_terms[0];
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) p = fma(p, r, exp_terms[i]);
    return p;
}

/* e^x = power * (1 + r + r^2 p): as `_reduced` in methods/functions.py. */
static inline double reduced(double x, double *power, double *r) {
    double shifted = x * 1.4426950408889634 + 0x1.8p52;
    double k = shifted - 0x1.8p52;
    *r = fma(k, -1.9082149292705877e-10, fma(k, -0.6931471803691238, x));
    uint64_t bits; /* whose last ones hold k */
    memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    memcpy(power, &bits, 8);
    return series(*r);
}

static inline double exp_of(double x) {
    double power, r, p = reduced(x < -708 ? -708 : x > 709 ? 709 : x, &power, &r);
    return (p * r * r + r + 1) * power;
}

/* For a size below FLAT a few terms do, and mostly all of a chunk is below it. */
#define FLAT 0x1p-5

static inline double flat_tanh(double x) {
    static const double terms[5] = {-1382 / 155925., 62 / 2835., -17 / 315., 2 / 15., -1 / 3.};
    double square = x * x, p = terms[0];
#pragma GCC unroll 12
    for (int i = 1; i < 5; i++) p = fma(p, square, terms[i]);
    return p * square * x + x;
}

static inline double steep_tanh(double x) {
    double size = fabs(x), power, r, p = reduced((size > 20 ? 20 : size) * 2, &power, &r);
    double less_one = (p * r * r + r) * power + (power - 1);
    return less_one / (less_one + 2) * ((x > 0 ? 1.0 : 0.0) - (x < 0 ? 1.0 : 0.0));
}

static void tanh_of(const double *restrict x, int64_t n, double *restrict out) {
    int64_t steep = 0;
    EACH(n) steep |= fabs(x[i]) >= FLAT;
    EACH(n) out[i] = flat_tanh(x[i]);
    if (!steep) return;
    EACH(n) out[i] = fabs(x[i]) < FLAT ? out[i] : steep_tanh(x[i]);
}

/* The rest as in methods/functions.py. */
static inline double log_of(double x) {
    static const double odd[10] = {1 / 21., 1 / 19., 1 / 17., 1 / 15., 1 / 13., 1 / 11., 1 / 9., 1 / 7., 1 / 5., 1 / 3.};
    int64_t bits;
    memcpy(&bits, &x, 8);
    int64_t whole = (bits - 0x3FE6A09E667F3BCD) & ~(((int64_t)1 << 52) - 1); /* the exponent in its place */
    int64_t rest = bits - whole;
    double m, k = (double)(int32_t)(whole >> 32) * 0x1p-20;
    memcpy(&m, &rest, 8);
    double f = (m - 1) / (m + 1), square = f * f, p = odd[0];
#pragma GCC unroll 12
    for (int i = 1; i < 10; i++) p = fma(p, square, odd[i]);
    f += f;
    return fma(k, 0.6931471803691238, fma(k, 1.9082149292705877e-10, p * square * f + f));
}

/* ln(p/q): of an f below ALIKE_UP_TO a few terms do, and mostly all of a chunk is below it. */
#define ALIKE_UP_TO 0x1p-4

static const double log_terms[6] = {1 / 13., 1 / 11., 1 / 9., 1 / 7., 1 / 5., 1 / 3.};

static inline double near_log(double f) {
    double square = f * f, p = log_terms[0];
#pragma GCC unroll 12
    for (int i = 1; i < 6; i++) p = fma(p, square, log_terms[i]);
    f += f;
    return p * square * f + f;
}

static void log_of_ratio(const double *restrict p, const double *restrict q, double *restrict out) {
    int64_t apart = 0;
    for (int i = 0; i < CHUNK; i++) out[i] = (p[i] - q[i]) / (p[i] + q[i]), apart |= fabs(out[i]) >= ALIKE_UP_TO;
    if (apart)
        for (int i = 0; i < CHUNK; i++) out[i] = fabs(out[i]) < ALIKE_UP_TO ? near_log(out[i]) : log_of(p[i] / q[i]);
    else
        for (int i = 0; i < CHUNK; i++) out[i] = near_log(out[i]);
}
