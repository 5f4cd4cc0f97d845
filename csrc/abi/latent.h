/* Latent attention in its absorbed form. Included by ../abi.h. */
#ifndef ATTNKIT_ABI_LATENT_H
#define ATTNKIT_ABI_LATENT_H

#ifdef __cplusplus
extern "C" {
#endif

/* One call of latent attention: head i of its group attends to the latents themselves with the query [U_i^T q ; q's
 * rotary part], and V_i maps the weighted sum of latents to its values. Query j sits at position n - m + j; key k is visible
 * to position p when p - left <= k <= p + right. With places, every query of a sequence sees the latents that its list names,
 * and no others; left and right are then not read. */
typedef struct attnkit_latent {
  const void* q;      /* (b, h, m, nope + r) */
  const void* latent; /* (b, g, n, c + r): a token's latent, behind it the rotary key that all heads share */
  const void* kv_b;   /* (h, nope + e, c): U_i, below it V_i */
  void* o;            /* (b, h, m, e) */
  const int32_t* places; /* (b, n) contiguous: where each of a sequence's n keys lies among its stored latents, -1 from the
                          * end of a shorter list on; or null: one after the other */
  int64_t b, h, g, m, n, nope, r, c, e;
  int64_t stored; /* latents of a sequence; read with places only */
  int64_t q_b, q_h, q_m;
  int64_t latent_b, latent_g, latent_n;
  int64_t kv_b_h, kv_b_row;
  int64_t o_b, o_h, o_m;
  int64_t left, right;
  int64_t threads;
  int32_t dtype;
  float scale;
} attnkit_latent;

/* Bytes of scratch memory a call needs, or minus a status code. */
ATTNKIT_EXPORT int64_t attnkit_latent_forward_scratch_bytes(const attnkit_latent* call);
ATTNKIT_EXPORT int32_t attnkit_latent_forward(const attnkit_latent* call, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif
