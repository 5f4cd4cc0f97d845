/* What the machine can do at most. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_LIMITS_H
#define ATTNKIT_ABI_LIMITS_H

#ifdef __cplusplus
extern "C" {
#endif

/* The machine's limits through the chosen level. Each runs for about `seconds` and returns the best figure seen. */
ATTNKIT_EXPORT double attnkit_fma_gflops(int64_t threads, double seconds);
ATTNKIT_EXPORT double attnkit_bf16_dot_gflops(int64_t threads, double seconds); /* 0 without the instruction */
ATTNKIT_EXPORT double attnkit_read_gigabytes(const void* buffer, int64_t bytes, int64_t threads, double seconds);

#ifdef __cplusplus
}
#endif

#endif
