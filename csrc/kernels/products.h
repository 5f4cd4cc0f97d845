// Products of the small matrices that a chunk of tokens is: 32 rows or so, row-major in scratch memory, whole vectors wide.
//
// One block of rows times a strip of up to kStripVectors vectors is accumulated in registers, as in gemm.h, but the left
// matrix may be read along either axis, so that A^T B needs no transposed copy. Only A B^T does: see transposed().
// Every sum runs over its steps in ascending order in one chain of multiply-adds, whatever the strip or the block.
// Blocks are of kRows rows, at the end of 4 or 2: 32 rows are 6 6 6 6 4 4. Of an odd number one row more is computed, and
// is never read.

// The left matrix: row i, step s is at[i * row + s * step].
struct Left {
  const float* at;
  int64_t row, step;
};
ATTNKIT_INLINE Left rows_of(const float* a, int64_t ld) { return {a, ld, 1}; }
ATTNKIT_INLINE Left columns_of(const float* a, int64_t ld) { return {a, 1, ld}; }

// What of a product is formed, for a block of rows that starts at `row`.
enum class Part {
  kAll,
  kColumnsUpTo,  // columns up to the last row of the block: the result is lower triangular
  kStepsUpTo,    // steps up to the last row of the block: the left matrix is lower triangular
  kStepsFrom,    // steps from the first row of the block: the left matrix is upper triangular
};

template <int kBlock, int kVectors>
ATTNKIT_NOINLINE void product_block(Left a, const float* b, int64_t ldb, int64_t steps, const float* keep, float* c,
                                    int64_t ldc) {
  Vec acc[kBlock][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      acc[i][j] = keep ? load(c + i * ldc + j * kWidth) * splat(keep[i]) : zero();
  for (int64_t s = 0; s < steps; ++s) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < kBlock; ++i) {
      const Vec x = splat(a.at[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
    a.at += a.step;
    b += ldb;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kWidth, acc[i][j]);
}

// Rows that are needed next, fetched into the second cache a few at a time while products are formed: all in one go would
// fill the core's buffers for misses and stall it. Rows to be written are fetched too, or each store waits for its line.
class Ahead {
 public:
  // In the order in which they are needed.
  enum Stream { kResults, kKeySlopes, kValueSlopes, kKeys, kValues, kQueries, kSlopes, kState, kStreams };
  template <class T>
  void set(Stream stream, const T* at, int64_t stride, int64_t columns, int64_t rows) {
    constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
    streams_[stream] = {reinterpret_cast<const char*>(at), stride * kSize, columns * kSize, rows};
  }
  void fetch() {
    int64_t left = kRowsAtOnce;
    for (Rows& s : streams_) {
      for (; left > 0 && s.rows > 0; --left, --s.rows, s.at += s.stride)
        for (int64_t j = 0; j < s.bytes; j += 64) __builtin_prefetch(s.at + j, 0, 2);
    }
  }

 private:
  static constexpr int64_t kRowsAtOnce = 6;  // 5 to 8 take the same time on a Zen 4 core, 4 a little more
  struct Rows {
    const char* at = nullptr;
    int64_t stride = 0, bytes = 0, rows = 0;
  };
  Rows streams_[kStreams];
};

// How many of the rows that are left the next block takes.
ATTNKIT_INLINE int64_t block_rows(int64_t left) { return left >= kRows && left != 8 ? kRows : left >= 3 ? 4 : 2; }

// c = a * b, or with `keep`, a factor for each row, c = keep * c + a * b. `columns` count numbers; whole vectors are done.
template <Part kPart = Part::kAll>
void multiply(int64_t rows, int64_t columns, int64_t steps, Left a, const float* b, int64_t ldb, float* c, int64_t ldc,
              const float* keep = nullptr, Ahead* ahead = nullptr) {
  const int64_t vectors = ceil_div(columns, kWidth);
  for (int64_t v = 0; v < vectors; v += kStripVectors) {
    for (int64_t row = 0, block = 0; row < rows; row += block) {
      block = block_rows(rows - row);
      if (ahead) ahead->fetch();
      int64_t from = 0, to = steps, end = vectors;
      if constexpr (kPart == Part::kColumnsUpTo) end = least(vectors, ceil_div(row + block, kWidth));
      if constexpr (kPart == Part::kStepsUpTo) to = least(steps, row + block);
      if constexpr (kPart == Part::kStepsFrom) from = row;
      const int64_t strip = least<int64_t>(kStripVectors, end - v);
      if (strip <= 0) continue;
      const Left left = {a.at + row * a.row + from * a.step, a.row, a.step};
      const float* factors = keep ? keep + row : nullptr;
      with_vectors(strip, [&](auto count) {
        constexpr int kVectors = decltype(count)::count;
        const float* right = b + from * ldb + v * kWidth;
        float* to_c = c + row * ldc + v * kWidth;
        if (block == kRows) return product_block<kRows, kVectors>(left, right, ldb, to - from, factors, to_c, ldc);
        if (block == 4) return product_block<4, kVectors>(left, right, ldb, to - from, factors, to_c, ldc);
        product_block<2, kVectors>(left, right, ldb, to - from, factors, to_c, ldc);
      });
    }
  }
}

// to (columns, rows) = from (rows, columns); whole vectors of both are moved.
inline void transposed(const float* from, int64_t ldf, int64_t rows, int64_t columns, float* to, int64_t ldt) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vec x[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) x[i] = load(from + (r + i) * ldf + c);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (c + i) * ldt + r, x[i]);
    }
  }
}

// Numbers of a row-major tensor as rows of float32, times `scale`; rows and columns of the scratch beyond are zeros.
template <class T>
void load_rows(const T* from, int64_t stride, int64_t count, int64_t columns, float scale, float* to, int64_t ld,
               int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < ld; c += kWidth)
      store(to + i * ld + c, i < count && c < columns ? load_some(from + i * stride + c, columns - c) * splat(scale) : zero());
  }
}

template <class T>
void store_rows(const float* from, int64_t ld, int64_t count, int64_t columns, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; c += kWidth) store_some(to + i * stride + c, load(from + i * ld + c), columns - c);
}

// to = x * y, number by number, and to = x * (a factor for each row).
inline void multiply_each(const float* x, const float* y, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(x + i) * load(y + i));
}
inline void multiply_rows(const float* x, const float* by, int64_t rows, int64_t ld, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < ld; c += kWidth) store(to + i * ld + c, load(x + i * ld + c) * splat(by[i]));
}
