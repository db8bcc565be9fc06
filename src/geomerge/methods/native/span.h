/* Linear combinations, and the inner products from which their coefficients come. */

#pragma once

/* Two inputs and an output of bfloat16; whether any sum is not finite. */
static __attribute__((noinline)) int32_t span_of_two(const uint16_t *restrict a, const uint16_t *restrict b, int64_t n, double first,
                                                     double second, uint16_t *restrict out) {
    int32_t odd = 0;
    EACH(n) {
        float sum = (float)fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
        odd |= not_finite(sum);
        out[i] = finite_to_bf16(sum);
    }
    return odd;
}

/* out = round(sum of c[k] * x[k]), in double. Returns whether all of the sum is finite (in float, where that is on the way). */
int geomerge_span(struct work *work, int64_t n, const double *c, const struct place *out) {
    double bad = 0;
    int32_t odd = 0;
    double x[CHUNK], total[CHUNK];
    float narrow[CHUNK];
    const void *raw[MOST];
    const int k = work->count, out_dtype = out->dtype;
    const struct place *in = work->inputs;
    const int common = k > 1 && in[0].dtype == BF16 && in[1].dtype == BF16;
    const double first = c[0], second = k > 1 ? c[1] : 0;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t size = least(WINDOW, n - at);
        if (!fetch(work, at, size, raw)) return -1;
        char *to = window_of(work, out, at);
        for (int64_t s = 0; s < size; s += CHUNK) {
            int64_t m = least(CHUNK, size - s);
            int j = 1;
            if (common) {
                const uint16_t *a = (const uint16_t *)raw[0] + s, *b = (const uint16_t *)raw[1] + s;
                if (k == 2 && out_dtype == BF16 && work->first <= at + s) { /* most merges */
                    odd |= span_of_two(a, b, size - s, first, second, (uint16_t *)to + s);
                    break;
                }
                EACH(m) total[i] = fma((double)from_bf16(b[i]), second, (double)from_bf16(a[i]) * first);
                j = 2;
            } else {
                load_double(raw[0], in[0].dtype, s, m, total);
                EACH(m) total[i] *= first;
            }
            for (; j < k; j++) {
                double factor = c[j];
                load_double(raw[j], in[j].dtype, s, m, x);
                EACH(m) total[i] = fma(x[i], factor, total[i]);
            }
            if (work->first > at + s) tell_double(work, at + s, m, total);
            if (out_dtype == F64) {
                bad += damage_double(total, m);
                store_double(total, out_dtype, s, m, to);
            } else if (out_dtype == BF16) {
                odd |= narrowed(total, s, m, to);
            } else {
                EACH(m) narrow[i] = (float)total[i];
                bad += (double)damage_float(narrow, m);
                store_float(narrow, out_dtype, s, m, to);
            }
        }
        if (!deliver(work, out, at + size, n)) return -1;
    }
    return bad == 0 && !odd;
}
