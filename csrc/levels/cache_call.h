// What of a call over a decoding state does not depend on how its keys are stored, as a softmax call. Included inside an
// unnamed namespace: both the checks and every level have a copy of their own.
inline attnkit_softmax softmax_call(const attnkit_cache& c) {
  attnkit_softmax s{};
  s.q = c.q, s.o = c.o, s.lse = c.lse, s.bias = c.bias, s.alibi = c.alibi, s.sink = c.sink;
  s.offsets = c.offsets, s.columns = c.columns, s.pattern = c.pattern, s.patterns = c.patterns;
  s.b = c.b, s.h = c.h, s.g = c.g, s.m = c.m, s.n = c.n, s.d = c.d, s.e = c.e;
  s.q_b = c.q_b, s.q_h = c.q_h, s.q_m = c.q_m, s.o_b = c.o_b, s.o_h = c.o_h, s.o_m = c.o_m;
  s.bias_b = c.bias_b, s.bias_h = c.bias_h, s.bias_m = c.bias_m, s.bias_n = c.bias_n;
  s.left = c.left, s.right = c.right, s.mask_batches = c.mask_batches, s.mask_heads = c.mask_heads;
  s.threads = c.threads, s.dtype = c.dtype, s.kernel = ATTNKIT_DECODE, s.scale = c.scale, s.softcap = c.softcap;
  return s;
}
