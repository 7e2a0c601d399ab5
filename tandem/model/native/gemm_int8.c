// Products with int8 weights: one scale per row and group of 64 columns, inputs quantised the same way at run time.
// The dot product of a group is an exact integer; it is scaled and added to a float accumulator per lane, in the same
// order for every batch size. The instructions that add products pairwise to 16 bits cannot saturate, since both
// factors are at most 127 in magnitude.
#include "gemm.h"

#if defined(__AVX2__) && defined(__FMA__)
typedef __m256 lanes;
enum { LANES = 8 };

INLINE __m256i group_dot(__m256i w0, __m256i w1, __m256i x0, __m256i x1, __m256i a0, __m256i a1) {
    __m256i s0 = _mm256_sign_epi8(x0, w0), s1 = _mm256_sign_epi8(x1, w1);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), a0, s0), a1, s1);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i p0 = _mm256_madd_epi16(_mm256_maddubs_epi16(a0, s0), ones);
    __m256i p1 = _mm256_madd_epi16(_mm256_maddubs_epi16(a1, s1), ones);
    return _mm256_add_epi32(p0, p1);
#endif
}

INLINE v4 sum4(lanes p, lanes q, lanes r, lanes s) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(p, q), _mm256_hadd_ps(r, s));
    return (v4)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

INLINE void dot4(const int C, const int8_t *const *w, const float *const *ws, const int8_t *x, size_t ldx, const float *xs,
                 size_t ldxs, size_t groups, size_t ahead, v4 *sums) {
    __m256 acc[4][2];
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < C; c++) acc[r][c] = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; g++) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m256i w0 = _mm256_loadu_si256((const __m256i *)(w[r] + g * GROUP));
            __m256i w1 = _mm256_loadu_si256((const __m256i *)(w[r] + g * GROUP + 32));
            __builtin_prefetch(w[r] + g * GROUP + ahead, 0, 2);
            __m256i a0 = _mm256_abs_epi8(w0), a1 = _mm256_abs_epi8(w1);
            __m256 scale = _mm256_broadcast_ss(ws[r] + g);
#pragma GCC unroll 2
            for (int c = 0; c < C; c++) {
                const int8_t *row = x + (size_t)c * ldx + g * GROUP;
                __m256i x0 = _mm256_loadu_si256((const __m256i *)row), x1 = _mm256_loadu_si256((const __m256i *)(row + 32));
                __m256 dot = _mm256_cvtepi32_ps(group_dot(w0, w1, x0, x1, a0, a1));
                __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss(xs + (size_t)c * ldxs + g));
                acc[r][c] = _mm256_fmadd_ps(dot, both, acc[r][c]);
            }
        }
    }
    for (int c = 0; c < C; c++) sums[c] = sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
}
#else
INLINE void dot4(const int C, const int8_t *const *w, const float *const *ws, const int8_t *x, size_t ldx, const float *xs,
                 size_t ldxs, size_t groups, size_t ahead, v4 *sums) {
    (void)ahead;
    for (int c = 0; c < C; c++) {
        for (int r = 0; r < 4; r++) {
            float acc = 0;
            for (size_t g = 0; g < groups; g++) {
                const int8_t *a = w[r] + g * GROUP, *b = x + (size_t)c * ldx + g * GROUP;
                int32_t dot = 0;
                for (int i = 0; i < GROUP; i++) dot += (int32_t)a[i] * b[i];
                acc += (float)dot * (ws[r][g] * xs[(size_t)c * ldxs + g]);
            }
            sums[c][r] = acc;
        }
    }
}
#endif

void gemm_block_i8(const matrix *w, const inputs *in, size_t m, size_t n0, size_t n1, float *c, size_t ldc) {
    size_t groups = groups_of((size_t)w->cols), ldx = groups * GROUP;
    for (size_t k = 0; k < groups; k += I8_BLOCK / GROUP) {
        size_t len = groups - k < I8_BLOCK / GROUP ? groups - k : I8_BLOCK / GROUP;
        for (size_t n = n0; n < n1; n += 4) {
            const int8_t *rows[4];
            const float *scales[4];
            for (size_t r = 0; r < 4; r++) {
                size_t row = n + r < n1 ? n + r : n1 - 1; // a row too many: computed and never read
                rows[r] = (const int8_t *)w->data + row * ldx + k * GROUP;
                scales[r] = w->scale + row * groups + k;
            }
            for (size_t i = 0; i < m; i += 2) {
                v4 sums[2];
                const int8_t *x = in->q + i * ldx + k * GROUP;
                const float *xs = in->scale + i * groups + k;
                size_t both = m - i >= 2 ? 2 : 1;
                if (both == 2) dot4(2, rows, scales, x, ldx, xs, groups, len, i ? 0 : 8 * ldx, sums);
                else dot4(1, rows, scales, x, ldx, xs, groups, len, i ? 0 : 8 * ldx, sums);
                for (size_t j = 0; j < both; j++) {
                    float *out = c + (i + j) * ldc + (n - n0);
                    v4 old = {0};
                    if (k) memcpy(&old, out, 16);
                    sums[j] += old;
                    memcpy(out, &sums[j], 16);
                }
            }
        }
    }
}

void quantise_row(const float *x, size_t k, int8_t *q, float *scale) {
    for (size_t g = 0; g * GROUP < k; g++) {
        size_t len = k - g * GROUP < GROUP ? k - g * GROUP : GROUP;
        float group[GROUP] = {0}, largest = 0;
        memcpy(group, x + g * GROUP, len * 4);
        vf high = {0};
        for (int i = 0; i < GROUP; i += VW) {
            vf v = vload(group + i);
            high = vmax(high, vmax(v, -v));
        }
        for (int i = 0; i < VW; i++) largest = high[i] > largest ? high[i] : largest;
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        scale[g] = largest / 127.0f;
        const vf shift = vset(12582912.0f); // adding 1.5 * 2^23 rounds to an integer
        for (int i = 0; i < GROUP; i += VW) {
            vf v = vload(group + i) * inverse;
            vi n = (vi)(v + shift) - (vi)shift;
            for (int j = 0; j < VW; j++) q[g * GROUP + i + j] = (int8_t)n[j];
        }
    }
}
