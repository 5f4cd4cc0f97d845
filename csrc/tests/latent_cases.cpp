// Latent attention over odd sizes, windows and lists of places, against a plain double loop over expanded keys.
#include "tests.h"

namespace {

const int64_t lengths[] = {1, 2, 5, 31, 63, 95, 96, 97, 130, 257}, sizes[] = {1, 2, 3, 7, 16, 33, 48, 64, 96, 111};
const int64_t heads[] = {1, 2, 3, 5, 16}, queries[] = {1, 2, 3, 9, 17};

struct Case {
  attnkit_latent s{};
  Layout q_at, latent_at, o_at;
  Numbers q, latent, kv_b, o;
  std::vector<int32_t> places;
  std::vector<double> true_o;

  Case(int64_t b, int64_t h, int64_t g, int64_t m, int64_t n, int64_t stored, int64_t nope, int64_t r, int64_t c, int64_t e,
       int32_t dtype)
      : q_at(b, h, m, nope + r, true), latent_at(b, g, stored, c + r, true), o_at(b, h, m, e, false), q(q_at.count, dtype),
        latent(latent_at.count, dtype), kv_b(h * (nope + e) * c, dtype), o(o_at.count, dtype) {
    s.q = q.data(), s.latent = latent.data(), s.kv_b = kv_b.data(), s.o = o.data();
    s.b = b, s.h = h, s.g = g, s.m = m, s.n = n, s.nope = nope, s.r = r, s.c = c, s.e = e, s.stored = stored;
    s.q_b = q_at.b, s.q_h = q_at.h, s.q_m = q_at.m;
    s.latent_b = latent_at.b, s.latent_g = latent_at.h, s.latent_n = latent_at.m;
    s.kv_b_row = c, s.kv_b_h = (nope + e) * c;
    s.o_b = o_at.b, s.o_h = o_at.h, s.o_m = o_at.m;
    s.left = s.right = int64_t{1} << 62;
    s.threads = 1 + below(3), s.dtype = dtype;
    s.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>((nope + 1) * (c + r))));
  }

  // A list for each sequence, some shorter than n.
  void add_places() {
    for (int64_t b = 0; b < s.b; ++b) {
      const int64_t count = below(3) ? s.n : below(s.n + 1);
      for (int64_t j = 0; j < s.n; ++j) places.push_back(j < count ? static_cast<int32_t>(below(s.stored)) : -1);
    }
    s.places = places.data();
  }

  void define() {
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, g = h / (s.h / s.g);
      const double* query = &q.values[b * s.q_b + h * s.q_h + i * s.q_m];
      const double* maps = &kv_b.values[h * s.kv_b_h];
      std::vector<double> mixed(static_cast<size_t>(s.c), 0.0), asked(static_cast<size_t>(s.c), 0.0);
      for (int64_t f = 0; f < s.nope; ++f)
        for (int64_t c = 0; c < s.c; ++c) asked[c] += query[f] * maps[f * s.c + c];
      double total = 0.0;
      for (int64_t j = 0; j < s.n; ++j) {
        const int64_t position = s.n - s.m + i, place = s.places ? places[b * s.n + j] : j;
        if (s.places ? place < 0 : j < position - s.left || j > position + s.right) continue;
        const double* key = &latent.values[b * s.latent_b + g * s.latent_g + place * s.latent_n];
        double x = 0.0;
        for (int64_t c = 0; c < s.c; ++c) x += asked[c] * key[c];
        for (int64_t c = 0; c < s.r; ++c) x += query[s.nope + c] * key[s.c + c];
        const double weight = std::exp(x * s.scale);
        total += weight;
        for (int64_t c = 0; c < s.c; ++c) mixed[c] += weight * key[c];
      }
      for (int64_t f = 0; f < s.e; ++f) {
        double x = 0.0;
        for (int64_t c = 0; c < s.c; ++c) x += mixed[c] * maps[(s.nope + f) * s.c + c];
        true_o.push_back(total > 0.0 ? x / total : 0.0);
      }
    }
  }

  // Largest distance from the definition, relative to its largest number; infinite if something else was written.
  double error() const {
    double worst = 0.0, size = 1.0;
    for (const double x : true_o) size = std::fmax(size, std::fabs(x));
    std::vector<char> written(static_cast<size_t>(o_at.count), 0);
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row)
      for (int64_t f = 0; f < s.e; ++f) {
        const int64_t at = row / s.m / s.h * s.o_b + row / s.m % s.h * s.o_h + row % s.m * s.o_m + f;
        const double distance = std::fabs(o.read(at, s.dtype) - true_o[row * s.e + f]) / size;
        worst = distance <= worst ? worst : distance;  // a NaN stays
        written[at] = 1;
      }
    for (int64_t at = 0; at < o_at.count; ++at)
      if (!written[at] && !o.is_poison(at)) worst = INFINITY;
    return worst;
  }
};

Case random_case() {
  const bool listed = below(2);
  const int64_t g = 1 + below(2), n = below(30) ? pick(lengths) : 0, nope = below(6) ? pick(sizes) : 0;
  Case c(1 + below(2), g * pick(heads), g, pick(queries), n, listed ? 1 + below(n + 50) : n, nope,
         nope == 0 ? 1 + below(9) : below(9), pick(sizes), pick(sizes), static_cast<int32_t>(below(3)));
  if (listed) {
    c.add_places();
  } else if (below(2)) {
    c.s.left = below(n + 1), c.s.right = below(3);
  }
  return c;
}

void test_answer() {
  Case c = random_case();
  c.define();
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    c.o.poison();
    const int64_t needed = attnkit_latent_forward_scratch_bytes(&c.s);
    const Scratch scratch(needed < 0 ? 0 : needed);
    const int32_t status = attnkit_latent_forward(&c.s, scratch.data(), scratch.bytes());
    const double error = status == ATTNKIT_OK ? c.error() : INFINITY;
    count_call();
    if (!(error < allowed(c.s.dtype)))
      fail("latent level %s dtype %d b %d h %d g %d m %d n %d nope %d r %d c %d e %d %s: status %d, error %g",
           attnkit_level_name(level), c.s.dtype, int(c.s.b), int(c.s.h), int(c.s.g), int(c.s.m), int(c.s.n), int(c.s.nope),
           int(c.s.r), int(c.s.c), int(c.s.e), c.s.places ? "listed" : "", status, error);
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  Case c = random_case();
  attnkit_latent& s = c.s;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const number[] = {&s.b, &s.h, &s.g, &s.m, &s.n, &s.nope, &s.r, &s.c, &s.e, &s.threads, &s.q_b, &s.q_h, &s.q_m,
                             &s.latent_b, &s.latent_g, &s.latent_n, &s.kv_b_h, &s.kv_b_row, &s.o_b, &s.o_h, &s.o_m};
  const int64_t what = below(4), needed = attnkit_latent_forward_scratch_bytes(&s);
  int64_t short_of = 0, shift = 0;
  int32_t expected = ATTNKIT_BAD_SIZE;
  if (what == 0) *pick(number) = pick(absurd);
  if (what == 1) s.dtype = below(2) ? 3 : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 2) {
    if (needed < 64) return;
    below(2) ? short_of = 1 + below(needed) : shift = 1 + below(63);
    expected = ATTNKIT_SMALL_SCRATCH;
  }
  if (what == 3) {
    if (c.places.empty()) return;
    c.places[below(static_cast<int64_t>(c.places.size()))] = below(2) ? static_cast<int32_t>(s.stored) : -2;
    expected = ATTNKIT_BAD_PAGE;
  }
  const Scratch scratch(what >= 2 ? needed - short_of + shift : 64);
  c.o.poison();
  const int32_t status = attnkit_latent_forward(&s, scratch.data() + shift, scratch.bytes() - shift);
  count_call();
  if (status != expected) fail("latent refusal %d: status %d, expected %d", int(what), status, expected);
  for (int64_t at = 0; at < c.o_at.count; ++at)
    if (!c.o.is_poison(at)) return fail("latent refusal %d: something was written", int(what));
}

void run_latent(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
  }
}

const Family family("latent", run_latent);

}  // namespace
