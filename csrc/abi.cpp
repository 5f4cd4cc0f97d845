// Chooses the instruction level. The calls themselves are checked and passed on in abi/, a file per family of kernels; all
// of it is compiled for any processor.
#include "abi.h"

#include <atomic>

#include "levels/level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace attnkit {

#define ATTNKIT_DECLARE(name) \
  namespace name {            \
  extern const Level level;   \
  }
#if defined(ATTNKIT_HAS_GENERIC)
ATTNKIT_DECLARE(generic)
#endif
#if defined(ATTNKIT_HAS_NEON)
ATTNKIT_DECLARE(neon)
#endif
#if defined(ATTNKIT_HAS_V2)
ATTNKIT_DECLARE(v2)
#endif
#if defined(ATTNKIT_HAS_V3)
ATTNKIT_DECLARE(v3)
#endif
#if defined(ATTNKIT_HAS_V4)
ATTNKIT_DECLARE(v4)
#endif
#if defined(ATTNKIT_HAS_V4BF16)
ATTNKIT_DECLARE(v4bf16)
#endif

namespace {

// NEON belongs to every 64-bit ARM processor.
#if defined(ATTNKIT_HAS_GENERIC) || defined(ATTNKIT_HAS_NEON)
bool always() { return true; }
#endif

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the system saves the wider registers. It does not know F16C in all compilers.
bool runs_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
bool runs_v3() {
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return runs_v2() && f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
}
bool runs_v4bf16() {
  return runs_v4() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

struct Built {
  const Level* level;
  bool (*runs_here)();
};

// Slowest first; the last that runs here is the default.
const Built kBuilt[] = {
#if defined(ATTNKIT_HAS_GENERIC)
    {&generic::level, always},
#endif
#if defined(ATTNKIT_HAS_NEON)
    {&neon::level, always},
#endif
#if defined(ATTNKIT_HAS_V2)
    {&v2::level, runs_v2},
#endif
#if defined(ATTNKIT_HAS_V3)
    {&v3::level, runs_v3},
#endif
#if defined(ATTNKIT_HAS_V4)
    {&v4::level, runs_v4},
#endif
#if defined(ATTNKIT_HAS_V4BF16)
    {&v4bf16::level, runs_v4bf16},
#endif
};
constexpr int32_t kLevels = sizeof kBuilt / sizeof kBuilt[0];

int32_t fastest() {
  int32_t best = 0;
  for (int32_t i = 0; i < kLevels; ++i)
    if (kBuilt[i].runs_here()) best = i;
  return best;
}

std::atomic<int32_t> chosen{fastest()};

}  // namespace

const Level& level() { return *kBuilt[chosen.load(std::memory_order_relaxed)].level; }

}  // namespace attnkit

using namespace attnkit;

int32_t attnkit_abi_version(void) { return ATTNKIT_ABI_VERSION; }

int32_t attnkit_openmp(void) {
#if defined(ATTNKIT_HAS_OPENMP)
  return 1;
#else
  return 0;
#endif
}

const char* attnkit_compiler(void) {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

int32_t attnkit_level_count(void) { return kLevels; }

const char* attnkit_level_name(int32_t i) { return i < 0 || i >= kLevels ? "" : kBuilt[i].level->name; }

int32_t attnkit_level_runs_here(int32_t i) { return i >= 0 && i < kLevels && kBuilt[i].runs_here(); }

int32_t attnkit_get_level(void) { return chosen.load(std::memory_order_relaxed); }

int32_t attnkit_set_level(int32_t i) {
  if (!attnkit_level_runs_here(i)) return ATTNKIT_BAD_LEVEL;
  chosen.store(i, std::memory_order_relaxed);
  return ATTNKIT_OK;
}
