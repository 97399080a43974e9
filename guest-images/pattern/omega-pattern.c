/* omega-pattern: notices one stale, lost, zeroed or misplaced page of the memory that it runs in.
 *
 *   omega-pattern MIB [THREADS [ROUNDS [SECONDS [SEED]]]]      by default 2 threads, 8 rounds, 0 seconds
 *
 * Each page holds a pattern of its own place and of its generation, which counts how often it was written.
 * In every round each thread looks at all pages of its slice: in order, by strides or at random, by turns. It
 * compares the whole page with what it must hold and then leaves it alone, writes the next generation, or gives
 * it back to the kernel, after which it must be zero until it is written again. Rounds go on until both ROUNDS
 * and SECONDS are reached.
 *
 * Prints a line for each round, and at the end `omega-pattern: ok: ...` (exit code 0) or, for the first wrong
 * page, `omega-pattern: WRONG: ...`, which says where it is and what it holds instead (exit code 1).
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define STRIDE 7

static uint64_t seed = 1;
static uint64_t pages;
static uint64_t *memory;
/* The generation of each page, 0 for one that must be zero, together with a check of it: this table lies in
 * the same memory. */
static uint64_t *generations;
static unsigned threads = 2;
static unsigned rounds = 8;
static unsigned seconds;
static pthread_barrier_t barrier;
static atomic_uint_fast64_t checks, writes, discards;
static atomic_int wrong, over;

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* The first two words say where the page belongs and its generation, the others follow from both. */
static uint64_t word(uint64_t page, uint64_t generation, uint64_t base, unsigned at) {
    switch (at) {
    case 0: return page ^ mix(seed);
    case 1: return generation;
    default: return base + at * 0x9e3779b97f4a7c15;
    }
}

static uint64_t base_of(uint64_t page, uint64_t generation) {
    return mix(seed ^ mix(page) ^ mix(~generation));
}

static uint64_t entry(uint64_t page, uint32_t generation) {
    return (uint64_t)generation << 32 | (uint32_t)mix(seed ^ page << 32 ^ generation);
}

static void failed(const char *what) {
    perror(what);
    exit(2);
}

/* Whether the page holds exactly this generation of page `of`. */
static int holds(const uint64_t *content, uint64_t of, uint64_t generation) {
    uint64_t base = base_of(of, generation);
    for (unsigned i = 0; i < WORDS; i++)
        if (content[i] != word(of, generation, base, i))
            return 0;
    return 1;
}

static int is_zero(const uint64_t *content) {
    for (unsigned i = 0; i < WORDS; i++)
        if (content[i] != 0)
            return 0;
    return 1;
}

/* Says what is wrong with a page, once. */
static void report(uint64_t page, uint32_t generation, unsigned round, const char *when) {
    if (atomic_exchange(&wrong, 1))
        return;
    /* What is looked at from here on may be right again: that too is worth knowing. */
    uint64_t content[WORDS];
    memcpy(content, memory + page * WORDS, PAGE);
    uint64_t of = content[0] ^ mix(seed), seen = content[1];
    char what[200];
    if (is_zero(content))
        snprintf(what, sizeof what, "zeroed, generation %" PRIu32 " is lost", generation);
    else if (generation != 0 && holds(content, page, generation))
        snprintf(what, sizeof what, "right at the second look, generation %" PRIu32, generation);
    else if (of == page && holds(content, page, seen))
        snprintf(what, sizeof what, "stale, generation %" PRIu64 " instead of %" PRIu32, seen, generation);
    else if (of < pages && holds(content, of, seen))
        snprintf(what, sizeof what, "misplaced, it holds page %" PRIu64 " in generation %" PRIu64
                 " instead of generation %" PRIu32, of, seen, generation);
    else {
        uint64_t base = base_of(page, generation);
        unsigned at = 0, bad = 0;
        for (unsigned i = WORDS; i-- > 0;)
            if (content[i] != (generation ? word(page, generation, base, i) : 0))
                at = i, bad++;
        snprintf(what, sizeof what, "torn, %u of %u words are not those of generation %" PRIu32
                 ", the first is word %u: %016" PRIx64, bad, WORDS, generation, at, content[at]);
    }
    printf("omega-pattern: WRONG: page %" PRIu64 " of %" PRIu64 " at %p, round %u, %s: %s\n", page, pages,
           (void *)(memory + page * WORDS), round, when, what);
    fflush(stdout);
}

static void visit(uint64_t page, unsigned round, uint64_t luck) {
    uint64_t *content = memory + page * WORDS;
    uint32_t generation = generations[page] >> 32;
    if (generations[page] != entry(page, generation) && !atomic_exchange(&wrong, 1)) {
        printf("omega-pattern: WRONG: entry %" PRIu64 " of the table, round %u: %016" PRIx64 "\n", page, round,
               generations[page]);
        return;
    }
    atomic_fetch_add_explicit(&checks, 1, memory_order_relaxed);
    if (generation == 0 ? !is_zero(content) : !holds(content, page, generation))
        return report(page, generation, round, "read");
    if (luck % 64 == 0) {
        if (madvise(content, PAGE, MADV_DONTNEED) != 0)
            failed("madvise");
        generations[page] = entry(page, 0);
        atomic_fetch_add_explicit(&discards, 1, memory_order_relaxed);
    } else if (luck % 2 == 0 || generation == 0) {
        generation++;
        uint64_t base = base_of(page, generation);
        for (unsigned i = 0; i < WORDS; i++)
            content[i] = word(page, generation, base, i);
        generations[page] = entry(page, generation);
        atomic_fetch_add_explicit(&writes, 1, memory_order_relaxed);
        if (!holds(content, page, generation))
            report(page, generation, round, "read back");
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* The order of a round: each number below `count` once. */
static uint64_t place(uint64_t i, uint64_t count, unsigned round, uint64_t *state) {
    switch (round % 3) {
    case 0:
        return i;
    case 1: { /* all that are 0 modulo STRIDE, then all that are 1, ... */
        uint64_t full = count / STRIDE, longer = count % STRIDE, cut = (full + 1) * longer;
        return i < cut ? i % (full + 1) * STRIDE + i / (full + 1)
                       : (i - cut) % full * STRIDE + longer + (i - cut) / full;
    }
    default: { /* a generator that goes round all of the next power of two */
        uint64_t size = 1;
        while (size < count)
            size *= 2;
        do
            *state = (*state * 0x5851f42d4c957f2d + 0x14057b7ef767814f) & (size - 1);
        while (*state >= count);
        return *state;
    }
    }
}

static void *work(void *argument) {
    unsigned me = (unsigned)(uintptr_t)argument;
    uint64_t first = pages * me / threads, count = pages * (me + 1) / threads - first;
    double began = now();
    for (unsigned round = 0;; round++) {
        uint64_t luck = mix(seed ^ (uint64_t)me << 32 ^ round), state = luck;
        uint64_t size = 1;
        while (size < count)
            size *= 2;
        state &= size - 1;
        for (uint64_t i = 0; i < count && !atomic_load_explicit(&wrong, memory_order_relaxed); i++) {
            luck = mix(luck);
            visit(first + place(i, count, round, &state), round, luck);
        }
        pthread_barrier_wait(&barrier);
        if (me == 0) {
            double passed = now() - began;
            printf("omega-pattern: round %u after %.1f s: %" PRIu64 " checks, %" PRIu64 " writes\n", round + 1, passed,
                   (uint64_t)checks, (uint64_t)writes);
            fflush(stdout);
            atomic_store(&over, atomic_load(&wrong) || (round + 1 >= rounds && passed >= seconds));
        }
        pthread_barrier_wait(&barrier);
        if (atomic_load(&over))
            return NULL;
    }
}

int main(int count, char **arguments) {
    if (count < 2 || count > 6) {
        fprintf(stderr, "usage: omega-pattern MIB [THREADS [ROUNDS [SECONDS [SEED]]]]\n");
        return 2;
    }
    pages = strtoull(arguments[1], NULL, 10) * (1 << 20) / PAGE;
    if (count > 2) threads = strtoul(arguments[2], NULL, 10);
    if (count > 3) rounds = strtoul(arguments[3], NULL, 10);
    if (count > 4) seconds = strtoul(arguments[4], NULL, 10);
    if (count > 5) seed = strtoull(arguments[5], NULL, 10);
    if (threads == 0 || threads > 64 || pages < threads * 2 * STRIDE) {
        fprintf(stderr, "omega-pattern: too little memory or threads\n");
        return 2;
    }
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    generations = mmap(NULL, pages * sizeof *generations, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || generations == MAP_FAILED)
        failed("mmap");
    /* Page by page, so that what is given back is given back. */
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    for (uint64_t page = 0; page < pages; page++)
        generations[page] = entry(page, 0);
    pthread_barrier_init(&barrier, NULL, threads);
    pthread_t others[64];
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&others[i], NULL, work, (void *)(uintptr_t)i) != 0)
            failed("pthread_create");
    for (unsigned i = 0; i < threads; i++)
        pthread_join(others[i], NULL);
    if (wrong)
        return 1;
    printf("omega-pattern: ok: %" PRIu64 " pages, %" PRIu64 " checks, %" PRIu64 " writes, %" PRIu64 " given back\n",
           pages, (uint64_t)checks, (uint64_t)writes, (uint64_t)discards);
    return 0;
}
