// Where a decoding cache keeps its keys and values, and in which form. A store fills in a Tile: the places of 32 keys
// and 32 values, which lie in the cache itself or were converted from it a moment ago and are still in the first cache.
//
// Rows are contiguous, or on pages that a table lists: of any number of tokens, but of codes pages hold whole tiles and
// groups, so that a tile lies in one piece. Quantised forms (their layout is described
// in attnkit.state.codec) are converted to the numbers the products take, scales left aside where one belongs to a token:
// the kernel multiplies scores and weights by it. The converted cache as a whole is never written. A store that
// multiplies its codes itself (kMultiplies, codes.h) converts nothing.

// Keys whose scores, weights and values are worked off together: few enough that what is fetched ahead, the values of the
// same keys or the next keys, and what is in use fit any second cache many times.
constexpr int64_t kWalkKeys = 32;

constexpr int64_t kHalfTile = kWalkKeys / 2;

// The 32 rows of a tile where they follow each other, so that no address is looked up.
template <class T>
struct EvenRows {
  const T* first;
  int64_t stride;
  ATTNKIT_INLINE const T* operator[](int64_t i) const { return first + i * stride; }
};

// The same on pages that end within a tile. Those that were not asked for lie on a page of one that was, or repeat the
// nearest that was.
template <class T>
struct ListedRows {
  const T* row[kWalkKeys];
  ATTNKIT_INLINE const T* operator[](int64_t i) const { return row[i]; }
};

// Keys [begin, end) of the 32 that start at a multiple of 32.
template <class Rows>
struct Tile {
  Rows keys, values;
  Rows next;   // keys to fetch while the values are added
  Rows next_values;  // the values of those, where the store fetches them
  bool fetch;  // whether there are any
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
    if (!pages) return base + token * stride;
    // A division takes as long as the products of a row, and almost every pool has pages of a power of two.
    const bool power = (page & (page - 1)) == 0;
    const int64_t number = power ? token >> __builtin_ctzll(page) : token / page;
    return base + pages[number] * page_stride + (token - number * page) * stride;
  }
  // Tokens [first + begin, first + end) as rows [begin, end) of a tile.
  ATTNKIT_INLINE void find(EvenRows<T>& to, int64_t first, int64_t, int64_t) const { to = {at(first), stride}; }
  ATTNKIT_INLINE void find(ListedRows<T>& to, int64_t first, int64_t begin, int64_t end) const {
    if (page % kHalfTile == 0) {
      const T* half = at(first + (begin < kHalfTile ? 0 : kHalfTile));
      for (int64_t i = 0; i < kHalfTile; ++i) to.row[i] = half + i * stride;
      if (end > kHalfTile) half = at(first + kHalfTile);
      for (int64_t i = 0; i < kHalfTile; ++i) to.row[kHalfTile + i] = half + i * stride;
      return;
    }
    for (int64_t i = begin; i < end;) {
      const int64_t slot = (first + i) % page, stop = least(end, i + page - slot);
      const T* row = base + pages[(first + i) / page] * page_stride + slot * stride;
      for (; i < stop; ++i, row += stride) to.row[i] = row;
    }
    for (int64_t i = 0; i < begin; ++i) to.row[i] = to.row[begin];
    for (int64_t i = end; i < kWalkKeys; ++i) to.row[i] = to.row[end - 1];
  }
};

// Where one sequence and KV head of a decoding state has its rows, of so many tokens each. With pages, the stride of the
// batch is that of the pages.
template <class T>
ATTNKIT_INLINE RowPlaces<T> row_places(const attnkit_cache& c, const void* rows, int64_t b, int64_t g, int64_t stride,
                                       int64_t batch, int64_t group, int64_t tokens = 1) {
  const T* base = static_cast<const T*>(rows) + group * g;
  if (!c.pages) return {base + batch * b, stride, nullptr, 1, 0};
  return {base, stride, c.pages + batch * c.pages_b, c.page / tokens, b};
}

// Scales and zeros of half bytes, for the tile of keys that starts at `first`: of its group, and of its first token.
struct GroupPlaces {
  const BFloat16 *key_scale, *key_zero, *value_scale, *value_zero;
  GroupPlaces(const attnkit_cache& c, int64_t batch, int64_t group, int64_t first, int64_t parts) {
    const auto of_keys = [&](const void* rows) {
      return row_places<BFloat16>(c, rows, c.k_scale_b, c.k_scale_g, c.d, batch, group, c.group).at(first / c.group);
    };
    const auto of_values = [&](const void* rows) {
      return row_places<BFloat16>(c, rows, c.v_scale_b, c.v_scale_g, parts, batch, group).at(first);
    };
    key_scale = of_keys(c.k_scale), key_zero = of_keys(c.k_zero);
    value_scale = of_values(c.v_scale), value_zero = of_values(c.v_zero);
  }
};

// Looks up where tiles to come lie in memory, by touching each of its pages: one after the other costs a walk through the
// system's tables each, several at once overlap. On a Zen 4 core that attends to n32768 with h32/8 d128, pages of 16 tokens
// take 1.1 to 1.3 times as long as one buffer and not 1.5 to 1.75, and int8 gains a tenth; every second, fourth and eighth
// tile could not be told apart. One buffer of bfloat16 loses a little.
constexpr int64_t kLookAhead = 4;
template <class T>
ATTNKIT_INLINE void look_ahead(const RowPlaces<T>& keys, const RowPlaces<T>& values, int64_t first, int64_t n) {
  if (first % (kLookAhead * kWalkKeys) != 0) return;
  constexpr int64_t kPage = 4096 / static_cast<int64_t>(sizeof(T));
  const int64_t rows = clamp<int64_t>(kPage / most<int64_t>(keys.stride, 1), 1, kWalkKeys);
  const int64_t begin = first + kLookAhead * kWalkKeys, end = least(n, begin + kLookAhead * kWalkKeys);
  for (int64_t at = begin; at < end; at += rows) {
    prefetch_row(keys.at(at), 1);
    prefetch_row(values.at(at), 1);
  }
}

// Of a store that needs no memory but for converted tiles.
struct NoMemory {
  template <class Store, class Number>
  NoMemory(const Store&, Number*) {}
};

// Keys and values as softmax attention is given them: tensors of numbers, all sequences of one length.
template <class T>
struct Tensors {
  using Asked = T;   // dtype of queries and results
  using Number = T;  // what the rows of a tile hold
  using Rows = EvenRows<T>;
  using Memory = NoMemory;
  static constexpr bool kScales = false, kConverts = false, kMultiplies = false;

  explicit Tensors(const attnkit_softmax& call) : s_(call) {}
  int64_t length(int64_t) const { return s_.n; }
  int64_t tile_numbers() const { return 0; }

  void open(Tile<Rows>& tile, T*, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end, int64_t next,
            int64_t n) const {
    const RowPlaces<T> keys = {static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g, s_.k_n, nullptr, 1, 0};
    const RowPlaces<T> values = {static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g, s_.v_n, nullptr, 1, 0};
    keys.find(tile.keys, first, begin, end);
    values.find(tile.values, first, begin, end);
    tile.fetch = next < n;
    if (tile.fetch) keys.find(tile.next, next, 0, least(kWalkKeys, n - next));
  }

 private:
  const attnkit_softmax& s_;
};
