// Small matrix products whose operands lie in the caches: register tiles of up to 6 rows by 2 vectors, c = a b, where a is
// read one number at a time with any strides (so also transposed) and b row by row.
#ifndef TANDEM_TILE_H
#define TANDEM_TILE_H

#include "vec.h"

enum { TILE_ROWS = 6 };

typedef struct {
    const float *a; // a(i, k) = a[i * row + k * col]
    size_t row, col;
    const float *b; // b(k, j) = b[k * ldb + j]
    size_t ldb;
} factors;

INLINE size_t padded(size_t n) { return (n + VW - 1) / VW * VW; }

// acc[r][v] += sum over k in [k0, k1) for rows i to i + R - 1 and V vectors from column j on.
INLINE void tile(const int R, const int V, vf acc[TILE_ROWS][2], const factors *f, size_t i, size_t j, size_t k0, size_t k1) {
    const size_t row = f->row, col = f->col, ldb = f->ldb;
    const float *a = f->a + i * row + k0 * col, *b = f->b + k0 * ldb + j;
    for (size_t k = k0; k < k1; k++, a += col, b += ldb) {
        vf b0 = vload(b), b1 = V == 2 ? vload(b + VW) : (vf){0};
        UNROLL for (int r = 0; r < R; r++) {
            vf x = vset(a[(size_t)r * row]);
            acc[r][0] = vfma(x, b0, acc[r][0]);
            if (V == 2) acc[r][1] = vfma(x, b1, acc[r][1]);
        }
    }
}

// Walks over an m by n matrix, n a multiple of VW, in register tiles: BODY is an inlined function of (R, V, i, j, ...).
#define FOR_TILES(m, n, BODY, ...) \
    for (size_t i_ = 0; i_ < (m);) { \
        size_t left_ = (m) - i_; \
        if (left_ == 6 || left_ > 8) { \
            FOR_COLUMNS_(6, n, BODY, __VA_ARGS__) \
        } else if (left_ >= 4) { \
            FOR_COLUMNS_(4, n, BODY, __VA_ARGS__) \
        } else if (left_ >= 2) { \
            FOR_COLUMNS_(2, n, BODY, __VA_ARGS__) \
        } else { \
            FOR_COLUMNS_(1, n, BODY, __VA_ARGS__) \
        } \
    }
#define FOR_COLUMNS_(R, n, BODY, ...) \
    { \
        size_t j_ = 0; \
        for (; j_ + 2 * VW <= (n); j_ += 2 * VW) BODY(R, 2, i_, j_, __VA_ARGS__); \
        if (j_ < (n)) BODY(R, 1, i_, j_, __VA_ARGS__); \
        i_ += R; \
    }

enum { ALL, UP_TO_ROW, FROM_ROW }; // which k a row of a has: all, k <= i, k >= i (zeros must fill the tile's corner)

INLINE size_t first_k(const int range, size_t i) { return range == FROM_ROW ? i : 0; }
INLINE size_t last_k(const int range, size_t end, size_t k) { return range == UP_TO_ROW && end < k ? end : k; }

INLINE void add_tile(const int R, const int V, size_t i, size_t j, const int range, const factors *f, size_t k, float *c,
                     size_t ldc, float keep) {
    vf acc[TILE_ROWS][2];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vf){0};
    tile(R, V, acc, f, i, j, first_k(range, i), last_k(range, i + (size_t)R, k));
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
        float *out = c + (i + (size_t)r) * ldc + j + (size_t)v * VW;
        vstore(out, vfma(vload(out), vset(keep), acc[r][v]));
    }
}

// c = keep * c + a b.
INLINE void add_product(const int range, const factors *f, size_t m, size_t n, size_t k, float *c, size_t ldc, float keep) {
    FOR_TILES(m, n, add_tile, range, f, k, c, ldc, keep)
}

INLINE void sum_tile(const int R, const int V, size_t i, size_t j, const factors *far, size_t k_far, const float *share,
                     const int range, const factors *near, size_t k, float *c, size_t ldc) {
    vf acc[TILE_ROWS][2];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vf){0};
    tile(R, V, acc, far, i, j, 0, k_far);
    UNROLL for (int r = 0; r < R; r++) {
        vf s = vset(share[i + (size_t)r]);
        UNROLL for (int v = 0; v < V; v++) acc[r][v] *= s;
    }
    tile(R, V, acc, near, i, j, first_k(range, i), last_k(range, i + (size_t)R, k));
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++)
        vstore(c + (i + (size_t)r) * ldc + j + (size_t)v * VW, acc[r][v]);
}

// c = diag(share) (far product over k_far) + near product over k.
INLINE void sum_products(const factors *far, size_t k_far, const float *share, const int range, const factors *near, size_t k,
                         size_t m, size_t n, float *c, size_t ldc) {
    FOR_TILES(m, n, sum_tile, far, k_far, share, range, near, k, c, ldc)
}

INLINE void lower_tile(const int R, const int V, size_t i, size_t j, const factors *f, size_t k, const float *times, float *c,
                       size_t ld) {
    if (j >= i + (size_t)R) return;
    vf acc[TILE_ROWS][2];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vf){0};
    tile(R, V, acc, f, i, j, 0, k);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
        size_t at = (i + (size_t)r) * ld + j + (size_t)v * VW;
        vstore(c + at, times ? vfma(acc[r][v], vload(times + at), vload(c + at)) : acc[r][v]);
    }
}

// On and below the diagonal: c = a b, or where `times` is given c += times * (a b), number by number.
INLINE void lower_product(const factors *f, size_t m, size_t n, size_t k, const float *times, float *c, size_t ld) {
    FOR_TILES(m, n, lower_tile, f, k, times, c, ld)
}

// out[j, i] = in[i, j] for i < rows, j < cols.
INLINE void transpose(const float *in, size_t ld_in, size_t rows, size_t cols, float *out, size_t ld_out) {
    for (size_t i0 = 0; i0 < rows; i0 += 8) {
        size_t i1 = i0 + 8 < rows ? i0 + 8 : rows;
        for (size_t j = 0; j < cols; j++)
            for (size_t i = i0; i < i1; i++) out[j * ld_out + i] = in[i * ld_in + j];
    }
}

#endif
