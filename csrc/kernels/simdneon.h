// NEON as every 64-bit ARM processor has it: four lanes, fused multiply-adds, conversions of fp16. bfloat16 is widened and
// narrowed by shifts, as only processors from ARMv8.6 on have instructions for it.

constexpr int kWidth = 4;
constexpr int kStripVectors = 4;  // 6 x 4 accumulators leave 8 of 32 registers for operands

using Vec = float32x4_t;
using Bits = uint32_t;

ATTNKIT_INLINE Vec zero() { return vdupq_n_f32(0.0f); }
ATTNKIT_INLINE Vec splat(float x) { return vdupq_n_f32(x); }
ATTNKIT_INLINE Vec iota() { return Vec{0.0f, 1.0f, 2.0f, 3.0f}; }
ATTNKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
ATTNKIT_INLINE Vec abs(Vec a) { return vabsq_f32(a); }
// A NaN in `b` comes through, one in `a` does not; NEON's own maximum lets both through.
ATTNKIT_INLINE Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
ATTNKIT_INLINE Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

ATTNKIT_INLINE Vec load(const float* p) { return vld1q_f32(p); }
ATTNKIT_INLINE void store(float* p, Vec x) { vst1q_f32(p, x); }
// NEON has no masked loads: a copy of `count` numbers through the stack.
ATTNKIT_INLINE Vec load_first(const float* p, int count) {
  float some[kWidth] = {};
  for (int i = 0; i < count; ++i) some[i] = p[i];
  return vld1q_f32(some);
}
ATTNKIT_INLINE void store_first(float* p, Vec x, int count) {
  float some[kWidth];
  vst1q_f32(some, x);
  for (int i = 0; i < count; ++i) p[i] = some[i];
}

ATTNKIT_INLINE Vec widen(uint16x4_t halves, BFloat16) { return vreinterpretq_f32_u32(vshll_n_u16(halves, 16)); }
ATTNKIT_INLINE Vec widen(uint16x4_t halves, Float16) { return vcvt_f32_f16(vreinterpret_f16_u16(halves)); }
// Both round to nearest even; a NaN stays one, made quiet.
ATTNKIT_INLINE uint16x4_t narrow(Vec x, BFloat16) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
ATTNKIT_INLINE uint16x4_t narrow(Vec x, Float16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
template <class T>
ATTNKIT_INLINE Vec load(const T* p) {
  uint16x4_t halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return widen(halves, T{});
}
template <class T>
ATTNKIT_INLINE Vec load_first(const T* p, int count) {
  T some[kWidth] = {};
  for (int i = 0; i < count; ++i) some[i] = p[i];
  return load(some);
}
template <class T>
ATTNKIT_INLINE void store(T* p, Vec x) {
  const uint16x4_t halves = narrow(x, T{});
  __builtin_memcpy(p, &halves, sizeof halves);
}
template <class T>
ATTNKIT_INLINE void store_first(T* p, Vec x, int count) {
  T some[kWidth];
  store(some, x);
  for (int i = 0; i < count; ++i) p[i] = some[i];
}

ATTNKIT_INLINE float largest(Vec x) {
  const float a = x[0] > x[1] ? x[0] : x[1];
  const float b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
ATTNKIT_INLINE float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
ATTNKIT_INLINE uint32x4_t bit_of_lane() { return uint32x4_t{1, 2, 4, 8}; }
ATTNKIT_INLINE Bits bits_set(uint32x4_t lanes) { return vaddvq_u32(vandq_u32(lanes, bit_of_lane())); }
ATTNKIT_INLINE bool any_above(Vec x, float limit) { return vmaxvq_u32(vcgtq_f32(x, splat(limit))) != 0; }
// Lane i of x where bit i is set, `other` elsewhere.
ATTNKIT_INLINE Vec select(Bits bits, Vec x, float other) {
  return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), bit_of_lane()), x, splat(other));
}
ATTNKIT_INLINE Bits bits_unequal(Vec x, float value) { return bits_set(vmvnq_u32(vceqq_f32(x, splat(value)))); }
ATTNKIT_INLINE Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return vbslq_f32(vcltq_f32(a, b), then, otherwise);
}
ATTNKIT_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude);
}

// Half as many numbers of 64 bits.
using Longs = uint64x2_t;
// Bit i: number i of low, and then of high, is below the limit.
ATTNKIT_INLINE Bits bits_below(Longs low, Longs high, uint64_t limit) {
  const uint64x2_t top = vdupq_n_u64(limit);
  return bits_set(vuzp1q_u32(vreinterpretq_u32_u64(vcltq_u64(low, top)), vreinterpretq_u32_u64(vcltq_u64(high, top))));
}

// x split as whole + fraction in [0, 1); the result is scaled by 2^whole. -inf gives 0, NaN stays.
struct Split {
  Vec fraction;
  Vec whole;
};
ATTNKIT_INLINE Split split_power(Vec x) {
  x = max(splat(-127.0f), x);  // 2^-127 is built as exponent 0, which is the number 0
  const Vec whole = vrndmq_f32(x);
  return {vsubq_f32(x, whole), whole};
}
ATTNKIT_INLINE Vec scale_power(Vec p, Split s) {
  // A NaN converts to 0, and p is one then.
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(s.whole), vdupq_n_s32(127));
  return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}

ATTNKIT_INLINE void transpose(Vec (&r)[4]) {
  const Vec a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]);  // r0[0] r1[0] r0[2] r1[2], and the odd ones
  const Vec c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
  r[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
  r[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
  r[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

// Lane i of the result is the sum of r[i].
ATTNKIT_INLINE Vec sum_each(const Vec (&r)[4]) {
  return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3]));
}
