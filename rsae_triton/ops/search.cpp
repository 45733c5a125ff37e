// A round's search and the correction after it, token by token (search.py): the rows of W_dec that a token needs are
// read from far away once and used up to four times. Formulas are those of `search.py`'s `_plain` and `_plain_back`.
#include "entries.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

using Numbers = std::vector<float>;

// Entries first to last - 1 in the order of their tokens. What belongs to entries is brought into that order in one
// pass before the work and back in one after it, so that the work itself jumps between rows of W_dec alone.
class Ordered {
  public:
    Ordered(const int64_t* order, int64_t first, int64_t last) : order_(order + first), count_(last - first) {}

    int64_t count() const { return count_; }

    template <class Number, class As = Number>
    std::vector<As> taken(const Number* values) const {
        std::vector<As> found(count_);
        for (int64_t i = 0; i < count_; ++i) found[i] = As(values[order_[i]]);
        return found;
    }

    void put(const Numbers& values, float* out) const {
        for (int64_t i = 0; i < count_; ++i) out[order_[i]] = values[i];
    }

  private:
    const int64_t* order_;
    int64_t count_;
};

// The rows of one token's entries, and which of them are open.
struct Token {
    std::vector<const float*> rows, open_rows;
    std::vector<int64_t> open;
    Numbers dots, by;
    int64_t count, opened;

    void take(const int64_t* features, const uint8_t* is_open, int64_t entries, const float* W, int64_t d) {
        if (int64_t(rows.size()) < entries) {
            rows.resize(entries);
            open_rows.resize(entries);
            open.resize(entries);
            dots.resize(entries);
            by.resize(entries);
        }
        count = entries;
        opened = 0;
        for (int64_t i = 0; i < entries; ++i) {
            open_rows[opened] = rows[i] = W + features[i] * d;
            open[opened] = i;
            opened += is_open[i] != 0;
        }
    }

    void dot_all(const float* g, int64_t d) { dots_with(g, rows.data(), count, d, dots.data()); }
    void add_open(float* out, int64_t d) { add_rows(by.data(), open_rows.data(), opened, d, out); }

    // For every open entry i: by[i] = weigh(i, dots[i]), where dots = g . its row; then out += by[i] * its row, eight
    // rows at a time, while they are in the nearest cache.
    template <class Weigh>
    void dot_and_add(const float* g, float* out, int64_t d, Weigh weigh) {
        for (int64_t i = 0; i < opened; i += 8) {
            const int64_t some = std::min<int64_t>(8, opened - i);
            dots_with(g, open_rows.data() + i, some, d, dots.data() + i);
            for (int64_t k = i; k < i + some; ++k) by[k] = weigh(k, dots[k]);
            add_rows(by.data() + i, open_rows.data() + i, some, d, out);
        }
    }
};

inline void horner(const float* s, const float* of, int64_t degree, float* value, float* slope) {
    for (int64_t k = 0; k < LANES; ++k) value[k] = of[degree], slope[k] = 0;
    for (int64_t i = degree - 1; i >= 0; --i)
        for (int64_t k = 0; k < LANES; ++k) {
            slope[k] = slope[k] * s[k] + value[k];
            value[k] = value[k] * s[k] + of[i];
        }
}

}  // namespace

extern "C" {

// Entries in the order of their tokens: order [count], starts [n_tokens + 1] of zeros.
void by_token(const int64_t* tokens, int64_t count, int64_t n_tokens, int64_t* order, int64_t* starts) {
    for (int64_t e = 0; e < count; ++e) ++starts[tokens[e] + 1];
    for (int64_t t = 0; t < n_tokens; ++t) starts[t + 1] += starts[t];
    std::vector<int64_t> next(starts, starts + n_tokens);
    for (int64_t e = 0; e < count; ++e) order[next[tokens[e]]++] = e;
}

// r of h [count] with coefficients a [p + 1] and b [q + 1], the first of b zero, and dr/dh, zero outside the ramp.
void ramp(const float* h, const float* theta, const float* a, int64_t p, const float* b, int64_t q, float centre,
          float scale, float* r, float* slope, int64_t from, int64_t to) {
    float t[LANES], s[LANES], top[LANES], dtop[LANES], below[LANES], dbelow[LANES];
    for (int64_t e = from; e < to; e += LANES) {
        const int64_t count = std::min(to - e, LANES);
        for (int64_t k = 0; k < LANES; ++k) t[k] = k < count ? (h[e + k] - theta[e + k]) / scale : 0;
        for (int64_t k = 0; k < LANES; ++k) s[k] = (t[k] < -1 ? -1 : t[k] > 1 ? 1 : t[k]) - centre;
        horner(s, a, p, top, dtop);
        horner(s, b, q, below, dbelow);
        for (int64_t k = 0; k < LANES; ++k) {
            const float sign = below[k] > 0 ? 1 : below[k] < 0 ? -1 : 0, under = 1 + std::fabs(below[k]);
            top[k] /= under;
            dtop[k] = std::fabs(t[k]) <= 1 ? (dtop[k] - top[k] * sign * dbelow[k]) / under / scale : 0;
        }
        std::memcpy(r + e, top, count * sizeof(float));
        std::memcpy(slope + e, dtop, count * sizeof(float));
    }
}

// Tokens from to to - 1. y, c [n_entries]; e, m, after [n_tokens, d]; alpha [n_tokens]; raw [n_entries] or null where no
// correction is asked for.
void search(const float* r, const float* W, int64_t d, const int64_t* starts, const int64_t* order,
            const int64_t* features, const float* z, const uint8_t* opened, const float* weight, float epsilon, float* y,
            float* c, float* e, float* m, float* after, float* alpha, float* raw, int64_t from, int64_t to) {
    const int64_t first = starts[from];
    const Ordered own(order, first, starts[to]);
    const auto of = own.taken(features);
    const auto is_open = own.taken(opened);
    const Numbers by = own.taken(weight);
    Numbers own_y = own.taken(z), own_c(own.count()), own_raw(raw ? own.count() : 0);
    Token token;
    for (int64_t t = from; t < to; ++t) {
        const int64_t at = starts[t] - first, count = starts[t + 1] - starts[t];
        token.take(of.data() + at, is_open.data() + at, count, W, d);
        float *own_e = e + t * d, *own_m = m + t * d, *own_after = after + t * d, *value = own_y.data() + at;
        for (int64_t i = 0; i < token.opened; ++i) token.by[i] = -value[token.open[i]];
        std::memcpy(own_e, r + t * d, d * sizeof(float));
        token.add_open(own_e, d);
        std::memset(own_m, 0, d * sizeof(float));
        token.dot_and_add(own_e, own_m, d, [&](int64_t i, float found) {
            own_c[at + token.open[i]] = found;
            return by[at + token.open[i]] * found;
        });
        const float far = dot(own_m, own_e, d) / (epsilon + dot(own_m, own_m, d));
        alpha[t] = far;
        for (int64_t k = 0; k < d; ++k) own_after[k] = own_e[k] - far * own_m[k];
        for (int64_t i = 0; i < token.opened; ++i) value[token.open[i]] += far * token.by[i];
        if (!raw) continue;
        dots_with(own_after, token.rows.data(), count, d, own_raw.data() + at);
    }
    own.put(own_y, y);
    own.put(own_c, c);
    if (raw) own.put(own_raw, raw);
}

// dafter [n_tokens, d] and draw [n_entries] may be null: zeros. dz, dweight, dc [n_entries]; de, dm [n_tokens, d];
// depsilon [n_tokens].
void search_back(const float* W, int64_t d, const int64_t* starts, const int64_t* order, const int64_t* features,
                 const uint8_t* opened, const float* weight, const float* c, const float* e, const float* m,
                 const float* alpha, float epsilon, const float* dy, const float* dafter, const float* draw, float* dz,
                 float* dweight, float* dc, float* de, float* dm, float* depsilon, int64_t from, int64_t to) {
    const int64_t first = starts[from];
    const Ordered own(order, first, starts[to]);
    const auto of = own.taken(features);
    const auto is_open = own.taken(opened);
    const Numbers by = own.taken(weight), own_c = own.taken(c), own_draw = draw ? own.taken(draw) : Numbers();
    Numbers own_dz = own.taken(dy), own_dweight(own.count()), own_dc(own.count());
    Token token;
    for (int64_t t = from; t < to; ++t) {
        const int64_t at = starts[t] - first, count = starts[t + 1] - starts[t];
        token.take(of.data() + at, is_open.data() + at, count, W, d);
        const float *own_e = e + t * d, *own_m = m + t * d, far = alpha[t];
        float *own_de = de + t * d, *own_dm = dm + t * d, *value = own_dz.data() + at;
        if (dafter)
            std::memcpy(own_de, dafter + t * d, d * sizeof(float));
        else
            std::memset(own_de, 0, d * sizeof(float));
        if (draw) add_rows(own_draw.data() + at, token.rows.data(), count, d, own_de);
        float dfar = -dot(own_de, own_m, d);
        for (int64_t i = 0; i < token.opened; ++i) {
            const int64_t k = at + token.open[i];
            dfar += value[token.open[i]] * by[k] * own_c[k];
        }
        const float dtop = dfar / (epsilon + dot(own_m, own_m, d)), dbelow = -far * dtop;
        depsilon[t] = dbelow;
        for (int64_t k = 0; k < d; ++k) {
            own_dm[k] = dtop * own_e[k] + 2 * dbelow * own_m[k] - far * own_de[k];
            own_de[k] += dtop * own_m[k];
        }
        token.dot_and_add(own_dm, own_de, d, [&](int64_t i, float found) {
            const int64_t k = at + token.open[i];
            const float dg = far * value[token.open[i]] + found;
            own_dweight[k] = dg * own_c[k];
            return own_dc[k] = dg * by[k];
        });
        token.dot_all(own_de, d);
        for (int64_t i = 0; i < count; ++i) value[i] -= token.dots[i];
    }
    own.put(own_dz, dz);
    own.put(own_dweight, dweight);
    own.put(own_dc, dc);
}

}  // extern "C"
