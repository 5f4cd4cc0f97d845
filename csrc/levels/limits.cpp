// The table of this level, and measurements of what the machine can do at most.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/threads.h"
#include "../kernels/limits.h"
// clang-format on

}  // namespace

const LimitKernels limits = {fma_gflops, bf16_dot_gflops, read_gigabytes};
const Level level = {ATTNKIT_TEXT(ATTNKIT_LEVEL), limits, softmax, linear, sparse, latent, cache, projection, rotation};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
