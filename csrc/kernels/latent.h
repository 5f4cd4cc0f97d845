// Latent attention, absorbed: all heads attend to the latents themselves, which are read from memory once for all of them
// and for both products.
//
// 1. Every head maps its queries into the space of latents, q' = [U^T q ; rotary part], and they are transposed: the queries
//    of a latent head, all its query heads and tokens together, lie side by side in vectors.
// 2. Keys are cut into ranges by their number alone. A task is one range and up to kTaskRows queries. It walks over tiles
//    of kTileKeys: scores = tile * q'^T, where a number of a key is broadcast straight from the cache, as it lies there;
//    weights, a vector of queries at a time, so that maxima and sums need no horizontal step; sums += weights * latents.
//    Only bf16 dot products, which want pairs of keys, and 16-bit numbers without them are written anew for each tile.
// 3. Ranges are merged by their log-sum-exp, and V maps the mixed latent to the head's values.
//
// With a list of places the keys of a sequence are gathered, a tile at a time, and the same work is done on the copy.
//
// Register blocks: scores 24 x 1 to 6 x 4 (keys x vectors of queries), sums 8 x 3 (queries x vectors of columns). With 16
// queries there is one vector of them, and 24 keys fill the accumulators.

constexpr int64_t kTileKeys = 96;  // a multiple of every number of keys in a register block
constexpr int64_t kTaskRows = 128;
// An even number of ranges of about this size or less, in whole register blocks: two threads then have the same to do.
constexpr int64_t kRangeKeys = 8 * kTileKeys, kLeastRangeKeys = 2 * kTileKeys, kRangeStep = 24;
constexpr int64_t kMostRanges = 32;
// Lists are cut into ranges of their own: one for the 2,048 keys of DeepSeek's models, whose sums are then stored once.
constexpr int64_t kListKeys = 22 * kTileKeys;
constexpr int kAccumulators = kWidth == 16 ? 24 : 12;
constexpr int kSumRows = kWidth == 16 ? 8 : 4;
constexpr int kSumVectors = 3;
constexpr int kMapRows = 4;
constexpr int64_t kMapAhead = 16;  // rows of the maps that are fetched ahead

// What is fetched into the second cache beside other work: `step` bytes from `at` on with every step of a product. All at once
// would wait for memory.
struct Fetch {
  const char* at;
  int64_t step;
};

// scores[key][query] = factor * keys * queries, and the largest of each query.
template <class Math, int kVectors>
ATTNKIT_NOINLINE void score_keys(const typename Math::Element* keys, int64_t key_stride,
                                 const typename Math::Element* queries, int64_t vector_stride, int64_t steps,
                                 float factor, float* scores, int64_t score_stride, float* peaks, Fetch next) {
  constexpr int kKeys = kAccumulators / kVectors;
  Vec acc[kKeys][kVectors];
#pragma GCC unroll 24
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
  // Three keys hang on one pointer: addresses know strides of 0, 1 and 2.
  const typename Math::Element* base[ceil_div(kKeys, 3)];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; i += 3) base[i / 3] = keys + i * key_stride;
  for (int64_t s = 0; s < steps; ++s) {
    decltype(Math::load_row(queries)) row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = Math::load_row(queries + j * vector_stride + s * kWidth);
    __builtin_prefetch(next.at, 0, 2);
    next.at += next.step;
#pragma GCC unroll 24
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        acc[i][j] = Math::multiply_add(acc[i][j], base[i / 3] + i % 3 * key_stride + s, row[j]);
  }
  const Vec by = splat(factor);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    Vec peak = load(peaks + j * kWidth);
#pragma GCC unroll 24
    for (int i = 0; i < kKeys; ++i) {
      const Vec x = acc[i][j] * by;
      store(scores + i * score_stride + j * kWidth, x);
      peak = max(peak, x);
    }
    store(peaks + j * kWidth, peak);
  }
}

// sums[query][column] += weights^T * values; weights are [step][query]. With kPairs, rows of keys are paired on the way:
// what is used is the pairs of `rows`, and `values` is where they are left for the next queries.
template <class Math, int kVectors, bool kPairs>
ATTNKIT_NOINLINE void add_latents(const typename Math::Element* weights, int64_t weight_stride,
                                  typename Math::Element* values, int64_t value_stride, int64_t steps, float* sums,
                                  int64_t sum_stride, const typename Math::Element* rows, int64_t row_stride,
                                  Fetch next) {
  Vec acc[kSumRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kSumRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = load(sums + i * sum_stride + j * kWidth);
  for (int64_t s = 0; s < steps; ++s) {
    decltype(Math::load_row(values)) row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
#if defined(ATTNKIT_BF16_DOT)
      if constexpr (kPairs) {
        row[j] = zip_halves(load_halves(rows + j * kWidth / 2), load_halves(rows + row_stride + j * kWidth / 2));
        _mm512_storeu_si512(values + j * kWidth, row[j]);
      } else
#endif
        row[j] = Math::load_row(values + j * kWidth);
    }
    rows += 2 * row_stride;
    __builtin_prefetch(next.at, 0, 2);
    __builtin_prefetch(next.at + 64, 0, 2);
    next.at += next.step;
#pragma GCC unroll 8
    for (int i = 0; i < kSumRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Math::multiply_add(acc[i][j], weights + i, row[j]);
    weights += weight_stride;
    values += value_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSumRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(sums + i * sum_stride + j * kWidth, acc[i][j]);
}

template <class Math, class T>
class Latent {
  using Element = typename Math::Element;
  static constexpr int64_t kNumbers = Math::kNumbers;
  // Numbers of the cache are what the arithmetic works on.
  static constexpr bool kAsStored = sizeof(T) * Math::kNumbers == sizeof(Element);

 public:
  explicit Latent(const attnkit_latent& call)
      : s_(call),
        ratio_(call.h / call.g),
        rows_(ratio_ * call.m),
        vectors_(ceil_div(rows_, kWidth)),
        key_size_(call.c + call.r),
        steps_(ceil_div(key_size_, kNumbers)),
        row_steps_(round_up(steps_, kWidth)),
        // Rows that begin at whole elements, and whose latent part ends with a vector, are used as they lie.
        in_place_(kAsStored && key_size_ % kNumbers == 0 && call.c % (kNumbers * kWidth) == 0 &&
                  (call.latent_n | call.latent_g | call.latent_b) % kNumbers == 0 &&
                  reinterpret_cast<uintptr_t>(call.latent) % sizeof(Element) == 0),
        columns_(round_up(call.c, kNumbers * kWidth)),
        task_rows_(least(kTaskRows, vectors_ * kWidth)),
        row_blocks_(ceil_div(rows_, kTaskRows)),
        range_keys_(range_keys(call.n, call.places)),
        keys_{visible(0).begin, visible(call.m - 1).end},
        first_range_(keys_.begin / range_keys_),
        ranges_(keys_.empty() ? 0 : ceil_div(keys_.end, range_keys_) - first_range_),
        threads_(clamp<int64_t>(most(call.h, call.b * call.g * row_blocks_ * ranges_), 1,
                                worth_threads() ? available_threads(call.threads) : 1)) {}

  int64_t scratch_bytes() const { return rows_bytes() + packed_bytes() + part_bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    Element* const rows = reinterpret_cast<Element*>(scratch);
    Element* const packed = reinterpret_cast<Element*>(scratch + rows_bytes());
    float* const parts = reinterpret_cast<float*>(scratch + rows_bytes() + packed_bytes());
    char* const works = scratch + rows_bytes() + packed_bytes() + part_bytes();
    const int64_t tasks = s_.b * s_.g * ranges_ * row_blocks_;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, works + thread_number() * work_bytes());
#pragma omp for schedule(dynamic, 1)
      for (int64_t head = 0; head < s_.h; ++head) raise(work, head, rows);
#pragma omp for schedule(static)
      for (int64_t vector = 0; vector < s_.b * s_.g * vectors_; ++vector) transpose_queries(vector, rows, packed);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t group = task / (ranges_ * row_blocks_), rest = task % (ranges_ * row_blocks_);
        attend(work, packed, parts, group, rest / row_blocks_, rest % row_blocks_);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t head = 0; head < s_.h; ++head) lower(work, head, parts);
    }
  }

 private:
  // What one thread works in.
  struct Work {
    Element* keys;     // kTileKeys of row_steps_: a tile that cannot be used as it lies
    Element* values;   // kTileKeys of a strip of columns: the tile's latents in pairs of keys
    float* scores;     // kTileKeys of task_rows_
    Element* weights;  // kTileKeys of task_rows_
    float* sums;       // task_rows_ of columns_, not yet divided by the totals
    float* totals;     // task_rows_
    float* tops;       // task_rows_: exponents of two that weights are taken against
    float* peaks;      // task_rows_: the tile's largest exponents
    float* queries;    // kMapRows of query_floats(), as stored
    float* mapped;     // kMapRows of mapped_floats(), in the space of latents
    Work(const Latent& l, char* memory)
        : keys(reinterpret_cast<Element*>(memory)),
          values(keys + kTileKeys * l.row_steps_),
          scores(reinterpret_cast<float*>(values + kTileKeys * kSumVectors * kWidth)),
          weights(reinterpret_cast<Element*>(scores + kTileKeys * l.task_rows_)),
          sums(reinterpret_cast<float*>(weights + kTileKeys * l.task_rows_)),
          totals(sums + l.task_rows_ * l.columns_),
          tops(totals + l.task_rows_),
          peaks(tops + l.task_rows_),
          queries(peaks + l.task_rows_),
          mapped(queries + kMapRows * l.query_floats()) {}
  };

  int64_t query_floats() const { return round_up(s_.nope + s_.r, kWidth); }
  int64_t mapped_floats() const { return round_up(s_.c, kWidth) + row_steps_ * kNumbers; }
  int64_t work_bytes() const {
    return round_up(4 * (kTileKeys * (row_steps_ + kSumVectors * kWidth + 2 * task_rows_) + task_rows_ * (columns_ + 3) +
                         kMapRows * (query_floats() + mapped_floats())),
                    64);
  }
  int64_t rows_bytes() const { return round_up(4 * s_.b * s_.h * s_.m * row_steps_, 64); }
  int64_t packed_bytes() const { return round_up(4 * s_.b * s_.g * vectors_ * kWidth * steps_, 64); }
  // Sums, total and top of every row and range.
  int64_t part_floats() const { return columns_ + 2; }
  int64_t part_bytes() const { return round_up(4 * s_.b * s_.h * s_.m * ranges_ * part_floats(), 64); }
  float* part(float* parts, int64_t row, int64_t range) const {
    return parts + (row * ranges_ + range) * part_floats();
  }
  bool worth_threads() const {
    return static_cast<double>(s_.b * s_.h * s_.m) * static_cast<double>(s_.n) * static_cast<double>(key_size_ + s_.c) >
           kWorthAThread;
  }

  static int64_t range_keys(int64_t n, bool listed) {
    if (listed) return most(kListKeys, round_up(ceil_div(n, kMostRanges), kTileKeys));
    const int64_t ranges = clamp<int64_t>(2 * ceil_div(n, 2 * kRangeKeys), 2, kMostRanges);
    return most(kLeastRangeKeys, round_up(ceil_div(n, ranges), kRangeStep));
  }

  // Keys that query `i` sees.
  Range visible(int64_t i) const {
    if (s_.places) return {0, s_.n};
    const int64_t position = s_.n - s_.m + i;
    return {clamp<int64_t>(position - s_.left, 0, s_.n), clamp<int64_t>(position + s_.right + 1, 0, s_.n)};
  }

  // Queries of one head in all sequences, mapped; its weights are read once.
  void raise(const Work& w, int64_t head, Element* rows) const {
    const T* up = static_cast<const T*>(s_.kv_b) + head * s_.kv_b_h;
    const int64_t mapped_stride = mapped_floats();
    for (int64_t first = 0; first < s_.b * s_.m; first += kMapRows) {
      const int64_t count = least<int64_t>(kMapRows, s_.b * s_.m - first);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t batch = (first + k) / s_.m, i = (first + k) % s_.m;
        const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + head * s_.q_h + i * s_.q_m;
        float* to = w.queries + k * query_floats();
        for (int64_t j = 0; j < s_.nope + s_.r; j += kWidth) store(to + j, load_some(q + j, s_.nope + s_.r - j));
      }
      for (int64_t k = count; k < kMapRows; ++k) __builtin_memset(w.queries + k * query_floats(), 0, 4 * query_floats());
      if (count == 1) {
        map<1>(w, up);
      } else {
        map<kMapRows>(w, up);
      }
      for (int64_t k = 0; k < count; ++k) {
        const int64_t batch = (first + k) / s_.m, i = (first + k) % s_.m;
        float* from = w.mapped + k * mapped_stride;
        for (int64_t j = 0; j < row_steps_ * kNumbers - s_.c; ++j)
          from[s_.c + j] = j < s_.r ? w.queries[k * query_floats() + s_.nope + j] : 0.0f;
        Element* to = rows + ((batch * s_.h + head) * s_.m + i) * row_steps_;
        for (int64_t j = 0; j < row_steps_ * kNumbers; j += kNumbers * kWidth) {
          Vec x[kNumbers];
          for (int v = 0; v < kNumbers; ++v) x[v] = load(from + j + v * kWidth);
          Math::store_weights(to + j / kNumbers, x);
        }
      }
    }
  }

  // w.mapped = w.queries * U. One row has registers for many columns, which are read as they lie in memory.
  template <int kCount>
  void map(const Work& w, const T* up) const {
    constexpr int kVectors = kAccumulators / 3 * 2 / kCount;
    int64_t c = 0;
    for (; c + kVectors * kWidth <= s_.c; c += kVectors * kWidth) map_strip<kCount, kVectors>(w, up, c);
    for (; c < s_.c; c += kWidth) map_strip<kCount, 1>(w, up, c);
  }
  template <int kCount, int kVectors>
  ATTNKIT_INLINE void map_strip(const Work& w, const T* up, int64_t c) const {
    // Fetched behind the last rows: the next columns, or the head that this thread most likely takes next.
    const T* after = up + (c + kVectors * kWidth < s_.c ? c + kVectors * kWidth : threads_ * s_.kv_b_h);
    Vec acc[kCount][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
    for (int64_t f = 0; f < s_.nope; ++f) {
      const T* row = up + f * s_.kv_b_row + c;
      prefetch_row(f + kMapAhead < s_.nope ? row + kMapAhead * s_.kv_b_row : after + (f + kMapAhead - s_.nope) * s_.kv_b_row,
                   kVectors * kWidth);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const Vec x = kVectors > 1 ? load(row + j * kWidth) : load_some(row, s_.c - c);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) acc[i][j] = fma(splat(w.queries[i * query_floats() + f]), x, acc[i][j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) store(w.mapped + i * mapped_floats() + c + j * kWidth, acc[i][j]);
  }

  // One vector of queries of a latent head: [step][query].
  void transpose_queries(int64_t vector, const Element* rows, Element* packed) const {
    const int64_t group = vector / vectors_, first = vector % vectors_ * kWidth;
    float* to = reinterpret_cast<float*>(packed + vector * steps_ * kWidth);
    for (int64_t at = 0; at < steps_; at += kWidth) {
      Vec x[kWidth];
      for (int i = 0; i < kWidth; ++i)
        x[i] = first + i < rows_
                   ? load(reinterpret_cast<const float*>(rows + (group * rows_ + first + i) * row_steps_ + at))
                   : zero();
      transpose(x);
      for (int64_t i = 0; i < least<int64_t>(kWidth, steps_ - at); ++i) store(to + (at + i) * kWidth, x[i]);
    }
  }

  // Keys of one tile. Rows past `count`, up to a whole register block, are read as well: a tile is used as it lies where the
  // cache has them.
  struct Tile {
    int64_t key, count;
    int64_t ahead;            // keys of the next tile
    const T* stored;          // the first one's latent, or that of place 0
    const int32_t* places;    // of its keys, or null
    const Element* keys;
    int64_t stride;
  };

  void attend(const Work& w, const Element* packed, float* parts, int64_t group, int64_t range, int64_t row_block) const {
    const int64_t first_row = row_block * kTaskRows, count = least(kTaskRows, rows_ - first_row);
    const int64_t padded = round_up(count, kWidth);
    const Element* queries = packed + (group * vectors_ * kWidth + first_row) * steps_;
    const T* latents = static_cast<const T*>(s_.latent) + group / s_.g * s_.latent_b + group % s_.g * s_.latent_g;
    for (int64_t j = 0; j < padded * columns_; j += kWidth) store(w.sums + j, zero());
    for (int64_t j = 0; j < padded; j += kWidth) {
      store(w.totals + j, zero());
      store(w.tops + j, splat(-kInfinity));
    }
    const int32_t* places = s_.places ? s_.places + group / s_.g * s_.n : nullptr;
    const int64_t start = (first_range_ + range) * range_keys_;
    int64_t end = least(keys_.end, start + range_keys_);
    for (; places && end > start && places[end - 1] < 0;) --end;
    // Pairs of keys stay together whatever part of the keys is seen.
    for (int64_t key = most(keys_.begin / 2 * 2, start); key < end;) {
      const int64_t next = least(end, key + kTileKeys - (key - start) % kTileKeys);
      Tile tile = {key, next - key, 0, latents, nullptr, nullptr, 0};
      if (places) {
        tile.places = places + key;
      } else {
        tile.stored += key * s_.latent_n;
      }
      place(w, tile);
      tile.ahead = least(kTileKeys, (places ? end : s_.n) - next);
      score(w, queries, tile, padded);
      const bool hidden = hide(w, tile, first_row, padded);
      raise_tops(w, padded);
      weigh(w, tile.count, padded);
      if (hidden && !finite(tile)) {
        add_visible(w, tile, count);
      } else {
        add(w, tile, padded);
      }
      key = next;
    }
    for (int64_t row = 0; row < count; ++row) {
      float* to = part(parts, group * rows_ + first_row + row, range);
      for (int64_t j = 0; j < columns_; j += kWidth) store(to + j, load(w.sums + row * columns_ + j));
      to[columns_] = w.tops[row];
      to[columns_ + 1] = w.totals[row];
    }
  }

  void place(const Work& w, Tile& tile) const {
    if (in_place_ && !tile.places && tile.count % kNumbers == 0 && tile.key + round_up(tile.count, kAccumulators) <= s_.n) {
      tile.keys = reinterpret_cast<const Element*>(tile.stored);
      tile.stride = s_.latent_n / kNumbers;
      return;
    }
    tile.keys = w.keys;
    tile.stride = row_steps_;
    for (int64_t k = 0; k < kTileKeys; ++k) {
      float* to = reinterpret_cast<float*>(w.keys + k * row_steps_);
      const int64_t place = k >= tile.count ? 0 : tile.places ? tile.places[k] : k;
      const T* from = tile.stored + place * s_.latent_n;
      for (int64_t at = 0; at < row_steps_; at += kWidth)
        store(to + at, k < tile.count && at < steps_ ? load_steps(from + at * kNumbers, key_size_ - at * kNumbers) : zero());
    }
  }
  // kWidth elements of a row of which `left` numbers are left.
  static ATTNKIT_INLINE Vec load_steps(const T* from, int64_t left) {
#if defined(ATTNKIT_BF16_DOT)
    if constexpr (kNumbers == 2) {
      return _mm512_castsi512_ps(left >= 2 * kWidth ? load_pairs(reinterpret_cast<const uint32_t*>(from))
                                                    : load_pairs_first(from, static_cast<int>(left)));
    } else
#endif
      return load_some(from, left);
  }

  // Half of the next tile is fetched with the scores and half with the sums: work goes on evenly, and so does memory. This is
  // part `i` of `parts` of one half, for a product of `steps`.
  Fetch fetch(const Tile& tile, bool second, int64_t i, int64_t parts, int64_t steps) const {
    if (tile.places) return {reinterpret_cast<const char*>(tile.stored), 0};
    const char* next = reinterpret_cast<const char*>(tile.stored + tile.count * s_.latent_n);
    const int64_t half = tile.ahead * s_.latent_n * static_cast<int64_t>(sizeof(T)) / 2;
    return {next + (second ? half : 0) + half / parts * i, half / parts / steps};
  }

  void score(const Work& w, const Element* queries, const Tile& tile, int64_t padded) const {
    for (int64_t j = 0; j < padded; j += kWidth) store(w.peaks + j, splat(-kInfinity));
    for (int64_t row = 0; row < padded; row += kStrip) {
      with_vectors(least<int64_t>(kStripVectors, (padded - row) / kWidth), [&](auto vectors) {
        constexpr int kKeys = kAccumulators / vectors.count;
        const int64_t blocks = ceil_div(tile.count, kKeys);
        for (int64_t k = 0; k < tile.count; k += kKeys) {
          // What the first queries of the tile fetch is there for the next tile; others fetch nothing new.
          if (row == 0 && tile.places)
            for (int64_t i = k; i < least(k + kKeys, tile.ahead); ++i)
              prefetch_row(tile.stored + tile.places[tile.count + i] * s_.latent_n, key_size_);
          const Fetch next = row == 0 ? fetch(tile, false, k / kKeys, blocks, steps_)
                                      : Fetch{reinterpret_cast<const char*>(tile.stored), 0};
          score_keys<Math, vectors.count>(tile.keys + k * tile.stride, tile.stride, queries + row * steps_,
                                          steps_ * kWidth, steps_, s_.scale * kLog2E, w.scores + k * task_rows_ + row,
                                          task_rows_, w.peaks + row, next);
        }
      });
    }
  }

  // -inf where a query may not look; returns whether there is such a place. Maxima are then taken again.
  bool hide(const Work& w, const Tile& tile, int64_t first_row, int64_t padded) const {
    const Range every = {visible(s_.m - 1).begin, visible(0).end};
    const bool hidden = every.begin > tile.key || every.end < tile.key + tile.count;
    if (!hidden && tile.count == kTileKeys) return false;
    for (int64_t j = 0; j < padded; j += kWidth) {
      Vec peak = splat(-kInfinity);
      for (int64_t k = 0; k < tile.count; ++k) {
        const int64_t key = tile.key + k;
        float* score = w.scores + k * task_rows_ + j;
        if (key < every.begin || key >= every.end) store(score, select(seen(key, first_row + j), load(score), -kInfinity));
        peak = max(peak, load(score));
      }
      store(w.peaks + j, peak);
    }
    return hidden;
  }
  Bits seen(int64_t key, int64_t first_row) const {
    Bits bits = 0;
    for (int i = 0; i < kWidth; ++i) {
      const Range keys = visible((first_row + i) % s_.m);
      bits |= static_cast<Bits>(keys.begin <= key && key < keys.end) << i;
    }
    return bits;
  }

  // As Prefill::raise_tops, with a row in each lane.
  void raise_tops(const Work& w, int64_t padded) const {
    for (int64_t j = 0; j < padded; j += kWidth) {
      const Vec top = load(w.tops + j), peak = load(w.peaks + j);
      // inf - inf must not hide another lane: the comparison is made lane by lane.
      const Vec risen = where_less(top + splat(kLateRescale), peak, peak, top);
      const Bits moved = bits_unequal(risen - top, 0.0f) & bits_unequal(top, -kInfinity) & bits_less(top, risen);
      store(w.tops + j, risen);
      if (moved == 0) continue;
      for (int i = 0; i < kWidth; ++i) {
        if (!(moved >> i & 1)) continue;
        float before[kWidth];
        store(before, top);
        const float by = __builtin_exp2f(before[i] - w.tops[j + i]);
        w.totals[j + i] *= by;
        float* sums = w.sums + (j + i) * columns_;
        for (int64_t c = 0; c < columns_; c += kWidth) store(sums + c, load(sums + c) * splat(by));
      }
    }
  }
  static ATTNKIT_INLINE Bits bits_less(Vec a, Vec b) {
    return bits_unequal(where_less(a, b, splat(1.0f), zero()), 0.0f);
  }

  void weigh(const Work& w, int64_t count, int64_t padded) const {
    for (int64_t j = 0; j < padded; j += kWidth) {
      const Vec top = load(w.tops + j);
      const Vec shift = where_less(splat(-kInfinity), top, top, zero());
      Vec total = load(w.totals + j);
      for (int64_t k = 0; k < count; k += kNumbers) {
        Vec x[kNumbers];
#pragma GCC unroll 2
        for (int64_t i = 0; i < kNumbers; ++i) {
          x[i] = k + i < count ? exp2<Math::kExpDegree>(load(w.scores + (k + i) * task_rows_ + j) - shift) : zero();
          total = total + x[i];
        }
        store_step(w.weights + k / kNumbers * task_rows_ + j, x);
      }
      store(w.totals + j, total);
    }
  }
  // Weights of kNumbers keys side by side.
  static ATTNKIT_INLINE void store_step(Element* to, const Vec (&x)[kNumbers]) {
#if defined(ATTNKIT_BF16_DOT)
    if constexpr (kNumbers == 2) {
      _mm512_storeu_si512(to, zip_halves(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[0])),
                                         reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[1]))));
    } else
#endif
      store(to, x[0]);
  }

  void add(const Work& w, const Tile& tile, int64_t padded) const {
    for (int64_t c = 0; c < columns_; c += kSumVectors * kWidth) {
      const int64_t vectors = least<int64_t>(kSumVectors, (columns_ - c) / kWidth);
      if (vectors == 3) add_strip<3>(w, tile, padded, c);
      if (vectors == 2) add_strip<2>(w, tile, padded, c);
      if (vectors == 1) add_strip<1>(w, tile, padded, c);
    }
  }
  template <int kVectors>
  void add_strip(const Work& w, const Tile& tile, int64_t padded, int64_t c) const {
    const int64_t steps = ceil_div(tile.count, kNumbers);
    // The pairs of a strip lie together, for the next queries find them in the first cache.
    constexpr bool kPairs = kNumbers == 2;
    Element* const values = kPairs ? w.values : const_cast<Element*>(tile.keys) + c;
    const int64_t stride = kPairs ? kVectors * kWidth : tile.stride;
    const Fetch next = fetch(tile, true, c / (kSumVectors * kWidth), ceil_div(columns_, kSumVectors * kWidth), steps);
    const Fetch nothing = {reinterpret_cast<const char*>(tile.stored), 0};
    // Pairing reads much itself: the second queries fetch, if there are any.
    const int64_t fetching = padded > kSumRows ? kSumRows : 0;
    const auto add_rows = [&](auto pairs, int64_t row) {
      add_latents<Math, kVectors, pairs.count != 0>(w.weights + row, task_rows_, values, stride, steps,
                                                    w.sums + row * columns_ + c, columns_,
                                                    kPairs ? tile.keys + c / 2 : tile.keys, tile.stride,
                                                    row == fetching ? next : nothing);
    };
    add_rows(Vectors<kPairs>(), 0);
    for (int64_t row = kSumRows; row < padded; row += kSumRows) add_rows(Vectors<0>(), row);
  }

  bool finite(const Tile& tile) const {
    Vec check = zero();
    for (int64_t k = 0; k < tile.count; ++k)
      for (int64_t c = 0; c < s_.c; c += kWidth)
        check = fma(load_some(tile.stored + k * s_.latent_n + c, s_.c - c), zero(), check);
    return bits_unequal(check, 0.0f) == 0;
  }

  // For rows that must not touch some of these latents, a NaN or an infinity: 0 times those is a NaN.
  void add_visible(const Work& w, const Tile& tile, int64_t count) const {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t k = 0; k < tile.count; ++k) {
        if (w.scores[k * task_rows_ + row] == -kInfinity) continue;
        const float weight = Math::weight(w.weights + k / kNumbers * task_rows_ + row, k % kNumbers);
        float* sums = w.sums + row * columns_;
        for (int64_t c = 0; c < s_.c; c += kWidth)
          store(sums + c, fma(splat(weight), load_some(tile.stored + k * s_.latent_n + c, s_.c - c), load(sums + c)));
      }
  }

  // The rows of one head in all sequences: ranges merged, always in the same order, then mapped to values.
  void lower(const Work& w, int64_t head, float* parts) const {
    for (int64_t batch = 0; batch < s_.b; ++batch)
      for (int64_t i = 0; i < s_.m; ++i) {
        const int64_t row = (batch * s_.h + head) * s_.m + i;
        merge(w.mapped, parts, row);
        to_values(w.mapped, head, static_cast<T*>(s_.o) + batch * s_.o_b + head * s_.o_h + i * s_.o_m);
      }
  }

  void merge(float* mixed, float* parts, int64_t row) const {
    float top = -kInfinity, total = 0.0f;
    for (int64_t range = 0; range < ranges_; ++range) top = most(top, part(parts, row, range)[columns_]);
    const float reference = top == -kInfinity ? 0.0f : top;
    for (int64_t c = 0; c < columns_; c += kWidth) store(mixed + c, zero());
    for (int64_t range = 0; range < ranges_; ++range) {
      const float* from = part(parts, row, range);
      const float factor = __builtin_exp2f(from[columns_] - reference);
      total += factor * from[columns_ + 1];
      for (int64_t c = 0; c < columns_; c += kWidth)
        store(mixed + c, fma(splat(factor), load(from + c), load(mixed + c)));
    }
    const Vec factor = splat(RowEnd(top, total, nullptr).factor);
    for (int64_t c = 0; c < columns_; c += kWidth) store(mixed + c, load(mixed + c) * factor);
  }

  // Products with kWidth rows of V give one vector of values.
  void to_values(const float* mixed, int64_t head, T* o) const {
    const T* down = static_cast<const T*>(s_.kv_b) + head * s_.kv_b_h + s_.nope * s_.kv_b_row;
    for (int64_t f = 0; f < s_.e; f += kWidth) {
      // Fetched meanwhile: the next rows, or the first of the head that this thread most likely takes next.
      const int64_t after = f + kWidth < s_.e ? kWidth * s_.kv_b_row : threads_ * s_.kv_b_h - f * s_.kv_b_row;
      Vec acc[kWidth];
      const T* row[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) {
        acc[k] = zero();
        row[k] = down + least(f + k, s_.e - 1) * s_.kv_b_row;
      }
      int64_t c = 0;
      for (; c + kWidth <= s_.c; c += kWidth) {
        const Vec x = load(mixed + c);
        if (c * static_cast<int64_t>(sizeof(T)) % 64 == 0)
          for (int k = 0; k < kWidth; ++k) __builtin_prefetch(row[k] + after + c, 0, 2);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) acc[k] = fma(x, load(row[k] + c), acc[k]);
      }
      if (c < s_.c) {
        const int tail = static_cast<int>(s_.c - c);
        const Vec x = load_first(mixed + c, tail);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) acc[k] = fma(x, load_first(row[k] + c, tail), acc[k]);
      }
      store_some(o + f, sum_each(acc), s_.e - f);
    }
  }

  const attnkit_latent& s_;
  const int64_t ratio_;        // query heads of one latent head
  const int64_t rows_;         // ratio_ * m
  const int64_t vectors_;      // that hold them
  const int64_t key_size_;     // c + r
  const int64_t steps_;        // of one key
  const int64_t row_steps_;    // whole vectors of them
  const bool in_place_;
  const int64_t columns_;      // of one row of sums, whole vectors of stored numbers
  const int64_t task_rows_;    // of one task, at most
  const int64_t row_blocks_;
  const int64_t range_keys_;
  const Range keys_;           // that some query may see
  const int64_t first_range_;
  const int64_t ranges_;
  const int64_t threads_;
};
