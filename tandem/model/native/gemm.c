// Products with float32, float16 and bfloat16 weights. A register tile is 4 weight rows by up to 3 rows of x: 12
// accumulators along K, weights converted in registers. 8 weight rows of a block of K stay in the first-level cache
// while all rows of x pass by, and the next block is asked for meanwhile.
#include "gemm.h"

enum { ROWS = 8, L2_FLOATS = 64 * 1024 };

// Sums of one block of K for 4 weight rows and C rows of x. As many bytes as it reads of the weights are asked for, from
// `ahead` on.
INLINE void dot4(const int type, const int C, const void *const *w, size_t w0, const float *x, size_t ldx, size_t k,
                 const char *ahead, v4 *sums) {
    vf acc[4][3];
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int c = 0; c < 3; c++) acc[r][c] = (vf){0};
    size_t i = 0;
    for (; i + VW <= k; i += VW) {
        vf b[3];
        const size_t bytes = 4 * VW * (type == F32 ? 4 : 2);
        UNROLL for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        ahead += bytes;
        UNROLL for (int c = 0; c < C; c++) {
            b[c] = vload(x + (size_t)c * ldx + i);
            KEEP(b[c]);
        }
        UNROLL for (int r = 0; r < 4; r++) {
            vf a = vload_as(type, w[r], w0 + i);
            KEEP(a);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = vfma(a, b[c], acc[r][c]);
        }
    }
    if (i < k) {
        vf b[3];
        UNROLL for (int c = 0; c < C; c++) b[c] = vload_tail(F32, x + (size_t)c * ldx, i, k - i);
        UNROLL for (int r = 0; r < 4; r++) {
            vf a = vload_tail(type, w[r], w0 + i, k - i);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = vfma(a, b[c], acc[r][c]);
        }
    }
    UNROLL for (int c = 0; c < C; c++) sums[c] = vsum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
}

// The same added to c [C, ldc], or written to it where `first` says so.
INLINE void dot4_add(const int type, const int C, const void *const *w, size_t w0, const float *x, size_t ldx, size_t k, const char *ahead,
                     int first, float *c, size_t ldc) {
    v4 sums[3];
    dot4(type, C, w, w0, x, ldx, k, ahead, sums);
    for (int j = 0; j < C; j++) {
        v4 old = {0};
        if (!first) memcpy(&old, c + (size_t)j * ldc, 16);
        sums[j] += old;
        memcpy(c + (size_t)j * ldc, &sums[j], 16);
    }
}

#define KERNEL(T, C)                                                                                                        \
    static void dot4_##T##_##C(const void *const *w, size_t w0, const float *x, size_t ldx, size_t k, const char *ahead, int first, \
                               float *c, size_t ldc) {                                                                      \
        dot4_add(T, C, w, w0, x, ldx, k, ahead, first, c, ldc);                                                             \
    }
#define KERNELS(T) KERNEL(T, 1) KERNEL(T, 2) KERNEL(T, 3)
KERNELS(F32)
KERNELS(F16)
KERNELS(BF16)

typedef void (*kernel)(const void *const *, size_t, const float *, size_t, size_t, const char *, int, float *, size_t);
static const kernel kernels[3][3] = {{dot4_F32_1, dot4_F32_2, dot4_F32_3},
                                     {dot4_F16_1, dot4_F16_2, dot4_F16_3},
                                     {dot4_BF16_1, dot4_BF16_2, dot4_BF16_3}};

INLINE const char *row_of(const matrix *w, size_t size, size_t n, size_t n1) {
    if (n >= n1) n = n1 - 1; // a row too many: computed and never read
    return (const char *)w->data + n * (size_t)w->cols * size;
}

// Weight rows n to n + 7, columns k to k + len, with all m rows of x; asks for the rows after them meanwhile.
static void block8(const matrix *w, size_t n, size_t n1, size_t k, size_t len, const float *x, size_t ldx, size_t m, float *c,
                   size_t ldc) {
    const size_t size = w->type == F32 ? 4 : 2, row = (size_t)w->cols * size;
    const void *rows[ROWS];
    for (size_t r = 0; r < ROWS; r++) rows[r] = row_of(w, size, n + r, n1);
    const char *near = rows[0], *ahead = near + ROWS * row + 4 * k * size;
    for (size_t i = 0; i < m;) {
        size_t left = m - i, take = left >= 5 || left == 3 ? 3 : left >= 2 ? 2 : 1; // so that a single row is rare
        kernel dot = kernels[w->type][take - 1];
        dot(rows, k, x + i * ldx, ldx, len, i ? near : ahead, k == 0, c + i * ldc, ldc);
        if (n + 4 < n1) dot(rows + 4, k, x + i * ldx, ldx, len, i ? near : ahead + 4 * row, k == 0, c + i * ldc + 4, ldc);
        i += take;
    }
}

void gemm_block(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc, float *packed) {
    if (w->type == I8) {
        gemm_block_i8(w, in, m, n0, n1, c, ldc);
        return;
    }
    const size_t cols = (size_t)w->cols, ldp = K_BLOCK + 16;
    if (m * cols <= L2_FLOATS || !packed) {
        for (size_t n = n0; n < n1; n += ROWS) {
            for (size_t k = 0; k < cols; k += K_BLOCK) {
                size_t len = cols - k < K_BLOCK ? cols - k : K_BLOCK;
                block8(w, n, n1, k, len, in->x + k, in->ld, m, c + (n - n0), ldc);
            }
        }
        return;
    }
    for (size_t k = 0; k < cols; k += K_BLOCK) {
        size_t len = cols - k < K_BLOCK ? cols - k : K_BLOCK;
        for (size_t i = 0; i < m; i++) memcpy(packed + i * ldp, in->x + i * in->ld + k, len * sizeof(float));
        for (size_t n = n0; n < n1; n += ROWS) block8(w, n, n1, k, len, packed, ldp, m, c + (n - n0), ldc);
    }
}
