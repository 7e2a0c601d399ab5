// A team of threads that run one function together, in phases that each consist of numbered tasks. A phase ends when its
// tasks are done, not when all threads have come: on a busy machine a thread that does not get its core is not waited for,
// the others do its share, and it catches up by skipping the phases that are over.
#ifndef TANDEM_POOL_H
#define TANDEM_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    int id;         // 0 is the caller
    uint32_t phase; // how far this thread is in the function
    char *arena;    // this thread's scratch memory
} worker;

enum { NO_TASK = -1 };
typedef void (*body)(worker *self, void *argument);

// Runs body on up to `threads` threads, each with arena_bytes of private scratch; returns 0, or -1 without memory.
int pool_run(int threads, size_t arena_bytes, body run, void *argument);
// Whether the phase is over: nothing is left to do in it, and what it read may be changing already.
int pool_late(const worker *self);
// The next task of this phase, below `tasks` (1 or more, the same for all threads), or NO_TASK. Each needs a pool_done.
int64_t pool_claim(worker *self, size_t tasks);
void pool_done(worker *self, size_t tasks);
// Waits until all tasks of this phase are done, and goes on to the next.
void pool_next(worker *self);
// Memory that all threads see, kept between runs; NULL when there is none. Call before pool_run, with the pool locked.
void *pool_shared(size_t bytes);
// Runs are one at a time: callers hold this lock around pool_shared and pool_run.
void pool_lock(void);
void pool_unlock(void);

#endif
