// Which keys cannot score above a row's limit, from products of bytes: a proof and no estimate.
//
// In units of its largest number / 127 a query is X + x, whole numbers and a rest, and 16 neighbouring keys, which share
// one unit, are K + k. By Cauchy and Schwarz the true product is off from X.K, which one instruction sums for 64 pairs of
// channels, by at most |x| |K + k| + |X| |k|. So a key is skipped for a row where X.K does not exceed a whole number,
// made from the row's limit and these lengths for every 16 keys; all others have to be scored. Lengths and limits are
// taken a little to the safe side of every rounding, that of the scores to come included. A NaN, an infinity, numbers all
// below 2^-50 and a limit that does not exist yet come out as the least whole number: nothing is skipped.
//
// Blocking: six rows by 64 keys, the products of gemm.h with four channels a step. Keys are unsigned, 128 above their
// value; a row's sum starts at what that adds. On random numbers of 128 channels a bound is 0.17 standard deviations
// above the product: of 32,768 keys 0.33 % pass where 0.19 % are above the limit.

#if defined(ATTNKIT_BYTE_DOT)
class Bounds {
  static constexpr int64_t kParts = kBlockKeys / kWidth;

 public:
  static int64_t steps(int64_t d) { return ceil_div(d, 4); }
  // Of 64 keys: bytes by step, then for each 16 keys the length, the rest's length, and what numbers were multiplied by.
  static int64_t block_bytes(int64_t d) { return 256 * steps(d) + 64; }

  template <class T>
  static void pack(const attnkit_softmax& s, const T* keys, int64_t block, uint8_t* out) {
    float* const about = reinterpret_cast<float*>(out + 256 * steps(s.d));
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t first = block * kBlockKeys + part * kWidth, count = clamp<int64_t>(s.n - first, 0, kWidth);
      const T* rows = keys + first * s.k_n;
      Ints bits = zero_ints();
      for (int64_t i = 0; i < count; ++i) bits = _mm512_max_epu32(bits, largest_bits(rows + i * s.k_n, s.d));
      const Unit unit(bits);
      Squares squares[kWidth];
      Lengths longest = {0.0f, 0.0f};
      for (int64_t c = 0; c < s.d; c += 4 * kWidth) {
        Vec four[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          alignas(64) uint8_t bytes[64];
          for (int64_t j = 0; j < 4 * kWidth; j += kWidth) {
            Ints whole = zero_ints();
            if (i < count && c + j < s.d)
              whole = squares[i].add(load_some(rows + i * s.k_n + c + j, s.d - c - j) * splat(unit.up));
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes + j),
                            _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
          }
          four[i] = _mm512_castsi512_ps(load_bytes(bytes));
        }
        transpose(four);
        for (int64_t j = 0; j < least<int64_t>(kWidth, steps(s.d) - c / 4); ++j)
          store(reinterpret_cast<float*>(out + (c / 4 + j) * 256 + part * 64), four[j]);
      }
      for (int64_t i = 0; i < count; ++i) {
        const Lengths of = squares[i].lengths(s.d);
        longest = {most(longest.whole, of.whole), most(longest.rest, of.rest)};
      }
      about[part] = unit.good ? longest.whole + longest.rest : kInfinity;
      about[kParts + part] = longest.rest;
      about[2 * kParts + part] = unit.up;
    }
  }

  // The rows of one block of queries.
  static int64_t row_bytes(int64_t d) { return kBlockQueries * round_up(4 * steps(d), 64) + 4 * 6 * kRoom; }
  Bounds(char* memory, int64_t d)
      : d_(d),
        lda_(round_up(4 * steps(d), 64)),
        bytes_(reinterpret_cast<int8_t*>(memory)),
        limit_(reinterpret_cast<float*>(memory + kBlockQueries * lda_)),
        up_(limit_ + kRoom),
        rest_(up_ + kRoom),
        whole_(rest_ + kRoom),
        start_(reinterpret_cast<int32_t*>(whole_ + kRoom)),
        reach_(start_ + kRoom) {}

  // Row `i`: factor * q. It has no limit.
  template <class T>
  void take(int64_t i, const T* q, float factor) const {
    Ints bits = zero_ints(), sum = zero_ints();
    for (int64_t c = 0; c < d_; c += kWidth)
      bits = _mm512_max_epu32(bits, _mm512_castps_si512(abs(load_some(q + c, d_ - c) * splat(factor))));
    const Unit unit(bits);
    Squares squares;
    for (int64_t c = 0; c < lda_; c += kWidth) {
      Ints whole = zero_ints();
      if (c < d_) whole = squares.add(load_some(q + c, d_ - c) * splat(factor) * splat(unit.up));
      sum = _mm512_add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes_ + i * lda_ + c), _mm512_cvtepi32_epi8(whole));
    }
    const Lengths safe = squares.lengths(d_);
    up_[i] = unit.good ? unit.up : __builtin_nanf("");
    // What rounding adds to a score is a share of both lengths: a few units in the last place for each channel.
    rest_[i] = safe.rest + (safe.whole + safe.rest) * static_cast<float>(d_ + 32) * 0x1p-22f;
    whole_[i] = safe.whole;
    start_[i] = -128 * _mm512_reduce_add_epi32(sum);
    limit_[i] = __builtin_nanf("");
  }
  void clear(int64_t i) const {
    __builtin_memset(bytes_ + i * lda_, 0, static_cast<size_t>(lda_));
    limit_[i] = up_[i] = rest_[i] = whole_[i] = 0.0f;
    start_[i] = 0;
  }
  void set_limit(int64_t i, float limit) const {
    const float x = limit * up_[i];
    limit_[i] = x - __builtin_fabsf(x) * kSafe;
  }

  // Bits of the keys of a packed block that may be above the limits of six rows.
  ATTNKIT_NOINLINE void above(int64_t row, const uint8_t* block, uint64_t* bits) const {
    const float* about = reinterpret_cast<const float*>(block + 256 * steps(d_));
    const Vec limit = load(limit_ + row), rest = load(rest_ + row), whole = load(whole_ + row);
    for (int64_t part = 0; part < kParts; ++part) {
      const Vec off = fma(rest, splat(about[part]), whole * splat(about[kParts + part]));
      Vec reach = limit * splat(about[2 * kParts + part]) - off;
      reach = reach - fma(abs(reach), splat(kSafe), splat(2.0f));
      // A NaN stays, and becomes the least whole number as everything out of range does.
      _mm512_storeu_si512(reach_ + part * kWidth, _mm512_cvtps_epi32(min(splat(0x1p30f), reach)));
    }
    Ints acc[kRows][kParts];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j) acc[i][j] = _mm512_set1_epi32(start_[row + i]);
    const int8_t* queries = bytes_ + row * lda_;
    for (int64_t s = 0; s < steps(d_); ++s) {
      Bytes keys[kParts];
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j) keys[j] = load_bytes(block + j * 64);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        __builtin_memcpy(&four, queries + i * lda_, 4);
        const Bytes asked = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int j = 0; j < kParts; ++j) acc[i][j] = dot_bytes(acc[i][j], keys[j], asked);
      }
      queries += 4;
      block += 256;
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      uint64_t word = 0;
#pragma GCC unroll 4
      for (int j = 0; j < kParts; ++j)
        word |= static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(acc[i][j], _mm512_set1_epi32(reach_[j * kWidth + i])))
                << j * kWidth;
      bits[i] = word;
    }
  }

 private:
  static constexpr int64_t kRoom = 64;      // rows; six are loaded as a vector
  static constexpr float kSafe = 0x1p-18f;  // far more than a few roundings, and nothing beside a bound

  // What numbers are multiplied by to lie within 127.
  struct Unit {
    float up;
    bool good;
    explicit Unit(Ints bits) {
      const uint32_t largest = _mm512_reduce_max_epu32(bits);
      float x;
      __builtin_memcpy(&x, &largest, sizeof x);
      good = x == 0.0f || (x > 0x1p-50f && x < kInfinity);
      up = good && x > 0.0f ? 127.0f / x : 1.0f;
    }
  };
  struct Lengths {
    float whole, rest;
  };
  // Squares of the whole numbers of a row and of what is left over.
  struct Squares {
    Vec whole = zero(), rest = zero();
    // Adds one vector in units; returns its whole numbers.
    ATTNKIT_INLINE Ints add(Vec x) {
      const Ints numbers = _mm512_cvtps_epi32(x);
      const Vec near = _mm512_cvtepi32_ps(numbers), left = x - near;
      whole = fma(near, near, whole);
      rest = fma(left, left, rest);
      return numbers;
    }
    // Lengths, above what rounding may have taken from them; that of `up` moves every number by up to 127 * 2^-22.
    Lengths lengths(int64_t d) const {
      return {1.001f * root(sum(whole)), 1.001f * root(sum(rest)) + 4e-5f * root(static_cast<float>(d))};
    }
    static ATTNKIT_INLINE float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  };
  template <class T>
  static ATTNKIT_INLINE Ints largest_bits(const T* row, int64_t d) {
    Ints bits = zero_ints();
    for (int64_t c = 0; c < d; c += kWidth)
      bits = _mm512_max_epu32(bits, _mm512_castps_si512(abs(load_some(row + c, d - c))));
    return bits;
  }

  int64_t d_, lda_;
  int8_t* bytes_;    // 48 rows of whole numbers
  float* limit_;     // in units of the query
  float* up_;
  float* rest_;      // length of what is left over, and what rounding of scores adds
  float* whole_;
  int32_t* start_;
  int32_t* reach_;   // of four times 16 keys: what a row's product has to exceed
};
#endif
