// Softmax attention over every form of a decoding state, at one instruction level.
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
#include "../kernels/stores.h"
#include "../kernels/many.h"
#include "../kernels/decode.h"
#include "../kernels/codes.h"
#include "../kernels/nibbles.h"
#include "../kernels/cached.h"
#include "cache_call.h"
// clang-format on

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<BFloat16> = true;

template <class T, class F>
auto with_store(const attnkit_cache& c, F f) {
#if defined(ATTNKIT_BYTE_DOT)
  if constexpr (sizeof(T) == 2)
    if (c.form == ATTNKIT_INT8) return f(ByteCodes<ByteForm, T>(c));
#endif
#if defined(ATTNKIT_BF16_DOT) && defined(ATTNKIT_BYTE_DOT)
  if constexpr (is_bfloat16<T>) {
    if (c.form == ATTNKIT_FP8) return f(ByteCodes<FloatForm, T>(c));
    if (c.form == ATTNKIT_INT4 && c.channels == Nibbles::kChannels) return f(Nibbles(c));
  }
#endif
  switch (c.form) {
    case ATTNKIT_INT8: return f(Scaled<Int8, T>(c));
    case ATTNKIT_FP8: return f(Scaled<Fp8, T>(c));
    case ATTNKIT_INT4: return f(Grouped<T>(c));
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
