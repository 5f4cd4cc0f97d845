// The linear family at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/gemm.h"
#include "../kernels/threads.h"
#include "../kernels/products.h"
#include "../kernels/chunk.h"
#include "../kernels/recurrent.h"
#include "../kernels/recurrent_backward.h"
// clang-format on

// Calls f with a number of the call's dtype.
template <class F>
auto with_dtype(const attnkit_linear& c, F f) {
  if (c.dtype == ATTNKIT_BFLOAT16) return f(BFloat16());
  if (c.dtype == ATTNKIT_FLOAT16) return f(Float16());
  return f(float());
}

int64_t forward_scratch_bytes(const attnkit_linear& c) {
  return with_dtype(c, [&](auto number) { return Recurrent<decltype(number)>(c).scratch_bytes(); });
}

void forward(const attnkit_linear& c, char* scratch) {
  with_dtype(c, [&](auto number) { Recurrent<decltype(number)>(c).run(scratch); });
}

int64_t backward_scratch_bytes(const attnkit_linear& c) {
  return with_dtype(c, [&](auto number) { return RecurrentBackward<decltype(number)>(c).scratch_bytes(); });
}

void backward(const attnkit_linear& c, char* scratch) {
  with_dtype(c, [&](auto number) { RecurrentBackward<decltype(number)>(c).run(scratch); });
}

}  // namespace

const LinearKernels linear = {forward_scratch_bytes, forward, backward_scratch_bytes, backward};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
