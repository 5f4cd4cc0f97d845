// Block lists and learned-sparse attention at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/lists.h"
// clang-format on

int64_t block_list_scratch_bytes(const attnkit_block_list& s) { return BlockLists(s).scratch_bytes(); }
void block_bounds(const attnkit_block_list& s, char* scratch) { BlockLists(s).bounds(scratch); }
void block_list(const attnkit_block_list& s, char* scratch) { BlockLists(s).fill(scratch); }

}  // namespace

const SparseKernels sparse = {block_list_scratch_bytes, block_bounds, block_list};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
