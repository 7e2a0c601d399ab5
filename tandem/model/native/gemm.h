// Y = X W^T over row-major weights as they lie in the module, [rows, cols]: the one product of the decode step.
// The order of additions of an output is the same for every batch, tile and thread: lane by lane along K in blocks of
// K_BLOCK, the lanes of a block summed by vsum4, the blocks added in order. So a row's result never depends on the others.
#ifndef TANDEM_GEMM_H
#define TANDEM_GEMM_H

#include "vec.h"

enum { K_BLOCK = 512, M_BLOCK = 96, N_BLOCK = 128 };
// Of int8 products: columns that share a scale of the weights, the most groups that share a scale of the inputs, and rows of
// inputs that lie together.
enum { GROUP = 64, MOST_GROUPS = 16, PANEL = 8 };

typedef struct {
    const void *data;   // [rows, cols]; int8 rows are padded with zeros to whole groups
    const float *scale; // int8 only: [rows, groups of 64 columns]
    const void *bias;   // [rows] or NULL
    int64_t rows, cols;
    int32_t type, bias_type;
} matrix;

// The inputs of a product: floats, and for int8 weights the same as 16-bit integers with a scale per row and block of groups.
typedef struct {
    const float *x; // [m, ld]
    size_t ld;
    int16_t *q;   // [panels of 8 rows, groups, 8 rows, 64]
    float *scale; // [m, blocks]
} inputs;

enum { PACKED_FLOATS = M_BLOCK * (K_BLOCK + 16) }; // scratch of one thread for gemm_block

INLINE size_t groups_of(size_t cols) { return (cols + GROUP - 1) / GROUP; }
// Blocks of groups, all of the same length but the last.
INLINE size_t blocks_of(size_t groups) { return (groups + MOST_GROUPS - 1) / MOST_GROUPS; }
INLINE size_t block_of(size_t groups) { return (groups + blocks_of(groups) - 1) / blocks_of(groups); }
// Numbers in q for m rows.
INLINE size_t quantised(size_t m, size_t cols) { return (m + PANEL - 1) / PANEL * PANEL * groups_of(cols) * GROUP; }

// The inputs from row m0 on, a multiple of 8.
INLINE inputs rows_from(const inputs *in, size_t m0, size_t cols) {
    inputs rest = {in->x + m0 * in->ld, in->ld, NULL, NULL};
    if (in->q) rest.q = in->q + quantised(m0, cols), rest.scale = in->scale + m0 * blocks_of(groups_of(cols));
    return rest;
}

// c[m, n - n0] = sum_k x[m, k] * w[n, k] for m <= M_BLOCK rows and n in [n0, n1); ldc must hold n1 - n0 rounded up to 4.
void gemm_block(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc, float *packed);
void gemm_block_i8(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc);
// Fills q and scale of one row of `cols` columns: symmetric, to nearest, the largest magnitude of a block to 32767.
void quantise_row(const inputs *in, size_t row, size_t cols);

#endif
