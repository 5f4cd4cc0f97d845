// What the tests of the kernels share. Each family of kernels has one file here, <family>_cases.cpp: it compares the family
// with plain loops over random calls, and names itself to main.cpp with one line at its end:
//
//   const Family family("softmax", run_softmax);
//
// `run_<family>(rounds)` makes `rounds` random calls with uniform(), below() and pick(), runs each at every level of
// levels(), reports what is wrong with fail(), counts calls with count_call(), and keeps no other state: main.cpp
// may run it in several threads at once. Every array lies in a block of memory of exactly its size, so that the sanitizers
// see one number read too far.
#ifndef ATTNKIT_TESTS_H
#define ATTNKIT_TESTS_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../abi.h"

// A family of kernels, known to main.cpp from before it starts.
struct Family {
  const char* name;
  void (*run)(int64_t rounds);
  Family(const char* name, void (*run)(int64_t rounds));
};

// Numbers that tests draw; each thread has its own, from the seed main.cpp sets.
extern thread_local uint64_t random_state;

inline double uniform() {  // in [-1, 1)
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(random_state >> 11) * 0x1p-52 - 1.0;
}
inline int64_t below(int64_t n) { return static_cast<int64_t>((uniform() + 1.0) / 2.0 * static_cast<double>(n)); }
template <class T, size_t N>
T pick(const T (&choices)[N]) {
  return choices[below(N)];
}

// Levels to test, each after `attnkit_set_level(level)`: all that run here; the one that is set while threads run at once.
const std::vector<int32_t>& levels();

void count_call();
// Prints one line and makes the program fail.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Largest error allowed to a result of order 1 that is stored in `dtype`.
inline double allowed(int32_t dtype) {
  return dtype == ATTNKIT_FLOAT32 ? 2e-4 : dtype == ATTNKIT_FLOAT16 ? 2e-3 : 2e-2;
}

inline double read_number(const void* p, int64_t i, int32_t dtype) {
  if (dtype == ATTNKIT_FLOAT32) return static_cast<const float*>(p)[i];
  const uint16_t half = static_cast<const uint16_t*>(p)[i];
  if (dtype == ATTNKIT_BFLOAT16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  const int exponent = half >> 10 & 31;
  const double mantissa = half & 1023;
  if (exponent == 31) return mantissa != 0.0 ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
  const double size = exponent ? std::ldexp(1024.0 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -size : size;
}

// Random numbers stored in one of the three dtypes; the values kept beside them are exactly those stored.
struct Numbers {
  std::vector<double> values;
  std::vector<float> as_float;
  std::vector<uint16_t> as_half;
  Numbers(int64_t count, int32_t dtype) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = static_cast<float>(std::round(uniform() * 64.0) / 32.0);  // exact in all three
      values.push_back(x);
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      if (dtype == ATTNKIT_FLOAT32) as_float.push_back(x);
      if (dtype == ATTNKIT_BFLOAT16) as_half.push_back(static_cast<uint16_t>(bits >> 16));
      if (dtype == ATTNKIT_FLOAT16)
        as_half.push_back(static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                                (x == 0 ? 0 : (bits & 0x7fffffff) - (112u << 23)) >> 13));
    }
    as_float.shrink_to_fit();
    as_half.shrink_to_fit();
  }
  void* data() { return as_float.empty() ? static_cast<void*>(as_half.data()) : as_float.data(); }
  const void* data() const { return as_float.empty() ? static_cast<const void*>(as_half.data()) : as_float.data(); }
  double read(int64_t i, int32_t dtype) const { return read_number(data(), i, dtype); }
  // All bits set, a NaN in every dtype: what a kernel leaves unwritten, or what it must not write, is seen.
  void poison() {
    for (float& x : as_float) std::memset(&x, 0xff, sizeof x);
    for (uint16_t& x : as_half) x = 0xffff;
  }
  bool is_poison(int64_t i) const {
    if (as_float.empty()) return as_half[i] == 0xffff;
    uint32_t bits;
    std::memcpy(&bits, &as_float[i], sizeof bits);
    return bits == 0xffffffff;
  }
};

// How one tensor of four dimensions lies in memory, the last dimension contiguous.
struct Layout {
  int64_t b, h, m;  // strides
  int64_t count;    // numbers from the first to the last
  // Any order of batches, heads and rows, with gaps; where `may_repeat`, also one row, head or batch for all.
  Layout(int64_t batches, int64_t heads, int64_t rows, int64_t size, bool may_repeat) {
    const int64_t gap = below(4) == 0 ? 1 + below(5) : 0;
    if (below(2)) {
      m = size + gap, h = rows * m, b = heads * h;
    } else {
      h = size + gap, m = heads * h, b = rows * m;
    }
    if (may_repeat && below(8) == 0) m = 0;
    if (may_repeat && below(8) == 0) h = 0;
    if (may_repeat && below(8) == 0) b = 0;
    const bool empty = batches * heads * rows * size == 0;
    count = empty ? 0 : (batches - 1) * b + (heads - 1) * h + (rows - 1) * m + size;
    // The stride of a dimension of size 1 is never used, and torch leaves any number there.
    if (batches == 1 && below(8) == 0) b = int64_t{1} << 48;
    if (rows == 1 && below(8) == 0) m = int64_t{1} << 48;
  }
};

// A block of exactly `bytes`, aligned as torch aligns its memory and filled with NaNs.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  int64_t bytes_;
};

#endif
