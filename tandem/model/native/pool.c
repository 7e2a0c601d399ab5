// The team of threads. Between runs they spin shortly and then sleep; inside a run they spin and then yield. A forked child
// starts with no threads and makes its own.
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_THREADS = 256, SPINS = 2000, CLOSED = 1 << 30 };
#define LINE __attribute__((aligned(64)))

static struct {
    LINE atomic_ullong ticket; // number of the phase * 2^32 + its next task, in one word so that a claim is for this phase
    LINE atomic_size_t finished; // tasks of the phase
    LINE atomic_int gate;        // helpers inside the run, or CLOSED
    LINE atomic_uint epoch;      // number of the run
    int threads;
    body run;
    void *argument;
} team = {.gate = CLOSED};

static worker workers[MAX_THREADS];
static size_t arena_sizes[MAX_THREADS];
static int started = 1; // the caller counts as one
static void *shared;
static size_t shared_size;
static pthread_mutex_t entry = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_for(int *spins) {
    if (++*spins > SPINS) sched_yield();
    else relax();
}

// Enters the run if it is not over yet.
static int enter(void) {
    int inside = atomic_load(&team.gate);
    while (inside < CLOSED)
        if (atomic_compare_exchange_weak(&team.gate, &inside, inside + 1)) return 1;
    return 0;
}

static void *help(void *argument) {
    worker *self = argument;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&team.epoch) == seen; i++) relax();
        if (atomic_load(&team.epoch) == seen) {
            pthread_mutex_lock(&mutex);
            while (atomic_load(&team.epoch) == seen) pthread_cond_wait(&wake, &mutex);
            pthread_mutex_unlock(&mutex);
        }
        seen = atomic_load(&team.epoch);
        if (!enter()) continue;
        self->phase = 0;
        if (self->id < team.threads) team.run(self, team.argument);
        atomic_fetch_sub(&team.gate, 1);
    }
    return NULL;
}

static void forget_threads(void) {
    started = 1;
    atomic_store(&team.gate, CLOSED);
    pthread_mutex_init(&entry, NULL);
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&wake, NULL);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

static void *grown(void *old, size_t *size, size_t bytes) {
    if (old && bytes <= *size) return old;
    free(old);
    *size = (bytes / 4096 + 1) * 4096;
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
        workers[i].id = i;
        workers[i].arena = grown(workers[i].arena, &arena_sizes[i], arena_bytes);
        if (!workers[i].arena) return -1;
    }
    for (; started < threads; started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, &workers[started])) break; // fewer threads, the same result
        pthread_detach(thread);
    }
    team.threads = threads;
    team.run = run;
    team.argument = argument;
    atomic_store(&team.ticket, 0);
    atomic_store(&team.finished, 0);
    if (threads > 1) {
        atomic_store(&team.gate, 0);
        pthread_mutex_lock(&mutex);
        atomic_fetch_add(&team.epoch, 1);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&mutex);
    }
    workers[0].phase = 0;
    run(&workers[0], argument);
    if (threads > 1) {
        int spins = 0, inside = 0;
        while (!atomic_compare_exchange_weak(&team.gate, &inside, CLOSED)) {
            inside = 0;
            wait_for(&spins);
        }
    }
    return 0;
}

static uint32_t phase_of(unsigned long long ticket) { return (uint32_t)(ticket >> 32); }

int pool_late(const worker *self) { return phase_of(atomic_load(&team.ticket)) != self->phase; }

int64_t pool_claim(worker *self, size_t tasks) {
    unsigned long long ticket = atomic_load(&team.ticket);
    while (phase_of(ticket) == self->phase && (uint32_t)ticket < tasks)
        if (atomic_compare_exchange_weak(&team.ticket, &ticket, ticket + 1)) return (int64_t)(uint32_t)ticket;
    return NO_TASK;
}

void pool_done(worker *self, size_t tasks) {
    if (atomic_fetch_add(&team.finished, 1) + 1 < tasks) return;
    atomic_store(&team.finished, 0);
    atomic_store(&team.ticket, (unsigned long long)(self->phase + 1) << 32);
}

void pool_next(worker *self) {
    for (int spins = 0; !pool_late(self);) wait_for(&spins);
    self->phase++;
}
