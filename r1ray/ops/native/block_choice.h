// What a call of the kernel that chooses blocks is given.

#pragma once

#include <cstdint>

namespace r1ray {

// The caller's fields, in the order of the Python structure of the same name.
struct ChoiceArguments {
  const float* q;  // [B, T, N, H], strides in elements
  int64_t q_row, q_token, q_head;
  const float* weight;  // [K, G * H, H rounded up to 16], zeros behind H
  const float* norm;    // [H]
  const float *cos, *sin;  // [B, T, H]
  int64_t rotary_row, rotary_token;
  const float* keys;  // [B, K, C, H]
  int64_t key_row, key_head;
  const int64_t* counts;  // [B, U]: blocks to choose, each at most M
  const int64_t* starts;  // [B]
  int64_t* out;           // [B, K, U, M] contiguous
  int64_t B, T, N, K, H, C, U, M;
  int64_t unit;  // tokens: 64, or 1
  int32_t isa, num_threads;
};

}  // namespace r1ray

extern "C" {

// Returns 0, or what failed (attention.h).
int32_t r1ray_choose_blocks(const r1ray::ChoiceArguments* arguments);

}  // extern "C"
