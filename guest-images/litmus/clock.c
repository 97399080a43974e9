/* Time never runs backwards, whoever looks at it: threads hand a token round, each reads its time stamp counter and
 * the kernel's clock when it gets it, and both have to be later than what the last one read. */
#include <cpuid.h>
#include <stdio.h>
#include <time.h>

#include "litmus.h"

#define HANDOVERS 64

static struct {
    _Alignas(PAGE) location turn;
    uint64_t ticks, nanoseconds;
} *token;
static uint64_t smallest;
static int has_rdtscp;

static void prepare(unsigned threads) {
    (void)threads;
    unsigned a, b, c, d = 0;
    has_rdtscp = __get_cpuid(0x80000001, &a, &b, &c, &d) && d & 1 << 27;
    token = shared(PAGE);
    smallest = UINT64_MAX;
}

/* The counter, read when all loads before are done. */
static uint64_t ticks(void) {
    uint32_t low, high;
    if (has_rdtscp)
        __asm__ volatile("rdtscp" : "=a"(low), "=d"(high) : : "rcx", "memory");
    else
        __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

static void clock_batch(struct me *me) {
    for (unsigned i = 0; i < HANDOVERS; i++) {
        uint64_t turn = ((me->batch - 1) * HANDOVERS + i) * me->threads + me->thread;
        unsigned spins = 0;
        while (atomic_load_explicit(&token->turn, memory_order_acquire) != turn)
            idle(&spins);
        uint64_t now = ticks() - (broken && me->thread == 1 ? 1ull << 40 : 0);
        struct timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        uint64_t nanoseconds = time.tv_sec * 1000000000ull + time.tv_nsec;
        if (turn > 0 && now < token->ticks)
            wrong("the time stamp counter of thread %u is %lu ticks behind", me->thread, token->ticks - now);
        else if (turn > 0 && now - token->ticks < smallest)
            smallest = now - token->ticks;
        if (nanoseconds < token->nanoseconds)
            wrong("the clock of thread %u is %lu ns behind", me->thread, token->nanoseconds - nanoseconds);
        token->ticks = now;
        token->nanoseconds = nanoseconds;
        atomic_store_explicit(&token->turn, turn + 1, memory_order_release);
    }
}

static void more(char *text, unsigned size) {
    snprintf(text, size, " smallest_step=%lu", smallest);
}

const struct test clocks = {"clock", 0, HANDOVERS, prepare, clock_batch, 0, more};
