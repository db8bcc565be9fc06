/* Sums of products of all pairs i <= j of the centred inputs x0, x1 - x0, ... (methods/gram.py). */

#pragma once

/* Of inputs of bfloat16, which mostly are two to five, the sums stay in registers, which every loop over pairs must be unrolled for. */
#define MOST_QUICK 5
#define UNROLLED _Pragma("GCC unroll 16")
#define PAIRS(count) ((count) * ((count) + 1) / 2)

#define CENTRED(T, count, at)                                 \
    lanes_##T x[count];                                       \
    UNROLLED for (int k = 0; k < count; k++) {                \
        x[k] = widened_##T(raw[k] + (at));                    \
        if (k) x[k] -= x[0];                                  \
    }

#define EACH_PAIR(count, ...)                                 \
    {                                                         \
        int p = 0;                                            \
        UNROLLED for (int a = 0; a < count; a++)              \
            UNROLLED for (int b = a; b < count; b++, p++) {   \
                __VA_ARGS__;                                  \
            }                                                 \
    }

/* The 256 lanes of a block that begins at `start`: lane i adds each 256th product from i on. */
#define LANES_OF_BLOCK(T, count)                                                                                       \
    static void block_##T##_##count(const uint16_t *const *raw, int64_t start, int64_t n, T (*restrict sums)[CHUNK]) { \
        for (int lane = 0; lane < CHUNK; lane += LANES(T)) {                                                           \
            lanes_##T found[PAIRS(count)] = {{0}};                                                                     \
            for (int64_t s = lane; s < n; s += CHUNK) {                                                                \
                CENTRED(T, count, start + s)                                                                           \
                EACH_PAIR(count, found[p] += x[a] * x[b])                                                              \
            }                                                                                                          \
            EACH_PAIR(count, memcpy(sums[p] + lane, &found[p], sizeof found[p]))                                       \
        }                                                                                                              \
    }

/* As many columns as a register holds of some rows of `wide` elements, from the element at `start` on, added to `sum`, where pairs are
 * `columns` apart. */
#define SOME_COLUMNS(count)                                                                                    \
    static void columns_##count(const uint16_t *const *raw, int64_t start, int64_t rows, int64_t wide, double *sum, \
                                int64_t columns) {                                                             \
        lanes_double found[PAIRS(count)];                                                                      \
        EACH_PAIR(count, memcpy(&found[p], sum + p * columns, sizeof found[p]))                                \
        for (int64_t r = 0; r < rows; r++) {                                                                   \
            CENTRED(double, count, start + r * wide)                                                           \
            EACH_PAIR(count, found[p] = plus_product_double(found[p], x[a], x[b]))                                   \
        }                                                                                                      \
        EACH_PAIR(count, memcpy(sum + p * columns, &found[p], sizeof found[p]))                                \
    }

#define QUICK_GRAM(count) LANES_OF_BLOCK(float, count) LANES_OF_BLOCK(double, count) SOME_COLUMNS(count)
QUICK_GRAM(2) QUICK_GRAM(3) QUICK_GRAM(4) QUICK_GRAM(5)

#define OF_EACH(name) {0, 0, name##2, name##3, name##4, name##5}
static void (*const blocks_float[])(const uint16_t *const *, int64_t, int64_t, float (*)[CHUNK]) = OF_EACH(block_float_);
static void (*const blocks_double[])(const uint16_t *const *, int64_t, int64_t, double (*)[CHUNK]) = OF_EACH(block_double_);
static void (*const some_columns[])(const uint16_t *const *, int64_t, int64_t, int64_t, double *, int64_t) = OF_EACH(columns_);

/* Whether those do for the inputs. */
static int quick_gram(const struct work *work) {
    int quick = work->count > 1 && work->count <= MOST_QUICK;
    for (int k = 0; k < work->count; k++) quick &= work->inputs[k].dtype == BF16;
    return quick;
}

/* For each pair the sum of products over one block after the other: 256 lanes add every 256th product in T, and are added in
 * double, halves to halves. out: (pairs, blocks). */
#define GRAM(T)                                                                                       \
    int geomerge_gram_##T(struct work *work, int64_t n, int64_t block, double *out) {                 \
        int64_t blocks = (n + block - 1) / block;                                                     \
        T x[MOST][CHUNK];                                                                             \
        T sums[PAIRS(MOST)][CHUNK];                                                                   \
        const void *raw[MOST];                                                                        \
        const int k = work->count, pairs = PAIRS(k), quick = quick_gram(work);                        \
        const struct place *in = work->inputs;                                                        \
        for (int64_t b = 0; b < blocks; b++) {                                                        \
            int64_t whole = WINDOW / block * block; /* elements of whole blocks */                    \
            int64_t window = b * block / whole * whole;                                               \
            if (b * block == window && !fetch(work, window, least(whole, n - window), raw)) return -1; \
            int64_t stop = least(n, (b + 1) * block) - window;                                        \
            int64_t begin = b * block - window;                                                       \
            if (quick && (stop - begin) % LANES(T) == 0) {                                            \
                blocks_##T[k]((const uint16_t *const *)raw, begin, stop - begin, sums);               \
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
    const int count = work->count, quick = quick_gram(work);
    const int64_t width = least(columns, WINDOW), together = columns < WINDOW ? WINDOW / columns : 1;
    for (int64_t row = 0; row < rows; row += together)
        for (int64_t column = 0; column < columns; column += width) {
            int64_t some = least(together, rows - row), wide = least(width, columns - column), s = 0;
            if (!fetch(work, row * columns + column, some * wide, raw)) return -1;
            for (; quick && s + LANES(double) <= wide; s += LANES(double))
                some_columns[count]((const uint16_t *const *)raw, s, some, wide, out + column + s, columns);
            for (; s < wide; s += CHUNK) {
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
