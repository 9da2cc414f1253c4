// The Python face of the native ops: picks an instruction set, releases the GIL, passes addresses through.
//
// Addresses are plain integers: kernels/native/__init__.py is the only caller, and it checks shapes, strides and dtypes first.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#define FASTLM_ISA baseline
#include "ops.hpp"
#undef FASTLM_ISA
#if FASTLM_HAS_avx2
#define FASTLM_ISA avx2
#include "ops.hpp"
#undef FASTLM_ISA
#endif
#if FASTLM_HAS_avx512
#define FASTLM_ISA avx512
#include "ops.hpp"
#undef FASTLM_ISA
#endif

namespace nb = nanobind;
using namespace fastlm;

namespace {

struct Ops {
    const char* name;
    decltype(&baseline::rms_norm) rms_norm;
    decltype(&baseline::rms_norm_backward) rms_norm_backward;
    decltype(&baseline::rope) rope;
    decltype(&baseline::swiglu) swiglu;
    decltype(&baseline::swiglu_backward) swiglu_backward;
    decltype(&baseline::cross_entropy) cross_entropy;
    decltype(&baseline::attention_scratch) attention_scratch;
    decltype(&baseline::attention) attention;
    decltype(&baseline::attention_backward) attention_backward;
    decltype(&baseline::few_rows_linear) few_rows_linear;
};
#define FASTLM_OPS(isa)                                                                                     \
    Ops {                                                                                                   \
        #isa, isa::rms_norm, isa::rms_norm_backward, isa::rope, isa::swiglu, isa::swiglu_backward,          \
            isa::cross_entropy, isa::attention_scratch, isa::attention, isa::attention_backward,            \
            isa::few_rows_linear                                                                            \
    }

// The sets this machine can run, widest last.
std::vector<Ops> supported() {
    std::vector<Ops> sets{FASTLM_OPS(baseline)};
#if FASTLM_HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(FASTLM_OPS(avx2));
#endif
#if FASTLM_HAS_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets.push_back(FASTLM_OPS(avx512));
#endif
    return sets;
}

Ops ops = supported().back();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Ops& set : supported()) names.push_back(set.name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const Ops& set : supported())
        if (name == set.name) {
            ops = set;
            return;
        }
    throw nb::value_error(("this machine or build has no instruction set '" + name + "'; see instruction_sets()").c_str());
}

// Blocks of any size come from the heap and stay there, so that the next step finds its pages already mapped.
bool keep_large_blocks() {
#if defined(__GLIBC__)
    return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
    return false;
#endif
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Tensor = std::tuple<uintptr_t, int64_t>;  // address, elements from a token to the next
using Bounds = std::tuple<uintptr_t, int64_t>;  // address of the boundaries, tokens that there are

Strided strided(const Tensor& x) { return {at<void>(std::get<0>(x)), std::get<1>(x)}; }

const int32_t* bounds(const char* name, const Bounds& b, int64_t segments) {
    const int32_t* x = at<int32_t>(std::get<0>(b));
    for (int64_t i = 0; i <= segments; i++)
        if (x[i] < (i ? x[i - 1] : 0) || x[i] > std::get<1>(b))
            throw std::out_of_range(std::string("attention: ") + name + "[" + std::to_string(i) + "] is " + std::to_string(x[i]) +
                                    "; boundaries must not fall, from 0 to at most " + std::to_string(std::get<1>(b)) + " tokens");
    return x;
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Bounds& queries, const Bounds& keys,
                       int64_t segments, int64_t heads, int64_t kv_heads, int64_t dim) {
    return {strided(q), strided(k), strided(v), bounds("cu_seqlens", queries, segments), bounds("cu_seqlens_k", keys, segments),
            segments, heads, heads / kv_heads, dim, 1.0f / std::sqrt((float)dim)};
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("instruction_sets", &instruction_sets);
    m.def("instruction_set", [] { return std::string(ops.name); });
    m.def("use_instruction_set", &use_instruction_set);
    m.def("keep_large_blocks", &keep_large_blocks);
    m.def("openmp", [] {
#if defined(_OPENMP)
        return true;
#else
        return false;
#endif
    });

    // Arguments by position, as in ops.hpp.
    using Gil = nb::call_guard<nb::gil_scoped_release>;
    using Address = uintptr_t;
    using Strides = std::tuple<int64_t, int64_t, int64_t>;
    m.def("rms_norm", [](bool is_bf16, Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address w,
                         Address sum, Address y, Address rstd, int64_t rows, int64_t dim, float eps, int threads) {
        ops.rms_norm(is_bf16, at<void>(x), x_stride, at<void>(residual), residual_stride, at<float>(w), at<void>(sum),
                     at<void>(y), at<float>(rstd), rows, dim, eps, threads);
    }, Gil());
    m.def("rms_norm_backward", [](bool is_bf16, Address s, int64_t s_stride, Address w, Address rstd, Address dy,
                                  int64_t dy_stride, Address dsum, int64_t dsum_stride, Address dx, Address dw,
                                  int64_t rows, int64_t dim, int threads) {
        int64_t blocks = std::clamp<int64_t>(rows, 1, 64);
        std::vector<float> partial(blocks * dim);
        ops.rms_norm_backward(is_bf16, at<void>(s), s_stride, at<float>(w), at<float>(rstd), at<void>(dy), dy_stride,
                              at<void>(dsum), dsum_stride, at<void>(dx), partial.data(), at<float>(dw),
                              rows, dim, blocks, threads);
    }, Gil());
    m.def("rope", [](bool is_bf16, Address q, Strides q_strides, int64_t q_heads, Address q_out, Address k,
                     Strides k_strides, int64_t k_heads, Address k_out, Address cos, Address sin, int64_t table_rows,
                     Address positions, int64_t batch, int64_t tokens, int64_t half, bool inverse, int threads) {
        auto heads = [](Address from, Address to, const Strides& s, int64_t n) {
            return Heads{at<void>(from), at<void>(to), std::get<0>(s), std::get<1>(s), std::get<2>(s), n};
        };
        const int64_t* p = at<int64_t>(positions);
        for (int64_t i = 0; p && i < batch * tokens; i++)
            if (p[i] < 0 || p[i] >= table_rows)
                throw std::out_of_range("rope: position " + std::to_string(p[i]) + " is outside the table of " +
                                        std::to_string(table_rows) + " positions");
        ops.rope(is_bf16, heads(q, q_out, q_strides, q_heads), heads(k, k_out, k_strides, k_heads), at<float>(cos),
                 at<float>(sin), p, batch, tokens, half, inverse ? -1.0f : 1.0f, threads);
    }, Gil());
    m.def("swiglu", [](bool is_bf16, Address gate_up, int64_t stride, Address y, int64_t rows, int64_t dim, int threads) {
        ops.swiglu(is_bf16, at<void>(gate_up), stride, at<void>(y), rows, dim, threads);
    }, Gil());
    m.def("swiglu_backward", [](bool is_bf16, Address gate_up, int64_t stride, Address dy, int64_t dy_stride,
                                Address dgate_up, Address y, int64_t rows, int64_t dim, int threads) {
        ops.swiglu_backward(is_bf16, at<void>(gate_up), stride, at<void>(dy), dy_stride, at<void>(dgate_up),
                            at<void>(y), rows, dim, threads);
    }, Gil());
    m.def("cross_entropy", [](bool is_bf16, Address logits, int64_t stride, Address targets, Address loss, Address lse,
                              Address dloss, Address grad, int64_t grad_stride, int64_t rows, int64_t width,
                              int64_t ignore_index, float z_loss, float smoothing, float softcap, int64_t vocab,
                              int threads) {
        ops.cross_entropy(is_bf16, at<void>(logits), stride, at<int64_t>(targets), at<float>(loss), at<float>(lse),
                          at<float>(dloss), at<void>(grad), grad_stride, rows, width,
                          Loss{vocab, ignore_index, z_loss, smoothing, softcap}, threads);
    }, Gil());
    m.def("attention", [](bool is_bf16, Tensor q, Tensor k, Tensor v, Bounds queries, Bounds keys, int64_t segments,
                          int64_t heads, int64_t kv_heads, int64_t dim, Address out, Address lse, int threads) {
        Attention a = attention_of(q, k, v, queries, keys, segments, heads, kv_heads, dim);
        int64_t each = ops.attention_scratch(a, false);
        std::unique_ptr<float[]> scratch(new float[each * threads]);
        ops.attention(is_bf16, a, at<void>(out), at<float>(lse), scratch.get(), each, threads);
    }, Gil());
    m.def("attention_backward", [](bool is_bf16, Tensor q, Tensor k, Tensor v, Bounds queries, Bounds keys, int64_t segments,
                                   int64_t heads, int64_t kv_heads, int64_t dim, Tensor dout, Address out, Address lse,
                                   Address dq, Address dk, Address dv, int threads) {
        Attention a = attention_of(q, k, v, queries, keys, segments, heads, kv_heads, dim);
        int64_t each = ops.attention_scratch(a, true);
        std::unique_ptr<float[]> scratch(new float[each * threads]);
        ops.attention_backward(is_bf16, a, strided(dout), at<void>(out), at<float>(lse), at<void>(dq), at<void>(dk),
                               at<void>(dv), scratch.get(), each, threads);
    }, Gil());
    m.def("few_rows_linear", [](bool is_bf16, Address x, int64_t rows, Address w, int64_t dim, Address y, int64_t out,
                                int threads) {
        ops.few_rows_linear(is_bf16, at<void>(x), rows, at<void>(w), dim, at<void>(y), out, threads);
    }, Gil());
}
