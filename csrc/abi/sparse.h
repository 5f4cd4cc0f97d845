/* Block lists of masks and learned-sparse attention. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_SPARSE_H
#define ATTNKIT_ABI_SPARSE_H

#ifdef __cplusplus
extern "C" {
#endif

/* What a node of a mask says of the query at position q and the key at k; a, b and data are the node's own. */
enum {
  ATTNKIT_MASK_AND = 0,          /* both nodes a and b, which stand before this one */
  ATTNKIT_MASK_OR = 1,           /* one of them */
  ATTNKIT_MASK_NOT = 2,          /* not node a */
  ATTNKIT_MASK_INTERVAL = 3,     /* q - a <= k <= q + b */
  ATTNKIT_MASK_DILATED = 4,      /* q - k is one of 0, b, .. (a - 1) b */
  ATTNKIT_MASK_STRIDED = 5,      /* 0 <= q - k <= a, or a multiple of a */
  ATTNKIT_MASK_FIXED = 6,        /* k <= q, and either in one chunk of a, or k among the last b of its chunk */
  ATTNKIT_MASK_CHUNKED = 7,      /* in one chunk of a */
  ATTNKIT_MASK_PREFIX = 8,       /* k <= q, or k < a */
  ATTNKIT_MASK_GLOBAL = 9,       /* q or k lies in one of a runs: data is int64 (a, 2), first and last */
  ATTNKIT_MASK_DOCUMENTS = 10,   /* equal ids: data is int64 (batches, a) */
  ATTNKIT_MASK_PADDING = 11,     /* data is uint8 (batches, a), not 0 at k */
  ATTNKIT_MASK_BLOCK_SPARSE = 12 /* data is uint8 (heads, b, b), not 0 at the blocks of a positions of q and k */
};

typedef struct attnkit_mask_node {
  const void* data;
  int64_t kind, a, b;
  int64_t batches, heads; /* of the data, 1 or those of the list */
} attnkit_mask_node;

/* The non-empty blocks of the mask that the last node stands for; query i sits at position n - m + i. */
typedef struct attnkit_block_list {
  const void* nodes; /* attnkit_mask_node (count,) */
  int64_t* offsets;  /* (batches * heads * query blocks + 1,): where each query block starts in columns */
  int32_t* columns;  /* (entries,): key block of each entry, ascending inside one query block */
  int32_t* pattern;  /* (entries,): row of patterns for each entry, or -1 for a block that is visible throughout */
  int64_t* patterns; /* (room, block_q): bit j of word i: row i of the query block sees key j of the key block */
  int32_t* table;    /* (slots,) zeros, a power of two above room: where equal patterns find each other */
  int64_t* found;    /* (2,): entries and patterns, at most (block_bounds) or exactly; -1 patterns when room is short */
  int64_t count, batches, heads, m, n, block_q, block_k;
  int64_t entries, room, slots;
} attnkit_block_list;

/* How many entries and patterns the list has at most: fills found alone. */
ATTNKIT_EXPORT int64_t attnkit_block_bounds_scratch_bytes(const attnkit_block_list* call);
ATTNKIT_EXPORT int32_t attnkit_block_bounds(const attnkit_block_list* call, void* scratch, int64_t scratch_bytes);
/* The list; entries is at least what block_bounds found. */
ATTNKIT_EXPORT int64_t attnkit_block_list_fill_scratch_bytes(const attnkit_block_list* call);
ATTNKIT_EXPORT int32_t attnkit_block_list_fill(const attnkit_block_list* call, void* scratch, int64_t scratch_bytes);

/* Softmax attention of each query to its own block of keys and the chosen ones. Query i sits at position n - m + i, and
 * its own block is number position / block; causal, it sees that one up to itself. */
typedef struct attnkit_selected {
  const void* q;         /* (b, h, m, d) */
  const void* k;         /* (b, g, n, d) */
  const void* v;         /* (b, g, n, e) */
  void* o;               /* (b, h, m, e) */
  const int32_t* chosen; /* (b, lists, m, s) contiguous: numbers of other blocks; what is no block stands for none */
  float* lse;            /* (b, h, m) contiguous, or null */
  float* lse_rest;       /* the same: what float32 drops of lse, for gradients */
  int64_t b, h, g, lists, m, n, d, e, s;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_g, k_n;
  int64_t v_b, v_g, v_n;
  int64_t o_b, o_h, o_m;
  int64_t block;
  int64_t threads;
  int32_t dtype;
  int32_t causal;
  float scale; /* above 0 */
} attnkit_selected;

/* Softmax attention to compressed blocks, each of `length` tokens, one every `stride`; a query sees those that end no
 * later than itself (causal) or than the last token. Its weights choose blocks of `block` tokens for NSA's second branch:
 * the first and the neighbours of the own one, then the most important, of equals the earlier; the own one is left out. */
typedef struct attnkit_coarse {
  const void* q;   /* (b, h, m, d) */
  const void* k;   /* (b, g, c, d): compressed keys */
  const void* v;   /* (b, g, c, e) */
  float* o;        /* (b, h, m, e) contiguous */
  int32_t* chosen; /* (b, g, m, s) contiguous, -1 in places left over */
  int64_t b, h, g, m, n, c, d, e, s;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_g, k_n;
  int64_t v_b, v_g, v_n;
  int64_t length, stride, block;
  int64_t threads;
  int32_t dtype;
  int32_t causal;
  float scale; /* above 0 */
} attnkit_coarse;

/* MoBA's choice: for each query the complete blocks before its own whose mean keys have the largest products with it, of
 * equals the earlier. Query i sits at position n - m + i. */
typedef struct attnkit_gates {
  const void* q;      /* (b, h, m, d) */
  const float* means; /* (b, g, c, d) contiguous: mean key of each complete block */
  int32_t* chosen;    /* (b, h, m, s) contiguous: blocks in ascending order, -1 in places left over */
  int64_t b, h, g, m, n, c, d, s;
  int64_t q_b, q_h, q_m;
  int64_t block; /* keys of a block */
  int64_t threads;
  int32_t dtype; /* of q */
} attnkit_gates;

ATTNKIT_EXPORT int64_t attnkit_gates_forward_scratch_bytes(const attnkit_gates* call);
ATTNKIT_EXPORT int32_t attnkit_gates_forward(const attnkit_gates* call, void* scratch, int64_t scratch_bytes);

/* DSA's choice: for each query the `top` keys up to its own position of the largest sum_j w_j relu(q_j . k), of equals
 * those of the lower index. Query i sits at position n - m + i, index head j reads index key j / (h / g). */
typedef struct attnkit_indexer {
  const void* q;   /* (b, h, m, d): index queries */
  const void* k;   /* (b, g, n, d): index keys */
  const float* w;  /* (b, h, m), strided by w_* */
  int32_t* chosen; /* (b, m, top) contiguous: keys in ascending order, -1 in places left over */
  int64_t b, h, g, m, n, d, top;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_g, k_n;
  int64_t w_b, w_h, w_m;
  int64_t threads;
  int32_t dtype;
} attnkit_indexer;

ATTNKIT_EXPORT int64_t attnkit_indexer_forward_scratch_bytes(const attnkit_indexer* call);
ATTNKIT_EXPORT int32_t attnkit_indexer_forward(const attnkit_indexer* call, void* scratch, int64_t scratch_bytes);

/* Softmax attention of each query to the best of the keys that it may see: of equal scores, those of the lower index. Of
 * the call beside it, o is written, and lse, bias, alibi, sink, softcap and kernel are not read. */
typedef struct attnkit_topk {
  const int32_t* kept; /* (n + 1,): how many keys a query keeps of so many that it sees, 0 to most */
  int64_t most;
} attnkit_topk;

ATTNKIT_EXPORT int64_t attnkit_topk_forward_scratch_bytes(const attnkit_softmax* call, const attnkit_topk* kept);
ATTNKIT_EXPORT int32_t attnkit_topk_forward(const attnkit_softmax* call, const attnkit_topk* kept, void* scratch,
                                            int64_t scratch_bytes);

ATTNKIT_EXPORT int64_t attnkit_coarse_forward_scratch_bytes(const attnkit_coarse* call);
ATTNKIT_EXPORT int32_t attnkit_coarse_forward(const attnkit_coarse* call, void* scratch, int64_t scratch_bytes);

ATTNKIT_EXPORT int64_t attnkit_selected_forward_scratch_bytes(const attnkit_selected* call);
ATTNKIT_EXPORT int32_t attnkit_selected_forward(const attnkit_selected* call, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif
