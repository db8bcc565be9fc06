/* NumPy's generator PCG64DXSM. */

#pragma once

/* Of the states. */
#define MULTIPLIER 0xda942042e4dd58b5ULL

#define DRAWN 8 /* numbers that are drawn together */

typedef unsigned __int128 word_128;

static inline word_128 joined(const uint64_t *words) { return (word_128)words[1] << 64 | words[0]; } /* low word first */

/* The number that a state gives. */
static inline uint64_t output_of(word_128 state) {
    uint64_t high = (uint64_t)(state >> 64), low = (uint64_t)state | 1;
    high ^= high >> 32;
    high *= MULTIPLIER;
    high ^= high >> 48;
    return high * low;
}

#ifdef __AVX512DQ__
/* DRAWN states, of which each is the one after that of the lane before. */
struct states { __m512i low, high; };

static inline struct states times(struct states a, struct states b) {
    const __m512i half = _mm512_set1_epi64(0xFFFFFFFF), a_up = _mm512_srli_epi64(a.low, 32), b_up = _mm512_srli_epi64(b.low, 32);
    const __m512i low = _mm512_mul_epu32(a.low, b.low), one = _mm512_mul_epu32(a.low, b_up), other = _mm512_mul_epu32(a_up, b.low);
    const __m512i middle = _mm512_add_epi64(_mm512_add_epi64(_mm512_srli_epi64(low, 32), _mm512_and_si512(one, half)),
                                            _mm512_and_si512(other, half));
    __m512i high = _mm512_add_epi64(_mm512_mul_epu32(a_up, b_up), _mm512_srli_epi64(middle, 32));
    high = _mm512_add_epi64(high, _mm512_add_epi64(_mm512_srli_epi64(one, 32), _mm512_srli_epi64(other, 32)));
    high = _mm512_add_epi64(high, _mm512_add_epi64(_mm512_mullo_epi64(a.low, b.high), _mm512_mullo_epi64(a.high, b.low)));
    return (struct states){_mm512_mullo_epi64(a.low, b.low), high};
}

static inline struct states plus(struct states a, struct states b) {
    const __m512i low = _mm512_add_epi64(a.low, b.low), high = _mm512_add_epi64(a.high, b.high);
    return (struct states){low, _mm512_mask_sub_epi64(high, _mm512_cmplt_epu64_mask(low, a.low), high, _mm512_set1_epi64(-1))};
}

static inline __m512i outputs_of(struct states s) {
    __m512i high = _mm512_xor_si512(s.high, _mm512_srli_epi64(s.high, 32));
    high = _mm512_mullo_epi64(high, _mm512_set1_epi64((int64_t)MULTIPLIER));
    high = _mm512_xor_si512(high, _mm512_srli_epi64(high, 48));
    return _mm512_mullo_epi64(high, _mm512_or_si512(s.low, _mm512_set1_epi64(1)));
}

static inline struct states everywhere(word_128 x) {
    return (struct states){_mm512_set1_epi64((int64_t)(uint64_t)x), _mm512_set1_epi64((int64_t)(uint64_t)(x >> 64))};
}

/* What j steps multiply a state by, and its increment, which they add: for j from 0 to DRAWN, low words, then high ones. */
static uint64_t steps_by[2][DRAWN + 1], steps_add[2][DRAWN + 1];

__attribute__((constructor)) static void fill_steps(void) {
    word_128 by = 1, add = 0;
    for (int j = 0; j <= DRAWN; j++) {
        steps_by[0][j] = (uint64_t)by, steps_by[1][j] = (uint64_t)(by >> 64);
        steps_add[0][j] = (uint64_t)add, steps_add[1][j] = (uint64_t)(add >> 64);
        add = add * MULTIPLIER + 1, by *= MULTIPLIER;
    }
}

static inline struct states by_lanes(uint64_t (*words)[DRAWN + 1]) {
    return (struct states){_mm512_loadu_si512(words[0]), _mm512_loadu_si512(words[1])};
}

/* A generator's next DRAWN numbers' states, and what is added to each for that of the block after. */
struct stream { struct states now, more; };

static inline struct stream stream_of(const uint64_t *state, const uint64_t *step) {
    const struct states each = by_lanes(steps_by), sums = by_lanes(steps_add);
    return (struct stream){plus(times(everywhere(joined(state)), each), times(everywhere(joined(step)), sums)),
                           everywhere(joined(step) * ((word_128)steps_add[1][DRAWN] << 64 | steps_add[0][DRAWN]))};
}

static inline void go_on(struct stream *s) {
    const struct states by = everywhere((word_128)steps_by[1][DRAWN] << 64 | steps_by[0][DRAWN]);
    s->now = plus(times(s->now, by), s->more);
}

/* The next DRAWN numbers. */
static inline __attribute__((always_inline)) void next_block(struct stream *s, uint64_t *numbers) {
    _mm512_storeu_si512(numbers, outputs_of(s->now));
    go_on(s);
}

/* The next numbers of t <= 4 generators, which go on after them; for each there is room for a multiple of DRAWN. */
FUSED numbers_of_generators(const int t, uint64_t **state, uint64_t **step, int64_t need, uint64_t (*numbers)[CHUNK / 2]) {
    struct stream each[4];
    for (int k = 0; k < t; k++) each[k] = stream_of(state[k], step[k]);
    for (int64_t i = 0; i < need; i += DRAWN)
        for (int k = 0; k < t; k++) {
            _mm512_storeu_si512(numbers[k] + i, outputs_of(each[k].now));
            if (i + DRAWN <= need) go_on(each + k);
        }
    for (int k = 0; k < t; k++) {
        uint64_t low[DRAWN], high[DRAWN];
        _mm512_storeu_si512(low, each[k].now.low), _mm512_storeu_si512(high, each[k].now.high);
        state[k][0] = low[need % DRAWN], state[k][1] = high[need % DRAWN];
    }
}
#else
struct stream { word_128 now, step; };

static inline struct stream stream_of(const uint64_t *state, const uint64_t *step) {
    return (struct stream){joined(state), joined(step)};
}

static inline uint64_t next_number(struct stream *s) {
    const uint64_t number = output_of(s->now);
    s->now = s->now * MULTIPLIER + s->step;
    return number;
}

static inline void next_block(struct stream *s, uint64_t *numbers) {
    for (int i = 0; i < DRAWN; i++) numbers[i] = next_number(s);
}

/* The next numbers of t <= 4 generators, which go on after them. */
FUSED numbers_of_generators(const int t, uint64_t **state, uint64_t **step, int64_t need, uint64_t (*numbers)[CHUNK / 2]) {
    struct stream each[4];
    for (int k = 0; k < t; k++) each[k] = stream_of(state[k], step[k]);
    for (int64_t i = 0; i < need; i++)
        for (int k = 0; k < t; k++) numbers[k][i] = next_number(each + k);
    for (int k = 0; k < t; k++) state[k][0] = (uint64_t)each[k].now, state[k][1] = (uint64_t)(each[k].now >> 64);
}
#endif

/* How NumPy begins a generator from 128 bits: its SeedSequence (O'Neill, "Developing a seed_seq Alternative", 2015), and two steps
 * of PCG64. */
#define PCG64_MULTIPLIER ((word_128)0x2360ed051fc65da4 << 64 | 0x4385df649fccf645)

static inline uint32_t mixed(uint32_t value, uint32_t *factor, uint32_t next) {
    value ^= *factor, *factor *= next, value *= *factor;
    return value ^ value >> 16;
}

/* State and increment of the generator of a key; low words first. */
void geomerge_generator(const unsigned char *key, uint64_t *state, uint64_t *step) {
    uint32_t pool[4], factor = 0x43b0d7e5;
    uint64_t made[4];
    for (int i = 0; i < 4; i++) {
        const unsigned char *four = key + 4 * i;
        pool[i] = mixed(four[0] | four[1] << 8 | four[2] << 16 | (uint32_t)four[3] << 24, &factor, 0x931e8875);
    }
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            if (from != to) {
                const uint32_t both = pool[to] * 0xca01f9ddu - mixed(pool[from], &factor, 0x931e8875) * 0x4973f715u;
                pool[to] = both ^ both >> 16;
            }
    factor = 0x8b51f9dd;
    for (int i = 0; i < 4; i++) {
        const uint64_t low = mixed(pool[2 * i % 4], &factor, 0x58f38ded), high = mixed(pool[(2 * i + 1) % 4], &factor, 0x58f38ded);
        made[i] = high << 32 | low;
    }
    const word_128 increment = ((word_128)made[2] << 64 | made[3]) << 1 | 1;
    const word_128 first = (((word_128)made[0] << 64 | made[1]) + increment) * PCG64_MULTIPLIER + increment;
    state[0] = (uint64_t)first, state[1] = (uint64_t)(first >> 64);
    step[0] = (uint64_t)increment, step[1] = (uint64_t)(increment >> 64);
}
