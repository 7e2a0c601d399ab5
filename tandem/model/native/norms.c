// RMS norm and squared ReLU with their gradients, each one pass over memory.
#include "tasks.h"
#include "vec.h"

enum { BLOCK_ROWS = 64, BLOCK_NUMBERS = 16384 };

typedef struct {
    const float *x, *weight, *grad_y;
    float *y, *grad_x, *grad_weight; // grad_weight: [blocks of rows, size]
    size_t rows, size;
    float eps;
} norm_job;

INLINE vf load_left(const float *p, size_t left) { return left >= VW ? vload(p) : vload_tail(F32, p, 0, left); }

INLINE void store_left(float *p, vf v, size_t left) {
    if (left >= VW) {
        vstore(p, v);
    } else {
        vstore_tail(p, v, left);
    }
}

static float inverse_rms(const float *x, size_t size, float eps) {
    vf a = {0}, b = {0};
    size_t i = 0;
    for (; i + 2 * VW <= size; i += 2 * VW) {
        vf u = vload(x + i), v = vload(x + i + VW);
        a = vfma(u, u, a);
        b = vfma(v, v, b);
    }
    for (; i < size; i += VW) {
        vf u = load_left(x + i, size - i);
        a = vfma(u, u, a);
    }
    return 1.0f / sqrtf(vsum(a + b) / (float)size + eps);
}

static void norm_block(size_t block, float *scratch, const void *argument) {
    (void)scratch;
    const norm_job *job = argument;
    size_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS < job->rows ? first + BLOCK_ROWS : job->rows, size = job->size;
    for (size_t row = first; row < last; row++) {
        const float *x = job->x + row * size;
        float *y = job->y + row * size;
        vf scale = vset(inverse_rms(x, size, job->eps));
        for (size_t i = 0; i < size; i += VW)
            store_left(y + i, load_left(x + i, size - i) * scale * load_left(job->weight + i, size - i), size - i);
    }
}

static void norm_block_backward(size_t block, float *scratch, const void *argument) {
    (void)scratch;
    const norm_job *job = argument;
    size_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS < job->rows ? first + BLOCK_ROWS : job->rows, size = job->size;
    float *grad_weight = job->grad_weight + block * size;
    memset(grad_weight, 0, size * sizeof(float));
    for (size_t row = first; row < last; row++) {
        const float *x = job->x + row * size, *grad_y = job->grad_y + row * size;
        float *grad_x = job->grad_x + row * size, scale = inverse_rms(x, size, job->eps);
        vf along = {0}, unit = vset(scale);
        for (size_t i = 0; i < size; i += VW) {
            size_t left = size - i;
            vf u = load_left(x + i, left), g = load_left(grad_y + i, left);
            along = vfma(g * load_left(job->weight + i, left), u, along);
            store_left(grad_weight + i, vfma(g * unit, u, load_left(grad_weight + i, left)), left);
        }
        vf back = vset(vsum(along) / (float)size * scale * scale * scale);
        for (size_t i = 0; i < size; i += VW) {
            size_t left = size - i;
            vf g = load_left(grad_y + i, left) * load_left(job->weight + i, left) * unit;
            store_left(grad_x + i, g - load_left(x + i, left) * back, left);
        }
    }
}

// x, y [rows, size]; returns 0, or -1 without memory, as all here.
int tandem_rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t size, float eps, int threads) {
    norm_job job = {.x = x, .weight = weight, .y = y, .rows = (size_t)rows, .size = (size_t)size, .eps = eps};
    return tasks_run((job.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, threads, 0, norm_block, &job);
}

// grad_weight [blocks of 64 rows, size]: the gradient is their sum.
int tandem_rms_norm_backward(const float *x, const float *weight, const float *grad_y, float *grad_x, float *grad_weight,
                             int64_t rows, int64_t size, float eps, int threads) {
    norm_job job = {.x = x, .weight = weight, .grad_y = grad_y, .grad_x = grad_x, .grad_weight = grad_weight,
                    .rows = (size_t)rows, .size = (size_t)size, .eps = eps};
    return tasks_run((job.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, threads, 0, norm_block_backward, &job);
}

typedef struct {
    const float *x, *grad_y;
    float *y;
    size_t count;
} square_job;

INLINE vf vsqrt(vf x) {
#if VW == 16
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif VW == 8
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < VW; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

static void square_block(size_t block, float *scratch, const void *argument) {
    (void)scratch;
    const square_job *job = argument;
    size_t first = block * BLOCK_NUMBERS, last = first + BLOCK_NUMBERS < job->count ? first + BLOCK_NUMBERS : job->count;
    for (size_t i = first; i < last; i += VW) {
        vf x = load_left(job->x + i, last - i);
        x = vselect(x < 0.0f, (vf){0}, x);
        store_left(job->y + i, job->grad_y ? 2.0f * vsqrt(x) * load_left(job->grad_y + i, last - i) : x * x, last - i);
    }
}

// y = relu(x)^2; with grad_y, x is that square instead, and y becomes the gradient 2 sqrt(x) grad_y.
int tandem_squared_relu(const float *x, const float *grad_y, float *y, int64_t count, int threads) {
    square_job job = {x, grad_y, y, (size_t)count};
    return tasks_run((job.count + BLOCK_NUMBERS - 1) / BLOCK_NUMBERS, threads, 0, square_block, &job);
}
