/* Rotary positions. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_ROTATION_H
#define ATTNKIT_ABI_ROTATION_H

#ifdef __cplusplus
extern "C" {
#endif

/* y = x cos + (-x2, x1) sin of every row x = (x1, x2), two halves of d / 2 numbers each. */
typedef struct attnkit_rotation {
  const void* x;   /* (b, h, m, d) */
  const void* cos; /* (b, m, d), shared by all heads */
  const void* sin; /* (b, m, d) */
  void* y;         /* (b, h, m, d), not x */
  int64_t b, h, m, d;
  int64_t x_b, x_h, x_m;
  int64_t cos_b, cos_m, sin_b, sin_m;
  int64_t y_b, y_h, y_m;
  int32_t dtype; /* of all four */
  int32_t threads;
} attnkit_rotation;

/* Needs no scratch memory. */
ATTNKIT_EXPORT int32_t attnkit_rotate(const attnkit_rotation* call);

#ifdef __cplusplus
}
#endif

#endif
