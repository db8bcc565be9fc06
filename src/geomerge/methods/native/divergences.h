/* How far the softmax of each row is from the base's (Arcee Fusion). */

#pragma once

/* The softmax of n numbers, plus `floor`, in their place. */
static void softmax(double *x, int64_t n, double floor) {
    double lanes[CHUNK] = {0}, large[8], most = x[0];
    for (int lane = 0; lane < 8; lane++) large[lane] = most;
    for (int64_t s = 0; s + 8 <= n; s += 8)
        for (int lane = 0; lane < 8; lane++) large[lane] = x[s + lane] > large[lane] ? x[s + lane] : large[lane];
    for (int64_t i = n / 8 * 8; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int lane = 0; lane < 8; lane++) most = large[lane] > most ? large[lane] : most;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        EACH(m) x[s + i] = exp_of(x[s + i] - most), lanes[i] += x[s + i];
    }
    double sum = halved(lanes);
    EACH(n) x[i] = x[i] / sum + floor;
}

/* Of each row of `columns` <= WINDOW elements the Kullback-Leibler divergence of the second input's softmax from the first's, each
 * plus `floor`; `room` is for two rows. Returns whether all are finite (looked at only if `check`). */
int geomerge_divergences(struct work *work, int64_t rows, int64_t columns, double floor, double *room, int check, double *out) {
    const void *raw[MOST];
    double bad = 0, *q = room, *p = room + columns;
    for (int64_t row = 0; row < rows; row++) {
        double lanes[CHUNK] = {0};
        if (!fetch(work, row * columns, columns, raw)) return -1;
        for (int64_t s = 0; s < columns; s += CHUNK) {
            int64_t m = least(CHUNK, columns - s);
            for (int k = 0; k < 2; k++) {
                load_double(raw[k], work->inputs[k].dtype, s, m, room + k * columns + s);
                if (check) bad += odd_double(raw[k], work->inputs[k].dtype, s, m, room + k * columns + s);
            }
        }
        softmax(q, columns, floor);
        softmax(p, columns, floor);
        for (int64_t s = 0; s < columns; s += CHUNK) {
            int64_t m = least(CHUNK, columns - s);
            EACH(m) lanes[i] += p[s + i] * log_of(p[s + i] / q[s + i]);
        }
        out[row] = halved(lanes);
    }
    return bad == 0;
}
