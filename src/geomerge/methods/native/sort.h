/* Numbers in order, by RADIX bits of their patterns after the other. */

#pragma once

#define RADIX 11
#define DIGITS (1 << RADIX)

/* Patterns in the order of the numbers, negative zero as zero; and back. */
#define ORDERED(T, Bits)                                           \
    static inline Bits ordered_##T(T x) {                          \
        const Bits sign = (Bits)1 << (sizeof(Bits) * 8 - 1);       \
        Bits bits;                                                 \
        x += 0;                                                    \
        memcpy(&bits, &x, sizeof bits);                            \
        return bits & sign ? ~bits : bits | sign;                  \
    }                                                              \
                                                                   \
    static inline Bits pattern_of_##T(Bits bits) {                 \
        const Bits sign = (Bits)1 << (sizeof(Bits) * 8 - 1);       \
        return bits & sign ? bits & ~sign : ~bits;                 \
    }

ORDERED(float, uint32_t) ORDERED(double, uint64_t)

struct placed { uint64_t key; int64_t index; };

#define BARE(x) (x)
#define KEY(x) ((x).key)

/* n <= 2^32 items by their keys, equal ones as they were; `to` has room for as many. Where they are then: `from` or `to`. */
#define SORTED(name, Item, bits, key)                                                                       \
    static Item *name(int64_t n, Item *from, Item *to) {                                                    \
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

/* Sorts n numbers, of which `x` are the patterns, in place; `room` is for as many. */
#define SORT(T, Bits, sorted)                                    \
    void geomerge_sort_##T(int64_t n, Bits *x, Bits *room) {     \
        EACH(n) {                                                \
            T value;                                             \
            memcpy(&value, x + i, sizeof value);                 \
            x[i] = ordered_##T(value);                           \
        }                                                        \
        const Bits *found = sorted(n, x, room);                  \
        EACH(n) x[i] = pattern_of_##T(found[i]);                 \
    }

SORT(float, uint32_t, sorted_words) SORT(double, uint64_t, sorted_longs)

/* Of n numbers the place of each in ascending order, equal ones by index; `room` is for two pairs of each. */
void geomerge_ranks(int64_t n, const double *x, struct placed *room, int64_t *rank) {
    EACH(n) room[i] = (struct placed){ordered_double(x[i]), i};
    const struct placed *found = sorted_places(n, room, room + n);
    EACH(n) rank[found[i].index] = i;
}

/* Keeps those of n numbers that are less than `width` above `least_of_all`, one after the other; how many. */
#define KEEP(Bits)                                                                                      \
    static int64_t keep_##Bits(int64_t n, Bits *x, Bits least_of_all, Bits width) {                     \
        int64_t left = 0, i = KEEP_REGISTERS(Bits, n, x, least_of_all, width, &left);                   \
        for (; i < n; i++) {                                                                            \
            const Bits bits = x[i];                                                                     \
            x[left] = bits;                                                                             \
            left += (Bits)(bits - least_of_all) < width;                                                \
        }                                                                                               \
        return left;                                                                                    \
    }

#ifdef __AVX512F__
#define KEEP_REGISTERS(Bits, n, x, least_of_all, width, left) keep_registers_##Bits(n, x, least_of_all, width, left)
#define KEEP_WHOLE(Bits, bits, lanes)                                                                   \
    static int64_t keep_registers_##Bits(int64_t n, Bits *x, Bits least_of_all, Bits width, int64_t *left) { \
        const __m512i low = _mm512_set1_epi##bits((int##bits##_t)least_of_all), many = _mm512_set1_epi##bits((int##bits##_t)width); \
        int64_t i = 0;                                                                                  \
        for (; i + lanes <= n; i += lanes) {                                                            \
            const __m512i some = _mm512_loadu_si512(x + i);                                             \
            const __mmask##lanes kept = _mm512_cmplt_epu##bits##_mask(_mm512_sub_epi##bits(some, low), many); \
            _mm512_storeu_si512(x + *left, _mm512_maskz_compress_epi##bits(kept, some));                \
            *left += __builtin_popcount(kept);                                                          \
        }                                                                                               \
        return i;                                                                                       \
    }
KEEP_WHOLE(uint32_t, 32, 16) KEEP_WHOLE(uint64_t, 64, 8)
#else
#define KEEP_REGISTERS(Bits, n, x, least_of_all, width, left) 0
#endif
KEEP(uint32_t) KEEP(uint64_t)

/* The `count`-th largest of the numbers in some pieces, of which there are so many and more, and how many are greater: by RADIX bits of
 * what distinguishes those that may be it. `room` is for all. */
#define LARGEST(T, Bits)                                                                                \
    T geomerge_largest_##T(int64_t pieces, const T *const *x, const int64_t *sizes, int64_t count, Bits *room, int64_t *greater) { \
        Bits least_of_all = (Bits)-1, most_of_all = 0;                                                  \
        int64_t n = 0;                                                                                  \
        *greater = 0;                                                                                   \
        for (int64_t p = 0; p < pieces; p++) {                                                          \
            const int64_t size = sizes[p];                                                              \
            const T *restrict piece = x[p];                                                             \
            Bits *restrict to = room + n;                                                               \
            EACH(size) {                                                                                \
                const Bits bits = ordered_##T(piece[i]);                                                \
                to[i] = bits;                                                                           \
                least_of_all = bits < least_of_all ? bits : least_of_all;                               \
                most_of_all = bits > most_of_all ? bits : most_of_all;                                  \
            }                                                                                           \
            n += size;                                                                                  \
        }                                                                                               \
        while (least_of_all != most_of_all) {                                                           \
            int shift = 0;                                                                              \
            while ((most_of_all - least_of_all) >> shift >= DIGITS) shift++;                            \
            uint32_t counts[DIGITS] = {0};                                                              \
            EACH(n) counts[(room[i] - least_of_all) >> shift]++;                                        \
            int64_t digit = (int64_t)((most_of_all - least_of_all) >> shift);                           \
            for (; count > counts[digit]; digit--) count -= counts[digit], *greater += counts[digit];   \
            n = keep_##Bits(n, room, least_of_all + ((Bits)digit << shift), (Bits)1 << shift);          \
            least_of_all = (Bits)-1, most_of_all = 0;                                                   \
            EACH(n) {                                                                                   \
                least_of_all = room[i] < least_of_all ? room[i] : least_of_all;                         \
                most_of_all = room[i] > most_of_all ? room[i] : most_of_all;                            \
            }                                                                                           \
        }                                                                                               \
        T found;                                                                                        \
        const Bits bits = pattern_of_##T(least_of_all);                                                 \
        memcpy(&found, &bits, sizeof found);                                                            \
        return found;                                                                                   \
    }

LARGEST(float, uint32_t) LARGEST(double, uint64_t)
