// A chunk of 32 tokens of a sum that fades, S_t = a_t S_{t-1} + k_t u_t^T, as products of matrices.
//
// Inside a chunk a query i sees key j <= i through q_i . k_j times what the decays leave of j at i; of the state before the
// chunk, `start` is left at a token; of a token, `end` is left at the chunk's end. With one decay a token these are tables
// of numbers: differences of sums in double, so that no exponent is positive and no digit is lost after a gate that closes.
// With one a channel the chunk is cut into tiles of 16. Keys of earlier tiles are faded to the start of the query's tile,
// queries from there, and both are products of decays, never quotients: nothing overflows, and a decay of 0 is like any
// other. Inside a tile the fading key is carried from query to query. The delta rule's u are a unit lower triangular system,
// solved by forward substitution, four rows at a time in registers.
//
// All matrices are row-major float32 in scratch memory; at d = e = 64 a chunk's are 8 KB and the state 16, so that a product
// runs in the first cache. Products with the state cost a token the same in any chunk, those among tokens half a chunk:
// on a Zen 4 core 32 tokens take a tenth less than 64 with the delta rule, and as much without.

constexpr int64_t kChunk = 32, kSpan = ATTNKIT_LINEAR_SPAN, kSpanChunks = kSpan / kChunk;
constexpr int64_t kDecayTile = 16;
constexpr int64_t kDecayTiles = kChunk / kDecayTile;
constexpr int64_t kEarlier = kDecayTile * kDecayTiles * (kDecayTiles - 1) / 2;  // keys before the second tile and so on
constexpr int64_t kSolveRows = 4;
static_assert(kChunk <= 32, "hidden tokens are bits");
static_assert(kSpan % kChunk == 0, "a span is whole chunks");
static_assert(kChunk % kDecayTile == 0 && kChunk % kSolveRows == 0 && kChunk % kWidth == 0, "rows come in blocks");

// Below e^-200 nothing of a float32 is left, and sums of such logarithms keep their digits.
constexpr float kClosed = -200.0f;

// Scratch memory, handed out in whole cache lines; without memory it only counts.
struct Arena {
  float* at;
  int64_t used = 0;
  float* take(int64_t count) {
    float* const result = at ? at + used : nullptr;
    used += round_up(count, 16);
    return result;
  }
};

// A state's columns: e, and with means one for what these are divided by.
ATTNKIT_INLINE int64_t state_columns(const attnkit_linear& c) { return c.e + (c.total != nullptr); }

// Where the state is kept that stands before a span of tokens, of state `number`.
ATTNKIT_INLINE float* kept_state(const attnkit_linear& c, int64_t number, int64_t span) {
  return c.states + (number * ceil_div(c.n, kSpan) + span) * c.d * state_columns(c);
}

// The first `count` lanes, and zeros.
ATTNKIT_INLINE Vec first_of(Vec x, int64_t count) {
  return count >= kWidth ? x : count <= 0 ? zero() : select((Bits{1} << count) - 1, x, 0.0f);
}

// Rows of queries or keys after the call's map, and the gradients of `to` through it: a slope is read off a result.
inline void map_rows(const attnkit_linear& c, float* rows, int64_t ld, int64_t count) {
  if (c.map == ATTNKIT_MAP_NONE) return;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < c.d; j += kWidth) {
      float* at = rows + i * ld + j;
      const Vec x = load(at), positive = max(zero(), x);
      Vec found = positive;
      if (c.map == ATTNKIT_MAP_ELU)
        found = exp2<5>(max(splat(-32.0f), min(zero(), x)) * splat(kLog2E)) + positive;
      store(at, first_of(found, c.d - j));
    }
  }
}
inline void map_slopes(const attnkit_linear& c, const float* rows, int64_t ld, int64_t count, float* to) {
  if (c.map == ATTNKIT_MAP_NONE) return;
  for (int64_t i = 0; i < count * ld; i += kWidth) {
    const Vec found = load(rows + i), slope = load(to + i);
    store(to + i, c.map == ATTNKIT_MAP_ELU ? slope * min(splat(1.0f), found)
                                           : where_less(zero(), found, slope, zero()));
  }
}

// Where the tensors of one state are.
struct Unit {
  int64_t batch, state, number;
  Unit(const attnkit_linear& c, int64_t i) : batch(i / c.s), state(i % c.s), number(i) {}
  int64_t key(const attnkit_linear& c) const { return batch * c.k_b + state / (c.s / c.k_heads) * c.k_h; }
  int64_t value(const attnkit_linear& c) const { return batch * c.v_b + state / (c.s / c.v_heads) * c.v_h; }
  int64_t decay(const attnkit_linear& c) const { return batch * c.decay_b + state * c.decay_s; }
  int64_t beta(const attnkit_linear& c) const { return batch * c.beta_b + state * c.beta_s; }
};

// Where the queries of one head are that a chunk of tokens has: `skip` tokens of it come before the first query.
struct Asked {
  int64_t batch, head, skip, row, count;
  Asked(const attnkit_linear& c, const Unit& unit, int64_t i, int64_t first, int64_t size)
      : batch(unit.batch),
        head(unit.state * (c.h / c.s) + i),
        skip(clamp<int64_t>(c.n - c.m - first, 0, size)),
        row(first + skip - (c.n - c.m)),
        count(size - skip) {}
  int64_t query(const attnkit_linear& c) const { return batch * c.q_b + head * c.q_h + row * c.q_m; }
  int64_t place(const attnkit_linear& c) const { return (batch * c.h + head) * c.m + row; }  // in contiguous tensors
};

template <class T>
struct Chunk {
  const attnkit_linear& c;
  const int64_t e, ld, le;  // columns of a state; row lengths of matrices with d and with e columns
  const bool channels, fades;
  int64_t first = 0, size = 0;  // tokens of the chunk
  uint32_t hidden = 0;          // a bit for each that `keep` hides
  mutable Ahead ahead;

  float *k, *kt, *kw, *v, *x, *beta;                    // keys, transposed, faded to the end; values; scratch rows
  float *start, *end, *through, *table, *high, *low;    // of one decay a token; `through` is a number a channel
  float *a, *tile, *from_start, *to_end, *left, *kd, *kdt;  // of one a channel

  Chunk(const attnkit_linear& call, Arena& arena)
      : c(call),
        e(state_columns(call)),
        ld(round_up(call.d, kWidth)),
        le(round_up(e, kWidth)),
        channels(call.decay_kind == ATTNKIT_DECAY_CHANNEL),
        fades(call.decay_kind != ATTNKIT_DECAY_NONE) {
    k = arena.take(kChunk * ld);
    kt = arena.take(ld * kChunk);
    kw = arena.take(kChunk * ld);
    v = arena.take(kChunk * le);
    x = arena.take(kChunk * ld);
    beta = arena.take(kChunk);
    start = arena.take(kChunk);
    end = arena.take(kChunk);
    through = arena.take(ld);
    const int64_t token = fades && !channels, channel = channels;
    table = arena.take(token * kChunk * kChunk);
    high = arena.take(token * kChunk);
    low = arena.take(token * kChunk);
    a = arena.take(channel * kChunk * ld);
    tile = arena.take(channel * kChunk * ld);
    from_start = arena.take(channel * kChunk * ld);
    to_end = arena.take(channel * kChunk * ld);
    left = arena.take(channel * kEarlier * ld);
    kd = arena.take(channel * kEarlier * ld);
    kdt = arena.take(channel * ld * kEarlier);
  }

  // Keys, values and decays of `count` tokens from `from` on. With the delta rule only those before the first token that
  // is no step of it count, see attnkit.mechanisms.delta.lawful, unless that is `known`; returns whether all of them do.
  bool load_tokens(const Unit& unit, int64_t from, int64_t count, bool known) {
    const T* keys = static_cast<const T*>(c.k) + unit.key(c) + from * c.k_n;
    const T* values = static_cast<const T*>(c.v) + unit.value(c) + from * c.v_n;
    const float* decay = fades ? c.decay + unit.decay(c) + from * c.decay_n : nullptr;
    first = from;
    size = count;
    load_rows(keys, c.k_n, size, c.d, 1.0f, k, ld, kChunk);
    load_rows(values, c.v_n, size, c.e, 1.0f, v, le, kChunk);
    if (c.beta) {
      const float* strengths = c.beta + unit.beta(c) + from * c.beta_n;
      for (int64_t t = 0; t < kChunk; ++t) beta[t] = t < size ? strengths[t * c.beta_n] : 0.0f;
      const int64_t good = known ? size : lawful_tokens(decay);
      if (good < size) {
        size = good;
        load_rows(keys, c.k_n, size, c.d, 1.0f, k, ld, kChunk);
        load_rows(values, c.v_n, size, c.e, 1.0f, v, le, kChunk);
        for (int64_t t = size; t < kChunk; ++t) beta[t] = 0.0f;
      }
    }
    map_rows(c, k, ld, size);
    if (c.total)
      for (int64_t t = 0; t < size; ++t) v[t * le + c.e] = 1.0f;
    hidden = c.keep ? hidden_tokens(c.keep + unit.batch * c.n + from) : 0;
    transposed(k, ld, round_up(size, kWidth), round_up(c.d, kWidth), kt, kChunk);
    const bool constant = decay != nullptr && c.decay_n == 0 && hidden == 0;
    if (channels) {
      channel_decays(decay);
    } else if (!constant || decay != constant_ || size != constant_tokens_) {
      token_decays(decay);
      constant_ = constant ? decay : nullptr;
      constant_tokens_ = size;
    }
    return size == count;
  }

  // Queries of one head as rows of the chunk, times the scale; rows of tokens before the first query are zeros.
  void load_queries(const Asked& asked, float* to) const {
    load_rows(static_cast<const T*>(nullptr), 0, 0, c.d, 1.0f, to, ld, asked.skip);
    to += asked.skip * ld;
    load_rows(static_cast<const T*>(c.q) + asked.query(c), c.q_m, asked.count, c.d, c.scale, to, ld, kChunk - asked.skip);
    map_rows(c, to, ld, asked.count);
  }

  // What load_tokens() and load_queries() will be asked for next.
  void expect_tokens(const Unit& unit, int64_t from, int64_t count) {
    ahead.set(Ahead::kKeys, static_cast<const T*>(c.k) + unit.key(c) + from * c.k_n, c.k_n, c.d, count);
    ahead.set(Ahead::kValues, static_cast<const T*>(c.v) + unit.value(c) + from * c.v_n, c.v_n, c.e, count);
  }
  void expect_queries(const Asked& asked) {
    ahead.set(Ahead::kQueries, static_cast<const T*>(c.q) + asked.query(c), c.q_m, c.d, asked.count);
  }

  // Products of rows (size, d) with the keys up to each row's own, or before it, times what is left of these there.
  // `rows` are faded from the start of their tiles where decays have channels. Numbers of hidden keys are zeros.
  void scores(const float* rows, bool own, float sign, float* out) const {
    if (channels) {
      multiply_each(rows, tile, round_up(size, kDecayTile) * ld, x);
      for (int64_t t = 0, before = 0; t < size; before += t, t += kDecayTile) {
        if (t)
          multiply(least(kDecayTile, size - t), t, c.d, rows_of(x + t * ld, ld), kdt + before, kEarlier, out + t * kChunk,
                   kChunk);
        tile_scores(rows, t, out);
      }
    } else {
      multiply<Part::kColumnsUpTo>(size, size, c.d, rows_of(rows, ld), kt, kChunk, out, kChunk, nullptr, &ahead);
    }
    hide(own, sign, out);
  }

  // Zeros for keys that a row does not see; all others times `sign` and, of token decays, what is left of them there.
  void hide(bool own, float sign, float* out) const {
    const bool table_used = fades && !channels;
    for (int64_t i = 0; i < kChunk; ++i) {
      const int64_t visible = i < size ? i + own : 0;
      float* row = out + i * kChunk;
      for (int64_t j = 0; j < kChunk; j += kWidth) {
        Vec found = load(row + j) * splat(sign);
        if (table_used) found = found * load(table + i * kChunk + j);
        store(row + j, first_of(found, visible - j));
      }
    }
  }

  // out (size, e) = what rows read from the state before the chunk: for token decays the rows' factors are `start`, still
  // to be multiplied in; see fade().
  void read(const float* rows, const float* state, float* out) {
    if (channels) {
      multiply_each(rows, from_start, kChunk * ld, x);
      rows = x;
    }
    multiply(size, e, c.d, rows_of(rows, ld), state, le, out, le, nullptr, &ahead);
  }
  bool hides(int64_t t) const { return hidden >> t & 1; }

  // Factors of what read() found.
  const float* fade() const { return start; }

  // Keys faded to the end of the chunk.
  void weigh_keys() {
    if (channels) {
      multiply_each(k, to_end, kChunk * ld, kw);
    } else {
      multiply_rows(k, end, kChunk, ld, kw);
    }
  }

  // u (size, e) of the delta rule, and r with u = beta r: r = v - read - sum over j < i of (decayed k_i . k_j) u_j, where
  // `read` is what keys read from the state before the chunk, and `system` holds minus these products.
  void solve(const float* state, float* system, float* r, float* u) {
    scores(k, false, -1.0f, system);
    read(k, state, r);
    for (int64_t i = 0; i < kChunk; ++i) {
      const Vec factor = splat(-start[i]);
      for (int64_t j = 0; j < le; j += kWidth)
        store(r + i * le + j, fma(factor, load(r + i * le + j), load(v + i * le + j)));
    }
    for (int64_t row = 0; row < size; row += kSolveRows) {
      if (row)
        multiply(kSolveRows, e, row, rows_of(system + row * kChunk, kChunk), u, le, r + row * le, le, kOnes);
      substitute<false>(system, row, r, u);
    }
  }

  // The transposed system from the last row on, for gradients: r += system^T u below each row, and u = beta r.
  void solve_back(const float* system, float* r, float* u) const {
    for (int64_t row = round_up(size, kSolveRows) - kSolveRows; row >= 0; row -= kSolveRows) {
      const int64_t later = row + kSolveRows;
      if (later < size)
        multiply(kSolveRows, e, size - later, columns_of(system + later * kChunk + row, kChunk), u + later * le, le,
                 r + row * le, le, kOnes);
      substitute<true>(system, row, r, u);
    }
  }

  // The state after the chunk.
  void advance(const float* u, float* state) const {
    multiply(c.d, e, size, columns_of(kw, ld), u, le, state, le, through, &ahead);
  }

  static constexpr float kOnes[kSolveRows] = {1, 1, 1, 1};

 private:
  // Of how many tokens the tables are, where all have this one decay.
  const float* constant_ = nullptr;
  int64_t constant_tokens_ = 0;

  // The system's rows from `row` on among themselves, or its columns from the last to the first.
  template <bool kBack>
  void substitute(const float* system, int64_t row, float* r, float* u) const {
    system += row * kChunk + row;
    for (int64_t j = row * le; j < (row + 1) * le; j += kWidth) {
      Vec x[kSolveRows];
#pragma GCC unroll 4
      for (int i = 0; i < kSolveRows; ++i) x[i] = load(r + i * le + j);
#pragma GCC unroll 4
      for (int step = 0; step < kSolveRows; ++step) {
        const int i = kBack ? kSolveRows - 1 - step : step;
        const Vec found = x[i] * splat(beta[row + i]);
        store(r + i * le + j, x[i]);
        store(u + i * le + j, found);
#pragma GCC unroll 4
        for (int more = step + 1; more < kSolveRows; ++more) {
          const int l = kBack ? kSolveRows - 1 - more : more;
          x[l] = fma(splat(kBack ? system[i * kChunk + l] : system[l * kChunk + i]), found, x[l]);
        }
      }
    }
  }

  // Hidden keys and values become zeros, whatever they hold.
  uint32_t hidden_tokens(const uint8_t* keep) {
    uint32_t found = 0;
    for (int64_t t = 0; t < size; ++t) {
      if (keep[t]) continue;
      found |= uint32_t{1} << t;
      for (int64_t j = 0; j < ld; j += kWidth) store(k + t * ld + j, zero());
      for (int64_t j = 0; j < le; j += kWidth) store(v + t * le + j, zero());
    }
    return found;
  }

  int64_t lawful_tokens(const float* decay) const {
    for (int64_t t = 0; t < size; ++t) {
      Vec square = zero(), odd = zero();
      for (int64_t j = 0; j < ld; j += kWidth) square = fma(load(k + t * ld + j), load(k + t * ld + j), square);
      for (int64_t j = 0; j < le; j += kWidth) odd = fma(load(v + t * le + j), zero(), odd);
      const float strength = beta[t] * sum(square);
      bool good = strength >= 0.0f && strength <= 2.1f && bits_unequal(odd, 0.0f) == 0;
      if (fades) {
        const float* row = decay + t * c.decay_n;
        if (channels) {
          bool falls = true;
          for (int64_t j = 0; j < c.d; ++j) falls &= row[j] <= 0.0f;
          good = good && falls;
        } else {
          good = good && *row <= 0.0f;
        }
      }
      if (!good) return t;
    }
    return size;
  }

  void token_decays(const float* decay) {
    for (int64_t i = 0; i < kChunk; ++i) start[i] = end[i] = 1.0f;
    for (int64_t i = 0; i < ld; ++i) through[i] = 1.0f;
    if (!fades) return;
    double total = 0.0, sums[kChunk];
    for (int64_t t = 0; t < kChunk; ++t) {
      if (t < size && !hides(t)) {
        const float g = decay[t * c.decay_n];
        total += static_cast<double>(g < kClosed ? kClosed : g) * 1.4426950408889634;
      }
      sums[t] = total;
      high[t] = static_cast<float>(total);
      low[t] = static_cast<float>(total - static_cast<double>(high[t]));
    }
    for (int64_t t = 0; t < kChunk; ++t) end[t] = static_cast<float>(total - sums[t]);
    for (int64_t t = 0; t < kChunk; t += kWidth) {
      store(start + t, exp2<5>(load(high + t)));
      store(end + t, exp2<5>(load(end + t)));
    }
    // The one factor whose error adds up, chunk after chunk: not the polynomial's, which is off to one side.
    const Vec all = splat(static_cast<float>(__builtin_exp2(total)));
    for (int64_t i = 0; i < ld; i += kWidth) store(through + i, all);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; j += kWidth) {
        const Vec gap = (splat(high[i]) - load(high + j)) + (splat(low[i]) - load(low + j));
        store(table + i * kChunk + j, exp2<5>(min(zero(), gap)));
      }
    }
  }

  void channel_decays(const float* decay) {
    for (int64_t i = 0; i < kChunk; ++i) start[i] = 1.0f;
    for (int64_t t = 0; t < kChunk; ++t) {
      for (int64_t j = 0; j < ld; j += kWidth) {
        const Vec g = t < size && j < c.d && !hides(t) ? load_some(decay + t * c.decay_n + j, c.d - j) : zero();
        store(a + t * ld + j, exp2<5>(g * splat(kLog2E)));
      }
    }
    for (int64_t j = 0; j < ld; j += kWidth) {
      Vec all = splat(1.0f), part = all;
      for (int64_t t = 0; t < kChunk; ++t) {
        const Vec x = load(a + t * ld + j);
        all = all * x;
        part = t % kDecayTile ? part * x : x;
        store(from_start + t * ld + j, all);
        store(tile + t * ld + j, part);
      }
      store(through + j, all);
      faded(kChunk, j, to_end);
      for (int64_t t = kDecayTile, before = 0; t < kChunk; before += t, t += kDecayTile) {
        faded(t, j, left + before * ld);
        for (int64_t i = 0; i < t; ++i)
          store(kd + (before + i) * ld + j, load(left + (before + i) * ld + j) * load(k + i * ld + j));
      }
    }
    transposed(kd, ld, kEarlier, round_up(c.d, kWidth), kdt, kEarlier);
  }

  // What is left of the tokens before `stop` right before it, in the channels from j on.
  void faded(int64_t stop, int64_t j, float* to) const {
    Vec x = splat(1.0f);
    for (int64_t t = stop - 1; t >= 0; --t) {
      store(to + t * ld + j, x);
      x = x * load(a + t * ld + j);
    }
  }

  // Products within the tile that starts at token t.
  void tile_scores(const float* rows, int64_t t, float* out) const {
    const int64_t count = least(kDecayTile, size - t);
    for (int64_t key = 0; key < count; ++key) {
      Vec found[kDecayTile];
      for (int64_t i = 0; i < kDecayTile; ++i) found[i] = zero();
      for (int64_t j = 0; j < c.d; j += kWidth) {
        Vec x = load(k + (t + key) * ld + j);
        found[key] = fma(x, load(rows + (t + key) * ld + j), found[key]);
        for (int64_t i = key + 1; i < count; ++i) {
          x = x * load(a + (t + i) * ld + j);
          found[i] = fma(x, load(rows + (t + i) * ld + j), found[i]);
        }
      }
      for (int64_t i = key; i < count; ++i) out[(t + i) * kChunk + t + key] = sum(found[i]);
    }
  }
};

template <class T>
constexpr float Chunk<T>::kOnes[kSolveRows];
