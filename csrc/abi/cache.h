/* Softmax attention of the newest tokens over a decoding state. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_CACHE_H
#define ATTNKIT_ABI_CACHE_H

#ifdef __cplusplus
extern "C" {
#endif

/* How keys and values are stored: in the dtype of the call; bytes, or e4m3 bytes, with a scale for each token and KV head;
 * half bytes, keys by channel in groups of tokens and values by token in groups of channels. attnkit.state.codec describes
 * each layout. */
#define ATTNKIT_PLAIN 0
#define ATTNKIT_INT8 1
#define ATTNKIT_FP8 2
#define ATTNKIT_INT4 3

/* One call. What softmax attention means is said in softmax.h: logits, interval, block list. Each sequence has its own
 * number of keys, and its m queries are the last of them. */
typedef struct attnkit_cache {
  const void* q;           /* (b, h, m, d) */
  const void* k;           /* rows of d numbers or codes: (b, g, n) of them, or on pages (pages, g, page) */
  const void* v;           /* the same of e */
  void* o;                 /* (b, h, m, e) */
  float* lse;              /* (b, h, m) contiguous, or null */
  const float* bias;       /* strided by bias_*, or null */
  const float* alibi;      /* (h,) slopes, or null */
  const float* sink;       /* (h,) logits, or null */
  const int64_t* offsets;  /* block list, for sequences of one length; null without */
  const int32_t* columns;
  const int32_t* pattern;
  const int64_t* patterns;
  const int64_t* lengths;  /* (b,) keys of each sequence, at most n; null when all have n */
  const int32_t* pages;    /* (b, pages_b) number of each page of a sequence; null without pages */
  const void* k_scale;     /* INT8, FP8: float32 (b, g, n). INT4: bfloat16 (b, g, n / group, d). On pages as k */
  const void* k_zero;      /* INT4: the value of code 0, as k_scale */
  const void* v_scale;     /* INT8, FP8: float32 (b, g, n). INT4: bfloat16 (b, g, n, e / channels rounded up) */
  const void* v_zero;
  const void* recent;      /* INT4: (b, g, 2 * group, d) in the dtype of the call: keys whose group is not full yet */
  int64_t b, h, g, m, n, d, e;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_g, k_n; /* with pages, k_b, v_b and their scales' are strides from page to page */
  int64_t v_b, v_g, v_n;
  int64_t o_b, o_h, o_m;
  int64_t bias_b, bias_h, bias_m, bias_n;
  int64_t k_scale_b, k_scale_g, v_scale_b, v_scale_g, recent_b, recent_g; /* zeros stride as their scales */
  int64_t left, right;
  int64_t mask_batches, mask_heads; /* 1 or b, 1 or h */
  int64_t page, page_count, pages_b; /* tokens of a page (codes: a multiple of 32 and of group), pages there are, room for */
  int64_t group, channels;           /* INT4: tokens of a group, channels of a group: multiples of 32 */
  int64_t threads;
  int32_t dtype; /* of q, o and what is stored plainly */
  int32_t form;
  float scale;
  float softcap; /* 0 for none */
} attnkit_cache;

ATTNKIT_EXPORT int64_t attnkit_cache_forward_scratch_bytes(const attnkit_cache* call);
ATTNKIT_EXPORT int32_t attnkit_cache_forward(const attnkit_cache* call, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif
