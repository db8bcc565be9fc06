/* Linear combinations, and the inner products from which their coefficients come. */

#pragma once

/* Two inputs and an output of bfloat16; whether any sum is not finite. */
static __attribute__((noinline)) int32_t span_of_two(const uint16_t *restrict a, const uint16_t *restrict b, int64_t n, double first,
                                                     double second, uint16_t *restrict out) {
    int32_t odd = 0;
    EACH(n) {
        float sum = (float)fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
        odd |= not_finite(sum);
        out[i] = finite_to_bf16(sum);
    }
    return odd;
}

/* out = round(sum of c[k] * x[k]), in double. Returns whether all of the sum is finite (in float, where that is on the way). */
int geomerge_span(struct work *work, int64_t n, const double *c, const struct place *out) {
    double bad = 0;
    int32_t odd = 0;
    double x[CHUNK], total[CHUNK];
    float narrow[CHUNK];
    const void *raw[MOST];
    const int k = work->count, out_dtype = out->dtype;
    const struct place *in = work->inputs;
    const int common = k > 1 && in[0].dtype == BF16 && in[1].dtype == BF16;
    const double first = c[0], second = k > 1 ? c[1] : 0;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            int j = 1;
            if (common) {
                const uint16_t *a = (const uint16_t *)raw[0] + s, *b = (const uint16_t *)raw[1] + s;
                if (k == 2 && out_dtype == BF16 && work->first <= at + s) { /* most merges */
                    odd |= span_of_two(a, b, size - s, first, second, (uint16_t *)to + s);
                    break;
                }
                EACH(m) total[i] = fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
                j = 2;
            } else {
                load_double(raw[0], in[0].dtype, s, m, total);
                EACH(m) total[i] *= first;
            }
            for (; j < k; j++) {
                double factor = c[j];
                load_double(raw[j], in[j].dtype, s, m, x);
                EACH(m) total[i] = fma(x[i], factor, total[i]);
            }
            if (work->first > at + s) tell_double(work, at + s, m, total);
            if (out_dtype == F64) {
                bad += damage_double(total, m);
                store_double(total, out_dtype, s, m, to);
            } else if (out_dtype == BF16) {
                odd |= narrowed(total, s, m, to);
            } else {
                EACH(m) narrow[i] = (float)total[i];
                bad += (double)damage_float(narrow, m);
                store_float(narrow, out_dtype, s, m, to);
            }
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0 && !odd;
}

/* The sums of products of a block of two inputs of bfloat16: as below, lane by lane, with nothing but the inputs in memory. */
static void gram_block(const uint16_t *restrict a, const uint16_t *restrict b, int64_t n, float (*restrict sums)[CHUNK]) {
    enum { LANES = 16 };
    for (int lane = 0; lane < CHUNK; lane += LANES) {
        float first[LANES] = {0}, both[LANES] = {0}, second[LANES] = {0};
        for (int64_t s = lane; s < n; s += CHUNK)
            for (int i = 0; i < LANES; i++) {
                float x = from_bf16(a[s + i]), y = from_bf16(b[s + i]) - x;
                first[i] += x * x, both[i] += x * y, second[i] += y * y;
            }
        memcpy(sums[0] + lane, first, sizeof first);
        memcpy(sums[1] + lane, both, sizeof both);
        memcpy(sums[2] + lane, second, sizeof second);
    }
}

/* For each pair i <= j of the k centred inputs (x0, x1 - x0, ...) the sum of products over one block after the other:
 * 256 lanes add every 256th product in T, and are added in double, halves to halves. out: (pairs, blocks). */
#define GRAM(T)                                                                                       \
    int geomerge_gram_##T(struct work *work, int64_t n, int64_t block, double *out) {                 \
        int64_t blocks = (n + block - 1) / block;                                                     \
        T x[MOST][CHUNK];                                                                             \
        T sums[MOST * (MOST + 1) / 2][CHUNK];                                                         \
        const void *raw[MOST];                                                                        \
        const int k = work->count;                                                                    \
        const struct place *in = work->inputs;                                                        \
        int pairs = k * (k + 1) / 2;                                                                  \
        for (int64_t b = 0; b < blocks; b++) {                                                        \
            int64_t whole = WINDOW / block * block; /* elements of whole blocks */                    \
            int64_t window = b * block / whole * whole;                                               \
            if (b * block == window && !fetch(work, window, least(whole, n - window), raw)) return -1; \
            int64_t stop = least(n, (b + 1) * block) - window;                                        \
            int64_t begin = b * block - window;                                                       \
            if (sizeof(T) == 4 && k == 2 && in[0].dtype == BF16 && in[1].dtype == BF16 && (stop - begin) % CHUNK == 0) { \
                const uint16_t *x0 = (const uint16_t *)raw[0] + begin, *x1 = (const uint16_t *)raw[1] + begin; \
                gram_block(x0, x1, stop - begin, (float (*)[CHUNK])sums);                             \
                begin = stop;                                                                         \
            } else {                                                                                  \
                memset(sums, 0, sizeof(T) * CHUNK * pairs);                                           \
            }                                                                                         \
            for (int64_t s = begin; s < stop; s += CHUNK) {                                           \
                int64_t m = least(CHUNK, stop - s);                                                   \
                if (m < CHUNK) memset(x, 0, sizeof(T) * CHUNK * k);                                   \
                for (int j = 0; j < k; j++) load_##T(raw[j], in[j].dtype, s, m, x[j]);                \
                for (int j = 1; j < k; j++)                                                           \
                    for (int i = 0; i < CHUNK; i++) x[j][i] -= x[0][i];                               \
                int p = 0;                                                                            \
                for (int a = 0; a < k; a++)                                                           \
                    for (int j = a; j < k; j++, p++) {                                                \
                        const T *restrict y = x[a], *restrict z = x[j];                               \
                        T *restrict sum = sums[p];                                                    \
                        for (int i = 0; i < CHUNK; i++) sum[i] += y[i] * z[i];                        \
                    }                                                                                 \
            }                                                                                         \
            for (int p = 0; p < pairs; p++) {                                                         \
                double lanes[CHUNK];                                                                  \
                for (int i = 0; i < CHUNK; i++) lanes[i] = (double)sums[p][i];                        \
                out[p * blocks + b] = halved(lanes);                                                  \
            }                                                                                         \
        }                                                                                             \
        return 1;                                                                                     \
    }

GRAM(float) GRAM(double)

/* The same products in double, added to out (pairs, columns) row after row: for each column its own. */
int geomerge_gram_columns(struct work *work, int64_t rows, int64_t columns, double *out) {
    double x[MOST][CHUNK];
    const void *raw[MOST];
    const int count = work->count;
    const int64_t width = least(columns, WINDOW), together = columns < WINDOW ? WINDOW / columns : 1;
    for (int64_t row = 0; row < rows; row += together)
        for (int64_t column = 0; column < columns; column += width) {
            int64_t some = least(together, rows - row), wide = least(width, columns - column);
            if (!fetch(work, row * columns + column, some * wide, raw)) return -1;
            for (int64_t s = 0; s < wide; s += CHUNK) {
                int64_t m = least(CHUNK, wide - s);
                for (int64_t r = 0; r < some; r++) {
                    double *restrict sum = out + column + s;
                    for (int k = 0; k < count; k++) {
                        load_double(raw[k], work->inputs[k].dtype, r * wide + s, m, x[k]);
                        if (k) EACH(m) x[k][i] -= x[0][i];
                    }
                    for (int a = 0; a < count; a++)
                        for (int b = a; b < count; b++, sum += columns) EACH(m) sum[i] = fma(x[a][i], x[b][i], sum[i]);
                }
            }
        }
    return 1;
}
