// Softmax attention over odd sizes, every feature, dtype and kernel, against a plain double loop.
#include "softmax_call.h"

namespace {

const int64_t sizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 59, 63, 64, 65, 100, 111, 130, 257, 300};
const int64_t few[] = {1, 2, 3, 5, 9, 33, 48}, heads[] = {1, 2, 3, 5};

SoftmaxCall random_case() {
  const int64_t b = below(30) ? 1 + below(2) : 0, g = 1 + below(2), h = g * pick(heads);
  const int64_t n = below(30) ? pick(sizes) : 0, d = pick(sizes), e = pick(sizes);
  const int32_t kernel = static_cast<int32_t>(below(2)), dtype = static_cast<int32_t>(below(3));
  const int64_t m = below(30) == 0 ? 0 : kernel == ATTNKIT_DECODE ? pick(few) : pick(sizes);
  SoftmaxCall c(b, h, g, m, n, d, e, dtype);
  c.s.kernel = kernel;
  c.add_features();
  return c;
}

void test_answer() {
  SoftmaxCall c = random_case();
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
    // Dropout makes what is kept larger.
    if (!(error < allowed(c.s.dtype) * (c.s.drop_below ? c.s.keep_scale : 1.0f)))
      fail("softmax level %s kernel %d dtype %d b %d h %d g %d m %d n %d d %d e %d: status %d, error %g",
           attnkit_level_name(level), c.s.kernel, c.s.dtype, int(c.s.b), int(c.s.h), int(c.s.g), int(c.s.m), int(c.s.n),
           int(c.s.d), int(c.s.e), status, error);
  }
}

// A call with one thing wrong with it is refused, and nothing is written.
void test_refusal() {
  SoftmaxCall c = random_case();
  attnkit_softmax& s = c.s;
  const int64_t absurd[] = {INT64_MIN, INT64_MIN + 1, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const size[] = {&s.b, &s.h, &s.g, &s.m, &s.n, &s.d, &s.e, &s.threads};
  int64_t* const stride[] = {&s.q_b, &s.q_h, &s.q_m, &s.k_b, &s.k_g, &s.k_n, &s.v_b, &s.v_g, &s.v_n, &s.o_b, &s.o_h, &s.o_m};
  int64_t short_of = 0, shift = 0;
  int32_t expected = ATTNKIT_BAD_SIZE;
  const int64_t what = below(10);
  if (what == 0) *pick(size) = pick(absurd);
  if (what == 1) *pick(stride) = pick(absurd);
  if (what == 2) s.b = s.m = int64_t{1} << 33;  // each is possible, their product is not
  if (what == 3) s.threads = below(2) ? 0 : 1025;
  if (what == 4) s.h = s.g * s.h + 1, s.g = 1 + s.g;
  if (what == 4 && s.h % s.g == 0) s.d = 0;
  if (what == 5) s.dtype = below(2) ? 3 + static_cast<int32_t>(below(1000)) : -1, expected = ATTNKIT_BAD_DTYPE;
  if (what == 6) s.kernel = below(2) ? 2 + static_cast<int32_t>(below(1000)) : -1, expected = ATTNKIT_BAD_KERNEL;
  if (what == 7) (below(2) ? s.left : s.right) = below(2) ? INT64_MAX : INT64_MIN, expected = ATTNKIT_BAD_MASK;
  if (what == 9) s.drop_below = below(2) ? -1 : 1 << 24;
  if (what == 9 && below(2)) s.drop_below = 1, s.kernel = ATTNKIT_DECODE, expected = ATTNKIT_BAD_KERNEL;
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
  SoftmaxCall c = random_case();
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
