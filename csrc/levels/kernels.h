// Every kernel, compiled once per level: a level file names its namespace in ATTNKIT_LEVEL and includes this.
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "level.h"

#define ATTNKIT_INLINE inline __attribute__((always_inline))
#define ATTNKIT_NOINLINE __attribute__((noinline))

namespace attnkit {
namespace ATTNKIT_LEVEL {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/gemm.h"
#include "../kernels/visible.h"
#include "../kernels/logits.h"
#include "../kernels/threads.h"
#include "../kernels/pack.h"
#include "../kernels/prefill.h"
#include "../kernels/decode.h"
#include "../kernels/limits.h"
// clang-format on

// Calls f with the kernel that serves the call.
template <class F>
auto with_kernel(const attnkit_softmax& s, F f) {
#if defined(ATTNKIT_BF16_DOT)
  using BFloat16Product = BFloat16Math;
#else
  using BFloat16Product = Float32Math;
#endif
  if (s.kernel == ATTNKIT_DECODE) {
    if (s.dtype == ATTNKIT_BFLOAT16) return f(Decode<BFloat16>(s));
    if (s.dtype == ATTNKIT_FLOAT16) return f(Decode<Float16>(s));
    return f(Decode<float>(s));
  }
  if (s.dtype == ATTNKIT_BFLOAT16) return f(Prefill<BFloat16Product, BFloat16>(s));
  if (s.dtype == ATTNKIT_FLOAT16) return f(Prefill<Float32Math, Float16>(s));
  return f(Prefill<Float32Math, float>(s));
}

int64_t softmax_scratch_bytes(const attnkit_softmax& s) {
  return with_kernel(s, [](const auto& kernel) { return kernel.scratch_bytes(); });
}

void softmax_forward(const attnkit_softmax& s, char* scratch) {
  with_kernel(s, [&](const auto& kernel) { kernel.run(scratch); });
}

#define ATTNKIT_TEXT_(x) #x
#define ATTNKIT_TEXT(x) ATTNKIT_TEXT_(x)
extern const Level level;
const Level level = {ATTNKIT_TEXT(ATTNKIT_LEVEL), softmax_scratch_bytes, softmax_forward,
                     fma_gflops, bf16_dot_gflops, read_gigabytes};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
