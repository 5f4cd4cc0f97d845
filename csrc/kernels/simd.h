// One vector type per instruction level, so that every kernel is written once.
//
// The width comes from what the compiler was told it may use (-march in CMakeLists.txt). Everything below kernels/ is
// included inside a namespace named after the level and calls no inline function of the standard library: the linker
// keeps one copy of such a function for the whole library, and it could be one that an older processor cannot run.
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
#define ATTNKIT_LEVEL_HAS_FMA 1
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__AVX512BF16__)
#define ATTNKIT_BF16_DOT 1
#endif
#if defined(__AVX512VNNI__)
#define ATTNKIT_BYTE_DOT 1
#endif

#if defined(__AVX512F__)
#include "simd512.h"
#elif defined(__AVX2__)
#include "simd256.h"
#elif defined(__aarch64__)
#include "simdneon.h"
#else
#include "simd128.h"
#endif

template <class T>
ATTNKIT_INLINE T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
ATTNKIT_INLINE T most(T a, T b) {
  return a < b ? b : a;
}
template <class T>
ATTNKIT_INLINE T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}
ATTNKIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ATTNKIT_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Up to a whole vector.
template <class T>
ATTNKIT_INLINE Vec load_some(const T* p, int64_t count) {
  return count >= kWidth ? load(p) : load_first(p, static_cast<int>(count));
}
template <class T>
ATTNKIT_INLINE void store_some(T* p, Vec x, int64_t count) {
  if (count >= kWidth) {
    store(p, x);
  } else {
    store_first(p, x, static_cast<int>(count));
  }
}

// Into the second cache. On one Zen 4 core the loops of decoding read 22 GB/s of float32 this way, and 13 with fetching
// into the first.
template <class T>
ATTNKIT_INLINE void prefetch_row(const T* row, int64_t numbers) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < numbers; j += kLine) __builtin_prefetch(row + j, 0, 2);
}

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

// 2^x for x below 128: minimax polynomials of the fraction in [0, 1) with p(0) = 1, so that a row with one key returns
// its value unchanged. Relative error 8e-8 for degree 5; degree 4 has 3e-6, a thousandth of what rounding to 16 bits costs.
template <int kDegree>
ATTNKIT_INLINE Vec exp2(Vec x) {
  static_assert(kDegree == 4 || kDegree == 5, "coefficients exist for these");
  const Split s = split_power(x);
  const Vec f = s.fraction;
  Vec p;
  if constexpr (kDegree == 5) {
    p = fma(splat(1.86713028e-3f), f, splat(9.01702978e-3f));
    p = fma(p, f, splat(5.57999127e-2f));
    p = fma(p, f, splat(0.240164444f));
    p = fma(p, f, splat(0.693151295f));
  } else {
    p = fma(splat(1.34266857e-2f), f, splat(5.22424728e-2f));
    p = fma(p, f, splat(0.241280213f));
    p = fma(p, f, splat(0.693044841f));
  }
  return scale_power(fma(p, f, splat(1.0f)), s);
}

// Cephes' tanhf: an odd polynomial where 1 - 2 / (e^2x + 1) would cancel.
ATTNKIT_INLINE Vec tanh(Vec x) {
  const Vec size = abs(x), square = x * x;
  Vec p = fma(splat(-5.70498872745e-3f), square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const Vec near = fma(p * square, x, x);
  // e^2x without overflow; beyond 40 / ln 2 the quotient is far below the last bit of 1.
  const Vec grown = exp2<5>(min(splat(40.0f), size * splat(2.0f * kLog2E)));
  const Vec far = copy_sign(splat(1.0f) - splat(2.0f) / (grown + splat(1.0f)), x);
  return where_less(size, splat(0.625f), near, far);
}
