// Where a decoding cache keeps its keys and values, and in which form. A store fills in a Tile: the addresses of 32 keys
// and 32 values, which lie in the cache itself or were converted from it a moment ago and are still in the first cache.
//
// Rows are contiguous, or on pages of any number of tokens that a table lists. Quantised forms (their layout is described
// in attnkit.state.codec) are converted to the numbers the products take, scales left aside where one belongs to a token:
// the kernel multiplies scores and weights by it. The converted cache as a whole is never written.

// Keys whose scores, weights and values are worked off together: few enough that what is fetched ahead, the values of the
// same keys or the next keys, and what is in use fit any second cache many times.
constexpr int64_t kWalkKeys = 32;

// Keys [begin, end) of the 32 that start at a multiple of 32. Addresses outside that range repeat the nearest inside, so
// that reading them is harmless.
template <class Number>
struct Tile {
  const Number* keys[kWalkKeys];
  const Number* values[kWalkKeys];
  const Number* next[kWalkKeys];  // keys to fetch while the values are added; null for none
  float key_scale[kWalkKeys], value_scale[kWalkKeys];  // where the store has them; 0 outside the range
};

// Rows of one sequence and KV head: one after the other, or on pages.
template <class T>
struct RowPlaces {
  const T* base;          // of token 0, or of page 0
  int64_t stride;         // from token to token
  const int32_t* pages;   // of this sequence, or null
  int64_t page, page_stride;

  ATTNKIT_INLINE const T* at(int64_t token) const {
    return pages ? base + pages[token / page] * page_stride + token % page * stride : base + token * stride;
  }
  // Addresses of tokens [first + begin, first + end) in to[begin, end), and of the outermost around them.
  ATTNKIT_INLINE void fill(const T** to, int64_t first, int64_t begin, int64_t end) const {
    if (!pages) {
      for (int64_t i = begin; i < end; ++i) to[i] = base + (first + i) * stride;
    } else {
      for (int64_t i = begin; i < end;) {
        const int64_t slot = (first + i) % page, stop = least(end, i + page - slot);
        const T* row = base + pages[(first + i) / page] * page_stride + slot * stride;
        for (; i < stop; ++i, row += stride) to[i] = row;
      }
    }
    for (int64_t i = 0; i < begin; ++i) to[i] = to[begin];
    for (int64_t i = end; i < kWalkKeys; ++i) to[i] = to[end - 1];
  }
};

// Keys and values as softmax attention is given them: tensors of numbers, all sequences of one length.
template <class T>
struct Tensors {
  using Asked = T;   // dtype of queries and results
  using Number = T;  // what the rows of a tile hold
  static constexpr bool kScales = false, kConverts = false;

  explicit Tensors(const attnkit_softmax& call) : s_(call) {}
  int64_t length(int64_t) const { return s_.n; }
  int64_t tile_numbers() const { return 0; }

  void open(Tile<T>& tile, T*, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end, int64_t next,
            int64_t n) const {
    const RowPlaces<T> keys = {static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g, s_.k_n, nullptr, 1, 0};
    const RowPlaces<T> values = {static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g, s_.v_n, nullptr, 1, 0};
    keys.fill(tile.keys, first, begin, end);
    values.fill(tile.values, first, begin, end);
    if (next < n) keys.fill(tile.next, next, 0, least(kWalkKeys, n - next));
    if (next >= n) tile.next[0] = nullptr;
  }

 private:
  const attnkit_softmax& s_;
};
