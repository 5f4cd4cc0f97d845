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
#include "../kernels/documents.h"
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

struct OfDocuments {
  int64_t bytes(const attnkit_softmax& s, int64_t) const { return s.m > 0 ? softmax_scratch_bytes(s) : 0; }
  void run(const attnkit_softmax& s, int64_t, char* scratch) const {
    if (s.m > 0) softmax_forward(s, scratch);
  }
};

struct BackwardOfDocuments {
  const attnkit_softmax& all;
  const attnkit_softmax_gradients& gradients;
  const attnkit_documents& documents;

  attnkit_softmax_gradients of(int64_t i) const {
    const int64_t bytes = all.dtype == ATTNKIT_FLOAT32 ? 4 : 2, q = documents.q_offsets[i], k = documents.k_offsets[i];
    attnkit_softmax_gradients g = gradients;
    if (documents.q_offsets[i + 1] > q) g.d_o = static_cast<const char*>(g.d_o) + bytes * q * g.d_o_m;
    if (g.d_q) g.d_q = static_cast<char*>(g.d_q) + bytes * q * all.d;
    if (g.d_k) g.d_k = static_cast<char*>(g.d_k) + bytes * k * all.d;
    if (g.d_v) g.d_v = static_cast<char*>(g.d_v) + bytes * k * all.e;
    if (g.d_sink) g.d_sink += i * all.h;
    return g;
  }
  int64_t bytes(const attnkit_softmax& s, int64_t i) const { return softmax_backward_scratch_bytes(s, of(i)); }
  void run(const attnkit_softmax& s, int64_t i, char* scratch) const { softmax_backward(s, of(i), scratch); }
};

int64_t documents_scratch_bytes(const attnkit_softmax& s, const attnkit_documents& d) {
  return Documents<OfDocuments>(s, d, {}).scratch_bytes();
}

void documents_forward(const attnkit_softmax& s, const attnkit_documents& d, char* scratch) {
  Documents<OfDocuments>(s, d, {}).run(scratch);
}

int64_t documents_backward_scratch_bytes(const attnkit_softmax& s, const attnkit_softmax_gradients& g,
                                         const attnkit_documents& d) {
  return Documents<BackwardOfDocuments>(s, d, {s, g, d}).scratch_bytes();
}

void documents_backward(const attnkit_softmax& s, const attnkit_softmax_gradients& g, const attnkit_documents& d,
                        char* scratch) {
  Documents<BackwardOfDocuments>(s, d, {s, g, d}).run(scratch);
}

}  // namespace

const SoftmaxKernels softmax = {
    softmax_scratch_bytes,   softmax_forward,   softmax_backward_scratch_bytes,   softmax_backward,
    documents_scratch_bytes, documents_forward, documents_backward_scratch_bytes, documents_backward,
};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
