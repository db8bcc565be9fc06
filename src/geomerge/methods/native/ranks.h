/* The ranks of magnitudes in a row, equal ones by index. */

#pragma once

static inline int64_t pattern(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return bits & INT64_MAX;
}

/* A magnitude's bits but the last ones, in whose place its index is: numbers in the order of the magnitudes, equal ones by index. */
#define INDEX 0xFFFF

struct sized { double size; int64_t index; };

static int smaller(const void *left, const void *right) {
    const struct sized *a = left, *b = right;
    return a->size != b->size ? (a->size > b->size) - (a->size < b->size) : (a->index > b->index) - (a->index < b->index);
}

static inline int after(const double *d, int64_t a, int64_t b, int exactly) {
    if (!exactly) return a > b;
    struct sized left = {fabs(d[a & INDEX]), a & INDEX}, right = {fabs(d[b & INDEX]), b & INDEX};
    return smaller(&left, &right) > 0;
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

/* The places of n <= WINDOW elements in the order of their magnitudes, equal ones by index: first by some bits of these, from a
 * sixteenth of their mean on over eight octaves (what lies beyond counts as the end), then what is left is mended. `room` is for
 * three numbers of each element. */
static void ranks(const double *restrict d, int64_t n, uint16_t *restrict rank, int64_t *restrict room) {
    enum { MOST_BITS = 12, OCTAVES = 8, BELOW_MEAN = 4 };
    const int width = n < 2048 ? 10 : MOST_BITS, shift = 55 - width;
    double lanes[8] = {0}, sum_of = 0;
    int64_t whole = n / 8 * 8, lost = 0;
    for (int64_t i = 0; i < whole; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += fabs(d[i + j]);
    for (int j = 0; j < 8; j++) sum_of += lanes[j];
    for (int64_t i = whole; i < n; i++) sum_of += fabs(d[i]);
    const int64_t floor = ((pattern(sum_of / (double)n) >> 52) - BELOW_MEAN) * ((int64_t)1 << 52);
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
        struct sized *all = (struct sized *)(room + n);
        for (int64_t k = 0; k < n; k++) all[k] = (struct sized){fabs(d[k]), k};
        qsort(all, (size_t)n, sizeof *all, smaller);
        for (int64_t k = 0; k < n; k++) room[k] = all[k].index;
    }
    for (int64_t k = 0; k < n; k++) rank[room[k] & INDEX] = (uint16_t)k;
}

/* Magnitudes of differences of bfloat16 numbers in steps of a sixteenth of a power of two, over eight octaves, of which the sixth has
 * their mean: an even key is for a number alone (most have no more bits than that), the odd one after it for those up to the next; the
 * ends are for what lies beyond as well, and 0 is for zeros. */
enum {
    KEYS = 256,
    STEPS = 16, /* in an octave */
    MEAN_AT = 5,
    BLOCK = 64,          /* elements that are looked at together */
    SMALLEST = 127 - 60, /* rows with differences below 2^-60 are left to float64: a biased exponent */
};

/* A row's ranks and what they are found with, each for BLOCK elements more than the row has. */
struct ranked {
    uint16_t *rank, *place;
    uint8_t *key;
};

typedef uint8_t keys_of_lanes __attribute__((vector_size(REGISTER / 4)));

/* The keys of n differences, of which float32 holds each, the mean being that of some all over that are not 0. Whether none
 * in whole registers is so small that arithmetic with it may be lost. */
static int keyed(uint8_t *restrict key, const uint16_t *x, const uint16_t *base, int64_t n) {
    const int shift = 19, below = (1 << shift) - 1; /* the bits beyond a sixteenth */
    const int64_t whole = n / LANES(float) * LANES(float), apart = whole < 512 ? LANES(float) : whole / 256 * LANES(float);
    floats sums = {0};
    ints numbers = {0};
    float sum = 0, number = 1;
    int32_t mean;
    for (int64_t i = 0; i < whole; i += apart) {
        const floats size = size_of(widened_float(x + i) - widened_float(base + i));
        sums += size, numbers -= size > 0;
    }
    for (int i = 0; i < LANES(float); i++) sum += sums[i], number += (float)numbers[i];
    for (int64_t i = whole; i < n && whole == 0; i++, number++) sum += fabsf(from_bf16(x[i]) - from_bf16(base[i]));
    sum /= number;
    memcpy(&mean, &sum, sizeof mean);
    const int32_t begin = ((mean >> 23) - MEAN_AT) * 2 * STEPS, most = KEYS - 1, tiny = SMALLEST << 23;
    ints lost = {0};
    for (int64_t i = 0; i < whole; i += LANES(float)) {
        const ints bits = (ints)size_of(widened_float(x + i) - widened_float(base + i)), zero = bits == 0;
        const ints at = clamped_int((bits >> shift) * 2 - ((bits & below) != 0) - begin, 1, most);
        lost |= (bits < tiny) & ~zero;
        const keys_of_lanes narrow = __builtin_convertvector(at & ~zero, keys_of_lanes);
        memcpy(key + i, &narrow, sizeof narrow);
    }
    for (int64_t i = whole; i < n; i++) {
        int32_t bits;
        const float size = fabsf(from_bf16(x[i]) - from_bf16(base[i]));
        memcpy(&bits, &size, sizeof bits);
        const int32_t at = (bits >> shift) * 2 + ((bits & below) != 0) - begin;
        key[i] = (uint8_t)(bits == 0 ? 0 : at < 1 ? 1 : at > most ? most : at);
    }
    memset(key + n, 0, BLOCK);
    return !lanes_in(lost);
}

/* Adds what a table has for each key of a block. */
static inline void add_looked_up(const uint16_t *table, const uint8_t *key, uint16_t *sum) {
#ifdef __AVX512BW__
    __m512i part[KEYS / 32];
    for (int i = 0; i < KEYS / 32; i++) part[i] = _mm512_loadu_si512(table + 32 * i);
    for (int i = 0; i < BLOCK; i += 32) {
        const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(key + i)));
        const __mmask32 second = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), last = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
        const __m512i a = _mm512_permutex2var_epi16(part[0], at, part[1]), b = _mm512_permutex2var_epi16(part[2], at, part[3]);
        const __m512i c = _mm512_permutex2var_epi16(part[4], at, part[5]), d = _mm512_permutex2var_epi16(part[6], at, part[7]);
        const __m512i found = _mm512_mask_blend_epi16(last, _mm512_mask_blend_epi16(second, a, b), _mm512_mask_blend_epi16(second, c, d));
        _mm512_storeu_si512(sum + i, _mm512_add_epi16(_mm512_loadu_si512(sum + i), found));
    }
#else
    EACH(BLOCK) sum[i] = (uint16_t)(sum[i] + table[key[i]]);
#endif
}

/* Bits of a block's elements that have odd keys. */
static inline uint64_t odd_keys(const uint8_t *key) {
#ifdef __AVX512BW__
    return _mm512_test_epi8_mask(_mm512_loadu_si512(key), _mm512_set1_epi8(1));
#else
    uint64_t found = 0;
    for (int i = 0; i < BLOCK; i++) found |= (uint64_t)(key[i] & 1) << i;
    return found;
#endif
}

/* Puts those of odd keys in order; `first` is the rank from which on each key's are. Whether that took few
 * moves. */
static int order_odd(const struct ranked *row, const uint16_t *x, const uint16_t *base, int64_t n, const uint16_t *first) {
    int64_t left = 4 * n;
    for (int64_t begin = 0; begin < n; begin += BLOCK)
        for (uint64_t some = odd_keys(row->key + begin); some; some &= some - 1) {
            const int64_t index = begin + __builtin_ctzll(some);
            const float size = fabsf(from_bf16(x[index]) - from_bf16(base[index]));
            int64_t rank = row->rank[index];
            const int64_t lowest = first[row->key[index]];
            for (; rank > lowest; rank--, left--) { /* those before it by index are in order */
                const int64_t other = row->place[rank - 1];
                if (fabsf(from_bf16(x[other]) - from_bf16(base[other])) <= size) break;
                row->place[rank] = (uint16_t)other;
                row->rank[other] = (uint16_t)rank;
            }
            row->place[rank] = (uint16_t)index;
            row->rank[index] = (uint16_t)rank;
            if (left < 0) return 0;
        }
    return 1;
}

/* The ranks of n elements with keys; 0 where it would take longer than to sort. */
static int count_ranks(const struct ranked *row, const uint16_t *x, const uint16_t *base, int64_t n) {
    enum { PARTS = 4 }; /* in step, since a key's count waits for the one before: of a small task vector many are the same */
    const int64_t part = n / (PARTS * BLOCK) * BLOCK;
    uint16_t count[PARTS][KEYS] = {{0}}, first[KEYS], *restrict rank = row->rank;
    const uint8_t *restrict key = row->key;
    int64_t odd = 0;
    EACH(part) { /* how many of the same key come before each, ... */
        rank[i] = count[0][key[i]]++;
        rank[i + part] = count[1][key[i + part]]++;
        rank[i + 2 * part] = count[2][key[i + 2 * part]]++;
        rank[i + 3 * part] = count[3][key[i + 3 * part]]++;
    }
    for (int64_t i = PARTS * part; i < n; i++) rank[i] = count[PARTS - 1][key[i]]++;
    EACH(KEYS) first[i] = (uint16_t)(count[0][i] + count[1][i] + count[2][i] + count[3][i]);
    for (int i = 1; i < KEYS; i += 2) odd += first[i];
    if (odd > n / 8) return 0;
    sum_up(first, KEYS);
    uint16_t start[KEYS];
    memcpy(start, first, sizeof start);
    for (int p = 0; p < PARTS; p++) { /* ... and in the parts before, and of the keys before */
        for (int64_t i = p * part; i < (p + 1 < PARTS ? (p + 1) * part : n); i += BLOCK) add_looked_up(start, key + i, rank + i);
        EACH(KEYS) start[i] = (uint16_t)(start[i] + count[p][i]);
    }
    return order_odd(row, x, base, n, first);
}
