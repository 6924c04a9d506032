// Which blocks each unit of queries keeps: gate scores and their best, without a table of scores.
//
// 1. A task is one unit of one group. Its queries, before rotary positions, are projected, normed and
//    rotated, as `BlockGate.queries` does; they become a panel, step by step of H.
// 2. Tiles of 4 blocks by the unit's queries: only the largest over the queries leaves the registers.
// 3. The first block, and the best of the others by score; of equal ones the earlier.
//
// A unit that keeps all earlier blocks scores none. Summaries in pages are gathered first.
//
// Price: 2·N·H² FLOP a token and 2·C·H a token and group, C the blocks earlier than its own.
//
// Names: B rows, T tokens, N query heads, K groups, H size of a head and of a summary, C blocks,
// U units, M chosen blocks.

#include <atomic>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "block_choice.h"
#include "runtime.h"
#include "simd.h"

namespace r1ray {

namespace {

struct ChoiceJob : ChoiceArguments {
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> failure{kNone};
};

struct ChoiceTask {
  int64_t row, unit, group;
  int64_t tokens;  // queries of each head
  int64_t early;   // blocks it may choose from
  int64_t count;
};

struct ChoiceScratch {
  int64_t width;   // of a query, padded to whole vectors
  float* queries;  // [unit][width]
  float* panel;    // [H][64]
  float* keys;     // [C][H] of pages
  float* scores;   // [C], and room for three more
  uint64_t* ranks;  // [C]
};

int64_t lay_out(const ChoiceArguments& job, float* memory, ChoiceScratch& scratch) {
  scratch.width = round_up(job.H, 16);
  scratch.queries = memory;
  scratch.panel = scratch.queries + job.unit * scratch.width;
  scratch.keys = scratch.panel + job.H * kBlock;
  scratch.scores = scratch.keys + (job.pages.table ? round_up(job.C * job.H, 16) : 0);
  float* const end = scratch.scores + round_up(job.C + 3, 16);
  scratch.ranks = reinterpret_cast<uint64_t*>(end);
  return end - memory + 2 * job.C;
}

}  // namespace

namespace generic {
#define TARGET TARGET_GENERIC
#include "tiles.h"
#include "block_scores.h"
#undef TARGET
}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {
#define TARGET TARGET_AVX2
#include "tiles.h"
#include "block_scores.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
#include "tiles.h"
#include "block_scores.h"
#undef TARGET
}  // namespace avx512

#endif  // __x86_64__

namespace {

constexpr int64_t kSerialProducts = 1 << 17;  // below, waking threads costs more than it saves

template <class Function>
void run_tasks(void* data, Function score) {
  ChoiceJob& job = *static_cast<ChoiceJob*>(data);
  thread_local Scratch memory;
  ChoiceScratch scratch;
  const int64_t size = lay_out(job, nullptr, scratch), tasks = job.B * job.U * job.K;
  float* const at = memory.reserve(size);
  if (!at) {
    job.failure = kNoMemory;
    return;
  }
  lay_out(job, at, scratch);
  for (int64_t i; (i = job.next.fetch_add(1)) < tasks;) {
    ChoiceTask task;
    task.group = i % job.K;
    task.unit = i / job.K % job.U;
    task.row = i / job.K / job.U;
    const int64_t own = (job.starts[task.row] + task.unit * job.unit) / kBlock;
    const int64_t left = job.T - task.unit * job.unit;
    task.tokens = left < job.unit ? left : job.unit;
    task.early = own < 1 ? 0 : own - 1;
    task.count = job.counts[task.row * job.U + task.unit];
    const bool needs_scores = task.count > 0 && task.count < task.early;
    if (task.count < 0 || task.count > task.early || task.count > job.M ||
        (needs_scores && task.early > job.C)) {
      job.failure = kBadBlock;
      return;
    }
    int64_t* out = job.out + ((task.row * job.K + task.group) * job.U + task.unit) * job.M;
    if (needs_scores) score(job, task, scratch);
    take_best(scratch.scores, task.early, task.count, scratch.ranks, out);
    for (int64_t m = task.count; m < job.M; ++m) out[m] = -1;
  }
}

void run(ChoiceJob& job) {
  const int64_t products = job.B * job.T * job.K * job.H * (job.N / job.K * job.H + job.C);
  const int32_t num_threads = products < kSerialProducts ? 1 : job.num_threads;
  auto* body = +[](void* data) { run_tasks(data, generic::score_blocks); };
#if defined(__x86_64__)
  if (job.isa == kAvx2) body = [](void* data) { run_tasks(data, avx2::score_blocks); };
  if (job.isa >= kAvx512Vnni) body = [](void* data) { run_tasks(data, avx512::score_blocks); };
#endif
  run_parallel(body, &job, num_threads);
}

}  // namespace
}  // namespace r1ray

extern "C" {

int32_t r1ray_choose_blocks(const r1ray::ChoiceArguments* arguments) {
  r1ray::ChoiceJob job;
  static_cast<r1ray::ChoiceArguments&>(job) = *arguments;
  r1ray::run(job);
  return job.failure;
}

}  // extern "C"
