/* Task vectors thinned at random by the ranks in their rows (DELLA). */

#pragma once

struct pruning {
    const double *shares;  /* by ascending rank: what a survivor is divided by (0: nothing) ... */
    const int64_t *limits; /* ... and below which number it survives (0: all do) */
    uint32_t spare;        /* half a number of the generator that was drawn and not used, */
    int32_t spared;        /* if this is 1 */
};

struct exact { double size; uint16_t index; };

static int smaller(const void *left, const void *right) {
    const struct exact *a = left, *b = right;
    return a->size != b->size ? (a->size > b->size) - (a->size < b->size) : a->index - b->index;
}

static inline int64_t pattern(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return bits & INT64_MAX;
}

/* Puts n <= WINDOW elements in the order of their magnitudes, equal ones by index: first by some bits of these, from a sixteenth of
 * their mean on over eight octaves (what lies beyond counts as the end), and then it mends what is left. */
static void ascending(const double *restrict d, int64_t n, uint16_t *restrict digits, uint16_t *restrict order, struct exact *room) {
    enum { MOST_BITS = 12, OCTAVES = 8, BELOW_MEAN = 4 };
    const int width = n < 2048 ? 10 : MOST_BITS;
    double lanes[8] = {0}, sum_of = 0;
    int64_t whole = n / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += fabs(d[i + j]);
    for (int j = 0; j < 8; j++) sum_of += lanes[j];
    for (int64_t i = whole; i < n; i++) sum_of += fabs(d[i]);
    const int64_t floor = ((pattern(sum_of / (double)n) >> 52) - BELOW_MEAN) * ((int64_t)1 << 52);
    const int64_t most = (int64_t)OCTAVES << 52;
    const int shift = 55 - width;
    for (int64_t i = 0; i < n; i++) {
        int64_t key = pattern(d[i]) - floor;
        digits[i] = (uint16_t)((key < 0 ? 0 : key >= most ? most - 1 : key) >> shift);
    }
    /* The first half is put down from each digit's first place on, the second from its last one back: two that need not wait for
     * each other. */
    int32_t first[1 << MOST_BITS], last[1 << MOST_BITS], sum = 0;
    memset(first, 0, sizeof *first << width);
    memset(last, 0, sizeof *last << width);
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) first[digits[i]]++, last[digits[i + half]]++;
    if (n % 2) first[digits[n - 1]]++;
    for (int k = 0; k < 1 << width; k++) {
        int32_t number = first[k] + last[k];
        first[k] = sum, sum += number, last[k] = sum;
    }
    for (int64_t i = 0, j = n - 1; i <= j; i++, j--) {
        order[first[digits[i]]++] = (uint16_t)i;
        if (i < j) order[--last[digits[j]]] = (uint16_t)j;
    }
    int64_t left = 16 * n; /* moves, before something quicker is done */
    double before = fabs(d[order[0]]);
    for (int64_t i = 1; i < n; i++) {
        uint16_t moved = order[i];
        double size = fabs(d[moved]);
        if (before <= size) {
            before = size;
            continue;
        }
        int64_t j = i;
        for (; j && fabs(d[order[j - 1]]) > size && left; j--, left--) order[j] = order[j - 1];
        order[j] = moved;
        if (left) continue;
        for (int64_t k = 0; k < n; k++) room[k] = (struct exact){fabs(d[k]), (uint16_t)k};
        qsort(room, (size_t)n, sizeof *room, smaller);
        for (int64_t k = 0; k < n; k++) order[k] = room[k].index;
        return;
    }
}

/* `room` is for 16 bytes of each element. */
static void prune(const struct pruning *p, int64_t n, const uint32_t *words, double *restrict d, struct exact *room) {
    uint16_t digits[WINDOW], order[WINDOW];
    ascending(d, n, digits, order, room);
    uint16_t *restrict rank = digits;
    for (int64_t i = 0; i < n; i++) rank[order[i]] = (uint16_t)i;
    for (int64_t i = 0; i < n; i++) d[i] *= (double)(int32_t)((uint64_t)((int64_t)words[i] - p->limits[rank[i]]) >> 63);
    if (p->shares)
        for (int64_t i = 0; i < n; i++) d[i] /= p->shares[rank[i]];
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
    struct exact *ranks = (struct exact *)(all + count * most);
    uint32_t *words = (uint32_t *)(ranks + columns);
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
                prune(pruned + k, columns, words + k * most + row, all + (k + 1) * most + row, ranks);
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
