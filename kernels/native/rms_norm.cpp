// RMSNorm, and RMSNorm of x + residual: forward and backward, one pass over memory each (a row stays in the L1 cache).
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

// The sum of squares of a row, in four chains so that the additions overlap.
template <typename T>
float square_sum(const T* x, int64_t n) {
    vf a[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int k = 0; k < 4; k++) {
            vf v = load(x + i + k * kLanes);
            a[k] += v * v;
        }
    for (; i < n; i += kLanes) {
        vf v = i + kLanes <= n ? load(x + i) : load_tail(x + i, n - i);
        a[0] += v * v;
    }
    return sum((a[0] + a[1]) + (a[2] + a[3]));
}

template <typename T>
void add_row(const T* x, const T* residual, T* sum, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(sum + i, load(x + i) + load(residual + i));
    if (i < n) store_tail(sum + i, load_tail(x + i, n - i) + load_tail(residual + i, n - i), n - i);
}

template <typename T>
void scale_row(const T* x, const float* w, float rstd, T* y, int64_t n) {
    vf r = splat(rstd);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * r * load(w + i));
    if (i < n) store_tail(y + i, load_tail(x + i, n - i) * r * load_tail(w + i, n - i), n - i);
}

// With x^ = s * rstd and g = dy * w: dx = rstd * (g - x^ * mean(g * x^)), dw = sum over rows of dy * x^.
template <typename T>
void backward_row(const T* s, const float* w, float rstd, const T* dy, const T* dsum, T* dx, T* y, float* dw, int64_t n) {
    vf dot[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes)
        for (int k = 0; k < 2; k++) dot[k] += load(s + i + k * kLanes) * (load(dy + i + k * kLanes) * load(w + i + k * kLanes));
    for (; i < n; i += kLanes) {
        int64_t m = n - i;
        dot[0] += m >= kLanes ? load(s + i) * (load(dy + i) * load(w + i))
                              : load_tail(s + i, m) * (load_tail(dy + i, m) * load_tail(w + i, m));
    }
    vf r = splat(rstd), c = splat(rstd * rstd * rstd * sum(dot[0] + dot[1]) / (float)n);
    for (i = 0; i + kLanes <= n; i += kLanes) {
        vf v = load(s + i), g = load(dy + i);
        vf d = g * load(w + i) * r - v * c;
        store(dw + i, load(dw + i) + g * (v * r));
        store(dx + i, dsum ? d + load(dsum + i) : d);
        if (y) store(y + i, v * r * load(w + i));
    }
    if (i < n) {
        int64_t m = n - i;
        vf v = load_tail(s + i, m), g = load_tail(dy + i, m);
        vf d = g * load_tail(w + i, m) * r - v * c;
        store_tail(dw + i, load_tail(dw + i, m) + g * (v * r), m);
        store_tail(dx + i, dsum ? d + load_tail(dsum + i, m) : d, m);
        if (y) store_tail(y + i, v * r * load_tail(w + i, m), m);
    }
}

template <typename T>
void forward(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* w, T* sum, T* y,
             float* rstd, int64_t rows, int64_t dim, float eps, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T* s = x + i * x_stride;
        if (residual) {
            add_row(s, residual + i * residual_stride, sum + i * dim, dim);
            s = sum + i * dim;
        }
        rstd[i] = 1.0f / __builtin_sqrtf(square_sum(s, dim) / (float)dim + eps);
        scale_row(s, w, rstd[i], y + i * dim, dim);
    }
}

template <typename T>
void backward(const T* s, int64_t s_stride, const float* w, const float* rstd, const T* dy, int64_t dy_stride,
              const T* dsum, int64_t dsum_stride, T* dx, T* y, float* partial, float* dw, int64_t rows, int64_t dim,
              int64_t blocks, [[maybe_unused]] int threads) {
    // dw is summed within fixed blocks of rows, then over the blocks in order: the same bits for any number of threads.
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            float* part = partial + b * dim;
            for (int64_t j = 0; j < dim; j++) part[j] = 0.0f;
            for (int64_t i = rows * b / blocks; i < rows * (b + 1) / blocks; i++)
                backward_row(s + i * s_stride, w, rstd[i], dy + i * dy_stride, dsum ? dsum + i * dsum_stride : nullptr,
                             dx + i * dim, y ? y + i * dim : nullptr, part, dim);
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < dim; j += kLanes) {
            int64_t m = dim - j < kLanes ? dim - j : kLanes;
            vf total = {};
            for (int64_t b = 0; b < blocks; b++) total += load_tail(partial + b * dim + j, m);
            store_tail(dw + j, total, m);
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
                       int64_t dy_stride, const void* dsum, int64_t dsum_stride, void* dx, void* y, float* partial,
                       float* dw, int64_t rows, int64_t dim, int64_t blocks, int threads) {
    auto run = [&]<typename T>(T) {
        backward((const T*)s, s_stride, w, rstd, (const T*)dy, dy_stride, (const T*)dsum, dsum_stride,
                 (T*)dx, (T*)y, partial, dw, rows, dim, blocks, threads);
    };
    is_bf16 ? run(bf16{}) : run(float{});
}

}  // namespace fastlm::FASTLM_ISA
