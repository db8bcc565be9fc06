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

/* A row's ranks, PACK more than it has elements, and the steps of the row before. */
struct ranked {
    uint16_t *rank;
    struct steps steps;
};

#ifndef __AVX512BW__
/* Four numbers of each part, from those of PARTS that lie side by side. */
static inline void by_parts(const uint16_t *x, uint64_t *to) {
#if defined __AVX2__ && defined __FMA__
    const __m128i apart = _mm_set_epi8(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0);
    const __m128i a = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)x), apart);
    const __m128i b = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(x + 8)), apart);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi32(a, b)), _mm_storeu_si128((__m128i *)(to + 2), _mm_unpackhi_epi32(a, b));
#else
    for (int p = 0; p < PARTS; p++)
        to[p] = x[p] | (uint64_t)x[PARTS + p] << 16 | (uint64_t)x[2 * PARTS + p] << 32 | (uint64_t)x[3 * PARTS + p] << 48;
#endif
}
#endif

/* The sums of what the PARTS of a row have in `table` for their keys and of numbers that lie side by side: of `part` elements of each. */
static inline void add_looked_up(uint16_t (*restrict table)[KEYS], const uint8_t *restrict key, const uint16_t *restrict before,
                                 uint16_t *restrict sum, int64_t part) {
#ifdef __AVX512BW__
    uint16_t lane[32];
    EACH(32) lane[i] = (uint16_t)(PARTS * i);
    const __m512i lanes = _mm512_loadu_si512(lane);
    for (int p = 0; p < PARTS; p++, before++, key += part, sum += part) {
        __m512i numbers[KEYS / 32];
        EACH(KEYS / 32) numbers[i] = _mm512_loadu_si512(table[p] + 32 * i);
        for (int64_t i = 0; i < part; i += PACK) {
            const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(key + i)));
            const __mmask32 second = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), last = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
            const __m512i a = _mm512_permutex2var_epi16(numbers[0], at, numbers[1]), b = _mm512_permutex2var_epi16(numbers[2], at, numbers[3]);
            const __m512i c = _mm512_permutex2var_epi16(numbers[4], at, numbers[5]), d = _mm512_permutex2var_epi16(numbers[6], at, numbers[7]);
            const __m512i found = _mm512_mask_blend_epi16(last, _mm512_mask_blend_epi16(second, a, b), _mm512_mask_blend_epi16(second, c, d));
            const uint16_t *from = before + PARTS * i;
            const __m512i low = _mm512_permutex2var_epi16(_mm512_loadu_si512(from), lanes, _mm512_loadu_si512(from + 32));
            const __m512i high = _mm512_permutex2var_epi16(_mm512_loadu_si512(from + 64), lanes, _mm512_loadu_si512(from + 96));
            _mm512_storeu_si512(sum + i, _mm512_add_epi16(_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1), found));
        }
    }
#else
    for (int64_t i = 0; i < part; i += 4) { /* four of each part, stored at once */
        uint64_t sums[PARTS];
        by_parts(before + PARTS * i, sums);
        for (int p = 0; p < PARTS; p++) {
            const uint8_t *four = key + p * part + i;
            uint64_t found = 0;
            for (int j = 3; j >= 0; j--) found = found << 16 | table[p][four[j]];
            __asm__("" : "+r"(found)); /* as in count_keys */
            found += sums[p];
            memcpy(sum + p * part + i, &found, sizeof found);
        }
    }
#endif
}

/* The places of those of n keys that are odd, in order, of which `to` has PACK more than that. */
static void odd_places(uint16_t *to, const uint8_t *key, int64_t n) {
#ifdef __AVX512VBMI2__
    uint16_t lanes[32];
    EACH(32) lanes[i] = (uint16_t)i;
    __m512i place = _mm512_loadu_si512(lanes);
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 odd = _mm256_test_epi8_mask(_mm256_loadu_si256((const __m256i *)(key + i)), _mm256_set1_epi8(1));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(odd, place));
        place = _mm512_add_epi16(place, _mm512_set1_epi16(32));
        to += __builtin_popcount(odd);
    }
#else
    for (int64_t i = 0; i < n; i += 32) {
        uint32_t odd = odd_bytes(key + i);
        const int number = __builtin_popcount(odd);
        for (int j = 0; j < number; j += 4) /* four at least: a branch on how many there are costs more */
            for (int l = 0; l < 4; l++, odd &= odd - 1) to[j + l] = (uint16_t)(i + __builtin_ctz(odd | 1u << 31));
        to += number;
    }
#endif
}

/* Numbers, and one more for those of `lanes` that are greater than x; and for those after lane i that equal it. */
#ifdef __AVX512BW__
static inline ints plus_one(ints numbers, __mmask16 where) {
    return (ints)_mm512_mask_add_epi32((__m512i)numbers, where, (__m512i)numbers, _mm512_set1_epi32(1));
}

static inline ints plus_greater(ints numbers, ints lanes, int32_t x) {
    return plus_one(numbers, _mm512_cmpgt_epi32_mask((__m512i)lanes, _mm512_set1_epi32(x)));
}

static inline ints plus_equal(ints numbers, ints lanes, int32_t x, int i) {
    return plus_one(numbers, _mm512_mask_cmpeq_epi32_mask((__mmask16)(0xFFFE << i), (__m512i)lanes, _mm512_set1_epi32(x)));
}
#else
static inline ints plus_greater(ints numbers, ints lanes, int32_t x) { return numbers - (lanes > x); }

static inline ints plus_equal(ints numbers, ints lanes, int32_t x, int i) {
    ints number = {0};
    for (int j = 0; j < LANES(float); j++) number[j] = j;
    return numbers - ((lanes == x) & (number > i));
}
#endif

/* Puts those of odd keys in order, which have ranks as if they were equal: each is compared with all, or, where they are more than FEW, with
 * those that may have its key; with as many as a register holds at once. `first` has the ranks from which on each key's are, and `even` how
 * many of those before have even keys. Whether that took few comparisons; `room` is for three numbers of four bytes of each. */
static int order_odd(const struct keying *keys, uint16_t *rank, int64_t odd, const uint16_t *first,
                     const uint16_t *even, void *room) {
    enum { FEW = 4 * LANES(float) };
    const uint8_t *key = keys->key;
    int32_t *size = room;
    uint16_t *place = (uint16_t *)(size + odd + LANES(float)), *given = place + odd + PACK;
    int64_t left = 4 * keys->n;
    odd_places(odd > FEW ? given : place, key, keys->n);
    EACH(odd) {
        const int64_t from = odd > FEW ? given[i] : place[i], at = odd > FEW ? rank[from] - even[key[from]] : i; /* in the order of keys */
        const float d = fabsf(from_bf16(keys->x[from]) - from_bf16(keys->base[from]));
        memcpy(size + at, &d, sizeof d);
        place[at] = (uint16_t)from;
    }
    for (int i = 0; i < LANES(float); i++) size[odd + i] = INT32_MAX, place[odd + i] = (uint16_t)keys->n;
    for (int64_t at = 0; at < odd; at += LANES(float)) {
        int64_t begin = 0, after = odd;
        if (odd > FEW) {
            const int low = key[place[at]], high = key[place[least(at + LANES(float), odd) - 1]];
            begin = first[low] - even[low], after = first[high + 1] - even[high + 1];
        }
        ints own, before = {0};
        memcpy(&own, size + at, sizeof own);
#pragma GCC unroll 4
        for (int64_t i = begin; i < after; i++) before = plus_greater(before, own, size[i]);
        for (int i = 0; i < LANES(float); i++) before = plus_equal(before, own, size[at + i], i);
        for (int i = 0; i < LANES(float); i++) rank[place[at + i]] = (uint16_t)(even[key[place[at + i]]] + begin + before[i]);
        own -= 1; /* what comes after these is greater where it is equal */
        memcpy(size + at, &own, sizeof own);
        left -= after - begin;
        if (left < 0) return 0;
    }
    return 1;
}

/* How many of the same key come before each in its part of the row, those of a place in the parts side by side; and in all. The parts in
 * step, since a key's count waits for the one before: of a small task vector many are the same. */
static void count_keys(uint16_t *restrict before, const uint8_t *restrict key, int64_t part, uint16_t (*restrict count)[KEYS],
                       struct beside *beside) {
    struct beside own = *beside;
    for (int64_t i = 0; i < part; i += PACK / PARTS)
#pragma GCC unroll 8
        for (int j = 0; j < PACK / PARTS; j++) {
            uint64_t four = 0; /* stored at once: a store for each takes longer than all else */
            do_some(j, &own);
            for (int p = 0; p < PARTS; p++) four |= (uint64_t)count[p][key[p * part + i + j]]++ << 16 * p;
            __asm__("" : "+r"(four)); /* else some compilers make vectors of eight, one element at a time */
            memcpy(before + PARTS * (i + j), &four, sizeof four);
        }
    *beside = own;
}

#if defined __AVX2__ && defined __FMA__ && !defined __AVX512BW__
/* Each the sum of those up to it. */
static inline __m256i sums_of_words(__m256i x) {
    x = _mm256_add_epi16(x, _mm256_bslli_epi128(x, 2)); /* in halves of the register, ... */
    x = _mm256_add_epi16(x, _mm256_bslli_epi128(x, 4));
    x = _mm256_add_epi16(x, _mm256_bslli_epi128(x, 8));
    const __m256i ends = _mm256_shuffle_epi8(x, _mm256_set1_epi16(0x0f0e)); /* ... to the second of which the first one's is added */
    return _mm256_add_epi16(x, _mm256_permute2x128_si256(ends, ends, 0x08));
}
#endif

/* How many elements in all parts have keys before each, and even ones; `count` has from what rank on those of each part are. */
static void sum_keys(uint16_t (*restrict count)[KEYS], uint16_t *restrict first, uint16_t *restrict even) {
#ifdef __AVX512BW__
    const __m512i halves = _mm512_set1_epi32(0xFFFF), last = _mm512_set1_epi32(15);
    __m512i reached = _mm512_setzero_si512(); /* all in the lower halves, even ones in the upper ones */
    for (int k = 0; k < KEYS; k += 32) {
        __m512i each[PARTS], own = _mm512_setzero_si512(); /* an even key's number in lower halves, that of the odd one after it in upper ones */
        for (int p = 0; p < PARTS; p++) each[p] = _mm512_loadu_si512(count[p] + k), own = _mm512_add_epi16(own, each[p]);
        const __m512i upper = _mm512_slli_epi32(own, 16), both = _mm512_add_epi32(_mm512_rol_epi32(own, 16), _mm512_and_si512(own, halves));
        __m512i sums = _mm512_add_epi32(both, _mm512_bslli_epi128(both, 4)); /* in parts of four, ... */
        sums = _mm512_add_epi32(sums, _mm512_bslli_epi128(sums, 8));
        __m512i parts = _mm512_shuffle_epi32(sums, 0xFF); /* ... to which those of the parts before are added */
        parts = _mm512_maskz_shuffle_i64x2(0xFC, parts, parts, 0x90);
        parts = _mm512_add_epi32(parts, _mm512_maskz_shuffle_i64x2(0xFC, parts, parts, 0x90));
        parts = _mm512_add_epi32(parts, _mm512_maskz_shuffle_i64x2(0xF0, parts, parts, 0x40));
        sums = _mm512_add_epi32(sums, parts);
        const __m512i before = _mm512_add_epi32(reached, _mm512_sub_epi32(sums, both));
        const __m512i of_all = _mm512_and_si512(before, halves), of_even = _mm512_srli_epi32(before, 16);
        __m512i start = _mm512_add_epi32(_mm512_or_si512(of_all, _mm512_slli_epi32(of_all, 16)), upper);
        _mm512_storeu_si512(first + k, start);
        for (int p = 0; p < PARTS; p++) _mm512_storeu_si512(count[p] + k, start), start = _mm512_add_epi16(start, each[p]);
        _mm512_storeu_si512(even + k, _mm512_add_epi32(_mm512_or_si512(of_even, _mm512_slli_epi32(of_even, 16)), upper));
        reached = _mm512_add_epi32(reached, _mm512_permutexvar_epi32(last, sums));
    }
    const uint32_t whole = (uint32_t)_mm512_cvtsi512_si32(reached);
    first[KEYS] = (uint16_t)whole, even[KEYS] = (uint16_t)(whole >> 16);
#elif defined __AVX2__ && defined __FMA__
    const __m256i halves = _mm256_set1_epi32(0xFFFF), last = _mm256_set1_epi16(0x0f0e);
    __m256i reached = _mm256_setzero_si256(), reached_even = reached;
    for (int k = 0; k < KEYS; k += 16) {
        __m256i each[PARTS], own = _mm256_setzero_si256();
        for (int p = 0; p < PARTS; p++) each[p] = _mm256_loadu_si256((const __m256i *)(count[p] + k)), own = _mm256_add_epi16(own, each[p]);
        const __m256i own_even = _mm256_and_si256(own, halves), sums = sums_of_words(own), sums_even = sums_of_words(own_even);
        __m256i start = _mm256_add_epi16(reached, _mm256_sub_epi16(sums, own));
        _mm256_storeu_si256((__m256i *)(first + k), start);
        _mm256_storeu_si256((__m256i *)(even + k), _mm256_add_epi16(reached_even, _mm256_sub_epi16(sums_even, own_even)));
        for (int p = 0; p < PARTS; p++) {
            _mm256_storeu_si256((__m256i *)(count[p] + k), start);
            start = _mm256_add_epi16(start, each[p]);
        }
        reached = _mm256_add_epi16(reached, _mm256_shuffle_epi8(_mm256_permute2x128_si256(sums, sums, 0x11), last));
        reached_even = _mm256_add_epi16(reached_even, _mm256_shuffle_epi8(_mm256_permute2x128_si256(sums_even, sums_even, 0x11), last));
    }
    first[KEYS] = (uint16_t)_mm256_extract_epi16(reached, 0), even[KEYS] = (uint16_t)_mm256_extract_epi16(reached_even, 0);
#else
    const uint64_t each = 0x0001000100010001, evens = 0x0000FFFF0000FFFF; /* four at once, as in sum_up */
    uint64_t before = 0, before_even = 0;
    for (int k = 0; k < KEYS; k += 4) {
        uint64_t four[PARTS], own = 0;
        for (int p = 0; p < PARTS; p++) memcpy(four + p, count[p] + k, sizeof own), own += four[p];
        const uint64_t sums = own * each, sums_even = (own & evens) * each, of_even = before_even + (sums_even << 16);
        uint64_t start = before + (sums << 16);
        memcpy(first + k, &start, sizeof start), memcpy(even + k, &of_even, sizeof of_even);
        for (int p = 0; p < PARTS; p++) memcpy(count[p] + k, &start, sizeof start), start += four[p];
        before += (sums >> 48) * each, before_even += (sums_even >> 48) * each;
    }
    first[KEYS] = (uint16_t)before, even[KEYS] = (uint16_t)before_even;
#endif
}

/* The ranks of elements with keys; 0 where it would take longer than to sort. */
static int count_ranks(uint16_t *rank, const struct keying *keys, uint16_t (*count)[KEYS], void *room, struct beside *beside) {
    const int64_t n = keys->n, part = n / (PARTS * PACK) * PACK;
    const uint8_t *key = keys->key;
    uint16_t first[KEYS + 1], even[KEYS + 1];
    /* A register at a time: compilers make string instructions of memset, which take as long to begin as all of this. */
    for (int i = 0; i < PARTS * KEYS / LANES(float) / 2; i++) ((volatile ints *)count)[i] = (ints){0};
    count_keys(room, key, part, count, beside);
    for (int64_t i = PARTS * part; i < n; i++) rank[i] = count[PARTS - 1][key[i]]++;
    sum_keys(count, first, even);
    const int64_t odd = n - even[KEYS];
    if (odd > n / 4) return 0;
    add_looked_up(count, key, room, rank, part);
    for (int64_t i = PARTS * part; i < n; i++) rank[i] = (uint16_t)(rank[i] + count[PARTS - 1][key[i]]);
    return order_odd(keys, rank, odd, first, even, room);
}

/* The ranks of a row, whose keys are made (by the steps of the row before), or begun (`at` is 0). Whether float32 holds the differences;
 * whether there are ranks now. */
static int ranks_by_keys(struct ranked *row, struct keying *keys, uint16_t (*count)[KEYS], void *room, struct beside *beside, int *found) {
    int own = 0, held;
    do {
        if (own || !keys->steps.shift) {
            row->steps = steps_for(keys->x, keys->base, keys->n), own = 1;
            *keys = keying_of(keys->x, keys->base, keys->n, keys->key, row->steps);
        }
        if (keys->at < keys->n) all_keys(keys);
        held = are_held(keys);
        *found = held && count_ranks(row->rank, keys, count, room, beside);
    } while (held && !*found && !own++);
    if (!*found) row->steps.shift = 0;
    return held;
}
