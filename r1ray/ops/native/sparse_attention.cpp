// softmax(q·kᵀ/√H)·v over the blocks of keys that each unit of queries keeps, of float32 queries.
//
// 1. A task is one unit of one group: its own block up to each query, the block before, and what was
//    chosen. Tasks are handed out to the threads one by one.
// 2. Units of a block of queries go by tiles (attention_blocks.h): in bfloat16 products with float32
//    sums where keys and values are int8 and the processor has such, else in float32.
// 3. Units of one query are read once, in float32 (attention_token.h). Their blocks are split, for the
//    threads to share, and the parts merged by their highest scores.
//
// Keys and values are read where they lie in the cache; no copy of more than a block is made.
//
// Price: 4·64·(M + 2)·N·H FLOP a token, M blocks chosen. bfloat16 rounds queries and shares: an error
// of about 2^-9 of each.
//
// Names: B rows, T new tokens, S cached tokens, N query heads, K groups, H head dimension, U units.

#include <cmath>
#include <cstring>

#include "attention.h"
#include "runtime.h"
#include "simd.h"

namespace r1ray {

namespace generic {
#define TARGET TARGET_GENERIC
#include "tiles.h"
#include "attention_blocks.h"
#include "attention_token.h"
#undef TARGET
}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {
#define TARGET TARGET_AVX2
#include "tiles.h"
#include "attention_blocks.h"
#include "attention_token.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
#include "tiles.h"
#include "attention_blocks.h"
#include "attention_token.h"
#undef TARGET
}  // namespace avx512

namespace avx512_bf16 {
#define TARGET TARGET_AVX512_BF16
#define R1RAY_BF16 1
#include "tiles.h"
#include "attention_blocks.h"
#undef R1RAY_BF16
#undef TARGET
}  // namespace avx512_bf16

#endif  // __x86_64__

namespace {

// Of single queries, so that few of them keep all threads busy. It depends on how many blocks a query
// keeps and on nothing else: its sums are the same in any company and on any number of threads.
constexpr int64_t kPartBlocks = 6, kMostParts = 8;
constexpr int64_t kSerialProducts = 1 << 18;  // below, waking threads costs more than it saves

int64_t count_parts(int64_t chosen, int64_t unit) {
  if (unit != 1) return 1;
  const int64_t parts = (chosen + 2) / kPartBlocks;
  return parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
}

// Blocks before the first -1, or -1 where one is out of range.
int64_t count_blocks(const AttentionArguments& job, const int64_t* chosen, int64_t own) {
  int64_t count = 0;
  for (; count < job.M && chosen[count] != -1; ++count)
    if (chosen[count] < 0 || chosen[count] > own - 2) return -1;
  return count;
}

template <class Layout, class Function>
void run_tasks(void* data, Function attend) {
  AttentionJob& job = *static_cast<AttentionJob*>(data);
  thread_local Scratch memory;
  Layout scratch;
  const int64_t size = lay_out(job, nullptr, scratch);
  const int64_t tasks = job.B * job.U * job.K * job.parts;
  for (int64_t i; (i = job.next.fetch_add(1)) < tasks;) {
    AttentionTask task;
    task.part = i % job.parts;
    task.group = i / job.parts % job.K;
    task.unit = i / job.parts / job.K % job.U;
    task.row = i / job.parts / job.K / job.U;
    task.first = job.starts[task.row] + task.unit * job.unit;
    task.own = task.first / kBlock;
    const int64_t left = job.T - task.unit * job.unit;
    task.tokens = left < job.unit ? left : job.unit;
    task.chosen = job.chosen + ((task.row * job.K + task.group) * job.U + task.unit) * job.M;
    task.count = count_blocks(job, task.chosen, task.own);
    task.parts = count_parts(task.count, job.unit);
    float* const at = task.count < 0 ? nullptr : memory.reserve(size);
    if (!at) {
      job.failure = task.count < 0 ? kBadBlock : kNoMemory;
      return;
    }
    attend(job, task, at);
  }
}

#define R1RAY_RUN(isa)                                                                     \
  {                                                                                        \
    const auto blocks = [](void* data) {                                                   \
      run_tasks<isa::BlockScratch>(data, static_cast<AttentionJob*>(data)->key_scale       \
                                             ? isa::attend_unit<int8_t>                    \
                                             : isa::attend_unit<float>);                   \
    };                                                                                     \
    const auto tokens = [](void* data) {                                                   \
      run_tasks<isa::TokenScratch>(data, static_cast<AttentionJob*>(data)->key_scale       \
                                             ? isa::attend_token<int8_t>                   \
                                             : isa::attend_token<float>);                  \
    };                                                                                     \
    if (job.unit == 1)                                                                     \
      run_parallel(tokens, &job, num_threads);                                             \
    else                                                                                   \
      run_parallel(blocks, &job, num_threads);                                             \
  }

void run(AttentionJob& job, int32_t num_threads) {
#if defined(__x86_64__)
  if (job.isa == kAvx512Bf16 && job.unit == kBlock && job.key_scale) {
    const auto blocks = [](void* data) {
      run_tasks<avx512_bf16::BlockScratch>(data, avx512_bf16::attend_unit<int8_t>);
    };
    return run_parallel(blocks, &job, num_threads);
  }
  if (job.isa >= kAvx512Vnni) R1RAY_RUN(avx512)
  else if (job.isa == kAvx2) R1RAY_RUN(avx2)
  else
#endif
    R1RAY_RUN(generic)
}

void merge(const AttentionJob& job) {
  const int64_t stride = job.N * (job.H + 2);
  for (int64_t i = 0; i < job.B * job.T * job.N; ++i) {
    const float* part = job.partial + i / job.N * job.parts * stride + i % job.N * (job.H + 2);
    float peak = part[job.H + 1], total = 0.0f;
    for (int64_t p = 1; p < job.parts; ++p)
      peak = std::fmax(peak, part[p * stride + job.H + 1]);
    float* out = job.out + i * job.H;
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(job.H));
    for (int64_t p = 0; p < job.parts; ++p, part += stride) {
      const float weight = std::exp2(part[job.H + 1] - peak);
      total += weight * part[job.H];
      for (int64_t h = 0; h < job.H; ++h) out[h] += weight * part[h];
    }
    total = 1.0f / total;
    for (int64_t h = 0; h < job.H; ++h) out[h] *= total;
  }
}

}  // namespace
}  // namespace r1ray

extern "C" {

int32_t r1ray_sparse_attention(const r1ray::AttentionArguments* arguments) {
  r1ray::AttentionJob job;
  static_cast<r1ray::AttentionArguments&>(job) = *arguments;
  job.q_scale = 1.44269504f / std::sqrt(static_cast<float>(job.H));
  const int64_t products = job.B * job.T * job.N * job.H * (job.M + 2) * r1ray::kBlock;
  const int32_t num_threads = products < r1ray::kSerialProducts ? 1 : job.num_threads;
  job.parts = r1ray::count_parts(job.M, job.unit);
  if (job.parts > 1) {
    thread_local r1ray::Scratch partial;
    job.partial = partial.reserve(job.B * job.T * job.parts * job.N * (job.H + 2));
    if (!job.partial) return r1ray::kNoMemory;
  }
  r1ray::run(job, num_threads);
  if (job.parts > 1 && job.failure == r1ray::kNone) r1ray::merge(job);
  return job.failure;
}

}  // extern "C"
