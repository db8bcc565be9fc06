/* SCE (methods/elementwise/sce.py): θ₀ + the weighted mean of the task vectors that have their sum's sign. */

#pragma once

#define AGREEING 8 /* experts at most */

struct agreement {
    double weight[AGREEING];
    double floor; /* the divisor is this at least, unless it is 0 */
    int32_t quick; /* float32 holds the weights, and none of them is below the floor */
};

/* Whether of NEAR elements no input is so large, or so many times another, that the sums of differences might not fit float32: all are
 * less than 2^124, and up to 2^14 times the smallest, of whose last place all are multiples. */
static inline int alike_in_size(const int t, const uint16_t *const *x, int64_t s) {
    words apart = all_words(0), largest = all_words(0);
    for (int i = 0; i < NEAR; i += REGISTER / 2) {
        words low, high;
        for (int k = 0; k <= t; k++) {
            words size;
            memcpy(&size, x[k] + s + i, sizeof size);
            size &= 0x7FFF;
            low = k ? smaller_words(low, size) : size;
            high = k ? larger_words(high, size) : size;
        }
        apart = larger_words(apart, high - low);
        largest = larger_words(largest, high);
    }
    return !any_word_above(apart, 13 << 7) && !any_word_above(largest, (0xFB << 7) - 1);
}

/* Of NEAR bfloat16 elements, in float32; whether that tells how those of float64 are rounded.
 *
 * What is added is off by 2t + 3 roundings: a share of so many times 2^-24 of itself, where no product is too small for float32. The sum in
 * float64 is rounded to float32 first, then to bfloat16. So a sum next to a tie is in doubt where such an error takes it to the next float32;
 * others, where it takes them that far. */
static inline int agree_quickly(const int t, const struct agreement *rule, const uint16_t *const *x, int64_t s, uint16_t *out) {
    floats doubt = all(0), least = all(1);
    for (int i = 0; i < NEAR; i += PACK) {
        ints rounded[PACKED];
        for (int r = 0; r < PACKED; r++) {
            const floats base = one_packed_bf16(x[0] + s + i, r);
            floats d[AGREEING], votes = all(0), total = all(0), divisor = all(0);
            for (int k = 0; k < t; k++) {
                d[k] = one_packed_bf16(x[k + 1] + s + i, r) - base;
                votes = k ? votes + d[k] : d[k];
            }
            const ints sign = (ints)votes & INT32_MIN;
            for (int k = 0; k < t; k++) {
                const floats agreeing = (floats)((ints)d[k] ^ sign), weight = all((float)rule->weight[k]);
                total = plus_product_where_positive(total, agreeing, weight);
                divisor = plus_where_positive(divisor, agreeing, weight);
            }
            const floats change = total / larger_float(divisor, all(0x1p-100f));
            const floats signed_change = (floats)((ints)change ^ sign), sum = base + signed_change;
            const ints bits = (ints)sum;
            rounded[r] = bits + 0x7FFF + (bits >> 16 & 1);
            const floats last = (floats)(bits & 0x7F800000) * all(0x1p-23f); /* the sum's last place */
            /* That of its own interval, or the one below a power of two, where places are half as far apart. */
            const floats from_tie = smaller_float(size_of(sum - (floats)(bits & ~0xFFFF | 0x8000)), last * all(0x1p14f));
            const floats lost = size_of(signed_change - (sum - base)), to_next = size_of(plus_product_float(lost, last, all(-0.5f)));
            const ints near = from_tie < last + last;
            const floats room = (floats)(((ints)to_next & near) | ((ints)(from_tie - last) & ~near));
            doubt = larger_float(doubt, plus_product_float(-room, change, all((2 * t + 3) * 0x1p-24f)));
            least = smaller_float(least, total + where(divisor == 0, all(1)));
        }
        unpacked_uppers(rounded, out + i);
    }
    return !lanes_in((doubt > 0) | (least < 0x1p-100f));
}

/* The same in float64, which always tells. */
static inline int agree_exactly(const int t, const struct agreement *rule, const uint16_t *const *x, int64_t s, int64_t m, double *restrict sum) {
    ALIKE for (int64_t i = 0; i < m; i++) {
        const double base = from_bf16(x[0][s + i]);
        double d[AGREEING], votes = 0, total = 0, divisor = 0;
        for (int k = 0; k < t; k++) {
            d[k] = from_bf16(x[k + 1][s + i]) - base;
            votes = k ? votes + d[k] : d[k];
        }
        const double elected = votes < 0 ? -1. : 1.;
        for (int k = 0; k < t; k++) {
            const double agreeing = d[k] * elected < 0 ? 0 : d[k] * elected, part = agreeing > 0 ? 1. : 0.;
            total = k ? fma(agreeing, rule->weight[k], total) : agreeing * rule->weight[k];
            divisor = k ? fma(part, rule->weight[k], divisor) : part * rule->weight[k];
        }
        if (rule->floor > 0) divisor = divisor < rule->floor ? rule->floor : divisor;
        sum[i] = base + total * elected / (divisor + (divisor == 0 ? 1. : 0.));
    }
    return 1;
}

#define AGREE(how, ...) (t == 2 ? how(2, __VA_ARGS__) : t == 3 ? how(3, __VA_ARGS__) : t == 4 ? how(4, __VA_ARGS__) : how(t, __VA_ARGS__))

/* Inputs: the base and at most AGREEING experts, all bfloat16 and finite. */
int geomerge_agreement(struct work *work, int64_t n, const struct agreement *rule, const struct place *out) {
    double sum[NEAR];
    const void *raw[MOST];
    const uint16_t *const *x = (const uint16_t *const *)raw;
    const int t = work->count - 1;
    for (int64_t at = 0; at < n; at += WINDOW) {
        const int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += NEAR) {
            const int64_t m = least(NEAR, size - s);
            const int quick = rule->quick && m == NEAR && out->dtype == BF16 && work->first <= at + s && alike_in_size(t, x, s);
            if (quick && AGREE(agree_quickly, rule, x, s, (uint16_t *)to + s)) continue;
            AGREE(agree_exactly, rule, x, s, m, sum);
            if (work->first > at + s) tell_double(work, at + s, m, sum);
            store_double(sum, out->dtype, s, m, to);
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return 1;
}
