// What a call that chooses and attends is given.

#pragma once

#include <cstdint>

#include "attention.h"
#include "block_choice.h"
#include "exact_choice.h"

namespace r1ray {

// The caller's fields, in the order of the Python structure of the same name: those of the three
// kernels but for addresses of tensors and of what they hand on. M is the room that each needs itself.
struct GatedArguments {
  ChoiceArguments choice;
  ExactArguments exact;
  AttentionArguments attention;
};

// Addresses in the order of the Python list.
struct GatedTensors {
  const float *query, *weight, *norm, *cos, *sin, *summaries;  // as in ChoiceArguments
  const float* rotated;  // queries, as in ExactArguments and AttentionArguments
  const bool* is_marked;
  const void *keys, *values;
  const float *key_scale, *value_scale;  // null with float keys
  float* out;
};

}  // namespace r1ray

extern "C" {

// Returns 0, or what failed (attention.h).
int32_t r1ray_gated_attention(const r1ray::GatedArguments* arguments,
                              const r1ray::GatedTensors* tensors);

}  // extern "C"
