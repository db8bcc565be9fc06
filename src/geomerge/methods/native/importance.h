/* Sizes of differences, each times a number of its row: what Arcee Fusion ranks, and what it makes of that. */

#pragma once

/* Rows of a tensor, of which element `first` is the first that a loop gets, and for each its divergence: NaN until somebody asks. Where
 * `known` is 0 there is `room` for two rows of doubles and a register, and whole rows may be read. */
struct rows {
    int64_t first, columns;
    double *divergences, *room, floor;
    int32_t known;
};

/* Whether a row's products may be told from its differences in float32 ... */
static inline int narrow_row(const int *dtypes, double scale) {
    return SCALED && dtypes[0] == BF16 && dtypes[1] == BF16 && scale >= SCALES;
}

/* ... and whether float32 holds these; `single` gets the base. */
static int narrow_base(const void *const *raw, int64_t s, int64_t m, float *single) {
    if (m % LANES(float)) return 0;
    load_float(raw[0], BF16, s, m, single);
    return exact(m, (const uint16_t *)raw[1] + s, (const uint16_t *)raw[0] + s);
}

static void differences_double(const void *const *raw, const int *dtypes, int64_t s, int64_t m, double *base, double *d) {
    load_double(raw[0], dtypes[0], s, m, base);
    load_double(raw[1], dtypes[1], s, m, d);
    EACH(m) d[i] -= base[i];
}

/* Takes in |theta_1 - theta_0| times its row's divergence at n elements from each of `starts` on. Inputs: the base and the expert.
 * Returns whether both are finite (looked at only if `check`). */
int geomerge_importance_survey(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, const struct rows *rows, int brackets,
                               struct bracket *b, int check) {
    double base[CHUNK], d[CHUNK], bad = 0;
    float single[CHUNK];
    const int dtypes[2] = {work->inputs[0].dtype, work->inputs[1].dtype};
    const void *raw[MOST];
    const int64_t columns = rows->columns, together = WINDOW / columns * columns;
    double *room = (double *)(((uintptr_t)rows->room + REGISTER - 1) / REGISTER * REGISTER);
    for (int64_t p = 0; p < pieces; p++) {
        const int64_t before = (rows->first + starts[p]) % columns, beyond = (columns - (before + n) % columns) % columns;
        const int64_t begin = starts[p] - (rows->known ? 0 : before), end = starts[p] + n + (rows->known ? 0 : beyond);
        for (int64_t at = begin, size; at < end; at += size) {
            /* As many whole rows as a window holds, but for those that are known and begin before. */
            size = least(together - (rows->first + at) % columns, end - at);
            if (!fetch(work, at, size, raw)) return -1;
            for (int64_t s = 0, left; s < size; s += left) {
                const int64_t place = rows->first + at + s, row = place / columns;
                left = least((row + 1) * columns - place, size - s);
                for (int k = 0; check && k < 2; k++)
                    bad += odd_raw(raw[k], dtypes[k], s, left);
                double *scale = rows->divergences + row;
                if (*scale != *scale) *scale = fmax(divergence(raw, dtypes, s, columns, rows->floor, room), 0);
                const int narrow = narrow_row(dtypes, *scale);
                if (narrow) scale_bounds(b, brackets, *scale);
                const int64_t stop = least(s + left, starts[p] + n - at);
                for (int64_t from = at + s < starts[p] ? starts[p] - at : s, m; from < stop; from += m) {
                    m = least(CHUNK, stop - from);
                    if (narrow && narrow_base(raw, from, m, single)) {
                        const uint16_t *x = (const uint16_t *)raw[1] + from;
                        for (int j = 0; j < brackets; j++)
                            if (b[j].common[1] == b[j].common[1]) bracket_scaled(1, b + j, m, x, single, *scale, 0);
                            else bracket_scaled(0, b + j, m, x, single, *scale, 0);
                        continue;
                    }
                    differences_double(raw, dtypes, from, m, base, d);
                    EACH(m) d[i] = fabs(d[i]) * *scale;
                    for (int j = 0; j < brackets; j++) bracket_double(b + j, d, m);
                }
            }
        }
    }
    return bad == 0;
}

/* theta_0 + (theta_1 - theta_0) where that product is at least `from`, rounded; all rows are known. Inputs and value as above. */
int geomerge_importance(struct work *work, int64_t n, const struct rows *rows, double from, int check, const struct place *out) {
    double base[CHUNK], d[CHUNK], bad = 0, scale = 0;
    float single[CHUNK], least_size = 0;
    const int dtypes[2] = {work->inputs[0].dtype, work->inputs[1].dtype};
    const void *raw[MOST];
    for (int64_t at = 0, m; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        int narrow = 0;
        for (int64_t s = 0, left = 0; s < size; s += m, left -= m) {
            if (!left) {
                const int64_t place = rows->first + at + s, row = place / rows->columns;
                left = (row + 1) * rows->columns - place;
                scale = rows->divergences[row];
                narrow = narrow_row(dtypes, scale);
                if (narrow) least_size = least_of(from, scale);
            }
            m = least(least(CHUNK, size - s), left);
            for (int k = 0; check && k < 2; k++) bad += odd_raw(raw[k], dtypes[k], s, m);
            if (narrow && narrow_base(raw, s, m, single)) {
                const uint16_t *x = (const uint16_t *)raw[1] + s;
                EACH(m) {
                    float apart = from_bf16(x[i]) - single[i];
                    single[i] += apart * (fabsf(apart) >= least_size ? 1.0f : 0.0f);
                }
                if (work->first > at + s) tell_float(work, at + s, m, single);
                store_float(single, out->dtype, s, m, to);
                continue;
            }
            differences_double(raw, dtypes, s, m, base, d);
            EACH(m) d[i] = base[i] + d[i] * (fabs(d[i]) * scale >= from ? 1.0 : 0.0);
            if (work->first > at + s) tell_double(work, at + s, m, d);
            store_double(d, out->dtype, s, m, to);
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0;
}
