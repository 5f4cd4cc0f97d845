// Measurements of the machine, through the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"

using namespace attnkit;

double attnkit_fma_gflops(int64_t threads, double seconds) { return level().limits.fma_gflops(threads, seconds); }

double attnkit_bf16_dot_gflops(int64_t threads, double seconds) { return level().limits.bf16_dot_gflops(threads, seconds); }

double attnkit_read_gigabytes(const void* buffer, int64_t bytes, int64_t threads, double seconds) {
  return level().limits.read_gigabytes(buffer, bytes, threads, seconds);
}
