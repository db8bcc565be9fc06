/* Recorded arithmetic (methods/program.py). */

#pragma once

/* What a method does to tiles, recorded operation by operation (methods/steps.py, which has the same list) and done here to a
 * chunk after the other, whose numbers stay in the first-level cache. First those that work on a chunk as a whole: */
enum {
    LOAD,    /* the elements of input a */
    TABLE,   /* x elements of `data` in turn, each for y elements that follow each other */
    TANH,    /* as in methods/functions.py */
    THIN,    /* as `struct thinning` at `data` says */
    COUNT,   /* the sum of a, into an integer at `data` */
    SUMS,    /* of a over blocks of x elements: `data` has the lanes, then the sums */
    BRACKET, /* counted and collected by the `struct bracket` at `data` */
    STORE,   /* the output */
    ALONE,   /* as many as these */
};

/* Then those whose result's element i is an expression of the operands' elements i: a, b, c, and of the numbers x, y. */
#define OPERATIONS(DO)                                 \
    DO(SUBTRACT, a - b)                                \
    DO(MULTIPLY, a * b)                                \
    DO(DIVIDE, a / b)                                  \
    DO(LARGER, a > b ? a : b)                          \
    DO(SHIFT, a + x)                                   \
    DO(SCALE, a * x)                                   \
    DO(SHARE, a / x)                                   \
    DO(OVER, x / a)                                    \
    DO(PLUS, fma(b, x, a))                             \
    DO(PLUS_PRODUCT, fma(x * b, c, a))                 \
    DO(PLUS_QUOTIENT, a + x * b / c)                   \
    DO(SIZE, fabs(a))                                  \
    DO(SIGN, islessgreater(a, 0) ? copysign(1, a) : 0) \
    DO(EXP, exp_of(a))                                 \
    DO(FLOOR, a < x ? x : a)                           \
    DO(CLAMP, (a < x ? x : a) > y ? y : a < x ? x : a) \
    DO(SHRINK, fabs(a) <= x ? 0.0 : a)                 \
    DO(REPLACE, b != 0 ? x : a)                        \
    DO(LESS, TRUE(a < b))                              \
    DO(LEAST, TRUE(a <= b))                            \
    DO(EQUAL, TRUE(a == b))                            \
    DO(DIFFERENT, TRUE(a != b))                        \
    DO(BELOW, TRUE(a < x))                             \
    DO(UP_TO, TRUE(a <= x))                            \
    DO(SAME, TRUE(a == x))                             \
    DO(OTHER, TRUE(a != x))                            \
    DO(ABOVE, TRUE(a > x))                             \
    DO(FROM, TRUE(a >= x))

#define TRUE(condition) ((condition) ? 1.0 : 0.0)
#define NAMED(name, ...) name,
enum { BEFORE = ALONE - 1, OPERATIONS(NAMED) };

#define DONE(name, ...)                                                                \
    static inline double name##_OF(double a, double b, double c, double x, double y) { \
        (void)b, (void)c, (void)x, (void)y;                                            \
        return __VA_ARGS__;                                                            \
    }
OPERATIONS(DONE)

struct step {
    int32_t operation, to, a, b, c;
    int32_t group;  /* this step and those that follow are the group of that number; 0: it stands alone */
    int32_t within; /* of LOAD and SUMS: the groups do it, if the inputs are bfloat16, and the chunk is whole */
    double x, y;
    void *data;
};

#define REGISTERS 160

/* Registers may be one and the same, but element i depends on elements i only. All of a chunk is computed, also beyond the elements
 * that are asked for, where it does no harm: loops of known length are quicker. */
#ifdef __clang__
#define ALIKE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ALIKE _Pragma("GCC ivdep")
#endif

/* Steps that common methods do one after the other are compiled into one loop, which keeps what lies between in the processor's
 * registers. build.py makes them of groups.txt: each takes the group's first step, and for each register into which an input would
 * be loaded that input. */
#define GROUP(name) void name(double (*registers)[CHUNK], const uint16_t *const *raw, const struct step *steps)
typedef GROUP(group);
#include "groups.h"

/* Does all steps to the elements [at, at + m), which lie from `s` on in `raw`; `first` is the place of element 0 in the tensor. */
static void do_steps(struct work *work, const struct step *steps, int count, const void *const *raw, int64_t s, int64_t m, int64_t at,
                     int64_t n, int64_t first, const struct place *out, char *to, double (*registers)[CHUNK], int bf16) {
    const uint16_t *loaded[REGISTERS];
    const int quick = bf16 && m == CHUNK;
    for (const struct step *each = steps; each < steps + count; each++) {
        if (each->group) {
            (quick ? quicks : groups)[each->group](registers, loaded, each);
            each += lengths[each->group] - 1;
            continue;
        }
        double *restrict o = registers[each->to];
        const double *restrict a = registers[each->a], *restrict b = registers[each->b], *restrict c = registers[each->c];
        const double x = each->x, y = each->y;
        switch (each->operation) {
        case LOAD:
            if (quick) loaded[each->to] = (const uint16_t *)raw[each->a] + s;
            if (!quick || !each->within) load_double(raw[each->a], work->inputs[each->a].dtype, s, m, o);
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
        case TANH: tanh_of(a, CHUNK, o); break;
        case THIN: {
            struct thinning *thin = each->data;
            if (thin->equal != thin->equal && thin->drop == INFINITY) {
                const double keep = thin->keep;
                for (int i = 0; i < CHUNK; i++) o[i] = SHRINK_OF(a[i], 0, 0, keep, 0);
                break;
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
            if (!quick || !each->within) EACH(m) lanes[i] += a[i];
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
#define CASE(name, ...)                                                                            \
    case name:                                                                                     \
        _Pragma("GCC unroll 4") for (int i = 0; i < CHUNK; i++) o[i] = name##_OF(a[i], b[i], c[i], x, y); \
        break;
            OPERATIONS(CASE)
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
    int bf16 = 1;
    for (int k = 0; k < work->count; k++) bf16 &= work->inputs[k].dtype == BF16;
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
                do_steps(work, steps, count, raw, s, m, at + s, n, first + starts[p], out, to, registers, bf16);
            }
            if (out && !deliver(work, out, at + size, n)) return -1;
        }
    return bad == 0;
}
