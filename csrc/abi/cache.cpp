// Checks calls over a decoding state before any key is read, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"

namespace attnkit {
namespace {

int32_t check_sequences(const attnkit_cache& c) {
  for (int64_t batch = 0; batch < c.b; ++batch) {
    const int64_t n = c.lengths ? c.lengths[batch] : c.n;
    if (n < 0 || n > c.n) return ATTNKIT_BAD_SIZE;
    if (!c.pages) continue;
    const int64_t used = (n + c.page - 1) / c.page;
    if (used > c.pages_b) return ATTNKIT_BAD_PAGE;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = c.pages[batch * c.pages_b + i];
      if (page < 0 || page >= c.page_count) return ATTNKIT_BAD_PAGE;
    }
  }
  return ATTNKIT_OK;
}

int32_t check(const attnkit_cache& c) {
  if (c.dtype < ATTNKIT_FLOAT32 || c.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (c.form < ATTNKIT_PLAIN || c.form > ATTNKIT_INT4) return ATTNKIT_BAD_FORM;
  if (c.b < 0 || c.h < 1 || c.g < 1 || c.h % c.g != 0 || c.m < 0 || c.n < 0 || c.d < 1 || c.e < 1 || c.threads < 1)
    return ATTNKIT_BAD_SIZE;
  if (c.offsets) {
    if ((c.mask_batches != 1 && c.mask_batches != c.b) || (c.mask_heads != 1 && c.mask_heads != c.h))
      return ATTNKIT_BAD_MASK;
    if (c.lengths) return ATTNKIT_BAD_MASK;
    if (c.m > ATTNKIT_BLOCK_QUERIES) return ATTNKIT_BAD_KERNEL;
  }
  if (c.pages && (c.page < 1 || c.pages_b < 0 || c.form != ATTNKIT_PLAIN)) return ATTNKIT_BAD_PAGE;
  if (c.form != ATTNKIT_PLAIN && (!c.k_scale || !c.v_scale)) return ATTNKIT_BAD_FORM;
  if (c.form == ATTNKIT_INT4 && (!c.k_zero || !c.v_zero || !c.recent || c.group < 32 || c.group % 32 != 0 ||
                                 c.channels < 32 || c.channels % 32 != 0))
    return ATTNKIT_BAD_FORM;
  return check_sequences(c);
}

bool nothing_to_do(const attnkit_cache& c) { return c.b == 0 || c.m == 0; }

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_cache_forward_scratch_bytes(const attnkit_cache* call) {
  const int32_t status = check(*call);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(*call) ? 0 : level().cache.scratch_bytes(*call);
}

int32_t attnkit_cache_forward(const attnkit_cache* call, void* scratch, int64_t scratch_bytes) {
  const int64_t needed = attnkit_cache_forward_scratch_bytes(call);
  if (needed < 0) return static_cast<int32_t>(-needed);
  if (needed > scratch_bytes) return ATTNKIT_SMALL_SCRATCH;
  if (!nothing_to_do(*call)) level().cache.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
