// The gradients, chunk by chunk from the last to the first, with the gradient of the state carried along.
//
// Nothing but the state before each chunk was kept: scores and the solved u are computed again. With D the decays between
// two tokens of the chunk, A = D q.k the scores, N = -D k.k the system of the delta rule and S the state before the chunk:
//   o = start q S + A u, u = beta r, r = v - start k S + N u, S' = through S + (end k)^T u
// which gives, from the end,
//   du = A^T do + (end k) dS' + N^T dr (a backward substitution), dr = beta du, dv = dr, dbeta = du . r
//   dA = do u^T, dN = dr u^T, dS = through dS' + (start q)^T do - (start k)^T dr.
// Without the delta rule u is v. A decay stands between a query and a key, so its gradient is a sum over the pairs that it
// stands between of the pair's product with its gradient: of q.dq + k.dk as a row, less k.dk as a column, from it on.

template <class T>
class RecurrentBackward {
 public:
  explicit RecurrentBackward(const attnkit_linear& call)
      : c_(call), threads_(linear_threads(call)), bytes_(work_bytes()) {}

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
    float *q, *d_o, *u, *ut, *r, *du, *dr, *scores, *d_scores, *system;  // of tokens
    float *state, *state_t, *ds, *ds_t, *kept;                          // of the state
    float *d_rows, *d_far, *dk_row, *dk_column, *dk_own, *here, *across, *ones, *own;  // gradients with d columns

    Work(const attnkit_linear& c, Arena& arena) : chunk(c, arena) {
      const int64_t ld = chunk.ld, le = chunk.le, delta = c.beta != nullptr;
      q = arena.take(kChunk * ld);
      d_o = arena.take(kChunk * le);
      u = arena.take(delta * kChunk * le);
      ut = arena.take(le * kChunk);
      r = arena.take(delta * kChunk * le);
      du = arena.take(kChunk * le);
      dr = arena.take(delta * kChunk * le);
      scores = arena.take(kChunk * kChunk);
      d_scores = arena.take(kChunk * kChunk);
      system = arena.take(delta * kChunk * kChunk);
      state = arena.take(ld * le);
      state_t = arena.take(le * ld);
      ds = arena.take(ld * le);
      ds_t = arena.take(le * ld);
      kept = arena.take(ld);
      d_rows = arena.take(kChunk * ld);
      d_far = arena.take(kChunk * ld);
      dk_row = arena.take(kChunk * ld);
      dk_column = arena.take(kChunk * ld);
      dk_own = arena.take(kChunk * ld);
      here = arena.take(kChunk * ld);
      across = arena.take(chunk.channels * kChunk * ld);
      own = arena.take(kChunk);
      ones = arena.take(most(ld, kChunk));
      if (ones)
        for (int64_t i = 0; i < most(ld, kChunk); ++i) ones[i] = 1.0f;
    }
  };

  int64_t work_bytes() const {
    Arena arena{nullptr};
    Work work(c_, arena);
    return arena.used * static_cast<int64_t>(sizeof(float));
  }

  void walk(Work& w, const Unit& unit) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t size = c_.d * chunk.e, counted = c_.lawful && c_.beta ? c_.lawful[unit.number] : c_.n;
    if (counted < c_.n) clear(unit, counted);
    // NaN that stands for a state after a token that is no step has no gradient.
    const float* d_last = c_.d_last && counted == c_.n ? c_.d_last + unit.number * size : nullptr;
    load_state(c_, d_last, w.ds, chunk.ld, chunk.le);
    for (int64_t number = ceil_div(counted, kChunk) - 1; number >= 0; --number) {
      const int64_t first = number * kChunk;
      load_state(c_, c_.states + (unit.number * chunk_count(c_) + number) * size, w.state, chunk.ld, chunk.le);
      chunk.load_tokens(unit, first, least(kChunk, counted - first), true);
      expect(chunk, unit, first);
      step(w, unit);
    }
    store_rows(w.ds, chunk.le, c_.d, chunk.e, c_.d_state + unit.number * size, chunk.e);
  }

  // Fetches what the chunk before the one that starts at `first` begins with, and where this one's gradients go.
  void expect(Chunk<T>& chunk, const Unit& unit, int64_t first) const {
    const int64_t place = unit.number * c_.n + first, size = c_.d * chunk.e;
    chunk.ahead.set(Ahead::kKeySlopes, static_cast<T*>(c_.dk) + place * c_.d, c_.d, c_.d, chunk.size);
    chunk.ahead.set(Ahead::kValueSlopes, static_cast<T*>(c_.dv) + place * c_.e, c_.e, c_.e, chunk.size);
    if (first == 0) return;
    const float* state = c_.states + (unit.number * chunk_count(c_) + first / kChunk - 1) * size;
    chunk.expect_tokens(unit, first - kChunk, kChunk);
    chunk.ahead.set(Ahead::kState, state, chunk.e, chunk.e, c_.d);
  }
  void expect_queries(Chunk<T>& chunk, const Unit& unit, int64_t i) const {
    const bool same = i + 1 < c_.h / c_.s;
    if (!same && chunk.first == 0) return;
    const Asked next = same ? Asked(c_, unit, i + 1, chunk.first, chunk.size)
                            : Asked(c_, unit, 0, chunk.first - kChunk, kChunk);
    chunk.expect_queries(next);
    chunk.ahead.set(Ahead::kSlopes, static_cast<const T*>(c_.d_o) + next.place(c_) * c_.e, c_.e, c_.e, next.count);
  }

  void step(Work& w, const Unit& unit) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, le = chunk.le, tokens = chunk.size;
    const float* u = chunk.v;
    if (c_.beta) {
      chunk.scores(chunk.k, false, -1.0f, w.system);
      chunk.read(chunk.k, w.state, w.r);
      chunk.solve(w.system, w.r, w.u);
      u = w.u;
    }
    transposed(u, le, round_up(tokens, kWidth), le, w.ut, kChunk);
    transposed(w.state, le, round_up(c_.d, kWidth), le, w.state_t, ld);
    transposed(w.ds, le, round_up(c_.d, kWidth), le, w.ds_t, ld);
    for (int64_t i = 0; i < c_.d; ++i) {
      Vec both = zero();
      for (int64_t j = 0; j < le; j += kWidth) both = fma(load(w.ds + i * le + j), load(w.state + i * le + j), both);
      w.kept[i] = chunk.through[i] * sum(both);
    }
    chunk.weigh_keys();
    multiply(round_up(tokens, kSolveRows), chunk.e, c_.d, rows_of(chunk.kw, ld), w.ds, le, w.du, le, nullptr, &chunk.ahead);
    multiply(tokens, c_.d, chunk.e, rows_of(u, le), w.ds_t, ld, w.d_far, ld, nullptr, &chunk.ahead);
    fade(chunk, chunk.end, chunk.to_end, w.d_far);
    for (int64_t i = 0; i < kChunk * ld; i += kWidth) {
      store(w.dk_column + i, zero());
      store(w.dk_own + i, zero());
      store(w.here + i, zero());
    }
    for (int64_t i = 0; i < c_.h / c_.s; ++i) query(w, unit, i);
    if (c_.beta) {
      delta(w, unit);
    } else {
      for (int64_t i = 0; i < kChunk * ld; i += kWidth) store(w.dk_row + i, zero());
    }
    T* dv = static_cast<T*>(c_.dv) + (unit.number * c_.n + chunk.first) * c_.e;
    store_rows(c_.beta ? w.dr : w.du, le, tokens, c_.e, dv, c_.e);
    if (c_.d_decay) decays(w, unit);
    for (int64_t i = 0; i < tokens * ld; i += kWidth)
      store(w.dk_row + i, (load(w.dk_row + i) + load(w.dk_column + i)) + (load(w.d_far + i) + load(w.dk_own + i)));
    map_slopes(c_, chunk.k, ld, tokens, w.dk_row);
    for (int64_t t = 0; t < tokens; ++t)
      if (chunk.hides(t)) load_rows(w.dk_row, 0, 0, c_.d, 1.0f, w.dk_row + t * ld, ld, 1);
    T* dk = static_cast<T*>(c_.dk) + (unit.number * c_.n + chunk.first) * c_.d;
    store_rows(w.dk_row, ld, tokens, c_.d, dk, c_.d);
  }

  // What query head i of the state adds to the gradients.
  void query(Work& w, const Unit& unit, int64_t i) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, le = chunk.le, tokens = chunk.size;
    const Asked asked(c_, unit, i, chunk.first, tokens);
    const int64_t skip = asked.skip;
    chunk.load_queries(asked, w.q);
    const T* d_o = static_cast<const T*>(c_.d_o) + asked.place(c_) * c_.e;
    load_rows(d_o, c_.e, 0, c_.e, 1.0f, w.d_o, le, skip);
    load_rows(d_o, c_.e, asked.count, c_.e, 1.0f, w.d_o + skip * le, le, kChunk - skip);
    if (c_.total) divide(chunk, asked, w.d_o + skip * le);
    T* dq = static_cast<T*>(c_.dq) + asked.place(c_) * c_.d;
    chunk.ahead.set(Ahead::kResults, dq, c_.d, c_.d, asked.count);
    expect_queries(chunk, unit, i);

    chunk.scores(w.q, true, 1.0f, w.scores);
    multiply<Part::kStepsFrom>(tokens, chunk.e, tokens, columns_of(w.scores, kChunk), w.d_o, le, w.du, le, w.ones,
                               &chunk.ahead);
    multiply<Part::kColumnsUpTo>(tokens, tokens, chunk.e, rows_of(w.d_o, le), w.ut, kChunk, w.d_scores, kChunk, nullptr,
                                 &chunk.ahead);
    // A token's own key never fades. Left out of the sums for decays, it cannot drown what a gate that closes lets through.
    for (int64_t j = 0; j < tokens; ++j) w.own[j] = w.d_scores[j * kChunk + j];
    chunk.hide(false, 1.0f, w.d_scores);
    multiply(tokens, c_.d, chunk.e, rows_of(w.d_o, le), w.state_t, ld, w.d_rows, ld, nullptr, &chunk.ahead);
    fade(chunk, chunk.start, chunk.from_start, w.d_rows);
    pairs(w, w.q, w.d_rows);
    faded_rows(chunk, w.q);
    multiply(c_.d, chunk.e, tokens, columns_of(chunk.x, ld), w.d_o, le, w.ds, le, i ? w.ones : chunk.through,
             &chunk.ahead);
    if (c_.d_decay) add_products(w.q, w.d_rows, tokens * ld, w.here);
    if (skip == tokens) return;
    const Vec factor = splat(c_.scale);
    for (int64_t t = skip; t < tokens; ++t) {
      const Vec own = splat(w.own[t]);
      for (int64_t j = t * ld; j < (t + 1) * ld; j += kWidth) {
        store(w.d_rows + j, fma(own, load(chunk.k + j), load(w.d_rows + j)) * factor);
        store(w.dk_own + j, fma(own, load(w.q + j), load(w.dk_own + j)));
      }
    }
    map_slopes(c_, w.q, ld, tokens, w.d_rows);
    store_rows(w.d_rows + skip * ld, ld, asked.count, c_.d, dq, c_.d);
  }

  // From the gradients of means to those of sums and of what divides them, o = sums / total.
  void divide(const Chunk<T>& chunk, const Asked& asked, float* rows) const {
    const T* o = static_cast<const T*>(c_.o) + asked.place(c_) * c_.e;
    const float* totals = c_.total + asked.place(c_);
    for (int64_t i = 0; i < asked.count; ++i, rows += chunk.le, o += c_.e) {
      const float factor = totals[i] == 0.0f ? 1.0f : 1.0f / totals[i];
      Vec both = zero();
      for (int64_t j = 0; j < c_.e; j += kWidth) {
        const Vec slope = load(rows + j) * splat(factor);
        both = fma(slope, load_some(o + j, c_.e - j), both);
        store(rows + j, slope);
      }
      rows[c_.e] = totals[i] == 0.0f ? 0.0f : -sum(both);
    }
  }

  // Through the delta rule's system: from the gradient of u to those of v, beta, the keys and the state.
  void delta(Work& w, const Unit& unit) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, le = chunk.le, tokens = chunk.size;
    chunk.solve_back(w.system, w.du, w.dr);
    if (c_.d_beta) {
      float* d_beta = c_.d_beta + unit.number * c_.n + chunk.first;
      for (int64_t i = 0; i < tokens; ++i) {
        Vec both = zero();
        for (int64_t j = 0; j < le; j += kWidth) both = fma(load(w.du + i * le + j), load(w.r + i * le + j), both);
        d_beta[i] = sum(both);
      }
    }
    multiply<Part::kColumnsUpTo>(tokens, tokens, chunk.e, rows_of(w.dr, le), w.ut, kChunk, w.d_scores, kChunk);
    chunk.hide(false, -1.0f, w.d_scores);
    multiply(tokens, c_.d, chunk.e, rows_of(w.dr, le), w.state_t, ld, w.dk_row, ld);
    fade(chunk, chunk.start, chunk.from_start, w.dk_row);
    for (int64_t i = 0; i < kChunk * ld; i += kWidth) store(w.dk_row + i, zero() - load(w.dk_row + i));
    pairs(w, chunk.k, w.dk_row);
    faded_rows(chunk, chunk.k);
    for (int64_t i = 0; i < tokens * ld; i += kWidth) store(chunk.x + i, zero() - load(chunk.x + i));
    multiply(c_.d, chunk.e, tokens, columns_of(chunk.x, ld), w.dr, le, w.ds, le, w.ones);
    if (c_.d_decay) add_products(chunk.k, w.dk_row, tokens * ld, w.here);
  }

  // Adds to `d_rows` and w.dk_column what the gradients of the rows' products with keys, in w.d_scores, give for both.
  void pairs(Work& w, const float* rows, float* d_rows) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, tokens = chunk.size;
    if (!chunk.channels) {
      multiply<Part::kStepsUpTo>(tokens, c_.d, tokens, rows_of(w.d_scores, kChunk), chunk.k, ld, d_rows, ld, w.ones);
      multiply<Part::kStepsFrom>(tokens, c_.d, tokens, columns_of(w.d_scores, kChunk), rows, ld, w.dk_column, ld, w.ones);
      return;
    }
    multiply_each(rows, chunk.tile, round_up(tokens, kDecayTile) * ld, chunk.x);
    for (int64_t t = 0, before = 0; t < tokens; before += t, t += kDecayTile) {
      const int64_t count = least(kDecayTile, tokens - t);
      if (t) {
        const float* slopes = w.d_scores + t * kChunk;
        multiply(count, c_.d, t, rows_of(slopes, kChunk), chunk.kd + before * ld, ld, w.across, ld);
        add_products(w.across, chunk.tile + t * ld, count * ld, d_rows + t * ld);
        multiply(t, c_.d, count, columns_of(slopes, kChunk), chunk.x + t * ld, ld, w.across, ld);
        add_products(w.across, chunk.left + before * ld, t * ld, w.dk_column);
      }
      tile_pairs(w, rows, t, count, d_rows);
    }
  }

  void tile_pairs(Work& w, const float* rows, int64_t t, int64_t count, float* d_rows) const {
    const int64_t ld = w.chunk.ld;
    const float *k = w.chunk.k + t * ld, *a = w.chunk.a + t * ld, *slopes = w.d_scores + t * kChunk + t;
    for (int64_t key = 0; key < count; ++key) {
      for (int64_t j = 0; j < c_.d; j += kWidth) {
        Vec x = load(k + key * ld + j), back = zero();
        for (int64_t i = key; i < count; ++i) {
          if (i > key) x = x * load(a + i * ld + j);
          float* to = d_rows + (t + i) * ld + j;
          store(to, fma(splat(slopes[i * kChunk + key]), x, load(to)));
        }
        for (int64_t i = count - 1; i >= key; --i) {
          back = fma(splat(slopes[i * kChunk + key]), load(rows + (t + i) * ld + j), back);
          if (i > key) back = back * load(a + i * ld + j);
        }
        float* to = w.dk_column + (t + key) * ld + j;
        store(to, load(to) + back);
      }
    }
  }

  // Gradients of the decays; those of hidden tokens, which do not fade, are zeros.
  void decays(Work& w, const Unit& unit) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, tokens = chunk.size;
    for (int64_t i = 0; i < tokens * ld; i += kWidth) {
      const Vec k = load(chunk.k + i);
      store(w.here + i, load(w.here + i) - k * load(w.dk_column + i));
      store(chunk.x + i, k * load(w.d_far + i));  // what fades until the end
    }
    if (chunk.channels) {
      float* to = c_.d_decay + (unit.number * c_.n + chunk.first) * c_.d;
      for (int64_t j = 0; j < c_.d; j += kWidth) {
        Vec later = load(w.kept + j), before = zero();
        for (int64_t t = tokens - 1; t >= 0; --t) {
          later = later + load(w.here + t * ld + j);
          store(w.here + t * ld + j, later);
        }
        for (int64_t t = 0; t < tokens; ++t) {
          const Vec found = load(w.here + t * ld + j) + before;
          store_some(to + t * c_.d + j, chunk.hides(t) ? zero() : found, c_.d - j);
          before = before + load(chunk.x + t * ld + j);
        }
      }
    } else {
      float* to = c_.d_decay + unit.number * c_.n + chunk.first;
      float later = 0.0f, before = 0.0f;
      for (int64_t j = 0; j < c_.d; ++j) later += w.kept[j];
      for (int64_t t = tokens - 1; t >= 0; --t) to[t] = later += row_sum(w.here + t * ld, c_.d);
      for (int64_t t = 0; t < tokens; ++t) {
        to[t] = chunk.hides(t) ? 0.0f : to[t] + before;
        before += row_sum(chunk.x + t * ld, c_.d);
      }
    }
  }

  // Zeros for the tokens from `counted` on: nothing that they gave counts.
  void clear(const Unit& unit, int64_t counted) const {
    const int64_t rows = c_.n - counted, place = unit.number * c_.n + counted;
    clear_rows(static_cast<T*>(c_.dk) + place * c_.d, rows * c_.d);
    clear_rows(static_cast<T*>(c_.dv) + place * c_.e, rows * c_.e);
    if (c_.d_decay) {
      const int64_t width = channels() ? c_.d : 1;
      clear_rows(c_.d_decay + place * width, rows * width);
    }
    if (c_.d_beta) clear_rows(c_.d_beta + place, rows);
    for (int64_t i = 0; i < c_.h / c_.s; ++i) {
      const int64_t head = unit.batch * c_.h + unit.state * (c_.h / c_.s) + i;
      clear_rows(static_cast<T*>(c_.dq) + (head * c_.m + counted) * c_.d, rows * c_.d);
    }
  }
  bool channels() const { return c_.decay_kind == ATTNKIT_DECAY_CHANNEL; }

  template <class Number>
  static void clear_rows(Number* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store_some(to + i, zero(), count - i);
  }

  static ATTNKIT_INLINE float row_sum(const float* row, int64_t count) {
    Vec total = zero();
    for (int64_t j = 0; j < count; j += kWidth) total = total + load(row + j);
    return sum(total);
  }

  static void add_products(const float* x, const float* y, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kWidth) store(to + i, fma(load(x + i), load(y + i), load(to + i)));
  }

  // Rows times their decays: a number each, or one a channel.
  static void fade(const Chunk<T>& chunk, const float* by_token, const float* by_channel, float* rows) {
    if (chunk.channels) {
      multiply_each(rows, by_channel, kChunk * chunk.ld, rows);
    } else if (chunk.fades) {
      multiply_rows(rows, by_token, kChunk, chunk.ld, rows);
    }
  }

  // chunk.x = rows faded from the start of the chunk.
  static void faded_rows(Chunk<T>& chunk, const float* rows) {
    if (chunk.channels) {
      multiply_each(rows, chunk.from_start, kChunk * chunk.ld, chunk.x);
    } else {
      multiply_rows(rows, chunk.start, kChunk, chunk.ld, chunk.x);
    }
  }

  const attnkit_linear& c_;
  const int64_t threads_, bytes_;
};
