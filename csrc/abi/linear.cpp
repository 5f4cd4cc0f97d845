// Checks calls of the linear family before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

// Scratch memory of a thread is hundreds of numbers for each of d and e, and d * e a few times: nothing overflows.
constexpr int64_t kLargest = int64_t{1} << 16;

bool nothing_to_do(const attnkit_linear& c) { return c.b == 0 || c.n == 0; }

bool divides(int64_t part, int64_t whole) { return part >= 1 && whole >= 1 && whole % part == 0; }

bool sizes_are_good(const attnkit_linear& c) {
  if (c.b < 0 || c.m < 0 || c.n < c.m || c.d < 1 || c.d > kLargest || c.e < 1 || c.e > kLargest) return false;
  if (!threads_in_range(c.threads)) return false;
  if (!divides(c.s, c.h) || !divides(c.k_heads, c.s) || !divides(c.v_heads, c.s)) return false;
  return in_range({{c.b, c.q_b}, {c.h, c.q_h}, {c.m, c.q_m}, {c.d, 1}}) &&
         in_range({{c.b, c.k_b}, {c.k_heads, c.k_h}, {c.n, c.k_n}, {c.d, 1}}) &&
         in_range({{c.b, c.v_b}, {c.v_heads, c.v_h}, {c.n, c.v_n}, {c.e, 1}}) &&
         // Results, states and gradients lie one after the other.
         in_range({{c.b, 0}, {c.h, 0}, {c.n, 0}, {c.d, 0}}) && in_range({{c.b, 0}, {c.h, 0}, {c.n, 0}, {c.e, 0}}) &&
         in_range({{c.b, 0}, {c.s, 0}, {c.n / ATTNKIT_LINEAR_SPAN + 1, 0}, {c.d, 0}, {c.e + 1, 0}});
}

bool strides_are_good(const attnkit_linear& c) {
  const int64_t channels = c.decay_kind == ATTNKIT_DECAY_CHANNEL ? c.d : 1;
  return (!c.decay || in_range({{c.b, c.decay_b}, {c.s, c.decay_s}, {c.n, c.decay_n}, {channels, 1}})) &&
         (!c.beta || in_range({{c.b, c.beta_b}, {c.s, c.beta_s}, {c.n, c.beta_n}}));
}

bool parts_agree(const attnkit_linear& c) {
  if (c.decay_kind < ATTNKIT_DECAY_NONE || c.decay_kind > ATTNKIT_DECAY_CHANNEL) return false;
  // An array of no numbers may be null.
  if (!nothing_to_do(c) && (c.decay == nullptr) != (c.decay_kind == ATTNKIT_DECAY_NONE)) return false;
  // The delta rule says with a length which tokens count, and has as many queries as tokens.
  if (c.beta && (!c.lawful || c.m != c.n || c.keep || c.total || c.map != ATTNKIT_MAP_NONE)) return false;
  if (c.map < ATTNKIT_MAP_NONE || c.map > ATTNKIT_MAP_RELU) return false;
  return c.map == ATTNKIT_MAP_NONE || c.scale == 1.0f;
}

int32_t check(const attnkit_linear& c) {
  if (c.dtype < ATTNKIT_FLOAT32 || c.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (!sizes_are_good(c)) return ATTNKIT_BAD_SIZE;
  if (!parts_agree(c)) return ATTNKIT_BAD_RULE;
  if (!strides_are_good(c)) return ATTNKIT_BAD_SIZE;
  if (nothing_to_do(c)) return ATTNKIT_OK;
  return c.k && c.v && (c.m == 0 || (c.q && c.o)) ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

// Gradients of what a call does not have cannot be asked for. Results are read where they are means.
int32_t check_backward(const attnkit_linear& c) {
  attnkit_linear forward = c;
  if (!c.total) forward.o = c.dq;
  const int32_t status = check(forward);
  if (status != ATTNKIT_OK) return status;
  if (nothing_to_do(c)) return ATTNKIT_OK;
  if ((c.d_decay && !c.decay) || (c.d_beta && !c.beta)) return ATTNKIT_BAD_RULE;
  return c.states && c.dk && c.dv && c.d_state && (c.m == 0 || (c.d_o && c.dq)) ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

// Lengths that a forward pass found are read before anything else, and cost nothing beside what they are of.
bool lengths_are_good(const attnkit_linear& c) {
  if (!c.beta) return true;
  for (int64_t i = 0; i < c.b * c.s; ++i)
    if (c.lawful[i] < 0 || c.lawful[i] > c.n) return false;
  return true;
}

// Minus a status code if the call is refused. The level is an argument: another thread may choose one between two looks.
int64_t forward_scratch_bytes(const Level& at, const attnkit_linear& c) {
  const int32_t status = check(c);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(c) ? 0 : at.linear.forward_scratch_bytes(c);
}

int64_t backward_scratch_bytes(const Level& at, const attnkit_linear& c) {
  const int32_t status = check_backward(c);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(c) ? 0 : at.linear.backward_scratch_bytes(c);
}

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_linear_forward_scratch_bytes(const attnkit_linear* call) { return forward_scratch_bytes(level(), *call); }

int32_t attnkit_linear_forward(const attnkit_linear* call, void* scratch, int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(forward_scratch_bytes(at, *call), scratch, bytes);
  if (status == ATTNKIT_OK && !nothing_to_do(*call)) at.linear.forward(*call, static_cast<char*>(scratch));
  return status;
}

int64_t attnkit_linear_backward_scratch_bytes(const attnkit_linear* call) {
  return backward_scratch_bytes(level(), *call);
}

int32_t attnkit_linear_backward(const attnkit_linear* call, void* scratch, int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(backward_scratch_bytes(at, *call), scratch, bytes);
  if (status != ATTNKIT_OK || nothing_to_do(*call)) return status;
  if (!lengths_are_good(*call)) return ATTNKIT_BAD_RULE;
  at.linear.backward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
