// Softmax attention over odd sizes, every feature, dtype and kernel, against a plain double loop.
#include "tests.h"

namespace {

struct Case {
  attnkit_softmax s{};
  Layout q_at, k_at, v_at, o_at;
  Numbers q, k, v, o;
  std::vector<float> lse, bias, alibi, sink;
  std::vector<int64_t> offsets, patterns;
  std::vector<int32_t> columns, pattern;
  std::vector<char> visible;             // (b, h, m, n)
  std::vector<double> true_o, true_lse;  // (b, h, m, e) and (b, h, m)

  Case(int64_t b, int64_t h, int64_t g, int64_t m, int64_t n, int64_t d, int64_t e, int32_t dtype)
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

  // What the definition says, in double precision.
  void define() {
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, g = h / (s.h / s.g);
      std::vector<double> weight(static_cast<size_t>(s.n), 0.0), sum(static_cast<size_t>(s.e), 0.0);
      const double* query = q.values.data() + b * s.q_b + h * s.q_h + i * s.q_m;
      double top = s.sink ? sink[h] : -INFINITY, total = 0.0;
      for (int64_t j = 0; j < s.n; ++j) {
        const double* key = k.values.data() + b * s.k_b + g * s.k_g + j * s.k_n;
        double x = 0.0;
        for (int64_t c = 0; c < s.d; ++c) x += query[c] * key[c];
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
        const double* value = v.values.data() + b * s.v_b + g * s.v_g + j * s.v_n;
        total += p;
        for (int64_t c = 0; c < s.e; ++c) sum[c] += p * value[c];
      }
      for (int64_t c = 0; c < s.e; ++c) true_o.push_back(total > 0 ? sum[c] / total : 0.0);
      true_lse.push_back(total > 0 ? top + std::log(total) : -INFINITY);
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
      judge(lse[row], true_lse[row]);
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

const int64_t sizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 59, 63, 64, 65, 100, 111, 130, 257, 300};
const int64_t few[] = {1, 2, 3, 5, 9, 33, 48}, heads[] = {1, 2, 3, 5};

Case random_case() {
  const int64_t b = below(30) ? 1 + below(2) : 0, g = 1 + below(2), h = g * pick(heads);
  const int64_t n = below(30) ? pick(sizes) : 0, d = pick(sizes), e = pick(sizes);
  const int32_t kernel = static_cast<int32_t>(below(2)), dtype = static_cast<int32_t>(below(3));
  const int64_t m = below(30) == 0 ? 0 : kernel == ATTNKIT_DECODE ? pick(few) : pick(sizes);
  Case c(b, h, g, m, n, d, e, dtype);
  c.s.kernel = kernel;
  c.add_features();
  return c;
}

void test_answer() {
  Case c = random_case();
  c.define();
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    c.o.poison();
    for (float& x : c.lse) x = NAN;
    const int64_t needed = attnkit_softmax_forward_scratch_bytes(&c.s);
    const Scratch scratch(needed < 0 ? 0 : needed);
    const int32_t status = attnkit_softmax_forward(&c.s, scratch.data(), scratch.bytes());
    const double error = status == ATTNKIT_OK ? c.error() : INFINITY;
    count_call();
    if (!(error < allowed(c.s.dtype)))
      fail("softmax level %s kernel %d dtype %d b %d h %d g %d m %d n %d d %d e %d: status %d, error %g",
           attnkit_level_name(level), c.s.kernel, c.s.dtype, int(c.s.b), int(c.s.h), int(c.s.g), int(c.s.m), int(c.s.n),
           int(c.s.d), int(c.s.e), status, error);
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  Case c = random_case();
  attnkit_softmax& s = c.s;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const size[] = {&s.b, &s.h, &s.g, &s.m, &s.n, &s.d, &s.e, &s.threads};
  int64_t* const stride[] = {&s.q_b, &s.q_h, &s.q_m, &s.k_b, &s.k_g, &s.k_n, &s.v_b, &s.v_g, &s.v_n, &s.o_b, &s.o_h, &s.o_m};
  int64_t short_of = 0, shift = 0;
  int32_t expected = ATTNKIT_BAD_SIZE;
  const int64_t what = below(9);
  if (what == 0) *pick(size) = pick(absurd);
  if (what == 1) *pick(stride) = pick(absurd);
  if (what == 2) s.b = s.m = int64_t{1} << 33;  // each is possible, their product is not
  if (what == 3) s.threads = below(2) ? 0 : 1025;
  if (what == 4) s.h = s.g * s.h + 1, s.g = 1 + s.g;
  if (what == 4 && s.h % s.g == 0) s.d = 0;
  if (what == 5) s.dtype = below(2) ? 3 + static_cast<int32_t>(below(1000)) : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 6) s.kernel = below(2) ? 2 + static_cast<int32_t>(below(1000)) : -1, expected = ATTNKIT_BAD_KERNEL;
  if (what == 7) (below(2) ? s.left : s.right) = below(2) ? INT64_MAX : INT64_MIN, expected = ATTNKIT_BAD_MASK;
  const int64_t needed = attnkit_softmax_forward_scratch_bytes(&s);
  if (what == 8) {
    if (needed < 64) return;
    below(2) ? short_of = 1 + below(needed) : shift = 1 + below(63);
    expected = ATTNKIT_SMALL_SCRATCH;
  } else if (needed != -expected) {
    fail("softmax refusal %d: %lld bytes of scratch, expected %d", int(what), static_cast<long long>(needed), -expected);
  }
  const Scratch scratch(what == 8 ? needed - short_of + shift : 64);
  c.o.poison();
  const int32_t status = attnkit_softmax_forward(&s, scratch.data() + shift, scratch.bytes() - shift);
  count_call();
  if (status != expected) fail("softmax refusal %d: status %d, expected %d", int(what), status, expected);
  for (int64_t at = 0; at < c.o_at.count; ++at)
    if (!c.o.is_poison(at)) return fail("softmax refusal %d: something was written", int(what));
}

// A block list that points outside of the call or is out of order.
void test_bad_list() {
  Case c = random_case();
  if (!c.s.offsets || c.columns.empty() || c.s.b == 0) return;
  const int64_t far[] = {-1, INT32_MIN, INT32_MAX, c.s.n / 64 + 1};
  const int64_t what = below(5), at = below(static_cast<int64_t>(c.columns.size()));
  if (what == 0) c.columns[at] = static_cast<int32_t>(pick(far));
  if (what == 1) c.pattern[at] = -2 - static_cast<int32_t>(below(1000));
  if (what == 2) c.offsets[below(static_cast<int64_t>(c.offsets.size()))] = -1;
  if (what == 3) c.offsets[0] = c.offsets.back() + 1;
  if (what == 4) c.s.mask_batches = c.s.b + 1;
  const Scratch scratch(attnkit_softmax_forward_scratch_bytes(&c.s));
  const int32_t status = attnkit_softmax_forward(&c.s, scratch.data(), scratch.bytes());
  count_call();
  if (status != ATTNKIT_BAD_MASK) fail("softmax list %d: status %d, expected %d", int(what), status, ATTNKIT_BAD_MASK);
}

void run_softmax(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
    test_bad_list();
  }
}

const Family family("softmax", run_softmax);

}  // namespace
