// Causal attention within segments of packed tokens, forward and backward, never more than a block of scores in memory.
//
// Every product is made of tiles of 6 rows by two vectors: twelve sums in registers, two loads and six broadcasts for twelve
// multiply-adds. The right factor of a product lies in panels two vectors wide, one after the other, so that a tile reads
// it front to back. Scores and gradients beyond the diagonal are not computed but for the rest of a tile. The softmax is
// online over blocks of keys (FlashAttention-2, algorithms 1 and 2); one thread writes an output, always in the same order.
#include "ops.hpp"
#include "simd.hpp"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kStrip = 6, kPanel = 2 * kLanes;
constexpr int64_t kQueries = 96, kKeys = 192;  // of a block: multiples of kStrip, kKeys also of kPanel
constexpr int64_t kChunk = 384;                // queries of a forward task, a multiple of kQueries
constexpr float kLeast = -__FLT_MAX__;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : least(x, high); }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c (kStrip, kPanel) = or += a b: a (kStrip, depth) with any steps between its rows and columns, b (depth, kPanel) a panel
template <bool kAdd>
inline void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t depth, float* c, int64_t c_row) {
    vf s[kStrip][2];
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; r++)
        for (int w = 0; w < 2; w++) s[r][w] = kAdd ? load(c + r * c_row + w * kLanes) : vf{};
    for (int64_t d = 0; d < depth; d++, a += column, b += kPanel) {
        vf b0 = load(b), b1 = load(b + kLanes);
        for (int r = 0; r < kStrip; r++) {
            vf x = splat(a[r * row]);
            s[r][0] += x * b0;
            s[r][1] += x * b1;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; r++)
        for (int w = 0; w < 2; w++) store(c + r * c_row + w * kLanes, s[r][w]);
}

// c (kStrip, columns) = or += a b, the panels of b being `apart` floats from each other
template <bool kAdd>
inline void strip(const float* a, int64_t row, int64_t column, const float* b, int64_t apart, int64_t depth, float* c,
                  int64_t c_row, int64_t columns) {
    for (int64_t j = 0; j < columns; j += kPanel, b += apart) tile<kAdd>(a, row, column, b, depth, c + j, c_row);
}

// ---- a head's tokens x (n, dim), `step` elements apart, in the order in which tiles read them; zeros fill the last ones ----

inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}

// As rows of a left factor (kWidth = kStrip) or columns of a right one (kPanel): [n / kWidth][dim][kWidth]
template <int64_t kWidth, typename T>
void across(const T* x, int64_t step, int64_t n, int64_t dim, float scale, float* to) {
    for (int64_t i = 0; i < n; i += kWidth) {
        const T* rows[kWidth];
        for (int64_t w = 0; w < kWidth; w++) rows[w] = x + least(i + w, n - 1) * step;
        for (int64_t d = 0; d < dim; d++, to += kWidth)
            for (int64_t w = 0; w < kWidth; w++) to[w] = i + w < n ? value(rows[w][d]) * scale : 0.0f;
    }
}

// As rows of a right factor: [dim / kPanel][n][kPanel]
template <typename T>
void along(const T* x, int64_t step, int64_t n, int64_t dim, float scale, float* to) {
    for (int64_t panel = 0; panel < dim; panel += kPanel)
        for (int64_t i = 0; i < n; i++, to += kPanel)
            for (int64_t w = 0, d = panel; w < kPanel; w += kLanes, d += kLanes)
                store(to + w, d < dim ? load(x + i * step + d, least(kLanes, dim - d)) * scale : vf{});
}

template <typename T>
void put(const float* x, int64_t x_row, int64_t n, int64_t dim, float scale, T* to, int64_t step) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < dim; d += kLanes) {
            int64_t lanes = least(kLanes, dim - d);
            store(to + i * step + d, load(x + i * x_row + d) * scale, lanes);
        }
}

void zero(float* x, int64_t n) { __builtin_memset(x, 0, n * sizeof(float)); }

// From which of n (a multiple of kLanes) scores on a row sees nothing; they become -inf
inline void hide(float* s, int64_t seen, int64_t n) {
    for (int64_t i = seen; i < n; i++) s[i] = -__builtin_inff();
}

inline float largest(const float* s, int64_t n) {
    vf top[2] = {splat(kLeast), splat(kLeast)};
    for (int64_t i = 0; i < n; i += kPanel)
        for (int w = 0; w < 2; w++) top[w] = max(load(s + i + w * kLanes), top[w]);
    return max(max(top[0], top[1]));
}

// s <- e^(s - m); their sum
inline float exponentials(float* s, float m, int64_t n) {
    vf total = {};
    walk(n, [&]<int K>(int64_t i, int64_t) {
        vf x[K];
        for (int k = 0; k < K; k++) x[k] = load(s + i + k * kLanes) - m;
        exp(x);
        for (int k = 0; k < K; k++) {
            store(s + i + k * kLanes, x[k]);
            total += x[k];
        }
    });
    return sum(total);
}

// One segment and one key/value head of it: tq queries from token `query` on see tk keys from `key` on, query i the first
// i + 1 + tk - tq.
struct Part {
    int64_t query, tq, key, tk, kv_head;
};

inline Part part(const Attention& a, int64_t segment, int64_t kv_head) {
    int64_t query = a.queries[segment], key = a.keys[segment];
    return {query, a.queries[segment + 1] - query, key, a.keys[segment + 1] - key, kv_head};
}

template <typename T>
const T* head(const Strided& x, int64_t token, int64_t which, int64_t dim) {
    return (const T*)x.at + token * x.step + which * dim;
}

int64_t longest(const int32_t* bounds, int64_t segments) {
    int64_t most = 0;
    for (int64_t i = 0; i < segments; i++) most = bounds[i + 1] - bounds[i] > most ? bounds[i + 1] - bounds[i] : most;
    return most;
}

// Queries [first, last) of a part, of every head in the key/value head's group
template <typename T>
void forward(const Attention& a, const Part& p, int64_t first, int64_t last, T* out, float* lse, float* scratch) {
    int64_t dim = a.dim, wide = round_up(dim, kPanel), ahead = p.tk - p.tq, seen = least(p.tk, last + ahead);
    float *k = scratch, *v = k + round_up(seen, kPanel) * dim, *q = v + seen * wide, *scores = q + kQueries * dim,
          *sums = scores + kStrip * kKeys, *top = sums + kQueries * wide, *total = top + kQueries;
    across<kPanel>(head<T>(a.k, p.key, p.kv_head, dim), a.k.step, seen, dim, 1.0f, k);
    along(head<T>(a.v, p.key, p.kv_head, dim), a.v.step, seen, dim, 1.0f, v);
    for (int64_t h = p.kv_head * a.group; h < (p.kv_head + 1) * a.group; h++)
        for (int64_t from = first; from < last; from += kQueries) {
            int64_t rows = least(kQueries, last - from);
            across<kStrip>(head<T>(a.q, p.query + from, h, dim), a.q.step, rows, dim, a.scale, q);
            zero(sums, kQueries * wide);
            for (int64_t r = 0; r < kQueries; r++) top[r] = kLeast, total[r] = 0;
            for (int64_t j = 0; j < seen; j += kKeys)
                for (int64_t r = 0; r < rows; r += kStrip) {
                    int64_t n = between(0, from + r + kStrip + ahead - j, least(kKeys, seen - j)), padded = round_up(n, kPanel);
                    if (n == 0) continue;
                    strip<false>(q + r * dim, 1, kStrip, k + j * dim, dim * kPanel, dim, scores, kKeys, padded);
                    for (int64_t i = r; i < r + kStrip; i++) {
                        float* s = scores + (i - r) * kKeys;
                        hide(s, between(0, from + i + 1 + ahead - j, n), padded);
                        float m = largest(s, padded), before = top[i];
                        top[i] = m > before ? m : before;
                        float shrink = exp(before - top[i]);
                        total[i] = total[i] * shrink + exponentials(s, top[i], padded);
                        if (shrink != 1.0f)
                            for (int64_t d = 0; d < wide; d += kLanes)
                                store(sums + i * wide + d, load(sums + i * wide + d) * shrink);
                    }
                    strip<true>(scores, kKeys, 1, v + j * kPanel, seen * kPanel, n, sums + r * wide, wide, wide);
                }
            for (int64_t r = 0; r < rows; r++) {
                int64_t at = (p.query + from + r) * a.heads + h;
                put(sums + r * wide, wide, 1, dim, 1.0f / total[r], out + at * dim, dim);
                lse[at] = top[r] + __builtin_logf(total[r]);
            }
        }
}

// The whole of a part
template <typename T>
void backward(const Attention& a, const Part& p, const Strided& dout, const T* out, const float* lse, T* dq, T* dk, T* dv,
              float* scratch) {
    int64_t dim = a.dim, wide = round_up(dim, kPanel), ahead = p.tk - p.tq, keys = round_up(p.tk, kPanel);
    int64_t sums = round_up(p.tk, kStrip) * wide;
    auto take = [&](int64_t n) { return (scratch += n) - n; };
    float *k = take(keys * dim), *v = take(keys * dim), *k_rows = take(p.tk * wide), *dk_sum = take(sums), *dv_sum = take(sums);
    float *q = take(kQueries * dim), *up = take(kQueries * dim), *q_rows = take(kQueries * wide), *up_rows = take(kQueries * wide);
    float *dq_sum = take(kQueries * wide), *prob = take(kQueries * kKeys), *grad = take(kQueries * kKeys), *delta = take(kQueries);
    across<kPanel>(head<T>(a.k, p.key, p.kv_head, dim), a.k.step, p.tk, dim, 1.0f, k);
    across<kPanel>(head<T>(a.v, p.key, p.kv_head, dim), a.v.step, p.tk, dim, 1.0f, v);
    along(head<T>(a.k, p.key, p.kv_head, dim), a.k.step, p.tk, dim, 1.0f, k_rows);
    zero(dk_sum, 2 * sums);
    for (int64_t h = p.kv_head * a.group; h < (p.kv_head + 1) * a.group; h++)
        for (int64_t from = 0; from < p.tq; from += kQueries) {
            int64_t rows = least(kQueries, p.tq - from), token = p.query + from, seen = least(p.tk, from + rows + ahead);
            const T *queries = head<T>(a.q, token, h, dim), *upstream = head<T>(dout, token, h, dim);
            const T* results = out + (token * a.heads + h) * dim;
            across<kStrip>(queries, a.q.step, rows, dim, a.scale, q);
            across<kStrip>(upstream, dout.step, rows, dim, 1.0f, up);
            along(queries, a.q.step, rows, dim, a.scale, q_rows);
            along(upstream, dout.step, rows, dim, 1.0f, up_rows);
            zero(dq_sum, kQueries * wide);
            for (int64_t r = 0; r < rows; r++) {  // delta = dout . out
                vf dot = {};
                for (int64_t d = 0; d < dim; d += kLanes) {
                    int64_t lanes = least(kLanes, dim - d);
                    dot += load(upstream + r * dout.step + d, lanes) * load(results + r * a.heads * dim + d, lanes);
                }
                delta[r] = sum(dot);
            }
            for (int64_t j = 0; j < seen; j += kKeys) {
                int64_t n = least(kKeys, seen - j), padded = round_up(n, kPanel), used = least(kKeys, round_up(n, kStrip));
                used = used > padded ? used : padded;
                for (int64_t r = 0; r < rows; r += kStrip) {
                    int64_t near = between(0, from + r + kStrip + ahead - j, n), computed = round_up(near, kPanel);
                    float *s = prob + r * kKeys, *g = grad + r * kKeys;
                    strip<false>(q + r * dim, 1, kStrip, k + j * dim, dim * kPanel, dim, s, kKeys, computed);
                    strip<false>(up + r * dim, 1, kStrip, v + j * dim, dim * kPanel, dim, g, kKeys, computed);
                    for (int64_t i = r; i < r + kStrip; i++, s += kKeys, g += kKeys) {
                        hide(s, i < rows ? between(0, from + i + 1 + ahead - j, near) : 0, computed);
                        exponentials(s, i < rows ? lse[(token + i) * a.heads + h] : 0.0f, computed);
                        for (int64_t c = 0; c < computed; c += kLanes)
                            store(g + c, load(s + c) * (load(g + c) - (i < rows ? delta[i] : 0.0f)));
                        zero(s + computed, used - computed);
                        zero(g + computed, used - computed);
                    }
                    strip<true>(grad + r * kKeys, kKeys, 1, k_rows + j * kPanel, p.tk * kPanel, near, dq_sum + r * wide, wide, wide);
                }
                for (int64_t c = 0; c < n; c += kStrip) {  // key j + c is seen from row r on
                    int64_t r = between(0, j + c - ahead - from, rows);
                    strip<true>(prob + r * kKeys + c, 1, kKeys, up_rows + r * kPanel, rows * kPanel, rows - r,
                                dv_sum + (j + c) * wide, wide, wide);
                    strip<true>(grad + r * kKeys + c, 1, kKeys, q_rows + r * kPanel, rows * kPanel, rows - r,
                                dk_sum + (j + c) * wide, wide, wide);
                }
            }
            put(dq_sum, wide, rows, dim, a.scale, dq + (token * a.heads + h) * dim, a.heads * dim);
        }
    int64_t kv_heads = a.heads / a.group, at = (p.key * kv_heads + p.kv_head) * dim;
    put(dk_sum, wide, p.tk, dim, 1.0f, dk + at, kv_heads * dim);
    put(dv_sum, wide, p.tk, dim, 1.0f, dv + at, kv_heads * dim);
}

}  // namespace

int64_t attention_scratch(const Attention& a, bool with_gradients) {
    int64_t keys = round_up(longest(a.keys, a.segments), kPanel) + kStrip, wide = round_up(a.dim, kPanel);
    return keys * wide * (with_gradients ? 5 : 2) + kQueries * ((with_gradients ? 5 * wide + 2 * kKeys : 2 * wide) + 2) +
           kStrip * kKeys;
}

void attention(bool is_bf16, const Attention& a, void* out, float* lse, float* scratch, int64_t scratch_size,
               [[maybe_unused]] int threads) {
    int64_t chunks = (longest(a.queries, a.segments) + kChunk - 1) / kChunk, parts = a.segments * (a.heads / a.group);
#pragma omp parallel num_threads(threads)
    {
        float* mine = scratch + thread_number() * scratch_size;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < chunks * parts; i++) {  // the last queries, which see the most keys, first
            Part p = part(a, i % parts / (a.heads / a.group), i % (a.heads / a.group));
            int64_t first = (chunks - 1 - i / parts) * kChunk, last = least(p.tq, first + kChunk);
            if (first >= last) continue;
            is_bf16 ? forward(a, p, first, last, (bf16*)out, lse, mine) : forward(a, p, first, last, (float*)out, lse, mine);
        }
    }
}

void attention_backward(bool is_bf16, const Attention& a, const Strided& dout, const void* out, const float* lse, void* dq,
                        void* dk, void* dv, float* scratch, int64_t scratch_size, [[maybe_unused]] int threads) {
    int64_t kv_heads = a.heads / a.group;
#pragma omp parallel num_threads(threads)
    {
        float* mine = scratch + thread_number() * scratch_size;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.segments * kv_heads; i++) {
            Part p = part(a, i / kv_heads, i % kv_heads);
            if (p.tk == 0) continue;
            auto run = [&]<typename T>(T) { backward(a, p, dout, (const T*)out, lse, (T*)dq, (T*)dk, (T*)dv, mine); };
            is_bf16 ? run(bf16{}) : run(float{});
        }
    }
}

}  // namespace fastlm::FASTLM_ISA
