// Gradients of softmax attention from the saved log-sum-exp: five products for every pair of blocks, none of them stored.
//
// With P = exp(logit - lse) and D = o . do - dlse of each query:
//   dlogit = P (do . v - D)     dv += P do     dk += dlogit q     dq += dlogit k     dbias += dlogit
// and with dropout, Z = 1 / (1 - p) or 0,
//   dlogit = P (Z do . v - D)   dv += P Z do
// where the kernel leaves out the factor 1 / (1 - p) of both until the end: D is taken 1 - p times as large.
// Running sums of forget gates, which a logit adds at its query and takes away at its key, get the sum of dlogit along their
// row less that down their column: what is rounding of D is in both, and drops out when gates are summed up.
//
// A task owns a chunk of the keys of one KV head. It takes them in tiles of 192 (3 key blocks, 32 register blocks of 6),
// packs a tile once, and meets it with panels of 96 queries of every head of the group. The products q.k and do.v read
// keys and values transposed; weights and dlogit of a panel are then the first operand of the other three, read down for
// dv and dk and along for dq, so that in float32 queries, their gradients and keys are packed as plain rows. For bf16 dot
// products a step is a pair of neighbours in whatever is summed over: what is summed over in two ways is packed in two ways.
// Sums of dk and dv of the tile stay in the second cache; dq is summed for each chunk apart, and chunks are added in order.
//
// D from a stored o is off by that one's rounding, which the sums over a row of dbias and over all of a head for the slopes of
// ALiBi are left with: in a row, dlogit adds up to nothing. Where these gradients are wanted, the chunks are surveyed first:
// D becomes what makes each row add up, and the gradient of a slope falls off.
//
// The split into chunks follows from the sizes of one sequence alone, and a sum over queries or keys runs in their order:
// bits depend neither on threads nor on the batch. Rows are cut where the interval cuts: what is left out is exactly 0.

constexpr int kBackBlocks = 3;
constexpr int64_t kBackKeys = kBackBlocks * kBlockKeys;
constexpr int kPanelBlocks = 2;
constexpr int64_t kPanelRows = kPanelBlocks * kBlockQueries;
constexpr int kBlockGroups = kBlockQueries / kRows;
constexpr int kKeyGroups = kBackKeys / kRows;
// Chunks of one KV head: enough that a few threads are busy with few heads. Causal chunks of a quarter of the keys have 7,
// 5, 3 and 1 parts of the work.
constexpr int64_t kMostChunks = 4, kEnoughTasks = 16;
// KV heads are worked on in waves of about this size, so that packed memory does not grow with the batch.
constexpr int64_t kBackWaveBytes = int64_t{64} << 20;

// c = a * b or c += a * b, for 6 rows of a: element s of row i is a[i][s], or a[s][i] when a is read down.
template <class Math, int kVectors, bool kAdd, bool kDown>
ATTNKIT_NOINLINE void product(const typename Math::Element* a, int64_t lda, const typename Math::Element* b,
                              int64_t ldb, int64_t steps, float* c, int64_t ldc) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) acc[i][j] = kAdd ? load(c + i * ldc + j * kWidth) : zero();
  if constexpr (kDown) {
    for (int64_t s = 0; s < steps; ++s) {
      decltype(Math::load_row(b)) row[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) row[j] = Math::load_row(b + j * kWidth);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] = Math::multiply_add(acc[i][j], a + i, row[j]);
      a += lda;
      b += ldb;
    }
  } else {
    multiply_strip<Math, kVectors>(a, lda, b, ldb, steps, acc);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kWidth, acc[i][j]);
}

// Weights of as many rows as a step holds, side by side in each step, for sums over rows; and along each row, for sums
// over keys, which in float32 is the same place.
ATTNKIT_INLINE void store_across(float* to, const Vec (&x)[1][1]) { store(to, x[0][0]); }
ATTNKIT_INLINE void store_along(float*, int64_t, const Vec (&)[1][1]) {}
#if defined(ATTNKIT_BF16_DOT)
ATTNKIT_INLINE void store_across(uint32_t* to, const Vec (&x)[2][2]) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b)
    _mm512_storeu_si512(to + b * kWidth, _mm512_permutexvar_epi16(pairs, reinterpret_cast<__m512i>(
                                                                             _mm512_cvtne2ps_pbh(x[1][b], x[0][b]))));
}
ATTNKIT_INLINE void store_along(uint32_t* to, int64_t lda, const Vec (&x)[2][2]) {
  store_narrow(to, x[0][0], x[0][1]);
  store_narrow(to + lda, x[1][0], x[1][1]);
}
#endif

// The packing functions read of a call only the shape of what they pack.
inline attnkit_softmax rows_of(int64_t rows, int64_t numbers, int64_t stride) {
  attnkit_softmax s = {};
  s.m = s.n = rows;
  s.d = s.e = numbers;
  s.q_m = s.k_n = s.v_n = stride;
  return s;
}

template <class Math, class T>
class Backward {
  using Element = typename Math::Element;
  static constexpr int64_t kNumbers = Math::kNumbers;
  static constexpr int64_t kVectorKeys = kWidth * kNumbers;
  // Float32 weights take the place of their scores; pairs have a place of their own, and scores of one block are enough.
  static constexpr bool kInPlace = kNumbers == 1;
  static constexpr int64_t kScoreKeys = kInPlace ? kBackKeys : kBlockKeys;
  static constexpr int64_t kStats = 4, kTallies = 4;  // numbers of a row

 public:
  Backward(const attnkit_softmax& call, const attnkit_softmax_gradients& gradients)
      : s_(call),
        g_(gradients),
        logits_(call),
        dropout_(call),
        surveys_(gradients.d_alibi || (sizeof(T) == 4 && gradients.d_bias && gradients.d_bias_n)),
        ratio_(call.h / call.g),
        rows_(round_up(call.m, kPanelRows)),
        key_steps_(ceil_div(call.d, kNumbers)),
        value_steps_(ceil_div(call.e, kNumbers)),
        query_lda_(round_up(key_steps_, kWidth)),
        slope_lda_(round_up(value_steps_, kWidth)),
        key_columns_(round_up(call.d, kWidth)),
        value_columns_(round_up(call.e, kWidth)),
        tiles_(ceil_div(call.n, kBackKeys)),
        chunks_(chunk_count()),
        threads_(useful_threads(call, call.b * call.g * chunks_)),
        wave_(wave_heads()) {}

  int64_t scratch_bytes() const {
    return stats_bytes() + wave_ * ratio_ * head_bytes() + threads_ * work_bytes();
  }

  void run(char* scratch) const {
    char* const heads = scratch + stats_bytes();
    char* const works = heads + wave_ * ratio_ * head_bytes();
    const int64_t kv_heads = s_.b * s_.g, blocks = rows_ / kBlockQueries;
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      const Work work(*this, works + thread_number() * work_bytes());
      for (int64_t start = 0; start < kv_heads; start += wave_) {
        const int64_t count = least(wave_, kv_heads - start);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * ratio_ * blocks; ++task)
          pack_queries_of(work, head(scratch, heads, start, task / blocks), task % blocks);
        if (surveys_) {
#pragma omp for schedule(dynamic, 1)
          for (int64_t task = 0; task < count * chunks_; ++task)
            chunk(work, scratch, heads, start, task % count, task / count, true);
#pragma omp for schedule(dynamic, 4)
          for (int64_t task = 0; task < count * ratio_ * blocks; ++task)
            balance(head(scratch, heads, start, task / blocks), task % blocks);
        }
        // Of causal chunks the first have the longest columns.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * chunks_; ++task)
          chunk(work, scratch, heads, start, task % count, task / count, false);
        if (g_.d_q || g_.d_total) {
#pragma omp for schedule(dynamic, 4)
          for (int64_t task = 0; task < count * ratio_ * blocks; ++task)
            finish_queries(head(scratch, heads, start, task / blocks), task % blocks);
        }
      }
      if (g_.d_sink) {
#pragma omp for schedule(static)
        for (int64_t h = 0; h < s_.h; ++h) g_.d_sink[h] = sink_gradient(scratch, h);
      }
      if (g_.d_alibi) {
#pragma omp for schedule(static)
        for (int64_t h = 0; h < s_.h; ++h) g_.d_alibi[h] = alibi_gradient(scratch, h);
      }
      if (g_.d_bias && g_.d_bias_n == 0) {
#pragma omp single
        add_bias_of_rows(scratch);
      }
    }
  }

 private:
  // One query head of the wave. `across` is the second operand of a product that sums over queries, `along` the first of
  // one that sums over the numbers of a row; in float32 they are the same rows.
  struct Head {
    int64_t batch, head;
    uint64_t chance;     // see Dropout::of_head
    float *lse, *rest;   // of each row, in exponents of two, +inf where nothing is seen: their sum is the log-sum-exp
    float* delta;        // D above, divided by the scale of dropout
    float* fall;         // of each row, slopes times distances
    double* tallies;     // of each chunk and row, see survey
    Element *query_across, *slope_across, *query_along, *slope_along;
    float* sums;         // of dq, for each chunk
    double* row_slopes;  // sums of dlogit of each row, for each chunk, where gates want them
    uint8_t* odd;        // of each block: a query or its gradient holds a NaN or an infinity
  };

  // What one thread works in.
  struct Work {
    Element *keys_down, *values_down;  // transposed, as the first two products read them
    Element* keys_across;              // rows
    float *d_keys, *d_values;          // sums of the tile
    Element *weights, *slopes;         // panel x tile, pairs of queries side by side
    Element* slope_rows;               // the same slopes, pairs of keys side by side
    float *scores, *products;          // q.k and do.v
    float* caps;                       // derivatives of the soft-cap, one block
    double* key_slopes;                // sums of dlogit of each key of the tile, one head, where gates want them
    Work(const Backward& p, char* memory)
        : keys_down(reinterpret_cast<Element*>(memory)),
          values_down(keys_down + kBackKeys * p.key_steps_),
          keys_across(values_down + kBackKeys * p.value_steps_),
          d_keys(reinterpret_cast<float*>(keys_across + kBackKeys / kNumbers * p.key_columns_)),
          d_values(d_keys + kBackKeys * p.key_columns_),
          weights(reinterpret_cast<Element*>(d_values + kBackKeys * p.value_columns_)),
          slopes(weights + kPanelRows / kNumbers * kBackKeys),
          slope_rows(kInPlace ? slopes : slopes + kPanelRows / kNumbers * kBackKeys),
          scores(kInPlace ? reinterpret_cast<float*>(weights)
                          : reinterpret_cast<float*>(slope_rows + kPanelRows * kBackKeys / kNumbers)),
          products(kInPlace ? reinterpret_cast<float*>(slopes) : scores + kBlockQueries * kBlockKeys),
          caps(kInPlace ? products + kPanelRows * kBackKeys : products + kBlockQueries * kBlockKeys),
          key_slopes(reinterpret_cast<double*>(caps + (p.s_.softcap > 0 ? kBlockQueries * kBlockKeys : 0))) {}
  };

  // A panel of queries against a tile of keys.
  struct Meeting {
    int64_t first, count;              // queries
    bool surveys;                      // nothing but tallies is wanted
    int64_t key_block;                 // of the tile
    int blocks, query_blocks;
    bool some = false, careful = false;
    bool whole[kPanelBlocks];          // every row sees every key of the tile
    bool present[kPanelBlocks][kBackBlocks], partial[kPanelBlocks][kBackBlocks];
    const int64_t* words[kPanelBlocks][kBackBlocks];
    int key_groups;
    Range rows[kKeyGroups];            // of the panel that see some of six keys
    ATTNKIT_INLINE int64_t rows_of(int block) const { return least(kBlockQueries, count - block * kBlockQueries); }
    ATTNKIT_INLINE int groups(int block) const { return static_cast<int>(ceil_div(rows_of(block), kRows)); }
  };

  int64_t chunk_count() const {
    // A bias shared by heads makes them wait for each other.
    const int64_t wanted = g_.d_bias ? kMostChunks : clamp<int64_t>(kEnoughTasks / s_.g, 1, kMostChunks);
    return clamp<int64_t>(wanted, 1, most<int64_t>(tiles_, 1));
  }
  // KV heads that add to the same gradient of a bias go one after the other.
  int64_t wave_heads() const {
    if (g_.d_bias && ((g_.d_bias_b == 0 && s_.b > 1) || (g_.d_bias_h == 0 && s_.g > 1))) return 1;
    const int64_t fit = kBackWaveBytes / most<int64_t>(ratio_ * head_bytes(), 1);
    return clamp<int64_t>(most(fit, threads_), 1, most<int64_t>(s_.b * s_.g, 1));
  }
  int64_t stats_bytes() const { return round_up(4 * kStats * s_.b * s_.h * rows_, 64); }
  int64_t head_bytes() const {
    const int64_t along = kInPlace ? 0 : rows_ * (query_lda_ + slope_lda_);
    const int64_t across = rows_ / kNumbers * (key_columns_ + value_columns_);
    const int64_t tallies = surveys_ ? chunks_ * kTallies * rows_ : 0, slopes = g_.d_total ? chunks_ * rows_ : 0;
    return round_up(4 * (along + across + chunks_ * rows_ * key_columns_) + 8 * (tallies + slopes) + rows_ / kBlockQueries,
                    64);
  }
  int64_t work_bytes() const {
    const int64_t tile = kBackKeys * (key_steps_ + value_steps_ + key_columns_ / kNumbers + key_columns_ + value_columns_);
    const int64_t panel = 2 * kPanelRows / kNumbers * kBackKeys;
    const int64_t pairs = kInPlace ? 0 : kPanelRows * kBackKeys / kNumbers + 2 * kBlockQueries * kBlockKeys;
    const int64_t slopes = g_.d_total ? 2 * kBackKeys : 0;
    return round_up(4 * (tile + panel + pairs + slopes + (s_.softcap > 0 ? kBlockQueries * kBlockKeys : 0)), 64);
  }

  float* stats_of(char* stats, int64_t batch, int64_t h) const {
    return reinterpret_cast<float*>(stats) + kStats * (batch * s_.h + h) * rows_;
  }

  Head head(char* stats, char* heads, int64_t start, int64_t index) const {
    const int64_t kv = start + index / ratio_, batch = kv / s_.g, h = kv % s_.g * ratio_ + index % ratio_;
    Head q;
    q.batch = batch;
    q.head = h;
    q.chance = dropout_.of_head(batch, h);
    q.lse = stats_of(stats, batch, h);
    q.rest = q.lse + rows_;
    q.delta = q.rest + rows_;
    q.fall = q.delta + rows_;
    q.query_across = reinterpret_cast<Element*>(heads + index * head_bytes());
    q.slope_across = q.query_across + rows_ / kNumbers * key_columns_;
    Element* end = q.slope_across + rows_ / kNumbers * value_columns_;
    q.query_along = kInPlace ? q.query_across : end;
    q.slope_along = kInPlace ? q.slope_across : end + rows_ * query_lda_;
    if (!kInPlace) end = q.slope_along + rows_ * slope_lda_;
    q.sums = reinterpret_cast<float*>(end);
    q.tallies = reinterpret_cast<double*>(q.sums + chunks_ * rows_ * key_columns_);
    q.row_slopes = q.tallies + (surveys_ ? chunks_ * kTallies * rows_ : 0);
    q.odd = reinterpret_cast<uint8_t*>(q.row_slopes + (g_.d_total ? chunks_ * rows_ : 0));
    return q;
  }

  // [row / kNumbers][columns]; whether something is a NaN or an infinity.
  static bool pack_across(const attnkit_softmax& shape, const T* from, int64_t rows, int64_t columns, Element* out) {
    Vec check = zero();
    for (int64_t row = 0; row < rows; row += kNumbers)
      for (int64_t c = 0; c < columns; c += kWidth)
        pack_values<Math>(shape, from, row, c, out + row / kNumbers * columns + c, check);
    return bits_unequal(check, 0.0f) != 0;
  }

  // One block of 48 rows: queries, their gradients, what is known of each row.
  void pack_queries_of(const Work& w, const Head& h, int64_t block) const {
    const int64_t first = block * kBlockQueries, count = clamp<int64_t>(s_.m - first, 0, kBlockQueries);
    const T* q = static_cast<const T*>(s_.q) + h.batch * s_.q_b + h.head * s_.q_h + first * s_.q_m;
    const T* o = static_cast<const T*>(s_.o) + h.batch * s_.o_b + h.head * s_.o_h + first * s_.o_m;
    const T* slope = static_cast<const T*>(g_.d_o) + h.batch * g_.d_o_b + h.head * g_.d_o_h + first * g_.d_o_m;
    const attnkit_softmax queries = rows_of(count, s_.d, s_.q_m), slopes = rows_of(count, s_.e, g_.d_o_m);
    const bool odd_query = pack_across(queries, q, kBlockQueries, key_columns_, h.query_across + first / kNumbers * key_columns_);
    const bool odd_slope =
        pack_across(slopes, slope, kBlockQueries, value_columns_, h.slope_across + first / kNumbers * value_columns_);
    h.odd[block] = odd_query || odd_slope;
    if (!kInPlace) {
      pack_queries<Math>(queries, q, count, kBlockQueries, query_lda_, h.query_along + first * query_lda_);
      pack_queries<Math>(slopes, slope, count, kBlockQueries, slope_lda_, h.slope_along + first * slope_lda_);
    }
    // The value of an only key is the output; what was stored may be a rounding beside it.
    const Range only = only_keys(first, count);
    if (!only.empty())
      o = static_cast<const T*>(s_.v) + h.batch * s_.v_b + h.head / ratio_ * s_.v_g + only.begin * s_.v_n;
    const attnkit_softmax outputs = rows_of(count, s_.e, only.empty() ? s_.o_m : only.end - only.begin > 1 ? s_.v_n : 0);
    pack_key_block<Math>(outputs, o, PackedSizes<Math>(outputs), 0, w.values_down);
    for (int group = 0; group * kRows < count; ++group) row_numbers(w, h, first, count, group, only);
    for (int64_t i = count; i < kBlockQueries; ++i) {
      h.lse[first + i] = kInfinity;
      h.rest[first + i] = h.delta[first + i] = 0.0f;
    }
  }

  // The keys of `count` rows that see one key each: all the same, or each row the next; empty for other rows.
  Range only_keys(int64_t first, int64_t count) const {
    if (count == 0 || s_.sink || (s_.offsets && s_.n > 1)) return {0, 0};
    const Range from = visible_range(s_, first), to = visible_range(s_, first + count - 1);
    const int64_t step = to.begin - from.begin;
    const bool lone = from.end - from.begin == 1 && to.end - to.begin == 1 && (step == 0 || step == count - 1);
    return lone ? Range{from.begin, to.end} : Range{0, 0};
  }

  // The one of row i of a block.
  static int64_t only_key(Range only, int64_t i) { return only.end - only.begin > 1 ? only.begin + i : only.begin; }
  bool keeps(const Head& h, int64_t query, int64_t key) const {
    return dropout_.kept(dropout_.of_row(h.chance, query), key / kWidth * kWidth) >> key % kWidth & 1;
  }

  // What weights and slopes of six rows are taken against. o . do is the diagonal of a product, so that its sums run in the
  // order of do . v: where a row sees one key, whose value is then its output, their difference is exactly 0.
  void row_numbers(const Work& w, const Head& h, int64_t first, int64_t count, int group, Range only) const {
    const int64_t begin = group * kRows, end = least(begin + kRows, count);
    multiply_columns(h.slope_along + (first + begin) * slope_lda_, slope_lda_, w.values_down, value_steps_,
                     {begin / kWidth * kWidth, round_up(end, kWidth)}, w.scores);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = (h.batch * s_.h + h.head) * s_.m + first + i;
      // A row that sees nothing has weights of 2^-inf.
      const bool seen = s_.lse[row] != -kInfinity;
      const double lse = static_cast<double>(s_.lse[row]) + (s_.lse_rest ? static_cast<double>(s_.lse_rest[row]) : 0.0);
      const double exponent = lse * kExactLog2E;
      h.lse[first + i] = seen ? static_cast<float>(exponent) : kInfinity;
      h.rest[first + i] = seen ? static_cast<float>(exponent - static_cast<double>(h.lse[first + i])) : 0.0f;
      float product = w.scores[(i - begin) * kScoreKeys + i];
      if (dropout_.drops) {
        const bool kept = only.empty() || keeps(h, first + i, only_key(only, i));
        product = only.empty() ? product / dropout_.scale : kept ? product : 0.0f;
      }
      h.delta[first + i] = seen ? product - (g_.d_lse ? g_.d_lse[row] / dropout_.scale : 0.0f) : 0.0f;
    }
  }

  // Rows that see some key of [begin, end) through the interval.
  ATTNKIT_INLINE Range seeing_rows(int64_t begin, int64_t end) const {
    const int64_t shift = s_.n - s_.m;
    return {clamp<int64_t>(begin - s_.right - shift, 0, s_.m), clamp<int64_t>(end + s_.left - shift, 0, s_.m)};
  }

  // Surveys a chunk or sums up its gradients.
  void chunk(const Work& w, char* stats, char* heads, int64_t start, int64_t slot, int64_t number, bool surveys) const {
    const int64_t kv = start + slot, batch = kv / s_.g, group = kv % s_.g;
    const T* k = static_cast<const T*>(s_.k) + batch * s_.k_b + group * s_.k_g;
    const T* v = static_cast<const T*>(s_.v) + batch * s_.v_b + group * s_.v_g;
    for (int64_t i = 0; i < ratio_; ++i) {
      const Head h = head(stats, heads, start, slot * ratio_ + i);
      if (surveys) {
        for (int64_t at = 0; at < kTallies * rows_; ++at) h.tallies[number * kTallies * rows_ + at] = 0.0;
        continue;
      }
      float* sums = h.sums + number * rows_ * key_columns_;
      for (int64_t at = 0; at < rows_ * key_columns_; at += kWidth) store(sums + at, zero());
      if (g_.d_total)
        for (int64_t at = 0; at < rows_; ++at) h.row_slopes[number * rows_ + at] = 0.0;
    }
    for (int64_t tile = number * tiles_ / chunks_; tile < (number + 1) * tiles_ / chunks_; ++tile) {
      const int64_t key = tile * kBackKeys, count = least(kBackKeys, s_.n - key);
      const int blocks = static_cast<int>(ceil_div(count, kBlockKeys));
      const attnkit_softmax keys = rows_of(count, s_.d, s_.k_n), values = rows_of(count, s_.e, s_.v_n);
      const PackedSizes<Math> key_sizes(keys), value_sizes(values);
      bool odd[kBackBlocks];
      for (int j = 0; j < blocks; ++j) {
        pack_key_block<Math>(keys, k + key * s_.k_n, key_sizes, j, w.keys_down);
        pack_key_block<Math>(values, v + key * s_.v_n, value_sizes, j, w.values_down);
        const attnkit_softmax block = rows_of(count - j * kBlockKeys, s_.d, s_.k_n);
        odd[j] = !surveys && pack_across(block, k + (key + j * kBlockKeys) * s_.k_n, kBlockKeys, key_columns_,
                                         w.keys_across + j * kBlockKeys / kNumbers * key_columns_);
      }
      for (int64_t at = 0; at < kBackKeys * (key_columns_ + value_columns_); at += kWidth) store(w.d_keys + at, zero());
      const Range rows = seeing_rows(key, key + count);
      for (int64_t i = 0; i < ratio_; ++i) {
        Head h = head(stats, heads, start, slot * ratio_ + i);
        h.sums += number * rows_ * key_columns_;
        h.tallies += number * kTallies * rows_;
        h.row_slopes += number * rows_;
        const bool gates = g_.d_total && !surveys;
        if (gates)
          for (int64_t j = 0; j < kBackKeys; ++j) w.key_slopes[j] = 0.0;
        for (int64_t first = rows.begin / kPanelRows * kPanelRows; first < rows.end; first += kPanelRows)
          meet(w, h, first, tile * kBackBlocks, blocks, odd, surveys);
        if (gates)
          for (int64_t j = 0; j < count; ++j) total_slopes(h)[key + j] = -w.key_slopes[j] * dropout_.scale;
      }
      if (surveys) continue;
      const float by = dropout_.scale;
      if (g_.d_k)
        finish(w.d_keys, key_columns_, count, s_.d, s_.scale * by, static_cast<T*>(g_.d_k) + kv * g_.d_k_g + key * s_.d);
      if (g_.d_v)
        finish(w.d_values, value_columns_, count, s_.e, by, static_cast<T*>(g_.d_v) + kv * g_.d_v_g + key * s_.e);
    }
  }

  static void finish(const float* sums, int64_t columns, int64_t rows, int64_t numbers, float factor, T* out) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < numbers; c += kWidth)
        store_some(out + i * numbers + c, load(sums + i * columns + c) * splat(factor), numbers - c);
  }

  double* total_slopes(const Head& h) const { return g_.d_total + (h.batch * s_.h + h.head) * s_.n; }

  void finish_queries(const Head& h, int64_t block) const {
    const int64_t first = block * kBlockQueries, last = least(first + kBlockQueries, s_.m);
    if (g_.d_total)
      for (int64_t part = 0; part < chunks_; ++part)
        for (int64_t i = first; i < last; ++i)
          total_slopes(h)[s_.n - s_.m + i] += h.row_slopes[part * rows_ + i] * dropout_.scale;
    if (!g_.d_q) return;
    T* out = static_cast<T*>(g_.d_q) + (h.batch * s_.h + h.head) * g_.d_q_h;
    for (int64_t i = first; i < last; ++i) {
      for (int64_t c = 0; c < s_.d; c += kWidth) {
        Vec total = load(h.sums + i * key_columns_ + c);
        for (int64_t part = 1; part < chunks_; ++part)
          total = total + load(h.sums + (part * rows_ + i) * key_columns_ + c);
        store_some(out + i * s_.d + c, total * splat(s_.scale * dropout_.scale), s_.d - c);
      }
    }
  }

  // The sink is one more key, whose value is 0.
  float sink_gradient(char* stats, int64_t h) const {
    double total = 0.0;
    for (int64_t batch = 0; batch < s_.b; ++batch) {
      const float* row = stats_of(stats, batch, h);
      for (int64_t i = 0; i < s_.m; ++i) total -= sink_part(row + i, h);
    }
    return static_cast<float>(total);
  }

  // The sink's weight in a row.
  double sink_weight(const float* row, int64_t h) const {
    const double exponent = static_cast<double>(s_.sink[h]) * kExactLog2E - static_cast<double>(row[0]);
    return __builtin_exp2(exponent - static_cast<double>(row[rows_]));
  }
  // The same, times that row's D.
  double sink_part(const float* row, int64_t h) const {
    return sink_weight(row, h) * static_cast<double>(row[2 * rows_]) * static_cast<double>(dropout_.scale);
  }

  // A slope of ALiBi takes off its distance.
  float alibi_gradient(char* stats, int64_t h) const {
    double total = 0.0;
    for (int64_t batch = 0; batch < s_.b; ++batch) {
      const float* row = stats_of(stats, batch, h) + 3 * rows_;
      for (int64_t i = 0; i < s_.m; ++i) total -= static_cast<double>(row[i]);
    }
    return static_cast<float>(total * static_cast<double>(dropout_.scale));
  }

  // A bias that all keys of a row share moves its log-sum-exp, and weights only against the sink's: summing dlogit instead
  // would leave nothing but rounding.
  void add_bias_of_rows(char* stats) const {
    for (int64_t row = 0; row < s_.b * s_.h * s_.m; ++row) {
      const int64_t i = row % s_.m, h = row / s_.m % s_.h, batch = row / s_.m / s_.h;
      const float* numbers = stats_of(stats, batch, h) + i;
      if (numbers[0] == kInfinity) continue;
      float slope = g_.d_lse ? g_.d_lse[row] : 0.0f;
      if (s_.sink) slope += static_cast<float>(sink_part(numbers, h));
      g_.d_bias[batch * g_.d_bias_b + h * g_.d_bias_h + i * g_.d_bias_m] += slope;
    }
  }

  void meet(const Work& w, const Head& h, int64_t first, int64_t key_block, int blocks, const bool* odd, bool surveys) const {
    Meeting p;
    p.surveys = surveys;
    p.first = first;
    p.count = least(kPanelRows, s_.m - first);
    p.key_block = key_block;
    p.blocks = blocks;
    p.query_blocks = static_cast<int>(ceil_div(p.count, kBlockQueries));
    for (int i = 0; i < p.query_blocks; ++i) look(h, p, i, odd);
    if (!p.some) return;
    cut_rows(p);
    for (int j = 0; j < blocks; ++j) {
      for (int i = 0; i < p.query_blocks; ++i) {
        if (p.present[i][j]) weigh_block(w, h, p, i, j);
        if (!p.whole[i] && !surveys) clear(w, p, i, j);
      }
    }
    if (surveys) return;
    if (p.careful) return add_visible(w, h, p);
    if (g_.d_v)
      add_down(w.weights, h.slope_across + first / kNumbers * value_columns_, value_columns_, w.d_values, p);
    if (g_.d_k) add_down(w.slopes, h.query_across + first / kNumbers * key_columns_, key_columns_, w.d_keys, p);
    if (g_.d_q)
      for (int i = 0; i < p.query_blocks; ++i) add_queries(w, h, p, i);
  }

  // What one block of queries sees of the tile.
  void look(const Head& h, Meeting& p, int i, const bool* odd) const {
    const int64_t begin = p.first + i * kBlockQueries, last = begin + p.rows_of(i) - 1;
    const Range every = {visible_range(s_, last).begin, visible_range(s_, begin).end};
    const Range some = {visible_range(s_, begin).begin, visible_range(s_, last).end};
    const Range tile = {p.key_block * kBlockKeys, (p.key_block + p.blocks) * kBlockKeys};
    for (int j = 0; j < p.blocks; ++j) {
      p.present[i][j] = false;
      p.words[i][j] = nullptr;
    }
    p.whole[i] = true;
    const KeyBlocks list(s_, h.batch, h.head, begin / kBlockQueries,
                         {most(some.begin, tile.begin), least(some.end, tile.end)});
    for (int64_t entry = list.entry; entry < list.entry_end; ++entry) {
      const int64_t j = list.key_block(entry) - p.key_block;
      p.present[i][j] = p.some = true;
      p.words[i][j] = list.words(entry);
    }
    for (int j = 0; j < p.blocks; ++j) {
      const int64_t key = (p.key_block + j) * kBlockKeys;
      p.partial[i][j] = p.words[i][j] || every.begin > key || every.end < key + kBlockKeys;
      p.whole[i] = p.whole[i] && p.present[i][j] && !p.partial[i][j];
      // 0 times what a row may not see would be a NaN.
      const bool hides = p.partial[i][j] || !p.present[i][j] || s_.bias;
      p.careful = p.careful || (hides && (odd[j] || h.odd[begin / kBlockQueries]));
    }
  }

  // Rows of the panel that each six keys are summed over.
  void cut_rows(Meeting& p) const {
    const int64_t key = p.key_block * kBlockKeys;
    p.key_groups = static_cast<int>(ceil_div(p.blocks * kBlockKeys, kRows));
    for (int group = 0; group < p.key_groups; ++group) {
      const int64_t begin = group * kRows, end = least(begin + kRows, p.blocks * kBlockKeys);
      bool some = false;
      for (int i = 0; i < p.query_blocks; ++i)
        some = some || p.present[i][begin / kBlockKeys] || p.present[i][(end - 1) / kBlockKeys];
      const Range rows = seeing_rows(key + begin, key + end);
      p.rows[group] = some ? Range{clamp<int64_t>(rows.begin - p.first, 0, p.count) / kNumbers * kNumbers,
                                   round_up(clamp<int64_t>(rows.end - p.first, 0, p.count), kNumbers)}
                           : Range{0, 0};
    }
  }

  // Columns of key block j that some of six rows of query block i see, in whole vectors.
  ATTNKIT_INLINE Range columns(const Meeting& p, int i, int group, int j) const {
    if (p.whole[i]) return {0, kBlockKeys};
    if (!p.present[i][j]) return {0, 0};
    const int64_t begin = p.first + i * kBlockQueries + group * kRows, key = (p.key_block + j) * kBlockKeys;
    const int64_t last = least(begin + kRows, s_.m) - 1;
    const Range seen = {clamp<int64_t>(visible_range(s_, begin).begin - key, 0, kBlockKeys),
                        clamp<int64_t>(visible_range(s_, last).end - key, 0, kBlockKeys)};
    return seen.empty() ? Range{0, 0}
                        : Range{seen.begin / kVectorKeys * kVectorKeys, round_up(seen.end, kVectorKeys)};
  }

  // Six rows against the columns of one block: products of a with what was packed down.
  ATTNKIT_INLINE static void multiply_columns(const Element* a, int64_t lda, const Element* down, int64_t steps,
                                              Range r, float* c) {
    for (int64_t at = r.begin; at < r.end;) {
      const int64_t strip = at / kStrip * kStrip, stop = least(r.end, strip + kStrip);
      with_vectors((stop - at) / kWidth, [&](auto vectors) {
        product<Math, vectors.count, false, false>(a, lda, down + strip * steps + at - strip, kStrip, steps, c + at,
                                                   kScoreKeys);
      });
      at = stop;
    }
  }

  void weigh_block(const Work& w, const Head& h, const Meeting& p, int i, int j) const {
    const int64_t first = p.first + i * kBlockQueries;
    const int64_t place = kInPlace ? i * kBlockQueries * kScoreKeys + j * kBlockKeys : 0;
    float *scores = w.scores + place, *products = w.products + place;
    for (int group = 0; group < p.groups(i); ++group)
      multiply_columns(h.query_along + (first + group * kRows) * query_lda_, query_lda_,
                       w.keys_down + j * kBlockKeys * key_steps_, key_steps_, columns(p, i, group, j),
                       scores + group * kRows * kScoreKeys);
    for (int group = 0; group < p.groups(i); ++group)
      multiply_columns(h.slope_along + (first + group * kRows) * slope_lda_, slope_lda_,
                       w.values_down + j * kBlockKeys * value_steps_, value_steps_, columns(p, i, group, j),
                       products + group * kRows * kScoreKeys);
    const bool plain = logits_.plain && !p.partial[i][j] && !dropout_.drops;
    for (int group = 0; group < p.groups(i); ++group) {
      const Range r = columns(p, i, group, j);
      if (r.empty()) continue;
      if (plain) {
        weigh<true, false>(w, h, p, i, j, group, r, scores, products);
      } else {
        for (int row = group * kRows; row < (group + 1) * kRows; ++row)
          to_logits(w, h, p, i, j, row, r, scores + row * kScoreKeys);
        if (p.surveys) {
          dropout_.drops ? survey<true>(h, p, i, j, group, r, scores, products)
                         : survey<false>(h, p, i, j, group, r, scores, products);
        } else if (dropout_.drops) {
          weigh<false, true>(w, h, p, i, j, group, r, scores, products);
        } else {
          weigh<false, false>(w, h, p, i, j, group, r, scores, products);
        }
      }
    }
  }

  // Logits of one row, -inf where it may not look.
  void to_logits(const Work& w, const Head& h, const Meeting& p, int i, int j, int64_t row, Range r, float* scores) const {
    const int64_t query = p.first + i * kBlockQueries + row, key = (p.key_block + j) * kBlockKeys;
    const bool real = query < s_.m;
    if (s_.softcap > 0) {  // of rows past the end as well: a pair of rows is summed together
      const Vec factor = splat(s_.scale / s_.softcap);
      for (int64_t c = r.begin; c < r.end; c += kWidth) {
        const Vec t = tanh(load(scores + c) * factor);
        store(w.caps + row * kBlockKeys + c, splat(1.0f) - t * t);
      }
    }
    if (!logits_.plain && real) {
      logits_.apply(scores + r.begin, static_cast<int>((r.end - r.begin) / kWidth), h.batch, h.head, query, key + r.begin);
    }
    if (!p.partial[i][j]) return;
    const uint64_t word = real ? visible_word(s_, query, p.key_block + j, p.words[i][j]) : 0;
    for (int64_t c = r.begin; c < r.end; c += kWidth)
      store(scores + c, select(static_cast<Bits>(word >> c), load(scores + c), -kInfinity));
  }

  // What a row's weights and slopes are taken against.
  struct Row {
    Vec shift, rest, delta;
    uint64_t chance;
  };
  template <bool kDrops>
  ATTNKIT_INLINE Row row_at(const Head& h, int64_t query) const {
    return {splat(-h.lse[query]), splat(h.rest[query]), splat(h.delta[query]),
            kDrops ? dropout_.of_row(h.chance, query) : 0};
  }

  // A row's weights of the keys from `key` on, before dropout, and their slopes, from logits x and products do . v.
  // Returns which of them dropout keeps. Only calls that are not plain hide keys.
  template <bool kPlain, bool kDrops>
  ATTNKIT_INLINE Bits weigh_keys(const Row& row, int64_t key, Vec x, Vec products, Vec& weight, Vec& slope) const {
    // Weights that are rounded to pairs do not notice the rest.
    const Vec exponent = fma(x, splat(logits_.exponent), row.shift);
    weight = exp2<Math::kExpDegree>(kInPlace ? exponent - row.rest : exponent);
    const Bits kept = kDrops ? dropout_.kept(row.chance, key) : 0;
    if constexpr (kDrops) products = select(kept, products, 0.0f);
    slope = weight * (products - row.delta);
    if constexpr (!kPlain) {
      const Bits seen = bits_unequal(x, -kInfinity);
      weight = select(seen, weight, 0.0f);
      slope = select(seen, slope, 0.0f);
    }
    return kept;
  }

  // Weights and slopes of six rows. Only calls that are not plain cap logits or want the gradient of a bias.
  template <bool kPlain, bool kDrops>
  ATTNKIT_NOINLINE void weigh(const Work& w, const Head& h, const Meeting& p, int i, int j, int group, Range r,
                              const float* scores, const float* products) const {
    const int64_t first = p.first + i * kBlockQueries;
    for (int64_t row = group * kRows; row < (group + 1) * kRows; row += kNumbers) {
      Row rows[kNumbers];
      for (int a = 0; a < kNumbers; ++a) rows[a] = row_at<kDrops>(h, first + row + a);
      double along[kNumbers][kWidth];  // of gates alone
      if (!kPlain && g_.d_total) __builtin_memset(along, 0, sizeof along);
      for (int64_t c = r.begin; c < r.end; c += kVectorKeys) {
        Vec weight[kNumbers][kNumbers], slope[kNumbers][kNumbers];
#pragma GCC unroll 2
        for (int a = 0; a < kNumbers; ++a) {
#pragma GCC unroll 2
          for (int b = 0; b < kNumbers; ++b) {
            const int64_t at = (row + a) * kScoreKeys + c + b * kWidth;
            const int64_t key = (p.key_block + j) * kBlockKeys + c + b * kWidth;
            const Bits kept = weigh_keys<kPlain, kDrops>(rows[a], key, load(scores + at), load(products + at),
                                                         weight[a][b], slope[a][b]);
            if constexpr (kDrops) weight[a][b] = select(kept, weight[a][b], 0.0f);
            if constexpr (!kPlain) {
              if (g_.d_bias && g_.d_bias_n && first + row + a < s_.m) add_bias(h, first + row + a, key, slope[a][b]);
              if (g_.d_total) add_slopes(along[a], w.key_slopes + j * kBlockKeys + c + b * kWidth, slope[a][b]);
              if (s_.softcap > 0)
                slope[a][b] = slope[a][b] * load(w.caps + (row + a) * kBlockKeys + c + b * kWidth);
            }
          }
        }
        const int64_t at = (i * kBlockQueries + row) / kNumbers * kBackKeys + j * kBlockKeys + c;
        store_across(w.weights + at, weight);
        store_across(w.slopes + at, slope);
        store_along(w.slope_rows + ((i * kBlockQueries + row) * kBackKeys + j * kBlockKeys + c) / kNumbers,
                    kBackKeys / kNumbers, slope);
      }
      if (!kPlain && g_.d_total)
        for (int a = 0; a < kNumbers; ++a)
          for (int c = 0; c < kWidth; ++c) h.row_slopes[first + row + a] += along[a][c];
    }
  }

  static ATTNKIT_INLINE void add_slopes(double* along, double* down, Vec slope) {
    float x[kWidth];
    store(x, slope);
    for (int i = 0; i < kWidth; ++i) {
      along[i] += static_cast<double>(x[i]);
      down[i] += static_cast<double>(x[i]);
    }
  }

  // What weights and slopes of six rows add up to, alone and each times the distance of its key.
  template <bool kDrops>
  ATTNKIT_NOINLINE void survey(const Head& h, const Meeting& p, int i, int j, int group, Range r, const float* scores,
                               const float* products) const {
    for (int64_t row = group * kRows; row < least((group + 1) * int64_t{kRows}, p.rows_of(i)); ++row) {
      const int64_t query = p.first + i * kBlockQueries + row, key = (p.key_block + j) * kBlockKeys;
      const Row from = row_at<kDrops>(h, query);
      Vec weights = zero(), slopes = zero(), far_weights = zero(), far_slopes = zero();
      for (int64_t c = r.begin; c < r.end; c += kWidth) {
        Vec weight, slope;
        weigh_keys<false, kDrops>(from, key + c, load(scores + row * kScoreKeys + c), load(products + row * kScoreKeys + c),
                                  weight, slope);
        const Vec distance = abs(iota() + splat(static_cast<float>(key + c - (s_.n - s_.m + query))));
        weights = weights + weight;
        slopes = slopes + slope;
        far_weights = fma(weight, distance, far_weights);
        far_slopes = fma(slope, distance, far_slopes);
      }
      double* const tallies = h.tallies + query;
      tallies[0] += static_cast<double>(sum(weights));
      tallies[rows_] += static_cast<double>(sum(slopes));
      tallies[2 * rows_] += static_cast<double>(sum(far_weights));
      tallies[3 * rows_] += static_cast<double>(sum(far_slopes));
    }
  }

  // Moves D by what makes the slopes of each row add up to what they must: to nothing, but for the sink's and dlse.
  void balance(const Head& h, int64_t block) const {
    for (int64_t i = block * kBlockQueries; i < least((block + 1) * kBlockQueries, s_.m); ++i) {
      double tally[kTallies] = {};
      for (int64_t part = 0; part < chunks_; ++part)
        for (int64_t t = 0; t < kTallies; ++t) tally[t] += h.tallies[(part * kTallies + t) * rows_ + i];
      const bool seen = h.lse[i] != kInfinity;
      const float d_lse = g_.d_lse ? g_.d_lse[(h.batch * s_.h + h.head) * s_.m + i] / dropout_.scale : 0.0f;
      const double sunk = s_.sink && seen ? sink_weight(h.lse + i, h.head) : 0.0, whole = tally[0] + sunk;
      const double delta = static_cast<double>(h.delta[i]), mean = delta + static_cast<double>(d_lse);
      const double by = seen ? (tally[1] - static_cast<double>(d_lse) * tally[0] - mean * sunk) / whole : 0.0;
      h.delta[i] = static_cast<float>(delta + by);
      h.fall[i] = static_cast<float>(tally[3] - by * tally[2]);
    }
  }

  void add_bias(const Head& h, int64_t query, int64_t key, Vec slope) const {
    float* to = g_.d_bias + h.batch * g_.d_bias_b + h.head * g_.d_bias_h + query * g_.d_bias_m + key * g_.d_bias_n;
    const int64_t count = least<int64_t>(kWidth, s_.n - key);
    if (count <= 0) return;
    store_some(to, load_some(to, count) + slope * splat(dropout_.scale), count);
  }

  // 0 where a sum over queries reads and nothing was computed.
  void clear(const Work& w, const Meeting& p, int i, int j) const {
    for (int group = 0; group < p.groups(i); ++group) {
      const Range r = columns(p, i, group, j);
      for (int64_t row = group * kRows; row < (group + 1) * kRows; row += kNumbers) {
        const int64_t at = (i * kBlockQueries + row) / kNumbers * kBackKeys + j * kBlockKeys;
        for (int64_t c = 0; c < kBlockKeys; c += kWidth) {
          if (c >= r.begin && c < r.end) continue;
          store(reinterpret_cast<float*>(w.weights + at + c), zero());
          store(reinterpret_cast<float*>(w.slopes + at + c), zero());
        }
      }
    }
  }

  // Sums over queries: six keys a time.
  void add_down(const Element* a, const Element* b, int64_t columns, float* sums, const Meeting& p) const {
    for (int64_t c = 0; c < columns; c += kStrip) {
      with_vectors(least<int64_t>(kStripVectors, (columns - c) / kWidth), [&](auto vectors) {
        for (int group = 0; group < p.key_groups; ++group) {
          const Range r = p.rows[group];
          if (r.empty()) continue;
          product<Math, vectors.count, true, true>(a + r.begin / kNumbers * kBackKeys + group * kRows, kBackKeys,
                                                   b + r.begin / kNumbers * columns + c, columns,
                                                   (r.end - r.begin) / kNumbers, sums + group * kRows * columns + c,
                                                   columns);
        }
      });
    }
  }

  // Sums over keys: six queries a time.
  void add_queries(const Work& w, const Head& h, const Meeting& p, int i) const {
    const int64_t row = i * kBlockQueries, lda = kBackKeys / kNumbers;
    for (int64_t c = 0; c < key_columns_; c += kStrip) {
      with_vectors(least<int64_t>(kStripVectors, (key_columns_ - c) / kWidth), [&](auto vectors) {
        for (int group = 0; group < p.groups(i); ++group) {
          const Element* a = w.slope_rows + (row + group * kRows) * lda;
          float* sums = h.sums + (p.first + row + group * kRows) * key_columns_ + c;
          const auto add = [&](Range keys) {
            product<Math, vectors.count, true, false>(a + keys.begin / kNumbers, lda,
                                                      w.keys_across + keys.begin / kNumbers * key_columns_ + c,
                                                      key_columns_, (keys.end - keys.begin) / kNumbers, sums,
                                                      key_columns_);
          };
          if (p.whole[i]) {
            add({0, p.blocks * kBlockKeys});
          } else {
            for (int j = 0; j < p.blocks; ++j) {
              const Range r = columns(p, i, group, j);
              if (!r.empty()) add({j * kBlockKeys + r.begin, j * kBlockKeys + r.end});
            }
          }
        }
      });
    }
  }

  // All three sums where a NaN or an infinity stands that some row may not see: only pairs that count are touched.
  void add_visible(const Work& w, const Head& h, const Meeting& p) const {
    for (int64_t i = 0; i < p.count; ++i) {
      const int64_t query = (p.first + i) / kNumbers;
      for (int64_t j = 0; j < p.blocks * kBlockKeys; ++j) {
        const int64_t at = i / kNumbers * kBackKeys + j;
        const float weight = Math::weight(w.weights + at, i % kNumbers), slope = Math::weight(w.slopes + at, i % kNumbers);
        if (weight == 0.0f && slope == 0.0f) continue;
        for (int64_t c = 0; c < value_columns_; c += kWidth)
          add_scaled(w.d_values + j * value_columns_ + c, weight,
                     Math::values_of(h.slope_across + query * value_columns_ + c, i));
        for (int64_t c = 0; c < key_columns_; c += kWidth) {
          add_scaled(w.d_keys + j * key_columns_ + c, slope,
                     Math::values_of(h.query_across + query * key_columns_ + c, i));
          add_scaled(h.sums + (p.first + i) * key_columns_ + c, slope,
                     Math::values_of(w.keys_across + j / kNumbers * key_columns_ + c, j));
        }
      }
    }
  }
  static ATTNKIT_INLINE void add_scaled(float* to, float factor, Vec x) { store(to, fma(splat(factor), x, load(to))); }

  const attnkit_softmax& s_;
  const attnkit_softmax_gradients& g_;
  const Logits logits_;
  const Dropout dropout_;
  const bool surveys_;                          // see above: bias gradients of 16 bits do without
  const int64_t ratio_;                         // query heads of one KV head
  const int64_t rows_;                          // queries, whole panels
  const int64_t key_steps_, value_steps_;       // of the first two products
  const int64_t query_lda_, slope_lda_;         // of packed rows they read along
  const int64_t key_columns_, value_columns_;   // of rows of d and e, whole vectors
  const int64_t tiles_, chunks_, threads_, wave_;
};
