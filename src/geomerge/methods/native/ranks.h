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

typedef uint16_t shorts_u __attribute__((vector_size(REGISTER)));

/* Magnitudes of differences of bfloat16 numbers by their first eight bits (in LONG rows nine), from a 64th of their mean's power of
 * two on over ten octaves: most have no more bits than that. Place 0 is for zeros. */
enum {
    SPAN = 10,    /* octaves */
    MEAN_AT = 6,  /* which of them the mean is in */
    PLACES = SPAN << 8,
    LONG = 2048,    /* elements */
    MEMBERS = 1024, /* of a place that are put in order, at most */
    SMALLEST = 127 - 60, /* rows with differences below 2^-60 are left to float64: a biased exponent */
};

/* What is known of a row's magnitudes. Each goes on for 2 PACK elements more, which whole registers read. */
struct tally {
    uint16_t *key;  /* in which place each lies */
    uint16_t *rest; /* not 0 where it is not the number that its place stands for */
    uint16_t *rank;
};

/* Bits of the PACK numbers that are the same as one. */
static inline uint32_t same_as(const uint16_t *x, uint16_t number) {
#ifdef __AVX512BW__
    return _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(x), _mm512_set1_epi16((short)number));
#else
    uint32_t found = 0;
    for (int i = 0; i < PACK; i++) found |= (uint32_t)(x[i] == number) << i;
    return found;
#endif
}

/* Finds the places of n differences, of which float32 holds each. Whether none is so small that arithmetic with it may be lost. */
static int tallied(const struct tally *t, const uint16_t *x, const uint16_t *base, int64_t n) {
    uint16_t *restrict key = t->key, *restrict rest = t->rest;
    const int shift = n < LONG ? 16 : 15;
    const uint16_t most = (uint16_t)((SPAN << (23 - shift)) - 2), smallest = (uint16_t)(SMALLEST << (23 - shift));
    floats sums = {0};
    float sum = 0;
    int64_t whole = n / LANES(float) * LANES(float);
    for (int64_t i = 0; i < whole; i += LANES(float)) {
        floats size = size_of(widened_float(x + i) - widened_float(base + i));
        halves((ints)size >> shift, key + i);
        halves((ints)size & ((1 << shift) - 1), rest + i);
        sums += size;
    }
    for (int i = 0; i < LANES(float); i++) sum += sums[i];
    for (int64_t i = whole; i < n; i++) {
        uint32_t bits;
        float size = fabsf(from_bf16(x[i]) - from_bf16(base[i]));
        memcpy(&bits, &size, sizeof bits);
        key[i] = (uint16_t)(bits >> shift), rest[i] = (uint16_t)(bits & ((1U << shift) - 1));
        sum += size;
    }
    uint32_t mean;
    sum /= (float)n;
    memcpy(&mean, &sum, sizeof mean);
    const int octave = (int)(mean >> 23) - MEAN_AT;
    const uint16_t first = (uint16_t)(octave > 0 ? octave << (23 - shift) : 0);
    memset(key + n, 0, sizeof(shorts_u)), memset(rest + n, 0, sizeof(shorts_u));
    shorts_u lost = {0};
    for (int64_t i = 0; i < n; i += REGISTER / 2) {
        shorts_u at, more;
        memcpy(&at, key + i, sizeof at), memcpy(&more, rest + i, sizeof more);
        const shorts_u some = (shorts_u)(at != 0), beyond = (shorts_u)(at > first) & (at - first);
        const shorts_u over = (shorts_u)(beyond > most);
        lost |= (shorts_u)(at < smallest) & (shorts_u)((at | more) != 0);
        more |= ((shorts_u)(at < first) & some) | over;
        at = ((beyond & ~over) | (over & most)) - some;
        memcpy(key + i, &at, sizeof at), memcpy(rest + i, &more, sizeof more);
    }
    int any = 0;
    for (int i = 0; i < REGISTER / 2; i++) any |= lost[i];
    for (int i = 0; i < 2 * PACK; i++) key[n + i] = (uint16_t)(most + 2), rest[n + i] = 0;
    return !any;
}

/* Puts the members of a place in order, which is ranks [from, to). What is left of the moves that this may take. */
static int64_t order(const struct tally *t, const uint16_t *x, const uint16_t *base, uint16_t at, int from, int to,
                     int64_t left) {
    struct { float size; uint16_t index; } all[MEMBERS];
    int found = 0;
    if (to - from > MEMBERS) return -1;
    for (int64_t i = 0; found < to - from; i += 2 * PACK)
        for (uint64_t some = same_as(t->key + i, at) | (uint64_t)same_as(t->key + i + PACK, at) << PACK; some; some &= some - 1) {
            const int64_t index = i + __builtin_ctzll(some);
            const float size = fabsf(from_bf16(x[index]) - from_bf16(base[index]));
            int j = found++;
            for (; j && all[j - 1].size > size; j--, left--) all[j] = all[j - 1];
            all[j].size = size, all[j].index = (uint16_t)index;
        }
    for (int j = 0; j < found; j++) t->rank[all[j].index] = (uint16_t)(from + j);
    return left - (to - from);
}

/* Puts the few in order that are not the number which their place stands for. Whether that took few moves. */
static int order_rest(const struct tally *row, const uint16_t *x, const uint16_t *base, int64_t n, const uint16_t *first) {
    uint8_t done[PLACES] = {0};
    int64_t left = 2 * n;
    for (int64_t i = 0; i < n; i += PACK)
        for (uint32_t some = ~same_as(row->rest + i, 0); some; some &= some - 1) {
            const uint16_t at = row->key[i + __builtin_ctz(some)];
            if (first[at + 1] - first[at] < 2 || done[at]) continue;
            done[at] = 1;
            left = order(row, x, base, at, first[at], first[at + 1], left - n / PACK);
            if (left < 0) return 0;
        }
    return 1;
}

/* The ranks of n keys, equal ones by index, and the rank from which on each place's members are. */
static void count_places(int64_t n, const uint16_t *restrict key, uint16_t *restrict rank, uint16_t *restrict first) {
    const int places = (n < LONG ? PLACES / 2 : PLACES) + PACK;
    uint32_t wide[PLACES + PACK]; /* which is added twice as fast */
    memset(first, 0, (size_t)places * sizeof *first);
    EACH(n) rank[i] = first[key[i]]++; /* how many of the same place come before each, ... */
    sum_up(first, places);
    for (int i = 0; i < places; i++) wide[i] = first[i];
    EACH(n) rank[i] = (uint16_t)(rank[i] + wide[key[i]]); /* ... and of those before */
}

/* As `ranks`, of differences of bfloat16 numbers; 0 where that would take longer or not be exact. */
static int ranks_bf16(const struct tally *row, const uint16_t *x, const uint16_t *base, int64_t n) {
    uint16_t first[PLACES + PACK];
    int64_t others = 0; /* than their places' numbers: of many it is quicker to sort all */
    if (!exact(n, x, base) || !tallied(row, x, base, n)) return 0;
    for (int64_t i = 0; i < n; i += PACK) others += __builtin_popcount(~same_as(row->rest + i, 0));
    if (others > n / 16) return 0;
    count_places(n, row->key, row->rank, first);
    return order_rest(row, x, base, n, first);
}
