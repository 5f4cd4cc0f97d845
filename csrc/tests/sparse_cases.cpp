// Learned-sparse attention over odd sizes against plain loops: chosen blocks, compressed blocks, three ways to choose.
//
// Numbers are multiples of 1/32, so that products are exact and ties are met: what is chosen has to be right to the key.
#include <algorithm>
#include <numeric>

#include "softmax_call.h"

namespace {

const int64_t lengths[] = {1, 2, 5, 31, 48, 49, 63, 64, 65, 100, 130, 257, 300};
const int64_t channels[] = {1, 2, 3, 7, 16, 33, 64, 111}, heads[] = {1, 2, 3, 5};
const int64_t absurd[] = {INT64_MIN, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};

// Runs the call at every level with scratch memory of exactly the size asked for; `judge` says what is wrong, or null.
template <class Bytes, class Run, class Judge>
void at_every_level(const char* what, Bytes bytes, Run run, Judge judge) {
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    const int64_t needed = bytes();
    const Scratch scratch(needed < 0 ? 0 : needed);
    const int32_t status = run(scratch.data(), scratch.bytes());
    count_call();
    const char* wrong = status == ATTNKIT_OK ? judge() : "refused";
    if (wrong) fail("%s level %s: %s, status %d", what, attnkit_level_name(level), wrong, status);
  }
}

// A call with one number out of range, or too little scratch memory, is refused before anything is touched.
template <class Bytes, class Run>
void refused(const char* what, int64_t& number, Bytes bytes, Run run) {
  const int64_t before = number, needed = bytes();
  if (needed >= 64) {
    const Scratch scratch(needed + 64);
    const bool shifted = below(2);
    const int32_t status = shifted ? run(scratch.data() + 1 + below(63), needed) : run(scratch.data(), needed - 1);
    if (status != ATTNKIT_SMALL_SCRATCH) fail("%s: status %d with bad scratch memory", what, status);
  }
  number = pick(absurd);
  const int32_t status = run(nullptr, INT64_MAX);
  count_call();
  if (bytes() >= 0 || status == ATTNKIT_OK) fail("%s: %lld is not refused", what, static_cast<long long>(number));
  number = before;
}

// The best `top` of scores, ascending, the first of equals.
std::vector<int32_t> best(const std::vector<double>& scores, int64_t top) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(std::min<size_t>(order.size(), static_cast<size_t>(top)));
  std::sort(order.begin(), order.end());
  return order;
}

bool same_list(const std::vector<int32_t>& expected, const int32_t* list, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (list[i] != (i < static_cast<int64_t>(expected.size()) ? expected[i] : -1)) return false;
  return true;
}

double dot(const double* a, const double* b, int64_t count) {
  double x = 0.0;
  for (int64_t c = 0; c < count; ++c) x += a[c] * b[c];
  return x;
}

void test_indexer() {
  attnkit_indexer s{};
  s.b = 1 + below(2), s.g = 1 + below(2), s.h = s.g * pick(heads), s.n = pick(lengths), s.m = 1 + below(s.n);
  s.d = pick(channels), s.top = 1 + below(s.n + 3), s.threads = 1 + below(3), s.dtype = static_cast<int32_t>(below(3));
  const Layout q_at(s.b, s.h, s.m, s.d, true), k_at(s.b, s.g, s.n, s.d, true);
  const Numbers q(q_at.count, s.dtype), k(k_at.count, s.dtype);
  std::vector<float> w;
  for (int64_t i = 0; i < s.b * s.h * s.m; ++i) w.push_back(static_cast<float>(below(3) - 1));
  std::vector<int32_t> chosen(static_cast<size_t>(s.b * s.m * s.top));
  s.q = q.data(), s.k = k.data(), s.w = w.data(), s.chosen = chosen.data();
  s.q_b = q_at.b, s.q_h = q_at.h, s.q_m = q_at.m, s.k_b = k_at.b, s.k_g = k_at.h, s.k_n = k_at.m;
  s.w_m = 1, s.w_h = s.m, s.w_b = s.h * s.m;
  const auto bytes = [&] { return attnkit_indexer_forward_scratch_bytes(&s); };
  const auto run = [&](void* scratch, int64_t size) { return attnkit_indexer_forward(&s, scratch, size); };
  at_every_level("indexer", bytes, run, [&]() -> const char* {
    for (int64_t b = 0; b < s.b; ++b)
      for (int64_t i = 0; i < s.m; ++i) {
        std::vector<double> scores(static_cast<size_t>(s.n - s.m + i + 1), 0.0);
        for (int64_t h = 0; h < s.h; ++h) {
          const double* query = &q.values[b * s.q_b + h * s.q_h + i * s.q_m];
          const double* keys = &k.values[b * s.k_b + h / (s.h / s.g) * s.k_g];
          for (int64_t j = 0; j <= s.n - s.m + i; ++j)
            scores[j] += w[(b * s.h + h) * s.m + i] * std::fmax(0.0, dot(query, keys + j * s.k_n, s.d));
        }
        if (!same_list(best(scores, s.top), &chosen[(b * s.m + i) * s.top], s.top)) return "other keys";
      }
    return nullptr;
  });
  int64_t* const numbers[] = {&s.b,       &s.h,   &s.g,   &s.m,   &s.n,   &s.d,  &s.top,
                              &s.threads, &s.q_b, &s.q_m, &s.k_b, &s.k_n, &s.w_m};
  refused("indexer", *pick(numbers), bytes, run);
}

void test_gates() {
  attnkit_gates s{};
  s.b = 1 + below(2), s.g = 1 + below(2), s.h = s.g * pick(heads), s.n = pick(lengths), s.m = 1 + below(s.n);
  s.block = 1 + below(9), s.c = s.n / s.block, s.d = pick(channels), s.s = below(6), s.threads = 1 + below(3);
  s.dtype = static_cast<int32_t>(below(3));
  const Layout q_at(s.b, s.h, s.m, s.d, true);
  const Numbers q(q_at.count, s.dtype), means(s.b * s.g * s.c * s.d, ATTNKIT_FLOAT32);
  std::vector<int32_t> chosen(static_cast<size_t>(s.b * s.h * s.m * s.s));
  s.q = q.data(), s.means = static_cast<const float*>(means.data()), s.chosen = chosen.data();
  s.q_b = q_at.b, s.q_h = q_at.h, s.q_m = q_at.m;
  const auto bytes = [&] { return attnkit_gates_forward_scratch_bytes(&s); };
  const auto run = [&](void* scratch, int64_t size) { return attnkit_gates_forward(&s, scratch, size); };
  at_every_level("gates", bytes, run, [&]() -> const char* {
    for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
      const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, g = h / (s.h / s.g);
      std::vector<double> scores;
      for (int64_t j = 0; j < std::min((s.n - s.m + i) / s.block, s.c); ++j)
        scores.push_back(dot(&q.values[b * s.q_b + h * s.q_h + i * s.q_m],
                           &means.values[((b * s.g + g) * s.c + j) * s.d], s.d));
      if (!same_list(best(scores, s.s), chosen.data() + row * s.s, s.s)) return "other blocks";
    }
    return nullptr;
  });
  int64_t* const numbers[] = {&s.b, &s.h, &s.g, &s.m, &s.n, &s.c, &s.d, &s.s, &s.block, &s.threads, &s.q_b, &s.q_m};
  refused("gates", *pick(numbers), bytes, run);
}

SoftmaxCall random_call(bool masked) {
  const int64_t b = 1 + below(2), g = 1 + below(2), h = g * pick(heads), n = pick(lengths), m = 1 + below(n);
  SoftmaxCall c(b, h, g, m, n, pick(channels), pick(channels), static_cast<int32_t>(below(3)));
  c.s.lse = nullptr;
  if (masked) c.add_mask();
  return c;
}

void test_topk() {
  SoftmaxCall c = random_call(true);
  attnkit_softmax& s = c.s;
  attnkit_topk kept{};
  kept.most = 1 + below(below(2) ? s.n : 1 + s.n / 64);  // few enough for bounds, or not
  std::vector<int32_t> counts;
  const double share = (uniform() + 1.0) / 2.0;
  const bool by_share = below(2);
  for (int64_t seen = 0; seen <= s.n; ++seen) {
    const double wanted = by_share ? std::ceil(share * static_cast<double>(seen)) : static_cast<double>(seen);
    counts.push_back(static_cast<int32_t>(std::min<int64_t>(kept.most, static_cast<int64_t>(wanted))));
  }
  kept.kept = counts.data();
  for (int64_t row = 0; row < s.b * s.h * s.m; ++row) {
    const int64_t i = row % s.m, h = row / s.m % s.h, b = row / s.m / s.h, g = h / (s.h / s.g);
    std::vector<double> scores;
    std::vector<int64_t> keys;
    for (int64_t j = 0; j < s.n; ++j) {
      if (!c.visible[row * s.n + j]) continue;
      keys.push_back(j);
      scores.push_back(dot(&c.q.values[b * s.q_b + h * s.q_h + i * s.q_m],
                           &c.k.values[b * s.k_b + g * s.k_g + j * s.k_n], s.d));
    }
    for (const int64_t j : keys) c.visible[row * s.n + j] = 0;
    for (const int32_t at : best(scores, counts[keys.size()])) c.visible[row * s.n + keys[at]] = 1;
  }
  c.define();
  const auto bytes = [&] { return attnkit_topk_forward_scratch_bytes(&s, &kept); };
  const auto run = [&](void* scratch, int64_t size) { return attnkit_topk_forward(&s, &kept, scratch, size); };
  at_every_level("topk", bytes, [&](void* scratch, int64_t size) { return c.o.poison(), run(scratch, size); },
                 [&] { return c.error() < allowed(s.dtype) ? nullptr : "a wrong answer"; });
  int64_t* const numbers[] = {&s.b, &s.h, &s.g, &s.m, &s.n, &s.d, &s.e, &s.threads, &s.q_m, &s.v_n, &s.o_b, &kept.most};
  refused("topk", *pick(numbers), bytes, run);
}

void test_selected() {
  SoftmaxCall c = random_call(false);
  const attnkit_softmax& a = c.s;
  attnkit_selected s{};
  s.q = a.q, s.k = a.k, s.v = a.v, s.o = a.o, s.b = a.b, s.h = a.h, s.g = a.g, s.m = a.m, s.n = a.n, s.d = a.d, s.e = a.e;
  s.q_b = a.q_b, s.q_h = a.q_h, s.q_m = a.q_m, s.k_b = a.k_b, s.k_g = a.k_g, s.k_n = a.k_n;
  s.v_b = a.v_b, s.v_g = a.v_g, s.v_n = a.v_n, s.o_b = a.o_b, s.o_h = a.o_h, s.o_m = a.o_m;
  s.threads = a.threads, s.dtype = a.dtype, s.scale = a.scale;
  if (below(2)) c.s.lse = s.lse = c.lse.data();
  s.lists = below(2) ? s.g : s.h, s.s = below(4), s.block = 1 + below(below(2) ? 12 : 150), s.causal = below(2) != 0;
  std::fill(c.visible.begin(), c.visible.end(), 0);
  std::vector<int32_t> chosen;
  for (int64_t row = 0; row < s.b * s.lists * s.m; ++row) {
    const int64_t i = row % s.m, list = row / s.m % s.lists, b = row / s.m / s.lists, own = (s.n - s.m + i) / s.block;
    const int64_t blocks = (s.n + s.block - 1) / s.block;
    std::vector<int64_t> seen = {own};
    for (int64_t at = 0; at < s.s; ++at) {
      const int64_t block = below(s.causal ? own + 1 : blocks);
      const bool fresh = std::find(seen.begin(), seen.end(), block) == seen.end();
      chosen.push_back(fresh ? static_cast<int32_t>(block) : below(2) ? -1 : INT32_MAX);
      if (fresh) seen.push_back(block);
    }
    for (int64_t head = 0; head < s.h / s.lists; ++head)
      for (const int64_t block : seen)
        for (int64_t j = block * s.block; j < std::min(s.n, (block + 1) * s.block); ++j)
          if (!s.causal || j <= s.n - s.m + i)
            c.visible[((b * s.h + list * (s.h / s.lists) + head) * s.m + i) * s.n + j] = 1;
  }
  s.chosen = chosen.data();
  c.define();
  const auto bytes = [&] { return attnkit_selected_forward_scratch_bytes(&s); };
  const auto run = [&](void* scratch, int64_t size) { return attnkit_selected_forward(&s, scratch, size); };
  const auto run_afresh = [&](void* scratch, int64_t size) {
    std::fill(c.lse.begin(), c.lse.end(), NAN);
    return c.o.poison(), run(scratch, size);
  };
  at_every_level("selected", bytes, run_afresh,
                 [&] { return c.error() < allowed(s.dtype) ? nullptr : "a wrong answer"; });
  int64_t* const numbers[] = {&s.b, &s.h, &s.g,     &s.lists,   &s.m,   &s.n,   &s.d,
                              &s.e, &s.s, &s.block, &s.threads, &s.q_m, &s.v_n, &s.o_h};
  refused("selected", *pick(numbers), bytes, run);
}

// Keys of the softmax call stand for compressed blocks; which of several equally important blocks is named is not asked.
void test_coarse() {
  attnkit_coarse s{};
  s.stride = 1 + below(4), s.length = s.stride * (1 + below(3)), s.block = s.stride * (1 + below(4));
  s.b = 1 + below(2), s.g = 1 + below(2), s.h = s.g * pick(heads), s.n = pick(lengths), s.m = 1 + below(s.n);
  s.c = s.n < s.length ? 0 : (s.n - s.length) / s.stride + 1, s.s = below(6), s.causal = below(2) != 0;
  SoftmaxCall c(s.b, s.h, s.g, s.m, s.c, pick(channels), pick(channels), static_cast<int32_t>(below(3)));
  const attnkit_softmax& a = c.s;
  s.q = a.q, s.k = a.k, s.v = a.v, s.d = a.d, s.e = a.e;
  s.q_b = a.q_b, s.q_h = a.q_h, s.q_m = a.q_m, s.k_b = a.k_b, s.k_g = a.k_g, s.k_n = a.k_n;
  s.v_b = a.v_b, s.v_g = a.v_g, s.v_n = a.v_n, s.threads = a.threads, s.dtype = a.dtype, s.scale = a.scale;
  std::vector<float> o(static_cast<size_t>(s.b * s.h * s.m * s.e));
  std::vector<int32_t> chosen(static_cast<size_t>(s.b * s.g * s.m * s.s));
  s.o = o.data(), s.chosen = chosen.data();
  for (int64_t at = 0; at < s.b * s.h * s.m * s.c; ++at) {
    const int64_t there = s.causal ? s.n - s.m + at / s.c % s.m : s.n - 1;
    c.visible[at] = at % s.c * s.stride + s.length - 1 <= there;
  }
  c.define();
  const auto bytes = [&] { return attnkit_coarse_forward_scratch_bytes(&s); };
  const auto run = [&](void* scratch, int64_t size) { return attnkit_coarse_forward(&s, scratch, size); };
  at_every_level("coarse", bytes, run, [&]() -> const char* {
    for (size_t at = 0; at < o.size(); ++at)
      if (!(std::fabs(o[at] - c.true_o[at]) < allowed(s.dtype))) return "a wrong answer";
    for (int64_t row = 0; row < s.b * s.g * s.m; ++row) {
      const int64_t position = s.n - s.m + row % s.m, own = position / s.block;
      const int64_t last = (s.causal ? position : s.n - 1) / s.block;
      std::vector<int32_t> named;
      for (int64_t at = 0; at < s.s; ++at)
        if (chosen[row * s.s + at] >= 0) named.push_back(chosen[row * s.s + at]);
      std::sort(named.begin(), named.end());
      if (static_cast<int64_t>(named.size()) != std::min(s.s, last)) return "too few or too many blocks";
      for (size_t at = 0; at < named.size(); ++at)
        if (named[at] > last || named[at] == own || (at > 0 && named[at] == named[at - 1])) return "a wrong block";
      const auto names = [&](int64_t block) {
        return std::binary_search(named.begin(), named.end(), static_cast<int32_t>(block));
      };
      if (s.s >= 3 && ((own > 0 && (!names(0) || !names(own - 1))) || (own < last && !names(own + 1))))
        return "without the first block or a neighbour";
    }
    return nullptr;
  });
  int64_t* const numbers[] = {&s.b, &s.h,      &s.g,      &s.m,     &s.n,       &s.c,   &s.d,  &s.e,
                              &s.s, &s.length, &s.stride, &s.block, &s.threads, &s.q_m, &s.v_n};
  refused("coarse", *pick(numbers), bytes, run);
}

void run_sparse(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_indexer();
    test_gates();
    test_topk();
    test_selected();
    test_coarse();
  }
}

const Family family("sparse", run_sparse);

}  // namespace
