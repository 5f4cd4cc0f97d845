// AVX2 with FMA and F16C.

constexpr int kWidth = 8;
constexpr int kStripVectors = 2;  // 6 x 2 accumulators leave 4 of 16 registers for operands

using Vec = __m256;
using Bits = uint32_t;

ATTNKIT_INLINE Vec zero() { return _mm256_setzero_ps(); }
ATTNKIT_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
ATTNKIT_INLINE Vec iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
ATTNKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
ATTNKIT_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(splat(-0.0f), a); }
// A NaN in `b` comes through, one in `a` does not.
ATTNKIT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
ATTNKIT_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

// All ones in the lanes whose bit is set.
ATTNKIT_INLINE __m256i lanes(Bits bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
}
ATTNKIT_INLINE __m256i first(int count) { return lanes((1u << count) - 1); }
ATTNKIT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
ATTNKIT_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
ATTNKIT_INLINE Vec load_first(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
ATTNKIT_INLINE void store_first(float* p, Vec x, int count) { _mm256_maskstore_ps(p, first(count), x); }

ATTNKIT_INLINE Vec widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
// Round to nearest even; a NaN keeps its upper half, made quiet.
ATTNKIT_INLINE __m128i narrow_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
ATTNKIT_INLINE __m128i load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
ATTNKIT_INLINE __m128i load_halves_first(const void* p, int count) {
  __m128i x = _mm_setzero_si128();
  __builtin_memcpy(&x, p, 2 * static_cast<unsigned>(count));
  return x;
}
ATTNKIT_INLINE Vec load(const BFloat16* p) { return widen_bf16(load_halves(p)); }
ATTNKIT_INLINE Vec load(const Float16* p) { return _mm256_cvtph_ps(load_halves(p)); }
ATTNKIT_INLINE Vec load_first(const BFloat16* p, int count) { return widen_bf16(load_halves_first(p, count)); }
ATTNKIT_INLINE Vec load_first(const Float16* p, int count) {
  return _mm256_cvtph_ps(load_halves_first(p, count));
}
ATTNKIT_INLINE void store(BFloat16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x));
}
ATTNKIT_INLINE void store(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
ATTNKIT_INLINE void store_first(BFloat16* p, Vec x, int count) {
  const __m128i halves = narrow_bf16(x);
  __builtin_memcpy(p, &halves, 2 * static_cast<unsigned>(count));
}
ATTNKIT_INLINE void store_first(Float16* p, Vec x, int count) {
  const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &halves, 2 * static_cast<unsigned>(count));
}

ATTNKIT_INLINE float largest(Vec x) {
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
ATTNKIT_INLINE float sum(Vec x) {
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
ATTNKIT_INLINE bool any_above(Vec x, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, splat(limit), _CMP_GT_OQ)) != 0;
}
// Lane i of x where bit i is set, `other` elsewhere.
ATTNKIT_INLINE Vec select(Bits bits, Vec x, float other) {
  return _mm256_blendv_ps(splat(other), x, _mm256_castsi256_ps(lanes(bits)));
}
ATTNKIT_INLINE Bits bits_unequal(Vec x, float value) {
  return static_cast<Bits>(_mm256_movemask_ps(_mm256_cmp_ps(x, splat(value), _CMP_NEQ_UQ)));
}
ATTNKIT_INLINE Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
ATTNKIT_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  const Vec top = splat(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(top, magnitude), _mm256_and_ps(top, sign));
}

// Half as many numbers of 64 bits.
typedef uint64_t Longs __attribute__((vector_size(32)));
// Bit i: number i of low, and then of high, is below the limit.
ATTNKIT_INLINE Bits bits_below(Longs low, Longs high, uint64_t limit) {
  // AVX2 compares signed numbers only.
  const __m256i sign = _mm256_set1_epi64x(INT64_MIN);
  const __m256i top = _mm256_xor_si256(_mm256_set1_epi64x(static_cast<long long>(limit)), sign);
  const auto below = [&](Longs x) {
    return static_cast<Bits>(_mm256_movemask_pd(
        _mm256_castsi256_pd(_mm256_cmpgt_epi64(top, _mm256_xor_si256(reinterpret_cast<__m256i>(x), sign)))));
  };
  return below(low) | below(high) << 4;
}

// x split as whole + fraction in [0, 1); the result is scaled by 2^whole. -inf gives 0, NaN stays.
struct Split {
  Vec fraction;
  Vec whole;
};
ATTNKIT_INLINE Split split_power(Vec x) {
  x = max(splat(-127.0f), x);  // 2^-127 is built as exponent 0, which is the number 0
  const Vec whole = _mm256_floor_ps(x);
  return {x - whole, whole};
}
ATTNKIT_INLINE Vec scale_power(Vec p, Split s) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(s.whole), _mm256_set1_epi32(127));
  return p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

ATTNKIT_INLINE void transpose(Vec (&r)[8]) {
  Vec t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Lane i of the result is the sum of r[i].
ATTNKIT_INLINE Vec sum_each(const Vec (&r)[8]) {
  const Vec a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const Vec b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}
