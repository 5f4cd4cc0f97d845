// Attention over every form of a decoding state against plain loops over the numbers that its codes mean.
//
// Tokens that no query sees, slots of pages that hold no token and pages that no sequence has are NaN.
#include <algorithm>

#include "softmax_call.h"

namespace {

const int64_t lengths[] = {1, 2, 5, 31, 32, 33, 63, 64, 65, 100, 130, 257, 300, 700};
const int64_t channels[] = {1, 3, 16, 33, 64, 65, 96, 111, 128, 140}, heads[] = {1, 2, 3, 4, 5};
const int64_t absurd[] = {INT64_MIN, -1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62, int64_t{1} << 57};

uint16_t bfloat16(double x) {
  const float single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

struct CacheCall {
  SoftmaxCall c;
  attnkit_cache s{};
  std::vector<uint8_t> k_codes, v_codes;
  std::vector<float> k_scale, v_scale;
  std::vector<uint16_t> k_scales, k_zeros, v_scales, v_zeros;
  std::vector<int64_t> held;  // tokens of each sequence
  std::vector<int32_t> tables;
  Numbers recent, k_pages, v_pages;

  explicit CacheCall(int64_t g, int64_t n)
      : c(1 + below(2), g * pick(heads), g, 1 + below(std::min<int64_t>(n, below(2) ? 1 : 50)), n, pick(channels),
          pick(channels), static_cast<int32_t>(below(3))),
        recent(0, 0), k_pages(0, 0), v_pages(0, 0) {
    c.s.scale = 0.1f, c.s.kernel = ATTNKIT_DECODE;  // which has no dropout
    s.form = static_cast<int32_t>(below(4));
  }

  // The shared part of the call, once `c` has its features.
  void start() {
    const attnkit_softmax& a = c.s;
    s.q = a.q, s.k = a.k, s.v = a.v, s.o = a.o, s.lse = a.lse, s.bias = a.bias, s.alibi = a.alibi, s.sink = a.sink;
    s.offsets = a.offsets, s.columns = a.columns, s.pattern = a.pattern, s.patterns = a.patterns;
    s.b = a.b, s.h = a.h, s.g = a.g, s.m = a.m, s.n = a.n, s.d = a.d, s.e = a.e;
    s.q_b = a.q_b, s.q_h = a.q_h, s.q_m = a.q_m, s.k_b = a.k_b, s.k_g = a.k_g, s.k_n = a.k_n;
    s.v_b = a.v_b, s.v_g = a.v_g, s.v_n = a.v_n, s.o_b = a.o_b, s.o_h = a.o_h, s.o_m = a.o_m;
    s.bias_b = a.bias_b, s.bias_h = a.bias_h, s.bias_m = a.bias_m, s.bias_n = a.bias_n;
    s.left = a.left, s.right = a.right, s.mask_batches = a.mask_batches, s.mask_heads = a.mask_heads;
    s.threads = a.threads, s.dtype = a.dtype, s.scale = a.scale, s.softcap = a.softcap;
  }

  // No query of the KV head sees the token.
  bool hidden(int64_t b, int64_t g, int64_t j) const {
    const int64_t of_group = s.h / s.g;
    for (int64_t row = (b * s.h + g * of_group) * s.m; row < (b * s.h + (g + 1) * of_group) * s.m; ++row)
      if (c.visible[row * s.n + j]) return false;
    return true;
  }

  // Rows one after the other: what the definition reads are the numbers that codes mean.
  void in_order() {
    c.s.k_n = s.d, c.s.k_g = s.n * s.d, c.s.k_b = s.g * c.s.k_g;
    c.s.v_n = s.e, c.s.v_g = s.n * s.e, c.s.v_b = s.g * c.s.v_g;
    c.k.values.assign(static_cast<size_t>(s.b * c.s.k_b), 0.0);
    c.v.values.assign(static_cast<size_t>(s.b * c.s.v_b), 0.0);
  }

  // One byte a number and one scale a token.
  void store_bytes(int64_t size, std::vector<double>& numbers, std::vector<uint8_t>& codes, std::vector<float>& scales) {
    for (int64_t token = 0; token < s.b * s.g * s.n; ++token) {
      const double largest = s.form == ATTNKIT_INT8 ? 127.0 : 448.0;
      const float scale = static_cast<float>((uniform() + 1.5) / largest);
      for (int64_t i = 0; i < size; ++i) {
        int64_t code = s.form == ATTNKIT_INT8 ? below(255) - 127 : below(127) + (below(2) ? 128 : 0);
        double number = static_cast<double>(code);
        if (s.form == ATTNKIT_FP8) {
          const int64_t exponent = code >> 3 & 15, mantissa = code & 7;
          if (exponent == 0) code &= 128;  // no subnormal codes
          number = exponent == 0 ? 0.0 : std::ldexp(8.0 + static_cast<double>(mantissa), static_cast<int>(exponent) - 10);
          if (code & 128) number = -number;
        }
        codes.push_back(static_cast<uint8_t>(code));
        numbers[token * size + i] = static_cast<double>(scale) * number;
      }
      scales.push_back(hidden(token / s.n / s.g, token / s.n % s.g, token % s.n) ? NAN : scale);
    }
    codes.shrink_to_fit(), scales.shrink_to_fit();
  }

  static int64_t packed(int64_t size) { return size / 128 * 64 + (size % 128 == 0 ? 0 : size % 128 <= 64 ? 32 : 64); }
  // Puts a code where attnkit.state.codec says.
  static void pack(uint8_t* row, int64_t size, int64_t i, int64_t code) {
    const int64_t start = i / 128 * 128, j = (i - start) / 32, pair = i % 32 / 2, h = i % 2;
    const int64_t at = size - start > 64 ? 4 * pair + 2 * h + j / 2 : 2 * pair + h;
    row[start / 2 + at] = static_cast<uint8_t>(row[start / 2 + at] | code << j % 2 * 4);
  }
  void store_half_bytes() {
    s.group = 32 * (1 + below(2)), s.channels = 32 * (1 + below(4) / 3);
    const int64_t groups = s.n / s.group, parts = (s.e + s.channels - 1) / s.channels;
    const int64_t k_row = packed(s.d), v_row = packed(s.e);
    k_codes.assign(static_cast<size_t>(s.b * s.g * std::max<int64_t>(groups * s.group, 1) * k_row), 0);
    v_codes.assign(static_cast<size_t>(s.b * s.g * s.n * v_row), 0);
    s.k_n = k_row, s.k_g = groups * s.group * k_row, s.k_b = s.g * s.k_g;
    s.v_n = v_row, s.v_g = s.n * v_row, s.v_b = s.g * s.v_g;
    s.k_scale_g = groups * s.d, s.k_scale_b = s.g * s.k_scale_g;
    s.v_scale_g = s.n * parts, s.v_scale_b = s.g * s.v_scale_g;
    s.recent_g = 2 * s.group * s.d, s.recent_b = s.g * s.recent_g;
    recent = Numbers(s.b * s.recent_b, s.dtype);
    const auto scale = [] { return static_cast<double>(1 + below(4)) / 32.0; };
    const auto middle = [] { return std::round(uniform() * 64.0) / 32.0; };
    for (int64_t head = 0; head < s.b * s.g; ++head) {
      for (int64_t group = 0; group < groups; ++group) {
        bool seen = false;
        for (int64_t j = group * s.group; j < (group + 1) * s.group; ++j) seen |= !hidden(head / s.g, head % s.g, j);
        for (int64_t i = 0; i < s.d; ++i) {
          const double by = scale(), zero = middle();
          k_scales.push_back(seen ? bfloat16(by) : 0x7fc0), k_zeros.push_back(bfloat16(zero));
          for (int64_t j = group * s.group; j < (group + 1) * s.group; ++j) {
            const int64_t code = below(16);
            pack(&k_codes[(head * groups * s.group + j) * k_row], s.d, i, code);
            c.k.values[(head * s.n + j) * s.d + i] = zero + by * static_cast<double>(code);
          }
        }
      }
      for (int64_t j = groups * s.group; j < s.n; ++j)
        for (int64_t i = 0; i < s.d; ++i)
          c.k.values[(head * s.n + j) * s.d + i] = recent.values[(head * 2 * s.group + j % (2 * s.group)) * s.d + i];
      for (int64_t j = 0; j < s.n; ++j)
        for (int64_t part = 0; part < parts; ++part) {
          const double by = scale(), zero = middle();
          v_scales.push_back(hidden(head / s.g, head % s.g, j) ? 0x7fc0 : bfloat16(by)), v_zeros.push_back(bfloat16(zero));
          for (int64_t i = part * s.channels; i < std::min(s.e, (part + 1) * s.channels); ++i) {
            const int64_t code = below(16);
            pack(&v_codes[(head * s.n + j) * v_row], s.e, i, code);
            c.v.values[(head * s.n + j) * s.e + i] = zero + by * static_cast<double>(code);
          }
        }
    }
    if (k_scales.empty()) k_scales.push_back(0), k_zeros.push_back(0);
    for (std::vector<uint16_t>* x : {&k_scales, &k_zeros, &v_scales, &v_zeros}) x->shrink_to_fit();
    s.k = k_codes.data(), s.v = v_codes.data(), s.recent = recent.data();
    s.k_scale = k_scales.data(), s.k_zero = k_zeros.data(), s.v_scale = v_scales.data(), s.v_zero = v_zeros.data();
  }

  void store_codes() {
    in_order();
    if (s.form == ATTNKIT_INT4) return store_half_bytes();
    store_bytes(s.d, c.k.values, k_codes, k_scale);
    store_bytes(s.e, c.v.values, v_codes, v_scale);
    s.k = k_codes.data(), s.v = v_codes.data(), s.k_scale = k_scale.data(), s.v_scale = v_scale.data();
    s.k_n = s.d, s.k_g = s.n * s.d, s.k_b = s.g * s.k_g, s.v_n = s.e, s.v_g = s.n * s.e, s.v_b = s.g * s.v_g;
    s.k_scale_g = s.v_scale_g = s.n, s.k_scale_b = s.v_scale_b = s.g * s.n;
  }

  // A table for pages of so many tokens, in any order.
  void choose_pages(int64_t page) {
    s.page = page, s.pages_b = (s.n + s.page - 1) / s.page + below(2), s.page_count = s.b * s.pages_b + 3;
    std::vector<int32_t> order;
    for (int64_t i = 0; i < s.page_count; ++i) order.push_back(static_cast<int32_t>(i));
    for (int64_t i = s.page_count - 1; i > 0; --i) std::swap(order[i], order[below(i + 1)]);
    tables.assign(order.begin(), order.begin() + s.b * s.pages_b);
    s.pages = tables.data();
  }

  // Rows of `size`, each of so many tokens, from one buffer (b, g, count, size) onto the pages; the rest is `spare`.
  template <class T>
  void scatter(std::vector<T>& rows, int64_t count, int64_t size, int64_t tokens, T spare) {
    if (rows.empty()) return;
    const int64_t a_page = s.page / tokens;
    std::vector<T> pages(static_cast<size_t>(s.page_count * s.g * a_page * size), spare);
    for (int64_t head = 0; head < s.b * s.g; ++head)
      for (int64_t j = 0; j < count; ++j) {
        const int64_t page = tables[head / s.g * s.pages_b + j / a_page];
        std::copy_n(rows.begin() + (head * count + j) * size, size,
                    pages.begin() + ((page * s.g + head % s.g) * a_page + j % a_page) * size);
      }
    rows = pages;
    rows.shrink_to_fit();
  }

  // Codes that were stored in order, on scattered pages of whole tiles and groups.
  void scatter_codes() {
    const bool grouped = s.form == ATTNKIT_INT4;
    choose_pages((grouped ? s.group : 32) * (1 + below(3)));
    const int64_t keys = grouped ? s.group : 1, parts = grouped ? (s.e + s.channels - 1) / s.channels : 1;
    const int64_t groups = s.n / keys;
    scatter<uint8_t>(k_codes, groups * keys, s.k_n, 1, 0x77), scatter<uint8_t>(v_codes, s.n, s.v_n, 1, 0x77);
    scatter<float>(k_scale, s.n, 1, 1, NAN), scatter<float>(v_scale, s.n, 1, 1, NAN);
    scatter<uint16_t>(k_scales, groups, s.d, keys, 0x7fc0), scatter<uint16_t>(k_zeros, groups, s.d, keys, 0x7fc0);
    scatter<uint16_t>(v_scales, s.n, parts, 1, 0x7fc0), scatter<uint16_t>(v_zeros, s.n, parts, 1, 0x7fc0);
    s.k = k_codes.data(), s.v = v_codes.data();
    s.k_g = s.page * s.k_n, s.k_b = s.g * s.k_g, s.v_g = s.page * s.v_n, s.v_b = s.g * s.v_g;
    s.k_scale = k_scale.data(), s.v_scale = v_scale.data();
    if (grouped) s.k_scale = k_scales.data(), s.k_zero = k_zeros.data(), s.v_scale = v_scales.data(), s.v_zero = v_zeros.data();
    s.k_scale_g = grouped ? s.page / keys * s.d : s.page, s.k_scale_b = s.g * s.k_scale_g;
    s.v_scale_g = s.page * parts, s.v_scale_b = s.g * s.v_scale_g;
  }

  // Sequences of several lengths on scattered pages.
  void store_pages() {
    in_order();
    const int64_t sizes[] = {1, 7, 16, 32, 48, 64};
    choose_pages(pick(sizes));
    s.k_n = s.d, s.k_g = s.page * s.d, s.k_b = s.g * s.k_g, s.v_n = s.e, s.v_g = s.page * s.e, s.v_b = s.g * s.v_g;
    k_pages = Numbers(s.page_count * s.k_b, s.dtype), v_pages = Numbers(s.page_count * s.v_b, s.dtype);
    Numbers k_whole = k_pages, v_whole = v_pages;
    k_pages.poison(), v_pages.poison();
    for (int64_t b = 0; b < s.b; ++b)
      for (int64_t g = 0; g < s.g; ++g)
        for (int64_t j = 0; j < held[b]; ++j) {
          const int64_t page = tables[b * s.pages_b + j / s.page];
          copy(k_pages, k_whole, page * s.k_b + g * s.k_g + j % s.page * s.d, s.d, &c.k.values[((b * s.g + g) * s.n + j) * s.d],
               hidden(b, g, j));
          copy(v_pages, v_whole, page * s.v_b + g * s.v_g + j % s.page * s.e, s.e, &c.v.values[((b * s.g + g) * s.n + j) * s.e],
               hidden(b, g, j));
        }
    for (int64_t b = 0; b < s.b; ++b)
      for (int64_t i = (held[b] + s.page - 1) / s.page; i < s.pages_b; ++i) tables[b * s.pages_b + i] = -1;
    s.k = k_pages.data(), s.v = v_pages.data(), s.lengths = held.data();
  }
  static void copy(Numbers& to, const Numbers& from, int64_t at, int64_t size, double* meant, bool hidden) {
    for (int64_t i = 0; i < size; ++i) {
      meant[i] = from.values[at + i];
      if (hidden) continue;
      if (to.as_float.empty()) to.as_half[at + i] = from.as_half[at + i];
      else to.as_float[at + i] = from.as_float[at + i];
    }
  }

  // Each sequence has its own length; its queries are its last tokens.
  void make_ragged() {
    c.s.left = below(2) ? int64_t{1} << 62 : below(s.n + 1), c.s.right = below(2) ? 0 : int64_t{1} << 62;
    for (int64_t b = 0; b < s.b; ++b) held.push_back(b == 0 ? s.n : s.m + below(s.n - s.m + 1));
    for (int64_t at = 0; at < s.b * s.h * s.m * s.n; ++at) {
      const int64_t j = at % s.n, i = at / s.n % s.m, length = held[at / s.n / s.m / s.h], position = length - s.m + i;
      c.visible[at] = j < length && j >= position - c.s.left && j <= position + c.s.right;
    }
  }
};

void test_cache() {
  CacheCall call(1 + below(2), pick(lengths));
  attnkit_cache& s = call.s;
  call.start();
  if (s.form == ATTNKIT_PLAIN && below(2)) {
    call.make_ragged();
    call.start();
    call.store_pages();
  } else {
    // A block list is for at most 48 queries.
    if (s.m <= ATTNKIT_BLOCK_QUERIES) call.c.add_features();
    call.c.s.total = nullptr;  // a call of a cache has no forget gates
    call.start();
    if (s.form != ATTNKIT_PLAIN) call.store_codes();
    if (s.form != ATTNKIT_PLAIN && below(2)) call.scatter_codes();
  }
  call.c.define();
  static const char* const names[] = {"numbers", "int8", "fp8", "int4"};
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    const int64_t needed = attnkit_cache_forward_scratch_bytes(&s);
    const Scratch scratch(needed < 0 ? 0 : needed);
    call.c.o.poison();
    const int32_t status = attnkit_cache_forward(&s, scratch.data(), scratch.bytes());
    count_call();
    const double error = status == ATTNKIT_OK ? call.c.error() : INFINITY;
    if (!(error < allowed(s.dtype)))
      fail("cache level %s: %s page %lld b %lld h %lld g %lld m %lld n %lld d %lld e %lld dtype %d: status %d, error %g",
           attnkit_level_name(level), names[s.form], static_cast<long long>(s.page), static_cast<long long>(s.b),
           static_cast<long long>(s.h), static_cast<long long>(s.g), static_cast<long long>(s.m),
           static_cast<long long>(s.n), static_cast<long long>(s.d), static_cast<long long>(s.e), s.dtype, status, error);
  }
}

// A call with one number out of range, or bad scratch memory, is refused before anything is touched.
void test_refusals() {
  CacheCall call(1, 40);
  attnkit_cache& s = call.s;
  call.start();
  if (s.form == ATTNKIT_PLAIN) {
    call.make_ragged();
    call.start();
    call.store_pages();
  } else {
    call.store_codes();
    if (below(2)) call.scatter_codes();
  }
  const int64_t needed = attnkit_cache_forward_scratch_bytes(&s);
  const Scratch scratch(needed < 0 ? 0 : needed + 64);
  const bool shifted = below(2);
  int32_t status = shifted ? attnkit_cache_forward(&s, scratch.data() + 1 + below(63), needed)
                           : attnkit_cache_forward(&s, scratch.data(), needed - 1);
  if (status != ATTNKIT_SMALL_SCRATCH) fail("cache: status %d with bad scratch memory", status);
  std::vector<int64_t*> numbers = {&s.b,   &s.h,   &s.g,   &s.m,   &s.n,   &s.d,   &s.e,   &s.q_b, &s.q_h, &s.q_m,
                                   &s.k_b, &s.k_g, &s.k_n, &s.v_b, &s.v_g, &s.v_n, &s.o_b, &s.o_m, &s.threads};
  if (s.pages) numbers.insert(numbers.end(), {&s.page, &s.page_count, &s.pages_b});
  if (s.lengths) numbers.push_back(&call.held[0]);
  if (s.form != ATTNKIT_PLAIN) numbers.insert(numbers.end(), {&s.k_scale_b, &s.k_scale_g, &s.v_scale_b, &s.v_scale_g});
  if (s.form == ATTNKIT_INT4) numbers.insert(numbers.end(), {&s.group, &s.channels, &s.recent_b, &s.recent_g});
  int64_t& number = *numbers[below(static_cast<int64_t>(numbers.size()))];
  const int64_t before = number;
  number = pick(absurd);
  status = attnkit_cache_forward(&s, nullptr, INT64_MAX);
  count_call();
  if (attnkit_cache_forward_scratch_bytes(&s) >= 0 || status == ATTNKIT_OK)
    fail("cache: number %lld is not refused", static_cast<long long>(number));
  number = before;
  if (s.pages) {
    int32_t& page = call.tables[0];
    const int32_t good = page;
    page = below(2) ? -1 : static_cast<int32_t>(s.page_count);
    if (attnkit_cache_forward(&s, scratch.data(), needed) != ATTNKIT_BAD_PAGE) fail("cache: page %d is not refused", page);
    page = good;
  }
}

void run_cache(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_cache();
    test_refusals();
  }
}

const Family family("cache", run_cache);

}  // namespace
