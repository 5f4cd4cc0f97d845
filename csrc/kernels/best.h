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
    if (count_ > 2 * most_) keep(most_);
  }

  // Leaves the best `wanted`, ascending by key, and returns how many there are.
  int64_t keep(int64_t wanted) {
    if (count_ <= wanted) return count_;
    uint32_t least = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t higher = least | uint32_t{1} << bit;
      if (reach(higher) >= wanted) least = higher;
    }
    int64_t equals = wanted - (least == ~uint32_t{0} ? 0 : reach(least + 1)), to = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool equal = ranks_[i] == least && equals > 0;
      const bool stays = ranks_[i] > least || equal;
      equals -= equal;
      ranks_[to] = ranks_[i];
      keys_[to] = keys_[i];
      to += stays;
    }
    count_ = to;
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
  static int64_t room(int64_t most) { return round_up(2 * most + kBlockKeys, 16); }

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

  // How many candidates rank at least so high.
  int64_t reach(uint32_t least) const {
    int32_t found = 0;
    for (int64_t i = 0; i < count_; ++i) found += ranks_[i] >= least;
    return found;
  }

  uint32_t* ranks_;
  int32_t* keys_;
  int64_t most_, count_;
  float limit_;
};
