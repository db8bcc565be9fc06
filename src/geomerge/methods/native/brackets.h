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
    float size[4];     /* numbers whose products (with one of some elements) are `low`, `high` and `common`: see `scale_bounds` */
    int32_t expert;
};

/* The least float whose product with `scale` is at least x, and the largest whose product is at most x: of sizes that float32 holds no
 * more and no less are in bounds than of their products in double. */
static inline float least_of(double x, double scale) {
    if (!(x > 0)) return 0;
    float size = (float)(x / scale);
    while (size * scale < x) size = nextafterf(size, INFINITY);
    for (float less; size > 0 && (less = nextafterf(size, 0)) * scale >= x;) size = less;
    return size;
}

static inline float most_of(double x, double scale) {
    if (!(x >= 0)) return -1;
    float size = (float)(x / scale);
    while (size > 0 && size * scale > x) size = nextafterf(size, 0);
    for (float more; size < INFINITY && (more = nextafterf(size, INFINITY)) * scale <= x;) size = more;
    return size;
}

static inline float just(double x, double scale) {
    float size = least_of(x, scale);
    return size * scale == x ? size : NAN;
}

#define SCALES 1e-200 /* the products of different floats and a number that is not less differ */

static inline void scale_bounds(struct bracket *b, int brackets, double scale) {
    for (int j = 0; j < brackets; j++) {
        b[j].size[0] = least_of(b[j].low, scale), b[j].size[1] = most_of(b[j].high, scale);
        b[j].size[2] = just(b[j].common[0], scale), b[j].size[3] = just(b[j].common[1], scale);
    }
}

/* `bracket_doubles` does as `bracket_double`, and `bracket_bf16` as `bracket_float` of |x - base|, for a whole number of registers;
 * `found` has room for one more. `two`: both of `common` are numbers. `bracket_scaled` does as `bracket_double` of the products of
 * |x - base|, which float32 holds (`exact`), and a number that is at least SCALES; `size` is for that. `rare`: mostly none of a register
 * is collected. */
#ifdef __AVX512BW__
#define BOUNDS_float(b) {b->size[0], b->size[1], b->size[2], b->size[3]}
#define BOUNDS_double(b) {b->low, b->high, b->common[0], b->common[1]}
#define QUICK_BRACKET(name, T, Found, end, lanes, magnitudes, first, when, stored, ...)                    \
    FUSED name(const int two, struct bracket *b, int64_t m, __VA_ARGS__) {                                 \
        const T bounds[4] = BOUNDS_##T(b);                                                                 \
        const lanes low = _mm512_set1_##end(bounds[0]), high = _mm512_set1_##end(bounds[1]);               \
        const lanes common = _mm512_set1_##end(bounds[2]), other = _mm512_set1_##end(bounds[3]);           \
        int64_t over = 0, same = 0, alike = 0;                                                             \
        first;                                                                                             \
        Found *found = begin;                                                                              \
        for (int64_t i = 0; i < m; i += LANES(T)) {                                                        \
            lanes y = magnitudes;                                                                          \
            unsigned above = _mm512_cmp_##end##_mask(y, high, _CMP_NLE_UQ);                                \
            unsigned equal = _mm512_cmp_##end##_mask(y, common, _CMP_EQ_OQ);                               \
            unsigned second = two ? _mm512_cmp_##end##_mask(y, other, _CMP_EQ_OQ) : 0;                     \
            unsigned inside = _mm512_cmp_##end##_mask(y, low, _CMP_GE_OQ) & ~(above | equal | second);     \
            over += __builtin_popcount(above);                                                             \
            same += __builtin_popcount(equal), alike += __builtin_popcount(second);                        \
            if (when) _mm512_storeu_##end(found, _mm512_maskz_compress_##end(inside, y));                  \
            found += __builtin_popcount(inside);                                                           \
        }                                                                                                  \
        b->above += over, b->equal[0] += same, b->equal[1] += alike;                                       \
        stored;                                                                                            \
        b->collected += found - begin;                                                                     \
    }

/* The products of a few floats. */
static inline void products(const float *x, int64_t n, double scale, double *to) { EACH(n) to[i] = x[i] * scale; }

#define DIFFERENCE _mm512_sub_ps((__m512)widened_float(x + i), _mm512_loadu_ps(base + i))
#define IN_PLACE(Found) Found *begin = (Found *)b->found + b->collected
QUICK_BRACKET(bracket_doubles, double, double, pd, __m512d, _mm512_loadu_pd(x + i), IN_PLACE(double), 1, (void)0, const double *restrict x)
QUICK_BRACKET(bracket_bf16, float, float, ps, __m512, _mm512_abs_ps(DIFFERENCE), IN_PLACE(float), 1, (void)0, const uint16_t *restrict x,
              const float *restrict base)
QUICK_BRACKET(bracket_scaled, float, float, ps, __m512, _mm512_abs_ps(DIFFERENCE), float begin[CHUNK + LANES(float)],
              !rare || inside, products(begin, found - begin, scale, (double *)b->found + b->collected), const uint16_t *restrict x,
              const float *restrict base, double scale, const int rare)

#define QUICK 1
#define SCALED 1 /* there is `bracket_scaled` */
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

FUSED bracket_doubles(const int two, struct bracket *b, int64_t m, const double *restrict x) {
    const __m256d low = _mm256_set1_pd(b->low), high = _mm256_set1_pd(b->high);
    const __m256d common = _mm256_set1_pd(b->common[0]), other = _mm256_set1_pd(b->common[1]);
    __m256i over = _mm256_setzero_si256(), same = over, alike = over;
    double *found = (double *)b->found + b->collected;
    for (int64_t i = 0; i < m; i += 4) {
        __m256d y = _mm256_loadu_pd(x + i);
        __m256d above = _mm256_cmp_pd(y, high, _CMP_NLE_UQ), equal = _mm256_cmp_pd(y, common, _CMP_EQ_OQ);
        same = _mm256_sub_epi64(same, _mm256_castpd_si256(equal));
        if (two) {
            __m256d second = _mm256_cmp_pd(y, other, _CMP_EQ_OQ);
            alike = _mm256_sub_epi64(alike, _mm256_castpd_si256(second));
            equal = _mm256_or_pd(equal, second);
        }
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

FUSED bracket_bf16(const int two, struct bracket *b, int64_t m, const uint16_t *restrict x, const float *restrict base) {
    const __m256 low = _mm256_set1_ps(b->size[0]), high = _mm256_set1_ps(b->size[1]), sign = _mm256_set1_ps(-0.0f);
    const __m256 common = _mm256_set1_ps(b->size[2]), other = _mm256_set1_ps(b->size[3]);
    __m256i over = _mm256_setzero_si256(), same = over, alike = over;
    float *found = (float *)b->found + b->collected;
    for (int64_t i = 0; i < m; i += 8) {
        __m256 y = _mm256_andnot_ps(sign, _mm256_sub_ps((__m256)widened_float(x + i), _mm256_loadu_ps(base + i)));
        __m256 above = _mm256_cmp_ps(y, high, _CMP_NLE_UQ), equal = _mm256_cmp_ps(y, common, _CMP_EQ_OQ);
        same = _mm256_sub_epi32(same, _mm256_castps_si256(equal));
        if (two) {
            __m256 second = _mm256_cmp_ps(y, other, _CMP_EQ_OQ);
            alike = _mm256_sub_epi32(alike, _mm256_castps_si256(second));
            equal = _mm256_or_ps(equal, second);
        }
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
#define SCALED 0
#define bracket_scaled(two, b, m, x, base, scale, rare) (void)0
#else
#define QUICK 0
#define SCALED 0
#define bracket_scaled(two, b, m, x, base, scale, rare) (void)0
#define bracket_bf16(two, b, m, x, base) (void)0
#define bracket_doubles(two, b, m, x) (void)0
#endif

/* Whether float32 is sure to hold the differences of bfloat16 numbers, which are of 8 bits: one is 0, or the exponents are no more than 15
 * apart; and neither is so large that the difference overflows. */
static int exact(int64_t m, const uint16_t *x, const uint16_t *base) {
    const int16_t most = 15 << 7, huge = 254 << 7;
    int16_t far = 0, largest = 0;
    EACH(m) {
        int16_t first = x[i] & 0x7F80, second = base[i] & 0x7F80, apart = (int16_t)(first - second);
        far |= ((apart > most) | (apart < -most)) & ((x[i] & 0x7FFF) != 0) & ((base[i] & 0x7FFF) != 0);
        first = first > second ? first : second;
        largest = largest > first ? largest : first;
    }
    return !far && largest < huge;
}

#define BRACKET(T)                                                                                    \
    static void bracket_##T(struct bracket *b, const T *restrict y, int64_t m) {                      \
        if (QUICK && sizeof(T) == 8 && m % LANES(T) == 0) {                                           \
            if (b->common[1] == b->common[1]) bracket_doubles(1, b, m, (const double *)y);            \
            else bracket_doubles(0, b, m, (const double *)y);                                         \
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

/* Takes in |theta_k - theta_0| at n elements from each of `starts` on; the brackets are in the order of their experts k. Inputs:
 * the base and the experts. Returns whether all are finite (looked at only if `check`). */
#define SURVEY(T, abs)                                                                                \
    int geomerge_survey_##T(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, int brackets, \
                            struct bracket *b, int check) {                                           \
        T base[CHUNK], d[CHUNK], bad = 0;                                                             \
        float single[CHUNK];                                                                          \
        const void *raw[MOST];                                                                        \
        const struct place *in = work->inputs;                                                        \
        scale_bounds(b, brackets, 1);                                                                 \
        for (int64_t p = 0; p < pieces; p++)                                                          \
            for (int64_t at = 0; at < n; at += WINDOW) {                                              \
                int64_t size = least(WINDOW, n - at);                                                 \
                if (!fetch(work, starts[p] + at, size, raw)) return -1;                               \
                for (int64_t s = 0; s < size; s += CHUNK) {                                           \
                    int64_t m = least(CHUNK, size - s);                                               \
                    load_##T(raw[0], in[0].dtype, s, m, base);                                        \
                    if (check) bad += odd_##T(raw[0], in[0].dtype, s, m, base);                       \
                    const int narrow = SCALED && sizeof(T) == 8 && in[0].dtype == BF16 && m % LANES(float) == 0; \
                    if (narrow) load_float(raw[0], BF16, s, m, single);                               \
                    int j = 0;                                                                        \
                    for (int k = 0; k + 1 < work->count; k++) {                                       \
                        if (QUICK && sizeof(T) == 4 && in[k + 1].dtype == BF16 && m % LANES(T) == 0) { \
                            if (check) bad += odd_##T(raw[k + 1], BF16, s, m, 0);                     \
                            const uint16_t *x = (const uint16_t *)raw[k + 1] + s;                     \
                            for (; j < brackets && b[j].expert == k; j++)                             \
                                if (b[j].common[1] == b[j].common[1])                                 \
                                    bracket_bf16(1, b + j, m, x, (const float *)base);                \
                                else bracket_bf16(0, b + j, m, x, (const float *)base);               \
                            continue;                                                                 \
                        }                                                                             \
                        if (QUICK && sizeof(T) == 8 && narrow && in[k + 1].dtype == BF16 &&           \
                            exact(m, (const uint16_t *)raw[k + 1] + s, (const uint16_t *)raw[0] + s)) {                     \
                            if (check) bad += odd_##T(raw[k + 1], BF16, s, m, 0);                     \
                            const uint16_t *x = (const uint16_t *)raw[k + 1] + s;                     \
                            for (; j < brackets && b[j].expert == k; j++)                             \
                                if (b[j].common[1] == b[j].common[1]) bracket_scaled(1, b + j, m, x, single, 1, 1); \
                                else bracket_scaled(0, b + j, m, x, single, 1, 1);                       \
                            continue;                                                                 \
                        }                                                                             \
                        load_##T(raw[k + 1], in[k + 1].dtype, s, m, d);                               \
                        if (check) bad += odd_##T(raw[k + 1], in[k + 1].dtype, s, m, d);              \
                        EACH(m) d[i] = abs(d[i] - base[i]);                                           \
                        for (; j < brackets && b[j].expert == k; j++) bracket_##T(b + j, d, m);       \
                    }                                                                                 \
                }                                                                                     \
            }                                                                                         \
        return bad == 0;                                                                              \
    }

BRACKET(float) BRACKET(double) SURVEY(float, fabsf) SURVEY(double, fabs)
