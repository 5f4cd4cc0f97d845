// NSA's first branch and the choice for its second: attention to compressed blocks, whose weights also say which blocks
// of tokens matter.
//
// A query looks at a few thousand compressed blocks at most, so a row's scores stay in the second cache and its softmax
// is taken in two plain passes over them. Six rows at a time, a row being a query and a head: products against packed
// keys, weights, sums over packed values. The normalised weights of the heads of one KV head are added up in the order
// of the heads; a block of tokens counts each compressed block as often as the two have strides in common. The best are
// kept in a short sorted list, of equals the earlier: first, own and neighbouring blocks come before all others, and the
// own block is not named, as every query has it.

// Queries whose shares are at hand together: 12 of four heads are 48 rows, and 96 KB for 2,048 compressed blocks.
constexpr int64_t kCoarseRows = 48;

template <class Math, class T>
class Coarse {
  using Element = typename Math::Element;
  static constexpr int64_t kVectorKeys = kWidth * Math::kExpVectors;

 public:
  explicit Coarse(const attnkit_coarse& call)
      : s_(call),
        kv_(packing_call(call, call.c, call.k_n, call.e, call.v_n)),
        sizes_(kv_),
        exponent_(call.scale * kLog2E),
        heads_(call.h / call.g),
        queries_(clamp<int64_t>(kCoarseRows / heads_, 1, most<int64_t>(call.m, 1))),
        tasks_(ceil_div(call.m, queries_)),
        columns_(sizes_.key_blocks * kBlockKeys),
        query_steps_(round_up(sizes_.key_steps, kWidth)),
        value_columns_(sizes_.value_vectors * kWidth),
        threads_(useful_threads(kv_, call.b * call.g * tasks_)) {}

  int64_t scratch_bytes() const { return sizes_.bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    const Packed<Math> kv(scratch, sizes_);
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, scratch + sizes_.bytes() + thread_number() * work_bytes());
      for (int64_t head = 0; head < s_.b * s_.g; ++head) {
        const int64_t batch = head / s_.g, group = head % s_.g;
        const T* keys = static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g;
        const T* values = static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < sizes_.key_blocks; ++panel) {
          pack_key_block<Math>(kv_, keys, sizes_, panel, kv.keys);
          pack_value_block<Math>(kv_, values, sizes_, panel, kv.values);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks_; ++task) attend(work, kv, batch, group, (tasks_ - 1 - task) * queries_);
      }
    }
  }

 private:
  struct Work {
    Element* queries;  // six rows of query_steps_
    float* scores;     // six rows of columns_, then not yet normalised weights
    Element* weights;  // the same for the product
    float* sums;       // six rows of value_columns_
    float* peaks;      // six rows of one vector
    float* shares;     // queries_ rows of columns_
    float* best;       // (selected,): importance of what is kept, descending
    Work(const Coarse& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          scores(reinterpret_cast<float*>(queries + kRows * p.query_steps_)),
          weights(reinterpret_cast<Element*>(scores + kRows * p.columns_)),
          sums(reinterpret_cast<float*>(weights + kRows * p.columns_)),
          peaks(sums + kRows * p.value_columns_),
          shares(peaks + kRows * kWidth),
          best(shares + p.queries_ * p.columns_) {}
  };
  int64_t work_bytes() const {
    return round_up(4 * (kRows * (query_steps_ + 2 * columns_ + value_columns_ + kWidth) + queries_ * columns_ + s_.s),
                    64);
  }

  // Last position whose tokens query `i` may see, and how many compressed blocks end there or before.
  int64_t there(int64_t i) const { return s_.causal ? s_.n - s_.m + i : s_.n - 1; }
  int64_t ended(int64_t i) const {
    const int64_t tokens = there(i) + 1;
    return tokens < s_.length ? 0 : least((tokens - s_.length) / s_.stride + 1, s_.c);
  }

  void attend(const Work& w, const Packed<Math>& kv, int64_t batch, int64_t group, int64_t first) const {
    const int64_t count = least(queries_, s_.m - first), rows = count * heads_;
    for (int64_t i = 0; i < count * columns_; ++i) w.shares[i] = 0.0f;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t some = least<int64_t>(kRows, rows - row);
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t at = row + least(i, some - 1);
        const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + (group * heads_ + at % heads_) * s_.q_h +
                     (first + at / heads_) * s_.q_m;
        pack_queries<Math>(kv_, q, 1, 1, query_steps_, w.queries + i * query_steps_);
      }
      attend_rows(w, kv, batch, group, first, row, some);
    }
    for (int64_t i = 0; i < count; ++i)
      choose(w, w.shares + i * columns_, first + i,
             s_.chosen + ((batch * s_.g + group) * s_.m + first + i) * s_.s);
  }

  void attend_rows(const Work& w, const Packed<Math>& kv, int64_t batch, int64_t group, int64_t first, int64_t row,
                   int64_t count) const {
    const int64_t seen = ended(first + (row + count - 1) / heads_), stop = round_up(seen, kVectorKeys);
    for (int i = 0; i < kRows; ++i) store(w.peaks + i * kWidth, splat(-kInfinity));
    for (int64_t c = 0; c < stop;) {
      const int64_t strip = c / kStrip * kStrip, end = least(stop, strip + kStrip);
      with_vectors((end - c) / kWidth, [&](auto vectors) {
        product_and_peaks<Math, vectors.count>(w.queries, query_steps_, kv.keys + strip * sizes_.key_steps + c - strip,
                                               sizes_.key_steps, w.scores + c, columns_, w.peaks);
      });
      c = end;
    }
    float factor[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t query = first + (row + least(i, count - 1)) / heads_;
      factor[i] = weigh(w, i, ended(query), stop);
    }
    for (int64_t c = 0; c < kRows * value_columns_; ++c) w.sums[c] = 0.0f;
    for (int64_t vector = 0; vector < sizes_.value_vectors; vector += kStripVectors) {
      const int64_t vectors = least<int64_t>(kStripVectors, sizes_.value_vectors - vector);
      with_vectors(vectors, [&](auto strip) {
        add_product<Math, strip.count>(w.weights, columns_, kv.values + vector * kWidth * sizes_.value_steps,
                                       stop / Math::kNumbers, w.sums + vector * kWidth, value_columns_);
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = first + (row + i) / heads_, head = group * heads_ + (row + i) % heads_;
      float* o = s_.o + ((batch * s_.h + head) * s_.m + query) * s_.e;
      const Vec by = splat(factor[i]);
      for (int64_t c = 0; c < s_.e; c += kWidth)
        store_some(o + c, load(w.sums + i * value_columns_ + c) * by, least<int64_t>(kWidth, s_.e - c));
      float* shares = w.shares + (row + i) / heads_ * columns_;
      const float* weights = w.scores + i * columns_;
      for (int64_t c = 0; c < stop; c += kWidth) store(shares + c, fma(load(weights + c), by, load(shares + c)));
    }
  }

  // Weights of one row, which sees the first `seen` of `stop` columns; returns what makes their sum 1.
  float weigh(const Work& w, int64_t i, int64_t seen, int64_t stop) const {
    float* scores = w.scores + i * columns_;
    Element* weights = w.weights + i * columns_;
    Vec peak = seen == stop ? load(w.peaks + i * kWidth) : splat(-kInfinity);
    for (int64_t c = 0; c < stop && seen != stop; c += kWidth) {
      const Vec x = select(static_cast<Bits>(bit_range(0, seen - c)), load(scores + c), -kInfinity);
      store(scores + c, x);
      peak = max(peak, x);
    }
    const Vec by = splat(exponent_), shift = splat(seen == 0 ? 0.0f : -largest(peak) * exponent_);
    Vec total = zero();
    for (int64_t c = 0; c < stop; c += kVectorKeys) {
      Vec x[Math::kExpVectors];
#pragma GCC unroll 2
      for (int j = 0; j < Math::kExpVectors; ++j) {
        x[j] = exp2<5>(fma(load(scores + c + j * kWidth), by, shift));
        store(scores + c + j * kWidth, x[j]);
        total = total + x[j];
      }
      Math::store_weights(weights + c / Math::kNumbers, x);
    }
    const float all = sum(total);
    return all == 0.0f ? 0.0f : 1.0f / all;
  }

  // The best blocks of one query by its shares, and -1 in places left over.
  void choose(const Work& w, const float* shares, int64_t query, int32_t* chosen) const {
    const int64_t inside = s_.block / s_.stride, before = s_.length / s_.stride, width = inside + before - 1;
    const int64_t own = (s_.n - s_.m + query) / s_.block, last = there(query) / s_.block, seen = ended(query);
    int64_t count = 0;
    for (int64_t j = 0; j <= last; ++j) {
      if (j == own) continue;
      float importance = 0.0f;
      if (j == 0 || j == own - 1 || j == own + 1) {
        importance = kInfinity;
      } else {
        const int64_t start = inside * j - (before - 1);
        const int64_t begin = most<int64_t>(0, -start), end = least(width, seen - start);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t times = least(least(i + 1, inside), least(before, width - i));
          importance += shares[start + i] * static_cast<float>(times);
        }
      }
      if (count == s_.s && !(count > 0 && importance > w.best[count - 1])) continue;
      int64_t at = count < s_.s ? count++ : count - 1;
      for (; at > 0 && importance > w.best[at - 1]; --at) {
        w.best[at] = w.best[at - 1];
        chosen[at] = chosen[at - 1];
      }
      w.best[at] = importance;
      chosen[at] = static_cast<int32_t>(j);
    }
    for (; count < s_.s; ++count) chosen[count] = -1;
  }

  const attnkit_coarse& s_;
  const attnkit_softmax kv_;
  const PackedSizes<Math> sizes_;
  const float exponent_;         // from products to exponents of two
  const int64_t heads_;          // query heads of one KV head
  const int64_t queries_;        // of one task
  const int64_t tasks_;
  const int64_t columns_;        // compressed blocks, whole panels
  const int64_t query_steps_;    // of one packed query, whole vectors
  const int64_t value_columns_;  // of one row of sums, whole vectors
  const int64_t threads_;
};
