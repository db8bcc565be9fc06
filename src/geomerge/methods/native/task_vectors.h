/* Task vectors: thinned, combined, added to the base. */

#pragma once

struct thinning {      /* what remains of one task vector */
    double keep;       /* magnitudes greater than this (negative: all) ... */
    double equal;      /* ... of those that equal this (NaN: all) the next `left` */
    double drop;       /* but not those greater than this ... */
    double drop_equal; /* ... where of those that equal this (NaN: all) the next `drop_left` are dropped */
    int64_t left;
    int64_t drop_left;
    uint64_t state[2]; /* of the generator (random.h) */
    uint64_t step[2];
    int32_t width;     /* each element draws a word of 16 or 32 bits (0: none), and those below `limit` survive */
    uint32_t limit;
};

/* The next n <= CHUNK words of some thinnings' generators: each number of 64 bits gives several. A call for words that do not fill
 * whole ones is the last. Several in step, since each number of one generator has to wait for the one before. */
FUSED draw_some(const int t, struct thinning *each, int64_t need, uint64_t (*numbers)[CHUNK / 2]) {
    uint64_t *state[4], *step[4];
    for (int k = 0; k < t; k++) state[k] = each[k].state, step[k] = each[k].step;
    numbers_of_generators(t, state, step, need, numbers);
}

static void draw(int t, struct thinning *each, int64_t n, uint64_t (*numbers)[CHUNK / 2]) {
    for (int k = 0; k < t;) {
        int64_t need = (n * each[k].width + 63) / 64;
        int alike = 1;
        while (alike < 4 && k + alike < t && each[k + alike].width == each[k].width) alike++;
        if (!need) alike = 1;
        else if (alike == 4) draw_some(4, each + k, need, numbers + k);
        else if (alike == 3) draw_some(3, each + k, need, numbers + k);
        else if (alike == 2) draw_some(2, each + k, need, numbers + k);
        else draw_some(1, each + k, need, numbers + k);
        k += alike;
    }
}

struct combination {
    int32_t elect;     /* disjoint merge, else a weighted sum */
    int32_t alike;     /* all coefficients are one positive number, and so are all weights */
    int32_t normalize; /* divide by the weights that agree */
    int32_t clamp;     /* the divisor is at least `floor`; else where it is no larger it becomes 1 */
    double floor;
    double factor;     /* of the merged task vector */
    double limit;      /* a sum this much smaller than its summands is made again in double */
    int32_t minus;     /* where votes cancel the elected sign is -, else + */
};

/* Parts of the generators' numbers. */
typedef uint16_t half_word __attribute__((may_alias));
typedef uint32_t word __attribute__((may_alias));

#define THIN(T, abs)                                                                                  \
    static void thin_##T(struct thinning *t, int64_t m, const uint64_t *numbers, T *restrict d) {     \
        if (t->keep >= 0) {                                                                           \
            T keep = (T)t->keep;                                                                      \
            EACH(m) d[i] = d[i] >= -keep && d[i] <= keep ? (T)0 : d[i];                               \
            if (t->equal == t->equal) {                                                               \
                T equal = (T)t->equal;                                                                \
                int32_t number = 0;                                                                   \
                EACH((int32_t)m) number += abs(d[i]) == equal;                                        \
                if (t->left >= number) {                                                              \
                    t->left -= number;                                                                \
                } else if (t->left == 0) {                                                            \
                    EACH(m) d[i] = abs(d[i]) == equal ? (T)0 : d[i];                                  \
                } else {                                                                              \
                    EACH(m) if (abs(d[i]) == equal) {                                                 \
                        if (t->left > 0) t->left--;                                                   \
                        else d[i] = 0;                                                                \
                    }                                                                                 \
                }                                                                                     \
            }                                                                                         \
        }                                                                                             \
        if (t->drop < INFINITY) {                                                                     \
            T drop = (T)t->drop;                                                                      \
            if (t->drop_equal == t->drop_equal) {                                                     \
                T equal = (T)t->drop_equal;                                                           \
                int32_t number = 0;                                                                   \
                EACH((int32_t)m) number += abs(d[i]) == equal;                                        \
                if (t->drop_left >= number || t->drop_left == 0) {                                    \
                    T most = t->drop_left ? drop : equal;                                             \
                    EACH(m) d[i] = abs(d[i]) > most ? (T)0 : d[i];                                    \
                    t->drop_left -= t->drop_left ? number : 0;                                        \
                } else {                                                                              \
                    EACH(m) if (abs(d[i]) > drop) {                                                   \
                        if (abs(d[i]) > equal) d[i] = 0;                                              \
                        else if (t->drop_left > 0) t->drop_left--, d[i] = 0;                          \
                    }                                                                                 \
                }                                                                                     \
            } else {                                                                                  \
                EACH(m) d[i] = abs(d[i]) > drop ? (T)0 : d[i];                                        \
            }                                                                                         \
        }                                                                                             \
        if (t->width) {                                                                               \
            if (t->width == 16) {                                                                     \
                const half_word *w = (const half_word *)numbers;                                      \
                int32_t limit = (int32_t)t->limit;                                                    \
                EACH(m) d[i] *= (T)(w[i] < limit);                                                    \
            } else {                                                                                  \
                const word *w = (const word *)numbers;                                                \
                uint32_t limit = t->limit;                                                            \
                EACH(m) d[i] *= (T)(w[i] < limit);                                                    \
            }                                                                                         \
        }                                                                                             \
    }

/* base + sum of c[k] d[k], or the disjoint merge, of m <= CHUNK elements; `doubt` says where float32 may be wrong. */
#define COMBINE(T, abs, fma, LEAST)                                                                   \
    static void combine_##T(const struct combination *rule, int t, const double *c, const double *w, int64_t m, \
                            const T *restrict base, T (*restrict d)[CHUNK], T *restrict result,       \
                            uint8_t *restrict doubt) {                                                \
        T limit = (T)rule->limit;                                                                     \
        if (!rule->elect) {                                                                           \
            T first = (T)c[0];                                                                        \
            EACH(m) result[i] = d[0][i] * first;                                                      \
            for (int k = 1; k < t; k++) {                                                             \
                T factor = (T)c[k];                                                                   \
                EACH(m) result[i] = fma(d[k][i], factor, result[i]);                                  \
            }                                                                                         \
            EACH(m) result[i] += base[i];                                                             \
            if (!doubt) return;                                                                       \
            T size[CHUNK];                                                                            \
            EACH(m) size[i] = abs(base[i]);                                                           \
            for (int k = 0; k < t; k++) {                                                             \
                T factor = (T)fabs(c[k]);                                                             \
                EACH(m) size[i] = fma(abs(d[k][i]), factor, size[i]);                                 \
            }                                                                                         \
            EACH(m) doubt[i] = abs(result[i]) < limit * size[i];                                      \
            return;                                                                                   \
        }                                                                                             \
        T votes[CHUNK], elected[CHUNK], total[CHUNK], agreed[CHUNK];                                  \
        if (!rule->alike)                                                                             \
            for (int k = 0; k < t; k++) {                                                             \
                T factor = (T)c[k];                                                                   \
                EACH(m) d[k][i] *= factor;                                                            \
            }                                                                                         \
        EACH(m) votes[i] = d[0][i];                                                                   \
        for (int k = 1; k < t; k++) EACH(m) votes[i] += d[k][i];                                      \
        const T none = rule->minus ? (T)LEAST : (T)0;                                                 \
        EACH(m) elected[i] = votes[i] < none ? (T)-1 : (T)1;                                          \
        for (int k = 0; k < t; k++) {                                                                 \
            T share = rule->alike ? (T)1 : (T)w[k];                                                   \
            EACH(m) {                                                                                 \
                T agreeing = d[k][i] * elected[i];                                                    \
                agreeing = agreeing < 0 ? (T)0 : agreeing;                                            \
                T weight = agreeing > 0 ? share : (T)0;                                               \
                total[i] = k ? total[i] + agreeing : agreeing;                                        \
                agreed[i] = k ? agreed[i] + weight : weight;                                          \
            }                                                                                         \
        }                                                                                             \
        if (doubt) {                                                                                  \
            T few = (T)((t + 3) * 0x1p-23);                                                           \
            if (rule->alike) memset(doubt, 0, m);                                                     \
            else EACH(m) doubt[i] = abs(votes[i]) < total[i] * few;                                   \
        }                                                                                             \
        if (rule->normalize) {                                                                        \
            T floor = (T)rule->floor;                                                                 \
            if (rule->clamp) EACH(m) agreed[i] = agreed[i] < floor ? floor : agreed[i];               \
            else EACH(m) agreed[i] = abs(agreed[i]) <= floor ? (T)1 : agreed[i];                      \
            EACH(m) total[i] /= agreed[i];                                                            \
        }                                                                                             \
        T factor = (T)rule->factor;                                                                   \
        EACH(m) {                                                                                     \
            T merged = total[i] * elected[i];                                                         \
            result[i] = fma(merged, factor, base[i]);                                                 \
        }                                                                                             \
        if (doubt) EACH(m) doubt[i] |= abs(result[i]) < limit * abs(base[i]);                         \
    }

THIN(float, fabsf) THIN(double, fabs)
COMBINE(float, fabsf, fmaf, 0x1p-149f) COMBINE(double, fabs, fma, 0x1p-1074)

/* The elements that float32 may have got wrong, again in double from the inputs themselves. */
static void again(const struct combination *rule, int t, const double *c, const double *w, int64_t m, const uint8_t *doubt,
                  const void *const *raw, const int *dtypes, int64_t start, float (*thinned)[CHUNK], float *result) {
    int where[CHUNK];
    int found = 0;
    for (int i = 0; i < m; i++)
        if (doubt[i]) where[found++] = i;
    double base[CHUNK], d[MOST][CHUNK], exact[CHUNK];
    for (int f = 0; f < found; f++) load_double(raw[0], dtypes[0], start + where[f], 1, base + f);
    for (int k = 0; k < t; k++)
        for (int f = 0; f < found; f++) {
            double x;
            load_double(raw[k + 1], dtypes[k + 1], start + where[f], 1, &x);
            d[k][f] = thinned[k][where[f]] != 0 ? x - base[f] : (double)thinned[k][where[f]];
        }
    combine_double(rule, t, c, w, found, base, d, exact, 0);
    for (int f = 0; f < found; f++) result[where[f]] = (float)exact[f];
}

/* A chunk of task vectors of bfloat16 that are thinned by magnitude or at random alone, all experts in one loop, for each number of
 * them. What float32 may have got wrong is not repaired here: the value says whether there is any. */
FUSED fused(const int t, const int elect, const int alike, const int random, const struct combination *rule, const float *keep,
            const float *drop, const float *c, const float *w, const uint16_t *const *x, const float *masks, float *restrict result, int *doubt) {
    const floats limit = all((float)rule->limit), few = all((float)((t + 3) * 0x1p-23)), floor = all((float)rule->floor);
    const floats factor = all((float)rule->factor), one = all(1), minus = all(-1), none = all(rule->minus ? 0x1p-149f : 0.0f);
    const int normalize = rule->normalize, clamp = rule->clamp;
    ints any = {0};
    for (int i = 0; i < CHUNK; i += LANES(float)) {
        floats base = widened_float(x[0] + i), d[4];
        for (int k = 0; k < t; k++) {
            d[k] = widened_float(x[k + 1] + i) - base;
            d[k] = where(~((d[k] >= -all(keep[k])) & (d[k] <= all(keep[k]))), d[k]);
            if (drop) d[k] = where(size_of(d[k]) <= all(drop[k]), d[k]);
            if (random) d[k] *= *(const floats *)(masks + k * CHUNK + i);
        }
        floats sum;
        if (!elect) {
            floats size = size_of(base);
            sum = d[0] * all(c[0]);
            for (int k = 1; k < t; k++) sum = plus_product_float(sum, d[k], all(c[k]));
            for (int k = 0; k < t; k++) size = plus_product_float(size, size_of(d[k]), all(fabsf(c[k])));
            sum += base;
            any |= size_of(sum) < limit * size;
        } else {
            for (int k = 0; !alike && k < t; k++) d[k] *= all(c[k]);
            floats votes = d[0], total = {0}, agreed = {0};
            for (int k = 1; k < t; k++) votes += d[k];
            floats elected = where(votes < none, minus) + where(~(votes < none), one);
            for (int k = 0; k < t; k++) {
                floats agreeing = d[k] * elected;
                agreeing = where(~(agreeing < 0), agreeing);
                floats weight = where(agreeing > 0, alike ? one : all(w[k]));
                total = k ? total + agreeing : agreeing;
                agreed = k ? agreed + weight : weight;
            }
            if (!alike) any |= size_of(votes) < total * few;
            if (normalize) {
                if (clamp) agreed = where(agreed < floor, floor) + where(~(agreed < floor), agreed);
                else agreed = where(size_of(agreed) <= floor, one) + where(~(size_of(agreed) <= floor), agreed);
                total /= agreed;
            }
            sum = plus_product_float(base, total * elected, factor);
            any |= size_of(sum) < limit * size_of(base);
        }
        memcpy(result + i, &sum, sizeof sum);
    }
    *doubt = 0;
    for (int i = 0; i < LANES(float); i++) *doubt |= any[i];
}

#define FUSED_FOR(t)                                                                                                  \
    if (rule->elect && rule->alike && !random && !outliers)                                                           \
        fused(t, 1, 1, 0, rule, keep, 0, c, w, x, drawn, result, &any);                                               \
    else if (rule->elect && rule->alike) fused(t, 1, 1, random, rule, keep, outliers, c, w, x, drawn, result, &any);  \
    else if (rule->elect) fused(t, 1, 0, random, rule, keep, outliers, c, w, x, drawn, result, &any);                 \
    else fused(t, 0, 0, random, rule, keep, outliers, c, w, x, drawn, result, &any);

/* How many task vectors' magnitudes in a chunk equal a number. */
static int64_t equals(const uint16_t *base, const uint16_t *x, float number) {
    ints found = {0};
    for (int i = 0; i < CHUNK; i += LANES(float)) found -= size_of(widened_float(x + i) - widened_float(base + i)) == all(number);
    int64_t sum = 0;
    for (int i = 0; i < LANES(float); i++) sum += found[i];
    return sum;
}

/* Whether the result is there: the inputs are such, and nothing is in doubt. */
static int fuse(int t, const struct combination *rule, struct thinning *thin, const double *coefficients,
                const double *weights, const void *const *raw, const int *dtypes, int64_t start, int64_t m,
                uint64_t (*numbers)[CHUNK / 2], float *result) {
    float keep[4], drop[4], c[4], w[4];
    const float *outliers = 0;
    _Alignas(REGISTER) float drawn[4 * CHUNK];
    const uint16_t *x[5];
    int random = 0;
    if (t > 4 || m != CHUNK) return 0;
    for (int k = 0; k <= t; k++) {
        if (dtypes[k] != BF16) return 0;
        x[k] = (const uint16_t *)raw[k] + start;
    }
    int64_t taken[4], dropped[4];
    for (int k = 0; k < t; k++) {
        if (thin[k].width == 32) return 0;
        drop[k] = (float)thin[k].drop;
        dropped[k] = 0;
        if (thin[k].drop_equal == thin[k].drop_equal) { /* all of those are dropped, or none, unless the last of them lies here */
            if (thin[k].drop_left) dropped[k] = equals(x[0], x[k + 1], (float)thin[k].drop_equal);
            if (thin[k].drop_left < dropped[k]) return 0;
            if (!thin[k].drop_left) drop[k] = (float)thin[k].drop_equal;
        }
        if (thin[k].drop < INFINITY) outliers = drop;
        keep[k] = (float)thin[k].keep, c[k] = (float)coefficients[k], w[k] = (float)weights[k];
        random |= thin[k].width;
        taken[k] = 0;
        if (thin[k].keep < 0 || thin[k].equal != thin[k].equal) continue;
        /* Of those that equal the threshold all are kept, or none, unless the last of them lies here. */
        if (thin[k].left) taken[k] = equals(x[0], x[k + 1], (float)thin[k].equal);
        if (thin[k].left < taken[k]) return 0;
        if (!thin[k].left) keep[k] = (float)thin[k].equal;
    }
    for (int k = 0; random && k < t; k++) {
        const int32_t limit = thin[k].width ? (int32_t)thin[k].limit : 1 << 16;
        const half_word *drawn_words = (const half_word *)numbers[thin[k].width ? k : 0];
        for (int i = 0; i < CHUNK; i++) drawn[k * CHUNK + i] = (float)(drawn_words[i] < limit);
    }
    int any = 1;
    if (t == 1) { FUSED_FOR(1) }
    else if (t == 2) { FUSED_FOR(2) }
    else if (t == 3) { FUSED_FOR(3) }
    else { FUSED_FOR(4) }
    for (int k = 0; !any && k < t; k++) thin[k].left -= taken[k], thin[k].drop_left -= dropped[k];
    return !any;
}

/* theta_0 + combine(thin(theta_k - theta_0)), rounded. Inputs: the base and t experts. Returns whether all are finite (looked
 * at only if `check`). */
int geomerge_task_vectors_float(struct work *work, int64_t n, struct thinning *thin, const struct combination *rule,
                                const double *c, const double *w, int check, const struct place *out) {
    float base[CHUNK], d[MOST][CHUNK], kept[MOST][CHUNK], result[CHUNK], bad = 0;
    uint8_t doubt[CHUNK];
    uint64_t numbers[MOST][CHUNK / 2];
    const void *raw[MOST];
    int dtypes[MOST];
    const int t = work->count - 1;
    for (int k = 0; k <= t; k++) dtypes[k] = work->inputs[k].dtype;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            draw(t, thin, m, numbers);
            if (fuse(t, rule, thin, c, w, raw, dtypes, s, m, numbers, result)) {
                for (int k = 0; check && k <= t; k++) bad += odd_float(raw[k], dtypes[k], s, m, 0);
                if (work->first > at + s) tell_float(work, at + s, m, result);
                store_float(result, out->dtype, s, m, to);
                continue;
            }
            load_float(raw[0], dtypes[0], s, m, base);
            if (check) bad += odd_float(raw[0], dtypes[0], s, m, base);
            for (int k = 0; k < t; k++) {
                load_float(raw[k + 1], dtypes[k + 1], s, m, d[k]);
                if (check) bad += odd_float(raw[k + 1], dtypes[k + 1], s, m, d[k]);
                EACH(m) d[k][i] -= base[i];
                thin_float(thin + k, m, numbers[k], d[k]);
            }
            const int scaled = rule->elect && !rule->alike;
            if (scaled) memcpy(kept, d, sizeof d[0] * t);
            combine_float(rule, t, c, w, m, base, d, result, doubt);
            uint8_t any = 0;
            EACH(m) any |= doubt[i];
            if (any) again(rule, t, c, w, m, doubt, raw, dtypes, s, scaled ? kept : d, result);
            if (work->first > at + s) tell_float(work, at + s, m, result);
            store_float(result, out->dtype, s, m, to);
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0;
}

int geomerge_task_vectors_double(struct work *work, int64_t n, struct thinning *thin, const struct combination *rule,
                                 const double *c, const double *w, int check, const struct place *out) {
    double x[MOST][CHUNK], result[CHUNK], bad = 0;
    uint64_t numbers[MOST][CHUNK / 2];
    const void *raw[MOST];
    const int count = work->count;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            for (int k = 0; k < count; k++) {
                load_double(raw[k], work->inputs[k].dtype, s, m, x[k]);
                if (check) bad += odd_double(raw[k], work->inputs[k].dtype, s, m, x[k]);
                if (k) EACH(m) x[k][i] -= x[0][i];
            }
            draw(count - 1, thin, m, numbers);
            for (int k = 1; k < count; k++) thin_double(thin + k - 1, m, numbers[k - 1], x[k]);
            combine_double(rule, count - 1, c, w, m, x[0], x + 1, result, 0);
            if (work->first > at + s) tell_double(work, at + s, m, result);
            store_double(result, out->dtype, s, m, to);
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0;
}

/* The sum of the sizes of each task vector in blocks of so many elements, and that of what is left after thinning: two rows of `sums`
 * for each. */
#define NORMS(T, abs)                                                                                 \
    int geomerge_norms_##T(struct work *work, int64_t n, int64_t block, struct thinning *thin, double *sums, int check) { \
        T base[CHUNK], d[CHUNK], lanes[2 * MOST][CHUNK] = {{0}}, bad = 0;                             \
        uint64_t numbers[MOST][CHUNK / 2];                                                            \
        const void *raw[MOST];                                                                        \
        const struct place *in = work->inputs;                                                        \
        const int t = work->count - 1;                                                                \
        const int64_t blocks = (n + block - 1) / block;                                               \
        for (int64_t at = 0; at < n; at += WINDOW) {                                                  \
            int64_t size = least(WINDOW, n - at);                                                     \
            if (!fetch(work, at, size, raw)) return -1;                                               \
            for (int64_t s = 0; s < size; s += CHUNK) {                                               \
                int64_t m = least(CHUNK, size - s);                                                   \
                load_##T(raw[0], in[0].dtype, s, m, base);                                            \
                if (check) bad += odd_##T(raw[0], in[0].dtype, s, m, base);                           \
                draw(t, thin, m, numbers);                                                            \
                for (int k = 0; k < t; k++) {                                                         \
                    T *restrict whole = lanes[2 * k], *restrict left = lanes[2 * k + 1];              \
                    load_##T(raw[k + 1], in[k + 1].dtype, s, m, d);                                   \
                    if (check) bad += odd_##T(raw[k + 1], in[k + 1].dtype, s, m, d);                  \
                    EACH(m) {                                                                         \
                        d[i] -= base[i];                                                              \
                        whole[i] += abs(d[i]);                                                        \
                    }                                                                                 \
                    thin_##T(thin + k, m, numbers[k], d);                                             \
                    EACH(m) left[i] += abs(d[i]);                                                     \
                }                                                                                     \
                if ((at + s + m) % block && at + s + m < n) continue;                                 \
                for (int k = 0; k < 2 * t; k++) {                                                     \
                    double wide[CHUNK];                                                               \
                    EACH(CHUNK) wide[i] = (double)lanes[k][i];                                        \
                    sums[k * blocks + (at + s) / block] = halved(wide);                               \
                    memset(lanes[k], 0, sizeof lanes[k]);                                             \
                }                                                                                     \
            }                                                                                         \
        }                                                                                             \
        return bad == 0;                                                                              \
    }

NORMS(float, fabsf) NORMS(double, fabs)
