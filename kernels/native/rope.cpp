// Rotary embedding of q and k together: a token's cosines and sines are read once for all its heads.
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of one head.
template <typename T>
void rotate(const T* x, const float* cos, const float* sin, float sign, T* out, int64_t half, bool streamed) {
    walk(half, [=]<int K>(int64_t i, int64_t lanes) {
        for (int64_t k = 0, j = i; k < K; k++, j += kLanes) {
            vf a = load(x + j, lanes), b = load(x + half + j, lanes);
            vf c = load(cos + j, lanes), s = load(sin + j, lanes) * sign;
            store(out + j, a * c - b * s, lanes, streamed);
            store(out + half + j, b * c + a * s, lanes, streamed);
        }
    });
}

template <typename T>
void run(const Heads& q, const Heads& k, const float* cos, const float* sin, const int64_t* positions, int64_t batch,
         int64_t tokens, int64_t half, float sign, [[maybe_unused]] int threads) {
    bool streamed = streams((T*)q.to, batch * tokens * q.heads, half) && streams((T*)k.to, batch * tokens * k.heads, half);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * tokens; i++) {
            const Heads* both[] = {&q, &k};
            int64_t b = i / tokens, t = i % tokens, p = positions ? positions[i] : t;
            for (const Heads* x : both) {
                const T* from = (const T*)x->from + b * x->batch_stride + t * x->token_stride;
                T* to = (T*)x->to + i * x->heads * 2 * half;
                for (int64_t h = 0; h < x->heads; h++)
                    rotate(from + h * x->head_stride, cos + p * half, sin + p * half, sign, to + h * 2 * half, half,
                           streamed);
            }
        }
        stream_end();
    }
}

}  // namespace

void rope(bool is_bf16, const Heads& q, const Heads& k, const float* cos, const float* sin, const int64_t* positions,
          int64_t batch, int64_t tokens, int64_t half, float sign, int threads) {
    is_bf16 ? run<bf16>(q, k, cos, sin, positions, batch, tokens, half, sign, threads)
            : run<float>(q, k, cos, sin, positions, batch, tokens, half, sign, threads);
}

}  // namespace fastlm::FASTLM_ISA
