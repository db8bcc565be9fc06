/* The inner loops of the common merges, fused: from the inputs' raw bytes to the output's in one pass through the caches.
 *
 * Every loop does, element by element, the operations of the torch code that it stands for, in the same order, each rounded as
 * there: the two give the same bits (tests/test_methods_native.py). So compile with -ffp-contract=off; where torch adds
 * with a factor (add_(x, alpha=c)) it uses a fused multiply-add, and so does `fma` here.
 *
 * Work goes in chunks of CHUNK elements, whose float or double scratch stays in the first-level cache.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BF16, F16, F32, F64 };

#ifndef GEOMERGE_SOURCE
#define GEOMERGE_SOURCE ""
#endif
/* The fingerprint of this file (build.py): a library made of another one is not loaded. */
const char geomerge_source[] = GEOMERGE_SOURCE;

#define CHUNK 256
#define MOST 32 /* inputs of one call */

/* -- conversions ------------------------------------------------------------------------------------------------- */

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7FC0 : (uint16_t)rounded;
}

#define EACH(n) for (int64_t i = 0; i < (n); i++)

/* At most CHUNK elements of a raw buffer as T. */
#define LOAD(T)                                                                                     \
    static inline void load_##T(const void *raw, int dtype, int64_t start, int64_t n, T *restrict out) { \
        if (dtype == BF16) {                                                                        \
            const uint16_t *x = (const uint16_t *)raw + start;                                      \
            EACH(n) out[i] = (T)from_bf16(x[i]);                                                    \
        } else if (dtype == F16) {                                                                  \
            const _Float16 *x = (const _Float16 *)raw + start;                                      \
            float wide[CHUNK]; /* compilers do not widen in two steps at once */                    \
            EACH(n) wide[i] = (float)x[i];                                                          \
            EACH(n) out[i] = (T)wide[i];                                                            \
        } else if (dtype == F32) {                                                                  \
            const float *x = (const float *)raw + start;                                            \
            EACH(n) out[i] = (T)x[i];                                                               \
        } else {                                                                                    \
            const double *x = (const double *)raw + start;                                          \
            EACH(n) out[i] = (T)x[i];                                                               \
        }                                                                                           \
    }

/* T rounded into a raw buffer; to 16 bits by way of float32, as torch does. */
#define STORE(T)                                                                                    \
    static inline void store_##T(const T *restrict values, int dtype, int64_t start, int64_t n, void *raw) { \
        if (dtype == BF16) {                                                                        \
            uint16_t *x = (uint16_t *)raw + start;                                                  \
            EACH(n) x[i] = to_bf16((float)values[i]);                                               \
        } else if (dtype == F16) {                                                                  \
            _Float16 *x = (_Float16 *)raw + start;                                                  \
            EACH(n) x[i] = (_Float16)(float)values[i];                                              \
        } else if (dtype == F32) {                                                                  \
            float *x = (float *)raw + start;                                                        \
            EACH(n) x[i] = (float)values[i];                                                        \
        } else {                                                                                    \
            double *x = (double *)raw + start;                                                      \
            EACH(n) x[i] = (double)values[i];                                                       \
        }                                                                                           \
    }

/* 0 when all are finite, else NaN or more. */
#define DAMAGE(T)                                             \
    static inline T damage_##T(const T *restrict x, int64_t n) { \
        T lanes[32] = {0};                                    \
        int64_t i = 0;                                        \
        for (; i + 32 <= n; i += 32)                          \
            for (int j = 0; j < 32; j++) lanes[j] += x[i + j] * (T)0; \
        for (; i < n; i++) lanes[0] += x[i] * (T)0;           \
        T sum = 0;                                            \
        for (int j = 0; j < 32; j++) sum += lanes[j];         \
        return sum;                                           \
    }

LOAD(float) LOAD(double) STORE(float) STORE(double) DAMAGE(float) DAMAGE(double)

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* -- span methods ------------------------------------------------------------------------------------------------ */

/* out = round(sum of c[k] * x[k]), in double. Returns whether all of the sum is finite (in float, where that is on the way). */
int geomerge_span(int k, const void *const *raw, const int *dtypes, const double *c, int64_t n, void *out, int out_dtype) {
    double bad = 0;
    double x[CHUNK], total[CHUNK];
    float narrow[CHUNK];
    const int common = dtypes[0] == BF16 && (k == 1 || dtypes[1] == BF16);
    const double first = c[0], second = k > 1 ? c[1] : 0;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        int j = 1;
        if (common && k > 1) { /* most merges: two inputs of bfloat16 in one loop */
            const uint16_t *a = (const uint16_t *)raw[0] + s, *b = (const uint16_t *)raw[1] + s;
            EACH(m) total[i] = fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
            j = 2;
        } else {
            load_double(raw[0], dtypes[0], s, m, total);
            EACH(m) total[i] *= first;
        }
        for (; j < k; j++) {
            double factor = c[j];
            load_double(raw[j], dtypes[j], s, m, x);
            EACH(m) total[i] = fma(x[i], factor, total[i]);
        }
        if (out_dtype == F64) {
            bad += damage_double(total, m);
            store_double(total, out_dtype, s, m, out);
        } else {
            EACH(m) narrow[i] = (float)total[i];
            bad += (double)damage_float(narrow, m);
            store_float(narrow, out_dtype, s, m, out);
        }
    }
    return bad == 0;
}

/* For each pair i <= j of the k centred inputs (x0, x1 - x0, ...) the sum of products over one block after the other:
 * 256 lanes add every 256th product in T, and are added in double, halves to halves. out: (pairs, blocks). */
#define GRAM(T)                                                                                       \
    void geomerge_gram_##T(int k, const void *const *raw, const int *dtypes, int64_t n, int64_t block, double *out) { \
        int64_t blocks = (n + block - 1) / block;                                                     \
        T x[MOST][CHUNK];                                                                             \
        T sums[MOST * (MOST + 1) / 2][CHUNK];                                                         \
        int pairs = k * (k + 1) / 2;                                                                  \
        for (int64_t b = 0; b < blocks; b++) {                                                        \
            int64_t stop = least(n, (b + 1) * block);                                                 \
            memset(sums, 0, sizeof(T) * CHUNK * pairs);                                               \
            for (int64_t s = b * block; s < stop; s += CHUNK) {                                       \
                int64_t m = least(CHUNK, stop - s);                                                   \
                if (m < CHUNK) memset(x, 0, sizeof(T) * CHUNK * k);                                   \
                for (int j = 0; j < k; j++) load_##T(raw[j], dtypes[j], s, m, x[j]);                  \
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
                for (int half = CHUNK / 2; half; half /= 2)                                           \
                    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];                       \
                out[p * blocks + b] = lanes[0];                                                       \
            }                                                                                         \
        }                                                                                             \
    }

GRAM(float) GRAM(double)

/* -- order statistics -------------------------------------------------------------------------------------------- */

/* What is asked of one expert's magnitudes, or of magnitudes that are given, and what was found so far. */
struct bracket {
    double low, high;  /* those in [low, high] are collected ... */
    double common;     /* ... but for those that equal this (NaN: none), which are counted */
    int64_t above;     /* how many lie above `high` */
    int64_t equal;     /* how many equal `common` */
    int64_t collected;
    void *found;       /* T, with room for all */
    int32_t expert;
};

#define BRACKET(T)                                                                                    \
    static void bracket_##T(struct bracket *b, const T *restrict y, int64_t m) {                      \
        const T low = (T)b->low, high = (T)b->high, common = (T)b->common;                            \
        int32_t over = 0, same = 0, number = (int32_t)m;                                              \
        uint8_t inside[CHUNK];                                                                        \
        if (m < CHUNK) memset(inside, 0, CHUNK);                                                      \
        for (int32_t i = 0; i < number; i++) {                                                        \
            over += !(y[i] <= high);                                                                  \
            same += y[i] == common;                                                                   \
            inside[i] = (y[i] <= high) & (y[i] >= low) & (y[i] != common);                            \
        }                                                                                             \
        b->above += over, b->equal += same;                                                           \
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

/* Takes in |theta_k - theta_0|; the brackets are in the order of their experts k. raw: the base and t experts. Returns whether
 * all inputs are finite (looked at only if `check`). */
#define SURVEY(T, abs)                                                                                \
    int geomerge_survey_##T(int t, const void *const *raw, const int *dtypes, int64_t n, int brackets, struct bracket *b, \
                            int check) {                                                              \
        T base[CHUNK], d[CHUNK], bad = 0;                                                             \
        for (int64_t s = 0; s < n; s += CHUNK) {                                                      \
            int64_t m = least(CHUNK, n - s);                                                          \
            load_##T(raw[0], dtypes[0], s, m, base);                                                  \
            if (check) bad += damage_##T(base, m);                                                    \
            int j = 0;                                                                                \
            for (int k = 0; k < t; k++) {                                                             \
                load_##T(raw[k + 1], dtypes[k + 1], s, m, d);                                         \
                if (check) bad += damage_##T(d, m);                                                   \
                EACH(m) d[i] = abs(d[i] - base[i]);                                                   \
                for (; j < brackets && b[j].expert == k; j++) bracket_##T(b + j, d, m);               \
            }                                                                                         \
        }                                                                                             \
        return bad == 0;                                                                              \
    }

BRACKET(float) BRACKET(double) SURVEY(float, fabsf) SURVEY(double, fabs)

/* -- task vectors: thinned, combined, added to the base ---------------------------------------------------------- */

struct thinning {      /* what remains of one task vector */
    double keep;       /* magnitudes greater than this (negative: all) ... */
    double equal;      /* ... of those that equal this (NaN: all) the next `left` */
    double drop;       /* but not those greater than this ... */
    double drop_equal; /* ... where of those that equal this (NaN: all) the next `drop_left` are dropped */
    int64_t left;
    int64_t drop_left;
    const void *words; /* random words, one an element: those below `limit` survive (0: no draw) */
    int32_t width;     /* 16 or 32 */
    uint32_t limit;
};

struct combination {
    int32_t elect;     /* disjoint merge, else a weighted sum */
    int32_t alike;     /* all coefficients are one positive number, and so are all weights */
    int32_t normalize; /* divide by the weights that agree */
    int32_t clamp;     /* the divisor is at least `floor`; else where it is 0 it becomes 1 */
    double floor;
    double factor;     /* of the merged task vector */
    double limit;      /* a sum this much smaller than its summands is made again in double */
};

#define THIN(T, abs)                                                                                  \
    static void thin_##T(struct thinning *t, int64_t start, int64_t m, T *restrict d) {               \
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
        if (t->words && t->width == 16) {                                                             \
            const uint16_t *w = (const uint16_t *)t->words + start;                                   \
            int32_t limit = (int32_t)t->limit;                                                        \
            EACH(m) d[i] *= (T)(w[i] < limit);                                                        \
        } else if (t->words) {                                                                        \
            const uint32_t *w = (const uint32_t *)t->words + start;                                   \
            uint32_t limit = t->limit;                                                                \
            EACH(m) d[i] *= (T)(w[i] < limit);                                                        \
        }                                                                                             \
    }

/* base + sum of c[k] d[k], or the disjoint merge, of m <= CHUNK elements; `doubt` says where float32 may be wrong. */
#define COMBINE(T, abs, fma, TINY)                                                                    \
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
        EACH(m) {                                                                                     \
            T vote = votes[i] + (T)TINY;                                                              \
            elected[i] = (T)((vote > 0) - (vote < 0));                                                \
        }                                                                                             \
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
            else EACH(m) agreed[i] += (T)(agreed[i] == 0);                                            \
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
COMBINE(float, fabsf, fmaf, 0x1p-126f) COMBINE(double, fabs, fma, 0x1p-1022)

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

/* theta_0 + combine(thin(theta_k - theta_0)), rounded. raw: the base and t experts. Returns whether all inputs are finite
 * (looked at only if `check`). */
int geomerge_task_vectors_float(int t, const void *const *raw, const int *dtypes, int64_t n, struct thinning *thin,
                                const struct combination *rule, const double *c, const double *w, int check, void *out,
                                int out_dtype) {
    float base[CHUNK], d[MOST][CHUNK], kept[MOST][CHUNK], result[CHUNK], bad = 0;
    uint8_t doubt[CHUNK];
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        load_float(raw[0], dtypes[0], s, m, base);
        if (check) bad += damage_float(base, m);
        for (int k = 0; k < t; k++) {
            load_float(raw[k + 1], dtypes[k + 1], s, m, d[k]);
            if (check) bad += damage_float(d[k], m);
            EACH(m) d[k][i] -= base[i];
            thin_float(thin + k, s, m, d[k]);
        }
        const int scaled = rule->elect && !rule->alike;
        if (scaled) memcpy(kept, d, sizeof d[0] * t);
        combine_float(rule, t, c, w, m, base, d, result, doubt);
        uint8_t any = 0;
        EACH(m) any |= doubt[i];
        if (any) again(rule, t, c, w, m, doubt, raw, dtypes, s, scaled ? kept : d, result);
        store_float(result, out_dtype, s, m, out);
    }
    return bad == 0;
}

int geomerge_task_vectors_double(int t, const void *const *raw, const int *dtypes, int64_t n, struct thinning *thin,
                                 const struct combination *rule, const double *c, const double *w, int check, void *out,
                                 int out_dtype) {
    double base[CHUNK], d[MOST][CHUNK], result[CHUNK], bad = 0;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        load_double(raw[0], dtypes[0], s, m, base);
        if (check) bad += damage_double(base, m);
        for (int k = 0; k < t; k++) {
            load_double(raw[k + 1], dtypes[k + 1], s, m, d[k]);
            if (check) bad += damage_double(d[k], m);
            EACH(m) d[k][i] -= base[i];
            thin_double(thin + k, s, m, d[k]);
        }
        combine_double(rule, t, c, w, m, base, d, result, 0);
        store_double(result, out_dtype, s, m, out);
    }
    return bad == 0;
}
