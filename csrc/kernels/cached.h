// Stores of a decoding state: pages, and quantised forms, of which a page holds whole tiles and groups. See stores.h.

// Numbers as they are, contiguous or on pages; every sequence has its own length.
template <class T, class R>
struct Plain {
  using Asked = T;
  using Number = T;
  using Rows = R;
  using Memory = NoMemory;
  static constexpr bool kScales = false, kConverts = false, kMultiplies = false;

  explicit Plain(const attnkit_cache& cache) : c_(cache) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return 0; }

  void open(Tile<Rows>& tile, T*, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end, int64_t next,
            int64_t n) const {
    const RowPlaces<T> keys = row_places<T>(c_, c_.k, c_.k_b, c_.k_g, c_.k_n, batch, group);
    const RowPlaces<T> values = row_places<T>(c_, c_.v, c_.v_b, c_.v_g, c_.v_n, batch, group);
    keys.find(tile.keys, first, begin, end);
    values.find(tile.values, first, begin, end);
    if (c_.pages) look_ahead(keys, values, first, n);
    tile.fetch = next < n;
    if (tile.fetch) keys.find(tile.next, next, 0, least(kWalkKeys, n - next));
  }

 private:
  const attnkit_cache& c_;
};

// One byte a number and one scale a token and KV head.
template <class Form, class A>
struct Scaled {
  using Asked = A;
  using Number = float;
  using Rows = EvenRows<float>;
  using Memory = NoMemory;
  static constexpr bool kScales = true, kConverts = true, kMultiplies = false;

  explicit Scaled(const attnkit_cache& cache)
      : c_(cache), key_row_(round_up(cache.d, kBlockKeys)), value_row_(round_up(cache.e, kBlockKeys)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return kWalkKeys * (key_row_ + value_row_); }

  void open(Tile<Rows>& tile, float* memory, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const RowPlaces<uint8_t> keys = row_places<uint8_t>(c_, c_.k, c_.k_b, c_.k_g, c_.k_n, batch, group);
    const RowPlaces<uint8_t> values = row_places<uint8_t>(c_, c_.v, c_.v_b, c_.v_g, c_.v_n, batch, group);
    const bool fetch = next < n;
    tile.keys = {memory, key_row_};
    tile.values = {memory + kWalkKeys * key_row_, value_row_};
    convert(memory, key_row_, keys.at(first), c_.k_n, c_.d, begin, end, fetch ? keys.at(next) : nullptr);
    convert(memory + kWalkKeys * key_row_, value_row_, values.at(first), c_.v_n, c_.e, begin, end,
            fetch ? values.at(next) : nullptr);
    const auto k_scale = row_places<float>(c_, c_.k_scale, c_.k_scale_b, c_.k_scale_g, 1, batch, group);
    const auto v_scale = row_places<float>(c_, c_.v_scale, c_.v_scale_b, c_.v_scale_g, 1, batch, group);
    scales(tile.key_scale, k_scale.at(first), begin, end);
    scales(tile.value_scale, v_scale.at(first), begin, end);
    tile.fetch = false;
  }

 private:
  // Fetching past the last token does no harm.
  static void convert(float* memory, int64_t row, const uint8_t* codes, int64_t stride, int64_t numbers, int64_t begin,
                      int64_t end, const uint8_t* next) {
    for (int64_t i = begin; i < end; ++i) {
      if (next) prefetch_row(next + i * stride, numbers);
      Form::convert(memory + i * row, codes + i * stride, numbers);
    }
  }
  static void scales(float* to, const float* from, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < kWalkKeys; ++i) to[i] = i < begin || i >= end ? 0.0f : from[i];
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
  using Rows = EvenRows<float>;
  using Memory = NoMemory;
  static constexpr bool kScales = false, kConverts = true, kMultiplies = false;

  explicit Grouped(const attnkit_cache& cache)
      : c_(cache), key_row_(round_up(cache.d, kBlockKeys)), value_row_(round_up(cache.e, kBlockKeys)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return kWalkKeys * (key_row_ + value_row_); }

  void open(Tile<Rows>& tile, float* memory, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const RowPlaces<uint8_t> k = row_places<uint8_t>(c_, c_.k, c_.k_b, c_.k_g, c_.k_n, batch, group);
    const RowPlaces<uint8_t> v = row_places<uint8_t>(c_, c_.v, c_.v_b, c_.v_g, c_.v_n, batch, group);
    const int64_t parts = ceil_div(c_.e, c_.channels);
    const GroupPlaces scales(c_, batch, group, first, parts);
    const A* recent = static_cast<const A*>(c_.recent) + batch * c_.recent_b + group * c_.recent_g;
    look_ahead(k, v, first, n);
    const bool waits = first >= n / c_.group * c_.group, fetch = next < n;
    const uint8_t *key_codes = k.at(first), *value_codes = v.at(first);
    const uint8_t *next_keys = fetch ? k.at(next) : nullptr, *next_values = fetch ? v.at(next) : nullptr;
    float* values = memory + kWalkKeys * key_row_;
    for (int64_t i = begin; i < end; ++i) {
      float* key = memory + i * key_row_;
      if (fetch) prefetch_row(next_keys + i * c_.k_n, ceil_div(c_.d, 2));
      if (fetch) prefetch_row(next_values + i * c_.v_n, ceil_div(c_.e, 2));
      if (waits) {
        const A* row = recent + (first + i) % (2 * c_.group) * c_.d;
        for (int64_t j = 0; j < c_.d; j += kWidth) store(key + j, load_some(row + j, c_.d - j));
      } else {
        convert(key, key_codes + i * c_.k_n, c_.d, scales.key_scale, scales.key_zero, 1);
      }
      convert(values + i * value_row_, value_codes + i * c_.v_n, c_.e, scales.value_scale + i * parts,
              scales.value_zero + i * parts, c_.channels);
    }
    tile.keys = {memory, key_row_};
    tile.values = {values, value_row_};
    tile.fetch = false;
  }

 private:
  // One row. Scale and zero of channel c are number c / share of theirs.
  static ATTNKIT_INLINE void convert(float* to, const uint8_t* codes, int64_t count, const BFloat16* scale,
                                     const BFloat16* zero, int64_t share) {
    for (int64_t start = 0; start < count; start += 128, codes += 64) {
      const int64_t width = least<int64_t>(count - start, 128);
      for (int64_t j = 0; j < width; j += 32) {
        // Pair i of these 32 channels is in bytes 2 i and 2 i + 1 of a narrow rest, else in every second byte.
        const int64_t step = width > 64 ? 2 : 1;
        convert_32(to + start + j, codes + (j >= 64 ? 1 : 0), step, j / 32 % 2 * 4, least<int64_t>(width - j, 32),
                   scale + (start + j) / share, zero + (start + j) / share, share == 1);
      }
    }
  }
  // 32 channels, whose codes are in the lower or upper half of every `step`-th byte.
  static ATTNKIT_INLINE void convert_32(float* to, const uint8_t* codes, int64_t step, int shift, int64_t count,
                                        const BFloat16* scale, const BFloat16* zero, bool each) {
    float numbers[32], scales[32], zeros[32];
    if (step == 2) {
      for (int64_t i = 0; i < 32; ++i) numbers[i] = static_cast<float>(codes[2 * i] >> shift & 15);
    } else {
      for (int64_t i = 0; i < 32; ++i) numbers[i] = static_cast<float>(codes[i] >> shift & 15);
    }
    for (int64_t i = 0; i < 32; i += kWidth) {
      if (each) {
        store(scales + i, i < count ? load_some(scale + i, count - i) : zero_vector());
        store(zeros + i, i < count ? load_some(zero + i, count - i) : zero_vector());
      } else {
        store(scales + i, splat(number(*scale)));
        store(zeros + i, splat(number(*zero)));
      }
      store(to + i, fma(load(scales + i), load(numbers + i), load(zeros + i)));
    }
  }
  static ATTNKIT_INLINE Vec zero_vector() { return splat(0.0f); }
  static ATTNKIT_INLINE float number(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
  }
  const attnkit_cache& c_;
  const int64_t key_row_, value_row_;
};
