/* Numbers as they are stored and as they are computed with; whether they are finite; sums of lanes. */

#pragma once

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

/* The same of a finite number; and whether a number is not. */
static inline uint16_t finite_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline int32_t not_finite(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits & 0x7F800000) == 0x7F800000;
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

/* Doubles rounded to bfloat16 by way of float32; whether any is not finite there, for which nothing sensible is stored. */
static inline int32_t narrowed(const double *restrict values, int64_t start, int64_t n, void *raw) {
    int32_t odd = 0;
    uint16_t *out = (uint16_t *)raw + start;
    EACH(n) {
        float value = (float)values[i];
        odd |= not_finite(value);
        out[i] = finite_to_bf16(value);
    }
    return odd;
}

/* As many numbers as a register holds, in terms that every compiler has (and turns into what the processor has); for the conversion
 * of bfloat16 and a product that is added in one rounding compilers need to be told how. */
#ifdef __AVX512BW__
#define REGISTER 64
#else
#define REGISTER 32
#endif

typedef float lanes_float __attribute__((vector_size(REGISTER)));
typedef double lanes_double __attribute__((vector_size(REGISTER)));

#define LANES(T) ((int)(REGISTER / sizeof(T)))

#if defined __AVX2__ && defined __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512BW__
static inline lanes_float widened_float(const uint16_t *x) {
    return (lanes_float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

static inline lanes_double widened_double(const uint16_t *x) {
    return (lanes_double)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16)));
}

static inline lanes_float plus_product_float(lanes_float sum, lanes_float a, lanes_float b) {
    return (lanes_float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}

static inline lanes_double plus_product_double(lanes_double sum, lanes_double a, lanes_double b) {
    return (lanes_double)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
}

static inline lanes_double larger_double(lanes_double a, lanes_double b) { return (lanes_double)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined __AVX2__ && defined __FMA__
static inline lanes_float widened_float(const uint16_t *x) {
    return (lanes_float)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
}

static inline lanes_double widened_double(const uint16_t *x) {
    return (lanes_double)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)x)), 16)));
}

static inline lanes_float plus_product_float(lanes_float sum, lanes_float a, lanes_float b) {
    return (lanes_float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}

static inline lanes_double plus_product_double(lanes_double sum, lanes_double a, lanes_double b) {
    return (lanes_double)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
}

static inline lanes_double larger_double(lanes_double a, lanes_double b) { return (lanes_double)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
static inline lanes_float widened_float(const uint16_t *x) {
    lanes_float wide;
    for (int i = 0; i < LANES(float); i++) wide[i] = from_bf16(x[i]);
    return wide;
}

static inline lanes_double widened_double(const uint16_t *x) {
    lanes_double wide;
    for (int i = 0; i < LANES(double); i++) wide[i] = from_bf16(x[i]);
    return wide;
}

static inline lanes_float plus_product_float(lanes_float sum, lanes_float a, lanes_float b) {
    for (int i = 0; i < LANES(float); i++) sum[i] = fmaf(a[i], b[i], sum[i]);
    return sum;
}

static inline lanes_double plus_product_double(lanes_double sum, lanes_double a, lanes_double b) {
    for (int i = 0; i < LANES(double); i++) sum[i] = fma(a[i], b[i], sum[i]);
    return sum;
}

static inline lanes_double larger_double(lanes_double a, lanes_double b) {
    for (int i = 0; i < LANES(double); i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
#endif

typedef lanes_float floats;
typedef int32_t ints __attribute__((vector_size(REGISTER)));
typedef int64_t longs __attribute__((vector_size(REGISTER)));

static inline lanes_double every(double value) { return value - (lanes_double){0}; }
static inline ints all_ints(int32_t value) { return value - (ints){0}; }
static inline floats all(float value) { return value - (floats){0}; }
static inline floats where(ints mask, floats x) { return (floats)(mask & (ints)x); } /* and 0 elsewhere */
static inline floats size_of(floats x) { return (floats)((ints)x & 0x7FFFFFFF); }

static inline ints clamped_int(ints x, int32_t low, int32_t high) {
#if defined __AVX2__ && defined __FMA__ && !defined __AVX512BW__
    return (ints)_mm256_max_epi32(_mm256_min_epi32((__m256i)x, _mm256_set1_epi32(high)), _mm256_set1_epi32(low));
#else
    for (int i = 0; i < LANES(float); i++) x[i] = x[i] < low ? low : x[i] > high ? high : x[i];
    return x;
#endif
}

static inline ints rounded_bf16(floats x) {
    const ints bits = (ints)x;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF;
}

/* Numbers of 16 bits that have room of 32. */
static inline void halves(ints x, uint16_t *out) {
#ifdef __AVX512BW__
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16((__m512i)x));
#else
    for (int i = 0; i < LANES(float); i++) out[i] = (uint16_t)x[i];
#endif
}

/* Numbers of 16 bits as float32. */
static inline floats numbers_of(const uint16_t *x) {
#if defined __AVX2__ && defined __FMA__ && !defined __AVX512BW__
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)));
#else
    floats wide;
    for (int i = 0; i < LANES(float); i++) wide[i] = (float)x[i];
    return wide;
#endif
}

/* Bits of the lanes that are negative, as those of a mask. */
static inline uint32_t lanes_in(ints mask) {
#ifdef __AVX512BW__
    return (uint32_t)_mm512_movepi32_mask((__m512i)mask);
#elif defined __AVX2__ && defined __FMA__
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t found = 0;
    for (int i = 0; i < LANES(float); i++) found |= (uint32_t)(mask[i] < 0) << i;
    return found;
#endif
}

static inline ints smaller_int(ints a, ints b) {
#ifdef __AVX512BW__
    return (ints)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined __AVX2__ && defined __FMA__
    return (ints)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    return (a & (a < b)) | (b & ~(a < b));
#endif
}

/* The larger and the smaller of both, neither a NaN; a sum and another number where x is greater than 0. */
static inline floats larger_float(floats a, floats b) {
#ifdef __AVX512BW__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return (floats)(((ints)a & (a > b)) | ((ints)b & ~(a > b)));
#endif
}

static inline floats smaller_float(floats a, floats b) {
#ifdef __AVX512BW__
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return (floats)(((ints)a & (a < b)) | ((ints)b & ~(a < b)));
#endif
}

static inline floats plus_where_positive(floats sum, floats x, floats more) {
#ifdef __AVX512BW__
    return (floats)_mm512_mask_add_ps((__m512)sum, _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ), (__m512)sum, (__m512)more);
#else
    return sum + where(x > 0, more);
#endif
}

static inline floats plus_product_where_positive(floats sum, floats x, floats factor) { /* x times that, where x is greater than 0 */
#ifdef __AVX512BW__
    return (floats)_mm512_mask3_fmadd_ps((__m512)x, (__m512)factor, (__m512)sum, _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ));
#else
    return sum + where(x > 0, x * factor);
#endif
}

/* Bits of the lanes of a that are less than those of b, and of those that equal them. */
static inline uint32_t less(floats a, floats b) {
#ifdef __AVX512BW__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#else
    return lanes_in(a < b);
#endif
}

static inline uint32_t equal(ints a, ints b) {
#ifdef __AVX512BW__
    return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
#else
    return lanes_in(a == b);
#endif
}

#define PACK 32 /* elements that are looked at, or chosen, together */
#define PACKED (PACK / LANES(float)) /* registers with so many float32 */

/* PACK numbers of 16 bits in registers of float32, or of 32 bits, in the order that takes least: where a register holds half of them, those
 * in the lower halves of its lanes and those in the upper ones. */
#ifdef __AVX512BW__
static inline void packed_halves(__m512i both, floats *to) {
    to[0] = (floats)_mm512_slli_epi32(both, 16), to[1] = (floats)_mm512_and_si512(both, _mm512_set1_epi32(~0xFFFF));
}
#endif

static inline void packed_bf16(const uint16_t *x, floats *to) {
#ifdef __AVX512BW__
    packed_halves(_mm512_loadu_si512(x), to);
#else
    for (int r = 0; r < PACKED; r++) to[r] = widened_float(x + r * LANES(float));
#endif
}

static inline floats one_packed_bf16(const uint16_t *x, int r) { /* one of these registers */
#ifdef __AVX512BW__
    const __m512i both = _mm512_loadu_si512(x);
    return (floats)(r ? _mm512_and_si512(both, _mm512_set1_epi32(~0xFFFF)) : _mm512_slli_epi32(both, 16));
#else
    return widened_float(x + r * LANES(float));
#endif
}

/* Registers of numbers of 16 bits. */
typedef uint16_t words __attribute__((vector_size(REGISTER)));
typedef int16_t whether __attribute__((vector_size(REGISTER)));
static inline words all_words(uint16_t value) { return value - (words){0}; }

static inline words smaller_words(words a, words b) {
#ifdef __AVX512BW__
    return (words)_mm512_min_epu16((__m512i)a, (__m512i)b);
#else
    const whether less = a < b;
    return (a & (words)less) | (b & ~(words)less);
#endif
}

static inline words larger_words(words a, words b) {
#ifdef __AVX512BW__
    return (words)_mm512_max_epu16((__m512i)a, (__m512i)b);
#else
    const whether more = a > b;
    return (a & (words)more) | (b & ~(words)more);
#endif
}

static inline int any_word_above(words a, uint16_t limit) {
#ifdef __AVX512BW__
    return _mm512_cmpgt_epu16_mask((__m512i)a, _mm512_set1_epi16((int16_t)limit)) != 0;
#else
    int found = 0;
    for (int i = 0; i < REGISTER / 2; i++) found |= a[i] > limit;
    return found;
#endif
}

static inline void packed_numbers(const uint16_t *x, floats *to) {
#ifdef __AVX512BW__
    const __m512i both = _mm512_loadu_si512(x);
    to[0] = (floats)_mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xFFFF)));
    to[1] = (floats)_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 16));
#else
    for (int r = 0; r < PACKED; r++) to[r] = numbers_of(x + r * LANES(float));
#endif
}

static inline void unpacked_uppers(const ints *x, uint16_t *to) { /* of the lanes, their upper halves */
#ifdef __AVX512BW__
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32((__m512i)x[0], 16), (__m512i)x[1]));
#else
    for (int r = 0; r < PACKED; r++) halves(x[r] >> 16 & 0xFFFF, to + r * LANES(float));
#endif
}

/* Bits for the elements of a pack, from those for the lanes of its registers. */
static inline uint32_t packed_mask(const uint32_t *lanes) {
#ifdef __AVX512BW__
    return _pdep_u32(lanes[0], 0x55555555) | _pdep_u32(lanes[1], 0xAAAAAAAA);
#else
    uint32_t all = 0;
    for (int r = 0; r < PACKED; r++) all |= lanes[r] << r * LANES(float);
    return all;
#endif
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
    uint64_t words[4], any;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        shorts bits;
        memcpy(&bits, x + i, sizeof bits);
        odd |= (bits & 0x7F80) == 0x7F80;
    }
    memcpy(words, &odd, sizeof words);
    any = words[0] | words[1] | words[2] | words[3];
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

/* The same of raw numbers that nobody has loaded. */
static double odd_raw(const void *raw, int dtype, int64_t start, int64_t n) {
    double x[CHUNK], odd = 0;
    for (int64_t s = 0; s < n; s += CHUNK) {
        const int64_t m = least(CHUNK, n - s);
        if (dtype != BF16) load_double(raw, dtype, start + s, m, x);
        odd += odd_double(raw, dtype, start + s, m, x);
    }
    return odd;
}

/* The sum of CHUNK lanes, half to half. */
static double halved(double *lanes) {
    for (int half = CHUNK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
