// Dots with rows and sums of rows, which the loops over entries are made of.
#pragma once
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t LANES = 64;

inline float dot(const float* __restrict a, const float* __restrict b, int64_t d) {
    float lanes[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES)
        for (int64_t k = 0; k < LANES; ++k) lanes[k] += a[c + k] * b[c + k];
    float total = 0;
    for (; c < d; ++c) total += a[c] * b[c];
    for (int64_t width = LANES / 2; width > 0; width /= 2)
        for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    return total + lanes[0];
}

// out[i] = e . rows[i]; four rows in one pass over e.
inline void dots_with(const float* __restrict e, const float* const* rows, int64_t count, int64_t d, float* out) {
    constexpr int64_t HALF = LANES / 2;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *__restrict a = rows[i], *__restrict b = rows[i + 1];
        const float *__restrict p = rows[i + 2], *__restrict q = rows[i + 3];
        float of_a[HALF] = {}, of_b[HALF] = {}, of_p[HALF] = {}, of_q[HALF] = {};
        int64_t c = 0;
        for (; c + HALF <= d; c += HALF)
            for (int64_t k = 0; k < HALF; ++k) {
                const float by = e[c + k];
                of_a[k] += by * a[c + k];
                of_b[k] += by * b[c + k];
                of_p[k] += by * p[c + k];
                of_q[k] += by * q[c + k];
            }
        float rest[4] = {};
        for (; c < d; ++c) {
            rest[0] += e[c] * a[c];
            rest[1] += e[c] * b[c];
            rest[2] += e[c] * p[c];
            rest[3] += e[c] * q[c];
        }
        for (int64_t width = HALF / 2; width > 0; width /= 2)
            for (int64_t k = 0; k < width; ++k) {
                of_a[k] += of_a[k + width];
                of_b[k] += of_b[k + width];
                of_p[k] += of_p[k + width];
                of_q[k] += of_q[k + width];
            }
        out[i] = of_a[0] + rest[0];
        out[i + 1] = of_b[0] + rest[1];
        out[i + 2] = of_p[0] + rest[2];
        out[i + 3] = of_q[0] + rest[3];
    }
    for (; i < count; ++i) out[i] = dot(e, rows[i], d);
}

// A sum of multiples of rows, added up eight rows in one pass, always in the order they were taken.
class Sum {
  public:
    void take(float value, const float* row) {
        if (value == 0) return;
        values_.push_back(value);
        rows_.push_back(row);
    }

    // out[c] += the sum; then there is nothing left of it.
    void add_to(float* __restrict out, int64_t d) {
        const int64_t count = values_.size();
        const float* v = values_.data();
        const float* const* r = rows_.data();
        int64_t i = 0;
        for (; i + 8 <= count; i += 8, v += 8, r += 8)
            for (int64_t c = 0; c < d; ++c)
                out[c] += ((v[0] * r[0][c] + v[1] * r[1][c]) + (v[2] * r[2][c] + v[3] * r[3][c])) +
                          ((v[4] * r[4][c] + v[5] * r[5][c]) + (v[6] * r[6][c] + v[7] * r[7][c]));
        for (; i + 2 <= count; i += 2, v += 2, r += 2)
            for (int64_t c = 0; c < d; ++c) out[c] += v[0] * r[0][c] + v[1] * r[1][c];
        for (; i < count; ++i, ++v, ++r)
            for (int64_t c = 0; c < d; ++c) out[c] += v[0] * r[0][c];
        values_.clear();
        rows_.clear();
    }

  private:
    std::vector<float> values_;
    std::vector<const float*> rows_;
};

}  // namespace
