/* Threads that share words, lines and pages: no write is lost, and nothing is written that nobody wrote. */
#include "litmus.h"

#define TRIES 8192
#define COUNTERS 64

/* Counters in one page, which all threads count up. */
static location *counters;

static void prepare_page(unsigned threads) {
    (void)threads;
    counters = shared((2 * THREADS + 3) * PAGE);
}

static void atomics_batch(struct me *me) {
    uint64_t before = (me->batch - 1) * TRIES * me->threads, sum = 0;
    for (unsigned i = 0; i < TRIES; i++) {
        location *counter = &counters[mix(i ^ me->batch) % COUNTERS];
        if (broken) {
            store(counter, load(counter) + 1);
        } else if (i % 2) {
            atomic_fetch_add(counter, 1);
        } else {
            uint64_t seen = load(counter);
            while (!atomic_compare_exchange_weak(counter, &seen, seen + 1))
                continue;
        }
    }
    meet(me->threads);
    for (unsigned i = 0; i < COUNTERS; i++)
        sum += load(&counters[i]);
    if (me->thread == 0 && sum != before + TRIES * me->threads) {
        wrong("the counters are %lu after %lu increments", sum, before + TRIES * me->threads);
        store(&counters[0], load(&counters[0]) + before + TRIES * me->threads - sum);
    }
}

const struct test atomics = {"atomic-increments", 0, TRIES, prepare_page, atomics_batch, 0, 0};

/* Locks in one page, each guarding two words in another: under a lock these are the same. */
struct guarded {
    uint64_t one, other;
};

static void take(location *lock) {
    unsigned spins = 0;
    for (;;) {
        uint64_t free = 0;
        if (atomic_compare_exchange_weak_explicit(lock, &free, 1, memory_order_acquire, memory_order_relaxed))
            return;
        idle(&spins);
    }
}

static void locks_batch(struct me *me) {
    volatile struct guarded *guarded = (volatile struct guarded *)((char *)counters + PAGE);
    for (unsigned i = 0; i < TRIES / 4; i++) {
        unsigned which = mix(i ^ me->batch ^ (uint64_t)me->thread << 32) % COUNTERS;
        if (!broken)
            take(&counters[which]);
        uint64_t one = guarded[which].one;
        if (one != guarded[which].other)
            wrong("what lock %u guards was %lu and %lu", which, one, guarded[which].other);
        guarded[which].one = one + 1;
        guarded[which].other = one + 1;
        if (!broken)
            atomic_store_explicit(&counters[which], 0, memory_order_release);
    }
    meet(me->threads);
    uint64_t sum = 0, expected = me->batch * (TRIES / 4) * me->threads;
    for (unsigned i = 0; i < COUNTERS; i++)
        sum += guarded[i].one;
    if (me->thread == 0 && sum != expected) {
        wrong("what the locks guard was counted to %lu instead of %lu", sum, expected);
        guarded[0].one += expected - sum;
    }
}

const struct test locks = {"cas-locks", 0, TRIES / 4, prepare_page, locks_batch, 0, 0};

/* Each thread has words of its own between those of others; nobody else writes them. */
static void false_sharing_batch(struct me *me) {
    /* Threads live as long as the test. */
    static _Thread_local uint64_t wrote[PAGE / sizeof(location)];
    unsigned turns = PAGE / sizeof(location) / me->threads;
    for (unsigned i = 0; i < TRIES; i++) {
        unsigned turn = i % turns, mine = turn * me->threads + me->thread;
        uint64_t found = load(&counters[mine]);
        if (found != wrote[turn])
            wrong("word %u holds %lu instead of %lu", mine, found, wrote[turn]);
        wrote[turn] = me->batch << 32 | i;
        /* Broken, it writes its neighbour's word too, as a page that is copied at the wrong moment would. */
        location *other = &counters[mine / me->threads * me->threads + (me->thread + 1) % me->threads];
        uint64_t stale = load(other);
        store(&counters[mine], wrote[turn]);
        if (broken)
            store(other, stale);
    }
}

const struct test false_sharing = {"false-sharing", 0, TRIES, prepare_page, false_sharing_batch, 0, 0};

static char *border(unsigned thread, unsigned wide) {
    return (char *)counters + PAGE + (2 * thread + 1 + wide) * PAGE - (wide ? 8 : 4);
}

/* Every thread writes a value across the border of two pages, then a flag that says which; its neighbour reads
 * the flag and then the value. An access across a border may be torn: each half is as new as the flag all the same. */
static void straddle_batch(struct me *me) {
    unsigned next = (me->thread + 1) % me->threads, wide = me->batch & 1;
    /* Two borders for each thread, for 8 bytes and for 16; the flags are in the first page. */
    char *to = border(me->thread, wide), *from = border(next, wide);
    location *flag = &counters[2 * me->thread + wide], *other = &counters[2 * next + wide];
    uint64_t low = 0, high = 0;
    for (unsigned i = 1; i <= TRIES; i++) {
        uint64_t value = (me->batch / 2 * TRIES + i) & 0x7fffffff, seen;
        if (broken)
            store(flag, value);
        keep();
        if (wide) {
            uint64_t pair[2] = {value, value};
            __asm__ volatile("movups %1, %%xmm0; movups %%xmm0, %0"
                             : "=m"(*(char(*)[16])to) : "m"(pair) : "xmm0", "memory");
        } else {
            __asm__ volatile("movq %1, %0" : "=m"(*(char(*)[8])to) : "r"(value << 32 | value) : "memory");
        }
        if (!broken)
            store(flag, value);
        keep();
        seen = load(other);
        keep();
        uint64_t before[2] = {low, high};
        if (wide) {
            uint64_t pair[2];
            __asm__ volatile("movups %1, %%xmm0; movups %%xmm0, %0"
                             : "=m"(pair) : "m"(*(char(*)[16])from) : "xmm0", "memory");
            low = pair[0], high = pair[1];
        } else {
            uint64_t both;
            __asm__ volatile("movq %1, %0" : "=r"(both) : "m"(*(char(*)[8])from) : "memory");
            low = both & 0xffffffff, high = both >> 32;
        }
        if (low < seen || high < seen || low < before[0] || high < before[1])
            wrong("border of thread %u: %lu and %lu after flag %lu and %lu and %lu", next, low, high, seen, before[0],
                  before[1]);
    }
}

const struct test straddle = {"page-straddling", 0, TRIES, prepare_page, straddle_batch, 0, 0};
