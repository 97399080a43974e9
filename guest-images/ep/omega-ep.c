/* omega-ep: how fast processors compute side by side, and what it costs if they share what they write.
 *
 *   omega-ep [WORKERS [LOG2PAIRS [processes|threads|shared]]]        by default 2 workers, 2^20 pairs, processes
 *
 * Pairs of normally distributed numbers by Marsaglia's polar method, from the linear congruential generator of the
 * NAS parallel benchmarks (EP: x <- 5^13 x mod 2^46), whose verified sums these are. Of n workers each takes every
 * n-th block of 2^16 pairs, which begins with a jump in the generator's sequence, so that the numbers do not depend on n.
 *
 *   processes   as the benchmark with MPI: nothing is shared until the end
 *   threads     as the benchmark with OpenMP: each counts and sums in pages of its own, but the page tables are the same,
 *               which some processors write to whenever they look into them
 *   shared      threads that all write to one page, for each pair
 *
 * Prints `omega-ep: processes workers=2 pairs=1048576 seconds=... verified` (exit code 0) or `... WRONG` (exit code 1).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORKERS 64
#define BLOCK 16
#define SEED 271828183ull
#define FACTOR 1220703125ull /* 5^13 */
#define MASK ((1ull << 46) - 1)

/* What comes out. Those of 2^24, 2^25 and 2^28 pairs (classes S, W and A) are the benchmark's own. */
static const struct {
    unsigned log2;
    double x, y;
} known[] = {
    {16, 7.772321454195e+01, 2.790554015472e+01},
    {17, 6.506990105121e+01, -1.341716322702e+02},
    {18, 1.873198969612e+02, -3.797408336054e+02},
    {19, 3.776455003569e+02, 1.626276842673e+01},
    {20, 6.741650709778e+02, -1.508139842420e+02},
    {21, -6.587035127850e+02, -1.025528696499e+03},
    {22, 2.955203522463e+01, -1.959796076774e+03},
    {23, -8.018784539369e+02, -5.083561080174e+03},
    {24, -3.247834652034e+03, -6.958407078382e+03},
    {25, -2.863319731646e+03, -6.320053679108e+03},
    {26, 2.406884086403e+02, 1.262912082009e+03},
    {27, 9.581675482412e+03, -7.742647578417e+03},
    {28, -4.295875165632e+03, -1.580732573678e+04},
};

/* What a worker finds. Eight bytes apart where they share: field `f` of worker `w` is word f * workers + w. */
enum { SUM_X, SUM_Y, RINGS, FIELDS = RINGS + 10 };

static const char *const modes[] = {"processes", "threads", "shared"};
enum { PROCESSES, THREADS, SHARED, MODES };

static unsigned workers = 2, log2pairs = 20;
static volatile double *results[WORKERS];
static unsigned stride = 1;

/* The generator after `steps` steps from `from`. */
static uint64_t jump(uint64_t from, uint64_t steps) {
    for (uint64_t factor = FACTOR; steps > 0; steps /= 2, factor = factor * factor & MASK)
        if (steps & 1)
            from = from * factor & MASK;
    return from;
}

static double draw(uint64_t *state) {
    *state = *state * FACTOR & MASK;
    return 2 * (double)*state * 0x1p-46 - 1;
}

/* Each on a processor of its own, as MPI binds them: a scheduler takes its time to spread what was begun on one. */
static void stay(unsigned worker) {
    cpu_set_t may, mine;
    if (sched_getaffinity(0, sizeof may, &may) != 0)
        return;
    unsigned left = worker % CPU_COUNT(&may), processor = 0;
    while (!CPU_ISSET(processor, &may) || left-- > 0)
        processor++;
    CPU_ZERO(&mine);
    CPU_SET(processor, &mine);
    sched_setaffinity(0, sizeof mine, &mine);
}

static void *work(void *argument) {
    unsigned worker = (uintptr_t)argument, blocks = 1u << (log2pairs - BLOCK);
    volatile double *result = results[worker];
    stay(worker);
    for (unsigned block = worker; block < blocks; block += workers) {
        uint64_t state = jump(SEED, 2 * ((uint64_t)block << BLOCK));
        for (unsigned i = 0; i < 1u << BLOCK; i++) {
            double x = draw(&state), y = draw(&state), square = x * x + y * y;
            if (square > 1)
                continue;
            double scale = sqrt(-2 * log(square) / square);
            x *= scale, y *= scale;
            unsigned ring = fmax(fabs(x), fabs(y));
            result[SUM_X * stride] += x;
            result[SUM_Y * stride] += y;
            result[(RINGS + (ring < 9 ? ring : 9)) * stride] += 1;
        }
    }
    return NULL;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int near(double found, double right) {
    return fabs((found - right) / right) < 1e-8;
}

static int failed(const char *what) {
    perror(what);
    return 2;
}

static int run_threads(void) {
    pthread_t all[WORKERS];
    for (unsigned i = 0; i < workers; i++)
        if ((errno = pthread_create(&all[i], NULL, work, (void *)(uintptr_t)i)) != 0)
            return failed("pthread_create");
    for (unsigned i = 0; i < workers; i++)
        pthread_join(all[i], NULL);
    return 0;
}

static int run_processes(void) {
    for (unsigned i = 0; i < workers; i++)
        switch (fork()) {
        case -1:
            return failed("fork");
        case 0: {
            /* What others read it writes once, at the end. */
            volatile double found[FIELDS] = {0}, *result = results[i];
            results[i] = found;
            work((void *)(uintptr_t)i);
            for (unsigned field = 0; field < FIELDS; field++)
                result[field] = found[field];
            _exit(0);
        }
        }
    for (unsigned i = 0; i < workers; i++) {
        int status;
        if (wait(&status) == -1 || status != 0)
            return failed("wait");
    }
    return 0;
}

int main(int count, char **arguments) {
    unsigned mode = PROCESSES, of = 0, all = sizeof known / sizeof *known;
    if (count > 1) workers = strtoul(arguments[1], NULL, 10);
    if (count > 2) log2pairs = strtoul(arguments[2], NULL, 10);
    if (count > 3)
        for (mode = 0; mode < MODES && strcmp(arguments[3], modes[mode]) != 0;)
            mode++;
    while (of < all && known[of].log2 != log2pairs)
        of++;
    if (count > 4 || mode == MODES || workers == 0 || workers > WORKERS || of == all) {
        fprintf(stderr, "usage: omega-ep [WORKERS [LOG2PAIRS [processes|threads|shared]]], up to %u workers, 2^%u to 2^%u pairs\n",
                WORKERS, known[0].log2, known[all - 1].log2);
        return 2;
    }
    double *memory =
        mmap(NULL, (WORKERS + 1) * 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return failed("mmap");
    stride = mode == SHARED ? workers : 1;
    for (unsigned i = 0; i < workers; i++)
        results[i] = mode == SHARED ? memory + i : memory + (i + 1) * 2 * PAGE / sizeof *memory;
    double began = now();
    int ran = mode == PROCESSES ? run_processes() : run_threads();
    if (ran != 0)
        return ran;
    double took = now() - began, sums[FIELDS] = {0}, pairs = 0;
    for (unsigned i = 0; i < workers; i++)
        for (unsigned field = 0; field < FIELDS; field++)
            sums[field] += results[i][field * stride];
    for (unsigned ring = 0; ring < 10; ring++)
        pairs += sums[RINGS + ring];
    int right = near(sums[SUM_X], known[of].x) && near(sums[SUM_Y], known[of].y);
    printf("omega-ep: %s workers=%u pairs=%llu inside=%.0f x=%.12e y=%.12e seconds=%.2f %s\n", modes[mode], workers,
           1ull << log2pairs, pairs, sums[SUM_X], sums[SUM_Y], took, right ? "verified" : "WRONG");
    return right ? 0 : 1;
}
