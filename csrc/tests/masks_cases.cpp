// Block lists of random masks over odd sizes, against each pair's rule.
#include <algorithm>

#include "tests.h"

namespace {

const int64_t lengths[] = {1, 2, 5, 31, 47, 48, 49, 63, 64, 65, 96, 97, 130, 200, 257}, blocks[] = {1, 3, 16, 48, 64};

struct Case {
  attnkit_block_list s{};
  std::vector<attnkit_mask_node> nodes;
  std::vector<std::vector<int64_t>> numbers;  // what nodes point to
  std::vector<std::vector<uint8_t>> flags;

  Case() {
    s.m = below(30) ? pick(lengths) : 0, s.n = below(30) ? pick(lengths) : 0;
    s.batches = 1 + below(3), s.heads = 1 + below(3), s.block_q = pick(blocks), s.block_k = 1 + below(64);
    if (below(2)) s.block_q = ATTNKIT_BLOCK_QUERIES, s.block_k = ATTNKIT_BLOCK_KEYS;
    add_leaf();
    for (int64_t more = below(4); more > 0; --more) {
      add_leaf();
      const int64_t count = static_cast<int64_t>(nodes.size());
      if (below(3) == 0) add(ATTNKIT_MASK_NOT, below(count), 0);
      else add(below(2) ? ATTNKIT_MASK_AND : ATTNKIT_MASK_OR, below(count), count - 1);
    }
    s.nodes = nodes.data(), s.count = static_cast<int64_t>(nodes.size());
  }

  attnkit_mask_node& add(int64_t kind, int64_t a, int64_t b) {
    nodes.push_back({nullptr, kind, a, b, 1, 1});
    return nodes.back();
  }

  void add_leaf() {
    int64_t kind = ATTNKIT_MASK_INTERVAL + below(10);
    if (s.m > s.n && (kind == ATTNKIT_MASK_DOCUMENTS || kind == ATTNKIT_MASK_BLOCK_SPARSE)) kind = ATTNKIT_MASK_PREFIX;
    const int64_t width = 1 + below(below(2) ? 9 : 150);
    attnkit_mask_node& node = add(kind, width, 0);
    if (kind == ATTNKIT_MASK_INTERVAL) {
      node.a = below(4) ? below(s.n + 1) - 2 : int64_t{1} << 62;
      node.b = below(4) ? below(9) - 2 : int64_t{1} << 62;
    }
    if (kind == ATTNKIT_MASK_DILATED) node.b = 1 + below(70);
    if (kind == ATTNKIT_MASK_FIXED) node.b = below(width + 1);
    if (kind == ATTNKIT_MASK_GLOBAL) {
      std::vector<int64_t> runs;
      for (int64_t at = below(9), last; (last = at + below(70)) < s.n + 80 && below(4); at = last + 2 + below(90))
        runs.push_back(at), runs.push_back(last);
      node.a = static_cast<int64_t>(runs.size()) / 2;
      node.data = kept(std::move(runs));
    }
    if (kind == ATTNKIT_MASK_DOCUMENTS) {
      node.a = s.n + below(3), node.batches = below(2) ? s.batches : 1;
      std::vector<int64_t> ids;
      int64_t id = below(3);
      for (int64_t i = 0; i < node.batches * node.a; ++i) ids.push_back(below(20) ? id : id = below(4) - 1);
      node.data = kept(std::move(ids));
    }
    if (kind == ATTNKIT_MASK_PADDING) {
      node.a = s.n + below(3), node.batches = below(2) ? s.batches : 1;
      std::vector<uint8_t> real;
      const bool runs = below(2);
      uint8_t now = 1;
      for (int64_t i = 0; i < node.batches * node.a; ++i)
        real.push_back(now = runs && below(40) ? now : static_cast<uint8_t>(below(2) * (1 + below(255))));
      node.data = kept(std::move(real));
    }
    if (kind == ATTNKIT_MASK_BLOCK_SPARSE) {
      node.b = (s.n + width - 1) / width + below(2), node.heads = below(2) ? s.heads : 1;
      std::vector<uint8_t> layout;
      for (int64_t i = 0; i < node.heads * node.b * node.b; ++i) layout.push_back(static_cast<uint8_t>(below(2)));
      node.data = kept(std::move(layout));
    }
  }

  const void* kept(std::vector<int64_t> x) { return numbers.push_back(std::move(x)), numbers.back().data(); }
  const void* kept(std::vector<uint8_t> x) { return flags.push_back(std::move(x)), flags.back().data(); }

  bool sees(int64_t at, int64_t batch, int64_t head, int64_t q, int64_t k) const {
    const attnkit_mask_node& node = nodes[at];
    const int64_t gap = q - k, a = node.a, b = node.b;
    const auto* whole = static_cast<const int64_t*>(node.data);
    const auto* bytes = static_cast<const uint8_t*>(node.data);
    const auto chunk = [&](int64_t x) { return static_cast<int64_t>(std::floor(static_cast<double>(x) / static_cast<double>(a))); };
    if (node.batches == 1) batch = node.kind > ATTNKIT_MASK_NOT ? 0 : batch;
    if (node.heads == 1) head = node.kind > ATTNKIT_MASK_NOT ? 0 : head;
    switch (node.kind) {
      case ATTNKIT_MASK_AND: return sees(a, batch, head, q, k) && sees(b, batch, head, q, k);
      case ATTNKIT_MASK_OR: return sees(a, batch, head, q, k) || sees(b, batch, head, q, k);
      case ATTNKIT_MASK_NOT: return !sees(a, batch, head, q, k);
      case ATTNKIT_MASK_INTERVAL: return k >= q - a && k <= q + b;
      case ATTNKIT_MASK_DILATED: return gap >= 0 && gap % b == 0 && gap / b < a;
      case ATTNKIT_MASK_STRIDED: return gap >= 0 && (gap <= a || gap % a == 0);
      case ATTNKIT_MASK_FIXED: return gap >= 0 && (chunk(q) == chunk(k) || k % a >= a - b);
      case ATTNKIT_MASK_CHUNKED: return chunk(q) == chunk(k);
      case ATTNKIT_MASK_PREFIX: return gap >= 0 || k < a;
      case ATTNKIT_MASK_GLOBAL:
        for (int64_t r = 0; r < a; ++r)
          for (const int64_t x : {q, k})
            if (x >= whole[2 * r] && x <= whole[2 * r + 1]) return true;
        return false;
      case ATTNKIT_MASK_DOCUMENTS: return whole[batch * a + q] == whole[batch * a + k];
      case ATTNKIT_MASK_PADDING: return bytes[batch * a + k] != 0;
      default: return bytes[(head * b + q / a) * b + k / a] != 0;
    }
  }
};

// What is wrong with the list, or null.
const char* judge(const Case& c, const std::vector<std::vector<int64_t>>& patterns) {
  const attnkit_block_list& s = c.s;
  const int64_t rows = (s.m + s.block_q - 1) / s.block_q;
  if (s.offsets[0] != 0 || s.offsets[s.batches * s.heads * rows] != s.found[0]) return "offsets do not span the list";
  for (size_t i = 0; i < patterns.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      if (patterns[i] == patterns[j]) return "a pattern stands there twice";
  for (int64_t row = 0; row < s.batches * s.heads * rows; ++row) {
    int64_t entry = s.offsets[row], first = row % rows * s.block_q;
    for (int64_t block = 0; block * s.block_k < s.n; ++block) {
      const bool listed = entry < s.offsets[row + 1] && s.columns[entry] == block;
      const int32_t pattern = listed ? s.pattern[entry++] : 0;
      if (listed && (pattern < -1 || pattern >= static_cast<int64_t>(patterns.size()))) return "no such pattern";
      bool some = false, every = true;
      for (int64_t i = 0; i < s.block_q; ++i) {
        uint64_t word = 0;
        for (int64_t j = 0; j < s.block_k && first + i < s.m && block * s.block_k + j < s.n; ++j) {
          const bool seen = c.sees(s.count - 1, row / rows / s.heads, row / rows % s.heads, s.n - s.m + first + i,
                                   block * s.block_k + j);
          word |= static_cast<uint64_t>(seen) << j;
          some = some || seen, every = every && seen;
        }
        if (listed && pattern >= 0 && static_cast<uint64_t>(patterns[pattern][i]) != word) return "a wrong pattern";
      }
      if (some != listed) return some ? "a block is missing" : "an empty block is listed";
      if (listed && every != (pattern < 0)) return every ? "a full block has a pattern" : "a block is not full";
    }
    if (entry != s.offsets[row + 1]) return "blocks are not in order";
  }
  return nullptr;
}

void test_answer() {
  Case c;
  attnkit_block_list& s = c.s;
  int64_t found[2];
  s.found = found;
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    const int64_t needed = attnkit_block_bounds_scratch_bytes(&s);
    const Scratch scratch(needed < 0 ? 0 : needed);
    int32_t status = attnkit_block_bounds(&s, scratch.data(), scratch.bytes());
    count_call();
    const char* wrong = status == ATTNKIT_OK ? nullptr : "bounds refused";
    std::vector<int64_t> offsets(static_cast<size_t>(s.batches * s.heads * ((s.m + s.block_q - 1) / s.block_q) + 1)), words;
    std::vector<int32_t> columns(static_cast<size_t>(wrong ? 0 : found[0])), pattern(columns.size()), table;
    s.offsets = offsets.data(), s.columns = columns.data(), s.pattern = pattern.data();
    s.entries = static_cast<int64_t>(columns.size());
    const int64_t partial = wrong ? 0 : found[1];
    for (s.room = below(2) ? partial : below(partial + 1); !wrong; s.room = partial) {
      words.assign(static_cast<size_t>(s.room * s.block_q), -1);
      for (s.slots = 1; s.slots <= s.room;) s.slots *= 2;
      table.assign(static_cast<size_t>(s.slots), 0);
      s.patterns = words.data(), s.table = table.data();
      status = attnkit_block_list_fill(&s, scratch.data(), scratch.bytes());
      if (status != ATTNKIT_OK) wrong = "refused";
      else if (found[1] < 0 && s.room < partial) continue;  // there were more patterns than room
      else if (found[1] < 0 || found[0] > s.entries || found[1] > s.room) wrong = "more than the bounds";
      break;
    }
    std::vector<std::vector<int64_t>> patterns;
    for (int64_t p = 0; !wrong && p < found[1]; ++p)
      patterns.emplace_back(words.begin() + p * s.block_q, words.begin() + (p + 1) * s.block_q);
    if (!wrong) wrong = judge(c, patterns);
    if (wrong)
      fail("masks level %s m %d n %d blocks %d x %d nodes %d, the last of kind %d: %s, status %d", attnkit_level_name(level),
           int(s.m), int(s.n), int(s.block_q), int(s.block_k), int(s.count), int(c.nodes.back().kind), wrong, status);
  }
}

// A call with one thing wrong with it is refused before anything is touched.
void test_refusal() {
  Case c;
  attnkit_block_list& s = c.s;
  int64_t found[2] = {-7, -7};
  s.found = found;
  const int64_t absurd[] = {INT64_MIN, -1, INT64_MAX, int64_t{1} << 62, int64_t{1} << 57};
  int64_t* const number[] = {&s.count, &s.batches, &s.heads, &s.m, &s.n, &s.block_q, &s.block_k};
  attnkit_mask_node& node = c.nodes[below(s.count)];
  const int64_t what = below(5), needed = attnkit_block_bounds_scratch_bytes(&s);
  const Scratch scratch(needed);
  int32_t expected = ATTNKIT_BAD_MASK;
  if (what == 0) *pick(number) = pick(absurd), expected = ATTNKIT_BAD_SIZE;
  if (what == 1) node.kind = below(2) ? -1 : 13;
  if (what == 2) node.batches = s.batches + 1;
  if (what == 3) node.a = INT64_MIN;
  if (what == 4) {
    if (needed < 64) return;
    s.found = nullptr, expected = ATTNKIT_BAD_SIZE;
  }
  const int32_t status = attnkit_block_bounds(&s, scratch.data(), scratch.bytes());
  count_call();
  if (status != expected) fail("masks refusal %d: status %d, expected %d", int(what), status, expected);
  if (found[0] != -7 || found[1] != -7) fail("masks refusal %d: something was written", int(what));
}

void run_masks(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
  }
}

const Family family("masks", run_masks);

}  // namespace
