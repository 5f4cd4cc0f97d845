// MoBA's gates and choice: the past blocks whose mean key agrees best with a query, of equals the earlier.
//
// The means of a KV head, one row for each block of keys, are packed as keys are. Six queries of a head at a time meet
// all means before their own block, and each keeps a list of its best (best.h). Gates are float32 whatever queries are:
// there is one for hundreds of keys, and a rounded one would choose at random among near ones.

template <class Math, class T>
class Gates {
  static_assert(Math::kNumbers == 1, "gates are float32");

 public:
  explicit Gates(const attnkit_gates& call)
      : s_(call),
        kv_(packing_call(call, call.c, call.d)),
        sizes_(kv_),
        query_steps_(round_up(call.d, kWidth)),
        groups_(ceil_div(call.m, kRows)),
        threads_(useful_threads(kv_, call.b * call.h * groups_)) {}

  int64_t scratch_bytes() const { return s_.b * s_.g * sizes_.bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    char* const works = scratch + s_.b * s_.g * sizes_.bytes();
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      char* const work = works + thread_number() * work_bytes();
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < s_.b * s_.g * sizes_.key_blocks; ++panel) {
        const int64_t head = panel / sizes_.key_blocks;
        pack_key_block<Math>(kv_, s_.means + head * s_.c * s_.d, sizes_, panel % sizes_.key_blocks, keys(scratch, head));
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < s_.b * s_.h * groups_; ++task)
        choose(work, scratch, task / groups_, task % groups_ * kRows);
    }
  }

 private:
  int64_t work_bytes() const {
    return round_up(4 * kRows * (query_steps_ + kBlockKeys) + kRows * Best::bytes(s_.s), 64);
  }
  float* keys(char* scratch, int64_t head) const { return reinterpret_cast<float*>(scratch + head * sizes_.bytes()); }

  // Complete blocks before the one that query `i` stands in.
  int64_t past(int64_t i) const { return least((s_.n - s_.m + i) / s_.block, s_.c); }

  void choose(char* memory, char* scratch, int64_t head, int64_t first) const {
    float* const queries = reinterpret_cast<float*>(memory);
    float* const scores = queries + kRows * query_steps_;
    char* const candidates = reinterpret_cast<char*>(scores + kRows * kBlockKeys);
    const int64_t count = least<int64_t>(kRows, s_.m - first), batch = head / s_.h;
    const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + head % s_.h * s_.q_h + first * s_.q_m;
    pack_queries<Math>(kv_, q, count, kRows, query_steps_, queries);
    Best best[kRows];
    for (int64_t i = 0; i < count; ++i) best[i].begin(candidates + i * Best::bytes(s_.s), s_.s);
    const float* packed = keys(scratch, batch * s_.g + head % s_.h / (s_.h / s_.g));
    for (int64_t block = 0; block < past(first + count - 1); block += kBlockKeys) {
      for (int64_t c = 0; c < kBlockKeys; c += kStrip)
        product<Math, kStripVectors>(queries, query_steps_, packed + (block + c) * sizes_.key_steps, sizes_.key_steps,
                                     1.0f, scores + c, kBlockKeys, [](int, int, Vec) {});
      for (int64_t i = 0; i < count; ++i)
        best[i].add(scores + i * kBlockKeys, block, bit_range(0, past(first + i) - block));
    }
    for (int64_t i = 0; i < count; ++i) best[i].write(s_.chosen + (head * s_.m + first + i) * s_.s, s_.s);
  }

  const attnkit_gates& s_;
  const attnkit_softmax kv_;
  const PackedSizes<Math> sizes_;
  const int64_t query_steps_;
  const int64_t groups_;  // of six queries of a head
  const int64_t threads_;
};
