// Products with int8 weights: one scale per row and group of 64 columns. Inputs become 16-bit integers at run time, with a
// scale per row and block of up to 1024 columns: two of their products added to 32 bits take one instruction, as for 8 bits,
// and what is lost is what the weights lose alone. The dot product of a group is an exact integer, at most 64 * 127 * 32767;
// it is scaled and added to a float accumulator per lane, in the same order for every batch size.
#include "gemm.h"

enum { STEP = 2 * VW, VECTORS = GROUP / STEP }; // 16-bit numbers in a vector, vectors in a group

#if VW == 16 && defined(__AVX512BW__)
typedef __m512i vs;
INLINE vs widen(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vi pairs(vs a, const int16_t *b, vi sum) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, a, _mm512_loadu_si512(b));
#else
    return sum + (vi)_mm512_madd_epi16(a, _mm512_loadu_si512(b));
#endif
}
INLINE vf floats(vi n) { return (vf)_mm512_cvtepi32_ps((__m512i)n); }
#elif VW == 8
typedef __m256i vs;
INLINE vs widen(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi pairs(vs a, const int16_t *b, vi sum) {
    return sum + (vi)_mm256_madd_epi16(a, _mm256_loadu_si256((const __m256i *)b));
}
INLINE vf floats(vi n) { return (vf)_mm256_cvtepi32_ps((__m256i)n); }
#else
typedef int16_t vs __attribute__((vector_size(STEP * 2)));
INLINE vs widen(const int8_t *p) {
    vs v;
    for (int i = 0; i < STEP; i++) v[i] = p[i];
    return v;
}
INLINE vi pairs(vs a, const int16_t *b, vi sum) {
    for (int i = 0; i < VW; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
}
INLINE vf floats(vi n) { return __builtin_convertvector(n, vf); }
#endif

// Four weight rows by C rows of a panel over one block: `ahead` bytes further on is what comes next.
INLINE void dot4(const int C, const int8_t *const *w, const float *const *ws, const int16_t *x, size_t groups, size_t ahead,
                 v4 *sums) {
    vf parts[4][PANEL];
    for (int r = 0; r < 4; r++) {
        vf acc[PANEL];
        UNROLL for (int c = 0; c < C; c++) acc[c] = (vf){0};
        for (size_t g = 0; g < groups; g++) {
            vs row[VECTORS];
            UNROLL for (int j = 0; j < VECTORS; j++) row[j] = widen(w[r] + g * GROUP + j * STEP);
            __builtin_prefetch(w[r] + g * GROUP + ahead, 0, 2);
            vf scale = vset(ws[r][g]);
            UNROLL for (int c = 0; c < C; c++) {
                const int16_t *numbers = x + (g * PANEL + c) * GROUP;
                vi dot = {0};
                UNROLL for (int j = 0; j < VECTORS; j++) dot = pairs(row[j], numbers + j * STEP, dot);
                acc[c] = vfma(floats(dot), scale, acc[c]);
            }
        }
        UNROLL for (int c = 0; c < C; c++) parts[r][c] = acc[c];
    }
    UNROLL for (int c = 0; c < C; c++) sums[c] = vsum4(parts[0][c], parts[1][c], parts[2][c], parts[3][c]);
}

#define KERNEL(C)                                                                                                          \
    static void dot4_##C(const int8_t *const *w, const float *const *ws, const int16_t *x, size_t groups, size_t ahead,    \
                         v4 *sums) {                                                                                       \
        dot4(C, w, ws, x, groups, ahead, sums);                                                                            \
    }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6) KERNEL(7) KERNEL(8)

typedef void (*kernel)(const int8_t *const *, const float *const *, const int16_t *, size_t, size_t, v4 *);
static const kernel kernels[PANEL] = {dot4_1, dot4_2, dot4_3, dot4_4, dot4_5, dot4_6, dot4_7, dot4_8};

// Weight rows n to n + 3 by up to 8 rows of inputs from row i on, over block b; the first panel asks for the rows that follow.
static void tile(const matrix *w, const inputs *in, size_t i, size_t height, size_t b, size_t n, size_t n1, float *c,
                 size_t ldc) {
    const size_t groups = groups_of((size_t)w->cols), row = groups * GROUP, blocks = blocks_of(groups);
    const size_t g = b * block_of(groups), len = groups - g < block_of(groups) ? groups - g : block_of(groups);
    const int8_t *rows[4];
    const float *scales[4];
    for (size_t r = 0; r < 4; r++) {
        size_t at = n + r < n1 ? n + r : n1 - 1; // a row too many: computed and never read
        rows[r] = (const int8_t *)w->data + at * row + g * GROUP;
        scales[r] = w->scale + at * groups + g;
    }
    v4 sums[PANEL];
    kernels[height - 1](rows, scales, in->q + i * row + g * PANEL * GROUP, len, i ? 0 : 4 * row, sums);
    for (size_t j = 0; j < height; j++) {
        v4 old = {0};
        if (b) memcpy(&old, c + j * ldc, 16);
        old += sums[j] * in->scale[(i + j) * blocks + b];
        memcpy(c + j * ldc, &old, 16);
    }
}

void gemm_block_i8(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc) {
    const size_t blocks = blocks_of(groups_of((size_t)w->cols));
    const size_t span = m <= PANEL ? 4 : n1 - n0; // a single panel reads the weights in the order in which they lie
    for (size_t from = n0; from < n1; from += span)
        for (size_t b = 0; b < blocks; b++)
            for (size_t i = 0; i < m; i += PANEL)
                for (size_t n = from; n < from + span && n < n1; n += 4)
                    tile(w, in, i, m - i < PANEL ? m - i : PANEL, b, n, n1, c + i * ldc + (n - n0), ldc);
}

void quantise_row(const inputs *in, size_t row, size_t cols) {
    const size_t groups = groups_of(cols), block = block_of(groups) * GROUP, blocks = blocks_of(groups);
    const float *x = in->x + row * in->ld;
    int16_t *q = in->q + row / PANEL * PANEL * groups * GROUP + row % PANEL * GROUP;
    const vf shift = vset(12582912.0f); // adding 1.5 * 2^23 rounds to an integer
    for (size_t b = 0; b < blocks; b++) {
        const size_t first = b * block, last = first + block < cols ? first + block : cols;
        vf high = {0}, bad = {0};
        for (size_t i = first; i < last; i += VW) {
            vf v = vload_tail(F32, x, i, last - i < VW ? last - i : VW);
            high = vmax(high, vmax(v, -v));
            bad += v * 0.0f; // NaN where a number is not finite, so that the outputs are
        }
        float largest = 0;
        for (int i = 0; i < VW; i++) largest = high[i] > largest ? high[i] : largest;
        const float inverse = largest > 0 ? 32767.0f / largest : 0.0f;
        in->scale[row * blocks + b] = largest / 32767.0f + vsum(bad);
        for (size_t i = first; i < first + block && i < groups * GROUP; i += VW) {
            vf v = i < last ? vload_tail(F32, x, i, last - i < VW ? last - i : VW) * inverse : (vf){0};
            vi n = (vi)(v + shift) - (vi)shift;
            int16_t *to = q + i / GROUP * PANEL * GROUP + i % GROUP;
            for (int j = 0; j < VW; j++) to[j] = (int16_t)n[j];
        }
    }
}
