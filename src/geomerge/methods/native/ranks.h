/* The ranks of magnitudes in a row, equal ones by index. */

#pragma once

static inline int64_t pattern(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return bits & INT64_MAX;
}

/* A magnitude's bits but the last ones, in whose place its index is: numbers in the order of the magnitudes, equal ones by index. */
#define INDEX 0xFFFF

static inline int after(const double *d, int64_t a, int64_t b, int exactly) {
    if (!exactly) return a > b;
    const int64_t left = pattern(d[a & INDEX]), right = pattern(d[b & INDEX]);
    return left != right ? left > right : (a & INDEX) > (b & INDEX);
}

/* Puts in order what nearly is: each that is less than the one before goes back to its place. Whether that took few moves. */
static inline __attribute__((always_inline)) int mend(const double *restrict d, int64_t n, int64_t *restrict packed, int exactly) {
    int64_t left = 16 * n, before = packed[0];
    for (int64_t k = 1; k < n; k++) {
        int64_t moved = packed[k];
        if (!after(d, before, moved, exactly)) {
            before = moved;
            continue;
        }
        int64_t j = k;
        for (; j && after(d, packed[j - 1], moved, exactly); j--, left--) packed[j] = packed[j - 1];
        packed[j] = moved;
        if (left < 0) return 0;
    }
    return 1;
}

/* Each count becomes the sum of those before it. */
static inline void sum_up(uint16_t *count, int number) {
#ifdef __AVX512BW__
    const __m512i last = _mm512_set1_epi16(31);
    const __m512i end_of = _mm512_set_epi64(0x0f0e0f0e0f0e0f0e, 0x0f0e0f0e0f0e0f0e, 0x0f0e0f0e0f0e0f0e, 0x0f0e0f0e0f0e0f0e,
                                            0x0f0e0f0e0f0e0f0e, 0x0f0e0f0e0f0e0f0e, 0x0f0e0f0e0f0e0f0e, 0x0f0e0f0e0f0e0f0e);
    __m512i reached = _mm512_setzero_si512();
    for (int k = 0; k < number; k += 32) {
        const __m512i own = _mm512_loadu_si512(count + k);
        __m512i sums = _mm512_add_epi16(own, _mm512_bslli_epi128(own, 2)); /* in parts of eight, ... */
        sums = _mm512_add_epi16(sums, _mm512_bslli_epi128(sums, 4));
        sums = _mm512_add_epi16(sums, _mm512_bslli_epi128(sums, 8));
        __m512i parts = _mm512_shuffle_epi8(sums, end_of); /* ... to which those of the parts before are added */
        parts = _mm512_maskz_shuffle_i64x2(0xFC, parts, parts, 0x90);
        parts = _mm512_add_epi16(parts, _mm512_maskz_shuffle_i64x2(0xFC, parts, parts, 0x90));
        parts = _mm512_add_epi16(parts, _mm512_maskz_shuffle_i64x2(0xF0, parts, parts, 0x40));
        sums = _mm512_add_epi16(sums, parts);
        _mm512_storeu_si512(count + k, _mm512_add_epi16(reached, _mm512_sub_epi16(sums, own)));
        reached = _mm512_add_epi16(reached, _mm512_permutexvar_epi16(last, sums));
    }
#else
    const uint64_t each = 0x0001000100010001; /* four at once */
    uint64_t before = 0;
    for (int k = 0; k < number; k += 4) {
        uint64_t four;
        memcpy(&four, count + k, sizeof four);
        const uint64_t sums = four * each, firsts = before + (sums << 16);
        memcpy(count + k, &firsts, sizeof firsts);
        before += (sums >> 48) * each;
    }
#endif
}

/* The places of n <= WINDOW elements in the order of their magnitudes, equal ones by index: first by some bits of these, from ten
 * powers of two below their mean exponent on over sixteen (what lies beyond counts as the end), then what is left is mended. `room` is for
 * four numbers of each element. */
static void ranks(const double *restrict d, int64_t n, uint16_t *restrict rank, int64_t *restrict room) {
    enum { MOST_BITS = 12, OCTAVES = 16, BELOW_MEAN = 10 };
    const int width = n < 2048 ? 10 : MOST_BITS, shift = 56 - width;
    int64_t sum = 0, number = 1, lost = 0;
    EACH(n) {
        const int64_t bits = pattern(d[i]) >> 32;
        sum += bits, number += bits != 0;
    }
    const int64_t floor = ((sum / number << 12 >> 32) - BELOW_MEAN) * ((int64_t)1 << 52);
    const int64_t most = (int64_t)OCTAVES << 52;
    uint16_t *restrict digits = rank;
    for (int64_t i = 0; i < n; i++) {
        int64_t bits = pattern(d[i]), key = bits - floor;
        lost |= bits;
        digits[i] = (uint16_t)((key < 0 ? 0 : key >= most ? most - 1 : key) >> shift);
    }
    uint16_t place[1 << MOST_BITS];
    memset(place, 0, sizeof *place << width);
    for (int64_t i = 0; i < n; i++) place[digits[i]]++;
    sum_up(place, 1 << width);
    for (int64_t i = 0; i < n; i++) room[place[digits[i]]++] = (pattern(d[i]) & ~(int64_t)INDEX) | i;
    if (!mend(d, n, room, 0) || ((lost & INDEX) && !mend(d, n, room, 1))) {
        struct placed *all = (struct placed *)room;
        EACH(n) all[i] = (struct placed){(uint64_t)pattern(d[i]), i};
        all = sorted_places(n, all, all + n);
        EACH(n) rank[all[i].index] = (uint16_t)i;
        return;
    }
    for (int64_t k = 0; k < n; k++) rank[room[k] & INDEX] = (uint16_t)k;
}

/* Magnitudes of differences of bfloat16 numbers in steps, by the powers of two: an even key is for a number alone (most have no more bits
 * than that), the odd one after it for those up to the next; the first and last odd one are for what lies beyond as well, and 0 is for zeros. */
enum {
    KEYS = 256,
    TOGETHER = 64, /* elements that are looked at together */
    PARTS = 4,     /* of a row, which are counted in step */
    SMALLEST = 127 - 60, /* rows with differences below 2^-60 are left to float64: a biased exponent */
};

/* A row's ranks and what they are found with. There are TOGETHER more of each than the row has elements, but for `place`. */
struct ranked {
    uint16_t *rank, *place;
    uint8_t *key;
};

/* Which steps a row has: 2^(23 - shift) of them to a power of two, the first being number `begin`. */
struct steps { int shift, begin; };

typedef uint8_t keys_of_lanes __attribute__((vector_size(REGISTER / 4)));

static inline float size_at(const uint16_t *x, const uint16_t *base, int64_t i) { return fabsf(from_bf16(x[i]) - from_bf16(base[i])); }

/* The sizes of the next differences, of which `left` are left; 0 beyond. */
static inline floats sizes_from(const uint16_t *x, const uint16_t *base, int64_t left) {
    uint16_t padded[2][LANES(float)] = {{0}};
    if (left < LANES(float)) {
        memcpy(padded[0], x, (size_t)left * 2), memcpy(padded[1], base, (size_t)left * 2);
        x = padded[0], base = padded[1];
    }
    return size_of(widened_float(x) - widened_float(base));
}

/* Steps for n differences, from some all over that are not 0: 16 to a power of two, of which there are then eight, five of them below the
 * mean exponent; 8, and nine of 16 below it, where exponents differ as much as those of a heavy tail (a normal one's do by 1.6). */
static struct steps steps_for(const uint16_t *x, const uint16_t *base, int64_t n) {
    const int64_t apart = n < 512 ? LANES(float) : n / 256 * LANES(float);
    floats sums = {0}, squares = {0};
    float number = 0, mean = 0, square = 0;
    ints numbers = {0};
    for (int64_t i = 0; i < n; i += apart) {
        const ints bits = (ints)sizes_from(x + i, base + i, n - i), some = bits > 0;
        const floats exponent = where(some, __builtin_convertvector(bits, floats) * all(0x1p-23f) - all(127));
        sums += exponent, squares += exponent * exponent, numbers -= some;
    }
    for (int i = 0; i < LANES(float); i++) mean += sums[i], square += squares[i], number += (float)numbers[i];
    if (number == 0) return (struct steps){19, 0};
    mean /= number;
    const int wide = square / number - mean * mean > 2.2f * 2.2f, shift = wide ? 20 : 19;
    return (struct steps){shift, (int)((mean + (wide ? 127 - 9 : 127 - 5)) * (float)(1 << (23 - shift)))};
}

/* The keys of n differences, of which float32 holds each. Whether none is so small that arithmetic with it may be lost. */
static int keyed(uint8_t *restrict key, const uint16_t *x, const uint16_t *base, int64_t n) {
    const struct steps steps = steps_for(x, base, n);
    const int beyond = (1 << steps.shift) - 1;
    ints lost = {0};
    for (int64_t i = 0; i < n; i += LANES(float)) {
        const ints bits = (ints)sizes_from(x + i, base + i, n - i), zero = bits == 0, odd = (bits & beyond) != 0; /* -1 where true */
        const ints at = clamped_int(((bits >> steps.shift) - steps.begin) * 2 - odd, 1, KEYS - 1);
        const keys_of_lanes narrow = __builtin_convertvector(at & ~zero, keys_of_lanes);
        lost |= (bits < SMALLEST << 23) & ~zero;
        memcpy(key + i, &narrow, sizeof narrow);
    }
    memset(key + n, 0, TOGETHER);
    return !lanes_in(lost);
}

/* Adds what a table has for each of some keys. */
static inline void add_looked_up(const uint16_t *table, const uint8_t *key, uint16_t *sum) {
#ifdef __AVX512BW__
    __m512i part[KEYS / 32];
    for (int i = 0; i < KEYS / 32; i++) part[i] = _mm512_loadu_si512(table + 32 * i);
    for (int i = 0; i < TOGETHER; i += 32) {
        const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(key + i)));
        const __mmask32 second = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), last = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
        const __m512i a = _mm512_permutex2var_epi16(part[0], at, part[1]), b = _mm512_permutex2var_epi16(part[2], at, part[3]);
        const __m512i c = _mm512_permutex2var_epi16(part[4], at, part[5]), d = _mm512_permutex2var_epi16(part[6], at, part[7]);
        const __m512i found = _mm512_mask_blend_epi16(last, _mm512_mask_blend_epi16(second, a, b), _mm512_mask_blend_epi16(second, c, d));
        _mm512_storeu_si512(sum + i, _mm512_add_epi16(_mm512_loadu_si512(sum + i), found));
    }
#else
    EACH(TOGETHER) sum[i] = (uint16_t)(sum[i] + table[key[i]]);
#endif
}

/* Bits of some elements that have odd keys. */
static inline uint64_t odd_keys(const uint8_t *key) {
#ifdef __AVX512BW__
    return _mm512_test_epi8_mask(_mm512_loadu_si512(key), _mm512_set1_epi8(1));
#else
    uint64_t found = 0;
    for (int i = 0; i < TOGETHER; i++) found |= (uint64_t)(key[i] & 1) << i;
    return found;
#endif
}

/* Puts those of odd keys in order; `first` is the rank from which on each key's are. Whether that took few
 * moves. */
static int order_odd(const struct ranked *row, const uint16_t *x, const uint16_t *base, int64_t n, const uint16_t *first) {
    int64_t left = 4 * n;
    for (int64_t begin = 0; begin < n; begin += TOGETHER)
        for (uint64_t some = odd_keys(row->key + begin); some; some &= some - 1) {
            const int64_t index = begin + __builtin_ctzll(some);
            const float size = size_at(x, base, index);
            int64_t rank = row->rank[index];
            const int64_t lowest = first[row->key[index]];
            for (; rank > lowest; rank--, left--) { /* those before it by index are in order */
                const int64_t other = row->place[rank - 1];
                if (size_at(x, base, other) <= size) break;
                row->place[rank] = (uint16_t)other;
                row->rank[other] = (uint16_t)rank;
            }
            row->place[rank] = (uint16_t)index;
            row->rank[index] = (uint16_t)rank;
            if (left < 0) return 0;
        }
    return 1;
}

/* How many of the same key come before each in its part of the row; and in all. The parts in step, since a key's count waits for the one
 * before: of a small task vector many are the same. */
static void count_keys(uint16_t *restrict rank, const uint8_t *restrict key, int64_t part, int64_t n, uint16_t (*restrict count)[KEYS]) {
    EACH(part) for (int p = 0; p < PARTS; p++) rank[p * part + i] = count[p][key[p * part + i]]++;
    for (int64_t i = PARTS * part; i < n; i++) rank[i] = count[PARTS - 1][key[i]]++;
}

/* The ranks of n elements with keys; 0 where it would take longer than to sort. */
static int count_ranks(const struct ranked *row, const uint16_t *x, const uint16_t *base, int64_t n) {
    const int64_t part = n / (PARTS * TOGETHER) * TOGETHER;
    uint16_t count[PARTS][KEYS] = {{0}}, first[KEYS] = {0}, start[KEYS];
    int64_t odd = 0;
    count_keys(row->rank, row->key, part, n, count);
    for (int p = 0; p < PARTS; p++) EACH(KEYS) first[i] = (uint16_t)(first[i] + count[p][i]);
    for (int i = 1; i < KEYS; i += 2) odd += first[i];
    if (odd > n / 4) return 0;
    sum_up(first, KEYS);
    memcpy(start, first, sizeof start);
    for (int p = 0; p < PARTS; p++) { /* and how many in the parts before, and of the keys before */
        const int64_t end = p + 1 < PARTS ? (p + 1) * part : n;
        for (int64_t i = p * part; i < end; i += TOGETHER) add_looked_up(start, row->key + i, row->rank + i);
        EACH(KEYS) start[i] = (uint16_t)(start[i] + count[p][i]);
    }
    return order_odd(row, x, base, n, first);
}
