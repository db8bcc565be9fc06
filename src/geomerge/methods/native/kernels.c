/* The inner loops of the common merges, fused: from the inputs' raw bytes to the output's in one pass through the caches.
 *
 * Every loop does, element by element, the operations of the torch code that it stands for, in the same order, each rounded as
 * there: the two give the same bits (tests/test_methods_native.py). So compile with -ffp-contract=off; where torch adds
 * with a factor (add_(x, alpha=c)) it uses a fused multiply-add, and so does `fma` here.
 *
 * Inputs and outputs are places: in memory, or in files, which are read and written a WINDOW of elements at a time, so that what
 * was read is still in the second-level cache when it is used. Within, work goes in chunks of CHUNK elements, whose float or double
 * scratch stays in the first-level cache.
 *
 * What can fail returns 1, 0 (numbers that are not finite) or -1 (reading or writing failed: see `struct work`).
 */

#define _FILE_OFFSET_BITS 64
#define _XOPEN_SOURCE 700

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* Sixteen numbers of 16 bits at once, in terms that every compiler has. */
typedef int16_t shorts __attribute__((vector_size(32)));

static inline int odd_bits(const uint16_t *x, int64_t n) {
    shorts odd = {0};
    int16_t any = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        shorts bits;
        memcpy(&bits, x + i, sizeof bits);
        odd |= (bits & 0x7F80) == 0x7F80;
    }
    for (int lane = 0; lane < 16; lane++) any |= odd[lane];
    for (; i < n; i++) any |= (x[i] & 0x7F80) == 0x7F80;
    return any != 0;
}

/* 0 when all of some raw numbers are finite; from their bits where that is quicker. */
#define SOUND(T)                                                                                     \
    static inline T odd_##T(const void *raw, int dtype, int64_t start, int64_t n, const T *restrict x) { \
        if (dtype != BF16) return damage_##T(x, n);                                                  \
        return odd_bits((const uint16_t *)raw + start, n);                                           \
    }

#define FUSED static inline __attribute__((always_inline)) void /* into its callers, with their constants */

LOAD(float) LOAD(double) STORE(float) STORE(double) DAMAGE(float) DAMAGE(double) SOUND(float) SOUND(double)

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The sum of CHUNK lanes, half to half. */
static double halved(double *lanes) {
    for (int half = CHUNK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* -- places ------------------------------------------------------------------------------------------------------ */

#define WINDOW (1 << 15)
#define BATCH (1 << 17) /* elements that are written together */
#define APART 576 /* between the windows of two inputs, lest they compete for the same lines of the cache */

/* Where elements lie: from `memory` on, or (if that is 0) from byte `offset` of an open file on. */
struct place {
    char *memory;
    int64_t offset;
    int32_t file, dtype;
};

/* The inputs of one call. */
struct work {
    const struct place *inputs;
    char *room;        /* for a window of each input and of the output */
    double *beginning; /* here go the first `first` elements of the result before they are rounded (0: nowhere) */
    int64_t first;
    int32_t count;
    int32_t failed; /* after -1: which input could not be read, -1 for the output, ... */
    int32_t error;  /* ... and errno, 0 when a file ended early */
};

static const int64_t sizes[] = {2, 2, 4, 8};

/* Elements [at, at + n) of all inputs: pointers to them in `raw`. */
static int fetch(struct work *work, int64_t at, int64_t n, const void **raw) {
    char *room = work->room;
    for (int k = 0; k < work->count; k++) {
        const struct place *in = work->inputs + k;
        int64_t size = sizes[in->dtype];
        if (in->memory) {
            raw[k] = in->memory + at * size;
            continue;
        }
        raw[k] = room;
        int64_t left = n * size, from = in->offset + at * size;
        char *to = room;
        while (left) {
            ssize_t got = pread(in->file, to, (size_t)left, (off_t)from);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                work->failed = k;
                work->error = got ? errno : 0;
                return 0;
            }
            left -= got, from += got, to += got;
        }
        room += WINDOW * size + APART;
    }
    return 1;
}

/* Where a window of the output is to be put together ... */
static char *window_of(struct work *work, const struct place *out, int64_t at) {
    if (out->memory) return out->memory + at * sizes[out->dtype];
    char *room = work->room + at % BATCH * sizes[out->dtype];
    for (int k = 0; k < work->count; k++)
        if (!work->inputs[k].memory) room += WINDOW * sizes[work->inputs[k].dtype] + APART;
    return room;
}

/* n elements from `from` on to their place in the output's file. */
static int put(struct work *work, const struct place *out, const char *from, int64_t at, int64_t n) {
    int64_t left = n * sizes[out->dtype], to = out->offset + at * sizes[out->dtype];
    while (left) {
        ssize_t got = pwrite(out->file, from, (size_t)left, (off_t)to);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            work->failed = -1;
            work->error = got ? errno : EIO;
            return 0;
        }
        left -= got, to += got, from += got;
    }
    return 1;
}

/* ... and from where it goes to its file, with those before it of the same batch; `n` is all of the output, `stop` how far it is. */
static int deliver(struct work *work, const struct place *out, int64_t stop, int64_t n) {
    if (out->memory || (stop % BATCH && stop < n)) return 1;
    int64_t at = (stop - 1) / BATCH * BATCH;
    return put(work, out, window_of(work, out, at), at, stop - at);
}

/* A piece [at, at + n) of a result before it is rounded, as far as that was asked for. */
#define TELL(T)                                                                              \
    static inline void tell_##T(struct work *work, int64_t at, int64_t n, const T *values) { \
        for (int64_t i = 0; i < n && at + i < work->first; i++) work->beginning[at + i] = (double)values[i]; \
    }

TELL(float) TELL(double)

/* The elements of the only input as doubles. */
int geomerge_load(struct work *work, int64_t n, double *out) {
    const void *raw[1];
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t m = least(WINDOW, n - at);
        if (!fetch(work, at, m, raw)) return -1;
        for (int64_t s = 0; s < m; s += CHUNK) load_double(raw[0], work->inputs[0].dtype, s, least(CHUNK, m - s), out + at + s);
    }
    return 1;
}

/* Whether all inputs are finite. */
int geomerge_finite(struct work *work, int64_t n) {
    double bad = 0, x[CHUNK];
    const void *raw[MOST];
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t m = least(WINDOW, n - at);
        if (!fetch(work, at, m, raw)) return -1;
        for (int k = 0; k < work->count; k++)
            for (int64_t s = 0; s < m; s += CHUNK) {
                int64_t some = least(CHUNK, m - s);
                if (work->inputs[k].dtype != BF16) load_double(raw[k], work->inputs[k].dtype, s, some, x);
                bad += odd_double(raw[k], work->inputs[k].dtype, s, some, x);
            }
    }
    return bad == 0;
}

/* Of n <= WINDOW merged elements: minus those of the only input, and what rounding to a dtype adds to them. */
int geomerge_change(struct work *work, int64_t n, const double *merged, int dtype, double *change, double *error) {
    double x[CHUNK], room[CHUNK];
    const void *raw[1];
    if (!fetch(work, 0, n, raw)) return -1;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        load_double(raw[0], work->inputs[0].dtype, s, m, x);
        EACH(m) change[s + i] = merged[s + i] - x[i];
        store_double(merged + s, dtype, 0, m, room);
        load_double(room, dtype, 0, m, x);
        EACH(m) error[s + i] = x[i] - merged[s + i];
    }
    return 1;
}

/* Copies the only input, which has the output's dtype. Whether all of it is finite; `unbounded`: infinity is. */
int geomerge_copy(struct work *work, int64_t n, int unbounded, const struct place *out) {
    double bad = 0;
    double x[CHUNK];
    int dtype = work->inputs[0].dtype;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t m = least(WINDOW, n - at);
        const void *raw[1];
        if (!fetch(work, at, m, raw)) return -1;
        for (int64_t s = 0; s < m; s += CHUNK) {
            int64_t some = least(CHUNK, m - s);
            load_double(raw[0], dtype, s, some, x);
            if (unbounded) EACH(some) x[i] = x[i] == x[i] ? 0.0 : x[i];
            bad += damage_double(x, some);
        }
        memcpy(window_of(work, out, at), raw[0], (size_t)(m * sizes[dtype]));
        if (!deliver(work, out, at + m, n)) return -1;
    }
    return bad == 0;
}

/* -- span methods ------------------------------------------------------------------------------------------------ */

/* out = round(sum of c[k] * x[k]), in double. Returns whether all of the sum is finite (in float, where that is on the way). */
int geomerge_span(struct work *work, int64_t n, const double *c, const struct place *out) {
    double bad = 0;
    double x[CHUNK], total[CHUNK];
    float narrow[CHUNK];
    const void *raw[MOST];
    const int k = work->count, out_dtype = out->dtype;
    const struct place *in = work->inputs;
    const int common = k > 1 && in[0].dtype == BF16 && in[1].dtype == BF16;
    const double first = c[0], second = k > 1 ? c[1] : 0;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            int j = 1;
            if (common) {
                const uint16_t *a = (const uint16_t *)raw[0] + s, *b = (const uint16_t *)raw[1] + s;
                if (k == 2 && out_dtype != F64 && work->first <= at + s) { /* most merges */
                    EACH(m) narrow[i] = (float)fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
                    bad += (double)damage_float(narrow, m);
                    store_float(narrow, out_dtype, s, m, to);
                    continue;
                }
                EACH(m) total[i] = fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
                j = 2;
            } else {
                load_double(raw[0], in[0].dtype, s, m, total);
                EACH(m) total[i] *= first;
            }
            for (; j < k; j++) {
                double factor = c[j];
                load_double(raw[j], in[j].dtype, s, m, x);
                EACH(m) total[i] = fma(x[i], factor, total[i]);
            }
            if (work->first > at + s) tell_double(work, at + s, m, total);
            if (out_dtype == F64) {
                bad += damage_double(total, m);
                store_double(total, out_dtype, s, m, to);
            } else {
                EACH(m) narrow[i] = (float)total[i];
                bad += (double)damage_float(narrow, m);
                store_float(narrow, out_dtype, s, m, to);
            }
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0;
}

/* The sums of products of a block of two inputs of bfloat16: as below, lane by lane, with nothing but the inputs in memory. */
static void gram_block(const uint16_t *restrict a, const uint16_t *restrict b, int64_t n, float (*restrict sums)[CHUNK]) {
    enum { LANES = 16 };
    for (int lane = 0; lane < CHUNK; lane += LANES) {
        float first[LANES] = {0}, both[LANES] = {0}, second[LANES] = {0};
        for (int64_t s = lane; s < n; s += CHUNK)
            for (int i = 0; i < LANES; i++) {
                float x = from_bf16(a[s + i]), y = from_bf16(b[s + i]) - x;
                first[i] += x * x, both[i] += x * y, second[i] += y * y;
            }
        memcpy(sums[0] + lane, first, sizeof first);
        memcpy(sums[1] + lane, both, sizeof both);
        memcpy(sums[2] + lane, second, sizeof second);
    }
}

/* For each pair i <= j of the k centred inputs (x0, x1 - x0, ...) the sum of products over one block after the other:
 * 256 lanes add every 256th product in T, and are added in double, halves to halves. out: (pairs, blocks). */
#define GRAM(T)                                                                                       \
    int geomerge_gram_##T(struct work *work, int64_t n, int64_t block, double *out) {                 \
        int64_t blocks = (n + block - 1) / block;                                                     \
        T x[MOST][CHUNK];                                                                             \
        T sums[MOST * (MOST + 1) / 2][CHUNK];                                                         \
        const void *raw[MOST];                                                                        \
        const int k = work->count;                                                                    \
        const struct place *in = work->inputs;                                                        \
        int pairs = k * (k + 1) / 2;                                                                  \
        for (int64_t b = 0; b < blocks; b++) {                                                        \
            int64_t whole = WINDOW / block * block; /* elements of whole blocks */                    \
            int64_t window = b * block / whole * whole;                                               \
            if (b * block == window && !fetch(work, window, least(whole, n - window), raw)) return -1; \
            int64_t stop = least(n, (b + 1) * block) - window;                                        \
            int64_t begin = b * block - window;                                                       \
            if (sizeof(T) == 4 && k == 2 && in[0].dtype == BF16 && in[1].dtype == BF16 && (stop - begin) % CHUNK == 0) { \
                const uint16_t *x0 = (const uint16_t *)raw[0] + begin, *x1 = (const uint16_t *)raw[1] + begin; \
                gram_block(x0, x1, stop - begin, (float (*)[CHUNK])sums);                             \
                begin = stop;                                                                         \
            } else {                                                                                  \
                memset(sums, 0, sizeof(T) * CHUNK * pairs);                                           \
            }                                                                                         \
            for (int64_t s = begin; s < stop; s += CHUNK) {                                           \
                int64_t m = least(CHUNK, stop - s);                                                   \
                if (m < CHUNK) memset(x, 0, sizeof(T) * CHUNK * k);                                   \
                for (int j = 0; j < k; j++) load_##T(raw[j], in[j].dtype, s, m, x[j]);                \
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
                out[p * blocks + b] = halved(lanes);                                                  \
            }                                                                                         \
        }                                                                                             \
        return 1;                                                                                     \
    }

GRAM(float) GRAM(double)

/* The same products in double, added to out (pairs, columns) row after row: for each column its own. */
int geomerge_gram_columns(struct work *work, int64_t rows, int64_t columns, double *out) {
    double x[MOST][CHUNK];
    const void *raw[MOST];
    const int count = work->count;
    const int64_t width = least(columns, WINDOW), together = columns < WINDOW ? WINDOW / columns : 1;
    for (int64_t row = 0; row < rows; row += together)
        for (int64_t column = 0; column < columns; column += width) {
            int64_t some = least(together, rows - row), wide = least(width, columns - column);
            if (!fetch(work, row * columns + column, some * wide, raw)) return -1;
            for (int64_t s = 0; s < wide; s += CHUNK) {
                int64_t m = least(CHUNK, wide - s);
                for (int64_t r = 0; r < some; r++) {
                    double *restrict sum = out + column + s;
                    for (int k = 0; k < count; k++) {
                        load_double(raw[k], work->inputs[k].dtype, r * wide + s, m, x[k]);
                        if (k) EACH(m) x[k][i] -= x[0][i];
                    }
                    for (int a = 0; a < count; a++)
                        for (int b = a; b < count; b++, sum += columns) EACH(m) sum[i] = fma(x[a][i], x[b][i], sum[i]);
                }
            }
        }
    return 1;
}

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

#ifdef __AVX2__
#include <immintrin.h>

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

/* As `bracket_double`, for a whole number of fours; `found` has room for four more. */
static void bracket_fours(struct bracket *b, const double *restrict x, int64_t m) {
    const __m256d low = _mm256_set1_pd(b->low), high = _mm256_set1_pd(b->high), common = _mm256_set1_pd(b->common);
    __m256i over = _mm256_setzero_si256(), same = over;
    double *found = (double *)b->found + b->collected;
    for (int64_t i = 0; i < m; i += 4) {
        __m256d y = _mm256_loadu_pd(x + i);
        __m256d above = _mm256_cmp_pd(y, high, _CMP_NLE_UQ), equal = _mm256_cmp_pd(y, common, _CMP_EQ_OQ);
        __m256d inside = _mm256_andnot_pd(_mm256_or_pd(above, equal), _mm256_cmp_pd(y, low, _CMP_GE_OQ));
        over = _mm256_sub_epi64(over, _mm256_castpd_si256(above));
        same = _mm256_sub_epi64(same, _mm256_castpd_si256(equal));
        int mask = _mm256_movemask_pd(inside);
        __m256i lanes = _mm256_load_si256((const __m256i *)pairs_of[mask]);
        _mm256_storeu_ps((float *)found, _mm256_permutevar8x32_ps(_mm256_castpd_ps(y), lanes));
        found += __builtin_popcount((unsigned)mask);
    }
    int64_t counts[8];
    _mm256_storeu_si256((__m256i *)counts, over);
    _mm256_storeu_si256((__m256i *)(counts + 4), same);
    for (int i = 0; i < 4; i++) b->above += counts[i], b->equal += counts[4 + i];
    b->collected = found - (double *)b->found;
}

/* As `bracket_float` of |x - base|, for a whole number of eights; `found` has room for eight more. */
static void bracket_bf16(struct bracket *b, const uint16_t *restrict x, const float *restrict base, int64_t m) {
    const __m256 low = _mm256_set1_ps((float)b->low), high = _mm256_set1_ps((float)b->high);
    const __m256 common = _mm256_set1_ps((float)b->common), sign = _mm256_set1_ps(-0.0f);
    __m256i over = _mm256_setzero_si256(), same = over;
    float *found = (float *)b->found + b->collected;
    for (int64_t i = 0; i < m; i += 8) {
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(x + i))), 16);
        __m256 y = _mm256_andnot_ps(sign, _mm256_sub_ps(_mm256_castsi256_ps(wide), _mm256_loadu_ps(base + i)));
        __m256 above = _mm256_cmp_ps(y, high, _CMP_NLE_UQ), equal = _mm256_cmp_ps(y, common, _CMP_EQ_OQ);
        __m256 inside = _mm256_andnot_ps(_mm256_or_ps(above, equal), _mm256_cmp_ps(y, low, _CMP_GE_OQ));
        over = _mm256_sub_epi32(over, _mm256_castps_si256(above));
        same = _mm256_sub_epi32(same, _mm256_castps_si256(equal));
        int mask = _mm256_movemask_ps(inside);
        __m256i lanes = _mm256_load_si256((const __m256i *)lanes_of[mask]);
        _mm256_storeu_ps(found, _mm256_permutevar8x32_ps(y, lanes));
        found += __builtin_popcount((unsigned)mask);
    }
    int32_t counts[16];
    _mm256_storeu_si256((__m256i *)counts, over);
    _mm256_storeu_si256((__m256i *)(counts + 8), same);
    for (int i = 0; i < 8; i++) b->above += counts[i], b->equal += counts[8 + i];
    b->collected = found - (float *)b->found;
}
#define QUICK 1
#else
#define QUICK 0
#define bracket_bf16(b, x, base, m) (void)0
#define bracket_fours(b, x, m) (void)0
#endif

#define BRACKET(T)                                                                                    \
    static void bracket_##T(struct bracket *b, const T *restrict y, int64_t m) {                      \
        if (QUICK && sizeof(T) == 8 && m % 4 == 0) {                                                  \
            bracket_fours(b, (const double *)y, m);                                                   \
            return;                                                                                   \
        }                                                                                             \
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

/* Takes in |theta_k - theta_0| at n elements from each of `starts` on; the brackets are in the order of their experts k. Inputs:
 * the base and the experts. Returns whether all are finite (looked at only if `check`). */
#define SURVEY(T, abs)                                                                                \
    int geomerge_survey_##T(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, int brackets, \
                            struct bracket *b, int check) {                                           \
        T base[CHUNK], d[CHUNK], bad = 0;                                                             \
        const void *raw[MOST];                                                                        \
        const struct place *in = work->inputs;                                                        \
        for (int64_t p = 0; p < pieces; p++)                                                          \
            for (int64_t at = 0; at < n; at += WINDOW) {                                              \
                int64_t size = least(WINDOW, n - at);                                                 \
                if (!fetch(work, starts[p] + at, size, raw)) return -1;                               \
                for (int64_t s = 0; s < size; s += CHUNK) {                                           \
                    int64_t m = least(CHUNK, size - s);                                               \
                    load_##T(raw[0], in[0].dtype, s, m, base);                                        \
                    if (check) bad += odd_##T(raw[0], in[0].dtype, s, m, base);                       \
                    int j = 0;                                                                        \
                    for (int k = 0; k + 1 < work->count; k++) {                                       \
                        if (QUICK && sizeof(T) == 4 && in[k + 1].dtype == BF16 && m % 8 == 0) {       \
                            if (check) bad += odd_##T(raw[k + 1], BF16, s, m, 0);                     \
                            for (; j < brackets && b[j].expert == k; j++)                             \
                                bracket_bf16(b + j, (const uint16_t *)raw[k + 1] + s, (const float *)base, m); \
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

/* -- task vectors: thinned, combined, added to the base ---------------------------------------------------------- */

struct thinning {      /* what remains of one task vector */
    double keep;       /* magnitudes greater than this (negative: all) ... */
    double equal;      /* ... of those that equal this (NaN: all) the next `left` */
    double drop;       /* but not those greater than this ... */
    double drop_equal; /* ... where of those that equal this (NaN: all) the next `drop_left` are dropped */
    int64_t left;
    int64_t drop_left;
    uint64_t state[2]; /* of the generator PCG64DXSM, low word first, ... */
    uint64_t step[2];  /* ... and its increment */
    int32_t width;     /* each element draws a word of 16 or 32 bits (0: none), and those below `limit` survive */
    uint32_t limit;
};

/* The next n <= CHUNK words of some thinnings' generators: each number of 64 bits gives several. A call for fewer than CHUNK is the
 * last one. Several in step, since each number of one generator has to wait for the one before. */
FUSED draw_some(const int t, struct thinning *each, int64_t need, uint64_t (*numbers)[CHUNK / 2]) {
    const uint64_t multiplier = 0xda942042e4dd58b5ULL;
    unsigned __int128 state[4], step[4];
    for (int k = 0; k < t; k++) {
        state[k] = (unsigned __int128)each[k].state[1] << 64 | each[k].state[0];
        step[k] = (unsigned __int128)each[k].step[1] << 64 | each[k].step[0];
    }
    for (int64_t i = 0; i < need; i++)
        for (int k = 0; k < t; k++) {
            uint64_t high = (uint64_t)(state[k] >> 64), low = (uint64_t)state[k] | 1;
            high ^= high >> 32;
            high *= multiplier;
            high ^= high >> 48;
            numbers[k][i] = high * low;
            state[k] = state[k] * multiplier + step[k];
        }
    for (int k = 0; k < t; k++) each[k].state[0] = (uint64_t)state[k], each[k].state[1] = (uint64_t)(state[k] >> 64);
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
    int32_t clamp;     /* the divisor is at least `floor`; else where it is 0 it becomes 1 */
    double floor;
    double factor;     /* of the merged task vector */
    double limit;      /* a sum this much smaller than its summands is made again in double */
};

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
                uint16_t w[CHUNK];                                                                    \
                memcpy(w, numbers, sizeof w);                                                         \
                int32_t limit = (int32_t)t->limit;                                                    \
                EACH(m) d[i] *= (T)(w[i] < limit);                                                    \
            } else {                                                                                  \
                uint32_t w[CHUNK];                                                                    \
                memcpy(w, numbers, sizeof w);                                                         \
                uint32_t limit = t->limit;                                                            \
                EACH(m) d[i] *= (T)(w[i] < limit);                                                    \
            }                                                                                         \
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

/* For each of t experts, k among 0 to 3; unrolled, so that the loop around is vectorised. */
#define EXPERTS(...)                                  \
    do {                                              \
        { enum { k = 0 }; __VA_ARGS__ }               \
        if (t > 1) { enum { k = 1 }; __VA_ARGS__ }    \
        if (t > 2) { enum { k = 2 }; __VA_ARGS__ }    \
        if (t > 3) { enum { k = 3 }; __VA_ARGS__ }    \
    } while (0);

/* Eight floats at once, in terms that every compiler has (and turns into what the processor has). */
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

static inline floats all(float value) { return (floats){value, value, value, value, value, value, value, value}; }
static inline floats where(ints mask, floats x) { return (floats)(mask & (ints)x); } /* and 0 elsewhere */
static inline floats size_of(floats x) { return (floats)((ints)x & 0x7FFFFFFF); }

static inline floats wide(const uint16_t *x) {
    halves raw;
    memcpy(&raw, x, sizeof raw);
    return (floats)(__builtin_convertvector(raw, words) << 16);
}

static inline floats fused_add(floats x, floats y, floats z) {
#ifdef __FMA__
    return (floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
    floats sum;
    for (int i = 0; i < 8; i++) sum[i] = fmaf(x[i], y[i], z[i]);
    return sum;
#endif
}

/* A chunk of task vectors of bfloat16 that are thinned by magnitude or at random alone, all experts in one loop, for each number of
 * them. What float32 may have got wrong is not repaired here: the value says whether there is any. */
FUSED fused(const int t, const int elect, const int alike, const int random, const struct combination *rule, const float *keep,
            const float *drop, const float *c, const float *w, const uint16_t *const *x, const float *masks, float *restrict result, int *doubt) {
    const floats limit = all((float)rule->limit), few = all((float)((t + 3) * 0x1p-23)), floor = all((float)rule->floor);
    const floats factor = all((float)rule->factor), one = all(1), minus = all(-1), tiny = all(0x1p-126f);
    const int normalize = rule->normalize, clamp = rule->clamp;
    ints any = {0};
    for (int i = 0; i < CHUNK; i += 8) {
        floats base = wide(x[0] + i), d[4];
        for (int k = 0; k < t; k++) {
            d[k] = wide(x[k + 1] + i) - base;
            d[k] = where(~((d[k] >= -all(keep[k])) & (d[k] <= all(keep[k]))), d[k]);
            if (drop) d[k] = where(size_of(d[k]) <= all(drop[k]), d[k]);
            if (random) d[k] *= *(const floats *)(masks + k * CHUNK + i);
        }
        floats sum;
        if (!elect) {
            floats size = size_of(base);
            sum = d[0] * all(c[0]);
            for (int k = 1; k < t; k++) sum = fused_add(d[k], all(c[k]), sum);
            for (int k = 0; k < t; k++) size = fused_add(size_of(d[k]), all(fabsf(c[k])), size);
            sum += base;
            any |= size_of(sum) < limit * size;
        } else {
            for (int k = 0; !alike && k < t; k++) d[k] *= all(c[k]);
            floats votes = d[0], total = {0}, agreed = {0};
            for (int k = 1; k < t; k++) votes += d[k];
            floats vote = votes + tiny;
            floats elected = where(vote > 0, one) + where(vote < 0, minus);
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
                else agreed += where(agreed == 0, one);
                total /= agreed;
            }
            sum = fused_add(total * elected, factor, base);
            any |= size_of(sum) < limit * size_of(base);
        }
        memcpy(result + i, &sum, sizeof sum);
    }
    *doubt = 0;
    for (int i = 0; i < 8; i++) *doubt |= any[i];
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
    for (int i = 0; i < CHUNK; i += 8) found -= size_of(wide(x + i) - wide(base + i)) == all(number);
    int64_t sum = 0;
    for (int i = 0; i < 8; i++) sum += found[i];
    return sum;
}

/* Whether the result is there: the inputs are such, and nothing is in doubt. */
static int fuse(int t, const struct combination *rule, struct thinning *thin, const double *coefficients,
                const double *weights, const void *const *raw, const int *dtypes, int64_t start, int64_t m,
                uint64_t (*numbers)[CHUNK / 2], float *result) {
    float keep[4], drop[4], c[4], w[4];
    const float *outliers = 0;
    _Alignas(32) float drawn[4 * CHUNK];
    const uint16_t *x[5];
    int random = 0;
    if (t > 4 || m != CHUNK) return 0;
    for (int k = 0; k <= t; k++) {
        if (dtypes[k] != BF16) return 0;
        x[k] = (const uint16_t *)raw[k] + start;
    }
    int64_t taken[4];
    for (int k = 0; k < t; k++) {
        if (thin[k].drop_equal == thin[k].drop_equal || thin[k].width == 32) return 0;
        drop[k] = (float)thin[k].drop;
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
        uint16_t words[CHUNK] = {0};
        if (thin[k].width) memcpy(words, numbers[k], sizeof words);
        for (int i = 0; i < CHUNK; i++) drawn[k * CHUNK + i] = (float)(words[i] < limit);
    }
    int any = 1;
    if (t == 1) { FUSED_FOR(1) }
    else if (t == 2) { FUSED_FOR(2) }
    else if (t == 3) { FUSED_FOR(3) }
    else { FUSED_FOR(4) }
    for (int k = 0; !any && k < t; k++) thin[k].left -= taken[k];
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

/* -- task vectors thinned at random by the ranks in their rows ------------------------------------------------------ */

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

/* Puts n <= WINDOW elements in the order of their magnitudes, equal ones by index: by the first bits in which these differ, and then
 * mends what is left. */
static void ascending(const double *restrict d, int64_t n, uint16_t *restrict digits, uint16_t *restrict order, struct exact *room) {
    enum { MOST_BITS = 12, OCTAVES = 32 };
    const int width = n < 2048 ? 10 : MOST_BITS;
    int64_t most = 0, differ = 0;
    for (int64_t i = 0; i < n; i++) most = most < pattern(d[i]) ? pattern(d[i]) : most;
    int64_t floor = ((most >> 52) - OCTAVES + 1) * ((int64_t)1 << 52), top = most - floor;
    for (int64_t i = 0; i < n; i++) {
        int64_t key = pattern(d[i]) - floor;
        differ |= (key < 0 ? 0 : key) ^ top;
    }
    const int shift = differ >> width ? 64 - __builtin_clzll((uint64_t)differ) - width : 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t key = pattern(d[i]) - floor;
        digits[i] = (uint16_t)((key < 0 ? 0 : key) >> shift & ((1 << width) - 1));
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

/* -- recorded arithmetic ------------------------------------------------------------------------------------------ */

/* What a method does to tiles, recorded operation by operation (methods/steps.py, which has the same list) and done here to a
 * chunk after the other, whose numbers stay in the first-level cache. */
enum {
    LOAD,    /* the elements of input a */
    DIFFER,  /* the elements of input a, minus b */
    TABLE,   /* x elements of `data` in turn, each for y elements that follow each other */
    ADD, SUBTRACT, MULTIPLY, DIVIDE, LARGER,
    SHIFT,   /* a + x */
    SCALE,   /* a * x */
    OVER,    /* x / a */
    PLUS,    /* a + x b */
    PLUS_PRODUCT, PLUS_QUOTIENT, /* a + (x b) c, a + (x b) / c */
    SIZE, SIGN,
    FLOOR, CLAMP, /* at least x, at most y */
    SHRINK,  /* 0 where |a| <= x */
    LESS, LEAST, EQUAL, DIFFERENT, /* 1 where a < b, a <= b ..., else 0 */
    BELOW, UP_TO, SAME, OTHER, ABOVE, FROM, /* ... where a < x, a <= x, a == x, a != x, a > x, a >= x */
    REPLACE, /* x where b is not 0, else a */
    THIN,    /* as `struct thinning` at `data` says */
    COUNT,   /* the sum of a, into an integer at `data` */
    SUMS,    /* of a over blocks of x elements: `data` has the lanes, then the sums */
    BRACKET, /* counted and collected by the `struct bracket` at `data` */
    STORE,   /* the output */
    /* What is often done one after the other (also in methods/steps.py): */
    ELECT,     /* the sign of a + x */
    AGREE,     /* a b, but at least x */
    DISTANCE,  /* |a - b| */
    WEIGHT,    /* |a| x */
    LIGHTER, OUTWEIGHED, /* 1 where |a| x < b, < |b|, else 0 */
    PLUS_SIGN, /* a + x sign(b) */
    SHARE, EXP, TANH, /* a / x, and as in methods/functions.py */
};

struct step {
    int32_t operation, to, a, b, c, unused;
    double x, y;
    void *data;
};

#define REGISTERS 160

/* Element i of the result is an expression of elements i of the operands, in a register of its own; also beyond the m that are asked
 * for, where it does no harm: loops of known length are quicker. */
#define MAP(expression)                                    \
    _Pragma("GCC unroll 4") for (int i = 0; i < CHUNK; i++) o[i] = (expression); \
    break

/* e^x = power * (1 + r + r^2 p): as `_reduced` in methods/functions.py. */
static inline double reduced(double x, double *power, double *r) {
    static const double terms[12] = {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320.,
                                     1 / 5040., 1 / 720., 1 / 120., 1 / 24., 1 / 6., 1 / 2.};
    double shifted = x * 1.4426950408889634 + 0x1.8p52, p = terms[0];
    double k = shifted - 0x1.8p52;
    *r = fma(k, -1.9082149292705877e-10, fma(k, -0.6931471803691238, x));
#pragma GCC unroll 12
    for (int i = 1; i < 12; i++) p = fma(p, *r, terms[i]);
    uint64_t bits; /* whose last ones hold k */
    memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    memcpy(power, &bits, 8);
    return p;
}

static inline double exp_of(double x) {
    double power, r, p = reduced(x < -708 ? -708 : x > 709 ? 709 : x, &power, &r);
    return (p * r * r + r + 1) * power;
}

/* For a size below FLAT a few terms do, and mostly all of a chunk is below it. */
#define FLAT 0x1p-5

static inline double flat_tanh(double x) {
    static const double terms[5] = {-1382 / 155925., 62 / 2835., -17 / 315., 2 / 15., -1 / 3.};
    double square = x * x, p = terms[0];
#pragma GCC unroll 12
    for (int i = 1; i < 5; i++) p = fma(p, square, terms[i]);
    return p * square * x + x;
}

static inline double steep_tanh(double x) {
    double size = fabs(x), power, r, p = reduced((size > 20 ? 20 : size) * 2, &power, &r);
    double less_one = (p * r * r + r) * power + (power - 1);
    return less_one / (less_one + 2) * ((x > 0 ? 1.0 : 0.0) - (x < 0 ? 1.0 : 0.0));
}

static void tanh_of(const double *restrict x, double *restrict out) {
    int64_t steep = 0;
    for (int i = 0; i < CHUNK; i++) steep |= fabs(x[i]) >= FLAT;
    for (int i = 0; i < CHUNK; i++) out[i] = flat_tanh(x[i]);
    if (!steep) return;
    for (int i = 0; i < CHUNK; i++) out[i] = fabs(x[i]) < FLAT ? out[i] : steep_tanh(x[i]);
}

#define TRUE(condition) ((condition) ? 1.0 : 0.0)

/* Does all steps to the elements [at, at + m), which lie from `s` on in `raw`; `first` is the place of element 0 in the tensor. */
static void do_steps(struct work *work, const struct step *steps, int count, const void *const *raw, int64_t s, int64_t m, int64_t at,
                     int64_t n, int64_t first, const struct place *out, char *to, double (*registers)[CHUNK]) {
    for (const struct step *each = steps; each < steps + count; each++) {
        double *restrict o = registers[each->to];
        const double *restrict a = registers[each->a], *restrict b = registers[each->b], *restrict c = registers[each->c];
        const double x = each->x, y = each->y;
        switch (each->operation) {
        case LOAD: load_double(raw[each->a], work->inputs[each->a].dtype, s, m, o); break;
        case DIFFER:
            if (work->inputs[each->a].dtype == BF16) {
                const uint16_t *bits = (const uint16_t *)raw[each->a] + s;
                EACH(m) o[i] = (double)from_bf16(bits[i]) - b[i];
                break;
            }
            load_double(raw[each->a], work->inputs[each->a].dtype, s, m, o);
            EACH(m) o[i] -= b[i];
            break;
        case TABLE: {
            const double *table = each->data;
            int64_t length = (int64_t)x, run = (int64_t)y, place = first + at;
            int64_t k = place / run % length, left = run - place % run;
            if (run == 1) {
                for (int64_t i = 0; i < m; k = 0) {
                    int64_t some = least(m - i, length - k);
                    memcpy(o + i, table + k, (size_t)some * sizeof *o);
                    i += some;
                }
                break;
            }
            for (int64_t i = 0; i < m; left = run, k = k + 1 == length ? 0 : k + 1)
                for (int64_t stop = least(m, i + left); i < stop; i++) o[i] = table[k];
            break;
        }
        case ADD: MAP(a[i] + b[i]);
        case SUBTRACT: MAP(a[i] - b[i]);
        case MULTIPLY: MAP(a[i] * b[i]);
        case DIVIDE: MAP(a[i] / b[i]);
        case LARGER: MAP(a[i] > b[i] ? a[i] : b[i]);
        case SHIFT: MAP(a[i] + x);
        case SCALE: MAP(a[i] * x);
        case OVER: MAP(x / a[i]);
        case PLUS: MAP(fma(b[i], x, a[i]));
        case PLUS_PRODUCT:
            if (x == 1) { MAP(fma(b[i], c[i], a[i])); }
            MAP(fma(x * b[i], c[i], a[i]));
        case PLUS_QUOTIENT: MAP(a[i] + x * b[i] / c[i]);
        case SIZE: MAP(fabs(a[i]));
        case SIGN: MAP(TRUE(a[i] > 0) - TRUE(a[i] < 0));
        case FLOOR: MAP(a[i] < x ? x : a[i]);
        case CLAMP: MAP((a[i] < x ? x : a[i]) > y ? y : a[i] < x ? x : a[i]);
        case SHRINK: MAP(a[i] >= -x && a[i] <= x ? 0.0 : a[i]);
        case LESS: MAP(TRUE(a[i] < b[i]));
        case LEAST: MAP(TRUE(a[i] <= b[i]));
        case EQUAL: MAP(TRUE(a[i] == b[i]));
        case DIFFERENT: MAP(TRUE(a[i] != b[i]));
        case BELOW: MAP(TRUE(a[i] < x));
        case UP_TO: MAP(TRUE(a[i] <= x));
        case SAME: MAP(TRUE(a[i] == x));
        case OTHER: MAP(TRUE(a[i] != x));
        case ABOVE: MAP(TRUE(a[i] > x));
        case FROM: MAP(TRUE(a[i] >= x));
        case ELECT: MAP(TRUE(a[i] + x > 0) - TRUE(a[i] + x < 0));
        case AGREE: MAP(a[i] * b[i] < x ? x : a[i] * b[i]);
        case DISTANCE: MAP(fabs(a[i] - b[i]));
        case WEIGHT: MAP(fabs(a[i]) * x);
        case LIGHTER: MAP(TRUE(fabs(a[i]) * x < b[i]));
        case OUTWEIGHED: MAP(TRUE(fabs(a[i]) * x < fabs(b[i])));
        case PLUS_SIGN: MAP(fma(TRUE(b[i] > 0) - TRUE(b[i] < 0), x, a[i]));
        case SHARE: MAP(a[i] / x);
        case EXP: MAP(exp_of(a[i]));
        case TANH: tanh_of(a, o); break;
        case REPLACE: MAP(b[i] != 0 ? x : a[i]);
        case THIN: {
            struct thinning *thin = each->data;
            if (thin->equal != thin->equal && thin->drop == INFINITY) {
                const double keep = thin->keep;
                MAP(a[i] >= -keep && a[i] <= keep ? 0.0 : a[i]);
            }
            memcpy(o, a, sizeof *o * m);
            thin_double(thin, m, 0, o);
            break;
        }
        case COUNT: {
            double number = 0; /* whole ones, which add up to the same in any order */
            double lanes[8] = {0};
            int64_t i = 0;
            for (; i + 8 <= m; i += 8)
                for (int j = 0; j < 8; j++) lanes[j] += a[i + j];
            for (; i < m; i++) number += a[i];
            for (int j = 0; j < 8; j++) number += lanes[j];
            *(int64_t *)each->data += (int64_t)number;
            break;
        }
        case SUMS: {
            double *restrict lanes = each->data;
            EACH(m) lanes[i] += a[i];
            if ((at + m) % (int64_t)x && at + m < n) break;
            halved(lanes);
            lanes[CHUNK + at / (int64_t)x] = lanes[0];
            memset(lanes, 0, CHUNK * sizeof *lanes);
            break;
        }
        case BRACKET: bracket_double(each->data, a, m); break;
        case STORE:
            if (work->first > at) tell_double(work, at, m, a);
            store_double(a, out->dtype, s, m, to);
            break;
        }
    }
}

/* Does recorded steps to n elements from each of `starts` on; an output has one start, 0. `first` is the place of element 0 in the
 * tensor. Returns whether all inputs are finite (looked at only if `check`). */
int geomerge_program(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, int64_t first, const struct step *steps,
                     int count, int check, const struct place *out) {
    _Alignas(64) double registers[REGISTERS][CHUNK] = {{0}};
    double bad = 0;
    const void *raw[MOST];
    for (int64_t p = 0; p < pieces; p++)
        for (int64_t at = 0; at < n; at += WINDOW) {
            int64_t size = least(WINDOW, n - at);
            if (!fetch(work, starts[p] + at, size, raw)) return -1;
            char *to = out ? window_of(work, out, at) : 0;
            for (int64_t s = 0; s < size; s += CHUNK) {
                int64_t m = least(CHUNK, size - s);
                for (int k = 0; check && k < work->count; k++) {
                    if (work->inputs[k].dtype != BF16) load_double(raw[k], work->inputs[k].dtype, s, m, registers[0]);
                    bad += odd_double(raw[k], work->inputs[k].dtype, s, m, registers[0]);
                }
                do_steps(work, steps, count, raw, s, m, at + s, n, first + starts[p], out, to, registers);
            }
            if (out && !deliver(work, out, at + size, n)) return -1;
        }
    return bad == 0;
}

/* As in methods/functions.py. */
static inline double log_of(double x) {
    static const double odd[10] = {1 / 21., 1 / 19., 1 / 17., 1 / 15., 1 / 13., 1 / 11., 1 / 9., 1 / 7., 1 / 5., 1 / 3.};
    int64_t bits;
    memcpy(&bits, &x, 8);
    int64_t whole = (bits - 0x3FE6A09E667F3BCD) & ~(((int64_t)1 << 52) - 1); /* the exponent in its place */
    int64_t rest = bits - whole;
    double m, k = (double)(int32_t)(whole >> 32) * 0x1p-20;
    memcpy(&m, &rest, 8);
    double f = (m - 1) / (m + 1), square = f * f, p = odd[0];
#pragma GCC unroll 12
    for (int i = 1; i < 10; i++) p = fma(p, square, odd[i]);
    f += f;
    return fma(k, 0.6931471803691238, fma(k, 1.9082149292705877e-10, p * square * f + f));
}

/* The softmax of n numbers, plus `floor`, in their place. */
static void softmax(double *x, int64_t n, double floor) {
    double lanes[CHUNK] = {0}, large[8], most = x[0];
    for (int lane = 0; lane < 8; lane++) large[lane] = most;
    for (int64_t s = 0; s + 8 <= n; s += 8)
        for (int lane = 0; lane < 8; lane++) large[lane] = x[s + lane] > large[lane] ? x[s + lane] : large[lane];
    for (int64_t i = n / 8 * 8; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int lane = 0; lane < 8; lane++) most = large[lane] > most ? large[lane] : most;
    for (int64_t s = 0; s < n; s += CHUNK) {
        int64_t m = least(CHUNK, n - s);
        EACH(m) x[s + i] = exp_of(x[s + i] - most), lanes[i] += x[s + i];
    }
    double sum = halved(lanes);
    EACH(n) x[i] = x[i] / sum + floor;
}

/* Of each row of `columns` <= WINDOW elements the Kullback-Leibler divergence of the second input's softmax from the first's, each
 * plus `floor`; `room` is for two rows. Returns whether all are finite (looked at only if `check`). */
int geomerge_divergences(struct work *work, int64_t rows, int64_t columns, double floor, double *room, int check, double *out) {
    const void *raw[MOST];
    double bad = 0, *q = room, *p = room + columns;
    for (int64_t row = 0; row < rows; row++) {
        double lanes[CHUNK] = {0};
        if (!fetch(work, row * columns, columns, raw)) return -1;
        for (int64_t s = 0; s < columns; s += CHUNK) {
            int64_t m = least(CHUNK, columns - s);
            for (int k = 0; k < 2; k++) {
                load_double(raw[k], work->inputs[k].dtype, s, m, room + k * columns + s);
                if (check) bad += odd_double(raw[k], work->inputs[k].dtype, s, m, room + k * columns + s);
            }
        }
        softmax(q, columns, floor);
        softmax(p, columns, floor);
        for (int64_t s = 0; s < columns; s += CHUNK) {
            int64_t m = least(CHUNK, columns - s);
            EACH(m) lanes[i] += p[s + i] * log_of(p[s + i] / q[s + i]);
        }
        out[row] = halved(lanes);
    }
    return bad == 0;
}
