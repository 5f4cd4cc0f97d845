// y = x w^T + bias for few rows x: the linear maps of a model's layers in a decoding step.
//
// A step reads every weight once and does little else, so its time is that of reading them. kWidth outputs are done at a
// time, from as many rows of w, which lie together in some KiB: each has one vector of sums, and the lanes of all of them
// are added up at the end, as in decoding. kGroup rows are walked side by side while those after them are fetched. The
// block is used for each row of x before the next, so w comes from memory once however many rows there are.
//
// bf16 numbers are multiplied in pairs, as they lie, where there is an instruction for it, and widened where there is none.
// The order of a sum depends on d alone: a result has the same bits for any number of rows and threads.

// What one step adds to a vector of sums.
template <class T>
struct Terms {
  static constexpr int64_t kNumbers = kWidth;
  static ATTNKIT_INLINE Vec read(const T* p) { return load(p); }
  static ATTNKIT_INLINE Vec read_first(const T* p, int64_t count) { return load_first(p, static_cast<int>(count)); }
  static ATTNKIT_INLINE Vec add(Vec sum, Vec x, Vec w) { return fma(x, w, sum); }
};

#if defined(ATTNKIT_BF16_DOT)
template <>
struct Terms<BFloat16> {
  static constexpr int64_t kNumbers = 2 * kWidth;
  static ATTNKIT_INLINE Pairs read(const BFloat16* p) { return load_pairs(reinterpret_cast<const uint32_t*>(p)); }
  static ATTNKIT_INLINE Pairs read_first(const BFloat16* p, int64_t count) {
    return load_pairs_first(p, static_cast<int>(count));
  }
  static ATTNKIT_INLINE Vec add(Vec sum, Pairs x, Pairs w) { return dot_pairs(sum, x, w); }
};
#endif

template <class T>
class Projection {
 public:
  explicit Projection(const attnkit_projection& p) : p_(p), blocks_(ceil_div(p.n, kWidth)) {
    const double bytes = static_cast<double>(p.n) * static_cast<double>(p.d) * static_cast<double>(sizeof(T));
    threads_ = bytes < kWorthTwo ? 1 : clamp<int64_t>(blocks_, 1, available_threads(p.threads));
  }

  void run() const {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    for (int64_t block = 0; block < blocks_; ++block) outputs(block * kWidth);
  }

 private:
  static constexpr int kGroup = 4;
  // Rows from one that is read to the one fetched meanwhile, into the second cache. A Zen 4 core, shared with others, read
  // 19 GB/s of a model's weights so, 17 with 4 rows, 18 with 32, and 10 without.
  static constexpr int64_t kAhead = 16;
  // Bytes of weights below which one thread is done sooner alone, on a Zen 4.
  static constexpr double kWorthTwo = 1 << 18;

  // Outputs [from, from + kWidth) of every row, or as many as there are.
  void outputs(int64_t from) const {
    const int64_t count = least<int64_t>(kWidth, p_.n - from);
    const Vec bias = p_.bias ? load_some(static_cast<const T*>(p_.bias) + from, count) : zero();
    for (int64_t row = 0; row < p_.m; ++row) {
      const T* const x = static_cast<const T*>(p_.x) + row * p_.x_m;
      Vec sums[kWidth];
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; i += kGroup) group(x, from + i, sums + i);
      store_some(static_cast<T*>(p_.y) + row * p_.y_m + from, sum_each(sums) + bias, count);
    }
  }

  // Sums of x with the rows of w from `first` on; past the last row it is taken again.
  ATTNKIT_INLINE void group(const T* x, int64_t first, Vec* sums) const {
    using Step = Terms<T>;
    const T* rows[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      rows[i] = static_cast<const T*>(p_.w) + least(first + i, p_.n - 1) * p_.w_n;
      sums[i] = zero();
    }
    const int64_t ahead = kAhead * p_.w_n;
    int64_t c = 0;
    for (; c + Step::kNumbers <= p_.d; c += Step::kNumbers) {
      const auto numbers = Step::read(x + c);
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        __builtin_prefetch(rows[i] + c + ahead, 0, 2);
        sums[i] = Step::add(sums[i], numbers, Step::read(rows[i] + c));
      }
    }
    if (c == p_.d) return;
    const auto numbers = Step::read_first(x + c, p_.d - c);
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i)
      sums[i] = Step::add(sums[i], numbers, Step::read_first(rows[i] + c, p_.d - c));
  }

  const attnkit_projection& p_;
  int64_t blocks_, threads_;
};
