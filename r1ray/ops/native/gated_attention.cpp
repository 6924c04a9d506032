// What a layer does with its new queries, in one call: the choice of blocks by their summaries, that by
// the keys where heads are marked, and attention to what is kept.
//
// Threads stay together from one kernel to the next. What is chosen is handed on in memory of the
// calling thread.

#include "gated_attention.h"

#include <algorithm>

#include "runtime.h"

namespace r1ray {

namespace {

struct GatedJob : GatedArguments {
  bool has_marks;
  int32_t failure;
};

void run(void* data) {
  GatedJob& job = *static_cast<GatedJob*>(data);
  job.failure = r1ray_choose_blocks(&job.choice);
  if (job.failure == kNone && job.has_marks) job.failure = r1ray_choose_exact(&job.exact);
  if (job.failure == kNone) job.failure = r1ray_sparse_attention(&job.attention);
}

void place(GatedJob& job, const GatedTensors& tensors) {
  job.choice.q = tensors.query;
  job.choice.weight = tensors.weight;
  job.choice.norm = tensors.norm;
  job.choice.cos = tensors.cos;
  job.choice.sin = tensors.sin;
  job.choice.keys = tensors.summaries;
  job.exact.is_marked = tensors.is_marked;
  job.exact.q = job.attention.q = tensors.rotated;
  job.exact.keys = job.attention.keys = tensors.keys;
  job.exact.key_scale = job.attention.key_scale = tensors.key_scale;
  job.attention.values = tensors.values;
  job.attention.value_scale = tensors.value_scale;
  job.attention.out = tensors.out;
}

}  // namespace
}  // namespace r1ray

extern "C" {

int32_t r1ray_gated_attention(const r1ray::GatedArguments* arguments,
                              const r1ray::GatedTensors* tensors) {
  r1ray::GatedJob job = {*arguments, false, r1ray::kNone};
  r1ray::place(job, *tensors);
  const bool* const marks = tensors->is_marked;
  job.has_marks = std::find(marks, marks + job.exact.N, true) != marks + job.exact.N;
  const int64_t room = job.has_marks ? job.exact.M : job.choice.M;
  thread_local r1ray::Scratch memory;
  float* const chosen = memory.reserve(2 * job.exact.B * job.exact.K * job.exact.U * room);
  if (!chosen && room) return r1ray::kNoMemory;
  job.choice.out = job.exact.out = reinterpret_cast<int64_t*>(chosen);
  job.attention.chosen = job.choice.out;
  job.choice.M = job.exact.M = job.attention.M = room;
  r1ray::with_threads(r1ray::run, &job, job.attention.num_threads);
  return job.failure;
}

}  // extern "C"
