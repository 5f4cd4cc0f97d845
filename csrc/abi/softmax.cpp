// Checks softmax calls before any pointer is used, and passes them to the level that was chosen.
#include "../abi.h"
#include "../levels/level.h"
#include "sizes.h"

namespace attnkit {
namespace {

bool sizes_are_good(const attnkit_softmax& s) {
  if (s.h < 1 || s.g < 1 || s.h % s.g != 0 || s.d < 1 || s.e < 1 || !threads_in_range(s.threads)) return false;
  if (!in_range({{s.b, s.q_b}, {s.h, s.q_h}, {s.m, s.q_m}, {s.d, 1}})) return false;
  if (!in_range({{s.b, s.k_b}, {s.g, s.k_g}, {s.n, s.k_n}, {s.d, 1}})) return false;
  if (!in_range({{s.b, s.v_b}, {s.g, s.v_g}, {s.n, s.v_n}, {s.e, 1}})) return false;
  if (!in_range({{s.b, s.o_b}, {s.h, s.o_h}, {s.m, s.o_m}, {s.e, 1}})) return false;
  // Every row has scratch memory for at most 64 ranges of keys.
  if (!in_range({{s.b, 0}, {s.h, 0}, {s.m, 0}, {16, 0}})) return false;
  if (s.bias && !in_range({{s.b, s.bias_b}, {s.h, s.bias_h}, {s.m, s.bias_m}})) return false;
  if (s.bias && !in_range({{s.n, s.bias_n}})) return false;
  if (s.total && (s.m > s.n || !in_range({{s.b, s.total_b}, {s.h, s.total_h}, {s.n, 1}}))) return false;
  if (s.b == 0 || s.m == 0) return true;
  return s.q && s.o && (s.n == 0 || (s.k && s.v));
}

}  // namespace

// A list is walked once for every block of 48 x 64 products it names: to check it costs nothing beside that.
bool list_is_good(const attnkit_softmax& s) {
  if ((s.mask_batches != 1 && s.mask_batches != s.b) || (s.mask_heads != 1 && s.mask_heads != s.h)) return false;
  const int64_t rows = (s.m + ATTNKIT_BLOCK_QUERIES - 1) / ATTNKIT_BLOCK_QUERIES;
  const int64_t lists = s.mask_batches * s.mask_heads * rows;
  if (s.offsets[0] < 0) return false;
  for (int64_t list = 0; list < lists; ++list) {
    if (s.offsets[list + 1] < s.offsets[list] || (s.offsets[list + 1] > 0 && !(s.columns && s.pattern))) return false;
    int64_t after = 0;  // columns from here on may follow
    for (int64_t entry = s.offsets[list]; entry < s.offsets[list + 1]; ++entry) {
      if (s.columns[entry] < after || s.columns[entry] * int64_t{ATTNKIT_BLOCK_KEYS} >= s.n) return false;
      if (s.pattern[entry] < -1 || (s.pattern[entry] >= 0 && !s.patterns)) return false;
      after = s.columns[entry] + int64_t{1};
    }
  }
  return true;
}

int32_t check_softmax(const attnkit_softmax& s) {
  if (s.dtype < ATTNKIT_FLOAT32 || s.dtype > ATTNKIT_FLOAT16) return ATTNKIT_BAD_DTYPE;
  if (s.kernel != ATTNKIT_PREFILL && s.kernel != ATTNKIT_DECODE) return ATTNKIT_BAD_KERNEL;
  if (!sizes_are_good(s)) return ATTNKIT_BAD_SIZE;
  if (s.left < -kMostDistance || s.left > kMostDistance || s.right < -kMostDistance || s.right > kMostDistance)
    return ATTNKIT_BAD_MASK;
  if (s.drop_below < 0 || s.drop_below >= 1 << 24) return ATTNKIT_BAD_SIZE;
  if (s.drop_below && s.kernel == ATTNKIT_DECODE) return ATTNKIT_BAD_KERNEL;
  if (s.offsets && s.kernel == ATTNKIT_DECODE && s.m > ATTNKIT_BLOCK_QUERIES) return ATTNKIT_BAD_KERNEL;
  return ATTNKIT_OK;
}

namespace {

// Gradients of what a call does not have cannot be asked for.
int32_t check(const attnkit_softmax& s, const attnkit_softmax_gradients& g) {
  const int32_t status = check_softmax(s);
  if (status != ATTNKIT_OK) return status;
  const bool rows = s.b > 0 && s.m > 0;
  if (rows && (!s.o || !s.lse || !g.d_o)) return ATTNKIT_BAD_SIZE;
  if (s.b > 0 && s.n > 0 && !(s.k && s.v)) return ATTNKIT_BAD_SIZE;  // read even where no query is
  if (!in_range({{s.b, g.d_o_b}, {s.h, g.d_o_h}, {s.m, g.d_o_m}, {s.e, 1}})) return ATTNKIT_BAD_SIZE;
  if (g.d_bias && (!s.bias || g.d_bias_n < 0 || g.d_bias_n > 1 ||
                   !in_range({{s.b, g.d_bias_b}, {s.h, g.d_bias_h}, {s.m, g.d_bias_m}, {s.n, g.d_bias_n}})))
    return ATTNKIT_BAD_SIZE;
  if ((g.d_q && (g.d_q_h < s.m * s.d || !in_range({{s.b * s.h, g.d_q_h}}))) ||
      (g.d_k && (g.d_k_g < s.n * s.d || !in_range({{s.b * s.g, g.d_k_g}}))) ||
      (g.d_v && (g.d_v_g < s.n * s.e || !in_range({{s.b * s.g, g.d_v_g}}))))
    return ATTNKIT_BAD_SIZE;
  return (g.d_sink && !s.sink) || (g.d_alibi && !s.alibi) || (g.d_total && !s.total) ? ATTNKIT_BAD_SIZE : ATTNKIT_OK;
}

// Offsets are looked at before any of them is used: there are as many as the call says.
bool offsets_are_good(const int64_t* offsets, int64_t count, int64_t end) {
  if (!offsets || offsets[0] != 0 || offsets[count] != end) return false;
  for (int64_t i = 0; i < count; ++i)
    if (offsets[i + 1] < offsets[i]) return false;
  return true;
}

int32_t check(const attnkit_softmax& s, const attnkit_documents& d) {
  const int32_t status = check_softmax(s);
  if (status != ATTNKIT_OK) return status;
  if (s.b != 1 || s.bias || s.total || s.offsets || d.count < 1 || !in_range({{d.count, 0}, {s.h, 0}}) ||
      !offsets_are_good(d.q_offsets, d.count, s.m) || !offsets_are_good(d.k_offsets, d.count, s.n))
    return ATTNKIT_BAD_SIZE;
  return d.decode_queries > ATTNKIT_BLOCK_QUERIES ? ATTNKIT_BAD_KERNEL : ATTNKIT_OK;
}
int32_t check(const attnkit_softmax& s, const attnkit_softmax_gradients& g, const attnkit_documents& d) {
  const int32_t status = check(s, g);
  if (status != ATTNKIT_OK) return status;
  return g.d_lse || g.d_alibi ? ATTNKIT_BAD_SIZE : check(s, d);
}

bool nothing_to_do(const attnkit_softmax& s) { return s.b == 0 || s.m == 0; }

// Minus a status code if the call is refused. The level is an argument: another thread may choose one between two looks.
int64_t scratch_bytes(const Level& at, const attnkit_softmax& s) {
  const int32_t status = check_softmax(s);
  if (status != ATTNKIT_OK) return -status;
  return nothing_to_do(s) ? 0 : at.softmax.scratch_bytes(s);
}
int64_t scratch_bytes(const Level& at, const attnkit_softmax& s, const attnkit_softmax_gradients& g) {
  const int32_t status = check(s, g);
  return status == ATTNKIT_OK ? at.softmax.backward_scratch_bytes(s, g) : -status;
}
int64_t scratch_bytes(const Level& at, const attnkit_softmax& s, const attnkit_documents& d) {
  const int32_t status = check(s, d);
  return status == ATTNKIT_OK ? at.softmax.documents_scratch_bytes(s, d) : -status;
}
int64_t scratch_bytes(const Level& at, const attnkit_softmax& s, const attnkit_softmax_gradients& g,
                      const attnkit_documents& d) {
  const int32_t status = check(s, g, d);
  return status == ATTNKIT_OK ? at.softmax.documents_backward_scratch_bytes(s, g, d) : -status;
}

}  // namespace
}  // namespace attnkit

using namespace attnkit;

int64_t attnkit_softmax_forward_scratch_bytes(const attnkit_softmax* call) { return scratch_bytes(level(), *call); }

int32_t attnkit_softmax_forward(const attnkit_softmax* call, void* scratch, int64_t bytes) {
  const Level& at = level();
  const int64_t needed = scratch_bytes(at, *call);
  const int32_t status = scratch_status(needed, scratch, bytes);
  if (status != ATTNKIT_OK) return status;
  if (nothing_to_do(*call)) return ATTNKIT_OK;
  if (call->offsets && !list_is_good(*call)) return ATTNKIT_BAD_MASK;
  at.softmax.forward(*call, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}

int64_t attnkit_softmax_backward_scratch_bytes(const attnkit_softmax* call, const attnkit_softmax_gradients* gradients) {
  return scratch_bytes(level(), *call, *gradients);
}

int32_t attnkit_softmax_backward(const attnkit_softmax* call, const attnkit_softmax_gradients* gradients, void* scratch,
                                 int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(scratch_bytes(at, *call, *gradients), scratch, bytes);
  if (status != ATTNKIT_OK) return status;
  if (call->offsets && !list_is_good(*call)) return ATTNKIT_BAD_MASK;
  at.softmax.backward(*call, *gradients, static_cast<char*>(scratch));
  return ATTNKIT_OK;
}

int64_t attnkit_documents_forward_scratch_bytes(const attnkit_softmax* call, const attnkit_documents* documents) {
  return scratch_bytes(level(), *call, *documents);
}

int32_t attnkit_documents_forward(const attnkit_softmax* call, const attnkit_documents* documents, void* scratch,
                                  int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(scratch_bytes(at, *call, *documents), scratch, bytes);
  if (status == ATTNKIT_OK) at.softmax.documents(*call, *documents, static_cast<char*>(scratch));
  return status;
}

int64_t attnkit_documents_backward_scratch_bytes(const attnkit_softmax* call, const attnkit_softmax_gradients* gradients,
                                                 const attnkit_documents* documents) {
  return scratch_bytes(level(), *call, *gradients, *documents);
}

int32_t attnkit_documents_backward(const attnkit_softmax* call, const attnkit_softmax_gradients* gradients,
                                   const attnkit_documents* documents, void* scratch, int64_t bytes) {
  const Level& at = level();
  const int32_t status = scratch_status(scratch_bytes(at, *call, *gradients, *documents), scratch, bytes);
  if (status == ATTNKIT_OK) at.softmax.documents_backward(*call, *gradients, *documents, static_cast<char*>(scratch));
  return status;
}
