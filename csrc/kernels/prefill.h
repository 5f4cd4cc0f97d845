// Attention of many queries: a block of 48 rows walks over tiles of 256 keys with a running maximum and sum.
//
// Keys and values are packed once per KV head and shared by all query blocks and all query heads of the group. Each row
// goes through the same operations in the same order whatever the batch, the number of threads and the block of queries
// it falls into: tiles of an interval mask start at multiples of 256 keys, and a masked weight is exactly 0.

constexpr int kTileBlocks = 4;
constexpr int64_t kTileKeys = kTileBlocks * kBlockKeys;
// KV heads are packed in waves of about this size: they are then still in the second cache when they are used, and packed
// memory does not grow with the batch. On a Zen 5 core with 1 MB of it, 2 % faster at n = 1024 than waves of 16 MB.
constexpr int64_t kWaveBytes = int64_t{1} << 20;
// Smaller KV heads are packed and worked on by one thread each as long as there are enough of them for all.
constexpr int64_t kOwnBytes = int64_t{5} << 17;

template <class Math, class T>
class Prefill {
  using Element = typename Math::Element;
  static constexpr int64_t kVectorKeys = kWidth * Math::kExpVectors;  // weights are written this many at a time
  static constexpr int64_t kWeightStep = kTileKeys / Math::kNumbers;
  // Rows whose weights are computed in one loop, as registers allow.
  static constexpr int kWeighRows = kWidth == 16 ? kRows / Math::kExpVectors : 2;

 public:
  explicit Prefill(const attnkit_softmax& call)
      : s_(call),
        sizes_(call),
        logits_(call),
        ratio_(call.h / call.g),
        query_blocks_(ceil_div(call.m, kBlockQueries)),
        query_steps_(round_up(sizes_.key_steps, kWidth)),
        value_columns_(sizes_.value_vectors * kWidth),
        narrow_(!call.offsets && spans_one_tile(call)),
        threads_(thread_count()),
        own_(sizes_.bytes() <= kOwnBytes ? most<int64_t>(call.b * call.g / threads_ - 1, 0) * threads_ : 0),
        wave_(own_ > 0 ? call.b * call.g - own_
                       : clamp<int64_t>(kWaveBytes / most<int64_t>(sizes_.bytes(), 1), 1, call.b * call.g)) {}  // no keys, no bytes

  int64_t scratch_bytes() const { return buffers() * wave_ * sizes_.bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    const int64_t heads = s_.b * s_.g;
    char* const works = scratch + buffers() * wave_ * sizes_.bytes();
    const Range keys = {visible_range(s_, 0).begin, visible_range(s_, s_.m - 1).end};
    const int64_t first_block = keys.begin / kBlockKeys;
    const int64_t blocks = keys.empty() ? 0 : ceil_div(keys.end, kBlockKeys) - first_block;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, works + thread_number() * work_bytes());
      for (int64_t start = own_; start < heads; start += wave_) {
        char* const buffer = scratch + (start - own_) / wave_ % 2 * wave_ * sizes_.bytes();
        const int64_t count = least(wave_, heads - start);
        // Nobody waits at the end of a wave: whoever is done packs the next one into the other buffer. All have left a
        // buffer when it is packed again, because all have packed the wave between.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * blocks; ++task)
          pack(start + task / blocks, packed(buffer, task / blocks), first_block + task % blocks);
        if (start == own_ && own_ > 0) {
#pragma omp for schedule(dynamic, 1) nowait
          for (int64_t head = 0; head < own_; ++head) {
            for (int64_t i = 0; i < blocks; ++i) pack(head, work.own, first_block + i);
            for (int64_t task = 0; task < ratio_ * query_blocks_; ++task) block(work, work.own, head, task);
          }
        }
        // Longest rows first: what is left at the end is short.
        const int64_t tasks = count * ratio_ * query_blocks_;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < tasks; ++task) {
          const int64_t slot = task / (ratio_ * query_blocks_);
          block(work, packed(buffer, slot), start + slot, task % (ratio_ * query_blocks_));
        }
      }
    }
  }

 private:
  // What one thread works in.
  struct Work {
    Element* queries;  // 48 rows of query_steps_
    float* scores;     // 6 rows of a tile
    Element* weights;  // 6 rows of a tile
    float* sums;       // 48 rows of value_columns_, not yet divided by the totals
    float* totals;     // 48 rows of one vector
    float* tops;       // 48, see Prefill::raise_tops
    float* peaks;      // 6 rows of one vector: maxima of the tile's scores
    Packed<Math> own;  // a KV head that no other thread works on
    Work(const Prefill& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          scores(reinterpret_cast<float*>(queries + kBlockQueries * p.query_steps_)),
          weights(reinterpret_cast<Element*>(scores + kRows * kTileKeys)),
          sums(reinterpret_cast<float*>(weights + kRows * kWeightStep)),
          totals(sums + kBlockQueries * p.value_columns_),
          tops(totals + kBlockQueries * kWidth),
          peaks(tops + kBlockQueries),
          own(memory + p.own_at(), p.sizes_) {}
  };

  // Up to four key blocks. Column c of block i is 64 i + c.
  struct Tile {
    int blocks = 0;
    int64_t block[kTileBlocks];
    const int64_t* words[kTileBlocks];
  };

  // What six rows see of a tile: of each block the columns that some row sees, and spans of neighbouring keys among them:
  // one product covers a span.
  struct View {
    int spans = 0;
    Range span[kTileBlocks];
    int64_t shift[kTileBlocks];  // from a span's columns to keys
    Range columns[kTileBlocks];
    bool partial[kTileBlocks];  // some row does not see all of the block
    bool partly = false;        // some block that is seen is partial
  };

  // Queries of the block in hand.
  struct Queries {
    int64_t batch, head, first, count;
    ATTNKIT_INLINE int groups() const { return static_cast<int>(ceil_div(count, kRows)); }
    ATTNKIT_INLINE int64_t begin(int group) const { return first + group * kRows; }
    ATTNKIT_INLINE int64_t last(int group) const { return first + least<int64_t>(count, (group + 1) * kRows) - 1; }
  };

  static bool spans_one_tile(const attnkit_softmax& s) {
    constexpr int64_t kMost = (kTileBlocks - 1) * kBlockKeys + 1 - kBlockQueries;  // wherever in a block they begin
    return s.left <= kMost && s.right <= kMost && s.left + s.right <= kMost;
  }
  int64_t buffers() const { return wave_ < s_.b * s_.g - own_ ? 2 : 1; }
  int64_t own_at() const {
    const int64_t row = query_steps_ + value_columns_ + kWidth + 1;
    return round_up(4 * (kBlockQueries * row + kRows * (kTileKeys + kWeightStep + kWidth)), 64);
  }
  int64_t work_bytes() const { return own_at() + (own_ > 0 ? sizes_.bytes() : 0); }
  int64_t thread_count() const {
    return useful_threads(s_, s_.b * s_.g * ratio_ * query_blocks_);
  }
  Packed<Math> packed(char* scratch, int64_t slot) const {
    return Packed<Math>(scratch + slot * sizes_.bytes(), sizes_);
  }

  void pack(int64_t head, Packed<Math> to, int64_t key_block) const {
    const int64_t batch = head / s_.g, group = head % s_.g;
    const T* keys = static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g;
    const T* values = static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g;
    pack_key_block<Math>(s_, keys, sizes_, key_block, to.keys);
    to.odd_values[key_block] = pack_value_block<Math>(s_, values, sizes_, key_block, to.values);
  }

  // One block of queries of the heads that share a KV head, those with the most keys first.
  void block(const Work& w, const Packed<Math>& kv, int64_t kv_head, int64_t task) const {
    const int64_t batch = kv_head / s_.g, head = kv_head % s_.g * ratio_ + task / query_blocks_;
    const int64_t query_block = query_blocks_ - 1 - task % query_blocks_;
    const int64_t first = query_block * kBlockQueries;
    const Queries queries = {batch, head, first, least(kBlockQueries, s_.m - first)};
    const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + head * s_.q_h + first * s_.q_m;
    pack_queries<Math>(s_, q, queries.count, queries.groups() * kRows, query_steps_, w.queries);
    // The block this thread most likely takes next.
    if (query_block >= threads_)
      for (int64_t i = 0; i < kBlockQueries; ++i) prefetch_row(q + (i - threads_ * kBlockQueries) * s_.q_m, s_.d);
    for (int64_t i = 0; i < queries.groups() * kRows * value_columns_; ++i) w.sums[i] = 0.0f;
    for (int64_t i = 0; i < kBlockQueries * kWidth; ++i) w.totals[i] = 0.0f;
    for (int64_t i = 0; i < kBlockQueries; ++i) w.tops[i] = i < queries.count ? -kInfinity : 0.0f;

    const Range keys = {visible_range(s_, first).begin, visible_range(s_, first + queries.count - 1).end};
    const KeyBlocks blocks(s_, batch, head, query_block, keys);
    for (int64_t entry = blocks.entry; entry < blocks.entry_end;) {
      Tile tile;
      entry = next_tile(blocks, entry, tile);
      for (int group = 0; group < queries.groups(); ++group) attend(w, kv, queries, tile, group);
    }
    finish(w, queries);
  }

  // Blocks of an interval keep to multiples of the tile, or are one tile where that always holds them; those of a list are
  // taken as they come.
  int64_t next_tile(const KeyBlocks& blocks, int64_t entry, Tile& tile) const {
    const int64_t limit = s_.offsets || narrow_ ? entry + kTileBlocks : (entry / kTileBlocks + 1) * kTileBlocks;
    for (; entry < least(limit, blocks.entry_end); ++entry) {
      tile.block[tile.blocks] = blocks.key_block(entry);
      tile.words[tile.blocks++] = blocks.words(entry);
    }
    return entry;
  }

  ATTNKIT_INLINE View view(const Queries& queries, const Tile& tile, int group) const {
    const int64_t first = queries.begin(group), last = queries.last(group);
    const Range early = visible_range(s_, first), late = visible_range(s_, last);
    View seen;
    for (int i = 0; i < tile.blocks; ++i) {
      const int64_t key = tile.block[i] * kBlockKeys;
      Range r = {clamp<int64_t>(early.begin - key, 0, kBlockKeys), clamp<int64_t>(late.end - key, 0, kBlockKeys)};
      seen.partial[i] = late.begin > key || early.end < key + kBlockKeys;
      if (tile.words[i]) {
        uint64_t some = 0, every = kAll;
        for (int64_t row = first; row <= last; ++row) {
          const uint64_t word = static_cast<uint64_t>(tile.words[i][row % kBlockQueries]);
          some |= word;
          every &= word;
        }
        seen.partial[i] = seen.partial[i] || every != kAll;
        some &= bit_range(r.begin, r.end);
        r = some ? Range{__builtin_ctzll(some), kBlockKeys - __builtin_clzll(some)} : Range{0, 0};
      }
      const int64_t shift = key - i * kBlockKeys;
      const Range columns = {i * kBlockKeys + r.begin, i * kBlockKeys + r.end};
      seen.columns[i] = columns;
      if (columns.empty()) continue;
      seen.partly = seen.partly || seen.partial[i];
      if (seen.spans > 0 && seen.span[seen.spans - 1].end == columns.begin && seen.shift[seen.spans - 1] == shift) {
        seen.span[seen.spans - 1].end = columns.end;
      } else {
        seen.span[seen.spans] = columns;
        seen.shift[seen.spans++] = shift;
      }
    }
    return seen;
  }
  // Cut to whole vectors.
  static ATTNKIT_INLINE Range whole_vectors(Range r) {
    return {r.begin / kVectorKeys * kVectorKeys, round_up(r.end, kVectorKeys)};
  }

  // Six rows of the tile: logits, mask, weights, sum over values.
  void attend(const Work& w, const Packed<Math>& kv, const Queries& queries, const Tile& tile, int group) const {
    const View seen = view(queries, tile, group);
    if (seen.spans == 0) return;
    score(w, kv, group, seen);
    if (!logits_.plain) to_logits(w, queries, group, seen);
    if (seen.partly || !logits_.plain) hide(w, queries, tile, group, seen);
    raise_tops(w, group);
    weigh(w, group, seen);
    bool careful = false;
    for (int i = 0; i < tile.blocks; ++i)
      careful = careful || (kv.odd_values[tile.block[i]] && !seen.columns[i].empty() && (s_.bias || seen.partial[i]));
    if (careful) {
      add_visible_values(w, kv, queries, group, seen);
    } else {
      add_values(w, kv, group, seen);
    }
  }

  // Products of queries and keys, strip by strip, and the rows' maxima over blocks that all of them see.
  void score(const Work& w, const Packed<Math>& kv, int group, const View& seen) const {
    alignas(64) float unused[kRows * kWidth];
    for (int i = 0; i < kRows; ++i) {
      store(w.peaks + i * kWidth, splat(-kInfinity));
      store(unused + i * kWidth, splat(-kInfinity));
    }
    for (int span = 0; span < seen.spans; ++span) {
      const Range r = whole_vectors(seen.span[span]);
      for (int64_t c = r.begin; c < r.end;) {
        const int64_t strip = c / kStrip * kStrip, stop = least(r.end, strip + kStrip);
        with_vectors((stop - c) / kWidth, [&](auto vectors) {
          product_and_peaks<Math, vectors.count>(w.queries + group * kRows * query_steps_, query_steps_,
                                                 kv.keys + (seen.shift[span] + strip) * sizes_.key_steps + c - strip,
                                                 sizes_.key_steps, w.scores + c, kTileKeys,
                                                 seen.partial[c / kBlockKeys] ? unused : w.peaks);
        });
        c = stop;
      }
    }
  }

  void to_logits(const Work& w, const Queries& queries, int group, const View& seen) const {
    for (int span = 0; span < seen.spans; ++span) {
      const Range r = whole_vectors(seen.span[span]);
      for (int64_t i = queries.begin(group); i <= queries.last(group); ++i)
        logits_.apply(w.scores + (i - queries.begin(group)) * kTileKeys + r.begin,
                      static_cast<int>((r.end - r.begin) / kWidth), queries.batch, queries.head, i,
                      seen.shift[span] + r.begin);
    }
  }

  // -inf where a row of the group may not look, and the maxima of what is left. Products that stay as they are have theirs.
  void hide(const Work& w, const Queries& queries, const Tile& tile, int group, const View& seen) const {
    for (int64_t i = queries.begin(group); i <= queries.last(group); ++i) {
      float* scores = w.scores + (i - queries.begin(group)) * kTileKeys;
      float* peaks = w.peaks + (i - queries.begin(group)) * kWidth;
      const Range keys = visible_range(s_, i);
      Vec peak = logits_.plain ? load(peaks) : splat(-kInfinity);
      for (int block = 0; block < tile.blocks; ++block) {
        if (seen.columns[block].empty() || (logits_.plain && !seen.partial[block])) continue;
        const Range r = whole_vectors(seen.columns[block]);
        const uint64_t word = seen.partial[block] ? visible_word(i, keys, tile.block[block], tile.words[block]) : kAll;
        for (int64_t c = r.begin; c < r.end; c += kWidth) {
          const Vec x = select(static_cast<Bits>(word >> c % kBlockKeys), load(scores + c), -kInfinity);
          store(scores + c, x);
          peak = max(peak, x);
        }
      }
      store(peaks, peak);
    }
  }

  // The exponent a row's weights are taken against moves only when the tile goes far above it.
  void raise_tops(const Work& w, int group) const {
    float* tops = w.tops + group * kRows;
    const Vec factor = splat(logits_.exponent);
    Vec above = splat(-kInfinity);
    for (int i = 0; i < kRows; ++i)
      // A row that has seen nothing gives inf - inf here: in first place, max drops it.
      above = max(fma(load(w.peaks + i * kWidth), factor, splat(-kLateRescale - tops[i])), above);
    if (!any_above(above, 0.0f)) return;
    for (int i = 0; i < kRows; ++i) {
      const float top = largest(load(w.peaks + i * kWidth)) * logits_.exponent;
      if (!(top > tops[i] + kLateRescale)) continue;
      if (tops[i] != -kInfinity) rescale(w, group * kRows + i, __builtin_exp2f(tops[i] - top));
      tops[i] = top;
    }
  }

  void rescale(const Work& w, int64_t row, float by) const {
    float* totals = w.totals + row * kWidth;
    float* sums = w.sums + row * value_columns_;
    store(totals, load(totals) * splat(by));
    for (int64_t c = 0; c < value_columns_; c += kWidth) store(sums + c, load(sums + c) * splat(by));
  }

  // Weights of the group, and their totals. Rows go through one loop together: one row alone is a chain of dependent
  // instructions, and a loop that ends after every row is often guessed wrong.
  void weigh(const Work& w, int group, const View& seen) const {
    const Vec factor = splat(logits_.exponent);
#pragma GCC unroll 1
    for (int first = 0; first < kRows; first += kWeighRows) {
      const float* scores = w.scores + first * kTileKeys;
      Element* weights = w.weights + first * kWeightStep;
      float* totals = w.totals + (group * kRows + first) * kWidth;
      const float* tops = w.tops + group * kRows + first;
      Vec total[kWeighRows], shift[kWeighRows];
#pragma GCC unroll 6
      for (int i = 0; i < kWeighRows; ++i) {
        total[i] = load(totals + i * kWidth);
        shift[i] = splat(tops[i] == -kInfinity ? 0.0f : -tops[i]);
      }
      for (int span = 0; span < seen.spans; ++span) {
        const Range r = whole_vectors(seen.span[span]);
        for (int64_t c = r.begin; c < r.end; c += kVectorKeys) {
#pragma GCC unroll 6
          for (int i = 0; i < kWeighRows; ++i) {
            Vec x[Math::kExpVectors];
#pragma GCC unroll 2
            for (int j = 0; j < Math::kExpVectors; ++j) {
              x[j] = exp2<Math::kExpDegree>(fma(load(scores + i * kTileKeys + c + j * kWidth), factor, shift[i]));
              total[i] = total[i] + x[j];
            }
            Math::store_weights(weights + i * kWeightStep + c / Math::kNumbers, x);
          }
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < kWeighRows; ++i) store(totals + i * kWidth, total[i]);
    }
  }

  void add_values(const Work& w, const Packed<Math>& kv, int group, const View& seen) const {
    float* sums = w.sums + group * kRows * value_columns_;
    for (int span = 0; span < seen.spans; ++span) {
      const int64_t begin = seen.span[span].begin / Math::kNumbers;
      const int64_t steps = ceil_div(seen.span[span].end, Math::kNumbers) - begin;
      const int64_t step = seen.shift[span] / Math::kNumbers + begin;
      for (int64_t vector = 0; vector < sizes_.value_vectors; vector += kStripVectors) {
        const int64_t vectors = least<int64_t>(kStripVectors, sizes_.value_vectors - vector);
        with_vectors(vectors, [&](auto strip) {
          add_product<Math, strip.count>(w.weights + begin, kWeightStep,
                                         kv.values + vector * kWidth * sizes_.value_steps + step * vectors * kWidth,
                                         steps, sums + vector * kWidth, value_columns_);
        });
      }
    }
  }

  // The same for rows that must not touch some values of the tile, a NaN or an infinity: 0 times those is a NaN.
  void add_visible_values(const Work& w, const Packed<Math>& kv, const Queries& queries, int group,
                          const View& seen) const {
    for (int64_t i = queries.begin(group); i <= queries.last(group); ++i) {
      const int64_t row = i - queries.first;
      const Element* weights = w.weights + row % kRows * kWeightStep;
      for (int span = 0; span < seen.spans; ++span) {
        for (int64_t c = seen.span[span].begin; c < seen.span[span].end; ++c) {
          if (w.scores[row % kRows * kTileKeys + c] == -kInfinity) continue;
          const int64_t key = seen.shift[span] + c;
          const Vec weight = splat(Math::weight(weights, c));
          for (int64_t vector = 0; vector < sizes_.value_vectors; ++vector) {
            const int64_t strip = vector / kStripVectors * kStripVectors;
            const int64_t vectors = least<int64_t>(kStripVectors, sizes_.value_vectors - strip);
            const Element* step = kv.values + strip * kWidth * sizes_.value_steps +
                                  (key / Math::kNumbers * vectors + vector - strip) * kWidth;
            float* sums = w.sums + row * value_columns_ + vector * kWidth;
            store(sums, fma(weight, Math::values_of(step, key), load(sums)));
          }
        }
      }
    }
  }

  void finish(const Work& w, const Queries& queries) const {
    T* o = static_cast<T*>(s_.o) + queries.batch * s_.o_b + queries.head * s_.o_h + queries.first * s_.o_m;
    for (int64_t row = 0; row < queries.count; ++row) {
      const RowEnd end(w.tops[row], sum(load(w.totals + row * kWidth)), s_.sink ? s_.sink + queries.head : nullptr);
      const Vec factor = splat(end.factor);
      const float* sums = w.sums + row * value_columns_;
      for (int64_t c = 0; c < s_.e; c += kWidth)
        store_some(o + row * s_.o_m + c, load(sums + c) * factor, least<int64_t>(kWidth, s_.e - c));
      end.keep(s_, (queries.batch * s_.h + queries.head) * s_.m + queries.first + row);
    }
  }

  const attnkit_softmax& s_;
  const PackedSizes<Math> sizes_;
  const Logits logits_;
  const int64_t ratio_;          // query heads of one KV head
  const int64_t query_blocks_;
  const int64_t query_steps_;    // of one packed query, whole vectors
  const int64_t value_columns_;  // of one row of sums, whole vectors
  const bool narrow_;            // the keys of a block of queries always fit into one tile
  const int64_t threads_;
  const int64_t own_;            // KV heads that one thread each packs and works on
  const int64_t wave_;           // of the others, packed at a time
};
