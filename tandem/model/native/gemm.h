// Y = X W^T over row-major weights as they lie in the module, [rows, cols]: the one product of the decode step.
// The order of additions of an output is the same for every batch, tile and thread: lane by lane along K in blocks of
// K_BLOCK, the lanes of a block summed by vsum4, the blocks added in order. So a row's result never depends on the others.
#ifndef TANDEM_GEMM_H
#define TANDEM_GEMM_H

#include "vec.h"

enum { K_BLOCK = 512, I8_BLOCK = 2048, M_BLOCK = 96, N_BLOCK = 128, GROUP = 64 };

typedef struct {
    const void *data;   // [rows, cols]; int8 rows are padded with zeros to whole groups
    const float *scale; // int8 only: [rows, groups of 64 columns]
    const void *bias;   // [rows] or NULL
    int64_t rows, cols;
    int32_t type, bias_type;
} matrix;

// The inputs of a product: floats, and for int8 weights the same quantised by groups.
typedef struct {
    const float *x; // [m, ld]
    size_t ld;
    const int8_t *q;    // [m, whole groups of 64]
    const float *scale; // [m, groups]
} inputs;

enum { PACKED_FLOATS = M_BLOCK * (K_BLOCK + 16) }; // scratch of one thread for gemm_block

INLINE size_t groups_of(size_t cols) { return (cols + GROUP - 1) / GROUP; }

// c[m, n - n0] = sum_k x[m, k] * w[n, k] for m <= M_BLOCK rows and n in [n0, n1); ldc must hold n1 - n0 rounded up to 4.
void gemm_block(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc, float *packed);
void gemm_block_i8(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc);
// Quantises one row of k floats by groups of 64: symmetric, to nearest, largest magnitude to 127.
void quantise_row(const float *x, size_t k, int8_t *q, float *scale);

#endif
