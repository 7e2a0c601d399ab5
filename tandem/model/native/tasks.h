// Independent pieces of work over torch's own OpenMP threads, so that its operators and ours never fight for the cores.
#ifndef TANDEM_TASKS_H
#define TANDEM_TASKS_H

#include <stddef.h>

// Does piece `index`; `scratch` is this thread's own and holds what the last piece left there.
typedef void (*piece)(size_t index, float *scratch, const void *argument);

// Runs pieces 0 to count - 1, each once, in any order on any thread; returns 0, or -1 without memory.
int tasks_run(size_t count, int threads, size_t scratch_floats, piece run, const void *argument);

#endif
