// Checks calls of the linear family before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"

namespace attnkit {
namespace {

// Scratch memory is a few hundred numbers for each of d and e and d * e more: no product of sizes overflows.
constexpr int64_t kMostSize = int64_t{1} << 16;

bool divides(int64_t part, int64_t whole) { return part >= 1 && whole >= 1 && whole % part == 0; }

int32_t check(const attnkit_linear& c) {
  if (c.dtype < ATTNKIT_FLOAT32 || c.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (c.b < 0 || c.m < 0 || c.n < c.m || c.d < 1 || c.e < 1 || c.threads < 1) return ATTNKIT_BAD_SIZE;
  if (c.d > kMostSize || c.e > kMostSize || c.threads > kMostSize) return ATTNKIT_BAD_SIZE;
  if (!divides(c.s, c.h) || !divides(c.k_heads, c.s) || !divides(c.v_heads, c.s)) return ATTNKIT_BAD_SIZE;
  if (c.decay_kind < ATTNKIT_DECAY_NONE || c.decay_kind > ATTNKIT_DECAY_CHANNEL) return ATTNKIT_BAD_KERNEL;
  if ((c.decay == nullptr) != (c.decay_kind == ATTNKIT_DECAY_NONE)) return ATTNKIT_BAD_KERNEL;
  // The delta rule says with a length which tokens count, and has as many queries as tokens.
  if (c.beta && (!c.lawful || c.m != c.n)) return ATTNKIT_BAD_KERNEL;
  if (c.beta && (c.keep || c.total || c.map != ATTNKIT_MAP_NONE)) return ATTNKIT_BAD_KERNEL;
  if (c.map < ATTNKIT_MAP_NONE || c.map > ATTNKIT_MAP_RELU) return ATTNKIT_BAD_KERNEL;
  if (c.map != ATTNKIT_MAP_NONE && c.scale != 1.0f) return ATTNKIT_BAD_KERNEL;
  return ATTNKIT_OK;
}

int32_t check_backward(const attnkit_linear& c) {
  const int32_t status = check(c);
  if (status != ATTNKIT_OK) return status;
  if (c.total && !c.o) return ATTNKIT_BAD_KERNEL;
  return c.states && c.d_o && c.dq && c.dk && c.dv && c.d_state ? ATTNKIT_OK : ATTNKIT_BAD_KERNEL;
}

bool nothing_to_do(const attnkit_linear& c) { return c.b == 0 || c.n == 0; }

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_linear_forward_scratch_bytes(const attnkit_linear* call) {
  const int32_t status = check(*call);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(*call) ? 0 : level().linear.forward_scratch_bytes(*call);
}

int32_t attnkit_linear_forward(const attnkit_linear* call, void* scratch, int64_t scratch_bytes) {
  const int64_t needed = attnkit_linear_forward_scratch_bytes(call);
  if (needed < 0) return static_cast<int32_t>(-needed);
  if (needed > scratch_bytes) return ATTNKIT_SMALL_SCRATCH;
  if (!nothing_to_do(*call)) level().linear.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}

int64_t attnkit_linear_backward_scratch_bytes(const attnkit_linear* call) {
  const int32_t status = check_backward(*call);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(*call) ? 0 : level().linear.backward_scratch_bytes(*call);
}

int32_t attnkit_linear_backward(const attnkit_linear* call, void* scratch, int64_t scratch_bytes) {
  const int64_t needed = attnkit_linear_backward_scratch_bytes(call);
  if (needed < 0) return static_cast<int32_t>(-needed);
  if (needed > scratch_bytes) return ATTNKIT_SMALL_SCRATCH;
  if (!nothing_to_do(*call)) level().linear.backward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
