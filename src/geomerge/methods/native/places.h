/* Where inputs and the output lie, how they are read and written a window at a time, and the loops that do no more than that. */

#pragma once

#define WINDOW (1 << 15)
#define BATCH (1 << 17) /* elements that are written together */
#define APART 576 /* between the windows of two inputs, lest they compete for the same lines of the cache */

/* Where elements lie: from `memory` on, or (if that is 0) from byte `offset` of an open file on. */
struct place {
    char *memory;
    int64_t offset;
    int32_t file, dtype;
};

/* The inputs of one call. */
struct work {
    const struct place *inputs;
    char *room;        /* for a window of each input and of the output */
    double *beginning; /* here go the first `first` elements of the result before they are rounded (0: nowhere) */
    int64_t first;
    int32_t count;
    int32_t failed; /* after -1: which input could not be read, -1 for the output, ... */
    int32_t error;  /* ... and errno, 0 when a file ended early */
    int64_t redone; /* elements of which float32 did not tell enough (DELLA, PCB) */
};

static const int64_t sizes[] = {2, 2, 4, 8};

/* The kernel copies five times slower on some processors (AMD's Zen 3) where the target begins 1 to 31 bytes after the source, both in
 * their pages (docs/benchmarks.md): how far to move in memory so that it does not. Gaps between windows have room for it. */
#define AWAY 32

static inline int64_t away(int64_t target, int64_t source) {
    uint64_t after = (uint64_t)(target - source) % 4096;
    return after && after < AWAY ? AWAY : 0;
}

/* Elements [at, at + n) of all inputs: pointers to them in `raw`. */
static int fetch(struct work *work, int64_t at, int64_t n, const void **raw) {
    char *room = work->room;
    for (int k = 0; k < work->count; k++) {
        const struct place *in = work->inputs + k;
        int64_t size = sizes[in->dtype];
        if (in->memory) {
            raw[k] = in->memory + at * size;
            continue;
        }
        int64_t left = n * size, from = in->offset + at * size;
        char *to = room + away((int64_t)(intptr_t)room, from);
        raw[k] = to;
        while (left) {
            ssize_t got = pread(in->file, to, (size_t)left, (off_t)from);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                work->failed = k;
                work->error = got ? errno : 0;
                return 0;
            }
            left -= got, from += got, to += got;
        }
        room += WINDOW * size + APART;
    }
    return 1;
}

/* Where there is room for a batch of the output that begins with element `at`. */
static char *room_for(const struct work *work, const struct place *out, int64_t at) {
    char *room = work->room;
    for (int k = 0; k < work->count; k++)
        if (!work->inputs[k].memory) room += WINDOW * sizes[work->inputs[k].dtype] + APART;
    return room + away(out->offset + at * sizes[out->dtype], (int64_t)(intptr_t)room);
}

/* Where a window of the output is to be put together ... */
static char *window_of(struct work *work, const struct place *out, int64_t at) {
    if (out->memory) return out->memory + at * sizes[out->dtype];
    return room_for(work, out, at - at % BATCH) + at % BATCH * sizes[out->dtype];
}

/* n elements from `from` on to their place in the output's file. */
static int put(struct work *work, const struct place *out, const char *from, int64_t at, int64_t n) {
    int64_t left = n * sizes[out->dtype], to = out->offset + at * sizes[out->dtype];
    while (left) {
        ssize_t got = pwrite(out->file, from, (size_t)left, (off_t)to);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            work->failed = -1;
            work->error = got ? errno : EIO;
            return 0;
        }
        left -= got, to += got, from += got;
    }
    return 1;
}

/* ... and from where it goes to its file, with those before it of the same batch; `n` is all of the output, `stop` how far it is. */
static int deliver(struct work *work, const struct place *out, int64_t stop, int64_t n) {
    if (out->memory || (stop % BATCH && stop < n)) return 1;
    int64_t at = (stop - 1) / BATCH * BATCH;
    return put(work, out, window_of(work, out, at), at, stop - at);
}

/* A piece [at, at + n) of a result before it is rounded, as far as that was asked for. */
#define TELL(T)                                                                              \
    static inline void tell_##T(struct work *work, int64_t at, int64_t n, const T *values) { \
        for (int64_t i = 0; i < n && at + i < work->first; i++) work->beginning[at + i] = (double)values[i]; \
    }

TELL(float) TELL(double)

/* The elements of the only input as doubles. */
int geomerge_load(struct work *work, int64_t n, double *out) {
    const void *raw[1];
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t m = least(WINDOW, n - at);
        if (!fetch(work, at, m, raw)) return -1;
        for (int64_t s = 0; s < m; s += CHUNK) load_double(raw[0], work->inputs[0].dtype, s, least(CHUNK, m - s), out + at + s);
    }
    return 1;
}

/* Whether all inputs are finite. */
int geomerge_finite(struct work *work, int64_t n) {
    double bad = 0;
    const void *raw[MOST];
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t m = least(WINDOW, n - at);
        if (!fetch(work, at, m, raw)) return -1;
        for (int k = 0; k < work->count; k++)
            bad += odd_raw(raw[k], work->inputs[k].dtype, 0, m);
    }
    return bad == 0;
}

#define PARALLEL 8 /* sums that the elements take turns in: the order of their addition (loss.py) */

static double added(const double *squares) {
    double sum = 0;
    EACH(PARALLEL) sum += squares[i];
    return sum;
}

/* Of n <= WINDOW merged elements: the sums of the squares of their difference from the only input's, and of what rounding to a dtype
 * adds to them. Where the second is more than a quarter of the first, differences up to `residue` of an element are none. */
int geomerge_change(struct work *work, int64_t n, const double *merged, int dtype, double residue, double *sums) {
    double change[CHUNK], error[CHUNK], x[CHUNK], room[CHUNK];
    const void *raw[1];
    if (!fetch(work, 0, n, raw)) return -1;
    for (int again = 0; again < 2; again++) {
        double changed[PARALLEL] = {0}, lost[PARALLEL] = {0};
        for (int64_t s = 0; s < n; s += CHUNK) {
            const double *here = merged + s;
            int64_t m = least(CHUNK, n - s);
            load_double(raw[0], work->inputs[0].dtype, s, m, x);
            EACH(m) change[i] = here[i] - x[i];
            store_double(here, dtype, 0, m, room);
            load_double(room, dtype, 0, m, x);
            EACH(m) error[i] = x[i] - here[i];
            if (again) EACH(m) {
                int none = fabs(change[i]) <= residue * fabs(here[i]) && fabs(here[i]) < INFINITY;
                change[i] = none ? 0 : change[i], error[i] = none ? 0 : error[i];
            }
            for (int64_t i = m; i % PARALLEL; i++) change[i] = error[i] = 0;
            for (int64_t i = 0; i < m; i += PARALLEL)
                for (int j = 0; j < PARALLEL; j++) changed[j] += change[i + j] * change[i + j], lost[j] += error[i + j] * error[i + j];
        }
        sums[0] = added(changed), sums[1] = added(lost);
        if (!(4 * sums[1] > sums[0])) break;
    }
    return 1;
}

/* Copies the only input, which has the output's dtype. Whether all of it is finite; `unbounded`: infinity is. */
int geomerge_copy(struct work *work, int64_t n, int unbounded, const struct place *out) {
    double bad = 0;
    double x[CHUNK];
    int dtype = work->inputs[0].dtype;
    for (int64_t at = 0; at < n; at += WINDOW) {
        int64_t m = least(WINDOW, n - at);
        const void *raw[1];
        if (!fetch(work, at, m, raw)) return -1;
        for (int64_t s = 0; s < m; s += CHUNK) {
            int64_t some = least(CHUNK, m - s);
            load_double(raw[0], dtype, s, some, x);
            if (unbounded) EACH(some) x[i] = x[i] == x[i] ? 0.0 : x[i];
            bad += damage_double(x, some);
        }
        memcpy(window_of(work, out, at), raw[0], (size_t)(m * sizes[dtype]));
        if (!deliver(work, out, at + m, n)) return -1;
    }
    return bad == 0;
}
