// Latent attention at one instruction level.
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
#include "../kernels/latent.h"
// clang-format on

template <class F>
auto with_kernel(const attnkit_latent& s, F f) {
#if defined(ATTNKIT_BF16_DOT)
  using BFloat16Product = BFloat16Math;
#else
  using BFloat16Product = Float32Math;
#endif
  if (s.dtype == ATTNKIT_BFLOAT16) return f(Latent<BFloat16Product, BFloat16>(s));
  if (s.dtype == ATTNKIT_FLOAT16) return f(Latent<Float32Math, Float16>(s));
  return f(Latent<Float32Math, float>(s));
}

int64_t latent_scratch_bytes(const attnkit_latent& s) {
  return with_kernel(s, [](const auto& kernel) { return kernel.scratch_bytes(); });
}

void latent_forward(const attnkit_latent& s, char* scratch) {
  with_kernel(s, [&](const auto& kernel) { kernel.run(scratch); });
}

}  // namespace

const LatentKernels latent = {latent_scratch_bytes, latent_forward};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
