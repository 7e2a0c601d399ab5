// The product as a function of its own, for any number of rows: Y = X W^T + bias.
#include "gemm.h"
#include "pool.h"

typedef struct {
    const matrix *w;
    inputs in;
    float *y;
    size_t m;
} linear_job;

static void linear_body(worker *self, void *argument) {
    linear_job *job = argument;
    const matrix *w = job->w;
    size_t cols = (size_t)w->cols, rows = (size_t)w->rows;
    float *packed = (float *)self->arena, *c = packed + PACKED_FLOATS;
    if (w->type == I8) {
        for (int64_t i; (i = pool_claim(self, job->m)) != NO_TASK; pool_done(self, job->m))
            quantise_row(&job->in, (size_t)i, cols);
        pool_next(self);
    }
    size_t m_blocks = (job->m + M_BLOCK - 1) / M_BLOCK, step = ((job->m + m_blocks - 1) / m_blocks + PANEL - 1) / PANEL * PANEL;
    size_t width = job->m > 16 ? N_BLOCK : N_BLOCK / 2, n_blocks = (rows + width - 1) / width;
    const size_t tasks = m_blocks * n_blocks;
    for (int64_t task; (task = pool_claim(self, tasks)) != NO_TASK; pool_done(self, tasks)) {
        size_t m0 = (size_t)task % m_blocks * step, m = job->m - m0 < step ? job->m - m0 : step;
        size_t n0 = (size_t)task / m_blocks * width, n1 = n0 + width < rows ? n0 + width : rows;
        inputs in = rows_from(&job->in, m0, cols);
        gemm_block(w, &in, m, n0, n1, c, N_BLOCK, packed);
        for (size_t i = 0; i < m; i++) {
            float *y = job->y + (m0 + i) * rows + n0;
            for (size_t n = 0; n < n1 - n0; n++)
                y[n] = c[i * N_BLOCK + n] + (w->bias ? load_as(w->bias_type, w->bias, n0 + n) : 0);
        }
    }
    pool_next(self);
}

// x [m, cols] and y [m, rows], contiguous floats; returns 0, or -1 without memory.
int tandem_linear(const matrix *w, const float *x, float *y, int64_t m, int threads) {
    const size_t cols = (size_t)w->cols, numbers = quantised((size_t)m, cols) * sizeof(int16_t);
    linear_job job = {w, {x, cols, NULL, NULL}, y, (size_t)m};
    int failed = 0;
    pool_lock();
    if (w->type == I8) {
        char *memory = pool_shared(numbers + (size_t)m * blocks_of(groups_of(cols)) * sizeof(float));
        failed = memory == NULL;
        job.in.q = (int16_t *)memory;
        if (!failed) job.in.scale = (float *)(memory + numbers);
    }
    size_t arena = (PACKED_FLOATS + (size_t)M_BLOCK * N_BLOCK) * sizeof(float);
    if (!failed) failed = pool_run(threads, arena, linear_body, &job);
    pool_unlock();
    return failed ? -1 : 0;
}
