// Checks calls of latent attention before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"

namespace attnkit {
namespace {

int32_t check(const attnkit_latent& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.b < 0 || s.h < 1 || s.g < 1 || s.h % s.g != 0 || s.m < 0 || s.n < 0 || s.nope < 0 || s.r < 0 || s.c < 1 ||
      s.e < 1 || s.threads < 1)
    return ATTNKIT_BAD_SIZE;
  if (s.places && (s.stored < 0 || s.stored > INT32_MAX)) return ATTNKIT_BAD_SIZE;
  return ATTNKIT_OK;
}

// A list is read in the work that its entries cost h times over: to check it costs nothing beside that.
bool places_are_good(const attnkit_latent& s) {
  for (int64_t i = 0; i < s.b * s.n; ++i) {
    const int32_t place = s.places[i];
    if (place < -1 || place >= s.stored || (place >= 0 && i % s.n > 0 && s.places[i - 1] < 0)) return false;
  }
  return true;
}

bool nothing_to_do(const attnkit_latent& s) { return s.b == 0 || s.m == 0; }

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_latent_forward_scratch_bytes(const attnkit_latent* call) {
  const int32_t status = check(*call);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(*call) ? 0 : level().latent.scratch_bytes(*call);
}

int32_t attnkit_latent_forward(const attnkit_latent* call, void* scratch, int64_t scratch_bytes) {
  const int64_t needed = attnkit_latent_forward_scratch_bytes(call);
  if (needed < 0) return static_cast<int32_t>(-needed);
  if (needed > scratch_bytes) return ATTNKIT_SMALL_SCRATCH;
  if (nothing_to_do(*call)) return ATTNKIT_OK;
  if (call->places && !places_are_good(*call)) return ATTNKIT_BAD_PAGE;
  level().latent.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
