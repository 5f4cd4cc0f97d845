// Softmax attention at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/gemm.h"
#include "../kernels/visible.h"
#include "../kernels/logits.h"
#include "../kernels/dropout.h"
#include "../kernels/threads.h"
#include "../kernels/pack.h"
#include "../kernels/prefill.h"
#include "../kernels/stores.h"
#include "../kernels/many.h"
#include "../kernels/decode.h"
#include "../kernels/backward.h"
// clang-format on

#if defined(ATTNKIT_BF16_DOT)
using BFloat16Product = BFloat16Math;
#else
using BFloat16Product = Float32Math;
#endif

// Calls f with the kernel that serves the call.
template <class F>
auto with_kernel(const attnkit_softmax& s, F f) {
  if (s.kernel == ATTNKIT_DECODE) {
    if (s.dtype == ATTNKIT_BFLOAT16) return f(Decode<Tensors<BFloat16>>(s, Tensors<BFloat16>(s)));
    if (s.dtype == ATTNKIT_FLOAT16) return f(Decode<Tensors<Float16>>(s, Tensors<Float16>(s)));
    return f(Decode<Tensors<float>>(s, Tensors<float>(s)));
  }
  if (s.dtype == ATTNKIT_BFLOAT16) return f(Prefill<BFloat16Product, BFloat16>(s));
  if (s.dtype == ATTNKIT_FLOAT16) return f(Prefill<Float32Math, Float16>(s));
  return f(Prefill<Float32Math, float>(s));
}

int64_t softmax_scratch_bytes(const attnkit_softmax& s) {
  return with_kernel(s, [](const auto& kernel) { return kernel.scratch_bytes(); });
}

void softmax_forward(const attnkit_softmax& s, char* scratch) {
  with_kernel(s, [&](const auto& kernel) { kernel.run(scratch); });
}

template <class F>
auto with_backward(const attnkit_softmax& s, const attnkit_softmax_gradients& gradients, F f) {
  if (s.dtype == ATTNKIT_BFLOAT16) return f(Backward<BFloat16Product, BFloat16>(s, gradients));
  if (s.dtype == ATTNKIT_FLOAT16) return f(Backward<Float32Math, Float16>(s, gradients));
  return f(Backward<Float32Math, float>(s, gradients));
}

int64_t softmax_backward_scratch_bytes(const attnkit_softmax& s, const attnkit_softmax_gradients& gradients) {
  return with_backward(s, gradients, [](const auto& kernel) { return kernel.scratch_bytes(); });
}

void softmax_backward(const attnkit_softmax& s, const attnkit_softmax_gradients& gradients, char* scratch) {
  with_backward(s, gradients, [&](const auto& kernel) { kernel.run(scratch); });
}

}  // namespace

const SoftmaxKernels softmax = {softmax_scratch_bytes, softmax_forward, softmax_backward_scratch_bytes, softmax_backward};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
