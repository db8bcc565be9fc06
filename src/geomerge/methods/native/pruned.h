/* Task vectors thinned at random by the ranks in their rows (DELLA). */

#pragma once

struct pruning {
    double start, step; /* an element of rank r in its row survives with probability start + r * step, ... */
    int32_t rescale;    /* ... and is divided by that, if this is 1 */
    int64_t first;      /* where in the tensor the first element is, whose word the generator's next number has */
    uint64_t last;      /* the generator's last number */
    uint64_t finer[4];  /* state and increment, at the tensor's beginning, of the generator of words for those that one does not decide */
};

/* One row: pointers to the base's, then the experts' elements, and for each expert to the ranks and words of those. */
struct row {
    const void *raw[MOST];
    const uint16_t *rank[MOST], *word[MOST];
    int64_t at;
};

/* The 16 bits that decide where the first are just the limit's. */
static uint32_t finer_word(const struct pruning *p, int64_t index) {
    unsigned __int128 state = (unsigned __int128)p->finer[1] << 64 | p->finer[0];
    unsigned __int128 plus = (unsigned __int128)p->finer[3] << 64 | p->finer[2], times = MULTIPLIER;
    for (uint64_t left = (uint64_t)index / 4; left; left >>= 1) { /* so many steps, by powers of two */
        if (left & 1) state = state * times + plus;
        plus *= times + 1;
        times *= times;
    }
    return (uint32_t)(output_of(state) >> 16 * (index % 4)) & 0xFFFF;
}

/* A task vector's element after pruning. */
static inline double pruned_one(const struct pruning *p, double d, uint16_t rank, uint16_t word, int64_t index) {
    const double share = (double)rank * p->step + p->start, limit = rint(share * 0x1p32);
    const int64_t whole = (int64_t)(limit < 0x1p32 ? limit : 0x1p32), half = whole >> 16;
    const int kept = word < half || (word == half && finer_word(p, index) < (uint32_t)(whole & 0xFFFF));
    return p->rescale ? d * (kept ? 1.0 : 0.0) / share : d * (kept ? 1.0 : 0.0);
}

/* m <= CHUNK elements of a row, those at `place` or (if that is 0) those from `at` on, in double precision. */
static void prune(const struct work *work, const struct row *row, const struct thinning *thin, const struct pruning *pruned,
                  const struct combination *rule, const double *c, const double *w, const uint16_t *place, int64_t at, int64_t m,
                  double *result) {
    double base[CHUNK], d[MOST][CHUNK];
    for (int k = 0; k < work->count; k++) {
        double *x = k ? d[k - 1] : base;
        const int dtype = work->inputs[k].dtype;
        if (place) EACH(m) load_double(row->raw[k], dtype, place[i], 1, x + i);
        else load_double(row->raw[k], dtype, at, m, x);
        if (!k) continue;
        EACH(m) x[i] -= base[i];
        if (thin[k - 1].keep == INFINITY) EACH(m) x[i] = 0;
        else if (thin[k - 1].width)
            EACH(m) {
                const int64_t j = place ? place[i] : at + i;
                x[i] = pruned_one(pruned + k - 1, x[i], row->rank[k - 1][j], row->word[k - 1][j], row->at + j);
            }
    }
    combine_double(rule, work->count - 1, c, w, m, base, d, result, 0);
}

/* As many elements as whole registers hold, in float32, rounded where that leaves no choice; the others are chosen: how many, and in
 * `place` where they lie. A probability is wrong by 2^-23 of it, what a survivor is divided by it by 2^-22, so with the coefficients',
 * weights' and factor's rounding and sums of four the combined vector is by less than 2^-19 of the sum of the sizes, and their signs are
 * decided beyond that; the result by that and twice its last rounding. A word decides for certain unless it is the limit's first half. */
FUSED prune_quickly(const int t, const int elect, const int alike, const struct row *row, const struct pruning *pruned,
                    const struct combination *rule, const double *coefficients, const double *weights, int64_t n, uint16_t *out,
                    uint16_t *place, int64_t *chosen) {
    const uint16_t *x[5];
    const floats one = all(1), minus = all(-1), tiny = all(0x1p-126f), factor = all((float)rule->factor), floor = all((float)rule->floor);
    floats start[4], step[4], c[4], w[4];
    for (int k = 0; k <= t; k++) x[k] = row->raw[k];
    for (int k = 0; k < t; k++) {
        start[k] = all((float)pruned[k].start), step[k] = all((float)pruned[k].step);
        c[k] = all((float)coefficients[k]), w[k] = all((float)weights[k]);
    }
    int64_t number = 0;
    for (int64_t i = 0; i < n; i += LANES(float)) {
        const floats base = widened_float(x[0] + i);
        ints unsure = (ints)base == (ints)all(-0.0f);
        floats d[4];
        for (int k = 0; k < t; k++) {
            d[k] = widened_float(x[k + 1] + i) - base;
            const floats share = plus_product_float(start[k], numbers_of(row->rank[k] + i), step[k]);
            const floats limit = share * all(0x1p16f), word = numbers_of(row->word[k] + i);
            const ints kept = word <= limit - all(1 + 0x1p-6f);
            unsure |= ~kept & (word < limit + all(0x1p-6f));
            d[k] = where(kept, pruned[k].rescale ? d[k] / share : d[k]);
        }
        floats merged, wrong = {0};
        if (!elect) {
            merged = d[0] * c[0];
            wrong = size_of(merged);
            for (int k = 1; k < t; k++) {
                const floats scaled = d[k] * c[k];
                merged += scaled, wrong += size_of(scaled);
            }
        } else {
            floats votes, total = {0}, agreed = {0}, sizes;
            for (int k = 0; !alike && k < t; k++) d[k] *= c[k];
            votes = d[0], sizes = size_of(d[0]);
            for (int k = 1; k < t; k++) votes += d[k], sizes += size_of(d[k]);
            unsure |= (size_of(votes) <= sizes * all(0x1p-19f)) & (sizes > 0);
            const floats vote = votes + tiny, elected = where(vote > 0, one) + where(vote < 0, minus);
            for (int k = 0; k < t; k++) {
                floats agreeing = d[k] * elected;
                agreeing = where(~(agreeing < 0), agreeing);
                total += agreeing, agreed += where(agreeing > 0, alike ? one : w[k]);
            }
            if (rule->normalize) total /= where(agreed < floor, floor) + where(~(agreed < floor), agreed);
            merged = total * elected * factor, wrong = size_of(merged);
        }
        const floats result = base + merged;
        wrong = plus_product_float(wrong * all(0x1p-19f), size_of(result), all(0x1p-22f));
        const ints low = rounded_bf16(result - wrong), high = rounded_bf16(result + wrong);
        unsure |= (low != high) | ~(size_of(result) < all(0x1.fp127f));
        halves(low, out + i);
        for (uint32_t some = lanes_in(unsure); some; some &= some - 1) place[number++] = (uint16_t)(i + __builtin_ctz(some));
    }
    *chosen = number;
}

#define PRUNE_FOR(t)                                                                                                     \
    if (rule->elect && rule->alike) prune_quickly(t, 1, 1, row, pruned, rule, c, w, n, out, place, chosen);        \
    else if (rule->elect) prune_quickly(t, 1, 0, row, pruned, rule, c, w, n, out, place, chosen);                  \
    else prune_quickly(t, 0, 0, row, pruned, rule, c, w, n, out, place, chosen);

static void prune_row(int t, const struct row *row, const struct pruning *pruned,
                      const struct combination *rule, const double *c, const double *w, int64_t n, uint16_t *out, uint16_t *place,
                      int64_t *chosen) {
    if (t == 1) { PRUNE_FOR(1) }
    else if (t == 2) { PRUNE_FOR(2) }
    else if (t == 3) { PRUNE_FOR(3) }
    else { PRUNE_FOR(4) }
}

/* Whether float32 may be used: numbers are such that nothing is lost beyond what `prune_quickly` allows for. */
static int pruned_in_range(const struct work *work, const struct place *out, const struct thinning *thin, const struct pruning *pruned,
                           const struct combination *rule, const double *c, const double *w) {
    const int t = work->count - 1;
    int fine = t <= 4 && out->dtype == BF16 && (!rule->elect || !rule->normalize || rule->clamp);
    fine &= fabs(rule->factor) > 0x1p-30 && fabs(rule->factor) < 0x1p30;
    for (int k = 0; k <= t; k++) fine &= work->inputs[k].dtype == BF16;
    for (int k = 0; k < t; k++) {
        fine &= fabs(c[k]) > 0x1p-30 && fabs(c[k]) < 0x1p30 && fabs(w[k]) > 0x1p-30 && fabs(w[k]) < 0x1p30;
        fine &= thin[k].width && pruned[k].start >= 0x1p-10 && pruned[k].step >= 0;
    }
    return fine;
}

/* The words of elements [at, at + size), for each expert in `words` from where `row` points to on. */
static void draw_words(int t, int64_t at, int64_t size, struct thinning *thin, struct pruning *pruned, uint64_t *words, int64_t stride,
                       struct row *row) {
    uint64_t numbers[MOST][CHUNK / 2];
    int64_t begun = 0, before = 0;
    for (int k = 0; k < t; k++) {
        if (!thin[k].width) continue;
        before = (pruned[k].first + at) % 4;
        begun = before && at;
        if (begun) words[k * stride] = pruned[k].last;
        row->word[k] = (uint16_t *)(words + k * stride) + before;
    }
    const int64_t need = (before + size + 3) / 4;
    for (int64_t i = begun; i < need; i += CHUNK / 4) {
        const int64_t m = least(CHUNK / 4, need - i);
        draw(t, thin, 4 * m, numbers);
        for (int k = 0; k < t; k++)
            if (thin[k].width) memcpy(words + k * stride + i, numbers[k], (size_t)m * 8);
    }
    for (int k = 0; k < t; k++)
        if (thin[k].width) pruned[k].last = words[k * stride + need - 1];
}

/* As `geomerge_task_vectors_double`, after pruning by rows of `columns` <= WINDOW elements, of which `some` are read at once. `room` is
 * for the words of these, and beside those for a row's ranks, keys and remainders, and what sorting it takes (4 doubles each). */
int geomerge_pruned(struct work *work, int64_t n, int64_t columns, int64_t some, struct thinning *thin, struct pruning *pruned,
                    const struct combination *rule, const double *c, const double *w, char *room, int check,
                    const struct place *out) {
    double result[CHUNK], bad = 0;
    uint16_t place[WINDOW];
    const void *raw[MOST];
    const int count = work->count, t = count - 1;
    const int64_t most = some * columns, stride = most / 4 + 2, width = columns + 2 * PACK;
    uint64_t *words = (uint64_t *)room;
    double *d = (double *)(words + t * stride);
    uint16_t *ranked = (uint16_t *)(d + 4 * columns);
    struct tally rows[MOST];
    const int fine = pruned_in_range(work, out, thin, pruned, rule, c, w);
    struct row whole = {0}, *row = &whole;
    for (int k = 0; k < t; k++) {
        uint16_t *own = ranked + 3 * k * width;
        rows[k] = (struct tally){.key = own, .rest = own + width, .rank = own + 2 * width};
        row->rank[k] = rows[k].rank;
    }
    for (int64_t at = 0; at < n; at += most) {
        int64_t size = least(most, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        for (int k = 0; check && k < count; k++)
            for (int64_t s = 0; s < size; s += CHUNK) bad += odd_raw(raw[k], work->inputs[k].dtype, s, least(CHUNK, size - s));
        draw_words(t, at, size, thin, pruned, words, stride, row);
        char *to = out->memory ? window_of(work, out, at) : window_of(work, out, 0);
        for (int64_t s = 0; s < size; s += columns) {
            int quick = fine && work->first <= at + s;
            row->at = pruned->first + at + s;
            for (int k = 0; k < count; k++) row->raw[k] = (const char *)raw[k] + s * sizes[work->inputs[k].dtype];
            for (int k = 0; quick && k < t; k++) quick = ranks_bf16(rows + k, row->raw[k + 1], row->raw[0], columns);
            for (int k = 0; !quick && k < t; k++) {
                double base[CHUNK];
                if (!thin[k].width) continue;
                for (int64_t i = 0; i < columns; i += CHUNK) {
                    const int64_t m = least(CHUNK, columns - i);
                    load_double(row->raw[0], work->inputs[0].dtype, i, m, base);
                    load_double(row->raw[k + 1], work->inputs[k + 1].dtype, i, m, d + i);
                    for (int64_t j = 0; j < m; j++) d[i + j] -= base[j];
                }
                ranks(d, columns, rows[k].rank, (int64_t *)(d + columns));
            }
            int64_t done = 0, chosen = 0;
            if (quick) {
                uint16_t *rounded = (uint16_t *)to + s;
                done = columns / LANES(float) * LANES(float);
                prune_row(t, row, pruned, rule, c, w, done, rounded, place, &chosen);
                for (int64_t i = 0; i < chosen; i += CHUNK) {
                    const int64_t m = least(CHUNK, chosen - i);
                    prune(work, row, thin, pruned, rule, c, w, place + i, 0, m, result);
                    for (int64_t j = 0; j < m; j++) rounded[place[i + j]] = to_bf16((float)result[j]);
                }
            }
            for (int64_t i = done; i < columns; i += CHUNK) {
                const int64_t m = least(CHUNK, columns - i);
                prune(work, row, thin, pruned, rule, c, w, 0, i, m, result);
                if (work->first > at + s + i) tell_double(work, at + s + i, m, result);
                store_double(result, out->dtype, s + i, m, to);
            }
            for (int k = 0; k < t; k++)
                if (thin[k].width) row->word[k] += columns;
        }
        if (!out->memory && !put(work, out, to, at, size)) return -1;
    }
    return bad == 0;
}
