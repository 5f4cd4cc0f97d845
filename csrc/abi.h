/* The whole interface between attnkit's Python and its native kernels: plain C, no torch and no Python headers, so that
 * one binary serves every Python and every torch. What all calls share is here; each family of kernels has its own file in abi/.
 *
 * attnkit.native holds the same declarations as ctypes tables; tests/build/test_native.py parses these files and compares
 * names, order and types. Strides count elements. The last dimension of every tensor is contiguous unless said otherwise.
 */
#ifndef ATTNKIT_ABI_H
#define ATTNKIT_ABI_H

#include <stdint.h>

#if defined(_WIN32)
#define ATTNKIT_EXPORT __declspec(dllexport)
#else
#define ATTNKIT_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raise this with every change of a declaration, here or in abi/: Python refuses a library of another number. */
#define ATTNKIT_ABI_VERSION 2

/* What every call returns. attnkit.native turns the numbers into sentences. */
#define ATTNKIT_OK 0
#define ATTNKIT_BAD_DTYPE 1
#define ATTNKIT_BAD_SIZE 2
#define ATTNKIT_BAD_MASK 3
#define ATTNKIT_BAD_KERNEL 4
#define ATTNKIT_BAD_LEVEL 5
#define ATTNKIT_SMALL_SCRATCH 6
#define ATTNKIT_BAD_FORM 20
#define ATTNKIT_BAD_PAGE 21
#define ATTNKIT_BAD_RULE 30

#define ATTNKIT_FLOAT32 0
#define ATTNKIT_BFLOAT16 1
#define ATTNKIT_FLOAT16 2

ATTNKIT_EXPORT int32_t attnkit_abi_version(void);
ATTNKIT_EXPORT int32_t attnkit_openmp(void);
ATTNKIT_EXPORT const char* attnkit_compiler(void);

/* Instruction levels that were built, slowest first. */
ATTNKIT_EXPORT int32_t attnkit_level_count(void);
ATTNKIT_EXPORT const char* attnkit_level_name(int32_t level);
ATTNKIT_EXPORT int32_t attnkit_level_runs_here(int32_t level);
ATTNKIT_EXPORT int32_t attnkit_get_level(void);
ATTNKIT_EXPORT int32_t attnkit_set_level(int32_t level);

#ifdef __cplusplus
}
#endif

#include "abi/latent.h"
#include "abi/cache.h"
#include "abi/limits.h"
#include "abi/linear.h"
#include "abi/projection.h"
#include "abi/rotation.h"
#include "abi/softmax.h"
#include "abi/sparse.h"

#endif
