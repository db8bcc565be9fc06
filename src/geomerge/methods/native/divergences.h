/* How far the softmax of each row is from the base's (Arcee Fusion). */

#pragma once

/* Powers of e in the place of n numbers, all divided by that of the largest; what makes a softmax of them. */
static double powers(double *x, int64_t n) {
    double lanes[CHUNK] = {0}, most = x[0], least_of = x[0];
    int64_t whole = n / LANES(double) * LANES(double);
    lanes_double large = most - (lanes_double){0}, against = -large;
    for (int64_t i = 0; i < whole; i += LANES(double)) {
        lanes_double some;
        memcpy(&some, x + i, sizeof some);
        large = larger_double(large, some), against = larger_double(against, -some);
    }
    for (int lane = 0; lane < LANES(double); lane++) {
        most = large[lane] > most ? large[lane] : most;
        least_of = -against[lane] < least_of ? -against[lane] : least_of;
    }
    for (int64_t i = whole; i < n; i++) {
        most = x[i] > most ? x[i] : most;
        least_of = x[i] < least_of ? x[i] : least_of;
    }
    const int near = most - least_of < NEAR;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        if (near) EACH(m) x[s + i] = near_exp(x[s + i] - most), lanes[i] += x[s + i];
        else EACH(m) x[s + i] = exp_of(x[s + i] - most), lanes[i] += x[s + i];
    }
    return 1 / halved(lanes);
}

/* Of each row of `columns` <= WINDOW elements the Kullback-Leibler divergence of the second input's softmax from the first's, each
 * plus `floor`; `room` is for two rows. Returns whether all are finite (looked at only if `check`). */
int geomerge_divergences(struct work *work, int64_t rows, int64_t columns, double floor, double *room, int check, double *out) {
    const void *raw[MOST];
    double bad = 0, share[2], p[CHUNK], q[CHUNK], apart[CHUNK];
    const int64_t together = WINDOW / columns;
    for (int64_t row = 0; row < rows; row++) {
        double lanes[CHUNK] = {0};
        const int64_t first = row % together * columns;
        if (!first && !fetch(work, row * columns, least(together, rows - row) * columns, raw)) return -1;
        for (int k = 0; k < 2; k++) {
            double *x = room + k * columns;
            for (int64_t s = 0; s < columns; s += CHUNK) {
                int64_t m = least(CHUNK, columns - s);
                load_double(raw[k], work->inputs[k].dtype, first + s, m, x + s);
                if (check) bad += odd_double(raw[k], work->inputs[k].dtype, first + s, m, x + s);
            }
            share[k] = powers(x, columns);
        }
        for (int64_t s = 0; s < columns; s += CHUNK) {
            int64_t m = least(CHUNK, columns - s);
            EACH(m) q[i] = room[s + i] * share[0] + floor;
            EACH(m) p[i] = room[columns + s + i] * share[1] + floor;
            for (int64_t i = m; i < CHUNK; i++) p[i] = q[i] = 1;
            log_of_ratio(p, q, apart);
            EACH(m) lanes[i] += p[i] * apart[i];
        }
        out[row] = halved(lanes);
    }
    return bad == 0;
}
