// The loss and the gradient of rows of logits, in one call: online log-sum-exp, then p - onehot written where asked.
//
// A row of 50,257 logits (200 KB) stays in the L2 cache between the two passes. It is taken in blocks that fit in L1:
// the maximum of a block, then its exponentials against the largest maximum so far. Sums are kept per block and added
// in fp64, so that the error does not grow with the vocabulary.
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kMaxBlocks = 256;
constexpr float kNan = __builtin_nanf("");

// z <- cap tanh(z / cap)
template <bool kCapped, int K>
inline void soften(vf (&z)[K], float cap) {
    if constexpr (kCapped) {
        for (int k = 0; k < K; k++) z[k] = z[k] / cap;
        tanh(z);
        for (int k = 0; k < K; k++) z[k] = z[k] * cap;
    }
}
template <bool kCapped>
float soften(float x, float cap) {
    vf z[1] = {splat(x)};
    soften<kCapped>(z, cap);
    return z[0][0];
}

template <typename T>
float largest(const T* x, int64_t n) {
    vf top[4];
    for (vf& t : top) t = splat(-__FLT_MAX__);
    walk(n, [&]<int K>(int64_t i, int64_t lanes) {
        for (int k = 0; k < K; k++) top[k] = max(load(x + i + k * kLanes, lanes, -__FLT_MAX__), top[k]);
    });
    return max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// sum of e^(z - m); with `kept`, the exponentials are stored there (fp32 only: bf16 would round them)
template <bool kCapped, typename T>
float sum_exp(const T* x, float m, float cap, float* kept, int64_t n) {
    vf total[4] = {};
    walk(n, [&]<int K>(int64_t i, int64_t lanes) {
        vf z[K];
        for (int k = 0; k < K; k++) z[k] = load(x + i + k * kLanes, lanes);
        soften<kCapped>(z, cap);
        prefetch<K>(x + n + i);  // the next block, or the next row's first
        for (int k = 0; k < K; k++) z[k] -= m;
        exp(z);
        for (int k = 0; k < K; k++) {
            if (kept) store(kept + i + k * kLanes, z[k], lanes);
            total[k] += lanes == kLanes ? z[k] : keep_first(z[k], lanes, 0.0f);
        }
    });
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <bool kCapped, typename T>
double sum_logits(const T* x, float cap, int64_t n) {
    double total = 0;
    walk(n, [&]<int K>(int64_t i, int64_t lanes) {
        vf z[K];
        for (int k = 0; k < K; k++) z[k] = load(x + i + k * kLanes, lanes);
        soften<kCapped>(z, cap);
        for (int k = 0; k < K; k++) total += sum(lanes == kLanes ? z[k] : keep_first(z[k], lanes, 0.0f));
    });
    return total;
}

// grad = (e^(z - lse) * scale + shift) * (1 - (z / cap)^2 where capped)
template <bool kCapped, typename T>
void gradient(const T* x, float lse, float scale, float shift, float cap, T* grad, int64_t n) {
    walk(n, [=]<int K>(int64_t i, int64_t lanes) {
        vf z[K], p[K];
        for (int k = 0; k < K; k++) z[k] = load(x + i + k * kLanes, lanes);
        soften<kCapped>(z, cap);
        prefetch<K>(x + i + 1024);  // a page ahead
        for (int k = 0; k < K; k++) p[k] = z[k] - lse;
        exp(p);
        for (int k = 0; k < K; k++) {
            vf g = p[k] * scale + shift;
            if constexpr (kCapped) g *= 1.0f - (z[k] / cap) * (z[k] / cap);
            store(grad + i + k * kLanes, g, lanes);
        }
    });
}

void rescale(float* grad, float scale, float shift, int64_t n) {
    walk(n, [=]<int K>(int64_t i, int64_t lanes) {
        for (int64_t k = 0, j = i; k < K; k++, j += kLanes) store(grad + j, load(grad + j, lanes) * scale + shift, lanes);
    });
}

template <typename T>
void fill(T* x, float value, int64_t n) {
    walk(n, [=]<int K>(int64_t i, int64_t lanes) {
        for (int k = 0; k < K; k++) store(x + i + k * kLanes, splat(value), lanes);
    });
}

template <bool kCapped, typename T>
void one_row(const T* x, int64_t target, float* loss, float* lse, float dloss, T* grad, const Loss& o) {
    int64_t n = o.vocab, block = n / kMaxBlocks + 1 > 2048 ? n / kMaxBlocks + 1 : 2048;
    float maxima[kMaxBlocks], m = -__FLT_MAX__;
    float z_target = soften<kCapped>(load(x + target, 1)[0], o.softcap);
    // In fp32 the exponentials of the forward pass wait in the gradient's place and are only rescaled afterwards.
    float* kept = sizeof(T) == 4 && !kCapped && loss ? (float*)grad : nullptr;
    double spread = o.smoothing && loss ? sum_logits<kCapped>(x, o.softcap, n) : 0, total = 0;
    if (loss) {
        for (int64_t b = 0, i = 0; i < n; b++, i += block) {
            int64_t size = n - i < block ? n - i : block;
            float top = soften<kCapped>(largest(x + i, size), o.softcap), before = m;
            maxima[b] = m = top > m ? top : m;
            total = total * exp(before - m) + sum_exp<kCapped>(x + i, m, o.softcap, kept ? kept + i : nullptr, size);
        }
        float above = __builtin_logf((float)total);  // lse - m; kept apart, since lse rounds it away where m is large
        *lse = m + above;
        *loss = (1.0f - o.smoothing) * (m - z_target + above) + o.z_loss * *lse * *lse;
        if (o.smoothing) *loss += o.smoothing * (m - (float)(spread / (double)n) + above);
    }
    if (!grad) return;
    float scale = dloss * (1.0f + 2.0f * o.z_loss * *lse), shift = -dloss * o.smoothing / (float)n;
    if (kept) {
        for (int64_t b = 0, i = 0; i < n; b++, i += block)
            rescale(kept + i, exp(maxima[b] - m) / (float)total * scale, shift, n - i < block ? n - i : block);
    } else {
        gradient<kCapped>(x, *lse, scale, shift, o.softcap, grad, n);
    }
    float at = exp(z_target - *lse) * scale + shift - dloss * (1.0f - o.smoothing);
    if (kCapped) at *= 1.0f - (z_target / o.softcap) * (z_target / o.softcap);
    store(grad + target, splat(at), 1);
}

template <typename T>
void rows_of(const T* logits, int64_t stride, const int64_t* targets, float* loss, float* lse, const float* dloss,
             T* grad, int64_t grad_stride, int64_t rows, int64_t width, const Loss& o, [[maybe_unused]] int threads) {
    // dynamic: ignored rows cost nothing, and they come in runs
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T* x = logits + i * stride;
        T* g = grad ? grad + i * grad_stride : nullptr;
        float *row_loss = loss ? loss + i : nullptr, up = dloss ? dloss[i] : 1.0f;
        int64_t target = targets[i];
        if (target == o.ignore_index || target < 0 || target >= o.vocab) {
            float value = target == o.ignore_index ? 0.0f : kNan;
            if (loss) loss[i] = lse[i] = value;
            if (g) fill(g, value, o.vocab);
        } else if (o.softcap) {
            one_row<true>(x, target, row_loss, lse + i, up, g, o);
        } else {
            one_row<false>(x, target, row_loss, lse + i, up, g, o);
        }
        if (g) fill(g + o.vocab, 0.0f, width - o.vocab);
    }
}

}  // namespace

void cross_entropy(bool is_bf16, const void* logits, int64_t stride, const int64_t* targets, float* loss, float* lse,
                   const float* dloss, void* grad, int64_t grad_stride, int64_t rows, int64_t width, const Loss& options,
                   int threads) {
    auto run = [&]<typename T>(T) {
        rows_of((const T*)logits, stride, targets, loss, lse, dloss, (T*)grad, grad_stride, rows, width, options,
                threads);
    };
    is_bf16 ? run(bf16{}) : run(float{});
}

}  // namespace fastlm::FASTLM_ISA
