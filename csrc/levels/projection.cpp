// Linear maps of few rows at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/threads.h"
#include "../kernels/projection.h"
// clang-format on

void project(const attnkit_projection& p) {
  if (p.dtype == ATTNKIT_BFLOAT16) return Projection<BFloat16>(p).run();
  if (p.dtype == ATTNKIT_FLOAT16) return Projection<Float16>(p).run();
  Projection<float>(p).run();
}

}  // namespace

const ProjectionKernels projection = {project};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
