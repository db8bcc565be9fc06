/* Files mapped into memory, for loops that read them more than once. A page that can no longer be read (the file was cut short, the drive
 * is gone) would end the process with SIGBUS: here zeros take the place of it and all behind it, and whoever reads them is told. */

#pragma once

#define MAPPINGS 1024

static struct mapping {
    char *volatile begin;
    int64_t size;
    int file;
    volatile sig_atomic_t lost; /* whether some of it could not be read */
} mappings[MAPPINGS];

static struct sigaction sigbus_before;

static void read_zeros(int number, siginfo_t *info, void *context) {
    const uintptr_t page = (uintptr_t)info->si_addr & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1);
    for (int i = 0; info->si_code > 0 && i < MAPPINGS; i++) {
        struct mapping *m = mappings + i;
        const uintptr_t begin = (uintptr_t)m->begin;
        if (!begin || page < begin || page >= begin + (uintptr_t)m->size) continue;
        m->lost = 1;
        if (mmap((void *)page, begin + (uintptr_t)m->size - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED)
            return;
    }
    /* Nobody's here: what was done before is done. */
    if (sigbus_before.sa_flags & SA_SIGINFO) sigbus_before.sa_sigaction(number, info, context);
    else if (sigbus_before.sa_handler != SIG_DFL && sigbus_before.sa_handler != SIG_IGN) sigbus_before.sa_handler(number);
    else if (sigbus_before.sa_handler == SIG_DFL || info->si_code > 0) {
        sigaction(SIGBUS, &(struct sigaction){.sa_handler = SIG_DFL}, 0);
        if (info->si_code <= 0) raise(number); /* a missing page is looked at again */
    }
}

/* Maps the first `size` bytes of a file, which stays open, for reading: which mapping it is, -1 where that cannot be. Of this and
 * `geomerge_unmap` one call at a time. */
int geomerge_map(int file, int64_t size) {
    static int watching = 0;
    int i = 0;
    while (i < MAPPINGS && mappings[i].begin) i++;
    if (i == MAPPINGS) return -1;
    char *found = mmap(0, (size_t)size, PROT_READ, MAP_SHARED, file, 0);
    if (found == MAP_FAILED) return -1;
    if (!watching) {
        struct sigaction action = {.sa_sigaction = read_zeros, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, &action, &sigbus_before)) {
            munmap(found, (size_t)size);
            return -1;
        }
        watching = 1;
    }
    madvise(found, (size_t)size, MADV_SEQUENTIAL);
    mappings[i].size = size, mappings[i].file = file, mappings[i].lost = 0, mappings[i].begin = found;
    return i;
}

void *geomerge_mapped(int i) { return mappings[i].begin; }

/* What has kept some of it from being read: errno, 0 when the file ended early, -1: nothing. */
int geomerge_unread(int i) {
    struct stat now;
    if (fstat(mappings[i].file, &now)) return errno;
    if (now.st_size < mappings[i].size) return 0; /* on the last page there are zeros then */
    return mappings[i].lost ? EIO : -1;
}

/* Takes out what was read of it: the longer part of `geomerge_unmap`, which several threads may do at once for a mapping each. */
void geomerge_let_go(int i) { madvise(mappings[i].begin, (size_t)mappings[i].size, MADV_DONTNEED); }

void geomerge_unmap(int i) {
    char *begin = mappings[i].begin;
    mappings[i].begin = 0; /* from here on others may get these addresses */
    munmap(begin, (size_t)mappings[i].size);
}
