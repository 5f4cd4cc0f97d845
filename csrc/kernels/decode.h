// Attention of few queries over a long cache: every key and value is read from memory once, for all rows of its KV head.
//
// The keys of a sequence are cut into ranges by their number alone, so a row's result depends neither on the batch nor on
// the threads; ranges are merged by their log-sum-exp. A range is walked in tiles of 32 keys: products with all query rows,
// weights, sum over values. Where a key lies is the Store's business (stores.h): it gives each tile the places of its 32
// keys and values, straight in the cache or, where the cache is quantised, in a tile that it has just converted. So all
// forms of a cache go through the same operations in the same order.
//
// With four query rows of 64 or 128 numbers a Zen 4 core is kept as busy by the arithmetic as by reading bfloat16. So with
// dot products of bfloat16 the values of two keys are multiplied at a time, by weights rounded to bfloat16 as prefill
// rounds them, and rows of the two common sizes have loops of their own. From kManyRows rows on a KV head is a matrix
// product (many.h), over the same ranges.

// Short enough to keep two threads busy from 2,000 keys on with one KV head, long enough that merging costs nothing.
constexpr int64_t kSplitKeys = 512;
constexpr int64_t kMostSplits = 64;
constexpr int64_t kScoreRow = kWalkKeys + kWidth;  // room for the last chunk of keys to run over
constexpr int64_t kManyRows = 24;

// Products of query and key rows, a vector of the row at a time.
template <class T>
struct RowProduct {
  using Math = Float32Math;
  using Query = float;
  using Weight = float;
  static constexpr int64_t kNumbers = kWidth;
  static constexpr bool kPaired = false;  // whether values are multiplied two keys at a time
  using Loaded = Vec;
  static ATTNKIT_INLINE Loaded load_key(const T* p) { return load(p); }
  static ATTNKIT_INLINE Loaded load_key_first(const T* p, int count) { return load_first(p, count); }
  static ATTNKIT_INLINE Vec multiply_add(Vec c, const float* q, Loaded k) { return fma(load(q), k, c); }
  template <class Asked>
  static ATTNKIT_INLINE void store_query(float* to, const Asked* p, int count) {
    store(to, load_first(p, count));
  }
  static ATTNKIT_INLINE void store_weights(float* to, Vec x) { store(to, x); }
};

#if defined(ATTNKIT_BF16_DOT)
template <>
struct RowProduct<BFloat16> {
  using Math = BFloat16Math;
  using Query = uint32_t;
  using Weight = BFloat16;
  static constexpr int64_t kNumbers = 2 * kWidth;
  static constexpr bool kPaired = true;
  using Loaded = Pairs;
  static ATTNKIT_INLINE Loaded load_key(const BFloat16* p) { return load_pairs(reinterpret_cast<const uint32_t*>(p)); }
  static ATTNKIT_INLINE Loaded load_key_first(const BFloat16* p, int count) { return load_pairs_first(p, count); }
  static ATTNKIT_INLINE Vec multiply_add(Vec c, const uint32_t* q, Loaded k) {
    return dot_pairs(c, load_pairs(q), k);
  }
  static ATTNKIT_INLINE void store_query(uint32_t* to, const BFloat16* p, int count) {
    _mm512_storeu_si512(to, load_pairs_first(p, count));
  }
  static ATTNKIT_INLINE void store_weights(BFloat16* to, Vec x) { store_half(to, x); }
};
#endif

// One sequence of the batch: the call with the sequence's own number of keys, and the ranges those are cut into.
struct Sequence {
  attnkit_softmax s;
  const Logits logits;
  Range keys;  // that some query may see
  int64_t split_keys, first_split, splits;

  Sequence(const attnkit_softmax& call, int64_t n) : s(call), logits(s) {
    s.n = n;
    split_keys = most(kSplitKeys, round_up(ceil_div(n, kMostSplits), kBlockKeys));
    keys = {visible_range(s, 0).begin, visible_range(s, s.m - 1).end};
    first_split = keys.begin / split_keys;
    splits = keys.empty() ? 0 : ceil_div(keys.end, split_keys) - first_split;
  }
};

template <class Store>
class Decode {
  using Asked = typename Store::Asked;
  using Number = typename Store::Number;
  using Rows = typename Store::Rows;
  using Product = RowProduct<Number>;
  using Query = typename Product::Query;
  using Weight = typename Product::Weight;
  using Many = ManyRows<typename Product::Math>;
  static constexpr bool kMany = !Store::kConverts && !Store::kMultiplies;

 public:
  Decode(const attnkit_softmax& call, const Store& store)
      : s_(call),
        store_(store),
        // Heads that see different blocks cannot share a walk over them.
        heads_(call.mask_heads == 1 ? call.h / call.g : 1),
        rows_(heads_ * call.m),
        many_(call),
        together_(kMany && rows_ >= kManyRows),
        padded_(together_ ? round_up(rows_, kRows) : rows_),
        query_vectors_(ceil_div(call.d, Product::kNumbers)),
        value_columns_(round_up(call.e, kWidth)),
        splits_(most_splits()),
        threads_(useful_threads(call, call.b * (call.h / heads_) * splits_)) {}

  int64_t scratch_bytes() const { return part_bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    float* const parts = reinterpret_cast<float*>(scratch);
    const int64_t tasks = s_.b * (s_.h / heads_) * splits_;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, scratch + part_bytes() + thread_number() * work_bytes());
      if constexpr (Store::kMultiplies) store_.start(work.store);
      // Ranges in a row, so that a thread can fetch the start of the next; few at the end, where one would wait for the other.
#pragma omp for schedule(guided)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t walk = task / splits_, split = task % splits_;
        const int64_t batch = walk / (s_.h / heads_), head = walk % (s_.h / heads_) * heads_;
        const Sequence sequence(s_, store_.length(batch));
        if (split >= sequence.splits) continue;
        attend(work, sequence, batch, head, split);
        keep(work, parts, batch, head, split);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < s_.b * s_.h * s_.m; ++row) merge(work, parts, row);
    }
  }

 private:
  struct Work {
    Query* queries;   // rows_ of query_vectors_ vectors
    float* scores;    // rows_ of kScoreRow
    float* weights;   // rows_ of kScoreRow, or of as many narrower numbers at their start
    RowSums rows;
    uint64_t* words;  // one per query
    Number* numbers;  // of a converted tile
    typename Store::Memory store;
    typename Many::Memory many;
    Work(const Decode& d, char* memory)
        : queries(reinterpret_cast<Query*>(memory)),
          scores(reinterpret_cast<float*>(queries + d.padded_ * d.query_vectors_ * kWidth)),
          weights(scores + d.score_floats()),
          rows(weights + d.score_floats(), d.padded_, d.value_columns_),
          words(reinterpret_cast<uint64_t*>(rows.tops + round_up(d.padded_, 2))),
          numbers(reinterpret_cast<Number*>(words + round_up(d.s_.m, 8))),
          store(d.store_, numbers),
          many(d.many_, reinterpret_cast<char*>(numbers)) {}
  };

  int64_t work_bytes() const {
    return round_up(4 * padded_ * (query_vectors_ * kWidth + value_columns_ + kWidth) + 8 * score_floats() +
                        4 * round_up(padded_, 2) + 8 * round_up(s_.m, 8) +
                        store_.tile_numbers() * static_cast<int64_t>(sizeof(Number)) + (together_ ? many_.bytes() : 0),
                    64);
  }
  // Many rows have neither scores nor weights of their own.
  int64_t score_floats() const { return together_ ? 0 : rows_ * kScoreRow; }
  int64_t most_splits() const {
    int64_t found = 0;
    for (int64_t batch = 0; batch < s_.b; ++batch) found = most(found, Sequence(s_, store_.length(batch)).splits);
    return found;
  }
  // Sums, total and top of every row and range.
  int64_t part_floats() const { return value_columns_ + 2; }
  int64_t part_bytes() const { return round_up(4 * s_.b * s_.h * s_.m * splits_ * part_floats(), 64); }
  float* part(float* parts, int64_t batch, int64_t head, int64_t i, int64_t split) const {
    return parts + (((batch * s_.h + head) * s_.m + i) * splits_ + split) * part_floats();
  }

  void attend(const Work& w, const Sequence& sequence, int64_t batch, int64_t head, int64_t split) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const Asked* q = static_cast<const Asked*>(s_.q) + batch * s_.q_b + (head + r / s_.m) * s_.q_h + r % s_.m * s_.q_m;
      if constexpr (Store::kMultiplies) {
        store_.take_query(w.store, q, r);
      } else {
        for (int64_t j = 0; j < query_vectors_; ++j)
          Product::store_query(w.queries + (r * query_vectors_ + j) * kWidth, q + j * Product::kNumbers,
                               static_cast<int>(least(Product::kNumbers, s_.d - j * Product::kNumbers)));
      }
      w.rows.tops[r] = -kInfinity;
    }
    for (int64_t r = rows_; r < padded_; ++r) {
      for (int64_t j = 0; j < query_vectors_ * kWidth; ++j) w.queries[r * query_vectors_ * kWidth + j] = 0;
      w.rows.tops[r] = 0.0f;
    }
    for (int64_t j = 0; j < padded_ * value_columns_; ++j) w.rows.sums[j] = 0.0f;
    for (int64_t j = 0; j < padded_ * kWidth; ++j) w.rows.totals[j] = 0.0f;

    const int64_t start = (sequence.first_split + split) * sequence.split_keys;
    const Range keys = {most(sequence.keys.begin, start), least(sequence.keys.end, start + sequence.split_keys)};
    const KeyBlocks blocks(sequence.s, batch, head, 0, keys);
    if constexpr (kMany)
      if (together_) return attend_together(w, sequence, batch, head, blocks);
    for (int64_t entry = blocks.entry; entry < blocks.entry_end; ++entry) {
      // What follows an interval's range is most likely this thread's next one.
      const bool known = entry + 1 < blocks.entry_end || !s_.offsets;
      attend_block(w, sequence, batch, head, blocks.key_block(entry), blocks.words(entry),
                   known ? blocks.key_block(entry + 1) * kBlockKeys : sequence.s.n);
    }
  }

  // All rows over a few blocks at a time, while the rows of those that follow are fetched.
  void attend_together(const Work& w, const Sequence& sequence, int64_t batch, int64_t head,
                       const KeyBlocks& blocks) const {
    const attnkit_softmax& s = sequence.s;
    for (int64_t entry = blocks.entry; entry < blocks.entry_end;) {
      typename Many::Stretch stretch;
      for (; entry < blocks.entry_end && stretch.count < Many::kBlocks; ++entry) {
        uint64_t any = 0, every = kAll;
        for (int64_t i = 0; i < s.m; ++i) {
          const uint64_t word = visible_word(s, i, blocks.key_block(entry), blocks.words(entry));
          any |= word, every &= word;
          many_.words(w.many, stretch.count)[i] = word;
        }
        if (any == 0) continue;
        stretch.key[stretch.count] = blocks.key_block(entry) * kBlockKeys;
        stretch.partial[stretch.count] = every != kAll;
        pack_block(w, s, batch, head, stretch.key[stretch.count], any, stretch.count);
        ++stretch.count;
      }
      Coming coming(entry, s_.offsets ? blocks.entry_end : ceil_div(s.n, kBlockKeys));
      // Little by little: all in one go would fill the core's buffers for misses and stall it.
      const int64_t at_once = ceil_div(Many::kKeys * kRows, padded_ * many_.steps());
      for (int64_t r = 0; stretch.count > 0 && r < rows_; r += kRows)
        many_.attend(w.many, stretch, sequence.logits, w.queries + r * query_vectors_ * kWidth, query_vectors_ * kWidth,
                     w.rows, batch, head, r, least<int64_t>(kRows, rows_ - r),
                     [&] { fetch(coming, w, s, batch, head, blocks, at_once); });
    }
  }

  // Keys outside of what some query sees are not even read.
  void pack_block(const Work& w, const attnkit_softmax& s, int64_t batch, int64_t head, int64_t key, uint64_t any,
                  int block) const {
    const int64_t begin = __builtin_ctzll(any), end = kBlockKeys - __builtin_clzll(any);
    Tile<Rows> tile[kBlockKeys / kWalkKeys];
    for (int64_t first = 0; first < kBlockKeys; first += kWalkKeys) {
      const int64_t from = most(begin - first, int64_t{0}), to = least(end - first, kWalkKeys);
      if (from < to) store_.open(tile[first / kWalkKeys], w.numbers, batch, head / (s.h / s.g), key + first, from, to, s.n, s.n);
    }
    const auto inside = [&](int64_t i) { return i >= begin && i < end; };
    many_.pack(
        w.many, block, [&](int64_t i) { return inside(i) ? tile[i / kWalkKeys].keys[i % kWalkKeys] : nullptr; },
        [&](int64_t i) { return inside(i) ? tile[i / kWalkKeys].values[i % kWalkKeys] : nullptr; });
  }

  // Keys that are packed next, and most likely by this thread.
  struct Coming {
    int64_t entry, entry_end, row = 0;
    Tile<Rows> tile;
    Coming(int64_t from, int64_t to) : entry(from), entry_end(to) {}
  };
  void fetch(Coming& coming, const Work& w, const attnkit_softmax& s, int64_t batch, int64_t head,
             const KeyBlocks& blocks, int64_t rows) const {
    for (const int64_t stop = least(coming.row + rows, Many::kKeys); coming.row < stop; ++coming.row) {
      const int64_t entry = coming.entry + coming.row / kBlockKeys, i = coming.row % kWalkKeys;
      if (entry >= coming.entry_end) return;
      const int64_t first = blocks.key_block(entry) * kBlockKeys + coming.row % kBlockKeys - i, left = s.n - first;
      if (i >= left) continue;
      if (i == 0)
        store_.open(coming.tile, w.numbers, batch, head / (s.h / s.g), first, 0, least(left, kWalkKeys), s.n, s.n);
      prefetch_row(coming.tile.keys[i], s.d);
      prefetch_row(coming.tile.values[i], s.e);
    }
  }

  // `next_key` is the first key of the block after this one; n if there is none.
  void attend_block(const Work& w, const Sequence& sequence, int64_t batch, int64_t head, int64_t key_block,
                    const int64_t* words, int64_t next_key) const {
    const attnkit_softmax& s = sequence.s;
    uint64_t any = 0;
    for (int64_t i = 0; i < s.m; ++i) any |= w.words[i] = visible_word(s, i, key_block, words);
    if (any == 0) return;
    // Keys outside [begin, end) are not even read.
    const int64_t begin = __builtin_ctzll(any), end = kBlockKeys - __builtin_clzll(any);
    for (int64_t first = begin / kWalkKeys * kWalkKeys; first < end; first += kWalkKeys) {
      const int64_t after = first + kWalkKeys, next = after < end ? key_block * kBlockKeys + after : next_key;
      const int64_t from = most(begin, first) - first, to = least(end, after) - first;
      if constexpr (Store::kMultiplies) {
        attend_codes(w, sequence, batch, head, key_block * kBlockKeys, first, from, to, next);
      } else {
        attend_tile(w, sequence, batch, head, key_block * kBlockKeys, first, from, to, next);
      }
    }
  }

  // As attend_tile, with products that are the store's.
  void attend_codes(const Work& w, const Sequence& sequence, int64_t batch, int64_t head, int64_t block, int64_t first,
                    int64_t begin, int64_t end, int64_t next_key) const {
    const attnkit_softmax& s = sequence.s;
    Tile<Rows> tile;
    store_.open(tile, w.store, batch, head / (s.h / s.g), block + first, begin, end, next_key, s.n);
    in_rows([&](auto rows, int64_t r) {
      store_.template score<rows.count>(w.store, tile, w.scores + r * kScoreRow, begin, end, r);
    });
    in_rows([&](auto rows, int64_t r) {
      weigh_codes<rows.count>(w, sequence.logits, tile, batch, head, block, first, r);
    });
    in_rows([&](auto rows, int64_t r) {
      store_.template add_values<rows.count>(w.store, tile, w.rows.sums + r * value_columns_, value_columns_, begin, end, r);
    });
  }

  // As weigh, for all 32 keys of kCount rows at once: one row after the other is a chain that waits for itself.
  template <int kCount>
  ATTNKIT_INLINE void weigh_codes(const Work& w, const Logits& logits, const Tile<Rows>& tile, int64_t batch, int64_t head,
                                  int64_t block, int64_t first, int64_t r) const {
    constexpr int kVectors = kWalkKeys / kWidth;
    Vec x[kCount][kVectors], peak[kCount];
    Bits counts[kCount][kVectors];
    const Vec factor = splat(logits.exponent);
    bool rises = false;
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      float* scores = w.scores + (r + i) * kScoreRow;
      const uint64_t word = w.words[(r + i) % s_.m] >> first;
      for (int j = 0; j < kVectors; ++j) {
        x[i][j] = load(scores + j * kWidth);
        if constexpr (Store::kScales) x[i][j] = x[i][j] * load(tile.key_scale + j * kWidth);
      }
      if (!logits.plain) {
        for (int j = 0; j < kVectors; ++j) store(scores + j * kWidth, x[i][j]);
        logits.apply(scores, kVectors, batch, head + (r + i) / s_.m, (r + i) % s_.m, block + first);
        for (int j = 0; j < kVectors; ++j) x[i][j] = load(scores + j * kWidth);
      }
      peak[i] = splat(-kInfinity);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        x[i][j] = select(static_cast<Bits>(word >> j * kWidth), x[i][j], -kInfinity);
        counts[i][j] = bits_unequal(x[i][j], -kInfinity);
        peak[i] = max(peak[i], x[i][j]);
      }
      rises |= any_above(peak[i] * factor, w.rows.tops[r + i] + kLateRescale);
    }
    if (rises)
      for (int i = 0; i < kCount; ++i) w.rows.raise(r + i, peak[i], logits.exponent);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const float top = w.rows.tops[r + i];
      const Vec shift = splat(top == -kInfinity ? 0.0f : -top);
      Vec total = load(w.rows.totals + (r + i) * kWidth);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        x[i][j] = exp2<5>(fma(x[i][j], factor, shift));
        total = total + x[i][j];
        if constexpr (Store::kScales) x[i][j] = x[i][j] * load(tile.value_scale + j * kWidth);
      }
      store(w.rows.totals + (r + i) * kWidth, total);
    }
    store_.template take_weights<kCount>(w.store, x, counts, r);
  }

  // Keys [begin, end) of the tile that starts at number `first` of the block at `block`; those at `next_key` come after.
  void attend_tile(const Work& w, const Sequence& sequence, int64_t batch, int64_t head, int64_t block, int64_t first,
                   int64_t begin, int64_t end, int64_t next_key) const {
    const attnkit_softmax& s = sequence.s;
    Tile<Rows> tile;
    store_.open(tile, w.numbers, batch, head / (s.h / s.g), block + first, begin, end, next_key, s.n);
    in_rows([&](auto rows, int64_t r) { score<rows.count>(w, tile, begin, end, r); });
    uint64_t every = kAll;
    for (int64_t i = 0; i < s.m; ++i) every &= w.words[i];
    for (int64_t r = 0; r < rows_; ++r) weigh(w, sequence.logits, tile, batch, head, block, first, begin, end, r);
    const uint64_t read = bit_range(first + begin, first + end);
    const bool hidden = s.bias || (every & read) != read;
    if (hidden && !finite(tile, begin, end)) {
      add_visible_values(w, tile, begin, end);
    } else {
      in_rows([&](auto rows, int64_t r) {
        add_values<rows.count>(w, tile.values, begin, end, r, r == 0 && tile.fetch ? &tile.next : nullptr);
      });
    }
  }

  // Calls f for all rows, four at a time and then the rest: a tile is read once for as many.
  template <int kCount>
  struct RowCount {
    static constexpr int count = kCount;
  };
  template <class F>
  ATTNKIT_INLINE void in_rows(F f) const {
    int64_t r = 0;
    for (; r + 4 <= rows_; r += 4) f(RowCount<4>(), r);
    if (rows_ - r == 3) return f(RowCount<3>(), r);
    if (rows_ - r >= 2) {
      f(RowCount<2>(), r);
      r += 2;
    }
    if (r < rows_) f(RowCount<1>(), r);
  }

  // Products of kCount rows with as many keys at a time as give one vector of sums. Keys and values take turns, and the
  // processor does not guess that: whoever works on one fetches the other, a row at a time. Keys are read one after the
  // other, as they lie in memory: reading four at once halves what the processor fetches by itself.
  template <int kCount>
  void score(const Work& w, const Tile<Rows>& tile, int64_t begin, int64_t end, int64_t r) const {
    const int64_t whole = s_.d / Product::kNumbers;
    const bool even = s_.d % Product::kNumbers == 0;
    if (even && whole == 2) return score_keys<kCount, 2>(w, tile, begin, end, r);
    if (even && whole == 4) return score_keys<kCount, 4>(w, tile, begin, end, r);
    score_keys<kCount, 0>(w, tile, begin, end, r);
  }
  // Rows of kWhole vectors, of any number where that is 0.
  template <int kCount, int kWhole>
  void score_keys(const Work& w, const Tile<Rows>& tile, int64_t begin, int64_t end, int64_t r) const {
    constexpr int kKeys = kWidth / (kCount == 3 ? 4 : kCount);
    const Query* queries = w.queries + r * query_vectors_ * kWidth;
    const int64_t query_row = (kWhole ? kWhole : query_vectors_) * kWidth;
    const int64_t whole = kWhole ? kWhole : s_.d / Product::kNumbers;
    const int tail = kWhole ? 0 : static_cast<int>(s_.d - whole * Product::kNumbers);
    for (int64_t c = begin; c < end; c += kKeys) {
      const int64_t last = end - 1;
      const Number* row[kKeys];
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k) row[k] = tile.keys[least(c + k, last)];
      Vec acc[kWidth];
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) acc[j] = zero();
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k) {
        if (r == 0 && !Store::kConverts) prefetch_row(tile.values[least(c + k, last)], s_.e);
        const auto multiply = [&](int64_t j, auto x) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int i = 0; i < kCount; ++i)
            acc[i * kKeys + k] = Product::multiply_add(acc[i * kKeys + k], queries + i * query_row + j * kWidth, x);
        };
        if constexpr (kWhole != 0) {
#pragma GCC unroll 4
          for (int j = 0; j < kWhole; ++j) multiply(j, Product::load_key(row[k] + j * Product::kNumbers));
        } else {
          for (int64_t j = 0; j < whole; ++j) multiply(j, Product::load_key(row[k] + j * Product::kNumbers));
        }
      }
      if (tail) {
#pragma GCC unroll 16
        for (int k = 0; k < kKeys; ++k) {
          const auto x = Product::load_key_first(row[k] + whole * Product::kNumbers, tail);
#pragma GCC unroll 4
          for (int i = 0; i < kCount; ++i)
            acc[i * kKeys + k] = Product::multiply_add(acc[i * kKeys + k], queries + i * query_row + whole * kWidth, x);
        }
      }
      float sums[kWidth];
      store(sums, sum_each(acc));
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i)
        __builtin_memcpy(w.scores + (r + i) * kScoreRow + c, sums + i * kKeys, sizeof(float) * kKeys);
    }
  }

  // Logits, mask and weights of one row; as Prefill::weigh, the reference moves only when it must.
  void weigh(const Work& w, const Logits& logits, const Tile<Rows>& tile, int64_t batch, int64_t head, int64_t block,
             int64_t first, int64_t begin, int64_t end, int64_t r) const {
    float* scores = w.scores + r * kScoreRow;
    float* weights = w.weights + r * kScoreRow;
    const int64_t from = begin / kWidth * kWidth, to = round_up(end, kWidth);
    const uint64_t word = w.words[r % s_.m] >> first;
    if constexpr (Store::kScales)
      for (int64_t c = from; c < to; c += kWidth)
        store(scores + c, load(scores + c) * load(tile.key_scale + c));
    if (!logits.plain)
      logits.apply(scores + from, static_cast<int>((to - from) / kWidth), batch, head + r / s_.m, r % s_.m,
                   block + first + from);
    Vec peak = splat(-kInfinity);
    for (int64_t c = from; c < to; c += kWidth) {
      const Vec x = select(static_cast<Bits>(word >> c), load(scores + c), -kInfinity);
      store(scores + c, x);
      peak = max(peak, x);
    }
    const Vec factor = splat(logits.exponent);
    float* totals = w.rows.totals + r * kWidth;
    if (any_above(peak * factor, w.rows.tops[r] + kLateRescale)) w.rows.raise(r, peak, logits.exponent);
    const float top = w.rows.tops[r];
    const Vec shift = splat(top == -kInfinity ? 0.0f : -top);
    Vec total = load(totals);
    for (int64_t c = from; c < to; c += kWidth) {
      const Vec x = exp2<5>(fma(load(scores + c), factor, shift));
      total = total + x;
      const Vec weight = Store::kScales ? x * load(tile.value_scale + c) : x;
      Product::store_weights(reinterpret_cast<Weight*>(weights) + c, weight);
    }
    store(totals, total);
  }

  // Adds the values of keys [begin, end), and fetches as many keys of `next`, if it is given.
  template <int kCount>
  void add_values(const Work& w, const Rows& values, int64_t begin, int64_t end, int64_t r,
                  const Rows* next) const {
    int64_t column = 0;
    constexpr int64_t kColumns = kStripVectors * kWidth;
    for (; column + kColumns <= s_.e; column += kColumns) {
      add_strip<kCount, kStripVectors>(w, values, begin, end, r, column, kWidth, next);
    }
    for (; column < s_.e; column += kWidth) {
      add_strip<kCount, 1>(w, values, begin, end, r, column, least<int64_t>(kWidth, s_.e - column), next);
    }
  }

  // `last` is the number of columns in the only vector of a narrow strip.
  template <int kCount, int kVectors>
  void add_strip(const Work& w, const Rows& values, int64_t begin, int64_t end, int64_t r, int64_t column,
                 int64_t last, const Rows* next) const {
    float* sums = w.rows.sums + r * value_columns_ + column;
    Vec acc[kCount][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = load(sums + i * value_columns_ + j * kWidth);
    // Every strip fetches its part of the next keys; the last one what is left of them.
    const int64_t stop = column + kVectors * kWidth;
    const int64_t part = (stop < s_.e ? least(stop, s_.d) : s_.d) - column;
    constexpr int64_t kStep = Product::kPaired ? 2 : 1;
    for (int64_t c = begin; c < end; c += kStep) {
      if (next) {
#pragma GCC unroll 2
        for (int64_t i = 0; i < kStep; ++i) prefetch_row((*next)[least(c + i, end - 1)] + column, part);
      }
      add_keys<kCount, kVectors>(acc, w.weights + r * kScoreRow, values, c, end, column, last);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(sums + i * value_columns_ + j * kWidth, acc[i][j]);
  }

  // Key c, or keys c and c + 1 where two are multiplied at a time.
  template <int kCount, int kVectors>
  ATTNKIT_INLINE static void add_keys(Vec (&acc)[kCount][kVectors], const float* weight_rows, const Rows& values,
                                      int64_t c, [[maybe_unused]] int64_t end, int64_t column, int64_t last) {
    const Number* row = values[c] + column;
#if defined(ATTNKIT_BF16_DOT)
    if constexpr (Product::kPaired) {
      // Zeros stand beside the last of an odd number of keys, and beside its weight: 0 times an infinity is a NaN.
      const Number* after = c + 1 < end ? values[c + 1] + column : nullptr;
      Pairs x[kVectors];
      if constexpr (kVectors == 1) {
        const int count = static_cast<int>(last);
        x[0] = zip_halves(low_half(Product::load_key_first(row, count)),
                          low_half(after ? Product::load_key_first(after, count) : splat_pair(0)));
      } else {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; j += 2)
          zip_rows(Product::load_key(row + j * kWidth), after ? Product::load_key(after + j * kWidth) : splat_pair(0),
                   x[j], x[j + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        uint32_t pair;
        __builtin_memcpy(&pair, reinterpret_cast<const Weight*>(weight_rows + i * kScoreRow) + c, sizeof pair);
        if (!after) pair &= 0xffff;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = dot_pairs(acc[i][j], splat_pair(pair), x[j]);
      }
      return;
    }
#endif
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = kVectors > 1 ? load(row + j * kWidth) : load_some(row, last);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) acc[i][j] = fma(splat(weight_rows[i * kScoreRow + c]), x, acc[i][j]);
    }
  }

  bool finite(const Tile<Rows>& tile, int64_t begin, int64_t end) const {
    Vec zeros_times_values = zero();
    for (int64_t c = begin; c < end; ++c) {
      const Vec scale = Store::kScales ? splat(tile.value_scale[c]) * zero() : zero();
      for (int64_t column = 0; column < s_.e; column += kWidth)
        zeros_times_values =
            fma(load_some(tile.values[c] + column, s_.e - column), scale, zeros_times_values);
    }
    return bits_unequal(zeros_times_values, 0.0f) == 0;
  }

  // For rows that must not touch some of these values, a NaN or an infinity: 0 times those is a NaN.
  void add_visible_values(const Work& w, const Tile<Rows>& tile, int64_t begin, int64_t end) const {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = begin; c < end; ++c)
        if (w.scores[r * kScoreRow + c] != -kInfinity) add_values<1>(w, tile.values, c, c + 1, r, nullptr);
  }

  void keep(const Work& w, float* parts, int64_t batch, int64_t head, int64_t split) const {
    for (int64_t r = 0; r < rows_; ++r) {
      float* to = part(parts, batch, head + r / s_.m, r % s_.m, split);
      for (int64_t c = 0; c < value_columns_; c += kWidth) store(to + c, load(w.rows.sums + r * value_columns_ + c));
      to[value_columns_] = w.rows.tops[r];
      to[value_columns_ + 1] = sum(load(w.rows.totals + r * kWidth));
    }
  }

  // All ranges of one row, always in the same order.
  void merge(const Work& w, float* parts, int64_t row) const {
    const int64_t i = row % s_.m, head = row / s_.m % s_.h, batch = row / s_.m / s_.h;
    const int64_t splits = Sequence(s_, store_.length(batch)).splits;
    float top = -kInfinity, total = 0.0f;
    for (int64_t split = 0; split < splits; ++split)
      top = most(top, part(parts, batch, head, i, split)[value_columns_]);
    const float reference = top == -kInfinity ? 0.0f : top;
    for (int64_t c = 0; c < value_columns_; ++c) w.rows.sums[c] = 0.0f;
    for (int64_t split = 0; split < splits; ++split) {
      const float* from = part(parts, batch, head, i, split);
      const float factor = __builtin_exp2f(from[value_columns_] - reference);
      total += factor * from[value_columns_ + 1];
      for (int64_t c = 0; c < value_columns_; c += kWidth)
        store(w.rows.sums + c, fma(splat(factor), load(from + c), load(w.rows.sums + c)));
    }
    const RowEnd end(top, total, s_.sink ? s_.sink + head : nullptr);
    Asked* o = static_cast<Asked*>(s_.o) + batch * s_.o_b + head * s_.o_h + i * s_.o_m;
    for (int64_t c = 0; c < s_.e; c += kWidth)
      store_some(o + c, load(w.rows.sums + c) * splat(end.factor), least<int64_t>(kWidth, s_.e - c));
    end.keep(s_, row);
  }

  const attnkit_softmax& s_;     // with the longest sequence's n
  const Store store_;
  const int64_t heads_;          // query heads that share a walk over the keys
  const int64_t rows_;           // heads_ * m
  const Many many_;
  const bool together_;          // rows are worked off by many_
  const int64_t padded_;         // rows there is memory for
  const int64_t query_vectors_;
  const int64_t value_columns_;  // of one row of sums, whole vectors
  const int64_t splits_;         // of the sequence with most ranges
  const int64_t threads_;
};
