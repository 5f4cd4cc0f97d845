// y = x cos + (-x2, x1) sin: rotary positions of queries or keys, in one pass.
//
// Written as tensor operations this takes seven, each with a result in memory of its own. Here a token's cosines and sines
// stay in the first cache for all of its heads, which lie side by side in a model; both halves of a row are read once, worked
// on in float32 and rounded once.

template <class T>
class Rotation {
 public:
  explicit Rotation(const attnkit_rotation& r) : r_(r), tokens_(r.b * r.m) {
    const double numbers = static_cast<double>(tokens_) * static_cast<double>(r.h) * static_cast<double>(r.d);
    threads_ = numbers < kWorthTwo ? 1 : clamp<int64_t>(tokens_, 1, available_threads(r.threads));
  }

  void run() const {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    for (int64_t token = 0; token < tokens_; ++token) {
      const int64_t b = token / r_.m, i = token % r_.m;
      const T* const cos = static_cast<const T*>(r_.cos) + b * r_.cos_b + i * r_.cos_m;
      const T* const sin = static_cast<const T*>(r_.sin) + b * r_.sin_b + i * r_.sin_m;
      const T* x = static_cast<const T*>(r_.x) + b * r_.x_b + i * r_.x_m;
      T* y = static_cast<T*>(r_.y) + b * r_.y_b + i * r_.y_m;
      for (int64_t h = 0; h < r_.h; ++h, x += r_.x_h, y += r_.y_h) row(x, cos, sin, y);
    }
  }

 private:
  // Numbers below which one thread is done sooner alone, on a Zen 4.
  static constexpr double kWorthTwo = 1 << 16;

  ATTNKIT_INLINE void row(const T* x, const T* cos, const T* sin, T* y) const {
    const int64_t half = r_.d / 2;
    for (int64_t c = 0; c < half; c += kWidth) {
      const int64_t count = half - c;
      const Vec first = load_some(x + c, count), second = load_some(x + half + c, count);
      const Vec low = first * load_some(cos + c, count) - second * load_some(sin + c, count);
      const Vec high = second * load_some(cos + half + c, count) + first * load_some(sin + half + c, count);
      store_some(y + c, low, count);
      store_some(y + half + c, high, count);
    }
  }

  const attnkit_rotation& r_;
  int64_t tokens_, threads_;
};
