// What a call of the kernel that chooses blocks by the keys in them is given.

#pragma once

#include <cstdint>

#include "attention.h"

namespace r1ray {

// The caller's fields, in the order of the Python structure of the same name.
struct ExactArguments {
  const float* q;  // [B, N, T, H], with rotary positions; strides in elements
  int64_t q_row, q_head, q_token;
  const void* keys;  // [B, K, S, H] float, or int8 where there are scales; or pages
  int64_t key_row, key_head;
  const float* key_scale;  // [B, K, S]; null with float keys
  int64_t key_scale_row, key_scale_head;
  Pages pages;
  const bool* is_marked;  // [N]: the heads to choose for
  const int64_t* counts;  // [B, U]: blocks to choose, each at most M
  const int64_t* starts;  // [B]
  int64_t* out;           // [B, K, U, M] contiguous; of groups without a marked head it stays. In:
                          // what single queries keep anyway, -1 behind it
  int64_t B, N, K, T, H, U, M;
  int64_t unit;  // tokens: 64, of which T is a multiple, or 1
  int32_t isa, num_threads;
};

}  // namespace r1ray

extern "C" {

// Returns 0, or what failed (attention.h). Keys reach to every start + T.
int32_t r1ray_choose_exact(const r1ray::ExactArguments* arguments);

}  // extern "C"
