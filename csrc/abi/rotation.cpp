// Checks calls of rotary positions before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

int32_t check(const attnkit_rotation& r) {
  if (r.dtype < ATTNKIT_FLOAT32 || r.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (!threads_in_range(r.threads) || r.b < 0 || r.h < 0 || r.m < 0 || r.d < 0 || r.d % 2 != 0) return ATTNKIT_BAD_SIZE;
  if (!in_range({{r.b, r.x_b}, {r.h, r.x_h}, {r.m, r.x_m}, {r.d, 1}}) ||
      !in_range({{r.b, r.cos_b}, {r.m, r.cos_m}, {r.d, 1}}) || !in_range({{r.b, r.sin_b}, {r.m, r.sin_m}, {r.d, 1}}) ||
      !in_range({{r.b, r.y_b}, {r.h, r.y_h}, {r.m, r.y_m}, {r.d, 1}}))
    return ATTNKIT_BAD_SIZE;
  if (r.b == 0 || r.h == 0 || r.m == 0 || r.d == 0) return ATTNKIT_OK;
  return r.x && r.cos && r.sin && r.y ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int32_t attnkit_rotate(const attnkit_rotation* call) {
  const int32_t status = check(*call);
  if (status == ATTNKIT_OK && call->b > 0 && call->m > 0) level().rotation.rotate(*call);
  return status;
}
