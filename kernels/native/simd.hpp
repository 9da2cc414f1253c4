// Vectors of fp32 through the compiler's vector extensions: the same source becomes SSE2, AVX2, AVX-512 or NEON.
//
// Everything lives in a namespace named after the instruction set, and nothing here is taken from the C++ library:
// an inline function shared between object files built for different sets could be resolved to the wrong one.
#pragma once
#include <stddef.h>
#include <stdint.h>

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

// ---- loads and stores of one vector; the _tail forms touch the first n < kLanes elements only ----
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
static inline vf load_tail(const T* p, int64_t n, float fill = 0.0f) {
    vf v = splat(fill);
    T part[kLanes] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    vf all = load(part);
    for (int64_t i = 0; i < n; i++) v[i] = all[i];
    return v;
}
template <typename T>
static inline void store_tail(T* p, vf v, int64_t n) {
    T part[kLanes];
    store(part, v);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
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
static inline vf max(vf a, vf b) { return a > b ? a : b; }

// The first n lanes of v, `fill` in the others.
static inline vf keep_first(vf v, int64_t n, float fill) {
    for (int64_t i = n; i < kLanes; i++) v[i] = fill;
    return v;
}

// ---- exponentials: x = k ln 2 + r, |r| <= ln 2 / 2, e^r = 1 + r + r^2 q(r) with q fitted to a relative error of 3e-9 ----
struct Reduced {
    vf em1;    // e^r - 1
    vf scale;  // 2^k
};
static inline Reduced reduce(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    vf t = x * 1.44269504f + magic;
    vf k = t - magic;
    vf r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    vf q = r * 0.001381459878757596f + 0.008368716575205326f;
    q = q * r + 0.04166838899254799f;
    q = q * r + 0.1666652113199234f;
    q = q * r + 0.4999999403953552f;
    return {r * r * q + r, (vf)(((vi)t - (vi)magic + 127) << 23)};
}

// e^x to 2 ulp for x in [-87.3, 88]; 0 below, e^88 above, nan for nan.
static inline vf exp(vf x) {
    x = x > 88.0f ? splat(88.0f) : x;
    vf low = splat(-87.33f);
    Reduced e = reduce(x < low ? low : x);
    vf y = e.em1 * e.scale + e.scale;
    return x < low ? vf{} : y;
}

// tanh x to 4 ulp, from e^2|x| - 1, which loses nothing near 0.
static inline vf tanh(vf x) {
    vf a = (vf)((vi)x & 0x7fffffff) * 2.0f;
    Reduced e = reduce(a > 20.0f ? splat(20.0f) : a);
    vf em1 = e.em1 * e.scale + (e.scale - 1.0f);
    return (vf)((vi)(em1 / (em1 + 2.0f)) | ((vi)x & (vi)splat(-0.0f)));
}

}  // namespace fastlm::FASTLM_ISA
