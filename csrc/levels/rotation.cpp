// Rotary positions at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/threads.h"
#include "../kernels/rotation.h"
// clang-format on

void rotate(const attnkit_rotation& r) {
  if (r.dtype == ATTNKIT_BFLOAT16) return Rotation<BFloat16>(r).run();
  if (r.dtype == ATTNKIT_FLOAT16) return Rotation<Float16>(r).run();
  Rotation<float>(r).run();
}

}  // namespace

const RotationKernels rotation = {rotate};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
