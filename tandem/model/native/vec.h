// Vectors of floats: 16, 8 or 4 lanes by what the compiler targets, and the loads, sums and exponential built on them.
#ifndef TANDEM_VEC_H
#define TANDEM_VEC_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VW 8
#else
#define VW 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// Keeps a vector in a register: the compiler would rather load it again for every use.
#if defined(__x86_64__)
#define KEEP(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) (void)(v)
#endif

enum { F32 = 0, F16 = 1, BF16 = 2, I8 = 3 };

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef float v4 __attribute__((vector_size(16)));

INLINE vf vload(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vstore(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf vset(float x) { return x - (vf){0}; }

// a * b + c, rounded once where the CPU can.
INLINE vf vfma(vf a, vf b, vf c) {
#if VW == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VW == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vf vselect(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return vselect(a < b, a, b); }

INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    __fp16 x;
    memcpy(&x, &h, 2);
    return (float)x;
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

INLINE float bfloat_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// VW elements of the type, from element i on, as floats.
INLINE vf vload_as(const int type, const void *p, size_t i) {
    if (type == F32) return vload((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
#if VW == 16
    __m256i raw = _mm256_loadu_si256((const __m256i *)h);
    if (type == F16) return (vf)_mm512_cvtph_ps(raw);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif VW == 8
    __m128i raw = _mm_loadu_si128((const __m128i *)h);
    if (type == F16) return (vf)_mm256_cvtph_ps(raw);
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
    uint16_t raw[VW];
    memcpy(raw, h, sizeof raw);
    vf v = {0};
    for (int j = 0; j < VW; j++) v[j] = type == F16 ? half_to_float(raw[j]) : bfloat_to_float(raw[j]);
    return v;
#endif
}

// The same for the first n <= VW of them; missing lanes are 0.
INLINE vf vload_tail(const int type, const void *p, size_t i, size_t n) {
    if (n == VW) return vload_as(type, p, i);
    float buffer[VW] = {0};
    size_t size = type == F32 ? 4 : 2;
    memcpy(buffer, (const char *)p + i * size, n * size);
    return vload_as(type, buffer, 0);
}

INLINE void vstore_tail(float *p, vf v, size_t n) {
    if (n == VW) vstore(p, v);
    else memcpy(p, &v, n * 4);
}

INLINE float load_as(int type, const void *p, size_t i) {
    if (type == F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return type == F16 ? half_to_float(h) : bfloat_to_float(h);
}

// A float stored in the type, rounded to nearest even.
INLINE void store_as(int type, void *p, size_t i, float x) {
    if (type == F32) {
        ((float *)p)[i] = x;
    } else if (type == F16) {
        uint16_t h;
#if defined(__F16C__)
        h = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
        _Float16 y = (_Float16)x;
        memcpy(&h, &y, 2);
#endif
        ((uint16_t *)p)[i] = h;
    } else {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t *)p)[i] = (uint16_t)(x == x ? rounded : 0x7fc0);
    }
}

// Sums over the lanes of four vectors, always in the same order.
INLINE v4 vsum4(vf a, vf b, vf c, vf d) {
#if VW >= 8
#if VW == 16
#define HALVES(x) _mm256_add_ps(_mm512_castps512_ps256((__m512)x), \
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)))
#else
#define HALVES(x) (__m256) x
#endif
    __m256 p = HALVES(a), q = HALVES(b), r = HALVES(c), s = HALVES(d);
#undef HALVES
    __m256 pq = _mm256_add_ps(_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
    __m256 rs = _mm256_add_ps(_mm256_unpacklo_ps(r, s), _mm256_unpackhi_ps(r, s));
    __m256 all = _mm256_add_ps(_mm256_shuffle_ps(pq, rs, 0x44), _mm256_shuffle_ps(pq, rs, 0xee));
    return (v4)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    v4 sums;
    sums[0] = (a[0] + a[2]) + (a[1] + a[3]);
    sums[1] = (b[0] + b[2]) + (b[1] + b[3]);
    sums[2] = (c[0] + c[2]) + (c[1] + c[3]);
    sums[3] = (d[0] + d[2]) + (d[1] + d[3]);
    return sums;
#endif
}

INLINE float vsum(vf a) { return vsum4(a, a, a, a)[0]; }

// e^x to 2 units in the last place; inputs are clamped to where the result is a finite float.
INLINE vf vexp(vf x) {
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    x = vmax(vmin(x, vset(88.7228f)), vset(-104.0f));
    vf t = vfma(x, vset(1.44269504f), vset(shift));
    vi n = (vi)t - (vi)vset(shift);
    vf nf = t - shift;
    vf r = vfma(nf, vset(-0.693359375f), x); // ln 2 in two parts
    r = vfma(nf, vset(2.12194440e-4f), r);
    vf p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    vf y = vfma(p * r, r, r) + 1.0f;
    vi half = n >> 1; // 2^n in two factors, since n = 128 and n < -126 have no float
    return y * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
}

INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }

#endif
