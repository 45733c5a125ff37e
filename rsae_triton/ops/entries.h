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

// Four sums of LANES / 2 numbers each.
inline void four_sums(const float* a, const float* b, const float* p, const float* q, float* out) {
    constexpr int64_t EIGHT = 8;
    float part[4][EIGHT];
    for (int64_t k = 0; k < EIGHT; ++k) {
        part[0][k] = (a[k] + a[k + 16]) + (a[k + 8] + a[k + 24]);
        part[1][k] = (b[k] + b[k + 16]) + (b[k + 8] + b[k + 24]);
        part[2][k] = (p[k] + p[k + 16]) + (p[k + 8] + p[k + 24]);
        part[3][k] = (q[k] + q[k + 16]) + (q[k + 8] + q[k + 24]);
    }
    for (int64_t i = 0; i < 4; ++i) {
        const float* of = part[i];
        out[i] = ((of[0] + of[4]) + (of[2] + of[6])) + ((of[1] + of[5]) + (of[3] + of[7]));
    }
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
        four_sums(of_a, of_b, of_p, of_q, out + i);
        for (int64_t k = 0; k < 4; ++k) out[i + k] += rest[k];
    }
    for (; i < count; ++i) out[i] = dot(e, rows[i], d);
}

// out[c] += the sum over i of values[i] * rows[i][c], eight rows in one pass over out, always in the order they have.
inline void add_rows(const float* v, const float* const* r, int64_t count, int64_t d, float* __restrict out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8, v += 8, r += 8)
        for (int64_t c = 0; c < d; ++c)
            out[c] += ((v[0] * r[0][c] + v[1] * r[1][c]) + (v[2] * r[2][c] + v[3] * r[3][c])) +
                      ((v[4] * r[4][c] + v[5] * r[5][c]) + (v[6] * r[6][c] + v[7] * r[7][c]));
    for (; i + 2 <= count; i += 2, v += 2, r += 2)
        for (int64_t c = 0; c < d; ++c) out[c] += v[0] * r[0][c] + v[1] * r[1][c];
    for (; i < count; ++i, ++v, ++r)
        for (int64_t c = 0; c < d; ++c) out[c] += v[0] * r[0][c];
}

}  // namespace
