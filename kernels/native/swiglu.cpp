// SwiGLU of a packed row [gate, up]: y = gate * sigmoid(gate) * up, and its gradient with the sigmoid computed again.
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

struct Gradients {
    vf gate, up, y;
};

Gradients differentiate(vf gate, vf up, vf dy) {
    vf s = sigmoid(gate), silu = gate * s;
    return {dy * up * (s + silu * (1.0f - s)), dy * silu, silu * up};
}

template <typename T>
void forward(const T* gate_up, int64_t stride, T* y, int64_t rows, int64_t dim, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *gate = gate_up + i * stride, *up = gate + dim;
        T* out = y + i * dim;
        int64_t j = 0;
        for (; j + kLanes <= dim; j += kLanes) {
            vf g = load(gate + j);
            store(out + j, g * sigmoid(g) * load(up + j));
        }
        if (int64_t m = dim - j; m > 0) {
            vf g = load_tail(gate + j, m);
            store_tail(out + j, g * sigmoid(g) * load_tail(up + j, m), m);
        }
    }
}

template <typename T>
void backward(const T* gate_up, int64_t stride, const T* dy, int64_t dy_stride, T* dgate_up, T* y, int64_t rows,
              int64_t dim, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *gate = gate_up + i * stride, *up = gate + dim, *dout = dy + i * dy_stride;
        T *dgate = dgate_up + i * 2 * dim, *dup = dgate + dim;
        int64_t j = 0;
        for (; j + kLanes <= dim; j += kLanes) {
            Gradients d = differentiate(load(gate + j), load(up + j), load(dout + j));
            store(dgate + j, d.gate);
            store(dup + j, d.up);
            if (y) store(y + i * dim + j, d.y);
        }
        if (int64_t m = dim - j; m > 0) {
            Gradients d = differentiate(load_tail(gate + j, m), load_tail(up + j, m), load_tail(dout + j, m));
            store_tail(dgate + j, d.gate, m);
            store_tail(dup + j, d.up, m);
            if (y) store_tail(y + i * dim + j, d.y, m);
        }
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
