// The block list of a mask, from the formula of the mask: no tensor of queries times keys is made.
//
// A mask is a list of nodes, leaves and what combines them. For one block of queries at a time, each node gets a state
// for every key block: kSome when a pair of the tile may be visible, kEvery when all surely are. AND and OR of states
// are those of bits. A tile that ends as kSome alone is looked at: each node gives one word of 64 keys for each of its
// rows, made from ranges and combs of bits. What turns out empty is left out, what turns out whole is a full block, and
// of the rest equal patterns are stored once: a table with open addressing finds them, in order of first appearance.
//
// Each leaf first sums up what depends on keys alone. On one Zen 4 core, 131,072 queries and keys in blocks of 48 x 64
// take 30 ms when causal (2.8 million entries), and about 100 where 300,000 tiles need a look (strided, dilated).

constexpr uint8_t kSome = 1, kEvery = 2;
constexpr uint64_t kAllBits = ~uint64_t{0};

ATTNKIT_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
ATTNKIT_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// Bits [begin, end) of a word.
ATTNKIT_INLINE uint64_t word_range(int64_t begin, int64_t end) {
  begin = most<int64_t>(begin, 0);
  end = least<int64_t>(end, 64);
  return end <= begin ? 0 : (kAllBits >> (64 - (end - begin))) << begin;
}

// Every step-th bit, from the first on.
ATTNKIT_INLINE uint64_t comb(int64_t step) {
  uint64_t word = 0;
  for (int64_t bit = 0; bit < 64; bit += step) word |= uint64_t{1} << bit;
  return word;
}

class BlockLists {
 public:
  explicit BlockLists(const attnkit_block_list& call)
      : s_(call),
        nodes_(static_cast<const attnkit_mask_node*>(call.nodes)),
        query_blocks_(ceil_div(call.m, call.block_q)),
        key_blocks_(ceil_div(call.n, call.block_k)) {}

  int64_t scratch_bytes() const {
    int64_t bytes = 0;
    for (int64_t i = 0; i < s_.count; ++i) bytes += node_bytes(nodes_[i]);
    return bytes + pointer_bytes();
  }

  void bounds(char* scratch) const {
    const Work work(*this, scratch);
    int64_t entries = 0, partial = 0;
    each_row(work, [&](Rows, const uint8_t* state) {
      for (int64_t j = 0; j < key_blocks_; ++j) {
        entries += state[j] & kSome;
        partial += state[j] == kSome;
      }
      return true;
    });
    s_.found[0] = entries;
    s_.found[1] = partial;
  }

  void fill(char* scratch) const {
    const Work work(*this, scratch);
    int64_t entries = 0, patterns = 0, row = 0;
    const bool fits = each_row(work, [&](Rows rows, const uint8_t* state) {
      s_.offsets[row++] = entries;
      for (int64_t j = 0; j < key_blocks_; ++j) {
        if (!(state[j] & kSome)) continue;
        int32_t pattern = -1;
        if (!(state[j] & kEvery)) {
          const uint64_t* words = look(work, rows, j);
          uint64_t any = 0, all = kAllBits;
          for (int64_t i = 0; i < rows.count; ++i) {
            any |= words[i];
            all &= words[i];
          }
          if (any == 0) continue;
          if (all != exists(j)) {
            pattern = stored(words, patterns);
            if (pattern < 0) return false;
          }
        }
        if (entries == s_.entries) return false;
        s_.columns[entries] = static_cast<int32_t>(j);
        s_.pattern[entries++] = pattern;
      }
      return true;
    });
    s_.offsets[row] = entries;
    s_.found[0] = entries;
    s_.found[1] = fits ? patterns : -1;
  }

 private:
  // One block of queries: positions [first, first + count).
  struct Rows {
    int64_t first, count;
    ATTNKIT_INLINE int64_t last() const { return first + count - 1; }
  };
  // A leaf's summary of the keys, and what a block of queries makes of it.
  struct Node {
    uint8_t* state;   // (key blocks,)
    uint64_t* words;  // (block_q,)
    uint64_t* keys;   // (key blocks,): which keys are of the kind that everybody sees; lowest id of documents
    uint64_t* more;   // (key blocks,): highest id of documents
    uint8_t* any;     // (blocks of the layout,): whether some row of the query block, and whether all, see it
    uint8_t* all;
    const void* data;
  };
  struct Work {
    Node* nodes;
    Work(const BlockLists& lists, char* memory) : nodes(reinterpret_cast<Node*>(memory)) {
      memory += lists.pointer_bytes();
      for (int64_t i = 0; i < lists.s_.count; ++i) {
        const int64_t blocks = lists.layout_blocks(lists.nodes_[i]);
        Node& node = nodes[i];
        node.keys = reinterpret_cast<uint64_t*>(memory);
        node.more = node.keys + lists.key_blocks_;
        node.words = node.more + lists.key_blocks_;
        node.state = reinterpret_cast<uint8_t*>(node.words + lists.s_.block_q);
        node.any = node.state + lists.key_blocks_;
        node.all = node.any + blocks;
        memory += lists.node_bytes(lists.nodes_[i]);
      }
    }
  };

  static int64_t layout_blocks(const attnkit_mask_node& node) {
    return node.kind == ATTNKIT_MASK_BLOCK_SPARSE ? node.b : 0;
  }
  int64_t pointer_bytes() const { return round_up(s_.count * static_cast<int64_t>(sizeof(Node)), 64); }
  int64_t node_bytes(const attnkit_mask_node& node) const {
    return round_up(17 * key_blocks_ + 8 * s_.block_q + 2 * layout_blocks(node), 64);
  }

  int64_t first_key(int64_t j) const { return j * s_.block_k; }
  int64_t last_key(int64_t j) const { return least(first_key(j) + s_.block_k, s_.n) - 1; }
  uint64_t exists(int64_t j) const { return word_range(0, last_key(j) + 1 - first_key(j)); }

  // Calls f(rows, state of each key block) for all blocks of queries until it returns false.
  template <class F>
  bool each_row(const Work& w, F f) const {
    for (int64_t list = 0; list < s_.batches * s_.heads; ++list) {
      for (int64_t i = 0; i < s_.count; ++i) sum_up(nodes_[i], w.nodes[i], list / s_.heads, list % s_.heads);
      for (int64_t block = 0; block < query_blocks_; ++block) {
        const int64_t row = block * s_.block_q;
        const Rows rows = {s_.n - s_.m + row, least(s_.block_q, s_.m - row)};
        for (int64_t i = 0; i < s_.count; ++i) judge(w, i, rows);
        if (!f(rows, w.nodes[s_.count - 1].state)) return false;
      }
    }
    return true;
  }

  void sum_up(const attnkit_mask_node& leaf, Node& node, int64_t batch, int64_t head) const {
    batch = leaf.batches == 1 ? 0 : batch;
    head = leaf.heads == 1 ? 0 : head;
    node.data = leaf.data;
    if (leaf.kind == ATTNKIT_MASK_BLOCK_SPARSE)
      node.data = static_cast<const uint8_t*>(leaf.data) + head * leaf.b * leaf.b;
    if (leaf.kind == ATTNKIT_MASK_DOCUMENTS) node.data = static_cast<const int64_t*>(leaf.data) + batch * leaf.a;
    if (leaf.kind == ATTNKIT_MASK_PADDING) node.data = static_cast<const uint8_t*>(leaf.data) + batch * leaf.a;
    for (int64_t j = 0; j < key_blocks_; ++j) {
      const int64_t key = first_key(j), count = last_key(j) + 1 - key;
      uint64_t word = 0;
      if (leaf.kind == ATTNKIT_MASK_FIXED) {
        for (int64_t end = floor_div(key, leaf.a) * leaf.a + leaf.a - key; end - leaf.b < count; end += leaf.a)
          word |= word_range(end - leaf.b, least(end, count));
      } else if (leaf.kind == ATTNKIT_MASK_GLOBAL) {
        const int64_t* runs = static_cast<const int64_t*>(leaf.data);
        for (int64_t r = 0; r < leaf.a; ++r)
          word |= word_range(runs[2 * r] - key, least(runs[2 * r + 1] + 1 - key, count));
      } else if (leaf.kind == ATTNKIT_MASK_PADDING) {
        const uint8_t* keep = static_cast<const uint8_t*>(node.data) + key;
        for (int64_t c = 0; c < count; ++c) word |= static_cast<uint64_t>(keep[c] != 0) << c;
      } else if (leaf.kind == ATTNKIT_MASK_DOCUMENTS) {
        const Ids ids = ids_of(node, key, count);
        word = static_cast<uint64_t>(ids.low);
        node.more[j] = static_cast<uint64_t>(ids.high);
      }
      node.keys[j] = word;
    }
  }

  struct Ids {
    int64_t low, high;
  };
  static Ids ids_of(const Node& node, int64_t first, int64_t count) {
    const int64_t* ids = static_cast<const int64_t*>(node.data) + first;
    Ids found = {ids[0], ids[0]};
    for (int64_t c = 1; c < count; ++c) {
      found.low = least(found.low, ids[c]);
      found.high = most(found.high, ids[c]);
    }
    return found;
  }

  template <class F>
  ATTNKIT_INLINE void set_states(uint8_t* state, F f) const {
    for (int64_t j = 0; j < key_blocks_; ++j) {
      const bool every = f(j, first_key(j), last_key(j), kEvery), some = f(j, first_key(j), last_key(j), kSome);
      state[j] = static_cast<uint8_t>((every ? kEvery | kSome : 0) | (some ? kSome : 0));
    }
  }

  // The state of every key block for one block of queries. `which` asks for one of the two bits.
  void judge(const Work& w, int64_t index, Rows rows) const {
    const attnkit_mask_node& leaf = nodes_[index];
    const Node& node = w.nodes[index];
    uint8_t* const state = node.state;
    const int64_t q0 = rows.first, q1 = rows.last(), a = leaf.a, b = leaf.b;
    switch (leaf.kind) {
      case ATTNKIT_MASK_AND:
        for (int64_t j = 0; j < key_blocks_; ++j) state[j] = w.nodes[a].state[j] & w.nodes[b].state[j];
        break;
      case ATTNKIT_MASK_OR:
        for (int64_t j = 0; j < key_blocks_; ++j) state[j] = w.nodes[a].state[j] | w.nodes[b].state[j];
        break;
      case ATTNKIT_MASK_NOT:
        for (int64_t j = 0; j < key_blocks_; ++j) {
          const uint8_t other = static_cast<uint8_t>(~w.nodes[a].state[j]);
          state[j] = static_cast<uint8_t>((other & kSome) << 1 | (other & kEvery) >> 1);
        }
        break;
      case ATTNKIT_MASK_INTERVAL:
        set_states(state, [&](int64_t, int64_t k0, int64_t k1, uint8_t which) -> bool {
          return which == kEvery ? (k0 >= q1 - a) & (k1 <= q0 + b) : (k1 >= q0 - a) & (k0 <= q1 + b);
        });
        break;
      case ATTNKIT_MASK_DILATED:
        set_states(state, [&](int64_t, int64_t k0, int64_t k1, uint8_t which) -> bool {
          return which == kSome && q1 >= k0 && q0 - k1 <= (a - 1) * b && holds_multiple(q0 - k1, q1 - k0, b);
        });
        break;
      case ATTNKIT_MASK_STRIDED:
        set_states(state, [&](int64_t, int64_t k0, int64_t k1, uint8_t which) -> bool {
          if (which == kEvery) return (k1 <= q0) & (q1 - k0 <= a);
          return q1 >= k0 && (q0 - k1 <= a || holds_multiple(q0 - k1, q1 - k0, a));
        });
        break;
      case ATTNKIT_MASK_FIXED:
      case ATTNKIT_MASK_CHUNKED: {
        const bool fixed = leaf.kind == ATTNKIT_MASK_FIXED;
        const int64_t begin = floor_div(q0, a) * a, end = floor_div(q1, a) * a + a;  // chunks that the queries touch
        set_states(state, [&](int64_t j, int64_t k0, int64_t k1, uint8_t which) -> bool {
          if (which == kEvery) return end - begin == a && k0 >= begin && k1 < end && (!fixed || k1 <= q0);
          return (k1 >= begin && k0 < end && (!fixed || k0 <= q1)) || (fixed && k0 <= q1 && node.keys[j] != 0);
        });
        break;
      }
      case ATTNKIT_MASK_PREFIX:
        set_states(state, [&](int64_t, int64_t k0, int64_t k1, uint8_t which) -> bool {
          return which == kEvery ? (k1 <= q0) | (k1 < a) : (k0 <= q1) | (k0 < a);
        });
        break;
      case ATTNKIT_MASK_GLOBAL: {
        int64_t global = 0;
        for (int64_t q = q0; q <= q1; ++q) global += in_runs(leaf, q);
        set_states(state, [&](int64_t j, int64_t, int64_t, uint8_t which) -> bool {
          if (which == kEvery) return global == rows.count || node.keys[j] == exists(j);
          return global > 0 || node.keys[j] != 0;
        });
        break;
      }
      case ATTNKIT_MASK_PADDING:
        set_states(state, [&](int64_t j, int64_t, int64_t, uint8_t which) -> bool {
          return which == kEvery ? node.keys[j] == exists(j) : node.keys[j] != 0;
        });
        break;
      case ATTNKIT_MASK_DOCUMENTS: {
        const Ids ids = ids_of(node, q0, rows.count);
        set_states(state, [&](int64_t j, int64_t, int64_t, uint8_t which) -> bool {
          const int64_t low = static_cast<int64_t>(node.keys[j]), high = static_cast<int64_t>(node.more[j]);
          return which == kEvery ? ids.low == ids.high && low == high && ids.low == low
                                 : ids.low <= high && low <= ids.high;
        });
        break;
      }
      default: {  // ATTNKIT_MASK_BLOCK_SPARSE
        const uint8_t* layout = static_cast<const uint8_t*>(node.data);
        for (int64_t c = 0; c < b; ++c) node.any[c] = 0, node.all[c] = 1;
        for (int64_t r = q0 / a; r <= q1 / a; ++r)
          for (int64_t c = 0; c < b; ++c) {
            const uint8_t seen = layout[r * b + c] != 0;
            node.any[c] |= seen;
            node.all[c] &= seen;
          }
        set_states(state, [&](int64_t, int64_t k0, int64_t k1, uint8_t which) -> bool {
          bool any = false, all = true;
          for (int64_t c = k0 / a; c <= k1 / a; ++c) {
            any = any || node.any[c];
            all = all && node.all[c];
          }
          return which == kEvery ? all : any;
        });
      }
    }
  }

  // Whether a multiple of `step` that is not negative lies among the gaps from `nearest` to `farthest`, not negative.
  static ATTNKIT_INLINE bool holds_multiple(int64_t nearest, int64_t farthest, int64_t step) {
    return floor_div(farthest, step) * step >= most<int64_t>(nearest, 0);
  }
  static bool in_runs(const attnkit_mask_node& leaf, int64_t q) {
    const int64_t* runs = static_cast<const int64_t*>(leaf.data);
    for (int64_t r = 0; r < leaf.a; ++r)
      if (q >= runs[2 * r] && q <= runs[2 * r + 1]) return true;
    return false;
  }

  // The words of a tile; rows past the end are 0, and so are bits past the last key.
  const uint64_t* look(const Work& w, Rows rows, int64_t j) const {
    const uint64_t real = exists(j);
    for (int64_t i = 0; i < s_.count; ++i) {
      const attnkit_mask_node& leaf = nodes_[i];
      uint64_t* const words = w.nodes[i].words;
      const uint8_t state = w.nodes[i].state[j];
      if (state != kSome) {
        for (int64_t r = 0; r < rows.count; ++r) words[r] = state ? real : 0;
      } else if (leaf.kind == ATTNKIT_MASK_AND) {
        for (int64_t r = 0; r < rows.count; ++r) words[r] = w.nodes[leaf.a].words[r] & w.nodes[leaf.b].words[r];
      } else if (leaf.kind == ATTNKIT_MASK_OR) {
        for (int64_t r = 0; r < rows.count; ++r) words[r] = w.nodes[leaf.a].words[r] | w.nodes[leaf.b].words[r];
      } else if (leaf.kind == ATTNKIT_MASK_NOT) {
        for (int64_t r = 0; r < rows.count; ++r) words[r] = ~w.nodes[leaf.a].words[r] & real;
      } else {
        look_at_leaf(leaf, w.nodes[i], rows, j, words);
        for (int64_t r = 0; r < rows.count; ++r) words[r] &= real;
      }
    }
    uint64_t* const words = w.nodes[s_.count - 1].words;
    for (int64_t r = rows.count; r < s_.block_q; ++r) words[r] = 0;
    return words;
  }

  void look_at_leaf(const attnkit_mask_node& leaf, const Node& node, Rows rows, int64_t j, uint64_t* words) const {
    const int64_t key = first_key(j), a = leaf.a, b = leaf.b, first = rows.first - key;  // q - key of the first row
    switch (leaf.kind) {
      case ATTNKIT_MASK_INTERVAL:
        for (int64_t r = 0; r < rows.count; ++r) words[r] = word_range(first + r - a, first + r + b + 1);
        break;
      case ATTNKIT_MASK_DILATED:
      case ATTNKIT_MASK_STRIDED: {
        const int64_t step = leaf.kind == ATTNKIT_MASK_DILATED ? b : a;
        const uint64_t teeth = comb(step);
        int64_t shift = floor_mod(first, step);
        for (int64_t r = 0; r < rows.count; ++r) {
          const int64_t at = first + r;
          const uint64_t multiples = shift < 64 ? teeth << shift : 0;
          words[r] = leaf.kind == ATTNKIT_MASK_DILATED
                         ? multiples & word_range(at - (a - 1) * b, at + 1)
                         : (multiples & word_range(0, at + 1)) | word_range(at - a, at + 1);
          if (++shift == step) shift = 0;
        }
        break;
      }
      case ATTNKIT_MASK_FIXED:
      case ATTNKIT_MASK_CHUNKED: {
        const bool fixed = leaf.kind == ATTNKIT_MASK_FIXED;
        int64_t chunk = floor_div(rows.first, a) * a - key;
        for (int64_t r = 0; r < rows.count; ++r) {
          if (first + r == chunk + a) chunk += a;
          words[r] = word_range(chunk, chunk + a);
          if (fixed) words[r] = (words[r] | node.keys[j]) & word_range(0, first + r + 1);
        }
        break;
      }
      case ATTNKIT_MASK_PREFIX:
        for (int64_t r = 0; r < rows.count; ++r) words[r] = word_range(0, most(first + r + 1, a - key));
        break;
      case ATTNKIT_MASK_GLOBAL:
        for (int64_t r = 0; r < rows.count; ++r) words[r] = in_runs(leaf, rows.first + r) ? kAllBits : node.keys[j];
        break;
      case ATTNKIT_MASK_PADDING:
        for (int64_t r = 0; r < rows.count; ++r) words[r] = node.keys[j];
        break;
      case ATTNKIT_MASK_DOCUMENTS: {
        const int64_t* ids = static_cast<const int64_t*>(node.data);
        const int64_t count = last_key(j) + 1 - key;
        for (int64_t r = 0; r < rows.count; ++r) words[r] = 0;
        for (int64_t begin = 0, end; begin < count; begin = end) {  // runs of one document
          for (end = begin + 1; end < count && ids[key + end] == ids[key + begin];) ++end;
          const uint64_t run = word_range(begin, end);
          for (int64_t r = 0; r < rows.count; ++r)
            words[r] |= ids[rows.first + r] == ids[key + begin] ? run : 0;
        }
        break;
      }
      default: {  // ATTNKIT_MASK_BLOCK_SPARSE
        const uint8_t* layout = static_cast<const uint8_t*>(node.data);
        for (int64_t r = 0; r < rows.count; ++r) {
          const int64_t block = (rows.first + r) / a;
          if (r > 0 && block * a != rows.first + r) {
            words[r] = words[r - 1];
            continue;
          }
          words[r] = 0;
          for (int64_t c = key / a; c <= last_key(j) / a; ++c)
            if (layout[block * b + c]) words[r] |= word_range(c * a - key, (c + 1) * a - key);
        }
      }
    }
  }

  // The row of patterns that holds these words, a new one if there is none yet; -1 when there is no room for it.
  int32_t stored(const uint64_t* words, int64_t& patterns) const {
    uint64_t hash = 0;
    for (int64_t i = 0; i < s_.block_q; ++i) {
      hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    const uint64_t bytes = static_cast<uint64_t>(s_.block_q) * sizeof(uint64_t);
    for (uint64_t slot = hash;; ++slot) {
      int32_t& at = s_.table[slot & static_cast<uint64_t>(s_.slots - 1)];  // one more than the row, 0 when free
      if (at == 0) {
        if (patterns == s_.room) return -1;
        __builtin_memcpy(s_.patterns + patterns * s_.block_q, words, bytes);
        at = static_cast<int32_t>(++patterns);
        return at - 1;
      }
      if (__builtin_memcmp(s_.patterns + (at - 1) * s_.block_q, words, bytes) == 0) return at - 1;
    }
  }

  const attnkit_block_list& s_;
  const attnkit_mask_node* nodes_;
  const int64_t query_blocks_;
  const int64_t key_blocks_;
};
