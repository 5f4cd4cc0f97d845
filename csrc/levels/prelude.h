// What every file of levels/ begins with. CMake compiles each once per instruction level, into the namespace that
// ATTNKIT_LEVEL names; the kernels it includes stand in an unnamed namespace, so that no two files can share a name.
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "level.h"

#define ATTNKIT_INLINE inline __attribute__((always_inline))
#define ATTNKIT_NOINLINE __attribute__((noinline))
#define ATTNKIT_TEXT_(x) #x
#define ATTNKIT_TEXT(x) ATTNKIT_TEXT_(x)

namespace attnkit {
namespace ATTNKIT_LEVEL {
extern const Level level;
extern const LimitKernels limits;
extern const SoftmaxKernels softmax;
extern const LinearKernels linear;
extern const SparseKernels sparse;
extern const LatentKernels latent;
extern const CacheKernels cache;
extern const ProjectionKernels projection;
extern const RotationKernels rotation;
}  // namespace ATTNKIT_LEVEL
}  // namespace attnkit
