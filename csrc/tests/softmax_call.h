// A random softmax call with all its arrays, what of it is visible, and the definition as a plain double loop.
#ifndef ATTNKIT_TESTS_SOFTMAX_CALL_H
#define ATTNKIT_TESTS_SOFTMAX_CALL_H

#include "tests.h"

struct SoftmaxCall {
  attnkit_softmax s{};
  Layout q_at, k_at, v_at, o_at;
  Numbers q, k, v, o;
  std::vector<float> lse, bias, alibi, sink;
  std::vector<double> total;
  std::vector<int64_t> offsets, patterns;
  std::vector<int32_t> columns, pattern;
  std::vector<char> visible;             // (b, h, m, n)
  std::vector<double> true_o, true_lse;  // (b, h, m, e) and (b, h, m)

  SoftmaxCall(int64_t b, int64_t h, int64_t g, int64_t m, int64_t n, int64_t d, int64_t e, int32_t dtype)
      : q_at(b, h, m, d, true), k_at(b, g, n, d, true), v_at(b, g, n, e, true), o_at(b, h, m, e, false),
        q(q_at.count, dtype), k(k_at.count, dtype), v(v_at.count, dtype), o(o_at.count, dtype),
        lse(static_cast<size_t>(b * h * m)), visible(static_cast<size_t>(b * h * m * n), 1) {
    s.q = q.data(), s.k = k.data(), s.v = v.data(), s.o = o.data(), s.lse = lse.data();
    s.b = b, s.h = h, s.g = g, s.m = m, s.n = n, s.d = d, s.e = e;
    s.q_b = q_at.b, s.q_h = q_at.h, s.q_m = q_at.m;
    s.k_b = k_at.b, s.k_g = k_at.h, s.k_n = k_at.m;
    s.v_b = v_at.b, s.v_g = v_at.h, s.v_n = v_at.m;
    s.o_b = o_at.b, s.o_h = o_at.h, s.o_m = o_at.m;
    s.left = s.right = int64_t{1} << 62;
    s.mask_batches = s.mask_heads = 1;
    s.threads = 1 + below(3);
    s.dtype = dtype;
    s.scale = 0.25f;
  }

  void add_softcap_alibi_and_sink() {
    if (below(3) == 0) s.softcap = 2.0f;
    if (below(3) == 0) fill(alibi, s.h), s.alibi = alibi.data();
    if (below(3) == 0) fill(sink, s.h), s.sink = sink.data();
  }

  void add_features() {
    add_softcap_alibi_and_sink();
    if (below(3) == 0) {
      const bool keys = below(2), rows = below(2);
      fill(bias, s.b * s.h * (rows ? s.m : 1) * (keys ? s.n : 1));
      s.bias = bias.data();
      s.bias_n = keys;
      s.bias_m = rows ? (keys ? s.n : 1) : 0;
      s.bias_h = (rows ? s.m : 1) * (keys ? s.n : 1);
      s.bias_b = s.h * s.bias_h;
    }
    if (s.kernel == ATTNKIT_PREFILL && below(3) == 0) add_dropout();
    if (below(3) == 0 && s.m <= s.n) {
      // Far into a sequence, where float32 would be off by a thousandth.
      for (int64_t i = 0; i < s.b * s.h * s.n; ++i)
        total.push_back((i % s.n ? total.back() : -1e4) - 0.1 * (uniform() + 1.0));
      s.total = total.data(), s.total_b = s.h * s.n, s.total_h = s.n;
    }
    add_mask();
  }

  void add_dropout() {
    const int32_t limits[] = {1, 1 << 20, 5 << 20, 1 << 23, 3 << 22};
    s.drop_below = pick(limits);
    s.keep_scale = static_cast<float>(1.0 / (1.0 - s.drop_below * 0x1p-24));
    s.seed = below(int64_t{1} << 52) * (below(2) ? 2053 : -2053);
  }

  // What dropout multiplies a weight by. Its bits are chained as attnkit.noise says them.
  double chance(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!s.drop_below) return 1.0;
    uint64_t x = 0;
    for (const int64_t place : {s.seed, b, h, s.n - s.m + i, j}) {
      x = (x ^ static_cast<uint64_t>(place)) + 0x9e3779b97f4a7c15u;
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
      x ^= x >> 31;
    }
    return x >> 40 < static_cast<uint64_t>(s.drop_below) ? 0.0 : static_cast<double>(s.keep_scale);
  }

  void add_mask() {
    const int64_t kind = below(3);
    if (kind == 1) s.left = below(s.n + 1), s.right = below(3);
    if (kind == 2) add_blocks();
    for (int64_t i = 0; i < s.b * s.h * s.m * s.n; ++i) {
      const int64_t position = s.n - s.m + i / s.n % s.m, key = i % s.n;
      if (key < position - s.left || key > position + s.right) visible[i] = 0;
    }
  }

  void add_blocks() {
    s.mask_batches = below(2) ? s.b : 1;
    s.mask_heads = below(2) ? s.h : 1;
    const int64_t rows = (s.m + 47) / 48, blocks = (s.n + 63) / 64;
    std::fill(visible.begin(), visible.end(), 0);
    offsets.push_back(0);
    for (int64_t list = 0; list < s.mask_batches * s.mask_heads * rows; ++list) {
      const int64_t row = list % rows, head = list / rows % s.mask_heads, batch = list / rows / s.mask_heads;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t what = below(3);
        if (what == 0) continue;
        columns.push_back(static_cast<int32_t>(block));
        pattern.push_back(what == 1 ? -1 : static_cast<int32_t>(patterns.size() / 48));
        for (int64_t i = 0; i < 48; ++i) {
          uint64_t word = what == 1 ? ~uint64_t{0} : static_cast<uint64_t>(below(int64_t{1} << 40)) * 16777259u;
          for (int64_t j = 0; j < 64; ++j)
            if (row * 48 + i >= s.m || block * 64 + j >= s.n) word &= ~(uint64_t{1} << j);
          if (what == 2) patterns.push_back(static_cast<int64_t>(word));
          for (int64_t j = 0; j < 64; ++j)
            if (word >> j & 1) see(batch, head, row * 48 + i, block * 64 + j);
        }
      }
      offsets.push_back(static_cast<int64_t>(columns.size()));
    }
    s.offsets = offsets.data(), s.columns = columns.data();
    s.pattern = pattern.data(), s.patterns = patterns.data();
  }

  void see(int64_t batch, int64_t head, int64_t i, int64_t j) {
    for (int64_t b = s.mask_batches == 1 ? 0 : batch; b < (s.mask_batches == 1 ? s.b : batch + 1); ++b)
      for (int64_t h = s.mask_heads == 1 ? 0 : head; h < (s.mask_heads == 1 ? s.h : head + 1); ++h)
        visible[((b * s.h + h) * s.m + i) * s.n + j] = 1;
  }

  double logit(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const double* query = q.values.data() + b * s.q_b + h * s.q_h + i * s.q_m;
    const double* key = k.values.data() + b * s.k_b + h / (s.h / s.g) * s.k_g + j * s.k_n;
    double x = 0.0;
    for (int64_t c = 0; c < s.d; ++c) x += query[c] * key[c];
    x *= s.scale;
    if (s.softcap > 0) x = s.softcap * std::tanh(x / s.softcap);
    if (s.bias) x += bias[b * s.bias_b + h * s.bias_h + i * s.bias_m + j * s.bias_n];
    if (s.alibi) x -= alibi[h] * std::abs(static_cast<double>(s.n - s.m + i - j));
    if (s.total) x += total[(b * s.h + h) * s.n + s.n - s.m + i] - total[(b * s.h + h) * s.n + j];
    return x;
  }

  // What the definition says, in double precision.
  void define() {
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, g = h / (s.h / s.g);
      std::vector<double> weight(static_cast<size_t>(s.n), 0.0), sum(static_cast<size_t>(s.e), 0.0);
      double top = s.sink ? sink[h] : -INFINITY, sum_of_weights = 0.0;
      for (int64_t j = 0; j < s.n; ++j) {
        weight[j] = visible[row * s.n + j] ? logit(b, h, i, j) : -INFINITY;
        top = std::fmax(top, weight[j]);
      }
      if (s.sink) sum_of_weights += std::exp(sink[h] - top);
      for (int64_t j = 0; j < s.n; ++j) {
        if (weight[j] == -INFINITY) continue;
        const double p = std::exp(weight[j] - top);
        const double* value = v.values.data() + b * s.v_b + g * s.v_g + j * s.v_n;
        sum_of_weights += p;
        const double kept = p * chance(b, h, i, j);
        for (int64_t c = 0; c < s.e; ++c) sum[c] += kept * value[c];
      }
      for (int64_t c = 0; c < s.e; ++c) true_o.push_back(sum_of_weights > 0 ? sum[c] / sum_of_weights : 0.0);
      true_lse.push_back(sum_of_weights > 0 ? top + std::log(sum_of_weights) : -INFINITY);
    }
  }

  // Largest distance from the definition, over outputs and log-sum-exps; infinite if something else was written.
  double error() const {
    double worst = 0.0;
    const auto judge = [&](double got, double expected) {
      const double distance = got == expected ? 0.0 : std::fabs(got - expected);
      worst = distance <= worst ? worst : distance;  // a NaN stays
    };
    std::vector<char> written(static_cast<size_t>(o_at.count), 0);
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h;
      for (int64_t c = 0; c < s.e; ++c) {
        const int64_t at = b * s.o_b + h * s.o_h + i * s.o_m + c;
        judge(o.read(at, s.dtype), true_o[row * s.e + c]);
        written[at] = 1;
      }
      if (s.lse) judge(lse[row], true_lse[row]);
    }
    for (int64_t at = 0; at < o_at.count; ++at)
      if (!written[at] && !o.is_poison(at)) worst = INFINITY;
    return worst;
  }

 private:
  void fill(std::vector<float>& x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x.push_back(static_cast<float>(uniform() + 1.0));
  }
};

#endif
