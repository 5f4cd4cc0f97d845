// The few functions of OpenMP's runtime that the kernels use, over std::thread, for the build under the thread sanitizer.
//
// That sanitizer sees the barriers of a runtime it compiled and nothing of the system's libgomp, so that every array filled
// before a barrier and read after it would be reported. Compiled with -fopenmp and linked with this file instead of
// -fopenmp, the kernels run as they always do, and what is left to report is real. A kernel that uses another clause
// of OpenMP fails to link, with the name of the function that is missing here. Empty in every other build.
#if defined(__SANITIZE_THREAD__)
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// One parallel region: a barrier, and the loops that are being shared out.
class Team {
 public:
  explicit Team(int size) : size_(size), taken_(kMostLoops) {}
  int size() const { return size_; }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turns_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++turns_;
      moved_.notify_all();
    }
    moved_.wait(lock, [&] { return turn != turns_; });
  }

  // The next chunk of loop `number`, or how many came to a `single` before. Threads may be in different loops where no one
  // waits at the end. Relaxed, because a
  // kernel must not count on sharing out a loop to order anything: a lock here would hide its races.
  int64_t take(size_t number) {
    if (number >= kMostLoops) std::abort();
    return taken_[number].fetch_add(1, std::memory_order_relaxed);
  }

 private:
  static constexpr size_t kMostLoops = 1 << 14;
  const int size_;
  std::mutex mutex_;
  std::condition_variable moved_;
  int waiting_ = 0;
  int64_t turns_ = 0;
  std::vector<std::atomic<int64_t>> taken_;
};

// What one thread knows of the region it is in.
struct Place {
  Team* team = nullptr;
  int number = 0;
  size_t loops = 0;  // that it has begun, and places for one thread that it has come to
  int64_t alone = 0;  // chunks taken of a loop outside of any region
  long begin = 0, end = 0, step = 1, chunk = 1;
};
thread_local Place here;

bool next(long* from, long* to) {
  const int64_t chunk = here.team ? here.team->take(here.loops - 1) : here.alone++;
  const long length = here.end - here.begin, step = here.step * here.chunk;
  const long first = chunk * step;
  if (step > 0 ? first >= length : first <= length) return false;
  *from = here.begin + first;
  *to = (step > 0 ? first + step < length : first + step > length) ? *from + step : here.end;
  return true;
}

bool start(long begin, long end, long step, long chunk, long* from, long* to) {
  here.begin = begin, here.end = end, here.step = step, here.chunk = chunk;
  here.alone = 0;
  ++here.loops;
  return next(from, to);
}

void run(Team* team, int number, void (*body)(void*), void* data) {
  const Place before = here;
  here = {};
  here.team = team, here.number = number;
  body(data);
  here = before;
}

}  // namespace

extern "C" {
int omp_get_thread_num(void) { return here.number; }
int omp_get_num_threads(void) { return here.team ? here.team->size() : 1; }
int omp_get_max_threads(void) { return 4; }
int omp_in_parallel(void) { return here.team != nullptr; }

void GOMP_barrier(void) {
  if (here.team) here.team->wait();
}
bool GOMP_single_start(void) { return !here.team || here.team->take(here.loops++) == 0; }
void GOMP_parallel(void (*body)(void*), void* data, unsigned wanted, unsigned) {
  // As libgomp does it: a region inside another has one thread.
  const int size = here.team ? 1 : wanted ? static_cast<int>(wanted) : omp_get_max_threads();
  Team team(size);
  std::vector<std::thread> others;
  for (int i = 1; i < size; ++i) others.emplace_back([&, i] { run(&team, i, body, data); });
  run(&team, 0, body, data);
  for (std::thread& thread : others) thread.join();
}

bool GOMP_loop_dynamic_start(long begin, long end, long step, long chunk, long* from, long* to) {
  return start(begin, end, step, chunk, from, to);
}
bool GOMP_loop_dynamic_next(long* from, long* to) { return next(from, to); }
bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* from, long* to) {
  return start(begin, end, step, chunk, from, to);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return next(from, to); }
// How many turns a thread takes at a time is nothing to results: guided loops are shared out as dynamic ones.
bool GOMP_loop_nonmonotonic_guided_start(long begin, long end, long step, long chunk, long* from, long* to) {
  return GOMP_loop_dynamic_start(begin, end, step, chunk, from, to);
}
bool GOMP_loop_nonmonotonic_guided_next(long* from, long* to) { return next(from, to); }
void GOMP_loop_end(void) { GOMP_barrier(); }
void GOMP_loop_end_nowait(void) {}

// `parallel for`: gcc 12 calls these with the bounds, then the body asks for the next part with ..._next alone.
void GOMP_parallel_loop_dynamic(void (*body)(void*), void* data, unsigned wanted, long begin, long end, long step, long chunk,
                                unsigned flags);
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned wanted, long begin, long end, long step,
                                             long chunk, unsigned flags);
}

namespace {
struct Bounds {
  void (*body)(void*);
  void* data;
  long begin, end, step, chunk;
};
void loop_body(void* p) {
  const Bounds& bounds = *static_cast<Bounds*>(p);
  here.begin = bounds.begin, here.end = bounds.end, here.step = bounds.step, here.chunk = bounds.chunk;
  here.loops = 1;
  bounds.body(bounds.data);
}
}  // namespace

void GOMP_parallel_loop_dynamic(void (*body)(void*), void* data, unsigned wanted, long begin, long end, long step, long chunk,
                                unsigned flags) {
  Bounds bounds = {body, data, begin, end, step, chunk};
  GOMP_parallel(loop_body, &bounds, wanted, flags);
}
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned wanted, long begin, long end, long step,
                                             long chunk, unsigned flags) {
  GOMP_parallel_loop_dynamic(body, data, wanted, begin, end, step, chunk, flags);
}
#endif
