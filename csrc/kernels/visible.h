// Which keys a query may see: an interval around its position, and a block list. Both answer with one word per query
// and block of 64 keys.
//
// Query i sits at position n - m + i and sees keys [position - left, position + right]. A block list names, for every block
// of 48 queries, the blocks of 64 keys in which some query sees some key, in ascending order; each entry has 48 words of its
// own, or none when everything in the block is visible. What both allow is visible. Blocks outside the interval are
// skipped by two searches in the list, so the cost follows the blocks that are not empty.
//
// Blocking: 48 queries are eight groups of the micro-kernel's six rows; 64 keys are a machine word, and a whole number of
// strips at every level.

constexpr int64_t kBlockQueries = ATTNKIT_BLOCK_QUERIES;
constexpr int64_t kBlockKeys = ATTNKIT_BLOCK_KEYS;
constexpr uint64_t kAll = ~uint64_t{0};

struct Range {
  int64_t begin, end;
  ATTNKIT_INLINE bool empty() const { return end <= begin; }
};

// Keys that query `i` sees through the interval.
ATTNKIT_INLINE Range visible_range(const attnkit_softmax& s, int64_t i) {
  const int64_t position = s.n - s.m + i;
  return {clamp<int64_t>(position - s.left, 0, s.n), clamp<int64_t>(position + s.right + 1, 0, s.n)};
}

// Bits [begin, end) of a block of 64.
ATTNKIT_INLINE uint64_t bit_range(int64_t begin, int64_t end) {
  begin = most<int64_t>(begin, 0);
  end = least<int64_t>(end, kBlockKeys);
  return end <= begin ? 0 : (kAll >> (kBlockKeys - (end - begin))) << begin;
}

// The key blocks of one block of queries, from the interval alone or from the block list cut to it.
struct KeyBlocks {
  const attnkit_softmax& s;
  int64_t entry, entry_end;  // into columns, or the block numbers themselves without a list

  KeyBlocks(const attnkit_softmax& call, int64_t batch, int64_t head, int64_t query_block, Range keys) : s(call) {
    const int64_t begin = keys.begin / kBlockKeys, end = keys.empty() ? begin : ceil_div(keys.end, kBlockKeys);
    if (!s.offsets) {
      entry = begin;
      entry_end = end;
      return;
    }
    const int64_t blocks = ceil_div(s.m, kBlockQueries);
    const int64_t list = ((s.mask_batches == 1 ? 0 : batch) * s.mask_heads + (s.mask_heads == 1 ? 0 : head)) * blocks;
    entry = lower_bound(s.offsets[list + query_block], s.offsets[list + query_block + 1], begin);
    entry_end = lower_bound(entry, s.offsets[list + query_block + 1], end);
  }

  ATTNKIT_INLINE int64_t key_block(int64_t at) const { return s.offsets ? s.columns[at] : at; }
  // The 48 words of a partial block, or null when every row sees all of it.
  ATTNKIT_INLINE const int64_t* words(int64_t at) const {
    return s.offsets && s.pattern[at] >= 0 ? s.patterns + s.pattern[at] * kBlockQueries : nullptr;
  }

 private:
  int64_t lower_bound(int64_t begin, int64_t end, int64_t column) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (s.columns[middle] < column) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
};

// Keys of one block that query `i` sees, `keys` through the interval; `words` as KeyBlocks::words gives them.
ATTNKIT_INLINE uint64_t visible_word(int64_t i, Range keys, int64_t key_block, const int64_t* words) {
  const uint64_t inside = bit_range(keys.begin - key_block * kBlockKeys, keys.end - key_block * kBlockKeys);
  return words ? inside & static_cast<uint64_t>(words[i % kBlockQueries]) : inside;
}
ATTNKIT_INLINE uint64_t visible_word(const attnkit_softmax& s, int64_t i, int64_t key_block, const int64_t* words) {
  return visible_word(i, visible_range(s, i), key_block, words);
}
