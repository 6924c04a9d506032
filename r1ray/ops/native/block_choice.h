// What a call of the kernel that chooses blocks by their summaries is given, and how the best of
// scored blocks are taken.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "attention.h"

namespace r1ray {

// The caller's fields, in the order of the Python structure of the same name.
struct ChoiceArguments {
  const float* q;  // [B, T, N, H], strides in elements
  int64_t q_row, q_token, q_head;
  const float* weight;  // [K, G * H, H rounded up to 16], zeros behind H
  const float* norm;    // [H]
  const float *cos, *sin;  // [B, T, H]
  int64_t rotary_row, rotary_token;
  const float* keys;  // [B, K, C, H]; with pages [K, pages, H], `key_row` being a page's stride
  int64_t key_row, key_head;
  Pages pages;
  const int64_t* counts;  // [B, U]: blocks to choose, each at most M
  const int64_t* starts;  // [B]
  int64_t* out;           // [B, K, U, M] contiguous
  int64_t B, T, N, K, H, C, U, M;
  int64_t unit;  // tokens: 64, or 1
  int32_t isa, num_threads;
};

// Greater for a higher score, and of equal ones for an earlier block. NaN has its place in the order.
inline uint64_t rank(float score, int64_t block) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | (0xffffffffu - static_cast<uint32_t>(block));
}

// `count` of the `early` first blocks: the first and the best of the others; all of them in order,
// whatever their scores, where that many are chosen. `ranks` has room for as many.
inline void take_best(const float* scores, int64_t early, int64_t count, uint64_t* ranks,
                      int64_t* out) {
  if (count == early) {
    for (int64_t i = 0; i < count; ++i) out[i] = i;
    return;
  }
  if (!count) return;
  const int64_t others = early - 1, best = count - 1;
  for (int64_t i = 0; i < others; ++i) ranks[i] = rank(scores[i + 1], i + 1);
  std::partial_sort(ranks, ranks + best, ranks + others, std::greater<uint64_t>());
  out[0] = 0;
  for (int64_t i = 0; i < best; ++i)
    out[i + 1] = 0xffffffffu - static_cast<uint32_t>(ranks[i] & 0xffffffffu);
}

}  // namespace r1ray

extern "C" {

// Returns 0, or what failed (attention.h).
int32_t r1ray_choose_blocks(const r1ray::ChoiceArguments* arguments);

}  // extern "C"
