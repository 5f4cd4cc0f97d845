// Packed documents, forward and backward, bit for bit against calls of their own.
#include "softmax_call.h"

namespace {

const int64_t lengths[] = {0, 0, 1, 2, 7, 9, 33, 48, 49, 65, 130, 200}, sizes[] = {1, 3, 8, 17, 64, 100}, heads[] = {1, 2, 3};

struct Packing {
  std::vector<int64_t> q, k;
  bool same;  // as many queries as keys
  Packing() : q{0}, k{0}, same(below(2)) {
    for (int64_t i = 1 + below(6); i > 0; --i) {
      const int64_t keys = pick(lengths);
      k.push_back(k.back() + keys);
      q.push_back(q.back() + (same ? keys : pick(lengths)));
    }
  }
  int64_t count() const { return static_cast<int64_t>(q.size()) - 1; }
};

struct Case : SoftmaxCall {
  attnkit_documents documents{};
  attnkit_softmax_gradients g{};
  const Packing& at;
  Layout d_o_at;
  Numbers d_o, d_q, d_k, d_v;
  std::vector<float> rest, d_sink;

  Case(const Packing& packing, int64_t h, int64_t kv, int64_t d, int64_t e, int32_t dtype)
      : SoftmaxCall(1, h, kv, packing.q.back(), packing.k.back(), d, e, dtype), at(packing), d_o_at(1, h, s.m, e, true),
        d_o(d_o_at.count, dtype), d_q(h * s.m * d, dtype), d_k(kv * s.n * d, dtype), d_v(kv * s.n * e, dtype),
        rest(lse.size()) {
    add_softcap_alibi_and_sink();
    if (below(2)) s.left = below(2) ? below(100) : s.left, s.right = below(3);
    s.lse_rest = rest.data();
    documents = {at.q.data(), at.k.data(), at.count(), below(2) ? 8 : -1};
    g.d_o = d_o.data(), g.d_o_b = d_o_at.b, g.d_o_h = d_o_at.h, g.d_o_m = d_o_at.m;
    g.d_q = d_q.data(), g.d_k = d_k.data(), g.d_v = d_v.data();
    g.d_q_h = s.m * d, g.d_k_g = s.n * d, g.d_v_g = s.n * e;
    if (s.sink) d_sink.resize(at.count() * h), g.d_sink = d_sink.data();
  }

  // Poisons what is written and runs all documents at once or, with calls of their own, one by one.
  int32_t run(bool apart) {
    o.poison(), d_q.poison(), d_k.poison(), d_v.poison();
    for (std::vector<float>* x : {&lse, &rest, &d_sink})
      for (float& number : *x) number = NAN;
    int32_t status = ATTNKIT_OK;
    for (int64_t i = 0; apart && i < at.count() && status == ATTNKIT_OK; ++i) {
      const attnkit_softmax own = document(i);
      Scratch scratch(attnkit_softmax_forward_scratch_bytes(&own));
      status = attnkit_softmax_forward(&own, scratch.data(), scratch.bytes());
    }
    if (!apart) {
      const int64_t bytes = attnkit_documents_forward_scratch_bytes(&s, &documents);
      Scratch scratch(bytes < 0 ? 0 : bytes);
      status = attnkit_documents_forward(&s, &documents, scratch.data(), scratch.bytes());
    }
    if (status != ATTNKIT_OK) return status;
    for (int64_t i = 0; apart && i < at.count() && status == ATTNKIT_OK; ++i) {
      const attnkit_softmax own = document(i);
      const attnkit_softmax_gradients slopes = gradients(i);
      Scratch scratch(attnkit_softmax_backward_scratch_bytes(&own, &slopes));
      status = attnkit_softmax_backward(&own, &slopes, scratch.data(), scratch.bytes());
    }
    if (apart) return status;
    const int64_t bytes = attnkit_documents_backward_scratch_bytes(&s, &g, &documents);
    Scratch scratch(bytes < 0 ? 0 : bytes);
    return attnkit_documents_backward(&s, &g, &documents, scratch.data(), scratch.bytes());
  }

  attnkit_softmax document(int64_t i) {
    attnkit_softmax own = s;
    own.m = at.q[i + 1] - at.q[i], own.n = at.k[i + 1] - at.k[i];
    own.q = number(q, at.q[i] * s.q_m), own.o = const_cast<void*>(number(o, at.q[i] * s.o_m));
    own.k = number(k, at.k[i] * s.k_n), own.v = number(v, at.k[i] * s.v_n);
    own.lse += at.q[i] * s.h, own.lse_rest += at.q[i] * s.h;
    own.kernel = own.m <= documents.decode_queries ? ATTNKIT_DECODE : ATTNKIT_PREFILL;
    own.threads = 1 + below(3);
    // A bound that no pair of the document reaches may be left out.
    if (own.left >= own.n - 1) own.left = int64_t{1} << 62;
    if (own.right >= own.m - 1) own.right = int64_t{1} << 62;
    return own;
  }
  attnkit_softmax_gradients gradients(int64_t i) {
    attnkit_softmax_gradients own = g;
    own.d_o = number(d_o, at.q[i] * g.d_o_m);
    own.d_q = const_cast<void*>(number(d_q, at.q[i] * s.d));
    own.d_k = const_cast<void*>(number(d_k, at.k[i] * s.d)), own.d_v = const_cast<void*>(number(d_v, at.k[i] * s.e));
    if (g.d_sink) own.d_sink += i * s.h;
    return own;
  }
  // Of an array without numbers any address does.
  const void* number(const Numbers& x, int64_t i) const {
    const bool past = i >= static_cast<int64_t>(x.values.size());
    return past ? x.data() : static_cast<const char*>(x.data()) + i * (s.dtype == ATTNKIT_FLOAT32 ? 4 : 2);
  }

  std::vector<uint32_t> bits() const {
    std::vector<uint32_t> found;
    for (const Numbers* x : {&o, &d_q, &d_k, &d_v}) {
      for (const float number : x->as_float) found.push_back(bits_of(number));
      found.insert(found.end(), x->as_half.begin(), x->as_half.end());
    }
    for (const std::vector<float>* x : {&lse, &rest, &d_sink})
      for (const float number : *x) found.push_back(bits_of(number));
    return found;
  }
  static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }
};

Case random_case(const Packing& packing) {
  const int64_t kv = 1 + below(2);
  return Case(packing, kv * pick(heads), kv, pick(sizes), pick(sizes), static_cast<int32_t>(below(3)));
}

void test_answer() {
  const Packing packing;
  Case c = random_case(packing);
  for (const int32_t level : levels()) {
    attnkit_set_level(level);
    const int32_t apart = c.run(true);
    const std::vector<uint32_t> wanted = c.bits();
    const int32_t together = c.run(false);
    count_call();
    if (apart != ATTNKIT_OK || together != ATTNKIT_OK || c.bits() != wanted)
      fail("documents level %s dtype %d count %d h %d g %d m %d n %d d %d e %d threads %d: status %d, apart %d",
           attnkit_level_name(level), c.s.dtype, int(packing.count()), int(c.s.h), int(c.s.g), int(c.s.m), int(c.s.n),
           int(c.s.d), int(c.s.e), int(c.s.threads), together, apart);
  }
}

// Offsets that leave the arrays or go back, and features that documents do not have.
void test_refusal() {
  const Packing packing;
  Case c = random_case(packing);
  std::vector<int64_t> q = packing.q, k = packing.k;
  c.documents.q_offsets = q.data(), c.documents.k_offsets = k.data();
  const int64_t at = below(packing.count() + 1), what = below(6);
  std::vector<int64_t>& wrong = below(2) ? q : k;
  double total = 0.0;
  float bias = 0.0f;
  int32_t expected = ATTNKIT_BAD_SIZE;
  if (what == 0) wrong[at] = below(2) ? -1 : wrong.back() + 1 + below(1000);
  if (what == 1) c.documents.count = -below(2);
  if (what == 2) c.s.b = 2, c.s.q_b = c.s.k_b = c.s.v_b = c.s.o_b = c.g.d_o_b = 0;
  if (what == 3) c.s.bias = &bias;
  if (what == 4) c.s.total = &total;
  if (what == 5) c.documents.decode_queries = 49, expected = ATTNKIT_BAD_KERNEL;
  const int64_t forward = attnkit_documents_forward_scratch_bytes(&c.s, &c.documents);
  const int64_t backward = attnkit_documents_backward_scratch_bytes(&c.s, &c.g, &c.documents);
  count_call();
  if (forward != -expected || backward != -expected)
    fail("documents refusal %d: %d and %d, expected %d", int(what), int(-forward), int(-backward), expected);
}

void run_documents(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    test_answer();
    test_refusal();
  }
}

const Family family("documents", run_documents);

}  // namespace
