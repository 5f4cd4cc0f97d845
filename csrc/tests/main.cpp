// Runs the random calls of every family of kernels, or of those that are named:
//
//   attnkit_tests [--rounds 300] [--seed 1] [--callers 1] [family ...]
//
// With several callers, as many threads run the families at once, level after level. `make sanitize` builds and runs this
// under the sanitizers, `make neon` on an emulated ARM processor: minutes, so it says every ten seconds how far it is.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <string>
#include <thread>

#include "tests.h"

thread_local uint64_t random_state = 1;

namespace {

std::vector<Family>& families() {
  static std::vector<Family> all;  // made on first use: files of families come in any order
  return all;
}

std::vector<int32_t> tested_levels;
std::atomic<int64_t> calls{0}, bad{0};

void run(const Family& family, int64_t rounds, uint64_t seed, bool speaks) {
  using Clock = std::chrono::steady_clock;
  random_state = seed;
  for (int i = 0; i < 8; ++i) uniform();  // the first numbers of neighbouring seeds are alike
  Clock::time_point spoke = Clock::now();
  for (int64_t done = 0; done < rounds;) {
    const int64_t some = std::min<int64_t>(rounds - done, 20);
    family.run(some);
    done += some;
    if (!speaks || Clock::now() - spoke < std::chrono::seconds(10)) continue;
    spoke = Clock::now();
    std::printf("%s: %lld of %lld rounds\n", family.name, static_cast<long long>(done), static_cast<long long>(rounds));
  }
}

void run_at_once(const Family& family, int64_t rounds, uint64_t seed, int64_t callers) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < callers; ++i)
    threads.emplace_back([&, i] { run(family, rounds, seed + static_cast<uint64_t>(i), i == 0); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

Family::Family(const char* its_name, void (*its_run)(int64_t)) : name(its_name), run(its_run) {
  families().push_back(*this);
}

const std::vector<int32_t>& levels() { return tested_levels; }

void count_call() { ++calls; }

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  char line[1024];
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  std::printf("%s\n", line);
  ++bad;
}

Scratch::Scratch(int64_t bytes) : bytes_(bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(std::max<int64_t>(bytes, 1))) != 0) std::abort();
  data_ = static_cast<char*>(p);
  std::memset(data_, 0xff, static_cast<size_t>(bytes));
}
Scratch::~Scratch() { std::free(data_); }

int main(int count, char** words) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // lines are read while it runs, and before a sanitizer ends it
  int64_t rounds = 300, callers = 1;
  uint64_t seed = 1;
  std::vector<std::string> wanted;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.compare(0, 2, "--") != 0) {
      wanted.push_back(word);
      continue;
    }
    const int64_t number = i + 1 < count ? std::atoll(words[++i]) : 0;
    if (number > 0 && word == "--rounds") rounds = number;
    else if (number > 0 && word == "--callers") callers = number;
    else if (number > 0 && word == "--seed") seed = static_cast<uint64_t>(number);
    else return std::printf("got %s, expected --rounds, --callers or --seed and a positive number\n", word.c_str()), 2;
  }
  std::sort(families().begin(), families().end(),
            [](const Family& a, const Family& b) { return std::strcmp(a.name, b.name) < 0; });
  for (const std::string& name : wanted)
    if (std::none_of(families().begin(), families().end(), [&](const Family& f) { return name == f.name; }))
      return std::printf("there is no family %s\n", name.c_str()), 2;

  std::vector<int32_t> runnable;
  for (int32_t level = 0; level < attnkit_level_count(); ++level)
    if (attnkit_level_runs_here(level)) runnable.push_back(level);
  for (const Family& family : families()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), family.name) == wanted.end()) continue;
    const int64_t calls_before = calls, bad_before = bad;
    if (callers == 1) {
      tested_levels = runnable;
      run(family, rounds, seed, true);
    } else {
      for (const int32_t level : runnable) {
        attnkit_set_level(level);
        tested_levels = {level};
        run_at_once(family, rounds, seed, callers);
      }
    }
    std::printf("%s: %lld calls, %lld bad\n", family.name, static_cast<long long>(calls - calls_before),
                static_cast<long long>(bad - bad_before));
  }
  return bad != 0;
}
