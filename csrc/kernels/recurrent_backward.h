// The gradients, chunk by chunk from the last to the first, with the gradient of the state carried along.
//
// Nothing but the state before each span of eight chunks was kept. States between, and the solved u, are computed again from
// there on, span by span, into scratch memory that stays in the second cache; scores are formed again chunk by chunk. With D
// the decays between two tokens of the chunk, A = D q.k the scores, N = -D k.k the system of the delta rule and S the state
// before the chunk:
//   o = start q S + A u, u = beta r, r = v - start k S + N u, S' = through S + (end k)^T u
// which gives, from the end,
//   du = A^T do + (end k) dS' + N^T dr (a backward substitution), dr = beta du, dv = dr, dbeta = du . r
//   dA = do u^T, dN = dr u^T, dS = through dS' + (start q)^T do - (start k)^T dr.
// Without the delta rule u is v. A decay stands between a query and a key, so its gradient is a sum over the pairs that it
// stands between of the pair's product with its gradient. With one a token, these are A dA + N dN, added up pair by pair:
// nothing cancels. With one a channel it is what q.dq + k.dk as a row, less k.dk as a column, add up to from it on.

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
  // What is computed again of a chunk before the walk back: the state before it, and with the delta rule its solved system.
  struct Known {
    float *state, *system, *r, *u;
  };

  struct Work {
    Chunk<T> chunk;
    Known known[kSpanChunks];
    float *q, *d_o, *ut, *du, *dr, *scores, *d_scores;  // of tokens
    float *state_t, *ds, *ds_t, *kept;                  // of the state
    float *d_rows, *d_far, *dk_row;                     // gradients with d columns: of rows, of keys through the state after
    float *dk_column, *dk_own, *here, *across, *own;    // the same of pairs, where decays have channels
    float *pairs, *ones;
    double rows[kChunk], gone[kChunk];  // products with gradients of rows and the state before, of keys and the state after

    Work(const attnkit_linear& c, Arena& arena) : chunk(c, arena) {
      const int64_t ld = chunk.ld, le = chunk.le, delta = c.beta != nullptr, channels = chunk.channels;
      for (Known& chunk_known : known)
        chunk_known = {arena.take(ld * le), arena.take(delta * kChunk * kChunk), arena.take(delta * kChunk * le),
                       arena.take(delta * kChunk * le)};
      q = arena.take(kChunk * ld);
      d_o = arena.take(kChunk * le);
      ut = arena.take(le * kChunk);
      du = arena.take(kChunk * le);
      dr = arena.take(delta * kChunk * le);
      scores = arena.take(kChunk * kChunk);
      d_scores = arena.take(kChunk * kChunk);
      state_t = arena.take(le * ld);
      ds = arena.take(ld * le);
      ds_t = arena.take(le * ld);
      kept = arena.take(ld);
      d_rows = arena.take(kChunk * ld);
      d_far = arena.take(kChunk * ld);
      dk_row = arena.take(delta * kChunk * ld);
      dk_column = arena.take(channels * kChunk * ld);
      dk_own = arena.take(channels * kChunk * ld);
      here = arena.take(channels * kChunk * ld);
      across = arena.take(channels * kChunk * ld);
      own = arena.take(channels * kChunk);
      pairs = arena.take(kChunk * kChunk);
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
    for (int64_t span = ceil_div(counted, kSpan) - 1; span >= 0; --span) {
      const int64_t from = span * kSpan, chunks = ceil_div(least(kSpan, counted - from), kChunk);
      load_state(c_, kept_state(c_, unit.number, span), w.known[0].state, chunk.ld, chunk.le);
      for (int64_t i = 0, first = from; i < chunks; ++i, first += kChunk) {
        chunk.load_tokens(unit, first, least(kChunk, counted - first), true);
        if (i + 1 < chunks) chunk.expect_tokens(unit, first + kChunk, least(kChunk, counted - first - kChunk));
        recall(w, i, i + 1 < chunks);
      }
      for (int64_t i = chunks - 1, first = from + i * kChunk; i >= 0; --i, first -= kChunk) {
        if (i + 1 < chunks) chunk.load_tokens(unit, first, kChunk, true);
        expect(chunk, unit, first);
        step(w, unit, w.known[i]);
      }
    }
    store_rows(w.ds, chunk.le, c_.d, chunk.e, c_.d_state + unit.number * size, chunk.e);
  }

  // Solves the system of chunk i of a span, and moves the state on where there is a next one.
  void recall(Work& w, int64_t i, bool more) const {
    Chunk<T>& chunk = w.chunk;
    const Known& known = w.known[i];
    if (c_.beta) chunk.solve(known.state, known.system, known.r, known.u);
    if (!more) return;
    float* next = w.known[i + 1].state;
    load_rows(known.state, chunk.le, chunk.ld, chunk.le, 1.0f, next, chunk.le, chunk.ld);
    chunk.weigh_keys();
    chunk.advance(c_.beta ? known.u : chunk.v, next);
  }

  // Fetches where the gradients of the chunk that starts at `first` go, and what the span before begins with.
  void expect(Chunk<T>& chunk, const Unit& unit, int64_t first) const {
    const int64_t place = unit.number * c_.n + first;
    chunk.ahead.set(Ahead::kKeySlopes, static_cast<T*>(c_.dk) + place * c_.d, c_.d, c_.d, chunk.size);
    chunk.ahead.set(Ahead::kValueSlopes, static_cast<T*>(c_.dv) + place * c_.e, c_.e, c_.e, chunk.size);
    if (first == 0 || first % kSpan != 0) return;
    chunk.expect_tokens(unit, first - kSpan, kChunk);
    chunk.ahead.set(Ahead::kState, kept_state(c_, unit.number, first / kSpan - 1), chunk.e, chunk.e, c_.d);
  }
  void expect_queries(Chunk<T>& chunk, const Unit& unit, int64_t i) const {
    const bool same = i + 1 < c_.h / c_.s;
    if (!same && chunk.first == 0) return;
    const Asked next = same ? Asked(c_, unit, i + 1, chunk.first, chunk.size)
                            : Asked(c_, unit, 0, chunk.first - kChunk, kChunk);
    if (next.count == 0) return;
    chunk.expect_queries(next);
    chunk.ahead.set(Ahead::kSlopes, static_cast<const T*>(c_.d_o) + next.place(c_) * c_.e, c_.e, c_.e, next.count);
  }

  void step(Work& w, const Unit& unit, const Known& known) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, le = chunk.le, tokens = chunk.size;
    const float* u = c_.beta ? known.u : chunk.v;
    transposed(u, le, round_up(tokens, kWidth), le, w.ut, kChunk);
    transposed(known.state, le, round_up(c_.d, kWidth), le, w.state_t, ld);
    transposed(w.ds, le, round_up(c_.d, kWidth), le, w.ds_t, ld);
    chunk.weigh_keys();
    if (c_.d_decay) begin_decays(w, known.state);
    multiply(round_up(tokens, kSolveRows), chunk.e, c_.d, rows_of(chunk.kw, ld), w.ds, le, w.du, le, nullptr, &chunk.ahead);
    multiply(tokens, c_.d, chunk.e, rows_of(u, le), w.ds_t, ld, w.d_far, ld, nullptr, &chunk.ahead);
    fade(chunk, chunk.end, chunk.to_end, w.d_far);
    if (pairs_wanted()) add_dots(chunk.k, w.d_far, tokens, ld, w.gone);
    if (chunk.channels) {
      clear_rows(w.dk_column, kChunk * ld);
      clear_rows(w.dk_own, kChunk * ld);
      clear_rows(w.here, kChunk * ld);
    }
    if (chunk.first + tokens > c_.n - c_.m) {
      for (int64_t i = 0; i < c_.h / c_.s; ++i) query(w, unit, i);
    } else {
      multiply_rows(w.ds, chunk.through, c_.d, le, w.ds);
    }
    if (c_.beta) delta(w, unit, known);
    T* dv = static_cast<T*>(c_.dv) + (unit.number * c_.n + chunk.first) * c_.e;
    store_rows(c_.beta ? w.dr : w.du, le, tokens, c_.e, dv, c_.e);
    if (c_.d_decay) chunk.channels ? channel_decays(w, unit) : token_decays(w, unit);
    if (c_.beta) add_rows(w.dk_row, tokens * ld, w.d_far);
    if (chunk.channels) {
      add_rows(w.dk_column, tokens * ld, w.d_far);
      add_rows(w.dk_own, tokens * ld, w.d_far);
    }
    map_slopes(c_, chunk.k, ld, tokens, w.d_far);
    for (int64_t t = 0; t < tokens; ++t)
      if (chunk.hides(t)) clear_rows(w.d_far + t * ld, ld);
    T* dk = static_cast<T*>(c_.dk) + (unit.number * c_.n + chunk.first) * c_.d;
    store_rows(w.d_far, ld, tokens, c_.d, dk, c_.d);
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
    if (pairs_wanted()) add_pairs(w, w.scores);
    // A token's own key never fades. Left out of the sums for decays, it cannot drown what a gate that closes lets through.
    if (chunk.channels)
      for (int64_t j = 0; j < tokens; ++j) w.own[j] = w.d_scores[j * kChunk + j];
    chunk.hide(!chunk.channels, 1.0f, w.d_scores);
    multiply(tokens, c_.d, chunk.e, rows_of(w.d_o, le), w.state_t, ld, w.d_rows, ld, nullptr, &chunk.ahead);
    fade(chunk, chunk.start, chunk.from_start, w.d_rows);
    if (pairs_wanted()) add_dots(w.q, w.d_rows, tokens, ld, w.rows);
    pairs(w, w.q, w.d_rows);
    multiply(c_.d, chunk.e, tokens, columns_of(faded_rows(chunk, w.q), ld), w.d_o, le, w.ds, le,
             i ? w.ones : chunk.through, &chunk.ahead);
    if (chunk.channels) {
      if (c_.d_decay) add_products(w.q, w.d_rows, tokens * ld, w.here);
      for (int64_t t = skip; t < tokens; ++t) {
        add_times(w.own[t], chunk.k + t * ld, ld, w.d_rows + t * ld);
        add_times(w.own[t], w.q + t * ld, ld, w.dk_own + t * ld);
      }
    }
    if (c_.scale != 1.0f)
      for (int64_t at = skip * ld; at < tokens * ld; at += kWidth)
        store(w.d_rows + at, load(w.d_rows + at) * splat(c_.scale));
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
  void delta(Work& w, const Unit& unit, const Known& known) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, le = chunk.le, tokens = chunk.size;
    chunk.solve_back(known.system, w.du, w.dr);
    if (c_.d_beta) {
      float* d_beta = c_.d_beta + unit.number * c_.n + chunk.first;
      for (int64_t i = 0; i < tokens; ++i) {
        Vec both = zero();
        for (int64_t j = 0; j < le; j += kWidth) both = fma(load(w.du + i * le + j), load(known.r + i * le + j), both);
        d_beta[i] = sum(both);
      }
    }
    multiply<Part::kColumnsUpTo>(tokens, tokens, chunk.e, rows_of(w.dr, le), w.ut, kChunk, w.d_scores, kChunk);
    if (pairs_wanted()) add_pairs(w, known.system);
    chunk.hide(false, -1.0f, w.d_scores);
    multiply(tokens, c_.d, chunk.e, rows_of(w.dr, le), w.state_t, ld, w.dk_row, ld);
    fade(chunk, chunk.start, chunk.from_start, w.dk_row);
    negate(w.dk_row, tokens * ld, w.dk_row);
    if (pairs_wanted()) add_dots(chunk.k, w.dk_row, tokens, ld, w.rows);
    pairs(w, chunk.k, w.dk_row);
    negate(faded_rows(chunk, chunk.k), tokens * ld, chunk.x);
    multiply(c_.d, chunk.e, tokens, columns_of(chunk.x, ld), w.dr, le, w.ds, le, w.ones);
    if (chunk.channels && c_.d_decay) add_products(chunk.k, w.dk_row, tokens * ld, w.here);
  }

  // Adds to `d_rows` and to the keys' gradients what those of the rows' products with keys, in w.d_scores, give for both.
  void pairs(Work& w, const float* rows, float* d_rows) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, tokens = chunk.size;
    if (!chunk.channels) {
      multiply<Part::kStepsUpTo>(tokens, c_.d, tokens, rows_of(w.d_scores, kChunk), chunk.k, ld, d_rows, ld, w.ones);
      multiply<Part::kStepsFrom>(tokens, c_.d, tokens, columns_of(w.d_scores, kChunk), rows, ld, w.d_far, ld, w.ones);
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

  // Whether decays are numbers, and their gradients sums over pairs.
  bool pairs_wanted() const { return c_.d_decay && !channels(); }

  // Adds the products of pairs of a row and an earlier key with their gradients, before hide().
  void add_pairs(Work& w, const float* products) const {
    for (int64_t i = 1; i < w.chunk.size; ++i) {
      for (int64_t j = 0; j < i; j += kWidth) {
        const int64_t at = i * kChunk + j;
        store(w.pairs + at, load(w.pairs + at) + first_of(load(products + at) * load(w.d_scores + at), i - j));
      }
    }
  }

  // Products of the state before the chunk with its gradient, by channel; nothing yet of rows and pairs.
  void begin_decays(Work& w, const float* state) const {
    const int64_t le = w.chunk.le;
    for (int64_t i = 0; i < c_.d; ++i) {
      Vec both = zero();
      for (int64_t j = 0; j < le; j += kWidth) both = fma(load(w.ds + i * le + j), load(state + i * le + j), both);
      w.kept[i] = w.chunk.through[i] * sum(both);
    }
    clear_rows(w.pairs, kChunk * kChunk);
    for (int64_t t = 0; t < kChunk; ++t) w.rows[t] = w.gone[t] = 0.0;
  }

  // Gradients of the decays; those of hidden tokens, which do not fade, are zeros. Between what stands before token t and
  // what comes from it on are: the state before and rows, keys and the state after, keys and rows, and the two states.
  void token_decays(Work& w, const Unit& unit) const {
    const Chunk<T>& chunk = w.chunk;
    float* to = c_.d_decay + unit.number * c_.n + chunk.first;
    double all = 0.0, slopes[kChunk];
    for (int64_t j = 0; j < c_.d; ++j) all += static_cast<double>(w.kept[j]);
    Vec columns[kChunk / kWidth];
    for (Vec& column : columns) column = zero();
    for (int64_t t = chunk.size - 1; t >= 0; --t) {
      all += w.rows[t];
      Vec across = zero();
      for (int64_t j = 0; j < t; j += kWidth) {
        Vec& column = columns[j / kWidth];
        column = column + load(w.pairs + t * kChunk + j);
        across = across + first_of(column, t - j);
      }
      slopes[t] = all + static_cast<double>(sum(across));
    }
    double gone = 0.0;
    for (int64_t t = 0; t < chunk.size; ++t) {
      to[t] = chunk.hides(t) ? 0.0f : static_cast<float>(slopes[t] + gone);
      gone += w.gone[t];
    }
  }

  void channel_decays(Work& w, const Unit& unit) const {
    Chunk<T>& chunk = w.chunk;
    const int64_t ld = chunk.ld, tokens = chunk.size;
    for (int64_t i = 0; i < tokens * ld; i += kWidth) {
      const Vec k = load(chunk.k + i);
      store(w.here + i, load(w.here + i) - k * load(w.dk_column + i));
      store(chunk.x + i, k * load(w.d_far + i));  // what fades until the end
    }
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

  // to[t] += x_t . y_t
  static void add_dots(const float* x, const float* y, int64_t rows, int64_t ld, double* to) {
    for (int64_t t = 0; t < rows; ++t, x += ld, y += ld) {
      Vec total = zero();
      for (int64_t j = 0; j < ld; j += kWidth) total = fma(load(x + j), load(y + j), total);
      to[t] += static_cast<double>(sum(total));
    }
  }
  static void add_rows(const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(to + i) + load(x + i));
  }
  static void add_times(float factor, const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kWidth) store(to + i, fma(splat(factor), load(x + i), load(to + i)));
  }
  static void negate(const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kWidth) store(to + i, zero() - load(x + i));
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

  // Rows faded from the start of the chunk, in chunk.x where they are others.
  static const float* faded_rows(Chunk<T>& chunk, const float* rows) {
    if (!chunk.fades) return rows;
    if (chunk.channels) {
      multiply_each(rows, chunk.from_start, kChunk * chunk.ld, chunk.x);
    } else {
      multiply_rows(rows, chunk.start, kChunk, chunk.ld, chunk.x);
    }
    return chunk.x;
  }

  const attnkit_linear& c_;
  const int64_t threads_, bytes_;
};
