/* What is done while keys are counted (ranks.h), which leaves the units for vectors idle: pieces of PACK elements of two things. */

#pragma once

/* The next task vector's keys, where there is one (n is not 0), and `blocks` of this one's words in the next row. */
struct beside {
    struct keying keys;
    struct stream words;
    uint64_t *to;
    int64_t blocks;
};

/* The i-th part of a pack's, of PACK / PARTS: not more at once than processors take up before they go on to what comes after. */
FUSED do_some(const int i, struct beside *b) {
    if (i == 0 && b->keys.at + PACK <= b->keys.n) more_keys(1, &b->keys);
    if (i == PACK / PARTS / 2 && b->blocks) next_block(&b->words, b->to), b->to += DRAWN, b->blocks--;
}

static void do_rest(struct beside *b) {
    for (; b->blocks; b->blocks--, b->to += DRAWN) next_block(&b->words, b->to);
    if (b->keys.n) all_keys(&b->keys);
}
