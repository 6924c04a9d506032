// What the processor can do, and how to run on several threads: asked and set once, by Python.

#include "runtime.h"

#include <atomic>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace r1ray {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> parallel{nullptr};

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512Vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

// Waits a moment; for the system's next turn where that was often in vain, so that threads which
// share a core do not wait for each other's whole turns.
class Patience {
 public:
  void wait() {
    if (++times_ > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

 private:
  static constexpr int kSpins = 4000;
  int times_ = 0;
};

// One leader and those who help it, through any number of stages.
//
// A stage is open while its number is odd. A helper counts itself in, and looks once more whether
// the stage is still the one it saw: the leader closes it before it looks whether anyone is inside,
// so that either the leader sees the helper or the helper sees the end.
class Crew {
 public:
  Crew(void (*body)(void*), void* data) : whole_{body, data} {}

  void lead() { whole_.run(); }

  void run(void (*body)(void*), void* data) {
    stage_body_ = {body, data};
    const int64_t open = ++last_;
    stage_.store(open);
    body(data);
    stage_.store(++last_);
    for (Patience patience; inside_.load() != 0;) patience.wait();
  }

  void end() { stage_.store(kEnd); }

  void help() {
    int64_t seen = 0;
    for (Patience patience;;) {
      const int64_t stage = stage_.load(std::memory_order_acquire);
      if (stage == kEnd) return;
      if (stage % 2 == 0 || stage == seen) {
        patience.wait();
        continue;
      }
      inside_.fetch_add(1);
      if (stage_.load() == stage) stage_body_.run();
      inside_.fetch_sub(1);
      seen = stage;
      patience = Patience();
    }
  }

 private:
  struct Body {
    void (*function)(void*) = nullptr;
    void* data = nullptr;
    void run() const { function(data); }
  };

  static constexpr int64_t kEnd = -2;
  const Body whole_;
  Body stage_body_;
  int64_t last_ = 0;
  alignas(64) std::atomic<int64_t> stage_{0};
  alignas(64) std::atomic<int64_t> inside_{0};
};

thread_local Crew* leading = nullptr;  // the crew that this thread leads

void join(void* data) {
  Crew& crew = *static_cast<Crew*>(data);
  if (leading != &crew) return crew.help();
  crew.lead();
  crew.end();
}

}  // namespace

void run_parallel(void (*body)(void*), void* data, int32_t num_threads) {
  const Parallel fork = parallel.load(std::memory_order_relaxed);
  if (num_threads <= 1 || !fork)
    body(data);
  else if (leading)
    leading->run(body, data);
  else
    fork(body, data, static_cast<unsigned>(num_threads), 0);
}

void with_threads(void (*body)(void*), void* data, int32_t num_threads) {
  const Parallel fork = parallel.load(std::memory_order_relaxed);
  if (num_threads <= 1 || !fork || leading) return body(data);
  Crew crew(body, data);
  leading = &crew;
  fork(join, &crew, static_cast<unsigned>(num_threads), 0);
  leading = nullptr;
}

}  // namespace r1ray

extern "C" {

// Changes whenever a function of this library does: one of another version is not used.
int32_t r1ray_abi_version() { return 9; }

// The widest instructions of this processor that there is code for: 0 none, 1 AVX2 with FMA,
// 2 AVX512-VNNI, 3 that with AVX512-BF16.
int32_t r1ray_best_isa() { return r1ray::best_isa(); }

// How to run a function on several threads at once: OpenMP's GOMP_parallel, PyTorch's own, so that
// its threads and these are the same.
void r1ray_set_parallel(void* function) {
  r1ray::parallel = reinterpret_cast<r1ray::Parallel>(function);
}

}  // extern "C"
