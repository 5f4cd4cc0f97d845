// Linear maps of few rows over odd sizes and strides, against plain double loops.
#include "tests.h"

namespace {

const int64_t widths[] = {0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 100, 129};
const int64_t outputs[] = {0, 1, 3, 4, 5, 15, 16, 17, 40, 65};

struct Case {
  attnkit_projection p{};
  Numbers x, w, bias, y;

  static int64_t count(int64_t rows, int64_t stride, int64_t size) {
    return rows > 0 && size > 0 ? (rows - 1) * stride + size : 0;
  }

  Case(int64_t m, int64_t n, int64_t d, int64_t x_m, int64_t w_n, int64_t y_m, bool biased, int32_t dtype)
      : x(count(m, x_m, d), dtype), w(count(n, w_n, d), dtype), bias(n, dtype), y(count(m, y_m, n), dtype) {
    p.x = x.data(), p.w = w.data(), p.bias = biased ? bias.data() : nullptr, p.y = y.data();
    p.m = m, p.n = n, p.d = d, p.x_m = x_m, p.w_n = w_n, p.y_m = y_m;
    p.dtype = dtype, p.threads = static_cast<int32_t>(1 + below(3));
  }

  // Largest distance from the definition, relative to its largest number; infinite if something else was written.
  double error() const {
    double worst = 0.0, size = 1.0;
    std::vector<char> written(static_cast<size_t>(count(p.m, p.y_m, p.n)), 0);
    for (int64_t i = 0; i < p.m; ++i)
      for (int64_t j = 0; j < p.n; ++j) {
        double sum = p.bias ? bias.values[j] : 0.0;
        for (int64_t c = 0; c < p.d; ++c) sum += x.values[i * p.x_m + c] * w.values[j * p.w_n + c];
        size = std::fmax(size, std::fabs(sum));
        const double distance = std::fabs(y.read(i * p.y_m + j, p.dtype) - sum);
        worst = distance <= worst ? worst : distance;  // a NaN stays
        written[i * p.y_m + j] = 1;
      }
    for (size_t at = 0; at < written.size(); ++at)
      if (!written[at] && !y.is_poison(static_cast<int64_t>(at))) worst = INFINITY;
    return worst / size;
  }
};

Case random_case() {
  const int64_t n = pick(outputs), d = pick(widths), gap = below(3);
  return Case(below(5), n, d, d + gap, below(8) ? d + gap : 0, n + gap, below(2), static_cast<int32_t>(below(3)));
}

void test_answer() {
  Case c = random_case();
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    c.y.poison();
    const int32_t status = attnkit_project(&c.p);
    const double error = status == ATTNKIT_OK ? c.error() : INFINITY;
    count_call();
    if (!(error < allowed(c.p.dtype)))
      fail("projection level %s dtype %d m %d n %d d %d%s: status %d, error %g", attnkit_level_name(level), c.p.dtype,
           int(c.p.m), int(c.p.n), int(c.p.d), c.p.bias ? " bias" : "", status, error);
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  Case c = random_case();
  attnkit_projection& p = c.p;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const number[] = {&p.m, &p.n, &p.d, &p.x_m, &p.w_n, &p.y_m};
  const int64_t what = below(4);
  int32_t expected = ATTNKIT_BAD_SIZE;
  if (what == 0) *pick(number) = pick(absurd);
  if (what == 1) p.dtype = below(2) ? 3 : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 2) p.threads = below(2) ? 0 : 1025;
  if (what == 3) {
    if (p.m == 0 || p.n == 0) return;
    p.y = nullptr;
  }
  c.y.poison();
  const int32_t status = attnkit_project(&p);
  count_call();
  bool clean = true;
  for (int64_t i = 0; i < static_cast<int64_t>(c.y.values.size()); ++i) clean = clean && c.y.is_poison(i);
  if (status != expected || !clean) fail("projection refusal %d: status %d, expected %d", int(what), status, expected);
}

void run_projection(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    test_answer();
    test_refusal();
  }
}

const Family family("projection", run_projection);

}  // namespace
