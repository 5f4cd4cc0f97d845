// Packed documents that do not see each other: every one is a call of its own, on its rows of the packed arrays.
//
// A document has therefore the bits that it has alone. One that is more than a thread's share of the work is done by all
// threads together; the others, usually many and short, by one thread each, whoever is free taking the next.

// What all documents share, and how to run one: Kernel::bytes(call, i) of scratch memory and Kernel::run(call, i, scratch).
template <class Kernel>
class Documents {
 public:
  Documents(const attnkit_softmax& call, const attnkit_documents& documents, const Kernel& kernel)
      : s_(call), d_(documents), kernel_(kernel) {
    for (int64_t i = 0; i < d_.count; ++i) work_ += work(i);
    threads_ = work_ < kWorthAThread ? 1 : clamp<int64_t>(d_.count, 1, available_threads(s_.threads));
    for (int64_t i = 0; i < d_.count; ++i) {
      int64_t& bytes = shared(i) ? shared_bytes_ : own_bytes_;
      bytes = most(bytes, round_up(kernel_.bytes(document(i), i), 64));
    }
  }

  // Documents that threads share come first, in the same memory.
  int64_t scratch_bytes() const { return most(shared_bytes_, threads_ * own_bytes_); }

  void run(char* scratch) const {
    for (int64_t i = 0; i < d_.count; ++i)
      if (shared(i)) kernel_.run(document(i), i, scratch);
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
      char* const own = scratch + thread_number() * own_bytes_;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < d_.count; ++i)
        if (!shared(i)) kernel_.run(document(i), i, own);
    }
  }

 private:
  double work(int64_t i) const {
    return static_cast<double>(s_.h) * static_cast<double>(d_.q_offsets[i + 1] - d_.q_offsets[i]) *
           static_cast<double>(d_.k_offsets[i + 1] - d_.k_offsets[i]) * static_cast<double>(s_.d + s_.e);
  }
  bool shared(int64_t i) const { return work(i) * static_cast<double>(s_.threads) > work_; }

  attnkit_softmax document(int64_t i) const {
    const int64_t bytes = s_.dtype == ATTNKIT_FLOAT32 ? 4 : 2, q = d_.q_offsets[i], k = d_.k_offsets[i];
    attnkit_softmax s = s_;
    s.m = d_.q_offsets[i + 1] - q;
    s.n = d_.k_offsets[i + 1] - k;
    if (s.m > 0) {
      s.q = static_cast<const char*>(s.q) + bytes * q * s.q_m;
      s.o = static_cast<char*>(s.o) + bytes * q * s.o_m;
      if (s.lse) s.lse += q * s.h;
      if (s.lse_rest) s.lse_rest += q * s.h;
    }
    if (s.n > 0) {
      s.k = static_cast<const char*>(s.k) + bytes * k * s.k_n;
      s.v = static_cast<const char*>(s.v) + bytes * k * s.v_n;
    }
    s.kernel = s.m <= d_.decode_queries && !s.drop_below ? ATTNKIT_DECODE : ATTNKIT_PREFILL;
    if (!shared(i)) s.threads = 1;
    return s;
  }

  const attnkit_softmax& s_;
  const attnkit_documents& d_;
  const Kernel kernel_;
  double work_ = 0.0;
  int64_t threads_ = 1, shared_bytes_ = 0, own_bytes_ = 0;
};
