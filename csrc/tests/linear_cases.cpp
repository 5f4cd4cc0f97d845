// The linear family over odd sizes, layouts, decays, maps and means, with and without the delta rule: results, states and
// all gradients against the recurrence, token by token in double.
#include "tests.h"

namespace {

const int64_t lengths[] = {1, 1, 2, 5, 31, 32, 33, 64, 95, 130, 257, 300}, sizes[] = {1, 2, 3, 7, 16, 17, 33, 40};
const int64_t groups[] = {1, 1, 2, 3};

double* at(std::vector<double>& x, int64_t i) { return &x[static_cast<size_t>(i)]; }

// A tensor that a call writes: numbers of its dtype, or of float32, with the truth beside them.
struct Result {
  const char* name;
  Numbers stored;
  std::vector<double> truth;
  int32_t dtype;
  Result(const char* its_name, int64_t count, int32_t its_dtype)
      : name(its_name), stored(count, its_dtype), truth(static_cast<size_t>(count), 0.0), dtype(its_dtype) {
    stored.poison();
  }
  // Largest distance from the truth, relative to its largest number; where the truth is NaN, so has the result to be.
  double error() const {
    double worst = 0.0, size = 1.0;
    for (const double x : truth) size = std::fmax(size, std::fabs(x));
    for (size_t i = 0; i < truth.size(); ++i) {
      const double x = stored.read(static_cast<int64_t>(i), dtype);
      if (std::isnan(x) && std::isnan(truth[i])) continue;
      const double distance = std::fabs(x - truth[i]) / size;
      worst = distance <= worst ? worst : distance;  // a NaN stays
    }
    return worst;
  }
};

struct Case {
  attnkit_linear s{};
  int64_t columns, channels;
  Layout q_at, k_at, v_at, decay_at, beta_at;
  Numbers q, k, v, d_o;
  std::vector<float> decay, beta, state, d_last, states, total;
  std::vector<uint8_t> keep;
  std::vector<int64_t> lawful, true_lawful;
  Result o, last, dq, dk, dv, d_decay, d_beta, d_state;

  Case(int64_t b, int64_t h, int64_t states_, int64_t k_heads, int64_t v_heads, int64_t m, int64_t n, int64_t d, int64_t e,
       int32_t kind, bool delta, bool means, int32_t dtype)
      : columns(e + means), channels(kind == ATTNKIT_DECAY_CHANNEL ? d : kind == ATTNKIT_DECAY_TOKEN),
        q_at(b, h, m, d, true), k_at(b, k_heads, n, d, true), v_at(b, v_heads, n, e, true),
        decay_at(b, states_, n, channels, true), beta_at(b, states_, n, 1, !delta), q(q_at.count, dtype),
        k(k_at.count, dtype), v(v_at.count, dtype), d_o(b * h * m * e, dtype), o("o", b * h * m * e, dtype),
        last("last", b * states_ * d * columns, ATTNKIT_FLOAT32), dq("dq", b * h * m * d, dtype),
        dk("dk", b * states_ * n * d, dtype), dv("dv", b * states_ * n * e, dtype),
        d_decay("d_decay", b * states_ * n * channels, ATTNKIT_FLOAT32),
        d_beta("d_beta", delta * b * states_ * n, ATTNKIT_FLOAT32),
        d_state("d_state", b * states_ * d * columns, ATTNKIT_FLOAT32) {
    s.b = b, s.h = h, s.s = states_, s.k_heads = k_heads, s.v_heads = v_heads, s.m = m, s.n = n, s.d = d, s.e = e;
    s.q = q.data(), s.k = k.data(), s.v = v.data(), s.o = o.stored.data(), s.d_o = d_o.data();
    s.q_b = q_at.b, s.q_h = q_at.h, s.q_m = q_at.m;
    s.k_b = k_at.b, s.k_h = k_at.h, s.k_n = k_at.m;
    s.v_b = v_at.b, s.v_h = v_at.h, s.v_n = v_at.m;
    s.threads = 1 + below(3), s.dtype = dtype, s.decay_kind = kind, s.scale = means ? 1.0f : 0.25f;
    for (int64_t i = 0; i < decay_at.count; ++i)
      decay.push_back(below(40) ? static_cast<float>(uniform() - 1.0) / 4.0f : below(2) ? 0.0f : -INFINITY);
    if (kind != ATTNKIT_DECAY_NONE) {
      s.decay = decay.data(), s.decay_b = decay_at.b, s.decay_s = decay_at.h, s.decay_n = decay_at.m;
      s.d_decay = static_cast<float*>(d_decay.stored.data());
    }
    for (int64_t i = 0; i < b * states_ * d * columns; ++i) state.push_back(static_cast<float>(uniform()));
    for (int64_t i = 0; i < b * states_ * d * columns; ++i) d_last.push_back(static_cast<float>(uniform()));
    if (below(2)) s.state = state.data();
    if (below(2)) s.d_last = d_last.data();
    if (delta) add_rule();
    s.last = static_cast<float*>(last.stored.data()), s.d_state = static_cast<float*>(d_state.stored.data());
    states.resize(static_cast<size_t>(b * states_ * ((n + ATTNKIT_LINEAR_SPAN - 1) / ATTNKIT_LINEAR_SPAN) * d * columns));
    s.states = states.data();
    total.resize(static_cast<size_t>(b * h * m + 1));  // also where there are no queries, it says that results are means
    if (means) s.total = total.data();
    s.dq = dq.stored.data(), s.dk = dk.stored.data(), s.dv = dv.stored.data();
  }

  std::vector<Result*> results() { return {&o, &last, &dq, &dk, &dv, &d_decay, &d_beta, &d_state}; }

  int64_t key(int64_t b, int64_t i, int64_t t) const { return b * s.k_b + i / (s.s / s.k_heads) * s.k_h + t * s.k_n; }
  int64_t value(int64_t b, int64_t i, int64_t t) const { return b * s.v_b + i / (s.s / s.v_heads) * s.v_h + t * s.v_n; }

  // Strengths that make each token a step of the delta rule, but for one now and then.
  void add_rule() {
    beta.resize(static_cast<size_t>(beta_at.count));
    s.beta_b = beta_at.b, s.beta_s = beta_at.h, s.beta_n = beta_at.m;
    for (int64_t b = 0; b < s.b; ++b)
      for (int64_t i = 0; i < s.s; ++i) {
        int64_t bad = below(4) ? s.n : below(s.n);
        for (int64_t t = 0; t < s.n; ++t) {
          double square = 0.0;
          for (int64_t c = 0; c < s.d; ++c) square += std::pow(k.values[static_cast<size_t>(key(b, i, t) + c)], 2);
          if (t == bad && square == 0.0) bad = s.n;  // nothing is written, whatever the strength
          const double strength = t == bad ? -0.5 : 0.9 * (uniform() + 1.0);
          beta[static_cast<size_t>(b * s.beta_b + i * s.beta_s + t * s.beta_n)] =
              static_cast<float>(strength / std::fmax(square, 1e-3));
        }
        true_lawful.push_back(bad);
      }
    lawful.resize(true_lawful.size());
    s.beta = beta.data(), s.lawful = lawful.data(), s.d_beta = static_cast<float*>(d_beta.stored.data());
  }

  double mapped(double x) const {
    if (s.map == ATTNKIT_MAP_ELU) return x > 0.0 ? x + 1.0 : std::exp(std::fmax(x, -32.0));
    return s.map == ATTNKIT_MAP_RELU ? std::fmax(x, 0.0) : x;
  }
  double slope(double x) const {
    if (s.map == ATTNKIT_MAP_ELU) return x > 0.0 ? 1.0 : std::exp(x);
    return s.map == ATTNKIT_MAP_RELU ? x > 0.0 : 1.0;
  }
  bool hidden(int64_t b, int64_t t) const { return s.keep && !s.keep[b * s.n + t]; }
  double left(int64_t b, int64_t i, int64_t t, int64_t c) const {
    if (!s.decay || hidden(b, t)) return 1.0;
    return std::exp(static_cast<double>(s.decay[b * s.decay_b + i * s.decay_s + t * s.decay_n + (channels > 1 ? c : 0)]));
  }

  void define() {
    for (int64_t unit = 0; unit < s.b * s.s; ++unit) define_state(unit / s.s, unit % s.s);
  }

  // One state, forwards with every state kept, and backwards through them.
  void define_state(int64_t b, int64_t i) {
    const int64_t unit = b * s.s + i, size = s.d * columns, counted = s.beta ? true_lawful[static_cast<size_t>(unit)] : s.n;
    const int64_t heads = s.h / s.s, past = s.n - s.m;
    std::vector<double> kept(static_cast<size_t>((counted + 1) * size), 0.0), us(static_cast<size_t>(s.n * columns));
    std::vector<double> rs(us.size()), keys(static_cast<size_t>(s.n * s.d), 0.0);
    std::vector<double> ds(static_cast<size_t>(size), 0.0), du(static_cast<size_t>(columns));
    for (int64_t x = 0; s.state && x < size; ++x) kept[static_cast<size_t>(x)] = s.state[unit * size + x];
    for (int64_t t = 0; t < counted; ++t) {
      const double* before = at(kept, t * size);
      double *after = at(kept, (t + 1) * size), *u = at(us, t * columns), *r = at(rs, t * columns), *x = at(keys, t * s.d);
      const double strength = s.beta ? s.beta[b * s.beta_b + i * s.beta_s + t * s.beta_n] : 1.0;
      for (int64_t c = 0; c < s.d && !hidden(b, t); ++c) x[c] = mapped(k.values[static_cast<size_t>(key(b, i, t) + c)]);
      for (int64_t j = 0; j < columns; ++j) {
        r[j] = hidden(b, t) ? 0.0 : j < s.e ? v.values[static_cast<size_t>(value(b, i, t) + j)] : 1.0;
        for (int64_t c = 0; s.beta && c < s.d; ++c) r[j] -= x[c] * left(b, i, t, c) * before[c * columns + j];
        u[j] = strength * r[j];
        for (int64_t c = 0; c < s.d; ++c) after[c * columns + j] = left(b, i, t, c) * before[c * columns + j] + x[c] * u[j];
      }
      for (int64_t h = i * heads; t >= past && h < (i + 1) * heads; ++h) answer(b, h, t - past, after);
    }
    for (int64_t x = 0; x < size; ++x) {
      *at(last.truth, unit * size + x) = counted < s.n ? NAN : *at(kept, counted * size + x);
      if (s.d_last && counted == s.n) ds[static_cast<size_t>(x)] = s.d_last[unit * size + x];
    }
    for (int64_t row = counted; row < s.n; ++row)
      for (int64_t h = i * heads; h < (i + 1) * heads; ++h)
        for (int64_t j = 0; j < s.e; ++j) *at(o.truth, ((b * s.h + h) * s.m + row) * s.e + j) = NAN;
    for (int64_t t = counted - 1; t >= 0; --t) {
      for (int64_t h = i * heads; t >= past && h < (i + 1) * heads; ++h) ask(b, h, t - past, at(kept, (t + 1) * size), ds);
      if (hidden(b, t)) continue;
      const double *before = at(kept, t * size), *u = at(us, t * columns), *r = at(rs, t * columns), *x = at(keys, t * s.d);
      const double strength = s.beta ? s.beta[b * s.beta_b + i * s.beta_s + t * s.beta_n] : 1.0;
      const int64_t token = unit * s.n + t;
      std::vector<double> slopes(static_cast<size_t>(s.d), 0.0);
      for (int64_t j = 0; j < columns; ++j) {
        du[static_cast<size_t>(j)] = 0.0;
        for (int64_t c = 0; c < s.d; ++c) {
          du[static_cast<size_t>(j)] += ds[static_cast<size_t>(c * columns + j)] * x[c];
          slopes[static_cast<size_t>(c)] += ds[static_cast<size_t>(c * columns + j)] * u[j];
        }
        if (s.beta) *at(d_beta.truth, token) += du[static_cast<size_t>(j)] * r[j];
        if (j < s.e) *at(dv.truth, token * s.e + j) = strength * du[static_cast<size_t>(j)];
      }
      for (int64_t c = 0; c < s.d; ++c) {
        for (int64_t j = 0; j < columns; ++j) {
          const double fades = left(b, i, t, c) * before[c * columns + j], dr = strength * du[static_cast<size_t>(j)];
          double& to = ds[static_cast<size_t>(c * columns + j)];
          if (s.beta) slopes[static_cast<size_t>(c)] -= fades * dr, to -= x[c] * dr;
          if (channels) *at(d_decay.truth, token * channels + (channels > 1 ? c : 0)) += fades * to;
          to *= left(b, i, t, c);
        }
        *at(dk.truth, token * s.d + c) =
            slopes[static_cast<size_t>(c)] * slope(k.values[static_cast<size_t>(key(b, i, t) + c)]);
      }
    }
    for (int64_t x = 0; x < size; ++x) *at(d_state.truth, unit * size + x) = ds[static_cast<size_t>(x)];
  }

  // What the query of a row makes of the state after its token: its sum of weights last, where results are means.
  std::vector<double> sums(int64_t b, int64_t h, int64_t row, const double* state) const {
    std::vector<double> found(static_cast<size_t>(columns), 0.0);
    for (int64_t c = 0; c < s.d; ++c)
      for (int64_t j = 0; j < columns; ++j)
        found[static_cast<size_t>(j)] += query(b, h, row, c) * state[c * columns + j] * s.scale;
    return found;
  }
  double query(int64_t b, int64_t h, int64_t row, int64_t c) const {
    return mapped(q.values[static_cast<size_t>(b * s.q_b + h * s.q_h + row * s.q_m + c)]);
  }
  static double divisor(double sum) { return sum == 0.0 ? 1.0 : sum; }

  void answer(int64_t b, int64_t h, int64_t row, const double* state) {
    const std::vector<double> found = sums(b, h, row, state);
    for (int64_t j = 0; j < s.e; ++j)
      *at(o.truth, ((b * s.h + h) * s.m + row) * s.e + j) =
          found[static_cast<size_t>(j)] / (s.total ? divisor(found.back()) : 1.0);
  }

  void ask(int64_t b, int64_t h, int64_t row, const double* state, std::vector<double>& ds) {
    const std::vector<double> found = sums(b, h, row, state);
    std::vector<double> slopes(static_cast<size_t>(columns), 0.0);
    const int64_t place = (b * s.h + h) * s.m + row;
    for (int64_t j = 0; j < s.e; ++j) {
      const double d = d_o.values[static_cast<size_t>(place * s.e + j)] / (s.total ? divisor(found.back()) : 1.0);
      slopes[static_cast<size_t>(j)] = d;
      if (s.total && found.back() != 0.0) slopes.back() -= d * found[static_cast<size_t>(j)] / found.back();
    }
    for (int64_t c = 0; c < s.d; ++c) {
      double d = 0.0;
      for (int64_t j = 0; j < columns; ++j) {
        d += state[c * columns + j] * slopes[static_cast<size_t>(j)] * s.scale;
        ds[static_cast<size_t>(c * columns + j)] += query(b, h, row, c) * slopes[static_cast<size_t>(j)] * s.scale;
      }
      *at(dq.truth, place * s.d + c) = d * slope(q.values[static_cast<size_t>(b * s.q_b + h * s.q_h + row * s.q_m + c)]);
    }
  }
};

Case random_case() {
  const bool delta = below(2), means = !delta && below(2);
  const int64_t k_heads = 1 + below(2), states = k_heads * pick(groups), h = states * (below(3) ? 1 : 2);
  const int64_t n = below(30) ? pick(lengths) : 0, m = delta || below(2) ? n : below(n + 1);
  Case c(1 + below(2), h, states, k_heads, below(2) ? states : 1, m, n, pick(sizes), pick(sizes),
         static_cast<int32_t>(below(3)), delta, means, static_cast<int32_t>(below(3)));
  if (means) c.s.map = below(2) ? ATTNKIT_MAP_ELU : ATTNKIT_MAP_RELU;
  if (!delta && below(2)) {
    for (int64_t i = 0; i < c.s.b * n; ++i) c.keep.push_back(below(4) != 0);
    c.s.keep = c.keep.data();
  }
  return c;
}

int32_t run(int64_t (*bytes)(const attnkit_linear*), int32_t (*call)(const attnkit_linear*, void*, int64_t),
            const attnkit_linear& s) {
  const int64_t needed = bytes(&s);
  const Scratch scratch(needed < 0 ? 0 : needed);
  return call(&s, scratch.data(), scratch.bytes());
}

void test_answer() {
  Case c = random_case();
  c.define();
  const attnkit_linear& s = c.s;
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    for (Result* x : c.results()) x->stored.poison();
    const int32_t forward = run(attnkit_linear_forward_scratch_bytes, attnkit_linear_forward, s);
    const int32_t backward = run(attnkit_linear_backward_scratch_bytes, attnkit_linear_backward, s);
    count_call();
    const bool nothing = s.b == 0 || s.n == 0;
    if (forward || backward || c.lawful != (nothing ? c.lawful : c.true_lawful))
      fail("linear level %s: status %d and %d, or other tokens are lawful", attnkit_level_name(level), forward, backward);
    for (Result* x : c.results()) {
      const double error = x->error();
      // Means of 16 bits are rounded before the backward pass reads them, which small sums of weights make visible.
      if (s.total && s.dtype != ATTNKIT_FLOAT32 && x != &c.o && x != &c.last && x != &c.dv) continue;
      if (!nothing && !(error < allowed(s.dtype)))
        fail("linear level %s dtype %d b %d h %d s %d k %d v %d m %d n %d d %d e %d decay %d map %d %s%s%s%s: %s off by %g",
             attnkit_level_name(level), s.dtype, int(s.b), int(s.h), int(s.s), int(s.k_heads), int(s.v_heads), int(s.m),
             int(s.n), int(s.d), int(s.e), s.decay_kind, s.map, s.beta ? "delta " : "", s.total ? "means " : "",
             s.keep ? "padded " : "", s.state ? "state" : "", x->name, error);
    }
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  Case c = random_case();
  attnkit_linear& s = c.s;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  std::vector<int64_t*> numbers = {&s.b,   &s.h,   &s.s,   &s.k_heads, &s.v_heads, &s.m,   &s.n,   &s.d,      &s.e,
                                   &s.q_b, &s.q_h, &s.q_m, &s.k_b,     &s.k_h,     &s.k_n, &s.v_b, &s.v_h,    &s.v_n,
                                   &s.threads};
  if (s.decay) numbers.insert(numbers.end(), {&s.decay_b, &s.decay_s, &s.decay_n});
  if (s.beta) numbers.insert(numbers.end(), {&s.beta_b, &s.beta_s, &s.beta_n});
  const bool back = below(2);
  const auto bytes = back ? attnkit_linear_backward_scratch_bytes : attnkit_linear_forward_scratch_bytes;
  const int64_t what = below(6), needed = bytes(&s);
  int64_t short_of = 0, shift = 0;
  int32_t expected = ATTNKIT_BAD_SIZE;
  if (what == 0) *numbers[static_cast<size_t>(below(static_cast<int64_t>(numbers.size())))] = pick(absurd);
  if (what == 1) s.dtype = below(2) ? 3 : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 2) {
    if (needed < 64) return;
    below(2) ? short_of = 1 + below(needed) : shift = 1 + below(63);
    expected = ATTNKIT_SMALL_SCRATCH;
  }
  if (what == 3) {
    if (s.n == 0) return;  // an array of no numbers may be null
    expected = ATTNKIT_BAD_RULE;
    const int64_t which = below(4);
    if (which == 0) s.decay_kind = below(2) ? 3 : -1;
    if (which == 1) s.decay_kind = s.decay ? ATTNKIT_DECAY_NONE : ATTNKIT_DECAY_TOKEN;
    if (which == 2) s.map = ATTNKIT_MAP_RELU, s.scale = 0.5f;
    if (which == 3) s.map = below(2) ? 3 : -1;
  }
  if (what == 4) {
    if (s.m == 0) return;
    const void** given[] = {&s.q, &s.k, &s.v};
    below(2) ? *pick(given) = nullptr : s.o = s.dq = nullptr;
  }
  if (what == 5) {
    if (!back || !s.beta || s.n == 0) return;
    for (int64_t& x : c.lawful) x = below(2) ? s.n + 1 : -1;
    expected = ATTNKIT_BAD_RULE;
  }
  const Scratch scratch(what == 2 || what == 5 ? needed - short_of + shift : 64);
  const int32_t status = (back ? attnkit_linear_backward : attnkit_linear_forward)(&s, scratch.data() + shift,
                                                                                  scratch.bytes() - shift);
  count_call();
  if (status != expected) fail("linear refusal %d: status %d, expected %d", int(what), status, expected);
  for (const Result* x : c.results())
    for (size_t i = 0; i < x->truth.size(); ++i)
      if (!x->stored.is_poison(static_cast<int64_t>(i))) return fail("linear refusal %d: something was written", int(what));
}

void run_linear(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
  }
}

const Family family("linear", run_linear);

}  // namespace
