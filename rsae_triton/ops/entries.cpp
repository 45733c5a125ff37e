// Loops over the entries of a sparse code (entries.py), compiled for the machine at hand by native.py. Each call works
// on one thread and on its own part of the output, in a fixed order: results do not depend on the number of threads.
// Numbers are float32, indices int64, matrices row-major. A comparison is written so that NaN counts as an entry.
#include "entries.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// LANES numbers as float32, or fewer at the end of a row. The whole run has a length the compiler knows.
inline const float* wide(const float* from, float*, int64_t) { return from; }
inline const float* wide(const uint16_t* from, float* into, int64_t count) {  // bfloat16: the upper half of a float32
    uint32_t bits[LANES];
    if (count == LANES)
        for (int64_t k = 0; k < LANES; ++k) bits[k] = uint32_t(from[k]) << 16;
    else
        for (int64_t k = 0; k < count; ++k) bits[k] = uint32_t(from[k]) << 16;
    std::memcpy(into, bits, count * sizeof(float));
    return into;
}

// Whether test(k) for any k below count.
template <class Test>
inline bool any_of(int64_t count, Test test) {
    int any = 0;
    if (count == LANES)
        for (int64_t k = 0; k < LANES; ++k) any |= test(k);
    else
        for (int64_t k = 0; k < count; ++k) any |= test(k);
    return any;
}

template <class Number>
int64_t find(const Number* h, int64_t rows, int64_t n, int64_t stride, const float* bias, const float* low, int64_t first,
             int64_t* tokens, int64_t* features, float* values, int64_t* counts, int64_t capacity) {
    float buffer[LANES];
    int64_t found = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const Number* row = h + r * stride;
        const float shift = bias[r], edge = low[r];
        const int64_t before = found;
        for (int64_t j = 0; j < n; j += LANES) {
            const int64_t count = std::min(n - j, LANES);
            const float* part = wide(row + j, buffer, count);
            if (!any_of(count, [=](int64_t k) { return !(part[k] + shift <= edge); })) continue;
            for (int64_t k = 0; k < count; ++k) {
                const float value = part[k] + shift;
                if (value <= edge) continue;
                if (found < capacity) {
                    tokens[found] = j + k;
                    features[found] = first + r;
                    values[found] = value;
                }
                ++found;
            }
        }
        counts[r] = found - before;
    }
    return found;
}

// A float32's bits to the nearest bfloat16's, ties to even; NaN stays NaN.
inline uint16_t narrow(uint32_t bits) {
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

inline float length(const float* a, int64_t d) { return std::sqrt(dot(a, a, d)); }

}  // namespace

extern "C" {

// h [rows, n] of features first, first + 1, ... without bias -> the entries with not (h + bias <= low), by feature and
// token. Returns how many there are; those beyond `capacity` are counted, not written.
int64_t find_float(const float* h, int64_t rows, int64_t n, int64_t stride, const float* bias, const float* low,
                   int64_t first, int64_t* tokens, int64_t* features, float* values, int64_t* counts, int64_t capacity) {
    return find(h, rows, n, stride, bias, low, first, tokens, features, values, counts, capacity);
}
int64_t find_bfloat16(const uint16_t* h, int64_t rows, int64_t n, int64_t stride, const float* bias, const float* low,
                      int64_t first, int64_t* tokens, int64_t* features, float* values, int64_t* counts,
                      int64_t capacity) {
    return find(h, rows, n, stride, bias, low, first, tokens, features, values, counts, capacity);
}

// out[token, from:to] += value * W[feature, from:to], entry by entry; out [n_tokens, d].
void decode(const float* values, const int64_t* tokens, const int64_t* features, int64_t count, const float* W, int64_t d,
            float* out, int64_t from, int64_t to) {
    for (int64_t e = 0; e < count; ++e) {
        const float value = values[e];
        if (value == 0) continue;
        const float* __restrict w = W + features[e] * d;
        float* __restrict o = out + tokens[e] * d;
        for (int64_t c = from; c < to; ++c) o[c] += value * w[c];
    }
}

// out[e] = g[token] . W[feature] for entries from, from + 1, ..., to - 1.
void dots(const float* g, const int64_t* tokens, const int64_t* features, const float* W, int64_t d, float* out,
          int64_t from, int64_t to) {
    for (int64_t e = from; e < to; ++e) out[e] = dot(g + tokens[e] * d, W + features[e] * d, d);
}

// out[f] (+)= the sum over the terms i and the entries of f of values[i][e] * g[i][token], features from to to - 1.
void rows(int64_t terms, const float* const* values, const float* const* g, const int64_t* tokens,
          const int64_t* offsets, int64_t d, float* out, int64_t add, int64_t from, int64_t to) {
    std::vector<float> of;
    std::vector<const float*> at;
    for (int64_t f = from; f < to; ++f) {
        const int64_t room = terms * (offsets[f + 1] - offsets[f]);
        if (int64_t(of.size()) < room) {
            of.resize(room);
            at.resize(room);
        }
        int64_t count = 0;
        for (int64_t e = offsets[f]; e < offsets[f + 1]; ++e)
            for (int64_t i = 0; i < terms; ++i) {
                of[count] = values[i][e];
                at[count] = g[i] + tokens[e] * d;
                count += of[count] != 0;
            }
        float* o = out + f * d;
        if (!add) std::memset(o, 0, d * sizeof(float));
        add_rows(of.data(), at.data(), count, d, o);
    }
}

// Of tokens from to to - 1, the k largest of h [rows, n] + bias above the floor of each token so far. The heaps
// [n, k] keep values and features, each token's smallest first; the caller starts them at the least value that may be
// kept, with feature -1. Of equal values the first feature stays. Returns whether there was a NaN.
int64_t top_k(const float* h, int64_t rows, int64_t n, int64_t stride, const float* bias, int64_t first, int64_t k,
              float* floor, float* values, int64_t* features, int64_t from, int64_t to) {
    int bad = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = h + r * stride;
        const float shift = bias[r];
        for (int64_t j = from; j < to; j += LANES) {
            const int64_t count = std::min(to - j, LANES);
            if (!any_of(count, [=](int64_t i) { return !(row[j + i] + shift <= floor[j + i]); })) continue;
            for (int64_t i = j; i < j + count; ++i) {
                const float value = row[i] + shift;
                if (value <= floor[i]) continue;
                if (value != value) {
                    bad = 1;
                    continue;
                }
                float* heap = values + i * k;
                int64_t* of = features + i * k;
                int64_t at = 0;
                for (;;) {  // down from the root
                    int64_t child = 2 * at + 1;
                    if (child >= k) break;
                    // Of equal values the later feature leaves first.
                    const auto less = [&](int64_t a, int64_t b) {
                        return heap[a] < heap[b] || (heap[a] == heap[b] && of[a] > of[b]);
                    };
                    if (child + 1 < k && less(child + 1, child)) ++child;
                    if (heap[child] >= value) break;
                    heap[at] = heap[child];
                    of[at] = of[child];
                    at = child;
                }
                heap[at] = value;
                of[at] = first + r;
                floor[i] = heap[0];
            }
        }
    }
    return bad;
}

// Rows [rows, d] rounded to bfloat16, with the length of each rounded row and of what rounding took from it.
void round_rows(const float* W, int64_t rows, int64_t d, uint16_t* out, float* lengths, float* errors) {
    std::vector<float> near(d), off(d);
    std::vector<uint32_t> bits(d);
    for (int64_t r = 0; r < rows; ++r) {
        const float* __restrict w = W + r * d;
        uint16_t* __restrict o = out + r * d;
        uint32_t* __restrict b = bits.data();
        std::memcpy(b, w, d * sizeof(float));
        for (int64_t c = 0; c < d; ++c) {
            o[c] = narrow(b[c]);
            b[c] = uint32_t(o[c]) << 16;
        }
        std::memcpy(near.data(), b, d * sizeof(float));
        for (int64_t c = 0; c < d; ++c) off[c] = w[c] - near[c];
        lengths[r] = length(near.data(), d);
        errors[r] = length(off.data(), d);
    }
}

// As find_float, from a product in bfloat16, h [rows, n], which is off by margin[r] * lengths[token] at most before it
// was rounded: h of the candidates is made again from x [n, d] and W [rows, d]. *candidates is raised by their number.
int64_t screen(const uint16_t* h, int64_t rows, int64_t n, int64_t stride, const float* bias, const float* low,
               const float* margin, const float* lengths, const float* x, const float* W, int64_t d, int64_t first,
               int64_t* tokens, int64_t* features, float* values, int64_t* counts, int64_t capacity,
               int64_t* candidates) {
    float buffer[LANES];
    int64_t found = 0, tried = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* row = h + r * stride;
        const float shift = bias[r], edge = low[r], off = margin[r] * (1 + 1.0f / 128);
        const float base = edge - shift, least = base - std::fabs(base) / 256 - std::fabs(shift) * 1e-6f;
        const int64_t before = found;
        for (int64_t j = 0; j < n; j += LANES) {
            const int64_t count = std::min(n - j, LANES);
            const float *part = wide(row + j, buffer, count), *at = lengths + j;
            if (!any_of(count, [=](int64_t k) { return !(part[k] + off * at[k] < least); })) continue;
            for (int64_t k = 0; k < count; ++k) {
                if (part[k] + off * at[k] < least) continue;
                ++tried;
                const float value = dot(x + (j + k) * d, W + r * d, d) + shift;
                if (value <= edge) continue;
                if (found < capacity) {
                    tokens[found] = j + k;
                    features[found] = first + r;
                    values[found] = value;
                }
                ++found;
            }
        }
        counts[r] = found - before;
    }
    *candidates += tried;
    return found;
}

// The squared length of each gradient row, after its part along the row of W is gone if W is given.
void gradient_rows(float* g, const float* W, int64_t d, float* squares, int64_t from, int64_t to) {
    for (int64_t f = from; f < to; ++f) {
        float* __restrict own = g + f * d;
        if (W) {
            const float* __restrict w = W + f * d;
            const float along = dot(own, w, d) / std::fmax(dot(w, w, d), 1e-12f);
            for (int64_t c = 0; c < d; ++c) own[c] -= along * w[c];
        }
        squares[f] = dot(own, own, d);
    }
}

// Adam on rows from to to - 1, gradients multiplied by `scale`, weights by 1 - decay first; then each row gets the length
// in `norms`, if they are given. step = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t).
void adam_rows(float* weight, const float* gradient, float* first, float* second, const float* norms, int64_t d,
               float scale, float decay, float step, float root, float beta1, float beta2, float eps, int64_t from,
               int64_t to) {
    for (int64_t f = from; f < to; ++f) {
        float* __restrict w = weight + f * d;
        const float* __restrict g = gradient + f * d;
        float* __restrict m = first + f * d;
        float* __restrict v = second + f * d;
        for (int64_t c = 0; c < d; ++c) {
            const float slope = g[c] * scale;
            m[c] += (1 - beta1) * (slope - m[c]);
            v[c] = beta2 * v[c] + (1 - beta2) * slope * slope;
            w[c] = w[c] * (1 - decay) - step * m[c] / (std::sqrt(v[c]) * root + eps);
        }
        if (norms) {
            const float by = norms[f] / std::fmax(length(w, d), 1e-12f);
            for (int64_t c = 0; c < d; ++c) w[c] *= by;
        }
    }
}

}  // extern "C"
