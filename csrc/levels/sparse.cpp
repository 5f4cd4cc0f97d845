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
#include "../kernels/gates.h"
#include "../kernels/indexer.h"
#include "../kernels/bounds.h"
#include "../kernels/topk.h"
// clang-format on

int64_t block_list_scratch_bytes(const attnkit_block_list& s) { return BlockLists(s).scratch_bytes(); }
void block_bounds(const attnkit_block_list& s, char* scratch) { BlockLists(s).bounds(scratch); }
void block_list(const attnkit_block_list& s, char* scratch) { BlockLists(s).fill(scratch); }

// Calls f with the kernel that serves the call.
template <template <class, class> class Kernel, class F, class Call, class... More>
auto with_kernel(F f, const Call& s, const More&... more) {
#if defined(ATTNKIT_BF16_DOT)
  using BFloat16Product = BFloat16Math;
#else
  using BFloat16Product = Float32Math;
#endif
  if (s.dtype == ATTNKIT_BFLOAT16) return f(Kernel<BFloat16Product, BFloat16>(s, more...));
  if (s.dtype == ATTNKIT_FLOAT16) return f(Kernel<Float32Math, Float16>(s, more...));
  return f(Kernel<Float32Math, float>(s, more...));
}

const auto bytes_of = [](const auto& kernel) { return kernel.scratch_bytes(); };
auto run_in(char* scratch) {
  return [scratch](const auto& kernel) { kernel.run(scratch); };
}

int64_t selected_scratch_bytes(const attnkit_selected& s) { return with_kernel<Selected>(bytes_of, s); }
void selected(const attnkit_selected& s, char* scratch) { with_kernel<Selected>(run_in(scratch), s); }

int64_t coarse_scratch_bytes(const attnkit_coarse& s) { return with_kernel<Coarse>(bytes_of, s); }
void coarse(const attnkit_coarse& s, char* scratch) { with_kernel<Coarse>(run_in(scratch), s); }

int64_t indexer_scratch_bytes(const attnkit_indexer& s) { return with_kernel<Indexer>(bytes_of, s); }
void indexer(const attnkit_indexer& s, char* scratch) { with_kernel<Indexer>(run_in(scratch), s); }

template <class, class T>
using Float32Gates = Gates<Float32Math, T>;
int64_t gates_scratch_bytes(const attnkit_gates& s) { return with_kernel<Float32Gates>(bytes_of, s); }
void gates(const attnkit_gates& s, char* scratch) { with_kernel<Float32Gates>(run_in(scratch), s); }

int64_t topk_scratch_bytes(const attnkit_softmax& s, const attnkit_topk& kept) {
  return with_kernel<TopK>(bytes_of, s, kept);
}
void topk(const attnkit_softmax& s, const attnkit_topk& kept, char* scratch) {
  with_kernel<TopK>(run_in(scratch), s, kept);
}

}  // namespace

const SparseKernels sparse = {block_list_scratch_bytes, block_bounds,         block_list, selected_scratch_bytes,
                              selected,                 coarse_scratch_bytes, coarse,     indexer_scratch_bytes,
                              indexer,                  gates_scratch_bytes,  gates,      topk_scratch_bytes,
                              topk};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
