// RMSNorm, and RMSNorm of x + residual: forward and backward, one pass over memory each (a row stays in the L1 cache).
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

template <typename T>
float square_sum(const T* x, int64_t n) {
    vf total[4] = {};  // four chains, so that the additions overlap
    walk(n, [&]<int K>(int64_t i, int64_t lanes) {
        for (int k = 0; k < K; k++) {
            vf v = load(x + i + k * kLanes, lanes);
            total[k] += v * v;
        }
    });
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <typename T>
void add_row(const T* x, const T* residual, T* sum, int64_t n) {
    walk(n, [=]<int K>(int64_t i, int64_t lanes) {
        for (int64_t k = 0, j = i; k < K; k++, j += kLanes)
            store(sum + j, load(x + j, lanes) + load(residual + j, lanes), lanes);
    });
}

template <typename T>
void scale_row(const T* x, const float* w, float rstd, T* y, int64_t n, bool streamed) {
    walk(n, [=]<int K>(int64_t i, int64_t lanes) {
        for (int64_t k = 0, j = i; k < K; k++, j += kLanes)
            store(y + j, load(x + j, lanes) * rstd * load(w + j, lanes), lanes, streamed);
    });
}

// With x^ = s * rstd and g = dy * w: dx = rstd * (g - x^ * mean(g * x^)), dw = sum over rows of dy * x^.
template <typename T>
void backward_row(const T* s, const float* w, float rstd, const T* dy, const T* dsum, T* dx, float* dw, int64_t n,
                  bool streamed) {
    vf dot[4] = {};
    walk(n, [&]<int K>(int64_t i, int64_t lanes) {
        for (int64_t k = 0, j = i; k < K; k++, j += kLanes)
            dot[k] += load(s + j, lanes) * (load(dy + j, lanes) * load(w + j, lanes));
    });
    float c = rstd * rstd * rstd * sum((dot[0] + dot[1]) + (dot[2] + dot[3])) / (float)n;
    walk(n, [=]<int K>(int64_t i, int64_t lanes) {
        for (int64_t k = 0, j = i; k < K; k++, j += kLanes) {
            vf v = load(s + j, lanes), g = load(dy + j, lanes), scale = load(w + j, lanes);
            vf d = g * scale * rstd - v * c;
            if (dsum) d += load(dsum + j, lanes);
            store(dw + j, load(dw + j, lanes) + g * (v * rstd), lanes);
            store(dx + j, d, lanes, streamed);
        }
    });
}

template <typename T>
void forward(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* w, T* sum, T* y,
             float* rstd, int64_t rows, int64_t dim, float eps, [[maybe_unused]] int threads) {
    bool streamed = streams(y, rows, dim);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const T* s = x + i * x_stride;
            if (residual) {
                add_row(s, residual + i * residual_stride, sum + i * dim, dim);
                s = sum + i * dim;
            }
            rstd[i] = 1.0f / __builtin_sqrtf(square_sum(s, dim) / (float)dim + eps);
            scale_row(s, w, rstd[i], y + i * dim, dim, streamed);
        }
        stream_end();
    }
}

template <typename T>
void backward(const T* s, int64_t s_stride, const float* w, const float* rstd, const T* dy, int64_t dy_stride,
              const T* dsum, int64_t dsum_stride, T* dx, float* partial, float* dw, int64_t rows, int64_t dim,
              int64_t blocks, [[maybe_unused]] int threads) {
    bool streamed = streams(dx, rows, dim);
    // dw is summed within fixed blocks of rows, then over the blocks in order: the same bits for any number of threads.
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            float* part = partial + b * dim;
            for (int64_t j = 0; j < dim; j++) part[j] = 0.0f;
            for (int64_t i = rows * b / blocks; i < rows * (b + 1) / blocks; i++)
                backward_row(s + i * s_stride, w, rstd[i], dy + i * dy_stride, dsum ? dsum + i * dsum_stride : nullptr,
                             dx + i * dim, part, dim, streamed);
        }
        stream_end();
#pragma omp for schedule(static)
        for (int64_t j = 0; j < dim; j += kLanes) {
            int64_t m = dim - j < kLanes ? dim - j : kLanes;
            vf total = {};
            for (int64_t b = 0; b < blocks; b++) total += load(partial + b * dim + j, m);
            store(dw + j, total, m);
        }
    }
}

}  // namespace

void rms_norm(bool is_bf16, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
              const float* w, void* sum, void* y, float* rstd, int64_t rows, int64_t dim, float eps, int threads) {
    auto run = [&]<typename T>(T) {
        forward((const T*)x, x_stride, (const T*)residual, residual_stride, w, (T*)sum, (T*)y, rstd, rows,
                dim, eps, threads);
    };
    is_bf16 ? run(bf16{}) : run(float{});
}

void rms_norm_backward(bool is_bf16, const void* s, int64_t s_stride, const float* w, const float* rstd, const void* dy,
                       int64_t dy_stride, const void* dsum, int64_t dsum_stride, void* dx, float* partial,
                       float* dw, int64_t rows, int64_t dim, int64_t blocks, int threads) {
    auto run = [&]<typename T>(T) {
        backward((const T*)s, s_stride, w, rstd, (const T*)dy, dy_stride, (const T*)dsum, dsum_stride,
                 (T*)dx, partial, dw, rows, dim, blocks, threads);
    };
    is_bf16 ? run(bf16{}) : run(float{});
}

}  // namespace fastlm::FASTLM_ISA
