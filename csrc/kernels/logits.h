// From the products q.k of one row to its logits, where the call has more than a scale; and the end of a row.
//
// A call without bias, ALiBi, forget gates and soft-cap is `plain`: its products stay as they are, and the scale is part of the factor
// that makes exponents of two of them, exp(scale * x) = 2^(x * scale * log2 e). All others get their logits in place, in
// the order of the definition: scale, soft-cap, bias, ALiBi, gates; their factor is log2 e. A bias is read where it lies: a
// vector at a time when its keys are neighbours, one number at a time otherwise, and never past key n.
//
// A row is accumulated against a reference, its `top`: weights are 2^(x - top), and what was added before is multiplied by
// 2^(old - new) when the top moves. It moves late (kLateRescale).

// Rescaling a row's sums waits until its largest exponent has grown by this much; weights then stay below 2^8, and most
// rows are rescaled once.
constexpr float kLateRescale = 8.0f;
constexpr double kExactLog2E = 1.44269504088896341, kExactLn2 = 0.693147180559945309;

struct Logits {
  const attnkit_softmax& s;
  bool plain;        // logits are products times a positive factor: nothing to do before the exponential
  float exponent;    // from what is stored to exponents of two

  explicit Logits(const attnkit_softmax& call)
      : s(call),
        plain(!call.bias && !call.alibi && !call.total && !(call.softcap > 0) && call.scale > 0),
        exponent(plain ? call.scale * kLog2E : kLog2E) {}

  // Products of query i with keys [key, key + vectors * kWidth) become logits in place.
  ATTNKIT_NOINLINE void apply(float* row, int vectors, int64_t batch, int64_t head, int64_t i, int64_t key) const {
    for (int j = 0; j < vectors; ++j) store(row + j * kWidth, load(row + j * kWidth) * splat(s.scale));
    if (s.softcap > 0) {
      const Vec cap = splat(s.softcap);
      for (int j = 0; j < vectors; ++j)
        store(row + j * kWidth, cap * tanh(load(row + j * kWidth) / cap));
    }
    if (s.bias) add_bias(row, vectors, s.bias + batch * s.bias_b + head * s.bias_h + i * s.bias_m, key);
    if (s.alibi) {
      const Vec slope = splat(-s.alibi[head]);
      Vec distance = iota() + splat(static_cast<float>(key - (s.n - s.m + i)));
      for (int j = 0; j < vectors; ++j) {
        store(row + j * kWidth, fma(slope, abs(distance), load(row + j * kWidth)));
        distance = distance + splat(static_cast<float>(kWidth));
      }
    }
    if (s.total) add_gates(row, vectors, s.total + batch * s.total_b + head * s.total_h, s.n - s.m + i, key);
  }

 private:
  void add_bias(float* row, int vectors, const float* bias, int64_t key) const {
    const int64_t count = least<int64_t>(vectors * kWidth, s.n - key);
    if (s.bias_n == 1) {
      bias += key;
      int64_t j = 0;
      for (; j + kWidth <= count; j += kWidth) store(row + j, load(row + j) + load(bias + j));
      if (j < count) store(row + j, load(row + j) + load_first(bias + j, static_cast<int>(count - j)));
    } else {
      for (int64_t j = 0; j < count; ++j) row[j] += bias[(key + j) * s.bias_n];
    }
  }

  // What the gates between a key and a query at `position` leave. Sums over a long sequence are thousands and only their
  // differences count: float32 would round them to a thousandth before they are taken.
  void add_gates(float* row, int vectors, const double* total, int64_t position, int64_t key) const {
    const double own = total[position];
    const int64_t count = least<int64_t>(vectors * kWidth, s.n - key);
    for (int64_t j = 0; j < count; ++j) row[j] += static_cast<float>(own - total[key + j]);
  }
};

// The end of a row. `top` is the exponent of two its weights were taken against (-inf before any key was visible), `total`
// their sum. The sink joins as one more logit without a value. A row that saw nothing gives zeros and -inf.
struct RowEnd {
  float top, total;
  float factor = 1.0f;  // on the row's sum over values

  ATTNKIT_INLINE RowEnd(float row_top, float row_total, const float* sink) : top(row_top), total(row_total) {
    if (sink && *sink != -kInfinity) {
      const float logit = *sink * kLog2E;
      const float reference = logit > top ? logit : top;
      factor = __builtin_exp2f(top - reference);
      total = total * factor + __builtin_exp2f(logit - reference);
      top = reference;
    }
    factor = total == 0.0f ? 0.0f : factor / total;
  }
  // The log-sum-exp of `row` where it is wanted, in one number or two.
  ATTNKIT_INLINE void keep(const attnkit_softmax& s, int64_t row) const {
    if (!s.lse) return;
    const bool seen = total != 0.0f;
    const double exact = static_cast<double>(top) * kExactLn2 + __builtin_log(static_cast<double>(total));
    s.lse[row] = seen ? static_cast<float>(exact) : -kInfinity;
    if (s.lse_rest) s.lse_rest[row] = seen ? static_cast<float>(exact - static_cast<double>(s.lse[row])) : 0.0f;
  }
};
