// AVX-512 (F, BW, DQ, VL), and the bf16 dot product where the level has it.

constexpr int kWidth = 16;
constexpr int kStripVectors = 4;  // 6 x 4 accumulators leave 8 of 32 registers for operands

using Vec = __m512;
using Bits = uint32_t;

ATTNKIT_INLINE Vec zero() { return _mm512_setzero_ps(); }
ATTNKIT_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
ATTNKIT_INLINE Vec iota() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
ATTNKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
ATTNKIT_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
// A NaN in `b` comes through, one in `a` does not.
ATTNKIT_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
ATTNKIT_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

ATTNKIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
ATTNKIT_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
ATTNKIT_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
ATTNKIT_INLINE Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
ATTNKIT_INLINE void store_first(float* p, Vec x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }

ATTNKIT_INLINE Vec widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
// Round to nearest even; a NaN keeps its upper half, made quiet.
ATTNKIT_INLINE __m256i narrow_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
ATTNKIT_INLINE __m256i load_halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
ATTNKIT_INLINE Vec load(const BFloat16* p) { return widen_bf16(load_halves(p)); }
ATTNKIT_INLINE Vec load(const Float16* p) { return _mm512_cvtph_ps(load_halves(p)); }
ATTNKIT_INLINE Vec load_first(const BFloat16* p, int count) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p));
}
ATTNKIT_INLINE Vec load_first(const Float16* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}
ATTNKIT_INLINE void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
ATTNKIT_INLINE void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
ATTNKIT_INLINE void store_first(BFloat16* p, Vec x, int count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow_bf16(x));
}
ATTNKIT_INLINE void store_first(Float16* p, Vec x, int count) {
  _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

ATTNKIT_INLINE float largest(Vec x) { return _mm512_reduce_max_ps(x); }
ATTNKIT_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }
ATTNKIT_INLINE bool any_above(Vec x, float limit) {
  return _mm512_cmp_ps_mask(x, splat(limit), _CMP_GT_OQ) != 0;
}
// Lane i of x where bit i is set, `other` elsewhere.
ATTNKIT_INLINE Vec select(Bits bits, Vec x, float other) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), splat(other), x);
}
ATTNKIT_INLINE Bits bits_unequal(Vec x, float value) {
  return _mm512_cmp_ps_mask(x, splat(value), _CMP_NEQ_UQ);
}
ATTNKIT_INLINE Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
ATTNKIT_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  const Vec top = splat(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(top, magnitude), _mm512_and_ps(top, sign));
}

// Half as many numbers of 64 bits.
typedef uint64_t Longs __attribute__((vector_size(64)));
// Bit i: number i of low, and then of high, is below the limit.
ATTNKIT_INLINE Bits bits_below(Longs low, Longs high, uint64_t limit) {
  const __m512i top = _mm512_set1_epi64(static_cast<long long>(limit));
  return _mm512_kunpackb(_mm512_cmplt_epu64_mask(reinterpret_cast<__m512i>(high), top),
                         _mm512_cmplt_epu64_mask(reinterpret_cast<__m512i>(low), top));
}

// x split as whole + fraction in [0, 1); the result is scaled by 2^whole. -inf gives 0, NaN stays.
struct Split {
  Vec fraction;
  Vec x;
};
ATTNKIT_INLINE Split split_power(Vec x) { return {_mm512_reduce_ps(x, 1 | 8), x}; }
ATTNKIT_INLINE Vec scale_power(Vec p, Split s) { return _mm512_scalef_ps(p, s.x); }

ATTNKIT_INLINE void transpose(Vec (&r)[16]) {
  Vec t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Lane i of the result is the sum of r[i], whose lanes are what `add` takes them for.
template <class F>
ATTNKIT_INLINE Vec sum_each(const Vec (&r)[16], F add) {
  Vec t[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    t[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    u[i] = add(_mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44), _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee));
  const Vec a = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const Vec b = add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
ATTNKIT_INLINE Vec sum_each(const Vec (&r)[16]) {
  return sum_each(r, [](Vec a, Vec b) { return a + b; });
}

#if defined(ATTNKIT_BF16_DOT)
// A vector of pairs of bf16 numbers, one pair in each 32-bit lane.
using Pairs = __m512i;
ATTNKIT_INLINE Pairs load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
ATTNKIT_INLINE Pairs splat_pair(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
// Not the intrinsic: GCC 12 copies every sum of a loop to another register and back, and runs out of them.
ATTNKIT_INLINE Vec dot_pairs(Vec c, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
// The numbers of lo and then of hi, rounded to nearest even.
ATTNKIT_INLINE Pairs narrow_pair(Vec lo, Vec hi) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo)); }
ATTNKIT_INLINE void store_narrow(uint32_t* p, Vec lo, Vec hi) { _mm512_storeu_si512(p, narrow_pair(lo, hi)); }
// Number i of two rows side by side in lane i.
ATTNKIT_INLINE Pairs zip_halves(__m256i even, __m256i odd) {
  const __m512i in_turn = _mm512_or_si512(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_slli_epi32(
      _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16));
  return _mm512_permutexvar_epi16(in_turn, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
}
ATTNKIT_INLINE __m256i low_half(Pairs x) { return _mm512_castsi512_si256(x); }
// The same of whole rows: of the first half of their numbers, and of the second.
ATTNKIT_INLINE void zip_rows(Pairs even, Pairs odd, Pairs& low, Pairs& high) {
  const __m512i in_turn = _mm512_or_si512(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_slli_epi32(
      _mm512_setr_epi32(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47), 16));
  low = _mm512_permutex2var_epi16(even, in_turn, odd);
  high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(in_turn, _mm512_set1_epi16(kWidth)), odd);
}
// A vector of numbers rounded to nearest even.
ATTNKIT_INLINE void store_half(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
ATTNKIT_INLINE __m256i load_halves_some(const void* p, int count) {
  return count >= kWidth ? load_halves(p) : _mm256_maskz_loadu_epi16(first(count), p);
}
ATTNKIT_INLINE Pairs load_pairs_first(const BFloat16* p, int numbers) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << numbers) - 1), p);
}
#endif

#if defined(ATTNKIT_BYTE_DOT)
// 64 bytes, or 16 whole numbers of 32 bits.
using Bytes = __m512i;
using Ints = __m512i;
ATTNKIT_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
ATTNKIT_INLINE Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
ATTNKIT_INLINE Bytes load_bytes_first(const void* p, int64_t count) {
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1, p);
}
// Lane i grows by the products of the four unsigned bytes of a and the signed ones of b that lie there.
// Not the intrinsic, as above.
ATTNKIT_INLINE Ints dot_bytes(Ints c, Bytes a, Bytes b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "vm"(b));
  return c;
}
ATTNKIT_INLINE Ints sum_each(const Ints (&r)[16]) {
  Vec x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_castsi512_ps(r[i]);
  return _mm512_castps_si512(sum_each(x, [](Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }));
}
#endif
