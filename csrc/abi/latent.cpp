// Checks calls of latent attention before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

constexpr int64_t kLargest = int64_t{1} << 31;

int32_t check(const attnkit_latent& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.h < 1 || s.g < 1 || s.h % s.g != 0 || s.nope < 0 || s.nope >= kLargest || s.r < 0 || s.r >= kLargest || s.c < 1 ||
      s.c >= kLargest || s.e < 1 || s.e >= kLargest || s.nope + s.r < 1 || !threads_in_range(s.threads))
    return ATTNKIT_BAD_SIZE;
  const int64_t stored = s.places ? s.stored : s.n;
  if (!in_range({{s.b, s.q_b}, {s.h, s.q_h}, {s.m, s.q_m}, {s.nope + s.r, 1}}) ||
      !in_range({{s.b, s.latent_b}, {s.g, s.latent_g}, {stored, s.latent_n}, {s.c + s.r, 1}}) ||
      !in_range({{s.h, s.kv_b_h}, {s.nope + s.e, s.kv_b_row}, {s.c, 1}}) ||
      !in_range({{s.b, s.o_b}, {s.h, s.o_h}, {s.m, s.o_m}, {s.e, 1}}) || !in_range({{s.b, 0}, {s.n, 1}}))
    return ATTNKIT_BAD_SIZE;
  // Every row has scratch memory for at most 33 ranges of keys.
  if (!in_range({{s.b, 0}, {s.h, 0}, {s.m, 0}, {s.c + s.r, 0}, {64, 0}})) return ATTNKIT_BAD_SIZE;
  if (s.b > 0 && s.m > 0 && !(s.q && s.kv_b && s.o && (s.n == 0 || s.latent))) return ATTNKIT_BAD_SIZE;
  if (s.places) return s.stored < kLargest ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
  const bool near = s.left >= -kMostDistance && s.left <= kMostDistance && s.right >= -kMostDistance &&
                    s.right <= kMostDistance;
  return near ? ATTNKIT_OK : ATTNKIT_BAD_MASK;
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

namespace {

// The level is an argument: another thread may choose one between two looks.
int64_t scratch_bytes(const Level& at, const attnkit_latent& s) {
  const int32_t status = check(s);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(s) ? 0 : at.latent.scratch_bytes(s);
}

}  // namespace

int64_t attnkit_latent_forward_scratch_bytes(const attnkit_latent* call) { return scratch_bytes(level(), *call); }

int32_t attnkit_latent_forward(const attnkit_latent* call, void* scratch, int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(scratch_bytes(at, *call), scratch, bytes);
  if (status != ATTNKIT_OK || nothing_to_do(*call)) return status;
  if (call->places && !places_are_good(*call)) return ATTNKIT_BAD_PAGE;
  at.latent.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
