// Attention of bfloat16 queries over half bytes (int4), multiplied as bfloat16 numbers that are made in registers.
//
// A number is zero + scale * code. The bits of a code, put below those of 128, are the bfloat16 number 128 + code: a shift
// and one operation for 32 of them. Scales of keys belong to a channel and a group of tokens, so queries are multiplied by
// them, once a tile, and rounded; with q' for q * scale rounded,
//
//   sum of q * (zero + scale * code) ~ sum of q' * (128 + code) - 136 * sum of q' + sum of q * (zero + 8 * scale),
//
// which rounds nothing but the distance of each number from the middle of its group's range. Scales of values belong to
// a token and a group of channels, so weights are multiplied by them, in the same way.
//
// Blocking: 32 keys, a group of them at most. Keys of a tile are transposed, a vector is 16 tokens by four pairs of channels
// in 32 bits, and there is no sum across lanes: four rows by 32 keys of products, each pair of channels of a query
// broadcast. Values are taken two tokens and 64 channels of them at a time, four rows. Transposing while the values before
// them are added, in units as codes.h does, was no faster on a Zen 4 core.
#if defined(ATTNKIT_BF16_DOT)
struct Nibbles {
  using Asked = BFloat16;
  using Number = uint8_t;
  using R = EvenRows<uint8_t>;
  using Rows = R;
  static constexpr int64_t kChannels = 32;  // of a group of values
  static constexpr bool kScales = false, kConverts = false, kMultiplies = true;

  // What of the tile in work is not in its rows.
  struct Place {
    const BFloat16 *key_scale, *key_zero;
    const BFloat16* recent;  // keys of the tile as numbers, where they wait
  };
  struct Memory {
    Place* place;
    uint32_t* keys;     // of a tile: blocks of 128 channels of 16 times 32 tokens
    float* queries;     // rows of key_channels_
    uint32_t* folded;   // of four rows: pairs of queries times scales
    uint32_t* weights;  // rows of parts_ vectors: pairs of weights times scales
    float* shares;      // of each row and part: what all its channels get
    float* scales;      // parts_ of 32 scales and 32 middles, zero + 8 * scale
    int64_t bytes;
    Memory(const Nibbles& s, uint8_t* memory) {
      memory += -reinterpret_cast<uintptr_t>(memory) & 63;
      place = reinterpret_cast<Place*>(memory);
      keys = reinterpret_cast<uint32_t*>(memory + 64);
      queries = reinterpret_cast<float*>(keys + ceil_div(s.c_.d, 128) * kBlockWords);
      folded = reinterpret_cast<uint32_t*>(queries + s.rows_ * s.key_channels_);
      weights = folded + 4 * round_up(s.key_channels_ / 2, kWidth);
      shares = reinterpret_cast<float*>(weights + s.rows_ * s.parts_ * kWidth);
      scales = shares + s.rows_ * round_up(s.parts_, kWidth);
      bytes = reinterpret_cast<uint8_t*>(scales + s.parts_ * 2 * kWalkKeys) - memory;
    }
  };

  explicit Nibbles(const attnkit_cache& cache)
      : c_(cache),
        rows_((cache.mask_heads == 1 ? cache.h / cache.g : 1) * cache.m),
        key_channels_(round_up(cache.d, 32)),
        parts_(ceil_div(cache.e, kChannels)),
        key_bytes_(packed_bytes(cache.d)),
        value_bytes_(packed_bytes(cache.e)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return 64 + Memory(*this, kNowhere).bytes; }
  void start(const Memory&) const {}

  void open(Tile<R>& tile, const Memory& w, int64_t batch, int64_t group, int64_t first, int64_t begin, int64_t end,
            int64_t next, int64_t n) const {
    const RowPlaces<uint8_t> keys = row_places<uint8_t>(c_, c_.k, c_.k_b, c_.k_g, c_.k_n, batch, group);
    const RowPlaces<uint8_t> values = row_places<uint8_t>(c_, c_.v, c_.v_b, c_.v_g, c_.v_n, batch, group);
    keys.find(tile.keys, first, begin, end);
    values.find(tile.values, first, begin, end);
    tile.fetch = next < n;
    if (tile.fetch) {
      keys.find(tile.next, next, 0, least(kWalkKeys, n - next));
      values.find(tile.next_values, next, 0, least(kWalkKeys, n - next));
    }
    look_ahead(keys, values, first, n);
    const GroupPlaces scales(c_, batch, group, first, parts_);
    w.place->key_scale = scales.key_scale, w.place->key_zero = scales.key_zero;
    w.place->recent = first < n / c_.group * c_.group
                          ? nullptr
                          : static_cast<const BFloat16*>(c_.recent) + batch * c_.recent_b + group * c_.recent_g +
                                first % (2 * c_.group) * c_.d;
    if (!w.place->recent) turn_keys(w.keys, tile.keys, begin, end);
    by_part(w, scales.value_scale, scales.value_zero, begin, end);
  }

  void take_query(const Memory& w, const BFloat16* q, int64_t r) const {
    for (int64_t j = 0; j < key_channels_; j += kWidth)
      store(w.queries + r * key_channels_ + j, j < c_.d ? load_some(q + j, c_.d - j) : zero());
  }

  // As Decode::score.
  template <int kCount>
  void score(const Memory& w, const Tile<R>& tile, float* scores, int64_t begin, int64_t end, int64_t r) const {
    if (w.place->recent) {
      for (int i = 0; i < kCount; ++i)
        for (int64_t c = begin; c < end; ++c) scores[i * kScoreRow + c] = product(w, w.place->recent + c * c_.d, r + i);
      return;
    }
    float base[kCount];
    fold<kCount>(w, base, r);
    Vec acc[kCount][2][2];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) acc[i][j][0] = splat(base[i]), acc[i][j][1] = zero();
    const int64_t row = key_channels_ / 2;  // pairs
    for (int64_t block = 0; 128 * block < c_.d; ++block) {
      const uint32_t* keys = w.keys + block * kBlockWords;
      const uint32_t* queries = w.folded + 64 * block;
      const bool fetch = r == 0 && block == 0 && tile.fetch;
      const int64_t quarters = least<int64_t>((key_channels_ - 128 * block) / 32, 4);
      const auto products = [&](auto all) {
        for (int64_t i = 0; i < 16; ++i) {
          if (fetch) for (int64_t c = 0; c < 2; ++c) prefetch_row(tile.next[2 * i + c], key_bytes_);
          const Pairs a = load_pairs(keys + i * 32), b = load_pairs(keys + i * 32 + 16);
          add_products<0>(acc, a, b, queries + i, row);
          if (all.yes || quarters > 1) add_products<1>(acc, a, b, queries + i, row);
          if (all.yes || quarters > 2) add_products<2>(acc, a, b, queries + i, row);
          if (all.yes || quarters > 3) add_products<3>(acc, a, b, queries + i, row);
        }
      };
      if (quarters == 4) products(Answer<true>());
      else products(Answer<false>());
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) store(scores + i * kScoreRow + j * kWidth, acc[i][j][0] + acc[i][j][1]);
  }

  // Weights of kCount rows by the scales of each group of channels; those that do not count may be anything.
  template <int kCount, int kVectors>
  ATTNKIT_INLINE void take_weights(const Memory& w, const Vec (&x)[kCount][kVectors], const Bits (&bits)[kCount][kVectors],
                                   int64_t r) const {
    static_assert(kVectors == 2, "a tile's weights are two vectors");
    constexpr int kParts = kWidth / kCount;  // as many as fit a vector of sums
    __mmask16 counts[kCount][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) counts[i][j] = static_cast<__mmask16>(bits[i][j]);
    for (int64_t part = 0; part < parts_; part += kParts) {
      Vec sums[kWidth];
      sums[kWidth - 1] = zero();
#pragma GCC unroll 16
      for (int p = 0; p < kParts; ++p) {
        const float* scale = w.scales + least(part + p, parts_ - 1) * 2 * kWalkKeys;
        const Vec s[2] = {load(scale), load(scale + kWidth)};
        const Vec z[2] = {load(scale + kWalkKeys), load(scale + kWalkKeys + kWidth)};
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          const Pairs folded = narrow_pair(_mm512_maskz_mul_ps(counts[i][0], x[i][0], s[0]),
                                           _mm512_maskz_mul_ps(counts[i][1], x[i][1], s[1]));
          if (part + p < parts_) _mm512_storeu_si512(w.weights + ((r + i) * parts_ + part + p) * kWidth, folded);
          const Vec middle = _mm512_maskz_mul_ps(counts[i][0], x[i][0], z[0]) +
                             _mm512_maskz_mul_ps(counts[i][1], x[i][1], z[1]);
          sums[p * kCount + i] = dot_pairs(middle, folded, splat_pair(kMinus136));
        }
      }
      store(w.shares + (r * round_up(parts_, kWidth) + part * kCount), sum_each(sums));
    }
  }

  template <int kCount>
  void add_values(const Memory& w, const Tile<R>& tile, float* sums, int64_t stride, int64_t begin, int64_t end,
                  int64_t r) const {
    const bool whole = begin == 0 && end == kWalkKeys;
    for (int64_t part = 0; part < parts_; part += 2) {
      const bool fetch = r == 0 && part == 0 && tile.fetch;
      const float* shares = w.shares + (r * round_up(parts_, kWidth) + part * kCount);
      if (part / 2 % 2 == 0) add_half<kCount, 0>(w, tile, sums, stride, begin, end, r, part, whole, fetch, shares);
      else add_half<kCount, 2>(w, tile, sums, stride, begin, end, r, part, whole, false, shares);
    }
  }

 private:
  static constexpr uint32_t kMinus136 = 0xc308c308;
  static constexpr int64_t kBlockWords = 16 * kWalkKeys;  // of the keys of a tile and 128 channels

  template <bool kYes>
  struct Answer {
    static constexpr bool yes = kYes;
  };
  // Bytes of so many channels of one token.
  static int64_t packed_bytes(int64_t channels) {
    const int64_t rest = channels % 128;
    return channels / 128 * 64 + (rest == 0 ? 0 : rest <= 64 ? 32 : 64);
  }
  // Up to 128 channels of one token: 32 words of four half bytes, half byte j of word i is channel 32 j + i.
  static ATTNKIT_INLINE Bytes load_block(const uint8_t* codes, int64_t channels) {
    return channels > 64 ? load_bytes(codes) : _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  }
  // 128 + code of half byte kQuarter of each word.
  template <int kQuarter>
  static ATTNKIT_INLINE Pairs numbers(Bytes x) {
    if constexpr (kQuarter > 0) x = _mm512_srli_epi16(x, 4 * kQuarter);
    return _mm512_ternarylogic_epi32(x, _mm512_set1_epi16(15), _mm512_set1_epi16(0x4300), 0xea);  // x & 15 | 128
  }

  void turn_keys(uint32_t* to, const R& rows, int64_t begin, int64_t end) const {
    for (int64_t block = 0; 128 * block < c_.d; ++block, to += kBlockWords) {
      for (int64_t half = 0; half < kWalkKeys; half += kWidth) {
        Vec x[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          x[i] = half + i >= begin && half + i < end
                     ? _mm512_castsi512_ps(load_block(rows[half + i] + 64 * block, c_.d - 128 * block))
                     : zero();
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) _mm512_storeu_si512(to + i * kWalkKeys + half, _mm512_castps_si512(x[i]));
      }
    }
  }
  // Scales and middles of values: from rows of tokens to rows of groups of channels, 0 outside [begin, end).
  void by_part(const Memory& w, const BFloat16* scale, const BFloat16* zeros, int64_t begin, int64_t end) const {
    if (parts_ > 4) {
      for (int64_t p = 0; p < parts_; ++p)
        for (int64_t i = 0; i < kWalkKeys; ++i) {
          const bool inside = i >= begin && i < end;
          const float s = inside ? widened(scale[i * parts_ + p]) : 0.0f, z = inside ? widened(zeros[i * parts_ + p]) : 0.0f;
          w.scales[p * 2 * kWalkKeys + i] = s;
          w.scales[p * 2 * kWalkKeys + kWalkKeys + i] = z + 8.0f * s;
        }
      return;
    }
    for (int64_t i = 0; i < kWalkKeys; i += kWidth) {
      // Words of 16 tokens, at most two vectors.
      const int64_t from = clamp<int64_t>(begin - i, 0, kWidth) * parts_, to = clamp<int64_t>(end - i, 0, kWidth) * parts_;
      const uint64_t words = bit_range(from, to);
      const __mmask32 low = static_cast<__mmask32>(words), high = static_cast<__mmask32>(words >> 32);
      const Bytes s0 = _mm512_maskz_loadu_epi16(low, scale + i * parts_);
      const Bytes s1 = _mm512_maskz_loadu_epi16(high, scale + i * parts_ + 32);
      const Bytes z0 = _mm512_maskz_loadu_epi16(low, zeros + i * parts_);
      const Bytes z1 = _mm512_maskz_loadu_epi16(high, zeros + i * parts_ + 32);
      const Ints token = _mm512_cvtps_epi32(iota() * splat(static_cast<float>(parts_)));
      for (int64_t p = 0; p < parts_; ++p) {
        const Ints at = _mm512_slli_epi32(_mm512_add_epi32(token, _mm512_set1_epi32(static_cast<int>(p))), 16);
        const Vec s = _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(0xaaaaaaaa, s0, at, s1));
        const Vec z = _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(0xaaaaaaaa, z0, at, z1));
        store(w.scales + p * 2 * kWalkKeys + i, s);
        store(w.scales + p * 2 * kWalkKeys + kWalkKeys + i, fma(s, splat(8.0f), z));
      }
    }
  }
  static ATTNKIT_INLINE float widened(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
  }

  // Query rows by the scales of the tile's keys, and of each the part of its products that all these keys share.
  template <int kCount>
  void fold(const Memory& w, float* base, int64_t r) const {
    Vec shared[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) shared[i] = zero();
    for (int64_t c = 0; c < key_channels_; c += 2 * kWidth) {
      Vec s[2], middle[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int64_t at = c + j * kWidth;
        s[j] = at < c_.d ? load_some(w.place->key_scale + at, c_.d - at) : zero();
        middle[j] = fma(s[j], splat(8.0f), at < c_.d ? load_some(w.place->key_zero + at, c_.d - at) : zero());
      }
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const float* q = w.queries + (r + i) * key_channels_ + c;
        const Vec a = load(q), b = load(q + kWidth);
        const Pairs folded = narrow_pair(a * s[0], b * s[1]);
        _mm512_storeu_si512(w.folded + (i * key_channels_ + c) / 2, folded);
        shared[i] = dot_pairs(fma(a, middle[0], fma(b, middle[1], shared[i])), folded, splat_pair(kMinus136));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) base[i] = sum(shared[i]);
  }
  // One query and one key that waits as numbers.
  float product(const Memory& w, const BFloat16* key, int64_t r) const {
    Vec x = zero();
    for (int64_t c = 0; c < c_.d; c += kWidth) x = fma(load(w.queries + r * key_channels_ + c), load_some(key + c, c_.d - c), x);
    return sum(x);
  }

  template <int kQuarter, int kCount>
  static ATTNKIT_INLINE void add_products(Vec (&acc)[kCount][2][2], Pairs a, Pairs b, const uint32_t* queries, int64_t row) {
    const Pairs x = numbers<kQuarter>(a), y = numbers<kQuarter>(b);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Pairs q = splat_pair(queries[i * row + 16 * kQuarter]);
      acc[i][0][kQuarter % 2] = dot_pairs(acc[i][0][kQuarter % 2], q, x);
      acc[i][1][kQuarter % 2] = dot_pairs(acc[i][1][kQuarter % 2], q, y);
    }
  }

  // The values of up to 64 channels, half bytes kQuarter and kQuarter + 1 of their words.
  template <int kCount, int kQuarter>
  void add_half(const Memory& w, const Tile<R>& tile, float* sums, int64_t stride, int64_t begin, int64_t end, int64_t r,
                int64_t part, bool whole, bool fetch, const float* shares) const {
    const int64_t block = part / 4, channels = c_.e - 128 * block;
    const bool wide = channels > 64;
    const uint32_t* weights = w.weights + (r * parts_ + part) * kWidth;
    const int64_t row = parts_ * kWidth, second = part + 1 < parts_ ? kWidth : 0;
    Vec acc[kCount][2][2];  // by row, half byte, and half of each 128 bits
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) acc[i][j][0] = acc[i][j][1] = zero();
    for (int64_t pair = begin / 2; pair < ceil_div(end, 2); ++pair) {
      if (fetch)
        for (int64_t c = 0; c < 2; ++c) prefetch_row(tile.next_values[2 * pair + c], value_bytes_);
      const uint8_t *a_row = tile.values[2 * pair] + 64 * block, *b_row = tile.values[2 * pair + 1] + 64 * block;
      Bytes a, b;
      if (whole && wide) {
        a = load_bytes(a_row), b = load_bytes(b_row);
      } else {
        a = 2 * pair >= begin ? load_block(a_row, channels) : zero_ints();
        b = 2 * pair + 1 < end ? load_block(b_row, channels) : zero_ints();
      }
      const Bytes low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
      const Pairs x[2][2] = {{numbers<kQuarter>(low), numbers<kQuarter>(high)},
                             {numbers<kQuarter + 1>(low), numbers<kQuarter + 1>(high)}};
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const Pairs weight = splat_pair(weights[i * row + j * second + pair]);
          acc[i][j][0] = dot_pairs(acc[i][j][0], weight, x[j][0]);
          acc[i][j][1] = dot_pairs(acc[i][j][1], weight, x[j][1]);
        }
    }
    const Ints front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const Ints back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        float* to = sums + i * stride + (part + j) * kChannels;
        const int64_t left = c_.e - (part + j) * kChannels;
        const Vec share = splat(shares[j * kCount + i]);
        if (left > 0) store(to, load(to) + (_mm512_permutex2var_ps(acc[i][j][0], front, acc[i][j][1]) + share));
        if (left > kWidth)
          store(to + kWidth, load(to + kWidth) + (_mm512_permutex2var_ps(acc[i][j][0], back, acc[i][j][1]) + share));
      }
  }

  const attnkit_cache& c_;
  const int64_t rows_, key_channels_, parts_, key_bytes_, value_bytes_;
};
#endif
