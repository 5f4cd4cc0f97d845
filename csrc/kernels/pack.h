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

// Keys of one block of 64: at(i) is row i of them, or null where zeros stand for it.
template <class Math, class Rows>
ATTNKIT_INLINE void pack_key_rows(int64_t d, int64_t key_steps, Rows at, typename Math::Element* out) {
  for (int64_t first = 0; first < kBlockKeys; first += kWidth) {
    float* strip = reinterpret_cast<float*>(out) + first / kStrip * kStrip * key_steps + first % kStrip;
    decltype(at(0)) row[kWidth];
    for (int i = 0; i < kWidth; ++i) row[i] = at(first + i);
    for (int64_t step = 0; step < key_steps; step += kWidth) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) rows[i] = row[i] ? load_steps<Math>(row[i], step, d) : zero();
      transpose(rows);
      const int64_t steps = least<int64_t>(kWidth, key_steps - step);
      for (int64_t i = 0; i < steps; ++i) store(strip + (step + i) * kStrip, rows[i]);
    }
  }
}

template <class Math, class T>
void pack_key_block(const attnkit_softmax& s, const T* keys, const PackedSizes<Math>& sizes, int64_t block,
                    typename Math::Element* out) {
  const int64_t first = block * kBlockKeys;
  pack_key_rows<Math>(
      s.d, sizes.key_steps, [&](int64_t i) { return first + i < s.n ? keys + (first + i) * s.k_n : nullptr; },
      out + first * sizes.key_steps);
}

// One vector of columns of a step: of one key's values, or of two whose second may be missing; adds 0 times the values to
// `check`. Null stands for zeros.
template <class Math, class T>
ATTNKIT_INLINE void pack_step(const T* even_row, [[maybe_unused]] const T* odd_row, int count, typename Math::Element* to,
                              Vec& check) {
#if defined(ATTNKIT_BF16_DOT)
  if constexpr (Math::kNumbers == 2) {
    const __m256i even = even_row ? load_halves_some(even_row, count) : _mm256_setzero_si256();
    const __m256i odd = odd_row ? load_halves_some(odd_row, count) : _mm256_setzero_si256();
    _mm512_storeu_si512(to, zip_halves(even, odd));
    check = fma(widen_bf16(even), zero(), check);
    check = fma(widen_bf16(odd), zero(), check);
  } else
#endif
  {
    const Vec x = even_row ? load_some(even_row, count) : zero();
    store(reinterpret_cast<float*>(to), x);
    check = fma(x, zero(), check);
  }
}

// The same of the step that starts at `key`.
template <class Math, class T>
ATTNKIT_INLINE void pack_values(const attnkit_softmax& s, const T* values, int64_t key, int64_t column,
                                typename Math::Element* to, Vec& check) {
  const T* row = values + key * s.v_n + column;
  pack_step<Math>(key < s.n ? row : nullptr, key + 1 < s.n ? row + s.v_n : nullptr,
                  static_cast<int>(least<int64_t>(kWidth, s.e - column)), to, check);
}

// Values of one block of 64 keys, at(i) as above; `out` is that of the block in the first strip. Returns whether one of them
// is a NaN or an infinity.
template <class Math, class Rows>
ATTNKIT_INLINE bool pack_value_rows(int64_t e, const PackedSizes<Math>& sizes, int64_t block, Rows at,
                                    typename Math::Element* out) {
  Vec check = zero();
  for (int64_t i = 0; i < kBlockKeys; i += Math::kNumbers) {
    const auto even = at(i), odd = Math::kNumbers == 2 ? at(i + 1) : even;
    for (int64_t vector = 0; vector < sizes.value_vectors; vector += kStripVectors) {
      const int64_t vectors = least<int64_t>(kStripVectors, sizes.value_vectors - vector);
      typename Math::Element* to = out + vector * kWidth * sizes.value_steps +
                                   (block * kBlockKeys + i) / Math::kNumbers * vectors * kWidth;
      for (int64_t j = 0; j < vectors; ++j) {
        const int64_t column = (vector + j) * kWidth;
        pack_step<Math>(even ? even + column : even, odd ? odd + column : odd,
                        static_cast<int>(least<int64_t>(kWidth, e - column)), to + j * kWidth, check);
      }
    }
  }
  return bits_unequal(check, 0.0f) != 0;
}

template <class Math, class T>
bool pack_value_block(const attnkit_softmax& s, const T* values, const PackedSizes<Math>& sizes, int64_t block,
                      typename Math::Element* out) {
  const int64_t first = block * kBlockKeys;
  return pack_value_rows<Math>(
      s.e, sizes, block, [&](int64_t i) { return first + i < s.n ? values + (first + i) * s.v_n : nullptr; }, out);
}

// Adds `weight` times the packed values of one key to the sums of a row.
template <class Math>
void add_packed_values(const PackedSizes<Math>& sizes, const typename Math::Element* values, int64_t key, Vec weight,
                       float* sums) {
  for (int64_t vector = 0; vector < sizes.value_vectors; ++vector, sums += kWidth) {
    const int64_t strip = vector / kStripVectors * kStripVectors;
    const int64_t vectors = least<int64_t>(kStripVectors, sizes.value_vectors - strip);
    const typename Math::Element* step =
        values + strip * kWidth * sizes.value_steps + (key / Math::kNumbers * vectors + vector - strip) * kWidth;
    store(sums, fma(weight, Math::values_of(step, key), load(sums)));
  }
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
