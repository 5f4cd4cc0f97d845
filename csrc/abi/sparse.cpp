// Checks calls for block lists and learned-sparse attention before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

constexpr int64_t kLargest = int64_t{1} << 31;  // columns and rows of patterns are 32-bit numbers
constexpr int64_t kMostNodes = 4096;

bool check(const attnkit_block_list& s, int64_t index) {
  const attnkit_mask_node& node = static_cast<const attnkit_mask_node*>(s.nodes)[index];
  // No query looks into what it says for no sequence, no head or no key.
  const bool held = node.kind >= ATTNKIT_MASK_GLOBAL && s.batches > 0 && s.heads > 0 && s.n > 0;
  if (held && !node.data && node.a > 0) return false;
  if ((node.batches != 1 && node.batches != s.batches) || (node.heads != 1 && node.heads != s.heads)) return false;
  switch (node.kind) {
    case ATTNKIT_MASK_AND:
    case ATTNKIT_MASK_OR:
      return node.a >= 0 && node.a < index && node.b >= 0 && node.b < index;
    case ATTNKIT_MASK_NOT:
      return node.a >= 0 && node.a < index;
    case ATTNKIT_MASK_INTERVAL:
      return node.a >= -kLargest && node.b >= -kLargest && node.a <= int64_t{1} << 62 && node.b <= int64_t{1} << 62;
    case ATTNKIT_MASK_DILATED:
      return node.a >= 1 && node.a <= kLargest && node.b >= 1 && node.b <= kLargest;
    case ATTNKIT_MASK_FIXED:
      return node.a >= 1 && node.a <= kLargest && node.b >= 0 && node.b <= node.a;
    case ATTNKIT_MASK_STRIDED:
    case ATTNKIT_MASK_CHUNKED:
      return node.a >= 1 && node.a <= kLargest;
    case ATTNKIT_MASK_PREFIX:
      return node.a >= -kLargest;
    case ATTNKIT_MASK_GLOBAL: {
      const int64_t* runs = static_cast<const int64_t*>(node.data);
      if (node.a < 0 || node.a > kLargest || (!runs && node.a > 0)) return false;
      for (int64_t i = 0; i < 2 * node.a; ++i)
        if (runs[i] < -kLargest || runs[i] > kMostDistance) return false;
      return true;
    }
    case ATTNKIT_MASK_DOCUMENTS:
      return node.a >= s.n && s.m <= s.n;
    case ATTNKIT_MASK_PADDING:
      return node.a >= s.n;
    case ATTNKIT_MASK_BLOCK_SPARSE:
      return node.a >= 1 && node.a <= kLargest && node.b >= 0 && node.b <= kLargest && s.n <= node.a * node.b && s.m <= s.n;
    default:
      return false;
  }
}

int32_t check(const attnkit_block_list& s) {
  if (!s.nodes || !s.found || s.count < 1 || s.count > kMostNodes || !in_range({{s.batches, 0}, {s.heads, 0}, {s.m, 0}}) || s.m < 0 || s.n < 0 || s.m >= kLargest ||
      s.n >= kLargest || s.block_q < 1 || s.block_q >= kLargest || s.block_k < 1 || s.block_k > 64)
    return ATTNKIT_BAD_SIZE;
  for (int64_t i = 0; i < s.count; ++i)
    if (!check(s, i)) return ATTNKIT_BAD_MASK;
  return ATTNKIT_OK;
}

// What three calls have alike: one array of queries, keys and values each.
template <class Call>
bool arrays_are_good(const Call& s, int64_t keys) {
  return s.g >= 1 && s.h >= 1 && s.h % s.g == 0 && s.m <= s.n && s.n < kLargest && s.d >= 1 && s.d < kLargest &&
         s.e >= 1 && s.e < kLargest && threads_in_range(s.threads) && s.scale > 0 &&
         in_range({{s.b, s.q_b}, {s.h, s.q_h}, {s.m, s.q_m}, {s.d, 1}}) &&
         in_range({{s.b, s.k_b}, {s.g, s.k_g}, {keys, s.k_n}, {s.d, 1}}) &&
         in_range({{s.b, s.v_b}, {s.g, s.v_g}, {keys, s.v_n}, {s.e, 1}}) &&
         (s.b == 0 || s.m == 0 || (s.q && s.o && (keys == 0 || (s.k && s.v))));
}

int32_t check(const attnkit_selected& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (!arrays_are_good(s, s.n) || !in_range({{s.b, s.o_b}, {s.h, s.o_h}, {s.m, s.o_m}, {s.e, 1}})) return ATTNKIT_BAD_SIZE;
  // A span's entries are counted in 32 bits: at most 1024 queries with s blocks each and their own.
  if (s.lists < 1 || s.h % s.lists != 0 || s.lists % s.g != 0 || s.s < 0 || s.s >= kLargest / 2048 || s.block < 1 ||
      s.block >= kLargest || !in_range({{s.b, 0}, {s.lists, 0}, {s.m, 0}, {s.s, 1}}))
    return ATTNKIT_BAD_SIZE;
  return s.chosen || s.s == 0 || s.b == 0 || s.m == 0 ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

int32_t check(const attnkit_coarse& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.c < 0 || s.c >= kLargest || !arrays_are_good(s, s.c)) return ATTNKIT_BAD_SIZE;
  if (s.s < 0 || s.s >= kLargest || s.stride < 1 || s.length < s.stride || s.length % s.stride != 0 ||
      s.length >= kLargest || s.block < s.stride || s.block % s.stride != 0 || s.block >= kLargest ||
      !in_range({{s.b, 0}, {s.h, 0}, {s.m, 0}, {s.e, 1}}) || !in_range({{s.b, 0}, {s.g, 0}, {s.m, 0}, {s.s, 1}}))
    return ATTNKIT_BAD_SIZE;
  return s.chosen || s.s == 0 || s.b == 0 || s.m == 0 ? ATTNKIT_OK : ATTNKIT_BAD_SIZE;
}

int32_t check(const attnkit_indexer& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.g < 1 || s.h < 1 || s.h % s.g != 0 || s.m > s.n || s.n >= kLargest || s.d < 1 ||
      s.d >= kLargest || s.top < 1 || s.top >= kLargest || !threads_in_range(s.threads))
    return ATTNKIT_BAD_SIZE;
  if (!in_range({{s.b, s.q_b}, {s.h, s.q_h}, {s.m, s.q_m}, {s.d, 1}}) ||
      !in_range({{s.b, s.k_b}, {s.g, s.k_g}, {s.n, s.k_n}, {s.d, 1}}) ||
      !in_range({{s.b, s.w_b}, {s.h, s.w_h}, {s.m, s.w_m}}) || !in_range({{s.b, 0}, {s.m, 0}, {s.top, 1}}))
    return ATTNKIT_BAD_SIZE;
  if (s.b > 0 && s.m > 0 && !(s.q && s.k && s.w && s.chosen)) return ATTNKIT_BAD_SIZE;
  return ATTNKIT_OK;
}

int32_t check(const attnkit_gates& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.g < 1 || s.h < 1 || s.h % s.g != 0 || s.m > s.n || s.n >= kLargest || s.c < 0 || s.c >= kLargest || s.d < 1 ||
      s.d >= kLargest || s.s < 0 || s.s >= kLargest || s.block < 1 || s.block >= kLargest || !threads_in_range(s.threads))
    return ATTNKIT_BAD_SIZE;
  if (!in_range({{s.b, s.q_b}, {s.h, s.q_h}, {s.m, s.q_m}, {s.d, 1}}) ||
      !in_range({{s.b, 0}, {s.g, 0}, {s.c, 0}, {s.d, 1}}) || !in_range({{s.b, 0}, {s.h, 0}, {s.m, 0}, {s.s, 1}}))
    return ATTNKIT_BAD_SIZE;
  if (s.b > 0 && s.m > 0 && s.s > 0 && !(s.q && (s.means || s.c == 0) && s.chosen)) return ATTNKIT_BAD_SIZE;
  return ATTNKIT_OK;
}

int32_t check(const attnkit_softmax& s, const attnkit_topk& kept) {
  const int32_t status = check_softmax(s);
  if (status != ATTNKIT_OK) return status;
  if (s.bias || s.alibi || s.sink || s.total || s.lse || s.softcap != 0.0f || s.drop_below || s.n >= kLargest ||
      s.d >= kLargest)
    return ATTNKIT_BAD_SIZE;
  // Every one of 48 rows has scratch memory for twice as many keys as it keeps.
  if (kept.most < 0 || kept.most > s.n || !kept.kept) return ATTNKIT_BAD_SIZE;
  return ATTNKIT_OK;
}

// What only a look into the arrays of a call can tell: a status.
template <class... Call>
int32_t check_contents(const Call&...) {
  return ATTNKIT_OK;
}
int32_t check_contents(const attnkit_softmax& s, const attnkit_topk& kept) {
  if (s.offsets && !list_is_good(s)) return ATTNKIT_BAD_MASK;
  for (int64_t seen = 0; seen <= s.n; ++seen)
    if (kept.kept[seen] < 0 || kept.kept[seen] > kept.most) return ATTNKIT_BAD_SIZE;
  return ATTNKIT_OK;
}

bool nothing_to_do(const attnkit_softmax& s) { return s.b == 0 || s.m == 0; }
bool nothing_to_do(const attnkit_gates& s) { return s.b == 0 || s.m == 0 || s.s == 0; }
bool nothing_to_do(const attnkit_indexer& s) { return s.b == 0 || s.m == 0; }
bool nothing_to_do(const attnkit_coarse& s) { return s.b == 0 || s.m == 0; }
bool nothing_to_do(const attnkit_selected& s) { return s.b == 0 || s.m == 0; }
bool nothing_to_do(const attnkit_block_list&) { return false; }
template <class Call, class More>
bool nothing_to_do(const Call& s, const More&) {
  return nothing_to_do(s);
}

// The level is an argument: another thread may choose one between two looks.
template <class... Call>
int64_t scratch_bytes(const SparseKernels& at, int64_t (*SparseKernels::*bytes)(const Call&...), const Call&... call) {
  const int32_t status = check(call...);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(call...) ? 0 : (at.*bytes)(call...);
}

template <class Kernel, class... Call>
int32_t run(int64_t (*SparseKernels::*bytes)(const Call&...), Kernel kernel, void* scratch, int64_t given,
            const Call&... call) {
  const SparseKernels& at = level().sparse;
  int32_t status = scratch_status(scratch_bytes(at, bytes, call...), scratch, given);
  if (status != ATTNKIT_OK || nothing_to_do(call...)) return status;
  status = check_contents(call...);
  if (status == ATTNKIT_OK) (at.*kernel)(call..., static_cast<char*>(scratch));
  return status;
}

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_block_bounds_scratch_bytes(const attnkit_block_list* call) {
  return scratch_bytes(level().sparse, &SparseKernels::block_list_scratch_bytes, *call);
}
int32_t attnkit_block_bounds(const attnkit_block_list* call, void* scratch, int64_t bytes) {
  return run(&SparseKernels::block_list_scratch_bytes, &SparseKernels::block_bounds, scratch, bytes, *call);
}

int64_t attnkit_block_list_fill_scratch_bytes(const attnkit_block_list* call) {
  if (call->room < 0 || call->room >= kLargest || call->slots <= call->room || (call->slots & (call->slots - 1)) != 0)
    return -ATTNKIT_BAD_SIZE;
  return attnkit_block_bounds_scratch_bytes(call);
}
int32_t attnkit_block_list_fill(const attnkit_block_list* call, void* scratch, int64_t bytes) {
  const int32_t status = scratch_status(attnkit_block_list_fill_scratch_bytes(call), scratch, bytes);
  return status != ATTNKIT_OK
             ? status
             : run(&SparseKernels::block_list_scratch_bytes, &SparseKernels::block_list, scratch, bytes, *call);
}

#define ATTNKIT_SPARSE_CALL(name)                                                                             \
  int64_t attnkit_##name##_forward_scratch_bytes(const attnkit_##name* call) {                                \
    return scratch_bytes(level().sparse, &SparseKernels::name##_scratch_bytes, *call);                        \
  }                                                                                                           \
  int32_t attnkit_##name##_forward(const attnkit_##name* call, void* scratch, int64_t bytes) {                \
    return run(&SparseKernels::name##_scratch_bytes, &SparseKernels::name, scratch, bytes, *call);            \
  }
ATTNKIT_SPARSE_CALL(selected)
ATTNKIT_SPARSE_CALL(coarse)
ATTNKIT_SPARSE_CALL(gates)
ATTNKIT_SPARSE_CALL(indexer)

int64_t attnkit_topk_forward_scratch_bytes(const attnkit_softmax* call, const attnkit_topk* kept) {
  return scratch_bytes(level().sparse, &SparseKernels::topk_scratch_bytes, *call, *kept);
}
int32_t attnkit_topk_forward(const attnkit_softmax* call, const attnkit_topk* kept, void* scratch, int64_t bytes) {
  return run(&SparseKernels::topk_scratch_bytes, &SparseKernels::topk, scratch, bytes, *call, *kept);
}
