// Checks softmax calls before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"

namespace attnkit {
namespace {

int32_t check(const attnkit_softmax& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.kernel != ATTNKIT_PREFILL && s.kernel != ATTNKIT_DECODE) return ATTNKIT_BAD_KERNEL;
  if (s.b < 0 || s.h < 1 || s.g < 1 || s.h % s.g != 0 || s.m < 0 || s.n < 0 || s.d < 1 || s.e < 1 || s.threads < 1)
    return ATTNKIT_BAD_SIZE;
  if (s.offsets) {
    if ((s.mask_batches != 1 && s.mask_batches != s.b) || (s.mask_heads != 1 && s.mask_heads != s.h))
      return ATTNKIT_BAD_MASK;
    if (s.kernel == ATTNKIT_DECODE && s.m > ATTNKIT_BLOCK_QUERIES) return ATTNKIT_BAD_KERNEL;
  }
  return ATTNKIT_OK;
}

bool nothing_to_do(const attnkit_softmax& s) { return s.b == 0 || s.m == 0; }

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_softmax_forward_scratch_bytes(const attnkit_softmax* call) {
  const int32_t status = check(*call);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(*call) ? 0 : level().softmax.scratch_bytes(*call);
}

int32_t attnkit_softmax_forward(const attnkit_softmax* call, void* scratch, int64_t scratch_bytes) {
  const int64_t needed = attnkit_softmax_forward_scratch_bytes(call);
  if (needed < 0) return static_cast<int32_t>(-needed);
  if (needed > scratch_bytes) return ATTNKIT_SMALL_SCRATCH;
  if (!nothing_to_do(*call)) level().softmax.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
