/* Sums over the past that fade, with and without the delta rule. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_LINEAR_H
#define ATTNKIT_ABI_LINEAR_H

#ifdef __cplusplus
extern "C" {
#endif

/* Tokens between two states that the forward pass keeps for the backward pass. */
#define ATTNKIT_LINEAR_SPAN 256

/* decay_kind: nothing fades, one number a token, one a token and key channel. */
#define ATTNKIT_DECAY_NONE 0
#define ATTNKIT_DECAY_TOKEN 1
#define ATTNKIT_DECAY_CHANNEL 2

/* What queries and keys pass through as they are read: nothing, elu(x) + 1 (e^-32 at least), or the positive part. */
#define ATTNKIT_MAP_NONE 0
#define ATTNKIT_MAP_ELU 1
#define ATTNKIT_MAP_RELU 2

/* One call, forward or backward. A state is S_t = a_t S_{t-1} + k_t u_t^T with a = exp(decay), and u = v, or with beta the
 * delta rule's u_t = beta_t (v_t - k_t^T a_t S_{t-1}). It is read by o_t = scale * q_t S_t. There are `s` states in a batch
 * element; h is a multiple of s, and s of k_heads and v_heads: query head i reads state i / (h / s), state i is written by
 * key head i / (s / k_heads). The queries are the last m of the n tokens.
 * With `total`, results are means: a value has a 1 after its e numbers, a state e + 1 columns, and a result is divided by
 * what it has of these, or by 1 where that is 0. A map and `total` are not for the delta rule; with a map scale is 1. */
typedef struct attnkit_linear {
  const void* q;       /* (b, h, m, d) */
  const void* k;       /* (b, k_heads, n, d) */
  const void* v;       /* (b, v_heads, n, e) */
  const float* decay;  /* natural logarithms (b, s, n) or (b, s, n, d), at most 0, or null */
  const float* beta;   /* (b, s, n), or null without the delta rule */
  const uint8_t* keep; /* (b, n) contiguous, 0 for tokens that neither add to a state nor let it fade; or null */
  const float* state;  /* (b, s, d, e) contiguous: before the first token; null for zeros */
  void* o;             /* (b, h, m, e) contiguous */
  float* last;         /* (b, s, d, e) contiguous: after the last token; or null */
  float* states;       /* (b, s, ceil(n / 256), d, e) contiguous: before each span; null where no gradient is wanted */
  float* total;        /* (b, h, m): what results were divided by, for the backward pass, which needs o too; or null */
  int64_t* lawful;     /* (b, s) with the delta rule: tokens before the first that is no step of it */
  const void* d_o;     /* backward only: (b, h, m, e) contiguous, and below the gradients, contiguous */
  const float* d_last; /* (b, s, d, e), or null for zeros */
  void* dq;            /* (b, h, m, d) */
  void* dk;            /* (b, s, n, d): of each state's keys, also where states share them */
  void* dv;            /* (b, s, n, e) */
  float* d_decay;      /* like decay, or null */
  float* d_beta;       /* (b, s, n), or null */
  float* d_state;      /* (b, s, d, e) */
  int64_t b, h, s, k_heads, v_heads, m, n, d, e;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_h, k_n;
  int64_t v_b, v_h, v_n;
  int64_t decay_b, decay_s, decay_n;
  int64_t beta_b, beta_s, beta_n;
  int64_t threads;
  int32_t dtype;
  int32_t decay_kind;
  int32_t map;
  float scale;
} attnkit_linear;

/* Bytes of scratch memory a call needs, or minus a status code. */
ATTNKIT_EXPORT int64_t attnkit_linear_forward_scratch_bytes(const attnkit_linear* call);
ATTNKIT_EXPORT int32_t attnkit_linear_forward(const attnkit_linear* call, void* scratch, int64_t scratch_bytes);
ATTNKIT_EXPORT int64_t attnkit_linear_backward_scratch_bytes(const attnkit_linear* call);
ATTNKIT_EXPORT int32_t attnkit_linear_backward(const attnkit_linear* call, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif
