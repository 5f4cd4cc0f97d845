// DSA's indexer: the keys of the largest sum_j w_j relu(q_j . k) of every query, scores and choice in one pass.
//
// Index keys are packed once a sequence. A task is a few queries with all their index heads; it walks over blocks of 64
// keys, six queries at a time: products of one head, which the registers hold, are cut at 0, weighed and added to the six
// rows of scores, head by head. A block of scores then goes to the rows' buffers of candidates (best.h) and is forgotten,
// so that no score of a pair is ever written to memory. A score is a sum over channels and then over heads, both in
// ascending order: it depends on its query and its key alone.
//
// Blocking: a block of packed keys is 16 KB at 128 channels of bf16 and stays in the first cache for all rows of the task.

// Rows of a task, a row being a query and an index head: 24 queries of 16 heads are 96 KB of bf16.
constexpr int64_t kIndexRows = 384;

// c (6, strip) += w * relu(a * b), w a number for each row. A NaN stays one.
template <class Math, int kVectors>
ATTNKIT_NOINLINE void add_turned(const typename Math::Element* a, int64_t lda, const typename Math::Element* b,
                                 int64_t steps, const float* w, float* c, int64_t ldc) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
  multiply_strip<Math, kVectors>(a, lda, b, kStrip, steps, acc);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const Vec by = splat(w[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      store(c + i * ldc + j * kWidth, fma(by, max(zero(), acc[i][j]), load(c + i * ldc + j * kWidth)));
  }
}

template <class Math, class T>
class Indexer {
  using Element = typename Math::Element;

 public:
  explicit Indexer(const attnkit_indexer& call)
      : s_(call),
        kv_(packing_call(call, call.n, call.k_n)),
        sizes_(kv_),
        query_steps_(round_up(sizes_.key_steps, kWidth)),
        groups_(clamp<int64_t>(kIndexRows / (kRows * call.h), 1, ceil_div(most<int64_t>(call.m, 1), kRows))),
        queries_(groups_ * kRows),
        tasks_(ceil_div(call.m, queries_)),
        most_(least(call.top, call.n)),
        threads_(useful_threads(kv_, call.b * tasks_)) {}

  int64_t scratch_bytes() const { return s_.g * sizes_.bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    char* const works = scratch + s_.g * sizes_.bytes();
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, works + thread_number() * work_bytes());
      for (int64_t batch = 0; batch < s_.b; ++batch) {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < s_.g * sizes_.key_blocks; ++panel) {
          const int64_t group = panel / sizes_.key_blocks;
          pack_key_block<Math>(kv_, static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g, sizes_,
                               panel % sizes_.key_blocks, keys(scratch, group));
        }
        // Late queries have the most to choose from.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks_; ++task) choose(work, scratch, batch, (tasks_ - 1 - task) * queries_);
      }
    }
  }

 private:
  struct Work {
    Element* queries;  // six rows of query_steps_ for each index head of each group of six queries
    float* weights;    // six for each of these
    float* scores;     // six rows of a block of keys
    Best* best;        // queries_
    char* candidates;  // of each of them
    Work(const Indexer& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          weights(reinterpret_cast<float*>(queries + p.queries_ * p.s_.h * p.query_steps_)),
          scores(weights + p.queries_ * p.s_.h),
          best(reinterpret_cast<Best*>(scores + round_up(kRows * kBlockKeys, 16))),
          candidates(reinterpret_cast<char*>(best + p.queries_)) {}
  };
  int64_t work_bytes() const {
    return round_up(4 * (queries_ * s_.h * (query_steps_ + 1) + round_up(kRows * kBlockKeys, 16)) +
                        queries_ * (static_cast<int64_t>(sizeof(Best)) + Best::bytes(most_)),
                    64);
  }

  Element* keys(char* scratch, int64_t group) const {
    return reinterpret_cast<Element*>(scratch + group * sizes_.bytes());
  }

  void choose(const Work& w, char* scratch, int64_t batch, int64_t first) const {
    const int64_t count = least(queries_, s_.m - first), groups = ceil_div(count, kRows);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t head = 0; head < s_.h; ++head) {
        const int64_t query = first + group * kRows, at = group * s_.h + head, some = count - group * kRows;
        const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + head * s_.q_h + query * s_.q_m;
        pack_queries<Math>(kv_, q, some, kRows, query_steps_, w.queries + at * kRows * query_steps_);
        const float* weights = s_.w + batch * s_.w_b + head * s_.w_h + query * s_.w_m;
        for (int64_t i = 0; i < kRows; ++i) w.weights[at * kRows + i] = i < some ? weights[i * s_.w_m] : 0.0f;
      }
    for (int64_t i = 0; i < count; ++i) w.best[i].begin(w.candidates + i * Best::bytes(most_), most_);
    for (int64_t key = 0; key <= position(first + count - 1); key += kBlockKeys)
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * kRows, end = least(count, begin + kRows);
        if (key > position(first + end - 1)) continue;
        score(w, scratch, group, key);
        for (int64_t i = begin; i < end; ++i)
          w.best[i].add(w.scores + (i - begin) * kBlockKeys, key, bit_range(0, position(first + i) + 1 - key));
      }
    for (int64_t i = 0; i < count; ++i) w.best[i].write(s_.chosen + (batch * s_.m + first + i) * s_.top, s_.top);
  }

  int64_t position(int64_t query) const { return s_.n - s_.m + query; }

  void score(const Work& w, char* scratch, int64_t group, int64_t key) const {
    for (int64_t c = 0; c < kRows * kBlockKeys; c += kWidth) store(w.scores + c, zero());
    for (int64_t head = 0; head < s_.h; ++head) {
      const int64_t at = group * s_.h + head;
      const Element* packed = keys(scratch, head / (s_.h / s_.g));
      for (int64_t c = 0; c < kBlockKeys; c += kStrip)
        add_turned<Math, kStripVectors>(w.queries + at * kRows * query_steps_, query_steps_,
                                        packed + (key + c) * sizes_.key_steps, sizes_.key_steps,
                                        w.weights + at * kRows, w.scores + c, kBlockKeys);
    }
  }

  const attnkit_indexer& s_;
  const attnkit_softmax kv_;
  const PackedSizes<Math> sizes_;
  const int64_t query_steps_;  // of one packed query, whole vectors
  const int64_t groups_;       // of six queries of one task
  const int64_t queries_;      // of one task
  const int64_t tasks_;
  const int64_t most_;         // keys that a query can keep
  const int64_t threads_;
};
