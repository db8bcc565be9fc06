/* Task vectors thinned at random by the ranks in their rows (DELLA). */

#pragma once

struct pruning {
    double start, step; /* an element of rank r in its row survives with probability start + r * step, ... */
    int32_t rescale;    /* ... and is divided by that, if this is 1 */
    uint64_t finer[4];  /* state and increment, at the tensor's beginning, of the generator of words for those that one does not decide */
};

/* One row: the base's and the experts' elements, and for each expert the ranks and words of those. */
struct row {
    const void *raw[MOST];
    const uint16_t *rank[MOST];
    const half_word *word[MOST];
    int64_t at; /* where in the tensor it begins */
};

/* The 16 bits that decide where the first are just the limit's. */
static uint32_t finer_word(const struct pruning *p, int64_t index) {
    word_128 state = joined(p->finer), add = joined(p->finer + 2), by = MULTIPLIER;
    for (uint64_t left = (uint64_t)index / 4; left; left >>= 1) { /* so many steps, by powers of two */
        if (left & 1) state = state * by + add;
        add *= by + 1;
        by *= by;
    }
    return (uint32_t)(output_of(state) >> 16 * (index % 4)) & 0xFFFF;
}

/* m <= CHUNK elements of a row: those at `place` or (if that is 0) those from `at` on. */
struct part {
    const uint16_t *place;
    int64_t at, m;
};

/* The probabilities of task vector k's elements, and 1 for those that survive (else 0). */
static void survivors(const struct row *row, int k, const struct pruning *p, const struct part *part, double *restrict share,
                      double *restrict kept) {
    uint16_t rank[CHUNK];
    half_word word[CHUNK];
    const double start = p->start, step = p->step;
    const int64_t m = part->m;
    int64_t open = 0;
    if (part->place) EACH(m) rank[i] = row->rank[k][part->place[i]], word[i] = row->word[k][part->place[i]];
    else memcpy(rank, row->rank[k] + part->at, (size_t)m * 2), memcpy(word, row->word[k] + part->at, (size_t)m * 2);
    EACH(m) {
        share[i] = (double)rank[i] * step + start;
        const double limit = rint(share[i] * 0x1p32), first = (double)word[i] * 0x1p16;
        kept[i] = first + 0x1p16 <= limit ? 1.0 : 0.0;
        open |= (first < limit) & (first + 0x1p16 > limit);
    }
    for (int64_t i = 0; open && i < m; i++) {
        const double limit = rint(share[i] * 0x1p32), first = (double)word[i] * 0x1p16;
        if (first < limit && first + 0x1p16 > limit)
            kept[i] = first + finer_word(p, row->at + (part->place ? part->place[i] : part->at + i)) < limit ? 1.0 : 0.0;
    }
}

/* The base and the task vectors of a part. */
static void differences_of(const struct work *work, const struct row *row, const struct part *part, double *base, double (*d)[CHUNK]) {
    for (int k = 0; k < work->count; k++) {
        double *x = k ? d[k - 1] : base;
        const int dtype = work->inputs[k].dtype;
        if (part->place) EACH(part->m) load_double(row->raw[k], dtype, part->place[i], 1, x + i);
        else load_double(row->raw[k], dtype, part->at, part->m, x);
        if (k) EACH(part->m) x[i] -= base[i];
    }
}

/* The merged elements of a part, in double precision. */
static void prune(const struct work *work, const struct row *row, const struct thinning *thin, const struct pruning *pruned,
                  const struct combination *rule, const double *c, const double *w, const struct part *part, double *result) {
    double base[CHUNK], d[MOST][CHUNK], share[CHUNK], kept[CHUNK];
    const int64_t m = part->m;
    differences_of(work, row, part, base, d);
    for (int k = 0; k + 1 < work->count; k++) {
        double *restrict x = d[k];
        if (thin[k].keep == INFINITY) EACH(m) x[i] = 0;
        if (!thin[k].width) continue;
        survivors(row, k, pruned + k, part, share, kept);
        if (pruned[k].rescale) EACH(m) x[i] = x[i] * kept[i] / share[i];
        else EACH(m) x[i] *= kept[i];
    }
    combine_double(rule, work->count - 1, c, w, m, base, d, result, 0);
}

/* What is left of the next m elements of task vector k, in float32; bits of those of which a word does not decide that for certain are
 * added in `unsure`. (Two loops with little to wait for each take less time than one.) */
FUSED thin_quickly(const int rescale, const struct row *row, int k, const struct pruning *p, int64_t at, int64_t m, floats *restrict d,
                   uint32_t *restrict unsure) {
    const uint16_t *base = (const uint16_t *)row->raw[0] + at, *x = (const uint16_t *)row->raw[k + 1] + at, *rank = row->rank[k] + at;
    const half_word *word = row->word[k] + at;
    const floats start = all((float)p->start), step = all((float)p->step), minus = all(-0x1p16f);
    for (int64_t i = 0; i < m; i += LANES(float)) {
        const floats share = plus_product_float(start, numbers_of(rank + i), step);
        const floats above = plus_product_float(numbers_of(word + i), share, minus), whole = widened_float(x + i) - widened_float(base + i);
        const ints kept = above <= all(-1 - 0x1p-6f);
        d[i / LANES(float)] = where(kept, rescale ? whole / share : whole);
        unsure[i / LANES(float)] |= lanes_in(above < all(0x1p-6f)) ^ lanes_in(kept);
    }
}

/* As many elements as whole registers hold, in float32, rounded where that leaves no choice; the others are chosen: how many, and in
 * `place` where they lie. A probability is wrong by 2^-23 of it, what a survivor is divided by it by 2^-22, so with the coefficients',
 * weights' and factor's rounding and sums of four the combined vector is by less than 2^-19 of the sum of the sizes, and their signs are
 * decided beyond that; the result by that and twice its last rounding. A word decides for certain unless it is the limit's first half.
 * What is unsure shows in signs of differences, and is looked at when a chunk is done: what comes next does not wait for it. */
FUSED prune_quickly(const int t, const int elect, const int alike, const struct row *row, const struct pruning *pruned,
                    const struct combination *rule, const double *coefficients, const double *weights, int64_t n, uint16_t *out,
                    uint16_t *place, int64_t *chosen) {
    const float floor = (float)rule->floor;
    const floats one = all(1), little = all(0x1.001p-19f), factor = all((float)rule->factor);
    const ints largest = (ints)all(0x1.fp127f), sign = (ints)all(-0.0f);
    floats c[4], w[4], thinned[4][CHUNK / LANES(float)];
    int32_t floor_bits;
    memcpy(&floor_bits, &floor, sizeof floor);
    for (int k = 0; k < t; k++) c[k] = all((float)coefficients[k]), w[k] = all((float)weights[k]);
    int64_t number = 0;
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t m = least(CHUNK, n - at);
        uint32_t doubted[CHUNK / LANES(float)] = {0};
        for (int k = 0; k < t; k++) {
            if (pruned[k].rescale) thin_quickly(1, row, k, pruned + k, at, m, thinned[k], doubted);
            else thin_quickly(0, row, k, pruned + k, at, m, thinned[k], doubted);
        }
        for (int64_t i = 0; i < m; i += LANES(float)) {
            const floats base = widened_float((const uint16_t *)row->raw[0] + at + i);
            floats d[4], merged, sizes;
            ints unsure = {0};
            for (int k = 0; k < t; k++) d[k] = elect && alike ? thinned[k][i / LANES(float)] : thinned[k][i / LANES(float)] * c[k];
            merged = d[0], sizes = size_of(d[0]);
            for (int k = 1; k < t; k++) merged += d[k], sizes += size_of(d[k]);
            if (elect) {
                const ints elected = (ints)merged & sign;
                floats total = {0}, agreed = {0};
                unsure = (ints)size_of(merged) - (ints)(sizes * little);
                for (int k = 0; k < t; k++) {
                    const floats agreeing = (floats)((ints)d[k] ^ elected);
                    total += where(agreeing > 0, agreeing), agreed += where(agreeing > 0, alike ? one : w[k]);
                }
                if (rule->normalize) total /= (floats)clamped_int((ints)agreed, floor_bits, INT32_MAX);
                sizes = size_of(total * factor), merged = (floats)((ints)(total * factor) ^ elected);
            }
            const floats result = base + merged;
            const floats wrong = plus_product_float(sizes * all(0x1p-19f), size_of(result), all(0x1p-22f));
            const ints low = rounded_bf16(result - wrong), high = rounded_bf16(result + wrong);
            unsure |= ((ints)base == sign) | -(low ^ high) | (largest - (ints)size_of(result));
            halves(low, out + at + i);
            doubted[i / LANES(float)] |= lanes_in(unsure);
        }
        for (int64_t i = 0; i < m; i += LANES(float))
            for (uint32_t some = doubted[i / LANES(float)]; some; some &= some - 1)
                place[number++] = (uint16_t)(at + i + __builtin_ctz(some));
    }
    *chosen = number;
}

#define PRUNE_FOR(t)                                                                                        \
    if (rule->elect && rule->alike) prune_quickly(t, 1, 1, row, pruned, rule, c, w, n, out, place, chosen); \
    else if (rule->elect) prune_quickly(t, 1, 0, row, pruned, rule, c, w, n, out, place, chosen);           \
    else prune_quickly(t, 0, 0, row, pruned, rule, c, w, n, out, place, chosen);

static void prune_row(int t, const struct row *row, const struct pruning *pruned, const struct combination *rule, const double *c,
                      const double *w, int64_t n, uint16_t *out, uint16_t *place, int64_t *chosen) {
    if (t == 1) { PRUNE_FOR(1) }
    else if (t == 2) { PRUNE_FOR(2) }
    else if (t == 3) { PRUNE_FOR(3) }
    else { PRUNE_FOR(4) }
}

static int all_bf16(const struct work *work) {
    int found = 1;
    for (int k = 0; k < work->count; k++) found &= work->inputs[k].dtype == BF16;
    return found;
}

/* Whether float32 may be used: numbers are such that nothing is lost beyond what `prune_quickly` allows for. Differences are 2^-60 or
 * more (SMALLEST), and so are their weighted means, since coefficients are weights times a factor of 1 or more. */
static int pruned_in_range(const struct work *work, const struct place *out, const struct pruning *pruned,
                           const struct combination *rule, const double *c, const double *w) {
    const int t = work->count - 1;
    int fine = t <= 4 && all_bf16(work) && out->dtype == BF16 && (!rule->elect || !rule->normalize || rule->clamp);
    fine &= fabs(rule->factor) > 0x1p-30 && fabs(rule->factor) < 0x1p30;
    for (int k = 0; k < t; k++) {
        fine &= fabs(c[k]) > 0x1p-30 && fabs(c[k]) < 0x1p30 && fabs(w[k]) > 0x1p-30 && fabs(w[k]) < 0x1p30;
        fine &= pruned[k].start >= 0x1p-10 && pruned[k].step >= 0;
    }
    return fine;
}

#define DRAWN (1 << 13) /* elements whose words are drawn at once, where rows are shorter */

/* What the rows of a call need. */
struct pruner {
    int64_t first;        /* where in the tensor the inputs begin; the generators' next numbers have that element's words */
    int64_t columns;
    int64_t most;         /* elements that are read at once, ... */
    int64_t few;          /* ... and of which the words are drawn at once */
    int64_t stride;       /* numbers that hold the words of so many */
    uint64_t *words;
    uint64_t last[MOST];  /* numbers of the generators */
    double *room;         /* for sorting a row: 5 for each element, and TOGETHER more */
    struct ranked ranked[MOST];
    struct row row;
};

/* For rows of `columns` <= WINDOW elements; `room` as `native.pruning_room` gives it. */
static void set_up(struct pruner *p, int t, int64_t first, int64_t columns, char *room) {
    const int64_t width = columns + TOGETHER;
    p->first = first, p->columns = columns, p->most = WINDOW / columns * columns;
    p->few = columns < DRAWN ? DRAWN / columns * columns : columns, p->stride = p->few / 4 + 2;
    p->words = (uint64_t *)room;
    p->room = (double *)(p->words + t * p->stride);
    uint16_t *own = (uint16_t *)(p->room + 5 * columns + TOGETHER);
    for (int k = 0; k < t; k++, own += 2 * width) {
        p->ranked[k] = (struct ranked){.rank = own, .key = (uint8_t *)(own + width)};
        p->row.rank[k] = own;
    }
}

/* Draws the words of elements [at, at + size). */
static void draw_words(struct pruner *p, int t, int64_t at, int64_t size, struct thinning *thin) {
    uint64_t numbers[MOST][CHUNK / 2];
    const int64_t before = (p->first + at) % 4, need = (before + size + 3) / 4, begun = before && at;
    for (int k = 0; k < t; k++) {
        p->words[k * p->stride] = p->last[k];
        p->row.word[k] = (const half_word *)(p->words + k * p->stride) + before;
    }
    for (int64_t i = begun; i < need; i += CHUNK / 4) {
        const int64_t m = least(CHUNK / 4, need - i);
        draw(t, thin, 4 * m, numbers);
        for (int k = 0; k < t; k++)
            if (thin[k].width) memcpy(p->words + k * p->stride + i, numbers[k], (size_t)m * 8);
    }
    for (int k = 0; k < t; k++) p->last[k] = p->words[k * p->stride + need - 1];
}

/* The ranks of all task vectors that are pruned in the row that begins at element s of the inputs in `raw`, element `at` of all. Whether
 * all are, and float32 holds them; they are finite then. */
static int rank_row(struct pruner *p, const struct work *work, const void *const *raw, int64_t s, int64_t at, const struct thinning *thin,
                    int bf16) {
    struct row *row = &p->row;
    double base[CHUNK];
    int held = bf16;
    row->at = p->first + at + s;
    for (int k = 0; k < work->count; k++) row->raw[k] = (const char *)raw[k] + s * sizes[work->inputs[k].dtype];
    for (int k = 0; k + 1 < work->count; k++) {
        const uint16_t *x = row->raw[k + 1], *from = row->raw[0];
        struct ranked *own = p->ranked + k;
        int found = 0;
        held &= thin[k].width != 0;
        if (!thin[k].width) continue;
        held &= bf16 && ranks_by_keys(own, x, from, p->columns, p->room, &found);
        if (found) continue;
        for (int64_t i = 0; i < p->columns; i += CHUNK) {
            const int64_t m = least(CHUNK, p->columns - i);
            load_double(row->raw[0], work->inputs[0].dtype, i, m, base);
            load_double(row->raw[k + 1], work->inputs[k + 1].dtype, i, m, p->room + i);
            for (int64_t j = 0; j < m; j++) p->room[i + j] -= base[j];
        }
        ranks(p->room, p->columns, own->rank, (int64_t *)(p->room + p->columns));
    }
    return held;
}

/* Whether any of a row is not finite. */
static double odd_row(const struct work *work, const struct row *row, int64_t columns) {
    double bad = 0;
    for (int k = 0; k < work->count; k++) bad += odd_raw(row->raw[k], work->inputs[k].dtype, 0, columns);
    return bad;
}

static void next_row(struct pruner *p, int t) {
    for (int k = 0; k < t; k++) p->row.word[k] += p->columns;
}

/* One merged row, into `to` and from element `s` of it on. */
static void merge_row(struct pruner *p, struct work *work, const struct thinning *thin, const struct pruning *pruned,
                      const struct combination *rule, const double *c, const double *w, int quickly, int64_t at, int dtype, char *to,
                      int64_t s) {
    double result[CHUNK];
    uint16_t place[WINDOW], *rounded = (uint16_t *)to + s;
    int64_t done = 0, chosen = 0;
    if (quickly) {
        done = p->columns / LANES(float) * LANES(float);
        prune_row(work->count - 1, &p->row, pruned, rule, c, w, done, rounded, place, &chosen);
        work->redone += chosen;
        for (int64_t i = 0; i < chosen; i += CHUNK) {
            const struct part part = {place + i, 0, least(CHUNK, chosen - i)};
            prune(work, &p->row, thin, pruned, rule, c, w, &part, result);
            for (int64_t j = 0; j < part.m; j++) rounded[place[i + j]] = to_bf16((float)result[j]);
        }
    }
    for (int64_t i = done; i < p->columns; i += CHUNK) {
        const struct part part = {0, i, least(CHUNK, p->columns - i)};
        prune(work, &p->row, thin, pruned, rule, c, w, &part, result);
        if (work->first > at + i) tell_double(work, at + i, part.m, result);
        store_double(result, dtype, s + i, part.m, to);
    }
}

/* As `geomerge_task_vectors_double`, after pruning by rows of `columns` <= WINDOW elements; `first` is where in the tensor the inputs
 * begin. */
int geomerge_pruned(struct work *work, int64_t n, int64_t first, int64_t columns, struct thinning *thin, const struct pruning *pruned,
                    const struct combination *rule, const double *c, const double *w, char *room, int check, const struct place *out) {
    double bad = 0;
    const void *raw[MOST];
    const int t = work->count - 1, bf16 = all_bf16(work), fine = pruned_in_range(work, out, pruned, rule, c, w);
    const int64_t size = sizes[out->dtype];
    struct pruner p = {0};
    set_up(&p, t, first, columns, room);
    int64_t begun = 0; /* from where on the output has not been written */
    for (int64_t at = 0; at < n; at += p.most) {
        const int64_t m = least(p.most, n - at);
        if (!fetch(work, at, m, raw)) return -1;
        char *batch = out->memory ? out->memory + begun * size : room_for(work, out, begun);
        for (int64_t s = 0; s < m; s += columns) {
            if (s % p.few == 0) draw_words(&p, t, at + s, least(p.few, m - s), thin);
            const int held = rank_row(&p, work, raw, s, at, thin, bf16);
            if (check && !held) bad += odd_row(work, &p.row, columns);
            merge_row(&p, work, thin, pruned, rule, c, w, held && fine && work->first <= at + s, at + s, out->dtype, batch, at + s - begun);
            next_row(&p, t);
        }
        const int64_t stop = at + m;
        if (!out->memory && (stop == n || stop + p.most - begun > BATCH)) {
            if (!put(work, out, batch, begun, stop - begun)) return -1;
            begun = stop;
        }
    }
    return bad == 0;
}

static void add_sizes(int64_t m, const double *restrict d, const double *restrict kept, double *restrict whole, double *restrict left) {
    EACH(m) {
        whole[i] += fabs(d[i]);
        left[i] += fabs(d[i]) * kept[i];
    }
}

/* The sum of the sizes of each task vector in each of `rows` rows, and that of what is left after pruning: two rows of `sums` for each. */
int geomerge_pruned_norms(struct work *work, int64_t rows, int64_t first, int64_t columns, struct thinning *thin, const struct pruning *pruned,
                          double *sums, char *room, int check) {
    double base[CHUNK], d[MOST][CHUNK], share[CHUNK], kept[CHUNK], bad = 0;
    double lanes[2 * MOST][CHUNK];
    const void *raw[MOST];
    const int t = work->count - 1, bf16 = all_bf16(work);
    struct pruner p = {0};
    set_up(&p, t, first, columns, room);
    for (int64_t at = 0; at < rows * columns; at += p.most) {
        const int64_t size = least(p.most, rows * columns - at);
        if (!fetch(work, at, size, raw)) return -1;
        for (int64_t s = 0; s < size; s += columns) {
            if (s % p.few == 0) draw_words(&p, t, at + s, least(p.few, size - s), thin);
            if (!rank_row(&p, work, raw, s, at, thin, bf16) && check) bad += odd_row(work, &p.row, columns);
            memset(lanes, 0, 2 * (size_t)t * sizeof *lanes);
            for (int64_t i = 0; i < columns; i += CHUNK) {
                const struct part part = {0, i, least(CHUNK, columns - i)};
                differences_of(work, &p.row, &part, base, d);
                for (int k = 0; k < t; k++) {
                    if (thin[k].width) survivors(&p.row, k, pruned + k, &part, share, kept);
                    else for (int64_t j = 0; j < part.m; j++) kept[j] = thin[k].keep == INFINITY ? 0 : 1;
                    add_sizes(part.m, d[k], kept, lanes[2 * k], lanes[2 * k + 1]);
                }
            }
            for (int k = 0; k < 2 * t; k++) sums[k * rows + (at + s) / columns] = halved(lanes[k]);
            next_row(&p, t);
        }
    }
    return bad == 0;
}
