// The Python face of the native ops: picks an instruction set, releases the GIL, passes addresses through.
//
// Addresses are plain integers: kernels/cpu.py is the only caller, and it checks shapes, strides and dtypes first.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
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
};
#define FASTLM_OPS(isa) Ops{#isa, isa::rms_norm, isa::rms_norm_backward}

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

    using Gil = nb::call_guard<nb::gil_scoped_release>;
    m.def("rms_norm", [](bool bf16, uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
                         uintptr_t w, uintptr_t sum, uintptr_t y, uintptr_t rstd, int64_t rows, int64_t dim, float eps,
                         int threads) {
        ops.rms_norm(bf16, at<void>(x), x_stride, at<void>(residual), residual_stride, at<void>(w), at<void>(sum),
                     at<void>(y), at<float>(rstd), rows, dim, eps, threads);
    }, Gil());
    m.def("rms_norm_backward", [](bool bf16, uintptr_t s, int64_t s_stride, uintptr_t w, uintptr_t rstd, uintptr_t dy,
                                  int64_t dy_stride, uintptr_t dsum, int64_t dsum_stride, uintptr_t dx,
                                  uintptr_t partial, uintptr_t dw, int64_t rows, int64_t dim, int64_t blocks,
                                  int threads) {
        ops.rms_norm_backward(bf16, at<void>(s), s_stride, at<void>(w), at<float>(rstd), at<void>(dy), dy_stride,
                              at<void>(dsum), dsum_stride, at<void>(dx), at<float>(partial), at<void>(dw), rows, dim,
                              blocks, threads);
    }, Gil());
}
