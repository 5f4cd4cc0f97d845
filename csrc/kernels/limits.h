// What this machine can do at most, measured through the same instructions as the kernels.

inline double now_seconds() {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Best rate of `work` (a function of the thread number) over `seconds`; amount is what all threads do in one round.
template <class F>
double best_rate(int64_t threads, double seconds, double amount, F work) {
  double best = 0.0;
  const double deadline = now_seconds() + seconds;
  do {
    const double start = now_seconds();
#pragma omp parallel num_threads(static_cast<int>(threads))
    work(thread_number());
    best = most(best, amount / (now_seconds() - start));
  } while (now_seconds() < deadline);
  return best * 1e-9;
}

constexpr int64_t kSteps = 1 << 19;
constexpr int kChains = kWidth == 16 ? 24 : 12;  // independent, to cover the latency of an instruction; fit the registers

ATTNKIT_NOINLINE inline float run_fma(float seed) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = splat(static_cast<float>(i));
  const Vec a = splat(seed), b = splat(0.25f);
  for (int64_t s = 0; s < kSteps; ++s)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = fma(a, acc[i], b);
  for (int i = 1; i < kChains; ++i) acc[0] = acc[0] + acc[i];
  return sum(acc[0]);
}

inline double fma_gflops(int64_t threads, double seconds) {
  threads = available_threads(threads);
  const double flops = 2.0 * kWidth * kChains * kSteps * static_cast<double>(threads);
  volatile float seed = 0.5f, sink = 0.0f;
  return best_rate(threads, seconds, flops, [&](int64_t) { sink = run_fma(seed); });
}

#if defined(ATTNKIT_BF16_DOT)
ATTNKIT_NOINLINE inline float run_dot(uint32_t seed) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = splat(static_cast<float>(i));
  const Pairs a = splat_pair(seed);
  for (int64_t s = 0; s < kSteps; ++s)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = dot_pairs(acc[i], a, a);
  for (int i = 1; i < kChains; ++i) acc[0] = acc[0] + acc[i];
  return sum(acc[0]);
}
#endif

inline double bf16_dot_gflops(int64_t threads, double seconds) {
#if defined(ATTNKIT_BF16_DOT)
  threads = available_threads(threads);
  const double flops = 4.0 * kWidth * kChains * kSteps * static_cast<double>(threads);
  volatile uint32_t seed = 0x3f803f80;
  volatile float sink = 0.0f;
  return best_rate(threads, seconds, flops, [&](int64_t) { sink = run_dot(seed); });
#else
  (void)threads, (void)seconds;
  return 0.0;
#endif
}

ATTNKIT_NOINLINE inline float read_all(const float* p, int64_t floats) {
  Vec acc[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) acc[i] = zero();
  for (int64_t j = 0; j + 8 * kWidth <= floats; j += 8 * kWidth)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[i] = acc[i] + load(p + j + i * kWidth);
  for (int i = 1; i < 8; ++i) acc[0] = acc[0] + acc[i];
  return sum(acc[0]);
}

inline double read_gigabytes(const void* buffer, int64_t bytes, int64_t threads, double seconds) {
  threads = available_threads(threads);
  const int64_t floats = bytes / 4 / threads;
  volatile float sink = 0.0f;
  return best_rate(threads, seconds, 4.0 * static_cast<double>(floats * threads), [&](int64_t thread) {
    sink = read_all(static_cast<const float*>(buffer) + thread * floats, floats);
  });
}
