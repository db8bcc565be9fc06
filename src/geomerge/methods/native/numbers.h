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

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
typedef uint32_t unsigned_ints __attribute__((vector_size(REGISTER)));
typedef int64_t longs __attribute__((vector_size(REGISTER)));

static inline lanes_double every(double value) { return value - (lanes_double){0}; }
static inline ints all_ints(int32_t value) { return value - (ints){0}; }
static inline floats all(float value) { return value - (floats){0}; }
static inline floats where(ints mask, floats x) { return (floats)(mask & (ints)x); } /* and 0 elsewhere */
static inline floats size_of(floats x) { return (floats)((ints)x & 0x7FFFFFFF); }

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
#elif defined __AVX2__ && defined __FMA__
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (floats)(((ints)a & (a > b)) | ((ints)b & ~(a > b)));
#endif
}

static inline floats smaller_float(floats a, floats b) {
#ifdef __AVX512BW__
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined __AVX2__ && defined __FMA__
    return (floats)_mm256_min_ps((__m256)a, (__m256)b);
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

/* Lanes of which something is true, as the processor tells them; bits for them. */
#ifdef __AVX512BW__
typedef uint32_t marks;
static inline marks less(floats a, floats b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
static inline marks equal(ints a, ints b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
static inline uint32_t marked(marks of) { return of; }
#else
typedef ints marks;
static inline marks less(floats a, floats b) { return a < b; }
static inline marks equal(ints a, ints b) { return a == b; }
static inline uint32_t marked(marks of) { return lanes_in(of); }
#endif

#define PACK 32 /* elements that are looked at, or chosen, together */
#define PACKED (PACK / LANES(float)) /* registers with so many float32 */

/* Registers of numbers of 16 bits. */
typedef uint16_t words __attribute__((vector_size(REGISTER)));
typedef int16_t whether __attribute__((vector_size(REGISTER)));
#define WORDS (REGISTER / 2)
static inline words all_words(uint16_t value) { return value - (words){0}; }

static inline words smaller_words(words a, words b) {
#ifdef __AVX512BW__
    return (words)_mm512_min_epu16((__m512i)a, (__m512i)b);
#elif defined __AVX2__ && defined __FMA__
    return (words)_mm256_min_epu16((__m256i)a, (__m256i)b);
#else
    const whether less = a < b;
    return (a & (words)less) | (b & ~(words)less);
#endif
}

static inline words larger_words(words a, words b) {
#ifdef __AVX512BW__
    return (words)_mm512_max_epu16((__m512i)a, (__m512i)b);
#elif defined __AVX2__ && defined __FMA__
    return (words)_mm256_max_epu16((__m256i)a, (__m256i)b);
#else
    const whether more = a > b;
    return (a & (words)more) | (b & ~(words)more);
#endif
}

static inline words capped_sum(words a, words b) { /* at most 0xFFFF */
#ifdef __AVX512BW__
    return (words)_mm512_adds_epu16((__m512i)a, (__m512i)b);
#elif defined __AVX2__ && defined __FMA__
    return (words)_mm256_adds_epu16((__m256i)a, (__m256i)b);
#else
    return a + smaller_words(b, ~a);
#endif
}

static inline words chosen_words(words mask, words a, words b) { /* of a where the mask's bits are 1, else of b */
#if defined __AVX2__ && defined __FMA__ && !defined __AVX512BW__
    return (words)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)mask);
#else
    return (a & mask) | (b & ~mask);
#endif
}

static inline words upper_product(words a, words b) { /* its upper 16 bits */
#ifdef __AVX512BW__
    return (words)_mm512_mulhi_epu16((__m512i)a, (__m512i)b);
#elif defined __AVX2__ && defined __FMA__
    return (words)_mm256_mulhi_epu16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < WORDS; i++) a[i] = (uint16_t)((uint32_t)a[i] * b[i] >> 16);
    return a;
#endif
}

static inline int any_word_above(words a, uint16_t limit) {
    const words over = larger_words(a, all_words(limit)) - all_words(limit);
    uint64_t parts[REGISTER / 8], any = 0;
    memcpy(parts, &over, sizeof over);
    EACH(REGISTER / 8) any |= parts[i];
    return any != 0;
}

static inline int any_word_below(words a, uint16_t limit) { return any_word_above(~a, (uint16_t)~limit); }

/* Lanes of 32 bits with the lower halves of those of a and the upper ones of b. */
static inline words lower_and_upper(words a, words b) {
#ifdef __AVX512BW__
    return (words)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)a, (__m512i)b);
#elif defined __AVX2__ && defined __FMA__
    return (words)_mm256_blend_epi16((__m256i)a, (__m256i)b, 0xAA);
#else
    return (words)(((ints)a & 0xFFFF) | ((ints)b & ~0xFFFF));
#endif
}

/* PACK numbers of 16 bits in registers of 32 bits, in the order that takes least: for each register of words those in the lower halves of
 * its lanes, then those in the upper ones. */
static inline words words_at(const uint16_t *x, int r) { /* of the r-th of these registers */
    words both;
    memcpy(&both, x + r / 2 * WORDS, sizeof both);
    return both;
}

static inline floats half_bf16(words both, int r) { return (floats)(r % 2 ? (ints)both & ~0xFFFF : (ints)both << 16); }

static inline floats half_numbers(words both, int r) {
    const ints numbers = r % 2 ? (ints)((unsigned_ints)both >> 16) : (ints)both & 0xFFFF;
    return __builtin_convertvector(numbers, floats);
}

static inline floats one_packed_bf16(const uint16_t *x, int r) { return half_bf16(words_at(x, r), r); }

static inline void unpacked_uppers(const ints *x, uint16_t *to) { /* of the lanes, their upper halves */
    for (int r = 0; r < PACKED; r += 2) {
        const words both = lower_and_upper((words)(x[r] >> 16), (words)x[r + 1]);
        memcpy(to + r / 2 * WORDS, &both, sizeof both);
    }
}

/* Bits for the elements of a pack, from those for the lanes of its registers. */
static inline uint32_t packed_mask(const uint32_t *lanes) {
    uint32_t lower = 0, upper = 0;
    for (int r = 0; r < PACKED; r += 2) lower |= lanes[r] << r / 2 * LANES(float), upper |= lanes[r + 1] << r / 2 * LANES(float);
#if defined __BMI2__ && defined __AVX2__ && defined __FMA__
    return _pdep_u32(lower, 0x55555555) | _pdep_u32(upper, 0xAAAAAAAA);
#else
    uint32_t all = 0;
    for (int i = 0; i < PACK / 2; i++) all |= (lower >> i & 1) << 2 * i | (upper >> i & 1) << (2 * i + 1);
    return all;
#endif
}

/* Bits for the elements of a pack: for words of which all bits are 1, else 0. */
static inline uint32_t packed_bits(const words *x) {
#if defined __AVX2__ && defined __FMA__ && !defined __AVX512BW__
    return (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16((__m256i)x[0], (__m256i)x[1]), 0xD8));
#else
    uint32_t all = 0;
    for (int i = 0; i < PACK; i++) all |= (uint32_t)(x[i / WORDS][i % WORDS] & 1) << i;
    return all;
#endif
}

/* PACK words below 2^15 as bytes, of which the largest is for those beyond. */
static inline void packed_bytes(const words *x, uint8_t *to) {
#if defined __AVX2__ && defined __FMA__ && !defined __AVX512BW__
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packus_epi16((__m256i)x[0], (__m256i)x[1]), 0xD8));
#else
    for (int i = 0; i < PACK; i++) to[i] = (uint8_t)least(x[i / WORDS][i % WORDS], 0xFF);
#endif
}

/* Bits of the odd ones of PACK bytes. */
static inline uint32_t odd_bytes(const uint8_t *x) {
#if defined __AVX2__ && defined __FMA__
    return (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(_mm256_loadu_si256((const __m256i *)x), 7));
#else
    uint32_t odd = 0;
    for (int i = 0; i < PACK; i += 8) {
        uint64_t eight;
        memcpy(&eight, x + i, sizeof eight);
        odd |= (uint32_t)((eight & 0x0101010101010101) * 0x0102040810204080 >> 56) << i;
    }
    return odd;
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
