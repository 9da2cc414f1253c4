// The native ops of one instruction set. Included once per set, with FASTLM_ISA naming its namespace.
//
// A `void*` is fp32, or bf16 where `is_bf16` says so. A stride counts elements; the elements of a row are adjacent.
// `threads` is the size of the OpenMP team; results do not depend on it. A pointer said to be optional may be null.
#ifndef FASTLM_OPS_TYPES
#define FASTLM_OPS_TYPES
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
namespace fastlm {
#if defined(_OPENMP)
static inline int thread_number() { return omp_get_thread_num(); }
#else
static inline int thread_number() { return 0; }
#endif
struct Heads {  // (batch, tokens, heads, 2 * half) to rotate; the result is contiguous
    const void* from;
    void* to;
    int64_t batch_stride, token_stride, head_stride, heads;
};
struct Strided {  // (tokens, heads, dim), the elements of a token adjacent
    const void* at;
    int64_t step;  // from a token to the next
};
struct Attention {
    Strided q, k, v;
    const int32_t *queries, *keys;  // the boundaries of the segments, segments + 1 each
    int64_t segments, heads, group, dim;  // group: query heads of one key/value head
    float scale;
};
struct Loss {
    int64_t vocab, ignore_index;
    float z_loss, smoothing, softcap;  // softcap 0: none
};
}  // namespace fastlm
#endif

namespace fastlm::FASTLM_ISA {

// y = s * rstd * w, where s = x, or x + residual, then written to `sum` (optional: residual with sum)
void rms_norm(bool is_bf16, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
              const float* w, void* sum, void* y, float* rstd, int64_t rows, int64_t dim, float eps, int threads);

// dx (+ dsum) and dw (optional: dsum); `partial` is scratch of (blocks, dim)
void rms_norm_backward(bool is_bf16, const void* s, int64_t s_stride, const float* w, const float* rstd, const void* dy,
                       int64_t dy_stride, const void* dsum, int64_t dsum_stride, void* dx, float* partial,
                       float* dw, int64_t rows, int64_t dim, int64_t blocks, int threads);

// rotate q and k by the angle of each token's position, times `sign`; positions (batch, tokens) optional: 0, 1, ...
void rope(bool is_bf16, const Heads& q, const Heads& k, const float* cos, const float* sin, const int64_t* positions,
          int64_t batch, int64_t tokens, int64_t half, float sign, int threads);

// y = silu(gate) * up of rows [gate, up], each of `dim`; the backward writes y again where given (optional)
void swiglu(bool is_bf16, const void* gate_up, int64_t stride, void* y, int64_t rows, int64_t dim, int threads);
void swiglu_backward(bool is_bf16, const void* gate_up, int64_t stride, const void* dy, int64_t dy_stride,
                     void* dgate_up, void* y, int64_t rows, int64_t dim, int threads);

// loss and lse of rows of logits, unless `loss` is null, and then lse is read; `grad` (optional) receives the gradient
// times dloss (null: 1) and may be the logits themselves
void cross_entropy(bool is_bf16, const void* logits, int64_t stride, const int64_t* targets, float* loss, float* lse,
                   const float* dloss, void* grad, int64_t grad_stride, int64_t rows, int64_t width, const Loss& options,
                   int threads);

// out and lse (tokens, heads) of causal attention within segments; the last query of a segment sees its last key, the one
// before it one key less. `scratch` is attention_scratch() floats for each thread.
int64_t attention_scratch(const Attention& a, bool with_gradients);
void attention(bool is_bf16, const Attention& a, void* out, float* lse, float* scratch, int64_t scratch_size, int threads);
void attention_backward(bool is_bf16, const Attention& a, const Strided& dout, const void* out, const float* lse, void* dq,
                        void* dk, void* dv, float* scratch, int64_t scratch_size, int threads);

// y = x w^T: x (rows, dim), w (out, dim), y (rows, out), all contiguous
void few_rows_linear(bool is_bf16, const void* x, int64_t rows, const void* w, int64_t dim, void* y, int64_t out,
                     int threads);

}  // namespace fastlm::FASTLM_ISA
