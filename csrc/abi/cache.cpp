// Checks calls over a decoding state before any key is read, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

#include "../levels/cache_call.h"

bool nothing_to_do(const attnkit_cache& c) { return c.b == 0 || c.m == 0; }

// Keys and values, and what is kept beside them.
bool arrays_are_good(const attnkit_cache& c) {
  const int64_t tables = c.pages ? c.page_count : c.b, tokens = c.pages ? c.page : c.n;
  if (!in_range({{tables, c.k_b}, {c.g, c.k_g}, {tokens, c.k_n}, {c.d, 1}}) ||
      !in_range({{tables, c.v_b}, {c.g, c.v_g}, {tokens, c.v_n}, {c.e, 1}}))
    return false;
  if (c.form == ATTNKIT_PLAIN) return true;
  const bool grouped = c.form == ATTNKIT_INT4;
  const int64_t of_keys = grouped ? c.d : 1, of_values = grouped ? (c.e + c.channels - 1) / c.channels : 1;
  return in_range({{tables, c.k_scale_b}, {c.g, c.k_scale_g}, {tokens, of_keys}}) &&
         in_range({{tables, c.v_scale_b}, {c.g, c.v_scale_g}, {tokens, of_values}}) &&
         (!grouped || in_range({{c.b, c.recent_b}, {c.g, c.recent_g}, {2 * c.group, c.d}}));
}

bool is_group(int64_t size) { return size >= 32 && size % 32 == 0 && size <= int64_t{1} << 32; }

// A page of codes holds whole tiles of the walk over keys, and whole groups.
bool fits_form(const attnkit_cache& c) {
  return c.form == ATTNKIT_PLAIN || (c.page % 32 == 0 && (c.form != ATTNKIT_INT4 || c.page % c.group == 0));
}

int32_t check(const attnkit_cache& c) {
  attnkit_softmax s = softmax_call(c);
  s.k = c.k, s.v = c.v;
  const int32_t status = check_softmax(s);
  if (status != ATTNKIT_OK) return status;
  if (c.form < ATTNKIT_PLAIN || c.form > ATTNKIT_INT4) return ATTNKIT_BAD_FORM;
  if (c.offsets && (c.lengths || (c.mask_batches != 1 && c.mask_batches != c.b) ||
                    (c.mask_heads != 1 && c.mask_heads != c.h)))
    return ATTNKIT_BAD_MASK;
  if (c.form != ATTNKIT_PLAIN && (!c.k_scale || !c.v_scale)) return ATTNKIT_BAD_FORM;
  if (c.form == ATTNKIT_INT4 &&
      (!c.k_zero || !c.v_zero || !c.recent || !is_group(c.group) || !is_group(c.channels)))
    return ATTNKIT_BAD_FORM;
  if (c.pages && (c.page < 1 || c.page_count < 0 || c.pages_b < 0 || !fits_form(c) ||
                  !in_range({{c.b, 0}, {c.pages_b, 0}, {c.page, 0}})))
    return ATTNKIT_BAD_PAGE;
  return arrays_are_good(c) ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

// What only a look into the arrays of a call can tell. The number of keys of each sequence counts for scratch memory.
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

// The level is an argument: another thread may choose one between two looks.
int64_t scratch_bytes(const Level& at, const attnkit_cache& c) {
  int32_t status = check(c);
  if (status == ATTNKIT_OK && !nothing_to_do(c)) status = check_sequences(c);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(c) ? 0 : at.cache.scratch_bytes(c);
}

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_cache_forward_scratch_bytes(const attnkit_cache* call) { return scratch_bytes(level(), *call); }

int32_t attnkit_cache_forward(const attnkit_cache* call, void* scratch, int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(scratch_bytes(at, *call), scratch, bytes);
  if (status != ATTNKIT_OK || nothing_to_do(*call)) return status;
  if (call->offsets && !list_is_good(softmax_call(*call))) return ATTNKIT_BAD_MASK;
  at.cache.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}
