// Softmax attention over every form of a decoding state, at one instruction level.
#include "prelude.h"

namespace attnkit {
namespace ATTNKIT_LEVEL {
namespace {

// clang-format off: the order matters
#include "../kernels/simd.h"
#include "../kernels/visible.h"
#include "../kernels/logits.h"
#include "../kernels/threads.h"
#include "../kernels/stores.h"
#include "../kernels/decode.h"
#include "../kernels/codes.h"
#include "../kernels/cached.h"
// clang-format on

// The part of the call that does not depend on how keys are stored.
attnkit_softmax softmax_call(const attnkit_cache& c) {
  attnkit_softmax s{};
  s.q = c.q, s.o = c.o, s.lse = c.lse, s.bias = c.bias, s.alibi = c.alibi, s.sink = c.sink;
  s.offsets = c.offsets, s.columns = c.columns, s.pattern = c.pattern, s.patterns = c.patterns;
  s.b = c.b, s.h = c.h, s.g = c.g, s.m = c.m, s.n = c.n, s.d = c.d, s.e = c.e;
  s.q_b = c.q_b, s.q_h = c.q_h, s.q_m = c.q_m, s.o_b = c.o_b, s.o_h = c.o_h, s.o_m = c.o_m;
  s.bias_b = c.bias_b, s.bias_h = c.bias_h, s.bias_m = c.bias_m, s.bias_n = c.bias_n;
  s.left = c.left, s.right = c.right, s.mask_batches = c.mask_batches, s.mask_heads = c.mask_heads;
  s.threads = c.threads, s.dtype = c.dtype, s.kernel = ATTNKIT_DECODE, s.scale = c.scale, s.softcap = c.softcap;
  return s;
}

// What a tile of quantised numbers is converted to.
template <class T>
struct Converted {
  using Number = float;
};
#if defined(ATTNKIT_BF16_DOT)
template <>
struct Converted<BFloat16> {
  using Number = BFloat16;
};
#endif

template <class T, class F>
auto with_store(const attnkit_cache& c, F f) {
  using Number = typename Converted<T>::Number;
#if defined(ATTNKIT_BYTE_DOT)
  if constexpr (sizeof(T) == 2)
    if (c.form == ATTNKIT_INT8) return f(ByteCodes<T, EvenRows<uint8_t>>(c));
#endif
#if defined(ATTNKIT_BF16_DOT)
  if constexpr (sizeof(Number) == 2)
    if (c.form == ATTNKIT_FP8) return f(ScaledCodes<Fp8>(c));
#endif
  switch (c.form) {
    case ATTNKIT_INT8: return f(Scaled<Int8, T, float>(c));
    case ATTNKIT_FP8: return f(Scaled<Fp8, T, float>(c));
    case ATTNKIT_INT4: return f(Grouped<T, Number>(c));
    default:
      if (c.pages && c.page % kWalkKeys != 0) return f(Plain<T, ListedRows<T>>(c));
      return f(Plain<T, EvenRows<T>>(c));
  }
}

// Calls f with the kernel that serves the call.
template <class F>
auto with_kernel(const attnkit_cache& c, F f) {
  const attnkit_softmax s = softmax_call(c);
  const auto decode = [&](const auto& store) { return f(Decode(s, store)); };
  if (c.dtype == ATTNKIT_BFLOAT16) return with_store<BFloat16>(c, decode);
  if (c.dtype == ATTNKIT_FLOAT16) return with_store<Float16>(c, decode);
  return with_store<float>(c, decode);
}

int64_t cache_scratch_bytes(const attnkit_cache& c) {
  return with_kernel(c, [](const auto& kernel) { return kernel.scratch_bytes(); });
}

void cache_forward(const attnkit_cache& c, char* scratch) {
  with_kernel(c, [&](const auto& kernel) { kernel.run(scratch); });
}

}  // namespace

const CacheKernels cache = {cache_scratch_bytes, cache_forward};

}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
