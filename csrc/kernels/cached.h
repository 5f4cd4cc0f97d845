// Stores of a decoding state: pages, and quantised forms. See stores.h.

// Numbers as they are, contiguous or on pages; every sequence has its own length.
template <class T, class R>
struct Plain {
  using Asked = T;
  using Number = T;
  using Rows = R;
  static constexpr bool kScales = false, kConverts = false, kMultiplies = false;

  explicit Plain(const attnkit_cache& cache) : c_(cache) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return 0; }

  void open(Tile<Rows>& tile, T*, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end, int64_t next,
            int64_t n) const {
    const RowPlaces<T> keys = places(c_.k, c_.k_b, c_.k_g, c_.k_n, batch, group);
    const RowPlaces<T> values = places(c_.v, c_.v_b, c_.v_g, c_.v_n, batch, group);
    keys.find(tile.keys, first, begin, end);
    values.find(tile.values, first, begin, end);
    if (c_.pages) look_ahead(keys, values, first, n);
    tile.fetch = next < n;
    if (tile.fetch) keys.find(tile.next, next, 0, least(kWalkKeys, n - next));
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
  using Rows = EvenRows<N>;
  static constexpr bool kScales = true, kConverts = true, kMultiplies = false;

  explicit Scaled(const attnkit_cache& cache)
      : c_(cache), key_row_(round_up(cache.d, kBlockKeys)), value_row_(round_up(cache.e, kBlockKeys)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return kWalkKeys * (key_row_ + value_row_); }

  void open(Tile<Rows>& tile, N* memory, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const uint8_t* k = static_cast<const uint8_t*>(c_.k) + batch * c_.k_b + group * c_.k_g;
    const uint8_t* v = static_cast<const uint8_t*>(c_.v) + batch * c_.v_b + group * c_.v_g;
    const bool fetch = next < n;
    tile.keys = {memory, key_row_};
    tile.values = {memory + kWalkKeys * key_row_, value_row_};
    convert(memory, key_row_, k, c_.k_n, c_.d, first, begin, end, fetch ? k + next * c_.k_n : nullptr);
    convert(memory + kWalkKeys * key_row_, value_row_, v, c_.v_n, c_.e, first, begin, end,
            fetch ? v + next * c_.v_n : nullptr);
    const float* k_scale = static_cast<const float*>(c_.k_scale) + batch * c_.k_scale_b + group * c_.k_scale_g;
    const float* v_scale = static_cast<const float*>(c_.v_scale) + batch * c_.v_scale_b + group * c_.v_scale_g;
    scales(tile.key_scale, k_scale, first, begin, end);
    scales(tile.value_scale, v_scale, first, begin, end);
    tile.fetch = false;
  }

 private:
  // Fetching past the last token does no harm.
  static void convert(N* memory, int64_t row, const uint8_t* codes, int64_t stride, int64_t numbers, int64_t first,
                      int64_t begin, int64_t end, const uint8_t* next) {
    for (int64_t i = begin; i < end; ++i) {
      if (next) prefetch_row(next + i * stride, numbers);
      Form::convert(memory + i * row, codes + (first + i) * stride, numbers);
    }
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
#if defined(ATTNKIT_BF16_DOT)
  static ATTNKIT_INLINE Pairs pairs(__m256i codes) {
    const __m512i x = _mm512_cvtepi8_epi16(codes);  // the sign is in the upper nine bits
    const __m512i size = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x7f0));
    const __m512i number =
        _mm512_maskz_add_epi16(_mm512_test_epi16_mask(size, size), size, _mm512_set1_epi16((127 - 7) << 7));
    return _mm512_ternarylogic_epi64(number, x, _mm512_set1_epi16(static_cast<int16_t>(0x8000)), 0xf8);  // n | x & top
  }
#endif
};

#if defined(ATTNKIT_BF16_DOT)
// A byte in the cache. Where four query rows share a key, each byte is read once a tile, so it is best converted in the
// registers of the loop that uses it.
template <class Form>
struct Code {
  uint8_t bits;
};
// Only whether it is finite counts: as float16 a code with its exponent in place is 2^-8 of the number.
ATTNKIT_INLINE Vec widen_fp8(__m128i codes) {
  const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8), 1);
  return _mm512_cvtph_ps(_mm256_and_si256(moved, _mm256_set1_epi16(static_cast<int16_t>(0xbfff))));
}
ATTNKIT_INLINE Vec load(const Code<Fp8>* p) {
  return widen_fp8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ATTNKIT_INLINE Vec load_first(const Code<Fp8>* p, int count) {
  return widen_fp8(_mm_maskz_loadu_epi8(first(count), p));
}

template <class Form>
struct RowProduct<Code<Form>> : RowProduct<BFloat16> {
  using Loaded = Pairs;
  static ATTNKIT_INLINE Loaded load_key(const Code<Form>* p) {
    return Form::pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static ATTNKIT_INLINE Loaded load_key_first(const Code<Form>* p, int count) {
    return Form::pairs(_mm256_maskz_loadu_epi8((uint32_t{1} << count) - 1, p));
  }
};

// Scaled for bfloat16 queries: bytes are read where they lie.
template <class Form>
struct ScaledCodes {
  using Asked = BFloat16;
  using Number = Code<Form>;
  using Rows = EvenRows<Number>;
  static constexpr bool kScales = true, kConverts = false, kMultiplies = false;

  explicit ScaledCodes(const attnkit_cache& cache) : c_(cache) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return 0; }

  void open(Tile<Rows>& tile, Number*, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const Number* k = static_cast<const Number*>(c_.k) + batch * c_.k_b + group * c_.k_g;
    const Number* v = static_cast<const Number*>(c_.v) + batch * c_.v_b + group * c_.v_g;
    tile.keys = {k + first * c_.k_n, c_.k_n};
    tile.values = {v + first * c_.v_n, c_.v_n};
    tile.next = {k + next * c_.k_n, c_.k_n};
    tile.fetch = next < n;
    const float* k_scale = static_cast<const float*>(c_.k_scale) + batch * c_.k_scale_b + group * c_.k_scale_g + first;
    const float* v_scale = static_cast<const float*>(c_.v_scale) + batch * c_.v_scale_b + group * c_.v_scale_g + first;
    for (int64_t i = 0; i < kWalkKeys; ++i) {
      const bool inside = i >= begin && i < end;
      tile.key_scale[i] = inside ? k_scale[i] : 0.0f;
      tile.value_scale[i] = inside ? v_scale[i] : 0.0f;
    }
  }

 private:
  const attnkit_cache& c_;
};
#endif

// Half bytes: a number is zero + scale * code. Keys have both for each channel and group of tokens, values for each token
// and group of channels; the keys of the last group wait as numbers until it is full.
template <class A, class N>
struct Grouped {
  using Asked = A;
  using Number = N;
  using Rows = EvenRows<N>;
  static constexpr bool kScales = false, kConverts = true, kMultiplies = false;

  explicit Grouped(const attnkit_cache& cache)
      : c_(cache), key_row_(round_up(cache.d, kBlockKeys)), value_row_(round_up(cache.e, kBlockKeys)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return kWalkKeys * (key_row_ + value_row_); }

  void open(Tile<Rows>& tile, N* memory, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const uint8_t* k = static_cast<const uint8_t*>(c_.k) + batch * c_.k_b + group * c_.k_g;
    const uint8_t* v = static_cast<const uint8_t*>(c_.v) + batch * c_.v_b + group * c_.v_g;
    const int64_t at_keys = batch * c_.k_scale_b + group * c_.k_scale_g + first / c_.group * c_.d;
    const int64_t parts = ceil_div(c_.e, c_.channels);
    const int64_t at_values = batch * c_.v_scale_b + group * c_.v_scale_g + first * parts;
    const A* recent = static_cast<const A*>(c_.recent) + batch * c_.recent_b + group * c_.recent_g;
    look_ahead(RowPlaces<uint8_t>{k, c_.k_n, nullptr, 1, 0}, RowPlaces<uint8_t>{v, c_.v_n, nullptr, 1, 0}, first, n);
    const bool waits = first >= n / c_.group * c_.group;
    N* values = memory + kWalkKeys * key_row_;
    for (int64_t i = begin; i < end; ++i) {
      N* key = memory + i * key_row_;
      if (next < n) prefetch_row(k + (next + i) * c_.k_n, ceil_div(c_.d, 2));
      if (next < n) prefetch_row(v + (next + i) * c_.v_n, ceil_div(c_.e, 2));
      if (waits) {
        const A* row = recent + (first + i) % (2 * c_.group) * c_.d;
        for (int64_t j = 0; j < c_.d; j += kWidth) store(key + j, load_some(row + j, c_.d - j));
      } else {
        convert(key, k + (first + i) * c_.k_n, c_.d, c_.k_scale, c_.k_zero, at_keys, 1);
      }
      convert(values + i * value_row_, v + (first + i) * c_.v_n, c_.e, c_.v_scale, c_.v_zero, at_values + i * parts,
              c_.channels);
    }
    tile.keys = {memory, key_row_};
    tile.values = {values, value_row_};
    tile.fetch = false;
  }

 private:
  // One row. Scale and zero of channel c are number at + c / share of theirs.
  static ATTNKIT_INLINE void convert(N* to, const uint8_t* codes, int64_t count, const void* scales, const void* zeros,
                                     int64_t at, int64_t share) {
    const BFloat16* scale = static_cast<const BFloat16*>(scales) + at;
    const BFloat16* zero = static_cast<const BFloat16*>(zeros) + at;
    for (int64_t start = 0; start < count; start += 128, codes += 64) {
      const int64_t width = least<int64_t>(count - start, 128);
#if defined(ATTNKIT_BF16_DOT)
      if constexpr (sizeof(N) == 2) {
        convert_128(to + start, codes, width, scale + start / share, zero + start / share, share);
        continue;
      }
#endif
      for (int64_t j = 0; j < width; j += 32) {
        // Pair i of these 32 channels is in bytes 2 i and 2 i + 1 of a narrow rest, else in every second byte.
        const int64_t step = width > 64 ? 2 : 1;
        convert_32(to + start + j, codes + (j >= 64 ? 1 : 0), step, j / 32 % 2 * 4, least<int64_t>(width - j, 32),
                   scale + (start + j) / share, zero + (start + j) / share, share == 1);
      }
    }
  }
#if defined(ATTNKIT_BF16_DOT)
  // The same for up to 128 channels in vectors: the even channels of 32 in one, the odd ones in another.
  static ATTNKIT_INLINE void convert_128(BFloat16* to, const uint8_t* codes, int64_t width, const BFloat16* scale,
                                         const BFloat16* zero, int64_t share) {
    const __m512i x = width > 64
                          ? _mm512_loadu_si512(codes)
                          : _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i four = _mm512_set1_epi32(15), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512i half = _mm512_set1_epi32(0x8000);
    for (int j = 0; 32 * j < width; ++j) {
      const int numbers = static_cast<int>(least<int64_t>(width - 32 * j, 32));
      const __m512i s = share == 1 ? load_pairs_first(scale + 32 * j, numbers)
                                   : _mm512_set1_epi16(static_cast<int16_t>(scale[32 * j / share].bits));
      const __m512i z = share == 1 ? load_pairs_first(zero + 32 * j, numbers)
                                   : _mm512_set1_epi16(static_cast<int16_t>(zero[32 * j / share].bits));
      const __m512i even = _mm512_and_si512(_mm512_srli_epi32(x, 4 * j), four);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16 + 4 * j), four);
      const Vec a = fma(_mm512_cvtepi32_ps(even), _mm512_castsi512_ps(_mm512_slli_epi32(s, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(z, 16)));
      const Vec b = fma(_mm512_cvtepi32_ps(odd), _mm512_castsi512_ps(_mm512_and_si512(s, upper)),
                        _mm512_castsi512_ps(_mm512_and_si512(z, upper)));
      const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
      const __m512i high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(b), half), upper);
      _mm512_storeu_si512(to + 32 * j, _mm512_or_si512(low, high));
    }
  }
#endif
  // 32 channels, whose codes are in the lower or upper half of every `step`-th byte.
  static ATTNKIT_INLINE void convert_32(N* to, const uint8_t* codes, int64_t step, int shift, int64_t count,
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
