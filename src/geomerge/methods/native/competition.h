/* Scores of PCB-Merging and what comes of them, for bfloat16. Most elements count for nothing, which a look in float32 shows; the
 * others' scores are computed with the bits of the recorded arithmetic (methods/elementwise/pcb.py). */

#pragma once

/* One expert. */
struct competitor {
    double low, high, scale;  /* magnitudes are clipped to [low, high]; scale = 1/(high - low) */
    double least, most;       /* scores from which an element counts, and the largest */
    double shrink, share;     /* what is as little above `least` as this is not; 1/(most - least) */
    double weight;            /* the task vector's factor */
    int32_t counts;           /* whether it takes part in the sum */
};

#define COMPETITORS 8
#define BLOCK 1024 /* elements that are looked at together */

struct contest {
    const struct competitor *of;
    int experts;
    uint16_t part[COMPETITORS + 1][BLOCK + PACK]; /* what is chosen of each input */
};

/* What float32 tells of the scores of a block. */
struct look {
    _Alignas(64) float d[COMPETITORS][BLOCK], sum[BLOCK], doubt[BLOCK], least[BLOCK], most[BLOCK];
};

/* Bits of the PACK numbers that are less than a limit. */
static inline uint32_t below(const float *x, float limit) {
#ifdef __AVX512BW__
    const __m512 l = _mm512_set1_ps(limit);
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), l, _CMP_LT_OQ) |
           (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), l, _CMP_LT_OQ) << 16;
#elif defined __AVX2__
    const __m256 l = _mm256_set1_ps(limit);
    uint32_t found = 0;
    for (int i = 0; i < PACK; i += 8)
        found |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), l, _CMP_LT_OQ)) << i;
    return found;
#else
    uint32_t found = 0;
    for (int i = 0; i < PACK; i++) found |= (uint32_t)(x[i] < limit) << i;
    return found;
#endif
}

/* Those of PACK numbers that are chosen, one after the other; beyond them anything. */
static inline void pack(uint32_t chosen, const uint16_t *from, uint16_t *to) {
#ifdef __AVX512VBMI2__
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(chosen, _mm512_loadu_si512(from)));
#else
    for (; chosen; chosen &= chosen - 1) *to++ = from[__builtin_ctz(chosen)];
#endif
}

static inline floats clamped(floats x, floats low, floats high) {
#ifdef __AVX512BW__
    return (floats)_mm512_max_ps(_mm512_min_ps((__m512)x, (__m512)high), (__m512)low);
#elif defined __AVX2__
    return (floats)_mm256_max_ps(_mm256_min_ps((__m256)x, (__m256)high), (__m256)low);
#else
    for (int i = 0; i < LANES(float); i++) x[i] = x[i] < low[i] ? low[i] : x[i] > high[i] ? high[i] : x[i];
    return x;
#endif
}

#define DOUBT 0x1p-7f

/* The task vectors of a block, roughly, their sum, and by how much that may be wrong beside DOUBT of it: the sum of their sizes over
 * 2^20. Whether all scores can be told from these: products p are so small that tanh(p) is p within 2^-11. */
static int differences(const struct contest *c, struct look *look, const uint16_t *const *x) {
    floats large = {0};
    for (int i = 0; i < BLOCK; i += LANES(float)) {
        floats base = widened_float(x[0] + i), sum = {0}, size = {0};
        for (int k = 0; k < c->experts; k++) {
            floats d = widened_float(x[k + 1] + i) - base;
            memcpy(look->d[k] + i, &d, sizeof d);
            sum += d, size += size_of(d);
        }
        large = where(large > size, large) + where(~(large > size), size);
        size = plus_product_float(size * all(0x1p-20f), size_of(sum), all(DOUBT));
        memcpy(look->sum + i, &sum, sizeof sum);
        memcpy(look->doubt + i, &size, sizeof size);
    }
    int none = 1;
    for (int i = 0; i < LANES(float); i++) none &= large[i] * large[i] < 0x1p-5f;
    return none;
}

/* Between what numbers an expert's scores lie. Eight powers of e in turn, each within 2^-11 (four terms of the series from -1/2 to 1/2),
 * and a share of the range within 2^-17 (see `geomerge.methods.elementwise.pcb`) are within DOUBT together with the above. */
static void limits(const struct contest *c, struct look *look, int k) {
    const struct competitor *own = c->of + k;
    const float root = 1.6487213f;
    const floats low = all((float)own->low), high = all((float)own->high), half = all(-0.5f), terms[5] = {
        all(root / 24), all(root / 6), all(root / 2), all(root), all(root)};
    const floats scale = all((float)(own->scale * sqrt(c->experts / 8.)));
    for (int i = 0; i < BLOCK; i += LANES(float)) {
        floats d = *(const floats *)(look->d[k] + i), size = size_of(d);
        floats u = (clamped(size, low, high) - low) * scale, x = plus_product_float(half, u, u), p = terms[0];
        for (int j = 1; j < 5; j++) p = plus_product_float(terms[j], p, x);
        p *= p, p *= p, p *= p;
        floats score = d * p * *(const floats *)(look->sum + i);
        floats error = plus_product_float(all(0x1p-120f), size * p, *(const floats *)(look->doubt + i));
        floats least = score - error, most = score + error;
        memcpy(look->least + i, &least, sizeof least);
        memcpy(look->most + i, &most, sizeof most);
    }
}

/* The scores of m <= CHUNK chosen elements from `at` on. */
static void scored(const struct contest *c, int k, int64_t at, int64_t m, double *restrict d, double *restrict score) {
    const struct competitor *own = c->of + k;
    double base[CHUNK], sum[CHUNK], one[CHUNK];
    const double experts = c->experts;
    m = (m + 7) / 8 * 8;
    EACH(m) base[i] = from_bf16(c->part[0][at + i]);
    for (int j = 0; j < c->experts; j++) {
        const uint16_t *x = c->part[j + 1] + at;
        double *restrict to = j == k ? d : one;
        EACH(m) to[i] = from_bf16(x[i]) - base[i];
        if (j) EACH(m) sum[i] += to[i];
        else EACH(m) sum[i] = to[i];
    }
    EACH(m) sum[i] *= d[i];
    tanh_of(sum, m, one);
    EACH(m) {
        double u = (CLAMP_OF(SIZE_OF(d[i], 0, 0, 0, 0), 0, 0, own->low, own->high) + -own->low) * own->scale;
        score[i] = one[i] * exp_of(u * u * experts);
    }
}

/* Puts some of PACK elements from s on behind the `chosen` ones; how many. */
static inline int64_t take(struct contest *c, const uint16_t *const *x, int s, uint32_t some, int64_t chosen) {
    for (int k = 0; k <= c->experts; k++) pack(some, x[k] + s, c->part[k] + chosen);
    return __builtin_popcount(some);
}

/* Chooses elements of a block of which it is not sure that their score lies below `low` or above `high`; how many. Those above are
 * counted. */
static int64_t choose(struct contest *c, const struct look *look, const uint16_t *const *x, float low, float high, int64_t *above) {
    int64_t chosen = 0;
    for (int s = 0; s < BLOCK; s += PACK) {
        uint32_t some = ~below(look->most + s, low);
        const uint32_t over = ~below(look->least + s, high);
        *above += __builtin_popcount(over);
        some &= ~over;
        if (some) chosen += take(c, x, s, some, chosen);
    }
    return chosen;
}

/* The same for m elements of which nothing is known. */
static int64_t choose_all(struct contest *c, const uint16_t *const *x, int64_t m) {
    for (int k = 0; k <= c->experts; k++) memcpy(c->part[k], x[k], (size_t)m * 2);
    return m;
}

/* Takes in the scores of n elements from each of `starts` on; the brackets are in the order of their experts. Inputs: the base and the
 * experts, all bfloat16. Returns whether all are finite (looked at only if `check`). */
int geomerge_competition_survey(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, const struct competitor *of,
                                int brackets, struct bracket *b, int check) {
    struct contest c = {.of = of, .experts = work->count - 1};
    struct look look;
    double bad = 0, d[CHUNK], score[CHUNK];
    const void *raw[MOST];
    const uint16_t *x[COMPETITORS + 1];
    for (int64_t p = 0; p < pieces; p++)
        for (int64_t at = 0; at < n; at += WINDOW) {
            int64_t size = least(WINDOW, n - at);
            if (!fetch(work, starts[p] + at, size, raw)) return -1;
            for (int k = 0; check && k <= c.experts; k++) bad += odd_bits(raw[k], size);
            for (int64_t s = 0; s < size; s += BLOCK) {
                const int64_t all_of = least(BLOCK, size - s);
                for (int k = 0; k <= c.experts; k++) x[k] = (const uint16_t *)raw[k] + s;
                const int told = all_of == BLOCK && differences(&c, &look, x);
                for (int j = 0; j < brackets; j++) {
                    const int k = b[j].expert;
                    if (told && (!j || b[j - 1].expert != k)) limits(&c, &look, k);
                    int64_t chosen = told ? choose(&c, &look, x, (float)b[j].low, (float)b[j].high, &b[j].above)
                                          : choose_all(&c, x, all_of);
                    for (int64_t i = 0; i < chosen; i += CHUNK) {
                        int64_t m = least(CHUNK, chosen - i);
                        scored(&c, k, i, m, d, score);
                        bracket_double(b + j, score, m);
                    }
                }
            }
        }
    return bad == 0;
}

/* theta_0 + factor * sum of w tau / sum of w of m <= CHUNK chosen elements from `at` on. */
static void exactly(const struct contest *c, int64_t at, int64_t m, double factor, double *restrict result) {
    double d[CHUNK], score[CHUNK], total[CHUNK], divisor[CHUNK];
    m = (m + 7) / 8 * 8;
    EACH(m) total[i] = divisor[i] = -0.0; /* what is added to these stays as it is */
    for (int k = 0; k < c->experts; k++) {
        const struct competitor *own = c->of + k;
        if (!own->counts) continue;
        scored(c, k, at, m, d, score);
        EACH(m) {
            double w = CLAMP_OF(score[i], 0, 0, own->least, own->most) + -own->least;
            w = SHRINK_OF(w, 0, 0, own->shrink, 0) * own->share;
            double clipped = CLAMP_OF(SIZE_OF(d[i], 0, 0, 0, 0), 0, 0, own->low, own->high);
            total[i] += clipped * SIGN_OF(d[i], 0, 0, 0, 0) * w * own->weight;
            divisor[i] += w;
        }
    }
    EACH(m) result[i] = fma(total[i] / FLOOR_OF(divisor[i], 0, 0, 1e-12, 0), factor, (double)from_bf16(c->part[0][at + i]));
}

/* e^x for 0 <= x <= COMPETITORS, within 2^-18 of it. */
static inline floats quick_exp(floats x) {
    const float terms[5] = {1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1};
    const floats shifted = plus_product_float(all(0x1.8p23f), x, all(1.44269504f)), k = shifted - all(0x1.8p23f);
    const floats r = plus_product_float(x, k, all(-0.693147181f));
    floats p = all(terms[0]);
    for (int i = 1; i < 5; i++) p = plus_product_float(all(terms[i]), p, r);
    p = plus_product_float(all(1), p, r);
    return (floats)((ints)p + ((ints)shifted << 23)); /* whose last bits hold k */
}

#define PART (CHUNK / LANES(float))

/* What float32 knows of an expert. */
struct contender {
    float low, high, scale, least, range, share, weight;
    float margin; /* by how much a score less `least` is wrong beside what the score is */
    int expert;
};

/* The result of a block in float32 together with how far it may be wrong, rounded where that leaves no choice; how many others there
 * are, which are chosen. A score may be wrong by `error` of it (a power of e whose exponent is n u^2: by twice n times what u is wrong
 * by, and by 2^-16 for all else: the power and the exponent's rounding 2^-18 each, tanh(z) - z 2^-19), and by what the sum of the task
 * vectors is, 2^-20 of the sum of their sizes; w = (score - least) * share by as much and by the bounds' own rounding. With E for
 * these of all experts together and H for the largest of the vectors the weighted mean T/D is wrong by 2 H (E/D + 2^-20) at most, since
 * |T/D| <= H; a little more for E <= D/16, of which nothing else is told, and 2^-22 of base and result for the last roundings. `place`
 * gets where in the block the chosen ones lie. */
static int64_t quickly(struct contest *c, const uint16_t *const *x, float factor, uint16_t *out, uint16_t *place) {
    struct contender of[COMPETITORS];
    int count = 0;
    float largest = 0, error = 0;
    for (int k = 0; k < c->experts; k++) {
        const struct competitor *own = c->of + k;
        if (!own->counts) continue;
        error = fmaxf(error, (float)(0x1p-16 + 2 * c->experts * own->high * own->scale * 0x1p-22));
        largest = fmaxf(largest, (float)(own->high * fabs(own->weight)));
        of[count++] = (struct contender){
            .low = (float)own->low, .high = (float)own->high, .scale = (float)(own->scale * sqrt(c->experts)),
            .least = (float)own->least, .range = (float)(own->most - own->least), .share = (float)own->share,
            .weight = (float)own->weight, .margin = (float)((fabs(own->least) + fabs(own->most)) * 0x1p-22), .expert = k};
    }
    const floats one = all(1), zero = {0};
    const ints sign = (ints)all(-0.0f);
    /* In short loops, of which the processor has several elements under way. */
    floats d[COMPETITORS][PART], sum[PART], size[PART], wrong_sum[PART], total[PART], divisor[PART], doubt[PART];
    _Alignas(64) float open[PART * LANES(float)];
    int64_t chosen = 0;
    for (int s = 0; s < BLOCK; s += PART * LANES(float)) {
        for (int i = 0; i < PART; i++) {
            const int at = s + i * LANES(float);
            const floats base = widened_float(x[0] + at);
            floats all_of = zero, sizes_of = zero;
            for (int k = 0; k < c->experts; k++) {
                d[k][i] = widened_float(x[k + 1] + at) - base;
                all_of += d[k][i], sizes_of += size_of(d[k][i]);
            }
            sum[i] = all_of, size[i] = sizes_of;
            wrong_sum[i] = plus_product_float(sizes_of * all(0x1p-20f), size_of(all_of), all(error));
            total[i] = divisor[i] = doubt[i] = zero;
        }
        for (int j = 0; j < count; j++) {
            const struct contender *own = of + j;
            const floats least = all(own->least), share = all(own->share);
            for (int i = 0; i < PART; i++) {
                const floats mine = d[own->expert][i], clipped = clamped(size_of(mine), all(own->low), all(own->high));
                const floats u = (clipped - all(own->low)) * all(own->scale), grown = mine * quick_exp(u * u);
                const floats above = grown * sum[i] - least;
                const floats wrong = plus_product_float(all(own->margin), size_of(grown), wrong_sum[i]);
                const floats w = clamped(above, zero, all(own->range)) * share;
                const floats vector = where(~(mine == zero), (floats)((ints)clipped | ((ints)mine & sign)));
                total[i] = plus_product_float(total[i], vector * all(own->weight), w);
                divisor[i] += w;
                doubt[i] = plus_product_float(doubt[i], where(above + wrong >= zero, wrong), share);
            }
        }
        for (int i = 0; i < PART; i++) {
            const int at = s + i * LANES(float);
            const floats base = widened_float(x[0] + at);
            const ints none = divisor[i] == zero;
            const floats inverse = one / (divisor[i] + where(none, one));
            const floats merged = plus_product_float(base, total[i] * inverse, all(factor));
            floats wrong = plus_product_float((size_of(merged) + size_of(base)) * all(0x1p-22f),
                                              plus_product_float(all(0x1p-20f), doubt[i], inverse), all(2.25f * largest * fabsf(factor)));
            wrong = where(~(none & (doubt[i] == zero)), wrong);
            const ints low = rounded_bf16(merged - wrong), high = rounded_bf16(merged + wrong);
            const ints unsure = (low != high) | ~(wrong < all(INFINITY)) | ~(size[i] * size[i] < all(0x1p-9f)) |
                                ~(doubt[i] <= divisor[i] * all(0x1p-4f)) | (~none & (divisor[i] < all(1e-9f))) | ((ints)base == sign);
            const floats told = where(unsure, one);
            memcpy(open + i * LANES(float), &told, sizeof told);
            halves(low, out + at);
        }
        for (int i = 0; i < PART * LANES(float); i += PACK) {
            const uint32_t some = ~below(open + i, 0.5f);
            for (uint32_t left = some, at = (uint32_t)chosen; left; left &= left - 1) place[at++] = (uint16_t)(s + i + __builtin_ctz(left));
            if (some) chosen += take(c, x, s + i, some, chosen);
        }
    }
    return chosen;
}

/* Whether float32 can hold what `quickly` computes: no quotient overflows, no score that counts is lost below. */
static int in_range(const struct contest *c, double factor) {
    int fine = fabs(factor) < 1e30;
    for (int k = 0; k < c->experts; k++) fine &= !c->of[k].counts || c->of[k].most - c->of[k].least >= 1e-30;
    return fine;
}

/* theta_0 + factor * sum of w tau / sum of w, rounded. Inputs and value as above. */
int geomerge_competition(struct work *work, int64_t n, const struct competitor *of, double factor, int check, const struct place *out) {
    struct contest c = {.of = of, .experts = work->count - 1};
    const int fine = in_range(&c, factor);
    double bad = 0, result[CHUNK];
    uint16_t place[BLOCK];
    const void *raw[MOST];
    const uint16_t *x[COMPETITORS + 1];
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        for (int k = 0; check && k <= c.experts; k++) bad += odd_bits(raw[k], size);
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += BLOCK) {
            const int64_t all_of = least(BLOCK, size - s);
            for (int k = 0; k <= c.experts; k++) x[k] = (const uint16_t *)raw[k] + s;
            const int quick = fine && all_of == BLOCK && out->dtype == BF16 && work->first <= at + s;
            uint16_t *rounded = (uint16_t *)to + s;
            const int64_t chosen = quick ? quickly(&c, x, (float)factor, rounded, place) : choose_all(&c, x, all_of);
            if (quick) work->redone += chosen;
            for (int64_t i = 0; i < chosen; i += CHUNK) {
                const int64_t m = least(CHUNK, chosen - i);
                exactly(&c, i, m, factor, result);
                if (quick) {
                    for (int64_t j = 0; j < m; j++) rounded[place[i + j]] = to_bf16((float)result[j]);
                    continue;
                }
                if (work->first > at + s + i) tell_double(work, at + s + i, m, result);
                store_double(result, out->dtype, s + i, m, to);
            }
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0;
}
