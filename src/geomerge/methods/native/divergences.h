/* How far the softmax of each row is from the base's (Arcee Fusion), with the bits of methods/elementwise/arcee_fusion.py. */

#pragma once

#define SIZE_UP_TO 0.5 /* of a row's numbers in the base ... */
#define CHANGE_UP_TO 0x1p-5 /* ... and of their changes, where the two are near */
#define CANCELLED 0x1p-16
#define SUM_LANES 8

/* e^(x/2) and (e^x - 1)/x for these, and some terms of e^(-x). */
static const double root_terms[8] = {1.552792454257085e-06, 2.174987576902487e-05, 0.00026041624574507194, 0.0026041590883559645,
                                     0.02083333335438143, 0.12500000037895992, 0.4999999999998356, 0.9999999999970393};
static const double less_one_terms[6] = {0.001388925219782528, 0.008333623981369434, 0.04166666665336185,
                                         0.16666666656022772, 0.5000000000000008, 1.0000000000000058};
static const double inverse_terms[4] = {-1 / 6., 1 / 2., -1.0, 1.0};

static inline __attribute__((always_inline)) lanes_double polynomial_of(const double *terms, const int number, lanes_double x) {
    lanes_double p = every(terms[0]);
#pragma GCC unroll 12
    for (int i = 1; i < number; i++) p = plus_product_double(every(terms[i]), p, x);
    return p;
}

static inline lanes_double lanes_at(const double *x) {
    lanes_double some;
    memcpy(&some, x, sizeof some);
    return some;
}

/* What is summed up of a row; and the largest change. */
enum { OF_POWERS, OF_CHANGES, OF_MOVED, OF_LESS_ONES, OF_DIFFERENCES, OF_INVERSES, OF_FIRST, OF_SECOND, NEAR_SUMS, LARGEST = NEAR_SUMS };
enum { BESIDE = SUM_LANES / LANES(double) };
typedef lanes_double near_sums[BESIDE][NEAR_SUMS + 1];

FUSED add_near(lanes_double *sum, lanes_double x, lanes_double other, int64_t left) {
    const lanes_double apart = other - x, root = polynomial_of(root_terms, 8, x);
    const lanes_double less_one = polynomial_of(less_one_terms, 6, apart) * apart;
    lanes_double power = root * root, inverse = polynomial_of(inverse_terms, 4, other);
    for (int64_t i = left; i < LANES(double); i++) power[i] = inverse[i] = 0; /* what only fills a register */
    const lanes_double change = power * less_one, first = inverse * less_one;
    sum[OF_POWERS] += power, sum[OF_CHANGES] += change, sum[OF_MOVED] += (power + change) * apart;
    sum[OF_LESS_ONES] += less_one, sum[OF_DIFFERENCES] += apart;
    sum[OF_INVERSES] += inverse, sum[OF_FIRST] += first, sum[OF_SECOND] += first * less_one;
    /* This forgets a NaN, which the sums do not. */
    sum[LARGEST] = larger_double(sum[LARGEST], (lanes_double)((longs)apart & INT64_MAX));
}

static double sum_of_lanes(near_sums sums, int which) {
    double lanes[SUM_LANES];
    for (int v = 0; v < BESIDE; v++) memcpy(lanes + v * LANES(double), &sums[v][which], sizeof sums[v][which]);
    for (int half = SUM_LANES / 2; half; half /= 2) EACH(half) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Whether none of n raw numbers is larger than SIZE_UP_TO. */
static int all_small(const void *raw, int dtype, int64_t start, int64_t n, const double *x) {
    if (dtype == BF16) {
        const uint16_t *bits = (const uint16_t *)raw + start;
        uint16_t most = 0;
        EACH(n) {
            const uint16_t size = bits[i] & 0x7FFF;
            most = size > most ? size : most;
        }
        return from_bf16(most) <= SIZE_UP_TO;
    }
    int small = 1;
    EACH(n) small &= fabs(x[i]) <= SIZE_UP_TO;
    return small;
}

/* The divergence of two rows from eight sums, and the mean change: docs/architecture.md derives it. `shift` is taken away from the second
 * row; `rows` has the numbers where they are not bfloat16. NaN where the changes are too large. */
static double from_sums(const void *const *raw, int bf16, int64_t start, int64_t n, double floor, const double *rows, double shift,
                        double *mean) {
    const int64_t whole = bf16 ? n / SUM_LANES * SUM_LANES : 0;
    const double limit = shift == 0 ? CHANGE_UP_TO : INFINITY; /* afterwards it is known */
    near_sums sums = {{{0}}};
    for (int64_t i = 0; i < whole; i += SUM_LANES)
        for (int v = 0; v < BESIDE; v++) {
            const int64_t at = start + i + v * LANES(double);
            const lanes_double x = widened_double((const uint16_t *)raw[0] + at), other = widened_double((const uint16_t *)raw[1] + at);
            add_near(sums[v], x, other - every(shift), LANES(double));
        }
    for (int64_t i = whole; i < n; i += SUM_LANES) {
        double padded[2][SUM_LANES] = {{0}};
        const int64_t left = least(n - i, SUM_LANES);
        for (int k = 0; k < 2; k++)
            if (bf16) load_double(raw[k], BF16, start + i, left, padded[k]);
            else memcpy(padded[k], rows + k * n + i, (size_t)left * sizeof(double));
        for (int64_t j = 0; j < left; j++) padded[1][j] -= shift;
        for (int v = 0; v < BESIDE; v++)
            add_near(sums[v], lanes_at(padded[0] + v * LANES(double)), lanes_at(padded[1] + v * LANES(double)),
                     left < v * LANES(double) ? 0 : left - v * LANES(double));
    }
    for (int v = 0; v < BESIDE; v++)
        for (int i = 0; i < LANES(double); i++)
            if (!(sums[v][LARGEST][i] <= limit)) return NAN;
    double total[NEAR_SUMS];
    for (int k = 0; k < NEAR_SUMS; k++) total[k] = sum_of_lanes(sums, k);
    const double before = total[OF_POWERS], grown = total[OF_CHANGES], after = before + grown, number = (double)n;
    const double lost = grown / after, left = before / after;
    *mean = near_log(grown / (before + after)); /* ln(after / before) */
    const double by_floor = total[OF_DIFFERENCES] - *mean * number - left * total[OF_LESS_ONES] + lost * number;
    const double by_square = left * left * total[OF_SECOND] - 2 * lost * left * total[OF_FIRST] + lost * lost * total[OF_INVERSES];
    return total[OF_MOVED] / after - *mean + floor * by_floor + 0.5 * floor * floor * after * by_square;
}

/* The divergence of two rows that are near; NaN of others. */
static double near_divergence(const void *const *raw, int bf16, int64_t start, int64_t n, double floor, const double *rows) {
    double mean;
    if (!all_small(raw[0], bf16 ? BF16 : F64, start, n, rows)) return NAN;
    const double found = from_sums(raw, bf16, start, n, floor, rows, 0, &mean);
    if (!(fabs(found) < fabs(mean) * CANCELLED)) return found;
    /* A softmax does not change when all its row does: so without the mean change. */
    return from_sums(raw, bf16, start, n, floor, rows, mean, &mean);
}

/* Powers of e in the place of n numbers, all divided by that of the largest; what makes a softmax of them. */
static double powers(double *x, int64_t n) {
    double lanes[CHUNK] = {0}, most = x[0];
    EACH(n) most = x[i] > most ? x[i] : most;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        EACH(m) x[s + i] = exp_of(x[s + i] - most), lanes[i] += x[s + i];
    }
    return 1 / halved(lanes);
}

/* The Kullback-Leibler divergence of the softmax of the second of two rows from the first's, each plus `floor`; `rows` is for
 * the numbers of both. */
static double divergence(const void *const *raw, const int *dtypes, int64_t start, int64_t columns, double floor, double *rows) {
    double share[2], p[CHUNK], q[CHUNK], apart[CHUNK], lanes[CHUNK] = {0};
    const int bf16 = dtypes[0] == BF16 && dtypes[1] == BF16;
    double found = bf16 ? near_divergence(raw, 1, start, columns, floor, rows) : NAN;
    if (found == found) return found;
    for (int k = 0; k < 2; k++)
        for (int64_t s = 0; s < columns; s += CHUNK)
            load_double(raw[k], dtypes[k], start + s, least(CHUNK, columns - s), rows + k * columns + s);
    if (!bf16) found = near_divergence(raw, 0, start, columns, floor, rows);
    if (found == found) return found;
    for (int k = 0; k < 2; k++) share[k] = powers(rows + k * columns, columns);
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
