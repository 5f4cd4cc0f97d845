/* Softmax attention. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_SOFTMAX_H
#define ATTNKIT_ABI_SOFTMAX_H

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of one query block of the prefill kernel, and keys of one key block: the block sizes of a mask's block list. */
#define ATTNKIT_BLOCK_QUERIES 48
#define ATTNKIT_BLOCK_KEYS 64

/* PREFILL shares packed keys between blocks of 48 queries; DECODE reads every key once for all rows of a KV head. */
#define ATTNKIT_PREFILL 0
#define ATTNKIT_DECODE 1

/* One softmax attention call. Logits are softcap(scale * q.k) + bias - alibi * |query position - key position|
 * + total[query position] - total[key position], where query i sits at position n - m + i. Key j is visible to position p when p - left <= j <= p + right and, with a block
 * list, when its block is listed with that bit set. */
typedef struct attnkit_softmax {
  const void* q;           /* (b, h, m, d) */
  const void* k;           /* (b, g, n, d) */
  const void* v;           /* (b, g, n, e) */
  void* o;                 /* (b, h, m, e) */
  float* lse;              /* (b, h, m) contiguous, or null */
  float* lse_rest;         /* (b, h, m) contiguous, or null: what float32 drops of lse, for gradients */
  const float* bias;       /* strided by bias_*, or null */
  const float* alibi;      /* (h,) slopes, or null */
  const float* sink;       /* (h,) logits, or null */
  const double* total;     /* (b, h, n) strided by total_*: running sums of log forget gates, then m <= n; or null */
  const int64_t* offsets;  /* block list: where each query block starts in columns; null without a block list */
  const int32_t* columns;  /* key block of each entry, ascending inside one query block */
  const int32_t* pattern;  /* row of patterns for each entry, or -1 for a block that is visible throughout */
  const int64_t* patterns; /* (patterns, 48): bit j of word i: row i of the query block sees key j of the key block */
  int64_t b, h, g, m, n, d, e;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_g, k_n;
  int64_t v_b, v_g, v_n;
  int64_t o_b, o_h, o_m;
  int64_t bias_b, bias_h, bias_m, bias_n;
  int64_t total_b, total_h;
  int64_t left, right;
  int64_t mask_batches, mask_heads; /* 1 or b, 1 or h */
  int64_t threads;
  int64_t seed; /* of dropout */
  int32_t dtype;
  int32_t kernel;
  int32_t drop_below; /* weights whose 24 random bits are below it are dropped, see attnkit.noise; 0 for no dropout */
  float scale;
  float softcap;    /* 0 for none */
  float keep_scale; /* what dropout multiplies the other weights by; not read without dropout */
} attnkit_softmax;

/* Bytes of scratch memory a call needs, or minus a status code. */
ATTNKIT_EXPORT int64_t attnkit_softmax_forward_scratch_bytes(const attnkit_softmax* call);
ATTNKIT_EXPORT int32_t attnkit_softmax_forward(const attnkit_softmax* call, void* scratch, int64_t scratch_bytes);

/* What the backward pass of a call reads and writes beside the call itself, whose o and lse are those of the forward pass.
 * Results are in the call's dtype, rows without gaps and batches after each other; a null one is not wanted. kernel is
 * not read. */
typedef struct attnkit_softmax_gradients {
  const void* d_o;    /* (b, h, m, e) */
  const float* d_lse; /* (b, h, m) contiguous, or null */
  void* d_q;          /* (b, h, m, d), or null */
  void* d_k;          /* (b, g, n, d), or null */
  void* d_v;          /* (b, g, n, e), or null */
  float* d_bias;      /* strided by d_bias_*, 0 where the bias is broadcast, d_bias_n at most 1; added to; or null */
  float* d_sink;      /* (h,), or null */
  float* d_alibi;     /* (h,), or null */
  double* d_total;    /* (b, h, n) contiguous, or null */
  int64_t d_o_b, d_o_h, d_o_m;
  int64_t d_bias_b, d_bias_h, d_bias_m, d_bias_n;
  int64_t d_q_h, d_k_g, d_v_g; /* from head to head */
} attnkit_softmax_gradients;

ATTNKIT_EXPORT int64_t attnkit_softmax_backward_scratch_bytes(const attnkit_softmax* call,
                                                              const attnkit_softmax_gradients* gradients);
ATTNKIT_EXPORT int32_t attnkit_softmax_backward(const attnkit_softmax* call, const attnkit_softmax_gradients* gradients,
                                                void* scratch, int64_t scratch_bytes);

/* Documents packed into a call of b = 1 without bias, gates and block list: m queries and n keys are those of all documents,
 * which see nothing of each other. Each has the bits of a call of its own, which a document of at most decode_queries
 * queries sends to DECODE unless weights are dropped, and any other to PREFILL; kernel is not read. lse and lse_rest are document by document (h, m),
 * d_sink is (count, h), d_lse and d_alibi are null. */
typedef struct attnkit_documents {
  const int64_t* q_offsets; /* (count + 1,): where each one's queries start, rising from 0 to m */
  const int64_t* k_offsets; /* (count + 1,): the same for keys, to n */
  int64_t count;
  int64_t decode_queries;
} attnkit_documents;

ATTNKIT_EXPORT int64_t attnkit_documents_forward_scratch_bytes(const attnkit_softmax* call, const attnkit_documents* documents);
ATTNKIT_EXPORT int32_t attnkit_documents_forward(const attnkit_softmax* call, const attnkit_documents* documents,
                                                 void* scratch, int64_t scratch_bytes);
ATTNKIT_EXPORT int64_t attnkit_documents_backward_scratch_bytes(const attnkit_softmax* call,
                                                                const attnkit_softmax_gradients* gradients,
                                                                const attnkit_documents* documents);
ATTNKIT_EXPORT int32_t attnkit_documents_backward(const attnkit_softmax* call, const attnkit_softmax_gradients* gradients,
                                                  const attnkit_documents* documents, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif
