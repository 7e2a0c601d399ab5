// The team of threads. Between runs they spin shortly and then sleep; inside a run they spin and then yield, so that a
// busy core costs a time slice and never a deadlock. A forked child starts with no threads and makes its own.
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 256, SPINS = 2000 };
#define LINE __attribute__((aligned(64)))

struct team {
    LINE atomic_size_t claimed;
    LINE atomic_int arrived;
    LINE atomic_uint phase;
    LINE atomic_uint epoch; // number of the run * 512 + its threads, in one word so that both change at once
    LINE atomic_int unfinished;
    int size; // threads of this run
    body run;
    void *argument;
};

static team group;
static worker workers[MAX_THREADS];
static size_t arena_sizes[MAX_THREADS];
static int started = 1; // the caller counts as one
static unsigned first_epoch[MAX_THREADS];
static void *shared;
static size_t shared_size;
static pthread_mutex_t entry = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static inline void pause_briefly(int *spins) {
    if (++*spins > SPINS) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *work(void *argument) {
    worker *self = argument;
    unsigned seen = first_epoch[self->id];
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&group.epoch, memory_order_acquire) == seen; i++) {
            int spins = 0;
            pause_briefly(&spins);
        }
        if (atomic_load(&group.epoch) == seen) {
            pthread_mutex_lock(&mutex);
            while (atomic_load(&group.epoch) == seen) pthread_cond_wait(&wake, &mutex);
            pthread_mutex_unlock(&mutex);
        }
        seen = atomic_load(&group.epoch);
        if (self->id >= (int)(seen % 512)) continue;
        group.run(self, group.argument);
        atomic_fetch_sub_explicit(&group.unfinished, 1, memory_order_release);
    }
    return NULL;
}

static void forget_threads(void) {
    started = 1;
    pthread_mutex_init(&entry, NULL);
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&wake, NULL);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

static void *grown(void *old, size_t *size, size_t bytes) {
    if (bytes <= *size) return old;
    free(old);
    *size = (bytes + 4095) / 4096 * 4096;
    void *fresh = aligned_alloc(4096, *size);
    if (!fresh) *size = 0;
    return fresh;
}

void *pool_shared(size_t bytes) { return shared = grown(shared, &shared_size, bytes); }
void pool_lock(void) { pthread_mutex_lock(&entry); }
void pool_unlock(void) { pthread_mutex_unlock(&entry); }

int pool_run(int threads, size_t arena_bytes, body run, void *argument) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    for (int i = 0; i < threads; i++) {
        workers[i].team = &group;
        workers[i].id = i;
        workers[i].arena = grown(workers[i].arena, &arena_sizes[i], arena_bytes);
        if (!workers[i].arena) return -1;
    }
    for (; started < threads; started++) {
        pthread_t thread;
        first_epoch[started] = atomic_load(&group.epoch);
        if (pthread_create(&thread, NULL, work, &workers[started])) {
            threads = started; // fewer threads, the same result
            break;
        }
        pthread_detach(thread);
    }
    group.size = threads;
    group.run = run;
    group.argument = argument;
    atomic_store(&group.claimed, 0);
    atomic_store(&group.arrived, 0);
    atomic_store(&group.unfinished, threads - 1);
    if (threads > 1) {
        pthread_mutex_lock(&mutex);
        unsigned run_number = atomic_load(&group.epoch) / 512 + 1;
        atomic_store(&group.epoch, run_number * 512 + (unsigned)threads);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&mutex);
    }
    run(&workers[0], argument);
    for (int spins = 0; atomic_load_explicit(&group.unfinished, memory_order_acquire) > 0;) pause_briefly(&spins);
    return 0;
}

void pool_barrier(worker *self) {
    team *t = self->team;
    unsigned phase = atomic_load_explicit(&t->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) == t->size - 1) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->claimed, 0, memory_order_relaxed);
        atomic_store_explicit(&t->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&t->phase, memory_order_acquire) == phase;) pause_briefly(&spins);
}

size_t pool_claim(worker *self) { return atomic_fetch_add_explicit(&self->team->claimed, 1, memory_order_relaxed); }
