/* Keys of a row's magnitudes, by which these are counted (ranks.h). */

#pragma once

/* Magnitudes of differences of bfloat16 numbers in steps, by the powers of two: an even key is for a number alone (most have no more bits
 * than that), the odd one after it for those up to the next; the first and last odd one are for what lies beyond as well, and 0 is for zeros. */
enum {
    KEYS = 256,
    PARTS = 4,     /* of a row, which are counted in step */
    SMALLEST = 127 - 60, /* rows with differences below 2^-60 are left to float64: a biased exponent */
    REACH = 11,          /* from a row's first step on, where sizes alone may tell that float32 holds its differences */
};

/* Which steps a row has: 2^(23 - shift) of them to a power of two, the first being number `begin`; none where shift is 0. */
struct steps { int shift, begin; };

/* As many numbers of both as a register holds, of which `left` are left; 0 beyond. */
struct pair { floats x, base; };

static inline struct pair pair_from(const uint16_t *x, const uint16_t *base, int64_t left) {
    uint16_t padded[2][LANES(float)] = {{0}};
    if (left < LANES(float)) {
        memcpy(padded[0], x, (size_t)left * 2), memcpy(padded[1], base, (size_t)left * 2);
        x = padded[0], base = padded[1];
    }
    return (struct pair){widened_float(x), widened_float(base)};
}

/* Steps for n differences, from some all over that are not 0: 16 to a power of two, of which there are then eight, five of them below the
 * mean exponent; 8, and nine of 16 below it, where exponents differ as much as those of a heavy tail (a normal one's do by 1.6). */
static struct steps steps_for(const uint16_t *x, const uint16_t *base, int64_t n) {
    const int64_t apart = n < 512 ? LANES(float) : n / 256 * LANES(float);
    floats sums = {0}, squares = {0};
    float number = 0, mean = 0, square = 0;
    ints numbers = {0};
    for (int64_t i = 0; i < n; i += apart) {
        const struct pair two = pair_from(x + i, base + i, n - i);
        const ints bits = (ints)size_of(two.x - two.base), some = bits > 0;
        const floats exponent = where(some, __builtin_convertvector(bits, floats) * all(0x1p-23f) - all(127));
        sums += exponent, squares += exponent * exponent, numbers -= some;
    }
    for (int i = 0; i < LANES(float); i++) mean += sums[i], square += squares[i], number += (float)numbers[i];
    if (number == 0) return (struct steps){19, 0};
    mean /= number;
    const int wide = square / number - mean * mean > 2.2f * 2.2f, shift = wide ? 20 : 19;
    return (struct steps){shift, (int)((mean + (wide ? 127 - 9 : 127 - 5)) * (float)(1 << (23 - shift)))};
}

/* Keys that are being made: of n differences, of which the first `at` have theirs. */
struct keying {
    const uint16_t *x, *base;
    uint8_t *key; /* for PACK more */
    int64_t n, at;
    struct steps steps;
    words smallest, largest; /* of the numbers' sizes and of the differences', upper 16 bits */
};

static struct keying keying_of(const uint16_t *x, const uint16_t *base, int64_t n, uint8_t *key, struct steps steps) {
    return (struct keying){.x = x, .base = base, .key = key, .n = n, .steps = steps, .smallest = all_words(0x7FFF)};
}

/* The keys of the next PACK differences, or of what is left where these are not `whole`. */
FUSED more_keys(const int whole, struct keying *keys) {
    const int64_t left = keys->n - keys->at;
    const uint16_t *x = keys->x + keys->at, *base = keys->base + keys->at;
    uint8_t *key = keys->key + keys->at;
    const struct steps steps = keys->steps;
    keys->at += PACK;
#ifdef __AVX512BW__
    const __m512i upper_half = _mm512_set1_epi32(~0xFFFF), size = _mm512_set1_epi16(0x7FFF), even = _mm512_set1_epi16(~1);
    const __m512i one = _mm512_set1_epi16(1), begin = _mm512_set1_epi16((short)(2 * steps.begin)), equal = _mm512_set1_epi16(0x7F00);
    const __m512i beyond = _mm512_set1_epi16((short)((1 << (steps.shift - 16)) - 1));
    const __m128i by = _mm_cvtsi32_si128(steps.shift - 17);
    const __mmask32 inside = whole ? ~(__mmask32)0 : left < PACK ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0;
    const __m512i own = _mm512_mask_loadu_epi16(equal, inside, x), other = _mm512_mask_loadu_epi16(equal, inside, base);
    /* numbers in lower and in upper halves of lanes: the differences' sizes, and what follows these sixteen bits */
    const __m512 low = (__m512)_mm512_slli_epi32(own, 16) - (__m512)_mm512_slli_epi32(other, 16);
    const __m512 high = (__m512)_mm512_and_si512(own, upper_half) - (__m512)_mm512_and_si512(other, upper_half);
    const __m512i d = _mm512_and_si512(_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32((__m512i)low, 16), (__m512i)high), size);
    const __m512i more = _mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)low, _mm512_slli_epi32((__m512i)high, 16));
    const __m512i rest = _mm512_or_si512(more, _mm512_and_si512(d, beyond));
    __m512i at = _mm512_subs_epu16(_mm512_and_si512(_mm512_srl_epi16(d, by), even), begin);
    at = _mm512_mask_add_epi16(at, _mm512_test_epi16_mask(rest, rest), at, one);
    at = _mm512_max_epu16(at, _mm512_min_epu16(d, one));
    _mm256_storeu_si256((__m256i *)key, _mm512_cvtusepi16_epi8(at));
    keys->smallest = smaller_words(keys->smallest, smaller_words((words)_mm512_and_si512(own, size), (words)_mm512_and_si512(other, size)));
    keys->largest = larger_words(keys->largest, (words)d);
#else
    const words even = all_words((uint16_t)~1), one = all_words(1), size = all_words(0x7FFF), begin = all_words((uint16_t)(2 * steps.begin));
    const words beyond = all_words((uint16_t)((1 << (steps.shift - 16)) - 1));
    uint16_t padded[2][PACK];
    if (!whole && left < PACK) {
        EACH(PACK) padded[0][i] = i < left ? x[i] : 0x7F00, padded[1][i] = i < left ? base[i] : 0x7F00;
        x = padded[0], base = padded[1];
    }
    words at[PACK / WORDS];
    for (int r = 0; r < PACK / WORDS; r++) {
        words own, other;
        memcpy(&own, x + r * WORDS, sizeof own), memcpy(&other, base + r * WORDS, sizeof other);
        const ints low = (ints)((floats)((ints)own << 16) - (floats)((ints)other << 16));
        const ints high = (ints)((floats)((ints)own & ~0xFFFF) - (floats)((ints)other & ~0xFFFF));
        const words d = lower_and_upper((words)(low >> 16), (words)high) & size, more = lower_and_upper((words)low, (words)(high << 16));
        at[r] = larger_words(d >> (steps.shift - 17) & even, begin) - begin;
        at[r] += one + (words)((more | (d & beyond)) == 0);
        at[r] = larger_words(at[r], smaller_words(d, one));
        keys->smallest = smaller_words(keys->smallest, smaller_words(own & size, other & size));
        keys->largest = larger_words(keys->largest, d);
    }
    packed_bytes(at, key);
#endif
}

static void all_keys(struct keying *keys) {
    while (keys->at + PACK <= keys->n) more_keys(1, keys);
    while (keys->at < keys->n) more_keys(0, keys);
    memset(keys->key + keys->n, 0, PACK);
}

/* Whether float32 holds each difference (which is when adding it back gives either number, for what it loses of the larger one shows
 * there), and none is so small that arithmetic with it may be lost. Most often sizes tell that: a difference is a multiple of the smaller
 * number's last bit, 2^-7 of its power of two, so that below 2^17 of this it has 24 bits at most. */
static int are_held(const struct keying *keys) {
    const int most = ((keys->steps.begin >> (23 - keys->steps.shift)) + REACH) << 7, few = most - (16 << 7);
    if (few >= (SMALLEST + 7) << 7 && most < 0x7F80 && !any_word_below(keys->smallest, (uint16_t)few) && !any_word_above(keys->largest, (uint16_t)most))
        return 1;
    ints lost = {0};
    for (int64_t i = 0; i < keys->n; i += LANES(float)) {
        const struct pair two = pair_from(keys->x + i, keys->base + i, keys->n - i);
        const floats d = two.x - two.base;
        const ints bits = (ints)size_of(d);
        lost |= (ints)((two.x - d) - two.base) | (ints)((d + two.base) - two.x);
        lost |= (bits < SMALLEST << 23) & (bits != 0);
    }
    return !lanes_in(lost != 0);
}
