// Many query rows of one KV head: a matrix product, through the micro-kernel and the packing of prefill.
//
// Decoding with few rows a key is bound by reading; from about a dozen rows on it is bound by arithmetic, and a row at a
// time reaches less than half of what the processor can do. So a stretch of up to four blocks of 64 keys is packed, whatever
// form the store gives them in, and six rows at a time go through all of it: products, logits, mask, weights, sums over
// values. Keys that no row sees are packed as zeros and not read; what single rows do not see gets the weight 0.
//
// Stretches are cut by the blocks of a range alone, and every row goes through the same operations whatever its neighbours.

// Sums of query rows over the values so far, against exponents of two (tops, see logits.h).
struct RowSums {
  float* sums;     // rows of `columns`, not yet divided by the totals
  float* totals;   // rows of one vector
  float* tops;
  int64_t columns;
  RowSums(float* memory, int64_t rows, int64_t row_columns)
      : sums(memory), totals(sums + rows * row_columns), tops(totals + rows * kWidth), columns(row_columns) {}

  // Moves the reference of a row to the largest of `peak`, where that is far above it.
  void raise(int64_t r, Vec peak, float exponent) const {
    const float top = tops[r], risen = largest(peak) * exponent;
    if (!(risen > top + kLateRescale)) return;
    tops[r] = risen;
    if (top == -kInfinity) return;
    const Vec shrink = splat(__builtin_exp2f(top - risen));
    float *row = sums + r * columns, *total = totals + r * kWidth;
    for (int64_t c = 0; c < columns; c += kWidth) store(row + c, load(row + c) * shrink);
    store(total, load(total) * shrink);
  }
};

template <class Math>
class ManyRows {
 public:
  using Element = typename Math::Element;
  static constexpr int kBlocks = 4;
  static constexpr int64_t kKeys = kBlocks * kBlockKeys;

  struct Memory {
    uint64_t* words;   // of each block, one per query: keys that it sees
    float* scores;     // six rows of kKeys
    Element* weights;  // six rows of kWeightStep
    float* peaks;      // six rows of one vector
    char* packed;
    Memory(const ManyRows& many, char* memory)
        : words(reinterpret_cast<uint64_t*>(memory)),
          scores(reinterpret_cast<float*>(words + kBlocks * many.queries_)),
          weights(reinterpret_cast<Element*>(scores + kRows * kKeys)),
          peaks(reinterpret_cast<float*>(weights + kRows * kWeightStep)),
          packed(reinterpret_cast<char*>(peaks + kRows * kWidth)) {}
  };
  // Blocks of keys, in ascending order; those of a list need not follow each other.
  struct Stretch {
    int count = 0;
    int64_t key[kBlocks];      // the first of each
    bool partial[kBlocks];     // some row does not see some key that is read
  };

  explicit ManyRows(const attnkit_softmax& call) : queries_(round_up(call.m, 8)), key_size_(call.d), value_size_(call.e),
                                                   sizes_(call, kBlocks) {}
  int64_t bytes() const {
    return 8 * kBlocks * queries_ + 4 * kRows * (kKeys + kWeightStep + kWidth) + round_up(sizes_.bytes(), 64);
  }
  int64_t steps() const { return kBlocks + ceil_div(sizes_.value_vectors, kStripVectors); }
  uint64_t* words(const Memory& w, int block) const { return w.words + block * queries_; }

  // Block number `block`: keys(i) and values(i) are its rows, or null.
  template <class Keys, class Values>
  void pack(const Memory& w, int block, Keys keys, Values values) const {
    const Packed<Math> to(w.packed, sizes_);
    pack_key_rows<Math>(key_size_, sizes_.key_steps, keys, to.keys + block * kBlockKeys * sizes_.key_steps);
    to.odd_values[block] = pack_value_rows<Math>(value_size_, sizes_, block, values, to.values);
  }

  // Six rows, of which the last `kRows - rows` count for nothing: row r is query r % m of head + r / m. Calls `between`
  // after each block of keys and each strip of values: steps() times at most.
  template <class F>
  void attend(const Memory& w, const Stretch& stretch, const Logits& logits, const Element* queries, int64_t query_row,
              const RowSums& to, int64_t batch, int64_t head, int64_t r, int64_t rows, F between) const {
    const Packed<Math> kv(w.packed, sizes_);
    const int64_t m = logits.s.m, keys = stretch.count * kBlockKeys;
    alignas(64) float unused[kRows * kWidth];
    for (int i = 0; i < kRows; ++i) {
      store(w.peaks + i * kWidth, splat(-kInfinity));
      store(unused + i * kWidth, splat(-kInfinity));
    }
    bool careful = false;
    for (int block = 0; block < stretch.count; ++block) {
      const bool hides = stretch.partial[block] || !logits.plain;
      careful |= (stretch.partial[block] || logits.s.bias) && kv.odd_values[block];
      for (int64_t c = block * kBlockKeys; c < (block + 1) * kBlockKeys; c += kStrip)
        product_and_peaks<Math, kStripVectors>(queries, query_row, kv.keys + c * sizes_.key_steps, sizes_.key_steps,
                                               w.scores + c, kKeys, hides ? unused : w.peaks);
      between();
      if (!hides) continue;
      for (int64_t i = 0; i < rows; ++i) {
        float* scores = w.scores + i * kKeys + block * kBlockKeys;
        if (!logits.plain)
          logits.apply(scores, kBlockKeys / kWidth, batch, head + (r + i) / m, (r + i) % m, stretch.key[block]);
        hide(scores, words(w, block)[(r + i) % m], w.peaks + i * kWidth);
      }
    }
    raise(w, to, logits.exponent, r);
    weigh(w, to, splat(logits.exponent), keys, r);
    if (careful) return add_visible_values(w, kv, to, keys, r, rows);
    for (int64_t vector = 0; vector < sizes_.value_vectors; vector += kStripVectors) {
      with_vectors(least<int64_t>(kStripVectors, sizes_.value_vectors - vector), [&](auto strip) {
        add_product<Math, strip.count>(w.weights, kWeightStep, kv.values + vector * kWidth * sizes_.value_steps,
                                       keys / Math::kNumbers, to.sums + r * to.columns + vector * kWidth, to.columns);
        between();
      });
    }
  }

 private:
  static constexpr int64_t kWeightStep = kKeys / Math::kNumbers;
  // Rows whose weights are computed in one loop, as registers allow.
  static constexpr int kWeighRows = kWidth == 16 ? kRows / Math::kExpVectors : 2;

  // -inf where a row may not look, and the largest of what is left.
  static void hide(float* scores, uint64_t word, float* peaks) {
    Vec peak = load(peaks);
    for (int64_t c = 0; c < kBlockKeys; c += kWidth) {
      const Vec x = select(static_cast<Bits>(word >> c), load(scores + c), -kInfinity);
      store(scores + c, x);
      peak = max(peak, x);
    }
    store(peaks, peak);
  }

  void raise(const Memory& w, const RowSums& to, float exponent, int64_t r) const {
    Vec above = splat(-kInfinity);
    for (int i = 0; i < kRows; ++i)
      // A row that has seen nothing gives inf - inf here: in first place, max drops it.
      above = max(fma(load(w.peaks + i * kWidth), splat(exponent), splat(-kLateRescale - to.tops[r + i])), above);
    if (!any_above(above, 0.0f)) return;
    for (int i = 0; i < kRows; ++i) to.raise(r + i, load(w.peaks + i * kWidth), exponent);
  }

  void weigh(const Memory& w, const RowSums& to, Vec factor, int64_t keys, int64_t r) const {
#pragma GCC unroll 1
    for (int first = 0; first < kRows; first += kWeighRows) {
      float* totals = to.totals + (r + first) * kWidth;
      Vec total[kWeighRows], shift[kWeighRows];
#pragma GCC unroll 6
      for (int i = 0; i < kWeighRows; ++i) {
        const float top = to.tops[r + first + i];
        total[i] = load(totals + i * kWidth);
        shift[i] = splat(top == -kInfinity ? 0.0f : -top);
      }
      weigh_columns<Math>(w.scores + first * kKeys, kKeys, w.weights + first * kWeightStep, kWeightStep, 0, keys, factor,
                          shift, total, [](int, int64_t, Vec x) __attribute__((always_inline)) { return x; });
#pragma GCC unroll 6
      for (int i = 0; i < kWeighRows; ++i) store(totals + i * kWidth, total[i]);
    }
  }

  // For rows that must not touch some of these values, a NaN or an infinity: 0 times those is a NaN.
  void add_visible_values(const Memory& w, const Packed<Math>& kv, const RowSums& to, int64_t keys, int64_t r,
                          int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < keys; ++c)
        if (w.scores[i * kKeys + c] != -kInfinity)
          add_packed_values(sizes_, kv.values, c, splat(Math::weight(w.weights + i * kWeightStep, c)),
                            to.sums + (r + i) * to.columns);
  }

  const int64_t queries_, key_size_, value_size_;
  const PackedSizes<Math> sizes_;
};
