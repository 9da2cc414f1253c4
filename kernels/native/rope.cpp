// Rotary embedding of q and k together: a token's cosines and sines are read once for all its heads.
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of one head.
template <typename T>
void rotate(const T* x, const float* cos, const float* sin, float sign, T* out, int64_t half) {
    int64_t j = 0;
    for (; j + kLanes <= half; j += kLanes) {
        vf a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j) * sign;
        store(out + j, a * c - b * s);
        store(out + half + j, b * c + a * s);
    }
    if (int64_t m = half - j; m > 0) {
        vf a = load_tail(x + j, m), b = load_tail(x + half + j, m);
        vf c = load_tail(cos + j, m), s = load_tail(sin + j, m) * sign;
        store_tail(out + j, a * c - b * s, m);
        store_tail(out + half + j, b * c + a * s, m);
    }
}

template <typename T>
void run(const Heads& q, const Heads& k, const float* cos, const float* sin, const int64_t* positions, int64_t batch,
         int64_t tokens, int64_t half, float sign, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < batch * tokens; i++) {
        const Heads* both[] = {&q, &k};
        int64_t b = i / tokens, t = i % tokens, p = positions ? positions[i] : t;
        for (const Heads* x : both) {
            const T* from = (const T*)x->from + b * x->batch_stride + t * x->token_stride;
            T* to = (T*)x->to + i * x->heads * 2 * half;
            for (int64_t h = 0; h < x->heads; h++)
                rotate(from + h * x->head_stride, cos + p * half, sin + p * half, sign, to + h * 2 * half, half);
        }
    }
}

}  // namespace

void rope(bool is_bf16, const Heads& q, const Heads& k, const float* cos, const float* sin, const int64_t* positions,
          int64_t batch, int64_t tokens, int64_t half, float sign, int threads) {
    is_bf16 ? run<bf16>(q, k, cos, sin, positions, batch, tokens, half, sign, threads)
            : run<float>(q, k, cos, sin, positions, batch, tokens, half, sign, threads);
}

}  // namespace fastlm::FASTLM_ISA
