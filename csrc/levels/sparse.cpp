// Block lists and learned-sparse attention at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/gemm.h"
#include "../kernels/visible.h"
#include "../kernels/logits.h"
#include "../kernels/threads.h"
#include "../kernels/pack.h"
#include "../kernels/lists.h"
#include "../kernels/selected.h"
#include "../kernels/coarse.h"
#include "../kernels/best.h"
#include "../kernels/indexer.h"
// clang-format on

int64_t block_list_scratch_bytes(const attnkit_block_list& s) { return BlockLists(s).scratch_bytes(); }
void block_bounds(const attnkit_block_list& s, char* scratch) { BlockLists(s).bounds(scratch); }
void block_list(const attnkit_block_list& s, char* scratch) { BlockLists(s).fill(scratch); }

// Calls f with the kernel that serves the call.
template <template <class, class> class Kernel, class Call, class F>
auto with_kernel(const Call& s, F f) {
#if defined(ATTNKIT_BF16_DOT)
  using BFloat16Product = BFloat16Math;
#else
  using BFloat16Product = Float32Math;
#endif
  if (s.dtype == ATTNKIT_BFLOAT16) return f(Kernel<BFloat16Product, BFloat16>(s));
  if (s.dtype == ATTNKIT_FLOAT16) return f(Kernel<Float32Math, Float16>(s));
  return f(Kernel<Float32Math, float>(s));
}
int64_t selected_scratch_bytes(const attnkit_selected& s) {
  return with_kernel<Selected>(s, [](const auto& kernel) { return kernel.scratch_bytes(); });
}
void selected(const attnkit_selected& s, char* scratch) {
  with_kernel<Selected>(s, [&](const auto& kernel) { kernel.run(scratch); });
}

int64_t coarse_scratch_bytes(const attnkit_coarse& s) {
  return with_kernel<Coarse>(s, [](const auto& kernel) { return kernel.scratch_bytes(); });
}
void coarse(const attnkit_coarse& s, char* scratch) {
  with_kernel<Coarse>(s, [&](const auto& kernel) { kernel.run(scratch); });
}

int64_t indexer_scratch_bytes(const attnkit_indexer& s) {
  return with_kernel<Indexer>(s, [](const auto& kernel) { return kernel.scratch_bytes(); });
}
void indexer(const attnkit_indexer& s, char* scratch) {
  with_kernel<Indexer>(s, [&](const auto& kernel) { kernel.run(scratch); });
}

}  // namespace

const SparseKernels sparse = {block_list_scratch_bytes, block_bounds,         block_list, selected_scratch_bytes,
                              selected,                 coarse_scratch_bytes, coarse,     indexer_scratch_bytes,
                              indexer};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
