/* Task vectors thinned at random by the ranks in their rows (DELLA). */

#pragma once

struct pruning {
    double start, step; /* an element of rank r in its row survives with probability start + r * step, ... */
    int32_t rescale;    /* and is divided by that, if this is 1 */
    int32_t spared;     /* whether there is ... */
    uint32_t spare;     /* ... half a number of the generator that was drawn and not used */
};

static inline int64_t pattern(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return bits & INT64_MAX;
}

/* A magnitude's bits but the last ones, in whose place its index is: numbers in the order of the magnitudes, equal ones by index. */
#define INDEX 0xFFFF

struct exact { double size; int64_t index; };

static int smaller(const void *left, const void *right) {
    const struct exact *a = left, *b = right;
    return a->size != b->size ? (a->size > b->size) - (a->size < b->size) : (a->index > b->index) - (a->index < b->index);
}

static inline int after(const double *d, int64_t a, int64_t b, int exactly) {
    if (!exactly) return a > b;
    struct exact left = {fabs(d[a & INDEX]), a & INDEX}, right = {fabs(d[b & INDEX]), b & INDEX};
    return smaller(&left, &right) > 0;
}

/* Puts in order what nearly is: each that is less than the one before goes back to its place. Whether that took few moves. */
static inline __attribute__((always_inline)) int mend(const double *restrict d, int64_t n, int64_t *restrict packed, int exactly) {
    int64_t left = 16 * n, before = packed[0];
    for (int64_t k = 1; k < n; k++) {
        int64_t moved = packed[k];
        if (!after(d, before, moved, exactly)) {
            before = moved;
            continue;
        }
        int64_t j = k;
        for (; j && after(d, packed[j - 1], moved, exactly); j--, left--) packed[j] = packed[j - 1];
        packed[j] = moved;
        if (left < 0) return 0;
    }
    return 1;
}

/* The places of n <= WINDOW elements in the order of their magnitudes, equal ones by index: first by some bits of these, from a
 * sixteenth of their mean on over eight octaves (what lies beyond counts as the end), then what is left is mended. `room` is for
 * three numbers of each element. */
static void ranks(const double *restrict d, int64_t n, uint16_t *restrict rank, int64_t *restrict room) {
    enum { MOST_BITS = 12, OCTAVES = 8, BELOW_MEAN = 4 };
    const int width = n < 2048 ? 10 : MOST_BITS, shift = 55 - width;
    double lanes[8] = {0}, sum_of = 0;
    int64_t whole = n / 8 * 8, lost = 0;
    for (int64_t i = 0; i < whole; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += fabs(d[i + j]);
    for (int j = 0; j < 8; j++) sum_of += lanes[j];
    for (int64_t i = whole; i < n; i++) sum_of += fabs(d[i]);
    const int64_t floor = ((pattern(sum_of / (double)n) >> 52) - BELOW_MEAN) * ((int64_t)1 << 52);
    const int64_t most = (int64_t)OCTAVES << 52;
    uint16_t *restrict digits = rank;
    for (int64_t i = 0; i < n; i++) {
        int64_t bits = pattern(d[i]), key = bits - floor;
        lost |= bits;
        digits[i] = (uint16_t)((key < 0 ? 0 : key >= most ? most - 1 : key) >> shift);
    }
    uint16_t place[1 << MOST_BITS];
    memset(place, 0, sizeof *place << width);
    for (int64_t i = 0; i < n; i++) place[digits[i]]++;
    const uint64_t each = 0x0001000100010001; /* four counts at once */
    uint64_t before = 0;
    for (int k = 0; k < 1 << width; k += 4) {
        uint64_t four;
        memcpy(&four, place + k, sizeof four);
        const uint64_t sums = four * each, firsts = before + (sums << 16);
        memcpy(place + k, &firsts, sizeof firsts);
        before += (sums >> 48) * each;
    }
    for (int64_t i = 0; i < n; i++) room[place[digits[i]]++] = (pattern(d[i]) & ~(int64_t)INDEX) | i;
    if (!mend(d, n, room, 0) || ((lost & INDEX) && !mend(d, n, room, 1))) {
        struct exact *all = (struct exact *)(room + n);
        for (int64_t k = 0; k < n; k++) all[k] = (struct exact){fabs(d[k]), k};
        qsort(all, (size_t)n, sizeof *all, smaller);
        for (int64_t k = 0; k < n; k++) room[k] = all[k].index;
    }
    for (int64_t k = 0; k < n; k++) rank[room[k] & INDEX] = (uint16_t)k;
}

static void prune(const struct pruning *p, int64_t n, const uint32_t *words, double *restrict d, int64_t *room) {
    uint16_t rank[WINDOW];
    ranks(d, n, rank, room);
    if (p->rescale)
        EACH(n) {
            double share = (double)rank[i] * p->step + p->start;
            d[i] = d[i] * ((double)words[i] < rint(share * 0x1p32) ? 1.0 : 0.0) / share;
        }
    else EACH(n) d[i] *= (double)words[i] < rint(((double)rank[i] * p->step + p->start) * 0x1p32) ? 1.0 : 0.0;
}

/* As `geomerge_task_vectors_double`, after pruning by rows of `columns` <= WINDOW elements; `some` rows at once, for which there is
 * `room`. */
int geomerge_pruned(struct work *work, int64_t n, int64_t columns, int64_t some, struct thinning *thin, struct pruning *pruned,
                    const struct combination *rule, const double *c, const double *w, char *room, int check,
                    const struct place *out) {
    double x[MOST][CHUNK], result[CHUNK], bad = 0;
    uint64_t numbers[MOST][CHUNK / 2];
    const void *raw[MOST];
    const int count = work->count;
    const int64_t most = some * columns;
    double *all = (double *)room;
    int64_t *sorting = (int64_t *)(all + count * most);
    uint32_t *words = (uint32_t *)(sorting + 3 * columns);
    for (int64_t at = 0; at < n; at += most) {
        int64_t size = least(most, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        for (int k = 0; k < count; k++)
            for (int64_t s = 0; s < size; s += CHUNK) {
                int64_t m = least(CHUNK, size - s);
                double *to = all + k * most + s;
                load_double(raw[k], work->inputs[k].dtype, s, m, to);
                if (check) bad += odd_double(raw[k], work->inputs[k].dtype, s, m, to);
                if (k) EACH(m) to[i] -= all[s + i];
            }
        int64_t from = 0;
        for (int k = 0; k + 1 < count; k++)
            if (pruned[k].spared) words[k * most] = pruned[k].spare, from = 1;
        for (int64_t s = from; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            draw(count - 1, thin, m, numbers);
            for (int k = 0; k + 1 < count; k++) {
                if (!thin[k].width) continue;
                memcpy(words + k * most + s, numbers[k], (size_t)m * 4);
                pruned[k].spared = m % 2;
                pruned[k].spare = (uint32_t)(numbers[k][m / 2] >> 32);
            }
        }
        if (from == size)
            for (int k = 0; k + 1 < count; k++) pruned[k].spared = 0;
        for (int k = 0; k + 1 < count; k++) {
            if (thin[k].keep == INFINITY) EACH(size) all[(k + 1) * most + i] = 0;
            for (int64_t row = 0; thin[k].width && row < size; row += columns)
                prune(pruned + k, columns, words + k * most + row, all + (k + 1) * most + row, sorting);
        }
        char *to = out->memory ? window_of(work, out, at) : window_of(work, out, 0);
        for (int64_t s = 0; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            for (int k = 1; k < count; k++) memcpy(x[k - 1], all + k * most + s, (size_t)m * sizeof **x);
            combine_double(rule, count - 1, c, w, m, all + s, x, result, 0);
            if (work->first > at + s) tell_double(work, at + s, m, result);
            store_double(result, out->dtype, s, m, to);
        }
        if (!out->memory && !put(work, out, to, at, size)) return -1;
    }
    return bad == 0;
}
