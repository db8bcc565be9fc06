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

/* A pruning in numbers of float32 and of 16 bits: an element of rank r survives for certain if its word is less than
 * from + (r * by * times >> 16), which is less than its limit by at least 1, and not if it is more than that and MARGIN. */
struct quick_pruning {
    float start, step;
    int32_t rescale;
    uint16_t from, by, times;
};

#define MARGIN 4

/* Whether there is such for rows of n elements. */
static int quick_pruning(struct quick_pruning *quick, const struct pruning *p, int64_t n) {
    const int64_t by = n > 1 ? 0xFFFF / (n - 1) : 1;
    const double times = p->step * 0x1p32 / (double)by;
    *quick = (struct quick_pruning){(float)p->start, (float)p->step, p->rescale, (uint16_t)(p->start * 0x1p16 - 1), (uint16_t)by, (uint16_t)times};
    return p->start >= 0x1p-10 && p->start <= 1 && p->step >= 0 && times < 0x1p16;
}

/* What is left of the next m elements of task vector k, in float32; bits of those of which a word does not decide that for certain are
 * added in `unsure`, a number for each pack. (Two loops with little to wait for each take less time than one.) */
FUSED thin_quickly(const int rescale, const struct row *row, int k, const struct quick_pruning *p, int64_t at, int64_t m, floats *restrict d,
                   uint32_t *restrict unsure) {
    const uint16_t *base = (const uint16_t *)row->raw[0] + at, *x = (const uint16_t *)row->raw[k + 1] + at, *rank = row->rank[k] + at;
    const half_word *word = row->word[k] + at;
    const floats start = all(p->start), step = all(p->step);
    for (int64_t i = 0; i < m; i += PACK) {
        words own[PACK / WORDS], open[PACK / WORDS];
        for (int r = 0; r < PACK / WORDS; r++) {
            const words numbers = words_at(rank + i, 2 * r), drawn = words_at(word + i, 2 * r), from = words_at(base + i, 2 * r);
            const words more = upper_product(numbers * p->by, all_words(p->times));
            const words least = capped_sum(more, all_words(p->from)), most = capped_sum(least, all_words(MARGIN));
#ifdef __AVX512BW__
            const __mmask32 kept = _mm512_cmplt_epu16_mask((__m512i)drawn, (__m512i)least);
            own[r] = (words)_mm512_mask_loadu_epi16((__m512i)from, kept, x + i);
            unsure[i / PACK] |= _mm512_cmple_epu16_mask((__m512i)drawn, (__m512i)most) & ~kept;
#else
            const words not_kept = (words)(larger_words(drawn, least) == drawn);
            own[r] = chosen_words(not_kept, from, words_at(x + i, 2 * r)), open[r] = not_kept & (words)(larger_words(drawn, most) == most);
#endif
        }
#ifndef __AVX512BW__
        unsure[i / PACK] |= packed_bits(open);
#endif
        for (int r = 0; r < PACKED; r++) {
            const floats share = plus_product_float(start, half_numbers(words_at(rank + i, r), r), step);
            const floats whole = half_bf16(own[r / 2], r) - one_packed_bf16(base + i, r);
            d[i / LANES(float) + r] = rescale ? whole / share : whole;
        }
    }
}

/* Whole packs of a row in float32, rounded where that leaves no choice; the other elements are chosen: how many, and in `place` where they
 * lie. A probability is wrong by 2^-23 of it, what a survivor is divided by it by 2^-22, so with the coefficients',
 * weights' and factor's rounding and sums of four the combined vector is by less than 2^-19 of the sum of the sizes, and their signs are
 * decided beyond that; the result by that and its last rounding, for which four of its last bits are more than enough. It rounds one way
 * where it is farther than that from the middle between two numbers of bfloat16. What is unsure is looked at when a chunk is done: what
 * comes next does not wait for it. */
FUSED prune_quickly(const int t, const int elect, const int alike, const struct row *row, const struct quick_pruning *pruned,
                    const struct combination *rule, const double *coefficients, const double *weights, int64_t n, uint16_t *out,
                    uint16_t *place, int64_t *chosen) {
    const float floor = (float)rule->floor;
    const floats one = all(1), little = all(0x1.001p-19f), factor = all((float)rule->factor), largest = all(0x1.fp127f);
    const ints sign = (ints)all(-0.0f);
    floats c[4], w[4], thinned[4][CHUNK / LANES(float)];
    for (int k = 0; k < t; k++) c[k] = all((float)coefficients[k]), w[k] = all((float)weights[k]);
    int64_t number = 0;
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t m = least(CHUNK, n - at);
        uint32_t doubted[CHUNK / PACK] = {0};
        for (int k = 0; k < t; k++) {
            if (pruned[k].rescale) thin_quickly(1, row, k, pruned + k, at, m, thinned[k], doubted);
            else thin_quickly(0, row, k, pruned + k, at, m, thinned[k], doubted);
        }
        for (int64_t i = 0; i < m; i += PACK) {
            ints rounded[PACKED];
            uint32_t unsure[PACKED];
#pragma GCC unroll 4
            for (int r = 0; r < PACKED; r++) {
                const floats base = one_packed_bf16((const uint16_t *)row->raw[0] + at + i, r);
                floats d[4], merged, sizes;
                for (int k = 0; k < t; k++) {
                    d[k] = thinned[k][i / LANES(float) + r];
                    if (!elect || !alike) d[k] *= c[k];
                }
                merged = d[0], sizes = size_of(d[0]);
                for (int k = 1; k < t; k++) merged += d[k], sizes += size_of(d[k]);
                marks open = equal((ints)base, sign);
                if (elect) {
                    const ints elected = (ints)merged & sign;
                    floats total = {0}, agreed = {0};
                    open |= less(size_of(merged), sizes * little);
                    for (int k = 0; k < t; k++) {
                        const floats agreeing = (floats)((ints)d[k] ^ elected);
                        total = plus_where_positive(total, agreeing, agreeing);
                        agreed = plus_where_positive(agreed, agreeing, alike ? one : w[k]);
                    }
                    if (rule->normalize) total /= larger_float(agreed, all(floor));
                    sizes = size_of(total * factor), merged = (floats)((ints)(total * factor) ^ elected);
                }
                const floats result = base + merged, power = (floats)((ints)result & 0x7F800000);
                const ints beyond_half = ((ints)result & 0xFFFF) - 0x8000; /* in last bits, of which a power of two has 2^23 */
                const floats apart = size_of(__builtin_convertvector(beyond_half, floats));
                open |= less((apart - all(4)) * power, sizes * all(16)) | less(largest, size_of(result));
                unsure[r] = marked(open);
                rounded[r] = (ints)result + 0x8000;
            }
            unpacked_uppers(rounded, out + at + i);
            doubted[i / PACK] |= packed_mask(unsure);
        }
        for (int64_t i = 0; i < m; i += PACK)
            for (uint32_t some = doubted[i / PACK]; some; some &= some - 1) place[number++] = (uint16_t)(at + i + __builtin_ctz(some));
    }
    *chosen = number;
}

#define PRUNE_FOR(t)                                                                                        \
    if (rule->elect && rule->alike) prune_quickly(t, 1, 1, row, pruned, rule, c, w, n, out, place, chosen); \
    else if (rule->elect) prune_quickly(t, 1, 0, row, pruned, rule, c, w, n, out, place, chosen);           \
    else prune_quickly(t, 0, 0, row, pruned, rule, c, w, n, out, place, chosen);

static void prune_row(int t, const struct row *row, const struct quick_pruning *pruned, const struct combination *rule, const double *c,
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
static int pruned_in_range(const struct work *work, int64_t columns, const struct place *out, const struct pruning *pruned,
                           const struct combination *rule, const double *c, const double *w, struct quick_pruning *quick) {
    const int t = work->count - 1;
    int fine = t <= 4 && all_bf16(work) && out->dtype == BF16 && (!rule->elect || !rule->normalize || rule->clamp);
    fine &= fabs(rule->factor) > 0x1p-30 && fabs(rule->factor) < 0x1p30;
    for (int k = 0; k < t && fine; k++) {
        fine = fabs(c[k]) > 0x1p-30 && fabs(c[k]) < 0x1p30 && fabs(w[k]) > 0x1p-30 && fabs(w[k]) < 0x1p30;
        fine = fine && quick_pruning(quick + k, pruned + k, columns);
    }
    return fine;
}

/* What the rows of a call need: the inputs' elements, and for each task vector that is pruned its ranks, keys and words. */
struct pruner {
    const struct work *work;
    const struct thinning *thin;
    int64_t first;   /* where in the tensor the inputs begin; the generators' next numbers have that element's words */
    int64_t columns;
    int64_t rows;
    int64_t most;    /* elements that are read at once */
    int bf16;
    struct stream words[MOST];
    uint64_t *numbers[MOST][2]; /* with the words of even and of odd rows */
    int64_t drawn[MOST];        /* blocks of numbers */
    double *room;               /* for sorting a row: 5 for each element, and PACK more */
    uint16_t (*count)[KEYS];
    uint8_t *key[2];            /* of this task vector and of the next in turn */
    int turn;
    struct keying keys[2];      /* begun or made, where n is not 0 */
    struct ranked ranked[MOST];
    struct row row;
};

/* The next `size` bytes of a room, and what fills up to a register. */
static inline char *part_of(char **room, int64_t size) {
    char *own = *room;
    *room += (size + REGISTER - 1) / REGISTER * REGISTER;
    return own;
}

/* For rows of `columns` <= WINDOW elements; `room` as `native.pruning_room` gives it. */
static void set_up(struct pruner *p, const struct work *work, int64_t rows, int64_t first, int64_t columns, const struct thinning *thin,
                   char *room) {
    const int64_t width = columns + PACK;
    const int t = work->count - 1;
    *p = (struct pruner){.work = work, .thin = thin, .first = first, .columns = columns, .rows = rows};
    p->most = WINDOW / columns * columns, p->bf16 = all_bf16(work);
    room += -(intptr_t)room & (REGISTER - 1);
    /* counts and keys side by side: processors take accesses 4,096 bytes apart for ones of the same place at first */
    p->count = (uint16_t (*)[KEYS])part_of(&room, PARTS * sizeof *p->count);
    for (int i = 0; i < 2; i++) p->key[i] = (uint8_t *)part_of(&room, width);
    p->room = (double *)part_of(&room, 8 * (5 * columns + PACK));
    for (int k = 0; k < t; k++) {
        for (int odd = 0; odd < 2; odd++) p->numbers[k][odd] = (uint64_t *)part_of(&room, 8 * (columns / 4 + 3 * DRAWN));
        p->row.rank[k] = p->ranked[k].rank = (uint16_t *)part_of(&room, 2 * width);
        if (thin[k].width) p->words[k] = stream_of(thin[k].state, thin[k].step);
    }
}

/* Where the words of a row begin among those of the call's numbers. */
static inline int64_t first_word(const struct pruner *p, int64_t row) { return p->first % 4 + row * p->columns; }

/* Has what is left of task vector k's words for a row drawn: `beside` is told where to. The last block of the row before may have some. */
static void ask_for_words(struct pruner *p, int k, int64_t row, struct beside *beside) {
    const int64_t word = first_word(p, row), begin = word / (4 * DRAWN), end = (word + p->columns - 1) / (4 * DRAWN) + 1;
    uint64_t *to = p->numbers[k][row % 2];
    beside->blocks = row < p->rows ? end - p->drawn[k] : 0;
    if (row && begin < p->drawn[k]) {
        memcpy(to, p->numbers[k][1 - row % 2] + (begin - first_word(p, row - 1) / (4 * DRAWN)) * DRAWN, DRAWN * sizeof *to);
        to += DRAWN;
    }
    p->drawn[k] += beside->blocks;
    beside->words = p->words[k], beside->to = to;
}

/* The task vector after k of a row that is pruned; the first one again at the end. */
static inline int next_pruned(const struct pruner *p, int k) {
    const int t = p->work->count - 1;
    do k = k + 1 < t ? k + 1 : 0;
    while (!p->thin[k].width);
    return k;
}

/* The ranks of all task vectors that are pruned in the row whose elements begin at element s of the inputs in `raw`, of which m are there,
 * and their words. Whether all are, and float32 holds them; they are finite then. */
static int rank_row(struct pruner *p, const void *const *raw, int64_t s, int64_t m, int64_t row) {
    const struct work *work = p->work;
    const int64_t columns = p->columns, word = first_word(p, row);
    double base[CHUNK];
    int held = p->bf16;
    p->row.at = p->first + row * columns;
    for (int k = 0; k < work->count; k++) p->row.raw[k] = (const char *)raw[k] + s * sizes[work->inputs[k].dtype];
    for (int k = 0; k + 1 < work->count; k++) {
        const uint16_t *x = p->row.raw[k + 1], *from = p->row.raw[0];
        struct beside beside = {.blocks = 0};
        int found = 0;
        held &= p->thin[k].width != 0;
        if (!p->thin[k].width) continue;
        if (row == 0) ask_for_words(p, k, 0, &beside), do_rest(&beside), p->words[k] = beside.words;
        p->row.word[k] = (const half_word *)p->numbers[k][row % 2] + word % (4 * DRAWN);
        ask_for_words(p, k, row + 1, &beside);
        if (p->bf16) {
            const int next = next_pruned(p, k), turn = p->turn;
            const int64_t ahead = next > k ? s : s + columns;
            if (p->keys[turn].n == 0) p->keys[turn] = keying_of(x, from, columns, p->key[turn], p->ranked[k].steps);
            if (ahead < m && p->ranked[next].steps.shift)
                beside.keys = keying_of((const uint16_t *)raw[next + 1] + ahead, (const uint16_t *)raw[0] + ahead, columns, p->key[1 - turn],
                                        p->ranked[next].steps);
            held &= ranks_by_keys(p->ranked + k, p->keys + turn, p->count, p->room, &beside, &found);
        }
        do_rest(&beside);
        p->words[k] = beside.words;
        p->turn = 1 - p->turn, p->keys[p->turn] = beside.keys;
        if (found) continue;
        for (int64_t i = 0; i < columns; i += CHUNK) {
            const int64_t size = least(CHUNK, columns - i);
            load_double(p->row.raw[0], work->inputs[0].dtype, i, size, base);
            load_double(p->row.raw[k + 1], work->inputs[k + 1].dtype, i, size, p->room + i);
            for (int64_t j = 0; j < size; j++) p->room[i + j] -= base[j];
        }
        ranks(p->room, columns, p->ranked[k].rank, (int64_t *)(p->room + columns));
    }
    return held;
}

/* Whether any of a row is not finite. */
static double odd_row(const struct work *work, const struct row *row, int64_t columns) {
    double bad = 0;
    for (int k = 0; k < work->count; k++) bad += odd_raw(row->raw[k], work->inputs[k].dtype, 0, columns);
    return bad;
}

/* One merged row, into `to` and from element `s` of it on; in float32 where there is a quick pruning. */
static void merge_row(struct pruner *p, struct work *work, const struct pruning *pruned, const struct quick_pruning *quick,
                      const struct combination *rule, const double *c, const double *w, int64_t at, int dtype, char *to, int64_t s) {
    double result[CHUNK];
    uint16_t place[WINDOW], *rounded = (uint16_t *)to + s;
    int64_t done = 0, chosen = 0;
    if (quick) {
        done = p->columns / PACK * PACK;
        prune_row(work->count - 1, &p->row, quick, rule, c, w, done, rounded, place, &chosen);
        work->redone += chosen;
        for (int64_t i = 0; i < chosen; i += CHUNK) {
            const struct part part = {place + i, 0, least(CHUNK, chosen - i)};
            prune(work, &p->row, p->thin, pruned, rule, c, w, &part, result);
            for (int64_t j = 0; j < part.m; j++) rounded[place[i + j]] = to_bf16((float)result[j]);
        }
    }
    for (int64_t i = done; i < p->columns; i += CHUNK) {
        const struct part part = {0, i, least(CHUNK, p->columns - i)};
        prune(work, &p->row, p->thin, pruned, rule, c, w, &part, result);
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
    const int64_t size = sizes[out->dtype];
    struct quick_pruning quick[4];
    const int fine = pruned_in_range(work, columns, out, pruned, rule, c, w, quick);
    struct pruner p;
    set_up(&p, work, n / columns, first, columns, thin, room);
    int64_t begun = 0; /* from where on the output has not been written */
    for (int64_t at = 0; at < n; at += p.most) {
        const int64_t m = least(p.most, n - at);
        if (!fetch(work, at, m, raw)) return -1;
        char *batch = out->memory ? out->memory + begun * size : room_for(work, out, begun);
        for (int64_t s = 0; s < m; s += columns) {
            const int held = rank_row(&p, raw, s, m, (at + s) / columns);
            if (check && !held) bad += odd_row(work, &p.row, columns);
            merge_row(&p, work, pruned, held && fine && work->first <= at + s ? quick : 0, rule, c, w, at + s, out->dtype, batch, at + s - begun);
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
    const int t = work->count - 1;
    struct pruner p;
    set_up(&p, work, rows, first, columns, thin, room);
    for (int64_t at = 0; at < rows * columns; at += p.most) {
        const int64_t size = least(p.most, rows * columns - at);
        if (!fetch(work, at, size, raw)) return -1;
        for (int64_t s = 0; s < size; s += columns) {
            if (!rank_row(&p, raw, s, size, (at + s) / columns) && check) bad += odd_row(work, &p.row, columns);
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
        }
    }
    return bad == 0;
}
