/* NearSwap (methods/elementwise/nearswap.py): θ₀ + the difference of two models, no more of it than t. */

#pragma once

#define NEAR 64 /* elements that are made at once, a few packs */

/* How many of a float32 sum's last places its rounding to bfloat16 has to be away from a tie: the difference, t and the sum are each
 * rounded, by 33 of them at most where the difference is up to 16 times the sum, as is what this stands for, in float64. */
#define PLACES_LOST 40

/* Of bfloat16 elements, in float32; whether that tells how the sum in float64 is rounded, and all are finite. */
static inline int near_quickly(const uint16_t *base, const uint16_t *other, float t, uint16_t *out) {
    ints from_tie = all_ints(0xFFFF);
    floats too_large = all(0), odd = all(0);
    for (int i = 0; i < NEAR; i += PACK) {
        ints rounded[PACKED];
        for (int r = 0; r < PACKED; r++) {
            const floats x = one_packed_bf16(base + i, r), whole = one_packed_bf16(other + i, r) - x;
            const floats d = smaller_float(larger_float(whole, all(-t)), all(t)), sum = x + d;
            rounded[r] = (ints)sum + 0x8000; /* but for ties */
            from_tie = smaller_int(from_tie, rounded[r] + PLACES_LOST & 0xFFFF);
            too_large = larger_float(too_large, plus_product_float(size_of(d), size_of(sum), all(-16)));
            odd = plus_product_float(odd, whole, all(0));
        }
        unpacked_uppers(rounded, out + i);
    }
    return !lanes_in((from_tie <= 2 * PLACES_LOST) | (too_large > 0) | ~(odd == 0));
}

static void near_exactly(const double *restrict base, const double *restrict other, int64_t n, double t, double *restrict sum) {
    EACH(n) {
        double d = other[i] - base[i];
        d = d < -t ? -t : d;
        d = d > t ? t : d;
        sum[i] = base[i] + d;
    }
}

/* `most` is t, no more than float32 holds. Whether both inputs, which are bfloat16, are finite (looked at if `check`). */
int geomerge_near(struct work *work, int64_t n, double most, int check, const struct place *out) {
    double bad = 0, base[NEAR], other[NEAR], sum[NEAR];
    const void *raw[MOST];
    for (int64_t at = 0; at < n; at += WINDOW) {
        const int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += NEAR) {
            const int64_t m = least(NEAR, size - s);
            const int quick = m == NEAR && out->dtype == BF16 && work->first <= at + s;
            if (quick && near_quickly((const uint16_t *)raw[0] + s, (const uint16_t *)raw[1] + s, (float)most, (uint16_t *)to + s)) continue;
            load_double(raw[0], BF16, s, m, base);
            load_double(raw[1], BF16, s, m, other);
            if (check) bad += damage_double(base, m) + damage_double(other, m);
            near_exactly(base, other, m, most, sum);
            if (work->first > at + s) tell_double(work, at + s, m, sum);
            store_double(sum, out->dtype, s, m, to);
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0;
}
