// Stores of a decoding state: pages, and quantised forms. See stores.h.

// Numbers as they are, contiguous or on pages; every sequence has its own length.
template <class T>
struct Plain {
  using Asked = T;
  using Number = T;
  static constexpr bool kScales = false, kConverts = false;

  explicit Plain(const attnkit_cache& cache) : c_(cache) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return 0; }

  void open(Tile<T>& tile, T*, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end, int64_t next,
            int64_t n) const {
    const RowPlaces<T> keys = places(c_.k, c_.k_b, c_.k_g, c_.k_n, batch, group);
    keys.fill(tile.keys, first, begin, end);
    places(c_.v, c_.v_b, c_.v_g, c_.v_n, batch, group).fill(tile.values, first, begin, end);
    if (next < n) keys.fill(tile.next, next, 0, least(kWalkKeys, n - next));
    if (next >= n) tile.next[0] = nullptr;
  }

 private:
  // With pages, the stride of the batch is that of the pages.
  RowPlaces<T> places(const void* rows, int64_t b, int64_t g, int64_t n, int64_t batch, int64_t group) const {
    const T* base = static_cast<const T*>(rows) + group * g;
    if (!c_.pages) return {base + batch * b, n, nullptr, 1, 0};
    return {base, n, c_.pages + batch * c_.pages_b, c_.page, b};
  }
  const attnkit_cache& c_;
};

// One byte a number and one scale a token and KV head.
template <class Form, class A, class N>
struct Scaled {
  using Asked = A;
  using Number = N;
  static constexpr bool kScales = true, kConverts = true;

  explicit Scaled(const attnkit_cache& cache)
      : c_(cache), key_row_(round_up(cache.d, kBlockKeys)), value_row_(round_up(cache.e, kBlockKeys)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return kWalkKeys * (key_row_ + value_row_); }

  void open(Tile<N>& tile, N* memory, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const uint8_t* k = static_cast<const uint8_t*>(c_.k) + batch * c_.k_b + group * c_.k_g;
    const uint8_t* v = static_cast<const uint8_t*>(c_.v) + batch * c_.v_b + group * c_.v_g;
    const bool fetch = next < n;
    convert(tile.keys, memory, key_row_, k, c_.k_n, c_.d, first, begin, end, fetch ? k + next * c_.k_n : nullptr);
    convert(tile.values, memory + kWalkKeys * key_row_, value_row_, v, c_.v_n, c_.e, first, begin, end,
            fetch ? v + next * c_.v_n : nullptr);
    const float* k_scale = static_cast<const float*>(c_.k_scale) + batch * c_.k_scale_b + group * c_.k_scale_g;
    const float* v_scale = static_cast<const float*>(c_.v_scale) + batch * c_.v_scale_b + group * c_.v_scale_g;
    scales(tile.key_scale, k_scale, first, begin, end);
    scales(tile.value_scale, v_scale, first, begin, end);
    tile.next[0] = nullptr;
  }

 private:
  // Fetching past the last token does no harm.
  static void convert(const N** to, N* memory, int64_t row, const uint8_t* codes, int64_t stride, int64_t numbers,
                      int64_t first, int64_t begin, int64_t end, const uint8_t* next) {
    for (int64_t i = begin; i < end; ++i) {
      if (next) prefetch_row(next + i * stride, numbers);
      Form::convert(memory + i * row, codes + (first + i) * stride, numbers);
      to[i] = memory + i * row;
    }
    for (int64_t i = 0; i < begin; ++i) to[i] = to[begin];
    for (int64_t i = end; i < kWalkKeys; ++i) to[i] = to[end - 1];
  }
  static void scales(float* to, const float* from, int64_t first, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < kWalkKeys; ++i) to[i] = i < begin || i >= end ? 0.0f : from[first + i];
  }
  const attnkit_cache& c_;
  const int64_t key_row_, value_row_;
};

// Signed bytes.
struct Int8 {
  static ATTNKIT_INLINE void convert(float* to, const uint8_t* from, int64_t count) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(from);
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(codes[j]);
  }
};

// Sign, 4 bits of exponent whose bias is 7, 3 of mantissa. The codec writes no subnormal codes: 0 is the only number of
// exponent 0.
struct Fp8 {
  static ATTNKIT_INLINE void convert(float* to, const uint8_t* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t code = from[j], size = code & 0x7f;
      const uint32_t bits = (code & 0x80) << 24 | (size ? (size << 20) + ((127u - 7u) << 23) : 0u);
      __builtin_memcpy(to + j, &bits, sizeof bits);
    }
  }
};

// Half bytes: a number is zero + scale * code. Keys have both for each channel and group of tokens, values for each token
// and group of channels; the keys of the last group wait as numbers until it is full.
template <class A>
struct Grouped {
  using Asked = A;
  using Number = float;
  static constexpr bool kScales = false, kConverts = true;

  explicit Grouped(const attnkit_cache& cache)
      : c_(cache), key_row_(round_up(cache.d, kBlockKeys)), value_row_(round_up(cache.e, kBlockKeys)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return kWalkKeys * (key_row_ + value_row_); }

  void open(Tile<float>& tile, float* memory, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const uint8_t* k = static_cast<const uint8_t*>(c_.k) + batch * c_.k_b + group * c_.k_g;
    const uint8_t* v = static_cast<const uint8_t*>(c_.v) + batch * c_.v_b + group * c_.v_g;
    const int64_t at_keys = batch * c_.k_scale_b + group * c_.k_scale_g + first / c_.group * c_.d;
    const int64_t at_values = batch * c_.v_scale_b + group * c_.v_scale_g, parts = ceil_div(c_.e, c_.channels);
    const A* recent = static_cast<const A*>(c_.recent) + batch * c_.recent_b + group * c_.recent_g;
    const bool waits = first >= n / c_.group * c_.group;
    float* values = memory + kWalkKeys * key_row_;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = first + i;
      float* key = memory + i * key_row_;
      if (next < n) prefetch_row(k + (next + i) * c_.k_n, ceil_div(c_.d, 2));
      if (next < n) prefetch_row(v + (next + i) * c_.v_n, ceil_div(c_.e, 2));
      if (waits) {
        const A* row = recent + token % (2 * c_.group) * c_.d;
        for (int64_t j = 0; j < c_.d; j += kWidth) store_some(key + j, load_some(row + j, c_.d - j), kWidth);
      } else {
        convert(key, k + token * c_.k_n, c_.d, c_.k_scale, c_.k_zero, at_keys, 1);
      }
      convert(values + i * value_row_, v + token * c_.v_n, c_.e, c_.v_scale, c_.v_zero, at_values + token * parts,
              c_.channels);
    }
    for (int64_t i = 0; i < kWalkKeys; ++i) {
      const int64_t nearest = clamp(i, begin, end - 1);
      tile.keys[i] = memory + nearest * key_row_;
      tile.values[i] = values + nearest * value_row_;
    }
    tile.next[0] = nullptr;
  }

 private:
  // Scale and zero of channel c are number at + c / share of theirs.
  static void convert(float* to, const uint8_t* codes, int64_t count, const void* scales, const void* zeros, int64_t at,
                      int64_t share) {
    const BFloat16* scale = static_cast<const BFloat16*>(scales) + at;
    const BFloat16* zero = static_cast<const BFloat16*>(zeros) + at;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t place = c % 128, width = count - (c - place) > 64 ? 4 : 2;
      const uint8_t byte = codes[c / 128 * 64 + place % 32 * width / 2 + (width == 4 ? place / 64 : 0)];
      const int code = place / 32 % 2 ? byte >> 4 : byte & 15;
      to[c] = number(zero[c / share]) + number(scale[c / share]) * static_cast<float>(code);
    }
  }
  static ATTNKIT_INLINE float number(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
  }
  const attnkit_cache& c_;
  const int64_t key_row_, value_row_;
};
