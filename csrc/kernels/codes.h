// Attention of 16-bit queries over byte codes, multiplied where they lie in the cache: nothing is converted ahead of time.
//
// A code is multiplied twice, once in each of two planes (ByteForm and FloatForm say what those are); one instruction adds
// 64 products of whole bytes, or 32 of the numbers that every second byte is. The weights of a tile, each already
// multiplied by its token's scale, are taken against their largest. Keys are regrouped so that four tokens lie side by
// side with four channels each, values so that four tokens of one channel do; sums of a tile join the row's float32 sums
// once.
//
// Blocking: 32 keys. Four rows by sixteen keys of products; four rows by 64 channels of values. A Zen 4 core makes one
// such instruction a cycle, 4 rows of 128 channels need 32 for a key and its value: at 3.7 GHz a cache of bytes could be
// read at 30 GB/s.

#if defined(ATTNKIT_BYTE_DOT)
// The largest whole number of a query, such that no sum over up to 576 channels leaves 32 bits.
ATTNKIT_INLINE float largest_query(int64_t d) {
  return d <= 512 ? 32512.0f : 32512.0f * 512.0f / static_cast<float>(d);
}
// Largest magnitudes, NaN where there is one: the bits of magnitudes are in the order of the numbers, NaN last.
ATTNKIT_INLINE Ints larger_bits(Ints bits, Vec x) {
  return _mm512_max_epu32(bits, _mm512_castps_si512(abs(x)));
}
// What numbers up to `largest` are multiplied by to become whole ones up to `most_whole`, and what 1 then stands for.
// Numbers that are all below 2^-110 count as 0; where one is infinite or NaN, 1 stands for NaN.
struct WholeScale {
  Vec up, down;
  ATTNKIT_INLINE WholeScale(Ints largest_bits, float most_whole) {
    const Vec largest = _mm512_castsi512_ps(largest_bits), whole = splat(most_whole);
    const __mmask16 ends = _mm512_cmp_ps_mask(largest, splat(kInfinity), _CMP_LT_OQ);
    const __mmask16 counts = ends & _mm512_cmp_ps_mask(largest, splat(0x1p-110f), _CMP_GT_OQ);
    up = _mm512_maskz_div_ps(counts, whole, largest);
    down = select(ends, largest * splat(1.0f / most_whole), __builtin_nanf(""));
  }
};
// Sum of the four 128-bit parts of each r, one after the other.
template <class F>
ATTNKIT_INLINE Ints join_parts(Ints a, Ints b, Ints c, Ints d, F add) {
  const Ints ab = add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  const Ints cd = add(_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd));
  return add(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}
ATTNKIT_INLINE Ints largest_everywhere(Ints x) {
  return _mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(x)));
}

// Scale factors of four rows, each in a 128-bit part of its own, for one of them everywhere.
template <int kRow>
ATTNKIT_INLINE Vec part_everywhere(Vec x) {
  return _mm512_shuffle_f32x4(x, x, 0x55 * kRow);
}
ATTNKIT_INLINE void store_plane(void* to, Ints low_bytes) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(low_bytes));
}
// Each four bytes four times in a row.
ATTNKIT_INLINE void repeat_fours(void* to, Bytes x) {
  char* at = static_cast<char*>(to);
  _mm512_storeu_si512(at, _mm512_shuffle_epi32(x, _MM_PERM_AAAA));
  _mm512_storeu_si512(at + 64, _mm512_shuffle_epi32(x, _MM_PERM_BBBB));
  _mm512_storeu_si512(at + 128, _mm512_shuffle_epi32(x, _MM_PERM_CCCC));
  _mm512_storeu_si512(at + 192, _mm512_shuffle_epi32(x, _MM_PERM_DDDD));
}

// Rows of four tokens become vectors in whose 128-bit parts the same 32 bits of each lie side by side: number 4 p + v of
// them in part p of vector v.
ATTNKIT_INLINE void turn_fours(Bytes (&x)[4]) {
  const Bytes a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const Bytes c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}
// An address to count bytes from.
uint8_t* const kNowhere = reinterpret_cast<uint8_t*>(64);

// Where the keys of a tile were brought into order ahead of time.
struct ReadyTile {
  int64_t batch, group, first;
  bool is(int64_t b, int64_t g, int64_t f) const { return batch == b && group == g && first == f; }
};

// Signed bytes. A query row becomes 16-bit whole numbers, its largest magnitude about 2^15, in two planes of signed bytes:
// q ~ factor * (256 high + low). So a row is off by at most 2^-16 of its largest number, less than what rounding weights
// to bfloat16 would cost. A sum over the high plane, moved up by 8 bits, goes on over the low one, exactly, in 32 bits.
// Weights are split the same way into planes of unsigned bytes; keys count from 1 to 255 and values from -127 to 127.
struct ByteForm {
  static constexpr int kKeyTop = 0x80;  // what is flipped in the bytes of keys
  using Scale = WholeScale;
  static ATTNKIT_INLINE Scale weight_scale(Ints largest_bits) { return {largest_bits, 65535.0f}; }

  // Two planes of one query row, `bytes` channels each, and what 1 in the low one stands for; returns the products' share
  // that comes from codes being moved up.
  template <class A>
  static int32_t take_query(const A* q, int64_t d, int64_t bytes, int8_t* to, float* stands_for) {
    Ints bits = zero_ints();
    for (int64_t j = 0; j < d; j += kWidth) bits = larger_bits(bits, load_some(q + j, d - j));
    const WholeScale scale(largest_everywhere(bits), largest_query(d));
    const Ints half = _mm512_set1_epi32(128);
    Ints sum = zero_ints();
    for (int64_t j = 0; j < bytes; j += 64) {
      alignas(64) int8_t high[64], low[64];
      for (int64_t i = 0; i < 64; i += kWidth) {
        const Ints whole = whole_numbers(j + i < d ? load_some(q + j + i, d - j - i) : zero(), scale.up);
        sum = _mm512_add_epi32(sum, whole);
        store_plane(high + i, _mm512_srai_epi32(_mm512_add_epi32(whole, half), 8));
        store_plane(low + i, whole);
      }
      repeat_fours(to + 4 * j, load_bytes(high));
      repeat_fours(to + 4 * (bytes + j), load_bytes(low));
    }
    *stands_for = _mm512_cvtss_f32(scale.down);
    return _mm512_reduce_add_epi32(sum) * -128;
  }
  // Weights of 32 tokens in two planes of 32 bytes.
  static ATTNKIT_INLINE void store_weights(uint8_t* to, Vec first, Vec second, Vec up) {
    const Ints a = whole_numbers(first, up), b = whole_numbers(second, up);
    store_plane(to, _mm512_srli_epi32(a, 8));
    store_plane(to + kWidth, _mm512_srli_epi32(b, 8));
    store_plane(to + kWalkKeys, a);
    store_plane(to + kWalkKeys + kWidth, b);
  }
  static ATTNKIT_INLINE Ints whole_numbers(Vec x, Vec up) {
    return _mm512_maskz_cvtps_epi32(bits_unequal(up, 0.0f), x * up);
  }

  template <int kPlane>
  static ATTNKIT_INLINE Bytes factors(Bytes codes) {
    return codes;
  }
  static ATTNKIT_INLINE Ints dot_keys(Ints sum, Bytes keys, Bytes queries) { return dot_bytes(sum, keys, queries); }
  static ATTNKIT_INLINE Ints dot_values(Ints sum, Bytes values, Bytes weights) { return dot_bytes(sum, weights, values); }
  static ATTNKIT_INLINE Ints after_high(Ints sum) { return _mm512_slli_epi32(sum, 8); }
  static ATTNKIT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static ATTNKIT_INLINE Vec number(Ints sum, int32_t more = 0) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(more)));
  }
};

#if defined(ATTNKIT_BF16_DOT)
// What numbers are multiplied by, as a power of two, so that the largest has exponent 120, and what 2^120 times the numbers
// that e4m3 codes are taken for then stands for. Zeros and broken numbers as in WholeScale.
struct PowerScale {
  Vec up, down;
  explicit ATTNKIT_INLINE PowerScale(Ints largest_bits) {
    const Vec largest = _mm512_castsi512_ps(largest_bits), power = _mm512_getexp_ps(largest);
    const __mmask16 ends = _mm512_cmp_ps_mask(largest, splat(kInfinity), _CMP_LT_OQ);
    const __mmask16 counts = ends & _mm512_cmp_ps_mask(largest, splat(0x1p-110f), _CMP_GT_OQ);
    up = select(counts, splat(120.0f) - power, -kInfinity);
    down = select(ends, _mm512_maskz_scalef_ps(counts, splat(1.0f), power), __builtin_nanf(""));
  }
};

// e4m3 bytes. The bits of a code, moved to where bfloat16 has its exponent, are 2^-120 of its number: bytes 1 and 3 of each
// four need a shift and a mask, bytes 0 and 2 a shift more, and there is no table. Those are the two planes. Queries and
// weights are bfloat16 numbers near 2^120, queries exactly, weights rounded as prefill rounds them.
struct FloatForm {
  static constexpr int kKeyTop = 0;
  using Scale = PowerScale;
  static ATTNKIT_INLINE Scale weight_scale(Ints largest_bits) { return Scale(largest_bits); }

  static int32_t take_query(const BFloat16* q, int64_t d, int64_t bytes, int8_t* to, float* stands_for) {
    Ints bits = zero_ints();
    for (int64_t j = 0; j < d; j += kWidth) bits = larger_bits(bits, load_some(q + j, d - j));
    const PowerScale scale(largest_everywhere(bits));
    const Ints even = _mm512_setr_epi32(0x20000, 0x60004, 0xa0008, 0xe000c, 0x120010, 0x160014, 0x1a0018, 0x1e001c, 0x220020,
                                        0x260024, 0x2a0028, 0x2e002c, 0x320030, 0x360034, 0x3a0038, 0x3e003c);
    const Ints odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int64_t j = 0; j < bytes; j += 64) {
      Ints words[2];
      for (int64_t i = 0; i < 2; ++i) {
        Vec x[2];
        for (int64_t c = 0; c < 2; ++c) {
          const int64_t at = j + (2 * i + c) * kWidth;
          x[c] = _mm512_scalef_ps(at < d ? load_some(q + at, d - at) : zero(), scale.up);
        }
        words[i] = narrow_pair(x[0], x[1]);
      }
      repeat_fours(to + 4 * j, _mm512_permutex2var_epi16(words[0], odd, words[1]));
      repeat_fours(to + 4 * (bytes + j), _mm512_permutex2var_epi16(words[0], even, words[1]));
    }
    *stands_for = _mm512_cvtss_f32(scale.down);
    return 0;
  }
  static ATTNKIT_INLINE void store_weights(uint8_t* to, Vec first, Vec second, Vec up) {
    const Ints words = narrow_pair(_mm512_scalef_ps(first, up), _mm512_scalef_ps(second, up));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kWalkKeys), _mm512_cvtepi32_epi16(words));
  }

  template <int kPlane>
  static ATTNKIT_INLINE Bytes factors(Bytes codes) {
    if constexpr (kPlane == 1) codes = _mm512_slli_epi16(codes, 8);
    return _mm512_and_si512(_mm512_srai_epi16(codes, 4), _mm512_set1_epi16(static_cast<int16_t>(0x87f0)));
  }
  static ATTNKIT_INLINE Ints dot_keys(Ints sum, Bytes keys, Bytes queries) { return dot(sum, keys, queries); }
  static ATTNKIT_INLINE Ints dot_values(Ints sum, Bytes values, Bytes weights) { return dot(sum, values, weights); }
  static ATTNKIT_INLINE Ints after_high(Ints sum) { return sum; }
  static ATTNKIT_INLINE Ints add(Ints a, Ints b) {
    return _mm512_castps_si512(_mm512_castsi512_ps(a) + _mm512_castsi512_ps(b));
  }
  static ATTNKIT_INLINE Vec number(Ints sum, int32_t = 0) { return _mm512_castsi512_ps(sum); }

 private:
  static ATTNKIT_INLINE Ints dot(Ints sum, Bytes a, Bytes b) {
    return _mm512_castps_si512(dot_pairs(_mm512_castsi512_ps(sum), a, b));
  }
};
#endif

// Byte codes with a scale for each token.
template <class Form, class A>
struct ByteCodes {
  using Asked = A;
  using Number = uint8_t;
  using R = EvenRows<uint8_t>;
  using Rows = R;
  static constexpr bool kScales = true, kConverts = false, kMultiplies = true;

  struct Memory {
    ReadyTile* ready;
    int8_t* queries;       // rows of two planes, each four times
    uint8_t* keys;         // of a tile, regrouped
    uint8_t* values;
    uint8_t* weights;      // rows of two planes of a tile's keys
    float* query_scales;   // what 1 in the low plane stands for
    int32_t* query_sums;   // the products' share that comes from codes being moved up by 128
    float* weight_scales;  // each four times
    int64_t bytes;
    Memory(const ByteCodes& s, uint8_t* memory) {
      memory += -reinterpret_cast<uintptr_t>(memory) & 63;
      ready = reinterpret_cast<ReadyTile*>(memory);
      queries = reinterpret_cast<int8_t*>(memory + 64);
      keys = memory + 64 + 8 * s.rows_ * s.key_bytes_;
      values = keys + kWalkKeys * s.key_bytes_;
      weights = values + kWalkKeys * s.value_bytes_;
      query_scales = reinterpret_cast<float*>(weights + 2 * s.rows_ * kWalkKeys);
      query_sums = reinterpret_cast<int32_t*>(query_scales + s.rows_);
      weight_scales = reinterpret_cast<float*>(query_sums + s.rows_);
      bytes = reinterpret_cast<uint8_t*>(weight_scales + 4 * s.rows_ + kWidth) - memory;
    }
  };

  explicit ByteCodes(const attnkit_cache& cache)
      : c_(cache),
        rows_((cache.mask_heads == 1 ? cache.h / cache.g : 1) * cache.m),
        key_bytes_(round_up(cache.d, 64)),
        value_bytes_(round_up(cache.e, 64)) {}
  int64_t length(int64_t batch) const { return c_.lengths ? c_.lengths[batch] : c_.n; }
  int64_t tile_numbers() const { return 64 + Memory(*this, kNowhere).bytes; }

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
    const float* k_scale = row_places<float>(c_, c_.k_scale, c_.k_scale_b, c_.k_scale_g, 1, batch, group).at(first);
    const float* v_scale = row_places<float>(c_, c_.v_scale, c_.v_scale_b, c_.v_scale_g, 1, batch, group).at(first);
    look_ahead(keys, values, first, n);
    const uint64_t inside = bit_range(begin, end);
    for (int64_t i = 0; i < kWalkKeys; i += kWidth) {
      const __mmask16 some = static_cast<__mmask16>(inside >> i);
      store(tile.key_scale + i, _mm512_maskz_loadu_ps(some, k_scale + i));
      store(tile.value_scale + i, _mm512_maskz_loadu_ps(some, v_scale + i));
    }
    if (!w.ready->is(batch, group, first))
      for (int64_t unit = 0; unit < units(key_bytes_); ++unit)
        regroup(w.keys, tile.keys, c_.d, begin, end, false, unit, turn_keys);
    *w.ready = {batch, group, tile.fetch && next + kWalkKeys <= n ? next : -1};
  }

  // Before the first call of a thread: what its memory held before counts for nothing.
  void start(const Memory& w) const { *w.ready = {-1, -1, -1}; }

  // One query row, in the order of regrouped keys: each four channels four times in a row.
  void take_query(const Memory& w, const A* q, int64_t r) const {
    w.query_sums[r] = Form::take_query(q, c_.d, key_bytes_, w.queries + 8 * r * key_bytes_, w.query_scales + r);
  }

  // As Decode::score.
  template <int kCount>
  void score(const Memory& w, const Tile<R>& tile, float* scores, int64_t begin, int64_t end, int64_t r) const {
    const int8_t* queries = w.queries + 8 * r * key_bytes_;
    int64_t unit = r == 0 ? 0 : units(value_bytes_), key = r == 0 && tile.fetch ? 0 : kWalkKeys;
    const bool whole = begin == 0 && end == kWalkKeys && c_.e % 64 == 0;
    const int64_t last_unit = units(value_bytes_), steps = key_bytes_ / 16;
    for (int64_t c = begin / kWidth * kWidth; c < end; c += kWidth) {
      const uint8_t* keys = w.keys + c / 4 * 64;
      Ints acc[kCount][4];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = zero_ints();
      in_planes(acc, [&](auto plane) {
        for (int64_t j = 0; j < steps; ++j) {
          if (key < kWalkKeys) prefetch_row(tile.next[key++], c_.d);
          if (j % 2 == 1 && unit < last_unit) regroup(w.values, tile.values, c_.e, begin, end, whole, unit++, turn_values);
          add_products<plane.number>(acc, keys + j * kFours * 64, queries + (plane.number * 4 * key_bytes_ + j * 64),
                                     8 * key_bytes_);
        }
      });
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const Ints sums = join_parts(acc[i][0], acc[i][1], acc[i][2], acc[i][3], Form::add);
        store(scores + i * kScoreRow + c, Form::number(sums, w.query_sums[r + i]) * splat(w.query_scales[r + i]));
      }
    }
    while (key < kWalkKeys) prefetch_row(tile.next[key++], c_.d);
    while (unit < last_unit) regroup(w.values, tile.values, c_.e, begin, end, whole, unit++, turn_values);
  }

  // Weights, by their tokens' scales, of kCount rows; those that do not count may be anything.
  template <int kCount, int kVectors>
  ATTNKIT_INLINE void take_weights(const Memory& w, const Vec (&weights)[kCount][kVectors],
                                   const Bits (&counts)[kCount][kVectors], int64_t r) const {
    static_assert(kVectors == 2, "a tile's weights are two vectors");
    Vec x[kCount][kVectors];
    Ints bits[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) x[i][j] = select(counts[i][j], weights[i][j], 0.0f);
      bits[i] = larger_bits(larger_bits(zero_ints(), x[i][0]), x[i][1]);
    }
    // The largest of row i everywhere in part i.
    Ints largest = join_parts(bits[0], bits[kCount > 1 ? 1 : 0], bits[kCount > 2 ? 2 : 0], bits[kCount > 3 ? 3 : 0],
                              [](Ints a, Ints b) { return _mm512_max_epu32(a, b); });
    largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, _MM_PERM_BADC));
    largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, _MM_PERM_CDAB));
    const typename Form::Scale scale = Form::weight_scale(largest);
    const Vec ups[4] = {part_everywhere<0>(scale.up), part_everywhere<1>(scale.up), part_everywhere<2>(scale.up),
                        part_everywhere<3>(scale.up)};
    store(w.weight_scales + 4 * r, scale.down);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) Form::store_weights(w.weights + 2 * (r + i) * kWalkKeys, x[i][0], x[i][1], ups[i]);
  }

  template <int kCount>
  void add_values(const Memory& w, const Tile<R>& tile, float* sums, int64_t stride, int64_t begin, int64_t end,
                  int64_t r) const {
    const uint8_t* weights = w.weights + 2 * r * kWalkKeys;
    const int64_t four = begin / 4, fours = ceil_div(end, 4);
    const bool fetch = r == 0 && tile.fetch;
    int64_t unit = r == 0 && w.ready->first >= 0 ? 0 : units(key_bytes_);
    const int64_t last_unit = units(key_bytes_);
    const bool whole = c_.d % 64 == 0;
    for (int64_t column = 0; column < c_.e; column += 64) {
      const uint8_t* values = w.values + column * kWalkKeys;
      const int64_t part = least<int64_t>(64, c_.e - column);
      Ints acc[kCount][4];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = zero_ints();
      in_planes(acc, [&](auto plane) {
        for (int64_t f = four; f < fours; ++f) {
          if (fetch)
            for (int64_t c = 0; c < 2; ++c) prefetch_row(tile.next_values[4 * f + 2 * plane.number + c] + column, part);
          if (f % 2 == 1 && unit < last_unit) regroup(w.keys, tile.next, c_.d, 0, kWalkKeys, whole, unit++, turn_keys);
          add_weighted<plane.number>(acc, values + f * 64, weights + plane.number * kWalkKeys + 4 * f);
        }
      });
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i)
        add_sums(sums + i * stride + column, acc[i], splat(w.weight_scales[4 * r + 4 * i]), c_.e - column);
    }
    while (unit < last_unit) regroup(w.keys, tile.next, c_.d, 0, kWalkKeys, whole, unit++, turn_keys);
  }

 private:
  static constexpr int64_t kFours = kWalkKeys / 4;

  // A tile is regrouped in units: 64 channels of four tokens become four vectors, in whose 128-bit part p are channels from
  // 16 p on. Vector v of tokens 4 f to 4 f + 3 and channels from 64 j on is number (4 j + v) * kFours + f, its unit number
  // f * channels / 64 + j. A token outside [begin, end) is not read.
  static int64_t units(int64_t row_bytes) { return row_bytes / 64 * kFours; }
  template <class F>
  static ATTNKIT_INLINE void regroup(uint8_t* to, const R& rows, int64_t numbers, int64_t begin, int64_t end,
                                     bool whole, int64_t unit, F turn) {
    const int64_t f = static_cast<uint64_t>(unit) % kFours, block = static_cast<uint64_t>(unit) / kFours, c = 4 * f;
    Bytes x[4];
    if (whole) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = load_bytes(rows[c + i] + 64 * block);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        x[i] = c + i >= begin && c + i < end ? load_bytes_first(rows[c + i] + 64 * block, numbers - 64 * block)
                                             : zero_ints();
    }
    turn(x);
    to += (4 * block * kFours + f) * 64;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * kFours * 64, x[i]);
  }
  static ATTNKIT_INLINE void turn_keys(Bytes (&x)[4]) {
    turn_fours(x);
    const Bytes top = _mm512_set1_epi8(static_cast<char>(Form::kKeyTop));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = _mm512_xor_si512(x[i], top);
  }
  // Values: one channel of four tokens in 32 bits.
  static ATTNKIT_INLINE void turn_values(Bytes (&x)[4]) {
    const Bytes a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const Bytes c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
    x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
  }
  // Calls f for both planes.
  template <int kPlane>
  struct Plane {
    static constexpr int number = kPlane;
  };
  template <int kCount, class F>
  static ATTNKIT_INLINE void in_planes(Ints (&acc)[kCount][4], F f) {
    f(Plane<0>());
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = Form::after_high(acc[i][j]);
    f(Plane<1>());
  }
  // 16 keys by one vector of each row.
  template <int kPlane, int kCount>
  static ATTNKIT_INLINE void add_products(Ints (&acc)[kCount][4], const uint8_t* keys, const int8_t* queries,
                                          int64_t stride) {
    Bytes q[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) q[i] = load_bytes(queries + i * stride);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Bytes x = Form::template factors<kPlane>(load_bytes(keys + 64 * j));
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) acc[i][j] = Form::dot_keys(acc[i][j], x, q[i]);
    }
  }
  // Four values of 64 channels by one weight each.
  template <int kPlane, int kCount>
  static ATTNKIT_INLINE void add_weighted(Ints (&acc)[kCount][4], const uint8_t* values, const uint8_t* weights) {
    Bytes w[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      int32_t four;
      __builtin_memcpy(&four, weights + 2 * i * kWalkKeys, sizeof four);
      w[i] = _mm512_set1_epi32(four);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Bytes x = Form::template factors<kPlane>(load_bytes(values + 64 * kFours * j));
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) acc[i][j] = Form::dot_values(acc[i][j], x, w[i]);
    }
  }
  // Channels back into their order, and onto the sums of one row.
  static ATTNKIT_INLINE void add_sums(float* sums, const Ints (&acc)[4], Vec scale, int64_t count) {
    const Ints a = _mm512_shuffle_i32x4(acc[0], acc[1], 0x44), b = _mm512_shuffle_i32x4(acc[2], acc[3], 0x44);
    const Ints c = _mm512_shuffle_i32x4(acc[0], acc[1], 0xee), d = _mm512_shuffle_i32x4(acc[2], acc[3], 0xee);
    const Ints in_order[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
                              _mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      if (j * kWidth < count)
        store(sums + j * kWidth, fma(Form::number(in_order[j]), scale, load(sums + j * kWidth)));
  }

  const attnkit_cache& c_;
  const int64_t rows_, key_bytes_, value_bytes_;
};
#endif
