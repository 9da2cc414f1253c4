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

static inline vf splat(float a) { return vf{} + a; }

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
static inline vf max(vf a, vf b) { return a > b ? a : b; }

}  // namespace fastlm::FASTLM_ISA
