// Threads of a call. Results never depend on their number.

ATTNKIT_INLINE int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

ATTNKIT_INLINE int64_t available_threads(int64_t wanted) {
#if defined(_OPENMP)
  return most<int64_t>(wanted, 1);
#else
  return (void)wanted, 1;
#endif
}

// Starting a second thread costs a few microseconds: work below this many multiply-adds is done sooner alone.
constexpr double kWorthAThread = 1e6;

inline int64_t useful_threads(const attnkit_softmax& s, int64_t tasks) {
  const double work = static_cast<double>(s.b * s.h) * static_cast<double>(s.m) * static_cast<double>(s.n) *
                      static_cast<double>(s.d + s.e);
  return work < kWorthAThread ? 1 : clamp<int64_t>(tasks, 1, available_threads(s.threads));
}
