// A team of threads that run one function together and meet at barriers.
#ifndef TANDEM_POOL_H
#define TANDEM_POOL_H

#include <stddef.h>

typedef struct team team;

typedef struct {
    team *team;
    int id;      // 0 is the caller
    char *arena; // this thread's scratch memory
} worker;

typedef void (*body)(worker *self, void *argument);

// Runs body on `threads` threads, each with arena_bytes of private scratch; returns 0, or -1 without memory.
int pool_run(int threads, size_t arena_bytes, body run, void *argument);
// Every thread waits for the others; then the counter of `pool_claim` is 0 again.
void pool_barrier(worker *self);
// The next number that no thread has claimed since the last barrier.
size_t pool_claim(worker *self);
// Memory that all threads see, kept between runs; NULL when there is none. Call before pool_run, with the pool locked.
void *pool_shared(size_t bytes);
// Runs are one at a time: callers hold this lock around pool_shared and pool_run.
void pool_lock(void);
void pool_unlock(void);

#endif
