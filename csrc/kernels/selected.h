// Attention of each query to its own block of keys and a few chosen ones (MoBA, NSA's second branch).
//
// Queries that chose a block share its packed keys, as in the prefill kernel: a span of queries walks over the blocks in
// ascending order, and each block over those rows of the span that chose it, six at a time, gathered into neighbours.
// Every row keeps a running maximum and sum and its sum over values, so nothing is merged and no partial result stored.
// A row goes through its own blocks in ascending order, whoever shares a tile with it: its bits depend on neither the
// span nor the batch nor the number of threads.
//
// Rows of a span, heads that read one list included, are at most kSpanRows: their queries and sums then stay in the
// second cache (600 KB at sizes of 64).

constexpr int64_t kSpanRows = 1024;

template <class Math, class T>
class Selected {
  using Element = typename Math::Element;
  static constexpr int64_t kVectorKeys = kWidth * Math::kExpVectors;
  static constexpr int64_t kTile = 4 * kBlockKeys;  // keys of a tile
  static constexpr int64_t kWeightStep = kTile / Math::kNumbers;

 public:
  explicit Selected(const attnkit_selected& call)
      : s_(call),
        kv_(with_lse(packing_call(call, call.n, call.k_n, call.e, call.v_n), call)),
        sizes_(kv_),
        exponent_(call.scale * kLog2E),
        heads_(call.h / call.lists),
        span_(clamp<int64_t>(kSpanRows / heads_, 1, most<int64_t>(call.m, 1))),
        spans_(ceil_div(call.m, span_)),
        blocks_(ceil_div(call.n, call.block)),
        query_steps_(round_up(sizes_.key_steps, kWidth)),
        value_columns_(sizes_.value_vectors * kWidth),
        threads_(useful_threads(kv_, call.b * call.lists * spans_)) {}

  int64_t scratch_bytes() const { return sizes_.bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    const Packed<Math> kv(scratch, sizes_);
    const int64_t lists = s_.lists / s_.g;  // of one KV head
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, scratch + sizes_.bytes() + thread_number() * work_bytes());
      for (int64_t head = 0; head < s_.b * s_.g; ++head) {
        const int64_t batch = head / s_.g, group = head % s_.g;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < sizes_.key_blocks; ++panel) pack(kv, batch, group, panel);
        // Late queries have the most to choose from, and choose the most.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < lists * spans_; ++task)
          attend_span(work, kv, batch, group * lists + task / spans_, spans_ - 1 - task % spans_);
      }
    }
  }

 private:
  struct Work {
    Element* queries;  // of the span, by query and head: query_steps_ each
    float* sums;       // value_columns_ each, not yet divided by the totals
    float* totals;     // one vector each
    float* tops;       // one each: the exponent of two that weights are taken against
    Element* asked;    // six rows at work: query_steps_
    float* added;      // value_columns_
    float* scores;     // a tile
    Element* weights;  // a tile
    float* peaks;      // one vector
    int32_t* start;    // (blocks + 1,): where the queries of each block begin in entries
    int32_t* entries;  // numbers of queries in the span
    Work(const Selected& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          sums(reinterpret_cast<float*>(queries + p.rows() * p.query_steps_)),
          totals(sums + p.rows() * p.value_columns_),
          tops(totals + p.rows() * kWidth),
          asked(reinterpret_cast<Element*>(tops + round_up(p.rows(), kWidth))),
          added(reinterpret_cast<float*>(asked + kRows * p.query_steps_)),
          scores(added + kRows * p.value_columns_),
          weights(reinterpret_cast<Element*>(scores + kRows * kTile)),
          peaks(reinterpret_cast<float*>(weights + kRows * kWeightStep)),
          start(reinterpret_cast<int32_t*>(peaks + kRows * kWidth)),
          entries(start + p.blocks_ + 2) {}
  };

  static attnkit_softmax with_lse(attnkit_softmax kv, const attnkit_selected& call) {
    kv.lse = call.lse, kv.lse_rest = call.lse_rest;
    return kv;
  }
  int64_t rows() const { return span_ * heads_; }
  int64_t work_bytes() const {
    return round_up(4 * (rows() * (query_steps_ + value_columns_ + kWidth) + round_up(rows(), kWidth) +
                         kRows * (query_steps_ + value_columns_ + kTile + kWeightStep + kWidth) + blocks_ + 2 +
                         span_ * (s_.s + 1)),
                    64);
  }

  void pack(const Packed<Math>& kv, int64_t batch, int64_t group, int64_t panel) const {
    const T* keys = static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g;
    const T* values = static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g;
    pack_key_block<Math>(kv_, keys, sizes_, panel, kv.keys);
    kv.odd_values[panel] = pack_value_block<Math>(kv_, values, sizes_, panel, kv.values);
  }

  struct Span {
    int64_t first, count;  // queries
  };
  int64_t position(int64_t query) const { return s_.n - s_.m + query; }

  void attend_span(const Work& w, const Packed<Math>& kv, int64_t batch, int64_t list, int64_t number) const {
    const Span span = {number * span_, least(span_, s_.m - number * span_)};
    const int32_t* chosen = s_.chosen + ((batch * s_.lists + list) * s_.m + span.first) * s_.s;
    for (int64_t head = 0; head < heads_; ++head) {
      const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + (list * heads_ + head) * s_.q_h + span.first * s_.q_m;
      for (int64_t i = 0; i < span.count; ++i)
        pack_queries<Math>(kv_, q + i * s_.q_m, 1, 1, query_steps_, w.queries + (i * heads_ + head) * query_steps_);
    }
    for (int64_t i = 0; i < span.count * heads_ * value_columns_; ++i) w.sums[i] = 0.0f;
    for (int64_t i = 0; i < span.count * heads_ * kWidth; ++i) w.totals[i] = 0.0f;
    for (int64_t i = 0; i < span.count * heads_; ++i) w.tops[i] = -kInfinity;
    sort_by_block(w, span, chosen);
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t count = (w.start[block + 1] - w.start[block]) * heads_;
      for (int64_t row = 0; row < count; row += kRows)
        attend(w, kv, span, block, w.entries + w.start[block], row, least<int64_t>(kRows, count - row));
    }
    finish(w, span, batch, list);
  }

  // Counts, then places: the queries of each block, ascending.
  void sort_by_block(const Work& w, const Span& span, const int32_t* chosen) const {
    for (int64_t j = 0; j < blocks_ + 2; ++j) w.start[j] = 0;
    const auto each = [&](auto f) {
      for (int64_t i = 0; i < span.count; ++i) {
        f(position(span.first + i) / s_.block, i);
        for (int64_t c = 0; c < s_.s; ++c) {
          const int64_t block = chosen[i * s_.s + c];
          if (block >= 0 && block < blocks_) f(block, i);
        }
      }
    };
    each([&](int64_t block, int64_t) { ++w.start[block + 2]; });
    for (int64_t j = 2; j < blocks_ + 2; ++j) w.start[j] += w.start[j - 1];
    // Places move the starts on by one: start[j + 1], the next free place of block j, ends as the start of block j + 1.
    each([&](int64_t block, int64_t i) { w.entries[w.start[block + 1]++] = static_cast<int32_t>(i); });
  }

  // Up to six rows that chose the block; slots left over repeat the first.
  void attend(const Work& w, const Packed<Math>& kv, const Span& span, int64_t block, const int32_t* entries,
              int64_t first, int64_t count) const {
    int64_t at[kRows], end[kRows];  // row in the span; keys it sees end here
    const int64_t key = block * s_.block, stop = least(key + s_.block, s_.n);
    int64_t last = key, soonest = stop;
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first + (i < count ? i : 0), query = entries[row / heads_];
      at[i] = query * heads_ + row % heads_;
      const int64_t own = position(span.first + query);
      end[i] = s_.causal && own / s_.block == block ? own + 1 : stop;
      last = most(last, end[i]);
      soonest = least(soonest, end[i]);
      copy(w.asked + i * query_steps_, w.queries + at[i] * query_steps_, query_steps_);
      copy(w.added + i * value_columns_, w.sums + at[i] * value_columns_, value_columns_);
    }
    // Tiles begin at multiples of a panel, and a block may begin and end within one.
    for (int64_t begin = key / kBlockKeys * kBlockKeys; begin < last; begin += kTile) {
      const int64_t from = most(key, begin) - begin, to = least(last - begin, kTile);
      const bool whole = from % kVectorKeys == 0 && to % kVectorKeys == 0 && soonest >= begin + to;
      score(w, kv, begin, from, to);
      bool careful = false;
      if (!whole) {
        for (int64_t panel = (begin + from) / kBlockKeys; panel * kBlockKeys < begin + to; ++panel)
          careful = careful || kv.odd_values[panel];
        hide(w, begin, from, to, end);
      }
      raise_tops(w, at);
      weigh(w, at, from, to);
      if (careful) {
        add_visible_values(w, kv, begin, from, to, end);
      } else {
        add_values(w, kv, begin, from, to);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      copy(w.sums + at[i] * value_columns_, w.added + i * value_columns_, value_columns_);
  }

  template <class Number>
  static ATTNKIT_INLINE void copy(Number* to, const Number* from, int64_t count) {
    for (int64_t c = 0; c < count; c += kWidth)
      store(reinterpret_cast<float*>(to) + c, load(reinterpret_cast<const float*>(from) + c));
  }
  static ATTNKIT_INLINE Range whole_vectors(int64_t from, int64_t to) {
    return {from / kVectorKeys * kVectorKeys, round_up(to, kVectorKeys)};
  }

  void score(const Work& w, const Packed<Math>& kv, int64_t begin, int64_t from, int64_t to) const {
    for (int i = 0; i < kRows; ++i) store(w.peaks + i * kWidth, splat(-kInfinity));
    const Range r = whole_vectors(from, to);
    for (int64_t c = r.begin; c < r.end;) {
      const int64_t strip = c / kStrip * kStrip, stop = least(r.end, strip + kStrip);
      with_vectors((stop - c) / kWidth, [&](auto vectors) {
        product_and_peaks<Math, vectors.count>(w.asked, query_steps_,
                                               kv.keys + (begin + strip) * sizes_.key_steps + c - strip,
                                               sizes_.key_steps, w.scores + c, kTile, w.peaks);
      });
      c = stop;
    }
  }

  // -inf outside what a row sees, and the maxima of what is left.
  void hide(const Work& w, int64_t begin, int64_t from, int64_t to, const int64_t* end) const {
    const Range r = whole_vectors(from, to);
    for (int i = 0; i < kRows; ++i) {
      float* scores = w.scores + i * kTile;
      Vec peak = splat(-kInfinity);
      for (int64_t c = r.begin; c < r.end; c += kWidth) {
        const uint64_t word = bit_range(from - c, least(to, end[i] - begin) - c);
        const Vec x = select(static_cast<Bits>(word), load(scores + c), -kInfinity);
        store(scores + c, x);
        peak = max(peak, x);
      }
      store(w.peaks + i * kWidth, peak);
    }
  }

  // As in Prefill: the exponent moves only when the tile goes far above it.
  void raise_tops(const Work& w, const int64_t* at) const {
    for (int i = 0; i < kRows; ++i) {
      float& top = w.tops[at[i]];
      const Vec peak = load(w.peaks + i * kWidth);
      if (!any_above(peak * splat(exponent_), top + kLateRescale)) continue;
      const float risen = largest(peak) * exponent_;
      if (top != -kInfinity) {
        const Vec shrink = splat(__builtin_exp2f(top - risen));
        float* totals = w.totals + at[i] * kWidth;
        store(totals, load(totals) * shrink);
        float* added = w.added + i * value_columns_;
        for (int64_t c = 0; c < value_columns_; c += kWidth) store(added + c, load(added + c) * shrink);
      }
      top = risen;
    }
  }

  void weigh(const Work& w, const int64_t* at, int64_t from, int64_t to) const {
    const Range r = whole_vectors(from, to);
    const Vec factor = splat(exponent_);
    Vec total[kRows], shift[kRows];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const float top = w.tops[at[i]];
      total[i] = load(w.totals + at[i] * kWidth);
      shift[i] = splat(top == -kInfinity ? 0.0f : -top);
    }
    for (int64_t c = r.begin; c < r.end; c += kVectorKeys) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        Vec x[Math::kExpVectors];
#pragma GCC unroll 2
        for (int j = 0; j < Math::kExpVectors; ++j) {
          x[j] = exp2<Math::kExpDegree>(fma(load(w.scores + i * kTile + c + j * kWidth), factor, shift[i]));
          total[i] = total[i] + x[j];
        }
        Math::store_weights(w.weights + i * kWeightStep + c / Math::kNumbers, x);
      }
    }
    // Repeated rows store the same total again.
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) store(w.totals + at[i] * kWidth, total[i]);
  }

  void add_values(const Work& w, const Packed<Math>& kv, int64_t begin, int64_t from, int64_t to) const {
    const Range r = whole_vectors(from, to);
    const int64_t first = r.begin / Math::kNumbers, steps = (r.end - r.begin) / Math::kNumbers;
    const int64_t step = begin / Math::kNumbers + first;
    for (int64_t vector = 0; vector < sizes_.value_vectors; vector += kStripVectors) {
      const int64_t vectors = least<int64_t>(kStripVectors, sizes_.value_vectors - vector);
      with_vectors(vectors, [&](auto strip) {
        add_product<Math, strip.count>(w.weights + first, kWeightStep,
                                       kv.values + vector * kWidth * sizes_.value_steps + step * vectors * kWidth,
                                       steps, w.added + vector * kWidth, value_columns_);
      });
    }
  }

  // The same where a value that some row must not touch is a NaN or an infinity: 0 times those is a NaN.
  void add_visible_values(const Work& w, const Packed<Math>& kv, int64_t begin, int64_t from, int64_t to,
                          const int64_t* end) const {
    for (int i = 0; i < kRows; ++i) {
      const Element* weights = w.weights + i * kWeightStep;
      for (int64_t c = from; c < least(to, end[i] - begin); ++c) {
        const int64_t key = begin + c;
        const Vec weight = splat(Math::weight(weights, c));
        for (int64_t vector = 0; vector < sizes_.value_vectors; ++vector) {
          const int64_t strip = vector / kStripVectors * kStripVectors;
          const int64_t vectors = least<int64_t>(kStripVectors, sizes_.value_vectors - strip);
          const Element* step = kv.values + strip * kWidth * sizes_.value_steps +
                                (key / Math::kNumbers * vectors + vector - strip) * kWidth;
          float* added = w.added + i * value_columns_ + vector * kWidth;
          store(added, fma(weight, Math::values_of(step, key), load(added)));
        }
      }
    }
  }

  void finish(const Work& w, const Span& span, int64_t batch, int64_t list) const {
    for (int64_t row = 0; row < span.count * heads_; ++row) {
      const int64_t head = list * heads_ + row % heads_;
      const int64_t query = span.first + row / heads_;
      T* o = static_cast<T*>(s_.o) + batch * s_.o_b + head * s_.o_h + query * s_.o_m;
      const RowEnd end(w.tops[row], sum(load(w.totals + row * kWidth)), nullptr);
      end.keep(kv_, (batch * s_.h + head) * s_.m + query);
      const float* sums = w.sums + row * value_columns_;
      for (int64_t c = 0; c < s_.e; c += kWidth)
        store_some(o + c, load(sums + c) * splat(end.factor), least<int64_t>(kWidth, s_.e - c));
    }
  }

  const attnkit_selected& s_;
  const attnkit_softmax kv_;
  const PackedSizes<Math> sizes_;
  const float exponent_;         // from products to exponents of two
  const int64_t heads_;          // query heads that read one list
  const int64_t span_;           // queries of a span
  const int64_t spans_;
  const int64_t blocks_;
  const int64_t query_steps_;    // of one packed query, whole vectors
  const int64_t value_columns_;  // of one row of sums, whole vectors
  const int64_t threads_;
};
