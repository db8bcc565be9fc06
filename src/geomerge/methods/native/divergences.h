/* How far the softmax of each row is from the base's (Arcee Fusion). */

#pragma once

#define BESIDE 4 /* vectors that are computed together: none waits for another */
#define BUNDLE (BESIDE * LANES(double))

static inline lanes_double lanes_at(const double *x) {
    lanes_double some;
    memcpy(&some, x, sizeof some);
    return some;
}

static inline lanes_double near_exps(lanes_double x) {
    lanes_double p = every(exp_terms[0]);
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) p = plus_product_double(every(exp_terms[i]), p, x);
    return p * x * x + x + every(1);
}

static inline lanes_double near_logs(lanes_double f) {
    lanes_double square = f * f, p = every(log_terms[0]);
#pragma GCC unroll 12
    for (int i = 1; i < 6; i++) p = plus_product_double(every(log_terms[i]), p, square);
    f += f;
    return p * square * f + f;
}

/* As `powers` does where nothing is to be reduced: the sum of each lane at once, in registers. */
static void near_powers(double *x, int64_t n, double most, double *lanes) {
    const int64_t whole = n / BUNDLE * BUNDLE;
    for (int64_t lane = 0; lane < CHUNK; lane += BUNDLE) {
        lanes_double sum[BESIDE] = {{0}};
        for (int64_t s = lane; s < whole; s += CHUNK)
            for (int v = 0; v < BESIDE; v++) {
                double *at = x + s + v * LANES(double);
                const lanes_double power = near_exps(lanes_at(at) - every(most));
                memcpy(at, &power, sizeof power);
                sum[v] += power;
            }
        memcpy(lanes + lane, sum, sizeof sum);
    }
    for (int64_t i = whole; i < n; i++) x[i] = near_exp(x[i] - most), lanes[i % CHUNK] += x[i];
}

/* The least and the largest of n raw numbers, of which `x` is the doubles. */
static void extremes(const void *raw, int dtype, int64_t start, int64_t n, const double *x, double *lowest, double *most) {
    if (dtype == BF16) { /* whose bits, those of a negative number turned over, are in their order */
        const int16_t *bits = (const int16_t *)raw + start;
        int16_t low = INT16_MAX, high = INT16_MIN;
        EACH(n) {
            int16_t place = bits[i] ^ ((bits[i] >> 15) & INT16_MAX);
            low = place < low ? place : low, high = place > high ? place : high;
        }
        *lowest = from_bf16((uint16_t)(low ^ ((low >> 15) & INT16_MAX)));
        *most = from_bf16((uint16_t)(high ^ ((high >> 15) & INT16_MAX)));
        return;
    }
    *lowest = *most = x[0];
    EACH(n) *lowest = x[i] < *lowest ? x[i] : *lowest, *most = x[i] > *most ? x[i] : *most;
}

/* Powers of e in the place of n numbers, all divided by that of the largest; what makes a softmax of them. */
static double powers(double *x, int64_t n, double lowest, double most) {
    double lanes[CHUNK] = {0};
    if (most - lowest < NEAR) near_powers(x, n, most, lanes);
    else
        for (int64_t s = 0; s < n; s += CHUNK) {
            int64_t m = least(CHUNK, n - s);
            EACH(m) x[s + i] = exp_of(x[s + i] - most), lanes[i] += x[s + i];
        }
    return 1 / halved(lanes);
}

/* The sum of p ln(p/q) for p and q of two rows of powers where a few terms of the logarithm do for all; NaN where they do not, or where a
 * power is. */
static double near_divergence(const double *powers, int64_t n, const double *share, double floor) {
    const int64_t whole = n / BUNDLE * BUNDLE;
    double lanes[CHUNK];
    lanes_double apart = {0};
    for (int64_t lane = 0; lane < CHUNK; lane += BUNDLE) {
        lanes_double sum[BESIDE] = {{0}};
        for (int64_t s = lane; s < whole; s += CHUNK)
            for (int v = 0; v < BESIDE; v++) {
                const double *at = powers + s + v * LANES(double);
                const lanes_double q = lanes_at(at) * every(share[0]) + every(floor), p = lanes_at(at + n) * every(share[1]) + every(floor);
                const lanes_double f = (p - q) / (p + q);
                apart = larger_double(larger_double(apart, f), -f);
                sum[v] += p * near_logs(f);
            }
        memcpy(lanes + lane, sum, sizeof sum);
    }
    int far = 0;
    for (int i = 0; i < LANES(double); i++) far |= !(apart[i] < ALIKE_UP_TO);
    for (int64_t i = whole; i < n; i++) {
        const double q = powers[i] * share[0] + floor, p = powers[n + i] * share[1] + floor, f = (p - q) / (p + q);
        far |= !(fabs(f) < ALIKE_UP_TO);
        lanes[i % CHUNK] += p * near_log(f);
    }
    return far ? NAN : halved(lanes);
}

/* The Kullback-Leibler divergence of the softmax of the second of two rows from the first's, each plus `floor`; `rows` is for
 * the powers of both. */
static double divergence(const void *const *raw, const int *dtypes, int64_t start, int64_t columns, double floor, double *rows) {
    double share[2], p[CHUNK], q[CHUNK], apart[CHUNK], lanes[CHUNK] = {0};
    for (int k = 0; k < 2; k++) {
        double *x = rows + k * columns;
        for (int64_t s = 0; s < columns; s += CHUNK) load_double(raw[k], dtypes[k], start + s, least(CHUNK, columns - s), x + s);
        double lowest, most;
        extremes(raw[k], dtypes[k], start, columns, x, &lowest, &most);
        share[k] = powers(x, columns, lowest, most);
    }
    const double found = near_divergence(rows, columns, share, floor);
    if (found == found) return found;
    for (int64_t s = 0; s < columns; s += CHUNK) {
        int64_t m = least(CHUNK, columns - s);
        EACH(m) q[i] = rows[s + i] * share[0] + floor;
        EACH(m) p[i] = rows[columns + s + i] * share[1] + floor;
        for (int64_t i = m; i < CHUNK; i++) p[i] = q[i] = 1;
        log_of_ratio(p, q, apart);
        EACH(m) lanes[i] += p[i] * apart[i];
    }
    return halved(lanes);
}
