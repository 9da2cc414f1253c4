// y = x W^T for a handful of rows of x, as in a step of generation: bound by reading W once, or by the products, where BLAS
// libraries take two to four times as long (all matmuls of SmolLM2-135M, one core of Zen 1: a row 58 ms in MKL and 47 here,
// where reading alone takes 38; eight rows 182 and 81).
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

// y[m][o] of R rows of W and M rows of x: all products of a vector of W while it is in a register. The next R rows are
// fetched meanwhile; the processor's own prefetching loses its way where rows end (eight rows: 104 ms without).
template <int R, int M, typename T>
inline void tile(const T* x, int64_t x_stride, const T* w, int64_t dim, T* y, int64_t y_stride) {
    vf acc[R][M] = {};
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        vf b[R];
        for (int r = 0; r < R; r++) {
            b[r] = load(w + r * dim + i);
            __builtin_prefetch(w + (R + r) * dim + i);
        }
        for (int m = 0; m < M; m++) {
            vf a = load(x + m * x_stride + i);
            for (int r = 0; r < R; r++) acc[r][m] += a * b[r];
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            vf rest = i < dim ? load(x + m * x_stride + i, dim - i) * load(w + r * dim + i, dim - i) : vf{};
            store(y + m * y_stride + r, splat(sum(acc[r][m] + rest)), 1);
        }
}

// All rows of x, four at a time, against R rows of W, which stay in the nearest cache.
template <int R, typename T>
inline void strip(const T* x, int64_t rows, const T* w, int64_t dim, T* y, int64_t out) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) tile<R, 4>(x + m * dim, dim, w, dim, y + m * out, out);
    switch (rows - m) {
        case 3: return tile<R, 3>(x + m * dim, dim, w, dim, y + m * out, out);
        case 2: return tile<R, 2>(x + m * dim, dim, w, dim, y + m * out, out);
        case 1: return tile<R, 1>(x + m * dim, dim, w, dim, y + m * out, out);
    }
}

template <typename T>
void run(const T* x, int64_t rows, const T* w, int64_t dim, T* y, int64_t out, [[maybe_unused]] int threads) {
    constexpr int64_t kRows = 3;
    int64_t strips = (out + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t s = 0; s < strips; s++) {
        int64_t o = s * kRows;
        if (o + kRows <= out)
            strip<kRows>(x, rows, w + o * dim, dim, y + o, out);
        else
            for (; o < out; o++) strip<1>(x, rows, w + o * dim, dim, y + o, out);
    }
}

}  // namespace

void few_rows_linear(bool is_bf16, const void* x, int64_t rows, const void* w, int64_t dim, void* y, int64_t out,
                     int threads) {
    is_bf16 ? run((const bf16*)x, rows, (const bf16*)w, dim, (bf16*)y, out, threads)
            : run((const float*)x, rows, (const float*)w, dim, (float*)y, out, threads);
}

}  // namespace fastlm::FASTLM_ISA
