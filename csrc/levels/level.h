// What one instruction level offers, a struct per family of kernels. abi.cpp holds the table of the levels that were built.
#ifndef ATTNKIT_LEVEL_H
#define ATTNKIT_LEVEL_H

#include "../abi.h"

namespace attnkit {

struct LimitKernels {
  double (*fma_gflops)(int64_t threads, double seconds);
  double (*bf16_dot_gflops)(int64_t threads, double seconds);
  double (*read_gigabytes)(const void* buffer, int64_t bytes, int64_t threads, double seconds);
};

struct SoftmaxKernels {
  int64_t (*scratch_bytes)(const attnkit_softmax&);
  void (*forward)(const attnkit_softmax&, char* scratch);
  int64_t (*backward_scratch_bytes)(const attnkit_softmax&, const attnkit_softmax_gradients&);
  void (*backward)(const attnkit_softmax&, const attnkit_softmax_gradients&, char* scratch);
  int64_t (*documents_scratch_bytes)(const attnkit_softmax&, const attnkit_documents&);
  void (*documents)(const attnkit_softmax&, const attnkit_documents&, char* scratch);
  int64_t (*documents_backward_scratch_bytes)(const attnkit_softmax&, const attnkit_softmax_gradients&,
                                              const attnkit_documents&);
  void (*documents_backward)(const attnkit_softmax&, const attnkit_softmax_gradients&, const attnkit_documents&,
                             char* scratch);
};

struct LinearKernels {
  int64_t (*forward_scratch_bytes)(const attnkit_linear&);
  void (*forward)(const attnkit_linear&, char* scratch);
  int64_t (*backward_scratch_bytes)(const attnkit_linear&);
  void (*backward)(const attnkit_linear&, char* scratch);
};

struct SparseKernels {
  int64_t (*block_list_scratch_bytes)(const attnkit_block_list&);
  void (*block_bounds)(const attnkit_block_list&, char* scratch);
  void (*block_list)(const attnkit_block_list&, char* scratch);
  int64_t (*selected_scratch_bytes)(const attnkit_selected&);
  void (*selected)(const attnkit_selected&, char* scratch);
  int64_t (*coarse_scratch_bytes)(const attnkit_coarse&);
  void (*coarse)(const attnkit_coarse&, char* scratch);
  int64_t (*indexer_scratch_bytes)(const attnkit_indexer&);
  void (*indexer)(const attnkit_indexer&, char* scratch);
  int64_t (*gates_scratch_bytes)(const attnkit_gates&);
  void (*gates)(const attnkit_gates&, char* scratch);
  int64_t (*topk_scratch_bytes)(const attnkit_softmax&, const attnkit_topk&);
  void (*topk)(const attnkit_softmax&, const attnkit_topk&, char* scratch);
};

struct LatentKernels {
  int64_t (*scratch_bytes)(const attnkit_latent&);
  void (*forward)(const attnkit_latent&, char* scratch);
};

struct CacheKernels {
  int64_t (*scratch_bytes)(const attnkit_cache&);
  void (*forward)(const attnkit_cache&, char* scratch);
};

struct ProjectionKernels {
  void (*project)(const attnkit_projection&);
};

struct RotationKernels {
  void (*rotate)(const attnkit_rotation&);
};

struct Level {
  const char* name;
  const LimitKernels& limits;
  const SoftmaxKernels& softmax;
  const LinearKernels& linear;
  const SparseKernels& sparse;
  const LatentKernels& latent;
  const CacheKernels& cache;
  const ProjectionKernels& projection;
  const RotationKernels& rotation;
};

// The level that was chosen.
const Level& level();

}  // namespace attnkit

#endif
