// What the processor can do, and how to run on several threads: asked and set once, by Python.

#include "runtime.h"

#include <atomic>

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

}  // namespace

void run_parallel(void (*body)(void*), void* data, int32_t num_threads) {
  const Parallel fork = parallel.load();
  if (num_threads > 1 && fork)
    fork(body, data, static_cast<unsigned>(num_threads), 0);
  else
    body(data);
}

}  // namespace r1ray

extern "C" {

// Changes whenever a function of this library does: one of another version is not used.
int32_t r1ray_abi_version() { return 3; }

// The widest instructions of this processor that there is code for: 0 none, 1 AVX2 with FMA,
// 2 AVX512-VNNI, 3 that with AVX512-BF16.
int32_t r1ray_best_isa() { return r1ray::best_isa(); }

// How to run a function on several threads at once: OpenMP's GOMP_parallel, PyTorch's own, so that
// its threads and these are the same.
void r1ray_set_parallel(void* function) {
  r1ray::parallel = reinterpret_cast<r1ray::Parallel>(function);
}

}  // extern "C"
