// Threads come from the OpenMP runtime that torch has loaded: `tandem_use_openmp` is given its entry point once. Without it
// (another runtime, or none) they come from our own pool.
#include "tasks.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "pool.h"

typedef void (*parallel_region)(void (*body)(void *), void *argument, unsigned threads, unsigned flags);

typedef struct {
    atomic_size_t next;
    atomic_int failed;
    size_t count, scratch_floats;
    piece run;
    const void *argument;
} work;

static parallel_region openmp;
static _Thread_local float *scratch;
static _Thread_local size_t scratch_size;

// GNU's runtime does not survive a fork: its threads are gone in the child, and it waits for them for ever.
static void forget_openmp(void) { openmp = NULL; }

void tandem_use_openmp(void *gomp_parallel) {
    openmp = (parallel_region)gomp_parallel;
    pthread_atfork(NULL, NULL, forget_openmp);
}

static void take_pieces(void *argument) {
    work *w = argument;
    if (w->scratch_floats > scratch_size) {
        free(scratch);
        scratch_size = (w->scratch_floats + 1023) / 1024 * 1024;
        scratch = aligned_alloc(4096, scratch_size * sizeof(float));
        if (!scratch) scratch_size = 0;
    }
    if (!scratch && w->scratch_floats) {
        atomic_store(&w->failed, 1);
        return;
    }
    for (size_t i; (i = atomic_fetch_add(&w->next, 1)) < w->count;) w->run(i, scratch, w->argument);
}

static void take_pieces_in_pool(worker *self, void *argument) {
    (void)self;
    take_pieces(argument);
}

int tasks_run(size_t count, int threads, size_t scratch_floats, piece run, const void *argument) {
    work w = {.count = count, .scratch_floats = scratch_floats, .run = run, .argument = argument};
    if ((size_t)threads > count) threads = (int)count;
    if (threads <= 1) {
        take_pieces(&w);
    } else if (openmp) {
        openmp(take_pieces, &w, (unsigned)threads, 0);
    } else {
        pool_lock();
        int failed = pool_run(threads, 0, take_pieces_in_pool, &w);
        pool_unlock();
        if (failed) return -1;
    }
    return atomic_load(&w.failed) ? -1 : 0;
}
