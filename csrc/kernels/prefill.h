// Attention of many queries: a block of 48 rows walks over tiles of 256 keys with a running maximum and sum.
//
// Keys and values are packed once and shared by all query blocks and all query heads of the group. What is packed together
// is a piece: a KV head, or a stretch of its queries with the keys that a short interval shows them. Pieces that fit into the
// second cache are done by one thread each, larger ones and the last few by all threads together.
// Six rows compute only the columns of a tile that some of them see, in an interval and in the words of a block list.
//
// Each row goes through the same operations in the same order whatever the batch, the number of threads, the piece and the
// block of queries it falls into: tiles of an interval mask start at multiples of 256 keys, or are all that a row sees where
// the interval is so short that 48 rows never see more than one tile holds; and a masked weight is exactly 0.

constexpr int kTileBlocks = 4;
constexpr int64_t kTileKeys = kTileBlocks * kBlockKeys;
// Pieces are packed in waves of about this size: they are then still in the second cache when they are used, and packed
// memory does not grow with the batch. On a Zen 5 core with 1 MB of it, 2 % faster at n = 1024 than waves of 16 MB.
constexpr int64_t kWaveBytes = int64_t{1} << 20;
// A piece that leaves half of the second cache free is packed and worked on by one thread: nobody waits for it, and it does
// not move between the caches of two cores.
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
        logits_(call),
        dropout_(call),
        ratio_(call.h / call.g),
        query_blocks_(ceil_div(call.m, kBlockQueries)),
        narrow_(!call.offsets && spans_one_tile()),
        threads_(useful_threads(call, call.b * call.h * query_blocks_)),
        piece_blocks_(piece_blocks()),
        pieces_(ceil_div(query_blocks_, piece_blocks_)),
        sizes_(call, key_blocks()),
        query_steps_(round_up(sizes_.key_steps, kWidth)),
        value_columns_(sizes_.value_vectors * kWidth),
        own_(sizes_.bytes() <= kOwnBytes ? most<int64_t>(all_pieces() / threads_ - 1, 0) * threads_ : 0),
        // Without keys there are no bytes.
        wave_(own_ > 0 ? all_pieces() - own_
                       : clamp<int64_t>(kWaveBytes / most<int64_t>(sizes_.bytes(), 1), 1, all_pieces())) {}

  int64_t scratch_bytes() const { return buffers() * wave_ * sizes_.bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    char* const works = scratch + buffers() * wave_ * sizes_.bytes();
    const int64_t tasks = ratio_ * piece_blocks_;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, works + thread_number() * work_bytes());
      for (int64_t start = own_; start < all_pieces(); start += wave_) {
        char* const buffer = scratch + (start - own_) / wave_ % 2 * wave_ * sizes_.bytes();
        const int64_t count = least(wave_, all_pieces() - start);
        // Nobody waits at the end of a wave: whoever is done packs the next one into the other buffer. All have left a
        // buffer when it is packed again, because all have packed the wave between.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * sizes_.key_blocks; ++task)
          pack(piece(start + task / sizes_.key_blocks), buffer + task / sizes_.key_blocks * sizes_.bytes(),
               task % sizes_.key_blocks);
        if (start == own_) {
#pragma omp for schedule(dynamic, 1) nowait
          for (int64_t number = 0; number < own_; ++number) {
            for (int64_t i = 0; i < sizes_.key_blocks; ++i) pack(piece(number), work.own, i);
            for (int64_t task = 0; task < tasks; ++task) block(work, work.own, piece(number), task, 1);
          }
        }
        // What is left is shared out in blocks, longest rows first: what is left at the end is short.
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < count * tasks; ++task)
          block(work, buffer + task / tasks * sizes_.bytes(), piece(start + task / tasks), task % tasks, threads_);
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
    char* own;         // a packed piece that no other thread works on
    Work(const Prefill& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          scores(reinterpret_cast<float*>(queries + kBlockQueries * p.query_steps_)),
          weights(reinterpret_cast<Element*>(scores + kRows * kTileKeys)),
          sums(reinterpret_cast<float*>(weights + kRows * kWeightStep)),
          totals(sums + kBlockQueries * p.value_columns_),
          tops(totals + kBlockQueries * kWidth),
          peaks(tops + kBlockQueries),
          own(memory + p.own_at()) {}
  };

  // Up to four key blocks. Column c of block i is 64 i + c.
  struct Tile {
    int blocks = 0;
    int64_t block[kTileBlocks];
    const int64_t* words[kTileBlocks];
  };

  // A packed piece, whose first block is key block `first` of the head.
  struct Pack : Packed<Math> {
    int64_t first;
  };

  // What six rows see of a tile: of each block the columns that some row sees, and spans of neighbouring keys among them:
  // one product covers a span.
  struct View {
    int spans = 0;
    Range span[kTileBlocks];
    int64_t shift[kTileBlocks];  // from a span's columns to keys
    Range columns[kTileBlocks];
    bool partial[kTileBlocks];  // some row does not see all of the block
    uint64_t words[kTileBlocks][kRows];  // of a partial block: what each row sees
  };

  // Queries of the block in hand.
  struct Queries {
    int64_t batch, head, first, count;
    ATTNKIT_INLINE int groups() const { return static_cast<int>(ceil_div(count, kRows)); }
    ATTNKIT_INLINE int64_t begin(int group) const { return first + group * kRows; }
    ATTNKIT_INLINE int64_t last(int group) const { return first + least<int64_t>(count, (group + 1) * kRows) - 1; }
  };

  // Blocks of queries of one KV head, and the key blocks they see.
  struct Piece {
    int64_t head, first, count, key_block, key_blocks;
  };

  // How far apart the keys of one query can be, and not more than all. A bound that no pair reaches says nothing: who has
  // left it out gets the same bits.
  int64_t reach() const {
    const int64_t most_left = clamp<int64_t>(s_.left, 0, most<int64_t>(s_.n - 1, 0));
    const int64_t most_right = clamp<int64_t>(s_.right, 0, s_.m - 1);
    return least(most_left + most_right, s_.n);
  }
  // A head that is too large is cut where the interval is so short that few keys are packed twice.
  int64_t piece_blocks() const {
    const int64_t most_keys = (kOwnBytes / PackedSizes<Math>(s_, 1).bytes() - 1) * kBlockKeys;
    const int64_t blocks = (most_keys - reach()) / kBlockQueries;
    if (blocks * kBlockQueries < reach() || blocks < 1) return query_blocks_;
    return s_.b * s_.g * (query_blocks_ / blocks) < 2 * threads_ ? query_blocks_ : least(blocks, query_blocks_);
  }
  int64_t all_pieces() const { return s_.b * s_.g * pieces_; }
  Piece piece(int64_t number) const {
    const int64_t first = number % pieces_ * piece_blocks_, count = least(piece_blocks_, query_blocks_ - first);
    const Range keys = {visible_range(s_, first * kBlockQueries).begin,
                        visible_range(s_, least((first + count) * kBlockQueries, s_.m) - 1).end};
    const int64_t key_block = keys.begin / kBlockKeys;
    return {number / pieces_, first, count, key_block, keys.empty() ? 0 : ceil_div(keys.end, kBlockKeys) - key_block};
  }
  // Of the largest piece, or a few more.
  int64_t key_blocks() const {
    return pieces_ == 1 ? piece(0).key_blocks : ceil_div(piece_blocks_ * kBlockQueries + reach(), kBlockKeys) + 1;
  }
  bool spans_one_tile() const {
    return reach() <= (kTileBlocks - 1) * kBlockKeys + 1 - kBlockQueries;  // wherever in a block they begin
  }
  int64_t buffers() const { return wave_ < all_pieces() - own_ ? 2 : 1; }
  int64_t own_at() const {
    const int64_t row = query_steps_ + value_columns_ + kWidth + 1;
    return round_up(4 * (kBlockQueries * row + kRows * (kTileKeys + kWeightStep + kWidth)), 64);
  }
  int64_t work_bytes() const { return own_at() + (own_ > 0 ? sizes_.bytes() : 0); }

  // Key block `i` of a piece; the blocks of a packed piece are counted from its first.
  void pack(const Piece& piece, char* memory, int64_t i) const {
    if (i >= piece.key_blocks) return;
    const Packed<Math> to(memory, sizes_);
    const int64_t batch = piece.head / s_.g, group = piece.head % s_.g, key = piece.key_block * kBlockKeys;
    const T* keys = static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g + key * s_.k_n;
    const T* values = static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g + key * s_.v_n;
    const attnkit_softmax rest = packing_call(s_, s_.n - key, s_.k_n, s_.e, s_.v_n);
    const int64_t count = least(kBlockKeys, rest.n - i * kBlockKeys);
    for (int64_t k = i * kBlockKeys; k < i * kBlockKeys + count; ++k) prefetch_row(values + k * s_.v_n, s_.e);
    pack_key_block<Math>(rest, keys, sizes_, i, to.keys);
    to.odd_values[i] = pack_value_block<Math>(rest, values, sizes_, i, to.values);
  }

  // One block of queries of the heads that share a KV head: those with the most keys first, and heads in turn, so that
  // threads which do so too find the keys of their last block again. `next` tasks on is what this thread most likely works
  // on after it.
  void block(const Work& w, char* memory, const Piece& piece, int64_t task, int64_t next) const {
    if (task / ratio_ >= piece.count) return;
    const Pack kv = {Packed<Math>(memory, sizes_), piece.key_block};
    const int64_t batch = piece.head / s_.g, head = piece.head % s_.g * ratio_ + task % ratio_;
    const int64_t query_block = block_of(piece, task);
    const int64_t first = query_block * kBlockQueries, end = least(first + kBlockQueries, s_.m);
    const T* later = nullptr;
    if ((task + next) / ratio_ < piece.count)
      later = queries_at(batch, piece.head % s_.g * ratio_ + (task + next) % ratio_,
                         block_of(piece, task + next) * kBlockQueries);
    // Rows whose keys are one tile share nothing but the key blocks: six at a time, their sums stay in the first cache.
    const int64_t count = narrow_ ? kRows : kBlockQueries;
    for (int64_t row = first; row < end; row += count)
      rows(w, kv, {batch, head, row, least(count, end - row)}, query_block, later ? later + (row - first) * s_.q_m : nullptr);
  }
  int64_t block_of(const Piece& piece, int64_t task) const { return piece.first + piece.count - 1 - task / ratio_; }
  const T* queries_at(int64_t batch, int64_t head, int64_t first) const {
    return static_cast<const T*>(s_.q) + batch * s_.q_b + head * s_.q_h + first * s_.q_m;
  }

  // Neighbouring queries over all they see; `later` are as many that this thread works on in its next task, or null.
  void rows(const Work& w, const Pack& kv, const Queries& queries, int64_t query_block, const T* later) const {
    const int64_t first = queries.first, padded = queries.groups() * kRows;
    pack_queries<Math>(s_, queries_at(queries.batch, queries.head, first), queries.count, padded, query_steps_, w.queries);
    if (later)
      for (int64_t i = 0; i < queries.count; ++i) prefetch_row(later + i * s_.q_m, s_.d);
    for (int64_t i = 0; i < padded * value_columns_; ++i) w.sums[i] = 0.0f;
    for (int64_t i = 0; i < padded * kWidth; ++i) w.totals[i] = 0.0f;
    for (int64_t i = 0; i < padded; ++i) w.tops[i] = i < queries.count ? -kInfinity : 0.0f;

    const Range keys = {visible_range(s_, first).begin, visible_range(s_, first + queries.count - 1).end};
    const KeyBlocks blocks(s_, queries.batch, queries.head, query_block, keys);
    for (int64_t entry = blocks.entry; entry < blocks.entry_end;) {
      Tile tile;
      entry = next_tile(blocks, entry, tile);
      for (int group = 0; group < queries.groups(); ++group) {
        // Results that are stored soon: rows that see few keys would wait for each line of them.
        if (entry == blocks.entry_end)
          for (int64_t i = group * kRows; i < least<int64_t>(queries.count, (group + 1) * kRows); ++i)
            prefetch_row(output(queries) + i * s_.o_m, s_.e);
        attend(w, kv, queries, tile, group);
      }
    }
    finish(w, queries);
  }
  T* output(const Queries& queries) const {
    return static_cast<T*>(s_.o) + queries.batch * s_.o_b + queries.head * s_.o_h + queries.first * s_.o_m;
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
      seen.partial[i] = tile.words[i] || late.begin > key || early.end < key + kBlockKeys;
      if (seen.partial[i]) {
        uint64_t some = 0, every = kAll;
        for (int64_t row = 0; row < kRows; ++row) {
          const int64_t query = least(first + row, last);
          const uint64_t word = visible_word(s_, query, tile.block[i], tile.words[i]);
          seen.words[i][row] = word;
          some |= word;
          every &= word;
        }
        seen.partial[i] = every != kAll;
        r = some ? Range{__builtin_ctzll(some), kBlockKeys - __builtin_clzll(some)} : Range{0, 0};
      }
      const int64_t shift = key - i * kBlockKeys;
      const Range columns = {i * kBlockKeys + r.begin, i * kBlockKeys + r.end};
      seen.columns[i] = columns;
      if (columns.empty()) continue;
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
  void attend(const Work& w, const Pack& kv, const Queries& queries, const Tile& tile, int group) const {
    const View seen = view(queries, tile, group);
    if (seen.spans == 0) return;
    score(w, kv, group, seen);
    if (!logits_.plain) {
      to_logits(w, queries, group, seen);
      hide(w, tile, seen);
    }
    raise_tops(w, group);
    if (dropout_.drops) {
      weigh<true>(w, queries, group, seen);
    } else {
      weigh<false>(w, queries, group, seen);
    }
    bool careful = false;
    for (int i = 0; i < tile.blocks; ++i)
      careful = careful || (!seen.columns[i].empty() && (s_.bias || seen.partial[i]) && kv.odd_values[tile.block[i] - kv.first]);
    if (careful) {
      add_visible_values(w, kv, queries, group, seen);
    } else {
      add_values(w, kv, group, seen);
    }
  }

  // Products of queries and keys, strip by strip, and the rows' maxima. Products that stay as they are, are hidden on the
  // way where a row may not look.
  void score(const Work& w, const Pack& kv, int group, const View& seen) const {
    for (int i = 0; i < kRows; ++i) store(w.peaks + i * kWidth, splat(-kInfinity));
    for (int span = 0; span < seen.spans; ++span) {
      const Range r = {seen.span[span].begin / kWidth * kWidth, round_up(seen.span[span].end, kWidth)};
      const int64_t shift = seen.shift[span] - kv.first * kBlockKeys;
      for (int64_t c = r.begin; c < r.end;) {
        const int64_t strip = c / kStrip * kStrip, stop = least(r.end, strip + kStrip), block = c / kBlockKeys;
        with_vectors((stop - c) / kWidth, [&](auto vectors) {
          const auto multiply = [&](auto seen_of) {
            product_and_peaks<Math, vectors.count>(w.queries + group * kRows * query_steps_, query_steps_,
                                                   kv.keys + (shift + strip) * sizes_.key_steps + c - strip,
                                                   sizes_.key_steps, w.scores + c, kTileKeys, w.peaks, seen_of);
          };
          if (seen.partial[block] && logits_.plain) return multiply(Words{seen.words[block], c % kBlockKeys});
          multiply(Everything());
        });
        c = stop;
      }
      // Vectors of weights may be longer.
      const Range whole = whole_vectors(seen.span[span]);
      if (whole.begin < r.begin) hide_vector(w, whole.begin);
      if (r.end < whole.end) hide_vector(w, r.end);
    }
  }
  static ATTNKIT_INLINE void hide_vector(const Work& w, int64_t column) {
    for (int i = 0; i < kRows; ++i) store(w.scores + i * kTileKeys + column, splat(-kInfinity));
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

  // -inf where a row of the group may not look, and the maxima of what is left.
  void hide(const Work& w, const Tile& tile, const View& seen) const {
    for (int i = 0; i < kRows; ++i) {
      float* scores = w.scores + i * kTileKeys;
      Vec peak = splat(-kInfinity);
      for (int block = 0; block < tile.blocks; ++block) {
        if (seen.columns[block].empty()) continue;
        const Range r = whole_vectors(seen.columns[block]);
        const uint64_t word = seen.partial[block] ? seen.words[block][i] : kAll;
        for (int64_t c = r.begin; c < r.end; c += kWidth) {
          const Vec x = select(static_cast<Bits>(word >> c % kBlockKeys), load(scores + c), -kInfinity);
          store(scores + c, x);
          peak = max(peak, x);
        }
      }
      store(w.peaks + i * kWidth, peak);
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

  // Weights of the group, and their totals, which dropout leaves alone. Rows go through one loop together: one row alone is a chain of dependent
  // instructions, and a loop that ends after every row is often guessed wrong.
  template <bool kDrops>
  void weigh(const Work& w, const Queries& queries, int group, const View& seen) const {
    const Vec factor = splat(logits_.exponent);
    const uint64_t head = kDrops ? dropout_.of_head(queries.batch, queries.head) : 0;
#pragma GCC unroll 1
    for (int first = 0; first < kRows; first += kWeighRows) {
      const float* scores = w.scores + first * kTileKeys;
      Element* weights = w.weights + first * kWeightStep;
      float* totals = w.totals + (group * kRows + first) * kWidth;
      const float* tops = w.tops + group * kRows + first;
      Vec total[kWeighRows], shift[kWeighRows];
      uint64_t chance[kWeighRows];
#pragma GCC unroll 6
      for (int i = 0; i < kWeighRows; ++i) {
        total[i] = load(totals + i * kWidth);
        shift[i] = splat(tops[i] == -kInfinity ? 0.0f : -tops[i]);
        if constexpr (kDrops) chance[i] = dropout_.of_row(head, queries.begin(group) + first + i);
      }
      for (int span = 0; span < seen.spans; ++span) {
        const Range r = whole_vectors(seen.span[span]);
        weigh_columns<Math>(scores, kTileKeys, weights, kWeightStep, r.begin, r.end, factor, shift, total,
                            [&](int i, int64_t c, Vec x) __attribute__((always_inline)) {
                              if constexpr (kDrops) return select(dropout_.kept(chance[i], seen.shift[span] + c), x, 0.0f);
                              else return x;
                            });
      }
#pragma GCC unroll 6
      for (int i = 0; i < kWeighRows; ++i) store(totals + i * kWidth, total[i]);
    }
  }

  void add_values(const Work& w, const Pack& kv, int group, const View& seen) const {
    float* sums = w.sums + group * kRows * value_columns_;
    for (int span = 0; span < seen.spans; ++span) {
      const int64_t begin = seen.span[span].begin / Math::kNumbers;
      const int64_t steps = ceil_div(seen.span[span].end, Math::kNumbers) - begin;
      const int64_t step = (seen.shift[span] - kv.first * kBlockKeys) / Math::kNumbers + begin;
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
  void add_visible_values(const Work& w, const Pack& kv, const Queries& queries, int group,
                          const View& seen) const {
    for (int64_t i = queries.begin(group); i <= queries.last(group); ++i) {
      const int64_t row = i - queries.first;
      const Element* weights = w.weights + row % kRows * kWeightStep;
      for (int span = 0; span < seen.spans; ++span) {
        for (int64_t c = seen.span[span].begin; c < seen.span[span].end; ++c) {
          if (w.scores[row % kRows * kTileKeys + c] == -kInfinity) continue;
          add_packed_values(sizes_, kv.values, seen.shift[span] - kv.first * kBlockKeys + c, splat(Math::weight(weights, c)),
                            w.sums + row * value_columns_);
        }
      }
    }
  }

  void finish(const Work& w, const Queries& queries) const {
    T* o = output(queries);
    for (int64_t row = 0; row < queries.count; ++row) {
      const RowEnd end(w.tops[row], sum(load(w.totals + row * kWidth)), s_.sink ? s_.sink + queries.head : nullptr);
      const Vec factor = splat(end.factor * dropout_.scale);
      const float* sums = w.sums + row * value_columns_;
      for (int64_t c = 0; c < s_.e; c += kWidth)
        store_some(o + row * s_.o_m + c, load(sums + c) * factor, least<int64_t>(kWidth, s_.e - c));
      end.keep(s_, (queries.batch * s_.h + queries.head) * s_.m + queries.first + row);
    }
  }

  const attnkit_softmax& s_;
  const Logits logits_;
  const Dropout dropout_;
  const int64_t ratio_;          // query heads of one KV head
  const int64_t query_blocks_;
  const bool narrow_;            // the keys of a block of queries always fit into one tile
  const int64_t threads_;
  const int64_t piece_blocks_;   // blocks of queries of one piece
  const int64_t pieces_;         // of one KV head
  const PackedSizes<Math> sizes_;  // of one piece
  const int64_t query_steps_;    // of one packed query, whole vectors
  const int64_t value_columns_;  // of one row of sums, whole vectors
  const int64_t own_;            // pieces that one thread each packs and works on
  const int64_t wave_;           // of the others, packed at a time
};
