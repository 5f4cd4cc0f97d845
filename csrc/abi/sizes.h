// What the checks of all families share: numbers within which no offset and no number of bytes overflows.
#ifndef ATTNKIT_ABI_SIZES_H
#define ATTNKIT_ABI_SIZES_H

#include <stdint.h>

#include <initializer_list>

#include "../abi.h"

namespace attnkit {

// More threads than this are somebody's mistake, and starting them ends the process on many systems.
constexpr int64_t kMostThreads = 1024;
// Of one dimension, and of a product of dimensions, which may be larger than memory where strides are 0. A thousand threads
// then still have room for hundreds of numbers for each row.
constexpr double kMostSize = 0x1p40, kMostElements = 0x1p44;
// Of one stride, also where only the address of a row to fetch ahead is made from it, and of one offset. None is negative.
constexpr double kMostStride = 0x1p48, kMostOffset = 0x1p56;
// Of a distance between positions.
constexpr int64_t kMostDistance = int64_t{1} << 62;

struct Dimension {
  int64_t size, stride;
};

// Whether the sizes, strides and offsets of an array are in range.
inline bool in_range(std::initializer_list<Dimension> dimensions) {
  double elements = 1.0, offset = 0.0;
  for (const Dimension& dimension : dimensions) {
    const double size = static_cast<double>(dimension.size), stride = static_cast<double>(dimension.stride);
    if (size < 0.0 || size > kMostSize || stride < 0.0 || stride > kMostStride) return false;
    elements *= size > 1.0 ? size : 1.0;
    offset += (size > 1.0 ? size : 1.0) * stride;
  }
  return elements <= kMostElements && offset <= kMostOffset;
}

inline bool threads_in_range(int64_t threads) { return threads >= 1 && threads <= kMostThreads; }

// Whether scratch memory starts where every kernel may put every type: at a whole cache line.
inline bool aligned(const void* scratch) { return reinterpret_cast<uintptr_t>(scratch) % 64 == 0; }

// The answer before a call runs, from the scratch memory it needs (or minus a status) and what it was given.
inline int32_t scratch_status(int64_t needed, const void* scratch, int64_t bytes) {
  if (needed < 0) return static_cast<int32_t>(-needed);
  return needed > bytes || !aligned(scratch) || (needed > 0 && !scratch) ? ATTNKIT_SMALL_SCRATCH : ATTNKIT_OK;
}

// Of a softmax call, which other families have as well: a status, and whether its block list is in order. In softmax.cpp.
int32_t check_softmax(const attnkit_softmax& call);
bool list_is_good(const attnkit_softmax& call);

}  // namespace attnkit

#endif
