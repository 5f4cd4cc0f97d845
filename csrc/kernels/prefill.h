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
        wave_(clamp<int64_t>(kWaveBytes / most<int64_t>(sizes_.bytes(), 1), 1, call.b * call.g)),  // no keys, no bytes
        threads_(thread_count()) {}

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
      for (int64_t start = 0; start < heads; start += wave_) {
        char* const buffer = scratch + start / wave_ % 2 * wave_ * sizes_.bytes();
        const int64_t count = least(wave_, heads - start);
        // Nobody waits at the end of a wave: whoever is done packs the next one into the other buffer. All have left a
        // buffer when it is packed again, because all have packed the wave between.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * blocks; ++task)
          pack(start + task / blocks, packed(buffer, task / blocks), first_block + task % blocks);
        // Longest rows first: what is left at the end is short.
        const int64_t tasks = count * ratio_ * query_blocks_;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < tasks; ++task) {
          const int64_t slot = task / (ratio_ * query_blocks_), rest = task % (ratio_ * query_blocks_);
          const int64_t head = start + slot;
          block(work, packed(buffer, slot), head / s_.g, head % s_.g * ratio_ + rest / query_blocks_,
                query_blocks_ - 1 - rest % query_blocks_);
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
    Work(const Prefill& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          scores(reinterpret_cast<float*>(queries + kBlockQueries * p.query_steps_)),
          weights(reinterpret_cast<Element*>(scores + kRows * kTileKeys)),
          sums(reinterpret_cast<float*>(weights + kRows * kWeightStep)),
          totals(sums + kBlockQueries * p.value_columns_),
          tops(totals + kBlockQueries * kWidth),
          peaks(tops + kBlockQueries) {}
  };

  // Up to four key blocks, and the runs of neighbours among them: one product covers a run.
  struct Tile {
    int blocks = 0, runs = 0;
    bool whole = false;  // every row sees every key
    int64_t block[kTileBlocks];
    const int64_t* words[kTileBlocks];
    int run_begin[kTileBlocks + 1];
  };

  // Queries of the block in hand.
  struct Queries {
    int64_t batch, head, first, count;
    ATTNKIT_INLINE int groups() const { return static_cast<int>(ceil_div(count, kRows)); }
    ATTNKIT_INLINE int64_t begin(int group) const { return first + group * kRows; }
    ATTNKIT_INLINE int64_t last(int group) const { return first + least<int64_t>(count, (group + 1) * kRows) - 1; }
  };

  int64_t buffers() const { return wave_ < s_.b * s_.g ? 2 : 1; }
  int64_t work_bytes() const {
    return round_up(4 * (kBlockQueries * (query_steps_ + value_columns_ + kWidth + 1) + kRows * (kTileKeys + kWeightStep + kWidth)),
                    64);
  }
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

  void block(const Work& w, const Packed<Math>& kv, int64_t batch, int64_t head, int64_t query_block) const {
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
      const int64_t last_key = (tile.block[tile.blocks - 1] + 1) * kBlockKeys;
      tile.whole = !s_.offsets && visible_range(s_, first + queries.count - 1).begin <= tile.block[0] * kBlockKeys &&
                   visible_range(s_, first).end >= last_key;
      for (int group = 0; group < queries.groups(); ++group) attend(w, kv, queries, tile, group);
    }
    finish(w, queries);
  }

  // Blocks of an interval keep to multiples of the tile; those of a list are taken as they come.
  int64_t next_tile(const KeyBlocks& blocks, int64_t entry, Tile& tile) const {
    const int64_t limit = s_.offsets ? entry + kTileBlocks : (entry / kTileBlocks + 1) * kTileBlocks;
    for (; entry < least(limit, blocks.entry_end); ++entry) {
      const int64_t at = blocks.key_block(entry);
      if (tile.blocks == 0 || tile.block[tile.blocks - 1] + 1 != at) tile.run_begin[tile.runs++] = tile.blocks;
      tile.block[tile.blocks] = at;
      tile.words[tile.blocks++] = blocks.words(entry);
    }
    tile.run_begin[tile.runs] = tile.blocks;
    return entry;
  }

  // Columns of the tile that some row of the group may see inside one run. Column c of block i is 64 i + c.
  ATTNKIT_INLINE Range columns(const Queries& queries, const Tile& tile, int group, int run) const {
    const int64_t begin = tile.run_begin[run] * kBlockKeys, end = tile.run_begin[run + 1] * kBlockKeys;
    const int64_t shift = begin - tile.block[tile.run_begin[run]] * kBlockKeys;
    return {clamp(visible_range(s_, queries.begin(group)).begin + shift, begin, end),
            clamp(visible_range(s_, queries.last(group)).end + shift, begin, end)};
  }
  // Cut to whole vectors.
  static ATTNKIT_INLINE Range whole_vectors(Range r) {
    return {r.begin / kVectorKeys * kVectorKeys, round_up(r.end, kVectorKeys)};
  }
  // Whether some row of the group does not see all of the block.
  ATTNKIT_INLINE bool is_partial(const Queries& queries, const Tile& tile, int group, int i) const {
    const int64_t key = tile.block[i] * kBlockKeys;
    return tile.words[i] || visible_range(s_, queries.last(group)).begin > key ||
           visible_range(s_, queries.begin(group)).end < key + kBlockKeys;
  }

  // Six rows of the tile: logits, mask, weights, sum over values.
  void attend(const Work& w, const Packed<Math>& kv, const Queries& queries, const Tile& tile, int group) const {
    Range seen[kTileBlocks] = {{0, tile.blocks * kBlockKeys}};
    if (!tile.whole) {
      bool some = false;
      for (int run = 0; run < tile.runs; ++run) {
        seen[run] = columns(queries, tile, group, run);
        some = some || !seen[run].empty();
      }
      if (!some) return;
    }
    score(w, kv, tile, group, seen);
    bool careful = false;
    if (!tile.whole || !logits_.plain) {
      bool partial[kTileBlocks];
      for (int i = 0; i < tile.blocks; ++i) {
        partial[i] = is_partial(queries, tile, group, i);
        careful = careful || (kv.odd_values[tile.block[i]] && (s_.bias || partial[i]));
      }
      if (!logits_.plain) to_logits(w, queries, tile, group, seen);
      hide(w, queries, tile, group, seen, partial);
    }
    raise_tops(w, group);
    weigh(w, tile, group, seen);
    if (careful) {
      add_visible_values(w, kv, queries, tile, group, seen);
    } else {
      add_values(w, kv, tile, group, seen);
    }
  }

  // Products of queries and keys, strip by strip.
  void score(const Work& w, const Packed<Math>& kv, const Tile& tile, int group, const Range* seen) const {
    for (int i = 0; i < kRows; ++i) store(w.peaks + i * kWidth, splat(-kInfinity));
    for (int run = 0; run < tile.runs; ++run) {
      if (seen[run].empty()) continue;
      const Range r = whole_vectors(seen[run]);
      const int64_t shift = (tile.block[tile.run_begin[run]] - tile.run_begin[run]) * kBlockKeys;
      for (int64_t c = r.begin; c < r.end;) {
        const int64_t strip = c / kStrip * kStrip, stop = least(r.end, strip + kStrip);
        with_vectors((stop - c) / kWidth, [&](auto vectors) {
          product_and_peaks<Math, vectors.count>(w.queries + group * kRows * query_steps_, query_steps_,
                                                 kv.keys + (shift + strip) * sizes_.key_steps + c - strip,
                                                 sizes_.key_steps, w.scores + c, kTileKeys, w.peaks);
        });
        c = stop;
      }
    }
  }

  void to_logits(const Work& w, const Queries& queries, const Tile& tile, int group, const Range* seen) const {
    for (int run = 0; run < tile.runs; ++run) {
      if (seen[run].empty()) continue;
      const Range r = whole_vectors(seen[run]);
      const int64_t key = (tile.block[tile.run_begin[run]] - tile.run_begin[run]) * kBlockKeys + r.begin;
      for (int64_t i = queries.begin(group); i <= queries.last(group); ++i)
        logits_.apply(w.scores + (i - queries.begin(group)) * kTileKeys + r.begin,
                      static_cast<int>((r.end - r.begin) / kWidth), queries.batch, queries.head, i, key);
    }
  }

  // -inf where a row of the group may not look, and the maxima of what is left.
  void hide(const Work& w, const Queries& queries, const Tile& tile, int group, const Range* seen,
            const bool* partial) const {
    for (int64_t i = queries.begin(group); i <= queries.last(group); ++i) {
      float* scores = w.scores + (i - queries.begin(group)) * kTileKeys;
      Vec peak = splat(-kInfinity);
      for (int run = 0; run < tile.runs; ++run) {
        if (seen[run].empty()) continue;
        const Range r = whole_vectors(seen[run]);
        for (int64_t c = r.begin; c < r.end;) {
          const int64_t block = c / kBlockKeys, stop = least(r.end, (block + 1) * kBlockKeys);
          if (partial[block]) {
            const uint64_t word = visible_word(s_, i, tile.block[block], tile.words[block]);
            for (; c < stop; c += kWidth) {
              const Vec x = select(static_cast<Bits>(word >> c % kBlockKeys), load(scores + c), -kInfinity);
              store(scores + c, x);
              peak = max(peak, x);
            }
          } else {
            for (; c < stop; c += kWidth) peak = max(peak, load(scores + c));
          }
        }
      }
      store(w.peaks + (i - queries.begin(group)) * kWidth, peak);
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
  void weigh(const Work& w, const Tile& tile, int group, const Range* seen) const {
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
      for (int run = 0; run < tile.runs; ++run) {
        if (seen[run].empty()) continue;
        const Range r = whole_vectors(seen[run]);
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

  void add_values(const Work& w, const Packed<Math>& kv, const Tile& tile, int group, const Range* seen) const {
    float* sums = w.sums + group * kRows * value_columns_;
    for (int run = 0; run < tile.runs; ++run) {
      if (seen[run].empty()) continue;
      const int64_t begin = seen[run].begin / Math::kNumbers;
      const int64_t steps = ceil_div(seen[run].end, Math::kNumbers) - begin;
      const int64_t block = tile.block[tile.run_begin[run]] - tile.run_begin[run];
      const int64_t step = block * kBlockKeys / Math::kNumbers + begin;
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
  void add_visible_values(const Work& w, const Packed<Math>& kv, const Queries& queries, const Tile& tile, int group,
                          const Range* seen) const {
    for (int64_t i = queries.begin(group); i <= queries.last(group); ++i) {
      const int64_t row = i - queries.first;
      const Element* weights = w.weights + row % kRows * kWeightStep;
      for (int run = 0; run < tile.runs; ++run) {
        for (int64_t c = seen[run].begin; c < seen[run].end; ++c) {
          if (w.scores[row % kRows * kTileKeys + c] == -kInfinity) continue;
          const int64_t key = (tile.block[tile.run_begin[run]] - tile.run_begin[run]) * kBlockKeys + c;
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
  const int64_t wave_;           // KV heads packed at a time
  const int64_t threads_;
};
