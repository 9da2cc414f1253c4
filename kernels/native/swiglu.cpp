// SwiGLU of a packed row [gate, up]: y = gate * sigmoid(gate) * up, and its gradient with the sigmoid computed again.
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

// s <- sigmoid(gate) = 1 / (1 + e^-gate)
template <int K, typename T>
inline void sigmoid(const T* gate, int64_t lanes, vf (&s)[K]) {
    for (int k = 0; k < K; k++) s[k] = -load(gate + k * kLanes, lanes);
    exp_within(s);
    for (int k = 0; k < K; k++) s[k] = 1.0f / (1.0f + s[k]);
}

template <typename T>
void forward(const T* gate_up, int64_t stride, T* y, int64_t rows, int64_t dim, [[maybe_unused]] int threads) {
    bool streamed = streams(y, rows, dim);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const T *gate = gate_up + row * stride, *up = gate + dim;
            T* out = y + row * dim;
            int64_t next = row + 1 < rows ? stride : 0;
            walk(dim, [=]<int K>(int64_t i, int64_t lanes) {
                vf s[K];
                prefetch<K>(gate + next + i);
                prefetch<K>(up + next + i);
                sigmoid(gate + i, lanes, s);
                for (int k = 0; k < K; k++) {
                    int64_t j = i + k * kLanes;
                    store(out + j, load(gate + j, lanes) * s[k] * load(up + j, lanes), lanes, streamed);
                }
            });
        }
        stream_end();
    }
}

template <typename T>
void backward(const T* gate_up, int64_t stride, const T* dy, int64_t dy_stride, T* dgate_up, T* y, int64_t rows,
              int64_t dim, [[maybe_unused]] int threads) {
    bool streamed = streams(dgate_up, rows, dim);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const T *gate = gate_up + row * stride, *up = gate + dim, *dout = dy + row * dy_stride;
            T *dgate = dgate_up + row * 2 * dim, *dup = dgate + dim, *out = y ? y + row * dim : nullptr;
            int64_t next = row + 1 < rows ? stride : 0;
            walk(dim, [=]<int K>(int64_t i, int64_t lanes) {
                vf s[K];
                prefetch<K>(gate + next + i);
                prefetch<K>(up + next + i);
                if (next) prefetch<K>(dout + dy_stride + i);
                sigmoid(gate + i, lanes, s);
                for (int k = 0; k < K; k++) {
                    int64_t j = i + k * kLanes;
                    vf g = load(gate + j, lanes), u = load(up + j, lanes), d = load(dout + j, lanes), silu = g * s[k];
                    store(dgate + j, d * u * (s[k] + silu * (1.0f - s[k])), lanes, streamed);
                    store(dup + j, d * silu, lanes, streamed);
                    if (out) store(out + j, silu * u, lanes);
                }
            });
        }
        stream_end();
    }
}

}  // namespace

void swiglu(bool is_bf16, const void* gate_up, int64_t stride, void* y, int64_t rows, int64_t dim, int threads) {
    auto run = [&]<typename T>(T) { forward((const T*)gate_up, stride, (T*)y, rows, dim, threads); };
    is_bf16 ? run(bf16{}) : run(float{});
}

void swiglu_backward(bool is_bf16, const void* gate_up, int64_t stride, const void* dy, int64_t dy_stride,
                     void* dgate_up, void* y, int64_t rows, int64_t dim, int threads) {
    auto run = [&]<typename T>(T) {
        backward((const T*)gate_up, stride, (const T*)dy, dy_stride, (T*)dgate_up, (T*)y, rows, dim, threads);
    };
    is_bf16 ? run(bf16{}) : run(float{});
}

}  // namespace fastlm::FASTLM_ISA
