// The native ops of one instruction set. Included once per set, with FASTLM_ISA naming its namespace: no include guard.
//
// A `void*` is fp32, or bf16 where `is_bf16` says so. A stride counts elements from one row to the next; the elements
// of a row are adjacent. `threads` is the size of the OpenMP team. Results do not depend on it.
#include <stdint.h>

namespace fastlm::FASTLM_ISA {

// y = s * rstd * w, s = x (+ residual, then written to `sum`)
void rms_norm(bool is_bf16, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
              const void* w, void* sum, void* y, float* rstd, int64_t rows, int64_t dim, float eps, int threads);

// dx (+ dsum) and dw; `partial` is scratch of (blocks, dim)
void rms_norm_backward(bool is_bf16, const void* s, int64_t s_stride, const void* w, const float* rstd, const void* dy,
                       int64_t dy_stride, const void* dsum, int64_t dsum_stride, void* dx, float* partial, void* dw,
                       int64_t rows, int64_t dim, int64_t blocks, int threads);

}  // namespace fastlm::FASTLM_ISA
