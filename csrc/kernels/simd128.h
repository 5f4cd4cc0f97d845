// Four lanes in the compiler's own vector type: SSE on x86-64-v2, and whatever 128-bit unit another machine has.

constexpr int kWidth = 4;
constexpr int kStripVectors = 2;  // 6 x 2 accumulators leave 4 of 16 registers for operands

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Lanes __attribute__((vector_size(16)));
using Bits = uint32_t;

ATTNKIT_INLINE Vec zero() { return Vec{}; }
ATTNKIT_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
ATTNKIT_INLINE Vec iota() { return Vec{0, 1, 2, 3}; }
ATTNKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
ATTNKIT_INLINE Lanes bits_of(Vec x) { return reinterpret_cast<Lanes>(x); }
ATTNKIT_INLINE Vec from_bits(Lanes x) { return reinterpret_cast<Vec>(x); }
ATTNKIT_INLINE Vec blend(Lanes choose, Vec then, Vec otherwise) {
  return from_bits((bits_of(then) & choose) | (bits_of(otherwise) & ~choose));
}
ATTNKIT_INLINE Vec abs(Vec a) { return from_bits(bits_of(a) & 0x7fffffff); }
// A NaN in `b` comes through, one in `a` does not.
ATTNKIT_INLINE Vec max(Vec a, Vec b) { return blend(a > b, a, b); }
ATTNKIT_INLINE Vec min(Vec a, Vec b) { return blend(a < b, a, b); }

ATTNKIT_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
ATTNKIT_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
ATTNKIT_INLINE Vec load_first(const float* p, int count) {
  Vec x = zero();
  for (int i = 0; i < count; ++i) x[i] = p[i];
  return x;
}
ATTNKIT_INLINE void store_first(float* p, Vec x, int count) {
  for (int i = 0; i < count; ++i) p[i] = x[i];
}

ATTNKIT_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
// Exponents move by 112; subnormal halves are exact as multiples of 2^-24.
ATTNKIT_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {
    const float y = static_cast<float>(rest) * 0x1p-24f;
    __builtin_memcpy(&bits, &y, sizeof bits);
  }
  bits |= sign;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
// Both round to nearest even; a NaN stays one, made quiet.
ATTNKIT_INLINE BFloat16 narrow(float x, BFloat16) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
ATTNKIT_INLINE Float16 narrow(float x, Float16) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more round to infinity
  if (rest < 0x38800000) {                                                // below 2^-14: a multiple of 2^-24
    float y;
    __builtin_memcpy(&y, &rest, sizeof y);
    y += 0.5f;  // one unit in the last place of numbers in [0.5, 1) is 2^-24
    __builtin_memcpy(&rest, &y, sizeof rest);
    return {static_cast<uint16_t>(sign | (rest - 0x3f000000))};
  }
  rest += 0xfff + (rest >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rest - (112u << 23)) >> 13))};
}
template <class T>
ATTNKIT_INLINE Vec load_first(const T* p, int count) {
  Vec x = zero();
  for (int i = 0; i < count; ++i) x[i] = widen(p[i]);
  return x;
}
template <class T>
ATTNKIT_INLINE Vec load(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
ATTNKIT_INLINE void store_first(T* p, Vec x, int count) {
  for (int i = 0; i < count; ++i) p[i] = narrow(x[i], T{});
}
template <class T>
ATTNKIT_INLINE void store(T* p, Vec x) {
  store_first(p, x, kWidth);
}

ATTNKIT_INLINE float largest(Vec x) {
  const float a = x[0] > x[1] ? x[0] : x[1];
  const float b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
ATTNKIT_INLINE float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
ATTNKIT_INLINE Bits bits_set(Lanes x) {
  return static_cast<Bits>((x[0] & 1) | (x[1] & 2) | (x[2] & 4) | (x[3] & 8));
}
ATTNKIT_INLINE bool any_above(Vec x, float limit) { return bits_set(x > splat(limit)) != 0; }
// Lane i of x where bit i is set, `other` elsewhere.
ATTNKIT_INLINE Vec select(Bits bits, Vec x, float other) {
  const int32_t word = static_cast<int32_t>(bits);
  return blend((Lanes{word, word, word, word} & Lanes{1, 2, 4, 8}) != 0, x, splat(other));
}
ATTNKIT_INLINE Bits bits_unequal(Vec x, float value) { return bits_set(x != splat(value)); }
ATTNKIT_INLINE Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) { return blend(a < b, then, otherwise); }
ATTNKIT_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return from_bits((bits_of(magnitude) & 0x7fffffff) | (bits_of(sign) & INT32_MIN));
}

// Half as many numbers of 64 bits.
typedef uint64_t Longs __attribute__((vector_size(16)));
// Bit i: number i of low, and then of high, is below the limit.
ATTNKIT_INLINE Bits bits_below(Longs low, Longs high, uint64_t limit) {
  return static_cast<Bits>((low[0] < limit) | (low[1] < limit) << 1 | (high[0] < limit) << 2 | (high[1] < limit) << 3);
}

// x split as whole + fraction in [0, 1); the result is scaled by 2^whole. -inf gives 0, NaN stays.
struct Split {
  Vec fraction;
  Vec whole;
};
ATTNKIT_INLINE Split split_power(Vec x) {
  x = max(splat(-127.0f), x);  // 2^-127 is built as exponent 0, which is the number 0
  // Adding 1.5 * 2^23 rounds to a whole number; a NaN never meets an integer conversion.
  const Vec nearest = (x + splat(12582912.0f)) - splat(12582912.0f);
  const Vec whole = nearest - from_bits((nearest > x) & bits_of(splat(1.0f)));
  return {x - whole, whole};
}
ATTNKIT_INLINE Vec scale_power(Vec p, Split s) {
  // The same constant leaves whole + 127 in the low bits of the sum.
  const Lanes exponent = bits_of(s.whole + splat(12582912.0f + 127.0f));
  return p * from_bits(exponent << 23);
}

ATTNKIT_INLINE void transpose(Vec (&r)[4]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = Vec{a[0], b[0], c[0], d[0]};
  r[1] = Vec{a[1], b[1], c[1], d[1]};
  r[2] = Vec{a[2], b[2], c[2], d[2]};
  r[3] = Vec{a[3], b[3], c[3], d[3]};
}

// Lane i of the result is the sum of r[i].
ATTNKIT_INLINE Vec sum_each(const Vec (&r)[4]) {
  Vec t[4] = {r[0], r[1], r[2], r[3]};
  transpose(t);
  return (t[0] + t[1]) + (t[2] + t[3]);
}
