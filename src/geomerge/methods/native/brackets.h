/* Magnitudes around a threshold, counted and collected (methods/order.py). */

#pragma once

/* What is asked of one expert's magnitudes, or of magnitudes that are given, and what was found so far. */
struct bracket {
    double low, high;  /* those in [low, high] are collected ... */
    double common[2];  /* ... but for those that equal one of these (NaN: none), which are counted */
    int64_t above;     /* how many lie above `high` */
    int64_t equal[2];  /* how many equal each of `common` */
    int64_t collected;
    void *found;       /* T, with room for all */
    int32_t expert;
};

/* The least float whose product with `scale` >= 0 is at least x, and the largest whose product is at most x: of sizes that float32 holds
 * no more and no less are in bounds than of their products in double. */
static inline float least_of(double x, double scale) {
    if (!(x > 0)) return 0;
    if (!(scale > 0)) return INFINITY;
    float size = (float)(x / scale);
    while (size * scale < x) size = nextafterf(size, INFINITY);
    for (float less; size > 0 && (less = nextafterf(size, 0)) * scale >= x;) size = less;
    return size;
}

static inline float most_of(double x, double scale) {
    if (!(x >= 0)) return -1;
    if (!(scale > 0)) return INFINITY;
    float size = (float)(x / scale);
    while (size > 0 && size * scale > x) size = nextafterf(size, 0);
    for (float more; size < INFINITY && (more = nextafterf(size, INFINITY)) * scale <= x;) size = more;
    return size;
}

/* `bracket_floats` and `bracket_doubles` do as `bracket_float` and `bracket_double` for a whole number of registers, for one more of which
 * `found` has room; `bracket_scaled` does as `bracket_double` with the products of some sizes and a number, neither negative. */
#ifdef __AVX512BW__

/* What is inside is set aside first, and the common ones are taken out of that: the comparisons and stores of all are most of the work. */
#define QUICK_BRACKET(T, end, lanes)                                                                       \
    static int64_t inside_##T(const T *restrict y, int64_t m, T least_one, T most, T *restrict aside, int64_t *above) { \
        const lanes low = _mm512_set1_##end(least_one), high = _mm512_set1_##end(most);                    \
        T *last = aside;                                                                                   \
        int64_t over = 0;                                                                                  \
        for (int64_t i = 0; i < m; i += LANES(T)) {                                                        \
            const lanes x = _mm512_loadu_##end(y + i);                                                     \
            unsigned more = _mm512_cmp_##end##_mask(x, high, _CMP_NLE_UQ);                                 \
            unsigned inside = _mm512_cmp_##end##_mask(x, low, _CMP_GE_OQ) & ~more;                         \
            over += __builtin_popcount(more);                                                              \
            _mm512_storeu_##end(last, _mm512_maskz_compress_##end(inside, x));                             \
            last += __builtin_popcount(inside);                                                            \
        }                                                                                                  \
        *above += over;                                                                                    \
        return last - aside;                                                                               \
    }                                                                                                      \
                                                                                                           \
    static void sift_##T(struct bracket *b, const T *restrict aside, int64_t n) {                          \
        const lanes common = _mm512_set1_##end((T)b->common[0]), other = _mm512_set1_##end((T)b->common[1]); \
        T *found = (T *)b->found + b->collected;                                                           \
        int64_t same = 0, alike = 0;                                                                       \
        for (int64_t i = 0; i < n; i += LANES(T)) {                                                        \
            const lanes x = _mm512_loadu_##end(aside + i);                                                 \
            const unsigned there = (1u << least(LANES(T), n - i)) - 1;                                     \
            unsigned equal = _mm512_mask_cmp_##end##_mask(there, x, common, _CMP_EQ_OQ);                   \
            unsigned second = _mm512_mask_cmp_##end##_mask(there, x, other, _CMP_EQ_OQ);                   \
            unsigned rest = there & ~(equal | second);                                                     \
            same += __builtin_popcount(equal), alike += __builtin_popcount(second);                        \
            _mm512_storeu_##end(found, _mm512_maskz_compress_##end(rest, x));                              \
            found += __builtin_popcount(rest);                                                             \
        }                                                                                                  \
        b->equal[0] += same, b->equal[1] += alike;                                                         \
        b->collected = found - (T *)b->found;                                                              \
    }                                                                                                      \
                                                                                                           \
    static void bracket_##T##s(struct bracket *b, const T *restrict y, int64_t m) {                        \
        T aside[CHUNK + LANES(T)];                                                                         \
        sift_##T(b, aside, inside_##T(y, m, (T)b->low, (T)b->high, aside, &b->above));                     \
    }

QUICK_BRACKET(float, ps, __m512) QUICK_BRACKET(double, pd, __m512d)

static void bracket_scaled(struct bracket *b, const float *restrict sizes, int64_t m, double scale) {
    float aside[CHUNK + LANES(float)];
    double products[CHUNK + LANES(float)];
    int64_t n = inside_float(sizes, m, least_of(b->low, scale), most_of(b->high, scale), aside, &b->above);
    for (int64_t i = 0; i < n; i += LANES(float))
        for (int64_t j = i; j < i + LANES(float); j++) products[j] = aside[j] * scale;
    sift_double(b, products, n);
}

/* Whether float32 holds the differences of bfloat16 numbers, whose sizes these are if it does: what is rounded off is more than half the
 * last place of one of the two. */
static int exact(int64_t m, const uint16_t *x, const float *base, float *restrict sizes) {
    int32_t lost = 0;
    for (int64_t i = 0; i < m; i += LANES(float)) {
        __m512 wide = (__m512)widened_float(x + i), from = _mm512_loadu_ps(base + i), d = _mm512_sub_ps(wide, from);
        lost |= _mm512_cmp_ps_mask(_mm512_add_ps(d, from), wide, _CMP_NEQ_UQ) | _mm512_cmp_ps_mask(_mm512_sub_ps(wide, d), from, _CMP_NEQ_UQ);
        _mm512_storeu_ps(sizes + i, _mm512_abs_ps(d));
    }
    return !lost;
}
#define QUICK 1
#elif defined __AVX2__

/* For each mask of eight lanes the lanes that are set, first ones first. */
static int32_t lanes_of[256][8] __attribute__((aligned(32)));

/* The same of four lanes, each of two words. */
static int32_t pairs_of[16][8] __attribute__((aligned(32)));

__attribute__((constructor)) static void fill_lanes(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, at = 0; lane < 8; lane++)
            if (mask >> lane & 1) lanes_of[mask][at++] = lane;
    for (int mask = 0; mask < 16; mask++)
        for (int lane = 0, at = 0; lane < 4; lane++)
            if (mask >> lane & 1) pairs_of[mask][at++] = 2 * lane, pairs_of[mask][at++] = 2 * lane + 1;
}

static void bracket_doubles(struct bracket *b, const double *restrict x, int64_t m) {
    const __m256d low = _mm256_set1_pd(b->low), high = _mm256_set1_pd(b->high);
    const __m256d common = _mm256_set1_pd(b->common[0]), other = _mm256_set1_pd(b->common[1]);
    __m256i over = _mm256_setzero_si256(), same = over, alike = over;
    double *found = (double *)b->found + b->collected;
    for (int64_t i = 0; i < m; i += 4) {
        __m256d y = _mm256_loadu_pd(x + i);
        __m256d above = _mm256_cmp_pd(y, high, _CMP_NLE_UQ);
        __m256d equal = _mm256_cmp_pd(y, common, _CMP_EQ_OQ), second = _mm256_cmp_pd(y, other, _CMP_EQ_OQ);
        same = _mm256_sub_epi64(same, _mm256_castpd_si256(equal));
        alike = _mm256_sub_epi64(alike, _mm256_castpd_si256(second));
        equal = _mm256_or_pd(equal, second);
        __m256d inside = _mm256_andnot_pd(_mm256_or_pd(above, equal), _mm256_cmp_pd(y, low, _CMP_GE_OQ));
        over = _mm256_sub_epi64(over, _mm256_castpd_si256(above));
        int mask = _mm256_movemask_pd(inside);
        __m256i lanes = _mm256_load_si256((const __m256i *)pairs_of[mask]);
        _mm256_storeu_ps((float *)found, _mm256_permutevar8x32_ps(_mm256_castpd_ps(y), lanes));
        found += __builtin_popcount((unsigned)mask);
    }
    int64_t counts[12];
    _mm256_storeu_si256((__m256i *)counts, over);
    _mm256_storeu_si256((__m256i *)(counts + 4), same);
    _mm256_storeu_si256((__m256i *)(counts + 8), alike);
    for (int i = 0; i < 4; i++) b->above += counts[i], b->equal[0] += counts[4 + i], b->equal[1] += counts[8 + i];
    b->collected = found - (double *)b->found;
}

static void bracket_floats(struct bracket *b, const float *restrict x, int64_t m) {
    const __m256 low = _mm256_set1_ps((float)b->low), high = _mm256_set1_ps((float)b->high);
    const __m256 common = _mm256_set1_ps((float)b->common[0]), other = _mm256_set1_ps((float)b->common[1]);
    __m256i over = _mm256_setzero_si256(), same = over, alike = over;
    float *found = (float *)b->found + b->collected;
    for (int64_t i = 0; i < m; i += 8) {
        __m256 y = _mm256_loadu_ps(x + i);
        __m256 above = _mm256_cmp_ps(y, high, _CMP_NLE_UQ);
        __m256 equal = _mm256_cmp_ps(y, common, _CMP_EQ_OQ), second = _mm256_cmp_ps(y, other, _CMP_EQ_OQ);
        same = _mm256_sub_epi32(same, _mm256_castps_si256(equal));
        alike = _mm256_sub_epi32(alike, _mm256_castps_si256(second));
        equal = _mm256_or_ps(equal, second);
        __m256 inside = _mm256_andnot_ps(_mm256_or_ps(above, equal), _mm256_cmp_ps(y, low, _CMP_GE_OQ));
        over = _mm256_sub_epi32(over, _mm256_castps_si256(above));
        int mask = _mm256_movemask_ps(inside);
        __m256i lanes = _mm256_load_si256((const __m256i *)lanes_of[mask]);
        _mm256_storeu_ps(found, _mm256_permutevar8x32_ps(y, lanes));
        found += __builtin_popcount((unsigned)mask);
    }
    int32_t counts[24];
    _mm256_storeu_si256((__m256i *)counts, over);
    _mm256_storeu_si256((__m256i *)(counts + 8), same);
    _mm256_storeu_si256((__m256i *)(counts + 16), alike);
    for (int i = 0; i < 8; i++) b->above += counts[i], b->equal[0] += counts[8 + i], b->equal[1] += counts[16 + i];
    b->collected = found - (float *)b->found;
}
#define QUICK 1
#define exact(m, x, base, sizes) 0
#define bracket_scaled(b, sizes, m, scale) (void)0
#else
#define QUICK 0
#define exact(m, x, base, sizes) 0
#define bracket_scaled(b, sizes, m, scale) (void)0
#define bracket_floats(b, y, m) (void)0
#define bracket_doubles(b, y, m) (void)0
#endif

#define BRACKET(T)                                                                                    \
    static void bracket_##T(struct bracket *b, const T *restrict y, int64_t m) {                      \
        if (QUICK && m % LANES(T) == 0) {                                                             \
            bracket_##T##s(b, y, m);                                                                  \
            return;                                                                                   \
        }                                                                                             \
        const T low = (T)b->low, high = (T)b->high, common = (T)b->common[0], other = (T)b->common[1]; \
        int32_t over = 0, same = 0, alike = 0, number = (int32_t)m;                                   \
        uint8_t inside[CHUNK];                                                                        \
        if (m < CHUNK) memset(inside, 0, CHUNK);                                                      \
        for (int32_t i = 0; i < number; i++) {                                                        \
            over += !(y[i] <= high);                                                                  \
            same += y[i] == common, alike += y[i] == other;                                           \
            inside[i] = (y[i] <= high) & (y[i] >= low) & (y[i] != common) & (y[i] != other);          \
        }                                                                                             \
        b->above += over, b->equal[0] += same, b->equal[1] += alike;                                  \
        T *restrict found = (T *)b->found;                                                            \
        int64_t at = b->collected;                                                                    \
        for (int32_t j = 0; j < number; j += 8) { /* mostly none of eight */                          \
            uint64_t some;                                                                            \
            memcpy(&some, inside + j, 8);                                                             \
            if (some)                                                                                 \
                for (int32_t i = j; i < j + 8; i++)                                                   \
                    if (inside[i]) found[at++] = y[i];                                                \
        }                                                                                             \
        b->collected = at;                                                                            \
    }                                                                                                 \
                                                                                                      \
    /* Takes in n magnitudes. */                                                                      \
    void geomerge_bracket_##T(const T *x, int64_t n, struct bracket *b) {                             \
        for (int64_t s = 0; s < n; s += CHUNK) bracket_##T(b, x + s, least(CHUNK, n - s));            \
    }

/* |x - base| of bfloat16 numbers. */
static inline void sizes_apart(int64_t m, const uint16_t *x, const float *base, float *restrict sizes) {
    int64_t i = 0;
    for (; i + LANES(float) <= m; i += LANES(float)) {
        floats from, apart;
        memcpy(&from, base + i, sizeof from);
        apart = size_of(widened_float(x + i) - from);
        memcpy(sizes + i, &apart, sizeof apart);
    }
    for (; i < m; i++) sizes[i] = fabsf(from_bf16(x[i]) - base[i]);
}

/* Takes in |theta_k - theta_0| at n elements from each of `starts` on; the brackets are in the order of their experts k. Inputs:
 * the base and the experts. Returns whether all are finite (looked at only if `check`). */
#define SURVEY(T, abs)                                                                                \
    int geomerge_survey_##T(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, int brackets, \
                            struct bracket *b, int check) {                                           \
        T base[CHUNK], d[CHUNK], bad = 0;                                                             \
        float single[CHUNK], sizes[CHUNK];                                                            \
        const void *raw[MOST];                                                                        \
        const struct place *in = work->inputs;                                                        \
        for (int64_t p = 0; p < pieces; p++)                                                          \
            for (int64_t at = 0; at < n; at += WINDOW) {                                              \
                int64_t size = least(WINDOW, n - at);                                                 \
                if (!fetch(work, starts[p] + at, size, raw)) return -1;                               \
                for (int k = 0; check && k < work->count; k++)                                        \
                    if (in[k].dtype == BF16) bad += odd_bits(raw[k], size);                           \
                for (int64_t s = 0; s < size; s += CHUNK) {                                           \
                    int64_t m = least(CHUNK, size - s);                                               \
                    load_##T(raw[0], in[0].dtype, s, m, base);                                        \
                    if (check && in[0].dtype != BF16) bad += damage_##T(base, m);                     \
                    const int narrow = sizeof(T) == 8 && in[0].dtype == BF16 && m % LANES(float) == 0; \
                    if (narrow) load_float(raw[0], BF16, s, m, single);                               \
                    int j = 0;                                                                        \
                    for (int k = 0; k + 1 < work->count; k++) {                                       \
                        const uint16_t *x = (const uint16_t *)raw[k + 1] + s;                         \
                        if (narrow && in[k + 1].dtype == BF16 && exact(m, x, single, sizes)) {        \
                            for (; j < brackets && b[j].expert == k; j++) bracket_scaled(b + j, sizes, m, 1); \
                            continue;                                                                 \
                        }                                                                             \
                        if (sizeof(T) == 4 && in[k + 1].dtype == BF16) {                              \
                            sizes_apart(m, x, (const float *)base, (float *)d);                       \
                        } else {                                                                      \
                            load_##T(raw[k + 1], in[k + 1].dtype, s, m, d);                           \
                            if (check && in[k + 1].dtype != BF16) bad += damage_##T(d, m);            \
                            EACH(m) d[i] = abs(d[i] - base[i]);                                       \
                        }                                                                             \
                        for (; j < brackets && b[j].expert == k; j++) bracket_##T(b + j, d, m);       \
                    }                                                                                 \
                }                                                                                     \
            }                                                                                         \
        return bad == 0;                                                                              \
    }

BRACKET(float) BRACKET(double) SURVEY(float, fabsf) SURVEY(double, fabs)
