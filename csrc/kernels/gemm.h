// The micro-kernel under both products: 6 rows times a strip of up to kStripVectors vectors, accumulated in registers.
//
// c (6, strip) += a (6, steps) * b (steps, strip). For every step: load the strip's vectors of b once, take one number of
// each of the six rows of a, multiply and add. A product of q and k or of weights and v is this same loop; what a step is
// depends on the arithmetic: one float, or one pair of bf16 numbers for the dot-product instruction.
//
// b is packed so that the loop reads straight on (see pack.h); a has a stride. Nothing is loaded or stored inside but
// operands: sums enter and leave the registers once per strip, and row maxima are taken on the way out.
//
// Blocking: 6 x 4 vectors where there are 32 registers (24 accumulators, 4 of b, 1 of a), 6 x 2 where there are 16. On a
// Zen 5 core 24 accumulators reach 490 to 500 GFLOP/s of bf16 dot products and 16 reach 467; the loop alone runs at
// 98 % of the peak, at 94 to 96 % inside prefill.

constexpr int kRows = 6;
constexpr int kStrip = kStripVectors * kWidth;

struct Float32Math {
  using Element = float;
  static constexpr int kNumbers = 1;    // per step
  static constexpr int kExpVectors = 1;  // vectors of weights written at a time
  static constexpr int kExpDegree = 5;
  static ATTNKIT_INLINE Vec multiply_add(Vec c, const float* a, Vec b) { return fma(splat(*a), b, c); }
  static ATTNKIT_INLINE Vec load_row(const float* b) { return load(b); }
  static ATTNKIT_INLINE void store_weights(float* to, const Vec (&w)[1]) { store(to, w[0]); }
  static ATTNKIT_INLINE float weight(const float* row, int64_t key) { return row[key]; }
  static ATTNKIT_INLINE Vec values_of(const float* step, int64_t) { return load(step); }
};

#if defined(ATTNKIT_BF16_DOT)
struct BFloat16Math {
  using Element = uint32_t;
  static constexpr int kNumbers = 2;
  static constexpr int kExpVectors = 2;
  static constexpr int kExpDegree = 4;
  static ATTNKIT_INLINE Vec multiply_add(Vec c, const uint32_t* a, Pairs b) {
    return dot_pairs(c, splat_pair(*a), b);
  }
  static ATTNKIT_INLINE Pairs load_row(const uint32_t* b) { return load_pairs(b); }
  static ATTNKIT_INLINE void store_weights(uint32_t* to, const Vec (&w)[2]) { store_narrow(to, w[0], w[1]); }
  static ATTNKIT_INLINE float weight(const uint32_t* row, int64_t key) {
    const uint32_t bits = key & 1 ? row[key / 2] & 0xffff0000u : row[key / 2] << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
  // The values of one key out of the step that holds it and its neighbour.
  static ATTNKIT_INLINE Vec values_of(const uint32_t* step, int64_t key) {
    const Pairs pairs = load_pairs(step);
    return _mm512_castsi512_ps(key & 1 ? _mm512_and_si512(pairs, splat_pair(0xffff0000u))
                                       : _mm512_slli_epi32(pairs, 16));
  }
};
#endif

// acc[6][vectors] += a[6][steps] * b[steps][vectors]
template <class Math, int kVectors>
ATTNKIT_INLINE void multiply_strip(const typename Math::Element* a, int64_t lda, const typename Math::Element* b,
                                   int64_t ldb, int64_t steps, Vec (&acc)[kRows][kVectors]) {
  for (int64_t s = 0; s < steps; ++s) {
    decltype(Math::load_row(b)) row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = Math::load_row(b + j * kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Math::multiply_add(acc[i][j], a + i * lda, row[j]);
    a += 1;
    b += ldb;
  }
}

// c += a * b
template <class Math, int kVectors>
ATTNKIT_NOINLINE void add_product(const typename Math::Element* a, int64_t lda, const typename Math::Element* b,
                                  int64_t steps, float* c, int64_t ldc) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = load(c + i * ldc + j * kWidth);
  multiply_strip<Math, kVectors>(a, lda, b, kVectors * kWidth, steps, acc);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kWidth, acc[i][j]);
}

// c = factor * a * b, and then f(row, vector, numbers) for each vector of c while it is in a register.
template <class Math, int kVectors, class F>
ATTNKIT_INLINE void product(const typename Math::Element* a, int64_t lda, const typename Math::Element* b, int64_t steps,
                            float factor, float* c, int64_t ldc, F f) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
  multiply_strip<Math, kVectors>(a, lda, b, kStrip, steps, acc);
  const Vec by = splat(factor);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = acc[i][j] * by;
      store(c + i * ldc + j * kWidth, x);
      f(i, j, x);
    }
}

// Every column is seen, see product_and_peaks.
struct Everything {
  ATTNKIT_INLINE Vec operator()(int, int, Vec x) const { return x; }
};
// Row i sees the columns whose bits of words[i] are set, from bit `first` on.
struct Words {
  const uint64_t* words;
  int64_t first;
  ATTNKIT_INLINE Vec operator()(int i, int j, Vec x) const {
    return select(static_cast<Bits>(words[i] >> (first + j * kWidth)), x, -kInfinity);
  }
};

// c = a * b where it is seen and -inf elsewhere, and the running maxima of its rows: the units that do this are idle while
// products are formed.
template <class Math, int kVectors, class Seen = Everything>
ATTNKIT_NOINLINE void product_and_peaks(const typename Math::Element* a, int64_t lda, const typename Math::Element* b,
                                        int64_t steps, float* c, int64_t ldc, float* peaks, Seen seen = {}) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
  multiply_strip<Math, kVectors>(a, lda, b, kStrip, steps, acc);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    Vec peak = load(peaks + i * kWidth);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = seen(i, j, acc[i][j]);
      store(c + i * ldc + j * kWidth, x);
      peak = max(peak, x);
    }
    store(peaks + i * kWidth, peak);
  }
}

// Weights 2^(score * factor + shift) of kCount rows, whose columns [begin, end) are whole vectors of weights; adds them to
// the totals, and then writes f(row, column, weights) of each vector.
template <class Math, int kCount, class F>
ATTNKIT_INLINE void weigh_columns(const float* scores, int64_t score_row, typename Math::Element* weights,
                                  int64_t weight_row, int64_t begin, int64_t end, Vec factor, const Vec (&shift)[kCount],
                                  Vec (&total)[kCount], F f) {
  for (int64_t c = begin; c < end; c += kWidth * Math::kExpVectors) {
#pragma GCC unroll 6
    for (int i = 0; i < kCount; ++i) {
      Vec x[Math::kExpVectors];
#pragma GCC unroll 2
      for (int j = 0; j < Math::kExpVectors; ++j) {
        x[j] = exp2<Math::kExpDegree>(fma(load(scores + i * score_row + c + j * kWidth), factor, shift[i]));
        total[i] = total[i] + x[j];
        x[j] = f(i, c + j * kWidth, x[j]);
      }
      Math::store_weights(weights + i * weight_row + c / Math::kNumbers, x);
    }
  }
}

// Calls f with a strip's number of vectors as a constant.
template <int kCount>
struct Vectors {
  static constexpr int count = kCount;
};
template <class F>
ATTNKIT_INLINE void with_vectors(int64_t vectors, F f) {
  if (vectors == kStripVectors) return f(Vectors<kStripVectors>());
  if constexpr (kStripVectors == 4) {
    if (vectors == 3) return f(Vectors<3>());
    if (vectors == 2) return f(Vectors<2>());
  }
  f(Vectors<1>());
}
