// A round's search and the correction after it, token by token (search.py): the rows of W_dec that a token needs are
// read from far away once and used up to four times. Formulas are those of `search.py`'s `_forward` and `_backward`.
#include "entries.h"

#include <algorithm>
#include <cstring>

namespace {

// The entries of one token: which they are, their rows, and the same of those that are open.
struct Token {
    std::vector<int64_t> all, open;
    std::vector<const float*> rows, open_rows;
    std::vector<float> dots;

    void take(const int64_t* order, int64_t count, const int64_t* features, const uint8_t* opened, const float* W,
              int64_t d) {
        all.assign(order, order + count);
        open.clear();
        rows.clear();
        open_rows.clear();
        for (const int64_t e : all) {
            rows.push_back(W + features[e] * d);
            if (!opened[e]) continue;
            open.push_back(e);
            open_rows.push_back(rows.back());
        }
        dots.resize(all.size());
    }

    // dots = g . the row of every entry, or of every open one.
    void dot_all(const float* g, int64_t d) { dots_with(g, rows.data(), rows.size(), d, dots.data()); }
    void dot_open(const float* g, int64_t d) { dots_with(g, open_rows.data(), open.size(), d, dots.data()); }
};

}  // namespace

extern "C" {

// Entries in the order of their tokens: order [count], starts [n_tokens + 1] of zeros.
void by_token(const int64_t* tokens, int64_t count, int64_t n_tokens, int64_t* order, int64_t* starts) {
    for (int64_t e = 0; e < count; ++e) ++starts[tokens[e] + 1];
    for (int64_t t = 0; t < n_tokens; ++t) starts[t + 1] += starts[t];
    std::vector<int64_t> next(starts, starts + n_tokens);
    for (int64_t e = 0; e < count; ++e) order[next[tokens[e]]++] = e;
}

// Tokens from to to - 1. y, c are [n_entries], c of zeros; e, m, after [n_tokens, d]; alpha [n_tokens]; raw [n_entries]
// or null where no correction is asked for.
void search(const float* r, const float* W, int64_t d, const int64_t* starts, const int64_t* order,
            const int64_t* features, const float* z, const uint8_t* opened, const float* weight, float epsilon, float* y,
            float* c, float* e, float* m, float* after, float* alpha, float* raw, int64_t from, int64_t to) {
    Token token;
    Sum sum;
    for (int64_t t = from; t < to; ++t) {
        token.take(order + starts[t], starts[t + 1] - starts[t], features, opened, W, d);
        float *own_e = e + t * d, *own_m = m + t * d, *own_after = after + t * d;
        const int64_t open = token.open.size();
        for (int64_t i = 0; i < open; ++i) sum.take(-z[token.open[i]], token.open_rows[i]);
        std::memcpy(own_e, r + t * d, d * sizeof(float));
        sum.add_to(own_e, d);
        token.dot_open(own_e, d);
        for (int64_t i = 0; i < open; ++i) {
            const int64_t at = token.open[i];
            c[at] = token.dots[i];
            sum.take(weight[at] * token.dots[i], token.open_rows[i]);
        }
        std::memset(own_m, 0, d * sizeof(float));
        sum.add_to(own_m, d);
        const float far = dot(own_m, own_e, d) / (epsilon + dot(own_m, own_m, d));
        alpha[t] = far;
        for (int64_t k = 0; k < d; ++k) own_after[k] = own_e[k] - far * own_m[k];
        for (const int64_t at : token.all) y[at] = z[at];
        for (const int64_t at : token.open) y[at] = z[at] + far * weight[at] * c[at];
        if (!raw) continue;
        token.dot_all(own_after, d);
        for (size_t i = 0; i < token.all.size(); ++i) raw[token.all[i]] = token.dots[i];
    }
}

// dafter [n_tokens, d] and draw [n_entries] may be null: zeros. dz, dweight, dc are [n_entries], the last two of zeros;
// de, dm [n_tokens, d]; depsilon [n_tokens].
void search_back(const float* W, int64_t d, const int64_t* starts, const int64_t* order, const int64_t* features,
                 const uint8_t* opened, const float* weight, const float* c, const float* e, const float* m,
                 const float* alpha, float epsilon, const float* dy, const float* dafter, const float* draw, float* dz,
                 float* dweight, float* dc, float* de, float* dm, float* depsilon, int64_t from, int64_t to) {
    Token token;
    Sum sum;
    for (int64_t t = from; t < to; ++t) {
        token.take(order + starts[t], starts[t + 1] - starts[t], features, opened, W, d);
        const float *own_e = e + t * d, *own_m = m + t * d, far = alpha[t];
        float *own_de = de + t * d, *own_dm = dm + t * d;
        const int64_t open = token.open.size();
        if (dafter)
            std::memcpy(own_de, dafter + t * d, d * sizeof(float));
        else
            std::memset(own_de, 0, d * sizeof(float));
        if (draw) {
            for (size_t i = 0; i < token.all.size(); ++i) sum.take(draw[token.all[i]], token.rows[i]);
            sum.add_to(own_de, d);
        }
        float dfar = -dot(own_de, own_m, d);
        for (const int64_t at : token.open) dfar += dy[at] * weight[at] * c[at];
        const float dtop = dfar / (epsilon + dot(own_m, own_m, d)), dbelow = -far * dtop;
        depsilon[t] = dbelow;
        for (int64_t k = 0; k < d; ++k) {
            own_dm[k] = dtop * own_e[k] + 2 * dbelow * own_m[k] - far * own_de[k];
            own_de[k] += dtop * own_m[k];
        }
        token.dot_open(own_dm, d);
        for (int64_t i = 0; i < open; ++i) {
            const int64_t at = token.open[i];
            const float dg = far * dy[at] + token.dots[i];
            dweight[at] = dg * c[at];
            dc[at] = dg * weight[at];
            sum.take(dc[at], token.open_rows[i]);
        }
        sum.add_to(own_de, d);
        token.dot_all(own_de, d);
        for (size_t i = 0; i < token.all.size(); ++i) dz[token.all[i]] = dy[token.all[i]] - token.dots[i];
    }
}

}  // extern "C"
