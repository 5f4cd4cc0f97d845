// Gradients of softmax attention over odd sizes, every feature and dtype, against a plain double loop over stored o and lse.
#include "tests.h"

namespace {

// Contiguous tensors: what differs between layouts is tried on the forward pass, whose checks and packing these share.
struct Case {
  attnkit_softmax s{};
  attnkit_softmax_gradients g{};
  Numbers q, k, v, o, d_o, d_q, d_k, d_v;
  std::vector<float> lse, d_lse, bias, sink, d_bias, d_sink;

  Case(int64_t b, int64_t h, int64_t kv, int64_t m, int64_t n, int64_t d, int64_t e, int32_t dtype)
      : q(b * h * m * d, dtype), k(b * kv * n * d, dtype), v(b * kv * n * e, dtype), o(b * h * m * e, dtype),
        d_o(b * h * m * e, dtype), d_q(b * h * m * d, dtype), d_k(b * kv * n * d, dtype), d_v(b * kv * n * e, dtype),
        lse(static_cast<size_t>(b * h * m)) {
    s.q = q.data(), s.k = k.data(), s.v = v.data(), s.o = o.data(), s.lse = lse.data();
    s.b = b, s.h = h, s.g = kv, s.m = m, s.n = n, s.d = d, s.e = e;
    s.q_m = s.k_n = d, s.v_n = s.o_m = e;
    s.q_h = m * d, s.k_g = n * d, s.v_g = n * e, s.o_h = m * e;
    s.q_b = h * s.q_h, s.k_b = kv * s.k_g, s.v_b = kv * s.v_g, s.o_b = h * s.o_h;
    s.left = s.right = int64_t{1} << 62;
    s.mask_batches = s.mask_heads = 1;
    s.threads = 1 + below(3);
    s.dtype = dtype;
    s.scale = 0.1f;
    g.d_o = d_o.data(), g.d_o_b = s.o_b, g.d_o_h = s.o_h, g.d_o_m = s.o_m;
    g.d_q = d_q.data(), g.d_k = d_k.data(), g.d_v = d_v.data();
    if (below(2)) fill(d_lse, b * h * m), g.d_lse = d_lse.data();
    if (below(3) == 0) s.softcap = 2.0f;
    if (below(3) == 0) fill(sink, h), s.sink = sink.data(), d_sink.resize(static_cast<size_t>(h)), g.d_sink = d_sink.data();
    if (below(3) == 0) {  // shared by all batches
      fill(bias, h * m * n), s.bias = bias.data(), d_bias.resize(bias.size()), g.d_bias = d_bias.data();
      s.bias_h = g.d_bias_h = m * n, s.bias_m = g.d_bias_m = n, s.bias_n = g.d_bias_n = 1;
    }
    if (below(2)) s.left = below(n + 1), s.right = below(3);
  }

  bool run() {
    for (float& x : d_bias) x = 0.0f;
    d_q.poison(), d_k.poison(), d_v.poison();
    Scratch first(attnkit_softmax_forward_scratch_bytes(&s));
    if (attnkit_softmax_forward(&s, first.data(), first.bytes()) != ATTNKIT_OK) return false;
    Scratch second(attnkit_softmax_backward_scratch_bytes(&s, &g));
    return attnkit_softmax_backward(&s, &g, second.data(), second.bytes()) == ATTNKIT_OK;
  }

  // Largest distance from the definition, relative to the largest gradient of its tensor or 1.
  double error() const {
    std::vector<double> t_q(q.values.size()), t_k(k.values.size()), t_v(v.values.size()), t_bias(bias.size()), t_sink(sink.size());
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, kv = row / s.m / s.h * s.g + h / (s.h / s.g);
      const double end = lse[row];
      double delta = d_lse.empty() ? 0.0 : -d_lse[row];
      for (int64_t c = 0; c < s.e; ++c) delta += o.read(row * s.e + c, s.dtype) * d_o.values[row * s.e + c];
      if (s.sink) t_sink[h] -= std::exp(sink[h] - end) * delta;
      for (int64_t j = 0; j < s.n; ++j) {
        const int64_t position = s.n - s.m + i;
        if (j < position - s.left || j > position + s.right) continue;
        double x = 0.0, slope = -delta, cap = 1.0;
        for (int64_t c = 0; c < s.d; ++c) x += q.values[row * s.d + c] * k.values[(kv * s.n + j) * s.d + c];
        for (int64_t c = 0; c < s.e; ++c) slope += d_o.values[row * s.e + c] * v.values[(kv * s.n + j) * s.e + c];
        x *= s.scale;
        if (s.softcap > 0) {
          const double t = std::tanh(x / s.softcap);
          x = s.softcap * t, cap = 1.0 - t * t;
        }
        const int64_t at = (h * s.m + i) * s.n + j;
        if (s.bias) x += bias[at];
        const double p = std::exp(x - end);
        slope *= p;
        if (s.bias) t_bias[at] += slope;
        slope *= cap * s.scale;
        for (int64_t c = 0; c < s.e; ++c) t_v[(kv * s.n + j) * s.e + c] += p * d_o.values[row * s.e + c];
        for (int64_t c = 0; c < s.d; ++c) {
          t_q[row * s.d + c] += slope * k.values[(kv * s.n + j) * s.d + c];
          t_k[(kv * s.n + j) * s.d + c] += slope * q.values[row * s.d + c];
        }
      }
    }
    double worst = 0.0;
    const auto compare = [&](const std::vector<double>& wanted, auto read) {
      double size = 1.0, far = 0.0;
      for (size_t i = 0; i < wanted.size(); ++i) {
        const double distance = std::fabs(read(static_cast<int64_t>(i)) - wanted[i]);
        size = std::fmax(size, std::fabs(wanted[i]));
        far = distance >= 0.0 ? std::fmax(far, distance) : INFINITY;
      }
      worst = std::fmax(worst, far / size);
    };
    compare(t_q, [&](int64_t i) { return d_q.read(i, s.dtype); });
    compare(t_k, [&](int64_t i) { return d_k.read(i, s.dtype); });
    compare(t_v, [&](int64_t i) { return d_v.read(i, s.dtype); });
    compare(t_bias, [&](int64_t i) { return static_cast<double>(d_bias[i]); });
    compare(t_sink, [&](int64_t i) { return static_cast<double>(d_sink[i]); });
    return worst;
  }

 private:
  static void fill(std::vector<float>& x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x.push_back(static_cast<float>(uniform()));
  }
};

void run_softmax_backward(int64_t rounds) {
  const int64_t sizes[] = {1, 2, 3, 7, 16, 17, 31, 33, 47, 48, 49, 64, 65, 97, 130, 193, 257}, heads[] = {1, 2, 3};
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t kv = 1 + below(2), b = 1 + below(2);
    Case c(b, kv * pick(heads), kv, pick(sizes), pick(sizes), pick(sizes), pick(sizes), static_cast<int32_t>(below(3)));
    for (const int32_t level : levels()) {
      attnkit_set_level(level);
      const double error = c.run() ? c.error() : INFINITY;
      count_call();
      if (!(error < allowed(c.s.dtype)))
        fail("softmax_backward round %d level %s dtype %d b %d h %d g %d m %d n %d d %d e %d: error %g", int(round),
             attnkit_level_name(level), int(c.s.dtype), int(c.s.b), int(c.s.h), int(c.s.g), int(c.s.m), int(c.s.n),
             int(c.s.d), int(c.s.e), error);
    }
  }
}

const Family family("softmax_backward", run_softmax_backward);

}  // namespace
