// Softmax attention over odd sizes, every feature, dtype and kernel, against a plain double loop.
#include "tests.h"

namespace {

struct Case {
  attnkit_softmax s{};
  Numbers q, k, v, o;
  std::vector<float> lse, bias, alibi, sink;
  std::vector<int64_t> offsets, patterns;
  std::vector<int32_t> columns, pattern;
  std::vector<char> visible;  // (b, h, m, n)

  Case(int64_t b, int64_t h, int64_t g, int64_t m, int64_t n, int64_t d, int64_t e, int32_t dtype)
      : q(b * h * m * d, dtype), k(b * g * n * d, dtype), v(b * g * n * e, dtype), o(b * h * m * e, dtype),
        lse(static_cast<size_t>(b * h * m)), visible(static_cast<size_t>(b * h * m * n), 1) {
    s.q = q.data(), s.k = k.data(), s.v = v.data(), s.o = o.data(), s.lse = lse.data();
    s.b = b, s.h = h, s.g = g, s.m = m, s.n = n, s.d = d, s.e = e;
    s.q_m = s.k_n = d, s.v_n = s.o_m = e;
    s.q_h = m * d, s.k_g = n * d, s.v_g = n * e, s.o_h = m * e;
    s.q_b = h * s.q_h, s.k_b = g * s.k_g, s.v_b = g * s.v_g, s.o_b = h * s.o_h;
    s.left = s.right = int64_t{1} << 62;
    s.mask_batches = s.mask_heads = 1;
    s.threads = 2;
    s.dtype = dtype;
    s.scale = 0.25f;
  }

  void add_features() {
    if (below(3) == 0) s.softcap = 2.0f;
    if (below(3) == 0) fill(alibi, s.h), s.alibi = alibi.data();
    if (below(3) == 0) fill(sink, s.h), s.sink = sink.data();
    if (below(3) == 0) {
      const bool keys = below(2), rows = below(2);
      fill(bias, s.b * s.h * (rows ? s.m : 1) * (keys ? s.n : 1));
      s.bias = bias.data();
      s.bias_n = keys;
      s.bias_m = rows ? (keys ? s.n : 1) : 0;
      s.bias_h = (rows ? s.m : 1) * (keys ? s.n : 1);
      s.bias_b = s.h * s.bias_h;
    }
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

  // Largest distance from the definition, over outputs and log-sum-exps.
  double error() const {
    double worst = 0.0;
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, kv = b * s.g + h / (s.h / s.g);
      std::vector<double> weight(static_cast<size_t>(s.n), 0.0), sum(static_cast<size_t>(s.e), 0.0);
      double top = s.sink ? sink[h] : -INFINITY, total = 0.0;
      for (int64_t j = 0; j < s.n; ++j) {
        double x = 0.0;
        for (int64_t c = 0; c < s.d; ++c) x += q.values[row * s.d + c] * k.values[(kv * s.n + j) * s.d + c];
        x *= s.scale;
        if (s.softcap > 0) x = s.softcap * std::tanh(x / s.softcap);
        if (s.bias) x += bias[b * s.bias_b + h * s.bias_h + i * s.bias_m + j * s.bias_n];
        if (s.alibi) x -= alibi[h] * std::abs(static_cast<double>(s.n - s.m + i - j));
        weight[j] = visible[row * s.n + j] ? x : -INFINITY;
        top = std::fmax(top, weight[j]);
      }
      if (s.sink) total += std::exp(sink[h] - top);
      for (int64_t j = 0; j < s.n; ++j) {
        if (weight[j] == -INFINITY) continue;
        const double p = std::exp(weight[j] - top);
        total += p;
        for (int64_t c = 0; c < s.e; ++c) sum[c] += p * v.values[(kv * s.n + j) * s.e + c];
      }
      for (int64_t c = 0; c < s.e; ++c)
        worst = std::fmax(worst, std::fabs(o.read(row * s.e + c, s.dtype) - (total > 0 ? sum[c] / total : 0.0)));
      if (total > 0) worst = std::fmax(worst, std::fabs(lse[row] - (top + std::log(total))));
      if (!(total > 0) && lse[row] != -INFINITY) worst = INFINITY;
    }
    return worst;
  }

 private:
  void fill(std::vector<float>& x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x.push_back(static_cast<float>(uniform() + 1.0));
  }
};

void run_softmax(int64_t rounds) {
  const int64_t sizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 59, 63, 64, 65, 100, 111, 130, 257, 300};
  const int64_t few[] = {1, 2, 3, 5, 9, 33, 48}, heads[] = {1, 2, 3, 5};
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t b = 1 + below(2), g = 1 + below(2), h = g * pick(heads);
    const int64_t n = pick(sizes), d = pick(sizes), e = pick(sizes);
    const int32_t kernel = static_cast<int32_t>(below(2)), dtype = static_cast<int32_t>(below(3));
    Case c(b, h, g, kernel == ATTNKIT_DECODE ? pick(few) : pick(sizes), n, d, e, dtype);
    c.s.kernel = kernel;
    c.add_features();
    for (const int32_t level : levels()) {
      attnkit_set_level(level);
      const Scratch scratch(attnkit_softmax_forward_scratch_bytes(&c.s));
      const int32_t status = attnkit_softmax_forward(&c.s, scratch.data(), scratch.bytes());
      const double error = status == ATTNKIT_OK ? c.error() : INFINITY;
      count_call();
      if (!(error < allowed(dtype)))
        fail("softmax round %d level %s kernel %d dtype %d m %d n %d d %d e %d: status %d, error %g", int(round),
             attnkit_level_name(level), kernel, dtype, int(c.s.m), int(n), int(d), int(e), status, error);
    }
  }
}

const Family family("softmax", run_softmax);

}  // namespace
