/* Code that one thread changes and all threads then run, as both manuals ask: the change is made while nobody runs
 * it, and everyone executes a serializing instruction before running it. */
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "litmus.h"

#define FUNCTIONS 256
#define LENGTH 16

static unsigned char *functions;

static void prepare(unsigned threads) {
    (void)threads;
    functions = shared(PAGE);
    if (mprotect(functions, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
        perror("mprotect");
        exit(2);
    }
}

/* What function `i` returns in this batch. */
static uint32_t result(uint64_t batch, unsigned i) {
    return (uint32_t)mix(batch << 8 | i);
}

/* nopl (%rax); mov $value, %eax; ret. In every second batch the value is inverted, and `not %eax` is in between. */
static void change(unsigned i, uint64_t batch) {
    unsigned char *at = functions + i * LENGTH;
    uint32_t value = batch & 1 ? ~result(batch, i) : result(batch, i);
    memcpy(at, (unsigned char[]){0x0f, 0x1f, 0x00, 0xb8}, 4);
    memcpy(at + 4, &value, 4);
    if (batch & 1)
        memcpy(at + 8, (unsigned char[]){0xf7, 0xd0, 0xc3}, 3);
    else
        at[8] = 0xc3;
}

static void code_batch(struct me *me) {
    if (me->thread == (me->batch - 1) % me->threads)
        for (unsigned i = 0; i < FUNCTIONS; i++)
            /* Broken, one function stays as it was. */
            if (!broken || me->batch == 1 || i != me->batch % FUNCTIONS)
                change(i, me->batch);
    meet(me->threads);
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
    for (unsigned i = 0; i < FUNCTIONS; i++) {
        uint32_t (*function)(void) = (uint32_t(*)(void))(functions + i * LENGTH);
        uint32_t returned = function();
        if (returned != result(me->batch, i))
            wrong("function %u returned %x instead of %x in batch %lu", i, returned, result(me->batch, i), me->batch);
    }
}

const struct test code = {"modified-code", 0, FUNCTIONS, prepare, code_batch, 0, 0};
