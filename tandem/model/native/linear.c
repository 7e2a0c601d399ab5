// The product as a function of its own, for any number of rows: Y = X W^T + bias. It stands between torch's operators, so
// its tasks run on torch's threads: two teams that wait for each other's cores halved the speed of a prefill.
#include <stdlib.h>

#include "gemm.h"
#include "tasks.h"

typedef struct {
    const matrix *w;
    inputs in;
    float *y;
    size_t m, step, m_blocks, width;
} linear_job;

static void quantise_piece(size_t row, float *scratch, const void *argument) {
    (void)scratch;
    const linear_job *job = argument;
    quantise_row(&job->in, row, (size_t)job->w->cols);
}

static void product_piece(size_t task, float *packed, const void *argument) {
    const linear_job *job = argument;
    const matrix *w = job->w;
    const size_t rows = (size_t)w->rows;
    float *c = packed + PACKED_FLOATS;
    size_t m0 = task % job->m_blocks * job->step, m = job->m - m0 < job->step ? job->m - m0 : job->step;
    size_t n0 = task / job->m_blocks * job->width, n1 = n0 + job->width < rows ? n0 + job->width : rows;
    inputs in = rows_from(&job->in, m0, (size_t)w->cols);
    gemm_block(w, &in, m, n0, n1, c, N_BLOCK, packed);
    for (size_t i = 0; i < m; i++) {
        float *y = job->y + (m0 + i) * rows + n0;
        for (size_t n = 0; n < n1 - n0; n++)
            y[n] = c[i * N_BLOCK + n] + (w->bias ? load_as(w->bias_type, w->bias, n0 + n) : 0);
    }
}

// x [m, cols] and y [m, rows], contiguous floats; returns 0, or -1 without memory.
int tandem_linear(const matrix *w, const float *x, float *y, int64_t m, int threads) {
    const size_t cols = (size_t)w->cols, rows = (size_t)w->rows, numbers = quantised((size_t)m, cols) * sizeof(int16_t);
    linear_job job = {.w = w, .in = {x, cols, NULL, NULL}, .y = y, .m = (size_t)m};
    job.m_blocks = (job.m + M_BLOCK - 1) / M_BLOCK;
    job.step = ((job.m + job.m_blocks - 1) / job.m_blocks + PANEL - 1) / PANEL * PANEL;
    job.width = job.m > 16 ? N_BLOCK : N_BLOCK / 2;
    char *memory = NULL;
    int failed = 0;
    if (w->type == I8) {
        size_t bytes = numbers + job.m * blocks_of(groups_of(cols)) * sizeof(float);
        memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!memory) return -1;
        job.in.q = (int16_t *)memory;
        job.in.scale = (float *)(memory + numbers);
        failed = tasks_run(job.m, threads, 0, quantise_piece, &job);
    }
    const size_t tasks = job.m_blocks * ((rows + job.width - 1) / job.width);
    if (!failed) failed = tasks_run(tasks, threads, PACKED_FLOATS + (size_t)M_BLOCK * N_BLOCK, product_piece, &job);
    free(memory);
    return failed ? -1 : 0;
}
