/* Relations between loads and stores of few locations, as Intel's manual (volume 3, 9.2.3) and AMD's (volume 2,
 * 7.2) tell them. Every thread of a group goes through all slots in the same order, as fast as it can; each notes
 * what it saw, a bit for each slot, and afterwards one of them puts the facts together. */
#include <string.h>

#include "litmus.h"

/* Where slot `i` begins in this batch, so that threads do not always meet at the same pages. */
static unsigned at(const struct me *me, unsigned i) {
    return (i + (unsigned)mix(me->batch)) % SLOTS;
}

/* The two locations of a slot: in two pages, or beside each other, by turns. */
static location *x(struct me *me, unsigned slot) {
    return &me->group->place[me->batch & 1 ? slot : 2 * slot];
}

static location *y(struct me *me, unsigned slot) {
    return &me->group->place[me->batch & 1 ? slot + SLOTS : 2 * slot + 1];
}

/* Threads begin a little apart, by another amount each time. */
static void stagger(const struct me *me) {
    for (unsigned i = mix(me->batch * ROLES + me->role) % 256; i > 0; i--)
        __asm__ volatile("pause");
}

/* Whether what was read is of this batch. It is of the last one otherwise, or something was lost. */
static int is_new(const struct me *me, uint64_t value, unsigned slot) {
    if (value != me->batch && value != me->batch - 1)
        wrong("slot %u holds %lu in batch %lu", slot, value, me->batch);
    return value == me->batch;
}

/* What this thread has found; it is published as a whole. */
static _Thread_local facts noted[FACTS];

static void note(unsigned fact, unsigned slot, int holds) {
    uint64_t *word = &noted[fact][slot / 64], bit = 1ull << slot % 64;
    *word = holds ? *word | bit : *word & ~bit;
}

static void publish(struct me *me) {
    memcpy(me->group->found[me->role], noted, sizeof noted);
}

static uint64_t fact(struct me *me, unsigned role, unsigned fact, unsigned word) {
    return me->group->found[role][fact][word];
}

/* Counts the slots of which `outcome` holds: an expression of the facts of `word`. */
#define COUNT(outcome, name)                                                                                   \
    for (unsigned word = 0; word < SLOTS / 64; word++) {                                                       \
        uint64_t bad = (outcome);                                                                              \
        for (; bad != 0; bad &= bad - 1)                                                                       \
            wrong(name ": slot %u of batch %lu", word * 64 + (unsigned)__builtin_ctzll(bad), me->batch);       \
    }

/* What a thread reads, in the order of its slots; looked at when all is read, since that takes time. */
static _Thread_local uint64_t first[SLOTS], second[SLOTS];

static void note_both(struct me *me) {
    for (unsigned i = 0; i < SLOTS; i++) {
        unsigned slot = at(me, i);
        note(0, slot, is_new(me, first[i], slot));
        note(1, slot, is_new(me, second[i], slot));
    }
    publish(me);
}

/* Message passing: who sees the flag sees the message. */
static void mp_batch(struct me *me) {
    stagger(me);
    for (unsigned i = 0; i < SLOTS; i++) {
        location *message = x(me, at(me, i)), *flag = y(me, at(me, i));
        if (me->role == 0) {
            store(broken ? flag : message, me->batch);
            keep();
            store(broken ? message : flag, me->batch);
        } else {
            first[i] = load(flag);
            keep();
            second[i] = load(message);
        }
    }
    if (me->role == 1)
        note_both(me);
}

static void mp_judge(struct me *me) {
    COUNT(fact(me, 1, 0, word) & ~fact(me, 1, 1, word), "the flag came before its message")
}

const struct test mp = {"message-passing", 2, SLOTS, 0, mp_batch, mp_judge, 0};

/* Store buffering: both threads may read what was there before, unless there is a fence between. */
static void sb_with(struct me *me, int fenced) {
    stagger(me);
    for (unsigned i = 0; i < SLOTS; i++) {
        location *mine = x(me, at(me, i)), *other = y(me, at(me, i));
        if (me->role == 1) {
            location *swap = mine;
            mine = other, other = swap;
        }
        store(mine, me->batch);
        if (!fenced || broken)
            keep();
        else if (me->batch & 2)
            __asm__ volatile("mfence" ::: "memory");
        else
            __asm__ volatile("lock; addq $0, (%%rsp)" ::: "memory", "cc");
        first[i] = load(other);
    }
    for (unsigned i = 0; i < SLOTS; i++)
        note(0, at(me, i), is_new(me, first[i], at(me, i)));
    publish(me);
}

static void sb_batch(struct me *me) { sb_with(me, 0); }
static void sb_fenced_batch(struct me *me) { sb_with(me, 1); }

static void sb_judge(struct me *me) {
    for (unsigned word = 0; word < SLOTS / 64; word++)
        relaxed += __builtin_popcountll(~fact(me, 0, 0, word) & ~fact(me, 1, 0, word));
}

static void sb_fenced_judge(struct me *me) {
    COUNT(~fact(me, 0, 0, word) & ~fact(me, 1, 0, word), "both loads passed a fence")
}

const struct test sb = {"store-buffering", 2, SLOTS, 0, sb_batch, sb_judge, 0};
const struct test sb_fenced = {"store-buffering-fenced", 2, SLOTS, 0, sb_fenced_batch, sb_fenced_judge, 0};

/* Load buffering: no store passes a load before it, so not both loads see the other's store. */
static void lb_batch(struct me *me) {
    stagger(me);
    for (unsigned i = 0; i < SLOTS; i++) {
        location *mine = x(me, at(me, i)), *other = y(me, at(me, i));
        if (me->role == 1) {
            location *swap = mine;
            mine = other, other = swap;
        }
        if (broken) {
            store(mine, me->batch);
            __asm__ volatile("mfence" ::: "memory");
        }
        first[i] = load(other);
        keep();
        store(mine, me->batch);
    }
    for (unsigned i = 0; i < SLOTS; i++)
        note(0, at(me, i), is_new(me, first[i], at(me, i)));
    publish(me);
}

static void lb_judge(struct me *me) {
    COUNT(fact(me, 0, 0, word) & fact(me, 1, 0, word), "both stores came before the loads before them")
}

const struct test lb = {"load-buffering", 2, SLOTS, 0, lb_batch, lb_judge, 0};

/* Write-to-read causality: who sees a store that was made after seeing another sees that other too. */
static void wrc_batch(struct me *me) {
    stagger(me);
    for (unsigned i = 0; i < SLOTS; i++) {
        location *cause = x(me, at(me, i)), *effect = y(me, at(me, i));
        switch (me->role) {
        case 0:
            store(cause, me->batch);
            break;
        case 1:
            if (broken)
                store(effect, me->batch);
            keep();
            first[i] = second[i] = load(cause);
            keep();
            store(effect, me->batch);
            break;
        default:
            first[i] = load(effect);
            keep();
            second[i] = load(cause);
        }
    }
    if (me->role > 0)
        note_both(me);
}

static void wrc_judge(struct me *me) {
    /* Broken, the effect comes first, whatever was seen of the cause. */
    COUNT((broken ? ~0ull : fact(me, 1, 0, word)) & fact(me, 2, 0, word) & ~fact(me, 2, 1, word),
          "the effect came before its cause")
}

const struct test wrc = {"write-to-read", 3, SLOTS, 0, wrc_batch, wrc_judge, 0};

/* Independent reads of independent writes: two readers agree which of two stores came first. */
static void iriw_batch(struct me *me) {
    stagger(me);
    for (unsigned i = 0; i < SLOTS; i++) {
        location *a = x(me, at(me, i)), *b = y(me, at(me, i));
        if (me->role < 2) {
            store(me->role == 0 ? a : b, me->batch);
            continue;
        }
        if (me->role == 3) {
            location *swap = a;
            a = b, b = swap;
        }
        first[i] = load(a);
        keep();
        /* Broken, one reader has a copy of before. */
        second[i] = broken && me->role == 3 ? me->batch - 1 : load(b);
    }
    if (me->role >= 2)
        note_both(me);
}

static void iriw_judge(struct me *me) {
    COUNT(fact(me, 2, 0, word) & ~fact(me, 2, 1, word) & fact(me, 3, 0, word) & ~fact(me, 3, 1, word),
          "two readers saw two stores in different orders")
}

const struct test iriw = {"iriw", 4, SLOTS, 0, iriw_batch, iriw_judge, 0};

/* Coherence: all agree on one order of the stores to one location. Two threads store, two read twice. */
static void coherence_batch(struct me *me) {
    stagger(me);
    for (unsigned i = 0; i < SLOTS; i++) {
        location *place = x(me, at(me, i));
        if (me->role < 2) {
            store(place, me->batch * 2 + me->role);
        } else {
            first[i] = load(place);
            keep();
            second[i] = load(place);
        }
    }
    for (unsigned i = 0; me->role >= 2 && i < SLOTS; i++) {
        unsigned slot = at(me, i);
        uint64_t was = broken ? second[i] : first[i], is = broken ? first[i] : second[i];
        if (is / 2 < was / 2)
            wrong("slot %u went from %lu back to %lu in batch %lu", slot, was, is, me->batch);
        note(0, slot, was == me->batch * 2 && is == was + 1);
        note(1, slot, is == me->batch * 2 && was == is + 1);
    }
    publish(me);
}

static void coherence_judge(struct me *me) {
    COUNT((fact(me, 2, 0, word) & fact(me, 3, 1, word)) | (fact(me, 2, 1, word) & fact(me, 3, 0, word)),
          "two readers saw two stores to one location in different orders")
}

const struct test coherence = {"coherence", 4, SLOTS, 0, coherence_batch, coherence_judge, 0};
