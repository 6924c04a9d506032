// Which blocks the units of marked heads keep: those where a query finds its best keys.
//
// 1. A task is one unit of one group. Queries of its marked heads score the keys of every block up to
//    their own, of which the largest is kept: units of a block by panels (exact_scores.h), in int8
//    where keys are int8 and the processor has such products; single queries in float32, the blocks
//    split for the threads to share (token_peaks.h).
// 2. A softmax over the largest score in each block gives every query's shares of the blocks; a
//    block counts as the largest of them.
// 3. The first block and the best of the others (block_choice.h), instead of what was there; besides
//    what was there where units are single queries.
//
// A unit that keeps all earlier blocks scores none.
//
// Price: 2·64·C·H operations a token and marked head, C the earlier blocks: the products of queries
// and keys of dense attention alone. Room for C·G·64 floats a thread; for C·G·K·B of single queries.
//
// Names: B rows, T tokens, N query heads, K groups, G = N/K, H head dimension, C blocks, U units,
// M chosen blocks.

#include "exact_choice.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

#include "attention.h"
#include "block_choice.h"
#include "runtime.h"
#include "simd.h"

namespace r1ray {

namespace {

struct ExactJob : ExactArguments {
  float q_scale;   // log2(e) / sqrt(H): scores are powers of two
  int64_t blocks;  // up to the last that any unit is in
  float* peaks;    // of single queries: [B, K, U, G, peak_row], of which G is the marked heads
  int64_t peak_row;
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> failure{kNone};
};

struct ExactTask {
  int64_t row, unit, group;
  int64_t heads;   // of the group that are marked
  int64_t first;   // position of its first query
  int64_t early;   // blocks it may choose from
  int64_t count;
  bool needs_scores;
  int64_t* chosen;  // of `out`
};

struct ExactScratch {
  float *panels, *keys;          // Words: [G][H / kPair][64], [64][H / kPair]
  float *query_scale, *offsets;  // [G][64]
  float *most, *peaks;           // [G][64], [C][G][64]
  float* scores;                 // [C]
  uint64_t* ranks;               // [C]
};

int64_t lay_out(const ExactJob& job, float* memory, ExactScratch& scratch) {
  const int64_t queries = job.unit == kBlock ? job.N / job.K * kBlock : 0;
  float* at = memory;
  const auto take = [&at](int64_t count) {
    float* const taken = at;
    at += round_up(count, 16);
    return taken;
  };
  scratch.panels = take(queries * job.H);
  scratch.keys = take(job.unit == kBlock ? kBlock * job.H : 0);
  scratch.query_scale = take(queries);
  scratch.offsets = take(queries);
  scratch.most = take(queries);
  scratch.peaks = take(job.blocks * queries);
  scratch.scores = take(job.blocks);
  scratch.ranks = reinterpret_cast<uint64_t*>(take(2 * job.blocks));
  return at - memory;
}

}  // namespace

namespace generic {
#define TARGET TARGET_GENERIC
#include "tiles.h"
#include "exact_scores.h"
#include "token_peaks.h"
#undef TARGET
}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {
#define TARGET TARGET_AVX2
#include "tiles.h"
#include "exact_scores.h"
#include "token_peaks.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
#include "tiles.h"
#include "exact_scores.h"
#include "token_peaks.h"
#undef TARGET
}  // namespace avx512

namespace avx512_int8 {
#define TARGET TARGET_AVX512
#define R1RAY_INT8 1
#include "tiles.h"
#include "exact_scores.h"
#undef R1RAY_INT8
#undef TARGET
}  // namespace avx512_int8

#endif  // __x86_64__

namespace {

using ScoreFunction = void (*)(const ExactJob&, const ExactTask&, const ExactScratch&);
using PeakFunction = void (*)(const ExactJob&, const ExactTask&, int64_t, int64_t, float*, float*);

constexpr int64_t kPartBlocks = 32;           // of single queries: what a thread takes at once
constexpr int64_t kSerialProducts = 1 << 18;  // below, waking threads costs more than it saves

ScoreFunction find_score(const ExactJob& job) {
  const bool is_int8 = job.key_scale != nullptr;
#if defined(__x86_64__)
  if (job.isa >= kAvx512Vnni) {
    if (job.unit == 1) return avx512::score_peaks;
    return is_int8 ? avx512_int8::score_exactly<int8_t> : avx512::score_exactly<float>;
  }
  if (job.isa == kAvx2) {
    if (job.unit == 1) return avx2::score_peaks;
    return is_int8 ? avx2::score_exactly<int8_t> : avx2::score_exactly<float>;
  }
#endif
  if (job.unit == 1) return generic::score_peaks;
  return is_int8 ? generic::score_exactly<int8_t> : generic::score_exactly<float>;
}

PeakFunction find_peak(const ExactJob& job) {
  const bool is_int8 = job.key_scale != nullptr;
#if defined(__x86_64__)
  if (job.isa >= kAvx512Vnni)
    return is_int8 ? avx512::find_token_peaks<int8_t> : avx512::find_token_peaks<float>;
  if (job.isa == kAvx2)
    return is_int8 ? avx2::find_token_peaks<int8_t> : avx2::find_token_peaks<float>;
#endif
  return is_int8 ? generic::find_token_peaks<int8_t> : generic::find_token_peaks<float>;
}

ExactTask describe_task(const ExactJob& job, int64_t number) {
  ExactTask task = {};
  task.unit = job.U - 1 - number % job.U;  // the last have most to score
  task.group = number / job.U % job.K;
  task.row = number / job.U / job.K;
  const int64_t group = job.N / job.K;
  const bool* const marks = job.is_marked + task.group * group;
  task.heads = std::count(marks, marks + group, true);
  task.first = job.starts[task.row] + task.unit * job.unit;
  const int64_t own = task.first / kBlock;
  task.early = own < 1 ? 0 : own - 1;
  task.count = job.counts[task.row * job.U + task.unit];
  task.needs_scores = task.heads > 0 && task.count > 0 && task.count < task.early;
  task.chosen = job.out + ((task.row * job.K + task.group) * job.U + task.unit) * job.M;
  return task;
}

// Where the peaks of a single query's heads begin.
float* peaks_of(const ExactJob& job, const ExactTask& task) {
  const int64_t query = (task.row * job.K + task.group) * job.U + task.unit;
  return job.peaks + query * (job.N / job.K) * job.peak_row;
}

void run_peaks(void* data) {
  ExactJob& job = *static_cast<ExactJob*>(data);
  const PeakFunction find = find_peak(job);
  thread_local Scratch memory;
  const int64_t parts = (job.blocks + kPartBlocks - 1) / kPartBlocks;
  const int64_t tasks = job.B * job.K * job.U * parts;
  for (int64_t i; (i = job.next.fetch_add(1)) < tasks;) {
    const ExactTask task = describe_task(job, i / parts);
    const int64_t begin = i % parts * kPartBlocks;
    const int64_t end = std::min(begin + kPartBlocks, task.early + 2);
    if (!task.needs_scores || begin >= end) continue;
    float* const at = memory.reserve(task.heads * round_up(job.H, 16) + 2 * kBlock);
    if (!at) {
      job.failure = kNoMemory;
      return;
    }
    find(job, task, begin, end, at, peaks_of(job, task));
  }
}

void run_tasks(void* data) {
  ExactJob& job = *static_cast<ExactJob*>(data);
  const ScoreFunction score = find_score(job);
  thread_local Scratch memory;
  const int64_t tasks = job.B * job.K * job.U;
  for (int64_t i; (i = job.next.fetch_add(1)) < tasks;) {
    const ExactTask task = describe_task(job, i);
    if (!task.heads) continue;
    if (task.count < 0 || task.count > task.early || task.count > job.M) {
      job.failure = kBadBlock;
      return;
    }
    ExactScratch scratch = {};
    if (task.needs_scores) {
      float* const at = memory.reserve(lay_out(job, nullptr, scratch));
      if (!at) {
        job.failure = kNoMemory;
        return;
      }
      lay_out(job, at, scratch);
      if (job.unit == 1) scratch.peaks = peaks_of(job, task);
      score(job, task, scratch);
    }
    take_best(scratch.scores, task.early, task.count, scratch.ranks, task.chosen);
    for (int64_t m = task.count; m < job.M; ++m) task.chosen[m] = -1;
  }
}

// Peaks of single queries first, by all threads; then the choice.
void choose_tokens(ExactJob& job) {
  thread_local Scratch peaks;
  job.peak_row = round_up(job.blocks, 16);
  job.peaks = peaks.reserve(job.B * job.N * job.U * job.peak_row);
  if (!job.peaks) {
    job.failure = kNoMemory;
    return;
  }
  const int64_t products = job.B * job.U * job.blocks * kBlock * job.H;
  const int32_t num_threads = products < kSerialProducts ? 1 : job.num_threads;
  run_parallel(run_peaks, &job, num_threads);
  job.next = 0;
  if (job.failure == kNone) run_parallel(run_tasks, &job, job.B * job.U > 1 ? num_threads : 1);
}

}  // namespace
}  // namespace r1ray

extern "C" {

int32_t r1ray_choose_exact(const r1ray::ExactArguments* arguments) {
  r1ray::ExactJob job;
  static_cast<r1ray::ExactArguments&>(job) = *arguments;
  job.blocks = 0;
  for (int64_t row = 0; row < job.B; ++row)
    job.blocks = std::max(job.blocks, (job.starts[row] + job.T) / r1ray::kBlock + 1);
  job.q_scale = 1.44269504f / std::sqrt(static_cast<float>(job.H));
  if (job.unit == 1)
    r1ray::choose_tokens(job);
  else
    r1ray::run_parallel(r1ray::run_tasks, &job, job.num_threads);
  return job.failure;
}

}  // extern "C"
