/* Numbers in ascending order, by RADIX bits of their patterns after the other. */

#pragma once

#define RADIX 11
#define DIGITS (1 << RADIX)

/* Patterns in the order of the numbers, negative zero as zero. */
static inline uint64_t ordered_double(double x) {
    uint64_t bits;
    x += 0.0;
    memcpy(&bits, &x, 8);
    return bits >> 63 ? ~bits : bits | (uint64_t)1 << 63;
}

static inline double of_ordered_double(uint64_t bits) {
    double x;
    bits = bits >> 63 ? bits & INT64_MAX : ~bits;
    memcpy(&x, &bits, 8);
    return x;
}

static inline uint32_t ordered_float(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | (uint32_t)1 << 31;
}

static inline float of_ordered_float(uint32_t bits) {
    float x;
    bits = bits >> 31 ? bits & INT32_MAX : ~bits;
    memcpy(&x, &bits, 4);
    return x;
}

struct placed { uint64_t key; int64_t index; };

#define BARE(x) (x)
#define KEY(x) ((x).key)

/* n <= 2^32 items by their keys, equal ones as they were; `to` has room for as many. Where they are then: `from` or `to`. */
#define SORTED(name, Item, bits, key)                                                                       \
    static Item *name(int64_t n, Item *restrict from, Item *restrict to) {                                  \
        enum { PASSES = (bits + RADIX - 1) / RADIX };                                                       \
        uint32_t counts[PASSES][DIGITS] = {{0}};                                                            \
        EACH(n) for (int pass = 0; pass < PASSES; pass++) counts[pass][key(from[i]) >> pass * RADIX & (DIGITS - 1)]++; \
        for (int pass = 0; pass < PASSES; pass++) {                                                         \
            uint32_t *restrict place = counts[pass], before = 0;                                            \
            if (n && place[key(from[0]) >> pass * RADIX & (DIGITS - 1)] == n) continue; /* all alike */     \
            for (int digit = 0; digit < DIGITS; digit++) {                                                  \
                uint32_t here = place[digit];                                                               \
                place[digit] = before, before += here;                                                      \
            }                                                                                               \
            EACH(n) to[place[key(from[i]) >> pass * RADIX & (DIGITS - 1)]++] = from[i];                     \
            Item *other = from;                                                                             \
            from = to, to = other;                                                                          \
        }                                                                                                   \
        return from;                                                                                        \
    }

SORTED(sorted_words, uint32_t, 32, BARE) SORTED(sorted_longs, uint64_t, 64, BARE) SORTED(sorted_places, struct placed, 64, KEY)

/* Sorts n numbers in place; `room` is for as many. */
#define SORT(T, Bits, sorted)                                    \
    void geomerge_sort_##T(int64_t n, T *x, Bits *room) {        \
        Bits *keys = (Bits *)x;                                  \
        EACH(n) keys[i] = ordered_##T(x[i]);                     \
        const Bits *found = sorted(n, keys, room);               \
        EACH(n) x[i] = of_ordered_##T(found[i]);                 \
    }

SORT(float, uint32_t, sorted_words) SORT(double, uint64_t, sorted_longs)

/* Of n numbers the place of each in ascending order, equal ones by index; `room` is for two pairs of each. */
void geomerge_ranks(int64_t n, const double *x, struct placed *room, int64_t *rank) {
    EACH(n) room[i] = (struct placed){ordered_double(x[i]), i};
    const struct placed *found = sorted_places(n, room, room + n);
    EACH(n) rank[found[i].index] = i;
}
