// Rounds blocks of fp32 numbers to FP8, each divided by its scale; what tandem/train/fp8.py does in torch, in one pass over
// memory and with the same bits. Numbers stay fp32 in memory.
#include "tasks.h"
#include "vec.h"

enum { ROWS = 16 }; // of a piece of work where blocks are one row high

typedef struct {
    const float *x;
    float *y, *scales; // scales: [row blocks, column blocks]
    size_t rows, cols, block_rows, block_cols;
    float largest, smallest_power, shift; // of the format: fp8.py
    int power_of_two, given, multiply;
} round_job;

INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }
INLINE vi larger(vi a, vi b) { return (vi)vselect(a > b, (vf)a, (vf)b); }

INLINE vf load_left(const float *p, size_t left) { return left >= VW ? vload(p) : vload_tail(F32, p, 0, left); }

INLINE void store_left(float *p, vf v, size_t left) {
    if (left >= VW) {
        vstore(p, v);
    } else {
        vstore_tail(p, v, left);
    }
}

// Bits of magnitudes are ordered as the magnitudes are, infinity and then NaN above all.
static float scale_of(const round_job *job, int32_t bits) {
    float largest, scale, least = 0x1p-126f;
    memcpy(&largest, &bits, 4);
    scale = largest / job->largest;
    scale = scale < least ? least : scale;
    if (job->power_of_two && scale <= 0x1p127f) {
        uint32_t raised;
        memcpy(&raised, &scale, 4);
        raised = (raised + 0x7fffffu) & 0x7f800000u;
        memcpy(&scale, &raised, 4);
    }
    return scale;
}

INLINE vf rounded(const round_job *job, vf x, vf scale) {
    vf v = x / scale, power = (vf)((vi)v & 0x7f800000);
    power = vselect(power < vset(job->smallest_power), vset(job->smallest_power), power);
    vf shift = power * vset(job->shift);
    v = (vf)((vi)((v + shift) - shift) | ((vi)v & (int32_t)0x80000000)); // what rounds to zero keeps its sign
    return job->multiply ? v * scale : v;
}

static int32_t largest_bits(const float *x, size_t count) {
    vi most = {0};
    for (size_t i = 0; i < count; i += VW) most = larger(most, magnitude(load_left(x + i, count - i)));
    int32_t bits = 0;
    for (int lane = 0; lane < VW; lane++) bits = most[lane] > bits ? most[lane] : bits;
    return bits;
}

static void round_block(const round_job *job, size_t row, size_t rows, size_t col, size_t cols, float *scale) {
    if (!job->given) {
        int32_t bits = 0;
        for (size_t r = row; r < row + rows; r++) {
            int32_t of_row = largest_bits(job->x + r * job->cols + col, cols);
            bits = of_row > bits ? of_row : bits;
        }
        *scale = scale_of(job, bits);
    }
    vf s = vset(*scale);
    for (size_t r = row; r < row + rows; r++) {
        const float *x = job->x + r * job->cols + col;
        float *y = job->y + r * job->cols + col;
        for (size_t i = 0; i < cols; i += VW) store_left(y + i, rounded(job, load_left(x + i, cols - i), s), cols - i);
    }
}

// Blocks one column wide: all columns side by side.
static void round_columns(const round_job *job, size_t row, size_t rows, float *scales) {
    size_t cols = job->cols;
    const float *first = job->x + row * cols;
    int32_t *bits = (int32_t *)scales;
    memset(bits, 0, cols * sizeof *bits);
    for (size_t r = 0; r < rows; r++) {
        const float *x = first + r * cols;
        for (size_t i = 0; i < cols; i += VW) {
            vi most = larger((vi)load_left(scales + i, cols - i), magnitude(load_left(x + i, cols - i)));
            store_left(scales + i, (vf)most, cols - i);
        }
    }
    for (size_t i = 0; i < cols; i++) {
        int32_t largest;
        memcpy(&largest, scales + i, 4);
        scales[i] = scale_of(job, largest);
    }
    for (size_t r = 0; r < rows; r++) {
        const float *x = first + r * cols;
        float *y = job->y + (row + r) * cols;
        for (size_t i = 0; i < cols; i += VW) {
            size_t left = cols - i;
            vf scale = load_left(scales + i, left);
            if (left < VW) { // lanes beyond the last column
                for (size_t lane = left; lane < VW; lane++) scale[lane] = 1.0f;
            }
            store_left(y + i, rounded(job, load_left(x + i, left), scale), left);
        }
    }
}

static void round_piece(size_t index, float *scratch, const void *argument) {
    (void)scratch;
    const round_job *job = argument;
    size_t high = job->block_rows == 1 ? ROWS : job->block_rows, first = index * high;
    size_t last = first + high < job->rows ? first + high : job->rows;
    size_t across = (job->cols + job->block_cols - 1) / job->block_cols;
    if (job->block_cols == 1 && job->block_rows > 1) {
        round_columns(job, first, last - first, job->scales + index * across);
        return;
    }
    size_t step = job->block_rows == 1 ? 1 : last - first;
    for (size_t row = first; row < last; row += step) {
        for (size_t j = 0; j < across; j++) {
            size_t col = j * job->block_cols, left = job->cols - col;
            float *scale = job->given ? job->scales : job->scales + row / job->block_rows * across + j;
            round_block(job, row, step, col, left < job->block_cols ? left : job->block_cols, scale);
        }
    }
}

// y = x rounded, times the scale where `multiply`. With `given`, scales[0] is read and counts for all; else they are written.
int tandem_fp8_round(const float *x, float *y, float *scales, int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols,
                     float largest, float smallest_power, float shift, int32_t power_of_two, int32_t given, int32_t multiply,
                     int32_t threads) {
    round_job job = {x, y, scales, (size_t)rows, (size_t)cols, (size_t)block_rows, (size_t)block_cols, largest,
                     smallest_power, shift, power_of_two, given, multiply};
    size_t high = block_rows == 1 ? ROWS : (size_t)block_rows;
    return tasks_run(((size_t)rows + high - 1) / high, threads, 0, round_piece, &job);
}

typedef struct {
    const float *x;
    float *largest;
    size_t count;
} largest_job;

enum { NUMBERS = 16384 };

static void largest_piece(size_t index, float *scratch, const void *argument) {
    (void)scratch;
    const largest_job *job = argument;
    size_t first = index * NUMBERS, left = job->count - first;
    int32_t bits = largest_bits(job->x + first, left < NUMBERS ? left : NUMBERS);
    memcpy(job->largest + index, &bits, 4);
}

// Largest magnitude of each 16384 numbers.
int tandem_fp8_largest(const float *x, float *largest, int64_t count, int32_t threads) {
    largest_job job = {x, largest, (size_t)count};
    return tasks_run(((size_t)count + NUMBERS - 1) / NUMBERS, threads, 0, largest_piece, &job);
}
