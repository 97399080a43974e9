/* omega-ep: how fast threads compute side by side, and how fast when they share the pages that they write.
 *
 *   omega-ep [THREADS [LOG2PAIRS [shared]]]        by default 2 threads, 2^20 pairs
 *
 * Pairs of normally distributed numbers by Marsaglia's polar method, from the linear congruential generator of the
 * NAS parallel benchmarks (EP: x <- 5^13 x mod 2^46), whose verified sums these are. Threads take blocks of 2^16
 * pairs, each begun by a jump in the generator's sequence, so that the numbers do not depend on the threads.
 *
 * Each thread counts and sums in memory of its own; with `shared` all do in one page, a write for each pair.
 * Prints `omega-ep: private threads=2 pairs=1048576 seconds=... verified` (exit code 0) or `... WRONG` (exit code 1).
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096
#define THREADS 64
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

/* What a thread finds. Eight bytes apart where threads share: field `f` of thread `t` is word f * threads + t. */
enum { SUM_X, SUM_Y, RINGS, FIELDS = RINGS + 10 };

static unsigned threads = 2, log2pairs = 20;
static volatile double *results[THREADS];
static unsigned stride = 1;
static atomic_uint next_block;

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

static void *work(void *argument) {
    volatile double *result = results[(uintptr_t)argument];
    unsigned blocks = 1u << (log2pairs - BLOCK), block;
    while ((block = atomic_fetch_add(&next_block, 1)) < blocks) {
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

int main(int count, char **arguments) {
    int shared = count > 3 && strcmp(arguments[3], "shared") == 0;
    if (count > 1) threads = strtoul(arguments[1], NULL, 10);
    if (count > 2) log2pairs = strtoul(arguments[2], NULL, 10);
    unsigned of = 0, all = sizeof known / sizeof *known;
    while (of < all && known[of].log2 != log2pairs)
        of++;
    if (count > 4 || (count > 3 && !shared) || threads == 0 || threads > THREADS || of == all) {
        fprintf(stderr, "usage: omega-ep [THREADS [LOG2PAIRS [shared]]], up to %u threads, 2^%u to 2^%u pairs\n", THREADS,
                known[0].log2, known[all - 1].log2);
        return 2;
    }
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    double *memory = mmap(NULL, (THREADS + 1) * 2 * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        return 2;
    }
    stride = shared ? threads : 1;
    for (unsigned i = 0; i < threads; i++)
        results[i] = shared ? memory + i : memory + (i + 1) * 2 * PAGE / sizeof *memory;
    double began = now();
    pthread_t workers[THREADS];
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&workers[i], NULL, work, (void *)(uintptr_t)i) != 0) {
            perror("pthread_create");
            return 2;
        }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(workers[i], NULL);
    double took = now() - began, sums[FIELDS] = {0}, pairs = 0;
    for (unsigned i = 0; i < threads; i++)
        for (unsigned field = 0; field < FIELDS; field++)
            sums[field] += results[i][field * stride];
    for (unsigned ring = 0; ring < 10; ring++)
        pairs += sums[RINGS + ring];
    int right = near(sums[SUM_X], known[of].x) && near(sums[SUM_Y], known[of].y);
    printf("omega-ep: %s threads=%u pairs=%llu inside=%.0f x=%.12e y=%.12e seconds=%.2f %s\n",
           shared ? "shared" : "private", threads, 1ull << log2pairs, pairs, sums[SUM_X], sums[SUM_Y], took,
           right ? "verified" : "WRONG");
    return right ? 0 : 1;
}
