// Top-k attention: every query over the best of the keys that it may see, which are found on the way.
//
// Keys are packed once a KV head. A task is a block of 48 queries of one head; it walks over the key blocks that its mask
// lists, six rows at a time: scores of 64 keys, which go to the rows' buffers of candidates (best.h) and are forgotten.
// A candidate keeps its score, so what is left at the end needs no second product: its weights, and its values, which
// are read where they lie, each row its own. No number of a pair is ever written to memory, and a row's operations depend
// on its query and the keys that it sees alone.
//
// All visible pairs have to be looked at, half the multiply-adds of dense attention, but few keys are near a row's limit.
// Where byte products exist and few keys are kept, they tell which ones (bounds.h): a quarter of the cost of float32, half
// that of bf16. The keys left wait in a list for each row and are scored 16 at a time, gathered; these are then all scores
// there are, so that who is kept and at what weight does not depend on the bounds.

template <class Math, class T>
class TopK {
  using Element = typename Math::Element;
  static constexpr int64_t kAhead = 4;  // rows of values that are fetched ahead
#if defined(ATTNKIT_BYTE_DOT)
  static constexpr bool kHasBounds = true;
#else
  static constexpr bool kHasBounds = false;
#endif
  // Bounds pay where no more than a key in so many is kept.
  static constexpr int64_t kFewKept = 64;
  static constexpr int64_t kWaiting = kBlockKeys + kWidth;  // keys that may wait for a row

 public:
  TopK(const attnkit_softmax& call, const attnkit_topk& kept)
      : s_(call),
        kept_(kept),
        sizes_(keys_only(call)),
        query_blocks_(ceil_div(call.m, kBlockQueries)),
        query_steps_(round_up(sizes_.key_steps, kWidth)),
        most_(kept.most),
        bounded_(kHasBounds && kept.most * kFewKept <= call.n),
        threads_(useful_threads(call, call.b * call.h * query_blocks_)) {}

  int64_t scratch_bytes() const { return key_bytes() + threads_ * work_bytes(); }

  void run(char* scratch) const {
    char* const keys = scratch;
    char* const works = scratch + key_bytes();
    const int64_t ratio = s_.h / s_.g;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, works + thread_number() * work_bytes());
      for (int64_t head = 0; head < s_.b * s_.g; ++head) {
        const int64_t batch = head / s_.g, group = head % s_.g;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < sizes_.key_blocks; ++panel) pack(keys, batch, group, panel);
        // Late queries have the most to choose from.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < ratio * query_blocks_; ++task)
          attend(work, keys, batch, group * ratio + task / query_blocks_, query_blocks_ - 1 - task % query_blocks_);
      }
    }
  }

 private:
  struct Work {
    Element* queries;  // 48 rows of query_steps_
    float* scores;     // six rows of a block of keys; then the weights of one row
    float* sums;       // of one row: columns of a strip
    int64_t* visible;  // 48: keys that a row was shown
    Best* best;        // 48
    char* candidates;  // of each of them
    char* bounds;      // of the 48 rows
    int32_t* waiting;  // 48 lists of keys to be scored
    int64_t* count;    // 48: how long they are
    Work(const TopK& p, char* memory)
        : queries(reinterpret_cast<Element*>(memory)),
          scores(reinterpret_cast<float*>(queries + kBlockQueries * p.query_steps_)),
          sums(scores + p.score_floats()),
          visible(reinterpret_cast<int64_t*>(sums + kStrip)),
          best(reinterpret_cast<Best*>(visible + kBlockQueries)),
          candidates(reinterpret_cast<char*>(best + kBlockQueries)),
          bounds(candidates + kBlockQueries * Best::bytes(p.most_)),
          waiting(reinterpret_cast<int32_t*>(bounds + p.bound_bytes())),
          count(reinterpret_cast<int64_t*>(waiting + kBlockQueries * kWaiting)) {}
  };
  int64_t score_floats() const { return most(kRows * kBlockKeys, round_up(most_, kBlockKeys)); }
  int64_t work_bytes() const {
    return round_up(4 * (kBlockQueries * query_steps_ + score_floats() + kStrip) +
                        kBlockQueries * (8 + static_cast<int64_t>(sizeof(Best)) + Best::bytes(most_)) + bound_bytes() +
                        kBlockQueries * (4 * kWaiting + 8),
                    64);
  }
  static PackedSizes<Math> keys_only(attnkit_softmax call) {
    call.e = 0;
    return PackedSizes<Math>(call);
  }

#if defined(ATTNKIT_BYTE_DOT)
  int64_t key_bytes() const {
    return bounded_ ? round_up(sizes_.key_blocks * Bounds::block_bytes(s_.d), 64) : sizes_.bytes();
  }
  int64_t bound_bytes() const { return bounded_ ? Bounds::row_bytes(s_.d) : 0; }
#else
  int64_t key_bytes() const { return sizes_.bytes(); }
  int64_t bound_bytes() const { return 0; }
#endif
  const T* stored_keys(int64_t batch, int64_t group) const {
    return static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g;
  }

  void pack(char* keys, int64_t batch, int64_t group, int64_t panel) const {
#if defined(ATTNKIT_BYTE_DOT)
    if (bounded_)
      return Bounds::pack(s_, stored_keys(batch, group), panel,
                          reinterpret_cast<uint8_t*>(keys + panel * Bounds::block_bytes(s_.d)));
#endif
    pack_key_block<Math>(s_, stored_keys(batch, group), sizes_, panel, reinterpret_cast<Element*>(keys));
  }

  void attend(const Work& w, const char* keys, int64_t batch, int64_t head, int64_t block) const {
    const int64_t first = block * kBlockQueries, count = least(kBlockQueries, s_.m - first);
    const T* q = static_cast<const T*>(s_.q) + batch * s_.q_b + head * s_.q_h + first * s_.q_m;
    pack_queries<Math>(s_, q, count, round_up(count, kRows), query_steps_, w.queries);
    for (int64_t i = 0; i < count; ++i) {
      w.visible[i] = 0;
      w.best[i].begin(w.candidates + i * Best::bytes(most_), most_);
    }
    const Range seen = {visible_range(s_, first).begin, visible_range(s_, first + count - 1).end};
    const KeyBlocks blocks(s_, batch, head, block, seen);
    if (bounded_) {
      look(w, keys, q, stored_keys(batch, head / (s_.h / s_.g)), first, count, blocks);
    } else {
      for (int64_t entry = blocks.entry; entry < blocks.entry_end; ++entry)
        for (int64_t row = 0; row < count; row += kRows)
          score(w, reinterpret_cast<const Element*>(keys), first, row, least<int64_t>(kRows, count - row),
                blocks.key_block(entry), blocks.words(entry));
    }
    for (int64_t i = 0; i < count; ++i) finish(w, batch, head, first, i);
  }

#if defined(ATTNKIT_BYTE_DOT)
  // Every block against its rows, six at a time; what bounds leave of it waits until 16 keys of a row do.
  void look(const Work& w, const char* keys, const T* q, const T* stored, int64_t first, int64_t count,
            const KeyBlocks& blocks) const {
    const Bounds bounds(w.bounds, s_.d);
    for (int64_t i = 0; i < round_up(count, kRows); ++i) {
      w.count[i] = 0;
      if (i < count) {
        bounds.take(i, q + i * s_.q_m, s_.scale);
      } else {
        bounds.clear(i);
      }
    }
    for (int64_t entry = blocks.entry; entry < blocks.entry_end; ++entry) {
      const int64_t block = blocks.key_block(entry);
      const uint8_t* packed = reinterpret_cast<const uint8_t*>(keys + block * Bounds::block_bytes(s_.d));
      for (int64_t row = 0; row < count; row += kRows) {
        uint64_t word[kRows] = {}, above[kRows], any = 0;
        const int64_t some = least<int64_t>(kRows, count - row);
        if (!blocks.words(entry) && whole(first + row, first + row + some - 1, block)) {
          for (int64_t i = 0; i < some; ++i) any |= word[i] = kAll;
        } else {
          for (int64_t i = 0; i < some; ++i) any |= word[i] = visible_word(s_, first + row + i, block, blocks.words(entry));
        }
        if (any == 0) continue;
        bounds.above(row, packed, above);
        for (int64_t i = 0; i < some; ++i) {
          w.visible[row + i] += __builtin_popcountll(word[i]);
          if (const uint64_t left = word[i] & above[i]) wait(w, bounds, stored, row + i, block * kBlockKeys, left);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) score_waiting(w, stored, i, 0, w.count[i]);
  }

  // Whether neighbouring queries see all of a block through the interval.
  bool whole(int64_t first, int64_t last, int64_t block) const {
    const int64_t key = block * kBlockKeys;
    return visible_range(s_, last).begin <= key && visible_range(s_, first).end >= key + kBlockKeys;
  }

  void wait(const Work& w, const Bounds& bounds, const T* stored, int64_t row, int64_t key, uint64_t some) const {
    int32_t* const waiting = w.waiting + row * kWaiting;
    int64_t count = w.count[row], done = 0;
    for (; some != 0; some &= some - 1) {
      const int64_t at = key + __builtin_ctzll(some);
      prefetch_row(stored + at * s_.k_n, s_.d);
      waiting[count++] = static_cast<int32_t>(at);
    }
    for (; count - done >= kWidth; done += kWidth) score_waiting(w, stored, row, done, done + kWidth);
    if (done > 0) {
      bounds.set_limit(row, w.best[row].limit());
      for (int64_t i = done; i < count; ++i) waiting[i - done] = waiting[i];
    }
    w.count[row] = count - done;
  }

  // Scores of up to 16 keys that wait: a key in a register of its own, whose lanes are added at the end.
  void score_waiting(const Work& w, const T* stored, int64_t row, int64_t begin, int64_t end) const {
    if (begin == end) return;
    const int32_t* keys = w.waiting + row * kWaiting;
    const Element* query = w.queries + row * query_steps_;
    const T* at[kWidth];
    Vec acc[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      at[i] = stored + keys[least(begin + i, end - 1)] * s_.k_n;
      acc[i] = zero();
    }
    for (int64_t step = 0; step < sizes_.key_steps; step += kWidth) {
      const auto asked = Math::load_row(query + step);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const Vec key = load_steps<Math>(at[i], step, s_.d);
        if constexpr (Math::kNumbers == 2) {
          acc[i] = dot_pairs(acc[i], asked, _mm512_castps_si512(key));
        } else {
          acc[i] = fma(asked, key, acc[i]);
        }
      }
    }
    const Vec scores = sum_each(acc) * splat(s_.scale);
    w.best[row].add(scores, _mm512_loadu_si512(keys + begin), bit_range(0, end - begin));
  }
#else
  void look(const Work&, const char*, const T*, const T*, int64_t, int64_t, const KeyBlocks&) const {}
#endif

  void score(const Work& w, const Element* keys, int64_t first, int64_t row, int64_t count, int64_t key_block,
             const int64_t* words) const {
    uint64_t word[kRows] = {}, above[kRows] = {}, any = 0;
    float limit[kRows] = {};
    for (int64_t i = 0; i < count; ++i) {
      any |= word[i] = visible_word(s_, first + row + i, key_block, words);
      limit[i] = w.best[row + i].limit();
    }
    if (any == 0) return;
    const int64_t key = key_block * kBlockKeys;
    score_block(w.queries + row * query_steps_, keys + key * sizes_.key_steps, limit, w.scores, above);
    for (int64_t i = 0; i < count; ++i) {
      w.visible[row + i] += __builtin_popcountll(word[i]);
      if (const uint64_t some = word[i] & above[i]) w.best[row + i].take(w.scores + i * kBlockKeys, key, some);
    }
  }

  // Scores as they are compared: scaled, for rounding may make equals of two products. Few are above a row's limit, and
  // which ones is found while they are in registers.
  ATTNKIT_NOINLINE void score_block(const Element* queries, const Element* keys, const float* limit, float* scores,
                                    uint64_t* above) const {
    for (int64_t c = 0; c < kBlockKeys; c += kStrip)
      product<Math, kStripVectors>(queries, query_steps_, keys + c * sizes_.key_steps, sizes_.key_steps, s_.scale,
                                   scores + c, kBlockKeys, [&](int i, int j, Vec x) {
                                     above[i] |= bits_above(x, limit[i]) << (c + j * kWidth);
                                   });
  }

  void finish(const Work& w, int64_t batch, int64_t head, int64_t first, int64_t i) const {
    Best& best = w.best[i];
    const int64_t found = best.keep(kept_.kept[w.visible[i]]), padded = round_up(found, kWidth);
    for (int64_t j = 0; j < padded; ++j) w.scores[j] = j < found ? best.score(j) : -kInfinity;
    Vec peak = splat(-kInfinity), total = zero();
    for (int64_t j = 0; j < padded; j += kWidth) peak = max(peak, load(w.scores + j));
    const float top = largest(peak);
    const Vec shift = splat(top == -kInfinity ? 0.0f : -top), factor = splat(kLog2E);
    for (int64_t j = 0; j < padded; j += kWidth) {
      const Vec weight = exp2<5>((load(w.scores + j) + shift) * factor);
      store(w.scores + j, weight);
      total = total + weight;
    }
    const float all = sum(total), share = all == 0.0f ? 0.0f : 1.0f / all;
    const T* values = static_cast<const T*>(s_.v) + batch * s_.v_b + head / (s_.h / s_.g) * s_.v_g;
    T* o = static_cast<T*>(s_.o) + batch * s_.o_b + head * s_.o_h + (first + i) * s_.o_m;
    for (int64_t c = 0; c < s_.e; c += kStrip) {
      const int64_t columns = least<int64_t>(kStrip, s_.e - c);
      if (columns == kStrip) {
        add_values<true>(w, best, found, values + c, columns);
      } else {
        add_values<false>(w, best, found, values + c, columns);
      }
      for (int64_t j = 0; j < columns; j += kWidth)
        store_some(o + c + j, load(w.sums + j) * splat(share), columns - j);
    }
  }

  // w.sums = weights * values, a strip of columns.
  template <bool kWhole>
  ATTNKIT_NOINLINE void add_values(const Work& w, const Best& best, int64_t count, const T* values,
                                   int64_t columns) const {
    Vec acc[kStripVectors];
    for (int j = 0; j < kStripVectors; ++j) acc[j] = zero();
    for (int64_t i = 0; i < count; ++i) {
      prefetch_row(values + best.key(least(i + kAhead, count - 1)) * s_.v_n, columns);
      const T* row = values + best.key(i) * s_.v_n;
      const Vec weight = splat(w.scores[i]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kStripVectors; ++j)
        if (kWhole || j * kWidth < columns)
          acc[j] = fma(weight, kWhole ? load(row + j * kWidth) : load_some(row + j * kWidth, columns - j * kWidth), acc[j]);
    }
    for (int j = 0; j < kStripVectors; ++j) store(w.sums + j * kWidth, acc[j]);
  }

  const attnkit_softmax& s_;
  const attnkit_topk& kept_;
  const PackedSizes<Math> sizes_;
  const int64_t query_blocks_;
  const int64_t query_steps_;  // of one packed query, whole vectors
  const int64_t most_;
  const bool bounded_;  // keys are bytes and bounds
  const int64_t threads_;
};
