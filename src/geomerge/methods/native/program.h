/* Recorded arithmetic (methods/program.py). */

#pragma once

/* What a method does to tiles, recorded operation by operation (methods/steps.py, which has the same list) and done here to a
 * chunk after the other, whose numbers stay in the first-level cache. */
enum {
    LOAD,    /* the elements of input a */
    DIFFER,  /* the elements of input a, minus b */
    TABLE,   /* x elements of `data` in turn, each for y elements that follow each other */
    ADD, SUBTRACT, MULTIPLY, DIVIDE, LARGER,
    SHIFT,   /* a + x */
    SCALE,   /* a * x */
    OVER,    /* x / a */
    PLUS,    /* a + x b */
    PLUS_PRODUCT, PLUS_QUOTIENT, /* a + (x b) c, a + (x b) / c */
    SIZE, SIGN,
    FLOOR, CLAMP, /* at least x, at most y */
    SHRINK,  /* 0 where |a| <= x */
    LESS, LEAST, EQUAL, DIFFERENT, /* 1 where a < b, a <= b ..., else 0 */
    BELOW, UP_TO, SAME, OTHER, ABOVE, FROM, /* ... where a < x, a <= x, a == x, a != x, a > x, a >= x */
    REPLACE, /* x where b is not 0, else a */
    THIN,    /* as `struct thinning` at `data` says */
    COUNT,   /* the sum of a, into an integer at `data` */
    SUMS,    /* of a over blocks of x elements: `data` has the lanes, then the sums */
    BRACKET, /* counted and collected by the `struct bracket` at `data` */
    STORE,   /* the output */
    /* What is often done one after the other (also in methods/steps.py): */
    ELECT,     /* the sign of a + x */
    AGREE,     /* a b, but at least x */
    DISTANCE,  /* |a - b| */
    WEIGHT,    /* |a| x */
    LIGHTER, OUTWEIGHED, /* 1 where |a| x < b, < |b|, else 0 */
    PLUS_SIGN, /* a + x sign(b) */
    SHARE, EXP, TANH, /* a / x, and as in methods/functions.py */
};

struct step {
    int32_t operation, to, a, b, c, unused;
    double x, y;
    void *data;
};

#define REGISTERS 160

/* Element i of the result is an expression of elements i of the operands, in a register of its own; also beyond the m that are asked
 * for, where it does no harm: loops of known length are quicker. */
#define MAP(expression)                                    \
    _Pragma("GCC unroll 4") for (int i = 0; i < CHUNK; i++) o[i] = (expression); \
    break

#define TRUE(condition) ((condition) ? 1.0 : 0.0)

/* Does all steps to the elements [at, at + m), which lie from `s` on in `raw`; `first` is the place of element 0 in the tensor. */
static void do_steps(struct work *work, const struct step *steps, int count, const void *const *raw, int64_t s, int64_t m, int64_t at,
                     int64_t n, int64_t first, const struct place *out, char *to, double (*registers)[CHUNK]) {
    for (const struct step *each = steps; each < steps + count; each++) {
        double *restrict o = registers[each->to];
        const double *restrict a = registers[each->a], *restrict b = registers[each->b], *restrict c = registers[each->c];
        const double x = each->x, y = each->y;
        switch (each->operation) {
        case LOAD: load_double(raw[each->a], work->inputs[each->a].dtype, s, m, o); break;
        case DIFFER:
            if (work->inputs[each->a].dtype == BF16) {
                const uint16_t *bits = (const uint16_t *)raw[each->a] + s;
                EACH(m) o[i] = (double)from_bf16(bits[i]) - b[i];
                break;
            }
            load_double(raw[each->a], work->inputs[each->a].dtype, s, m, o);
            EACH(m) o[i] -= b[i];
            break;
        case TABLE: {
            const double *table = each->data;
            int64_t length = (int64_t)x, run = (int64_t)y, place = first + at;
            int64_t k = place / run % length, left = run - place % run;
            if (run == 1) {
                for (int64_t i = 0; i < m; k = 0) {
                    int64_t some = least(m - i, length - k);
                    memcpy(o + i, table + k, (size_t)some * sizeof *o);
                    i += some;
                }
                break;
            }
            for (int64_t i = 0; i < m; left = run, k = k + 1 == length ? 0 : k + 1)
                for (int64_t stop = least(m, i + left); i < stop; i++) o[i] = table[k];
            break;
        }
        case ADD: MAP(a[i] + b[i]);
        case SUBTRACT: MAP(a[i] - b[i]);
        case MULTIPLY: MAP(a[i] * b[i]);
        case DIVIDE: MAP(a[i] / b[i]);
        case LARGER: MAP(a[i] > b[i] ? a[i] : b[i]);
        case SHIFT: MAP(a[i] + x);
        case SCALE: MAP(a[i] * x);
        case OVER: MAP(x / a[i]);
        case PLUS: MAP(fma(b[i], x, a[i]));
        case PLUS_PRODUCT:
            if (x == 1) { MAP(fma(b[i], c[i], a[i])); }
            MAP(fma(x * b[i], c[i], a[i]));
        case PLUS_QUOTIENT: MAP(a[i] + x * b[i] / c[i]);
        case SIZE: MAP(fabs(a[i]));
        case SIGN: MAP(TRUE(a[i] > 0) - TRUE(a[i] < 0));
        case FLOOR: MAP(a[i] < x ? x : a[i]);
        case CLAMP: MAP((a[i] < x ? x : a[i]) > y ? y : a[i] < x ? x : a[i]);
        case SHRINK: MAP(a[i] >= -x && a[i] <= x ? 0.0 : a[i]);
        case LESS: MAP(TRUE(a[i] < b[i]));
        case LEAST: MAP(TRUE(a[i] <= b[i]));
        case EQUAL: MAP(TRUE(a[i] == b[i]));
        case DIFFERENT: MAP(TRUE(a[i] != b[i]));
        case BELOW: MAP(TRUE(a[i] < x));
        case UP_TO: MAP(TRUE(a[i] <= x));
        case SAME: MAP(TRUE(a[i] == x));
        case OTHER: MAP(TRUE(a[i] != x));
        case ABOVE: MAP(TRUE(a[i] > x));
        case FROM: MAP(TRUE(a[i] >= x));
        case ELECT: MAP(TRUE(a[i] + x > 0) - TRUE(a[i] + x < 0));
        case AGREE: MAP(a[i] * b[i] < x ? x : a[i] * b[i]);
        case DISTANCE: MAP(fabs(a[i] - b[i]));
        case WEIGHT: MAP(fabs(a[i]) * x);
        case LIGHTER: MAP(TRUE(fabs(a[i]) * x < b[i]));
        case OUTWEIGHED: MAP(TRUE(fabs(a[i]) * x < fabs(b[i])));
        case PLUS_SIGN: MAP(fma(TRUE(b[i] > 0) - TRUE(b[i] < 0), x, a[i]));
        case SHARE: MAP(a[i] / x);
        case EXP: MAP(exp_of(a[i]));
        case TANH: tanh_of(a, o); break;
        case REPLACE: MAP(b[i] != 0 ? x : a[i]);
        case THIN: {
            struct thinning *thin = each->data;
            if (thin->equal != thin->equal && thin->drop == INFINITY) {
                const double keep = thin->keep;
                MAP(a[i] >= -keep && a[i] <= keep ? 0.0 : a[i]);
            }
            memcpy(o, a, sizeof *o * m);
            thin_double(thin, m, 0, o);
            break;
        }
        case COUNT: {
            double number = 0; /* whole ones, which add up to the same in any order */
            double lanes[8] = {0};
            int64_t i = 0;
            for (; i + 8 <= m; i += 8)
                for (int j = 0; j < 8; j++) lanes[j] += a[i + j];
            for (; i < m; i++) number += a[i];
            for (int j = 0; j < 8; j++) number += lanes[j];
            *(int64_t *)each->data += (int64_t)number;
            break;
        }
        case SUMS: {
            double *restrict lanes = each->data;
            EACH(m) lanes[i] += a[i];
            if ((at + m) % (int64_t)x && at + m < n) break;
            halved(lanes);
            lanes[CHUNK + at / (int64_t)x] = lanes[0];
            memset(lanes, 0, CHUNK * sizeof *lanes);
            break;
        }
        case BRACKET: bracket_double(each->data, a, m); break;
        case STORE:
            if (work->first > at) tell_double(work, at, m, a);
            store_double(a, out->dtype, s, m, to);
            break;
        }
    }
}

/* Does recorded steps to n elements from each of `starts` on; an output has one start, 0. `first` is the place of element 0 in the
 * tensor. Returns whether all inputs are finite (looked at only if `check`). */
int geomerge_program(struct work *work, int64_t pieces, const int64_t *starts, int64_t n, int64_t first, const struct step *steps,
                     int count, int check, const struct place *out) {
    _Alignas(64) double registers[REGISTERS][CHUNK] = {{0}};
    double bad = 0;
    const void *raw[MOST];
    for (int64_t p = 0; p < pieces; p++)
        for (int64_t at = 0; at < n; at += WINDOW) {
            int64_t size = least(WINDOW, n - at);
            if (!fetch(work, starts[p] + at, size, raw)) return -1;
            char *to = out ? window_of(work, out, at) : 0;
            for (int64_t s = 0; s < size; s += CHUNK) {
                int64_t m = least(CHUNK, size - s);
                for (int k = 0; check && k < work->count; k++) {
                    if (work->inputs[k].dtype != BF16) load_double(raw[k], work->inputs[k].dtype, s, m, registers[0]);
                    bad += odd_double(raw[k], work->inputs[k].dtype, s, m, registers[0]);
                }
                do_steps(work, steps, count, raw, s, m, at + s, n, first + starts[p], out, to, registers);
            }
            if (out && !deliver(work, out, at + size, n)) return -1;
        }
    return bad == 0;
}
