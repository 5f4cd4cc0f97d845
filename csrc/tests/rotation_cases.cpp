// Rotary positions over odd sizes and layouts, against the definition.
#include "tests.h"

namespace {

const int64_t sizes[] = {0, 2, 4, 6, 14, 16, 30, 32, 34, 64, 66, 128}, tokens[] = {0, 1, 2, 5, 17, 40};

struct Case {
  attnkit_rotation r{};
  Layout x_at, cos_at, sin_at, y_at;
  Numbers x, cos, sin, y;

  Case(int64_t b, int64_t h, int64_t m, int64_t d, int32_t dtype)
      : x_at(b, h, m, d, true), cos_at(b, 1, m, d, true), sin_at(b, 1, m, d, true), y_at(b, h, m, d, false),
        x(x_at.count, dtype), cos(cos_at.count, dtype), sin(sin_at.count, dtype), y(y_at.count, dtype) {
    r.x = x.data(), r.cos = cos.data(), r.sin = sin.data(), r.y = y.data();
    r.b = b, r.h = h, r.m = m, r.d = d;
    r.x_b = x_at.b, r.x_h = x_at.h, r.x_m = x_at.m;
    r.cos_b = cos_at.b, r.cos_m = cos_at.m, r.sin_b = sin_at.b, r.sin_m = sin_at.m;
    r.y_b = y_at.b, r.y_h = y_at.h, r.y_m = y_at.m;
    r.dtype = dtype, r.threads = static_cast<int32_t>(1 + below(3));
  }

  // Largest distance from the definition; infinite if something else was written.
  double error() const {
    double worst = 0.0;
    std::vector<char> written(static_cast<size_t>(y_at.count), 0);
    for (int64_t row = 0; row < r.b * r.h * r.m; ++row)
      for (int64_t c = 0; c < r.d; ++c) {
        const int64_t b = row / r.m / r.h, h = row / r.m % r.h, i = row % r.m, half = r.d / 2;
        const double* at = &x.values[b * r.x_b + h * r.x_h + i * r.x_m];
        const double turned = c < half ? -at[c + half] : at[c - half];
        const double want = at[c] * cos.values[b * r.cos_b + i * r.cos_m + c] +
                            turned * sin.values[b * r.sin_b + i * r.sin_m + c];
        const int64_t to = b * r.y_b + h * r.y_h + i * r.y_m + c;
        const double distance = std::fabs(y.read(to, r.dtype) - want);
        worst = distance <= worst ? worst : distance;  // a NaN stays
        written[to] = 1;
      }
    for (int64_t to = 0; to < y_at.count; ++to)
      if (!written[to] && !y.is_poison(to)) worst = INFINITY;
    return worst;
  }
};

Case random_case() {
  return Case(1 + below(3), 1 + below(4), pick(tokens), pick(sizes), static_cast<int32_t>(below(3)));
}

void test_answer() {
  Case c = random_case();
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    c.y.poison();
    const int32_t status = attnkit_rotate(&c.r);
    const double error = status == ATTNKIT_OK ? c.error() : INFINITY;
    count_call();
    if (!(error < 8 * allowed(c.r.dtype)))  // results go up to 8
      fail("rotation level %s dtype %d b %d h %d m %d d %d: status %d, error %g", attnkit_level_name(level), c.r.dtype,
           int(c.r.b), int(c.r.h), int(c.r.m), int(c.r.d), status, error);
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  Case c = random_case();
  attnkit_rotation& r = c.r;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const number[] = {&r.b, &r.h, &r.m, &r.d, &r.x_b, &r.x_h, &r.x_m, &r.cos_b, &r.cos_m, &r.sin_b, &r.sin_m,
                             &r.y_b, &r.y_h, &r.y_m};
  const int64_t what = below(5);
  int32_t expected = ATTNKIT_BAD_SIZE;
  if (what == 0) *pick(number) = pick(absurd);
  if (what == 1) r.dtype = below(2) ? 3 : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 2) r.threads = below(2) ? 0 : 1025;
  if (what == 3) r.d += 1;
  if (what == 4) {
    if (r.m == 0 || r.d == 0) return;
    r.y = nullptr;
  }
  c.y.poison();
  const int32_t status = attnkit_rotate(&r);
  count_call();
  if (status != expected) fail("rotation refusal %d: status %d, expected %d", int(what), status, expected);
  for (int64_t at = 0; at < c.y_at.count; ++at)
    if (!c.y.is_poison(at)) return fail("rotation refusal %d: something was written", int(what));
}

void run_rotation(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
  }
}

const Family family("rotation", run_rotation);

}  // namespace
