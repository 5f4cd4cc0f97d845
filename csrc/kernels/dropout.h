// Which weights dropout keeps: the bits of attnkit.noise, made again wherever a pair of query and key is met.
//
// They are a hash of seed, batch, head and the positions of query and key, so that tiles, threads, the order of work and the
// backward pass draw the same ones, each for itself, and none is stored. Seed, batch, head and query are hashed once a row;
// a pair then costs one round of SplitMix64's finaliser (Steele, Lea and Flood 2014): two products of 64 bits, of which a
// vector holds half as many as it holds floats. A weight is kept when its upper 24 bits are not below a limit.

// All of a round but its last step, x ^ x >> 31, which leaves the upper 31 bits as they are.
template <class X>
ATTNKIT_INLINE X stir(X x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  return (x ^ x >> 27) * 0x94d049bb133111ebu;
}

struct Dropout {
  const attnkit_softmax& s;
  const bool drops;
  const uint64_t limit;
  const float scale;  // of weights that are kept

  explicit Dropout(const attnkit_softmax& call)
      : s(call),
        drops(call.drop_below > 0),
        limit(static_cast<uint64_t>(call.drop_below) << 40),
        scale(drops ? call.keep_scale : 1.0f) {}

  static ATTNKIT_INLINE uint64_t mix(uint64_t x) {
    x = stir(x);
    return x ^ x >> 31;
  }
  uint64_t of_head(int64_t batch, int64_t head) const {
    return mix(mix(mix(static_cast<uint64_t>(s.seed)) ^ static_cast<uint64_t>(batch)) ^ static_cast<uint64_t>(head));
  }
  // Of query i, from what its head has.
  ATTNKIT_INLINE uint64_t of_row(uint64_t head, int64_t i) const { return mix(head ^ static_cast<uint64_t>(s.n - s.m + i)); }

  // Bit j: the row keeps its weight of key + j. The key is a multiple of kWidth, so that adding j is the same as xor.
  ATTNKIT_INLINE Bits kept(uint64_t row, int64_t key) const {
    Longs low, high;
    for (int j = 0; j < kWidth / 2; ++j) low[j] = static_cast<uint64_t>(j), high[j] = static_cast<uint64_t>(kWidth / 2 + j);
    const uint64_t start = row ^ static_cast<uint64_t>(key);
    return ~bits_below(stir(low ^ start), stir(high ^ start), limit);
  }
};
