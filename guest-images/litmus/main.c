/* omega-litmus: whether several processors share memory as x86 promises.
 *
 *   omega-litmus [RUNS [SECONDS [TEST [broken]]]]
 *
 * Each test is tried RUNS times (by default 100000), or for SECONDS if that is less (0, the default: no limit), by
 * threads that are bound to the processors, one each and at least as many as the test needs. TEST names one test;
 * `broken` has it break the rule on purpose, so that something must be found.
 *
 * Prints a line `omega-litmus: NAME runs=N forbidden=N seconds=N` for each test, with what else is known, before it
 * the first forbidden outcomes as `omega-litmus: WRONG: ...`, and at the end `omega-litmus: ok: ...` (exit code 0) or
 * `omega-litmus: failed: ...` (exit code 1).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "litmus.h"

/* Outcomes that are printed of one test. */
#define SHOWN 3
/* Looks at what another thread has to do before the kernel may run somebody else. */
#define SPINS 1000

static const struct test *const tests[] = {&mp, &sb, &sb_fenced, &lb, &wrc, &iriw, &coherence, &atomics, &locks,
                                           &false_sharing, &straddle, &code, &clocks};

_Atomic uint64_t forbidden, relaxed;
int broken;
static uint64_t wanted = 100000;
static double limit;
static unsigned cpus[THREADS], cpu_count;

/* The test that runs. */
static const struct test *test;
static unsigned threads, groups;
static struct group *group;
static uint64_t runs;
static double began;
static _Atomic int over;
static struct {
    _Alignas(PAGE) _Atomic unsigned arrived, times;
    _Alignas(PAGE) char end;
} barrier;

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static void failed(const char *what) {
    perror(what);
    exit(2);
}

void wrong(const char *format, ...) {
    if (atomic_fetch_add(&forbidden, 1) >= SHOWN)
        return;
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("omega-litmus: WRONG: %s: %s\n", test->name, text);
}

void idle(unsigned *spins) {
    if (++*spins > SPINS)
        sched_yield();
    else
        __asm__ volatile("pause");
}

void meet(unsigned count) {
    unsigned time = atomic_load(&barrier.times), spins = 0;
    if (atomic_fetch_add(&barrier.arrived, 1) + 1 == count) {
        atomic_store(&barrier.arrived, 0);
        atomic_store(&barrier.times, time + 1);
    }
    while (atomic_load(&barrier.times) == time)
        idle(&spins);
}

void *shared(uint64_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        failed("mmap");
    return memory;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* Which place this thread has in a batch: another one each time, so that every processor meets every other. */
static unsigned place(unsigned thread, uint64_t batch) {
    unsigned order[THREADS], at = 0;
    for (unsigned i = 0; i < threads; i++)
        order[i] = i;
    for (unsigned i = threads - 1; i > 0; i--) {
        unsigned other = mix(batch << 8 | i) % (i + 1), kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    while (order[at] != thread)
        at++;
    return at;
}

static void *work(void *argument) {
    struct me me = {.thread = (unsigned)(uintptr_t)argument, .threads = threads, .group = group};
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(cpus[me.thread % cpu_count], &mine);
    if (sched_setaffinity(0, sizeof mine, &mine) != 0)
        failed("sched_setaffinity");
    for (me.batch = 1;; me.batch++) {
        meet(threads);
        if (over)
            return NULL;
        if (test->roles > 0) {
            unsigned at = place(me.thread, me.batch);
            me.group = &group[at / test->roles];
            me.role = at % test->roles;
        }
        test->batch(&me);
        meet(threads);
        if (test->judge && me.role == 0)
            test->judge(&me);
        if (me.thread == 0) {
            runs += (uint64_t)(test->roles ? groups : threads) * test->tries;
            over = runs >= wanted || (limit > 0 && now() - began >= limit);
        }
    }
}

static uint64_t run(void) {
    /* As many whole groups as there are processors for, or all processors. */
    groups = test->roles && cpu_count > test->roles ? cpu_count / test->roles : 1;
    threads = test->roles ? groups * test->roles : cpu_count < 2 ? 2 : cpu_count;
    group = shared(groups * sizeof *group);
    runs = forbidden = relaxed = 0;
    over = 0;
    if (test->prepare)
        test->prepare(threads);
    began = now();
    pthread_t all[THREADS];
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&all[i], NULL, work, (void *)(uintptr_t)i) != 0)
            failed("pthread_create");
    for (unsigned i = 0; i < threads; i++)
        pthread_join(all[i], NULL);
    char more[100] = "";
    if (test == &sb)
        snprintf(more, sizeof more, " relaxed=%lu", (uint64_t)relaxed);
    if (test->more)
        test->more(more, sizeof more);
    printf("omega-litmus: %s runs=%lu forbidden=%lu seconds=%.1f%s\n", test->name, runs, (uint64_t)forbidden,
           now() - began, more);
    fflush(stdout);
    munmap(group, groups * sizeof *group);
    return forbidden;
}

/* The processors that this process may run on. */
static void find_cpus(void) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        failed("sched_getaffinity");
    for (unsigned cpu = 0; cpu < CPU_SETSIZE && cpu_count < THREADS; cpu++)
        if (CPU_ISSET(cpu, &allowed))
            cpus[cpu_count++] = cpu;
}

int main(int count, char **arguments) {
    const char *only = count > 3 ? arguments[3] : NULL;
    if (count > 1) wanted = strtoull(arguments[1], NULL, 10);
    if (count > 2) limit = strtod(arguments[2], NULL);
    broken = count > 4 && strcmp(arguments[4], "broken") == 0;
    if (count > 5 || (count > 4 && !broken) || wanted == 0) {
        fprintf(stderr, "usage: omega-litmus [RUNS [SECONDS [TEST [broken]]]]\n");
        return 2;
    }
    find_cpus();
    uint64_t all = 0, bad = 0;
    unsigned done = 0;
    for (unsigned i = 0; i < sizeof tests / sizeof *tests; i++) {
        test = tests[i];
        if (only && strcmp(only, test->name) != 0)
            continue;
        bad += run();
        all += runs;
        done++;
    }
    if (done == 0) {
        fprintf(stderr, "omega-litmus: there is no test %s\n", only);
        return 2;
    }
    printf("omega-litmus: %s: %u tests on %u processors, %lu runs, %lu forbidden\n", bad ? "failed" : "ok", done,
           cpu_count, all, bad);
    return bad ? 1 : 0;
}
