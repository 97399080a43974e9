/* What the parts of omega-litmus share. */
#ifndef LITMUS_H
#define LITMUS_H
#include <stdatomic.h>
#include <stdint.h>

#define PAGE 4096
/* The most threads that there are. */
#define THREADS 64
/* How many times a relation is tried between two barriers: 512 pairs of locations share two pages. */
#define SLOTS 4096
/* Threads of one relation, and how many facts each of them notes. */
#define ROLES 4
#define FACTS 3

typedef _Atomic uint64_t location;
typedef uint64_t facts[SLOTS / 64];

/* The locations of one group of threads, and what its threads have found. */
struct group {
    _Alignas(PAGE) location place[2 * SLOTS];
    _Alignas(PAGE) facts found[ROLES][FACTS];
};

/* One thread in one batch. */
struct me {
    unsigned thread, threads;
    /* Counts batches from 1: what is written in a batch is newer than what was there before. */
    uint64_t batch;
    struct group *group;
    unsigned role;
};

struct test {
    const char *name;
    /* Threads of one group; 0: all threads do the same, in one group. */
    unsigned roles;
    /* How often one thread tries it in a batch. */
    unsigned tries;
    /* Before the first batch; may be NULL. */
    void (*prepare)(unsigned threads);
    /* What each thread does between two barriers. */
    void (*batch)(struct me *me);
    /* What one thread of each group finds in the facts afterwards; may be NULL. */
    void (*judge)(struct me *me);
    /* Added to the line of the result; may be NULL. */
    void (*more)(char *text, unsigned size);
};

/* Forbidden outcomes of the test that runs, and relaxed ones that x86 allows. */
extern _Atomic uint64_t forbidden, relaxed;
/* Breaks the rule on purpose: then something has to be found. */
extern int broken;

/* Counts a forbidden outcome; the first ones are printed. */
__attribute__((format(printf, 1, 2))) void wrong(const char *format, ...);
/* Waits until all threads are here. */
void meet(unsigned threads);
/* Lets others run for a moment: more than the first `spins` times that it is asked in a row, the kernel is too. */
void idle(unsigned *spins);
/* Memory of zeros that all threads share. */
void *shared(uint64_t bytes);
uint64_t mix(uint64_t x);

static inline uint64_t load(location *from) { return atomic_load_explicit(from, memory_order_relaxed); }
static inline void store(location *to, uint64_t value) { atomic_store_explicit(to, value, memory_order_relaxed); }
/* Keeps the compiler from moving accesses; the processor may do what it does. */
static inline void keep(void) { __asm__ volatile("" ::: "memory"); }

extern const struct test mp, sb, sb_fenced, lb, wrc, iriw, coherence;
extern const struct test atomics, locks, false_sharing, straddle;
extern const struct test code, clocks;
#endif
