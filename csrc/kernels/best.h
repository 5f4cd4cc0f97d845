// The best scores of a row, found while its keys go by in ascending order: of equals, those of the lower index.
//
// Candidates wait in a buffer with room for twice as many as are wanted. When it is full, all but the best leave it, and
// from then on a key has to score more than the least of these: one that equals it comes later, and loses. Of n keys in
// random order about most * (1 + ln(n / most)) become candidates, so a row is compared once, vector by vector, and little
// else. The least score that stays is found bit by bit: 32 counts over the buffer, which compilers turn into vectors.
// A NaN ranks above all numbers, as in torch's sort.

// Lanes of x that are above the limit, or a NaN; all of them when the limit is a NaN.
ATTNKIT_INLINE uint64_t bits_above(Vec x, float limit) { return bits_unequal(max(splat(limit), x), limit); }

class Best {
 public:
  // Bytes of the buffer of a row that keeps up to `most`.
  static int64_t bytes(int64_t most) { return 8 * room(most); }

  void begin(char* memory, int64_t most) {
    most_ = most;
    count_ = 0;
    limit_ = __builtin_nanf("");
    ranks_ = reinterpret_cast<uint32_t*>(memory);
    keys_ = reinterpret_cast<int32_t*>(ranks_ + room(most));
  }

  // What a later key has to be above to become a candidate; a NaN, which every score is above, while all are taken.
  float limit() const { return limit_; }

  // Scores of one block of keys that starts at `key`, as far as their bit is set.
  void add(const float* scores, int64_t key, uint64_t visible) {
    uint64_t above = 0;
    for (int64_t c = 0; c < kBlockKeys; c += kWidth) above |= bits_above(load(scores + c), limit_) << c;
    take(scores, key, visible & above);
  }
  // The same where the bits are of scores above the limit alone.
  ATTNKIT_INLINE void take(const float* scores, int64_t key, uint64_t some) {
    for (; some != 0; some &= some - 1) {
      const int64_t at = __builtin_ctzll(some);
      ranks_[count_] = rank(scores[at]);
      keys_[count_++] = static_cast<int32_t>(key + at);
    }
    settle();
  }
#if defined(__AVX512F__)
  // A vector of scores of keys in ascending order, as far as their bit is set.
  ATTNKIT_INLINE void add(Vec scores, __m512i keys, uint64_t some) {
    const __m512i bits = _mm512_castps_si512(scores + zero());
    const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN));
    const __m512i all = _mm512_set1_epi32(-1);
    const __m512i ranks = _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), _mm512_cmpunord_ps_mask(scores, scores), all);
    put(ranks, keys, static_cast<__mmask16>(bits_above(scores, limit_) & some));
    settle();
  }
#endif
  ATTNKIT_INLINE void settle() {
    if (count_ > 2 * most_) keep(most_);
  }

  // Leaves the best `wanted`, ascending by key, and returns how many there are.
  int64_t keep(int64_t wanted) {
    if (count_ <= wanted) return count_;
    uint32_t low = ranks_[0], high = ranks_[0];
    for (int64_t i = 0; i < count_; ++i) {
      low = ranks_[i] < low ? ranks_[i] : low;
      high = ranks_[i] > high ? ranks_[i] : high;
    }
    // The bits that all have in common are known.
    int bit = low == high ? -1 : 31 - __builtin_clz(low ^ high);
    uint32_t least = static_cast<uint32_t>(static_cast<uint64_t>(low) >> (bit + 1) << (bit + 1));
    for (; bit >= 0; --bit) {
      const uint32_t higher = least | uint32_t{1} << bit;
      if (reach(higher) >= wanted) least = higher;
    }
    squeeze(least, wanted - (least == ~uint32_t{0} ? 0 : reach(least + 1)));
    limit_ = score_of(least);
    return count_;
  }

  // Leaves the best as a list of `count`, -1 in places left over.
  void write(int32_t* list, int64_t count) {
    const int64_t found = keep(count);
    for (int64_t i = 0; i < count; ++i) list[i] = i < found ? keys_[i] : -1;
  }

  int32_t key(int64_t i) const { return keys_[i]; }
  float score(int64_t i) const { return score_of(ranks_[i]); }

 private:
  // A vector may be read and written behind the last candidate.
  static int64_t room(int64_t most) { return round_up(2 * most + kBlockKeys + kWidth, 16); }

  // Unsigned numbers in the order of scores; -0 is 0.
  static ATTNKIT_INLINE uint32_t rank(float score) {
    if (score != score) return ~uint32_t{0};
    score += 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  static ATTNKIT_INLINE float score_of(uint32_t rank) {
    const uint32_t bits = rank >> 31 ? rank & 0x7fffffffu : ~rank;
    float score;
    __builtin_memcpy(&score, &bits, sizeof score);
    return score;
  }

  // How many candidates rank at least so high; and those above `least` stay, of its equals the first few. The vectors of
  // AVX-512 have instructions for both. (Its stores that leave lanes out are slow on a Zen 4: whole ones overlap instead.)
#if defined(__AVX512F__)
  int64_t reach(uint32_t least) const {
    const __m512i from = _mm512_set1_epi32(static_cast<int>(least));
    int64_t found = 0, i = 0;
    for (; i + kWidth <= count_; i += kWidth)
      found += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(ranks_ + i), from));
    return found + __builtin_popcount(_mm512_mask_cmpge_epu32_mask(left(i), _mm512_loadu_si512(ranks_ + i), from));
  }
  void squeeze(uint32_t least, int64_t equals) {
    const __m512i from = _mm512_set1_epi32(static_cast<int>(least));
    const int64_t count = count_;
    count_ = 0;
    for (int64_t i = 0; i < count; i += kWidth) {
      const __mmask16 some = count - i < kWidth ? first(static_cast<int>(count - i)) : __mmask16(0xffff);
      const __m512i ranks = _mm512_loadu_si512(ranks_ + i);
      uint32_t stay = _mm512_mask_cmpgt_epu32_mask(some, ranks, from);
      for (uint32_t same = _mm512_mask_cmpeq_epi32_mask(some, ranks, from); same != 0 && equals > 0; same &= same - 1) {
        stay |= same & -same;
        --equals;
      }
      put(ranks, _mm512_loadu_si512(keys_ + i), static_cast<__mmask16>(stay));
    }
  }
  ATTNKIT_INLINE void put(__m512i ranks, __m512i keys, __mmask16 some) {
    _mm512_storeu_si512(ranks_ + count_, _mm512_maskz_compress_epi32(some, ranks));
    _mm512_storeu_si512(keys_ + count_, _mm512_maskz_compress_epi32(some, keys));
    count_ += __builtin_popcount(some);
  }
  __mmask16 left(int64_t from) const { return first(static_cast<int>(count_ - from)); }
#else
  int64_t reach(uint32_t least) const {
    int32_t found = 0;
    for (int64_t i = 0; i < count_; ++i) found += ranks_[i] >= least;
    return found;
  }
  void squeeze(uint32_t least, int64_t equals) {
    int64_t to = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool equal = ranks_[i] == least && equals > 0;
      const bool stays = ranks_[i] > least || equal;
      equals -= equal;
      ranks_[to] = ranks_[i];
      keys_[to] = keys_[i];
      to += stays;
    }
    count_ = to;
  }
#endif

  uint32_t* ranks_;
  int32_t* keys_;
  int64_t most_, count_;
  float limit_;
};
