// Vectors of fp32 through the compiler's vector extensions: the same source becomes SSE2, AVX2, AVX-512 or NEON.
//
// Everything lives in a namespace named after the instruction set, and nothing here is taken from the C++ library:
// an inline function shared between object files built for different sets could be resolved to the wrong one.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if FASTLM_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace fastlm::FASTLM_ISA {

constexpr int64_t kLanes = FASTLM_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FASTLM_VECTOR_BYTES / 2)));

struct bf16 {
    uint16_t bits;
};

static inline vf splat(float a) { return a - vf{}; }  // a + 0 would lose the sign of -0

// ---- bf16 <-> fp32: a bf16 is the upper half of an fp32; rounding to nearest, ties to even, nan stays nan ----
static inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

static inline vh narrow(vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (u >> 16) | 0x40u;
    return __builtin_convertvector((vu)(x == x ? (vi)rounded : (vi)nan), vh);
}

// ---- loads and stores of one vector, or, with n <= kLanes, of its first n elements ----
static inline vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline vf load(const bf16* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h);
}
static inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vf v) {
    vh h = narrow(v);
    __builtin_memcpy(p, &h, sizeof h);
}
template <typename T>
static inline vf load(const T* p, int64_t n, float fill = 0.0f) {
    if (n == kLanes) return load(p);
    vf v = splat(fill);
    T part[kLanes] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    vf all = load(part);
    for (int64_t i = 0; i < n; i++) v[i] = all[i];
    return v;
}
template <typename T>
static inline void store(T* p, vf v, int64_t n) {
    if (n == kLanes) return store(p, v);
    T part[kLanes];
    store(part, v);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

// ---- results larger than any cache go past it: an ordinary store would first read what it overwrites ----
#if FASTLM_VECTOR_BYTES == 32
constexpr int64_t kStreamBytes = 16 << 20;  // the largest that is still worth keeping in a cache for its reader
static inline void stream(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
static inline void stream(bf16* p, vf v) { _mm_stream_si128((__m128i*)p, (__m128i)narrow(v)); }
static inline void stream_end() { _mm_sfence(); }  // a thread's last act before others may read
#elif FASTLM_VECTOR_BYTES == 64
constexpr int64_t kStreamBytes = 16 << 20;
static inline void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
static inline void stream(bf16* p, vf v) { _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v)); }
static inline void stream_end() { _mm_sfence(); }
#else
constexpr int64_t kStreamBytes = INT64_MAX;
template <typename T>
static inline void stream(T* p, vf v) { store(p, v); }
static inline void stream_end() {}
#endif
// Whether `rows` of `dim` results at p are streamed: many bytes, every vector of every row aligned.
template <typename T>
static inline bool streams(const T* p, int64_t rows, int64_t dim) {
    return rows * dim * (int64_t)sizeof(T) >= kStreamBytes && (uintptr_t)p % FASTLM_VECTOR_BYTES == 0 && dim % kLanes == 0 &&
           dim * (int64_t)sizeof(T) % FASTLM_VECTOR_BYTES == 0;
}
template <typename T>
static inline void store(T* p, vf v, int64_t n, bool streamed) { streamed ? stream(p, v) : store(p, v, n); }

// Ask for K vectors ahead of their use. The hardware does so by itself within a page, which a row hardly outlasts.
template <int K, typename T>
static inline void prefetch(const T* p) {
    for (int64_t i = 0; i < K * kLanes; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

// Sum and maximum of the lanes, always in the same order.
static inline float sum(vf v) {
    float s[kLanes];
    store(s, v);
    for (int64_t w = kLanes / 2; w > 0; w /= 2)
        for (int64_t i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}
static inline float max(vf v) {
    float m = v[0];
    for (int64_t i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// The larger (smaller) of each lane, and b where either is nan: one AVX2 instruction, which GCC has to be told.
#if FASTLM_VECTOR_BYTES == 32
static inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// The first n lanes of v, `fill` in the others.
static inline vf keep_first(vf v, int64_t n, float fill) {
    for (int64_t i = n; i < kLanes; i++) v[i] = fill;
    return v;
}

// Goes through n elements: body<4>(i, kLanes) takes the four whole vectors at i, body<1>(i, lanes) one, whole or partial.
template <typename Body>
static inline void walk(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) body.template operator()<4>(i, kLanes);
    for (; i + kLanes <= n; i += kLanes) body.template operator()<1>(i, kLanes);
    if (i < n) body.template operator()<1>(i, n - i);
}

// ---- exponentials: x = k ln 2 + r, |r| <= ln 2 / 2, e^r = 1 + r + r^2 q(r) with q fitted to a relative error of 3e-9 ----
// Taken K vectors at a time, step by step: one alone waits for its own latencies (11 ns per 8 on Zen 1, four 7 ns).
template <int K>
static inline void reduce(const vf (&x)[K], vf (&em1)[K], vf (&scale)[K]) {
    vf t[K], r[K], r2[K], low[K], high[K];
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    for (int k = 0; k < K; k++) t[k] = x[k] * 1.44269504f + magic;
    for (int k = 0; k < K; k++) r[k] = x[k] - (t[k] - magic) * 0.693359375f;
    for (int k = 0; k < K; k++) r[k] = r[k] - (t[k] - magic) * -2.12194440e-4f;
    for (int k = 0; k < K; k++) r2[k] = r[k] * r[k];
    for (int k = 0; k < K; k++) low[k] = r[k] * 0.1666652113199234f + 0.4999999403953552f;
    for (int k = 0; k < K; k++) high[k] = r[k] * 0.008368716575205326f + 0.04166838899254799f;
    for (int k = 0; k < K; k++) high[k] = r2[k] * 0.001381459878757596f + high[k];
    for (int k = 0; k < K; k++) low[k] = high[k] * r2[k] + low[k];
    for (int k = 0; k < K; k++) em1[k] = low[k] * r2[k] + r[k];                 // e^r - 1
    for (int k = 0; k < K; k++) scale[k] = (vf)(((vi)t[k] << 23) + 0x3f800000);  // 2^k
}

// x <- e^x to 2 ulp, x first brought into [-87.33, 88]; nan for nan.
template <int K>
static inline void exp_within(vf (&x)[K]) {
    vf em1[K], scale[K];
    for (int k = 0; k < K; k++) x[k] = min(splat(88.0f), max(splat(-87.33f), x[k]));
    reduce(x, em1, scale);
    for (int k = 0; k < K; k++) x[k] = em1[k] * scale[k] + scale[k];
}

// x <- e^x to 2 ulp, exactly 0 below -87.33, e^88 above 88; nan for nan.
template <int K>
static inline void exp(vf (&x)[K]) {
    vi keep[K];
    for (int k = 0; k < K; k++) keep[k] = ~(x[k] < splat(-87.33f));
    exp_within(x);
    for (int k = 0; k < K; k++) x[k] = (vf)((vi)x[k] & keep[k]);
}
static inline float exp(float x) {
    vf v[1] = {splat(x)};
    exp(v);
    return v[0][0];
}

// x <- tanh x to 4 ulp, from e^2|x| - 1, which loses nothing near 0.
template <int K>
static inline void tanh(vf (&x)[K]) {
    vf a[K], em1[K], scale[K];
    for (int k = 0; k < K; k++) a[k] = min(splat(20.0f), (vf)((vi)x[k] & 0x7fffffff) * 2.0f);
    reduce(a, em1, scale);
    for (int k = 0; k < K; k++) {
        vf e = em1[k] * scale[k] + (scale[k] - 1.0f);
        x[k] = (vf)((vi)(e / (e + 2.0f)) | ((vi)x[k] & (vi)splat(-0.0f)));
    }
}

}  // namespace fastlm::FASTLM_ISA
