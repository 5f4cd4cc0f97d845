// Checks calls of linear maps before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

int32_t check(const attnkit_projection& p) {
  if (p.dtype < ATTNKIT_FLOAT32 || p.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (!threads_in_range(p.threads) || p.m < 0 || p.n < 0 || p.d < 0) return ATTNKIT_BAD_SIZE;
  if (!in_range({{p.m, p.x_m}, {p.d, 1}}) || !in_range({{p.n, p.w_n}, {p.d, 1}}) || !in_range({{p.m, p.y_m}, {p.n, 1}}))
    return ATTNKIT_BAD_SIZE;
  if (p.m == 0 || p.n == 0) return ATTNKIT_OK;
  return p.y && (p.d == 0 || (p.x && p.w)) ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int32_t attnkit_project(const attnkit_projection* call) {
  const int32_t status = check(*call);
  if (status == ATTNKIT_OK && call->m > 0 && call->n > 0) level().projection.project(*call);
  return status;
}
