/* Linear maps of few rows. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_PROJECTION_H
#define ATTNKIT_ABI_PROJECTION_H

#ifdef __cplusplus
extern "C" {
#endif

/* y = x w^T + bias, the linear map of a layer, for the few rows of a decoding step: every weight is read once. */
typedef struct attnkit_projection {
  const void* x;    /* (m, d) */
  const void* w;    /* (n, d) */
  const void* bias; /* (n), or null */
  void* y;          /* (m, n) */
  int64_t m, n, d;
  int64_t x_m, w_n, y_m;
  int32_t dtype; /* of all four */
  int32_t threads;
} attnkit_projection;

/* Needs no scratch memory. */
ATTNKIT_EXPORT int32_t attnkit_project(const attnkit_projection* call);

#ifdef __cplusplus
}
#endif

#endif
