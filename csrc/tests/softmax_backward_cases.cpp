// Gradients of softmax attention over odd sizes, every feature and dtype, against a plain double loop over stored o and lse.
#include "softmax_call.h"

namespace {

const int64_t sizes[] = {1, 2, 3, 7, 16, 17, 31, 33, 47, 48, 49, 64, 65, 97, 130, 193, 257}, heads[] = {1, 2, 3};

struct Case : SoftmaxCall {
  attnkit_softmax_gradients g{};
  Layout d_o_at;
  Numbers d_o, d_q, d_k, d_v;
  std::vector<float> rest, d_lse, d_bias, d_sink, d_alibi;
  std::vector<double> d_total;

  Case(int64_t b, int64_t h, int64_t kv, int64_t m, int64_t n, int64_t d, int64_t e, int32_t dtype)
      : SoftmaxCall(b, h, kv, m, n, d, e, dtype), d_o_at(b, h, m, e, true), d_o(d_o_at.count, dtype),
        d_q(b * h * m * d, dtype), d_k(b * kv * n * d, dtype), d_v(b * kv * n * e, dtype) {
    s.scale = 0.1f;
    add_features();
    g.d_o = d_o.data(), g.d_o_b = d_o_at.b, g.d_o_h = d_o_at.h, g.d_o_m = d_o_at.m;
    g.d_q_h = m * d, g.d_k_g = n * d, g.d_v_g = n * e;
    if (below(8)) g.d_q = d_q.data();
    if (below(8)) g.d_k = d_k.data();
    if (below(8)) g.d_v = d_v.data();
    if (below(2)) rest.resize(lse.size()), s.lse_rest = rest.data();
    if (below(2)) {
      for (size_t i = 0; i < lse.size(); ++i) d_lse.push_back(static_cast<float>(uniform()));
      g.d_lse = d_lse.data();
    }
    if (s.sink && below(4)) d_sink.resize(sink.size()), g.d_sink = d_sink.data();
    if (s.alibi && below(4)) d_alibi.resize(alibi.size()), g.d_alibi = d_alibi.data();
    if (s.total && below(4)) d_total.resize(total.size()), g.d_total = d_total.data();
    if (s.bias && below(4)) {
      if (below(2)) s.bias_b = 0;  // shared by all batches
      if (below(2)) s.bias_h = 0;
      d_bias.resize(bias.size()), g.d_bias = d_bias.data();
      g.d_bias_b = s.bias_b, g.d_bias_h = s.bias_h, g.d_bias_m = s.bias_m, g.d_bias_n = s.bias_n;
    }
  }

  void poison() {
    for (float& x : d_bias) x = 0.0f;  // which is added to
    for (float& x : d_sink) x = NAN;
    for (float& x : d_alibi) x = NAN;
    for (double& x : d_total) x = NAN;
    d_q.poison(), d_k.poison(), d_v.poison();
  }

  int32_t run() {
    poison();
    Scratch first(attnkit_softmax_forward_scratch_bytes(&s));
    const int32_t status = attnkit_softmax_forward(&s, first.data(), first.bytes());
    if (status != ATTNKIT_OK) return status;
    const int64_t needed = attnkit_softmax_backward_scratch_bytes(&s, &g);
    Scratch second(needed < 0 ? 0 : needed);
    return attnkit_softmax_backward(&s, &g, second.data(), second.bytes());
  }

  // Largest distance from the definition, relative to the largest gradient of its tensor or 1,
  // for slopes of ALiBi to the size of what is added up.
  double error() const {
    std::vector<double> t_q(d_q.values.size()), t_k(d_k.values.size()), t_v(d_v.values.size());
    std::vector<double> t_bias(d_bias.size()), t_sink(d_sink.size()), t_alibi(d_alibi.size()), t_total(d_total.size());
    double size_of_alibi = 0.0;
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, kv = h / (s.h / s.g);
      if (lse[row] == -INFINITY) continue;
      const double end = lse[row] + (rest.empty() ? 0.0 : static_cast<double>(rest[row]));
      const double* query = &q.values[b * s.q_b + h * s.q_h + i * s.q_m];
      const double* slopes = &d_o.values[b * g.d_o_b + h * g.d_o_h + i * g.d_o_m];
      double delta = d_lse.empty() ? 0.0 : -d_lse[row];
      // Of sums over rows that all but cancel, the rounding of a stored result would be most: the kernel sums it up again.
      // So it does for a row of one key and no sink, whose slope is then exactly 0.
      int64_t keys = 0;
      for (int64_t j = 0; j < s.n; ++j) keys += visible[row * s.n + j];
      const bool anew = (keys == 1 && !s.sink) || g.d_alibi || (s.dtype == 0 && g.d_bias && g.d_bias_n);
      for (int64_t c = 0; c < s.e && !anew; ++c)
        delta += o.read(b * s.o_b + h * s.o_h + i * s.o_m + c, s.dtype) * slopes[c];
      for (int64_t j = 0; j < s.n && anew; ++j) {
        if (!visible[row * s.n + j]) continue;
        const double p = std::exp(logit(b, h, i, j) - end);
        for (int64_t c = 0; c < s.e; ++c)
          delta += p * chance(b, h, i, j) * slopes[c] * v.values[b * s.v_b + kv * s.v_g + j * s.v_n + c];
      }
      double far = 0.0;
      const double sunk = s.sink ? std::exp(sink[h] - end) * delta : 0.0;
      if (g.d_sink) t_sink[h] -= sunk;
      const int64_t bias_at = b * s.bias_b + h * s.bias_h + i * s.bias_m;
      // One number for all keys moves the log-sum-exp, and weights only against the sink's.
      if (g.d_bias && s.bias_n == 0) t_bias[bias_at] += sunk + (d_lse.empty() ? 0.0 : d_lse[row]);
      for (int64_t j = 0; j < s.n; ++j) {
        if (!visible[row * s.n + j]) continue;
        const double* key = &k.values[b * s.k_b + kv * s.k_g + j * s.k_n];
        const double* value = &v.values[b * s.v_b + kv * s.v_g + j * s.v_n];
        const double kept = chance(b, h, i, j);
        double x = 0.0, slope = -delta, cap = 1.0;
        for (int64_t c = 0; c < s.d; ++c) x += query[c] * key[c];
        for (int64_t c = 0; c < s.e; ++c) slope += kept * slopes[c] * value[c];
        x *= s.scale;
        if (s.softcap > 0) {
          const double t = std::tanh(x / s.softcap);
          x = s.softcap * t, cap = 1.0 - t * t;
        }
        if (s.bias) x += bias[bias_at + j * s.bias_n];
        if (s.alibi) x -= alibi[h] * std::abs(static_cast<double>(s.n - s.m + i - j));
        const int64_t own = (b * s.h + h) * s.n + s.n - s.m + i, gate = (b * s.h + h) * s.n + j;
        if (s.total) x += total[own] - total[gate];
        const double p = std::exp(x - end);
        const double terms = p * (std::fabs(slope + delta) + std::fabs(delta));
        slope *= p;
        if (g.d_bias && s.bias_n) t_bias[bias_at + j] += slope;
        const double distance = std::abs(static_cast<double>(s.n - s.m + i - j));
        if (g.d_alibi) t_alibi[h] -= slope * distance, far += terms * distance;
        if (g.d_total) t_total[own] += slope, t_total[gate] -= slope;
        slope *= cap * s.scale;
        const int64_t key_at = (b * s.g + kv) * s.n + j;
        for (int64_t c = 0; c < s.e; ++c) t_v[key_at * s.e + c] += p * kept * slopes[c];
        for (int64_t c = 0; c < s.d; ++c) {
          t_k[key_at * s.d + c] += slope * query[c];
          t_q[row * s.d + c] += slope * key[c];
        }
      }
      // Rows are rounded each for itself, to the size of what is subtracted in them.
      size_of_alibi = std::hypot(size_of_alibi, far);
    }
    double worst = 0.0;
    const auto compare = [&](const std::vector<double>& wanted, const auto& read, double size = 1.0) {
      double far = 0.0;
      for (size_t i = 0; i < wanted.size(); ++i) {
        const double distance = std::fabs(read(static_cast<int64_t>(i)) - wanted[i]);
        size = std::fmax(size, std::fabs(wanted[i]));
        far = distance >= 0.0 ? std::fmax(far, distance) : INFINITY;
      }
      worst = std::fmax(worst, far / size);
    };
    const auto judge = [&](const void* asked_for, const Numbers& got, const std::vector<double>& wanted) {
      if (asked_for) return compare(wanted, [&](int64_t i) { return got.read(i, s.dtype); });
      for (size_t i = 0; i < wanted.size(); ++i)
        if (!got.is_poison(static_cast<int64_t>(i))) worst = INFINITY;
    };
    judge(g.d_q, d_q, t_q), judge(g.d_k, d_k, t_k), judge(g.d_v, d_v, t_v);
    compare(t_bias, [&](int64_t i) { return static_cast<double>(d_bias[i]); });
    compare(t_alibi, [&](int64_t i) { return static_cast<double>(d_alibi[i]); }, std::fmax(1.0, size_of_alibi));
    compare(t_sink, [&](int64_t i) { return static_cast<double>(d_sink[i]); });
    compare(t_total, [&](int64_t i) { return d_total[i]; });
    return worst;
  }
};

Case random_case() {
  const int64_t kv = 1 + below(2), h = kv * pick(heads), b = below(30) ? 1 + below(2) : 0;
  const int64_t m = below(30) ? pick(sizes) : 0, n = below(30) ? pick(sizes) : 0;
  return Case(b, h, kv, m, n, pick(sizes), pick(sizes), static_cast<int32_t>(below(3)));
}

void test_answer() {
  Case c = random_case();
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    const int32_t status = c.run();
    const double error = status == ATTNKIT_OK ? c.error() : INFINITY;
    count_call();
    // Dropout enlarges a stored result, and so its rounding, which slopes of rows with one key are left with or are not.
    if (!(error < allowed(c.s.dtype) * (c.s.drop_below ? 2.0f * c.s.keep_scale : 1.0f)))
      fail("softmax_backward level %s dtype %d b %d h %d g %d m %d n %d d %d e %d%s%s%s%s%s: status %d, error %g",
           attnkit_level_name(level), int(c.s.dtype), int(c.s.b), int(c.s.h), int(c.s.g), int(c.s.m), int(c.s.n),
           int(c.s.d), int(c.s.e), c.s.bias ? " bias" : "", c.s.sink ? " sink" : "", c.s.alibi ? " alibi" : "",
           c.s.drop_below ? " dropout" : "", c.s.offsets ? " blocks" : "", status, error);
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  Case c = random_case();
  attnkit_softmax& s = c.s;
  attnkit_softmax_gradients& g = c.g;
  if (s.b == 0 || s.m == 0) return;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const number[] = {&s.b,   &s.h,   &s.g,   &s.m,   &s.n,   &s.d,   &s.e,     &s.threads, &s.q_b,  &s.q_h, &s.q_m,
                             &s.k_b, &s.k_g, &s.k_n, &s.v_b, &s.v_g, &s.v_n, &s.o_b,   &s.o_h,     &s.o_m,  &g.d_o_b,
                             &g.d_o_h, &g.d_o_m};
  int64_t* const of_bias[] = {&g.d_bias_b, &g.d_bias_h, &g.d_bias_m, &g.d_bias_n};
  const int64_t what = below(7), needed = attnkit_softmax_backward_scratch_bytes(&s, &g);
  int64_t short_of = 0, shift = 0;
  int32_t expected = ATTNKIT_BAD_SIZE;
  if (what == 0) *pick(number) = pick(absurd);
  if (what == 1) {
    if (!g.d_bias) return;
    *pick(of_bias) = pick(absurd);
  }
  if (what == 2) s.dtype = below(2) ? 3 : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 3 && below(2)) s.lse = nullptr;
  else if (what == 3) g.d_o = nullptr;
  if (what == 4) {
    if (needed < 64) return;
    below(2) ? short_of = 1 + below(needed) : shift = 1 + below(63);
    expected = ATTNKIT_SMALL_SCRATCH;
  }
  if (what == 5) {
    if (c.columns.empty()) return;
    c.columns[below(static_cast<int64_t>(c.columns.size()))] = below(2) ? -1 : INT32_MAX;
    expected = ATTNKIT_BAD_MASK;
  }
  if (what == 6) {
    if (!s.total || !g.d_total || !g.d_q) return;
    const int64_t gates = below(3);
    if (gates == 0) s.total_h = pick(absurd);
    if (gates == 1) s.total = nullptr;
    if (gates == 2) g.d_q_h = s.m * s.d - 1;
  }
  const Scratch scratch(needed - short_of + shift);
  c.poison();
  const int32_t status = attnkit_softmax_backward(&s, &g, scratch.data() + shift, scratch.bytes() - shift);
  count_call();
  if (status != expected) fail("softmax_backward refusal %d: status %d, expected %d", int(what), status, expected);
  for (const Numbers* x : {&c.d_q, &c.d_k, &c.d_v})
    for (size_t i = 0; i < x->values.size(); ++i)
      if (!x->is_poison(static_cast<int64_t>(i))) return fail("softmax_backward refusal %d: something was written", int(what));
}

void run_softmax_backward(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
  }
}

const Family family("softmax_backward", run_softmax_backward);

}  // namespace
