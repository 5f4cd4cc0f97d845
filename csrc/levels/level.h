// What one instruction level offers. abi.cpp holds the table of the levels that were built.
#ifndef ATTNKIT_LEVEL_H
#define ATTNKIT_LEVEL_H

#include "../abi.h"

namespace attnkit {

struct Level {
  const char* name;
  int64_t (*softmax_scratch_bytes)(const attnkit_softmax&);
  void (*softmax_forward)(const attnkit_softmax&, char* scratch);
  double (*fma_gflops)(int64_t threads, double seconds);
  double (*bf16_dot_gflops)(int64_t threads, double seconds);
  double (*read_gigabytes)(const void* buffer, int64_t bytes, int64_t threads, double seconds);
};

}  // namespace attnkit

#endif
