// Keys and values of one KV head, laid out for the micro-kernel: once, for all query blocks and query heads of the group.
//
// Keys: blocks of 64, each as strips of kStrip keys, each strip step-major: [strip][step][kStrip], so that the loop over
// steps reads straight on. kWidth keys are loaded as rows, kWidth steps at a time, and transposed in registers. Values:
// strips of kStrip columns over all keys, [strip][step][columns of the strip]; the last strip keeps only the vectors it
// needs. Keys past n are zeros. With bf16 dot products a step is two numbers of a key, or two keys' values interleaved.
//
// A hidden weight is 0, and 0 times a NaN or an infinity is a NaN: packing notes which key blocks hold such values, so that
// only tiles with them are worked off key by key.
//
// Blocking: 64 keys, the key block of masks. Packing is 2 to 3 % of a causal call with n = 1024 on a Zen 5 core, less beyond.

template <class Math>
struct PackedSizes {
  int64_t key_blocks, key_steps, value_vectors, value_steps;
  explicit PackedSizes(const attnkit_softmax& s) : PackedSizes(s, ceil_div(s.n, kBlockKeys)) {}
  PackedSizes(const attnkit_softmax& s, int64_t blocks)
      : key_blocks(blocks),
        key_steps(ceil_div(s.d, Math::kNumbers)),
        value_vectors(ceil_div(s.e, kWidth)),
        value_steps(key_blocks * kBlockKeys / Math::kNumbers) {}
  ATTNKIT_INLINE int64_t key_elements() const { return key_blocks * kBlockKeys * key_steps; }
  ATTNKIT_INLINE int64_t value_elements() const { return value_steps * value_vectors * kWidth; }
  // Elements of keys, of values, and one flag per key block.
  ATTNKIT_INLINE int64_t bytes() const { return round_up(4 * (key_elements() + value_elements()) + key_blocks, 64); }
};

template <class Math>
struct Packed {
  typename Math::Element* keys;
  typename Math::Element* values;
  uint8_t* odd_values;  // one per key block: holds a NaN or an infinity

  Packed(char* memory, const PackedSizes<Math>& sizes)
      : keys(reinterpret_cast<typename Math::Element*>(memory)),
        values(keys + sizes.key_elements()),
        odd_values(reinterpret_cast<uint8_t*>(values + sizes.value_elements())) {}
};

// kWidth steps of one key, starting at step `at`.
template <class Math, class T>
ATTNKIT_INLINE Vec load_steps(const T* row, int64_t at, int64_t d) {
#if defined(ATTNKIT_BF16_DOT)
  if constexpr (Math::kNumbers == 2) {
    const int64_t left = d - 2 * at;
    return _mm512_castsi512_ps(
        left >= 2 * kWidth ? load_pairs(reinterpret_cast<const uint32_t*>(row + 2 * at))
                           : load_pairs_first(row + 2 * at, static_cast<int>(left)));
  } else
#endif
    return load_some(row + at, d - at);
}

template <class Math, class T>
void pack_key_block(const attnkit_softmax& s, const T* keys, const PackedSizes<Math>& sizes, int64_t block,
                    typename Math::Element* out) {
  float* to = reinterpret_cast<float*>(out) + block * kBlockKeys * sizes.key_steps;
  for (int64_t first = 0; first < kBlockKeys; first += kWidth) {
    float* strip = to + first / kStrip * kStrip * sizes.key_steps + first % kStrip;
    const int64_t key = block * kBlockKeys + first;
    for (int64_t at = 0; at < sizes.key_steps; at += kWidth) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        rows[i] = key + i < s.n ? load_steps<Math>(keys + (key + i) * s.k_n, at, s.d) : zero();
      transpose(rows);
      const int64_t steps = least<int64_t>(kWidth, sizes.key_steps - at);
      for (int64_t i = 0; i < steps; ++i) store(strip + (at + i) * kStrip, rows[i]);
    }
  }
}

// One vector of columns of the step that starts at `key`; adds 0 times the values to `check`.
template <class Math, class T>
ATTNKIT_INLINE void pack_values(const attnkit_softmax& s, const T* values, int64_t key, int64_t column,
                                typename Math::Element* to, Vec& check) {
  const T* row = values + key * s.v_n + column;
  const int count = static_cast<int>(least<int64_t>(kWidth, s.e - column));
#if defined(ATTNKIT_BF16_DOT)
  if constexpr (Math::kNumbers == 2) {
    const __m256i even = key < s.n ? load_halves_some(row, count) : _mm256_setzero_si256();
    const __m256i odd = key + 1 < s.n ? load_halves_some(row + s.v_n, count) : _mm256_setzero_si256();
    _mm512_storeu_si512(to, zip_halves(even, odd));
    check = fma(widen_bf16(even), zero(), check);
    check = fma(widen_bf16(odd), zero(), check);
  } else
#endif
  {
    const Vec x = key < s.n ? load_some(row, count) : zero();
    store(reinterpret_cast<float*>(to), x);
    check = fma(x, zero(), check);
  }
}

// Values of one key block; returns whether one of them is a NaN or an infinity.
template <class Math, class T>
bool pack_value_block(const attnkit_softmax& s, const T* values, const PackedSizes<Math>& sizes, int64_t block,
                      typename Math::Element* out) {
  Vec check = zero();
  for (int64_t key = block * kBlockKeys; key < (block + 1) * kBlockKeys; key += Math::kNumbers) {
    for (int64_t vector = 0; vector < sizes.value_vectors; vector += kStripVectors) {
      const int64_t vectors = least<int64_t>(kStripVectors, sizes.value_vectors - vector);
      typename Math::Element* to =
          out + vector * kWidth * sizes.value_steps + key / Math::kNumbers * vectors * kWidth;
      for (int64_t j = 0; j < vectors; ++j)
        pack_values<Math>(s, values, key, (vector + j) * kWidth, to + j * kWidth, check);
    }
  }
  return bits_unequal(check, 0.0f) != 0;
}

// Query rows of one block, row-major in steps; rows past the end are zeros.
template <class Math, class T>
void pack_queries(const attnkit_softmax& s, const T* queries, int64_t count, int64_t rows, int64_t lda,
                  typename Math::Element* out) {
  for (int64_t i = 0; i < rows; ++i) {
    float* to = reinterpret_cast<float*>(out) + i * lda;
    for (int64_t at = 0; at < lda; at += kWidth)
      store(to + at, i < count && at * Math::kNumbers < s.d ? load_steps<Math>(queries + i * s.q_m, at, s.d) : zero());
  }
}

// What packing and useful_threads ask of a call that is no softmax call: its keys, and values where it has some to pack.
template <class Call>
attnkit_softmax packing_call(const Call& call, int64_t keys, int64_t k_n, int64_t e = 0, int64_t v_n = 0) {
  attnkit_softmax s = {};
  s.b = call.b, s.h = call.h, s.g = call.g, s.m = call.m, s.n = keys, s.d = call.d, s.e = e;
  s.q_m = call.q_m, s.k_n = k_n, s.v_n = v_n;
  s.threads = call.threads;
  return s;
}
