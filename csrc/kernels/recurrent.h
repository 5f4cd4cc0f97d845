// The forward pass over chunks, one state a task, and the single token of decoding.
//
// For each chunk: the keys' own scores and the solved u with the delta rule, u = v without; for each query head that reads
// the state, scores, what is read from the state and what the scores take of u; then the state moves on. A state's tokens
// are one chain, so tasks are states; nothing depends on how they are shared out among threads.

// A call below this many multiply-adds is done sooner by one thread.
ATTNKIT_INLINE int64_t linear_threads(const attnkit_linear& c) {
  const double work = static_cast<double>(c.b * c.h) * static_cast<double>(c.n) * static_cast<double>(c.d + kChunk) *
                      static_cast<double>(c.e);
  return work < kWorthAThread ? 1 : clamp<int64_t>(c.b * c.s, 1, available_threads(c.threads));
}

// State (d, e) between the caller's tensor and rows of whole vectors; null is zeros.
inline void load_state(const attnkit_linear& c, const float* from, float* to, int64_t rows, int64_t le) {
  const int64_t e = state_columns(c);
  load_rows(from, e, from ? c.d : 0, e, 1.0f, to, le, rows);
}

template <class T>
class Recurrent {
 public:
  explicit Recurrent(const attnkit_linear& call) : c_(call), threads_(linear_threads(call)), bytes_(work_bytes()) {}

  int64_t scratch_bytes() const { return threads_ * bytes_; }

  void run(char* scratch) const {
    const int64_t units = c_.b * c_.s;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      Arena arena{reinterpret_cast<float*>(scratch + thread_number() * bytes_)};
      Work work(c_, arena);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < units; ++i) walk(work, Unit(c_, i));
    }
  }

 private:
  struct Work {
    Chunk<T> chunk;
    float *q, *o, *u, *r, *state, *scores, *system;
    Work(const attnkit_linear& c, Arena& arena) : chunk(c, arena) {
      q = arena.take(kChunk * chunk.ld);
      o = arena.take(kChunk * chunk.le);
      u = arena.take(c.beta ? kChunk * chunk.le : 0);
      r = arena.take(c.beta ? kChunk * chunk.le : 0);
      system = arena.take(c.beta ? kChunk * kChunk : 0);
      state = arena.take(chunk.ld * chunk.le);
      scores = arena.take(kChunk * kChunk);
    }
  };

  int64_t work_bytes() const {
    Arena arena{nullptr};
    Work work(c_, arena);
    return arena.used * static_cast<int64_t>(sizeof(float));
  }

  void walk(Work& w, const Unit& unit) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t past = c_.n - c_.m, size = c_.d * chunk.e;
    load_state(c_, c_.state ? c_.state + unit.number * size : nullptr, w.state, chunk.ld, chunk.le);
    int64_t counted = c_.n;
    for (int64_t first = 0; first < c_.n; first += kChunk) {
      if (c_.states) keep_state(w, unit, first);
      const bool all = chunk.load_tokens(unit, first, least(kChunk, c_.n - first), false);
      const int64_t later = least(kChunk, c_.n - first - kChunk);
      if (later > 0) chunk.expect_tokens(unit, first + kChunk, later);
      const float* u = chunk.v;
      if (c_.beta) {
        chunk.solve(w.state, w.system, w.r, w.u);
        u = w.u;
      }
      if (first + chunk.size > past)
        for (int64_t i = 0; i < c_.h / c_.s; ++i) answer(w, unit, i, u);
      chunk.weigh_keys();
      chunk.advance(u, w.state);
      if (!all) {
        counted = first + chunk.size;
        break;
      }
    }
    if (c_.lawful) c_.lawful[unit.number] = counted;
    if (counted < c_.n) spoil(w, unit, counted);
    if (c_.last) store_rows(w.state, chunk.le, c_.d, chunk.e, c_.last + unit.number * size, chunk.e);
  }

  // The state before a span, for the backward pass; where it goes is fetched in the chunk before.
  void keep_state(Work& w, const Unit& unit, int64_t first) const {
    const int64_t e = w.chunk.e, next = first + kChunk;
    if (first % kSpan == 0) store_rows(w.state, w.chunk.le, c_.d, e, kept_state(c_, unit.number, first / kSpan), e);
    if (next % kSpan == 0 && next < c_.n)
      w.chunk.ahead.set(Ahead::kState, kept_state(c_, unit.number, next / kSpan), e, e, c_.d);
  }

  // Results of the chunk for query head i of the state.
  void answer(Work& w, const Unit& unit, int64_t i, const float* u) const {
    Chunk<T>& chunk = w.chunk;
    const Asked asked(c_, unit, i, chunk.first, chunk.size);
    T* o = static_cast<T*>(c_.o) + asked.place(c_) * c_.e;
    chunk.load_queries(asked, w.q);
    chunk.ahead.set(Ahead::kResults, o, c_.e, c_.e, asked.count);
    expect_queries(chunk, unit, i);
    chunk.scores(w.q, true, 1.0f, w.scores);
    chunk.read(w.q, w.state, w.o);
    multiply<Part::kStepsUpTo>(chunk.size, chunk.e, chunk.size, rows_of(w.scores, kChunk), u, chunk.le, w.o, chunk.le,
                               chunk.fade(), &chunk.ahead);
    float* rows = w.o + asked.skip * chunk.le;
    if (c_.total) divide(chunk, rows, asked.count, c_.total + asked.place(c_));
    store_rows(rows, chunk.le, asked.count, c_.e, o, c_.e);
  }

  // Sums as means: by what stands after the e numbers, which is kept.
  void divide(const Chunk<T>& chunk, float* rows, int64_t count, float* totals) const {
    for (int64_t i = 0; i < count; ++i, rows += chunk.le) {
      totals[i] = rows[c_.e];
      const Vec factor = splat(totals[i] == 0.0f ? 1.0f : 1.0f / totals[i]);
      for (int64_t j = 0; j < c_.e; j += kWidth) store(rows + j, load(rows + j) * factor);
    }
  }

  // Those after head i's are the next head's, or the first head's in the next chunk.
  void expect_queries(Chunk<T>& chunk, const Unit& unit, int64_t i) const {
    const int64_t later = chunk.first + kChunk;
    if (i + 1 < c_.h / c_.s) {
      chunk.expect_queries(Asked(c_, unit, i + 1, chunk.first, chunk.size));
    } else if (later < c_.n) {
      chunk.expect_queries(Asked(c_, unit, 0, later, least(kChunk, c_.n - later)));
    }
  }

  // NaN from the first token on that is no step of a delta rule, and in the state.
  void spoil(Work& w, const Unit& unit, int64_t counted) const {
    const int64_t le = w.chunk.le;
    const Vec nan = splat(__builtin_nanf(""));
    for (int64_t j = 0; j < w.chunk.ld * le; j += kWidth) store(w.state + j, nan);
    for (int64_t i = 0; i < c_.h / c_.s; ++i) {
      const int64_t head = unit.state * (c_.h / c_.s) + i;
      for (int64_t row = counted; row < c_.n; ++row)
        store_rows(w.state, le, 1, c_.e, static_cast<T*>(c_.o) + ((unit.batch * c_.h + head) * c_.m + row) * c_.e, c_.e);
    }
  }

  const attnkit_linear& c_;
  const int64_t threads_, bytes_;
};
